//! Certificates, read back with another library and used for a TLS handshake.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read, Write};
use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use kprov_bootstrap::control_plane_files;
use kprov_bootstrap::pki::{self, FileToWrite, Leaf, Usage};
use kprov_types::node::KeyPairPem;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection};
use x509_parser::extensions::GeneralName;
use x509_parser::pem::parse_x509_pem;

use crate::common::{bundle, machine, member, now, settings};

type Files = BTreeMap<String, FileToWrite>;

fn days(days: i64) -> SignedDuration {
    SignedDuration::from_hours(24 * days)
}

fn files(version: &str) -> Files {
    let bundle = bundle(settings(version, "3.5.30", 3), now());
    let files = control_plane_files(&bundle, &member(1), &|_| None, now()).unwrap();
    files.into_iter().map(|f| (f.path.clone(), f)).collect()
}

fn pair(files: &Files, name: &str) -> KeyPairPem {
    let content = |suffix: &str| files[&format!("/etc/kubernetes/pki/{name}.{suffix}")].content.clone();
    KeyPairPem {
        certificate: content("crt"),
        key: content("key"),
    }
}

/// Subject, usages (server, client), names and days of life of a certificate.
fn read(pem: &str) -> (String, (bool, bool), BTreeSet<String>, i64) {
    let (_, pem) = parse_x509_pem(pem.as_bytes()).unwrap();
    let certificate = pem.parse_x509().unwrap();
    let usage = certificate
        .extended_key_usage()
        .unwrap()
        .map(|e| (e.value.server_auth, e.value.client_auth));
    let names = certificate
        .subject_alternative_name()
        .unwrap()
        .map_or_else(BTreeSet::new, |e| {
            let text = |name: &GeneralName<'_>| match name {
                GeneralName::DNSName(name) => (*name).to_owned(),
                GeneralName::IPAddress([a, b, c, d]) => format!("{a}.{b}.{c}.{d}"),
                other => panic!("{other}"),
            };
            e.value.general_names.iter().map(text).collect()
        });
    let validity = certificate.validity();
    let life = validity.not_after.timestamp() - validity.not_before.timestamp();
    (
        certificate.subject().to_string(),
        usage.unwrap_or_default(),
        names,
        life / 86_400,
    )
}

fn has_suffix(path: &str, suffixes: &[&str]) -> bool {
    path.rsplit_once('.')
        .is_some_and(|(_, suffix)| suffixes.contains(&suffix))
}

#[test]
fn layout() {
    let files = files("1.36.3");
    let listing: Vec<String> = files.values().map(|f| format!("{:o} {}", f.mode, f.path)).collect();
    insta::assert_snapshot!("files-1.36", listing.join("\n"));
    let old = self::files("1.20.2");
    let only_new: Vec<&String> = files.keys().filter(|path| !old.contains_key(*path)).collect();
    assert_eq!(
        only_new,
        [
            "/etc/kubernetes/kprov/1.36/admission.yaml",
            "/etc/kubernetes/kprov/1.36/authentication.yaml"
        ]
    );
    for file in files.values().filter(|f| f.content.contains("PRIVATE KEY")) {
        assert_eq!(file.mode, 0o600, "{}", file.path);
    }
}

#[test]
fn configuration_files() {
    let files = files("1.36.3");
    for (name, path) in [
        ("audit-policy", "audit-policy"),
        ("admission", "1.36/admission"),
        ("authentication", "1.36/authentication"),
    ] {
        insta::assert_snapshot!(name, files[&format!("/etc/kubernetes/kprov/{path}.yaml")].content);
    }
}

#[test]
fn leaves_have_their_subjects_usages_and_names() {
    let files = files("1.36.3");
    let leaves: BTreeMap<&str, _> = files
        .iter()
        .filter(|(path, _)| has_suffix(path, &["crt"]) && !path.ends_with("ca.crt"))
        .map(|(path, file)| (path.trim_start_matches("/etc/kubernetes/pki/"), read(&file.content)))
        .collect();
    insta::assert_debug_snapshot!("leaves", leaves);
    assert!(leaves.values().all(|(subject, ..)| !subject.contains("system:masters")));
}

#[test]
fn authorities_sign_leaves_only() {
    let secrets = bundle(settings("1.36.3", "3.5.30", 1), now()).secrets;
    for ca in [&secrets.ca, &secrets.etcd_ca, &secrets.front_proxy_ca] {
        let (_, pem) = parse_x509_pem(ca.certificate.as_bytes()).unwrap();
        let certificate = pem.parse_x509().unwrap();
        let constraints = certificate.basic_constraints().unwrap().unwrap().value;
        assert!(constraints.ca && constraints.path_len_constraint == Some(0));
        assert!(certificate.key_usage().unwrap().unwrap().value.key_cert_sign());
        let (.., life) = read(&ca.certificate);
        assert_eq!(life, 3653);
        assert!(certificate.subject().to_string().starts_with("CN=demo "));
    }
    let other = bundle(settings("1.36.3", "3.5.30", 1), now()).secrets;
    assert_ne!(secrets.encryption_key, other.encryption_key);
    assert_ne!(secrets.ca.key, other.ca.key);
}

