//! Offering a payload over HTTP: what machines, and the container runtimes on them, fetch from.
//!
//! - `/release.json`, `/release.json.sig`, `/blobs/sha256/<hex>`: the payload's files, for [`crate::fetch`].
//! - `/v2/...`: the images, by the pull part of the OCI distribution specification 1.1. A runtime that mirrors
//!   [`PAYLOAD_REGISTRY`] here finds `kprov.local/etcd:3.4.23` as `/v2/etcd/manifests/3.4.23`.
//! - Any other file that was named when the server was started, by its exact path.
//!
//! Plain HTTP: nothing here is secret, and whoever fetches checks digests. Paths are matched, never joined: no request can
//! name a file outside the payload.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use axum::serve::ListenerExt as _;
use bytes::Bytes;
use camino::Utf8PathBuf;
use kprov_types::Digest;
use kprov_types::release::ReleaseImage;
use serde::Deserialize;
use tokio::fs::File;
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _};
use tokio::net::TcpListener;
use tokio_util::io::ReaderStream;
use tokio_util::sync::CancellationToken;

use crate::payload::{DOCUMENT_LIMIT, PAYLOAD_REGISTRY, Payload, PayloadError, RELEASE, SIGNATURE};
use crate::range::{self, Requested};

/// How long transfers may go on after the server was told to stop.
const GRACE: Duration = Duration::from_secs(5);
/// How much of a file is read at once.
const BUFFER: usize = 256 * 1024;

const JSON: &str = "application/json";
const BINARY: &str = "application/octet-stream";
/// What the distribution specification names a body's digest by.
const CONTENT_DIGEST: &str = "docker-content-digest";

/// A file that is offered beside the payload.
#[derive(Clone, Debug)]
pub enum ExtraFile {
    /// Bytes in memory.
    Bytes(Bytes),
    /// A file on disk, read anew for each request.
    Disk(Utf8PathBuf),
}

/// What a server offers.
#[derive(Clone, Debug)]
pub struct Content {
    payload: Payload,
    signature: Option<Bytes>,
    extra: BTreeMap<String, ExtraFile>,
}

impl Content {
    /// A payload. Its `release.json` and signature stay what they are now, whatever happens on disk.
    pub fn new(payload: Payload) -> Result<Self, PayloadError> {
        let signature = payload.signature()?.map(Bytes::from);
        Ok(Self {
            payload,
            signature,
            extra: BTreeMap::new(),
        })
    }

    /// Offers one more file, by the path of its URL, such as `/kprov-node/<sha256>`.
    #[must_use]
    pub fn with_extra(mut self, path: impl Into<String>, file: ExtraFile) -> Self {
        self.extra.insert(path.into(), file);
        self
    }
}

/// Serves until `stop` is cancelled; transfers under way then have a few seconds to end.
pub async fn serve(listener: TcpListener, content: Content, stop: CancellationToken) -> io::Result<()> {
    let app = axum::Router::new().fallback(answer).with_state(Arc::new(content));
    // Small answers should not wait for the acknowledgement of the ones before.
    let listener = listener.tap_io(|stream| {
        let _ = stream.set_nodelay(true);
    });
    let server = axum::serve(listener, app).with_graceful_shutdown(stop.clone().cancelled_owned());
    let overdue = async {
        stop.cancelled().await;
        tokio::time::sleep(GRACE).await;
    };
    tokio::select! {
        ended = server => ended,
        () = overdue => Ok(()),
    }
}

