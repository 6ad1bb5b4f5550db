//! The pod network: how pods on different machines reach each other.
//!
//! Each machine has a range of pod addresses, its Node's `podCIDR`. Machines on one subnet route to each other's ranges
//! directly; across subnets, where routers in between know nothing of pods, through a VXLAN (RFC 7348) whose entries follow
//! from the Nodes alone, so that machines need not exchange anything. Pods get their addresses by CNI plugins (bridge and
//! host-local), which are told by a configuration file.
//!
//! [`desired()`] and [`diff()`] decide and are pure; [`run()`] looks, applies what differs, and looks again when Nodes change
//! and each minute. It changes only what bears its mark: routes of protocol [`ROUTE_PROTOCOL`], the device [`TUNNEL_NAME`],
//! chains (or the nft table) named after kprov, and one CNI file.

mod cni;
mod desired;
mod diff;
mod filter;
mod host;
mod netlink;
mod run;
#[cfg(test)]
mod tests;

pub use cni::CniConfig;
pub use desired::{Desired, Mac, Masquerade, NodeView, ROUTE_PROTOCOL, Route, TUNNEL_NAME, Tunnel, Uplink, desired};
pub use diff::{Action, Observed, ObservedTunnel, diff};
pub use filter::FilterError;
pub use host::missing_network_features;
pub use netlink::NetlinkError;
pub use run::{PodNetworkError, PodNetworkSettings, PodNetworkStatus, run};
