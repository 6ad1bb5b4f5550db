//! Machines: power, kubelet and its pods, and kprov-node with its orders.

use kprov_types::Role;
use kprov_types::api::MachineFailure;
use kprov_upgrade::model::Workload;

use crate::script::{Defect, Millis, SECOND};
use crate::world::{Event, Fetch, Kubelet, Leader, MachineId, Machine, Owner, Pod, PodId, Process, ReleaseId, Told, Trial, World};
use crate::world::{note, timestamp};

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
    fn start_kubelet(&mut self, index: MachineId) {
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
    fn has_kubelet(&self, index: MachineId) -> bool {
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
        let Some(pod) = self.pods.get(&id).filter(|pod| pod.life == life) else { return };
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
        let wait = (10 * SECOND << pod.restarts.min(5)).min(300 * SECOND);
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
        let Owner::Workload(workload) = pod.owner else { return Nature::Good };
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
        if self.lease.holder.is_some_and(|holder| holder.0 == id && !self.calls.has_any(holder)) {
            self.lease.holder = None;
        }
    }

    /// A pod in words, for the trace.
    pub(crate) fn describe(&self, id: PodId) -> String {
        let Some(pod) = self.pods.get(&id) else { return "gone".to_owned() };
        let owner = match pod.owner {
            Owner::Workload(workload) => {
                format!("{} {}", workload.as_str(), self.releases[pod.template.release].reference)
            }
            Owner::App(app) => format!("app {app}"),
        };
        match pod.machine {
            Some(machine) => format!("{owner} on {}", self.machines[machine].name),
            None => owner,
        }
    }
}

/// kprov-node.
impl World {
    /// Has kprov-node look at its orders soon.
    pub(crate) fn poke_agent(&mut self, index: MachineId) {
        if !self.machines[index].agent_queued {
            self.machines[index].agent_queued = true;
            self.soon(100, 600, Event::Agent(index));
        }
    }

    /// kprov-node takes its orders, does the next thing about them, and tells.
    pub(crate) fn agent(&mut self, index: MachineId) {
        self.machines[index].agent_queued = false;
        if !self.machines[index].booted {
            return;
        }
        let answers = self.answers();
        let machine = &mut self.machines[index];
        if answers && machine.spec.order > machine.orders.order {
            machine.orders = machine.spec.clone();
        }
        self.fetch(index);
        self.obey_run(index);
        self.obey_etcd(index);
        self.obey_standby(index);
        self.obey_snapshot(index);
        // The API may have gone with this machine's own etcd member.
        if self.answers() {
            let told = self.machines[index].tells(self.has_quorum());
            if told != self.machines[index].status {
                self.machines[index].status = told;
                self.touch();
            }
        } else {
            self.machines[index].agent_queued = true;
            self.at(self.now + SECOND, Event::Agent(index));
        }
    }

    fn fetch(&mut self, index: MachineId) {
        let machine = &self.machines[index];
        let missing: Vec<ReleaseId> = machine
            .orders
            .stage
            .iter()
            .copied()
            .filter(|release| !machine.staged.contains_key(release))
            .collect();
        for release in missing {
            let life = self.machines[index].life;
            self.machines[index].staged.insert(release, Fetch::Fetching);
            self.soon(5 * SECOND, 20 * SECOND, Event::Fetched(index, life, release));
        }
    }

    pub(crate) fn fetched(&mut self, index: MachineId, life: u32, release: ReleaseId) {
        if self.machines[index].life != life {
            return;
        }
        let fetch = if self.is_bad_on(release, index) { Fetch::Bad } else { Fetch::Ready };
        self.machines[index].staged.insert(release, fetch);
        self.poke_agent(index);
    }

