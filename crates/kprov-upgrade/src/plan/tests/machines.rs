//! Machines: whose turn it is, and what each lacks.

use super::*;

#[test]
fn canaries_go_first_and_soak() {
    let mut input = until(upgrade("1.35.6", "1.36.3"), "cordon/w-1");
    input.wanted.policy.max_unavailable = MaxUnavailable::Count(3);
    assert_eq!(ids(&plan(&input)), ["1.36.3/cordon/w-1"], "alone");
    let mut input = after(input, "uncordon/w-1");
    let since = m(&mut input, "w-1").ordered.as_ref().unwrap().1;
    input.now = since + jiff::SignedDuration::from_secs(3);
    let soaking = plan(&input);
    assert!(soaking.steps.is_empty());
    assert_eq!(words(&soaking)[0], "canary `w-1` to stay Ready for 7 s more");
    assert_eq!(reasons(&soaking), ["CanarySoak", "Canary"]);
    input.now = since + jiff::SignedDuration::from_secs(10);
    assert_eq!(
        ids(&plan(&input)),
        ["1.36.3/cordon/cp-1"],
        "then control-plane machines"
    );
    // A canary that is not Ready any more holds the rest back.
    m(&mut input, "w-1").ready = false;
    let held = plan(&input);
    assert!(held.steps.is_empty());
    assert_eq!(reasons(&held), ["MachineUpdating", "Canary"]);
}

#[test]
fn canaries_that_were_called_back_are_the_first_again() {
    let mut input = until(upgrade("1.35.6", "1.36.3"), "cordon/w-1");
    let (from, to, now) = (release("1.35.6"), release("1.36.3"), input.now);
    input.wanted.policy.max_unavailable = MaxUnavailable::Count(2);
    // Told to go back, and then the release was asked for again.
    let w = m(&mut input, "w-3");
    (w.running, w.kubelet) = (Some(to.clone()), to.version.clone());
    (w.ordered, w.order_seen) = (Some((from, now)), false);
    let again = plan(&input);
    assert_eq!(ids(&again), ["1.36.3/cordon/w-3"]);
    assert_eq!(crate::check::check_plan(&input, &again), []);
    // Not Ready, it is one all the same.
    m(&mut input, "w-3").ready = false;
    let held = plan(&input);
    assert!(held.steps.is_empty(), "{:?}", ids(&held));
    assert_eq!(reasons(&held), ["MachineNotReady", "Canary"]);
}

#[test]
fn control_plane_machines_go_one_at_a_time_and_only_in_health() {
    let mut input = until(upgrade("1.35.6", "1.36.3"), "cordon/cp-2");
    assert_eq!(ids(&plan(&input)), ["1.36.3/cordon/cp-2"]);
    m(&mut input, "cp-1").etcd.as_mut().unwrap().healthy = false;
    assert_eq!(reasons(&plan(&input)), ["EtcdUnhealthy"]);
    m(&mut input, "cp-1").etcd.as_mut().unwrap().healthy = true;
    m(&mut input, "cp-1").ready = false;
    assert!(plan(&input).steps.is_empty());
    m(&mut input, "cp-1").ready = true;
    let seen = input.observed.workloads.get_mut(&Workload::ApiServer).unwrap();
    (seen.instances[2].ready, seen.instances[2].ready_since) = (false, input.now);
    assert_eq!(reasons(&plan(&input)), ["PodNotReady"]);
}

