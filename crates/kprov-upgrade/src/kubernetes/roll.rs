//! Templates of workloads: rendering a release's, with what people have changed of the last one; and putting an earlier one
//! back. What a template becomes is decided by pure functions.

use std::collections::BTreeSet;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kprov_bootstrap::manifests::{self, REVISION_LABEL};
use kprov_types::api::{ROLLED_ANNOTATION, ReleaseRef};
use kprov_types::node::ControlPlaneSettings;
use kprov_types::ports::FIRST_REVISION;
use kprov_types::{Minor, Release};
use kube::Api;
use kube::api::{DynamicObject, ListParams};
use serde_json::{Map, Value, json};

use super::access::{Failure, Part};
use super::cache::{DAEMON_SETS, DEPLOYMENTS, WorkloadKind};
use super::carry_over::{carry_over, essentials};
use super::facts::{REPLACED_ANNOTATION, release_of};
use super::observe;
use super::releases::component;
use super::resources::apps;
use super::{Effect, KubeCluster};
use crate::cluster::ClusterError;
use crate::model::Workload;

/// Annotation on DaemonSets and Deployments: what kprov itself rendered of the template, by release. What differs from it was
/// changed by people, and is carried over to the next release.
const RENDERED_ANNOTATION: &str = "kprov.io/rendered";
/// The Deployment controller's own label on templates of ReplicaSets.
const HASH_LABEL: &str = "pod-template-hash";
/// Since when DaemonSets can start the new pod beside the old one (KEP-1591).
const SURGE: Minor = Minor::v1(22);

const fn kind(workload: Workload) -> &'static WorkloadKind {
    match workload {
        Workload::ApiServer | Workload::Proxy => &DAEMON_SETS,
        Workload::ControllerManager | Workload::Scheduler | Workload::Dns | Workload::Operator => &DEPLOYMENTS,
    }
}

/// Workloads whose pods have an address of their own for each revision.
const fn has_revision(workload: Workload) -> bool {
    matches!(
        workload,
        Workload::ApiServer | Workload::ControllerManager | Workload::Scheduler
    )
}

/// The field with the strategy of a DaemonSet or Deployment.
const fn strategy(workload: Workload) -> &'static str {
    match workload {
        Workload::ApiServer | Workload::Proxy => "updateStrategy",
        _ => "strategy",
    }
}

/// A revision that none has: one above all, or once there is no such any more, the lowest.
fn fresh_revision(taken: &BTreeSet<u16>) -> u16 {
    let last = taken.last().copied().unwrap_or(0).max(FIRST_REVISION - 1);
    last.checked_add(1)
        .or_else(|| (FIRST_REVISION..=u16::MAX).find(|revision| !taken.contains(revision)))
        .unwrap_or(FIRST_REVISION)
}

fn release_in(template: &Value) -> Option<ReleaseRef> {
    release_of(
        serde_json::from_value(template["metadata"]["annotations"].clone())
            .ok()
            .as_ref(),
    )
}

fn revision_in(template: &Value) -> Option<u16> {
    template["metadata"]["labels"][REVISION_LABEL].as_str()?.parse().ok()
}

/// What was rendered, by release. Only the releases between which something is going on are kept.
fn remember(entries: [(&ReleaseRef, Value); 2]) -> String {
    let map = entries.map(|(release, essentials)| (release.digest.to_string(), essentials));
    Value::Object(Map::from_iter(map)).to_string()
}

fn remembered(object: &DynamicObject, release: &ReleaseRef) -> Option<Value> {
    let text = object.metadata.annotations.as_ref()?.get(RENDERED_ANNOTATION)?;
    let mut map: Map<String, Value> = serde_json::from_str(text).ok()?;
    map.remove(release.digest.as_str())
}

/// A template that the API keeps of a workload's past.
struct Earlier {
    /// The higher, the later.
    order: i64,
    template: Value,
}