/// What a path names.
#[derive(Debug, PartialEq, Eq)]
enum Target<'a> {
    Release,
    Signature,
    Blob(Digest),
    /// The base of the distribution API, by which clients find out that there is one.
    Api,
    Manifest {
        name: &'a str,
        reference: &'a str,
    },
    ApiBlob(Result<Digest, &'a str>),
    Other(&'a str),
}

fn target(path: &str) -> Target<'_> {
    let whole = Target::Other(path);
    let Some(below) = path.strip_prefix('/') else {
        return whole;
    };
    if below == RELEASE {
        return Target::Release;
    }
    if below == SIGNATURE {
        return Target::Signature;
    }
    if let Some(hex) = below.strip_prefix("blobs/sha256/") {
        return Digest::from_hex(hex).map_or(whole, Target::Blob);
    }
    let Some(api) = below.strip_prefix("v2") else {
        return whole;
    };
    if matches!(api, "" | "/") {
        return Target::Api;
    }
    // `/v2/<name>/manifests/<reference>`, where the name may have slashes.
    let mut parts = api.rsplitn(3, '/');
    match (
        parts.next(),
        parts.next(),
        parts.next().and_then(|name| name.strip_prefix('/')),
    ) {
        (Some(reference), Some("manifests"), Some(name)) => Target::Manifest { name, reference },
        (Some(digest), Some("blobs"), Some(_)) => Target::ApiBlob(digest.parse().map_err(|_| digest)),
        _ => whole,
    }
}

/// Where a body comes from.
enum Source {
    Bytes(Bytes),
    File(File, u64),
}

/// A body and how it is described.
struct Found {
    source: Source,
    content_type: String,
    /// What the bytes are, where they are named by it: never changes, and so is the entity tag.
    digest: Option<Digest>,
}

/// Why there is no body: a status, and a code of the distribution specification.
struct Refusal(StatusCode, &'static str, String);

impl Refusal {
    fn unknown(code: &'static str, what: impl std::fmt::Display) -> Self {
        Self(StatusCode::NOT_FOUND, code, format!("`{what}` is not here"))
    }
}

async fn answer(State(content): State<Arc<Content>>, request: Request<Body>) -> Response<Body> {
    let (method, path) = (request.method(), request.uri().path());
    let found = if matches!(*method, Method::GET | Method::HEAD) {
        find(&content, path).await
    } else {
        Err(Refusal(
            StatusCode::METHOD_NOT_ALLOWED,
            "UNSUPPORTED",
            format!("`{method}` is not supported"),
        ))
    };
    let mut response = match found {
        Ok(found) => found.into_response(method, request.headers()).await,
        Err(refusal) => refusal.into_response(method),
    };
    response.headers_mut().insert(
        "docker-distribution-api-version",
        HeaderValue::from_static("registry/2.0"),
    );
    tracing::debug!(%method, path, status = response.status().as_u16(), "request");
    response
}

async fn find(content: &Content, path: &str) -> Result<Found, Refusal> {
    let Content {
        payload,
        signature,
        extra,
    } = content;
    let document = |bytes: Bytes| Found {
        source: Source::Bytes(bytes),
        content_type: JSON.into(),
        digest: None,
    };
    match target(path) {
        Target::Release => {
            let bytes = Bytes::copy_from_slice(payload.release_bytes());
            Ok(Found {
                digest: Some(payload.digest()),
                ..document(bytes)
            })
        }
        Target::Signature => match signature {
            Some(signature) => Ok(document(signature.clone())),
            None => Err(Refusal::unknown("UNKNOWN", SIGNATURE)),
        },
        Target::Api => Ok(document(Bytes::from_static(b"{}"))),
        Target::Blob(digest) | Target::ApiBlob(Ok(digest)) => {
            let (file, size) = open(payload.blob_path(&digest), "BLOB_UNKNOWN", &digest).await?;
            let source = Source::File(file, size);
            Ok(Found {
                source,
                content_type: BINARY.into(),
                digest: Some(digest),
            })
        }
        Target::ApiBlob(Err(text)) => Err(Refusal(
            StatusCode::BAD_REQUEST,
            "DIGEST_INVALID",
            format!("`{text}` is not a SHA-256 digest"),
        )),
        Target::Manifest { name, reference } => manifest(payload, name, reference).await,
        Target::Other(path) => match extra.get(path) {
            None => Err(Refusal::unknown("UNKNOWN", path)),
            Some(file) => {
                let source = match file {
                    ExtraFile::Bytes(bytes) => Source::Bytes(bytes.clone()),
                    ExtraFile::Disk(file) => {
                        let (file, size) = open(file.clone(), "UNKNOWN", &path).await?;
                        Source::File(file, size)
                    }
                };
                Ok(Found {
                    source,
                    content_type: BINARY.into(),
                    digest: None,
                })
            }
        },
    }
}

/// A manifest of a carried image, by tag or digest.
async fn manifest(payload: &Payload, name: &str, reference: &str) -> Result<Found, Refusal> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Typed {
        media_type: String,
    }
    let of_name = |image: &&ReleaseImage| {
        image
            .repository()
            .strip_prefix(PAYLOAD_REGISTRY)
            .and_then(|rest| rest.strip_prefix('/'))
            == Some(name)
    };
    let images: Vec<_> = payload.release().images.values().filter(of_name).collect();
    if images.is_empty() {
        return Err(Refusal::unknown("NAME_UNKNOWN", name));
    }
    let tagged = |image: &&&ReleaseImage| {
        image
            .reference
            .rsplit_once(':')
            .is_some_and(|(_, tag)| tag == reference)
    };
    let unknown = || Refusal::unknown("MANIFEST_UNKNOWN", reference);
    let image = images
        .iter()
        .find(|i| i.digest.as_str() == reference || tagged(i))
        .ok_or_else(unknown)?;
    let (file, size) = open(payload.blob_path(&image.digest), "MANIFEST_UNKNOWN", &reference).await?;
    let mut bytes = Vec::new();
    let read = file.take(DOCUMENT_LIMIT).read_to_end(&mut bytes).await;
    if !read.is_ok_and(|n| n as u64 == size) {
        return Err(unknown());
    }
    let Typed { media_type } = serde_json::from_slice(&bytes).map_err(|_| unknown())?;
    let source = Source::Bytes(bytes.into());
    Ok(Found {
        source,
        content_type: media_type,
        digest: Some(image.digest.clone()),
    })
}