#[test]
fn workers_go_within_max_unavailable_of_their_pool() {
    let mut input = cluster("1.35.6", &["1.36.3"], 1, 6);
    input.wanted.desired = "1.36.3".to_owned();
    input.wanted.policy.canary = 0;
    input.wanted.policy.max_unavailable = MaxUnavailable::Count(2);
    let own = PoolPolicy {
        max_unavailable: Some(MaxUnavailable::Percent(50)),
        ..PoolPolicy::default()
    };
    input.wanted.policy.pools.insert("gpu".to_owned(), own);
    for machine in ["w-5", "w-6"] {
        m(&mut input, machine).pool = "gpu".to_owned();
    }
    let mut input = until(input, "cordon/w-1");
    assert_eq!(
        ids(&plan(&input)),
        ["1.36.3/cordon/w-1", "1.36.3/cordon/w-2", "1.36.3/cordon/w-5"]
    );
    // What isn't Ready counts, whoever's doing it is; what people have cordoned doesn't.
    m(&mut input, "w-1").ready = false;
    m(&mut input, "w-2").cordoned = true;
    let plan = plan(&input);
    assert_eq!(
        ids(&plan),
        ["1.36.3/run/w-2", "1.36.3/cordon/w-5"],
        "theirs is neither drained nor uncordoned"
    );
    assert!(
        words(&plan)
            .contains(&"2 machines of pool `worker` to have their turn: 2 of at most 2 are out of service".to_owned())
    );
}

#[test]
fn a_machine_that_is_not_ready_is_waited_for_at_the_end() {
    let mut input = upgrade("1.35.6", "1.36.3");
    input.wanted.policy.max_unavailable = MaxUnavailable::Count(2);
    (m(&mut input, "w-2").ready, m(&mut input, "w-2").ready_since) = (false, epoch());
    for _ in 0..100 {
        let plan = plan(&input);
        if plan.steps.is_empty() && !reasons(&plan).contains(&"CanarySoak") {
            break;
        }
        for step in &plan.steps {
            effects::apply(&mut input.observed, &step.action, input.now);
        }
        input.now += jiff::SignedDuration::from_secs(10);
    }
    let left: Vec<_> = input
        .observed
        .machines
        .iter()
        .filter(|(_, m)| m.running != Some(release("1.36.3")))
        .collect();
    assert_eq!(left.len(), 1, "all but it");
    assert_eq!(reasons(&plan(&input)), ["MachineNotReady"]);
    m(&mut input, "w-2").ready = true;
    assert_eq!(ids(&plan(&input)), ["1.36.3/cordon/w-2"]);
}

#[test]
fn a_machine_says_nothing_and_nothing_is_asked_of_it() {
    let mut input = until(upgrade("1.35.6", "1.36.3"), "cordon/w-2");
    let mut silent = machine(&release("1.35.6"), Role::Worker);
    silent.running = None;
    input.observed.machines.insert(name("w-0"), silent);
    let plan = plan(&input);
    assert!(words(&plan).contains(&"machine `w-0` to tell what it runs".to_owned()));
    assert!(!ids(&plan).contains(&"1.36.3/cordon/w-0"));
}

#[test]
fn draining_takes_its_time_and_calls_a_person() {
    let blocked = "PodDisruptionBudget `default/web` lets no pod of `w-1` go";
    let mut input = draining(&[]);
    assert_eq!(ids(&plan(&input)), ["1.36.3/drain/w-1"]);
    assert_eq!(
        words(&plan(&input))[0],
        "2 pods to leave `w-1`, such as `default/web-1` (0 s of 600 s)"
    );
    // What is on its way out already is waited for, and not asked again.
    m(&mut input, "w-1").drain.as_mut().unwrap().leaving = 2;
    assert_eq!(ids(&plan(&input)), [""; 0]);
    assert_eq!(plan(&input).running[0].id, "1.36.3/drain/w-1");
    input = draining(&[blocked]);
    assert_eq!(words(&plan(&input))[0], format!("pods to leave `w-1`: {blocked}"));
    input.now += jiff::SignedDuration::from_secs(601);
    let overdue = plan(&input);
    assert_eq!(
        overdue.steps[0].action,
        Action::Drain {
            machine: name("w-1"),
            force: false
        }
    );
    assert_eq!(
        words(&overdue)[0],
        format!("a person: 2 pods of `w-1` could not leave for 601 s: {blocked}")
    );
    assert!(overdue.waiting[0].needs_person());
    // By force, if the pool says so.
    let own = PoolPolicy {
        drain_force: Some(true),
        ..PoolPolicy::default()
    };
    input.wanted.policy.pools.insert("worker".to_owned(), own);
    assert_eq!(
        plan(&input).steps[0].action,
        Action::Drain {
            machine: name("w-1"),
            force: true
        }
    );
    m(&mut input, "w-1").drain = Some(Drain::default());
    assert_eq!(ids(&plan(&input)), ["1.36.3/run/w-1"]);
}

