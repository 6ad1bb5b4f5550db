//! What many machines share: room for evicted pods, turns within `maxUnavailable`, fetching. Used on the way on and back.

use std::collections::{BTreeMap, BTreeSet};

use kprov_types::api::{ReleaseRef, UpdatePolicy};
use kprov_types::{MachineName, Role};

use super::draft::Draft;
use super::{Lack, Waiting};
use crate::model::{Action, MachineSeen, Staged};

/// Whether a machine's programs are a release's, its kubelet included, and it was told nothing else.
pub(super) fn runs(m: &MachineSeen, release: &ReleaseRef) -> bool {
    m.running.as_ref() == Some(release)
        && m.kubelet == release.version
        && m.ordered.as_ref().is_none_or(|(ordered, _)| ordered == release)
}

/// Whether a machine was told to run a release, and neither does nor has gone back from it.
pub(super) fn is_switching(m: &MachineSeen) -> bool {
    m.failure.is_none() && m.ordered.as_ref().is_some_and(|(ordered, _)| !runs(m, ordered))
}

/// Whether a release's programs and images are on a machine.
pub(super) fn has(m: &MachineSeen, release: &ReleaseRef) -> bool {
    m.running.as_ref() == Some(release) || m.staged.get(&release.digest) == Some(&Staged::Ready)
}

/// Whether a machine's failure is of an earlier try than the one that is asked for: it may be told again.
pub(super) fn failed_before(draft: &Draft<'_>, m: &MachineSeen) -> bool {
    let (Some(_), Some((_, since)), Some(known)) = (&m.failure, &m.ordered, &draft.observed.failure) else {
        return false;
    };
    known.attempt < draft.input.wanted.attempt && *since <= known.time
}

/// Uncordons the machines that have been brought to a release.
pub(super) fn release_finished(draft: &mut Draft<'_>, to: &ReleaseRef) {
    uncordon(draft, |m| runs(m, to));
}

/// Uncordons every machine but those that are switching: those too that were cordoned and never told, or went back by
/// themselves.
pub(super) fn release_idle(draft: &mut Draft<'_>) {
    uncordon(draft, |m| !is_switching(m));
}

/// Ends what was begun with machines before a hop: the hop's pods need places. True when we keep pods off none, but for
/// workers that can't be reached.
pub(super) fn is_open(draft: &mut Draft<'_>) -> bool {
    release_idle(draft);
    let counts = |m: &MachineSeen| m.cordoned_by_us.is_some() && (m.ready || m.role == Role::ControlPlane);
    let closed = draft.observed.machines.iter().find(|(_, m)| counts(m));
    if let Some((name, m)) = closed {
        match m.ordered.as_ref().filter(|_| is_switching(m)) {
            Some((ordered, _)) => wait_switch(draft, name, m, ordered),
            None if !m.ready => wait_ready(draft, name, m),
            None => {}
        }
    }
    closed.is_none()
}

fn uncordon(draft: &mut Draft<'_>, which: impl Fn(&MachineSeen) -> bool) {
    for (name, m) in &draft.observed.machines {
        if m.cordoned_by_us.is_some() && m.ready && which(m) {
            draft.step(Action::Uncordon { machine: name.clone() });
        }
    }
}

/// Tells machines to fetch a release, and says how far they are. True when all that can be reached have it: a worker that
/// isn't Ready is told, and not waited for.
pub(super) fn stage<'a>(
    draft: &mut Draft<'a>,
    release: &ReleaseRef,
    machines: impl Iterator<Item = (&'a MachineName, &'a MachineSeen)>,
) -> bool {
    let (mut tell, mut told, mut pending) = (BTreeSet::new(), BTreeSet::new(), 0_usize);
    let mut example = None;
    for (name, m) in machines.filter(|(_, m)| !has(m, release)) {
        let ordered = m.stage_ordered.contains(&release.digest);
        if ordered { &mut told } else { &mut tell }.insert(name.clone());
        if m.ready || m.role == Role::ControlPlane {
            pending += 1;
            example = example.or(Some((name, m)));
        }
    }
    if !tell.is_empty() {
        draft.step(Action::Stage {
            release: release.clone(),
            machines: tell,
        });
    }
    let Some((machine, m)) = example else {
        return true;
    };
    if !told.is_empty() {
        draft.running(Action::Stage {
            release: release.clone(),
            machines: told,
        });
    }
    let message = match m.staged.get(&release.digest) {
        _ if !m.ready => "it is not Ready".to_owned(),
        Some(Staged::Fetching(what) | Staged::Bad(what)) => what.clone(),
        Some(Staged::Ready) | None => String::new(),
    };
    draft.wait(Waiting::Staging {
        release: release.clone(),
        machines: pending,
        machine: machine.clone(),
        message,
    });
    false
}

/// How a pool stands.
#[derive(Default)]
struct Pool {
    size: usize,
    unavailable: usize,
}

/// All machines, counted once.
pub(super) struct Fleet<'a> {
    pools: BTreeMap<&'a str, Pool>,
    free_workers: usize,
    free_control_plane: usize,
}

impl<'a> Fleet<'a> {
    pub(super) fn of(draft: &Draft<'a>) -> Self {
        let mut fleet = Self {
            pools: BTreeMap::new(),
            free_workers: 0,
            free_control_plane: 0,
        };
        for m in draft.observed.machines.values() {
            let free = usize::from(m.ready && !m.cordoned);
            if m.role == Role::ControlPlane {
                fleet.free_control_plane += free;
                continue;
            }
            fleet.free_workers += free;
            let pool = fleet.pools.entry(&m.pool).or_default();
            pool.size += 1;
            pool.unavailable += usize::from(!m.ready || m.cordoned_by_us.is_some() || is_switching(m));
        }
        fleet
    }

