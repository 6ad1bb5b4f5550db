//! What every cloud must stand: a cluster's whole life, and `kprov` killed at any call.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use camino::Utf8PathBuf;
use serde_json::{Value, json};

use super::Room;
use crate::cluster::finished;
use crate::{Cluster, Kubectl, Payload, Prober, Watcher, pods_work, self_hosted, wait_for};

/// Where machines fetch their release, at the room's address.
const RELEASE_PORT: u16 = 10_202;
/// How long a call that is held stays so: longer than any test.
pub const HELD: Duration = Duration::from_hours(1);

/// Everything in an account, by kind: ids.
pub type Everything = BTreeMap<String, BTreeSet<String>>;

/// A cloud on this host, as scenarios use it.
pub trait Cloud {
    /// The provider's name.
    fn provider(&self) -> &'static str;
    /// The machines.
    fn room(&self) -> &Room;
    /// The provider's own part of the cluster file.
    fn settings(&self) -> Value;
    /// The zones to spread machines over.
    fn zones(&self) -> Vec<String>;
    /// The variables that lead `kprov` here and let it in.
    fn environment(&self) -> Vec<(String, String)>;
    /// Everything in the account; not counted as calls.
    fn everything(&self) -> Result<Everything>;
    /// The calls that came, by name, since they were forgotten last.
    fn calls(&self) -> BTreeMap<String, u64>;
    /// Counts from zero again.
    fn forget_calls(&self);
    /// The id under which the room has a machine.
    fn instance(&self, machine: &str) -> Result<String>;
    /// Deletes a machine as a person would by hand.
    fn delete_by_hand(&self, machine: &str) -> Result<()>;
    /// From now on that many calls go through, and all others are held for [`HELD`] before they take effect.
    fn hold_after(&self, calls: u64);
    /// Holds no more calls.
    fn hold_none(&self);
}

/// A cluster in a cloud, with what its machines need of this host.
pub struct Trial<'a> {
    cloud: &'a dyn Cloud,
    /// The cluster.
    pub cluster: Cluster,
    payload: Payload,
    file: Utf8PathBuf,
    control_plane: u32,
    workers: u32,
    server: Child,
}

impl<'a> Trial<'a> {
    /// Writes the cluster file and serves the release. Nothing is made yet.
    pub fn new(
        cloud: &'a dyn Cloud,
        name: &str,
        range: ipnet::Ipv4Net,
        payload: &Payload,
        control_plane: u32,
        workers: u32,
    ) -> Result<Self> {
        let cluster = Cluster::with_environment(name, cloud.environment())?;
        let listen = format!("{}:{RELEASE_PORT}", cloud.room().host_address());
        let file = cluster.home().join("cluster.yaml");
        let text = json!({
            "apiVersion": "kprov.io/v1alpha1", "kind": "Cluster", "metadata": {"name": name},
            "spec": {
                "provider": cloud.provider(), "zones": cloud.zones(), cloud.provider(): cloud.settings(),
                "kubernetes": {"releaseUrls": [format!("http://{listen}")]},
                "controlPlane": {"count": control_plane, "etcdDiskGib": 4}, "workers": {"count": workers},
                "network": {"machines": range},
            },
        });
        std::fs::write(&file, text.to_string())?;
        let server = cluster
            .kprov(&["release", "serve", payload.dir.as_str(), "--listen", &listen])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        Ok(Self {
            cloud,
            cluster,
            payload: payload.clone(),
            file,
            control_plane,
            workers,
            server,
        })
    }

    fn up_command(&self) -> Command {
        let mut command = self
            .cluster
            .kprov(&["up", "--file", self.file.as_str(), "--timeout", "600"]);
        command.args(self.payload.options());
        command
    }

    fn down_command(&self) -> Command {
        self.cluster.kprov(&["down", "--name", &self.cluster.name, "--yes"])
    }

    /// Runs `kprov up` to its end; on failure what machines printed is in the error.
    pub fn up(&self) -> Result<Duration> {
        let start = Instant::now();
        self.diagnosed(finished(&self.up_command().output()?))?;
        Ok(start.elapsed())
    }

    /// A failure with the diagnosis behind it.
    fn diagnosed<T>(&self, result: Result<T>) -> Result<T> {
        result.map_err(|error| anyhow!("{error:#}\n{}", self.diagnosis()))
    }

