//! Clients of the Kubernetes API, always through this machine's own front on loopback.

use std::net::SocketAddr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use camino::Utf8Path;
use kprov_bootstrap::paths as kubernetes;
use kprov_front::FrontConfig;
use kube::config::{AuthInfo, KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use crate::files::{self, FileError, failed};
use crate::paths;

/// Why there is no client.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// A file cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// kubelet has no certificate yet.
    #[error("kubelet has no client certificate yet")]
    NoCertificate,
    /// A kubeconfig is no good.
    #[error("the kubeconfig `{path}` cannot be used")]
    Kubeconfig {
        /// The file.
        path: String,
        /// Why.
        #[source]
        source: Box<kube::config::KubeconfigError>,
    },
    /// The client cannot be made.
    #[error("no client of the API can be made")]
    Client(#[source] Box<kube::Error>),
}

/// The identities that kprov-node acts as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Identity {
    /// This machine's kubelet.
    Kubelet,
    /// kprov-node on a control-plane machine.
    ControlPlaneNode,
    /// The controller-manager, for its own Lease.
    ControllerManager,
    /// The scheduler, for its own Lease.
    Scheduler,
}

impl Identity {
    const fn kubeconfig(self) -> &'static str {
        match self {
            Self::Kubelet => kubernetes::KUBELET_KUBECONFIG,
            Self::ControlPlaneNode => kubernetes::NODE_KUBECONFIG,
            Self::ControllerManager => kubernetes::CONTROLLER_MANAGER_KUBECONFIG,
            Self::Scheduler => kubernetes::SCHEDULER_KUBECONFIG,
        }
    }
}

/// A client with the identity's certificate as it is on disk now. Certificates are rotated: make a new one now and then.
pub async fn client(identity: Identity) -> Result<Client, ApiError> {
    let config = config(identity).await?;
    Client::try_from(config).map_err(|e| ApiError::Client(Box::new(e)))
}

/// A client of the API server process at `address`, and of no other.
pub async fn client_at(identity: Identity, address: SocketAddr) -> Result<Client, ApiError> {
    let mut config = config(identity).await?;
    config.cluster_url = http::Uri::try_from(format!("https://{address}")).unwrap_or(config.cluster_url);
    config.tls_server_name = Some(FrontConfig::SERVER_NAME.into());
    Client::try_from(config).map_err(|e| ApiError::Client(Box::new(e)))
}

async fn config(identity: Identity) -> Result<Config, ApiError> {
    // In a build of the whole workspace there are two providers of cryptography; one has to be chosen.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let rotated = match identity {
        Identity::Kubelet => files::read_if_there(Utf8Path::new(paths::KUBELET_CLIENT))?,
        _ => None,
    };
    match rotated {
        Some(pem) => kubelet_config(&String::from_utf8_lossy(&pem)),
        None => from_kubeconfig(identity.kubeconfig()).await,
    }
}

async fn from_kubeconfig(path: &str) -> Result<Config, ApiError> {
    let error = |source| ApiError::Kubeconfig {
        path: path.to_owned(),
        source: Box::new(source),
    };
    if files::read_if_there(Utf8Path::new(path))?.is_none() {
        return Err(ApiError::NoCertificate);
    }
    let kubeconfig = Kubeconfig::read_from(path).map_err(error)?;
    Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
        .await
        .map_err(error)
}

/// From the file in which kubelet keeps its certificate and key together.
fn kubelet_config(pem: &str) -> Result<Config, ApiError> {
    let ca = Utf8Path::new(kubernetes::CA);
    let ca_pem = std::fs::read(ca).map_err(failed("read", ca))?;
    let roots = CertificateDer::pem_slice_iter(&ca_pem)
        .filter_map(Result::ok)
        .map(|der| der.to_vec())
        .collect();
    let (certificate, key) = split(pem).ok_or(ApiError::NoCertificate)?;
    let mut config = Config::new(http::Uri::from_static(kubernetes::LOCAL_API));
    config.root_cert = Some(roots);
    config.auth_info = AuthInfo {
        client_certificate_data: Some(STANDARD.encode(certificate)),
        client_key_data: Some(STANDARD.encode(key).into()),
        ..AuthInfo::default()
    };
    Ok(config)
}

/// Splits a file that holds certificates first and their key after them, as kubelet's certificate manager writes it.
fn split(pem: &str) -> Option<(&str, &str)> {
    const END: &str = "-----END CERTIFICATE-----";
    let end = pem.rfind(END)? + END.len();
    let (certificate, key) = pem.split_at_checked(end)?;
    key.contains("PRIVATE KEY-----").then_some((certificate, key))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn certificate_and_key_are_told_apart() {
        let certificate = "-----BEGIN CERTIFICATE-----\nAA\n-----END CERTIFICATE-----";
        let key = "\n-----BEGIN EC PRIVATE KEY-----\nBB\n-----END EC PRIVATE KEY-----\n";
        assert_eq!(split(&format!("{certificate}{key}")), Some((certificate, key)));
        assert_eq!(split(certificate), None);
        assert_eq!(split(key), None);
    }
}
