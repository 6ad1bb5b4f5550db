//! What must always hold, as functions over states and plans. Pure, and written without the planner's own reasoning, so that
//! it finds what that gets wrong.
//!
//! A plan is judged by everything that may run while its steps are done in any order, one by one or only some of them: each
//! pod template and order adds the release it names to what may run and takes nothing away, and each removal is taken as
//! done. So one picture covers every order.

use std::collections::BTreeSet;
use std::fmt;

use kprov_types::api::ReleaseRef;
use kprov_types::{KubernetesVersion, MachineName};

use crate::model::{Input, Observed, Workload};
use crate::plan::Plan;

mod budget;
mod order;
mod skew;

/// An invariant that does not hold.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum Violation {
    /// Two parts are of versions that must not run side by side.
    #[error("{what} would be {version} beside API servers of {api_server}: {rule}")]
    Skew {
        /// Which part, or which machine's.
        what: Subject,
        /// Its version.
        version: KubernetesVersion,
        /// The API servers' version that it clashes with.
        api_server: KubernetesVersion,
        /// What is allowed.
        rule: SkewRule,
    },
    /// API servers are more than a minor apart.
    #[error("API servers would be of {oldest} and of {newest}, more than a minor apart")]
    ApiServersApart {
        /// The oldest.
        oldest: KubernetesVersion,
        /// The newest.
        newest: KubernetesVersion,
    },
    /// A hop is longer than a minor, or goes back one.
    #[error("{to} is not of the minor of {from}, nor of the next")]
    MinorSkipped {
        /// What the cluster runs.
        from: KubernetesVersion,
        /// What part of it would run.
        to: KubernetesVersion,
    },
    /// A release is not known, or not verified.
    #[error("`{step}`: the cluster has no verified release {release}")]
    NotVerified {
        /// The step.
        step: String,
        /// The release.
        release: KubernetesVersion,
    },
    /// A step comes before what it has to wait for.
    #[error("`{step}` comes too early: {before}")]
    Order {
        /// The step.
        step: String,
        /// What has to be first.
        before: Before,
    },
    /// No API server would answer.
    #[error("no API server would answer")]
    NoApiServer,
    /// Too few etcd members are healthy.
    #[error("{healthy} of {members} etcd members are healthy: that is no quorum")]
    NoQuorum {
        /// How many are.
        healthy: usize,
        /// How many there are.
        members: usize,
    },
    /// More etcd members than one would be out of service.
    #[error("more than one etcd member would be changed at a time, or one beside the unhealthy one of `{machine}`")]
    EtcdAtRisk {
        /// Another member.
        machine: MachineName,
    },
    /// More machines would be out of service than may be.
    #[error("{unavailable} machines of pool `{pool}` would be out of service, of at most {limit}")]
    TooManyUnavailable {
        /// The pool.
        pool: String,
        /// How many machines would be.
        unavailable: usize,
        /// How many may be.
        limit: usize,
    },
    /// More control-plane machines than one would be out of service.
    #[error("{unavailable} control-plane machines would be out of service at a time")]
    ControlPlaneUnavailable {
        /// How many.
        unavailable: usize,
    },
    /// A step is planned though nothing may be done.
    #[error("`{step}` is planned though nothing may be begun")]
    Held {
        /// The step.
        step: String,
    },
}

/// What is of a version that does not fit.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Subject {
    /// A machine's kubelet.
    Kubelet(MachineName),
    /// A workload.
    Workload(Workload),
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kubelet(machine) => write!(f, "kubelet of `{machine}`"),
            Self::Workload(workload) => f.write_str(workload.as_str()),
        }
    }
}

/// What of the version skew policy (<https://kubernetes.io/releases/version-skew-policy/>) is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum SkewRule {
    /// It is newer than an API server.
    Newer,
    /// It is older than an API server by more minors than this.
    Older(u64),
}

impl fmt::Display for SkewRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Newer => f.write_str("it must never be newer"),
            Self::Older(1) => f.write_str("it may be at most one minor older"),
            Self::Older(minors) => write!(f, "it may be at most {minors} minors older"),
        }
    }
}

