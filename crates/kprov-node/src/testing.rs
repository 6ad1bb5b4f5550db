//! Values that several modules' tests use.

use std::net::Ipv4Addr;

use kprov_types::machine::{Endpoint, Role};
use kprov_types::node::{
    Bundle, ClusterSecrets, ControlPlaneSettings, JoinToken, KeyPairPem, Member, NodeConfig, NodeNetwork,
    ReleaseSource, SetupIdentity,
};
use kprov_types::release::{API_VERSION, ImageComponent, ReleaseImage};
use kprov_types::{Digest, MachineName, Release};

use crate::config::Machine;

pub(crate) const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);

pub(crate) fn digest() -> Digest {
    Digest::from_hex(&"0".repeat(64)).unwrap()
}

pub(crate) fn release() -> Release {
    let components = [
        ImageComponent::KubeApiserver,
        ImageComponent::KubeControllerManager,
        ImageComponent::KubeScheduler,
        ImageComponent::KubeProxy,
        ImageComponent::Etcd,
        ImageComponent::Pause,
    ];
    let image = |c: ImageComponent| ReleaseImage {
        reference: format!("kprov.local/{}:v1.20.2", c.as_str()),
        digest: digest(),
        version: None,
    };
    Release {
        api_version: API_VERSION.into(),
        kind: "Release".into(),
        kubernetes: "1.20.2".parse().unwrap(),
        images: components.into_iter().map(|c| (c, image(c))).collect(),
        host_files: Vec::new(),
        minimum_from: None,
        advisories: Vec::new(),
        programs: std::collections::BTreeMap::new(),
    }
}

fn network() -> NodeNetwork {
    NodeNetwork {
        pods: "10.244.0.0/16".parse().unwrap(),
        services: "10.96.0.0/16".parse().unwrap(),
        dns_domain: "cluster.local".into(),
    }
}

fn endpoint() -> Endpoint {
    Endpoint {
        host: "10.0.0.100".into(),
        port: 6443,
    }
}

fn pair(name: &str) -> KeyPairPem {
    KeyPairPem {
        certificate: name.into(),
        key: String::new(),
    }
}

pub(crate) fn machine() -> Machine {
    let name = MachineName::new("demo-cp-0").unwrap();
    let config = NodeConfig {
        cluster: "demo".parse().unwrap(),
        machine: Some(name.clone()),
        role: Role::ControlPlane,
        address: None,
        labels: std::collections::BTreeMap::new(),
        endpoint: endpoint(),
        ca: "ca".into(),
        release: ReleaseSource {
            urls: vec!["http://10.0.0.100:10202".into()],
            digest: digest(),
        },
        join_token: Some(JoinToken {
            id: "abcdef".into(),
            secret: "0123456789abcdef".into(),
        }),
        setup: Some(SetupIdentity {
            certificate: String::new(),
            key: String::new(),
            client_fingerprint: String::new(),
        }),
        data: None,
        network: network(),
        virtual_address: None,
        taint: false,
    };
    Machine {
        config,
        name,
        address: ADDRESS,
    }
}

pub(crate) fn bundle() -> Bundle {
    Bundle {
        settings: ControlPlaneSettings {
            cluster: "demo".parse().unwrap(),
            kubernetes: "1.20.2".parse().unwrap(),
            release: release(),
            endpoint: endpoint(),
            network: network(),
            members: vec![Member {
                name: MachineName::new("demo-cp-0").unwrap(),
                address: ADDRESS.into(),
            }],
            release_digest: Digest::from_bytes([7; 32]),
            etcd_exists: false,
        },
        secrets: ClusterSecrets {
            ca: pair("ca"),
            etcd_ca: pair("etcd"),
            front_proxy_ca: pair("front-proxy"),
            service_account: pair("service-account"),
            encryption_key: String::new(),
        },
    }
}
