//! Who has the virtual address: leases that a majority of the control-plane machines grants. Pure.
//!
//! Each machine is a voter that promises the address to one machine at a time, for a while of its own clock. Whoever has the
//! promises of a majority has the address until [`Terms::trust`] after it *asked*, and voters keep a promise for
//! [`Terms::lease`] after they *answered*: no two machines have it at once as long as no clock runs more than
//! `lease / trust` times as fast as another. No clock is compared with another one, and none is set.
//!
//! Rather than the API's own Lease objects this is used because an API that is slow (a cold start, a full disk) would make the
//! address wander just then; rather than VRRP (RFC 9568) because there two machines that don't hear each other both have
//! the address.

use std::collections::VecDeque;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// What all machines go by.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// How long a voter keeps a promise after it gave it.
    pub lease: Duration,
    /// How long the holder counts on promises after it asked for them.
    pub trust: Duration,
    /// How often it asks, and how long a candidate waits for answers.
    pub renew: Duration,
    /// How much longer each machine waits than the one before it in the list, so that they don't ask at the same time; the
    /// first one too, so that all promises have ended by then.
    pub turn: Duration,
    /// How long a promise may be that bridges the time in which a holder's process is replaced.
    pub bridge: Duration,
}

impl Terms {
    /// Fail-over takes at most `lease` and a few turns.
    pub const DEFAULT: Self = Self {
        lease: Duration::from_millis(2100),
        trust: Duration::from_millis(1900),
        renew: Duration::from_millis(300),
        turn: Duration::from_millis(60),
        bridge: Duration::from_secs(8),
    };

    /// How long the holder counts on a promise of this length.
    fn trust(&self, lease: Duration) -> Duration {
        lease.mul_f64(self.trust.as_secs_f64() / self.lease.as_secs_f64())
    }
}

/// A round of asking: which process of the machine asked, and how many it had asked before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Round {
    /// Differs from process to process.
    pub process: u64,
    /// Counts up.
    pub number: u64,
}

/// What machines tell each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Message {
    /// Promise the address to me for so many milliseconds.
    Ask {
        /// The round.
        round: Round,
        /// Milliseconds.
        lease: u64,
    },
    /// Promised.
    Grant {
        /// The round that was asked in.
        round: Round,
    },
    /// It's promised to another one, for so many milliseconds still.
    Refuse {
        /// The round that was asked in.
        round: Round,
        /// Milliseconds.
        remaining: u64,
    },
    /// I don't have the address any more, nor do I want it: promises of rounds up to this one are void.
    Release {
        /// The last round.
        round: Round,
    },
}

/// What is to be done, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// Have the address, until this time unless told again.
    Hold {
        /// When to drop it by oneself.
        until: Duration,
        /// When others may have it: what is left of it when this process is gone must have ended by then.
        others: Duration,
    },
    /// Don't have the address any more.
    Drop,
    /// Send to the machine of this place in the list.
    Send(usize, Message),
}

/// A promise as its voter keeps it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Promise {
    /// The machine's place in the list.
    pub to: usize,
    /// The round.
    pub round: Round,
    /// When it ends.
    pub until: Duration,
}

/// A round in which this machine asked.
#[derive(Debug)]
struct Asked {
    number: u64,
    at: Duration,
    lease: Duration,
    granted: u64,
    refused: u64,
}

/// One machine's part. All times are of its own clock that only goes forward, from any beginning.
#[derive(Debug)]
pub struct Election {
    terms: Terms,
    me: usize,
    machines: usize,
    process: u64,
    // As a voter:
    promise: Option<Promise>,
    /// What an earlier process promised is unknown; it has ended by then.
    silent_until: Duration,
    newest: Vec<Option<Round>>,
    // As one that wants it:
    asked: VecDeque<Asked>,
    number: u64,
    next: Duration,
    wanted_since: Option<Duration>,
    not_before: Duration,
    held_until: Option<Duration>,
}

