//! Making payloads, and finding out what is wrong with them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Read as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::process::Command;

use camino::{Utf8Path, Utf8PathBuf};
use kprov_release::keys::SignatureError;
use kprov_release::payload::ReleaseFormatError;
use kprov_release::{
    CreateError, OutputError, Payload, PayloadError, PublicKey, ReadReleaseError, SigningKey, TrustedKeys,
    VerifyOptions, read_release, upload,
};
use kprov_types::Digest;
use kprov_types::release::{Arch, ImageComponent, ProgramFacts};
use sha2::{Digest as _, Sha256};
use walkdir::WalkDir;

use crate::common::{KUBERNETES, Room, VERSION, compiled};

fn tree(root: &Utf8Path) -> BTreeMap<String, Vec<u8>> {
    WalkDir::new(root)
        .into_iter()
        .map(Result::unwrap)
        .filter(|e| e.file_type().is_file())
        .map(|e| {
            (
                e.path().strip_prefix(root).unwrap().to_str().unwrap().to_owned(),
                fs::read(e.path()).unwrap(),
            )
        })
        .collect()
}

/// The blobs of an image: manifest, configuration, layer.
fn blobs(payload: &Payload, component: ImageComponent) -> [Utf8PathBuf; 3] {
    let manifest = payload.blob_path(&payload.release().image(component).unwrap().digest);
    let parsed: serde_json::Value = serde_json::from_slice(&fs::read(&manifest).unwrap()).unwrap();
    let digest = |v: &serde_json::Value| v["digest"].as_str().unwrap().parse::<Digest>().unwrap();
    let config = payload.blob_path(&digest(&parsed["config"]));
    let layer = payload.blob_path(&digest(&parsed["layers"][0]));
    [manifest, config, layer]
}

/// The paths in an image, with links' targets.
fn image_paths(payload: &Payload, component: ImageComponent) -> Vec<String> {
    let layer = fs::read(&blobs(payload, component)[2]).unwrap();
    let mut archive = tar::Archive::new(layer.as_slice());
    let entries = archive.entries().unwrap().map(Result::unwrap);
    entries
        .map(|e| match e.link_name().unwrap() {
            Some(target) => format!("{} -> {}", e.path().unwrap().display(), target.display()),
            None => e.path().unwrap().display().to_string(),
        })
        .collect()
}

fn strict(payload: &Payload, trusted: &TrustedKeys) -> Result<kprov_release::Verified, PayloadError> {
    payload.verify(trusted, VerifyOptions::default())
}

#[test]
fn equal_programs_make_equal_payloads() {
    let room = Room::new();
    let first = room.create("a").unwrap();
    assert_eq!(room.listing(), ["a", "kprov", "programs"]);
    assert_eq!(fs::metadata(first.root()).unwrap().permissions().mode() & 0o777, 0o755);

    // Other times and modes, another order of directories.
    let kubelet = room.programs().join("kubelet");
    fs::rename(&kubelet, room.path().join("moved")).unwrap();
    room.put(&room.path().join("moved"), "bin/kubelet");
    fs::remove_file(room.path().join("moved")).unwrap();
    fs::set_permissions(room.programs().join("etcd"), fs::Permissions::from_mode(0o700)).unwrap();
    let second = room.create("b").unwrap();
    assert_eq!(first.digest(), second.digest());
    assert_eq!(tree(first.root()), tree(second.root()));

    // The same payload again is fine; anything else in its place is not.
    assert_eq!(room.create("a").unwrap().digest(), first.digest());
    fs::write(second.root().join("extra"), "").unwrap();
    let error = room.create("b").unwrap_err();
    assert!(
        matches!(&error, CreateError::Output(OutputError::Exists { path }) if path == second.root()),
        "{error}"
    );
    assert_eq!(room.listing(), ["a", "b", "kprov", "programs"]);
}

