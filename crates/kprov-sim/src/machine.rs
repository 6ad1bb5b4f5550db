//! Machines: power, kubelet and its pods, and kprov-node with its orders.

use kprov_upgrade::model::Workload;

use crate::objects::{Fetch, Kubelet, Leader, Machine, MachineId, Owner, Pod, PodId, Process, ReleaseId, Told};
use crate::script::{Defect, Millis, SECOND};
use crate::world::{Event, World, note};

/// How often a machine starts a release that it tries before it goes back.
const STARTS: u32 = 3;
/// After so many restarts a pod that waits for the next is in a crash loop.
const CRASHES: u32 = 3;

/// What a process of a release does.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Nature {
    Good,
    Crashes,
    NeverReady,
}

impl Machine {
    /// What kprov-node tells.
    pub(crate) fn tells(&self, quorum: bool) -> Told {
        Told {
            order: self.orders.order,
            running: Some(self.trial.map_or(self.current, |trial| trial.from)),
            staged: self.staged.clone(),
            failure: self.failure.clone(),
            etcd: self.etcd.map(|member| (member.release, member.up && quorum)),
            standby: self
                .standby
                .map(|standby| (standby.release, standby.api == Process::Ready)),
            snapshots: self.snapshots.clone(),
        }
    }

    pub(crate) fn has(&self, release: ReleaseId) -> bool {
        self.staged.get(&release) == Some(&Fetch::Ready)
    }

    fn is_silent(&self, defect: Option<Defect>, index: MachineId) -> bool {
        self.kubelet != Kubelet::Stopped
            && matches!(defect, Some(Defect::KubeletSilent(which)) if which.is_none_or(|which| which == index))
    }
}

/// Power.
impl World {
    /// Takes a machine's power. What the API tells of it stays as it is.
    pub(crate) fn power_off(&mut self, index: MachineId) {
        let machine = &mut self.machines[index];
        if !machine.up {
            return;
        }
        machine.up = false;
        machine.booted = false;
        machine.life += 1;
        machine.kubelet = Kubelet::Stopped;
        machine.kubelet_life += 1;
        machine.snapshotting = false;
        machine.staged.retain(|_, fetch| *fetch != Fetch::Fetching);
        if let Some(member) = &mut machine.etcd {
            member.up = false;
            member.by_us = false;
        }
        if let Some(standby) = &mut machine.standby {
            standby.api = Process::None;
            standby.managers = false;
            standby.life += 1;
        }
        for pod in self.pods.values_mut().filter(|pod| pod.machine == Some(index)) {
            pod.process = Process::None;
            pod.life += 1;
        }
        self.processes += 1;
        note!(self, "{} loses power", self.machines[index].name);
    }

    /// Gives a machine its power back.
    pub(crate) fn power_on(&mut self, index: MachineId) {
        let machine = &mut self.machines[index];
        if machine.up {
            return;
        }
        machine.up = true;
        let life = machine.life;
        note!(self, "{} has power again", self.machines[index].name);
        self.soon(3 * SECOND, 10 * SECOND, Event::Boot(index, life));
    }

    pub(crate) fn boot(&mut self, index: MachineId, life: u32) {
        if self.machines[index].life == life && self.machines[index].up {
            self.machines[index].booted = true;
            self.start_agent(index);
        }
    }

    /// kprov-node starts: it goes on with a trial, or back where it has tried often enough, and starts kubelet.
    pub(crate) fn start_agent(&mut self, index: MachineId) {
        let given_up = match &mut self.machines[index].trial {
            Some(trial) => {
                trial.starts += 1;
                trial.starts > STARTS
            }
            None => false,
        };
        if given_up {
            self.go_back(index, "it was started three times and never became Ready");
        } else {
            self.start_kubelet(index);
        }
        self.poke_agent(index);
    }
}

/// Kubelet.
impl World {
    /// (Re)starts kubelet, of the release that `current` points to. Containers go on.
    pub(crate) fn start_kubelet(&mut self, index: MachineId) {
        let machine = &mut self.machines[index];
        self.processes += 1;
        machine.kubelet = Kubelet::Starting;
        machine.kubelet_life += 1;
        let (life, limit) = (machine.kubelet_life, machine.trial.map(|trial| trial.limit));
        self.soon(2 * SECOND, 4 * SECOND, Event::KubeletUp(index, life));
        if let Some(limit) = limit {
            self.at(self.now + limit, Event::TrialEnds(index, life));
        }
    }

    pub(crate) fn is_silent(&self, index: MachineId) -> bool {
        let machine = &self.machines[index];
        machine.is_silent(self.releases[machine.current].defect, index)
    }

    /// A kubelet runs that starts containers.
    pub(crate) fn has_kubelet(&self, index: MachineId) -> bool {
        matches!(self.machines[index].kubelet, Kubelet::Running | Kubelet::Ready) && !self.is_silent(index)
    }

