//! What people are told: from a picture and a plan to the status of the VersionUpdate. Pure.
//!
//! What actions write (current version, the hop's start, failure, history) is taken as it stands; all else is rendered anew.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use kprov_types::api::{
    ComponentStatus, Condition, Failure, NodeStatus, StepStatus, VersionUpdateStatus, WaitingStatus, condition,
};
use kprov_types::{KubernetesVersion, MachineName, Role};

use super::events::Note;
use crate::model::{Action, Input, MachineSeen, Workload, WorkloadSeen};
use crate::plan::{Plan, Refusal, State};

/// Machines that are told of one by one; of more, only those with something to tell.
const MOST_NODES: usize = 500;
/// Steps and things waited for that are told of one by one.
const MOST_LINES: usize = 20;
/// A Node that is not Ready for so long needs a person, in seconds; one that restarts is back before.
const NOT_READY_SECONDS: i64 = 60;
/// The reason where nothing is to be told.
const AS_EXPECTED: &str = "AsExpected";

/// Renders the status. `previous` is the status as it is now, `generation` that of the spec which was planned for.
pub(super) fn render(
    input: &Input,
    plan: &Plan,
    previous: &VersionUpdateStatus,
    generation: i64,
) -> VersionUpdateStatus {
    let observed = &input.observed;
    let current = &observed.current;
    let known = previous.current_version.is_some() && previous.current_release.is_some();
    let mut status = VersionUpdateStatus {
        observed_generation: generation,
        current_version: Some(if known { previous.current_version.clone() } else { None })
            .flatten()
            .or_else(|| Some(current.version.to_string())),
        current_release: if known {
            previous.current_release.clone()
        } else {
            Some(current.digest.clone())
        },
        // As asked for, also where there is nothing to hold.
        paused: input.wanted.paused,
        phase: phase(&plan.state).to_owned(),
        message: message(input, plan),
        conditions: previous.conditions.clone(),
        hops: plan.hops.clone(),
        hop_started: previous.hop_started,
        steps: steps(input.now, plan, previous),
        waiting: waiting(plan),
        components: components(input),
        kubelets: kubelets(input),
        nodes: nodes(input),
        findings: match &observed.findings {
            Some(findings) => findings.clone(),
            // What was found before the change began stays worth knowing while it's made.
            None if !plan.hops.is_empty() => previous.findings.clone(),
            None => Vec::new(),
        },
        failure: previous.failure.clone(),
        history: previous.history.clone(),
    };
    for (kind, verdict) in [
        (condition::AVAILABLE, available(input)),
        (condition::PROGRESSING, progressing(input, plan)),
        (condition::DEGRADED, degraded(input, plan)),
        (condition::UPGRADEABLE, upgradeable(input, plan)),
    ] {
        let condition = Condition {
            kind: kind.into(),
            status: verdict.status.into(),
            reason: verdict.reason.into(),
            message: verdict.message,
            last_transition_time: input.now,
            observed_generation: Some(generation),
        };
        set_condition(&mut status.conditions, condition);
    }
    status
}

/// Puts a condition among others; its time stays what it was while its status does.
pub(super) fn set_condition(conditions: &mut Vec<Condition>, mut new: Condition) {
    match conditions.iter_mut().find(|c| c.kind == new.kind) {
        Some(old) => {
            if old.status == new.status {
                new.last_transition_time = old.last_transition_time;
            }
            *old = new;
        }
        None => conditions.push(new),
    }
}

/// The status without what changes with the clock alone.
pub(super) fn lasting(status: &VersionUpdateStatus) -> VersionUpdateStatus {
    let mut lasting = status.clone();
    lasting.message.clear();
    for waiting in &mut lasting.waiting {
        waiting.message.clear();
    }
    for condition in &mut lasting.conditions {
        condition.message.clear();
    }
    for node in lasting.nodes.values_mut() {
        node.message.clear();
    }
    lasting
}

/// What a change of the status is worth telling.
pub(super) fn notes(previous: &VersionUpdateStatus, new: &VersionUpdateStatus) -> Vec<Note> {
    let progressing = |status: &VersionUpdateStatus| {
        let condition = status.conditions.iter().find(|c| c.kind == condition::PROGRESSING);
        condition
            .map(|c| (c.reason.clone(), c.message.clone()))
            .unwrap_or_default()
    };
    let mut notes = Vec::new();
    if new.paused && !previous.paused {
        notes.push(Note::new("Paused", "no new step begins until `spec.paused` is false"));
    }
    if previous.paused && !new.paused {
        notes.push(Note::new("Resumed", "steps begin again"));
    }
    let ((before, _), (reason, message)) = (progressing(previous), progressing(new));
    if new.phase == BLOCKED && (previous.phase != BLOCKED || before != reason) {
        let blocked = if reason == "Preflight" {
            "PreflightBlocked"
        } else {
            "Refused"
        };
        notes.push(Note::warning(blocked, message));
    }
    notes
}

