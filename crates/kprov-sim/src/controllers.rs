//! What Kubernetes' own controllers do: leases, DaemonSets, Deployments, the scheduler, the node monitor. They act only while
//! one of theirs leads and an API server answers.

use std::collections::BTreeMap;

use kprov_types::Role;
use kprov_upgrade::model::Workload;

use crate::objects::{Kubelet, Leader, Lease, MachineId, Operator, Owner, PodId, Process, Template};
use crate::script::{Millis, SECOND};
use crate::world::{Event, World, note};

/// How long a Lease is good without being renewed.
pub(crate) const LEASE: Millis = 15 * SECOND;
/// How often Leases are renewed, and machines looked at.
const TICK: Millis = 2 * SECOND;
/// After how long without a heartbeat a Node isn't Ready (`--node-monitor-grace-period`).
const GRACE: Millis = 40 * SECOND;
/// After how long on a Node that isn't Ready pods are evicted (`tolerationSeconds` as the API server sets it).
const TOLERATION: Millis = 300 * SECOND;

/// Leases and Nodes.
impl World {
    pub(crate) fn tick(&mut self) {
        self.at(self.now + TICK, Event::Tick);
        let answers = self.answers();
        self.silent_since = match (answers, self.silent_since) {
            (true, _) => None,
            (false, since) => since.or(Some(self.now)),
        };
        if answers {
            self.manager = self.elect(self.manager, Workload::ControllerManager);
            self.scheduler = self.elect(self.scheduler, Workload::Scheduler);
            self.elect_operator();
            self.heartbeats();
            if self.control_missed
                && !self.control_queued
                && self.leads(Workload::ControllerManager)
                && self.leads(Workload::Scheduler)
            {
                self.control_missed = false;
                self.control_queued = true;
                self.soon(50, 250, Event::Control);
            }
        }
        self.standbys();
    }

    fn is_alive(&self, leader: Leader, workload: Workload) -> bool {
        match leader {
            Leader::Pod(id, life) => self
                .pods
                .get(&id)
                .is_some_and(|pod| pod.life == life && pod.process == Process::Ready && pod.is_of(workload)),
            Leader::Standby(machine) => self.machines[machine].standby.is_some_and(|standby| standby.managers),
        }
    }

    fn elect(&self, lease: Lease<Leader>, workload: Workload) -> Lease<Leader> {
        if let Some(holder) = lease.holder {
            if self.is_alive(holder, workload) {
                return Lease {
                    renewed: self.now,
                    ..lease
                };
            }
            if self.now - lease.renewed < LEASE {
                return lease;
            }
        }
        let pods = self
            .pods
            .iter()
            .filter(|(_, pod)| pod.is_of(workload) && pod.process == Process::Ready)
            .map(|(id, pod)| Leader::Pod(*id, pod.life));
        let standbys = (0..self.machines.len())
            .map(Leader::Standby)
            .filter(|leader| self.is_alive(*leader, workload));
        match pods.chain(standbys).next() {
            Some(holder) => Lease {
                holder: Some(holder),
                renewed: self.now,
            },
            None => lease,
        }
    }

    /// Somebody of the kind leads, and can reach the API.
    pub(crate) fn leads(&self, workload: Workload) -> bool {
        let lease = if workload == Workload::Scheduler {
            self.scheduler
        } else {
            self.manager
        };
        lease.holder.is_some_and(|holder| self.is_alive(holder, workload))
    }

    /// Operators that run.
    pub(crate) fn operators(&self) -> impl Iterator<Item = Operator> {
        self.pods
            .iter()
            .filter(|(_, pod)| pod.is_of(Workload::Operator) && matches!(pod.process, Process::Up | Process::Ready))
            .map(|(id, pod)| Operator(*id, pod.life))
    }

    fn elect_operator(&mut self) {
        let now = self.now;
        let awake: Vec<Operator> = self
            .operators()
            .filter(|operator| self.stalled.get(operator).is_none_or(|until| *until <= now))
            .collect();
        for operator in awake {
            let free = self.lease.holder.is_none() || now - self.lease.renewed > LEASE;
            if self.lease.holder == Some(operator) || free {
                self.lease = Lease {
                    holder: Some(operator),
                    renewed: now,
                };
                let before = self.leading_until.insert(operator, now + LEASE);
                if free {
                    note!(self, "operator {operator:?} leads");
                    // Whoever waits to lead has to look.
                    if before.is_none_or(|until| until <= now) {
                        self.version += 1;
                    }
                }
            }
        }
    }