#[test]
fn nothing_changes_until_a_third_of_life_is_left() {
    let bundle = bundle(settings("1.36.3", "3.5.30", 3), now());
    let at = |existing: &Files, time: Timestamp| -> Files {
        let read = |path: &str| existing.get(path).map(|f| f.content.clone());
        let files = control_plane_files(&bundle, &member(0), &read, time).unwrap();
        files.into_iter().map(|f| (f.path.clone(), f)).collect()
    };
    let first = at(&Files::new(), now());
    assert_eq!(at(&first, now()), first);
    assert_eq!(at(&first, now() + days(242)), first);
    let renewed = at(&first, now() + days(245));
    for (path, file) in &first {
        let leaf = path.starts_with("/etc/kubernetes/pki/")
            && has_suffix(path, &["crt", "key"])
            && !["/ca.crt", "/ca.key", "-ca.crt", "-ca.key", "/sa.key"]
                .iter()
                .any(|s| path.ends_with(s));
        assert_eq!(renewed[path] != *file, leaf, "{path}");
    }
    // A lost or foreign file is made anew, with its pair, and nothing else.
    let mut damaged = first.clone();
    damaged.remove("/etc/kubernetes/pki/apiserver.key");
    let swapped = first["/etc/kubernetes/pki/front-proxy-client.crt"].clone();
    damaged
        .get_mut("/etc/kubernetes/pki/scheduler/client.crt")
        .unwrap()
        .content = swapped.content;
    let repaired = at(&damaged, now());
    let changed: Vec<&String> = first.keys().filter(|path| repaired[*path] != first[*path]).collect();
    assert_eq!(
        changed,
        [
            "apiserver.crt",
            "apiserver.key",
            "scheduler/client.crt",
            "scheduler/client.key"
        ]
        .map(|f| format!("/etc/kubernetes/pki/{f}"))
        .iter()
        .collect::<Vec<_>>()
    );
}

#[test]
fn a_certificate_is_current_only_as_asked_for() {
    let secrets = bundle(settings("1.36.3", "3.5.30", 1), now()).secrets;
    let leaf = Leaf {
        common_name: "server".into(),
        organization: Some("group".into()),
        usage: Usage::Server,
        names: BTreeSet::from(["localhost".into(), "10.1.2.3".into(), "2001:db8::1".into()]),
    };
    let issued = pki::issue(&secrets.ca, &leaf, now()).unwrap();
    let current = |ca: &KeyPairPem, leaf: &Leaf, time| pki::is_current(&issued, ca, leaf, time);
    assert!(current(&secrets.ca, &leaf, now()));
    assert!(!current(&secrets.etcd_ca, &leaf, now()));
    assert!(!current(&secrets.ca, &leaf, now() - days(1)));
    assert!(!current(&secrets.ca, &leaf, now() + days(400)));
    let edits: [fn(&mut Leaf); 4] = [
        |l| l.common_name = "other".into(),
        |l| l.organization = None,
        |l| l.usage = Usage::ServerAndClient,
        |l| drop(l.names.pop_first()),
    ];
    for edit in edits {
        let mut other = leaf.clone();
        edit(&mut other);
        assert!(!current(&secrets.ca, &other, now()), "{other:?}");
    }
    let foreign_key = KeyPairPem {
        key: secrets.ca.key.clone(),
        ..issued.clone()
    };
    assert!(!pki::is_current(&foreign_key, &secrets.ca, &leaf, now()));
    assert!(pki::needs_renewal("rubbish", now()));
    assert!(!pki::needs_renewal(&issued.certificate, now()));
}

#[test]
fn setup_rights_are_short_and_tokens_well_formed() {
    let secrets = bundle(settings("1.36.3", "3.5.30", 1), now()).secrets;
    let setup = pki::setup_admin(&secrets, now()).unwrap();
    assert!(read(&setup.certificate).0.contains("O=system:masters"));
    assert!(pki::needs_renewal(
        &setup.certificate,
        now() + SignedDuration::from_mins(50)
    ));
    let admin = pki::admin(&secrets, now()).unwrap();
    let subject = read(&admin.certificate).0;
    assert!(
        subject.contains("O=kprov:cluster-admins") && !subject.contains("masters"),
        "{subject}"
    );
    let tokens: BTreeSet<String> = (0..50).map(|_| pki::generate_join_token().unwrap().bearer()).collect();
    assert_eq!(tokens.len(), 50);
    for token in tokens {
        let (id, secret) = token.split_once('.').unwrap();
        assert_eq!((id.len(), secret.len()), (6, 16));
        assert!(
            (id.to_owned() + secret)
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
        );
    }
}