#[test]
fn what_a_payload_holds() {
    let room = Room::new();
    room.put(&compiled(VERSION, &["-static"]), "coredns");
    room.put(&compiled(VERSION, &["-static"]), "kubectl");
    let payload = room.create("p").unwrap();
    let release = payload.release();
    let images: Vec<_> = release.images.values().map(|i| i.reference.as_str()).collect();
    assert_eq!(
        images,
        [
            "kprov.local/kube-apiserver:v1.30.4",
            "kprov.local/kube-controller-manager:v1.30.4",
            "kprov.local/kube-scheduler:v1.30.4",
            "kprov.local/kube-proxy:v1.30.4",
            "kprov.local/etcd:3.5.9",
            "kprov.local/coredns:1.11.3",
            "kprov.local/pause:1",
            "kprov.local/kprov-operator:1.2.3_x",
        ]
    );
    let files: Vec<_> = release
        .host_files
        .iter()
        .map(|f| (f.name.as_str(), f.version.as_deref()))
        .collect();
    assert_eq!(
        files,
        [
            ("cni/bridge", None),
            ("cni/host-local", None),
            ("cni/loopback", None),
            ("containerd", Some("1.2.3+x")),
            ("containerd-shim-runc-v2", Some("1.2.3+x")),
            ("kprov-node", Some("1.2.3+x")),
            ("kubectl", None),
            ("kubelet", Some("1.30.4")),
            ("runc", Some("1.2.3+x")),
        ]
    );
    assert_eq!(release.advisories, ["CVE-2024-0001"]);
    let facts = ProgramFacts {
        flags: vec!["config".into(), "feature-gates".into()],
        feature_gates: vec!["AllAlpha".into()],
    };
    // etcd has no `--help` here.
    assert_eq!(
        release.programs,
        KUBERNETES.map(|name| (name.to_owned(), facts.clone())).into()
    );
    let operator = image_paths(&payload, ImageComponent::KprovOperator);
    assert!(
        operator.contains(&"usr/local/bin/kprov-operator".to_owned()),
        "{operator:?}"
    );
    assert_eq!(image_paths(&payload, ImageComponent::Pause), ["pause"]);
    let etcd = image_paths(&payload, ImageComponent::Etcd);
    for path in ["usr/local/bin/etcd", "usr/local/bin/etcdctl", "etc/passwd", "tmp"] {
        assert!(
            etcd.iter().any(|p| p.trim_end_matches('/') == path),
            "{path} in {etcd:?}"
        );
    }
    assert!(image_paths(&payload, ImageComponent::Coredns).contains(&"coredns".to_owned()));
    assert_eq!(
        image_paths(&payload, ImageComponent::KubeProxy),
        [
            "usr/",
            "usr/local/",
            "usr/local/bin/",
            "usr/local/bin/kube-proxy",
            "usr/sbin/",
            "usr/sbin/iptables -> xtables",
            "usr/sbin/xtables",
        ]
    );

    // As an OCI layout: what the index names is there, and the layer's digest is the `diff_id`.
    let json = |path: &Utf8Path| serde_json::from_slice::<serde_json::Value>(&fs::read(path).unwrap()).unwrap();
    assert_eq!(json(&payload.root().join("oci-layout"))["imageLayoutVersion"], "1.0.0");
    let index = json(&payload.root().join("index.json"));
    let named: Vec<_> = index["manifests"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| m["annotations"]["org.opencontainers.image.ref.name"].as_str().unwrap())
        .collect();
    for image in &images {
        assert!(named.contains(image), "{image} in {named:?}");
    }
    let [manifest, config, layer] = blobs(&payload, ImageComponent::Etcd);
    assert_eq!(
        json(&manifest)["layers"][0]["size"],
        fs::metadata(&layer).unwrap().len()
    );
    assert_eq!(
        json(&config)["rootfs"]["diff_ids"][0],
        format!("sha256:{}", layer.file_name().unwrap())
    );
}

#[test]
fn programs_are_found_where_archives_have_them() {
    let room = Room::new();
    let programs = room.programs();
    for name in KUBERNETES {
        let to = programs.join("kubernetes/server/bin").join(name);
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::rename(programs.join(name), to).unwrap();
    }
    fs::create_dir(programs.join("cni/bin")).unwrap();
    fs::rename(programs.join("cni/bridge"), programs.join("cni/bin/bridge")).unwrap();
    // One program for all of Kubernetes.
    fs::rename(
        programs.join("kubernetes/server/bin/kube-scheduler"),
        programs.join("hyperkube"),
    )
    .unwrap();
    // A second directory with the rest.
    let second = room.path().join("second");
    fs::create_dir(&second).unwrap();
    fs::create_dir(second.join("bin")).unwrap();
    fs::rename(programs.join("etcd"), second.join("bin/etcd")).unwrap();
    let mut options = room.options("p");
    options.from.push(second);
    let payload = kprov_release::create(&options).unwrap();
    let scheduler = image_paths(&payload, ImageComponent::KubeScheduler);
    assert!(
        scheduler.contains(&"usr/local/bin/kube-scheduler".to_owned()),
        "{scheduler:?}"
    );
}

