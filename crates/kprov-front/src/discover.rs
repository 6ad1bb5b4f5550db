//! Finds the API server processes of this machine: TCP sockets that listen on revision addresses.
//!
//! Asks the kernel by `sock_diag(7)` for listening sockets only, filtered by port: it walks its table of listeners and
//! never the connections, so the cost doesn't grow with them.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;

use kprov_types::ports;
use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_sock_diag::SockDiagMessage;
use netlink_packet_sock_diag::constants::{AF_INET, IPPROTO_TCP};
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, SocketId, StateFlags};
use netlink_sys::protocols::NETLINK_SOCK_DIAG;
use netlink_sys::{Socket, SocketAddr};

/// A connection to the kernel's socket diagnostics, for one network namespace: the opening thread's.
pub struct ListenTable {
    socket: Socket,
    request: Vec<u8>,
    port: u16,
}

impl ListenTable {
    /// Prepares to look for listeners on `port`.
    pub fn open(port: u16) -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_SOCK_DIAG)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | NLM_F_DUMP;
        let request = InetRequest {
            family: AF_INET,
            protocol: IPPROTO_TCP,
            extensions: ExtensionFlags::empty(),
            states: StateFlags::LISTEN,
            socket_id: SocketId {
                source_port: port,
                ..SocketId::new_v4()
            },
        };
        let mut message = NetlinkMessage::new(header, SockDiagMessage::InetRequest(request).into());
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        Ok(Self {
            socket,
            request: bytes,
            port,
        })
    }

    /// The revisions that have a listener now. Blocks for microseconds only: the kernel answers a dump by itself.
    pub fn revisions(&self) -> io::Result<BTreeSet<u16>> {
        self.socket.send(&self.request, 0)?;
        let mut found = BTreeSet::new();
        loop {
            let (datagram, _) = self.socket.recv_from_full()?;
            let mut rest = datagram.as_slice();
            while !rest.is_empty() {
                let message = NetlinkMessage::<SockDiagMessage>::deserialize(rest).map_err(io::Error::other)?;
                match message.payload {
                    NetlinkPayload::Done(_) => return Ok(found),
                    NetlinkPayload::Error(error) => return Err(error.to_io()),
                    NetlinkPayload::InnerMessage(SockDiagMessage::InetResponse(response)) => {
                        let id = &response.header.socket_id;
                        if let (IpAddr::V4(address), true) = (id.source_address, id.source_port == self.port) {
                            found.extend(ports::revision_of(address));
                        }
                    }
                    _ => {}
                }
                // Messages are aligned to four bytes within a datagram (netlink(7), NLMSG_ALIGN).
                let length = (message.header.length as usize).next_multiple_of(4).max(16);
                rest = rest.get(length..).unwrap_or_default();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn finds_listeners_and_nothing_else() {
        let first = TcpListener::bind("127.64.7.1:0").unwrap();
        let port = first.local_addr().unwrap().port();
        let table = ListenTable::open(port).unwrap();
        let revision = |a: u8, b: u8| u16::from_be_bytes([a, b]);
        assert_eq!(table.revisions().unwrap(), [revision(7, 1)].into());

        let second = TcpListener::bind(("127.64.7.2", port)).unwrap();
        let _elsewhere = TcpListener::bind(("127.65.7.3", port)).unwrap();
        let _other_port = TcpListener::bind("127.64.7.4:0").unwrap();
        let _connection = std::net::TcpStream::connect(("127.64.7.1", port)).unwrap();
        assert_eq!(table.revisions().unwrap(), [revision(7, 1), revision(7, 2)].into());

        drop(first);
        assert_eq!(
            table.revisions().unwrap(),
            [revision(7, 2)].into(),
            "its connection alone doesn't count"
        );
        drop(second);
        assert!(table.revisions().unwrap().is_empty());
    }
}
