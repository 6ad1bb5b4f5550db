//! What was gathered from the API: plain data, so that judging needs no cluster.

use std::collections::{BTreeMap, BTreeSet};

use kprov_types::node::ControlPlaneSettings;
use kprov_types::{KubernetesVersion, MachineName};

/// Why a part could not be gathered, in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unchecked(pub String);

/// Everything that was gathered; each part for itself.
#[derive(Clone, Debug, PartialEq)]
pub struct Facts {
    /// The control plane's programs as their templates have them.
    pub programs: Result<Vec<ProgramSeen>, Unchecked>,
    /// The cluster's settings, from which kprov renders those templates.
    pub settings: Result<Box<ControlPlaneSettings>, Unchecked>,
    /// API versions that clients have asked for since their API server started, if a version on the way removes them.
    pub requests: Result<Vec<ApiRequest>, Unchecked>,
    /// Objects that depend on an API version which a version on the way removes.
    pub stored: Result<Vec<StoredObjects>, Unchecked>,
    /// PodDisruptionBudgets that stand in the way of drains.
    pub budgets: Result<Budgets, Unchecked>,
    /// Webhooks that refuse what they can't be asked about, and intercept what an upgrade writes.
    pub webhooks: Result<Vec<WebhookSeen>, Unchecked>,
    /// Changes as an upgrade makes them that admission refuses.
    pub refused: Result<Vec<RefusedWrite>, Unchecked>,
}

/// A program of the control plane, from the template of a DaemonSet or Deployment of kprov's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProgramSeen {
    /// The program, such as `kube-apiserver`, which is the container's name.
    pub name: String,
    /// The Kubernetes version its template is of, where that is known.
    pub version: Option<KubernetesVersion>,
    /// Its flags: `--name=value`, or `--name`.
    pub flags: Vec<String>,
}

/// A resource of an API version that clients asked for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ApiRequest {
    /// The group; empty for the core group.
    pub group: String,
    /// The version.
    pub version: String,
    /// The resource, with its subresource: `cronjobs`, `cronjobs/status`.
    pub resource: String,
    /// The minor of Kubernetes 1 that doesn't have it any more.
    pub removed: u64,
    /// What was asked for: `LIST`, `WATCH`, `GET`, `POST`, ...; empty where that could not be told.
    pub verbs: BTreeSet<String>,
}

/// Objects that depend on an API version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredObjects {
    /// Group and version, such as `networking.k8s.io/v1beta1`.
    pub api_version: String,
    /// The resource, such as `ingresses`.
    pub resource: String,
    /// How many there are.
    pub count: usize,
    /// Some of them, as `namespace/name` or `name`.
    pub examples: Vec<String>,
}

/// PodDisruptionBudgets that stand in the way of drains.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Budgets {
    /// Those that allow no disruption now, kprov's own left out.
    pub closed: Vec<BudgetSeen>,
    /// Pairs of budgets for the same pod.
    pub overlaps: Vec<BudgetOverlap>,
}

/// A PodDisruptionBudget that allows no disruption now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BudgetSeen {
    /// `namespace/name`.
    pub name: String,
    /// `status.currentHealthy`.
    pub healthy: i64,
    /// `status.desiredHealthy`.
    pub desired: i64,
    /// `status.expectedPods`.
    pub expected: i64,
    /// Pods it is for that a drain would evict, or the first few of them.
    pub pods: Vec<PodSeen>,
    /// There are more.
    pub more: bool,
}

/// A pod that a drain would evict.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodSeen {
    /// Its name.
    pub name: String,
    /// The machine it is on.
    pub machine: MachineName,
}

/// A pod that two budgets are for. No such pod can be evicted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BudgetOverlap {
    /// The namespace.
    pub namespace: String,
    /// The names of the two budgets.
    pub budgets: [String; 2],
    /// One of the pods.
    pub pod: PodSeen,
}

/// Which kind of configuration a webhook is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum WebhookKind {
    /// `MutatingWebhookConfiguration`.
    Mutating,
    /// `ValidatingWebhookConfiguration`.
    Validating,
}

/// A webhook with `failurePolicy: Fail` that intercepts what an upgrade writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WebhookSeen {
    /// Its configuration's kind.
    pub kind: WebhookKind,
    /// Its configuration's name.
    pub configuration: String,
    /// Its own name.
    pub name: String,
    /// What it intercepts, such as `pods in kube-system` or `nodes`.
    pub intercepts: Vec<String>,
    /// The Service it is asked through, as `namespace/name`.
    pub service: String,
    /// Ready backends, by the machine they are on (an empty name where that is not told).
    pub backends: BTreeMap<String, usize>,
}

/// A change that admission refuses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefusedWrite {
    /// The object, as `DaemonSet kube-system/kube-apiserver`.
    pub object: String,
    /// What the API server said.
    pub message: String,
}
