//! A machine from its first boot to its last: everything that kprov-node runs, and in which order.
//!
//! Nothing here remembers how far it came: each part looks at what is there and does what is missing, so that it can be
//! killed between any two instructions. What can happen at the same time does.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use camino::{Utf8Path, Utf8PathBuf};
use kprov_bootstrap::paths as kubernetes;
use kprov_types::node::{Bundle, SetupStep};
use kprov_types::{Release, Role, ports};
use tokio::process::Command;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::config::{self, Machine};
use crate::containerd::{self, ContainerdVersion};
use crate::control_plane::ControlPlane;
use crate::cri::Cri;
use crate::endpoint::{self, Endpoint, EndpointError, Setup};
use crate::host::Host;
use crate::images::Images;
use crate::nodes::{self, Nodes};
use crate::podnet::{self, PodNetworkSettings, PodNetworkStatus};
use crate::release::{HostFiles, Installation};
use crate::standby::Standby;
use crate::status::Status;
use crate::supervise::{self, Places, Supervised};
use crate::{files, front, kubelet, paths};

/// How long the setup endpoint tells that the machine is set up before it closes.
const FAREWELL: Duration = Duration::from_mins(1);
/// How often to ask containerd whether it is ready, and others that start soon.
const SOON: Duration = Duration::from_millis(100);
/// There once the machine is set up: first-boot data is not used again (the first-boot script looks for it).
const INITIALISED: &str = "/var/lib/kprov/initialised";

/// The state that a machine's parts share.
#[derive(Clone)]
struct Node {
    machine: Arc<Machine>,
    host: Arc<Host>,
    status: Status,
    cri: Cri,
    files: HostFiles,
    images: Images,
    front: Arc<kprov_front::FrontHandle>,
    bundle: watch::Sender<Option<Arc<Bundle>>>,
    nodes: watch::Sender<Arc<Nodes>>,
}

/// Runs the machine until `stop` is cancelled. Containers go on running afterwards.
pub async fn run(config_path: &Utf8Path, stop: CancellationToken) -> anyhow::Result<()> {
    let mut host = Host::detect();
    host.raise_limits();
    let status = Status::new();
    status.add_findings(host.findings());
    let machine = Arc::new(Machine::identify(config::read(config_path)?)?);
    tracing::info!(name = %machine.name, address = %machine.address, role = %machine.config.role, "this machine");
    for (directory, mode) in [(paths::STATE, 0o700), (paths::RUN, 0o755), (paths::LOGS, 0o755)] {
        files::make_directory(Utf8Path::new(directory), mode)?;
    }
    // Before anything that takes time: clients wait for it when kprov-node is started again.
    let front = Arc::new(front::start(&machine).context("the front does not start")?);
    let places = Places::default();
    // Kubelet first: without containerd it would take its pods for dead.
    supervise::stop_stale(&places, "kubelet").await;
    supervise::stop_stale(&places, "containerd").await;

    let stored = machine.stored_bundle()?.map(Arc::new);
    if let Some(bundle) = &stored {
        status.bundle(endpoint::bundle_digest(bundle)?);
    }
    let node = Node {
        host: Arc::new(host),
        cri: Cri::new(Utf8Path::new(paths::CONTAINERD_SOCKET)),
        files: HostFiles::new(),
        images: Images::new(),
        front,
        bundle: watch::Sender::new(stored),
        nodes: watch::Sender::new(Arc::default()),
        machine,
        status,
    };
    let mut tasks = JoinSet::new();
    tasks.spawn(node.status.clone().write_file());
    let (nodes, bundle) = (node.nodes.subscribe(), node.bundle.subscribe());
    tasks.spawn(front::follow(node.front.clone(), node.machine.clone(), nodes, bundle));
    tasks.spawn(nodes::watch_nodes(node.nodes.clone()));
    tasks.spawn(node.clone().keep_pod_network());
    let status = node.status.clone();
    tasks.spawn_blocking(move || status.add_findings(podnet::missing_network_features()));
    tasks.spawn(node.clone().take_bundle());
    tasks.spawn(node.clone().forget(config_path.to_owned()));

    // In the order in which they were started.
    let mut children = Vec::new();
    let result = tokio::select! {
        result = node.set_up(&mut tasks, &mut children) => match result {
            Ok(()) => {
                stop.cancelled().await;
                Ok(())
            }
            failed => failed,
        },
        () = stop.cancelled() => Ok(()),
    };
    tracing::info!("stopping; containers go on running");
    tasks.shutdown().await;
    while let Some(child) = children.pop() {
        Supervised::stop(child).await;
    }
    result
}