#[test]
fn everything_missing_is_named_at_once() {
    let room = Room::new();
    for name in ["kubelet", "kube-proxy", "etcd", "cni/loopback"] {
        fs::remove_file(room.programs().join(name)).unwrap();
    }
    let error = room.create("p").unwrap_err();
    let CreateError::Missing { missing, .. } = &error else {
        panic!("{error}")
    };
    let names: Vec<_> = missing.iter().map(|m| m.name).collect();
    assert_eq!(names, ["kube-proxy", "kubelet", "etcd", "loopback"]);
    let text = error.to_string();
    for place in ["", "/bin", "/server/bin", "/kubernetes/server/bin", "/cni", "/cni/bin"] {
        assert!(
            text.contains(&format!("`{}{place}`", room.programs())),
            "{place}: {text}"
        );
    }
    let hint = error.hint().unwrap();
    assert!(
        hint.contains("`etcd-server`") && hint.contains("`containernetworking-plugins`"),
        "{hint}"
    );
    assert_eq!(room.listing(), ["kprov", "programs"]);

    let absent = kprov_release::create(&kprov_release::CreateOptions {
        from: vec![room.path().join("absent")],
        ..room.options("p")
    });
    assert!(matches!(absent, Err(CreateError::Output(OutputError::Read { .. }))));
}

#[test]
fn kprovs_own_programs() {
    let room = Room::new();
    fs::remove_file(room.kprov().join("kprov-operator")).unwrap();
    let error = room.create("p").unwrap_err();
    assert!(
        matches!(&error, CreateError::NoKprov { missing } if missing.len() == 1),
        "{error}"
    );
    let (text, hint) = (error.to_string(), error.hint().unwrap());
    for part in ["`kprov-operator`", room.kprov().as_str(), room.programs().as_str()] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(hint.contains("`--without-kprov`"), "{hint}");

    // From the directories too, and those first.
    room.put(&compiled(VERSION, &["-static"]), "bin/kprov-operator");
    room.put(&compiled("1.30.5", &["-static"]), "kprov-node");
    let payload = room.create("with").unwrap();
    let node = |payload: &Payload| {
        payload
            .release()
            .host_files
            .iter()
            .find(|f| f.name == "kprov-node")
            .cloned()
    };
    let bytes = fs::read(payload.blob_path(&node(&payload).unwrap().digest)).unwrap();
    assert!(bytes == fs::read(room.programs().join("kprov-node")).unwrap());

    let without = kprov_release::create(&kprov_release::CreateOptions {
        without_kprov: true,
        ..room.options("without")
    })
    .unwrap();
    assert_eq!(node(&without), None);
    assert_eq!(without.release().image(ImageComponent::KprovOperator), None);
    assert!(strict(&without, &room.trusted()).is_ok());
    let index = fs::read_to_string(without.root().join("index.json")).unwrap();
    assert!(
        !index.contains("kprov-operator") && index.contains("kube-proxy"),
        "{index}"
    );
}

#[test]
fn blobs_of_another_payload_are_linked() {
    let room = Room::new();
    let first = room.create("first").unwrap();
    room.put(&compiled("1.30.5", &["-static"]), "etcd");
    let [manifest, ..] = blobs(&first, ImageComponent::KubeScheduler);
    // One of them is damaged, which must not spread.
    let good = fs::read(&manifest).unwrap();
    let mut altered = good.clone();
    altered[0] ^= 1;
    fs::write(&manifest, altered).unwrap();
    let options = kprov_release::CreateOptions {
        reuse: vec![room.path().join("absent"), first.root().to_owned()],
        ..room.options("second")
    };
    let second = kprov_release::create(&options).unwrap();
    assert!(strict(&second, &room.trusted()).is_ok());
    let again = kprov_release::create(&kprov_release::CreateOptions {
        reuse: vec![],
        ..room.options("again")
    })
    .unwrap();
    assert_eq!(tree(second.root()), tree(again.root()));
    let same_file = |path: &Utf8Path| {
        let inode = |root: &Utf8Path| {
            fs::metadata(root.join(path.strip_prefix(second.root()).unwrap()))
                .unwrap()
                .ino()
        };
        inode(first.root()) == inode(second.root())
    };
    let [manifest, config, layer] = blobs(&second, ImageComponent::KubeScheduler);
    assert!(!same_file(&manifest) && same_file(&config) && same_file(&layer));
    assert!(fs::read(manifest).unwrap() == good);
}

