//! The front as its owner sees it: what it is started with, what it tells, and what its parts share.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kprov_types::ports;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::sync::{Notify, watch};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::info;

use crate::discover::ListenTable;
use crate::health::{Outcome, REMOTE_INTERVAL};
use crate::keeper::Keeper;
use crate::listen::serve_listener;
use crate::policy::{Backend, Listener, WhenEmpty, candidates};
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

    /// Whether the listener is to accept connections now.
    pub(crate) fn opens(&self, listener: &Listener) -> bool {
        let local = |backend: &Backend| matches!(backend, Backend::Local { .. });
        match listener.when_empty {
            WhenEmpty::Hold(_) => true,
            WhenEmpty::CloseUnlessStarting(_) if self.backends.keys().any(local) => true,
            WhenEmpty::CloseUnlessStarting(_) | WhenEmpty::Close => {
                !candidates(listener.pool, self.ready(), 0).is_empty()
            }
        }
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
    /// No connections at all.
    pub(crate) kill: CancellationToken,
}

impl Shared {
    pub(crate) fn tally(&self, backend: Backend) -> Arc<Tally> {
        let mut tallies = self.tallies.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(tallies.entry(backend).or_default())
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
    /// [`WhenEmpty::Hold`] listeners are bound when this returns; the others follow when a backend is
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
            WhenEmpty::Close | WhenEmpty::CloseUnlessStarting(_) => Ok((listener, None)),
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
            own: TaskTracker::new(),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
            kill: CancellationToken::new(),
        });
        let keeper = Keeper::new(
            Arc::clone(&shared),
            wanted.subscribe(),
            table.zip(local_port),
            name,
            remote_interval,
        );
        shared
            .own
            .spawn(shared.stop.clone().run_until_cancelled_owned(keeper.run()));
        for (listener, socket) in bound {
            let task = serve_listener(Arc::clone(&shared), listener, socket);
            shared.own.spawn(shared.stop.clone().run_until_cancelled_owned(task));
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
        self.shared.own.close();
        self.shared.own.wait().await;
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