/// What a step has to wait for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Before {
    /// The hop has to be begun.
    Begin,
    /// Preflight has to be asked, and what stops the change to be overridden.
    Preflight,
    /// The release has to be on a machine.
    Staged(MachineName),
    /// The hop's etcd snapshot has to be there.
    Snapshot,
    /// etcd has to be healthy on a machine.
    Etcd(MachineName),
    /// A workload has to be of the release, and nothing of it of another.
    Workload(Workload),
    /// A machine's standby control plane has to be of the release.
    Standby(MachineName),
    /// A machine's standby API server has to answer.
    StandbyServes(MachineName),
    /// Every API server, and every other control-plane machine, has to be well.
    ControlPlaneWell(MachineName),
    /// A machine has to be cordoned.
    Cordon(MachineName),
    /// Canaries have to run well for long enough.
    Canaries,
    /// A machine has to run the release.
    Machine(MachineName),
    /// A machine has to leave the release first.
    MachineBack(MachineName),
    /// The hop it belongs to has to be under way.
    Hop,
}

impl fmt::Display for Before {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Begin => f.write_str("the hop has not begun"),
            Self::Preflight => f.write_str("preflight has not been passed"),
            Self::Staged(machine) => write!(f, "the release is not on `{machine}`"),
            Self::Snapshot => f.write_str("there is no etcd snapshot of this hop"),
            Self::Etcd(machine) => write!(f, "the etcd member of `{machine}` is not healthy"),
            Self::Workload(workload) => write!(f, "not all of {} is of the release", workload.as_str()),
            Self::Standby(machine) => write!(f, "the standby control plane of `{machine}` is of another release"),
            Self::StandbyServes(machine) => write!(f, "the standby API server of `{machine}` does not answer"),
            Self::ControlPlaneWell(machine) => write!(f, "the control plane on `{machine}` is not well"),
            Self::Cordon(machine) => write!(f, "`{machine}` is not cordoned"),
            Self::Canaries => f.write_str("canaries have not run well for long enough"),
            Self::Machine(machine) => write!(f, "`{machine}` does not run the release"),
            Self::MachineBack(machine) => write!(f, "`{machine}` may run the release that is left"),
            Self::Hop => f.write_str("no hop to the release is under way"),
        }
    }
}

/// Which invariants a state breaks: skew, API servers a minor apart, one minor at a time, an API server that answers, etcd's
/// quorum. What may run counts as running: a pod template's release, and a release that a machine was told to run.
pub fn check_state(observed: &Observed) -> Vec<Violation> {
    let mut found = skew::violations(&skew::MayRun::now(observed));
    if !order::answering(observed, &BTreeSet::new(), &BTreeSet::new()) {
        found.insert(Violation::NoApiServer);
    }
    let members = observed.machines.values().filter_map(|m| m.etcd.as_ref());
    let (healthy, members) = members.fold((0_usize, 0_usize), |(healthy, all), m| {
        (healthy + usize::from(m.healthy), all + 1)
    });
    // One or two members have no quorum beside the one that is being changed; more always have.
    let enough = if members > 2 {
        members / 2 + 1
    } else {
        members.saturating_sub(1)
    };
    if healthy < enough {
        found.insert(Violation::NoQuorum { healthy, members });
    }
    found.into_iter().collect()
}

/// Which invariants a plan would break that the state does not break already, in any order of its steps. What is wrong
/// without the plan's doing is no reason to hold back what doesn't make it worse: it may be what puts it right.
pub fn check_plan(input: &Input, plan: &Plan) -> Vec<Violation> {
    if plan.steps.is_empty() {
        return Vec::new();
    }
    let broken: BTreeSet<Violation> = check_state(&input.observed).into_iter().collect();
    let mut found = skew::violations(&skew::MayRun::with(&input.observed, plan));
    found.extend(order::violations(input, plan));
    found.extend(budget::violations(input, plan));
    found.difference(&broken).cloned().collect()
}

/// The release that the API servers' template is of; the current one where there is no such template.
fn template(observed: &Observed) -> &ReleaseRef {
    observed
        .workloads
        .get(&Workload::ApiServer)
        .map_or(&observed.current, |seen| &seen.template)
}

#[cfg(test)]
mod tests;
