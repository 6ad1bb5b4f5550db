//! The release payload that demo and tests use: from the official download site where it can be reached, else from
//! Debian's own sources and packages.

use std::process::{Command, Stdio};

use anyhow::{Context as _, Result};
use camino::{Utf8Path, Utf8PathBuf};

use crate::debian::Apt;
use crate::run::{cargo, output, run};
use crate::{cache, debian};

/// The Kubernetes version of Debian 12's source package `kubernetes`.
pub(crate) const DEBIAN_KUBERNETES: &str = "1.20.2";
/// Counts how it's built here: raised when what was built before must not be used any more.
pub(crate) const BUILD: &str = "2";
pub(crate) const COMPONENTS: &[&str] = &[
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kube-proxy",
    "kubelet",
    "kubectl",
];

/// Where a payload's blobs are.
pub(crate) const BLOBS: &str = "blobs/sha256";

/// What everything here needs from Debian. dpkg-dev to mips: sources; the others: Kubernetes' own build.
const BUILD_PACKAGES: &[&str] = &[
    "dpkg-dev",
    "gcc",
    "golang-1.19-go",
    "jq",
    "libc6-dev",
    "make",
    "rsync",
    "xz-utils",
];
/// What machines on this host need.
const HOST_PACKAGES: &[&str] = &["gcc", "iproute2", "iptables", "libc6-dev"];

/// A payload ready for use.
#[derive(Debug, Clone)]
pub(crate) struct Payload {
    /// Its directory.
    pub(crate) dir: Utf8PathBuf,
    /// The public key that its signature is checked with.
    pub(crate) key: Utf8PathBuf,
    /// The Kubernetes version.
    pub(crate) version: String,
    /// The directory of the binaries it was made from, where it was made here.
    pub(crate) binaries: Option<Utf8PathBuf>,
}

impl Payload {
    /// `directory=key`; no key stands for a payload that is taken as it is.
    pub(crate) fn entry(&self) -> String {
        format!("{}={}", self.dir, self.key)
    }

    /// The numbers of its version.
    pub(crate) fn numbers(&self) -> Vec<u64> {
        let numbers = self.version.split(|c: char| !c.is_ascii_digit());
        numbers.take(3).filter_map(|n| n.parse().ok()).collect()
    }
}

/// Built programs of kprov.
#[derive(Debug, Clone)]
pub(crate) struct Programs {
    /// The directory with `kprov`, `kprov-node` and `kprov-operator`.
    pub(crate) dir: Utf8PathBuf,
    /// Where payloads with these programs are kept, below the cache.
    payloads: &'static str,
    /// What payloads made with these programs depend on: their digests.
    digests: String,
}

impl Programs {
    /// Builds kprov's programs; with optimisation where `release`.
    pub(crate) fn build(release: bool) -> Result<Self> {
        let target = cache::target()?;
        let mut build = cargo();
        build.env("CARGO_TARGET_DIR", &target).args([
            "build",
            "--locked",
            "-p",
            "kprov",
            "-p",
            "kprov-node",
            "-p",
            "kprov-operator",
        ]);
        if release {
            build.arg("--release");
        }
        run(&mut build)?;
        Self::built(&target, release)
    }

    /// Those that were built before.
    pub(crate) fn built(target: &Utf8Path, release: bool) -> Result<Self> {
        // A payload for tests has the programs under test in it, and the demo's cluster should not see its own change.
        let (profile, payloads) = if release {
            ("release", "payloads")
        } else {
            ("debug", "payloads/debug")
        };
        let dir = target.join(profile);
        let digests = output(
            Command::new("sha256sum")
                .current_dir(&dir)
                .args(["kprov-node", "kprov-operator"]),
        )?;
        Ok(Self { dir, payloads, digests })
    }

    /// Where payloads with these programs are kept.
    pub(crate) fn payloads(&self) -> Result<Utf8PathBuf> {
        Ok(cache::dir()?.join(self.payloads))
    }

    /// A `kprov` command.
    pub(crate) fn kprov(&self) -> Command {
        Command::new(self.dir.join("kprov"))
    }
}

/// Installs what machines on this host and kprov's own build need.
pub(crate) fn host_packages() -> Result<()> {
    debian::install(HOST_PACKAGES)
}

