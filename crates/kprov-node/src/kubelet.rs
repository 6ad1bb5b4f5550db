//! kubelet's files, and kubelet as a supervised child.

use camino::Utf8Path;
use kprov_bootstrap::kubelet::HostFacts;
use kprov_bootstrap::paths as kubernetes;
use kprov_bootstrap::pki::{Authority, Credentials, Kubeconfig};
use kprov_bootstrap::versions::Unsupported;
use kprov_types::release::{ImageComponent, ReleaseImage};
use kprov_types::{Release, Role};
use serde_json::Value;
use sha2::{Digest as _, Sha256};

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

/// Puts a static pod where kubelet finds it, by way of a file in `staging` on the same file system.
///
/// The pod gets a uid that follows from what it says. Without one, kubelet makes it from its own form of the pod
/// (`pkg/kubelet/config/common.go`), which is another in each minor: a kubelet that is replaced would take the running pod for
/// a foreign one, and start a second beside it before the first has ended.
pub fn place_static_pod(staging: &Utf8Path, path: &Utf8Path, pod: &Value) -> Result<(), FileError> {
    let text = format!("{:#}\n", with_uid(pod));
    files::write_through(staging, path, text.as_bytes(), 0o600)
}

fn with_uid(pod: &Value) -> Value {
    let mut pod = pod.clone();
    if let Some(metadata) = pod["metadata"].as_object_mut() {
        metadata.remove("uid");
    }
    let hash = Sha256::digest(pod.to_string());
    // As long as those that kubelet makes.
    let uid: String = hex::encode(hash).chars().take(32).collect();
    pod["metadata"]["uid"] = uid.into();
    pod
}

/// The size of the file system that a directory is on, or will be made on.
fn disk_mib(directory: &Utf8Path) -> u64 {
    let found = directory
        .ancestors()
        .find_map(|directory| nix::sys::statvfs::statvfs(directory.as_std_path()).ok());
    found.map_or(0, |fs| fs.blocks() * fs.fragment_size() / (1 << 20))
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
        disk_mib: disk_mib(Utf8Path::new(kubernetes::KUBELET)),
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
        env: vec![("PATH".into(), containerd::search_path())],
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_static_pods_uid_follows_from_what_it_says() {
        let pod = json!({ "kind": "Pod", "metadata": { "name": "etcd" }, "spec": { "containers": [] } });
        let placed = with_uid(&pod);
        let uid = placed["metadata"]["uid"].as_str().unwrap();
        assert_eq!(uid.len(), 32);
        assert_eq!(with_uid(&placed), placed, "read back and placed again");
        let mut other = placed.clone();
        other["spec"]["priority"] = 1.into();
        assert_ne!(with_uid(&other)["metadata"]["uid"], placed["metadata"]["uid"]);
    }
}
