//! A cluster's network: a bridge with an address of this host, the balancer on it, and the way out.

use std::fs::{self, File};

use camino::Utf8Path;
use kprov_types::ClusterName;
use kprov_types::machine::{Endpoint, Network, NetworkSpec};

use crate::cgroup::Group;
use crate::config::LocalConfig;
use crate::error::LocalError;
use crate::link::{self, Link};
use crate::range::{self, Used};
use crate::state::{self, ClusterDir, Lock, NetworkRecord};
use crate::{balancer, naming, nat};

/// What five machines with a kubelet and a containerd each need and many hosts don't have.
const INOTIFY: [(&str, u64); 2] = [
    ("/proc/sys/fs/inotify/max_user_instances", 1024),
    ("/proc/sys/fs/inotify/max_user_watches", 524_288),
];

/// The network as it is, if there is one.
pub(crate) fn observe(dir: &ClusterDir) -> Result<Option<Network>, LocalError> {
    let Some(record) = dir.network()? else { return Ok(None) };
    let NetworkRecord { range, api_port } = record;
    let address = naming::gateway(range);
    let bridge = naming::bridge(&dir.cluster);
    let works = |l: &Link| l.name == bridge && l.is_up() && l.addresses().any(|a| a.addr() == address);
    Ok(Some(Network {
        cidr: range,
        endpoint: Endpoint {
            host: address.to_string(),
            port: api_port,
        },
        host_address: Some(address),
        complete: link::links()?.iter().any(works) && balancer::is_running(dir)?,
    }))
}

/// Ensures it. The cluster's lock must be held.
pub(crate) fn ensure(
    config: &LocalConfig,
    dir: &ClusterDir,
    want: &NetworkSpec,
    lock: &Lock,
) -> Result<Network, LocalError> {
    let known = dir.network()?;
    if known.is_none() && !Group::cluster(&dir.cluster)?.processes()?.is_empty() {
        return Err(LocalError::TakenName {
            cluster: dir.cluster.clone(),
            state_dir: config.state_dir.to_string(),
        });
    }
    let made = ensure_parts(config, dir, want, known.as_ref(), lock);
    if made.is_err() && known.is_none() {
        // What was not there before is not left half-made. Why it failed is what the caller wants to know, not this.
        let _ = remove(dir, lock);
    }
    made?;
    observe(dir)?.ok_or_else(|| LocalError::NoNetwork {
        cluster: dir.cluster.clone(),
    })
}

fn ensure_parts(
    config: &LocalConfig,
    dir: &ClusterDir,
    want: &NetworkSpec,
    known: Option<&NetworkRecord>,
    lock: &Lock,
) -> Result<(), LocalError> {
    let cluster = &dir.cluster;
    raise_limits();
    // No other cluster chooses a range until this one's is to be seen on its bridge.
    let host = Lock::host()?;
    let links = link::links()?;
    let bridge = naming::bridge(cluster);
    let there = links.iter().find(|l| l.name == bridge);
    if there.is_some_and(|l| !l.alias.is_empty() && l.alias != naming::cluster_tag(cluster)) {
        return Err(LocalError::ForeignInterface {
            interface: bridge,
            cluster: cluster.clone(),
        });
    }
    let record = record(config, dir, want, known, &links)?;
    ensure_bridge(cluster, &record, &links, lock.file())?;
    nat::ensure(cluster, record.range, lock.file());
    drop(host);
    balancer::write_backends(dir, record.api_port, &dir.machine_records()?)?;
    balancer::ensure(dir, &config.room_exe, &record, lock)
}

/// The network as it is recorded; a new one is decided on first, and recorded.
fn record(
    config: &LocalConfig,
    dir: &ClusterDir,
    want: &NetworkSpec,
    known: Option<&NetworkRecord>,
    links: &[Link],
) -> Result<NetworkRecord, LocalError> {
    let used = || used(&config.state_dir, &dir.cluster, links);
    let check_free = |range| match range::conflict(range, &used()?) {
        Some(Used { by, .. }) => Err(LocalError::RangeTaken { range, by: by.clone() }),
        None => Ok(range),
    };
    if let Some(known) = known {
        if want.cidr.is_some_and(|cidr| cidr != known.range) || want.api_port != known.api_port {
            return Err(LocalError::NetworkDiffers {
                cluster: dir.cluster.clone(),
                has: format!("{} port {}", known.range, known.api_port),
                wanted: format!("{} port {}", want.cidr.unwrap_or(known.range), want.api_port),
            });
        }
        if !links.iter().any(|l| l.name == naming::bridge(&dir.cluster)) {
            check_free(known.range)?;
        }
        return Ok(known.clone());
    }
    let record = NetworkRecord {
        range: match want.cidr {
            Some(range) => check_free(range)?,
            None => range::choose(&used()?).ok_or(LocalError::NoFreeRange)?,
        },
        api_port: want.api_port,
    };
    state::write_json(&dir.network_file(), &record)?;
    Ok(record)
}