/// The payload, made if the cache has none with the programs that were built.
pub(crate) fn ensure() -> Result<Payload> {
    host_packages()?;
    let programs = Programs::build(true)?;
    ensure_with(&programs)
}

/// The same, with programs built before.
pub(crate) fn ensure_with(programs: &Programs) -> Result<Payload> {
    if let Some(version) = reachable_stable() {
        eprintln!("the official download site is reachable: using Kubernetes {version}");
        return make(
            programs,
            &format!("online-{version}"),
            &version,
            &["--online".to_owned()],
            None,
        );
    }
    eprintln!(
        "the official download site can't be reached: using Kubernetes {DEBIAN_KUBERNETES} from Debian's sources"
    );
    debian_with(programs)
}

/// Debian's Kubernetes, whatever else can be reached: what CI runs.
pub(crate) fn debian_with(programs: &Programs) -> Result<Payload> {
    let binaries = debian_kubernetes()?;
    from_binaries(
        programs,
        &format!("debian-{DEBIAN_KUBERNETES}-{BUILD}"),
        DEBIAN_KUBERNETES,
        &[&binaries],
        None,
    )
}

/// A payload from directories of Kubernetes binaries, the first that has a program first; what they lack (etcd, containerd, runc,
/// CNI) comes from Debian. `like` is one that has much in common with it.
pub(crate) fn from_binaries(
    programs: &Programs,
    name: &str,
    version: &str,
    binaries: &[&Utf8Path],
    like: Option<&Payload>,
) -> Result<Payload> {
    let host = debian_host_programs()?;
    // Only iptables comes from this host.
    let places = ["usr/bin", "usr/sbin", "usr/lib/cni"].map(|dir| host.join(dir));
    let dirs = binaries.iter().copied().chain(places.iter().map(Utf8PathBuf::as_path));
    let args: Vec<String> = dirs.flat_map(|dir| ["--from".to_owned(), dir.to_string()]).collect();
    let mut payload = make(programs, name, version, &args, like)?;
    payload.binaries = binaries.last().map(|dir| (*dir).to_owned());
    Ok(payload)
}

fn make(programs: &Programs, name: &str, version: &str, args: &[String], like: Option<&Payload>) -> Result<Payload> {
    let keys = cache::dir()?.join("payloads");
    std::fs::create_dir_all(&keys)?;
    let private = keys.join("signing.key");
    let key = keys.join("signing.key.pub");
    if !key.exists() {
        run(programs.kprov().args(["release", "keygen", "--out"]).arg(&private))?;
    }
    let dir = programs.payloads()?;
    let payload = Payload {
        dir: dir.join(name),
        key,
        version: version.to_owned(),
        binaries: None,
    };
    // What it was made from, so that other programs make another.
    let note = dir.join(format!("{name}.made-from"));
    let made_from = format!("{version} {}\n{}", args.join(" "), programs.digests);
    if std::fs::read_to_string(&note).is_ok_and(|text| text == made_from) && payload.dir.join("release.json").exists() {
        return Ok(payload);
    }
    let old = dir.join(format!("{name}.old"));
    remove(&old)?;
    if payload.dir.exists() {
        std::fs::rename(&payload.dir, &old)?;
    }
    let mut create = programs.kprov();
    create
        .args(["release", "create", "--no-progress", "--version", version, "--sign-key"])
        .arg(&private)
        .arg("--out")
        .arg(&payload.dir)
        .args(args)
        .stdout(Stdio::null());
    // Most of a payload is what it was, or what another has.
    for other in like
        .map(|like| &like.dir)
        .into_iter()
        .chain(Some(&old).filter(|old| old.exists()))
    {
        create.arg("--reuse").arg(other);
    }
    run(&mut create)?;
    std::fs::write(&note, made_from)?;
    remove(&old)?;
    Ok(payload)
}

/// Removes a directory, if there is one.
pub(crate) fn remove(dir: &Utf8Path) -> Result<()> {
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("can't remove `{dir}`"))
        }
        _ => Ok(()),
    }
}

