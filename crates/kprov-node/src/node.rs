//! A machine from its first boot to its last: everything that kprov-node runs, and in which order.
//!
//! Nothing here remembers how far it came: each part looks at what is there and does what is missing, so that it can be
//! killed between any two instructions. What can happen at the same time does.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use camino::{Utf8Path, Utf8PathBuf};
use jiff::Timestamp;
use kprov_bootstrap::paths as kubernetes;
use kprov_front::FrontHandle;
use kprov_release::FetchError;
use kprov_types::node::{Bundle, SetupStep};
use kprov_types::{Role, ports};
use tokio::process::Command;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::config::{self, Machine};
use crate::containerd::{self, ContainerdVersion};
use crate::control_plane::ControlPlane;
use crate::cri::Cri;
use crate::endpoint::{self, Endpoint, EndpointError, Setup};
use crate::host::Host;
use crate::images::Images;
use crate::machine::disk::{Disk, Trial};
use crate::machine::{self, Agent, ControlParts, Switch, TrialWatch};
use crate::nodes::{self, NodesSeen};
use crate::podnet::{self, PodNetworkSettings, PodNetworkStatus};
use crate::release::{Current, HostFiles, Installation};
use crate::standby::{Serve, Standby};
use crate::status::Status;
use crate::supervise::{self, Places, Supervised};
use crate::{files, front, kubelet, paths, vip};

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
    front: Arc<FrontHandle>,
    bundle: watch::Sender<Option<Arc<Bundle>>>,
    nodes: NodesSeen,
    disk: Disk,
    /// The release that is being tried.
    trial: watch::Sender<Option<Trial>>,
    /// A control-plane machine's own parts, once it is one.
    control: watch::Sender<Option<ControlParts>>,
    /// Asks for another release to be started.
    switch: mpsc::Sender<Switch>,
    /// The virtual address, on a control-plane machine of a cluster that has one.
    virtual_address: Option<vip::Handle>,
}

/// Why the machine is not run any longer.
#[derive(Debug)]
pub enum End {
    /// It was asked to stop.
    Stopped,
    /// This process is to become another kprov-node, which finds the front's connections where
    /// [`kprov_front::Handover::take`] looks.
    Replace(Utf8PathBuf),
}

/// Brings what is on disk in line after whatever cut the last kprov-node off ([`Disk::begin`]), and tells which program is to run
/// the machine, where that is not this one. To be called once for each start of the machine, before [`run`].
pub fn begin() -> Option<Utf8PathBuf> {
    let program = match Disk::default().begin(Timestamp::now()) {
        Ok(program) => program?,
        Err(error) => {
            tracing::error!(
                error = crate::chain(&error),
                "what is remembered of orders cannot be used"
            );
            return None;
        }
    };
    let (own, wanted) = (files::digest(Utf8Path::new("/proc/self/exe")), files::digest(&program));
    wanted
        .is_ok_and(|wanted| own.is_ok_and(|own| own != wanted))
        .then_some(program)
}

/// Runs the machine until `stop` is cancelled, or another kprov-node has to run it. Containers go on running afterwards.
pub async fn run(config_path: &Utf8Path, stop: CancellationToken) -> anyhow::Result<End> {
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
    let disk = Disk::default();
    let trial = disk.trial()?;
    if let Some(trial) = &trial {
        tracing::info!(release = %trial.to, starts = trial.starts, "trying a release");
        disk.switch(trial)?;
    }
    let places = Places::default();
    // Kubelet first: without containerd it would take its pods for dead.
    supervise::stop_stale(&places, "kubelet").await;
    supervise::stop_stale(&places, "containerd").await;

    let stored = machine.stored_bundle()?.map(Arc::new);
    if let Some(bundle) = &stored {
        status.bundle(endpoint::bundle_digest(bundle)?);
    }
    let (switch, mut switches) = mpsc::channel(1);
    let bundle = watch::Sender::new(stored);
    let seen = NodesSeen::new(machine.name.clone());
    let virtual_address = keep_virtual_address(&machine, &front, &bundle, &seen);
    let node = Node {
        host: Arc::new(host),
        cri: Cri::new(Utf8Path::new(paths::CONTAINERD_SOCKET)),
        files: HostFiles::new(),
        images: Images::new(),
        front,
        bundle,
        nodes: seen,
        virtual_address,
        disk,
        trial: watch::Sender::new(trial),
        control: watch::Sender::new(None),
        switch,
        machine,
        status,
    };
    let mut tasks = JoinSet::new();
    tasks.spawn(node.status.clone().write_file());
    let (nodes, bundle) = (node.nodes.all.subscribe(), node.bundle.subscribe());
    tasks.spawn(front::follow(node.front.clone(), node.machine.clone(), nodes, bundle));
    tasks.spawn(nodes::watch_nodes(node.nodes.clone()));
    let log_start = machine::log_size();
    tasks.spawn(node.trial_watch(log_start).run());
    tasks.spawn(node.clone().keep_pod_network());
    let status = node.status.clone();
    tasks.spawn_blocking(move || status.add_findings(podnet::missing_network_features()));
    tasks.spawn(node.clone().take_bundle());
    tasks.spawn(node.clone().forget(config_path.to_owned()));

    // In the order in which they were started.
    let mut children = Vec::new();
    let ended = {
        let set_up = async {
            match node.set_up(&mut tasks, &mut children).await {
                Ok(()) => std::future::pending().await,
                Err(error) => error,
            }
        };
        tokio::select! {
            error = set_up => node.set_up_failed(error, log_start).map(Some),
            switch = switches.recv() => Ok(switch),
            () = stop.cancelled() => Ok(None),
        }
    };
    tracing::info!("stopping; containers go on running");
    if let (Ok(None) | Err(_), Some(address)) = (&ended, &node.virtual_address) {
        address.release().await;
    }
    tasks.shutdown().await;
    while let Some(child) = children.pop() {
        Supervised::stop(child).await;
    }
    match ended? {
        Some(switch) => Ok(End::Replace(node.switch_to(switch).await)),
        None => Ok(End::Stopped),
    }
}

