//! Back to the release that a hop came from, in the reverse order: no part is ever newer than the API servers.
//!
//! etcd alone may stay: once every member runs the new etcd, its data may be of the new version, and API servers of the
//! release before work with it.

use kprov_types::api::ReleaseRef;
use kprov_types::{MachineName, Role};

use super::course::{Why, under_way};
use super::draft::Draft;
use super::fleet::{self, Fleet};
use super::workloads::{self, Strictness};
use super::{Plan, State, Waiting};
use crate::model::{Action, Input, MachineSeen, Part, Workload};

/// What goes back, and to what.
struct Back<'a> {
    /// The release that everything goes back to.
    to: &'a ReleaseRef,
    /// The release that the API servers' template is of, if it is another.
    left: Option<&'a ReleaseRef>,
    /// The release that failed, if any did.
    failed: Option<&'a ReleaseRef>,
}

pub(super) fn back(input: &Input, why: Why<'_>) -> Plan {
    let observed = &input.observed;
    let back = Back {
        to: &observed.current,
        left: under_way(observed),
        failed: match why {
            Why::Failed(failure) => Some(&failure.release),
            Why::Asked => None,
        },
    };
    let mut draft = Draft::new(input, back.to);
    let done = back.machines(&mut draft)
        && back.etcd(&mut draft)
        && back.standbys(&mut draft)
        && back.addons(&mut draft)
        && back.workloads(
            &mut draft,
            &[Workload::Scheduler, Workload::ControllerManager],
            Strictness::All,
        )
        && back.api_servers(&mut draft)
        && in_service(&mut draft);
    if done {
        draft.step(match why {
            Why::Failed(failure) => Action::Reverted {
                release: failure.release.clone(),
            },
            Why::Asked => Action::Finish {
                release: back.to.clone(),
            },
        });
    }
    draft.finish(State::Reverting, &[])
}

/// What a machine needs on the way back.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Need {
    /// Nothing; its pods back, if we have cordoned it.
    Nothing,
    /// To be told to stay with what it runs: it was told to switch, and has not.
    Recall,
    /// To be told to go back at once: it isn't Ready, so that nothing is to be drained.
    Return,
    /// To finish what it was told.
    Time,
    /// The programs of the release to go back to.
    Stage,
    /// Its pods to leave; then it is told.
    Drain,
    /// Its turn.
    Turn,
}

impl Need {
    fn is_under_way(self) -> bool {
        matches!(self, Self::Recall | Self::Return | Self::Time | Self::Drain)
    }
}

impl<'a> Back<'a> {
    /// Whether a release is one that is left.
    fn leaves(&self, release: &ReleaseRef) -> bool {
        release != self.to && (self.left == Some(release) || self.failed == Some(release))
    }

    fn need(&self, draft: &Draft<'_>, m: &MachineSeen) -> Need {
        let ordered = m.ordered.as_ref().is_some_and(|(ordered, _)| self.leaves(ordered));
        let running = m.running.as_ref().is_some_and(|running| self.leaves(running));
        if running {
            return if m.ordered.as_ref().is_some_and(|(ordered, _)| ordered == self.to) {
                Need::Time
            } else if !m.ready {
                Need::Return
            } else if !fleet::has(m, self.to) && draft.known(self.to).is_some() {
                Need::Stage
            } else if m.cordoned_by_us.is_some() {
                Need::Drain
            } else {
                Need::Turn
            };
        }
        if ordered {
            return Need::Recall;
        }
        // What was recalled may have been switching: its word counts once it has taken the order.
        let recalled = m.cordoned && !m.order_seen;
        if recalled || m.kubelet.minor() > self.to.version.minor() {
            return Need::Time;
        }
        Need::Nothing
    }

