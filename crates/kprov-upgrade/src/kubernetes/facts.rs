//! What of each watched object is kept. All pure.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::IpAddr;
use std::sync::Arc;

use jiff::Timestamp;
use kprov_bootstrap::manifests::{CONTROL_PLANE_LABEL, NAME_LABEL, REVISION_LABEL, SELF_HOSTED};
use kprov_types::api::{
    CORDONED_ANNOTATION, KUBERNETES_ANNOTATION, MachineSpec, MachineStatus, POOL_LABEL, RELEASE_ANNOTATION,
    ROLLED_ANNOTATION, ReleaseRef, ReleaseSpec, ReleaseStatus, VersionUpdateSpec, VersionUpdateStatus,
};
use kprov_types::{KubernetesVersion, Role};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::resources::{ContainerStatus, SlimAny, SlimNode, SlimPod, SlimWorkload, Taint};
use crate::model::Workload;

/// The kubelet's mark on pods that mirror static pods.
pub(super) const MIRROR_ANNOTATION: &str = "kubernetes.io/config.mirror";
/// The label of [`SELF_HOSTED`] and standby pods.
pub(super) use kprov_bootstrap::manifests::PLANE_LABEL;
/// Annotation on DaemonSets and Deployments: the release of the template that the last roll has replaced, as JSON.
pub(super) const REPLACED_ANNOTATION: &str = "kprov.io/replaced";
/// The pool of machines whose Node names none.
const DEFAULT_POOL: &str = "default";
/// A container that has started again so often while it can't stay up counts as broken.
const RESTARTS: u32 = 3;

#[derive(Clone, Debug, PartialEq)]
pub(super) struct NodeFacts {
    pub(super) control_plane: bool,
    pub(super) pool: String,
    pub(super) ready: bool,
    pub(super) ready_since: Timestamp,
    pub(super) cordoned: bool,
    pub(super) cordoned_by_us: Option<Timestamp>,
    /// `None`: it has not told, or something that is no version.
    pub(super) kubelet: Option<KubernetesVersion>,
    pub(super) address: Option<IpAddr>,
    pub(super) taints: Vec<Taint>,
}

pub(super) fn node(node: &SlimNode) -> NodeFacts {
    let status = &node.status;
    let ready = status.conditions.iter().find(|c| c.kind == "Ready");
    let address = status.addresses.iter().find(|a| a.kind == "InternalIP");
    NodeFacts {
        control_plane: node.label(CONTROL_PLANE_LABEL).is_some(),
        pool: node.label(POOL_LABEL).unwrap_or(DEFAULT_POOL).to_owned(),
        ready: ready.is_some_and(|c| c.status == "True"),
        ready_since: ready
            .and_then(|c| c.last_transition_time)
            .unwrap_or_else(|| node.created()),
        cordoned: node.spec.unschedulable,
        // What isn't our time is our mark all the same.
        cordoned_by_us: node
            .annotation(CORDONED_ANNOTATION)
            .map(|time| time.parse().unwrap_or_else(|_| node.created())),
        kubelet: status.node_info.kubelet_version.parse().ok(),
        address: address.and_then(|a| a.address.parse().ok()),
        taints: node.spec.taints.clone(),
    }
}

/// A pod of one of the [`Workload`]s, or none of them.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct PodFacts {
    /// `None`: a static pod, another that no workload of ours runs, or one that has ended.
    pub(super) workload: Option<Workload>,
    pub(super) machine: Option<String>,
    pub(super) release: Option<ReleaseRef>,
    pub(super) revision: u16,
    pub(super) created: Timestamp,
    pub(super) ready: bool,
    pub(super) ready_since: Timestamp,
    pub(super) leaving: bool,
    pub(super) trouble: Option<String>,
}

