//! The files of a control-plane machine.

use std::collections::BTreeSet;
use std::fmt;

use jiff::Timestamp;
use kprov_types::node::{Bundle, ClusterSecrets, ControlPlaneSettings, KeyPairPem, Member};

use super::{
    Authority, Credentials, KUBELET_CLIENT, Kubeconfig, Leaf, NODE_CLIENT, NODE_CLIENT_GROUP, PkiError, Usage,
    is_current, issue,
};
use crate::{config_files, paths};

/// A file as it should be on the machine, owned by root. `Debug` never prints the content.
#[derive(Clone, PartialEq, Eq)]
pub struct FileToWrite {
    /// Absolute path.
    pub path: String,
    /// Permission bits.
    pub mode: u32,
    /// The whole content.
    pub content: String,
}

impl fmt::Debug for FileToWrite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "FileToWrite({} {:o}, {} bytes)",
            self.path,
            self.mode,
            self.content.len()
        )
    }
}

const PUBLIC: u32 = 0o644;
const SECRET: u32 = 0o600;

#[derive(Clone, Copy)]
enum Ca {
    Cluster,
    Etcd,
    FrontProxy,
}

impl Ca {
    const fn of(self, secrets: &ClusterSecrets) -> &KeyPairPem {
        match self {
            Self::Cluster => &secrets.ca,
            Self::Etcd => &secrets.etcd_ca,
            Self::FrontProxy => &secrets.front_proxy_ca,
        }
    }
}

/// Every file that a control-plane machine needs, as it should be at `now`, in the order in which they're written.
///
/// Level-triggered: `existing` gives what a path holds now, and a certificate that is still [current](is_current) is
/// handed back as it is, with its key. On a machine that has all files already, the result equals what is there until a
/// certificate has used two thirds of its life, a name or address changes, or the CA does. Whoever calls writes what
/// differs; running components read certificates again by themselves.
///
/// Among them are the configuration files of API servers of the bundle's own minor; other minors' are given by
/// [`config_files`](fn@crate::config_files).
pub fn control_plane_files(
    bundle: &Bundle,
    machine: &Member,
    existing: &dyn Fn(&str) -> Option<String>,
    now: Timestamp,
) -> Result<Vec<FileToWrite>, PkiError> {
    let Bundle { settings, secrets } = bundle;
    let mut files = Vec::new();
    for (name, pair, suffix) in [
        ("ca", &secrets.ca, "crt"),
        ("front-proxy-ca", &secrets.front_proxy_ca, "crt"),
        ("etcd/ca", &secrets.etcd_ca, "crt"),
        ("sa", &secrets.service_account, "pub"),
    ] {
        push_pair(&mut files, &paths::pki(name), suffix, pair);
    }
    for (name, ca, leaf) in leaves(settings, machine) {
        let path = paths::pki(name);
        let ca = ca.of(secrets);
        let kept = existing(&format!("{path}.crt"))
            .zip(existing(&format!("{path}.key")))
            .map(|(certificate, key)| KeyPairPem { certificate, key })
            .filter(|pair| is_current(pair, ca, &leaf, now));
        let pair = kept.map_or_else(|| issue(ca, &leaf, now), Ok)?;
        push_pair(&mut files, &path, "crt", &pair);
    }
    for (path, user, certificate) in [
        (
            paths::CONTROLLER_MANAGER_KUBECONFIG,
            "system:kube-controller-manager",
            "controller-manager/client",
        ),
        (paths::SCHEDULER_KUBECONFIG, "system:kube-scheduler", "scheduler/client"),
        (paths::KUBELET_KUBECONFIG, "kubelet", "kubelet/client"),
        (paths::NODE_KUBECONFIG, NODE_CLIENT, "control-plane-node/client"),
    ] {
        let path_of = |suffix: &str| format!("{}.{suffix}", paths::pki(certificate));
        let content = Kubeconfig {
            cluster: settings.cluster.as_str(),
            user,
            server: paths::LOCAL_API,
            // Inside the file: the scheduler's pod sees no other file of the CA's directory.
            authority: Authority::Inline(&secrets.ca.certificate),
            credentials: Credentials::Files {
                certificate: &path_of("crt"),
                key: &path_of("key"),
            },
        }
        .render();
        files.push(FileToWrite {
            path: path.to_owned(),
            mode: SECRET,
            content,
        });
    }
    files.extend(config_files::common(&secrets.encryption_key));
    files.extend(config_files::config_files(settings.kubernetes.minor())?);
    Ok(files)
}

fn push_pair(files: &mut Vec<FileToWrite>, path: &str, suffix: &str, pair: &KeyPairPem) {
    files.push(FileToWrite {
        path: format!("{path}.{suffix}"),
        mode: PUBLIC,
        content: pair.certificate.clone(),
    });
    files.push(FileToWrite {
        path: format!("{path}.key"),
        mode: SECRET,
        content: pair.key.clone(),
    });
}

/// The certificates of a control-plane machine, by their path below the directory of certificates.
fn leaves(settings: &ControlPlaneSettings, machine: &Member) -> Vec<(&'static str, Ca, Leaf)> {
    let own = [machine.name.to_string(), machine.address.to_string()];
    let local = ["localhost".to_owned(), "127.0.0.1".to_owned()];
    let server = |common_name: &str, usage, names: BTreeSet<String>| Leaf {
        common_name: common_name.to_owned(),
        organization: None,
        usage,
        names,
    };
    let domain = &settings.network.dns_domain;
    let mut api_names: BTreeSet<String> = own.iter().chain(&local).cloned().collect();
    api_names.extend(["kubernetes", "kubernetes.default", "kubernetes.default.svc"].map(str::to_owned));
    api_names.insert(format!("kubernetes.default.svc.{domain}"));
    api_names.insert(settings.network.api_service().to_string());
    api_names.insert(settings.endpoint.host.clone());
    let etcd_names: BTreeSet<String> = own.into_iter().chain(local).collect();
    let name = machine.name.as_str();
    let client = |common_name: &str, organization| Leaf::client(common_name, organization);
    vec![
        (
            "apiserver",
            Ca::Cluster,
            server("kube-apiserver", Usage::Server, api_names),
        ),
        ("apiserver-kubelet-client", Ca::Cluster, client(KUBELET_CLIENT, None)),
        (
            "apiserver-etcd-client",
            Ca::Etcd,
            client("kube-apiserver-etcd-client", None),
        ),
        ("front-proxy-client", Ca::FrontProxy, client("front-proxy-client", None)),
        (
            "etcd/server",
            Ca::Etcd,
            server(name, Usage::ServerAndClient, etcd_names.clone()),
        ),
        ("etcd/peer", Ca::Etcd, server(name, Usage::ServerAndClient, etcd_names)),
        (
            "etcd/healthcheck-client",
            Ca::Etcd,
            client("kube-etcd-healthcheck-client", None),
        ),
        (
            "controller-manager/client",
            Ca::Cluster,
            client("system:kube-controller-manager", None),
        ),
        ("scheduler/client", Ca::Cluster, client("system:kube-scheduler", None)),
        (
            "kubelet/client",
            Ca::Cluster,
            client(&format!("system:node:{name}"), Some("system:nodes")),
        ),
        (
            "control-plane-node/client",
            Ca::Cluster,
            client(NODE_CLIENT, Some(NODE_CLIENT_GROUP)),
        ),
    ]
}
