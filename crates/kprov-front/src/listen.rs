//! Listens, and gives each connection to the best backend that takes it.

use std::future::poll_fn;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Poll;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::time::{sleep, sleep_until};
use tracing::{debug, warn};

use crate::front::{ListenerState, Shared};
use crate::handover::Relay;
use crate::policy::{Backend, Listener, WhenEmpty};
use crate::proxy::{Ways, carry};
use crate::socket::{self, EXHAUSTION_PAUSE};

/// How long to wait before binding an address again that could not be bound.
const BIND_PAUSE: Duration = Duration::from_millis(500);
/// How long a connection that a [`WhenEmpty::Close`] listener has already accepted waits when its backend went away.
const ACCEPTED_HOLD: Duration = Duration::from_secs(1);
/// How long a [`WhenEmpty::TryAll`] connection that nobody takes goes on trying.
const TRY_ALL_HOLD: Duration = Duration::from_secs(2);
/// How long a held connection waits before it tries again backends that it could go to and that refused it.
const RETRY_PAUSE: Duration = Duration::from_millis(50);

/// Serves one listener until the front stops, and leaves its socket to whom the front is handed over.
pub(crate) async fn keep_listening(shared: Arc<Shared>, listener: Listener, mut open: Option<TcpListener>) {
    let serving = serve_listener(&shared, listener, &mut open);
    let _ = shared.stop.run_until_cancelled(serving).await;
    shared
        .rest()
        .listeners
        .extend(open.map(|socket| (listener.address, socket)));
}

/// Serves one listener for ever. It may be cut off at any await point: `open` has its socket then, where it has one.
async fn serve_listener(shared: &Arc<Shared>, listener: Listener, open: &mut Option<TcpListener>) {
    let mut state = shared.state.subscribe();
    let closes = !matches!(listener.when_empty, WhenEmpty::Hold(_) | WhenEmpty::TryAll);
    if open.is_some() {
        shared.set_listener(listener.address, ListenerState::Open);
    }
    loop {
        if closes && !state.borrow_and_update().opens(&listener) {
            if let Some(socket) = open.take() {
                accept_the_last(shared, listener, socket).await;
            }
            shared.set_listener(listener.address, ListenerState::Closed);
            if state.wait_for(|state| state.opens(&listener)).await.is_err() {
                return;
            }
        }
        let socket = match open.take().map_or_else(|| socket::listen(listener.address), Ok) {
            Ok(socket) => open.insert(socket),
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
        let failed = tokio::select! {
            biased;
            () = emptied => false,
            () = accept(shared, listener, socket) => true,
        };
        if failed {
            *open = None;
        }
    }
}

/// Takes what the kernel has accepted already: closing the socket would reset it.
async fn accept_the_last(shared: &Arc<Shared>, listener: Listener, socket: TcpListener) {
    let next = || {
        poll_fn(|context| {
            Poll::Ready(match socket.poll_accept(context) {
                Poll::Ready(Ok((client, _))) => Some(client),
                Poll::Ready(Err(_)) | Poll::Pending => None,
            })
        })
    };
    while let Some(client) = next().await {
        shared.tasks.spawn(serve(Arc::clone(shared), listener, client));
    }
}

/// Accepts connections until the socket itself fails.
async fn accept(shared: &Arc<Shared>, listener: Listener, socket: &TcpListener) {
    loop {
        match socket.accept().await {
            Ok((client, _)) => {
                shared.tasks.spawn(serve(Arc::clone(shared), listener, client));
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

pub(crate) async fn serve(shared: Arc<Shared>, listener: Listener, client: TcpStream) {
    match shared.kill.run_until_cancelled(connect(&shared, listener)).await {
        Some(Some((backend, server))) => {
            let relay = Relay {
                backend,
                client,
                server,
                ways: Ways::default(),
            };
            relay_on(shared, relay).await;
        }
        Some(None) => {
            debug!(address = %listener.address, "front: no backend takes the connection");
            socket::reset_on_close(&client);
        }
        None if shared.handing_over.load(Ordering::SeqCst) => shared.rest().waiting.push((listener.address, client)),
        None => {}
    }
}

/// Carries a connection from where it is.
pub(crate) async fn relay_on(shared: Arc<Shared>, mut relay: Relay) {
    let Relay {
        backend,
        client,
        server,
        ways,
    } = &mut relay;
    let backend = *backend;
    let gate = || {
        let held = backend.is_local() && shared.state.borrow().held;
        held.then(|| {
            let mut state = shared.state.subscribe();
            async move { drop(state.wait_for(|state| !state.held).await) }
        })
    };
    let carried = {
        let tally = shared.tally(backend);
        let _counted = Counted::new(&tally.connections);
        let carrying = carry(client, server, ways, &shared.pipes, gate);
        shared.kill.run_until_cancelled(carrying).await
    };
    match carried {
        Some(Err(error)) => debug!(%backend, %error, "front: connection broke"),
        None if shared.handing_over.load(Ordering::SeqCst) => shared.rest().relays.push(relay),
        Some(Ok(())) | None => {}
    }
}

/// Connects to the best backend that takes the connection, waiting for one as long as the listener allows. Time during which
/// connections are held does not count.
async fn connect(shared: &Shared, listener: Listener) -> Option<(Backend, TcpStream)> {
    let patience = match listener.when_empty {
        WhenEmpty::Close => ACCEPTED_HOLD,
        WhenEmpty::TryAll => TRY_ALL_HOLD,
        WhenEmpty::Hold(hold) | WhenEmpty::CloseUnlessStarting(hold) => hold,
    };
    let mut deadline = tokio::time::Instant::now() + patience;
    let mut was_held = false;
    let cursor = shared.cursor.fetch_add(1, Ordering::Relaxed);
    let mut state = shared.state.subscribe();
    loop {
        let (routes, held) = {
            let state = state.borrow_and_update();
            (state.routes(&listener, cursor), state.held)
        };
        if std::mem::replace(&mut was_held, held) {
            deadline = tokio::time::Instant::now() + patience;
        }
        let found_some = !routes.is_empty();
        for backend in routes {
            match socket::connect(backend.address()).await {
                Ok(server) => return Some((backend, server)),
                Err(error) => {
                    debug!(%backend, %error, "front: backend does not take a connection");
                    if socket::is_exhaustion(&error) {
                        break;
                    }
                    // One that is down is checked all the time anyway.
                    if state.borrow().is_usable(&backend) {
                        shared.tally(backend).suspect.notify_one();
                    }
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
            () = sleep_until(deadline), if !held => return None,
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