impl Election {
    /// For the machine with place `me` among `machines` (64 at most), started `now`. `process` differs from that of every
    /// earlier process of this machine. `promise` is one that an earlier process noted because it bridges.
    pub fn new(
        terms: Terms,
        me: usize,
        machines: usize,
        process: u64,
        now: Duration,
        promise: Option<Promise>,
    ) -> Self {
        Self {
            terms,
            me,
            machines,
            process,
            promise,
            silent_until: now + terms.lease,
            newest: vec![None; machines],
            asked: VecDeque::new(),
            number: 0,
            next: now,
            wanted_since: None,
            not_before: now,
            held_until: None,
        }
    }

    /// Until when this machine has the address, if it does.
    pub fn holds(&self, now: Duration) -> Option<Duration> {
        self.held_until.filter(|until| now < *until)
    }

    /// The promise that was given, if it lasts.
    pub fn promise(&self, now: Duration) -> Option<Promise> {
        self.promise.filter(|promise| now < promise.until)
    }

    fn round(&self) -> Round {
        Round {
            process: self.process,
            number: self.number,
        }
    }

    fn majority(&self, votes: u64) -> bool {
        votes.count_ones() as usize * 2 > self.machines
    }

    /// To be called every few dozen milliseconds, and whenever `fit` changes: whether this machine's API serves.
    #[must_use = "what is to be done"]
    pub fn tick(&mut self, now: Duration, fit: bool) -> Vec<Output> {
        let mut out = Vec::new();
        if self.held_until.is_some_and(|until| now >= until) {
            self.held_until = None;
            out.push(Output::Drop);
        }
        if !fit {
            if self.wanted_since.take().is_some() {
                self.give_up(now, &mut out);
            }
            return out;
        }
        let since = *self.wanted_since.get_or_insert(now);
        if now < self.silent_until {
            return out;
        }
        if self.held_until.is_some() {
            if now >= self.next {
                self.ask(now, self.terms.lease, &mut out);
            }
            return out;
        }
        if self.asked.iter().any(|asked| now < asked.at + self.terms.renew) {
            return out;
        }
        if !self.asked.is_empty() {
            // No majority in time.
            self.give_up(now, &mut out);
            self.not_before = now + self.terms.turn;
        }
        let others = self.promise.filter(|promise| promise.to != self.me);
        let free = others.map_or(since, |promise| promise.until.max(since));
        if now >= free.max(self.not_before) + self.turn() {
            self.ask(now, self.terms.lease, &mut out);
        }
        out
    }

    fn turn(&self) -> Duration {
        self.terms.turn * u32::try_from(self.me + 1).unwrap_or(u32::MAX)
    }

    fn ask(&mut self, now: Duration, lease: Duration, out: &mut Vec<Output>) {
        self.number += 1;
        self.next = now + self.terms.renew;
        let round = self.round();
        let before = self.promise(now).map_or(now, |before| before.until);
        self.promise = Some(Promise {
            to: self.me,
            round,
            until: before.max(now + lease),
        });
        let terms = self.terms;
        self.asked.retain(|asked| now < asked.at + terms.trust(asked.lease));
        self.asked.push_back(Asked {
            number: self.number,
            at: now,
            lease,
            granted: 0,
            refused: 0,
        });
        let lease = u64::try_from(lease.as_millis()).unwrap_or(u64::MAX);
        self.tell_all(Message::Ask { round, lease }, out);
        self.granted(now, self.number, self.me, out);
    }

    fn tell_all(&self, message: Message, out: &mut Vec<Output>) {
        let others = (0..self.machines).filter(|machine| *machine != self.me);
        out.extend(others.map(|machine| Output::Send(machine, message)));
    }

    /// Drops the address first, and then tells the others.
    fn give_up(&mut self, now: Duration, out: &mut Vec<Output>) {
        // Even if this process never had it: an earlier one may have left it.
        self.held_until = None;
        out.push(Output::Drop);
        // Answers to what was asked before count for nothing from here on.
        self.asked.clear();
        if self.promise.is_some_and(|promise| promise.to == self.me) {
            self.promise = None;
        }
        self.not_before = self.not_before.max(now);
        if self.number > 0 {
            self.tell_all(Message::Release { round: self.round() }, out);
        }
    }

