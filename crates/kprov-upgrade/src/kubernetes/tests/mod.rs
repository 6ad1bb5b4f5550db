//! The adapter against real API servers with Kubernetes' own controllers, and with no more rights than kprov's operator has.
//! What kubelets and kprov-node would tell, the tests tell.

mod scenario;
mod server;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context as _, Result, ensure};
use kprov_types::api::{Failure as FailedRelease, MachineStatus, ReleaseRef};
use serde_json::{Value, json};

use self::scenario::{NODE, Scenario, name};
use self::server::{Server, directories, until};
use super::*;
use crate::model::Workload;
use crate::plan::{State, plan};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn real_api_servers() {
    for (index, directory) in directories("real_api_servers").iter().enumerate() {
        let server = Server::start(directory, u16::try_from(index).unwrap()).await.unwrap();
        let server = Arc::new(server);
        let version = &server.version;
        let outcome = check(Arc::clone(&server)).await;
        outcome.unwrap_or_else(|error| panic!("{version}: {error:?}"));
        println!("{version}: passed");
    }
}

async fn check(server: Arc<Server>) -> Result<()> {
    let scenario = Scenario::begin(server).await.context("setup")?;
    let leads = Arc::new(AtomicBool::new(true));
    let permit = Arc::clone(&leads);
    let cluster = KubeCluster::watch(scenario.operator.clone(), move || permit.load(Ordering::Relaxed));
    cluster.synced().await;
    keeps_things_in_being(&scenario, &cluster).await.context("ensure")?;
    asks_preflight(&scenario, &cluster).await.context("preflight")?;
    orders_machines(&scenario, &cluster).await.context("orders")?;
    cordons_and_drains(&scenario, &cluster).await.context("drain")?;
    rolls(&scenario, &cluster).await.context("roll")?;
    replaces(&scenario, &cluster).await.context("replace")?;
    fails_and_reverts(&scenario, &cluster).await.context("failure")?;
    finishes(&scenario, &cluster).await.context("finish")?;
    reports(&scenario, &cluster).await.context("report")?;
    writes_only_while_it_leads(&scenario, &cluster, &leads)
        .await
        .context("leading")?;
    looks_once(&scenario).await.context("look")
}

async fn observed(cluster: &KubeCluster) -> Result<Input> {
    cluster.observe().await?.context("there is no VersionUpdate")
}

async fn keeps_things_in_being(scenario: &Scenario, cluster: &KubeCluster) -> Result<()> {
    ensure!(cluster.observe().await?.is_none(), "nothing is asked for yet");
    scenario
        .update("cluster", &scenario.current.version.to_string())
        .await?;
    scenario.update("other", "1.99.0").await?;
    until("the VersionUpdates", || async {
        cluster.ensure().await?;
        Ok((cluster.cache.facts().updates.iter().count() == 2).then_some(()))
    })
    .await?;
    cluster.ensure().await?;
    let api = &scenario.admin;
    for node in ["cp-0", "w-0", "w-1"] {
        let machine = api.get(&format!("{}/machines/{node}", scenario::OWN)).await?;
        let owner = &machine["metadata"]["ownerReferences"][0];
        ensure!(owner["kind"] == "Node" && owner["name"] == node, "{machine}");
        // Each may read its own, and only that.
        let own = server::Api(scenario.server.client(Some(&format!("system:node:{node}")))?);
        own.get(&format!("{}/machines/{node}", scenario::OWN)).await?;
        let told = json!({ "status": { "message": "here" } });
        own.patch(&format!("{}/machines/{node}/status", scenario::OWN), &told)
            .await?;
        ensure!(own.get(&format!("{}/machines/other", scenario::OWN)).await.is_err());
        ensure!(
            own.patch(
                &format!("{}/machines/{node}", scenario::OWN),
                &json!({ "spec": { "order": 9 } })
            )
            .await
            .is_err()
        );
    }
    let other = api.get(&format!("{}/versionupdates/other", scenario::OWN)).await?;
    ensure!(other["status"]["conditions"][0]["reason"] == "NotInCharge", "{other}");
    // Releases are told what was found of them.
    scenario.releases().await?;
    until("the word on each Release", || async {
        cluster.ensure().await?;
        let list = api.get(&format!("{}/releases", scenario::OWN)).await?;
        let items = list["items"].as_array().context("no list")?;
        let told = |verified: bool| {
            items
                .iter()
                .filter(|r| r["status"]["verified"] == json!(verified) && r["status"]["message"] != "")
                .count()
        };
        Ok((told(true) == 2 && told(false) == 1).then_some(()))
    })
    .await?;
    // Where no API server is known to answer, addresses are left alone; then they're those that do.
    let addresses = || async {
        let endpoints = api.get("/api/v1/namespaces/default/endpoints/kubernetes").await?;
        anyhow::Ok(endpoints["subsets"][0]["addresses"].clone())
    };
    ensure!(
        addresses().await? == json!([{ "ip": "10.77.0.10" }, { "ip": "10.77.0.11" }]),
        "{}",
        addresses().await?
    );
    scenario.api_servers_serve(cluster).await?;
    until("the address that answers", || async {
        cluster.ensure().await?;
        Ok((addresses().await? == json!([{ "ip": "10.77.0.10" }])).then_some(()))
    })
    .await?;
    let slice = format!(
        "/apis/{}/namespaces/default/endpointslices/kubernetes",
        scenario.server.features().endpoint_slice
    );
    ensure!(api.get(&slice).await?["endpoints"][0]["addresses"] == json!(["10.77.0.10"]));
    Ok(())
}

