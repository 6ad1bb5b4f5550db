//! Looks, decides and acts, for each component, for as long as the process runs.

use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kprov_bootstrap::manifests::NAMESPACE;
use kprov_bootstrap::paths as kubernetes;
use kprov_front::{Backend, FrontState, ListenTable};
use kprov_types::node::Member;
use kprov_types::ports;
use kube::Api;
use kube::api::PostParams;
use tokio::sync::watch;
use tokio::time::Instant;

use super::{Action, ApiSeen, Component, LeaderSeen, LeaseSeen, SelfHosted, decide_api, decide_leader};
use crate::api::{self, ApiError, Identity};
use crate::cri::{Cri, CriError};
use crate::etcd::EtcdClient;
use crate::files::{self, FileError};
use crate::images::Images;
use crate::{https, paths};

/// How often to look while something is about to change.
const BUSY: Duration = Duration::from_millis(500);
/// How often to look while all is well.
const CALM: Duration = Duration::from_secs(5);
/// How long a health endpoint may take.
const HEALTH_LIMIT: Duration = Duration::from_secs(2);
/// How long a client is used until it is made anew with the certificate that is on disk then.
const CLIENT_LIFE: Duration = Duration::from_hours(1);

/// What went wrong with a standby. Everything is tried again.
#[derive(Debug, thiserror::Error)]
pub enum StandbyError {
    /// A file.
    #[error(transparent)]
    File(#[from] FileError),
    /// The container runtime.
    #[error(transparent)]
    Cri(#[from] CriError),
    /// There is no client of the API.
    #[error(transparent)]
    Client(#[from] ApiError),
    /// The API.
    #[error("the Lease `{lease}` cannot be {verb}")]
    Lease {
        /// Its name.
        lease: &'static str,
        /// Read or released.
        verb: &'static str,
        /// Why.
        #[source]
        source: Box<kube::Error>,
    },
    /// The kernel's list of listening sockets.
    #[error("this machine's listening sockets cannot be listed")]
    Sockets(#[source] std::io::Error),
    /// TLS.
    #[error(transparent)]
    Tls(#[from] https::TlsError),
}

/// What the standby of one machine works with.
#[derive(Clone)]
pub struct Standby {
    /// This machine.
    pub me: Member,
    /// Its place among the control-plane machines, from 0.
    pub index: u32,
    /// It is the only control-plane machine.
    pub single: bool,
    /// What the front sees of API servers.
    pub front: watch::Receiver<FrontState>,
    /// The container runtime.
    pub cri: Cri,
    /// The images that are here.
    pub images: Images,
    /// Asks this machine's etcd.
    pub etcd: EtcdClient,
}

fn stored(component: Component) -> Utf8PathBuf {
    Utf8Path::new(paths::STANDBY).join(format!("{}.yaml", component.as_str()))
}

fn placed(component: Component) -> Utf8PathBuf {
    Utf8Path::new(kubernetes::STATIC_PODS).join(format!("{}.yaml", component.as_str()))
}

/// Files on their way into kubelet's directory; beside it, and so on the same file system.
pub const STAGING: &str = "/etc/kubernetes/.kprov-staging";

impl Standby {
    /// Keeps the standby of all components as it should be. Never ends.
    pub async fn run(self) {
        tokio::join!(
            self.clone().keep_api(),
            self.clone().keep_leader(Component::ControllerManager),
            self.keep_leader(Component::Scheduler)
        );
    }

    fn first_boot() -> bool {
        !Utf8Path::new(paths::SELF_HOSTED).exists()
    }

    fn act(component: Component, action: Action) -> Result<(), StandbyError> {
        let place = placed(component);
        match action {
            Action::Keep => {}
            Action::Place => {
                let stored = stored(component);
                let manifest = std::fs::read(&stored).map_err(files::failed("read", &stored))?;
                files::write_through(Utf8Path::new(STAGING), &place, &manifest, 0o600)?;
                tracing::info!(component = component.as_str(), "standby placed");
            }
            Action::Remove => {
                files::remove(&place)?;
                tracing::info!(component = component.as_str(), "standby taken away");
            }
        }
        Ok(())
    }

    async fn keep_api(mut self) {
        let mut silent_since = Some(Instant::now());
        loop {
            let (answers, self_hosted) = look_at_front(&self.front.borrow_and_update());
            silent_since = if answers {
                None
            } else {
                silent_since.or_else(|| Some(Instant::now()))
            };
            let place = placed(Component::ApiServer);
            let placed = place.exists();
            let mut seen = ApiSeen {
                placed,
                first_boot: Self::first_boot(),
                index: self.index,
                able: self.images.has(Component::ApiServer.image()),
                self_hosted,
                silent: silent_since.map(|since| since.elapsed()),
            };
            if seen.able && !placed && seen.silent.is_some() {
                // The only member of a new cluster needs nobody; the API server waits for it by itself.
                seen.able = (self.single && seen.first_boot) || self.etcd.well(self.me.address).await;
            }
            if let Err(error) = Self::act(Component::ApiServer, decide_api(&seen)) {
                tracing::error!(error = crate::chain(&error), "API server standby");
            }
            if matches!(self_hosted, SelfHosted::Ready(_))
                && seen.first_boot
                && let Err(error) = files::write(Utf8Path::new(paths::SELF_HOSTED), b"", 0o600)
            {
                tracing::error!(error = crate::chain(&error), "first boot cannot be marked as over");
            }
            let pause = if seen.placed || seen.silent.is_some() {
                BUSY
            } else {
                CALM
            };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                changed = self.front.changed() => if changed.is_err() { return },
            }
        }
    }

    async fn keep_leader(self, component: Component) {
        let (port, identity) = match component {
            Component::Scheduler => (ports::SCHEDULER, Identity::Scheduler),
            _ => (ports::CONTROLLER_MANAGER, Identity::ControllerManager),
        };
        let mut leader = Leader {
            standby: self,
            component,
            port,
            identity,
            tls: None,
            table: None,
            client: None,
            api_since: None,
            ready: None,
            lease: LeaseWatch::default(),
            standby_holder: None,
            release: false,
        };
        loop {
            let pause = match leader.step().await {
                Ok(pause) => pause,
                Err(error) => {
                    tracing::debug!(component = component.as_str(), error = crate::chain(&error), "standby");
                    BUSY
                }
            };
            tokio::time::sleep(pause).await;
        }
    }
}

/// Whether any API server answers, and how this machine's self-hosted one is.
fn look_at_front(front: &FrontState) -> (bool, SelfHosted) {
    let own = front.backends.iter().filter_map(|(backend, state)| match backend {
        Backend::Local { revision, .. } if *revision > ports::STANDBY_REVISION => Some(state),
        _ => None,
    });
    let mut self_hosted = SelfHosted::Absent;
    for state in own {
        self_hosted = match self_hosted {
            SelfHosted::Ready(since) => SelfHosted::Ready(since),
            _ if state.ready => SelfHosted::Ready(state.since.elapsed()),
            _ => SelfHosted::Starting,
        };
    }
    (front.ready().next().is_some(), self_hosted)
}

/// The standby of one component that is led by Lease.
struct Leader {
    standby: Standby,
    component: Component,
    port: u16,
    identity: Identity,
    tls: Option<std::sync::Arc<rustls::ClientConfig>>,
    table: Option<ListenTable>,
    client: Option<(Instant, Api<Lease>)>,
    api_since: Option<Instant>,
    /// The revision that is ready, and since when.
    ready: Option<(u16, Instant)>,
    lease: LeaseWatch,
    /// What the standby calls itself in the Lease, seen while no other instance ran here.
    standby_holder: Option<String>,
    /// The standby was taken away, and may hold the Lease still.
    release: bool,
}

impl Leader {
    async fn step(&mut self) -> Result<Duration, StandbyError> {
        let self_hosted = self.look().await?;
        let (api, api_listens) = {
            let front = self.standby.front.borrow_and_update();
            let listens = front
                .backends
                .iter()
                .any(|(backend, _)| matches!(backend, Backend::Local { .. }));
            (front.ready().next().is_some(), listens)
        };
        self.api_since = if api {
            self.api_since.or_else(|| Some(Instant::now()))
        } else {
            None
        };
        let placed = placed(self.component).exists();
        if self.release && !placed {
            self.release_lease().await?;
        }
        let healthy = matches!(self_hosted, SelfHosted::Ready(_));
        let mut seen = LeaderSeen {
            placed,
            first_boot: Standby::first_boot(),
            index: self.standby.index,
            able: self.standby.images.has(self.component.image()),
            api_listens,
            api: self.api_since.map(|since| since.elapsed()),
            self_hosted,
            lease: LeaseSeen::Unknown,
        };
        if api && (placed || !healthy) {
            seen.lease = match self.read_lease().await {
                Ok(lease) => self.lease.look(lease.as_ref(), &self.standby.me, Instant::now()),
                Err(error) => {
                    tracing::debug!(error = crate::chain(&error), "unreadable");
                    LeaseSeen::Unknown
                }
            };
            if placed && self_hosted == SelfHosted::Absent && matches!(seen.lease, LeaseSeen::Held { here: true, .. }) {
                self.standby_holder.clone_from(&self.lease.holder);
            }
        }
        let action = decide_leader(&seen);
        Standby::act(self.component, action)?;
        self.release |= action == Action::Remove;
        let settled = healthy && !placed && !self.release;
        Ok(if settled { CALM } else { BUSY })
    }

    /// How this machine's self-hosted instance is, by its own address.
    async fn look(&mut self) -> Result<SelfHosted, StandbyError> {
        let table = match &self.table {
            Some(table) => table,
            None => self
                .table
                .insert(ListenTable::open(self.port).map_err(StandbyError::Sockets)?),
        };
        let revisions = table.revisions().map_err(StandbyError::Sockets)?;
        let newest = revisions
            .into_iter()
            .filter(|revision| *revision > ports::STANDBY_REVISION)
            .max();
        let Some(revision) = newest else {
            self.ready = None;
            return Ok(SelfHosted::Absent);
        };
        let tls = match &self.tls {
            Some(tls) => tls,
            None => self.tls.insert(https::health_client()?),
        };
        let address = ports::revision_address(revision);
        let name = rustls::pki_types::ServerName::from(std::net::IpAddr::from(address));
        let answer = https::get_status(tls, (address, self.port).into(), name, "/healthz", HEALTH_LIMIT).await;
        if !answer.is_ok_and(|status| status.is_success()) {
            self.ready = None;
            return Ok(SelfHosted::Starting);
        }
        let since = match self.ready {
            Some((known, since)) if known == revision => since,
            _ => self.ready.insert((revision, Instant::now())).1,
        };
        Ok(SelfHosted::Ready(since.elapsed()))
    }

    async fn leases(&mut self) -> Result<Api<Lease>, StandbyError> {
        if let Some((made, api)) = &self.client
            && made.elapsed() < CLIENT_LIFE
        {
            return Ok(api.clone());
        }
        let api = Api::namespaced(api::client(self.identity).await?, NAMESPACE);
        self.client = Some((Instant::now(), api.clone()));
        Ok(api)
    }

    async fn read_lease(&mut self) -> Result<Option<Lease>, StandbyError> {
        let lease = self.component.as_str();
        let leases = self.leases().await?;
        let read = leases.get_opt(lease).await;
        read.map_err(|source| StandbyError::Lease {
            lease,
            verb: "read",
            source: Box::new(source),
        })
    }

    /// Gives the Lease free that the standby held, once its container is gone, so that the next leader need not wait for it
    /// to run out. As client-go's `ReleaseOnCancel` does; whoever has taken it meanwhile keeps it.
    async fn release_lease(&mut self) -> Result<(), StandbyError> {
        let name = self.component.as_str();
        let pod = format!("{name}-{}", self.standby.me.name);
        if self.standby.cri.running_containers(NAMESPACE, &pod).await? > 0 {
            return Ok(());
        }
        let Some(mut lease) = self.read_lease().await? else {
            self.release = false;
            return Ok(());
        };
        let spec = lease.spec.get_or_insert_default();
        let held = spec.holder_identity.as_ref().filter(|holder| !holder.is_empty());
        if held.is_some() && held == self.standby_holder.as_ref() {
            let now = MicroTime(Timestamp::now());
            spec.holder_identity = Some(String::new());
            spec.lease_duration_seconds = Some(1);
            spec.renew_time = Some(now.clone());
            spec.acquire_time = Some(now);
            // The resource version that was read goes along: a Lease that has changed since stays as it is.
            match self.leases().await?.replace(name, &PostParams::default(), &lease).await {
                Ok(_) => tracing::info!(lease = name, "released the standby's Lease"),
                Err(kube::Error::Api(status)) if status.is_conflict() => {}
                Err(source) => {
                    return Err(StandbyError::Lease {
                        lease: name,
                        verb: "released",
                        source: Box::new(source),
                    });
                }
            }
        }
        self.release = false;
        self.standby_holder = None;
        Ok(())
    }
}

/// A Lease as it changes before this machine's eyes: what counts is how long it did not change here, not what time another
/// machine's clock wrote into it.
#[derive(Debug, Default)]
struct LeaseWatch {
    holder: Option<String>,
    since: Option<Instant>,
    renewed: Option<(MicroTime, Instant)>,
}

impl LeaseWatch {
    fn look(&mut self, lease: Option<&Lease>, me: &Member, now: Instant) -> LeaseSeen {
        let spec = lease.and_then(|l| l.spec.as_ref());
        let holder = spec
            .and_then(|s| s.holder_identity.clone())
            .filter(|holder| !holder.is_empty());
        if self.since.is_none() || holder != self.holder {
            self.since = Some(now);
            self.holder = holder;
        }
        let renewed = spec
            .and_then(|s| s.renew_time.clone())
            .unwrap_or(MicroTime(Timestamp::UNIX_EPOCH));
        let quiet_since = match &self.renewed {
            Some((time, since)) if *time == renewed => *since,
            _ => self.renewed.insert((renewed, now)).1,
        };
        let held = self.since.map_or(Duration::ZERO, |since| now - since);
        match &self.holder {
            None => LeaseSeen::Free(held),
            Some(holder) => LeaseSeen::Held {
                // client-go's components call themselves after their host and a random id: `<host>_<uuid>`.
                here: holder
                    .strip_prefix(me.name.as_str())
                    .is_some_and(|rest| rest.starts_with('_')),
                quiet: now - quiet_since,
                held,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::coordination::v1::LeaseSpec;

    fn lease(holder: &str, renewed: i64) -> Lease {
        let spec = LeaseSpec {
            holder_identity: Some(holder.into()),
            renew_time: Some(MicroTime(Timestamp::from_second(renewed).unwrap())),
            ..LeaseSpec::default()
        };
        Lease {
            spec: Some(spec),
            ..Lease::default()
        }
    }

    #[test]
    fn leases_are_timed_by_what_is_seen() {
        let me = Member {
            name: "cp-1".parse().unwrap(),
            address: [10, 0, 0, 1].into(),
        };
        let start = Instant::now();
        let mut watch = LeaseWatch::default();
        let mut look = |lease: Option<&Lease>, second| watch.look(lease, &me, start + Duration::from_secs(second));
        let s = Duration::from_secs;
        assert_eq!(look(None, 0), LeaseSeen::Free(s(0)));
        assert_eq!(look(None, 5), LeaseSeen::Free(s(5)));
        // Its clock is years behind, which does not matter.
        let (mine, renewed) = (lease("cp-1_abc", 1), lease("cp-1_abc", 2));
        assert_eq!(
            look(Some(&mine), 6),
            LeaseSeen::Held {
                here: true,
                quiet: s(0),
                held: s(0)
            }
        );
        assert_eq!(
            look(Some(&mine), 9),
            LeaseSeen::Held {
                here: true,
                quiet: s(3),
                held: s(3)
            }
        );
        assert_eq!(
            look(Some(&renewed), 10),
            LeaseSeen::Held {
                here: true,
                quiet: s(0),
                held: s(4)
            }
        );
        let other = lease("cp-10_abc", 2);
        assert_eq!(
            look(Some(&other), 12),
            LeaseSeen::Held {
                here: false,
                quiet: s(2),
                held: s(0)
            }
        );
        assert_eq!(look(Some(&lease("", 2)), 13), LeaseSeen::Free(s(0)));
    }
}
