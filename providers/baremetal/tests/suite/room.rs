//! Hosts for a test, and the inventory that names them.

use std::fmt::Write as _;

use camino::{Utf8Path, Utf8PathBuf};
use kprov_emulators::hosts::Hosts;
use kprov_provider_baremetal::inventory::{Disk, Inventory, load};
use kprov_types::machine::{FirstBoot, MachineSpec};
use kprov_types::{MachineName, Role};

/// The local provider's own `machine-room`, which the same build puts beside this test.
pub(crate) fn program() -> Utf8PathBuf {
    let test = Utf8PathBuf::from_path_buf(std::env::current_exe().unwrap()).unwrap();
    let program = test.parent().and_then(Utf8Path::parent).unwrap().join("machine-room");
    assert!(
        program.exists(),
        "there is no `{program}`: build the whole workspace (`cargo build --workspace --all-targets`)"
    );
    program
}

/// Whether machines can be made here; says so where not.
pub(crate) fn possible() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED: machines as namespaces need root");
    }
    root
}

/// One host of a native inventory.
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) role: &'static str,
    /// Further lines, such as `disk: {path: /dev/sdb}`.
    pub(crate) more: String,
    /// Lines below `ssh:`, instead of those that work.
    pub(crate) ssh: Option<String>,
}

pub(crate) fn entry(name: &str, role: &'static str) -> Entry {
    Entry {
        name: name.into(),
        role,
        more: String::new(),
        ssh: None,
    }
}

/// Writes an inventory and reads it.
pub(crate) async fn inventory(hosts: &Hosts, entries: &[Entry]) -> Inventory {
    let mut text = String::from("apiVersion: kprov.io/v1alpha1\nkind: Inventory\nhosts:\n");
    for Entry { name, role, more, ssh } in entries {
        let address = hosts.address(name).await.unwrap();
        let ssh = match ssh {
            Some(ssh) => ssh.clone(),
            None => format!(
                "{{user: root, key: {}, hostKey: {}}}",
                hosts.key(),
                hosts.host_key(name).unwrap()
            ),
        };
        writeln!(
            text,
            "  - name: {name}\n    role: {role}\n    address: {address}\n    ssh: {ssh}"
        )
        .unwrap();
        if !more.is_empty() {
            writeln!(text, "    {more}").unwrap();
        }
    }
    let path = hosts.files().join("hosts.yaml");
    std::fs::write(&path, &text).unwrap();
    load(&Disk, &path).unwrap_or_else(|e| panic!("{e}\n{text}"))
}

/// A machine that runs something which isn't Kubernetes.
pub(crate) fn spec(name: &str, role: Role) -> MachineSpec {
    MachineSpec {
        name: MachineName::new(name).unwrap(),
        role,
        zone: None,
        size: None,
        image: None,
        first_boot: FirstBoot("#!/bin/sh\nexec sleep 3600\n".into()),
        data_disk: role == Role::ControlPlane,
    }
}
