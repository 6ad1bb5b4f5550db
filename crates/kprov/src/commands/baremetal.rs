//! Bare metal, from what a cluster file says to its hosts.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result};
use camino::Utf8Path;
use kprov_provider::Provider;
use kprov_provider_baremetal::inventory::{Disk, Host, Inventory, InventoryError, load};
use kprov_provider_baremetal::{BaremetalConfig, BaremetalProvider};
use kprov_types::cluster::{ClusterSpec, PlannedMachine};
use kprov_types::infrastructure::BaremetalSettings;
use kprov_types::machine::Observed;
use kprov_types::{ClusterName, MachineName, Role, ports};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::up::node_binary;
use crate::failure::UserError;
use crate::home::Record;
use crate::progress::Reporter;

/// The label that tells a Node's failure domain.
const ZONE_LABEL: &str = "topology.kubernetes.io/zone";

/// A cluster's hosts, as kept with it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct KeptInventory {
    /// The inventory as it was used last.
    pub inventory: Inventory,
    /// Hosts that were in it and are not any more, and may be set up still.
    #[serde(default)]
    pub former: Vec<Host>,
}

/// Bare metal, ready for use.
pub(super) struct Opened {
    pub(super) provider: Box<dyn Provider>,
    /// The cluster with the machines that the inventory names.
    pub(super) spec: ClusterSpec,
    pub(super) kept: KeptInventory,
}

/// An inventory's error as a person reads it.
pub(super) fn explain(error: &InventoryError) -> anyhow::Error {
    let shown = UserError::new(error.to_string());
    match &error.hint {
        Some(hint) => shown.hint(hint.clone()).into(),
        None => shown
            .hint(
                "`kprov inventory schema` prints what kprov's own inventories may say; Ansible's are taken as they are",
            )
            .into(),
    }
}

/// Reads the inventory that a cluster names.
pub(super) fn open(spec: ClusterSpec, record: Option<&Record>, wipe: &[MachineName]) -> Result<Opened> {
    let path = spec.baremetal.inventory.clone().ok_or_else(|| {
        UserError::new(format!("cluster `{}` has no inventory", spec.name))
            .hint("name the hosts' inventory file with `--inventory FILE`, or as `spec.baremetal.inventory` in the cluster file")
    })?;
    let inventory = load(&Disk, Utf8Path::new(&path)).map_err(|error| explain(&error))?;
    let now: BTreeSet<&MachineName> = inventory.hosts.iter().map(|host| &host.name).collect();
    let before = record.and_then(|record| record.inventory.as_ref());
    let known = before.map(|kept| kept.inventory.hosts.iter().chain(&kept.former));
    let gone = known.into_iter().flatten().filter(|host| !now.contains(&host.name));
    let former = gone.cloned().collect();
    let kept = KeptInventory { inventory, former };
    let hosts = kept.inventory.hosts.iter().map(planned).collect();
    let spec = spec
        .with_hosts(hosts, kept.inventory.schedulable)
        .map_err(|error| UserError::new(format!("`{path}` can't be used: {}", error.message)))?;
    let provider = provider(&spec, &kept, wipe)?;
    Ok(Opened { provider, spec, kept })
}

/// The hosts as they are kept with a cluster.
pub(super) fn open_kept(record: &Record, kept: &KeptInventory) -> Result<Box<dyn Provider>> {
    let spec = record
        .file
        .validate()
        .context("what is kept of the cluster is not valid any more")?;
    provider(&spec, kept, &[])
}

fn provider(spec: &ClusterSpec, kept: &KeptInventory, wipe: &[MachineName]) -> Result<Box<dyn Provider>> {
    let mut config = BaremetalConfig::new(kept.inventory.clone());
    config.former.clone_from(&kept.former);
    config.endpoint.clone_from(&spec.baremetal.endpoint);
    config.virtual_address = spec.baremetal.virtual_address;
    if let Some(parallel) = spec.baremetal.parallel {
        config.parallel = usize::try_from(parallel).unwrap_or(usize::MAX);
    }
    config.node_binary = node_binary().ok();
    config.wipe = wipe.iter().cloned().collect();
    Ok(Box::new(BaremetalProvider::new(config)?))
}

