//! Bad releases, and the way back.

use super::*;

fn failure(plan: &Plan) -> &Failure {
    match plan.steps.as_slice() {
        [
            Step {
                action: Action::Fail { failure },
                ..
            },
        ] => failure,
        other => panic!("no failure: {other:#?}"),
    }
}

#[test]
fn instances_that_do_not_become_healthy_condemn_the_release() {
    let input = after(upgrade("1.35.6", "1.36.3"), "roll/kube-apiserver");
    let rolled = input.now;
    let new = |created, ready| {
        pod(
            Workload::ApiServer,
            9,
            Some(&name("cp-1")),
            &release("1.36.3"),
            2,
            created,
            ready,
        )
    };
    let with = |pods: Vec<crate::model::Instance>, seconds: i64| {
        let mut input = input.clone();
        let seen = input.observed.workloads.get_mut(&Workload::ApiServer).unwrap();
        seen.rolled = Some(rolled);
        seen.instances.retain(|pod| pod.machine != Some(name("cp-1")));
        for pod in &mut seen.instances {
            (pod.release, pod.revision, pod.created, pod.ready_since) = (release("1.35.6"), 1, epoch(), epoch());
        }
        seen.instances.extend(pods);
        input.now = rolled + jiff::SignedDuration::from_secs(seconds);
        input
    };
    // Not ready in time.
    let unready = new(rolled, false);
    let plan_at = |seconds| plan(&with(vec![unready.clone()], seconds));
    assert!(plan_at(300).steps.is_empty());
    let found = plan_at(301);
    let failed = failure(&found);
    assert_eq!(
        (failed.component.as_str(), failed.instance.as_str()),
        ("kube-apiserver", "kube-apiserver-1-36-3-9")
    );
    assert_eq!(
        (failed.message.as_str(), failed.halted),
        ("it is not ready after 300 s", false)
    );
    // Ready once, and unready for a moment since: not condemned.
    let mut blinked = unready.clone();
    blinked.ready_since = rolled + jiff::SignedDuration::from_secs(400);
    assert!(plan(&with(vec![blinked], 500)).steps.is_empty());
    // In trouble at once.
    let mut crashing = unready.clone();
    crashing.trouble = Some("it crashed 3 times".to_owned());
    assert_eq!(
        failure(&plan(&with(vec![crashing.clone()], 20))).message,
        "it crashed 3 times"
    );
    // The old one's trouble is not the new one's.
    crashing.release = release("1.35.6");
    assert!(plan(&with(vec![crashing], 20)).steps.is_empty());
    // No pod is made at all; or none after the first.
    assert!(plan(&with(Vec::new(), 300)).steps.is_empty());
    assert_eq!(
        failure(&plan(&with(Vec::new(), 301))).message,
        "0 of 3 pods were made, and no other for 300 s"
    );
    let ready = new(rolled, true);
    assert!(plan(&with(vec![ready.clone()], 600)).steps.is_empty());
    assert_eq!(
        failure(&plan(&with(vec![ready], 601))).message,
        "1 of 3 pods were made, and no other for 600 s"
    );
    // What is on a machine that isn't Ready can't be judged.
    let mut input = with(vec![unready], 2000);
    m(&mut input, "cp-1").ready = false;
    assert!(plan(&input).steps.is_empty());
}

/// As of the executor, of a machine that went back.
fn went_back(input: &mut Input, machine: &str) {
    let now = input.now;
    let seen = m(input, machine);
    (seen.running, seen.kubelet) = (Some(release("1.35.6")), release("1.35.6").version);
    seen.failure = Some(MachineFailure {
        release: release("1.36.3"),
        order: 3,
        message: "kubelet did not become Ready".to_owned(),
        log: vec!["unknown flag".to_owned()],
        time: now,
    });
}

#[test]
fn a_machine_that_went_back_condemns_the_release() {
    let mut input = after(draining(&[]), "run/w-1");
    went_back(&mut input, "w-1");
    let found = plan(&input);
    let failed = failure(&found);
    assert_eq!(
        (failed.component.as_str(), failed.instance.as_str()),
        ("kubelet", "w-1")
    );
    assert_eq!(
        (failed.log.as_slice(), failed.halted),
        (["unknown flag".to_owned()].as_slice(), false)
    );
    effects::apply(&mut input.observed, &found.steps[0].action, input.now);
    let back = plan(&input);
    assert_eq!(back.state, State::Reverting);
    assert_eq!(ids(&back), ["1.35.6/run/w-1"], "it is told to stay with what it runs");
}

