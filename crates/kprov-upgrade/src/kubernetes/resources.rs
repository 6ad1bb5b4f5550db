//! The kinds that are read and written here: kprov's own as [`Object`]s, and of everybody's only the fields that matter.

use std::borrow::Cow;
use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference, Time};
use kprov_types::api::{
    GROUP, MachineSpec, MachineStatus, ReleaseSpec, ReleaseStatus, VERSION, VersionUpdateSpec, VersionUpdateStatus,
};
use kube::Resource;
use kube::core::{ApiResource, DynamicResourceScope, GroupVersionKind, Object};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

/// A VersionUpdate.
pub type VersionUpdate = Object<VersionUpdateSpec, VersionUpdateStatus>;
/// A Machine.
pub type Machine = Object<MachineSpec, MachineStatus>;
/// A Release.
pub type Release = Object<ReleaseSpec, ReleaseStatus>;

fn own(kind: &str, plural: &str) -> ApiResource {
    ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(GROUP, VERSION, kind), plural)
}

/// The kind of [`VersionUpdate`].
pub fn version_updates() -> ApiResource {
    own("VersionUpdate", "versionupdates")
}

/// The kind of [`Machine`].
pub fn machines() -> ApiResource {
    own("Machine", "machines")
}

/// The kind of [`Release`].
pub fn releases() -> ApiResource {
    own("Release", "releases")
}

pub(super) fn core(kind: &str, plural: &str) -> ApiResource {
    ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk("", "v1", kind), plural)
}

pub(super) fn apps(kind: &str, plural: &str) -> ApiResource {
    ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk("apps", "v1", kind), plural)
}

/// An object of which only what `S` and `T` name is decoded. Of a cluster of 5,000 machines nothing else could be kept.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Slim<S, T> {
    #[serde(deserialize_with = "metadata")]
    pub(super) metadata: ObjectMeta,
    #[serde(default)]
    pub(super) spec: S,
    #[serde(default)]
    pub(super) status: T,
    /// Of a ConfigMap.
    #[serde(default)]
    pub(super) data: BTreeMap<String, String>,
}

/// Metadata without what no reader here asks for, `managedFields` above all.
fn metadata<'de, D: Deserializer<'de>>(deserializer: D) -> Result<ObjectMeta, D::Error> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Metadata {
        name: Option<String>,
        namespace: Option<String>,
        uid: Option<String>,
        resource_version: Option<String>,
        generation: Option<i64>,
        creation_timestamp: Option<Time>,
        deletion_timestamp: Option<Time>,
        labels: Option<BTreeMap<String, String>>,
        annotations: Option<BTreeMap<String, String>>,
        owner_references: Option<Vec<OwnerReference>>,
    }
    let Metadata {
        name,
        namespace,
        uid,
        resource_version,
        generation,
        creation_timestamp,
        deletion_timestamp,
        labels,
        annotations,
        owner_references,
    } = Metadata::deserialize(deserializer)?;
    Ok(ObjectMeta {
        name,
        namespace,
        uid,
        resource_version,
        generation,
        creation_timestamp,
        deletion_timestamp,
        labels,
        annotations,
        owner_references,
        ..ObjectMeta::default()
    })
}

impl<S, T> Slim<S, T> {
    pub(super) fn name(&self) -> &str {
        self.metadata.name.as_deref().unwrap_or_default()
    }

    pub(super) fn label(&self, key: &str) -> Option<&str> {
        Some(self.metadata.labels.as_ref()?.get(key)?.as_str())
    }

    pub(super) fn annotation(&self, key: &str) -> Option<&str> {
        Some(self.metadata.annotations.as_ref()?.get(key)?.as_str())
    }

    /// When it was made. Every object the API serves has that.
    pub(super) fn created(&self) -> Timestamp {
        self.metadata
            .creation_timestamp
            .as_ref()
            .map_or(Timestamp::UNIX_EPOCH, |time| time.0)
    }

    /// Somebody has deleted it, and it's on its way out.
    pub(super) fn leaving(&self) -> bool {
        self.metadata.deletion_timestamp.is_some()
    }
}

impl SlimPod {
    /// Its containers have ended for good.
    pub(super) fn finished(&self) -> bool {
        matches!(self.status.phase.as_str(), "Succeeded" | "Failed")
    }
}

impl<S, T> Resource for Slim<S, T> {
    type DynamicType = ApiResource;
    type Scope = DynamicResourceScope;

    fn kind(resource: &ApiResource) -> Cow<'_, str> {
        resource.kind.as_str().into()
    }
    fn group(resource: &ApiResource) -> Cow<'_, str> {
        resource.group.as_str().into()
    }
    fn version(resource: &ApiResource) -> Cow<'_, str> {
        resource.version.as_str().into()
    }
    fn api_version(resource: &ApiResource) -> Cow<'_, str> {
        resource.api_version.as_str().into()
    }
    fn plural(resource: &ApiResource) -> Cow<'_, str> {
        resource.plural.as_str().into()
    }
    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }
    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

