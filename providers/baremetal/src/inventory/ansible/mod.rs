//! Ansible inventories as kubespray uses them: groups tell roles, variables tell how hosts are reached.

mod groups;
mod ini;
mod range;
mod words;
mod yaml;

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use camino::Utf8Path;
use kprov_types::Role;

use self::groups::{ALL, Groups, Var, Vars};
use super::error::{InventoryError, Place};
use super::host::{DiskMatch, Host, Ssh};
use super::yaml::{Node, Value};
use super::{Files, Parsed, machine_name};

/// Names of the control-plane group, today's first.
const CONTROL_PLANE: &[&str] = &["kube_control_plane", "kube-control-plane", "kube-master", "kube_master"];
/// Names of the workers' group.
const WORKERS: &[&str] = &["kube_node", "kube-node"];
/// The group of etcd's hosts.
const ETCD: &str = "etcd";
/// The group of hosts that are only gone through.
const BASTION: &str = "bastion";
/// Variables that would hold a password.
const PASSWORDS: &[&str] = &[
    "ansible_password",
    "ansible_ssh_pass",
    "ansible_become_pass",
    "ansible_become_password",
    "ansible_sudo_pass",
];

/// A YAML inventory.
pub(super) fn from_yaml(files: &dyn Files, path: &Utf8Path, document: &Node) -> Result<Parsed, InventoryError> {
    hosts(files, path, yaml::parse(path, document)?)
}

/// An INI inventory.
pub(super) fn from_ini(files: &dyn Files, path: &Utf8Path, text: &str) -> Result<Parsed, InventoryError> {
    hosts(files, path, ini::parse(path, text)?)
}

/// What a host is, by its groups.
enum Part {
    ControlPlane {
        runs_pods: bool,
    },
    Worker,
    Bastion,
    /// The machine that Ansible runs on, say.
    None,
}

fn hosts(files: &dyn Files, path: &Utf8Path, mut groups: Groups) -> Result<Parsed, InventoryError> {
    groups.read_vars(files, path)?;
    groups.check()?;
    let mut parsed = Parsed::default();
    let mut bastion = None;
    let mut all_run_pods = true;
    let mut etcd = BTreeSet::new();
    for (name, place) in &groups.order {
        let vars = Of {
            name,
            vars: groups.vars(name),
            place,
        };
        let of = groups.of(name);
        if of.contains(ETCD) {
            etcd.insert(name.as_str());
        }
        let role = match part(&groups, &vars, &of)? {
            Part::ControlPlane { runs_pods } => {
                all_run_pods &= runs_pods;
                Role::ControlPlane
            }
            Part::Worker => Role::Worker,
            Part::Bastion => {
                bastion = Some(vars.ssh()?);
                continue;
            }
            Part::None => continue,
        };
        parsed.hosts.push((vars.host(role)?, place.clone()));
    }
    check_etcd(&parsed, &etcd, path)?;
    if let Some(bastion) = bastion {
        for ssh in parsed.hosts.iter_mut().filter_map(|(host, _)| host.ssh.as_mut()) {
            go_through(ssh, &bastion);
        }
    }
    let control_plane = parsed.hosts.iter().any(|(host, _)| host.role == Role::ControlPlane);
    parsed.schedulable = control_plane && all_run_pods;
    Ok(parsed)
}

fn part(groups: &Groups, host: &Of<'_>, of: &BTreeSet<&str>) -> Result<Part, InventoryError> {
    let any = |names: &[&str]| names.iter().any(|name| of.contains(name));
    if any(CONTROL_PLANE) {
        return Ok(Part::ControlPlane {
            runs_pods: any(WORKERS),
        });
    }
    if any(WORKERS) {
        return Ok(Part::Worker);
    }
    if of.contains(BASTION) {
        return Ok(Part::Bastion);
    }
    if host
        .text(&["ansible_connection"])?
        .is_some_and(|(connection, _)| connection == "local")
    {
        return Ok(Part::None);
    }
    if of.contains(ETCD) {
        return Err(host.wrong(
            "it is in the group `etcd` and not in `kube_control_plane`: kprov runs etcd on the control-plane hosts, and nowhere else",
        ).hint("make the groups `etcd` and `kube_control_plane` equal"));
    }
    let named: Vec<String> = of
        .iter()
        .filter(|group| **group != ALL && groups.groups.get(**group).is_some_and(|g| !g.hosts.is_empty()))
        .map(|group| format!("`{group}`"))
        .collect();
    let where_it_is = match named.as_slice() {
        [] => "it is in no group".to_owned(),
        [one] => format!("it is in the group {one}, which says nothing of its role"),
        more => format!("it is in the groups {}, which say nothing of its role", more.join(", ")),
    };
    Err(host
        .wrong(where_it_is)
        .hint("put it into `kube_control_plane` or `kube_node` (or their old names `kube-master` and `kube-node`), or take it out"))
}

