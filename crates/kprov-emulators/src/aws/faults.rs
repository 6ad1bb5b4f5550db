//! What goes wrong on request.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// What becomes of a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// It is refused with this error; nothing takes effect.
    Refuse {
        /// The HTTP status.
        status: u16,
        /// The error's code, such as `UnauthorizedOperation`.
        code: String,
        /// Its message.
        message: String,
    },
    /// The connection breaks before it is carried out.
    LoseRequest,
    /// It is carried out, and the connection breaks before the reply.
    LoseReply,
    /// It takes this much longer.
    Delay(Duration),
    /// Each call takes longer by another time, so that calls of several callers meet in another order with each seed.
    Jitter {
        /// The most.
        most: Duration,
        /// What the times follow from, and from how many calls came before.
        seed: u64,
    },
}

/// Calls that go wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Calls of this name; all where left out.
    pub action: Option<String>,
    /// Only those that have this in their form, as it was sent.
    pub containing: Option<String>,
    /// Only calls that change something, not listings.
    pub changes: bool,
    /// So many such calls go well before.
    pub after: u64,
    /// And so many between each two that go wrong.
    pub every: u64,
    /// So many go wrong then.
    pub times: u64,
    /// How.
    pub effect: Effect,
}

impl Fault {
    /// Each call of this name goes wrong.
    pub fn on(action: &str, effect: Effect) -> Self {
        Self {
            action: Some(action.to_owned()),
            containing: None,
            changes: false,
            after: 0,
            every: 0,
            times: u64::MAX,
            effect,
        }
    }

    /// Each call goes wrong.
    pub fn on_all(effect: Effect) -> Self {
        Self {
            action: None,
            ..Self::on("", effect)
        }
    }

    /// Each call that changes something goes wrong.
    pub fn on_changes(effect: Effect) -> Self {
        Self {
            changes: true,
            ..Self::on_all(effect)
        }
    }

    /// So many go well between each two.
    #[must_use]
    pub fn every(mut self, calls: u64) -> Self {
        self.every = calls;
        self
    }

    /// At most so many go wrong.
    #[must_use]
    pub fn times(mut self, times: u64) -> Self {
        self.times = times;
        self
    }

    /// So many go well before.
    #[must_use]
    pub fn after(mut self, calls: u64) -> Self {
        self.after = calls;
        self
    }

    /// Only those that have this in their form.
    #[must_use]
    pub fn containing(mut self, text: &str) -> Self {
        self.containing = Some(text.to_owned());
        self
    }
}

impl Effect {
    /// An error of the client's making.
    pub fn refuse(code: &str, message: &str) -> Self {
        Self::Refuse {
            status: 400,
            code: code.to_owned(),
            message: message.to_owned(),
        }
    }

    /// Too many calls.
    pub fn throttle() -> Self {
        Self::Refuse {
            status: 503,
            code: "RequestLimitExceeded".to_owned(),
            message: "Request limit exceeded.".to_owned(),
        }
    }

    /// No permission.
    pub fn unauthorized() -> Self {
        Self::Refuse {
            status: 403,
            code: "UnauthorizedOperation".to_owned(),
            message: "You are not authorized to perform this operation.".to_owned(),
        }
    }

    /// Credentials that have run out.
    pub fn expired() -> Self {
        Self::refuse("RequestExpired", "Request has expired.")
    }
}

/// The switches. Clones share their state.
#[derive(Clone, Debug, Default)]
pub struct Faults(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    faults: Vec<Fault>,
    jittered: u64,
    full_zones: BTreeSet<String>,
    stuck: BTreeSet<String>,
    late: u32,
    hidden: BTreeMap<String, u32>,
    page: Option<u32>,
}

impl Faults {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a fault. The first that fits a call decides.
    pub fn add(&self, fault: Fault) {
        self.lock().faults.push(fault);
    }

    /// Everything goes well again.
    pub fn clear(&self) {
        *self.lock() = State::default();
    }

    /// The zone has no capacity for instances.
    pub fn no_capacity(&self, zone: &str) {
        self.lock().full_zones.insert(zone.to_owned());
    }

    /// Instances whose tag `Name` has this value never leave `pending`.
    pub fn never_running(&self, name: &str) {
        self.lock().stuck.insert(name.to_owned());
    }

    /// What is made from now on is missing from this many listings.
    pub fn late(&self, listings: u32) {
        self.lock().late = listings;
    }

