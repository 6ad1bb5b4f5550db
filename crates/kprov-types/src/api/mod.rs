//! kprov's own objects in the Kubernetes API, group `kprov.io`: what people ask for ([`VersionUpdateSpec`]), what the operator
//! orders of each machine ([`MachineSpec`]), and which releases a cluster knows ([`ReleaseSpec`]).
//!
//! All three kinds are cluster-scoped. Each field has one writer: specs of VersionUpdates and Releases are people's (or
//! `kprov upgrade`'s for them), their status the operator's; the spec of a Machine is the operator's, its status that machine's.

mod machine;
mod release;
mod version_update;

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use machine::*;
pub use release::*;
pub use version_update::*;

use crate::release::Digest;
use crate::version::KubernetesVersion;

/// The API group.
pub const GROUP: &str = "kprov.io";
/// The API version within the group.
pub const VERSION: &str = "v1alpha1";
/// The name of the one VersionUpdate that counts.
pub const VERSION_UPDATE: &str = "cluster";
/// The ConfigMap in kube-system with the public keys (PEM) that Releases must be signed by, one entry a key.
pub const RELEASE_KEYS_CONFIG_MAP: &str = "kprov-release-keys";

/// Annotation on pod templates, and so on pods: the digest of the release they were rendered from.
pub const RELEASE_ANNOTATION: &str = "kprov.io/release";
/// Annotation beside it: the release's Kubernetes version.
pub const KUBERNETES_ANNOTATION: &str = "kprov.io/kubernetes";
/// Annotation on DaemonSets and Deployments: when the template was last changed (RFC 3339).
pub const ROLLED_ANNOTATION: &str = "kprov.io/rolled-at";
/// Annotation on Nodes that the operator has cordoned: since when (RFC 3339). Others' cordons don't carry it.
pub const CORDONED_ANNOTATION: &str = "kprov.io/cordoned-at";
/// Label on Nodes: the pool, for policies of its own.
pub const POOL_LABEL: &str = "kprov.io/pool";

/// One release: the version, and which bytes exactly.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ReleaseRef {
    /// The Kubernetes version.
    pub version: KubernetesVersion,
    /// The digest of `release.json`.
    pub digest: Digest,
}

impl std::fmt::Display for ReleaseRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.version.fmt(f)
    }
}

/// A condition as Kubernetes' API conventions have it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    /// What it is about: one of the constants in [`condition`].
    #[serde(rename = "type")]
    pub kind: String,
    /// `True`, `False` or `Unknown`.
    pub status: String,
    /// Why, in one CamelCase word for programs.
    pub reason: String,
    /// Why, in words for people, and what to do.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// When the status was last another.
    pub last_transition_time: Timestamp,
    /// Of which generation of the object it speaks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
}

/// The types of conditions on a VersionUpdate.
pub mod condition {
    /// An API server answers on every control-plane machine.
    pub const AVAILABLE: &str = "Available";
    /// A change is under way.
    pub const PROGRESSING: &str = "Progressing";
    /// Something needs a person.
    pub const DEGRADED: &str = "Degraded";
    /// Nothing stands against a change of version.
    pub const UPGRADEABLE: &str = "Upgradeable";
}
