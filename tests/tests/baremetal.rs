//! `kprov up --provider baremetal` on hosts that run Linux and a real `sshd`: from an inventory to a cluster, and back to the
//! hosts as they were.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use kprov_e2e::{Cluster, Payload, Prober, Traces, full, items, payloads, self_hosted, upgrades, wait_for};
use kprov_emulators::bmc::{Manners, PASSWORD, StandIn, USER};
use kprov_emulators::hosts::{ADMIN, Disk, Hosts};
use tokio::runtime::Runtime;

/// What a cluster could leave on a host, a line each.
const TRACES: &str = r#"
ip -o link show | awk '{ print "interface", $2 }' | sed 's/@.*//'
ip -o -4 address show | awk '{ print "address", $2, $4 }'
ip route show | sed 's/^/route /'
for save in iptables-save ip6tables-save; do $save 2>/dev/null | grep -- '^-' | sed "s/^/$save /"; done
awk '{ print "mount", $5 }' /proc/self/mountinfo
for d in /etc /etc/kprov /etc/kubernetes /etc/containerd /etc/cni /var/lib /var/lib/kprov /var/lib/kubelet /var/lib/etcd \
    /var/lib/containerd /var/lib/cni /var/log /var/log/pods /var/log/containers /usr/libexec /usr/local/bin /opt /run; do
    for f in $(ls -A $d 2>/dev/null); do echo "file $d/$f"; done
done | grep -vxE 'file /run/(xtables.lock|mount)|file /etc/kprov'
find /sys/fs/cgroup -type d -name 'kubepods*' | sed 's/^/cgroup /'
for p in /proc/[0-9]*; do readlink $p/exe 2>/dev/null | sed 's/^/process /'; done | grep -vE '/(sh|dash|ls|awk|sed|find|grep|readlink|sshd|mawk|sleep)$'
for s in net/ipv4/ip_forward vm/overcommit_memory kernel/panic kernel/panic_on_oops; do echo "setting $s $(cat /proc/sys/$s)"; done
true
"#;

/// Hosts with a runtime to ask them by.
struct Rack {
    runtime: Runtime,
    hosts: Hosts,
}

impl Rack {
    fn open(name: &str, range: &str) -> Result<Self> {
        let bin = std::env::var("KPROV_BIN").context("KPROV_BIN is not set: run the tests by `cargo xtask test`")?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()?;
        let program = Utf8PathBuf::from(bin).join("kprov");
        let hosts = runtime.block_on(Hosts::open(&program, name, range))?;
        Ok(Self { runtime, hosts })
    }

    fn start(&self, hosts: &[(&str, &str)]) -> Result<()> {
        self.runtime.block_on(self.hosts.start(hosts))
    }

    fn address(&self, host: &str) -> Result<String> {
        self.runtime.block_on(self.hosts.address(host))
    }

    fn logins(&self, hosts: &[&str]) -> Result<usize> {
        let mut all = 0;
        for host in hosts {
            all += self.runtime.block_on(self.hosts.logins(host))?;
        }
        Ok(all)
    }

    fn traces(&self, hosts: &[&str]) -> Result<BTreeMap<String, Vec<String>>> {
        let mut all = BTreeMap::new();
        for host in hosts {
            let text = self.hosts.inside(host, TRACES)?;
            let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
            lines.sort();
            lines.dedup();
            all.insert((*host).to_owned(), lines);
        }
        Ok(all)
    }

