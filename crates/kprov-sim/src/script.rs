//! What happens in one simulation, as data: the cluster, the releases, and everything that goes wrong and when. A seed makes
//! a script; a script and nothing else decides a run.

use kprov_types::api::{MaxUnavailable, UpdatePolicy};
use serde::{Deserialize, Serialize};

use crate::rng::Rng;

/// Milliseconds of simulated time.
pub type Millis = u64;

/// A second, in [`Millis`].
pub(crate) const SECOND: Millis = 1000;
/// A minute, in [`Millis`].
pub(crate) const MINUTE: Millis = 60 * SECOND;

/// One simulation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Script {
    /// Decides every latency.
    pub seed: u64,
    /// The cluster at the start.
    pub cluster: Shape,
    /// The releases; the cluster runs the first.
    pub releases: Vec<ReleaseShape>,
    /// What is asked for at the start: an index into `releases`.
    pub wanted: usize,
    /// What goes wrong, and what people do.
    pub faults: Vec<Fault>,
}

/// A cluster.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Shape {
    /// Control-plane machines.
    pub control_plane: usize,
    /// Workers.
    pub workers: usize,
    /// Pools that the workers are of, in turn.
    pub pools: usize,
    /// Deployments of three replicas with a PodDisruptionBudget that lets one be missing.
    pub apps: usize,
    /// How long their pods take to end.
    pub grace: Millis,
    /// How machines are updated.
    pub policy: UpdatePolicy,
    /// Everything takes its average time, instead of a random one about it.
    pub even: bool,
}

/// A release.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ReleaseShape {
    /// Its Kubernetes version.
    pub version: String,
    /// Which etcd it brings.
    pub etcd: u32,
    /// Which CoreDNS and kprov it brings.
    pub addons: u32,
    /// What is wrong with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub defect: Option<Defect>,
    /// The release that comes without the defect; people make it known to the cluster when this one has failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fixed_by: Option<usize>,
}

/// What is wrong with a release.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Defect {
    /// Its API server crashes soon after it starts.
    ApiServerCrashes,
    /// Its API server never gets ready.
    ApiServerNeverReady,
    /// Its controller-manager crashes.
    ControllerManagerCrashes,
    /// Its scheduler never gets ready.
    SchedulerNeverReady,
    /// Its kube-proxy crashes.
    ProxyCrashes,
    /// Its CoreDNS never gets ready.
    DnsNeverReady,
    /// Its operator crashes.
    OperatorCrashes,
    /// Its etcd never gets healthy.
    EtcdNeverHealthy,
    /// Its kubelet never reports: on one machine, or on all.
    KubeletSilent(Option<usize>),
    /// Its bytes aren't those that it names: as one machine gets them, or as all do.
    BadDigest(Option<usize>),
    /// Its signature isn't good.
    Unverified,
}

/// Something that goes wrong, or that people do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Fault {
    /// The operator that was polled as the n-th is killed there.
    Kill {
        /// Polls are counted over all operators.
        poll: u64,
    },
    /// The operator that was polled as the n-th stands still.
    Stall {
        /// Polls are counted over all operators.
        poll: u64,
        /// How long.
        ms: Millis,
    },
    /// The n-th call of the API takes effect, and its reply is lost.
    LoseReply {
        /// Calls are counted over all operators.
        call: u64,
    },
    /// The n-th call of the API is refused.
    Refuse {
        /// Calls are counted over all operators.
        call: u64,
    },
    /// The n-th call of the API is late.
    Delay {
        /// Calls are counted over all operators.
        call: u64,
        /// How late.
        ms: Millis,
    },
    /// At some time something happens.
    At {
        /// When, after the start.
        ms: Millis,
        /// What.
        what: Happening,
    },
}

