//! The Azure Resource Manager of tests, judged by Microsoft's own clients.
//!
//! `cargo xtask test` sets `KPROV_TEST_AZURE_PYTHON` (a Python with azure-mgmt-compute, azure-mgmt-network and
//! azure-mgmt-resource) and `KPROV_TEST_AZURE_MODELS` (see [`kprov_emulators::azure::MODELS_VARIABLE`]).

use std::path::Path;
use std::time::Duration;

use kprov_emulators::azure::{Arm, Fault, Options, Recorded, Verdict, What, held_against_models};
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