    fn obey_run(&mut self, index: MachineId) {
        let now = self.now;
        let machine = &mut self.machines[index];
        let Some((release, since, limit)) = machine.orders.run else { return };
        if let Some(trial) = machine.trial {
            if trial.to != release {
                machine.trial = None;
                machine.current = trial.from;
                self.start_kubelet(index);
                self.poke_agent(index);
            }
            return;
        }
        let failed = machine.failure.as_ref().is_some_and(|failure| {
            failure.release == self.releases[release].reference && failure.time >= timestamp(since)
        });
        if release == machine.current || failed || !machine.has(release) {
            return;
        }
        machine.trial = Some(Trial {
            from: machine.current,
            to: release,
            order: machine.orders.order,
            limit,
            starts: 1,
        });
        machine.current = release;
        note!(self, "{} tries {} at {now}", self.machines[index].name, self.releases[release].reference);
        self.start_kubelet(index);
    }

    pub(crate) fn trial_ends(&mut self, index: MachineId, life: u32) {
        if self.machines[index].kubelet_life == life && self.machines[index].trial.is_some() {
            self.go_back(index, "its kubelet did not report Ready in time");
        }
    }

    fn go_back(&mut self, index: MachineId, why: &str) {
        let Some(trial) = self.machines[index].trial.take() else { return };
        let failure = MachineFailure {
            release: self.releases[trial.to].reference.clone(),
            order: trial.order,
            message: why.to_owned(),
            log: Vec::new(),
            time: timestamp(self.now),
        };
        let machine = &mut self.machines[index];
        machine.current = trial.from;
        machine.failure = Some(failure);
        note!(self, "{} goes back: {why}", self.machines[index].name);
        self.start_kubelet(index);
        self.poke_agent(index);
    }

    /// Changes the etcd member, one machine at a time: whatever the orders say, a member stays while another is away.
    fn obey_etcd(&mut self, index: MachineId) {
        let machine = &self.machines[index];
        let (Some(release), Some(member)) = (machine.orders.etcd, machine.etcd) else { return };
        if member.release == release || !machine.has(release) || !member.up {
            return;
        }
        let same = self.releases[release].etcd == self.releases[member.release].etcd;
        let others_up = self
            .machines
            .iter()
            .enumerate()
            .all(|(other, machine)| other == index || machine.etcd.is_none_or(|member| member.up));
        let life = machine.life;
        if same || others_up {
            if let Some(member) = &mut self.machines[index].etcd {
                member.release = release;
                member.up = same;
                member.by_us = !same;
            }
            self.processes += 1;
            if !same {
                self.soon(2 * SECOND, 4 * SECOND, Event::EtcdUp(index, life));
            }
        } else {
            self.machines[index].agent_queued = true;
            self.at(self.now + 2 * SECOND, Event::Agent(index));
        }
    }

    pub(crate) fn etcd_up(&mut self, index: MachineId, life: u32) {
        if self.machines[index].life != life || !self.has_kubelet(index) {
            return;
        }
        if let Some(member) = &mut self.machines[index].etcd {
            member.up = true;
            member.by_us = false;
        }
        self.processes += 1;
        for machine in 0..self.control_plane {
            self.poke_agent(machine);
        }
    }

    fn obey_snapshot(&mut self, index: MachineId) {
        let quorum = self.has_quorum();
        let machine = &mut self.machines[index];
        let wanted = machine.orders.snapshot.as_ref().is_some_and(|name| !machine.snapshots.contains(name));
        if wanted && !machine.snapshotting && quorum && machine.etcd.is_some_and(|member| member.up) {
            machine.snapshotting = true;
            let life = machine.life;
            self.soon(2 * SECOND, 5 * SECOND, Event::SnapshotTaken(index, life));
        }
    }

    pub(crate) fn snapshot_taken(&mut self, index: MachineId, life: u32) {
        let machine = &mut self.machines[index];
        if machine.life == life {
            machine.snapshotting = false;
            machine.snapshots.extend(machine.orders.snapshot.clone());
            self.memory.snapshot = Some(self.now);
            self.poke_agent(index);
        }
    }

