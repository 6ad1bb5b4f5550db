//! The AWS provider: machines as EC2 instances, in a VPC of the cluster's own or one that is given, behind a network load
//! balancer.
//!
//! Everything carries the tag `kprov.io/cluster` and is found again by it; nothing is remembered in a file. What the API gives a
//! client token is made with one, and what it doesn't has a name or place that AWS allows once. Many machines of one kind are
//! made by one call. What was not made by kprov is never changed: a VPC that was given stays as it is.
//!
//! It knows nothing of Kubernetes but the port and path of the API's health check. It neither waits nor tries again: errors say
//! what to do. Credentials are taken as every AWS tool takes them.
//!
//! Start reading at [`AwsProvider`], then `network::ensure` and `machines`. `client` has all calls, `translate` and `network::layout`
//! are pure, `error` has what AWS' error codes mean.

mod catalog;
mod client;
mod config;
mod disks;
mod error;
mod estimate;
mod launch;
mod ledger;
mod leftovers;
mod machines;
mod model;
mod network;
mod series;
mod spread;
mod translate;
mod user_data;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use async_trait::async_trait;
use aws_credential_types::provider::SharedCredentialsProvider;
use kprov_provider::{Estimate, Provider, ProviderError};
use kprov_types::machine::{Disk, DiskSpec, Leftover, Machine, MachineSpec, Network, NetworkSpec, Observed};
use kprov_types::{ClusterName, MachineName};

pub use config::AwsConfig;

use client::Client;
use config::Settings;
use error::while_reading;
use ledger::Ledger;
use model::{Instance, Net, Volume};

/// What all calls share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) client: Client,
    pub(crate) settings: Settings,
    pub(crate) ledger: Ledger,
    /// When this provider was opened.
    pub(crate) opened: Instant,
    /// Zones that had no capacity for a size.
    full: Mutex<BTreeSet<(String, String)>>,
    /// Instances that this process has started.
    launched: Mutex<BTreeSet<String>>,
}

impl Shared {
    /// Checks that listings show what this process has made.
    pub(crate) fn check_listed(
        &self,
        cluster: &ClusterName,
        net: &Net,
        instances: &[Instance],
        volumes: &[Volume],
    ) -> Result<(), ProviderError> {
        let mut listed = network::listed(net);
        listed.extend(instances.iter().map(|i| i.id.as_str()));
        listed.extend(volumes.iter().map(|v| v.id.as_str()));
        self.ledger.check(cluster, &listed)
    }

    pub(crate) fn mark_full(&self, zone: &str, size: &str) {
        let mut full = self.full.lock().unwrap_or_else(PoisonError::into_inner);
        full.insert((zone.to_owned(), size.to_owned()));
    }

    pub(crate) fn mark_launched(&self, instance: &str) {
        let mut launched = self.launched.lock().unwrap_or_else(PoisonError::into_inner);
        launched.insert(instance.to_owned());
    }

    /// Instances that this process has started.
    pub(crate) fn launched(&self) -> BTreeSet<String> {
        self.launched.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Zones that had no capacity for a size.
    pub(crate) fn full_zones_of(&self, size: &str) -> BTreeSet<String> {
        let full = self.full.lock().unwrap_or_else(PoisonError::into_inner);
        full.iter().filter(|(_, s)| s == size).map(|(z, _)| z.clone()).collect()
    }

    /// Zones that had no capacity for some size.
    pub(crate) fn full_zones(&self) -> Vec<String> {
        let full = self.full.lock().unwrap_or_else(PoisonError::into_inner);
        full.iter().map(|(z, _)| z.clone()).collect()
    }
}

/// Machines on Amazon EC2. See the crate's documentation.
#[derive(Clone, Debug)]
pub struct AwsProvider {
    shared: Arc<Shared>,
}

impl AwsProvider {
    /// Opens the provider. Makes no call yet, but for what finding the region takes.
    pub async fn open(config: AwsConfig) -> Result<Self, ProviderError> {
        Self::open_with(config, None).await
    }

