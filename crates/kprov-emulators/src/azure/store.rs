//! What there is: resource groups, resources, operations under way.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use jiff::Timestamp;
use serde_json::{Map, Value, json};
use tokio::sync::broadcast;

use super::Options;
use super::catalogue::Catalogue;
use super::kind::Kind;
use super::operations::{Failure, Operation};
use super::refusal::Refusal;
use super::room::{Event, Power};

/// A resource group.
#[derive(Clone, Debug)]
pub(super) struct Group {
    pub(super) name: String,
    pub(super) location: String,
    pub(super) tags: Option<Value>,
    pub(super) managed_by: Option<Value>,
    pub(super) deleting: bool,
}

/// Where a resource is in its life, as `provisioningState` says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Creating,
    Updating,
    Deleting,
    Succeeded,
    Failed,
}

impl State {
    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Creating => "Creating",
            Self::Updating => "Updating",
            Self::Deleting => "Deleting",
            Self::Succeeded => "Succeeded",
            Self::Failed => "Failed",
        }
    }

    /// Whether an operation is under way.
    pub(super) const fn busy(self) -> bool {
        matches!(self, Self::Creating | Self::Updating | Self::Deleting)
    }
}

/// A resource in a group.
#[derive(Clone, Debug)]
pub(super) struct Resource {
    pub(super) kind: &'static Kind,
    pub(super) id: String,
    pub(super) group: String,
    pub(super) name: String,
    /// What was put, without what is read-only, and with what the service adds to `properties`.
    pub(super) body: Map<String, Value>,
    pub(super) state: State,
    pub(super) etag: u64,
    pub(super) created: Timestamp,
    /// From when on lists show it.
    pub(super) listed: Instant,
    /// Of machines alone.
    pub(super) power: Option<Power>,
    /// Why it failed, where it did.
    pub(super) failure: Option<Failure>,
}

impl Resource {
    pub(super) fn properties(&self) -> &Map<String, Value> {
        static NONE: std::sync::LazyLock<Map<String, Value>> = std::sync::LazyLock::new(Map::new);
        self.body.get("properties").and_then(Value::as_object).unwrap_or(&NONE)
    }

    /// A disk's `uniqueId`.
    pub(super) fn unique_id(&self) -> String {
        let id = self.properties().get("uniqueId").and_then(Value::as_str);
        id.unwrap_or_default().to_owned()
    }

    pub(super) fn location(&self) -> &str {
        self.body.get("location").and_then(Value::as_str).unwrap_or_default()
    }

    /// The zone it's in, where it's in one.
    pub(super) fn zone(&self) -> Option<&str> {
        self.body.get("zones")?.get(0)?.as_str()
    }

    pub(super) fn etag(&self) -> String {
        format!("W/\"{}\"", guid(self.etag))
    }

    pub(super) fn is(&self, plural: &str) -> bool {
        self.kind.plural == plural
    }
}

/// Everything that's in the subscription.
#[derive(Debug)]
pub(super) struct Store {
    pub(super) options: Options,
    pub(super) endpoint: String,
    /// By name in lower case.
    pub(super) groups: BTreeMap<String, Group>,
    /// By id in lower case.
    pub(super) resources: BTreeMap<String, Resource>,
    pub(super) operations: BTreeMap<String, Operation>,
    /// When operations under way end.
    pub(super) due: BTreeSet<(Instant, String)>,
    pub(super) catalogue: Catalogue,
    pub(super) consoles: BTreeMap<String, String>,
    /// Addresses given out by a test, by the name of the public address in lower case.
    pub(super) given: BTreeMap<String, std::net::Ipv4Addr>,
    pub(super) events: broadcast::Sender<Event>,
    pub(super) serial: u64,
}

impl Store {
    pub(super) fn new(options: Options, endpoint: String) -> Self {
        Self {
            options,
            endpoint,
            groups: BTreeMap::new(),
            resources: BTreeMap::new(),
            operations: BTreeMap::new(),
            due: BTreeSet::new(),
            catalogue: Catalogue::default(),
            consoles: BTreeMap::new(),
            given: BTreeMap::new(),
            events: broadcast::channel(4096).0,
            serial: 0,
        }
    }

    pub(super) fn serial(&mut self) -> u64 {
        self.serial += 1;
        self.serial
    }

    /// Tells whoever listens; nobody has to.
    pub(super) fn tell(&self, event: Event) {
        drop(self.events.send(event));
    }

    /// `/subscriptions/<subscription>`.
    pub(super) fn scope(&self) -> String {
        format!("/subscriptions/{}", self.options.subscription)
    }

    /// The id of a resource.
    pub(super) fn id(&self, group: &str, kind: &Kind, name: &str) -> String {
        format!(
            "{}/resourceGroups/{group}/providers/{}/{name}",
            self.scope(),
            kind.full()
        )
    }

    pub(super) fn get(&self, id: &str) -> Option<&Resource> {
        self.resources.get(&id.to_ascii_lowercase())
    }

