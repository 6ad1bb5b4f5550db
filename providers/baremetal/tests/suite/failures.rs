//! Hosts in trouble: named, with a hint, the others not held up, nothing half installed, and the next run carries on.

use std::collections::BTreeSet;
use std::process::Command;

use kprov_emulators::hosts::{ADMIN, Disk, Hosts, MERE_USER};
use kprov_provider::{Advice, Provider, ProviderError};
use kprov_provider_baremetal::{BaremetalConfig, BaremetalProvider, Trouble};
use kprov_types::machine::{DataVolume, DiskSpec, MachineSpec, MachineState, NetworkSpec, Observed};
use kprov_types::{ClusterName, MachineName, Role};

use crate::room::{Entry, entry, inventory, possible, program, spec};

fn cluster() -> ClusterName {
    ClusterName::new("rack").unwrap()
}

fn name(text: &str) -> MachineName {
    MachineName::new(text).unwrap()
}

/// Network, disks and machines, as `kprov up` ensures them; each call is made whatever became of the one before.
async fn up(provider: &BaremetalProvider, machines: &[MachineSpec]) -> Result<(), ProviderError> {
    let network = NetworkSpec {
        cidr: None,
        api_port: 6443,
    };
    provider.ensure_network(&cluster(), &network).await?;
    let disks: Vec<DiskSpec> = machines
        .iter()
        .filter(|m| m.data_disk)
        .map(|m| DiskSpec {
            machine: m.name.clone(),
            size_gib: 1,
        })
        .collect();
    provider.ensure_disks(&cluster(), &disks).await?;
    provider.ensure_machines(&cluster(), machines).await.map(drop)
}

async fn down(provider: &BaremetalProvider, machines: &[MachineSpec]) {
    let names: Vec<_> = machines.iter().map(|m| m.name.clone()).collect();
    provider.remove_machines(&cluster(), &names).await.unwrap();
    provider.remove_disks(&cluster(), &names).await.unwrap();
    provider.remove_network(&cluster()).await.unwrap();
    assert_eq!(provider.leftovers(&cluster()).await.unwrap(), []);
    assert_eq!(provider.observe(&cluster()).await.unwrap(), Observed::default());
}

fn running(observed: &Observed) -> BTreeSet<String> {
    let running = observed.machines.iter().filter(|m| m.state == MachineState::Running);
    running.map(|m| m.name.to_string()).collect()
}

/// All hosts but the seven are set up, and nothing is half done on those.
async fn others_are_done(hosts: &Hosts, provider: &BaremetalProvider, names: &[String]) {
    let observed = provider.observe(&cluster()).await.unwrap();
    assert_eq!(running(&observed), names[7..].iter().cloned().collect());
    let unknown = observed
        .machines
        .iter()
        .filter(|m| matches!(m.state, MachineState::Unknown(_)));
    assert_eq!(unknown.count(), 5, "what can't be asked is said to be unknown");
    for untouched in ["node01", "node03", "node04", "node05", "node06"] {
        hosts
            .inside(
                untouched,
                "[ -z \"$(ls -A /etc/kprov)\" ] && ! [ -e /usr/local/bin/kprov-node ]",
            )
            .unwrap();
    }
    let checked = provider.check(Some(&cluster())).await;
    let bad: Vec<_> = checked
        .iter()
        .filter(|(_, answer)| answer.is_err())
        .map(|(name, _)| name.as_str())
        .collect();
    assert_eq!(
        bad,
        ["node01", "node02", "node03", "node04", "node05", "node06", "node07"]
    );
    let disk_error = checked[0].1.as_ref().unwrap_err();
    assert!(
        matches!(&disk_error.trouble, Trouble::DiskNotEmpty { in_use: false, .. }),
        "{disk_error}"
    );
    assert!(disk_error.trouble.hint(&disk_error.host).contains("--wipe node01"));
}

