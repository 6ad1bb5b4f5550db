//! `kprov upgrade` on this machine, on real Kubernetes, along each chain of payloads under test.
#![expect(clippy::print_stderr, reason = "what a test tells stands in its output")]

use std::fmt::Write as _;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use kprov_e2e::{Cluster, Kubectl, Payload, Prober, Traces, Watcher, broken, items, self_hosted, upgrades, wait_for};
use serde_json::{Value, json};

/// One machine, from the first version of a chain to its last by one command: no request is lost, watches resume without a gap, a
/// snapshot is taken for each hop, and asking again changes nothing.
#[test]
fn one_machine_upgrades() -> Result<()> {
    for chain in upgrades()? {
        let before = Traces::list();
        {
            let cluster = Cluster::new("e2e-up1")?;
            let (first, last) = ends(&chain)?;
            cluster.up(first, 1, 0)?;
            let kubectl = cluster.kubectl(first)?;
            refuses_what_cannot_be(&cluster, &kubectl, &chain)?;
            let clients = Clients::start(&cluster, Vec::new())?;
            let start = Instant::now();
            let out = cluster.upgrade_command(&chain, &last.version).arg("--timings").output();
            let took = start.elapsed();
            clients.lost_nothing(&format!("1 machine, {} -> {}", first.version, last.version), took)?;
            let out = out?;
            let text = format!(
                "{}{}",
                String::from_utf8_lossy(&out.stdout),
                String::from_utf8_lossy(&out.stderr)
            );
            ensure!(out.status.success(), "{}\n{text}", diagnosis(&kubectl));
            eprintln!("{}", String::from_utf8_lossy(&out.stdout));
            at(&cluster, &kubectl, last, 1, 0, hops(first, last))?;

            // Again: there is nothing to do.
            let start = Instant::now();
            let out = cluster.upgrade_command(&chain, &last.version).output()?;
            ensure!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
            ensure!(
                start.elapsed() < Duration::from_secs(30),
                "a second upgrade took {:?}",
                start.elapsed()
            );
            goes_back_to_a_snapshot(&cluster, &kubectl)?;
            cluster.down()?;
        }
        Traces::nothing_left(&before)?;
    }
    Ok(())
}

/// Three control-plane machines and two workers: a Deployment with a disruption budget serves all through it, and a pause in the
/// middle of the machines holds.
#[test]
#[ignore = "takes long: `cargo xtask test --full` runs it"]
fn three_and_two_upgrade() -> Result<()> {
    let chain = upgrades()?.pop().context("no chain")?;
    let (first, last) = ends(&chain)?;
    let before = Traces::list();
    {
        let cluster = Cluster::new("e2e-up5")?;
        cluster.up(first, 3, 2)?;
        let kubectl = cluster.kubectl(first)?;
        let urls = web(&kubectl, first)?;
        let clients = Clients::start(&cluster, urls)?;
        let start = Instant::now();
        let upgrade = cluster
            .upgrade_command(&chain, &last.version)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let paused = pauses_between_machines(&cluster, &kubectl, last);
        let out = upgrade.wait_with_output();
        let took = start.elapsed();
        clients.lost_nothing(&format!("3 + 2, {} -> {}", first.version, last.version), took)?;
        let out = out?;
        ensure!(
            out.status.success(),
            "{}\n{}",
            diagnosis(&kubectl),
            String::from_utf8_lossy(&out.stderr)
        );
        paused?;
        at(&cluster, &kubectl, last, 3, 2, hops(first, last))?;
        cluster.down()?;
    }
    Traces::nothing_left(&before)
}

