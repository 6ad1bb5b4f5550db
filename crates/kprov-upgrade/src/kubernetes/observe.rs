//! From what is cached to what a planner is given. Pure: what is missing or late counts as not healthy.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use kprov_bootstrap::manifests::{SETTINGS_CONFIG_MAP, SETTINGS_KEY};
use kprov_types::api::{Finding, MachineStatus, ReleaseRef, VersionUpdateSpec};
use kprov_types::node::ControlPlaneSettings;
use kprov_types::{KubernetesVersion, MachineName, Role};

use super::cache::Facts;
use super::facts::{MachineFacts, NodeFacts, PodFacts, UpdateFacts, WorkloadFacts, role};
use super::orders::went_back;
use crate::model::{
    Drain, EtcdSeen, Input, Instance, KnownRelease, MachineSeen, Observed, Staged, StandbySeen, Wanted, Workload,
    WorkloadSeen,
};

/// The finding that stands for a spec that can't be read.
pub(super) const MALFORMED_SPEC: &str = "malformed-spec";

/// What is not among the cached facts.
#[derive(Clone, Debug, Default)]
pub(super) struct Asked {
    /// The releases that the cluster knows.
    pub(super) releases: Vec<KnownRelease>,
    /// Pods that have to leave, of the machines that were asked about.
    pub(super) drains: BTreeMap<MachineName, Drain>,
    /// What preflight found.
    pub(super) findings: Option<Vec<Finding>>,
}

/// Why there is no picture.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Unseen {
    /// Nothing says which release the cluster runs.
    #[error("ConfigMap `{SETTINGS_CONFIG_MAP}` in kube-system says nothing of the cluster's release: {0}")]
    Settings(String),
}

/// The cluster's settings.
pub(super) fn settings(facts: &Facts) -> Result<ControlPlaneSettings, Unseen> {
    let data = facts.settings.get(SETTINGS_CONFIG_MAP);
    let text = data.and_then(|data| data.get(SETTINGS_KEY));
    let text = text.ok_or_else(|| Unseen::Settings(format!("it has no `{SETTINGS_KEY}`")))?;
    serde_json::from_str(text).map_err(|error| Unseen::Settings(error.to_string()))
}

/// The release of the last hop that was finished, else the one that the cluster was made with.
pub(super) fn current(facts: &Facts, update: &UpdateFacts) -> Result<ReleaseRef, Unseen> {
    let status = &update.status;
    let version = status.current_version.as_ref().and_then(|v| v.parse().ok());
    if let (Some(version), Some(digest)) = (version, status.current_release.clone()) {
        return Ok(ReleaseRef { version, digest });
    }
    let settings = settings(facts)?;
    Ok(ReleaseRef {
        version: settings.kubernetes,
        digest: settings.release_digest,
    })
}

/// What a VersionUpdate asks for. One that can't be read asks for nothing new: it pauses, and the finding says why.
pub(super) fn wanted(update: &UpdateFacts) -> (Wanted, Option<Finding>) {
    match &update.spec {
        Ok(VersionUpdateSpec {
            desired_version,
            // Which of several releases of the version is meant: see `releases::choose`.
            release: _,
            paused,
            policy,
            force,
            attempt,
        }) => {
            let wanted = Wanted {
                desired: desired_version.clone(),
                paused: *paused,
                policy: policy.clone(),
                force: force.iter().cloned().collect(),
                attempt: *attempt,
            };
            (wanted, None)
        }
        Err(why) => {
            let default = VersionUpdateSpec::default();
            let wanted = Wanted {
                desired: update.desired.clone(),
                paused: true,
                policy: default.policy,
                force: BTreeSet::new(),
                attempt: update.status.failure.as_ref().map_or(default.attempt, |f| f.attempt),
            };
            let finding = Finding {
                name: MALFORMED_SPEC.into(),
                blocks: true,
                message: format!("the VersionUpdate's spec can't be read: {why}"),
                hint: "correct it with `kubectl edit versionupdate cluster`".into(),
            };
            (wanted, Some(finding))
        }
    }
}

/// The releases that something is of, or is told to be of, or goes back from.
pub(super) fn in_use(facts: &Facts, update: &UpdateFacts) -> BTreeSet<ReleaseRef> {
    let failure = update.status.failure.as_ref().filter(|failure| !failure.reverted);
    let mut used: BTreeSet<ReleaseRef> = failure.map(|failure| failure.release.clone()).into_iter().collect();
    used.extend(current(facts, update));
    let workloads = facts.daemon_sets.iter().chain(facts.deployments.iter());
    used.extend(workloads.filter_map(|(_, workload)| workload.template.clone()));
    used.extend(facts.pods.iter().filter_map(|(_, pod)| pod.release.clone()));
    for (_, machine) in facts.machines.iter() {
        let spec = &machine.spec;
        let told = machine.status.as_ref();
        let all = [
            spec.run.as_ref().map(|run| &run.release),
            spec.etcd.as_ref(),
            spec.standby.as_ref().map(|standby| &standby.release),
            told.and_then(|s| s.running.as_ref()),
            told.and_then(|s| s.standby.as_ref()).map(|standby| &standby.release),
        ];
        for release in all.into_iter().flatten() {
            if !used.contains(release) {
                used.insert(release.clone());
            }
        }
    }
    used
}

