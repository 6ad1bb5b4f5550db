//! On to a release: one hop, stage by stage.

use kprov_types::api::ReleaseRef;
use kprov_types::{MachineName, Minor, Role};

use super::course::under_way;
use super::draft::Draft;
use super::machines::Rollout;
use super::workloads::{self, Strictness};
use super::{Plan, Refusal, State, Waiting, fleet, judge, snapshot_name};
use crate::model::{Action, Input, MachineSeen, Workload};

/// A hop, and what comes after it.
struct Hop<'a> {
    to: &'a ReleaseRef,
    /// The minor of the next hop; `None`: this is the last.
    next: Option<Minor>,
}

impl Hop<'_> {
    /// Whether something of `minor` would be too old beside the next hop's API servers. Machines and add-ons that wouldn't
    /// wait for the last hop: each machine is drained as few times as skew allows.
    fn is_too_old(&self, minor: Minor) -> bool {
        self.next
            .is_some_and(|next| minor.minor + oldest_kubelet(next) < next.minor)
    }

    fn concerns_workload(&self, draft: &Draft<'_>, workload: Workload) -> bool {
        let Some(seen) = draft.observed.workloads.get(&workload) else {
            return false;
        };
        match workload {
            Workload::Proxy => {
                self.next.is_none() || seen.template == *self.to || self.is_too_old(seen.template.version.minor())
            }
            Workload::Dns | Workload::Operator => self.next.is_none() || seen.template == *self.to,
            Workload::ApiServer | Workload::ControllerManager | Workload::Scheduler => true,
        }
    }

    fn concerns_machine(&self, m: &MachineSeen) -> bool {
        let ordered = m.ordered.as_ref().is_some_and(|(ordered, _)| ordered == self.to);
        let begun = ordered || m.running.as_ref() == Some(self.to) || m.cordoned_by_us.is_some();
        self.next.is_none() || begun || self.is_too_old(m.kubelet.minor())
    }

    fn machines<'d>(&self, draft: &Draft<'d>) -> Vec<(&'d MachineName, &'d MachineSeen)> {
        let machines = draft.observed.machines.iter();
        machines.filter(|(_, m)| self.concerns_machine(m)).collect()
    }

    fn addons(&self, draft: &Draft<'_>) -> Vec<Workload> {
        let addons = [Workload::Proxy, Workload::Dns, Workload::Operator].into_iter();
        addons
            .filter(|&workload| self.concerns_workload(draft, workload))
            .collect()
    }
}

/// How many minors a kubelet, or kube-proxy, may be older than an API server of `minor`: three, and two before 1.28
/// (<https://kubernetes.io/releases/version-skew-policy/>, KEP-3935).
fn oldest_kubelet(minor: Minor) -> u64 {
    if minor >= Minor::v1(28) { 3 } else { 2 }
}

/// Plans the first of `hops`, which has others after it or not.
pub(super) fn forward(input: &Input, hops: &[&ReleaseRef]) -> Plan {
    let [to, rest @ ..] = hops else {
        return settle(input);
    };
    let hop = Hop {
        to,
        next: rest.first().map(|next| next.version.minor()),
    };
    let mut draft = Draft::new(input, to);
    if let Some(failure) = judge::judge(&draft, to) {
        draft.step(Action::Fail { failure });
        return draft.finish(State::Upgrading, hops);
    }
    let state = if under_way(&input.observed).is_some() {
        change(&mut draft, &hop);
        State::Upgrading
    } else {
        prepare(&mut draft, &hop)
    };
    draft.finish(state, hops)
}

/// Before anything changes, up to the first change: the API servers' template.
fn prepare(draft: &mut Draft<'_>, hop: &Hop<'_>) -> State {
    let (observed, to) = (draft.observed, hop.to);
    let Some(findings) = &observed.findings else {
        draft.wait(Waiting::Preflight {
            version: to.version.clone(),
        });
        return State::Preparing;
    };
    let force = &draft.input.wanted.force;
    let stops: Vec<String> = findings
        .iter()
        .filter(|f| f.blocks && !force.contains(&f.name))
        .map(|f| f.name.clone())
        .collect();
    if !stops.is_empty() {
        return State::Refused(Refusal::Preflight(stops));
    }
    if !fleet::is_open(draft) {
        return State::Preparing;
    }
    let Some(started) = observed.hop_started else {
        draft.step(Action::Begin { release: to.clone() });
        return State::Preparing;
    };
    let machines = observed
        .machines
        .iter()
        .filter(|(_, m)| m.role == Role::ControlPlane || hop.concerns_machine(m));
    if !fleet::stage(draft, to, machines) {
        return State::Preparing;
    }
    if let Some(unhealthy) = draft.etcd_unhealthy() {
        draft.wait(unhealthy);
        return State::Preparing;
    }
    // A hop begins from a control plane that is whole, so that going back leads to one.
    if snapshot(draft, snapshot_name(to, started)) && workloads::api_servers(draft) {
        roll_api_servers(draft, to);
    }
    State::Preparing
}

fn roll_api_servers(draft: &mut Draft<'_>, to: &ReleaseRef) {
    draft.step(Action::Roll {
        workload: Workload::ApiServer,
        from: draft.observed.current.clone(),
        to: to.clone(),
    });
}