const BLOCKED: &str = "Blocked";

const fn phase(state: &State) -> &'static str {
    match state {
        State::Idle => "Idle",
        State::Preparing => "Preflight",
        State::Upgrading => "Upgrading",
        State::Paused => "Paused",
        State::Reverting => "Reverting",
        State::Failed => "Failed",
        State::Refused(_) => BLOCKED,
    }
}

/// What is being done, and what is waited for.
fn message(input: &Input, plan: &Plan) -> String {
    let failure = input.observed.failure.as_ref();
    match (&plan.state, failure) {
        (State::Refused(refusal), _) => refused(input, refusal),
        (State::Failed, Some(failure)) => failed(failure),
        (State::Paused, _) => "paused".into(),
        _ => doing(plan),
    }
}

fn doing(plan: &Plan) -> String {
    let step = plan.steps.first().or(plan.running.first()).map(|s| s.message.clone());
    let waiting = plan.waiting.first().map(|w| format!("waiting for {w}"));
    [step, waiting].into_iter().flatten().collect::<Vec<_>>().join("; ")
}

fn steps(now: Timestamp, plan: &Plan, previous: &VersionUpdateStatus) -> Vec<StepStatus> {
    let mut seen = BTreeSet::new();
    let all = plan
        .running
        .iter()
        .chain(&plan.steps)
        .filter(|step| seen.insert(&step.id));
    all.take(MOST_LINES)
        .map(|step| StepStatus {
            id: step.id.clone(),
            message: step.message.clone(),
            since: previous.steps.iter().find(|s| s.id == step.id).map_or(now, |s| s.since),
        })
        .collect()
}

fn waiting(plan: &Plan) -> Vec<WaitingStatus> {
    let told = plan.waiting.iter().take(MOST_LINES).map(|waiting| WaitingStatus {
        reason: waiting.reason().into(),
        message: waiting.to_string(),
    });
    let mut told: Vec<WaitingStatus> = told.collect();
    let more = plan.waiting.len().saturating_sub(MOST_LINES);
    if more > 0 {
        told.push(WaitingStatus {
            reason: "More".into(),
            message: format!("{more} more"),
        });
    }
    told
}

fn components(input: &Input) -> BTreeMap<String, ComponentStatus> {
    let workloads = input.observed.workloads.iter();
    let mut components: BTreeMap<String, ComponentStatus> = workloads
        .map(|(workload, seen)| (workload.as_str().to_owned(), component(seen)))
        .collect();
    let members: Vec<_> = input
        .observed
        .machines
        .values()
        .filter_map(|m| m.etcd.as_ref())
        .collect();
    if !members.is_empty() {
        let versions: BTreeSet<String> = members.iter().filter_map(|m| tag(&m.image)).collect();
        let etcd = ComponentStatus {
            versions: versions.into_iter().collect(),
            ready: count(members.iter().filter(|m| m.healthy).count()),
            wanted: count(members.len()),
        };
        components.insert("etcd".into(), etcd);
    }
    components
}

fn component(seen: &WorkloadSeen) -> ComponentStatus {
    let staying = || seen.instances.iter().filter(|i| !i.leaving);
    let versions: BTreeSet<&KubernetesVersion> = staying().map(|i| &i.release.version).collect();
    ComponentStatus {
        versions: versions.into_iter().map(ToString::to_string).collect(),
        ready: count(staying().filter(|i| i.ready).count()),
        wanted: count(seen.wanted),
    }
}

