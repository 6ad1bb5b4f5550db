//! A payload that refers to a registry and download sites, which one server stands in for here.

use std::collections::BTreeMap;
use std::fs;

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, Uri};
use kprov_release::online::Published;
use kprov_release::{
    CreateError, Fetcher, OnlineError, OnlineOptions, OutputError, Runtime, VerifyOptions, create_online, upload,
};
use kprov_types::Digest;
use kprov_types::release::{Arch, FileSource, ImageComponent};
use sha2::{Digest as _, Sha256};

use crate::common::{Room, Server};
use crate::fetch::archive;

type Files = BTreeMap<String, Vec<u8>>;

fn sha256(bytes: &[u8]) -> Digest {
    Digest::from_bytes(Sha256::digest(bytes).into())
}

async fn answer(State(files): State<Files>, uri: Uri, headers: HeaderMap) -> (StatusCode, HeaderMap, Bytes) {
    let mut out = HeaderMap::new();
    let Some(bytes) = files.get(uri.path()) else {
        return (StatusCode::NOT_FOUND, out, Bytes::new());
    };
    if uri.path().starts_with("/v2/") {
        let accepted = headers.get("accept").map_or("", |v| v.to_str().unwrap());
        assert!(
            accepted.contains("application/vnd.oci.image.index.v1+json"),
            "{accepted}"
        );
        let said = files.get(&format!("{}#digest", uri.path()));
        let digest = said.map_or(sha256(bytes).to_string(), |d| String::from_utf8(d.clone()).unwrap());
        out.insert("docker-content-digest", digest.parse().unwrap());
    }
    (StatusCode::OK, out, bytes.clone().into())
}

async fn stand_in(files: &Files) -> Server {
    let app = Router::new().fallback(answer).with_state(files.clone());
    Server::run(|listener, _| async move { axum::serve(listener, app).await.unwrap() }).await
}

/// What the official sites have of Kubernetes 1.36.3 for one architecture.
fn published() -> Files {
    let mut files = Files::new();
    for (name, tag) in [
        ("kube-apiserver", "v1.36.3"),
        ("kube-controller-manager", "v1.36.3"),
        ("kube-scheduler", "v1.36.3"),
        ("kube-proxy", "v1.36.3"),
        ("etcd", "3.6.8-0"),
        ("coredns/coredns", "v1.14.2"),
        ("pause", "3.10.2"),
    ] {
        files.insert(format!("/v2/{name}/manifests/{tag}"), format!("index of {name}").into());
    }
    for name in ["kubelet", "kubectl"] {
        let path = format!("/release/v1.36.3/bin/linux/amd64/{name}");
        let bytes = name.repeat(1000).into_bytes();
        files.insert(format!("{path}.sha256"), sha256(&bytes).hex().into());
        files.insert(path, bytes);
    }
    let containerd = archive(&[
        ("bin/containerd", "containerd"),
        ("bin/containerd-shim-runc-v2", "containerd-shim-runc-v2"),
        ("bin/ctr", "ctr"),
    ]);
    let cni = archive(&[
        ("./bridge", "bridge"),
        ("./host-local", "host-local"),
        ("./loopback", "loopback"),
        ("./portmap", "portmap"),
    ]);
    for (dir, name, sums, bytes) in [
        (
            "/containerd/v2.9.9",
            "containerd-2.9.9-linux-amd64.tar.gz",
            "containerd-2.9.9-linux-amd64.tar.gz.sha256sum",
            containerd,
        ),
        ("/runc/v1.9.9", "runc.amd64", "runc.sha256sum", b"runc".to_vec()),
        (
            "/cni/v1.8.8",
            "cni-plugins-linux-amd64-v1.8.8.tgz",
            "cni-plugins-linux-amd64-v1.8.8.tgz.sha256",
            cni,
        ),
    ] {
        let sum = format!("{}  other\n{}  {name}\n", "0".repeat(64), sha256(&bytes).hex());
        files.insert(format!("{dir}/{sums}"), sum.into());
        files.insert(format!("{dir}/{name}"), bytes);
    }
    files
}

fn options(room: &Room, server: &Server, version: &str) -> OnlineOptions {
    let published = |version: &str, path: &str| Published {
        version: version.into(),
        site: server.url() + path,
    };
    OnlineOptions {
        download_site: server.url(),
        registry: server.address.to_string(),
        runtime: Runtime {
            containerd: published("2.9.9", "/containerd"),
            runc: published("1.9.9", "/runc"),
            cni_plugins: published("1.8.8", "/cni/"),
        },
        signing_key: Some(room.key.clone()),
        without_kprov: true,
        ..OnlineOptions::official(version.parse().unwrap(), Arch::Amd64, room.path().join("online"))
    }
}