    /// Kubelets that run say so; Nodes of those that don't are not Ready after a while, and pods on them give up later.
    fn heartbeats(&mut self) {
        let now = self.now;
        let monitored = self.leads(Workload::ControllerManager);
        let mut changed = false;
        for index in 0..self.machines.len() {
            let alive = self.machines[index].kubelet == Kubelet::Ready && !self.is_silent(index);
            let Some(node) = &mut self.machines[index].node else {
                continue;
            };
            if alive {
                node.heartbeat = now;
                if !node.ready {
                    node.ready = true;
                    node.ready_since = now;
                    changed = true;
                    self.poke_kubelet(index);
                }
                continue;
            }
            let gone = now - node.heartbeat > GRACE;
            if monitored && gone && node.ready {
                node.ready = false;
                node.ready_since = now;
                changed = true;
                note!(self, "{} is not Ready", self.machines[index].name);
                for pod in self
                    .pods
                    .values_mut()
                    .filter(|pod| pod.machine == Some(index) && pod.ready)
                {
                    pod.ready = false;
                    pod.ready_since = now;
                }
            } else if monitored && gone && now - node.ready_since > TOLERATION {
                for pod in self
                    .pods
                    .values_mut()
                    .filter(|pod| pod.machine == Some(index) && !pod.leaving)
                {
                    if !matches!(pod.owner, Owner::Workload(workload) if workload != Workload::Dns) {
                        pod.leaving = true;
                        changed = true;
                    }
                }
            }
        }
        if changed {
            self.touch();
        }
    }
}

/// DaemonSets, Deployments, the scheduler.
impl World {
    pub(crate) fn control(&mut self) {
        self.control_queued = false;
        let answers = self.answers();
        if answers && self.leads(Workload::ControllerManager) {
            for workload in Workload::ALL {
                self.reconcile(workload);
            }
            self.reconcile_apps();
        } else {
            self.control_missed = true;
        }
        if answers && self.leads(Workload::Scheduler) {
            self.schedule();
        } else {
            self.control_missed = true;
        }
    }

    fn reconcile(&mut self, workload: Workload) {
        let Some(object) = self.objects.get_mut(&workload) else {
            return;
        };
        let (template, automatic) = (object.template, object.automatic);
        let behind = object.observed != object.generation;
        object.observed = object.generation;
        if behind {
            self.touch();
        }
        match (self.replicas(workload), workload) {
            (Some(replicas), _) => self.deployment(workload, template, replicas),
            (None, Workload::ApiServer) if automatic => self.surging_daemon_set(workload, template),
            (None, _) => self.daemon_set(workload, template, automatic),
        }
    }

    /// A DaemonSet's pods that aren't leaving, and how many are, by machine.
    fn by_machine(&self, workload: Workload) -> BTreeMap<MachineId, (Vec<PodId>, usize)> {
        let mut machines: BTreeMap<MachineId, (Vec<PodId>, usize)> = self
            .machines
            .iter()
            .enumerate()
            .filter(|(_, machine)| {
                machine.node.is_some() && (workload == Workload::Proxy || machine.role == Role::ControlPlane)
            })
            .map(|(index, _)| (index, (Vec::new(), 0)))
            .collect();
        for (id, pod) in self.pods.iter().filter(|(_, pod)| pod.is_of(workload)) {
            if let Some((stay, leave)) = pod.target.and_then(|machine| machines.get_mut(&machine)) {
                if pod.leaving {
                    *leave += 1;
                } else {
                    stay.push(*id);
                }
            }
        }
        machines
    }

    /// A DaemonSet with `maxSurge: 1, maxUnavailable: 0`: as kube-controller-manager does it (`podsShouldBeOnNode`).
    fn surging_daemon_set(&mut self, workload: Workload, template: Template) {
        let mut surging = 0;
        let mut without = Vec::new();
        for (machine, (pods, _)) in self.by_machine(workload) {
            let (new, old): (Vec<PodId>, Vec<PodId>) = pods
                .into_iter()
                .partition(|id| self.pods[id].template.id == template.id);
            for extra in new.iter().skip(1).chain(old.iter().skip(1)) {
                self.delete_pod(*extra);
            }
            match (new.first(), old.first()) {
                (Some(new), Some(old)) => {
                    if !self.pods[old].ready || self.pods[new].ready {
                        self.delete_pod(*old);
                    } else {
                        surging += 1;
                    }
                }
                (None, Some(old)) if self.pods[old].ready => without.push(machine),
                (None, _) => self.create_pod(workload, template, Some(machine)),
                (Some(_), None) => {}
            }
        }
        for machine in without.into_iter().take(1_usize.saturating_sub(surging)) {
            self.create_pod(workload, template, Some(machine));
        }
    }

    /// A DaemonSet with `maxUnavailable: 1`, or one that replaces only what is deleted.
    fn daemon_set(&mut self, workload: Workload, template: Template, automatic: bool) {
        let machines = self.by_machine(workload);
        // A share of a large cluster, as its own policy has it.
        let limit = (machines.len() / 10).max(1);
        let mut unavailable = machines
            .values()
            .filter(|(pods, _)| !pods.iter().any(|id| self.pods[id].ready))
            .count();
        for (machine, (pods, leaving)) in machines {
            for extra in pods.iter().skip(1) {
                self.delete_pod(*extra);
            }
            match pods.first() {
                None if leaving == 0 => self.create_pod(workload, template, Some(machine)),
                Some(id) if automatic && self.pods[id].template.id != template.id => {
                    if !self.pods[id].ready {
                        self.delete_pod(*id);
                    } else if unavailable < limit {
                        unavailable += 1;
                        self.delete_pod(*id);
                    }
                }
                _ => {}
            }
        }
    }

