//! What comes before what; an API server that answers; etcd's members.

use std::collections::{BTreeMap, BTreeSet};

use kprov_types::api::ReleaseRef;
use kprov_types::{MachineName, Role};

use super::{Before, Violation, template};
use crate::model::{Action, Input, MachineSeen, Observed, Staged, Workload};
use crate::plan::{Plan, State, Step, snapshot_name};

/// Whether an API server answers that is none of `pods`, nor the standby of one of `machines`.
pub(super) fn answering(observed: &Observed, pods: &BTreeSet<&str>, machines: &BTreeSet<&MachineName>) -> bool {
    let served = observed.workloads.get(&Workload::ApiServer).is_some_and(|seen| {
        let mut pod = seen.instances.iter();
        pod.any(|pod| pod.ready && !pod.leaving && !pods.contains(pod.name.as_str()))
    });
    let mut standby = observed.machines.iter().filter(|(name, _)| !machines.contains(name));
    served || standby.any(|(_, m)| m.standby.as_ref().is_some_and(|s| s.api_ready))
}

/// What a plan does too early, or to too much at a time.
pub(super) fn violations(input: &Input, plan: &Plan) -> Vec<Violation> {
    let observed = &input.observed;
    let facts = Facts::of(input, plan);
    let mut found: Vec<Violation> = Vec::new();
    let (mut etcd, mut pods, mut standbys) = (Vec::new(), BTreeSet::new(), BTreeSet::new());
    for step in &plan.steps {
        match &step.action {
            Action::Etcd { machine, .. } => etcd.push(machine),
            Action::Replace { pod, .. } => {
                pods.insert(pod.as_str());
            }
            Action::Standby {
                machine, serve: false, ..
            } => {
                standbys.insert(machine);
            }
            _ => {}
        }
        if is_held(input, plan, &step.action) {
            found.push(Violation::Held { step: step.id.clone() });
        }
        let early = facts.too_early(step).into_iter().map(|before| Violation::Order {
            step: step.id.clone(),
            before,
        });
        found.extend(early);
        if let Some(release) = release_of(&step.action).filter(|release| !facts.is_good(release)) {
            found.push(Violation::NotVerified {
                step: step.id.clone(),
                release: release.version.clone(),
            });
        }
    }
    let nobody = BTreeSet::new();
    let removes = !pods.is_empty() || !standbys.is_empty();
    if removes && answering(observed, &nobody, &BTreeSet::new()) && !answering(observed, &pods, &standbys) {
        found.push(Violation::NoApiServer);
    }
    if let [first, rest @ ..] = etcd.as_slice() {
        found.extend(rest.first().map(|other| Violation::EtcdAtRisk {
            machine: (*other).clone(),
        }));
        let beside = observed.machines.iter().filter(|(name, _)| name != first);
        let mut unhealthy = beside.filter(|(_, m)| m.etcd.as_ref().is_some_and(|etcd| !etcd.healthy));
        found.extend(unhealthy.next().map(|(machine, _)| Violation::EtcdAtRisk {
            machine: machine.clone(),
        }));
    }
    found
}

/// Paused, refused and failed clusters only get machines back into service.
fn is_held(input: &Input, plan: &Plan, action: &Action) -> bool {
    let holds = matches!(plan.state, State::Refused(_) | State::Failed | State::Paused);
    (holds || input.wanted.paused) && !matches!(action, Action::Uncordon { .. })
}

/// What the order of steps depends on, gathered once.
struct Facts<'a> {
    input: &'a Input,
    observed: &'a Observed,
    plan: &'a Plan,
    /// The release of the API servers' template.
    template: &'a ReleaseRef,
    /// The control-plane machines: few of many.
    control_plane: Vec<(&'a MachineName, &'a MachineSeen)>,
    /// The one release that all of a workload is of: template, pods that leave too, and of API servers the standbys that
    /// serve. Missing where there is more than one.
    whole: BTreeMap<Workload, &'a ReleaseRef>,
}