/// Twenty hosts, seven of them in trouble of seven kinds.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[expect(clippy::too_many_lines, reason = "one fleet with every trouble at once")]
async fn trouble_holds_up_nobody() {
    if !possible() {
        return;
    }
    let hosts = Hosts::open(&program(), "bmtrouble", "10.99.62.0/24").await.unwrap();
    let names: Vec<String> = (1..=20).map(|n| format!("node{n:02}")).collect();
    let setup = |name: &str| match name {
        "node05" => MERE_USER,
        "node09" => ADMIN,
        _ => "",
    };
    let all: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), setup(name))).collect();
    hosts.start(&all).await.unwrap();
    let disk = Disk::new(64).unwrap();
    disk.lend(&hosts, "node01").unwrap();
    assert!(
        Command::new("mkfs.ext4")
            .args(["-q", "-L", "precious", &disk.device])
            .status()
            .unwrap()
            .success()
    );

    let right_key = |name: &str| hosts.host_key(name).unwrap();
    let ssh =
        |user: &str, key: &str, host_key: &str| Some(format!("{{user: {user}, key: {key}, hostKey: {host_key}}}"));
    let (own, foreign) = (hosts.key(), hosts.foreign_key().unwrap());
    let mut entries: Vec<Entry> = names
        .iter()
        .map(|name| entry(name, if name == "node01" { "control-plane" } else { "worker" }))
        .collect();
    entries[0].more = format!("disk: {{path: {}}}", disk.device);
    // Another host's key is pinned.
    entries[2].ssh = ssh("root", own.as_str(), &right_key("node04"));
    // Nobody's key is known.
    entries[3].ssh = Some(format!(
        "{{user: root, key: {own}, args: [-o, UserKnownHostsFile=/dev/null, -o, GlobalKnownHostsFile=/dev/null, -o, StrictHostKeyChecking=no]}}"
    ));
    entries[4].ssh = ssh("admin", own.as_str(), &right_key("node05"));
    entries[5].ssh = ssh("root", foreign.as_str(), &right_key("node06"));
    entries[8].ssh = ssh("admin", own.as_str(), &right_key("node09"));
    let wrong = inventory(&hosts, &entries).await;
    // One is switched off, one is another cluster's.
    hosts.power_off("node02").unwrap();
    hosts
        .inside(
            "node07",
            r#"mkdir -p /etc/kprov; echo '{"cluster":"other","name":"node07","role":"worker","cidr":"10.0.0.0/8","endpoint":{"host":"x","port":6443}}' >/etc/kprov/machine.json"#,
        )
        .unwrap();

    let machines: Vec<MachineSpec> = names
        .iter()
        .map(|name| {
            spec(
                name,
                if name == "node01" {
                    Role::ControlPlane
                } else {
                    Role::Worker
                },
            )
        })
        .collect();
    let provider = BaremetalProvider::new(BaremetalConfig::new(wrong)).unwrap();
    let error = up(&provider, &machines).await.unwrap_err();
    let text = error.to_string();
    assert_eq!(error.advice, Advice::Never);
    assert!(error.hint.is_some());
    assert!(text.starts_with("7 of 20 hosts are not set up:"), "{text}");
    for expected in [
        &format!(
            "host `node01` has data on its disk `{}`: ext4 with the label `precious`",
            disk.device
        ),
        "host `node02` can't be reached: ",
        "host `node03` shows another host key than the one that is known",
        "host `node04` shows a host key that is not known",
        "host `node05` doesn't let its user become root: ",
        "host `node06` doesn't let `root` in: ",
        "host `node07` belongs to the cluster `other`",
    ] {
        assert!(text.contains(expected), "{expected}: {text}");
    }
    assert_eq!(disk.holds("TYPE").unwrap(), "ext4", "the disk was touched");

    others_are_done(&hosts, &provider, &names).await;

    // All of it mended: the next run carries on, and touches none that run already.
    let before = hosts.inside("node20", "cat /run/kprov-node.pid").unwrap();
    hosts.start(&[("node02", "")]).await.unwrap();
    hosts.inside("node07", "rm -r /etc/kprov").unwrap();
    hosts.inside("node05", ADMIN).unwrap();
    for (index, user) in [(2, "root"), (3, "root"), (4, "admin"), (5, "root")] {
        entries[index].ssh = ssh(user, own.as_str(), &right_key(&names[index]));
    }
    let mut config = BaremetalConfig::new(inventory(&hosts, &entries).await);
    config.wipe.insert(name("node01"));
    let provider = BaremetalProvider::new(config).unwrap();
    up(&provider, &machines).await.unwrap();
    let observed = provider.observe(&cluster()).await.unwrap();
    assert_eq!(running(&observed), names.iter().cloned().collect());
    assert_eq!(hosts.inside("node20", "cat /run/kprov-node.pid").unwrap(), before);
    assert_eq!(disk.holds("TYPE").unwrap(), "", "`--wipe` named it");
    assert_eq!(disk.holds("PTTYPE").unwrap(), "gpt");
    assert_eq!(observed.disks.len(), 1);
    assert_eq!(observed.disks[0].volume, DataVolume::Device(vec![disk.partition()]));
    let console = provider.console(&cluster(), &name("node20")).await.unwrap();
    assert_eq!(console, None, "what it runs prints nothing");

    down(&provider, &machines).await;
    for host in &names {
        let left = hosts
            .inside(
                host,
                "ls -d /etc/kprov/* /run/kprov* /var/log/kprov* /var/lib/kprov/* 2>/dev/null || true",
            )
            .unwrap();
        assert_eq!(left, "", "`{host}` is not as it was found");
    }
}