    /// A Deployment with `maxSurge: 1`, and `maxUnavailable: 0` (1 for CoreDNS).
    fn deployment(&mut self, workload: Workload, template: Template, replicas: usize) {
        let unavailable = usize::from(workload == Workload::Dns);
        let pods = self.pods.iter().filter(|(_, pod)| pod.is_of(workload) && !pod.leaving);
        let (new, old): (Vec<_>, Vec<_>) = pods
            .map(|(id, pod)| (*id, pod.ready, pod.template.id))
            .partition(|(_, _, of)| *of == template.id);
        let total = new.len() + old.len();
        let missing = replicas
            .saturating_sub(new.len())
            .min((replicas + 1).saturating_sub(total));
        let new_unready = new.iter().filter(|(_, ready, _)| !ready).count() + missing;
        let mut available = [&new, &old]
            .into_iter()
            .flatten()
            .filter(|(_, ready, _)| *ready)
            .count();
        let minimum = replicas.saturating_sub(unavailable);
        let mut cleanup = (total + missing).saturating_sub(minimum + new_unready);
        for _ in 0..missing {
            self.create_pod(workload, template, None);
        }
        for (id, ready, _) in &old {
            if !ready && cleanup > 0 {
                cleanup -= 1;
                self.delete_pod(*id);
            } else if *ready && available > minimum {
                available -= 1;
                self.delete_pod(*id);
            }
        }
        for (id, ..) in new.iter().skip(replicas) {
            self.delete_pod(*id);
        }
    }

    fn reconcile_apps(&mut self) {
        let mut missing: Vec<usize> = self.apps.iter().map(|app| app.replicas).collect();
        for pod in self.pods.values().filter(|pod| !pod.leaving) {
            if let Owner::App(app) = pod.owner {
                missing[app] = missing[app].saturating_sub(1);
            }
        }
        let template = Template {
            id: 0,
            release: 0,
            revision: 0,
        };
        for (app, missing) in missing.into_iter().enumerate() {
            for _ in 0..missing {
                self.add_pod(Owner::App(app), template, None);
                self.touch();
            }
        }
    }

    fn create_pod(&mut self, workload: Workload, template: Template, target: Option<MachineId>) {
        let id = self.add_pod(Owner::Workload(workload), template, target);
        note!(self, "pod {id} {} is made", self.describe(id));
        self.touch();
    }

    /// Deletes a pod: at once where it is nowhere yet, else once its kubelet has ended it.
    pub(crate) fn delete_pod(&mut self, id: PodId) {
        let Some(pod) = self.pods.get_mut(&id).filter(|pod| !pod.leaving) else {
            return;
        };
        pod.leaving = true;
        match pod.machine {
            Some(machine) => self.poke_kubelet(machine),
            None => {
                self.pods.remove(&id);
            }
        }
        note!(self, "pod {id} {} is deleted", self.describe(id));
        self.touch();
    }

    /// Finds machines for pods that have none.
    fn schedule(&mut self) {
        let unbound: Vec<PodId> = self
            .pods
            .iter()
            .filter(|(_, pod)| pod.machine.is_none())
            .map(|(id, _)| *id)
            .collect();
        for id in unbound {
            let machine = self.pods[&id].target.or_else(|| self.place(id));
            if let (Some(machine), Some(pod)) = (machine, self.pods.get_mut(&id)) {
                pod.machine = Some(machine);
                self.poke_kubelet(machine);
                self.touch();
            }
        }
    }

    /// The machine with the fewest pods of the same owner, among those that may take it. The control plane's own pods tolerate
    /// everything, a Node that isn't Ready too.
    fn place(&mut self, id: PodId) -> Option<MachineId> {
        let owner = self.pods[&id].owner;
        let own = matches!(owner, Owner::Workload(workload) if workload != Workload::Dns);
        let workers = self.machines.iter().any(|machine| machine.role == Role::Worker);
        let mut counts = vec![0_usize; self.machines.len()];
        for pod in self.pods.values().filter(|pod| pod.owner == owner && !pod.leaving) {
            pod.machine.into_iter().for_each(|machine| counts[machine] += 1);
        }
        let mut best: Vec<MachineId> = Vec::new();
        let mut fewest = usize::MAX;
        for (index, machine) in self.machines.iter().enumerate() {
            let Some(node) = &machine.node else { continue };
            let takes = match owner {
                _ if own => machine.role == Role::ControlPlane,
                // CoreDNS tolerates the control plane's taint.
                Owner::Workload(_) => node.ready && !node.cordoned,
                Owner::App(_) => node.ready && !node.cordoned && (machine.role == Role::Worker || !workers),
            };
            if !takes {
                continue;
            }
            let count = counts[index];
            if count < fewest {
                fewest = count;
                best.clear();
            }
            if count == fewest {
                best.push(index);
            }
        }
        if best.is_empty() {
            return None;
        }
        let index = self.rng.below(best.len());
        Some(best[index])
    }
}
