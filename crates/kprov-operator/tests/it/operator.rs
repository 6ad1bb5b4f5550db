//! The operator with its own rights, and no others, on a real API server.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use k8s_openapi::api::authentication::v1::TokenRequest;
use k8s_openapi::api::core::v1::{Node, ServiceAccount};
use kprov_bootstrap::apply::apply;
use kprov_bootstrap::manifests::{MACHINES, Manifest, OPERATOR, Policy, RELEASES, Resource, VERSION_UPDATES, crds};
use kprov_bootstrap::self_hosted;
use kprov_bootstrap::versions::Features;
use kprov_operator::operate::{OperateError, operate};
use kprov_operator::options::Options;
use kprov_types::api::{ReleaseSpec, release_name};
use kprov_types::machine::Endpoint;
use kprov_types::names::{ClusterName, MachineName};
use kprov_types::node::{ControlPlaneSettings, Member, NodeNetwork};
use kprov_types::ports::FIRST_REVISION;
use kprov_types::release::{API_VERSION, Digest, ImageComponent, Release, ReleaseImage};
use kprov_types::{KubernetesVersion, Minor};
use kube::Client;
use kube::api::{Api, DynamicObject, Patch, PatchParams, PostParams};
use kube::core::{ApiResource, GroupVersionKind};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::api_server::{ApiServer, binaries};

const PATIENCE: Duration = Duration::from_secs(40);

