//! The simulated world: what the API has stored, what really runs, and the queue of what happens next.
//!
//! Two truths live side by side, as in any cluster: what runs on machines (processes, kubelets, etcd members), and what the
//! API tells of it, which is always a little late.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet, HashMap};

use jiff::Timestamp;
use kprov_types::api::ReleaseRef;
use kprov_types::{Digest, KubernetesVersion, MachineName, Role};
use kprov_upgrade::model::{KnownRelease, Part, Workload};

use crate::api::{Calls, MOMENT};
use crate::invariants::{Memory, Violation};
use crate::objects::{
    App, Fetch, Kubelet, Leader, Lease, Machine, MachineId, Member, Node, Object, Operator, Orders, Owner, Pod, PodId,
    Process, Release, ReleaseId, Standby, Template, Told, Update,
};
use crate::rng::Rng;
use crate::script::{Defect, Fault, MINUTE, Millis, SECOND, Script};

/// When simulated time begins: 2026-01-01T00:00:00Z, in seconds.
const EPOCH: i64 = 1_767_225_600;

/// A moment as the API writes it.
pub(crate) fn timestamp(at: Millis) -> Timestamp {
    let at = i64::try_from(at).unwrap_or(i64::MAX / 2);
    Timestamp::from_millisecond(EPOCH * 1000 + at).unwrap_or(Timestamp::UNIX_EPOCH)
}

/// Whole seconds, as `creationTimestamp` and conditions have them.
pub(crate) fn timestamp_in_seconds(at: Millis) -> Timestamp {
    timestamp(at / SECOND * SECOND)
}

/// Something that happens at its time. Events that speak of a machine's or process's past life carry its count, and are
/// ignored once that has changed.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Event {
    /// A call reaches the API.
    Arrive(u64),
    /// Its reply reaches the caller.
    Reply(u64),
    /// Leases, node monitor, standbys.
    Tick,
    /// Controller-manager and scheduler look at the API.
    Control,
    /// A kubelet looks at its pods.
    Kubelet(MachineId),
    /// A machine's kprov-node looks at its orders.
    Agent(MachineId),
    /// A pod's process goes on.
    Pod(PodId, u32),
    /// kprov-node starts on a machine.
    Boot(MachineId, u32),
    /// A kubelet has started.
    KubeletUp(MachineId, u32),
    /// A kubelet wants to say that its Node is Ready.
    NodeReady(MachineId, u32),
    /// A machine's trial of a release is at its end.
    TrialEnds(MachineId, u32),
    /// A machine has fetched a release.
    Fetched(MachineId, u32, ReleaseId),
    /// A new etcd did not get healthy in time; the release before it.
    EtcdFails(MachineId, u32, ReleaseId),
    /// An etcd member has started.
    EtcdUp(MachineId, u32),
    /// A snapshot is written.
    SnapshotTaken(MachineId, u32),
    /// A standby's API server goes on.
    StandbyApi(MachineId, u32),
    /// A fault's time has come, or it ends: its index in the script.
    Fault(usize),
    /// It ends.
    FaultEnds(usize),
    /// People look at how it stands.
    Person,
}

