//! What a machine is told: its first-boot configuration, and for control-plane machines the bundle.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr};

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

use crate::machine::{DataVolume, Endpoint, Role};
use crate::names::{ClusterName, MachineName};
use crate::release::{Digest, Release};
use crate::version::KubernetesVersion;

/// Where kprov-node finds its first-boot configuration.
pub const NODE_CONFIG_PATH: &str = "/etc/kprov/node.json";

/// First-boot configuration of one machine. Carries no long-lived secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NodeConfig {
    /// The cluster.
    pub cluster: ClusterName,
    /// The machine's name; its host name where left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<MachineName>,
    /// The machine's role.
    pub role: Role,
    /// The machine's own address in the cluster, where it's not the one that it sends from by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<Ipv4Addr>,
    /// Labels that its Node registers with.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// The API endpoint that clients outside use; workers' fronts begin with it.
    pub endpoint: Endpoint,
    /// The cluster CA's certificate, PEM.
    pub ca: String,
    /// The release to run at first: where from, and which bytes.
    pub release: ReleaseSource,
    /// For machines that join by TLS bootstrap.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub join_token: Option<JoinToken>,
    /// For machines that wait for a bundle.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub setup: Option<SetupIdentity>,
    /// The data disk, where the machine has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<DataVolume>,
    /// What every machine of the cluster must agree on.
    pub network: NodeNetwork,
    /// On control-plane machines: the address of the API that one of them at a time has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub virtual_address: Option<Ipv4Addr>,
    /// Register with the `node-role.kubernetes.io/control-plane:NoSchedule` taint.
    #[serde(default)]
    pub taint: bool,
}

/// Address ranges as machines need them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeNetwork {
    /// The pods' range of the whole cluster.
    pub pods: Ipv4Net,
    /// The Services' range.
    pub services: Ipv4Net,
    /// The cluster's DNS domain.
    pub dns_domain: String,
}

impl NodeNetwork {
    /// The Service address of the API (the first of the range).
    pub fn api_service(&self) -> std::net::Ipv4Addr {
        nth(self.services, 1)
    }

    /// The Service address of cluster DNS (the tenth of the range).
    pub fn dns_service(&self) -> std::net::Ipv4Addr {
        nth(self.services, 10)
    }
}

fn nth(net: Ipv4Net, n: u32) -> std::net::Ipv4Addr {
    std::net::Ipv4Addr::from(u32::from(net.network()) + n)
}

/// Where a machine gets its release from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ReleaseSource {
    /// Base URLs, tried in order: each offers `release.json`, `blobs/` and `v2/` (see `kprov release serve`).
    pub urls: Vec<String>,
    /// The digest of `release.json`; different bytes are refused. It pins every other digest.
    pub digest: Digest,
}

/// A Kubernetes bootstrap token, `id.secret`. Never printed.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct JoinToken {
    /// Six characters of `[a-z0-9]`.
    pub id: String,
    /// Sixteen characters of `[a-z0-9]`.
    pub secret: String,
}

impl JoinToken {
    /// As kubelet expects it in a kubeconfig.
    pub fn bearer(&self) -> String {
        format!("{}.{}", self.id, self.secret)
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "JoinToken({}.…)", self.id)
    }
}

/// What identifies one machine until it is set up: the setup endpoint's own certificate and the one client it trusts.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SetupIdentity {
    /// The machine's certificate for the setup endpoint, PEM.
    pub certificate: String,
    /// Its key, PEM (PKCS #8).
    pub key: String,
    /// SHA-256 over the DER of the one client certificate that is let in, as hexadecimal digits.
    pub client_fingerprint: String,
}

impl fmt::Debug for SetupIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SetupIdentity")
            .field("client_fingerprint", &self.client_fingerprint)
            .finish_non_exhaustive()
    }
}

/// A certificate with its private key, both PEM. `Debug` never prints the key.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyPairPem {
    /// The certificate; for a bare key pair, the public key.
    pub certificate: String,
    /// The private key, PKCS #8.
    pub key: String,
}

impl fmt::Debug for KeyPairPem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyPairPem").finish_non_exhaustive()
    }
}

/// A cluster's own secrets: everything else is issued from them.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ClusterSecrets {
    /// Signs API serving, kubelet and client certificates.
    pub ca: KeyPairPem,
    /// Signs etcd's server, peer and client certificates.
    pub etcd_ca: KeyPairPem,
    /// Signs the aggregation layer's client certificate.
    pub front_proxy_ca: KeyPairPem,
    /// Signs ServiceAccount tokens (public key and private key).
    pub service_account: KeyPairPem,
    /// Encrypts Secrets at rest: 32 bytes, base64.
    pub encryption_key: String,
}

impl fmt::Debug for ClusterSecrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClusterSecrets").finish_non_exhaustive()
    }
}

/// A control-plane machine as all of them know each other.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Its name.
    pub name: MachineName,
    /// Its address.
    pub address: IpAddr,
}

/// How a cluster's control plane is set up: everything that its manifests and certificates are made from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ControlPlaneSettings {
    /// The cluster.
    pub cluster: ClusterName,
    /// The Kubernetes version it starts with.
    pub kubernetes: KubernetesVersion,
    /// The release it starts with.
    pub release: Release,
    /// The digest of that release's `release.json`.
    pub release_digest: Digest,
    /// The API endpoint for clients outside.
    pub endpoint: Endpoint,
    /// Address ranges.
    pub network: NodeNetwork,
    /// All control-plane machines, in order of their names. The first one begins.
    pub members: Vec<Member>,
    /// Whether the cluster has run before: a machine that is set up now then joins its etcd, and never begins another.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub etcd_exists: bool,
}

impl ControlPlaneSettings {
    /// The same cluster, at another release.
    #[must_use]
    pub fn with_release(&self, release: Release, digest: Digest) -> Self {
        Self {
            kubernetes: release.kubernetes.clone(),
            release,
            release_digest: digest,
            ..self.clone()
        }
    }
}

/// What a control-plane machine waits for: delivered by `kprov up` over mutually pinned TLS, kept readable by root alone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Bundle {
    /// How the control plane is set up.
    pub settings: ControlPlaneSettings,
    /// The cluster's secrets.
    pub secrets: ClusterSecrets,
}

/// What the setup endpoint tells (`GET /v1/status`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SetupStatus {
    /// The step the machine is in.
    pub step: SetupStep,
    /// More in words: what it waits for, or the last error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// Whether a bundle was accepted, and its SHA-256.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bundle: Option<Digest>,
    /// What the host lacks, each in words.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub host_findings: Vec<String>,
}

/// The steps of setting a machine up, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SetupStep {
    /// kprov-node runs.
    Started,
    /// Fetching the release's host files.
    Fetching,
    /// Starting containerd and pulling images.
    Images,
    /// Waiting for the bundle.
    Waiting,
    /// Starting etcd.
    Etcd,
    /// Starting the control plane.
    ControlPlane,
    /// Set up; the endpoint closes soon.
    Done,
}
