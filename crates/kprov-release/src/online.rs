//! Making a payload that refers to the official registry and download sites, each by digest, and carries kprov's programs only.
//!
//! What is written here was read over TLS once; from then on the digests in the (signed) `release.json` decide.

use std::collections::BTreeMap;

use camino::Utf8PathBuf;
use kprov_types::release::{API_VERSION, Arch, FileSource, HostFile, ImageComponent, Release, ReleaseImage};
use kprov_types::{Digest, KubernetesVersion, Minor};
use reqwest::{Client, StatusCode, header};

use crate::create::{self, CreateError, CreateOptions};
use crate::digest;
use crate::fetch::{self, FetchError};
use crate::keys::SigningKey;
use crate::output::{self, OutputError};
use crate::payload::Payload;

/// Where Kubernetes publishes its programs.
pub const DOWNLOAD_SITE: &str = "https://dl.k8s.io";
/// Where Kubernetes publishes its images.
pub const REGISTRY: &str = "registry.k8s.io";

/// Manifests and indexes, in OCI's and Docker's form.
const MANIFEST_TYPES: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json";

/// Programs that are published by projects of their own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Published {
    /// The version, without `v`.
    pub version: String,
    /// Below it each version has a directory `v<version>`.
    pub site: String,
}

impl Published {
    fn new(version: &str, site: &str) -> Self {
        Self {
            version: version.into(),
            site: site.into(),
        }
    }

    fn url(&self, name: &str) -> String {
        format!("{}/v{}/{name}", self.site.trim_end_matches('/'), self.version)
    }
}

/// What runs containers on machines, and where it is published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Runtime {
    /// containerd, its shim and `ctr`.
    pub containerd: Published,
    /// runc.
    pub runc: Published,
    /// The CNI plugins.
    pub cni_plugins: Published,
}

impl Runtime {
    /// The default for a Kubernetes version, from the projects' own release pages.
    pub fn for_kubernetes(version: &KubernetesVersion) -> Self {
        // Kubelets before 1.23 speak CRI v1alpha2 only, which containerd 2 no longer does.
        let containerd = if version.minor() < Minor::v1(23) {
            "1.7.27"
        } else {
            "2.1.4"
        };
        Self {
            containerd: Published::new(containerd, "https://github.com/containerd/containerd/releases/download"),
            runc: Published::new("1.3.0", "https://github.com/opencontainers/runc/releases/download"),
            cni_plugins: Published::new(
                "1.7.1",
                "https://github.com/containernetworking/plugins/releases/download",
            ),
        }
    }
}

/// What a payload refers to.
#[derive(Clone, Debug)]
pub struct OnlineOptions {
    /// The Kubernetes version.
    pub version: KubernetesVersion,
    /// The architectures to have host files for; images are for all that the registry has.
    pub archs: Vec<Arch>,
    /// As [`DOWNLOAD_SITE`].
    pub download_site: String,
    /// As [`REGISTRY`]: host, and port where it has one. Plain HTTP is used with this machine only.
    pub registry: String,
    /// containerd, runc, CNI plugins.
    pub runtime: Runtime,
    /// The payload's directory: absent, empty, or the same payload.
    pub out: Utf8PathBuf,
    /// The key to sign with; the payload is unsigned without.
    pub signing_key: Option<SigningKey>,
    /// See [`Release::minimum_from`].
    pub minimum_from: Option<KubernetesVersion>,
    /// See [`Release::advisories`].
    pub advisories: Vec<String>,
    /// Where `kprov-node` and `kprov-operator` are, which nobody publishes and the payload carries.
    pub kprov_programs: Option<Utf8PathBuf>,
    /// Leaves those two out; see [`CreateOptions::without_kprov`].
    pub without_kprov: bool,
    /// See [`CreateOptions::reuse`].
    pub reuse: Vec<Utf8PathBuf>,
}