#[test]
fn versions_with_build_metadata() {
    let room = Room::new();
    for name in KUBERNETES {
        room.put(&compiled("1.21.0+x", &["-static"]), name);
    }
    let mut options = room.options("p");
    options.version = "1.21.0+x".parse().unwrap();
    let payload = kprov_release::create(&options).unwrap();
    let image = payload.release().image(ImageComponent::KubeApiserver).unwrap();
    assert_eq!(image.reference, "kprov.local/kube-apiserver:v1.21.0_x");
    assert_eq!(image.version.as_deref(), Some("1.21.0+x"));
    assert_eq!(payload.release().kubernetes, options.version);

    // Another build of the same version is another version.
    options.version = "1.21.0+y".parse().unwrap();
    options.out = room.path().join("q");
    let error = kprov_release::create(&options).unwrap_err();
    assert!(matches!(error, CreateError::WrongVersion { .. }), "{error}");
}

#[test]
fn what_has_to_be_put_comes_in_order() {
    let room = Room::new();
    let payload = room.create("p").unwrap();
    let order = upload::blobs_of(&payload).unwrap();
    let manifests: BTreeSet<_> = payload.release().images.values().map(|i| i.digest.clone()).collect();
    let (first, rest) = order.split_at(manifests.len());
    assert_eq!(first.iter().map(|(d, _)| d.clone()).collect::<BTreeSet<_>>(), manifests);
    assert!(rest.is_sorted_by_key(|(_, size)| std::cmp::Reverse(*size)));
    let all: BTreeMap<_, _> = order.iter().cloned().collect();
    assert_eq!(all.len(), order.len());
    let here: BTreeMap<_, _> = payload
        .root()
        .join("blobs/sha256")
        .read_dir_utf8()
        .unwrap()
        .map(Result::unwrap)
        .map(|e| (Digest::from_hex(e.file_name()).unwrap(), e.metadata().unwrap().len()))
        .collect();
    assert_eq!(all, here);
    let named = upload::named_by(payload.release());
    assert!(manifests.is_subset(&named));
    assert!(payload.release().host_files.iter().all(|f| named.contains(&f.digest)));
}

#[test]
fn a_release_by_itself() {
    let room = Room::new();
    let payload = room.create("p").unwrap();
    let (bytes, digest) = (payload.release_bytes(), payload.digest());
    assert_eq!(read_release(bytes, &digest).unwrap(), *payload.release());
    let text = payload.signature().unwrap().unwrap();
    assert_eq!(room.trusted().check(bytes, &text), Ok(room.key.public().id()));
    let altered = String::from_utf8(bytes.to_vec())
        .unwrap()
        .replace("CVE-2024-0001", "CVE-2024-0002");
    assert!(matches!(
        read_release(altered.as_bytes(), &digest),
        Err(ReadReleaseError::Digest { expected, .. }) if expected == digest
    ));
    assert!(matches!(
        read_release(b"{}", &Digest::from_bytes(Sha256::digest(b"{}").into())),
        Err(ReadReleaseError::Format(_))
    ));
    let public = room.key.public();
    assert_eq!(PublicKey::from_pem(&public.to_pem()), Some(public));
    assert_eq!(PublicKey::from_pem("nonsense"), None);
}

#[test]
fn kube_proxy_needs_iptables() {
    let room = Room::new();
    fs::remove_dir_all(room.programs().join("rootfs")).unwrap();
    let error = room.create("p").unwrap_err();
    assert!(matches!(error, CreateError::NoIptables { .. }), "{error}");
    assert!(error.to_string().contains("rootfs/kube-proxy"), "{error}");
    assert!(error.hint().unwrap().contains("`iptables`"));
    assert_eq!(room.listing(), ["kprov", "programs"]);
}

