//! What a cluster's API has, made without machines.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use k8s_openapi::api::authentication::v1::TokenRequest;
use k8s_openapi::api::core::v1::{Node, ServiceAccount};
use kprov_bootstrap::manifests::{OPERATOR, RELEASES, Resource};
use kprov_types::KubernetesVersion;
use kprov_types::api::{ReleaseSpec, release_name};
use kprov_types::machine::Endpoint;
use kprov_types::names::{ClusterName, MachineName};
use kprov_types::node::{ControlPlaneSettings, Member, NodeNetwork};
use kprov_types::release::{API_VERSION, Digest, ImageComponent, Release, ReleaseImage};
use kube::Client;
use kube::api::{Api, DynamicObject, PostParams};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tokio::time::{Instant, sleep};

/// Shorter than the operator rests where nothing changes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(25);

pub(crate) async fn until<T, F: Future<Output = Result<Option<T>>>>(
    what: &str,
    mut look: impl FnMut() -> F,
) -> Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match look().await {
            Ok(Some(value)) => return Ok(value),
            Ok(None) if Instant::now() > deadline => bail!("gave up waiting for {what}"),
            Err(error) if Instant::now() > deadline => return Err(error.context(format!("gave up waiting for {what}"))),
            _ => sleep(Duration::from_millis(100)).await,
        }
    }
}

pub(crate) fn release(version: &KubernetesVersion) -> (Release, String, Digest) {
    let image = |component: ImageComponent| ReleaseImage {
        reference: format!("kprov.local/{}:v{version}", component.as_str()),
        digest: Digest::from_bytes([0; 32]),
        version: None,
    };
    let release = Release {
        api_version: API_VERSION.into(),
        kind: "Release".into(),
        kubernetes: version.clone(),
        images: ImageComponent::ALL.into_iter().map(|c| (c, image(c))).collect(),
        host_files: Vec::new(),
        minimum_from: None,
        advisories: Vec::new(),
        programs: std::collections::BTreeMap::new(),
    };
    let manifest = serde_json::to_string(&release).unwrap();
    let digest = Digest::from_bytes(Sha256::digest(&manifest).into());
    (release, manifest, digest)
}

pub(crate) fn settings(version: &KubernetesVersion) -> ControlPlaneSettings {
    let (release, _, release_digest) = release(version);
    ControlPlaneSettings {
        cluster: ClusterName::new("demo").unwrap(),
        kubernetes: version.clone(),
        release,
        release_digest,
        endpoint: Endpoint {
            host: "192.0.2.10".into(),
            port: 6443,
        },
        network: NodeNetwork {
            pods: "10.244.0.0/16".parse().unwrap(),
            services: "10.96.0.0/16".parse().unwrap(),
            dns_domain: "cluster.local".into(),
        },
        members: vec![Member {
            name: MachineName::new("cp-0").unwrap(),
            address: "192.0.2.10".parse().unwrap(),
        }],
        etcd_exists: false,
    }
}

pub(crate) fn api(client: &Client, resource: Resource) -> Api<DynamicObject> {
    Api::all_with(client.clone(), &resource.api_resource())
}

pub(crate) async fn create(client: &Client, resource: Resource, name: &str, spec: Value) -> Result<()> {
    let mut object = DynamicObject::new(name, &resource.api_resource());
    object.data = json!({ "spec": spec });
    let objects = api(client, resource);
    until(resource.kind, || async {
        Ok(Some(objects.create(&PostParams::default(), &object).await?))
    })
    .await?;
    Ok(())
}

pub(crate) async fn make_release(client: &Client, version: &KubernetesVersion) -> Result<()> {
    let (_, manifest, digest) = release(version);
    let spec = ReleaseSpec {
        version: version.to_string(),
        digest: digest.clone(),
        manifest,
        signature: None,
        insecure: true,
        urls: Vec::new(),
    };
    create(client, RELEASES, &release_name(&spec.version, &digest), json!(spec)).await
}

pub(crate) async fn make_node(client: &Client, name: &str, address: &str, version: &KubernetesVersion) -> Result<()> {
    let mut labels = json!({ "kubernetes.io/hostname": name });
    if name.starts_with("cp") {
        labels["node-role.kubernetes.io/control-plane"] = json!("");
    }
    let node = json!({ "metadata": { "name": name, "labels": labels }, "status": {
        "addresses": [{ "type": "InternalIP", "address": address }],
        "conditions": [{ "type": "Ready", "status": "True", "reason": "Test", "message": "",
            "lastTransitionTime": "2026-05-01T12:00:00Z", "lastHeartbeatTime": "2026-05-01T12:00:00Z" }],
        "nodeInfo": { "kubeletVersion": version.tag(), "kubeProxyVersion": version.tag(), "architecture": "amd64",
            "bootID": "", "containerRuntimeVersion": "", "kernelVersion": "", "machineID": "", "operatingSystem": "linux",
            "osImage": "", "systemUUID": "" },
    } });
    Api::<Node>::all(client.clone())
        .create(&PostParams::default(), &serde_json::from_value(node)?)
        .await?;
    Ok(())
}

/// A token of the operator's ServiceAccount.
pub(crate) async fn token(admin: &Client) -> Result<String> {
    let accounts: Api<ServiceAccount> = Api::namespaced(admin.clone(), "kube-system");
    let request = TokenRequest::default();
    let answer = accounts
        .create_token_request(OPERATOR, &PostParams::default(), &request)
        .await?;
    Ok(answer.status.context("no token")?.token)
}
