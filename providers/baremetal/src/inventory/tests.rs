//! Inventories in both forms: what they come to, and what is said of wrong ones.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io;

use camino::{Utf8Path, Utf8PathBuf};
use kprov_types::Role;
use proptest::prelude::*;

use super::{Credentials, DiskMatch, Files, Host, Inventory, InventoryError, load};

/// Files in memory.
#[derive(Default)]
struct Memory(BTreeMap<Utf8PathBuf, String>);

impl Memory {
    fn with(mut self, path: &str, text: &str) -> Self {
        self.0.insert(path.into(), text.to_owned());
        self
    }
}

impl Files for Memory {
    fn read(&self, path: &Utf8Path) -> io::Result<Option<String>> {
        Ok(self.0.get(path).cloned())
    }

    fn list(&self, directory: &Utf8Path) -> io::Result<Vec<Utf8PathBuf>> {
        Ok(self
            .0
            .keys()
            .filter(|path| path.parent() == Some(directory))
            .cloned()
            .collect())
    }
}

fn parse(path: &str, text: &str) -> Result<Inventory, InventoryError> {
    load(&Memory::default().with(path, text), Utf8Path::new(path))
}

fn host<'a>(inventory: &'a Inventory, name: &str) -> &'a Host {
    inventory
        .host(name)
        .unwrap_or_else(|| panic!("no `{name}` in {inventory:#?}"))
}

const NATIVE: &str = "\
apiVersion: kprov.io/v1alpha1
kind: Inventory
defaults:
  ssh:
    user: admin
    key: keys/id_ed25519
    jump: [bastion.example.com]
hosts:
  - name: cp-a
    role: control-plane
    address: 10.0.0.11
    zone: rack1
    labels: {disk: nvme}
    ssh:
      host: 192.0.2.11
      port: 2222
      hostKey: ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIA
    disk: {model: Samsung, minGib: 100}
  - name: w-a
    address: 10.0.0.21
    ssh: {user: root, jump: [], sudo: false}
    bmc:
      address: https://10.0.9.21
      credentials: {env: BMC_LOGIN}
  - name: w-b
    address: 10.0.0.22
    bmc:
      address: https://10.0.9.22
      credentials: {file: /etc/kprov/bmc}
";

#[test]
fn a_native_inventory() {
    let inventory = parse("/i/hosts.yaml", NATIVE).unwrap();
    let cp = host(&inventory, "cp-a");
    assert_eq!((cp.role, cp.zone.as_deref()), (Role::ControlPlane, Some("rack1")));
    assert_eq!(cp.address, Some([10, 0, 0, 11].into()));
    assert_eq!(cp.external_address, Some([192, 0, 2, 11].into()));
    let ssh = cp.ssh.as_ref().unwrap();
    assert_eq!((ssh.host.as_str(), ssh.port), ("192.0.2.11", Some(2222)));
    assert_eq!(ssh.user.as_deref(), Some("admin"));
    assert_eq!(
        ssh.key.as_deref(),
        Some("/i/keys/id_ed25519"),
        "relative to the inventory"
    );
    assert_eq!(ssh.jump, ["bastion.example.com"]);
    assert!(ssh.sudo);
    let disk = DiskMatch {
        model: Some("Samsung".into()),
        min_gib: Some(100),
        ..DiskMatch::default()
    };
    assert_eq!(cp.disk, Some(disk));

    let worker = host(&inventory, "w-a");
    let ssh = worker.ssh.as_ref().unwrap();
    assert_eq!(
        (ssh.host.as_str(), ssh.user.as_deref(), ssh.sudo),
        ("10.0.0.21", Some("root"), false)
    );
    assert!(ssh.jump.is_empty(), "its own word counts");
    assert_eq!(
        worker.bmc.as_ref().unwrap().credentials,
        Credentials::Env("BMC_LOGIN".into())
    );
    assert!(host(&inventory, "w-b").ssh.is_none(), "nothing to log in to");

    // As it is kept with the cluster.
    let kept = serde_json::to_string(&inventory).unwrap();
    assert_eq!(serde_json::from_str::<Inventory>(&kept).unwrap(), inventory);
}