/// Everything.
#[expect(clippy::struct_excessive_bools, reason = "each is one independent fact")]
pub(crate) struct World {
    pub(crate) now: Millis,
    pub(crate) rng: Rng,
    even: bool,
    queue: BTreeMap<(Millis, u64), Event>,
    queued: u64,
    pub(crate) releases: Vec<Release>,
    pub(crate) update: Update,
    pub(crate) objects: BTreeMap<Workload, Object>,
    pub(crate) apps: Vec<App>,
    /// How long apps' pods take to end.
    pub(crate) grace: Millis,
    /// PodDisruptionBudgets let nothing go while this is not 0.
    pub(crate) blocks: u32,
    pub(crate) pods: BTreeMap<PodId, Pod>,
    next_pod: PodId,
    pub(crate) next_template: u32,
    pub(crate) machines: Vec<Machine>,
    pub(crate) control_plane: usize,
    pub(crate) manager: Lease<Leader>,
    pub(crate) scheduler: Lease<Leader>,
    /// The operators' Lease.
    pub(crate) lease: Lease<Operator>,
    /// Until when each operator believes to hold the Lease.
    pub(crate) leading_until: HashMap<Operator, Millis>,
    /// Operators that stand still, until when.
    pub(crate) stalled: HashMap<Operator, Millis>,
    /// Since when no API server answers.
    pub(crate) silent_since: Option<Millis>,
    pub(crate) control_queued: bool,
    pub(crate) control_missed: bool,
    pub(crate) calls: Calls,
    /// Operators that wait for a change.
    pub(crate) watching: Vec<u64>,
    /// Counts what became of processes: pods', kubelets', standbys', etcd members'.
    pub(crate) processes: u64,
    /// Whether a request is answered, as of which count of processes.
    answered: Cell<Option<(u64, bool)>>,
    /// Counts changes of what the API has stored.
    pub(crate) version: u64,
    pub(crate) faults: Vec<Fault>,
    pub(crate) quiet: Millis,
    pub(crate) done: bool,
    pub(crate) memory: Memory,
    pub(crate) violation: Option<Violation>,
    pub(crate) trace: Option<Vec<(Millis, String)>>,
}

/// Writes a line into the trace, where there is one.
macro_rules! note {
    ($world:expr, $($argument:tt)+) => {
        if $world.trace.is_some() {
            let line = format!($($argument)+);
            $world.trace(line);
        }
    };
}
pub(crate) use note;

impl World {
    /// The world at the start of a script: a cluster that runs its first release well.
    pub(crate) fn new(script: &Script) -> Self {
        let releases: Vec<Release> = (0..script.releases.len()).map(|index| release(script, index)).collect();
        let shape = &script.cluster;
        let (leader, nobody) = (
            Lease {
                holder: None,
                renewed: 0,
            },
            Lease {
                holder: None,
                renewed: 0,
            },
        );
        let mut world = Self {
            now: 0,
            rng: Rng::new(script.seed),
            even: shape.even,
            queue: BTreeMap::new(),
            queued: 0,
            update: Update {
                desired: releases[script.wanted].reference.to_string(),
                desired_since: 0,
                paused: false,
                paused_since: 0,
                policy: shape.policy.clone(),
                attempt: 0,
                current: 0,
                hop: None,
                failure: None,
                told: None,
                settings: 0,
            },
            releases,
            objects: BTreeMap::new(),
            apps: (0..shape.apps).map(|_| App { replicas: 3 }).collect(),
            grace: shape.grace,
            blocks: 0,
            pods: BTreeMap::new(),
            next_pod: 0,
            next_template: 0,
            machines: Vec::new(),
            control_plane: shape.control_plane,
            manager: leader,
            scheduler: leader,
            lease: nobody,
            leading_until: HashMap::new(),
            stalled: HashMap::new(),
            silent_since: None,
            control_queued: false,
            control_missed: false,
            calls: Calls::default(),
            watching: Vec::new(),
            processes: 0,
            answered: Cell::new(None),
            version: 0,
            faults: script.faults.clone(),
            quiet: script.quiet(),
            done: false,
            memory: Memory::new(script.wanted),
            violation: None,
            trace: None,
        };
        for index in 0..shape.control_plane + shape.workers {
            let role = if index < shape.control_plane {
                Role::ControlPlane
            } else {
                Role::Worker
            };
            let pool = if role == Role::Worker {
                index % shape.pools.max(1)
            } else {
                0
            };
            world.add_machine(role, pool);
        }
        world.populate();
        for (index, fault) in script.faults.iter().enumerate() {
            if let Fault::At { ms, .. } = fault {
                world.at(*ms, Event::Fault(index));
                if let Some(over) = fault.over().filter(|over| over > ms) {
                    world.at(over, Event::FaultEnds(index));
                }
            }
        }
        world.at(0, Event::Tick);
        world.at(world.quiet + MINUTE, Event::Person);
        world
    }

