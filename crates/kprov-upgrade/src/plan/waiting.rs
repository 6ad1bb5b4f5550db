//! What holds progress back, in words.

use std::fmt;

use kprov_types::api::ReleaseRef;
use kprov_types::{KubernetesVersion, MachineName};

use crate::check::Violation;
use crate::model::Workload;

/// What is waited for. Its [`reason`](Self::reason) is for programs, its `Display` for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Waiting {
    /// Preflight has not been asked yet.
    Preflight {
        /// For which version.
        version: KubernetesVersion,
    },
    /// Machines fetch a release.
    Staging {
        /// Which release.
        release: ReleaseRef,
        /// How many machines don't have it yet.
        machines: usize,
        /// One of them.
        machine: MachineName,
        /// What it says about it; empty where it says nothing.
        message: String,
    },
    /// An etcd snapshot is being taken.
    Snapshot {
        /// By which machine.
        machine: MachineName,
        /// Its name.
        name: String,
    },
    /// The API has no such workload.
    NoWorkload {
        /// Which.
        workload: Workload,
    },
    /// A workload's controller has not seen its template yet.
    Controller {
        /// Which workload.
        workload: Workload,
    },
    /// A pod is to become ready.
    Pod {
        /// Of which workload.
        workload: Workload,
        /// Its name.
        pod: String,
        /// The machine it is on, where it is on one.
        machine: Option<MachineName>,
        /// For how long it isn't, in seconds.
        seconds: i64,
        /// After how long the release counts as bad, in seconds.
        limit: i64,
    },
    /// Pods are to be made.
    NoPod {
        /// Of which workload.
        workload: Workload,
        /// How many.
        missing: usize,
        /// A machine that has none, where each is to have one.
        machine: Option<MachineName>,
    },
    /// Pods of another release are to end.
    OldPods {
        /// Of which workload.
        workload: Workload,
        /// How many.
        pods: usize,
        /// One of them.
        pod: String,
    },
    /// A machine's standby control plane is to become of a release.
    Standby {
        /// Which machine.
        machine: MachineName,
        /// Which release.
        release: ReleaseRef,
    },
    /// A machine's standby API server is to answer before the machine's own is replaced.
    StandbyServes {
        /// Which machine.
        machine: MachineName,
    },
    /// A machine's standby API server is to stop, now that the machine's own answers.
    StandbyStops {
        /// Which machine.
        machine: MachineName,
    },
    /// An etcd member is not healthy, or not known.
    Etcd {
        /// On which machine.
        machine: MachineName,
        /// What is wrong with it; empty where the machine says nothing.
        message: String,
    },
    /// An etcd member is to run another release's etcd.
    EtcdUpdate {
        /// On which machine.
        machine: MachineName,
        /// Which release.
        release: ReleaseRef,
    },
    /// A machine is not Ready; nothing is asked of it until it is.
    NotReady {
        /// Which.
        machine: MachineName,
        /// For how long, in seconds.
        seconds: i64,
    },
    /// A machine has not told yet what it runs.
    Silent {
        /// Which.
        machine: MachineName,
    },
    /// A machine was told to run a release and is not there yet.
    Machine {
        /// Which machine.
        machine: MachineName,
        /// Which release.
        release: ReleaseRef,
        /// For how long, in seconds.
        seconds: i64,
        /// After how long it goes back by itself, in seconds.
        limit: i64,
        /// What it still lacks.
        lacks: Lack,
    },
    /// Pods that have to leave a machine have not all left.
    Drain {
        /// Which machine.
        machine: MachineName,
        /// How many pods.
        pods: usize,
        /// One of them, as `namespace/name`.
        pod: String,
        /// For how long, in seconds.
        seconds: i64,
        /// After how long a person is called, in seconds.
        limit: i64,
    },
    /// Pods on a machine that takes no new ones are not known yet.
    Pods {
        /// Which machine.
        machine: MachineName,
    },
    /// A `PodDisruptionBudget` holds pods of a machine back.
    Budget {
        /// Which machine.
        machine: MachineName,
        /// Which budget and pod, in words.
        blocked: String,
    },
    /// A machine could not be drained in time: a person has to look.
    DrainOverdue {
        /// Which machine.
        machine: MachineName,
        /// How many pods.
        pods: usize,
        /// What holds one of them back, in words.
        blocked: String,
        /// For how long, in seconds.
        seconds: i64,
    },
    /// A canary has to have been Ready for a while.
    Soak {
        /// Which machine.
        machine: MachineName,
        /// How much longer, in seconds.
        seconds: i64,
    },
    /// Canaries come before all other machines.
    Canary {
        /// How many run the release well.
        done: usize,
        /// How many have to.
        wanted: usize,
    },
    /// As many machines of a pool as may be are out of service.
    MaxUnavailable {
        /// Which pool.
        pool: String,
        /// How many are.
        unavailable: usize,
        /// How many may be.
        limit: usize,
        /// How many machines wait for that.
        machines: usize,
    },
    /// A machine went back from the current release by itself.
    WentBack {
        /// Which machine.
        machine: MachineName,
        /// Which release.
        release: ReleaseRef,
        /// Why, as it says.
        message: String,
    },
    /// Machines lag behind the current release, which the cluster has no verified Release of.
    NoCurrentRelease {
        /// The release.
        release: ReleaseRef,
        /// How many machines.
        machines: usize,
    },
    /// The plan would break an invariant and is not carried out.
    Unsafe(Violation),
}

