//! Certificates and keys: a cluster's own three CAs and what they issue.
//!
//! All keys are ECDSA P-256, CAs live ten years, leaves one. Leaves begin five minutes before they're issued, for clocks
//! that are behind. No certificate carries `system:masters` but [`setup_admin`]'s, which lives an hour.

mod files;
mod kubeconfig;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use kprov_types::names::{ClusterName, MachineName};
use kprov_types::node::{ClusterSecrets, JoinToken, KeyPairPem, SetupIdentity};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use sha2::{Digest as _, Sha256};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::pem::Pem;

pub use files::{FileToWrite, control_plane_files};
pub use kubeconfig::{Authority, Credentials, Kubeconfig};

/// The user as which kprov-node on control-plane machines talks to the API.
pub const NODE_CLIENT: &str = "kprov:control-plane-node";
/// Its group, bound to precisely what it does.
pub const NODE_CLIENT_GROUP: &str = "kprov:control-plane-nodes";
/// The group of administrators, bound to `cluster-admin`.
pub const ADMIN_GROUP: &str = "kprov:cluster-admins";
/// The user as which API servers talk to kubelets, bound to `system:kubelet-api-admin`.
pub const KUBELET_CLIENT: &str = "kube-apiserver-kubelet-client";

const DAY: Duration = Duration::from_hours(24);
const CA_LIFE: Duration = DAY.saturating_mul(3653);
const LEAF_LIFE: Duration = DAY.saturating_mul(365);
const SETUP_ADMIN_LIFE: Duration = Duration::from_hours(1);
const SETUP_LIFE: Duration = DAY.saturating_mul(30);
const BACKDATE: Duration = Duration::from_mins(5);

/// What went wrong with a certificate or key.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// Making or signing failed.
    #[error("could not issue the certificate `{name}`")]
    Issue {
        /// Its common name.
        name: String,
        /// Why.
        #[source]
        source: rcgen::Error,
    },
    /// A CA that was handed in can't sign.
    #[error("the certificate authority's certificate or key is not usable")]
    Authority(#[source] rcgen::Error),
    /// A certificate that was handed in can't be read.
    #[error("`{what}` is not a PEM certificate")]
    NotACertificate {
        /// Which.
        what: &'static str,
    },
    /// The system has no randomness to give.
    #[error("the system gives no random bytes")]
    Random(#[source] getrandom::Error),
    /// The version is too old.
    #[error(transparent)]
    Unsupported(#[from] crate::versions::Unsupported),
}

/// What a certificate may be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Usage {
    /// TLS server.
    Server,
    /// TLS client.
    Client,
    /// Both (etcd: members are each other's clients, and its gateway is a client of its own server).
    ServerAndClient,
}

/// A certificate to be issued.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// Common name; the user name of a client.
    pub common_name: String,
    /// Organization; the group of a client.
    pub organization: Option<String>,
    /// What for.
    pub usage: Usage,
    /// Subject alternative names: DNS names and addresses.
    pub names: BTreeSet<String>,
}

impl Leaf {
    /// A client.
    pub fn client(common_name: impl Into<String>, organization: Option<&str>) -> Self {
        Self {
            common_name: common_name.into(),
            organization: organization.map(str::to_owned),
            usage: Usage::Client,
            names: BTreeSet::new(),
        }
    }

    fn purposes(&self) -> (bool, bool) {
        match self.usage {
            Usage::Server => (true, false),
            Usage::Client => (false, true),
            Usage::ServerAndClient => (true, true),
        }
    }

    fn params(&self, now: Timestamp, life: Duration) -> Result<CertificateParams, PkiError> {
        let names: Vec<String> = self.names.iter().cloned().collect();
        let mut params = CertificateParams::new(names).map_err(|source| PkiError::Issue {
            name: self.common_name.clone(),
            source,
        })?;
        params.distinguished_name = DistinguishedName::new();
        if let Some(organization) = &self.organization {
            params
                .distinguished_name
                .push(DnType::OrganizationName, organization.as_str());
        }
        params
            .distinguished_name
            .push(DnType::CommonName, self.common_name.as_str());
        set_validity(&mut params, now, life);
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        let (server, client) = self.purposes();
        if server {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
        }
        if client {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ClientAuth);
        }
        Ok(params)
    }
}

fn set_validity(params: &mut CertificateParams, now: Timestamp, life: Duration) {
    // rcgen takes the `time` crate's type and makes one only from a date. Times before 1970 don't occur.
    let since_epoch = Duration::from_secs(u64::try_from(now.as_second()).unwrap_or(0));
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    params.not_before = epoch + since_epoch.saturating_sub(BACKDATE);
    params.not_after = epoch + since_epoch + life;
}

fn new_key(name: &str) -> Result<KeyPair, PkiError> {
    KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(|source| PkiError::Issue {
        name: name.to_owned(),
        source,
    })
}

