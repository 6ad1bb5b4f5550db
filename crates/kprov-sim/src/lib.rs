//! Simulated clusters, machines and clocks under the real planner and executor, for tests of the upgrade path. Nothing that
//! ships depends on it.
//!
//! A [`Script`] decides everything: the cluster, its releases, what goes wrong and when, and every latency. [`run`] runs it
//! without threads and without real time; two runs of one script are the same. After every event everything that must always
//! hold is judged ([`Violation`]); at the end the cluster has to be where people want it. [`shrink`] makes a script that fails
//! short.
//!
//! What the world does is in `controllers` (what Kubernetes does by itself), `machine` (kubelets and kprov-nodes) and `people`;
//! what an operator sees of it in `api` and `picture`. Start reading at [`script`].

mod agent;
mod api;
mod changes;
mod controllers;
pub mod fleet;
mod invariants;
mod machine;
mod objects;
mod people;
mod picture;
mod rng;
mod run;
pub mod script;
mod shrink;
mod world;

pub use invariants::Violation;
pub use run::{Plant, Report, run, run_planted, run_traced};
pub use script::Script;
pub use shrink::{Shrunk, shrink};
