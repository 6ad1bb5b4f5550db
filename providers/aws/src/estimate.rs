//! What making a cluster would take. Pure, but for what it is given.

use kprov_provider::{Estimate, ProviderError};
use kprov_types::machine::{DiskSpec, MachineSpec, NetworkSpec};
use kprov_types::{ClusterName, Role};

use crate::config::Settings;
use crate::launch::Launch;
use crate::model::Net;
use crate::network::layout;
use crate::{catalog, launch, translate};

/// What one look at everything takes.
const LOOK: u64 = 15;
/// How often the executor looks while it works.
const LOOKS: u64 = 6;

/// The things that are missing, and the calls that make them.
pub(crate) fn estimate(
    settings: &Settings,
    cluster: &ClusterName,
    net: &Net,
    zones: &[String],
    (network, disks, machines): (Option<&NetworkSpec>, &[DiskSpec], &[MachineSpec]),
) -> Result<Estimate, ProviderError> {
    let mut things = Vec::new();
    let mut calls = 0_u64;
    let mut add = |thing: String, cost: u64| {
        things.push(thing);
        calls += cost;
    };
    let mut laid_out = net.clone();
    if let Some(want) = network {
        let range = net.range().or(want.cidr);
        let shown = range.map_or("a free range".to_owned(), |r| r.to_string());
        if net.vpc.is_none() && settings.vpc.is_none() {
            add(format!("VPC with {shown}"), 1);
            add("internet gateway".to_owned(), 2);
        }
        let new = layout::missing_subnets(range.unwrap_or_default(), zones, settings.private, &net.subnets);
        for subnet in new {
            add(format!("subnet for {} in `{}`", subnet.part, subnet.zone), 2);
            laid_out.subnets.push(crate::model::Subnet {
                id: String::new(),
                vpc: String::new(),
                zone: subnet.zone,
                cidr: subnet.range,
                part: subnet.part,
            });
        }
        for _ in net.tables.len()..if settings.private { 2 } else { 1 } {
            add("route table".to_owned(), 2);
        }
        for _ in net.groups.len()..2 {
            add("security group".to_owned(), 2);
        }
        if settings.private && net.nats.is_empty() {
            add("NAT gateway with a public address".to_owned(), 2);
        }
        if net.target_group.is_none() {
            add("target group with health checks of `/readyz`".to_owned(), 1);
        }
        if net.balancer.is_none() {
            let kind = if settings.private {
                "internal"
            } else {
                "internet-facing"
            };
            let name = translate::balancer_name(cluster);
            add(
                format!("{kind} network load balancer `{name}` for port {}", want.api_port),
                3,
            );
        }
    }
    for disk in disks {
        add(
            format!("encrypted gp3 volume of {} GiB for `{}`", disk.size_gib, disk.machine),
            1,
        );
    }
    let missing: Vec<&MachineSpec> = machines.iter().collect();
    for Launch { series, spec, .. } in launch::plan(&laid_out, &[], &[], &missing)? {
        let image = spec.image.as_deref().unwrap_or("debian-12");
        let size = catalog::size(&spec);
        let cost = if spec.role == Role::ControlPlane { 2 } else { 1 };
        add(
            format!("{} `{size}` of `{image}`: `{series}`", plural(series.count())),
            cost,
        );
    }
    if things.is_empty() {
        return Ok(Estimate { things, calls: LOOK });
    }
    // Types, images, tags of volumes, targets.
    let extra = if machines.is_empty() { 0 } else { 4 };
    Ok(Estimate {
        things,
        calls: calls + extra + LOOK * LOOKS,
    })
}

fn plural(count: u32) -> String {
    if count == 1 {
        "1 instance".to_owned()
    } else {
        format!("{count} instances")
    }
}
