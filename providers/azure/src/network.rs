//! The network of a cluster: what is missing of it is made, in the order in which one part needs the other.

use futures::future::{join, join_all};
use ipnet::Ipv4Net;
use kprov_provider::ProviderError;
use kprov_types::machine::{Network, NetworkSpec};
use serde_json::Value;

use crate::AzureProvider;
use crate::client::Condition;
use crate::error::Doing;
use crate::kind::{CLUSTER_TAG, Kind, Names};
use crate::seen::{self, NetworkParts, Seen};
use crate::translate::{self, Opening};

/// The kinds that a network consists of.
const PARTS: [Kind; 5] = [
    Kind::VirtualNetwork,
    Kind::SecurityGroup,
    Kind::NatGateway,
    Kind::LoadBalancer,
    Kind::PublicIp,
];

impl AzureProvider {
    /// What is there of the network, and whether its group is.
    pub(crate) async fn network_parts(&self, names: &Names) -> Result<(Option<Value>, Found), ProviderError> {
        let lists = join_all(PARTS.map(|kind| self.client.list(&names.group, kind)));
        let (group, lists) = join(self.client.group(&names.group), lists).await;
        let group = group?;
        let mut all = Vec::new();
        for list in lists {
            all.extend(list?);
        }
        let own = all.iter().filter(|s| s.is_of(&names.cluster)).cloned().collect();
        let parts = NetworkParts {
            group_tags: group.as_ref().map(seen::tags).unwrap_or_default(),
            parts: own,
        };
        Ok((group, Found { parts, all }))
    }

    pub(crate) fn network_of(&self, names: &Names, parts: &NetworkParts) -> Option<Network> {
        let way_out = parts.find(Kind::PublicIp, &names.nat()).and_then(Seen::public_address);
        let open = |group: &Seen, api_port| translate::is_open(&self.config, group, Opening { api_port, way_out });
        parts.network(names, self.config.private, open)
    }

    pub(crate) async fn make_network(&self, names: &Names, want: &NetworkSpec) -> Result<Network, ProviderError> {
        let (group, found) = self.network_parts(names).await?;
        let range = self.range(names, want, &found.parts).await?;
        self.make_group(names, group.as_ref(), range).await?;
        self.make_parts(names, range, want.api_port, &found).await?;
        let (_, found) = self.network_parts(names).await?;
        let network = self.network_of(names, &found.parts);
        network.ok_or_else(|| ProviderError::look_first(format!("the network of `{}` isn't there yet", names.cluster)))
    }

    /// The range that the network has or was to have, else the one asked for, else a free one.
    async fn range(&self, names: &Names, want: &NetworkSpec, parts: &NetworkParts) -> Result<Ipv4Net, ProviderError> {
        match (parts.range(names), want.cidr) {
            (Some(there), Some(wanted)) if there != wanted => Err(ProviderError::never(format!(
                "the network of `{}` is `{there}`, not `{wanted}`",
                names.cluster
            ))
            .hint("the range of a network can't be changed; leave it out to keep it")),
            (Some(there), _) => Ok(there),
            (None, Some(wanted)) => Ok(wanted),
            (None, None) => {
                let networks = self.client.list_everywhere(Kind::VirtualNetwork, &[]).await;
                let networks = networks.map_err(|f| Kind::VirtualNetwork.listing().failed(f))?;
                seen::free_range(&seen::ranges(&networks)).ok_or_else(|| {
                    ProviderError::never("the subscription's virtual networks leave no range free for another one")
                        .hint("name one in `spec.network.machines`")
                })
            }
        }
    }