impl Node {
    /// Brings everything up; returns when the machine is set up.
    async fn set_up(&self, tasks: &mut JoinSet<()>, children: &mut Vec<Supervised>) -> anyhow::Result<()> {
        let note = |message: String| self.status.note(message);
        self.status.reach(SetupStep::Fetching);
        let source = &self.machine.config.release;
        let installation = Installation::begin(source, note).await?;
        let (release, directory) = (installation.release.clone(), installation.directory.clone());
        let files = installation.finish(&self.files, source, note);
        let rest = async {
            self.start_containerd(&release, &directory, tasks, children).await?;
            match self.machine.config.role {
                Role::Worker => self.start_kubelet(&release, &directory, children).await?,
                Role::ControlPlane => self.become_control_plane(&release, &directory, tasks, children).await?,
            }
            Ok(())
        };
        let files = async { files.await.context("the release cannot be installed") };
        tokio::try_join!(files, rest)?;
        self.joined().await;
        self.status.reach(SetupStep::Done);
        Ok(())
    }

    /// Starts containerd as soon as its files are here, and has images pulled as soon as it is ready.
    async fn start_containerd(
        &self,
        release: &Arc<Release>,
        directory: &Utf8Path,
        tasks: &mut JoinSet<()>,
        children: &mut Vec<Supervised>,
    ) -> anyhow::Result<()> {
        self.files
            .wait(&["containerd", "containerd-shim-runc-v2", "runc"])
            .await;
        let program = directory.join("bin/containerd");
        let output = Command::new(&program).arg("--version").output().await;
        let output = output.with_context(|| format!("cannot run `{program}`"))?;
        let version = ContainerdVersion::from_output(&String::from_utf8_lossy(&output.stdout))?;
        let text = containerd::config(version, &self.host, release, directory);
        files::write(Utf8Path::new(paths::CONTAINERD_CONFIG), text.as_bytes(), 0o644)?;
        for (path, hosts) in containerd::registry_hosts(release, &self.machine.config.release.urls) {
            files::write(&path, hosts.as_bytes(), 0o644)?;
        }
        files::make_directory(Utf8Path::new(paths::CNI_CONFIG), 0o755)?;
        children.push(Supervised::start(containerd::child(directory), Places::default())?);
        self.status.reach(SetupStep::Images);
        loop {
            match self.cri.ready().await {
                Ok(Ok(())) => break,
                Ok(Err(why)) => tracing::debug!(why, "containerd is not ready"),
                Err(error) => tracing::debug!(error = crate::chain(&error), "containerd does not answer yet"),
            }
            tokio::time::sleep(SOON).await;
        }
        tracing::info!(major = version.major, minor = version.minor, "containerd is ready");
        let (this, release) = (self.clone(), release.clone());
        tasks.spawn(async move {
            let Self {
                images,
                cri,
                machine,
                status,
                ..
            } = &this;
            images
                .pull(cri, &release, machine.config.role, |message| status.note(message))
                .await;
        });
        Ok(())
    }

    async fn start_kubelet(
        &self,
        release: &Release,
        directory: &Utf8Path,
        children: &mut Vec<Supervised>,
    ) -> anyhow::Result<()> {
        self.files.wait(&["kubelet"]).await;
        let spec = kubelet::prepare(&self.machine, &self.host, release, directory)?;
        kubelet::sweep_control_groups(Utf8Path::new("/sys/fs/cgroup"));
        children.push(Supervised::start(spec, Places::default())?);
        Ok(())
    }

