//! How much memory the operator needs, for docs/bench.md: the program itself on a real API server with simulated machines.

use std::fs;
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use k8s_openapi::api::core::v1::{Node, Pod};
use kprov_bootstrap::apply::apply;
use kprov_bootstrap::manifests::{MACHINES, RELEASES, VERSION_UPDATES};
use kprov_bootstrap::self_hosted;
use kprov_types::KubernetesVersion;
use kprov_types::api::MachineStatus;
use kprov_types::ports::FIRST_REVISION;
use kube::Client;
use kube::api::{Api, ListParams, Patch, PatchParams, PostParams};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use crate::api_server::{ApiServer, binaries};
use crate::cluster::{api, create, make_release, release, settings, token, until};
use crate::supervise::worker_of;

/// Requests at once while machines are made.
const AT_ONCE: usize = 48;

/// With `cargo nextest run --release -p kprov-operator --run-ignored only --no-capture`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "minutes: figures for docs/bench.md, of a release build"]
async fn memory_by_the_number_of_machines() {
    let Some(directory) = binaries("memory_by_the_number_of_machines") else {
        return;
    };
    for (machines, limit) in [(100, 40), (5000, 200)] {
        let server = ApiServer::start(&directory).await.unwrap();
        measure(&server, machines, limit).await.unwrap();
    }
}

struct Program(Child);

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Program {
    /// A line of `/proc/<pid>/status`, in MiB: the container's first process and its worker together.
    fn mib(&self, field: &str) -> Result<f64> {
        let first = self.0.id();
        let worker = worker_of(first)?.context("no worker")?;
        Ok(Self::mib_of(first, field)? + Self::mib_of(worker, field)?)
    }

    fn mib_of(id: u32, field: &str) -> Result<f64> {
        let text = fs::read_to_string(format!("/proc/{id}/status"))?;
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        let kib: f64 = line.context("no such field")?.trim().trim_end_matches(" kB").parse()?;
        Ok(kib / 1024.0)
    }
}

async fn measure(server: &ApiServer, machines: usize, limit: u32) -> Result<()> {
    let admin = server.admin()?;
    let version: KubernetesVersion = admin.apiserver_version().await?.git_version.parse()?;
    let deadline = Instant::now() + Duration::from_mins(1);
    apply(
        &admin,
        &self_hosted(&settings(&version), FIRST_REVISION, None)?,
        deadline,
        |_| (),
    )
    .await?;
    make_release(&admin, &version).await?;
    create(&admin, VERSION_UPDATES, "cluster", json!({ "desiredVersion": version })).await?;
    let made = stream::iter(0..machines).map(|index| machine(&admin, index, &version));
    made.buffer_unordered(AT_ONCE).try_collect::<()>().await?;

    let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let program = Command::new(env!("CARGO_BIN_EXE_kprov-operator"))
        .arg(format!("--listen={address}"))
        .env("KUBECONFIG", server.kubeconfig(&token(&admin).await?)?)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let program = Program(program);
    let updates = api(&admin, VERSION_UPDATES);
    let counted = json!({ version.to_string(): machines });
    until("the status", || async {
        let status = updates.get("cluster").await?.data["status"].take();
        Ok((status["kubelets"] == counted).then_some(()))
    })
    .await?;
    let idle = program.mib("VmRSS")?;
    // Heartbeats of all, and then an upgrade that preflight looks at.
    let beats = stream::iter(0..machines).map(|index| beat(&admin, index));
    beats.buffer_unordered(AT_ONCE).try_collect::<()>().await?;
    let beaten = program.mib("VmRSS")?;
    let mut next = version.minor();
    next.minor += 1;
    let next: KubernetesVersion = format!("{next}.0").parse()?;
    make_release(&admin, &next).await?;
    let spec = json!({ "spec": { "desiredVersion": next } });
    updates
        .patch("cluster", &PatchParams::default(), &Patch::Merge(spec))
        .await?;
    until("preflight's findings", || async {
        let findings = updates.get("cluster").await?.data["status"]["findings"].take();
        Ok(findings.is_array().then_some(()))
    })
    .await?;
    sleep(Duration::from_secs(5)).await;
    let (now, peak) = (program.mib("VmRSS")?, program.mib("VmHWM")?);
    println!(
        "{machines} machines: {idle:.1} MiB resident when all is read, {beaten:.1} after a heartbeat of each, {now:.1} with an upgrade asked \
         for, {peak:.1} at the most"
    );
    ensure!(
        peak < f64::from(limit),
        "{peak:.1} MiB with {machines} machines; at most {limit} are allowed"
    );
    let releases = api(&admin, RELEASES).list(&ListParams::default()).await?;
    ensure!(releases.items.len() == 2);
    Ok(())
}