/// What a machine lacks to run a release.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lack {
    /// It has not taken the order.
    Order,
    /// It still runs another release.
    Switch,
    /// Its kubelet has not reported the release's version.
    Kubelet,
    /// Its Node is not Ready.
    Ready,
}

impl Lack {
    /// What the machine has to do.
    fn words(self, release: &ReleaseRef) -> String {
        match self {
            Self::Order => format!("take its order to run {release}"),
            Self::Switch => format!("switch to {release}"),
            Self::Kubelet => format!("report a kubelet of {release}"),
            Self::Ready => "become Ready".to_owned(),
        }
    }
}

impl Waiting {
    /// Why, in one CamelCase word: stable, for programs and metrics.
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::Preflight { .. } => "Preflight",
            Self::Staging { .. } => "Staging",
            Self::Snapshot { .. } => "Snapshot",
            Self::NoWorkload { .. } => "NoWorkload",
            Self::Controller { .. } => "ControllerBehind",
            Self::Pod { .. } => "PodNotReady",
            Self::NoPod { .. } => "PodMissing",
            Self::OldPods { .. } => "OldPods",
            Self::Standby { .. } => "Standby",
            Self::StandbyServes { .. } => "StandbyStarting",
            Self::StandbyStops { .. } => "StandbyStopping",
            Self::Etcd { .. } => "EtcdUnhealthy",
            Self::EtcdUpdate { .. } => "EtcdUpdating",
            Self::NotReady { .. } => "MachineNotReady",
            Self::Silent { .. } => "MachineSilent",
            Self::Machine { .. } => "MachineUpdating",
            Self::Drain { .. } => "Draining",
            Self::Pods { .. } => "PodsUnknown",
            Self::Budget { .. } => "PodDisruptionBudget",
            Self::DrainOverdue { .. } => "DrainOverdue",
            Self::Soak { .. } => "CanarySoak",
            Self::Canary { .. } => "Canary",
            Self::MaxUnavailable { .. } => "MaxUnavailable",
            Self::WentBack { .. } => "MachineWentBack",
            Self::NoCurrentRelease { .. } => "NoCurrentRelease",
            Self::Unsafe(_) => "Unsafe",
        }
    }

    /// Waiting alone will not help: a person has to look.
    pub const fn needs_person(&self) -> bool {
        matches!(
            self,
            Self::DrainOverdue { .. }
                | Self::NoWorkload { .. }
                | Self::WentBack { .. }
                | Self::NoCurrentRelease { .. }
                | Self::Unsafe(_)
        )
    }
}

/// `3 pods`, `1 pod`.
struct Count(usize, &'static str);

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}{}", self.0, self.1, if self.0 == 1 { "" } else { "s" })
    }
}

/// The machine that something is on, where it is on one.
struct On<'a>(Option<&'a MachineName>);

impl fmt::Display for On<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.map_or(Ok(()), |machine| write!(f, " on `{machine}`"))
    }
}

/// What something says, after a colon, where it says anything.
struct Says<'a>(&'a str);

impl fmt::Display for Says<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            Ok(())
        } else {
            write!(f, ": {}", self.0)
        }
    }
}

/// The same, with other words where it says nothing.
struct SaysOr<'a>(&'a str, &'a str);

impl fmt::Display for SaysOr<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Says(if self.0.is_empty() { self.1 } else { self.0 }).fmt(f)
    }
}

