//! What an inventory says of a host, whatever form it was written in. Kept with the cluster as it stands here, so that
//! `status` and `down` work when the file has moved: it refers to secrets, and never holds one.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use kprov_types::{MachineName, Role};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The hosts of a cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Inventory {
    /// The hosts, in the order of the file.
    pub hosts: Vec<Host>,
    /// Whether every control-plane host is meant to run ordinary pods too.
    #[serde(default)]
    pub schedulable: bool,
}

impl Inventory {
    /// A host by its name.
    pub fn host(&self, name: &str) -> Option<&Host> {
        self.hosts.iter().find(|host| host.name.as_str() == name)
    }
}

/// A host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Host {
    /// Its name, which the machine and its Node get.
    pub name: MachineName,
    /// What it's for.
    pub role: Role,
    /// Its address inside the cluster; what it sends from by default where the inventory leaves that open.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<Ipv4Addr>,
    /// Where `kprov` reaches it, if that is another address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub external_address: Option<Ipv4Addr>,
    /// Its failure domain, such as a rack.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zone: Option<String>,
    /// Labels of its Node.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// How it's reached by SSH; a host with a BMC alone has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ssh: Option<Ssh>,
    /// Its management controller.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bmc: Option<Bmc>,
    /// Its data disk for etcd; a directory of its root file system where there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<DiskMatch>,
}

/// How a host is reached by SSH. What is left out is taken as `ssh` takes it: from its configuration, the agent, the defaults.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Ssh {
    /// Name or address to connect to.
    pub host: String,
    /// TCP port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// The user to log in as.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Private key file; absolute, or beginning with `~/`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// The host's public key, as in `known_hosts` without the name: the only one accepted then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_key: Option<String>,
    /// Hosts to go through, in this order: `[user@]host[:port]`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub jump: Vec<String>,
    /// Further arguments for `ssh`. They can't weaken the check of host keys.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub args: Vec<String>,
    /// Whether `sudo` may be used where the user is not root.
    #[serde(default = "yes", skip_serializing_if = "is_true")]
    pub sudo: bool,
}

/// A management controller that speaks Redfish.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Bmc {
    /// Its URL, such as `https://10.0.9.11`.
    pub address: String,
    /// Where user name and password are found.
    pub credentials: Credentials,
    /// The system's id, where the controller manages several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system: Option<String>,
    /// Certificates (PEM) that the controller's own is checked against; the system's where left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<String>,
    /// Accept whatever certificate the controller shows.
    #[serde(default, skip_serializing_if = "is_false")]
    pub insecure: bool,
    /// The hardware address of the interface that boots from the network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
}

/// Where a user name and a password are found, as `user:password`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub enum Credentials {
    /// In this file, which only its owner may read.
    File(String),
    /// In this environment variable.
    Env(String),
}

/// Which disk becomes the data disk. Exactly one disk must fit, and it must hold nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct DiskMatch {
    /// Its stable path, such as `/dev/disk/by-id/nvme-...`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// Part of its model's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Its serial number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// At least this size, in GiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_gib: Option<u32>,
    /// At most this size, in GiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_gib: Option<u32>,
}

const fn yes() -> bool {
    true
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
const fn is_true(value: &bool) -> bool {
    *value
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
const fn is_false(value: &bool) -> bool {
    !*value
}
