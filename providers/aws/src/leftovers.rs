//! What still carries a cluster's tag, listed afresh.

use std::collections::BTreeMap;

use kprov_provider::ProviderError;
use kprov_types::ClusterName;
use kprov_types::machine::Leftover;

use crate::error::while_reading;
use crate::model::InstanceState;
use crate::{Shared, network};

/// How ids begin whose kind's own listing is believed, not their tags: those outlive the thing for a while. By id, as EC2 and what
/// stands in for it don't call kinds by the same names.
const LISTED: &[&str] = &[
    "i-",
    "vol-",
    "vpc-",
    "subnet-",
    "sg-",
    "rtb-",
    "igw-",
    "nat-",
    "eipalloc-",
];

/// Lists everything that carries the tag.
pub(crate) async fn list(shared: &Shared, cluster: &ClusterName) -> Result<Vec<Leftover>, ProviderError> {
    let client = &shared.client;
    let (net, instances, volumes, tagged) = futures::try_join!(
        network::look(shared, cluster),
        async { client.instances(cluster).await.map_err(while_reading) },
        async { client.volumes(cluster).await.map_err(while_reading) },
        async { client.tagged(cluster).await.map_err(while_reading) },
    )?;
    let mut left: BTreeMap<(String, String), Option<String>> = BTreeMap::new();
    let mut add = |kind: &str, id: &str, why: Option<String>| {
        left.insert((kind.to_owned(), id.to_owned()), why);
    };
    for instance in instances.iter().filter(|i| i.state != InstanceState::Terminated) {
        let why = (instance.state == InstanceState::ShuttingDown).then(|| "it is being terminated".to_owned());
        add("instance", &instance.id, why);
    }
    for volume in &volumes {
        let why = volume
            .attachment
            .as_ref()
            .map(|a| format!("it is attached to `{}`", a.instance));
        add("volume", &volume.id, why);
    }
    for (kind, id) in net.surplus.things() {
        add(kind, id, None);
    }
    if let Some(vpc) = net.vpc.as_ref().filter(|v| v.ours) {
        add("vpc", &vpc.id, None);
    }
    for subnet in &net.subnets {
        add("subnet", &subnet.id, None);
    }
    for group in net.groups.values() {
        add("security-group", &group.id, None);
    }
    for table in net.tables.values() {
        add("route-table", &table.id, None);
    }
    for gateway in &net.gateways {
        add("internet-gateway", &gateway.id, None);
    }
    for nat in &net.nats {
        add("natgateway", &nat.id, None);
    }
    for address in &net.addresses {
        let why = address.in_use.then(|| "it is in use".to_owned());
        add("elastic-ip", &address.id, why);
    }
    if let Some(balancer) = net.balancer.as_ref().filter(|b| b.ours) {
        add("load balancer", &balancer.arn, None);
    }
    if let Some(group) = net.target_group.as_ref().filter(|t| t.ours) {
        add("target group", &group.arn, None);
    }
    for (kind, id) in &tagged {
        if !LISTED.iter().any(|begin| id.starts_with(begin)) {
            add(kind, id, None);
        }
    }
    // Root disks go with their instances. One that stayed has the tag, and names no machine.
    let roots = tagged.iter().map(|(_, id)| id).filter(|id| id.starts_with("vol-"));
    let ended = instances.iter().all(|i| i.state == InstanceState::Terminated);
    for id in roots.filter(|id| ended && !volumes.iter().any(|v| v.id == **id)) {
        if client.volume_exists(id).await.map_err(while_reading)? {
            add("volume", id, Some("it was an instance's root disk".to_owned()));
        }
    }
    Ok(left
        .into_iter()
        .map(|((kind, name), why)| Leftover { kind, name, why })
        .collect())
}
