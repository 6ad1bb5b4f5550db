//! How much may be out of service at a time.

use std::collections::BTreeMap;

use kprov_types::api::ReleaseRef;
use kprov_types::{MachineName, Role};

use super::{Before, Violation, template};
use crate::model::{Action, Input, MachineSeen, Workload};
use crate::plan::Plan;

/// Out of service, or about to be, without the plan.
fn is_out(m: &MachineSeen) -> bool {
    let switching = match (&m.ordered, &m.running) {
        (Some((ordered, _)), Some(running)) => ordered != running && m.failure.is_none(),
        (Some(_), None) => m.failure.is_none(),
        (None, _) => false,
    };
    !m.ready || m.cordoned_by_us.is_some() || switching
}

/// A machine that is told to stay with what it runs is not taken from anything.
fn stays(action: &Action, m: &MachineSeen) -> bool {
    matches!(action, Action::Run { to, .. } if m.running.as_ref() == Some(to))
}

/// Which machines a plan takes out of service beyond what may be.
pub(super) fn violations(input: &Input, plan: &Plan) -> Vec<Violation> {
    let machines = &input.observed.machines;
    let mut taken: BTreeMap<&MachineName, (&MachineSeen, &str)> = BTreeMap::new();
    for step in &plan.steps {
        if let Action::Cordon { machine } | Action::Run { machine, .. } = &step.action
            && let Some(m) = machines.get(machine)
            && !stays(&step.action, m)
        {
            taken.entry(machine).or_insert((m, &step.id));
        }
    }
    // What is out of service already is not taken from it.
    let begun: BTreeMap<_, _> = taken
        .iter()
        .filter(|(_, (m, _))| !is_out(m))
        .map(|(name, taken)| (*name, *taken))
        .collect();
    let mut found = Vec::new();
    if !begun.is_empty() {
        found.extend(pools(input, &begun));
        found.extend(canaries(input, plan, &begun));
    }
    found.extend(control_plane(input, &taken, &begun));
    found
}

type Taken<'a> = BTreeMap<&'a MachineName, (&'a MachineSeen, &'a str)>;

fn pools(input: &Input, begun: &Taken<'_>) -> Vec<Violation> {
    let policy = &input.wanted.policy;
    let workers = input.observed.machines.iter().filter(|(_, m)| m.role == Role::Worker);
    // By pool: how many machines there are, how many are or would be out of service, and whether the plan adds to them.
    let mut pools: BTreeMap<&str, (usize, usize, bool)> = BTreeMap::new();
    for (name, m) in workers {
        let begins = begun.contains_key(name);
        let (size, out, added) = pools.entry(&m.pool).or_default();
        *size += 1;
        *out += usize::from(begins || is_out(m));
        *added |= begins;
    }
    let over = pools.into_iter().filter_map(|(pool, (size, unavailable, added))| {
        let own = policy.pools.get(pool).and_then(|own| own.max_unavailable);
        let limit = own.unwrap_or(policy.max_unavailable).of(size);
        (added && unavailable > limit).then(|| Violation::TooManyUnavailable {
            pool: pool.to_owned(),
            unavailable,
            limit,
        })
    });
    over.collect()
}

/// On the way to a release, and not back from it.
fn goes_on(input: &Input) -> Option<&ReleaseRef> {
    let release = template(&input.observed);
    (*release != input.observed.current).then_some(release)
}

/// In the last hop, the first workers show that the release works. (In one before it, only machines that would become too
/// old are changed, and these may be none of the workers.)
fn canaries(input: &Input, plan: &Plan, begun: &Taken<'_>) -> Option<Violation> {
    let to = goes_on(input).filter(|to| plan.hops == [(*to).clone()])?;
    let policy = &input.wanted.policy;
    let soak = i64::from(policy.canary_soak_seconds);
    let (mut able, mut well, mut after) = (0, 0, 0);
    // Whether one begins that had nothing to do with the release before.
    let mut another = false;
    for (name, m) in input.observed.machines.iter().filter(|(_, m)| m.role == Role::Worker) {
        let runs = m.running.as_ref() == Some(to);
        let told = m.ordered.as_ref().filter(|(release, _)| release == to);
        able += usize::from(m.ready || runs);
        let since = told.map_or(m.ready_since, |(_, since)| m.ready_since.max(*since));
        well += usize::from(runs && m.ready && input.now.duration_since(since).as_secs() >= soak);
        let tried = runs || told.is_some() || m.cordoned_by_us.is_some();
        let begins = begun.contains_key(name);
        after += usize::from(tried || begins);
        another |= begins && !tried;
    }
    let wanted = usize::try_from(policy.canary).unwrap_or(usize::MAX).min(able);
    let others = begun.values().any(|(m, _)| m.role == Role::ControlPlane) || (another && after > wanted);
    let (_, step) = begun.values().next()?;
    (well < wanted && others).then(|| Violation::Order {
        step: (*step).to_owned(),
        before: Before::Canaries,
    })
}

fn control_plane(input: &Input, taken: &Taken<'_>, begun: &Taken<'_>) -> Vec<Violation> {
    let observed = &input.observed;
    let ours = |taken: &Taken<'_>| taken.values().filter(|(m, _)| m.role == Role::ControlPlane).count();
    let all = || observed.machines.iter().filter(|(_, m)| m.role == Role::ControlPlane);
    let mut found = Vec::new();
    if ours(begun) > 0 {
        let unavailable = all()
            .filter(|(name, m)| begun.contains_key(name) || (m.ready && is_out(m)))
            .count();
        if unavailable > 1 {
            found.push(Violation::ControlPlaneUnavailable { unavailable });
        }
    }
    if ours(taken) == 0 || goes_on(input).is_none() || taken.values().all(|(m, _)| m.role == Role::Worker) {
        return found;
    }
    // A machine that is told to stay with what it runs, on the way back, is not taken from anything.
    let on = taken
        .iter()
        .find(|(_, (m, _))| m.role == Role::ControlPlane && !leaves(input, m));
    let Some((machine, (_, step))) = on else {
        return found;
    };
    let seen = observed.workloads.get(&Workload::ApiServer);
    let serves = |name: &MachineName| {
        let mut pods = seen.into_iter().flat_map(|seen| &seen.instances);
        pods.any(|pod| pod.ready && !pod.leaving && pod.machine.as_ref() == Some(name))
    };
    let well = |name: &MachineName, m: &MachineSeen| {
        let etcd = m.etcd.as_ref().is_none_or(|etcd| etcd.healthy);
        etcd && (m.ready || name == *machine) && serves(name)
    };
    found.extend(
        all()
            .find(|(name, m)| !well(name, m))
            .map(|(name, _)| Violation::Order {
                step: (*step).to_owned(),
                before: Before::ControlPlaneWell(name.clone()),
            }),
    );
    found
}

/// The machine runs, or was told to run, what the hop leads to: taking it out of service can only be the way back.
fn leaves(input: &Input, m: &MachineSeen) -> bool {
    let Some(to) = goes_on(input) else {
        return true;
    };
    m.running.as_ref() == Some(to) || m.ordered.as_ref().is_some_and(|(release, _)| release == to)
}
