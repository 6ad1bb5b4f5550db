//! What an operator's actions change in the API, each if the API is as the action expects.

use kprov_types::MachineName;
use kprov_types::api::ReleaseRef;
use kprov_upgrade::Outcome;
use kprov_upgrade::model::{Action, Workload};

use crate::objects::Template;
use crate::world::{World, has_revisions, surges};

/// An action in words, for the trace.
pub(crate) fn words(action: &Action) -> String {
    match action {
        Action::Begin { release } => format!("begin {release}"),
        Action::Stage { release, machines } => format!("stage {release} on {} machines", machines.len()),
        Action::Snapshot { machine, name } => format!("snapshot {name} on {machine}"),
        Action::Roll { workload, from, to } => format!("roll {} from {from} to {to}", workload.as_str()),
        Action::RollBack { workload, from, to } => format!("roll {} back from {from} to {to}", workload.as_str()),
        Action::Standby {
            machine,
            release,
            serve,
        } => format!("standby of {machine}: {release}, serve: {serve}"),
        Action::Replace { pod, machine, .. } => format!("replace {pod} on {machine}"),
        Action::Etcd { machine, to } => format!("etcd of {machine}: {to}"),
        Action::Cordon { machine } => format!("cordon {machine}"),
        Action::Drain { machine, force } => format!("drain {machine}, force: {force}"),
        Action::Run {
            machine,
            from: Some(from),
            to,
        } => format!("run {to} on {machine}, from {from}"),
        Action::Run {
            machine,
            from: None,
            to,
        } => format!("run {to} on {machine}"),
        Action::Uncordon { machine } => format!("uncordon {machine}"),
        Action::Fail { failure } => {
            let how = if failure.halted { "halted" } else { "to go back" };
            format!(
                "{} failed, {how}: {} {}: {}",
                failure.release, failure.component, failure.instance, failure.message
            )
        }
        Action::Reverted { release } => format!("{release} is gone"),
        Action::Finish { release } => format!("finish {release}"),
    }
}

/// Changes that are one write each.
impl World {
    pub(crate) fn simple(&mut self, action: &Action) -> Outcome {
        let now = self.now;
        match action {
            Action::Begin { release } => {
                let Some(release) = self.release(release) else {
                    return Outcome::Stale;
                };
                if self.update.hop.is_none_or(|(begun, _)| begun != release) {
                    self.update.hop = Some((release, now));
                    self.update.failure = None;
                }
                Outcome::Done
            }
            Action::Reverted { release } => {
                self.update.hop = None;
                if let Some(failure) = self
                    .update
                    .failure
                    .as_mut()
                    .filter(|failure| failure.release == *release)
                {
                    failure.reverted = true;
                }
                Outcome::Done
            }
            Action::Roll { workload, from, to } => self.roll(*workload, from, to),
            Action::RollBack { workload, from, to } => self.roll_back(*workload, from, to),
            Action::Replace { workload, pod, .. } => {
                let id = pod
                    .strip_prefix(workload.as_str())
                    .and_then(|id| id.strip_prefix('-'))
                    .and_then(|id| id.parse().ok());
                match id {
                    Some(id) if self.pods.contains_key(&id) => {
                        self.delete_pod(id);
                        Outcome::Done
                    }
                    _ => Outcome::Stale,
                }
            }
            Action::Cordon { machine } => self.cordon(machine),
            Action::Uncordon { machine } => self.uncordon(machine),
            _ => Outcome::Stale,
        }
    }

    pub(crate) fn finish(&mut self, release: &ReleaseRef) -> Outcome {
        let Some(release) = self.release(release) else {
            return Outcome::Stale;
        };
        self.update.current = release;
        self.update.hop = None;
        self.update.failure = None;
        Outcome::Done
    }

    /// A fresh template: of a workload with revisions one that never was, of others the one that its release has.
    fn roll(&mut self, workload: Workload, from: &ReleaseRef, to: &ReleaseRef) -> Outcome {
        let (Some(from), Some(to)) = (self.release(from), self.release(to)) else {
            return Outcome::Stale;
        };
        let Some(object) = self.objects.get(&workload) else {
            return Outcome::Stale;
        };
        if object.template.release == to {
            return Outcome::Done;
        }
        if object.template.release != from {
            return Outcome::Stale;
        }
        let known = object
            .history
            .iter()
            .find(|template| template.release == to && !has_revisions(workload))
            .copied();
        let highest = self
            .objects
            .values()
            .flat_map(|object| &object.history)
            .map(|template| template.revision)
            .max();
        let template = known.unwrap_or_else(|| {
            let revision = if has_revisions(workload) {
                highest.unwrap_or(1) + 1
            } else {
                0
            };
            self.new_template(to, revision)
        });
        self.put_template(workload, template)
    }

    fn roll_back(&mut self, workload: Workload, from: &ReleaseRef, to: &ReleaseRef) -> Outcome {
        let (Some(from), Some(to)) = (self.release(from), self.release(to)) else {
            return Outcome::Stale;
        };
        let Some(object) = self.objects.get(&workload) else {
            return Outcome::Stale;
        };
        if object.template.release == to {
            return Outcome::Done;
        }
        let before = object
            .history
            .iter()
            .rev()
            .find(|template| template.release == to)
            .copied();
        match before {
            Some(template) if object.template.release == from => self.put_template(workload, template),
            _ => Outcome::Stale,
        }
    }

    fn put_template(&mut self, workload: Workload, template: Template) -> Outcome {
        let now = self.now;
        let to = self.releases[template.release].minor;
        let Some(object) = self.objects.get_mut(&workload) else {
            return Outcome::Stale;
        };
        let from = self.releases[object.template.release].minor;
        // Both sides have to know `maxSurge`.
        object.automatic = workload != Workload::ApiServer || surges(from.min(to));
        object.history.retain(|other| other.id != template.id);
        object.history.push(template);
        object.template = template;
        object.rolled = Some(now);
        object.generation += 1;
        Outcome::Done
    }

    fn cordon(&mut self, machine: &MachineName) -> Outcome {
        let now = self.now;
        let Some(node) = self
            .machine(machine)
            .and_then(|index| self.machines[index].node.as_mut())
        else {
            return Outcome::Stale;
        };
        match (node.cordoned, node.cordoned_by_us) {
            (true, None) => return Outcome::Stale,
            (true, Some(_)) => {}
            (false, _) => {
                node.cordoned = true;
                node.cordoned_by_us = Some(now);
            }
        }
        Outcome::Done
    }

    fn uncordon(&mut self, machine: &MachineName) -> Outcome {
        let now = self.now;
        let Some(node) = self
            .machine(machine)
            .and_then(|index| self.machines[index].node.as_mut())
        else {
            return Outcome::Stale;
        };
        let Some(since) = node.cordoned_by_us.take() else {
            return Outcome::Stale;
        };
        node.cordoned = false;
        self.memory.outages.push((since, now));
        Outcome::Done
    }
}
