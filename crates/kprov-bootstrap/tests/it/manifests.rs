//! What is rendered for each Kubernetes version.

use std::collections::BTreeSet;

use kprov_bootstrap::manifests::{
    EtcdClusterState, EtcdStart, JoinGrant, Manifest, ManifestError, Policy, SELF_HOSTED, SETTINGS_CONFIG_MAP,
    SETTINGS_KEY, etcd_pod, machine_access, release_keys,
};
use kprov_bootstrap::{config_files, control_plane_files, self_hosted, standby_pods, workload};
use kprov_types::Minor;
use kprov_types::node::{ControlPlaneSettings, JoinToken};
use kprov_types::ports::FIRST_REVISION;
use kprov_types::release::ImageComponent;
use serde_json::{Value, json};
use similar::TextDiff;

use crate::common::{bundle, machine, member, now, release, settings};

fn grant() -> JoinGrant {
    JoinGrant {
        token: JoinToken {
            id: "abcdef".into(),
            secret: "0123456789abcdef".into(),
        },
        expires: now(),
    }
}

fn etcd_start(members: u8) -> EtcdStart {
    EtcdStart {
        initial_cluster: (0..members).map(member).collect(),
        state: EtcdClusterState::New,
        data_dir: "/var/lib/etcd".into(),
    }
}

fn find<'a>(manifests: &'a [Manifest], kind: &str, name: &str) -> Option<&'a Manifest> {
    manifests
        .iter()
        .find(|m| m.object["kind"] == kind && m.object["metadata"]["name"] == name)
}

fn command(pod_spec: &Value) -> Vec<String> {
    serde_json::from_value(pod_spec["containers"][0]["command"].clone()).unwrap()
}

/// Everything that is rendered for a version, one document after the other.
fn rendered(version: &str, etcd: &str) -> String {
    let settings = settings(version, etcd, 3);
    let document = |title: String, value: &Value| format!("--- {title}\n{}", flat(value));
    let objects = self_hosted(&settings, FIRST_REVISION, Some(&grant())).unwrap();
    let mut text: String = objects
        .iter()
        .map(|m| document(format!("{:?}", m.policy), &m.object))
        .collect();
    let mut pods = standby_pods(&settings, &member(0)).unwrap();
    pods.push(etcd_pod(&settings, &member(0), &etcd_start(3)).unwrap());
    text.extend(pods.iter().map(|(name, pod)| document(name.clone(), pod)));
    text.replace(version, "VERSION")
}

/// Short enough to read: a line for each scalar, a flag a line.
fn flat(value: &Value) -> String {
    fn lines(value: &Value, path: &str, out: &mut Vec<String>) {
        match value {
            Value::String(_) if path.ends_with(SETTINGS_KEY) => out.push(format!("{path} (the settings)")),
            Value::Object(_) if path.ends_with("openAPIV3Schema") => out.push(format!("{path} (of the type)")),
            Value::Object(fields) if !fields.is_empty() => {
                for (name, field) in fields {
                    lines(field, &format!("{path}.{name}"), out);
                }
            }
            Value::Array(items) if items.iter().any(Value::is_object) => {
                for (i, item) in items.iter().enumerate() {
                    lines(item, &format!("{path}[{i}]"), out);
                }
            }
            Value::Array(items) if path.ends_with("command") => {
                out.extend(items.iter().map(|item| format!("{path} {item}")));
            }
            other => out.push(format!("{path} {other}")),
        }
    }
    let mut out = Vec::new();
    lines(value, "", &mut out);
    out.join("\n") + "\n"
}

#[test]
fn snapshots() {
    let newest = rendered("1.36.3", "3.6.4");
    insta::assert_snapshot!("1.36", newest);
    // The others as what differs from the next newer one.
    let middle = rendered("1.29.9", "3.5.30");
    insta::assert_snapshot!("1.36-to-1.29", difference(&newest, &middle));
    insta::assert_snapshot!("1.29-to-1.20", difference(&middle, &rendered("1.20.2", "3.4.23")));
}

fn difference(old: &str, new: &str) -> String {
    TextDiff::from_lines(old, new)
        .unified_diff()
        .context_radius(0)
        .to_string()
}