/// kprov runs etcd on control-plane hosts: an inventory that wants it elsewhere is refused rather than misread.
fn check_etcd(parsed: &Parsed, etcd: &BTreeSet<&str>, path: &Utf8Path) -> Result<(), InventoryError> {
    if etcd.is_empty() {
        return Ok(());
    }
    for (host, place) in &parsed.hosts {
        let (name, member) = (host.name.as_str(), etcd.contains(host.name.as_str()));
        let wrong = match (host.role, member) {
            (Role::ControlPlane, false) => "it is in `kube_control_plane` and not in `etcd`",
            (Role::Worker, true) => "it is in `etcd` and not in `kube_control_plane`",
            _ => continue,
        };
        return Err(InventoryError::new(
            place,
            format!("{wrong}: kprov runs etcd on the control-plane hosts, and nowhere else"),
        )
        .of(name)
        .hint(format!(
            "make the groups `etcd` and `kube_control_plane` of `{path}` equal"
        )));
    }
    Ok(())
}

/// As kubespray does for a group `bastion`: all other hosts are reached through it.
fn go_through(ssh: &mut Ssh, bastion: &Ssh) {
    if !ssh.jump.is_empty() || ssh.args.iter().any(|arg| arg.contains("ProxyCommand")) {
        return;
    }
    let user = bastion.user.as_ref().map(|user| format!("{user}@")).unwrap_or_default();
    let port = bastion.port.map(|port| format!(":{port}")).unwrap_or_default();
    ssh.jump = vec![format!("{user}{}{port}", bastion.host)];
}

/// A host with the variables that hold for it.
struct Of<'a> {
    name: &'a str,
    vars: Vars,
    place: &'a Place,
}

