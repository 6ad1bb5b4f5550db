//! What tests with real etcd members share.

use std::net::IpAddr;

use jiff::Timestamp;
use kprov_bootstrap::pki::{self, Leaf, Usage};
use kprov_types::node::{ClusterSecrets, KeyPairPem, Member};

/// Members with addresses of this test process alone, so that several can run beside each other.
pub(crate) fn members(count: u8, net: u8) -> Vec<Member> {
    let [_, _, high, low] = std::process::id().to_be_bytes();
    let member = |n: u8| Member {
        name: format!("cp-{n}").parse().unwrap(),
        address: IpAddr::from([127, net + n, high, low.max(1)]),
    };
    (0..count).map(member).collect()
}

/// A member's certificate, for serving and for asking its peers.
pub(crate) fn server(secrets: &ClusterSecrets, member: &Member) -> KeyPairPem {
    let leaf = Leaf {
        common_name: member.name.to_string(),
        organization: None,
        usage: Usage::ServerAndClient,
        // A peer's certificate must be for the address it speaks from, which is this one on loopback.
        names: [member.address.to_string(), "127.0.0.1".into()].into(),
    };
    pki::issue(&secrets.etcd_ca, &leaf, Timestamp::now()).unwrap()
}
