//! What a harness asks for that makes another's machines real: a cloud emulator has given them addresses already, attaches
//! disks to them while they run, and stops them. Nothing of this is part of the provider trait.

use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use camino::{Utf8Path, Utf8PathBuf};
use kprov_provider::ProviderError;
use kprov_types::machine::{Machine, MachineSpec};
use kprov_types::{ClusterName, MachineName};
use nix::sys::stat::{Mode, SFlag, mknod};

use crate::error::LocalError;
use crate::state::ClusterDir;
use crate::{LocalProvider, link, machines, naming};

impl LocalProvider {
    /// Ensures machines as [`kprov_provider::Provider::ensure_machines`] does, each new one at the address given, which must be in
    /// the network's range and no other machine's.
    pub async fn ensure_machines_at(
        &self,
        cluster: &ClusterName,
        want: &[(MachineSpec, Ipv4Addr)],
    ) -> Result<Vec<Machine>, ProviderError> {
        let want: Vec<_> = want.iter().map(|(spec, at)| (spec.clone(), Some(*at))).collect();
        self.change(cluster, move |config, dir, lock| {
            machines::ensure(config, dir, &want, lock)
        })
        .await
    }

    /// Cuts a machine's power; `ensure_machines` starts it again with what it has written. Done already is success.
    pub async fn stop_machine(&self, cluster: &ClusterName, machine: &MachineName) -> Result<(), ProviderError> {
        let machine = machine.clone();
        self.change(cluster, move |_, dir, _| machines::stop(dir, &machine))
            .await
    }

    /// Shows a block device of this host at a path inside a machine that runs, below `/dev`; until it stops. Done already is success.
    pub async fn attach_device(
        &self,
        cluster: &ClusterName,
        machine: &MachineName,
        device: &Utf8Path,
        inside: &Utf8Path,
    ) -> Result<(), ProviderError> {
        let (machine, device, inside) = (machine.clone(), device.to_owned(), inside.to_owned());
        self.change(cluster, move |_, dir, _| attach(dir, &machine, &device, &inside))
            .await
    }

    /// Gives the host another address in a cluster's network, for what stands in for a load balancer there. It goes with the
    /// network. Done already is success.
    pub async fn add_host_address(&self, cluster: &ClusterName, address: Ipv4Addr) -> Result<(), ProviderError> {
        self.change(cluster, move |_, dir, lock| {
            let network = dir.network()?.ok_or_else(|| LocalError::NoNetwork {
                cluster: dir.cluster.clone(),
            })?;
            let bridge = naming::bridge(&dir.cluster);
            let prefix = network.range.prefix_len();
            link::batch(
                &[format!("address replace {address}/{prefix} dev {bridge}")],
                lock.file(),
            )
        })
        .await
    }

    /// The first process of a machine that runs, as this host knows it.
    pub async fn first_process(
        &self,
        cluster: &ClusterName,
        machine: &MachineName,
    ) -> Result<Option<i32>, ProviderError> {
        let machine = machine.clone();
        self.read(cluster, move |_, dir| machines::init_of(dir, &machine)).await
    }
}

/// Makes the device file in the machine's own `/dev`, which is reached through its first process.
fn attach(dir: &ClusterDir, machine: &MachineName, device: &Utf8Path, inside: &Utf8Path) -> Result<(), LocalError> {
    let found = fs::metadata(device).map_err(LocalError::io("look at", device))?;
    let below = inside
        .strip_prefix("/dev")
        .ok()
        .filter(|_| found.file_type().is_block_device());
    let init = machines::init_of(dir, machine)?;
    let (Some(below), Some(init)) = (below, init) else {
        return Err(LocalError::NotAttached {
            machine: machine.clone(),
            device: device.to_string(),
            inside: inside.to_string(),
        });
    };
    let place = Utf8PathBuf::from(format!("/proc/{init}/root/dev")).join(below);
    match fs::symlink_metadata(&place) {
        Ok(there) if there.file_type().is_block_device() && there.rdev() == found.rdev() => return Ok(()),
        Ok(_) => fs::remove_file(&place).map_err(LocalError::io("remove", &place))?,
        Err(_) => {}
    }
    if let Some(parent) = place.parent() {
        fs::create_dir_all(parent).map_err(LocalError::io("make the directory", parent))?;
    }
    let mode = Mode::from_bits_truncate(0o660);
    mknod(place.as_std_path(), SFlag::S_IFBLK, mode, found.rdev())
        .map_err(|e| LocalError::io("make the device", &place)(e.into()))
}
