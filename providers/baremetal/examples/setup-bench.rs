//! How long it takes to set up a hundred hosts by SSH, beside Ansible running the same copies and starts on the same hosts.
//!
//! `setup-bench ROOM NODE [ANSIBLE]`: a program that offers `machine-room`, a kprov-node whose size counts (hosts run a stub of
//! that size), and `ansible-playbook`. Run by `cargo xtask bench baremetal`; needs root.
//!
//! Two tables: hosts that are slow to answer (each SSH session starts a second late, and the program is a few bytes), so that
//! waiting counts, as with hosts that have processors of their own; and hosts as they are with a program of kprov-node's size,
//! beside Ansible, where copying and encrypting it counts.
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
/// Run by `sshd` at the start of each session (sshd(8), `SSHRC`).
const SLOW: &str = "/etc/ssh/sshrc";
/// So many hosts, so many at once.
const GROWTH: &[(usize, usize)] = &[(25, 5), (50, 5), (50, 10), (100, 10), (100, 20)];
/// The same beside Ansible, which takes seconds of processor time a host.
const BESIDE: &[(usize, usize)] = &[(25, 10), (HOSTS, 20)];

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

    let inventory = inventory(&hosts, &names).await?;
    let small = Stub::write(&hosts.files().join("small"), 0)?;
    for name in &names {
        hosts.inside(name, &format!("echo 'sleep 1' >{SLOW}"))?;
    }
    println!("\n| hosts | at once | kprov | a host, times how many at once |\n|---|---|---|---|");
    for (count, parallel) in GROWTH {
        let took = kprov(&inventory, &small, *parallel, &names[..*count])
            .await?
            .as_secs_f64();
        #[expect(clippy::cast_precision_loss, reason = "small numbers")]
        let each = took * *parallel as f64 / *count as f64;
        println!("| {count} | {parallel} | {took:.1} s | {each:.2} s |");
    }

    for name in &names {
        hosts.inside(name, &format!("rm {SLOW}"))?;
    }
    let size = std::fs::metadata(&node).with_context(|| format!("no `{node}`"))?.len();
    let large = Stub::write(&hosts.files().join("kprov-node"), usize::try_from(size)?)?;
    println!("\nkprov-node: {} MiB\n", size >> 20);
    println!("| hosts | at once | kprov | Ansible | kprov is faster |\n|---|---|---|---|---|");
    for (count, parallel) in BESIDE {
        let names = &names[..*count];
        let ours = kprov(&inventory, &large, *parallel, names).await?.as_secs_f64();
        let theirs = match &ansible {
            Some(ansible) => {
                let took = with_ansible(ansible, &hosts, names, &large.path, *parallel).await?;
                format!("{:.1} s | {:.1} times", took.as_secs_f64(), took.as_secs_f64() / ours)
            }
            None => "not at hand | ".into(),
        };
        println!("| {count} | {parallel} | {ours:.1} s | {theirs} |");
    }
    Ok(())
}

/// A program in kprov-node's place that does nothing.
struct Stub {
    path: Utf8PathBuf,
    /// First-boot data that start it.
    first_boot: String,
}

impl Stub {
    /// One of at least this size.
    fn write(path: &Utf8Path, size: usize) -> Result<Self> {
        let digest = write_stub(path, size)?;
        Ok(Self {
            path: path.to_owned(),
            first_boot: format!(
                "#!/bin/sh\n# {digest}\necho '{{}}' >/etc/kprov/node.json\nexec /usr/local/bin/kprov-node run\n"
            ),
        })
    }
}

/// Writes a program of this size that does nothing; returns its digest.
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

/// Sets hosts up, checks that all run, and removes everything again; the time of the first.
async fn kprov(inventory: &Inventory, stub: &Stub, parallel: usize, names: &[String]) -> Result<Duration> {
    let mut inventory = inventory.clone();
    inventory.hosts.truncate(names.len());
    let provider = |parallel: usize| {
        let mut config = BaremetalConfig::new(inventory.clone());
        config.parallel = parallel;
        config.node_binary = Some(stub.path.clone());
        BaremetalProvider::new(config)
    };
    let remover = provider(50)?;
    let provider = provider(parallel)?;
    let cluster = ClusterName::new("bench")?;
    let mut specs = Vec::new();
    for name in names {
        specs.push(MachineSpec {
            name: MachineName::new(name.as_str())?,
            role: inventory.host(name).map_or(Role::Worker, |host| host.role),
            zone: None,
            size: None,
            image: None,
            first_boot: FirstBoot(stub.first_boot.clone()),
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
    // Not measured.
    drop(provider);
    remover.remove_machines(&cluster, &names).await?;
    let left = remover.leftovers(&cluster).await?;
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
