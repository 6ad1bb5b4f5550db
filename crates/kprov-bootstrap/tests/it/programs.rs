//! The real programs: where their binaries are, and whether they know every flag and setting that is rendered.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use jiff::Timestamp;
use kprov_bootstrap::kubelet::Kubelet;
use kprov_bootstrap::manifests::{EtcdClusterState, EtcdStart, etcd_pod};
use kprov_bootstrap::{control_plane_files, kubelet_config, paths, self_hosted};

use kprov_types::KubernetesVersion;
use kprov_types::machine::Role;
use kprov_types::ports::FIRST_REVISION;

use crate::common::{bundle, member, node_config, settings};
use crate::kubelet::host;

/// The directories with Kubernetes' programs to test with: `KPROV_TEST_BINARIES` is one, `KPROV_TEST_RELEASES` has one
/// for each version. None found is a failure in CI, and said aloud elsewhere.
pub(crate) fn directories(test: &str) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = env::var_os("KPROV_TEST_BINARIES")
        .into_iter()
        .map(PathBuf::from)
        .collect();
    if let Some(releases) = env::var_os("KPROV_TEST_RELEASES") {
        let entries = fs::read_dir(&releases).unwrap();
        found.extend(entries.map(|entry| entry.unwrap().path()));
    }
    found.retain(|directory| directory.join("kube-apiserver").is_file());
    found.sort();
    if found.is_empty() {
        assert!(
            env::var("CI").as_deref() != Ok("true"),
            "no binaries; set KPROV_TEST_BINARIES or KPROV_TEST_RELEASES"
        );
        eprintln!("SKIPPED {test}: no binaries; set KPROV_TEST_BINARIES or KPROV_TEST_RELEASES");
    }
    found
}

/// The version in `<program> --version`.
pub(crate) fn version_of(program: &Path) -> String {
    let output = Command::new(program).arg("--version").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let words = text.split_whitespace().map(|w| w.trim_start_matches('v'));
    words
        .into_iter()
        .find(|w| w.parse::<KubernetesVersion>().is_ok())
        .unwrap_or_else(|| panic!("{text}"))
        .to_owned()
}

/// etcd of a directory of binaries, or else this host's.
pub(crate) fn etcd(directory: &Path) -> PathBuf {
    let own = directory.join("etcd");
    if own.is_file() {
        own
    } else {
        PathBuf::from("/usr/bin/etcd")
    }
}

/// A program that runs as long as the test, and ends with it whatever happens. It needs root, for its namespace.
pub(crate) struct Running {
    child: Child,
    log: PathBuf,
}

impl Running {
    pub(crate) fn start(program: &Path, flags: &[String], log: PathBuf) -> Self {
        let file = File::create(&log).unwrap();
        // Programs make directories at places of their own; in a mount namespace these are gone with the program.
        let hide = "mount -t tmpfs tmpfs /var/lib && mount -t tmpfs tmpfs /usr/libexec && exec \"$0\" \"$@\"";
        let child = Command::new("unshare")
            .args(["--mount", "sh", "-c", hide])
            .arg(program)
            .args(flags)
            .stdin(Stdio::null())
            .stdout(file.try_clone().unwrap())
            .stderr(file)
            .spawn()
            .unwrap();
        Self { child, log }
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub(crate) fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            let log = self.log();
            let tail: Vec<&str> = log.lines().rev().take(25).collect();
            eprintln!("--- {}", self.log.display());
            tail.iter().rev().for_each(|line| eprintln!("{line:.400}"));
        }
    }
}

fn flag_name(flag: &str) -> &str {
    flag.split('=').next().unwrap()
}

/// Asserts that a program's help names every flag. Flags that a version still takes but hides are listed in `hidden`.
fn assert_known(program: &Path, flags: &[String], hidden: &[&str]) {
    let output = Command::new(program).arg("--help").output().unwrap();
    let help = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    let known: BTreeSet<&str> = help.split_whitespace().map(|word| word.trim_end_matches(',')).collect();
    for flag in flags {
        let name = flag_name(flag);
        assert!(
            known.contains(name) || hidden.contains(&name),
            "{} does not know {name}",
            program.display()
        );
    }
}