/// Has one machine take the hop's snapshot. True when it is there.
fn snapshot(draft: &mut Draft<'_>, name: String) -> bool {
    if draft.control_plane().any(|(_, m)| m.snapshots.contains(&name)) {
        return true;
    }
    let ready = || draft.control_plane().filter(|(_, m)| m.ready);
    let asked = ready().find(|(_, m)| m.snapshot_ordered.as_ref() == Some(&name));
    let first = ready().next();
    if let Some((machine, _)) = asked {
        draft.running(Action::Snapshot {
            machine: machine.clone(),
            name: name.clone(),
        });
        draft.wait(Waiting::Snapshot {
            machine: machine.clone(),
            name,
        });
    } else if let Some((machine, _)) = first {
        draft.step(Action::Snapshot {
            machine: machine.clone(),
            name,
        });
    } else if let Some((machine, m)) = draft.control_plane().next() {
        fleet::wait_ready(draft, machine, m);
    } else {
        // It says that there is none.
        let _ = workloads::api_servers(draft);
    }
    false
}

/// From the first change to the last.
fn change<'a>(draft: &mut Draft<'a>, hop: &Hop<'a>) {
    let to = hop.to;
    if draft.observed.hop_started.is_none() {
        draft.step(Action::Begin { release: to.clone() });
        return;
    }
    let addons = hop.addons(draft);
    let machines = Rollout {
        to,
        machines: hop.machines(draft),
        canaries: usize::try_from(draft.input.wanted.policy.canary).unwrap_or(usize::MAX),
    };
    let done = control_plane(draft, to)
        && workloads::standbys(draft, to)
        && workloads::roll_all(draft, &addons, to, Strictness::Reachable)
        && etcd(draft, to)
        && machines.go_on(draft)
        && workloads::roll_all(draft, &addons, to, Strictness::All);
    if done {
        draft.step(Action::Finish { release: to.clone() });
    } else {
        // Whatever holds the rest back, machines that have finished get their pods again.
        if !draft.has_uncordons() {
            fleet::release_finished(draft, to);
        }
    }
}

/// API servers, then controller-manager and scheduler together.
fn control_plane(draft: &mut Draft<'_>, to: &ReleaseRef) -> bool {
    let managers = [Workload::ControllerManager, Workload::Scheduler];
    workloads::api_servers(draft) && workloads::roll_all(draft, &managers, to, Strictness::All)
}

/// etcd, one member at a time, where the release has another. True when all members run its etcd, healthy.
fn etcd(draft: &mut Draft<'_>, to: &ReleaseRef) -> bool {
    let Some(image) = draft
        .known(to)
        .and_then(|known| known.images.get(&crate::model::Part::Etcd))
    else {
        return true;
    };
    let members = || {
        draft
            .observed
            .machines
            .iter()
            .filter_map(|(name, m)| Some((name, m.etcd.as_ref()?)))
    };
    let updating = members().find(|(_, etcd)| etcd.image != *image && etcd.ordered.as_ref() == Some(to));
    let next = members().find(|(_, etcd)| etcd.image != *image);
    if let Some((machine, _)) = updating {
        let action = Action::Etcd {
            machine: machine.clone(),
            to: to.clone(),
        };
        draft.running(action);
        draft.wait(Waiting::EtcdUpdate {
            machine: machine.clone(),
            release: to.clone(),
        });
        return false;
    }
    if let Some(unhealthy) = draft.etcd_unhealthy() {
        draft.wait(unhealthy);
        return false;
    }
    if let Some((machine, _)) = next {
        draft.step(Action::Etcd {
            machine: machine.clone(),
            to: to.clone(),
        });
    }
    next.is_none()
}

/// Where the cluster is as wanted: machines that joined with other programs, and add-ons that a hop left behind, follow.
pub(super) fn settle(input: &Input) -> Plan {
    let observed = &input.observed;
    let to = &observed.current;
    let mut draft = Draft::new(input, to);
    let lagging: Vec<_> = observed.machines.iter().filter(|(_, m)| lags(m, to)).collect();
    let addons = [Workload::Proxy, Workload::Dns, Workload::Operator];
    let unsettled = |workload: &Workload| workloads::lags(&draft, *workload, to);
    if lagging.is_empty() && !addons.iter().any(unsettled) {
        return draft.finish(State::Idle, &[]);
    }
    if draft.known(to).is_none_or(|known| known.verified.is_err()) {
        draft.wait(Waiting::NoCurrentRelease {
            release: to.clone(),
            machines: lagging.len(),
        });
        fleet::release_idle(&mut draft);
        return draft.finish(State::Idle, &[]);
    }
    let machines = Rollout {
        to,
        machines: lagging,
        canaries: 0,
    };
    let _ = workloads::api_servers(&mut draft)
        && workloads::roll_all(&mut draft, &addons, to, Strictness::Reachable)
        && machines.go_on(&mut draft);
    draft.finish(State::Idle, &[])
}

/// A machine that is not where the cluster is, or on its way there.
fn lags(m: &MachineSeen, to: &ReleaseRef) -> bool {
    let elsewhere = match &m.running {
        Some(running) => running != to,
        None => m.kubelet != to.version,
    };
    let ordered = m.ordered.as_ref().is_some_and(|(ordered, _)| ordered != to);
    elsewhere || ordered || m.cordoned_by_us.is_some()
}
