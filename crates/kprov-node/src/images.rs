//! Pulls the images of the release that this machine's role needs, so that nothing waits for a download later.

use std::collections::BTreeSet;
use std::time::Duration;

use futures::future::join_all;
use kprov_types::release::{ImageComponent, ReleaseImage};
use kprov_types::{Release, Role};
use tokio::sync::watch;

use crate::cri::{Cri, CriError};

/// The longest pause between two attempts.
const LONGEST_PAUSE: Duration = Duration::from_secs(15);

/// When an image is pulled: no pod starts without pause, no API server without etcd, nothing else without both.
const fn turn(component: ImageComponent) -> u8 {
    match component {
        ImageComponent::Pause => 0,
        ImageComponent::Etcd | ImageComponent::KubeApiserver => 1,
        ImageComponent::KubeControllerManager | ImageComponent::KubeScheduler => 2,
        ImageComponent::KubeProxy | ImageComponent::Coredns | ImageComponent::KprovOperator => LAST_TURN,
    }
}

const LAST_TURN: u8 = 3;

/// Which images are here.
#[derive(Clone, Debug)]
pub struct Images(watch::Sender<BTreeSet<ImageComponent>>);

impl Images {
    /// None yet.
    pub fn new() -> Self {
        Self(watch::Sender::default())
    }

    /// Whether the image of `component` is here.
    pub fn has(&self, component: ImageComponent) -> bool {
        self.0.borrow().contains(&component)
    }

    /// Waits until the image of `component` is here.
    pub async fn wait(&self, component: ImageComponent) {
        // The sender is `self`, so the channel cannot close while this waits.
        let _ = self.0.subscribe().wait_for(|here| here.contains(&component)).await;
    }

    /// Pulls all that `role` needs, what is needed first before the rest. Tries until it has them; `note` is told of
    /// failures.
    pub async fn pull(&self, cri: &Cri, release: &Release, role: Role, note: impl Fn(String) + Sync) {
        let wanted: Vec<_> = needed(release, role).collect();
        let note = &note;
        for turn in 0..=LAST_TURN {
            let group = wanted.iter().filter(|(component, _)| self::turn(*component) == turn);
            join_all(group.map(|(component, image)| async move {
                let reference = image.pinned();
                let mut pause = Duration::from_millis(250);
                while let Err(error) = ensure(cri, &reference).await {
                    note(format!("image `{reference}`: {}", crate::chain(&error)));
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
                tracing::info!(image = %image.reference, "image is here");
                self.0.send_modify(|here| {
                    here.insert(*component);
                });
            }))
            .await;
        }
    }
}

impl Default for Images {
    fn default() -> Self {
        Self::new()
    }
}

/// The images of a release that a machine of this role runs.
pub fn needed(release: &Release, role: Role) -> impl Iterator<Item = (ImageComponent, &ReleaseImage)> {
    let all = release.images.iter().map(|(component, image)| (*component, image));
    all.filter(move |(component, _)| role == Role::ControlPlane || component.on_workers())
}

/// Pulls an image that is not here yet.
pub async fn ensure(cri: &Cri, reference: &str) -> Result<(), CriError> {
    if cri.has_image(reference).await? {
        return Ok(());
    }
    cri.pull_image(reference).await.map(drop)
}
