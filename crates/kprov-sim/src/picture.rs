//! What can be seen of the world through the API, as the planner wants it.

use std::collections::BTreeMap;

use jiff::Timestamp;
use kprov_types::api::{Failure, ReleaseRef};
use kprov_types::{Digest, MachineName, Role};
use kprov_upgrade::model::{
    Drain, EtcdSeen, Input, Instance, KnownRelease, MachineSeen, Observed, Part, Staged, StandbySeen, Wanted, Workload,
    WorkloadSeen,
};

use crate::objects::{Fetch, Machine, MachineId, Object, Orders, Owner, Pod, ReleaseId};
use crate::script::{Millis, SECOND};
use crate::world::{World, etcd_image, timestamp, timestamp_in_seconds};

/// What the VersionUpdate and the Releases say.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    wanted: Wanted,
    current: ReleaseRef,
    hop_started: Option<Timestamp>,
    failure: Option<Failure>,
    releases: Vec<KnownRelease>,
    preflighted: bool,
}

/// What DaemonSets, Deployments and pods say.
pub(crate) type Workloads = BTreeMap<Workload, WorkloadSeen>;
/// What Nodes and Machines say.
pub(crate) type Machines = BTreeMap<MachineName, MachineSeen>;

/// The parts of a picture, put together.
pub(crate) fn compose(asked: Asked, workloads: Workloads, machines: Machines, now: Timestamp) -> Input {
    Input {
        wanted: asked.wanted,
        observed: Observed {
            current: asked.current,
            hop_started: asked.hop_started,
            failure: asked.failure,
            releases: asked.releases,
            workloads,
            machines,
            findings: asked.preflighted.then(Vec::new),
        },
        now,
    }
}

impl World {
    pub(crate) fn reference(&self, release: ReleaseId) -> ReleaseRef {
        self.releases[release].reference.clone()
    }

    /// The whole picture of one moment.
    pub(crate) fn picture(&self) -> Input {
        compose(
            self.asked(),
            self.see_workloads(),
            self.see_machines(),
            timestamp(self.now),
        )
    }

    pub(crate) fn asked(&self) -> Asked {
        let update = &self.update;
        Asked {
            wanted: Wanted {
                desired: update.desired.clone(),
                paused: update.paused,
                policy: update.policy.clone(),
                force: std::collections::BTreeSet::new(),
                attempt: update.attempt,
            },
            current: self.reference(update.current),
            hop_started: update.hop.map(|(_, since)| timestamp(since)),
            failure: update.failure.clone(),
            releases: self
                .releases
                .iter()
                .filter(|release| release.known)
                .map(|release| release.seen.clone())
                .collect(),
            // Preflight takes a moment.
            preflighted: self.now >= update.desired_since + 2 * SECOND,
        }
    }

    pub(crate) fn see_workloads(&self) -> Workloads {
        let mut seen: Workloads = self
            .objects
            .iter()
            .map(|(workload, object)| (*workload, self.see_workload(*workload, object)))
            .collect();
        for (id, pod) in &self.pods {
            if let Owner::Workload(workload) = pod.owner
                && let Some(seen) = seen.get_mut(&workload)
            {
                seen.instances.push(self.see_pod(*id, workload, pod));
            }
        }
        seen
    }

    fn see_workload(&self, workload: Workload, object: &Object) -> WorkloadSeen {
        let release = &self.releases[object.template.release];
        let daemons = self.machines.iter().filter(|machine| {
            machine.node.is_some() && (workload == Workload::Proxy || machine.role == Role::ControlPlane)
        });
        WorkloadSeen {
            template: release.reference.clone(),
            image: release
                .seen
                .images
                .get(&Part::Workload(workload))
                .cloned()
                .unwrap_or_default(),
            previous: object
                .history
                .iter()
                .rev()
                .find(|template| template.id != object.template.id)
                .map(|template| self.reference(template.release)),
            revision: object.template.revision,
            rolled: object.rolled.map(timestamp),
            wanted: self.replicas(workload).unwrap_or_else(|| daemons.count()),
            settled: object.observed == object.generation,
            automatic: object.automatic,
            instances: Vec::new(),
        }
    }

