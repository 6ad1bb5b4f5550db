//! Looks, decides and acts, for each component, for as long as the process runs.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kprov_bootstrap::manifests::NAMESPACE;
use kprov_bootstrap::paths as kubernetes;
use kprov_front::health::Standing;
use kprov_front::{Backend, FrontState, ListenTable};
use kprov_types::node::Member;
use kprov_types::ports;
use kube::Api;
use kube::api::PostParams;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::leading::Leading;
use super::process::control_processes;
use super::store::{self, Serve, StoreError};
use super::{Action, ApiSeen, Component, LeaderSeen, LeaseSeen, SelfHosted, decide_api, decide_leader};
use crate::api::{self, ApiError, Identity};
use crate::cri::{Cri, CriError};
use crate::etcd::EtcdClient;
use crate::files::{self, FileError};
use crate::kubelet::place_static_pod;
use crate::{https, images, paths};

/// How often to look while something is about to change.
const BUSY: Duration = Duration::from_millis(500);
/// How often to look while all is well.
const CALM: Duration = Duration::from_secs(5);
/// How long a health endpoint may take.
const HEALTH_LIMIT: Duration = Duration::from_secs(2);
/// How often to see whether the standby's images are still there: kubelet removes what no pod uses when the disk gets full.
const IMAGES: Duration = Duration::from_mins(5);
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
    /// What is on disk.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// There is no standby on disk.
    #[error("there is no standby for `{}` on disk", .0.as_str())]
    Missing(Component),
    /// This machine's processes.
    #[error("this machine's processes cannot be listed")]
    Processes(#[source] std::io::Error),
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
    /// Asks this machine's etcd.
    pub etcd: EtcdClient,
    /// Whether the API server's has to run in any case.
    pub serve: Serve,
    /// Told when a standby is to run and its image is gone.
    pub missing: Arc<Notify>,
}

pub(super) fn placed(component: Component) -> Utf8PathBuf {
    Utf8Path::new(kubernetes::STATIC_PODS).join(format!("{}.yaml", component.as_str()))
}

/// Files on their way into kubelet's directory; beside it, and so on the same file system.
pub const STAGING: &str = "/etc/kubernetes/.kprov-staging";