/// A machine as it looks in the API: its Node with images and conditions, its Machine with a status, its kube-proxy.
async fn machine(admin: &Client, index: usize, version: &KubernetesVersion) -> Result<()> {
    let name = format!("m-{index:05}");
    let role = if index < 3 { "control-plane" } else { "worker" };
    let mut labels =
        json!({ "kubernetes.io/hostname": name, "kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64" });
    if index < 3 {
        labels["node-role.kubernetes.io/control-plane"] = json!("");
    }
    let images: Vec<Value> = (0..50)
        .map(|i| json!({ "names": [format!("registry.example/team/image-{i}@sha256:{}", "0".repeat(64))], "sizeBytes": i }))
        .collect();
    let conditions: Vec<Value> = ["MemoryPressure", "DiskPressure", "PIDPressure", "Ready"]
        .map(|kind| {
            let status = if kind == "Ready" { "True" } else { "False" };
            json!({ "type": kind, "status": status, "reason": "KubeletReady", "message": "kubelet is posting ready status",
                "lastTransitionTime": "2026-05-01T12:00:00Z", "lastHeartbeatTime": "2026-05-01T12:00:00Z" })
        })
        .into();
    let node = json!({ "metadata": { "name": name, "labels": labels }, "status": {
        "addresses": [{ "type": "InternalIP", "address": format!("10.1.{}.{}", index / 250, index % 250 + 1) }],
        "conditions": conditions, "images": images,
        "nodeInfo": { "kubeletVersion": version.tag(), "kubeProxyVersion": version.tag(), "architecture": "amd64",
            "bootID": "", "containerRuntimeVersion": "", "kernelVersion": "", "machineID": "", "operatingSystem": "linux",
            "osImage": "", "systemUUID": "" },
    } });
    Api::<Node>::all(admin.clone())
        .create(&PostParams::default(), &serde_json::from_value(node)?)
        .await?;
    let (_, _, digest) = release(version);
    let status = MachineStatus {
        observed_order: 1,
        running: Some(kprov_types::api::ReleaseRef {
            version: version.clone(),
            digest: digest.clone(),
        }),
        containerd: Some("2.1.4".into()),
        disk_free_mib: Some(40_960),
        ..MachineStatus::default()
    };
    let mut status = json!(status);
    status["role"] = json!(role);
    create(admin, MACHINES, &name, json!({ "order": 1 })).await?;
    let patch = Patch::Merge(json!({ "status": status }));
    api(admin, MACHINES)
        .patch_status(&name, &PatchParams::default(), &patch)
        .await?;
    let pod = json!({ "metadata": { "name": format!("kube-proxy-{index:05}"), "namespace": "kube-system",
            "labels": { "app.kubernetes.io/name": "kube-proxy", "app.kubernetes.io/managed-by": "kprov" },
            "annotations": { "kprov.io/release": digest, "kprov.io/kubernetes": version } },
        "spec": { "nodeName": name, "automountServiceAccountToken": false, "containers": [{ "name": "kube-proxy", "image": "kube-proxy" }] } });
    Api::<Pod>::namespaced(admin.clone(), "kube-system")
        .create(&PostParams::default(), &serde_json::from_value(pod)?)
        .await?;
    Ok(())
}

async fn beat(admin: &Client, index: usize) -> Result<()> {
    let beat = json!({ "metadata": { "annotations": { "beat": "1" } } });
    let nodes = Api::<Node>::all(admin.clone());
    nodes
        .patch(&format!("m-{index:05}"), &PatchParams::default(), &Patch::Merge(beat))
        .await?;
    Ok(())
}