    /// Whether another machine could take the pods of one that is cordoned. Where there are workers, control-plane machines
    /// take no pods of theirs.
    fn has_room_for(&self, m: &MachineSeen) -> bool {
        match m.role {
            Role::Worker => self.free_workers > 0,
            Role::ControlPlane => self.free_workers + self.free_control_plane > 0,
        }
    }

    /// Goes on with draining a machine that we have cordoned. True when nothing has to leave it any more.
    ///
    /// Where no other machine could take its pods nothing is evicted: containers keep running while kubelet and containerd
    /// are replaced.
    pub(super) fn drain(&self, draft: &mut Draft<'_>, name: &MachineName, m: &MachineSeen) -> bool {
        let Some(since) = m.cordoned_by_us.filter(|_| self.has_room_for(m)) else {
            return true;
        };
        let machine = name.clone();
        let Some(drain) = &m.drain else {
            draft.wait(Waiting::Pods { machine });
            return false;
        };
        let Some(pod) = drain.remaining.first() else {
            return true;
        };
        let policy = &draft.input.wanted.policy;
        let pool = policy.pools.get(&m.pool);
        let limit = i64::from(
            pool.and_then(|p| p.drain_timeout_seconds)
                .unwrap_or(policy.drain_timeout_seconds),
        );
        let may_force = pool.and_then(|p| p.drain_force).unwrap_or(policy.drain_force);
        let (pods, seconds, blocked) = (
            drain.remaining.len(),
            draft.since(since),
            drain.blocked.first().cloned(),
        );
        let overdue = seconds > limit;
        let action = Action::Drain {
            machine: machine.clone(),
            force: overdue && may_force,
        };
        if drain.leaving < pods {
            draft.step(action);
        } else {
            draft.running(action);
        }
        draft.wait(match blocked {
            blocked if overdue && !may_force => Waiting::DrainOverdue {
                machine,
                pods,
                blocked: blocked.unwrap_or_default(),
                seconds,
            },
            Some(blocked) => Waiting::Budget { machine, blocked },
            None => Waiting::Drain {
                machine,
                pods,
                pod: pod.clone(),
                seconds,
                limit,
            },
        });
        false
    }

    /// Begins with as many of these workers as each pool has turns for.
    pub(super) fn turns(
        &mut self,
        draft: &mut Draft<'_>,
        to: &ReleaseRef,
        workers: impl Iterator<Item = (&'a MachineName, &'a MachineSeen)>,
    ) {
        let mut held: BTreeMap<&str, usize> = BTreeMap::new();
        for (name, m) in workers {
            let pool = self.pools.entry(&m.pool).or_default();
            if pool.unavailable < max_unavailable(&draft.input.wanted.policy, &m.pool, pool.size) {
                pool.unavailable += 1;
                begin(draft, name, m, to);
            } else {
                *held.entry(&m.pool).or_default() += 1;
            }
        }
        for (name, machines) in held {
            let pool = &self.pools[name];
            draft.wait(Waiting::MaxUnavailable {
                pool: name.to_owned(),
                unavailable: pool.unavailable,
                limit: max_unavailable(&draft.input.wanted.policy, name, pool.size),
                machines,
            });
        }
    }
}

/// How many machines of a pool of `size` may be out of service.
fn max_unavailable(policy: &UpdatePolicy, pool: &str, size: usize) -> usize {
    let own = policy.pools.get(pool).and_then(|pool| pool.max_unavailable);
    own.unwrap_or(policy.max_unavailable).of(size)
}

/// Begins with a machine. One that a person has cordoned is that person's: it isn't drained, nor uncordoned later.
pub(super) fn begin(draft: &mut Draft<'_>, name: &MachineName, m: &MachineSeen, to: &ReleaseRef) {
    if m.cordoned {
        run(draft, name, m, to);
    } else {
        draft.step(Action::Cordon { machine: name.clone() });
    }
}

/// Tells a machine to run a release.
pub(super) fn run(draft: &mut Draft<'_>, name: &MachineName, m: &MachineSeen, to: &ReleaseRef) {
    draft.step(Action::Run {
        machine: name.clone(),
        from: m.running.clone(),
        to: to.clone(),
    });
}

/// Waits for a machine to be Ready.
pub(super) fn wait_ready(draft: &mut Draft<'_>, name: &MachineName, m: &MachineSeen) {
    draft.wait(Waiting::NotReady {
        machine: name.clone(),
        seconds: draft.since(m.ready_since),
    });
}

/// Whether a machine was told to run something so lately that it may still be at it.
pub(super) fn has_time(draft: &Draft<'_>, m: &MachineSeen) -> bool {
    m.ordered
        .as_ref()
        .is_some_and(|(_, since)| draft.since(*since) <= draft.health_limit())
}

/// Waits for a machine that was told to run a release.
pub(super) fn wait_switch(draft: &mut Draft<'_>, name: &MachineName, m: &MachineSeen, to: &ReleaseRef) {
    let lacks = match &m.running {
        Some(running) if running == to && m.kubelet == to.version => Lack::Ready,
        Some(running) if running == to => Lack::Kubelet,
        _ if !m.order_seen => Lack::Order,
        _ => Lack::Switch,
    };
    draft.running(Action::Run {
        machine: name.clone(),
        from: m.running.clone(),
        to: to.clone(),
    });
    draft.wait(Waiting::Machine {
        machine: name.clone(),
        release: to.clone(),
        seconds: m.ordered.as_ref().map_or(0, |(_, since)| draft.since(*since)),
        limit: draft.health_limit(),
        lacks,
    });
}