    async fn become_control_plane(
        &self,
        release: &Release,
        directory: &Utf8Path,
        tasks: &mut JoinSet<()>,
        children: &mut Vec<Supervised>,
    ) -> anyhow::Result<()> {
        let bundle = self.wait_for_bundle().await?;
        let control_plane = ControlPlane::prepare(&self.machine, &bundle)?;
        self.start_kubelet(release, directory, children).await?;
        tasks.spawn(control_plane.clone().renew(bundle.clone()));
        tasks.spawn(nodes::look_after(self.machine.name.clone(), self.nodes.subscribe()));
        let standby = Standby {
            me: control_plane.me.clone(),
            index: control_plane.index,
            single: control_plane.all.len() == 1,
            front: self.front.watch(),
            cri: self.cri.clone(),
            images: self.images.clone(),
            etcd: control_plane.etcd.clone(),
        };
        tasks.spawn(standby.run());
        control_plane
            .start_etcd(&self.machine, &bundle, &self.images, &self.status)
            .await?;
        self.status.reach(SetupStep::ControlPlane);
        tasks.spawn(async move { control_plane.become_voter().await });
        Ok(())
    }

    async fn wait_for_bundle(&self) -> anyhow::Result<Arc<Bundle>> {
        if self.bundle.borrow().is_none() {
            self.status.reach(SetupStep::Waiting);
        }
        let mut changes = self.bundle.subscribe();
        let accepted = changes
            .wait_for(Option::is_some)
            .await
            .context("nobody can deliver a bundle any more")?;
        accepted.clone().context("the bundle is gone")
    }

    /// Waits until this machine is a node of the cluster.
    async fn joined(&self) {
        let name = self.machine.name.as_str();
        // The sender is `self`, so the channel cannot close while this waits.
        let _ = self.nodes.subscribe().wait_for(|nodes| nodes.contains_key(name)).await;
    }

    async fn keep_pod_network(self) {
        let settings = PodNetworkSettings::new(self.machine.name.clone(), self.machine.config.network.pods);
        let views = watch::Sender::new(Vec::new());
        let follow = async {
            let mut nodes = self.nodes.subscribe();
            loop {
                let now = nodes::views(&nodes.borrow_and_update());
                views.send_if_modified(|views| {
                    let changed = *views != now;
                    *views = now;
                    changed
                });
                // The sender is `self`, so the channel cannot close while this waits.
                if nodes.changed().await.is_err() {
                    return;
                }
            }
        };
        // It logs how it fares by itself.
        let status = watch::Sender::new(PodNetworkStatus::default());
        tokio::join!(follow, podnet::run(settings, views.subscribe(), status));
    }

    /// Offers the setup endpoint to a machine that has an identity for it, until it has been set up for a while.
    async fn take_bundle(self) {
        let Some(identity) = &self.machine.config.setup else {
            return;
        };
        let address = SocketAddr::from((self.machine.address, ports::NODE_SETUP));
        let setup = Setup {
            machine: self.machine.clone(),
            status: self.status.clone(),
            bundle: self.bundle.clone(),
            path: paths::BUNDLE.into(),
        };
        loop {
            match Endpoint::bind(address, identity).await {
                Ok(endpoint) => {
                    tracing::info!(%address, "setup endpoint");
                    let farewell = async {
                        self.status.done().await;
                        tokio::time::sleep(FAREWELL).await;
                    };
                    tokio::select! {
                        () = endpoint.serve(setup) => {}
                        () = farewell => tracing::info!("setup endpoint closed"),
                    }
                    return;
                }
                Err(error @ EndpointError::Listen { .. }) => self.status.note(crate::chain(&error)),
                Err(error) => return self.status.note(crate::chain(&error)),
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }

    /// Once the machine is set up and has said so, removes what was secret in its first-boot data.
    async fn forget(self, config_path: Utf8PathBuf) {
        self.status.done().await;
        tokio::time::sleep(FAREWELL).await;
        let done = files::write(Utf8Path::new(INITIALISED), b"", 0o600)
            .and_then(|_| files::remove(Utf8Path::new(kubernetes::BOOTSTRAP_KUBECONFIG)))
            .map_err(config::ConfigError::from)
            .and_then(|_| config::forget_secrets(&config_path));
        if let Err(error) = done {
            tracing::error!(error = crate::chain(&error), "first-boot secrets are still on disk");
        }
    }
}
