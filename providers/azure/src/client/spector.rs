//! The client against `TypeSpec`'s spector, which serves the long-running operations of Azure's own specification
//! (`azure-http-specs`, "operation templates"). `KPROV_TEST_AZURE_SPECTOR` names the directory with both packages' `node_modules`;
//! `cargo xtask test` sets it where there is Node.js.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use kprov_types::infrastructure::AzureSettings;
use serde_json::json;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};

use super::*;
use crate::config::{Credentials, Surroundings};

const API: &str = "2023-12-01-preview";
const SUBSCRIPTION: &str = "00000000-0000-0000-0000-000000000000";

/// A server that ends with the test, even when that is killed.
struct Spector {
    port: u16,
    _process: Child,
    _repository: tempfile::TempDir,
}

impl Spector {
    async fn start(packages: &Path) -> Self {
        // It asks git, in the directory of its specifications, for the commit that they are of: an empty repository's will do.
        let repository = tempfile::tempdir().unwrap();
        let git = |args: &[&str]| {
            let mut git = std::process::Command::new("git");
            git.current_dir(repository.path()).args(args);
            assert!(git.status().unwrap().success(), "{args:?}");
        };
        git(&["init", "--quiet"]);
        git(&[
            "-c",
            "user.name=test",
            "-c",
            "user.email=test@localhost",
            "commit",
            "--quiet",
            "--allow-empty",
            "--message=empty",
        ]);
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let modules = packages.join("node_modules");
        let mut process = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "node"])
            .arg(modules.join("@typespec/spector/cmd/cli.mjs"))
            .arg("serve")
            .arg(modules.join("@azure-tools/azure-http-specs/specs"))
            .args(["--port", &port.to_string(), "--coverageFile", "coverage.json"])
            .current_dir(repository.path())
            .env("GIT_DIR", repository.path().join(".git"))
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
        while let Some(line) = lines.next_line().await.unwrap() {
            if line.contains("Started server") {
                tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
                return Self {
                    port,
                    _process: process,
                    _repository: repository,
                };
            }
        }
        panic!("spector has ended by itself");
    }

    fn client(&self) -> Client {
        let settings = AzureSettings {
            subscription: Some(SUBSCRIPTION.into()),
            location: Some("eastus".into()),
            endpoint_url: Some(format!("http://127.0.0.1:{}", self.port)),
            ..AzureSettings::default()
        };
        let mut config = AzureConfig::new(&settings, &[], &Surroundings::default()).unwrap();
        config.credentials = Credentials::Token("unused".into());
        Client::new(&config).unwrap()
    }
}

fn packages() -> Option<PathBuf> {
    let packages = std::env::var_os("KPROV_TEST_AZURE_SPECTOR").filter(|v| v != "none")?;
    Some(packages.into())
}

#[tokio::test]
async fn operations_are_followed_as_azures_specification_has_them() {
    let Some(packages) = packages() else {
        eprintln!("no KPROV_TEST_AZURE_SPECTOR: not tried");
        return;
    };
    let spector = Spector::start(&packages).await;
    let client = spector.client();
    let order = format!(
        "{}/providers/Azure.ResourceManager.OperationTemplates/orders/order1",
        client.group_id("test-rg")
    );

    // 201 and Azure-AsyncOperation; the resource is read at the end.
    let body = json!({"location": "eastus", "properties": {"productId": "product1", "amount": 1}});
    let url = client.url(&order, API, &[]);
    let made = client
        .change(Method::Put, url, &Condition::Any, Some(&body))
        .await
        .unwrap();
    assert_eq!(made["name"], "order1");
    assert_eq!(made.pointer("/properties/provisioningState").unwrap(), "Succeeded");
    assert_eq!(made.pointer("/properties/amount").unwrap(), 1);

    // 202 with Azure-AsyncOperation and Location; what came of it is at the latter.
    let url = client.url(&format!("{order}/export"), API, &[]);
    let body = json!({"format": "csv"});
    let exported = client
        .change(Method::Post, url, &Condition::Any, Some(&body))
        .await
        .unwrap();
    assert_eq!(exported, json!({"content": "order1,product1,1"}));

    // 202 and Location, 202 again, 204.
    let url = client.url(&order, API, &[]);
    let gone = client.change(Method::Delete, url, &Condition::Any, None).await.unwrap();
    assert_eq!(gone, Value::Null);

    // The same, and what came of it is no object.
    let url = format!("/subscriptions/{SUBSCRIPTION}/providers/Azure.ResourceManager.OperationTemplates/exportArray");
    let exported = client
        .change(Method::Post, client.url(&url, API, &[]), &Condition::Any, Some(&body))
        .await
        .unwrap();
    assert_eq!(exported.as_array().map(Vec::len), Some(2), "{exported}");

    // Where to look takes six kilobytes, twice.
    let large = format!(
        "{}/providers/Azure.ResourceManager.LargeHeader/largeHeaders/header1/two6k",
        client.group_id("test-rg")
    );
    let done = client
        .change(Method::Post, client.url(&large, API, &[]), &Condition::Any, None)
        .await
        .unwrap();
    assert_eq!(done, json!({"succeeded": true}));

    // The server does look at bodies: at this call's, though not at those above.
    let check = format!(
        "/subscriptions/{SUBSCRIPTION}/providers/Azure.ResourceManager.OperationTemplates/checkNameAvailability"
    );
    for (name, taken) in [("checkName", true), ("another", false)] {
        let body = json!({"name": name, "type": "Microsoft.Web/site"});
        let url = client.url(&check, API, &[]);
        let reply = client
            .send(azure_core::Method::Post, url, &Condition::Any, Some(&body))
            .await
            .unwrap();
        assert_eq!(reply.is_success(), taken, "{reply:?}");
    }
}

#[tokio::test]
async fn listings_follow_their_links() {
    let Some(packages) = packages() else {
        return;
    };
    let spector = Spector::start(&packages).await;
    let client = spector.client();
    let url = client.url("/azure/core/page/page", API, &[]);
    assert_eq!(client.pages(url).await.unwrap().len(), 1);
    let url = client.url("/azure/payload/pageable", API, &[("maxpagesize", "3")]);
    let pages = client.pages(url).await.unwrap();
    assert_eq!(pages.len(), 4, "{pages:?}");
}
