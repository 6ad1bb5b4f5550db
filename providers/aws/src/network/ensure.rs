//! Makes what is missing of the network, one thing after the other: each call's result is what the next one needs.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use ipnet::Ipv4Net;
use kprov_provider::{Advice, ProviderError};
use kprov_types::ClusterName;
use kprov_types::machine::NetworkSpec;

use super::remove::done;
use super::{layout, look_with_ranges, surplus};
use crate::Shared;
use crate::error::while_reading;
use crate::model::{Balancer, NatState, Net, Part, Rule, Subnet, Vpc};
use crate::translate;

/// When to look again at what AWS is making.
const AGAIN: Duration = Duration::from_secs(2);

/// Ensures network and endpoint; returns what is there then.
pub(crate) async fn ensure(shared: &Shared, cluster: &ClusterName, want: &NetworkSpec) -> Result<Net, ProviderError> {
    let (net, used) = look_with_ranges(shared, cluster).await?;
    shared.ledger.check(cluster, &super::listed(&net))?;
    let mut work = Work { shared, cluster, net };
    work.check_names()?;
    surplus::drop_it(shared, cluster, &std::mem::take(&mut work.net.surplus)).await?;
    work.vpc(want, &used).await?;
    let vpc = work.net.vpc.clone().ok_or_else(|| gone("VPC"))?;
    let internet = work.internet_gateway(&vpc).await?;
    let range = work.groups(&vpc, want).await?;
    work.rules(range, want.api_port).await?;
    work.subnets(&vpc, range).await?;
    let outside = if shared.settings.private {
        work.table(&vpc, Part::Nat, &internet).await?;
        work.nat(&vpc).await?
    } else {
        internet
    };
    work.table(&vpc, Part::Machines, &outside).await?;
    work.endpoint(&vpc, want.api_port).await?;
    Ok(work.net)
}

fn gone(what: &str) -> ProviderError {
    ProviderError::retry_after(format!("the {what} is not there any more"), AGAIN)
}

struct Work<'a> {
    shared: &'a Shared,
    cluster: &'a ClusterName,
    net: Net,
}