    pub(crate) fn kubelet_up(&mut self, index: MachineId, life: u32) {
        if self.machines[index].kubelet_life != life {
            return;
        }
        self.machines[index].kubelet = Kubelet::Running;
        self.processes += 1;
        if self.is_silent(index) {
            return;
        }
        let (now, answers) = (self.now, self.answers());
        let machine = &mut self.machines[index];
        if let Some(node) = machine.node.as_mut().filter(|_| answers) {
            // A kubelet that has just started has not asked its runtime yet.
            node.kubelet = machine.current;
            node.heartbeat = now;
            if node.ready {
                node.ready = false;
                node.ready_since = now;
            }
            self.touch();
        }
        if self.machines[index].etcd.is_some_and(|member| !member.up) {
            let life = self.machines[index].life;
            self.soon(2 * SECOND, 4 * SECOND, Event::EtcdUp(index, life));
        }
        self.soon(SECOND, 4 * SECOND, Event::NodeReady(index, life));
        self.poke_kubelet(index);
        self.poke_agent(index);
    }

    pub(crate) fn node_ready(&mut self, index: MachineId, life: u32) {
        if self.machines[index].kubelet_life != life {
            return;
        }
        if !self.answers() {
            self.at(self.now + SECOND, Event::NodeReady(index, life));
            return;
        }
        let now = self.now;
        let machine = &mut self.machines[index];
        machine.kubelet = Kubelet::Ready;
        self.processes += 1;
        let Some(node) = &mut machine.node else { return };
        node.kubelet = machine.current;
        node.heartbeat = now;
        if !node.ready {
            node.ready = true;
            node.ready_since = now;
        }
        if let Some(trial) = machine.trial.take() {
            machine.failure = None;
            let (name, version) = (&self.machines[index].name, &self.releases[trial.to].reference);
            note!(self, "{name} runs {version}");
        }
        self.touch();
        self.poke_kubelet(index);
        self.poke_agent(index);
    }

    /// Has kubelet look at its pods soon.
    pub(crate) fn poke_kubelet(&mut self, index: MachineId) {
        if !self.machines[index].kubelet_queued {
            self.machines[index].kubelet_queued = true;
            self.soon(100, 400, Event::Kubelet(index));
        }
    }

    /// Kubelet looks at its pods: starts, ends, and tells of them.
    pub(crate) fn kubelet(&mut self, index: MachineId) {
        self.machines[index].kubelet_queued = false;
        if !self.has_kubelet(index) {
            return;
        }
        if !self.answers() {
            self.machines[index].kubelet_queued = true;
            self.at(self.now + SECOND, Event::Kubelet(index));
            return;
        }
        let here: Vec<PodId> = self
            .pods
            .iter()
            .filter(|(_, pod)| pod.machine == Some(index))
            .map(|(id, _)| *id)
            .collect();
        for id in here {
            self.sync_pod(id, index);
        }
    }

    fn sync_pod(&mut self, id: PodId, index: MachineId) {
        let Some(pod) = self.pods.get_mut(&id) else { return };
        match pod.process {
            Process::None | Process::BackOff if pod.leaving => {
                self.pods.remove(&id);
                self.touch();
                return;
            }
            Process::Starting | Process::Up | Process::Ready if pod.leaving => {
                pod.process = Process::Stopping;
                pod.life += 1;
                let life = pod.life;
                let owner = pod.owner;
                self.processes += 1;
                self.release_leases(id);
                let (low, high) = self.stopping(owner);
                self.soon(low, high, Event::Pod(id, life));
            }
            Process::None => self.start_pod(id, index),
            _ => {}
        }
        let now = self.now;
        let Some(pod) = self.pods.get_mut(&id) else { return };
        let ready = pod.process == Process::Ready;
        let trouble = match pod.process {
            Process::BackOff if pod.restarts >= CRASHES => Some("it crashes again and again: exit code 1"),
            // What can't be pulled is told by whoever tries to start it.
            Process::None => pod.trouble,
            _ => None,
        };
        if (pod.ready, pod.trouble) != (ready, trouble) {
            if pod.ready != ready {
                pod.ready = ready;
                pod.ready_since = now;
            }
            pod.trouble = trouble;
            self.touch();
        }
    }

    /// Starts a pod's container, pulling its image where the machine doesn't have it.
    fn start_pod(&mut self, id: PodId, index: MachineId) {
        let Some(pod) = self.pods.get(&id) else { return };
        let (owner, release) = (pod.owner, pod.template.release);
        let pull = match owner {
            Owner::App(_) => 0,
            Owner::Workload(_) if self.machines[index].has(release) => 0,
            Owner::Workload(_) if self.is_bad_on(release, index) => {
                if let Some(pod) = self.pods.get_mut(&id) {
                    pod.trouble = Some("its image can't be pulled: the digest is another");
                }
                self.machines[index].kubelet_queued = true;
                self.at(self.now + 10 * SECOND, Event::Kubelet(index));
                return;
            }
            Owner::Workload(_) => self.span(5 * SECOND, 15 * SECOND),
        };
        let start = match owner {
            Owner::Workload(Workload::ApiServer) => self.span(2 * SECOND, 5 * SECOND),
            _ => self.span(SECOND, 2 * SECOND),
        };
        let Some(pod) = self.pods.get_mut(&id) else { return };
        pod.process = Process::Starting;
        pod.trouble = None;
        pod.life += 1;
        let life = pod.life;
        self.at(self.now + pull + start, Event::Pod(id, life));
    }

