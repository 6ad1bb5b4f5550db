//! What the API runs: how far each workload is with a release, and the API servers' own ways of being replaced.

use std::collections::BTreeSet;

use kprov_types::MachineName;
use kprov_types::api::ReleaseRef;

use super::Waiting;
use super::draft::Draft;
use crate::model::{Action, Instance, MachineSeen, Part, StandbySeen, Workload, WorkloadSeen};

/// How strictly a workload has to be of a release.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Strictness {
    /// Every pod.
    All,
    /// Every pod on a machine that is Ready: those that are not are waited for at the end of the hop.
    Reachable,
}

/// Whether a workload's template is to be of another release in a hop to `to`: of CoreDNS and the operator, where the image
/// changes; of all others, always. A part that the cluster or the release does not have is left alone.
pub(super) fn lags(draft: &Draft<'_>, workload: Workload, to: &ReleaseRef) -> bool {
    let Some(seen) = draft.observed.workloads.get(&workload) else {
        return false;
    };
    if seen.template == *to {
        return false;
    }
    let image = draft
        .known(to)
        .and_then(|known| known.images.get(&Part::Workload(workload)));
    match workload {
        Workload::ApiServer | Workload::ControllerManager | Workload::Scheduler => true,
        Workload::Proxy => image.is_some(),
        Workload::Dns | Workload::Operator => image.is_some_and(|image| *image != seen.image),
    }
}

/// Drafts the roll of those of `workloads` that lag behind `to`, and what is waited for until all are of it. True when they
/// are.
pub(super) fn roll_all(draft: &mut Draft<'_>, workloads: &[Workload], to: &ReleaseRef, strictness: Strictness) -> bool {
    let mut complete = true;
    for &workload in workloads {
        let Some(seen) = draft.observed.workloads.get(&workload) else {
            if matches!(workload, Workload::ControllerManager | Workload::Scheduler) {
                draft.wait(Waiting::NoWorkload { workload });
                complete = false;
            }
            continue;
        };
        if lags(draft, workload, to) {
            draft.step(Action::Roll {
                workload,
                from: seen.template.clone(),
                to: to.clone(),
            });
            complete = false;
        } else {
            complete &= is_complete(draft, workload, seen, strictness);
        }
    }
    complete
}

/// Whether all of a workload's pods are of its template, ready, and enough; else says what it lacks.
pub(super) fn is_complete(
    draft: &mut Draft<'_>,
    workload: Workload,
    seen: &WorkloadSeen,
    strictness: Strictness,
) -> bool {
    if !seen.settled {
        draft.wait(Waiting::Controller { workload });
        under_way(draft, workload, seen);
        return false;
    }
    let (mut good, mut excused) = (0_usize, 0_usize);
    let (mut old, mut unready) = (Vec::new(), None);
    for pod in &seen.instances {
        let of_template = pod.release == seen.template;
        if of_template && pod.ready && !pod.leaving {
            good += 1;
        } else if strictness == Strictness::Reachable && !reachable(draft, pod) {
            excused += 1;
        } else if !of_template {
            old.push(pod);
        } else if !pod.leaving {
            unready = unready.or(Some(pod));
        }
    }
    let missing = seen.wanted.saturating_sub(good + excused);
    if old.is_empty() && unready.is_none() && missing == 0 {
        return true;
    }
    if let Some(pod) = unready {
        wait_for_pod(draft, workload, pod);
    } else if missing > old.len() {
        draft.wait(Waiting::NoPod {
            workload,
            missing: missing - old.len(),
            machine: None,
        });
    }
    if let Some(pod) = old.first() {
        draft.wait(Waiting::OldPods {
            workload,
            pods: old.len(),
            pod: pod.name.clone(),
        });
    }
    under_way(draft, workload, seen);
    false
}

/// The machine of a pod is there and Ready, or the pod has none yet.
fn reachable(draft: &Draft<'_>, pod: &Instance) -> bool {
    let machine = pod.machine.as_ref();
    machine.is_none_or(|machine| draft.observed.machines.get(machine).is_some_and(|m| m.ready))
}

fn wait_for_pod(draft: &mut Draft<'_>, workload: Workload, pod: &Instance) {
    draft.wait(Waiting::Pod {
        workload,
        pod: pod.name.clone(),
        machine: pod.machine.clone(),
        seconds: draft.since(pod.created.max(pod.ready_since)),
        limit: draft.health_limit(),
    });
}

/// Notes the roll that is under way.
fn under_way(draft: &mut Draft<'_>, workload: Workload, seen: &WorkloadSeen) {
    let old = seen.instances.iter().find(|pod| pod.release != seen.template);
    let current = &draft.observed.current;
    let from = old.map_or(current, |pod| &pod.release).clone();
    draft.running(Action::Roll {
        workload,
        from,
        to: seen.template.clone(),
    });
}

/// Whether every control-plane machine serves by an API server of the template's release, and nothing else does; else says
/// what is lacking and, where the DaemonSet's controller waits to be told (before 1.22), does the next part of the swap.
pub(super) fn api_servers(draft: &mut Draft<'_>) -> bool {
    let workload = Workload::ApiServer;
    let Some(seen) = draft.observed.workloads.get(&workload) else {
        draft.wait(Waiting::NoWorkload { workload });
        return false;
    };
    if !is_complete_or_swapping(draft, seen) {
        return false;
    }
    let with_one: BTreeSet<&MachineName> = seen.instances.iter().filter_map(|pod| pod.machine.as_ref()).collect();
    let mut machines = draft.control_plane().peekable();
    let without = if machines.peek().is_some() {
        machines
            .find(|(name, _)| !with_one.contains(name))
            .map(|(name, _)| Some(name.clone()))
    } else {
        // No machine is known to be of the control plane: whatever that is, it isn't complete.
        Some(None)
    };
    if let Some(machine) = without {
        draft.wait(Waiting::NoPod {
            workload,
            missing: 1,
            machine,
        });
        return false;
    }
    // A standby that still serves may be older than what comes next would stand.
    let serving = draft
        .control_plane()
        .find(|(_, m)| m.standby.as_ref().is_some_and(|s| s.serve_ordered || s.api_ready));
    if let Some((name, _)) = serving {
        draft.wait(Waiting::StandbyStops { machine: name.clone() });
        return false;
    }
    true
}