/// kprov's own objects before their content is understood: what somebody has written wrongly must not hide the others.
pub(super) type SlimAny = Slim<Value, Value>;
pub(super) type SlimNode = Slim<NodeSpec, NodeStatus>;
pub(super) type SlimPod = Slim<PodSpec, PodStatus>;
pub(super) type SlimWorkload = Slim<WorkloadSpec, WorkloadStatus>;
pub(super) type SlimBudget = Slim<BudgetSpec, BudgetStatus>;

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct NodeSpec {
    pub(super) unschedulable: bool,
    pub(super) taints: Vec<Taint>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub(super) struct Taint {
    pub(super) key: String,
    pub(super) value: String,
    pub(super) effect: String,
}

impl Taint {
    /// Whether it keeps pods off that don't tolerate it.
    pub(super) fn repels(&self) -> bool {
        matches!(self.effect.as_str(), "NoSchedule" | "NoExecute")
    }
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct NodeStatus {
    pub(super) conditions: Vec<ObjectCondition>,
    pub(super) addresses: Vec<NodeAddress>,
    pub(super) node_info: NodeInfo,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct NodeAddress {
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) address: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct NodeInfo {
    pub(super) kubelet_version: String,
}

/// A condition of a Node or a Pod.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct ObjectCondition {
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) status: String,
    pub(super) last_transition_time: Option<Timestamp>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct PodSpec {
    pub(super) node_name: Option<String>,
    pub(super) tolerations: Vec<Toleration>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Toleration {
    pub(super) key: String,
    pub(super) operator: String,
    pub(super) value: String,
    pub(super) effect: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct PodStatus {
    pub(super) phase: String,
    pub(super) conditions: Vec<ObjectCondition>,
    pub(super) container_statuses: Vec<ContainerStatus>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct ContainerStatus {
    pub(super) restart_count: u32,
    pub(super) state: ContainerState,
    pub(super) last_state: ContainerState,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct ContainerState {
    pub(super) waiting: Option<ContainerWaiting>,
    pub(super) terminated: Option<ContainerTerminated>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct ContainerWaiting {
    pub(super) reason: String,
    pub(super) message: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct ContainerTerminated {
    pub(super) reason: String,
    pub(super) message: String,
    pub(super) exit_code: i32,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct WorkloadSpec {
    pub(super) replicas: Option<u32>,
    pub(super) update_strategy: UpdateStrategy,
    pub(super) template: Template,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct UpdateStrategy {
    #[serde(rename = "type")]
    pub(super) kind: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Template {
    pub(super) metadata: TemplateMetadata,
    pub(super) spec: TemplateSpec,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct TemplateMetadata {
    pub(super) labels: BTreeMap<String, String>,
    pub(super) annotations: BTreeMap<String, String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct TemplateSpec {
    pub(super) containers: Vec<TemplateContainer>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct TemplateContainer {
    pub(super) image: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct WorkloadStatus {
    pub(super) observed_generation: i64,
    pub(super) desired_number_scheduled: usize,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct BudgetSpec {
    pub(super) selector: Option<Selector>,
}

/// A label selector.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Selector {
    pub(super) match_labels: BTreeMap<String, String>,
    pub(super) match_expressions: Vec<Requirement>,
}

/// One requirement of a label selector.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub(super) struct Requirement {
    pub(super) key: String,
    pub(super) operator: String,
    pub(super) values: Vec<String>,
}

impl Selector {
    /// Whether labels match. An operator that isn't known matches: it's asked which budgets stand in the way.
    pub(super) fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        let equal = self
            .match_labels
            .iter()
            .all(|(key, value)| labels.get(key) == Some(value));
        equal
            && self.match_expressions.iter().all(|requirement| {
                let value = labels.get(&requirement.key);
                match requirement.operator.as_str() {
                    "In" => value.is_some_and(|v| requirement.values.contains(v)),
                    "NotIn" => value.is_none_or(|v| !requirement.values.contains(v)),
                    "Exists" => value.is_some(),
                    "DoesNotExist" => value.is_none(),
                    _ => true,
                }
            })
    }
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct BudgetStatus {
    pub(super) disruptions_allowed: i64,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn of_an_object_only_what_matters_is_decoded() {
        let node: SlimNode = serde_json::from_value(json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": { "name": "a", "uid": "u", "managedFields": [{ "manager": "kubelet", "fieldsV1": { "f:x": {} } }],
                "creationTimestamp": "2026-05-01T12:00:00Z", "labels": { "x": "y" } },
            "spec": { "unschedulable": true, "podCIDR": "10.0.0.0/24" },
            "status": { "images": [{ "names": ["a"] }], "nodeInfo": { "kubeletVersion": "v1.36.3" },
                "conditions": [{ "type": "Ready", "status": "True", "lastTransitionTime": "2026-05-01T12:00:01Z" }] },
        }))
        .unwrap();
        assert_eq!(node.name(), "a");
        assert!(node.metadata.managed_fields.is_none());
        assert_eq!(node.label("x"), Some("y"));
        assert!(node.spec.unschedulable);
        assert_eq!(node.status.node_info.kubelet_version, "v1.36.3");
        assert_eq!(node.created(), "2026-05-01T12:00:00Z".parse().unwrap());
        // A kind without spec, and one with fields that are null.
        let map: SlimAny =
            serde_json::from_value(json!({ "metadata": { "name": "m" }, "data": { "k": "v" } })).unwrap();
        assert_eq!(map.data["k"], "v");
    }

    #[test]
    fn selectors_match() {
        let labels = BTreeMap::from([("app".to_owned(), "web".to_owned())]);
        let selector = |value: Value| serde_json::from_value::<Selector>(value).unwrap();
        let expression = |operator: &str, key: &str, values: &[&str]| {
            selector(json!({ "matchExpressions": [{ "key": key, "operator": operator, "values": values }] }))
        };
        assert!(selector(json!({})).matches(&labels));
        assert!(selector(json!({ "matchLabels": { "app": "web" } })).matches(&labels));
        assert!(!selector(json!({ "matchLabels": { "app": "db" } })).matches(&labels));
        assert!(expression("In", "app", &["web", "db"]).matches(&labels));
        assert!(!expression("NotIn", "app", &["web"]).matches(&labels));
        assert!(expression("NotIn", "tier", &["x"]).matches(&labels));
        assert!(expression("Exists", "app", &[]).matches(&labels));
        assert!(!expression("DoesNotExist", "app", &[]).matches(&labels));
    }
}
