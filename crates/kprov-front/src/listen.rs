//! Listens, and gives each connection to the best backend that takes it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::time::{sleep, sleep_until};
use tracing::{debug, warn};

use crate::front::{ListenerState, Shared};
use crate::policy::{Backend, Listener, WhenEmpty, candidates};
use crate::proxy::carry;
use crate::socket::{self, EXHAUSTION_PAUSE};

/// How long to wait before binding an address again that could not be bound.
const BIND_PAUSE: Duration = Duration::from_millis(500);
/// How long a connection that a [`WhenEmpty::Close`] listener has already accepted waits when its backend went away.
const ACCEPTED_HOLD: Duration = Duration::from_secs(1);
/// How long a held connection waits before it tries again backends that are said to be ready and refused it.
const RETRY_PAUSE: Duration = Duration::from_millis(50);

/// Serves one listener for ever.
pub(crate) async fn serve_listener(shared: Arc<Shared>, listener: Listener, mut bound: Option<TcpListener>) {
    let mut state = shared.state.subscribe();
    let closes = !matches!(listener.when_empty, WhenEmpty::Hold(_));
    loop {
        if closes && !state.borrow_and_update().opens(&listener) {
            shared.set_listener(listener.address, ListenerState::Closed);
            if state.wait_for(|state| state.opens(&listener)).await.is_err() {
                return;
            }
        }
        let socket = match bound.take().map_or_else(|| socket::listen(listener.address), Ok) {
            Ok(socket) => socket,
            Err(error) => {
                shared.set_listener(listener.address, ListenerState::Failed(error.to_string()));
                sleep(BIND_PAUSE).await;
                continue;
            }
        };
        shared.set_listener(listener.address, ListenerState::Open);
        let emptied = async {
            if closes {
                // The sender lives as long as this task: there is no other end than the condition's.
                drop(state.wait_for(|state| !state.opens(&listener)).await);
            } else {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            biased;
            () = emptied => {}
            () = accept(&shared, listener, &socket) => {}
        }
    }
}

/// Accepts connections until the socket itself fails.
async fn accept(shared: &Arc<Shared>, listener: Listener, socket: &TcpListener) {
    loop {
        match socket.accept().await {
            Ok((client, _)) => {
                let task = serve(Arc::clone(shared), listener, client);
                shared.tasks.spawn(shared.kill.clone().run_until_cancelled_owned(task));
            }
            // Clients wait in the backlog meanwhile.
            Err(error) if socket::is_exhaustion(&error) => {
                warn!(address = %listener.address, %error, "front: cannot accept connections");
                sleep(EXHAUSTION_PAUSE).await;
            }
            // The client was faster to leave (accept(2) lists the errors of the new connection that end up here).
            Err(error) if error.kind() != io::ErrorKind::InvalidInput => {
                debug!(address = %listener.address, %error, "front: lost a connection before it began");
            }
            Err(error) => {
                warn!(address = %listener.address, %error, "front: listening socket failed");
                return;
            }
        }
    }
}

async fn serve(shared: Arc<Shared>, listener: Listener, client: TcpStream) {
    let Some((backend, server)) = connect(&shared, listener).await else {
        debug!(address = %listener.address, "front: no backend is ready");
        socket::reset_on_close(&client);
        return;
    };
    let tally = shared.tally(backend);
    let _counted = Counted::new(&tally.connections);
    if let Err(error) = carry(&client, &server, &shared.pipes).await {
        debug!(%backend, %error, "front: connection broke");
    }
}

/// Connects to the best backend that takes the connection, waiting for one as long as the listener allows.
async fn connect(shared: &Shared, listener: Listener) -> Option<(Backend, TcpStream)> {
    let hold = match listener.when_empty {
        WhenEmpty::Close => ACCEPTED_HOLD,
        WhenEmpty::Hold(hold) | WhenEmpty::CloseUnlessStarting(hold) => hold,
    };
    let deadline = tokio::time::Instant::now() + hold;
    let cursor = shared.cursor.fetch_add(1, Ordering::Relaxed);
    let mut state = shared.state.subscribe();
    loop {
        let ready = candidates(listener.pool, state.borrow_and_update().ready(), cursor);
        let found_some = !ready.is_empty();
        for backend in ready {
            match socket::connect(backend.address()).await {
                Ok(server) => return Some((backend, server)),
                Err(error) => {
                    debug!(%backend, %error, "front: backend does not take a connection");
                    if socket::is_exhaustion(&error) {
                        break;
                    }
                    shared.tally(backend).suspect.notify_one();
                }
            }
        }
        let retry = async {
            if found_some {
                sleep(RETRY_PAUSE).await;
            } else {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            biased;
            () = sleep_until(deadline) => return None,
            changed = state.changed() => if changed.is_err() { return None },
            () = retry => {}
        }
    }
}

/// Counts one connection while it lives.
struct Counted<'a>(&'a AtomicUsize);

impl<'a> Counted<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
