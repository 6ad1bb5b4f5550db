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

use axum::body::Body;
use axum::extract::State;
use axum::http::{Method, Request, Response};
use bytes::Bytes;
use camino::Utf8PathBuf;
use kprov_types::release::ReleaseImage;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::http::{self, BINARY, Found, Refusal, Source, Target, document, open, target};
use crate::payload::{PAYLOAD_REGISTRY, Payload, PayloadError, SIGNATURE};

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
    http::run(listener, app, stop).await
}

async fn answer(State(content): State<Arc<Content>>, request: Request<Body>) -> Response<Body> {
    let (method, path) = (request.method(), request.uri().path());
    let found = if matches!(*method, Method::GET | Method::HEAD) {
        find(&content, path).await
    } else {
        Err(Refusal::method(method))
    };
    http::respond(found, method, path, request.headers(), "GET, HEAD").await
}

async fn find(content: &Content, path: &str) -> Result<Found, Refusal> {
    let Content {
        payload,
        signature,
        extra,
    } = content;
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
        Target::ApiBlob(Err(text)) => Err(Refusal::no_digest(text)),
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
    http::manifest(payload.blob_path(&image.digest), image.digest.clone()).await
}
