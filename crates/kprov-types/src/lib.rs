//! The data that kprov's parts hand to each other: clusters, releases, machines, first-boot configuration.
//!
//! Data only. Nothing here does I/O, reads a clock, or knows an async runtime or a Kubernetes client; `cargo xtask
//! check-deps` proves it. Start reading at [`cluster`], what a person asks for, then [`release`], what a version consists
//! of, then [`machine`] and [`node`], what providers and machines are told.

pub mod api;
pub mod cluster;
pub mod infrastructure;
pub mod machine;
pub mod names;
pub mod node;
pub mod ports;
pub mod release;
pub mod version;

pub use cluster::ClusterSpec;
pub use machine::Role;
pub use names::{ClusterName, MachineName};
pub use release::{Digest, Release};
pub use version::{KubernetesVersion, Minor};