#[test]
fn the_hosts_iptables_come_with_all_they_load() {
    let room = Room::new();
    fs::remove_dir_all(room.programs().join("rootfs")).unwrap();
    let mut options = room.options("p");
    options.host_fallback = true;
    let payload = kprov_release::create(&options).unwrap();
    let layer = fs::read(&blobs(&payload, ImageComponent::KubeProxy)[2]).unwrap();
    let inside = room.path().join("inside");
    tar::Archive::new(layer.as_slice()).unpack(&inside).unwrap();
    // By the loader inside, with nothing but what is inside.
    for (program, says) in [
        ("/usr/sbin/iptables", "iptables v"),
        ("/usr/sbin/iptables-restore", "iptables-restore v"),
        ("/usr/local/bin/kube-proxy", "Kubernetes v1.30.4"),
    ] {
        let out = Command::new("chroot")
            .args([inside.as_str(), program, "--version"])
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&out.stdout);
        assert!(text.starts_with(says), "{program}: {out:?}");
    }
    // kube-proxy spreads Services over pods by this match.
    let help = ["/usr/sbin/iptables", "-m", "statistic", "--help"];
    let out = Command::new("chroot").arg(&inside).args(help).output().unwrap();
    assert!(
        String::from_utf8_lossy(&out.stdout).contains("statistic match options"),
        "{out:?}"
    );
}

#[test]
fn dynamic_programs_bring_their_libraries() {
    let room = Room::new();
    room.put(&compiled(VERSION, &["-no-pie"]), "etcd");
    let payload = room.create("p").unwrap();
    let paths = image_paths(&payload, ImageComponent::Etcd);
    assert!(paths.iter().any(|p| p.ends_with("/libc.so.6")), "{paths:?}");
    assert!(paths.iter().any(|p| p.contains("ld-linux")), "{paths:?}");
    let layer = fs::read(&blobs(&payload, ImageComponent::Etcd)[2]).unwrap();
    let inside = room.path().join("inside");
    tar::Archive::new(layer.as_slice()).unpack(&inside).unwrap();
    let out = Command::new("chroot")
        .args([inside.as_str(), "/usr/local/bin/etcd", "--version"])
        .output()
        .unwrap();
    assert!(
        String::from_utf8_lossy(&out.stdout).starts_with("etcd Version: 3.5.9"),
        "{out:?}"
    );
}

#[test]
fn a_missing_library_is_named() {
    let room = Room::new();
    let gcc = |args: &[&str]| {
        let status = Command::new("gcc").current_dir(room.path()).args(args).status();
        assert!(status.unwrap().success());
    };
    fs::write(room.path().join("library.c"), "int f(void) { return 0; }").unwrap();
    fs::write(
        room.path().join("program.c"),
        "int f(void); int main(void) { return f(); }",
    )
    .unwrap();
    gcc(&["-shared", "-fPIC", "-o", "libabsent.so", "library.c"]);
    gcc(&["-no-pie", "program.c", "-L.", "-labsent", "-o", "program"]);
    fs::remove_file(room.path().join("libabsent.so")).unwrap();
    room.put(&room.path().join("program"), "etcd");
    let error = room.create("p").unwrap_err();
    assert!(
        matches!(&error, CreateError::MissingLibraries { path, .. } if path.ends_with("etcd")),
        "{error}"
    );
    assert!(error.to_string().contains("libabsent.so"), "{error}");
}

#[test]
fn programs_of_another_version_are_refused() {
    let room = Room::new();
    room.put(&compiled("1.30.5", &["-static"]), "kube-scheduler");
    let error = room.create("p").unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, CreateError::WrongVersion { .. }), "{text}");
    for part in ["kube-scheduler", "1.30.5", "1.30.4"] {
        assert!(text.contains(part), "{text}");
    }

    room.put("/bin/true".into(), "kube-scheduler");
    let error = room.create("p").unwrap_err();
    assert!(
        matches!(error, CreateError::NoVersion { .. } | CreateError::WrongVersion { .. }),
        "{error}"
    );
    assert_eq!(room.listing(), ["kprov", "programs"]);
}

/// An architecture that is not this machine's, and its number in ELF headers.
fn other_arch() -> (Arch, u16) {
    if Arch::current() == Some(Arch::Amd64) {
        (Arch::Arm64, 183)
    } else {
        (Arch::Amd64, 62)
    }
}

/// Makes a program one for another architecture, as far as its header goes.
fn for_other_arch(path: &Utf8Path) {
    let mut bytes = fs::read(path).unwrap();
    bytes[18..20].copy_from_slice(&other_arch().1.to_le_bytes());
    fs::write(path, bytes).unwrap();
}

