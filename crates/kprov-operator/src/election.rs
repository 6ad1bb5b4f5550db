//! Who leads: of several operators one, told by a Lease.
//!
//! Nobody reads another machine's clock. How long a Lease has not been renewed is measured by whoever waits for it, from when it
//! saw the Lease's last change; who leads counts from before it sent its last renewal, and so stops before anybody else can
//! begin. Every write carries the Lease's resource version, so that of two who write at once one fails.
//!
//! [`decide`] is pure; [`Elector`] asks and writes; [`Leadership`] is asked before every write that the lead is for.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::{Api, PostParams};
use kube::{Client, ResourceExt as _};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

/// How long the lead lasts, and how it's used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    duration: Duration,
    interval: Duration,
    request: Duration,
}

/// Terms under which two could lead at once, or nobody could work.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a lease of {duration:?} is too short: a request may take {request:?}, and the lease is renewed every {interval:?}"
)]
pub struct TermsError {
    duration: Duration,
    interval: Duration,
    request: Duration,
}

impl Terms {
    /// A lease that lasts `duration` from its last renewal, is renewed every `interval`, and allows only what begins `request`
    /// before it ends.
    pub fn new(duration: Duration, interval: Duration, request: Duration) -> Result<Self, TermsError> {
        // One renewal may fail without work having to stop.
        if interval.is_zero() || duration < request + interval * 2 {
            return Err(TermsError {
                duration,
                interval,
                request,
            });
        }
        Ok(Self {
            duration,
            interval,
            request,
        })
    }

    /// How long a lease lasts from its last renewal.
    pub const fn duration(&self) -> Duration {
        self.duration
    }
}

/// Who holds a Lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Holder {
    /// Nobody: it was never held, or its holder has stopped all work and given it up.
    Nobody,
    /// The operator of that name.
    Operator(String),
    /// There is no Lease. Somebody has deleted it, and its holder may not know yet.
    Unknown,
}

/// A Lease as one operator has seen it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Who holds it.
    pub holder: Holder,
    /// How long it's good without being renewed, as its holder says.
    pub duration: Duration,
    /// The resource version.
    pub version: String,
    /// When it was first seen like this, by this machine's clock.
    pub since: Instant,
}

impl Seen {
    /// What is seen of a Lease, or of its absence, at `now`. One that has not changed since it was seen before goes on from
    /// there.
    pub fn next(previous: Option<&Self>, lease: Option<&Lease>, terms: &Terms, now: Instant) -> Self {
        let version = lease.and_then(Lease::resource_version).unwrap_or_default();
        let spec = lease.and_then(|lease| lease.spec.as_ref());
        let seconds = spec
            .and_then(|s| s.lease_duration_seconds)
            .and_then(|s| u64::try_from(s).ok())
            .filter(|s| *s > 0);
        let holder = spec.and_then(|s| s.holder_identity.clone()).filter(|h| !h.is_empty());
        Self {
            holder: match (lease, holder) {
                (None, _) => Holder::Unknown,
                (_, None) => Holder::Nobody,
                (_, Some(holder)) => Holder::Operator(holder),
            },
            duration: seconds.map_or(terms.duration, Duration::from_secs),
            since: previous.filter(|p| p.version == version).map_or(now, |p| p.since),
            version,
        }
    }
}

impl Seen {
    fn is_held_by(&self, me: &str) -> bool {
        matches!(&self.holder, Holder::Operator(holder) if holder == me)
    }
}

/// What to do about a Lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Nobody leads: take the lead.
    Take,
    /// Renew the lead that one has.
    Renew,
    /// Another leads, at least until then.
    Wait {
        /// When to look upon it as given up, unless it's renewed.
        until: Instant,
    },
}

/// Decides at `now`. `me` is unique to this process and to those before it that are surely dead ([`crate::supervise`]): what it
/// finds under its name nobody else acts by.
pub fn decide(lease: &Seen, me: &str, now: Instant) -> Decision {
    match &lease.holder {
        Holder::Nobody => Decision::Take,
        Holder::Operator(_) if lease.is_held_by(me) => Decision::Renew,
        Holder::Operator(_) | Holder::Unknown => {
            let until = lease.since + lease.duration;
            if until <= now {
                Decision::Take
            } else {
                Decision::Wait { until }
            }
        }
    }
}

/// Whether this operator leads. Asked before each write.
#[derive(Clone, Debug)]
pub struct Leadership {
    good_until: watch::Receiver<Option<Instant>>,
    request: Duration,
}

