//! How fast requests go. Azure counts them for a whole subscription, so what one request is told holds for all of this client's.
//!
//! A look at everything is a dozen requests, and fails as a whole. Tried again as a whole it would use up what Azure allows with
//! the same first few each time, and never come to an end: so each request waits by itself, all until the same time, and after
//! being throttled fewer go at once.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use crate::reply::Reply;

/// Requests under way at once, at most.
const AT_ONCE: usize = 16;
/// So many answers in a row that weren't refusals let one more go at once.
const TRUST: usize = 32;
/// The longest that is waited for in silence; what takes longer is an error that says so.
const LONGEST: Duration = Duration::from_mins(1);

/// How many requests go at once, and from when on. Pure.
#[derive(Debug)]
struct Pace {
    at_once: usize,
    not_before: Option<Instant>,
    /// When it was last made slower: what was sent before that says nothing new.
    slowed: Option<Instant>,
    answers: usize,
}

/// What a reply changes of how many go at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    Stay,
    More,
    Fewer(usize),
}

impl Pace {
    const fn new() -> Self {
        Self {
            at_once: AT_ONCE,
            not_before: None,
            slowed: None,
            answers: 0,
        }
    }

    /// Takes the reply to a request that was sent at that time.
    fn answered(&mut self, reply: &Reply, sent: Instant, now: Instant) -> Change {
        if let Some(wait) = reply.throttled().filter(|wait| *wait <= LONGEST) {
            self.not_before = self.not_before.max(Some(now + wait));
            self.answers = 0;
            if self.slowed.is_some_and(|slowed| sent <= slowed) {
                return Change::Stay;
            }
            self.slowed = Some(now);
            return self.down_to(self.at_once / 2);
        }
        // No more at once than there are left: the last ones are not asked for twice.
        if let Some(left) = reply.calls_left().filter(|left| *left < self.at_once) {
            self.answers = 0;
            return self.down_to(left);
        }
        self.answers += 1;
        if self.answers < TRUST || self.at_once == AT_ONCE {
            return Change::Stay;
        }
        self.answers = 0;
        self.at_once += 1;
        Change::More
    }

    fn down_to(&mut self, wanted: usize) -> Change {
        let wanted = wanted.max(1);
        let fewer = self.at_once.saturating_sub(wanted);
        self.at_once = wanted.min(self.at_once);
        if fewer == 0 { Change::Stay } else { Change::Fewer(fewer) }
    }
}

/// What all requests go through.
#[derive(Debug)]
pub(crate) struct Gate {
    permits: Arc<Semaphore>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    pace: Pace,
    /// Permits to be taken away as they come back.
    owed: usize,
}

/// The right to send one request.
#[derive(Debug)]
pub(crate) struct Pass<'a> {
    gate: &'a Gate,
    permit: Option<OwnedSemaphorePermit>,
    sent: Instant,
}

impl Gate {
    pub(crate) fn new() -> Self {
        Self {
            permits: Arc::new(Semaphore::new(AT_ONCE)),
            state: Mutex::new(State {
                pace: Pace::new(),
                owed: 0,
            }),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for its turn, and for the time from which on Azure wants to be asked again.
    pub(crate) async fn enter(&self) -> Result<Pass<'_>, AcquireError> {
        let permit = Arc::clone(&self.permits).acquire_owned().await?;
        let mut pass = Pass {
            gate: self,
            permit: Some(permit),
            sent: Instant::now(),
        };
        // While one waits it may be put off further.
        while let Some(until) = self.not_before(pass.sent) {
            tokio::time::sleep_until(until).await;
            pass.sent = Instant::now();
        }
        Ok(pass)
    }

    fn not_before(&self, now: Instant) -> Option<Instant> {
        self.state().pace.not_before.filter(|until| *until > now)
    }
}

impl Pass<'_> {
    /// Takes the reply into account for all requests to come.
    pub(crate) fn answered(&self, reply: &Reply) {
        let mut state = self.gate.state();
        match state.pace.answered(reply, self.sent, Instant::now()) {
            Change::Stay => {}
            Change::More if state.owed > 0 => state.owed -= 1,
            Change::More => self.gate.permits.add_permits(1),
            Change::Fewer(fewer) => {
                // Those that nobody has now are gone at once.
                state.owed += fewer - self.gate.permits.forget_permits(fewer);
                tracing::debug!(at_once = state.pace.at_once, "azure throttles");
            }
        }
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        let mut state = self.gate.state();
        if state.owed > 0
            && let Some(permit) = self.permit.take()
        {
            state.owed -= 1;
            permit.forget();
        }
    }
}

