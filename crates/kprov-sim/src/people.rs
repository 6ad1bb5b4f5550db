//! Faults, and people: what they do in the middle of things, and how they bring a cluster to where they want it in the end.

use kprov_types::Role;
use kprov_types::api::Failure;
use kprov_upgrade::model::Workload;
use kprov_upgrade::plan::{Refusal, State};

use crate::objects::{Machine, Owner, ReleaseId};
use crate::script::{Defect, Fault, Happening, MINUTE, Millis, SECOND};
use crate::world::{Event, World, note};

/// How often people look.
const LOOK: Millis = 20 * SECOND;
/// After how long without a change people take it that there will be none.
const STUCK: Millis = 20 * MINUTE;
/// How long everything may take once all faults are over, for each release that is there.
const PATIENCE: Millis = 60 * MINUTE;

impl World {
    pub(crate) fn fault(&mut self, index: usize) {
        let Some(Fault::At { what, .. }) = self.faults.get(index).copied() else {
            return;
        };
        note!(self, "fault: {what:?}");
        self.memory.fault = Some(self.now);
        let count = self.machines.len();
        match what {
            Happening::Down { machine, .. } => self.cut(machine % count),
            Happening::PowerCut { .. } => (0..count).for_each(|machine| self.cut(machine)),
            Happening::Desire { release } => self.desire(release),
            Happening::DesireNonsense => {
                "latest".clone_into(&mut self.update.desired);
                self.update.desired_since = self.now;
            }
            Happening::Pause { .. } => {
                self.update.paused = true;
                self.update.paused_since = self.now;
            }
            Happening::TryAgain => self.update.attempt += 1,
            Happening::Cordon { machine } => {
                // Nobody cordons the last machine and wonders why nothing finds a place.
                let open = |machine: &Machine| machine.node.as_ref().is_some_and(|node| !node.cordoned);
                let others = self.machines.iter().filter(|machine| open(machine)).count() > 1;
                if let Some(node) = self.machines[machine % count]
                    .node
                    .as_mut()
                    .filter(|node| others && !node.cordoned)
                {
                    node.cordoned = true;
                    // Where our mark is still on it nobody can tell that from a cordon of ours.
                    node.cordoned_by_person = node.cordoned_by_us.is_none();
                }
            }
            Happening::Uncordon { machine } => {
                if let Some(node) = &mut self.machines[machine % count].node {
                    node.cordoned = false;
                    node.cordoned_by_person = false;
                }
            }
            Happening::DeletePod { pod } => self.delete_some_pod(pod),
            Happening::Block { .. } => self.blocks += 1,
            Happening::Join => {
                // One whose kubelet never reports never joins.
                let settings = self.releases[self.update.settings].defect;
                if !matches!(settings, Some(Defect::KubeletSilent(_))) {
                    self.add_machine(Role::Worker, 0);
                }
            }
            Happening::RestartAgent { machine } => {
                let machine = machine % count;
                if self.machines[machine].booted {
                    self.start_agent(machine);
                }
            }
        }
        self.touch();
    }

    pub(crate) fn fault_ends(&mut self, index: usize) {
        let Some(Fault::At { what, .. }) = self.faults.get(index).copied() else {
            return;
        };
        note!(self, "over: {what:?}");
        self.memory.fault = Some(self.now);
        let count = self.machines.len();
        match what {
            Happening::Down { machine, .. } => self.power_on(machine % count),
            Happening::PowerCut { .. } => (0..count).for_each(|machine| self.power_on(machine)),
            Happening::Pause { .. } => self.update.paused = false,
            Happening::Block { .. } => self.blocks -= 1,
            _ => {}
        }
        self.touch();
    }

    fn cut(&mut self, machine: usize) {
        self.excuse(machine);
        self.power_off(machine);
    }

    fn delete_some_pod(&mut self, which: usize) {
        let Some(id) = self.pods.keys().copied().nth(which % self.pods.len().max(1)) else {
            return;
        };
        let api = self.pods[&id].is_of(Workload::ApiServer);
        if let Some(machine) = self.pods[&id].machine.filter(|_| api) {
            self.excuse(machine);
        }
        self.delete_pod(id);
    }

    /// Somebody wants a release, and makes it known.
    fn desire(&mut self, release: ReleaseId) {
        self.releases[release].known = true;
        self.update.desired = self.releases[release].reference.version.to_string();
        self.update.desired_since = self.now;
        self.touch();
    }

