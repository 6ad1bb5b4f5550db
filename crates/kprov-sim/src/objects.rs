//! The things of the world: releases, objects of the API, pods, machines.

use std::collections::{BTreeMap, BTreeSet};

use kprov_types::api::{Failure, MachineFailure, ReleaseRef, UpdatePolicy};
use kprov_types::{MachineName, Role};
use kprov_upgrade::model::{KnownRelease, Workload};
use kprov_upgrade::plan::State;

use crate::script::{Defect, Millis};

/// A release, as an index into [`World::releases`](crate::world::World::releases).
pub(crate) type ReleaseId = usize;
/// A machine, as an index into [`World::machines`](crate::world::World::machines).
pub(crate) type MachineId = usize;
/// A pod's number.
pub(crate) type PodId = u32;

/// A release.
#[derive(Debug)]
pub(crate) struct Release {
    pub(crate) reference: ReleaseRef,
    pub(crate) minor: u64,
    pub(crate) etcd: u32,
    pub(crate) defect: Option<Defect>,
    pub(crate) fixed_by: Option<ReleaseId>,
    /// The cluster knows it.
    pub(crate) known: bool,
    /// As the operator tells of it.
    pub(crate) seen: KnownRelease,
}

/// The VersionUpdate, and the settings beside it.
#[derive(Debug)]
pub(crate) struct Update {
    pub(crate) desired: String,
    /// When `desired` was last changed.
    pub(crate) desired_since: Millis,
    pub(crate) paused: bool,
    pub(crate) paused_since: Millis,
    pub(crate) policy: UpdatePolicy,
    pub(crate) attempt: u32,
    pub(crate) current: ReleaseId,
    /// The hop under way, and since when.
    pub(crate) hop: Option<(ReleaseId, Millis)>,
    pub(crate) failure: Option<Failure>,
    /// What the operator told last, and when.
    pub(crate) told: Option<(State, Millis)>,
    /// The release that machines which join take (the settings ConfigMap).
    pub(crate) settings: ReleaseId,
}

/// A workload's pod template.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Template {
    /// Equal templates have equal ids, as they have equal hashes.
    pub(crate) id: u32,
    pub(crate) release: ReleaseId,
    pub(crate) revision: u16,
}

/// A DaemonSet or Deployment.
#[derive(Debug)]
pub(crate) struct Object {
    pub(crate) template: Template,
    /// Earlier templates, oldest first, as revisions of a DaemonSet and ReplicaSets keep them.
    pub(crate) history: Vec<Template>,
    pub(crate) rolled: Option<Millis>,
    pub(crate) generation: u64,
    pub(crate) observed: u64,
    /// It rolls by itself.
    pub(crate) automatic: bool,
}

/// Whose pod it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    /// A part of the cluster itself.
    Workload(Workload),
    /// People's.
    App(usize),
}

/// What a pod's container does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Process {
    /// Nothing has been started.
    None,
    /// It starts.
    Starting,
    /// It runs and isn't ready.
    Up,
    /// It is ready.
    Ready,
    /// It has crashed and waits to be started again.
    BackOff,
    /// It was told to end.
    Stopping,
}

/// A pod.
#[derive(Debug)]
pub(crate) struct Pod {
    pub(crate) owner: Owner,
    pub(crate) template: Template,
    /// Of a DaemonSet's pod: the machine it is for.
    pub(crate) target: Option<MachineId>,
    pub(crate) created: Millis,
    pub(crate) process: Process,
    /// Counts what became of the process.
    pub(crate) life: u32,
    pub(crate) restarts: u32,
    // As the API tells.
    pub(crate) machine: Option<MachineId>,
    pub(crate) ready: bool,
    pub(crate) ready_since: Millis,
    pub(crate) leaving: bool,
    pub(crate) trouble: Option<&'static str>,
}

impl Pod {
    pub(crate) fn is_of(&self, workload: Workload) -> bool {
        self.owner == Owner::Workload(workload)
    }
}

/// A kubelet's process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kubelet {
    /// It doesn't run.
    Stopped,
    /// It starts.
    Starting,
    /// It runs, and its Node isn't Ready yet. A silent one stays so.
    Running,
    /// It runs, and says that its Node is Ready.
    Ready,
}

