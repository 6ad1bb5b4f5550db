//! kubelet's files, and kubelet as a supervised child.

use camino::Utf8Path;
use kprov_bootstrap::kubelet::HostFacts;
use kprov_bootstrap::paths as kubernetes;
use kprov_bootstrap::pki::{Authority, Credentials, Kubeconfig};
use kprov_bootstrap::versions::Unsupported;
use kprov_types::release::{ImageComponent, ReleaseImage};
use kprov_types::{Release, Role};

use crate::config::Machine;
use crate::containerd;
use crate::files::{self, FileError};
use crate::host::{CgroupVersion, Host};
use crate::paths;
use crate::supervise::ChildSpec;

/// Why kubelet cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum KubeletError {
    /// A file.
    #[error(transparent)]
    File(#[from] FileError),
    /// The version is too old.
    #[error(transparent)]
    Unsupported(#[from] Unsupported),
}

/// Removes the control groups of pods that have no process any more, as a machine that was stopped hard may leave them:
/// kubelet looks for the container behind each one by one when it starts, 1.5 seconds for each that is not there.
pub fn sweep_control_groups(root: &Utf8Path) {
    let Ok(entries) = root.read_dir_utf8() else { return };
    for directory in entries
        .flatten()
        .map(camino::Utf8DirEntry::into_path)
        .chain([root.to_owned()])
    {
        for pods in ["kubepods", "kubepods.slice"] {
            remove_empty(&directory.join(pods));
        }
    }
}

fn remove_empty(group: &Utf8Path) {
    let Ok(entries) = group.read_dir_utf8() else { return };
    for entry in entries.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir())) {
        remove_empty(entry.path());
    }
    // Refused while there is a process in it, or a group below it; such a one is in use.
    let _ = std::fs::remove_dir(group);
}

/// Writes what kubelet reads and tells how to run it. On workers that includes the kubeconfig with the join token; on
/// control-plane machines kubelet's own kubeconfig is one of [`kprov_bootstrap::control_plane_files`].
pub fn prepare(
    machine: &Machine,
    host: &Host,
    release: &Release,
    directory: &Utf8Path,
) -> Result<ChildSpec, KubeletError> {
    let config = &machine.config;
    let facts = HostFacts {
        name: machine.name.clone(),
        address: machine.address.into(),
        cgroup_v1: host.cgroup == CgroupVersion::V1,
        cgroup_driver: host.cgroup_driver(),
        swap: host.swap,
        may_lower_oom_score: host.sys_resource,
        kernel_defaults: host.kernel_defaults,
        resolv_conf: host.resolv_conf.clone(),
        runtime_endpoint: format!("unix://{}", paths::CONTAINERD_SOCKET),
        pause_image: release
            .image(ImageComponent::Pause)
            .map(ReleaseImage::pinned)
            .unwrap_or_default(),
    };
    let kubelet = kprov_bootstrap::kubelet_config(config, &facts, release.kubernetes.minor())?;
    files::make_directory(Utf8Path::new(kubernetes::STATIC_PODS), 0o700)?;
    let text = format!("{:#}\n", kubelet.config);
    files::write(Utf8Path::new(kubernetes::KUBELET_CONFIG), text.as_bytes(), 0o600)?;
    files::write(Utf8Path::new(kubernetes::CA), config.ca.as_bytes(), 0o644)?;
    if let (Role::Worker, Some(token)) = (config.role, &config.join_token) {
        let bootstrap = Kubeconfig {
            cluster: config.cluster.as_str(),
            user: "join",
            server: kubernetes::LOCAL_API,
            authority: Authority::File(kubernetes::CA),
            credentials: Credentials::Join(token),
        };
        let path = Utf8Path::new(kubernetes::BOOTSTRAP_KUBECONFIG);
        files::write(path, bootstrap.render().as_bytes(), 0o600)?;
    }
    Ok(ChildSpec {
        name: "kubelet",
        program: directory.join("bin/kubelet"),
        args: kubelet.flags,
        env: vec![("PATH".into(), containerd::search_path(directory))],
    })
}
