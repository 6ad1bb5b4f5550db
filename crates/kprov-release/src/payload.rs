//! Reading and verifying a payload.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;

use camino::{Utf8Component, Utf8Path, Utf8PathBuf};
use kprov_types::Digest;
use kprov_types::release::{API_VERSION, FileSource, Release};
use serde::Deserialize;

use crate::digest::{self, Hasher};
use crate::keys::{KeyId, SignatureError, TrustedKeys};
use crate::layout::BLOBS;
use crate::parallel;

/// The registry in the references of images that payloads carry. Nothing answers under this name: machines take it as
/// another name for where they got their release from.
pub const PAYLOAD_REGISTRY: &str = "kprov.local";

/// The file that says what a payload consists of.
pub const RELEASE: &str = "release.json";
/// Its signatures.
pub const SIGNATURE: &str = "release.json.sig";

/// The largest `release.json`, manifest or configuration that is read into memory, in bytes.
pub(crate) const DOCUMENT_LIMIT: u64 = 4 << 20;

/// Why bytes are not a release.
#[derive(Debug, thiserror::Error)]
pub enum ReleaseFormatError {
    /// Not JSON, or not of a release's shape.
    #[error("malformed: {0}")]
    Malformed(#[from] serde_json::Error),
    /// A kind or version of document that this kprov does not know.
    #[error("`{kind}` of `{api_version}` is not known; expected `Release` of `{API_VERSION}`")]
    Unknown {
        /// Its `apiVersion`.
        api_version: String,
        /// Its `kind`.
        kind: String,
    },
    /// A host file's name would lead out of the directory it belongs in.
    #[error("`{0}` is not a name for a host file")]
    FileName(String),
}

/// Why bytes are not the release that was asked for.
#[derive(Debug, thiserror::Error)]
pub enum ReadReleaseError {
    /// Other bytes.
    #[error("`{RELEASE}` has digest `{found}`, not `{expected}`")]
    Digest {
        /// What was asked for.
        expected: Digest,
        /// What the bytes hash to.
        found: Digest,
    },
    /// The right bytes are no release that this kprov knows.
    #[error("`{RELEASE}` is not a release")]
    Format(#[from] ReleaseFormatError),
}

/// Reads the bytes of a `release.json` that must have this digest. For its signature see [`TrustedKeys::check`].
pub fn read_release(bytes: &[u8], expected: &Digest) -> Result<Release, ReadReleaseError> {
    let found = digest::of_bytes(bytes);
    if found == *expected {
        Ok(parse_release(bytes)?)
    } else {
        let expected = expected.clone();
        Err(ReadReleaseError::Digest { expected, found })
    }
}

/// Reads a `release.json`.
pub(crate) fn parse_release(bytes: &[u8]) -> Result<Release, ReleaseFormatError> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Head {
        api_version: String,
        kind: String,
    }
    // The head first, so that a later format is named as such and not by the first field that differs.
    let Head { api_version, kind } = serde_json::from_slice(bytes)?;
    if api_version != API_VERSION || kind != "Release" {
        return Err(ReleaseFormatError::Unknown { api_version, kind });
    }
    let release: Release = serde_json::from_slice(bytes)?;
    for file in &release.host_files {
        let path = Utf8Path::new(&file.name);
        let plain = path.components().all(|c| matches!(c, Utf8Component::Normal(_)));
        if !plain || file.name.is_empty() {
            return Err(ReleaseFormatError::FileName(file.name.clone()));
        }
    }
    Ok(release)
}

/// Why a payload cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PayloadError {
    /// The directory has no `release.json`.
    #[error("`{path}` is not a release payload: it has no `release.json`")]
    NotAPayload {
        /// The directory.
        path: Utf8PathBuf,
    },
    /// A file could not be read.
    #[error("cannot read `{path}`")]
    Read {
        /// The file.
        path: Utf8PathBuf,
        /// Why.
        source: io::Error,
    },
    /// `release.json` is not one.
    #[error("`{path}` is not a release")]
    Format {
        /// The file.
        path: Utf8PathBuf,
        /// Why.
        source: ReleaseFormatError,
    },
    /// The signature does not count.
    #[error("`{path}` is refused")]
    Signature {
        /// The payload.
        path: Utf8PathBuf,
        /// Why.
        source: SignatureError,
    },
    /// A blob is missing.
    #[error("{component} is incomplete: blob `{digest}` is missing")]
    MissingBlob {
        /// What it is part of, such as ``image `etcd` ``.
        component: String,
        /// The blob.
        digest: Digest,
    },
    /// A blob's bytes are not the ones it is named by.
    #[error("{component} was altered: blob `{digest}` has digest `{found}`")]
    AlteredBlob {
        /// What it is part of.
        component: String,
        /// The blob.
        digest: Digest,
        /// What its bytes hash to.
        found: Digest,
    },
    /// A blob is of another size than it should be.
    #[error("{component} was altered: blob `{digest}` has {found} bytes, not {expected}")]
    WrongSize {
        /// What it is part of.
        component: String,
        /// The blob.
        digest: Digest,
        /// The size it should have.
        expected: u64,
        /// The size it has.
        found: u64,
    },
    /// A manifest with the right digest is not a manifest.
    #[error("{component} has a manifest that is not one: `{digest}`")]
    Manifest {
        /// What it is part of.
        component: String,
        /// The manifest.
        digest: Digest,
        /// Why.
        source: serde_json::Error,
    },
}