impl Work<'_> {
    fn made(&self, id: &str) {
        self.shared.ledger.made(self.cluster, id);
    }

    /// Names are taken once for an account: what has the cluster's and not its tag is somebody else's.
    fn check_names(&self) -> Result<(), ProviderError> {
        let name = translate::balancer_name(self.cluster);
        let taken = |kind: &str| {
            Err(ProviderError::never(format!(
                "there is a {kind} `{name}` that kprov did not make for `{}`",
                self.cluster
            ))
            .hint("remove or rename it, or choose another name for the cluster"))
        };
        if let Some(Balancer { ours: false, .. }) = &self.net.balancer {
            return taken("load balancer");
        }
        if self.net.target_group.as_ref().is_some_and(|t| !t.ours) {
            return taken("target group");
        }
        if let Some(reason) = self.net.balancer.as_ref().and_then(|b| b.failed.as_ref()) {
            return Err(
                ProviderError::never(format!("the load balancer `{name}` has failed: {reason}"))
                    .hint("run `kprov down`, then `kprov up` again"),
            );
        }
        Ok(())
    }

    async fn vpc(&mut self, want: &NetworkSpec, used: &[Ipv4Net]) -> Result<(), ProviderError> {
        if let Some(vpc) = &self.net.vpc {
            return match want.cidr {
                Some(cidr) if vpc.ours && vpc.cidr != cidr => Err(other_range(vpc.cidr, cidr)),
                _ => Ok(()),
            };
        }
        if let Some(given) = &self.shared.settings.vpc {
            return Err(ProviderError::never(format!(
                "there is no VPC `{given}` in region `{}`",
                self.shared.client.region
            ))
            .hint("correct `spec.aws.vpc` or the region; leave `vpc` out to have one made"));
        }
        let range = want.cidr.or_else(|| layout::choose_range(used)).ok_or_else(|| {
            ProviderError::never("no range between 10.32.0.0/16 and 10.63.0.0/16 is free in this region")
                .hint("name one with `spec.network.machines`")
        })?;
        let id = self.shared.client.create_vpc(self.cluster, range).await?;
        self.made(&id);
        self.give_way(&id).await?;
        self.net.vpc = Some(Vpc {
            id,
            cidr: range,
            ours: true,
        });
        Ok(())
    }

    /// Where another `up` of the same cluster made a VPC at the same time, one of the two stays: the first by id, unless the other
    /// was there alone for a moment and is in use already. That shows when we look again.
    async fn give_way(&self, own: &str) -> Result<(), ProviderError> {
        let client = &self.shared.client;
        let vpcs = client.vpcs(self.cluster).await.map_err(while_reading)?;
        let others = || vpcs.iter().filter(|v| v.ours && v.id != own);
        if others().next().is_none() {
            return Ok(());
        }
        if others().any(|v| v.id.as_str() < own) {
            self.shared.ledger.removed(self.cluster, own);
            done(client.delete_vpc(own).await)?;
        }
        Err(ProviderError::wait(
            format!("another `up` of `{}` is making its network", self.cluster),
            AGAIN,
        ))
    }

    /// The internet gateway: the VPC's own where that is given, else one that is attached to ours.
    async fn internet_gateway(&mut self, vpc: &Vpc) -> Result<String, ProviderError> {
        let client = &self.shared.client;
        if !vpc.ours {
            return self.net.given_gateway.clone().ok_or_else(|| {
                ProviderError::never(format!("the VPC `{}` has no internet gateway", vpc.id))
                    .hint("attach one to it, or leave `spec.aws.vpc` out to have a VPC made")
            });
        }
        if let Some(attached) = self.net.gateways.iter().find(|g| g.vpc.as_deref() == Some(&vpc.id)) {
            return Ok(attached.id.clone());
        }
        let id = if let Some(free) = self.net.gateways.iter().find(|g| g.vpc.is_none()) {
            free.id.clone()
        } else {
            let id = client.create_gateway(self.cluster).await?;
            self.made(&id);
            id
        };
        match client.attach_gateway(&id, &vpc.id).await {
            Ok(()) => Ok(id),
            // It is attached, and the listing was too old to show it; or another one is, and this one is not needed.
            Err(error) if error.is_duplicate() => {
                let attached = client.gateways_of(&vpc.id).await.map_err(while_reading)?;
                let attached = attached.into_iter().next().ok_or_else(|| gone("internet gateway"))?.id;
                if attached != id {
                    self.shared.ledger.removed(self.cluster, &id);
                    done(client.delete_gateway(&id).await)?;
                }
                Ok(attached)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// The security groups, without their rules; and the cluster's range.
    async fn groups(&mut self, vpc: &Vpc, want: &NetworkSpec) -> Result<Ipv4Net, ProviderError> {
        let client = &self.shared.client;
        let range = match (self.net.range(), want.cidr) {
            (Some(there), Some(wanted)) if there != wanted => return Err(other_range(there, wanted)),
            (Some(there), _) => there,
            (None, Some(wanted)) => {
                if !(vpc.cidr.contains(&wanted)) {
                    return Err(ProviderError::never(format!(
                        "`{wanted}` is not inside the VPC `{}`, which has `{}`",
                        vpc.id, vpc.cidr
                    ))
                    .hint("choose a range inside it with `spec.network.machines`, or leave that out"));
                }
                wanted
            }
            (None, None) => {
                let used = client.ranges_in(&vpc.id).await?;
                layout::choose_inside(vpc.cidr, &used).ok_or_else(|| {
                    ProviderError::never(format!("the VPC `{}` has no free range of a /24 or more", vpc.id))
                        .hint("name a free range inside it with `spec.network.machines`")
                })?
            }
        };
        for part in [Part::Machines, Part::Api] {
            if self.net.groups.contains_key(&part) {
                continue;
            }
            let text = range.to_string();
            let more: &[(&str, &str)] = if part == Part::Machines {
                &[(translate::RANGE, &text), (translate::GENERATION, "0")]
            } else {
                &[]
            };
            let id = client.create_group(self.cluster, &vpc.id, part, more).await?;
            self.made(&id);
            let group = crate::model::Group {
                id,
                vpc: vpc.id.clone(),
                part,
                rules: BTreeSet::new(),
                foreign: false,
                range: Some(range).filter(|_| part == Part::Machines),
                generation: 0,
            };
            self.net.groups.insert(part, group);
        }
        Ok(range)
    }

    /// Makes the rules of each group what they should be.
    async fn rules(&mut self, range: Ipv4Net, port: u16) -> Result<(), ProviderError> {
        let client = &self.shared.client;
        let ids: BTreeMap<Part, String> = self.net.groups.iter().map(|(p, g)| (*p, g.id.clone())).collect();
        for (part, wanted) in layout::rules(&self.shared.settings, &ids, range, port) {
            let Some(group) = self.net.groups.get_mut(&part) else {
                continue;
            };
            if group.foreign {
                return Err(ProviderError::never(format!(
                    "the security group `{}` has rules that kprov did not make",
                    group.id
                ))
                .hint("remove them; rules of your own belong into a group of your own"));
            }
            let missing: BTreeSet<Rule> = wanted.difference(&group.rules).cloned().collect();
            let surplus: BTreeSet<Rule> = group.rules.difference(&wanted).cloned().collect();
            if !missing.is_empty() {
                client.allow(&group.id, &missing).await?;
            }
            if !surplus.is_empty() {
                client.revoke(&group.id, &surplus).await?;
            }
            group.rules = wanted;
        }
        Ok(())
    }

    async fn subnets(&mut self, vpc: &Vpc, range: Ipv4Net) -> Result<(), ProviderError> {
        let client = &self.shared.client;
        let zones = match &self.shared.settings.zones {
            zones if !zones.is_empty() => zones.clone(),
            // Once there is an endpoint all subnets were made.
            _ if self.net.balancer.is_some() => self.net.machine_subnets().keys().map(ToString::to_string).collect(),
            _ => client.zones().await?,
        };
        let missing = layout::missing_subnets(range, &zones, self.shared.settings.private, &self.net.subnets);
        for new in missing {
            let layout::NewSubnet { zone, range, part } = new;
            let id = client
                .create_subnet(self.cluster, &vpc.id, (&zone, range, part))
                .await
                .map_err(|e| not_made(e, vpc, &zone, &self.shared.client.region))?;
            self.made(&id);
            self.net.subnets.push(Subnet {
                id,
                vpc: vpc.id.clone(),
                zone,
                cidr: range,
                part,
            });
        }
        Ok(())
    }

    /// A route table with its default route, for all subnets of a part.
    async fn table(&mut self, vpc: &Vpc, part: Part, gateway: &str) -> Result<(), ProviderError> {
        let client = &self.shared.client;
        if !self.net.tables.contains_key(&part) {
            let token = translate::token(&vpc.id, self.generation(), &format!("table {part}"));
            let id = client.create_table(self.cluster, &vpc.id, part, token).await?;
            self.made(&id);
            let table = crate::model::Table {
                id,
                vpc: vpc.id.clone(),
                part,
                default: None,
                subnets: BTreeSet::new(),
            };
            self.net.tables.insert(part, table);
        }
        let table = self.net.tables.get_mut(&part).ok_or_else(|| gone("route table"))?;
        if table.default.as_deref() != Some(gateway) {
            match client.create_default_route(&table.id, gateway).await {
                Ok(()) => {}
                Err(error) if error.is_duplicate() => client.replace_default_route(&table.id, gateway).await?,
                Err(error) => return Err(error.into()),
            }
            table.default = Some(gateway.to_owned());
        }
        for subnet in self.net.subnets.iter().filter(|s| s.part == part) {
            if table.subnets.insert(subnet.id.clone()) {
                match client.associate(&table.id, &subnet.id).await {
                    Err(error) if !error.is_duplicate() => return Err(error.into()),
                    _ => {}
                }
            }
        }
        Ok(())
    }

    /// The NAT gateway, which takes AWS a minute or two to make.
    async fn nat(&mut self, vpc: &Vpc) -> Result<String, ProviderError> {
        let client = &self.shared.client;
        let is = |state| self.net.nats.iter().find(move |n| n.state == state);
        let waiting = || ProviderError::wait("the NAT gateway is being made", AGAIN);
        match (is(NatState::Available), is(NatState::Pending)) {
            // Where another `up` makes one as well, it is settled which stays once both are there.
            (_, Some(_)) => return Err(waiting()),
            (Some(nat), None) => return Ok(nat.id.clone()),
            (None, None) => {}
        }
        let subnet = self
            .net
            .subnets
            .iter()
            .find(|s| s.part == Part::Nat)
            .ok_or_else(|| {
                ProviderError::never("the range has no room for the NAT gateway's subnet")
                    .hint("choose a larger range with `spec.network.machines`")
            })?
            .id
            .clone();
        let address = if let Some(free) = self.net.addresses.iter().find(|a| !a.in_use) {
            free.id.clone()
        } else {
            let id = client.allocate_address(self.cluster).await?;
            self.made(&id);
            id
        };
        let token = translate::token(&vpc.id, self.generation(), &format!("nat {subnet} {address}"));
        let id = client.create_nat(self.cluster, &subnet, &address, token).await?;
        self.made(&id);
        Err(waiting())
    }

    /// The load balancer, its targets' group, and its listener, in that order: a listener means that all is done.
    async fn endpoint(&mut self, vpc: &Vpc, port: u16) -> Result<(), ProviderError> {
        let client = &self.shared.client;
        let group = if let Some(group) = &self.net.target_group {
            group.arn.clone()
        } else {
            let arn = client
                .create_target_group(self.cluster, &vpc.id, kprov_types::ports::API)
                .await?;
            self.made(&arn);
            self.net.target_group = Some(crate::model::TargetGroup {
                arn: arn.clone(),
                vpc: Some(vpc.id.clone()),
                ours: true,
                targets: BTreeSet::new(),
            });
            arn
        };
        if self.net.balancer.is_none() {
            let subnets = self.net.machine_subnets().values().map(|s| s.id.clone()).collect();
            let api = self.net.groups.get(&Part::Api).ok_or_else(|| gone("security group"))?;
            let internal = self.shared.settings.private;
            let mut made = client.create_balancer(self.cluster, internal, subnets, &api.id).await?;
            self.made(&made.arn);
            made.ours = true;
            self.net.balancer = Some(made);
        }
        let balancer = self.net.balancer.as_mut().ok_or_else(|| gone("load balancer"))?;
        if balancer.listener != Some(port) {
            client.balance_across_zones(&balancer.arn).await?;
            match client.create_listener(&balancer.arn, &group, port).await {
                Err(error) if !error.is_duplicate() => return Err(error.into()),
                _ => balancer.listener = Some(port),
            }
        }
        Ok(())
    }

    fn generation(&self) -> u32 {
        self.net.groups.get(&Part::Machines).map_or(0, |g| g.generation)
    }
}

fn other_range(there: Ipv4Net, wanted: Ipv4Net) -> ProviderError {
    ProviderError::never(format!(
        "the cluster's network is `{there}`, not `{wanted}`; the range of a network can't be changed"
    ))
    .hint("leave `spec.network.machines` as it was, or make a cluster of another name")
}

/// A zone that is not there has an error of its own; and in a VPC of the cluster's own nothing but another `up` can be in the
/// way of a subnet.
fn not_made(mut error: ProviderError, vpc: &Vpc, zone: &str, region: &str) -> ProviderError {
    let conflict = error
        .source
        .as_ref()
        .is_some_and(|s| s.to_string().contains("InvalidSubnet.Conflict"));
    if vpc.ours && conflict {
        error.advice = Advice::RetryAfter(AGAIN);
        return error;
    }
    let about_zone = error.source.as_ref().is_some_and(|s| {
        s.to_string().to_lowercase().contains("availabilityzone") || s.to_string().contains("Availability Zone")
    });
    if !about_zone {
        return error;
    }
    let ProviderError { source, .. } = error;
    let mut better = ProviderError::never(format!("there is no availability zone `{zone}` in region `{region}`"))
        .hint("correct `spec.zones`; `aws ec2 describe-availability-zones` lists them");
    better.source = source;
    better
}
