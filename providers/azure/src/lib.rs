//! The Azure provider: machines, network and disks through Azure Resource Manager.
//!
//! Everything of a cluster has a name that derives from the cluster's and the machine's, and tags by which it's found again, in a
//! resource group of its own or one that is given. Making is a PUT of what is missing, removing goes in the order in which one
//! thing needs the other, and no call touches what doesn't carry the cluster's tag. Nothing is kept on this machine.
//!
//! Start reading at [`AzureProvider`]; then `network` and `machines` for what is made in which order, `translate` and `seen` (both
//! pure) for what it looks like, `client` for what is asked of Azure, `gate` for how fast, `poller` for how operations are followed,
//! and `error` for what a person is told. It knows nothing of Kubernetes.

mod certificate;
mod client;
mod config;
mod credentials;
mod error;
mod estimate;
mod gate;
mod image;
mod kind;
mod machines;
mod network;
mod poller;
mod reply;
mod seen;
mod sizes;
mod translate;
mod transport;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use async_trait::async_trait;
use futures::future::{join, join_all};
use kprov_provider::{Advice, Estimate, Provider, ProviderError};
use kprov_types::machine::{Disk, DiskSpec, Leftover, Machine, MachineSpec, Network, NetworkSpec, Observed};
use kprov_types::{ClusterName, MachineName};
use tokio::sync::OnceCell;

pub use config::{AzureConfig, Cloud, Credentials, Surroundings};

use client::Client;
use kind::{CLUSTER_TAG, Kind, Names};
use machines::Inventory;
use seen::{NetworkParts, Seen};
use sizes::Sizes;

/// Machines on Azure. See the crate's documentation.
#[derive(Debug)]
pub struct AzureProvider {
    config: AzureConfig,
    client: Client,
    /// The sizes of the location: they don't change while one command runs, and are megabytes.
    sizes: OnceCell<Arc<Sizes>>,
}

impl AzureProvider {
    /// A provider with this configuration. Asks for nothing yet.
    pub fn open(config: AzureConfig) -> Result<Self, ProviderError> {
        let client = Client::new(&config)
            .map_err(|cause| ProviderError::never("no client for Azure can be made").caused_by(cause))?;
        Ok(Self {
            config,
            client,
            sizes: OnceCell::new(),
        })
    }

    fn names(&self, cluster: &ClusterName) -> Names {
        let group = self.config.resource_group.clone();
        let group = group.unwrap_or_else(|| format!("kprov-{cluster}"));
        Names {
            cluster: cluster.clone(),
            group_id: self.client.group_id(&group),
            group,
        }
    }

    async fn sizes(&self) -> Result<Arc<Sizes>, ProviderError> {
        let sizes = self.sizes.get_or_try_init(|| async {
            let listed = self.client.sizes(&self.config.location).await?;
            Ok::<_, ProviderError>(Arc::new(Sizes::new(&self.config.location, &listed)))
        });
        sizes.await.cloned()
    }

    /// The zones to spread machines over: those asked for, else all that have the sizes asked for.
    async fn zones(&self) -> Result<Vec<String>, ProviderError> {
        if !self.config.zones.is_empty() {
            return Ok(self.config.zones.clone());
        }
        self.sizes().await?.zones_of(&self.config.sizes)
    }
}

/// Success where all succeeded, else the error that matters most: one that a person has to mend, before one that asks for a look,
/// before one to wait for.
fn worst<T>(results: Vec<Result<T, ProviderError>>) -> Result<(), ProviderError> {
    worst_or(results).map(drop)
}

fn worst_or<T>(results: Vec<Result<T, ProviderError>>) -> Result<Vec<T>, ProviderError> {
    let rank = |error: &ProviderError| match error.advice {
        Advice::Never => (2, std::time::Duration::ZERO),
        Advice::LookFirst => (1, std::time::Duration::ZERO),
        Advice::RetryAfter(delay) | Advice::Wait(delay) => (0, delay),
    };
    let mut made = Vec::with_capacity(results.len());
    let mut worst: Option<ProviderError> = None;
    for result in results {
        match result {
            Ok(value) => made.push(value),
            Err(error) if worst.as_ref().is_none_or(|w| rank(&error) > rank(w)) => worst = Some(error),
            Err(_) => {}
        }
    }
    worst.map_or(Ok(made), Err)
}

