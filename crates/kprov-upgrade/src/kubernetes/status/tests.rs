use kprov_types::Digest;
use kprov_types::api::{Finding, MachineFailure, ReleaseRef, UpdatePolicy};

use super::*;
use crate::model::{Drain, EtcdSeen, Instance, Observed, StandbySeen, Wanted};
use crate::plan::{Step, Waiting};

fn release(version: &str) -> ReleaseRef {
    ReleaseRef {
        version: version.parse().unwrap(),
        digest: Digest::from_bytes([1; 32]),
    }
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_000_000 + second).unwrap()
}

fn name(name: &str) -> MachineName {
    MachineName::new(name).unwrap()
}

fn machine(role: Role) -> MachineSeen {
    let control_plane = role == Role::ControlPlane;
    MachineSeen {
        role,
        pool: "default".into(),
        ready: true,
        ready_since: at(0),
        cordoned: false,
        cordoned_by_us: None,
        kubelet: "1.35.6".parse().unwrap(),
        running: Some(release("1.35.6")),
        ordered: None,
        order_seen: true,
        failure: None,
        stage_ordered: BTreeSet::new(),
        staged: BTreeMap::new(),
        etcd: control_plane.then(|| EtcdSeen {
            image: "kprov.local/etcd:v3.5.30@sha256:00".into(),
            ordered: None,
            healthy: true,
            message: String::new(),
        }),
        standby: control_plane.then_some(StandbySeen {
            release: None,
            ordered: None,
            serve_ordered: false,
            api_ready: false,
        }),
        snapshots: BTreeSet::new(),
        snapshot_ordered: None,
        drain: None,
    }
}

fn instance(machine: &str, version: &str, ready: bool) -> Instance {
    Instance {
        name: format!("kube-apiserver-{machine}-{version}"),
        machine: Some(name(machine)),
        release: release(version),
        revision: 2,
        created: at(0),
        ready,
        ready_since: at(0),
        leaving: false,
        trouble: None,
    }
}

/// One control-plane machine and one worker, all well, on 1.35.6.
fn input() -> Input {
    let servers = WorkloadSeen {
        template: release("1.35.6"),
        image: String::new(),
        previous: None,
        revision: 2,
        rolled: None,
        wanted: 1,
        settled: true,
        automatic: true,
        instances: vec![instance("a", "1.35.6", true)],
    };
    Input {
        wanted: Wanted {
            desired: "1.36.3".into(),
            paused: false,
            policy: UpdatePolicy::default(),
            force: BTreeSet::new(),
            attempt: 0,
        },
        observed: Observed {
            current: release("1.35.6"),
            hop_started: None,
            failure: None,
            releases: Vec::new(),
            workloads: BTreeMap::from([(Workload::ApiServer, servers)]),
            machines: BTreeMap::from([
                (name("a"), machine(Role::ControlPlane)),
                (name("b"), machine(Role::Worker)),
            ]),
            findings: None,
        },
        now: at(100),
    }
}

fn plan(state: State) -> Plan {
    Plan {
        state,
        hops: Vec::new(),
        steps: Vec::new(),
        running: Vec::new(),
        waiting: Vec::new(),
    }
}

fn upgrading() -> Plan {
    Plan {
        hops: vec![release("1.36.3")],
        steps: vec![Step {
            id: "1.36.3/cordon/b".into(),
            message: "cordon `b`".into(),
            action: Action::Cordon { machine: name("b") },
        }],
        waiting: vec![Waiting::Silent { machine: name("a") }],
        ..plan(State::Upgrading)
    }
}

fn failure() -> Failure {
    Failure {
        release: release("1.36.3"),
        attempt: 0,
        component: "kube-apiserver".into(),
        instance: "kube-apiserver-x".into(),
        message: "it ends again and again".into(),
        log: vec!["starting".into(), "Error: unknown flag: --x".into()],
        time: at(50),
        halted: false,
        reverted: false,
    }
}

fn rendered(input: &Input, plan: &Plan) -> VersionUpdateStatus {
    render(input, plan, &VersionUpdateStatus::default(), 7)
}

/// Status, reason and message of a condition.
fn said<'a>(status: &'a VersionUpdateStatus, kind: &str) -> (&'a str, &'a str, &'a str) {
    let found = status.conditions.iter().find(|c| c.kind == kind).unwrap();
    (&found.status, &found.reason, &found.message)
}

