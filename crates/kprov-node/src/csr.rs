//! Approves kubelets' serving certificates: for a node's own name and addresses, and nothing else.
//!
//! [`judge`] is pure. Its rules are those of the signer `kubernetes.io/kubelet-serving` (Kubernetes' documentation,
//! "Certificates and Certificate Signing Requests"), and that a node gets certificates for itself only, which the signer
//! leaves to whoever approves.

use std::collections::BTreeSet;
use std::net::IpAddr;

use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::prelude::FromDer;
use x509_parser::x509::AttributeTypeAndValue;

use crate::nodes::{NodeFacts, Nodes};

/// The signer of kubelets' serving certificates.
pub const SIGNER: &str = "kubernetes.io/kubelet-serving";
const USER_PREFIX: &str = "system:node:";
const NODES_GROUP: &str = "system:nodes";
const REQUIRED_USAGES: [&str; 2] = ["digital signature", "server auth"];
/// Needed for RSA keys in TLS 1.2; kubelets before 1.27 ask for it always.
const OPTIONAL_USAGE: &str = "key encipherment";

/// What becomes of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is in order.
    Approve,
    /// It asks for something its node must not have; why, in words.
    Deny(String),
    /// Its node is not known yet, or has no address yet: to be judged again when nodes change.
    Wait,
    /// It is another's business, or decided already.
    Ignore,
}

fn is_decided(request: &CertificateSigningRequest) -> bool {
    let conditions = request.status.as_ref().and_then(|s| s.conditions.as_ref());
    conditions.is_some_and(|all| {
        all.iter()
            .any(|c| matches!(c.type_.as_str(), "Approved" | "Denied" | "Failed"))
    })
}

/// Judges one request. `nodes` are the cluster's nodes as far as they are known.
pub fn judge(request: &CertificateSigningRequest, nodes: &Nodes) -> Verdict {
    let spec = &request.spec;
    if spec.signer_name != SIGNER || is_decided(request) {
        return Verdict::Ignore;
    }
    // Whoever is not a node is not this approver's business: an administrator may approve it by hand.
    let Some(name) = spec.username.as_deref().and_then(|user| user.strip_prefix(USER_PREFIX)) else {
        return Verdict::Ignore;
    };
    if !spec
        .groups
        .as_ref()
        .is_some_and(|groups| groups.iter().any(|g| g == NODES_GROUP))
    {
        return Verdict::Ignore;
    }
    let Some(node) = nodes.get(name).filter(|node| !node.addresses.is_empty()) else {
        return Verdict::Wait;
    };
    let usages: BTreeSet<_> = spec.usages.iter().flatten().map(String::as_str).collect();
    let allowed = |usage: &&str| REQUIRED_USAGES.contains(usage) || *usage == OPTIONAL_USAGE;
    if !REQUIRED_USAGES.iter().all(|usage| usages.contains(usage)) || !usages.iter().all(allowed) {
        return Verdict::Deny(format!(
            "the usages must be digital signature and server auth, not {usages:?}"
        ));
    }
    match check_content(&spec.request.0, name, node, nodes) {
        Ok(()) => Verdict::Approve,
        Err(why) => Verdict::Deny(why),
    }
}