impl<'a> Facts<'a> {
    fn of(input: &'a Input, plan: &'a Plan) -> Self {
        let observed = &input.observed;
        let mut whole = BTreeMap::new();
        for (&workload, seen) in &observed.workloads {
            let one = seen.instances.iter().all(|pod| pod.release == seen.template);
            let mut standbys = observed.machines.values().filter_map(|m| m.standby.as_ref());
            let covered = workload == Workload::ApiServer
                && standbys.any(|s| (s.serve_ordered || s.api_ready) && s.release.as_ref() != Some(&seen.template));
            if one && !covered {
                whole.insert(workload, &seen.template);
            }
        }
        Self {
            input,
            observed,
            plan,
            template: template(observed),
            control_plane: observed
                .machines
                .iter()
                .filter(|(_, m)| m.role == Role::ControlPlane)
                .collect(),
            whole,
        }
    }

    fn is_good(&self, release: &ReleaseRef) -> bool {
        // What the cluster runs may be gone back to, whether or not it still knows the release.
        let runs = *release == self.observed.current;
        runs || self
            .observed
            .releases
            .iter()
            .any(|known| known.release == *release && known.verified.is_ok())
    }

    fn control_plane(&self) -> impl Iterator<Item = (&'a MachineName, &'a MachineSeen)> {
        self.control_plane.iter().copied()
    }

    fn not_whole(&self, workloads: &[Workload], release: &ReleaseRef) -> Vec<Before> {
        let there = workloads
            .iter()
            .filter(|workload| self.observed.workloads.contains_key(workload));
        let other = there.filter(|workload| self.whole.get(workload) != Some(&release));
        other.map(|workload| Before::Workload(*workload)).collect()
    }

    fn too_early(&self, step: &'a Step) -> Vec<Before> {
        use Workload::{ApiServer, ControllerManager, Scheduler};
        // A step belongs to the hop that is under way, or leads back from it, or is its first.
        match &step.action {
            Action::Roll {
                workload: ApiServer,
                to,
                ..
            } if *to != self.observed.current => self.first_change(to),
            Action::Roll {
                workload: ApiServer, ..
            }
            | Action::RollBack {
                workload: ApiServer, ..
            } => self.last_way_back(),
            Action::Roll { workload, to, .. } if to == self.template => match workload {
                ControllerManager | Scheduler => self.not_whole(&[ApiServer], to),
                _ => self.not_whole(&[ApiServer, ControllerManager, Scheduler], to),
            },
            Action::Roll { to, .. } if *to != self.observed.current => vec![Before::Hop],
            Action::Standby {
                serve: true, release, ..
            } if *release != self.observed.current => vec![Before::Hop],
            Action::Standby {
                serve: false, release, ..
            } if *release != self.observed.current => {
                self.not_whole(&[ApiServer, ControllerManager, Scheduler], release)
            }
            Action::Replace { machine, .. } => self.uncovered(machine),
            Action::Etcd { to, .. } if *to != self.observed.current => {
                let mut before = self.not_whole(&[ApiServer, ControllerManager, Scheduler], to);
                before.extend(self.etcd_unhealthy());
                before
            }
            Action::Run { machine, from, to } if from.as_ref() != Some(to) => self.switch(machine, to),
            Action::Finish { release } => self.finish(release),
            Action::Reverted { .. } => {
                self.not_whole(&[ApiServer, ControllerManager, Scheduler], &self.observed.current)
            }
            _ => Vec::new(),
        }
    }

    fn etcd_unhealthy(&self) -> Option<Before> {
        let mut members = self.control_plane();
        let unhealthy = members.find(|(_, m)| !m.etcd.as_ref().is_some_and(|etcd| etcd.healthy));
        unhealthy.map(|(machine, _)| Before::Etcd(machine.clone()))
    }

    /// The first change of a hop.
    fn first_change(&self, to: &ReleaseRef) -> Vec<Before> {
        let mut before = Vec::new();
        match self.observed.hop_started {
            None => before.push(Before::Begin),
            Some(started) => {
                let name = snapshot_name(to, started);
                if !self.control_plane().any(|(_, m)| m.snapshots.contains(&name)) {
                    before.push(Before::Snapshot);
                }
            }
        }
        let stopped = self.observed.findings.as_ref().is_none_or(|findings| {
            let mut stops = findings.iter().filter(|finding| finding.blocks);
            stops.any(|finding| !self.input.wanted.force.contains(&finding.name))
        });
        if stopped {
            before.push(Before::Preflight);
        }
        let mut lacking = self.control_plane().filter(|(_, m)| !is_on(m, to));
        before.extend(lacking.next().map(|(machine, _)| Before::Staged(machine.clone())));
        before.extend(self.etcd_unhealthy());
        before
    }