    fn see_pod(&self, id: u32, workload: Workload, pod: &Pod) -> Instance {
        Instance {
            name: format!("{}-{id}", workload.as_str()),
            machine: pod.machine.map(|machine| self.machines[machine].name.clone()),
            release: self.reference(pod.template.release),
            revision: pod.template.revision,
            created: timestamp_in_seconds(pod.created),
            ready: pod.ready,
            ready_since: timestamp_in_seconds(pod.ready_since),
            leaving: pod.leaving,
            trouble: pod.trouble.map(str::to_owned),
        }
    }

    pub(crate) fn see_machines(&self) -> Machines {
        // Pods are looked at once for all machines that are being drained, if any is.
        let drains = self.machines.iter().any(|machine| machine.cordoned_by_us().is_some());
        let crowd = drains.then(|| self.crowd());
        self.machines
            .iter()
            .enumerate()
            .filter_map(|(index, machine)| {
                Some((machine.name.clone(), self.see_machine(index, machine, crowd.as_ref())?))
            })
            .collect()
    }

    fn see_machine(&self, index: MachineId, machine: &Machine, crowd: Option<&Crowd>) -> Option<MachineSeen> {
        let node = machine.node.as_ref()?;
        let (spec, status) = (&machine.spec, &machine.status);
        let staged = |fetch: Fetch| match fetch {
            Fetch::Fetching => Staged::Fetching("images".to_owned()),
            Fetch::Ready => Staged::Ready,
            Fetch::Bad => Staged::Bad("kube-apiserver: the digest is another".to_owned()),
        };
        Some(MachineSeen {
            role: machine.role,
            pool: machine.pool_name(),
            ready: node.ready,
            ready_since: timestamp_in_seconds(node.ready_since),
            cordoned: node.cordoned,
            cordoned_by_us: machine.cordoned_by_us().map(timestamp),
            kubelet: self.releases[node.kubelet].reference.version.clone(),
            running: status.running.map(|release| self.reference(release)),
            ordered: spec
                .run
                .map(|(release, since, _)| (self.reference(release), timestamp(since))),
            order_seen: status.order == spec.order,
            failure: self.see_failure(machine),
            stage_ordered: spec.stage.iter().map(|release| self.digest(*release)).collect(),
            staged: status
                .staged
                .iter()
                .map(|(release, fetch)| (self.digest(*release), staged(*fetch)))
                .collect(),
            etcd: status.etcd.map(|(release, healthy)| EtcdSeen {
                image: etcd_image(self.releases[release].etcd),
                ordered: spec.etcd.map(|release| self.reference(release)),
                healthy,
                message: String::new(),
            }),
            standby: status.standby.map(|(release, api_ready)| StandbySeen {
                release: Some(self.reference(release)),
                ordered: spec.standby.map(|(release, _)| self.reference(release)),
                serve_ordered: spec.standby.is_some_and(|(_, serve)| serve),
                api_ready,
            }),
            snapshots: status.snapshots.clone(),
            snapshot_ordered: spec.snapshot.clone(),
            drain: crowd
                .filter(|_| machine.cordoned_by_us().is_some())
                .map(|crowd| self.see_drain(index, crowd)),
        })
    }

    fn digest(&self, release: ReleaseId) -> Digest {
        self.releases[release].reference.digest.clone()
    }

    fn see_failure(&self, machine: &Machine) -> Option<kprov_types::api::MachineFailure> {
        let Orders { run, etcd, order, .. } = &machine.spec;
        let failure = machine.status.failure.as_ref()?;
        let is = |release: ReleaseId| failure.release == self.releases[release].reference;
        let of_run = run.is_some_and(|(release, since, _)| is(release) && failure.time >= timestamp(since));
        let of_etcd = etcd.is_some_and(is) && failure.order == *order;
        (of_run || of_etcd).then(|| failure.clone())
    }

