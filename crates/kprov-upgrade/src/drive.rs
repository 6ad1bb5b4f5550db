//! One reconcile pass: observe, plan, check, act, report. No loop, no clock, nothing remembered: whoever calls it again is
//! as well off as if it had been killed in between.

use tracing::{Instrument as _, info_span};

use crate::check::{Violation, check_plan};
use crate::cluster::{Cluster, ClusterError, Outcome};
use crate::model::Input;
use crate::plan::{Plan, Waiting, plan};

/// Why a pass ended early. The next pass starts afresh.
#[derive(Debug, thiserror::Error)]
pub enum PassError {
    /// The cluster could not be looked at.
    #[error("could not observe the cluster")]
    Observe(#[source] ClusterError),
    /// The plan would break what must always hold; nothing was done. A defect of the planner: please report it.
    #[error("the plan breaks {} of the cluster's invariants, nothing was done: {}", .0.len(), words(.0))]
    Unsafe(Vec<Violation>),
    /// A step failed; those after it were not tried.
    #[error("could not {message}")]
    Act {
        /// The step's id.
        step: String,
        /// The step in words.
        message: String,
        /// Why.
        source: ClusterError,
    },
    /// What was done could not be told.
    #[error("could not report the plan")]
    Report(#[source] ClusterError),
}

fn words(violations: &[Violation]) -> String {
    violations
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join("; ")
}

/// What became of a pass.
#[derive(Debug)]
#[must_use = "a pass says whether there is more to do"]
pub enum Pass {
    /// Nothing is asked for.
    Nothing,
    /// It was planned and done.
    Planned(Box<Planned>),
}

/// A pass that had something to plan.
#[derive(Debug)]
pub struct Planned {
    /// What was seen.
    pub input: Input,
    /// What was planned.
    pub plan: Plan,
    /// How many of its steps were carried out.
    pub done: usize,
    /// The id of the step whose expectation did not hold; it and those after it were not done.
    pub stale: Option<String>,
}

/// What people are told of a plan that is not carried out: what is wrong with it, and not what would have been done.
fn held_back(plan: Plan, violations: Vec<Violation>) -> (Plan, PassError) {
    let told = Plan {
        steps: Vec::new(),
        waiting: violations.iter().cloned().map(Waiting::Unsafe).collect(),
        ..plan
    };
    (told, PassError::Unsafe(violations))
}

/// Makes one pass: looks, plans, has the plan checked, does its steps in their order until one is stale or fails, and
/// reports in any case.
///
/// # Errors
///
/// The first thing that went wrong. An error of the report is returned only where nothing went wrong before it.
pub async fn pass(cluster: &impl Cluster) -> Result<Pass, PassError> {
    let Some(input) = cluster.observe().await.map_err(PassError::Observe)? else {
        return Ok(Pass::Nothing);
    };
    let mut plan = plan(&input);
    let violations = check_plan(&input, &plan);
    let mut done = 0;
    let mut stale = None;
    let mut failed = None;
    if violations.is_empty() {
        for step in &plan.steps {
            match cluster
                .act(&step.action)
                .instrument(info_span!("step", id = %step.id))
                .await
            {
                Ok(Outcome::Done) => done += 1,
                Ok(Outcome::Stale) => {
                    stale = Some(step.id.clone());
                    break;
                }
                Err(source) => {
                    failed = Some(PassError::Act {
                        step: step.id.clone(),
                        message: step.message.clone(),
                        source,
                    });
                    break;
                }
            }
        }
    } else {
        let (held, error) = held_back(plan, violations);
        plan = held;
        failed = Some(error);
    }
    let reported = cluster.report(&input, &plan).await;
    match failed {
        Some(error) => Err(error),
        None => reported.map_err(PassError::Report).map(|()| {
            Pass::Planned(Box::new(Planned {
                input,
                plan,
                done,
                stale,
            }))
        }),
    }
}

#[cfg(test)]
mod tests;
