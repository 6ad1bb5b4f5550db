//! What the machine remembers of its orders across starts: a few small files, each replaced in one step.
//!
//! A switch from one release to another is made of such steps, and may be cut off between any two of them. The marker of a
//! trial is the truth while it is there: the link to the release that runs follows it. [`Disk::begin`] brings the rest in line.

use camino::Utf8PathBuf;
use jiff::Timestamp;
use kprov_types::api::{MachineFailure, ReleaseRef, release_name};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::decide::{Begin, decide_begin};
use crate::files::{self, FileError, failed};
use crate::paths;

/// A release that is being tried: written before anything is changed, removed when it has proven itself or was given up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Trial {
    /// The release that ran before.
    pub from: ReleaseRef,
    /// Its directory's name: one that an older kprov-node made is called otherwise.
    pub from_directory: String,
    /// The kprov-node that ran before.
    pub program: Utf8PathBuf,
    /// The release that is tried.
    pub to: ReleaseRef,
    /// The order it is tried for.
    pub order: u64,
    /// [`kprov_types::api::RunOrder::since`] of that order.
    pub since: Timestamp,
    /// How long each start may take to succeed, in seconds.
    pub timeout_seconds: u32,
    /// How often the release was started.
    pub starts: u32,
}

/// The last release that the machine went back from, and the order that it came with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Failed {
    /// What is told of it.
    pub failure: MachineFailure,
    /// [`kprov_types::api::RunOrder::since`] of the order: the same one is not tried again.
    pub since: Timestamp,
}

/// A file of the machine's memory that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// It cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// It is not what was written.
    #[error("`{path}` is not understood")]
    Malformed {
        /// The file.
        path: Utf8PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
}

/// The files, below two directories.
#[derive(Clone, Debug)]
pub struct Disk {
    state: Utf8PathBuf,
    releases: Utf8PathBuf,
}

impl Default for Disk {
    fn default() -> Self {
        Self {
            state: paths::STATE.into(),
            releases: paths::RELEASES.into(),
        }
    }
}

impl Disk {
    #[cfg(test)]
    pub(crate) fn below(root: &camino::Utf8Path) -> Self {
        Self {
            state: root.to_owned(),
            releases: root.join("releases"),
        }
    }

    fn read<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, DiskError> {
        let path = self.state.join(name);
        let Some(json) = files::read_if_there(&path)? else {
            return Ok(None);
        };
        serde_json::from_slice(&json)
            .map(Some)
            .map_err(|source| DiskError::Malformed { path, source })
    }

    fn write(&self, name: &str, value: &impl Serialize) -> Result<(), DiskError> {
        let path = self.state.join(name);
        let json = serde_json::to_vec_pretty(value).map_err(|source| DiskError::Malformed {
            path: path.clone(),
            source,
        })?;
        files::write(&path, &json, 0o600)?;
        Ok(())
    }

    /// The highest order that was taken; 0 before the first.
    pub fn order(&self) -> Result<u64, DiskError> {
        Ok(self.read(ORDER)?.unwrap_or_default())
    }

    /// Remembers an order, before it is acted on.
    pub fn set_order(&self, order: u64) -> Result<(), DiskError> {
        self.write(ORDER, &order)
    }

    /// The release that is being tried.
    pub fn trial(&self) -> Result<Option<Trial>, DiskError> {
        self.read(TRIAL)
    }

    /// Begins a trial, or counts a start of it. Nothing else has changed yet.
    pub fn set_trial(&self, trial: &Trial) -> Result<(), DiskError> {
        self.write(TRIAL, trial)
    }

    /// The release that was tried runs.
    pub fn end_trial(&self) -> Result<(), DiskError> {
        files::remove(&self.state.join(TRIAL))?;
        Ok(())
    }

    /// What the machine went back from last.
    pub fn failed(&self) -> Result<Option<Failed>, DiskError> {
        self.read(FAILED)
    }

    /// Gives the trial up, from now on for good: the machine goes back.
    pub fn set_failed(&self, failed: &Failed) -> Result<(), DiskError> {
        self.write(FAILED, failed)
    }

    /// The name of the directory of the release that runs.
    pub fn current(&self) -> Result<Option<String>, DiskError> {
        let path = self.releases.join("current");
        match path.read_link_utf8() {
            Ok(target) => Ok(Some(target.into_string())),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(failed("read", &path)(e).into()),
        }
    }

    /// Makes the release in the directory `name` the one that runs.
    pub fn set_current(&self, name: &str) -> Result<(), DiskError> {
        files::make_directory(&self.releases, 0o755)?;
        Ok(files::link(&self.releases.join("current"), name)?)
    }

    /// Makes the release that is tried the one that runs.
    pub fn switch(&self, trial: &Trial) -> Result<(), DiskError> {
        self.set_current(&directory_name(&trial.to))
    }

    /// Makes the release before the trial the one that runs, and ends the trial, which [`Disk::set_failed`] has given up.
    pub fn go_back(&self, trial: &Trial) -> Result<(), DiskError> {
        self.set_current(&trial.from_directory)?;
        self.end_trial()
    }

    /// Brings the files in line after a start, whatever cut the last process off, and tells which kprov-node is to run;
    /// `None` where the release that runs does not bring one. A trial that is started is counted.
    pub fn begin(&self, now: Timestamp) -> Result<Option<Utf8PathBuf>, DiskError> {
        let trial = self.trial()?;
        let failed = self.failed()?;
        match (decide_begin(trial.as_ref(), failed.as_ref()), trial) {
            (Begin::Try, Some(mut trial)) => {
                trial.starts += 1;
                self.set_trial(&trial)?;
                self.switch(&trial)?;
            }
            (Begin::GiveUp, Some(trial)) => {
                let message = format!("it was started {} times and never proved itself", trial.starts);
                self.set_failed(&trial.failed(message, Vec::new(), now))?;
                self.go_back(&trial)?;
                return Ok(Some(trial.program));
            }
            (Begin::GoBack, Some(trial)) => {
                self.go_back(&trial)?;
                return Ok(Some(trial.program));
            }
            (Begin::Plain, _) | (_, None) => {}
        }
        let Some(current) = self.current()? else {
            return Ok(None);
        };
        let program = self.releases.join(current).join("bin").join(KPROV_NODE);
        Ok(program.exists().then_some(program))
    }
}

impl Trial {
    /// What is remembered when the machine goes back from the release.
    pub fn failed(&self, message: String, log: Vec<String>, now: Timestamp) -> Failed {
        Failed {
            failure: MachineFailure {
                release: self.to.clone(),
                order: self.order,
                message,
                log,
                time: now,
            },
            since: self.since,
        }
    }
}

impl Failed {
    /// Whether it is this trial that was given up.
    pub fn ends(&self, trial: &Trial) -> bool {
        self.failure.release == trial.to && self.since == trial.since && self.failure.order == trial.order
    }
}

/// The name of the directory of a release.
pub fn directory_name(release: &ReleaseRef) -> String {
    release_name(&release.version.to_string(), &release.digest)
}

/// kprov-node's name among a release's host files.
pub const KPROV_NODE: &str = "kprov-node";
const ORDER: &str = "order";
const TRIAL: &str = "trial.json";
const FAILED: &str = "failure.json";
