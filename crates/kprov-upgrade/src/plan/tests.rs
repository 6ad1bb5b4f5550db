//! Rule by rule: what is done, what is waited for, and what never is.

mod back;
mod machines;

use kprov_types::api::{Finding, MachineFailure, MaxUnavailable, PoolPolicy};
use kprov_types::{MachineName, Role};

use super::*;
use crate::effects;
use crate::model::{Drain, MachineSeen, Staged, Workload};
use crate::testing::{cluster, epoch, later, machine, name, pod, release};

fn upgrade(from: &str, to: &str) -> Input {
    let mut input = cluster(from, &[to], 3, 4);
    input.wanted.desired = to.to_owned();
    input
}

/// Plans and does each step until one's id ends so, which is not done.
fn until(mut input: Input, id: &str) -> Input {
    for _ in 0..200 {
        let plan = plan(&input);
        if plan.steps.iter().any(|step| step.id.ends_with(id)) {
            return input;
        }
        let soak = plan
            .waiting
            .iter()
            .any(|waiting| matches!(waiting, Waiting::Soak { .. }));
        assert!(soak || !plan.steps.is_empty(), "`{id}` is never planned: {plan:#?}");
        for step in &plan.steps {
            effects::apply(&mut input.observed, &step.action, input.now);
        }
        input.now += jiff::SignedDuration::from_secs(if soak { 10 } else { 1 });
    }
    panic!("`{id}` is never planned");
}

/// The same, and that step's pass is done too.
fn after(input: Input, id: &str) -> Input {
    let mut input = until(input, id);
    for step in plan(&input).steps {
        effects::apply(&mut input.observed, &step.action, input.now);
    }
    input
}

fn ids(plan: &Plan) -> Vec<&str> {
    plan.steps.iter().map(|step| step.id.as_str()).collect()
}

fn reasons(plan: &Plan) -> Vec<&'static str> {
    plan.waiting.iter().map(Waiting::reason).collect()
}

fn words(plan: &Plan) -> Vec<String> {
    plan.waiting.iter().map(ToString::to_string).collect()
}

fn m<'a>(input: &'a mut Input, of: &str) -> &'a mut MachineSeen {
    input.observed.machines.get_mut(&name(of)).unwrap()
}

#[test]
fn a_cluster_as_wanted_needs_nothing() {
    let plan = plan(&cluster("1.36.3", &[], 3, 2));
    assert_eq!(plan.state, State::Idle);
    assert!(plan.hops.is_empty() && plan.steps.is_empty() && plan.running.is_empty() && plan.waiting.is_empty());
}

#[test]
fn nothing_begins_before_preflight() {
    let mut input = upgrade("1.35.6", "1.36.3");
    input.observed.findings = None;
    let asked = plan(&input);
    assert_eq!((asked.state.clone(), ids(&asked).len()), (State::Preparing, 0));
    assert_eq!(words(&asked), ["preflight for 1.36.3"]);
    let finding = |name: &str, blocks| Finding {
        name: name.to_owned(),
        blocks,
        message: String::new(),
        hint: String::new(),
    };
    input.observed.findings = Some(vec![
        finding("certificate", false),
        finding("removed-api/x", true),
        finding("disk", true),
    ]);
    input.wanted.force.insert("disk".to_owned());
    let refused = plan(&input);
    assert_eq!(
        refused.state,
        State::Refused(Refusal::Preflight(vec!["removed-api/x".to_owned()]))
    );
    assert!(refused.steps.is_empty());
    input.wanted.force.insert("removed-api/x".to_owned());
    assert_eq!(ids(&plan(&input)), ["1.36.3/begin/cluster"]);
    // What is found while nothing has changed yet still stops it; later it does not.
    let mut input = until(upgrade("1.35.6", "1.36.3"), "roll/kube-apiserver");
    input.observed.findings = Some(vec![finding("disk", true)]);
    assert!(matches!(plan(&input).state, State::Refused(_)));
    let mut input = after(input_without(input, "disk"), "roll/kube-apiserver");
    input.observed.findings = Some(vec![finding("disk", true)]);
    assert_eq!(plan(&input).state, State::Upgrading);
}