    /// Everything runs from the start: the workloads' pods, ready on their machines.
    fn populate(&mut self) {
        let surge = surges(self.releases[0].minor);
        for workload in Workload::ALL {
            let template = self.new_template(0, if has_revisions(workload) { 2 } else { 0 });
            let object = Object {
                template,
                history: vec![template],
                rolled: None,
                generation: 1,
                observed: 1,
                automatic: workload != Workload::ApiServer || surge,
            };
            self.objects.insert(workload, object);
            let machines = match workload {
                Workload::Proxy => self.machines.len(),
                _ => self.control_plane,
            };
            let count = self.replicas(workload).unwrap_or(machines);
            for index in 0..count {
                self.add_running_pod(
                    Owner::Workload(workload),
                    template,
                    index % machines,
                    self.replicas(workload).is_none(),
                );
            }
        }
        let workers = self.machines.len() - self.control_plane;
        let none = Template {
            id: 0,
            release: 0,
            revision: 0,
        };
        for app in 0..self.apps.len() {
            for index in 0..self.apps[app].replicas {
                let machine = if workers == 0 {
                    index % self.control_plane
                } else {
                    self.control_plane + (app * 3 + index) % workers
                };
                self.add_running_pod(Owner::App(app), none, machine, false);
            }
        }
    }

    fn add_running_pod(&mut self, owner: Owner, template: Template, machine: MachineId, bound: bool) {
        let id = self.add_pod(owner, template, bound.then_some(machine));
        if let Some(pod) = self.pods.get_mut(&id) {
            pod.machine = Some(machine);
            pod.process = Process::Ready;
            pod.ready = true;
        }
    }

    /// A pod object, without a machine yet.
    pub(crate) fn add_pod(&mut self, owner: Owner, template: Template, target: Option<MachineId>) -> PodId {
        self.next_pod += 1;
        let pod = Pod {
            owner,
            template,
            target,
            created: self.now,
            process: Process::None,
            life: 0,
            restarts: 0,
            machine: None,
            ready: false,
            ready_since: self.now,
            leaving: false,
            trouble: None,
        };
        self.pods.insert(self.next_pod, pod);
        self.next_pod
    }

    /// A machine that runs the release of the settings.
    pub(crate) fn add_machine(&mut self, role: Role, pool: usize) -> MachineId {
        let index = self.machines.len();
        let release = self.update.settings;
        let control_plane = role == Role::ControlPlane;
        let name = MachineName::new(format!("{}{index}", if control_plane { "cp" } else { "w" }));
        let mut machine = Machine {
            // The format above is a label whatever the number.
            name: name.unwrap_or_else(|error| unreachable!("{error}")),
            role,
            pool,
            up: true,
            booted: true,
            life: 0,
            current: release,
            trial: None,
            kubelet: Kubelet::Ready,
            kubelet_life: 0,
            orders: Orders::default(),
            staged: BTreeMap::from([(release, Fetch::Ready)]),
            failure: None,
            etcd: control_plane.then_some(Member {
                release,
                up: true,
                by_us: false,
            }),
            etcd_failed: None,
            standby: control_plane.then_some(Standby {
                release,
                api: Process::None,
                api_release: release,
                managers: false,
                life: 0,
            }),
            snapshots: BTreeSet::new(),
            snapshotting: false,
            spec: Orders::default(),
            status: Told::default(),
            node: Some(Node {
                ready: true,
                ready_since: self.now,
                heartbeat: self.now,
                kubelet: release,
                cordoned: false,
                cordoned_by_us: None,
                cordoned_by_person: false,
            }),
            kubelet_queued: false,
            agent_queued: false,
        };
        machine.status = machine.tells(true);
        self.machines.push(machine);
        index
    }

