//! The front: finds and checks backends, listens, and hands connections to the data path.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kprov_types::ports;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;
use tokio::time::{MissedTickBehavior, interval, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, info, warn};

use crate::check::Checker;
use crate::discover::ListenTable;
use crate::health::{Health, LOCAL_INTERVAL, Outcome, REMOTE_INTERVAL};
use crate::policy::{Backend, Listener, WhenEmpty, candidates};
use crate::proxy::{PipePool, carry};
use crate::socket::{self, EXHAUSTION_PAUSE};
use crate::trust::{Trust, TrustError};

/// How often this machine's listening sockets are listed.
const DISCOVERY_INTERVAL: Duration = Duration::from_millis(200);
/// How long to wait before binding an address again that could not be bound.
const BIND_PAUSE: Duration = Duration::from_millis(500);
/// How long a connection that a [`WhenEmpty::Close`] listener has already accepted waits when its backend went away.
const ACCEPTED_HOLD: Duration = Duration::from_secs(1);
/// How long a held connection waits before it tries again backends that are said to be ready and refused it.
const RETRY_PAUSE: Duration = Duration::from_millis(50);

/// What a front is started with.
#[derive(Clone, Debug)]
pub struct FrontConfig {
    /// Where it listens.
    pub listeners: Vec<Listener>,
    /// How health checks verify backends.
    pub trust: Trust,
    /// The name that backends' certificates must be valid for.
    pub server_name: String,
    /// The port on which local revisions are looked for; `None` looks for none.
    pub local_port: Option<u16>,
    /// The remote backends to begin with ([`FrontHandle::set_remote_backends`]).
    pub remote_backends: Vec<SocketAddr>,
    /// How often a ready remote backend is checked.
    pub remote_interval: Duration,
}

impl FrontConfig {
    /// The name under which every API server of a cluster knows itself.
    pub const SERVER_NAME: &str = "kubernetes";

    /// For a control-plane machine: these listeners, local revisions on [`ports::API`], the cluster's CA (PEM).
    pub fn control_plane(listeners: Vec<Listener>, ca: String) -> Self {
        Self {
            local_port: Some(ports::API),
            ..Self::worker(listeners, ca)
        }
    }

    /// For a worker: these listeners, no local revisions, the cluster's CA (PEM).
    pub fn worker(listeners: Vec<Listener>, ca: String) -> Self {
        Self {
            listeners,
            trust: Trust::Ca(ca),
            server_name: Self::SERVER_NAME.into(),
            local_port: None,
            remote_backends: Vec::new(),
            remote_interval: REMOTE_INTERVAL,
        }
    }
}

/// Why a front could not start.
#[derive(Debug, thiserror::Error)]
pub enum FrontError {
    /// Health checks cannot verify anything with this CA.
    #[error("health checks cannot be set up")]
    Trust(#[from] TrustError),
    /// The server name is no DNS name or address.
    #[error("`{0}` is not a server name")]
    ServerName(String),
    /// A [`WhenEmpty::Hold`] listener could not be bound.
    #[error("cannot listen on `{address}`")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// The kernel's socket listing is not available.
    #[error("cannot list this machine's listening sockets")]
    Discovery(#[source] io::Error),
}

/// What is known of one backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackendState {
    /// Whether new connections may go there.
    pub ready: bool,
    /// What the last check came to; `None` before the first.
    pub last: Option<Outcome>,
    /// Since when `ready` is as it is.
    pub since: Instant,
}

/// What a listener does at the moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListenerState {
    /// It accepts connections.
    Open,
    /// It is closed, as no backend is ready.
    Closed,
    /// It cannot be bound, in words; tried again and again.
    Failed(String),
}

/// A front's state: changes when a backend comes, goes, or has another outcome than before, or a listener changes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FrontState {
    /// All known backends.
    pub backends: BTreeMap<Backend, BackendState>,
    /// All listeners, by address.
    pub listeners: BTreeMap<SocketAddr, ListenerState>,
}

impl FrontState {
    /// The backends that are ready.
    pub fn ready(&self) -> impl Iterator<Item = Backend> {
        self.backends
            .iter()
            .filter(|(_, state)| state.ready)
            .map(|(backend, _)| *backend)
    }

    /// Whether the local process of `revision` is ready.
    pub fn revision_ready(&self, revision: u16) -> bool {
        self.ready()
            .any(|backend| matches!(backend, Backend::Local { revision: r, .. } if r == revision))
    }

    fn serves(&self, listener: &Listener) -> bool {
        !candidates(listener.pool, self.ready(), 0).is_empty()
    }
}

/// What the owner of a front may change while it runs.
#[derive(Clone)]
struct Wanted {
    remotes: BTreeSet<SocketAddr>,
    tls: Arc<ClientConfig>,
}

/// What is kept of a backend besides its health.
#[derive(Default)]
struct Tally {
    connections: AtomicUsize,
    /// Wakes its check at once, on a fresh connection.
    suspect: Notify,
}

