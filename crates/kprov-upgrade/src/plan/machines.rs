//! The machines' own programs (kubelet, containerd and the rest) on the way to a release: cordon, drain, switch, uncordon.
//!
//! Canaries go first, then control-plane machines one at a time, then the other workers within each pool's
//! `maxUnavailable`. Which are canaries is not remembered: the first workers that run the release are.

use kprov_types::api::ReleaseRef;
use kprov_types::{MachineName, Role};

use super::Waiting;
use super::draft::Draft;
use super::fleet::{self, Fleet, failed_before, has, is_switching, runs};
use crate::model::{Action, MachineSeen};

/// How machines are brought to a release.
pub(super) struct Rollout<'a> {
    /// The release.
    pub(super) to: &'a ReleaseRef,
    /// The machines it is about.
    pub(super) machines: Vec<(&'a MachineName, &'a MachineSeen)>,
    /// How many workers go first.
    pub(super) canaries: usize,
}

/// What a machine of a rollout needs next.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Need {
    /// Nothing.
    Nothing,
    /// Its pods back.
    Uncordon,
    /// To finish switching.
    Time,
    /// A person: it went back by itself.
    Person,
    /// To be Ready.
    Ready,
    /// To tell what it runs.
    Word,
    /// The release's programs.
    Stage,
    /// Its pods to leave; then it is told to switch.
    Drain,
    /// Its turn.
    Turn,
}

/// A machine and what it needs.
type Case<'a> = (&'a MachineName, &'a MachineSeen, Need);

impl<'a> Rollout<'a> {
    /// Drafts what is next. True when all of the machines run the release and are in service.
    pub(super) fn go_on(&self, draft: &mut Draft<'a>) -> bool {
        let cases: Vec<Case<'a>> = self
            .machines
            .iter()
            .map(|&(name, m)| (name, m, self.need(draft, m)))
            .collect();
        if cases.iter().all(|(_, _, need)| *need == Need::Nothing) {
            return true;
        }
        fleet::stage(draft, self.to, self.machines.iter().copied());
        let mut fleet = Fleet::of(draft);
        for &case in &cases {
            self.tend(draft, &fleet, case);
        }
        self.begin(draft, &mut fleet, &cases);
        false
    }

    fn need(&self, draft: &Draft<'_>, m: &MachineSeen) -> Need {
        if runs(m, self.to) {
            return match (m.ready, m.cordoned_by_us) {
                (true, None) => Need::Nothing,
                (true, Some(_)) => Need::Uncordon,
                (false, _) => Need::Ready,
            };
        }
        if m.ordered.as_ref().is_some_and(|(ordered, _)| ordered == self.to) {
            if is_switching(m) {
                return Need::Time;
            }
            if !failed_before(draft, m) {
                return Need::Person;
            }
        }
        if !m.ready {
            Need::Ready
        } else if m.running.is_none() {
            Need::Word
        } else if !has(m, self.to) {
            Need::Stage
        } else if m.cordoned_by_us.is_some() {
            Need::Drain
        } else {
            Need::Turn
        }
    }

    /// Goes on with a machine that has begun, or says what it lacks to begin.
    fn tend(&self, draft: &mut Draft<'a>, fleet: &Fleet<'a>, (name, m, need): Case<'a>) {
        match need {
            Need::Nothing | Need::Turn | Need::Stage => {}
            Need::Uncordon => draft.step(Action::Uncordon { machine: name.clone() }),
            Need::Time => fleet::wait_switch(draft, name, m, self.to),
            Need::Ready if runs(m, self.to) && fleet::has_time(draft, m) => fleet::wait_switch(draft, name, m, self.to),
            Need::Ready => fleet::wait_ready(draft, name, m),
            Need::Word => draft.wait(Waiting::Silent { machine: name.clone() }),
            Need::Person => {
                if m.ready && m.cordoned_by_us.is_some() {
                    draft.step(Action::Uncordon { machine: name.clone() });
                }
                draft.wait(Waiting::WentBack {
                    machine: name.clone(),
                    release: self.to.clone(),
                    message: m.failure.as_ref().map(|f| f.message.clone()).unwrap_or_default(),
                });
            }
            Need::Drain => {
                if m.role == Role::ControlPlane
                    && let Some(unhealthy) = unhealthy_beside(draft, name)
                {
                    draft.wait(unhealthy);
                } else if fleet.drain(draft, name, m) {
                    fleet::run(draft, name, m, self.to);
                }
            }
        }
    }

