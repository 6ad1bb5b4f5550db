//! What the payload's server and the store's have in common: paths, bodies with ranges, and refusals, as the pull part of the
//! OCI distribution specification 1.1 has them.

use std::io;
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderMap, HeaderValue, Method, Response, StatusCode, header};
use axum::serve::ListenerExt as _;
use bytes::Bytes;
use camino::Utf8PathBuf;
use kprov_types::Digest;
use serde::Deserialize;
use serde::de::IgnoredAny;
use tokio::fs::File;
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _};
use tokio::net::TcpListener;
use tokio_util::io::ReaderStream;
use tokio_util::sync::CancellationToken;

use crate::payload::{DOCUMENT_LIMIT, RELEASE, SIGNATURE};
use crate::range::{self, Requested};

/// How long transfers may go on after the server was told to stop.
const GRACE: Duration = Duration::from_secs(5);
/// How much of a file is read at once.
const BUFFER: usize = 256 * 1024;

pub(crate) const JSON: &str = "application/json";
pub(crate) const BINARY: &str = "application/octet-stream";
/// What the distribution specification names a body's digest by.
const CONTENT_DIGEST: &str = "docker-content-digest";

/// Serves until `stop` is cancelled; transfers under way then have a few seconds to end.
pub(crate) async fn run(listener: TcpListener, app: axum::Router, stop: CancellationToken) -> io::Result<()> {
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
pub(crate) enum Target<'a> {
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

pub(crate) fn target(path: &str) -> Target<'_> {
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
pub(crate) enum Source {
    Bytes(Bytes),
    File(File, u64),
}

/// A body and how it is described.
pub(crate) struct Found {
    pub(crate) source: Source,
    pub(crate) content_type: String,
    /// What the bytes are, where they are named by it: never changes, and so is the entity tag.
    pub(crate) digest: Option<Digest>,
}

/// A document in memory.
pub(crate) fn document(bytes: Bytes) -> Found {
    Found {
        source: Source::Bytes(bytes),
        content_type: JSON.into(),
        digest: None,
    }
}

/// Answers a request, whose only allowed methods are `allow`, and notes that in the log.
pub(crate) async fn respond(
    found: Result<Found, Refusal>,
    method: &Method,
    path: &str,
    headers: &HeaderMap,
    allow: &'static str,
) -> Response<Body> {
    let mut response = match found {
        Ok(found) => found.into_response(method, headers).await,
        Err(refusal) => refusal.into_response(method),
    };
    let set = response.headers_mut();
    set.insert(
        "docker-distribution-api-version",
        HeaderValue::from_static("registry/2.0"),
    );
    let status = response.status();
    if status == StatusCode::METHOD_NOT_ALLOWED {
        response
            .headers_mut()
            .insert(header::ALLOW, HeaderValue::from_static(allow));
    }
    tracing::debug!(%method, path, status = status.as_u16(), "request");
    response
}

/// Reads an image's manifest or index, which must be in OCI's or Docker's form to be one.
pub(crate) async fn manifest(path: Utf8PathBuf, digest: Digest) -> Result<Found, Refusal> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Typed {
        media_type: Option<String>,
        manifests: Option<IgnoredAny>,
    }
    let unknown = || Refusal::unknown("MANIFEST_UNKNOWN", &digest);
    let (file, size) = open(path, "MANIFEST_UNKNOWN", &digest).await?;
    let mut bytes = Vec::new();
    let read = file.take(DOCUMENT_LIMIT).read_to_end(&mut bytes).await;
    if !read.is_ok_and(|n| n as u64 == size) {
        return Err(unknown());
    }
    let Typed { media_type, manifests } = serde_json::from_slice(&bytes).map_err(|_| unknown())?;
    // OCI documents may leave their own type out.
    let content_type = media_type.unwrap_or_else(|| {
        match manifests {
            Some(_) => "application/vnd.oci.image.index.v1+json",
            None => "application/vnd.oci.image.manifest.v1+json",
        }
        .into()
    });
    Ok(Found {
        source: Source::Bytes(bytes.into()),
        content_type,
        digest: Some(digest),
    })
}

/// Why there is no body: a status, and a code of the distribution specification.
pub(crate) struct Refusal(pub(crate) StatusCode, pub(crate) &'static str, pub(crate) String);

impl Refusal {
    pub(crate) fn unknown(code: &'static str, what: impl std::fmt::Display) -> Self {
        Self(StatusCode::NOT_FOUND, code, format!("`{what}` is not here"))
    }

    pub(crate) fn method(method: &Method) -> Self {
        Self(
            StatusCode::METHOD_NOT_ALLOWED,
            "UNSUPPORTED",
            format!("`{method}` is not supported"),
        )
    }

    pub(crate) fn no_digest(text: &str) -> Self {
        Self(
            StatusCode::BAD_REQUEST,
            "DIGEST_INVALID",
            format!("`{text}` is not a SHA-256 digest"),
        )
    }
}

/// Opens a file to send; `code` and `what` are for the refusal where it is not there.
pub(crate) async fn open(path: Utf8PathBuf, code: &'static str, what: &impl ToString) -> Result<(File, u64), Refusal> {
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
