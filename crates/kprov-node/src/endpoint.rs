//! The setup endpoint: where a control-plane machine takes its bundle and tells how far it is, until it is set up.
//!
//! Both sides are pinned beforehand: the machine shows the certificate from its first-boot configuration, and lets in the
//! one client whose certificate has the fingerprint given there. Neither needs an authority or the right time.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::{get, put};
use camino::Utf8PathBuf;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use kprov_types::Digest;
use kprov_types::node::{Bundle, SetupIdentity, SetupStatus};
use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{DigitallySignedStruct, DistinguishedName, ServerConfig, SignatureScheme};
use sha2::{Digest as _, Sha256};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;

use crate::config::Machine;
use crate::files;
use crate::https::{self, TlsError};
use crate::status::Status;

/// How long a client may take for its handshake, and for sending a request.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why there is no setup endpoint.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// The identity cannot be used.
    #[error("the setup identity cannot be used")]
    Tls(#[from] TlsError),
    /// The fingerprint is none.
    #[error("`{0}` is not a SHA-256 fingerprint")]
    Fingerprint(String),
    /// The address is taken.
    #[error("cannot listen on `{address}`")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// The endpoint's part of the machine's state.
#[derive(Clone)]
pub struct Setup {
    /// The machine, which a bundle must fit.
    pub machine: Arc<Machine>,
    /// What is told.
    pub status: Status,
    /// The bundle, once there is one.
    pub bundle: watch::Sender<Option<Arc<Bundle>>>,
    /// Where it is kept.
    pub path: Utf8PathBuf,
}

impl Setup {
    /// Takes a bundle: keeps it on disk before anything else, and never takes another one after it.
    fn accept(&self, json: &[u8]) -> (StatusCode, String) {
        let bundle: Bundle = match serde_json::from_slice(json) {
            Ok(bundle) => bundle,
            Err(error) => return (StatusCode::UNPROCESSABLE_ENTITY, format!("not a bundle: {error}")),
        };
        if let Err(why) = self.machine.check_bundle(&bundle) {
            return (StatusCode::UNPROCESSABLE_ENTITY, why);
        }
        let mut answer = (StatusCode::OK, String::new());
        self.bundle.send_if_modified(|accepted| {
            if let Some(accepted) = accepted {
                if **accepted != bundle {
                    answer = (
                        StatusCode::CONFLICT,
                        "this machine has taken another bundle already".into(),
                    );
                }
                return false;
            }
            match store(&self.path, &bundle) {
                Ok(digest) => {
                    tracing::info!(%digest, "bundle accepted");
                    self.status.bundle(digest);
                    *accepted = Some(Arc::new(bundle));
                    true
                }
                Err(error) => {
                    answer = (StatusCode::INTERNAL_SERVER_ERROR, crate::chain(error.as_ref()));
                    false
                }
            }
        });
        answer
    }
}

fn store(path: &camino::Utf8Path, bundle: &Bundle) -> Result<Digest, Box<dyn std::error::Error + Send + Sync>> {
    let json = serde_json::to_vec(bundle)?;
    files::write(path, &json, 0o600)?;
    Ok(digest(&json))
}

/// The digest of a bundle as it is told in the status: over its JSON as serde writes it.
pub fn bundle_digest(bundle: &Bundle) -> Result<Digest, serde_json::Error> {
    serde_json::to_vec(bundle).map(|json| digest(&json))
}

fn digest(bytes: &[u8]) -> Digest {
    Digest::from_bytes(Sha256::digest(bytes).into())
}

/// Listens; [`Endpoint::serve`] does the rest.
pub struct Endpoint {
    listener: TcpListener,
    tls: TlsAcceptor,
}

impl Endpoint {
    /// Binds `address`.
    pub async fn bind(address: SocketAddr, identity: &SetupIdentity) -> Result<Self, EndpointError> {
        let tls = TlsAcceptor::from(server_config(identity)?);
        let listener = TcpListener::bind(address)
            .await
            .map_err(|source| EndpointError::Listen { address, source })?;
        Ok(Self { listener, tls })
    }

    /// Serves until dropped.
    pub async fn serve(self, setup: Setup) {
        let router = axum::Router::new()
            .route(
                "/v1/status",
                get(async |State(setup): State<Setup>| Json::<SetupStatus>(setup.status.get())),
            )
            .route(
                "/v1/bundle",
                put(async |State(setup): State<Setup>, body: Bytes| setup.accept(&body)),
            )
            .with_state(setup);
        let mut tasks = tokio::task::JoinSet::new();
        loop {
            tokio::select! {
                accepted = self.listener.accept() => match accepted {
                    Ok((stream, client)) => {
                        let (tls, router) = (self.tls.clone(), router.clone());
                        tasks.spawn(async move {
                            let stream = match tokio::time::timeout(PATIENCE, tls.accept(stream)).await {
                                Ok(Ok(stream)) => stream,
                                Ok(Err(error)) => return tracing::warn!(%client, %error, "setup endpoint: refused"),
                                Err(_) => return,
                            };
                            let served = hyper::server::conn::http1::Builder::new()
                                .timer(TokioTimer::new())
                                .header_read_timeout(PATIENCE)
                                .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
                            if let Err(error) = served.await {
                                tracing::debug!(%client, %error, "setup endpoint: connection ended");
                            }
                        });
                    }
                    Err(error) => {
                        // Most likely out of files: let others close theirs.
                        tracing::warn!(%error, "setup endpoint: cannot accept");
                        tokio::time::sleep(Duration::from_millis(200)).await;
                    }
                },
                Some(_) = tasks.join_next() => {}
            }
        }
    }
}

fn server_config(identity: &SetupIdentity) -> Result<Arc<ServerConfig>, EndpointError> {
    let SetupIdentity {
        certificate,
        key,
        client_fingerprint,
    } = identity;
    let mut fingerprint = [0; 32];
    hex::decode_to_slice(client_fingerprint, &mut fingerprint)
        .map_err(|_| EndpointError::Fingerprint(client_fingerprint.clone()))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = Arc::new(PinnedClient {
        fingerprint,
        provider: provider.clone(),
    });
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(TlsError::from)?
        .with_client_cert_verifier(verifier)
        .with_single_cert(
            https::certificates("the setup certificate", certificate)?,
            https::private_key("the setup key", key)?,
        )
        .map_err(TlsError::from)?;
    Ok(Arc::new(config))
}

/// Lets in the one client whose certificate has the fingerprint, and only with proof that it has the key.
#[derive(Debug)]
struct PinnedClient {
    fingerprint: [u8; 32],
    provider: Arc<CryptoProvider>,
}

impl ClientCertVerifier for PinnedClient {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        if <[u8; 32]>::from(Sha256::digest(certificate)) == self.fingerprint {
            Ok(ClientCertVerified::assertion())
        } else {
            Err(rustls::Error::InvalidCertificate(
                rustls::CertificateError::ApplicationVerificationFailure,
            ))
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(
            message,
            certificate,
            dss,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(
            message,
            certificate,
            dss,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;
    use bytes::Bytes;
    use http::{Method, Request, Response};
    use http_body_util::Full;
    use kprov_bootstrap::pki;
    use kprov_types::MachineName;
    use rustls::pki_types::ServerName;
    use std::os::unix::fs::PermissionsExt;

    struct Running {
        address: SocketAddr,
        certificate: String,
        client: pki::SetupClient,
        setup: Setup,
        _dir: tempfile::TempDir,
        task: tokio::task::JoinHandle<()>,
    }

    impl Drop for Running {
        fn drop(&mut self) {
            self.task.abort();
        }
    }

    async fn start() -> Running {
        let now = jiff::Timestamp::now();
        let client = pki::setup_client(now).unwrap();
        let identity = pki::setup_identity(&MachineName::new("demo-cp-0").unwrap(), &client.fingerprint, now).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let setup = Setup {
            machine: Arc::new(testing::machine()),
            status: Status::new(),
            bundle: watch::Sender::new(None),
            path: Utf8PathBuf::from_path_buf(dir.path().join("bundle.json")).unwrap(),
        };
        let endpoint = Endpoint::bind("127.0.0.1:0".parse().unwrap(), &identity).await.unwrap();
        let address = endpoint.listener.local_addr().unwrap();
        let task = tokio::spawn(endpoint.serve(setup.clone()));
        Running {
            address,
            certificate: identity.certificate,
            client,
            setup,
            _dir: dir,
            task,
        }
    }

    impl Running {
        async fn send(
            &self,
            identity: Option<(&str, &str)>,
            method: Method,
            path: &str,
            body: Vec<u8>,
        ) -> Result<Response<Bytes>, https::HttpsError> {
            let tls = https::client(&self.certificate, identity).unwrap();
            let request = Request::builder().method(method).uri(path).header("host", "x");
            let request = request.body(Full::new(Bytes::from(body))).unwrap();
            let name = ServerName::try_from("demo-cp-0").unwrap();
            https::send(&tls, self.address, name, request, Duration::from_secs(5)).await
        }

        async fn put(&self, body: Vec<u8>) -> (StatusCode, String) {
            let pair = &self.client.pair;
            let identity = Some((pair.certificate.as_str(), pair.key.as_str()));
            let answer = self.send(identity, Method::PUT, "/v1/bundle", body).await.unwrap();
            (answer.status(), String::from_utf8(answer.body().to_vec()).unwrap())
        }
    }

    #[tokio::test]
    async fn a_bundle_is_taken_once_and_kept() {
        let running = start().await;
        let bundle = testing::bundle();
        let json = serde_json::to_vec(&bundle).unwrap();
        assert_eq!(running.put(b"{}".to_vec()).await.0, StatusCode::UNPROCESSABLE_ENTITY);
        let mut foreign = bundle.clone();
        foreign.settings.cluster = "other".parse().unwrap();
        let (status, why) = running.put(serde_json::to_vec(&foreign).unwrap()).await;
        assert_eq!(
            (status, why.contains("`other`")),
            (StatusCode::UNPROCESSABLE_ENTITY, true),
            "{why}"
        );
        assert!(running.setup.bundle.borrow().is_none());

        assert_eq!(running.put(json.clone()).await.0, StatusCode::OK);
        assert_eq!(running.put(json.clone()).await.0, StatusCode::OK, "the same again");
        let mut other = bundle.clone();
        other.secrets.encryption_key = "x".into();
        assert_eq!(
            running.put(serde_json::to_vec(&other).unwrap()).await.0,
            StatusCode::CONFLICT
        );
        assert_eq!(running.setup.bundle.borrow().as_deref(), Some(&bundle));
        assert_eq!(std::fs::read(&running.setup.path).unwrap(), json);
        let mode = std::fs::metadata(&running.setup.path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[tokio::test]
    async fn the_status_is_told() {
        let running = start().await;
        running.setup.status.add_findings(vec!["something is missing".into()]);
        running.put(serde_json::to_vec(&testing::bundle()).unwrap()).await;
        let pair = &running.client.pair;
        let identity = Some((pair.certificate.as_str(), pair.key.as_str()));
        let answer = running
            .send(identity, Method::GET, "/v1/status", Vec::new())
            .await
            .unwrap();
        let status: SetupStatus = serde_json::from_slice(answer.body()).unwrap();
        assert_eq!(status.bundle, Some(bundle_digest(&testing::bundle()).unwrap()));
        assert_eq!(status.host_findings, ["something is missing"]);
    }

    #[tokio::test]
    async fn only_the_pinned_client_gets_in() {
        let running = start().await;
        let other = pki::setup_client(jiff::Timestamp::now()).unwrap().pair;
        let stranger = Some((other.certificate.as_str(), other.key.as_str()));
        for identity in [None, stranger] {
            assert!(
                running
                    .send(identity, Method::GET, "/v1/status", Vec::new())
                    .await
                    .is_err()
            );
        }
    }

    #[tokio::test]
    async fn the_pinned_certificate_without_its_key_is_refused() {
        // Certificates are public: the handshake's signature is what proves who it is.
        let pair = pki::setup_client(jiff::Timestamp::now()).unwrap().pair;
        let other = pki::setup_client(jiff::Timestamp::now()).unwrap().pair;
        let der = https::certificates("it", &pair.certificate).unwrap().remove(0);
        let key = https::private_key("another's", &other.key).unwrap();
        let key = rustls::crypto::ring::sign::any_supported_type(&key).unwrap();
        let resolver = rustls::sign::SingleCertAndKey::from(rustls::sign::CertifiedKey::new(vec![der], key));
        let running = start().await;
        let fingerprint = pki::fingerprint(&pair.certificate).unwrap();
        let identity = pki::setup_identity(
            &MachineName::new("demo-cp-0").unwrap(),
            &fingerprint,
            jiff::Timestamp::now(),
        )
        .unwrap();
        let endpoint = Endpoint::bind("127.0.0.1:0".parse().unwrap(), &identity).await.unwrap();
        let address = endpoint.listener.local_addr().unwrap();
        let task = tokio::spawn(endpoint.serve(running.setup.clone()));
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut roots = rustls::RootCertStore::empty();
        roots
            .add(https::certificates("it", &identity.certificate).unwrap().remove(0))
            .unwrap();
        let tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_client_cert_resolver(Arc::new(resolver));
        let name = ServerName::try_from("demo-cp-0").unwrap();
        let limit = Duration::from_secs(5);
        assert!(
            https::get_status(&Arc::new(tls), address, name, "/v1/status", limit)
                .await
                .is_err()
        );
        task.abort();
    }
}
