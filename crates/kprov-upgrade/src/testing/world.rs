//! A cluster that does what it's told, a little at a time and in any order: what lies between an action and its effect.

use std::collections::BTreeSet;

use jiff::{SignedDuration, Timestamp};
use kprov_types::api::{MachineFailure, ReleaseRef};
use kprov_types::{MachineName, Role};

use super::pod;
use crate::cluster::Outcome;
use crate::model::{Action, Drain, EtcdSeen, Input, Instance, Part, Staged, Workload, WorkloadSeen};

/// What of a release is bad.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bad {
    /// Pods of this workload never become ready.
    Unready(Workload),
    /// Pods of this workload crash.
    Crashes(Workload),
    /// Machines go back from it by themselves.
    Kubelet,
    /// Its bytes are wrong.
    Bytes,
}

/// A cluster, and what happens to it.
#[derive(Clone, Debug)]
pub(crate) struct World {
    pub(crate) input: Input,
    pub(crate) bad: Option<(ReleaseRef, Bad)>,
    made: usize,
}

/// Something that can happen next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    Settles(Workload),
    PodMade(Workload, MachineName),
    PodReady(Workload, String),
    PodCrashes(Workload, String),
    PodLeaves(Workload, String),
    PodGone(Workload, String),
    Staged(MachineName, ReleaseRef),
    Snapshot(MachineName),
    Standby(MachineName),
    EtcdStops(MachineName),
    EtcdStarts(MachineName),
    OrderTaken(MachineName),
    KubeletStops(MachineName),
    KubeletStarts(MachineName),
    PodEvicted(MachineName),
}

impl World {
    pub(crate) fn new(input: Input) -> Self {
        Self {
            input,
            bad: None,
            made: 100,
        }
    }

    pub(crate) fn wait(&mut self, seconds: i64) {
        self.input.now += SignedDuration::from_secs(seconds);
    }

    fn is_bad(&self, release: &ReleaseRef, bad: Bad) -> bool {
        self.bad.as_ref() == Some(&(release.clone(), bad))
    }

    fn etcd_image(&self, release: &ReleaseRef) -> String {
        let known = self
            .input
            .observed
            .releases
            .iter()
            .find(|k| k.release == *release)
            .unwrap();
        known.images[&Part::Etcd].clone()
    }

