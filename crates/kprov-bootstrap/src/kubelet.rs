//! The kubelet's configuration and flags.

use std::net::IpAddr;

use kprov_types::machine::Role;
use kprov_types::names::MachineName;
use kprov_types::node::NodeConfig;
use kprov_types::{Minor, ports};
use serde_json::{Value, json};

use crate::component_flags::CIPHER_SUITES;
use crate::manifests::CONTROL_PLANE_LABEL;
use crate::paths;
use crate::versions::{Features, Unsupported};

/// What manages cgroups on a machine. kubelet and containerd must agree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CgroupDriver {
    /// The runtime itself: machines without systemd.
    Cgroupfs,
    /// systemd.
    Systemd,
}

/// What the kubelet's configuration needs to know of its machine.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is one independent fact about the host"
)]
pub struct HostFacts {
    /// The machine's name, and its node's.
    pub name: MachineName,
    /// Its address in the cluster's network.
    pub address: IpAddr,
    /// Only cgroup v1 is there.
    pub cgroup_v1: bool,
    /// What manages cgroups.
    pub cgroup_driver: CgroupDriver,
    /// Swap is on. The kubelet tolerates it then, and gives pods none.
    pub swap: bool,
    /// Processes may lower their `oom_score_adj` (`CAP_SYS_RESOURCE`).
    pub may_lower_oom_score: bool,
    /// The kernel's settings are as the kubelet wants them, so it can insist on them; else it sets them itself.
    pub kernel_defaults: bool,
    /// Resolver configuration for pods, where it isn't `/etc/resolv.conf`.
    pub resolv_conf: Option<String>,
    /// containerd's socket, as a `unix://` URL.
    pub runtime_endpoint: String,
    /// The size of the file system that holds pods' data and images, in MiB; 0 where it isn't known.
    pub disk_mib: u64,
    /// The pause image, as containerd is told; kept from the kubelet's image clean-up where it has a flag for that.
    pub pause_image: String,
}

/// How a kubelet is started.
#[derive(Clone, Debug, PartialEq)]
pub struct Kubelet {
    /// The content of [`paths::KUBELET_CONFIG`].
    pub config: Value,
    /// Its flags.
    pub flags: Vec<String>,
}

/// The kubelet's configuration and flags on one machine.
pub fn kubelet_config(node: &NodeConfig, host: &HostFacts, minor: Minor) -> Result<Kubelet, Unsupported> {
    let features = Features::of(minor)?;
    Ok(Kubelet {
        config: configuration(node, host, &features),
        flags: flags(node, host, &features),
    })
}

/// How much of the disk is kept free: when images are cleaned up, in percent, and when pods are evicted.
///
/// The kubelet's own values (15 % and 10 %) are meant for small disks. Of a large one that may be hundreds of gigabytes, and of
/// one that machines share with the rest of a host, space that none of them could give back.
fn disk_reserve(disk_mib: u64) -> (u64, String) {
    const IMAGES_MIB: u64 = 15 << 10;
    const PODS_MIB: u64 = 5 << 10;
    if disk_mib == 0 {
        return (15, "10%".into());
    }
    let images = (IMAGES_MIB * 100).div_ceil(disk_mib).clamp(2, 15);
    let pods = PODS_MIB.min(disk_mib / 10);
    (images, format!("{pods}Mi"))
}

fn taint() -> Value {
    json!({ "key": CONTROL_PLANE_LABEL, "effect": "NoSchedule" })
}