    /// Gives the address up for good: the process ends.
    #[must_use = "what is to be done"]
    pub fn release(&mut self, now: Duration) -> Vec<Output> {
        let mut out = Vec::new();
        self.give_up(now, &mut out);
        out
    }

    /// Asks for a promise that lasts while this process is replaced by another one. It has it when the next
    /// [`Output::Hold`] comes; until then, and if it never comes, all is as before.
    #[must_use = "what is to be done"]
    pub fn bridge(&mut self, now: Duration) -> Vec<Output> {
        let mut out = Vec::new();
        if self.holds(now).is_some() {
            self.ask(now, self.terms.bridge, &mut out);
        }
        out
    }

    fn granted(&mut self, now: Duration, number: u64, by: usize, out: &mut Vec<Output>) {
        let terms = self.terms;
        let machines = self.machines;
        let Some(asked) = self.asked.iter_mut().find(|asked| asked.number == number) else {
            return;
        };
        let had = asked.granted;
        asked.granted |= 1 << by;
        let until = asked.at + terms.trust(asked.lease);
        let others = asked.at + asked.lease;
        let enough = |votes: u64| votes.count_ones() as usize * 2 > machines;
        if enough(asked.granted) && !enough(had) && now < until && self.held_until.is_none_or(|held| held < until) {
            self.held_until = Some(until);
            out.push(Output::Hold { until, others });
        }
    }

    /// Takes in what another machine said.
    #[must_use = "what is to be done"]
    pub fn receive(&mut self, now: Duration, from: usize, message: Message) -> Vec<Output> {
        let mut out = Vec::new();
        if from >= self.machines || from == self.me {
            return out;
        }
        match message {
            Message::Ask { round, lease } => {
                if !self.is_news(from, round) || now < self.silent_until {
                    return out;
                }
                let lease = Duration::from_millis(lease).min(self.terms.bridge);
                let answer = match self.promise(now) {
                    Some(promise) if promise.to != from => Message::Refuse {
                        round,
                        remaining: u64::try_from(promise.until.saturating_sub(now).as_millis()).unwrap_or(u64::MAX),
                    },
                    before => {
                        // A longer one stays: what the holder was told to count on may be older than this round.
                        let until = before.map_or(now + lease, |before| before.until.max(now + lease));
                        self.promise = Some(Promise { to: from, round, until });
                        Message::Grant { round }
                    }
                };
                out.push(Output::Send(from, answer));
            }
            Message::Grant { round } if round.process == self.process => {
                self.granted(now, round.number, from, &mut out);
            }
            Message::Refuse { round, remaining } if round.process == self.process => {
                let Some(asked) = self.asked.iter_mut().find(|asked| asked.number == round.number) else {
                    return out;
                };
                asked.refused |= 1 << from;
                let possible = !asked.refused & (u64::MAX >> (64 - self.machines));
                if self.held_until.is_none() && !self.majority(possible) {
                    self.give_up(now, &mut out);
                    self.not_before = now + Duration::from_millis(remaining).min(self.terms.lease);
                }
            }
            Message::Release { round } => {
                if (self.is_news(from, round) || self.newest.get(from) == Some(&Some(round)))
                    && let Some(promise) = &mut self.promise
                    && promise.to == from
                {
                    promise.until = promise.until.min(now);
                }
            }
            Message::Grant { .. } | Message::Refuse { .. } => {}
        }
        out
    }

    /// Whether a round is later than all that were heard of; an old one that was long on its way must not bind anyone.
    fn is_news(&mut self, from: usize, round: Round) -> bool {
        let Some(newest) = self.newest.get_mut(from) else {
            return false;
        };
        let news = newest.is_none_or(|known| known.process != round.process || known.number < round.number);
        if news {
            *newest = Some(round);
        }
        news
    }
}

#[cfg(test)]
#[path = "elect_tests.rs"]
mod tests;
