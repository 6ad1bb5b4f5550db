//! Tokens as Azure's tools get them. Each test runs in a process of its own (nextest), with its own environment.

use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use kprov_emulators::azure::{Fault, Options, What};

use crate::cloud::Cloud;
use crate::login::Login;

/// Another tenant, which has nothing to do with the subscription.
const ELSEWHERE: &str = "bbbbbbbb-bbbb-4ccc-8ddd-eeeeeeeeeeee";

/// This very test program again, with another environment: variables can't be set safely from inside.
fn again(test: &str, cloud: &Cloud, variables: &[(&str, String)]) -> std::process::Output {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--ignored", "--nocapture"]);
    for name in [
        "AZURE_CLIENT_CERTIFICATE_PATH",
        "AZURE_CLIENT_SECRET",
        "AZURE_CLIENT_ID",
        "AZURE_TENANT_ID",
        "AZURE_FEDERATED_TOKEN_FILE",
        "AZURE_AUTHORITY_HOST",
        "IDENTITY_ENDPOINT",
        "SSL_CERT_FILE",
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
                "{}; hint: {}; {:?}",
                crate::cloud::shown(&error),
                error.hint.clone().unwrap_or_default(),
                error.advice
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
async fn a_token_that_is_withdrawn_is_replaced() {
    let cloud = Cloud::fast().await;
    cloud.arm.fault(Fault::on("LIST disks", What::ExpiredToken));
    let variables = cloud.arm.identity_variables();
    let output = tokio::task::block_in_place(|| again(OBSERVES, &cloud, &variables));
    assert!(output.status.success(), "{output:?}");
    let calls = cloud.arm.record.calls();
    assert_eq!(calls.get("GET token"), Some(&2), "{calls:?}");
}

/// What a test that fails has said.
fn said(output: &std::process::Output) -> String {
    assert!(!output.status.success(), "{output:?}");
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stderr),
        String::from_utf8_lossy(&output.stdout)
    )
}

