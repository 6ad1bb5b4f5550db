//! Talking to a machine's setup endpoint over mutually pinned TLS: both sides know the other's certificate beforehand.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use kprov_types::node::{Bundle, KeyPairPem, SetupStatus};
use kprov_types::ports;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};

/// One machine's setup endpoint.
#[derive(Debug, Clone)]
pub(crate) struct SetupClient {
    http: reqwest::Client,
    base: String,
}

/// What became of a delivery.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Delivery {
    /// The machine has the bundle.
    Accepted,
    /// The machine has another bundle already; in its words.
    Refused(String),
}

impl SetupClient {
    /// `server_certificate` is the one certificate (PEM) that is accepted, `client` what this side shows.
    pub(crate) fn new(address: IpAddr, server_certificate: &str, client: &KeyPairPem) -> Result<Self> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let pinned = CertificateDer::from_pem_slice(server_certificate.as_bytes())
            .context("the machine's certificate is damaged")?;
        let chain = vec![
            CertificateDer::from_pem_slice(client.certificate.as_bytes())
                .context("the setup certificate is damaged")?,
        ];
        let key = PrivateKeyDer::from_pem_slice(client.key.as_bytes()).context("the setup key is damaged")?;
        let tls = ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Pinned {
                certificate: pinned,
                provider,
            }))
            .with_client_auth_cert(chain, key)?;
        let http = reqwest::Client::builder()
            .tls_backend_preconfigured(tls)
            .no_proxy()
            .connect_timeout(Duration::from_secs(3))
            .timeout(Duration::from_secs(20))
            .build()?;
        let host = match address {
            IpAddr::V4(a) => a.to_string(),
            IpAddr::V6(a) => format!("[{a}]"),
        };
        Ok(Self {
            http,
            base: format!("https://{host}:{}", ports::NODE_SETUP),
        })
    }

    /// Where the machine stands.
    pub(crate) async fn status(&self) -> Result<SetupStatus> {
        Ok(self
            .http
            .get(format!("{}/v1/status", self.base))
            .send()
            .await?
            .error_for_status()?
            .json()
            .await?)
    }

    /// Hands over the bundle; doing it again with the same one changes nothing.
    pub(crate) async fn deliver(&self, bundle: &Bundle) -> Result<Delivery> {
        let reply = self
            .http
            .put(format!("{}/v1/bundle", self.base))
            .json(bundle)
            .send()
            .await?;
        if reply.status() == reqwest::StatusCode::CONFLICT
            || reply.status() == reqwest::StatusCode::UNPROCESSABLE_ENTITY
        {
            return Ok(Delivery::Refused(reply.text().await.unwrap_or_default()));
        }
        reply.error_for_status()?;
        Ok(Delivery::Accepted)
    }
}

/// Accepts exactly one certificate.
#[derive(Debug)]
struct Pinned {
    certificate: CertificateDer<'static>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if *end_entity == self.certificate {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(rustls::Error::InvalidCertificate(
                rustls::CertificateError::UnknownIssuer,
            ))
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
