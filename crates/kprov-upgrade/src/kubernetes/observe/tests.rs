use kprov_types::Digest;
use kprov_types::api::{
    ApiServerStatus, EtcdStatus, MachineFailure, MachineSpec, RunOrder, StagedStatus, StandbyOrder, VersionUpdateStatus,
};
use serde_json::{Value, json};

use super::super::cache::{DAEMON_SETS, DEPLOYMENTS, Fill as _, MACHINES, NODES, PODS, SETTINGS};
use super::super::facts;
use super::*;

fn release(version: &str) -> ReleaseRef {
    ReleaseRef {
        version: version.parse().unwrap(),
        digest: Digest::from_bytes([u8::try_from(version.len()).unwrap(); 32]),
    }
}

fn at(second: u8) -> Timestamp {
    format!("2026-05-01T12:00:{second:02}Z").parse().unwrap()
}

fn machine(name: &str) -> MachineName {
    MachineName::new(name).unwrap()
}

fn annotations(version: &str) -> Value {
    let release = release(version);
    json!({ "kprov.io/release": release.digest, "kprov.io/kubernetes": release.version })
}

fn node(name: &str, change: fn(&mut Value)) -> Value {
    let mut node = json!({
        "metadata": { "name": name, "uid": name, "creationTimestamp": at(0), "labels": {} },
        "spec": {},
        "status": {
            "conditions": [{ "type": "Ready", "status": "True", "lastTransitionTime": at(7) }],
            "nodeInfo": { "kubeletVersion": "v1.35.6" },
            "addresses": [{ "type": "Hostname", "address": name }, { "type": "InternalIP", "address": "10.0.0.5" }],
        },
    });
    change(&mut node);
    node
}

fn control_plane(node: &mut Value) {
    node["metadata"]["labels"]["node-role.kubernetes.io/control-plane"] = json!("");
}

fn api_server(machine: &str, revision: u16, version: &str) -> Value {
    json!({
        "metadata": { "name": format!("kube-apiserver-{machine}-{revision}"), "creationTimestamp": at(1),
            "annotations": annotations(version),
            "labels": { "app.kubernetes.io/name": "kube-apiserver", "kprov.io/plane": "self-hosted",
                "kprov.io/revision": revision.to_string() } },
        "spec": { "nodeName": machine },
        "status": { "phase": "Running", "conditions": [{ "type": "Ready", "status": "True", "lastTransitionTime": at(3) }] },
    })
}

fn workload(name: &str, change: fn(&mut Value)) -> Value {
    let mut object = json!({
        "metadata": { "name": name, "generation": 4, "annotations": { "kprov.io/rolled-at": at(2) } },
        "spec": { "replicas": 2, "template": {
            "metadata": { "labels": { "kprov.io/revision": "9" }, "annotations": annotations("1.35.6") },
            "spec": { "containers": [{ "image": "kprov.local/x:v1" }] } } },
        "status": { "observedGeneration": 4 },
    });
    change(&mut object);
    object
}

fn update(change: fn(&mut Value)) -> UpdateFacts {
    let mut object = json!({
        "metadata": { "name": "cluster", "uid": "u", "generation": 3 },
        "spec": { "desiredVersion": "1.36.3" },
        "status": { "currentVersion": "1.35.6", "currentRelease": release("1.35.6").digest },
    });
    change(&mut object);
    facts::update(&serde_json::from_value(object).unwrap())
}

fn seen(facts: &Facts) -> Input {
    input(facts, &update(|_| ()), Asked::default(), at(30)).unwrap()
}

fn machine_of(spec: &MachineSpec, status: &MachineStatus) -> Value {
    json!({ "metadata": { "name": "a" }, "spec": spec, "status": status })
}

fn status(api_servers: Vec<ApiServerStatus>) -> MachineStatus {
    MachineStatus {
        api_servers,
        ..MachineStatus::default()
    }
}

fn told(revision: u16, ready: bool, version: &str) -> ApiServerStatus {
    ApiServerStatus {
        revision,
        ready,
        version: version.into(),
        since: None,
    }
}

