//! Signing keys, trusted keys and detached signatures.
//!
//! Keys are Ed25519 (RFC 8032), kept as PEM: PKCS #8 for the private and `SubjectPublicKeyInfo` for the public key
//! (RFC 8410), so that `openssl pkey` reads both. A signature file is JSON:
//!
//! ```json
//! {
//!   "apiVersion": "kprov.io/v1alpha1",
//!   "kind": "ReleaseSignatures",
//!   "signatures": [
//!     { "keyId": "<16 hexadecimal digits>", "signature": "<base64 of the 64 bytes>" }
//!   ]
//! }
//! ```
//!
//! Each signature is over the bytes of `release.json` as they are. Without kprov:
//!
//! ```sh
//! jq -r '.signatures[0].signature' release.json.sig | base64 -d > sig
//! openssl pkeyutl -verify -pubin -inkey release.key.pub -rawin -in release.json -sigfile sig
//! ```

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use camino::{Utf8Path, Utf8PathBuf};
use ed25519_dalek::Signer as _;
use ed25519_dalek::pkcs8::KeypairBytes;
use ed25519_dalek::pkcs8::spki::der::pem::LineEnding;
use ed25519_dalek::pkcs8::{DecodePrivateKey as _, DecodePublicKey as _, EncodePrivateKey as _, EncodePublicKey as _};
use kprov_types::release::API_VERSION;
use serde::{Deserialize, Serialize};

use crate::digest;

/// What a public key file's name ends in.
const PUBLIC_SUFFIX: &str = "pub";
/// `kind` of a signature file.
const KIND: &str = "ReleaseSignatures";

/// Why a key could not be made, read or kept.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The system gave no random bytes.
    #[error("no random bytes for a new key: {0}")]
    Random(getrandom::Error),
    /// A key file could not be read.
    #[error("cannot read key `{path}`")]
    Read {
        /// The file or directory.
        path: Utf8PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A key file could not be written. An existing one is never replaced.
    #[error("cannot write key `{path}`")]
    Write {
        /// The file.
        path: Utf8PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file is no private Ed25519 key.
    #[error("`{path}` is not a private Ed25519 key (PKCS #8, PEM)")]
    NotPrivate {
        /// The file.
        path: Utf8PathBuf,
    },
    /// A file is no public Ed25519 key.
    #[error("`{path}` is not a public Ed25519 key (SubjectPublicKeyInfo, PEM)")]
    NotPublic {
        /// The file.
        path: Utf8PathBuf,
    },
}

impl KeyError {
    /// What the person may do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Write { path, source } if source.kind() == io::ErrorKind::AlreadyExists => Some(format!(
                "keys are never overwritten; move `{path}` away, or choose another name"
            )),
            Self::NotPublic { path } if path.extension() != Some(PUBLIC_SUFFIX) => {
                Some(format!("the public key is the file that ends in `.{PUBLIC_SUFFIX}`"))
            }
            _ => None,
        }
    }
}

/// Names a key: the first 16 hexadecimal digits of the SHA-256 of its 32 public bytes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct KeyId(String);

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A private key that signs releases. Never printed.
#[derive(Clone)]
pub struct SigningKey(ed25519_dalek::SigningKey);

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SigningKey({})", self.public().id())
    }
}

impl SigningKey {
    /// A new key from the system's random numbers.
    pub fn generate() -> Result<Self, KeyError> {
        let mut secret = [0; 32];
        getrandom::fill(&mut secret).map_err(KeyError::Random)?;
        Ok(Self(ed25519_dalek::SigningKey::from_bytes(&secret)))
    }

    /// Reads a private key.
    pub fn load(path: &Utf8Path) -> Result<Self, KeyError> {
        let pem = fs::read_to_string(path).map_err(|source| KeyError::Read {
            path: path.to_owned(),
            source,
        })?;
        ed25519_dalek::SigningKey::from_pkcs8_pem(&pem)
            .map(Self)
            .map_err(|_| KeyError::NotPrivate { path: path.to_owned() })
    }

    /// Writes the private key to `path` (mode 0600) and the public key to `path` with `.pub` appended, whose path is
    /// returned. Replaces neither.
    pub fn save(&self, path: &Utf8Path) -> Result<Utf8PathBuf, KeyError> {
        let public_path = Utf8PathBuf::from(format!("{path}.{PUBLIC_SUFFIX}"));
        // Version 1 of the structure, without the public key: OpenSSL reads no other.
        let pair = KeypairBytes {
            secret_key: self.0.to_bytes(),
            public_key: None,
        };
        let pem = pair
            .to_pkcs8_pem(LineEnding::LF)
            .map_err(|_| KeyError::NotPrivate { path: path.to_owned() })?;
        let write = |path: &Utf8Path, mode, text: &str| {
            OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(mode)
                .open(path)
                .and_then(|mut file| file.write_all(text.as_bytes()))
                .map_err(|source| KeyError::Write {
                    path: path.to_owned(),
                    source,
                })
        };
        write(path, 0o600, &pem)?;
        write(&public_path, 0o644, &self.public().to_pem())?;
        Ok(public_path)
    }