    /// Once all faults are over, people see to it that the cluster gets where they want it: they take what is told at its
    /// word, and do what it asks of them.
    pub(crate) fn person(&mut self) {
        self.at(self.now + LOOK, Event::Person);
        let Some((told, since)) = self.update.told.clone() else {
            return self.give_up();
        };
        let goal = self.memory.goal;
        match told {
            State::Failed => self.repair(),
            State::Refused(Refusal::Unverified(_)) => {
                if let Some(bad) = self
                    .releases
                    .iter()
                    .position(|release| release.known && release.seen.verified.is_err())
                {
                    self.replace(bad);
                }
            }
            State::Refused(Refusal::Downgrade(_)) => {
                self.memory.goal = self.update.current;
                self.desire(self.update.current);
            }
            State::Refused(Refusal::MidHop(_)) => self.end_hop(),
            State::Refused(_) if self.now > since + LOOK => self.desire(goal),
            State::Idle if self.update.desired != self.releases[goal].reference.to_string() => self.desire(goal),
            State::Idle if self.update.current == goal => {
                let apps = self
                    .apps
                    .iter()
                    .enumerate()
                    .all(|(app, wanted)| self.app_runs(app, wanted.replicas));
                if apps && self.differs_from(goal, false).is_none() {
                    self.done = true;
                } else if self.releases[goal].defect.is_some() && self.now > since + STUCK {
                    // It was passed through on the way to another, and what is bad about it shows only now.
                    self.replace(goal);
                }
            }
            // On the way back to a release of which something is bad, people go on instead.
            // A machine can't go back to what never ran on it: a person has to go there.
            State::Reverting if self.now > since + STUCK && self.update.failure.is_some() && self.is_dead_end() => {
                self.done = true;
            }
            State::Reverting if self.now > since + STUCK => {
                self.replace(goal);
                self.desire(self.memory.goal);
            }
            _ => {}
        }
        self.give_up();
    }

    /// The kubelet of the release to go back to is bad.
    fn is_dead_end(&self) -> bool {
        matches!(
            self.releases[self.update.current].defect,
            Some(Defect::KubeletSilent(_))
        )
    }

    /// Another version has to wait for the hop under way: people go back, or on where there is nothing good to go back to.
    fn end_hop(&mut self) {
        let current = self.update.current;
        let target = self
            .objects
            .get(&Workload::ApiServer)
            .map(|object| object.template.release);
        match target.filter(|_| self.releases[current].defect.is_some()) {
            Some(target) => {
                self.memory.goal = target;
                self.desire(target);
            }
            None => self.desire(current),
        }
    }

    fn app_runs(&self, app: usize, replicas: usize) -> bool {
        let ready = self
            .pods
            .values()
            .filter(|pod| pod.owner == Owner::App(app) && pod.ready && !pod.leaving);
        let workers = self.machines.iter().any(|machine| machine.role == Role::Worker);
        let takes = |machine: &Machine| {
            (machine.role == Role::Worker || !workers) && machine.node.as_ref().is_some_and(|node| !node.cordoned)
        };
        let anywhere = self.machines.iter().any(takes);
        ready.count() == replicas || !anywhere
    }

    fn give_up(&mut self) {
        let patience = PATIENCE * (1 + u64::try_from(self.releases.len()).unwrap_or(0));
        if self.now > self.quiet + patience {
            self.violate("liveness", Self::standing);
        }
    }

    /// A release failed: everything must be back, and the reason told. A bad one is replaced by a good one, a good one (a fault
    /// hit it) is tried again.
    fn repair(&mut self) {
        let Some(Failure {
            release,
            message,
            halted,
            reverted,
            ..
        }) = self.update.failure.clone()
        else {
            return self.violate("failure", |_| {
                "it is told that a release failed, and not which".to_owned()
            });
        };
        if message.is_empty() {
            self.violate("failure", |_| "a release failed without a reason".to_owned());
        }
        let current = self.update.current;
        if !halted {
            if let Some(differs) = self.differs_from(current, true) {
                self.violate("failure", |_| format!("after the failure not all is back: {differs}"));
            }
            if !reverted {
                self.violate("failure", |_| {
                    "it is told that all is back, and not written down".to_owned()
                });
            }
        }
        let Some(release) = self.release(&release) else { return };
        if self.releases[release].defect.is_some() {
            self.replace(release);
        }
        if halted && self.releases[release].defect.is_some() {
            // Some machines run it, and others never will.
            self.desire(current);
        } else {
            self.update.attempt += 1;
            self.touch();
        }
    }

    /// Makes known, and where it is the goal asks for, what repairs a release.
    fn replace(&mut self, bad: ReleaseId) {
        let Some(good) = self.releases[bad].fixed_by else {
            return;
        };
        self.releases[good].known = true;
        if self.memory.goal == bad {
            self.memory.goal = good;
        }
        if self.releases[bad].defect == Some(Defect::Unverified) {
            // Nobody keeps what was never any good.
            self.releases[bad].known = false;
        }
        self.desire(self.memory.goal);
    }
}