#[test]
fn other_architectures_and_scripts_are_refused() {
    let room = Room::new();
    for_other_arch(&room.programs().join("runc"));
    let error = room.create("p").unwrap_err();
    assert!(matches!(error, CreateError::WrongArch { .. }), "{error}");
    assert!(
        error.to_string().contains("is for arm64, but the release is for amd64"),
        "{error}"
    );

    fs::write(room.programs().join("runc"), "#!/bin/sh\necho runc version 1.2.3\n").unwrap();
    let error = room.create("p").unwrap_err();
    assert!(
        matches!(&error, CreateError::NotElf { path } if path.ends_with("runc")),
        "{error}"
    );
    assert_eq!(room.listing(), ["kprov", "programs"]);
}

#[test]
fn a_payload_for_another_architecture() {
    let room = Room::new();
    for entry in WalkDir::new(room.programs())
        .into_iter()
        .chain(WalkDir::new(room.kprov()))
    {
        let entry = entry.unwrap();
        if entry.file_type().is_file() {
            for_other_arch(Utf8Path::from_path(entry.path()).unwrap());
        }
    }
    let mut options = room.options("p");
    options.arch = other_arch().0;
    assert!(matches!(
        kprov_release::create(&options),
        Err(CreateError::NoPause { arch }) if arch == options.arch
    ));
    room.put(&room.programs().join("etcd"), "pause");
    let payload = kprov_release::create(&options).unwrap();
    assert!(strict(&payload, &room.trusted()).is_ok());
    assert!(payload.release().host_files.iter().all(|f| f.arch == options.arch));

    options.version = "1.30.5".parse().unwrap();
    options.out = room.path().join("q");
    let error = kprov_release::create(&options).unwrap_err();
    assert!(matches!(error, CreateError::NoVersionInside { .. }), "{error}");
    assert!(error.to_string().contains("`v1.30.5`"), "{error}");

    room.put(&compiled(VERSION, &["-no-pie"]), "runc");
    for_other_arch(&room.programs().join("runc"));
    room.put(&room.programs().join("runc"), "etcd");
    options.version = VERSION.parse().unwrap();
    let error = kprov_release::create(&options).unwrap_err();
    assert!(
        matches!(&error, CreateError::DynamicForeign { path, .. } if path.ends_with("etcd")),
        "{error}"
    );
}

#[test]
fn the_place_must_be_free() {
    let room = Room::new();
    fs::create_dir(room.path().join("full")).unwrap();
    fs::write(room.path().join("full/file"), "mine").unwrap();
    fs::write(room.path().join("file"), "mine").unwrap();
    fs::create_dir(room.path().join("empty")).unwrap();
    for taken in ["full", "file"] {
        let error = room.create(taken).unwrap_err();
        assert!(
            matches!(error, CreateError::Output(OutputError::Exists { .. })),
            "{error}"
        );
        assert!(error.hint().unwrap().contains(taken));
    }
    assert_eq!(fs::read_to_string(room.path().join("full/file")).unwrap(), "mine");
    room.create("empty").unwrap();
    room.create("new/below/new").unwrap();
    assert!(matches!(
        room.create("file/below").unwrap_err(),
        CreateError::Output(OutputError::Write { .. } | OutputError::Exists { .. })
    ));
}