    /// A pod's process goes on.
    pub(crate) fn go_on(&mut self, id: PodId, life: u32) {
        let Some(pod) = self.pods.get(&id).filter(|pod| pod.life == life) else {
            return;
        };
        let Some(index) = pod.machine else { return };
        let (process, nature) = (pod.process, self.nature(pod));
        let (next, again) = match process {
            Process::Starting if nature == Nature::Crashes => {
                self.crash(id);
                return;
            }
            Process::Starting => {
                let ready = (nature == Nature::Good).then(|| self.span(SECOND, 3 * SECOND));
                (Process::Up, ready)
            }
            Process::Up => (Process::Ready, None),
            Process::BackOff => (Process::Starting, Some(self.span(SECOND, 2 * SECOND))),
            Process::Stopping => (Process::None, None),
            Process::None | Process::Ready => return,
        };
        if let Some(pod) = self.pods.get_mut(&id) {
            pod.process = next;
            self.processes += 1;
        }
        if let Some(after) = again {
            self.at(self.now + after, Event::Pod(id, life));
        }
        note!(self, "pod {id} {} is {next:?}", self.describe(id));
        self.poke_kubelet(index);
        self.poke_agent(index);
    }

    /// A pod's process crashes, and is started again after a while that doubles (10 s to 5 min, as kubelet does).
    pub(crate) fn crash(&mut self, id: PodId) {
        let now = self.now;
        let Some(pod) = self.pods.get_mut(&id) else { return };
        pod.process = Process::BackOff;
        pod.life += 1;
        let wait = ((10 * SECOND) << pod.restarts.min(5)).min(300 * SECOND);
        pod.restarts += 1;
        let (life, machine) = (pod.life, pod.machine);
        self.processes += 1;
        note!(self, "pod {id} {} crashes", self.describe(id));
        self.at(now + wait, Event::Pod(id, life));
        if let Some(machine) = machine {
            self.poke_kubelet(machine);
        }
    }

    fn nature(&self, pod: &Pod) -> Nature {
        let Owner::Workload(workload) = pod.owner else {
            return Nature::Good;
        };
        match (self.releases[pod.template.release].defect, workload) {
            (Some(Defect::ApiServerCrashes), Workload::ApiServer)
            | (Some(Defect::ControllerManagerCrashes), Workload::ControllerManager)
            | (Some(Defect::ProxyCrashes), Workload::Proxy)
            | (Some(Defect::OperatorCrashes), Workload::Operator) => Nature::Crashes,
            (Some(Defect::ApiServerNeverReady), Workload::ApiServer)
            | (Some(Defect::SchedulerNeverReady), Workload::Scheduler)
            | (Some(Defect::DnsNeverReady), Workload::Dns) => Nature::NeverReady,
            _ => Nature::Good,
        }
    }

    /// How long a process takes to end.
    const fn stopping(&self, owner: Owner) -> (Millis, Millis) {
        match owner {
            Owner::Workload(Workload::ApiServer) => (4 * SECOND, 8 * SECOND),
            Owner::Workload(_) => (SECOND, 2 * SECOND),
            Owner::App(_) => (self.grace, self.grace),
        }
    }

    /// A process that ends in order gives up its Leases. An operator with a call under way can't.
    fn release_leases(&mut self, id: PodId) {
        for lease in [&mut self.manager, &mut self.scheduler] {
            if matches!(lease.holder, Some(Leader::Pod(holder, _)) if holder == id) {
                lease.holder = None;
            }
        }
        if self
            .lease
            .holder
            .is_some_and(|holder| holder.0 == id && !self.calls.has_any(holder))
        {
            self.lease.holder = None;
        }
    }

    /// A pod in words, for the trace.
    pub(crate) fn describe(&self, id: PodId) -> String {
        let Some(pod) = self.pods.get(&id) else {
            return "gone".to_owned();
        };
        let owner = match pod.owner {
            Owner::Workload(workload) => {
                format!(
                    "{} {}",
                    workload.as_str(),
                    self.releases[pod.template.release].reference
                )
            }
            Owner::App(app) => format!("app {app}"),
        };
        match pod.machine {
            Some(machine) => format!("{owner} on {}", self.machines[machine].name),
            None => owner,
        }
    }
}
