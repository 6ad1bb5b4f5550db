//! Pods, and everything that they need of a cluster.

use std::io::{BufRead as _, BufReader};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use crate::{Kubectl, Payload, items};

/// Pods on every machine reach each other by address and by Service; logs, exec and port-forward work; a ServiceAccount's
/// token is accepted. The pods are etcds out of the payload, which machines must be able to fetch: there is no registry to pull
/// anything else from.
pub fn pods_work(kubectl: &Kubectl, payload: &Payload) -> Result<()> {
    let set = json!({
        "apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": {"name": "echo", "namespace": "default"},
        "spec": {
            "selector": {"matchLabels": {"app": "echo"}},
            "template": {
                "metadata": {"labels": {"app": "echo"}},
                "spec": {
                    "tolerations": [{"operator": "Exists"}], "terminationGracePeriodSeconds": 1,
                    "containers": [{
                        "name": "main", "image": payload.image("etcd")?,
                        "command": ["/usr/local/bin/etcd", "--data-dir=/tmp/data", "--listen-client-urls=http://0.0.0.0:2379",
                            "--advertise-client-urls=http://127.0.0.1:2379"],
                        "readinessProbe": {"httpGet": {"path": "/health", "port": 2379}, "periodSeconds": 1},
                    }],
                },
            },
        },
    });
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "echo", "namespace": "default"},
        "spec": {"selector": {"app": "echo"}, "ports": [{"port": 80, "targetPort": 2379}]},
    });
    kubectl.apply(&set)?;
    kubectl.apply(&service)?;
    kubectl
        .run(&["rollout", "status", "ds/echo", "--timeout=180s"])
        .or_else(|e| {
            anyhow::bail!(
                "{e:#}\n{}",
                kubectl.run(&["describe", "pods", "-l", "app=echo"]).unwrap_or_default()
            )
        })?;
    let pods = kubectl.get(&["pods", "-l", "app=echo"])?;
    let service_address = kubectl.run(&["get", "svc", "echo", "-o", "jsonpath={.spec.clusterIP}"])?;
    for from in items(&pods) {
        let name = from["metadata"]["name"].as_str().context("a pod without a name")?;
        let mut targets: Vec<String> = items(&pods)
            .filter_map(|p| p["status"]["podIP"].as_str())
            .map(|ip| format!("http://{ip}:2379"))
            .collect();
        targets.push(format!("http://{service_address}:80"));
        for target in targets {
            kubectl
                .eventually(
                    Duration::from_secs(20),
                    &[
                        "exec",
                        name,
                        "--",
                        "/usr/local/bin/etcdctl",
                        &format!("--endpoints={target}"),
                        "endpoint",
                        "health",
                    ],
                )
                .with_context(|| format!("from {name} on {}", from["spec"]["nodeName"]))?;
        }
        kubectl.run(&["logs", name, "--tail=1"])?;
    }
    let name = pods["items"][0]["metadata"]["name"].as_str().context("no pod")?;
    port_forward(kubectl, name)?;
    service_account(kubectl)?;
    kubectl.run(&["delete", "ds/echo", "svc/echo", "--wait=false"])?;
    Ok(())
}

fn port_forward(kubectl: &Kubectl, pod: &str) -> Result<()> {
    let mut forward = kubectl
        .command(&["port-forward", pod, ":2379"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    // Kept open until the end: kubectl writes more lines, and would die of nobody reading them.
    let mut stdout = BufReader::new(forward.stdout.take().context("no stdout")?);
    stdout.read_line(&mut line)?;
    let port = line
        .split(':')
        .nth(1)
        .and_then(|r| r.split(' ').next())
        .unwrap_or_default()
        .to_owned();
    let reply = std::process::Command::new("curl")
        .args(["-sf", &format!("http://127.0.0.1:{port}/version")])
        .output();
    forward.kill()?;
    forward.wait()?;
    drop(stdout);
    let reply = reply?;
    ensure!(
        reply.status.success() && String::from_utf8_lossy(&reply.stdout).contains("etcdserver"),
        "port-forward said `{line}`: {reply:?}"
    );
    Ok(())
}

/// The token mounted into a pod is accepted by the API, and is who it should be: it may not list Secrets.
fn service_account(kubectl: &Kubectl) -> Result<()> {
    let server = kubectl.run(&["config", "view", "-o", "jsonpath={.clusters[0].cluster.server}"])?;
    let token = mounted_token()?;
    let code = |path: &str| -> Result<String> {
        let out = std::process::Command::new("curl")
            .args(["-sk", "-o", "/dev/null", "-w", "%{http_code}", "-H"])
            .arg(format!("Authorization: Bearer {token}"))
            .arg(format!("{server}{path}"))
            .output()?;
        Ok(String::from_utf8_lossy(&out.stdout).into_owned())
    };
    ensure!(code("/api")? == "200", "the token was not accepted");
    ensure!(
        code("/api/v1/secrets")? == "403",
        "a default ServiceAccount may list Secrets"
    );
    Ok(())
}

/// The token as kubelet has mounted it into one of the test's pods. The image has no shell to print it with, so it's read
/// through the process's own root.
fn mounted_token() -> Result<String> {
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if String::from_utf8_lossy(&line).contains("--data-dir=/tmp/data") {
            let token = entry
                .path()
                .join("root/var/run/secrets/kubernetes.io/serviceaccount/token");
            return std::fs::read_to_string(&token).with_context(|| format!("no token at `{}`", token.display()));
        }
    }
    anyhow::bail!("none of the test's pods runs")
}
