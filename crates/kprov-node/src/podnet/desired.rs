//! What this machine's part of the pod network should be. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use kprov_types::MachineName;

use super::cni::CniConfig;

/// The routing protocol number that marks kprov's routes (`ip route show proto 76`); unassigned in Linux's rtnetlink.h.
pub const ROUTE_PROTOCOL: u8 = 76;
/// The VXLAN device.
pub const TUNNEL_NAME: &str = "kprov.vxlan";
/// The VXLAN network identifier.
pub(super) const VNI: u32 = 1;
/// VXLAN's UDP port (RFC 7348 section 8.1).
pub(super) const VXLAN_PORT: u16 = 4789;
/// What VXLAN over IPv4 takes of each packet: outer Ethernet-less IPv4 (20), UDP (8), VXLAN (8), inner Ethernet (14).
const VXLAN_OVERHEAD: u32 = 50;

/// What matters of one Node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeView {
    /// Its name.
    pub name: MachineName,
    /// Its address of type `InternalIP`.
    pub internal_ip: Ipv4Addr,
    /// Its range of pod addresses (`spec.podCIDR`), once it has one.
    pub pod_cidr: Option<Ipv4Net>,
}

/// The interface that carries this machine's own address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uplink {
    /// Its index.
    pub index: u32,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// The subnets it is on. Machines in them are reached without a router.
    pub subnets: Vec<Ipv4Net>,
}

/// A hardware address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// The tunnel device's address on the machine with this address: locally administered, and known to every other
    /// machine without asking.
    pub fn of_machine(address: Ipv4Addr) -> Self {
        let [a, b, c, d] = address.octets();
        Self([0x0e, 0x6b, a, b, c, d])
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, byte) in self.0.iter().enumerate() {
            write!(f, "{}{byte:02x}", if i == 0 { "" } else { ":" })?;
        }
        Ok(())
    }
}

/// How a range of pod addresses is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Route {
    /// By the machine with this address, over the uplink.
    Direct(Ipv4Addr),
    /// By this address inside the tunnel.
    Tunnel(Ipv4Addr),
}

/// The VXLAN device and its entries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tunnel {
    /// This machine's address, which encapsulated packets come from.
    pub local: Ipv4Addr,
    /// The device's hardware address.
    pub mac: Mac,
    /// The device's own address, the first of this machine's pod range: what this machine's own processes speak from when
    /// they speak to pods behind the tunnel, so that answers come back through it.
    pub address: Ipv4Addr,
    /// The device's MTU in bytes.
    pub mtu: u32,
    /// Neighbours inside the tunnel: their device's address and hardware address.
    pub neighbours: BTreeMap<Ipv4Addr, Mac>,
    /// The machine behind each hardware address.
    pub forwarding: BTreeMap<Mac, Ipv4Addr>,
}

/// Which pod traffic leaves with this machine's address in place of the pod's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Masquerade {
    /// The cluster's pods.
    pub pods: Ipv4Net,
    /// Machines that see pods' own addresses: this one, and those that are reached without a router. A router on the way
    /// to the others would drop pods' addresses, and answers to them could not come back the same way.
    pub machines: BTreeSet<Ipv4Addr>,
}

/// This machine's part of the pod network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Desired {
    /// Routes to other machines' pods.
    pub routes: BTreeMap<Ipv4Net, Route>,
    /// The tunnel, where a machine has to be reached through one.
    pub tunnel: Option<Tunnel>,
    /// What CNI plugins are told, once this machine has its range.
    pub cni: Option<CniConfig>,
    /// What is masqueraded.
    pub masquerade: Masquerade,
}

/// What this machine's part of the pod network should be, given all Nodes (its own may be among them).
///
/// Ranges outside `pods`, or that overlap this machine's own, are left out: a wrong Node must not be able to draw other
/// traffic to itself. Of several Nodes with one range, the first by name has it.
pub fn desired(me: &NodeView, nodes: &[NodeView], uplink: &Uplink, pods: Ipv4Net) -> Desired {
    let own = me.pod_cidr;
    let mut others: Vec<_> = nodes
        .iter()
        .filter(|node| node.name != me.name && node.internal_ip != me.internal_ip)
        .collect();
    others.sort_unstable_by_key(|node| &node.name);
    let near = |node: &NodeView| uplink.subnets.iter().any(|subnet| subnet.contains(&node.internal_ip));

    let mut routes = BTreeMap::new();
    let mut neighbours = BTreeMap::new();
    let mut forwarding = BTreeMap::new();
    for node in &others {
        let Some(range) = node.pod_cidr.map(|range| range.trunc()) else {
            continue;
        };
        if !pods.contains(&range) || own.is_some_and(|own| overlap(own, range)) || routes.contains_key(&range) {
            continue;
        }
        if near(node) {
            routes.insert(range, Route::Direct(node.internal_ip));
        } else if own.is_some() {
            let mac = Mac::of_machine(node.internal_ip);
            routes.insert(range, Route::Tunnel(range.network()));
            neighbours.insert(range.network(), mac);
            forwarding.insert(mac, node.internal_ip);
        }
    }
    let tunnelled_mtu = uplink.mtu.saturating_sub(VXLAN_OVERHEAD);
    let tunnel = own.filter(|_| !neighbours.is_empty()).map(|own| Tunnel {
        local: me.internal_ip,
        mac: Mac::of_machine(me.internal_ip),
        address: own.network(),
        mtu: tunnelled_mtu,
        neighbours,
        forwarding,
    });
    let cni = own.map(|own| CniConfig {
        pod_cidr: own.trunc(),
        mtu: if tunnel.is_some() { tunnelled_mtu } else { uplink.mtu },
    });
    let machines = others
        .iter()
        .filter(|node| near(node))
        .map(|node| node.internal_ip)
        .chain([me.internal_ip])
        .collect();
    Desired {
        routes,
        tunnel,
        cni,
        masquerade: Masquerade { pods, machines },
    }
}

fn overlap(a: Ipv4Net, b: Ipv4Net) -> bool {
    a.contains(&b) || b.contains(&a)
}