impl Leadership {
    /// Whether a request may begin now: it ends before the lead does.
    pub fn permits(&self) -> bool {
        self.good_until
            .borrow()
            .is_some_and(|until| Instant::now() + self.request < until)
    }

    /// Resolves when [`permits`](Self::permits) is true.
    pub async fn begins(&mut self) {
        let request = self.request;
        let good = |until: &Option<Instant>| until.is_some_and(|until| Instant::now() + request < until);
        if self.good_until.wait_for(good).await.is_err() {
            // Nobody stands for election any more.
            std::future::pending::<()>().await;
        }
    }

    /// Resolves when [`permits`](Self::permits) is false.
    pub async fn ends(&mut self) {
        loop {
            let Some(until) = *self.good_until.borrow_and_update() else {
                return;
            };
            tokio::select! {
                () = sleep_until(until - self.request) => return,
                changed = self.good_until.changed() => if changed.is_err() { return },
            }
        }
    }
}

/// Why a try came to nothing. The next one may not.
#[derive(Debug, thiserror::Error)]
pub enum ElectionError {
    /// The API server, or the way there, says so.
    #[error("could not ask for the Lease `{name}`")]
    Api {
        /// The Lease's name.
        name: String,
        /// Why.
        #[source]
        source: Box<kube::Error>,
    },
    /// No answer came.
    #[error("no answer about the Lease `{name}` in time")]
    NoAnswer {
        /// The Lease's name.
        name: String,
    },
}

/// Stands for election.
#[derive(Debug)]
pub struct Elector {
    leases: Api<Lease>,
    name: String,
    me: String,
    terms: Terms,
    /// The Lease as it was read or written last; `None` where it has to be read.
    lease: Option<Lease>,
    seen: Option<Seen>,
    good_until: watch::Sender<Option<Instant>>,
}

impl Elector {
    /// An operator that wants the lead by the Lease `name` in `namespace`. `me` has to be unique, as for
    /// [`decide`].
    pub fn new(client: Client, namespace: &str, name: &str, me: String, terms: Terms) -> Self {
        Self {
            leases: Api::namespaced(client, namespace),
            name: name.to_owned(),
            me,
            terms,
            lease: None,
            seen: None,
            good_until: watch::Sender::new(None),
        }
    }

    /// What tells whether this operator leads.
    pub fn leadership(&self) -> Leadership {
        Leadership {
            good_until: self.good_until.subscribe(),
            request: self.terms.request,
        }
    }

    /// Takes the lead when it's free and keeps it, until `stop`.
    pub async fn run(&mut self, stop: &CancellationToken) {
        let mut failing = false;
        while !stop.is_cancelled() {
            let begun = Instant::now();
            match self.tick().await {
                Ok(()) => failing = false,
                Err(error) => {
                    // Told once; nobody but the API server can help.
                    if !std::mem::replace(&mut failing, true) {
                        tracing::warn!(error = chain(&error), "the election stands still");
                    }
                }
            }
            tokio::select! {
                () = stop.cancelled() => {}
                () = sleep(self.terms.interval.saturating_sub(begun.elapsed())) => {}
            }
        }
    }

    /// Gives the lead up, if this operator has it: another takes it at its next look. No work may run any more.
    pub async fn release(mut self) {
        let led = self.good_until.send_replace(None).is_some();
        if !led {
            return;
        }
        let released = match self.lease.take() {
            Some(mut lease) => {
                let spec = lease.spec.get_or_insert_default();
                spec.holder_identity = None;
                self.replace(&lease).await.map(drop)
            }
            // The last renewal's fate is not known; the lead ends by itself.
            None => Ok(()),
        };
        match released {
            Ok(()) => tracing::info!("gave up the lead"),
            Err(error) => tracing::warn!(error = chain(&error), "the lead was not given up, and ends by itself"),
        }
    }

    async fn tick(&mut self) -> Result<(), ElectionError> {
        // Who leads has written the Lease last, and knows it.
        if self.good_until.borrow().is_none() || self.lease.is_none() {
            self.look().await?;
        }
        let decision = self.seen.as_ref().map(|seen| decide(seen, &self.me, Instant::now()));
        match decision {
            Some(Decision::Wait { .. }) => {
                self.lose();
                Ok(())
            }
            Some(Decision::Take | Decision::Renew) | None => self.write().await,
        }
    }

