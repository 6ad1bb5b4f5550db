//! Observe, plan, do the first thing, look again.

use std::time::Duration;

use backon::{BackoffBuilder as _, ExponentialBuilder};
use futures::future::BoxFuture;
use kprov_provider::{Advice, Provider, ProviderError};
use kprov_types::ClusterName;
use kprov_types::machine::Observed;

use crate::plan::{Action, Goal, Plan, PlanError, Waiting, plan};

/// How long passes between two looks at machines that are being made: at first, and at most. A look is many calls on a cloud.
const LOOK_AGAIN: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(5)];
/// How often one action may fail in a row before its error is final.
const TRIES: usize = 8;

/// The caller's clock.
pub trait Pace: Send + Sync {
    /// Time since the caller began.
    fn elapsed(&self) -> Duration;
    /// Ready after this long.
    fn sleep(&self, duration: Duration) -> BoxFuture<'_, ()>;
}

/// Is told what happens.
pub trait Progress: Send + Sync {
    /// An action begins.
    fn action(&self, action: &Action);
    /// Nothing to do but to wait.
    fn waiting(&self, waiting: &[Waiting]);
    /// An action failed and is tried again.
    fn retrying(&self, error: &ProviderError, delay: Duration);
}

/// Why the goal was not reached.
#[derive(Debug, thiserror::Error)]
pub enum DriveError {
    /// The provider failed for good.
    #[error(transparent)]
    Provider(#[from] ProviderError),
    /// No action can help.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// Machines weren't ready in time.
    #[error("after {} s these machines are still not there: {}", .limit.as_secs(), names(.waiting))]
    Deadline {
        /// How long was waited.
        limit: Duration,
        /// What for.
        waiting: Vec<Waiting>,
    },
}

fn names(waiting: &[Waiting]) -> String {
    let name = |w: &Waiting| match w {
        Waiting::Pending(name) | Waiting::Terminating(name) => format!("`{name}`"),
    };
    waiting.iter().map(name).collect::<Vec<_>>().join(", ")
}

/// Works towards `goal` until it's reached, and returns what is there then. `limit` bounds the whole.
pub async fn drive(
    provider: &dyn Provider,
    cluster: &ClusterName,
    goal: &Goal,
    limit: Duration,
    pace: &dyn Pace,
    progress: &dyn Progress,
) -> Result<Observed, DriveError> {
    let end = pace.elapsed() + limit;
    let mut delays = backoff();
    let mut tries = 0;
    let mut pause = LOOK_AGAIN[0];
    loop {
        let failed = match provider.observe(cluster).await {
            Ok(observed) => {
                let Plan {
                    actions,
                    waiting,
                    surplus: _,
                } = plan(goal, &observed)?;
                match (actions.first(), waiting.is_empty()) {
                    (None, true) => return Ok(observed),
                    (None, false) => {
                        if pace.elapsed() >= end {
                            return Err(DriveError::Deadline { limit, waiting });
                        }
                        progress.waiting(&waiting);
                        pace.sleep(pause).await;
                        pause = (pause * 5 / 4).min(LOOK_AGAIN[1]);
                        continue;
                    }
                    (Some(action), _) => {
                        pause = LOOK_AGAIN[0];
                        progress.action(action);
                        perform(provider, cluster, action).await
                    }
                }
            }
            Err(error) => Err(error),
        };
        match failed {
            Ok(()) => {
                delays = backoff();
                tries = 0;
            }
            Err(error) => {
                tries += 1;
                let delay = match error.advice {
                    Advice::Never => None,
                    // No failure, so it doesn't count as one; only the limit of the whole ends it.
                    Advice::Wait(delay) => {
                        tries = 0;
                        delays = backoff();
                        Some(delay)
                    }
                    Advice::RetryAfter(least) => delays.next().map(|d| d.max(least)),
                    // What was lost may have taken effect: the next round looks before it acts.
                    Advice::LookFirst => delays.next(),
                };
                match delay {
                    Some(delay) if tries < TRIES && pace.elapsed() + delay < end => {
                        progress.retrying(&error, delay);
                        pace.sleep(delay).await;
                    }
                    _ => return Err(error.into()),
                }
            }
        }
    }
}

fn backoff() -> impl Iterator<Item = Duration> {
    ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(250))
        .with_max_delay(Duration::from_secs(15))
        .with_max_times(TRIES)
        .build()
}

async fn perform(provider: &dyn Provider, cluster: &ClusterName, action: &Action) -> Result<(), ProviderError> {
    match action {
        Action::EnsureNetwork(spec) => provider.ensure_network(cluster, spec).await.map(drop),
        Action::EnsureDisks(disks) => provider.ensure_disks(cluster, disks).await.map(drop),
        Action::EnsureMachines(machines) => provider.ensure_machines(cluster, machines).await.map(drop),
        Action::RemoveMachines(names) => provider.remove_machines(cluster, names).await,
        Action::RemoveDisks(names) => provider.remove_disks(cluster, names).await,
        Action::RemoveNetwork => provider.remove_network(cluster).await,
    }
}
