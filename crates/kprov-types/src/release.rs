//! Release payloads: what one Kubernetes version consists of, as written in `release.json`.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::version::KubernetesVersion;

/// `apiVersion` of every document kprov reads or writes today.
pub const API_VERSION: &str = "kprov.io/v1alpha1";

/// A SHA-256 digest in OCI's form, `sha256:<64 hex digits>`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct Digest(String);

/// A text that is not a SHA-256 digest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a digest; expected `sha256:` and 64 lower-case hexadecimal digits")]
pub struct DigestError {
    /// The text as given.
    pub text: String,
}

impl Digest {
    /// From 64 lower-case hexadecimal digits.
    pub fn from_hex(hex: &str) -> Result<Self, DigestError> {
        format!("sha256:{hex}").parse()
    }

    /// From the hash itself.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        let digit = |nibble: u8| char::from(b"0123456789abcdef"[usize::from(nibble)]);
        Self(
            "sha256:"
                .chars()
                .chain(bytes.into_iter().flat_map(|b| [digit(b >> 4), digit(b & 15)]))
                .collect(),
        )
    }

    /// The 64 hexadecimal digits alone.
    pub fn hex(&self) -> &str {
        self.0.strip_prefix("sha256:").unwrap_or(&self.0)
    }

    /// The whole digest as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Digest {
    type Err = DigestError;
    fn from_str(text: &str) -> Result<Self, DigestError> {
        let good = text
            .strip_prefix("sha256:")
            .is_some_and(|hex| hex.len() == 64 && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')));
        if good {
            Ok(Self(text.to_owned()))
        } else {
            Err(DigestError { text: text.to_owned() })
        }
    }
}

impl TryFrom<String> for Digest {
    type Error = DigestError;
    fn try_from(text: String) -> Result<Self, DigestError> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> String {
        digest.0
    }
}

/// A processor architecture, in Go's and OCI's spelling.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Arch {
    /// x86-64.
    Amd64,
    /// 64-bit ARM.
    Arm64,
}

impl Arch {
    /// The architecture this program was built for; `None` where kprov supports none.
    pub const fn current() -> Option<Self> {
        if cfg!(target_arch = "x86_64") {
            Some(Self::Amd64)
        } else if cfg!(target_arch = "aarch64") {
            Some(Self::Arm64)
        } else {
            None
        }
    }

    /// Go's name for it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Amd64 => "amd64",
            Self::Arm64 => "arm64",
        }
    }
}

/// A component that runs as a container, from an image of the payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ImageComponent {
    /// kube-apiserver.
    KubeApiserver,
    /// kube-controller-manager.
    KubeControllerManager,
    /// kube-scheduler.
    KubeScheduler,
    /// kube-proxy, with the iptables programs it calls.
    KubeProxy,
    /// etcd.
    Etcd,
    /// CoreDNS; a payload may come without.
    Coredns,
    /// The container that holds a pod's namespaces.
    Pause,
    /// kprov's own operator.
    KprovOperator,
}

impl ImageComponent {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::KubeApiserver,
        Self::KubeControllerManager,
        Self::KubeScheduler,
        Self::KubeProxy,
        Self::Etcd,
        Self::Coredns,
        Self::Pause,
        Self::KprovOperator,
    ];

    /// The component's name, which is its binary's, image's and container's name too.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::KubeApiserver => "kube-apiserver",
            Self::KubeControllerManager => "kube-controller-manager",
            Self::KubeScheduler => "kube-scheduler",
            Self::KubeProxy => "kube-proxy",
            Self::Etcd => "etcd",
            Self::Coredns => "coredns",
            Self::Pause => "pause",
            Self::KprovOperator => "kprov-operator",
        }
    }

    /// Whether machines without the control-plane role need the image.
    pub const fn on_workers(self) -> bool {
        matches!(self, Self::KubeProxy | Self::Coredns | Self::Pause)
    }
}

/// One image of a release.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ReleaseImage {
    /// Registry, repository and tag, such as `registry.k8s.io/kube-apiserver:v1.36.3`.
    pub reference: String,
    /// The digest of its manifest (or index). Machines run nothing else under this reference.
    pub digest: Digest,
    /// The program's version as it printed it when the payload was made, where known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
}

