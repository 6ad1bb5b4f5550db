//! The Azure Resource Manager of tests, judged by Microsoft's own clients.
//!
//! `cargo xtask test` sets `KPROV_TEST_AZURE_PYTHON` (a Python with azure-mgmt-compute, azure-mgmt-network and
//! azure-mgmt-resource) and `KPROV_TEST_AZURE_MODELS` (see [`kprov_emulators::azure::MODELS_VARIABLE`]).

#![cfg(test)]

use std::path::Path;
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use kprov_emulators::azure::{Arm, Fault, Options, Recorded, Verdict, What, held_against_models};
use kprov_provider::ProviderError;
use kprov_provider_azure::{AzureConfig, AzureProvider, Credentials, Surroundings};
use kprov_provision::{Action, Goal, Pace, Progress, Waiting, Wanted, drive};
use kprov_types::infrastructure::AzureSettings;
use kprov_types::machine::{DiskSpec, FirstBoot, MachineSpec, NetworkSpec};
use kprov_types::{ClusterName, MachineName, Role};
use serde_json::{Value, json};
use tokio::process::Command;

#[tokio::test]
async fn microsofts_python_clients_make_find_and_delete_everything() {
    let python =
        std::env::var("KPROV_TEST_AZURE_PYTHON").expect("`KPROV_TEST_AZURE_PYTHON` is set by `cargo xtask test`");
    let options = Options::default();
    let arm = Arm::start(options.clone()).await.unwrap();
    // Throttled calls are repeated by the library, as Retry-After says.
    arm.fault(Fault::on("GET disks", What::Throttle(1)));
    arm.fault(Fault::on("LIST virtualMachines", What::Throttle(1)).after(1));
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/azure-referee.py");
    let run = Command::new(python)
        .arg(script)
        .args([
            &arm.endpoint(),
            &options.subscription,
            &options.tenant,
            &options.client_id,
            &options.client_secret,
        ])
        .kill_on_drop(true)
        .output();
    let out = tokio::time::timeout(Duration::from_secs(90), run)
        .await
        .expect("within 90 s")
        .unwrap();
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
    assert!(out.status.success(), "{text}\n{:?}", arm.record.calls());
    assert!(text.contains("everything as Microsoft's libraries expect it"), "{text}");
    assert_eq!(arm.resources(), Vec::<String>::new());
    let calls = arm.record.calls();
    for call in [
        "PUT virtualMachines",
        "DELETE virtualMachines",
        "GET operations",
        "LIST resources",
        "PUT disks",
        "DELETE resourceGroups",
    ] {
        assert!(calls.contains_key(call), "no {call} in {calls:?}");
    }

    // One vendor's Python and JavaScript agree about what is sent.
    let verdict = held_against_models(&arm.bodies()).await.unwrap();
    if let Verdict::Checked { bodies, problems } = verdict {
        assert!(bodies > 20, "{bodies} bodies");
        assert_eq!(problems, Vec::<String>::new());
    }
}

fn recorded(call: &str, body: Value) -> Recorded {
    Recorded {
        call: call.to_owned(),
        path: "/x/name".to_owned(),
        api_version: None,
        body,
    }
}

#[tokio::test]
async fn what_no_model_has_is_found() {
    let bodies = [
        recorded(
            "PUT virtualNetworks",
            json!({"location": "x", "properties": {"addressSpace": {"prefixes": ["10.0.0.0/8"]}}}),
        ),
        recorded(
            "PUT virtualMachines",
            json!({"properties": {"osProfile": {"computerName": 7}}, "size": "x"}),
        ),
        recorded(
            "PUT disks",
            json!({"location": "x", "properties": {"creationData": {}}}),
        ),
        recorded(
            "PUT networkSecurityGroups",
            json!({"location": "x", "properties": {"securityRules": [{"name": "a", "properties": {"priority": "high"}}]}}),
        ),
        recorded("PUT somethingElse", json!({})),
        recorded("PUT resourceGroups", json!({"location": "x"})),
    ];
    let Verdict::Checked { bodies, problems } = held_against_models(&bodies).await.unwrap() else {
        return;
    };
    assert_eq!(bodies, 4);
    let all = problems.join("\n");
    for expected in [
        "PUT virtualNetworks name: properties.addressSpace.prefixes is in no model",
        "PUT virtualMachines name: size is in no model",
        "PUT virtualMachines name: location is required",
        "PUT virtualMachines name: properties.osProfile.computerName has to be a string, and is 7",
        "PUT disks name: properties.creationData.createOption is required",
        "PUT networkSecurityGroups name: properties.securityRules[0].properties.priority has to be a number, and is \"high\"",
        "PUT somethingElse name: the body belongs to a call without a model",
    ] {
        assert!(all.contains(expected), "{expected} isn't in:\n{all}");
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

/// Two control-plane machines and a worker.
fn wanted() -> Wanted {
    let machine = |name: &str, role| MachineSpec {
        name: MachineName::new(name.to_owned()).unwrap(),
        role,
        zone: None,
        size: None,
        image: None,
        first_boot: FirstBoot("#!/bin/sh\nexec true\n".into()),
        data_disk: role == Role::ControlPlane,
    };
    let machines = vec![
        machine("demo-cp-0", Role::ControlPlane),
        machine("demo-cp-1", Role::ControlPlane),
        machine("demo-worker-0", Role::Worker),
    ];
    let disks = machines[..2].iter().map(|m| DiskSpec {
        machine: m.name.clone(),
        size_gib: 8,
    });
    Wanted {
        network: NetworkSpec {
            cidr: None,
            api_port: 6443,
        },
        disks: disks.collect(),
        machines,
    }
}

#[tokio::test]
async fn kprovs_own_requests_fit_microsofts_models() {
    let cluster = ClusterName::new("demo").unwrap();
    let mut identity = None;
    for private in [false, true] {
        let arm = Arm::start(Options::default()).await.unwrap();
        if private {
            let id = format!(
                "/subscriptions/{}/resourceGroups/people/providers/Microsoft.ManagedIdentity/userAssignedIdentities/kprov",
                arm.subscription()
            );
            arm.configure(|o| o.identities = vec![id.clone()]);
            identity = Some(id);
        }
        let settings = AzureSettings {
            subscription: Some(arm.subscription()),
            location: Some("westeurope".into()),
            endpoint_url: Some(arm.endpoint()),
            private,
            access: vec!["10.0.0.0/8".parse().unwrap()],
            identity: identity.clone(),
            ..AzureSettings::default()
        };
        let mut config = AzureConfig::new(&settings, &[], &Surroundings::default()).unwrap();
        config.credentials = Credentials::Token(arm.token());
        let provider = AzureProvider::open(config).unwrap();
        let pace = Hurried(tokio::time::Instant::now());
        for goal in [Goal::Present(wanted()), Goal::Nothing] {
            let reached = drive(&provider, &cluster, &goal, Duration::from_mins(2), &pace, &pace).await;
            assert!(reached.is_ok(), "{:?} with {:?}", reached.err(), arm.resources());
            if matches!(goal, Goal::Present(_)) {
                assert_eq!(arm.virtual_machines().len(), 3);
            }
        }
        assert_eq!(arm.resources(), Vec::<String>::new());
        let sent = arm.bodies();
        assert!(sent.iter().any(|b| b.call == "PUT virtualMachines"), "{sent:?}");
        if let Verdict::Checked { bodies, problems } = held_against_models(&sent).await.unwrap() {
            assert!(bodies >= 12, "{bodies} bodies");
            assert_eq!(problems, Vec::<String>::new());
        }
    }
}