async fn with_tenants() -> (Cloud, Login, Options) {
    let options = Options {
        other_tenants: vec![ELSEWHERE.into()],
        ..Options::default()
    };
    let cloud = Cloud::start(options.clone()).await;
    let login = Login::start(&cloud).await;
    (cloud, login, options)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_applications_secret() {
    let (cloud, login, options) = with_tenants().await;
    let observe = |tenant: &str, application: &str, secret: &str| {
        let mut variables = login.variables(tenant, application);
        variables.push(("AZURE_CLIENT_SECRET", secret.to_owned()));
        tokio::task::block_in_place(|| again(OBSERVES, &cloud, &variables))
    };
    let (tenant, application, secret) = (&options.tenant, &options.client_id, &options.client_secret);
    let output = observe(tenant, application, secret);
    assert!(output.status.success(), "{output:?}");
    let calls = cloud.arm.record.calls();
    assert_eq!(calls.get("POST token"), Some(&1), "{calls:?}");

    for (output, message, beneath, hint) in [
        (
            observe("00000000-0000-4000-8000-000000000000", application, secret),
            "the Azure tenant is not there",
            "AADSTS90002: Tenant '00000000-0000-4000-8000-000000000000' not found",
            "AZURE_TENANT_ID",
        ),
        (
            observe(ELSEWHERE, application, secret),
            "the Azure credentials are of another tenant than the subscription",
            "wrong issuer",
            "set `AZURE_TENANT_ID`",
        ),
        (
            observe(tenant, "00000000-0000-4000-8000-000000000000", secret),
            "the Azure tenant has no such application",
            "AADSTS700016",
            "AZURE_CLIENT_ID",
        ),
        (
            observe(tenant, application, "wrong"),
            "the Azure client secret is wrong, or has expired",
            "AADSTS7000215: Invalid client secret provided",
            "AZURE_CLIENT_SECRET",
        ),
    ] {
        let text = said(&output);
        for part in [message, beneath, hint] {
            assert!(text.contains(part), "`{part}` is not in {text}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_applications_certificate() {
    let dir = tempfile::tempdir().unwrap();
    let made = Command::new("sh")
        .current_dir(dir.path())
        .args(["-ec", "for name in known unknown; do openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=me -days 2 -keyout key -out cert; \
            cat key cert > $name.pem; done; openssl x509 -in known.pem -outform DER | sha256sum"])
        .output()
        .unwrap();
    assert!(made.status.success(), "{made:?}");
    let digest = String::from_utf8(made.stdout).unwrap();
    let digest = digest.split_whitespace().next().unwrap();
    let bytes: Vec<u8> = (0..digest.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&digest[at..at + 2], 16).unwrap())
        .collect();
    let options = Options {
        client_certificates: vec![URL_SAFE_NO_PAD.encode(bytes)],
        ..Options::default()
    };
    let cloud = Cloud::start(options.clone()).await;
    let login = Login::start(&cloud).await;
    let observe = |name: &str| {
        let mut variables = login.variables(&options.tenant, &options.client_id);
        let path = dir.path().join(name).to_str().unwrap().to_owned();
        variables.push(("AZURE_CLIENT_CERTIFICATE_PATH", path));
        tokio::task::block_in_place(|| again(OBSERVES, &cloud, &variables))
    };
    let output = observe("known.pem");
    assert!(output.status.success(), "{output:?}");
    let text = said(&observe("unknown.pem"));
    for part in [
        "does not know this certificate",
        "AADSTS700027",
        "AZURE_CLIENT_CERTIFICATE_PATH",
    ] {
        assert!(text.contains(part), "`{part}` is not in {text}");
    }
    let text = said(&observe("cert"));
    assert!(text.contains("holds no private key in PEM"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_that_does_not_answer_is_tried_again() {
    let (cloud, login, options) = with_tenants().await;
    let mut variables = login.variables(&options.tenant, &options.client_id);
    variables.push(("AZURE_CLIENT_SECRET", options.client_secret));
    drop(login);
    let text = said(&tokio::task::block_in_place(|| again(OBSERVES, &cloud, &variables)));
    assert!(text.contains("the Azure login does not answer"), "{text}");
    assert!(text.contains("HTTPS_PROXY"), "{text}");
    assert!(text.contains("RetryAfter(5s)"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_workload_identity() {
    let (cloud, login, options) = with_tenants().await;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("token");
    let observe = |tenant: &str, assertion: &str| {
        std::fs::write(&file, assertion).unwrap();
        let mut variables = login.variables(tenant, &options.client_id);
        variables.push(("AZURE_FEDERATED_TOKEN_FILE", file.to_str().unwrap().to_owned()));
        tokio::task::block_in_place(|| again(OBSERVES, &cloud, &variables))
    };
    let output = observe(&options.tenant, &cloud.arm.assertion(None, 600));
    assert!(output.status.success(), "{output:?}");

    let stranger = cloud.arm.assertion(Some("system:serviceaccount:default:default"), 600);
    for (output, message, beneath, hint) in [
        (
            observe(&options.tenant, &cloud.arm.assertion(None, -600)),
            "the workload identity's service account token has expired",
            "AADSTS700024: Client assertion is not within its valid time range",
            "AZURE_FEDERATED_TOKEN_FILE",
        ),
        (
            observe(&options.tenant, &stranger),
            "the Azure application does not trust this workload identity's service account",
            "subject 'system:serviceaccount:default:default'",
            "federated-credential create",
        ),
        (
            observe(&options.tenant, "nonsense"),
            "the workload identity's file holds no service account token",
            "AADSTS50027",
            "AZURE_FEDERATED_TOKEN_FILE",
        ),
        (
            observe(ELSEWHERE, &cloud.arm.assertion(None, 600)),
            "the Azure credentials are of another tenant than the subscription",
            "wrong issuer",
            "set `AZURE_TENANT_ID`",
        ),
    ] {
        let text = said(&output);
        for part in [message, beneath, hint] {
            assert!(text.contains(part), "`{part}` is not in {text}");
        }
    }
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
async fn az_login_that_has_expired() {
    let cloud = Cloud::fast().await;
    let dir = tempfile::tempdir().unwrap();
    let az = dir.path().join("az");
    let script =
        "#!/bin/sh\necho 'ERROR: AADSTS700082: The refresh token has expired due to inactivity.' >&2\nexit 1\n";
    std::fs::write(&az, script).unwrap();
    std::fs::set_permissions(&az, std::fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", dir.path().display(), std::env::var("PATH").unwrap());
    let text = said(&tokio::task::block_in_place(|| {
        again(OBSERVES, &cloud, &[("PATH", path)])
    }));
    for part in [
        "the Azure login has expired",
        "AADSTS700082",
        "log in again: `az login`",
    ] {
        assert!(text.contains(part), "`{part}` is not in {text}");
    }
    assert_eq!(cloud.arm.record.total(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_without_its_application_is_refused_before_anything_is_asked() {
    let cloud = Cloud::fast().await;
    let output = tokio::task::block_in_place(|| again(OBSERVES, &cloud, &[("AZURE_CLIENT_SECRET", "s".into())]));
    let text = said(&output);
    assert!(text.contains("there are no Azure credentials that work"), "{text}");
    assert!(text.contains("is set without `AZURE_TENANT_ID`"), "{text}");
    assert_eq!(cloud.arm.record.total(), 0);
}