fn new_ca(name: &str, now: Timestamp) -> Result<KeyPairPem, PkiError> {
    let key = new_key(name)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    set_validity(&mut params, now, CA_LIFE);
    // Signs leaves only.
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![
        KeyUsagePurpose::DigitalSignature,
        KeyUsagePurpose::KeyCertSign,
        KeyUsagePurpose::CrlSign,
    ];
    let certificate = params.self_signed(&key).map_err(|source| PkiError::Issue {
        name: name.to_owned(),
        source,
    })?;
    Ok(KeyPairPem {
        certificate: certificate.pem(),
        key: key.serialize_pem(),
    })
}

/// Makes a cluster's secrets: three CAs of its own, the key that signs ServiceAccount tokens (ES256), and the key that
/// encrypts Secrets at rest.
pub fn generate_secrets(cluster: &ClusterName, now: Timestamp) -> Result<ClusterSecrets, PkiError> {
    let service_account = new_key("service account")?;
    Ok(ClusterSecrets {
        ca: new_ca(&format!("{cluster} kubernetes"), now)?,
        etcd_ca: new_ca(&format!("{cluster} etcd"), now)?,
        front_proxy_ca: new_ca(&format!("{cluster} front proxy"), now)?,
        service_account: KeyPairPem {
            certificate: service_account.public_key_pem(),
            key: service_account.serialize_pem(),
        },
        encryption_key: STANDARD.encode(random::<32>()?),
    })
}

fn random<const N: usize>() -> Result<[u8; N], PkiError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(PkiError::Random)?;
    Ok(bytes)
}

/// Makes a bootstrap token, in the form kube-apiserver wants it: `[a-z0-9]{6}` and `[a-z0-9]{16}`.
pub fn generate_join_token() -> Result<JoinToken, PkiError> {
    const ALPHABET: &[u8; 36] = b"abcdefghijklmnopqrstuvwxyz0123456789";
    // The largest multiple of 36 in a byte; what lies above would make some characters likelier.
    const FAIR: u8 = 252;
    let mut text = String::new();
    while text.len() < 22 {
        let fair = random::<32>()?.into_iter().filter(|byte| *byte < FAIR);
        text.extend(fair.map(|byte| char::from(ALPHABET[usize::from(byte) % ALPHABET.len()])));
    }
    Ok(JoinToken {
        id: text[..6].to_owned(),
        secret: text[6..22].to_owned(),
    })
}

/// Issues a one-year certificate with a key of its own.
pub fn issue(ca: &KeyPairPem, leaf: &Leaf, now: Timestamp) -> Result<KeyPairPem, PkiError> {
    issue_for(ca, leaf, now, LEAF_LIFE)
}

fn issue_for(ca: &KeyPairPem, leaf: &Leaf, now: Timestamp, life: Duration) -> Result<KeyPairPem, PkiError> {
    let ca_key = KeyPair::from_pem(&ca.key).map_err(PkiError::Authority)?;
    let issuer = Issuer::from_ca_cert_pem(&ca.certificate, ca_key).map_err(PkiError::Authority)?;
    let key = new_key(&leaf.common_name)?;
    let certificate = leaf
        .params(now, life)?
        .signed_by(&key, &issuer)
        .map_err(|source| PkiError::Issue {
            name: leaf.common_name.clone(),
            source,
        })?;
    Ok(KeyPairPem {
        certificate: certificate.pem(),
        key: key.serialize_pem(),
    })
}

/// An administrator's one-year client certificate (group [`ADMIN_GROUP`]).
pub fn admin(secrets: &ClusterSecrets, now: Timestamp) -> Result<KeyPairPem, PkiError> {
    issue(&secrets.ca, &Leaf::client("kprov:admin", Some(ADMIN_GROUP)), now)
}

/// A client certificate in `system:masters`, valid for an hour: with it `kprov up` applies the objects that bind every
/// other user, [`admin`]'s among them. It's kept in memory only.
pub fn setup_admin(secrets: &ClusterSecrets, now: Timestamp) -> Result<KeyPairPem, PkiError> {
    issue_for(
        &secrets.ca,
        &Leaf::client("kprov:setup", Some("system:masters")),
        now,
        SETUP_ADMIN_LIFE,
    )
}

/// The one client that machines let in at their setup endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetupClient {
    /// Its self-signed certificate and key.
    pub pair: KeyPairPem,
    /// SHA-256 over the certificate's DER, as hexadecimal digits.
    pub fingerprint: String,
}

/// Makes the client of the setup endpoints, once a cluster.
pub fn setup_client(now: Timestamp) -> Result<SetupClient, PkiError> {
    let pair = self_signed(&Leaf::client("kprov-setup-client", None), now)?;
    let fingerprint = fingerprint(&pair.certificate)?;
    Ok(SetupClient { pair, fingerprint })
}