    pub(super) fn get_mut(&mut self, id: &str) -> Option<&mut Resource> {
        self.resources.get_mut(&id.to_ascii_lowercase())
    }

    pub(super) fn of_kind(&self, plural: &'static str) -> impl Iterator<Item = &Resource> {
        self.resources.values().filter(move |r| r.kind.plural == plural)
    }

    /// The resource that an id leads to, which may name something inside it (`.../virtualNetworks/v/subnets/s`); `None` where
    /// either isn't there.
    pub(super) fn owner(&self, id: &str) -> Option<&Resource> {
        let parts: Vec<&str> = id.split('/').collect();
        let resource = self.get(&parts.get(..9)?.join("/"))?;
        match parts.get(9..) {
            None | Some([]) => Some(resource),
            Some([list, name]) => child(resource.properties(), list, name).map(|_| resource),
            Some(_) => None,
        }
    }

    /// A group that can be worked in.
    pub(super) fn group(&self, name: &str) -> Result<&Group, Refusal> {
        self.groups
            .get(&name.to_ascii_lowercase())
            .ok_or_else(|| Refusal::no_group(name))
    }

    /// Who refers to what: from ids in lower case to the ids of what refers to them.
    pub(super) fn uses(&self) -> Uses {
        let mut uses = Uses::default();
        for resource in self.resources.values() {
            for (by, of) in references(&resource.id, &resource.body) {
                uses.0.entry(of.to_ascii_lowercase()).or_default().push(by);
            }
        }
        uses
    }
}

/// From ids in lower case to the ids of what refers to them.
#[derive(Debug, Default)]
pub(super) struct Uses(BTreeMap<String, Vec<String>>);

impl Uses {
    /// What refers to exactly this.
    pub(super) fn of(&self, id: &str) -> &[String] {
        self.0.get(&id.to_ascii_lowercase()).map_or(&[], Vec::as_slice)
    }

    /// What refers to this or to something inside it, itself not counted: pairs of what is referred to and what refers.
    pub(super) fn outside(&self, id: &str) -> Vec<(&str, &str)> {
        let own = id.to_ascii_lowercase();
        let inside = |other: &str| other == own || other.strip_prefix(&own).is_some_and(|rest| rest.starts_with('/'));
        self.0
            .range(own.clone()..)
            .take_while(|(of, _)| of.starts_with(&own))
            .filter(|(of, _)| inside(of))
            .flat_map(|(of, by)| by.iter().map(move |by| (of.as_str(), by.as_str())))
            .filter(|(_, by)| !inside(&by.to_ascii_lowercase()))
            .collect()
    }

    /// What refers to exactly this, as ARM lists it.
    pub(super) fn listed(&self, id: &str) -> Option<Value> {
        let by = self.of(id);
        (!by.is_empty()).then(|| by.iter().map(|id| json!({"id": id})).collect())
    }
}

/// All references in a body, each with the id of the part that holds it.
pub(super) fn references(id: &str, body: &Map<String, Value>) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for (key, value) in body.get("properties").and_then(Value::as_object).into_iter().flatten() {
        for item in value.as_array().into_iter().flatten() {
            let by = match item.get("name").and_then(Value::as_str) {
                Some(name) => format!("{id}/{key}/{name}"),
                None => id.to_owned(),
            };
            collect(&by, item, &mut found);
        }
        if value.is_object() {
            collect(id, value, &mut found);
        }
    }
    found
}

fn collect(by: &str, value: &Value, found: &mut Vec<(String, String)>) {
    match value {
        Value::Object(object) => {
            if let Some(id) = object.get("id").and_then(Value::as_str)
                && id.to_ascii_lowercase().starts_with("/subscriptions/")
            {
                found.push((by.to_owned(), id.to_owned()));
            }
            for value in object.values() {
                collect(by, value, found);
            }
        }
        Value::Array(items) => {
            for item in items {
                collect(by, item, found);
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// The member of a list inside `properties` that has this name.
pub(super) fn child<'a>(properties: &'a Map<String, Value>, list: &str, name: &str) -> Option<&'a Value> {
    properties
        .iter()
        .find(|(key, _)| key.eq_ignore_ascii_case(list))?
        .1
        .as_array()?
        .iter()
        .find(|item| {
            item.get("name")
                .and_then(Value::as_str)
                .is_some_and(|n| n.eq_ignore_ascii_case(name))
        })
}

/// Something that looks like a GUID.
pub(super) fn guid(serial: u64) -> String {
    let mixed = serial.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    format!(
        "{:08x}-{:04x}-4{:03x}-8000-{serial:012x}",
        mixed >> 32,
        (mixed >> 16) & 0xffff,
        mixed & 0xfff
    )
}

/// The string at a path inside a value.
pub(super) fn text<'a>(value: &'a Value, pointer: &str) -> Option<&'a str> {
    value.pointer(pointer)?.as_str()
}