#[tokio::test]
async fn refers_to_everything_by_digest() {
    let room = Room::new();
    let files = published();
    let server = stand_in(&files).await;
    let payload = create_online(&options(&room, &server, "1.36.3")).await.unwrap();
    let verified = payload.verify(&room.trusted(), VerifyOptions::default()).unwrap();
    assert_eq!((verified.signature, verified.blobs), (Ok(room.key.public().id()), 0));
    let mut names: Vec<_> = payload
        .root()
        .read_dir_utf8()
        .unwrap()
        .map(|e| e.unwrap().file_name().to_owned())
        .collect();
    names.sort();
    assert_eq!(names, ["release.json", "release.json.sig"]);

    let release = payload.release();
    assert_eq!(release.images.len(), 7);
    let coredns = release.image(ImageComponent::Coredns).unwrap();
    assert_eq!(coredns.reference, format!("{}/coredns/coredns:v1.14.2", server.address));
    assert_eq!(coredns.digest, sha256(b"index of coredns/coredns"));
    assert_eq!(coredns.version.as_deref(), Some("1.14.2"));

    // What it refers to can be fetched without the payload's own server.
    let fetcher = Fetcher::new(vec![]).unwrap();
    assert_eq!(release.host_files.len(), 10);
    for file in &release.host_files {
        assert!(matches!(file.source, FileSource::Url { .. }));
        let dest = room.path().join("bin").join(&file.name);
        fetcher.host_file(file, &dest).await.unwrap();
        let text = fs::read_to_string(&dest).unwrap();
        assert!(text.starts_with(dest.file_name().unwrap()), "{text}");
    }

    // Again is fine, and gives the same.
    assert_eq!(
        create_online(&options(&room, &server, "1.36.3"))
            .await
            .unwrap()
            .digest(),
        payload.digest()
    );
}

#[tokio::test]
async fn carries_what_nobody_publishes() {
    let room = Room::new();
    let server = stand_in(&published()).await;
    let mut options = OnlineOptions {
        kprov_programs: Some(room.kprov()),
        without_kprov: false,
        ..options(&room, &server, "1.36.3")
    };
    let payload = create_online(&options).await.unwrap();
    let verified = payload.verify(&room.trusted(), VerifyOptions::default()).unwrap();
    // kprov-node; the operator's manifest, configuration and layer.
    assert_eq!(verified.blobs, 4);
    let release = payload.release();
    assert_eq!((release.images.len(), release.host_files.len()), (8, 11));
    let operator = release.image(ImageComponent::KprovOperator).unwrap();
    assert_eq!(operator.reference, "kprov.local/kprov-operator:1.2.3_x");
    let node = release.host_files.iter().find(|f| f.name == "kprov-node").unwrap();
    assert_eq!(node.source, FileSource::Carried);
    let blobs = upload::blobs_of(&payload).unwrap();
    assert_eq!(blobs.len(), 4);
    assert_eq!(blobs[0].0, operator.digest);
    let named = upload::named_by(release);
    assert_eq!(named, [operator.digest.clone(), node.digest.clone()].into());

    // What is beside kprov is for one architecture.
    options.archs = vec![Arch::Amd64, Arch::Arm64];
    options.out = room.path().join("both");
    let error = create_online(&options).await.unwrap_err();
    assert!(
        matches!(error, OnlineError::Kprov(CreateError::WrongArch { .. })),
        "{error}"
    );
    fs::remove_file(room.kprov().join("kprov-node")).unwrap();
    let error = create_online(&options).await.unwrap_err();
    assert!(
        error.to_string().contains("`kprov-node`") && error.hint().unwrap().contains("--without-kprov"),
        "{error}"
    );
    assert_eq!(room.listing(), ["kprov", "online", "programs"]);
}

#[tokio::test]
async fn what_does_not_exist_is_named() {
    let room = Room::new();
    let mut files = published();
    let server = stand_in(&files).await;
    let error = create_online(&options(&room, &server, "1.36.99")).await.unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, OnlineError::NoSuchVersion { .. }), "{text}");
    assert!(
        text.contains("1.36.99") && text.contains(&server.url()) && error.hint().is_some(),
        "{text}"
    );

    let error = create_online(&options(&room, &server, "1.28.0")).await.unwrap_err();
    assert!(
        matches!(error, OnlineError::UnknownMinor(_)) && error.to_string().contains("`1.28.0`"),
        "{error}"
    );

    files.remove("/runc/v1.9.9/runc.amd64");
    let server = stand_in(&files).await;
    let error = create_online(&options(&room, &server, "1.36.3")).await.unwrap_err();
    assert!(matches!(&error, OnlineError::NoSuchVersion { name, version, .. } if name == "runc" && version == "1.9.9"));

    files.insert("/runc/v1.9.9/runc.sha256sum".into(), "<html>".into());
    let server = stand_in(&files).await;
    let error = create_online(&options(&room, &server, "1.36.3")).await.unwrap_err();
    assert!(matches!(&error, OnlineError::NoChecksum { .. }), "{error}");

    files.insert(
        "/v2/etcd/manifests/3.6.8-0#digest".into(),
        sha256(b"other").as_str().into(),
    );
    let server = stand_in(&files).await;
    let error = create_online(&options(&room, &server, "1.36.3")).await.unwrap_err();
    assert!(
        matches!(&error, OnlineError::RegistryDigest { url, .. } if url.contains("/etcd/")),
        "{error}"
    );

    let mut nowhere = options(&room, &server, "1.36.3");
    nowhere.registry = "127.0.0.1:1".into();
    let error = create_online(&nowhere).await.unwrap_err();
    assert!(
        matches!(error, OnlineError::Fetch(_)) && error.hint().unwrap().contains("directory"),
        "{error}"
    );
    assert_eq!(room.listing(), ["kprov", "programs"]);

    nowhere.out = room.programs();
    let error = create_online(&nowhere).await.unwrap_err();
    assert!(
        matches!(error, OnlineError::Output(OutputError::Exists { .. })),
        "{error}"
    );
}
