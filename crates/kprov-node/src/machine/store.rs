//! This machine's release store: offers what is here to all machines, and takes what Releases name.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use camino::Utf8PathBuf;
use kprov_release::upload::named_by;
use kprov_release::{Store, StoreConfig};
use kprov_types::Digest;
use kprov_types::api::ReleaseSpec;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::stage::Stages;
use crate::paths;
use crate::release::OnDisk;

/// How long to wait before listening again, where that failed.
const PAUSE: Duration = Duration::from_secs(1);
/// How long after the last change images are put by. Kubelet lets an image be for two minutes
/// (`imageMinimumGCAge` of `KubeletConfiguration`).
const SETTLED: Duration = Duration::from_secs(20);
/// How long a blob is kept that no Release names: whoever has removed a Release may think again.
const GRACE: Duration = Duration::from_hours(1);

/// Serves the store of a control-plane machine, for as long as the process runs. `releases` are the cluster's, `stages` those
/// on this machine; `first` is the digest of the release of the first boot.
pub(super) async fn run(
    address: SocketAddr,
    first: Digest,
    releases: watch::Receiver<Option<Vec<ReleaseSpec>>>,
    stages: watch::Receiver<Stages>,
) {
    let wanted = watch::Sender::new(BTreeSet::new());
    let files = watch::Sender::new(BTreeMap::new());
    let config = StoreConfig {
        dir: paths::STORE.into(),
        places: vec![paths::CONTAINERD_BLOBS.into()],
        files: files.subscribe(),
        wanted: wanted.subscribe(),
    };
    let store = loop {
        match Store::new(config.clone()) {
            Ok(store) => break store,
            Err(error) => tracing::warn!(error = crate::chain(&error), "no release store"),
        }
        tokio::time::sleep(PAUSE).await;
    };
    tokio::join!(
        serve(address, store.clone()),
        follow_releases(releases, wanted, store.clone()),
        keep_images(stages.clone(), store),
        follow_files(first, stages, files),
    );
}

async fn serve(address: SocketAddr, store: Store) {
    loop {
        let served = async {
            let listener = TcpListener::bind(address).await?;
            tracing::info!(%address, "release store");
            kprov_release::store::serve(listener, store.clone(), CancellationToken::new()).await
        };
        if let Err(error) = served.await {
            tracing::warn!(%address, %error, "the release store does not serve");
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Keeps what may be put as the Releases name it, and clears what none has named for a while.
async fn follow_releases(
    mut releases: watch::Receiver<Option<Vec<ReleaseSpec>>>,
    wanted: watch::Sender<BTreeSet<Digest>>,
    store: Store,
) {
    let mut prune_at = Instant::now() + GRACE;
    loop {
        let named = releases.borrow_and_update().as_ref().map(|all| named(all));
        if let Some(named) = &named
            && wanted.send_if_modified(|wanted| {
                let changed = wanted != named;
                wanted.clone_from(named);
                changed
            })
        {
            prune_at = Instant::now() + GRACE;
        }
        tokio::select! {
            changed = releases.changed() => if changed.is_err() { return },
            () = tokio::time::sleep_until(prune_at) => {
                // Without a list there is nothing to go by.
                if let Some(named) = named {
                    match store.prune(named).await {
                        Ok(0) => {}
                        Ok(removed) => tracing::info!(removed, "blobs that no release names are gone"),
                        Err(error) => tracing::warn!(error = crate::chain(&error), "the release store is not cleared"),
                    }
                }
                prune_at = Instant::now() + GRACE;
            }
        }
    }
}

/// Keeps the images of releases for all machines. Kubelet removes what no pod uses when the disk gets full, and what a release
/// that fails has to go back to is just that; where the machine had its first release from is gone by then.
async fn keep_images(mut stages: watch::Receiver<Stages>, store: Store) {
    loop {
        stages.mark_unchanged();
        tokio::time::sleep(SETTLED).await;
        match store.keep().await {
            Ok(0) => {}
            Ok(kept) => tracing::info!(kept, "blobs of images are kept"),
            Err(error) => tracing::warn!(error = crate::chain(&error), "images of releases are not kept"),
        }
        tokio::select! {
            changed = stages.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(GRACE) => {}
        }
    }
}

/// What these Releases name. One whose bytes are not those of its digest names nothing.
fn named(releases: &[ReleaseSpec]) -> BTreeSet<Digest> {
    let read = |spec: &ReleaseSpec| kprov_release::read_release(spec.manifest.as_bytes(), &spec.digest).ok();
    releases
        .iter()
        .filter_map(read)
        .flat_map(|release| named_by(&release))
        .collect()
}

/// Keeps the host files that can be offered as they are on disk.
async fn follow_files(
    first: Digest,
    mut stages: watch::Receiver<Stages>,
    files: watch::Sender<BTreeMap<Digest, Utf8PathBuf>>,
) {
    loop {
        stages.mark_unchanged();
        let first = first.clone();
        let read = tokio::task::spawn_blocking(move || {
            let all = OnDisk::all(paths::RELEASES.into(), &first);
            all.iter().flat_map(OnDisk::blobs).collect::<BTreeMap<_, _>>()
        });
        if let Ok(found) = read.await {
            files.send_replace(found);
        }
        if stages.changed().await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;
    use sha2::{Digest as _, Sha256};

    #[test]
    fn a_release_that_is_not_what_its_digest_says_names_nothing() {
        let manifest = serde_json::to_string(&testing::release()).unwrap();
        let spec = ReleaseSpec {
            version: "1.20.2".into(),
            digest: Digest::from_bytes(Sha256::digest(&manifest).into()),
            manifest,
            signature: None,
            insecure: true,
            urls: Vec::new(),
        };
        assert_eq!(named(std::slice::from_ref(&spec)), [testing::digest()].into());
        let altered = ReleaseSpec {
            manifest: spec.manifest.replace("1.20.2", "1.20.3"),
            ..spec
        };
        assert_eq!(named(&[altered]), BTreeSet::new());
    }
}
