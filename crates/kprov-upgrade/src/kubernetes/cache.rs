//! What is known of the cluster without asking: watched objects, reduced to the fields that matter.
//!
//! Each kind has one [`Store`]; a watch fills it, and so does every write made here ([`Store::wrote`]), so that the next
//! picture is never older than what was done for the last one.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::pin::pin;
use std::sync::{Mutex, MutexGuard, PoisonError};

use futures::{Stream, StreamExt as _};
use kprov_bootstrap::manifests::{NAMESPACE, SETTINGS_CONFIG_MAP};
use kprov_types::api::RELEASE_KEYS_CONFIG_MAP;
use kube::api::{Api, ListParams};
use kube::core::{ApiResource, DynamicResourceScope};
use kube::runtime::watcher::{self, Event};
use kube::runtime::{WatchStreamExt as _, watcher as watch_objects};
use kube::{Client, Resource};
use serde::de::DeserializeOwned;
use tokio::sync::watch;

use super::facts::{
    MachineFacts, NodeFacts, PodFacts, ReleaseFacts, UpdateFacts, WorkloadFacts, machine, map, node, pod, release,
    update, workload,
};
use super::resources::{self, Slim, apps, core};

/// Objects a page of a list. What of an object isn't kept lives as long as its page.
const PAGE: u32 = 100;
/// How long one watch request lasts, in seconds: as long as a connection can be dead before that is noticed.
const WATCH_SECONDS: u32 = 60;
/// The label of everything that kprov runs.
const OURS: &str = "app.kubernetes.io/managed-by=kprov";

/// An object as kept.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Entry<F> {
    pub(super) uid: String,
    /// The object's resource version, which only orders what is seen of one object; 0 where it's no number.
    version: u64,
    pub(super) facts: F,
}

/// All objects of a kind, by name.
#[derive(Debug)]
pub(super) struct Store<F> {
    entries: BTreeMap<String, Entry<F>>,
    /// What a list has brought so far.
    listing: BTreeMap<String, Entry<F>>,
    complete: bool,
}

impl<F> Default for Store<F> {
    fn default() -> Self {
        Self {
            entries: BTreeMap::new(),
            listing: BTreeMap::new(),
            complete: false,
        }
    }
}

impl<F: PartialEq> Store<F> {
    pub(super) fn get(&self, name: &str) -> Option<&F> {
        self.entries.get(name).map(|entry| &entry.facts)
    }

    pub(super) fn entry(&self, name: &str) -> Option<&Entry<F>> {
        self.entries.get(name)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, &F)> {
        self.entries.iter().map(|(name, entry)| (name.as_str(), &entry.facts))
    }

    /// Takes an event of the watch; returns whether anything that is kept has changed.
    fn take(&mut self, event: Event<(String, Entry<F>)>) -> bool {
        match event {
            Event::Apply((name, entry)) => self.set(&name, entry),
            Event::Delete((name, _)) => self.entries.remove(&name).is_some(),
            Event::Init => {
                self.listing.clear();
                false
            }
            Event::InitApply((name, entry)) => {
                self.listing.insert(name, entry);
                false
            }
            Event::InitDone => {
                let listed = std::mem::take(&mut self.listing);
                let first = !std::mem::replace(&mut self.complete, true);
                let same = listed.len() == self.entries.len()
                    && listed
                        .iter()
                        .zip(&self.entries)
                        .all(|((a, new), (b, old))| a == b && new.facts == old.facts);
                self.entries = listed;
                first || !same
            }
        }
    }

    fn set(&mut self, name: &str, entry: Entry<F>) -> bool {
        if let Some(known) = self.entries.get(name)
            && known.uid == entry.uid
            && known.version > entry.version
            && entry.version != 0
        {
            return false;
        }
        if let Some(known) = self.entries.get_mut(name) {
            let old = std::mem::replace(known, entry);
            return old.facts != known.facts;
        }
        self.entries.insert(name.to_owned(), entry);
        true
    }

