//! This machine's own member: what it is, how it starts, and how it is moved to another release.
//!
//! Everything that has to be remembered is on disk, so that whoever comes next goes on: the static pod's manifest says which
//! etcd runs; [`Previous`] is there while another one is being tried.

use std::sync::Arc;
use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};
use kprov_bootstrap::manifests::{EtcdClusterState, EtcdStart, ManifestError};
use kprov_bootstrap::paths as kubernetes;
use kprov_front::{Backend, FrontHandle};
use kprov_types::api::{EtcdStatus, SnapshotStatus};
use kprov_types::node::{ControlPlaneSettings, Member, SetupStep};
use kprov_types::release::ImageComponent;
use kprov_types::{Digest, Release};
use nix::fcntl::{Flock, FlockArg};
use rustls::pki_types::ServerName;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep};

use super::snapshot::{SnapshotError, Snapshots};
use super::{EtcdClient, Start, has_data, promote, settle};
use crate::cri::Cri;
use crate::files::{self, FileError, failed};
use crate::kubelet::place_static_pod;
use crate::standby::restart_control_processes;
use crate::status::Status;
use crate::{https, images, paths};

/// How often to look while waiting.
const PAUSE: Duration = Duration::from_millis(250);
/// How long to wait before an image is pulled again.
const PULL_PAUSE: Duration = Duration::from_secs(1);
/// How long requests that are being answered may take before etcd is taken away.
const IN_FLIGHT: Duration = Duration::from_secs(1);
/// How long clients of the API wait at most while etcd is changed.
const HOLD: Duration = Duration::from_secs(30);
/// How long a new etcd may take to get healthy.
const NEW_LIMIT: Duration = Duration::from_mins(1);
/// How long this machine's API servers may take to get ready after etcd did.
const API_LIMIT: Duration = Duration::from_mins(1);
/// How long an API server may take to tell how it is.
const READY_LIMIT: Duration = Duration::from_secs(2);

/// What went wrong with this machine's member.
#[derive(Debug, thiserror::Error)]
pub enum MemberError {
    /// A file.
    #[error(transparent)]
    File(#[from] FileError),
    /// The manifest cannot be rendered.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// A file is not what was written.
    #[error("`{path}` is not understood")]
    Malformed {
        /// The file.
        path: Utf8PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// etcd's process does not end.
    #[error("etcd still uses `{0}`")]
    StillRuns(Utf8PathBuf),
    /// A release without etcd.
    #[error("the release has no etcd")]
    NoImage,
}

/// Why the member does not run as ordered.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// It has to wait: ask again later. Nothing was changed.
    #[error("{0}")]
    Wait(String),
    /// The new etcd did not get healthy, and the old one was put back; or that was so before.
    #[error("{0}")]
    Failed(String),
}

impl From<MemberError> for RunError {
    fn from(error: MemberError) -> Self {
        Self::Wait(crate::chain(&error))
    }
}

/// Where things are; elsewhere in tests.
#[derive(Clone, Debug)]
pub struct Places {
    /// Where kubelet looks for static pods.
    pub manifests: Utf8PathBuf,
    /// Files on their way there, on the same file system.
    pub staging: Utf8PathBuf,
    /// kprov's own state.
    pub state: Utf8PathBuf,
}

impl Default for Places {
    fn default() -> Self {
        Self {
            manifests: kubernetes::STATIC_PODS.into(),
            staging: crate::standby::STAGING.into(),
            state: paths::STATE.into(),
        }
    }
}

impl Places {
    pub(super) fn manifest(&self) -> Utf8PathBuf {
        self.manifests.join("etcd.yaml")
    }

    pub(super) fn snapshots(&self) -> Snapshots {
        Snapshots::new(self.state.join("snapshots"))
    }

    fn previous(&self) -> Utf8PathBuf {
        self.state.join("etcd-previous.json")
    }

    fn failure(&self) -> Utf8PathBuf {
        self.state.join("etcd-failed.json")
    }

    fn release(&self) -> Utf8PathBuf {
        self.state.join("etcd-release.json")
    }

