//! The names a cluster's things have on this host. Pure: equal names in, equal names out.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use kprov_types::{ClusterName, MachineName};
use sha2::{Digest, Sha256};

/// The tag all tags begin with.
const TAG: &str = "kprov:";

/// The control group that holds everything of kprov in each hierarchy.
pub(crate) const CGROUP: &str = "kprov";
/// The control group of a cluster's balancer; no machine can have this name.
pub(crate) const BALANCER_CGROUP: &str = "_balancer";

/// Eight hexadecimal digits that stand for a cluster where its name has no room: interface names end at 15 characters
/// (`IFNAMSIZ`).
pub(crate) fn short(cluster: &ClusterName) -> String {
    hex::encode(&Sha256::digest(cluster.as_str())[..4])
}

/// The name of a cluster's bridge.
pub(crate) fn bridge(cluster: &ClusterName) -> String {
    format!("kp-{}", short(cluster))
}

/// What the names of all machines' interfaces of a cluster begin with.
pub(crate) fn interface_prefix(cluster: &ClusterName) -> String {
    format!("kp{}m", short(cluster))
}

/// The name of the host's side of a machine's interface.
pub(crate) fn interface(cluster: &ClusterName, range: Ipv4Net, address: Ipv4Addr) -> String {
    format!("{}{:x}", interface_prefix(cluster), offset(range, address))
}

/// The tag of what belongs to a cluster: its bridge's alias, its firewall rules' comment.
pub(crate) fn cluster_tag(cluster: &ClusterName) -> String {
    format!("{TAG}{cluster}")
}

/// The tag of what belongs to one machine: its interface's alias, and its id.
pub(crate) fn machine_tag(cluster: &ClusterName, machine: &MachineName) -> String {
    format!("{TAG}{cluster}/{machine}")
}

/// Whether a tag belongs to this cluster, the cluster itself or one of its machines.
pub(crate) fn tag_is_of(tag: &str, cluster: &ClusterName) -> bool {
    tag.strip_prefix(TAG)
        .is_some_and(|rest| rest.split('/').next() == Some(cluster.as_str()))
}

/// Whether a tag is any cluster's.
pub(crate) fn is_tag(tag: &str) -> bool {
    tag.starts_with(TAG)
}

/// The hardware address that belongs to an address of a cluster: locally administered, and the same each time, so that
/// no neighbour remembers a wrong one after a machine was made anew.
pub(crate) fn hardware_address(cluster: &ClusterName, range: Ipv4Net, address: Ipv4Addr) -> String {
    let hash = Sha256::digest(cluster.as_str());
    let [_, _, high, low] = offset(range, address).to_be_bytes();
    format!(
        "02:{:02x}:{:02x}:{:02x}:{high:02x}:{low:02x}",
        hash[0], hash[1], hash[2]
    )
}

/// The machine id (`machine-id(5)`) of a machine: 32 hexadecimal digits.
pub(crate) fn machine_id(cluster: &ClusterName, machine: &MachineName) -> String {
    hex::encode(&Sha256::digest(machine_tag(cluster, machine))[..16])
}

/// The bridge's address: the first of the range, and the machines' default route.
pub(crate) fn gateway(range: Ipv4Net) -> Ipv4Addr {
    nth(range, 1)
}

/// The first address of the range that is neither the network's, the bridge's, the broadcast address, nor taken.
pub(crate) fn free_address(range: Ipv4Net, taken: &[Ipv4Addr]) -> Option<Ipv4Addr> {
    let last = u32::from(range.broadcast()) - u32::from(range.network());
    (2..last).map(|n| nth(range, n)).find(|a| !taken.contains(a))
}

/// Whether a machine may have this address: one of the range, but not the host's own, nor those that none can have.
pub(crate) fn is_for_machines(range: Ipv4Net, address: Ipv4Addr) -> bool {
    range.contains(&address) && address != range.network() && address != gateway(range) && address != range.broadcast()
}

fn nth(range: Ipv4Net, n: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(range.network()) + n)
}

fn offset(range: Ipv4Net, address: Ipv4Addr) -> u32 {
    u32::from(address).wrapping_sub(u32::from(range.network()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn cluster(name: &str) -> ClusterName {
        ClusterName::new(name).unwrap()
    }

    #[test]
    fn tags_do_not_match_longer_names() {
        let demo = cluster("demo");
        let machine = MachineName::new("demo-cp-0").unwrap();
        assert!(tag_is_of(&cluster_tag(&demo), &demo));
        assert!(tag_is_of(&machine_tag(&demo, &machine), &demo));
        for other in ["kprov:demo-2", "kprov:demo2/demo-cp-0", "demo", "kprov:", ""] {
            assert!(!tag_is_of(other, &demo), "{other}");
        }
    }

    proptest! {
        #[test]
        fn names_fit_and_differ(name in "[a-z]([a-z0-9-]{0,38}[a-z0-9])?", prefix in 16_u8..=28, pick in any::<u32>()) {
            let cluster = cluster(&name);
            let range = Ipv4Net::new([10, 89, 0, 0].into(), prefix).unwrap().trunc();
            let room = (1_u32 << (32 - prefix)) - 3;
            let address = nth(range, 2 + pick % room);
            prop_assert!(bridge(&cluster).len() <= 15);
            prop_assert!(interface(&cluster, range, address).len() <= 15);
            prop_assert!(!interface(&cluster, range, address).starts_with(&bridge(&cluster)));
            prop_assert_ne!(hardware_address(&cluster, range, address), hardware_address(&cluster, range, gateway(range)));
        }

        #[test]
        fn every_address_is_given_once(prefix in 24_u8..=28) {
            let range = Ipv4Net::new([10, 89, 7, 0].into(), prefix).unwrap().trunc();
            let mut taken = Vec::new();
            while let Some(address) = free_address(range, &taken) {
                prop_assert!(range.contains(&address) && address != gateway(range) && address != range.broadcast());
                taken.push(address);
            }
            prop_assert_eq!(taken.len(), (1 << (32 - prefix)) - 3);
        }
    }
}
