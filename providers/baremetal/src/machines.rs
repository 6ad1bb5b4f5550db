//! One host at a time: its data disk, kprov-node and first-boot data on it, and all of it gone again.

use camino::Utf8Path;
use kprov_types::ClusterName;
use kprov_types::machine::{DataVolume, Disk, Machine, MachineSpec, Network};
use serde::Serialize;
use sha2::{Digest as _, Sha256};

use crate::error::{HostError, Trouble};
use crate::facts::{DiskMarker, Facts, MachineMarker};
use crate::inventory::Host;
use crate::ssh::Input;
use crate::{BaremetalProvider, disk, disks, machine};

/// The data directory of a control-plane host without a data disk.
pub(crate) const DATA: &str = "/var/lib/kprov/data";

/// The kind of processor that kprov-node is for, as `uname -m` has it.
pub(crate) const fn arch() -> &'static str {
    std::env::consts::ARCH
}

fn json(value: &impl Serialize) -> Result<String, Trouble> {
    serde_json::to_string(value).map_err(|e| Trouble::Failed {
        step: "marker".into(),
        message: e.to_string(),
    })
}

impl BaremetalProvider {
    /// Takes a host's data disk, after checking that the host can become a machine at all: nothing is left half done.
    pub(crate) async fn ensure_disk(&self, cluster: &ClusterName, host: &Host) -> Result<Disk, HostError> {
        let facts = self.facts(host).await?;
        let known = facts.disk.as_ref().filter(|marker| marker.cluster == *cluster);
        if let Some(marker) = known
            && facts.machine.is_some()
        {
            return Ok(disk(&host.name, marker.volume.clone()));
        }
        let check = facts.check(host, Some(cluster), arch());
        check.map_err(|trouble| self.of(host, trouble))?;
        // One that is claimed already may have been left without its partition.
        let marker = match known {
            Some(marker) => marker.clone(),
            None => self.new_disk(cluster, host).await?,
        };
        let text = json(&marker).map_err(|trouble| self.of(host, trouble))?;
        let wipe = if self.config.wipe.contains(&host.name) {
            "wipe"
        } else {
            "keep"
        };
        let or_none = |path: Option<&str>| path.unwrap_or("-").to_owned();
        let (device, partition) = (or_none(marker.device.as_deref()), or_none(marker.partition()));
        let arguments = [&device, &partition, wipe, &text];
        self.connections.run(host, "claim", &arguments, Input::Nothing).await?;
        Ok(disk(&host.name, marker.volume))
    }

    /// The data disk that a host is to have.
    async fn new_disk(&self, cluster: &ClusterName, host: &Host) -> Result<DiskMarker, HostError> {
        let device = self.disk_path(host).await?;
        let volume = match &device {
            None => DataVolume::Directory(DATA.into()),
            Some(path) => {
                let partition = self.partition(host, path).await?;
                DataVolume::Device(vec![partition.unwrap_or_else(|| path.clone())])
            }
        };
        Ok(DiskMarker {
            cluster: cluster.clone(),
            machine: host.name.clone(),
            device,
            volume,
        })
    }

    /// The path that the partition of a disk will have; `None` for what is used as it is.
    async fn partition(&self, host: &Host, path: &str) -> Result<Option<String>, HostError> {
        let reply = self.connections.run(host, "kind", &[path], Input::Nothing).await?;
        let whole = reply.get("whole") == "yes";
        Ok(whole.then(|| disks::first_partition(path, reply.get("device"))))
    }

    /// Gives a host's data disk back, empty.
    pub(crate) async fn remove_disk(&self, cluster: &ClusterName, host: &Host) -> Result<(), HostError> {
        let facts = self.facts(host).await?;
        let Some(marker) = facts.disk.filter(|marker| marker.cluster == *cluster) else {
            return Ok(());
        };
        let path = marker.device.unwrap_or_else(|| "-".into());
        self.connections
            .run(host, "release", &[&path], Input::Nothing)
            .await
            .map(drop)
    }

    /// Sets a host up, or starts what was set up and doesn't run.
    pub(crate) async fn ensure_machine(
        &self,
        cluster: &ClusterName,
        network: &Network,
        host: &Host,
        spec: &MachineSpec,
    ) -> Result<Machine, HostError> {
        let facts = self.facts(host).await?;
        let check = facts.check(host, Some(cluster), arch());
        check.map_err(|trouble| self.of(host, trouble))?;
        if !facts.running {
            self.copy_node(host, &spec.first_boot.0).await?;
            let marker = MachineMarker {
                cluster: cluster.clone(),
                name: host.name.clone(),
                role: spec.role,
                cidr: network.cidr,
                endpoint: network.endpoint.clone(),
            };
            let marker = json(&marker).map_err(|trouble| self.of(host, trouble))?;
            let input = Input::Text(&spec.first_boot.0);
            self.connections.run(host, "install", &[&marker], input).await?;
        }
        let facts: Result<Facts, HostError> = self.facts(host).await;
        machine(host, &facts, cluster).ok_or_else(|| {
            let message = "the host shows no marker after it was set up".to_owned();
            let step = "install".to_owned();
            self.of(host, Trouble::Failed { step, message })
        })
    }

    /// Copies kprov-node, where first-boot data ask for the very one that is here: the script then has nothing to fetch.
    async fn copy_node(&self, host: &Host, first_boot: &str) -> Result<(), HostError> {
        let Some(path) = &self.config.node_binary else {
            return Ok(());
        };
        let digest = self.node_digest(path).await.map_err(|e| {
            let message = format!("`{path}` can't be read: {e}");
            let step = "put".to_owned();
            self.of(host, Trouble::Failed { step, message })
        })?;
        if !first_boot.contains(&digest) {
            return Ok(());
        }
        let reply = self.connections.run(host, "has", &[&digest], Input::Nothing).await?;
        if reply.get("here") == "yes" {
            return Ok(());
        }
        let input = Input::File(path);
        self.connections.run(host, "put", &[&digest], input).await.map(drop)
    }

    /// kprov-node's digest, computed once.
    async fn node_digest(&self, path: &Utf8Path) -> std::io::Result<String> {
        let compute = || async {
            let path = path.to_owned();
            tokio::task::spawn_blocking(move || {
                let mut hasher = Sha256::new();
                std::io::copy(&mut std::fs::File::open(&path)?, &mut hasher)?;
                Ok(hex::encode(hasher.finalize()))
            })
            .await
            .map_err(std::io::Error::other)?
        };
        self.node_digest.get_or_try_init(compute).await.cloned()
    }

    /// Removes all that was put on a host, but for its data disk.
    pub(crate) async fn remove_machine(&self, cluster: &ClusterName, host: &Host) -> Result<(), HostError> {
        let facts = self.facts(host).await?;
        let own = facts.machine.as_ref().is_some_and(|marker| marker.cluster == *cluster);
        // What a broken off installation has left has no marker.
        let remains = facts.cluster.is_none() && !facts.left.is_empty();
        if !own && !remains {
            return Ok(());
        }
        self.connections
            .run(host, "remove", &[cluster.as_str()], Input::Nothing)
            .await
            .map(drop)
    }
}