    fn started(&self) -> Utf8PathBuf {
        self.state.join("etcd-started")
    }
}

/// The static pod that ran before another was tried. On disk for as long as it is not known whether the other works.
#[derive(Serialize, Deserialize)]
struct Previous {
    pod: Value,
    /// The version that the other one should tell, where its release says.
    version: Option<String>,
}

/// A release whose etcd did not work here.
#[derive(Serialize, Deserialize)]
struct FailedImage {
    image: String,
    message: String,
}

/// The release whose etcd was last known to work here: a member that lost its data comes back as that one.
#[derive(Serialize, Deserialize)]
struct LastRelease {
    release: Release,
    digest: Digest,
}

pub(super) fn read_json<T: DeserializeOwned>(path: &Utf8Path) -> Result<Option<T>, MemberError> {
    let Some(json) = files::read_if_there(path)? else {
        return Ok(None);
    };
    serde_json::from_slice(&json)
        .map(Some)
        .map_err(|source| MemberError::Malformed {
            path: path.to_owned(),
            source,
        })
}

pub(super) fn write_json(path: &Utf8Path, value: &impl Serialize) -> Result<(), MemberError> {
    let json = serde_json::to_vec_pretty(value).map_err(|source| MemberError::Malformed {
        path: path.to_owned(),
        source,
    })?;
    files::write(path, &json, 0o600)?;
    Ok(())
}

/// The image of a static pod's only container.
fn image_of(pod: &Value) -> &str {
    pod["spec"]["containers"][0]["image"].as_str().unwrap_or_default()
}

/// The pinned image of a release's etcd, and its version where known.
fn wanted_image(settings: &ControlPlaneSettings) -> Result<(String, Option<String>), MemberError> {
    let image = settings
        .release
        .image(ImageComponent::Etcd)
        .ok_or(MemberError::NoImage)?;
    Ok((image.pinned(), image.version.clone()))
}

/// This machine's etcd member. Cheap to clone; all clones are one: it is changed by one at a time.
#[derive(Clone)]
pub struct OwnMember {
    /// This machine.
    pub me: Member,
    /// All control-plane machines of the bundle.
    pub all: Vec<Member>,
    /// Asks etcd.
    pub client: EtcdClient,
    /// Clients of the API wait at this machine's front while the member changes.
    pub front: Arc<FrontHandle>,
    /// Where etcd's data is.
    pub data: Utf8PathBuf,
    /// Where everything else is.
    pub places: Places,
    /// Has the control plane's processes on this machine begin anew, and tells how many there were.
    pub restart_control_plane: fn() -> std::io::Result<usize>,
    /// Held by whoever changes the member.
    pub(super) work: Arc<Mutex<()>>,
}

impl OwnMember {
    /// The member of the machine `me`.
    pub fn new(me: Member, all: Vec<Member>, client: EtcdClient, front: Arc<FrontHandle>, data: Utf8PathBuf) -> Self {
        Self {
            me,
            all,
            client,
            front,
            data,
            places: Places::default(),
            restart_control_plane: restart_control_processes,
            work: Arc::default(),
        }
    }

    pub(super) fn pod(&self) -> Result<Option<Value>, MemberError> {
        read_json(&self.places.manifest())
    }

    pub(super) fn place(&self, pod: &Value) -> Result<(), MemberError> {
        Ok(place_static_pod(&self.places.staging, &self.places.manifest(), pod)?)
    }

    pub(super) fn render(&self, settings: &ControlPlaneSettings, start: Start) -> Result<Value, MemberError> {
        let start = EtcdStart {
            initial_cluster: start.members,
            state: start.state,
            data_dir: self.data.to_string(),
        };
        Ok(kprov_bootstrap::etcd_pod(settings, &self.me, &start)?.1)
    }

    /// A member that goes on with its data does not look at the cluster it is started in.
    pub(super) fn with_data(&self) -> Start {
        Start {
            state: EtcdClusterState::Existing,
            members: self.all.clone(),
        }
    }

    /// The settings with the release whose etcd belongs here: the last that worked, or at first the one that runs.
    pub(super) fn own_settings(&self, running: &ControlPlaneSettings) -> Result<ControlPlaneSettings, MemberError> {
        let last: Option<LastRelease> = read_json(&self.places.release())?;
        Ok(last.map_or_else(
            || running.clone(),
            |last| crate::control_plane::with_release(running, &last.release, &last.digest),
        ))
    }

