//! What must always hold, judged by what really runs rather than by what the API tells; and by every change an operator makes.

use std::ops::Range;

use kprov_types::Role;
use kprov_types::api::{Failure, ReleaseRef};
use kprov_upgrade::check::{self, check_state};
use kprov_upgrade::model::{Action, Workload};

use crate::objects::{Kubelet, MachineId, Operator, Owner, Process, ReleaseId};
use crate::script::{Defect, MINUTE, Millis, SECOND};
use crate::world::{World, has_revisions, timestamp};

/// Something that must always hold, and did not.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{kind}: {message} (after {} s)", .at / 1000)]
pub struct Violation {
    /// Which of the invariants, in a word.
    pub kind: &'static str,
    /// What happened.
    pub message: String,
    /// When.
    pub at: Millis,
}

/// What judging needs to know of the past.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    /// Whether an API server ran on each machine, in which of the machine's lives.
    api: Vec<(u32, bool)>,
    /// When something last happened to a machine's API servers that no operator can help.
    excused: Vec<Millis>,
    /// When a fault last touched the cluster.
    pub(crate) fault: Option<Millis>,
    /// When an etcd snapshot was last taken.
    pub(crate) snapshot: Option<Millis>,
    /// Which state of the processes was judged last.
    judged: Option<u64>,
    /// Which state of the API's store was judged last.
    looked: u64,
    /// What people want in the end.
    pub(crate) goal: ReleaseId,
    /// When each machine that we took out of service was, and when it was back.
    pub(crate) outages: Vec<(Millis, Millis)>,
}

impl Memory {
    pub(crate) fn new(goal: ReleaseId) -> Self {
        Self {
            goal,
            ..Self::default()
        }
    }
}

/// For how long the consequences of a fault are not an operator's.
const EXCUSED: Millis = 5 * MINUTE;
/// For how long after a fault what it has done may be taken for a release's fault.
const BLAMED: Millis = 6 * MINUTE;
/// How late an operator may be in seeing what it has changed itself.
const LOOK: Millis = 5 * SECOND;
/// How late the API may be in telling that a machine is gone.
const LATE: Millis = MINUTE;

impl World {
    /// Notes the first violation.
    pub(crate) fn violate(&mut self, kind: &'static str, message: impl FnOnce(&Self) -> String) {
        if self.violation.is_none() {
            self.violation = Some(Violation {
                kind,
                message: message(self),
                at: self.now,
            });
        }
    }

    /// Notes that something happened to a machine that no operator can help.
    pub(crate) fn excuse(&mut self, machine: MachineId) {
        self.memory.fault = Some(self.now);
        if self.memory.excused.len() <= machine {
            self.memory.excused.resize(machine + 1, 0);
        }
        self.memory.excused[machine] = self.now + EXCUSED;
    }

    fn is_excused(&self, machine: MachineId) -> bool {
        self.memory.excused.get(machine).is_some_and(|until| *until > self.now)
    }

    /// A fault touched the cluster not long ago.
    fn is_recent(&self, span: Millis) -> bool {
        self.memory.fault.is_some_and(|fault| self.now < fault + span)
    }

    /// Judges what runs. Called after every event.
    pub(crate) fn judge(&mut self) {
        if self.memory.judged != Some(self.processes) {
            self.memory.judged = Some(self.processes);
            self.judge_skew();
            self.judge_api_servers();
        }
        if self.memory.looked != self.version {
            self.memory.looked = self.version;
            self.judge_picture();
        }
    }

    /// The planner's own checker on what can be seen.
    fn judge_picture(&mut self) {
        if self.machines.len() > 50 {
            return; // A fleet is about time; everything else is shown by small clusters.
        }
        if self.is_recent(EXCUSED) {
            return; // A cold start brings up what the disk has.
        }
        let broken = check_state(&self.picture().observed);
        // Whether API servers and etcd members run is judged by whether they run, not by whether a Node is Ready.
        let told = |broken: &check::Violation| {
            !matches!(
                broken,
                check::Violation::NoApiServer | check::Violation::NoQuorum { .. }
            )
        };
        if let Some(broken) = broken.into_iter().find(told) {
            self.violate("state", |_| broken.to_string());
        }
    }

