//! What holds whatever happens: random clusters, random events, the operator called at random moments.

use std::collections::{BTreeSet, VecDeque};

use kprov_types::Role;
use kprov_types::api::{MaxUnavailable, ReleaseRef};
use proptest::prelude::*;

use crate::check::{Violation, check_plan, check_state};
use crate::model::{Action, Part, Workload};
use crate::outline::outline;
use crate::plan::{Plan, State, plan};
use crate::testing::world::{Bad, World};
use crate::testing::{cluster, machine, name, release};

/// The release that a cluster runs, and those on the way to the last.
const WAYS: [&[&str]; 5] = [
    &["1.34.9", "1.35.6", "1.36.3"],
    &["1.34.9", "1.34.10"],
    &["1.32.1", "1.33.1", "1.34.1", "1.35.1", "1.36.1", "1.37.0"],
    &["1.20.2", "1.21.14"],
    &["1.20.2", "1.21.14", "1.22.17", "1.23.17", "1.24.17"],
];

/// A cluster and what it should become.
#[derive(Clone, Copy, Debug)]
struct Setup {
    way: usize,
    control_plane: usize,
    workers: usize,
    max_unavailable: u32,
    canary: u32,
}

impl Setup {
    fn world(self, health_timeout_seconds: u32) -> World {
        let [from, others @ ..] = WAYS[self.way] else {
            unreachable!()
        };
        let mut input = cluster(from, others, self.control_plane, self.workers);
        input.wanted.desired = self.target().to_owned();
        input.wanted.policy.max_unavailable = MaxUnavailable::Count(self.max_unavailable);
        input.wanted.policy.canary = self.canary;
        input.wanted.policy.health_timeout_seconds = health_timeout_seconds;
        World::new(input)
    }

    fn target(self) -> &'static str {
        WAYS[self.way].last().unwrap()
    }
}

fn setups() -> impl Strategy<Value = Setup> {
    (0..WAYS.len(), 1..=3_usize, 0..=5_usize, 1..=3_u32, 0..=2_u32).prop_map(
        |(way, control_plane, workers, max_unavailable, canary)| Setup {
            way,
            control_plane,
            workers,
            max_unavailable,
            canary,
        },
    )
}

/// As many cases as a debug build does in a few seconds, unless `PROPTEST_CASES` says otherwise.
fn config() -> ProptestConfig {
    let default = ProptestConfig::default();
    ProptestConfig {
        cases: if default.cases == 256 { 64 } else { default.cases },
        max_shrink_iters: 4000,
        failure_persistence: None,
        ..default
    }
}

/// Time passes at random; only tests about deadlines want them to fire.
const PATIENT: u32 = 1_000_000;

/// Plans, checks, and carries out some of the steps.
fn pass(world: &mut World, steps: usize) -> Plan {
    let plan = plan(&world.input);
    assert_eq!(plan, crate::plan::plan(&world.input), "equal inputs give equal plans");
    let violations = check_plan(&world.input, &plan);
    assert!(violations.is_empty(), "{violations:#?}\n{:#?}", plan.steps);
    let ids: BTreeSet<&str> = plan.steps.iter().map(|step| step.id.as_str()).collect();
    assert_eq!(ids.len(), plan.steps.len(), "ids are unique: {:#?}", plan.steps);
    let on_its_way = matches!(plan.state, State::Preparing | State::Upgrading | State::Reverting);
    assert!(
        !on_its_way || !plan.steps.is_empty() || !plan.waiting.is_empty(),
        "it stands still and does not say why: {:#?}",
        world.input
    );
    for step in plan.steps.iter().take(steps) {
        world.act(&step.action);
        holds(world);
    }
    plan
}

fn holds(world: &World) {
    let found: Vec<Violation> = check_state(&world.input.observed);
    assert!(found.is_empty(), "{found:#?}");
    let limit = world.input.wanted.policy.max_unavailable.of(0);
    assert!(world.taken_out("worker") <= limit);
    assert!(world.taken_out("control-plane") <= 1);
}

/// Everything that can happen does, until a plan has nothing more to do.
fn run(world: &mut World) -> Plan {
    let mut last = VecDeque::new();
    for _ in 0..20_000 {
        let plan = pass(world, usize::MAX);
        let event = world.events().into_iter().next();
        last.extend(
            plan.steps
                .iter()
                .map(|step| step.id.clone())
                .chain(event.as_ref().map(|event| format!("{event:?}"))),
        );
        last.drain(..last.len().saturating_sub(20));
        match &event {
            Some(event) => {
                world.happen(event);
                holds(world);
            }
            None if plan.steps.is_empty() && plan.waiting.is_empty() => return plan,
            None => {}
        }
        world.wait(1);
    }
    let waiting = plan(&world.input)
        .waiting
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>();
    panic!("it does not end: {last:#?}\nwaiting for {waiting:#?}");
}