    fn works_with(&self, settings: &ControlPlaneSettings) -> Result<(), MemberError> {
        let last = LastRelease {
            release: settings.release.clone(),
            digest: settings.release_digest.clone(),
        };
        write_json(&self.places.release(), &last)
    }

    /// Starts etcd, in the cluster it belongs to, and returns when it works. Where a restore is ordered and not finished, it
    /// waits for [`Self::carry_out_restores`] to do that. `running` are the settings of the release that runs
    /// ([`crate::control_plane::with_release`]).
    pub async fn start(&self, running: &ControlPlaneSettings, cri: &Cri, status: &Status) -> Result<(), MemberError> {
        let image = wanted_image(&self.own_settings(running)?)?.0;
        let pull = async {
            while let Err(error) = images::ensure(cri, &image).await {
                tracing::debug!(error = crate::chain(&error), "etcd's image is not here yet");
                sleep(PULL_PAUSE).await;
            }
        };
        // Where it is placed already, kubelet has its image.
        if self.pod()?.is_none() {
            pull.await;
        }
        self.begin(running, |message| status.note(message)).await?;
        status.reach(SetupStep::Etcd);
        while !self.client.well(self.me.address).await {
            sleep(PAUSE).await;
        }
        files::write(&self.places.started(), b"", 0o600)?;
        Ok(())
    }

    /// Places the static pod where it is missing.
    pub async fn begin(&self, running: &ControlPlaneSettings, note: impl Fn(String)) -> Result<(), MemberError> {
        loop {
            let one = self.work.lock().await;
            if self.restore_is_due() {
                drop(one);
                note("etcd's data are being restored".into());
                sleep(PAUSE).await;
                continue;
            }
            self.settle_change(NEW_LIMIT).await?;
            let manifest = self.places.manifest();
            if !has_data(&self.data) {
                // One that is left from before the data was lost would start in the wrong way.
                files::remove(&manifest)?;
            }
            if manifest.exists() {
                return Ok(());
            }
            let before = running.etcd_exists || self.places.started().exists();
            let start = tokio::select! {
                start = settle(&self.client, &self.me, &self.all, &self.data, before, &note) => start,
                () = self.restore_ordered() => continue,
            };
            tracing::info!(state = ?start.state, members = start.members.len(), "etcd starts");
            let settings = self.own_settings(running)?;
            return self.place(&self.render(&settings, start)?);
        }
    }

    async fn restore_ordered(&self) {
        while !self.restore_is_due() {
            sleep(PAUSE).await;
        }
    }

    /// Gives this machine's member its vote, where it has none yet.
    pub async fn become_voter(&self) {
        if self.all.len() > 1 {
            promote(&self.client, &self.me, &self.all).await;
        }
    }

    /// How the member is. Never fails: what cannot be found out is in the message.
    pub async fn status(&self) -> EtcdStatus {
        let pod = self.pod().ok().flatten();
        let mut status = EtcdStatus {
            image: pod.as_ref().map(image_of).unwrap_or_default().to_owned(),
            ..EtcdStatus::default()
        };
        let address = self.me.address;
        let (state, members, alarms) = tokio::join!(
            self.client.state(address),
            self.client.members(address),
            self.client.alarms(address)
        );
        match state {
            Ok(state) => {
                status.healthy = state.has_leader() && !state.learner;
                if !state.has_leader() {
                    status.message = "it knows no leader".into();
                } else if state.learner {
                    status.message = "it has no vote yet".into();
                }
                let bytes: u64 = state.database_size.parse().unwrap_or(0);
                status.database_mib = bytes.div_ceil(1 << 20);
                status.version = state.version;
            }
            Err(error) => status.message = crate::chain(&error),
        }
        status.members = members.map_or(0, |members| u32::try_from(members.len()).unwrap_or(u32::MAX));
        match alarms {
            Ok(alarms) => status.alarms = alarms,
            // Not knowing of an alarm is not the same as there being none.
            Err(error) => {
                status.healthy = false;
                status.message = format!("it does not tell its alarms: {}", crate::chain(&error));
            }
        }
        if let Ok(Some(FailedImage { message, .. })) = read_json(&self.places.failure()) {
            status.message = message;
        }
        status
    }

