//! A real cluster as a [`Cluster`]: the Kubernetes API is watched for pictures and written for actions.
//!
//! `cache` holds what is watched, `observe` makes a picture of it and `status` a report; both are pure. `act` and the modules
//! beside it write: every write compares the object as it is with what the action expects, carries the resource version it
//! compared, and happens only while the operator leads. Start reading at [`KubeCluster`].

mod access;
mod act;
mod cache;
mod carry_over;
mod drain;
mod ensure;
mod events;
mod facts;
mod findings;
mod observe;
mod orders;
mod releases;
pub mod resources;
mod roll;
mod status;

pub use releases::known_release;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex as SyncMutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use kprov_types::api::{VERSION_UPDATE, VersionUpdateStatus};
use kube::Client;
use serde::Deserialize as _;
use serde_json::json;
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use self::access::{Access, Failure, Part, Permit};
use self::cache::{Cache, DAEMON_SETS, DEPLOYMENTS, KEYS, MACHINES, NODES, PODS, RELEASES, SETTINGS, UPDATES};
use self::events::Events;
use self::observe::Asked;
use self::resources::SlimAny;
use crate::cluster::{Cluster, ClusterError, Outcome};
use crate::model::{Action, Input};
use crate::plan::Plan;

/// How long a picture may wait for the first lists.
const SYNC: Duration = Duration::from_secs(30);
/// What changes with the clock alone is told this often.
const CLOCK: Duration = Duration::from_secs(5);

/// A cluster, as its API tells of it.
pub struct KubeCluster {
    access: Access,
    cache: Arc<Cache>,
    events: Events,
    /// Fills the cache for as long as this lives; empty where it was filled once.
    watches: JoinSet<()>,
    /// The count of changes that the last picture is of.
    looked: AtomicU64,
    /// The generation of the VersionUpdate that the last picture is of.
    generation: AtomicI64,
    lists: Mutex<drain::Lists>,
    checks: SyncMutex<releases::Checks>,
    asking: findings::Asking,
    connect: Option<findings::Connect>,
    endpoints: Mutex<ensure::Endpoints>,
    /// When the status was last written.
    reported: Mutex<Option<Instant>>,
}

/// What became of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Effect {
    /// Something was changed.
    Changed,
    /// It was so already.
    Already,
    /// The cluster is not as expected.
    Stale,
}

impl From<Effect> for Outcome {
    fn from(effect: Effect) -> Self {
        match effect {
            Effect::Changed | Effect::Already => Self::Done,
            Effect::Stale => Self::Stale,
        }
    }
}

impl KubeCluster {
    /// Watches a cluster. `permit` says whether this operator leads, with time enough for a request (10 s at most); it's asked
    /// before every write. `client` must not retry by itself (`kube::Config::default_retry`): the API answers 429 to an
    /// eviction that a budget is against, which is an answer. Has to be called inside a tokio runtime.
    pub fn watch(client: Client, permit: impl Fn() -> bool + Send + Sync + 'static) -> Self {
        let mut cluster = Self::new(client, Arc::new(permit));
        macro_rules! follow {
            ($($kind:ident),*) => {$(
                let (client, cache) = (cluster.access.client.clone(), Arc::clone(&cluster.cache));
                cluster.watches.spawn(async move { $kind.follow(&client, &cache).await });
            )*};
        }
        follow!(
            NODES,
            PODS,
            DAEMON_SETS,
            DEPLOYMENTS,
            MACHINES,
            RELEASES,
            UPDATES,
            SETTINGS,
            KEYS
        );
        cluster
    }

    /// Looks at a cluster once, and never writes: for commands that only tell. Preflight is waited for.
    ///
    /// # Errors
    ///
    /// The API can't be asked.
    pub async fn look(client: Client) -> Result<Self, ClusterError> {
        let cluster = Self::new(client, Arc::new(|| false));
        let (client, cache) = (&cluster.access.client, &*cluster.cache);
        let lists = async {
            tokio::try_join!(
                NODES.list(client, cache),
                PODS.list(client, cache),
                DAEMON_SETS.list(client, cache),
                DEPLOYMENTS.list(client, cache),
                MACHINES.list(client, cache),
                RELEASES.list(client, cache),
                UPDATES.list(client, cache),
                SETTINGS.list(client, cache),
                KEYS.list(client, cache),
            )
        };
        let listed = timeout(SYNC, Box::pin(lists)).await;
        listed
            .map_err(|_| ClusterError::Lost(Box::new(NotSynced)))?
            .map_err(Failure::from)?;
        Ok(cluster)
    }

    fn new(client: Client, permit: Permit) -> Self {
        let cache = Arc::new(Cache::new());
        Self {
            access: Access::new(client.clone(), permit, Arc::clone(&cache)),
            cache,
            events: Events::new(client),
            watches: JoinSet::new(),
            looked: AtomicU64::new(0),
            generation: AtomicI64::new(0),
            lists: Mutex::default(),
            checks: SyncMutex::default(),
            asking: findings::Asking::default(),
            connect: None,
            endpoints: Mutex::default(),
            reported: Mutex::default(),
        }
    }

    /// Lets preflight ask each API server for itself, by its machine's address. API servers count for themselves which
    /// deprecated APIs are in use, so that asking one of several says little.
    #[must_use]
    pub fn reaching(mut self, connect: impl Fn(IpAddr) -> Option<Client> + Send + Sync + 'static) -> Self {
        self.connect = Some(Arc::new(connect));
        self
    }

    /// Resolves once every kind of object was listed.
    pub async fn synced(&self) {
        self.cache.synced().await;
    }