    /// The key that checks this one's signatures.
    pub fn public(&self) -> PublicKey {
        PublicKey(self.0.verifying_key())
    }

    /// Signs the bytes of a `release.json`. The result is a signature file's text; equal bytes give an equal text.
    pub fn sign(&self, release: &[u8]) -> String {
        let signature = BASE64.encode(self.0.sign(release).to_bytes());
        let file = SignatureFile {
            api_version: API_VERSION.into(),
            kind: KIND.into(),
            signatures: vec![SignatureEntry {
                key_id: self.public().id(),
                signature,
            }],
        };
        let mut text = serde_json::to_string_pretty(&file).unwrap_or_default();
        text.push('\n');
        text
    }
}

/// A public key that checks signatures.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublicKey(ed25519_dalek::VerifyingKey);

impl PublicKey {
    /// Reads a public key.
    pub fn load(path: &Utf8Path) -> Result<Self, KeyError> {
        let pem = fs::read_to_string(path).map_err(|source| KeyError::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::from_pem(&pem).ok_or_else(|| KeyError::NotPublic { path: path.to_owned() })
    }

    /// Reads a public key out of PEM text; `None` where that is none.
    pub fn from_pem(pem: &str) -> Option<Self> {
        ed25519_dalek::VerifyingKey::from_public_key_pem(pem).map(Self).ok()
    }

    /// Names the key.
    pub fn id(&self) -> KeyId {
        let digest = digest::of_bytes(self.0.as_bytes());
        KeyId(digest.hex().chars().take(16).collect())
    }

    /// As PEM.
    pub fn to_pem(&self) -> String {
        self.0.to_public_key_pem(LineEnding::LF).unwrap_or_default()
    }
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct SignatureFile {
    api_version: String,
    kind: String,
    signatures: Vec<SignatureEntry>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct SignatureEntry {
    key_id: KeyId,
    signature: String,
}

/// Why a signature does not count.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SignatureError {
    /// There is none.
    #[error("the release is not signed")]
    Unsigned,
    /// The file is not a signature file.
    #[error("the signature file is malformed: {0}")]
    Malformed(String),
    /// None of the signers is trusted.
    #[error("the release is signed by {}, which is not trusted", list(.signers))]
    UnknownKey {
        /// Who signed.
        signers: Vec<KeyId>,
    },
    /// A trusted key's signature does not fit the bytes.
    #[error("the signature by `{key}` does not fit: `release.json` was altered")]
    Bad {
        /// The key.
        key: KeyId,
    },
}

fn list(keys: &[KeyId]) -> String {
    let mut text = String::new();
    for (i, key) in keys.iter().enumerate() {
        let comma = if i == 0 { "" } else { ", " };
        let _ = write!(text, "{comma}`{key}`");
    }
    if text.is_empty() { "nobody".into() } else { text }
}

/// The keys whose signatures count.
#[derive(Clone, Debug, Default)]
pub struct TrustedKeys(BTreeMap<KeyId, PublicKey>);

impl TrustedKeys {
    /// Reads keys: each path is a public key, or a directory whose `*.pub` files are.
    pub fn load(paths: &[Utf8PathBuf]) -> Result<Self, KeyError> {
        let mut keys = Self::default();
        for path in paths {
            let unreadable = |source| KeyError::Read {
                path: path.clone(),
                source,
            };
            if !fs::metadata(path).map_err(unreadable)?.is_dir() {
                keys.add(PublicKey::load(path)?);
                continue;
            }
            for entry in path.read_dir_utf8().map_err(unreadable)? {
                let entry = entry.map_err(unreadable)?;
                if entry.path().extension() == Some(PUBLIC_SUFFIX) {
                    keys.add(PublicKey::load(entry.path())?);
                }
            }
        }
        Ok(keys)
    }

    /// Adds a key.
    pub fn add(&mut self, key: PublicKey) {
        self.0.insert(key.id(), key);
    }

    /// The key of an id.
    pub fn get(&self, id: &KeyId) -> Option<&PublicKey> {
        self.0.get(id)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Checks a signature file's text against the bytes of a `release.json` and says whose signature it bears.
    pub fn check(&self, release: &[u8], text: &str) -> Result<KeyId, SignatureError> {
        let file: SignatureFile = serde_json::from_str(text).map_err(|e| SignatureError::Malformed(e.to_string()))?;
        if file.api_version != API_VERSION || file.kind != KIND {
            let found = format!("`{}` of `{}` is not known", file.kind, file.api_version);
            return Err(SignatureError::Malformed(found));
        }
        let mut bad = None;
        for SignatureEntry { key_id, signature } in &file.signatures {
            let Some(PublicKey(key)) = self.0.get(key_id) else {
                continue;
            };
            let good = BASE64
                .decode(signature)
                .ok()
                .and_then(|bytes| ed25519_dalek::Signature::from_slice(&bytes).ok())
                .is_some_and(|signature| key.verify_strict(release, &signature).is_ok());
            if good {
                return Ok(key_id.clone());
            }
            bad = Some(key_id.clone());
        }
        Err(match bad {
            Some(key) => SignatureError::Bad { key },
            None => SignatureError::UnknownKey {
                signers: file.signatures.into_iter().map(|s| s.key_id).collect(),
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::process::Command;

    fn directory() -> (tempfile::TempDir, Utf8PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = Utf8PathBuf::try_from(dir.path().to_owned()).unwrap();
        (dir, path)
    }

    #[test]
    fn keys_are_kept_and_found() {
        let (_dir, dir) = directory();
        let key = SigningKey::generate().unwrap();
        let path = dir.join("release.key");
        let public = key.save(&path).unwrap();
        assert_eq!(public, dir.join("release.key.pub"));
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(SigningKey::load(&path).unwrap().public(), key.public());
        assert!(matches!(key.save(&path), Err(KeyError::Write { .. })));
        assert!(matches!(SigningKey::load(&public), Err(KeyError::NotPrivate { .. })));
        assert!(matches!(PublicKey::load(&path), Err(KeyError::NotPublic { .. })));

        fs::write(dir.join("README"), "not a key").unwrap();
        for paths in [vec![dir.clone()], vec![public]] {
            let trusted = TrustedKeys::load(&paths).unwrap();
            assert_eq!(trusted.check(b"bytes", &key.sign(b"bytes")), Ok(key.public().id()));
        }
        assert!(matches!(
            TrustedKeys::load(&[dir.join("absent")]),
            Err(KeyError::Read { .. })
        ));
    }

    #[test]
    fn signatures_that_do_not_count() {
        let key = SigningKey::generate().unwrap();
        let other = SigningKey::generate().unwrap();
        let mut trusted = TrustedKeys::default();
        trusted.add(key.public());
        let signature = key.sign(b"bytes");
        assert_eq!(
            trusted.check(b"byteS", &signature),
            Err(SignatureError::Bad { key: key.public().id() })
        );
        assert_eq!(
            trusted.check(b"bytes", &other.sign(b"bytes")),
            Err(SignatureError::UnknownKey {
                signers: vec![other.public().id()]
            })
        );
        // Another's signature under a trusted name.
        let forged = other
            .sign(b"bytes")
            .replace(&other.public().id().0, &key.public().id().0);
        assert_eq!(
            trusted.check(b"bytes", &forged),
            Err(SignatureError::Bad { key: key.public().id() })
        );
        for malformed in ["", "{}", &signature.replace("v1alpha1", "v9"), &signature[..40]] {
            assert!(
                matches!(trusted.check(b"bytes", malformed), Err(SignatureError::Malformed(_))),
                "{malformed}"
            );
        }
    }

    #[test]
    fn openssl_agrees() {
        let (_dir, dir) = directory();
        let key = SigningKey::generate().unwrap();
        let private = dir.join("k");
        let public = key.save(&private).unwrap();
        let message = dir.join("message");
        fs::write(&message, "bytes").unwrap();
        let file: SignatureFile = serde_json::from_str(&key.sign(b"bytes")).unwrap();
        let signature = dir.join("signature");
        fs::write(&signature, BASE64.decode(&file.signatures[0].signature).unwrap()).unwrap();
        let openssl = |args: &[&str]| Command::new("openssl").args(args).output().unwrap();
        let verified = openssl(&[
            "pkeyutl",
            "-verify",
            "-pubin",
            "-inkey",
            public.as_str(),
            "-rawin",
            "-in",
            message.as_str(),
            "-sigfile",
            signature.as_str(),
        ]);
        assert!(verified.status.success(), "{verified:?}");
        let derived = openssl(&["pkey", "-in", private.as_str(), "-pubout"]);
        assert_eq!(
            String::from_utf8(derived.stdout).unwrap(),
            fs::read_to_string(&public).unwrap()
        );
    }
}