impl Standby {
    /// Keeps the standby of all components as it should be. Never ends.
    pub async fn run(self) {
        tokio::join!(
            self.clone().keep_api(),
            self.clone().keep_images(),
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
                let stored = store::read()?.ok_or(StandbyError::Missing(component))?;
                let pod = stored.pod(component).ok_or(StandbyError::Missing(component))?;
                place_static_pod(Utf8Path::new(STAGING), &place, pod)?;
                tracing::info!(component = component.as_str(), release = %stored.release, "standby placed");
            }
            Action::Remove => {
                files::remove(&place)?;
                tracing::info!(component = component.as_str(), "standby taken away");
            }
        }
        Ok(())
    }

    /// Whether the image is here that the standby on disk is to run from now. One that is gone is pulled at once.
    async fn has_image(&self, component: Component) -> Result<bool, StandbyError> {
        let stored = store::read()?.ok_or(StandbyError::Missing(component))?;
        let image = stored.image(component).ok_or(StandbyError::Missing(component))?;
        let here = self.cri.has_image(image).await?;
        if !here {
            self.missing.notify_one();
        }
        Ok(here)
    }

    /// The API server's standby could run now.
    async fn is_able(&self, first_boot: bool) -> Result<bool, StandbyError> {
        // The only member of a new cluster needs nobody; the API server waits for it by itself.
        let etcd = (self.single && first_boot) || self.etcd.well(self.me.address).await;
        Ok(etcd && self.has_image(Component::ApiServer).await?)
    }

    /// Has the images of the standby on disk pulled again when they are gone. It may be of another release than the one that
    /// runs, and then nothing else keeps them.
    async fn keep_images(self) {
        loop {
            let silent = self.front.borrow().usable().next().is_none();
            tokio::select! {
                () = tokio::time::sleep(if silent { CALM } else { IMAGES }) => {}
                () = self.missing.notified() => {}
            }
            // At first boot they are on their way.
            let stored = if Self::first_boot() { Ok(None) } else { store::read() };
            let stored = stored.unwrap_or_else(|error| {
                tracing::error!(error = crate::chain(&error), "standby");
                None
            });
            for component in Component::ALL {
                let Some(image) = stored.as_ref().and_then(|stored| stored.image(component)) else {
                    continue;
                };
                if matches!(self.cri.has_image(image).await, Ok(false)) {
                    tracing::warn!(image, "the standby's image is gone, and is pulled again");
                    if let Err(error) = images::ensure(&self.cri, image).await {
                        tracing::error!(image, error = crate::chain(&error), "the standby has no image");
                        tokio::time::sleep(CALM).await;
                    }
                }
            }
        }
    }

    async fn keep_api(mut self) {
        let mut silent_since = Some(Instant::now());
        let mut serve = self.serve.watch();
        loop {
            let (answers, self_hosted) = look_at_front(&self.front.borrow_and_update());
            silent_since = if answers {
                None
            } else {
                silent_since.or_else(|| Some(Instant::now()))
            };
            let mut seen = ApiSeen {
                placed: placed(Component::ApiServer).exists(),
                first_boot: Self::first_boot(),
                index: self.index,
                able: true,
                serve: *serve.borrow_and_update(),
                self_hosted,
                silent: silent_since.map(|since| since.elapsed()),
            };
            let done = async {
                if decide_api(&seen) == Action::Place {
                    seen.able = self.is_able(seen.first_boot).await?;
                }
                Self::act(Component::ApiServer, decide_api(&seen))
            };
            if let Err(error) = done.await {
                tracing::error!(error = crate::chain(&error), "API server standby");
            }
            if matches!(self_hosted, SelfHosted::Ready(_))
                && seen.first_boot
                && let Err(error) = files::write(Utf8Path::new(paths::SELF_HOSTED), b"", 0o600)
            {
                tracing::error!(error = crate::chain(&error), "first boot cannot be marked as over");
            }
            let pause = if seen.placed || seen.serve || seen.silent.is_some() {
                BUSY
            } else {
                CALM
            };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                changed = self.front.changed() => if changed.is_err() { return },
                changed = serve.changed() => if changed.is_err() { return },
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
            leading: Leading::default(),
        };
        loop {
            let pause = match leader.step().await {
                Ok(pause) => pause,
                Err(error) => {
                    tracing::debug!(component = component.as_str(), error = crate::chain(&error), "standby");
                    BUSY
                }
            };
            leader.sleep(pause).await;
        }
    }
}

/// Whether any API server answers, if late, and how this machine's self-hosted one is. A slow one is no reason for another one,
/// which would take from it what it lacks; nor is it a proof that it can do without the standby.
fn look_at_front(front: &FrontState) -> (bool, SelfHosted) {
    let own = front.backends.iter().filter_map(|(backend, state)| match backend {
        Backend::Local { revision, .. } if *revision > ports::STANDBY_REVISION => Some(state),
        _ => None,
    });
    let mut self_hosted = SelfHosted::Absent;
    for state in own {
        self_hosted = match self_hosted {
            SelfHosted::Ready(since) => SelfHosted::Ready(since),
            _ if state.standing == Standing::Up => SelfHosted::Ready(state.since.elapsed()),
            _ => SelfHosted::Starting,
        };
    }
    (front.usable().next().is_some(), self_hosted)
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
    leading: Leading<MicroTime>,
}

impl Leader {
    async fn step(&mut self) -> Result<Duration, StandbyError> {
        let listening = self.listening()?;
        let self_hosted = self.look(&listening).await?;
        let (api, api_listens) = {
            let front = self.standby.front.borrow_and_update();
            let listens = front.backends.keys().any(Backend::is_local);
            // Not a slow one: while the Lease cannot be read or renewed in time, nothing follows from its age.
            (front.ready().next().is_some(), listens)
        };
        self.api_since = if api {
            self.api_since.or_else(|| Some(Instant::now()))
        } else {
            None
        };
        let lease = if api {
            self.look_at_lease(&listening).await
        } else {
            LeaseSeen::Unknown
        };
        let mut seen = LeaderSeen {
            placed: placed(self.component).exists(),
            first_boot: Standby::first_boot(),
            index: self.standby.index,
            able: true,
            api_listens,
            api: self.api_since.map(|since| since.elapsed()),
            self_hosted,
            lease,
        };
        if decide_leader(&seen) == Action::Place {
            seen.able = self.standby.has_image(self.component).await?;
        }
        Standby::act(self.component, decide_leader(&seen))?;
        let ends = self
            .leading
            .revision()
            .is_some_and(|revision| !listening.contains(&revision));
        let settled = matches!(self_hosted, SelfHosted::Ready(_)) && !seen.placed && !ends;
        Ok(if settled { CALM } else { BUSY })
    }

