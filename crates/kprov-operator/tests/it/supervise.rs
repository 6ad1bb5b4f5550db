//! The program as a container runs it: its first process, and the workers that it starts.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use kprov_bootstrap::apply::apply;
use kprov_bootstrap::manifests::{NAMESPACE, OPERATOR};
use kprov_bootstrap::self_hosted;
use kprov_types::KubernetesVersion;
use kprov_types::ports::FIRST_REVISION;
use kube::Api;
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::time::Instant;

use crate::api_server::{ApiServer, binaries};
use crate::cluster::{settings, token, until};

/// The only child of a process.
pub(crate) fn worker_of(first: u32) -> Result<Option<u32>> {
    let children = fs::read_to_string(format!("/proc/{first}/task/{first}/children"))?;
    let mut children = children.split_whitespace().map(str::parse);
    let worker = children.next().transpose()?;
    ensure!(children.next().is_none(), "more than one worker");
    Ok(worker)
}

fn tell(id: u32, signal: Signal) -> Result<()> {
    Ok(kill(Pid::from_raw(id.cast_signed()), signal)?)
}

fn lives(id: u32) -> bool {
    kill(Pid::from_raw(id.cast_signed()), None) != Err(Errno::ESRCH)
}

struct Program {
    first: Child,
    address: SocketAddr,
}

impl Drop for Program {
    fn drop(&mut self) {
        // Its worker dies with it.
        let _ = self.first.kill();
        let _ = self.first.wait();
    }
}

impl Program {
    fn start(kubeconfig: &Path) -> Result<Self> {
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let first = Command::new(env!("CARGO_BIN_EXE_kprov-operator"))
            .args([format!("--listen={address}"), "--identity=pod".to_owned()])
            .env("KUBECONFIG", kubeconfig)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        Ok(Self { first, address })
    }

    fn worker(&self) -> Result<Option<u32>> {
        worker_of(self.first.id())
    }

    fn asked(&self, path: &str) -> Result<String> {
        let mut stream = TcpStream::connect(self.address)?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        write!(stream, "GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    }

    /// The worker that works, once it's another one than those.
    async fn works(&self, before: &BTreeSet<u32>) -> Result<u32> {
        until("a worker", || async {
            let worker = self.worker()?.filter(|worker| !before.contains(worker));
            Ok(worker.filter(|_| {
                self.asked("/healthz")
                    .is_ok_and(|answer| answer.starts_with("HTTP/1.1 200"))
            }))
        })
        .await
    }

    async fn ended(&mut self) -> Result<ExitStatus> {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            if let Some(status) = self.first.try_wait()? {
                return Ok(status);
            }
            ensure!(Instant::now() < deadline, "it goes on");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// A kubeconfig that leads nowhere: nothing listens there.
fn nowhere(directory: &Path) -> Result<std::path::PathBuf> {
    let path = directory.join("kubeconfig");
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let content = serde_json::json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "test",
        "clusters": [{ "name": "test", "cluster": { "server": format!("http://127.0.0.1:{port}") } }],
        "users": [{ "name": "test", "user": {} }],
        "contexts": [{ "name": "test", "context": { "cluster": "test", "user": "test" } }],
    });
    fs::write(&path, content.to_string())?;
    Ok(path)
}

#[tokio::test]
async fn a_killed_worker_returns_each_time() {
    let directory = tempfile::tempdir().unwrap();
    let mut program = Program::start(&nowhere(directory.path()).unwrap()).unwrap();
    let mut workers = BTreeSet::new();
    // More than end it when they fail by themselves.
    for _ in 0..8 {
        let worker = program.works(&workers).await.unwrap();
        workers.insert(worker);
        tell(worker, Signal::SIGKILL).unwrap();
    }
    let last = program.works(&workers).await.unwrap();
    assert!(program.first.try_wait().unwrap().is_none());
    // Told to stop, it has its worker stop.
    tell(program.first.id(), Signal::SIGTERM).unwrap();
    assert!(program.ended().await.unwrap().success());
    assert!(!lives(last));
}

#[tokio::test]
async fn a_worker_dies_with_the_first_process() {
    let directory = tempfile::tempdir().unwrap();
    let mut program = Program::start(&nowhere(directory.path()).unwrap()).unwrap();
    let worker = program.works(&BTreeSet::new()).await.unwrap();
    program.first.kill().unwrap();
    program.first.wait().unwrap();
    until("the worker's end", || async {
        // Whoever takes orphans in may not have asked for it yet.
        let state = fs::read_to_string(format!("/proc/{worker}/stat")).unwrap_or_default();
        Ok((!lives(worker) || state.contains(") Z ")).then_some(()))
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn workers_that_fail_end_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("kubeconfig");
    fs::write(&path, "no kubeconfig").unwrap();
    let mut program = Program::start(&path).unwrap();
    let status = program.ended().await.unwrap();
    assert_eq!(status.code(), Some(1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_leader_leads_on() {
    let Some(directory) = binaries("a_killed_leader_leads_on") else {
        return;
    };
    leads_on(&ApiServer::start(&directory).await.unwrap()).await.unwrap();
}

async fn leads_on(server: &ApiServer) -> Result<()> {
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
    let program = Program::start(&server.kubeconfig(&token(&admin).await?)?)?;
    let leases: Api<Lease> = Api::namespaced(admin.clone(), NAMESPACE);
    let leads = || async {
        let text = program.asked("/metrics")?;
        Ok::<_, anyhow::Error>(text.lines().any(|line| line == "kprov_leader 1").then_some(()))
    };
    let mut workers = BTreeSet::new();
    let mut before: Option<(LeaseSpec, Instant)> = None;
    for _ in 0..4 {
        let worker = program.works(&workers).await?;
        until("the lead", leads).await?;
        let lease = leases.get(OPERATOR).await?.spec.context("no spec")?;
        if let Some((before, killed)) = before {
            let gap = killed.elapsed();
            println!("a killed leader leads again after {gap:?}");
            // A lease lasts 15 s: nobody has waited for its end.
            ensure!(gap < Duration::from_secs(10), "{gap:?}");
            ensure!(lease.holder_identity == before.holder_identity, "{lease:?}");
            ensure!(lease.lease_transitions == before.lease_transitions, "{lease:?}");
        }
        workers.insert(worker);
        tell(worker, Signal::SIGKILL)?;
        before = Some((lease, Instant::now()));
    }
    Ok(())
}