    fn kubectl(&self) -> Result<Kubectl> {
        self.cluster.kubectl(&self.payload)
    }

    fn nodes(&self) -> (u64, u64) {
        (self.control_plane.into(), self.workers.into())
    }

    fn name_of(&self, role: &str, index: u32) -> String {
        format!("{}-{role}-{index}", self.cluster.name)
    }

    /// Problems of the room, and the consoles of all machines.
    fn diagnosis(&self) -> String {
        let room = self.cloud.room();
        let mut text = format!("room: {:?}\n", room.problems());
        let names = (0..self.control_plane)
            .map(|i| self.name_of("cp", i))
            .chain((0..self.workers).map(|i| self.name_of("worker", i)));
        for name in names {
            let console = match self.cloud.instance(&name) {
                Ok(id) => room.console(&id),
                Err(error) => format!("{error:#}"),
            };
            let _ = write!(text, "--- {name}\n{console}\n");
        }
        text
    }

    /// The calls of a `kprov up` that finds all as it should be.
    fn up_changes_nothing(&self) -> Result<()> {
        let before = self.cloud.everything()?;
        self.cloud.forget_calls();
        let took = self.up()?;
        let calls = self.cloud.calls();
        ensure!(self.cloud.everything()? == before, "a second `up` changed the account");
        say(&format!(
            "{}: `up` with nothing to do took {:.1} s and {} calls: {calls:?}",
            self.cloud.provider(),
            took.as_secs_f64(),
            calls.values().sum::<u64>()
        ));
        Ok(())
    }

    /// The data disk is a device that kprov-node has formatted and mounted, and etcd's data is on it.
    fn etcd_is_on_its_disk(&self) -> Result<()> {
        for index in 0..self.control_plane {
            let machine = self.name_of("cp", index);
            let seen = self.cloud.room().inside(
                &self.cloud.instance(&machine)?,
                "findmnt -n -o FSTYPE,LABEL /var/lib/kprov/data && ls /var/lib/kprov/data/etcd/member/wal",
            )?;
            ensure!(
                seen.starts_with("ext4") && seen.contains(".wal"),
                "{machine} has its etcd data elsewhere: {seen}"
            );
        }
        Ok(())
    }

    /// Machines that somebody deleted are put back, with their names, disks and places in etcd; the API's data is still there.
    fn deleted_by_hand(&self, machines: &[String]) -> Result<()> {
        let kubectl = self.kubectl()?;
        let before = self.cloud.everything()?;
        kubectl.run(&["create", "configmap", "from-before", "--from-literal=a=b"])?;
        let mut old = BTreeSet::new();
        for machine in machines {
            old.insert(self.cloud.instance(machine)?);
            self.cloud.delete_by_hand(machine)?;
        }
        self.cloud
            .room()
            .wait("the machines' end", Duration::from_secs(30), |p| {
                p.instances.iter().all(|i| !old.contains(&i.id))
            })?;
        let took = self.up()?;
        say(&format!(
            "{}: `up` after {machines:?} were deleted took {:.1} s",
            self.cloud.provider(),
            took.as_secs_f64()
        ));
        let (control_plane, workers) = self.nodes();
        self.diagnosed(wait_for("the cluster, whole again", Duration::from_mins(3), || {
            self_hosted(&kubectl, &self.payload, control_plane, workers)
        }))?;
        kubectl.run(&["get", "configmap", "from-before"])?;
        let after = self.cloud.everything()?;
        let count = |all: &Everything| {
            all.iter()
                .map(|(kind, ids)| (kind.clone(), ids.len()))
                .collect::<BTreeMap<_, _>>()
        };
        ensure!(count(&before) == count(&after), "{before:#?}\n{after:#?}");
        self.etcd_is_on_its_disk()?;
        self.etcd_has_all_members()
    }

