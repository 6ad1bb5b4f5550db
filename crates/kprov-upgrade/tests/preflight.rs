//! Preflight against real API servers, with Kubernetes' own controllers beside them: what these do by themselves is no
//! finding, and what people do is one.
//!
//! Programs are taken from `KPROV_TEST_BINARIES` (one directory) and `KPROV_TEST_RELEASES` (one below it for each version).
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "tests end so, and tell what they leave out; clippy.toml's allowance does not reach helper functions"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::process::{self, Child, Command, Stdio};
use std::time::Duration;
use std::{env, thread};

use anyhow::{Context as _, Result, bail, ensure};
use jiff::{SignedDuration, Timestamp};
use kprov_bootstrap::apply::apply;
use kprov_bootstrap::versions::{Features, NEWEST};
use kprov_bootstrap::{generate_secrets, self_hosted};
use kprov_types::api::{CertificateExpiry, EtcdStatus, MachineStatus, ProgramStatus, ReleaseRef};
use kprov_types::machine::Endpoint;
use kprov_types::node::{ControlPlaneSettings, Member, NodeNetwork};
use kprov_types::release::{API_VERSION, ImageComponent, ProgramFacts, Release, ReleaseImage};
use kprov_types::{ClusterName, Digest, KubernetesVersion, MachineName, Minor, Role};
use kprov_upgrade::preflight::removals::between;
use kprov_upgrade::preflight::{Hop, Inputs, NodeSeen, PreflightError, run};
use kube::{Client, Config};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

const PATIENCE: Duration = Duration::from_secs(90);
const TOKEN: &str = "preflight";
const MACHINES: [(&str, Role); 3] = [
    ("cp-0", Role::ControlPlane),
    ("w-0", Role::Worker),
    ("w-1", Role::Worker),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn real_clusters() {
    for (index, directory) in directories().iter().enumerate() {
        let version = version_of(&directory.join("kube-apiserver"));
        let mut cluster = Cluster::start(directory, version, u16::try_from(index).unwrap());
        let outcome = cluster.check().await;
        let version = &cluster.version;
        outcome.unwrap_or_else(|error| panic!("{version}: {error:?}"));
        println!("{version}: passed");
    }
}

#[tokio::test]
async fn an_api_server_that_is_away_is_an_error_and_no_finding() {
    let client = client("https://127.0.0.1:1", None).unwrap();
    let version: KubernetesVersion = "1.34.9".parse().unwrap();
    let outcome = run(&client, &inputs(&version, &[])).await;
    assert!(matches!(outcome, Err(PreflightError::Api(_))), "{outcome:?}");
}

fn directories() -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = env::var_os("KPROV_TEST_BINARIES")
        .into_iter()
        .map(PathBuf::from)
        .collect();
    if let Some(releases) = env::var_os("KPROV_TEST_RELEASES") {
        found.extend(fs::read_dir(&releases).unwrap().map(|entry| entry.unwrap().path()));
    }
    found.retain(|directory| directory.join("kube-apiserver").is_file());
    found.sort();
    if found.is_empty() {
        let sources = "set KPROV_TEST_BINARIES or KPROV_TEST_RELEASES";
        assert!(env::var("CI").as_deref() != Ok("true"), "no binaries; {sources}");
        eprintln!("SKIPPED real_clusters: no binaries; {sources}");
    }
    found
}

fn version_of(program: &Path) -> KubernetesVersion {
    let output = Command::new(program).arg("--version").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.split_whitespace()
        .find_map(|word| word.parse().ok())
        .unwrap_or_else(|| panic!("{text}"))
}

/// A program that ends with the test, whatever happens to it.
struct Running {
    child: Child,
    log: PathBuf,
}

impl Running {
    fn start(program: &Path, flags: &[String], log: PathBuf) -> Self {
        let file = File::create(&log).unwrap();
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL"])
            .arg(program)
            .args(flags)
            .stdin(Stdio::null());
        let child = command.stdout(file.try_clone().unwrap()).stderr(file).spawn().unwrap();
        Self { child, log }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            let log = fs::read_to_string(&self.log).unwrap_or_default();
            eprintln!("--- {}", self.log.display());
            let lines: Vec<&str> = log.lines().collect();
            lines[lines.len().saturating_sub(15)..]
                .iter()
                .for_each(|line| eprintln!("{line:.300}"));
        }
    }
}