#[test]
fn api_server_and_clients_shake_hands() {
    let files = files("1.36.3");
    let ca = files["/etc/kubernetes/pki/ca.crt"].content.clone();
    let server = pair(&files, "apiserver");
    for name in [
        "kubernetes",
        "10.77.0.1",
        "10.77.0.11",
        "127.0.0.1",
        "10.96.0.1",
        "kubernetes.default.svc.cluster.local",
    ] {
        handshake(&server, &ca, &pair(&files, "scheduler/client"), &ca, name).unwrap();
    }
    // A name it doesn't have, and a client of another authority.
    assert!(handshake(&server, &ca, &pair(&files, "scheduler/client"), &ca, "10.77.0.12").is_err());
    assert!(handshake(&server, &ca, &pair(&files, "apiserver-etcd-client"), &ca, "kubernetes").is_err());
    // A client's certificate doesn't make a server.
    assert!(handshake(&pair(&files, "scheduler/client"), &ca, &server, &ca, "kubernetes").is_err());
    let etcd_ca = files["/etc/kubernetes/pki/etcd/ca.crt"].content.clone();
    let peer = pair(&files, "etcd/peer");
    handshake(&peer, &etcd_ca, &peer, &etcd_ca, "10.77.0.11").unwrap();
}

#[test]
fn setup_endpoint_and_its_one_client_shake_hands() {
    let client = pki::setup_client(now()).unwrap();
    let identity = pki::setup_identity(&machine("demo-cp-0"), &client.fingerprint, now()).unwrap();
    assert_eq!(
        identity.client_fingerprint,
        pki::fingerprint(&client.pair.certificate).unwrap()
    );
    let server = KeyPairPem {
        certificate: identity.certificate.clone(),
        key: identity.key,
    };
    handshake(
        &server,
        &identity.certificate,
        &client.pair,
        &client.pair.certificate,
        "demo-cp-0",
    )
    .unwrap();
}

/// A TLS handshake in memory, both sides checking each other against a CA (or the pinned certificate itself).
fn handshake(
    server: &KeyPairPem,
    trusted_by_client: &str,
    client: &KeyPairPem,
    trusted_by_server: &str,
    name: &str,
) -> Result<(), rustls::Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let roots = |pem: &str| {
        let mut store = RootCertStore::empty();
        store
            .add(CertificateDer::from_pem_slice(pem.as_bytes()).unwrap())
            .unwrap();
        Arc::new(store)
    };
    let identity = |pair: &KeyPairPem| {
        let certificate = CertificateDer::from_pem_slice(pair.certificate.as_bytes()).unwrap();
        (
            vec![certificate],
            PrivateKeyDer::from_pem_slice(pair.key.as_bytes()).unwrap(),
        )
    };
    // The clock is the test's: certificates are issued at a fixed time.
    let clock = Arc::new(Clock);
    let verifier =
        rustls::server::WebPkiClientVerifier::builder_with_provider(roots(trusted_by_server), provider.clone())
            .build()
            .unwrap();
    let (certificates, key) = identity(server);
    let server_config = ServerConfig::builder_with_details(provider.clone(), clock.clone())
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(verifier)
        .with_single_cert(certificates, key)?;
    let (certificates, key) = identity(client);
    let client_config = ClientConfig::builder_with_details(provider, clock)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots(trusted_by_client))
        .with_client_auth_cert(certificates, key)?;
    let mut server = ServerConnection::new(Arc::new(server_config))?;
    let mut client = ClientConnection::new(Arc::new(client_config), ServerName::try_from(name.to_owned()).unwrap())?;
    while client.is_handshaking() || server.is_handshaking() {
        let mut wire = Wire::default();
        while client.wants_write() {
            client.write_tls(&mut wire).unwrap();
        }
        while !wire.0.is_empty() {
            server.read_tls(&mut wire).unwrap();
            server.process_new_packets()?;
        }
        while server.wants_write() {
            server.write_tls(&mut wire).unwrap();
        }
        while !wire.0.is_empty() {
            client.read_tls(&mut wire).unwrap();
            client.process_new_packets()?;
        }
    }
    Ok(())
}

#[derive(Debug)]
struct Clock;

impl rustls::time_provider::TimeProvider for Clock {
    fn current_time(&self) -> Option<rustls::pki_types::UnixTime> {
        let seconds = u64::try_from(now().as_second()).unwrap();
        Some(rustls::pki_types::UnixTime::since_unix_epoch(
            std::time::Duration::from_secs(seconds),
        ))
    }
}

#[derive(Default)]
struct Wire(Vec<u8>);

impl Read for Wire {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.0.as_slice().read(buffer)?;
        self.0.drain(..n);
        Ok(n)
    }
}

impl Write for Wire {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
