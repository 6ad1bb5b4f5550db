//! When a backend counts as ready. Pure: outcomes and times are given.

use std::fmt;
use std::time::{Duration, Instant};

/// What one `GET /readyz` came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It answered 200.
    Ready,
    /// It answered with another status: starting, shutting down, or without its own dependencies.
    NotReady(u16),
    /// Nothing listens there.
    Refused,
    /// No answer within [`TIMEOUT`].
    TimedOut,
    /// The connection broke, or it failed TLS or HTTP.
    Broken,
    /// The check could not be made for want of resources on this side (file descriptors); says nothing of the backend.
    Inconclusive,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ready => f.write_str("ready"),
            Self::NotReady(status) => write!(f, "answers {status}"),
            Self::Refused => f.write_str("refuses connections"),
            Self::TimedOut => f.write_str("does not answer in time"),
            Self::Broken => f.write_str("breaks connections"),
            Self::Inconclusive => f.write_str("could not be checked"),
        }
    }
}

/// How long one check may take.
pub const TIMEOUT: Duration = Duration::from_secs(2);
/// How often a ready local backend is checked.
pub const LOCAL_INTERVAL: Duration = Duration::from_millis(500);
/// How often a ready remote backend is checked. Slower than local ones, as every machine of the cluster does this to each
/// control-plane machine; a connection that fails has the backend checked at once anyway.
pub const REMOTE_INTERVAL: Duration = Duration::from_secs(2);
/// How often a backend is checked that is not ready, while that is new ([`RESTLESS`]).
pub const FAST_INTERVAL: Duration = Duration::from_millis(150);
/// How long after it was found or last changed a backend that is not ready is checked at [`FAST_INTERVAL`].
pub const RESTLESS: Duration = Duration::from_mins(2);
/// So many doubtful outcomes (no answer, broken connection) one after the other end readiness.
pub const STRIKES: u8 = 2;

/// One backend's health. Begins as not ready: only a 200 makes it so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Health {
    ready: bool,
    strikes: u8,
    changed: Instant,
    interval: Duration,
}

impl Health {
    /// A backend that was just found, to be checked each `interval` when it is ready.
    pub fn new(interval: Duration, now: Instant) -> Self {
        Self {
            ready: false,
            strikes: 0,
            changed: now,
            interval,
        }
    }

    /// A backend that was known before, by another program in this process: ready or not `since` then.
    pub fn known(ready: bool, since: Instant, interval: Duration) -> Self {
        Self {
            ready,
            changed: since,
            ..Self::new(interval, since)
        }
    }

    /// Whether new connections may go there.
    pub fn is_ready(&self) -> bool {
        self.ready
    }

    /// Takes in the outcome of a check; tells whether readiness changed.
    ///
    /// An explicit "no" (another status than 200, or refused) counts at once; no answer or a broken connection has to
    /// happen [`STRIKES`] times in a row.
    pub fn observe(&mut self, outcome: Outcome, now: Instant) -> bool {
        let was = self.ready;
        match outcome {
            Outcome::Ready => {
                self.ready = true;
                self.strikes = 0;
            }
            Outcome::NotReady(_) | Outcome::Refused => {
                self.ready = false;
                self.strikes = 0;
            }
            Outcome::TimedOut | Outcome::Broken => {
                self.strikes = self.strikes.saturating_add(1);
                self.ready = self.ready && self.strikes < STRIKES;
            }
            Outcome::Inconclusive => {}
        }
        let changed = was != self.ready;
        if changed {
            self.changed = now;
        }
        changed
    }

    /// How long to wait until the next check.
    pub fn pause(&self, now: Instant) -> Duration {
        let restless = now.saturating_duration_since(self.changed) < RESTLESS;
        match (self.ready, self.strikes) {
            (true, 0) => self.interval,
            (true, _) => FAST_INTERVAL,
            (false, _) if restless => FAST_INTERVAL,
            (false, _) => self.interval.max(LOCAL_INTERVAL),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(outcomes: &[Outcome]) -> bool {
        let start = Instant::now();
        let mut health = Health::new(LOCAL_INTERVAL, start);
        for outcome in outcomes {
            health.observe(*outcome, start);
        }
        health.is_ready()
    }

    #[test]
    fn readiness_after_outcomes() {
        use Outcome::{Broken, Inconclusive, NotReady, Ready, Refused, TimedOut};
        let cases: &[(&[Outcome], bool)] = &[
            (&[], false),
            (&[Ready], true),
            (&[NotReady(500)], false),
            (&[Refused, Ready], true),
            (&[Ready, NotReady(500)], false),
            (&[Ready, NotReady(401)], false),
            (&[Ready, Refused], false),
            (&[Ready, TimedOut], true),
            (&[Ready, TimedOut, TimedOut], false),
            (&[Ready, TimedOut, Broken], false),
            (&[Ready, TimedOut, Ready, TimedOut], true),
            (&[Ready, TimedOut, TimedOut, Ready], true),
            (&[Ready, Inconclusive, Inconclusive, Inconclusive], true),
            (&[Inconclusive], false),
            (&[TimedOut, Ready, Broken], true),
        ];
        for (outcomes, ready) in cases {
            assert_eq!(after(outcomes), *ready, "{outcomes:?}");
        }
    }

    #[test]
    fn only_changes_are_told() {
        let now = Instant::now();
        let mut health = Health::new(LOCAL_INTERVAL, now);
        let told: Vec<_> = [
            Outcome::Refused,
            Outcome::Ready,
            Outcome::Ready,
            Outcome::TimedOut,
            Outcome::NotReady(500),
        ]
        .map(|outcome| health.observe(outcome, now))
        .into();
        assert_eq!(told, [false, true, false, false, true]);
    }

    #[test]
    fn pauses() {
        let start = Instant::now();
        let late = start + RESTLESS;
        let mut health = Health::new(REMOTE_INTERVAL, start);
        assert_eq!(health.pause(start), FAST_INTERVAL);
        assert_eq!(health.pause(late), REMOTE_INTERVAL);
        health.observe(Outcome::Ready, late);
        assert_eq!(health.pause(late), REMOTE_INTERVAL);
        health.observe(Outcome::TimedOut, late);
        assert_eq!(health.pause(late), FAST_INTERVAL, "doubt is settled quickly");
        health.observe(Outcome::TimedOut, late);
        assert_eq!(health.pause(late), FAST_INTERVAL);
        assert_eq!(health.pause(late + RESTLESS), REMOTE_INTERVAL);
    }
}
