//! What the planner knows: one picture of a cluster, and what is wanted of it. Data only; equal pictures give equal plans.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use kprov_types::api::{Failure, Finding, MachineFailure, ReleaseRef, UpdatePolicy};
use kprov_types::{Digest, KubernetesVersion, MachineName, Role};

/// Everything a plan is made from.
#[derive(Clone, Debug, PartialEq)]
pub struct Input {
    /// What is asked for.
    pub wanted: Wanted,
    /// What there is.
    pub observed: Observed,
    /// The time of the observation.
    pub now: Timestamp,
}

/// What the `VersionUpdate` asks for.
#[derive(Clone, Debug, PartialEq)]
pub struct Wanted {
    /// `spec.desiredVersion`, as written.
    pub desired: String,
    /// `spec.paused`.
    pub paused: bool,
    /// `spec.policy`.
    pub policy: UpdatePolicy,
    /// `spec.force`.
    pub force: BTreeSet<String>,
    /// `spec.attempt`.
    pub attempt: u32,
}

/// A release that the cluster knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KnownRelease {
    /// Which.
    pub release: ReleaseRef,
    /// Its digest and signature are good; else why not.
    pub verified: Result<(), String>,
    /// [`kprov_types::Release::minimum_from`].
    pub minimum_from: Option<KubernetesVersion>,
    /// The pinned image of each part; a part that the release does not have is missing.
    pub images: BTreeMap<Part, String>,
}

/// The parts that run from an image of the release.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Part {
    /// etcd; its pods are static, ordered machine by machine.
    Etcd,
    /// A part that the API itself runs.
    Workload(Workload),
}

/// What runs as an object of the API: a DaemonSet or a Deployment with one pod template.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Workload {
    /// kube-apiserver.
    ApiServer,
    /// kube-controller-manager.
    ControllerManager,
    /// kube-scheduler.
    Scheduler,
    /// kube-proxy.
    Proxy,
    /// CoreDNS.
    Dns,
    /// kprov's operator.
    Operator,
}

impl Workload {
    /// All of them, in the order in which an upgrade rolls them.
    pub const ALL: [Self; 6] = [
        Self::ApiServer,
        Self::ControllerManager,
        Self::Scheduler,
        Self::Proxy,
        Self::Dns,
        Self::Operator,
    ];

    /// The name of its object.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::ApiServer => "kube-apiserver",
            Self::ControllerManager => "kube-controller-manager",
            Self::Scheduler => "kube-scheduler",
            Self::Proxy => "kube-proxy",
            Self::Dns => "coredns",
            Self::Operator => "kprov-operator",
        }
    }
}

/// One picture of a cluster.
#[derive(Clone, Debug, PartialEq)]
pub struct Observed {
    /// `status.currentVersion` and its release: the last hop that was finished.
    pub current: ReleaseRef,
    /// When the hop under way began (`status.hopStarted`).
    pub hop_started: Option<Timestamp>,
    /// The release that failed last (`status.failure`).
    pub failure: Option<Failure>,
    /// The releases that the cluster knows.
    pub releases: Vec<KnownRelease>,
    /// What the API runs. A workload that the cluster does not have is missing.
    pub workloads: BTreeMap<Workload, WorkloadSeen>,
    /// The machines, by name.
    pub machines: BTreeMap<MachineName, MachineSeen>,
    /// What preflight found for the desired version; `None`: not asked yet.
    pub findings: Option<Vec<Finding>>,
}

/// A workload as seen.
#[derive(Clone, Debug, PartialEq)]
pub struct WorkloadSeen {
    /// The release its template is of.
    pub template: ReleaseRef,
    /// The pinned image of the template.
    pub image: String,
    /// The release of the template that the last roll replaced and [`Action::RollBack`] would put back; `None` where the
    /// API keeps none.
    pub previous: Option<ReleaseRef>,
    /// The template's revision; 0 where the workload has none (kube-proxy, CoreDNS, the operator).
    pub revision: u16,
    /// When the template was last changed.
    pub rolled: Option<Timestamp>,
    /// How many pods there should be.
    pub wanted: usize,
    /// The object's controller has seen the template (`observedGeneration`).
    pub settled: bool,
    /// The controller replaces pods by itself, the new one beside the old (or, where there is no surge, one at a time).
    /// `false`: each old pod must be deleted by whoever rolls (`OnDelete`).
    pub automatic: bool,
    /// Its pods, those that are leaving included.
    pub instances: Vec<Instance>,
}

/// A pod of a workload.
#[derive(Clone, Debug, PartialEq)]
pub struct Instance {
    /// The pod's name.
    pub name: String,
    /// The machine it is on; `None` while it isn't scheduled.
    pub machine: Option<MachineName>,
    /// The release it was rendered from.
    pub release: ReleaseRef,
    /// Its revision; 0 where the workload has none.
    pub revision: u16,
    /// When it was made.
    pub created: Timestamp,
    /// It is ready: of an API server, its own process says so at its own address and reports the release's version.
    pub ready: bool,
    /// Since when it is ready, or not (its `Ready` condition); the time it was made where it was neither yet.
    pub ready_since: Timestamp,
    /// It is on its way out.
    pub leaving: bool,
    /// It fails again and again, or can't start: in words.
    pub trouble: Option<String>,
}

