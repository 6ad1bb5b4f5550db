//! Fetching from servers that are whole, broken, slow to finish, and wrong.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::sync::{Arc, Mutex};

use camino::Utf8Path;
use flate2::Compression;
use flate2::write::GzEncoder;
use kprov_release::{FetchError, Fetcher, Payload};
use kprov_types::Digest;
use kprov_types::release::{Arch, FileSource, HostFile};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpListener;

use crate::common::{Room, Server};

fn kubelet(payload: &Payload) -> (HostFile, Vec<u8>) {
    let file = payload
        .release()
        .host_files
        .iter()
        .find(|f| f.name == "kubelet")
        .unwrap()
        .clone();
    let bytes = fs::read(payload.blob_path(&file.digest)).unwrap();
    (file, bytes)
}

fn no_parts(dir: &Utf8Path) {
    let names: Vec<_> = dir
        .read_dir_utf8()
        .unwrap()
        .map(|e| e.unwrap().file_name().to_owned())
        .collect();
    assert!(names.iter().all(|n| !n.contains("part")), "{names:?}");
}

/// Nothing listens there.
const NOWHERE: &str = "http://127.0.0.1:1";

#[tokio::test]
async fn a_release_and_its_files() {
    let room = Room::new();
    let payload = room.create("p").unwrap();
    let server = Server::of(&payload, vec![]).await;
    let fetcher = Fetcher::new(vec![NOWHERE.into(), format!("{}/", server.url())]).unwrap();
    assert_eq!(&fetcher.release(&payload.digest()).await.unwrap(), payload.release());

    let (file, bytes) = kubelet(&payload);
    let dest = room.path().join("bin/new/kubelet");
    fetcher.host_file(&file, &dest).await.unwrap();
    assert!(fs::read(&dest).unwrap() == bytes);
    assert_eq!(fs::metadata(&dest).unwrap().permissions().mode() & 0o777, 0o755);
    no_parts(dest.parent().unwrap());

    // Right already: no server is needed. Wrong: replaced.
    let alone = Fetcher::new(vec![NOWHERE.into()]).unwrap();
    fs::set_permissions(&dest, fs::Permissions::from_mode(0o600)).unwrap();
    alone.host_file(&file, &dest).await.unwrap();
    assert_eq!(fs::metadata(&dest).unwrap().permissions().mode() & 0o777, 0o755);
    fs::write(&dest, "old").unwrap();
    assert!(matches!(
        alone.host_file(&file, &dest).await,
        Err(FetchError::Request { .. })
    ));
    assert_eq!(fs::read_to_string(&dest).unwrap(), "old");
    fetcher.host_file(&file, &dest).await.unwrap();
    assert!(fs::read(&dest).unwrap() == bytes);
}

#[tokio::test]
async fn only_the_pinned_release() {
    let room = Room::new();
    let payload = room.create("p").unwrap();
    let other = kprov_release::create(&kprov_release::CreateOptions {
        advisories: vec![],
        ..room.options("q")
    })
    .unwrap();
    let server = Server::of(&payload, vec![]).await;
    let fetcher = Fetcher::new(vec![server.url()]).unwrap();
    let error = fetcher.release(&other.digest()).await.unwrap_err();
    assert!(
        matches!(&error, FetchError::Digest { expected, .. } if *expected == other.digest()),
        "{error}"
    );
    assert!(error.to_string().contains(&server.url()), "{error}");
    let second = Server::of(&other, vec![]).await;
    let both = Fetcher::new(vec![server.url(), second.url()]).unwrap();
    assert_eq!(
        both.release(&other.digest()).await.unwrap().advisories,
        Vec::<String>::new()
    );
    assert!(matches!(
        Fetcher::new(vec![]).unwrap().release(&other.digest()).await,
        Err(FetchError::NoUrl { .. })
    ));
}