    /// Takes what the API gave back for a write. An object that isn't known any more stays so: the watch is ahead.
    fn wrote(&mut self, name: &str, entry: Entry<F>) -> bool {
        match self.entries.get(name) {
            Some(known) if known.uid == entry.uid => self.set(name, entry),
            _ => false,
        }
    }
}

/// Everything that is kept.
#[derive(Debug, Default)]
pub(super) struct Facts {
    pub(super) nodes: Store<NodeFacts>,
    pub(super) pods: Store<PodFacts>,
    pub(super) daemon_sets: Store<WorkloadFacts>,
    pub(super) deployments: Store<WorkloadFacts>,
    pub(super) machines: Store<MachineFacts>,
    pub(super) releases: Store<ReleaseFacts>,
    pub(super) updates: Store<UpdateFacts>,
    /// The one ConfigMap with the settings.
    pub(super) settings: Store<BTreeMap<String, String>>,
    /// The one ConfigMap with the keys that releases must be signed by.
    pub(super) keys: Store<BTreeMap<String, String>>,
}

impl Facts {
    fn complete(&self) -> bool {
        self.nodes.complete
            && self.pods.complete
            && self.daemon_sets.complete
            && self.deployments.complete
            && self.machines.complete
            && self.releases.complete
            && self.updates.complete
            && self.settings.complete
            && self.keys.complete
    }

    /// The facts of a DaemonSet or Deployment of kprov's.
    pub(super) fn workload(&self, name: &str) -> Option<&WorkloadFacts> {
        self.daemon_sets.get(name).or_else(|| self.deployments.get(name))
    }
}

/// The facts, and a count of their changes.
#[derive(Debug)]
pub(super) struct Cache {
    facts: Mutex<Facts>,
    changes: watch::Sender<u64>,
}

impl Cache {
    pub(super) fn new() -> Self {
        Self {
            facts: Mutex::default(),
            changes: watch::Sender::new(0),
        }
    }

    pub(super) fn facts(&self) -> MutexGuard<'_, Facts> {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Waits until every kind was listed once.
    pub(super) async fn synced(&self) {
        let mut changes = self.changes();
        // Each list that is done counts as a change.
        while !self.facts().complete() {
            if changes.changed().await.is_err() {
                return;
            }
        }
    }

    /// Says that something changed which is no watched object.
    pub(super) fn poke(&self) {
        self.changes.send_modify(|count| *count += 1);
    }

    fn change(&self, change: impl FnOnce(&mut Facts) -> bool) {
        let changed = change(&mut self.facts());
        if changed {
            self.poke();
        }
    }

    /// Takes what a write of a kind gave back.
    pub(super) fn wrote<S, T, F: PartialEq>(&self, kind: &Kind<S, T, F>, object: &Slim<S, T>) {
        let (name, entry) = kind.entry(object);
        self.change(|facts| (kind.store)(facts).wrote(&name, entry));
    }
}

/// A kind that is watched: which objects, where they are kept, and what of them.
pub(super) struct Kind<S, T, F> {
    resource: fn() -> ApiResource,
    namespace: Option<&'static str>,
    labels: Option<&'static str>,
    /// One object alone.
    name: Option<&'static str>,
    store: fn(&mut Facts) -> &mut Store<F>,
    read: fn(&Slim<S, T>) -> F,
}

pub(super) type NodeKind = Kind<resources::NodeSpec, resources::NodeStatus, NodeFacts>;
pub(super) type PodKind = Kind<resources::PodSpec, resources::PodStatus, PodFacts>;
pub(super) type WorkloadKind = Kind<resources::WorkloadSpec, resources::WorkloadStatus, WorkloadFacts>;
pub(super) type OwnKind<F> = Kind<serde_json::Value, serde_json::Value, F>;