struct Cluster {
    version: KubernetesVersion,
    address: Ipv4Addr,
    // Ends before its directory goes.
    running: Vec<Running>,
    directory: PathBuf,
    root: tempfile::TempDir,
}

impl Cluster {
    fn start(directory: &Path, version: KubernetesVersion, index: u16) -> Self {
        // An address of this process's own, so that ports need none.
        let [high, low] = u16::try_from(process::id() % 60_000)
            .unwrap()
            .wrapping_add(index)
            .to_be_bytes();
        let mut cluster = Self {
            version,
            address: Ipv4Addr::new(127, 66, high, low),
            running: Vec::new(),
            directory: directory.to_owned(),
            root: tempfile::tempdir().unwrap(),
        };
        let secrets = generate_secrets(&ClusterName::new("demo").unwrap(), Timestamp::now()).unwrap();
        cluster.write("sa.pub", &secrets.service_account.certificate);
        cluster.write("sa.key", &secrets.service_account.key);
        cluster.write("tokens.csv", &format!("{TOKEN},tester,1,\"system:masters\"\n"));
        let kubeconfig = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{ "name": "c", "cluster": { "server": cluster.url(), "insecure-skip-tls-verify": true } }],
            "users": [{ "name": "u", "user": { "token": TOKEN } }],
            "contexts": [{ "name": "c", "context": { "cluster": "c", "user": "u" } }],
        });
        cluster.write("kubeconfig", &kubeconfig.to_string());
        let (address, file) = (cluster.address, |name: &str| cluster.file(name).display().to_string());
        let etcd = [
            format!("--data-dir={}", file("etcd")),
            format!("--listen-client-urls=http://{address}:2379"),
            format!("--advertise-client-urls=http://{address}:2379"),
            format!("--listen-peer-urls=http://{address}:2380"),
            format!("--initial-advertise-peer-urls=http://{address}:2380"),
            format!("--initial-cluster=default=http://{address}:2380"),
        ];
        let own = directory.join("etcd");
        let program = if own.is_file() {
            own
        } else {
            PathBuf::from("/usr/bin/etcd")
        };
        let mut api_server = vec![
            format!("--etcd-servers=http://{address}:2379"),
            format!("--bind-address={address}"),
            "--secure-port=6443".into(),
            // API servers refuse to advertise loopback.
            "--advertise-address=192.0.2.10".into(),
            format!("--cert-dir={}", file("certs")),
            "--service-account-issuer=https://kubernetes.default.svc".into(),
            format!("--service-account-key-file={}", file("sa.pub")),
            format!("--service-account-signing-key-file={}", file("sa.key")),
            "--service-cluster-ip-range=10.96.0.0/16".into(),
            format!("--token-auth-file={}", file("tokens.csv")),
            "--authorization-mode=RBAC".into(),
            "--allow-privileged=true".into(),
        ];
        if cluster.features().pod_security.is_none() {
            api_server.push("--enable-admission-plugins=PodSecurityPolicy".into());
        }
        if cluster.features().insecure_ports {
            api_server.push("--insecure-port=0".into());
        }
        cluster.run(&program, &etcd);
        cluster.run(&directory.join("kube-apiserver"), &api_server);
        cluster
    }

    /// Controller-manager and scheduler, which end where no API server is.
    fn start_controllers(&mut self) {
        let controller = |port: u16| {
            let mut flags = vec![
                format!("--bind-address={}", self.address),
                format!("--secure-port={port}"),
                format!("--cert-dir={}", self.file("certs").display()),
                "--leader-elect=false".into(),
            ];
            for flag in ["kubeconfig", "authentication-kubeconfig", "authorization-kubeconfig"] {
                flags.push(format!("--{flag}={}", self.file("kubeconfig").display()));
            }
            flags.extend(self.features().insecure_ports.then(|| "--port=0".to_owned()));
            flags
        };
        let mut manager = controller(10257);
        manager.push(format!(
            "--service-account-private-key-file={}",
            self.file("sa.key").display()
        ));
        let scheduler = controller(10259);
        self.run(&self.directory.join("kube-controller-manager"), &manager);
        self.run(&self.directory.join("kube-scheduler"), &scheduler);
    }

    fn run(&mut self, program: &Path, flags: &[String]) {
        let log = self.file(&format!("{}.log", program.file_name().unwrap().display()));
        self.running.push(Running::start(program, flags, log));
    }

    fn features(&self) -> Features {
        Features::of(self.version.minor()).unwrap()
    }

    fn file(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.file(name), text).unwrap();
    }

    fn url(&self) -> String {
        format!("https://{}:6443", self.address)
    }

    async fn check(&mut self) -> Result<()> {
        ensure!(self.directory.join("kube-controller-manager").is_file());
        let client = client(&self.url(), None)?;
        until("a ready API server", || async {
            Ok(get(&client, "/readyz").await.ok())
        })
        .await?;
        self.start_controllers();
        let release = release(&self.version, &["stays", "goes"]);
        let manifests = self_hosted(&settings(&self.version, release), 2, None)?;
        apply(&client, &manifests, Instant::now() + PATIENCE, |_| ()).await?;
        self.settle(&client).await?;

        let way = self.way();
        let inputs = inputs(&self.version, &way);
        ensure!(
            found(&client, &inputs).await? == BTreeSet::new(),
            "{:#?}",
            run(&client, &inputs).await?
        );

        let mut expected = self.act_as_people(&client).await?;
        // Budgets get their status in a while.
        until("what people did", || async {
            let names = found(&client, &inputs).await?;
            ensure!(
                names == expected,
                "{:#?}\nexpected {expected:#?}",
                run(&client, &inputs).await?
            );
            Ok(Some(()))
        })
        .await?;

        // As the operator, with the rights that kprov gives it.
        let operator = crate::client(&self.url(), Some("system:serviceaccount:kube-system:kprov-operator"))?;
        let names = found(&operator, &inputs).await?;
        ensure!(
            names == expected,
            "as the operator: {:#?}",
            run(&operator, &inputs).await?
        );

        // Who may not look is told so, and that is all.
        let stranger = crate::client(&self.url(), Some("system:serviceaccount:shop:default"))?;
        let names = found(&stranger, &inputs).await?;
        let checks = [
            "flags",
            "requested-apis",
            "stored-apis",
            "pod-disruption-budgets",
            "webhooks",
            "admission",
        ];
        let unchecked: BTreeSet<String> = checks.iter().map(|check| format!("unchecked/{check}")).collect();
        // On a way where nothing goes, nothing is looked for.
        let nothing_goes = between(self.version.minor().minor, way.last().map_or(0, |minor| minor.minor))
            .next()
            .is_none();
        ensure!(
            names.is_subset(&unchecked) && (names.len() == 6 || nothing_goes && names.len() == 5),
            "as a stranger: {:#?}",
            run(&stranger, &inputs).await?
        );

        // What the way doesn't take away is no finding.
        expected.retain(|name| !name.contains("-api/") && !name.contains("-flag/"));
        let patch: KubernetesVersion = format!("{}.99", self.version.minor()).parse()?;
        let mut short = crate::inputs(&self.version, &[patch.minor()]);
        short.hops[0].manifest.programs.clear();
        expected.insert("unchecked/flags/kube-apiserver".into());
        let names = found(&client, &short).await?;
        ensure!(names == expected, "{names:#?}\nexpected {expected:#?}");
        Ok(())
    }

    /// The next minors: from 1.20 as far as 1.25, where most went away.
    fn way(&self) -> Vec<Minor> {
        let minor = self.version.minor().minor;
        (minor + 1..=(minor + 2).clamp(25, NEWEST.minor))
            .map(Minor::v1)
            .collect()
    }

    /// Waits until the controllers watch everything they watch: a kind of people's comes last.
    async fn settle(&self, client: &Client) -> Result<()> {
        let definition = json!({ "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
            "metadata": { "name": "things.example.com" },
            "spec": definition_spec("things") });
        post(
            client,
            "/apis/apiextensions.k8s.io/v1/customresourcedefinitions",
            &definition,
        )
        .await?;
        for (name, _) in MACHINES {
            let node = json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": name } });
            post(client, "/api/v1/nodes", &node).await?;
        }
        let namespace = json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": "shop" } });
        post(client, "/api/v1/namespaces", &namespace).await?;
        until("garbage collection", || async {
            let metrics = get(client, "/metrics").await?;
            let of_requests = |line: &&str| {
                line.starts_with("apiserver_request_total{") || line.starts_with("apiserver_longrunning_requests{")
            };
            let watched = metrics
                .lines()
                .filter(of_requests)
                .any(|line| line.contains("\"things\"") && (line.contains("\"LIST\"") || line.contains("\"WATCH\"")));
            Ok(watched.then_some(()))
        })
        .await?;
        let account = "/api/v1/namespaces/shop/serviceaccounts/default";
        until("a ServiceAccount", || async { Ok(get(client, account).await.ok()) }).await?;
        Ok(())
    }

    /// Does what people do, and tells what should be found of it.
    async fn act_as_people(&self, client: &Client) -> Result<BTreeSet<String>> {
        let mut expected = BTreeSet::new();
        if self.version.minor() < Minor::v1(21) {
            self.use_old_apis(client, &mut expected).await?;
        }
        let pod = json!({ "apiVersion": "v1", "kind": "Pod",
            "metadata": { "name": "web-1", "labels": { "app": "web", "tier": "web" } },
            "spec": { "nodeName": "w-0", "automountServiceAccountToken": false,
                "containers": [{ "name": "web", "image": "example.com/web" }] } });
        post(client, "/api/v1/namespaces/shop/pods", &pod).await?;
        // No kubelet says so here.
        let ready = json!({ "status": { "conditions": [{ "type": "Ready", "status": "True" }] } });
        patch(
            client,
            "/api/v1/namespaces/shop/pods/web-1/status",
            "strategic-merge-patch",
            &ready,
        )
        .await?;
        let policy = self.features().pod_disruption_budget;
        for (name, least, label) in [("web", 1, "app"), ("all", 0, "tier")] {
            let budget = json!({ "apiVersion": policy, "kind": "PodDisruptionBudget", "metadata": { "name": name },
                "spec": { "minAvailable": least, "selector": { "matchLabels": { label: "web" } } } });
            post(
                client,
                &format!("/apis/{policy}/namespaces/shop/poddisruptionbudgets"),
                &budget,
            )
            .await?;
        }
        let other = json!({ "apiVersion": policy, "kind": "PodDisruptionBudget", "metadata": { "name": "other" },
            "spec": { "minAvailable": 1, "selector": { "matchLabels": { "app": "other" } } } });
        post(
            client,
            &format!("/apis/{policy}/namespaces/shop/poddisruptionbudgets"),
            &other,
        )
        .await?;
        expected.extend(["pod-disruption-budget/shop/web!", "overlapping-budgets/shop/all/web!"].map(str::to_owned));

        let flags = json!([
            { "op": "add", "path": "/spec/template/spec/containers/0/command/-", "value": "--goes=1" },
            { "op": "add", "path": "/spec/template/spec/containers/0/command/-", "value": "--stays=1" },
        ]);
        let path = "/apis/apps/v1/namespaces/kube-system/daemonsets/kube-apiserver";
        patch(client, path, "json-patch", &flags).await?;
        expected.insert("removed-flag/kube-apiserver/goes!".into());

        // It is asked about kprov's DaemonSets and nobody answers.
        let webhook = json!({ "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingWebhookConfiguration",
            "metadata": { "name": "strict" }, "webhooks": [{
                "name": "strict.example.com", "sideEffects": "None", "admissionReviewVersions": ["v1"], "timeoutSeconds": 2,
                "rules": [{ "operations": ["UPDATE"], "apiGroups": ["apps"], "apiVersions": ["v1"], "resources": ["daemonsets"] }],
                "clientConfig": { "service": { "namespace": "shop", "name": "nobody" } } }] });
        post(
            client,
            "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations",
            &webhook,
        )
        .await?;
        expected.extend(
            [
                "webhook/validating/strict/strict.example.com",
                "admission/DaemonSet/kube-system/kube-apiserver!",
                "admission/DaemonSet/kube-system/kube-proxy!",
            ]
            .map(str::to_owned),
        );
        Ok(expected)
    }

    async fn use_old_apis(&self, client: &Client, expected: &mut BTreeSet<String>) -> Result<()> {
        let ingress = json!({ "apiVersion": "extensions/v1beta1", "kind": "Ingress", "metadata": { "name": "web" },
            "spec": { "backend": { "serviceName": "web", "servicePort": 80 } } });
        post(client, "/apis/extensions/v1beta1/namespaces/shop/ingresses", &ingress).await?;
        let job = json!({ "apiVersion": "batch/v1beta1", "kind": "CronJob", "metadata": { "name": "nightly" },
            "spec": { "schedule": "0 3 * * *", "jobTemplate": { "spec": { "template": { "spec": {
                "restartPolicy": "Never", "containers": [{ "name": "job", "image": "example.com/job" }] } } } } } });
        post(client, "/apis/batch/v1beta1/namespaces/shop/cronjobs", &job).await?;
        let definition = json!({ "apiVersion": "apiextensions.k8s.io/v1beta1", "kind": "CustomResourceDefinition",
            "metadata": { "name": "relics.example.com" },
            "spec": { "group": "example.com", "version": "v1", "scope": "Cluster",
                "names": { "plural": "relics", "kind": "Relic" } } });
        post(
            client,
            "/apis/apiextensions.k8s.io/v1beta1/customresourcedefinitions",
            &definition,
        )
        .await?;
        let any = json!({ "rule": "RunAsAny" });
        let security = json!({ "apiVersion": "policy/v1beta1", "kind": "PodSecurityPolicy", "metadata": { "name": "people" },
            "spec": { "runAsUser": any, "seLinux": any, "supplementalGroups": any, "fsGroup": any, "volumes": ["*"] } });
        post(client, "/apis/policy/v1beta1/podsecuritypolicies", &security).await?;
        for api in [
            "extensions/v1beta1/ingresses",
            "batch/v1beta1/cronjobs",
            "apiextensions.k8s.io/v1beta1/customresourcedefinitions",
            "policy/v1beta1/poddisruptionbudgets",
        ] {
            expected.extend([format!("requested-api/{api}!"), format!("stored-api/{api}")]);
        }
        let security = "policy/v1beta1/podsecuritypolicies";
        expected.extend([format!("requested-api/{security}!"), format!("removed-api/{security}!")]);
        Ok(())
    }
}