fn planned(host: &Host) -> PlannedMachine {
    let mut labels = host.labels.clone();
    if let Some(zone) = &host.zone {
        labels.entry(ZONE_LABEL.into()).or_insert_with(|| zone.clone());
    }
    PlannedMachine {
        name: host.name.clone(),
        role: host.role,
        zone: host.zone.clone(),
        size: None,
        image: None,
        // One that is reached by another address has it laid down in the inventory; others tell it themselves.
        address: host.address.filter(|_| host.external_address.is_some()),
        reached: host.external_address.or(host.address),
        labels,
    }
}

/// Refuses another control plane than the cluster has.
pub(super) fn check_control_plane(cluster: &ClusterName, before: &KeptInventory, now: &KeptInventory) -> Result<()> {
    let names = |kept: &KeptInventory| -> BTreeSet<MachineName> {
        let hosts = kept.inventory.hosts.iter();
        hosts
            .filter(|host| host.role == Role::ControlPlane)
            .map(|host| host.name.clone())
            .collect()
    };
    let (before, now) = (names(before), names(now));
    if before == now {
        return Ok(());
    }
    let list = |names: &BTreeSet<MachineName>| names.iter().map(|n| format!("`{n}`")).collect::<Vec<_>>().join(", ");
    Err(UserError::new(format!(
        "cluster `{cluster}` has the control-plane hosts {}; they can't be changed to {} by `up`",
        list(&before),
        list(&now)
    ))
    .hint("leave them as they are, or make a cluster of another name")
    .into())
}

/// Says which machines are not in the inventory any more.
pub(super) fn note_surplus(reporter: &Reporter, cluster: &ClusterName, kept: &KeptInventory, observed: &Observed) {
    for machine in &observed.machines {
        if kept.former.iter().any(|host| host.name == machine.name) {
            reporter.note(&format!(
                "`{}` is not in the inventory any more, and still a machine of the cluster; `kprov inventory remove {} --name {cluster}` removes it",
                machine.name, machine.name
            ));
        }
    }
}

/// A kubeconfig with a context `<cluster>-<host>` for each control-plane host beside the one it has, where the API has no address
/// but theirs: the others can be asked while the first is away.
pub(super) fn with_contexts(kubeconfig: &str, spec: &ClusterSpec) -> Result<String> {
    let BaremetalSettings {
        endpoint,
        virtual_address,
        ..
    } = &spec.baremetal;
    let hosts: Vec<_> = spec
        .machines
        .iter()
        .filter(|m| m.role == Role::ControlPlane)
        .filter_map(|m| Some((&m.name, m.reached?)))
        .collect();
    if endpoint.is_some() || virtual_address.is_some() || hosts.len() < 2 {
        return Ok(kubeconfig.to_owned());
    }
    let mut config: Value = serde_saphyr::from_str(kubeconfig).context("the kubeconfig is damaged")?;
    let (cluster, context) = (config["clusters"][0].clone(), config["contexts"][0].clone());
    for (host, address) in hosts {
        let name = format!("{}-{host}", spec.name);
        let (mut cluster, mut context) = (cluster.clone(), context.clone());
        cluster["name"] = name.clone().into();
        cluster["cluster"]["server"] = format!("https://{address}:{}", ports::API).into();
        // In the host's certificate, unlike an address that only those outside know.
        cluster["cluster"]["tls-server-name"] = host.as_str().into();
        context["name"] = name.clone().into();
        context["context"]["cluster"] = name.into();
        for (list, entry) in [("clusters", cluster), ("contexts", context)] {
            if let Some(list) = config[list].as_array_mut() {
                list.push(entry);
            }
        }
    }
    Ok(serde_saphyr::to_string(&config)?)
}
