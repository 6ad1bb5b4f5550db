//! Bare metal: hosts that are there already, named by an inventory.
//!
//! A host that runs Linux is reached by SSH, for three things only: to copy kprov-node, to give it its first-boot data, and
//! to remove it again. Its tag is a marker in `/etc/kprov`; nothing is remembered elsewhere. A host in trouble holds up no
//! other: each call does all that it can, and the error at its end names every host that it could not do. No key that a
//! host shows is accepted unless it was known before, and no disk is touched but the one that the inventory describes.
//!
//! Start reading at [`inventory`], then [`BaremetalProvider`]; what runs on hosts is `ssh/remote.sh`.

pub mod boot;
mod config;
mod disks;
mod error;
mod facts;
pub mod inventory;
mod machines;
mod network;
pub mod redfish;
mod ssh;

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures::StreamExt as _;
use kprov_provider::{Provider, ProviderError};
use kprov_types::machine::{
    DataVolume, Disk, DiskSpec, Leftover, Machine, MachineSpec, MachineState, Network, NetworkSpec, Observed,
};
use kprov_types::{ClusterName, MachineName};

pub use config::{BaremetalConfig, PARALLEL};
pub use error::{HostError, Trouble};
pub use facts::Facts;

use error::together;
use inventory::Host;
use ssh::{Connections, Input};

/// How long a host that could not be reached counts as unreachable before it's tried again: one call of `up` looks often.
const UNREACHABLE_FOR: Duration = Duration::from_secs(20);

/// Hosts of an inventory. See the crate's documentation.
#[derive(Clone, Debug)]
pub struct BaremetalProvider {
    config: Arc<BaremetalConfig>,
    connections: Arc<Connections>,
    state: Arc<Mutex<State>>,
    /// kprov-node's digest, once it was needed.
    node_digest: Arc<tokio::sync::OnceCell<String>>,
}

/// What one run knows beside the hosts themselves.
#[derive(Debug, Default)]
struct State {
    /// The networks that were asked for, by cluster: they exist already, so that asking is all there is to it.
    networks: BTreeMap<ClusterName, NetworkSpec>,
    /// Disks that could not be had. They are listed as described, so that the machines of other hosts are made all the same;
    /// `ensure_machines` is what reports them.
    troubled: BTreeMap<MachineName, (Disk, HostError)>,
    /// Hosts that could not be reached, and when.
    unreachable: BTreeMap<MachineName, (Instant, HostError)>,
}

/// What every host said, or why it didn't.
type Answers<'a> = Vec<(&'a Host, Result<Facts, HostError>)>;

impl BaremetalProvider {
    /// A provider for these hosts. Touches nothing.
    pub fn new(config: BaremetalConfig) -> Result<Self, ProviderError> {
        let connections = Connections::new().map_err(|e| {
            ProviderError::never("no directory for connections can be made")
                .caused_by(e)
                .hint("check that there is space in the temporary directory")
        })?;
        Ok(Self {
            config: Arc::new(config.validate()?),
            connections: Arc::new(connections),
            state: Arc::default(),
            node_digest: Arc::default(),
        })
    }