/// Payloads for every release below the directory that `KPROV_TEST_RELEASES` names: its entries are payloads (with
/// `release.json`) or directories of binaries.
pub(crate) fn test_releases(programs: &Programs) -> Result<Vec<Payload>> {
    let Ok(root) = std::env::var("KPROV_TEST_RELEASES") else {
        return Ok(Vec::new());
    };
    let root = Utf8PathBuf::from(root);
    let mut entries: Vec<_> = root
        .read_dir_utf8()
        .with_context(|| format!("can't list `{root}`, which KPROV_TEST_RELEASES names"))?
        .filter_map(Result::ok)
        .map(camino::Utf8DirEntry::into_path)
        .collect();
    entries.sort();
    let mut payloads = Vec::new();
    for entry in entries {
        let name = entry.file_name().unwrap_or_default().to_owned();
        if entry.join("release.json").exists() {
            // Somebody else's payload: whoever names it here vouches for it, so the tests take its digests as they are.
            let release: serde_json::Value = serde_json::from_slice(&std::fs::read(entry.join("release.json"))?)?;
            let version = release["kubernetes"].as_str().unwrap_or_default().to_owned();
            payloads.push(Payload {
                dir: entry,
                key: Utf8PathBuf::new(),
                version,
                binaries: None,
            });
        } else if entry.join("kube-apiserver").exists() {
            let text = output(Command::new(entry.join("kube-apiserver")).arg("--version"))?;
            let version = text.trim().trim_start_matches("Kubernetes v").to_owned();
            payloads.push(from_binaries(
                programs,
                &format!("test-{name}"),
                &version,
                &[&entry],
                None,
            )?);
        }
    }
    Ok(payloads)
}

/// The newest stable version at the official download site; `None` where it can't be reached.
fn reachable_stable() -> Option<String> {
    let text =
        output(Command::new("curl").args(["-fsSL", "--max-time", "5", "https://dl.k8s.io/release/stable.txt"])).ok()?;
    text.trim().strip_prefix('v').map(str::to_owned)
}

/// etcd, containerd, runc and the CNI plugins out of Debian's packages, unpacked and not installed.
fn debian_host_programs() -> Result<Utf8PathBuf> {
    let root = cache::dir()?.join("debian-programs");
    let done = root.join(".done");
    if !done.exists() {
        let apt = Apt::new(cache::dir()?.join("apt"))?;
        apt.unpack(
            &[
                "etcd-server",
                "etcd-client",
                "containerd",
                "runc",
                "containernetworking-plugins",
            ],
            &root,
        )?;
        std::fs::write(done, "")?;
    }
    Ok(root)
}

/// Debian's kernel for virtual machines with its modules, unpacked and not installed: below `boot` and `lib/modules`.
pub(crate) fn debian_kernel() -> Result<Utf8PathBuf> {
    let root = cache::dir()?.join("debian-kernel");
    let done = root.join(".done");
    if !done.exists() {
        remove(&root)?;
        let apt = Apt::new(cache::dir()?.join("apt"))?;
        let package = apt.dependency("linux-image-cloud-amd64", "linux-image-")?;
        apt.unpack(&[&package], &root)?;
        std::fs::write(done, "")?;
    }
    Ok(root)
}

/// Kubernetes from Debian's source package, built with Debian's Go: 6 to 15 minutes on 2 cores, then cached.
pub(crate) fn debian_kubernetes() -> Result<Utf8PathBuf> {
    let root = cache::dir()?.join(format!("debian-kubernetes-{DEBIAN_KUBERNETES}-{BUILD}"));
    let bin = root.join("bin");
    if COMPONENTS.iter().all(|c| bin.join(c).exists()) {
        return Ok(bin);
    }
    debian::install(BUILD_PACKAGES)?;
    let apt = Apt::new(cache::dir()?.join("apt"))?;
    let source = apt.source("kubernetes", &root)?;
    mend_reflect2(&source)?;
    mend_validate(&source)?;
    let stamp = root.join("version.sh");
    std::fs::write(
        &stamp,
        format!(
            "KUBE_GIT_COMMIT=debian\nKUBE_GIT_TREE_STATE=archive\nKUBE_GIT_VERSION=v{DEBIAN_KUBERNETES}\nKUBE_GIT_MAJOR=1\nKUBE_GIT_MINOR=20\n"
        ),
    )?;
    let path = std::env::var("PATH").unwrap_or_default();
    run(Command::new("make")
        .current_dir(&source)
        .env("PATH", format!("/usr/lib/go-1.19/bin:{path}"))
        .env("GOCACHE", source.join("_output/gocache"))
        .env("GOFLAGS", "")
        .env("KUBE_GIT_VERSION_FILE", &stamp)
        .env("KUBE_STATIC_OVERRIDES", COMPONENTS.join(" "))
        .args(["--silent", "all"])
        .arg(format!(
            "WHAT={}",
            COMPONENTS
                .iter()
                .map(|c| format!("cmd/{c}"))
                .collect::<Vec<_>>()
                .join(" ")
        )))?;
    let built = source.join("_output/local/bin/linux").join(go_arch());
    let unfinished = root.join("bin.new");
    std::fs::create_dir_all(&unfinished)?;
    for component in COMPONENTS {
        let from = built.join(component);
        std::fs::copy(&from, unfinished.join(component)).with_context(|| format!("the build left no `{from}`"))?;
    }
    std::fs::rename(&unfinished, &bin)?;
    // The sources and what was built on the way are some gigabytes that nothing needs any more.
    std::fs::remove_dir_all(&source).with_context(|| format!("can't remove `{source}`"))?;
    Ok(bin)
}

