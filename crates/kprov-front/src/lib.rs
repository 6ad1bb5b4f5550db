//! An L4 (TCP) proxy in front of API servers, with health checks of its own.
//!
//! kprov-node runs one on each machine, so that kubelet and kube-proxy have one local address for the API whatever
//! happens to single API servers, and so that a control-plane machine can run two revisions of its API server side by
//! side and move clients from one to the other without any of them noticing. The local provider's endpoint, which stands
//! in for a cloud's load balancer, is the same thing ([`run_balancer`]).
//!
//! It never looks into what it carries, never ends a connection that works, and never sends a connection to a backend
//! whose `/readyz` has not answered 200 (but for [`WhenEmpty::TryAll`]), and never turns clients away because a backend is slow. Its owner may be replaced while it runs ([`Handover`]). Start reading at [`policy`], which decides where a connection goes, and
//! [`health`], which decides who is up, slow or down: both are pure. [`Front`] puts them to work.

mod balancer;
mod check;
mod discover;
mod front;
mod handover;
pub mod health;
mod keeper;
mod listen;
pub mod policy;
mod proxy;
mod socket;
mod trust;

pub use balancer::{BalancerConfig, BalancerError, BalancerFile, run_balancer};
pub use discover::ListenTable;
pub use front::{BackendState, Drain, Front, FrontConfig, FrontError, FrontHandle, FrontState, Hold, ListenerState};
pub use handover::Handover;
pub use policy::{Backend, Listener, Pool, WhenEmpty};
pub use trust::{Trust, TrustError};
