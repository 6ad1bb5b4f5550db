//! Operations that fail, never end, are throttled, or show late.

use std::collections::BTreeSet;
use std::time::Duration;

use kprov_emulators::azure::{Fault, Options, Rate, Refusal, What};
use kprov_provider::{Advice, Provider as _};
use kprov_provider_azure::AzureProvider;
use kprov_provision::Goal;
use kprov_types::machine::MachineState;

use crate::cloud::{Cloud, provider_error, shown, wanted};

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_machine_says_why_and_is_put_again() {
    let cloud = Cloud::fast().await;
    let full = Refusal::new(
        409,
        "ZonalAllocationFailed",
        "We do not have sufficient capacity for the requested VM size in this zone.",
    );
    cloud
        .arm
        .fault(Fault::on("PUT virtualMachines", What::Fail(full)).named("demo-worker-0"));
    let error = provider_error(cloud.up(1, 1).await.unwrap_err());
    assert_eq!(
        error.to_string(),
        "Azure has no room for a machine of size `Standard_D2s_v5` in `westeurope`, zone 1 at this time"
    );
    assert!(
        shown(&error).contains("<- `ZonalAllocationFailed`: We do not have sufficient"),
        "{}",
        shown(&error)
    );
    let observed = cloud.provider().observe(&cloud.cluster).await.unwrap();
    let failed = observed
        .machines
        .iter()
        .find(|m| m.name.as_str() == "demo-worker-0")
        .unwrap();
    assert_eq!(failed.state, MachineState::Stopped);
    let observed = cloud.up(1, 1).await.unwrap();
    assert!(observed.machines.iter().all(|m| m.state == MachineState::Running));
    // An error that nobody knows is shown as it is.
    let cloud = Cloud::fast().await;
    let odd = Refusal::new(
        500,
        "OSProvisioningClientError",
        "OS provisioning failed for VM 'demo-cp-0'.",
    );
    cloud
        .arm
        .fault(Fault::on("PUT virtualMachines", What::Fail(odd)).named("demo-cp-0"));
    let error = provider_error(cloud.up(1, 0).await.unwrap_err());
    assert_eq!(error.to_string(), "virtual machine `demo-cp-0` has failed");
    assert!(
        shown(&error).contains("`OSProvisioningClientError`: OS provisioning failed"),
        "{}",
        shown(&error)
    );
    cloud.down().await.unwrap();
    assert_eq!(cloud.resources(), BTreeSet::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operation_that_never_ends_has_a_deadline() {
    let cloud = Cloud::fast().await;
    for (call, what) in [
        ("PUT natGateways", "NAT gateway `demo-nat`"),
        ("PUT disks", "managed disk `demo-cp-0-data`"),
        ("PUT virtualMachines", "virtual machine `demo-cp-0`"),
    ] {
        let cloud = Cloud::fast().await;
        cloud.arm.fault(Fault::on(call, What::NeverEnds));
        let mut config = cloud.config(|_| {});
        config.operation_limit = Duration::from_millis(300);
        let provider = AzureProvider::open(config).unwrap();
        let want = wanted(&cloud.cluster, 1, 0);
        let started = std::time::Instant::now();
        let made = async {
            provider.ensure_network(&cloud.cluster, &want.network).await?;
            provider.ensure_disks(&cloud.cluster, &want.disks).await?;
            provider.ensure_machines(&cloud.cluster, &want.machines).await
        };
        let error = made.await.unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with(&format!("{what} is still not done after ")),
            "{}",
            shown(&error)
        );
        assert_eq!(error.advice, Advice::LookFirst);
        assert!(error.hint.unwrap().contains("activity log"));
        assert!(started.elapsed() < Duration::from_secs(20));
    }
    drop(cloud);
}

#[tokio::test(flavor = "multi_thread")]
async fn throttling_is_obeyed() {
    let cloud = Cloud::start(Options {
        settle: Duration::from_millis(2),
        rate: Some(Rate {
            burst: 40.0,
            per_second: 60.0,
        }),
        ..Options::default()
    })
    .await;
    let pace = Patient(tokio::time::Instant::now());
    let goal = Goal::Present(wanted(&cloud.cluster, 1, 3));
    let limit = Duration::from_mins(2);
    let provider = cloud.provider();
    kprov_provision::drive(&provider, &cloud.cluster, &goal, limit, &pace, &pace)
        .await
        .unwrap();
    let error = {
        cloud.arm.configure(|o| o.rate = None);
        cloud.arm.fault(Fault::on("GET resourceGroups", What::Throttle(90)));
        provider.observe(&cloud.cluster).await.unwrap_err()
    };
    assert_eq!(
        error.advice,
        Advice::RetryAfter(Duration::from_secs(90)),
        "{}",
        shown(&error)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_look_comes_to_an_end_however_few_requests_go_at_once() {
    let cloud = Cloud::fast().await;
    let made = cloud.up(1, 1).await.unwrap();
    cloud.arm.configure(|o| {
        o.rate = Some(Rate {
            burst: 3.0,
            per_second: 2.0,
        });
    });
    cloud.arm.record.reset();
    let seen = cloud.provider().observe(&cloud.cluster).await.unwrap();
    assert_eq!(seen, made);
    // It takes ten requests, of which three may go at once: some are refused, unless they are spread over seconds.
    assert!(cloud.arm.record.total() > 10, "{:?}", cloud.arm.record.calls());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_shows_late_is_not_made_twice() {
    let cloud = Cloud::start(Options {
        settle: Duration::from_millis(5),
        list_lag: Duration::from_millis(60),
        ..Options::default()
    })
    .await;
    cloud.up(1, 1).await.unwrap();
    assert_eq!(cloud.arm.virtual_machines().len(), 2);
    cloud.down().await.unwrap();
    assert_eq!(cloud.resources(), BTreeSet::new());
}

/// Waits as long as it's told.
struct Patient(tokio::time::Instant);

impl kprov_provision::Pace for Patient {
    fn elapsed(&self) -> Duration {
        self.0.elapsed()
    }
    fn sleep(&self, duration: Duration) -> futures::future::BoxFuture<'_, ()> {
        Box::pin(tokio::time::sleep(duration))
    }
}

impl kprov_provision::Progress for Patient {
    fn action(&self, _: &kprov_provision::Action) {}
    fn waiting(&self, _: &[kprov_provision::Waiting]) {}
    fn retrying(&self, _: &kprov_provider::ProviderError, _: Duration) {}
}