/// Something that happens at some time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Happening {
    /// A machine loses power, and has it back later.
    Down {
        /// Which.
        machine: usize,
        /// For how long.
        ms: Millis,
    },
    /// All machines lose power, and have it back later.
    PowerCut {
        /// For how long.
        ms: Millis,
    },
    /// Somebody wants another version.
    Desire {
        /// Which: an index into the releases.
        release: usize,
    },
    /// Somebody writes something that is no version.
    DesireNonsense,
    /// Somebody pauses, and resumes later.
    Pause {
        /// For how long.
        ms: Millis,
    },
    /// Somebody raises `spec.attempt`.
    TryAgain,
    /// Somebody cordons a machine.
    Cordon {
        /// Which.
        machine: usize,
    },
    /// Somebody uncordons a machine.
    Uncordon {
        /// Which.
        machine: usize,
    },
    /// Somebody deletes a pod.
    DeletePod {
        /// Which, counted among those there are then.
        pod: usize,
    },
    /// PodDisruptionBudgets let nothing go.
    Block {
        /// For how long.
        ms: Millis,
    },
    /// A worker joins.
    Join,
    /// A machine's kprov-node is restarted.
    RestartAgent {
        /// Which.
        machine: usize,
    },
}

impl Fault {
    /// When it is over at the latest, where it is about time.
    pub(crate) const fn over(self) -> Option<Millis> {
        match self {
            Self::At { ms, what } => Some(
                ms + match what {
                    Happening::Down { ms, .. }
                    | Happening::PowerCut { ms }
                    | Happening::Pause { ms }
                    | Happening::Block { ms } => ms,
                    _ => 0,
                },
            ),
            _ => None,
        }
    }
}

/// The versions that a script's chain of releases goes through.
const MINORS: &[&[&str]] = &[
    &["1.34.2", "1.35.1", "1.36.0"],
    &["1.34.2", "1.34.5", "1.35.1"],
    &["1.26.3", "1.27.1", "1.28.0"],
    &["1.20.2", "1.21.4", "1.22.3", "1.23.1"],
];

impl Script {
    /// The script of a seed.
    pub fn of(seed: u64) -> Self {
        let mut rng = Rng::new(seed.wrapping_mul(0x2545_f491_4f6c_dd1d) ^ 0x6b70_726f);
        let cluster = Shape::of(&mut rng);
        let (releases, wanted) = releases(&mut rng, &cluster);
        let faults = faults(&mut rng, &cluster, releases.len());
        Self {
            seed,
            cluster,
            releases,
            wanted,
            faults,
        }
    }

    /// When the last fault that is about time is over.
    pub fn quiet(&self) -> Millis {
        self.faults.iter().filter_map(|fault| fault.over()).max().unwrap_or(0)
    }
}

impl Shape {
    fn of(rng: &mut Rng) -> Self {
        let control_plane = if rng.one_in(2) { 1 } else { 3 };
        let workers = rng.below(5);
        let pools = 1 + rng.below(2);
        let max_unavailable = match rng.below(4) {
            0 => MaxUnavailable::Count(2),
            1 => MaxUnavailable::Percent(50),
            _ => MaxUnavailable::Count(1),
        };
        Self {
            control_plane,
            workers,
            pools,
            apps: rng.below(3),
            grace: if rng.one_in(3) { 30 * SECOND } else { 2 * SECOND },
            policy: UpdatePolicy {
                max_unavailable,
                canary: u32::from(!rng.one_in(4)),
                drain_timeout_seconds: 120,
                drain_force: rng.one_in(3),
                health_timeout_seconds: 120,
                ..UpdatePolicy::default()
            },
            even: false,
        }
    }
}