    /// The same, with these credentials whatever environment and profile say.
    pub async fn open_with(
        config: AwsConfig,
        credentials: Option<SharedCredentialsProvider>,
    ) -> Result<Self, ProviderError> {
        let settings = config.validate()?;
        // Boxed: finding credentials is a large future.
        let client = Box::pin(Client::open(&settings, credentials)).await?;
        Ok(Self {
            shared: Arc::new(Shared {
                client,
                settings,
                ledger: Ledger::default(),
                opened: Instant::now(),
                full: Mutex::default(),
                launched: Mutex::default(),
            }),
        })
    }
}

#[async_trait]
impl Provider for AwsProvider {
    fn name(&self) -> &'static str {
        "aws"
    }

    async fn clusters(&self) -> Result<Vec<ClusterName>, ProviderError> {
        let names = self.shared.client.clusters().await.map_err(while_reading)?;
        Ok(names
            .into_iter()
            .filter_map(|cluster| ClusterName::new(cluster).ok())
            .collect())
    }

    async fn observe(&self, cluster: &ClusterName) -> Result<Observed, ProviderError> {
        let seen = machines::look(&self.shared, cluster).await?;
        Ok(Observed {
            network: network::network(&self.shared, &seen.net),
            disks: seen.volumes.iter().map(translate::disk).collect(),
            machines: machines::machines(&self.shared, &seen),
        })
    }

    async fn ensure_network(&self, cluster: &ClusterName, want: &NetworkSpec) -> Result<Network, ProviderError> {
        let net = network::ensure::ensure(&self.shared, cluster, want).await?;
        network::network(&self.shared, &net)
            .ok_or_else(|| ProviderError::look_first(format!("nothing of the network of `{cluster}` is there")))
    }

    async fn remove_network(&self, cluster: &ClusterName) -> Result<(), ProviderError> {
        network::remove::remove(&self.shared, cluster).await
    }

    async fn ensure_disks(&self, cluster: &ClusterName, want: &[DiskSpec]) -> Result<Vec<Disk>, ProviderError> {
        let volumes = disks::ensure(&self.shared, cluster, want).await?;
        Ok(volumes.iter().map(translate::disk).collect())
    }

    async fn remove_disks(&self, cluster: &ClusterName, machines: &[MachineName]) -> Result<(), ProviderError> {
        disks::remove(&self.shared, cluster, machines).await
    }

    async fn ensure_machines(
        &self,
        cluster: &ClusterName,
        want: &[MachineSpec],
    ) -> Result<Vec<Machine>, ProviderError> {
        machines::ensure(&self.shared, cluster, want).await
    }

    async fn remove_machines(&self, cluster: &ClusterName, machines: &[MachineName]) -> Result<(), ProviderError> {
        machines::remove(&self.shared, cluster, machines).await
    }

    async fn leftovers(&self, cluster: &ClusterName) -> Result<Vec<Leftover>, ProviderError> {
        leftovers::list(&self.shared, cluster).await
    }

    async fn console(&self, cluster: &ClusterName, machine: &MachineName) -> Result<Option<String>, ProviderError> {
        machines::console(&self.shared, cluster, machine).await
    }

    async fn estimate(
        &self,
        cluster: &ClusterName,
        network: Option<&NetworkSpec>,
        disks: &[DiskSpec],
        machines: &[MachineSpec],
    ) -> Result<Option<Estimate>, ProviderError> {
        let net = network::look(&self.shared, cluster).await?;
        let there: BTreeSet<String> = net.machine_subnets().keys().map(ToString::to_string).collect();
        let zones = match &self.shared.settings.zones {
            zones if !zones.is_empty() => zones.clone(),
            _ if !there.is_empty() => there.into_iter().collect(),
            _ => self.shared.client.zones().await.map_err(while_reading)?,
        };
        let wanted = (network, disks, machines);
        estimate::estimate(&self.shared.settings, cluster, &net, &zones, wanted).map(Some)
    }

    fn sets_host_names(&self) -> bool {
        true
    }
}