impl PayloadError {
    /// What the person may do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NotAPayload { .. } => Some("make one by `kprov release create`".into()),
            Self::Signature {
                source: SignatureError::Unsigned,
                ..
            } => Some("sign it, or use it anyway with `--insecure-release`".into()),
            Self::Signature {
                source: SignatureError::UnknownKey { .. },
                ..
            } => Some("trust its signer's public key, or use it anyway with `--insecure-release`".into()),
            Self::Signature { .. }
            | Self::MissingBlob { .. }
            | Self::AlteredBlob { .. }
            | Self::WrongSize { .. }
            | Self::Manifest { .. } => Some("get the payload again from where it was made".into()),
            Self::Read { .. } | Self::Format { .. } => None,
        }
    }
}

/// How strictly to verify.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VerifyOptions {
    /// Accept a release without a signature that counts. Blobs are checked all the same.
    pub allow_unsigned: bool,
}

/// What verifying showed.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub struct Verified {
    /// The trusted key that signed it, or why its signature does not count.
    pub signature: Result<KeyId, SignatureError>,
    /// Blobs that were hashed.
    pub blobs: usize,
    /// Their size in bytes.
    pub bytes: u64,
}

/// A payload on disk. Opening it reads `release.json` and nothing else.
#[derive(Clone, Debug)]
pub struct Payload {
    root: Utf8PathBuf,
    bytes: Vec<u8>,
    release: Release,
}

/// What manifests and indexes say of a blob (a descriptor, of which only this matters here).
#[derive(Deserialize)]
pub(crate) struct Part {
    pub(crate) digest: Digest,
    size: u64,
}

/// A blob as something refers to it.
#[derive(Clone)]
struct BlobRef {
    component: String,
    digest: Digest,
    size: Option<u64>,
}

