//! This machine's etcd member is changed, saved and restored: with real etcd processes. The only part that is not real is kubelet:
//! its static pods' commands are run here as they are, with other paths.

#![cfg(test)]

mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use camino::{Utf8Path, Utf8PathBuf};
use http_body_util::Full;
use jiff::Timestamp;
use kprov_bootstrap::pki::{self, Leaf};
use kprov_front::{Front, FrontConfig};
use kprov_node::control_plane::with_release;
use kprov_node::etcd::{EtcdClient, OwnMember, Places, RunError, SnapshotError};
use kprov_node::https;
use kprov_types::api::RestoreOrder;
use kprov_types::machine::Endpoint;
use kprov_types::node::{ClusterSecrets, ControlPlaneSettings, Member, NodeNetwork};
use kprov_types::release::{API_VERSION, ImageComponent, ReleaseImage};
use kprov_types::{Digest, Release, ports};
use rustls::pki_types::ServerName;
use serde_json::{Value, json};
use support::{members, server};
use tokio::task::JoinHandle;

const LIMIT: Duration = Duration::from_mins(1);

/// etcd of one version, as programs on this host.
#[derive(Clone, Debug)]
struct Programs {
    directory: PathBuf,
    version: String,
}

/// The etcd of this host and those of `KPROV_TEST_RELEASES`, each version once, oldest first.
fn programs() -> Vec<Programs> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut directories: Vec<_> = std::env::split_paths(&path).collect();
    if let Some(releases) = std::env::var_os("KPROV_TEST_RELEASES") {
        directories.extend(std::fs::read_dir(releases).unwrap().map(|entry| entry.unwrap().path()));
    }
    directories.retain(|directory| directory.join("etcd").is_file() && directory.join("etcdctl").is_file());
    let found = directories.into_iter().map(|directory| {
        let output = Command::new(directory.join("etcd")).arg("--version").output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let version = text.split_whitespace().nth(2).unwrap().to_owned();
        (version.clone(), Programs { directory, version })
    });
    let found: BTreeMap<_, _> = found.collect();
    assert!(!found.is_empty(), "etcd and etcdctl are installed");
    found.into_values().collect()
}

/// A release whose etcd is called `name`.
fn release(name: &str, version: Option<&str>) -> Release {
    let image = ReleaseImage {
        reference: format!("kprov.local/etcd:{name}"),
        digest: Digest::from_bytes([1; 32]),
        version: version.map(str::to_owned),
    };
    Release {
        api_version: API_VERSION.into(),
        kind: "Release".into(),
        kubernetes: "1.34.9".parse().unwrap(),
        images: [(ImageComponent::Etcd, image)].into(),
        host_files: Vec::new(),
        minimum_from: None,
        advisories: Vec::new(),
        programs: BTreeMap::new(),
    }
}

/// Runs the commands of one machine's static pod `etcd`, as kubelet does: the old ones end before new ones begin, what fails is
/// started again.
struct Kubelet {
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Images by name, and the directories that have their programs.
type Images = Arc<Mutex<BTreeMap<String, PathBuf>>>;

struct Pod {
    text: String,
    /// Those that are still to be run, the first one first.
    commands: Vec<Command>,
    process: Option<Child>,
}

impl Drop for Pod {
    fn drop(&mut self) {
        if let Some(process) = &mut self.process {
            let pid = nix::unistd::Pid::from_raw(process.id().cast_signed());
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
            let _ = process.wait();
        }
    }
}

impl Pod {
    /// Goes on with the pod; the last command runs for as long as the pod is there.
    fn step(&mut self) {
        let ended = match &mut self.process {
            None => true,
            Some(process) => match process.try_wait().unwrap() {
                None => false,
                Some(status) => {
                    if status.success() && self.commands.len() > 1 {
                        self.commands.remove(0);
                    }
                    true
                }
            },
        };
        if ended && let Some(command) = self.commands.first_mut() {
            self.process = command.spawn().ok();
        }
    }
}

impl Kubelet {
    fn start(root: Utf8PathBuf, address: String, images: Images) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let mut pod: Option<Pod> = None;
            while !stopped.load(Ordering::SeqCst) {
                let text = std::fs::read_to_string(root.join("manifests/etcd.yaml")).ok();
                if pod.as_ref().map(|pod| &pod.text) != text.as_ref() {
                    drop(pod.take());
                    pod = text.map(|text| Self::pod(text, &root, &address, &images));
                }
                pod.iter_mut().for_each(Pod::step);
                thread::sleep(Duration::from_millis(100));
            }
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }

