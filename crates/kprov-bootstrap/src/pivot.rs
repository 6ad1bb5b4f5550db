//! The wait for the step from the temporary control plane to the self-hosted one.
//!
//! It's over when the self-hosted instance works on every machine, told by pods whose probes ask their own revision's
//! address, and the standby has gone; "an API answers" says nothing. [`judge`] is pure and gives a typed reason for
//! everything that's still missing; [`observe`] asks the API server; [`wait`] does both until a deadline.

mod observe;

use std::collections::BTreeMap;
use std::fmt;

use jiff::Timestamp;
use kprov_types::names::MachineName;
use kprov_types::node::ControlPlaneSettings;
use kprov_types::ports::FIRST_REVISION;
use kprov_types::release::ImageComponent;

pub use observe::{ObserveError, Progress, WaitError, observe, wait};

/// What should be there in the end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expectation {
    /// The control-plane machines.
    pub control_plane: Vec<MachineName>,
    /// The other machines.
    pub workers: Vec<MachineName>,
    /// Whether CoreDNS was applied.
    pub coredns: bool,
    /// Whether kprov's operator was applied.
    pub operator: bool,
    /// Machines that were started again, and since when: what the API tells of their pods from before is no longer so, and
    /// until their kubelet reports again nobody corrects it.
    pub started: BTreeMap<MachineName, Timestamp>,
}

impl Expectation {
    /// What a cluster of these settings and workers should come to.
    pub fn new(settings: &ControlPlaneSettings, workers: Vec<MachineName>) -> Self {
        Self {
            control_plane: settings.members.iter().map(|m| m.name.clone()).collect(),
            workers,
            coredns: settings.release.image(ImageComponent::Coredns).is_some(),
            operator: settings.release.image(ImageComponent::KprovOperator).is_some(),
            started: BTreeMap::new(),
        }
    }
}

/// What the API tells of a cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observation {
    /// Its nodes.
    pub nodes: Vec<NodeSeen>,
    /// kprov's pods in kube-system.
    pub pods: Vec<PodSeen>,
    /// Deployments in kube-system.
    pub deployments: Vec<DeploymentSeen>,
    /// DaemonSets in kube-system.
    pub daemon_sets: Vec<DaemonSetSeen>,
}

/// A node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeSeen {
    /// Its name.
    pub name: String,
    /// Whether its condition `Ready` is true; else that condition's message.
    pub ready: Result<(), String>,
    /// Whether it has the control plane's label.
    pub control_plane: bool,
    /// Whether the API server gets an answer from its kubelet, for which the kubelet's serving certificate must have been
    /// signed: logs, exec and port-forward work.
    pub kubelet_answers: bool,
}

/// A pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodSeen {
    /// The component it runs, from its label.
    pub component: String,
    /// The node it's on.
    pub node: Option<String>,
    /// It mirrors a static pod.
    pub mirror: bool,
    /// It's ready and not on its way out.
    pub ready: bool,
    /// Its revision.
    pub revision: Option<u16>,
    /// When its container started.
    pub started: Option<Timestamp>,
}

/// A Deployment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeploymentSeen {
    /// Its name.
    pub name: String,
    /// How many pods it wants.
    pub wanted: i32,
    /// How many of them, of its newest template, are available.
    pub available: i32,
}

/// A DaemonSet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DaemonSetSeen {
    /// Its name.
    pub name: String,
    /// How many of its pods the controller manager has counted as ready.
    pub ready: usize,
}

/// Something that's still missing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Waiting {
    /// A machine has not registered its node.
    Node(MachineName),
    /// A control-plane machine's node has not got its label.
    Label(MachineName),
    /// A machine's self-hosted API server is not ready.
    ApiServer(MachineName),
    /// Pods of a Deployment are not available.
    Deployment {
        /// Which.
        name: &'static str,
        /// How many are.
        available: i32,
        /// How many it wants.
        wanted: i32,
    },
    /// A machine's kubelet has not reported its static pods, so nothing can be said of its standby.
    StaticPods(MachineName),
    /// A component of a machine's standby is still there.
    Standby {
        /// The machine.
        machine: MachineName,
        /// The component.
        component: String,
    },
    /// Pods of a machine that was started again are told of as they were before.
    Restart(MachineName),
    /// A machine's kube-proxy is not ready.
    KubeProxy(MachineName),
    /// A node is not Ready; the kubelet's words.
    NotReady {
        /// The machine.
        machine: MachineName,
        /// Why.
        why: String,
    },
    /// The API server can't reach a machine's kubelet, as long as its serving certificate is not signed.
    Kubelet(MachineName),
    /// No controller manager has counted the pods of a DaemonSet, all of which are ready: none leads yet.
    DaemonSet {
        /// Which.
        name: &'static str,
        /// How many are counted as ready.
        ready: usize,
        /// How many there should be.
        wanted: usize,
    },
}