struct Shared {
    state: watch::Sender<FrontState>,
    tallies: Mutex<BTreeMap<Backend, Arc<Tally>>>,
    cursor: AtomicUsize,
    pipes: PipePool,
    /// Connections under way.
    tasks: TaskTracker,
    /// No new connections.
    stop: CancellationToken,
    /// No connections at all.
    kill: CancellationToken,
}

impl Shared {
    fn tally(&self, backend: Backend) -> Arc<Tally> {
        let mut tallies = self.tallies.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(tallies.entry(backend).or_default())
    }

    fn set_listener(&self, address: SocketAddr, to: ListenerState) {
        self.state.send_if_modified(|state| {
            let changed = state.listeners.get(&address) != Some(&to);
            if changed {
                info!(%address, state = ?to, "front: listener");
                state.listeners.insert(address, to);
            }
            changed
        });
    }
}

/// Starts fronts.
pub struct Front;

impl Front {
    /// Starts a front on the current tokio runtime.
    ///
    /// [`WhenEmpty::Hold`] listeners are bound when this returns; [`WhenEmpty::Close`] ones follow when a backend is
    /// ready. The process must ignore SIGPIPE, as Rust programs do by default.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn start(config: FrontConfig) -> Result<FrontHandle, FrontError> {
        let FrontConfig {
            listeners,
            trust,
            server_name,
            local_port,
            remote_backends,
            remote_interval,
        } = config;
        let tls = trust.client_config()?;
        let name = ServerName::try_from(server_name.clone()).map_err(|_| FrontError::ServerName(server_name))?;
        let table = local_port
            .map(ListenTable::open)
            .transpose()
            .map_err(FrontError::Discovery)?;
        let bind = |listener: Listener| match listener.when_empty {
            WhenEmpty::Close => Ok((listener, None)),
            WhenEmpty::Hold(_) => match socket::listen(listener.address) {
                Ok(socket) => Ok((listener, Some(socket))),
                Err(source) => Err(FrontError::Bind {
                    address: listener.address,
                    source,
                }),
            },
        };
        let bound = listeners.into_iter().map(bind).collect::<Result<Vec<_>, _>>()?;

        let (wanted, _) = watch::channel(Wanted {
            remotes: remote_backends.into_iter().collect(),
            tls,
        });
        let shared = Arc::new(Shared {
            state: watch::Sender::new(FrontState::default()),
            tallies: Mutex::default(),
            cursor: AtomicUsize::new(0),
            pipes: PipePool::default(),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
            kill: CancellationToken::new(),
        });
        let keeper = Keeper {
            shared: Arc::clone(&shared),
            wanted: wanted.subscribe(),
            local: table.zip(local_port),
            name,
            remote_interval,
            checks: HashMap::new(),
        };
        tokio::spawn(shared.stop.clone().run_until_cancelled_owned(keeper.run()));
        for (listener, socket) in bound {
            let task = serve_listener(Arc::clone(&shared), listener, socket);
            tokio::spawn(shared.stop.clone().run_until_cancelled_owned(task));
        }
        Ok(FrontHandle { wanted, shared })
    }
}

/// A running front. Dropping it ends it and its connections.
pub struct FrontHandle {
    wanted: watch::Sender<Wanted>,
    shared: Arc<Shared>,
}

impl FrontHandle {
    /// Replaces the list of remote backends. Connections to those that are gone stay until they end.
    pub fn set_remote_backends(&self, backends: Vec<SocketAddr>) {
        let remotes = backends.into_iter().collect();
        self.wanted.send_if_modified(|wanted| {
            let changed = wanted.remotes != remotes;
            wanted.remotes = remotes;
            changed
        });
    }

    /// Replaces what health checks verify by, for a CA that is rotated.
    pub fn set_trust(&self, trust: &Trust) -> Result<(), TrustError> {
        let tls = trust.client_config()?;
        self.wanted.send_modify(|wanted| wanted.tls = tls);
        Ok(())
    }

    /// The front's state, now and as it changes.
    pub fn watch(&self) -> watch::Receiver<FrontState> {
        self.shared.state.subscribe()
    }

    /// How many connections each backend carries now. A backend that no longer listens stays here until its last
    /// connection ends.
    pub fn connections(&self) -> BTreeMap<Backend, usize> {
        let tallies = self.shared.tallies.lock().unwrap_or_else(PoisonError::into_inner);
        tallies
            .iter()
            .map(|(backend, tally)| (*backend, tally.connections.load(Ordering::Relaxed)))
            .collect()
    }

    /// Stops listening, lets connections end by themselves for as long as `grace`, and then ends them.
    pub async fn shutdown(self, grace: Duration) {
        self.shared.stop.cancel();
        self.shared.tasks.close();
        // Out of time is an ordinary end: watches don't end by themselves.
        let _ = timeout(grace, self.shared.tasks.wait()).await;
        self.shared.kill.cancel();
        self.shared.tasks.wait().await;
    }
}

impl Drop for FrontHandle {
    fn drop(&mut self) {
        self.shared.stop.cancel();
        self.shared.kill.cancel();
    }
}

