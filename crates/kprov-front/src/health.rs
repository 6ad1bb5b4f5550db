//! Where a backend stands. Pure: outcomes and times are given.
//!
//! What is slow is not away: an API server on a machine with too much to do answers late, and whoever then turns clients from
//! it, or starts another one beside it, makes that worse. So only a certain no, or a machine that cannot be reached, ends
//! connections; no answer in time only has others go first.

use std::fmt;
use std::time::{Duration, Instant};

/// What one `GET /readyz` came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It answered 200.
    Ready,
    /// It answered with another status: starting, shutting down, or without its own dependencies.
    NotReady(u16),
    /// It answered with another status, and says that all it lacks is an answer from etcd in time.
    WithoutEtcd,
    /// Nothing listens there.
    Refused,
    /// It took the connection, and gave no answer within [`TIMEOUT`].
    TimedOut,
    /// It did not take the connection in time, or there is no way there.
    Unreachable,
    /// The connection broke, or it failed TLS or HTTP.
    Broken,
    /// The check could not be made for want of resources on this side (file descriptors); says nothing of the backend.
    Inconclusive,
}

impl Outcome {
    /// What an answer says. The API server lists its checks one a line, failed ones as `[-]name failed: ...`
    /// (k8s.io/apiserver, `healthz.go`).
    pub fn of_answer(status: u16, body: &[u8]) -> Self {
        if status == 200 {
            return Self::Ready;
        }
        let text = String::from_utf8_lossy(body);
        let mut failed = text.lines().filter_map(|line| line.strip_prefix("[-]")).peekable();
        let of_etcd = |line: &str| matches!(line.split(' ').next(), Some("etcd" | "etcd-readiness"));
        if failed.peek().is_some() && failed.all(of_etcd) {
            Self::WithoutEtcd
        } else {
            Self::NotReady(status)
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ready => f.write_str("ready"),
            Self::NotReady(status) => write!(f, "answers {status}"),
            Self::WithoutEtcd => f.write_str("has no answer from etcd"),
            Self::Refused => f.write_str("refuses connections"),
            Self::TimedOut => f.write_str("does not answer in time"),
            Self::Unreachable => f.write_str("cannot be reached"),
            Self::Broken => f.write_str("breaks connections"),
            Self::Inconclusive => f.write_str("could not be checked"),
        }
    }
}

/// Whether new connections may go to a backend. The order is that of preference.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Standing {
    /// Its last certain answer was 200.
    Up,
    /// It was up, and takes connections, but does not answer in time: good enough where nobody else is.
    Slow,
    /// It says no, is not there, or has never said yes.
    Down,
}

impl Standing {
    /// Whether connections to it will get an answer, if late.
    pub const fn is_usable(self) -> bool {
        matches!(self, Self::Up | Self::Slow)
    }
}

impl fmt::Display for Standing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Up => "up",
            Self::Slow => "slow",
            Self::Down => "down",
        })
    }
}

/// How long one check may take.
pub const TIMEOUT: Duration = Duration::from_secs(2);
/// How often a local backend is checked that is up or slow.
pub const LOCAL_INTERVAL: Duration = Duration::from_millis(500);
/// How often a remote backend is checked that is up or slow. Slower than local ones, as every machine of the cluster does this
/// to each control-plane machine; a connection that fails has the backend checked at once anyway.
pub const REMOTE_INTERVAL: Duration = Duration::from_secs(2);
/// How often a backend is checked that is down, while that is new ([`RESTLESS`]).
pub const FAST_INTERVAL: Duration = Duration::from_millis(150);
/// How long after it was found or last changed a backend that is down is checked at [`FAST_INTERVAL`].
pub const RESTLESS: Duration = Duration::from_mins(2);
/// So many doubtful outcomes one after the other end a standing.
pub const STRIKES: u8 = 2;
/// An API server whose etcd has given no answer for so long is down: it uses its own machine's etcd only, and cannot serve
/// without it, while other machines may.
pub const ETCD_PATIENCE: Duration = Duration::from_secs(30);

/// One backend's health. Begins as down: only a 200 makes it anything else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Health {
    standing: Standing,
    /// Doubtful outcomes since the last certain one.
    strikes: u8,
    /// Those of them, the last ones in a row, that say that connections fail.
    failures: u8,
    /// Since when it says that it is without etcd.
    without_etcd: Option<Instant>,
    changed: Instant,
    interval: Duration,
}

impl Health {
    /// A backend that was just found, to be checked each `interval` when it is up.
    pub fn new(interval: Duration, now: Instant) -> Self {
        Self::known(Standing::Down, now, interval)
    }

