//! What the server answers, to clients that behave and to those that do not.

use std::fs;
use std::time::Duration;

use bytes::Bytes;
use kprov_release::Payload;
use kprov_release::serve::ExtraFile;
use kprov_types::release::ImageComponent;
use reqwest::header::{CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, IF_RANGE, RANGE};
use reqwest::{Client, Method, Response, StatusCode};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::common::{Room, Server};

struct Asked {
    status: StatusCode,
    response: Response,
}

impl Asked {
    fn header(&self, name: impl reqwest::header::AsHeaderName) -> &str {
        self.response.headers().get(name).map_or("", |v| v.to_str().unwrap())
    }

    async fn bytes(self) -> Bytes {
        self.response.bytes().await.unwrap()
    }

    /// The code of an error as the distribution specification has it.
    async fn code(self) -> String {
        let body: serde_json::Value = serde_json::from_slice(&self.bytes().await).unwrap();
        body["errors"][0]["code"].as_str().unwrap().to_owned()
    }
}

async fn ask(server: &Server, method: Method, path: &str, headers: &[(&str, &str)]) -> Asked {
    let mut request = Client::builder()
        .no_proxy()
        .build()
        .unwrap()
        .request(method, format!("{}{path}", server.url()));
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let response = request.send().await.unwrap();
    Asked {
        status: response.status(),
        response,
    }
}

async fn get(server: &Server, path: &str) -> Asked {
    ask(server, Method::GET, path, &[]).await
}

/// A payload and the path and bytes of one blob.
fn blob(payload: &Payload) -> (String, Vec<u8>) {
    let file = payload
        .release()
        .host_files
        .iter()
        .find(|f| f.name == "kubelet")
        .unwrap();
    (
        format!("/blobs/{}", file.digest.as_str().replace(':', "/")),
        fs::read(payload.blob_path(&file.digest)).unwrap(),
    )
}