#[test]
fn programs_know_every_flag() {
    for directory in directories("programs_know_every_flag") {
        let version = version_of(&directory.join("kube-apiserver"));
        let etcd_program = etcd(&directory);
        let etcd_version = version_of(&etcd_program);
        let settings = settings(&version, &etcd_version, 3);
        let mut checked = Vec::new();
        for manifest in self_hosted(&settings, FIRST_REVISION, None).unwrap() {
            let container = &manifest.object["spec"]["template"]["spec"]["containers"][0];
            let Some(command) = container["command"].as_array() else {
                continue;
            };
            let name = container["name"].as_str().unwrap();
            let program = directory.join(name);
            if name == "coredns" || !program.is_file() {
                continue;
            }
            let flags: Vec<String> = command[1..].iter().map(|f| f.as_str().unwrap().to_owned()).collect();
            assert_known(&program, &flags, &["--insecure-port"]);
            checked.push(name.to_owned());
        }
        let start = EtcdStart {
            initial_cluster: vec![member(0)],
            state: EtcdClusterState::New,
            data_dir: "/var/lib/etcd".into(),
        };
        let (_, pod) = etcd_pod(&settings, &member(0), &start).unwrap();
        let flags: Vec<String> = serde_json::from_value(pod["spec"]["containers"][0]["command"].clone()).unwrap();
        assert_known(&etcd_program, &flags[1..], &[]);
        let kubelet = directory.join("kubelet");
        if kubelet.is_file() {
            for role in [Role::ControlPlane, Role::Worker] {
                let minor = settings.kubernetes.minor();
                let rendered = kubelet_config(&node_config(role, true), &host(), minor).unwrap();
                assert_known(&kubelet, &rendered.flags, &[]);
            }
            checked.push("kubelet".into());
        }
        println!(
            "{version}: flags of {} and etcd {etcd_version} known",
            checked.join(", ")
        );
    }
}

/// Starts each kubelet far enough to read its configuration: it then fails for want of a container runtime.
#[test]
fn kubelets_read_their_configuration() {
    for directory in directories("kubelets_read_their_configuration") {
        let program = directory.join("kubelet");
        if !program.is_file() {
            println!("SKIPPED kubelet of {}: none", directory.display());
            continue;
        }
        let version = version_of(&program);
        let minor = version.parse::<KubernetesVersion>().unwrap().minor();
        let root = tempfile::tempdir().unwrap();
        let path = |name: &str| root.path().join(name).display().to_string();
        let remap = |text: &str| {
            text.replace("/etc/kubernetes", &path("kubernetes"))
                .replace("/var/lib/kubelet", &path("kubelet"))
                // Nobody listens there: the kubelet must not meet an API server.
                .replace("https://127.0.0.1:6443", "https://127.0.0.1:1")
        };
        let mut host = host();
        host.runtime_endpoint = format!("unix://{}", path("none.sock"));
        let Kubelet { config, flags } = kubelet_config(&node_config(Role::ControlPlane, true), &host, minor).unwrap();
        let bundle = bundle(settings(&version, "3.5.30", 1), Timestamp::now());
        let mut files: Vec<(String, String)> = control_plane_files(&bundle, &member(0), &|_| None, Timestamp::now())
            .unwrap()
            .into_iter()
            .map(|file| (file.path, file.content))
            .collect();
        files.push((paths::KUBELET_CONFIG.into(), config.to_string()));
        for (name, content) in files {
            let name = PathBuf::from(remap(&name));
            fs::create_dir_all(name.parent().unwrap()).unwrap();
            fs::write(name, remap(&content)).unwrap();
        }
        let flags: Vec<String> = flags.iter().map(|flag| remap(flag)).collect();
        let mut kubelet = Running::start(&program, &flags, root.path().join("kubelet.log"));
        let deadline = Instant::now() + Duration::from_mins(1);
        while !kubelet.has_ended() && !kubelet.log().contains("none.sock") {
            assert!(
                Instant::now() < deadline,
                "the kubelet never came to its container runtime"
            );
            thread::sleep(Duration::from_millis(100));
        }
        let log = kubelet.log();
        assert!(log.contains("none.sock"), "{log}");
        for complaint in [
            "unknown flag",
            "unknown field",
            "strict decoding",
            "failed to load kubelet config",
            "validate kubelet config",
        ] {
            assert!(!log.to_lowercase().contains(complaint), "{complaint}: {log}");
        }
        println!("{version}: the kubelet read its configuration");
    }
}