/// The sample inventory that kubespray users begin with, in its own form.
const KUBESPRAY: &str = "\
all:
  hosts:
    node1:
      ansible_host: 95.54.0.12
      ip: 10.3.0.1
      access_ip: 10.3.0.1
    node2: {ansible_host: 95.54.0.13, ip: 10.3.0.2, access_ip: 10.3.0.2}
    node3: {ansible_host: 95.54.0.14, ip: 10.3.0.3, ansible_port: 2022}
  vars:
    ansible_user: ubuntu
  children:
    kube_control_plane:
      hosts:
        node1:
    kube_node:
      hosts:
        node1:
        node2:
        node3:
    etcd:
      hosts:
        node1:
    k8s_cluster:
      children:
        kube_control_plane:
        kube_node:
    calico_rr:
      hosts: {}
";

#[test]
fn a_kubespray_inventory_in_yaml() {
    let files = Memory::default()
        .with("/i/hosts.yaml", KUBESPRAY)
        .with(
            "/i/group_vars/all/all.yml",
            "---\nansible_become: true\nansible_port: 22\nother: \"{{ lookup('x') }}\"\n",
        )
        .with(
            "/i/group_vars/kube_node.yml",
            "node_labels:\n  disk: hdd\n  tier: \"2\"\n",
        )
        .with("/i/group_vars/all/vault.yml", "$ANSIBLE_VAULT;1.1;AES256\n6163\n")
        .with(
            "/i/host_vars/node2.yml",
            "kprov_disk: /dev/disk/by-id/x\nnode_labels: {disk: ssd}\n",
        );
    let inventory = load(&files, Utf8Path::new("/i/hosts.yaml")).unwrap();
    let roles: Vec<_> = inventory.hosts.iter().map(|h| (h.name.as_str(), h.role)).collect();
    let expected = [
        ("node1", Role::ControlPlane),
        ("node2", Role::Worker),
        ("node3", Role::Worker),
    ];
    assert_eq!(roles, expected);
    assert!(inventory.schedulable, "the control plane is in `kube_node` too");
    let node1 = host(&inventory, "node1");
    assert_eq!(node1.address, Some([10, 3, 0, 1].into()));
    let ssh = node1.ssh.as_ref().unwrap();
    assert_eq!((ssh.host.as_str(), ssh.user.as_deref()), ("95.54.0.12", Some("ubuntu")));
    assert_eq!(
        host(&inventory, "node3").ssh.as_ref().unwrap().port,
        Some(2022),
        "a host's own variable wins"
    );
    assert_eq!(host(&inventory, "node3").external_address, Some([95, 54, 0, 14].into()));
    assert_eq!(host(&inventory, "node3").labels["tier"], "2");
    let node2 = host(&inventory, "node2");
    assert_eq!((node2.labels.len(), node2.labels["disk"].as_str()), (1, "ssd"));
    assert_eq!(node2.disk.as_ref().unwrap().path.as_deref(), Some("/dev/disk/by-id/x"));
}

const INI: &str = "\
# an old one
[all]
master-[1:3] ansible_become=yes
worker[01:02] ansible_host=10.0.1.1 ip=10.0.1.1   ; not a comment for Ansible, but no variable either
";

#[test]
fn an_ini_inventory_with_old_names() {
    let text = "\
bastion ansible_host=203.0.113.5 ansible_user=jump ansible_port=2200

[kube-master]
master-[1:3]

[etcd]
master-[1:3]

[kube-node]
worker[01:02]:2222 ansible_ssh_user='some one'
edge ansible_ssh_common_args='-o ProxyJump=a,b@c:22 -o \"UserKnownHostsFile=/k h\"'

[k8s-cluster:children]
kube-master
kube-node

[bastion]
bastion

[k8s-cluster:vars]
ansible_user=core
ansible_ssh_private_key_file=~/.ssh/id_rsa
";
    let inventory = parse("/i/inventory.ini", text).unwrap();
    let names: Vec<_> = inventory.hosts.iter().map(|h| h.name.as_str()).collect();
    assert_eq!(
        names,
        ["master-1", "master-2", "master-3", "worker01", "worker02", "edge"]
    );
    assert!(!inventory.schedulable);
    let master = host(&inventory, "master-2");
    assert_eq!(master.role, Role::ControlPlane);
    let ssh = master.ssh.as_ref().unwrap();
    assert_eq!((ssh.host.as_str(), ssh.user.as_deref()), ("master-2", Some("core")));
    assert_eq!(ssh.key.as_deref(), Some("~/.ssh/id_rsa"));
    assert_eq!(ssh.jump, ["jump@203.0.113.5:2200"], "a bastion is gone through");
    let ssh = host(&inventory, "worker02").ssh.as_ref().unwrap();
    assert_eq!(
        (ssh.port, ssh.user.as_deref()),
        (Some(2222), Some("core")),
        "today's name of a variable wins"
    );
    let ssh = host(&inventory, "edge").ssh.as_ref().unwrap();
    assert_eq!(ssh.jump, ["a", "b@c:22"]);
    assert_eq!(ssh.args, ["-o", "UserKnownHostsFile=/k h"]);
    assert_eq!(inventory.hosts.len(), 6);
    let error = parse("/i/inventory.ini", INI).unwrap_err();
    assert!(error.message.contains("is not `name=value`"), "{error}");
}

