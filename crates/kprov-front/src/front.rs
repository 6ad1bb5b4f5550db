//! The front as its owner sees it: what it is started with, what it tells, and what its parts share.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kprov_types::ports;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::net::TcpListener;
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use crate::discover::ListenTable;
use crate::handover::Rest;
use crate::health::{Outcome, REMOTE_INTERVAL, Standing};
use crate::keeper::Keeper;
use crate::listen::keep_listening;
use crate::policy::{Backend, Listener, Pool, WhenEmpty, candidates};
use crate::proxy::PipePool;
use crate::socket;
use crate::trust::{Trust, TrustError};

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
    /// How often a remote backend is checked that is up or slow.
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
    /// A listener that is always open could not be bound.
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
    /// What was handed over is not what was noted of it.
    #[error("what was handed over cannot be used")]
    Handover(#[source] io::Error),
}

/// What is known of one backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackendState {
    /// Whether new connections may go there.
    pub standing: Standing,
    /// What the last check came to; `None` before the first.
    pub last: Option<Outcome>,
    /// Since when `standing` is as it is.
    pub since: Instant,
}

/// What a listener does at the moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListenerState {
    /// It accepts connections.
    Open,
    /// It is closed, as no backend is usable.
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
    /// What is for this machine's own API servers waits ([`FrontHandle::hold`]).
    pub held: bool,
    /// New connections go to other machines ([`FrontHandle::drain_local`]).
    pub draining: bool,
}

impl FrontState {
    /// The backends that are ready: up, and not slow.
    pub fn ready(&self) -> impl Iterator<Item = Backend> {
        self.that_are(Standing::Up)
    }

    /// The backends that take connections and answer, if late: up or slow.
    pub fn usable(&self) -> impl Iterator<Item = Backend> {
        self.ready().chain(self.that_are(Standing::Slow))
    }

    fn that_are(&self, standing: Standing) -> impl Iterator<Item = Backend> {
        self.backends
            .iter()
            .filter(move |(_, state)| state.standing == standing)
            .map(|(backend, _)| *backend)
    }

    pub(crate) fn is_usable(&self, backend: &Backend) -> bool {
        self.backends
            .get(backend)
            .is_some_and(|state| state.standing.is_usable())
    }

    /// Whether the local process of `revision` is ready.
    pub fn revision_ready(&self, revision: u16) -> bool {
        self.ready()
            .any(|backend| matches!(backend, Backend::Local { revision: r, .. } if r == revision))
    }

    /// Whether the listener is to accept connections now.
    pub(crate) fn opens(&self, listener: &Listener) -> bool {
        match listener.when_empty {
            WhenEmpty::Hold(_) | WhenEmpty::TryAll => true,
            _ if self.draining && listener.pool == Pool::Local => false,
            // As it was before: clients of an open one wait.
            _ if self.held => self.listeners.get(&listener.address) == Some(&ListenerState::Open),
            WhenEmpty::CloseUnlessStarting(_) if self.backends.keys().any(Backend::is_local) => true,
            WhenEmpty::CloseUnlessStarting(_) | WhenEmpty::Close => !self.routes(listener, 0).is_empty(),
        }
    }

    /// Where a new connection may go, best first: [`candidates`] among those that are up, and then among slow ones, but for what
    /// is held or drained.
    pub(crate) fn routes(&self, listener: &Listener, cursor: usize) -> Vec<Backend> {
        let goes = |backend: &Backend| !(self.held && backend.is_local());
        let standings = match listener.when_empty {
            WhenEmpty::TryAll => &[Standing::Up, Standing::Slow, Standing::Down][..],
            _ => &[Standing::Up, Standing::Slow][..],
        };
        let of = |standing: &Standing| candidates(listener.pool, self.that_are(*standing).filter(goes), cursor);
        let mut routes: Vec<_> = standings.iter().flat_map(of).collect();
        if self.draining {
            // Stable: remote ones first, each kind in its order.
            routes.sort_by_key(Backend::is_local);
        }
        routes
    }
}

/// What the owner of a front may change while it runs.
#[derive(Clone)]
pub(crate) struct Wanted {
    pub(crate) remotes: BTreeSet<SocketAddr>,
    pub(crate) tls: Arc<ClientConfig>,
}

/// What is kept of a backend besides its health.
#[derive(Default)]
pub(crate) struct Tally {
    pub(crate) connections: AtomicUsize,
    /// Wakes its check at once, on a fresh connection.
    pub(crate) suspect: Notify,
}

pub(crate) struct Shared {
    pub(crate) state: watch::Sender<FrontState>,
    pub(crate) tallies: Mutex<BTreeMap<Backend, Arc<Tally>>>,
    pub(crate) cursor: AtomicUsize,
    pub(crate) pipes: PipePool,
    /// Listeners, and what keeps backends checked.
    own: TaskTracker,
    /// Connections under way.
    pub(crate) tasks: TaskTracker,
    /// No new connections.
    pub(crate) stop: CancellationToken,
    /// No connections at all: they end, or come to rest where the front is handed over.
    pub(crate) kill: CancellationToken,
    pub(crate) handing_over: AtomicBool,
    /// What has come to rest.
    pub(crate) rest: Mutex<Rest>,
}

impl Shared {
    pub(crate) fn tally(&self, backend: Backend) -> Arc<Tally> {
        let mut tallies = self.tallies.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(tallies.entry(backend).or_default())
    }

