//! Socket options, and the errors that say this process (not the peer) is at fault.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use nix::errno::Errno;
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

/// Idle connections (watches) are probed after this time, so that a peer that vanished without a word is noticed.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_PROBES: u32 = 3;
/// Data that the peer has not acknowledged for so long ends the connection (RFC 5482); the kernel's own limit is some
/// fifteen minutes.
const UNACKNOWLEDGED: Duration = Duration::from_mins(1);
const BACKLOG: i32 = 4096;

/// Connecting takes at most this long; then the next backend is tried.
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// How long to wait before trying again what failed for want of resources ([`is_exhaustion`]).
pub(crate) const EXHAUSTION_PAUSE: Duration = Duration::from_millis(50);

fn tune(socket: &SockRef<'_>) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_keepalive(
        &TcpKeepalive::new()
            .with_time(KEEPALIVE_IDLE)
            .with_interval(KEEPALIVE_INTERVAL)
            .with_retries(KEEPALIVE_PROBES),
    )?;
    socket.set_tcp_user_timeout(Some(UNACKNOWLEDGED))
}

/// Binds and listens. Connections it accepts inherit its options (Linux copies the listener's socket).
pub(crate) fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM.nonblocking().cloexec(),
        Some(Protocol::TCP),
    )?;
    // Connections of an earlier listener on this address may still be there.
    socket.set_reuse_address(true)?;
    if address.is_ipv4() {
        // A virtual address is another machine's at times: this one has to listen when it comes (IP_FREEBIND in ip(7)).
        socket.set_freebind_v4(true)?;
    }
    tune(&SockRef::from(&socket))?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// Connects within [`CONNECT_TIMEOUT`].
pub(crate) async fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        TcpSocket::new_v6()?
    };
    tune(&SockRef::from(&socket))?;
    match tokio::time::timeout(CONNECT_TIMEOUT, socket.connect(address)).await {
        Ok(connected) => connected,
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    }
}

/// Makes the close that follows a reset (RST), so that the peer knows it as an error.
pub(crate) fn reset_on_close(stream: &TcpStream) {
    // Can only fail on a socket that is gone already.
    let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
}

/// Whether this process or machine has run out of something, which says nothing about the peer.
pub(crate) fn is_exhaustion(error: &io::Error) -> bool {
    error.raw_os_error().is_some_and(|code| {
        matches!(
            Errno::from_raw(code),
            Errno::EMFILE | Errno::ENFILE | Errno::ENOBUFS | Errno::ENOMEM | Errno::EADDRNOTAVAIL
        )
    })
}
