//! containerd's configuration. Pure: text from facts.

use std::fmt::Write;

use camino::{Utf8Path, Utf8PathBuf};
use kprov_bootstrap::kubelet::CgroupDriver;
use kprov_types::Release;
use kprov_types::release::ImageComponent;
use tokio::process::Command;

use crate::host::Host;
use crate::paths;
use crate::supervise::ChildSpec;

/// A containerd version, as far as its configuration depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ContainerdVersion {
    /// The major version.
    pub major: u32,
    /// The minor version.
    pub minor: u32,
}

/// What `containerd --version` printed holds no version.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` does not tell containerd's version")]
pub struct ContainerdVersionError(String);

impl ContainerdVersion {
    /// From the output of `containerd --version`: the program, its package, the version, the revision.
    pub fn from_output(output: &str) -> Result<Self, ContainerdVersionError> {
        let version = output.split_whitespace().nth(2).and_then(|word| {
            let mut numbers = word.trim_start_matches('v').split('.');
            Some(Self {
                major: numbers.next()?.parse().ok()?,
                minor: numbers.next()?.parse().ok()?,
            })
        });
        version.ok_or_else(|| ContainerdVersionError(output.trim().to_owned()))
    }
}

/// The version that the containerd of a release prints, as it prints it.
pub async fn version_text(directory: &Utf8Path) -> Option<String> {
    let run = Command::new(directory.join("bin/containerd")).arg("--version").output();
    let output = String::from_utf8(run.await.ok()?.stdout).ok()?;
    let version = output.split_whitespace().nth(2)?;
    Some(version.trim_start_matches('v').to_owned())
}

/// Snapshotters and tracing, which nothing here uses and which cost start-up time; and what makes directories below `/opt` for
/// `ctr install`.
const DISABLED: &[&str] = &[
    "io.containerd.internal.v1.opt",
    "io.containerd.internal.v1.tracing",
    "io.containerd.snapshotter.v1.aufs",
    "io.containerd.snapshotter.v1.blockfile",
    "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper",
    "io.containerd.snapshotter.v1.erofs",
    "io.containerd.snapshotter.v1.native",
    "io.containerd.snapshotter.v1.zfs",
    "io.containerd.tracing.processor.v1.otlp",
];

/// How many layers of one image are downloaded at the same time.
const DOWNLOADS: u32 = 4;

/// A TOML basic string; its escapes are JSON's (TOML 1.0, section "String").
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// containerd's configuration file: version 2 up to 1.7, version 3 from 2.0 on, where the CRI plugin was split
/// (containerd's `docs/cri/config.md`).
///
/// `directory` is the release's by way of the link to the one that runs: containers remember where their runc was, and outlive
/// the release that they were started from.
pub fn config(version: ContainerdVersion, host: &Host, release: &Release, directory: &Utf8Path) -> String {
    let two = version.major >= 2;
    let (images, runtime) = if two {
        ("io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime")
    } else {
        ("io.containerd.grpc.v1.cri", "io.containerd.grpc.v1.cri")
    };
    let pause = release
        .image(ImageComponent::Pause)
        .map(|image| quoted(&image.pinned()));
    let disabled: Vec<_> = DISABLED.iter().map(|p| quoted(p)).collect();
    let mut out = String::new();
    let mut line = |text: &str| {
        out.push_str(text);
        out.push('\n');
    };
    line(if two { "version = 3" } else { "version = 2" });
    line("root = \"/var/lib/containerd\"");
    line("state = \"/run/containerd\"");
    line(&format!("disabled_plugins = [{}]", disabled.join(", ")));
    line(&format!("[grpc]\naddress = {}", quoted(paths::CONTAINERD_SOCKET)));

    line(&format!("[plugins.{images:?}]"));
    line(&format!("max_concurrent_downloads = {DOWNLOADS}"));
    if two {
        line("snapshotter = \"overlayfs\"");
    } else if let Some(pause) = &pause {
        line(&format!("sandbox_image = {pause}"));
    }
    if two {
        if let Some(pause) = &pause {
            line(&format!("[plugins.{images:?}.pinned_images]\nsandbox = {pause}"));
        }
        line(&format!("[plugins.{runtime:?}]"));
    }
    // Where nothing may lower its score, containerd would fail every container that asks for a protected one.
    line(&format!("restrict_oom_score_adj = {}", !host.sys_resource));
    line("tolerate_missing_hugetlb_controller = true");

    line(&format!(
        "[plugins.{images:?}.registry]\nconfig_path = {}",
        quoted(paths::CONTAINERD_CERTS)
    ));
    line(&format!(
        "[plugins.{runtime:?}.containerd]\ndefault_runtime_name = \"runc\""
    ));
    if !two {
        line("snapshotter = \"overlayfs\"");
    }
    line(&format!(
        "[plugins.{runtime:?}.containerd.runtimes.runc]\nruntime_type = \"io.containerd.runc.v2\""
    ));
    line(&format!("[plugins.{runtime:?}.containerd.runtimes.runc.options]"));
    line(&format!("BinaryName = {}", quoted(directory.join("bin/runc").as_str())));
    line(&format!(
        "SystemdCgroup = {}",
        host.cgroup_driver() == CgroupDriver::Systemd
    ));
    line(&format!(
        "[plugins.{runtime:?}.cni]\nconf_dir = {}",
        quoted(paths::CNI_CONFIG)
    ));
    let plugins = quoted(directory.join("cni").as_str());
    if version >= (ContainerdVersion { major: 2, minor: 1 }) {
        line(&format!("bin_dirs = [{plugins}]"));
    } else {
        line(&format!("bin_dir = {plugins}"));
    }
    out
}

