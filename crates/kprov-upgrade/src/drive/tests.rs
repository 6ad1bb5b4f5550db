//! Passes over a cluster that does what it's told.

use std::sync::Mutex;

use futures::executor::block_on;

use super::*;
use crate::model::{Action, Workload};
use crate::plan::{State, Waiting};
use crate::testing::world::World;
use crate::testing::{cluster, release};

/// How a [`Fake`] answers what it's told.
type Answer = fn(&Action) -> Result<Outcome, ClusterError>;

/// A cluster that answers as it's told to, and notes what it is asked.
struct Fake {
    world: Mutex<World>,
    answer: Answer,
    acted: Mutex<Vec<String>>,
    reports: Mutex<Vec<Plan>>,
}

impl Fake {
    fn new(world: World, answer: Answer) -> Self {
        Self {
            world: Mutex::new(world),
            answer,
            acted: Mutex::default(),
            reports: Mutex::default(),
        }
    }
}

impl Cluster for Fake {
    async fn observe(&self) -> Result<Option<Input>, ClusterError> {
        Ok(Some(self.world.lock().unwrap().input.clone()))
    }
    async fn act(&self, action: &Action) -> Result<Outcome, ClusterError> {
        self.acted.lock().unwrap().push(format!("{action:?}"));
        match (self.answer)(action)? {
            Outcome::Done => Ok(self.world.lock().unwrap().act(action)),
            Outcome::Stale => Ok(Outcome::Stale),
        }
    }
    async fn report(&self, _: &Input, plan: &Plan) -> Result<(), ClusterError> {
        self.reports.lock().unwrap().push(plan.clone());
        Ok(())
    }
}

/// In the middle of a hop, about to roll controller-manager and scheduler.
fn two_steps() -> World {
    let mut input = cluster("1.35.6", &["1.36.3"], 1, 1);
    input.wanted.desired = "1.36.3".to_owned();
    loop {
        let plan = plan(&input);
        if plan.steps.len() > 1 {
            return World::new(input);
        }
        for step in plan.steps {
            crate::effects::apply(&mut input.observed, &step.action, input.now);
        }
    }
}

#[test]
fn a_pass_does_what_is_planned_and_reports_it() {
    let fake = Fake::new(two_steps(), |_| Ok(Outcome::Done));
    let Pass::Planned(planned) = block_on(pass(&fake)).unwrap() else {
        panic!("there is something to plan");
    };
    assert_eq!((planned.done, planned.stale), (2, None));
    let world = fake.world.lock().unwrap();
    assert_eq!(
        world.input.observed.workloads[&Workload::Scheduler].template,
        release("1.36.3")
    );
    assert_eq!(fake.reports.lock().unwrap().as_slice(), [planned.plan]);
}

#[test]
fn what_is_stale_ends_the_pass_quietly() {
    let fake = Fake::new(two_steps(), |_| Ok(Outcome::Stale));
    let Pass::Planned(planned) = block_on(pass(&fake)).unwrap() else {
        panic!("there is something to plan");
    };
    assert_eq!(
        (planned.done, planned.stale.as_deref()),
        (0, Some("1.36.3/roll/kube-controller-manager"))
    );
    assert_eq!(fake.acted.lock().unwrap().len(), 1);
    assert_eq!(fake.reports.lock().unwrap().len(), 1);
}

#[test]
fn an_error_ends_the_pass_and_is_reported_with_its_step() {
    let fake = Fake::new(two_steps(), |_| Err(ClusterError::NotLeading));
    let error = block_on(pass(&fake)).unwrap_err();
    assert_eq!(error.to_string(), "could not roll kube-controller-manager to 1.36.3");
    assert!(matches!(
        error,
        PassError::Act {
            source: ClusterError::NotLeading,
            ..
        }
    ));
    assert_eq!(fake.acted.lock().unwrap().len(), 1);
    assert_eq!(fake.reports.lock().unwrap().len(), 1);
}

#[test]
fn a_plan_that_breaks_an_invariant_is_told_and_not_carried_out() {
    let World { mut input, .. } = two_steps();
    let wrong = plan(&input);
    // The same plan, where an API server is older than it believes.
    input
        .observed
        .workloads
        .get_mut(&Workload::ApiServer)
        .unwrap()
        .instances[0]
        .release = release("1.35.6");
    let violations = check_plan(&input, &wrong);
    assert!(!violations.is_empty());
    let (told, error) = held_back(wrong, violations);
    assert!(told.steps.is_empty());
    assert!(
        told.waiting
            .iter()
            .all(|waiting| matches!(waiting, Waiting::Unsafe(_)) && waiting.needs_person())
    );
    assert_eq!(told.state, State::Upgrading);
    assert!(error.to_string().starts_with("the plan breaks "), "{error}");
}

#[test]
fn passes_alone_bring_a_cluster_there() {
    let mut input = cluster("1.34.9", &["1.35.6", "1.36.3"], 1, 2);
    input.wanted.desired = "1.36.3".to_owned();
    let fake = Fake::new(World::new(input), |_| Ok(Outcome::Done));
    for _ in 0..2000 {
        let Pass::Planned(planned) = block_on(pass(&fake)).unwrap() else {
            panic!("there is something to plan");
        };
        let mut world = fake.world.lock().unwrap();
        let events = world.events();
        if planned.plan.state == State::Idle && events.is_empty() {
            assert_eq!(world.input.observed.current, release("1.36.3"));
            return;
        }
        if let Some(event) = events.first() {
            world.happen(event);
        }
        world.wait(1);
    }
    panic!("it does not get there");
}
