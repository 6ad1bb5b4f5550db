//! The network that hosts are in already: its range, its endpoint, and this machine's address in it. Nothing is made.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};

use ipnet::Ipv4Net;
use kprov_types::machine::Endpoint;
use kprov_types::{Role, ports};

use crate::config::BaremetalConfig;
use crate::inventory::Host;

/// The smallest range that has all these addresses.
pub(crate) fn smallest(addresses: impl Iterator<Item = Ipv4Addr>) -> Option<Ipv4Net> {
    let mut range: Option<Ipv4Net> = None;
    for address in addresses {
        let mut wider = range.unwrap_or_else(|| Ipv4Net::from(address));
        while !wider.contains(&address) {
            wider = wider.supernet()?;
        }
        range = Some(wider);
    }
    range
}

/// Where the API is found: as configured, else at the first control-plane host.
pub(crate) fn endpoint(config: &BaremetalConfig, address: impl Fn(&Host) -> Option<Ipv4Addr>) -> Option<Endpoint> {
    let host = match (config.virtual_address, &config.endpoint) {
        (Some(address), _) => address.to_string(),
        (None, Some(name)) => name.clone(),
        (None, None) => {
            let first = config
                .inventory
                .hosts
                .iter()
                .find(|host| host.role == Role::ControlPlane)?;
            first.external_address.or_else(|| address(first))?.to_string()
        }
    };
    Some(Endpoint { host, port: ports::API })
}

/// The address that packets to `target` are sent from. None is sent to find out.
pub(crate) fn source_towards(target: Ipv4Addr) -> Option<Ipv4Addr> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
    // Connecting a datagram socket only looks up the route (connect(2)); any port will do.
    socket.connect((target, 9)).ok()?;
    match socket.local_addr().ok()? {
        SocketAddr::V4(local) if !local.ip().is_unspecified() => Some(*local.ip()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_range_has_all_addresses() {
        let range =
            |addresses: &[[u8; 4]]| smallest(addresses.iter().map(|a| Ipv4Addr::from(*a))).map(|r| r.to_string());
        assert_eq!(range(&[[10, 0, 0, 1]]).unwrap(), "10.0.0.1/32");
        assert_eq!(range(&[[10, 0, 0, 11], [10, 0, 0, 12]]).unwrap(), "10.0.0.8/29");
        assert_eq!(
            range(&[[10, 0, 0, 1], [10, 0, 7, 1], [10, 0, 0, 9]]).unwrap(),
            "10.0.0.0/21"
        );
        assert_eq!(range(&[]), None);
    }
}
