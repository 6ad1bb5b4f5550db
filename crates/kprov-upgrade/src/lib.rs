//! The one upgrade path of every provider: observe -> plan -> check -> execute, through the Kubernetes API only.
//!
//! [`plan`] and [`check`] are pure. The executor asks any [`Cluster`] for a picture, plans, has the plan checked, and does
//! what can be done now; then it looks again. Nothing is remembered between two passes, so it may be killed anywhere.
//!
//! This crate must never know of a provider. Only its module `kubernetes` knows a client of the API. Start reading at [`model`].

pub mod check;
pub mod cluster;
pub mod drive;
pub mod effects;
pub mod hops;
pub mod kubernetes;
pub mod model;
pub mod outline;
pub mod plan;
pub mod preflight;

pub use cluster::{Cluster, ClusterError, Outcome};

#[cfg(test)]
mod properties;
#[cfg(test)]
mod testing;