async fn until<T, F: Future<Output = Result<Option<T>>>>(what: &str, mut look: impl FnMut() -> F) -> Result<T> {
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

fn release(version: &KubernetesVersion) -> (Release, String, Digest) {
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

fn settings(version: &KubernetesVersion) -> ControlPlaneSettings {
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

fn api(client: &Client, resource: Resource) -> Api<DynamicObject> {
    Api::all_with(client.clone(), &resource.api_resource())
}

async fn create(client: &Client, resource: Resource, name: &str, spec: Value) -> Result<()> {
    let mut object = DynamicObject::new(name, &resource.api_resource());
    object.data = json!({ "spec": spec });
    let objects = api(client, resource);
    until(resource.kind, || async {
        Ok(Some(objects.create(&PostParams::default(), &object).await?))
    })
    .await?;
    Ok(())
}

async fn make_release(client: &Client, version: &KubernetesVersion) -> Result<()> {
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

async fn make_node(client: &Client, name: &str, address: &str, version: &KubernetesVersion) -> Result<()> {
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

struct Running {
    stop: CancellationToken,
    task: JoinHandle<Result<(), OperateError>>,
    address: SocketAddr,
}

impl Running {
    async fn start(server: &ApiServer, admin: &Client, name: &str) -> Result<Self> {
        let accounts: Api<ServiceAccount> = Api::namespaced(admin.clone(), "kube-system");
        let request = TokenRequest::default();
        let token = accounts
            .create_token_request(OPERATOR, &PostParams::default(), &request)
            .await?;
        let token = token.status.context("no token")?.token;
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let options = Options {
            listen: address,
            identity: name.to_owned(),
            lease_duration: Duration::from_secs(15),
            renew_interval: Duration::from_secs(1),
        };
        let (config, stop) = (server.config(&token), CancellationToken::new());
        let stopped = stop.clone();
        let task = tokio::spawn(async move { operate(config, &options, stopped).await });
        Ok(Self { stop, task, address })
    }

    /// Status and body of an answer.
    fn ask(&self, path: &str) -> Result<(u16, String)> {
        let mut stream = TcpStream::connect(self.address)?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        write!(stream, "GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        let (head, body) = text.split_once("\r\n\r\n").context(text.clone())?;
        let status = head.split(' ').nth(1).context("no status")?.parse()?;
        Ok((status, body.to_owned()))
    }

    async fn ready(&self) -> Result<()> {
        until("readiness", || async {
            Ok((self.ask("/readyz")?.0 == 200).then_some(()))
        })
        .await?;
        ensure!(self.ask("/healthz")?.0 == 200);
        Ok(())
    }

    /// The value of a metric's sample, named with its labels.
    fn metric(&self, sample: &str) -> Result<Option<f64>> {
        let (_, text) = self.ask("/metrics")?;
        let value = text
            .lines()
            .find_map(|line| line.strip_prefix(sample)?.strip_prefix(' '));
        Ok(value.map(str::parse).transpose()?)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn its_rights_are_enough_and_another_goes_on() {
    let Some(directory) = binaries("its_rights_are_enough_and_another_goes_on") else {
        return;
    };
    let server = ApiServer::start(&directory).await.unwrap();
    let admin = server.admin().unwrap();
    check(&server, &admin).await.unwrap();
}

async fn check(server: &ApiServer, admin: &Client) -> Result<()> {
    let version: KubernetesVersion = admin.apiserver_version().await?.git_version.parse()?;
    let minor = version.minor();
    let deadline = || Instant::now() + PATIENCE;
    apply(
        admin,
        &self_hosted(&settings(&version), FIRST_REVISION, None)?,
        deadline(),
        |_| (),
    )
    .await?;
    // As an older cluster's kprov has left them.
    let old: Vec<Manifest> = crds(Minor::v1(20))?
        .into_iter()
        .map(|m| Manifest {
            policy: Policy::Enforce,
            ..m
        })
        .collect();
    apply(admin, &old, deadline(), |_| ()).await?;
    make_node(admin, "cp-0", &server.address.to_string(), &version).await?;
    make_node(admin, "w-0", "192.0.2.20", &version).await?;
    make_release(admin, &version).await?;
    create(admin, VERSION_UPDATES, "cluster", json!({ "desiredVersion": version })).await?;

    let first = Running::start(server, admin, "first").await?;
    first.ready().await?;
    let machines = api(admin, MACHINES);
    for name in ["cp-0", "w-0"] {
        until("a Machine", || async { Ok(machines.get_opt(name).await?) }).await?;
        let role = ApiResource::from_gvk(&GroupVersionKind::gvk("rbac.authorization.k8s.io", "v1", "ClusterRole"));
        Api::<DynamicObject>::all_with(admin.clone(), &role)
            .get(&format!("kprov:machine:{name}"))
            .await?;
    }
    let updates = api(admin, VERSION_UPDATES);
    until("the status", || async {
        let status = updates.get("cluster").await?.data["status"].take();
        Ok((status["currentVersion"] == json!(version) && !status["conditions"].is_null()).then_some(()))
    })
    .await?;
    let releases = api(admin, RELEASES);
    until("the word on the Release", || async {
        let all = releases.list(&kube::api::ListParams::default()).await?.items;
        Ok(all.iter().all(|r| r.data["status"]["verified"] == true).then_some(()))
    })
    .await?;
    if Features::of(minor)?.validation_rules {
        let kind = GroupVersionKind::gvk("apiextensions.k8s.io", "v1", "CustomResourceDefinition");
        let definitions: Api<DynamicObject> = Api::all_with(admin.clone(), &ApiResource::from_gvk(&kind));
        until("the definitions of this version", || async {
            let definition = definitions.get(&VERSION_UPDATES.definition()).await?;
            Ok(definition
                .data
                .to_string()
                .contains("x-kubernetes-validations")
                .then_some(()))
        })
        .await?;
    }
    preflight(admin, &version).await?;

    ensure!(first.metric("kprov_leader")? == Some(1.0));
    ensure!(
        first.metric(&format!(
            "kprov_component_instances{{component=\"kubelet\",version=\"{version}\"}}"
        ))? == Some(2.0)
    );
    ensure!(first.metric("kprov_machines{role=\"control-plane\",ready=\"true\"}")? == Some(1.0));
    ensure!(
        first
            .metric("kprov_passes_total{outcome=\"done\"}")?
            .is_some_and(|n| n >= 1.0)
    );
    let failed = first.metric("kprov_passes_total{outcome=\"failed\"}")?;
    ensure!(failed.is_none(), "{failed:?} passes failed");
    let text = first.ask("/metrics")?.1;
    ensure!(text.ends_with("# EOF\n"));
    for name in ["cp-0", "w-0", "cluster\""] {
        ensure!(!text.contains(name), "a metric has an object's name: {name}");
    }

    let second = Running::start(server, admin, "second").await?;
    second.ready().await?;
    ensure!(second.metric("kprov_leader")? == Some(0.0));
    ensure!(second.metric("kprov_upgrade_hops_left")? == Some(0.0));
    let stopped = Instant::now();
    first.stop.cancel();
    first.task.await??;
    until("the other to lead", || async {
        Ok((second.metric("kprov_leader")? == Some(1.0)).then_some(()))
    })
    .await?;
    println!(
        "{version}: another led {:?} after the first was told to stop",
        stopped.elapsed()
    );
    ensure!(stopped.elapsed() < Duration::from_secs(10));
    second.stop.cancel();
    second.task.await??;
    Ok(())
}

/// Each part of preflight can be done with the operator's rights.
async fn preflight(admin: &Client, version: &KubernetesVersion) -> Result<()> {
    // The next minor, so that APIs that go are looked for.
    let mut next = version.minor();
    next.minor += 1;
    let next: KubernetesVersion = format!("{next}.0").parse()?;
    make_release(admin, &next).await?;
    let updates = api(admin, VERSION_UPDATES);
    let patch = Patch::Merge(json!({ "spec": { "desiredVersion": next } }));
    updates.patch("cluster", &PatchParams::default(), &patch).await?;
    let findings = until("preflight", || async {
        let findings = updates.get("cluster").await?.data["status"]["findings"].take();
        Ok(findings.as_array().cloned())
    })
    .await?;
    // There is no controller, so that something is always found.
    ensure!(!findings.is_empty());
    for finding in &findings {
        let name = finding["name"].as_str().unwrap_or_default();
        ensure!(!name.starts_with("unchecked"), "{finding:#}");
    }
    Ok(())
}