/// Takes part in the election of who has the virtual address, on a control-plane machine of a cluster that has one.
fn keep_virtual_address(
    machine: &Machine,
    front: &FrontHandle,
    bundle: &watch::Sender<Option<Arc<Bundle>>>,
    nodes: &NodesSeen,
) -> Option<vip::Handle> {
    let address = machine.config.virtual_address?;
    let settings = vip::Settings {
        address,
        own: machine.address,
        name: machine.name.clone(),
        directory: paths::RUN.into(),
    };
    let take_part = || vip::Handle::start(settings, front.watch(), bundle.subscribe(), nodes.all.subscribe());
    (machine.config.role == Role::ControlPlane).then(take_part)
}

impl Node {
    fn trial_watch(&self, log_start: u64) -> TrialWatch {
        TrialWatch {
            disk: self.disk.clone(),
            trial: self.trial.clone(),
            node: self.nodes.own.subscribe(),
            status: self.status.clone(),
            started: Timestamp::now(),
            log_start,
            switch: self.switch.clone(),
        }
    }

    /// A release that cannot even be started is given up at once, where it is only being tried.
    fn set_up_failed(&self, error: anyhow::Error, log_start: u64) -> anyhow::Result<Switch> {
        let Some(trial) = self.trial.borrow().clone() else {
            return Err(error);
        };
        Ok(machine::give_up(&self.disk, &trial, format!("{error:#}"), log_start)?)
    }

    /// Makes another release the one that runs, once all that ran from this one has stopped; returns the kprov-node that is to
    /// go on. The front works until then, and afterwards its connections wait.
    async fn switch_to(&self, switch: Switch) -> Utf8PathBuf {
        let stopped = Timestamp::now().as_second();
        let (done, program) = match switch {
            Switch::Try(trial) => {
                let program = paths::release(&trial.to).join("bin").join(machine::disk::KPROV_NODE);
                (self.disk.switch(&trial), program)
            }
            Switch::Back(trial) => (self.disk.go_back(&trial), trial.program),
        };
        if let Err(error) = done {
            // What is to be done next is on disk all the same.
            tracing::error!(error = crate::chain(&error), "the release cannot be switched now");
        }
        // A Node's heartbeat is told in whole seconds: the old kubelet's last must not pass for the new one's.
        while Timestamp::now().as_second() <= stopped {
            tokio::time::sleep(SOON).await;
        }
        if let Some(address) = &self.virtual_address {
            address.bridge().await;
        }
        if let Err(error) = self.front.hand_over().await.leave() {
            tracing::error!(%error, "the front's connections are lost");
        }
        if program.exists() {
            program
        } else {
            machine::own_program()
        }
    }