async fn asks_preflight(scenario: &Scenario, cluster: &KubeCluster) -> Result<()> {
    let input = observed(cluster).await?;
    ensure!(
        input.observed.current == scenario.current,
        "{:?}",
        input.observed.current
    );
    ensure!(
        input.observed.findings.is_none(),
        "nobody has asked for another version"
    );
    ensure!(plan(&input).state == State::Idle, "{:#?}", plan(&input));
    scenario.want(&scenario.next.version.to_string()).await?;
    let input = until("findings", || async {
        let input = observed(cluster).await?;
        Ok(input.observed.findings.is_some().then_some(input))
    })
    .await?;
    ensure!(
        input
            .observed
            .releases
            .iter()
            .any(|r| r.release == scenario.next && r.verified.is_ok())
    );
    ensure!(
        input.observed.releases.iter().any(|r| r.verified.is_err()),
        "{:?}",
        input.observed.releases
    );
    let servers = &input.observed.workloads[&Workload::ApiServer];
    ensure!(
        servers.template == scenario.current && servers.instances.iter().all(|i| i.ready),
        "{servers:#?}"
    );
    ensure!(servers.automatic == scenario.server.features().daemon_set_surge);
    Ok(())
}

async fn orders_machines(scenario: &Scenario, cluster: &KubeCluster) -> Result<()> {
    let machine = async || scenario.admin.get(&format!("{}/machines/w-0", scenario::OWN)).await;
    let stage = Action::Stage {
        release: scenario.next.clone(),
        machines: [name("w-0"), name("w-1")].into(),
    };
    ensure!(cluster.act(&stage).await? == Outcome::Done);
    let first = machine().await?;
    ensure!(
        first["spec"]["order"] == 1 && first["spec"]["stage"][0] == json!(scenario.next),
        "{first}"
    );
    ensure!(cluster.act(&stage).await? == Outcome::Done);
    ensure!(
        machine().await?["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"],
        "it was told already"
    );
    let run = |from: Option<&ReleaseRef>| Action::Run {
        machine: name("w-0"),
        from: from.cloned(),
        to: scenario.next.clone(),
    };
    ensure!(cluster.act(&run(None)).await? == Outcome::Stale, "it runs something");
    ensure!(cluster.act(&run(Some(&scenario.next))).await? == Outcome::Stale);
    scenario
        .tell("w-0", |status: &mut MachineStatus| status.observed_order = 41)
        .await?;
    ensure!(cluster.act(&run(Some(&scenario.current))).await? == Outcome::Done);
    let second = machine().await?;
    ensure!(
        second["spec"]["order"] == 42 && second["spec"]["run"]["timeoutSeconds"] == 300,
        "{second}"
    );
    // What was done is in the next picture, whatever the watch has told by then.
    let seen = observed(cluster).await?.observed.machines[&name("w-0")].clone();
    ensure!(seen.ordered.is_some_and(|(to, _)| to == scenario.next) && !seen.order_seen);
    let gone = Action::Snapshot {
        machine: name("w-9"),
        name: "x".into(),
    };
    ensure!(cluster.act(&gone).await? == Outcome::Stale);
    Ok(())
}