#[test]
fn each_minor_has_the_flags_it_knows() {
    for minor in 20..=37 {
        let settings = settings(&format!("1.{minor}.0"), "3.5.30", 1);
        let objects = self_hosted(&settings, 7, None).unwrap();
        let spec = |kind, name| find(&objects, kind, name).unwrap().object["spec"].clone();
        let daemon_set = spec("DaemonSet", "kube-apiserver");
        let flags = command(&daemon_set["template"]["spec"]);
        let has = |flag: &str| flags.iter().any(|f| f.starts_with(flag));
        assert!(
            has("--bind-address=127.64.0.7") && has("--advertise-address=$(HOST_IP)"),
            "{minor}"
        );
        assert_eq!(has("--insecure-port=0"), minor < 24, "{minor}");
        assert_eq!(has("--shutdown-send-retry-after"), minor >= 22, "{minor}");
        assert_eq!(has("--shutdown-watch-termination-grace-period"), minor >= 27, "{minor}");
        // Exactly one of the two limits anonymous requests, and exactly one of the two limits pods.
        assert_eq!(
            (has("--authentication-config"), has("--anonymous-auth")),
            (minor >= 32, minor < 32),
            "{minor}"
        );
        let policies = flags.contains(&"--enable-admission-plugins=NodeRestriction,PodSecurityPolicy".to_owned());
        assert_eq!(
            (has("--admission-control-config-file"), policies),
            (minor >= 23, minor < 23),
            "{minor}"
        );
        assert_eq!(
            find(&objects, "ClusterRole", "kprov:health").is_some(),
            minor < 32,
            "{minor}"
        );
        assert_eq!(
            objects.iter().any(|m| m.object["kind"] == "PodSecurityPolicy"),
            minor < 23,
            "{minor}"
        );
        let strategy = if minor < 22 { "OnDelete" } else { "RollingUpdate" };
        assert_eq!(daemon_set["updateStrategy"]["type"], strategy, "{minor}");
        for name in ["kube-controller-manager", "kube-scheduler"] {
            let flags = command(&spec("Deployment", name)["template"]["spec"]);
            assert_eq!(flags.contains(&"--port=0".to_owned()), minor < 24, "{minor} {name}");
        }
        let budget = &find(&objects, "PodDisruptionBudget", "kube-scheduler").unwrap().object;
        assert_eq!(
            budget["apiVersion"],
            if minor < 21 { "policy/v1beta1" } else { "policy/v1" }
        );
    }
}

#[test]
fn standby_and_self_hosted_never_want_the_same_address() {
    let settings = settings("1.36.3", "3.5.30", 1);
    let addresses = |specs: Vec<Value>| -> BTreeSet<String> {
        let bind = |spec: &Value| command(spec).into_iter().find(|f| f.starts_with("--bind-address="));
        specs.iter().filter_map(bind).collect()
    };
    let standby = addresses(
        standby_pods(&settings, &member(0))
            .unwrap()
            .iter()
            .map(|(_, p)| p["spec"].clone())
            .collect(),
    );
    let objects = self_hosted(&settings, FIRST_REVISION, None).unwrap();
    let own = addresses(
        objects
            .iter()
            .map(|m| m.object["spec"]["template"]["spec"].clone())
            .filter(|s| !s.is_null())
            .filter(|s| {
                ["kube-proxy", "coredns", "kprov-operator"]
                    .iter()
                    .all(|n| s["containers"][0]["name"] != *n)
            })
            .collect(),
    );
    assert_eq!((standby.len(), own.len()), (1, 1));
    assert!(standby.is_disjoint(&own));
}

#[test]
fn probes_ask_the_revision_itself() {
    let objects = self_hosted(&settings("1.36.3", "3.5.30", 3), 258, None).unwrap();
    for (kind, name) in [
        ("DaemonSet", "kube-apiserver"),
        ("Deployment", "kube-controller-manager"),
        ("Deployment", "kube-scheduler"),
    ] {
        let container = &find(&objects, kind, name).unwrap().object["spec"]["template"]["spec"]["containers"][0];
        for probe in ["startupProbe", "readinessProbe", "livenessProbe"] {
            assert_eq!(container[probe]["httpGet"]["host"], "127.64.1.2", "{name} {probe}");
        }
        assert_eq!(container.get("ports"), None, "{name}");
    }
}