pub(super) const NODES: NodeKind = Kind {
    resource: || core("Node", "nodes"),
    namespace: None,
    labels: None,
    name: None,
    store: |facts| &mut facts.nodes,
    read: node,
};
pub(super) const PODS: PodKind = Kind {
    resource: || core("Pod", "pods"),
    namespace: Some(NAMESPACE),
    labels: Some(OURS),
    name: None,
    store: |facts| &mut facts.pods,
    read: pod,
};
pub(super) const DAEMON_SETS: WorkloadKind = Kind {
    resource: || apps("DaemonSet", "daemonsets"),
    namespace: Some(NAMESPACE),
    labels: Some(OURS),
    name: None,
    store: |facts| &mut facts.daemon_sets,
    read: workload,
};
pub(super) const DEPLOYMENTS: WorkloadKind = Kind {
    resource: || apps("Deployment", "deployments"),
    namespace: Some(NAMESPACE),
    labels: Some(OURS),
    name: None,
    store: |facts| &mut facts.deployments,
    read: workload,
};
pub(super) const MACHINES: OwnKind<MachineFacts> = Kind {
    resource: resources::machines,
    namespace: None,
    labels: None,
    name: None,
    store: |facts| &mut facts.machines,
    read: machine,
};
pub(super) const RELEASES: OwnKind<ReleaseFacts> = Kind {
    resource: resources::releases,
    namespace: None,
    labels: None,
    name: None,
    store: |facts| &mut facts.releases,
    read: release,
};
pub(super) const UPDATES: OwnKind<UpdateFacts> = Kind {
    resource: resources::version_updates,
    namespace: None,
    labels: None,
    name: None,
    store: |facts| &mut facts.updates,
    read: update,
};
pub(super) const SETTINGS: OwnKind<BTreeMap<String, String>> = Kind {
    resource: || core("ConfigMap", "configmaps"),
    namespace: Some(NAMESPACE),
    labels: None,
    name: Some(SETTINGS_CONFIG_MAP),
    store: |facts| &mut facts.settings,
    read: map,
};
pub(super) const KEYS: OwnKind<BTreeMap<String, String>> = Kind {
    resource: || core("ConfigMap", "configmaps"),
    namespace: Some(NAMESPACE),
    labels: None,
    name: Some(RELEASE_KEYS_CONFIG_MAP),
    store: |facts| &mut facts.keys,
    read: map,
};

impl<S, T, F> Kind<S, T, F> {
    /// The API of the kind, with its objects as `K`.
    pub(super) fn api<K>(&self, client: &Client) -> Api<K>
    where
        K: Resource<DynamicType = ApiResource, Scope = DynamicResourceScope>,
    {
        let resource = (self.resource)();
        match self.namespace {
            Some(namespace) => Api::namespaced_with(client.clone(), namespace, &resource),
            None => Api::all_with(client.clone(), &resource),
        }
    }
}

impl<S, T, F> Kind<S, T, F> {
    fn entry(&self, object: &Slim<S, T>) -> (String, Entry<F>) {
        let version = object.metadata.resource_version.as_deref();
        let entry = Entry {
            uid: object.metadata.uid.clone().unwrap_or_default(),
            version: version.and_then(|v| v.parse().ok()).unwrap_or(0),
            facts: (self.read)(object),
        };
        (object.name().to_owned(), entry)
    }
}