impl OnlineOptions {
    /// The official sources, for one version and architecture.
    pub fn official(version: KubernetesVersion, arch: Arch, out: Utf8PathBuf) -> Self {
        Self {
            archs: vec![arch],
            download_site: DOWNLOAD_SITE.into(),
            registry: REGISTRY.into(),
            runtime: Runtime::for_kubernetes(&version),
            version,
            out,
            signing_key: None,
            minimum_from: None,
            advisories: Vec::new(),
            kprov_programs: None,
            without_kprov: false,
            reuse: Vec::new(),
        }
    }
}

/// Why an online payload could not be made.
#[derive(Debug, thiserror::Error)]
pub enum OnlineError {
    /// kprov does not know which etcd, CoreDNS and pause image belong to this version.
    #[error("Kubernetes `{0}` is not known; there are 1.20 and 1.29 to 1.37")]
    UnknownMinor(KubernetesVersion),
    /// Nothing was published under this version.
    #[error("version `{version}` of `{name}` does not exist: {url} answers 404")]
    NoSuchVersion {
        /// The program or image.
        name: String,
        /// The version.
        version: String,
        /// What was asked for.
        url: String,
    },
    /// Something could not be fetched.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// A checksum file does not have the checksum.
    #[error("{url} has no SHA-256 of `{name}`")]
    NoChecksum {
        /// The file it should be of.
        name: String,
        /// The checksum file.
        url: String,
    },
    /// The site does not say how large a file is.
    #[error("{url} does not say its size")]
    NoSize {
        /// The file.
        url: String,
    },
    /// A registry's answer has another digest than it says.
    #[error("{url} says its digest is `{said}`, but it is `{found}`")]
    RegistryDigest {
        /// The manifest.
        url: String,
        /// What the registry said.
        said: String,
        /// What it is.
        found: Digest,
    },
    /// kprov's own programs could not be taken.
    #[error(transparent)]
    Kprov(#[from] CreateError),
    /// The payload could not be written.
    #[error(transparent)]
    Output(#[from] OutputError),
}

impl OnlineError {
    /// What the person may do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NoSuchVersion { .. } => Some("look up which versions were published".into()),
            Self::Fetch(FetchError::Request { .. }) => {
                Some("without the internet, make a release from a directory of programs".into())
            }
            Self::Kprov(error) => error.hint(),
            Self::Output(error) => error.hint(),
            _ => None,
        }
    }
}

/// The images that belong to one minor version.
struct Companions {
    minor: u64,
    etcd: &'static str,
    coredns: &'static str,
    pause: &'static str,
}

const fn companions(minor: u64, etcd: &'static str, coredns: &'static str, pause: &'static str) -> Companions {
    Companions {
        minor,
        etcd,
        coredns,
        pause,
    }
}

/// As kubeadm has them in its constants (`cmd/kubeadm/app/constants`, the latest patch of each minor that was looked at).
const COMPANIONS: &[Companions] = &[
    companions(20, "3.4.13-0", "1.7.0", "3.2"),
    companions(29, "3.5.16-0", "v1.11.1", "3.9"),
    companions(30, "3.5.15-0", "v1.11.3", "3.9"),
    companions(31, "3.5.24-0", "v1.11.3", "3.10"),
    companions(32, "3.5.24-0", "v1.11.3", "3.10"),
    companions(33, "3.5.24-0", "v1.12.0", "3.10"),
    companions(34, "3.6.5-0", "v1.12.1", "3.10.1"),
    companions(35, "3.6.6-0", "v1.13.1", "3.10.1"),
    companions(36, "3.6.8-0", "v1.14.2", "3.10.2"),
    // Not published when this was written; 1.36's work with it.
    companions(37, "3.6.8-0", "v1.14.2", "3.10.2"),
];

/// The repository (without registry) and tag of a component.
fn image_name(component: ImageComponent, version: &KubernetesVersion, companions: &Companions) -> (String, String) {
    let Companions {
        etcd, coredns, pause, ..
    } = companions;
    let name = component.as_str();
    match component {
        ImageComponent::Etcd => (name.into(), (*etcd).into()),
        ImageComponent::Pause => (name.into(), (*pause).into()),
        // CoreDNS has a path of its own since 1.21.
        ImageComponent::Coredns if version.minor() < Minor::v1(21) => (name.into(), (*coredns).into()),
        ImageComponent::Coredns => (format!("{name}/{name}"), (*coredns).into()),
        _ => (name.into(), create::tag(&version.tag())),
    }
}

