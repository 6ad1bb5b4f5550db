//! What the operator orders of each machine, and what the machine tells.

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::ReleaseRef;
use crate::machine::Role;
use crate::release::Digest;

/// `Machine.spec`: written by the operator alone. The object has the name of its Node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct MachineSpec {
    /// Counts orders. A machine refuses a spec whose order is lower than the last it has acted on (`status.observedOrder`), as
    /// it would see from an operator or an API server that is behind.
    pub order: u64,
    /// Releases whose images and programs must be on the machine, verified and ready to run.
    pub stage: Vec<ReleaseRef>,
    /// The release whose kubelet, containerd, runc, CNI plugins and kprov-node the machine should run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub run: Option<RunOrder>,
    /// The release whose etcd the machine's member should run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub etcd: Option<ReleaseRef>,
    /// The last control plane known to be good, which the machine falls back to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub standby: Option<StandbyOrder>,
    /// An etcd snapshot that should be there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<SnapshotOrder>,
    /// etcd's data should be replaced by a snapshot's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub restore: Option<RestoreOrder>,
}

/// Which release a machine should run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RunOrder {
    /// The release.
    pub release: ReleaseRef,
    /// When this was ordered.
    pub since: Timestamp,
    /// How long the new kubelet may take to report Ready, in seconds, before the machine goes back by itself.
    pub timeout_seconds: u32,
}

/// What the standby control plane should be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StandbyOrder {
    /// The release it runs from.
    pub release: ReleaseRef,
    /// The API server's standby should run now, beside the self-hosted one, and stay until told otherwise: before 1.22 it
    /// covers the swap.
    #[serde(default)]
    pub serve: bool,
}

/// A snapshot of etcd.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SnapshotOrder {
    /// Its name, such as `before-1.36.3-20260412t091500z`.
    pub name: String,
}

/// An etcd restore.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RestoreOrder {
    /// The snapshot's name.
    pub snapshot: String,
    /// Tells this restore from another of the same snapshot: each is done once.
    pub id: String,
    /// The machine that has the snapshot and begins; the others join it with empty data.
    pub from: String,
}

/// `Machine.status`: written by the machine's own kprov-node alone.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct MachineStatus {
    /// The highest order that the machine has taken.
    pub observed_order: u64,
    /// Its role.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<Role>,
    /// kprov-node's own version, and the digest of its program.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kprov_node: Option<ProgramStatus>,
    /// The release that runs: kubelet, containerd and the rest of the host's programs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub running: Option<ReleaseRef>,
    /// containerd's version.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub containerd: Option<String>,
    /// What the machine is doing about its orders, in words; empty when all are carried out.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// Releases that are on the machine, or on their way.
    pub staged: Vec<StagedStatus>,
    /// The last release that the machine went back from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure: Option<MachineFailure>,
    /// Its etcd member, on control-plane machines.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub etcd: Option<EtcdStatus>,
    /// Its standby control plane, on control-plane machines.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub standby: Option<StandbyStatus>,
    /// API server processes on the machine, each asked at its own address.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub api_servers: Vec<ApiServerStatus>,
    /// Snapshots of etcd that the machine keeps, oldest first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub snapshots: Vec<SnapshotStatus>,
    /// The last restore that was carried out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub restored: Option<String>,
    /// Free space for images and releases, in MiB, rounded down to 256.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_free_mib: Option<u64>,
    /// The certificate on the machine that expires first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub certificate_expires: Option<CertificateExpiry>,
}

/// A program on the machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ProgramStatus {
    /// Its version.
    pub version: String,
    /// The SHA-256 of its file.
    pub digest: Digest,
}

/// A release on its way onto the machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StagedStatus {
    /// The release.
    pub release: ReleaseRef,
    /// Whether all of it is here and verified.
    pub ready: bool,
    /// What is being fetched, or what went wrong last.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// It can't be had, however often it's tried: its bytes are not those that the manifest names.
    #[serde(default)]
    pub bad: bool,
}

/// A release that a machine tried and went back from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MachineFailure {
    /// The release.
    pub release: ReleaseRef,
    /// The order it was tried for.
    pub order: u64,
    /// What went wrong, in words.
    pub message: String,
    /// The last lines of kubelet's log.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub log: Vec<String>,
    /// When.
    pub time: Timestamp,
}

/// An etcd member.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct EtcdStatus {
    /// The image its static pod runs from, pinned by digest.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub image: String,
    /// Its version, as it says itself.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub version: String,
    /// It answers, knows a leader, and has a vote.
    pub healthy: bool,
    /// What is wrong with it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// Members of the cluster as this one lists them.
    pub members: u32,
    /// The size of its database, in MiB.
    pub database_mib: u64,
    /// Alarms such as `NOSPACE` and `CORRUPT`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub alarms: Vec<String>,
}

/// The standby control plane.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StandbyStatus {
    /// The release its manifests are of.
    pub release: ReleaseRef,
    /// The components that run now.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub placed: Vec<String>,
    /// Its API server answers that it is ready.
    #[serde(default)]
    pub api_ready: bool,
}

/// An API server process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ApiServerStatus {
    /// Its revision, and so its address.
    pub revision: u16,
    /// Whether it says that it is ready.
    pub ready: bool,
    /// The version it reports; empty until it answers.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub version: String,
    /// Since when it's ready or not, as the machine saw it; older kprov-nodes don't tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<Timestamp>,
}

/// A snapshot of etcd on disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SnapshotStatus {
    /// Its name.
    pub name: String,
    /// When it was taken.
    pub time: Timestamp,
    /// Its size in bytes.
    pub size: u64,
    /// The SHA-256 of its file.
    pub digest: Digest,
}

/// A certificate that expires.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CertificateExpiry {
    /// Its file.
    pub path: String,
    /// When.
    pub time: Timestamp,
}