    /// Begins with more machines.
    fn begin(&self, draft: &mut Draft<'a>, fleet: &mut Fleet<'a>, cases: &[Case<'a>]) {
        let turns = || cases.iter().filter(|(_, _, need)| *need == Need::Turn);
        let of_workers = |&&(_, m, _): &&Case<'a>| m.role == Role::Worker;
        if let Some(canaries) = self.canaries_wanted(draft, cases) {
            // Those that were to be canaries already, first: a retry, or a change of mind, makes no others of more machines.
            let mut next: Vec<_> = turns().filter(of_workers).collect();
            next.sort_by_key(|(_, m, _)| !self.has_tried(m));
            let next = next.into_iter().take(canaries);
            fleet.turns(draft, self.to, next.map(|&(name, m, _)| (name, m)));
            return;
        }
        let control_plane = || {
            cases
                .iter()
                .filter(|(_, m, need)| m.role == Role::ControlPlane && *need != Need::Nothing)
        };
        if control_plane().next().is_some() {
            let mut first = control_plane().filter(|(_, _, need)| *need == Need::Turn);
            let waits = |need| matches!(need, Need::Turn | Need::Stage | Need::Word);
            let all_wait = control_plane().all(|(_, m, need)| waits(*need) && m.cordoned_by_us.is_none());
            if let Some(&(name, m, _)) = first.next().filter(|_| all_wait) {
                match unhealthy_beside(draft, name) {
                    Some(unhealthy) => draft.wait(unhealthy),
                    None => fleet::begin(draft, name, m, self.to),
                }
            }
            return;
        }
        fleet.turns(draft, self.to, turns().map(|&(name, m, _)| (name, m)));
    }

    /// Whether a machine was told to run the release, or is about to be, at any time.
    fn has_tried(&self, m: &MachineSeen) -> bool {
        let ordered = m.ordered.as_ref().is_some_and(|(ordered, _)| ordered == self.to);
        ordered || m.running.as_ref() == Some(self.to) || m.cordoned_by_us.is_some()
    }

    /// How many more canaries may begin; `None` once enough of them have run well for long enough.
    fn canaries_wanted(&self, draft: &mut Draft<'_>, cases: &[Case<'_>]) -> Option<usize> {
        let soak = i64::from(draft.input.wanted.policy.canary_soak_seconds);
        let (mut able, mut begun, mut well) = (0, 0, 0);
        let mut soaking = Vec::new();
        for (name, m, need) in cases.iter().filter(|(_, m, _)| m.role == Role::Worker) {
            able += usize::from(m.ready || m.running.as_ref() == Some(self.to));
            begun += usize::from(self.has_tried(m) && *need != Need::Turn);
            if matches!(need, Need::Nothing | Need::Uncordon) {
                let since = m
                    .ordered
                    .as_ref()
                    .map_or(m.ready_since, |(_, since)| m.ready_since.max(*since));
                let left = soak - draft.since(since);
                if left > 0 {
                    soaking.push((*name, left));
                } else {
                    well += 1;
                }
            }
        }
        let wanted = self.canaries.min(able);
        if well >= wanted {
            return None;
        }
        for (name, seconds) in soaking.into_iter().take(wanted) {
            draft.wait(Waiting::Soak {
                machine: name.clone(),
                seconds,
            });
        }
        draft.wait(Waiting::Canary { done: well, wanted });
        Some(wanted.saturating_sub(begun))
    }
}

/// What keeps a control-plane machine from being taken out of service: an etcd member, or another machine, that isn't well.
fn unhealthy_beside(draft: &Draft<'_>, name: &MachineName) -> Option<Waiting> {
    let not_ready = || {
        let (name, m) = draft.control_plane().find(|&(other, m)| other != name && !m.ready)?;
        Some(Waiting::NotReady {
            machine: name.clone(),
            seconds: draft.since(m.ready_since),
        })
    };
    draft.etcd_unhealthy().or_else(not_ready)
}
