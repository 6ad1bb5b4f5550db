//! What each action leads to if it succeeds at once and everything it sets going comes to its end. For outlines and tests:
//! a real cluster is always looked at.

use jiff::Timestamp;
use kprov_types::api::ReleaseRef;

use crate::model::{Action, Drain, Instance, MachineSeen, Observed, Part, Staged, StandbySeen, Workload, WorkloadSeen};

/// Applies an action at a time.
pub fn apply(observed: &mut Observed, action: &Action, now: Timestamp) {
    match action {
        Action::Begin { .. } => observed.hop_started = Some(now),
        Action::Stage { release, machines } => {
            for name in machines {
                if let Some(m) = observed.machines.get_mut(name) {
                    m.stage_ordered.insert(release.digest.clone());
                    m.staged.insert(release.digest.clone(), Staged::Ready);
                }
            }
        }
        Action::Roll { workload, to, .. } => roll(observed, *workload, to, now, false),
        Action::RollBack { workload, to, .. } => roll(observed, *workload, to, now, true),
        Action::Replace { workload, pod, .. } => {
            if let Some(seen) = observed.workloads.get_mut(workload) {
                let (template, revision) = (seen.template.clone(), seen.revision);
                if let Some(pod) = seen.instances.iter_mut().find(|seen| seen.name == *pod) {
                    renew(pod, &template, revision, now);
                }
            }
        }
        Action::Fail { failure } => observed.failure = Some(failure.clone()),
        Action::Reverted { release } => {
            observed.hop_started = None;
            if let Some(failure) = observed.failure.as_mut().filter(|failure| failure.release == *release) {
                failure.reverted = true;
            }
            for m in observed.machines.values_mut() {
                m.stage_ordered.remove(&release.digest);
                m.staged.remove(&release.digest);
            }
        }
        Action::Finish { release } => {
            observed.current = release.clone();
            observed.hop_started = None;
        }
        Action::Snapshot { machine, .. }
        | Action::Standby { machine, .. }
        | Action::Etcd { machine, .. }
        | Action::Cordon { machine }
        | Action::Drain { machine, .. }
        | Action::Run { machine, .. }
        | Action::Uncordon { machine } => {
            let image = match action {
                Action::Etcd { to, .. } => image(observed, to, Part::Etcd),
                _ => None,
            };
            if let Some(m) = observed.machines.get_mut(machine) {
                apply_to_machine(m, action, image, now);
            }
        }
    }
}

fn image(observed: &Observed, release: &ReleaseRef, part: Part) -> Option<String> {
    let known = observed.releases.iter().find(|known| known.release == *release)?;
    known.images.get(&part).cloned()
}

fn roll(observed: &mut Observed, workload: Workload, to: &ReleaseRef, now: Timestamp, back: bool) {
    let image = image(observed, to, Part::Workload(workload));
    let Some(seen) = observed.workloads.get_mut(&workload) else {
        return;
    };
    let revisions = seen.instances.iter().map(|pod| pod.revision);
    let kept = seen
        .instances
        .iter()
        .find(|pod| back && pod.release == *to)
        .map(|pod| pod.revision);
    seen.revision = match seen.revision {
        0 => 0,
        now => kept.unwrap_or(revisions.fold(now, u16::max).saturating_add(1)),
    };
    seen.previous = Some(std::mem::replace(&mut seen.template, to.clone()));
    seen.image = image.unwrap_or_else(|| seen.image.clone());
    seen.rolled = Some(now);
    seen.settled = true;
    if seen.automatic {
        replace_all(seen, now);
    }
}

/// What a DaemonSet's or Deployment's controller does.
fn replace_all(seen: &mut WorkloadSeen, now: Timestamp) {
    let (template, revision) = (seen.template.clone(), seen.revision);
    seen.instances.retain(|pod| !pod.leaving);
    for pod in seen
        .instances
        .iter_mut()
        .filter(|pod| pod.release != template || !pod.ready)
    {
        renew(pod, &template, revision, now);
    }
}

fn renew(pod: &mut Instance, release: &ReleaseRef, revision: u16, now: Timestamp) {
    *pod = Instance {
        name: pod.name.clone(),
        machine: pod.machine.clone(),
        release: release.clone(),
        revision,
        created: now,
        ready: true,
        ready_since: now,
        leaving: false,
        trouble: None,
    };
}

fn apply_to_machine(m: &mut MachineSeen, action: &Action, image: Option<String>, now: Timestamp) {
    match action {
        Action::Snapshot { name, .. } => {
            m.snapshot_ordered = Some(name.clone());
            m.snapshots.insert(name.clone());
        }
        Action::Standby { release, serve, .. } => {
            m.standby = Some(StandbySeen {
                release: Some(release.clone()),
                ordered: Some(release.clone()),
                serve_ordered: *serve,
                api_ready: *serve,
            });
        }
        Action::Etcd { to, .. } => {
            if let Some(etcd) = &mut m.etcd {
                etcd.ordered = Some(to.clone());
                etcd.healthy = true;
                etcd.message.clear();
                etcd.image = image.unwrap_or_else(|| etcd.image.clone());
            }
        }
        Action::Cordon { .. } if !m.cordoned => {
            m.cordoned = true;
            m.cordoned_by_us = Some(now);
            m.drain = Some(Drain::default());
        }
        Action::Drain { .. } => m.drain = m.cordoned_by_us.map(|_| Drain::default()),
        Action::Run { to, .. } => {
            m.ordered = Some((to.clone(), now));
            m.order_seen = true;
            m.running = Some(to.clone());
            m.kubelet = to.version.clone();
            m.failure = None;
            if !m.ready {
                m.ready = true;
                m.ready_since = now;
            }
        }
        Action::Uncordon { .. } if m.cordoned_by_us.is_some() => {
            m.cordoned = false;
            m.cordoned_by_us = None;
            m.drain = None;
        }
        _ => {}
    }
}
