//! A real API server with its etcd, alone: no controller, no scheduler, no kubelet.

use std::env;
use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use kprov_types::ports::API;
use kube::{Client, Config};
use tokio::time::{Instant, sleep};

/// A directory with kube-apiserver, from `KPROV_TEST_BINARIES` or the newest of `KPROV_TEST_RELEASES`. None is a failure in CI, and
/// said aloud elsewhere.
pub(crate) fn binaries(test: &str) -> Option<PathBuf> {
    let mut found: Vec<PathBuf> = env::var_os("KPROV_TEST_BINARIES")
        .into_iter()
        .map(PathBuf::from)
        .collect();
    if found.is_empty()
        && let Some(releases) = env::var_os("KPROV_TEST_RELEASES")
    {
        found.extend(fs::read_dir(releases).unwrap().map(|entry| entry.unwrap().path()));
    }
    found.retain(|directory| directory.join("kube-apiserver").is_file());
    found.sort();
    let newest = found.pop();
    if newest.is_none() {
        let missing = "no binaries; set KPROV_TEST_BINARIES or KPROV_TEST_RELEASES";
        assert!(env::var("CI").as_deref() != Ok("true"), "{missing}");
        eprintln!("SKIPPED {test}: {missing}");
    }
    newest
}

const TOKEN: &str = "of-the-test";

/// The processes; they end with this, however the test does.
pub(crate) struct ApiServer {
    processes: Vec<Child>,
    root: tempfile::TempDir,
    /// Where it listens, at the port where clusters have theirs.
    pub(crate) address: Ipv4Addr,
    /// It never got ready.
    failed: bool,
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        for process in self.processes.iter_mut().rev() {
            let _ = process.kill();
            let _ = process.wait();
        }
        if std::thread::panicking() || self.failed {
            let log = fs::read_to_string(self.root.path().join("kube-apiserver.log")).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            eprintln!("--- kube-apiserver");
            lines[lines.len().saturating_sub(20)..]
                .iter()
                .for_each(|line| eprintln!("{line:.300}"));
        }
    }
}

/// A loopback address that no other test of this host uses now.
fn address() -> Ipv4Addr {
    static COUNT: AtomicU8 = AtomicU8::new(1);
    let [.., high, low] = std::process::id().to_be_bytes();
    Ipv4Addr::new(127, 128 + COUNT.fetch_add(1, Ordering::Relaxed) % 64, high, low)
}

impl ApiServer {
    /// Starts one from a directory of binaries, and waits until it's ready.
    pub(crate) async fn start(binaries: &Path) -> Result<Self> {
        // As the operator does.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let root = tempfile::tempdir()?;
        let path = |name: &str| root.path().join(name).display().to_string();
        fs::write(path("tokens"), format!("{TOKEN},test,test,system:masters\n"))?;
        let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        fs::write(path("sa.key"), key.serialize_pem())?;
        fs::write(path("sa.pub"), key.public_key_pem())?;
        let address = address();
        let etcd = if binaries.join("etcd").is_file() {
            binaries.join("etcd")
        } else {
            PathBuf::from("/usr/bin/etcd")
        };
        let (client, peer) = (format!("http://{address}:2379"), format!("http://{address}:2380"));
        let mut server = Self {
            processes: Vec::new(),
            address,
            root,
            failed: true,
        };
        server.run(
            &etcd,
            &[
                format!("--data-dir={}", server.path("etcd")),
                format!("--listen-client-urls={client}"),
                format!("--advertise-client-urls={client}"),
                format!("--listen-peer-urls={peer}"),
                format!("--initial-advertise-peer-urls={peer}"),
                format!("--initial-cluster=default={peer}"),
                "--unsafe-no-fsync".into(),
            ],
        )?;
        server.run(
            &binaries.join("kube-apiserver"),
            &[
                format!("--etcd-servers={client}"),
                format!("--bind-address={address}"),
                "--advertise-address=192.0.2.1".into(),
                format!("--secure-port={API}"),
                format!("--cert-dir={}", server.path("certificates")),
                format!("--token-auth-file={}", server.path("tokens")),
                "--authorization-mode=RBAC".into(),
                "--service-account-issuer=https://kubernetes.default.svc".into(),
                format!("--service-account-key-file={}", server.path("sa.pub")),
                format!("--service-account-signing-key-file={}", server.path("sa.key")),
                "--service-cluster-ip-range=10.96.0.0/16".into(),
                "--endpoint-reconciler-type=none".into(),
                "--allow-privileged=true".into(),
                // No controller makes any.
                "--disable-admission-plugins=ServiceAccount".into(),
                "--max-requests-inflight=800".into(),
                "--max-mutating-requests-inflight=400".into(),
            ],
        )?;
        let admin = Client::try_from(server.config(TOKEN))?;
        let deadline = Instant::now() + Duration::from_mins(2);
        loop {
            for process in &mut server.processes {
                ensure!(process.try_wait()?.is_none(), "a process has ended");
            }
            let request = http::Request::get("/readyz").body(Vec::new())?;
            match admin.request_text(request).await {
                Ok(_) => {
                    server.failed = false;
                    return Ok(server);
                }
                Err(error) => ensure!(Instant::now() < deadline, "the API server does not get ready: {error}"),
            }
            sleep(Duration::from_millis(100)).await;
        }
    }

    fn path(&self, name: &str) -> String {
        self.root.path().join(name).display().to_string()
    }

    fn run(&mut self, program: &Path, flags: &[String]) -> Result<()> {
        let name = program.file_name().context("no name")?.to_string_lossy().into_owned();
        let log = File::create(self.path(&format!("{name}.log")))?;
        let child = Command::new(program)
            .args(flags)
            .current_dir(self.root.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| program.display().to_string())?;
        self.processes.push(child);
        Ok(())
    }

    /// The way there, with a token.
    pub(crate) fn config(&self, token: &str) -> Config {
        let mut config = Config::new(format!("https://{}:{API}", self.address).parse().unwrap());
        // Its certificate is one that it has made itself.
        config.accept_invalid_certs = true;
        config.auth_info.token = Some(token.to_owned().into());
        config
    }

    /// A client that may do everything.
    pub(crate) fn admin(&self) -> Result<Client> {
        Ok(Client::try_from(self.config(TOKEN))?)
    }

    /// A kubeconfig of a user with a token, for a program.
    pub(crate) fn kubeconfig(&self, token: &str) -> Result<PathBuf> {
        let path = self.root.path().join("kubeconfig");
        let content = serde_json::json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{ "name": "test", "cluster": {
                "server": format!("https://{}:{API}", self.address), "insecure-skip-tls-verify": true } }],
            "users": [{ "name": "test", "user": { "token": token } }],
            "contexts": [{ "name": "test", "context": { "cluster": "test", "user": "test" } }],
        });
        fs::write(&path, content.to_string())?;
        Ok(path)
    }

    /// Stops the API server's process, or lets it go on: then nothing answers for a while.
    pub(crate) fn suspend(&self, suspended: bool) -> Result<()> {
        let id = self.processes.last().context("no process")?.id();
        let signal = if suspended { "-STOP" } else { "-CONT" };
        let done = Command::new("kill").args([signal, &id.to_string()]).status()?;
        ensure!(done.success(), "kill {signal}");
        Ok(())
    }
}