fn definition_spec(plural: &str) -> Value {
    json!({ "group": "example.com", "scope": "Cluster", "names": { "plural": plural, "kind": "Thing" },
        "versions": [{ "name": "v1", "served": true, "storage": true, "schema": { "openAPIV3Schema": { "type": "object" } } }] })
}

fn client(url: &str, user: Option<&str>) -> Result<Client> {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut config = Config::new(url.parse()?);
    config.accept_invalid_certs = true;
    config.auth_info.token = Some(TOKEN.to_owned().into());
    config.auth_info.impersonate = user.map(str::to_owned);
    Ok(Client::try_from(config)?)
}

/// The names of what is found, those that block with a `!`.
async fn found(client: &Client, inputs: &Inputs) -> Result<BTreeSet<String>> {
    let findings = run(client, inputs).await?;
    Ok(findings
        .iter()
        .map(|f| format!("{}{}", f.name, if f.blocks { "!" } else { "" }))
        .collect())
}

async fn get(client: &Client, path: &str) -> Result<String, kube::Error> {
    client
        .request_text(
            http::Request::get(path)
                .body(Vec::new())
                .map_err(kube::Error::HttpError)?,
        )
        .await
}

async fn post(client: &Client, path: &str, object: &Value) -> Result<()> {
    let request = http::Request::post(path).header("content-type", "application/json");
    client
        .request_text(request.body(object.to_string().into_bytes())?)
        .await
        .with_context(|| path.to_owned())?;
    Ok(())
}