#[test]
fn a_cluster_that_is_as_wanted() {
    let status = rendered(&input(), &plan(State::Idle));
    assert_eq!(
        (
            status.phase.as_str(),
            status.message.as_str(),
            status.observed_generation
        ),
        ("Idle", "", 7)
    );
    assert_eq!(status.current_version.as_deref(), Some("1.35.6"));
    assert_eq!(said(&status, "Available").0, "True");
    assert_eq!(
        said(&status, "Progressing"),
        ("False", "AsWanted", "the cluster runs 1.35.6")
    );
    assert_eq!(said(&status, "Degraded").0, "False");
    assert_eq!(said(&status, "Upgradeable").0, "True");
    assert_eq!(status.components["kube-apiserver"].versions, ["1.35.6"]);
    let etcd = &status.components["etcd"];
    assert_eq!(
        (etcd.versions.as_slice(), etcd.ready, etcd.wanted),
        (["3.5.30".to_owned()].as_slice(), 1, 1)
    );
    assert_eq!(status.kubelets, BTreeMap::from([("1.35.6".to_owned(), 2)]));
    assert_eq!(status.nodes["b"].message, "");
}

#[test]
fn rendering_again_changes_nothing_and_keeps_times() {
    let mut later = input();
    let first = rendered(&input(), &upgrading());
    assert_eq!(first.steps[0].since, at(100));
    later.now = at(130);
    let second = render(&later, &upgrading(), &first, 7);
    assert_eq!(second, first);
    // A condition that turns gets another time, one that only says something else does not.
    later
        .observed
        .workloads
        .get_mut(&Workload::ApiServer)
        .unwrap()
        .instances[0]
        .ready = false;
    let third = render(&later, &upgrading(), &first, 7);
    let time = |status: &VersionUpdateStatus, kind: &str| {
        status
            .conditions
            .iter()
            .find(|c| c.kind == kind)
            .unwrap()
            .last_transition_time
    };
    assert_eq!(time(&third, "Available"), at(130));
    assert_eq!(time(&third, "Progressing"), at(100));
    assert_eq!(
        said(&third, "Available"),
        ("False", "ApiServerNotReady", "no API server answers on `a`")
    );
}

#[test]
fn what_actions_write_is_left_as_it_stands() {
    let previous = VersionUpdateStatus {
        current_version: Some("1.36.3".into()),
        current_release: Some(Digest::from_bytes([9; 32])),
        hop_started: Some(at(5)),
        failure: Some(failure()),
        ..VersionUpdateStatus::default()
    };
    let status = render(&input(), &upgrading(), &previous, 1);
    assert_eq!(status.current_version, previous.current_version);
    assert_eq!(status.current_release, previous.current_release);
    assert_eq!(
        (status.hop_started, status.failure),
        (previous.hop_started, previous.failure)
    );
}

#[test]
fn each_state_has_a_phase_and_words() {
    let words = |state: State, change: fn(&mut Input)| {
        let mut input = input();
        change(&mut input);
        let status = rendered(&input, &Plan { state, ..upgrading() });
        let (progressing, reason, message) = said(&status, "Progressing");
        (
            status.phase.clone(),
            status.message.clone(),
            format!("{progressing}/{reason}/{message}"),
        )
    };
    let (phase, message, progressing) = words(State::Upgrading, |_| ());
    assert_eq!(phase, "Upgrading");
    assert_eq!(message, "cordon `b`; waiting for machine `a` to tell what it runs");
    assert_eq!(progressing, format!("True/Upgrading/1.35.6 to 1.36.3: {message}"));
    assert_eq!(words(State::Preparing, |_| ()).0, "Preflight");
    assert!(
        words(State::Reverting, |_| ())
            .2
            .starts_with("True/Reverting/back to 1.35.6: ")
    );
    assert!(words(State::Paused, |_| ()).2.starts_with("False/Paused/"));
    assert!(words(State::Idle, |_| ()).2.starts_with("True/Settling/"));
    let refusal = Refusal::Downgrade("1.34.9 is a minor behind".into());
    let (phase, message, progressing) = words(State::Refused(refusal), |_| ());
    assert_eq!(
        (phase.as_str(), message.as_str()),
        ("Blocked", "1.34.9 is a minor behind")
    );
    assert_eq!(progressing, "False/Downgrade/1.34.9 is a minor behind");
    let (phase, message, _) = words(State::Failed, |input| {
        input.observed.failure = Some(Failure {
            reverted: true,
            ..failure()
        });
    });
    assert_eq!(phase, "Failed");
    assert_eq!(
        message,
        "1.36.3: kube-apiserver `kube-apiserver-x`: it ends again and again; its last line: Error: unknown flag: --x; \
         everything is back as it was: ask for another version, or raise `spec.attempt` to have 1.36.3 tried again"
    );
}

