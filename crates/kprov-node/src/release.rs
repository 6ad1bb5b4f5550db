//! The release that this machine runs: its host files fetched, verified, and kept with a note of what they were.
//!
//! A machine that has its release needs no network to start again: the note, written after all files are there, holds the
//! release and the digest of each file, which is checked before anything is run.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read};
use std::sync::Arc;
use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};
use futures::future::{join_all, try_join_all};
use kprov_release::{FetchError, Fetcher};
use kprov_types::node::ReleaseSource;
use kprov_types::release::{Arch, HostFile};
use kprov_types::{Digest, Release};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tokio::sync::watch;

use crate::files::{self, FileError, failed};
use crate::paths;

/// The name of the note in a release's directory.
const NOTE: &str = "installed.json";
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
#[derive(Debug, Serialize, Deserialize)]
struct Installed {
    release: Release,
    /// Of each file as it was after it was verified, by its path below the directory.
    files: BTreeMap<Utf8PathBuf, Digest>,
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

/// A release on its way onto this machine.
pub struct Installation {
    /// The release.
    pub release: Arc<Release>,
    /// The directory of its files.
    pub directory: Utf8PathBuf,
    source: Source,
}

enum Source {
    /// All there, to be checked.
    Disk(Installed),
    /// To be fetched.
    Network(Fetcher),
}

impl Installation {
    /// The release that ran last on this machine, or else the one of the first-boot configuration, which is fetched and
    /// must have the digest given there. Tries until it has it.
    pub async fn begin(source: &ReleaseSource, note: impl Fn(String)) -> Result<Self, ReleaseError> {
        let current = paths::current();
        if let Some(installed) = read_note(&current) {
            let directory = paths::release(&installed.release.kubernetes);
            return Ok(Self {
                release: Arc::new(installed.release.clone()),
                directory,
                source: Source::Disk(installed),
            });
        }
        let fetcher = Fetcher::new(source.urls.clone())?;
        let mut pause = Duration::from_millis(250);
        let release = loop {
            match fetcher.release(&source.digest).await {
                Ok(release) => break release,
                Err(error) => note(crate::chain(&error)),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        };
        let directory = paths::release(&release.kubernetes);
        Ok(Self {
            release: Arc::new(release),
            directory,
            source: Source::Network(fetcher),
        })
    }

    /// Puts all files in place, several at a time, and says of each when it is there; then makes the release the current
    /// one. Tries until all are there.
    pub async fn finish(
        self,
        here: &HostFiles,
        again: &ReleaseSource,
        note: impl Fn(String),
    ) -> Result<(), ReleaseError> {
        let arch = Arch::current().ok_or(ReleaseError::Architecture)?;
        let Self {
            release,
            directory,
            source,
        } = self;
        let wanted: Vec<_> = release.host_files_for(arch).collect();
        for file in REQUIRED {
            if !wanted.iter().any(|f| f.name == file) {
                let version = release.kubernetes.to_string();
                return Err(ReleaseError::MissingFile { version, file, arch });
            }
        }
        let fetcher = match source {
            Source::Disk(installed) => {
                let intact = join_all(wanted.iter().map(|file| {
                    let directory = &directory;
                    let expected = installed.files.get(&place(file));
                    async move {
                        let found = digest(directory.join(place(file))).await;
                        let good = found
                            .as_ref()
                            .ok()
                            .zip(expected)
                            .is_some_and(|(found, expected)| found == expected);
                        if good {
                            here.add(&file.name);
                        }
                        good
                    }
                }));
                if intact.await.into_iter().all(|good| good) {
                    return Ok(files::link(&paths::current(), release.kubernetes.to_string().as_str())?);
                }
                note("files of the release are missing or damaged on disk; fetching them again".into());
                Fetcher::new(again.urls.clone())?
            }
            Source::Network(fetcher) => fetcher,
        };
        let (fetcher, directory, note) = (&fetcher, &directory, &note);
        let installed = try_join_all(wanted.iter().map(|file| async move {
            let path = directory.join(place(file));
            let mut pause = Duration::from_millis(250);
            while let Err(error) = fetcher.host_file(file, &path).await {
                note(crate::chain(&error));
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
            here.add(&file.name);
            Ok::<_, ReleaseError>((place(file), digest(path).await?))
        }));
        let installed = Installed {
            files: installed.await?.into_iter().collect(),
            release: (*release).clone(),
        };
        let json = serde_json::to_vec_pretty(&installed).map_err(ReleaseError::Note)?;
        files::write(&directory.join(NOTE), &json, 0o600)?;
        files::link(&paths::current(), release.kubernetes.to_string().as_str())?;
        tracing::info!(version = %release.kubernetes, "release installed");
        Ok(())
    }
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
    let hash = {
        let path = path.clone();
        tokio::task::spawn_blocking(move || {
            let mut file = std::fs::File::open(path)?;
            let mut hasher = Sha256::new();
            let mut buffer = vec![0; 128 << 10];
            loop {
                match file.read(&mut buffer)? {
                    0 => return Ok::<_, io::Error>(Digest::from_bytes(hasher.finalize().into())),
                    n => hasher.update(buffer.get(..n).unwrap_or_default()),
                }
            }
        })
    };
    hash.await
        .map_err(io::Error::other)
        .flatten()
        .map_err(failed("read", &path))
}
