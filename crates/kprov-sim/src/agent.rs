//! kprov-node: its orders, and what it does by itself.

use kprov_types::Role;
use kprov_types::api::MachineFailure;
use kprov_upgrade::model::Workload;

use crate::objects::{Fetch, MachineId, Process, ReleaseId, Trial};
use crate::script::{Defect, Millis, SECOND};
use crate::world::{Event, World, note, timestamp};

/// How long a new etcd may take to get healthy.
const ETCD_LIMIT: Millis = 60 * SECOND;

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
        let fetch = if self.is_bad_on(release, index) {
            Fetch::Bad
        } else {
            Fetch::Ready
        };
        self.machines[index].staged.insert(release, fetch);
        self.poke_agent(index);
    }

    fn obey_run(&mut self, index: MachineId) {
        let now = self.now;
        let machine = &mut self.machines[index];
        let Some((release, since, limit)) = machine.orders.run else {
            return;
        };
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
        note!(
            self,
            "{} tries {} at {now}",
            self.machines[index].name,
            self.releases[release].reference
        );
        self.start_kubelet(index);
    }

    pub(crate) fn trial_ends(&mut self, index: MachineId, life: u32) {
        if self.machines[index].kubelet_life == life && self.machines[index].trial.is_some() {
            self.go_back(index, "its kubelet did not report Ready in time");
        }
    }

    pub(crate) fn go_back(&mut self, index: MachineId, why: &str) {
        let Some(trial) = self.machines[index].trial.take() else {
            return;
        };
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
        let (Some(release), Some(member)) = (machine.orders.etcd, machine.etcd) else {
            return;
        };
        if machine.etcd_failed == Some(release) {
            // Not again, until it was told to be of another: that it failed is the answer to every order for it.
            let order = machine.orders.order;
            self.machines[index]
                .failure
                .iter_mut()
                .for_each(|failure| failure.order = order);
            return;
        }
        if member.release == release {
            self.machines[index].etcd_failed = None;
            return;
        }
        if !machine.has(release) || !member.up {
            return;
        }
        let same = self.releases[release].etcd == self.releases[member.release].etcd;
        let (before, bad) = (
            member.release,
            self.releases[release].defect == Some(Defect::EtcdNeverHealthy),
        );
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
            self.machines[index].etcd_failed = None;
            if bad {
                self.at(self.now + ETCD_LIMIT, Event::EtcdFails(index, life, before));
            } else if !same {
                self.soon(2 * SECOND, 4 * SECOND, Event::EtcdUp(index, life));
            }
        } else {
            self.machines[index].agent_queued = true;
            self.at(self.now + 2 * SECOND, Event::Agent(index));
        }
    }

    /// A new etcd isn't healthy in time: the one before it comes back.
    pub(crate) fn etcd_fails(&mut self, index: MachineId, life: u32, before: ReleaseId) {
        let now = timestamp(self.now);
        let machine = &mut self.machines[index];
        let Some(member) = machine
            .etcd
            .as_mut()
            .filter(|member| machine.life == life && !member.up)
        else {
            return;
        };
        machine.etcd_failed = Some(member.release);
        machine.failure = Some(MachineFailure {
            release: self.releases[member.release].reference.clone(),
            order: machine.orders.order,
            message: "etcd did not get healthy in time; its predecessor was put back".to_owned(),
            log: Vec::new(),
            time: now,
        });
        member.release = before;
        self.soon(2 * SECOND, 4 * SECOND, Event::EtcdUp(index, life));
    }

    pub(crate) fn etcd_up(&mut self, index: MachineId, life: u32) {
        if self.machines[index].life != life || !self.has_kubelet(index) {
            return;
        }
        // Power was lost while a new one was tried.
        let tried = self.machines[index]
            .etcd
            .filter(|member| self.releases[member.release].defect == Some(Defect::EtcdNeverHealthy));
        if tried.is_some() {
            let before = self.update.current;
            self.at(self.now + ETCD_LIMIT, Event::EtcdFails(index, life, before));
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
        let wanted = machine
            .orders
            .snapshot
            .as_ref()
            .is_some_and(|name| !machine.snapshots.contains(name));
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
        let Some((release, serve)) = machine.orders.standby else {
            return;
        };
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
        let Some(standby) = self.machines[index]
            .standby
            .as_mut()
            .filter(|standby| standby.api == Process::None)
        else {
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
        let Some(standby) = self.machines[index]
            .standby
            .as_mut()
            .filter(|standby| standby.life == life)
        else {
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
            world
                .pods
                .values()
                .any(|pod| pod.is_of(workload) && pod.process == Process::Ready && !pod.leaving)
        };
        let led = ready(self, Workload::ControllerManager) && ready(self, Workload::Scheduler);
        let stale = now - self.manager.renewed.min(self.scheduler.renewed);
        for index in 0..self.machines.len() {
            let machine = &self.machines[index];
            let Some(standby) = machine
                .standby
                .filter(|_| machine.booted && machine.role == Role::ControlPlane)
            else {
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
            let begins = answers && stale >= 30 * SECOND + turn && self.has_kubelet(index);
            let managers = !led && (standby.managers || begins);
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