    fn lose(&self) {
        if self.good_until.send_replace(None).is_some() {
            let holder = self.seen.as_ref().map(|seen| &seen.holder);
            tracing::warn!(?holder, "lost the lead");
        }
    }

    async fn look(&mut self) -> Result<(), ElectionError> {
        let lease = self.bounded(self.leases.get_opt(&self.name)).await?;
        self.seen = Some(Seen::next(
            self.seen.as_ref(),
            lease.as_ref(),
            &self.terms,
            Instant::now(),
        ));
        self.lease = lease;
        Ok(())
    }

    /// Takes or renews the lead.
    async fn write(&mut self) -> Result<(), ElectionError> {
        // Whatever becomes of the request, the Lease is not known to be like this any more.
        let before = self.lease.take();
        let lease = self.wanted(before.as_ref());
        let sent = Instant::now();
        let written = match before {
            Some(_) => self.replace(&lease).await,
            None => self.bounded(self.leases.create(&PostParams::default(), &lease)).await,
        };
        let written = match written {
            Ok(written) => written,
            // Another has written it since, or has deleted it.
            Err(ElectionError::Api { source, .. }) if matches!(&*source, kube::Error::Api(status) if matches!(status.code, 404 | 409)) =>
            {
                self.look().await?;
                if self.seen.as_ref().is_some_and(|seen| !seen.is_held_by(&self.me)) {
                    self.lose();
                }
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        self.seen = Some(Seen::next(None, Some(&written), &self.terms, sent));
        self.lease = Some(written);
        if self.good_until.send_replace(Some(sent + self.terms.duration)).is_none() {
            tracing::info!(identity = self.me, "took the lead");
        }
        Ok(())
    }

    /// The Lease in this operator's name. Times are for people alone.
    fn wanted(&self, before: Option<&Lease>) -> Lease {
        let mut lease = before.cloned().unwrap_or_default();
        lease.metadata.name = Some(self.name.clone());
        let now = Some(MicroTime(Timestamp::now()));
        let LeaseSpec {
            holder_identity,
            acquire_time,
            lease_transitions,
            ..
        } = lease.spec.unwrap_or_default();
        let renewed = holder_identity.as_deref() == Some(self.me.as_str());
        lease.spec = Some(LeaseSpec {
            holder_identity: Some(self.me.clone()),
            lease_duration_seconds: i32::try_from(self.terms.duration.as_secs().max(1)).ok(),
            acquire_time: if renewed { acquire_time } else { now.clone() },
            renew_time: now,
            lease_transitions: Some(lease_transitions.unwrap_or(0) + i32::from(!renewed)),
            ..LeaseSpec::default()
        });
        lease
    }

    async fn replace(&self, lease: &Lease) -> Result<Lease, ElectionError> {
        self.bounded(self.leases.replace(&self.name, &PostParams::default(), lease))
            .await
    }

    /// A request about the Lease. It gets so little time that another try can be made before the lead ends.
    async fn bounded<T>(&self, request: impl Future<Output = Result<T, kube::Error>>) -> Result<T, ElectionError> {
        match timeout(self.terms.interval * 2, request).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(source)) => Err(ElectionError::Api {
                name: self.name.clone(),
                source: Box::new(source),
            }),
            Err(_) => Err(ElectionError::NoAnswer {
                name: self.name.clone(),
            }),
        }
    }
}

