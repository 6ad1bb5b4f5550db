//! What the server does, asked over HTTP as a client would.

mod access;
mod compute;
mod groups;
mod network;
mod operations;
mod room;

use std::time::{Duration, Instant};

use http::Method;
use serde_json::{Value, json};

use super::{Arm, Options};

/// The network's api-version.
const NETWORK: &str = "2024-03-01";
/// The machines' api-version.
const COMPUTE: &str = "2024-07-01";
/// The disks' api-version.
const DISKS: &str = "2024-03-02";
/// The groups' api-version.
const GROUPS: &str = "2021-04-01";

/// An answer.
#[derive(Debug)]
struct Answer {
    status: u16,
    headers: http::HeaderMap,
    body: Value,
}

impl Answer {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    fn code(&self) -> &str {
        self.body
            .pointer("/error/code")
            .and_then(Value::as_str)
            .unwrap_or_default()
    }

    fn message(&self) -> &str {
        self.body
            .pointer("/error/message")
            .and_then(Value::as_str)
            .unwrap_or_default()
    }

    /// The code of the first inner error.
    fn inner(&self) -> &str {
        self.body
            .pointer("/error/details/0/code")
            .and_then(Value::as_str)
            .unwrap_or_default()
    }
}

/// A client with a good token.
struct Client {
    arm: Arm,
    http: reqwest::Client,
    token: String,
}

impl Client {
    async fn new(options: Options) -> Self {
        let arm = Arm::start(options).await.unwrap();
        let token = arm.token();
        // Another test may have been first.
        drop(rustls::crypto::ring::default_provider().install_default());
        let http = reqwest::Client::builder().build().unwrap();
        Self { arm, http, token }
    }

    /// One with a resource group `g` in westeurope.
    async fn with_group() -> Self {
        let client = Self::new(Options::default()).await;
        let answer = client
            .call(
                Method::PUT,
                "resourceGroups/g",
                GROUPS,
                Some(json!({"location": "westeurope"})),
            )
            .await;
        assert_eq!(answer.status, 201, "{answer:?}");
        client
    }

    /// Calls a path below the subscription.
    async fn call(&self, method: Method, path: &str, version: &str, body: Option<Value>) -> Answer {
        self.call_with(method, path, version, body, &[]).await.unwrap()
    }

    async fn call_with(
        &self,
        method: Method,
        path: &str,
        version: &str,
        body: Option<Value>,
        headers: &[(&str, &str)],
    ) -> reqwest::Result<Answer> {
        let join = if path.contains('?') { '&' } else { '?' };
        let url = format!(
            "{}/subscriptions/{}/{path}{join}api-version={version}",
            self.arm.endpoint(),
            self.arm.subscription()
        );
        self.link(method, &url, body, headers).await
    }

    /// Calls a whole URL.
    async fn link(
        &self,
        method: Method,
        url: &str,
        body: Option<Value>,
        headers: &[(&str, &str)],
    ) -> reqwest::Result<Answer> {
        let mut request = self.http.request(method, url).bearer_auth(&self.token);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        if let Some(body) = body {
            request = request.json(&body);
        }
        let response = request.send().await?;
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        let text = response.text().await?;
        let body = serde_json::from_str(&text).unwrap_or(Value::Null);
        Ok(Answer { status, headers, body })
    }