impl KubeCluster {
    /// Changes a workload's template to another release's.
    pub(super) async fn roll(
        &self,
        workload: Workload,
        from: &ReleaseRef,
        to: &ReleaseRef,
    ) -> Result<Effect, ClusterError> {
        // Controllers write their status into the object whenever they like, which says nothing against the roll.
        self.access.again(|| self.roll_once(workload, from, to)).await
    }

    async fn roll_once(&self, workload: Workload, from: &ReleaseRef, to: &ReleaseRef) -> Result<Effect, Failure> {
        let (live, before) = match self.template(workload, from, to).await? {
            Ok(found) => found,
            Err(effect) => return Ok(effect),
        };
        let settings = self.settings()?;
        let earlier = self.earlier(workload, &live).await?;
        let revision = if has_revision(workload) {
            fresh_revision(&self.taken_revisions(workload, &before, &earlier))
        } else {
            0
        };
        let running = self.lowest_minor().unwrap_or_else(|| from.version.minor());
        let rendered = self.render(&settings, workload, to, revision, running)?;
        let new = rendered["spec"]["template"].clone();
        let base = if let Some(essentials) = remembered(&live, from) {
            essentials
        } else {
            let revision = revision_in(&before).unwrap_or(revision);
            let rendered = self.render(&settings, workload, from, revision, running)?;
            essentials(&rendered["spec"]["template"])
        };
        let remember = remember([(from, base.clone()), (to, essentials(&new))]);
        let template = carry_over(&base, &before, new);
        self.write_template(workload, &live, template, &rendered, Some(remember))
            .await
    }

    /// Puts back the template that a workload had of a release, exactly: its pods that still run are then pods of the newest
    /// template, and stay. Where the API has forgotten it, it's rendered again.
    pub(super) async fn roll_back(
        &self,
        workload: Workload,
        from: &ReleaseRef,
        to: &ReleaseRef,
    ) -> Result<Effect, ClusterError> {
        self.access.again(|| self.roll_back_once(workload, from, to)).await
    }

    async fn roll_back_once(&self, workload: Workload, from: &ReleaseRef, to: &ReleaseRef) -> Result<Effect, Failure> {
        let (live, _) = match self.template(workload, from, to).await? {
            Ok(found) => found,
            Err(effect) => return Ok(effect),
        };
        let mut earlier = self.earlier(workload, &live).await?;
        earlier.retain(|e| release_in(&e.template).as_ref() == Some(to));
        earlier.sort_by_key(|e| e.order);
        let Some(Earlier { template, .. }) = earlier.pop() else {
            tracing::warn!(
                workload = workload.as_str(),
                release = %to,
                "the API keeps no earlier template of the release; it is rendered again"
            );
            return self.roll_once(workload, from, to).await;
        };
        // The release that comes back may know less than the one that goes.
        let running = self
            .lowest_minor()
            .map_or(to.version.minor(), |m| m.min(to.version.minor()));
        let revision = revision_in(&template).unwrap_or(0);
        let rendered = self.render(&self.settings()?, workload, to, revision, running)?;
        self.write_template(workload, &live, template, &rendered, None).await
    }

    /// The object, and its template, if that is of the release `from`.
    async fn template(
        &self,
        workload: Workload,
        from: &ReleaseRef,
        to: &ReleaseRef,
    ) -> Result<Result<(DynamicObject, Value), Effect>, ClusterError> {
        let Some(live) = self.access.get(kind(workload), workload.as_str()).await? else {
            return Ok(Err(Effect::Stale));
        };
        let template = live.data["spec"]["template"].clone();
        Ok(match release_in(&template) {
            Some(release) if release == *to => Err(Effect::Already),
            Some(release) if release != *from => Err(Effect::Stale),
            // One without was made by a kprov that did not write it down.
            _ => Ok((live, template)),
        })
    }

