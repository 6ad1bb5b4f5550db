//! The operator with its own rights, and no others, on a real API server.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use kprov_bootstrap::apply::apply;
use kprov_bootstrap::manifests::{MACHINES, Manifest, Policy, RELEASES, VERSION_UPDATES, crds};
use kprov_bootstrap::self_hosted;
use kprov_bootstrap::versions::Features;
use kprov_operator::operate::{OperateError, operate};
use kprov_operator::options::Options;
use kprov_types::ports::FIRST_REVISION;
use kprov_types::{KubernetesVersion, Minor};
use kube::Client;
use kube::api::{Api, DynamicObject, Patch, PatchParams};
use kube::core::{ApiResource, GroupVersionKind};
use serde_json::json;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::api_server::{ApiServer, binaries};
use crate::cluster::{PATIENCE, api, create, make_node, make_release, settings, token, until};

struct Running {
    stop: CancellationToken,
    task: JoinHandle<Result<(), OperateError>>,
    address: SocketAddr,
}

impl Running {
    async fn start(server: &ApiServer, admin: &Client, name: &str) -> Result<Self> {
        let token = token(admin).await?;
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let options = Options {
            listen: address,
            identity: name.to_owned(),
            lease_duration: Duration::from_secs(15),
            renew_interval: Duration::from_secs(1),
            worker: None,
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