#[test]
fn an_api_server_is_ready_by_its_own_word_only() {
    let cases = [
        ("its machine tells nothing", None, false),
        ("nothing of this revision", Some(vec![told(8, true, "v1.35.6")]), false),
        ("not ready", Some(vec![told(9, false, "v1.35.6")]), false),
        ("another's process", Some(vec![told(9, true, "v1.34.9")]), false),
        ("no answer yet", Some(vec![told(9, true, "")]), false),
        ("ready", Some(vec![told(8, false, ""), told(9, true, "v1.35.6")]), true),
        ("a build of it", Some(vec![told(9, true, "v1.35.6+5feab0")]), true),
    ];
    for (case, api_servers, ready) in cases {
        let mut facts = Facts::default();
        NODES.fill(&mut facts, [node("a", control_plane)]);
        DAEMON_SETS.fill(&mut facts, [workload("kube-apiserver", |_| ())]);
        PODS.fill(&mut facts, [api_server("a", 9, "1.35.6")]);
        if let Some(api_servers) = api_servers {
            let told = machine_of(&MachineSpec::default(), &status(api_servers));
            MACHINES.fill(&mut facts, [told]);
        }
        let seen = seen(&facts);
        let instance = &seen.observed.workloads[&Workload::ApiServer].instances[0];
        assert_eq!(instance.ready, ready, "{case}");
        assert_eq!((instance.created, instance.ready_since), (at(1), at(3)));
        assert_eq!(instance.machine, Some(machine("a")));
    }
}

#[test]
fn a_pod_that_its_kubelet_calls_unready_is() {
    let mut pod = api_server("a", 9, "1.35.6");
    pod["status"]["conditions"][0]["status"] = json!("False");
    let mut facts = Facts::default();
    NODES.fill(&mut facts, [node("a", control_plane)]);
    DAEMON_SETS.fill(&mut facts, [workload("kube-apiserver", |_| ())]);
    PODS.fill(&mut facts, [pod]);
    let told = status(vec![told(9, true, "v1.35.6")]);
    MACHINES.fill(&mut facts, [machine_of(&MachineSpec::default(), &told)]);
    assert!(!seen(&facts).observed.workloads[&Workload::ApiServer].instances[0].ready);
}

#[test]
fn trouble_is_told_in_words() {
    let trouble = |status: Value| {
        let mut pod = api_server("a", 9, "1.35.6");
        pod["status"]["containerStatuses"] = json!([status]);
        facts::pod(&serde_json::from_value(pod).unwrap()).trouble
    };
    let crash = |restarts: u32| {
        json!({ "restartCount": restarts, "state": { "waiting": { "reason": "CrashLoopBackOff" } },
            "lastState": { "terminated": { "exitCode": 1, "reason": "Error", "message": "Error: unknown flag: --x\n" } } })
    };
    assert_eq!(trouble(crash(2)), None, "it may still come up");
    assert_eq!(
        trouble(crash(3)).unwrap(),
        "it ends again and again, 3 times so far, last with exit code 1: Error: unknown flag: --x"
    );
    let killed = json!({ "restartCount": 4, "state": { "terminated": { "exitCode": 137, "reason": "OOMKilled" } } });
    assert!(trouble(killed).unwrap().ends_with("exit code 137 (OOMKilled)"));
    for reason in ["ImagePullBackOff", "ErrImagePull"] {
        let status = json!({ "state": { "waiting": { "reason": reason, "message": "not found" } } });
        assert_eq!(trouble(status).unwrap(), "its image can't be pulled: not found");
    }
    let config =
        json!({ "state": { "waiting": { "reason": "CreateContainerConfigError", "message": "no such map" } } });
    assert_eq!(trouble(config).unwrap(), "its container can't be started: no such map");
    assert_eq!(
        trouble(json!({ "state": { "waiting": { "reason": "ContainerCreating" } } })),
        None
    );
    assert_eq!(
        trouble(json!({ "restartCount": 9, "state": { "running": {} } })),
        None,
        "it's up again"
    );
}

