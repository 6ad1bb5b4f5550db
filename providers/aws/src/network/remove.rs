//! Removes the network and the endpoint, in the order in which one thing needs the other.

use std::collections::BTreeSet;
use std::time::Duration;

use kprov_provider::ProviderError;
use kprov_types::ClusterName;

use super::{look, surplus};
use crate::Shared;
use crate::error::{CallError, while_reading};
use crate::model::{Gateway, Group, Nat, NatState, Net, Part, Rule, Source};

/// When to look again at what AWS is removing.
const AGAIN: Duration = Duration::from_secs(2);

/// Gone already is as good.
pub(super) fn done(result: Result<(), CallError>) -> Result<(), CallError> {
    match result {
        Err(error) if error.is_not_found() => Ok(()),
        other => other,
    }
}

/// Removes all that carries the cluster's tag. A VPC that was given stays, and so does whatever else is not the cluster's.
pub(crate) async fn remove(shared: &Shared, cluster: &ClusterName) -> Result<(), ProviderError> {
    let net = look(shared, cluster).await?;
    let client = &shared.client;
    for id in super::listed(&net) {
        shared.ledger.removed(cluster, id);
    }
    surplus::drop_it(shared, cluster, &net.surplus).await?;
    if let Some(balancer) = net.balancer.as_ref().filter(|b| b.ours) {
        done(client.delete_balancer(&balancer.arn).await)?;
    }
    if let Some(group) = net.target_group.as_ref().filter(|t| t.ours) {
        done(client.delete_target_group(&group.arn).await)?;
    }
    delete_nats(shared, &net.nats).await?;
    for address in &net.addresses {
        done(client.release_address(&address.id).await)?;
    }
    let held = holding(shared, cluster, &net, groups_and_subnets(shared, &net).await).await;
    held?;
    for gateway in &net.gateways {
        delete_gateway(shared, gateway).await?;
    }
    // The group of the machines goes last, as it tells the range.
    if let Some(group) = net.groups.get(&Part::Machines) {
        holding(shared, cluster, &net, done(client.delete_group(&group.id).await)).await?;
    }
    if let Some(vpc) = net.vpc.as_ref().filter(|v| v.ours) {
        holding(shared, cluster, &net, done(client.delete_vpc(&vpc.id).await)).await?;
    }
    Ok(())
}

pub(super) async fn delete_gateway(shared: &Shared, gateway: &Gateway) -> Result<(), CallError> {
    let client = &shared.client;
    if let Some(vpc) = &gateway.vpc {
        match client.detach_gateway(&gateway.id, vpc).await {
            Err(error) if error.code() != Some("Gateway.NotAttached") => done(Err(error))?,
            _ => {}
        }
    }
    done(client.delete_gateway(&gateway.id).await)
}

/// Deletes them, or says that they are on their way.
pub(super) async fn delete_nats(shared: &Shared, nats: &[Nat]) -> Result<(), ProviderError> {
    for nat in nats {
        if nat.state != NatState::Deleting {
            done(shared.client.delete_nat(&nat.id).await)?;
        }
    }
    // Its address and subnet are its own until it's gone; one that failed never had them.
    if nats.iter().any(|n| n.state != NatState::Failed) {
        return Err(ProviderError::wait("the NAT gateway is being removed", AGAIN));
    }
    Ok(())
}

async fn groups_and_subnets(shared: &Shared, net: &Net) -> Result<(), CallError> {
    let client = &shared.client;
    if let Some(api) = net.groups.get(&Part::Api) {
        if let Some(machines) = net.groups.get(&Part::Machines) {
            revoke_naming(shared, machines, &api.id).await?;
        }
        done(client.delete_group(&api.id).await)?;
    }
    for subnet in &net.subnets {
        done(client.delete_subnet(&subnet.id).await)?;
    }
    for table in net.tables.values() {
        done(client.delete_table(&table.id).await)?;
    }
    Ok(())
}

/// Takes the rules that name `other` from a group: none that is named can be deleted.
async fn revoke_naming(shared: &Shared, group: &Group, other: &str) -> Result<(), CallError> {
    let names = |rule: &&Rule| matches!(&rule.from, Source::Group(id) if id == other);
    let naming: BTreeSet<Rule> = group.rules.iter().filter(names).cloned().collect();
    if naming.is_empty() {
        return Ok(());
    }
    done(shared.client.revoke(&group.id, &naming).await)
}

/// Deletes groups whose rules may name each other.
pub(super) async fn delete_groups(shared: &Shared, groups: &[Group]) -> Result<(), CallError> {
    for group in groups {
        for other in groups.iter().filter(|other| other.id != group.id) {
            revoke_naming(shared, group, &other.id).await?;
        }
    }
    for group in groups {
        done(shared.client.delete_group(&group.id).await)?;
    }
    Ok(())
}

/// Says what holds a thing that can't be removed: the cluster's own things go in their time, what somebody else put there
/// doesn't.
async fn holding(
    shared: &Shared,
    cluster: &ClusterName,
    net: &Net,
    result: Result<(), CallError>,
) -> Result<(), ProviderError> {
    let error = match result {
        Ok(()) => return Ok(()),
        Err(error) => error,
    };
    if error.code() != Some("DependencyViolation") {
        return Err(error.into());
    }
    let ours: Vec<&String> = net.vpc.iter().filter(|v| v.ours).map(|v| &v.id).collect();
    for vpc in ours {
        let (interfaces, instances) =
            futures::try_join!(shared.client.interfaces(vpc), shared.client.instances(cluster))
                .map_err(while_reading)?;
        let own: BTreeSet<&str> = instances.iter().map(|i| i.id.as_str()).collect();
        let foreign = interfaces
            .into_iter()
            .find(|(_, _, instance)| instance.as_ref().is_none_or(|i| !own.contains(i.as_str())));
        if let Some((interface, words, instance)) = foreign {
            let of = instance.map(|i| format!(" of `{i}`")).unwrap_or_default();
            return Err(ProviderError::never(format!(
                "can't {}: the network interface `{interface}`{of} is in it, which kprov did not make{}",
                error.what,
                if words.is_empty() {
                    String::new()
                } else {
                    format!(" ({words})")
                },
            ))
            .hint("remove it, then run `kprov down` again"));
        }
    }
    Err(error.into())
}
