//! Finds backends and keeps them checked.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use rustls::pki_types::ServerName;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::{MissedTickBehavior, interval, sleep};
use tracing::{info, warn};

use crate::check::Checker;
use crate::discover::ListenTable;
use crate::front::{BackendState, Shared, Wanted};
use crate::health::{Health, LOCAL_INTERVAL, Standing};
use crate::policy::Backend;

/// How often this machine's listening sockets are listed.
const DISCOVERY_INTERVAL: Duration = Duration::from_millis(200);

/// Keeps one health check running for each backend that is wanted or found.
pub(crate) struct Keeper {
    shared: Arc<Shared>,
    wanted: watch::Receiver<Wanted>,
    local: Option<(ListenTable, u16)>,
    name: ServerName<'static>,
    remote_interval: Duration,
    /// Backends that were known before this front began, and are not checked yet.
    known: BTreeMap<Backend, BackendState>,
    checks: HashMap<Backend, AbortHandle>,
}

impl Keeper {
    pub(crate) fn new(
        shared: Arc<Shared>,
        wanted: watch::Receiver<Wanted>,
        local: Option<(ListenTable, u16)>,
        name: ServerName<'static>,
        remote_interval: Duration,
        known: BTreeMap<Backend, BackendState>,
    ) -> Self {
        Self {
            shared,
            wanted,
            local,
            name,
            remote_interval,
            known,
            checks: HashMap::new(),
        }
    }

    pub(crate) async fn run(mut self) {
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
                        let before = self.checks.keys().chain(self.known.keys());
                        backends.extend(before.filter(|backend| backend.is_local()));
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
        let gone: BTreeSet<_> = self
            .checks
            .keys()
            .chain(self.known.keys())
            .filter(|backend| !backends.contains(backend))
            .copied()
            .collect();
        for backend in gone {
            info!(%backend, "front: backend is gone");
            self.known.remove(&backend);
            if let Some(check) = self.checks.remove(&backend) {
                check.abort();
            }
            self.shared.state.send_modify(|state| {
                state.backends.remove(&backend);
            });
        }
        for backend in backends {
            if !self.checks.contains_key(backend) {
                let interval = match backend {
                    Backend::Local { .. } => LOCAL_INTERVAL,
                    Backend::Remote(_) => self.remote_interval,
                };
                let health = if let Some(known) = self.known.remove(backend) {
                    Health::known(known.standing, known.since, interval)
                } else {
                    info!(%backend, "front: backend found");
                    let now = Instant::now();
                    let state = BackendState {
                        standing: Standing::Down,
                        last: None,
                        since: now,
                    };
                    self.shared.state.send_modify(|all| {
                        all.backends.insert(*backend, state);
                    });
                    Health::new(interval, now)
                };
                let check = keep_checking(
                    Arc::clone(&self.shared),
                    *backend,
                    health,
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
            info!(%backend, standing = %health.standing(), reason = %outcome, "front: backend changed");
        }
        shared.state.send_if_modified(|state| {
            let Some(known) = state.backends.get_mut(&backend) else {
                return false;
            };
            let new = BackendState {
                standing: health.standing(),
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
