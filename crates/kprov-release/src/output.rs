//! Putting a finished payload in its place: whole or not at all, and never over something else.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;

use camino::{Utf8Path, Utf8PathBuf};
use kprov_types::Release;
use tempfile::TempDir;
use walkdir::WalkDir;

use crate::keys::SigningKey;
use crate::payload::{Payload, PayloadError, RELEASE, SIGNATURE};

/// Why a payload could not be written.
#[derive(Debug, thiserror::Error)]
pub enum OutputError {
    /// Something else is where the payload should go.
    #[error("`{path}` exists and is not this payload")]
    Exists {
        /// The directory.
        path: Utf8PathBuf,
    },
    /// A file or directory could not be read.
    #[error("cannot read `{path}`")]
    Read {
        /// The path.
        path: Utf8PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file or directory could not be written.
    #[error("cannot write `{path}`")]
    Write {
        /// The path.
        path: Utf8PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A document could not be put into its form.
    #[error("cannot write a description")]
    Encode(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The finished payload could not be read back.
    #[error("the payload cannot be read back")]
    ReadBack(#[source] PayloadError),
}

impl From<oci_spec::OciSpecError> for OutputError {
    fn from(error: oci_spec::OciSpecError) -> Self {
        Self::Encode(error.into())
    }
}

impl OutputError {
    /// What the person may do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Exists { path } => Some(format!("choose another directory, or remove `{path}`")),
            Self::Write { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                Some("a payload needs about 700 MiB".into())
            }
            _ => None,
        }
    }
}

/// Refuses a place that holds something else than a payload, before any work is done.
pub(crate) fn check_place(out: &Utf8Path) -> Result<(), OutputError> {
    match out.read_dir_utf8().and_then(|mut entries| entries.next().transpose()) {
        Ok(None) => Ok(()),
        Ok(Some(_)) if out.join(RELEASE).is_file() => Ok(()),
        Ok(Some(_)) => Err(OutputError::Exists { path: out.to_owned() }),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotADirectory => Err(OutputError::Exists { path: out.to_owned() }),
        Err(source) => Err(OutputError::Read {
            path: out.to_owned(),
            source,
        }),
    }
}

/// Writes `release.json` and, with a key, its signature.
pub(crate) fn write_release(root: &Utf8Path, release: &Release, key: Option<&SigningKey>) -> Result<(), OutputError> {
    let mut bytes = serde_json::to_vec_pretty(release).map_err(|e| OutputError::Encode(e.into()))?;
    bytes.push(b'\n');
    let write = |name, bytes: &[u8]| {
        let path = root.join(name);
        fs::write(&path, bytes).map_err(|source| OutputError::Write { path, source })
    };
    write(RELEASE, &bytes)?;
    key.map_or(Ok(()), |key| write(SIGNATURE, key.sign(&bytes).as_bytes()))
}

/// A directory in which a payload is made; removed unless it becomes one.
pub(crate) struct NewDirectory {
    dir: TempDir,
    path: Utf8PathBuf,
}

impl NewDirectory {
    /// Makes one on the file system of `out`, so that it can be renamed.
    pub(crate) fn beside(out: &Utf8Path) -> Result<Self, OutputError> {
        let parent = match out.parent() {
            Some(parent) if !parent.as_str().is_empty() => parent,
            _ => ".".into(),
        };
        let failed = |source| OutputError::Write {
            path: parent.to_owned(),
            source,
        };
        fs::create_dir_all(parent).map_err(failed)?;
        let dir = tempfile::Builder::new()
            .prefix(".kprov-release-")
            .tempdir_in(parent)
            .map_err(failed)?;
        let path = Utf8PathBuf::try_from(dir.path().to_owned()).map_err(|e| failed(io::Error::other(e)))?;
        Ok(Self { dir, path })
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Utf8Path {
        &self.path
    }

    /// Moves it to `out`, unless the same payload is there already.
    pub(crate) fn become_payload(self, out: &Utf8Path) -> Result<Payload, OutputError> {
        let Self { dir, path } = self;
        let exists = out.read_dir_utf8().is_ok_and(|mut entries| entries.next().is_some());
        if exists {
            let read = |dir: &Utf8Path| {
                files(dir).map_err(|source| OutputError::Read {
                    path: dir.to_owned(),
                    source,
                })
            };
            let (here, there) = (read(&path)?, read(out)?);
            let same = here == there
                && here
                    .iter()
                    .all(|f| same_bytes(&path.join(f), &out.join(f)).unwrap_or(false));
            if !same {
                return Err(OutputError::Exists { path: out.to_owned() });
            }
        } else {
            let failed = |source| OutputError::Write {
                path: out.to_owned(),
                source,
            };
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).map_err(failed)?;
            fs::rename(&path, out).map_err(failed)?;
            // It is no longer where it would be removed.
            let _ = dir.keep();
        }
        Payload::open(out).map_err(OutputError::ReadBack)
    }
}

/// All files below, by relative path.
fn files(dir: &Utf8Path) -> io::Result<Vec<Utf8PathBuf>> {
    let mut files = Vec::new();
    for entry in WalkDir::new(dir).sort_by_file_name() {
        let entry = entry?;
        if !entry.file_type().is_dir() {
            let path = Utf8Path::from_path(entry.path()).ok_or_else(|| io::Error::other("a name is not UTF-8"))?;
            files.push(path.strip_prefix(dir).map_err(io::Error::other)?.to_owned());
        }
    }
    Ok(files)
}

fn same_bytes(a: &Utf8Path, b: &Utf8Path) -> io::Result<bool> {
    if fs::metadata(a)?.len() != fs::metadata(b)?.len() {
        return Ok(false);
    }
    let hash = |path| crate::digest::of_reader(fs::File::open(path)?, |_| Ok(())).map(crate::digest::Hasher::digest);
    Ok(hash(a)? == hash(b)?)
}