fn input_without(mut input: Input, finding: &str) -> Input {
    input.wanted.force.insert(finding.to_owned());
    input
}

#[test]
fn refused_versions_change_nothing() {
    for (desired, reason) in [
        ("1.36", "MalformedVersion"),
        ("1.34.9", "Downgrade"),
        ("1.19.0", "UnsupportedVersion"),
        ("1.36.9", "NoRelease"),
        ("1.37.0", "NoRelease"),
    ] {
        let mut input = upgrade("1.35.6", "1.36.3");
        input.wanted.desired = desired.to_owned();
        let plan = plan(&input);
        let State::Refused(refusal) = &plan.state else {
            panic!("{desired}: {plan:?}");
        };
        assert_eq!(refusal.reason(), reason);
        assert!(plan.steps.is_empty() && plan.hops.is_empty());
    }
}

#[test]
fn everything_is_fetched_before_anything_changes() {
    let mut input = after(upgrade("1.35.6", "1.36.3"), "stage/1.36.3");
    m(&mut input, "w-2")
        .staged
        .insert(release("1.36.3").digest, Staged::Fetching("kube-proxy".to_owned()));
    // A worker that isn't Ready is told, and not waited for.
    let dead = m(&mut input, "w-3");
    (dead.ready, dead.staged) = (false, std::collections::BTreeMap::new());
    let plan = plan(&input);
    assert_eq!(plan.state, State::Preparing);
    assert!(plan.steps.is_empty());
    assert_eq!(words(&plan), ["1 machine to fetch 1.36.3; `w-2`: kube-proxy"]);
    assert_eq!(plan.running.len(), 1);
}

#[test]
fn the_snapshot_comes_before_the_first_change() {
    let mut input = until(upgrade("1.35.6", "1.36.3"), "snapshot/cp-1");
    m(&mut input, "cp-1").etcd.as_mut().unwrap().healthy = false;
    m(&mut input, "cp-1").etcd.as_mut().unwrap().message = "no leader".to_owned();
    assert_eq!(
        words(&plan(&input)),
        ["the etcd member of `cp-1` to be healthy: no leader"]
    );
    m(&mut input, "cp-1").etcd.as_mut().unwrap().healthy = true;
    m(&mut input, "cp-1").snapshot_ordered = Some("before-1.36.3-20260412t092000z".to_owned());
    assert_eq!(reasons(&plan(&input)), ["Snapshot"]);
    // The machine that was asked is gone: another is.
    m(&mut input, "cp-1").ready = false;
    assert_eq!(ids(&plan(&input)), ["1.36.3/snapshot/cp-2"]);
}

#[test]
fn without_a_machine_to_take_the_snapshot_it_says_what_it_waits_for() {
    let mut input = until(upgrade("1.35.6", "1.36.3"), "/snapshot/cp-1");
    for machine in ["cp-1", "cp-2", "cp-3"] {
        m(&mut input, machine).ready = false;
    }
    let waits = plan(&input);
    assert_eq!((waits.state.clone(), ids(&waits).len()), (State::Preparing, 0));
    assert_eq!(reasons(&waits), ["MachineNotReady"]);
    // One that is Ready does.
    m(&mut input, "cp-3").ready = true;
    assert!(ids(&plan(&input))[0].ends_with("/snapshot/cp-3"));
    input.observed.machines.retain(|_, m| m.role == Role::Worker);
    assert_eq!(reasons(&plan(&input)), ["PodMissing"]);
}

#[test]
fn controller_manager_waits_for_the_last_old_api_server() {
    let mut input = after(upgrade("1.35.6", "1.36.3"), "roll/kube-apiserver");
    assert_eq!(
        ids(&plan(&input)),
        ["1.36.3/roll/kube-controller-manager", "1.36.3/roll/kube-scheduler"]
    );
    let seen = input.observed.workloads.get_mut(&Workload::ApiServer).unwrap();
    let mut old = pod(
        Workload::ApiServer,
        7,
        Some(&name("cp-3")),
        &release("1.35.6"),
        1,
        epoch(),
        true,
    );
    old.leaving = true;
    seen.instances.push(old);
    let plan = plan(&input);
    assert!(plan.steps.is_empty());
    assert_eq!(
        words(&plan),
        ["1 old pod of `kube-apiserver` to end, such as `kube-apiserver-1-35-6-7`"]
    );
    assert_eq!(plan.running[0].id, "1.36.3/roll/kube-apiserver");
}

