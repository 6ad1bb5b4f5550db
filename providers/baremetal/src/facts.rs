//! What a host tells of itself.

use std::net::Ipv4Addr;

use kprov_types::machine::{DataVolume, Endpoint};
use kprov_types::{ClusterName, MachineName, Role};
use serde::{Deserialize, Serialize};

use crate::error::Trouble;
use crate::inventory::Host;
use crate::ssh::Reply;

/// The marker of a machine: its tag, as `/etc/kprov/machine.json` has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct MachineMarker {
    pub(crate) cluster: ClusterName,
    pub(crate) name: MachineName,
    pub(crate) role: Role,
    /// The cluster's network, which nothing on the host itself would tell.
    pub(crate) cidr: ipnet::Ipv4Net,
    pub(crate) endpoint: Endpoint,
}

/// The marker of a data disk, as `/etc/kprov/disk.json` has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct DiskMarker {
    pub(crate) cluster: ClusterName,
    pub(crate) machine: MachineName,
    /// The disk that the volume is on, if it has one of its own.
    pub(crate) device: Option<String>,
    pub(crate) volume: DataVolume,
}

impl DiskMarker {
    /// The partition of the disk that the volume is; `None` where it's a directory, or a device as it is.
    pub(crate) fn partition(&self) -> Option<&str> {
        let DataVolume::Device(paths) = &self.volume else {
            return None;
        };
        paths
            .first()
            .filter(|path| Some(*path) != self.device.as_ref())
            .map(String::as_str)
    }
}

/// A host as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// The kind of processor, as `uname -m` has it.
    pub arch: String,
    /// Its operating system, in words.
    pub os: String,
    /// The kernel's version.
    pub kernel: String,
    /// Processors.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Whether systemd is there to start kprov-node.
    pub systemd: bool,
    /// The cluster it belongs to, if any.
    pub cluster: Option<ClusterName>,
    /// Its addresses.
    pub addresses: Vec<Ipv4Addr>,
    /// The address that it sends from by default.
    pub(crate) source: Option<Ipv4Addr>,
    pub(crate) running: bool,
    pub(crate) machine: Option<MachineMarker>,
    pub(crate) disk: Option<DiskMarker>,
    /// What kprov-node would clash with.
    pub(crate) in_use: String,
    /// Programs that are missing.
    pub(crate) missing: String,
    /// What is still there without a marker.
    pub(crate) left: Vec<String>,
}

impl Facts {
    /// Understands a host's answer.
    pub(crate) fn from(reply: &Reply) -> Result<Self, Trouble> {
        let failed = |message: String| Trouble::Failed {
            step: "facts".into(),
            message,
        };
        let machine: Option<MachineMarker> = marker(reply.get("machine"))
            .map_err(|e| failed(format!("`/etc/kprov/machine.json` is not understood: {e}")))?;
        let disk: Option<DiskMarker> =
            marker(reply.get("disk")).map_err(|e| failed(format!("`/etc/kprov/disk.json` is not understood: {e}")))?;
        let arch = reply.get("arch").to_owned();
        if arch.is_empty() {
            return Err(failed("the host doesn't tell what it is".into()));
        }
        Ok(Self {
            arch,
            os: reply.get("os").to_owned(),
            kernel: reply.get("kernel").to_owned(),
            cpus: reply.get("cpus").parse().unwrap_or(0),
            memory_mib: reply.get("memory").parse::<u64>().unwrap_or(0) / 1024,
            systemd: reply.get("init") == "systemd",
            cluster: machine
                .as_ref()
                .map(|m| m.cluster.clone())
                .or_else(|| disk.as_ref().map(|d| d.cluster.clone())),
            addresses: reply
                .get("addresses")
                .split_whitespace()
                .filter_map(|a| a.parse().ok())
                .filter(|a: &Ipv4Addr| !a.is_loopback())
                .collect(),
            source: reply.get("source").parse().ok(),
            running: reply.get("running") == "yes",
            machine,
            disk,
            in_use: reply.get("inuse").trim().replace(' ', ", "),
            missing: reply.get("missing").trim().replace(' ', ", "),
            left: reply.all("left").map(str::to_owned).collect(),
        })
    }

    /// Its address inside the cluster.
    pub(crate) fn address(&self, host: &Host) -> Option<Ipv4Addr> {
        // One that the host doesn't have is a translated one, which only those outside know.
        let own = host.address.filter(|address| self.addresses.contains(address));
        own.or(self.source).or_else(|| self.addresses.first().copied())
    }

    /// What stands against setting it up as a machine of `cluster`, or of any.
    pub(crate) fn check(&self, host: &Host, cluster: Option<&ClusterName>, arch: &str) -> Result<(), Trouble> {
        if let Some(other) = self.cluster.as_ref().filter(|other| Some(*other) != cluster) {
            return Err(Trouble::OtherCluster { cluster: other.clone() });
        }
        if let Some(marker) = &self.machine {
            if marker.name != host.name || marker.role != host.role {
                return Err(Trouble::OtherMachine {
                    name: marker.name.clone(),
                    role: marker.role,
                });
            }
            return Ok(());
        }
        if self.arch != arch {
            return Err(Trouble::Architecture {
                found: self.arch.clone(),
                wanted: arch.to_owned(),
            });
        }
        if !self.missing.is_empty() {
            return Err(Trouble::Lacks(self.missing.clone()));
        }
        if !self.in_use.is_empty() {
            return Err(Trouble::InUse(self.in_use.clone()));
        }
        if let Some(wanted) = host.address.filter(|wanted| !self.addresses.contains(wanted)) {
            let found: Vec<String> = self.addresses.iter().map(|a| format!("`{a}`")).collect();
            // Where it's the address to connect to, it may be a translated one.
            if host.ssh.as_ref().is_some_and(|ssh| ssh.host != wanted.to_string()) {
                return Err(Trouble::Address {
                    wanted: wanted.to_string(),
                    found: if found.is_empty() {
                        "none".into()
                    } else {
                        found.join(", ")
                    },
                });
            }
        }
        Ok(())
    }
}

fn marker<T: serde::de::DeserializeOwned>(text: &str) -> Result<Option<T>, serde_json::Error> {
    if text.is_empty() {
        return Ok(None);
    }
    serde_json::from_str(text).map(Some)
}