    /// The standby's manifests become of the release ordered; its API server runs while ordered to.
    fn obey_standby(&mut self, index: MachineId) {
        let machine = &mut self.machines[index];
        let Some((release, serve)) = machine.orders.standby else { return };
        let here = machine.has(release);
        let Some(standby) = &mut machine.standby else { return };
        if here {
            standby.release = release;
        }
        if serve && standby.release == release && standby.api == Process::None {
            self.place_standby_api(index);
        } else {
            self.remove_standby_api(index);
        }
    }

    /// Starts a standby's API server, where kubelet can.
    pub(crate) fn place_standby_api(&mut self, index: MachineId) {
        if !self.has_kubelet(index) {
            return;
        }
        let Some(standby) = self.machines[index].standby.as_mut().filter(|standby| standby.api == Process::None) else {
            return;
        };
        standby.api = Process::Starting;
        standby.api_release = standby.release;
        standby.life += 1;
        let life = standby.life;
        self.processes += 1;
        note!(self, "{} places its standby API server", self.machines[index].name);
        self.soon(4 * SECOND, 8 * SECOND, Event::StandbyApi(index, life));
    }

    pub(crate) fn standby_goes_on(&mut self, index: MachineId, life: u32) {
        let Some(standby) = self.machines[index].standby.as_mut().filter(|standby| standby.life == life) else {
            return;
        };
        if standby.api == Process::Starting {
            standby.api = Process::Ready;
            self.processes += 1;
            self.poke_agent(index);
        }
    }

    /// Removes a standby's API server once it isn't ordered and the machine's own answers.
    pub(crate) fn remove_standby_api(&mut self, index: MachineId) {
        let own = self.pods.values().any(|pod| {
            pod.machine == Some(index) && pod.is_of(Workload::ApiServer) && pod.process == Process::Ready && pod.ready
        });
        let machine = &mut self.machines[index];
        if !own || machine.orders.standby.is_some_and(|(_, serve)| serve) {
            return;
        }
        if let Some(standby) = machine.standby.as_mut().filter(|standby| standby.api != Process::None) {
            standby.api = Process::None;
            standby.life += 1;
            self.processes += 1;
            note!(self, "{} removes its standby API server", self.machines[index].name);
            self.poke_agent(index);
        }
    }

    /// What standbys do by themselves: an API server where none answers, controller-manager and scheduler where nobody leads.
    pub(crate) fn standbys(&mut self) {
        let now = self.now;
        let (answers, silent) = (self.answers(), self.silent_since);
        let ready = |world: &Self, workload| {
            world.pods.values().any(|pod| pod.is_of(workload) && pod.process == Process::Ready && !pod.leaving)
        };
        let led = ready(self, Workload::ControllerManager) && ready(self, Workload::Scheduler);
        let stale = now - self.manager.renewed.min(self.scheduler.renewed);
        for index in 0..self.machines.len() {
            let machine = &self.machines[index];
            let Some(standby) = machine.standby.filter(|_| machine.booted && machine.role == Role::ControlPlane) else {
                continue;
            };
            let turn = SECOND * 10 * u64::try_from(index).unwrap_or(0);
            let etcd = machine.etcd.is_some_and(|member| member.up);
            if standby.api == Process::None {
                if etcd && silent.is_some_and(|since| now - since >= 5 * SECOND + turn) {
                    self.place_standby_api(index);
                }
            } else {
                self.remove_standby_api(index);
            }
            let managers = match standby.managers {
                true => !led,
                false => answers && !led && stale >= 30 * SECOND + turn && self.has_kubelet(index),
            };
            if managers != standby.managers {
                note!(self, "{} standby controllers: {managers}", self.machines[index].name);
                self.processes += 1;
                if let Some(standby) = &mut self.machines[index].standby {
                    standby.managers = managers;
                }
            }
        }
    }
}
