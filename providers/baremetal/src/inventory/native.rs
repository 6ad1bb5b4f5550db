//! kprov's own form of an inventory.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use camino::Utf8Path;
use kprov_types::{MachineName, Role};
use schemars::JsonSchema;
use serde::Deserialize;

use super::error::{InventoryError, Place};
use super::host::{Bmc, DiskMatch, Host, Ssh};
use super::yaml::{self, Node, Value};
use super::{Parsed, machine_name};

/// The `apiVersion` of an inventory file.
pub(super) const API_VERSION: &str = "kprov.io/v1alpha1";
/// The `kind` of an inventory file.
pub(super) const KIND: &str = "Inventory";

/// A kprov inventory file as written.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(title = "kprov inventory file")]
pub struct InventoryFile {
    /// `kprov.io/v1alpha1`.
    api_version: String,
    /// `Inventory`.
    kind: String,
    /// What holds for every host that doesn't say otherwise.
    #[serde(default)]
    defaults: Defaults,
    /// The hosts.
    hosts: Vec<FileHost>,
}

/// What holds for every host that doesn't say otherwise.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
struct Defaults {
    /// How hosts are reached by SSH.
    ssh: FileSsh,
}

/// A host.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct FileHost {
    /// Its name: a DNS label. The machine and its Node are called so.
    name: String,
    /// `control-plane` or `worker`.
    #[serde(default = "worker")]
    role: Role,
    /// Its address inside the cluster; what it sends from by default where left out.
    #[serde(default)]
    #[schemars(with = "Option<String>")]
    address: Option<Ipv4Addr>,
    /// Its failure domain, such as a rack: the label `topology.kubernetes.io/zone` of its Node.
    #[serde(default)]
    zone: Option<String>,
    /// Labels of its Node.
    #[serde(default)]
    labels: BTreeMap<String, String>,
    /// How it's reached by SSH. Leave it out for a host that has only a BMC.
    #[serde(default)]
    ssh: Option<FileSsh>,
    /// Its management controller (Redfish), for a host without an operating system.
    #[serde(default)]
    bmc: Option<Bmc>,
    /// Its data disk for etcd; a directory of its root file system where left out.
    #[serde(default)]
    disk: Option<DiskMatch>,
}

/// How a host is reached by SSH. What is left out is taken as `ssh` takes it.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
struct FileSsh {
    /// Name or address to connect to; the host's address, else its name, where left out.
    host: Option<String>,
    /// TCP port.
    port: Option<u16>,
    /// The user to log in as.
    user: Option<String>,
    /// Private key file, relative to the inventory file.
    key: Option<String>,
    /// The host's public key (`ssh-ed25519 AAAA...`): the only one accepted then. Else it has to stand in `known_hosts`.
    host_key: Option<String>,
    /// Hosts to go through, in this order: `[user@]host[:port]`.
    jump: Option<Vec<String>>,
    /// Further arguments for `ssh`.
    args: Option<Vec<String>>,
    /// Whether `sudo` may be used where the user is not root; it may by default.
    sudo: Option<bool>,
}

const fn worker() -> Role {
    Role::Worker
}

/// Whether a document says of itself that it is one.
pub(super) fn is_native(document: &Node) -> bool {
    document.get("kind").map(|kind| &kind.value) == Some(&Value::Scalar(KIND.into())) || document.get("hosts").is_some()
}

