//! Calls of `RunInstances`: which machines go into one, in which zone, and what when that zone is full.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::time::Duration;

use aws_sdk_ec2::types as ec2;
use ipnet::Ipv4Net;
use kprov_provider::ProviderError;
use kprov_types::machine::{DiskSpec, MachineSpec};
use kprov_types::{ClusterName, MachineName, Role};

use crate::Shared;
use crate::catalog::{self, Catalog};
use crate::client::tags;
use crate::config::InstanceProfile;
use crate::disks;
use crate::error::{CallError, failed};
use crate::machines::{Seen, by_name, generation};
use crate::model::{Image, Instance, InstanceState, Net, Part, Volume};
use crate::series::Series;
use crate::spread::Spread;
use crate::translate::{self, MACHINE, NAME, ROLE};
use crate::user_data::{self, Facts};

/// How often a token may turn out to be that of an instance that is gone.
const GENERATIONS: u32 = 8;
/// For so long after its start a process may meet what an earlier one made and no listing shows.
const UNSEEN: Duration = Duration::from_secs(30);

/// One call of `RunInstances`.
#[derive(Clone, Debug)]
pub(crate) struct Launch {
    pub(crate) series: Series,
    /// What the machines have in common.
    pub(crate) spec: MachineSpec,
    /// Zones to try, the best one first.
    zones: Vec<String>,
    /// The data volume, of a single machine.
    volume: Option<Volume>,
}

/// What came of it.
#[derive(Debug, Default)]
pub(crate) struct Made {
    pub(crate) instances: Vec<Instance>,
    /// A volume that was made anew, as its zone was full.
    pub(crate) volume: Option<Volume>,
}

/// Groups machines into calls. Those with equal first-boot data, size, image and zone are made together; one with a data
/// volume goes by itself into its volume's zone. Pure.
pub(crate) fn plan(
    net: &Net,
    volumes: &[Volume],
    instances: &[Instance],
    missing: &[&MachineSpec],
) -> Result<Vec<Launch>, ProviderError> {
    if missing.is_empty() {
        return Ok(Vec::new());
    }
    let subnets = net.machine_subnets();
    if subnets.is_empty() {
        return Err(disks::no_subnets());
    }
    let mut launches = Vec::new();
    let mut spreads = BTreeMap::new();
    let mut together: Vec<(MachineSpec, String, Vec<MachineName>)> = Vec::new();
    for spec in missing {
        let spread = spreads.entry(spec.role).or_insert_with(|| {
            let there = instances
                .iter()
                .filter(|i| i.role == spec.role && i.state != InstanceState::Terminated)
                .filter_map(|i| i.zone.as_deref());
            Spread::new(subnets.keys().copied(), there)
        });
        let volume = volumes.iter().find(|v| v.machine == spec.name);
        let fixed = volume.map(|v| v.zone.clone()).or_else(|| spec.zone.clone());
        if let Some(zone) = &fixed {
            if !subnets.contains_key(zone.as_str()) {
                return Err(ProviderError::never(format!(
                    "machine `{}` belongs into zone `{zone}`, where the cluster has no subnet",
                    spec.name
                ))
                .hint("add the zone to `spec.zones` and run `kprov up` again"));
            }
            spread.count(zone);
        }
        let zone = fixed.or_else(|| spread.next()).ok_or_else(disks::no_subnets)?;
        if volume.is_some() || spec.data_disk {
            launches.push(Launch {
                series: Series::single(&spec.name),
                zones: zones_from(&zone, spec, volume, &subnets.keys().copied().collect::<Vec<_>>()),
                spec: (*spec).clone(),
                volume: volume.cloned(),
            });
            continue;
        }
        let same = together
            .iter_mut()
            .find(|(other, at, _)| *at == zone && alike(other, spec));
        match same {
            Some((.., names)) => names.push(spec.name.clone()),
            None => together.push(((*spec).clone(), zone, vec![spec.name.clone()])),
        }
    }
    for (spec, zone, names) in together {
        let zones = zones_from(&zone, &spec, None, &subnets.keys().copied().collect::<Vec<_>>());
        launches.extend(Series::of(&names).into_iter().map(|series| Launch {
            series,
            spec: spec.clone(),
            zones: zones.clone(),
            volume: None,
        }));
    }
    Ok(launches)
}

fn alike(a: &MachineSpec, b: &MachineSpec) -> bool {
    (a.role, &a.size, &a.image, &a.zone, &a.first_boot) == (b.role, &b.size, &b.image, &b.zone, &b.first_boot)
}

/// The zones to try: a machine that was asked for in a zone, or whose volume holds data, has but one.
fn zones_from(first: &str, spec: &MachineSpec, volume: Option<&Volume>, all: &[&str]) -> Vec<String> {
    let mut zones = vec![first.to_owned()];
    if spec.zone.is_none() && volume.is_none_or(|v| !v.used) {
        zones.extend(all.iter().filter(|z| **z != first).map(ToString::to_string));
    }
    zones
}