#[test]
fn a_control_plane_machine_without_an_api_server_is_missed() {
    let mut input = after(upgrade("1.35.6", "1.36.3"), "roll/kube-apiserver");
    let seen = input.observed.workloads.get_mut(&Workload::ApiServer).unwrap();
    seen.instances[2].machine = Some(name("cp-1"));
    assert_eq!(words(&plan(&input)), ["1 pod of `kube-apiserver` to be made on `cp-3`"]);
}

#[test]
fn machines_wait_for_standbys_and_for_etcd() {
    let mut input = after(upgrade("1.35.6", "1.36.3"), "standby/cp-1");
    m(&mut input, "cp-2").standby.as_mut().unwrap().release = Some(release("1.35.6"));
    assert_eq!(
        words(&plan(&input)),
        ["the standby control plane of `cp-2` to become 1.36.3"]
    );
    let mut input = until(upgrade("1.35.6", "1.36.3"), "etcd/cp-2");
    assert_eq!(ids(&plan(&input)), ["1.36.3/etcd/cp-2"], "one at a time");
    m(&mut input, "cp-1").etcd.as_mut().unwrap().healthy = false;
    assert_eq!(reasons(&plan(&input)), ["EtcdUnhealthy"]);
}

fn draining(blocked: &[&str]) -> Input {
    let mut input = after(upgrade("1.35.6", "1.36.3"), "cordon/w-1");
    m(&mut input, "w-1").cordoned_by_us = Some(input.now);
    m(&mut input, "w-1").drain = Some(Drain {
        remaining: ["default/web-1".to_owned(), "default/web-2".to_owned()].into(),
        blocked: blocked.iter().map(|&text| text.to_owned()).collect(),
        leaving: 0,
    });
    input
}

#[test]
fn a_hop_on_the_way_leaves_machines_alone_unless_skew_needs_them() {
    // 1.34 kubelets are good for 1.37's API servers.
    let minors = ["1.35.1", "1.36.1", "1.37.1", "1.38.1"];
    let mut input = cluster("1.34.1", &minors, 1, 2);
    input.wanted.desired = "1.38.1".to_owned();
    let runs = |input: &Input, machine: &str| input.observed.machines[&name(machine)].kubelet.to_string();
    let at = |input: Input, hop: &str| after(input, &format!("{hop}/finish/cluster"));
    let input = at(input, "1.35.1");
    assert_eq!(plan(&input).hops.len(), 3);
    let input = at(input, "1.36.1");
    assert_eq!(runs(&input, "w-1"), "1.34.1");
    let proxy = &input.observed.workloads[&Workload::Proxy];
    assert_eq!(proxy.template, release("1.34.1"));
    let input = at(input, "1.37.1");
    assert_eq!(
        (runs(&input, "w-1"), runs(&input, "cp-1")),
        ("1.37.1".to_owned(), "1.37.1".to_owned())
    );
    assert_eq!(input.observed.workloads[&Workload::Proxy].template, release("1.37.1"));
    let input = at(input, "1.38.1");
    assert_eq!(runs(&input, "w-2"), "1.38.1");
    assert_eq!(plan(&input).state, State::Idle);
    // Before 1.28, it's two minors.
    let mut input = cluster("1.24.1", &["1.25.1", "1.26.1", "1.27.1"], 1, 1);
    input.wanted.desired = "1.27.1".to_owned();
    let input = at(at(input, "1.25.1"), "1.26.1");
    assert_eq!(runs(&input, "w-1"), "1.26.1");
}

