//! A directory of small real programs that stand in for Kubernetes'.

use std::fs;
use std::hash::{DefaultHasher, Hasher as _};
use std::net::SocketAddr;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::process::Command;

use camino::{Utf8Path, Utf8PathBuf};
use kprov_release::serve::{Content, ExtraFile, serve};
use kprov_release::{CreateError, CreateOptions, Payload, SigningKey, TrustedKeys};
use kprov_types::release::Arch;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// The version that the programs say they are.
pub(crate) const VERSION: &str = "1.30.4";

const SOURCE: &str = r#"
#include <stdio.h>
#include <string.h>
int main(int argc, char **argv)
{
	const char *name = strrchr(argv[0], '/') ? strrchr(argv[0], '/') + 1 : argv[0];
	if (argc > 1 && !strcmp(argv[1], "--help") && !strncmp(name, "kube", 4)) {
		printf("%s does things.\n\nFlags:\n\n      --config string   Where.\n", name);
		puts("      --feature-gates mapStringBool   Options are:\n                   AllAlpha=true|false (ALPHA)");
		return 0;
	}
	if (argc < 2 || strcmp(argv[1], "--version"))
		return 2;
	if (!strncmp(name, "kube", 4))
		puts("Kubernetes v" VERSION);
	else if (!strcmp(name, "coredns"))
		puts("CoreDNS-1.11.3\nlinux/amd64, go1.22.5");
	else if (!strcmp(name, "etcd"))
		puts("etcd Version: 3.5.9\nGit SHA: 0\nGo Version: go1.19.9");
	else
		printf("%s version 1.2.3+x\n", name);
	return 0;
}
"#;

fn hash(text: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(text.as_bytes());
    hasher.finish()
}

/// Compiles the program once for all tests: each runs in a process of its own.
pub(crate) fn compiled(version: &str, flags: &[&str]) -> Utf8PathBuf {
    let dir = Utf8Path::new(env!("CARGO_TARGET_TMPDIR"));
    // By its source too: an older test's program may lie there.
    let source = hash(SOURCE);
    let name = format!("program-{source:x}-{version}{}", flags.concat());
    let path = dir.join(&name);
    if !path.exists() {
        let own = dir.join(format!("{name}-{}", std::process::id()));
        let source = Utf8PathBuf::from(format!("{own}.c"));
        fs::write(&source, SOURCE).unwrap();
        let define = format!("-DVERSION=\"{version}\"");
        let status = Command::new("gcc")
            .args(flags)
            .args([&define, "-o", own.as_str(), source.as_str()])
            .status();
        assert!(status.unwrap().success());
        fs::remove_file(source).unwrap();
        fs::rename(own, &path).unwrap();
    }
    path
}

/// A temporary directory with programs in `programs`, kprov's own in `kprov`, and room for payloads.
pub(crate) struct Room {
    dir: tempfile::TempDir,
    pub(crate) key: SigningKey,
}

pub(crate) const KUBERNETES: [&str; 5] = [
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kube-proxy",
    "kubelet",
];

impl Room {
    pub(crate) fn new() -> Self {
        let room = Self {
            dir: tempfile::tempdir().unwrap(),
            key: SigningKey::generate().unwrap(),
        };
        for name in KUBERNETES {
            room.put(&compiled(VERSION, &["-static"]), name);
        }
        for name in ["etcd", "etcdctl", "containerd", "containerd-shim-runc-v2", "runc"] {
            room.put(&compiled(VERSION, &["-static"]), name);
        }
        for name in ["cni/bridge", "cni/host-local", "cni/loopback"] {
            room.put(&compiled(VERSION, &["-static"]), name);
        }
        for name in ["../kprov/kprov-node", "../kprov/kprov-operator"] {
            room.put(&compiled(VERSION, &["-static"]), name);
        }
        room.put(&compiled(VERSION, &["-static"]), "rootfs/kube-proxy/usr/sbin/xtables");
        symlink("xtables", room.programs().join("rootfs/kube-proxy/usr/sbin/iptables")).unwrap();
        room
    }

    pub(crate) fn path(&self) -> &Utf8Path {
        Utf8Path::from_path(self.dir.path()).unwrap()
    }

    pub(crate) fn programs(&self) -> Utf8PathBuf {
        self.path().join("programs")
    }

    /// The directory of kprov's own programs.
    pub(crate) fn kprov(&self) -> Utf8PathBuf {
        self.path().join("kprov")
    }

    pub(crate) fn put(&self, from: &Utf8Path, name: &str) {
        let to = self.programs().join(name);
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(from, &to).unwrap();
        fs::set_permissions(to, fs::Permissions::from_mode(0o755)).unwrap();
    }

    pub(crate) fn options(&self, out: &str) -> CreateOptions {
        CreateOptions {
            from: vec![self.programs()],
            version: VERSION.parse().unwrap(),
            out: self.path().join(out),
            arch: Arch::current().unwrap(),
            host_fallback: false,
            signing_key: Some(self.key.clone()),
            minimum_from: None,
            advisories: vec!["CVE-2024-0001".into()],
            kprov_programs: Some(self.kprov()),
            without_kprov: false,
            reuse: Vec::new(),
        }
    }

    pub(crate) fn create(&self, out: &str) -> Result<Payload, CreateError> {
        kprov_release::create(&self.options(out))
    }

    pub(crate) fn trusted(&self) -> TrustedKeys {
        let mut trusted = TrustedKeys::default();
        trusted.add(self.key.public());
        trusted
    }

    /// What is in the directory, to see that a failure left nothing.
    pub(crate) fn listing(&self) -> Vec<String> {
        let mut names: Vec<_> = self
            .path()
            .read_dir_utf8()
            .unwrap()
            .map(|e| e.unwrap().file_name().to_owned())
            .collect();
        names.sort();
        names
    }
}

/// A server on a port of its own, stopped when dropped.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    stop: CancellationToken,
    pub(crate) task: JoinHandle<()>,
}

impl Server {
    /// Serves a payload, with some files beside it.
    pub(crate) async fn of(payload: &Payload, extra: Vec<(&str, ExtraFile)>) -> Self {
        let mut content = Content::new(payload.clone()).unwrap();
        for (path, file) in extra {
            content = content.with_extra(path, file);
        }
        Self::run(|listener, stop| async move { serve(listener, content, stop).await.unwrap() }).await
    }

    pub(crate) async fn run<F>(serve: impl FnOnce(TcpListener, CancellationToken) -> F) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let task = tokio::spawn(serve(listener, stop.clone()));
        Self { address, stop, task }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub(crate) fn stop(&self) {
        self.stop.cancel();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}