    /// Follows an operation to its end, and returns its last status.
    async fn followed(&self, answer: &Answer) -> Value {
        let link = answer.header("azure-asyncoperation").expect("an operation").to_owned();
        let start = Instant::now();
        loop {
            let status = self.link(Method::GET, &link, None, &[]).await.unwrap().body;
            if status["status"] != "InProgress" {
                return status;
            }
            assert!(start.elapsed() < Duration::from_secs(10), "{link} doesn't end");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Makes something and waits until it's there.
    async fn made(&self, path: &str, version: &str, body: Value) -> Value {
        let answer = self.call(Method::PUT, path, version, Some(body)).await;
        assert!((200..=202).contains(&answer.status), "{path}: {answer:?}");
        assert_eq!(self.followed(&answer).await["status"], "Succeeded", "{path}");
        self.got(path, version).await
    }

    /// Deletes something and waits until it's gone.
    async fn deleted(&self, path: &str, version: &str) {
        let answer = self.call(Method::DELETE, path, version, None).await;
        assert_eq!(answer.status, 202, "{path}: {answer:?}");
        assert_eq!(self.followed(&answer).await["status"], "Succeeded", "{path}");
        assert_eq!(self.call(Method::GET, path, version, None).await.status, 404, "{path}");
    }

    async fn got(&self, path: &str, version: &str) -> Value {
        let answer = self.call(Method::GET, path, version, None).await;
        assert_eq!(answer.status, 200, "{path}: {answer:?}");
        answer.body
    }

    /// Refused, with this status and code.
    async fn refused(&self, path: &str, version: &str, body: Value, status: u16, code: &str) -> Answer {
        let answer = self.call(Method::PUT, path, version, Some(body)).await;
        assert_eq!((answer.status, answer.code()), (status, code), "{path}: {answer:?}");
        answer
    }

    fn id(&self, path: &str) -> String {
        format!(
            "/subscriptions/{}/resourceGroups/g/providers/{path}",
            self.arm.subscription()
        )
    }

    /// A network `v` with a subnet `s` of 10.0.0.0/24.
    async fn network(&self) -> Value {
        self.made(&network("v"), NETWORK, virtual_network()).await
    }

    /// An interface in that subnet.
    async fn interface(&self, name: &str) -> Value {
        self.made(&interface(name), NETWORK, self.interface_body()).await
    }

    fn interface_body(&self) -> Value {
        json!({
            "location": "westeurope",
            "properties": {"ipConfigurations": [{"name": "c", "properties": {"subnet": {"id": self.id("Microsoft.Network/virtualNetworks/v/subnets/s")}}}]},
        })
    }

    /// What makes a machine with the interface of the same name.
    fn machine_body(&self, name: &str) -> Value {
        json!({
            "location": "westeurope",
            "zones": ["1"],
            "tags": {"kprov-cluster": "c"},
            "properties": {
                "hardwareProfile": {"vmSize": "Standard_D2s_v5"},
                "storageProfile": {
                    "imageReference": {"publisher": "Debian", "offer": "debian-12", "sku": "12-gen2", "version": "latest"},
                    "osDisk": {"createOption": "FromImage", "deleteOption": "Delete", "name": format!("{name}-os")},
                },
                "osProfile": {
                    "computerName": name,
                    "adminUsername": "kprov",
                    "customData": "IyEvYmluL3NoCg==",
                    "linuxConfiguration": {
                        "disablePasswordAuthentication": true,
                        "ssh": {"publicKeys": [{"path": "/home/kprov/.ssh/authorized_keys", "keyData": KEY}]},
                    },
                },
                "networkProfile": {"networkInterfaces": [{"id": self.id(&format!("Microsoft.Network/networkInterfaces/{name}"))}]},
            },
        })
    }

    /// A machine with its interface.
    async fn machine(&self, name: &str) -> Value {
        self.interface(name).await;
        self.made(&machine(name), COMPUTE, self.machine_body(name)).await
    }
}

/// A public key that nobody has the private half of.
const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f kprov";

fn network(name: &str) -> String {
    format!("resourceGroups/g/providers/Microsoft.Network/virtualNetworks/{name}")
}

fn interface(name: &str) -> String {
    format!("resourceGroups/g/providers/Microsoft.Network/networkInterfaces/{name}")
}

fn public(name: &str) -> String {
    format!("resourceGroups/g/providers/Microsoft.Network/publicIPAddresses/{name}")
}

fn balancer(name: &str) -> String {
    format!("resourceGroups/g/providers/Microsoft.Network/loadBalancers/{name}")
}

fn machine(name: &str) -> String {
    format!("resourceGroups/g/providers/Microsoft.Compute/virtualMachines/{name}")
}

fn disk(name: &str) -> String {
    format!("resourceGroups/g/providers/Microsoft.Compute/disks/{name}")
}

fn virtual_network() -> Value {
    json!({
        "location": "westeurope",
        "properties": {
            "addressSpace": {"addressPrefixes": ["10.0.0.0/16"]},
            "subnets": [{"name": "s", "properties": {"addressPrefix": "10.0.0.0/24"}}],
        },
    })
}

fn public_address() -> Value {
    json!({"location": "westeurope", "sku": {"name": "Standard"}, "properties": {"publicIPAllocationMethod": "Static"}})
}

fn disk_body(zone: &str) -> Value {
    json!({
        "location": "westeurope", "zones": [zone], "sku": {"name": "Premium_LRS"},
        "properties": {"creationData": {"createOption": "Empty"}, "diskSizeGB": 8},
    })
}
