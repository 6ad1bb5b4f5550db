//! A cloud emulator's machines, made real.
//!
//! An emulator answers a cloud's API, but its instances are entries in a table. A [`Room`] watches such a table ([`Emulator`])
//! and makes it true on this host: each instance a machine of the local provider, at the instance's own private address, that
//! runs its user data by Debian's cloud-init; each volume a block device, inside the machine it's attached to; each load
//! balancer a listener that forwards to the targets that pass its health checks. What goes from the table is removed.

mod aws;
mod azure;
mod balancer;
mod boot;
mod room;
pub mod scenario;
mod volumes;

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use anyhow::Result;

pub use aws::{Aws, REGION};
pub use azure::Azure;
pub use room::Room;
pub use scenario::Cloud;

/// A table of instances, volumes and load balancers.
pub trait Emulator: Send + 'static {
    /// All that is there now. An error leaves everything as it is until the next look.
    fn look(&mut self) -> Result<Picture>;
}

/// What an emulator has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Picture {
    /// Instances that exist, running or stopped. One that is terminated is not among them.
    pub instances: Vec<Instance>,
    /// Volumes other than root disks, attached or not.
    pub volumes: Vec<Volume>,
    /// Load balancers.
    pub balancers: Vec<Balancer>,
}

/// An instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instance {
    /// Its id: a DNS label.
    pub id: String,
    /// The name the cloud tells it.
    pub hostname: String,
    /// Its private address.
    pub address: Ipv4Addr,
    /// Whether it's switched on.
    pub running: bool,
    /// Its user data, as the cloud hands it out.
    pub user_data: Vec<u8>,
    /// What its metadata service (that of AWS, version 2) tells below `latest/meta-data/`; none where empty.
    pub metadata: BTreeMap<String, String>,
}

/// A volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// Its id: a file name.
    pub id: String,
    /// Its size in GiB.
    pub size_gib: u64,
    /// The instance that it's attached to, and where it appears inside.
    pub attached: Option<(String, Vec<String>)>,
}

/// A load balancer: one address, forwarding by port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Balancer {
    /// Its id.
    pub id: String,
    /// Its address inside the network, where the emulator gave it one; else it's the room's to give ([`Room::balancer_address`]).
    pub address: Option<Ipv4Addr>,
    /// What it listens on.
    pub listeners: Vec<Listener>,
}

/// One port of a load balancer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listener {
    /// The port.
    pub port: u16,
    /// Where connections go.
    pub targets: Vec<SocketAddrV4>,
    /// How targets are checked.
    pub health: HealthCheck,
    /// Whether connections go to any target while none is healthy, as a network load balancer of AWS does.
    pub fails_open: bool,
}

/// How a load balancer finds out that a target is healthy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HealthCheck {
    /// What counts as an answer.
    pub probe: Probe,
    /// The port that is asked; the target's own where `None`.
    pub port: Option<u16>,
    /// How often each target is asked.
    pub interval: Duration,
    /// How long an answer may take.
    pub timeout: Duration,
    /// Answers in a row that make a target healthy.
    pub healthy: u32,
    /// Failures in a row that end that.
    pub unhealthy: u32,
}

/// A health check's question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Probe {
    /// It accepts a connection.
    Tcp,
    /// It answers a request with a success; certificates aren't checked, as clouds don't.
    Http {
        /// Over TLS.
        tls: bool,
        /// The path, from `/` on.
        path: String,
    },
}