/// Keeps one health check running for each backend that is wanted or found.
struct Keeper {
    shared: Arc<Shared>,
    wanted: watch::Receiver<Wanted>,
    local: Option<(ListenTable, u16)>,
    name: ServerName<'static>,
    remote_interval: Duration,
    checks: HashMap<Backend, AbortHandle>,
}

impl Keeper {
    async fn run(mut self) {
        let mut ticks = interval(DISCOVERY_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut listing_failed = false;
        loop {
            let mut backends: BTreeSet<Backend> = self
                .wanted
                .borrow_and_update()
                .remotes
                .iter()
                .copied()
                .map(Backend::Remote)
                .collect();
            if let Some((table, port)) = &self.local {
                match table.revisions() {
                    Ok(found) => {
                        listing_failed = false;
                        backends.extend(
                            found
                                .into_iter()
                                .map(|revision| Backend::Local { revision, port: *port }),
                        );
                    }
                    Err(error) => {
                        // What was found before stays; its health checks tell whether it is still there.
                        backends.extend(self.checks.keys().filter(|b| matches!(b, Backend::Local { .. })));
                        if !std::mem::replace(&mut listing_failed, true) {
                            warn!(%error, "front: cannot list this machine's listening sockets");
                        }
                    }
                }
            }
            self.keep(&backends);
            tokio::select! {
                _ = ticks.tick(), if self.local.is_some() => {}
                changed = self.wanted.changed() => if changed.is_err() { return },
            }
        }
    }

    fn keep(&mut self, backends: &BTreeSet<Backend>) {
        let gone: Vec<_> = self
            .checks
            .keys()
            .filter(|backend| !backends.contains(backend))
            .copied()
            .collect();
        for backend in gone {
            info!(%backend, "front: backend is gone");
            if let Some(check) = self.checks.remove(&backend) {
                check.abort();
            }
            self.shared.state.send_modify(|state| {
                state.backends.remove(&backend);
            });
        }
        for backend in backends {
            if !self.checks.contains_key(backend) {
                info!(%backend, "front: backend found");
                let now = Instant::now();
                let state = BackendState {
                    ready: false,
                    last: None,
                    since: now,
                };
                self.shared.state.send_modify(|all| {
                    all.backends.insert(*backend, state);
                });
                let interval = match backend {
                    Backend::Local { .. } => LOCAL_INTERVAL,
                    Backend::Remote(_) => self.remote_interval,
                };
                let check = keep_checking(
                    Arc::clone(&self.shared),
                    *backend,
                    Health::new(interval, now),
                    self.name.clone(),
                    self.wanted.clone(),
                );
                self.checks.insert(*backend, tokio::spawn(check).abort_handle());
            }
        }
        let mut tallies = self.shared.tallies.lock().unwrap_or_else(PoisonError::into_inner);
        tallies.retain(|backend, tally| backends.contains(backend) || Arc::strong_count(tally) > 1);
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        for check in self.checks.values() {
            check.abort();
        }
    }
}

async fn keep_checking(
    shared: Arc<Shared>,
    backend: Backend,
    mut health: Health,
    name: ServerName<'static>,
    mut wanted: watch::Receiver<Wanted>,
) {
    let tally = shared.tally(backend);
    let mut tls = Arc::clone(&wanted.borrow_and_update().tls);
    let mut checker = Checker::new(backend.address(), name.clone(), Arc::clone(&tls));
    let mut fresh = false;
    loop {
        let outcome = checker.check(fresh).await;
        let now = Instant::now();
        let changed = health.observe(outcome, now);
        if changed {
            info!(%backend, ready = health.is_ready(), reason = %outcome, "front: backend changed");
        }
        shared.state.send_if_modified(|state| {
            let Some(known) = state.backends.get_mut(&backend) else {
                return false;
            };
            let new = BackendState {
                ready: health.is_ready(),
                last: Some(outcome),
                since: if changed { now } else { known.since },
            };
            std::mem::replace(known, new) != new
        });
        let pause = sleep(health.pause(now));
        tokio::select! {
            () = pause => fresh = false,
            () = tally.suspect.notified() => fresh = true,
            changed = wanted.changed() => if changed.is_err() { return },
        }
        let now_wanted = Arc::clone(&wanted.borrow_and_update().tls);
        if !Arc::ptr_eq(&tls, &now_wanted) {
            tls = now_wanted;
            checker = Checker::new(backend.address(), name.clone(), Arc::clone(&tls));
        }
    }
}

async fn serve_listener(shared: Arc<Shared>, listener: Listener, mut bound: Option<TcpListener>) {
    let mut state = shared.state.subscribe();
    let closes = listener.when_empty == WhenEmpty::Close;
    loop {
        if closes && !state.borrow_and_update().serves(&listener) {
            shared.set_listener(listener.address, ListenerState::Closed);
            if state.wait_for(|state| state.serves(&listener)).await.is_err() {
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
                drop(state.wait_for(|state| !state.serves(&listener)).await);
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
        WhenEmpty::Hold(hold) => hold,
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
