//! A machine's store of blobs: offers what is on the machine to all others, and takes what a release names.
//!
//! - `GET`, `HEAD` of `/blobs/sha256/<hex>`, and of `/v2/<any name>/{manifests,blobs}/sha256:<hex>` by the pull part of the OCI
//!   distribution specification 1.1: from the store's own directory, from other directories of blobs (containerd's content
//!   store), and from single files (the host files of installed releases).
//! - `PUT` of `/blobs/sha256/<hex>`: only of what is wanted, and only under the digest that the bytes have. What a wanted manifest
//!   or index names is wanted as well, once the store has it; so manifests are put first (see [`crate::upload`]).
//!
//! Plain HTTP, for everybody: nothing in a release is secret, and nothing can be put that no release names. What comes from
//! places that others write is sent as it is: whoever fetches checks digests. Requests are told by their digests, so none can
//! name a file.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Read as _, Write as _};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::body::{Body, BodyDataStream};
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use bytes::Bytes;
use camino::{Utf8Path, Utf8PathBuf};
use futures::StreamExt as _;
use kprov_types::Digest;
use serde::Deserialize;
use tempfile::TempPath;
use tokio::fs::File;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;

use crate::digest::{self, Hasher};
use crate::http::{self, BINARY, Found, Refusal, Source, Target, document, open, target};
use crate::payload::{DOCUMENT_LIMIT, Part};

/// The largest blob that is taken, in bytes.
pub const BLOB_LIMIT: u64 = 2 << 30;
/// How many blobs are taken at once; more are refused for the moment.
const UPLOADS: usize = 8;
/// How long a body may stand still.
const STILL: Duration = Duration::from_secs(30);
/// How much of a copy is written before it is synced, in bytes.
const SYNCED: u64 = 8 << 20;
/// What the names of unfinished files begin with. No blob's name does.
const UNFINISHED: &str = ".new-";

/// What a store is made of.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    /// The store's own directory: what is put becomes `<dir>/<64 hex digits>`. Made where it is missing.
    pub dir: Utf8PathBuf,
    /// Directories with such files that others write, in the order in which they are looked through. They need not exist.
    pub places: Vec<Utf8PathBuf>,
    /// Single files that others write.
    pub files: watch::Receiver<BTreeMap<Digest, Utf8PathBuf>>,
    /// What may be put; see [`crate::upload::named_by`].
    pub wanted: watch::Receiver<BTreeSet<Digest>>,
}

