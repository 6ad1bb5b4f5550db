//! Machines as instances: made many at a time, found again by tag, given their volumes and made targets of the load balancer.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use futures::stream::{self, StreamExt as _};
use kprov_provider::ProviderError;
use kprov_types::machine::{Machine, MachineSpec};
use kprov_types::{ClusterName, MachineName, Role};

use crate::Shared;
use crate::catalog::Catalog;
use crate::error::while_reading;
use crate::launch::{self, Launch};
use crate::model::{Instance, InstanceState, Net, Part, Volume};
use crate::{network, translate};

/// Calls that are under way at once.
const AT_ONCE: usize = 8;
/// The most instances that one call names.
const IDS: usize = 1000;
/// When to look again at machines that are being removed.
const AGAIN: Duration = Duration::from_secs(2);

/// Everything that there is of a cluster.
pub(crate) struct Seen {
    pub(crate) net: Net,
    pub(crate) volumes: Vec<Volume>,
    pub(crate) instances: Vec<Instance>,
}

/// Lists everything of a cluster: one call for each kind of thing, whatever their number.
pub(crate) async fn look(shared: &Shared, cluster: &ClusterName) -> Result<Seen, ProviderError> {
    let volumes = async { shared.client.volumes(cluster).await.map_err(while_reading) };
    let instances = async { shared.client.instances(cluster).await.map_err(while_reading) };
    let (net, volumes, instances) = futures::try_join!(network::look(shared, cluster), volumes, instances)?;
    shared.check_listed(cluster, &net, &instances, &volumes)?;
    Ok(Seen {
        net,
        volumes,
        instances,
    })
}

/// The instance of each machine: of several, the one that is furthest.
pub(crate) fn by_name(instances: &[Instance]) -> BTreeMap<&MachineName, &Instance> {
    let mut found: BTreeMap<&MachineName, &Instance> = BTreeMap::new();
    for instance in instances.iter().filter(|i| i.state != InstanceState::Terminated) {
        let best = found.entry(&instance.name).or_insert(instance);
        if (instance.state, &instance.id) < (best.state, &best.id) {
            *best = instance;
        }
    }
    found
}

/// The machines as the trait has them. A control-plane machine that runs without its disk, or is no target of the load
/// balancer, is shown as stopped: an ensure mends it.
pub(crate) fn machines(shared: &Shared, seen: &Seen) -> Vec<Machine> {
    let targets = seen.net.target_group.as_ref().map(|t| &t.targets);
    let volumes: BTreeMap<&MachineName, &Volume> = seen.volumes.iter().map(|v| (&v.machine, v)).collect();
    let show = |instance: &Instance| {
        let lacks = lacks(instance, volumes.get(&instance.name).copied(), targets);
        translate::machine(
            instance,
            shared.settings.private,
            lacks == Lacks::AnEnsure,
            lacks == Lacks::Time,
        )
    };
    by_name(&seen.instances).into_values().filter_map(show).collect()
}

/// What a running machine lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lacks {
    Nothing,
    /// Its volume is on its way, or not yet free of another instance.
    Time,
    /// Its volume is free, or it is no target.
    AnEnsure,
}

fn lacks(instance: &Instance, volume: Option<&Volume>, targets: Option<&BTreeSet<IpAddr>>) -> Lacks {
    if instance.role != Role::ControlPlane {
        return Lacks::Nothing;
    }
    match volume.map(|v| &v.attachment) {
        Some(None) => return Lacks::AnEnsure,
        Some(Some(a)) if a.instance != instance.id || !a.settled => return Lacks::Time,
        _ => {}
    }
    let address = instance.address.map(IpAddr::from);
    if targets.is_some_and(|t| address.is_some_and(|a| !t.contains(&a))) {
        return Lacks::AnEnsure;
    }
    Lacks::Nothing
}

/// The life that client tokens belong to, and how often things were removed in it.
pub(crate) fn generation(net: &Net) -> Result<(&str, u32), ProviderError> {
    let group = net.groups.get(&Part::Machines);
    let group = group.ok_or_else(|| ProviderError::never("the cluster has no network yet").hint("run `kprov up`"))?;
    Ok((&group.id, group.generation))
}

/// Begins another generation, so that what is made after a removal is no repetition of what was made before.
pub(crate) async fn next_generation(shared: &Shared, cluster: &ClusterName) -> Result<(), ProviderError> {
    let groups = shared.client.groups(cluster).await.map_err(while_reading)?;
    let Some(group) = groups.into_iter().find(|g| g.part == Part::Machines) else {
        return Ok(());
    };
    let next = (group.generation + 1).to_string();
    shared.client.tag(&[group.id], translate::GENERATION, &next).await?;
    Ok(())
}

