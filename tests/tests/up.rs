//! `kprov up` on this machine, on real Kubernetes, for each payload under test.
#![expect(clippy::print_stderr, reason = "what a test tells stands in its output")]

use std::io::{BufRead as _, BufReader};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use kprov_e2e::{
    Cluster, Kubectl, Payload, Prober, Traces, condition, full, items, payloads, pods_work, self_hosted, wait_for,
};
use serde_json::{Value, json};

/// One control-plane machine: self-hosted, nothing lost at the pivot, nothing changed by a second `up`, all of what pods
/// need works, it comes back from a power cut, and nothing stays after `down`.
#[test]
fn one_machine() -> Result<()> {
    for payload in payloads()? {
        let before = Traces::list();
        {
            let cluster = Cluster::new("e2e-one")?;
            up_with_prober(&cluster, &payload, 1, 0)?;
            let kubectl = cluster.kubectl(&payload)?;
            self_hosted(&kubectl, &payload, 1, 0)?;
            second_up_changes_nothing(&cluster, &kubectl, &payload, 1, 0)?;
            hardened(&kubectl, &payload)?;
            workloads(&cluster, &kubectl, &payload)?;
            power_cut(&cluster, &kubectl, &payload)?;
            cluster.down()?;
        }
        Traces::nothing_left(&before)?;
    }
    Ok(())
}

/// Three control-plane machines and two workers, and beside them another cluster that must not notice anything.
#[test]
#[ignore = "takes long: `cargo xtask test --full` runs it"]
fn three_and_two() -> Result<()> {
    let payload = payloads()?.pop().context("no payload")?;
    let before = Traces::list();
    {
        let cluster = Cluster::new("e2e-ha")?;
        up_with_prober(&cluster, &payload, 3, 2)?;
        let kubectl = cluster.kubectl(&payload)?;
        self_hosted(&kubectl, &payload, 3, 2)?;
        second_up_changes_nothing(&cluster, &kubectl, &payload, 3, 2)?;
        workloads(&cluster, &kubectl, &payload)?;

        let with_first = Traces::list();
        let other = Cluster::new("e2e-other")?;
        let out = other.kprov(&["plan", "--name", "e2e-other"]).output()?;
        ensure!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        other.up(&payload, 1, 0)?;
        other.down()?;
        // The first cluster's own pods may come and go meanwhile.
        let mut gone = Traces::list().gone_since(&with_first);
        gone.retain(|trace| !trace.contains("/kubepods/"));
        ensure!(gone.is_empty(), "`down` of another cluster took these away: {gone:#?}");
        kubectl.run(&["get", "nodes"])?;
        cluster.down()?;
    }
    Traces::nothing_left(&before)
}

/// `kill -9` of `kprov up` at the boundaries of its steps, then `up` again: completes, nothing twice.
#[test]
fn killed_at_every_boundary() -> Result<()> {
    let payload = payloads()?.remove(0);
    let before = Traces::list();
    let cluster = Cluster::new("e2e-kill")?;
    let mut kills = 0;
    if full() {
        // Each kill alone, on a cluster of its own.
        for boundary in 0.. {
            if !killed_at(&cluster, &payload, boundary)? {
                break;
            }
            kills += 1;
            cluster
                .up(&payload, 1, 0)
                .with_context(|| format!("after a kill at boundary {boundary}"))?;
            self_hosted(&cluster.kubectl(&payload)?, &payload, 1, 0)?;
            cluster.down()?;
        }
    } else {
        // All kills one after the other on one cluster: each run gets one boundary further than the one before.
        for boundary in 0.. {
            if !killed_at(&cluster, &payload, boundary)? {
                break;
            }
            kills += 1;
        }
        cluster.up(&payload, 1, 0)?;
        self_hosted(&cluster.kubectl(&payload)?, &payload, 1, 0)?;
    }
    ensure!(kills >= 8, "only {kills} boundaries were met");
    eprintln!("killed at {kills} boundaries");
    cluster.down()?;
    drop(cluster);
    Traces::nothing_left(&before)
}