    /// The hosts that have an address.
    fn holders<'a>(&self, address: &str, hosts: &[&'a str]) -> Result<Vec<&'a str>> {
        let mut holders = Vec::new();
        for host in hosts {
            let addresses = self.hosts.inside(host, "ip -o -4 address show")?;
            if addresses.contains(&format!(" {address}/")) {
                holders.push(*host);
            }
        }
        Ok(holders)
    }

    /// Another version, without one connection by SSH, and how many seconds that took. All hosts but the first `control_plane` are
    /// workers.
    fn upgrade(&self, cluster: &Cluster, chain: &[Payload], hosts: &[&str], control_plane: u64) -> Result<f32> {
        let next = chain.get(1).context("a chain of one release")?;
        let logins = self.logins(hosts)?;
        let start = Instant::now();
        success(&cluster.upgrade_command(chain, &next.version).output()?)?;
        let took = start.elapsed().as_secs_f32();
        let during = self.logins(hosts)? - logins;
        ensure!(during == 0, "{during} SSH connections during an upgrade");
        let (kubectl, workers) = (cluster.kubectl(next)?, hosts.len() as u64 - control_plane);
        // Status follows within moments.
        wait_for("the new version everywhere", Duration::from_mins(1), || {
            self_hosted(&kubectl, next, control_plane, workers)
        })?;
        Ok(took)
    }

    /// Waits until hosts are as they were, or tells what is not.
    fn as_before(&self, before: &BTreeMap<String, Vec<String>>) -> Result<()> {
        wait_for("the hosts as they were", Duration::from_secs(15), || {
            let hosts: Vec<&str> = before.keys().map(String::as_str).collect();
            let now = self.traces(&hosts)?;
            for host in hosts {
                let (was, is) = (&before[host], &now[host]);
                let new: Vec<_> = is.iter().filter(|line| !was.contains(line)).collect();
                let gone: Vec<_> = was.iter().filter(|line| !is.contains(line)).collect();
                ensure!(new.is_empty(), "left on `{host}`: {new:#?}");
                ensure!(gone.is_empty(), "taken from `{host}`: {gone:#?}");
            }
            Ok(())
        })
    }

    /// kprov's own inventory of these hosts.
    fn native(&self, path: &Utf8Path, control_plane: &[&str], workers: &[&str]) -> Result<()> {
        let mut text = format!(
            "apiVersion: kprov.io/v1alpha1\nkind: Inventory\ndefaults:\n  ssh: {{user: root, key: {}}}\nhosts:\n",
            self.hosts.key()
        );
        let roles = control_plane.iter().map(|host| (host, "control-plane"));
        for (host, role) in roles.chain(workers.iter().map(|host| (host, "worker"))) {
            writeln!(
                text,
                "  - name: {host}\n    role: {role}\n    address: {}\n    zone: rack-{host}\n    labels: {{e2e: {role}}}\n    ssh: {{hostKey: {}}}",
                self.address(host)?,
                self.hosts.host_key(host)?
            )?;
        }
        Ok(std::fs::write(path, text)?)
    }

    /// An Ansible inventory of hosts called `node1` and so on, as kubespray's users have it: a user who is not root, group variables,
    /// a range, known hosts, addresses inside, a disk for etcd each. As many as there are disks are for the control plane.
    fn ansible(&self, disks: &[Disk], workers: usize) -> Result<Utf8PathBuf> {
        let directory = self.hosts.files().join("inventory");
        std::fs::create_dir_all(directory.join("group_vars/all"))?;
        let known = directory.join("known_hosts");
        let (mut keys, mut hosts, mut control_plane) = (String::new(), String::new(), String::new());
        for number in 1..=disks.len() + workers {
            let name = format!("node{number}");
            let address = self.address(&name)?;
            writeln!(keys, "{address} {}", self.hosts.host_key(&name)?)?;
            writeln!(hosts, "{name} ansible_host={address} ip={address}")?;
            if let Some(disk) = disks.get(number - 1) {
                writeln!(control_plane, "{name} kprov_disk={}", disk.device)?;
            }
        }
        std::fs::write(&known, keys)?;
        let vars = format!(
            "---\nansible_user: admin\nansible_ssh_private_key_file: {}\nansible_ssh_common_args: \"-o UserKnownHostsFile={known}\"\n",
            self.hosts.key()
        );
        std::fs::write(directory.join("group_vars/all/all.yml"), vars)?;
        let last = disks.len();
        let mut text =
            format!("[all]\n{hosts}\n[kube_control_plane]\n{control_plane}\n[etcd]\nnode[1:{last}]\n\n[kube_node]\n");
        if workers > 0 {
            writeln!(text, "node[{}:{}]", last + 1, last + workers)?;
        }
        text.push_str("\n[k8s_cluster:children]\nkube_control_plane\nkube_node\n");
        let inventory = directory.join("inventory.ini");
        std::fs::write(&inventory, text)?;
        Ok(inventory)
    }

    /// A disk of its own for each of these hosts.
    fn disks(&self, hosts: &[&str]) -> Result<Vec<Disk>> {
        let mut disks = Vec::new();
        for host in hosts {
            let disk = Disk::new(512)?;
            disk.lend(&self.hosts, host)?;
            disks.push(disk);
        }
        Ok(disks)
    }
}

