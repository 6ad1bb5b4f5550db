//! A machine's store: what it offers, what it takes, and what it refuses.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};
use kprov_release::{Fetcher, Payload, Store, StoreConfig, store, upload};
use kprov_types::Digest;
use kprov_types::release::ImageComponent;
use reqwest::{Client, Method, RequestBuilder, Response, StatusCode};
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::watch;

use crate::common::{Room, Server};

fn sha256(bytes: &[u8]) -> Digest {
    Digest::from_bytes(Sha256::digest(bytes).into())
}

/// A store in a room, and all that can be changed about it.
struct Machine {
    room: Room,
    payload: Payload,
    wanted: watch::Sender<BTreeSet<Digest>>,
    files: watch::Sender<BTreeMap<Digest, Utf8PathBuf>>,
    store: Store,
    server: Server,
    client: Client,
}

impl Machine {
    async fn new() -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let room = Room::new();
        let payload = room.create("p").unwrap();
        let (wanted, files) = (watch::Sender::default(), watch::Sender::default());
        let store = open(&room, &wanted, &files);
        let offered = store.clone();
        let server = Server::run(|listener, stop| async move { store::serve(listener, offered, stop).await.unwrap() });
        Self {
            server: server.await,
            client: Client::builder().no_proxy().build().unwrap(),
            room,
            payload,
            wanted,
            files,
            store,
        }
    }

    fn dir(&self) -> Utf8PathBuf {
        self.room.path().join("store")
    }

    /// Its store, where containerd has its content elsewhere.
    fn store_beside(&self, content: &Utf8Path) -> Store {
        open_at(self.dir(), vec![content.to_owned()], &self.wanted, &self.files)
    }

    fn want_all(&self) {
        self.wanted.send_replace(upload::named_by(self.payload.release()));
    }

    fn bytes(&self, digest: &Digest) -> Vec<u8> {
        fs::read(self.payload.blob_path(digest)).unwrap()
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.client.request(method, format!("{}{path}", self.server.url()))
    }

    async fn get(&self, path: &str) -> Response {
        self.request(Method::GET, path).send().await.unwrap()
    }

    async fn head(&self, digest: &Digest) -> StatusCode {
        let head = self.request(Method::HEAD, &path(digest));
        head.send().await.unwrap().status()
    }

    async fn put(&self, digest: &Digest, bytes: impl Into<reqwest::Body>) -> (StatusCode, String) {
        let reply = self
            .request(Method::PUT, &path(digest))
            .body(bytes)
            .send()
            .await
            .unwrap();
        (reply.status(), reply.text().await.unwrap())
    }

    /// What is in the store's directory.
    fn listing(&self) -> BTreeSet<String> {
        let entries = self.dir().read_dir_utf8().unwrap();
        entries.map(|e| e.unwrap().file_name().to_owned()).collect()
    }
}

fn open(
    room: &Room,
    wanted: &watch::Sender<BTreeSet<Digest>>,
    files: &watch::Sender<BTreeMap<Digest, Utf8PathBuf>>,
) -> Store {
    let places = vec![room.path().join("absent"), room.path().join("content")];
    open_at(room.path().join("store"), places, wanted, files)
}

fn open_at(
    dir: Utf8PathBuf,
    places: Vec<Utf8PathBuf>,
    wanted: &watch::Sender<BTreeSet<Digest>>,
    files: &watch::Sender<BTreeMap<Digest, Utf8PathBuf>>,
) -> Store {
    Store::new(StoreConfig {
        dir,
        places,
        files: files.subscribe(),
        wanted: wanted.subscribe(),
    })
    .unwrap()
}

fn path(digest: &Digest) -> String {
    format!("/blobs/sha256/{}", digest.hex())
}

