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

/// Carries bytes both ways until both sides have ended theirs (half-close is passed on) or one breaks, which resets the
/// other. There is no idle timeout: watches may be silent for as long as they like.
pub(crate) async fn carry(client: &TcpStream, backend: &TcpStream, pipes: &PipePool) -> io::Result<()> {
    let result = tokio::try_join!(one_way(client, backend, pipes), one_way(backend, client, pipes));
    if result.is_err() {
        reset_on_close(client);
        reset_on_close(backend);
    }
    result.map(drop)
}

async fn one_way(from: &TcpStream, to: &TcpStream, pipes: &PipePool) -> io::Result<()> {
    loop {
        from.readable().await?;
        let pipe = borrow(pipes).await?;
        match from.try_io(Interest::READABLE, || {
            move_bytes(from, &pipe.writer, PIPE_CAPACITY as usize)
        }) {
            Ok(0) => {
                pipes.give(pipe);
                break;
            }
            Ok(count) => {
                drain(&pipe, count, to).await?;
                pipes.give(pipe);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => pipes.give(pipe),
            Err(error) => return Err(error),
        }
    }
    match SockRef::from(to).shutdown(Shutdown::Write) {
        // The peer has closed already: nothing is left to tell it.
        Err(error) if error.kind() != io::ErrorKind::NotConnected => Err(error),
        _ => Ok(()),
    }
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

/// Moves `count` bytes from the pipe to the socket.
async fn drain(pipe: &Pipe, mut count: usize, to: &TcpStream) -> io::Result<()> {
    while count > 0 {
        to.writable().await?;
        match to.try_io(Interest::WRITABLE, || move_bytes(&pipe.reader, to, count)) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(moved) => count -= moved,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
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
