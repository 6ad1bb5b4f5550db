//! What a cluster must look like.

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{Kubectl, Payload};

/// All nodes Ready, the control plane made of API objects, etcd the only static pod, all of the version asked for.
pub fn self_hosted(kubectl: &Kubectl, payload: &Payload, control_plane: u64, workers: u64) -> Result<()> {
    let nodes = kubectl.get(&["nodes"])?;
    let ready = items(&nodes).filter(|n| condition(n, "Ready") == Some("True")).count() as u64;
    ensure!(
        ready == control_plane + workers,
        "{ready} nodes are Ready: {}",
        kubectl.run(&["get", "nodes", "-o", "wide"])?
    );
    for node in items(&nodes) {
        ensure!(
            node["status"]["nodeInfo"]["kubeletVersion"] == format!("v{}", payload.version),
            "{}",
            node["status"]["nodeInfo"]
        );
    }
    let version: Value = serde_json::from_str(&kubectl.run(&["get", "--raw", "/version"])?)?;
    ensure!(version["gitVersion"] == format!("v{}", payload.version), "{version}");

    let sets = kubectl.get(&["ds", "-n", "kube-system"])?;
    let set = |name: &str| {
        items(&sets)
            .find(|d| d["metadata"]["name"] == name)
            .cloned()
            .with_context(|| format!("no DaemonSet {name}"))
    };
    for (name, wanted) in [
        ("kube-apiserver", control_plane),
        ("kube-proxy", control_plane + workers),
    ] {
        let status = &set(name)?["status"];
        ensure!(status["numberReady"] == wanted, "{name}: {status}");
    }
    let deployments = kubectl.get(&["deploy", "-n", "kube-system"])?;
    for name in ["kube-controller-manager", "kube-scheduler"] {
        let deployment = items(&deployments)
            .find(|d| d["metadata"]["name"] == name)
            .with_context(|| format!("no Deployment {name}"))?;
        ensure!(
            deployment["status"]["availableReplicas"] == control_plane,
            "{name}: {}",
            deployment["status"]
        );
    }
    let pods = kubectl.get(&["pods", "-n", "kube-system"])?;
    let mirrors: Vec<_> = items(&pods)
        .filter(|p| !p["metadata"]["annotations"]["kubernetes.io/config.mirror"].is_null())
        .filter_map(|p| p["metadata"]["name"].as_str())
        .collect();
    ensure!(
        mirrors.len() as u64 == control_plane && mirrors.iter().all(|m| m.starts_with("etcd-")),
        "static pods: {mirrors:?}"
    );
    Ok(())
}

/// A list's items.
pub fn items(list: &Value) -> impl Iterator<Item = &Value> {
    list["items"].as_array().into_iter().flatten()
}

/// The status of a condition.
pub fn condition<'a>(node: &'a Value, kind: &str) -> Option<&'a str> {
    let conditions = node["status"]["conditions"].as_array()?;
    conditions.iter().find(|c| c["type"] == kind)?["status"].as_str()
}