const COMPONENTS: [ImageComponent; 7] = [
    ImageComponent::KubeApiserver,
    ImageComponent::KubeControllerManager,
    ImageComponent::KubeScheduler,
    ImageComponent::KubeProxy,
    ImageComponent::Etcd,
    ImageComponent::Coredns,
    ImageComponent::Pause,
];

/// Makes a payload that carries nothing but kprov's own programs. Downloads manifests and checksums only.
pub async fn create_online(options: &OnlineOptions) -> Result<Payload, OnlineError> {
    let OnlineOptions {
        version,
        archs,
        out,
        signing_key,
        minimum_from,
        advisories,
        ..
    } = options;
    let minor = version.minor();
    let companions = COMPANIONS
        .iter()
        .find(|c| Minor::v1(c.minor) == minor)
        .ok_or_else(|| OnlineError::UnknownMinor(version.clone()))?;
    output::check_place(out)?;
    let client = fetch::client().map_err(FetchError::Client)?;

    let mut images = BTreeMap::new();
    let mut host_files = Vec::new();
    let new = output::NewDirectory::beside(out)?;
    for arch in archs {
        let options = carried_options(options, *arch);
        let root = new.path().to_owned();
        // A directory has programs for one architecture; of several, all but one are refused.
        let carried = tokio::task::spawn_blocking(move || create::carry_kprov(&options, &root));
        let failed = |cause| OutputError::Write {
            path: new.path().to_owned(),
            source: std::io::Error::other(cause),
        };
        let carried = carried.await.map_err(failed)??;
        images.extend(carried.images);
        host_files.extend(carried.host_files);
    }
    for component in COMPONENTS {
        let (name, tag) = image_name(component, version, companions);
        let digest = resolve_image(&client, &options.registry, &name, &tag).await?;
        let reference = format!("{}/{name}:{tag}", options.registry);
        images.insert(
            component,
            ReleaseImage {
                reference,
                digest,
                version: Some(tag.trim_start_matches('v').into()),
            },
        );
    }
    for arch in archs {
        host_files.extend(resolve_host_files(&client, options, *arch).await?);
    }
    host_files.sort_by(|a, b| (a.arch, &a.name).cmp(&(b.arch, &b.name)));
    let release = Release {
        api_version: API_VERSION.into(),
        kind: "Release".into(),
        kubernetes: version.clone(),
        images,
        host_files,
        minimum_from: minimum_from.clone(),
        advisories: advisories.clone(),
        // None of them is here to be asked.
        programs: BTreeMap::new(),
    };
    output::write_release(new.path(), &release, signing_key.as_ref())?;
    Ok(new.become_payload(out)?)
}

/// What the carried part of a payload is made from.
fn carried_options(options: &OnlineOptions, arch: Arch) -> CreateOptions {
    let OnlineOptions {
        version,
        out,
        kprov_programs,
        without_kprov,
        reuse,
        ..
    } = options.clone();
    CreateOptions {
        from: Vec::new(),
        version,
        out,
        arch,
        host_fallback: false,
        signing_key: None,
        minimum_from: None,
        advisories: Vec::new(),
        kprov_programs,
        without_kprov,
        reuse,
    }
}