/// Starts the instances of one launch, in the first of its zones that has capacity.
pub(crate) async fn carry_out(
    shared: &Shared,
    cluster: &ClusterName,
    seen: &Seen,
    catalog: &Catalog,
    launch: Launch,
) -> Result<Made, ProviderError> {
    let Launch {
        series,
        spec,
        zones,
        volume,
    } = launch;
    let size = catalog::size(&spec);
    let image = catalog
        .image(&spec)
        .ok_or_else(|| ProviderError::never(format!("no image for `{series}`")))?;
    let mut made = Made::default();
    let mut full: Option<CallError> = None;
    let full_before = shared.full_zones_of(size);
    let (open, known_full): (Vec<&String>, Vec<&String>) = zones.iter().partition(|z| !full_before.contains(*z));
    for zone in open.into_iter().chain(known_full) {
        let mut volume = volume.clone();
        if let Some(there) = &volume
            && there.zone != *zone
        {
            let moved = move_volume(shared, cluster, &seen.net, there, zone).await?;
            made.volume = Some(moved.clone());
            volume = Some(moved);
        }
        let call = Call {
            shared,
            cluster,
            seen,
            series: &series,
            spec: &spec,
            image,
            zone,
            volume: volume.as_ref(),
        };
        match call.run().await {
            Ok(instances) => {
                for instance in &instances {
                    shared.ledger.made(cluster, &instance.id);
                    shared.mark_launched(&instance.id);
                }
                made.instances = instances;
                return Ok(made);
            }
            Err(Refused::Capacity(error)) => {
                shared.mark_full(zone, size);
                full = Some(error);
            }
            Err(Refused::Otherwise(error)) => return Err(error),
        }
    }
    Err(no_capacity(&series, size, &zones, full))
}

fn no_capacity(series: &Series, size: &str, zones: &[String], error: Option<CallError>) -> ProviderError {
    let list = zones.join("`, `");
    let place = if zones.len() == 1 { "zone" } else { "any of the zones" };
    let message = format!("can't start `{series}`: AWS has no capacity for `{size}` in {place} `{list}`");
    let hint = "choose another size (`size`), other zones (`spec.zones`), or try again later";
    let found = ProviderError::never(message).hint(hint);
    match error.map(ProviderError::from).and_then(|e| e.source) {
        Some(source) => found.caused_by(source),
        None => found,
    }
}

/// A volume that nothing was ever written to, made anew in another zone.
async fn move_volume(
    shared: &Shared,
    cluster: &ClusterName,
    net: &Net,
    volume: &Volume,
    zone: &str,
) -> Result<Volume, ProviderError> {
    shared.ledger.removed(cluster, &volume.id);
    match shared.client.delete_volume(&volume.id).await {
        Err(error) if !error.is_not_found() => return Err(error.into()),
        _ => {}
    }
    let disk = DiskSpec {
        machine: volume.machine.clone(),
        size_gib: volume.size.unwrap_or(1),
    };
    disks::create(shared, cluster, net, &disk, zone.to_owned()).await
}

enum Refused {
    Capacity(CallError),
    Otherwise(ProviderError),
}

struct Call<'a> {
    shared: &'a Shared,
    cluster: &'a ClusterName,
    seen: &'a Seen,
    series: &'a Series,
    spec: &'a MachineSpec,
    image: &'a Image,
    zone: &'a str,
    volume: Option<&'a Volume>,
}