/// A cluster file with a virtual address, beside its inventory.
fn with_virtual_address(cluster: &Cluster, inventory: &Utf8Path, address: &str) -> Result<Utf8PathBuf> {
    let file = inventory.with_file_name("cluster.yaml");
    let text = format!(
        "apiVersion: kprov.io/v1alpha1\nkind: Cluster\nmetadata: {{name: {}}}\nspec:\n  provider: baremetal\n  \
         baremetal: {{inventory: {}, virtualAddress: {address}}}\n",
        cluster.name,
        inventory.file_name().context("an inventory without a name")?
    );
    std::fs::write(&file, text)?;
    Ok(file)
}

fn success(out: &Output) -> Result<String> {
    let (stdout, stderr) = (
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr),
    );
    if !out.status.success() {
        bail!("{}\n{stdout}{stderr}", out.status);
    }
    Ok(format!("{stdout}{stderr}"))
}

fn up_command(cluster: &Cluster, payload: &Payload, inventory: &Utf8Path) -> Command {
    let mut command = cluster.kprov(&["up", "--provider", "baremetal", "--name", &cluster.name]);
    command.arg("--inventory").arg(inventory).args(payload.options());
    command
}

fn up(cluster: &Cluster, payload: &Payload, inventory: &Utf8Path) -> Result<String> {
    success(&up_command(cluster, payload, inventory).output()?)
}

/// Three control-plane hosts and two workers, one of which has no power at first, comes later and is taken out again; with
/// `--full` another version, without one connection by SSH; and the hosts as they were.
#[test]
fn three_and_two_from_a_native_inventory() -> Result<()> {
    let chain = upgrades()?.into_iter().next().context("no chain")?;
    let payload = chain.first().context("an empty chain")?;
    let here = Traces::list();
    {
        let rack = Rack::open("e2ebm", "10.99.71.0/24")?;
        let all = ["m1", "m2", "m3", "w1", "w2"];
        rack.start(&all.map(|host| (host, "")))?;
        let before = rack.traces(&all)?;
        let cluster = Cluster::new("e2e-bm")?;
        let inventory = rack.hosts.files().join("hosts.yaml");
        rack.native(&inventory, &["m1", "m2", "m3"], &["w1", "w2"])?;
        let checked = success(&cluster.kprov(&["inventory", "check", inventory.as_str()]).output()?)?;
        ensure!(checked.matches('✔').count() == 5, "{checked}");

        // A worker without power holds up nobody: the cluster is made without it, and the next `up` carries on.
        rack.hosts.power_off("w2")?;
        let checked = cluster.kprov(&["inventory", "check", inventory.as_str()]).output()?;
        let told = String::from_utf8_lossy(&checked.stdout);
        let of_w2 = told.lines().find(|line| line.contains('✘')).unwrap_or_default();
        ensure!(
            checked.status.code() == Some(1) && told.matches('✔').count() == 4,
            "{told}"
        );
        ensure!(
            of_w2.starts_with("w2") && of_w2.contains("check that it runs"),
            "{told}"
        );
        let start = Instant::now();
        let out = up_command(&cluster, payload, &inventory).output()?;
        let said = String::from_utf8_lossy(&out.stderr);
        ensure!(
            out.status.code() == Some(1) && said.contains("host `w2` can't be reached") && said.contains("hint: "),
            "{}: {said}",
            out.status
        );
        eprintln!("3 + 1 of 3 + 2 by SSH: up after {:.1} s", start.elapsed().as_secs_f32());
        let kubectl = cluster.kubectl(payload)?;
        self_hosted(&kubectl, payload, 3, 1)?;
        rack.start(&[("w2", "")])?;
        let start = Instant::now();
        up(&cluster, payload, &inventory)?;
        eprintln!("w2 as well: up after {:.1} s", start.elapsed().as_secs_f32());
        self_hosted(&kubectl, payload, 3, 2)?;
        let zones = kubectl.get(&["nodes", "-l", "e2e=worker,topology.kubernetes.io/zone=rack-w1"])?;
        ensure!(items(&zones).count() == 1, "zone and labels: {zones}");
        let contexts = kubectl.run(&["config", "get-contexts", "-o", "name"])?;
        ensure!(
            contexts.lines().count() == 4,
            "one for each control-plane host: {contexts}"
        );
        kubectl.run(&["--context", "e2e-bm-m2", "get", "nodes"])?;
        let logins = rack.logins(&all)?;
        up(&cluster, payload, &inventory)?;
        eprintln!("{} SSH connections for a second `up`", rack.logins(&all)? - logins);

        // One host less: `up` says so and leaves it, and the command that it names takes it out.
        rack.native(&inventory, &["m1", "m2", "m3"], &["w1"])?;
        let said = up(&cluster, payload, &inventory)?;
        ensure!(said.contains("kprov inventory remove w2 --name e2e-bm"), "{said}");
        success(
            &cluster
                .kprov(&["inventory", "remove", "w2", "--name", "e2e-bm", "--yes"])
                .output()?,
        )?;
        // The DaemonSet's controller counts again in its own time.
        wait_for("one worker less", Duration::from_mins(1), || {
            self_hosted(&kubectl, payload, 3, 1)
        })?;
        let only = BTreeMap::from([("w2".to_owned(), before["w2"].clone())]);
        rack.as_before(&only)?;
        let refused = cluster
            .kprov(&["inventory", "remove", "m1", "--name", "e2e-bm", "--yes"])
            .output()?;
        ensure!(refused.status.code() == Some(1), "a control-plane host was removed");

        // Another version: through the API alone. Before Kubernetes 1.22, without surges, that takes minutes for three.
        if let Some(next) = chain.get(1).filter(|_| full()) {
            let took = rack.upgrade(&cluster, &chain, &["m1", "m2", "m3", "w1"], 3)?;
            eprintln!("{} -> {} after {took:.1} s", payload.version, next.version);
        }

        // The inventory's file is not needed any more.
        std::fs::remove_file(&inventory)?;
        success(&cluster.kprov(&["status", "--name", "e2e-bm"]).output()?)?;
        let start = Instant::now();
        cluster.down()?;
        eprintln!("down after {:.1} s", start.elapsed().as_secs_f32());
        rack.as_before(&before)?;
    }
    Traces::nothing_left(&here)
}