#[tokio::test]
async fn a_whole_release_is_put_and_fetched() {
    let machine = Machine::new().await;
    let blobs = upload::blobs_of(&machine.payload).unwrap();
    let (first, _) = &blobs[0];
    let (status, text) = machine.put(first, machine.bytes(first)).await;
    assert_eq!(status, StatusCode::FORBIDDEN);
    assert!(text.contains("DENIED") && text.contains(first.as_str()), "{text}");
    assert_eq!(machine.listing(), BTreeSet::new());

    machine.want_all();
    for (digest, size) in &blobs {
        assert_eq!(machine.head(digest).await, StatusCode::NOT_FOUND);
        let (status, text) = machine.put(digest, machine.bytes(digest)).await;
        assert_eq!((status, text.as_str()), (StatusCode::CREATED, ""), "{size}");
        assert_eq!(machine.head(digest).await, StatusCode::OK);
    }
    assert_eq!(
        machine.listing(),
        blobs.iter().map(|(d, _)| d.hex().to_owned()).collect()
    );

    // As machines and runtimes fetch it.
    let fetcher = Fetcher::new(vec![machine.server.url()]).unwrap();
    for file in &machine.payload.release().host_files {
        let dest = machine.room.path().join("bin").join(&file.name);
        fetcher.host_file(file, &dest).await.unwrap();
    }
    let image = machine.payload.release().image(ImageComponent::KprovOperator).unwrap();
    assert_eq!(machine.get("/v2/").await.status(), StatusCode::OK);
    let manifest = machine
        .get(&format!("/v2/any/name/manifests/{}?ns=kprov.local", image.digest))
        .await;
    assert_eq!(
        manifest.headers()["content-type"],
        "application/vnd.oci.image.manifest.v1+json"
    );
    assert_eq!(manifest.headers()["docker-content-digest"], image.digest.as_str());
    let manifest: serde_json::Value = serde_json::from_slice(&manifest.bytes().await.unwrap()).unwrap();
    let layer: Digest = manifest["layers"][0]["digest"].as_str().unwrap().parse().unwrap();
    let ranged = machine
        .request(Method::GET, &format!("/v2/any/blobs/{layer}"))
        .header("range", "bytes=5-9");
    let ranged = ranged.send().await.unwrap();
    assert_eq!(ranged.status(), StatusCode::PARTIAL_CONTENT);
    assert_eq!(ranged.bytes().await.unwrap(), machine.bytes(&layer)[5..10]);

    for (absent, status) in [
        ("/v2/kprov-operator/manifests/1.2.3_x", 404),
        (&format!("/v2/any/manifests/{layer}"), 404),
        ("/release.json", 404),
        ("/", 404),
        ("/v2/any/blobs/sha256:..", 400),
        ("/blobs/sha256/../../etc/passwd", 404),
    ] {
        assert_eq!(machine.get(absent).await.status(), status, "{absent}");
    }
    let deleted = machine.request(Method::DELETE, &path(first)).send().await.unwrap();
    assert_eq!(deleted.status(), StatusCode::METHOD_NOT_ALLOWED);
    assert_eq!(deleted.headers()["allow"], "GET, HEAD, PUT");
    let elsewhere = machine
        .request(Method::PUT, "/release.json")
        .body("x")
        .send()
        .await
        .unwrap();
    assert_eq!(elsewhere.status(), StatusCode::METHOD_NOT_ALLOWED);
}

#[tokio::test]
async fn only_what_is_wanted_by_chain() {
    let machine = Machine::new().await;
    // An index over a manifest over a layer, in a document that leaves its type out.
    let layer = b"the layer".to_vec();
    let config = br#"{"config":{"Env":[]},"architecture":"amd64"}"#.to_vec();
    let part = |bytes: &[u8]| serde_json::json!({ "digest": sha256(bytes).to_string(), "size": bytes.len() });
    let manifest = serde_json::json!({ "config": part(&config), "layers": [part(&layer)] })
        .to_string()
        .into_bytes();
    let index = serde_json::json!({ "manifests": [part(&manifest)] })
        .to_string()
        .into_bytes();
    machine.wanted.send_replace([sha256(&index)].into());
    let all = [&index, &manifest, &layer, &config];
    for later in &all[1..] {
        assert_eq!(
            machine.put(&sha256(later), (*later).clone()).await.0,
            StatusCode::FORBIDDEN
        );
    }
    assert_eq!(machine.put(&sha256(&index), index.clone()).await.0, StatusCode::CREATED);
    assert_eq!(
        machine.put(&sha256(&layer), layer.clone()).await.0,
        StatusCode::FORBIDDEN
    );
    for bytes in &all[1..] {
        assert_eq!(
            machine.put(&sha256(bytes), (*bytes).clone()).await.0,
            StatusCode::CREATED
        );
    }
    let reply = machine.get(&format!("/v2/x/manifests/{}", sha256(&index))).await;
    assert_eq!(
        reply.headers()["content-type"],
        "application/vnd.oci.image.index.v1+json"
    );

    // What others wrote under the name of a wanted manifest opens no door.
    let content = machine.room.path().join("content");
    fs::create_dir(&content).unwrap();
    let other = b"{\"x\":1}".to_vec();
    let lie = serde_json::json!({ "manifests": [part(&other)] }).to_string();
    let wanted = sha256(b"a manifest that is not here yet");
    fs::write(content.join(wanted.hex()), lie).unwrap();
    machine.wanted.send_replace([wanted].into());
    assert_eq!(machine.put(&sha256(&other), other).await.0, StatusCode::FORBIDDEN);
    // And what was wanted is not for ever.
    assert_eq!(machine.put(&sha256(&index), index).await.0, StatusCode::FORBIDDEN);
}

