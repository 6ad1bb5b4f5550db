//! Inventory files: kprov's own (YAML), and Ansible's as they are (YAML and INI, with group and host variables).
//!
//! Parsing is pure: files are read through [`Files`]. Every error carries file, line and host.

mod ansible;
mod error;
mod host;
mod native;
mod yaml;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::io;

use camino::{Utf8Path, Utf8PathBuf};
use kprov_types::{MachineName, Role};

pub use error::{InventoryError, Place};
pub use host::{Bmc, Credentials, DiskMatch, Host, Inventory, Ssh};
pub use native::InventoryFile;

/// Where an inventory's files are read from.
pub trait Files {
    /// A file's text; `None` where there is no such file.
    fn read(&self, path: &Utf8Path) -> io::Result<Option<String>>;

    /// The files right in a directory, sorted by name; none where there is no such directory.
    fn list(&self, directory: &Utf8Path) -> io::Result<Vec<Utf8PathBuf>>;
}

/// The files of this machine.
#[derive(Clone, Copy, Debug)]
pub struct Disk;

impl Files for Disk {
    fn read(&self, path: &Utf8Path) -> io::Result<Option<String>> {
        match std::fs::read_to_string(path) {
            Ok(text) => Ok(Some(text)),
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn list(&self, directory: &Utf8Path) -> io::Result<Vec<Utf8PathBuf>> {
        let entries = match directory.read_dir_utf8() {
            Ok(entries) => entries,
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                return Ok(Vec::new());
            }
            Err(e) => return Err(e),
        };
        let mut paths = Vec::new();
        for entry in entries {
            let entry = entry?;
            if entry.path().is_file() {
                paths.push(entry.into_path());
            }
        }
        paths.sort();
        Ok(paths)
    }
}

/// Hosts as read, each with its place, before they are checked against each other.
#[derive(Debug, Default)]
struct Parsed {
    hosts: Vec<(Host, Place)>,
    schedulable: bool,
}

/// Reads an inventory: kprov's own, or Ansible's.
pub fn load(files: &dyn Files, path: &Utf8Path) -> Result<Inventory, InventoryError> {
    let nowhere = Place::new(path, 0);
    let text = files
        .read(path)
        .map_err(|e| InventoryError::new(&nowhere, format!("can't be read: {e}")))?
        .ok_or_else(|| {
            InventoryError::new(&nowhere, "there is no such inventory file")
                .hint("give the path of a kprov inventory, or of an Ansible inventory (YAML or INI)")
        })?;
    let parsed = if is_yaml(path, &text) {
        let document = yaml::parse(path, &text)?;
        if native::is_native(&document) {
            native::parse(path, &text, &document)?
        } else {
            ansible::from_yaml(files, path, &document)?
        }
    } else {
        ansible::from_ini(files, path, &text)?
    };
    let mut inventory = check(path, parsed)?;
    for ssh in inventory.hosts.iter_mut().filter_map(|host| host.ssh.as_mut()) {
        ssh.key = ssh.key.take().map(|key| absolute(path, &key));
    }
    Ok(inventory)
}

/// By the name where it tells; Ansible's YAML begins with a map, its INI with a section or a host.
fn is_yaml(path: &Utf8Path, text: &str) -> bool {
    match path.extension() {
        Some("yaml" | "yml" | "json") => true,
        Some("ini" | "cfg") => false,
        _ => text
            .lines()
            .map(str::trim)
            .find(|line| !line.is_empty() && !line.starts_with(['#', ';']))
            .is_some_and(|line| line.starts_with("---") || line.starts_with('{') || line.ends_with(':')),
    }
}

/// A key's path as it will be found from anywhere.
fn absolute(inventory: &Utf8Path, key: &str) -> String {
    if key.starts_with('/') || key.starts_with('~') {
        return key.to_owned();
    }
    let directory = inventory.parent().unwrap_or(Utf8Path::new(""));
    let path = directory.join(key);
    camino::absolute_utf8(&path).unwrap_or(path).into_string()
}

fn machine_name(name: &str, place: &Place) -> Result<MachineName, InventoryError> {
    MachineName::new(name).map_err(|error| {
        InventoryError::new(place, format!("the name can't be a machine's: {error}"))
            .of(name)
            .hint("use a short name of lower-case letters, digits and `-`; the address goes into `address` or `ansible_host`")
    })
}

/// Checks hosts against each other.
fn check(path: &Utf8Path, parsed: Parsed) -> Result<Inventory, InventoryError> {
    let Parsed { hosts, schedulable } = parsed;
    let whole = Place::new(path, 0);
    if hosts.is_empty() {
        return Err(InventoryError::new(&whole, "it names no hosts"));
    }
    let mut names: BTreeMap<&str, &Place> = BTreeMap::new();
    let mut addresses: BTreeMap<String, (&str, &Place)> = BTreeMap::new();
    for (host, place) in &hosts {
        let name = host.name.as_str();
        if let Some(first) = names.insert(name, place) {
            return Err(
                InventoryError::new(place, format!("the name stands in `{first}` already"))
                    .of(name)
                    .hint("give each host a name of its own"),
            );
        }
        let ssh = host
            .ssh
            .as_ref()
            .map(|ssh| format!("{}:{}", ssh.host, ssh.port.unwrap_or(22)));
        let address = host.address.map(|address| address.to_string());
        // Two ports of one address are two hosts behind one router; one address inside the cluster is one host.
        for address in [address, ssh].into_iter().flatten() {
            if let Some((other, at)) = addresses.insert(address.clone(), (name, place))
                && other != name
            {
                return Err(InventoryError::new(
                    place,
                    format!("`{address}` is the address of `{other}` (`{at}`) too"),
                )
                .of(name)
                .hint("give each host an address of its own"));
            }
        }
        if host.ssh.is_none() && host.bmc.is_none() {
            return Err(InventoryError::new(place, "it has neither `ssh` nor `bmc`").of(name));
        }
        for label in host.labels.keys() {
            if !label_is_allowed(label) {
                return Err(
                    InventoryError::new(place, format!("a machine may not give itself the label `{label}`"))
                        .of(name)
                        .hint("set it with `kubectl label node` once the cluster runs"),
                );
            }
        }
        if let Some(disk) = &host.disk
            && *disk == DiskMatch::default()
        {
            return Err(InventoryError::new(place, "`disk` says nothing of the disk")
                .of(name)
                .hint("give its `path`, or `model`, `serial`, `minGib`, `maxGib`"));
        }
    }
    if !hosts.iter().any(|(host, _)| host.role == Role::ControlPlane) {
        return Err(InventoryError::new(&whole, "it has no control-plane host").hint(
            "give 1, 3 or 5 hosts the role `control-plane`, or put them into the group `kube_control_plane` of an Ansible inventory",
        ));
    }
    Ok(Inventory {
        hosts: hosts.into_iter().map(|(host, _)| host).collect(),
        schedulable,
    })
}

/// Whether kubelet may set a label itself (admission plugin `NodeRestriction`): not in Kubernetes' own domains, but for a few.
fn label_is_allowed(label: &str) -> bool {
    const ALLOWED: &[&str] = &[
        "topology.kubernetes.io/zone",
        "topology.kubernetes.io/region",
        "node.kubernetes.io/instance-type",
    ];
    let domain = label.split_once('/').map_or("", |(domain, _)| domain);
    let within = |parent: &str| domain == parent || domain.ends_with(&format!(".{parent}"));
    let own = within("kubelet.kubernetes.io") || within("node.kubernetes.io");
    ALLOWED.contains(&label) || own || !(within("kubernetes.io") || within("k8s.io"))
}