/// Releases that are no good: each ends with the old version serving, nothing half done and the reason told; and the good release
/// after them goes through.
#[test]
#[ignore = "takes long: `cargo xtask test --full` runs it"]
fn bad_releases_undo_themselves() -> Result<()> {
    for chain in upgrades()? {
        let (first, good) = (&chain[0], &chain[1]);
        let before = Traces::list();
        let cluster = Cluster::new("e2e-bad")?;
        cluster.up(first, 1, 0)?;
        let kubectl = cluster.kubectl(first)?;
        let mut all = broken()?;
        all.retain(|bad| bad.payload.version == good.version);
        ensure!(!all.is_empty(), "no broken payload of {} is under test", good.version);
        for bad in all {
            let clients = Clients::start(&cluster, Vec::new())?;
            let start = Instant::now();
            let upgrade = cluster
                .upgrade_command(std::slice::from_ref(&bad.payload), &bad.payload.version)
                .args(["--health-timeout", "60"])
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()?;
            let forgotten = (bad.kind == "scheduler").then(|| forget_old_api_server(&cluster, &kubectl, first));
            let out = upgrade.wait_with_output()?;
            forgotten.transpose().with_context(|| diagnosis(&kubectl))?;
            let stderr = String::from_utf8_lossy(&out.stderr).into_owned();
            clients.lost_nothing(&format!("a release with a bad {}", bad.kind), start.elapsed())?;
            ensure!(
                out.status.code() == Some(1),
                "a release with a bad {} ended with {}:\n{stderr}",
                bad.kind,
                out.status
            );
            let word = match bad.kind.as_str() {
                "apiserver" => "kube-apiserver",
                "scheduler" => "kube-scheduler",
                "kubelet" => "kubelet",
                _ => "digest",
            };
            ensure!(stderr.contains(word), "the reason is not told ({word}):\n{stderr}");
            ensure!(stderr.contains("hint: "), "no hint:\n{stderr}");
            eprintln!("{}: {stderr}", bad.kind);
            at(&cluster, &kubectl, first, 1, 0, 0).with_context(|| format!("after a bad {}", bad.kind))?;
        }
        let out = cluster
            .upgrade_command(&[first.clone(), good.clone()], &good.version)
            .output()?;
        ensure!(
            out.status.success(),
            "{}\n{}",
            diagnosis(&kubectl),
            String::from_utf8_lossy(&out.stderr)
        );
        at(&cluster, &kubectl, good, 1, 0, 1)?;
        cluster.down()?;
        drop(cluster);
        Traces::nothing_left(&before)?;
    }
    Ok(())
}