/// Asks a registry for an image's digest: of the index where there is one.
async fn resolve_image(client: &Client, registry: &str, name: &str, tag: &str) -> Result<Digest, OnlineError> {
    let (host, path) = registry
        .split_once('/')
        .map_or((registry, String::new()), |(h, p)| (h, format!("{p}/")));
    // As container runtimes do it.
    let scheme = if is_this_machine(host) { "http" } else { "https" };
    let url = format!("{scheme}://{host}/v2/{path}{name}/manifests/{tag}");
    let request = client.get(&url).header(header::ACCEPT, MANIFEST_TYPES);
    let response = checked(request, &format!("{name}:{tag}"), name, tag, &url).await?;
    let said = response
        .headers()
        .get("docker-content-digest")
        .map(|v| v.to_str().unwrap_or_default().to_owned());
    let bytes = fetch::read_document(response, &format!("{name}:{tag}"), &url).await?;
    let found = digest::of_bytes(&bytes);
    match said {
        Some(said) if said != found.as_str() => Err(OnlineError::RegistryDigest { url, said, found }),
        _ => Ok(found),
    }
}

fn is_this_machine(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    matches!(name, "127.0.0.1" | "localhost" | "[::1]")
}

/// Sends a request; only 200 is an answer, and 404 means that there is no such version.
async fn checked(
    request: reqwest::RequestBuilder,
    file: &str,
    name: &str,
    version: &str,
    url: &str,
) -> Result<reqwest::Response, OnlineError> {
    let response = request.send().await.map_err(|source| FetchError::Request {
        file: file.into(),
        url: url.into(),
        source,
    })?;
    match response.status() {
        StatusCode::OK => Ok(response),
        StatusCode::NOT_FOUND => Err(OnlineError::NoSuchVersion {
            name: name.into(),
            version: version.into(),
            url: url.into(),
        }),
        status => Err(FetchError::Status {
            file: file.into(),
            url: url.into(),
            status,
        }
        .into()),
    }
}

/// One download and the host files that come of it.
struct Download {
    /// The project, for messages.
    name: &'static str,
    version: String,
    url: String,
    checksum: String,
    /// Host file names, each with the member of the archive it is.
    files: Vec<(&'static str, Option<&'static str>)>,
}

fn downloads(options: &OnlineOptions, arch: Arch) -> Vec<Download> {
    let OnlineOptions {
        version,
        download_site,
        runtime: Runtime {
            containerd,
            runc,
            cni_plugins,
        },
        ..
    } = options;
    let arch = arch.as_str();
    let kubernetes = |name: &'static str| {
        let url = format!(
            "{}/release/{}/bin/linux/{arch}/{name}",
            download_site.trim_end_matches('/'),
            version.tag()
        );
        let checksum = format!("{url}.sha256");
        Download {
            name,
            version: version.to_string(),
            url,
            checksum,
            files: vec![(name, None)],
        }
    };
    let containerd_url = containerd.url(&format!("containerd-{}-linux-{arch}.tar.gz", containerd.version));
    let cni_url = cni_plugins.url(&format!("cni-plugins-linux-{arch}-v{}.tgz", cni_plugins.version));
    vec![
        kubernetes("kubelet"),
        kubernetes("kubectl"),
        Download {
            name: "containerd",
            version: containerd.version.clone(),
            checksum: format!("{containerd_url}.sha256sum"),
            url: containerd_url,
            files: vec![
                ("containerd", Some("bin/containerd")),
                ("containerd-shim-runc-v2", Some("bin/containerd-shim-runc-v2")),
                ("ctr", Some("bin/ctr")),
            ],
        },
        Download {
            name: "runc",
            version: runc.version.clone(),
            url: runc.url(&format!("runc.{arch}")),
            checksum: runc.url("runc.sha256sum"),
            files: vec![("runc", None)],
        },
        Download {
            name: "cni-plugins",
            version: cni_plugins.version.clone(),
            checksum: format!("{cni_url}.sha256"),
            url: cni_url,
            files: vec![
                ("cni/bridge", Some("./bridge")),
                ("cni/host-local", Some("./host-local")),
                ("cni/loopback", Some("./loopback")),
                ("cni/portmap", Some("./portmap")),
            ],
        },
    ]
}