/// A machine as seen.
#[derive(Clone, Debug, PartialEq)]
pub struct MachineSeen {
    /// Its role.
    pub role: Role,
    /// Its pool.
    pub pool: String,
    /// Its Node is Ready.
    pub ready: bool,
    /// Since when its Node is Ready, or not.
    pub ready_since: Timestamp,
    /// Its Node takes no new pods (`spec.unschedulable`).
    pub cordoned: bool,
    /// Since when the operator has cordoned it; `None`: it has not.
    pub cordoned_by_us: Option<Timestamp>,
    /// Its kubelet's version.
    pub kubelet: KubernetesVersion,
    /// The release that its host programs are of, as it tells.
    pub running: Option<ReleaseRef>,
    /// The release that it was told to run, and since when.
    pub ordered: Option<(ReleaseRef, Timestamp)>,
    /// Its kprov-node has taken the last order.
    pub order_seen: bool,
    /// The release that it went back from last, for the order that stands.
    pub failure: Option<MachineFailure>,
    /// Releases that it was told to fetch.
    pub stage_ordered: BTreeSet<Digest>,
    /// Releases that are on it, or can't be had.
    pub staged: BTreeMap<Digest, Staged>,
    /// Its etcd member.
    pub etcd: Option<EtcdSeen>,
    /// Its standby control plane.
    pub standby: Option<StandbySeen>,
    /// The snapshots it keeps, by name.
    pub snapshots: BTreeSet<String>,
    /// The snapshot that it was told to take.
    pub snapshot_ordered: Option<String>,
    /// Pods that have to leave before its host programs change; known while it is cordoned by us, else `None`.
    pub drain: Option<Drain>,
}

/// How far a release is on a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Staged {
    /// It's on its way; what is being fetched, or what went wrong last.
    Fetching(String),
    /// All of it is there, verified.
    Ready,
    /// Its bytes are not what its manifest names.
    Bad(String),
}

/// An etcd member as seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EtcdSeen {
    /// The pinned image it runs from.
    pub image: String,
    /// The release it was told to run, and since when.
    pub ordered: Option<ReleaseRef>,
    /// It answers, knows a leader and has a vote.
    pub healthy: bool,
    /// What is wrong with it.
    pub message: String,
}

/// A standby control plane as seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StandbySeen {
    /// The release its manifests are of, as the machine tells.
    pub release: Option<ReleaseRef>,
    /// The release it was told to be of.
    pub ordered: Option<ReleaseRef>,
    /// It was told to serve beside the self-hosted API server.
    pub serve_ordered: bool,
    /// Its API server answers that it is ready.
    pub api_ready: bool,
}

/// What still has to leave a machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Drain {
    /// Pods that have to leave, as `namespace/name`.
    pub remaining: BTreeSet<String>,
    /// How many of these are on their way out already: nothing is to be done about them but to wait.
    pub leaving: usize,
    /// What holds some of them back: a `PodDisruptionBudget` and the pod, in words.
    pub blocked: Vec<String>,
}

/// Something that the executor does. Every action is idempotent and says what it expects; where the cluster isn't as expected
/// any more, it isn't done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Begin a hop: write down when. A hop that had begun to another release, and has changed nothing yet, is forgotten.
    Begin {
        /// To which release.
        release: ReleaseRef,
    },
    /// Tell machines to fetch and verify a release.
    Stage {
        /// Which.
        release: ReleaseRef,
        /// Those that have not been told.
        machines: BTreeSet<MachineName>,
    },
    /// Tell a control-plane machine to take an etcd snapshot.
    Snapshot {
        /// Which machine.
        machine: MachineName,
        /// The snapshot's name.
        name: String,
    },
    /// Change a workload's template. Its controller does the rest.
    Roll {
        /// Which.
        workload: Workload,
        /// The release its template is of now.
        from: ReleaseRef,
        /// The release to render the new template from.
        to: ReleaseRef,
    },
    /// Put a workload's template back to what it was before the last roll, revision included.
    RollBack {
        /// Which.
        workload: Workload,
        /// The release its template is of now.
        from: ReleaseRef,
        /// The release of the template to put back.
        to: ReleaseRef,
    },
    /// Tell a control-plane machine what its standby should be.
    Standby {
        /// Which machine.
        machine: MachineName,
        /// The release of its manifests.
        release: ReleaseRef,
        /// Whether its API server should run now.
        serve: bool,
    },
    /// Delete a pod whose workload's controller waits for that (`OnDelete`).
    Replace {
        /// Which workload.
        workload: Workload,
        /// The pod.
        pod: String,
        /// The machine it is on.
        machine: MachineName,
    },
    /// Tell a control-plane machine to run its etcd member from a release.
    Etcd {
        /// Which machine.
        machine: MachineName,
        /// The release.
        to: ReleaseRef,
    },
    /// Keep new pods off a machine.
    Cordon {
        /// Which.
        machine: MachineName,
    },
    /// Evict the pods that have to leave; within `PodDisruptionBudget`s, unless `force`.
    Drain {
        /// Which machine.
        machine: MachineName,
        /// Delete what budgets hold back.
        force: bool,
    },
    /// Tell a machine to run a release's host programs. Where it was told that already and went back from it (its failure
    /// is for the order that stands), it is told anew, by a new order; else a second time changes nothing.
    Run {
        /// Which machine.
        machine: MachineName,
        /// The release it runs now, where it tells.
        from: Option<ReleaseRef>,
        /// The release.
        to: ReleaseRef,
    },
    /// Let new pods on a machine that we have cordoned.
    Uncordon {
        /// Which.
        machine: MachineName,
    },
    /// Write down that a release failed; from then on everything goes back.
    Fail {
        /// What failed. The executor adds the log.
        failure: Failure,
    },
    /// Write down that everything is back as it was before the failed release. Machines are told no longer to fetch it, so
    /// that a next try begins afresh.
    Reverted {
        /// The release that failed.
        release: ReleaseRef,
    },
    /// Finish a hop: current version, the cluster's settings, history. Where the release is the current one already, a hop
    /// that had begun was given up and everything is back: only that is written down.
    Finish {
        /// The release that the cluster runs now.
        release: ReleaseRef,
    },
}
