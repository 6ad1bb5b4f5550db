//! Clusters for tests: as they stand, and ([`world`]) as they change when they are told to.

use std::collections::{BTreeMap, BTreeSet};

use jiff::{SignedDuration, Timestamp};
use kprov_types::api::{ReleaseRef, UpdatePolicy};
use kprov_types::{Digest, KubernetesVersion, MachineName, Role};

use crate::model::{
    EtcdSeen, Input, Instance, KnownRelease, MachineSeen, Observed, Part, StandbySeen, Wanted, Workload, WorkloadSeen,
};

pub(crate) mod world;

pub(crate) fn version(text: &str) -> KubernetesVersion {
    text.parse().unwrap()
}

pub(crate) fn name(text: &str) -> MachineName {
    MachineName::new(text).unwrap()
}

/// A release; its digest is made from its version.
pub(crate) fn release(text: &str) -> ReleaseRef {
    let mut bytes = [0; 32];
    bytes[..text.len()].copy_from_slice(text.as_bytes());
    ReleaseRef {
        version: version(text),
        digest: Digest::from_bytes(bytes),
    }
}

/// A verified release. CoreDNS changes with the minor, etcd with every fourth minor, the operator never.
pub(crate) fn known(text: &str) -> KnownRelease {
    let minor = version(text).minor().minor;
    let image = |workload: Workload| match workload {
        Workload::Dns => format!("coredns:1.{minor}"),
        Workload::Operator => "kprov-operator:0.1".to_owned(),
        other => format!("{}:v{text}", other.as_str()),
    };
    let mut images: BTreeMap<Part, String> = Workload::ALL.iter().map(|&w| (Part::Workload(w), image(w))).collect();
    images.insert(Part::Etcd, format!("etcd:3.{}", minor / 4));
    KnownRelease {
        release: release(text),
        verified: Ok(()),
        minimum_from: None,
        images,
    }
}

pub(crate) fn epoch() -> Timestamp {
    "2026-04-12T09:15:00Z".parse().unwrap()
}

pub(crate) fn later(seconds: i64) -> Timestamp {
    epoch() + SignedDuration::from_secs(seconds)
}

/// A cluster that runs `current` and knows `others`, with preflight passed; five minutes old.
pub(crate) fn cluster(current: &str, others: &[&str], control_plane: usize, workers: usize) -> Input {
    let of = release(current);
    let cp = (1..=control_plane).map(|i| (name(&format!("cp-{i}")), machine(&of, Role::ControlPlane)));
    let w = (1..=workers).map(|i| (name(&format!("w-{i}")), machine(&of, Role::Worker)));
    let machines: BTreeMap<MachineName, MachineSeen> = cp.chain(w).collect();
    let workloads = Workload::ALL
        .iter()
        .map(|&w| (w, workload(w, &of, &machines)))
        .collect();
    let releases = [current].iter().chain(others).map(|text| known(text)).collect();
    Input {
        wanted: Wanted {
            desired: current.to_owned(),
            paused: false,
            policy: UpdatePolicy::default(),
            force: BTreeSet::new(),
            attempt: 0,
        },
        observed: Observed {
            current: of,
            hop_started: None,
            failure: None,
            releases,
            workloads,
            machines,
            findings: Some(Vec::new()),
        },
        now: later(300),
    }
}

pub(crate) fn machine(of: &ReleaseRef, role: Role) -> MachineSeen {
    let control_plane = role == Role::ControlPlane;
    MachineSeen {
        role,
        pool: role.as_str().to_owned(),
        ready: true,
        ready_since: epoch(),
        cordoned: false,
        cordoned_by_us: None,
        kubelet: of.version.clone(),
        running: Some(of.clone()),
        ordered: None,
        order_seen: true,
        failure: None,
        stage_ordered: BTreeSet::new(),
        staged: BTreeMap::new(),
        etcd: control_plane.then(|| EtcdSeen {
            image: format!("etcd:3.{}", of.version.minor().minor / 4),
            ordered: None,
            healthy: true,
            message: String::new(),
        }),
        standby: control_plane.then(|| StandbySeen {
            release: Some(of.clone()),
            ordered: Some(of.clone()),
            serve_ordered: false,
            api_ready: false,
        }),
        snapshots: BTreeSet::new(),
        snapshot_ordered: None,
        drain: None,
    }
}

fn workload(workload: Workload, of: &ReleaseRef, machines: &BTreeMap<MachineName, MachineSeen>) -> WorkloadSeen {
    let control_plane: Vec<_> = machines
        .iter()
        .filter(|(_, m)| m.role == Role::ControlPlane)
        .map(|(name, _)| name)
        .collect();
    let on: Vec<_> = match workload {
        Workload::Proxy => machines.keys().collect(),
        Workload::ApiServer => control_plane,
        _ => control_plane.iter().cycle().take(2).copied().collect(),
    };
    let revision = u16::from(workload == Workload::ApiServer);
    let pods = on
        .iter()
        .enumerate()
        .map(|(i, machine)| pod(workload, i, Some(machine), of, revision, epoch(), true));
    WorkloadSeen {
        template: of.clone(),
        image: known(&of.version.to_string()).images[&Part::Workload(workload)].clone(),
        previous: None,
        revision,
        rolled: None,
        wanted: on.len(),
        settled: true,
        automatic: of.version.minor().minor >= 22 || workload != Workload::ApiServer,
        instances: pods.collect(),
    }
}

pub(crate) fn pod(
    workload: Workload,
    number: usize,
    machine: Option<&MachineName>,
    of: &ReleaseRef,
    revision: u16,
    created: Timestamp,
    ready: bool,
) -> Instance {
    Instance {
        name: format!(
            "{}-{}-{number}",
            workload.as_str(),
            of.version.to_string().replace('.', "-")
        ),
        machine: machine.cloned(),
        release: of.clone(),
        revision,
        created,
        ready,
        ready_since: created,
        leaving: false,
        trouble: None,
    }
}