#[test]
fn workloads_are_read_from_their_objects() {
    let mut facts = Facts::default();
    DAEMON_SETS.fill(
        &mut facts,
        [
            workload("kube-apiserver", |object| {
                object["spec"]["replicas"] = Value::Null;
                object["spec"]["updateStrategy"]["type"] = json!("OnDelete");
                object["status"]["desiredNumberScheduled"] = json!(3);
                object["metadata"]["annotations"]["kprov.io/replaced"] = json!(json!(release("1.34.10")).to_string());
            }),
            workload("kube-proxy", |object| object["status"]["observedGeneration"] = json!(3)),
        ],
    );
    DEPLOYMENTS.fill(&mut facts, [workload("kube-scheduler", |_| ())]);
    let workloads = seen(&facts).observed.workloads;
    assert_eq!(workloads.len(), 3);
    let servers = &workloads[&Workload::ApiServer];
    assert_eq!((servers.wanted, servers.automatic, servers.settled), (3, false, true));
    assert_eq!((servers.revision, servers.rolled), (9, Some(at(2))));
    assert_eq!(servers.template, release("1.35.6"));
    assert_eq!(servers.previous, Some(release("1.34.10")));
    assert!(!workloads[&Workload::Proxy].settled);
    let scheduler = &workloads[&Workload::Scheduler];
    assert_eq!((scheduler.wanted, scheduler.automatic), (2, true));
    assert_eq!(scheduler.image, "kprov.local/x:v1");
}

#[test]
fn static_pods_are_no_instances() {
    let mut mirror = api_server("a", 1, "1.35.6");
    mirror["metadata"]["labels"]["kprov.io/plane"] = json!("standby");
    mirror["metadata"]["annotations"]["kubernetes.io/config.mirror"] = json!("x");
    let mut facts = Facts::default();
    DAEMON_SETS.fill(&mut facts, [workload("kube-apiserver", |_| ())]);
    PODS.fill(&mut facts, [mirror]);
    assert!(
        seen(&facts).observed.workloads[&Workload::ApiServer]
            .instances
            .is_empty()
    );
}

/// A kubelet that starts anew may refuse pods for good, and they stay listed.
#[test]
fn pods_that_have_ended_are_no_instances() {
    let mut facts = Facts::default();
    DAEMON_SETS.fill(&mut facts, [workload("kube-apiserver", |_| ())]);
    let phases = ["Running", "Failed", "Succeeded"].map(|phase| {
        let mut pod = api_server("a", 1, "1.35.6");
        pod["metadata"]["name"] = json!(phase);
        pod["status"]["phase"] = json!(phase);
        pod
    });
    PODS.fill(&mut facts, phases);
    let seen = seen(&facts);
    let instances = &seen.observed.workloads[&Workload::ApiServer].instances;
    assert_eq!(
        instances.iter().map(|i| i.name.as_str()).collect::<Vec<_>>(),
        ["Running"]
    );
}

