//! `kprov-node reset`: a machine that is to be a plain host again. Ends everything that kprov-node started, and removes
//! everything that it and what it started put here, but for etcd's data disk. Can be run again.
//!
//! What is removed is a list ([`plan`]), made from what is there and from what was there before kprov came: who set the
//! host up writes that down ([`BEFORE`]). Without it nothing counts as having been there.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::io::{self, Write};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use camino::{Utf8Path, Utf8PathBuf};
use kprov_bootstrap::paths as kubernetes;
use kprov_types::node::NODE_CONFIG_PATH;
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::podnet::TUNNEL_NAME;
use crate::supervise::{self, Places};
use crate::{kubelet, paths};

/// Paths that were there before kprov came, one a line; a directory that was empty ends in a slash.
pub const BEFORE: &str = "/etc/kprov/before/paths";
/// How long processes may take to end once they were killed.
const END_LIMIT: Duration = Duration::from_secs(15);
/// The bridge that pods are on.
const BRIDGE: &str = "cni0";
/// Names that chains of ours begin with: kprov's own, kube-proxy's and kubelet's, and the CNI plugins'.
const CHAINS: &[&str] = &["KPROV-", "KUBE-", "CNI-"];

/// Directories that go as a whole, unless they were there before.
const DIRECTORIES: &[&str] = &[
    kubernetes::KUBERNETES,
    kubernetes::KUBELET,
    paths::ETCD_DATA,
    "/var/lib/containerd",
    "/run/containerd",
    // The socket for plugins of containerd 2 (NRI).
    "/run/nri",
    "/etc/containerd",
    "/etc/containerd/certs.d",
    "/etc/cni/net.d",
    "/etc/cni",
    "/var/lib/cni",
    "/var/log/pods",
    "/var/log/containers",
    "/var/log/kubernetes",
    "/usr/libexec/kubernetes",
];

/// What is kprov's own below directories that may be others' too.
const OWN: &[&str] = &[
    paths::CONTAINERD_CONFIG,
    "/etc/cni/net.d/10-kprov.conflist",
    "/run/cni/kprov",
    paths::RUN,
    paths::LOGS,
    NODE_CONFIG_PATH,
];

/// What to remove, in this order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Removal {
    /// Mount points, the innermost first.
    pub mounts: Vec<String>,
    /// Files and directories.
    pub paths: Vec<Utf8PathBuf>,
    /// Directories that were here, and empty.
    pub emptied: Vec<Utf8PathBuf>,
    /// Directories that go if nothing is left in them.
    pub if_empty: Vec<Utf8PathBuf>,
}

/// What is to be removed, given the mount points there are and the text of [`BEFORE`]. Pure.
pub fn plan(mount_points: &[String], before: &str) -> Removal {
    let (empty, before): (BTreeSet<&str>, BTreeSet<&str>) = before.lines().partition(|path| path.ends_with('/'));
    let was_empty = |path: &str| empty.contains(format!("{path}/").as_str());
    let was_there = |path: &str| before.contains(path);
    let below = [
        kubernetes::KUBELET,
        "/var/lib/containerd",
        "/run/containerd",
        "/run/netns",
        "/var/run/netns",
    ];
    let own_namespaces = !was_there("/run/netns");
    let ours = |point: &&String| {
        let path = Utf8Path::new(point.as_str());
        // What is mounted at these places themselves is the host's own.
        let inside = below
            .iter()
            .any(|root| path.starts_with(root) && path != Utf8Path::new(root));
        let namespaces = own_namespaces && (path == "/run/netns" || path == "/var/run/netns");
        inside || namespaces || path == paths::DATA_MOUNT
    };
    let mounts = mount_points.iter().filter(ours).rev().cloned().collect();
    let mut removed: Vec<Utf8PathBuf> = OWN
        .iter()
        // The configuration that was there before is put back by who kept it.
        .filter(|path| !was_there(path) || **path == paths::CONTAINERD_CONFIG)
        .map(Utf8PathBuf::from)
        .collect();
    let whole = DIRECTORIES.iter().filter(|path| !was_there(path) && !was_empty(path));
    removed.extend(whole.map(Utf8PathBuf::from));
    let emptied = DIRECTORIES
        .iter()
        .filter(|path| was_empty(path))
        .map(Utf8PathBuf::from)
        .collect();
    let mut if_empty: Vec<Utf8PathBuf> = vec![paths::STATE.into(), "/run/cni".into(), "/etc/kprov".into()];
    if own_namespaces && !was_empty("/run/netns") {
        if_empty.push("/run/netns".into());
    }
    Removal {
        mounts,
        paths: removed,
        emptied,
        if_empty,
    }
}