/// The tag of `registry/repository:tag@digest`, as a version.
fn tag(image: &str) -> Option<String> {
    let name = image.split('@').next()?.rsplit('/').next()?;
    let (_, tag) = name.split_once(':')?;
    Some(tag.trim_start_matches('v').to_owned())
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

fn kubelets(input: &Input) -> BTreeMap<String, u32> {
    let mut kubelets = BTreeMap::new();
    for machine in input.observed.machines.values() {
        *kubelets.entry(machine.kubelet.to_string()).or_default() += 1;
    }
    kubelets
}

fn nodes(input: &Input) -> BTreeMap<String, NodeStatus> {
    let machines = &input.observed.machines;
    let told = machines.iter().map(|(name, machine)| {
        let status = NodeStatus {
            kubelet: machine.kubelet.to_string(),
            message: node_message(input.now, machine),
        };
        (name.to_string(), status)
    });
    let interesting = |(_, status): &(String, NodeStatus)| machines.len() <= MOST_NODES || !status.message.is_empty();
    told.filter(interesting).take(MOST_NODES).collect()
}

fn node_message(now: Timestamp, machine: &MachineSeen) -> String {
    if let Some(failure) = &machine.failure {
        return format!("went back from {}: {}", failure.release, failure.message);
    }
    let switching = is_switching(machine);
    if let (true, Some((release, since))) = (switching, &machine.ordered) {
        return format!("switches to {release} since {since}");
    }
    if !machine.ready {
        let minutes = now.duration_since(machine.ready_since).as_mins().max(0);
        return match minutes {
            0 => "not Ready".into(),
            minutes => format!("not Ready for {minutes} min"),
        };
    }
    match (&machine.cordoned_by_us, &machine.drain) {
        (Some(_), Some(drain)) if !drain.remaining.is_empty() => {
            let held = drain.blocked.first().map(|why| format!("; {why}")).unwrap_or_default();
            format!("{} pods have to leave{held}", drain.remaining.len())
        }
        (Some(_), _) => "cordoned for the update".into(),
        (None, _) if machine.cordoned => "cordoned by somebody else".into(),
        (None, _) => String::new(),
    }
}

fn is_switching(machine: &MachineSeen) -> bool {
    let ordered = machine.ordered.as_ref();
    ordered.is_some_and(|(release, _)| machine.running.as_ref() != Some(release)) && machine.failure.is_none()
}

/// What a condition says.
struct Verdict {
    status: &'static str,
    reason: &'static str,
    message: String,
}

impl Verdict {
    fn yes(reason: &'static str, message: impl Into<String>) -> Self {
        Self {
            status: "True",
            reason,
            message: message.into(),
        }
    }

    fn no(reason: &'static str, message: impl Into<String>) -> Self {
        Self {
            status: "False",
            ..Self::yes(reason, message)
        }
    }

    fn unknown(reason: &'static str, message: impl Into<String>) -> Self {
        Self {
            status: "Unknown",
            ..Self::yes(reason, message)
        }
    }
}

/// `` `a`, `b` and 3 more``.
fn list(names: &[&MachineName]) -> String {
    const TOLD: usize = 5;
    let told: Vec<String> = names.iter().take(TOLD).map(|name| format!("`{name}`")).collect();
    let more = names.len().saturating_sub(TOLD);
    let more = if more > 0 {
        format!(" and {more} more")
    } else {
        String::new()
    };
    format!("{}{more}", told.join(", "))
}

fn available(input: &Input) -> Verdict {
    let observed = &input.observed;
    let servers = observed.workloads.get(&Workload::ApiServer);
    let answers = |name: &MachineName, machine: &MachineSeen| {
        let own = servers.into_iter().flat_map(|s| &s.instances);
        let standby = machine.standby.as_ref().is_some_and(|s| s.api_ready);
        standby || own.into_iter().any(|i| i.machine.as_ref() == Some(name) && i.ready)
    };
    let control_plane = || observed.machines.iter().filter(|(_, m)| m.role == Role::ControlPlane);
    let silent: Vec<&MachineName> = control_plane()
        .filter(|(n, m)| !answers(n, m))
        .map(|(n, _)| n)
        .collect();
    let all = control_plane().count();
    if all == 0 {
        return Verdict::unknown("NoControlPlane", "no Node is a control-plane machine's");
    }
    if silent.is_empty() {
        return Verdict::yes(
            "ApiServersReady",
            match all {
                1 => "the control-plane machine's API server answers".to_owned(),
                _ => format!("an API server answers on each of {all} control-plane machines"),
            },
        );
    }
    Verdict::no(
        "ApiServerNotReady",
        format!("no API server answers on {}", list(&silent)),
    )
}

fn progressing(input: &Input, plan: &Plan) -> Verdict {
    let current = &input.observed.current.version;
    let towards = plan.hops.last().map_or(current, |hop| &hop.version);
    match &plan.state {
        State::Idle if plan.steps.is_empty() && plan.running.is_empty() && plan.waiting.is_empty() => {
            Verdict::no("AsWanted", format!("the cluster runs {current}"))
        }
        State::Idle => Verdict::yes("Settling", doing(plan)),
        State::Preparing => Verdict::yes("Preparing", format!("{current} to {towards}: {}", doing(plan))),
        State::Upgrading => Verdict::yes("Upgrading", format!("{current} to {towards}: {}", doing(plan))),
        State::Reverting => Verdict::yes("Reverting", format!("back to {current}: {}", doing(plan))),
        State::Paused => Verdict::no("Paused", "no new step begins until `spec.paused` is false"),
        State::Failed => {
            let message = input.observed.failure.as_ref().map(failed).unwrap_or_default();
            Verdict::no("Failed", message)
        }
        State::Refused(refusal) => Verdict::no(refusal.reason(), refused(input, refusal)),
    }
}

/// Why nothing is done, with what to do about each thing that preflight found.
fn refused(input: &Input, refusal: &Refusal) -> String {
    let Refusal::Preflight(names) = refusal else {
        return refusal.to_string();
    };
    let findings = input
        .observed
        .findings
        .iter()
        .flatten()
        .filter(|f| names.contains(&f.name));
    let told: Vec<String> = findings
        .take(MOST_LINES)
        .map(|f| format!("{} (`{}`): {}", f.message, f.name, f.hint))
        .collect();
    if told.is_empty() {
        refusal.to_string()
    } else {
        told.join("; ")
    }
}

/// What failed, its last line, and what to do.
fn failed(failure: &Failure) -> String {
    let Failure {
        release,
        component,
        instance,
        message,
        log,
        halted,
        reverted,
        ..
    } = failure;
    let last = log
        .last()
        .map(|line| format!("; its last line: {line}"))
        .unwrap_or_default();
    let next = match (halted, reverted) {
        (true, _) => format!(
            "machines that run {release} go on doing so and no other begins: see to that machine, then raise `spec.attempt`"
        ),
        (false, false) => "everything goes back".into(),
        (false, true) => format!(
            "everything is back as it was: ask for another version, or raise `spec.attempt` to have {release} tried again"
        ),
    };
    format!("{release}: {component} `{instance}`: {message}{last}; {next}")
}

fn degraded(input: &Input, plan: &Plan) -> Verdict {
    let observed = &input.observed;
    // A failure counts as long as what failed is what's wanted.
    if let Some(failure) = &observed.failure
        && (failure.halted || !failure.reverted || plan.state == State::Failed)
    {
        return Verdict::yes("ReleaseFailed", failed(failure));
    }
    if let Some(waiting) = plan.waiting.iter().find(|w| w.needs_person()) {
        return Verdict::yes(waiting.reason(), format!("waiting for {waiting}"));
    }
    let (mut lost, mut unhealthy) = (Vec::new(), Vec::new());
    for (name, machine) in &observed.machines {
        let seconds = input.now.duration_since(machine.ready_since).as_secs();
        let ours = is_switching(machine) || machine.cordoned_by_us.is_some();
        if !machine.ready && !ours && seconds > NOT_READY_SECONDS {
            lost.push(name);
        }
        let updating = || {
            plan.running
                .iter()
                .any(|s| matches!(&s.action, Action::Etcd { machine, .. } if machine == name))
        };
        if machine.etcd.as_ref().is_some_and(|etcd| !etcd.healthy) && !updating() {
            unhealthy.push(name);
        }
    }
    if !unhealthy.is_empty() {
        let why = observed.machines[unhealthy[0]]
            .etcd
            .as_ref()
            .map(|e| e.message.as_str());
        let why = why
            .filter(|m| !m.is_empty())
            .map(|m| format!(": {m}"))
            .unwrap_or_default();
        return Verdict::yes(
            "EtcdUnhealthy",
            format!("the etcd members of {} are not healthy{why}", list(&unhealthy)),
        );
    }
    if !lost.is_empty() {
        return Verdict::yes("MachinesNotReady", format!("not Ready: {}", list(&lost)));
    }
    Verdict::no(AS_EXPECTED, "")
}

fn upgradeable(input: &Input, plan: &Plan) -> Verdict {
    match &plan.state {
        State::Refused(refusal) => return Verdict::no(refusal.reason(), refused(input, refusal)),
        State::Failed => {
            let message = input.observed.failure.as_ref().map(failed).unwrap_or_default();
            return Verdict::no("ReleaseFailed", message);
        }
        State::Upgrading | State::Reverting => return Verdict::no("InProgress", "a change is under way"),
        State::Paused if input.observed.hop_started.is_some() => {
            return Verdict::no("InProgress", "a change is under way, and paused");
        }
        State::Idle | State::Preparing | State::Paused => {}
    }
    let force = &input.wanted.force;
    let stops = input
        .observed
        .findings
        .iter()
        .flatten()
        .filter(|f| f.blocks && !force.contains(&f.name));
    let names: Vec<String> = stops.map(|f| f.name.clone()).collect();
    if !names.is_empty() {
        return Verdict::no("Preflight", refused(input, &Refusal::Preflight(names)));
    }
    if plan.state == State::Preparing && input.observed.findings.is_none() {
        return Verdict::unknown("Preflight", "preflight has not been asked yet");
    }
    Verdict::yes(AS_EXPECTED, "")
}

#[cfg(test)]
mod tests;
