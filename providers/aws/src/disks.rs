//! Data volumes: one for each control-plane machine, in that machine's zone, kept when the machine goes.

use std::collections::BTreeMap;
use std::time::Duration;

use aws_sdk_ec2::types as ec2;
use kprov_provider::ProviderError;
use kprov_types::machine::DiskSpec;
use kprov_types::{ClusterName, MachineName};

use crate::Shared;
use crate::client::{id, tags};
use crate::error::{failed, while_reading};
use crate::machines::generation;
use crate::model::{Instance, InstanceState, Net, Volume};
use crate::translate::{self, MACHINE, NAME};
use crate::{network, spread};

/// When to look again at volumes that are being detached.
const AGAIN: Duration = Duration::from_secs(2);

/// Ensures a volume for each disk, and returns those of the disks asked for.
pub(crate) async fn ensure(
    shared: &Shared,
    cluster: &ClusterName,
    want: &[DiskSpec],
) -> Result<Vec<Volume>, ProviderError> {
    let look = async { shared.client.volumes(cluster).await.map_err(while_reading) };
    let instances = async { shared.client.instances(cluster).await.map_err(while_reading) };
    let (net, mut volumes, instances) = futures::try_join!(network::look(shared, cluster), look, instances)?;
    shared.check_listed(cluster, &net, &instances, &volumes)?;
    let missing: Vec<&DiskSpec> = want
        .iter()
        .filter(|d| !volumes.iter().any(|v| v.machine == d.machine))
        .collect();
    if !missing.is_empty() {
        let zones = zones(&net, &shared.full_zones(), &volumes, &instances, &missing)?;
        for disk in missing {
            let zone = zones.get(&disk.machine).cloned().unwrap_or_default();
            let volume = create(shared, cluster, &net, disk, zone).await?;
            volumes.push(volume);
        }
    }
    volumes.retain(|v| want.iter().any(|d| d.machine == v.machine));
    Ok(volumes)
}

/// The zone of each new volume: its machine's, or else the one with the fewest.
fn zones(
    net: &Net,
    full: &[String],
    volumes: &[Volume],
    instances: &[Instance],
    missing: &[&DiskSpec],
) -> Result<BTreeMap<MachineName, String>, ProviderError> {
    let mut open: Vec<&str> = net.machine_subnets().into_keys().collect();
    if open.iter().any(|z| !full.iter().any(|f| f == z)) {
        open.retain(|z| !full.iter().any(|f| f == z));
    }
    let mut spread = spread::Spread::new(open, volumes.iter().map(|v| v.zone.as_str()));
    let mut names: Vec<&MachineName> = missing.iter().map(|d| &d.machine).collect();
    names.sort_unstable();
    names
        .into_iter()
        .map(|name| {
            let own = instances
                .iter()
                .find(|i| i.name == *name && i.state != InstanceState::Terminated)
                .and_then(|i| i.zone.clone());
            let zone = own.or_else(|| spread.next()).ok_or_else(no_subnets)?;
            Ok((name.clone(), zone))
        })
        .collect()
}

pub(crate) fn no_subnets() -> ProviderError {
    ProviderError::never("the cluster's network has no subnet for machines").hint("run `kprov up`, which makes it")
}

pub(crate) async fn create(
    shared: &Shared,
    cluster: &ClusterName,
    net: &Net,
    disk: &DiskSpec,
    zone: String,
) -> Result<Volume, ProviderError> {
    let (life, generation) = generation(net)?;
    let machine = &disk.machine;
    let name = format!("{machine}-data");
    let reply = shared
        .client
        .ec2
        .create_volume()
        .availability_zone(&zone)
        .size(i32::try_from(disk.size_gib).unwrap_or(i32::MAX))
        .volume_type(ec2::VolumeType::Gp3)
        .encrypted(true)
        .client_token(translate::token(life, generation, &format!("volume {machine} {zone}")))
        .tag_specifications(tags(
            ec2::ResourceType::Volume,
            cluster,
            &[(MACHINE, machine.as_str()), (NAME, &name)],
        ))
        .send()
        .await
        .map_err(failed(
            "CreateVolume",
            format!("make the data volume of `{machine}` in `{zone}`"),
        ))?;
    let id = id("CreateVolume", reply.volume_id)?;
    shared.ledger.made(cluster, &id);
    Ok(Volume {
        id,
        machine: machine.clone(),
        size: Some(disk.size_gib),
        zone,
        attachment: None,
        used: false,
        address: None,
    })
}

/// Removes the volumes of these machines, and what is on them.
pub(crate) async fn remove(
    shared: &Shared,
    cluster: &ClusterName,
    machines: &[MachineName],
) -> Result<(), ProviderError> {
    let volumes = shared.client.volumes(cluster).await.map_err(while_reading)?;
    let going: Vec<&Volume> = volumes.iter().filter(|v| machines.contains(&v.machine)).collect();
    if going.is_empty() {
        return Ok(());
    }
    crate::machines::next_generation(shared, cluster).await?;
    for volume in &going {
        shared.ledger.removed(cluster, &volume.id);
        match shared.client.delete_volume(&volume.id).await {
            Err(error) if error.is_not_found() => {}
            Err(error) if error.code() == Some("VolumeInUse") => {
                let machine = &volume.machine;
                return Err(ProviderError::wait(
                    format!("the data volume of `{machine}` is still attached"),
                    AGAIN,
                ));
            }
            Err(error) => return Err(error.into()),
            Ok(()) => {}
        }
    }
    Ok(())
}