pub(super) fn pod(pod: &SlimPod) -> PodFacts {
    let ready = pod.status.conditions.iter().find(|c| c.kind == "Ready");
    let static_pod = pod.annotation(MIRROR_ANNOTATION).is_some();
    // One that has ended for good runs nothing any more, and may stay listed for ever: kubelet refuses pods for good that it finds bound
    // to its Node when it starts anew (`NodeAffinity`, seen with 1.20 while the Node's labels are not here yet).
    let runs = !pod.finished();
    let plane = pod.label(PLANE_LABEL).is_none_or(|plane| plane == SELF_HOSTED);
    let workload = Workload::ALL
        .into_iter()
        .find(|w| pod.label(NAME_LABEL) == Some(w.as_str()))
        .filter(|_| plane && !static_pod && runs);
    PodFacts {
        workload,
        machine: pod.spec.node_name.clone(),
        release: release_of(pod.metadata.annotations.as_ref()).filter(|_| runs),
        revision: pod.label(REVISION_LABEL).and_then(|r| r.parse().ok()).unwrap_or(0),
        created: pod.created(),
        ready: ready.is_some_and(|c| c.status == "True"),
        ready_since: ready
            .and_then(|c| c.last_transition_time)
            .unwrap_or_else(|| pod.created()),
        leaving: pod.leaving(),
        trouble: pod.status.container_statuses.iter().find_map(trouble),
    }
}

/// The release in the annotations of a pod or a template.
pub(super) fn release_of(annotations: Option<&BTreeMap<String, String>>) -> Option<ReleaseRef> {
    let annotations = annotations?;
    Some(ReleaseRef {
        version: annotations.get(KUBERNETES_ANNOTATION)?.parse().ok()?,
        digest: annotations.get(RELEASE_ANNOTATION)?.parse().ok()?,
    })
}

/// Why a container can't run, in words.
fn trouble(container: &ContainerStatus) -> Option<String> {
    let ended = |terminated: &super::resources::ContainerTerminated| {
        let mut text = format!("exit code {}", terminated.exit_code);
        // `Error` says nothing that the code does not.
        if !terminated.reason.is_empty() && terminated.reason != "Error" {
            let _ = write!(text, " ({})", terminated.reason);
        }
        if let Some(line) = terminated.message.lines().rfind(|line| !line.trim().is_empty()) {
            let _ = write!(text, ": {}", line.trim());
        }
        text
    };
    let crashed = |terminated| {
        format!(
            "it ends again and again, {} times so far, last with {}",
            container.restart_count,
            ended(terminated)
        )
    };
    let state = &container.state;
    let last = container.last_state.terminated.as_ref();
    if let Some(waiting) = &state.waiting {
        return match waiting.reason.as_str() {
            "CrashLoopBackOff" if container.restart_count >= RESTARTS => Some(last.map_or_else(
                || format!("it ends again and again, {} times so far", container.restart_count),
                crashed,
            )),
            "ImagePullBackOff" | "ErrImagePull" | "ErrImageNeverPull" | "InvalidImageName" => {
                Some(words("its image can't be pulled", &waiting.message))
            }
            "CreateContainerConfigError" | "CreateContainerError" | "RunContainerError" => {
                Some(words("its container can't be started", &waiting.message))
            }
            _ => None,
        };
    }
    let terminated = state
        .terminated
        .as_ref()
        .filter(|_| container.restart_count >= RESTARTS);
    terminated.map(crashed)
}

fn words(what: &str, message: &str) -> String {
    if message.is_empty() {
        what.to_owned()
    } else {
        format!("{what}: {message}")
    }
}

#[derive(Clone, Debug, PartialEq)]
pub(super) struct WorkloadFacts {
    pub(super) template: Option<ReleaseRef>,
    /// The release of the template that the last roll has replaced.
    pub(super) previous: Option<ReleaseRef>,
    pub(super) image: String,
    pub(super) revision: u16,
    pub(super) rolled: Option<Timestamp>,
    pub(super) wanted: usize,
    pub(super) settled: bool,
    pub(super) automatic: bool,
}

