//! Where to: on through some hops, back, or nowhere.

use kprov_types::api::{Failure, ReleaseRef};

use super::Refusal;
use crate::hops::{self, PathError};
use crate::model::{Input, Observed, Workload};

/// What a plan is for.
pub(super) enum Course<'a> {
    /// Nowhere: what is asked for can't be done.
    Refused(Refusal),
    /// Nowhere: what is asked for has failed.
    Failed(&'a Failure),
    /// The cluster is where it should be; parts that lag behind follow.
    Settle,
    /// On through these releases. The first may be under way.
    Forward(Vec<&'a ReleaseRef>),
    /// Back to the current release.
    Back(Why<'a>),
}

/// Why everything goes back.
#[derive(Clone, Copy)]
pub(super) enum Why<'a> {
    /// A release failed.
    Failed(&'a Failure),
    /// The version the hop came from is asked for again.
    Asked,
}

/// The release that a hop under way leads to.
pub(super) fn under_way(observed: &Observed) -> Option<&ReleaseRef> {
    let template = &observed.workloads.get(&Workload::ApiServer)?.template;
    (*template != observed.current).then_some(template)
}

pub(super) fn course(input: &Input) -> Course<'_> {
    let observed = &input.observed;
    // What has begun to go back goes all the way, whatever is asked for meanwhile.
    if let Some(failure) = &observed.failure
        && !failure.reverted
        && !failure.halted
        && failure.release != observed.current
    {
        return Course::Back(Why::Failed(failure));
    }
    let hops = match towards(input) {
        Ok(Some(hops)) => hops,
        Ok(None) => return Course::Back(Why::Asked),
        Err(refusal) => return Course::Refused(refusal),
    };
    match (hops.first(), &observed.failure) {
        (None, _) => Course::Settle,
        (Some(next), Some(failure)) if failure.release == **next && failure.attempt >= input.wanted.attempt => {
            Course::Failed(failure)
        }
        _ => Course::Forward(hops),
    }
}

/// The hops to what is asked for, the one under way first; `None`: back from the one under way.
fn towards(input: &Input) -> Result<Option<Vec<&ReleaseRef>>, Refusal> {
    let observed = &input.observed;
    let desired = hops::parse(&input.wanted.desired)?;
    let Some(target) = under_way(observed) else {
        let path = hops::path(&observed.current, &desired, &observed.releases)?;
        let begun = observed.hop_started.is_some();
        return Ok((!path.is_empty() || !begun).then_some(path));
    };
    if desired == observed.current.version && desired != target.version {
        return Ok(None);
    }
    let known = observed.releases.iter().find(|k| k.release == *target);
    let known = known.ok_or_else(|| PathError::NoRelease {
        version: target.version.clone(),
    })?;
    known.verified.clone().map_err(|why| PathError::Unverified {
        version: target.version.clone(),
        why,
    })?;
    if desired < target.version {
        let from = &observed.current;
        return Err(Refusal::MidHop(format!(
            "the hop from {from} to {target} is under way and does not lead to {desired}: ask for {target} or later to finish it, or for {from} to go back"
        )));
    }
    let mut way = vec![target];
    way.extend(hops::path(target, &desired, &observed.releases)?);
    Ok(Some(way))
}