    fn pod(text: String, root: &Utf8Path, address: &str, images: &Images) -> Pod {
        let pod: Value = serde_json::from_str(&text).unwrap();
        let spec = &pod["spec"];
        let list = |field: &str| spec[field].as_array().cloned().unwrap_or_default();
        let mut places: Vec<(String, String)> = Vec::new();
        for container in list("initContainers").iter().chain(&list("containers")) {
            for mount in container["volumeMounts"].as_array().unwrap() {
                let volume = list("volumes")
                    .into_iter()
                    .find(|volume| volume["name"] == mount["name"])
                    .unwrap();
                let host = volume["hostPath"]["path"].as_str().unwrap().to_owned();
                places.push((mount["mountPath"].as_str().unwrap().to_owned(), host));
            }
        }
        let command = |container: &Value| {
            let image = container["image"].as_str().unwrap();
            let name = image.split(['@', ':']).nth(1).unwrap();
            let directory = images.lock().unwrap()[name].clone();
            let arguments: Vec<&str> = container["command"]
                .as_array()
                .unwrap()
                .iter()
                .filter_map(Value::as_str)
                .collect();
            let program = Path::new(arguments[0]).file_name().unwrap();
            let mut command = Command::new(directory.join(program));
            for argument in &arguments[1..] {
                let mut argument = argument
                    .replace("https://127.0.0.1:2379,", "")
                    .replace("127.0.0.1:2381", &format!("{address}:2381"));
                for (inside, outside) in &places {
                    if argument.contains(&format!("={inside}")) || argument.starts_with(inside) {
                        argument = argument.replacen(inside, outside, 1);
                        break;
                    }
                }
                command.arg(argument.replace("/etc/kubernetes/pki/etcd", root.join("pki").as_str()));
            }
            let log = std::fs::File::options()
                .create(true)
                .append(true)
                .open(root.join("log"))
                .unwrap();
            command
                .stdin(Stdio::null())
                .stdout(log.try_clone().unwrap())
                .stderr(log);
            command
        };
        Pod {
            commands: list("initContainers")
                .iter()
                .chain(&list("containers"))
                .map(command)
                .collect(),
            text,
            process: None,
        }
    }
}

/// A control-plane machine, as far as its etcd member goes.
struct Machine {
    member: OwnMember,
    root: Utf8PathBuf,
    images: Images,
    restores: Option<JoinHandle<()>>,
    _kubelet: Kubelet,
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.restores.iter().for_each(JoinHandle::abort);
        if thread::panicking() {
            let log = std::fs::read_to_string(self.root.join("log")).unwrap_or_default();
            let tail: Vec<&str> = log.lines().rev().take(25).collect();
            eprintln!("--- {}", self.member.me.name);
            tail.iter().rev().for_each(|line| eprintln!("{line:.300}"));
        }
    }
}

struct Cluster {
    /// First, so that processes end before their directories do.
    machines: Vec<Machine>,
    settings: ControlPlaneSettings,
    client: EtcdClient,
    tls: Arc<rustls::ClientConfig>,
    _dir: tempfile::TempDir,
}

impl Cluster {
    /// Starts a cluster of machines that all run the etcd called `name`.
    async fn start(count: u8, name: &str, images: &[(&str, &Path)], version: &str) -> Self {
        https::use_ring();
        let dir = tempfile::tempdir().unwrap();
        let top = Utf8Path::from_path(dir.path()).unwrap();
        let secrets = pki::generate_secrets(&"demo".parse().unwrap(), Timestamp::now()).unwrap();
        let pair = pki::issue(&secrets.etcd_ca, &Leaf::client("test", None), Timestamp::now()).unwrap();
        let identity = Some((pair.certificate.as_str(), pair.key.as_str()));
        let tls = https::client(&secrets.etcd_ca.certificate, identity).unwrap();
        let client = EtcdClient::new(tls.clone());
        let all = members(count, 90);
        let settings = ControlPlaneSettings {
            cluster: "demo".parse().unwrap(),
            kubernetes: "1.34.9".parse().unwrap(),
            release: release(name, Some(version)),
            release_digest: Digest::from_bytes([7; 32]),
            endpoint: Endpoint {
                host: "10.0.0.100".into(),
                port: 6443,
            },
            network: NodeNetwork {
                pods: "10.244.0.0/16".parse().unwrap(),
                services: "10.96.0.0/16".parse().unwrap(),
                dns_domain: "cluster.local".into(),
            },
            members: all.clone(),
            etcd_exists: false,
        };
        let images: BTreeMap<_, _> = images
            .iter()
            .map(|(name, path)| ((*name).to_owned(), path.to_path_buf()))
            .collect();
        let images: Images = Arc::new(Mutex::new(images));
        let machine = |me: &Member| Machine::start(top, me, &all, &secrets, &client, &images);
        let mut cluster = Self {
            machines: all.iter().map(machine).collect(),
            settings,
            client,
            tls,
            _dir: dir,
        };
        for machine in &mut cluster.machines {
            machine.begin(&cluster.settings).await;
        }
        for machine in &cluster.machines {
            machine.well().await;
        }
        cluster
    }

