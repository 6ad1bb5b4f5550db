//! Releases on their way onto this machine: manifest from the API, programs and images from wherever they are to be had.
//!
//! A release is ready when all that this machine's role may run of it is here and has been hashed: its programs on disk, its
//! images in containerd, and on a control-plane machine the files that its API servers read.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use kprov_release::{FetchError, ReadReleaseError};
use kprov_types::api::{ReleaseRef, ReleaseSpec, StagedStatus, release_name};
use kprov_types::node::ReleaseSource;
use kprov_types::{Release, Role};
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use super::decide::sources;
use super::objects;
use crate::config::Machine;
use crate::control_plane::{ControlPlaneError, write_config};
use crate::cri::{Cri, CriError};
use crate::release::{HostFiles, Installation, OnDisk, ReleaseError};
use crate::{containerd, files, images, paths};

/// The pause between two attempts, at first and at most.
const PAUSE: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(15));
/// The pause after bytes that are not the right ones: somebody must do something about it.
const BAD_PAUSE: Duration = Duration::from_mins(1);
/// How many files, and after them images, are fetched at the same time: etcd and others need the disk too.
const AT_ONCE: usize = 2;

/// How far a release is.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stage {
    /// All of it is here and verified.
    pub ready: bool,
    /// Its bytes are not those that its manifest names.
    pub bad: bool,
    /// What is being done, or what went wrong last.
    pub message: String,
    /// The release, once its manifest is here.
    pub release: Option<Arc<Release>>,
    /// Where the Release object says that its blobs are.
    pub urls: Vec<String>,
}

/// The releases on their way, or here.
pub type Stages = BTreeMap<ReleaseRef, Stage>;

/// As the Machine object tells it.
pub(super) fn report(stages: &Stages) -> Vec<StagedStatus> {
    let one = |(release, stage): (&ReleaseRef, &Stage)| StagedStatus {
        release: release.clone(),
        ready: stage.ready,
        message: stage.message.clone(),
        bad: stage.bad,
    };
    stages.iter().map(one).collect()
}

/// Gets releases onto this machine, several at once. Those on their way are given up when this is dropped.
pub struct Stager {
    tasks: BTreeMap<ReleaseRef, Task>,
    work: Work,
}

struct Task {
    _handle: AbortOnDropHandle<()>,
    /// The order at which it began.
    order: u64,
}

/// What all that stage share.
#[derive(Clone)]
struct Work {
    machine: Arc<Machine>,
    cri: Cri,
    /// Its files were checked when this process began.
    current: ReleaseRef,
    stores: watch::Receiver<Vec<String>>,
    stages: watch::Sender<Stages>,
}

impl Stager {
    /// Nothing on its way yet. The files of `current` are installed and were checked; `stores` are the release stores of
    /// control-plane machines, best first.
    pub fn new(machine: Arc<Machine>, cri: Cri, current: ReleaseRef, stores: watch::Receiver<Vec<String>>) -> Self {
        let stages = watch::Sender::default();
        Self {
            tasks: BTreeMap::new(),
            work: Work {
                machine,
                cri,
                current,
                stores,
                stages,
            },
        }
    }

    /// How far all releases are, now and as it changes.
    pub fn watch(&self) -> watch::Receiver<Stages> {
        self.work.stages.subscribe()
    }

    /// Has the `wanted` releases fetched and forgets all others. What was found bad is tried again at once when the order is
    /// another.
    pub fn want(&mut self, wanted: &BTreeSet<ReleaseRef>, order: u64) {
        let bad: BTreeSet<_> = {
            let stages = self.work.stages.borrow();
            stages.iter().filter(|(_, s)| s.bad).map(|(r, _)| r.clone()).collect()
        };
        self.tasks
            .retain(|release, task| wanted.contains(release) && (task.order >= order || !bad.contains(release)));
        self.work.stages.send_if_modified(|stages| {
            let before = stages.len();
            stages.retain(|release, _| self.tasks.contains_key(release));
            stages.len() != before
        });
        for release in wanted {
            if !self.tasks.contains_key(release) {
                let task = tokio::spawn(self.work.clone().stage(release.clone()));
                let task = Task {
                    _handle: AbortOnDropHandle::new(task),
                    order,
                };
                self.tasks.insert(release.clone(), task);
            }
        }
    }
}