fn ensure_bridge(cluster: &ClusterName, record: &NetworkRecord, links: &[Link], lock: &File) -> Result<(), LocalError> {
    let bridge = naming::bridge(cluster);
    let address = naming::gateway(record.range);
    let mut commands = Vec::new();
    if !links.iter().any(|l| l.name == bridge) {
        // An address of its own, as a bridge would else take on, and change, those of its ports.
        let hardware = naming::hardware_address(cluster, record.range, address);
        commands.push(format!("link add name {bridge} address {hardware} type bridge"));
    }
    commands.push(format!("link set dev {bridge} alias {}", naming::cluster_tag(cluster)));
    commands.push(format!(
        "address replace {address}/{} dev {bridge}",
        record.range.prefix_len()
    ));
    commands.push(format!("link set dev {bridge} up"));
    link::batch(&commands, lock)?;
    // Machines that ran when somebody deleted the bridge.
    for port in links
        .iter()
        .filter(|l| l.name != bridge && naming::tag_is_of(&l.alias, cluster) && !l.is_port_of(&bridge))
    {
        link::join(&port.name, &bridge, lock)?;
    }
    Ok(())
}

/// All ranges that are used by others: other clusters (which may not run at the moment), interfaces, routes.
fn used(state_dir: &Utf8Path, cluster: &ClusterName, links: &[Link]) -> Result<Vec<Used>, LocalError> {
    let mut used = Vec::new();
    for name in state::names_in(state_dir)?
        .into_iter()
        .filter_map(|n| ClusterName::new(n).ok())
    {
        if name != *cluster
            && let Some(record) = ClusterDir::new(state_dir, &name).network()?
        {
            used.push(Used {
                range: record.range,
                by: format!("cluster `{name}`"),
            });
        }
    }
    used.extend(range::used_by_host(links, &link::routes()?, &naming::bridge(cluster)));
    Ok(used)
}

/// Removes the network and whatever else still carries the cluster's tag. No machine may be left, and the cluster's lock
/// must be held.
pub(crate) fn remove(dir: &ClusterDir, lock: &Lock) -> Result<(), LocalError> {
    let cluster = &dir.cluster;
    balancer::remove(dir)?;
    let group = Group::cluster(cluster)?;
    group.kill()?;
    group.remove()?;
    group.remove_empty_parents()?;
    let host = Lock::host()?;
    for link in link::links()?.iter().filter(|l| is_of(l, cluster)) {
        link::remove(&link.name, lock.file())?;
    }
    nat::remove(cluster, lock.file())?;
    state::remove_file(&dir.network_file())?;
    if link::links()?.iter().any(|l| naming::is_tag(&l.alias)) {
        return Ok(());
    }
    nat::put_forwarding_back()?;
    host.remove(&[state::host_dir()])
}

/// Whether an interface is the cluster's: by its tag, or, where a killed call had not come to tagging it, by its name.
pub(crate) fn is_of(link: &Link, cluster: &ClusterName) -> bool {
    let named = link.name == naming::bridge(cluster) || link.name.starts_with(&naming::interface_prefix(cluster));
    naming::tag_is_of(&link.alias, cluster) || (link.alias.is_empty() && named)
}

/// Raises the host's limits that machines would run into. They stay raised: others may have come to need them.
fn raise_limits() {
    for (file, least) in INOTIFY {
        let Some(now) = fs::read_to_string(file).ok().and_then(|v| v.trim().parse::<u64>().ok()) else {
            continue;
        };
        if now >= least {
            continue;
        }
        match fs::write(file, least.to_string()) {
            Ok(()) => tracing::info!("raised `{file}` from {now} to {least}"),
            Err(error) => tracing::warn!("cannot raise `{file}` from {now} to {least}: {error}"),
        }
    }
}
