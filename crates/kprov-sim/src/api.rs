//! The API as an operator sees it: every call takes time, may fail, and may take effect without its reply ever coming.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use kprov_types::MachineName;
use kprov_upgrade::model::{Action, Input};
use kprov_upgrade::plan::Plan;
use kprov_upgrade::{Cluster, ClusterError, Outcome};

use crate::changes::words;
use crate::objects::{Operator, Orders};
use crate::picture::compose;
use crate::script::{Fault, Millis, SECOND};
use crate::world::{Event, World, note, timestamp};

/// The world, shared between the one who runs it and the operators in it; never by two threads.
#[derive(Clone)]
pub(crate) struct Shared(Arc<Mutex<World>>);

impl Shared {
    pub(crate) fn new(world: World) -> Self {
        Self(Arc::new(Mutex::new(world)))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, World> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a call does when it reaches the API; the error is the API's own.
type Effect = Box<dyn FnOnce(&mut World) + Send>;

/// A call on its way.
struct Call {
    caller: Operator,
    effect: Option<Effect>,
    /// What becomes of it apart from the ordinary.
    mishap: Option<Mishap>,
    replied: bool,
    waker: Option<Waker>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mishap {
    Refuse,
    LoseReply,
}

/// Calls on their way, and sleeps.
#[derive(Default)]
pub(crate) struct Calls {
    sent: u64,
    next: u64,
    pending: BTreeMap<u64, Call>,
}

impl Calls {
    pub(crate) fn has_any(&self, caller: Operator) -> bool {
        self.pending
            .values()
            .any(|call| call.caller == caller && call.effect.is_some())
    }

    pub(crate) fn reply(&mut self, id: u64) {
        if let Some(call) = self.pending.get_mut(&id) {
            call.replied = true;
            if let Some(waker) = call.waker.take() {
                waker.wake();
            }
        }
    }
}

/// An operator looks at least this often.
const RESYNC: Millis = 5 * SECOND;
/// How long an operator that was told of a change waits for more.
pub(crate) const MOMENT: Millis = 300;
/// How long a caller waits for a reply that doesn't come.
const TIMEOUT: Millis = 5 * SECOND;
/// An operator sends nothing that changes the cluster when its Lease is good for less: a call's own time, with room to spare.
pub(crate) const MARGIN: Millis = 6 * SECOND;

impl World {
    fn send(&mut self, caller: Operator, effect: Effect) -> u64 {
        self.calls.sent += 1;
        let number = self.calls.sent;
        let mut mishap = None;
        let mut late = 0;
        for fault in &self.faults {
            match fault {
                Fault::LoseReply { call } if *call == number => mishap = Some(Mishap::LoseReply),
                Fault::Refuse { call } if *call == number => mishap = Some(Mishap::Refuse),
                Fault::Delay { call, ms } if *call == number => late = *ms,
                _ => {}
            }
        }
        let id = self.call(caller, Some(effect), mishap);
        let after = late + self.span(1, 15);
        self.at(self.now + after, Event::Arrive(id));
        id
    }

    fn call(&mut self, caller: Operator, effect: Option<Effect>, mishap: Option<Mishap>) -> u64 {
        self.calls.next += 1;
        let call = Call {
            caller,
            effect,
            mishap,
            replied: false,
            waker: None,
        };
        self.calls.pending.insert(self.calls.next, call);
        self.calls.next
    }

    /// A call reaches the API, or finds none.
    pub(crate) fn arrive(&mut self, id: u64) {
        let answers = self.answers();
        let Some(call) = self.calls.pending.get_mut(&id) else {
            return;
        };
        let (effect, mishap) = (call.effect.take(), call.mishap);
        let lost = !answers || mishap == Some(Mishap::LoseReply);
        if let Some(effect) = effect.filter(|_| answers && mishap != Some(Mishap::Refuse)) {
            effect(self);
        }
        let after = if lost { TIMEOUT } else { self.span(1, 15) };
        self.at(self.now + after, Event::Reply(id));
    }
}

/// A call, from its sending to its reply.
struct Sending<T> {
    shared: Shared,
    id: u64,
    result: Arc<Mutex<Option<Result<T, ClusterError>>>>,
}

impl<T> Future for Sending<T> {
    type Output = Result<T, ClusterError>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut world = self.shared.lock();
        let Some(call) = world.calls.pending.get_mut(&self.id) else {
            return Poll::Ready(Err(lost()));
        };
        if !call.replied {
            call.waker = Some(context.waker().clone());
            return Poll::Pending;
        }
        let mishap = call.mishap;
        let result = self.result.lock().unwrap_or_else(PoisonError::into_inner).take();
        Poll::Ready(match (mishap, result) {
            (Some(Mishap::Refuse), _) => Err(ClusterError::Refused {
                why: "too many requests".to_owned(),
            }),
            (Some(Mishap::LoseReply), _) | (None, None) => Err(lost()),
            (None, Some(result)) => result,
        })
    }
}

impl<T> Drop for Sending<T> {
    /// Whoever waited is gone; what was sent goes on its way.
    fn drop(&mut self) {
        let mut world = self.shared.lock();
        if let Some(call) = world.calls.pending.get_mut(&self.id) {
            call.waker = None;
            // What waits for nothing of the API, or has been answered, is over.
            if call.effect.is_none() {
                world.calls.pending.remove(&self.id);
            }
        }
    }
}

fn lost() -> ClusterError {
    ClusterError::Lost("connection lost".into())
}

/// A cluster, as one operator's process reaches it.
#[derive(Clone)]
pub(crate) struct SimCluster {
    shared: Shared,
    me: Operator,
    /// When what people ask for was last read.
    asked_at: Arc<AtomicU64>,
}

impl SimCluster {
    pub(crate) fn new(shared: Shared, me: Operator) -> Self {
        Self {
            shared,
            me,
            asked_at: Arc::default(),
        }
    }

    /// Sends a request, and waits for its reply.
    fn request<T, F>(&self, effect: F) -> Sending<T>
    where
        T: Send + 'static,
        F: FnOnce(&mut World) -> Result<T, ClusterError> + Send + 'static,
    {
        let result = Arc::new(Mutex::new(None));
        let slot = Arc::clone(&result);
        let effect: Effect = Box::new(move |world| {
            let outcome = effect(world);
            *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(outcome);
        });
        let id = self.shared.lock().send(self.me, effect);
        Sending {
            shared: self.shared.clone(),
            id,
            result,
        }
    }

    /// Sends a change, if the Lease is good for long enough.
    async fn write<F>(&self, action: Option<&Action>, effect: F) -> Result<Outcome, ClusterError>
    where
        F: FnOnce(&mut World) -> Outcome + Send + 'static,
    {
        if self.leading_for() < MARGIN {
            return Err(ClusterError::NotLeading);
        }
        let (me, action, asked_at) = (self.me, action.cloned(), self.asked_at.load(Ordering::Relaxed));
        self.request(move |world| {
            world.judge_writer(me);
            let outcome = effect(world);
            if let Some(action) = action.filter(|_| outcome == Outcome::Done) {
                note!(world, "{}", words(&action));
                world.judge_action(&action, asked_at);
            }
            world.touch();
            Ok(outcome)
        })
        .await
    }

    /// For how long this operator believes to hold the Lease.
    pub(crate) fn leading_for(&self) -> Millis {
        let world = self.shared.lock();
        world
            .leading_until
            .get(&self.me)
            .map_or(0, |until| until.saturating_sub(world.now))
    }

    /// Waits for a while.
    pub(crate) async fn sleep(&self, ms: Millis) {
        let id = {
            let mut world = self.shared.lock();
            let id = world.call(self.me, None, None);
            let at = world.now + ms;
            world.at(at, Event::Reply(id));
            id
        };
        self.wait(id).await;
    }

    /// Waits until the API has stored something new, and a moment longer for what comes with it; a few seconds at most.
    pub(crate) async fn changed(&self, seen: u64) {
        if self.version() == seen {
            let id = {
                let mut world = self.shared.lock();
                let id = world.call(self.me, None, None);
                world.watching.push(id);
                let at = world.now + RESYNC;
                world.at(at, Event::Reply(id));
                id
            };
            self.wait(id).await;
        } else {
            self.sleep(MOMENT).await;
        }
    }

    async fn wait(&self, id: u64) {
        // Nothing comes back of waiting: it ends as a call whose reply was lost.
        let waiting = Sending::<()> {
            shared: self.shared.clone(),
            id,
            result: Arc::default(),
        };
        let _ = waiting.await;
    }

    /// The planner's own checker refused what the planner wants to do.
    pub(crate) fn accuse(&self, violations: &[kprov_upgrade::check::Violation]) {
        let words: Vec<String> = violations.iter().map(ToString::to_string).collect();
        self.shared.lock().violate("plan", |_| words.join("; "));
    }

    pub(crate) fn now(&self) -> Millis {
        self.shared.lock().now
    }

    /// Which state of the API's store this is.
    pub(crate) fn version(&self) -> u64 {
        self.shared.lock().version
    }

    /// Changes one machine's orders, if they are to change.
    async fn order<F>(&self, action: &Action, machine: &MachineName, change: F) -> Result<Outcome, ClusterError>
    where
        F: FnOnce(&World, usize, &mut Orders) -> Outcome + Send + 'static,
    {
        let name = machine.clone();
        self.write(Some(action), move |world| {
            let Some(index) = world.machine(&name) else {
                return Outcome::Stale;
            };
            let mut orders = world.machines[index].spec.clone();
            let outcome = change(world, index, &mut orders);
            if outcome == Outcome::Done && orders != world.machines[index].spec {
                orders.order += 1;
                world.machines[index].spec = orders;
                world.poke_agent(index);
            }
            outcome
        })
        .await
    }

    async fn drain(&self, machine: &MachineName, force: bool) -> Result<Outcome, ClusterError> {
        let name = machine.clone();
        let pods = self
            .request(move |world| {
                let index = world.machine(&name);
                Ok(index.map(|index| world.to_leave(index)).unwrap_or_default())
            })
            .await?;
        for id in pods {
            self.write(None, move |world| {
                if force || world.budget_lets_go(id) {
                    world.delete_pod(id);
                }
                Outcome::Done
            })
            .await?;
        }
        Ok(Outcome::Done)
    }
}

impl Cluster for SimCluster {
    /// The parts are read one after the other, in any order: the cluster changes meanwhile.
    async fn observe(&self) -> Result<Option<Input>, ClusterError> {
        let order = {
            let mut world = self.shared.lock();
            world.rng.below(3)
        };
        let (mut asked, mut workloads, mut machines) = (None, None, None);
        for part in 0..3 {
            match (part + order) % 3 {
                0 => {
                    let at = Arc::clone(&self.asked_at);
                    asked = Some(
                        self.request(move |world| {
                            at.store(world.now, Ordering::Relaxed);
                            Ok(world.asked())
                        })
                        .await?,
                    );
                }
                1 => workloads = Some(self.request(|world| Ok(world.see_workloads())).await?),
                _ => machines = Some(self.request(|world| Ok(world.see_machines())).await?),
            }
        }
        let now = timestamp(self.shared.lock().now);
        Ok(match (asked, workloads, machines) {
            (Some(asked), Some(workloads), Some(machines)) => Some(compose(asked, workloads, machines, now)),
            _ => None,
        })
    }

    async fn act(&self, action: &Action) -> Result<Outcome, ClusterError> {
        match action {
            Action::Stage { release, machines } => {
                for machine in machines {
                    let release = release.clone();
                    self.order(action, machine, move |world, _, orders| {
                        orders.stage.extend(world.release(&release));
                        Outcome::Done
                    })
                    .await?;
                }
                Ok(Outcome::Done)
            }
            Action::Drain { machine, force } => self.drain(machine, *force).await,
            Action::Snapshot { machine, name } => {
                let name = name.clone();
                self.order(action, machine, move |_, _, orders| {
                    orders.snapshot = Some(name);
                    Outcome::Done
                })
                .await
            }
            Action::Standby {
                machine,
                release,
                serve,
            } => {
                let (release, serve) = (release.clone(), *serve);
                self.order(action, machine, move |world, _, orders| {
                    orders.standby = world.release(&release).map(|release| (release, serve));
                    Outcome::Done
                })
                .await
            }
            Action::Etcd { machine, to } => {
                let to = to.clone();
                self.order(action, machine, move |world, _, orders| {
                    orders.etcd = world.release(&to);
                    Outcome::Done
                })
                .await
            }
            Action::Run { machine, from, to } => {
                let (from, to) = (from.clone(), to.clone());
                self.order(action, machine, move |world, index, orders| {
                    let running = world.machines[index]
                        .status
                        .running
                        .map(|release| world.reference(release));
                    let limit = Millis::from(world.update.policy.health_timeout_seconds) * SECOND;
                    match world.release(&to) {
                        Some(to) if running == from => {
                            orders.run = Some((to, world.now, limit));
                            Outcome::Done
                        }
                        _ => Outcome::Stale,
                    }
                })
                .await
            }
            Action::Fail { failure } => {
                // First the last log lines are read.
                self.request(|_| Ok(())).await?;
                let failure = failure.clone();
                self.write(Some(action), move |world| {
                    world.update.failure = Some(failure);
                    Outcome::Done
                })
                .await
            }
            Action::Finish { release } => {
                let (settings, release) = (release.clone(), release.clone());
                self.write(Some(action), move |world| {
                    world.update.settings = world.release(&settings).unwrap_or(world.update.settings);
                    Outcome::Done
                })
                .await?;
                self.write(None, move |world| world.finish(&release)).await
            }
            simple => {
                let simple = simple.clone();
                self.write(Some(action), move |world| world.simple(&simple)).await
            }
        }
    }

    async fn report(&self, _input: &Input, plan: &Plan) -> Result<(), ClusterError> {
        let told = Some(plan.state.clone());
        if self.leading_for() < MARGIN {
            return Err(ClusterError::NotLeading);
        }
        // A status that is told already is not told again.
        if self.shared.lock().update.told.as_ref().map(|(state, _)| state) == told.as_ref() {
            return Ok(());
        }
        self.write(None, move |world| {
            note!(world, "told: {told:?}");
            world.update.told = told.map(|state| (state, world.now));
            Outcome::Done
        })
        .await?;
        Ok(())
    }
}