#[test]
fn what_blocks_says_what_to_do() {
    let mut input = input();
    let finding = |name: &str, blocks: bool| Finding {
        name: name.into(),
        blocks,
        message: format!("found {name}"),
        hint: format!("mend {name}"),
    };
    input.observed.findings = Some(vec![finding("a", true), finding("b", true), finding("c", false)]);
    input.wanted.force.insert("b".into());
    let blocked = Plan {
        state: State::Refused(Refusal::Preflight(vec!["a".into()])),
        ..upgrading()
    };
    let status = rendered(&input, &blocked);
    assert_eq!(status.message, "found a (`a`): mend a");
    assert_eq!(
        said(&status, "Upgradeable"),
        ("False", "Preflight", "found a (`a`): mend a")
    );
    assert_eq!(status.findings.len(), 3);
    let idle = rendered(&input, &plan(State::Idle));
    assert_eq!(said(&idle, "Upgradeable").2, "found a (`a`): mend a");
    // They stay while the change is made, and go with it.
    input.observed.findings = None;
    assert_eq!(render(&input, &upgrading(), &status, 1).findings.len(), 3);
    assert!(render(&input, &plan(State::Idle), &status, 1).findings.is_empty());
}

/// What is so, and the reason that Degraded gives.
type Case = (&'static str, fn(&mut Input, &mut Plan), &'static str);

fn what_may_be_wrong() -> [Case; 9] {
    [
        (
            "a failure",
            |i, _| i.observed.failure = Some(failure()),
            "ReleaseFailed",
        ),
        (
            "an old failure",
            |i, _| {
                i.observed.failure = Some(Failure {
                    reverted: true,
                    ..failure()
                });
            },
            "AsExpected",
        ),
        (
            "a halted rollout",
            |i, _| {
                i.observed.failure = Some(Failure {
                    halted: true,
                    reverted: true,
                    ..failure()
                });
            },
            "ReleaseFailed",
        ),
        (
            "a lost machine",
            |i, _| i.observed.machines.get_mut(&name("b")).unwrap().ready = false,
            "MachinesNotReady",
        ),
        (
            "a machine that restarts",
            |i, _| {
                let b = i.observed.machines.get_mut(&name("b")).unwrap();
                b.ready = false;
                b.ready_since = i.now;
            },
            "AsExpected",
        ),
        (
            "a machine that switches",
            |i, _| {
                let b = i.observed.machines.get_mut(&name("b")).unwrap();
                b.ready = false;
                b.ordered = Some((release("1.36.3"), at(0)));
            },
            "AsExpected",
        ),
        (
            "etcd",
            |i, _| {
                i.observed
                    .machines
                    .get_mut(&name("a"))
                    .unwrap()
                    .etcd
                    .as_mut()
                    .unwrap()
                    .healthy = false;
            },
            "EtcdUnhealthy",
        ),
        (
            "etcd that is replaced",
            |i, p| {
                i.observed
                    .machines
                    .get_mut(&name("a"))
                    .unwrap()
                    .etcd
                    .as_mut()
                    .unwrap()
                    .healthy = false;
                p.running.push(Step {
                    id: String::new(),
                    message: String::new(),
                    action: Action::Etcd {
                        machine: name("a"),
                        to: release("1.36.3"),
                    },
                });
            },
            "AsExpected",
        ),
        (
            "a drain that takes too long",
            |_, p| {
                p.waiting.push(Waiting::DrainOverdue {
                    machine: name("b"),
                    pods: 1,
                    blocked: String::new(),
                    seconds: 700,
                });
            },
            "DrainOverdue",
        ),
    ]
}