async fn patch(client: &Client, path: &str, kind: &str, change: &Value) -> Result<()> {
    let request = http::Request::patch(path).header("content-type", format!("application/{kind}+json"));
    client
        .request_text(request.body(change.to_string().into_bytes())?)
        .await
        .with_context(|| path.to_owned())?;
    Ok(())
}

async fn until<T, F: Future<Output = Result<Option<T>>>>(what: &str, mut look: impl FnMut() -> F) -> Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match look().await {
            Ok(Some(value)) => return Ok(value),
            Ok(None) if Instant::now() > deadline => bail!("gave up waiting for {what}"),
            Err(error) if Instant::now() > deadline => return Err(error.context(format!("gave up waiting for {what}"))),
            _ => sleep(Duration::from_millis(300)).await,
        }
    }
}

fn release(version: &KubernetesVersion, flags: &[&str]) -> Release {
    let image = |component: ImageComponent| ReleaseImage {
        reference: format!("kprov.local/{}:{}", component.as_str(), version.tag()),
        digest: Digest::from_bytes([1; 32]),
        version: None,
    };
    let components = [
        ImageComponent::KubeApiserver,
        ImageComponent::KubeControllerManager,
        ImageComponent::KubeScheduler,
        ImageComponent::KubeProxy,
        ImageComponent::Etcd,
        ImageComponent::Coredns,
        ImageComponent::Pause,
        ImageComponent::KprovOperator,
    ];
    let facts = ProgramFacts {
        flags: flags.iter().map(|flag| (*flag).to_owned()).collect(),
        feature_gates: Vec::new(),
    };
    Release {
        api_version: API_VERSION.into(),
        kind: "Release".into(),
        kubernetes: version.clone(),
        images: components
            .into_iter()
            .map(|component| (component, image(component)))
            .collect(),
        host_files: Vec::new(),
        minimum_from: None,
        advisories: Vec::new(),
        programs: BTreeMap::from([("kube-apiserver".to_owned(), facts)]),
    }
}