/// While a bad scheduler is waited for, the image of the old API server goes as kubelet would remove it from a full disk: no pod
/// uses it then, and where the machine had it from at first is gone. The way back needs it.
fn forget_old_api_server(cluster: &Cluster, kubectl: &Kubectl, old: &Payload) -> Result<()> {
    let machine = format!("{}-cp-0", cluster.name);
    wait_for("API servers of the new release alone", Duration::from_mins(3), || {
        let status = kubectl.get(&["machines.kprov.io", &machine])?["status"].clone();
        let standby = status["standby"]["apiReady"] == true;
        let servers = status["apiServers"].as_array().cloned().unwrap_or_default();
        let new = servers.iter().all(|server| server["version"] != old.version.as_str());
        let pods = kubectl.get(&[
            "-n",
            "kube-system",
            "pods",
            "-l",
            "app.kubernetes.io/name=kube-scheduler",
        ])?;
        ensure!(
            !standby && !servers.is_empty() && new && items(&pods).count() > 1,
            "{status:#}"
        );
        Ok(())
    })?;
    // Stores put images by 20 s after a release has come.
    std::thread::sleep(Duration::from_secs(15));
    let digest = old.image("kube-apiserver")?;
    let digest = digest.rsplit('@').next().unwrap_or_default();
    let script = format!(
        "ctr=$(find /var/lib/kprov/releases -name ctr | head -n 1)\n\
         ctr() {{ \"$ctr\" -a /run/containerd/containerd.sock -n k8s.io images \"$@\"; }}\n\
         names=$(ctr ls | awk '/{digest}/ {{ print $1 }}')\n\
         test -n \"$names\" && ctr rm --sync $names && ! ctr ls | grep {digest}"
    );
    let init = init_of(&machine).with_context(|| format!("`{machine}` does not run"))?;
    let out = std::process::Command::new("nsenter")
        .args(["--target", &init, "--mount", "sh", "-ec", &script])
        .output()?;
    ensure!(
        out.status.success(),
        "the image of the old API server can't be removed: {}{}",
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
    eprintln!("removed: {}", String::from_utf8_lossy(&out.stdout).replace('\n', " "));
    Ok(())
}

/// The process that a local machine began with.
fn init_of(machine: &str) -> Option<String> {
    let end = format!("/machines/{machine}");
    std::fs::read_dir("/proc").ok()?.flatten().find_map(|entry| {
        let line = std::fs::read(entry.path().join("cmdline")).ok()?;
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        let is_it = line.starts_with("kprov machine-room init") && line.trim_end().ends_with(&end);
        is_it.then(|| entry.file_name().to_string_lossy().into_owned())
    })
}

/// The operator is killed 20 times while it upgrades, hop by hop of the chain where one is too short; each upgrade completes.
#[test]
#[ignore = "takes long: `cargo xtask test --full` runs it"]
fn operator_is_killed() -> Result<()> {
    for chain in upgrades()? {
        let (first, last) = ends(&chain)?;
        let before = Traces::list();
        let cluster = Cluster::new("e2e-opkill")?;
        cluster.up(first, 1, 0)?;
        let kubectl = cluster.kubectl(first)?;
        // Times without a pattern, the same in each run.
        let mut random: u64 = 20_26;
        let mut all = 0;
        for payload in &chain[1..] {
            let mut upgrade = cluster
                .upgrade_command(&chain, &payload.version)
                .stdout(Stdio::null())
                .stderr(Stdio::piped())
                .spawn()?;
            let mut kills = 0;
            while kills < KILLS && upgrade.try_wait()?.is_none() {
                random = random
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                std::thread::sleep(Duration::from_millis(300 + (random >> 33) % 1_200));
                kills += u32::from(kill_operator()?);
            }
            let out = finished(upgrade)?;
            eprintln!("upgrade to {}: operator killed {kills} times", payload.version);
            ensure!(out.0, "{}\n{}", diagnosis(&kubectl), out.1);
            all += kills;
        }
        ensure!(all >= KILLS, "the operator was killed {all} times only");
        at(&cluster, &kubectl, last, 1, 0, hops(first, last))?;
        cluster.down()?;
        drop(cluster);
        Traces::nothing_left(&before)?;
    }
    Ok(())
}

/// How often the operator is killed: at most in one upgrade, and at least in all.
const KILLS: u32 = 20;

fn finished(child: Child) -> Result<(bool, String)> {
    let out = child.wait_with_output()?;
    Ok((out.status.success(), String::from_utf8_lossy(&out.stderr).into_owned()))
}

/// Kills the operators that run on this host, both replicas: those processes that do the work. Tells whether there was one.
fn kill_operator() -> Result<bool> {
    let mut killed = false;
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let mut words = line.split(|b| *b == 0);
        let program = words.next().unwrap_or_default();
        if program.ends_with(b"/kprov-operator") && words.any(|word| word.starts_with(b"--worker=")) {
            let pid = entry.file_name().to_string_lossy().into_owned();
            killed |= std::process::Command::new("kill")
                .args(["-9", &pid])
                .status()?
                .success();
        }
    }
    Ok(killed)
}

fn ends(chain: &[Payload]) -> Result<(&Payload, &Payload)> {
    Ok((chain.first().context("no chain")?, chain.last().context("no chain")?))
}

/// How many hops lead from one version to another: one for each minor, and one within a minor.
fn hops(from: &Payload, to: &Payload) -> usize {
    (to.minor().saturating_sub(from.minor()) as usize).max(1)
}

/// Clients outside the machines, all through an upgrade: new TLS connections to the API, a long watch, and where there is one a
/// service.
struct Clients {
    api: Prober,
    watch: Watcher,
    web: Option<Prober>,
}

impl Clients {
    fn start(cluster: &Cluster, urls: Vec<String>) -> Result<Self> {
        let config = std::fs::read_to_string(cluster.kubeconfig())?;
        Ok(Self {
            api: Prober::start(&config, None, 20)?,
            watch: Watcher::start(&config)?,
            web: if urls.is_empty() {
                None
            } else {
                Some(Prober::start_http(urls, 20)?)
            },
        })
    }

    fn lost_nothing(self, what: &str, took: Duration) -> Result<()> {
        // Some seconds more, for what only breaks afterwards.
        std::thread::sleep(Duration::from_secs(5));
        let Self { api, watch, web } = self;
        let watched = watch.stop();
        for (kind, probes) in [
            ("API", Some(api.stop()?)),
            ("service", web.map(Prober::stop).transpose()?),
        ] {
            let Some(seen) = probes else { continue };
            eprintln!(
                "{what}: {:.1} s; {kind}: {} requests on new connections, {} failed, longest {} ms",
                took.as_secs_f64(),
                seen.succeeded,
                seen.failed.len(),
                seen.longest.as_millis()
            );
            ensure!(
                seen.succeeded > 50,
                "{what}: only {} requests were made of the {kind}",
                seen.succeeded
            );
            ensure!(
                seen.failed.is_empty(),
                "{what}: requests of the {kind} failed: {:#?}",
                seen.failed
            );
        }
        let watched = watched?;
        eprintln!(
            "{what}: {} writes seen by one watch, resumed {} times",
            watched.seen.len(),
            watched.resumed
        );
        watched.without_gap()
    }
}

