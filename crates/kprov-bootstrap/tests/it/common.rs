//! A cluster that every test starts from.

use std::net::IpAddr;

use jiff::Timestamp;
use kprov_bootstrap::generate_secrets;
use kprov_types::machine::{Endpoint, Role};
use kprov_types::names::{ClusterName, MachineName};
use kprov_types::node::{Bundle, ControlPlaneSettings, Member, NodeConfig, NodeNetwork, ReleaseSource};
use kprov_types::release::{API_VERSION, Digest, ImageComponent, Release, ReleaseImage};

pub(crate) fn now() -> Timestamp {
    "2026-05-01T12:00:00Z".parse().unwrap()
}

pub(crate) fn machine(name: &str) -> MachineName {
    MachineName::new(name).unwrap()
}

pub(crate) fn member(index: u8) -> Member {
    Member {
        name: machine(&format!("demo-cp-{index}")),
        address: IpAddr::from([10, 77, 0, 10 + index]),
    }
}

pub(crate) fn network() -> NodeNetwork {
    NodeNetwork {
        pods: "10.244.0.0/16".parse().unwrap(),
        services: "10.96.0.0/16".parse().unwrap(),
        dns_domain: "cluster.local".into(),
    }
}

pub(crate) fn release(kubernetes: &str, etcd: &str) -> Release {
    let image = |component: ImageComponent| ReleaseImage {
        reference: format!("kprov.local/{}:v{kubernetes}", component.as_str()),
        digest: Digest::from_hex(&"0".repeat(64)).unwrap(),
        version: (component == ImageComponent::Etcd).then(|| etcd.to_owned()),
    };
    Release {
        api_version: API_VERSION.into(),
        kind: "Release".into(),
        kubernetes: kubernetes.parse().unwrap(),
        images: ImageComponent::ALL.into_iter().map(|c| (c, image(c))).collect(),
        host_files: Vec::new(),
        minimum_from: None,
        advisories: Vec::new(),
        programs: std::collections::BTreeMap::new(),
    }
}

/// A cluster with `members` control-plane machines.
pub(crate) fn settings(kubernetes: &str, etcd: &str, members: u8) -> ControlPlaneSettings {
    ControlPlaneSettings {
        cluster: ClusterName::new("demo").unwrap(),
        kubernetes: kubernetes.parse().unwrap(),
        release: release(kubernetes, etcd),
        endpoint: Endpoint {
            host: "10.77.0.1".into(),
            port: 6443,
        },
        network: network(),
        members: (0..members).map(member).collect(),
        release_digest: Digest::from_bytes([7; 32]),
        etcd_exists: false,
    }
}

pub(crate) fn bundle(settings: ControlPlaneSettings, now: Timestamp) -> Bundle {
    let secrets = generate_secrets(&settings.cluster, now).unwrap();
    Bundle { settings, secrets }
}

pub(crate) fn node_config(role: Role, taint: bool) -> NodeConfig {
    NodeConfig {
        cluster: ClusterName::new("demo").unwrap(),
        machine: None,
        role,
        address: None,
        labels: std::collections::BTreeMap::new(),
        endpoint: Endpoint {
            host: "10.77.0.1".into(),
            port: 6443,
        },
        ca: String::new(),
        release: ReleaseSource {
            urls: Vec::new(),
            digest: Digest::from_hex(&"0".repeat(64)).unwrap(),
        },
        join_token: None,
        setup: None,
        data: None,
        network: network(),
        virtual_address: None,
        taint,
    }
}
