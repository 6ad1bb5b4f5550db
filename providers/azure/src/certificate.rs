//! An application that proves who it is by a certificate: the statement that it signs.
//!
//! `azure_identity` has this as well, with OpenSSL, which nothing else here needs.

use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use azure_core_1::error::ErrorKind;
use azure_core_1::http::ClientMethodOptions;
use azure_identity::ClientAssertion;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jiff::Timestamp;
use rustls::SignatureScheme;
use rustls::crypto::ring::sign::any_supported_type;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::SigningKey;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::credentials::NoToken;

/// How long a statement is good for, in seconds: it's used at once.
const LIFE: i64 = 600;

/// A certificate with its key, of one application.
#[derive(Debug)]
pub(crate) struct Certificate {
    key: Arc<dyn SigningKey>,
    thumbprint: String,
    client: String,
    /// The token endpoint, which the statement is for.
    audience: String,
}

impl Certificate {
    /// From a PEM file with both.
    pub(crate) fn open(path: &Path, client: &str, audience: String) -> Result<Self, NoToken> {
        let wrong = |what: &str| NoToken(format!("`AZURE_CLIENT_CERTIFICATE_PATH`: `{}` {what}", path.display()));
        let pem = std::fs::read(path).map_err(|e| wrong(&format!("can't be read: {e}")))?;
        let certificate = CertificateDer::from_pem_slice(&pem);
        let certificate = certificate.map_err(|_| wrong("holds no certificate in PEM"))?;
        let key = PrivateKeyDer::from_pem_slice(&pem);
        let key = key.map_err(|_| wrong("holds no private key in PEM that is not encrypted"))?;
        let key = any_supported_type(&key).map_err(|_| wrong("holds a private key that can't be used"))?;
        if key.choose_scheme(&[SignatureScheme::RSA_PSS_SHA256]).is_none() {
            return Err(wrong("holds a key that is not RSA; Azure takes no other"));
        }
        Ok(Self {
            key,
            thumbprint: URL_SAFE_NO_PAD.encode(Sha256::digest(&certificate)),
            client: client.to_owned(),
            audience,
        })
    }

    /// The statement, as a JSON web token
    /// ([certificate credentials](https://learn.microsoft.com/entra/identity-platform/certificate-credentials)).
    fn statement(&self, now: Timestamp) -> azure_core_1::Result<String> {
        let error = |text: &str| azure_core_1::Error::with_message(ErrorKind::Credential, text.to_owned());
        let part = |value: Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let unique = Sha256::digest(format!("{} {}", now.as_nanosecond(), std::process::id()));
        let header = part(json!({"alg": "PS256", "typ": "JWT", "x5t#S256": self.thumbprint}));
        let claims = part(json!({
            "aud": self.audience, "iss": self.client, "sub": self.client, "jti": URL_SAFE_NO_PAD.encode(unique),
            "nbf": now.as_second(), "iat": now.as_second(), "exp": now.as_second() + LIFE,
        }));
        let text = format!("{header}.{claims}");
        let signer = self.key.choose_scheme(&[SignatureScheme::RSA_PSS_SHA256]);
        let signer = signer.ok_or_else(|| error("the certificate's key is not RSA"))?;
        let signature = signer.sign(text.as_bytes());
        let signature = signature.map_err(|_| error("the certificate's key can't sign"))?;
        Ok(format!("{text}.{}", URL_SAFE_NO_PAD.encode(signature)))
    }
}

#[async_trait]
impl ClientAssertion for Certificate {
    async fn secret(&self, _: Option<ClientMethodOptions<'_>>) -> azure_core_1::Result<String> {
        self.statement(Timestamp::now())
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn openssl(dir: &Path, arguments: &str) -> String {
        let mut openssl = Command::new("openssl");
        let output = openssl.current_dir(dir).args(arguments.split(' ')).output().unwrap();
        assert!(output.status.success(), "{arguments}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn opened(dir: &Path, pem: &str) -> Result<Certificate, NoToken> {
        let file = dir.join("both.pem");
        std::fs::write(&file, pem).unwrap();
        Certificate::open(&file, "me", "https://login/t/oauth2/v2.0/token".into())
    }

    #[test]
    fn openssl_takes_what_is_signed() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let make = "req -x509 -newkey rsa:2048 -nodes -subj /CN=me -keyout key.pem -out cert.pem -days 2";
        openssl(dir, make);
        let read = |name: &str| std::fs::read_to_string(dir.join(name)).unwrap();
        let certificate = opened(dir, &format!("{}{}", read("key.pem"), read("cert.pem"))).unwrap();
        let statement = certificate.statement("2026-11-24T08:00:00Z".parse().unwrap()).unwrap();
        let (text, signature) = statement.rsplit_once('.').unwrap();
        std::fs::write(dir.join("text"), text).unwrap();
        std::fs::write(dir.join("signature"), URL_SAFE_NO_PAD.decode(signature).unwrap()).unwrap();
        std::fs::write(dir.join("public.pem"), openssl(dir, "x509 -in cert.pem -noout -pubkey")).unwrap();
        let verify = "dgst -sha256 -sigopt rsa_padding_mode:pss -sigopt rsa_pss_saltlen:32 -verify public.pem -signature signature text";
        assert_eq!(openssl(dir, verify), "Verified OK\n");

        let decoded = |part: &str| -> Value { serde_json::from_slice(&URL_SAFE_NO_PAD.decode(part).unwrap()).unwrap() };
        let (header, claims) = text.split_once('.').unwrap();
        let thumbprint = openssl(dir, "x509 -in cert.pem -noout -fingerprint -sha256");
        let thumbprint = thumbprint.trim().rsplit_once('=').unwrap().1.split(':');
        let thumbprint: Vec<u8> = thumbprint.map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect();
        assert_eq!(decoded(header)["x5t#S256"], URL_SAFE_NO_PAD.encode(thumbprint));
        let claims = decoded(claims);
        assert_eq!((&claims["iss"], &claims["sub"]), (&json!("me"), &json!("me")));
        assert_eq!(claims["aud"], "https://login/t/oauth2/v2.0/token");
        assert_eq!(claims["exp"], 1_795_507_200_i64 + LIFE);
    }

    #[test]
    fn says_what_a_file_lacks() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        openssl(
            dir,
            "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=me -keyout key.pem -out cert.pem",
        );
        let read = |name: &str| std::fs::read_to_string(dir.join(name)).unwrap();
        let both = format!("{}{}", read("key.pem"), read("cert.pem"));
        for (pem, says) in [
            ("nonsense", "holds no certificate in PEM"),
            (&read("cert.pem"), "holds no private key in PEM"),
            (&both, "not RSA"),
        ] {
            let error = opened(dir, pem).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
            assert!(error.starts_with("`AZURE_CLIENT_CERTIFICATE_PATH`: `/"), "{error}");
        }
    }
}
