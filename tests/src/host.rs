//! What is on this host: listed before and after, so that a test can show that nothing stays.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};

/// Everything that a cluster could leave behind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Traces(BTreeSet<String>);

impl Traces {
    /// Lists interfaces, mounts, control groups, processes, firewall rules, routes and kprov's own directories.
    pub fn list() -> Self {
        let mut all = BTreeSet::new();
        for entry in fs::read_dir("/sys/class/net").into_iter().flatten().flatten() {
            all.insert(format!("interface {}", entry.file_name().to_string_lossy()));
        }
        for line in fs::read_to_string("/proc/self/mountinfo").unwrap_or_default().lines() {
            if let Some(point) = line.split(' ').nth(4) {
                all.insert(format!("mount {point}"));
            }
        }
        groups(Path::new("/sys/fs/cgroup"), 0, &mut all);
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Ok(line) = fs::read(entry.path().join("cmdline")) else {
                continue;
            };
            // A zombie has ended; the host's init collects it in its own time.
            if line.is_empty() {
                continue;
            }
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            // Whatever else runs on the host comes and goes; these are what clusters consist of.
            let program = line
                .split(' ')
                .next()
                .and_then(|p| p.rsplit('/').next())
                .unwrap_or_default();
            let ours = ["kprov-node", "kube", "etcd", "containerd", "pause", "runc", "coredns"];
            let group = fs::read_to_string(entry.path().join("cgroup")).unwrap_or_default();
            if program == "kprov" || ours.iter().any(|o| program.starts_with(o)) || group.contains("/kprov/") {
                let pid = entry.file_name();
                if pid.to_string_lossy().bytes().all(|b| b.is_ascii_digit()) && !own_or_test(&pid.to_string_lossy()) {
                    all.insert(format!("process {} {line}", pid.to_string_lossy()));
                }
            }
        }
        for dir in [
            "/var/lib/kprov",
            "/var/lib/kprov/local",
            "/run/kprov",
            "/run/netns",
            "/etc/cni/net.d",
        ] {
            for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
                all.insert(format!("file {}", entry.path().display()));
            }
        }
        for (program, args) in [
            ("iptables-save", &[][..]),
            ("ip", &["route", "show", "table", "all"][..]),
        ] {
            if let Ok(out) = Command::new(program).args(args).output() {
                for line in String::from_utf8_lossy(&out.stdout)
                    .lines()
                    // Of a firewall its rules: the tables are there once somebody has looked into them.
                    .filter(|l| program != "iptables-save" || l.starts_with('-'))
                {
                    all.insert(format!("{program} {line}"));
                }
            }
        }
        Self(all)
    }

    /// What is here and was not in `before`.
    fn new_since(&self, before: &Self) -> Vec<String> {
        self.0.difference(&before.0).cloned().collect()
    }

    /// Waits until nothing is here that was not in `before`, or names what is.
    pub fn nothing_left(before: &Self) -> Result<()> {
        // Containers' last processes may take a moment to go.
        crate::wait_for("nothing left", Duration::from_secs(10), || {
            let new = Self::list().new_since(before);
            ensure!(new.is_empty(), "left behind: {new:#?}");
            Ok(())
        })
    }

    /// What was in `before` and isn't here: someone else's things that were taken away.
    pub fn gone_since(&self, before: &Self) -> Vec<String> {
        before
            .0
            .difference(&self.0)
            .filter(|t| !t.starts_with("process"))
            .cloned()
            .collect()
    }
}

/// Whether a process is this one or its parent (the test runner, whose arguments may name anything).
fn own_or_test(pid: &str) -> bool {
    let me = std::process::id().to_string();
    let parent = std::os::unix::process::parent_id().to_string();
    pid == me || pid == parent
}

fn groups(dir: &Path, depth: u32, all: &mut BTreeSet<String>) {
    if depth > 6 {
        return;
    }
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            all.insert(format!("cgroup {}", entry.path().display()));
            groups(&entry.path(), depth + 1, all);
        }
    }
}
