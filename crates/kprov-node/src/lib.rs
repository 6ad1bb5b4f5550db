//! What runs on each machine of a cluster: containerd and kubelet as supervised children, the front for the API, the pod
//! network, and on control-plane machines etcd's membership and the standby control plane.
//!
//! kprov-node takes its first-boot configuration from [`kprov_types::node::NODE_CONFIG_PATH`], and a control-plane machine the
//! rest from `kprov up` by its setup endpoint. From then on it needs nobody: it starts again from what is on disk. What should be
//! another way it is told by its Machine object in the API, which the operator writes ([`machine`]).
//!
//! It must never run a file that it has not verified, put etcd's quorum at risk, take kubelet's word for whether a
//! control plane runs, or hold a secret longer than it is needed. Start reading at [`node`], the order of everything;
//! decisions are pure functions of what was seen: [`machine::decide`], [`standby`], [`etcd`], [`csr`].

pub mod api;
pub mod config;
pub mod containerd;
pub mod control_plane;
pub mod cri;
pub mod csr;
pub mod endpoint;
pub mod etcd;
pub mod files;
pub mod front;
pub mod host;
pub mod https;
pub mod images;
pub mod kubelet;
pub mod machine;
pub mod node;
pub mod nodes;
pub mod paths;
pub mod podnet;
pub mod release;
pub mod reset;
pub mod standby;
pub mod status;
pub mod supervise;
#[cfg(test)]
mod testing;
pub mod vip;
pub mod volume;

/// The environment variable that is set where another kprov-node has started this one: everything before [`node::run`] is done.
pub const SETTLED: &str = "KPROV_NODE_SETTLED";

/// An error with all its causes, in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text = format!("{text}: {source}");
        next = source.source();
    }
    text
}
