//! Looks at and changes this network namespace by rtnetlink(7).

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr};

use futures::TryStreamExt;
use ipnet::Ipv4Net;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::AddressAttribute;
use rtnetlink::packet_route::link::{InfoData, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol};
use rtnetlink::{Handle, LinkVxlan, RouteMessageBuilder};

use super::desired::{Mac, ROUTE_PROTOCOL, Route, TUNNEL_NAME, Tunnel, Uplink, VNI, VXLAN_PORT};
use super::diff::{Action, Observed, ObservedTunnel};

/// Ethernet's.
const DEFAULT_MTU: u32 = 1500;

/// Why the kernel's network configuration could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// There is no connection to the kernel.
    #[error("cannot open a netlink socket")]
    Open(#[source] io::Error),
    /// A listing failed.
    #[error("cannot list {what}")]
    List {
        /// What was to be listed.
        what: &'static str,
        /// Why not.
        source: rtnetlink::Error,
    },
    /// A change failed.
    #[error("cannot {what}")]
    Change {
        /// What was to be done.
        what: String,
        /// Why not.
        source: rtnetlink::Error,
    },
    /// No interface has this machine's address.
    #[error("no interface has the address `{0}`")]
    NoUplink(Ipv4Addr),
    /// The tunnel device went away meanwhile.
    #[error("the device `{TUNNEL_NAME}` is gone")]
    TunnelGone,
}

/// A connection to the kernel, for the network namespace of the thread that opened it.
pub(super) struct Kernel {
    handle: Handle,
    connection: tokio::task::JoinHandle<()>,
}

impl Drop for Kernel {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

/// An address of an interface.
struct Address {
    index: u32,
    net: Ipv4Net,
}

impl Kernel {
    pub(super) fn open() -> Result<Self, NetlinkError> {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(NetlinkError::Open)?;
        Ok(Self {
            handle,
            connection: tokio::spawn(connection),
        })
    }

    async fn links(&self) -> Result<Vec<LinkMessage>, NetlinkError> {
        let list = self.handle.link().get().execute();
        list.try_collect().await.map_err(|source| NetlinkError::List {
            what: "interfaces",
            source,
        })
    }