/// Checks the PKCS #10 request itself (RFC 2986).
fn check_content(pem: &[u8], name: &str, node: &NodeFacts, nodes: &Nodes) -> Result<(), String> {
    let broken = "the request is not PEM of a PKCS #10 request";
    let (_, pem) = x509_parser::pem::parse_x509_pem(pem).map_err(|_| broken)?;
    let (_, request) = X509CertificationRequest::from_der(&pem.contents).map_err(|_| broken)?;
    let subject = &request.certification_request_info.subject;
    let text = |attribute: &AttributeTypeAndValue<'_>| attribute.as_str().unwrap_or_default().to_owned();
    if subject.iter_common_name().map(text).collect::<Vec<_>>() != [format!("{USER_PREFIX}{name}")] {
        return Err(format!("the common name must be `{USER_PREFIX}{name}`"));
    }
    if subject.iter_organization().map(text).collect::<Vec<_>>() != [NODES_GROUP] {
        return Err(format!("the organization must be `{NODES_GROUP}` alone"));
    }
    if subject.iter_attributes().count() != 2 {
        return Err("the subject must be a common name and an organization, no more".into());
    }
    let mut names = 0;
    for extension in request.requested_extensions().into_iter().flatten() {
        let ParsedExtension::SubjectAlternativeName(san) = extension else {
            continue;
        };
        for general in &san.general_names {
            names += 1;
            check_name(general, name, node, nodes)?;
        }
    }
    if names == 0 {
        Err("it asks for no name or address".into())
    } else {
        Ok(())
    }
}