    /// Asks every host of the inventory, and tells of each whether it could become a machine of `cluster`; where none is given,
    /// one that belongs to a cluster is taken for a machine of that.
    pub async fn check(&self, cluster: Option<&ClusterName>) -> Vec<(MachineName, Result<Facts, HostError>)> {
        let answers = self.ask(self.config.inventory.hosts.iter()).await;
        let arch = machines::arch();
        let checks: Vec<_> = answers
            .into_iter()
            .map(|(host, answer)| async move {
                let fits = answer.and_then(|facts| {
                    let own = cluster.or(facts.cluster.as_ref());
                    let fits = facts.check(host, own, arch);
                    fits.map(|()| facts).map_err(|trouble| self.of(host, trouble))
                });
                let fits = match fits {
                    Ok(facts) => self.check_disk(host, &facts).await.map(|()| facts),
                    Err(error) => Err(error),
                };
                (host.name.clone(), fits)
            })
            .collect();
        futures::stream::iter(checks)
            .buffered(self.config.parallel)
            .collect()
            .await
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[expect(clippy::unused_self, reason = "reads better beside its siblings")]
    fn of(&self, host: &Host, trouble: Trouble) -> HostError {
        HostError {
            host: host.name.clone(),
            trouble,
        }
    }

    /// A host by its name, those that are to leave included.
    fn host(&self, name: &MachineName) -> Result<&Host, HostError> {
        self.config
            .hosts()
            .find(|host| host.name == *name)
            .ok_or_else(|| HostError {
                host: name.clone(),
                trouble: Trouble::NotInInventory,
            })
    }

    /// What a host is, asked now.
    async fn facts(&self, host: &Host) -> Result<Facts, HostError> {
        let recent = |(since, error): &(Instant, HostError)| (since.elapsed() < UNREACHABLE_FOR).then(|| error.clone());
        if let Some(error) = self.state().unreachable.get(&host.name).and_then(recent) {
            return Err(error);
        }
        let reply = self.connections.run(host, "facts", &[], Input::Nothing).await;
        match reply.and_then(|reply| Facts::from(&reply).map_err(|trouble| self.of(host, trouble))) {
            Ok(facts) => {
                self.state().unreachable.remove(&host.name);
                Ok(facts)
            }
            Err(error) => {
                self.state()
                    .unreachable
                    .insert(host.name.clone(), (Instant::now(), error.clone()));
                Err(error)
            }
        }
    }

    /// Asks hosts, so many at once as configured.
    async fn ask<'a>(&'a self, hosts: impl Iterator<Item = &'a Host>) -> Answers<'a> {
        let asked: Vec<_> = hosts
            .map(|host| async move { (host, self.facts(host).await) })
            .collect();
        futures::stream::iter(asked)
            .buffered(self.config.parallel)
            .collect()
            .await
    }

    /// Does something on each host named, so many at once as configured, and returns what came of it.
    async fn on_each<T, F>(&self, hosts: Vec<&MachineName>, work: impl Fn(MachineName) -> F) -> (Vec<T>, Vec<HostError>)
    where
        F: Future<Output = Result<T, HostError>>,
    {
        let begun: Vec<F> = hosts.into_iter().map(|name| work(name.clone())).collect();
        let all: Vec<Result<T, HostError>> = futures::stream::iter(begun)
            .buffered(self.config.parallel)
            .collect()
            .await;
        let (mut done, mut errors) = (Vec::new(), Vec::new());
        for result in all {
            match result {
                Ok(value) => done.push(value),
                Err(error) => errors.push(error),
            }
        }
        (done, errors)
    }

    /// The network as it is: asked for in this run, or told by a machine's marker.
    fn network(&self, cluster: &ClusterName, answers: &Answers<'_>) -> Option<Network> {
        let address = |host: &Host| {
            let of = |(other, answer): &(&Host, Result<Facts, HostError>)| {
                (other.name == host.name)
                    .then(|| answer.as_ref().ok()?.address(host))
                    .flatten()
            };
            answers.iter().find_map(of).or(host.address)
        };
        let facts = || answers.iter().filter_map(|(_, answer)| answer.as_ref().ok());
        let marker = facts().find_map(|f| f.machine.as_ref().filter(|m| m.cluster == *cluster));
        let claimed = facts().any(|f| f.disk.as_ref().is_some_and(|d| d.cluster == *cluster));
        let asked = self.state().networks.get(cluster).cloned();
        if marker.is_none() && asked.is_none() && !claimed {
            return None;
        }
        let computed = || network::smallest(self.config.inventory.hosts.iter().filter_map(address));
        let named = asked.and_then(|spec| spec.cidr);
        let cidr = named.or_else(|| marker.map(|m| m.cidr)).or_else(computed)?;
        let wanted = network::endpoint(&self.config, address);
        let endpoint = marker.map(|m| m.endpoint.clone()).or_else(|| wanted.clone())?;
        // What was configured has to be what machines were told; the first control-plane host's address may have moved on.
        let configured = self.config.virtual_address.is_some() || self.config.endpoint.is_some();
        let complete = !configured || wanted.as_ref() == Some(&endpoint);
        Some(Network {
            cidr,
            endpoint,
            host_address: self.host_address(address),
            complete,
        })
    }

    /// This machine's address as hosts see it; none where hosts are reached through others.
    fn host_address(&self, address: impl Fn(&Host) -> Option<Ipv4Addr>) -> Option<Ipv4Addr> {
        let hosts = &self.config.inventory.hosts;
        let indirect = |host: &Host| {
            let ssh = host.ssh.as_ref();
            ssh.is_some_and(|ssh| !ssh.jump.is_empty() || ssh.args.iter().any(|arg| arg.contains("ProxyCommand")))
        };
        if hosts.iter().any(indirect) {
            return None;
        }
        hosts
            .iter()
            .find_map(|host| host.external_address.or_else(|| address(host)))
            .and_then(network::source_towards)
    }

    /// The path of a host's data disk, found as described; `None` for a directory.
    async fn disk_path(&self, host: &Host) -> Result<Option<String>, HostError> {
        let Some(want) = &host.disk else { return Ok(None) };
        if want.path.is_some() {
            return Ok(want.path.clone());
        }
        let reply = self.connections.run(host, "disks", &[], Input::Nothing).await?;
        disks::choose(want, &disks::devices(&reply))
            .map(Some)
            .map_err(|why| self.of(host, Trouble::NoDisk(why)))
    }

    /// Whether a host's data disk is there, and empty or claimed already. Changes nothing.
    async fn check_disk(&self, host: &Host, facts: &Facts) -> Result<(), HostError> {
        let Some(path) = self.disk_path(host).await?.filter(|_| facts.disk.is_none()) else {
            return Ok(());
        };
        let reply = self.connections.run(host, "look", &[&path], Input::Nothing).await;
        reply.map(drop)
    }

    /// A host's data disk as the inventory describes it, for a host that can't be asked.
    fn described(host: &Host) -> Disk {
        let path = host.disk.as_ref().map(|disk| disk.path.clone());
        let volume = match path {
            None => DataVolume::Directory(machines::DATA.into()),
            Some(path) => DataVolume::Device(path.into_iter().collect()),
        };
        disk(&host.name, volume)
    }
}

fn disk(machine: &MachineName, volume: DataVolume) -> Disk {
    let place = match &volume {
        DataVolume::Directory(path) => path.clone(),
        DataVolume::Device(paths) => paths.first().cloned().unwrap_or_default(),
    };
    Disk {
        id: format!("{machine}:{place}"),
        machine: machine.clone(),
        size_gib: None,
        volume,
    }
}

/// A host as a machine of `cluster`, if it's one.
fn machine(host: &Host, answer: &Result<Facts, HostError>, cluster: &ClusterName) -> Option<Machine> {
    let id = host.ssh.as_ref().map_or_else(String::new, |ssh| match ssh.port {
        Some(port) => format!("{}:{port}", ssh.host),
        None => ssh.host.clone(),
    });
    let of = |address: Option<Ipv4Addr>, state| Machine {
        name: host.name.clone(),
        role: host.role,
        id: id.clone(),
        address: address.map(Into::into),
        external_address: host.external_address.filter(|a| Some(*a) != address).map(Into::into),
        zone: host.zone.clone(),
        state,
    };
    match answer {
        Err(error) => Some(of(host.address, MachineState::Unknown(error.trouble.to_string()))),
        Ok(facts) => {
            let marker = facts.machine.as_ref().filter(|marker| marker.cluster == *cluster)?;
            let state = if facts.running {
                MachineState::Running
            } else {
                MachineState::Stopped
            };
            let machine = of(facts.address(host), state);
            Some(Machine {
                name: marker.name.clone(),
                role: marker.role,
                ..machine
            })
        }
    }
}

#[async_trait]
impl Provider for BaremetalProvider {
    fn name(&self) -> &'static str {
        "baremetal"
    }

