//! A room for machines that is cleared again, whatever becomes of the test.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use camino::{Utf8Path, Utf8PathBuf};
use kprov_provider::Provider;
use kprov_provider_local::{LocalConfig, LocalProvider};
use kprov_types::machine::{DiskSpec, FirstBoot, Machine, MachineSpec, NetworkSpec};
use kprov_types::{ClusterName, MachineName, Role};

/// The program with the hidden subcommands.
pub(crate) const ROOM: &str = env!("CARGO_BIN_EXE_machine-room");

pub(crate) struct Room {
    pub(crate) provider: LocalProvider,
    pub(crate) state_dir: Utf8PathBuf,
    /// A directory that no machine may see into.
    pub(crate) hidden: Utf8PathBuf,
    pub(crate) clusters: Vec<ClusterName>,
    pub(crate) range: String,
    _keep: tempfile::TempDir,
}

/// A room for clusters of these names (made unlike any other run's); `None`, and a message, where there can be none.
/// `subnet` is the test's own, so that tests can run side by side.
pub(crate) fn room(names: &[&str], subnet: u8) -> Option<Room> {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED: machines as namespaces need root");
        return None;
    }
    let keep = tempfile::Builder::new()
        .prefix("kprov-local-")
        .tempdir_in("/var/tmp")
        .unwrap();
    let state_dir = Utf8Path::from_path(keep.path()).unwrap().join("state");
    // Longer than the state directory's, whose name it begins with: they must not be mixed up.
    let hidden = state_dir.with_file_name("state-of-others");
    fs::create_dir(&hidden).unwrap();
    fs::write(hidden.join("secret"), "secret").unwrap();
    let provider = provider(&state_dir, &hidden);
    let unique = format!("{:x}", std::process::id());
    let clusters = names
        .iter()
        .map(|n| ClusterName::new(format!("{n}-{unique}")).unwrap())
        .collect();
    Some(Room {
        provider,
        state_dir,
        hidden,
        clusters,
        range: format!("10.99.{subnet}.0/24"),
        _keep: keep,
    })
}

/// A provider that keeps its state there.
pub(crate) fn provider(state_dir: &Utf8Path, hidden: &Utf8Path) -> LocalProvider {
    let config = LocalConfig {
        state_dir: state_dir.to_owned(),
        hide: vec![hidden.to_owned()],
        ..LocalConfig::new(ROOM)
    };
    LocalProvider::new(config).unwrap()
}

impl Room {
    pub(crate) fn cluster(&self) -> &ClusterName {
        &self.clusters[0]
    }

    pub(crate) fn network(&self) -> NetworkSpec {
        NetworkSpec {
            cidr: Some(self.range.parse().unwrap()),
            api_port: 6443,
        }
    }

    pub(crate) fn machine_dir(&self, cluster: &ClusterName, machine: &MachineName) -> Utf8PathBuf {
        self.state_dir
            .join(cluster.as_str())
            .join("machines")
            .join(machine.as_str())
    }

    /// The process id, on the host, of a machine's first process.
    pub(crate) fn pid(&self, cluster: &ClusterName, machine: &MachineName) -> i32 {
        let record = fs::read(self.machine_dir(cluster, machine).join("init.json")).unwrap();
        let record: serde_json::Value = serde_json::from_slice(&record).unwrap();
        i32::try_from(record["pid"].as_i64().unwrap()).unwrap()
    }

    /// Network, disks and machines, as `kprov up` would ensure them.
    pub(crate) async fn up(
        &self,
        cluster: &ClusterName,
        network: &NetworkSpec,
        machines: &[MachineSpec],
    ) -> Vec<Machine> {
        self.provider.ensure_network(cluster, network).await.unwrap();
        let disks: Vec<DiskSpec> = machines
            .iter()
            .map(|m| DiskSpec {
                machine: m.name.clone(),
                size_gib: 1,
            })
            .collect();
        self.provider.ensure_disks(cluster, &disks).await.unwrap();
        self.provider.ensure_machines(cluster, machines).await.unwrap()
    }