/// Why a store cannot be opened or cleared.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The directory, or a file in it.
    #[error("cannot write `{path}`")]
    Write {
        /// The path.
        path: Utf8PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A store. Copies are the same store.
#[derive(Clone, Debug)]
pub struct Store(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    config: StoreConfig,
    /// What blobs name, of those that were looked at. It cannot change, as they are named by their digests.
    named: Mutex<BTreeMap<Digest, Arc<[Digest]>>>,
    uploads: Semaphore,
}

impl Store {
    /// Opens a store and removes what earlier uploads left unfinished. One process at a time may have it open.
    pub fn new(config: StoreConfig) -> Result<Self, StoreError> {
        let failed = |path: &Utf8Path| {
            let path = path.to_owned();
            |source| StoreError::Write { path, source }
        };
        let dir = &config.dir;
        fs::create_dir_all(dir).map_err(failed(dir))?;
        for entry in dir.read_dir_utf8().map_err(failed(dir))? {
            let entry = entry.map_err(failed(dir))?;
            if entry.file_name().starts_with(UNFINISHED) {
                fs::remove_file(entry.path()).map_err(failed(entry.path()))?;
            }
        }
        Ok(Self(Arc::new(Inner {
            config,
            named: Mutex::default(),
            uploads: Semaphore::new(UPLOADS),
        })))
    }

    /// Where a blob may be, the store's own directory first.
    fn candidates(&self, digest: &Digest) -> Vec<Utf8PathBuf> {
        let StoreConfig { dir, places, files, .. } = &self.0.config;
        let in_directories = [dir].into_iter().chain(places).map(|dir| dir.join(digest.hex()));
        in_directories.chain(files.borrow().get(digest).cloned()).collect()
    }

    /// Where a blob is, if it is on this machine. Its bytes are not checked.
    pub async fn path(&self, digest: &Digest) -> Option<Utf8PathBuf> {
        for path in self.candidates(digest) {
            if tokio::fs::metadata(&path).await.is_ok_and(|m| m.is_file()) {
                return Some(path);
            }
        }
        None
    }

    /// All that is wanted when `roots` are: they, and what those that are here name, and so on.
    async fn closure(&self, roots: BTreeSet<Digest>) -> BTreeSet<Digest> {
        let mut left: Vec<Digest> = roots.iter().cloned().collect();
        let mut all = roots;
        while let Some(digest) = left.pop() {
            for named in self.named_by(&digest).await.iter() {
                if all.insert(named.clone()) {
                    left.push(named.clone());
                }
            }
        }
        all
    }

    /// What a blob names, if it is here and a manifest or index.
    async fn named_by(&self, digest: &Digest) -> Arc<[Digest]> {
        let known = || self.0.named.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(named) = known().get(digest) {
            return named.clone();
        }
        let (paths, wanted) = (self.candidates(digest), digest.clone());
        let read = move || paths.iter().find_map(|path| read_document(path, &wanted));
        match tokio::task::spawn_blocking(read).await {
            Ok(Some(named)) => known().entry(digest.clone()).or_insert(named.into()).clone(),
            _ => Arc::default(),
        }
    }

    async fn wants(&self, digest: &Digest) -> bool {
        let wanted = self.0.config.wanted.borrow().clone();
        wanted.contains(digest) || self.closure(wanted).await.contains(digest)
    }

    /// Removes from the store's own directory all that is neither in `keep` nor named by what is. Returns how many blobs that
    /// were.
    pub async fn prune(&self, keep: BTreeSet<Digest>) -> Result<usize, StoreError> {
        let keep = self.closure(keep).await;
        let dir = &self.0.config.dir;
        let failed = |source| StoreError::Write {
            path: dir.clone(),
            source,
        };
        let mut removed = 0;
        let mut entries = tokio::fs::read_dir(dir).await.map_err(failed)?;
        while let Some(entry) = entries.next_entry().await.map_err(failed)? {
            let name = entry.file_name();
            let digest = name.to_str().and_then(|name| Digest::from_hex(name).ok());
            if digest.is_some_and(|digest| !keep.contains(&digest)) {
                tokio::fs::remove_file(entry.path()).await.map_err(failed)?;
                removed += 1;
            }
        }
        Ok(removed)
    }

    /// Puts what is wanted and lies in a directory that others write into the store's own, so that it stays when they remove
    /// theirs: as a link where both are on one file system, else as a copy. Returns how many blobs that were.
    pub async fn keep(&self) -> Result<usize, StoreError> {
        let wanted = self.0.config.wanted.borrow().clone();
        let wanted = self.closure(wanted).await;
        let StoreConfig { dir, places, .. } = &self.0.config;
        let mut kept = 0;
        for digest in wanted {
            let own = dir.join(digest.hex());
            let found = places
                .iter()
                .map(|place| place.join(digest.hex()))
                .find(|p| p.is_file());
            let (false, Some(there)) = (own.is_file(), found) else {
                continue;
            };
            let path = own.clone();
            let put = tokio::task::spawn_blocking(move || keep_file(&there, &own, &digest));
            let done = put.await.unwrap_or_else(|panic| Err(io::Error::other(panic)));
            kept += usize::from(done.map_err(|source| StoreError::Write { path, source })?);
        }
        Ok(kept)
    }

    async fn find(&self, path: &str) -> Result<Found, Refusal> {
        match target(path) {
            Target::Api => Ok(document(Bytes::from_static(b"{}"))),
            Target::Blob(digest) | Target::ApiBlob(Ok(digest)) => {
                let Some(path) = self.path(&digest).await else {
                    return Err(Refusal::unknown("BLOB_UNKNOWN", digest));
                };
                let (file, size) = open(path, "BLOB_UNKNOWN", &digest).await?;
                Ok(Found {
                    source: Source::File(file, size),
                    content_type: BINARY.into(),
                    digest: Some(digest),
                })
            }
            Target::Manifest { reference, .. } => {
                let unknown = || Refusal::unknown("MANIFEST_UNKNOWN", reference);
                // A store knows no tags.
                let digest: Digest = reference.parse().map_err(|_| unknown())?;
                let path = self.path(&digest).await.ok_or_else(unknown)?;
                http::manifest(path, digest).await
            }
            Target::ApiBlob(Err(text)) => Err(Refusal::no_digest(text)),
            Target::Release | Target::Signature | Target::Other(_) => Err(Refusal::unknown("UNKNOWN", path)),
        }
    }

    /// Takes a blob. Whatever was there under its digest is replaced: it can only be the same, or damaged.
    async fn put(&self, digest: &Digest, headers: &HeaderMap, body: Body) -> Result<(), Refusal> {
        let length = headers
            .get(header::CONTENT_LENGTH)
            .and_then(|v| v.to_str().ok())
            .and_then(|v| v.parse().ok());
        if length.is_some_and(|length: u64| length > BLOB_LIMIT) {
            return Err(too_large());
        }
        let mut body = body.into_data_stream();
        let refusal = if !self.wants(digest).await {
            Refusal(
                StatusCode::FORBIDDEN,
                "DENIED",
                format!("no release names `{digest}`, as far as this machine knows"),
            )
        } else if let Ok(_permit) = self.0.uploads.try_acquire() {
            return self.take(digest, &mut body).await;
        } else {
            Refusal(
                StatusCode::SERVICE_UNAVAILABLE,
                "TOOMANYREQUESTS",
                "too many blobs are being put; try again".into(),
            )
        };
        // Proxies on the way lose an answer that comes before they have passed the body on. Whoever asks first sends none.
        if !headers.contains_key(header::EXPECT) {
            let mut size = 0;
            while piece(&mut body, &mut size).await?.is_some() {}
        }
        Err(refusal)
    }

    async fn take(&self, digest: &Digest, body: &mut BodyDataStream) -> Result<(), Refusal> {
        let dir = &self.0.config.dir;
        let unfinished = tempfile::Builder::new().prefix(UNFINISHED).tempfile_in(dir);
        // Removed when dropped: on every way out but the last, a connection that is lost included.
        let (file, path): (_, TempPath) = unfinished.map_err(|e| not_written(digest, &e))?.into_parts();
        let mut file = File::from_std(file);
        let mut hasher = Hasher::default();
        let mut size = 0;
        while let Some(piece) = piece(body, &mut size).await? {
            hasher.update(&piece);
            file.write_all(&piece).await.map_err(|e| not_written(digest, &e))?;
        }
        let found = hasher.digest();
        if found != *digest {
            return Err(Refusal(
                StatusCode::BAD_REQUEST,
                "DIGEST_INVALID",
                format!("the bytes for `{digest}` are `{found}`"),
            ));
        }
        // On disk before its name is, so that a power cut leaves no torn blob.
        let kept = async {
            file.flush().await?;
            file.sync_all().await?;
            path.persist(dir.join(digest.hex())).map_err(|e| e.error)
        };
        kept.await.map_err(|e| not_written(digest, &e))
    }
}

/// Has `own` hold what `there` holds. False where that is gone, or is not what it is named by.
fn keep_file(there: &Utf8Path, own: &Utf8Path, digest: &Digest) -> io::Result<bool> {
    match fs::hard_link(there, own) {
        Ok(()) => return Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(false),
        // On another file system, or on one without links, it has to be copied.
        Err(_) => {}
    }
    let mut from = match fs::File::open(there) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        opened => opened?,
    };
    let dir = own.parent().unwrap_or(Utf8Path::new("."));
    let mut copy = tempfile::Builder::new().prefix(UNFINISHED).tempfile_in(dir)?;
    let mut hasher = Hasher::default();
    let mut piece = Vec::new();
    // Synced bit by bit, as etcd may wait for the same disk; and all of it before it has its name, so that a power cut leaves no
    // torn blob.
    while (&mut from).take(SYNCED).read_to_end(&mut piece)? > 0 {
        copy.write_all(&piece)?;
        copy.as_file().sync_data()?;
        hasher.update(&piece);
        piece.clear();
    }
    if hasher.digest() != *digest {
        return Ok(false);
    }
    copy.as_file().sync_all()?;
    copy.persist(own).map_err(|error| error.error)?;
    Ok(true)
}