    pub(crate) fn new_template(&mut self, release: ReleaseId, revision: u16) -> Template {
        self.next_template += 1;
        Template {
            id: self.next_template,
            release,
            revision,
        }
    }

    /// How many pods a Deployment has; `None` of a DaemonSet.
    pub(crate) fn replicas(&self, workload: Workload) -> Option<usize> {
        match workload {
            Workload::ApiServer | Workload::Proxy => None,
            Workload::ControllerManager | Workload::Scheduler => Some(self.control_plane),
            Workload::Dns | Workload::Operator => Some(2),
        }
    }

    /// Puts an event into the queue, for a time that isn't past.
    pub(crate) fn at(&mut self, at: Millis, event: Event) {
        self.queued += 1;
        self.queue.insert((at.max(self.now), self.queued), event);
    }

    /// Puts an event into the queue, some time from now.
    pub(crate) fn soon(&mut self, low: Millis, high: Millis, event: Event) {
        let after = self.span(low, high);
        self.at(self.now + after, event);
    }

    /// A span of time between two bounds.
    pub(crate) fn span(&mut self, low: Millis, high: Millis) -> Millis {
        if self.even {
            u64::midpoint(low, high)
        } else {
            self.rng.between(low, high)
        }
    }

    /// Goes to the next event, and takes it.
    pub(crate) fn next_event(&mut self) -> Option<Event> {
        let ((at, _), event) = self.queue.pop_first()?;
        self.now = at;
        Some(event)
    }

    /// Does what an event says.
    pub(crate) fn handle(&mut self, event: Event) {
        match event {
            Event::Arrive(call) => self.arrive(call),
            Event::Reply(call) => self.calls.reply(call),
            Event::Tick => self.tick(),
            Event::Control => self.control(),
            Event::Kubelet(machine) => self.kubelet(machine),
            Event::Agent(machine) => self.agent(machine),
            Event::Pod(pod, life) => self.go_on(pod, life),
            Event::Boot(machine, life) => self.boot(machine, life),
            Event::KubeletUp(machine, life) => self.kubelet_up(machine, life),
            Event::NodeReady(machine, life) => self.node_ready(machine, life),
            Event::TrialEnds(machine, life) => self.trial_ends(machine, life),
            Event::Fetched(machine, life, release) => self.fetched(machine, life, release),
            Event::EtcdUp(machine, life) => self.etcd_up(machine, life),
            Event::EtcdFails(machine, life, before) => self.etcd_fails(machine, life, before),
            Event::SnapshotTaken(machine, life) => self.snapshot_taken(machine, life),
            Event::StandbyApi(machine, life) => self.standby_goes_on(machine, life),
            Event::Fault(index) => self.fault(index),
            Event::FaultEnds(index) => self.fault_ends(index),
            Event::Person => self.person(),
        }
    }

    pub(crate) fn trace(&mut self, line: String) {
        let now = self.now;
        if let Some(trace) = &mut self.trace {
            trace.push((now, line));
        }
    }

    /// Notes that what the API has stored has changed: controllers and operators that watch will look.
    pub(crate) fn touch(&mut self) {
        self.version += 1;
        for call in std::mem::take(&mut self.watching) {
            self.at(self.now + MOMENT, Event::Reply(call));
        }
        if !self.control_queued {
            self.control_queued = true;
            self.soon(50, 250, Event::Control);
        }
    }

    /// API servers that answer: where, and of which release.
    pub(crate) fn api_servers(&self) -> impl Iterator<Item = (MachineId, ReleaseId)> {
        let pods = self
            .pods
            .values()
            .filter(|pod| pod.is_of(Workload::ApiServer) && pod.process == Process::Ready)
            .filter_map(|pod| Some((pod.machine?, pod.template.release)));
        let standbys = self.machines.iter().enumerate().filter_map(|(index, machine)| {
            let standby = machine.standby.filter(|standby| standby.api == Process::Ready)?;
            Some((index, standby.api_release))
        });
        pods.chain(standbys)
    }