    /// The machines' own programs. True when none is newer than the API servers will be.
    fn machines(&self, draft: &mut Draft<'a>) -> bool {
        let machines = draft.observed.machines.iter();
        let cases: Vec<_> = machines.map(|(name, m)| (name, m, self.need(draft, m))).collect();
        for &(name, m, need) in &cases {
            if need == Need::Nothing && m.cordoned_by_us.is_some() && m.ready {
                draft.step(Action::Uncordon { machine: name.clone() });
            }
        }
        if cases.iter().all(|(_, _, need)| *need == Need::Nothing) {
            return true;
        }
        // One that isn't Ready is told to go back all the same, and has to have what to go back to.
        let goes = |need| matches!(need, Need::Stage | Need::Return | Need::Time);
        let lacks = |m: &MachineSeen| !fleet::has(m, self.to) && draft.known(self.to).is_some();
        let to_stage: Vec<_> = cases
            .iter()
            .filter(|(_, m, need)| goes(*need) && lacks(m))
            .copied()
            .collect();
        fleet::stage(draft, self.to, to_stage.into_iter().map(|(name, m, _)| (name, m)));
        let mut fleet = Fleet::of(draft);
        for &(name, m, need) in &cases {
            self.tend(draft, &fleet, name, m, need);
        }
        let turns = |role| {
            cases
                .iter()
                .filter(move |(_, m, need)| m.role == role && *need == Need::Turn)
        };
        let is_busy = |m: &MachineSeen, need: Need| need.is_under_way() || !m.ready || m.cordoned_by_us.is_some();
        let busy = cases
            .iter()
            .find(|(_, m, need)| m.role == Role::ControlPlane && is_busy(m, *need));
        match (turns(Role::ControlPlane).next(), busy) {
            (Some(&(name, m, _)), None) => fleet::begin(draft, name, m, self.to),
            // What is under way has said so by now.
            (Some(_), Some(&(name, m, Need::Nothing))) if !m.ready => fleet::wait_ready(draft, name, m),
            _ => {}
        }
        fleet.turns(draft, self.to, turns(Role::Worker).map(|&(name, m, _)| (name, m)));
        false
    }

    fn tend(&self, draft: &mut Draft<'a>, fleet: &Fleet<'a>, name: &'a MachineName, m: &'a MachineSeen, need: Need) {
        match need {
            Need::Nothing | Need::Stage | Need::Turn => {}
            Need::Recall => fleet::run(draft, name, m, m.running.as_ref().unwrap_or(self.to)),
            Need::Return => fleet::run(draft, name, m, self.to),
            Need::Time => {
                let to = m.ordered.as_ref().map_or(self.to, |(ordered, _)| ordered);
                fleet::wait_switch(draft, name, m, to);
            }
            Need::Drain => {
                if fleet.drain(draft, name, m) {
                    fleet::run(draft, name, m, self.to);
                }
            }
        }
    }

    /// etcd, where only some members have changed. True when there is nothing to go back.
    fn etcd(&self, draft: &mut Draft<'_>) -> bool {
        let members = || {
            draft
                .observed
                .machines
                .iter()
                .filter_map(|(name, m)| Some((name, m.etcd.as_ref()?)))
        };
        let left = self.left.or(self.failed).and_then(|left| draft.known(left));
        let Some(new) = left.and_then(|known| known.images.get(&Part::Etcd)) else {
            return true;
        };
        let returning = members().find(|(_, etcd)| etcd.ordered.as_ref() == Some(self.to) && etcd.image == *new);
        if let Some((machine, _)) = returning.filter(|_| !self.has_etcd(draft, new)) {
            draft.wait(Waiting::EtcdUpdate {
                machine: machine.clone(),
                release: self.to.clone(),
            });
            return false;
        }
        let told = || members().filter(|(_, etcd)| etcd.ordered.as_ref().is_some_and(|ordered| self.leaves(ordered)));
        let Some((name, _)) = told().find(|(_, etcd)| !etcd.healthy).or_else(|| told().next()) else {
            return true;
        };
        if members().all(|(_, etcd)| etcd.image == *new) {
            return true;
        }
        let other = members().find(|(other, etcd)| *other != name && !etcd.healthy);
        match other {
            Some((machine, etcd)) => draft.wait(Waiting::Etcd {
                machine: machine.clone(),
                message: etcd.message.clone(),
            }),
            None => draft.step(Action::Etcd {
                machine: name.clone(),
                to: self.to.clone(),
            }),
        }
        false
    }

