//! A real containerd pulls from a machine's store what this crate's own configuration sends it to.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};
use kprov_release::{Store, StoreConfig};
use kprov_types::Digest;
use kprov_types::release::{ImageComponent, ReleaseImage};
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::stage::ImageError;
use crate::containerd::{self, ContainerdVersion};
use crate::cri::Cri;
use crate::host::Host;
use crate::{files, images, testing};

/// containerd with directories of its own.
struct Containerd {
    process: Child,
    root: Utf8PathBuf,
    cri: Cri,
    _dir: tempfile::TempDir,
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn put(directory: &Utf8Path, bytes: &[u8]) -> Digest {
    use sha2::Digest as _;
    let digest = Digest::from_bytes(sha2::Sha256::digest(bytes).into());
    files::write(&directory.join(digest.hex()), bytes, 0o644).unwrap();
    digest
}

/// An image with an empty layer; returns the digests of its manifest and of its layer.
fn put_image(directory: &Utf8Path) -> (Digest, Digest) {
    let layer = [0; 1024];
    let layer_digest = put(directory, &layer);
    let config = json!({
        "architecture": "amd64", "os": "linux", "config": { "Entrypoint": ["/x"] },
        "rootfs": { "type": "layers", "diff_ids": [layer_digest] },
    });
    let config = config.to_string();
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": put(directory, config.as_bytes()), "size": config.len(),
        },
        "layers": [{
            "mediaType": "application/vnd.oci.image.layer.v1.tar",
            "digest": layer_digest, "size": layer.len(),
        }],
    });
    (put(directory, manifest.to_string().as_bytes()), layer_digest)
}

/// A store that offers what is in `places`; stops when dropped.
async fn serve(own: Utf8PathBuf, places: Vec<Utf8PathBuf>) -> (SocketAddr, AbortOnDropHandle<std::io::Result<()>>) {
    let store = Store::new(StoreConfig {
        dir: own,
        places,
        files: watch::Sender::new(BTreeMap::new()).subscribe(),
        wanted: watch::Sender::new(BTreeSet::new()).subscribe(),
    });
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let task = tokio::spawn(kprov_release::store::serve(
        listener,
        store.unwrap(),
        CancellationToken::new(),
    ));
    (address, AbortOnDropHandle::new(task))
}

impl Containerd {
    /// Starts the containerd that is in `PATH`, told to pull from these URLs.
    async fn start(image: &ReleaseImage, urls: &[String]) -> Option<Self> {
        let Ok(output) = Command::new("containerd").arg("--version").output() else {
            assert!(std::env::var("CI").as_deref() != Ok("true"), "no containerd");
            eprintln!("SKIPPED: no containerd");
            return None;
        };
        let version = ContainerdVersion::from_output(&String::from_utf8_lossy(&output.stdout)).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let root = Utf8Path::from_path(dir.path()).unwrap().to_owned();
        let mut release = testing::release();
        release.images = [(ImageComponent::Pause, image.clone())].into();
        // The real configuration, only in another place.
        let moved = |text: String| {
            ["/var/lib/containerd", "/run/containerd", "/etc/containerd"]
                .iter()
                .fold(text, |text, from| text.replace(from, root.join(&from[1..]).as_str()))
        };
        let config = moved(containerd::config(
            version,
            &Host::detect(),
            &release,
            "/nowhere".into(),
        ));
        files::write(&root.join("config.toml"), config.as_bytes(), 0o644).unwrap();
        for (path, hosts) in containerd::registry_hosts(&release, urls) {
            files::write(Utf8Path::new(&moved(path.into_string())), hosts.as_bytes(), 0o644).unwrap();
        }
        let log = std::fs::File::create(root.join("log")).unwrap();
        let process = Command::new("containerd")
            .args(["--config", root.join("config.toml").as_str()])
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let containerd = Self {
            process,
            cri: Cri::new(&root.join("run/containerd/containerd.sock")),
            root,
            _dir: dir,
        };
        let ready = async {
            while !matches!(containerd.cri.ready().await, Ok(Ok(()))) {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        let waited = tokio::time::timeout(Duration::from_secs(30), ready).await;
        let log = || std::fs::read_to_string(containerd.root.join("log")).unwrap();
        assert!(waited.is_ok(), "{}", log());
        Some(containerd)
    }
}

fn image(digest: Digest) -> ReleaseImage {
    ReleaseImage {
        reference: "kprov.local/x:1".into(),
        digest,
        version: None,
    }
}

#[tokio::test]
async fn what_one_machine_has_pulled_another_pulls_from_it() {
    let dir = tempfile::tempdir().unwrap();
    let root = Utf8Path::from_path(dir.path()).unwrap();
    let (manifest, layer) = put_image(&root.join("first"));
    let (address, first) = serve(root.join("first"), Vec::new()).await;
    // A store that has nothing is asked first, and one that is not there.
    let (empty, _empty) = serve(root.join("empty"), Vec::new()).await;
    let urls = [
        format!("http://{empty}"),
        "http://127.0.0.1:1".into(),
        format!("http://{address}"),
    ];
    let image = image(manifest);
    let Some(one) = Containerd::start(&image, &urls).await else {
        return;
    };
    images::ensure(&one.cri, &image.pinned()).await.unwrap();
    drop(first);

    let blobs = one
        .root
        .join("var/lib/containerd/io.containerd.content.v1.content/blobs/sha256");
    assert!(blobs.join(layer.hex()).exists());
    let (address, _second) = serve(root.join("own"), vec![blobs]).await;
    let two = Containerd::start(&image, &[format!("http://{address}")]).await.unwrap();
    images::ensure(&two.cri, &image.pinned()).await.unwrap();
    assert!(two.cri.has_image(&image.pinned()).await.unwrap());
}

#[tokio::test]
async fn an_image_with_altered_bytes_is_bad_and_one_that_is_missing_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let root = Utf8Path::from_path(dir.path()).unwrap();
    let (manifest, layer) = put_image(root);
    let (address, _store) = serve(root.join("own"), vec![root.to_owned()]).await;
    let image = image(manifest);
    let Some(containerd) = Containerd::start(&image, &[format!("http://{address}")]).await else {
        return;
    };
    let bad = async || {
        let error = images::ensure(&containerd.cri, &image.pinned()).await.unwrap_err();
        let error = ImageError(image.pinned(), crate::chain(&error));
        (error.is_bad(), error.to_string())
    };
    std::fs::remove_file(root.join(layer.hex())).unwrap();
    let (missing, why) = bad().await;
    assert!(!missing, "{why}");
    std::fs::write(root.join(layer.hex()), [1; 1024]).unwrap();
    let (altered, why) = bad().await;
    assert!(altered, "{why}");
}