impl Payload {
    /// Opens the payload in a directory.
    pub fn open(root: &Utf8Path) -> Result<Self, PayloadError> {
        let path = root.join(RELEASE);
        let bytes = fs::read(&path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {
                PayloadError::NotAPayload { path: root.to_owned() }
            }
            _ => PayloadError::Read {
                path: path.clone(),
                source,
            },
        })?;
        let release = parse_release(&bytes).map_err(|source| PayloadError::Format { path, source })?;
        Ok(Self {
            root: root.to_owned(),
            bytes,
            release,
        })
    }

    /// Where it is.
    pub fn root(&self) -> &Utf8Path {
        &self.root
    }

    /// What it consists of.
    pub fn release(&self) -> &Release {
        &self.release
    }

    /// The bytes of `release.json` as they were when it was opened.
    pub fn release_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The digest of `release.json`. It pins everything else.
    pub fn digest(&self) -> Digest {
        digest::of_bytes(&self.bytes)
    }

    /// Where a blob is, if the payload carries it.
    pub fn blob_path(&self, digest: &Digest) -> Utf8PathBuf {
        self.root.join(BLOBS).join(digest.hex())
    }

    /// The text of the signature file; `None` where there is none.
    pub fn signature(&self) -> Result<Option<String>, PayloadError> {
        let path = self.root.join(SIGNATURE);
        match fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(PayloadError::Read { path, source }),
        }
    }

    /// Checks the signature, and that every blob the release carries is there and is what it is named by. Other files
    /// are ignored. Blocks while it reads the whole payload once.
    pub fn verify(&self, trusted: &TrustedKeys, options: VerifyOptions) -> Result<Verified, PayloadError> {
        let signature = match self.signature()? {
            Some(text) => trusted.check(&self.bytes, &text),
            None => Err(SignatureError::Unsigned),
        };
        if let Err(source) = &signature
            && !options.allow_unsigned
        {
            return Err(PayloadError::Signature {
                path: self.root.clone(),
                source: source.clone(),
            });
        }
        let (mut hashed, rest) = self.manifests()?;
        hashed.extend(parallel::try_map(&rest, |blob| {
            let size = self.hash(blob, |_| Ok(()))?;
            Ok::<_, PayloadError>((blob.digest.clone(), size))
        })?);
        Ok(Verified {
            signature,
            blobs: hashed.len(),
            bytes: hashed.values().sum(),
        })
    }

    /// The carried blobs with their sizes: manifests first, then the rest, the largest first. A blob may be named twice.
    pub(crate) fn blobs(&self) -> Result<Vec<(Digest, u64)>, PayloadError> {
        let (manifests, rest) = self.manifests()?;
        let rest = rest.into_iter().filter_map(|blob| Some((blob.digest, blob.size?)));
        Ok(manifests.into_iter().chain(rest).collect())
    }

    /// Checks the manifests of carried images; returns them with their sizes, and the blobs still to be checked.
    fn manifests(&self) -> Result<(BTreeMap<Digest, u64>, Vec<BlobRef>), PayloadError> {
        #[derive(Deserialize)]
        struct Manifest {
            config: Part,
            layers: Vec<Part>,
        }
        let mut done = BTreeMap::new();
        let mut rest = Vec::new();
        for (component, image) in &self.release.images {
            if image.registry() != PAYLOAD_REGISTRY {
                continue;
            }
            let component = format!("image `{}`", component.as_str());
            let blob = BlobRef {
                component: component.clone(),
                digest: image.digest.clone(),
                size: None,
            };
            let mut bytes = Vec::new();
            let size = self.hash(&blob, |piece| {
                bytes.extend_from_slice(piece);
                if bytes.len() as u64 > DOCUMENT_LIMIT {
                    Err(io::ErrorKind::FileTooLarge.into())
                } else {
                    Ok(())
                }
            })?;
            done.insert(blob.digest.clone(), size);
            let Manifest { config, layers } =
                serde_json::from_slice(&bytes).map_err(|source| PayloadError::Manifest {
                    component: component.clone(),
                    digest: blob.digest,
                    source,
                })?;
            rest.extend([config].into_iter().chain(layers).map(|part| BlobRef {
                component: component.clone(),
                digest: part.digest,
                size: Some(part.size),
            }));
        }
        for file in &self.release.host_files {
            if file.source == FileSource::Carried {
                let component = format!("host file `{}`", file.name);
                rest.push(BlobRef {
                    component,
                    digest: file.digest.clone(),
                    size: Some(file.size),
                });
            }
        }
        rest.sort_by(|a, b| a.digest.cmp(&b.digest));
        rest.dedup_by(|a, b| a.digest == b.digest && a.size == b.size);
        // The largest first, so that the threads end together.
        rest.sort_by_key(|b| std::cmp::Reverse(b.size));
        Ok((done, rest))
    }

    /// Hashes one blob and returns its size.
    fn hash(&self, blob: &BlobRef, each: impl FnMut(&[u8]) -> io::Result<()>) -> Result<u64, PayloadError> {
        let BlobRef {
            component,
            digest,
            size,
        } = blob;
        let path = self.blob_path(digest);
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound => PayloadError::MissingBlob {
                component: component.clone(),
                digest: digest.clone(),
            },
            _ => PayloadError::Read {
                path: path.clone(),
                source,
            },
        };
        let file = File::open(&path).map_err(failed)?;
        let found = file.metadata().map_err(failed)?.len();
        let wrong_size = |expected, found| {
            let (component, digest) = (component.clone(), digest.clone());
            PayloadError::WrongSize {
                component,
                digest,
                expected,
                found,
            }
        };
        if let Some(expected) = *size
            && found != expected
        {
            return Err(wrong_size(expected, found));
        }
        let hasher: Hasher = digest::of_reader(file, each).map_err(failed)?;
        let size = hasher.size();
        let found = hasher.digest();
        if found == *digest {
            Ok(size)
        } else {
            Err(PayloadError::AlteredBlob {
                component: component.clone(),
                digest: digest.clone(),
                found,
            })
        }
    }
}
