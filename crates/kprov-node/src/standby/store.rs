//! The standby control plane on disk: which release its static pods are of, and whether it has to serve.

use std::collections::BTreeMap;

use camino::{Utf8Path, Utf8PathBuf};
use kprov_bootstrap::manifests::ManifestError;
use kprov_front::FrontState;
use kprov_types::api::{ReleaseRef, StandbyStatus};
use kprov_types::node::{ControlPlaneSettings, Member};
use kprov_types::ports;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::watch;

use super::Component;
use crate::control_plane::release_ref;
use crate::files::{self, FileError};
use crate::paths;

/// Why there is no standby on disk.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A file.
    #[error(transparent)]
    File(#[from] FileError),
    /// Manifests.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// The file is not what was written.
    #[error("`{path}` is not understood")]
    Malformed {
        /// The file.
        path: Utf8PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
}

/// What is on disk: one file, so that its parts are always of one release.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Stored {
    /// The release that the pods were rendered from.
    pub(super) release: ReleaseRef,
    /// The static pods, by component name.
    pub(super) pods: BTreeMap<String, Value>,
}

impl Stored {
    /// The static pod of a component.
    pub(super) fn pod(&self, component: Component) -> Option<&Value> {
        self.pods.get(component.as_str())
    }

    /// The pinned image of a component.
    pub(super) fn image(&self, component: Component) -> Option<&str> {
        self.pod(component)?["spec"]["containers"][0]["image"].as_str()
    }
}

fn place() -> Utf8PathBuf {
    Utf8Path::new(paths::STANDBY).join("standby.json")
}

pub(super) fn read() -> Result<Option<Stored>, StoreError> {
    read_from(&place())
}

fn read_from(path: &Utf8Path) -> Result<Option<Stored>, StoreError> {
    let Some(json) = files::read_if_there(path)? else {
        return Ok(None);
    };
    let stored = serde_json::from_slice(&json);
    stored.map(Some).map_err(|source| StoreError::Malformed {
        path: path.to_owned(),
        source,
    })
}

/// The release that the standby on disk is of.
pub fn stored_release() -> Result<Option<ReleaseRef>, StoreError> {
    Ok(read()?.map(|stored| stored.release))
}

/// Makes the standby on disk that of `settings` ([`crate::control_plane::with_release`]), in one step; tells whether it was
/// another. Call it for an ordered release as soon as the machine has its images, and its config files are written
/// ([`crate::control_plane::write_config`]). What is placed already stays as it is until it is taken away.
pub fn write(settings: &ControlPlaneSettings, me: &Member) -> Result<bool, StoreError> {
    write_to(&place(), settings, me)
}

fn write_to(path: &Utf8Path, settings: &ControlPlaneSettings, me: &Member) -> Result<bool, StoreError> {
    let pods = kprov_bootstrap::standby_pods(settings, me)?;
    let name = |file: String| file.strip_suffix(".yaml").map(str::to_owned).unwrap_or(file);
    let stored = Stored {
        release: release_ref(settings),
        pods: pods.into_iter().map(|(file, pod)| (name(file), pod)).collect(),
    };
    let json = serde_json::to_vec_pretty(&stored).map_err(|source| StoreError::Malformed {
        path: path.to_owned(),
        source,
    })?;
    let written = files::write(path, &json, 0o600)?;
    if written {
        tracing::info!(release = %stored.release, "standby written");
    }
    Ok(written)
}

/// How the standby is; `None` where there is none on disk.
pub fn status(front: &FrontState) -> Option<StandbyStatus> {
    let stored = read()
        .inspect_err(|error| tracing::warn!(error = crate::chain(error), "standby"))
        .ok()??;
    let placed = Component::ALL
        .into_iter()
        .filter(|component| super::run::placed(*component).exists());
    Some(StandbyStatus {
        release: stored.release,
        placed: placed.map(|component| component.as_str().to_owned()).collect(),
        api_ready: front.revision_ready(ports::STANDBY_REVISION),
    })
}

/// Whether the API server's standby has to run beside the self-hosted one (`StandbyOrder.serve`). Kept on disk, since an order
/// must not be forgotten while kprov-node is started again and the API is not there yet. All clones are one.
#[derive(Clone, Debug)]
pub struct Serve {
    mark: Utf8PathBuf,
    state: watch::Sender<bool>,
}

impl Serve {
    /// As it was ordered last.
    pub fn load() -> Self {
        Self::load_from(Utf8Path::new(paths::STANDBY).join("serve"))
    }

    fn load_from(mark: Utf8PathBuf) -> Self {
        let state = watch::Sender::new(mark.exists());
        Self { mark, state }
    }

    /// Orders it, or withdraws the order.
    pub fn set(&self, serve: bool) -> Result<(), FileError> {
        if serve {
            files::write(&self.mark, b"", 0o600)?;
        } else {
            files::remove(&self.mark)?;
        }
        self.state
            .send_if_modified(|state| std::mem::replace(state, serve) != serve);
        Ok(())
    }

    pub(super) fn watch(&self) -> watch::Receiver<bool> {
        self.state.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kprov_types::Digest;

    use crate::control_plane::with_release;
    use crate::testing;

    #[test]
    fn it_is_of_one_release_at_any_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = Utf8Path::from_path(dir.path()).unwrap().join("standby.json");
        let first = testing::bundle().settings;
        let me = &first.members[0];
        assert!(read_from(&path).unwrap().is_none());
        assert!(write_to(&path, &first, me).unwrap());
        assert!(!write_to(&path, &first, me).unwrap(), "it is that already");

        let mut release = testing::release();
        release.kubernetes = "1.21.3".parse().unwrap();
        for image in release.images.values_mut() {
            image.reference = image.reference.replace("1.20.2", "1.21.3");
        }
        let digest = Digest::from_bytes([9; 32]);
        assert!(write_to(&path, &with_release(&first, &release, &digest), me).unwrap());
        let stored = read_from(&path).unwrap().unwrap();
        assert_eq!(
            (stored.release.version.to_string().as_str(), &stored.release.digest),
            ("1.21.3", &digest)
        );
        for component in Component::ALL {
            let image = stored.image(component).unwrap();
            assert!(
                image.contains(component.as_str()) && image.contains("1.21.3"),
                "{image}"
            );
            assert_eq!(stored.pod(component).unwrap()["metadata"]["name"], component.as_str());
        }

        std::fs::write(&path, "{").unwrap();
        assert!(matches!(read_from(&path), Err(StoreError::Malformed { .. })));
    }

    #[test]
    fn an_order_to_serve_outlives_the_process() {
        let dir = tempfile::tempdir().unwrap();
        let mark = Utf8Path::from_path(dir.path()).unwrap().join("standby/serve");
        let serve = Serve::load_from(mark.clone());
        let mut seen = serve.watch();
        assert!(!*seen.borrow_and_update());
        serve.set(true).unwrap();
        serve.set(true).unwrap();
        assert!(seen.has_changed().unwrap() && *seen.borrow_and_update());
        assert!(
            *Serve::load_from(mark.clone()).watch().borrow(),
            "the next kprov-node knows it"
        );
        serve.set(false).unwrap();
        assert!(!*seen.borrow() && !*Serve::load_from(mark).watch().borrow());
    }
}