#[test]
fn selectors_match_own_pods_and_no_static_pod() {
    let settings = settings("1.29.9", "3.5.30", 3);
    let mut pods = standby_pods(&settings, &member(0)).unwrap();
    pods.push(etcd_pod(&settings, &member(0), &etcd_start(3)).unwrap());
    let matches = |selector: &Value, labels: &Value| {
        selector
            .as_object()
            .unwrap()
            .iter()
            .all(|(name, value)| labels.get(name) == Some(value))
    };
    for manifest in self_hosted(&settings, FIRST_REVISION, None).unwrap() {
        let object = manifest.object;
        let selector = &object["spec"]["selector"]["matchLabels"];
        if selector.is_null() {
            continue;
        }
        assert!(
            pods.iter()
                .all(|(_, pod)| !matches(selector, &pod["metadata"]["labels"])),
            "{object}"
        );
        let template = &object["spec"]["template"];
        assert!(
            template.is_null() || matches(selector, &template["metadata"]["labels"]),
            "{object}"
        );
    }
}

#[test]
fn what_upgrades_own_is_only_created() {
    for manifest in self_hosted(&settings("1.29.9", "3.5.30", 3), FIRST_REVISION, Some(&grant())).unwrap() {
        let versioned = manifest.object["spec"]["template"].is_object() || manifest.object["kind"] == "ConfigMap";
        let kept = [
            "Service",
            "Endpoints",
            "EndpointSlice",
            "Lease",
            "CustomResourceDefinition",
        ];
        let kept = kept.iter().any(|kind| manifest.object["kind"] == *kind);
        assert_eq!(
            manifest.policy == Policy::Create,
            versioned || kept,
            "{}",
            manifest.object
        );
    }
}

#[test]
fn deployments_spread_over_the_machines_and_roll_beside_themselves() {
    for members in [1, 3, 5] {
        let objects = self_hosted(&settings("1.36.3", "3.5.30", members), 9, None).unwrap();
        let spec = &find(&objects, "Deployment", "kube-scheduler").unwrap().object["spec"];
        assert_eq!(spec["replicas"], members);
        assert_eq!(
            spec["strategy"]["rollingUpdate"],
            json!({ "maxSurge": 1, "maxUnavailable": 0 })
        );
        let apart = &spec["template"]["spec"]["affinity"]["podAntiAffinity"];
        let selector = &apart["requiredDuringSchedulingIgnoredDuringExecution"][0]["labelSelector"]["matchLabels"];
        // The next revision may share the machine.
        assert_eq!(selector["kprov.io/revision"], "9");
        assert_eq!(selector["kprov.io/plane"], SELF_HOSTED);
    }
}

#[test]
fn the_join_token_expires() {
    let objects = self_hosted(&settings("1.36.3", "3.5.30", 1), FIRST_REVISION, Some(&grant())).unwrap();
    let secret = &find(&objects, "Secret", "bootstrap-token-abcdef").unwrap().object;
    assert_eq!(secret["data"]["expiration"], "MjAyNi0wNS0wMVQxMjowMDowMFo=");
    assert!(
        self_hosted(&settings("1.36.3", "3.5.30", 1), FIRST_REVISION, None)
            .unwrap()
            .iter()
            .all(|m| m.object["kind"] != "Secret")
    );
}

#[test]
fn the_settings_can_be_read_back() {
    let settings = settings("1.36.3", "3.5.30", 3);
    let objects = self_hosted(&settings, FIRST_REVISION, Some(&grant())).unwrap();
    let stored = &find(&objects, "ConfigMap", SETTINGS_CONFIG_MAP).unwrap().object["data"][SETTINGS_KEY];
    let read: ControlPlaneSettings = serde_json::from_str(stored.as_str().unwrap()).unwrap();
    assert_eq!(read, settings);
}

#[test]
fn refuses_what_it_cannot_render() {
    let mut lacking = settings("1.36.3", "3.5.30", 1);
    lacking.release.images.remove(&ImageComponent::KubeScheduler);
    let missing = Err(ManifestError::MissingImage(ImageComponent::KubeScheduler));
    assert_eq!(standby_pods(&lacking, &member(0)), missing);
    assert!(matches!(
        standby_pods(&settings("1.19.16", "3.4.23", 1), &member(0)),
        Err(ManifestError::Unsupported(_))
    ));
    let mut without_dns = settings("1.36.3", "3.5.30", 1);
    without_dns.release.images.remove(&ImageComponent::Coredns);
    let objects = self_hosted(&without_dns, FIRST_REVISION, None).unwrap();
    assert!(objects.iter().all(|m| !m.object.to_string().contains("coredns\"")));
}

