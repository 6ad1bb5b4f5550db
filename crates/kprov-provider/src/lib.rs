//! The narrow provider trait: machines, network and disks, and just enough of each to reach a bootable cluster.
//!
//! A provider knows nothing of Kubernetes, of other providers, or of who calls it. Every call is an idempotent *ensure*:
//! what carries the cluster's tag is found again, never looked up in a state file. A provider neither waits for slow
//! things nor retries: it reports what is, and its errors tell one policy outside what to do ([`Advice`]). A listing that
//! is incomplete is an error, not a short list. Nothing about Kubernetes versions crosses this trait.

#[cfg(feature = "conformance")]
pub mod conformance;
mod error;
pub mod first_boot;

pub use error::{Advice, ProviderError};

use async_trait::async_trait;
use kprov_types::machine::{Disk, DiskSpec, Leftover, Machine, MachineSpec, Network, NetworkSpec, Observed};
use kprov_types::{ClusterName, MachineName};

/// What making something would take.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Estimate {
    /// The things that would be made, in the provider's terms, in order.
    pub things: Vec<String>,
    /// About how many calls of the provider's API that takes, with looking what is there.
    pub calls: u64,
}

/// What every provider can do. See the crate's documentation for what all calls have in common.
#[async_trait]
pub trait Provider: Send + Sync {
    /// The provider's name, as `--provider` takes it.
    fn name(&self) -> &'static str;

    /// The names of all clusters that have anything here.
    async fn clusters(&self) -> Result<Vec<ClusterName>, ProviderError>;

    /// Everything there is of one cluster. A cluster without anything is an empty [`Observed`], not an error.
    async fn observe(&self, cluster: &ClusterName) -> Result<Observed, ProviderError>;

    /// Ensures the private network with its firewall, and one stable API endpoint.
    async fn ensure_network(&self, cluster: &ClusterName, want: &NetworkSpec) -> Result<Network, ProviderError>;

    /// Removes network and endpoint; done already is success.
    async fn remove_network(&self, cluster: &ClusterName) -> Result<(), ProviderError>;

    /// Ensures one data disk for each machine named, in any order.
    async fn ensure_disks(&self, cluster: &ClusterName, want: &[DiskSpec]) -> Result<Vec<Disk>, ProviderError>;

    /// Removes data disks **and what is on them**; done already is success.
    async fn remove_disks(&self, cluster: &ClusterName, machines: &[MachineName]) -> Result<(), ProviderError>;

    /// Ensures machines, each with its data disk attached; starts those that are stopped. First-boot data of a machine
    /// that exists stays as it is. Needs the network. May return while machines are still pending.
    async fn ensure_machines(&self, cluster: &ClusterName, want: &[MachineSpec])
    -> Result<Vec<Machine>, ProviderError>;

    /// Removes machines; done already is success. Data disks stay.
    async fn remove_machines(&self, cluster: &ClusterName, machines: &[MachineName]) -> Result<(), ProviderError>;

    /// What is still there of the cluster, as listed afresh: how `down` proves its work.
    async fn leftovers(&self, cluster: &ClusterName) -> Result<Vec<Leftover>, ProviderError>;

    /// What a machine has printed while booting, for a person who wants to know why it never came up.
    async fn console(&self, cluster: &ClusterName, machine: &MachineName) -> Result<Option<String>, ProviderError>;

    /// What it would take to make these things, where each call counts. Changes nothing.
    async fn estimate(
        &self,
        _cluster: &ClusterName,
        _network: Option<&NetworkSpec>,
        _disks: &[DiskSpec],
        _machines: &[MachineSpec],
    ) -> Result<Option<Estimate>, ProviderError> {
        Ok(None)
    }

    /// Whether machines have their name as their host name before first-boot data runs. Where they do, machines of one kind
    /// can be given the very same data, and a cloud can make many of them by one call.
    fn sets_host_names(&self) -> bool {
        false
    }
}