    /// Carries out an action as the real executor would: orders are written, nothing more.
    #[expect(clippy::too_many_lines, reason = "a table: what each action writes")]
    pub(crate) fn act(&mut self, action: &Action) -> Outcome {
        let now = self.input.now;
        let observed = &mut self.input.observed;
        match action {
            Action::Stage { release, machines } => {
                for machine in machines {
                    observed
                        .machines
                        .get_mut(machine)
                        .unwrap()
                        .stage_ordered
                        .insert(release.digest.clone());
                }
            }
            Action::Snapshot { machine, name } => {
                observed.machines.get_mut(machine).unwrap().snapshot_ordered = Some(name.clone());
            }
            Action::Roll { workload, from, to } | Action::RollBack { workload, from, to } => {
                let image = observed.releases.iter().find(|k| k.release == *to).unwrap().images
                    [&Part::Workload(*workload)]
                    .clone();
                let seen = observed.workloads.get_mut(workload).unwrap();
                if seen.template == *to {
                    return Outcome::Done;
                }
                if seen.template != *from {
                    return Outcome::Stale;
                }
                if matches!(action, Action::RollBack { .. }) {
                    assert_eq!(
                        seen.previous.as_ref(),
                        Some(to),
                        "only the previous template can be put back"
                    );
                }
                let pods = seen.instances.iter();
                let old = pods.clone().find(|pod| pod.release == *to).map(|pod| pod.revision);
                if seen.revision > 0 {
                    let fresh = pods.map(|pod| pod.revision).fold(seen.revision, u16::max) + 1;
                    seen.revision = old.unwrap_or(fresh);
                }
                seen.previous = Some(std::mem::replace(&mut seen.template, to.clone()));
                seen.image = image;
                seen.rolled = Some(now);
                seen.settled = false;
            }
            Action::Standby {
                machine,
                release,
                serve,
            } => {
                let standby = observed.machines.get_mut(machine).unwrap().standby.as_mut().unwrap();
                standby.ordered = Some(release.clone());
                standby.serve_ordered = *serve;
            }
            Action::Replace { workload, pod, .. } => {
                let seen = observed.workloads.get_mut(workload).unwrap();
                let Some(pod) = seen.instances.iter_mut().find(|seen| seen.name == *pod) else {
                    return Outcome::Stale;
                };
                pod.leaving = true;
            }
            Action::Etcd { machine, to } => {
                observed
                    .machines
                    .get_mut(machine)
                    .unwrap()
                    .etcd
                    .as_mut()
                    .unwrap()
                    .ordered = Some(to.clone());
            }
            Action::Cordon { machine } => {
                let m = observed.machines.get_mut(machine).unwrap();
                m.cordoned = true;
                m.cordoned_by_us = Some(now);
                let pods = (0..2).map(|i| format!("default/{machine}-{i}"));
                m.drain = Some(Drain {
                    remaining: pods.collect(),
                    blocked: Vec::new(),
                    leaving: 0,
                });
            }
            Action::Run { machine, from, to } => {
                let m = observed.machines.get_mut(machine).unwrap();
                if m.running != *from {
                    return Outcome::Stale;
                }
                m.ordered = Some((to.clone(), now));
                m.order_seen = false;
                m.failure = None;
            }
            Action::Uncordon { machine } => {
                let m = observed.machines.get_mut(machine).unwrap();
                assert!(m.cordoned_by_us.is_some(), "others' cordons are theirs");
                (m.cordoned, m.cordoned_by_us, m.drain) = (false, None, None);
            }
            // What only the status remembers happens at once.
            Action::Begin { .. } | Action::Fail { .. } | Action::Reverted { .. } | Action::Finish { .. } => {
                crate::effects::apply(observed, action, now);
            }
            Action::Drain { .. } => {}
        }
        Outcome::Done
    }

    /// What can happen next.
    pub(crate) fn events(&self) -> Vec<Event> {
        let mut events = Vec::new();
        for (&workload, seen) in &self.input.observed.workloads {
            self.workload_events(&mut events, workload, seen);
        }
        for (name, m) in &self.input.observed.machines {
            let mut can = |event: fn(MachineName) -> Event, possible: bool| {
                if possible {
                    events.push(event(name.clone()));
                }
            };
            can(
                Event::Snapshot,
                m.snapshot_ordered
                    .as_ref()
                    .is_some_and(|name| !m.snapshots.contains(name)),
            );
            can(
                Event::Standby,
                m.standby
                    .as_ref()
                    .is_some_and(|s| s.release != s.ordered || s.api_ready != s.serve_ordered),
            );
            if let Some((etcd, to)) = m.etcd.as_ref().and_then(|etcd| Some((etcd, etcd.ordered.as_ref()?))) {
                let differs = etcd.image != self.etcd_image(to);
                can(Event::EtcdStops, differs && etcd.healthy);
                can(Event::EtcdStarts, !etcd.healthy);
            }
            let switches =
                m.ordered.as_ref().is_some_and(|(to, _)| m.running.as_ref() != Some(to)) && m.failure.is_none();
            can(Event::OrderTaken, !m.order_seen);
            can(Event::KubeletStops, m.order_seen && switches && m.ready);
            can(Event::KubeletStarts, !m.ready);
            can(
                Event::PodEvicted,
                m.drain.as_ref().is_some_and(|drain| !drain.remaining.is_empty()),
            );
            for known in &self.input.observed.releases {
                let digest = &known.release.digest;
                if m.stage_ordered.contains(digest) && !m.staged.contains_key(digest) {
                    events.push(Event::Staged(name.clone(), known.release.clone()));
                }
            }
        }
        events
    }