/// Everything is of a release, in service, and nothing is left over.
fn all_of(world: &World, release: &ReleaseRef) {
    let observed = &world.input.observed;
    assert_eq!(observed.current, *release);
    assert_eq!(observed.hop_started, None);
    for (name, m) in &observed.machines {
        assert_eq!(m.running.as_ref(), Some(release), "{name}");
        assert!(m.ready && !m.cordoned, "{name}");
        assert!(
            m.standby
                .as_ref()
                .is_none_or(|s| s.release.as_ref() == Some(release) && !s.api_ready),
            "{name}"
        );
    }
    for (workload, seen) in &observed.workloads {
        // CoreDNS and the operator stay where the release has the same.
        let known = observed
            .releases
            .iter()
            .find(|known| known.release == *release)
            .unwrap();
        assert_eq!(seen.image, known.images[&Part::Workload(*workload)]);
        assert!(
            seen.instances
                .iter()
                .all(|pod| pod.release == seen.template && pod.ready),
            "{workload:?}"
        );
        if !matches!(workload, Workload::Dns | Workload::Operator) {
            assert_eq!(seen.template, *release, "{workload:?}");
        }
    }
}

#[derive(Clone, Debug)]
enum Move {
    /// The operator makes a pass and is killed after so many steps.
    Pass(usize),
    /// One of the things that can happen does.
    Event(u8),
    /// Time passes.
    Wait(i64),
    /// Someone pauses or resumes.
    Pause(bool),
    /// Someone asks for where the hop came from, or for the target again.
    Desire(bool),
    /// A machine loses its power; it comes back as an event.
    Die(u8),
    /// A machine joins with the programs of the release that the cluster began with.
    Join,
}

fn moves(faults: bool) -> impl Strategy<Value = Vec<Move>> {
    let weight = u32::from(faults);
    prop::collection::vec(
        prop_oneof![
            20 => (0..4_usize).prop_map(Move::Pass),
            40 => any::<u8>().prop_map(Move::Event),
            4 => (0..20_i64).prop_map(Move::Wait),
            weight => any::<bool>().prop_map(Move::Pause),
            weight => any::<bool>().prop_map(Move::Desire),
            weight => any::<u8>().prop_map(Move::Die),
            weight => Just(Move::Join),
        ],
        0..250,
    )
}