impl Call<'_> {
    /// Runs the call with the first client token that was not used for an instance that is gone.
    async fn run(&self) -> Result<Vec<Instance>, Refused> {
        let (life, generation) = generation(&self.seen.net).map_err(Refused::Otherwise)?;
        let names = self.series.names();
        let gone = self
            .seen
            .instances
            .iter()
            .filter(|i| i.state == InstanceState::Terminated && names.contains(&i.name))
            .count();
        for attempt in 0..GENERATIONS {
            let thing = format!("instances {} {} {gone} {attempt}", self.series, self.zone);
            let token = translate::token(life, generation, &thing);
            let error = match self.once(token).await? {
                Ok(instances) => return Ok(instances),
                Err(error) => error,
            };
            match error.code() {
                Some("IdempotentInstanceTerminated") => {}
                // Made with other first-boot data: by a run that ended just before this one and that no listing shows
                // yet, or long ago.
                Some("IdempotentParameterMismatch") if self.shared.opened.elapsed() > UNSEEN => {}
                Some("IdempotentParameterMismatch") => {
                    return Err(Refused::Otherwise(ProviderError::wait(
                        format!("`{}` was started by another run, and is not listed yet", self.series),
                        Duration::from_secs(3),
                    )));
                }
                _ if error.is_capacity() => return Err(Refused::Capacity(error)),
                _ => return Err(Refused::Otherwise(error.into())),
            }
        }
        Err(Refused::Otherwise(ProviderError::never(format!(
            "`{}` was started and removed too often",
            self.series
        ))))
    }

    async fn once(&self, token: String) -> Result<Result<Vec<Instance>, CallError>, Refused> {
        let Self {
            shared,
            cluster,
            seen,
            series,
            spec,
            image,
            zone,
            volume,
        } = self;
        let settings = &shared.settings;
        let missing = || Refused::Otherwise(disks::no_subnets());
        let subnets = seen.net.machine_subnets();
        let subnet = subnets.get(*zone).ok_or_else(missing)?;
        let group = seen.net.groups.get(&Part::Machines).ok_or_else(missing)?;
        let address = volume.and_then(|v| v.address).filter(|a| subnet.cidr.contains(a));
        let facts = Facts {
            volume: volume.map(|v| v.id.clone()),
            hosts: hosts(shared, seen, spec.role),
            ignition: image.ignition,
        };
        let data = user_data::compose(series, &spec.first_boot.0, &facts).map_err(Refused::Otherwise)?;
        let name = series.to_string();
        let own = [(MACHINE, name.as_str()), (NAME, &name), (ROLE, spec.role.as_str())];
        // At least one: where a zone has room for some, the others are made by the next round, in other zones.
        let call = shared
            .client
            .ec2
            .run_instances()
            .client_token(token)
            .min_count(1)
            .max_count(i32::try_from(series.count()).unwrap_or(1))
            .image_id(&image.id)
            .instance_type(ec2::InstanceType::from(catalog::size(spec)))
            .user_data(data)
            .network_interfaces(
                ec2::InstanceNetworkInterfaceSpecification::builder()
                    .device_index(0)
                    .subnet_id(&subnet.id)
                    .set_private_ip_address(address.map(|a| a.to_string()))
                    .groups(&group.id)
                    .associate_public_ip_address(!settings.private)
                    .delete_on_termination(true)
                    .build(),
            )
            .block_device_mappings(root_disk(image, settings.root_disk_gib))
            .metadata_options(
                ec2::InstanceMetadataOptionsRequest::builder()
                    .http_tokens(ec2::HttpTokensState::Required)
                    .http_endpoint(ec2::InstanceMetadataEndpointState::Enabled)
                    .http_put_response_hop_limit(1)
                    .build(),
            )
            .disable_api_termination(settings.termination_protection)
            .set_iam_instance_profile(settings.instance_profile.as_ref().map(profile))
            .tag_specifications(tags(ec2::ResourceType::Instance, cluster, &own))
            .tag_specifications(tags(ec2::ResourceType::Volume, cluster, &[(NAME, &name)]));
        let what = format!("start `{series}` in zone `{zone}`");
        Ok(match call.send().await.map_err(failed("RunInstances", what)) {
            Ok(reply) => Ok(reply.instances().iter().filter_map(translate::instance).collect()),
            Err(error) => Err(error),
        })
    }
}

/// Where the load balancer lets only some in, machines with public addresses are not among them: they would come from the
/// internet, each with an address that nobody knows beforehand. Workers are told the control-plane machines' own addresses
/// for the load balancer's name instead.
fn hosts(shared: &Shared, seen: &Seen, role: Role) -> Vec<(Ipv4Addr, String)> {
    let settings = &shared.settings;
    if role == Role::ControlPlane || settings.private || settings.access.contains(&Ipv4Net::default()) {
        return Vec::new();
    }
    let Some(balancer) = &seen.net.balancer else {
        return Vec::new();
    };
    let mut addresses: Vec<Ipv4Addr> = by_name(&seen.instances)
        .into_values()
        .filter(|i| i.role == Role::ControlPlane)
        .filter_map(|i| i.address)
        .collect();
    addresses.sort_unstable();
    addresses.into_iter().map(|a| (a, balancer.dns.clone())).collect()
}

fn root_disk(image: &Image, gib: i32) -> ec2::BlockDeviceMapping {
    let disk = ec2::EbsBlockDevice::builder()
        .volume_type(ec2::VolumeType::Gp3)
        .volume_size(gib.max(image.root_gib))
        .encrypted(true)
        .delete_on_termination(true)
        .build();
    ec2::BlockDeviceMapping::builder()
        .device_name(&image.root_device)
        .ebs(disk)
        .build()
}

fn profile(profile: &InstanceProfile) -> ec2::IamInstanceProfileSpecification {
    let builder = ec2::IamInstanceProfileSpecification::builder();
    match profile {
        InstanceProfile::Name(name) => builder.name(name),
        InstanceProfile::Arn(arn) => builder.arn(arn),
    }
    .build()
}

#[cfg(test)]
mod tests;