fn settings(version: &KubernetesVersion, release: Release) -> ControlPlaneSettings {
    ControlPlaneSettings {
        cluster: ClusterName::new("demo").unwrap(),
        kubernetes: version.clone(),
        release,
        release_digest: Digest::from_bytes([7; 32]),
        endpoint: Endpoint {
            host: "10.77.0.1".into(),
            port: 6443,
        },
        network: NodeNetwork {
            pods: "10.244.0.0/16".parse().unwrap(),
            services: "10.96.0.0/16".parse().unwrap(),
            dns_domain: "cluster.local".into(),
        },
        members: vec![Member {
            name: MachineName::new("cp-0").unwrap(),
            address: IpAddr::from([10, 77, 0, 10]),
        }],
        etcd_exists: true,
    }
}

/// Machines that are well, and a way over releases that lack the flag `goes`.
fn inputs(current: &KubernetesVersion, way: &[Minor]) -> Inputs {
    let name = |name: &str| MachineName::new(name).unwrap();
    let machine = |role| MachineStatus {
        kprov_node: Some(ProgramStatus {
            version: "0.1.0".into(),
            digest: Digest::from_bytes([3; 32]),
        }),
        etcd: (role == Role::ControlPlane).then(|| EtcdStatus {
            healthy: true,
            members: 1,
            ..EtcdStatus::default()
        }),
        disk_free_mib: Some(100 << 10),
        certificate_expires: Some(CertificateExpiry {
            path: "/etc/kubernetes/pki/apiserver.crt".into(),
            time: Timestamp::now() + SignedDuration::from_hours(24 * 300),
        }),
        ..MachineStatus::default()
    };
    let node = |role| NodeSeen {
        role,
        ready: true,
        closed: false,
        kubelet: Some(current.clone()),
    };
    let hop = |minor: &Minor| {
        let version: KubernetesVersion = format!("{minor}.99").parse().unwrap();
        Hop {
            manifest: release(&version, &["stays"]),
            release: ReleaseRef {
                version,
                digest: Digest::from_bytes([u8::try_from(minor.minor).unwrap(); 32]),
            },
        }
    };
    Inputs {
        current: ReleaseRef {
            version: current.clone(),
            digest: Digest::from_bytes([7; 32]),
        },
        hops: way.iter().map(hop).collect(),
        machines: MACHINES.iter().map(|(n, role)| (name(n), machine(*role))).collect(),
        nodes: MACHINES.iter().map(|(n, role)| (name(n), node(*role))).collect(),
        now: Timestamp::now(),
    }
}