#[tokio::test]
async fn wrong_bytes_leave_nothing() {
    let machine = Machine::new().await;
    machine.want_all();
    let file = machine.payload.release().host_files[0].clone();
    let (digest, size) = (file.digest, file.size);
    let bytes = machine.bytes(&digest);
    let mut altered = bytes.clone();
    altered[0] ^= 1;
    for wrong in [altered, bytes[1..].to_vec(), [&bytes[..], b"x"].concat(), Vec::new()] {
        let (status, text) = machine.put(&digest, wrong.clone()).await;
        assert_eq!(status, StatusCode::BAD_REQUEST);
        assert!(
            text.contains("DIGEST_INVALID") && text.contains(sha256(&wrong).as_str()),
            "{text}"
        );
        assert_eq!(machine.listing(), BTreeSet::new());
    }

    // A connection that breaks off.
    let mut stream = TcpStream::connect(machine.server.address).await.unwrap();
    let head = format!(
        "PUT {} HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n",
        path(&digest)
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(&bytes[..bytes.len() / 2]).await.unwrap();
    until(|| machine.listing().len() == 1).await;
    drop(stream);
    until(|| machine.listing().is_empty()).await;

    // One that would be too large is not even begun.
    let mut stream = TcpStream::connect(machine.server.address).await.unwrap();
    let too_large = store::BLOB_LIMIT + 1;
    let head = format!(
        "PUT {} HTTP/1.1\r\nHost: x\r\nContent-Length: {too_large}\r\n\r\n",
        path(&digest)
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 413");

    // No length said, in pieces: as good.
    let pieces: Vec<_> = bytes
        .chunks(1000)
        .map(|c| Ok::<_, std::io::Error>(c.to_vec()))
        .collect();
    let body = reqwest::Body::wrap_stream(futures::stream::iter(pieces));
    assert_eq!(machine.put(&digest, body).await.0, StatusCode::CREATED);
    // A damaged one is mended.
    fs::write(machine.dir().join(digest.hex()), "rotten").unwrap();
    assert_eq!(machine.put(&digest, bytes.clone()).await.0, StatusCode::CREATED);
    assert!(machine.get(&path(&digest)).await.bytes().await.unwrap() == bytes);
}

#[tokio::test(start_paused = true)]
async fn whoever_stands_still_is_sent_away() {
    let machine = Machine::new().await;
    machine.want_all();
    let digest = machine.payload.release().host_files[0].digest.clone();
    let mut stream = TcpStream::connect(machine.server.address).await.unwrap();
    let head = format!(
        "PUT {} HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nhalf",
        path(&digest)
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 400");
    assert_eq!(machine.listing(), BTreeSet::new());
}

async fn until(met: impl Fn() -> bool) {
    tokio::time::timeout(Duration::from_secs(10), async {
        while !met() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn offers_what_others_have_put_on_the_machine() {
    let machine = Machine::new().await;
    let digest = machine.payload.digest();
    assert_eq!(machine.head(&digest).await, StatusCode::NOT_FOUND);
    assert_eq!(machine.store.path(&digest).await, None);
    let file = machine.payload.root().join("release.json");
    machine.files.send_replace([(digest.clone(), file.clone())].into());
    assert_eq!(machine.store.path(&digest).await, Some(file));
    assert_eq!(
        machine.get(&path(&digest)).await.bytes().await.unwrap(),
        machine.payload.release_bytes()
    );
    machine.files.send_replace(BTreeMap::new());
    assert_eq!(machine.head(&digest).await, StatusCode::NOT_FOUND);

    // A content store that comes later; what is wanted through its manifests is wanted.
    machine.want_all();
    let image = machine
        .payload
        .release()
        .image(ImageComponent::Etcd)
        .unwrap()
        .digest
        .clone();
    let content = machine.room.path().join("content");
    fs::create_dir(&content).unwrap();
    fs::copy(machine.payload.blob_path(&image), content.join(image.hex())).unwrap();
    assert_eq!(machine.head(&image).await, StatusCode::OK);
    let parsed: serde_json::Value = serde_json::from_slice(&machine.bytes(&image)).unwrap();
    let layer: Digest = parsed["layers"][0]["digest"].as_str().unwrap().parse().unwrap();
    assert_eq!(machine.put(&layer, machine.bytes(&layer)).await.0, StatusCode::CREATED);
    assert_eq!(machine.listing(), [layer.hex().to_owned()].into());
}

#[tokio::test]
async fn many_put_the_same_at_once() {
    let machine = Machine::new().await;
    machine.want_all();
    let digest = machine.payload.release().host_files[0].digest.clone();
    let puts = (0..8).map(|_| machine.put(&digest, machine.bytes(&digest)));
    for (status, text) in futures::future::join_all(puts).await {
        assert!(
            matches!(status, StatusCode::CREATED | StatusCode::SERVICE_UNAVAILABLE),
            "{status} {text}"
        );
    }
    assert_eq!(machine.listing(), [digest.hex().to_owned()].into());
    assert!(machine.get(&path(&digest)).await.bytes().await.unwrap() == machine.bytes(&digest));
}

#[tokio::test]
async fn unfinished_files_and_what_is_no_longer_wanted_go() {
    let machine = Machine::new().await;
    machine.want_all();
    let blobs = upload::blobs_of(&machine.payload).unwrap();
    for (digest, _) in &blobs {
        machine.put(digest, machine.bytes(digest)).await;
    }
    fs::write(machine.dir().join(".new-abc"), "torn").unwrap();
    fs::write(machine.dir().join("note"), "somebody's").unwrap();
    let store = open(&machine.room, &machine.wanted, &machine.files);
    let mut wanted: BTreeSet<_> = blobs.iter().map(|(d, _)| d.hex().to_owned()).collect();
    wanted.insert("note".into());
    assert_eq!(machine.listing(), wanted);

    assert_eq!(
        store.prune(upload::named_by(machine.payload.release())).await.unwrap(),
        0
    );
    assert_eq!(machine.listing(), wanted);
    // One image is a manifest, a configuration and a layer.
    let etcd = machine
        .payload
        .release()
        .image(ImageComponent::Etcd)
        .unwrap()
        .digest
        .clone();
    let gone = store.prune([etcd].into()).await.unwrap();
    assert_eq!(gone, blobs.len() - 3);
    assert_eq!(machine.listing().len(), 4);
}

#[tokio::test]
async fn what_others_remove_is_kept_on_the_same_file_system_and_on_another() {
    for elsewhere in [None, Some("/dev/shm")] {
        let machine = Machine::new().await;
        let guard = elsewhere.map_or_else(tempfile::tempdir, tempfile::tempdir_in).unwrap();
        let content = Utf8PathBuf::try_from(guard.path().to_owned()).unwrap();
        let store = machine.store_beside(&content);
        // What containerd has of it: images, and an index that no release names.
        let release = machine.payload.release();
        let host_files: BTreeSet<_> = release.host_files.iter().map(|file| &file.digest).collect();
        let blobs = upload::blobs_of(&machine.payload).unwrap();
        let images: BTreeSet<_> = blobs
            .iter()
            .map(|(digest, _)| digest)
            .filter(|d| !host_files.contains(d))
            .collect();
        for digest in &images {
            fs::write(content.join(digest.hex()), machine.bytes(digest)).unwrap();
        }
        fs::write(content.join(sha256(b"x").hex()), "x").unwrap();
        assert_eq!(store.keep().await.unwrap(), 0, "nothing is wanted yet");
        machine.want_all();
        assert_eq!(store.keep().await.unwrap(), images.len());
        assert_eq!(store.keep().await.unwrap(), 0, "it's all there");
        fs::remove_dir_all(&content).unwrap();
        let names: BTreeSet<_> = images.iter().map(|digest| digest.hex().to_owned()).collect();
        assert_eq!(machine.listing(), names);
        for digest in images {
            assert!(machine.get(&path(digest)).await.bytes().await.unwrap() == machine.bytes(digest));
        }
    }
}

#[tokio::test]
async fn a_damaged_copy_is_not_kept() {
    let machine = Machine::new().await;
    let guard = tempfile::tempdir_in("/dev/shm").unwrap();
    let content = Utf8PathBuf::try_from(guard.path().to_owned()).unwrap();
    let store = machine.store_beside(&content);
    machine.want_all();
    let image = &machine.payload.release().image(ImageComponent::Etcd).unwrap().digest;
    fs::write(content.join(image.hex()), "torn").unwrap();
    assert_eq!(store.keep().await.unwrap(), 0);
    assert_eq!(machine.listing(), BTreeSet::new());
}