    /// API servers go back last.
    fn last_way_back(&self) -> Vec<Before> {
        let current = &self.observed.current;
        let mut before = self.not_whole(&[Workload::ControllerManager, Workload::Scheduler], current);
        for workload in [Workload::Proxy, Workload::Dns, Workload::Operator] {
            let left = self
                .observed
                .workloads
                .get(&workload)
                .is_some_and(|seen| seen.template == *self.template);
            if left && self.template != current {
                before.push(Before::Workload(workload));
            }
        }
        let mut newer = self.observed.machines.iter().filter(|(_, m)| {
            let told = m.ordered.as_ref().is_some_and(|(release, _)| release == self.template);
            self.template != current && (told || m.running.as_ref() == Some(self.template))
        });
        before.extend(newer.next().map(|(machine, _)| Before::MachineBack(machine.clone())));
        before
    }

    /// An API server's pod is deleted where the machine's standby answers.
    fn uncovered(&self, machine: &MachineName) -> Vec<Before> {
        let standby = self.observed.machines.get(machine).and_then(|m| m.standby.as_ref());
        let covered = standby.is_some_and(|s| s.serve_ordered && s.api_ready);
        if covered {
            Vec::new()
        } else {
            vec![Before::StandbyServes(machine.clone())]
        }
    }

    /// A machine switches to another release.
    fn switch(&self, machine: &MachineName, to: &ReleaseRef) -> Vec<Before> {
        let Some(m) = self.observed.machines.get(machine) else {
            return vec![Before::Hop];
        };
        let mut before = Vec::new();
        if *to != *self.template {
            // On the way back.
            if *to != self.observed.current {
                before.push(Before::Hop);
            }
            return before;
        }
        if !m.cordoned {
            before.push(Before::Cordon(machine.clone()));
        }
        if !is_on(m, to) {
            before.push(Before::Staged(machine.clone()));
        }
        before.extend(self.not_whole(
            &[Workload::ApiServer, Workload::ControllerManager, Workload::Scheduler],
            to,
        ));
        if *to != self.observed.current {
            let mut other = self.control_plane().filter(|(_, m)| {
                let standby = m.standby.as_ref().and_then(|s| s.release.as_ref());
                standby.is_some_and(|release| release != to)
            });
            before.extend(other.next().map(|(machine, _)| Before::Standby(machine.clone())));
        }
        before
    }

    fn finish(&self, release: &ReleaseRef) -> Vec<Before> {
        use Workload::{ApiServer, ControllerManager, Scheduler};
        let mut before = self.not_whole(&[ApiServer, ControllerManager, Scheduler], release);
        let last = self.plan.hops.len() == 1 && *release != self.observed.current;
        let mut other = self
            .observed
            .machines
            .iter()
            .filter(|(_, m)| m.running.as_ref() != Some(release));
        before.extend(
            other
                .next()
                .filter(|_| last)
                .map(|(machine, _)| Before::Machine(machine.clone())),
        );
        before
    }
}

/// The release that an action brings.
fn release_of(action: &Action) -> Option<&ReleaseRef> {
    match action {
        Action::Begin { release } | Action::Stage { release, .. } | Action::Standby { release, .. } => Some(release),
        Action::Roll { to, .. } | Action::Etcd { to, .. } => Some(to),
        // A machine may be told to stay with what it runs.
        Action::Run { from, to, .. } => (from.as_ref() != Some(to)).then_some(to),
        _ => None,
    }
}

/// A release's files are on a machine.
fn is_on(m: &MachineSeen, release: &ReleaseRef) -> bool {
    m.running.as_ref() == Some(release) || matches!(m.staged.get(&release.digest), Some(Staged::Ready))
}