/// The cluster runs `payload`, all of it, and tells so.
fn at(
    cluster: &Cluster,
    kubectl: &Kubectl,
    payload: &Payload,
    control_plane: u64,
    workers: u64,
    hops: usize,
) -> Result<()> {
    // Status follows within moments.
    wait_for("the cluster at its version", Duration::from_mins(1), || {
        self_hosted(kubectl, payload, control_plane, workers)
    })
    .with_context(|| diagnosis(kubectl))?;
    let update = kubectl.get(&["versionupdates.kprov.io", "cluster"])?;
    let status = &update["status"];
    ensure!(status["currentVersion"] == payload.version.as_str(), "{status:#}");
    let done = status["history"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|h| h["outcome"] == "Completed");
    ensure!(done.count() >= hops, "{status:#}");
    let machines = kubectl.get(&["machines.kprov.io"])?;
    ensure!(
        items(&machines).count() as u64 == control_plane + workers,
        "{machines:#}"
    );
    for machine in items(&machines) {
        ensure!(
            machine["status"]["running"]["version"] == payload.version.as_str(),
            "{machine:#}"
        );
    }
    for node in items(&kubectl.get(&["nodes"])?) {
        ensure!(
            node["spec"]["unschedulable"] != true,
            "{} is cordoned",
            node["metadata"]["name"]
        );
    }
    let out = cluster
        .kprov(&["etcd", "snapshots", "--name", &cluster.name, "-o", "json"])
        .output()?;
    let snapshots: Value = serde_json::from_slice(&out.stdout).context("etcd snapshots")?;
    let taken = snapshots["snapshots"].as_array().map_or(0, Vec::len);
    ensure!(taken >= hops, "{taken} snapshots for {hops} hops: {snapshots:#}");
    Ok(())
}

/// What can't be done is refused, with a word on why, and nothing changes.
fn refuses_what_cannot_be(cluster: &Cluster, kubectl: &Kubectl, chain: &[Payload]) -> Result<()> {
    let first = &chain[0];
    let version = kubectl.get(&["versionupdates.kprov.io", "cluster"])?["metadata"]["generation"].clone();
    let minor = first.minor();
    let (older, far) = (format!("1.{}.0", minor - 1), format!("1.{}.0", minor + 7));
    for (to, word) in [
        ("banana", "is not a Kubernetes version"),
        ("1.36", "is not a Kubernetes version"),
        (older.as_str(), "behind"),
        (far.as_str(), "no release"),
    ] {
        let out = cluster.upgrade_command(&[], to).output()?;
        let stderr = String::from_utf8_lossy(&out.stderr).to_lowercase();
        ensure!(!out.status.success(), "an upgrade to {to} was taken");
        ensure!(
            stderr.contains(&word.to_lowercase()),
            "{to}: `{word}` is not told:\n{stderr}"
        );
    }
    let now = kubectl.get(&["versionupdates.kprov.io", "cluster"])?["metadata"]["generation"].clone();
    ensure!(now == version, "a refused upgrade changed the VersionUpdate");

    // The same by kubectl alone: a condition, or the API server itself, says why.
    for desired in ["banana", older.as_str(), far.as_str()] {
        let patch = json!({ "spec": { "desiredVersion": desired } }).to_string();
        let patched = kubectl.run(&[
            "patch",
            "versionupdates.kprov.io",
            "cluster",
            "--type=merge",
            "-p",
            &patch,
        ]);
        if let Err(error) = &patched {
            ensure!(
                desired == "banana" && format!("{error:#}").contains("desiredVersion"),
                "{error:#}"
            );
            continue;
        }
        wait_for("a condition that refuses", Duration::from_secs(20), || {
            let update = kubectl.get(&["versionupdates.kprov.io", "cluster"])?;
            ensure!(
                update["status"]["observedGeneration"] == update["metadata"]["generation"],
                "not seen yet"
            );
            ensure!(
                update["status"]["phase"] == "Blocked",
                "{desired}: {:#}",
                update["status"]
            );
            ensure!(
                update["status"]["message"]
                    .as_str()
                    .is_some_and(|m| m.contains(desired)),
                "{desired}: {:#}",
                update["status"]
            );
            Ok(())
        })?;
    }
    let patch = json!({ "spec": { "desiredVersion": first.version } }).to_string();
    kubectl.run(&[
        "patch",
        "versionupdates.kprov.io",
        "cluster",
        "--type=merge",
        "-p",
        &patch,
    ])?;

    // A second VersionUpdate is told that it does not count.
    kubectl.apply(&json!({
        "apiVersion": "kprov.io/v1alpha1", "kind": "VersionUpdate", "metadata": { "name": "other" },
        "spec": { "desiredVersion": first.version },
    }))?;
    wait_for(
        "a condition on the second VersionUpdate",
        Duration::from_secs(20),
        || {
            let other = kubectl.get(&["versionupdates.kprov.io", "other"])?;
            let conditions = other["status"]["conditions"].as_array().cloned().unwrap_or_default();
            ensure!(
                conditions
                    .iter()
                    .any(|c| c["reason"] == "NotInCharge"
                        && c["message"].as_str().is_some_and(|m| m.contains("cluster"))),
                "{:#}",
                other["status"]
            );
            Ok(())
        },
    )?;
    kubectl.run(&["delete", "versionupdates.kprov.io", "other"])?;
    self_hosted(kubectl, first, 1, 0)
}