#[test]
fn verifying_names_what_was_altered() {
    let room = Room::new();
    let payload = room.create("p").unwrap();
    let verified = strict(&payload, &room.trusted()).unwrap();
    assert_eq!(verified.signature, Ok(room.key.public().id()));
    // Files that belong to nobody are fine.
    fs::write(payload.root().join("notes"), "").unwrap();
    fs::write(payload.root().join("blobs/sha256/notes"), "").unwrap();
    assert_eq!(strict(&payload, &room.trusted()).unwrap(), verified);

    let [manifest, config, layer] = blobs(&payload, ImageComponent::KubeScheduler);
    let kubelet = payload
        .release()
        .host_files
        .iter()
        .find(|f| f.name == "kubelet")
        .unwrap();
    let kubelet = payload.blob_path(&kubelet.digest);
    for (blob, component) in [
        (&manifest, "image `kube-scheduler`"),
        (&config, "image `kube-scheduler`"),
        (&layer, "image `kube-scheduler`"),
        // Every host file of this test has these bytes, so any of their names is right.
        (&kubelet, "host file `"),
    ] {
        let whole = fs::read(blob).unwrap();
        let named = |error: &PayloadError| {
            let text = error.to_string();
            assert!(
                text.contains(component) && text.contains(blob.file_name().unwrap()),
                "{text}"
            );
        };
        for options in [VerifyOptions::default(), VerifyOptions { allow_unsigned: true }] {
            let mut altered = whole.clone();
            *altered.last_mut().unwrap() ^= 1;
            fs::write(blob, altered).unwrap();
            let error = payload.verify(&room.trusted(), options).unwrap_err();
            assert!(matches!(error, PayloadError::AlteredBlob { .. }), "{error}");
            named(&error);

            fs::write(blob, &whole[..whole.len() - 1]).unwrap();
            let error = payload.verify(&room.trusted(), options).unwrap_err();
            assert!(
                matches!(error, PayloadError::WrongSize { .. } | PayloadError::AlteredBlob { .. }),
                "{error}"
            );
            named(&error);

            fs::remove_file(blob).unwrap();
            let error = payload.verify(&room.trusted(), options).unwrap_err();
            assert!(matches!(error, PayloadError::MissingBlob { .. }), "{error}");
            named(&error);
            fs::write(blob, &whole).unwrap();
        }
    }
    assert_eq!(strict(&payload, &room.trusted()).unwrap(), verified);
}

#[test]
fn signatures_that_do_not_count_are_refused() {
    let room = Room::new();
    let signed = room.create("signed").unwrap();
    let unsigned = kprov_release::create(&kprov_release::CreateOptions {
        signing_key: None,
        ..room.options("unsigned")
    })
    .unwrap();
    assert_eq!(signed.digest(), unsigned.digest());
    let other = {
        let mut trusted = TrustedKeys::default();
        trusted.add(SigningKey::generate().unwrap().public());
        trusted
    };
    let refused = |payload: &Payload, trusted: &TrustedKeys, wanted: SignatureError| {
        let error = strict(payload, trusted).unwrap_err();
        assert!(
            matches!(&error, PayloadError::Signature { source, .. } if *source == wanted),
            "{error:?}"
        );
        assert!(error.hint().is_some());
        let verified = payload.verify(trusted, VerifyOptions { allow_unsigned: true }).unwrap();
        assert_eq!(verified.signature, Err(wanted));
    };
    let id = room.key.public().id();
    refused(&unsigned, &room.trusted(), SignatureError::Unsigned);
    refused(
        &signed,
        &other,
        SignatureError::UnknownKey {
            signers: vec![id.clone()],
        },
    );
    refused(
        &signed,
        &TrustedKeys::default(),
        SignatureError::UnknownKey {
            signers: vec![id.clone()],
        },
    );

    let path = signed.root().join("release.json");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("CVE-2024-0001", "CVE-2024-0002")).unwrap();
    let altered = Payload::open(signed.root()).unwrap();
    refused(&altered, &room.trusted(), SignatureError::Bad { key: id });
}

#[test]
fn what_is_not_a_payload_is_said_to_be_none() {
    let room = Room::new();
    let dir = room.path().join("p");
    assert!(matches!(Payload::open(&dir), Err(PayloadError::NotAPayload { .. })));
    let payload = room.create("p").unwrap();
    let path = dir.join("release.json");
    let mut text = String::new();
    fs::File::open(&path).unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(text.as_bytes(), payload.release_bytes());
    let format = |text: &str| {
        fs::write(&path, text).unwrap();
        match Payload::open(&dir).unwrap_err() {
            PayloadError::Format { source, .. } => source,
            other => panic!("{other}"),
        }
    };
    assert!(matches!(format("{"), ReleaseFormatError::Malformed(_)));
    assert!(matches!(
        format(&text.replace("v1alpha1", "v2")),
        ReleaseFormatError::Unknown { .. }
    ));
    assert!(matches!(
        format(&text.replace("\"advisories\"", "\"others\"")),
        ReleaseFormatError::Malformed(_)
    ));
    for name in ["../kubelet", "/kubelet", "cni/../../kubelet", ""] {
        let text = text.replace("\"kubelet\"", &format!("\"{name}\""));
        assert!(matches!(format(&text), ReleaseFormatError::FileName(n) if n == name));
    }
}
