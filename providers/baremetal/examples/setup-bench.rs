//! How long it takes to set up a hundred hosts by SSH, beside Ansible running the same copies and starts on the same hosts.
//!
//! `setup-bench ROOM NODE [ANSIBLE]`: a program that offers `machine-room`, a kprov-node whose size counts (hosts run a stub of
//! that size), and `ansible-playbook`. Run by `cargo xtask bench baremetal`; needs root.
#![expect(clippy::print_stdout, reason = "a measurement")]

use std::fmt::Write as _;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use kprov_emulators::hosts::Hosts;
use kprov_provider::Provider;
use kprov_provider_baremetal::inventory::{Disk, Inventory, load};
use kprov_provider_baremetal::{BaremetalConfig, BaremetalProvider};
use kprov_types::machine::{FirstBoot, MachineSpec, MachineState, NetworkSpec};
use kprov_types::{ClusterName, MachineName, Role};
use sha2::{Digest as _, Sha256};

const HOSTS: usize = 100;
const PARALLEL: &[usize] = &[5, 10, 20, 50];

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1).map(Utf8PathBuf::from);
    let (room, node) = (arguments.next(), arguments.next());
    let (room, node) = room.zip(node).context("usage: setup-bench ROOM NODE [ANSIBLE]")?;
    let ansible = arguments.next();

    let start = Instant::now();
    let hosts = Hosts::open(&room, "bmbench", "10.99.80.0/24").await?;
    let names: Vec<String> = (0..HOSTS).map(|n| format!("n{n:03}")).collect();
    let all: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), "")).collect();
    for some in all.chunks(20) {
        hosts.start(some).await?;
    }
    println!(
        "{HOSTS} hosts with an `sshd` each after {:.1} s",
        start.elapsed().as_secs_f64()
    );

    let stub = hosts.files().join("kprov-node");
    let size = std::fs::metadata(&node).with_context(|| format!("no `{node}`"))?.len();
    let digest = write_stub(&stub, usize::try_from(size)?)?;
    let first_boot =
        format!("#!/bin/sh\n# {digest}\necho '{{}}' >/etc/kprov/node.json\nexec /usr/local/bin/kprov-node run\n");
    let inventory = inventory(&hosts, &names).await?;
    println!("kprov-node: {} MiB\n", size >> 20);
    println!("| hosts at once | kprov | Ansible |\n|---|---|---|");
    for parallel in PARALLEL {
        let ours = kprov(&inventory, &stub, *parallel, &first_boot, &names).await?;
        let theirs = match &ansible {
            Some(ansible) => format!(
                "{:.1} s",
                with_ansible(ansible, &hosts, &names, &stub, *parallel)
                    .await?
                    .as_secs_f64()
            ),
            None => "not at hand".into(),
        };
        println!("| {parallel} | {:.1} s | {theirs} |", ours.as_secs_f64());
    }
    Ok(())
}

/// A program of kprov-node's size that does nothing, and its digest.
fn write_stub(path: &Utf8Path, size: usize) -> Result<String> {
    let mut text = "#!/bin/sh\n[ \"$1\" = run ] && exec sleep 3600\nexit 0\n".to_owned();
    // Not to be compressed to nothing on the way.
    let mut state = Sha256::digest(b"kprov");
    while text.len() < size {
        writeln!(text, "# {}", hex::encode(state))?;
        state = Sha256::digest(state);
    }
    std::fs::write(path, &text)?;
    Ok(hex::encode(Sha256::digest(text)))
}

async fn inventory(hosts: &Hosts, names: &[String]) -> Result<Inventory> {
    let mut text = format!(
        "apiVersion: kprov.io/v1alpha1\nkind: Inventory\ndefaults: {{ssh: {{user: root, key: {}}}}}\nhosts:\n",
        hosts.key()
    );
    for (index, name) in names.iter().enumerate() {
        let role = if index == 0 { "control-plane" } else { "worker" };
        let (address, key) = (hosts.address(name).await?, hosts.host_key(name)?);
        writeln!(
            text,
            "  - {{name: {name}, role: {role}, address: {address}, ssh: {{hostKey: {key}}}}}"
        )?;
    }
    let path = hosts.files().join("hosts.yaml");
    std::fs::write(&path, text)?;
    Ok(load(&Disk, &path)?)
}

