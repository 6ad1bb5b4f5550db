//! What a test wants to go wrong.

use std::time::Duration;

use super::refusal::Refusal;

/// Something that goes wrong with calls of one name.
#[derive(Clone, Debug)]
pub struct Fault {
    call: String,
    subject: Option<String>,
    skip: u64,
    times: Option<u64>,
    what: What,
}

/// What goes wrong.
#[derive(Clone, Debug)]
pub enum What {
    /// 429 with this `Retry-After`, in seconds; nothing is done.
    Throttle(u32),
    /// Refused; nothing is done.
    Refuse(Refusal),
    /// 403 `AuthorizationFailed`, naming the action and the scope.
    Forbidden,
    /// 401 `ExpiredAuthenticationToken`.
    ExpiredToken,
    /// 401 `InvalidAuthenticationTokenTenant`.
    WrongTenant,
    /// The connection ends without an answer; nothing is done.
    LoseRequest,
    /// The connection ends without an answer; it **is** done.
    LoseReply,
    /// No answer ever; nothing is done. See [`super::Arm::hanging`].
    HangBefore,
    /// No answer ever; it **is** done. See [`super::Arm::hanging`].
    HangAfter,
    /// The operation that this starts stays `InProgress`.
    NeverEnds,
    /// The operation that this starts fails, and the resource stays, `Failed`.
    Fail(Refusal),
    /// What this makes isn't in lists for so long.
    Unlisted(Duration),
}

impl Fault {
    /// The next call of this name (`PUT virtualMachines`, `PUT *`, `* virtualMachines`, `*`) goes wrong, once.
    pub fn on(call: &str, what: What) -> Self {
        Self {
            call: call.to_owned(),
            subject: None,
            skip: 0,
            times: Some(1),
            what,
        }
    }

    /// Only calls about the resource of this name.
    #[must_use]
    pub fn named(mut self, subject: &str) -> Self {
        self.subject = Some(subject.to_owned());
        self
    }

    /// Lets so many calls pass first.
    #[must_use]
    pub fn after(mut self, calls: u64) -> Self {
        self.skip = calls;
        self
    }

    /// So many calls go wrong.
    #[must_use]
    pub fn times(mut self, times: u64) -> Self {
        self.times = Some(times);
        self
    }

    /// All calls go wrong from then on.
    #[must_use]
    pub fn always(mut self) -> Self {
        self.times = None;
        self
    }

    fn matches(&self, call: &str, subject: Option<&str>) -> bool {
        let part = |want: &str, have: &str| want == "*" || want.eq_ignore_ascii_case(have);
        let named = match (&self.subject, subject) {
            (None, _) => true,
            (Some(want), Some(have)) => want.eq_ignore_ascii_case(have),
            (Some(_), None) => false,
        };
        let called = match (self.call.split_once(' '), call.split_once(' ')) {
            (Some((verb, what)), Some((have_verb, have_what))) => part(verb, have_verb) && part(what, have_what),
            (None, _) => part(&self.call, call),
            (Some(_), None) => false,
        };
        named && called
    }
}

/// All that is to go wrong.
#[derive(Debug, Default)]
pub(super) struct Faults(Vec<Fault>);

impl Faults {
    pub(super) fn add(&mut self, fault: Fault) {
        self.0.push(fault);
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    /// What goes wrong with this call; each of them counts it.
    pub(super) fn take(&mut self, call: &str, subject: Option<&str>) -> Vec<What> {
        let mut taken = Vec::new();
        for fault in self.0.iter_mut().filter(|f| f.matches(call, subject)) {
            if fault.skip > 0 {
                fault.skip -= 1;
                continue;
            }
            if let Some(times) = &mut fault.times {
                *times = times.saturating_sub(1);
            }
            taken.push(fault.what.clone());
        }
        self.0.retain(|f| f.times != Some(0));
        taken
    }
}