#[tokio::test]
async fn wrong_bytes_are_never_kept() {
    let room = Room::new();
    let payload = room.create("p").unwrap();
    let (file, bytes) = kubelet(&payload);
    let good = Server::of(&payload, vec![]).await;
    let bad_payload = room.create("bad").unwrap();
    let blob = bad_payload.blob_path(&file.digest);
    let bad = Server::of(&bad_payload, vec![]).await;
    let dest = room.path().join("bin/kubelet");
    let mut altered = bytes.clone();
    altered[10] ^= 1;
    let longer = [bytes.as_slice(), b"more"].concat();
    for (wrong, is_right) in [
        (
            altered,
            (|e| matches!(e, FetchError::Digest { .. })) as fn(&FetchError) -> bool,
        ),
        (longer, |e| matches!(e, FetchError::WrongSize { .. })),
        (
            bytes[..bytes.len() / 2].to_vec(),
            |e| matches!(e, FetchError::WrongSize { found, expected, .. } if *found == expected / 2),
        ),
    ] {
        fs::write(&blob, wrong).unwrap();
        let error = Fetcher::new(vec![bad.url()])
            .unwrap()
            .host_file(&file, &dest)
            .await
            .unwrap_err();
        assert!(is_right(&error) && error.is_bad(), "{error}");
        assert!(
            error.to_string().contains("`kubelet`") && error.to_string().contains(&bad.url()),
            "{error}"
        );
        assert!(!dest.exists());
        no_parts(dest.parent().unwrap());
        Fetcher::new(vec![bad.url(), good.url()])
            .unwrap()
            .host_file(&file, &dest)
            .await
            .unwrap();
        assert!(fs::read(&dest).unwrap() == bytes);
        fs::remove_file(&dest).unwrap();
    }
    fs::remove_file(&blob).unwrap();
    let error = Fetcher::new(vec![bad.url()])
        .unwrap()
        .host_file(&file, &dest)
        .await
        .unwrap_err();
    assert!(matches!(error, FetchError::Status { status, .. } if status == 404));

    fs::write(room.path().join("file"), "").unwrap();
    let error = Fetcher::new(vec![good.url()])
        .unwrap()
        .host_file(&file, &room.path().join("file/x"))
        .await
        .unwrap_err();
    assert!(matches!(error, FetchError::Write { .. }), "{error}");
}

/// A server that ends every connection after some bytes of the body.
async fn cutting(bytes: Vec<u8>, piece: usize, ranges: bool) -> (Server, Arc<Mutex<Vec<String>>>) {
    let asked = Arc::new(Mutex::new(Vec::new()));
    let seen = asked.clone();
    let server = Server::run(|listener: TcpListener, _| async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let mut stream = BufReader::new(stream);
            let (mut line, mut range) = (String::new(), String::new());
            while stream.read_line(&mut line).await.unwrap() > 2 {
                if let Some(value) = line.to_ascii_lowercase().strip_prefix("range: bytes=") {
                    value.trim().clone_into(&mut range);
                }
                line.clear();
            }
            let first = if ranges { range.trim_end_matches('-').parse().unwrap_or(0) } else { 0 };
            seen.lock().unwrap().push(range);
            let length = bytes.len();
            let head = match first {
                0 => format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n"),
                _ => format!(
                    "HTTP/1.1 206 Partial Content\r\nContent-Length: {}\r\nContent-Range: bytes {first}-{}/{length}\r\n\r\n",
                    length - first,
                    length - 1,
                ),
            };
            stream.write_all(head.as_bytes()).await.unwrap();
            stream.write_all(&bytes[first..length.min(first + piece)]).await.unwrap();
            stream.shutdown().await.unwrap();
        }
    })
    .await;
    (server, asked)
}

#[tokio::test]
async fn a_cut_connection_is_resumed() {
    let room = Room::new();
    let payload = room.create("p").unwrap();
    let (file, bytes) = kubelet(&payload);
    let dest = room.path().join("bin/kubelet");
    let third = bytes.len() / 3;
    let (server, asked) = cutting(bytes.clone(), third + 1, true).await;
    Fetcher::new(vec![server.url()])
        .unwrap()
        .host_file(&file, &dest)
        .await
        .unwrap();
    assert!(fs::read(&dest).unwrap() == bytes);
    let first = third + 1;
    assert_eq!(
        *asked.lock().unwrap(),
        [String::new(), format!("{first}-"), format!("{}-", 2 * first)]
    );

    // Another server goes on where the first one gave up.
    fs::remove_file(&dest).unwrap();
    let (slow, _) = cutting(bytes.clone(), bytes.len() / 20, true).await;
    let (rest, asked) = cutting(bytes.clone(), bytes.len(), true).await;
    Fetcher::new(vec![slow.url(), rest.url()])
        .unwrap()
        .host_file(&file, &dest)
        .await
        .unwrap();
    assert!(fs::read(&dest).unwrap() == bytes);
    assert_eq!(*asked.lock().unwrap(), [format!("{}-", bytes.len() / 20 * 5)]);

    // Without ranges it begins anew, and gives up in the end.
    fs::remove_file(&dest).unwrap();
    let (server, asked) = cutting(bytes.clone(), third, false).await;
    let error = Fetcher::new(vec![server.url()])
        .unwrap()
        .host_file(&file, &dest)
        .await
        .unwrap_err();
    assert!(
        matches!(error, FetchError::Broken { received, .. } if received == third as u64),
        "{error}"
    );
    assert_eq!(asked.lock().unwrap().len(), 5);
    assert!(!dest.exists());
    no_parts(dest.parent().unwrap());
}