    /// A backend that was known before, by another program in this process: like this `since` then.
    pub fn known(standing: Standing, since: Instant, interval: Duration) -> Self {
        Self {
            standing,
            strikes: 0,
            failures: 0,
            without_etcd: None,
            changed: since,
            interval,
        }
    }

    /// Where it stands.
    pub fn standing(&self) -> Standing {
        self.standing
    }

    /// Takes in the outcome of a check; tells whether the standing changed.
    ///
    /// | outcome | standing |
    /// |---|---|
    /// | 200 | up |
    /// | refused, another status | down at once |
    /// | cannot be reached, breaks | down when it happens [`STRIKES`] times in a row |
    /// | no answer in time, from it or from its etcd | slow instead of up, after [`STRIKES`] doubts in a row; never worse... |
    /// | no answer from its etcd for [`ETCD_PATIENCE`] | ...but for this: down |
    pub fn observe(&mut self, outcome: Outcome, now: Instant) -> bool {
        let was = self.standing;
        if outcome == Outcome::WithoutEtcd {
            self.without_etcd.get_or_insert(now);
        } else if !matches!(outcome, Outcome::TimedOut | Outcome::Inconclusive) {
            self.without_etcd = None;
        }
        match outcome {
            Outcome::Ready => self.settle(Standing::Up),
            Outcome::NotReady(_) | Outcome::Refused => self.settle(Standing::Down),
            Outcome::WithoutEtcd
                if self
                    .without_etcd
                    .is_some_and(|since| now.saturating_duration_since(since) >= ETCD_PATIENCE) =>
            {
                self.settle(Standing::Down);
            }
            Outcome::TimedOut | Outcome::WithoutEtcd => {
                self.failures = 0;
                self.doubt();
            }
            Outcome::Unreachable | Outcome::Broken => {
                self.failures = self.failures.saturating_add(1);
                self.doubt();
                if self.failures >= STRIKES {
                    self.standing = Standing::Down;
                }
            }
            Outcome::Inconclusive => {}
        }
        let changed = was != self.standing;
        if changed {
            self.changed = now;
        }
        changed
    }

    fn settle(&mut self, standing: Standing) {
        (self.standing, self.strikes, self.failures) = (standing, 0, 0);
    }

    fn doubt(&mut self) {
        self.strikes = self.strikes.saturating_add(1);
        if self.standing == Standing::Up && self.strikes >= STRIKES {
            self.standing = Standing::Slow;
        }
    }

