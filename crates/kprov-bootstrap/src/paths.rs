//! Where things lie on a machine. The layout is kubeadm's, because people and benchmark tools look there; what kubeadm
//! has no place for is under `/etc/kubernetes/kprov`.

use kprov_types::Minor;

/// Kubernetes' own directory.
pub const KUBERNETES: &str = "/etc/kubernetes";
/// Certificates and keys.
pub const PKI: &str = "/etc/kubernetes/pki";
/// Certificates and keys of etcd.
pub const ETCD_PKI: &str = "/etc/kubernetes/pki/etcd";
/// Configuration files that API servers read.
pub const CONFIG: &str = "/etc/kubernetes/kprov";
/// Where the kubelet looks for static pods.
pub const STATIC_PODS: &str = "/etc/kubernetes/manifests";
/// Where API servers write the audit log.
pub const AUDIT_LOG_DIR: &str = "/var/log/kubernetes/audit";
/// The kubelet's state, and its rotated certificates in `pki`.
pub const KUBELET: &str = "/var/lib/kubelet";
/// The kubelet's configuration file.
pub const KUBELET_CONFIG: &str = "/var/lib/kubelet/config.yaml";
/// The certificate of the cluster's CA, on every machine.
pub const CA: &str = "/etc/kubernetes/pki/ca.crt";
/// The kubelet's kubeconfig. On control-plane machines it's issued by the machine itself, on workers the kubelet writes it
/// once TLS bootstrap has worked.
pub const KUBELET_KUBECONFIG: &str = "/etc/kubernetes/kubelet.conf";
/// The kubeconfig with the join token, on machines that join by TLS bootstrap.
pub const BOOTSTRAP_KUBECONFIG: &str = "/etc/kubernetes/bootstrap-kubelet.conf";
/// The controller-manager's kubeconfig.
pub const CONTROLLER_MANAGER_KUBECONFIG: &str = "/etc/kubernetes/controller-manager.conf";
/// The scheduler's kubeconfig.
pub const SCHEDULER_KUBECONFIG: &str = "/etc/kubernetes/scheduler.conf";
/// kprov-node's kubeconfig on control-plane machines (user [`crate::pki::NODE_CLIENT`]).
pub const NODE_KUBECONFIG: &str = "/etc/kubernetes/kprov/node.conf";
/// `EncryptionConfiguration`.
pub const ENCRYPTION: &str = "/etc/kubernetes/kprov/encryption.yaml";
/// Audit `Policy`.
pub const AUDIT_POLICY: &str = "/etc/kubernetes/kprov/audit-policy.yaml";
/// The API on every machine: its front on loopback.
pub const LOCAL_API: &str = "https://127.0.0.1:6443";

/// `AdmissionConfiguration` for API servers of a minor, where it has Pod Security admission. Each minor has a file of its own,
/// since API servers of two minors run side by side on one machine.
pub fn admission(minor: Minor) -> String {
    format!("{CONFIG}/{minor}/admission.yaml")
}

/// `AuthenticationConfiguration` for API servers of a minor, where it can limit anonymous requests by path.
pub fn authentication(minor: Minor) -> String {
    format!("{CONFIG}/{minor}/authentication.yaml")
}

/// `<pki>/<name>`.
pub(crate) fn pki(name: &str) -> String {
    format!("{PKI}/{name}")
}