    /// Other settings, with the etcd called `name`.
    fn with(&self, name: &str, version: Option<&str>) -> ControlPlaneSettings {
        with_release(&self.settings, &release(name, version), &Digest::from_bytes([8; 32]))
    }

    async fn ask(&self, machine: usize, path: &'static str, body: Value) -> Value {
        let address = self.machines[machine].member.me.address;
        let request = http::Request::post(path)
            .header("host", "etcd")
            .body(Full::new(Bytes::from(body.to_string())))
            .unwrap();
        let target = (address, ports::ETCD_CLIENT).into();
        let answer = https::send(&self.tls, target, ServerName::from(address), request, LIMIT)
            .await
            .unwrap();
        serde_json::from_slice(answer.body()).unwrap()
    }

    async fn put(&self, key: &str, value: &str) {
        let body = json!({ "key": STANDARD.encode(key), "value": STANDARD.encode(value) });
        let answer = self.ask(0, "/v3/kv/put", body).await;
        assert!(answer["header"].is_object(), "{answer}");
    }

    async fn get(&self, machine: usize, key: &str) -> Option<String> {
        let answer = self
            .ask(machine, "/v3/kv/range", json!({ "key": STANDARD.encode(key) }))
            .await;
        let value = answer["kvs"][0]["value"].as_str()?;
        Some(String::from_utf8(STANDARD.decode(value).unwrap()).unwrap())
    }