async fn open(path: Utf8PathBuf, code: &'static str, what: &impl ToString) -> Result<(File, u64), Refusal> {
    let opened = async {
        let file = File::open(&path).await?;
        let metadata = file.metadata().await?;
        if metadata.is_file() {
            Ok((file, metadata.len()))
        } else {
            Err(io::ErrorKind::NotFound.into())
        }
    };
    opened.await.map_err(|error: io::Error| {
        if error.kind() == io::ErrorKind::NotFound {
            return Refusal::unknown(code, what.to_string());
        }
        tracing::warn!(%path, %error, "cannot read a file that was asked for");
        Refusal(
            StatusCode::INTERNAL_SERVER_ERROR,
            "UNKNOWN",
            format!("`{}` cannot be read", what.to_string()),
        )
    })
}

impl Found {
    async fn into_response(self, method: &Method, headers: &HeaderMap) -> Response<Body> {
        let Self {
            source,
            content_type,
            digest,
        } = self;
        let length = match &source {
            Source::Bytes(bytes) => bytes.len() as u64,
            Source::File(_, length) => *length,
        };
        let etag = digest.as_ref().map(|d| format!("\"{d}\""));
        let text = |name| headers.get(name).and_then(|v: &HeaderValue| v.to_str().ok());
        // `Range` is defined for GET only; `If-Range` asks for the whole where the body is no longer the same.
        let requested = match text(header::RANGE) {
            Some(range)
                if method == Method::GET && text(header::IF_RANGE).is_none_or(|t| Some(t) == etag.as_deref()) =>
            {
                range::parse(range, length)
            }
            _ => Requested::Whole,
        };
        let (status, first, size) = match requested {
            Requested::Whole => (StatusCode::OK, 0, length),
            Requested::Part { first, last } => (StatusCode::PARTIAL_CONTENT, first, last - first + 1),
            Requested::Unsatisfiable => (StatusCode::RANGE_NOT_SATISFIABLE, 0, 0),
        };
        let body = if method == Method::HEAD || size == 0 {
            Ok(Body::empty())
        } else {
            source.body(first, size).await
        };
        let mut response = match body {
            Ok(body) => Response::new(body),
            Err(error) => {
                tracing::warn!(%error, "cannot read a file that was asked for");
                let refusal = Refusal(StatusCode::INTERNAL_SERVER_ERROR, "UNKNOWN", "it cannot be read".into());
                return refusal.into_response(method);
            }
        };
        *response.status_mut() = status;
        let set = response.headers_mut();
        let mut insert = |name: &'static str, value: String| {
            if let Ok(value) = HeaderValue::try_from(value) {
                set.insert(name, value);
            }
        };
        insert("accept-ranges", "bytes".into());
        insert("content-length", size.to_string());
        insert("content-type", content_type);
        match requested {
            Requested::Whole => {}
            Requested::Part { first, last } => insert("content-range", format!("bytes {first}-{last}/{length}")),
            Requested::Unsatisfiable => insert("content-range", format!("bytes */{length}")),
        }
        if let (Some(digest), Some(etag)) = (digest, etag) {
            insert(CONTENT_DIGEST, digest.to_string());
            insert("etag", etag);
        }
        response
    }
}

