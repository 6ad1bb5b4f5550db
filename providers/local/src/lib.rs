//! The local provider: machines as Linux namespaces on this host.
//!
//! A machine has a network, mount, process, host name, IPC and cgroup namespace of its own, an overlay of the host's `/`
//! as its root, and starts in well under a second. All clusters of a host are apart: each has its own bridge, address
//! range, control groups, directory and tag, and no call touches what carries another's.
//!
//! It knows nothing of Kubernetes; what runs in a machine is the caller's first-boot script. Nothing here waits for that
//! script, and no state but directories and what the kernel knows is kept. Processes are recognized by id *and* start
//! time. A call that is killed leaves what the next one finishes or removes.
//!
//! Start reading at [`LocalProvider`]; then `network`, `machines`, and `init` for a machine from the inside. The program
//! that uses this crate must offer the hidden subcommands that [`LocalConfig::room_exe`] names.

mod balancer;
mod cgroup;
mod config;
mod error;
mod harness;
mod init;
mod leftovers;
mod link;
mod machines;
mod naming;
mod nat;
mod network;
mod process;
mod range;
mod state;

use std::fs;
use std::sync::Arc;

use async_trait::async_trait;
use kprov_provider::{Provider, ProviderError};
use kprov_types::machine::{
    DataVolume, Disk, DiskSpec, Leftover, Machine, MachineSpec, Network, NetworkSpec, Observed,
};
use kprov_types::{ClusterName, MachineName};

pub use config::{LocalConfig, STATE_DIR};
pub use error::LocalError;
pub use init::machine_init;

use state::{ClusterDir, Lock};

/// The capabilities that making machines takes, with their numbers (`capabilities(7)`).
const CAPABILITIES: [(&str, u32); 2] = [("CAP_NET_ADMIN", 12), ("CAP_SYS_ADMIN", 21)];

/// Machines as namespaces on this host. See the crate's documentation.
#[derive(Clone, Debug)]
pub struct LocalProvider {
    config: Arc<LocalConfig>,
}

impl LocalProvider {
    /// A provider with this configuration. Touches nothing.
    pub fn new(config: LocalConfig) -> Result<Self, LocalError> {
        Ok(Self {
            config: Arc::new(config.validate()?),
        })
    }

    fn dir(&self, cluster: &ClusterName) -> ClusterDir {
        ClusterDir::new(&self.config.state_dir, cluster)
    }

    /// Reads something of a cluster, on a thread where waiting for the disk holds nothing up.
    async fn read<T: Send + 'static>(
        &self,
        cluster: &ClusterName,
        read: impl FnOnce(&LocalConfig, &ClusterDir) -> Result<T, LocalError> + Send + 'static,
    ) -> Result<T, ProviderError> {
        let (config, dir) = (Arc::clone(&self.config), self.dir(cluster));
        off_thread(move || read(&config, &dir)).await
    }

    /// Changes something of a cluster, with its lock held.
    async fn change<T: Send + 'static>(
        &self,
        cluster: &ClusterName,
        change: impl FnOnce(&LocalConfig, &ClusterDir, &Lock) -> Result<T, LocalError> + Send + 'static,
    ) -> Result<T, ProviderError> {
        self.read(cluster, move |config, dir| {
            check_privileges()?;
            let lock = Lock::cluster(&config.state_dir, dir)?;
            let result = change(config, dir, &lock);
            let tidied = tidy(config, dir, lock);
            result.and_then(|value| tidied.map(|()| value))
        })
        .await
    }
}

async fn off_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, LocalError> + Send + 'static,
) -> Result<T, ProviderError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result.map_err(ProviderError::from),
        Err(error) => Err(ProviderError::look_first("a call of the local provider was cut short").caused_by(error)),
    }
}

/// Checks that this process may make namespaces and interfaces.
fn check_privileges() -> Result<(), LocalError> {
    let path = "/proc/self/status";
    let status = fs::read_to_string(path).map_err(LocalError::io("read", path))?;
    match missing_capability(&status) {
        Some(missing) => Err(LocalError::NotRoot { missing }),
        None => Ok(()),
    }
}

/// The first capability that the text of `/proc/<pid>/status` does not show as effective.
fn missing_capability(status: &str) -> Option<&'static str> {
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .unwrap_or(0);
    CAPABILITIES
        .into_iter()
        .find(|(_, number)| effective & (1 << number) == 0)
        .map(|(name, _)| name)
}

