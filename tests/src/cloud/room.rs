//! The room itself: looks at the emulator, and makes what it sees.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::net::Ipv4Addr;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use ipnet::Ipv4Net;
use kprov_provider::{Provider as _, ProviderError};
use kprov_provider_local::{LocalConfig, LocalProvider};
use kprov_types::machine::{FirstBoot, MachineSpec, MachineState, NetworkSpec};
use kprov_types::{ClusterName, MachineName, Role};
use tokio::sync::oneshot;

use super::balancer::Port;
use super::volumes::{self, Volumes};
use super::{Emulator, Instance, Picture, boot};
use crate::wait_for;

/// Where rooms keep volumes.
const ROOMS: &str = "/var/lib/kprov/rooms";
/// How often the emulator is looked at.
const LOOK: Duration = Duration::from_millis(300);
/// The port of the local provider's own balancer, which nobody here asks for anything.
const UNUSED_PORT: u16 = 6443;

/// What clears a room whose process was killed: it reads until that process is gone.
const WATCHDOG: &str = r#"
read -r word && exit 0
"$1" down --name "$2" --yes
for file in /sys/block/loop*/loop/backing_file; do
    case "$(cat "$file" 2>/dev/null)" in "$3"/*) losetup -d "/dev/$(basename "${file%/loop/backing_file}")" ;; esac
done
rm -rf "$3"
rmdir "$(dirname "$3")"
"#;

/// Machines for an emulator's instances; removed with it.
pub struct Room {
    cluster: ClusterName,
    range: Ipv4Net,
    shared: Arc<Mutex<Shared>>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
    watchdog: Child,
}

/// What the room's thread tells.
#[derive(Debug, Default)]
struct Shared {
    /// What was made true last.
    picture: Option<Picture>,
    /// Why the last look did not come to its end.
    problem: Option<String>,
    /// All problems so far, each once.
    problems: BTreeSet<String>,
}

impl Room {
    /// Makes the room's network, `range` of which must hold all addresses that the emulator gives, and begins to watch. What an
    /// earlier room of this name left is removed first.
    pub fn open(name: &str, range: Ipv4Net, emulator: impl Emulator) -> Result<Self> {
        let bin = std::env::var("KPROV_BIN").context("KPROV_BIN is not set: run the tests by `cargo xtask test`")?;
        let kprov = Utf8PathBuf::from(bin).join("kprov");
        let cluster = ClusterName::new(name)?;
        let dir = Utf8Path::new(ROOMS).join(name);
        let cloud_init = boot::cloud_init()?;
        let provider = LocalProvider::new(LocalConfig::new(kprov.clone()))?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()?;
        runtime.block_on(clear(&provider, &cluster, &dir))?;
        let watchdog = watchdog(&kprov, name, &dir)?;
        let shared = Arc::<Mutex<Shared>>::default();
        let (stop, stopped) = oneshot::channel();
        let mut keeper = Keeper {
            volumes: Volumes::new(dir.join("volumes"))?,
            provider,
            cluster: cluster.clone(),
            range,
            cloud_init,
            ports: BTreeMap::new(),
            attached: BTreeMap::new(),
        };
        let made = runtime.block_on(keeper.make_network());
        let told = shared.clone();
        let thread = std::thread::spawn(move || runtime.block_on(keeper.keep(emulator, &told, stopped, &dir)));
        let room = Self {
            cluster,
            range,
            shared,
            stop: Some(stop),
            thread: Some(thread),
            watchdog,
        };
        // Only now, so that what was made of the network is removed with the room.
        made?;
        Ok(room)
    }

    /// The address under which machines reach this host, and that host's programs reach none but them.
    pub fn host_address(&self) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.range.network()) + 1)
    }

    /// The address of a load balancer that the emulator gives none: the last one of the range.
    pub fn balancer_address(&self) -> Ipv4Addr {
        balancer_address(self.range)
    }

    /// Waits until all that the emulator has is made, and satisfies `check`.
    pub fn wait(&self, what: &str, limit: Duration, check: impl Fn(&Picture) -> bool) -> Result<Picture> {
        wait_for(what, limit, || {
            let shared = self.shared();
            let problem = shared.problem.clone();
            let picture = shared.picture.clone().context("nothing was made yet")?;
            ensure!(problem.is_none(), "{}", problem.unwrap_or_default());
            ensure!(check(&picture), "{picture:?}");
            Ok(picture)
        })
    }

    /// The last lines that an instance printed.
    pub fn console(&self, instance: &str) -> String {
        let path = format!(
            "{}/{}/machines/{instance}/console.log",
            kprov_provider_local::STATE_DIR,
            self.cluster
        );
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let lines: Vec<&str> = text.lines().rev().take(40).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join("\n")
    }

    /// Runs a script inside an instance, for what it prints.
    pub fn inside(&self, instance: &str, script: &str) -> Result<String> {
        let path = format!(
            "{}/{}/machines/{instance}/init.json",
            kprov_provider_local::STATE_DIR,
            self.cluster
        );
        let init: serde_json::Value = serde_json::from_slice(&std::fs::read(&path)?)?;
        let out = Command::new("nsenter")
            .args([
                "--all",
                "--target",
                &init["pid"].to_string(),
                "--",
                "/bin/sh",
                "-c",
                script,
            ])
            .stdin(Stdio::null())
            .output()?;
        ensure!(
            out.status.success(),
            "`{script}` in {instance}: {}",
            String::from_utf8_lossy(&out.stderr)
        );
        Ok(String::from_utf8_lossy(&out.stdout).trim().to_owned())
    }

    /// What went wrong so far, each thing once.
    pub fn problems(&self) -> BTreeSet<String> {
        self.shared().problems.clone()
    }

    fn shared(&self) -> std::sync::MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        drop(self.stop.take());
        let cleared = self.thread.take().is_some_and(|thread| thread.join().is_ok());
        if let Some(mut stdin) = self.watchdog.stdin.take()
            && cleared
        {
            let _ = stdin.write_all(b"done\n");
        }
        let _ = self.watchdog.wait();
    }
}

fn balancer_address(range: Ipv4Net) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(range.broadcast()) - 1)
}

/// Starts what clears the room should this process be killed. In a process group of its own, as a test runner kills groups.
fn watchdog(kprov: &Utf8Path, name: &str, dir: &Utf8Path) -> Result<Child> {
    Command::new("sh")
        .args(["-c", WATCHDOG, "room-watchdog", kprov.as_str(), name, dir.as_str()])
        .env("KPROV_HOME", dir.join("home"))
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("can't start the room's watchdog")
}

/// Removes everything of a room.
async fn clear(provider: &LocalProvider, cluster: &ClusterName, dir: &Utf8Path) -> Result<()> {
    let observed = provider.observe(cluster).await.map_err(plain)?;
    let names: Vec<MachineName> = observed.machines.into_iter().map(|m| m.name).collect();
    provider.remove_machines(cluster, &names).await.map_err(plain)?;
    provider.remove_network(cluster).await.map_err(plain)?;
    if dir.exists() {
        Volumes::new(dir.join("volumes"))?.keep_only(&BTreeSet::new())?;
        std::fs::remove_dir_all(dir)?;
    }
    let _ = std::fs::remove_dir(ROOMS);
    Ok(())
}

/// A provider's error with everything that it says.
#[expect(clippy::needless_pass_by_value, reason = "for `map_err`")]
fn plain(error: ProviderError) -> anyhow::Error {
    let mut text = error.to_string();
    let mut next = std::error::Error::source(&error);
    while let Some(source) = next {
        text = format!("{text}: {source}");
        next = source.source();
    }
    anyhow!(text)
}

/// The room's own thread.
struct Keeper {
    provider: LocalProvider,
    cluster: ClusterName,
    range: Ipv4Net,
    volumes: Volumes,
    cloud_init: Utf8PathBuf,
    /// Each balancer's ports.
    ports: BTreeMap<(String, u16), Port>,
    /// What is attached: each volume with the instance and its first process, as devices go when a machine stops.
    attached: BTreeMap<String, (String, i32)>,
}

impl Keeper {
    async fn make_network(&self) -> Result<()> {
        let want = NetworkSpec {
            cidr: Some(self.range),
            api_port: UNUSED_PORT,
        };
        self.provider
            .ensure_network(&self.cluster, &want)
            .await
            .map_err(plain)?;
        self.provider
            .add_host_address(&self.cluster, balancer_address(self.range))
            .await
            .map_err(plain)
    }

    async fn keep(
        &mut self,
        emulator: impl Emulator,
        shared: &Mutex<Shared>,
        mut stopped: oneshot::Receiver<()>,
        dir: &Utf8Path,
    ) {
        let mut emulator = Some(emulator);
        while let Some(mut table) = emulator.take() {
            let looked = tokio::task::spawn_blocking(move || {
                let picture = table.look();
                (table, picture)
            });
            // An emulator that panics ends the room's work, and the tests that wait for it say so.
            let Ok((table, picture)) = looked.await else { break };
            emulator = Some(table);
            let made = match picture {
                Ok(picture) => self.make(&picture).await.map(|()| picture),
                Err(error) => Err(error.context("the emulator can't be looked at")),
            };
            {
                let mut shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
                match made {
                    Ok(picture) => {
                        shared.picture = Some(picture);
                        shared.problem = None;
                    }
                    Err(error) => {
                        let text = format!("{error:#}");
                        if shared.problems.insert(text.clone()) {
                            eprintln!("room {}: {text}", self.cluster);
                        }
                        shared.problem = Some(text);
                    }
                }
            }
            if tokio::time::timeout(LOOK, &mut stopped).await.is_ok() {
                break;
            }
        }
        self.ports.clear();
        let start = Instant::now();
        while let Err(error) = clear(&self.provider, &self.cluster, dir).await {
            if start.elapsed() > Duration::from_secs(20) {
                eprintln!("room {}: can't be cleared: {error:#}", self.cluster);
                break;
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Makes what is in the picture and removes what isn't.
    async fn make(&mut self, picture: &Picture) -> Result<()> {
        self.machines(picture).await?;
        self.attach(picture).await?;
        self.balance(picture).await
    }

    async fn machines(&self, picture: &Picture) -> Result<()> {
        let there = self.provider.observe(&self.cluster).await.map_err(plain)?.machines;
        let wanted: BTreeMap<&str, &Instance> = picture.instances.iter().map(|i| (i.id.as_str(), i)).collect();
        let gone: Vec<MachineName> = there
            .iter()
            .filter(|m| !wanted.contains_key(m.name.as_str()))
            .map(|m| m.name.clone())
            .collect();
        if !gone.is_empty() {
            self.provider
                .remove_machines(&self.cluster, &gone)
                .await
                .map_err(plain)?;
        }
        let runs = |id: &str| {
            there
                .iter()
                .any(|m| m.name.as_str() == id && m.state == MachineState::Running)
        };
        let mut start = Vec::new();
        for instance in wanted.values() {
            match (instance.running, runs(&instance.id)) {
                (true, false) => start.push((self.spec(instance)?, instance.address)),
                (false, true) => {
                    let name = MachineName::new(&instance.id)?;
                    self.provider.stop_machine(&self.cluster, &name).await.map_err(plain)?;
                }
                _ => {}
            }
        }
        if start.is_empty() {
            return Ok(());
        }
        self.provider
            .ensure_machines_at(&self.cluster, &start)
            .await
            .map(drop)
            .map_err(plain)
    }

    fn spec(&self, instance: &Instance) -> Result<MachineSpec> {
        ensure!(
            self.range.contains(&instance.address),
            "instance {} has the address {}, which is not in the room's range {}",
            instance.id,
            instance.address,
            self.range
        );
        Ok(MachineSpec {
            name: MachineName::new(&instance.id)?,
            role: Role::Worker,
            zone: None,
            size: None,
            image: None,
            first_boot: FirstBoot(boot::script(instance, &self.cloud_init)),
            data_disk: false,
        })
    }

    /// Shows each attached volume inside its machine, with what udev would add: a link by the file system's label.
    async fn attach(&mut self, picture: &Picture) -> Result<()> {
        for volume in &picture.volumes {
            let Some((id, places)) = &volume.attached else {
                continue;
            };
            if !picture.instances.iter().any(|i| i.id == *id && i.running) {
                continue;
            }
            let machine = MachineName::new(id)?;
            let first = self
                .provider
                .first_process(&self.cluster, &machine)
                .await
                .map_err(plain)?;
            let Some(first) = first.filter(|pid| self.attached.get(&volume.id) != Some(&(id.clone(), *pid))) else {
                continue;
            };
            let device = self.volumes.device(&volume.id, volume.size_gib)?;
            let label = volumes::label(&device).map(|label| format!("/dev/disk/by-label/{label}"));
            for place in places.iter().chain(&label) {
                self.provider
                    .attach_device(&self.cluster, &machine, &device, Utf8Path::new(place))
                    .await
                    .map_err(plain)?;
            }
            self.attached.insert(volume.id.clone(), (id.clone(), first));
        }
        self.volumes
            .keep_only(&picture.volumes.iter().map(|v| v.id.as_str()).collect())
    }

    async fn balance(&mut self, picture: &Picture) -> Result<()> {
        let wanted = picture
            .balancers
            .iter()
            .flat_map(|b| b.listeners.iter().map(move |l| ((b.id.clone(), l.port), (b, l))));
        let wanted: BTreeMap<_, _> = wanted.collect();
        self.ports.retain(|key, _| wanted.contains_key(key));
        for (key, (balancer, listener)) in wanted {
            if let Some(port) = self.ports.get(&key) {
                port.set(listener);
                continue;
            }
            let address = match balancer.address {
                Some(address) => {
                    self.provider
                        .add_host_address(&self.cluster, address)
                        .await
                        .map_err(plain)?;
                    address
                }
                None => balancer_address(self.range),
            };
            self.ports.insert(key, Port::open(address, listener).await?);
        }
        Ok(())
    }
}
