//! etcd, kube-apiserver, controller-manager and scheduler of real releases, for as long as a test runs.

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{self, Child, Command, Stdio};
use std::time::Duration;
use std::{env, thread};

use anyhow::{Context as _, Result, anyhow};
use jiff::Timestamp;
use kprov_bootstrap::generate_secrets;
use kprov_bootstrap::versions::Features;
use kprov_types::{ClusterName, KubernetesVersion};
use kube::{Client, Config};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

const PATIENCE: Duration = Duration::from_mins(1);
const TOKEN: &str = "adapter";
/// The operator's ServiceAccount.
pub(super) const OPERATOR: &str = "system:serviceaccount:kube-system:kprov-operator";

/// The directories with Kubernetes' programs to test with: `KPROV_TEST_BINARIES` is one, `KPROV_TEST_RELEASES` has one for each
/// version. None found is a failure in CI, and said aloud elsewhere.
pub(super) fn directories(test: &str) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = env::var_os("KPROV_TEST_BINARIES")
        .into_iter()
        .map(PathBuf::from)
        .collect();
    if let Some(releases) = env::var_os("KPROV_TEST_RELEASES") {
        found.extend(fs::read_dir(&releases).unwrap().map(|entry| entry.unwrap().path()));
    }
    found.retain(|directory| directory.join("kube-controller-manager").is_file());
    found.sort();
    if found.is_empty() {
        let sources = "set KPROV_TEST_BINARIES or KPROV_TEST_RELEASES";
        assert!(env::var("CI").as_deref() != Ok("true"), "no binaries; {sources}");
        eprintln!("SKIPPED {test}: no binaries; {sources}");
    }
    found
}

/// Waits until something is so.
pub(super) async fn until<T, F: Future<Output = Result<Option<T>>>>(
    what: &str,
    mut look: impl FnMut() -> F,
) -> Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match look().await {
            Ok(Some(value)) => return Ok(value),
            Ok(None) if Instant::now() > deadline => return Err(anyhow!("gave up waiting for {what}")),
            Err(error) if Instant::now() > deadline => return Err(error.context(format!("gave up waiting for {what}"))),
            _ => sleep(Duration::from_millis(100)).await,
        }
    }
}

/// A program that ends with the test, whatever happens to it.
struct Running {
    child: Child,
    log: PathBuf,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            let log = fs::read_to_string(&self.log).unwrap_or_default();
            eprintln!("--- {}", self.log.display());
            let lines: Vec<&str> = log.lines().collect();
            // A crash begins with its reason; else what matters comes last.
            let crash = lines
                .iter()
                .position(|line| line.starts_with("fatal error:") || line.starts_with("panic:"));
            let from = crash.unwrap_or(lines.len().saturating_sub(15));
            lines[from..].iter().take(40).for_each(|line| eprintln!("{line:.300}"));
        }
    }
}

/// A control plane without machines.
pub(super) struct Server {
    pub(super) version: KubernetesVersion,
    address: Ipv4Addr,
    // Ends before its directory goes.
    running: Vec<Running>,
    root: tempfile::TempDir,
}

impl Server {
    pub(super) async fn start(directory: &Path, index: u16) -> Result<Self> {
        // An address of this process's own, so that ports need none.
        let [high, low] = u16::try_from(process::id() % 60_000)
            .unwrap()
            .wrapping_add(index)
            .to_be_bytes();
        let mut server = Self {
            version: version_of(&directory.join("kube-apiserver")),
            address: Ipv4Addr::new(127, 67, high, low),
            running: Vec::new(),
            root: tempfile::tempdir().unwrap(),
        };
        server.write_files();
        let own = directory.join("etcd");
        let etcd = if own.is_file() {
            own
        } else {
            PathBuf::from("/usr/bin/etcd")
        };
        server.run(&etcd, &server.etcd());
        server.run(&directory.join("kube-apiserver"), &server.api_server());
        // Controllers give up soon where there is no API.
        let admin = server.client(None)?;
        until("a ready API server", || async {
            let ready = admin
                .request_text(http::Request::get("/readyz").body(Vec::new())?)
                .await;
            Ok(Some(ready?))
        })
        .await?;
        let mut manager = server.controller(10257);
        manager.push(format!("--service-account-private-key-file={}", server.file("sa.key")));
        // No kubelet keeps Nodes Ready here.
        manager.push("--controllers=*,-nodelifecycle".into());
        server.run(&directory.join("kube-controller-manager"), &manager);
        server.run(&directory.join("kube-scheduler"), &server.controller(10259));
        Ok(server)
    }

    pub(super) fn features(&self) -> Features {
        Features::of(self.version.minor()).unwrap()
    }

    /// A client that may do anything, as somebody else where that is given.
    pub(super) fn client(&self, user: Option<&str>) -> Result<Client> {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut config = Config::new(self.url().parse()?);
        config.accept_invalid_certs = true;
        config.default_retry = false;
        config.auth_info.token = Some(TOKEN.to_owned().into());
        config.auth_info.impersonate = user.map(str::to_owned);
        Ok(Client::try_from(config)?)
    }