/// Input of `iptables-restore --noflush` that removes our chains, and every rule that leads to one, from what `iptables-save`
/// printed; nothing where there is none. Pure.
pub fn filter_removal(saved: &str) -> Option<String> {
    let ours = |chain: &str| CHAINS.iter().any(|prefix| chain.starts_with(prefix));
    let mut script = String::new();
    let mut table = (String::new(), Vec::new(), Vec::new());
    for line in saved.lines() {
        if let Some(name) = line.strip_prefix('*') {
            table = (name.to_owned(), Vec::new(), Vec::new());
        } else if let Some(chain) = line.strip_prefix(':') {
            let chain = chain.split(' ').next().unwrap_or_default();
            if ours(chain) {
                table.1.push(chain.to_owned());
            }
        } else if let Some(rule) = line.strip_prefix("-A ") {
            let mut words = rule.split(' ');
            let from = words.next().unwrap_or_default();
            let mut pairs = rule.split(' ').zip(rule.split(' ').skip(1));
            let leads = pairs.any(|(flag, target)| matches!(flag, "-j" | "-g") && ours(target));
            if !ours(from) && leads {
                table.2.push(rule.to_owned());
            }
        } else if line == "COMMIT" {
            let (name, chains, rules) = &table;
            if !chains.is_empty() || !rules.is_empty() {
                let _ = writeln!(script, "*{name}");
                // Naming a chain empties it: then none refers to another any more.
                script.extend(chains.iter().map(|chain| format!(":{chain} - [0:0]\n")));
                script.extend(rules.iter().map(|rule| format!("-D {rule}\n")));
                script.extend(chains.iter().map(|chain| format!("-X {chain}\n")));
                script += "COMMIT\n";
            }
        }
    }
    (!script.is_empty()).then_some(script)
}

/// Whether a process is one of ours: run from a release, or in a pod's control group. Pure.
pub fn is_ours(exe: &str, groups: &str) -> bool {
    let in_pod = |line: &str| {
        let path = line.splitn(3, ':').nth(2).unwrap_or_default();
        path.split('/')
            .any(|part| part == "kubepods" || part.starts_with("kubepods.slice") || part.starts_with("kubepods-"))
    };
    exe.starts_with(&format!("{}/", paths::RELEASES)) || groups.lines().any(in_pod)
}

/// Does it all. Returns what could not be done, in words.
pub fn reset() -> anyhow::Result<Vec<String>> {
    if let Some(pid) = running() {
        anyhow::bail!("kprov-node runs here as process {pid}; stop it first");
    }
    let mut left = Vec::new();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let places = Places::default();
        supervise::stop_stale(&places, "kubelet").await;
        supervise::stop_stale(&places, "containerd").await;
    });
    left.extend(end_processes());
    remove_network();
    remove_filters();

    let points = mount_points()?;
    let before = fs::read_to_string(BEFORE).unwrap_or_default();
    let Removal {
        mounts,
        paths,
        emptied,
        if_empty,
    } = plan(&points, &before);
    for point in mounts {
        if let Err(error) = umount2(point.as_str(), MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)
            && error != nix::errno::Errno::EINVAL
        {
            left.push(format!("`{point}` is still mounted: {error}"));
        }
    }
    kubelet::sweep_control_groups(Utf8Path::new("/sys/fs/cgroup"));
    remove_namespaces(&mut left);
    for path in paths {
        remove(&path, &mut left);
    }
    for directory in emptied {
        for entry in directory.read_dir_utf8().into_iter().flatten().flatten() {
            remove(entry.path(), &mut left);
        }
    }
    remove_state(&mut left);
    for path in if_empty {
        // Refused while something is in it, which is then somebody else's or the data disk's.
        let _ = fs::remove_dir(path);
    }
    Ok(left)
}