async fn cordons_and_drains(scenario: &Scenario, cluster: &KubeCluster) -> Result<()> {
    let api = &scenario.admin;
    let node = async |name: &str| api.get(&format!("{NODE}/{name}")).await;
    let cordon = |machine: &str| Action::Cordon { machine: name(machine) };
    let uncordon = |machine: &str| Action::Uncordon { machine: name(machine) };
    let drain = |machine: &str, force: bool| Action::Drain {
        machine: name(machine),
        force,
    };
    // Somebody else's cordon is left alone, either way.
    api.patch(&format!("{NODE}/w-1"), &json!({ "spec": { "unschedulable": true } }))
        .await?;
    ensure!(cluster.act(&cordon("w-1")).await? == Outcome::Stale);
    ensure!(cluster.act(&uncordon("w-1")).await? == Outcome::Done);
    ensure!(node("w-1").await?["spec"]["unschedulable"] == true);
    ensure!(
        cluster.act(&drain("w-1", true)).await? == Outcome::Stale,
        "it's not ours to drain"
    );
    api.patch(&format!("{NODE}/w-1"), &json!({ "spec": { "unschedulable": null } }))
        .await?;

    scenario.shop().await?;
    until("the other machine", || async {
        Ok((!observed(cluster).await?.observed.machines[&name("w-1")].cordoned).then_some(()))
    })
    .await?;
    ensure!(cluster.act(&cordon("w-0")).await? == Outcome::Done);
    ensure!(cluster.act(&cordon("w-0")).await? == Outcome::Done);
    let seen = observed(cluster).await?.observed.machines[&name("w-0")].clone();
    ensure!(seen.cordoned && seen.cordoned_by_us.is_some());
    let found = until("what has to leave", || async {
        let drain = observed(cluster).await?.observed.machines[&name("w-0")]
            .drain
            .clone()
            .context("it's cordoned")?;
        // CoreDNS may be there as well.
        let shop = drain.remaining.iter().filter(|pod| pod.starts_with("shop/"));
        Ok((shop.count() == 2 && !drain.blocked.is_empty()).then_some(drain))
    })
    .await?;
    let web = |why: &String| why.contains("`shop/web`") && why.contains("`shop/web-1`");
    ensure!(found.blocked.iter().any(web), "{found:?}");
    let leaving = async |pod: &str| -> Result<bool> {
        let pod = api.get(&format!("/api/v1/namespaces/shop/pods/{pod}")).await?;
        anyhow::Ok(!pod["metadata"]["deletionTimestamp"].is_null())
    };
    ensure!(cluster.act(&drain("w-0", false)).await? == Outcome::Done);
    ensure!(!leaving("web-1").await?, "its budget holds it back");
    ensure!(leaving("free-1").await?);
    ensure!(!leaving("elsewhere-1").await?);
    ensure!(cluster.act(&drain("w-0", true)).await? == Outcome::Done);
    ensure!(leaving("web-1").await?, "a person has said so");
    ensure!(cluster.act(&uncordon("w-0")).await? == Outcome::Done);
    let after = node("w-0").await?;
    ensure!(
        after["spec"]["unschedulable"].is_null() && after["metadata"]["annotations"]["kprov.io/cordoned-at"].is_null()
    );
    Ok(())
}

async fn rolls(scenario: &Scenario, cluster: &KubeCluster) -> Result<()> {
    for workload in [Workload::ApiServer, Workload::ControllerManager, Workload::Proxy] {
        rolls_one(scenario, cluster, workload)
            .await
            .with_context(|| workload.as_str())?;
    }
    let surge = &scenario.object(Workload::ApiServer).await?["spec"]["updateStrategy"]["rollingUpdate"]["maxSurge"];
    ensure!(
        (surge == &json!(1)) == scenario.server.features().daemon_set_surge,
        "{surge}"
    );
    Ok(())
}