    /// Most etcd members are up.
    pub(crate) fn has_quorum(&self) -> bool {
        let members = self.machines.iter().filter_map(|machine| machine.etcd);
        let (up, all) = members.fold((0, 0), |(up, all), member| (up + usize::from(member.up), all + 1));
        up * 2 > all
    }

    /// A request is answered.
    pub(crate) fn answers(&self) -> bool {
        if let Some((_, answers)) = self.answered.get().filter(|(of, _)| *of == self.processes) {
            return answers;
        }
        let answers = self.has_quorum() && self.api_servers().next().is_some();
        self.answered.set(Some((self.processes, answers)));
        answers
    }

    /// The release with a reference.
    pub(crate) fn release(&self, reference: &ReleaseRef) -> Option<ReleaseId> {
        self.releases.iter().position(|release| release.reference == *reference)
    }

    /// The machine with a name.
    pub(crate) fn machine(&self, name: &MachineName) -> Option<MachineId> {
        self.machines.iter().position(|machine| machine.name == *name)
    }

    /// Whether a release's defect shows on a machine.
    pub(crate) fn is_bad_on(&self, release: ReleaseId, machine: MachineId) -> bool {
        matches!(self.releases[release].defect, Some(Defect::BadDigest(which)) if which.is_none_or(|which| which == machine))
    }
}

/// Whether a workload has revisions with an address each.
pub(crate) const fn has_revisions(workload: Workload) -> bool {
    matches!(
        workload,
        Workload::ApiServer | Workload::ControllerManager | Workload::Scheduler
    )
}

/// Whether DaemonSets can start the new pod beside the old one: `maxSurge`, on by default since 1.22 (KEP-1591).
pub(crate) const fn surges(minor: u64) -> bool {
    minor >= 22
}

fn release(script: &Script, index: ReleaseId) -> Release {
    let shape = &script.releases[index];
    let version: KubernetesVersion = shape.version.parse().unwrap_or_else(|error| unreachable!("{error}"));
    let mut bytes = [0; 32];
    bytes[0] = u8::try_from(index).unwrap_or(u8::MAX);
    let reference = ReleaseRef {
        digest: Digest::from_bytes(bytes),
        version: version.clone(),
    };
    let etcd = match shape.defect {
        // What is bad about it is in the image.
        Some(Defect::EtcdNeverHealthy) => shape.etcd + 100,
        _ => shape.etcd,
    };
    let images = Workload::ALL
        .into_iter()
        .map(|workload| {
            let tag = match workload {
                Workload::Dns | Workload::Operator => match shape.defect {
                    // What is bad about it is in the image.
                    Some(Defect::DnsNeverReady | Defect::OperatorCrashes) => format!("bad-{version}"),
                    _ => format!("a{}", shape.addons),
                },
                _ => version.to_string(),
            };
            (Part::Workload(workload), format!("{}:{tag}", workload.as_str()))
        })
        .chain([(Part::Etcd, etcd_image(etcd))])
        .collect();
    Release {
        minor: version.minor().minor,
        etcd,
        defect: shape.defect,
        fixed_by: shape.fixed_by,
        // What repairs another release comes later.
        known: !script.releases.iter().any(|other| other.fixed_by == Some(index)),
        seen: KnownRelease {
            release: reference.clone(),
            verified: match shape.defect {
                Some(Defect::Unverified) => Err("the signature is not one of the cluster's keys".to_owned()),
                _ => Ok(()),
            },
            minimum_from: None,
            images,
        },
        reference,
    }
}

/// The pinned image of an etcd.
pub(crate) fn etcd_image(etcd: u32) -> String {
    format!("etcd:{etcd}")
}
