//! A Resource Manager for one test, providers that talk to it, and the loop that `kprov up` and `kprov down` run.

use std::collections::BTreeSet;
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use kprov_emulators::azure::{Arm, Options};
use kprov_provider::ProviderError;
use kprov_provider_azure::{AzureConfig, AzureProvider, Credentials, Surroundings};
use kprov_provision::{Action, DriveError, Goal, Pace, Progress, Waiting, Wanted, drive};
use kprov_types::infrastructure::AzureSettings;
use kprov_types::machine::{DiskSpec, FirstBoot, MachineSpec, NetworkSpec, Observed};
use kprov_types::{ClusterName, MachineName, Role};

/// How long `up` or `down` may take in a test.
const LIMIT: Duration = Duration::from_mins(5);

pub(crate) struct Cloud {
    pub(crate) arm: Arm,
    pub(crate) cluster: ClusterName,
}

impl Cloud {
    pub(crate) async fn start(options: Options) -> Self {
        Self {
            arm: Arm::start(options).await.unwrap(),
            cluster: ClusterName::new("demo").unwrap(),
        }
    }

    /// One whose operations take next to no time.
    pub(crate) async fn fast() -> Self {
        Self::start(Options {
            settle: Duration::from_millis(2),
            page: 100,
            ..Options::default()
        })
        .await
    }

    pub(crate) fn config(&self, edit: impl FnOnce(&mut AzureSettings)) -> AzureConfig {
        let mut settings = AzureSettings {
            subscription: Some(self.arm.subscription()),
            location: Some("westeurope".into()),
            endpoint_url: Some(self.arm.endpoint()),
            ..AzureSettings::default()
        };
        edit(&mut settings);
        let mut config = AzureConfig::new(&settings, &[], &Surroundings::default()).unwrap();
        config.credentials = Credentials::Token(self.arm.token());
        config
    }

    pub(crate) fn provider(&self) -> AzureProvider {
        AzureProvider::open(self.config(|_| {})).unwrap()
    }

    pub(crate) async fn up(&self, control_plane: usize, workers: usize) -> Result<Observed, DriveError> {
        let goal = Goal::Present(wanted(&self.cluster, control_plane, workers));
        self.reach(&self.provider(), &goal).await
    }

    pub(crate) async fn down(&self) -> Result<Observed, DriveError> {
        self.reach(&self.provider(), &Goal::Nothing).await
    }

    pub(crate) async fn reach(&self, provider: &AzureProvider, goal: &Goal) -> Result<Observed, DriveError> {
        let pace = Hurried(tokio::time::Instant::now());
        drive(provider, &self.cluster, goal, LIMIT, &pace, &pace).await
    }

    /// The ids of all there is, without the subscription's part.
    pub(crate) fn resources(&self) -> BTreeSet<String> {
        let all = self.arm.resources().into_iter();
        all.map(|id| {
            id.split_once("/resourceGroups/")
                .map_or(id.clone(), |(_, rest)| rest.to_owned())
        })
        .collect()
    }
}

/// Waits a hundredth of what is asked for: what it waits for takes milliseconds here.
struct Hurried(tokio::time::Instant);

impl Pace for Hurried {
    fn elapsed(&self) -> Duration {
        self.0.elapsed()
    }
    fn sleep(&self, duration: Duration) -> BoxFuture<'_, ()> {
        tokio::time::sleep(duration / 100).boxed()
    }
}

impl Progress for Hurried {
    fn action(&self, _: &Action) {}
    fn waiting(&self, _: &[Waiting]) {}
    fn retrying(&self, _: &ProviderError, _: Duration) {}
}

pub(crate) fn wanted(cluster: &ClusterName, control_plane: usize, workers: usize) -> Wanted {
    let spec = |suffix: String, role| MachineSpec {
        name: MachineName::new(format!("{cluster}-{suffix}")).unwrap(),
        role,
        zone: None,
        size: None,
        image: None,
        first_boot: FirstBoot("#!/bin/sh\nexec true\n".into()),
        data_disk: role == Role::ControlPlane,
    };
    let mut machines: Vec<_> = (0..control_plane)
        .map(|i| spec(format!("cp-{i}"), Role::ControlPlane))
        .collect();
    let disks = machines.iter().map(|m| DiskSpec {
        machine: m.name.clone(),
        size_gib: 8,
    });
    let disks = disks.collect();
    machines.extend((0..workers).map(|i| spec(format!("worker-{i}"), Role::Worker)));
    Wanted {
        network: NetworkSpec {
            cidr: None,
            api_port: 6443,
        },
        disks,
        machines,
    }
}

/// An error with all that's beneath it and its hint, as a person reads it.
pub(crate) fn shown(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(beneath) = cause {
        text = format!("{text} <- {beneath}");
        cause = beneath.source();
    }
    text
}

/// The provider's error within that of the loop.
pub(crate) fn provider_error(error: DriveError) -> ProviderError {
    match error {
        DriveError::Provider(error) => error,
        other => panic!("not the provider's: {other}"),
    }
}