    /// Has the member run from the release of `wanted`. Returns when it does, at once where it does already; otherwise takes up
    /// to a few minutes. Level-triggered: call it again and again while it is ordered. A release that has failed here is not
    /// tried again until another one has been asked for. Safe to cut off anywhere.
    pub async fn run(&self, wanted: &ControlPlaneSettings, cri: &Cri) -> Result<(), RunError> {
        let (image, _) = wanted_image(wanted)?;
        if self.pod()?.is_some_and(|pod| image_of(&pod) != image)
            && let Err(error) = images::ensure(cri, &image).await
        {
            return Err(RunError::Wait(format!("image `{image}`: {}", crate::chain(&error))));
        }
        self.change(wanted, NEW_LIMIT).await
    }

    /// [`Self::run`] once the image is on this machine. The new etcd has to be healthy within `limit`.
    pub async fn change(&self, wanted: &ControlPlaneSettings, limit: Duration) -> Result<(), RunError> {
        let _one = self.work.lock().await;
        if self.restore_is_due() {
            return Err(RunError::Wait("etcd's data are being restored".into()));
        }
        self.settle_change(limit).await?;
        let (image, version) = wanted_image(wanted)?;
        let Some(pod) = self.pod()? else {
            return Err(RunError::Wait("etcd has not been started yet".into()));
        };
        if image_of(&pod) == image {
            files::remove(&self.places.failure()).map_err(MemberError::from)?;
            return Ok(self.works_with(wanted)?);
        }
        match read_json(&self.places.failure())? {
            Some(FailedImage { image: failed, message }) if failed == image => return Err(RunError::Failed(message)),
            Some(_) => drop(files::remove(&self.places.failure()).map_err(MemberError::from)?),
            None => {}
        }
        self.others_are_well().await?;
        let process = self.client.process(self.me.address).await;
        let process = process.map_err(|error| RunError::Wait(crate::chain(&error)))?;

        tracing::info!(image, "etcd changes");
        // New connections go to other machines, where there are any; what is under way waits.
        let _drained = (self.all.len() > 1).then(|| self.front.drain_local());
        let _held = self.front.hold(HOLD);
        let served = self.api_servers();
        sleep(IN_FLIGHT).await;
        let new = self.render(wanted, self.with_data())?;
        write_json(&self.places.previous(), &Previous { pod, version })?;
        self.place(&new)?;
        self.leaves(process.as_deref(), limit).await;
        self.settle_change(limit).await?;
        if let Some(FailedImage { message, .. }) = read_json(&self.places.failure())? {
            return Err(RunError::Failed(message));
        }
        self.works_with(wanted)?;
        self.api_is_ready(&served).await;
        tracing::info!(image, "etcd changed");
        Ok(())
    }

    /// Whether the cluster bears that this member is away for a moment.
    async fn others_are_well(&self) -> Result<(), RunError> {
        if !self.client.well(self.me.address).await {
            return Err(RunError::Wait("this machine's etcd member is not healthy".into()));
        }
        if self.all.len() > 1 {
            let (members, unhealthy) = self.client.look(&self.me, &self.all).await;
            if members.is_none() {
                return Err(RunError::Wait("no other etcd member answers".into()));
            }
            if !unhealthy.is_empty() {
                let message = format!("other etcd members are not healthy: {}", unhealthy.join(", "));
                return Err(RunError::Wait(message));
            }
        }
        Ok(())
    }

    /// Waits until another process than `before` answers, or none.
    async fn leaves(&self, before: Option<&str>, limit: Duration) {
        let deadline = Instant::now() + limit;
        while Instant::now() < deadline {
            match self.client.process(self.me.address).await {
                Ok(now) if now.as_deref() == before => sleep(PAUSE).await,
                _ => return,
            }
        }
    }