impl Work {
    /// Fetches a release; begins again when it can be had from elsewhere.
    async fn stage(mut self, reference: ReleaseRef) {
        loop {
            let stores = self.stores.borrow_and_update().clone();
            let work = self.clone();
            tokio::select! {
                () = work.stage_from(&reference, &stores) => return,
                changed = self.stores.changed() => if changed.is_err() { return },
            }
        }
    }

    async fn stage_from(&self, reference: &ReleaseRef, stores: &[String]) {
        let progress = &Progress {
            reference,
            stages: &self.stages,
        };
        progress.begin();
        let here = OnDisk::read(&paths::release(reference), &reference.digest).filter(|on| on.reference == *reference);
        let (release, urls) = match &here {
            // Without an API too: no more than its URLs is unknown then.
            Some(here) => {
                let urls = self.manifest(reference).await.map(|(_, urls)| urls);
                (here.release.clone(), urls.unwrap_or_default())
            }
            None => {
                retry(
                    || self.manifest(reference),
                    |error| progress.failed(error, error.is_bad()),
                )
                .await
            }
        };
        progress.set(|stage| {
            stage.release = Some(release.clone());
            stage.urls.clone_from(&urls);
        });
        let first = &self.machine.config.release;
        write_registries(&self.stages.borrow(), stores, first);
        let first_boot = if reference.digest == first.digest {
            first.urls.as_slice()
        } else {
            &[]
        };
        let sources = sources(stores, &urls, first_boot);
        self.config_files(&release, progress).await;
        self.files(&release, here, sources, progress).await;
        self.images(&release, progress).await;
        tracing::info!(release = %reference, digest = %reference.digest, "staged");
        progress.set(|stage| {
            stage.ready = true;
            stage.bad = false;
            stage.message.clear();
        });
    }

    async fn manifest(&self, reference: &ReleaseRef) -> Result<(Arc<Release>, Vec<String>), ManifestError> {
        let name = release_name(&reference.version.to_string(), &reference.digest);
        let found = objects::release(&name).await?;
        let ReleaseSpec { manifest, urls, .. } = found.ok_or(ManifestError::Missing(name))?;
        let release = kprov_release::read_release(manifest.as_bytes(), &reference.digest)?;
        Ok((Arc::new(release), urls))
    }

    async fn files(&self, release: &Arc<Release>, here: Option<OnDisk>, sources: Vec<String>, progress: &Progress<'_>) {
        if *progress.reference == self.current {
            return;
        }
        let installation = match here {
            Some(here) => Installation::again(here, &sources),
            None => Installation::new(progress.reference.clone(), release.clone(), sources),
        };
        let install = || {
            let told = |error: &FetchError| progress.failed(error, error.is_bad());
            installation.clone().finish(HostFiles::new(), AT_ONCE, told)
        };
        let failed = |error: &ReleaseError| progress.failed(error, matches!(error, ReleaseError::MissingFile { .. }));
        retry(install, failed).await;
    }

    async fn images(&self, release: &Release, progress: &Progress<'_>) {
        let needed = images::needed(release, self.machine.config.role);
        let needed: Vec<_> = needed.map(|(_, image)| image.pinned()).collect();
        let pull = |image: String| async move {
            let failed = |error: &CriError| {
                let error = ImageError(image.clone(), crate::chain(error));
                progress.failed(&error, error.is_bad())
            };
            retry(|| images::ensure(&self.cri, &image), failed).await;
        };
        futures::stream::iter(needed).for_each_concurrent(AT_ONCE, pull).await;
    }

