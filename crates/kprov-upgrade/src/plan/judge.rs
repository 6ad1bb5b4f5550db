//! Whether the release that a hop leads to is bad.
//!
//! Deadlines count from times that were observed, and never against a machine that isn't Ready: what runs there can't be
//! told from here, and the machine is waited for instead.

use jiff::Timestamp;
use kprov_types::MachineName;
use kprov_types::api::{Failure, ReleaseRef};

use super::draft::Draft;
use super::fleet;
use crate::model::{Instance, MachineSeen, Staged, Workload, WorkloadSeen};

/// So many machines that run a release well speak for it: another that fails then stops the rollout and condemns nothing.
const PROVEN: usize = 3;

/// Finds what condemns the release `to`.
pub(super) fn judge(draft: &Draft<'_>, to: &ReleaseRef) -> Option<Failure> {
    let found = staging(draft, to)
        .or_else(|| Workload::ALL.iter().find_map(|&workload| rolled(draft, workload, to)))
        .or_else(|| {
            draft
                .observed
                .machines
                .iter()
                .find_map(|(name, m)| machine(draft, name, m, to))
        })?;
    let machines = draft.observed.machines.values();
    let well = machines.filter(|m| m.ready && fleet::runs(m, to)).take(PROVEN).count();
    Some(Failure {
        release: to.clone(),
        attempt: draft.input.wanted.attempt,
        component: found.component.to_owned(),
        instance: found.instance,
        message: found.message,
        log: found.log,
        time: draft.input.now,
        halted: well >= PROVEN,
        reverted: false,
    })
}

struct Found {
    component: &'static str,
    instance: String,
    message: String,
    log: Vec<String>,
}

impl Found {
    fn new(component: &'static str, instance: &impl ToString, message: String) -> Self {
        Self {
            component,
            instance: instance.to_string(),
            message,
            log: Vec::new(),
        }
    }
}

fn staging(draft: &Draft<'_>, to: &ReleaseRef) -> Option<Found> {
    draft
        .observed
        .machines
        .iter()
        .find_map(|(name, m)| match m.staged.get(&to.digest) {
            Some(Staged::Bad(why)) => Some(Found::new("release", name, why.clone())),
            _ => None,
        })
}

fn rolled(draft: &Draft<'_>, workload: Workload, to: &ReleaseRef) -> Option<Found> {
    let seen = draft.observed.workloads.get(&workload)?;
    if seen.template != *to {
        return None;
    }
    let name = workload.as_str();
    let mut youngest = seen.rolled;
    let (mut pods, mut unreachable) = (0_usize, false);
    // What finds no place while some machines take no new pods has that to blame.
    let has_room = !draft.observed.machines.values().any(|m| m.cordoned);
    for pod in &seen.instances {
        let Some(healthy_since) = judged_from(draft, pod, has_room) else {
            unreachable = true;
            continue;
        };
        if pod.leaving || pod.release != *to {
            continue;
        }
        pods += 1;
        youngest = youngest.max(Some(pod.created));
        if let Some(trouble) = &pod.trouble {
            return Some(Found::new(name, &pod.name, trouble.clone()));
        }
        if !pod.ready && draft.since(healthy_since) > draft.health_limit() {
            let limit = draft.health_limit();
            return Some(Found::new(name, &pod.name, format!("it is not ready after {limit} s")));
        }
    }
    missing(draft, seen, pods, youngest.filter(|_| !unreachable)?).map(|message| Found::new(name, &name, message))
}

/// From when on a pod's health is judged; `None` where it can't be.
fn judged_from(draft: &Draft<'_>, pod: &Instance, has_room: bool) -> Option<Timestamp> {
    let since = pod.created.max(pod.ready_since);
    match &pod.machine {
        Some(machine) => {
            let machine = draft.observed.machines.get(machine).filter(|m| m.ready)?;
            Some(since.max(machine.ready_since))
        }
        None => has_room.then_some(since),
    }
}

/// A controller that makes no pods. Where each pod waits for us to delete the old one, the time says nothing.
fn missing(draft: &Draft<'_>, seen: &WorkloadSeen, pods: usize, youngest: Timestamp) -> Option<String> {
    if !seen.automatic || pods >= seen.wanted {
        return None;
    }
    // The first has its own time; each later one waits for the one before it to become ready, and for an old one to end.
    let limit = if pods == 0 {
        draft.health_limit()
    } else {
        2 * draft.health_limit()
    };
    let wanted = seen.wanted;
    (draft.since(youngest) > limit).then(|| format!("{pods} of {wanted} pods were made, and no other for {limit} s"))
}

fn machine(draft: &Draft<'_>, name: &MachineName, m: &MachineSeen, to: &ReleaseRef) -> Option<Found> {
    let run_ordered = m.ordered.as_ref().filter(|(release, _)| release == to);
    if let Some(failure) = &m.failure
        && failure.release == *to
        && !fleet::failed_before(draft, m)
    {
        let etcd_ordered = m.etcd.as_ref().is_some_and(|etcd| etcd.ordered.as_ref() == Some(to));
        let component = match run_ordered {
            Some(_) => "kubelet",
            None if etcd_ordered => "etcd",
            None => return None,
        };
        return Some(Found {
            log: failure.log.clone(),
            ..Found::new(component, name, failure.message.clone())
        });
    }
    // A machine goes back by itself in time; one that does not is lost with the release.
    let (_, since) = run_ordered?;
    let limit = 2 * draft.health_limit();
    let lost = m.failure.is_none() && !fleet::runs(m, to) && draft.since(*since) > limit;
    lost.then(|| {
        Found::new(
            "kubelet",
            name,
            format!("it neither runs {to} nor has gone back after {limit} s"),
        )
    })
}