    /// Resolves when something has changed since the last picture that may lead to another plan; at once, if it has already.
    pub async fn changed(&self) {
        let looked = self.looked.load(Ordering::Acquire);
        let mut changes = self.cache.changes();
        // The sender lives as long as `self`.
        let _ = changes.wait_for(|count| *count != looked).await;
    }

    /// Whether this only looks.
    fn is_once(&self) -> bool {
        self.watches.is_empty()
    }

    /// Every Release, by the name of its object, with what was found of it.
    fn checked(&self) -> BTreeMap<String, Arc<releases::Checked>> {
        let mut checks = self.checks.lock().unwrap_or_else(PoisonError::into_inner);
        checks.of(&self.cache.facts())
    }

    /// The releases that are planned with.
    fn known(&self) -> Vec<crate::model::KnownRelease> {
        let checked = self.checked();
        let facts = self.cache.facts();
        let Some(update) = facts.updates.get(VERSION_UPDATE) else {
            return Vec::new();
        };
        let meant = update.spec.as_ref().ok().and_then(|spec| spec.release.as_ref());
        let in_use = observe::in_use(&facts, update);
        releases::choose(
            checked.values().map(|checked| &**checked),
            &in_use,
            &update.desired,
            meant,
        )
    }

    /// Reads the VersionUpdate itself: what is asked for counts as it is now, and where the API doesn't answer, no picture is
    /// good enough to act on.
    async fn refresh_update(&self) -> Result<(), ClusterError> {
        let api: kube::Api<SlimAny> = UPDATES.api(&self.access.client);
        let read = access::optional(self.access.read(api.get(VERSION_UPDATE)).await)?;
        if let Some(object) = read {
            self.cache.wrote(&UPDATES, &object);
        }
        Ok(())
    }

    fn picture(&self, asked: Asked) -> Result<Option<(Input, i64)>, ClusterError> {
        let facts = self.cache.facts();
        let Some(update) = facts.updates.get(VERSION_UPDATE) else {
            return Ok(None);
        };
        let generation = update.generation;
        observe::input(&facts, update, asked, Timestamp::now())
            .map(|input| Some((input, generation)))
            .map_err(|error| ClusterError::Refused { why: error.to_string() })
    }
}

/// Not everything was listed in time.
#[derive(Debug, thiserror::Error)]
#[error("the cluster's objects were not listed within {} s", SYNC.as_secs())]
struct NotSynced;

impl Cluster for KubeCluster {
    async fn observe(&self) -> Result<Option<Input>, ClusterError> {
        let synced = timeout(SYNC, self.cache.synced()).await;
        synced.map_err(|_| ClusterError::Lost(Box::new(NotSynced)))?;
        if !self.is_once() {
            self.refresh_update().await?;
        }
        // What changes from here on is for the next picture.
        self.looked.store(*self.cache.changes().borrow(), Ordering::Release);
        let asked = Asked {
            releases: self.known(),
            drains: self.drains().await?,
            findings: None,
        };
        let Some((mut input, generation)) = self.picture(asked)? else {
            return Ok(None);
        };
        self.generation.store(generation, Ordering::Relaxed);
        let malformed = input.observed.findings.take();
        let found = self.findings(&input, self.is_once()).await;
        input.observed.findings = match (malformed, found) {
            (Some(malformed), found) => Some(malformed.into_iter().chain(found.into_iter().flatten()).collect()),
            (None, found) => found,
        };
        Ok(Some(input))
    }

    async fn act(&self, action: &Action) -> Result<Outcome, ClusterError> {
        self.carry_out(action).await
    }

    async fn report(&self, input: &Input, plan: &Plan) -> Result<(), ClusterError> {
        let (previous, generation) = {
            let facts = self.cache.facts();
            let Some(update) = facts.updates.get(VERSION_UPDATE) else {
                return Ok(());
            };
            (update.status.clone(), self.generation.load(Ordering::Relaxed))
        };
        let status = status::render(input, plan, &previous, generation);
        if status == previous {
            return Ok(());
        }
        let mut reported = self.reported.lock().await;
        let recently = reported.is_some_and(|at| at.elapsed() < CLOCK);
        if recently && status::lasting(&status) == status::lasting(&previous) {
            return Ok(());
        }
        self.write_report(&previous, &status).await?;
        *reported = Some(Instant::now());
        for note in status::notes(&previous, &status) {
            self.tell(note).await;
        }
        Ok(())
    }
}

impl KubeCluster {
    /// Writes what was rendered, and nothing of what actions write.
    async fn write_report(
        &self,
        previous: &VersionUpdateStatus,
        status: &VersionUpdateStatus,
    ) -> Result<(), ClusterError> {
        let Some(live) = self.access.get(&UPDATES, VERSION_UPDATE).await? else {
            return Ok(());
        };
        let mut after = serde_json::to_value(&live).unwrap_or_default();
        let seen = SlimAny::deserialize(&after).map(|object| facts::update(&object));
        let Ok(seen) = seen else { return Ok(()) };
        // The picture is of another: an action, or another operator, was faster. The next report is right again.
        let acted = |status: &VersionUpdateStatus| {
            json!([
                status.current_version,
                status.current_release,
                status.hop_started,
                status.failure,
                status.history
            ])
        };
        if acted(&seen.status) != acted(previous) {
            return Ok(());
        }
        after["status"] = json!(status);
        match self.access.change(&UPDATES, &live, &after, Part::Status).await {
            Ok(()) | Err(Failure::Conflict | Failure::Missing) => Ok(()),
            Err(failure) => Err(failure.into()),
        }
    }
}

#[cfg(test)]
mod tests;