/// The picture that is planned from.
pub(super) fn input(facts: &Facts, update: &UpdateFacts, asked: Asked, now: Timestamp) -> Result<Input, Unseen> {
    let Asked {
        releases,
        mut drains,
        findings,
    } = asked;
    let (wanted, malformed) = wanted(update);
    let current = current(facts, update)?;
    let machines = machines(facts)
        .map(|(name, node, machine)| {
            let drain = drains.remove(&name);
            let seen = machine_seen(node, machine, drain, &current.version);
            (name, seen)
        })
        .collect();
    let workloads = workloads(facts, &current);
    Ok(Input {
        wanted,
        observed: Observed {
            current,
            hop_started: update.status.hop_started,
            failure: update.status.failure.clone(),
            releases,
            workloads,
            machines,
            findings: match malformed {
                Some(finding) => Some(findings.into_iter().flatten().chain([finding]).collect()),
                None => findings,
            },
        },
        now,
    })
}

/// Nodes with what their machines tell. A Node whose name is none of a machine of kprov's is somebody else's.
pub(super) fn machines(facts: &Facts) -> impl Iterator<Item = (MachineName, &NodeFacts, Option<&MachineFacts>)> {
    facts
        .nodes
        .iter()
        .filter_map(|(name, node)| Some((MachineName::new(name).ok()?, node, facts.machines.get(name))))
}

fn machine_seen(
    node: &NodeFacts,
    machine: Option<&MachineFacts>,
    drain: Option<Drain>,
    current: &KubernetesVersion,
) -> MachineSeen {
    let nothing = MachineStatus::default();
    let status = machine.and_then(|m| m.status.as_ref());
    let told = status.unwrap_or(&nothing);
    let spec = machine.map(|m| &m.spec);
    let role = role(node, machine);
    let control_plane = role == Role::ControlPlane;
    let run = spec.and_then(|s| s.run.as_ref());
    let order_seen = spec.is_none_or(|spec| told.observed_order >= spec.order);
    let staged = told.staged.iter().filter_map(|s| {
        let state = match (s.ready, s.bad) {
            (true, _) => Staged::Ready,
            (false, false) => Staged::Fetching(s.message.clone()),
            // What it says of an order that it was not given, or has not taken yet, is about an earlier try.
            (false, true) if !spec.is_some_and(|spec| spec.stage.contains(&s.release)) => return None,
            (false, true) if !order_seen => Staged::Fetching(String::new()),
            (false, true) => Staged::Bad(s.message.clone()),
        };
        Some((s.release.digest.clone(), state))
    });
    MachineSeen {
        role,
        pool: node.pool.clone(),
        // One that does not tell its version is as good as not Ready.
        ready: node.ready && node.kubelet.is_some(),
        ready_since: node.ready_since,
        cordoned: node.cordoned,
        cordoned_by_us: node.cordoned_by_us.filter(|_| node.cordoned),
        kubelet: node.kubelet.clone().unwrap_or_else(|| current.clone()),
        running: told.running.clone(),
        ordered: run.map(|run| (run.release.clone(), run.since)),
        order_seen,
        failure: spec.and_then(|spec| went_back(spec, told)).cloned(),
        stage_ordered: spec
            .map(|s| s.stage.iter().map(|r| r.digest.clone()).collect())
            .unwrap_or_default(),
        staged: staged.collect(),
        etcd: control_plane.then(|| EtcdSeen {
            image: told.etcd.as_ref().map(|e| e.image.clone()).unwrap_or_default(),
            ordered: spec.and_then(|s| s.etcd.clone()),
            healthy: told.etcd.as_ref().is_some_and(|e| e.healthy),
            message: told
                .etcd
                .as_ref()
                .map_or_else(|| "the machine has not told of it".to_owned(), |e| e.message.clone()),
        }),
        standby: control_plane.then(|| {
            let order = spec.and_then(|s| s.standby.as_ref());
            let standby = told.standby.as_ref();
            StandbySeen {
                release: standby.map(|s| s.release.clone()),
                ordered: order.map(|o| o.release.clone()),
                serve_ordered: order.is_some_and(|o| o.serve),
                api_ready: standby.is_some_and(|s| s.api_ready),
            }
        }),
        snapshots: told.snapshots.iter().map(|s| s.name.clone()).collect(),
        snapshot_ordered: spec.and_then(|s| s.snapshot.as_ref()).map(|s| s.name.clone()),
        drain,
    }
}