#[test]
fn examples_are_valid() {
    let examples = Utf8Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/inventory");
    let read = |name: &str| load(&super::Disk, &examples.join(name)).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(read("hosts.yaml").hosts.len(), 5);
    let kubespray = read("kubespray.ini");
    assert_eq!(kubespray.hosts.len(), 4);
    assert_eq!(
        host(&kubespray, "node4").ssh.as_ref().unwrap().user.as_deref(),
        Some("ubuntu")
    );
}

fn golden(path: &str, text: &str, expected: &str) {
    let error = parse(path, text).unwrap_err();
    assert_eq!(error.to_string(), expected);
    assert!(
        error.hint.is_some() || error.host.is_none(),
        "an error about a host has a hint: {error:?}"
    );
}

#[test]
fn errors_name_file_line_and_host() {
    let native = |hosts: &str| format!("apiVersion: kprov.io/v1alpha1\nkind: Inventory\nhosts:\n{hosts}");
    let cp = "  - {name: a, role: control-plane, address: 10.0.0.1}\n";
    golden(
        "h.yaml",
        &native(&format!("{cp}  - {{name: a, address: 10.0.0.2}}\n")),
        "`h.yaml:5`: host `a`: the name stands in `h.yaml:4` already",
    );
    golden(
        "h.yaml",
        &native(&format!("{cp}  - name: b\n    address: 10.0.0.1\n")),
        "`h.yaml:5`: host `b`: `10.0.0.1` is the address of `a` (`h.yaml:4`) too",
    );
    golden(
        "h.yaml",
        &native("  - {name: b, address: 10.0.0.1}\n"),
        "`h.yaml`: it has no control-plane host",
    );
    golden(
        "h.yaml",
        &native(&format!("{cp}  - name: B_1\n")),
        &format!(
            "`h.yaml:5`: host `B_1`: the name can't be a machine's: {}",
            name_error("B_1")
        ),
    );
    golden(
        "h.yaml",
        &native(&format!("{cp}  - {{name: b, labels: {{kubernetes.io/x: y}}}}\n")),
        "`h.yaml:5`: host `b`: a machine may not give itself the label `kubernetes.io/x`",
    );
    let unknown = "unknown field `adress`, expected one of name, role, address, zone, labels, ssh, bmc, disk";
    golden(
        "h.yaml",
        &native(&format!("{cp}  - name: b\n    adress: 10.0.0.2\n  - name: c\n")),
        &format!("`h.yaml:6`: host `b`: {unknown}"),
    );
    golden(
        "h.yaml",
        &format!("{}nothing: 1\n", native(cp)),
        "`h.yaml:5`: unknown field `nothing`, expected one of apiVersion, kind, defaults, hosts",
    );
    golden(
        "h.ini",
        "[kube_control_plane]\na ansible_host=1.2.3.4\n[kube_nodes]\nb\n",
        "`h.ini:4`: host `b`: it is in the group `kube_nodes`, which says nothing of its role",
    );
    golden(
        "h.ini",
        "[kube_control_plane]\na\n[k8s_cluster:children]\nkube_control_plane\nkube_nodez\n",
        "`h.ini:5`: the group `kube_nodez`, named as a child of `k8s_cluster`, is not there",
    );
    golden(
        "h.ini",
        "[kube_control_plane]\na\n[kube_node]\nb\n[etcd]\nb\n",
        "`h.ini:2`: host `a`: it is in `kube_control_plane` and not in `etcd`: kprov runs etcd on the control-plane hosts, and nowhere else",
    );
    golden(
        "h.ini",
        "[kube_control_plane]\na ansible_password=x\n",
        "`h.ini:2`: host `a`: `ansible_password` holds a password, and kprov takes none",
    );
    golden(
        "h.ini",
        "[kube_control_plane]\na ansible_user='x\n",
        "`h.ini:2`: a quote (') is never closed",
    );
    golden(
        "h.ini",
        "[kube_control_plane:hostz]\na\n",
        "`h.ini:1`: `[kube_control_plane:hostz]` ends in `:hostz`, which is not known",
    );
    golden(
        "h.ini",
        "[kube_control_plane]\na ansible_host={{x}}\n",
        "`h.ini:2`: host `a`: `ansible_host` is the template `{{x}}`, which only Ansible can fill in",
    );
    golden(
        "h.yml",
        "all:\n  children:\n    kube_control_plane:\n      host:\n        a:\n",
        "`h.yml:4`: the group `kube_control_plane` has `host`, which is not known",
    );
    golden(
        "h.yml",
        "all:\n  hosts:\n    a: {ansible_port: many}\n  children:\n    kube_control_plane: {hosts: {a: }}\n",
        "`h.yml:3`: host `a`: `ansible_port` is `many`, which is no port",
    );
    golden("none.yml", "", "`none.yml`: it names no hosts");
}