    /// Sleeps, but no longer than until another revision listens, or one no more.
    async fn sleep(&mut self, pause: Duration) {
        let before = self.listening().ok();
        let end = Instant::now() + pause;
        while Instant::now() < end && self.listening().ok() == before {
            tokio::time::sleep(BUSY).await;
        }
    }

    /// The revisions whose processes listen on this machine.
    fn listening(&mut self) -> Result<BTreeSet<u16>, StandbyError> {
        let table = match &self.table {
            Some(table) => table,
            None => self
                .table
                .insert(ListenTable::open(self.port).map_err(StandbyError::Sockets)?),
        };
        table.revisions().map_err(StandbyError::Sockets)
    }

    /// Looks at the Lease, and gives it free when the process of this machine that holds it has ended.
    async fn look_at_lease(&mut self, listening: &BTreeSet<u16>) -> LeaseSeen {
        let looked = async {
            let lease = self.read_lease().await?;
            let seen = self.lease.look(lease.as_ref(), &self.standby.me, Instant::now());
            if self.has_ended(lease.as_ref(), seen, listening)?
                && let Some(lease) = lease
            {
                self.release(lease).await?;
            }
            Ok::<_, StandbyError>(seen)
        };
        looked.await.unwrap_or_else(|error| {
            tracing::debug!(error = crate::chain(&error), "unreadable");
            LeaseSeen::Unknown
        })
    }

    /// Whether the Lease is held by a process of this machine that has ended.
    fn has_ended(
        &mut self,
        lease: Option<&Lease>,
        seen: LeaseSeen,
        listening: &BTreeSet<u16>,
    ) -> Result<bool, StandbyError> {
        let spec = lease.and_then(|lease| lease.spec.as_ref());
        let held = match (seen, spec) {
            (LeaseSeen::Held { here: true, .. }, Some(spec)) => {
                spec.holder_identity.as_deref().zip(spec.renew_time.as_ref())
            }
            _ => None,
        };
        let mut running = listening.clone();
        // A process that no longer listens may hold the Lease while it ends.
        let known = self
            .leading
            .revision()
            .is_some_and(|revision| running.contains(&revision));
        if held.is_some() && !known {
            let processes = control_processes().map_err(StandbyError::Processes)?;
            let own = processes.iter().filter(|process| process.component == self.component);
            running.extend(own.map(|process| process.revision));
        }
        Ok(self.leading.look(held, &running))
    }

    /// How this machine's self-hosted instance is, by its own address.
    async fn look(&mut self, listening: &BTreeSet<u16>) -> Result<SelfHosted, StandbyError> {
        let newest = listening.last().copied();
        let Some(revision) = newest.filter(|revision| *revision > ports::STANDBY_REVISION) else {
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

    /// Gives the Lease free, so that the next leader need not wait for it to run out. As client-go's `ReleaseOnCancel` does;
    /// whoever has taken it meanwhile keeps it.
    async fn release(&mut self, mut lease: Lease) -> Result<(), StandbyError> {
        let name = self.component.as_str();
        let spec = lease.spec.get_or_insert_default();
        let now = MicroTime(Timestamp::now());
        let holder = spec.holder_identity.replace(String::new()).unwrap_or_default();
        spec.lease_duration_seconds = Some(1);
        spec.renew_time = Some(now.clone());
        spec.acquire_time = Some(now);
        // The resource version that was read goes along: a Lease that has changed since stays as it is.
        match self.leases().await?.replace(name, &PostParams::default(), &lease).await {
            Ok(_) => tracing::info!(lease = name, holder, "released the Lease of a leader that has ended"),
            Err(kube::Error::Api(status)) if status.is_conflict() => {}
            Err(source) => {
                return Err(StandbyError::Lease {
                    lease: name,
                    verb: "released",
                    source: Box::new(source),
                });
            }
        }
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
