//! The release that this machine runs: its host files fetched, verified, and kept with a note of what they were.
//!
//! A machine that has its release needs no network to start again: the note, written after all files are there, holds the
//! release and the digest of each file, which is checked before anything is run.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;
use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};
use futures::future::join_all;
use futures::{StreamExt as _, TryStreamExt as _};
use kprov_release::{FetchError, Fetcher};
use kprov_types::api::ReleaseRef;
use kprov_types::node::ReleaseSource;
use kprov_types::release::{Arch, HostFile};
use kprov_types::{Digest, Release};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::files::{self, FileError, failed};
use crate::paths;

/// The name of the note in a release's directory.
const NOTE: &str = "installed.json";
/// The first pause between two attempts.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// More than the host files of any release: at the first boot nothing else needs the disk.
const ALL_AT_ONCE: usize = 64;
/// The longest pause between two attempts.
const LONGEST_PAUSE: Duration = Duration::from_secs(15);

/// Why a release cannot be installed, however often it is tried.
#[derive(Debug, thiserror::Error)]
pub enum ReleaseError {
    /// kprov does not run on this processor.
    #[error("this processor is of an architecture that no release is for")]
    Architecture,
    /// The release is not for this processor.
    #[error("the release of Kubernetes {version} has no `{file}` for {}", .arch.as_str())]
    MissingFile {
        /// The version.
        version: String,
        /// The host file.
        file: &'static str,
        /// The architecture.
        arch: Arch,
    },
    /// A file.
    #[error(transparent)]
    File(#[from] FileError),
    /// No fetcher.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// The note cannot be written.
    #[error("the note of what is installed cannot be written")]
    Note(#[source] serde_json::Error),
}

/// What is installed in a release's directory.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Installed {
    release: Release,
    /// The digest of `release.json`; older kprov-nodes left it out, and had the release of the first boot alone.
    #[serde(default)]
    digest: Option<Digest>,
    /// Where its files came from.
    #[serde(default)]
    urls: Vec<String>,
    /// Of each file as it was after it was verified, by its path below the directory.
    files: BTreeMap<Utf8PathBuf, Digest>,
}

/// A release that is installed on this machine, as its note says.
#[derive(Clone, Debug)]
pub struct OnDisk {
    /// Which.
    pub reference: ReleaseRef,
    /// The release.
    pub release: Arc<Release>,
    /// The directory of its files.
    pub directory: Utf8PathBuf,
    installed: Installed,
}

impl OnDisk {
    /// The release installed in a directory, if one is. `first` is the digest of the release of the first boot.
    pub fn read(directory: &Utf8Path, first: &Digest) -> Option<Self> {
        let installed = read_note(directory)?;
        let release = installed.release.clone();
        Some(Self {
            reference: ReleaseRef {
                version: release.kubernetes.clone(),
                digest: installed.digest.clone().unwrap_or_else(|| first.clone()),
            },
            release: Arc::new(release),
            directory: directory.to_owned(),
            installed,
        })
    }

    /// All releases that are installed below a directory.
    pub fn all(releases: &Utf8Path, first: &Digest) -> Vec<Self> {
        let Ok(entries) = releases.read_dir_utf8() else {
            return Vec::new();
        };
        let directories = entries.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir()));
        directories.filter_map(|e| Self::read(e.path(), first)).collect()
    }

    /// Where each host file of the release is whose bytes are those that its digest names (a file that was taken from an archive
    /// has another digest than the archive).
    pub fn blobs(&self) -> BTreeMap<Digest, Utf8PathBuf> {
        let files = self.installed.files.iter();
        files
            .map(|(path, digest)| (digest.clone(), self.directory.join(path)))
            .collect()
    }
}

/// The host files that are here, by name.
#[derive(Clone, Debug)]
pub struct HostFiles(watch::Sender<BTreeSet<String>>);

impl HostFiles {
    /// None yet.
    pub fn new() -> Self {
        Self(watch::Sender::default())
    }

    /// Waits until all of `names` are here.
    pub async fn wait(&self, names: &[&str]) {
        // The sender is `self`, so the channel cannot close while this waits.
        let _ = self
            .0
            .subscribe()
            .wait_for(|here| names.iter().all(|name| here.contains(*name)))
            .await;
    }

    fn add(&self, name: &str) {
        self.0.send_modify(|here| {
            here.insert(name.to_owned());
        });
    }
}

impl Default for HostFiles {
    fn default() -> Self {
        Self::new()
    }
}

/// The host files without which no machine runs.
const REQUIRED: [&str; 5] = ["containerd", "containerd-shim-runc-v2", "runc", "kubelet", "cni/bridge"];

/// The release that this machine's programs are started from.
#[derive(Clone, Debug)]
pub struct Current {
    /// Which.
    pub reference: ReleaseRef,
    /// The release.
    pub release: Arc<Release>,
    /// The directory of its files.
    pub directory: Utf8PathBuf,
}

/// A release on its way onto this machine.
#[derive(Clone, Debug)]
pub struct Installation {
    /// Which.
    pub reference: ReleaseRef,
    /// The release.
    pub release: Arc<Release>,
    /// The directory of its files.
    pub directory: Utf8PathBuf,
    /// What is there already, to be checked.
    installed: Option<Installed>,
    urls: Vec<String>,
}