    /// Waits until all machines have carried out the restore `id`.
    async fn restored(&self, id: &str) {
        let done = async {
            for machine in &self.machines {
                while machine.member.restored().0.as_deref() != Some(id) {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        };
        if tokio::time::timeout(2 * LIMIT, done).await.is_err() {
            let states: Vec<_> = self.machines.iter().map(|machine| machine.member.restored()).collect();
            panic!("not restored: {states:?}");
        }
    }
}

impl Machine {
    fn start(
        top: &Utf8Path,
        me: &Member,
        all: &[Member],
        secrets: &ClusterSecrets,
        client: &EtcdClient,
        images: &Images,
    ) -> Self {
        let root = top.join(me.name.as_str());
        for directory in ["pki", "manifests", "data"] {
            std::fs::create_dir_all(root.join(directory)).unwrap();
        }
        let pair = server(secrets, me);
        for (name, content) in [
            ("ca.crt", &secrets.etcd_ca.certificate),
            ("server.crt", &pair.certificate),
            ("server.key", &pair.key),
            ("peer.crt", &pair.certificate),
            ("peer.key", &pair.key),
        ] {
            std::fs::write(root.join("pki").join(name), content).unwrap();
        }
        let front = Front::start(FrontConfig::worker(Vec::new(), secrets.ca.certificate.clone())).unwrap();
        let mut member = OwnMember::new(
            me.clone(),
            all.to_vec(),
            client.clone(),
            Arc::new(front),
            root.join("data"),
        );
        member.places = Places {
            manifests: root.join("manifests"),
            staging: root.join("staging"),
            state: root.join("state"),
        };
        // Whatever runs on this host is not this test's.
        member.restart_control_plane = || Ok(0);
        let kubelet = Kubelet::start(root.clone(), me.address.to_string(), Arc::clone(images));
        Self {
            member,
            root,
            images: Arc::clone(images),
            restores: None,
            _kubelet: kubelet,
        }
    }

    async fn begin(&mut self, settings: &ControlPlaneSettings) {
        self.restores = Some(tokio::spawn(self.member.clone().carry_out_restores(settings.clone())));
        let note = |why| println!("{}: {why}", self.member.me.name);
        tokio::time::timeout(LIMIT, self.member.begin(settings, note))
            .await
            .expect("etcd begins")
            .unwrap();
    }

    async fn well(&self) {
        let well = async {
            while !self.member.status().await.healthy {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        tokio::time::timeout(LIMIT, well).await.expect("etcd gets well");
    }

    fn manifest(&self) -> String {
        std::fs::read_to_string(self.root.join("manifests/etcd.yaml")).unwrap()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_is_taken_verified_and_restored() {
    for Programs { directory, version } in programs() {
        println!("etcd {version}");
        let cluster = Cluster::start(1, "one", &[("one", &directory)], &version).await;
        let machine = &cluster.machines[0];
        let status = machine.member.status().await;
        assert_eq!(
            (status.healthy, status.version.as_str(), status.members),
            (true, version.as_str(), 1)
        );
        assert!(status.image.starts_with("kprov.local/etcd:one@sha256:"), "{status:?}");
        assert!(status.alarms.is_empty() && status.message.is_empty(), "{status:?}");
        assert!((1..100).contains(&status.database_mib), "{status:?}");

        cluster.put("kept", "before").await;
        cluster.put("large", &"x".repeat(1 << 20)).await;
        let snapshot = machine.member.snapshot("first").await.unwrap();
        assert!(snapshot.size > 1 << 20);
        assert_eq!(
            machine.member.snapshot("first").await.unwrap(),
            snapshot,
            "one of a name"
        );
        assert_eq!(machine.member.snapshots(), [snapshot]);
        cluster.put("kept", "after").await;
        cluster.put("later", "gone").await;

        // One that was changed on disk is refused before anything else is.
        let file = machine.root.join("state/snapshots/first.db");
        let mode = std::os::unix::fs::PermissionsExt::mode(&file.metadata().unwrap().permissions());
        assert_eq!(mode & 0o777, 0o600);
        let good = std::fs::read(&file).unwrap();
        let mut bad = good.clone();
        bad[good.len() / 2] ^= 1;
        std::fs::write(&file, bad).unwrap();
        let order = |id: &str| RestoreOrder {
            snapshot: "first".into(),
            id: id.into(),
            from: "cp-0".into(),
        };
        let manifest = machine.manifest();
        machine.member.order_restore(&order("bad")).unwrap();
        let refused = async {
            while !machine.member.restored().1.is_some_and(|why| why.contains("damaged")) {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        tokio::time::timeout(LIMIT, refused).await.unwrap();
        assert_eq!(machine.manifest(), manifest, "etcd was left alone");

        std::fs::write(&file, good).unwrap();
        machine.member.order_restore(&order("good")).unwrap();
        cluster.restored("good").await;
        assert_eq!(cluster.get(0, "kept").await.as_deref(), Some("before"));
        assert_eq!(cluster.get(0, "later").await, None);
        let placed = machine.manifest();
        assert!(
            placed.contains("--data-dir=/var/lib/etcd\"") && !placed.contains("initContainers"),
            "{placed}"
        );
        let aside: Vec<_> = machine.root.join("data").read_dir_utf8().unwrap().flatten().collect();
        let aside = aside
            .iter()
            .find(|entry| entry.file_name().starts_with("data."))
            .expect("old data are kept");
        assert!(aside.path().join("snap/db").exists());

        cluster.put("kept", "new").await;
        machine.member.order_restore(&order("good")).unwrap();
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!(
            cluster.get(0, "kept").await.as_deref(),
            Some("new"),
            "each order is carried out once"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failing_etcd_is_put_back() {
    let programs = programs();
    let (old, new) = (&programs[0], programs.last().unwrap());
    let broken = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink("/bin/false", broken.path().join("etcd")).unwrap();
    let images = [
        ("old", old.directory.as_path()),
        ("new", &new.directory),
        ("broken", broken.path()),
    ];
    let cluster = Cluster::start(1, "old", &images, &old.version).await;
    let member = &cluster.machines[0].member;
    cluster.put("key", "value").await;
    let image = || async { member.status().await.image };

    // What does not start is put back, and is not tried again.
    let limit = Duration::from_secs(4);
    let failed = member.change(&cluster.with("broken", None), limit).await;
    let Err(RunError::Failed(why)) = failed else {
        panic!("{failed:?}")
    };
    assert!(why.contains("put back") && !why.contains("not healthy either"), "{why}");
    assert!(image().await.contains("etcd:old@"));
    let status = member.status().await;
    assert!(status.healthy && status.message == why, "{status:?}");
    assert_eq!(cluster.get(0, "key").await.as_deref(), Some("value"));
    let manifest = cluster.machines[0].manifest();
    let again = member.change(&cluster.with("broken", None), limit).await;
    assert!(
        matches!(&again, Err(RunError::Failed(same)) if *same == why),
        "{again:?}"
    );
    assert_eq!(cluster.machines[0].manifest(), manifest);
    assert!(!member.front.watch().borrow().held, "nobody waits any longer");

    // One that is there already clears it.
    member.change(&cluster.settings, limit).await.unwrap();
    assert_eq!(member.status().await.message, "");

    // Another version, with the data of the first; the release names it as an image's tag.
    let wanted = cluster.with("new", Some(&format!("v{}-0", new.version)));
    member.change(&wanted, LIMIT).await.unwrap();
    assert!(image().await.contains("etcd:new@"));
    assert_eq!(member.status().await.version, new.version);
    assert_eq!(cluster.get(0, "key").await.as_deref(), Some("value"));

    // One that runs, and is not what its release says.
    let failed = member.change(&cluster.with("old", Some("3.99.0")), limit).await;
    let Err(RunError::Failed(why)) = failed else {
        panic!("{failed:?}")
    };
    assert!(why.contains("3.99.0"), "{why}");
    assert!(image().await.contains("etcd:new@"));

    // Cut off in the middle, by a kprov-node that ends: the next one goes on.
    let cut = tokio::time::timeout(
        Duration::from_secs(2),
        member.change(&cluster.with("broken", None), LIMIT),
    )
    .await;
    assert!(cut.is_err(), "{cut:?}");
    assert!(image().await.contains("etcd:broken@"));
    member.change(&wanted, limit).await.unwrap();
    cluster.machines[0].well().await;
    assert!(image().await.contains("etcd:new@"));
    assert_eq!(cluster.get(0, "key").await.as_deref(), Some("value"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_change_one_by_one_and_are_restored_together() {
    let programs = programs();
    let (old, new) = (&programs[0], programs.last().unwrap());
    let images = [("old", old.directory.as_path()), ("new", &new.directory)];
    let mut cluster = Cluster::start(3, "old", &images, &old.version).await;
    cluster.put("key", "before").await;
    let wanted = cluster.with("new", Some(&new.version));

    // None while another one is away.
    let away = cluster.machines.pop().unwrap();
    let (root, me) = (away.root.clone(), away.member.clone());
    drop(away);
    let waits = cluster.machines[0].member.change(&wanted, LIMIT).await;
    assert!(
        matches!(&waits, Err(RunError::Wait(why)) if why.contains("cp-2")),
        "{waits:?}"
    );
    let images = Arc::clone(&cluster.machines[0].images);
    let kubelet = Kubelet::start(root.clone(), me.me.address.to_string(), Arc::clone(&images));
    let mut back = Machine {
        member: me,
        root,
        images,
        restores: None,
        _kubelet: kubelet,
    };
    back.begin(&cluster.settings).await;
    back.well().await;
    cluster.machines.push(back);
    for machine in &cluster.machines {
        machine.member.change(&wanted, LIMIT).await.unwrap();
        assert_eq!(machine.member.status().await.version, new.version);
    }

    let from = &cluster.machines[1].member;
    from.snapshot("all").await.unwrap();
    cluster.put("key", "after").await;
    for machine in &cluster.machines {
        let order = RestoreOrder {
            snapshot: "all".into(),
            id: "id".into(),
            from: "cp-1".into(),
        };
        machine.member.order_restore(&order).unwrap();
    }
    cluster.restored("id").await;
    for (n, machine) in cluster.machines.iter().enumerate() {
        machine.well().await;
        assert_eq!(cluster.get(n, "key").await.as_deref(), Some("before"), "{n}");
        assert_eq!(machine.member.status().await.members, 3);
        assert!(
            machine.member.status().await.image.contains("etcd:new@"),
            "the etcd that ran before"
        );
    }
    let (_, unhealthy) = cluster
        .client
        .look(&cluster.machines[0].member.me, &cluster.settings.members)
        .await;
    assert!(unhealthy.is_empty(), "{unhealthy:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_that_breaks_off_leaves_nothing() {
    let Programs { directory, version } = programs().remove(0);
    let mut cluster = Cluster::start(1, "one", &[("one", &directory)], &version).await;
    let member = cluster.machines[0].member.clone();
    cluster.machines.clear();
    let failed = member.snapshot("late").await;
    assert!(matches!(failed, Err(SnapshotError::Etcd(_))), "{failed:?}");
    assert!(member.snapshots().is_empty());
}