fn configuration(node: &NodeConfig, host: &HostFacts, features: &Features) -> Value {
    let (reserve, free) = disk_reserve(host.disk_mib);
    let mut config = json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "staticPodPath": paths::STATIC_PODS,
        // The directory is watched; this is for what a watch may miss.
        "fileCheckFrequency": "5s",
        // A static pod that started before there was an API is mirrored at its next sync, and `kprov up` waits for that.
        "syncFrequency": "10s",
        "port": ports::KUBELET,
        "readOnlyPort": 0,
        "healthzBindAddress": "127.0.0.1",
        "healthzPort": ports::KUBELET_HEALTHZ,
        "authentication": {
            "anonymous": { "enabled": false },
            "webhook": { "enabled": true },
            "x509": { "clientCAFile": paths::CA },
        },
        "authorization": { "mode": "Webhook" },
        "rotateCertificates": true,
        "serverTLSBootstrap": true,
        "tlsMinVersion": "VersionTLS12",
        "tlsCipherSuites": CIPHER_SUITES,
        "streamingConnectionIdleTimeout": "4h0m0s",
        "makeIPTablesUtilChains": true,
        "eventRecordQPS": 50,
        "clusterDomain": node.network.dns_domain,
        "clusterDNS": [node.network.dns_service()],
        "cgroupDriver": match host.cgroup_driver {
            CgroupDriver::Cgroupfs => "cgroupfs",
            CgroupDriver::Systemd => "systemd",
        },
        "maxPods": 110,
        "podPidsLimit": 4096,
        "serializeImagePulls": false,
        "imageGCHighThresholdPercent": 100 - reserve,
        "imageGCLowThresholdPercent": 95 - reserve,
        // All four, as the kubelet drops its own when one is given.
        "evictionHard": {
            "memory.available": "100Mi",
            "nodefs.inodesFree": "5%",
            "nodefs.available": free,
            "imagefs.available": free,
        },
        "failSwapOn": !host.swap,
        "protectKernelDefaults": host.kernel_defaults,
    });
    if !host.may_lower_oom_score {
        config["oomScoreAdj"] = json!(0);
    }
    if let Some(path) = &host.resolv_conf {
        config["resolvConf"] = json!(path);
    }
    if features.kubelet_endpoint_in_config {
        config["containerRuntimeEndpoint"] = json!(host.runtime_endpoint);
    }
    if features.kubelet_taints_in_config && node.taint {
        config["registerWithTaints"] = json!([taint()]);
    }
    if features.kubelet_seccomp_default {
        config["seccompDefault"] = json!(true);
    }
    if features.kubelet_fail_cgroup_v1 && host.cgroup_v1 {
        config["failCgroupV1"] = json!(false);
    }
    config
}

fn flags(node: &NodeConfig, host: &HostFacts, features: &Features) -> Vec<String> {
    let mut flags = vec![
        format!("--config={}", paths::KUBELET_CONFIG),
        format!("--kubeconfig={}", paths::KUBELET_KUBECONFIG),
        format!("--root-dir={}", paths::KUBELET),
        format!("--cert-dir={}/pki", paths::KUBELET),
        format!("--hostname-override={}", host.name),
        format!("--node-ip={}", host.address),
    ];
    if !node.labels.is_empty() {
        let labels: Vec<_> = node
            .labels
            .iter()
            .map(|(name, value)| format!("{name}={value}"))
            .collect();
        flags.push(format!("--node-labels={}", labels.join(",")));
    }
    if node.role == Role::Worker {
        flags.push(format!("--bootstrap-kubeconfig={}", paths::BOOTSTRAP_KUBECONFIG));
    }
    if features.kubelet_runtime_flag {
        flags.push("--container-runtime=remote".into());
    }
    if !features.kubelet_endpoint_in_config {
        flags.push(format!("--container-runtime-endpoint={}", host.runtime_endpoint));
    }
    if !features.kubelet_taints_in_config && node.taint {
        flags.push(format!("--register-with-taints={CONTROL_PLANE_LABEL}=:NoSchedule"));
    }
    if features.kubelet_pause_flag {
        flags.push(format!("--pod-infra-container-image={}", host.pause_image));
    }
    flags
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_disk_is_not_kept_free_by_the_hundred_gigabytes() {
        assert_eq!(disk_reserve(0), (15, "10%".into()));
        assert_eq!(disk_reserve(20 << 10), (15, "2048Mi".into()));
        assert_eq!(disk_reserve(250 << 10), (6, "5120Mi".into()));
        assert_eq!(disk_reserve(8 << 20), (2, "5120Mi".into()));
    }
}
