//! What the executor needs of a cluster: a picture, and hands. The operator's is the Kubernetes API; the simulator's is in
//! memory.

use std::future::Future;

use crate::model::{Action, Input};
use crate::plan::Plan;

/// Why a cluster could not be looked at or changed. Every one of them is tried again with the next pass.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// The API gave no answer, or not in time. What was asked for may have been done.
    #[error("no answer from the API")]
    Lost(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The API refused.
    #[error("the API refused: {why}")]
    Refused {
        /// What it said.
        why: String,
    },
    /// This operator does not lead any more and must change nothing.
    #[error("this operator is not the leader")]
    NotLeading,
}

/// What became of an action.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was done, or had been done before.
    Done,
    /// The cluster is not as the action expects; nothing was done. Look again and plan again.
    Stale,
}

/// A cluster.
pub trait Cluster {
    /// Looks at everything; `None` where nothing is asked for (there is no `VersionUpdate`).
    fn observe(&self) -> impl Future<Output = Result<Option<Input>, ClusterError>> + Send;

    /// Does one thing, if the cluster is as it expects.
    fn act(&self, action: &Action) -> impl Future<Output = Result<Outcome, ClusterError>> + Send;

    /// Tells people how it stands: conditions, steps, what is waited for. Changes nothing else, and nothing where it is told
    /// already.
    fn report(&self, input: &Input, plan: &Plan) -> impl Future<Output = Result<(), ClusterError>> + Send;
}