    async fn make_group(&self, names: &Names, group: Option<&Value>, range: Ipv4Net) -> Result<(), ProviderError> {
        let tags = translate::network_tags(names, range);
        match (group, &self.config.resource_group) {
            (Some(_), Some(_)) => Ok(()),
            (None, Some(given)) => Err(ProviderError::never(format!("there is no resource group `{given}`"))
                .hint("make it, or leave `spec.azure.resourceGroup` out to have one made")),
            (None, None) => self.client.put_group(&names.group, &self.config.location, &tags).await,
            (Some(group), None) => {
                let owner = seen::tags(group);
                let state = group.pointer("/properties/provisioningState").and_then(Value::as_str);
                if owner.get(CLUSTER_TAG).is_none_or(|c| c != names.cluster.as_str()) {
                    return Err(taken("resource group", &names.group, names)
                        .hint("choose another name for the cluster, or name that group in `spec.azure.resourceGroup` to put it there"));
                }
                if state == Some("Deleting") {
                    return Err(ProviderError::wait(
                        format!("resource group `{}` is being removed", names.group),
                        std::time::Duration::from_secs(5),
                    ));
                }
                Ok(())
            }
        }
    }

    async fn make_parts(&self, names: &Names, range: Ipv4Net, port: u16, found: &Found) -> Result<(), ProviderError> {
        let config = &self.config;
        let zones = || async {
            // Asked for only when something is made that spans them.
            if found.is_there(Kind::LoadBalancer, &names.api()) {
                return Ok(Vec::new());
            }
            self.zones().await
        };
        let address = |name: String, zones: Vec<String>| async move {
            let body = translate::public_ip(config, translate::network_tags(names, range), &zones);
            self.make_part(names, found, Kind::PublicIp, &name, body).await
        };
        let balancer = |zones: Vec<String>| async move {
            let body = translate::load_balancer(config, names, range, port, &zones);
            self.make_part(names, found, Kind::LoadBalancer, &names.api(), body)
                .await
        };
        let network = async {
            let address = address(names.nat(), Vec::new()).await?;
            let opening = Opening {
                api_port: port,
                way_out: address.public_address(),
            };
            let firewall = self.make_security_group(names, range, opening, found);
            let body = translate::nat_gateway(config, names, range);
            let name = names.nat();
            let gateway = self.make_part(names, found, Kind::NatGateway, &name, body);
            // Both are seen to their end: what was begun isn't left in the middle because the other one failed.
            let (firewall, gateway) = join(firewall, gateway).await;
            firewall.and(gateway)?;
            let body = translate::virtual_network(config, names, range);
            let name = names.virtual_network();
            self.make_part(names, found, Kind::VirtualNetwork, &name, body).await
        };
        if config.private {
            network.await?;
            return balancer(zones().await?).await.map(drop);
        }
        let outside = async {
            let zones = zones().await?;
            address(names.api(), zones.clone()).await?;
            balancer(zones).await
        };
        let (network, outside) = join(network, outside).await;
        network.and(outside).map(drop)
    }

    async fn make_security_group(
        &self,
        names: &Names,
        range: Ipv4Net,
        opening: Opening,
        found: &Found,
    ) -> Result<Seen, ProviderError> {
        let name = names.security_group();
        let there = found.parts.find(Kind::SecurityGroup, &name);
        let Some(there) = there.filter(|g| g.is_provisioned() && !translate::is_open(&self.config, g, opening)) else {
            let body = translate::security_group(&self.config, names, range, opening);
            return self.make_part(names, found, Kind::SecurityGroup, &name, body).await;
        };
        // Others may be adding rules of their own at this moment.
        let condition = there
            .etag()
            .map_or(Condition::Any, |e| Condition::Unchanged(e.to_owned()));
        let body = translate::reopened(&self.config, there, opening);
        let changed = self
            .client
            .put(&names.group, Kind::SecurityGroup, &name, &condition, &body)
            .await;
        let doing = Doing::new("change", Kind::SecurityGroup.noun(), name);
        changed.map_err(|f| doing.failed(f))
    }

    /// Makes a part unless it's there and well.
    async fn make_part(
        &self,
        names: &Names,
        found: &Found,
        kind: Kind,
        name: &str,
        body: Value,
    ) -> Result<Seen, ProviderError> {
        if let Some(there) = found.parts.find(kind, name).filter(|s| s.is_provisioned()) {
            return Ok(there.clone());
        }
        if found.is_taken(kind, name, names) {
            return Err(
                taken(kind.noun(), name, names).hint("choose another name for the cluster, or another resource group")
            );
        }
        let doing = Doing {
            location: Some(self.config.location.clone()),
            ..Doing::new("make", kind.noun(), name)
        };
        let made = self.client.put(&names.group, kind, name, &Condition::Any, &body).await;
        made.map_err(|f| doing.failed(f))
    }

