//! What a planner that errs would do, and that it is found.

use std::collections::BTreeSet;

use kprov_types::Role;
use kprov_types::api::MaxUnavailable;

use super::*;
use crate::effects;
use crate::model::{Action, MachineSeen};
use crate::plan::{State, Step, plan};
use crate::testing::{cluster, epoch, machine, name, pod, release};

fn m<'a>(input: &'a mut Input, of: &str) -> &'a mut MachineSeen {
    input.observed.machines.get_mut(&name(of)).unwrap()
}

/// On the way from 1.35.6 to 1.36.3, where a step of this id is next.
fn at(id: &str) -> Input {
    let mut input = cluster("1.35.6", &["1.36.3"], 3, 4);
    input.wanted.desired = "1.36.3".to_owned();
    for _ in 0..100 {
        let plan = plan(&input);
        if plan.steps.iter().any(|step| step.id.ends_with(id)) {
            return input;
        }
        for step in &plan.steps {
            effects::apply(&mut input.observed, &step.action, input.now);
        }
        input.now += jiff::SignedDuration::from_secs(10);
    }
    panic!("`{id}` is never planned");
}

/// What is found in a plan of these steps.
fn found(input: &Input, actions: Vec<Action>) -> Vec<String> {
    let about = release("1.36.3");
    let plan = Plan {
        state: State::Upgrading,
        hops: vec![about.clone()],
        steps: actions.into_iter().map(|action| Step::new(&about, action)).collect(),
        running: Vec::new(),
        waiting: Vec::new(),
    };
    check_plan(input, &plan).iter().map(ToString::to_string).collect()
}

fn roll(workload: Workload) -> Action {
    Action::Roll {
        workload,
        from: release("1.35.6"),
        to: release("1.36.3"),
    }
}

fn run(machine: &str) -> Action {
    Action::Run {
        machine: name(machine),
        from: Some(release("1.35.6")),
        to: release("1.36.3"),
    }
}

fn cordon(machine: &str) -> Action {
    Action::Cordon { machine: name(machine) }
}