    async fn addresses(&self) -> Result<Vec<Address>, NetlinkError> {
        let list = self.handle.address().get().execute();
        let all: Vec<_> = list.try_collect().await.map_err(|source| NetlinkError::List {
            what: "addresses",
            source,
        })?;
        let address = |message: &rtnetlink::packet_route::address::AddressMessage| {
            let local = message.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Local(IpAddr::V4(local)) => Some(*local),
                _ => None,
            })?;
            let net = Ipv4Net::new(local, message.header.prefix_len).ok()?;
            Some(Address {
                index: message.header.index,
                net,
            })
        };
        Ok(all.iter().filter_map(address).collect())
    }

    /// The interface that has `own`, this machine's address.
    pub(super) async fn uplink(&self, own: Ipv4Addr) -> Result<Uplink, NetlinkError> {
        let addresses = self.addresses().await?;
        let index = addresses
            .iter()
            .find(|a| a.net.addr() == own)
            .ok_or(NetlinkError::NoUplink(own))?
            .index;
        let links = self.links().await?;
        let link = links
            .iter()
            .find(|link| link.header.index == index)
            .ok_or(NetlinkError::NoUplink(own))?;
        let subnets = addresses
            .iter()
            .filter(|a| a.index == index && a.net.prefix_len() < 32)
            .map(|a| a.net.trunc());
        Ok(Uplink {
            index,
            mtu: mtu(link),
            subnets: subnets.collect(),
        })
    }

    /// What is there of kprov's making.
    pub(super) async fn observe(&self, uplink: &Uplink) -> Result<Observed, NetlinkError> {
        let links = self.links().await?;
        let device = links.iter().find(|link| name(link) == Some(TUNNEL_NAME));
        let tunnel = match device {
            Some(device) => Some(self.observe_tunnel(device).await?),
            None => None,
        };
        let tunnel_index = device.map(|device| device.header.index);
        let routes = self.own_routes().await?;
        let routes = routes.iter().filter_map(|route| {
            let range = range(route)?;
            let (index, gateway) = next_hop(route);
            let known = match (index, gateway) {
                (Some(index), Some(gateway)) if index == uplink.index => Some(Route::Direct(gateway)),
                (Some(index), Some(gateway)) if Some(index) == tunnel_index => Some(Route::Tunnel(gateway)),
                _ => None,
            };
            Some((range, known))
        });
        Ok(Observed {
            routes: routes.collect(),
            tunnel,
        })
    }

    /// IPv4 routes with kprov's protocol number in the main table.
    async fn own_routes(&self) -> Result<Vec<RouteMessage>, NetlinkError> {
        let list = self
            .handle
            .route()
            .get(RouteMessageBuilder::<Ipv4Addr>::new().build())
            .execute();
        let all: Vec<_> = list
            .try_collect()
            .await
            .map_err(|source| NetlinkError::List { what: "routes", source })?;
        let own = |route: &RouteMessage| {
            route.header.protocol == RouteProtocol::Other(ROUTE_PROTOCOL)
                && route.header.table == RouteHeader::RT_TABLE_MAIN
                && route.header.address_family == AddressFamily::Inet
        };
        Ok(all.into_iter().filter(own).collect())
    }

    async fn observe_tunnel(&self, device: &LinkMessage) -> Result<ObservedTunnel, NetlinkError> {
        let index = device.header.index;
        let addresses = self.addresses().await?;
        let own: Vec<_> = addresses.iter().filter(|a| a.index == index).map(|a| a.net).collect();
        let vxlan = vxlan(device);
        let has = |wanted: &InfoVxlan| vxlan.contains(wanted);
        let sound = has(&InfoVxlan::Id(VNI))
            && has(&InfoVxlan::Port(VXLAN_PORT))
            && has(&InfoVxlan::Learning(false))
            && device.header.flags.contains(LinkFlags::Up)
            && own.len() == 1;
        let local = vxlan.iter().find_map(|info| match info {
            InfoVxlan::Local(local) => Some(*local),
            _ => None,
        });
        let mac = device.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::Address(bytes) => to_mac(bytes),
            _ => None,
        });

        let mut neighbours = BTreeMap::new();
        for entry in self.entries(AddressFamily::Inet, index).await? {
            if let (Some(address), Some(mac)) = (destination(&entry), entry_mac(&entry)) {
                neighbours.insert(address, mac);
            }
        }
        let mut forwarding = BTreeMap::new();
        for entry in self.entries(AddressFamily::Bridge, index).await? {
            if let (Some(machine), Some(mac)) = (destination(&entry), entry_mac(&entry)) {
                forwarding.insert(mac, machine);
            }
        }
        let tunnel = Tunnel {
            local: local.unwrap_or(Ipv4Addr::UNSPECIFIED),
            mac: mac.unwrap_or(Mac([0; 6])),
            address: own.first().map_or(Ipv4Addr::UNSPECIFIED, Ipv4Net::addr),
            mtu: mtu(device),
            neighbours,
            forwarding,
        };
        Ok(ObservedTunnel { sound, tunnel })
    }

    /// Permanent neighbour (or, for the bridge family, forwarding) entries of one interface.
    async fn entries(&self, family: AddressFamily, index: u32) -> Result<Vec<NeighbourMessage>, NetlinkError> {
        let list = self.handle.neighbours().get().set_address_family(family).execute();
        let all: Vec<_> = list.try_collect().await.map_err(|source| NetlinkError::List {
            what: "neighbours",
            source,
        })?;
        let wanted = |e: &NeighbourMessage| e.header.ifindex == index && e.header.state == NeighbourState::Permanent;
        Ok(all.into_iter().filter(wanted).collect())
    }

    async fn tunnel_index(&self) -> Result<u32, NetlinkError> {
        let links = self.links().await?;
        let device = links.iter().find(|link| name(link) == Some(TUNNEL_NAME));
        Ok(device.ok_or(NetlinkError::TunnelGone)?.header.index)
    }

    /// Makes one change.
    pub(super) async fn apply(&self, action: &Action, uplink: &Uplink) -> Result<(), NetlinkError> {
        let failed = |source| NetlinkError::Change {
            what: describe(action),
            source,
        };
        match action {
            Action::RemoveTunnel => self
                .handle
                .link()
                .del(self.tunnel_index().await?)
                .execute()
                .await
                .map_err(failed),
            Action::CreateTunnel(tunnel) => self.create_tunnel(tunnel).await.map_err(failed),
            Action::SetNeighbour(address, mac) => {
                let add = self
                    .handle
                    .neighbours()
                    .add(self.tunnel_index().await?, IpAddr::V4(*address));
                add.link_layer_address(&mac.0).replace().execute().await.map_err(failed)
            }
            Action::RemoveNeighbour(address) => {
                let mut message = NeighbourMessage::default();
                message.header.family = AddressFamily::Inet;
                message.header.ifindex = self.tunnel_index().await?;
                message
                    .attributes
                    .push(NeighbourAttribute::Destination(NeighbourAddress::Inet(*address)));
                self.handle.neighbours().del(message).execute().await.map_err(failed)
            }
            Action::SetForwarding(mac, machine) => {
                let add = self.handle.neighbours().add_bridge(self.tunnel_index().await?, &mac.0);
                let add = add.destination(IpAddr::V4(*machine)).flags(NeighbourFlags::Own);
                add.replace().execute().await.map_err(failed)
            }
            Action::RemoveForwarding(mac, machine) => {
                let mut message = NeighbourMessage::default();
                message.header.family = AddressFamily::Bridge;
                message.header.ifindex = self.tunnel_index().await?;
                message.header.flags = NeighbourFlags::Own;
                message
                    .attributes
                    .push(NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()));
                message
                    .attributes
                    .push(NeighbourAttribute::Destination(NeighbourAddress::Inet(*machine)));
                self.handle.neighbours().del(message).execute().await.map_err(failed)
            }
            Action::AddRoute(range, route) => {
                let message = self.route_message(*range, *route, uplink).await?;
                self.handle.route().add(message).execute().await.map_err(failed)
            }
            Action::ReplaceRoute(range, route) => {
                let message = self.route_message(*range, *route, uplink).await?;
                self.handle
                    .route()
                    .add(message)
                    .replace()
                    .execute()
                    .await
                    .map_err(failed)
            }
            Action::RemoveRoute(range) => {
                let message = RouteMessageBuilder::<Ipv4Addr>::new()
                    .destination_prefix(range.network(), range.prefix_len())
                    .protocol(RouteProtocol::Other(ROUTE_PROTOCOL))
                    .build();
                self.handle.route().del(message).execute().await.map_err(failed)
            }
        }
    }

    async fn create_tunnel(&self, tunnel: &Tunnel) -> Result<(), rtnetlink::Error> {
        let link = LinkVxlan::new(TUNNEL_NAME, VNI)
            .local(tunnel.local)
            .port(VXLAN_PORT)
            .learning(false)
            .address(tunnel.mac.0.to_vec())
            .mtu(tunnel.mtu);
        self.handle.link().add(link.build()).execute().await?;
        let mut found = self.handle.link().get().match_name(TUNNEL_NAME).execute();
        let index = found
            .try_next()
            .await?
            .ok_or(rtnetlink::Error::RequestFailed)?
            .header
            .index;
        self.handle
            .address()
            .add(index, IpAddr::V4(tunnel.address), 32)
            .execute()
            .await?;
        // Neither neighbour discovery nor a link-local address: nobody speaks IPv6 there.
        let _ = tokio::fs::write(format!("/proc/sys/net/ipv6/conf/{TUNNEL_NAME}/disable_ipv6"), "1").await;
        let up = rtnetlink::LinkUnspec::new_with_index(index).up().build();
        self.handle.link().set(up).execute().await
    }

    async fn route_message(&self, range: Ipv4Net, route: Route, uplink: &Uplink) -> Result<RouteMessage, NetlinkError> {
        let message = RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(range.network(), range.prefix_len())
            .protocol(RouteProtocol::Other(ROUTE_PROTOCOL));
        Ok(match route {
            Route::Direct(machine) => message.gateway(machine).output_interface(uplink.index).build(),
            // The gateway is on no subnet of the device, so it has to be declared to be there.
            Route::Tunnel(gateway) => message
                .gateway(gateway)
                .output_interface(self.tunnel_index().await?)
                .onlink()
                .build(),
        })
    }
}