/// Parses a file.
pub(super) fn parse(file: &Utf8Path, text: &str, document: &Node) -> Result<Parsed, InventoryError> {
    let read: InventoryFile = serde_saphyr::from_str(text).map_err(|error| {
        let error = yaml::syntax(file, &error);
        let error = match host_at(document, error.place.line) {
            Some(host) => error.of(&host),
            None => error,
        };
        error.hint("`kprov inventory schema` prints what an inventory file may say")
    })?;
    let InventoryFile {
        api_version,
        kind,
        defaults,
        hosts,
    } = read;
    let line = |name: &str| document.get(name).map_or(1, |node| node.line);
    if api_version != API_VERSION {
        return Err(InventoryError::new(
            &Place::new(file, line("apiVersion")),
            format!("`{api_version}` is not known; expected `{API_VERSION}`"),
        ));
    }
    if kind != KIND {
        return Err(InventoryError::new(
            &Place::new(file, line("kind")),
            format!("`{kind}` is not known; expected `{KIND}`"),
        ));
    }
    let nodes = host_nodes(document);
    let mut parsed = Parsed::default();
    for (index, read) in hosts.into_iter().enumerate() {
        let place = Place::new(file, nodes.get(index).map_or(0, |node| node.line));
        parsed.hosts.push((host(read, &defaults, &place)?, place));
    }
    Ok(parsed)
}

fn host_nodes(document: &Node) -> &[Node] {
    match document.get("hosts").map(|hosts| &hosts.value) {
        Some(Value::List(nodes)) => nodes,
        _ => &[],
    }
}

/// The name of the host that a line belongs to: the last one that begins there or before, where nothing but hosts follows them.
fn host_at(document: &Node, line: usize) -> Option<String> {
    let end = document.entries()?.iter().map(|(key, _)| key.line);
    let hosts = document.entries()?.iter().find(|(key, _)| key.name == "hosts")?.0.line;
    if line <= hosts || end.into_iter().any(|next| next > hosts && next <= line) {
        return None;
    }
    let node = host_nodes(document).iter().rev().find(|node| node.line <= line)?;
    match &node.get("name")?.value {
        Value::Scalar(name) => Some(name.clone()),
        _ => None,
    }
}

fn host(read: FileHost, defaults: &Defaults, place: &Place) -> Result<Host, InventoryError> {
    let FileHost {
        name,
        role,
        address,
        zone,
        labels,
        ssh,
        bmc,
        disk,
    } = read;
    let name: MachineName = machine_name(&name, place)?;
    // A host that has nothing but a BMC has no operating system to log in to yet.
    let ssh = match (ssh, &bmc) {
        (None, Some(_)) => None,
        (ssh, _) => Some(ssh.unwrap_or_default().over(&defaults.ssh, &name, address)),
    };
    if let Some(Ssh {
        host_key: Some(key), ..
    }) = &ssh
        && key.split_whitespace().count() < 2
    {
        return Err(InventoryError::new(place, "`ssh.hostKey` is not a public key")
            .of(name.as_str())
            .hint(
                "write type and key, such as `ssh-ed25519 AAAA...`, as `ssh-keyscan` prints them after the host's name",
            ));
    }
    let external_address = ssh
        .as_ref()
        .and_then(|ssh| ssh.host.parse().ok())
        .filter(|external| Some(*external) != address);
    Ok(Host {
        address: address.or(external_address),
        external_address: external_address.filter(|_| address.is_some()),
        name,
        role,
        zone,
        labels,
        ssh,
        bmc,
        disk,
    })
}

impl FileSsh {
    fn over(self, defaults: &Self, name: &MachineName, address: Option<Ipv4Addr>) -> Ssh {
        let Self {
            host,
            port,
            user,
            key,
            host_key,
            jump,
            args,
            sudo,
        } = self;
        let address = || address.map(|address| address.to_string());
        Ssh {
            host: host.or_else(address).unwrap_or_else(|| name.to_string()),
            port: port.or(defaults.port),
            user: user.or_else(|| defaults.user.clone()),
            key: key.or_else(|| defaults.key.clone()),
            host_key: host_key.or_else(|| defaults.host_key.clone()),
            jump: jump.or_else(|| defaults.jump.clone()).unwrap_or_default(),
            args: args.or_else(|| defaults.args.clone()).unwrap_or_default(),
            sudo: sudo.or(defaults.sudo).unwrap_or(true),
        }
    }
}