/// Whether a request that was first sent at `first` is to be sent again, once it may: it was throttled, for not too long.
pub(crate) fn is_worth_waiting(reply: &Reply, first: Instant, patience: Duration) -> bool {
    let wait = reply.throttled().filter(|wait| *wait <= LONGEST);
    wait.is_some_and(|wait| first.elapsed() + wait <= patience)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(status: u16, headers: &[(&str, &str)]) -> Reply {
        let headers = headers.iter();
        Reply {
            status,
            headers: headers.map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
            ..Reply::default()
        }
    }

    #[test]
    fn all_wait_and_fewer_go_at_once() {
        let mut pace = Pace::new();
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let throttled = reply(429, &[("retry-after", "2")]);
        assert_eq!(pace.answered(&throttled, at(0), at(10)), Change::Fewer(8));
        assert_eq!(pace.not_before, Some(at(2010)));
        // The others of the same dozen say the same once more; the latest time counts.
        assert_eq!(pace.answered(&throttled, at(1), at(12)), Change::Stay);
        assert_eq!(
            pace.answered(&reply(429, &[("retry-after-ms", "5")]), at(1), at(13)),
            Change::Stay
        );
        assert_eq!((pace.at_once, pace.not_before), (8, Some(at(2012))));
        for expected in [4, 2, 1, 1] {
            pace.answered(&throttled, at(3000), at(3000));
            pace.slowed = None;
            assert_eq!(pace.at_once, expected);
        }
        // What takes long is for whoever asked to know, and no reason for others to wait.
        let until = pace.not_before;
        pace.answered(&reply(429, &[("retry-after", "900")]), at(4000), at(4000));
        assert_eq!(pace.not_before, until);
    }

    #[test]
    fn trust_comes_back_slowly() {
        let mut pace = Pace::new();
        let now = Instant::now();
        let few = reply(200, &[("x-ms-ratelimit-remaining-subscription-reads", "3")]);
        assert_eq!(pace.answered(&few, now, now), Change::Fewer(13));
        let good = reply(200, &[("x-ms-ratelimit-remaining-subscription-reads", "11000")]);
        for _ in 1..TRUST {
            assert_eq!(pace.answered(&good, now, now), Change::Stay);
        }
        assert_eq!(pace.answered(&good, now, now), Change::More);
        assert_eq!(pace.at_once, 4);
        for _ in 0..100 * TRUST {
            pace.answered(&good, now, now);
        }
        assert_eq!(pace.at_once, AT_ONCE);
        let none = reply(
            200,
            &[("x-ms-ratelimit-remaining-resource", "Microsoft.Compute/PutVM3Min;0")],
        );
        assert_eq!(pace.answered(&none, now, now), Change::Fewer(15));
    }

    #[tokio::test(start_paused = true)]
    async fn permits_follow_the_pace() {
        let gate = Gate::new();
        let begun = Instant::now();
        let mut passes = Vec::new();
        for _ in 0..AT_ONCE {
            passes.push(gate.enter().await.unwrap());
        }
        assert_eq!(gate.permits.available_permits(), 0);
        passes[0].answered(&reply(429, &[("retry-after", "7")]));
        drop(passes);
        assert_eq!(gate.permits.available_permits(), 8);
        let pass = gate.enter().await.unwrap();
        assert!(begun.elapsed() >= Duration::from_secs(7), "{:?}", begun.elapsed());
        // Nobody has the others: they are gone at once.
        pass.answered(&reply(429, &[("retry-after", "1")]));
        assert_eq!(gate.permits.available_permits(), 3);
        for _ in 0..TRUST {
            pass.answered(&reply(200, &[]));
        }
        drop(pass);
        assert_eq!(gate.permits.available_permits(), 5);
    }

    #[test]
    fn waits_as_long_as_it_has_patience() {
        let patience = Duration::from_secs(90);
        let now = Instant::now();
        let worth = |status, seconds| is_worth_waiting(&reply(status, &[("retry-after", seconds)]), now, patience);
        assert!(worth(429, "1") && worth(429, "60"));
        assert!(!worth(429, "61") && !worth(200, "1") && !worth(503, "1"));
        let long_ago = now.checked_sub(Duration::from_secs(80)).unwrap();
        assert!(!is_worth_waiting(
            &reply(429, &[("retry-after", "20")]),
            long_ago,
            patience
        ));
    }
}