/// While machines are being updated: after `kprov pause` no further one begins, and `kprov resume` goes on.
fn pauses_between_machines(cluster: &Cluster, kubectl: &Kubectl, last: &Payload) -> Result<()> {
    let updated = || -> Result<usize> {
        let nodes = kubectl.get(&["nodes"])?;
        Ok(items(&nodes)
            .filter(|n| n["status"]["nodeInfo"]["kubeletVersion"] == format!("v{}", last.version))
            .count())
    };
    wait_for("the first machine to be updated", Duration::from_mins(15), || {
        ensure!(updated()? >= 1, "none yet");
        Ok(())
    })?;
    let run = |command: &str| -> Result<()> {
        let out = cluster.kprov(&[command, "--name", &cluster.name]).output()?;
        ensure!(
            out.status.success(),
            "{command}: {}",
            String::from_utf8_lossy(&out.stderr)
        );
        Ok(())
    };
    run("pause")?;
    // One that was half way may end; after that none begins.
    let calm = || -> Result<()> {
        let machines = kubectl.get(&["machines.kprov.io"])?;
        for machine in items(&machines) {
            let (spec, status) = (&machine["spec"]["run"]["release"], &machine["status"]["running"]);
            ensure!(
                spec.is_null() || spec == status,
                "{} is half way",
                machine["metadata"]["name"]
            );
        }
        Ok(())
    };
    wait_for("machines that were half way", Duration::from_mins(3), calm)?;
    let before = updated()?;
    std::thread::sleep(Duration::from_secs(20));
    calm()?;
    let after = updated()?;
    ensure!(
        before == after,
        "{after} machines are updated, {before} were when it was paused"
    );
    ensure!(after < 5, "all machines were updated before the pause");
    let update = kubectl.get(&["versionupdates.kprov.io", "cluster"])?;
    ensure!(
        update["status"]["phase"] == "Paused" && update["status"]["paused"] == true,
        "{:#}",
        update["status"]
    );
    run("resume")
}

