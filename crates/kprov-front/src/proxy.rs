//! The data path: carries bytes between two TCP connections inside the kernel, by `splice(2)`.
//!
//! A splice needs a pipe between the two sockets. Pipes are borrowed from a pool only while bytes are under way, so a
//! connection that is idle (a watch) holds its two sockets and nothing else.

use std::io::{self, PipeReader, PipeWriter};
use std::net::Shutdown;
use std::sync::{Mutex, PoisonError};

use nix::fcntl::{FcntlArg, SpliceFFlags, fcntl, splice};
use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::TcpStream;

use crate::socket::{EXHAUSTION_PAUSE, is_exhaustion, reset_on_close};

/// Capacity asked for a pipe, in bytes: enough for one direction at full speed. It takes memory only while it is filled.
const PIPE_CAPACITY: i32 = 512 * 1024;
/// At most this many pipes are kept for later.
const SPARE_PIPES: usize = 64;

struct Pipe {
    reader: PipeReader,
    writer: PipeWriter,
}

/// Empty pipes, ready for use.
#[derive(Default)]
pub(crate) struct PipePool(Mutex<Vec<Pipe>>);

impl PipePool {
    fn take(&self) -> io::Result<Pipe> {
        if let Some(pipe) = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop() {
            return Ok(pipe);
        }
        let (reader, writer) = io::pipe()?;
        // A smaller pipe works as well, only slower: the system's limits may forbid it.
        let _ = fcntl(&writer, FcntlArg::F_SETPIPE_SZ(PIPE_CAPACITY));
        Ok(Pipe { reader, writer })
    }

    /// Takes back a pipe, which has to be empty.
    fn give(&self, pipe: Pipe) {
        let mut spare = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if spare.len() < SPARE_PIPES {
            spare.push(pipe);
        }
    }
}

/// How far one direction of a connection is. It holds at every moment: whoever stops carrying can go on from here, even as
/// another program.
#[derive(Default)]
pub(crate) struct Way {
    /// Its sender has ended it, and the receiver was told.
    pub(crate) ended: bool,
    /// Bytes that were read and not written yet.
    pub(crate) pending: Option<Pending>,
}

/// Bytes in a pipe.
pub(crate) struct Pending {
    pipe: Pipe,
    count: usize,
}

impl Pending {
    /// What was handed over: the pipe's ends, and how many bytes are in it.
    pub(crate) fn new(reader: PipeReader, writer: PipeWriter, count: usize) -> Self {
        let pipe = Pipe { reader, writer };
        Self { pipe, count }
    }

    /// The pipe's ends, and how many bytes are in it.
    pub(crate) fn into_parts(self) -> (PipeReader, PipeWriter, usize) {
        let Pipe { reader, writer } = self.pipe;
        (reader, writer, self.count)
    }
}

/// Both directions of a connection.
#[derive(Default)]
pub(crate) struct Ways {
    /// From the client to the backend.
    pub(crate) up: Way,
    /// From the backend to the client.
    pub(crate) down: Way,
}

/// Carries bytes both ways until both sides have ended theirs (half-close is passed on) or one breaks, which resets the
/// other. There is no idle timeout: watches may be silent for as long as they like. What clients send waits until `gate` is
/// open.
///
/// It may be cut off at any await point: `ways` says how far it came.
pub(crate) async fn carry<G: Future<Output = ()>>(
    client: &TcpStream,
    backend: &TcpStream,
    ways: &mut Ways,
    pipes: &PipePool,
    gate: impl Fn() -> Option<G>,
) -> io::Result<()> {
    let Ways { up, down } = ways;
    let always_open = || None::<std::future::Ready<()>>;
    let result = tokio::try_join!(
        one_way(client, backend, up, pipes, gate),
        one_way(backend, client, down, pipes, always_open)
    );
    if result.is_err() {
        reset_on_close(client);
        reset_on_close(backend);
    }
    result.map(drop)
}

async fn one_way<G: Future<Output = ()>>(
    from: &TcpStream,
    to: &TcpStream,
    way: &mut Way,
    pipes: &PipePool,
    gate: impl Fn() -> Option<G>,
) -> io::Result<()> {
    while !way.ended {
        drain(&mut way.pending, to, pipes).await?;
        from.readable().await?;
        while let Some(opened) = gate() {
            opened.await;
        }
        let pipe = borrow(pipes).await?;
        match from.try_io(Interest::READABLE, || {
            move_bytes(from, &pipe.writer, PIPE_CAPACITY as usize)
        }) {
            Ok(0) => {
                pipes.give(pipe);
                match SockRef::from(to).shutdown(Shutdown::Write) {
                    // The peer has closed already: nothing is left to tell it.
                    Err(error) if error.kind() != io::ErrorKind::NotConnected => return Err(error),
                    _ => way.ended = true,
                }
            }
            Ok(count) => way.pending = Some(Pending { pipe, count }),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => pipes.give(pipe),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// A pipe from the pool. While this process is short of file descriptors the connection waits instead of breaking.
async fn borrow(pipes: &PipePool) -> io::Result<Pipe> {
    loop {
        match pipes.take() {
            Err(error) if is_exhaustion(&error) => tokio::time::sleep(EXHAUSTION_PAUSE).await,
            other => return other,
        }
    }
}

/// Moves what is pending from its pipe to the socket.
async fn drain(pending: &mut Option<Pending>, to: &TcpStream, pipes: &PipePool) -> io::Result<()> {
    while let Some(Pending { pipe, count }) = pending {
        to.writable().await?;
        match to.try_io(Interest::WRITABLE, || move_bytes(&pipe.reader, to, *count)) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(moved) => *count -= moved,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        if *count == 0
            && let Some(Pending { pipe, .. }) = pending.take()
        {
            pipes.give(pipe);
        }
    }
    Ok(())
}

fn move_bytes(from: impl std::os::fd::AsFd, to: impl std::os::fd::AsFd, limit: usize) -> io::Result<usize> {
    let flags = SpliceFFlags::SPLICE_F_NONBLOCK | SpliceFFlags::SPLICE_F_MOVE;
    loop {
        match splice(&from, None, &to, None, limit, flags) {
            Err(nix::errno::Errno::EINTR) => {}
            other => return other.map_err(io::Error::from),
        }
    }
}