    fn url(&self) -> String {
        format!("https://{}:6443", self.address)
    }

    fn file(&self, name: &str) -> String {
        self.root.path().join(name).display().to_string()
    }

    fn write_files(&self) {
        let secrets = generate_secrets(&ClusterName::new("demo").unwrap(), Timestamp::now()).unwrap();
        let kubeconfig = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{ "name": "c", "cluster": { "server": self.url(), "insecure-skip-tls-verify": true } }],
            "users": [{ "name": "u", "user": { "token": TOKEN } }],
            "contexts": [{ "name": "c", "context": { "cluster": "c", "user": "u" } }],
        });
        for (name, text) in [
            ("sa.pub", secrets.service_account.certificate),
            ("sa.key", secrets.service_account.key),
            ("tokens.csv", format!("{TOKEN},tester,1,\"system:masters\"\n")),
            ("kubeconfig", kubeconfig.to_string()),
        ] {
            fs::write(self.file(name), text).unwrap();
        }
    }

    fn etcd(&self) -> Vec<String> {
        let address = self.address;
        vec![
            format!("--data-dir={}", self.file("etcd")),
            format!("--listen-client-urls=http://{address}:2379"),
            format!("--advertise-client-urls=http://{address}:2379"),
            format!("--listen-peer-urls=http://{address}:2380"),
            format!("--initial-advertise-peer-urls=http://{address}:2380"),
            format!("--initial-cluster=default=http://{address}:2380"),
        ]
    }

    fn api_server(&self) -> Vec<String> {
        let mut flags = vec![
            format!("--etcd-servers=http://{}:2379", self.address),
            format!("--bind-address={}", self.address),
            "--secure-port=6443".into(),
            // API servers refuse to advertise loopback.
            "--advertise-address=192.0.2.10".into(),
            "--endpoint-reconciler-type=none".into(),
            format!("--cert-dir={}", self.file("certs")),
            "--service-account-issuer=https://kubernetes.default.svc".into(),
            format!("--service-account-key-file={}", self.file("sa.pub")),
            format!("--service-account-signing-key-file={}", self.file("sa.key")),
            "--service-cluster-ip-range=10.96.0.0/16".into(),
            format!("--token-auth-file={}", self.file("tokens.csv")),
            "--authorization-mode=RBAC".into(),
            "--allow-privileged=true".into(),
        ];
        if self.features().insecure_ports {
            flags.push("--insecure-port=0".into());
        }
        flags
    }

    fn controller(&self, port: u16) -> Vec<String> {
        let mut flags = vec![
            format!("--bind-address={}", self.address),
            format!("--secure-port={port}"),
            format!("--cert-dir={}", self.file("certs")),
            "--leader-elect=false".into(),
        ];
        for flag in ["kubeconfig", "authentication-kubeconfig", "authorization-kubeconfig"] {
            flags.push(format!("--{flag}={}", self.file("kubeconfig")));
        }
        flags.extend(self.features().insecure_ports.then(|| "--port=0".to_owned()));
        flags
    }

    fn run(&mut self, program: &Path, flags: &[String]) {
        let log = self
            .root
            .path()
            .join(format!("{}.log", program.file_name().unwrap().display()));
        let file = File::create(&log).unwrap();
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL"])
            .arg(program)
            .args(flags)
            .stdin(Stdio::null());
        let child = command.stdout(file.try_clone().unwrap()).stderr(file).spawn().unwrap();
        self.running.push(Running { child, log });
    }
}

fn version_of(program: &Path) -> KubernetesVersion {
    let output = Command::new(program).arg("--version").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.split_whitespace()
        .find_map(|word| word.parse().ok())
        .unwrap_or_else(|| panic!("{text}"))
}

/// Plain requests, as people and other programs make them.
pub(super) struct Api(pub(super) Client);

impl Api {
    pub(super) async fn get(&self, path: &str) -> Result<Value> {
        let request = http::Request::get(path).body(Vec::new())?;
        self.0.request(request).await.with_context(|| format!("GET {path}"))
    }

    pub(super) async fn post(&self, path: &str, object: &Value) -> Result<Value> {
        self.send("POST", path, "application/json", object).await
    }

    /// A JSON merge patch.
    pub(super) async fn patch(&self, path: &str, change: &Value) -> Result<Value> {
        self.send("PATCH", path, "application/merge-patch+json", change).await
    }

    async fn send(&self, method: &str, path: &str, content: &str, object: &Value) -> Result<Value> {
        let request = http::Request::builder()
            .method(method)
            .uri(path)
            .header("content-type", content);
        let request = request.body(object.to_string().into_bytes())?;
        self.0
            .request(request)
            .await
            .with_context(|| format!("{method} {path}"))
    }
}