fn check_name(general: &GeneralName<'_>, name: &str, node: &NodeFacts, nodes: &Nodes) -> Result<(), String> {
    match general {
        GeneralName::DNSName(dns) if *dns == name => Ok(()),
        GeneralName::DNSName(dns) => Err(format!("`{dns}` is not the node's name")),
        GeneralName::IPAddress(bytes) => {
            let address = address(bytes).ok_or("it asks for an address that is none")?;
            if !node.addresses.contains(&address) {
                return Err(format!("`{address}` is not an address of the node"));
            }
            match nodes
                .iter()
                .find(|(other, facts)| *other != name && facts.addresses.contains(&address))
            {
                Some((other, _)) => Err(format!("`{address}` is an address of the node `{other}` too")),
                None => Ok(()),
            }
        }
        other => Err(format!(
            "it asks for `{other}`, which is neither a host name nor an address"
        )),
    }
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    let v6 = <[u8; 16]>::try_from(bytes).map(IpAddr::from);
    v4.or(v6).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::ByteString;
    use k8s_openapi::api::certificates::v1::{
        CertificateSigningRequestCondition, CertificateSigningRequestSpec, CertificateSigningRequestStatus,
    };
    use rcgen::{CertificateParams, DnType, KeyPair, SanType};

    const NODE: &str = "cp-0";

    fn pem(common: &str, organizations: &[&str], sans: &[SanType]) -> Vec<u8> {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, common);
        for organization in organizations {
            params.distinguished_name.push(DnType::OrganizationName, *organization);
        }
        params.subject_alt_names = sans.to_vec();
        params
            .serialize_request(&KeyPair::generate().unwrap())
            .unwrap()
            .pem()
            .unwrap()
            .into_bytes()
    }

    fn dns(name: &str) -> SanType {
        SanType::DnsName(name.try_into().unwrap())
    }

    fn ip(last: u8) -> SanType {
        SanType::IpAddress([10, 0, 0, last].into())
    }

    fn request(pem: Vec<u8>) -> CertificateSigningRequest {
        CertificateSigningRequest {
            spec: CertificateSigningRequestSpec {
                request: ByteString(pem),
                signer_name: SIGNER.into(),
                username: Some("system:node:cp-0".into()),
                groups: Some(vec!["system:nodes".into(), "system:authenticated".into()]),
                usages: Some(vec![
                    "digital signature".into(),
                    "key encipherment".into(),
                    "server auth".into(),
                ]),
                ..CertificateSigningRequestSpec::default()
            },
            ..CertificateSigningRequest::default()
        }
    }

    fn good() -> CertificateSigningRequest {
        request(pem("system:node:cp-0", &["system:nodes"], &[dns(NODE), ip(1)]))
    }

    fn nodes() -> Nodes {
        let facts = |last| NodeFacts {
            addresses: vec![[10, 0, 0, last].into()],
            ..NodeFacts::default()
        };
        [
            (NODE.to_owned(), facts(1)),
            ("worker-0".to_owned(), facts(2)),
            ("new".to_owned(), NodeFacts::default()),
        ]
        .into()
    }

    #[test]
    fn a_nodes_own_request_is_approved() {
        assert_eq!(judge(&good(), &nodes()), Verdict::Approve);
        let mut newer = good();
        newer.spec.usages = Some(vec!["digital signature".into(), "server auth".into()]);
        assert_eq!(judge(&newer, &nodes()), Verdict::Approve);
    }

    #[test]
    fn what_is_not_its_business_is_ignored() {
        type Edit = fn(&mut CertificateSigningRequest);
        let cases: &[(&str, Edit)] = &[
            ("another signer", |r| {
                r.spec.signer_name = "kubernetes.io/kube-apiserver-client-kubelet".into();
            }),
            ("not a node", |r| {
                r.spec.username = Some("system:serviceaccount:default:x".into());
            }),
            ("not in the group", |r| {
                r.spec.groups = Some(vec!["system:authenticated".into()]);
            }),
            ("decided", |r| {
                let approved = CertificateSigningRequestCondition {
                    type_: "Approved".into(),
                    ..Default::default()
                };
                r.status = Some(CertificateSigningRequestStatus {
                    conditions: Some(vec![approved]),
                    ..Default::default()
                });
            }),
        ];
        for (what, edit) in cases {
            let mut csr = good();
            edit(&mut csr);
            assert_eq!(judge(&csr, &nodes()), Verdict::Ignore, "{what}");
        }
    }

    #[test]
    fn what_comes_before_its_node_waits() {
        for (what, name) in [("not known", "other"), ("without address", "new")] {
            let mut csr = good();
            csr.spec.username = Some(format!("system:node:{name}"));
            assert_eq!(judge(&csr, &nodes()), Verdict::Wait, "{what}");
        }
    }

    #[test]
    fn what_a_node_must_not_have_is_denied() {
        let org: &[&str] = &["system:nodes"];
        let user = "system:node:cp-0";
        let bad = |pem| request(pem);
        let mut client_auth = good();
        client_auth.spec.usages.as_mut().unwrap().push("client auth".into());
        let mut no_server = good();
        no_server.spec.usages = Some(vec!["digital signature".into()]);
        let cases = [
            (
                "another's common name",
                bad(pem("system:node:worker-0", org, &[dns(NODE)])),
                "common name",
            ),
            (
                "masters",
                bad(pem(user, &["system:masters"], &[dns(NODE)])),
                "organization",
            ),
            (
                "masters too",
                bad(pem(user, &["system:nodes", "system:masters"], &[dns(NODE)])),
                "organization",
            ),
            ("another's name", bad(pem(user, org, &[dns("worker-0")])), "`worker-0`"),
            (
                "a Service's name",
                bad(pem(user, org, &[dns(NODE), dns("kubernetes.default")])),
                "`kubernetes.default`",
            ),
            ("another's address", bad(pem(user, org, &[ip(2)])), "`10.0.0.2`"),
            ("no name", bad(pem(user, org, &[])), "no name"),
            (
                "an email address",
                bad(pem(user, org, &[SanType::Rfc822Name("a@b.c".try_into().unwrap())])),
                "neither",
            ),
            ("not PEM", bad(b"x".to_vec()), "PKCS #10"),
            ("client auth", client_auth, "usages"),
            ("no server auth", no_server, "usages"),
        ];
        for (what, csr, word) in cases {
            match judge(&csr, &nodes()) {
                Verdict::Deny(why) => assert!(why.contains(word), "{what}: {why}"),
                other => panic!("{what}: {other:?}"),
            }
        }
    }

    #[test]
    fn an_address_that_two_nodes_claim_is_nobodys() {
        let mut all = nodes();
        all.insert(
            "thief".into(),
            NodeFacts {
                addresses: vec![[10, 0, 0, 1].into()],
                ..NodeFacts::default()
            },
        );
        assert!(matches!(judge(&good(), &all), Verdict::Deny(why) if why.contains("`thief`")));
    }
}
