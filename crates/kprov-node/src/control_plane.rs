//! What a control-plane machine does once it has its bundle: certificates and files, etcd, the standby control plane.

use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};
use kprov_bootstrap::manifests::{EtcdStart, ManifestError};
use kprov_bootstrap::paths as kubernetes;
use kprov_bootstrap::pki::PkiError;
use kprov_types::node::{Bundle, Member};
use kprov_types::release::ImageComponent;

use crate::config::Machine;
use crate::etcd::{self, EtcdClient};
use crate::files::{self, FileError, failed};
use crate::https::{self, TlsError};
use crate::images::Images;
use crate::paths;
use crate::status::Status;
use crate::volume::{self, VolumeError};

/// How often certificates are looked at.
const RENEWAL: Duration = Duration::from_hours(12);
/// The file of etcd's static pod.
const ETCD_MANIFEST: &str = "/etc/kubernetes/manifests/etcd.yaml";

/// Why the control plane cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum ControlPlaneError {
    /// A file.
    #[error(transparent)]
    File(#[from] FileError),
    /// Certificates.
    #[error(transparent)]
    Pki(#[from] PkiError),
    /// Manifests.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// TLS.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The data volume.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// The bundle does not know this machine.
    #[error("`{0}` is not among the bundle's members")]
    NotAMember(String),
    /// The certificate files lack one that is needed.
    #[error("`{0}` is not among the control plane's files")]
    MissingFile(&'static str),
}

/// This machine as a member of the control plane.
#[derive(Clone)]
pub struct ControlPlane {
    /// This machine.
    pub me: Member,
    /// Its place among the members, from 0.
    pub index: u32,
    /// All members.
    pub all: Vec<Member>,
    /// Asks etcd.
    pub etcd: EtcdClient,
}

/// Writes all files of the control plane that are not as they should be; tells which.
fn write_files(bundle: &Bundle, me: &Member) -> Result<Vec<String>, ControlPlaneError> {
    let existing = |path: &str| std::fs::read_to_string(path).ok();
    let wanted = kprov_bootstrap::control_plane_files(bundle, me, &existing, jiff::Timestamp::now())?;
    let mut written = Vec::new();
    for file in wanted {
        if files::write(Utf8Path::new(&file.path), file.content.as_bytes(), file.mode)? {
            written.push(file.path);
        }
    }
    Ok(written)
}

impl ControlPlane {
    /// Writes certificates, kubeconfigs, configuration and the standby's static pods.
    pub fn prepare(machine: &Machine, bundle: &Bundle) -> Result<Self, ControlPlaneError> {
        let all = bundle.settings.members.clone();
        let index = all.iter().position(|m| m.name == machine.name);
        let index = index.ok_or_else(|| ControlPlaneError::NotAMember(machine.name.to_string()))?;
        let me = machine
            .member(bundle)
            .cloned()
            .ok_or_else(|| ControlPlaneError::NotAMember(machine.name.to_string()))?;
        write_files(bundle, &me)?;
        files::make_directory(Utf8Path::new(kubernetes::AUDIT_LOG_DIR), 0o700)?;
        for (name, pod) in kprov_bootstrap::standby_pods(&bundle.settings, &me)? {
            let path = Utf8Path::new(paths::STANDBY).join(name);
            // Later ones are of the version that runs then; this is where it begins.
            if !path.exists() {
                files::write(&path, format!("{pod:#}\n").as_bytes(), 0o600)?;
            }
        }
        let read = |path: &str| {
            let path = Utf8PathBuf::from(format!("{}/{path}", kubernetes::PKI));
            std::fs::read_to_string(&path).map_err(failed("read", &path))
        };
        let ca = &bundle.secrets.etcd_ca.certificate;
        let (certificate, key) = (
            read("etcd/healthcheck-client.crt")?,
            read("etcd/healthcheck-client.key")?,
        );
        let etcd = EtcdClient::new(https::client(ca, Some((&certificate, &key)))?);
        Ok(Self {
            me,
            index: u32::try_from(index).unwrap_or(u32::MAX),
            all,
            etcd,
        })
    }

    /// Starts etcd, in the cluster it belongs to, and returns when it works.
    pub async fn start_etcd(
        &self,
        machine: &Machine,
        bundle: &Bundle,
        images: &Images,
        status: &Status,
    ) -> Result<(), ControlPlaneError> {
        let data = volume::etcd_directory(machine.config.data.as_ref()).await?;
        let manifest = Utf8Path::new(ETCD_MANIFEST);
        let marker = Utf8Path::new(paths::ETCD_STARTED);
        if !etcd::has_data(&data) {
            // One that is left from before the data was lost would start in the wrong way.
            files::remove(manifest)?;
        }
        if !manifest.exists() {
            let before = bundle.settings.etcd_exists || marker.exists();
            let start = etcd::settle(&self.etcd, &self.me, &self.all, &data, before, |m| status.note(m)).await;
            tracing::info!(state = ?start.state, members = start.members.len(), "etcd starts");
            let start = EtcdStart {
                initial_cluster: start.members,
                state: start.state,
                data_dir: data.to_string(),
            };
            let (_, pod) = kprov_bootstrap::etcd_pod(&bundle.settings, &self.me, &start)?;
            images.wait(ImageComponent::Etcd).await;
            files::write_through(
                Utf8Path::new(crate::standby::STAGING),
                manifest,
                format!("{pod:#}\n").as_bytes(),
                0o600,
            )?;
        }
        status.reach(kprov_types::node::SetupStep::Etcd);
        while !self.etcd.well(self.me.address).await {
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
        files::write(marker, b"", 0o600)?;
        Ok(())
    }

    /// Gives this machine's etcd member its vote, where it has none yet.
    pub async fn become_voter(&self) {
        if self.all.len() > 1 {
            etcd::promote(&self.etcd, &self.me, &self.all).await;
        }
    }

    /// Renews certificates before they expire, for as long as the process runs.
    ///
    /// Nothing is restarted for it: API servers, etcd, controller-manager and scheduler read certificates and keys again
    /// from their files by themselves, and kubelet rotates its own.
    pub async fn renew(self, bundle: std::sync::Arc<Bundle>) {
        loop {
            tokio::time::sleep(RENEWAL).await;
            match write_files(&bundle, &self.me) {
                Ok(written) if written.is_empty() => {}
                Ok(written) => tracing::info!(files = written.join(" "), "renewed"),
                Err(error) => tracing::error!(error = crate::chain(&error), "certificates cannot be renewed"),
            }
        }
    }
}