/// Ensures machines.
pub(crate) async fn ensure(
    shared: &Shared,
    cluster: &ClusterName,
    want: &[MachineSpec],
) -> Result<Vec<Machine>, ProviderError> {
    let mut seen = look(shared, cluster).await?;
    let there = by_name(&seen.instances);
    let mut stopped = Vec::new();
    let mut missing: Vec<&MachineSpec> = Vec::new();
    for spec in want {
        match there.get(&spec.name).map(|i| (i.state, &i.id)) {
            None => {
                check_not_ended(shared, &seen.instances, &spec.name)?;
                missing.push(spec);
            }
            Some((InstanceState::Stopped, id)) => stopped.push(id.clone()),
            Some((InstanceState::ShuttingDown, _)) => {
                return Err(ProviderError::wait(
                    format!("machine `{}` is still being removed", spec.name),
                    AGAIN,
                ));
            }
            Some(_) => {}
        }
    }
    for ids in stopped.chunks(IDS) {
        shared.client.start(ids).await?;
    }
    let catalog = Catalog::look(&shared.client, &missing).await?;
    let launches = launch::plan(&seen.net, &seen.volumes, &seen.instances, &missing)?;
    // Workers are told where control-plane machines are, so these come first.
    let (first, then): (Vec<Launch>, Vec<Launch>) =
        launches.into_iter().partition(|l| l.spec.role == Role::ControlPlane);
    let mut first_error = None;
    for launches in [first, then] {
        for result in launch_all(shared, cluster, &seen, &catalog, launches).await {
            match result {
                Ok(made) => {
                    seen.instances.extend(made.instances);
                    if let Some(moved) = made.volume {
                        seen.volumes.retain(|v| v.machine != moved.machine);
                        seen.volumes.push(moved);
                    }
                }
                Err(error) => first_error = first_error.or(Some(error)),
            }
        }
    }
    // What was made is finished even where other machines were not.
    let finished = finish(shared, &seen).await;
    if let Some(error) = first_error {
        return Err(error);
    }
    finished?;
    let names: BTreeSet<&MachineName> = want.iter().map(|m| &m.name).collect();
    let all = by_name(&seen.instances);
    Ok(all
        .into_iter()
        .filter(|(name, _)| names.contains(*name))
        .filter_map(|(_, i)| translate::machine(i, shared.settings.private, false, false))
        .collect())
}

/// An instance that EC2 itself ended right after its start would end so again.
fn check_not_ended(shared: &Shared, instances: &[Instance], name: &MachineName) -> Result<(), ProviderError> {
    let launched = shared.launched();
    let ended = instances
        .iter()
        .filter(|i| i.name == *name && launched.contains(&i.id))
        .find_map(|i| i.ended.as_ref());
    match ended {
        None => Ok(()),
        Some(why) => Err(ProviderError::never(format!("machine `{name}` was ended by AWS right after its start: {why}"))
            .hint("the account's quota for volumes or its default encryption key may be the reason; mend that and run `kprov up` again")),
    }
}

async fn launch_all(
    shared: &Shared,
    cluster: &ClusterName,
    seen: &Seen,
    catalog: &Catalog,
    launches: Vec<Launch>,
) -> Vec<Result<launch::Made, ProviderError>> {
    let all = launches
        .into_iter()
        .map(|launch| launch::carry_out(shared, cluster, seen, catalog, launch));
    // All are waited for, whatever becomes of one: a call that is dropped may have taken effect.
    stream::iter(all).buffer_unordered(AT_ONCE).collect().await
}

/// Attaches volumes to the machines that run without theirs, and makes control-plane machines, and no others, targets of the
/// load balancer.
async fn finish(shared: &Shared, seen: &Seen) -> Result<(), ProviderError> {
    let all = by_name(&seen.instances);
    let mut attachments = Vec::new();
    for volume in &seen.volumes {
        let Some(instance) = all.get(&volume.machine) else {
            continue;
        };
        let ready = matches!(instance.state, InstanceState::Running | InstanceState::Stopped);
        if ready && volume.attachment.is_none() {
            let fresh = instance.address.filter(|_| !volume.used);
            attachments.push((volume.id.clone(), instance.id.clone(), fresh));
        }
    }
    let attach = |(volume, instance, fresh): (String, String, Option<Ipv4Addr>)| async move {
        if let Some(address) = fresh {
            let volume = std::slice::from_ref(&volume);
            shared.client.tag(volume, translate::USED, &address.to_string()).await?;
        }
        shared.client.attach_volume(&volume, &instance).await
    };
    let attached: Vec<_> = stream::iter(attachments)
        .map(attach)
        .buffer_unordered(AT_ONCE)
        .collect()
        .await;
    for result in attached {
        result?;
    }
    let Some(group) = &seen.net.target_group else {
        return Ok(());
    };
    let wanted: BTreeSet<IpAddr> = all
        .values()
        .filter(|i| i.role == Role::ControlPlane && i.state != InstanceState::ShuttingDown)
        .filter_map(|i| i.address.map(IpAddr::from))
        .collect();
    let add: Vec<IpAddr> = wanted.difference(&group.targets).copied().collect();
    let remove: Vec<IpAddr> = group.targets.difference(&wanted).copied().collect();
    shared.client.set_targets(&group.arn, &add, &remove).await?;
    Ok(())
}