    /// Pages of listings hold at most so many (EC2 takes 5 at least).
    pub fn page_size(&self, size: u32) {
        self.lock().page = Some(size);
    }

    pub(super) fn decide(&self, action: &str, form: &str) -> Option<Effect> {
        let mut state = self.lock();
        let state = &mut *state;
        let reads = is_read(action);
        for fault in &mut state.faults {
            if fault.times == 0
                || (fault.changes && reads)
                || fault.action.as_ref().is_some_and(|a| a != action)
                || fault.containing.as_ref().is_some_and(|c| !form.contains(c))
            {
                continue;
            }
            if fault.after > 0 {
                fault.after -= 1;
                continue;
            }
            fault.times -= 1;
            fault.after = fault.every;
            return Some(match fault.effect {
                Effect::Jitter { most, seed } => {
                    state.jittered += 1;
                    Effect::Delay(chance(most, seed, state.jittered))
                }
                ref other => other.clone(),
            });
        }
        None
    }

    pub(super) fn is_full(&self, zone: &str) -> bool {
        self.lock().full_zones.contains(zone)
    }

    pub(super) fn any_full(&self) -> bool {
        !self.lock().full_zones.is_empty()
    }

    pub(super) fn stuck(&self) -> BTreeSet<String> {
        self.lock().stuck.clone()
    }

    pub(super) fn page(&self) -> Option<u32> {
        self.lock().page
    }

    /// Something was made.
    pub(super) fn made(&self, ids: impl IntoIterator<Item = String>) {
        let mut state = self.lock();
        let late = state.late;
        if late > 0 {
            state.hidden.extend(ids.into_iter().map(|id| (id, late)));
        }
    }

    /// Whether anything is hidden.
    pub(super) fn any_hidden(&self) -> bool {
        !self.lock().hidden.is_empty()
    }

    /// Whether this is to be left out of a listing that would have it; counts the listing.
    pub(super) fn hides(&self, id: &str) -> bool {
        let mut state = self.lock();
        let Some(left) = state.hidden.get_mut(id) else {
            return false;
        };
        *left -= 1;
        if *left == 0 {
            state.hidden.remove(id);
        }
        true
    }
}

/// Whether calls of this name only look.
pub(super) fn is_read(action: &str) -> bool {
    ["Describe", "Get", "List"].iter().any(|r| action.starts_with(r))
}

/// A time up to `most`, the same for the same numbers.
fn chance(most: Duration, seed: u64, number: u64) -> Duration {
    let mut hasher = DefaultHasher::new();
    (seed, number).hash(&mut hasher);
    let share = u32::try_from(hasher.finish() % 1024).unwrap_or(0);
    most * share / 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_by_chance_follow_from_the_seed() {
        let most = Duration::from_millis(50);
        let delays = |seed| {
            let faults = Faults::default();
            faults.add(Fault::on_all(Effect::Jitter { most, seed }));
            std::iter::repeat_with(|| faults.decide("A", ""))
                .take(20)
                .collect::<Vec<_>>()
        };
        assert_eq!(delays(1), delays(1));
        assert_ne!(delays(1), delays(2));
        let in_bounds = |effect: Option<Effect>| matches!(effect, Some(Effect::Delay(time)) if time < most);
        assert!(delays(3).into_iter().all(in_bounds));
    }

    #[test]
    fn faults_count() {
        let faults = Faults::default();
        faults.add(Fault::on("A", Effect::LoseReply).after(1).times(1));
        faults.add(Fault::on_all(Effect::throttle()).containing("x=1"));
        assert_eq!(faults.decide("A", ""), None);
        assert_eq!(faults.decide("A", ""), Some(Effect::LoseReply));
        assert_eq!(faults.decide("A", ""), None);
        assert_eq!(faults.decide("B", "x=1"), Some(Effect::throttle()));
        faults.clear();
        assert_eq!(faults.decide("B", "x=1"), None);
        faults.add(Fault::on_changes(Effect::LoseReply).every(1));
        let lost = |action| faults.decide(action, "").is_some();
        assert!(lost("CreateVpc") && !lost("DescribeVpcs") && !lost("CreateSubnet") && lost("CreateSubnet"));
    }

    #[test]
    fn things_are_hidden_for_a_while() {
        let faults = Faults::default();
        faults.made(["a".to_owned()]);
        assert!(!faults.hides("a"));
        faults.late(2);
        faults.made(["b".to_owned()]);
        assert!(faults.hides("b") && faults.hides("b") && !faults.hides("b"));
    }
}