fn name_error(name: &str) -> String {
    kprov_types::MachineName::new(name).unwrap_err().to_string()
}

#[test]
fn syntax_errors_have_their_line() {
    let error = parse("h.yaml", "all:\n  hosts:\n    a: [\n").unwrap_err();
    assert!(error.place.line >= 3, "{error}");
    let text = NATIVE.replace("zone: rack1", "zones: rack1");
    let error = parse("h.yaml", &text).unwrap_err();
    assert_eq!(error.place.line, 12, "{error}");
    assert!(error.message.contains("zones"), "{error}");
    let error = parse("h.yaml", &NATIVE.replace("role: control-plane", "role: king")).unwrap_err();
    assert_eq!(error.place.line, 10, "{error}");
    let missing = load(&Memory::default(), Utf8Path::new("/none")).unwrap_err();
    assert_eq!(missing.to_string(), "`/none`: there is no such inventory file");
}

#[test]
fn a_vault_variable_is_no_obstacle() {
    let files = Memory::default().with("/i/h.ini", "[kube_control_plane]\na\n").with(
        "/i/group_vars/all.yml",
        "secret: !vault |\n  $ANSIBLE_VAULT;1.1;AES256\n  6163\nansible_user: x\n",
    );
    let inventory = load(&files, Utf8Path::new("/i/h.ini")).unwrap();
    assert_eq!(host(&inventory, "a").ssh.as_ref().unwrap().user.as_deref(), Some("x"));
}

proptest! {
    /// The same hosts in INI and in YAML come to the same.
    #[test]
    fn ini_and_yaml_agree(control_plane in 1_usize..4, workers in 0_usize..6, port in proptest::option::of(1_u16..), user in "u[a-z]{1,7}") {
        let port_ini = port.map(|p| format!(" ansible_port={p}")).unwrap_or_default();
        let mut ini = format!("[kube_control_plane]\nc[1:{control_plane}]{port_ini}\n");
        let port_yaml = port.map(|p| format!("ansible_port: {p}")).unwrap_or_default();
        let mut yaml = format!("all:\n  vars: {{ansible_user: {user}}}\n  children:\n    kube_control_plane:\n      hosts:\n        c[1:{control_plane}]: {{{port_yaml}}}\n");
        if workers > 0 {
            writeln!(ini, "[kube_node]\nw[1:{workers}]").unwrap();
            writeln!(yaml, "    kube_node:\n      hosts:\n        w[1:{workers}]:").unwrap();
        }
        writeln!(ini, "[all:vars]\nansible_user={user}").unwrap();
        let (ini, yaml) = (parse("a.ini", &ini), parse("a.yaml", &yaml));
        prop_assert_eq!(ini.unwrap(), yaml.unwrap());
    }

    #[test]
    fn anything_is_read_or_refused(text in "[\\[\\]a-c:=_ \\n'\"#{}-]{0,80}", ini in any::<bool>()) {
        let _ = parse(if ini { "x.ini" } else { "x.yaml" }, &text);
    }
}