fn describe(action: &Action) -> String {
    match action {
        Action::RemoveTunnel => format!("remove the device `{TUNNEL_NAME}`"),
        Action::CreateTunnel(_) => format!("make the device `{TUNNEL_NAME}`"),
        Action::SetNeighbour(address, _) => format!("add the neighbour `{address}`"),
        Action::RemoveNeighbour(address) => format!("remove the neighbour `{address}`"),
        Action::SetForwarding(mac, machine) => format!("forward `{mac:?}` to `{machine}`"),
        Action::RemoveForwarding(mac, machine) => format!("stop forwarding `{mac:?}` to `{machine}`"),
        Action::AddRoute(range, _) => format!("add the route to `{range}`"),
        Action::ReplaceRoute(range, _) => format!("replace the route to `{range}`"),
        Action::RemoveRoute(range) => format!("remove the route to `{range}`"),
    }
}

fn name(link: &LinkMessage) -> Option<&str> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.as_str()),
        _ => None,
    })
}

fn mtu(link: &LinkMessage) -> u32 {
    let mtu = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Mtu(mtu) => Some(*mtu),
        _ => None,
    });
    mtu.unwrap_or(DEFAULT_MTU)
}

/// A VXLAN device's settings; none for another kind of device.
fn vxlan(link: &LinkMessage) -> &[InfoVxlan] {
    let info = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::LinkInfo(info) => Some(info),
        _ => None,
    });
    let data = info.into_iter().flatten().find_map(|info| match info {
        LinkInfo::Data(InfoData::Vxlan(vxlan)) => Some(vxlan.as_slice()),
        _ => None,
    });
    data.unwrap_or_default()
}

