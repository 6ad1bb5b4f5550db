//! What a health check takes as proof that it talks to an API server.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};

/// How health checks verify a backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trust {
    /// By these CA certificates, PEM.
    Ca(String),
    /// Not at all, as cloud load balancers' HTTPS health checks don't. Clients still verify end to end.
    Anything,
}

/// Why CA certificates were refused.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// The text is no PEM.
    #[error("the CA certificates are not valid PEM")]
    Pem(#[source] rustls::pki_types::pem::Error),
    /// There is no certificate in the text.
    #[error("there is no certificate in the CA file")]
    Empty,
    /// A certificate was refused, or TLS could not be set up.
    #[error("the CA certificates cannot be used")]
    Certificate(#[source] rustls::Error),
}

impl Trust {
    /// The TLS settings of health checks.
    pub(crate) fn client_config(&self) -> Result<Arc<ClientConfig>, TrustError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(TrustError::Certificate)?;
        let builder = match self {
            Self::Ca(pem) => {
                let mut roots = RootCertStore::empty();
                for certificate in CertificateDer::pem_slice_iter(pem.as_bytes()) {
                    roots
                        .add(certificate.map_err(TrustError::Pem)?)
                        .map_err(TrustError::Certificate)?;
                }
                if roots.is_empty() {
                    return Err(TrustError::Empty);
                }
                builder.with_root_certificates(roots)
            }
            Self::Anything => builder
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(AnyCertificate::new(&provider))),
        };
        let mut config = builder.with_no_client_auth();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }
}

/// Accepts every certificate; the handshake's signature is still checked.
#[derive(Debug)]
struct AnyCertificate(WebPkiSupportedAlgorithms);

impl AnyCertificate {
    fn new(provider: &CryptoProvider) -> Self {
        Self(provider.signature_verification_algorithms)
    }
}

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.0)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.0)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_ca_files_are_refused() {
        assert!(matches!(
            Trust::Ca(String::new()).client_config(),
            Err(TrustError::Empty)
        ));
        let broken = "-----BEGIN CERTIFICATE-----\n%%%\n-----END CERTIFICATE-----\n";
        assert!(matches!(
            Trust::Ca(broken.into()).client_config(),
            Err(TrustError::Pem(_))
        ));
        let nonsense = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        assert!(matches!(
            Trust::Ca(nonsense.into()).client_config(),
            Err(TrustError::Certificate(_))
        ));
    }
}
