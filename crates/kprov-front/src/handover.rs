//! Hands a running front over to the program that this process becomes, with all its connections.
//!
//! Every relay is at a safe point all the time: what it has read and not written is in a pipe, and pipes are handed over like
//! sockets. So nothing has to be waited for, however slow a client is.
//!
//! The file descriptors cross `execve(2)` as messages in a Unix socket (`SCM_RIGHTS`, unix(7)), which is standard input meanwhile:
//! the one descriptor that a program has by name. No number is trusted, and none stays open where the new program does not
//! take it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, PipeReader, PipeWriter, Read, Seek, Write};
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recv, recvmsg, sendmsg, socketpair, sockopt,
};
use rustix::stdio::dup2_stdin;
use serde::{Deserialize, Serialize};
use tokio::net::{TcpListener, TcpStream};
use tracing::{info, warn};

use crate::front::{BackendState, Front, FrontConfig, FrontError, FrontHandle};
use crate::health::Standing;
use crate::listen::{relay_on, serve};
use crate::policy::Backend;
use crate::proxy::{Pending, Way, Ways};

/// A connection between a client and a backend.
pub(crate) struct Relay {
    pub(crate) backend: Backend,
    pub(crate) client: TcpStream,
    pub(crate) server: TcpStream,
    pub(crate) ways: Ways,
}

/// What a front holds when it has come to rest.
#[derive(Default)]
pub(crate) struct Rest {
    pub(crate) listeners: Vec<(SocketAddr, TcpListener)>,
    /// Clients for whom there was no backend yet, and the listeners they came by.
    pub(crate) waiting: Vec<(SocketAddr, TcpStream)>,
    pub(crate) relays: Vec<Relay>,
}