    /// Waits until listeners and health checks have stopped.
    pub(crate) async fn stopped(&self) {
        self.own.close();
        self.own.wait().await;
    }

    /// What has come to rest.
    pub(crate) fn rest(&self) -> std::sync::MutexGuard<'_, Rest> {
        self.rest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_held(&self, held: bool) {
        info!(held, "front: hold");
        self.state.send_modify(|state| state.held = held);
    }

    fn set_draining(&self, draining: bool) {
        info!(draining, "front: drain");
        self.state.send_modify(|state| state.draining = draining);
    }

    pub(crate) fn set_listener(&self, address: SocketAddr, to: ListenerState) {
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
    /// [`WhenEmpty::Hold`] and [`WhenEmpty::TryAll`] listeners are bound when this returns; the others follow when a backend is
    /// up. The process must ignore SIGPIPE, as Rust programs do by default.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn start(config: FrontConfig) -> Result<FrontHandle, FrontError> {
        Self::begin(config, &mut BTreeMap::new(), BTreeMap::new())
    }

    /// Starts with those of the listening sockets in `open` that `config` names, which it takes out, and with what is `known`
    /// of backends.
    pub(crate) fn begin(
        config: FrontConfig,
        open: &mut BTreeMap<SocketAddr, TcpListener>,
        known: BTreeMap<Backend, BackendState>,
    ) -> Result<FrontHandle, FrontError> {
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
        let mut bind = |listener: Listener| {
            let address = listener.address;
            let bound = match (open.remove(&address), listener.when_empty) {
                (Some(socket), _) => Some(socket),
                (None, WhenEmpty::Hold(_) | WhenEmpty::TryAll) => {
                    Some(socket::listen(address).map_err(|source| FrontError::Bind { address, source })?)
                }
                (None, WhenEmpty::Close | WhenEmpty::CloseUnlessStarting(_)) => None,
            };
            Ok::<_, FrontError>((listener, bound))
        };
        let bound = listeners.into_iter().map(&mut bind).collect::<Result<Vec<_>, _>>()?;

        let (wanted, _) = watch::channel(Wanted {
            remotes: remote_backends.into_iter().collect(),
            tls,
        });
        let shared = Arc::new(Shared {
            state: watch::Sender::new(FrontState {
                backends: known.clone(),
                ..FrontState::default()
            }),
            tallies: Mutex::default(),
            cursor: AtomicUsize::new(0),
            pipes: PipePool::default(),
            own: TaskTracker::new(),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
            kill: CancellationToken::new(),
            handing_over: AtomicBool::new(false),
            rest: Mutex::default(),
        });
        let keeper = Keeper::new(
            Arc::clone(&shared),
            wanted.subscribe(),
            table.zip(local_port),
            name,
            remote_interval,
            known,
        );
        shared
            .own
            .spawn(shared.stop.clone().run_until_cancelled_owned(keeper.run()));
        for (listener, socket) in bound {
            shared.own.spawn(keep_listening(Arc::clone(&shared), listener, socket));
        }
        Ok(FrontHandle { wanted, shared })
    }
}

/// A running front. Dropping it ends it and its connections.
pub struct FrontHandle {
    pub(crate) wanted: watch::Sender<Wanted>,
    pub(crate) shared: Arc<Shared>,
}

/// While it lives, what is for this machine's own API servers waits. Dropping it lets all of that go on.
#[must_use = "nothing waits once it is dropped"]
pub struct Hold {
    shared: Arc<Shared>,
    limit: AbortHandle,
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.limit.abort();
        self.shared.set_held(false);
    }
}

/// While it lives, new connections go to other machines. Dropping it ends that.
#[must_use = "nothing is drained once it is dropped"]
pub struct Drain {
    shared: Arc<Shared>,
}

impl Drop for Drain {
    fn drop(&mut self) {
        self.shared.set_draining(false);
    }
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

    /// Has clients wait instead of fail while something that this machine's API servers need is away, for at most `limit`.
    ///
    /// New connections that can go nowhere else wait; listeners stay as they are, open or closed. On connections to this
    /// machine's API servers, what clients send waits too, and answers go on: requests that are being answered end, later ones
    /// begin when the hold does. Health checks go on. There can be one hold at a time.
    pub fn hold(&self, limit: Duration) -> Hold {
        self.shared.set_held(true);
        let shared = Arc::downgrade(&self.shared);
        let release = tokio::spawn(async move {
            tokio::time::sleep(limit).await;
            if let Some(shared) = shared.upgrade() {
                warn!(?limit, "front: held for too long; clients go on");
                shared.set_held(false);
            }
        });
        Hold {
            shared: Arc::clone(&self.shared),
            limit: release.abort_handle(),
        }
    }

    /// Sends new connections to other machines: listeners of [`Pool::Local`] that may close do, so that load balancers move on,
    /// and [`Pool::LocalThenRemote`] turns round. Connections that are there end by themselves. There can be one at a time.
    pub fn drain_local(&self) -> Drain {
        self.shared.set_draining(true);
        Drain {
            shared: Arc::clone(&self.shared),
        }
    }

    /// Stops listening, lets connections end by themselves for as long as `grace`, and then ends them.
    pub async fn shutdown(self, grace: Duration) {
        self.shared.stop.cancel();
        self.shared.stopped().await;
        drop(std::mem::take(&mut *self.shared.rest()));
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