    fn etcd_has_all_members(&self) -> Result<()> {
        let kubectl = self.kubectl()?;
        let pod = format!("etcd-{}", self.name_of("cp", 0));
        let endpoint = "--endpoints=https://127.0.0.1:2379";
        let list = wait_for("etcd's members", Duration::from_mins(1), || {
            let members = kubectl.run(&[
                "exec",
                "-n",
                "kube-system",
                &pod,
                "--",
                "/usr/local/bin/etcdctl",
                endpoint,
                "--cacert=/etc/kubernetes/pki/etcd/ca.crt",
                "--cert=/etc/kubernetes/pki/etcd/peer.crt",
                "--key=/etc/kubernetes/pki/etcd/peer.key",
                "member",
                "list",
            ])?;
            let started = members
                .lines()
                .filter(|l| l.contains(", started, ") && l.trim_end().ends_with("false"));
            ensure!(started.count() == self.control_plane as usize, "{members}");
            Ok(members)
        });
        list.map(drop)
    }

    /// An upgrade, with clients at the load balancer all through it: none loses anything, and the cloud isn't asked once.
    fn upgrade(&self, chain: &[Payload]) -> Result<()> {
        let last = chain.last().context("no chain")?;
        let config = std::fs::read_to_string(self.cluster.kubeconfig())?;
        let prober = Prober::start(&config, None, 20)?;
        let watch = Watcher::start(&config)?;
        self.cloud.forget_calls();
        let start = Instant::now();
        let out = self.cluster.upgrade_command(chain, &last.version).output()?;
        let took = start.elapsed();
        std::thread::sleep(Duration::from_secs(5));
        let calls = self.cloud.calls();
        let seen = prober.stop()?;
        let watched = watch.stop()?;
        say(&format!(
            "{}: {} -> {} in {:.1} s; {} calls to the cloud; {} requests through the load balancer, {} failed, longest {} ms",
            self.cloud.provider(),
            self.payload.version,
            last.version,
            took.as_secs_f64(),
            calls.values().sum::<u64>(),
            seen.succeeded,
            seen.failed.len(),
            seen.longest.as_millis()
        ));
        self.diagnosed(finished(&out))?;
        ensure!(calls.is_empty(), "an upgrade called the cloud: {calls:?}");
        ensure!(seen.succeeded > 50, "only {} requests were made", seen.succeeded);
        ensure!(seen.failed.is_empty(), "requests failed: {:#?}", seen.failed);
        watched.without_gap()?;
        let (control_plane, workers) = self.nodes();
        wait_for("the new version everywhere", Duration::from_mins(1), || {
            self_hosted(&self.kubectl()?, last, control_plane, workers)
        })
    }

    /// `kprov down`, after which the account is as it was.
    fn down(&self, before: &Everything) -> Result<()> {
        self.cloud.forget_calls();
        let start = Instant::now();
        let out = self.down_command().output()?;
        finished(&out)?;
        say(&format!(
            "{}: `down` took {:.1} s and {} calls",
            self.cloud.provider(),
            start.elapsed().as_secs_f64(),
            self.cloud.calls().values().sum::<u64>()
        ));
        let said = String::from_utf8_lossy(&out.stdout).into_owned();
        ensure!(said.contains("nothing left"), "{said}");
        self.nothing_left(before)
    }

    /// The account is as it was before, and the room is empty.
    fn nothing_left(&self, before: &Everything) -> Result<()> {
        let after = self.cloud.everything()?;
        ensure!(
            after == *before,
            "`down` left or took something: {before:#?}\n{after:#?}"
        );
        self.cloud
            .room()
            .wait("an empty room", Duration::from_secs(30), |p| p.instances.is_empty())
            .map(drop)
    }