impl fmt::Display for Waiting {
    #[expect(clippy::too_many_lines, reason = "a table: the words of each variant")]
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Preflight { version } => write!(f, "preflight for {version}"),
            Self::Staging {
                release,
                machines,
                machine,
                message,
            } => {
                let machines = Count(*machines, "machine");
                write!(
                    f,
                    "{machines} to fetch {release}; `{machine}`{}",
                    SaysOr(message, "has not begun")
                )
            }
            Self::Snapshot { machine, name } => write!(f, "machine `{machine}` to take the etcd snapshot `{name}`"),
            Self::NoWorkload { workload } => {
                write!(
                    f,
                    "`{}` to exist: kube-system has no such object any more",
                    workload.as_str()
                )
            }
            Self::Controller { workload } => {
                write!(
                    f,
                    "kube-controller-manager to take up the new template of `{}`",
                    workload.as_str()
                )
            }
            Self::Pod {
                pod,
                machine,
                seconds,
                limit,
                ..
            } => write!(
                f,
                "pod `{pod}`{} to become ready ({seconds} s of {limit} s)",
                On(machine.as_ref())
            ),
            Self::NoPod {
                workload,
                missing,
                machine,
            } => write!(
                f,
                "{} of `{}` to be made{}",
                Count(*missing, "pod"),
                workload.as_str(),
                On(machine.as_ref())
            ),
            Self::OldPods { workload, pods, pod } => {
                write!(
                    f,
                    "{} of `{}` to end, such as `{pod}`",
                    Count(*pods, "old pod"),
                    workload.as_str()
                )
            }
            Self::Standby { machine, release } => {
                write!(f, "the standby control plane of `{machine}` to become {release}")
            }
            Self::StandbyServes { machine } => {
                write!(
                    f,
                    "the standby API server of `{machine}` to answer before the other is replaced"
                )
            }
            Self::StandbyStops { machine } => write!(f, "the standby API server of `{machine}` to stop"),
            Self::Etcd { machine, message } => {
                let why = SaysOr(message, "nothing is known of it");
                write!(f, "the etcd member of `{machine}` to be healthy{why}")
            }
            Self::EtcdUpdate { machine, release } => {
                write!(f, "the etcd member of `{machine}` to run the etcd of {release}")
            }
            Self::NotReady { machine, seconds } => write!(
                f,
                "machine `{machine}` to become Ready (it has not been for {seconds} s)"
            ),
            Self::Silent { machine } => write!(f, "machine `{machine}` to tell what it runs"),
            Self::Machine {
                machine,
                release,
                seconds,
                limit,
                lacks,
            } => {
                let lacks = lacks.words(release);
                write!(f, "machine `{machine}` to {lacks} ({seconds} s of {limit} s)")
            }
            Self::Drain {
                machine,
                pods,
                pod,
                seconds,
                limit,
            } => {
                let pods = Count(*pods, "pod");
                write!(
                    f,
                    "{pods} to leave `{machine}`, such as `{pod}` ({seconds} s of {limit} s)"
                )
            }
            Self::Pods { machine } => write!(f, "the list of pods that have to leave `{machine}`"),
            Self::Budget { machine, blocked } => write!(f, "pods to leave `{machine}`: {blocked}"),
            Self::DrainOverdue {
                machine,
                pods,
                blocked,
                seconds,
            } => {
                let pods = Count(*pods, "pod");
                write!(
                    f,
                    "a person: {pods} of `{machine}` could not leave for {seconds} s{}",
                    Says(blocked)
                )
            }
            Self::Soak { machine, seconds } => write!(f, "canary `{machine}` to stay Ready for {seconds} s more"),
            Self::Canary { done, wanted } => write!(f, "canaries to run well ({done} of {wanted})"),
            Self::MaxUnavailable {
                pool,
                unavailable,
                limit,
                machines,
            } => {
                let machines = Count(*machines, "machine");
                write!(
                    f,
                    "{machines} of pool `{pool}` to have their turn: {unavailable} of at most {limit} are out of service"
                )
            }
            Self::WentBack {
                machine,
                release,
                message,
            } => write!(
                f,
                "a person: machine `{machine}` went back from {release}{}",
                Says(message)
            ),
            Self::NoCurrentRelease { release, machines } => {
                let machines = Count(*machines, "machine");
                write!(f, "a verified Release of {release}, which {machines} should run")
            }
            Self::Unsafe(violation) => write!(f, "nothing: the next steps would be unsafe ({violation})"),
        }
    }
}