async fn resolve_host_files(
    client: &Client,
    options: &OnlineOptions,
    arch: Arch,
) -> Result<Vec<HostFile>, OnlineError> {
    let mut host_files = Vec::new();
    for Download {
        name,
        version,
        url,
        checksum,
        files,
    } in downloads(options, arch)
    {
        let response = checked(client.get(&checksum), name, name, &version, &checksum).await?;
        let sums = fetch::read_document(response, name, &checksum).await?;
        let file_name = url.rsplit('/').next().unwrap_or_default();
        let digest =
            checksum_in(&String::from_utf8_lossy(&sums), file_name).ok_or_else(|| OnlineError::NoChecksum {
                name: file_name.into(),
                url: checksum,
            })?;
        let head = checked(client.head(&url), name, name, &version, &url).await?;
        let length = head.headers().get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok());
        let size = length
            .and_then(|v| v.parse().ok())
            .ok_or_else(|| OnlineError::NoSize { url: url.clone() })?;
        host_files.extend(files.into_iter().map(|(name, member)| HostFile {
            name: name.into(),
            arch,
            digest: digest.clone(),
            size,
            source: FileSource::Url {
                url: url.clone(),
                member: member.map(str::to_owned),
            },
            version: Some(version.clone()),
        }));
    }
    Ok(host_files)
}

/// The SHA-256 of a file in a checksum file: alone, or in `sha256sum(1)`'s form with one file a line.
fn checksum_in(text: &str, file_name: &str) -> Option<Digest> {
    let lines = || text.lines().map(str::trim).filter(|l| !l.is_empty());
    let named = lines().find_map(|line| {
        let (sum, name) = line.split_once(char::is_whitespace)?;
        let name = name.trim_start().trim_start_matches('*').trim_start_matches("./");
        (name == file_name).then(|| Digest::from_hex(sum).ok()).flatten()
    });
    let alone = || {
        lines()
            .next()
            .filter(|_| lines().count() == 1)
            .and_then(|line| Digest::from_hex(line).ok())
    };
    named.or_else(alone)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksum_files() {
        let (a, b) = ("a".repeat(64), "b".repeat(64));
        let digest = |hex: &str| Some(Digest::from_hex(hex).unwrap());
        assert_eq!(checksum_in(&a, "kubelet"), digest(&a));
        assert_eq!(checksum_in(&format!("{a}\n"), "kubelet"), digest(&a));
        let list = format!("{a}  runc.arm64\n{b} *runc.amd64\n");
        assert_eq!(checksum_in(&list, "runc.amd64"), digest(&b));
        assert_eq!(checksum_in(&list, "runc.s390x"), None);
        assert_eq!(checksum_in(&format!("{a}\n{b}\n"), "kubelet"), None);
        assert_eq!(checksum_in("<html>", "kubelet"), None);
        assert_eq!(checksum_in("", "kubelet"), None);
    }

    #[test]
    fn plain_http_with_this_machine_only() {
        for host in ["127.0.0.1", "127.0.0.1:5000", "localhost:5000", "[::1]", "[::1]:5000"] {
            assert!(is_this_machine(host), "{host}");
        }
        for host in [
            "registry.k8s.io",
            "127.0.0.1.example.com",
            "localhost.example.com:80",
            "10.0.0.1:5000",
        ] {
            assert!(!is_this_machine(host), "{host}");
        }
    }

    #[test]
    fn image_names() {
        let name = |version: &str, component| {
            let version: KubernetesVersion = version.parse().unwrap();
            let companions = COMPANIONS
                .iter()
                .find(|c| Minor::v1(c.minor) == version.minor())
                .unwrap();
            let (name, tag) = image_name(component, &version, companions);
            format!("{name}:{tag}")
        };
        assert_eq!(name("1.36.3", ImageComponent::KubeProxy), "kube-proxy:v1.36.3");
        assert_eq!(name("1.36.3", ImageComponent::Coredns), "coredns/coredns:v1.14.2");
        assert_eq!(name("1.20.2", ImageComponent::Coredns), "coredns:1.7.0");
        assert_eq!(name("1.34.9", ImageComponent::Etcd), "etcd:3.6.5-0");
        assert_eq!(name("1.35.6", ImageComponent::Pause), "pause:3.10.1");
    }
}