#[tokio::test]
async fn wrong_bytes_are_told_from_those_that_may_come_yet() {
    let room = Room::new();
    let payload = room.create("p").unwrap();
    let (file, bytes) = kubelet(&payload);
    let dest = room.path().join("bin/kubelet");
    let mut altered = bytes.clone();
    altered[10] ^= 1;
    let (bad, _) = cutting(altered.clone(), bytes.len(), true).await;
    let without = Server::of(&payload, vec![]).await;
    fs::remove_file(payload.blob_path(&file.digest)).unwrap();
    let fetch = async |urls: &[&str]| {
        let fetcher = Fetcher::new(urls.iter().map(|u| (*u).to_owned()).collect()).unwrap();
        fetcher.host_file(&file, &dest).await.unwrap_err()
    };
    // A source that does not have it says nothing about the bytes of another; one out of reach may have the right ones.
    for (urls, is_bad) in [
        (vec![bad.url()], true),
        (vec![bad.url(), without.url()], true),
        (vec![without.url(), bad.url()], true),
        (vec![bad.url(), NOWHERE.into()], false),
        (vec![NOWHERE.into(), bad.url()], false),
        (vec![without.url(), NOWHERE.into()], false),
        (vec![without.url()], false),
        (vec![], false),
    ] {
        let urls: Vec<&str> = urls.iter().map(String::as_str).collect();
        let error = fetch(&urls).await;
        assert_eq!(error.is_bad(), is_bad, "{urls:?}: {error}");
    }

    // The bytes of one that breaks off do not spoil those of the next.
    let (broken, _) = cutting(altered, bytes.len() / 20, true).await;
    let (good, asked) = cutting(bytes.clone(), bytes.len(), true).await;
    let both = Fetcher::new(vec![broken.url(), good.url()]).unwrap();
    both.host_file(&file, &dest).await.unwrap();
    assert!(fs::read(&dest).unwrap() == bytes);
    assert_eq!(
        *asked.lock().unwrap(),
        [format!("{}-", bytes.len() / 20 * 5), String::new()]
    );
}

#[tokio::test]
async fn many_files_at_once() {
    let room = Room::new();
    let payload = room.create("p").unwrap();
    let server = Server::of(&payload, vec![]).await;
    let fetcher = Fetcher::new(vec![NOWHERE.into(), server.url()]).unwrap();
    let (fetcher, room) = (&fetcher, &room);
    let files = payload.release().host_files.iter().map(|file| async move {
        let dest = room.path().join("bin").join(&file.name);
        fetcher.host_file(file, &dest).await.map(|()| dest)
    });
    for (dest, file) in futures::future::try_join_all(files)
        .await
        .unwrap()
        .iter()
        .zip(&payload.release().host_files)
    {
        assert!(fs::read(dest).unwrap() == fs::read(payload.blob_path(&file.digest)).unwrap());
    }
}

/// A gzip-compressed tar archive of these files.
pub(crate) fn archive(files: &[(&str, &str)]) -> Vec<u8> {
    let mut tar = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
    for (path, text) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(0o644);
        // As it stands, with `./` in front too.
        header.as_gnu_mut().unwrap().name[..path.len()].copy_from_slice(path.as_bytes());
        header.set_cksum();
        tar.append(&header, text.as_bytes()).unwrap();
    }
    tar.into_inner().unwrap().finish().unwrap()
}

#[tokio::test]
async fn members_of_an_archive() {
    let room = Room::new();
    let bytes = archive(&[("./bridge", "the bridge"), ("bin/containerd", "the runtime")]);
    let digest = Digest::from_bytes(<sha2::Sha256 as sha2::Digest>::digest(&bytes).into());
    let (server, asked) = cutting(bytes.clone(), bytes.len(), true).await;
    let file = |member: &str| HostFile {
        name: "x".into(),
        arch: Arch::Amd64,
        digest: digest.clone(),
        size: bytes.len() as u64,
        source: FileSource::Url {
            url: format!("{}/a.tgz", server.url()),
            member: Some(member.into()),
        },
        version: None,
    };
    let fetcher = Fetcher::new(vec![]).unwrap();
    let dest = |name: &str| room.path().join("bin").join(name);
    for (member, text) in [
        ("./bridge", "the bridge"),
        ("bridge", "the bridge"),
        ("bin/containerd", "the runtime"),
    ] {
        fetcher.host_file(&file(member), &dest("file")).await.unwrap();
        assert_eq!(fs::read_to_string(dest("file")).unwrap(), text);
        assert_eq!(fs::metadata(dest("file")).unwrap().permissions().mode() & 0o777, 0o755);
    }
    let error = fetcher.host_file(&file("bin/ctr"), &dest("ctr")).await.unwrap_err();
    assert!(
        matches!(error, FetchError::Archive { .. }) && error.to_string().contains("`bin/ctr`"),
        "{error}"
    );
    // All of that in one download.
    assert_eq!(asked.lock().unwrap().len(), 1);
    assert!(!dest("ctr").exists());
    no_parts(&room.path().join("bin"));

    let other = HostFile {
        digest: Digest::from_bytes([7; 32]),
        ..file("./bridge")
    };
    assert!(matches!(
        fetcher.host_file(&other, &dest("ctr")).await,
        Err(FetchError::Digest { .. })
    ));
    assert!(!dest("ctr").exists());
}