    async fn clusters(&self) -> Result<Vec<ClusterName>, ProviderError> {
        let mut names = BTreeSet::new();
        let mut errors = Vec::new();
        let answers = self.ask(self.config.hosts()).await;
        let all = answers.len();
        for (_, answer) in answers {
            match answer {
                Ok(facts) => names.extend(facts.cluster),
                Err(error) => errors.push(error),
            }
        }
        together("asked", &errors, all)?;
        Ok(names.into_iter().collect())
    }

    /// A host that can't be asked is a machine in the state [`MachineState::Unknown`]: the listing is whole, and says so.
    async fn observe(&self, cluster: &ClusterName) -> Result<Observed, ProviderError> {
        let answers = self.ask(self.config.hosts()).await;
        let network = self.network(cluster, &answers);
        let mut observed = Observed {
            network,
            ..Observed::default()
        };
        for (host, answer) in &answers {
            observed.machines.extend(machine(host, answer, cluster));
            let claimed = answer.as_ref().ok().and_then(|facts| facts.disk.clone());
            if let Some(marker) = claimed.filter(|marker| marker.cluster == *cluster) {
                observed.disks.push(disk(&host.name, marker.volume));
            } else if let Some((described, _)) = self.state().troubled.get(&host.name) {
                observed.disks.push(described.clone());
            }
        }
        Ok(observed)
    }

    /// Makes nothing: hosts are in a network already. Refuses an endpoint that the cluster's machines don't have.
    async fn ensure_network(&self, cluster: &ClusterName, want: &NetworkSpec) -> Result<Network, ProviderError> {
        self.state().networks.insert(cluster.clone(), want.clone());
        let answers = self.ask(self.config.hosts()).await;
        let network = self.network(cluster, &answers).ok_or_else(|| {
            let errors: Vec<_> = answers.iter().filter_map(|(_, a)| a.as_ref().err().cloned()).collect();
            match together("asked", &errors, answers.len()) {
                Err(error) => error,
                Ok(()) => ProviderError::never("no host of the inventory has an address")
                    .hint("give `address` (Ansible: `ip`) of each host"),
            }
        })?;
        if !network.complete {
            return Err(ProviderError::never(format!(
                "the machines of cluster `{cluster}` know its API as `{}`, which can't be changed",
                network.endpoint.host
            ))
            .hint("leave `endpoint` and `virtualAddress` in `spec.baremetal` as they were"));
        }
        Ok(network)
    }