/// Serves until `stop` is cancelled; transfers under way then have a few seconds to end.
pub async fn serve(listener: TcpListener, store: Store, stop: CancellationToken) -> io::Result<()> {
    let app = axum::Router::new().fallback(answer).with_state(store);
    http::run(listener, app, stop).await
}

async fn answer(State(store): State<Store>, request: Request<Body>) -> Response<Body> {
    let (head, body) = request.into_parts();
    let (method, path, headers) = (&head.method, head.uri.path(), &head.headers);
    let found = match *method {
        Method::GET | Method::HEAD => store.find(path).await,
        Method::PUT => match target(path) {
            Target::Blob(digest) => match store.put(&digest, headers, body).await {
                Ok(()) => return created(&digest),
                Err(refusal) => Err(refusal),
            },
            _ => Err(Refusal::method(method)),
        },
        _ => Err(Refusal::method(method)),
    };
    http::respond(found, method, path, headers, "GET, HEAD, PUT").await
}

fn created(digest: &Digest) -> Response<Body> {
    tracing::debug!(%digest, "blob stored");
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::CREATED;
    response
        .headers_mut()
        .insert(header::CONTENT_LENGTH, HeaderValue::from_static("0"));
    response
}

/// The next piece of a body of which `size` bytes have come; `None` at its end.
async fn piece(body: &mut BodyDataStream, size: &mut u64) -> Result<Option<Bytes>, Refusal> {
    let broken = |why: String| Refusal(StatusCode::BAD_REQUEST, "BLOB_UPLOAD_INVALID", why);
    let Ok(next) = tokio::time::timeout(STILL, body.next()).await else {
        return Err(broken(format!("nothing came for {} s", STILL.as_secs())));
    };
    let piece = next
        .transpose()
        .map_err(|error| broken(format!("the body broke off: {error}")))?;
    *size += piece.as_ref().map_or(0, Bytes::len) as u64;
    if *size > BLOB_LIMIT {
        Err(too_large())
    } else {
        Ok(piece)
    }
}