impl Of<'_> {
    fn wrong(&self, message: impl Into<String>) -> InventoryError {
        InventoryError::new(self.place, message).of(self.name)
    }

    /// The first of these variables that is set.
    fn var(&self, names: &[&str]) -> Option<(&Var, String)> {
        names
            .iter()
            .find_map(|name| self.vars.get(*name).map(|var| (var, (*name).to_owned())))
            .filter(|(var, _)| var.value != Value::Null)
    }

    fn bad(&self, var: &Var, message: impl Into<String>) -> InventoryError {
        InventoryError::new(&var.place, message)
            .of(self.name)
            .hint("correct the variable there")
    }

    /// The text of the first of these variables that is set.
    fn text(&self, names: &[&str]) -> Result<Option<(String, &Var)>, InventoryError> {
        let Some((var, name)) = self.var(names) else {
            return Ok(None);
        };
        let text = match &var.value {
            Value::Scalar(text) => text.clone(),
            Value::Bool(value) => value.to_string(),
            _ => return Err(self.bad(var, format!("`{name}` has to be a text"))),
        };
        if text.contains("{{") {
            return Err(self
                .bad(
                    var,
                    format!("`{name}` is the template `{text}`, which only Ansible can fill in"),
                )
                .hint("write the value itself"));
        }
        Ok(Some((text, var)))
    }

    fn flag(&self, name: &str) -> Result<Option<bool>, InventoryError> {
        let Some((text, var)) = self.text(&[name])? else {
            return Ok(None);
        };
        match text.to_lowercase().as_str() {
            "true" | "yes" | "on" | "1" => Ok(Some(true)),
            "false" | "no" | "off" | "0" => Ok(Some(false)),
            _ => Err(self.bad(var, format!("`{name}` is `{text}`, neither true nor false"))),
        }
    }

    fn address(&self, name: &str) -> Result<Option<Ipv4Addr>, InventoryError> {
        self.text(&[name])?
            .map(|(text, var)| {
                text.parse()
                    .map_err(|_| self.bad(var, format!("`{name}` is `{text}`, which is no IPv4 address")))
            })
            .transpose()
    }

    fn host(&self, role: Role) -> Result<Host, InventoryError> {
        let ssh = self.ssh()?;
        let reached: Option<Ipv4Addr> = ssh.host.parse().ok();
        let address = self.address("ip")?.or(self.address("access_ip")?).or(reached);
        let external = match reached {
            Some(reached) => Some(reached),
            None => self.address("access_ip")?,
        };
        Ok(Host {
            name: machine_name(self.name, self.place)?,
            role,
            address,
            external_address: external.filter(|external| Some(*external) != address),
            zone: self.text(&["kprov_zone"])?.map(|(zone, _)| zone),
            labels: self.labels()?,
            ssh: Some(ssh),
            bmc: None,
            disk: self.disk()?,
        })
    }

    fn ssh(&self) -> Result<Ssh, InventoryError> {
        for name in PASSWORDS {
            if let Some(var) = self.vars.get(*name) {
                return Err(self
                    .bad(var, format!("`{name}` holds a password, and kprov takes none"))
                    .hint("log in with a key, and let the user run `sudo` without a password (`NOPASSWD`)"));
            }
        }
        if let Some((method, var)) = self.text(&["ansible_become_method"])?
            && method != "sudo"
        {
            return Err(self.bad(
                var,
                format!("`ansible_become_method` is `{method}`; kprov uses `sudo` only"),
            ));
        }
        if let Some((connection, var)) = self.text(&["ansible_connection"])?
            && !matches!(connection.as_str(), "ssh" | "smart" | "paramiko" | "paramiko_ssh")
        {
            return Err(self.bad(
                var,
                format!("`ansible_connection` is `{connection}`; kprov reaches hosts by `ssh` only"),
            ));
        }
        let port = match self.text(&["ansible_port", "ansible_ssh_port"])? {
            None => None,
            Some((text, var)) => Some(
                text.parse()
                    .map_err(|_| self.bad(var, format!("`ansible_port` is `{text}`, which is no port")))?,
            ),
        };
        let mut ssh = Ssh {
            host: self
                .text(&["ansible_host", "ansible_ssh_host"])?
                .map_or_else(|| self.name.to_owned(), |(host, _)| host),
            port,
            user: self.text(&["ansible_user", "ansible_ssh_user"])?.map(|(user, _)| user),
            key: self
                .text(&["ansible_ssh_private_key_file", "ansible_private_key_file"])?
                .map(|(key, _)| key),
            host_key: self.text(&["kprov_host_key"])?.map(|(key, _)| key),
            jump: Vec::new(),
            args: Vec::new(),
            sudo: self.flag("ansible_become")?.unwrap_or(true),
        };
        for name in ["ansible_ssh_common_args", "ansible_ssh_extra_args"] {
            if let Some((text, var)) = self.text(&[name])? {
                let arguments = words::split(&text).map_err(|why| self.bad(var, format!("`{name}`: {why}")))?;
                take_jumps(arguments, &mut ssh);
            }
        }
        Ok(ssh)
    }

    fn labels(&self) -> Result<BTreeMap<String, String>, InventoryError> {
        let Some((var, name)) = self.var(&["node_labels"]) else {
            return Ok(BTreeMap::new());
        };
        let Value::Map(entries) = &var.value else {
            return Err(self.bad(var, format!("`{name}` has to be a map")));
        };
        let label = |(key, node): &(super::yaml::Key, Node)| match &node.value {
            Value::Scalar(text) => Ok((key.name.clone(), text.clone())),
            Value::Bool(value) => Ok((key.name.clone(), value.to_string())),
            Value::Null => Ok((key.name.clone(), String::new())),
            _ => Err(self.bad(var, format!("the label `{}` has to be a text", key.name))),
        };
        entries.iter().map(label).collect()
    }

    /// `kprov_disk`: a path, or a map as in kprov's own inventories.
    fn disk(&self) -> Result<Option<DiskMatch>, InventoryError> {
        let Some((var, name)) = self.var(&["kprov_disk"]) else {
            return Ok(None);
        };
        if let Value::Scalar(path) = &var.value {
            return Ok(Some(DiskMatch {
                path: Some(path.clone()),
                ..DiskMatch::default()
            }));
        }
        let Value::Map(entries) = &var.value else {
            return Err(self.bad(var, format!("`{name}` has to be a path or a map")));
        };
        let mut disk = DiskMatch::default();
        for (key, node) in entries {
            let Value::Scalar(text) = &node.value else {
                return Err(self.bad(var, format!("`{name}.{}` has to be a text or a number", key.name)));
            };
            let number = || {
                text.parse()
                    .map(Some)
                    .map_err(|_| self.bad(var, format!("`{name}.{}` is `{text}`, which is no number", key.name)))
            };
            match key.name.as_str() {
                "path" => disk.path = Some(text.clone()),
                "model" => disk.model = Some(text.clone()),
                "serial" => disk.serial = Some(text.clone()),
                "minGib" => disk.min_gib = number()?,
                "maxGib" => disk.max_gib = number()?,
                other => {
                    return Err(self
                        .bad(var, format!("`{name}` has `{other}`, which is not known"))
                        .hint("there are `path`, `model`, `serial`, `minGib` and `maxGib`"));
                }
            }
        }
        Ok(Some(disk))
    }
}

/// Takes jump hosts out of arguments for `ssh`, as kprov checks their keys too; the rest stays as it is.
fn take_jumps(arguments: Vec<String>, ssh: &mut Ssh) {
    let mut arguments = arguments.into_iter();
    while let Some(argument) = arguments.next() {
        let jump = if argument == "-J" {
            arguments.next()
        } else if argument == "-o" {
            match arguments.next() {
                Some(option) => {
                    let Some(jump) = proxy_jump(&option) else {
                        ssh.args.extend([argument, option]);
                        continue;
                    };
                    Some(jump)
                }
                None => None,
            }
        } else if let Some(jump) = argument.strip_prefix("-J") {
            Some(jump.to_owned())
        } else if let Some(jump) = argument.strip_prefix("-o").and_then(proxy_jump) {
            Some(jump)
        } else {
            ssh.args.push(argument);
            continue;
        };
        ssh.jump = jump
            .map(|jump| jump.split(',').map(str::trim).map(str::to_owned).collect())
            .unwrap_or_default();
    }
}

fn proxy_jump(option: &str) -> Option<String> {
    let (name, value) = option.trim().split_once(['=', ' '])?;
    name.trim()
        .eq_ignore_ascii_case("proxyjump")
        .then(|| value.trim().to_owned())
}