    /// Finishes a change that is under way: waits until the new etcd is healthy, or puts the old one back.
    async fn settle_change(&self, limit: Duration) -> Result<(), MemberError> {
        let mark = self.places.previous();
        let Some(previous) = read_json::<Previous>(&mark)? else {
            return Ok(());
        };
        let image = self.pod()?.as_ref().map(image_of).unwrap_or_default().to_owned();
        if image != image_of(&previous.pod) && !self.healthy(previous.version.as_deref(), limit).await {
            let version = previous.version.as_deref().unwrap_or("of the new release");
            let state = self.client.state(self.me.address).await;
            let found = state.map_or_else(
                |error| crate::chain(&error),
                |state| format!("version {} answers, and is not healthy", state.version),
            );
            tracing::error!(image, found, "the new etcd does not work; the old one comes back");
            self.place(&previous.pod)?;
            let mut message = format!(
                "etcd {version} did not get healthy within {} s ({found}); its predecessor was put back",
                limit.as_secs()
            );
            if !self.healthy(None, limit).await {
                message.push_str(
                    ", which is not healthy either: it may not be able to read what a newer minor has written. No data was \
                     deleted; restore the snapshot taken before with `kprov etcd restore`",
                );
            }
            write_json(&self.places.failure(), &FailedImage { image, message })?;
        }
        files::remove(&mark)?;
        Ok(())
    }

    /// Waits until the member answers, knows a leader, has its vote, and is of this version.
    pub(super) async fn healthy(&self, version: Option<&str>, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        loop {
            if let Ok(state) = self.client.state(self.me.address).await
                && state.has_leader()
                && !state.learner
                && version.is_none_or(|version| same_version(version, &state.version))
            {
                return true;
            }
            if Instant::now() >= deadline {
                return false;
            }
            sleep(PAUSE).await;
        }
    }

    /// This machine's API servers that answer, if late.
    pub(super) fn api_servers(&self) -> Vec<Backend> {
        self.front.watch().borrow().usable().filter(Backend::is_local).collect()
    }

    /// Waits until one of these API servers says that it is ready, and the front knows it.
    pub(super) async fn api_is_ready(&self, servers: &[Backend]) {
        if servers.is_empty() {
            return;
        }
        let Ok(tls) = https::health_client().inspect_err(|error| tracing::error!(error = crate::chain(error), "TLS"))
        else {
            return;
        };
        let deadline = Instant::now() + API_LIMIT;
        while Instant::now() < deadline {
            for server in servers {
                let address = server.address();
                let name = ServerName::from(address.ip());
                let answer = https::get_status(&tls, address, name, "/readyz", READY_LIMIT).await;
                let known = self.front.watch().borrow().ready().any(|ready| ready == *server);
                if known && answer.is_ok_and(|status| status.is_success()) {
                    return;
                }
            }
            sleep(PAUSE).await;
        }
        tracing::warn!("etcd works, and no API server of this machine is ready");
    }

    /// Waits until no process has the database of a member's directory open.
    pub(super) async fn released(&self, member: &Utf8Path, limit: Duration) -> Result<(), MemberError> {
        let database = member.join("snap/db");
        let deadline = Instant::now() + limit;
        while is_locked(&database)? {
            if Instant::now() >= deadline {
                return Err(MemberError::StillRuns(database));
            }
            sleep(PAUSE).await;
        }
        Ok(())
    }

    /// Takes a snapshot of this member, verified, unless there is one of that name; then removes old ones.
    pub async fn snapshot(&self, name: &str) -> Result<SnapshotStatus, SnapshotError> {
        self.places.snapshots().take(&self.client, self.me.address, name).await
    }

    /// The snapshots on this machine, oldest first.
    pub fn snapshots(&self) -> Vec<SnapshotStatus> {
        self.places.snapshots().list()
    }
}

/// Whether a version as a release names it, which may be an image's tag (`v3.6.5-0`), is the one that a member tells.
fn same_version(named: &str, told: &str) -> bool {
    let number = |version: &str| {
        version
            .trim_start_matches('v')
            .split(['-', '+'])
            .next()
            .map(str::to_owned)
    };
    number(named) == number(told)
}

/// Whether a process has the database open: etcd's (bbolt) holds a lock on it all the time, flock(2).
fn is_locked(database: &Utf8Path) -> Result<bool, FileError> {
    let file = match std::fs::OpenOptions::new().read(true).write(true).open(database) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(failed("open", database)(error)),
    };
    Ok(Flock::lock(file, FlockArg::LockExclusiveNonblock).is_err())
}