/// The DaemonSets and Deployments of a release, by name.
fn workloads(settings: &ControlPlaneSettings, revision: u16, running: Minor) -> Vec<Value> {
    ImageComponent::ALL
        .into_iter()
        .filter_map(|component| workload(settings, component, revision, running).unwrap())
        .collect()
}

#[test]
fn workloads_are_those_of_the_self_hosted_objects() {
    for version in ["1.20.2", "1.36.3"] {
        let settings = settings(version, "3.5.30", 3);
        let objects = self_hosted(&settings, 7, None).unwrap();
        let workloads = workloads(&settings, 7, settings.kubernetes.minor());
        let applied: Vec<&Value> = objects
            .iter()
            .map(|m| &m.object)
            .filter(|o| o["spec"]["template"].is_object())
            .collect();
        assert_eq!((applied.len(), workloads.len()), (6, 6));
        assert!(workloads.iter().all(|w| applied.contains(&w)), "{version}");
    }
}

#[test]
fn pods_tell_their_release() {
    let settings = settings("1.36.3", "3.5.30", 1);
    let wanted = json!({ "kprov.io/release": settings.release_digest, "kprov.io/kubernetes": "1.36.3" });
    for object in workloads(&settings, 2, Minor::v1(36)) {
        assert_eq!(
            object["spec"]["template"]["metadata"]["annotations"], wanted,
            "{object}"
        );
    }
    for (name, pod) in standby_pods(&settings, &member(0)).unwrap() {
        assert_eq!(pod["metadata"]["annotations"], wanted, "{name}");
    }
    // etcd is not started again for a release that has the same.
    let of = |settings| etcd_pod(settings, &member(0), &etcd_start(1)).unwrap();
    let mut next = settings.with_release(release("1.37.0", "3.5.30"), settings.release_digest.clone());
    next.release.images = settings.release.images.clone();
    assert_eq!(of(&settings), of(&next));
}

#[test]
fn another_release_is_rendered_for_the_same_cluster() {
    let from = settings("1.34.9", "3.5.30", 3);
    let to = from.with_release(release("1.36.3", "3.6.4"), from.release_digest.clone());
    assert_eq!(to, settings("1.36.3", "3.6.4", 3));
}

#[test]
fn api_servers_are_replaced_by_who_knows_how() {
    let of = |to: &str, running| {
        let settings = settings(to, "3.5.30", 1);
        let set = workload(&settings, ImageComponent::KubeApiserver, 3, Minor::v1(running));
        set.unwrap().unwrap()["spec"]["updateStrategy"]["type"].clone()
    };
    // API servers of 1.21 read the object of 1.22's while they are replaced.
    assert_eq!(of("1.22.17", 21), "OnDelete");
    assert_eq!(of("1.23.17", 22), "RollingUpdate");
    assert_eq!(of("1.21.14", 22), "RollingUpdate");
}

#[test]
fn no_object_runs_etcd_or_what_a_release_lacks() {
    let mut settings = settings("1.36.3", "3.5.30", 1);
    settings.release.images.remove(&ImageComponent::KprovOperator);
    settings.release.images.remove(&ImageComponent::Coredns);
    for component in [
        ImageComponent::Etcd,
        ImageComponent::Pause,
        ImageComponent::Coredns,
        ImageComponent::KprovOperator,
    ] {
        assert_eq!(
            workload(&settings, component, 2, Minor::v1(36)),
            Ok(None),
            "{component:?}"
        );
    }
    settings.release.images.remove(&ImageComponent::KubeProxy);
    assert_eq!(
        workload(&settings, ImageComponent::KubeProxy, 2, Minor::v1(36)),
        Err(ManifestError::MissingImage(ImageComponent::KubeProxy))
    );
    settings.release = release("1.36.3", "3.5.30");
    settings.release.images.remove(&ImageComponent::KprovOperator);
    let objects = self_hosted(&settings, 2, None).unwrap();
    assert!(objects.iter().all(|m| !m.object.to_string().contains("kprov-operator")));
    // Then nobody but `up` keeps where Service `kubernetes` leads.
    let endpoints = find(&objects, "Endpoints", "kubernetes").unwrap();
    assert_eq!(endpoints.policy, Policy::Enforce);
}