/// Removes a cluster's directory once nothing of the cluster is in it, and those above that are empty then.
fn tidy(config: &LocalConfig, dir: &ClusterDir, lock: Lock) -> Result<(), LocalError> {
    let in_use = dir.network()?.is_some() || !dir.machine_records()?.is_empty() || !machines::disks(dir)?.is_empty();
    if in_use {
        return Ok(());
    }
    dir.remove_halves()?;
    let mut emptied = vec![dir.path.as_path(), config.state_dir.as_path()];
    // The directory above is kprov's own only where it is called so.
    emptied.extend(config.state_dir.parent().filter(|p| p.file_name() == Some("kprov")));
    lock.remove(&emptied)
}

#[async_trait]
impl Provider for LocalProvider {
    fn name(&self) -> &'static str {
        "local"
    }

    async fn clusters(&self) -> Result<Vec<ClusterName>, ProviderError> {
        let state_dir = self.config.state_dir.clone();
        let names = off_thread(move || state::names_in(&state_dir)).await?;
        Ok(names
            .into_iter()
            .filter_map(|name| ClusterName::new(name).ok())
            .collect())
    }

    async fn observe(&self, cluster: &ClusterName) -> Result<Observed, ProviderError> {
        self.read(cluster, |_, dir| {
            Ok(Observed {
                network: network::observe(dir)?,
                disks: machines::disks(dir)?
                    .into_iter()
                    .map(|machine| disk(dir, machine))
                    .collect(),
                machines: machines::observe(dir)?,
            })
        })
        .await
    }

    async fn ensure_network(&self, cluster: &ClusterName, want: &NetworkSpec) -> Result<Network, ProviderError> {
        let want = want.clone();
        self.change(cluster, move |config, dir, lock| {
            network::ensure(config, dir, &want, lock)
        })
        .await
    }

    async fn remove_network(&self, cluster: &ClusterName) -> Result<(), ProviderError> {
        self.change(cluster, |_, dir, lock| {
            match dir.machine_records()?.into_iter().next() {
                Some(record) => Err(LocalError::StillHasMachines {
                    cluster: dir.cluster.clone(),
                    machine: record.name,
                }),
                None => network::remove(dir, lock),
            }
        })
        .await
    }

    async fn ensure_disks(&self, cluster: &ClusterName, want: &[DiskSpec]) -> Result<Vec<Disk>, ProviderError> {
        let machines: Vec<MachineName> = want.iter().map(|disk| disk.machine.clone()).collect();
        self.change(cluster, move |_, dir, _| {
            machines::ensure_disks(dir, &machines)?;
            Ok(machines.into_iter().map(|machine| disk(dir, machine)).collect())
        })
        .await
    }

    async fn remove_disks(&self, cluster: &ClusterName, machines: &[MachineName]) -> Result<(), ProviderError> {
        let machines = machines.to_vec();
        self.change(cluster, move |_, dir, _| machines::remove_disks(dir, &machines))
            .await
    }

    async fn ensure_machines(
        &self,
        cluster: &ClusterName,
        want: &[MachineSpec],
    ) -> Result<Vec<Machine>, ProviderError> {
        let want: Vec<_> = want.iter().map(|spec| (spec.clone(), None)).collect();
        self.change(cluster, move |config, dir, lock| {
            machines::ensure(config, dir, &want, lock)
        })
        .await
    }

    async fn remove_machines(&self, cluster: &ClusterName, machines: &[MachineName]) -> Result<(), ProviderError> {
        let machines = machines.to_vec();
        self.change(cluster, move |_, dir, lock| machines::remove(dir, &machines, lock))
            .await
    }

    async fn leftovers(&self, cluster: &ClusterName) -> Result<Vec<Leftover>, ProviderError> {
        self.read(cluster, |_, dir| leftovers::list(dir)).await
    }

    async fn console(&self, cluster: &ClusterName, machine: &MachineName) -> Result<Option<String>, ProviderError> {
        let machine = machine.clone();
        self.read(cluster, move |_, dir| machines::console(dir, &machine)).await
    }
}

/// A data disk is a directory: its size is the file system's.
fn disk(dir: &ClusterDir, machine: MachineName) -> Disk {
    Disk {
        id: dir.disk(&machine).into_string(),
        machine,
        size_gib: None,
        volume: DataVolume::Directory(init::DATA.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_which_capability_is_missing() {
        let status = |hex: &str| format!("Name:\tx\nCapPrm:\tffffffffffffffff\nCapEff:\t{hex}\n");
        assert_eq!(missing_capability(&status("000001ffffffffff")), None);
        assert_eq!(missing_capability(&status("0000000000000000")), Some("CAP_NET_ADMIN"));
        assert_eq!(missing_capability(&status("0000000000001000")), Some("CAP_SYS_ADMIN"));
        assert_eq!(missing_capability("nothing of the kind"), Some("CAP_NET_ADMIN"));
    }
}