#[test]
fn a_machine_that_never_comes_back_condemns_the_release() {
    let mut input = after(draining(&[]), "run/w-1");
    let (old, since) = (release("1.35.6"), input.now);
    let lost = m(&mut input, "w-1");
    (lost.running, lost.kubelet, lost.ready, lost.order_seen) = (Some(old.clone()), old.version, false, true);
    input.now = since + jiff::SignedDuration::from_secs(600);
    assert!(plan(&input).steps.is_empty());
    input.now = since + jiff::SignedDuration::from_secs(601);
    assert_eq!(failure(&plan(&input)).instance, "w-1");
}

#[test]
fn three_machines_that_run_well_speak_for_a_release() {
    let mut input = after(upgrade("1.35.6", "1.36.3"), "run/cp-3");
    went_back(&mut input, "cp-3");
    let found = plan(&input);
    assert!(failure(&found).halted);
    effects::apply(&mut input.observed, &found.steps[0].action, input.now);
    let halted = plan(&input);
    assert_eq!(halted.state, State::Failed);
    assert_eq!(
        ids(&halted),
        ["1.36.3/uncordon/cp-3"],
        "nothing goes back, and nothing goes on"
    );
    effects::apply(&mut input.observed, &halted.steps[0].action, input.now);
    assert!(plan(&input).steps.is_empty());
    // Asked for anew, the machine is told anew.
    input.wanted.attempt += 1;
    input.now += jiff::SignedDuration::from_secs(60);
    let input = until(input, "run/cp-3");
    assert_eq!(ids(&plan(&input)), ["1.36.3/run/cp-3"]);
    // Or back, if that is what is wanted.
    let mut input = input;
    input.wanted.desired = "1.35.6".to_owned();
    assert_eq!(plan(&input).state, State::Reverting);
}

#[test]
fn wrong_bytes_are_found_before_anything_changes() {
    let mut input = after(upgrade("1.35.6", "1.36.3"), "stage/1.36.3");
    m(&mut input, "w-3").staged.insert(
        release("1.36.3").digest,
        Staged::Bad("kubelet: wrong digest".to_owned()),
    );
    let found = plan(&input);
    let failed = failure(&found);
    assert_eq!(
        (failed.component.as_str(), failed.message.as_str()),
        ("release", "kubelet: wrong digest")
    );
    effects::apply(&mut input.observed, &found.steps[0].action, input.now);
    assert_eq!(
        ids(&plan(&input)),
        ["1.35.6/reverted/cluster"],
        "there is nothing to go back"
    );
}

#[test]
fn a_failed_release_is_left_alone_until_asked_for_anew() {
    let mut input = upgrade("1.35.6", "1.36.3");
    input.observed.failure = Some(Failure {
        release: release("1.36.3"),
        attempt: 0,
        component: "kube-apiserver".to_owned(),
        instance: "x".to_owned(),
        message: "y".to_owned(),
        log: Vec::new(),
        time: epoch(),
        halted: false,
        reverted: true,
    });
    let failed = plan(&input);
    assert_eq!(failed.state, State::Failed);
    assert!(failed.steps.is_empty());
    input.wanted.attempt = 1;
    assert_eq!(ids(&plan(&input)), ["1.36.3/begin/cluster"]);
    input.wanted.attempt = 0;
    input.wanted.desired = "1.35.6".to_owned();
    assert_eq!(plan(&input).state, State::Idle);
}

#[test]
fn everything_goes_back_in_the_reverse_order() {
    let mut input = after(upgrade("1.35.6", "1.36.3"), "uncordon/w-1");
    input.wanted.desired = "1.35.6".to_owned();
    let mut order = Vec::new();
    for _ in 0..40 {
        let plan = plan(&input);
        if plan.state == State::Idle {
            break;
        }
        assert_eq!(plan.state, State::Reverting);
        for step in &plan.steps {
            order.push(step.id.clone());
            effects::apply(&mut input.observed, &step.action, input.now);
        }
    }
    let expected = [
        "stage/1.35.6",
        "cordon/w-1",
        "run/w-1",
        "uncordon/w-1",
        "standby/cp-1",
        "standby/cp-2",
        "standby/cp-3",
        "roll-back/kube-proxy",
        "roll-back/coredns",
        "roll-back/kube-scheduler",
        "roll-back/kube-controller-manager",
        "roll-back/kube-apiserver",
        "finish/cluster",
    ];
    assert_eq!(order, expected.map(|what| format!("1.35.6/{what}")));
}

