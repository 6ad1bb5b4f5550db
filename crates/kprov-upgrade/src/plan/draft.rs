//! A plan in the making.

use jiff::Timestamp;
use kprov_types::api::ReleaseRef;
use kprov_types::{MachineName, Role};

use super::{Plan, State, Step, Waiting};
use crate::model::{Action, Input, KnownRelease, MachineSeen, Observed};

/// Collects steps and what is waited for.
pub(super) struct Draft<'a> {
    pub(super) input: &'a Input,
    pub(super) observed: &'a Observed,
    /// What the steps are about: the first part of their ids.
    about: &'a ReleaseRef,
    steps: Vec<Step>,
    running: Vec<Step>,
    waiting: Vec<Waiting>,
}

impl<'a> Draft<'a> {
    pub(super) fn new(input: &'a Input, about: &'a ReleaseRef) -> Self {
        Self {
            input,
            observed: &input.observed,
            about,
            steps: Vec::new(),
            running: Vec::new(),
            waiting: Vec::new(),
        }
    }

    pub(super) fn step(&mut self, action: Action) {
        self.steps.push(Step::new(self.about, action));
    }

    pub(super) fn running(&mut self, action: Action) {
        self.running.push(Step::new(self.about, action));
    }

    pub(super) fn wait(&mut self, waiting: Waiting) {
        self.waiting.push(waiting);
    }

    /// Whether a machine is being uncordoned already.
    pub(super) fn has_uncordons(&self) -> bool {
        self.steps
            .iter()
            .any(|step| matches!(step.action, Action::Uncordon { .. }))
    }

    pub(super) fn finish(self, state: State, hops: &[&ReleaseRef]) -> Plan {
        Plan {
            state,
            hops: hops.iter().map(|&hop| hop.clone()).collect(),
            steps: self.steps,
            running: self.running,
            waiting: self.waiting,
        }
    }

    /// Whole seconds from a time until now; never negative, so that a clock that is a little behind does no harm.
    pub(super) fn since(&self, time: Timestamp) -> i64 {
        self.input.now.duration_since(time).as_secs().max(0)
    }

    /// How long an instance or machine may take to become healthy, in seconds.
    pub(super) fn health_limit(&self) -> i64 {
        i64::from(self.input.wanted.policy.health_timeout_seconds)
    }

    pub(super) fn known(&self, release: &ReleaseRef) -> Option<&'a KnownRelease> {
        self.observed.releases.iter().find(|k| k.release == *release)
    }

    pub(super) fn control_plane(&self) -> impl Iterator<Item = (&'a MachineName, &'a MachineSeen)> + use<'a> {
        let machines = &self.observed.machines;
        machines.iter().filter(|(_, m)| m.role == Role::ControlPlane)
    }

    /// What the first etcd member lacks to be healthy, if any does.
    pub(super) fn etcd_unhealthy(&self) -> Option<Waiting> {
        self.control_plane().find_map(|(name, m)| {
            let message = match &m.etcd {
                Some(etcd) if etcd.healthy => return None,
                Some(etcd) => etcd.message.clone(),
                None => String::new(),
            };
            Some(Waiting::Etcd {
                machine: name.clone(),
                message,
            })
        })
    }
}

impl Step {
    /// A step of the change to `about`, with its id and words.
    pub(crate) fn new(about: &ReleaseRef, action: Action) -> Self {
        let (what, whom, message) = words(about, &action);
        Self {
            id: format!("{about}/{what}/{whom}"),
            message,
            action,
        }
    }
}

/// What an action does, to whom, and a sentence about it.
fn words(about: &ReleaseRef, action: &Action) -> (&'static str, String, String) {
    match action {
        Action::Begin { release } => ("begin", "cluster".to_owned(), format!("begin the hop to {release}")),
        Action::Stage { release, machines } => {
            let machines = match machines.first() {
                Some(only) if machines.len() == 1 => format!("`{only}`"),
                _ => format!("{} machines", machines.len()),
            };
            ("stage", release.to_string(), format!("fetch {release} on {machines}"))
        }
        Action::Snapshot { machine, name } => (
            "snapshot",
            machine.to_string(),
            format!("take the etcd snapshot `{name}` on `{machine}`"),
        ),
        Action::Roll { workload, to, .. } => {
            let workload = workload.as_str();
            ("roll", workload.to_owned(), format!("roll {workload} to {to}"))
        }
        Action::RollBack { workload, to, .. } => {
            let workload = workload.as_str();
            ("roll-back", workload.to_owned(), format!("put {workload} back to {to}"))
        }
        Action::Standby {
            machine,
            release,
            serve,
        } => {
            let (what, message) = if *serve {
                (
                    "standby-serve",
                    format!("start the standby API server ({release}) of `{machine}`"),
                )
            } else if release == about {
                (
                    "standby",
                    format!("keep {release} as the standby control plane of `{machine}`"),
                )
            } else {
                (
                    "standby-stop",
                    format!("stop the standby API server ({release}) of `{machine}`"),
                )
            };
            (what, machine.to_string(), message)
        }
        Action::Replace { workload, pod, machine } => {
            let workload = workload.as_str();
            (
                "replace",
                format!("{workload}-{machine}"),
                format!("replace the pod `{pod}` of {workload} on `{machine}`"),
            )
        }
        Action::Etcd { machine, to } => (
            "etcd",
            machine.to_string(),
            format!("run the etcd of {to} on `{machine}`"),
        ),
        Action::Cordon { machine } => ("cordon", machine.to_string(), format!("cordon `{machine}`")),
        Action::Drain { machine, force } => {
            let how = if *force { ", past its PodDisruptionBudgets" } else { "" };
            ("drain", machine.to_string(), format!("drain `{machine}`{how}"))
        }
        Action::Run { machine, to, .. } => ("run", machine.to_string(), format!("switch `{machine}` to {to}")),
        Action::Uncordon { machine } => ("uncordon", machine.to_string(), format!("uncordon `{machine}`")),
        Action::Fail { failure } => (
            "fail",
            failure.component.clone(),
            format!(
                "give up {}: {} `{}`: {}",
                failure.release, failure.component, failure.instance, failure.message
            ),
        ),
        Action::Reverted { release } => (
            "reverted",
            "cluster".to_owned(),
            format!("note that everything is back as it was before {release}"),
        ),
        Action::Finish { release } => ("finish", "cluster".to_owned(), format!("finish the hop to {release}")),
    }
}