#[test]
fn degraded_is_what_needs_a_person() {
    for (case, change, reason) in what_may_be_wrong() {
        let (mut input, mut plan) = (input(), plan(State::Idle));
        change(&mut input, &mut plan);
        let status = rendered(&input, &plan);
        assert_eq!(said(&status, "Degraded").1, reason, "{case}");
        assert_eq!(said(&status, "Degraded").0 == "True", reason != "AsExpected", "{case}");
    }
}

#[test]
fn the_standby_counts_for_availability() {
    let mut input = input();
    input
        .observed
        .workloads
        .get_mut(&Workload::ApiServer)
        .unwrap()
        .instances[0]
        .ready = false;
    input
        .observed
        .machines
        .get_mut(&name("a"))
        .unwrap()
        .standby
        .as_mut()
        .unwrap()
        .api_ready = true;
    assert_eq!(said(&rendered(&input, &upgrading()), "Available").0, "True");
    input.observed.machines.remove(&name("a"));
    assert_eq!(said(&rendered(&input, &upgrading()), "Available").0, "Unknown");
}

#[test]
fn machines_say_what_is_done_with_them() {
    type Case = (fn(&mut MachineSeen), &'static str);
    let cases: [Case; 7] = [
        (|_| (), ""),
        (|m| m.cordoned = true, "cordoned by somebody else"),
        (
            |m| {
                m.cordoned = true;
                m.cordoned_by_us = Some(at(90));
                m.drain = Some(Drain {
                    remaining: BTreeSet::from(["shop/web".to_owned()]),
                    blocked: vec!["a budget".into()],
                    leaving: 0,
                });
            },
            "1 pods have to leave; a budget",
        ),
        (
            |m| {
                m.cordoned = true;
                m.cordoned_by_us = Some(at(90));
            },
            "cordoned for the update",
        ),
        (
            |m| m.ordered = Some((release("1.36.3"), at(0))),
            "switches to 1.36.3 since 1970-01-12T13:46:40Z",
        ),
        (|m| m.ready = false, "not Ready for 1 min"),
        (
            |m| {
                m.failure = Some(MachineFailure {
                    release: release("1.36.3"),
                    order: 1,
                    message: "kubelet ended".into(),
                    log: Vec::new(),
                    time: at(0),
                });
            },
            "went back from 1.36.3: kubelet ended",
        ),
    ];
    for (change, message) in cases {
        let mut input = input();
        change(input.observed.machines.get_mut(&name("b")).unwrap());
        assert_eq!(rendered(&input, &upgrading()).nodes["b"].message, message);
    }
}

#[test]
fn of_many_machines_only_the_interesting_are_told() {
    let mut input = input();
    for i in 0..600 {
        input
            .observed
            .machines
            .insert(name(&format!("w{i}")), machine(Role::Worker));
    }
    input.observed.machines.get_mut(&name("w7")).unwrap().cordoned = true;
    let status = rendered(&input, &upgrading());
    assert_eq!(status.nodes.keys().collect::<Vec<_>>(), ["w7"]);
    assert_eq!(status.kubelets["1.35.6"], 602);
    let mut plan = upgrading();
    plan.waiting = vec![Waiting::Silent { machine: name("a") }; 50];
    let waiting = rendered(&input, &plan).waiting;
    assert_eq!((waiting.len(), waiting[20].message.as_str()), (21, "30 more"));
}

#[test]
fn what_is_worth_an_event() {
    let reasons = |before: &VersionUpdateStatus, after: &VersionUpdateStatus| -> Vec<&str> {
        notes(before, after).into_iter().map(|note| note.reason).collect()
    };
    let idle = rendered(&input(), &plan(State::Idle));
    let mut held = input();
    held.wanted.paused = true;
    let paused = rendered(
        &held,
        &Plan {
            state: State::Paused,
            ..upgrading()
        },
    );
    let blocked = |refusal| rendered(&input(), &plan(State::Refused(refusal)));
    let preflight = blocked(Refusal::Preflight(vec!["a".into()]));
    let downgrade = blocked(Refusal::Downgrade("no".into()));
    assert_eq!(reasons(&idle, &idle), [""; 0]);
    assert_eq!(reasons(&idle, &paused), ["Paused"]);
    assert_eq!(reasons(&paused, &idle), ["Resumed"]);
    assert_eq!(reasons(&idle, &preflight), ["PreflightBlocked"]);
    assert_eq!(reasons(&preflight, &preflight), [""; 0]);
    assert_eq!(reasons(&preflight, &downgrade), ["Refused"]);
}