fn workloads(facts: &Facts, current: &ReleaseRef) -> BTreeMap<Workload, WorkloadSeen> {
    let mut instances: BTreeMap<Workload, Vec<Instance>> = BTreeMap::new();
    for (name, pod) in facts.pods.iter() {
        if let Some(workload) = pod.workload {
            let instance = instance(facts, workload, name, pod, current);
            instances.entry(workload).or_default().push(instance);
        }
    }
    let seen = Workload::ALL.into_iter().filter_map(|workload| {
        let facts = facts.workload(workload.as_str())?;
        let instances = instances.remove(&workload).unwrap_or_default();
        Some((workload, workload_seen(facts, instances, current)))
    });
    seen.collect()
}

fn workload_seen(facts: &WorkloadFacts, instances: Vec<Instance>, current: &ReleaseRef) -> WorkloadSeen {
    let WorkloadFacts {
        template,
        previous,
        image,
        revision,
        rolled,
        wanted,
        settled,
        automatic,
    } = facts;
    WorkloadSeen {
        template: template.clone().unwrap_or_else(|| current.clone()),
        previous: previous.clone(),
        image: image.clone(),
        revision: *revision,
        rolled: *rolled,
        wanted: *wanted,
        settled: *settled,
        automatic: *automatic,
        instances,
    }
}

/// Objects without a release were made by a kprov that did not write it down: they're what the cluster was made with.
fn instance(facts: &Facts, workload: Workload, name: &str, pod: &PodFacts, current: &ReleaseRef) -> Instance {
    let release = pod.release.clone().unwrap_or_else(|| current.clone());
    let said = match workload {
        Workload::ApiServer => api_server_says(facts, pod, &release),
        _ => true,
    };
    // Where kubelet and the process disagree, the time runs since the process said so: one late answer is no failure yet.
    let disagree = if pod.ready && !said {
        said_since(facts, pod)
    } else {
        None
    };
    Instance {
        name: name.to_owned(),
        machine: pod.machine.as_ref().and_then(|m| MachineName::new(m.as_str()).ok()),
        release,
        revision: pod.revision,
        created: pod.created,
        ready: pod.ready && said,
        ready_since: disagree.map_or(pod.ready_since, |since| since.max(pod.ready_since)),
        leaving: pod.leaving,
        trouble: pod.trouble.clone(),
    }
}

/// Whether an API server's own process says, at its own address, that it is ready and of the release's version: its machine
/// asks it. The kubelet's word alone may be about a process that is no more.
fn api_server_says(facts: &Facts, pod: &PodFacts, release: &ReleaseRef) -> bool {
    let machine = pod.machine.as_ref().and_then(|m| facts.machines.get(m));
    let status = machine.and_then(|m| m.status.as_ref());
    status.is_some_and(|status| says(status, pod, &release.version))
}

/// Since when a machine tells what it tells of an API server's pod.
fn said_since(facts: &Facts, pod: &PodFacts) -> Option<Timestamp> {
    let machine = pod.machine.as_ref().and_then(|m| facts.machines.get(m))?;
    let servers = &machine.status.as_ref()?.api_servers;
    servers.iter().find(|s| s.revision == pod.revision)?.since
}

/// Whether a machine tells that the process of an API server's pod is ready and of a version.
pub(super) fn says(status: &MachineStatus, pod: &PodFacts, version: &KubernetesVersion) -> bool {
    let mut servers = status.api_servers.iter();
    servers.any(|s| s.revision == pod.revision && s.ready && same_version(&s.version, version))
}

/// Whether an API server of a machine answers: its self-hosted one, or the standby. Of a machine that has told nothing yet its
/// kubelet's word is taken: that it's silent is no reason to send nobody there.
pub(super) fn api_server_answers(facts: &Facts, machine: &MachineName) -> bool {
    let told = facts.machines.get(machine.as_str()).and_then(|m| m.status.as_ref());
    let standby = told.and_then(|s| s.standby.as_ref()).is_some_and(|s| s.api_ready);
    let said = |pod: &PodFacts| match (&pod.release, told) {
        (Some(release), Some(_)) => api_server_says(facts, pod, release),
        _ => true,
    };
    let answers = |pod: &PodFacts| {
        pod.workload == Some(Workload::ApiServer)
            && pod.machine.as_deref() == Some(machine.as_str())
            && pod.ready
            && said(pod)
    };
    standby || facts.pods.iter().any(|(_, pod)| answers(pod))
}

/// Whether a program's own word for its version means a version. Builds add to it (`v1.20.2+5feab0`).
pub(super) fn same_version(told: &str, version: &KubernetesVersion) -> bool {
    let plain = |text: &str| {
        text.split('+')
            .next()
            .unwrap_or_default()
            .trim_start_matches('v')
            .to_owned()
    };
    plain(told) == plain(&version.to_string())
}

#[cfg(test)]
mod tests;