/// What is written of a front at rest. Other versions of kprov read it: fields may be added, with a default, and none
/// changed.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Note {
    /// One socket each.
    listeners: Vec<SocketAddr>,
    /// One socket each: the client's.
    waiting: Vec<SocketAddr>,
    /// Two sockets each, the client's and the backend's; then for each way with bytes pending the two ends of its pipe.
    relays: Vec<RelayNote>,
    backends: Vec<BackendNote>,
    remotes: BTreeSet<SocketAddr>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RelayNote {
    backend: Backend,
    up: WayNote,
    down: WayNote,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
enum WayNote {
    Open,
    Ended,
    Pending(usize),
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct BackendNote {
    backend: Backend,
    ready: bool,
    /// It is not ready only because it is slow.
    #[serde(default)]
    slow: bool,
    /// For how long it has been as it is.
    for_millis: u64,
}

impl BackendNote {
    const fn standing(&self) -> Standing {
        match (self.ready, self.slow) {
            (true, _) => Standing::Up,
            (false, true) => Standing::Slow,
            (false, false) => Standing::Down,
        }
    }
}

/// A front at rest: its listening sockets, its connections, and what it knew of backends. Dropping it ends them.
///
/// To replace the running program without any client noticing:
///
/// ```ignore
/// front.hand_over().await.leave()?;
/// let error = std::os::unix::process::CommandExt::exec(&mut command);
/// // Where that failed, go on:
/// let handover = Handover::take()?.context("nothing was left")?;
/// let front = Front::resume(config, handover)?;
/// ```
///
/// and where a program starts, before it does anything with standard input:
///
/// ```ignore
/// let front = match Handover::take()? {
///     Some(handover) => Front::resume(config, handover)?,
///     None => Front::start(config)?,
/// };
/// ```
#[derive(Debug)]
pub struct Handover {
    note: Note,
    /// In the order of the note.
    sockets: Vec<OwnedFd>,
}

impl Handover {
    /// How many connections it carries.
    pub fn connections(&self) -> usize {
        self.note.waiting.len() + self.note.relays.len()
    }

    fn of(rest: Rest, backends: &BTreeMap<Backend, BackendState>, remotes: BTreeSet<SocketAddr>) -> Self {
        let mut note = Note {
            remotes,
            ..Note::default()
        };
        let mut sockets = Vec::new();
        for (address, socket) in rest.listeners {
            match socket.into_std() {
                Ok(socket) => {
                    note.listeners.push(address);
                    sockets.push(socket.into());
                }
                Err(error) => warn!(%address, %error, "front: a listener cannot be handed over"),
            }
        }
        for (listener, client) in rest.waiting {
            match client.into_std() {
                Ok(client) => {
                    note.waiting.push(listener);
                    sockets.push(client.into());
                }
                Err(error) => warn!(%listener, %error, "front: a connection cannot be handed over"),
            }
        }
        for Relay {
            backend,
            client,
            server,
            ways,
        } in rest.relays
        {
            match (client.into_std(), server.into_std()) {
                (Ok(client), Ok(server)) => {
                    sockets.extend([OwnedFd::from(client), server.into()]);
                    let (up, down) = (write_way(ways.up, &mut sockets), write_way(ways.down, &mut sockets));
                    note.relays.push(RelayNote { backend, up, down });
                }
                (Err(error), _) | (_, Err(error)) => {
                    warn!(%backend, %error, "front: a connection cannot be handed over");
                }
            }
        }
        let backends = backends.iter().map(|(backend, state)| BackendNote {
            backend: *backend,
            ready: state.standing == Standing::Up,
            slow: state.standing == Standing::Slow,
            for_millis: u64::try_from(state.since.elapsed().as_millis()).unwrap_or(u64::MAX),
        });
        note.backends = backends.collect();
        Self { note, sockets }
    }

    /// Leaves everything on standard input, where the program that this process becomes finds it ([`Self::take`]).
    pub fn leave(self) -> io::Result<()> {
        let (ours, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )?;
        let mut text = File::from(memfd_create("kprov-front", MemfdFlags::CLOEXEC)?);
        serde_json::to_writer(&mut text, &self.note)?;
        text.flush()?;
        let mut all = vec![OwnedFd::from(text)];
        all.extend(self.sockets);
        let mut groups = all.chunks(FDS_EACH).peekable();
        while let Some(group) = groups.next() {
            send(&ours, group, groups.peek().is_none())?;
        }
        dup2_stdin(theirs)?;
        Ok(())
    }

    /// What was left on standard input before this program was started; `None` where nothing was. Standard input is
    /// `/dev/null` afterwards.
    pub fn take() -> io::Result<Option<Self>> {
        let input = io::stdin();
        let input = input.as_fd();
        if !is_ours(input) {
            return Ok(None);
        }
        let mut all = Vec::new();
        while !receive(input, &mut all)? {}
        dup2_stdin(File::open("/dev/null")?)?;
        let mut all = all.into_iter();
        let mut text = File::from(all.next().ok_or(io::ErrorKind::InvalidData)?);
        text.rewind()?;
        let mut json = String::new();
        text.read_to_string(&mut json)?;
        Ok(Some(Self {
            note: serde_json::from_str(&json)?,
            sockets: all.collect(),
        }))
    }
}

/// How many file descriptors go into one message; the kernel takes up to 253 (`SCM_MAX_FD`).
const FDS_EACH: usize = 200;
const SPACE: usize = rustix::cmsg_space!(ScmRights(FDS_EACH));
/// What each message begins with; its last byte says whether another one follows.
const MORE: [u8; 8] = *b"kp-front";
const LAST: [u8; 8] = *b"kp-fronT";

fn send(to: &OwnedFd, group: &[OwnedFd], last: bool) -> io::Result<()> {
    let fds: Vec<BorrowedFd<'_>> = group.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); SPACE];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::ErrorKind::OutOfMemory.into());
    }
    let mark = if last { LAST } else { MORE };
    sendmsg(to, &[IoSlice::new(&mark)], &mut control, SendFlags::empty())?;
    Ok(())
}

/// Takes in one message; tells whether it was the last.
fn receive(from: BorrowedFd<'_>, into: &mut Vec<OwnedFd>) -> io::Result<bool> {
    let mut space = [MaybeUninit::uninit(); SPACE];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut mark = [0; MORE.len()];
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let message = recvmsg(from, &mut [IoSliceMut::new(&mut mark)], &mut control, flags)?;
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = part {
            into.extend(fds);
        }
    }
    if message.flags.contains(ReturnFlags::CTRUNC) {
        return Err(io::Error::other(
            "file descriptors were lost on their way to this program",
        ));
    }
    match mark {
        LAST => Ok(true),
        MORE => Ok(false),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// Whether the socket is one that [`Handover::leave`] has made.
fn is_ours(input: BorrowedFd<'_>) -> bool {
    let mut mark = [0; MORE.len()];
    let kind = sockopt::socket_domain(input).ok().zip(sockopt::socket_type(input).ok());
    kind == Some((AddressFamily::UNIX, SocketType::SEQPACKET))
        && recv(input, &mut mark, RecvFlags::PEEK | RecvFlags::DONTWAIT).is_ok()
        && (mark == MORE || mark == LAST)
}

fn write_way(way: Way, sockets: &mut Vec<OwnedFd>) -> WayNote {
    match way.pending {
        Some(pending) => {
            let (reader, writer, count) = pending.into_parts();
            sockets.extend([OwnedFd::from(reader), writer.into()]);
            WayNote::Pending(count)
        }
        None if way.ended => WayNote::Ended,
        None => WayNote::Open,
    }
}

/// The file descriptors of a handover, one after the other.
struct Sockets(std::vec::IntoIter<OwnedFd>);

impl Sockets {
    fn next(&mut self) -> io::Result<OwnedFd> {
        self.0
            .next()
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "fewer file descriptors than were noted"))
    }

    fn stream(&mut self) -> io::Result<TcpStream> {
        let stream = std::net::TcpStream::from(self.next()?);
        stream.set_nonblocking(true)?;
        TcpStream::from_std(stream)
    }

    fn listener(&mut self) -> io::Result<TcpListener> {
        let listener = std::net::TcpListener::from(self.next()?);
        listener.set_nonblocking(true)?;
        TcpListener::from_std(listener)
    }

    fn way(&mut self, note: &WayNote) -> io::Result<Way> {
        Ok(match note {
            WayNote::Open => Way::default(),
            WayNote::Ended => Way {
                ended: true,
                pending: None,
            },
            WayNote::Pending(count) => {
                let (reader, writer) = (PipeReader::from(self.next()?), PipeWriter::from(self.next()?));
                Way {
                    ended: false,
                    pending: Some(Pending::new(reader, writer, *count)),
                }
            }
        })
    }

    fn relay(&mut self, note: &RelayNote) -> io::Result<Relay> {
        Ok(Relay {
            backend: note.backend,
            client: self.stream()?,
            server: self.stream()?,
            ways: Ways {
                up: self.way(&note.up)?,
                down: self.way(&note.down)?,
            },
        })
    }
}