#[test]
fn states_with_skew() {
    let state = |change: &dyn Fn(&mut Observed)| {
        let mut input = cluster("1.35.6", &[], 1, 1);
        change(&mut input.observed);
        let found = check_state(&input.observed);
        found.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert!(state(&|_| {}).is_empty());
    let kubelet = |version: &str| {
        let of = release(version);
        state(&move |observed| observed.machines.get_mut(&name("w-1")).unwrap().kubelet = of.version.clone())
    };
    assert_eq!(
        kubelet("1.36.0"),
        ["kubelet of `w-1` would be 1.36.0 beside API servers of 1.35.6: it must never be newer"]
    );
    assert!(kubelet("1.32.0").is_empty());
    assert_eq!(
        kubelet("1.31.0"),
        ["kubelet of `w-1` would be 1.31.0 beside API servers of 1.35.6: it may be at most 3 minors older"]
    );
    let pod_of = |workload: Workload, version: &str| {
        let of = release(version);
        state(&move |observed| {
            let mut other = pod(workload, 9, None, &of, 9, epoch(), false);
            other.leaving = true;
            observed.workloads.get_mut(&workload).unwrap().instances.push(other);
        })
    };
    assert!(pod_of(Workload::Scheduler, "1.34.0").is_empty());
    assert!(pod_of(Workload::Proxy, "1.32.0").is_empty());
    for (workload, version, rule) in [
        (Workload::Scheduler, "1.33.0", "at most one minor older"),
        (Workload::ControllerManager, "1.36.0", "never be newer"),
        (Workload::Proxy, "1.36.0", "never be newer"),
        (Workload::Proxy, "1.31.0", "at most 3 minors older"),
    ] {
        let found = pod_of(workload, version);
        assert!(found.len() == 1 && found[0].contains(rule), "{found:?}");
    }
    let two_apart = pod_of(Workload::ApiServer, "1.37.0");
    assert!(two_apart.contains(&"API servers would be of 1.35.6 and of 1.37.0, more than a minor apart".to_owned()));
    assert!(two_apart.contains(&"1.37.0 is not of the minor of 1.35.6, nor of the next".to_owned()));
    // A minor back is one too, though it is a minor apart.
    assert!(
        pod_of(Workload::ApiServer, "1.34.0")
            .iter()
            .any(|text| text.starts_with("1.34.0 is not of the minor"))
    );
}

#[test]
fn before_1_28_kubelets_may_be_two_minors_older() {
    let mut input = cluster("1.27.1", &[], 1, 1);
    m(&mut input, "w-1").kubelet = release("1.25.1").version;
    assert!(check_state(&input.observed).is_empty());
    m(&mut input, "w-1").kubelet = release("1.24.1").version;
    assert_eq!(check_state(&input.observed).len(), 1);
    let mut input = cluster("1.28.1", &[], 1, 1);
    m(&mut input, "w-1").kubelet = release("1.25.1").version;
    assert!(check_state(&input.observed).is_empty());
}

#[test]
fn states_in_which_nothing_answers() {
    let mut input = cluster("1.35.6", &[], 3, 0);
    for pod in &mut input
        .observed
        .workloads
        .get_mut(&Workload::ApiServer)
        .unwrap()
        .instances
    {
        pod.ready = false;
    }
    assert_eq!(check_state(&input.observed), [Violation::NoApiServer]);
    m(&mut input, "cp-2").standby.as_mut().unwrap().api_ready = true;
    assert!(check_state(&input.observed).is_empty());
    for machine in ["cp-1", "cp-2"] {
        m(&mut input, machine).etcd.as_mut().unwrap().healthy = false;
    }
    assert_eq!(
        check_state(&input.observed),
        [Violation::NoQuorum { healthy: 1, members: 3 }]
    );
}

#[test]
fn a_newer_kubelet_is_caught() {
    let mut input = at("roll/kube-apiserver");
    m(&mut input, "w-1").cordoned = true;
    let texts = found(&input, vec![run("w-1")]);
    assert!(
        texts.contains(
            &"kubelet of `w-1` would be 1.36.3 beside API servers of 1.35.6: it must never be newer".to_owned()
        )
    );
    assert!(texts.contains(&"`1.36.3/run/w-1` comes too early: no hop to the release is under way".to_owned()));
}

#[test]
fn what_the_first_change_waits_for() {
    let good = at("roll/kube-apiserver");
    let roll = || vec![roll(Workload::ApiServer)];
    assert!(found(&good, roll()).is_empty());
    let early = |change: &dyn Fn(&mut Input)| {
        let mut input = good.clone();
        change(&mut input);
        found(&input, roll())
    };
    let because = |before: &str| vec![format!("`1.36.3/roll/kube-apiserver` comes too early: {before}")];
    assert_eq!(
        early(&|input| input.observed.hop_started = None),
        because("the hop has not begun")
    );
    assert_eq!(
        early(&|input| input.observed.hop_started = Some(epoch())),
        because("there is no etcd snapshot of this hop")
    );
    assert_eq!(
        early(&|input| input.observed.findings = None),
        because("preflight has not been passed")
    );
    assert_eq!(
        early(&|input| m(input, "cp-2").staged.clear()),
        because("the release is not on `cp-2`")
    );
    assert_eq!(
        early(&|input| m(input, "cp-2").etcd.as_mut().unwrap().healthy = false),
        because("the etcd member of `cp-2` is not healthy")
    );
    assert_eq!(
        early(&|input| input.observed.releases[1].verified = Err("no signature".to_owned())),
        ["`1.36.3/roll/kube-apiserver`: the cluster has no verified release 1.36.3"]
    );
}

#[test]
fn parts_out_of_order_are_caught() {
    let mut input = at("roll/kube-controller-manager");
    assert!(found(&input, vec![roll(Workload::Scheduler)]).is_empty());
    let early = found(&input, vec![roll(Workload::Proxy)]);
    assert!(
        early
            .iter()
            .all(|text| text.starts_with("`1.36.3/roll/kube-proxy` comes too early: not all of kube-"))
    );
    assert_eq!(early.len(), 2);
    let api = input.observed.workloads.get_mut(&Workload::ApiServer).unwrap();
    api.instances[2].release = release("1.35.6");
    assert!(found(&input, vec![roll(Workload::Scheduler)]).contains(
        &"`1.36.3/roll/kube-scheduler` comes too early: not all of kube-apiserver is of the release".to_owned()
    ));
    // A hop is not finished before its last machine.
    let finish = Action::Finish {
        release: release("1.36.3"),
    };
    let mut input = at("finish/cluster");
    assert!(found(&input, vec![finish.clone()]).is_empty());
    m(&mut input, "w-4").running = Some(release("1.35.6"));
    assert_eq!(
        found(&input, vec![finish]),
        ["`1.36.3/finish/cluster` comes too early: `w-4` does not run the release"]
    );
}

#[test]
fn api_servers_go_back_last() {
    let back = || {
        vec![Action::RollBack {
            workload: Workload::ApiServer,
            from: release("1.36.3"),
            to: release("1.35.6"),
        }]
    };
    assert!(found(&at("roll/kube-controller-manager"), back()).is_empty());
    let texts = found(&at("cordon/cp-1"), back());
    for what in ["kube-controller-manager", "kube-proxy", "kubelet of `w-1`"] {
        assert!(texts.iter().any(|text| text.contains(what)), "{what}: {texts:?}");
    }
}

#[test]
fn too_much_at_a_time_is_caught() {
    let mut input = at("cordon/w-2");
    input.wanted.policy.max_unavailable = MaxUnavailable::Count(2);
    assert!(found(&input, vec![cordon("w-2"), cordon("w-3")]).is_empty());
    assert_eq!(
        found(&input, vec![cordon("w-2"), cordon("w-3"), cordon("w-4")]),
        ["3 machines of pool `worker` would be out of service, of at most 2"]
    );
    m(&mut input, "w-1").ready = false;
    input.wanted.policy.canary = 0;
    assert_eq!(found(&input, vec![cordon("w-2"), cordon("w-3")]).len(), 1);
    assert!(
        found(&input, Vec::new()).is_empty(),
        "what is so already is not the plan's doing"
    );
    let input = at("cordon/cp-1");
    assert!(
        found(&input, vec![cordon("cp-1"), cordon("cp-2")])
            .contains(&"2 control-plane machines would be out of service at a time".to_owned())
    );
}

#[test]
fn a_control_plane_that_is_not_well_is_left_alone() {
    let mut input = at("cordon/cp-1");
    assert!(found(&input, vec![cordon("cp-1")]).is_empty());
    m(&mut input, "cp-3").etcd.as_mut().unwrap().healthy = false;
    assert_eq!(
        found(&input, vec![cordon("cp-1")]),
        ["`1.36.3/cordon/cp-1` comes too early: the control plane on `cp-3` is not well"]
    );
}

#[test]
fn canaries_that_were_passed_over_are_caught() {
    let input = at("cordon/w-1");
    assert!(found(&input, vec![cordon("w-1")]).is_empty());
    for others in [vec![cordon("cp-1")], vec![cordon("w-1"), cordon("w-2")]] {
        let texts = found(&input, others);
        assert!(
            texts
                .iter()
                .any(|text| text.ends_with("canaries have not run well for long enough")),
            "{texts:?}"
        );
    }
}

#[test]
fn machines_switch_only_when_all_is_prepared() {
    let mut input = at("run/w-1");
    assert!(found(&input, vec![run("w-1")]).is_empty());
    m(&mut input, "w-1").staged.clear();
    m(&mut input, "w-1").cordoned = false;
    m(&mut input, "cp-3").standby.as_mut().unwrap().release = Some(release("1.35.6"));
    let because = |before: &str| format!("`1.36.3/run/w-1` comes too early: {before}");
    assert_eq!(
        found(&input, vec![run("w-1")]),
        [
            because("the release is not on `w-1`"),
            because("the standby control plane of `cp-3` is of another release"),
            because("`w-1` is not cordoned"),
        ]
    );
}

#[test]
fn etcd_members_change_one_at_a_time() {
    let etcd = |machine: &str| Action::Etcd {
        machine: name(machine),
        to: release("1.36.3"),
    };
    let mut input = at("etcd/cp-1");
    assert!(found(&input, vec![etcd("cp-1")]).is_empty());
    assert_eq!(found(&input, vec![etcd("cp-1"), etcd("cp-2")]).len(), 1);
    m(&mut input, "cp-3").etcd.as_mut().unwrap().healthy = false;
    let texts = found(&input, vec![etcd("cp-1")]);
    assert!(
        texts
            .iter()
            .any(|text| text.contains("beside the unhealthy one of `cp-3`")),
        "{texts:?}"
    );
}

#[test]
fn the_only_api_server_is_never_deleted() {
    let mut input = cluster("1.20.2", &["1.21.14"], 1, 0);
    let replace = Action::Replace {
        workload: Workload::ApiServer,
        pod: input.observed.workloads[&Workload::ApiServer].instances[0].name.clone(),
        machine: name("cp-1"),
    };
    let texts = found(&input, vec![replace.clone()]);
    assert!(texts.contains(&"no API server would answer".to_owned()));
    let standby = m(&mut input, "cp-1").standby.as_mut().unwrap();
    (standby.serve_ordered, standby.api_ready) = (true, true);
    assert!(found(&input, vec![replace.clone()]).is_empty());
    let stop = Action::Standby {
        machine: name("cp-1"),
        release: release("1.20.2"),
        serve: false,
    };
    assert_eq!(found(&input, vec![replace, stop]), ["no API server would answer"]);
}

#[test]
fn held_clusters_only_get_machines_back() {
    let mut input = at("cordon/w-2");
    input.wanted.paused = true;
    assert_eq!(
        found(&input, vec![cordon("w-2")]),
        ["`1.36.3/cordon/w-2` is planned though nothing may be begun"]
    );
    assert!(found(&input, vec![Action::Uncordon { machine: name("w-1") }]).is_empty());
}

#[test]
fn what_is_wrong_already_holds_nothing_back() {
    let mut input = at("cordon/w-2");
    // Someone has a machine join that is far too old.
    input
        .observed
        .machines
        .insert(name("x-1"), machine(&release("1.30.0"), Role::Worker));
    assert!(!check_state(&input.observed).is_empty());
    assert!(found(&input, vec![cordon("w-2")]).is_empty());
    let subjects: BTreeSet<Violation> = check_state(&input.observed).into_iter().collect();
    assert!(subjects.iter().all(|found| matches!(
        found,
        Violation::Skew {
            what: Subject::Kubelet(_),
            ..
        }
    )));
}
