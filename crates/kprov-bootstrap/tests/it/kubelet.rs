//! The kubelet's configuration by minor and host.

use kprov_bootstrap::kubelet::{CgroupDriver, HostFacts, Kubelet};
use kprov_bootstrap::kubelet_config;
use kprov_types::Minor;
use kprov_types::machine::Role;
use serde_json::json;

use crate::common::{machine, node_config};

pub(crate) fn host() -> HostFacts {
    HostFacts {
        name: machine("demo-cp-0"),
        address: [10, 77, 0, 10].into(),
        cgroup_v1: true,
        cgroup_driver: CgroupDriver::Cgroupfs,
        swap: false,
        may_lower_oom_score: false,
        kernel_defaults: false,
        resolv_conf: None,
        runtime_endpoint: "unix:///run/containerd/containerd.sock".into(),
        disk_mib: 100 << 10,
        pause_image: "kprov.local/pause:3.9".into(),
    }
}

fn kubelet(minor: u64, role: Role) -> Kubelet {
    kubelet_config(
        &node_config(role, role == Role::ControlPlane),
        &host(),
        Minor::v1(minor),
    )
    .unwrap()
}

#[test]
fn snapshots() {
    for minor in [20, 29, 36] {
        let Kubelet { config, flags } = kubelet(minor, Role::ControlPlane);
        insta::assert_json_snapshot!(
            format!("kubelet-1.{minor}"),
            json!({ "flags": flags, "config": config })
        );
    }
}

#[test]
fn each_minor_has_its_settings_once() {
    for minor in 20..=37 {
        let Kubelet { config, flags } = kubelet(minor, Role::ControlPlane);
        let flag = |name: &str| flags.iter().any(|f| f.starts_with(name));
        let endpoint = (
            config.get("containerRuntimeEndpoint").is_some(),
            flag("--container-runtime-endpoint="),
        );
        assert_eq!(endpoint, (minor >= 27, minor < 27), "{minor}");
        let taints = (
            config.get("registerWithTaints").is_some(),
            flag("--register-with-taints="),
        );
        assert_eq!(taints, (minor >= 23, minor < 23), "{minor}");
        assert_eq!(flag("--container-runtime=remote"), minor < 24, "{minor}");
        assert_eq!(flag("--pod-infra-container-image="), minor < 35, "{minor}");
        assert_eq!(
            config.get("failCgroupV1"),
            (minor >= 31).then_some(&json!(false)),
            "{minor}"
        );
        assert!(!flag("--bootstrap-kubeconfig="), "{minor}");
    }
}

#[test]
fn host_facts_decide() {
    let mut host = host();
    host.cgroup_v1 = false;
    host.swap = true;
    host.may_lower_oom_score = true;
    host.cgroup_driver = CgroupDriver::Systemd;
    host.resolv_conf = Some("/run/systemd/resolve/resolv.conf".into());
    let worker = kubelet_config(&node_config(Role::Worker, false), &host, Minor::v1(36)).unwrap();
    assert!(
        worker
            .flags
            .contains(&"--bootstrap-kubeconfig=/etc/kubernetes/bootstrap-kubelet.conf".to_owned())
    );
    for absent in ["failCgroupV1", "oomScoreAdj", "registerWithTaints"] {
        assert_eq!(worker.config.get(absent), None, "{absent}");
    }
    assert_eq!(worker.config["failSwapOn"], json!(false));
    assert_eq!(worker.config["cgroupDriver"], json!("systemd"));
    assert_eq!(worker.config["resolvConf"], json!("/run/systemd/resolve/resolv.conf"));
}