fn install_crypto() {
    // The client insists on one, though it talks plain HTTP here.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

#[tokio::test]
async fn files_of_the_payload() {
    install_crypto();
    let room = Room::new();
    let payload = room.create("p").unwrap();
    let disk = room.path().join("on-disk");
    fs::write(&disk, "from disk").unwrap();
    let extra = vec![
        ("/kprov-node/abc", ExtraFile::Bytes(Bytes::from_static(b"from memory"))),
        ("/disk", ExtraFile::Disk(disk.clone())),
        ("/gone", ExtraFile::Disk(room.path().join("gone"))),
    ];
    let server = Server::of(&payload, extra).await;
    // What was opened is served, even when the file changes: machines were given its digest.
    fs::write(payload.root().join("release.json"), "{}").unwrap();
    assert_eq!(
        get(&server, "/release.json").await.bytes().await,
        payload.release_bytes()
    );
    let signature = fs::read(payload.root().join("release.json.sig")).unwrap();
    assert_eq!(get(&server, "/release.json.sig").await.bytes().await, signature);
    assert_eq!(get(&server, "/kprov-node/abc").await.bytes().await, "from memory");
    assert_eq!(get(&server, "/disk?x=y").await.bytes().await, "from disk");
    let part = ask(&server, Method::GET, "/kprov-node/abc", &[("range", "bytes=5-")]).await;
    assert_eq!(part.bytes().await, "memory");

    let (path, bytes) = blob(&payload);
    let whole = get(&server, &path).await;
    assert_eq!(whole.status, StatusCode::OK);
    assert_eq!(whole.header("accept-ranges"), "bytes");
    assert_eq!(whole.header(CONTENT_LENGTH), bytes.len().to_string());
    assert_eq!(whole.bytes().await, bytes);
    let head = ask(&server, Method::HEAD, &path, &[("range", "bytes=0-1")]).await;
    assert_eq!(
        (head.status, head.header(CONTENT_LENGTH)),
        (StatusCode::OK, bytes.len().to_string().as_str())
    );
    assert!(head.bytes().await.is_empty());

    for absent in [
        "/",
        "/gone",
        "/index.json",
        "/oci-layout",
        &path[..path.len() - 1],
        "/blobs/sha256/",
        "/disk/",
    ] {
        assert_eq!(get(&server, absent).await.status, StatusCode::NOT_FOUND, "{absent}");
    }
    let posted = ask(&server, Method::POST, "/release.json", &[]).await;
    assert_eq!(
        (posted.status, posted.header("allow")),
        (StatusCode::METHOD_NOT_ALLOWED, "GET, HEAD")
    );
}

#[tokio::test]
async fn ranges() {
    install_crypto();
    let room = Room::new();
    let payload = room.create("p").unwrap();
    let server = Server::of(&payload, vec![]).await;
    let (path, bytes) = blob(&payload);
    let length = bytes.len();
    let range = async |value: &str| ask(&server, Method::GET, &path, &[("range", value)]).await;
    for (value, first, end) in [
        ("bytes=0-0", 0, 1),
        ("bytes=1000-299999", 1000, 300_000),
        ("bytes=5-", 5, length),
        ("bytes=-7", length - 7, length),
        ("bytes=5-99999999999", 5, length),
    ] {
        let part = range(value).await;
        assert_eq!(part.status, StatusCode::PARTIAL_CONTENT, "{value}");
        assert_eq!(
            part.header(CONTENT_RANGE),
            format!("bytes {first}-{}/{length}", end - 1)
        );
        assert_eq!(part.header(CONTENT_LENGTH), (end - first).to_string());
        assert!(part.bytes().await == bytes[first..end], "{value}");
    }
    let beyond = range(&format!("bytes={length}-")).await;
    assert_eq!(beyond.status, StatusCode::RANGE_NOT_SATISFIABLE);
    assert_eq!(beyond.header(CONTENT_RANGE), format!("bytes */{length}"));
    for ignored in ["bytes=1-0", "bytes=0-1,3-4", "pages=1-2", "nonsense"] {
        assert_eq!(range(ignored).await.status, StatusCode::OK, "{ignored}");
    }

    let etag = get(&server, &path).await.header(ETAG).to_owned();
    for (condition, status) in [
        (etag.as_str(), StatusCode::PARTIAL_CONTENT),
        ("\"other\"", StatusCode::OK),
    ] {
        let headers = [(RANGE.as_str(), "bytes=0-1"), (IF_RANGE.as_str(), condition)];
        assert_eq!(
            ask(&server, Method::GET, &path, &headers).await.status,
            status,
            "{condition}"
        );
    }
}

#[tokio::test]
async fn images_by_the_distribution_api() {
    install_crypto();
    let room = Room::new();
    let payload = room.create("p").unwrap();
    let server = Server::of(&payload, vec![]).await;
    assert_eq!(get(&server, "/v2/").await.status, StatusCode::OK);
    let image = payload.release().image(ImageComponent::Etcd).unwrap();

    // What a client does: tag to digest, manifest, configuration, layers.
    let head = ask(&server, Method::HEAD, "/v2/etcd/manifests/3.5.9?ns=kprov.local", &[]).await;
    assert_eq!(head.status, StatusCode::OK);
    assert_eq!(head.header("docker-content-digest"), image.digest.as_str());
    assert_eq!(head.header(CONTENT_TYPE), "application/vnd.oci.image.manifest.v1+json");
    let manifest = get(&server, &format!("/v2/etcd/manifests/{}?ns=kprov.local", image.digest)).await;
    let manifest = manifest.bytes().await;
    assert_eq!(manifest, fs::read(payload.blob_path(&image.digest)).unwrap());
    let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
    for part in [&manifest["config"], &manifest["layers"][0]] {
        let path = format!("/v2/etcd/blobs/{}?ns=kprov.local", part["digest"].as_str().unwrap());
        let whole = get(&server, &path).await;
        assert_eq!(whole.header(CONTENT_LENGTH), part["size"].to_string());
        let whole = whole.bytes().await;
        let part = ask(&server, Method::GET, &path, &[("range", "bytes=10-19")]).await;
        assert!(part.status == StatusCode::PARTIAL_CONTENT && part.bytes().await == whole[10..20]);
    }

    let absent = "0".repeat(64);
    for (path, status, code) in [
        ("/v2/etcd/manifests/latest".to_owned(), 404, "MANIFEST_UNKNOWN"),
        (format!("/v2/etcd/manifests/sha256:{absent}"), 404, "MANIFEST_UNKNOWN"),
        // Another image's manifest.
        (format!("/v2/pause/manifests/{}", image.digest), 404, "MANIFEST_UNKNOWN"),
        ("/v2/nginx/manifests/1".to_owned(), 404, "NAME_UNKNOWN"),
        (format!("/v2/etcd/blobs/sha256:{absent}"), 404, "BLOB_UNKNOWN"),
        ("/v2/etcd/blobs/sha256:..".to_owned(), 400, "DIGEST_INVALID"),
        ("/v2/etcd/tags/list".to_owned(), 404, "UNKNOWN"),
    ] {
        let asked = get(&server, &path).await;
        assert_eq!(asked.status, status, "{path}");
        assert_eq!(asked.code().await, code, "{path}");
    }
}

/// Sends bytes as they are and returns the whole answer.
async fn raw(server: &Server, request: &str) -> String {
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test]
async fn no_path_leads_out() {
    let room = Room::new();
    let payload = room.create("p").unwrap();
    fs::write(room.path().join("secret"), "the secret").unwrap();
    fs::write(payload.root().join("blobs/secret"), "the secret").unwrap();
    std::os::unix::fs::symlink(room.path().join("secret"), payload.root().join("blobs/sha256/link")).unwrap();
    let server = Server::of(&payload, vec![]).await;
    for path in [
        "/../secret",
        "/blobs/../../secret",
        "/blobs/sha256/../../../secret",
        "/blobs/sha256/../secret",
        "/blobs/sha256/%2e%2e/secret",
        "/blobs/sha256/..%2f..%2f..%2fsecret",
        "/blobs/sha256/link",
        "/blobs/secret",
        "/v2/etcd/blobs/../../../secret",
        "/v2/etcd/blobs/sha256:../../../../secret",
        "/v2/../secret/manifests/x",
        "/v2/etcd/manifests/../../secret",
        "//etc/passwd",
    ] {
        let answer = raw(
            &server,
            &format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"),
        )
        .await;
        assert!(answer.starts_with("HTTP/1.1 40"), "{path}: {answer}");
        assert!(
            !answer.contains("the secret") && !answer.contains("root:"),
            "{path}: {answer}"
        );
    }
    let absolute = "GET http://x/blobs/../secret HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    assert!(raw(&server, absolute).await.starts_with("HTTP/1.1 404"));
}

#[tokio::test]
async fn stops_when_told() {
    install_crypto();
    let room = Room::new();
    let mut server = Server::of(&room.create("p").unwrap(), vec![]).await;
    // An idle connection does not hold it up.
    let client = Client::builder().no_proxy().build().unwrap();
    client
        .get(format!("{}/v2/", server.url()))
        .send()
        .await
        .unwrap()
        .bytes()
        .await
        .unwrap();
    server.stop();
    tokio::time::timeout(Duration::from_secs(3), &mut server.task)
        .await
        .unwrap()
        .unwrap();
    assert!(TcpStream::connect(server.address).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn a_client_that_stands_still_does_not_hold_the_stop_up_for_ever() {
    let room = Room::new();
    let payload = room.create("p").unwrap();
    // More than the sockets' buffers hold, and nobody reads: the server cannot finish writing.
    let large = ExtraFile::Bytes(vec![0; 64 << 20].into());
    let mut server = Server::of(&payload, vec![("/large", large)]).await;
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    stream
        .write_all(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        .await
        .unwrap();
    stream.readable().await.unwrap();
    server.stop();
    (&mut server.task).await.unwrap();
    drop(stream);
}