    async fn remove_network(&self, cluster: &ClusterName) -> Result<(), ProviderError> {
        self.state().networks.remove(cluster);
        Ok(())
    }

    /// Takes disks as the inventory describes them. What stands against one is reported by `ensure_machines`, after all other
    /// machines were made.
    async fn ensure_disks(&self, cluster: &ClusterName, want: &[DiskSpec]) -> Result<Vec<Disk>, ProviderError> {
        let names = want.iter().map(|spec| &spec.machine).collect();
        let ensure = |name: MachineName| async move {
            let host = self.host(&name)?;
            match self.ensure_disk(cluster, host).await {
                Ok(disk) => {
                    self.state().troubled.remove(&name);
                    Ok(disk)
                }
                Err(error) => {
                    let described = Self::described(host);
                    self.state().troubled.insert(name, (described.clone(), error));
                    Ok(described)
                }
            }
        };
        let (disks, errors) = self.on_each(names, ensure).await;
        together("ready", &errors, want.len())?;
        Ok(disks)
    }

    async fn remove_disks(&self, cluster: &ClusterName, machines: &[MachineName]) -> Result<(), ProviderError> {
        let known = machines.iter().filter(|name| self.host(name).is_ok()).collect();
        let remove = |name: MachineName| async move {
            self.state().troubled.remove(&name);
            self.remove_disk(cluster, self.host(&name)?).await
        };
        let (_, errors) = self.on_each(known, remove).await;
        together("rid of their data", &errors, machines.len())
    }

    async fn ensure_machines(
        &self,
        cluster: &ClusterName,
        want: &[MachineSpec],
    ) -> Result<Vec<Machine>, ProviderError> {
        let answers = self.ask(self.config.hosts()).await;
        let network = self.network(cluster, &answers).ok_or_else(|| {
            ProviderError::never(format!("the cluster `{cluster}` has no network yet")).hint("ensure the network first")
        })?;
        let specs: BTreeMap<&MachineName, &MachineSpec> = want.iter().map(|spec| (&spec.name, spec)).collect();
        let (specs, network) = (&specs, &network);
        let ensure = |name: MachineName| async move {
            let host = self.host(&name)?;
            let troubled = self.state().troubled.get(&name).map(|(_, error)| error.clone());
            if let Some(error) = troubled {
                return Err(error);
            }
            match specs.get(&name) {
                Some(spec) => self.ensure_machine(cluster, network, host, spec).await,
                None => Err(self.of(host, Trouble::NotInInventory)),
            }
        };
        let names = want.iter().map(|spec| &spec.name).collect();
        let (machines, errors) = self.on_each(names, ensure).await;
        together("set up", &errors, want.len())?;
        Ok(machines)
    }

    async fn remove_machines(&self, cluster: &ClusterName, machines: &[MachineName]) -> Result<(), ProviderError> {
        let known = machines.iter().filter(|name| self.host(name).is_ok()).collect();
        let remove = |name: MachineName| async move { self.remove_machine(cluster, self.host(&name)?).await };
        let (_, errors) = self.on_each(known, remove).await;
        together("cleaned", &errors, machines.len())
    }

    async fn leftovers(&self, cluster: &ClusterName) -> Result<Vec<Leftover>, ProviderError> {
        let leftover = |kind: &str, name: &str, why: Option<String>| Leftover {
            kind: kind.into(),
            name: name.into(),
            why,
        };
        let mut all = Vec::new();
        for (host, answer) in self.ask(self.config.hosts()).await {
            let name = host.name.as_str();
            match answer {
                Err(error) => all.push(leftover("host", name, Some(error.trouble.to_string()))),
                Ok(facts) => {
                    if facts.machine.as_ref().is_some_and(|m| m.cluster == *cluster) {
                        all.push(leftover("machine", name, None));
                    }
                    if facts.disk.as_ref().is_some_and(|d| d.cluster == *cluster) {
                        all.push(leftover("data disk", name, None));
                    }
                    all.extend(
                        facts
                            .left
                            .iter()
                            .map(|path| leftover("file", &format!("{name}:{path}"), None)),
                    );
                }
            }
        }
        all.sort_unstable();
        Ok(all)
    }

    async fn console(&self, _: &ClusterName, machine: &MachineName) -> Result<Option<String>, ProviderError> {
        let run = async {
            let host = self.host(machine)?;
            self.connections.run(host, "printed", &[], Input::Nothing).await
        };
        let reply = run.await.map_err(|error| {
            let hint = error.trouble.hint(&error.host);
            ProviderError::never(error.to_string()).hint(hint)
        })?;
        let lines: Vec<&str> = reply.all("line").collect();
        Ok(Some(lines.join("\n")).filter(|text| !text.trim().is_empty()))
    }
}
