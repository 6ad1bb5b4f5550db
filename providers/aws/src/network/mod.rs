//! The network and the endpoint: what is there, what is missing, and how it goes again.

pub(crate) mod ensure;
pub(crate) mod layout;
pub(crate) mod remove;
mod surplus;

use std::collections::BTreeSet;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use ipnet::Ipv4Net;
use kprov_provider::ProviderError;
use kprov_types::ClusterName;
use kprov_types::machine::{Endpoint, Network};

use crate::Shared;
use crate::error::while_reading;
use crate::model::{Gateway, Net};

/// Lists everything of a cluster's network: one call for each kind of thing.
pub(crate) async fn look(shared: &Shared, cluster: &ClusterName) -> Result<Net, ProviderError> {
    look_with_ranges(shared, cluster).await.map(|(net, _)| net)
}

/// The same, with the ranges of all VPCs of the region.
pub(crate) fn look_with_ranges<'a>(
    shared: &'a Shared,
    cluster: &'a ClusterName,
) -> BoxFuture<'a, Result<(Net, Vec<Ipv4Net>), ProviderError>> {
    list(shared, cluster).boxed()
}

async fn list(shared: &Shared, cluster: &ClusterName) -> Result<(Net, Vec<Ipv4Net>), ProviderError> {
    let client = &shared.client;
    let given = async {
        match &shared.settings.vpc {
            Some(vpc) => client.gateways_of(vpc).await,
            None => Ok(Vec::<Gateway>::new()),
        }
    };
    let (vpcs, subnets, groups, tables, gateways, given, nats, addresses, balancer, target_group) = futures::try_join!(
        client.vpcs(cluster),
        client.subnets(cluster),
        client.groups(cluster),
        client.tables(cluster),
        client.gateways(cluster),
        given,
        client.nats(cluster),
        client.addresses(cluster),
        client.balancer(cluster),
        client.target_group(cluster),
    )
    .map_err(while_reading)?;
    let ranges = vpcs.iter().map(|v| v.cidr).collect();
    let listed = surplus::Listed {
        vpcs,
        groups,
        subnets,
        tables,
        gateways,
        nats,
        addresses,
    };
    let endpoint = target_group.as_ref().filter(|t| t.ours).and_then(|t| t.vpc.as_deref());
    let mut net = listed.sort_out(shared.settings.vpc.as_deref(), endpoint);
    net.given_gateway = given.into_iter().next().map(|g| g.id);
    net.balancer = balancer;
    net.target_group = target_group;
    Ok((net, ranges))
}

/// The ids of everything in it that can be too new to be listed.
pub(crate) fn listed(net: &Net) -> BTreeSet<&str> {
    let mut ids: BTreeSet<&str> = BTreeSet::new();
    ids.extend(net.vpc.iter().map(|v| v.id.as_str()));
    ids.extend(net.surplus.things().map(|(_, id)| id));
    ids.extend(net.groups.values().map(|g| g.id.as_str()));
    ids.extend(net.subnets.iter().map(|s| s.id.as_str()));
    ids.extend(net.tables.values().map(|t| t.id.as_str()));
    ids.extend(net.gateways.iter().map(|g| g.id.as_str()));
    ids.extend(net.nats.iter().map(|n| n.id.as_str()));
    ids.extend(net.addresses.iter().map(|a| a.id.as_str()));
    ids.extend(net.balancer.iter().map(|b| b.arn.as_str()));
    ids.extend(net.target_group.iter().map(|t| t.arn.as_str()));
    ids
}

/// The network as the trait has it; `None` where nothing of it is there. One without a load balancer has an endpoint that
/// nobody can reach yet, and is not complete.
pub(crate) fn network(shared: &Shared, net: &Net) -> Option<Network> {
    if net.is_empty() {
        return None;
    }
    let port = net
        .balancer
        .as_ref()
        .and_then(|b| b.listener)
        .unwrap_or(kprov_types::ports::API);
    Some(Network {
        cidr: net.range().unwrap_or_default(),
        endpoint: Endpoint {
            host: net.balancer.as_ref().map(|b| b.dns.clone()).unwrap_or_default(),
            port,
        },
        host_address: None,
        complete: layout::complete(net, &shared.settings, port),
    })
}
