//! How a controller is reached: where its credentials are, and how its certificate is checked.

use std::fmt;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::sync::Arc;
use std::time::Duration;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};

use super::error::BmcError;
use crate::inventory::{Bmc as Entry, Credentials};

/// User name and password. Never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Login {
    /// The user's name.
    pub user: String,
    /// The password.
    pub password: String,
}

impl fmt::Debug for Login {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Login").finish_non_exhaustive()
    }
}

impl Login {
    fn parse(text: &str) -> Option<Self> {
        let (user, password) = text.trim_end_matches(['\r', '\n']).split_once(':')?;
        let whole = !user.is_empty() && !password.is_empty() && !password.contains('\n');
        whole.then(|| Self {
            user: user.to_owned(),
            password: password.to_owned(),
        })
    }
}

/// Reads what an inventory refers to. `environment` looks a variable up.
pub(super) fn login(entry: &Entry, environment: impl Fn(&str) -> Option<String>) -> Result<Login, BmcError> {
    let bmc = entry.address.clone();
    let (place, text) = match &entry.credentials {
        Credentials::File(path) => {
            let place = format!("the file `{path}`");
            let read = std::fs::metadata(path).and_then(|meta| Ok((meta, std::fs::read_to_string(path)?)));
            let (meta, text) = read.map_err(|source| BmcError::Credentials {
                bmc: bmc.clone(),
                place: place.clone(),
                source,
            })?;
            if meta.permissions().mode() & 0o077 != 0 {
                return Err(BmcError::Readable { path: path.clone() });
            }
            (place, text)
        }
        Credentials::Env(name) => {
            let place = format!("the environment variable `{name}`");
            let text = environment(name).ok_or_else(|| BmcError::Credentials {
                bmc: bmc.clone(),
                place: place.clone(),
                source: io::ErrorKind::NotFound.into(),
            })?;
            (place, text)
        }
    };
    Login::parse(&text).ok_or(BmcError::NotCredentials { bmc, place })
}

/// The client for a controller.
pub(super) fn client(entry: &Entry, patience: Duration) -> Result<reqwest::Client, BmcError> {
    let failed = |why: String| BmcError::Tls {
        bmc: entry.address.clone(),
        why,
    };
    let trusted = match &entry.ca_file {
        Some(path) => {
            let text = std::fs::read(path).map_err(|e| failed(format!("`{path}` cannot be read: {e}")))?;
            let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
            let all = all.map_err(|e| failed(format!("`{path}` is not PEM: {e}")))?;
            if all.is_empty() {
                return Err(failed(format!("`{path}` holds no certificate")));
            }
            Some(all)
        }
        None => None,
    };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    // The system's certificates are checked by reqwest's own means, with the process's provider; one that is there already will do.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let builder = reqwest::Client::builder()
        .no_proxy()
        .redirect(reqwest::redirect::Policy::none())
        .connect_timeout(patience)
        .timeout(patience);
    let builder = if entry.insecure || trusted.is_some() {
        let trust = Trust::new(trusted.unwrap_or_default(), entry.insecure, provider.clone()).map_err(&failed)?;
        let tls = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|e| failed(e.to_string()))?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(trust))
            .with_no_client_auth();
        builder.tls_backend_preconfigured(tls)
    } else {
        builder
    };
    builder.build().map_err(|e| failed(e.to_string()))
}

/// Accepts what the named certificates sign, and each of them as it stands: most controllers show a self-signed certificate for
/// another name than the one they are reached by.
#[derive(Debug)]
struct Trust {
    exact: Vec<CertificateDer<'static>>,
    signed: Option<Arc<WebPkiServerVerifier>>,
    anything: bool,
    provider: Arc<CryptoProvider>,
}

impl Trust {
    fn new(exact: Vec<CertificateDer<'static>>, anything: bool, provider: Arc<CryptoProvider>) -> Result<Self, String> {
        let mut roots = RootCertStore::empty();
        let (usable, _) = roots.add_parsable_certificates(exact.iter().cloned());
        let signed = (usable > 0)
            .then(|| WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build())
            .transpose()
            .map_err(|e| e.to_string())?;
        Ok(Self {
            exact,
            signed,
            anything,
            provider,
        })
    }
}

impl ServerCertVerifier for Trust {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if self.anything || self.exact.iter().any(|known| known == end_entity) {
            return Ok(ServerCertVerified::assertion());
        }
        match &self.signed {
            Some(signed) => signed.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now),
            None => Err(rustls::CertificateError::UnknownIssuer.into()),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(credentials: Credentials) -> Entry {
        Entry {
            address: "https://10.0.9.11".into(),
            credentials,
            system: None,
            ca_file: None,
            insecure: false,
            mac: None,
        }
    }

    #[test]
    fn credentials_come_from_where_they_are_said_to_be_and_are_never_printed() {
        let variable = |name: &str| (name == "BMC").then(|| "admin:se:cret".to_owned());
        let found = login(&entry(Credentials::Env("BMC".into())), variable).unwrap();
        assert_eq!((found.user.as_str(), found.password.as_str()), ("admin", "se:cret"));
        assert!(!format!("{found:?}").contains("cret"));
        let missing = login(&entry(Credentials::Env("OTHER".into())), variable).unwrap_err();
        assert!(missing.to_string().contains("`OTHER`"), "{missing}");

        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().to_str().unwrap().to_owned();
        std::fs::write(&path, "admin:secret\n").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        let entry = entry(Credentials::File(path.clone()));
        let readable = login(&entry, |_| None).unwrap_err();
        assert!(readable.hint().contains("chmod 600"), "{readable}");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(login(&entry, |_| None).unwrap().password, "secret");
        for text in ["", "admin", ":x", "admin:", "admin:a\nb"] {
            std::fs::write(&path, text).unwrap();
            let error = login(&entry, |_| None).unwrap_err();
            assert!(matches!(error, BmcError::NotCredentials { .. }), "{text:?}: {error}");
        }
    }
}
