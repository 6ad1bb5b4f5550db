//! The address on this machine's interface: added with a lifetime that the kernel enforces, removed, announced.

use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsRawFd as _;
use std::time::Duration;

use futures::TryStreamExt as _;
use nix::sys::socket::{AddressFamily, LinkAddr, MsgFlags, SockFlag, SockType, bind, send, socket};
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage, CacheInfo};
use rtnetlink::{AddressMessageBuilder, Handle};

/// Why the address could not be changed or announced.
#[derive(Debug, thiserror::Error)]
pub enum AddressError {
    /// There is no connection to the kernel.
    #[error("cannot open a netlink socket")]
    Open(#[source] std::io::Error),
    /// A listing failed.
    #[error("cannot list addresses")]
    List(#[source] rtnetlink::Error),
    /// No interface has this machine's address.
    #[error("no interface has the address `{0}`")]
    NoInterface(Ipv4Addr),
    /// The address could not be added or removed.
    #[error("cannot {what} the address `{address}`")]
    Change {
        /// `add` or `remove`.
        what: &'static str,
        /// Which.
        address: Ipv4Addr,
        /// Why.
        source: rtnetlink::Error,
    },
    /// It could not be announced.
    #[error("cannot announce the address on `{interface}`")]
    Announce {
        /// Where.
        interface: String,
        /// Why.
        source: nix::Error,
    },
}

/// The virtual address, and the interface that has this machine's own.
pub(super) struct Address {
    handle: Handle,
    connection: tokio::task::JoinHandle<()>,
    ip: Ipv4Addr,
    own: Ipv4Addr,
}

impl Drop for Address {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl Address {
    pub(super) fn open(ip: Ipv4Addr, own: Ipv4Addr) -> Result<Self, AddressError> {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(AddressError::Open)?;
        Ok(Self {
            handle,
            connection: tokio::spawn(connection),
            ip,
            own,
        })
    }

    /// The interface that has `address` now.
    async fn interface_of(&self, address: Ipv4Addr) -> Result<Option<u32>, AddressError> {
        let list = self.handle.address().get().execute();
        let all: Vec<AddressMessage> = list.try_collect().await.map_err(AddressError::List)?;
        let local = AddressAttribute::Local(IpAddr::V4(address));
        let found = all.iter().find(|message| message.attributes.contains(&local));
        Ok(found.map(|message| message.header.index))
    }

    /// Ensures the address for this long from now; then the kernel takes it away, whatever has become of this process. It
    /// counts in whole seconds (address lifetimes of rtnetlink(7)): less than one adds nothing.
    pub(super) async fn have(&self, lifetime: Duration) -> Result<(), AddressError> {
        let Ok(seconds @ 1..) = u32::try_from(lifetime.as_secs()) else {
            return Ok(());
        };
        let index = self.interface_of(self.own).await?;
        let index = index.ok_or(AddressError::NoInterface(self.own))?;
        // A /32 makes no route, so that it's never what this machine sends from by itself.
        let mut request = self.handle.address().add(index, self.ip.into(), 32).replace();
        let mut times = CacheInfo::default();
        (times.ifa_valid, times.ifa_preferred) = (seconds, seconds);
        request
            .message_mut()
            .attributes
            .push(AddressAttribute::CacheInfo(times));
        request.execute().await.map_err(|source| AddressError::Change {
            what: "add",
            address: self.ip,
            source,
        })
    }

    /// Ensures that this machine does not have it.
    pub(super) async fn drop_it(&self) -> Result<(), AddressError> {
        while let Some(index) = self.interface_of(self.ip).await? {
            let message = AddressMessageBuilder::<Ipv4Addr>::new()
                .index(index)
                .address(self.ip, 32)
                .build();
            let removed = self.handle.address().del(message).execute().await;
            match removed {
                Ok(()) => {}
                // Its lifetime has ended meanwhile (EADDRNOTAVAIL): looked at again.
                Err(rtnetlink::Error::NetlinkError(error)) if error.raw_code() == -99 => {}
                Err(source) => {
                    return Err(AddressError::Change {
                        what: "remove",
                        address: self.ip,
                        source,
                    });
                }
            }
        }
        Ok(())
    }

    /// Tells everyone on the link who has the address: a gratuitous ARP request and reply (RFC 5227 section 2.3 and RFC 2002
    /// section 4.6), as some take note of the one and some of the other.
    pub(super) fn announce(&self) -> Result<(), AddressError> {
        let interfaces = nix::ifaddrs::getifaddrs().map_err(|source| AddressError::Announce {
            interface: self.own.to_string(),
            source,
        })?;
        let interfaces: Vec<_> = interfaces.collect();
        let own = interfaces.iter().find(|one| {
            one.address
                .and_then(|address| address.as_sockaddr_in().map(nix::sys::socket::SockaddrIn::ip))
                == Some(self.own)
        });
        let name = &own.ok_or(AddressError::NoInterface(self.own))?.interface_name;
        let link = interfaces.iter().find_map(|one| {
            let link = *one.address?.as_link_addr()?;
            (one.interface_name == *name).then_some(link)
        });
        let announced = link.map_or(Ok(()), |link| send_announcements(&link, self.ip));
        announced.map_err(|source| AddressError::Announce {
            interface: name.clone(),
            source,
        })
    }
}

fn send_announcements(link: &LinkAddr, address: Ipv4Addr) -> nix::Result<()> {
    // An interface without hardware addresses has nobody to tell.
    let Some(mac) = link.addr().filter(|mac| mac.iter().any(|byte| *byte != 0)) else {
        return Ok(());
    };
    let raw = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)?;
    bind(raw.as_raw_fd(), link)?;
    for operation in [1, 2] {
        send(
            raw.as_raw_fd(),
            &announcement(mac, address, operation),
            MsgFlags::empty(),
        )?;
    }
    Ok(())
}

/// An Ethernet frame with an ARP packet (RFC 826) that has the address as both sender's and target's.
fn announcement(mac: [u8; 6], address: Ipv4Addr, operation: u8) -> Vec<u8> {
    let everyone = [0xff; 6];
    let mut frame = Vec::with_capacity(42);
    frame.extend(everyone);
    frame.extend(mac);
    // ARP; Ethernet, IPv4, lengths of their addresses.
    frame.extend([0x08, 0x06, 0, 1, 0x08, 0x00, 6, 4, 0, operation]);
    frame.extend(mac);
    frame.extend(address.octets());
    frame.extend(everyone);
    frame.extend(address.octets());
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn announcements_are_arp() {
        let frame = announcement([2, 0, 0, 0, 0, 9], [10, 0, 0, 100].into(), 2);
        assert_eq!(frame.len(), 42);
        assert_eq!(
            hex::encode(&frame),
            "ffffffffffff0200000000090806000108000604000202000000000\
             90a000064ffffffffffff0a000064"
        );
    }
}