fn make(world: &mut World, first: &ReleaseRef, target: &str, moves: &[Move]) {
    let mut joined = 0;
    for made in moves {
        match made {
            Move::Pass(steps) => drop(pass(world, *steps)),
            Move::Event(index) => {
                let events = world.events();
                if !events.is_empty() {
                    world.happen(&events[usize::from(*index) % events.len()]);
                    holds(world);
                }
            }
            Move::Wait(seconds) => world.wait(*seconds),
            Move::Pause(paused) => world.input.wanted.paused = *paused,
            Move::Desire(back) => {
                let current = world.input.observed.current.version.to_string();
                world.input.wanted.desired = if *back { current } else { target.to_owned() };
            }
            Move::Die(index) => {
                let machines = &mut world.input.observed.machines;
                let at = usize::from(*index) % machines.len();
                let m = machines.values_mut().nth(at).unwrap();
                (m.ready, m.ready_since) = (false, world.input.now);
            }
            // What joins later than this may be too old for the hop under way: no doing of the planner's.
            Move::Join if world.input.observed.current == *first => {
                joined += 1;
                let mut new = machine(first, Role::Worker);
                new.ready_since = world.input.now;
                world.input.observed.machines.insert(name(&format!("x-{joined}")), new);
                world.input.observed.workloads.get_mut(&Workload::Proxy).unwrap().wanted += 1;
            }
            Move::Join => {}
        }
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn from_anywhere_on_the_way_it_gets_there(setup in setups(), moves in moves(true)) {
        let mut world = setup.world(PATIENT);
        let (first, target) = (world.input.observed.current.clone(), setup.target());
        make(&mut world, &first, target, &moves);
        world.input.wanted.desired = target.to_owned();
        world.input.wanted.paused = false;
        let plan = run(&mut world);
        prop_assert_eq!(plan.state, State::Idle);
        prop_assert!(plan.hops.is_empty() && plan.running.is_empty());
        all_of(&world, &release(target));
    }

    #[test]
    fn from_anywhere_on_the_way_it_gets_back(setup in setups(), moves in moves(false)) {
        let mut world = setup.world(PATIENT);
        let (first, target) = (world.input.observed.current.clone(), setup.target());
        make(&mut world, &first, target, &moves);
        let current = world.input.observed.current.clone();
        world.input.wanted.desired = current.version.to_string();
        let plan = run(&mut world);
        prop_assert_eq!(plan.state, State::Idle);
        // etcd may have stayed with the newer version.
        all_of(&world, &current);
    }

    #[test]
    fn a_bad_release_undoes_itself(
        setup in setups(),
        bad in prop_oneof![
            Just(Bad::Unready(Workload::ApiServer)),
            Just(Bad::Crashes(Workload::ApiServer)),
            Just(Bad::Unready(Workload::Scheduler)),
            Just(Bad::Crashes(Workload::ControllerManager)),
            Just(Bad::Unready(Workload::Proxy)),
            Just(Bad::Kubelet),
            Just(Bad::Bytes),
        ],
        hop in any::<u8>(),
        moves in moves(false),
    ) {
        let mut world = setup.world(300);
        let target = setup.target();
        // Machines and kube-proxy are not touched by a hop on the way, unless they must be.
        let on_machines = matches!(bad, Bad::Kubelet | Bad::Unready(Workload::Proxy));
        let hops = WAYS[setup.way].len() - 1;
        let culprit = if on_machines { hops } else { 1 + usize::from(hop) % hops };
        let culprit = release(WAYS[setup.way][culprit]);
        world.bad = Some((culprit.clone(), bad));
        let first = world.input.observed.current.clone();
        make(&mut world, &first, target, &moves);
        let plan = run(&mut world);
        prop_assert_eq!(plan.state, State::Failed);
        let failure = world.input.observed.failure.clone().unwrap();
        prop_assert_eq!(&failure.release, &culprit);
        prop_assert!(!failure.message.is_empty() && !failure.instance.is_empty());
        if !failure.halted {
            prop_assert!(failure.reverted);
            prop_assert!(!world.releases_in_use().contains(&culprit));
        }
        prop_assert!(world.input.observed.machines.values().all(|m| !m.cordoned && m.ready));
        // The same release made well, and asked for anew, succeeds.
        world.bad = None;
        world.input.wanted.attempt += 1;
        let plan = run(&mut world);
        prop_assert_eq!(plan.state, State::Idle);
        all_of(&world, &release(target));
    }

    #[test]
    fn an_outline_always_ends(setup in setups(), moves in moves(true)) {
        let mut world = setup.world(PATIENT);
        let fresh = outline(&world.input).unwrap();
        prop_assert_eq!(&fresh.ends, &State::Idle);
        let hops: Vec<_> = fresh.hops.iter().map(|hop| hop.to.version.to_string()).collect();
        prop_assert_eq!(hops, &WAYS[setup.way][1..]);
        let first = world.input.observed.current.clone();
        make(&mut world, &first, setup.target(), &moves);
        let outline = outline(&world.input).unwrap();
        prop_assert!(outline.ends == State::Idle || !outline.waiting.is_empty(), "{outline:?}");
    }

    #[test]
    fn pause_means_pause(setup in setups(), moves in moves(false)) {
        let mut world = setup.world(PATIENT);
        let (first, target) = (world.input.observed.current.clone(), setup.target());
        make(&mut world, &first, target, &moves);
        world.input.wanted.paused = true;
        let plan = run_paused(&mut world);
        prop_assert!(plan.steps.is_empty());
    }
}

/// What is under way ends; nothing begins.
fn run_paused(world: &mut World) -> Plan {
    for _ in 0..2000 {
        let plan = pass(world, usize::MAX);
        let begins = plan
            .steps
            .iter()
            .find(|step| !matches!(step.action, Action::Uncordon { .. }));
        assert_eq!(begins, None);
        match world.events().into_iter().next() {
            Some(event) => {
                world.happen(&event);
                holds(world);
            }
            None if plan.steps.is_empty() => return plan,
            None => {}
        }
        world.wait(1);
    }
    panic!("it does not end: {:#?}", world.events());
}