    async fn config_files(&self, release: &Release, progress: &Progress<'_>) {
        if self.machine.config.role == Role::ControlPlane {
            let write = || std::future::ready(write_config(release));
            retry(write, |error: &ControlPlaneError| progress.failed(error, false)).await;
        }
    }
}

/// Where it is told how far one release is.
struct Progress<'a> {
    reference: &'a ReleaseRef,
    stages: &'a watch::Sender<Stages>,
}

impl Progress<'_> {
    fn set(&self, change: impl FnOnce(&mut Stage)) {
        self.stages.send_if_modified(|stages| {
            let stage = stages.entry(self.reference.clone()).or_default();
            let before = stage.clone();
            change(stage);
            *stage != before
        });
    }

    fn begin(&self) {
        self.set(|stage| {
            if !stage.ready && stage.message.is_empty() {
                stage.message = "fetching".into();
            }
        });
    }

    /// Tells of a failure; answers how long to wait at least.
    fn failed(&self, error: &dyn std::error::Error, bad: bool) -> Duration {
        let message = crate::chain(error);
        tracing::warn!(release = %self.reference, bad, error = message, "staging");
        self.set(|stage| {
            // What somebody must do something about is not hidden by what will pass.
            if bad || !stage.bad {
                stage.message = message;
            }
            stage.bad |= bad;
        });
        if bad { BAD_PAUSE } else { Duration::ZERO }
    }
}

/// Tries again and again. `failed` is told each error and answers how long to wait at least.
async fn retry<T, E, F: Future<Output = Result<T, E>>>(attempt: impl Fn() -> F, failed: impl Fn(&E) -> Duration) -> T {
    let mut pause = PAUSE.0;
    loop {
        match attempt().await {
            Ok(done) => return done,
            Err(error) => {
                let least = failed(&error);
                tokio::time::sleep(pause.max(least)).await;
                pause = (pause * 2).min(PAUSE.1);
            }
        }
    }
}

/// Why a release's manifest is not here.
#[derive(Debug, thiserror::Error)]
enum ManifestError {
    #[error("the Release `{0}` is not there")]
    Missing(String),
    #[error(transparent)]
    Api(#[from] objects::ObjectError),
    #[error("the Release object does not hold the release")]
    Bytes(#[from] ReadReleaseError),
}

impl ManifestError {
    fn is_bad(&self) -> bool {
        matches!(self, Self::Bytes(_))
    }
}

/// An image that cannot be pulled, and what containerd says.
#[derive(Debug, thiserror::Error)]
#[error("image `{0}`: {1}")]
pub(super) struct ImageError(pub(super) String, pub(super) String);

impl ImageError {
    /// Whether containerd found the wrong bytes (its `plugins/content/local/writer.go` says so in these words).
    pub(super) fn is_bad(&self) -> bool {
        self.1.contains("unexpected commit digest") || self.1.contains("unexpected commit size")
    }
}

/// Tells containerd where the images of all these releases may be had; it reads this anew for each pull. What the machine was
/// given for its first boot offers the release of the first boot, and is soon gone.
pub fn write_registries(stages: &Stages, stores: &[String], first: &ReleaseSource) {
    let mut named: Vec<String> = stages.values().flat_map(|stage| stage.urls.iter().cloned()).collect();
    named.sort();
    let needed = stores.is_empty() || stages.keys().any(|release| release.digest == first.digest);
    let urls = sources(stores, &named, if needed { &first.urls } else { &[] });
    for release in stages.values().filter_map(|stage| stage.release.as_ref()) {
        for (path, text) in containerd::registry_hosts(release, &urls) {
            if let Err(error) = files::write(&path, text.as_bytes(), 0o644) {
                tracing::warn!(error = crate::chain(&error), "containerd's registries");
            }
        }
    }
}
