//! Control groups: one of each machine's own in every hierarchy, so that all its processes are found and ended, and so
//! that its cgroup namespace has a root to begin at.
//!
//! Both kernels' versions are covered, and the mixed set-up (version 1 with an empty version 2 beside it). See
//! `cgroups(7)` and the kernel's `Documentation/admin-guide/cgroup-v2.rst`.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::thread;
use std::time::{Duration, Instant};

use camino::{Utf8Path, Utf8PathBuf};
use kprov_types::ClusterName;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::error::LocalError;
use crate::naming;

/// Where hierarchies are mounted by convention.
pub(crate) const ROOT: &str = "/sys/fs/cgroup";

/// How long killed processes may take to end.
const KILL_PATIENCE: Duration = Duration::from_secs(10);

/// What a hierarchy is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Version 1, with the mount options that name its controllers.
    V1(String),
    /// Version 2.
    V2,
}

/// A hierarchy as it is mounted on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hierarchy {
    pub(crate) mount_point: Utf8PathBuf,
    pub(crate) kind: Kind,
}

impl Hierarchy {
    /// All hierarchies of this host.
    pub(crate) fn all() -> Result<Vec<Self>, LocalError> {
        let path = "/proc/thread-self/mountinfo";
        Ok(parse(&fs::read_to_string(path).map_err(LocalError::io("read", path))?))
    }

    /// The path below [`ROOT`]: empty for a version 2 hierarchy alone.
    pub(crate) fn name(&self) -> &Utf8Path {
        self.mount_point.strip_prefix(ROOT).unwrap_or(Utf8Path::new(""))
    }

    fn group(&self, path: &Utf8Path) -> Utf8PathBuf {
        self.mount_point.join(path)
    }
}

/// The hierarchies in `/proc/<pid>/mountinfo` (`proc_pid_mountinfo(5)`) that are mounted below [`ROOT`].
fn parse(mountinfo: &str) -> Vec<Hierarchy> {
    let mut found: Vec<Hierarchy> = Vec::new();
    for line in mountinfo.lines() {
        let Some((before, after)) = line.split_once(" - ") else {
            continue;
        };
        let Some(mount_point) = before.split(' ').nth(4) else {
            continue;
        };
        let mut after = after.split(' ');
        let kind = match (after.next(), after.nth(1)) {
            (Some("cgroup2"), _) => Kind::V2,
            (Some("cgroup"), Some(options)) => Kind::V1(controllers(options)),
            _ => continue,
        };
        if Utf8Path::new(mount_point).starts_with(ROOT) {
            // A later mount hides an earlier one at the same place.
            found.retain(|h| h.mount_point != mount_point);
            found.push(Hierarchy {
                mount_point: mount_point.into(),
                kind,
            });
        }
    }
    found
}

/// The options that mount the same version 1 hierarchy again: its controllers, or its name.
fn controllers(options: &str) -> String {
    let passed_over = ["rw", "ro", "xattr", "clone_children", "noprefix", "cpuset_v2_mode"];
    let kept: Vec<&str> = options
        .split(',')
        .filter(|o| !passed_over.contains(o) && !o.starts_with("release_agent="))
        .collect();
    if kept.iter().all(|o| o.starts_with("name=")) {
        format!("none,{}", kept.join(","))
    } else {
        kept.join(",")
    }
}

/// A control group of kprov's, in all hierarchies at once.
#[derive(Clone, Debug)]
pub(crate) struct Group {
    hierarchies: Vec<Hierarchy>,
    /// Relative to each hierarchy's mount point.
    path: Utf8PathBuf,
}

impl Group {
    /// The group of a whole cluster.
    pub(crate) fn cluster(cluster: &ClusterName) -> Result<Self, LocalError> {
        let path = Utf8Path::new(naming::CGROUP).join(cluster.as_str());
        Ok(Self {
            hierarchies: Hierarchy::all()?,
            path,
        })
    }

    /// A group in the cluster's: a machine's, or the balancer's.
    pub(crate) fn member(cluster: &ClusterName, name: &str) -> Result<Self, LocalError> {
        let Self { hierarchies, path } = Self::cluster(cluster)?;
        Ok(Self {
            hierarchies,
            path: path.join(name),
        })
    }