impl ReleaseImage {
    /// `registry/repository:tag@sha256:...`: readable, and what runs is fixed by the digest.
    pub fn pinned(&self) -> String {
        format!("{}@{}", self.reference, self.digest)
    }

    /// `registry/repository`, without tag.
    pub fn repository(&self) -> &str {
        match self.reference.rsplit_once(':') {
            Some((repository, tag)) if !tag.contains('/') => repository,
            _ => &self.reference,
        }
    }

    /// The registry's host, the part before the first slash.
    pub fn registry(&self) -> &str {
        self.reference.split('/').next().unwrap_or_default()
    }
}

/// Where a host file's bytes come from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "from", rename_all = "camelCase")]
pub enum FileSource {
    /// The payload carries it as a blob.
    Carried,
    /// It is downloaded.
    #[serde(rename_all = "camelCase")]
    Url {
        /// Where from.
        url: String,
        /// For a tar archive (gzip): the member that is the file. The digest is the archive's then.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        member: Option<String>,
    },
}

/// A program that runs on the machine itself: kubelet, containerd and its shim, runc, CNI plugins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HostFile {
    /// Its file name: `kubelet`, `containerd`, `containerd-shim-runc-v2`, `runc`, `ctr`; CNI plugins as `cni/bridge`.
    pub name: String,
    /// The architecture it is for.
    pub arch: Arch,
    /// What is fetched has this digest; a different one is refused.
    pub digest: Digest,
    /// Size in bytes of what is fetched.
    pub size: u64,
    /// Where it comes from.
    pub source: FileSource,
    /// The program's version as it printed it when the payload was made, where known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
}

/// `release.json`: what one Kubernetes version consists of. Signed as bytes by `release.json.sig`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Release {
    /// [`API_VERSION`].
    pub api_version: String,
    /// `Release`.
    pub kind: String,
    /// The Kubernetes version.
    pub kubernetes: KubernetesVersion,
    /// Images by component.
    pub images: BTreeMap<ImageComponent, ReleaseImage>,
    /// Programs for the machines themselves.
    pub host_files: Vec<HostFile>,
    /// The lowest version a cluster may be upgraded from to this one, where the default (one minor) does not hold.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub minimum_from: Option<KubernetesVersion>,
    /// Security advisories this version fixes (CVE or GHSA ids).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub advisories: Vec<String>,
    /// Which flags and feature gates each program knows, by its name (`kube-apiserver`, `kubelet`), as its `--help` listed them
    /// when the payload was made. A program that could not be asked is missing.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub programs: BTreeMap<String, ProgramFacts>,
}

/// What a program can be told.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ProgramFacts {
    /// Its flags, without dashes, sorted.
    pub flags: Vec<String>,
    /// Its feature gates, sorted.
    pub feature_gates: Vec<String>,
}

impl Release {
    /// The image of a component, if the release has it.
    pub fn image(&self, component: ImageComponent) -> Option<&ReleaseImage> {
        self.images.get(&component)
    }

    /// The host files for one architecture.
    pub fn host_files_for(&self, arch: Arch) -> impl Iterator<Item = &HostFile> {
        self.host_files.iter().filter(move |f| f.arch == arch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_checked() {
        let hex = "a".repeat(64);
        assert_eq!(Digest::from_hex(&hex).unwrap().hex(), hex);
        let counted: [u8; 32] = std::array::from_fn(|i| u8::try_from(i * 8).unwrap());
        let digest = Digest::from_bytes(counted);
        assert_eq!(Digest::from_hex(digest.hex()).unwrap(), digest);
        assert!(digest.hex().starts_with("000810182028"), "{digest}");
        for bad in ["", "sha256:", "sha512:aa", &format!("sha256:{}", "A".repeat(64))] {
            assert!(bad.parse::<Digest>().is_err(), "{bad}");
        }
    }

    #[test]
    fn image_reference_parts() {
        let image = ReleaseImage {
            reference: "localhost:5000/kube-proxy".into(),
            digest: Digest::from_hex(&"0".repeat(64)).unwrap(),
            version: None,
        };
        assert_eq!(image.repository(), "localhost:5000/kube-proxy");
        assert_eq!(image.registry(), "localhost:5000");
        let tagged = ReleaseImage {
            reference: "localhost:5000/a/b:v1".into(),
            ..image
        };
        assert_eq!(tagged.repository(), "localhost:5000/a/b");
    }
}