fn is_complete_or_swapping(draft: &mut Draft<'_>, seen: &WorkloadSeen) -> bool {
    if seen.automatic || !seen.settled {
        return is_complete(draft, Workload::ApiServer, seen, Strictness::All);
    }
    // One machine at a time: first the one that is in the middle of it.
    let mut open: Vec<Swap<'_>> = draft
        .control_plane()
        .map(|(name, machine)| Swap::new(seen, name, machine))
        .filter(|swap| !swap.is_over())
        .collect();
    open.sort_by_key(|swap| !swap.has_begun());
    match open.first() {
        Some(swap) => {
            swap.go_on(draft);
            under_way(draft, Workload::ApiServer, seen);
            false
        }
        None => is_complete(draft, Workload::ApiServer, seen, Strictness::All),
    }
}

/// The replacement of one machine's API server where the new pod can't start beside the old: the machine's standby API server
/// serves meanwhile, at an address of its own.
struct Swap<'a> {
    name: &'a MachineName,
    standby: Option<&'a StandbySeen>,
    /// The old pod, unless it is leaving.
    old: Option<&'a Instance>,
    leaving: Option<&'a Instance>,
    new: Option<&'a Instance>,
}

impl<'a> Swap<'a> {
    fn new(seen: &'a WorkloadSeen, name: &'a MachineName, machine: &'a MachineSeen) -> Self {
        let mut swap = Self {
            name,
            standby: machine.standby.as_ref(),
            old: None,
            leaving: None,
            new: None,
        };
        for pod in seen.instances.iter().filter(|pod| pod.machine.as_ref() == Some(name)) {
            if pod.leaving {
                swap.leaving = Some(pod);
            } else if pod.release == seen.template {
                swap.new = Some(pod);
            } else {
                swap.old = Some(pod);
            }
        }
        swap
    }

    fn serve_ordered(&self) -> bool {
        self.standby.is_some_and(|s| s.serve_ordered)
    }

    fn has_begun(&self) -> bool {
        self.serve_ordered() || self.old.is_none()
    }

    fn is_over(&self) -> bool {
        self.old.is_none() && self.leaving.is_none() && self.new.is_some_and(|pod| pod.ready) && !self.serve_ordered()
    }

    fn go_on(&self, draft: &mut Draft<'_>) {
        let machine = self.name.clone();
        // The standby is what was last known to be good, and stays so until the whole control plane has proven the new one.
        let release = draft.observed.current.clone();
        if let Some(old) = self.old {
            match self.standby {
                None => draft.wait(Waiting::Silent { machine }),
                Some(s) if !s.serve_ordered || s.ordered.as_ref() != Some(&release) => draft.step(Action::Standby {
                    machine,
                    release,
                    serve: true,
                }),
                Some(s) if !s.api_ready || s.release.as_ref() != Some(&release) => {
                    draft.wait(Waiting::StandbyServes { machine });
                }
                Some(_) => draft.step(Action::Replace {
                    workload: Workload::ApiServer,
                    pod: old.name.clone(),
                    machine,
                }),
            }
        } else if let Some(leaving) = self.leaving {
            draft.wait(Waiting::OldPods {
                workload: Workload::ApiServer,
                pods: 1,
                pod: leaving.name.clone(),
            });
        } else {
            match self.new {
                Some(new) if new.ready => draft.step(Action::Standby {
                    machine,
                    release,
                    serve: false,
                }),
                Some(new) => wait_for_pod(draft, Workload::ApiServer, new),
                None => draft.wait(Waiting::NoPod {
                    workload: Workload::ApiServer,
                    missing: 1,
                    machine: Some(machine),
                }),
            }
        }
    }
}

/// Whether a machine's own API server answers.
fn serves(draft: &Draft<'_>, machine: &MachineName) -> bool {
    let seen = draft.observed.workloads.get(&Workload::ApiServer);
    let mut pods = seen.into_iter().flat_map(|seen| &seen.instances);
    pods.any(|pod| pod.ready && !pod.leaving && pod.machine.as_ref() == Some(machine))
}

/// Drafts the standby control planes' change to a release. True when each machine has it.
pub(super) fn standbys(draft: &mut Draft<'_>, release: &ReleaseRef) -> bool {
    let mut complete = true;
    for (name, machine) in draft.control_plane() {
        match &machine.standby {
            // Placed by itself, and perhaps all that answers: it is changed once the machine's own does.
            Some(s) if s.api_ready && !s.serve_ordered && !serves(draft, name) => {
                draft.wait(Waiting::StandbyStops { machine: name.clone() });
            }
            Some(s) if s.ordered.as_ref() != Some(release) => draft.step(Action::Standby {
                machine: name.clone(),
                release: release.clone(),
                serve: false,
            }),
            Some(s) if s.release.as_ref() == Some(release) => continue,
            _ => draft.wait(Waiting::Standby {
                machine: name.clone(),
                release: release.clone(),
            }),
        }
        complete = false;
    }
    complete
}
