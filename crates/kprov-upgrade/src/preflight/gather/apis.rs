//! Objects that depend on API versions which go.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Client;
use kube::api::Api;
use kube::core::ApiResource;
use serde_json::Value;

use super::super::StoredObjects;
use super::super::removals::{Removal, api_version, between};
use super::{GatherError, MOST_EXAMPLES, metadata_pages, not_found};

/// What `kubectl apply` keeps of the manifest it was given.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// Objects last written through an API version that goes after minor `from`, up to minor `to`; of kinds that go altogether, all
/// but kprov's own.
pub(super) async fn stored(client: &Client, from: u64, to: u64) -> Result<Vec<StoredObjects>, GatherError> {
    // One resource may have lost several versions on the way, and is listed once.
    let mut lists: BTreeMap<(&str, &str, &str), Vec<&Removal>> = BTreeMap::new();
    for removal in between(from, to).filter(|removal| removal.kept) {
        let (group, version) = removal.listed_by(from);
        lists
            .entry((group, version, removal.resource))
            .or_default()
            .push(removal);
    }
    let mut found: BTreeMap<(String, &str), StoredObjects> = BTreeMap::new();
    for ((group, version, resource), removals) in lists {
        let kind = ApiResource {
            group: group.into(),
            version: version.into(),
            api_version: api_version(group, version),
            kind: String::new(),
            plural: resource.into(),
        };
        let each = |metadata: &ObjectMeta| {
            let versions = written_through(metadata);
            for removal in &removals {
                let depends = match removal.replacement {
                    Some(_) => versions.contains(&removal.api_version()),
                    None => !metadata.name.as_ref().is_some_and(|name| name.starts_with("kprov")),
                };
                if depends {
                    let seen = found
                        .entry((removal.api_version(), resource))
                        .or_insert_with(|| StoredObjects {
                            api_version: removal.api_version(),
                            resource: resource.into(),
                            count: 0,
                            examples: Vec::new(),
                        });
                    seen.count += 1;
                    if seen.examples.len() < MOST_EXAMPLES {
                        seen.examples.push(full_name(metadata));
                    }
                }
            }
        };
        let mut each = each;
        match metadata_pages(&Api::all_with(client.clone(), &kind), |object| each(&object.metadata)).await {
            // Some versions are served only where they are turned on.
            Err(error) if not_found(&error) => {}
            outcome => outcome?,
        }
    }
    Ok(found.into_values().collect())
}

fn full_name(metadata: &ObjectMeta) -> String {
    let name = metadata.name.as_deref().unwrap_or_default();
    match &metadata.namespace {
        Some(namespace) => format!("{namespace}/{name}"),
        None => name.to_owned(),
    }
}

/// The API versions that people's programs wrote an object through last, as far as it tells.
///
/// Each writer's newest entry of `managedFields` counts, and of `kubectl apply`'s manifest what that was itself. What the
/// object's status was written through says nothing, nor does what Kubernetes and kprov wrote.
pub(super) fn written_through(metadata: &ObjectMeta) -> BTreeSet<String> {
    let annotation = metadata
        .annotations
        .iter()
        .flatten()
        .find(|(key, _)| *key == LAST_APPLIED);
    let applied = annotation.and_then(|(_, manifest)| {
        let manifest: Value = serde_json::from_str(manifest).ok()?;
        Some(manifest["apiVersion"].as_str()?.to_owned())
    });
    let mut newest = BTreeMap::new();
    for entry in metadata.managed_fields.iter().flatten() {
        let manager = entry.manager.as_deref().unwrap_or_default();
        let Some(version) = &entry.api_version else { continue };
        if entry.subresource.as_ref().is_some_and(|s| !s.is_empty())
            || is_own(manager)
            || (applied.is_some() && manager.starts_with("kubectl"))
        {
            continue;
        }
        let time = entry.time.as_ref().map(|time| time.0);
        let last = newest.entry(manager).or_insert((time, version));
        if time > last.0 {
            *last = (time, version);
        }
    }
    newest
        .into_values()
        .map(|(_, version)| version.clone())
        .chain(applied)
        .collect()
}

/// Whether a field manager is a program of Kubernetes' or of kprov's.
fn is_own(manager: &str) -> bool {
    ["kube-apiserver", "kube-controller-manager", "kube-scheduler", "kube-proxy", "kubelet"].contains(&manager)
        || manager.starts_with("kprov")
        // API servers' own FlowSchemas and PriorityLevelConfigurations.
        || manager.starts_with("api-priority-and-fairness-")
}