/// On, back, and on again.
async fn rolls_one(scenario: &Scenario, cluster: &KubeCluster, workload: Workload) -> Result<()> {
    let (current, next) = (&scenario.current, &scenario.next);
    let roll = |from: &ReleaseRef, to: &ReleaseRef| Action::Roll {
        workload,
        from: from.clone(),
        to: to.clone(),
    };
    let back = Action::RollBack {
        workload,
        from: next.clone(),
        to: current.clone(),
    };
    // As a person changes it, by hand.
    let edited = scenario.edit(workload).await?;
    scenario.settled(workload).await?;
    ensure!(
        cluster.act(&roll(next, current)).await? == Outcome::Done,
        "it is of that release"
    );
    let other = ReleaseRef {
        digest: kprov_types::Digest::from_bytes([9; 32]),
        ..current.clone()
    };
    ensure!(cluster.act(&roll(&other, next)).await? == Outcome::Stale);

    ensure!(cluster.act(&roll(current, next)).await? == Outcome::Done);
    let rolled = scenario.object(workload).await?;
    is_rolled(&rolled, next)?;
    ensure!(cluster.act(&roll(current, next)).await? == Outcome::Done, "again");
    ensure!(scenario.object(workload).await?["metadata"]["generation"] == rolled["metadata"]["generation"]);
    let seen = observed(cluster).await?.observed.workloads[&workload].clone();
    ensure!(
        seen.template == *next && seen.previous.as_ref() == Some(current),
        "{seen:?}"
    );

    scenario.settled(workload).await?;
    ensure!(cluster.act(&back).await? == Outcome::Done);
    let returned = scenario.object(workload).await?;
    let (was, is) = (&edited["spec"]["template"], &returned["spec"]["template"]);
    ensure!(was == is, "not what it was:\n{was:#}\n{is:#}");
    ensure!(cluster.act(&back).await? == Outcome::Done, "again");

    scenario.settled(workload).await?;
    ensure!(cluster.act(&roll(current, next)).await? == Outcome::Done);
    let again = scenario.object(workload).await?;
    is_rolled(&again, next)?;
    ensure!(
        command(&again) == command(&rolled),
        "people's changes are carried over as the first time"
    );
    if workload != Workload::Proxy {
        // A revision that none has had.
        let revisions =
            [&edited, &rolled, &again].map(|o| &o["spec"]["template"]["metadata"]["labels"]["kprov.io/revision"]);
        ensure!(revisions == ["2", "3", "4"], "{revisions:?}");
    }
    Ok(())
}

/// The template is of a release, and has what people have changed.
fn is_rolled(object: &Value, to: &ReleaseRef) -> Result<()> {
    let template = &object["spec"]["template"];
    let annotations = &template["metadata"]["annotations"];
    ensure!(annotations["kprov.io/release"] == json!(to.digest), "{annotations}");
    ensure!(annotations["kprov.io/kubernetes"] == json!(to.version), "{annotations}");
    ensure!(!object["metadata"]["annotations"]["kprov.io/rolled-at"].is_null());
    let container = &template["spec"]["containers"][0];
    let image = container["image"].as_str().unwrap_or_default();
    ensure!(image.contains(&to.version.tag()), "{image}");
    ensure!(command(object).contains(&json!("--v=4")), "{container}");
    ensure!(container["resources"]["requests"]["cpu"] == "333m", "{container}");
    ensure!(container["env"].to_string().contains("GOGC"), "{container}");
    Ok(())
}

/// A program's flags, but for the one that is another with each revision.
fn command(object: &Value) -> Vec<Value> {
    let words = object["spec"]["template"]["spec"]["containers"][0]["command"].as_array();
    let words = words.into_iter().flatten();
    words
        .filter(|word| !word.to_string().contains("--bind-address"))
        .cloned()
        .collect()
}

/// A pod of the old template is deleted where its controller waits for that, one of the new is not.
async fn replaces(scenario: &Scenario, cluster: &KubeCluster) -> Result<()> {
    let (old, machine) = scenario.pod_of(Workload::ApiServer, &scenario.current).await?;
    let replace = |pod: &str, machine: &str| Action::Replace {
        workload: Workload::ApiServer,
        pod: pod.into(),
        machine: name(machine),
    };
    until("the new template", || async {
        let seen = observed(cluster).await?.observed.workloads[&Workload::ApiServer].clone();
        Ok((seen.template == scenario.next).then_some(()))
    })
    .await?;
    ensure!(
        cluster.act(&replace(&old, "w-0")).await? == Outcome::Stale,
        "it's on another machine"
    );
    ensure!(
        cluster.act(&replace("no-such-pod", &machine)).await? == Outcome::Done,
        "it's gone"
    );
    ensure!(cluster.act(&replace(&old, &machine)).await? == Outcome::Done);
    scenario.kubelet_removes(&old).await?;
    let (new, machine) = until("a new pod", || async {
        Ok(Some(scenario.pod_of(Workload::ApiServer, &scenario.next).await?))
    })
    .await?;
    until("the new pod in the picture", || async {
        let seen = observed(cluster).await?.observed.workloads[&Workload::ApiServer].clone();
        Ok(seen.instances.iter().any(|i| i.name == new).then_some(()))
    })
    .await?;
    ensure!(
        cluster.act(&replace(&new, &machine)).await? == Outcome::Stale,
        "it's of the template"
    );
    Ok(())
}

