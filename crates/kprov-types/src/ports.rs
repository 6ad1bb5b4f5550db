//! Ports and addresses that more than one part must agree on.

use std::net::Ipv4Addr;

/// The Kubernetes API: on the cluster's endpoint, on each control-plane machine's own address (its front) and, on every
/// machine, on loopback. API server processes bind it on the addresses of [`revision_address`].
pub const API: u16 = 6443;
/// Where a machine that is not set up yet takes its bundle and tells its progress, over mutually pinned TLS.
pub const NODE_SETUP: u16 = 10201;
/// Where `kprov up` and `kprov release serve` offer a release payload to machines.
pub const RELEASE: u16 = 10202;
/// UDP: where control-plane machines agree on who has the virtual address.
pub const VIRTUAL_ADDRESS: u16 = 10203;
/// etcd's client port.
pub const ETCD_CLIENT: u16 = 2379;
/// etcd's peer port.
pub const ETCD_PEER: u16 = 2380;
/// etcd's health and metrics, plain HTTP on loopback only.
pub const ETCD_METRICS: u16 = 2381;
/// The controller-manager's HTTPS port, on its revision's address.
pub const CONTROLLER_MANAGER: u16 = 10257;
/// The scheduler's HTTPS port, on its revision's address.
pub const SCHEDULER: u16 = 10259;
/// The kubelet's HTTPS port.
pub const KUBELET: u16 = 10250;
/// The kubelet's health endpoint, on loopback only.
pub const KUBELET_HEALTHZ: u16 = 10248;

/// The revision that a machine's standby (at first: temporary) control plane uses; self-hosted revisions start above it.
pub const STANDBY_REVISION: u16 = 1;
/// The first self-hosted revision.
pub const FIRST_REVISION: u16 = 2;

/// The loopback address that control-plane processes of one revision bind on each machine.
///
/// An address of its own per revision lets two revisions run side by side on one host network and the same port, and
/// lets a probe be answered by one process only. All of 127.0.0.0/8 is local on Linux (RFC 1122 section 3.2.1.3), so
/// nothing has to be configured for it.
pub const fn revision_address(revision: u16) -> Ipv4Addr {
    let [high, low] = revision.to_be_bytes();
    Ipv4Addr::new(127, 64, high, low)
}

/// The revision whose processes bind `address`, if it is such an address.
pub const fn revision_of(address: Ipv4Addr) -> Option<u16> {
    match address.octets() {
        [127, 64, high, low] => Some(u16::from_be_bytes([high, low])),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn revision_addresses_round_trip() {
        for r in [0, 1, 2, 255, 256, u16::MAX] {
            assert_eq!(revision_of(revision_address(r)), Some(r));
        }
        assert_eq!(revision_address(2), Ipv4Addr::new(127, 64, 0, 2));
        assert_eq!(revision_of(Ipv4Addr::LOCALHOST), None);
    }
}