/// Starts `up` and kills it at its n-th event; `false` if it ended before.
fn killed_at(cluster: &Cluster, payload: &Payload, boundary: usize) -> Result<bool> {
    let mut command = cluster.up_command(payload, 1, 0);
    command
        .args(["--progress", "json"])
        .stderr(Stdio::piped())
        .stdout(Stdio::null());
    let mut child = command.spawn()?;
    let stderr = child.stderr.take().context("no stderr")?;
    let mut seen = 0;
    let mut text = String::new();
    for line in BufReader::new(stderr).lines() {
        let line = line?;
        if line.contains("\"event\":\"started\"") || line.contains("\"event\":\"finished\"") {
            if seen == boundary {
                child.kill()?;
                child.wait()?;
                return Ok(true);
            }
            seen += 1;
        }
        text.push_str(&line);
        text.push('\n');
    }
    let status = child.wait()?;
    ensure!(
        status.success(),
        "`up` failed by itself before event {boundary}:\n{text}"
    );
    Ok(false)
}

/// Runs `up` with two clients at it from the first answer on: one through the endpoint, as anybody outside would come, and
/// one at the first machine's own front.
fn up_with_prober(cluster: &Cluster, payload: &Payload, control_plane: u32, workers: u32) -> Result<()> {
    let start = Instant::now();
    let mut command = cluster.up_command(payload, control_plane, workers);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let waiter = std::thread::spawn(move || child.wait_with_output());
    let config = wait_for("kubeconfig", Duration::from_mins(2), || {
        ensure!(!waiter.is_finished(), "`up` ended");
        Ok(std::fs::read_to_string(cluster.kubeconfig())?)
    });
    let prober = config.and_then(|config| Prober::start(&config, None, 20));
    let out = match waiter.join() {
        Ok(out) => out?,
        Err(_) => anyhow::bail!("the thread that waits for `up` died"),
    };
    ensure!(
        out.status.success(),
        "{}\n{}",
        out.status,
        String::from_utf8_lossy(&out.stderr)
    );
    let took = start.elapsed();
    // Some seconds more, for what only breaks once `up` is gone.
    std::thread::sleep(Duration::from_secs(5));
    let seen = prober?.stop()?;
    eprintln!(
        "Kubernetes {}: {control_plane} + {workers} up in {:.1} s; {} requests on new TLS connections, {} failed, longest {} ms",
        payload.version,
        took.as_secs_f64(),
        seen.succeeded,
        seen.failed.len(),
        seen.longest.as_millis()
    );
    ensure!(seen.succeeded > 100, "only {} requests were made", seen.succeeded);
    ensure!(
        seen.failed.is_empty(),
        "requests failed: {:#?}\n{}",
        seen.failed,
        String::from_utf8_lossy(&out.stderr)
    );
    Ok(())
}

/// A second `up` takes under a minute and changes no object and no machine.
fn second_up_changes_nothing(
    cluster: &Cluster,
    kubectl: &Kubectl,
    payload: &Payload,
    control_plane: u32,
    workers: u32,
) -> Result<()> {
    let fingerprint = || -> Result<Vec<String>> {
        let mut all = Vec::new();
        for kind in ["ds", "deploy", "cm", "sa", "pods"] {
            let list = kubectl.get(&[kind, "-n", "kube-system"])?;
            for item in items(&list) {
                // generation and restarts, as resourceVersion also changes with every status.
                let restarts: Vec<_> = item["status"]["containerStatuses"]
                    .as_array()
                    .into_iter()
                    .flatten()
                    .map(|c| &c["restartCount"])
                    .collect();
                all.push(format!(
                    "{kind} {} {} {} {restarts:?}",
                    item["metadata"]["name"], item["metadata"]["uid"], item["metadata"]["generation"]
                ));
            }
        }
        let machines = cluster
            .kprov(&["status", "--name", &cluster.name, "-o", "json"])
            .output()?;
        let status: Value =
            serde_json::from_slice(&machines.stdout).context("`kprov status -o json` printed no JSON")?;
        all.push(status["machines"].to_string());
        Ok(all)
    };
    let before = fingerprint()?;
    let start = Instant::now();
    cluster.up(payload, control_plane, workers)?;
    ensure!(
        start.elapsed() < Duration::from_mins(1),
        "the second `up` took {:?}",
        start.elapsed()
    );
    let after = fingerprint()?;
    ensure!(
        before == after,
        "the second `up` changed something:\n{before:#?}\n{after:#?}"
    );
    Ok(())
}