#[test]
fn api_servers_of_each_minor_read_files_of_their_own() {
    for minor in 20..=37 {
        let settings = settings(&format!("1.{minor}.0"), "3.5.30", 1);
        let object = workload(&settings, ImageComponent::KubeApiserver, 2, Minor::v1(minor)).unwrap();
        let flags = command(&object.unwrap()["spec"]["template"]["spec"]);
        let files = config_files(Minor::v1(minor)).unwrap();
        for file in &files {
            assert!(
                file.path.starts_with(&format!("/etc/kubernetes/kprov/1.{minor}/")),
                "{}",
                file.path
            );
            assert!(
                flags.iter().any(|f| f.ends_with(&format!("={}", file.path))),
                "{}",
                file.path
            );
        }
        let read = flags
            .iter()
            .filter(|f| f.contains(&format!("/kprov/1.{minor}/")))
            .count();
        assert_eq!(read, files.len(), "{minor}");
        let all = control_plane_files(&bundle(settings, now()), &member(0), &|_| None, now()).unwrap();
        assert!(files.iter().all(|f| all.contains(f)), "{minor}");
    }
}

#[test]
fn service_kubernetes_leads_to_every_control_plane_machine() {
    let objects = self_hosted(&settings("1.20.2", "3.4.23", 3), FIRST_REVISION, None).unwrap();
    let addresses: Vec<String> = (0..3).map(|i| member(i).address.to_string()).collect();
    let endpoints = &find(&objects, "Endpoints", "kubernetes").unwrap().object;
    let listed: Vec<&str> = endpoints["subsets"][0]["addresses"]
        .as_array()
        .unwrap()
        .iter()
        .map(|a| a["ip"].as_str().unwrap())
        .collect();
    assert_eq!(listed, addresses);
    let slice = &find(&objects, "EndpointSlice", "kubernetes").unwrap().object;
    assert_eq!(slice["apiVersion"], "discovery.k8s.io/v1beta1");
    assert_eq!(slice["addressType"], "IPv4");
    assert_eq!(slice["endpoints"][2]["addresses"], json!([addresses[2]]));
}

#[test]
fn nothing_of_kprovs_own_may_do_everything() {
    let mut objects: Vec<Value> = self_hosted(&settings("1.36.3", "3.5.30", 3), FIRST_REVISION, None)
        .unwrap()
        .into_iter()
        .map(|m| m.object)
        .collect();
    objects.extend(machine_access(&machine("demo-worker-0")));
    let rules: Vec<&Value> = objects
        .iter()
        .filter(|o| ["Role", "ClusterRole"].iter().any(|kind| o["kind"] == *kind))
        .flat_map(|o| o["rules"].as_array().unwrap())
        .collect();
    assert!(rules.len() > 20);
    assert!(rules.iter().all(|r| !r.to_string().contains('*')), "{rules:?}");
    let verbs = ["escalate", "bind", "impersonate"];
    assert!(rules.iter().all(|r| {
        r["verbs"]
            .as_array()
            .unwrap()
            .iter()
            .all(|verb| verbs.iter().all(|v| verb != v))
    }));
    // No secret is read, and nothing of a machine but its own object.
    assert!(rules.iter().all(|r| !r.to_string().contains("secrets")));
    let [role, binding] = machine_access(&machine("demo-worker-0"));
    assert!(
        role["rules"]
            .as_array()
            .unwrap()
            .iter()
            .all(|r| r["resourceNames"] == json!(["demo-worker-0"]))
    );
    assert_eq!(binding["subjects"][0]["name"], "system:node:demo-worker-0");
    assert_eq!(binding["roleRef"]["name"], role["metadata"]["name"]);
}

#[test]
fn release_keys_are_named_by_their_bytes() {
    let of = |keys: &[&str]| {
        release_keys(keys.iter().copied()).object["data"]
            .as_object()
            .unwrap()
            .clone()
    };
    assert_eq!(of(&["a", "b"]), of(&["b", "a", "a"]));
    assert_eq!(of(&["a", "b"]).len(), 2);
    assert!(of(&["a"]).values().eq(["a"]));
}
