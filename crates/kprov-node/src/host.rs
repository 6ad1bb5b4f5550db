//! What the host offers and lacks. Findings are sentences for people; what the other parts must know is in [`Host`].

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs, UdpSocket};

use kprov_bootstrap::kubelet::CgroupDriver;
use kprov_types::machine::Endpoint;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// The number of inotify instances below which several machines on one host run out of them.
const INOTIFY_INSTANCES: u64 = 1024;
/// The number of open files below which a busy machine runs out of them.
const OPEN_FILES: u64 = 65_536;
/// `CAP_SYS_RESOURCE`, by its number in capabilities(7).
const CAP_SYS_RESOURCE: u32 = 24;

/// What kubelet wants of the kernel (`protectKernelDefaults`).
const KERNEL_DEFAULTS: [(&str, &str); 4] = [
    ("/proc/sys/vm/overcommit_memory", "1"),
    ("/proc/sys/vm/panic_on_oom", "0"),
    ("/proc/sys/kernel/panic", "10"),
    ("/proc/sys/kernel/panic_on_oops", "1"),
];
/// systemd-resolved's list of real name servers: the stub in `/etc/resolv.conf` is on loopback, which in a pod is another.
const RESOLVED: &str = "/run/systemd/resolve/resolv.conf";

/// What was found out about the host.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is one independent fact about the host"
)]
pub struct Host {
    /// Runs as root.
    pub root: bool,
    /// May lower its own `oom_score_adj` (`CAP_SYS_RESOURCE`).
    pub sys_resource: bool,
    /// The cgroup version in use.
    pub cgroup: CgroupVersion,
    /// systemd is process 1.
    pub systemd: bool,
    /// Swap is on.
    pub swap: bool,
    /// `fs.inotify.max_user_instances`.
    pub inotify_instances: u64,
    /// The most files a process may have open.
    pub open_files: u64,
    /// The kernel's settings are those that kubelet wants, so that it can insist on them.
    pub kernel_defaults: bool,
    /// kube-proxy can set connection tracking's limits.
    pub conntrack_writable: bool,
    /// The resolver configuration for pods, where it is not `/etc/resolv.conf`.
    pub resolv_conf: Option<String>,
}

/// The version of the cgroup hierarchy that controllers are in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CgroupVersion {
    /// One hierarchy a controller.
    V1,
    /// The unified hierarchy.
    V2,
}

impl Host {
    /// Looks at the host kprov-node runs on. Changes nothing.
    pub fn detect() -> Self {
        Self {
            root: nix::unistd::geteuid().is_root(),
            sys_resource: has_capability(&read("/proc/self/status"), CAP_SYS_RESOURCE),
            cgroup: if fs::exists("/sys/fs/cgroup/cgroup.controllers").unwrap_or(false) {
                CgroupVersion::V2
            } else {
                CgroupVersion::V1
            },
            systemd: read("/proc/1/comm").trim() == "systemd",
            swap: read("/proc/swaps").lines().count() > 1,
            inotify_instances: read("/proc/sys/fs/inotify/max_user_instances")
                .trim()
                .parse()
                .unwrap_or(0),
            open_files: getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(_, hard)| hard),
            conntrack_writable: fs::File::options()
                .write(true)
                .open("/proc/sys/net/netfilter/nf_conntrack_max")
                .is_ok(),
            kernel_defaults: KERNEL_DEFAULTS.iter().all(|(file, value)| read(file).trim() == *value),
            resolv_conf: fs::exists(RESOLVED).unwrap_or(false).then(|| RESOLVED.to_owned()),
        }
    }

    /// The cgroup driver that fits.
    pub const fn cgroup_driver(&self) -> CgroupDriver {
        match (self.systemd, self.cgroup) {
            (true, CgroupVersion::V2) => CgroupDriver::Systemd,
            _ => CgroupDriver::Cgroupfs,
        }
    }

    /// What the host lacks, and what that means, each a sentence. What its kernel lacks for pods and their network takes
    /// longer to find out: [`crate::podnet::missing_network_features`].
    pub fn findings(&self) -> Vec<String> {
        let mut all = Vec::new();
        if !self.root {
            all.push("kprov-node does not run as root: containers cannot be started".to_owned());
        }
        if !self.sys_resource {
            all.push(
                "CAP_SYS_RESOURCE is missing: no process can be protected from the OOM killer; containers' \
                 `oom_score_adj` is restricted to what is allowed"
                    .into(),
            );
        }
        if self.cgroup == CgroupVersion::V1 {
            all.push("the host uses cgroup v1, which kubelet supports in maintenance mode only".into());
        }
        if self.swap {
            all.push("swap is on: kubelet runs, but memory limits are not exact".into());
        }
        if self.inotify_instances < INOTIFY_INSTANCES {
            all.push(format!(
                "`fs.inotify.max_user_instances` is {}: below {INOTIFY_INSTANCES} watches of files may fail",
                self.inotify_instances
            ));
        }
        if self.open_files < OPEN_FILES {
            all.push(format!(
                "a process may open {} files at most; {OPEN_FILES} or more are usual",
                self.open_files
            ));
        }
        if !self.conntrack_writable {
            all.push("connection tracking's limits cannot be set here; kube-proxy leaves them as they are".into());
        }
        all
    }

    /// Raises the limits that can be raised; what cannot is in the findings already.
    pub fn raise_limits(&mut self) {
        let file = "/proc/sys/fs/inotify/max_user_instances";
        if self.inotify_instances < INOTIFY_INSTANCES && fs::write(file, INOTIFY_INSTANCES.to_string()).is_ok() {
            self.inotify_instances = INOTIFY_INSTANCES;
        }
        if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
            && soft < hard
            && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
        {
            tracing::warn!(%error, "cannot raise the number of open files");
        }
    }
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// Whether the effective set in a `/proc/pid/status` has a capability.
fn has_capability(status: &str, number: u32) -> bool {
    status
        .lines()
        .find_map(|l| l.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .is_some_and(|set| (set >> number) & 1 == 1)
}

/// This machine's own address: the one it sends from on its default route, or on the route to `endpoint` where there is
/// no default route; never `virtual_address`, which it may have for the moment. No packet is sent to find out.
pub fn own_address(endpoint: &Endpoint, virtual_address: Option<Ipv4Addr>) -> Option<Ipv4Addr> {
    let own = |target| source_towards(target).filter(|source| Some(*source) != virtual_address);
    default_gateway(&read("/proc/net/route")).and_then(own).or_else(|| {
        let addresses = (endpoint.host.as_str(), endpoint.port).to_socket_addrs().ok()?;
        let addresses = addresses.filter_map(|a| match a.ip() {
            IpAddr::V4(v4) => Some(u32::from(v4)),
            IpAddr::V6(_) => None,
        });
        // Packets to a virtual address that this machine has are sent from that; those to its neighbours aren't.
        addresses
            .flat_map(|address| [address, address ^ 1, address ^ 2].map(Ipv4Addr::from))
            .find_map(own)
    })
}

/// The address that packets to `target` are sent from.
fn source_towards(target: Ipv4Addr) -> Option<Ipv4Addr> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
    // Connecting a datagram socket only looks up the route (connect(2)); any port will do.
    socket.connect((target, 9)).ok()?;
    match socket.local_addr().ok()? {
        SocketAddr::V4(local) if !local.ip().is_unspecified() => Some(*local.ip()),
        _ => None,
    }
}