    /// Brings everything up; returns when the machine is set up.
    async fn set_up(&self, tasks: &mut JoinSet<()>, children: &mut Vec<Supervised>) -> anyhow::Result<()> {
        let note = |message: String| self.status.note(message);
        self.status.reach(SetupStep::Fetching);
        let installation = Installation::begin(&self.machine.config.release, note).await?;
        let release = Current {
            reference: installation.reference.clone(),
            release: installation.release.clone(),
            directory: installation.directory.clone(),
        };
        let failure = |error: &FetchError| {
            note(crate::chain(error));
            Duration::ZERO
        };
        let installed = CancellationToken::new();
        tasks.spawn(self.clone().follow_orders(release.clone(), installed.clone()));
        let files = async {
            let files = installation.finish_current(self.files.clone(), failure).await;
            files.context("the release cannot be installed")?;
            installed.cancel();
            anyhow::Ok(())
        };
        let rest = async {
            self.start_containerd(&release, tasks, children).await?;
            match self.machine.config.role {
                Role::Worker => self.start_kubelet(&release, children).await?,
                Role::ControlPlane => self.become_control_plane(&release, tasks, children).await?,
            }
            Ok(())
        };
        tokio::try_join!(files, rest)?;
        self.joined().await;
        self.status.reach(SetupStep::Done);
        Ok(())
    }

    /// Follows this machine's orders, from when its own release is installed.
    async fn follow_orders(self, current: Current, installed: CancellationToken) {
        installed.cancelled().await;
        let agent = Agent {
            current,
            disk: self.disk.clone(),
            trial: self.trial.subscribe(),
            cri: self.cri.clone(),
            nodes: self.nodes.clone(),
            front: self.front.watch(),
            status: self.status.clone(),
            control: self.control.subscribe(),
            switch: self.switch.clone(),
            machine: self.machine.clone(),
        };
        Box::pin(agent.run()).await;
    }

    /// Starts containerd as soon as its files are here, and has images pulled as soon as it is ready.
    async fn start_containerd(
        &self,
        current: &Current,
        tasks: &mut JoinSet<()>,
        children: &mut Vec<Supervised>,
    ) -> anyhow::Result<()> {
        let Current { release, directory, .. } = current;
        self.files
            .wait(&["containerd", "containerd-shim-runc-v2", "runc"])
            .await;
        let program = directory.join("bin/containerd");
        let output = Command::new(&program).arg("--version").output().await;
        let output = output.with_context(|| format!("cannot run `{program}`"))?;
        let version = ContainerdVersion::from_output(&String::from_utf8_lossy(&output.stdout))?;
        let text = containerd::config(version, &self.host, release, &paths::current());
        files::write(Utf8Path::new(paths::CONTAINERD_CONFIG), text.as_bytes(), 0o644)?;
        for (path, hosts) in containerd::registry_hosts(release, &self.machine.config.release.urls) {
            // Better sources may have been found since the first boot.
            if !path.exists() {
                files::write(&path, hosts.as_bytes(), 0o644)?;
            }
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

    async fn start_kubelet(&self, current: &Current, children: &mut Vec<Supervised>) -> anyhow::Result<()> {
        self.files.wait(&["kubelet"]).await;
        let spec = kubelet::prepare(&self.machine, &self.host, &current.release, &current.directory)?;
        kubelet::sweep_control_groups(Utf8Path::new("/sys/fs/cgroup"));
        children.push(Supervised::start(spec, Places::default())?);
        Ok(())
    }

    async fn become_control_plane(
        &self,
        current: &Current,
        tasks: &mut JoinSet<()>,
        children: &mut Vec<Supervised>,
    ) -> anyhow::Result<()> {
        let bundle = self.wait_for_bundle().await?;
        let running = (&*current.release, &current.reference.digest);
        let control_plane = ControlPlane::prepare(&self.machine, &bundle, running)?;
        self.start_kubelet(current, children).await?;
        tasks.spawn(control_plane.clone().renew());
        tasks.spawn(nodes::look_after(self.machine.name.clone(), self.nodes.all.subscribe()));
        let serve = Serve::load();
        let standby = Standby {
            me: control_plane.me.clone(),
            index: control_plane.index,
            single: control_plane.all.len() == 1,
            front: self.front.watch(),
            cri: self.cri.clone(),
            etcd: control_plane.etcd.clone(),
            serve: serve.clone(),
            missing: Arc::default(),
        };
        tasks.spawn(standby.run());
        let member = control_plane.etcd_member(&self.machine, self.front.clone()).await?;
        tasks.spawn(member.clone().carry_out_restores(control_plane.settings().clone()));
        self.control.send_replace(Some(ControlParts {
            control_plane: control_plane.clone(),
            member: member.clone(),
            serve,
        }));
        member.start(control_plane.settings(), &self.cri, &self.status).await?;
        self.status.reach(SetupStep::ControlPlane);
        tasks.spawn(async move { member.become_voter().await });
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
        let _ = self
            .nodes
            .all
            .subscribe()
            .wait_for(|nodes| nodes.contains_key(name))
            .await;
    }

    async fn keep_pod_network(self) {
        let settings = PodNetworkSettings::new(self.machine.name.clone(), self.machine.config.network.pods);
        let views = watch::Sender::new(Vec::new());
        let follow = async {
            let mut nodes = self.nodes.all.subscribe();
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