/// What a CIS Kubernetes benchmark would look at, as seen from outside.
fn hardened(kubectl: &Kubectl, payload: &Payload) -> Result<()> {
    let server = kubectl.run(&["config", "view", "-o", "jsonpath={.clusters[0].cluster.server}"])?;
    let anonymous = |path: &str| -> Result<String> {
        let out = std::process::Command::new("curl")
            .args(["-sk", "-o", "/dev/null", "-w", "%{http_code}"])
            .arg(format!("{server}{path}"))
            .output()?;
        Ok(String::from_utf8_lossy(&out.stdout).into_owned())
    };
    for path in ["/livez", "/readyz", "/healthz"] {
        ensure!(anonymous(path)? == "200", "{path} must answer anybody");
    }
    for path in ["/api", "/api/v1/namespaces", "/version", "/metrics", "/apis"] {
        let code = anonymous(path)?;
        ensure!(code == "401" || code == "403", "{path} answered {code} to anybody");
    }
    privileged_pods_are_refused(kubectl, payload)?;
    // Kubelet's serving certificates are signed: logs work with the API server verifying them.
    kubectl.eventually(
        Duration::from_mins(1),
        &["logs", "-n", "kube-system", "ds/kube-proxy", "--tail=1"],
    )?;
    Ok(())
}

/// Outside kube-system nothing above Pod Security's baseline is let in. Before 1.23 that's PodSecurityPolicy's work, which
/// lets through what the pod's creator may use (an administrator everything), so there a ReplicaSet has to create it.
fn privileged_pods_are_refused(kubectl: &Kubectl, payload: &Payload) -> Result<()> {
    let spec = json!({
        "tolerations": [{"operator": "Exists"}],
        "containers": [{
            "name": "main", "image": payload.image("etcd")?, "securityContext": {"privileged": true},
        }],
    });
    let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "privileged"}, "spec": spec});
    if payload.minor() >= 23 {
        ensure!(
            kubectl.apply(&pod).is_err(),
            "a privileged pod was let into namespace default"
        );
        return Ok(());
    }
    let labels = json!({"app": "privileged"});
    kubectl.apply(&json!({
        "apiVersion": "apps/v1", "kind": "ReplicaSet", "metadata": {"name": "privileged"},
        "spec": {"selector": {"matchLabels": labels}, "template": {"metadata": {"labels": labels}, "spec": spec}},
    }))?;
    let refused = wait_for("a refusal", Duration::from_secs(30), || {
        let set = kubectl.get(&["rs/privileged"])?;
        ensure!(
            condition(&set, "ReplicaFailure") == Some("True"),
            "a privileged pod was let into namespace default: {}",
            set["status"]
        );
        Ok(())
    });
    kubectl.run(&["delete", "rs/privileged"])?;
    refused
}

/// What pods need works ([`pods_work`]), with the payload served to machines meanwhile.
fn workloads(cluster: &Cluster, kubectl: &Kubectl, payload: &Payload) -> Result<()> {
    let out = cluster
        .kprov(&["status", "--name", &cluster.name, "-o", "json"])
        .output()?;
    let status: Value = serde_json::from_slice(&out.stdout)?;
    let host = status["network"]["hostAddress"]
        .as_str()
        .context("status has no host address")?
        .to_owned();
    // Workers have no etcd image yet: they pull it from the payload's own server.
    let mut server = cluster
        .kprov(&[
            "release",
            "serve",
            payload.dir.as_str(),
            "--listen",
            &format!("{host}:10202"),
        ])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let result = pods_work(kubectl, payload);
    server.kill()?;
    server.wait()?;
    result
}

/// All machines lose power at once. `up` starts them again, and the control plane comes back by itself.
fn power_cut(cluster: &Cluster, kubectl: &Kubectl, payload: &Payload) -> Result<()> {
    kubectl.run(&["create", "configmap", "survivor", "--from-literal=a=b"])?;
    for machine in std::fs::read_dir(format!("/var/lib/kprov/local/{}/machines", cluster.name))?.flatten() {
        // The machine's first process: with it goes everything in its PID namespace, at once.
        let init: Value = serde_json::from_slice(&std::fs::read(machine.path().join("init.json"))?)?;
        let killed = std::process::Command::new("kill")
            .args(["-9", &init["pid"].to_string()])
            .status()?;
        ensure!(killed.success(), "{init} could not be killed");
    }
    let start = Instant::now();
    cluster.up(payload, 1, 0)?;
    eprintln!(
        "Kubernetes {}: back from a power cut in {:.1} s",
        payload.version,
        start.elapsed().as_secs_f64()
    );
    kubectl.run(&["get", "configmap", "survivor"])?;
    self_hosted(kubectl, payload, 1, 0)
}
