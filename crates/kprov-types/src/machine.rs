//! What providers are asked for and what they report: networks, disks, machines. Nothing here knows of Kubernetes.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};

use ipnet::Ipv4Net;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::names::MachineName;

/// What a machine is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Runs etcd and the control plane.
    ControlPlane,
    /// Runs workloads.
    Worker,
}

impl Role {
    /// The role as it stands in machine names, tags and labels.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::ControlPlane => "control-plane",
            Self::Worker => "worker",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The network a cluster wants.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkSpec {
    /// The machines' address range; `None` lets the provider choose a free one (and then keep it).
    pub cidr: Option<Ipv4Net>,
    /// The port of the API endpoint.
    pub api_port: u16,
}

/// A network as observed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// The machines' address range.
    pub cidr: Ipv4Net,
    /// The one stable name or address of the API, load-balanced over the control-plane machines.
    pub endpoint: Endpoint,
    /// The address under which machines reach the program that called the provider, where that's known.
    pub host_address: Option<Ipv4Addr>,
    /// Whether everything that belongs to it (bridge, routes, load balancer, ...) is there and working.
    pub complete: bool,
}

/// Host and port of an API endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// DNS name or address.
    pub host: String,
    /// TCP port.
    pub port: u16,
}

impl Endpoint {
    /// As `https://host:port`.
    pub fn url(&self) -> String {
        if self.host.contains(':') {
            format!("https://[{}]:{}", self.host, self.port)
        } else {
            format!("https://{}:{}", self.host, self.port)
        }
    }
}

/// A data disk that outlives the machine it is attached to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSpec {
    /// The machine it belongs to; one data disk a machine.
    pub machine: MachineName,
    /// Size in GiB, at least.
    pub size_gib: u32,
}

/// A data disk as observed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// The machine it belongs to.
    pub machine: MachineName,
    /// The provider's own id.
    pub id: String,
    /// Size in GiB, where the provider enforces one.
    pub size_gib: Option<u32>,
    /// Where its machine finds it.
    pub volume: DataVolume,
}

/// Where a machine finds its data disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum DataVolume {
    /// Mounted already, at this path.
    Directory(String),
    /// A block device that the machine formats (only when empty) and mounts itself: the first of these paths to appear, as a
    /// cloud's disks are called differently on different kinds of machine.
    Device(Vec<String>),
}

/// A machine that is wanted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineSpec {
    /// Its name, and its host name.
    pub name: MachineName,
    /// Its role.
    pub role: Role,
    /// Failure domain, in the provider's terms; `None` lets the provider spread.
    pub zone: Option<String>,
    /// Size, in the provider's terms (instance type); `None` is the provider's default.
    pub size: Option<String>,
    /// Image, in the provider's terms; `None` is the provider's default.
    pub image: Option<String>,
    /// What the machine runs at first boot: a script that starts with `#!`, as cloud-init's user data. It can be run
    /// again at every boot without harm.
    pub first_boot: FirstBoot,
    /// Whether it has a data disk (made by `ensure_disks` before).
    pub data_disk: bool,
}

/// First-boot data. It may identify the machine, so it's never printed.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FirstBoot(pub String);

impl fmt::Debug for FirstBoot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FirstBoot({} bytes)", self.0.len())
    }
}

/// A machine as observed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Its name.
    pub name: MachineName,
    /// Its role.
    pub role: Role,
    /// The provider's own id.
    pub id: String,
    /// Its address inside the cluster's network, once it has one.
    pub address: Option<IpAddr>,
    /// The address under which it's reached from outside, where that is another one.
    pub external_address: Option<IpAddr>,
    /// Failure domain, where it has one.
    pub zone: Option<String>,
    /// What state it's in.
    pub state: MachineState,
}

/// The states of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum MachineState {
    /// Being made or booting.
    Pending,
    /// Running, as far as the provider knows.
    Running,
    /// Exists, but doesn't run (a local machine after the host's restart, a stopped instance).
    Stopped,
    /// Being removed.
    Terminating,
    /// Will never run; in words.
    Failed(String),
    /// Can't be asked, in words (a host that doesn't answer): whether it exists is known as little as whether it runs.
    Unknown(String),
}

/// Everything a provider finds of one cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Observed {
    /// Its network, if there is one.
    pub network: Option<Network>,
    /// Its data disks.
    pub disks: Vec<Disk>,
    /// Its machines.
    pub machines: Vec<Machine>,
}

/// A resource that is still there after `down`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Leftover {
    /// What kind of thing, in the provider's terms (`veth`, `cgroup`, `volume`, ...).
    pub kind: String,
    /// Its name or id.
    pub name: String,
    /// Why it's still there, where known.
    pub why: Option<String>,
}