/// Three control-plane hosts and two workers, from an Ansible inventory.
#[test]
fn three_and_two_from_an_ansible_inventory() -> Result<()> {
    const CONTROL_PLANE: [&str; 3] = ["node1", "node2", "node3"];
    const ALL: [&str; 5] = ["node1", "node2", "node3", "node4", "node5"];
    let payload = payloads()?.into_iter().next().context("no payload")?;
    let here = Traces::list();
    {
        let rack = Rack::open("e2ebma", "10.99.72.0/24")?;
        rack.start(&ALL.map(|host| (host, ADMIN)))?;
        let disks = rack.disks(&CONTROL_PLANE)?;
        let before = rack.traces(&ALL)?;
        let cluster = Cluster::new("e2e-bma")?;
        let inventory = rack.ansible(&disks, 2)?;
        let start = Instant::now();
        up(&cluster, &payload, &inventory)?;
        eprintln!(
            "3 + 2 from an Ansible inventory: up after {:.1} s",
            start.elapsed().as_secs_f32()
        );
        self_hosted(&cluster.kubectl(&payload)?, &payload, 3, 2)?;
        for (host, disk) in CONTROL_PLANE.iter().zip(&disks) {
            let mounted = format!("awk '$1 == \"{}\" {{ print $2 }}' /proc/mounts", disk.partition());
            let place = rack.hosts.inside(host, &mounted)?;
            rack.hosts
                .inside(host, &format!("[ -d {}/etcd/member ]", place.trim()))
                .with_context(|| format!("etcd of `{host}` is not on its disk's partition"))?;
        }
        cluster.down()?;
        rack.as_before(&before)?;
        for disk in &disks {
            for what in ["TYPE", "PTTYPE"] {
                ensure!(disk.holds(what)?.is_empty(), "the disk is not given back empty");
            }
        }
    }
    Traces::nothing_left(&here)
}