    /// Version skew, as Kubernetes' policy has it (<https://kubernetes.io/releases/version-skew-policy/>).
    fn judge_skew(&mut self) {
        let minors = self.api_servers().map(|(_, release)| self.releases[release].minor);
        let Some((oldest, newest)) = minors.fold(None, |range: Option<(u64, u64)>, minor| {
            Some(range.map_or((minor, minor), |(low, high)| (low.min(minor), high.max(minor))))
        }) else {
            return;
        };
        if newest > oldest + 1 {
            self.violate("skew", |_| format!("API servers of 1.{oldest} and 1.{newest}"));
        }
        // Kubelets may be three minors older since 1.28, two before.
        let reach = if newest >= 28 { 3 } else { 2 };
        for index in 0..self.machines.len() {
            let machine = &self.machines[index];
            if !matches!(machine.kubelet, Kubelet::Running | Kubelet::Ready) || self.is_silent(index) {
                continue;
            }
            let minor = self.releases[machine.current].minor;
            if minor > oldest || minor + reach < newest {
                self.violate("skew", |world| {
                    let name = &world.machines[index].name;
                    format!("the kubelet of {name} is of 1.{minor} beside API servers of 1.{oldest} to 1.{newest}")
                });
            }
        }
        if self.is_recent(EXCUSED) {
            return; // A standby of the last good control plane may run beside what is newer, or older.
        }
        let newer = self.pods.values().find_map(|pod| {
            let minor = self.releases[pod.template.release].minor;
            let runs = matches!(pod.process, Process::Up | Process::Ready);
            let manager = pod.is_of(Workload::ControllerManager) || pod.is_of(Workload::Scheduler);
            let concerned = manager || pod.is_of(Workload::Proxy);
            let wrong = minor > oldest || (manager && minor + 1 < newest);
            (runs && concerned && wrong).then_some((pod.owner, minor))
        });
        if let Some((owner, minor)) = newer {
            self.violate("skew", |_| {
                format!("{owner:?} of 1.{minor} beside API servers of 1.{oldest} to 1.{newest}")
            });
        }
    }

    /// On every machine that has one, an API server answers at all times, unless the machine lost power or a person deleted
    /// it.
    fn judge_api_servers(&mut self) {
        let mut answers = [false; 8];
        for (machine, _) in self.api_servers() {
            answers[machine.min(7)] = true;
        }
        self.memory.api.resize(self.control_plane, (0, false));
        for (index, now) in answers.into_iter().enumerate().take(self.control_plane) {
            let life = self.machines[index].life;
            let before = std::mem::replace(&mut self.memory.api[index], (life, now));
            if before == (life, true) && !now && !self.is_excused(index) {
                self.violate("api", |world| {
                    format!("no API server is left on {}", world.machines[index].name)
                });
            }
        }
    }

    /// Only the operator that holds the Lease changes anything.
    pub(crate) fn judge_writer(&mut self, writer: Operator) {
        if self.lease.holder != Some(writer) {
            self.violate("lease", |world| {
                format!("{writer:?} wrote while {:?} leads", world.lease.holder)
            });
        }
    }

    /// Judges a change that was just made, by what was asked for when the operator looked.
    pub(crate) fn judge_action(&mut self, action: &Action, asked_at: Millis) {
        self.judge_pause(action, asked_at);
        match action {
            Action::Begin { release } => self.judge_release(release, 0..0),
            Action::Roll { workload, to, .. } => {
                self.judge_release(to, 0..self.control_plane);
                self.judge_snapshot(*workload, to);
            }
            Action::Standby { machine, release, .. } => {
                if let Some(machine) = self.machine(machine) {
                    self.judge_release(release, machine..machine + 1);
                }
            }
            Action::Etcd { machine, to } => {
                if let Some(machine) = self.machine(machine) {
                    self.judge_release(to, machine..machine + 1);
                    self.judge_etcd(machine);
                }
            }
            Action::Cordon { machine } => {
                if let Some(machine) = self.machine(machine) {
                    self.judge_budget(machine);
                }
            }
            Action::Run { machine, to, .. } => {
                if let Some(machine) = self.machine(machine) {
                    self.judge_release(to, machine..machine + 1);
                    // One that is told to stay with what it runs changes nothing.
                    if self.machines[machine].status.running != self.release(to) {
                        self.judge_run(machine);
                        self.judge_budget(machine);
                    }
                }
            }
            Action::Uncordon { machine } => {
                if let Some(machine) = self.machine(machine) {
                    self.judge_uncordon(machine);
                }
            }
            Action::Fail { failure } => self.judge_failure(failure),
            _ => {}
        }
    }

    /// Pause means pause: nothing begins that was decided on after somebody paused.
    fn judge_pause(&mut self, action: &Action, asked_at: Millis) {
        let begins = matches!(
            action,
            Action::Begin { .. }
                | Action::Stage { .. }
                | Action::Snapshot { .. }
                | Action::Roll { .. }
                | Action::Etcd { .. }
                | Action::Cordon { .. }
        );
        if begins && self.update.paused && asked_at > self.update.paused_since {
            self.violate("pause", |_| format!("begun while paused: {action:?}"));
        }
    }