/// Since 1.18, Go's `reflect.mapiterinit` writes into an iterator that its caller gives, where it returned one before. The `reflect2`
/// in Kubernetes 1.20's vendor tree still calls it the old way, so that encoding a map as JSON writes to wherever a register happens
/// to point: API servers built so die at random, with custom resources soon.
fn mend_reflect2(source: &Utf8Path) -> Result<()> {
    let edit = |file: &str, edits: &[(&str, &str)]| -> Result<()> {
        let path = source.join("vendor/github.com/modern-go/reflect2").join(file);
        let mut text = std::fs::read_to_string(&path).with_context(|| format!("can't read `{path}`"))?;
        for (old, new) in edits {
            if !text.contains(new) {
                anyhow::ensure!(text.contains(old), "`{path}` is not what it was: `{old}` is missing");
                text = text.replacen(old, new, 1);
            }
        }
        std::fs::write(&path, text).with_context(|| format!("can't write `{path}`"))
    };
    edit(
        "unsafe_link.go",
        &[
            (
                "func mapiterinit(rtype unsafe.Pointer, m unsafe.Pointer) *hiter",
                "func mapiterinit(rtype unsafe.Pointer, m unsafe.Pointer, it *hiter)",
            ),
            // As much as the runtime's own has at most: six more pointers, then numbers.
            (
                "\t// rest fields are ignored",
                "\tpointers [6]unsafe.Pointer\n\tnumbers [8]uintptr",
            ),
        ],
    )?;
    edit(
        "unsafe_map.go",
        &[(
            "\treturn &UnsafeMapIterator{\n\t\thiter:      mapiterinit(type2.rtype, *(*unsafe.Pointer)(obj)),",
            "\tit := &hiter{}\n\tmapiterinit(type2.rtype, *(*unsafe.Pointer)(obj), it)\n\treturn &UnsafeMapIterator{\n\t\thiter:      it,",
        )],
    )
}

/// Kubernetes 1.20's check of custom resources compares `reflect.Value`s where it means their contents. With newer Go an empty string
/// and the zero value of its type lie at one place in memory, and so every empty string in a custom resource counts as null,
/// and is refused.
fn mend_validate(source: &Utf8Path) -> Result<()> {
    const OLD: &str =
        "if data == nil || reflect.DeepEqual(reflect.Zero(reflect.TypeOf(data)), reflect.ValueOf(data)) {";
    const NEW: &str = "if data == nil {";
    let path = source.join("vendor/k8s.io/kube-openapi/pkg/validation/validate/type.go");
    let text = std::fs::read_to_string(&path).with_context(|| format!("can't read `{path}`"))?;
    let mended = text.replacen(OLD, NEW, 1);
    anyhow::ensure!(mended.contains(NEW), "`{path}` is not what it was: `{OLD}` is missing");
    std::fs::write(&path, mended).with_context(|| format!("can't write `{path}`"))
}

fn go_arch() -> &'static str {
    if cfg!(target_arch = "aarch64") {
        "arm64"
    } else {
        "amd64"
    }
}