/// A host of an Ansible inventory whose disk can't be formatted: told as soon as kprov-node has ended there, in its words; and once
/// that is mended the next `up` carries on. Clients know the API by a virtual address, before and after an upgrade without one
/// connection by SSH.
#[test]
fn a_host_that_failed_while_it_was_set_up_is_upgraded_later() -> Result<()> {
    const ADDRESS: &str = "10.99.74.250";
    let chain = upgrades()?.into_iter().next().context("no chain")?;
    let [payload, next, ..] = &chain[..] else {
        bail!("a chain of one release");
    };
    let here = Traces::list();
    {
        let rack = Rack::open("e2ebmf", "10.99.74.0/24")?;
        rack.start(&[("node1", ADMIN)])?;
        let disks = rack.disks(&["node1"])?;
        let before = rack.traces(&["node1"])?;
        let cluster = Cluster::new("e2e-bmf")?;
        let inventory = rack.ansible(&disks, 0)?;
        let file = with_virtual_address(&cluster, &inventory, ADDRESS)?;
        let up = || {
            let mut command = cluster.kprov(&["up", "-f", file.as_str()]);
            command.args(payload.options());
            command
        };
        rack.hosts.inside(
            "node1",
            "cd /usr/sbin; mv mkfs.ext4 mkfs.ext4.good; printf '#!/bin/sh\necho this disk is broken >&2\nexit 1\n' >mkfs.ext4; chmod 755 mkfs.ext4",
        )?;
        let start = Instant::now();
        let out = up().output()?;
        let took = start.elapsed();
        let said = String::from_utf8_lossy(&out.stderr);
        ensure!(out.status.code() == Some(1), "{}: {said}", out.status);
        for part in [
            "machine `node1` has stopped while it was set up",
            "this disk is broken",
            "hint: ",
        ] {
            ensure!(said.contains(part), "`{part}` is not in:\n{said}");
        }
        ensure!(took < Duration::from_mins(2), "told after {took:?}");
        eprintln!("told of a host that stopped after {:.1} s", took.as_secs_f32());

        rack.hosts
            .inside("node1", "mv /usr/sbin/mkfs.ext4.good /usr/sbin/mkfs.ext4")?;
        success(&up().output()?)?;
        let kubeconfig = std::fs::read_to_string(cluster.kubeconfig())?;
        ensure!(kubeconfig.contains(&format!("https://{ADDRESS}:6443")), "{kubeconfig}");
        self_hosted(&cluster.kubectl(payload)?, payload, 1, 0)?;
        ensure!(rack.holders(ADDRESS, &["node1"])? == ["node1"]);
        let took = rack.upgrade(&cluster, &chain, &["node1"], 1)?;
        eprintln!("{} -> {} after {took:.1} s", payload.version, next.version);
        ensure!(rack.holders(ADDRESS, &["node1"])? == ["node1"]);
        cluster.down()?;
        rack.as_before(&before)?;
        for disk in &disks {
            for what in ["TYPE", "PTTYPE"] {
                ensure!(disk.holds(what)?.is_empty(), "the disk is not given back empty");
            }
        }
    }
    Traces::nothing_left(&here)
}

/// Three control-plane hosts with a virtual address, which is all that clients know of the API; the one that has it loses its link.
/// One has a management controller, which switches it on before and off afterwards.
#[test]
#[ignore = "takes long: `cargo xtask test --full` runs it"]
fn the_api_keeps_its_virtual_address() -> Result<()> {
    const ADDRESS: &str = "10.99.73.250";
    let payload = payloads()?.into_iter().next().context("no payload")?;
    let here = Traces::list();
    {
        let rack = Rack::open("e2ebmv", "10.99.73.0/24")?;
        let all = ["m1", "m2", "m3"];
        rack.start(&all.map(|host| (host, "")))?;
        let before = rack.traces(&all)?;
        let cluster = Cluster::new("e2e-bmv")?;
        let inventory = rack.hosts.files().join("hosts.yaml");
        rack.native(&inventory, &all, &[])?;
        let bmc = rack
            .runtime
            .block_on(StandIn::start(Manners::default(), Box::new(|_| {})))?;
        let mut text = std::fs::read_to_string(&inventory)?;
        writeln!(
            text,
            "    bmc: {{address: '{}', credentials: {{env: KPROV_TEST_BMC}}}}",
            bmc.url()
        )?;
        std::fs::write(&inventory, text)?;
        let login = format!("{USER}:{PASSWORD}");
        let file = with_virtual_address(&cluster, &inventory, ADDRESS)?;
        let start = Instant::now();
        let mut command = cluster.kprov(&["up", "-f", file.as_str()]);
        let said = success(&command.args(payload.options()).env("KPROV_TEST_BMC", &login).output()?)?;
        ensure!(bmc.is_on() && !said.contains(PASSWORD), "{said}");
        eprintln!(
            "3 + 0 with a virtual address: up after {:.1} s",
            start.elapsed().as_secs_f32()
        );
        let kubeconfig = std::fs::read_to_string(cluster.kubeconfig())?;
        ensure!(kubeconfig.contains(&format!("https://{ADDRESS}:6443")), "{kubeconfig}");
        let kubectl = cluster.kubectl(&payload)?;
        self_hosted(&kubectl, &payload, 3, 0)?;

        let [holder] = rack.holders(ADDRESS, &all)?[..] else {
            bail!("`{ADDRESS}` is at {:?}", rack.holders(ADDRESS, &all)?);
        };
        let prober = Prober::start(&kubeconfig, None, 20)?;
        std::thread::sleep(Duration::from_secs(3));
        rack.hosts.cable(holder, false)?;
        let others: Vec<&str> = all.into_iter().filter(|host| *host != holder).collect();
        let next = wait_for("another holder", Duration::from_secs(10), || {
            let now = rack.holders(ADDRESS, &others)?;
            now.first().copied().context("nobody has it")
        })?;
        wait_for(
            "no address on the host that is cut off",
            Duration::from_secs(10),
            || {
                ensure!(rack.holders(ADDRESS, &[holder])?.is_empty());
                Ok(())
            },
        )?;
        std::thread::sleep(Duration::from_secs(5));
        let seen = prober.stop()?;
        eprintln!(
            "link of {holder} cut: {next} has the address, {:.2} s without an answer; {} requests answered, {} failed",
            seen.silence.as_secs_f32(),
            seen.succeeded,
            seen.failed.len()
        );
        ensure!(seen.silence < Duration::from_secs(3), "{seen:?}");
        kubectl.run(&["create", "configmap", "written-meanwhile"])?;

        // The link is back: the address stays where it is, and the machine is one of them again.
        rack.hosts.cable(holder, true)?;
        wait_for("all three again", Duration::from_mins(2), || {
            self_hosted(&kubectl, &payload, 3, 0)
        })?;
        ensure!(
            rack.holders(ADDRESS, &all)? == [next],
            "{:?}",
            rack.holders(ADDRESS, &all)?
        );
        let mut command = cluster.kprov(&["down", "--name", &cluster.name, "--yes", "--power-off"]);
        success(&command.env("KPROV_TEST_BMC", &login).output()?)?;
        ensure!(!bmc.is_on(), "it has power still");
        rack.as_before(&before)?;
    }
    Traces::nothing_left(&here)
}

