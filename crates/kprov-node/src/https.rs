//! One request over one TLS connection: for etcd's JSON gateway and for asking control-plane processes how they are.
//! No connection pool and no proxy settings, so that an answer is always from the process that was asked.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// Larger answers are refused.
const LIMIT: usize = 1 << 20;

/// Why a request got no answer.
#[derive(Debug, thiserror::Error)]
pub enum HttpsError {
    /// No connection.
    #[error("cannot connect to `{address}`")]
    Connect {
        /// The address.
        address: SocketAddr,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The exchange failed.
    #[error("request to `{address}` failed")]
    Exchange {
        /// The address.
        address: SocketAddr,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// No answer in time.
    #[error("no answer from `{address}` within {limit:?}")]
    TimedOut {
        /// The address.
        address: SocketAddr,
        /// The time allowed.
        limit: Duration,
    },
}

/// Certificates or keys that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// Not PEM, or none in it.
    #[error("{what} is not usable PEM")]
    Pem {
        /// Which one.
        what: &'static str,
        /// Why.
        #[source]
        source: rustls::pki_types::pem::Error,
    },
    /// rustls refused them.
    #[error("unusable certificates")]
    Rustls(#[from] rustls::Error),
}

/// The certificates in a PEM text.
pub(crate) fn certificates(what: &'static str, pem: &str) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let wrap = |source| TlsError::Pem { what, source };
    let found = CertificateDer::pem_slice_iter(pem.as_bytes())
        .collect::<Result<Vec<_>, _>>()
        .map_err(wrap)?;
    if found.is_empty() {
        Err(wrap(rustls::pki_types::pem::Error::NoItemsFound))
    } else {
        Ok(found)
    }
}

/// The first private key in a PEM text.
pub(crate) fn private_key(what: &'static str, pem: &str) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_slice(pem.as_bytes()).map_err(|source| TlsError::Pem { what, source })
}

/// Uses ring for TLS everywhere in this process. Calling it again does no harm.
pub fn use_ring() {
    // An error says that a provider was chosen already, which here is ring too.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// A client that trusts `ca` (PEM) and shows a certificate with its key (PEM) where asked.
pub fn client(ca: &str, identity: Option<(&str, &str)>) -> Result<Arc<ClientConfig>, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates("the certificate authority", ca)? {
        roots.add(certificate)?;
    }
    let builder = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots);
    Ok(Arc::new(match identity {
        None => builder.with_no_client_auth(),
        Some((certificate, key)) => builder.with_client_auth_cert(
            certificates("the client certificate", certificate)?,
            private_key("the client key", key)?,
        )?,
    }))
}

/// A client that trusts any certificate: for health endpoints on loopback, whose certificates are self-signed anew at each
/// start. Never send it anything secret.
pub fn health_client() -> Result<Arc<ClientConfig>, TlsError> {
    let provider = provider();
    let verifier = Arc::new(AnyCertificate(provider.clone()));
    Ok(Arc::new(
        ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_no_client_auth(),
    ))
}

#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// Sends one request to `address`, whose certificate must be for `name`, and reads the whole answer.
pub async fn send(
    tls: &Arc<ClientConfig>,
    address: SocketAddr,
    name: ServerName<'static>,
    request: Request<Full<Bytes>>,
    limit: Duration,
) -> Result<Response<Bytes>, HttpsError> {
    let exchange = async {
        let failed = |source| HttpsError::Exchange { address, source };
        let stream = TcpStream::connect(address)
            .await
            .map_err(|source| HttpsError::Connect { address, source })?;
        let stream = TlsConnector::from(tls.clone())
            .connect(name, stream)
            .await
            .map_err(|e| failed(e.into()))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|e| failed(e.into()))?;
        let answer = async move {
            let (head, body) = sender.send_request(request).await?.into_parts();
            let body = Limited::new(body, LIMIT).collect().await?.to_bytes();
            Ok(Response::from_parts(head, body))
        };
        // The connection makes progress only while polled, and ends with the exchange.
        tokio::pin!(connection);
        let answer = std::pin::pin!(answer);
        tokio::select! {
            answer = answer => answer.map_err(failed),
            ended = &mut connection => Err(failed(match ended {
                Err(e) => e.into(),
                Ok(()) => "the connection was closed".into(),
            })),
        }
    };
    match tokio::time::timeout(limit, exchange).await {
        Ok(answer) => answer,
        Err(_) => Err(HttpsError::TimedOut { address, limit }),
    }
}

/// The status of a GET of `path`.
pub async fn get_status(
    tls: &Arc<ClientConfig>,
    address: SocketAddr,
    name: ServerName<'static>,
    path: &'static str,
    limit: Duration,
) -> Result<StatusCode, HttpsError> {
    let mut request = Request::new(Full::default());
    *request.uri_mut() = http::Uri::from_static(path);
    request
        .headers_mut()
        .insert(http::header::HOST, http::HeaderValue::from_static("localhost"));
    Ok(send(tls, address, name, request, limit).await?.status())
}