impl FrontHandle {
    /// Brings everything to rest and gives it away: no connection ends, none is refused, and what clients and backends send
    /// waits in the kernel. Takes milliseconds. This front does nothing afterwards.
    pub async fn hand_over(&self) -> Handover {
        let shared = &self.shared;
        shared.handing_over.store(true, Ordering::SeqCst);
        shared.stop.cancel();
        shared.stopped().await;
        shared.kill.cancel();
        shared.tasks.close();
        shared.tasks.wait().await;
        let rest = std::mem::take(&mut *shared.rest());
        let remotes = self.wanted.borrow().remotes.clone();
        let backends = shared.state.borrow().backends.clone();
        Handover::of(rest, &backends, remotes)
    }
}

impl Front {
    /// As [`Front::start`], but goes on with what was handed over. Listeners that `config` does not name any more are closed; where
    /// it names no remote backends, they are those of before.
    pub fn resume(mut config: FrontConfig, handover: Handover) -> Result<FrontHandle, FrontError> {
        let Handover { note, sockets } = handover;
        let mut sockets = Sockets(sockets.into_iter());
        let listeners = note.listeners.iter().map(|address| Ok((*address, sockets.listener()?)));
        let mut open: BTreeMap<_, _> = listeners.collect::<io::Result<_>>().map_err(FrontError::Handover)?;
        let waiting = note.waiting.iter().map(|address| Ok((*address, sockets.stream()?)));
        let waiting: Vec<_> = waiting.collect::<io::Result<_>>().map_err(FrontError::Handover)?;
        let relays = note.relays.iter().map(|relay| sockets.relay(relay));
        let relays: Vec<_> = relays.collect::<io::Result<_>>().map_err(FrontError::Handover)?;
        if config.remote_backends.is_empty() {
            config.remote_backends = note.remotes.into_iter().collect();
        }
        let now = Instant::now();
        let known = note.backends.into_iter().map(|note| {
            let state = BackendState {
                standing: note.standing(),
                last: None,
                since: now.checked_sub(Duration::from_millis(note.for_millis)).unwrap_or(now),
            };
            (note.backend, state)
        });
        let listeners = config.listeners.clone();
        info!(
            relays = relays.len(),
            waiting = waiting.len(),
            "front: goes on with connections"
        );
        let front = Self::begin(config, &mut open, known.collect())?;
        for (address, client) in waiting {
            if let Some(listener) = listeners.iter().find(|listener| listener.address == address) {
                front
                    .shared
                    .tasks
                    .spawn(serve(Arc::clone(&front.shared), *listener, client));
            }
        }
        for relay in relays {
            front.shared.tasks.spawn(relay_on(Arc::clone(&front.shared), relay));
        }
        Ok(front)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_of_other_versions_are_read() {
        let read = |text: &str| serde_json::from_str::<BackendNote>(text).unwrap().standing();
        let older = r#"{"backend":{"local":{"revision":2,"port":6443}},"ready":true,"forMillis":5}"#;
        assert_eq!(read(older), Standing::Up);
        assert_eq!(read(&older.replace("true", "false")), Standing::Down);
        let slow = BackendNote {
            backend: Backend::Remote(([10, 0, 0, 1], 6443).into()),
            ready: false,
            slow: true,
            for_millis: 5,
        };
        assert_eq!(read(&serde_json::to_string(&slow).unwrap()), Standing::Slow);
    }
}