#[test]
fn nothing_is_evicted_where_it_could_go_nowhere() {
    let mut input = draining(&[]);
    for other in ["w-2", "w-3", "w-4"] {
        m(&mut input, other).ready = false;
    }
    assert!(ids(&plan(&input)).contains(&"1.36.3/run/w-1"));
    m(&mut input, "w-2").ready = true;
    m(&mut input, "w-1").drain = None;
    assert!(reasons(&plan(&input)).contains(&"PodsUnknown"));
}

#[test]
fn a_machine_that_switches_says_what_it_lacks() {
    let mut input = after(draining(&[]), "run/w-1");
    let old = release("1.35.6");
    let since = input.now;
    let mut lacks = |seen: &dyn Fn(&mut MachineSeen)| {
        let switching = m(&mut input, "w-1");
        switching.ordered = Some((release("1.36.3"), since));
        seen(switching);
        input.now = since + jiff::SignedDuration::from_secs(12);
        words(&plan(&input))[0].clone()
    };
    let text = lacks(&|m| (m.running, m.kubelet, m.order_seen) = (Some(old.clone()), old.version.clone(), false));
    assert_eq!(text, "machine `w-1` to take its order to run 1.36.3 (12 s of 300 s)");
    let text = lacks(&|m| m.order_seen = true);
    assert_eq!(text, "machine `w-1` to switch to 1.36.3 (12 s of 300 s)");
    let text = lacks(&|m| m.running = Some(release("1.36.3")));
    assert_eq!(text, "machine `w-1` to report a kubelet of 1.36.3 (12 s of 300 s)");
    let text = lacks(&|m| (m.kubelet, m.ready) = (release("1.36.3").version, false));
    assert_eq!(text, "machine `w-1` to become Ready (12 s of 300 s)");
}

#[test]
fn machines_that_joined_with_other_programs_follow() {
    let mut input = cluster("1.36.3", &["1.34.1"], 1, 2);
    input
        .observed
        .machines
        .insert(name("w-9"), machine(&release("1.34.1"), Role::Worker));
    let joined = plan(&input);
    assert_eq!(
        (joined.state.clone(), ids(&joined)),
        (State::Idle, vec!["1.36.3/stage/1.36.3"])
    );
    let mut input = after(input, "uncordon/w-9");
    assert!(plan(&input).steps.is_empty());
    // One that goes back from it is a person's; the others follow all the same.
    let mut failing = machine(&release("1.34.1"), Role::Worker);
    failing.ordered = Some((release("1.36.3"), later(10)));
    failing.staged.insert(release("1.36.3").digest, Staged::Ready);
    failing.failure = Some(MachineFailure {
        release: release("1.36.3"),
        order: 1,
        message: "no disk".to_owned(),
        log: Vec::new(),
        time: later(20),
    });
    input.observed.machines.insert(name("w-9"), failing);
    let failed = plan(&input);
    assert_eq!(
        words(&failed),
        ["a person: machine `w-9` went back from 1.36.3: no disk"]
    );
    // Nothing can be fetched of a release that the cluster does not know.
    input
        .observed
        .machines
        .insert(name("w-9"), machine(&release("1.34.1"), Role::Worker));
    input.observed.releases.clear();
    assert_eq!(
        words(&plan(&input)),
        ["a verified Release of 1.36.3, which 1 machine should run"]
    );
}