/// An error with all that caused it, for a log.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn terms() -> Terms {
        Terms::new(Duration::from_secs(15), Duration::from_secs(2), Duration::from_secs(10)).unwrap()
    }

    fn lease(holder: &str, version: &str, renewed: &str, seconds: Option<i32>) -> Lease {
        let mut lease = Lease::default();
        lease.metadata.resource_version = Some(version.to_owned());
        lease.spec = Some(LeaseSpec {
            holder_identity: Some(holder.to_owned()),
            lease_duration_seconds: seconds,
            renew_time: Some(MicroTime(renewed.parse().unwrap())),
            ..LeaseSpec::default()
        });
        lease
    }

    fn after(start: Instant, seconds: u64) -> Instant {
        start + Duration::from_secs(seconds)
    }

    const THEN: &str = "2026-05-01T12:00:00Z";

    #[test]
    fn decides() {
        let start = Instant::now();
        let seen = |holder: &str| Seen::next(None, Some(&lease(holder, "1", THEN, Some(15))), &terms(), start);
        let until = after(start, 15);
        for (holder, passed, decision) in [
            ("", 0, Decision::Take),
            ("me", 0, Decision::Renew),
            // However late: the resource version tells whether it was taken meanwhile.
            ("me", 100, Decision::Renew),
            ("other", 0, Decision::Wait { until }),
            ("other", 14, Decision::Wait { until }),
            ("other", 15, Decision::Take),
            ("other", 100, Decision::Take),
        ] {
            assert_eq!(
                decide(&seen(holder), "me", after(start, passed)),
                decision,
                "{holder} {passed}"
            );
        }
        let free = Seen::next(None, Some(&Lease::default()), &terms(), start);
        assert_eq!(decide(&free, "me", start), Decision::Take);
        // Deleted: whoever held it may go on for as long as it was good.
        let missing = Seen::next(Some(&seen("other")), None, &terms(), after(start, 1));
        assert_eq!(
            decide(&missing, "me", after(start, 15)),
            Decision::Wait {
                until: after(start, 16)
            }
        );
        let still = Seen::next(Some(&missing), None, &terms(), after(start, 16));
        assert_eq!(decide(&still, "me", after(start, 16)), Decision::Take);
    }

    #[test]
    fn no_other_machines_clock_counts() {
        let start = Instant::now();
        for renewed in [THEN, "1970-01-01T00:00:00Z", "9999-01-01T00:00:00Z"] {
            let first = Seen::next(None, Some(&lease("other", "1", renewed, Some(15))), &terms(), start);
            assert!(
                matches!(decide(&first, "me", after(start, 14)), Decision::Wait { .. }),
                "{renewed}"
            );
            // Renewed, and whatever time it names: it's good for as long again from when that was seen.
            let renewal = lease("other", "2", THEN, Some(15));
            let second = Seen::next(Some(&first), Some(&renewal), &terms(), after(start, 14));
            assert_eq!(
                decide(&second, "me", after(start, 28)),
                Decision::Wait {
                    until: after(start, 29)
                },
                "{renewed}"
            );
            // Not renewed: it runs out, however often it's looked at.
            let third = Seen::next(Some(&second), Some(&renewal), &terms(), after(start, 28));
            assert_eq!(decide(&third, "me", after(start, 29)), Decision::Take, "{renewed}");
        }
    }

    #[test]
    fn a_lease_says_itself_how_long_it_is_good() {
        let start = Instant::now();
        for (seconds, wanted) in [(Some(60), 60), (Some(3), 3), (Some(0), 15), (Some(-5), 15), (None, 15)] {
            let seen = Seen::next(None, Some(&lease("other", "1", THEN, seconds)), &terms(), start);
            assert_eq!(
                decide(&seen, "me", start),
                Decision::Wait {
                    until: after(start, wanted)
                },
                "{seconds:?}"
            );
        }
    }

    #[test]
    fn terms_leave_time_to_stop() {
        let of = |duration, interval, request| {
            Terms::new(
                Duration::from_secs(duration),
                Duration::from_secs(interval),
                Duration::from_secs(request),
            )
        };
        assert!(of(14, 2, 10).is_ok());
        for (duration, interval, request) in [(13, 2, 10), (10, 0, 5), (10, 2, 10), (1, 1, 1)] {
            assert!(
                of(duration, interval, request).is_err(),
                "{duration} {interval} {request}"
            );
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_permit_ends_a_request_before_the_lead() {
        let (sender, good_until) = watch::channel(None);
        let mut leadership = Leadership {
            good_until,
            request: terms().request,
        };
        assert!(!leadership.permits());
        leadership.ends().await;
        let start = Instant::now();
        sender.send_replace(Some(start + terms().duration));
        leadership.begins().await;
        assert!(leadership.permits());
        tokio::time::advance(Duration::from_millis(4_999)).await;
        assert!(leadership.permits());
        leadership.ends().await;
        assert_eq!(start.elapsed(), Duration::from_secs(5));
        assert!(!leadership.permits());
        // One that's renewed goes on.
        sender.send_replace(Some(Instant::now() + terms().duration));
        let renewed = tokio::spawn(async move {
            tokio::time::sleep(Duration::from_secs(4)).await;
            sender.send_replace(Some(Instant::now() + terms().duration));
            sender
        });
        leadership.ends().await;
        assert_eq!(start.elapsed(), Duration::from_secs(14));
        drop(renewed);
    }
}