#[async_trait]
impl Provider for AzureProvider {
    fn name(&self) -> &'static str {
        "azure"
    }

    async fn clusters(&self) -> Result<Vec<ClusterName>, ProviderError> {
        // Azure's listing over all kinds doesn't show tags, so each kind is listed.
        let lists = join_all(Kind::ALL.map(|kind| async move {
            match &self.config.resource_group {
                Some(given) => self.client.list(given, kind).await,
                None => self
                    .client
                    .list_everywhere(kind, &[])
                    .await
                    .map_err(|f| kind.listing().failed(f)),
            }
        }));
        let (groups, lists) = join(self.client.tagged_groups(CLUSTER_TAG), lists).await;
        let mut names: BTreeSet<String> = groups?
            .iter()
            .filter_map(|g| seen::tags(g).remove(CLUSTER_TAG))
            .collect();
        for list in lists {
            names.extend(list?.into_iter().filter_map(|mut s| s.tags.remove(CLUSTER_TAG)));
        }
        Ok(names.into_iter().filter_map(|n| ClusterName::new(n).ok()).collect())
    }

    async fn observe(&self, cluster: &ClusterName) -> Result<Observed, ProviderError> {
        let names = self.names(cluster);
        let machines = async {
            let machines = self.client.list(&names.group, Kind::Machine).await?;
            let power = self.power(&names, &machines).await?;
            Ok((machines, power))
        };
        let others = Kind::ALL.into_iter().filter(|kind| *kind != Kind::Machine);
        let others = join_all(others.map(|kind| self.client.list(&names.group, kind)));
        let (group, (machines, others)) = join(self.client.group(&names.group), join(machines, others)).await;
        let Some(group) = group? else {
            return Ok(Observed::default());
        };
        let (mut all, power): (Vec<Seen>, BTreeMap<String, String>) = machines?;
        for list in others {
            all.extend(list?);
        }
        let parts = NetworkParts {
            group_tags: seen::tags(&group),
            parts: all.iter().filter(|s| s.is_of(cluster)).cloned().collect(),
        };
        let inventory = Inventory::new(all, power);
        Ok(Observed {
            network: self.network_of(&names, &parts),
            disks: inventory.disks(&names),
            machines: inventory.machines(&names),
        })
    }

    async fn ensure_network(&self, cluster: &ClusterName, want: &NetworkSpec) -> Result<Network, ProviderError> {
        self.make_network(&self.names(cluster), want).await
    }

    async fn remove_network(&self, cluster: &ClusterName) -> Result<(), ProviderError> {
        self.unmake_network(&self.names(cluster)).await
    }

    async fn ensure_disks(&self, cluster: &ClusterName, want: &[DiskSpec]) -> Result<Vec<Disk>, ProviderError> {
        self.make_disks(&self.names(cluster), want).await
    }

    async fn remove_disks(&self, cluster: &ClusterName, machines: &[MachineName]) -> Result<(), ProviderError> {
        self.unmake_disks(&self.names(cluster), machines).await
    }

    async fn ensure_machines(
        &self,
        cluster: &ClusterName,
        want: &[MachineSpec],
    ) -> Result<Vec<Machine>, ProviderError> {
        self.make_machines(&self.names(cluster), want).await
    }

    async fn remove_machines(&self, cluster: &ClusterName, machines: &[MachineName]) -> Result<(), ProviderError> {
        self.unmake_machines(&self.names(cluster), machines).await
    }

    async fn leftovers(&self, cluster: &ClusterName) -> Result<Vec<Leftover>, ProviderError> {
        let names = self.names(cluster);
        let group = self.client.group(&names.group);
        let elsewhere = self.client.tagged(CLUSTER_TAG, cluster.as_str());
        let (group, (own, elsewhere)) = join(group, join(self.own(&names), elsewhere)).await;
        let leftover = |kind: &str, name: &str| Leftover {
            kind: kind.to_owned(),
            name: name.to_owned(),
            why: None,
        };
        let mut left: Vec<Leftover> = own?.iter().map(|s| leftover(s.kind.noun(), &s.name)).collect();
        let owner = group?.and_then(|g| seen::tags(&g).remove(CLUSTER_TAG));
        if self.config.resource_group.is_none() && owner.is_some_and(|c| c == cluster.as_str()) {
            left.push(leftover("resource group", &names.group));
        }
        // The cluster file may have named another group before. This listing is late for what is in the group itself.
        let inside = format!("{}/", names.group_id.to_ascii_lowercase());
        for found in elsewhere? {
            let text = |name: &str| found.get(name).and_then(serde_json::Value::as_str).unwrap_or("");
            if !text("id").to_ascii_lowercase().starts_with(&inside) {
                left.push(Leftover {
                    why: Some("it's in another resource group than the cluster's".into()),
                    ..leftover(text("type"), text("id"))
                });
            }
        }
        left.sort();
        Ok(left)
    }

    async fn console(&self, cluster: &ClusterName, machine: &MachineName) -> Result<Option<String>, ProviderError> {
        self.client.console(&self.names(cluster).group, machine.as_str()).await
    }

    async fn estimate(
        &self,
        cluster: &ClusterName,
        network: Option<&NetworkSpec>,
        disks: &[DiskSpec],
        machines: &[MachineSpec],
    ) -> Result<Option<Estimate>, ProviderError> {
        let names = self.names(cluster);
        let parts = match network {
            Some(_) => self.network_parts(&names).await?.1.parts,
            None => NetworkParts::default(),
        };
        Ok(Some(estimate::estimate(
            &self.config,
            &names,
            &parts,
            network,
            disks,
            machines,
        )))
    }
}