    fn workload_events(&self, events: &mut Vec<Event>, workload: Workload, seen: &WorkloadSeen) {
        if !seen.settled {
            events.push(Event::Settles(workload));
            return;
        }
        for pod in &seen.instances {
            let name = pod.name.clone();
            let unready = self.is_bad(&pod.release, Bad::Unready(workload));
            let crashes = self.is_bad(&pod.release, Bad::Crashes(workload));
            if pod.leaving {
                events.push(Event::PodGone(workload, name));
            } else if crashes && pod.trouble.is_none() {
                events.push(Event::PodCrashes(workload, name));
            } else if !pod.ready && !unready && !crashes {
                events.push(Event::PodReady(workload, name));
            }
        }
        match workload {
            Workload::ApiServer | Workload::Proxy => self.daemon_set_events(events, workload, seen),
            _ => self.deployment_events(events, workload, seen),
        }
    }

    /// One machine at a time: the new pod beside the old, then the old ends. With `OnDelete`, only what is missing is made.
    fn daemon_set_events(&self, events: &mut Vec<Event>, workload: Workload, seen: &WorkloadSeen) {
        let machines = self.input.observed.machines.iter();
        let waits = seen
            .instances
            .iter()
            .any(|pod| pod.release == seen.template && !pod.leaving && !pod.ready);
        for (name, _) in machines.filter(|(_, m)| workload == Workload::Proxy || m.role == Role::ControlPlane) {
            let here = || seen.instances.iter().filter(|pod| pod.machine.as_ref() == Some(name));
            let old = here().find(|pod| pod.release != seen.template && !pod.leaving);
            let new = here().find(|pod| pod.release == seen.template && !pod.leaving);
            match (old, new) {
                (None, None) if seen.automatic || here().next().is_none() => {
                    events.push(Event::PodMade(workload, name.clone()));
                }
                (Some(old), None) if seen.automatic && !old.ready => {
                    events.push(Event::PodLeaves(workload, old.name.clone()));
                }
                (Some(_), None) if seen.automatic && !waits => events.push(Event::PodMade(workload, name.clone())),
                (Some(old), Some(new)) if new.ready => events.push(Event::PodLeaves(workload, old.name.clone())),
                _ => {}
            }
        }
    }

    fn deployment_events(&self, events: &mut Vec<Event>, workload: Workload, seen: &WorkloadSeen) {
        let stays = |pod: &&Instance| !pod.leaving;
        let fresh = || {
            seen.instances
                .iter()
                .filter(|pod| pod.release == seen.template)
                .filter(stays)
        };
        let mut old = seen
            .instances
            .iter()
            .filter(|pod| pod.release != seen.template)
            .filter(stays);
        let staying = seen.instances.iter().filter(stays).count();
        if staying < seen.wanted {
            let machine = self.input.observed.machines.keys().next().unwrap();
            events.push(Event::PodMade(workload, machine.clone()));
        } else if let Some(next) = old.clone().find(|pod| !pod.ready).or_else(|| old.next()) {
            let all_ready = fresh().all(|pod| pod.ready);
            if staying > seen.wanted && (all_ready || !next.ready) {
                events.push(Event::PodLeaves(workload, next.name.clone()));
            } else if staying == seen.wanted && all_ready {
                events.push(Event::PodMade(workload, next.machine.clone().unwrap()));
            }
        } else if staying > seen.wanted {
            let extra = fresh().min_by_key(|pod| pod.ready).unwrap();
            events.push(Event::PodLeaves(workload, extra.name.clone()));
        }
    }