    async fn write_template(
        &self,
        workload: Workload,
        live: &DynamicObject,
        template: Value,
        rendered: &Value,
        remember: Option<String>,
    ) -> Result<Effect, Failure> {
        let mut after = serde_json::to_value(live).unwrap_or_default();
        after["spec"]["template"] = template;
        after["spec"][strategy(workload)] = rendered["spec"][strategy(workload)].clone();
        let now = Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let annotations = &mut after["metadata"]["annotations"];
        annotations[ROLLED_ANNOTATION] = json!(now);
        let replaced = release_in(&live.data["spec"]["template"]);
        annotations[REPLACED_ANNOTATION] = json!(replaced.map(|release| json!(release).to_string()));
        if let Some(remember) = remember {
            annotations[RENDERED_ANNOTATION] = json!(remember);
        }
        self.access.change(kind(workload), live, &after, Part::Object).await?;
        Ok(Effect::Changed)
    }

    /// Lets API servers be replaced by surge, once everything that has to know of it does.
    pub(super) async fn ensure_surge(&self) -> Result<(), ClusterError> {
        let name = Workload::ApiServer.as_str();
        let (by_hand, template) = {
            let facts = self.cache.facts();
            let found = facts.daemon_sets.get(name);
            (
                found.is_some_and(|d| !d.automatic),
                found.and_then(|d| d.template.clone()),
            )
        };
        let (Some(running), Some(release)) = (self.lowest_minor(), template) else {
            return Ok(());
        };
        if !by_hand || running < SURGE {
            return Ok(());
        }
        let Some(live) = self.access.get(&DAEMON_SETS, name).await? else {
            return Ok(());
        };
        let revision = revision_in(&live.data["spec"]["template"]).unwrap_or(FIRST_REVISION);
        let rendered = self.render(&self.settings()?, Workload::ApiServer, &release, revision, running)?;
        let field = strategy(Workload::ApiServer);
        let mut after = serde_json::to_value(&live).unwrap_or_default();
        after["spec"][field] = rendered["spec"][field].clone();
        match self.access.change(&DAEMON_SETS, &live, &after, Part::Object).await {
            Ok(()) | Err(Failure::Conflict | Failure::Missing) => Ok(()),
            Err(failure) => Err(failure.into()),
        }
    }

    pub(super) fn settings(&self) -> Result<ControlPlaneSettings, ClusterError> {
        let settings = observe::settings(&self.cache.facts());
        settings.map_err(|error| ClusterError::Refused { why: error.to_string() })
    }

    /// The manifest of a release that is verified.
    pub(super) fn manifest(&self, release: &ReleaseRef) -> Result<Release, ClusterError> {
        let found = self
            .checked()
            .into_values()
            .find(|c| c.release.as_ref() == Some(release));
        let why = match found.as_deref().map(|c| &c.manifest) {
            Some(Ok((manifest, _))) => return Ok(manifest.clone()),
            Some(Err(why)) => why.clone(),
            None => "there is no such Release".to_owned(),
        };
        // What the cluster was made with need not be among its Releases.
        let settings = self.settings()?;
        if settings.release_digest == release.digest {
            return Ok(settings.release);
        }
        Err(ClusterError::Refused {
            why: format!("the release {release} ({}) can't be used: {why}", release.digest),
        })
    }

    fn render(
        &self,
        settings: &ControlPlaneSettings,
        workload: Workload,
        release: &ReleaseRef,
        revision: u16,
        running: Minor,
    ) -> Result<Value, ClusterError> {
        let settings = settings.with_release(self.manifest(release)?, release.digest.clone());
        let refused = |why: String| ClusterError::Refused { why };
        manifests::workload(&settings, component(workload), revision, running)
            .map_err(|error| refused(error.to_string()))?
            .ok_or_else(|| refused(format!("the release {release} has no `{}`", workload.as_str())))
    }

