//! `kprov up --provider baremetal` on hosts that run Linux and a real `sshd`: from an inventory to a cluster, and back to the
//! hosts as they were.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::process::Output;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use kprov_e2e::{Cluster, Payload, Traces, full, items, payloads, self_hosted, upgrades, wait_for};
use kprov_emulators::hosts::{ADMIN, Hosts};
use tokio::runtime::Runtime;

/// What a cluster could leave on a host, a line each.
const TRACES: &str = r#"
ip -o link show | awk '{ print "interface", $2 }' | sed 's/@.*//'
ip route show | sed 's/^/route /'
for save in iptables-save ip6tables-save; do $save 2>/dev/null | grep -- '^-' | sed "s/^/$save /"; done
awk '{ print "mount", $5 }' /proc/self/mountinfo
for d in /etc /etc/kprov /etc/kubernetes /etc/containerd /etc/cni /var/lib /var/lib/kprov /var/lib/kubelet /var/lib/etcd \
    /var/lib/containerd /var/lib/cni /var/log /var/log/pods /var/log/containers /usr/libexec /usr/local/bin /run; do
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

fn up(cluster: &Cluster, payload: &Payload, inventory: &Utf8Path) -> Result<String> {
    let mut command = cluster.kprov(&["up", "--provider", "baremetal", "--name", &cluster.name]);
    command.arg("--inventory").arg(inventory).args(payload.options());
    success(&command.output()?)
}

/// Three control-plane hosts and two workers; one host more, one host less; another version, without one connection by SSH; and
/// the hosts as they were.
#[test]
fn three_and_two_from_a_native_inventory() -> Result<()> {
    if !full() {
        return Ok(());
    }
    let chain = upgrades()?.into_iter().next().context("no chain")?;
    let payload = chain.first().context("an empty chain")?;
    let here = Traces::list();
    {
        let rack = Rack::open("e2ebm", "10.99.71.0/24")?;
        let all = ["m1", "m2", "m3", "w1", "w2", "w3"];
        rack.start(&all.map(|host| (host, "")))?;
        let before = rack.traces(&all)?;
        let cluster = Cluster::new("e2e-bm")?;
        let inventory = rack.hosts.files().join("hosts.yaml");
        rack.native(&inventory, &["m1", "m2", "m3"], &["w1", "w2"])?;
        let checked = success(&cluster.kprov(&["inventory", "check", inventory.as_str()]).output()?)?;
        ensure!(checked.matches('✔').count() == 5, "{checked}");

        let start = Instant::now();
        up(&cluster, payload, &inventory)?;
        eprintln!("3 + 2 by SSH: up after {:.1} s", start.elapsed().as_secs_f32());
        let kubectl = cluster.kubectl(payload)?;
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

        // One host more.
        rack.native(&inventory, &["m1", "m2", "m3"], &["w1", "w2", "w3"])?;
        up(&cluster, payload, &inventory)?;
        self_hosted(&kubectl, payload, 3, 3)?;
        // One less: `up` says so and leaves it, and the command that it names takes it out.
        rack.native(&inventory, &["m1", "m2", "m3"], &["w1", "w2"])?;
        let said = up(&cluster, payload, &inventory)?;
        ensure!(said.contains("kprov inventory remove w3 --name e2e-bm"), "{said}");
        success(
            &cluster
                .kprov(&["inventory", "remove", "w3", "--name", "e2e-bm", "--yes"])
                .output()?,
        )?;
        self_hosted(&kubectl, payload, 3, 2)?;
        let only = BTreeMap::from([("w3".to_owned(), before["w3"].clone())]);
        rack.as_before(&only)?;
        let refused = cluster
            .kprov(&["inventory", "remove", "m1", "--name", "e2e-bm", "--yes"])
            .output()?;
        ensure!(refused.status.code() == Some(1), "a control-plane host was removed");

        // Another version: through the API alone.
        if let Some(next) = chain.get(1) {
            let logins = rack.logins(&all)?;
            let start = Instant::now();
            success(&cluster.upgrade_command(&chain, &next.version).output()?)?;
            let took = start.elapsed().as_secs_f32();
            let during = rack.logins(&all)? - logins;
            eprintln!(
                "{} -> {} after {took:.1} s, SSH connections: {during}",
                payload.version, next.version
            );
            ensure!(during == 0, "{during} SSH connections during an upgrade");
            self_hosted(&kubectl, next, 3, 2)?;
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

/// One control-plane host and one worker, from an Ansible inventory as kubespray's users have it: a user who is not root, group
/// variables, known hosts, addresses inside.
#[test]
fn one_and_one_from_an_ansible_inventory() -> Result<()> {
    if !full() {
        return Ok(());
    }
    let payload = payloads()?.into_iter().next().context("no payload")?;
    let here = Traces::list();
    {
        let rack = Rack::open("e2ebma", "10.99.72.0/24")?;
        rack.start(&[("node1", ADMIN), ("node2", ADMIN)])?;
        let before = rack.traces(&["node1", "node2"])?;
        let cluster = Cluster::new("e2e-bma")?;
        let directory = rack.hosts.files().join("inventory");
        std::fs::create_dir_all(directory.join("group_vars/all"))?;
        let known = directory.join("known_hosts");
        let mut lines = String::new();
        let mut hosts = String::new();
        for name in ["node1", "node2"] {
            let address = rack.address(name)?;
            writeln!(lines, "{address} {}", rack.hosts.host_key(name)?)?;
            writeln!(hosts, "{name} ansible_host={address} ip={address}")?;
        }
        std::fs::write(&known, lines)?;
        let vars = format!(
            "---\nansible_user: admin\nansible_ssh_private_key_file: {}\nansible_ssh_common_args: \"-o UserKnownHostsFile={known}\"\n",
            rack.hosts.key()
        );
        std::fs::write(directory.join("group_vars/all/all.yml"), vars)?;
        let inventory = directory.join("inventory.ini");
        let text = format!(
            "[all]\n{hosts}\n[kube_control_plane]\nnode1\n\n[etcd]\nnode1\n\n[kube_node]\nnode[2:2]\n\n\
             [k8s_cluster:children]\nkube_control_plane\nkube_node\n"
        );
        std::fs::write(&inventory, text)?;
        let start = Instant::now();
        up(&cluster, &payload, &inventory)?;
        eprintln!(
            "1 + 1 from an Ansible inventory: up after {:.1} s",
            start.elapsed().as_secs_f32()
        );
        self_hosted(&cluster.kubectl(&payload)?, &payload, 1, 1)?;
        cluster.down()?;
        rack.as_before(&before)?;
    }
    Traces::nothing_left(&here)
}