/// Another kprov-node that runs the machine.
fn running() -> Option<i32> {
    processes().into_iter().find(|pid| {
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let mut words = command.split(|b| *b == 0);
        let program = words.next().unwrap_or_default();
        program.ends_with(b"kprov-node") && words.next() == Some(b"run")
    })
}

/// All processes but this one.
fn processes() -> Vec<i32> {
    let own = std::process::id().cast_signed();
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid| *pid != own).collect()
}

/// Kills what is ours until nothing of it is left.
fn end_processes() -> Vec<String> {
    let deadline = Instant::now() + END_LIMIT;
    loop {
        let ours: Vec<i32> = processes()
            .into_iter()
            .filter(|pid| {
                let exe = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
                let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
                is_ours(&exe.to_string_lossy(), &groups) && !ended(*pid)
            })
            .collect();
        if ours.is_empty() {
            return Vec::new();
        }
        if Instant::now() > deadline {
            return ours.iter().map(|pid| format!("process {pid} does not end")).collect();
        }
        for pid in ours {
            // It may end in between, which is what is wanted.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Whether a process has ended and only its parent is late.
fn ended(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with('Z'))
}

fn mount_points() -> io::Result<Vec<String>> {
    let text = fs::read_to_string("/proc/self/mountinfo")?;
    // Spaces and the like are escaped as three octal digits (proc(5)).
    let points = text.lines().filter_map(|line| line.split(' ').nth(4));
    Ok(points.map(|point| point.replace("\\040", " ")).collect())
}

/// Takes away the bridge with its ports, the tunnel, and our routes.
fn remove_network() {
    let ports = Command::new("ip")
        .args(["-o", "link", "show", "master", BRIDGE])
        .output();
    let ports = ports
        .map(|out| String::from_utf8_lossy(&out.stdout).into_owned())
        .unwrap_or_default();
    let ports = ports
        .lines()
        .filter_map(|line| line.split(": ").nth(1)?.split('@').next());
    for link in ports.chain([BRIDGE, TUNNEL_NAME]) {
        quietly("ip", &["link", "delete", link], None);
    }
    let protocol = crate::podnet::ROUTE_PROTOCOL.to_string();
    quietly("ip", &["route", "flush", "proto", &protocol], None);
}

/// Takes away packet filter rules. A program that isn't there has made none.
fn remove_filters() {
    for family in ["iptables", "ip6tables"] {
        let saved = Command::new(format!("{family}-save")).stderr(Stdio::null()).output();
        let saved = saved
            .map(|out| String::from_utf8_lossy(&out.stdout).into_owned())
            .unwrap_or_default();
        if let Some(script) = filter_removal(&saved) {
            quietly(&format!("{family}-restore"), &["-w", "--noflush"], Some(&script));
        }
    }
    for table in [["ip", "kprov"], ["ip", "kube-proxy"], ["ip6", "kube-proxy"]] {
        quietly("nft", &["delete", "table", table[0], table[1]], None);
    }
}

/// Network namespaces that CNI made.
fn remove_namespaces(left: &mut Vec<String>) {
    for entry in fs::read_dir("/run/netns").into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with("cni-")
            && let Some(path) = Utf8Path::from_path(&entry.path())
        {
            remove(path, left);
        }
    }
}

/// kprov's own state, but for the data disk's place.
fn remove_state(left: &mut Vec<String>) {
    for entry in Utf8Path::new(paths::STATE)
        .read_dir_utf8()
        .into_iter()
        .flatten()
        .flatten()
    {
        if entry.path() == paths::DATA_MOUNT {
            // The place of a disk that was mounted; a directory with data in it stays.
            let _ = fs::remove_dir(entry.path());
        } else {
            remove(entry.path(), left);
        }
    }
}

/// Removes a path with everything below; of a mount point, what is in it.
fn remove(path: &Utf8Path, left: &mut Vec<String>) {
    let removed = match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => match fs::remove_dir_all(path) {
            Err(e) if e.kind() == io::ErrorKind::ResourceBusy => Ok(()),
            other => other,
        },
        Ok(_) => fs::remove_file(path),
        Err(e) => Err(e),
    };
    match removed {
        Err(e) if !matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            left.push(format!("`{path}` can't be removed: {e}"));
        }
        _ => {}
    }
}