/// Removes machines. Their volumes stay.
pub(crate) async fn remove(
    shared: &Shared,
    cluster: &ClusterName,
    machines: &[MachineName],
) -> Result<(), ProviderError> {
    let instances = shared.client.instances(cluster).await.map_err(while_reading)?;
    let names: BTreeSet<&MachineName> = machines.iter().collect();
    let going: Vec<&Instance> = instances
        .iter()
        .filter(|i| i.state < InstanceState::ShuttingDown && names.contains(&i.name))
        .collect();
    if going.is_empty() {
        return Ok(());
    }
    if shared.settings.termination_protection {
        return Err(ProviderError::never(format!(
            "the machines of `{cluster}` are protected against termination"
        ))
        .hint("set `spec.aws.terminationProtection: false` in the cluster file, run `kprov up` with it, and try again"));
    }
    next_generation(shared, cluster).await?;
    if going.iter().any(|i| i.role == Role::ControlPlane)
        && let Some(group) = shared
            .client
            .target_group(cluster)
            .await
            .map_err(while_reading)?
            .filter(|t| t.ours)
    {
        let addresses: Vec<IpAddr> = going
            .iter()
            .filter_map(|i| i.address.map(IpAddr::from))
            .filter(|a| group.targets.contains(a))
            .collect();
        shared.client.set_targets(&group.arn, &[], &addresses).await?;
    }
    let ids: Vec<String> = going.iter().map(|i| i.id.clone()).collect();
    for id in &ids {
        shared.ledger.removed(cluster, id);
    }
    for ids in ids.chunks(IDS) {
        match shared.client.terminate(ids).await {
            Ok(()) => {}
            // Protected by an earlier setting, which is off again.
            Err(error) if error.code() == Some("OperationNotPermitted") => {
                for id in ids {
                    shared.client.unprotect(id).await?;
                }
                shared.client.terminate(ids).await?;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// What a machine has printed while booting.
pub(crate) async fn console(
    shared: &Shared,
    cluster: &ClusterName,
    machine: &MachineName,
) -> Result<Option<String>, ProviderError> {
    use base64::Engine as _;
    let instances = shared.client.instances(cluster).await.map_err(while_reading)?;
    let Some(instance) = by_name(&instances).get(machine).copied() else {
        return Ok(None);
    };
    let text = shared.client.console(&instance.id).await.map_err(while_reading)?;
    let bytes = text.and_then(|t| base64::engine::general_purpose::STANDARD.decode(t.trim()).ok());
    Ok(bytes.map(|b| String::from_utf8_lossy(&b).into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn instance(id: &str, state: InstanceState) -> Instance {
        Instance {
            id: id.into(),
            name: MachineName::new("demo-cp-0").unwrap(),
            role: Role::ControlPlane,
            state,
            address: Some([10, 32, 0, 4].into()),
            public: None,
            zone: None,
            ended: None,
        }
    }

    #[test]
    fn a_volume_that_is_not_free_yet_is_waited_for() {
        use crate::model::Attachment;
        let machine = instance("i-2", InstanceState::Running);
        let volume = |attachment: Option<(&str, bool)>| Volume {
            id: "vol-1".into(),
            machine: machine.name.clone(),
            size: Some(8),
            zone: "a".into(),
            attachment: attachment.map(|(instance, settled)| Attachment {
                instance: instance.into(),
                settled,
            }),
            used: true,
        };
        let targets: BTreeSet<IpAddr> = [IpAddr::from([10, 32, 0, 4])].into();
        let with = |attachment| lacks(&machine, Some(&volume(attachment)), Some(&targets));
        assert_eq!(with(None), Lacks::AnEnsure);
        assert_eq!(with(Some(("i-1", true))), Lacks::Time);
        assert_eq!(with(Some(("i-2", false))), Lacks::Time);
        assert_eq!(with(Some(("i-2", true))), Lacks::Nothing);
        let attached = volume(Some(("i-2", true)));
        assert_eq!(
            lacks(&machine, Some(&attached), Some(&BTreeSet::new())),
            Lacks::AnEnsure
        );
        assert_eq!(lacks(&machine, Some(&attached), None), Lacks::Nothing);
    }

    #[test]
    fn of_several_instances_the_one_that_runs_counts() {
        let all = [
            instance("i-0", InstanceState::Terminated),
            instance("i-1", InstanceState::ShuttingDown),
            instance("i-3", InstanceState::Running),
            instance("i-2", InstanceState::Running),
        ];
        let ids: Vec<&str> = by_name(&all).values().map(|i| i.id.as_str()).collect();
        assert_eq!(ids, ["i-2"]);
        assert!(by_name(&all[..1]).is_empty());
    }
}