async fn fails_and_reverts(scenario: &Scenario, cluster: &KubeCluster) -> Result<()> {
    let begin = Action::Begin {
        release: scenario.next.clone(),
    };
    // Something else is asked for than what was planned from.
    observed(cluster).await?;
    scenario.want("1.99.9").await?;
    ensure!(cluster.act(&begin).await? == Outcome::Stale);
    scenario.want(&scenario.next.version.to_string()).await?;
    observed(cluster).await?;
    ensure!(cluster.act(&begin).await? == Outcome::Done);
    ensure!(cluster.act(&begin).await? == Outcome::Done);
    let input = observed(cluster).await?;
    let started = input.observed.hop_started.context("it has begun")?;

    let (pod, machine) = scenario.pod_of(Workload::ApiServer, &scenario.next).await?;
    let failure = FailedRelease {
        release: scenario.next.clone(),
        attempt: 0,
        component: "kube-apiserver".into(),
        instance: pod.clone(),
        message: "it is not ready after 300 s".into(),
        log: Vec::new(),
        time: Timestamp::now(),
        halted: false,
        reverted: false,
    };
    let fail = Action::Fail { failure };
    scenario.ready(&pod, true).await?;
    scenario
        .process_says(&pod, &machine, &scenario.next.version.tag())
        .await?;
    ensure!(cluster.act(&fail).await? == Outcome::Stale, "it is ready after all");
    // The kubelet's word alone does not make it the release that is asked for.
    scenario
        .process_says(&pod, &machine, &scenario.current.version.tag())
        .await?;
    ensure!(cluster.act(&fail).await? == Outcome::Done);
    scenario.ready(&pod, false).await?;
    ensure!(cluster.act(&fail).await? == Outcome::Done);
    let seen = observed(cluster).await?.observed.failure.context("it failed")?;
    ensure!(seen.instance == pod && !seen.reverted, "{seen:?}");
    let reverted = Action::Reverted {
        release: scenario.next.clone(),
    };
    ensure!(cluster.act(&reverted).await? == Outcome::Done);
    ensure!(cluster.act(&reverted).await? == Outcome::Done);
    let status = scenario.status().await?;
    ensure!(status.hop_started.is_none() && status.failure.is_some_and(|f| f.reverted));
    ensure!(
        status.history.len() == 1 && status.history[0].outcome == "Reverted",
        "{:?}",
        status.history
    );
    ensure!(status.history[0].started == started);
    Ok(())
}

async fn finishes(scenario: &Scenario, cluster: &KubeCluster) -> Result<()> {
    observed(cluster).await?;
    ensure!(
        cluster
            .act(&Action::Begin {
                release: scenario.next.clone()
            })
            .await?
            == Outcome::Done
    );
    ensure!(scenario.status().await?.failure.is_none(), "another try has begun");
    let finish = Action::Finish {
        release: scenario.next.clone(),
    };
    ensure!(cluster.act(&finish).await? == Outcome::Done);
    ensure!(cluster.act(&finish).await? == Outcome::Done);
    let status = scenario.status().await?;
    ensure!(status.current_version == Some(scenario.next.version.to_string()));
    ensure!(status.current_release.as_ref() == Some(&scenario.next.digest));
    let last = status.history.last().context("no history")?;
    ensure!(
        status.history.len() == 2 && last.outcome == "Completed",
        "{:?}",
        status.history
    );
    ensure!(last.from == Some(scenario.current.version.to_string()));
    let settings = scenario
        .admin
        .get("/api/v1/namespaces/kube-system/configmaps/kprov-config")
        .await?;
    let settings: kprov_types::node::ControlPlaneSettings =
        serde_json::from_str(settings["data"]["settings.json"].as_str().context("no settings")?)?;
    ensure!(settings.kubernetes == scenario.next.version && settings.release_digest == scenario.next.digest);
    ensure!(settings.release.kubernetes == scenario.next.version);
    let input = observed(cluster).await?;
    ensure!(input.observed.current == scenario.next && input.observed.hop_started.is_none());
    // Once all API servers and controller-managers know of surge, API servers are replaced by it.
    scenario.all_of(cluster, &scenario.next).await?;
    cluster.ensure().await?;
    let strategy = scenario.object(Workload::ApiServer).await?["spec"]["updateStrategy"].clone();
    let surge = kprov_bootstrap::versions::Features::of(scenario.next.version.minor())?.daemon_set_surge;
    ensure!((strategy["type"] == "RollingUpdate") == surge, "{strategy}");
    Ok(())
}