    /// Kills a `kprov` command once `calls` of its calls went through and the next is on its way; `false` if it ended before.
    fn killed_after(&self, mut command: Command, calls: u64) -> Result<bool> {
        self.cloud.hold_after(calls);
        self.cloud.forget_calls();
        let mut errors = tempfile::tempfile()?;
        let mut child = command.stdout(Stdio::null()).stderr(errors.try_clone()?).spawn()?;
        let start = Instant::now();
        let ended = loop {
            if let Some(status) = child.try_wait()? {
                break Some(status);
            }
            if self.cloud.calls().values().sum::<u64>() > calls {
                break None;
            }
            if start.elapsed() > Duration::from_mins(10) {
                child.kill()?;
                bail!("neither call {calls} nor the end came in time");
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        if ended.is_none() {
            child.kill()?;
            child.wait()?;
        }
        self.cloud.hold_none();
        let Some(status) = ended else { return Ok(true) };
        let mut text = String::new();
        std::io::Seek::rewind(&mut errors)?;
        std::io::Read::read_to_string(&mut errors, &mut text)?;
        ensure!(
            status.success(),
            "ended by itself before call {calls}: {status}\n{text}"
        );
        Ok(false)
    }
}

impl Drop for Trial<'_> {
    fn drop(&mut self) {
        self.cloud.hold_none();
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

/// `up`, pods, `up` again, machines deleted by hand and put back, an upgrade, `down`; the account ends as it began. Before `up` and
/// `down` end they are killed at these of their calls.
pub fn life(
    cloud: &dyn Cloud,
    name: &str,
    range: ipnet::Ipv4Net,
    chain: &[Payload],
    size: (u32, u32),
    kills: &[u64],
) -> Result<()> {
    let (control_plane, workers) = size;
    let payload = chain.first().context("no payload")?;
    let before = cloud.everything()?;
    let trial = Trial::new(cloud, name, range, payload, control_plane, workers)?;
    for calls in kills {
        ensure!(
            trial.killed_after(trial.up_command(), *calls)?,
            "`up` made fewer than {calls} calls"
        );
    }
    cloud.forget_calls();
    let took = trial.up()?;
    say(&format!(
        "{}: {control_plane} + {workers} up in {:.1} s with {} calls: {:?}",
        cloud.provider(),
        took.as_secs_f64(),
        cloud.calls().values().sum::<u64>(),
        cloud.calls()
    ));
    let kubectl = trial.kubectl()?;
    let (nodes, others) = trial.nodes();
    wait_for("the cluster", Duration::from_mins(1), || {
        self_hosted(&kubectl, payload, nodes, others)
    })?;
    trial.etcd_is_on_its_disk()?;
    pods_work(&kubectl, payload)?;
    trial.up_changes_nothing()?;
    trial.deleted_by_hand(&[trial.name_of("worker", 0), trial.name_of("cp", control_plane - 1)])?;
    trial.upgrade(chain)?;
    for calls in kills {
        trial.killed_after(trial.down_command(), *calls)?;
    }
    trial.down(&before)
}

/// `up` and then `down`, each killed again and again, `step` calls later each time: the next `up` completes, nothing is there twice,
/// and the next `down` leaves nothing.
pub fn killed(cloud: &dyn Cloud, name: &str, range: ipnet::Ipv4Net, payload: &Payload, step: u64) -> Result<()> {
    let before = cloud.everything()?;
    let trial = Trial::new(cloud, name, range, payload, 1, 1)?;
    let mut kills = [0, 0];
    let mut calls = 0;
    while trial.killed_after(trial.up_command(), calls)? {
        kills[0] += 1;
        calls += step;
    }
    trial.up()?;
    let kubectl = trial.kubectl()?;
    wait_for("the cluster", Duration::from_mins(1), || {
        self_hosted(&kubectl, payload, 1, 1)
    })?;
    let once = cloud.everything()?;
    let killed_once: BTreeMap<_, _> = once.iter().map(|(kind, ids)| (kind.as_str(), ids.len())).collect();

    // The first run of `down` sees most; each one after it goes on where the last was killed, so that it soon has little to do.
    let mut calls = 0;
    while trial.killed_after(trial.down_command(), calls)? {
        kills[1] += 1;
        calls += step;
    }
    trial.nothing_left(&before)?;

    // Undisturbed, there is as much as after all those kills.
    trial.up()?;
    let undisturbed = cloud.everything()?;
    let plain: BTreeMap<_, _> = undisturbed
        .iter()
        .map(|(kind, ids)| (kind.as_str(), ids.len()))
        .collect();
    ensure!(killed_once == plain, "after kills: {killed_once:?}\nwithout: {plain:?}");
    trial.down(&before)?;
    say(&format!(
        "{}: `up` was killed at {} calls, `down` at {}",
        cloud.provider(),
        kills[0],
        kills[1]
    ));
    ensure!(kills[0] >= 5 && kills[1] >= 3, "only {kills:?} kills");
    Ok(())
}

fn say(text: &str) {
    eprintln!("{text}");
}