#[test]
fn machines_are_their_nodes_and_what_they_tell() {
    let run = RunOrder {
        release: release("1.36.3"),
        since: at(10),
        timeout_seconds: 300,
    };
    let spec = MachineSpec {
        order: 5,
        stage: vec![release("1.36.3")],
        run: Some(run),
        standby: Some(StandbyOrder {
            release: release("1.35.6"),
            serve: true,
        }),
        ..MachineSpec::default()
    };
    let status = MachineStatus {
        observed_order: 4,
        running: Some(release("1.35.6")),
        etcd: Some(EtcdStatus {
            image: "etcd:v3.5.30".into(),
            healthy: true,
            ..EtcdStatus::default()
        }),
        ..MachineStatus::default()
    };
    let mut facts = Facts::default();
    let nodes = [
        node("a", |node| {
            control_plane(node);
            node["spec"]["unschedulable"] = json!(true);
            node["metadata"]["annotations"] = json!({ "kprov.io/cordoned-at": at(20) });
            node["metadata"]["labels"]["kprov.io/pool"] = json!("big");
        }),
        node("b", |node| node["status"]["conditions"][0]["status"] = json!("Unknown")),
        // Uncordoned by a person, though our mark is still there; and its kubelet has told nothing yet.
        node("c", |node| {
            node["metadata"]["annotations"] = json!({ "kprov.io/cordoned-at": at(20) });
            node["status"]["nodeInfo"] = json!({});
        }),
        node("not.ours", |_| ()),
    ];
    NODES.fill(&mut facts, nodes);
    MACHINES.fill(&mut facts, [machine_of(&spec, &status)]);
    let machines = seen(&facts).observed.machines;
    assert_eq!(machines.len(), 3);
    let a = &machines[&machine("a")];
    assert_eq!((a.role, a.pool.as_str(), a.ready), (Role::ControlPlane, "big", true));
    assert_eq!(
        (a.cordoned, a.cordoned_by_us, a.ready_since),
        (true, Some(at(20)), at(7))
    );
    assert_eq!(a.ordered, Some((release("1.36.3"), at(10))));
    assert!(!a.order_seen);
    assert_eq!(a.stage_ordered.len(), 1);
    let etcd = a.etcd.as_ref().unwrap();
    assert!(etcd.healthy && etcd.ordered.is_none());
    let standby = a.standby.as_ref().unwrap();
    assert!(standby.serve_ordered && !standby.api_ready && standby.release.is_none());
    let b = &machines[&machine("b")];
    assert!(!b.ready && b.etcd.is_none() && b.running.is_none() && b.order_seen);
    assert_eq!(b.pool, "default");
    let c = &machines[&machine("c")];
    assert!(!c.cordoned && c.cordoned_by_us.is_none() && !c.ready);
}

#[test]
fn bad_bytes_count_for_the_try_that_they_are_of() {
    let staged = |order: u64, stage: &[&str]| {
        let spec = MachineSpec {
            order,
            stage: stage.iter().map(|version| release(version)).collect(),
            ..MachineSpec::default()
        };
        let told = |ready: bool, bad: bool, version: &str| StagedStatus {
            release: release(version),
            ready,
            message: "why".into(),
            bad,
        };
        let status = MachineStatus {
            observed_order: 5,
            staged: vec![told(true, false, "1.35.6"), told(false, true, "1.36.333")],
            ..MachineStatus::default()
        };
        let mut facts = Facts::default();
        NODES.fill(&mut facts, [node("a", |_| ())]);
        MACHINES.fill(&mut facts, [machine_of(&spec, &status)]);
        let staged = seen(&facts).observed.machines[&machine("a")].staged.clone();
        assert_eq!(staged[&release("1.35.6").digest], Staged::Ready);
        staged.get(&release("1.36.333").digest).cloned()
    };
    assert_eq!(staged(5, &["1.36.333"]), Some(Staged::Bad("why".into())));
    assert_eq!(
        staged(6, &["1.36.333"]),
        Some(Staged::Fetching(String::new())),
        "it was told again"
    );
    assert_eq!(staged(6, &[]), None, "nobody asks for it any more");
}

#[test]
fn a_control_plane_machine_that_tells_nothing_has_no_healthy_etcd() {
    let mut facts = Facts::default();
    NODES.fill(&mut facts, [node("a", control_plane)]);
    let etcd = seen(&facts).observed.machines[&machine("a")].etcd.clone().unwrap();
    assert!(!etcd.healthy && !etcd.message.is_empty());
}