impl Installation {
    /// The release that ran last on this machine, or else the one of the first-boot configuration, which is fetched and
    /// must have the digest given there. Tries until it has it.
    pub async fn begin(source: &ReleaseSource, note: impl Fn(String)) -> Result<Self, ReleaseError> {
        let link = paths::current();
        if let Ok(target) = link.read_link_utf8()
            && let Some(found) = OnDisk::read(&Utf8Path::new(paths::RELEASES).join(target), &source.digest)
        {
            return Ok(Self::again(found, &source.urls));
        }
        let fetcher = Fetcher::new(source.urls.clone())?;
        let mut pause = FIRST_PAUSE;
        let release = loop {
            match fetcher.release(&source.digest).await {
                Ok(release) => break release,
                Err(error) => note(crate::chain(&error)),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        };
        let reference = ReleaseRef {
            version: release.kubernetes.clone(),
            digest: source.digest.clone(),
        };
        let this = Self::new(reference, Arc::new(release), source.urls.clone());
        // Already now: containerd finds runc and the CNI plugins by way of it.
        files::make_directory(&this.directory, 0o755)?;
        this.make_current()?;
        Ok(this)
    }

    /// A release that is to be fetched from these URLs.
    pub fn new(reference: ReleaseRef, release: Arc<Release>, urls: Vec<String>) -> Self {
        Self {
            directory: paths::release(&reference),
            reference,
            release,
            installed: None,
            urls,
        }
    }

    /// A release that was installed before; what is damaged is fetched again from where it came from, or from `urls`.
    pub fn again(found: OnDisk, urls: &[String]) -> Self {
        let OnDisk {
            reference,
            release,
            directory,
            installed,
        } = found;
        let mut all = installed.urls.clone();
        all.extend(urls.iter().filter(|url| !installed.urls.contains(url)).cloned());
        Self {
            reference,
            release,
            directory,
            installed: Some(installed),
            urls: all,
        }
    }

    fn make_current(&self) -> Result<(), FileError> {
        files::link(&paths::current(), self.directory.file_name().unwrap_or_default())
    }

    /// [`Installation::finish`], and makes the release the current one.
    pub async fn finish_current(
        self,
        here: HostFiles,
        failure: impl Fn(&FetchError) -> Duration,
    ) -> Result<(), ReleaseError> {
        self.make_current()?;
        self.finish(here, ALL_AT_ONCE, failure).await
    }

    /// Puts all files in place, so many at a time, and says of each when it is there. Tries until all are there; `failure` is
    /// told what went wrong and answers how long to wait at least.
    pub async fn finish(
        self,
        here: HostFiles,
        at_once: usize,
        failure: impl Fn(&FetchError) -> Duration,
    ) -> Result<(), ReleaseError> {
        let arch = Arch::current().ok_or(ReleaseError::Architecture)?;
        let here = &here;
        let Self {
            reference,
            release,
            directory,
            installed,
            urls,
        } = self;
        let wanted: Vec<_> = release.host_files_for(arch).collect();
        for file in REQUIRED {
            if !wanted.iter().any(|f| f.name == file) {
                let version = release.kubernetes.to_string();
                return Err(ReleaseError::MissingFile { version, file, arch });
            }
        }
        if let Some(installed) = &installed {
            let intact = join_all(wanted.iter().map(|file| {
                let directory = &directory;
                let expected = installed.files.get(&place(file));
                async move {
                    let found = digest(directory.join(place(file))).await;
                    let good = found.is_ok_and(|found| expected == Some(&found));
                    if good {
                        here.add(&file.name);
                    }
                    good
                }
            }));
            if intact.await.into_iter().all(|good| good) {
                return Ok(());
            }
            tracing::warn!(%directory, "files of the release are missing or damaged on disk; fetching them again");
        }
        let fetcher = Fetcher::new(urls.clone())?;
        let (fetcher, directory, failure) = (&fetcher, &directory, &failure);
        let fetch = |file: &HostFile| {
            let file = file.clone();
            async move {
                let path = directory.join(place(&file));
                let mut pause = FIRST_PAUSE;
                while let Err(error) = fetcher.host_file(&file, &path).await {
                    let least = failure(&error);
                    tokio::time::sleep(pause.max(least)).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
                here.add(&file.name);
                Ok::<_, ReleaseError>((place(&file), digest(path).await?))
            }
        };
        let all = futures::stream::iter(wanted.into_iter().map(fetch)).buffer_unordered(at_once);
        let files: BTreeMap<_, _> = all.try_collect().await?;
        let installed = Installed {
            files,
            release: (*release).clone(),
            digest: Some(reference.digest),
            urls,
        };
        let json = serde_json::to_vec_pretty(&installed).map_err(ReleaseError::Note)?;
        files::write(&directory.join(NOTE), &json, 0o600)?;
        tracing::info!(version = %release.kubernetes, %directory, "release installed");
        Ok(())
    }
}

/// Removes an installed release: the note first, so that what a crash leaves is not taken for one.
pub fn remove(directory: &Utf8Path) -> Result<(), FileError> {
    files::remove(&directory.join(NOTE))?;
    std::fs::remove_dir_all(directory).map_err(failed("remove", directory))
}

/// Where a host file goes, below its release's directory.
fn place(file: &HostFile) -> Utf8PathBuf {
    if file.name.starts_with("cni/") {
        file.name.clone().into()
    } else {
        Utf8Path::new("bin").join(&file.name)
    }
}

fn read_note(directory: &Utf8Path) -> Option<Installed> {
    let path = directory.join(NOTE);
    let json = files::read_if_there(&path).ok().flatten()?;
    serde_json::from_slice(&json)
        .inspect_err(|error| tracing::warn!(%path, %error, "not understood; the release is fetched again"))
        .ok()
}

async fn digest(path: Utf8PathBuf) -> Result<Digest, FileError> {
    let hashed = {
        let path = path.clone();
        tokio::task::spawn_blocking(move || files::digest(&path)).await
    };
    hashed.map_err(|e| failed("read", &path)(io::Error::other(e))).flatten()
}