/// A DaemonSet or a Deployment.
pub(super) fn workload(object: &SlimWorkload) -> WorkloadFacts {
    let template = &object.spec.template;
    let replicas = object.spec.replicas.and_then(|r| usize::try_from(r).ok());
    let label = template.metadata.labels.get(REVISION_LABEL);
    let container = template.spec.containers.first();
    WorkloadFacts {
        template: release_of(Some(&template.metadata.annotations)),
        previous: object
            .annotation(REPLACED_ANNOTATION)
            .and_then(|text| serde_json::from_str(text).ok()),
        image: container.map(|c| c.image.clone()).unwrap_or_default(),
        revision: label.and_then(|r| r.parse().ok()).unwrap_or(0),
        rolled: object.annotation(ROLLED_ANNOTATION).and_then(|t| t.parse().ok()),
        // Of a Deployment the spec says it, of a DaemonSet its controller.
        wanted: replicas.unwrap_or(object.status.desired_number_scheduled),
        settled: Some(object.status.observed_generation) == object.metadata.generation,
        automatic: object.spec.update_strategy.kind != "OnDelete",
    }
}

#[derive(Clone, Debug, PartialEq)]
pub(super) struct MachineFacts {
    pub(super) spec: MachineSpec,
    /// `None`: it has told nothing yet.
    pub(super) status: Option<MachineStatus>,
}

pub(super) fn machine(object: &SlimAny) -> MachineFacts {
    let name = object.name();
    let warn = |part: &str, why: &str| tracing::warn!(machine = name, why, "the {part} of a Machine can't be read");
    MachineFacts {
        spec: read(&object.spec)
            .unwrap_or_else(|why| {
                warn("spec", &why);
                None
            })
            .unwrap_or_default(),
        status: read(&object.status).unwrap_or_else(|why| {
            warn("status", &why);
            None
        }),
    }
}

/// `None` where there is nothing.
fn read<T: DeserializeOwned>(value: &Value) -> Result<Option<T>, String> {
    if value.is_null() {
        return Ok(None);
    }
    T::deserialize(value).map(Some).map_err(|error| error.to_string())
}

#[derive(Clone, Debug)]
pub(super) struct ReleaseFacts {
    /// The spec; or why it's none.
    pub(super) spec: Result<Arc<ReleaseSpec>, String>,
    pub(super) created: Timestamp,
    pub(super) status: Option<ReleaseStatus>,
}

/// The status is written here alone, and is no news.
impl PartialEq for ReleaseFacts {
    fn eq(&self, other: &Self) -> bool {
        self.spec == other.spec && self.created == other.created
    }
}

pub(super) fn release(object: &SlimAny) -> ReleaseFacts {
    ReleaseFacts {
        spec: read(&object.spec).and_then(|spec| spec.map(Arc::new).ok_or_else(|| "it has no spec".to_owned())),
        created: object.created(),
        status: read(&object.status).ok().flatten(),
    }
}

#[derive(Clone, Debug)]
pub(super) struct UpdateFacts {
    pub(super) uid: String,
    pub(super) generation: i64,
    /// `spec.desiredVersion` as written, even where the rest can't be read.
    pub(super) desired: String,
    /// The spec; or why it's none.
    pub(super) spec: Result<VersionUpdateSpec, String>,
    pub(super) status: VersionUpdateStatus,
}

/// The status is written here alone, and is no news.
impl PartialEq for UpdateFacts {
    fn eq(&self, other: &Self) -> bool {
        self.uid == other.uid && self.generation == other.generation
    }
}

pub(super) fn update(object: &SlimAny) -> UpdateFacts {
    UpdateFacts {
        uid: object.metadata.uid.clone().unwrap_or_default(),
        generation: object.metadata.generation.unwrap_or_default(),
        desired: object.spec["desiredVersion"].as_str().unwrap_or_default().to_owned(),
        spec: read(&object.spec).and_then(|spec| spec.ok_or_else(|| "it has no spec".to_owned())),
        status: read(&object.status).ok().flatten().unwrap_or_default(),
    }
}

pub(super) fn map(object: &SlimAny) -> BTreeMap<String, String> {
    object.data.clone()
}

/// The role of a machine: its Node's label, or where somebody has taken that away, what the machine itself says.
pub(super) fn role(node: &NodeFacts, machine: Option<&MachineFacts>) -> Role {
    let told = machine.and_then(|m| m.status.as_ref()).and_then(|s| s.role);
    if node.control_plane || told == Some(Role::ControlPlane) {
        Role::ControlPlane
    } else {
        Role::Worker
    }
}