/// A chain of releases, which of them is wanted, and perhaps one that is bad.
fn releases(rng: &mut Rng, cluster: &Shape) -> (Vec<ReleaseShape>, usize) {
    let chain = MINORS[rng.below(MINORS.len())];
    let first = rng.below(chain.len() - 1);
    let chain = &chain[first..];
    let wanted = 1 + rng.below(chain.len() - 1);
    let (mut etcd, mut addons) = (1, 1);
    let mut releases: Vec<ReleaseShape> = chain
        .iter()
        .map(|version| {
            etcd += u32::from(rng.one_in(2));
            addons += u32::from(rng.one_in(2));
            ReleaseShape {
                version: (*version).to_owned(),
                etcd,
                addons,
                defect: None,
                fixed_by: None,
            }
        })
        .collect();
    if rng.one_in(3) {
        let bad = 1 + rng.below(wanted);
        let machines = cluster.control_plane + cluster.workers;
        let some = |rng: &mut Rng| (!rng.one_in(2)).then(|| rng.below(machines));
        let defect = match rng.below(12) {
            0 => Defect::ApiServerCrashes,
            1 => Defect::ApiServerNeverReady,
            2 => Defect::ControllerManagerCrashes,
            3 => Defect::SchedulerNeverReady,
            4 => Defect::ProxyCrashes,
            5 => Defect::DnsNeverReady,
            6 => Defect::OperatorCrashes,
            7 | 8 => Defect::KubeletSilent(some(rng)),
            9 => Defect::BadDigest(some(rng)),
            10 => Defect::EtcdNeverHealthy,
            _ => Defect::Unverified,
        };
        let fixed = ReleaseShape {
            version: next_patch(&releases[bad].version),
            ..releases[bad].clone()
        };
        releases[bad].defect = Some(defect);
        releases[bad].fixed_by = Some(releases.len());
        releases.push(fixed);
    }
    (releases, wanted)
}

/// The version with its last number raised by one.
fn next_patch(version: &str) -> String {
    match version.rsplit_once('.') {
        Some((minor, patch)) => format!("{minor}.{}", patch.parse::<u32>().unwrap_or(0) + 1),
        None => version.to_owned(),
    }
}

/// What goes wrong.
fn faults(rng: &mut Rng, cluster: &Shape, releases: usize) -> Vec<Fault> {
    let mut faults = Vec::new();
    // Some runs are calm: what breaks there breaks without help.
    let count = if rng.one_in(8) { 0 } else { rng.below(10) };
    // Most upgrades take a few minutes, those that fail or have to wait longer.
    let long = if rng.one_in(3) { 12 } else { 4 };
    for _ in 0..count {
        faults.push(match rng.below(12) {
            0..=2 => Fault::Kill {
                poll: rng.between(1, 400 * long),
            },
            3 => Fault::Stall {
                poll: rng.between(1, 400 * long),
                ms: rng.between(SECOND, 40 * SECOND),
            },
            4 => Fault::LoseReply {
                call: rng.between(1, 300 * long),
            },
            5 => Fault::Refuse {
                call: rng.between(1, 300 * long),
            },
            6 => Fault::Delay {
                call: rng.between(1, 300 * long),
                ms: rng.between(100, 4 * SECOND),
            },
            _ => Fault::At {
                ms: rng.between(0, long * MINUTE),
                what: happening(rng, cluster, releases),
            },
        });
    }
    faults
}

fn happening(rng: &mut Rng, cluster: &Shape, releases: usize) -> Happening {
    let machine = rng.below(cluster.control_plane + cluster.workers);
    match rng.below(18) {
        0..=2 => Happening::Down {
            machine,
            ms: rng.between(5 * SECOND, 5 * MINUTE),
        },
        3 | 4 => Happening::PowerCut {
            ms: rng.between(5 * SECOND, 2 * MINUTE),
        },
        5 | 6 => Happening::Desire {
            release: rng.below(releases),
        },
        7 => Happening::DesireNonsense,
        8 | 9 => Happening::Pause {
            ms: rng.between(5 * SECOND, 5 * MINUTE),
        },
        10 => Happening::TryAgain,
        11 => Happening::Cordon { machine },
        12 => Happening::Uncordon { machine },
        13 => Happening::DeletePod { pod: rng.below(40) },
        14 => Happening::Block {
            ms: rng.between(10 * SECOND, 5 * MINUTE),
        },
        15 => Happening::Join,
        _ => Happening::RestartAgent { machine },
    }
}
