//! What a control-plane machine does once it has its bundle: certificates and files, etcd, the standby control plane.
//!
//! The bundle on disk has the settings that the cluster began with. Whatever is rendered later is of the release that runs
//! then, or of the one that was ordered: [`with_release`] gives the settings for it.

use std::sync::Arc;
use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};
use kprov_bootstrap::manifests::ManifestError;
use kprov_bootstrap::paths as kubernetes;
use kprov_bootstrap::pki::{FileToWrite, PkiError};
use kprov_bootstrap::versions::Unsupported;
use kprov_front::FrontHandle;
use kprov_types::api::ReleaseRef;
use kprov_types::node::{Bundle, ControlPlaneSettings, Member};
use kprov_types::{Digest, Release};

use crate::config::Machine;
use crate::etcd::{EtcdClient, OwnMember};
use crate::files::{self, FileError, failed};
use crate::https::{self, TlsError};
use crate::standby::{self, StoreError};
use crate::volume::{self, VolumeError};

/// How often certificates are looked at.
const RENEWAL: Duration = Duration::from_hours(12);

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
    /// The release's version.
    #[error(transparent)]
    Version(#[from] Unsupported),
    /// The standby.
    #[error(transparent)]
    Standby(#[from] StoreError),
    /// TLS.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The data volume.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// The bundle does not know this machine.
    #[error("`{0}` is not among the bundle's members")]
    NotAMember(String),
}

/// The settings of a cluster with another release than it began with.
pub fn with_release(settings: &ControlPlaneSettings, release: &Release, digest: &Digest) -> ControlPlaneSettings {
    ControlPlaneSettings {
        kubernetes: release.kubernetes.clone(),
        release: release.clone(),
        release_digest: digest.clone(),
        ..settings.clone()
    }
}

/// The release that settings are of.
pub fn release_ref(settings: &ControlPlaneSettings) -> ReleaseRef {
    ReleaseRef {
        version: settings.kubernetes.clone(),
        digest: settings.release_digest.clone(),
    }
}

/// Writes the configuration files that API servers of this release read. Each minor has its own; call it when a release is
/// staged, before anything of it may start.
pub fn write_config(release: &Release) -> Result<(), ControlPlaneError> {
    write_all(&kprov_bootstrap::config_files(release.kubernetes.minor())?)?;
    Ok(())
}

/// Writes those files that are not as they should be; tells which.
fn write_all(wanted: &[FileToWrite]) -> Result<Vec<&str>, FileError> {
    let mut written = Vec::new();
    for file in wanted {
        if files::write(Utf8Path::new(&file.path), file.content.as_bytes(), file.mode)? {
            written.push(file.path.as_str());
        }
    }
    Ok(written)
}

/// Certificates, kubeconfigs and configuration as they should be now.
fn wanted_files(bundle: &Bundle, me: &Member) -> Result<Vec<FileToWrite>, PkiError> {
    let existing = |path: &str| std::fs::read_to_string(path).ok();
    kprov_bootstrap::control_plane_files(bundle, me, &existing, jiff::Timestamp::now())
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
    bundle: Arc<Bundle>,
}

impl ControlPlane {
    /// Writes certificates, kubeconfigs and configuration; and the standby's static pods where there are none yet. `running` is
    /// the release that runs on this machine, with its digest.
    pub fn prepare(
        machine: &Machine,
        bundle: &Bundle,
        running: (&Release, &Digest),
    ) -> Result<Self, ControlPlaneError> {
        let not_a_member = || ControlPlaneError::NotAMember(machine.name.to_string());
        let bundle = Bundle {
            settings: with_release(&bundle.settings, running.0, running.1),
            secrets: bundle.secrets.clone(),
        };
        let all = bundle.settings.members.clone();
        let index = all
            .iter()
            .position(|m| m.name == machine.name)
            .ok_or_else(not_a_member)?;
        let me = machine.member(&bundle).cloned().ok_or_else(not_a_member)?;
        write_all(&wanted_files(&bundle, &me)?)?;
        files::make_directory(Utf8Path::new(kubernetes::AUDIT_LOG_DIR), 0o700)?;
        // One that is there is the last control plane known to be good, whatever runs now.
        let stored = standby::stored_release();
        if let Err(error) = &stored {
            tracing::warn!(error = crate::chain(error), "the standby is written anew");
        }
        if !matches!(stored, Ok(Some(_))) {
            standby::write(&bundle.settings, &me)?;
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
            bundle: Arc::new(bundle),
        })
    }

    /// The cluster's settings with the release that runs.
    pub fn settings(&self) -> &ControlPlaneSettings {
        &self.bundle.settings
    }

    /// This machine's etcd member, with its data directory made ready.
    pub async fn etcd_member(
        &self,
        machine: &Machine,
        front: Arc<FrontHandle>,
    ) -> Result<OwnMember, ControlPlaneError> {
        let data = volume::etcd_directory(machine.config.data.as_ref()).await?;
        Ok(OwnMember::new(
            self.me.clone(),
            self.all.clone(),
            self.etcd.clone(),
            front,
            data,
        ))
    }

    /// Renews certificates before they expire, for as long as the process runs.
    ///
    /// Nothing is restarted for it: API servers, etcd, controller-manager and scheduler read certificates and keys again
    /// from their files by themselves, and kubelet rotates its own.
    pub async fn renew(self) {
        loop {
            tokio::time::sleep(RENEWAL).await;
            let done = wanted_files(&self.bundle, &self.me)
                .map_err(ControlPlaneError::from)
                .and_then(|wanted| Ok(write_all(&wanted)?.join(" ")));
            match done {
                Ok(written) if written.is_empty() => {}
                Ok(written) => tracing::info!(files = written, "renewed"),
                Err(error) => tracing::error!(error = crate::chain(&error), "certificates cannot be renewed"),
            }
        }
    }
}