/// The gateway of the default route with the lowest metric in a `/proc/net/route`.
fn default_gateway(table: &str) -> Option<Ipv4Addr> {
    let routes = table.lines().skip(1).filter_map(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        let (gateway, metric) = (fields.get(2)?, fields.get(6)?.parse::<u32>().ok()?);
        let default = fields.get(1) == Some(&"00000000") && fields.get(7) == Some(&"00000000");
        // Addresses are printed as numbers of the host's byte order.
        let gateway = Ipv4Addr::from(u32::from_str_radix(gateway, 16).ok()?.to_ne_bytes());
        (default && !gateway.is_unspecified()).then_some((metric, gateway))
    });
    routes.min().map(|(_, gateway)| gateway)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Host {
        Host {
            root: true,
            sys_resource: true,
            cgroup: CgroupVersion::V2,
            systemd: true,
            swap: false,
            inotify_instances: 8192,
            open_files: 1 << 20,
            conntrack_writable: true,
            kernel_defaults: true,
            resolv_conf: None,
        }
    }

    #[test]
    fn a_good_host_has_no_findings() {
        assert_eq!(good().findings(), Vec::<String>::new());
        assert_eq!(good().cgroup_driver(), CgroupDriver::Systemd);
    }

    #[test]
    fn each_lack_is_named() {
        type Edit = fn(&mut Host);
        let cases: &[(Edit, &str)] = &[
            (|h| h.root = false, "root"),
            (|h| h.sys_resource = false, "CAP_SYS_RESOURCE"),
            (|h| h.cgroup = CgroupVersion::V1, "cgroup v1"),
            (|h| h.swap = true, "swap"),
            (|h| h.inotify_instances = 128, "is 128"),
            (|h| h.open_files = 20_000, "20000 files"),
            (|h| h.conntrack_writable = false, "tracking"),
        ];
        for (edit, word) in cases {
            let mut host = good();
            edit(&mut host);
            let findings = host.findings();
            assert!(
                findings.len() == 1 && findings[0].contains(word),
                "{word}: {findings:?}"
            );
        }
    }

    #[test]
    fn systemd_makes_cgroups_only_on_v2() {
        let driver = |systemd, cgroup| {
            Host {
                cgroup,
                systemd,
                ..good()
            }
            .cgroup_driver()
        };
        assert_eq!(driver(true, CgroupVersion::V1), CgroupDriver::Cgroupfs);
        assert_eq!(driver(false, CgroupVersion::V2), CgroupDriver::Cgroupfs);
    }

    #[test]
    fn capabilities_are_read_from_the_effective_set() {
        let status = "CapPrm:\t000001ffffffffff\nCapEff:\t000001fffeffffff\n";
        assert!(!has_capability(status, CAP_SYS_RESOURCE));
        assert!(has_capability(status, 21));
        assert!(!has_capability("", 0));
    }

    #[test]
    fn the_default_route_with_the_lowest_metric_counts() {
        let table = "Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT\n\
            eth1 00000000 0100A8C0 0003 0 0 200 00000000 0 0 0\n\
            eth0 00000000 0110A8C0 0003 0 0 100 00000000 0 0 0\n\
            eth0 0010A8C0 00000000 0001 0 0 0 00FFFFFF 0 0 0\n";
        assert_eq!(default_gateway(table), Some(Ipv4Addr::new(192, 168, 16, 1)));
        assert_eq!(default_gateway("Iface Destination\n"), None);
    }

    #[test]
    fn the_source_address_towards_loopback_is_loopback() {
        assert_eq!(source_towards(Ipv4Addr::new(127, 9, 9, 9)), Some(Ipv4Addr::LOCALHOST));
    }
}