/// Runs a program whose failure means that there was nothing to do.
fn quietly(program: &str, arguments: &[&str], input: Option<&str>) {
    let child = Command::new(program)
        .args(arguments)
        .stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() })
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let Ok(mut child) = child else { return };
    if let (Some(mut stdin), Some(input)) = (child.stdin.take(), input) {
        let _ = Write::write_all(&mut stdin, input.as_bytes());
    }
    let _ = child.wait();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_processes_end() {
        let cases = [
            ("/var/lib/kprov/releases/v1.20.2-abc/bin/kubelet", "0::/\n", true),
            ("/var/lib/kprov/releases/v1.20.2-abc/bin/containerd (deleted)", "", true),
            ("/usr/local/bin/etcd", "4:memory:/kubepods/burstable/pod1/x\n", true),
            ("/pause", "0::/kubepods.slice/kubepods-besteffort.slice/x\n", true),
            ("/usr/bin/containerd", "0::/system.slice/containerd.service\n", false),
            ("/usr/sbin/sshd", "1:cpu:/user/kubepodsx\n", false),
            ("/var/lib/kprov/releases-of-others/x", "", false),
        ];
        for (exe, groups, expected) in cases {
            assert_eq!(is_ours(exe, groups), expected, "{exe} {groups}");
        }
    }

    #[test]
    fn filters_of_others_stay() {
        let saved = "\
# Generated by iptables-save
*nat
:PREROUTING ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:DOCKER - [0:0]
:KPROV-MASQ - [0:0]
:KUBE-SERVICES - [0:0]
-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A PREROUTING -j DOCKER
-A POSTROUTING -s 10.244.0.0/16 -m comment --comment \"kprov pod network\" -j KPROV-MASQ
-A POSTROUTING -s 10.0.0.0/8 -j MASQUERADE
-A KUBE-SERVICES -j RETURN
COMMIT
*filter
:INPUT ACCEPT [0:0]
-A INPUT -j ACCEPT
COMMIT
";
        let expected = "\
*nat
:KPROV-MASQ - [0:0]
:KUBE-SERVICES - [0:0]
-D PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-D POSTROUTING -s 10.244.0.0/16 -m comment --comment \"kprov pod network\" -j KPROV-MASQ
-X KPROV-MASQ
-X KUBE-SERVICES
COMMIT
";
        assert_eq!(filter_removal(saved).unwrap(), expected);
        assert_eq!(filter_removal("*nat\n:PREROUTING ACCEPT [0:0]\nCOMMIT\n"), None);
    }

    #[test]
    fn what_was_there_before_stays() {
        let points = [
            "/",
            "/var/lib/containerd",
            "/var/lib/kubelet/pods/a/volumes/x",
            "/var/lib/kubelet/pods/a/volumes/x/y",
            "/run/netns",
            "/run/netns/cni-1",
            "/home",
            "/var/lib/kprov/data",
        ]
        .map(str::to_owned);
        let nothing = plan(&points, "");
        assert_eq!(
            nothing.mounts,
            [
                "/var/lib/kprov/data",
                "/run/netns/cni-1",
                "/run/netns",
                "/var/lib/kubelet/pods/a/volumes/x/y",
                "/var/lib/kubelet/pods/a/volumes/x",
            ]
        );
        assert!(nothing.paths.iter().any(|p| p == "/etc/containerd"));
        let before = ["/etc/containerd", "/run/netns"];
        let some = plan(&points, &format!("{}\n/var/lib/cni/\n", before.join("\n")));
        assert!(!some.mounts.iter().any(|m| m == "/run/netns"));
        assert!(
            !some
                .paths
                .iter()
                .any(|p| before.contains(&p.as_str()) || p == "/var/lib/cni")
        );
        assert_eq!(some.emptied, ["/var/lib/cni"], "it stays, as empty as it was");
        assert!(
            some.paths.iter().any(|p| p == paths::CONTAINERD_CONFIG),
            "what is kprov's own in it goes"
        );
    }
}
