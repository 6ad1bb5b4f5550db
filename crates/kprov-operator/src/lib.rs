//! kprov's operator: it runs in the cluster, and carries the cluster from the version it has to the one that is asked for.
//!
//! All it knows of upgrades is [`kprov_upgrade::drive::pass`], which looks, plans and does what can be done now. What is here is
//! when that is called, and by whom: of several operators one [leads](election), and only it writes. It must never remember
//! anything that matters: it may be killed between any two instructions, and another goes on from what it sees.
//!
//! Start reading at [`operate`], then [`election`]. [`supervise`] keeps it running.

pub mod election;
pub mod health;
pub mod metrics;
pub mod operate;
pub mod options;
pub mod supervise;