    /// Everything away, as `kprov down` would have it.
    pub(crate) async fn down(&self, cluster: &ClusterName) {
        let observed = self.provider.observe(cluster).await.unwrap();
        let machines: Vec<MachineName> = observed.machines.into_iter().map(|m| m.name).collect();
        self.provider.remove_machines(cluster, &machines).await.unwrap();
        let disks: Vec<MachineName> = observed.disks.into_iter().map(|d| d.machine).collect();
        self.provider.remove_disks(cluster, &disks).await.unwrap();
        self.provider.remove_network(cluster).await.unwrap();
    }

    /// What a machine has printed, once a text is in it.
    pub(crate) async fn console_with(&self, cluster: &ClusterName, machine: &MachineName, text: &str) -> String {
        let mut printed = String::new();
        for _ in 0..500 {
            printed = self
                .provider
                .console(cluster, machine)
                .await
                .unwrap()
                .unwrap_or_default();
            if printed.contains(text) {
                return printed;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("`{machine}` never printed `{text}`, but: {printed}");
    }

    /// Runs a program inside a machine.
    pub(crate) fn inside(&self, cluster: &ClusterName, machine: &MachineName, script: &str) -> String {
        let pid = self.pid(cluster, machine).to_string();
        let output = Command::new("nsenter")
            .args(["--target", &pid, "--all", "/bin/sh", "-ec", script])
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{script}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let (provider, clusters) = (self.provider.clone(), self.clusters.clone());
        let cleared = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(async {
                for cluster in &clusters {
                    let observed = provider.observe(cluster).await.unwrap();
                    let names: Vec<_> = observed.machines.into_iter().map(|m| m.name).collect();
                    provider.remove_machines(cluster, &names).await.unwrap();
                    let names: Vec<_> = observed.disks.into_iter().map(|d| d.machine).collect();
                    provider.remove_disks(cluster, &names).await.unwrap();
                    provider.remove_network(cluster).await.unwrap();
                }
            });
        })
        .join();
        // A panic while panicking would hide what went wrong first.
        if !std::thread::panicking() {
            cleared.unwrap();
        }
    }
}

/// A machine that runs a script which must not end.
pub(crate) fn machine(cluster: &ClusterName, suffix: &str, role: Role, script: &str) -> MachineSpec {
    MachineSpec {
        name: MachineName::new(format!("{cluster}-{suffix}")).unwrap(),
        role,
        zone: None,
        size: None,
        image: None,
        first_boot: FirstBoot(format!("#!/bin/sh\n{script}\n")),
        data_disk: true,
    }
}

/// Waits for something that takes its time.
pub(crate) fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "never came to be: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Every line, of all that this host can list, in which one of the words occurs: interfaces, mounts, control groups,
/// processes, firewall rules. Found without the provider's help.
pub(crate) fn traces(words: &[String]) -> Vec<String> {
    let mut lines: Vec<(&str, String)> = Vec::new();
    for (what, command) in [
        (
            "interface",
            "ip -details -oneline link show; ip -oneline address show; ip route show",
        ),
        ("mount", "cat /proc/self/mountinfo"),
        ("cgroup", "find /sys/fs/cgroup -type d"),
        ("firewall", "iptables-save 2>/dev/null"),
        ("file", "ls -a /var/tmp /run /var/lib/kprov 2>/dev/null"),
    ] {
        let output = Command::new("/bin/sh").args(["-c", command]).output().unwrap();
        lines.extend(
            String::from_utf8_lossy(&output.stdout)
                .lines()
                .map(|l| (what, l.trim().to_owned())),
        );
    }
    for entry in fs::read_dir("/proc").unwrap() {
        let path = entry.unwrap().path();
        let read = |file: &str| String::from_utf8_lossy(&fs::read(path.join(file)).unwrap_or_default()).into_owned();
        // A zombie has ended; only its parent is late.
        if !path.ends_with(std::process::id().to_string()) && !read("stat").contains(") Z ") {
            let line = format!("{} {} {}", path.display(), read("cmdline"), read("cgroup"));
            lines.push(("process", line.replace(['\0', '\n'], " ")));
        }
    }
    lines.retain(|(_, line)| words.iter().any(|w| line.contains(w.as_str())));
    lines
        .into_iter()
        .map(|(what, line)| format!("{what}: {line}"))
        .collect()
}