    /// Removes the network and all that is left of the cluster in its group, then the group where kprov made it.
    pub(crate) async fn unmake_network(&self, names: &Names) -> Result<(), ProviderError> {
        let Some(group) = self.client.group(&names.group).await? else {
            return Ok(());
        };
        let own = self.own(names).await?;
        if let Some(machine) = own.iter().find(|s| s.kind == Kind::Machine) {
            return Err(ProviderError::never(format!(
                "the network of `{}` still has the machine `{}`",
                names.cluster, machine.name
            )));
        }
        if let Some(disk) = own.iter().find_map(seen::disk) {
            return Err(ProviderError::never(format!(
                "the resource group of `{}` still has the data disk of `{}`",
                names.cluster, disk.machine
            )));
        }
        let waves: [&[Kind]; 5] = [
            &[Kind::Nic, Kind::Disk],
            &[Kind::LoadBalancer],
            &[Kind::VirtualNetwork],
            &[Kind::NatGateway, Kind::SecurityGroup],
            &[Kind::PublicIp],
        ];
        for wave in waves {
            let these = own.iter().filter(|s| wave.contains(&s.kind));
            let gone = join_all(these.map(|s| self.client.delete(&names.group, s.kind, &s.name))).await;
            crate::worst(gone)?;
        }
        self.unmake_group(names, &group).await
    }

    async fn unmake_group(&self, names: &Names, group: &Value) -> Result<(), ProviderError> {
        let mut tags = seen::tags(group);
        let ours = tags.get(CLUSTER_TAG).is_some_and(|c| c == names.cluster.as_str());
        if self.config.resource_group.is_some() || !ours {
            return Ok(());
        }
        let rest = self.client.group_contents(&names.group).await?;
        // What carries the cluster's tag has been seen to go; this listing of Azure's may be late.
        let foreign = rest.iter().any(|r| {
            seen::tags(r)
                .get(CLUSTER_TAG)
                .is_none_or(|c| c != names.cluster.as_str())
        });
        if !foreign {
            return self.client.delete_group(&names.group).await;
        }
        // Others have moved in: the group is theirs now.
        tags.retain(|name, _| !name.starts_with("kprov-"));
        let tags = serde_json::to_value(tags).unwrap_or_default();
        self.client.tag_group(&names.group, &tags).await
    }

    /// All that carries the cluster's tag in its group, each kind listed once.
    pub(crate) async fn own(&self, names: &Names) -> Result<Vec<Seen>, ProviderError> {
        let lists = join_all(Kind::ALL.map(|kind| self.client.list(&names.group, kind))).await;
        let mut own = Vec::new();
        for list in lists {
            own.extend(list?.into_iter().filter(|s| s.is_of(&names.cluster)));
        }
        Ok(own)
    }
}

/// What was found: the cluster's parts, and all that has names in the group.
pub(crate) struct Found {
    pub(crate) parts: NetworkParts,
    all: Vec<Seen>,
}

impl Found {
    fn is_there(&self, kind: Kind, name: &str) -> bool {
        self.parts.find(kind, name).is_some_and(Seen::is_provisioned)
    }

    fn is_taken(&self, kind: Kind, name: &str, names: &Names) -> bool {
        let same = |s: &&Seen| s.kind == kind && s.name.eq_ignore_ascii_case(name);
        self.all.iter().find(same).is_some_and(|s| !s.is_of(&names.cluster))
    }
}

/// The error for a name that somebody else has.
pub(crate) fn taken(noun: &str, name: &str, names: &Names) -> ProviderError {
    ProviderError::never(format!(
        "{noun} `{name}` exists already and is not of cluster `{}`",
        names.cluster
    ))
}