/// What is wrong with an inventory is told with file, line and host before any host is asked, and nothing is kept of the cluster.
#[test]
fn inventories_that_are_not_right() -> Result<()> {
    const NATIVE: &str = "apiVersion: kprov.io/v1alpha1\nkind: Inventory\nhosts:\n  - {name: a, role: control-plane, address: 192.0.2.1}\n";
    let payload = payloads()?.into_iter().next().context("no payload")?;
    let cluster = Cluster::new("e2e-bmbad")?;
    let directory = tempfile::tempdir()?;
    let cases: &[(&str, String, &[&str])] = &[
        (
            "h.yaml",
            format!("{NATIVE}  - {{name: a, address: 192.0.2.2}}\n"),
            &["h.yaml:5`", "host `a`", "h.yaml:4`", "a name of its own"],
        ),
        (
            "h.yaml",
            format!("{NATIVE}  - {{name: b, address: 192.0.2.1}}\n"),
            &[
                "h.yaml:5`",
                "host `b`",
                "`192.0.2.1` is the address of `a`",
                "an address of its own",
            ],
        ),
        (
            "h.ini",
            "[kube_control_plane]\na ansible_host=192.0.2.1\n[kube_nodes]\nb\n".into(),
            &["h.ini:4`", "host `b`", "`kube_nodes`", "`kube_node`"],
        ),
        (
            "h.ini",
            "[kube_control_plane]\na\n[k8s_cluster:children]\nkube_nodez\n".into(),
            &["h.ini:4`", "`kube_nodez`"],
        ),
        (
            "h.yaml",
            format!("{NATIVE}  - {{name: b, adress: 192.0.2.2}}\n"),
            &["h.yaml:5`", "host `b`", "adress"],
        ),
        ("h.yaml", "all:\n  hosts:\n    a: [\n".into(), &["h.yaml:"]),
    ];
    for (name, text, says) in cases {
        let path = directory.path().join(name);
        std::fs::write(&path, text)?;
        let path = path.to_string_lossy();
        let mut up = cluster.kprov(&[
            "up",
            "--provider",
            "baremetal",
            "--name",
            &cluster.name,
            "--inventory",
            &path,
        ]);
        for out in [
            cluster.kprov(&["inventory", "check", &path]).output()?,
            up.args(payload.options()).output()?,
        ] {
            let said = String::from_utf8_lossy(&out.stderr);
            ensure!(out.status.code() == Some(1), "{text}: {}: {said}", out.status);
            for part in says.iter().chain(&["hint: "]) {
                ensure!(said.contains(part), "`{part}` is not in:\n{said}\nfor:\n{text}");
            }
        }
    }
    ensure!(!cluster.home().join("clusters").exists(), "something was kept");
    Ok(())
}