    /// The lowest minor of what reads workloads: API servers and controller-managers, those that are leaving included.
    pub(super) fn lowest_minor(&self) -> Option<Minor> {
        let readers = [Workload::ApiServer, Workload::ControllerManager];
        let facts = self.cache.facts();
        let pods = facts
            .pods
            .iter()
            .filter(|(_, pod)| pod.workload.is_some_and(|w| readers.contains(&w)));
        let pods = pods.filter_map(|(_, pod)| pod.release.as_ref());
        let templates = readers
            .into_iter()
            .filter_map(|w| facts.workload(w.as_str())?.template.as_ref());
        pods.chain(templates).map(|release| release.version.minor()).min()
    }

    fn taken_revisions(&self, workload: Workload, live: &Value, earlier: &[Earlier]) -> BTreeSet<u16> {
        let facts = self.cache.facts();
        let pods = facts.pods.iter().filter(|(_, pod)| pod.workload == Some(workload));
        let mut taken: BTreeSet<u16> = pods.map(|(_, pod)| pod.revision).collect();
        taken.extend(revision_in(live));
        taken.extend(earlier.iter().filter_map(|e| revision_in(&e.template)));
        if workload == Workload::ApiServer {
            let told = facts.machines.iter().filter_map(|(_, machine)| machine.status.as_ref());
            taken.extend(told.flat_map(|status| status.api_servers.iter().map(|s| s.revision)));
        }
        taken
    }

    /// What the API keeps of a workload's past, its present included.
    async fn earlier(&self, workload: Workload, live: &DynamicObject) -> Result<Vec<Earlier>, ClusterError> {
        let of_daemon_set = strategy(workload) == "updateStrategy";
        let resource = if of_daemon_set {
            apps("ControllerRevision", "controllerrevisions")
        } else {
            apps("ReplicaSet", "replicasets")
        };
        let selector: LabelSelector = serde_json::from_value(live.data["spec"]["selector"].clone()).unwrap_or_default();
        let labels: Vec<String> = selector
            .match_labels
            .into_iter()
            .flatten()
            .map(|(key, value)| format!("{key}={value}"))
            .collect();
        let api: Api<DynamicObject> = Api::namespaced_with(self.access.client.clone(), manifests::NAMESPACE, &resource);
        let params = ListParams::default().labels(&labels.join(","));
        let uid = live.metadata.uid.as_deref();
        let all = self.access.read(api.list(&params)).await?.items.into_iter();
        let own = all.filter(|object| {
            let owners = object.metadata.owner_references.iter().flatten();
            owners.into_iter().any(|owner| Some(owner.uid.as_str()) == uid)
        });
        Ok(own
            .map(|object| {
                if of_daemon_set {
                    of_revision(&object)
                } else {
                    of_replica_set(&object)
                }
            })
            .collect())
    }
}

/// A DaemonSet controller keeps `{"spec":{"template":{..., "$patch":"replace"}}}`.
fn of_revision(object: &DynamicObject) -> Earlier {
    let mut template = object.data["data"]["spec"]["template"].clone();
    if let Some(template) = template.as_object_mut() {
        template.remove("$patch");
    }
    Earlier {
        order: object.data["revision"].as_i64().unwrap_or(0),
        template,
    }
}

/// A Deployment controller keeps earlier ReplicaSets, each with a label of its own in the template.
fn of_replica_set(object: &DynamicObject) -> Earlier {
    let mut template = object.data["spec"]["template"].clone();
    if let Some(labels) = template["metadata"]["labels"].as_object_mut() {
        labels.remove(HASH_LABEL);
    }
    let annotations = object.metadata.annotations.as_ref();
    let revision = annotations.and_then(|a| a.get("deployment.kubernetes.io/revision"));
    Earlier {
        order: revision.and_then(|r| r.parse().ok()).unwrap_or(0),
        template,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn revisions_are_fresh() {
        assert_eq!(fresh_revision(&BTreeSet::new()), FIRST_REVISION);
        assert_eq!(fresh_revision(&BTreeSet::from([2, 7])), 8);
        assert_eq!(fresh_revision(&BTreeSet::from([1])), FIRST_REVISION);
        assert_eq!(fresh_revision(&BTreeSet::from([2, 3, u16::MAX])), 4);
    }
}