    /// Lets an event happen.
    pub(crate) fn happen(&mut self, event: &Event) {
        let now = self.input.now;
        match event {
            Event::Settles(workload) => self.workload(*workload).settled = true,
            Event::PodMade(workload, machine) => {
                self.made += 1;
                let number = self.made;
                let seen = self.workload(*workload);
                let made = pod(
                    *workload,
                    number,
                    Some(machine),
                    &seen.template.clone(),
                    seen.revision,
                    now,
                    false,
                );
                seen.instances.push(made);
            }
            Event::PodReady(workload, name)
            | Event::PodCrashes(workload, name)
            | Event::PodLeaves(workload, name)
            | Event::PodGone(workload, name) => {
                let pods = &mut self.workload(*workload).instances;
                let at = pods.iter().position(|pod| pod.name == *name).unwrap();
                match event {
                    Event::PodReady(..) => (pods[at].ready, pods[at].ready_since) = (true, now),
                    Event::PodCrashes(..) => pods[at].trouble = Some("it crashed 3 times".to_owned()),
                    Event::PodLeaves(..) => pods[at].leaving = true,
                    _ => drop(pods.remove(at)),
                }
            }
            Event::EtcdStarts(name) => {
                let to = self.input.observed.machines[name]
                    .etcd
                    .as_ref()
                    .unwrap()
                    .ordered
                    .clone()
                    .unwrap();
                let image = self.etcd_image(&to);
                self.input.observed.machines.get_mut(name).unwrap().etcd = Some(EtcdSeen {
                    image,
                    ordered: Some(to),
                    healthy: true,
                    message: String::new(),
                });
            }
            Event::Staged(name, release) => {
                let bad = self.is_bad(release, Bad::Bytes);
                let state = if bad {
                    Staged::Bad("`kubelet` has another digest".to_owned())
                } else {
                    Staged::Ready
                };
                self.input
                    .observed
                    .machines
                    .get_mut(name)
                    .unwrap()
                    .staged
                    .insert(release.digest.clone(), state);
            }
            Event::KubeletStarts(name) => {
                let to = self.input.observed.machines[name].ordered.clone();
                let bad = to.as_ref().is_some_and(|(to, _)| self.is_bad(to, Bad::Kubelet));
                self.kubelet_starts(name, to.map(|(to, _)| to), bad, now);
            }
            Event::Snapshot(name)
            | Event::Standby(name)
            | Event::EtcdStops(name)
            | Event::OrderTaken(name)
            | Event::KubeletStops(name)
            | Event::PodEvicted(name) => {
                let m = self.input.observed.machines.get_mut(name).unwrap();
                match event {
                    Event::Snapshot(_) => drop(m.snapshots.insert(m.snapshot_ordered.clone().unwrap())),
                    Event::Standby(_) => {
                        let standby = m.standby.as_mut().unwrap();
                        standby.release = standby.ordered.clone();
                        standby.api_ready = standby.serve_ordered;
                    }
                    Event::EtcdStops(_) => m.etcd.as_mut().unwrap().healthy = false,
                    Event::OrderTaken(_) => m.order_seen = true,
                    Event::KubeletStops(_) => (m.ready, m.ready_since) = (false, now),
                    _ => drop(m.drain.as_mut().unwrap().remaining.pop_first()),
                }
            }
        }
    }

    fn kubelet_starts(&mut self, name: &MachineName, to: Option<ReleaseRef>, bad: bool, now: Timestamp) {
        let m = self.input.observed.machines.get_mut(name).unwrap();
        (m.ready, m.ready_since) = (true, now);
        // A machine that comes back from elsewhere has not taken its order yet.
        let Some(to) = to.filter(|_| m.order_seen && m.failure.is_none()) else {
            return;
        };
        if bad {
            m.failure = Some(MachineFailure {
                release: to,
                order: 1,
                message: "kubelet did not become Ready".to_owned(),
                log: vec!["unknown flag".to_owned()],
                time: now,
            });
        } else {
            m.kubelet = to.version.clone();
            m.running = Some(to);
        }
    }

    fn workload(&mut self, workload: Workload) -> &mut WorkloadSeen {
        self.input.observed.workloads.get_mut(&workload).unwrap()
    }

    /// Machines that the operator has taken out of service, by pool.
    pub(crate) fn taken_out(&self, pool: &str) -> usize {
        let machines = self.input.observed.machines.values().filter(|m| m.pool == pool);
        machines.filter(|m| m.cordoned_by_us.is_some()).count()
    }

    /// Releases that any part is of.
    pub(crate) fn releases_in_use(&self) -> BTreeSet<ReleaseRef> {
        let observed = &self.input.observed;
        let workloads = observed.workloads.values();
        let pods = workloads.flat_map(|seen| seen.instances.iter().map(|pod| &pod.release));
        let machines = observed.machines.values().filter_map(|m| m.running.as_ref());
        pods.chain(machines).cloned().collect()
    }
}