impl Source {
    async fn body(self, first: u64, size: u64) -> io::Result<Body> {
        match self {
            Self::Bytes(bytes) => {
                let at = |n: u64| usize::try_from(n).map_err(io::Error::other);
                Ok(Body::from(bytes.slice(at(first)?..at(first + size)?)))
            }
            Self::File(mut file, _) => {
                file.seek(io::SeekFrom::Start(first)).await?;
                Ok(Body::from_stream(ReaderStream::with_capacity(file.take(size), BUFFER)))
            }
        }
    }
}

impl Refusal {
    /// As the distribution specification has it (section "Error Codes").
    fn into_response(self, method: &Method) -> Response<Body> {
        let Self(status, code, message) = self;
        let text = serde_json::json!({ "errors": [{ "code": code, "message": message }] }).to_string();
        let length = text.len();
        let mut response = Response::new(if method == Method::HEAD {
            Body::empty()
        } else {
            text.into()
        });
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(JSON));
        headers.insert(header::CONTENT_LENGTH, length.into());
        if status == StatusCode::METHOD_NOT_ALLOWED {
            headers.insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths() {
        let hex = "a".repeat(64);
        let digest = Digest::from_hex(&hex).unwrap();
        let blob = format!("/blobs/sha256/{hex}");
        assert_eq!(target("/release.json"), Target::Release);
        assert_eq!(target("/release.json.sig"), Target::Signature);
        assert_eq!(target(&blob), Target::Blob(digest.clone()));
        assert_eq!(target("/v2"), Target::Api);
        assert_eq!(target("/v2/"), Target::Api);
        assert_eq!(
            target("/v2/etcd/manifests/3.4.23"),
            Target::Manifest {
                name: "etcd",
                reference: "3.4.23"
            }
        );
        assert_eq!(
            target("/v2/a/b/manifests/x"),
            Target::Manifest {
                name: "a/b",
                reference: "x"
            }
        );
        assert_eq!(target(&format!("/v2/etcd/blobs/{digest}")), Target::ApiBlob(Ok(digest)));
        assert_eq!(target("/v2/etcd/blobs/sha512:00"), Target::ApiBlob(Err("sha512:00")));
        for other in [
            "/",
            "",
            "*",
            "/v20/",
            "/v2/etcd",
            "/v2/manifests/x",
            "/v2//manifests",
            "/blobs/sha256/../../release.json",
            "/blobs/sha256/%2e%2e/x",
            "/blobs/sha256/",
            "/../etc/passwd",
            "//release.json",
            "/kprov-node/x",
        ] {
            assert_eq!(target(other), Target::Other(other));
        }
    }
}