#[test]
fn edits_in_the_middle_of_a_hop() {
    let mut input = cluster("1.34.9", &["1.34.10", "1.35.5", "1.35.6", "1.36.3"], 1, 1);
    input.wanted.desired = "1.35.6".to_owned();
    let input = after(input, "1.35.6/roll/kube-apiserver");
    let wanting = |desired: &str| {
        let mut input = input.clone();
        input.wanted.desired = desired.to_owned();
        plan(&input)
    };
    assert_eq!(
        wanting("1.36.3").hops,
        [release("1.35.6"), release("1.36.3")],
        "it leads there"
    );
    assert_eq!(wanting("1.34.9").state, State::Reverting);
    for elsewhere in ["1.34.10", "1.35.5"] {
        let plan = wanting(elsewhere);
        assert!(matches!(plan.state, State::Refused(Refusal::MidHop(_))), "{elsewhere}");
        assert!(plan.steps.is_empty());
    }
    assert!(matches!(wanting("1.37.0").state, State::Refused(Refusal::NoRelease(_))));
    // Begun, and nothing changed yet: to go nowhere is to forget it.
    let mut input = cluster("1.34.9", &["1.35.6"], 1, 1);
    input.observed.hop_started = Some(epoch());
    assert_eq!(ids(&plan(&input)), ["1.34.9/finish/cluster"]);
}

#[test]
fn pause_lets_what_runs_end() {
    let mut input = until(upgrade("1.35.6", "1.36.3"), "uncordon/w-1");
    input.wanted.paused = true;
    let paused = plan(&input);
    assert_eq!(
        (paused.state.clone(), ids(&paused)),
        (State::Paused, vec!["1.36.3/uncordon/w-1"])
    );
    let mut input = draining(&[]);
    input.wanted.paused = true;
    assert!(plan(&input).steps.is_empty(), "no more evictions");
    let mut input = upgrade("1.35.6", "1.36.3");
    input.wanted.paused = true;
    assert_eq!(plan(&input).state, State::Paused);
    input.wanted.desired = "1.35.6".to_owned();
    assert_eq!(plan(&input).state, State::Idle, "there is nothing to hold");
}

#[test]
fn before_daemon_sets_surge_the_standby_covers_each_swap() {
    let mut input = cluster("1.20.2", &["1.21.14"], 2, 0);
    input.wanted.desired = "1.21.14".to_owned();
    let mut input = after(input, "standby-serve/cp-1");
    let standby = |input: &mut Input, ready| m(input, "cp-1").standby.as_mut().unwrap().api_ready = ready;
    standby(&mut input, false);
    assert_eq!(reasons(&plan(&input)), ["StandbyStarting"]);
    standby(&mut input, true);
    assert_eq!(ids(&plan(&input)), ["1.21.14/replace/kube-apiserver-cp-1"]);
    let mut input = after(input, "replace/kube-apiserver-cp-1");
    let seen = input.observed.workloads.get_mut(&Workload::ApiServer).unwrap();
    let made = seen.instances.remove(0);
    assert_eq!(
        words(&plan(&input))[0],
        "1 pod of `kube-apiserver` to be made on `cp-1`"
    );
    input
        .observed
        .workloads
        .get_mut(&Workload::ApiServer)
        .unwrap()
        .instances
        .insert(0, made);
    assert_eq!(ids(&plan(&input)), ["1.21.14/standby-stop/cp-1"]);
    let input = after(input, "standby-stop/cp-1");
    assert_eq!(
        ids(&plan(&input)),
        ["1.21.14/standby-serve/cp-2"],
        "one machine at a time"
    );
}

#[test]
fn every_waiting_has_a_word_of_its_own() {
    let machine: MachineName = name("m");
    let all = [
        Waiting::Silent {
            machine: machine.clone(),
        },
        Waiting::Pods {
            machine: machine.clone(),
        },
        Waiting::StandbyServes {
            machine: machine.clone(),
        },
        Waiting::StandbyStops { machine },
        Waiting::NoWorkload {
            workload: Workload::ApiServer,
        },
        Waiting::Controller {
            workload: Workload::ApiServer,
        },
    ];
    let reasons: std::collections::BTreeSet<_> = all.iter().map(Waiting::reason).collect();
    assert_eq!(reasons.len(), all.len());
    assert!(reasons.iter().all(|reason| reason.chars().all(char::is_alphanumeric)));
}