    /// Nothing unverified runs, nor anything whose bytes aren't good on the machines where it would run.
    fn judge_release(&mut self, release: &ReleaseRef, mut machines: Range<MachineId>) {
        let Some(release) = self.release(release) else { return };
        let unverified = self.releases[release].defect == Some(Defect::Unverified);
        if unverified || machines.any(|machine| self.is_bad_on(release, machine)) {
            self.violate("unverified", |world| {
                format!("{} is to run", world.releases[release].reference)
            });
        }
    }

    /// A release is not condemned for nothing.
    fn judge_failure(&mut self, failure: &Failure) {
        let good = self
            .release(&failure.release)
            .is_some_and(|release| self.releases[release].defect.is_none());
        if good && !self.is_recent(BLAMED) {
            self.violate("failure", |_| {
                format!("a good release is condemned: {}", failure.message)
            });
        }
    }

    /// Before a new API server there is a snapshot of this hop.
    fn judge_snapshot(&mut self, workload: Workload, to: &ReleaseRef) {
        let taken = self.memory.snapshot;
        let begun = self.update.hop.map(|(_, since)| since);
        if workload == Workload::ApiServer && begun.is_none_or(|begun| taken.is_none_or(|taken| taken < begun)) {
            self.violate("snapshot", |_| {
                format!("kube-apiserver rolls to {to} without a snapshot")
            });
        }
    }

    /// One member at a time, and none while another isn't healthy, as far as could be known.
    fn judge_etcd(&mut self, machine: MachineId) {
        let other = self.machines.iter().enumerate().find_map(|(index, other)| {
            let member = other.etcd.filter(|_| index != machine)?;
            let known = !self.is_recent(LATE) && !member.up && other.life > 0 && !member.by_us;
            let under_way = member.by_us
                || other.spec.etcd.is_some_and(|wanted| {
                    self.releases[wanted].etcd != self.releases[member.release].etcd && other.has(wanted)
                });
            (known || under_way).then(|| other.name.clone())
        });
        if let Some(other) = other {
            self.violate("etcd", |_| {
                format!("a member is to change while {other}'s does, or is away")
            });
        }
    }

    /// A machine is out of service by us: cordoned, or about to change its programs.
    fn is_out(&self, index: MachineId) -> bool {
        let machine = &self.machines[index];
        machine.cordoned_by_us().is_some() || machine.trial.is_some()
    }

    /// Never more machines of a pool are out of service than may be; of control-plane machines, never more than one.
    fn judge_budget(&mut self, machine: MachineId) {
        let (role, pool) = (self.machines[machine].role, self.machines[machine].pool_name());
        let members: Vec<MachineId> = (0..self.machines.len())
            .filter(|index| self.machines[*index].role == role && self.machines[*index].pool_name() == pool)
            .collect();
        let limit = match role {
            Role::ControlPlane => 1,
            Role::Worker => self.update.policy.max_unavailable.of(members.len()),
        };
        let out = members.iter().filter(|index| self.is_out(**index)).count();
        if out > limit {
            self.violate("budget", |_| {
                format!("{out} machines of pool {pool} are out of service, {limit} may be")
            });
        }
        // Others that have been away for so long that everybody knows count too.
        let gone = |index: &MachineId| {
            let node = self.machines[*index].node.as_ref();
            !self.is_out(*index) && node.is_some_and(|node| !node.ready && self.now > node.ready_since + LATE)
        };
        let away = members.iter().filter(|index| **index != machine && gone(index)).count();
        let begins = self.machines[machine]
            .node
            .as_ref()
            .and_then(|node| node.cordoned_by_us)
            == Some(self.now);
        if begins && out + away > limit {
            self.violate("budget", |_| {
                format!("a machine of pool {pool} is taken out while {away} are away")
            });
        }
    }

    /// A machine's programs change once it takes no new pods and those that have to leave have left.
    fn judge_run(&mut self, index: MachineId) {
        let Some(node) = &self.machines[index].node else { return };
        // Somebody may have uncordoned it a moment ago, or another, so that there is a place for its pods now.
        let opened = self
            .memory
            .outages
            .last()
            .is_some_and(|(_, until)| self.now < until + LOOK);
        if opened || self.is_recent(LATE) {
            return;
        }
        // Pods on a machine that a person has cordoned are that person's.
        let (cordoned, ours) = (node.cordoned, node.cordoned_by_us.is_some());
        // What runs on one that can't be reached can't be moved.
        if !cordoned && node.ready {
            self.violate("drain", |world| {
                format!("{} is to change and takes pods", world.machines[index].name)
            });
        }
        let stays = |id: &u32| matches!(self.pods[id].owner, Owner::App(_));
        if ours && !self.update.policy.drain_force && self.to_leave(index).iter().any(stays) {
            self.violate("drain", |world| {
                format!("{} is to change with pods on it", world.machines[index].name)
            });
        }
    }