    /// Whether the release to go back to has this etcd as well.
    fn has_etcd(&self, draft: &Draft<'_>, image: &str) -> bool {
        let known = draft.known(self.to).and_then(|known| known.images.get(&Part::Etcd));
        known.is_none_or(|own| own == image)
    }

    fn standbys(&self, draft: &mut Draft<'_>) -> bool {
        let changed = |m: &MachineSeen| {
            let standby = m.standby.as_ref();
            standby.is_some_and(|s| {
                [&s.ordered, &s.release]
                    .into_iter()
                    .flatten()
                    .any(|release| self.leaves(release))
            })
        };
        if draft.control_plane().any(|(_, m)| changed(m)) {
            workloads::standbys(draft, self.to)
        } else {
            true
        }
    }

    /// All together. A kube-proxy on a machine that can't be reached may still run, and must not be newer than API servers.
    fn addons(&self, draft: &mut Draft<'_>) -> bool {
        let proxy = self.workloads(draft, &[Workload::Proxy], Strictness::All);
        self.workloads(draft, &[Workload::Dns, Workload::Operator], Strictness::Reachable) && proxy
    }

    /// What the API runs, but for the API servers: in any order among `workloads`.
    fn workloads(&self, draft: &mut Draft<'_>, workloads: &[Workload], strictness: Strictness) -> bool {
        let mut complete = true;
        for &workload in workloads {
            let Some(seen) = draft.observed.workloads.get(&workload) else {
                continue;
            };
            if self.goes_back(workload, &seen.template) {
                draft.step(self.roll_back(workload, &seen.template, seen.previous.as_ref()));
                complete = false;
            } else {
                complete &= workloads::is_complete(draft, workload, seen, strictness);
            }
        }
        complete
    }

    /// An add-on that an earlier hop left behind stays as it is.
    fn goes_back(&self, workload: Workload, template: &ReleaseRef) -> bool {
        match workload {
            Workload::ApiServer | Workload::ControllerManager | Workload::Scheduler => template != self.to,
            Workload::Proxy | Workload::Dns | Workload::Operator => self.leaves(template),
        }
    }

    /// Puts back the template from before, where the API still has it and it's of the right release: pods of it that still
    /// run are kept. Else the current release's is rendered anew.
    fn roll_back(&self, workload: Workload, from: &ReleaseRef, previous: Option<&ReleaseRef>) -> Action {
        let fits = |previous: &&ReleaseRef| match workload {
            Workload::ApiServer | Workload::ControllerManager | Workload::Scheduler => *previous == self.to,
            Workload::Proxy | Workload::Dns | Workload::Operator => {
                !self.leaves(previous) && previous.version <= self.to.version
            }
        };
        let from = from.clone();
        match previous.filter(fits) {
            Some(previous) => Action::RollBack {
                workload,
                from,
                to: previous.clone(),
            },
            None => Action::Roll {
                workload,
                from,
                to: self.to.clone(),
            },
        }
    }

    fn api_servers(&self, draft: &mut Draft<'_>) -> bool {
        let workload = Workload::ApiServer;
        match draft.observed.workloads.get(&workload) {
            Some(seen) if self.goes_back(workload, &seen.template) => {
                draft.step(self.roll_back(workload, &seen.template, seen.previous.as_ref()));
                false
            }
            _ => workloads::api_servers(draft),
        }
    }
}

/// Whether every machine that we have cordoned takes pods again.
fn in_service(draft: &mut Draft<'_>) -> bool {
    let mut all = true;
    for (name, m) in draft
        .observed
        .machines
        .iter()
        .filter(|(_, m)| m.cordoned_by_us.is_some())
    {
        all = false;
        if !m.ready {
            fleet::wait_ready(draft, name, m);
        }
    }
    all
}
