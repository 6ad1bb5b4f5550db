//! Where kprov-node keeps things on a machine. Control-plane files are where kubeadm puts them, since people and
//! benchmark tools look there ([`kprov_bootstrap::paths`]); everything else is below two directories of kprov's own.

use camino::Utf8PathBuf;
use kprov_types::api::{ReleaseRef, release_name};

/// State that outlives a boot.
pub const STATE: &str = "/var/lib/kprov";
/// The bundle of a control-plane machine, readable by root alone.
pub const BUNDLE: &str = "/var/lib/kprov/bundle.json";
/// Releases, a directory each; `current` is a symbolic link to the one that runs.
pub const RELEASES: &str = "/var/lib/kprov/releases";
/// Static pods of the standby control plane, ready to be placed.
pub const STANDBY: &str = "/var/lib/kprov/standby";
/// There once this machine has seen its cluster's self-hosted control plane.
pub const SELF_HOSTED: &str = "/var/lib/kprov/self-hosted";
/// There once etcd was started on this machine.
pub const ETCD_STARTED: &str = "/var/lib/kprov/etcd-started";
/// Where a data disk is mounted that kprov-node formats itself.
pub const DATA_MOUNT: &str = "/var/lib/kprov/data";
/// etcd's data where the machine has no data disk.
pub const ETCD_DATA: &str = "/var/lib/etcd";
/// Process files and the status file; gone after a boot.
pub const RUN: &str = "/run/kprov";
/// What `kprov-node status` prints.
pub const STATUS: &str = "/run/kprov/status.json";
/// Logs of the supervised children.
pub const LOGS: &str = "/var/log/kprov";
/// kubelet's client certificate and key in one file; kubelet replaces it when it rotates them.
pub const KUBELET_CLIENT: &str = "/var/lib/kubelet/pki/kubelet-client-current.pem";
/// containerd's configuration file.
pub const CONTAINERD_CONFIG: &str = "/etc/containerd/config.toml";
/// containerd's registry mirrors.
pub const CONTAINERD_CERTS: &str = "/etc/containerd/certs.d";
/// containerd's socket, which is the CRI endpoint.
pub const CONTAINERD_SOCKET: &str = "/run/containerd/containerd.sock";
/// CNI configuration.
pub const CNI_CONFIG: &str = "/etc/cni/net.d";

/// Blobs that were put into this machine's release store, each under the digits of its digest.
pub const STORE: &str = "/var/lib/kprov/store/blobs/sha256";
/// What containerd has pulled, in the same form.
pub const CONTAINERD_BLOBS: &str = "/var/lib/containerd/io.containerd.content.v1.content/blobs/sha256";

/// The directory of one release: two payloads of one version have one each.
pub fn release(release: &ReleaseRef) -> Utf8PathBuf {
    Utf8PathBuf::from(RELEASES).join(release_name(&release.version.to_string(), &release.digest))
}

/// The release that runs, through the symbolic link.
pub fn current() -> Utf8PathBuf {
    Utf8PathBuf::from(RELEASES).join("current")
}