#[test]
fn an_add_on_that_was_left_behind_goes_back_to_where_it_was() {
    let mut input = cluster("1.34.1", &["1.35.1", "1.36.1"], 1, 1);
    input.wanted.desired = "1.36.1".to_owned();
    let mut input = after(input, "1.36.1/roll/kube-proxy");
    input.wanted.desired = "1.35.1".to_owned();
    let back = until(input.clone(), "roll-back/kube-proxy");
    let proxy = |plan: Plan| {
        plan.steps
            .into_iter()
            .find(|step| step.id.ends_with("/kube-proxy"))
            .unwrap()
            .action
    };
    let (workload, from) = (Workload::Proxy, release("1.36.1"));
    assert_eq!(
        proxy(plan(&back)),
        Action::RollBack {
            workload,
            from: from.clone(),
            to: release("1.34.1")
        }
    );
    // Where the API has kept nothing, the current release's is rendered.
    input.observed.workloads.get_mut(&workload).unwrap().previous = None;
    let back = until(input, "roll/kube-proxy");
    assert_eq!(
        proxy(plan(&back)),
        Action::Roll {
            workload,
            from,
            to: release("1.35.1")
        }
    );
}

#[test]
fn etcd_goes_back_only_while_some_members_have_not_changed() {
    let hop = || {
        let mut input = until(upgrade("1.35.6", "1.36.3"), "etcd/cp-2");
        m(&mut input, "cp-2").etcd.as_mut().unwrap().ordered = Some(release("1.36.3"));
        input.wanted.desired = "1.35.6".to_owned();
        input
    };
    // The member that fails goes back first, though it isn't healthy; then the other, alone.
    let mut input = hop();
    m(&mut input, "cp-2").etcd.as_mut().unwrap().healthy = false;
    assert_eq!(ids(&plan(&input)), ["1.35.6/etcd/cp-2"]);
    m(&mut input, "cp-2").etcd.as_mut().unwrap().ordered = Some(release("1.35.6"));
    assert_eq!(reasons(&plan(&input)), ["EtcdUnhealthy"]);
    m(&mut input, "cp-2").etcd.as_mut().unwrap().healthy = true;
    assert_eq!(ids(&plan(&input)), ["1.35.6/etcd/cp-1"]);
    m(&mut input, "cp-1").etcd.as_mut().unwrap().ordered = Some(release("1.35.6"));
    assert_eq!(reasons(&plan(&input)), ["EtcdUpdating"]);
    m(&mut input, "cp-1").etcd.as_mut().unwrap().image = "etcd:3.8".to_owned();
    assert!(ids(&plan(&input)).contains(&"1.35.6/standby/cp-1"));
    // Once all have changed, their data may have too.
    let mut input = hop();
    for machine in ["cp-2", "cp-3"] {
        let etcd = m(&mut input, machine).etcd.as_mut().unwrap();
        (etcd.image, etcd.ordered) = ("etcd:3.9".to_owned(), Some(release("1.36.3")));
    }
    assert!(ids(&plan(&input)).contains(&"1.35.6/standby/cp-1"));
}

#[test]
fn on_the_way_back_too_it_says_which_machine_it_waits_for() {
    let mut input = cluster("1.34.9", &["1.34.10"], 2, 0);
    input.wanted.desired = "1.34.10".to_owned();
    let mut input = until(input, "cordon/cp-2");
    input.wanted.desired = "1.34.9".to_owned();
    let cp = m(&mut input, "cp-1");
    cp.staged.insert(release("1.34.9").digest, Staged::Ready);
    assert_eq!(ids(&plan(&input)), ["1.34.9/cordon/cp-1"]);
    m(&mut input, "cp-2").ready = false;
    let held = plan(&input);
    assert_eq!((ids(&held).len(), reasons(&held)), (0, vec!["MachineNotReady"]));
}