/// Sets all hosts up, checks that all run, and removes everything again; the time of the first.
async fn kprov(
    inventory: &Inventory,
    stub: &Utf8Path,
    parallel: usize,
    first_boot: &str,
    names: &[String],
) -> Result<Duration> {
    let mut config = BaremetalConfig::new(inventory.clone());
    config.parallel = parallel;
    config.node_binary = Some(stub.to_owned());
    let provider = BaremetalProvider::new(config)?;
    let cluster = ClusterName::new("bench")?;
    let mut specs = Vec::new();
    for name in names {
        specs.push(MachineSpec {
            name: MachineName::new(name.as_str())?,
            role: inventory.host(name).map_or(Role::Worker, |host| host.role),
            zone: None,
            size: None,
            image: None,
            first_boot: FirstBoot(first_boot.to_owned()),
            data_disk: false,
        });
    }
    let start = Instant::now();
    let network = NetworkSpec {
        cidr: None,
        api_port: 6443,
    };
    provider.ensure_network(&cluster, &network).await?;
    let made = provider.ensure_machines(&cluster, &specs).await?;
    let took = start.elapsed();
    let running = made.iter().filter(|m| m.state == MachineState::Running).count();
    ensure!(running == names.len(), "{running} of {} hosts run", names.len());
    let names: Vec<MachineName> = specs.into_iter().map(|spec| spec.name).collect();
    provider.remove_machines(&cluster, &names).await?;
    let left = provider.leftovers(&cluster).await?;
    ensure!(left.is_empty(), "left: {left:?}");
    Ok(took)
}

/// The same copies and starts as tasks of a playbook.
async fn with_ansible(
    program: &Utf8Path,
    hosts: &Hosts,
    names: &[String],
    stub: &Utf8Path,
    forks: usize,
) -> Result<Duration> {
    let (mut known, mut inventory) = (String::new(), String::from("[all]\n"));
    for name in names {
        let address = hosts.address(name).await?;
        writeln!(known, "{address} {}", hosts.host_key(name)?)?;
        writeln!(inventory, "{name} ansible_host={address}")?;
    }
    let files = hosts.files();
    std::fs::write(files.join("known_hosts"), known)?;
    writeln!(
        inventory,
        "[all:vars]\nansible_user=root\nansible_python_interpreter=/usr/bin/python3\nansible_ssh_private_key_file={}\nansible_ssh_common_args='-o UserKnownHostsFile={}'",
        hosts.key(),
        files.join("known_hosts")
    )?;
    std::fs::write(files.join("ansible.ini"), inventory)?;
    let playbook = format!(
        "- hosts: all
  gather_facts: true
  tasks:
    - file: {{path: /etc/kprov, state: directory, mode: '0700'}}
    - copy: {{src: {stub}, dest: /usr/local/bin/kprov-node, mode: '0755'}}
    - copy: {{content: '{{}}', dest: /etc/kprov/node.json, mode: '0600'}}
    - copy: {{content: '[Service]', dest: /etc/systemd/system/kprov-node.service, mode: '0644'}}
    - shell: nohup setsid /usr/local/bin/kprov-node run >/var/log/kprov-node.log 2>&1 & echo $! >/run/kprov-node.pid
"
    );
    std::fs::write(files.join("play.yml"), playbook)?;
    let start = Instant::now();
    let output = Command::new(program)
        .args(["-f", &forks.to_string(), "-i"])
        .arg(files.join("ansible.ini"))
        .arg(files.join("play.yml"))
        .env("ANSIBLE_LOCAL_TEMP", files.join("ansible"))
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("can't run `{program}`"))?;
    let took = start.elapsed();
    ensure!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    for name in names {
        let clean = "kill -KILL $(cat /run/kprov-node.pid); rm -rf /run/kprov-node.pid /etc/kprov /usr/local/bin/kprov-node /etc/systemd/system/kprov-node.service /var/log/kprov-node.log";
        hosts.inside(name, clean)?;
    }
    Ok(took)
}