/// How far a release is on a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fetch {
    /// On its way.
    Fetching,
    /// All there.
    Ready,
    /// Not what it says.
    Bad,
}

/// `Machine.spec`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Orders {
    pub(crate) order: u64,
    pub(crate) stage: BTreeSet<ReleaseId>,
    /// The release, since when, and how long it may take.
    pub(crate) run: Option<(ReleaseId, Millis, Millis)>,
    pub(crate) etcd: Option<ReleaseId>,
    pub(crate) standby: Option<(ReleaseId, bool)>,
    pub(crate) snapshot: Option<String>,
}

/// `Machine.status`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Told {
    pub(crate) order: u64,
    pub(crate) running: Option<ReleaseId>,
    pub(crate) staged: BTreeMap<ReleaseId, Fetch>,
    pub(crate) failure: Option<MachineFailure>,
    /// Which etcd it runs, and whether that is healthy.
    pub(crate) etcd: Option<(ReleaseId, bool)>,
    /// The standby's release, and whether its API server is ready.
    pub(crate) standby: Option<(ReleaseId, bool)>,
    pub(crate) snapshots: BTreeSet<String>,
}

/// A Node object.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub(crate) ready: bool,
    pub(crate) ready_since: Millis,
    pub(crate) heartbeat: Millis,
    pub(crate) kubelet: ReleaseId,
    pub(crate) cordoned: bool,
    pub(crate) cordoned_by_us: Option<Millis>,
    /// A person wants it cordoned.
    pub(crate) cordoned_by_person: bool,
}

/// A release that a machine tries; on its disk.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Trial {
    pub(crate) from: ReleaseId,
    pub(crate) to: ReleaseId,
    pub(crate) order: u64,
    pub(crate) limit: Millis,
    pub(crate) starts: u32,
}

/// An etcd member.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Member {
    pub(crate) release: ReleaseId,
    pub(crate) up: bool,
    /// It was stopped because of an order.
    pub(crate) by_us: bool,
}

/// A standby control plane.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Standby {
    pub(crate) release: ReleaseId,
    pub(crate) api: Process,
    /// What `api` runs, which may be older than `release`.
    pub(crate) api_release: ReleaseId,
    /// Controller-manager and scheduler run.
    pub(crate) managers: bool,
    pub(crate) life: u32,
}

/// A machine.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is one independent fact")]
pub(crate) struct Machine {
    pub(crate) name: MachineName,
    pub(crate) role: Role,
    pub(crate) pool: usize,
    /// It has power.
    pub(crate) up: bool,
    /// It has power, and kprov-node has started.
    pub(crate) booted: bool,
    /// Counts its lives.
    pub(crate) life: u32,
    /// The release that `current` points to.
    pub(crate) current: ReleaseId,
    pub(crate) trial: Option<Trial>,
    pub(crate) kubelet: Kubelet,
    pub(crate) kubelet_life: u32,
    /// The orders it has taken; on its disk.
    pub(crate) orders: Orders,
    pub(crate) staged: BTreeMap<ReleaseId, Fetch>,
    pub(crate) failure: Option<MachineFailure>,
    pub(crate) etcd: Option<Member>,
    /// A release whose etcd it went back from; on its disk.
    pub(crate) etcd_failed: Option<ReleaseId>,
    pub(crate) standby: Option<Standby>,
    pub(crate) snapshots: BTreeSet<String>,
    pub(crate) snapshotting: bool,
    // In the API.
    pub(crate) spec: Orders,
    pub(crate) status: Told,
    pub(crate) node: Option<Node>,
    // Queued already.
    pub(crate) kubelet_queued: bool,
    pub(crate) agent_queued: bool,
}

/// A Deployment of people's.
#[derive(Debug)]
pub(crate) struct App {
    pub(crate) replicas: usize,
}

/// Who leads: a process that holds a Lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Leader {
    /// A pod's process.
    Pod(PodId, u32),
    /// A machine's standby.
    Standby(MachineId),
}

/// A Lease.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lease<T> {
    pub(crate) holder: Option<T>,
    pub(crate) renewed: Millis,
}

/// An operator's process: its pod and which of the pod's processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Operator(pub(crate) PodId, pub(crate) u32);