impl<S, T, F> Kind<S, T, F>
where
    S: Clone + Debug + Default + DeserializeOwned + Send + 'static,
    T: Clone + Debug + Default + DeserializeOwned + Send + 'static,
    F: PartialEq,
{
    fn take(&self, cache: &Cache, event: Event<Slim<S, T>>) {
        let event = match event {
            Event::Apply(object) => Event::Apply(self.entry(&object)),
            Event::Delete(object) => Event::Delete(self.entry(&object)),
            Event::InitApply(object) => Event::InitApply(self.entry(&object)),
            Event::Init => Event::Init,
            Event::InitDone => Event::InitDone,
        };
        cache.change(|facts| (self.store)(facts).take(event));
    }

    fn events(&self, client: &Client) -> impl Stream<Item = watcher::Result<Event<Slim<S, T>>>> + Send + use<S, T, F> {
        let mut config = watcher::Config::default().page_size(PAGE).timeout(WATCH_SECONDS);
        if let Some(labels) = self.labels {
            config = config.labels(labels);
        }
        if let Some(name) = self.name {
            config = config.fields(&format!("metadata.name={name}"));
        }
        watch_objects(self.api(client), config).default_backoff()
    }

    /// Keeps the store as the API has it, for as long as it's polled.
    pub(super) async fn follow(&self, client: &Client, cache: &Cache) {
        let mut events = pin!(self.events(client));
        while let Some(event) = events.next().await {
            match event {
                Ok(event) => self.take(cache, event),
                Err(error) => {
                    tracing::warn!(
                        watch = (self.resource)().plural,
                        error = describe(&error),
                        "a watch was interrupted"
                    );
                }
            }
        }
    }

    /// Fills the store once.
    pub(super) async fn list(&self, client: &Client, cache: &Cache) -> Result<(), kube::Error> {
        self.take(cache, Event::Init);
        let api: Api<Slim<S, T>> = self.api(client);
        let mut params = ListParams::default().limit(PAGE);
        params.label_selector = self.labels.map(str::to_owned);
        params.field_selector = self.name.map(|name| format!("metadata.name={name}"));
        loop {
            let page = api.list(&params).await?;
            for object in page.items {
                self.take(cache, Event::InitApply(object));
            }
            match page.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => params.continue_token = Some(token),
                None => break,
            }
        }
        self.take(cache, Event::InitDone);
        Ok(())
    }
}

/// Fills a store from objects as the API gives them.
#[cfg(test)]
pub(super) trait Fill {
    fn fill(&self, facts: &mut Facts, objects: impl IntoIterator<Item = serde_json::Value>);
}

#[cfg(test)]
impl<S: Default + DeserializeOwned, T: Default + DeserializeOwned, F: PartialEq> Fill for Kind<S, T, F> {
    fn fill(&self, facts: &mut Facts, objects: impl IntoIterator<Item = serde_json::Value>) {
        for object in objects {
            let object = serde_json::from_value(object).unwrap();
            let (name, entry) = self.entry(&object);
            (self.store)(facts).set(&name, entry);
        }
    }
}

/// An error with all that caused it.
fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str, version: u64, facts: u8) -> (String, Entry<u8>) {
        let entry = Entry {
            uid: "u".into(),
            version,
            facts,
        };
        (name.into(), entry)
    }

    #[test]
    fn only_what_matters_counts_as_a_change() {
        let mut store = Store::default();
        assert!(!store.take(Event::Init));
        assert!(!store.take(Event::InitApply(entry("a", 1, 1))));
        assert!(store.get("a").is_none(), "a list counts once it is complete");
        assert!(store.take(Event::InitDone));
        assert_eq!(store.get("a"), Some(&1));
        assert!(!store.take(Event::Apply(entry("a", 2, 1))), "a heartbeat");
        assert!(store.take(Event::Apply(entry("a", 3, 2))));
        assert!(store.take(Event::Delete(entry("a", 4, 2))));
        assert!(!store.take(Event::Delete(entry("a", 4, 2))));
        // Another list that tells the same changes nothing; one that tells less does.
        store.take(Event::Apply(entry("b", 5, 3)));
        for (listed, changed) in [(vec![entry("b", 6, 3)], false), (Vec::new(), true)] {
            store.take(Event::Init);
            for object in listed {
                store.take(Event::InitApply(object));
            }
            assert_eq!(store.take(Event::InitDone), changed);
        }
        assert_eq!(store.iter().count(), 0);
    }

    #[test]
    fn a_write_is_seen_at_once_and_never_undone_by_an_older_event() {
        let mut store = Store::default();
        store.take(Event::Apply(entry("a", 5, 1)));
        assert!(store.wrote("a", entry("a", 7, 2).1));
        assert!(!store.take(Event::Apply(entry("a", 6, 1))));
        assert_eq!(store.get("a"), Some(&2));
        // An object of the same name that was made since.
        let mut other = entry("a", 6, 9);
        other.1.uid = "v".into();
        assert!(store.take(Event::Apply(other)));
        assert!(!store.wrote("a", entry("a", 9, 3).1), "a write to the old one");
        assert!(!store.wrote("gone", entry("gone", 9, 3).1));
        assert_eq!(store.get("a"), Some(&9));
    }
}