fn range(route: &RouteMessage) -> Option<Ipv4Net> {
    let destination = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(destination)) => Some(*destination),
        _ => None,
    });
    Ipv4Net::new(destination?, route.header.destination_prefix_length).ok()
}

fn next_hop(route: &RouteMessage) -> (Option<u32>, Option<Ipv4Addr>) {
    let (mut index, mut gateway) = (None, None);
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Oif(oif) => index = Some(*oif),
            RouteAttribute::Gateway(RouteAddress::Inet(address)) => gateway = Some(*address),
            _ => {}
        }
    }
    (index, gateway)
}

fn to_mac(bytes: &[u8]) -> Option<Mac> {
    bytes.try_into().ok().map(Mac)
}

fn entry_mac(entry: &NeighbourMessage) -> Option<Mac> {
    entry.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::LinkLayerAddress(bytes) => to_mac(bytes),
        _ => None,
    })
}

/// A neighbour's address; a forwarding entry's machine. The kernel's bridge family carries plain bytes.
fn destination(entry: &NeighbourMessage) -> Option<Ipv4Addr> {
    entry.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => Some(*address),
        NeighbourAttribute::Destination(NeighbourAddress::Other(bytes)) => {
            <[u8; 4]>::try_from(bytes.as_slice()).ok().map(Ipv4Addr::from)
        }
        _ => None,
    })
}