/// The registries that a release's images are in, with their `hosts.toml`: the release's own servers first, then, where
/// there is one, the registry itself (containerd's `docs/hosts.md`). What is pulled is fixed by digest wherever it comes from.
pub fn registry_hosts(release: &Release, urls: &[String]) -> Vec<(Utf8PathBuf, String)> {
    let mut registries: Vec<_> = release
        .images
        .values()
        .map(kprov_types::release::ReleaseImage::registry)
        .collect();
    registries.sort_unstable();
    registries.dedup();
    let file = |registry: &str| {
        let mut text = String::new();
        // A payload's own images are in no public registry: there is nowhere else to ask.
        let server = match urls.first() {
            Some(first) if registry == kprov_release::PAYLOAD_REGISTRY => first.clone(),
            _ => format!("https://{registry}"),
        };
        let _ = writeln!(text, "server = {}", quoted(&server));
        for url in urls {
            let url = quoted(url.trim_end_matches('/'));
            let _ = writeln!(text, "[host.{url}]\ncapabilities = [\"pull\", \"resolve\"]");
        }
        (
            Utf8Path::new(paths::CONTAINERD_CERTS).join(registry).join("hosts.toml"),
            text,
        )
    };
    registries.into_iter().map(file).collect()
}

/// containerd as a supervised child.
pub fn child(directory: &Utf8Path) -> ChildSpec {
    ChildSpec {
        name: "containerd",
        program: directory.join("bin/containerd"),
        args: vec!["--config".into(), paths::CONTAINERD_CONFIG.into()],
        env: vec![("PATH".into(), search_path())],
    }
}

/// `PATH` with the programs of the release that runs first: containerd finds its shim there.
pub fn search_path() -> String {
    let inherited = std::env::var("PATH").unwrap_or_else(|_| "/usr/sbin:/usr/bin:/sbin:/bin".into());
    format!("{}:{inherited}", paths::current().join("bin"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::CgroupVersion;
    use crate::testing;

    fn host(sys_resource: bool) -> Host {
        Host {
            root: true,
            sys_resource,
            cgroup: CgroupVersion::V1,
            systemd: false,
            swap: false,
            inotify_instances: 1024,
            open_files: 1 << 20,
            conntrack_writable: true,
            kernel_defaults: true,
            resolv_conf: None,
        }
    }

    #[test]
    fn versions_as_printed() {
        let cases = [
            (
                "containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1+deb12u1",
                Some((1, 6)),
            ),
            (
                "containerd github.com/containerd/containerd v1.7.27 05044ec0a9a75232cad458027ca83437aae3f4da",
                Some((1, 7)),
            ),
            (
                "containerd github.com/containerd/containerd/v2 v2.1.4 75cb2b7193e4e490e9fbdc236c0e811ccaba3376",
                Some((2, 1)),
            ),
            ("containerd", None),
        ];
        for (text, expected) in cases {
            let found = ContainerdVersion::from_output(text).ok().map(|v| (v.major, v.minor));
            assert_eq!(found, expected, "{text}");
        }
    }

    #[test]
    fn the_configuration_follows_version_and_host() {
        let release = testing::release();
        let text = |major, minor, sys_resource| {
            config(
                ContainerdVersion { major, minor },
                &host(sys_resource),
                &release,
                "/r".into(),
            )
        };
        let pause = release.image(ImageComponent::Pause).unwrap().pinned();
        let old = text(1, 6, false);
        assert!(old.starts_with("version = 2\n"), "{old}");
        assert!(old.contains(&format!("sandbox_image = \"{pause}\"")), "{old}");
        assert!(old.contains("restrict_oom_score_adj = true"), "{old}");
        assert!(old.contains("bin_dir = \"/r/cni\""), "{old}");
        let new = text(2, 1, true);
        assert!(new.starts_with("version = 3\n"), "{new}");
        assert!(
            new.contains(&format!(".pinned_images]\nsandbox = \"{pause}\"")),
            "{new}"
        );
        assert!(new.contains("restrict_oom_score_adj = false"), "{new}");
        assert!(new.contains("bin_dirs = [\"/r/cni\"]"), "{new}");
        assert!(!new.contains("grpc.v1.cri"), "{new}");
    }

    #[test]
    fn registries_are_asked_at_the_release_servers_first() {
        let hosts = registry_hosts(&testing::release(), &["http://10.0.0.1:10202/".into()]);
        let (path, text) = &hosts[0];
        assert_eq!(path, "/etc/containerd/certs.d/kprov.local/hosts.toml");
        assert_eq!(
            text,
            "server = \"http://10.0.0.1:10202/\"\n[host.\"http://10.0.0.1:10202\"]\ncapabilities = [\"pull\", \"resolve\"]\n"
        );
    }
}
