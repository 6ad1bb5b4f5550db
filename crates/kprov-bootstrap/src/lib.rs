//! Everything that makes machines a cluster: certificates, the files and static pods of control-plane machines, the
//! kubelet's configuration, the self-hosted objects, applying them, and the wait until they have taken over.
//!
//! kprov-node uses it on machines, `kprov up` from outside. Rendering is pure: equal inputs give equal files and
//! objects, keys and times are given by the caller, and nothing here reads a file or a clock; only [`apply`] and
//! [`pivot`] talk to an API server. What differs between Kubernetes versions stands in one table, [`versions`], and
//! nowhere else.
//!
//! Start reading at [`manifests::self_hosted`], what a cluster's control plane consists of, then [`pki`], what it proves its
//! identity with, then [`paths`], where that lies on disk.

pub mod apply;
mod component_flags;
mod config_files;
pub mod kubelet;
pub mod manifests;
pub mod paths;
pub mod pivot;
pub mod pki;
pub mod versions;

pub use config_files::config_files;
pub use kubelet::kubelet_config;
pub use manifests::{etcd_pod, self_hosted, standby_pods, workload};
pub use pki::{control_plane_files, generate_secrets};
