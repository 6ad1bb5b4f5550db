//! Runs a script: the world's events one by one, and between them the operators, polled by hand.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use kprov_upgrade::drive::{PassError, pass};
use kprov_upgrade::model::{Action, Input};
use kprov_upgrade::plan::Plan;
use kprov_upgrade::{Cluster, ClusterError, Outcome};

use crate::api::{MARGIN, Shared, SimCluster};
use crate::invariants::Violation;
use crate::objects::Operator;
use crate::script::{Fault, Millis, SECOND, Script};
use crate::world::{World, note};

/// Something wrong with an operator, planted to see that it's found: it changes what the planner and its checker believe to
/// see.
pub type Plant = fn(&mut Input);

/// How a simulation went.
#[derive(Clone, Debug)]
pub struct Report {
    /// What did not hold, if anything.
    pub violation: Option<Violation>,
    /// How often operators were polled: each is a place where one can be killed.
    pub polls: u64,
    /// How long it took in the simulation.
    pub elapsed: Millis,
    /// When each machine was taken out of service, and when it was back.
    pub outages: Vec<(Millis, Millis)>,
    /// What happened, where it was asked for: when, and what.
    pub trace: Vec<(Millis, String)>,
}

/// Runs a script to its end, or to the first violation.
pub fn run(script: &Script) -> Report {
    run_planted(script, |_| {})
}

/// Runs a script with something wrong planted into its operators.
pub fn run_planted(script: &Script, plant: Plant) -> Report {
    Simulation::new(script, plant, false).finish()
}

/// Runs a script, and writes down what happens.
pub fn run_traced(script: &Script, plant: Plant) -> Report {
    Simulation::new(script, plant, true).finish()
}

/// What wakes an operator.
struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// An operator's process.
struct Task {
    future: Pin<Box<dyn Future<Output = ()> + Send>>,
    woken: Arc<Woken>,
}

struct Simulation {
    shared: Shared,
    plant: Plant,
    tasks: BTreeMap<Operator, Task>,
    /// Which state of the world's processes `tasks` is of.
    synced: u64,
    polls: u64,
}

impl Simulation {
    fn new(script: &Script, plant: Plant, traced: bool) -> Self {
        let mut world = World::new(script);
        world.trace = traced.then(Vec::new);
        Self {
            shared: Shared::new(world),
            plant,
            tasks: BTreeMap::new(),
            synced: u64::MAX,
            polls: 0,
        }
    }

    fn finish(mut self) -> Report {
        loop {
            self.sync();
            self.poll();
            let mut world = self.shared.lock();
            if world.done || world.violation.is_some() {
                break;
            }
            let Some(event) = world.next_event() else { break };
            world.handle(event);
            world.judge();
        }
        self.tasks.clear();
        let mut world = self.shared.lock();
        Report {
            violation: world.violation.take(),
            polls: self.polls,
            elapsed: world.now,
            outages: std::mem::take(&mut world.memory.outages),
            trace: world.trace.take().unwrap_or_default(),
        }
    }

    /// Starts operators whose process has started, and drops those whose process is gone.
    fn sync(&mut self) {
        let mut running: Vec<Operator> = Vec::new();
        {
            let world = self.shared.lock();
            if world.processes == self.synced {
                return;
            }
            self.synced = world.processes;
            running.extend(world.operators());
        }
        self.tasks.retain(|operator, _| running.contains(operator));
        for operator in running {
            self.tasks.entry(operator).or_insert_with(|| Task {
                future: Box::pin(operate(SimCluster::new(self.shared.clone(), operator), self.plant)),
                woken: Arc::new(Woken(AtomicBool::new(true))),
            });
        }
    }

    /// Polls operators that were woken. One may be killed, or stand still, right after that.
    fn poll(&mut self) {
        let mut killed = Vec::new();
        for (operator, task) in &mut self.tasks {
            {
                let world = self.shared.lock();
                if world.stalled.get(operator).is_some_and(|until| *until > world.now) {
                    continue;
                }
            }
            if !task.woken.0.swap(false, Ordering::Relaxed) {
                continue;
            }
            let waker = Waker::from(Arc::clone(&task.woken));
            // An operator's loop never ends.
            let _: Poll<()> = task.future.as_mut().poll(&mut Context::from_waker(&waker));
            self.polls += 1;
            let mut world = self.shared.lock();
            for fault in world.faults.clone() {
                match fault {
                    Fault::Kill { poll } if poll == self.polls => killed.push(*operator),
                    Fault::Stall { poll, ms } if poll == self.polls => {
                        let until = world.now + ms;
                        note!(world, "{operator:?} stands still until {until}");
                        world.stalled.insert(*operator, until);
                    }
                    _ => {}
                }
            }
        }
        for operator in killed {
            self.tasks.remove(&operator);
            let mut world = self.shared.lock();
            note!(world, "{operator:?} is killed");
            world.memory.fault = Some(world.now);
            world.crash(operator.0);
        }
    }
}

/// How long a pass takes that nothing holds up.
const TORN: Millis = 5 * SECOND;

/// What an operator does: while it leads, pass after pass, each as soon as something has changed, and at least every few
/// seconds.
async fn operate(cluster: SimCluster, plant: Plant) {
    let planted = Planted {
        cluster: cluster.clone(),
        plant,
    };
    loop {
        if cluster.leading_for() < MARGIN {
            cluster.sleep(SECOND).await;
            continue;
        }
        let (version, began) = (cluster.version(), cluster.now());
        match pass(&planted).await {
            Ok(_) => {}
            // A picture whose parts lie far apart, because the operator stood still, can be of a state that never was: that the
            // checker stops what follows from it is its purpose.
            Err(PassError::Unsafe(_)) if cluster.now() > began + TORN => {}
            Err(PassError::Unsafe(violations)) => cluster.accuse(&violations),
            Err(_) => cluster.sleep(SECOND).await,
        }
        cluster.changed(version).await;
    }
}

/// A cluster that shows its operator something else than there is.
struct Planted {
    cluster: SimCluster,
    plant: Plant,
}

impl Cluster for Planted {
    async fn observe(&self) -> Result<Option<Input>, ClusterError> {
        let mut input = self.cluster.observe().await?;
        if let Some(input) = &mut input {
            (self.plant)(input);
        }
        Ok(input)
    }

    async fn act(&self, action: &Action) -> Result<Outcome, ClusterError> {
        self.cluster.act(action).await
    }

    async fn report(&self, input: &Input, plan: &Plan) -> Result<(), ClusterError> {
        self.cluster.report(input, plan).await
    }
}