fn too_large() -> Refusal {
    Refusal(
        StatusCode::PAYLOAD_TOO_LARGE,
        "SIZE_INVALID",
        format!("larger than {BLOB_LIMIT} bytes"),
    )
}

fn not_written(digest: &Digest, error: &io::Error) -> Refusal {
    tracing::warn!(%digest, %error, "cannot store a blob");
    let status = if error.kind() == io::ErrorKind::StorageFull {
        StatusCode::INSUFFICIENT_STORAGE
    } else {
        StatusCode::INTERNAL_SERVER_ERROR
    };
    Refusal(status, "UNKNOWN", format!("`{digest}` cannot be written: {error}"))
}

/// The digests in the manifest or index at `path`; none where it is another document, `None` where the blob is not there, is too
/// large for a document, or is not what it is named by: anybody may have written it.
fn read_document(path: &Utf8Path, wanted: &Digest) -> Option<Vec<Digest>> {
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct Document {
        manifests: Vec<Part>,
        config: Option<Part>,
        layers: Vec<Part>,
    }
    let file = fs::File::open(path).ok()?;
    file.metadata()
        .ok()
        .filter(|m| m.is_file() && m.len() <= DOCUMENT_LIMIT)?;
    let mut bytes = Vec::new();
    file.take(DOCUMENT_LIMIT).read_to_end(&mut bytes).ok()?;
    if digest::of_bytes(&bytes) != *wanted {
        return None;
    }
    let Document {
        manifests,
        config,
        layers,
    } = serde_json::from_slice(&bytes).unwrap_or_default();
    Some(
        manifests
            .into_iter()
            .chain(config)
            .chain(layers)
            .map(|part| part.digest)
            .collect(),
    )
}