async fn reports(scenario: &Scenario, cluster: &KubeCluster) -> Result<()> {
    let version = async || -> Result<Value> {
        let update = scenario
            .admin
            .get(&format!("{}/versionupdates/cluster", scenario::OWN))
            .await?;
        anyhow::Ok(update["metadata"]["resourceVersion"].clone())
    };
    let input = observed(cluster).await?;
    let plan = plan(&input);
    cluster.report(&input, &plan).await?;
    let first = version().await?;
    let status = scenario.status().await?;
    ensure!(status.conditions.len() == 4 && !status.phase.is_empty(), "{status:#?}");
    ensure!(status.history.len() == 2, "what actions write is left alone");
    cluster.report(&input, &plan).await?;
    ensure!(version().await? == first, "it was told already");
    // A report is no news.
    let looked = cluster.cache.changes().borrow().to_owned();
    let blocked = Plan {
        state: State::Refused(crate::plan::Refusal::NoRelease(
            "the cluster knows no release 1.99.9".into(),
        )),
        ..plan
    };
    cluster.report(&input, &blocked).await?;
    ensure!(version().await? != first);
    ensure!(*cluster.cache.changes().borrow() == looked);
    let events = scenario
        .admin
        .get("/apis/events.k8s.io/v1/namespaces/default/events")
        .await?;
    let reasons: std::collections::BTreeSet<&str> = events["items"]
        .as_array()
        .context("no events")?
        .iter()
        .filter(|event| event["regarding"]["kind"] == "VersionUpdate")
        .filter_map(|event| event["reason"].as_str())
        .collect();
    let expected = [
        "HopFinished",
        "HopStarted",
        "MachineUpdated",
        "MachineUpdating",
        "Refused",
        "ReleaseFailed",
        "Reverted",
        "RollBackStarted",
        "RollStarted",
    ];
    ensure!(reasons.into_iter().eq(expected), "{events}");
    Ok(())
}

async fn writes_only_while_it_leads(scenario: &Scenario, cluster: &KubeCluster, leads: &AtomicBool) -> Result<()> {
    leads.store(false, Ordering::Relaxed);
    let before = scenario.admin.get(&format!("{NODE}/w-0")).await?;
    let acts = [
        Action::Cordon { machine: name("w-0") },
        Action::Begin {
            release: scenario.next.clone(),
        },
        Action::Snapshot {
            machine: name("cp-0"),
            name: "x".into(),
        },
    ];
    for action in acts {
        let outcome = cluster.act(&action).await;
        ensure!(
            matches!(outcome, Err(ClusterError::NotLeading)),
            "{action:?}: {outcome:?}"
        );
    }
    ensure!(matches!(cluster.ensure().await, Err(ClusterError::NotLeading)));
    let after = scenario.admin.get(&format!("{NODE}/w-0")).await?;
    ensure!(before["metadata"]["resourceVersion"] == after["metadata"]["resourceVersion"]);
    Ok(())
}

async fn looks_once(scenario: &Scenario) -> Result<()> {
    let cluster = KubeCluster::look(scenario.admin.0.clone()).await?;
    let input = observed(&cluster).await?;
    ensure!(input.observed.machines.len() == 3 && input.observed.current == scenario.next);
    let outcome = cluster.act(&Action::Cordon { machine: name("w-0") }).await;
    ensure!(matches!(outcome, Err(ClusterError::NotLeading)), "{outcome:?}");
    Ok(())
}