#[test]
fn a_failure_counts_for_the_order_that_stands() {
    let stands = |spec: &MachineSpec, version: &str, order: u64, second: u8| {
        let failure = MachineFailure {
            release: release(version),
            order,
            message: String::new(),
            log: Vec::new(),
            time: at(second),
        };
        let status = MachineStatus {
            failure: Some(failure),
            ..MachineStatus::default()
        };
        went_back(spec, &status).is_some()
    };
    let run = |to: &str| MachineSpec {
        order: 7,
        run: Some(RunOrder {
            release: release(to),
            since: at(10),
            timeout_seconds: 300,
        }),
        ..MachineSpec::default()
    };
    assert!(stands(&run("1.36.3"), "1.36.3", 7, 15));
    assert!(
        stands(&run("1.36.3"), "1.36.3", 5, 15),
        "an order about something else came since"
    );
    assert!(stands(&run("1.36.3"), "1.36.3", 7, 9), "the machine's clock is behind");
    assert!(!stands(&run("1.36.3"), "1.36.3", 5, 9), "an earlier try");
    assert!(!stands(&run("1.35.6666"), "1.36.3", 7, 15), "it was told to go back");
    let etcd = MachineSpec {
        order: 7,
        etcd: Some(release("1.36.3")),
        ..MachineSpec::default()
    };
    assert!(stands(&etcd, "1.36.3", 7, 15));
    assert!(!stands(&etcd, "1.36.3", 6, 15));
}

#[test]
fn the_first_time_the_settings_say_what_runs() {
    let fresh = update(|object| object["status"] = Value::Null);
    let mut facts = Facts::default();
    let none = input(&facts, &fresh, Asked::default(), at(0)).unwrap_err();
    assert!(none.to_string().contains("`kprov-config`"), "{none}");
    let config =
        |settings: &str| json!({ "metadata": { "name": "kprov-config" }, "data": { "settings.json": settings } });
    SETTINGS.fill(&mut facts, [config("{")]);
    assert!(input(&facts, &fresh, Asked::default(), at(0)).is_err());
    let settings = json!({
        "cluster": "demo", "kubernetes": "1.34.9", "releaseDigest": release("1.34.9").digest,
        "release": { "apiVersion": "kprov.io/v1alpha1", "kind": "Release", "kubernetes": "1.34.9", "images": {}, "hostFiles": [] },
        "endpoint": { "host": "10.0.0.1", "port": 6443 },
        "network": { "pods": "10.244.0.0/16", "services": "10.96.0.0/16", "dnsDomain": "cluster.local" },
        "members": [],
    });
    SETTINGS.fill(&mut facts, [config(&settings.to_string())]);
    let current = |update: &UpdateFacts| input(&facts, update, Asked::default(), at(0)).unwrap().observed.current;
    assert_eq!(current(&fresh), release("1.34.9"));
    assert_eq!(current(&update(|_| ())), release("1.35.6"), "later the status does");
}

#[test]
fn a_spec_that_cant_be_read_holds_everything() {
    let bad = update(|object| object["spec"]["policy"] = json!({ "maxUnavailable": "many" }));
    let (wanted, finding) = wanted(&bad);
    assert!(wanted.paused);
    assert_eq!(wanted.desired, "1.36.3");
    let finding = finding.unwrap();
    assert!(finding.blocks && finding.message.contains("`\"many\"`"), "{finding:?}");
    let seen = input(&Facts::default(), &bad, Asked::default(), at(0)).unwrap();
    assert_eq!(seen.observed.findings, Some(vec![finding]));
}

#[test]
fn what_is_in_use_is_not_forgotten() {
    let mut facts = Facts::default();
    DAEMON_SETS.fill(&mut facts, [workload("kube-apiserver", |_| ())]);
    PODS.fill(&mut facts, [api_server("a", 9, "1.34.10")]);
    let failure = |reverted: bool| -> UpdateFacts {
        let mut update = update(|_| ());
        update.status = VersionUpdateStatus {
            failure: Some(serde_json::from_value(json!({
                "release": release("1.37.1111"), "attempt": 0, "component": "kubelet", "instance": "a", "message": "",
                "time": at(0), "reverted": reverted,
            }))
            .unwrap()),
            ..update.status
        };
        update
    };
    let used = in_use(&facts, &failure(false));
    assert_eq!(used, ["1.35.6", "1.34.10", "1.37.1111"].map(release).into());
    assert_eq!(in_use(&facts, &failure(true)).len(), 2);
}