/// A disk that is in use is refused whatever is asked for; a script that fails is told with what it printed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_in_use_is_never_touched() {
    if !possible() {
        return;
    }
    let hosts = Hosts::open(&program(), "bmuse", "10.99.63.0/24").await.unwrap();
    hosts.start(&[("cp", ""), ("w", "")]).await.unwrap();
    let disk = Disk::new(64).unwrap();
    disk.lend(&hosts, "cp").unwrap();
    assert!(
        Command::new("mkfs.ext4")
            .args(["-q", &disk.device])
            .status()
            .unwrap()
            .success()
    );
    hosts
        .inside(
            "cp",
            &format!(
                "mkdir -p /mnt/old; mount {} /mnt/old; echo x >/mnt/old/file",
                disk.device
            ),
        )
        .unwrap();

    let mut entries = vec![entry("cp", "control-plane"), entry("w", "worker")];
    entries[0].more = format!("disk: {{path: {}}}", disk.device);
    let mut config = BaremetalConfig::new(inventory(&hosts, &entries).await);
    config.wipe.insert(name("cp"));
    let provider = BaremetalProvider::new(config).unwrap();
    let mut machines = vec![spec("cp", Role::ControlPlane), spec("w", Role::Worker)];
    let error = up(&provider, &machines).await.unwrap_err().to_string();
    assert!(error.contains("is mounted at `/mnt/old`"), "{error}");
    assert_eq!(hosts.inside("cp", "cat /mnt/old/file").unwrap(), "x\n");

    // Without its disk's file system in use, but with data that no program knows.
    hosts.inside("cp", "umount /mnt/old").unwrap();
    let raw = format!(
        "wipefs -a -q {0}; printf secret | dd of={0} bs=1 seek=5000 conv=notrunc 2>/dev/null",
        disk.device
    );
    hosts.inside("cp", &raw).unwrap();
    let provider = BaremetalProvider::new(BaremetalConfig::new(inventory(&hosts, &entries).await)).unwrap();
    let error = up(&provider, &machines).await.unwrap_err().to_string();
    assert!(error.contains("data that is not zero at its beginning"), "{error}");

    // First-boot data that fail, on a host that runs nothing: it was set up while the other was in trouble.
    let provider = BaremetalProvider::new(BaremetalConfig::new(inventory(&hosts, &entries).await)).unwrap();
    assert_eq!(
        running(&provider.observe(&cluster()).await.unwrap()),
        BTreeSet::from(["w".to_owned()])
    );
    provider.remove_machines(&cluster(), &[name("w")]).await.unwrap();
    let mut config = BaremetalConfig::new(inventory(&hosts, &entries).await);
    config.wipe.insert(name("cp"));
    let provider = BaremetalProvider::new(config).unwrap();
    machines[1].first_boot.0 = "#!/bin/sh\necho no such thing >&2\nexit 3\n".into();
    let error = up(&provider, &machines).await.unwrap_err();
    assert!(error.to_string().contains("host `w` failed at `install`"), "{error}");
    assert!(error.to_string().contains("ended with 3: no such thing"), "{error}");
    let observed = provider.observe(&cluster()).await.unwrap();
    let states: Vec<_> = observed.machines.iter().map(|m| (m.name.as_str(), &m.state)).collect();
    assert_eq!(states, [("cp", &MachineState::Running), ("w", &MachineState::Stopped)]);
    machines[1] = spec("w", Role::Worker);
    up(&provider, &machines).await.unwrap();
    assert_eq!(running(&provider.observe(&cluster()).await.unwrap()).len(), 2);
    down(&provider, &machines).await;
}

/// Through a jump host, whose key is checked as well.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn through_a_jump_host() {
    if !possible() {
        return;
    }
    let hosts = Hosts::open(&program(), "bmjump", "10.99.64.0/24").await.unwrap();
    hosts.start(&[("bastion", ""), ("inner", "")]).await.unwrap();
    let known = hosts.files().join("known_hosts");
    let line = |address: &str, name: &str| format!("{address} {}\n", hosts.host_key(name).unwrap());
    let (bastion, inner) = (
        hosts.address("bastion").await.unwrap(),
        hosts.address("inner").await.unwrap(),
    );
    let mut entries = vec![entry("inner", "control-plane")];
    entries[0].ssh = Some(format!(
        "{{user: root, key: {}, jump: ['root@{bastion}'], args: [-o, UserKnownHostsFile={known}]}}",
        hosts.key()
    ));
    std::fs::write(&known, line(&inner, "inner")).unwrap();
    let config = BaremetalConfig::new(inventory(&hosts, &entries).await);
    let provider = BaremetalProvider::new(config.clone()).unwrap();
    let checked = provider.check(None).await;
    assert!(checked[0].1.is_err(), "the bastion's key is not known: {checked:?}");
    assert_eq!(hosts.logins("bastion").await.unwrap(), 0);

    std::fs::write(&known, line(&inner, "inner") + &line(&bastion, "bastion")).unwrap();
    let provider = BaremetalProvider::new(config).unwrap();
    let checked = provider.check(None).await;
    assert!(checked[0].1.is_ok(), "{checked:?}");
    assert_eq!(hosts.logins("bastion").await.unwrap(), 1);
    let network = NetworkSpec {
        cidr: None,
        api_port: 6443,
    };
    let network = provider.ensure_network(&cluster(), &network).await.unwrap();
    assert_eq!(
        network.host_address, None,
        "hosts behind another may not reach this machine"
    );
    assert_eq!(hosts.logins("bastion").await.unwrap(), 1, "connections are kept open");
}
