//! What stands against a change of version, found before anything changes: each thing with what to do about it.
//!
//! [`run`] gathers [`Facts`] from the API, each part bounded in time and memory, and [`judge`] makes findings of them, which
//! is pure. A part that could not be gathered is a finding of its own (`unchecked/...`): that a check broke is not that it
//! failed. Nothing here changes the cluster; the one write is a dry run.
//!
//! Start reading at [`Inputs`], then [`judge`].

mod facts;
mod gather;
mod judge;
pub mod removals;

use std::collections::BTreeMap;

use jiff::Timestamp;
use kprov_types::api::{Finding, MachineStatus, ReleaseRef};
use kprov_types::{KubernetesVersion, MachineName, Release, Role};
use kube::Client;

pub use facts::{
    ApiRequest, BudgetOverlap, BudgetSeen, Budgets, Facts, PodSeen, ProgramSeen, RefusedWrite, StoredObjects,
    Unchecked, WebhookKind, WebhookSeen,
};
pub use judge::judge;

/// What the caller knows already.
#[derive(Clone, Debug, PartialEq)]
pub struct Inputs {
    /// The release of the last hop that was finished.
    pub current: ReleaseRef,
    /// The hops to the desired version, in order; the last is the desired version's own.
    pub hops: Vec<Hop>,
    /// What each machine tells of itself, by name. A machine that has told nothing is missing.
    pub machines: BTreeMap<MachineName, MachineStatus>,
    /// The cluster's Nodes, by name.
    pub nodes: BTreeMap<MachineName, NodeSeen>,
    /// The time.
    pub now: Timestamp,
}

/// A release on the way.
#[derive(Clone, Debug, PartialEq)]
pub struct Hop {
    /// Which.
    pub release: ReleaseRef,
    /// Its manifest.
    pub manifest: Release,
}

/// A Node, as far as preflight cares.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeSeen {
    /// Its role.
    pub role: Role,
    /// Its condition Ready is True.
    pub ready: bool,
    /// It takes no new pods (`spec.unschedulable`), or none but those that tolerate a taint of it.
    pub closed: bool,
    /// Its kubelet's version; `None` where it tells none.
    pub kubelet: Option<KubernetesVersion>,
}

/// Why nothing could be found out.
#[derive(Debug, thiserror::Error)]
pub enum PreflightError {
    /// The API server refused, or the way there is broken.
    #[error("could not ask the API server for its version")]
    Api(#[source] Box<kube::Error>),
    /// No answer came.
    #[error("the API server gave no answer within {seconds} s")]
    NoAnswer {
        /// How long it was given.
        seconds: u64,
    },
}

/// Looks at a cluster, and says what stands against the hops.
///
/// Requests for APIs that go are counted by each API server for itself, and `client` reaches one of them: where there are
/// several, use [`run_on`]. It takes two minutes at the very most, and a few seconds as a rule.
pub async fn run(client: &Client, inputs: &Inputs) -> Result<Vec<Finding>, PreflightError> {
    run_on(client, std::slice::from_ref(client), inputs).await
}

/// As [`run`], with a client of each API server of its own for what API servers count for themselves.
pub async fn run_on(client: &Client, api_servers: &[Client], inputs: &Inputs) -> Result<Vec<Finding>, PreflightError> {
    // All parts at once make a future too large to be carried about.
    let facts = Box::pin(gather::facts(client, api_servers, inputs)).await?;
    Ok(judge(&facts, inputs))
}