    /// How long to wait until the next check. Doubt is settled quickly, but one that is slow is not given more to do.
    pub fn pause(&self, now: Instant) -> Duration {
        let restless = now.saturating_duration_since(self.changed) < RESTLESS;
        match self.standing {
            Standing::Up if self.strikes > 0 => FAST_INTERVAL,
            Standing::Slow if self.failures > 0 => FAST_INTERVAL,
            Standing::Up | Standing::Slow => self.interval,
            Standing::Down if restless => FAST_INTERVAL,
            Standing::Down => self.interval.max(LOCAL_INTERVAL),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Outcome::{Broken, Inconclusive, NotReady, Ready, Refused, TimedOut, Unreachable, WithoutEtcd};
    use super::Standing::{Down, Slow, Up};
    use super::*;

    fn after(outcomes: &[Outcome]) -> Standing {
        let start = Instant::now();
        let mut health = Health::new(LOCAL_INTERVAL, start);
        for outcome in outcomes {
            health.observe(*outcome, start);
        }
        health.standing()
    }

    #[test]
    fn standings_after_outcomes() {
        let cases: &[(&[Outcome], Standing)] = &[
            (&[], Down),
            (&[Ready], Up),
            (&[NotReady(500)], Down),
            (&[Refused, Ready], Up),
            // A certain no counts at once.
            (&[Ready, NotReady(500)], Down),
            (&[Ready, NotReady(401)], Down),
            (&[Ready, Refused], Down),
            (&[Ready, TimedOut, TimedOut, Refused], Down),
            (&[Ready, TimedOut, TimedOut, NotReady(500)], Down),
            // No answer in time only makes it slow, however often.
            (&[Ready, TimedOut], Up),
            (&[Ready, TimedOut, TimedOut], Slow),
            (&[Ready, WithoutEtcd], Up),
            (&[Ready, WithoutEtcd, WithoutEtcd], Slow),
            (&[Ready, WithoutEtcd, TimedOut], Slow),
            (&[Ready, TimedOut, TimedOut, TimedOut, WithoutEtcd, TimedOut], Slow),
            (&[Ready, TimedOut, Ready, TimedOut], Up),
            (&[Ready, TimedOut, TimedOut, Ready], Up),
            // Connections that fail, in a row.
            (&[Ready, Unreachable], Up),
            (&[Ready, Unreachable, Unreachable], Down),
            (&[Ready, Broken, Broken], Down),
            (&[Ready, Unreachable, Broken], Down),
            (&[TimedOut, Ready, Broken], Up),
            (&[Ready, TimedOut, Broken], Slow),
            (&[Ready, Broken, TimedOut], Slow),
            (&[Ready, Broken, TimedOut, Broken], Slow),
            (&[Ready, TimedOut, Unreachable, Unreachable], Down),
            (&[Ready, TimedOut, TimedOut, Unreachable], Slow),
            (&[Ready, TimedOut, TimedOut, Unreachable, Unreachable], Down),
            // Only a 200 revives.
            (&[TimedOut, TimedOut, WithoutEtcd], Down),
            (&[Ready, Refused, TimedOut, TimedOut], Down),
            (&[Ready, Refused, WithoutEtcd, Ready], Up),
            (&[Ready, Inconclusive, Inconclusive, Inconclusive], Up),
            (&[Inconclusive], Down),
        ];
        for (outcomes, standing) in cases {
            assert_eq!(after(outcomes), *standing, "{outcomes:?}");
        }
    }

    #[test]
    fn an_etcd_that_stays_away_ends_it() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut health = Health::known(Up, start, LOCAL_INTERVAL);
        for (second, outcome, standing) in [
            (0, WithoutEtcd, Up),
            (1, WithoutEtcd, Slow),
            (20, WithoutEtcd, Slow),
            (21, Ready, Up),
            (22, WithoutEtcd, Up),
            (23, TimedOut, Slow),
            (51, WithoutEtcd, Slow),
            // Silence alone is no such word.
            (100, TimedOut, Slow),
            (101, WithoutEtcd, Down),
            (102, WithoutEtcd, Down),
            (103, Ready, Up),
        ] {
            health.observe(outcome, at(second));
            assert_eq!(health.standing(), standing, "{second} s");
        }
    }

    #[test]
    fn answers() {
        let starting = "[+]ping ok\n[-]poststarthook/rbac/bootstrap-roles failed: not finished\nreadyz check failed\n";
        let etcd = "[+]ping ok\n[+]log ok\n[-]etcd failed: reason withheld\n[+]shutdown ok\nreadyz check failed\n";
        let both = "[-]etcd failed: reason withheld\n[-]etcd-readiness failed: reason withheld\n";
        let ending = "[+]ping ok\n[-]shutdown failed: reason withheld\nreadyz check failed\n";
        let mixed = format!("{etcd}{ending}");
        for (status, body, outcome) in [
            (200, "ok", Ready),
            (500, "", NotReady(500)),
            (500, "\u{fffd}[-]etcd", NotReady(500)),
            (500, starting, NotReady(500)),
            (500, etcd, WithoutEtcd),
            (500, both, WithoutEtcd),
            (500, "[-]etcd-3-client failed", NotReady(500)),
            (500, ending, NotReady(500)),
            (500, mixed.as_str(), NotReady(500)),
            (401, "Unauthorized", NotReady(401)),
        ] {
            assert_eq!(Outcome::of_answer(status, body.as_bytes()), outcome, "{body}");
        }
    }

    #[test]
    fn only_changes_are_told() {
        let now = Instant::now();
        let mut health = Health::new(LOCAL_INTERVAL, now);
        let told: Vec<_> = [Refused, Ready, Ready, TimedOut, TimedOut, TimedOut, NotReady(500)]
            .map(|outcome| health.observe(outcome, now))
            .into();
        assert_eq!(told, [false, true, false, false, true, false, true]);
    }

    #[test]
    fn pauses() {
        let start = Instant::now();
        let late = start + RESTLESS;
        let mut health = Health::new(REMOTE_INTERVAL, start);
        assert_eq!(health.pause(start), FAST_INTERVAL);
        assert_eq!(health.pause(late), REMOTE_INTERVAL);
        for (outcome, pause) in [
            (Ready, REMOTE_INTERVAL),
            // Doubt is settled quickly.
            (TimedOut, FAST_INTERVAL),
            // What is slow is not asked more often.
            (TimedOut, REMOTE_INTERVAL),
            (TimedOut, REMOTE_INTERVAL),
            (Unreachable, FAST_INTERVAL),
            (Unreachable, FAST_INTERVAL),
        ] {
            health.observe(outcome, late);
            assert_eq!(health.pause(late), pause, "{outcome:?}");
        }
        assert_eq!(health.standing(), Down);
        assert_eq!(health.pause(late + RESTLESS), REMOTE_INTERVAL);
    }
}
