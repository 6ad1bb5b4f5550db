//! What making something would take, in Azure's terms. Pure.

use std::collections::BTreeMap;

use kprov_provider::Estimate;
use kprov_types::machine::{DiskSpec, MachineSpec, NetworkSpec};

use crate::config::AzureConfig;
use crate::kind::{Kind, Names, data_disk};
use crate::seen::NetworkParts;
use crate::{sizes, translate};

/// A look at everything: each kind, the group, run-time states.
const LOOK: u64 = 10;
/// Making something: the request, one question how far it is, and the look at what came of it. Slow things are asked about more often.
const MAKE: u64 = 3;

/// The things that are missing, and about how many calls make them.
pub(crate) fn estimate(
    config: &AzureConfig,
    names: &Names,
    parts: &NetworkParts,
    network: Option<&NetworkSpec>,
    disks: &[DiskSpec],
    machines: &[MachineSpec],
) -> Estimate {
    let mut things = Vec::new();
    // The executor looks before it begins and after each of its actions, and each action looks at what it needs.
    let mut calls = LOOK;
    if let Some(want) = network {
        if parts.group_tags.is_empty() && config.resource_group.is_none() {
            things.push(format!("resource group `{}` in `{}`", names.group, config.location));
        }
        let range = parts
            .range(names)
            .or(want.cidr)
            .map_or("a free range".to_owned(), |r| r.to_string());
        let mut missing = vec![
            (Kind::SecurityGroup, names.security_group(), String::new()),
            (Kind::PublicIp, names.nat(), String::new()),
            (Kind::NatGateway, names.nat(), String::new()),
            (Kind::VirtualNetwork, names.virtual_network(), format!(" with {range}")),
        ];
        if !config.private {
            missing.push((Kind::PublicIp, names.api(), String::new()));
        }
        let side = if config.private { "inside" } else { "outside" };
        let balancer = format!(" for port {} from {side}", want.api_port);
        missing.push((Kind::LoadBalancer, names.api(), balancer));
        missing.retain(|(kind, name, _)| parts.find(*kind, name).is_none());
        // The network is read before and after, and its free range and zones looked up.
        calls += LOOK + 2 * 6 + 2 + MAKE * missing.len() as u64;
        things.extend(
            missing
                .into_iter()
                .map(|(kind, name, how)| format!("{} `{name}`{how}", kind.noun())),
        );
    }
    if !disks.is_empty() {
        calls += LOOK + 1 + MAKE * disks.len() as u64;
        let each = |d: &DiskSpec| {
            format!(
                "{} `{}` of {} GiB",
                Kind::Disk.noun(),
                data_disk(&d.machine),
                d.size_gib
            )
        };
        things.extend(disks.iter().map(each));
    }
    if !machines.is_empty() {
        calls += LOOK + 5;
        let mut alike: BTreeMap<_, u64> = BTreeMap::new();
        for spec in machines {
            let shape = (spec.role, spec.size.as_deref(), spec.image.as_deref());
            *alike.entry(shape).or_default() += 1;
        }
        for ((role, size, image), count) in alike {
            let public = translate::has_public_ip(config, role);
            let pieces = if public {
                "network interface and public IP address"
            } else {
                "network interface"
            };
            calls += count * MAKE * (2 + u64::from(public));
            let (size, image) = (size.unwrap_or(sizes::DEFAULT), image.unwrap_or("debian-12"));
            let machines = if count == 1 { "machine" } else { "machines" };
            things.push(format!(
                "{count} virtual {machines} `{size}` of `{image}` ({role}), each with {pieces}"
            ));
        }
    }
    Estimate { things, calls }
}