    /// A machine that was told to change its programs, and has not yet, gets no pods.
    fn judge_uncordon(&mut self, index: MachineId) {
        let machine = &self.machines[index];
        let told = machine.spec.run.filter(|(_, since, _)| {
            let failure = machine.status.failure.as_ref();
            failure.is_none_or(|failure| failure.time < timestamp(*since))
        });
        if told.is_some_and(|(release, ..)| machine.status.running != Some(release)) {
            self.violate("drain", |world| {
                format!("{} takes pods while it changes", world.machines[index].name)
            });
        }
    }

    /// What is different from a cluster that runs a release and nothing else; `None`: nothing is. Of a hop that went back,
    /// machines may still lag behind as skew lets them.
    pub(crate) fn differs_from(&self, release: ReleaseId, lagging: bool) -> Option<String> {
        for (workload, object) in &self.objects {
            let wanted = &self.releases[release].seen.images;
            let same = |other: ReleaseId| {
                let part = kprov_upgrade::model::Part::Workload(*workload);
                other == release
                    || (!has_revisions(*workload) && wanted.get(&part) == self.releases[other].seen.images.get(&part))
            };
            let late = |other: ReleaseId| {
                lagging && self.releases[other].reference.version < self.releases[release].reference.version
            };
            let of = |other: ReleaseId| same(other) || (late(other) && *workload != Workload::ApiServer);
            if !of(object.template.release) {
                return Some(format!(
                    "{} is of {}",
                    workload.as_str(),
                    self.releases[object.template.release].reference
                ));
            }
            for (id, pod) in self.pods.iter().filter(|(_, pod)| pod.is_of(*workload)) {
                // Operators are killed whenever the script wants.
                let runs = *workload == Workload::Operator || (pod.process == Process::Ready && pod.ready);
                if !runs || pod.leaving || pod.template.id != object.template.id {
                    return Some(format!(
                        "pod {id} ({}) is {:?}, leaving: {}",
                        self.describe(*id),
                        pod.process,
                        pod.leaving
                    ));
                }
            }
        }
        // All members may have stayed with the etcd of a hop that went back: their data may be of its version.
        let etcd = self
            .machines
            .iter()
            .find_map(|machine| machine.etcd)
            .map_or(0, |member| self.releases[member.release].etcd);
        self.machines.iter().enumerate().find_map(|(index, machine)| {
            let name = &machine.name;
            let late =
                lagging && self.releases[machine.current].reference.version < self.releases[release].reference.version;
            let node = machine.node.as_ref()?;
            if !(machine.current == release || late) || machine.trial.is_some() {
                Some(format!("{name} runs {}", self.releases[machine.current].reference))
            } else if machine.kubelet != Kubelet::Ready || !node.ready || self.is_silent(index) {
                Some(format!("{name} is not Ready"))
            } else if node.cordoned != node.cordoned_by_person {
                Some(format!("{name} is cordoned: {}", node.cordoned))
            } else if machine.standby.is_some_and(|standby| {
                standby.api != Process::None || standby.managers || !(standby.release == release || lagging)
            }) {
                Some(format!("the standby of {name} is {:?}", machine.standby))
            } else if machine
                .etcd
                .is_some_and(|member| !member.up || !(lagging || self.releases[member.release].etcd == etcd))
            {
                Some(format!("the etcd member of {name} is {:?}", machine.etcd))
            } else {
                None
            }
        })
    }

    /// How it stands, for whoever reads of a cluster that does not get there.
    pub(crate) fn standing(&self) -> String {
        let update = &self.update;
        let differs = self.differs_from(self.memory.goal, false);
        format!(
            "desired {}, current {}, told {:?}, failure {:?}; {}; {:?}",
            update.desired,
            self.releases[update.current].reference,
            update.told,
            update.failure.as_ref().map(|failure| (
                &failure.component,
                &failure.instance,
                &failure.message,
                failure.reverted
            )),
            differs.unwrap_or_else(|| "as wanted".to_owned()),
            timestamp(self.now),
        )
    }
}