/// A web server in three replicas, with a disruption budget, at a port of each worker. It is an etcd out of the payload, as there is
/// no registry to pull anything else from.
fn web(kubectl: &Kubectl, payload: &Payload) -> Result<Vec<String>> {
    let labels = json!({ "app": "web" });
    let etcdctl = |args: &[&str]| {
        let mut command = vec!["/usr/local/bin/etcdctl"];
        command.extend_from_slice(args);
        json!({ "exec": { "command": command } })
    };
    let policy = if payload.minor() >= 21 {
        "policy/v1"
    } else {
        "policy/v1beta1"
    };
    for object in [
        json!({
            "apiVersion": "apps/v1", "kind": "Deployment", "metadata": { "name": "web" },
            "spec": {
                "replicas": 3, "selector": { "matchLabels": labels },
                "strategy": { "rollingUpdate": { "maxUnavailable": 0, "maxSurge": 1 } },
                "template": { "metadata": { "labels": labels }, "spec": {
                    "terminationGracePeriodSeconds": 15,
                    "containers": [{
                        "name": "main", "image": payload.image("etcd")?,
                        "env": [{ "name": "ETCDCTL_API", "value": "3" }],
                        "command": ["/usr/local/bin/etcd", "--data-dir=/tmp/data", "--listen-client-urls=http://0.0.0.0:2379",
                            "--advertise-client-urls=http://127.0.0.1:2379"],
                        "readinessProbe": { "httpGet": { "path": "/health", "port": 2379 }, "periodSeconds": 1 },
                        // Serves on while kube-proxies take it out: the image has no `sleep`, but this takes as long to give up.
                        "lifecycle": { "preStop": etcdctl(&["--endpoints=http://127.0.0.1:9", "--dial-timeout=5s",
                            "--command-timeout=5s", "get", "x"]) },
                    }],
                } },
            },
        }),
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": { "name": "web" },
            "spec": { "type": "NodePort", "selector": labels, "ports": [{ "port": 80, "targetPort": 2379, "nodePort": 30080 }] },
        }),
        json!({
            "apiVersion": policy, "kind": "PodDisruptionBudget", "metadata": { "name": "web" },
            "spec": { "maxUnavailable": 1, "selector": { "matchLabels": labels } },
        }),
    ] {
        kubectl.apply(&object)?;
    }
    kubectl
        .run(&["rollout", "status", "deploy/web", "--timeout=180s"])
        .or_else(|e| {
            bail!(
                "{e:#}\n{}",
                kubectl.run(&["describe", "pods", "-l", "app=web"]).unwrap_or_default()
            )
        })?;
    let nodes = kubectl.get(&["nodes", "-l", "!node-role.kubernetes.io/control-plane"])?;
    Ok(items(&nodes)
        .filter_map(|node| {
            node["status"]["addresses"]
                .as_array()?
                .iter()
                .find(|a| a["type"] == "InternalIP")
        })
        .filter_map(|address| address["address"].as_str())
        .map(|address| format!("http://{address}:30080/health"))
        .collect())
}

/// What was written after a snapshot is gone once it is restored, and the cluster works on.
fn goes_back_to_a_snapshot(cluster: &Cluster, kubectl: &Kubectl) -> Result<()> {
    let out = cluster
        .kprov(&["etcd", "snapshots", "--name", &cluster.name, "-o", "json"])
        .output()?;
    let list: Value = serde_json::from_slice(&out.stdout)?;
    let newest = list["snapshots"]
        .as_array()
        .and_then(|all| all.last())
        .context("no snapshot")?;
    let name = newest["name"].as_str().context("a snapshot without a name")?;
    kubectl.run(&["create", "configmap", "too-new", "--from-literal=a=b"])?;
    let out = cluster
        .kprov(&["etcd", "restore", name, "--name", &cluster.name, "--yes"])
        .output()?;
    ensure!(
        out.status.success(),
        "{}\n{}",
        diagnosis(kubectl),
        String::from_utf8_lossy(&out.stderr)
    );
    let left = kubectl.run(&["get", "configmap", "too-new", "--ignore-not-found", "-o", "name"])?;
    ensure!(
        left.trim().is_empty(),
        "what was written after the snapshot is still there"
    );
    kubectl
        .eventually(Duration::from_mins(2), &["create", "configmap", "after-restore"])
        .map(drop)
}

/// What one would look at, for a failure's text.
fn diagnosis(kubectl: &Kubectl) -> String {
    let mut text = String::new();
    for args in [
        &["get", "versionupdates.kprov.io", "cluster", "-o", "yaml"][..],
        &["get", "machines.kprov.io", "-o", "yaml"][..],
        &["get", "pods", "-n", "kube-system", "-o", "wide"][..],
        &[
            "logs",
            "-n",
            "kube-system",
            "-l",
            "app.kubernetes.io/name=kprov-operator",
            "--tail=60",
            "--prefix",
        ][..],
        &["get", "events", "-A", "--sort-by=.lastTimestamp"][..],
    ] {
        let out = kubectl.run(args).unwrap_or_else(|e| format!("{e:#}"));
        let _ = writeln!(text, "$ kubectl {}\n{out}", args.join(" "));
    }
    text
}