    /// Makes the group in every hierarchy; done already is success.
    pub(crate) fn create(&self) -> Result<(), LocalError> {
        for hierarchy in &self.hierarchies {
            let make = || {
                let mut below = hierarchy.mount_point.clone();
                for part in self.path.components() {
                    let parent = below.clone();
                    below.push(part);
                    match fs::create_dir(&below) {
                        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
                        _ => prepare(&hierarchy.kind, &parent, &below)?,
                    }
                }
                Ok(())
            };
            // Another cluster's removal may take the group above away between two steps.
            let mut result = make();
            for _ in 0..10 {
                match result {
                    Err(e) if e.kind() == io::ErrorKind::NotFound => result = make(),
                    other => {
                        result = other;
                        break;
                    }
                }
            }
            result.map_err(LocalError::io("make the control group", hierarchy.group(&self.path)))?;
        }
        Ok(())
    }

    /// Moves this process into the group, in every hierarchy.
    pub(crate) fn join(&self) -> Result<(), LocalError> {
        for hierarchy in &self.hierarchies {
            let procs = hierarchy.group(&self.path).join("cgroup.procs");
            // `0` stands for the writer, whatever process namespace it is in.
            fs::write(&procs, "0").map_err(LocalError::io("join the control group", procs))?;
        }
        Ok(())
    }

    /// The processes in the group and below, in any hierarchy.
    pub(crate) fn processes(&self) -> Result<BTreeSet<i32>, LocalError> {
        let mut pids = BTreeSet::new();
        for group in self.directories()? {
            let procs = group.join("cgroup.procs");
            match fs::read_to_string(&procs) {
                Ok(text) => pids.extend(
                    text.lines()
                        .filter_map(|l| l.parse::<i32>().ok())
                        .filter(|pid| *pid > 0),
                ),
                Err(e) if is_gone(&e) => {}
                Err(e) => return Err(LocalError::io("read", procs)(e)),
            }
        }
        Ok(pids)
    }

