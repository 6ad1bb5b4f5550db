//! Tokens as Azure's tools get them. Each test runs in a process of its own (nextest), with its own environment.

use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;

use crate::cloud::Cloud;

/// This very test program again, with another environment: variables can't be set safely from inside.
fn again(test: &str, cloud: &Cloud, variables: &[(&str, String)]) -> std::process::Output {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--ignored", "--nocapture"]);
    for name in [
        "AZURE_CLIENT_SECRET",
        "AZURE_CLIENT_ID",
        "AZURE_TENANT_ID",
        "AZURE_FEDERATED_TOKEN_FILE",
        "IDENTITY_ENDPOINT",
    ] {
        command.env_remove(name);
    }
    command
        .env("KPROV_TEST_ENDPOINT", cloud.arm.endpoint())
        .env("KPROV_TEST_SUBSCRIPTION", cloud.arm.subscription())
        .envs(variables.iter().map(|(k, v)| (*k, v.as_str())));
    command.output().unwrap()
}

/// Run by the tests below, in their environment.
#[tokio::test]
#[ignore = "run by the other tests here"]
async fn observes() {
    use kprov_provider::Provider as _;
    let var = |name: &str| std::env::var(name).unwrap();
    let settings = kprov_types::infrastructure::AzureSettings {
        subscription: Some(var("KPROV_TEST_SUBSCRIPTION")),
        location: Some("westeurope".into()),
        endpoint_url: Some(var("KPROV_TEST_ENDPOINT")),
        ..Default::default()
    };
    let around = kprov_provider_azure::Surroundings::default();
    let config = kprov_provider_azure::AzureConfig::new(&settings, &[], &around).unwrap();
    let provider = kprov_provider_azure::AzureProvider::open(config).unwrap();
    let cluster = kprov_types::ClusterName::new("demo").unwrap();
    for _ in 0..3 {
        match provider.observe(&cluster).await {
            Ok(observed) => assert_eq!(observed, kprov_types::machine::Observed::default()),
            Err(error) => panic!(
                "{}; hint: {}",
                crate::cloud::shown(&error),
                error.hint.clone().unwrap_or_default()
            ),
        }
    }
}

const OBSERVES: &str = "credentials::observes";

#[tokio::test(flavor = "multi_thread")]
async fn a_managed_identity() {
    let cloud = Cloud::fast().await;
    let variables = cloud.arm.identity_variables();
    let output = tokio::task::block_in_place(|| again(OBSERVES, &cloud, &variables));
    assert!(output.status.success(), "{output:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn az_login_is_asked_once() {
    let cloud = Cloud::fast().await;
    let dir = tempfile::tempdir().unwrap();
    let az = dir.path().join("az");
    let expires = jiff::Timestamp::now().as_second() + 3600;
    let answer = serde_json::json!({"accessToken": cloud.arm.token(), "expires_on": expires, "tokenType": "Bearer"});
    // What `az account get-access-token` does, counting how often it does.
    let script = format!("#!/bin/sh\necho x >> {}/calls\necho '{answer}'\n", dir.path().display());
    std::fs::write(&az, script).unwrap();
    std::fs::set_permissions(&az, std::fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", dir.path().display(), std::env::var("PATH").unwrap());
    let output = tokio::task::block_in_place(|| again(OBSERVES, &cloud, &[("PATH", path)]));
    assert!(output.status.success(), "{output:?}");
    assert_eq!(std::fs::read_to_string(dir.path().join("calls")).unwrap(), "x\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_without_its_application_is_refused_before_anything_is_asked() {
    let cloud = Cloud::fast().await;
    let output = tokio::task::block_in_place(|| again(OBSERVES, &cloud, &[("AZURE_CLIENT_SECRET", "s".into())]));
    assert!(!output.status.success());
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stderr),
        String::from_utf8_lossy(&output.stdout)
    );
    assert!(text.contains("there are no Azure credentials that work"), "{text}");
    assert!(text.contains("is set without `AZURE_TENANT_ID`"), "{text}");
    assert_eq!(cloud.arm.record.total(), 0);
}