impl fmt::Display for Waiting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Node(machine) => write!(f, "`{machine}` to register"),
            Self::Label(machine) => write!(f, "the control plane's label on `{machine}`"),
            Self::ApiServer(machine) => write!(f, "the self-hosted API server on `{machine}`"),
            Self::Deployment {
                name,
                available,
                wanted,
            } => write!(f, "`{name}` ({available} of {wanted} available)"),
            Self::StaticPods(machine) => write!(f, "the kubelet of `{machine}` to report its static pods"),
            Self::Standby { machine, component } => write!(f, "the temporary {component} on `{machine}` to go"),
            Self::Restart(machine) => write!(f, "the pods on `{machine}` to start again"),
            Self::KubeProxy(machine) => write!(f, "kube-proxy on `{machine}`"),
            Self::NotReady { machine, why } if why.is_empty() => write!(f, "`{machine}` to be Ready"),
            Self::NotReady { machine, why } => write!(f, "`{machine}` to be Ready: {why}"),
            Self::Kubelet(machine) => write!(f, "the serving certificate of the kubelet on `{machine}`"),
            Self::DaemonSet { name, ready, wanted } => write!(
                f,
                "a controller manager to lead and to count the pods of `{name}` ({ready} of {wanted} ready)"
            ),
        }
    }
}

/// How far the pivot is.
#[must_use]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PivotState {
    /// What's still missing, in the order in which it should come; empty when all is done.
    pub waiting: Vec<Waiting>,
}

impl PivotState {
    /// Whether nothing is missing.
    pub fn is_done(&self) -> bool {
        self.waiting.is_empty()
    }
}

/// Compares what's seen with what should be. Machines and Deployments that nobody expects don't matter.
pub fn judge(expected: &Expectation, seen: &Observation) -> PivotState {
    let Expectation {
        control_plane,
        workers,
        coredns,
        operator,
        started,
    } = expected;
    let node = |machine: &MachineName| seen.nodes.iter().find(|n| n.name == machine.as_str());
    let pods = |machine: &MachineName| {
        let machine = machine.clone();
        seen.pods
            .iter()
            .filter(move |p| p.node.as_deref() == Some(machine.as_str()))
    };
    let machines = || control_plane.iter().chain(workers);
    let mut waiting = Vec::new();
    for (machine, since) in started {
        if pods(machine).any(|p| p.started.is_some_and(|s| s < *since)) {
            waiting.push(Waiting::Restart(machine.clone()));
        }
    }
    waiting.extend(machines().filter(|m| node(m).is_none()).cloned().map(Waiting::Node));
    for machine in control_plane {
        if node(machine).is_some_and(|n| !n.control_plane) {
            waiting.push(Waiting::Label(machine.clone()));
        }
        let serves = |p: &PodSeen| {
            p.component == ImageComponent::KubeApiserver.as_str()
                && !p.mirror
                && p.ready
                && p.revision.is_some_and(|r| r >= FIRST_REVISION)
        };
        if !pods(machine).any(serves) {
            waiting.push(Waiting::ApiServer(machine.clone()));
        }
    }
    let deployments = [ImageComponent::KubeControllerManager, ImageComponent::KubeScheduler];
    waiting.extend(deployments.into_iter().filter_map(|d| short_of(seen, d)));
    for machine in control_plane {
        let mirrors: Vec<&PodSeen> = pods(machine).filter(|p| p.mirror).collect();
        let (etcd, standby): (Vec<&PodSeen>, _) = mirrors
            .into_iter()
            .partition(|p| p.component == ImageComponent::Etcd.as_str());
        // etcd's mirror shows that the kubelet reports static pods at all.
        if etcd.is_empty() {
            waiting.push(Waiting::StaticPods(machine.clone()));
        }
        waiting.extend(standby.iter().map(|p| Waiting::Standby {
            machine: machine.clone(),
            component: p.component.clone(),
        }));
    }
    for machine in machines() {
        if !pods(machine).any(|p| p.component == ImageComponent::KubeProxy.as_str() && p.ready) {
            waiting.push(Waiting::KubeProxy(machine.clone()));
        }
        let Some(node) = node(machine) else { continue };
        if let Err(why) = &node.ready {
            waiting.push(Waiting::NotReady {
                machine: machine.clone(),
                why: why.clone(),
            });
        }
        if !node.kubelet_answers {
            waiting.push(Waiting::Kubelet(machine.clone()));
        }
    }
    if *coredns {
        waiting.extend(short_of(seen, ImageComponent::Coredns));
    }
    if *operator {
        waiting.extend(short_of(seen, ImageComponent::KprovOperator));
    }
    // The temporary controller manager has gone and gives its lease back to nobody. That another one leads shows in what only
    // it writes.
    if waiting.is_empty() {
        let sets = [
            (ImageComponent::KubeApiserver, control_plane.len()),
            (ImageComponent::KubeProxy, control_plane.len() + workers.len()),
        ];
        waiting.extend(
            sets.into_iter()
                .filter_map(|(set, wanted)| uncounted(seen, set, wanted)),
        );
    }
    PivotState { waiting }
}

fn short_of(seen: &Observation, component: ImageComponent) -> Option<Waiting> {
    let name = component.as_str();
    let (available, wanted) = seen
        .deployments
        .iter()
        .find(|d| d.name == name)
        .map_or((0, 1), |d| (d.available, d.wanted));
    (available < wanted).then_some(Waiting::Deployment {
        name,
        available,
        wanted,
    })
}

fn uncounted(seen: &Observation, component: ImageComponent, wanted: usize) -> Option<Waiting> {
    let name = component.as_str();
    let set = seen.daemon_sets.iter().find(|d| d.name == name);
    let ready = set.map_or(0, |d| d.ready);
    (ready < wanted).then_some(Waiting::DaemonSet { name, ready, wanted })
}

#[cfg(test)]
mod tests;