/// Makes what identifies one machine until it's set up: the certificate its setup endpoint shows (for the machine's name,
/// valid 30 days; `kprov up` pins it), and the fingerprint of the client it lets in.
pub fn setup_identity(
    machine: &MachineName,
    client_fingerprint: &str,
    now: Timestamp,
) -> Result<SetupIdentity, PkiError> {
    let leaf = Leaf {
        common_name: machine.to_string(),
        organization: None,
        usage: Usage::Server,
        names: BTreeSet::from([machine.to_string()]),
    };
    let KeyPairPem { certificate, key } = self_signed(&leaf, now)?;
    Ok(SetupIdentity {
        certificate,
        key,
        client_fingerprint: client_fingerprint.to_owned(),
    })
}

fn self_signed(leaf: &Leaf, now: Timestamp) -> Result<KeyPairPem, PkiError> {
    let key = new_key(&leaf.common_name)?;
    let certificate = leaf
        .params(now, SETUP_LIFE)?
        .self_signed(&key)
        .map_err(|source| PkiError::Issue {
            name: leaf.common_name.clone(),
            source,
        })?;
    Ok(KeyPairPem {
        certificate: certificate.pem(),
        key: key.serialize_pem(),
    })
}

/// SHA-256 over the DER of a PEM certificate, as hexadecimal digits.
pub fn fingerprint(certificate_pem: &str) -> Result<String, PkiError> {
    let pem = parse_pem(certificate_pem).ok_or(PkiError::NotACertificate { what: "certificate" })?;
    Ok(hex::encode(Sha256::digest(&pem.contents)))
}

fn parse_pem(text: &str) -> Option<Pem> {
    x509_parser::pem::parse_x509_pem(text.as_bytes())
        .ok()
        .map(|(_, pem)| pem)
}

/// Whether less than a third of a certificate's life is left at `now`, or it can't be read at all.
pub fn needs_renewal(certificate_pem: &str, now: Timestamp) -> bool {
    let Some(pem) = parse_pem(certificate_pem) else {
        return true;
    };
    let Ok(certificate) = pem.parse_x509() else { return true };
    is_stale(&certificate, now)
}

fn is_stale(certificate: &X509Certificate<'_>, now: Timestamp) -> bool {
    let (begin, end) = (
        certificate.validity().not_before.timestamp(),
        certificate.validity().not_after.timestamp(),
    );
    let now = now.as_second();
    now < begin || (end - now) * 3 < end - begin
}

/// Whether an existing certificate does what `leaf` asks for: issued by `ca`, for its own key, with the same subject, usage
/// and names, and with at least a third of its life left at `now`.
pub fn is_current(existing: &KeyPairPem, ca: &KeyPairPem, leaf: &Leaf, now: Timestamp) -> bool {
    check_current(existing, ca, leaf, now).unwrap_or(false)
}

fn check_current(existing: &KeyPairPem, ca: &KeyPairPem, leaf: &Leaf, now: Timestamp) -> Option<bool> {
    let (pem, ca_pem) = (parse_pem(&existing.certificate)?, parse_pem(&ca.certificate)?);
    let (certificate, ca) = (pem.parse_x509().ok()?, ca_pem.parse_x509().ok()?);
    let key = KeyPair::from_pem(&existing.key).ok()?;
    let subject = certificate.subject();
    let usage = certificate.extended_key_usage().ok()??.value;
    let names = match certificate.subject_alternative_name().ok()? {
        Some(extension) => extension
            .value
            .general_names
            .iter()
            .map(name_text)
            .collect::<Option<BTreeSet<_>>>()?,
        None => BTreeSet::new(),
    };
    let text = |mut values: Vec<&str>| {
        if values.len() > 1 {
            None
        } else {
            Some(values.pop().map(str::to_owned))
        }
    };
    let attributes = |kind: &mut dyn Iterator<Item = &x509_parser::x509::AttributeTypeAndValue<'_>>| {
        text(kind.filter_map(|attribute| attribute.as_str().ok()).collect())
    };
    Some(
        !is_stale(&certificate, now)
            && certificate.verify_signature(Some(ca.public_key())).is_ok()
            && certificate.public_key().subject_public_key.data == key.public_key_raw()
            && attributes(&mut subject.iter_common_name())? == Some(leaf.common_name.clone())
            && attributes(&mut subject.iter_organization())? == leaf.organization
            && (usage.server_auth, usage.client_auth) == leaf.purposes()
            && names == leaf.names,
    )
}

fn name_text(name: &GeneralName<'_>) -> Option<String> {
    match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        GeneralName::IPAddress(bytes) => match bytes.len() {
            4 => <[u8; 4]>::try_from(*bytes).ok().map(|b| IpAddr::from(b).to_string()),
            16 => <[u8; 16]>::try_from(*bytes).ok().map(|b| IpAddr::from(b).to_string()),
            _ => None,
        },
        _ => None,
    }
}