    fn crowd(&self) -> Crowd {
        let mut crowd = Crowd {
            on: vec![Vec::new(); self.machines.len()],
            healthy: vec![0; self.apps.len()],
            open: Vec::new(),
            workers: self.machines.iter().any(|machine| machine.role == Role::Worker),
        };
        for (id, pod) in &self.pods {
            if let Owner::App(app) = pod.owner {
                crowd.healthy[app] += usize::from(pod.ready && !pod.leaving);
            }
            if let Some(machine) = pod.machine.filter(|_| moves(pod)) {
                crowd.on[machine].push(*id);
            }
        }
        let open = |machine: &Machine| machine.node.as_ref().is_some_and(|node| node.ready && !node.cordoned);
        crowd
            .open
            .extend((0..self.machines.len()).filter(|index| open(&self.machines[*index])));
        crowd
    }

    /// Pods that have to leave a machine: those that another could take.
    pub(crate) fn to_leave(&self, index: MachineId) -> Vec<u32> {
        // Most often there is nothing to look at.
        if self.pods.values().any(|pod| pod.machine == Some(index) && moves(pod)) {
            self.leaving(index, &self.crowd())
        } else {
            Vec::new()
        }
    }

    fn leaving(&self, index: MachineId, crowd: &Crowd) -> Vec<u32> {
        let (mut any, mut worker) = (false, false);
        for other in crowd.open.iter().filter(|other| **other != index) {
            any = true;
            worker |= self.machines[*other].role == Role::Worker || !crowd.workers;
            if worker {
                break;
            }
        }
        let leaves = |id: &u32| match self.pods[id].owner {
            Owner::Workload(_) => any,
            Owner::App(_) => worker,
        };
        crowd.on[index].iter().copied().filter(leaves).collect()
    }

    fn see_drain(&self, index: MachineId, crowd: &Crowd) -> Drain {
        let leaving = self.leaving(index, crowd);
        Drain {
            leaving: leaving.iter().filter(|id| self.pods[id].leaving).count(),
            blocked: leaving
                .iter()
                .filter(|id| !self.pods[id].leaving && !self.lets_go(**id, |app| crowd.healthy[app]))
                .map(|id| format!("budget of pod-{id}"))
                .collect(),
            remaining: leaving.into_iter().map(|id| format!("default/pod-{id}")).collect(),
        }
    }

    /// Whether a PodDisruptionBudget lets a pod go now.
    pub(crate) fn budget_lets_go(&self, id: u32) -> bool {
        let healthy = |app| {
            let pods = self.pods.values().filter(|pod| pod.owner == Owner::App(app));
            pods.filter(|pod| pod.ready && !pod.leaving).count()
        };
        !self.pods.contains_key(&id) || self.lets_go(id, healthy)
    }

    /// One of each app's pods may be missing.
    fn lets_go(&self, id: u32, healthy: impl Fn(usize) -> usize) -> bool {
        match self.pods[&id].owner {
            Owner::App(app) => self.blocks == 0 && healthy(app) >= self.apps[app].replicas,
            Owner::Workload(_) => true,
        }
    }
}

/// Pods that a drain evicts: people's, and CoreDNS's.
const fn moves(pod: &Pod) -> bool {
    matches!(pod.owner, Owner::App(_) | Owner::Workload(Workload::Dns))
}

/// Pods as whoever drains machines sees them.
struct Crowd {
    /// Pods that may move, by machine.
    on: Vec<Vec<u32>>,
    /// How many pods of each app are ready and stay.
    healthy: Vec<usize>,
    /// Machines that take pods.
    open: Vec<MachineId>,
    /// There are workers; control-plane machines take no apps then.
    workers: bool,
}

impl Machine {
    /// Since when we keep pods off it. Whom a person has uncordoned is cordoned by nobody.
    pub(crate) fn cordoned_by_us(&self) -> Option<Millis> {
        let node = self.node.as_ref()?;
        node.cordoned_by_us.filter(|_| node.cordoned)
    }

    pub(crate) fn pool_name(&self) -> String {
        match self.role {
            Role::ControlPlane => "control-plane".to_owned(),
            Role::Worker => format!("pool{}", self.pool),
        }
    }
}