    /// Kills every process in the group and below, and waits until all have ended.
    pub(crate) fn kill(&self) -> Result<(), LocalError> {
        let deadline = Instant::now() + KILL_PATIENCE;
        loop {
            let pids = self.processes()?;
            if pids.is_empty() {
                return Ok(());
            }
            if Instant::now() > deadline {
                let pids: Vec<_> = pids.iter().map(ToString::to_string).collect();
                return Err(LocalError::StillRunning {
                    what: self.path.to_string(),
                    pids: pids.join(", "),
                });
            }
            for pid in pids {
                // One that has ended meanwhile is what is wanted.
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Removes the group with everything below, deepest first; done already is success. Nothing may run in it.
    pub(crate) fn remove(&self) -> Result<(), LocalError> {
        let deadline = Instant::now() + KILL_PATIENCE;
        for group in self.directories()?.iter().rev() {
            loop {
                match fs::remove_dir(group) {
                    Ok(()) => break,
                    Err(e) if is_gone(&e) => break,
                    // A process that has just ended is still on its way out.
                    Err(e) if e.kind() == io::ErrorKind::ResourceBusy && Instant::now() < deadline => {
                        thread::sleep(Duration::from_millis(5));
                    }
                    Err(e) => return Err(LocalError::io("remove the control group", group)(e)),
                }
            }
        }
        Ok(())
    }

    /// Removes the groups above that nothing is in any more: a cluster's, and kprov's own.
    pub(crate) fn remove_empty_parents(&self) -> Result<(), LocalError> {
        for hierarchy in &self.hierarchies {
            for parent in self.path.ancestors().skip(1).filter(|p| !p.as_str().is_empty()) {
                let parent = hierarchy.group(parent);
                match fs::remove_dir(&parent) {
                    Ok(()) => {}
                    Err(e) if is_gone(&e) => {}
                    Err(e) if e.kind() == io::ErrorKind::ResourceBusy => break,
                    Err(e) => return Err(LocalError::io("remove the control group", parent)(e)),
                }
            }
        }
        Ok(())
    }

    /// The group's directories and all below, each before what is in it.
    pub(crate) fn directories(&self) -> Result<Vec<Utf8PathBuf>, LocalError> {
        let mut all: Vec<Utf8PathBuf> = Vec::new();
        for hierarchy in &self.hierarchies {
            let mut waiting = vec![hierarchy.group(&self.path)];
            while let Some(dir) = waiting.pop() {
                let entries = match dir.read_dir_utf8() {
                    Ok(entries) => entries,
                    Err(e) if is_gone(&e) => continue,
                    Err(e) => return Err(LocalError::io("list", dir)(e)),
                };
                for entry in entries {
                    match entry.and_then(|e| Ok((e.file_type()?.is_dir(), e.into_path()))) {
                        Ok((true, path)) => waiting.push(path),
                        Ok(_) => {}
                        Err(e) if is_gone(&e) => {}
                        Err(e) => return Err(LocalError::io("list", dir)(e)),
                    }
                }
                all.push(dir);
            }
        }
        Ok(all)
    }
}

fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(nix::libc::ENODEV)
}

/// Makes a new group fit for use.
fn prepare(kind: &Kind, parent: &Utf8Path, group: &Utf8Path) -> io::Result<()> {
    match kind {
        // A version 1 cpuset begins empty, and no process can enter it then.
        Kind::V1(options) if options.split(',').any(|o| o == "cpuset") => {
            for file in ["cpuset.cpus", "cpuset.mems"] {
                if fs::read_to_string(group.join(file))?.trim().is_empty() {
                    fs::write(group.join(file), fs::read_to_string(parent.join(file))?)?;
                }
            }
            Ok(())
        }
        Kind::V1(_) => Ok(()),
        Kind::V2 => {
            enable_controllers(parent);
            Ok(())
        }
    }
}

/// Hands all controllers of a version 2 group down to those in it, one by one: what one of them refuses (real-time
/// processes, threads) doesn't stop the others. Whether enough is there is for those who use them to find.
pub(crate) fn enable_controllers(group: &Utf8Path) {
    let list = |file: &str| fs::read_to_string(group.join(file)).unwrap_or_default();
    let enabled = list("cgroup.subtree_control");
    for controller in list("cgroup.controllers").split_whitespace() {
        if !enabled.split_whitespace().any(|c| c == controller) {
            let _ = fs::write(group.join("cgroup.subtree_control"), format!("+{controller}"));
        }
    }
}

/// Whether a line of `/proc/<pid>/cgroup` is in a cluster's group.
pub(crate) fn line_is_of(line: &str, cluster: &ClusterName) -> bool {
    let mut parts = line.splitn(3, ':').nth(2).unwrap_or_default().split('/');
    parts.any(|p| p == naming::CGROUP) && parts.next() == Some(cluster.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_both_versions() {
        let text = "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n\
                    32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct\n\
                    40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,release_agent=/x/y,name=systemd\n\
                    41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n\
                    50 31 0:38 / /elsewhere rw,relatime - cgroup2 cgroup2 rw\n";
        let found = parse(text);
        let brief: Vec<_> = found.iter().map(|h| (h.name().as_str(), h.kind.clone())).collect();
        assert_eq!(
            brief,
            [
                ("cpu,cpuacct", Kind::V1("cpu,cpuacct".into())),
                ("systemd", Kind::V1("none,name=systemd".into())),
                ("unified", Kind::V2),
            ]
        );
        let alone = parse("30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n");
        assert_eq!((alone[0].name().as_str(), &alone[0].kind), ("", &Kind::V2));
    }

    #[test]
    fn a_cluster_owns_only_its_own_groups() {
        let demo = ClusterName::new("demo").unwrap();
        for ours in [
            "4:memory:/kprov/demo",
            "0::/kprov/demo/demo-cp-0/kubepods",
            "0::/outer/kprov/demo/_balancer",
        ] {
            assert!(line_is_of(ours, &demo), "{ours}");
        }
        for other in [
            "0::/",
            "0::/kprov/demo-2/x",
            "0::/kprov",
            "0::/demo",
            "0::/kprov/other/kprov/demo",
            "",
        ] {
            assert!(!line_is_of(other, &demo), "{other}");
        }
    }
}
