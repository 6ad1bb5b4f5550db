//! What kprov's operator may do, machine by machine what its kprov-node may do with kprov's own objects, and nothing else.

use kprov_types::api::{GROUP, RELEASE_KEYS_CONFIG_MAP};
use kprov_types::names::MachineName;
use serde_json::{Value, json};

use super::crds::MACHINES;
use super::endpoints::{API_SERVICE, API_SERVICE_NAMESPACE};
use super::operator::OPERATOR;
use super::rbac::{API_VERSION, cluster_role, cluster_role_binding, group, role_binding_in, service_account, user};
use super::{NAMESPACE, SETTINGS_CONFIG_MAP};

const CORE: &str = "";
const ADMISSION: &str = "admissionregistration.k8s.io";
const APPS: &str = "apps";
const EVENTS: &str = "events.k8s.io";
const EXTENSIONS: &str = "apiextensions.k8s.io";
const LEASES: &str = "coordination.k8s.io";
const POLICY: &str = "policy";
const RBAC: &str = "rbac.authorization.k8s.io";
const SLICES: &str = "discovery.k8s.io";

const READ: &[&str] = &["get", "list", "watch"];
const CHANGE: &[&str] = &["get", "list", "watch", "patch"];
/// Server-side apply of an object that may be missing.
const APPLY: &[&str] = &["create", "patch"];
const ANY: &[&str] = &[];

/// Group, resources, verbs, names.
type Rule<'a> = (&'a str, &'a [&'a str], &'a [&'a str], &'a [&'a str]);

/// In the whole cluster.
const CLUSTER: &[Rule<'_>] = &[
    // What people ask for is read; of the answer, the operator writes the status.
    (GROUP, &["versionupdates", "releases"], READ, ANY),
    (GROUP, &["versionupdates/status", "releases/status"], &["patch"], ANY),
    // Orders to machines. It writes no status of theirs, but lets each machine write its own by a role that it makes, and nobody
    // can give away a right that he hasn't got.
    (GROUP, &["machines"], &["get", "list", "watch", "create", "patch"], ANY),
    (GROUP, &["machines/status"], MACHINE_STATUS, ANY),
    (RBAC, &["clusterroles", "clusterrolebindings"], APPLY, ANY),
    // Cordon and uncordon.
    (CORE, &["nodes"], CHANGE, ANY),
    // Drain, within disruption budgets. Deleting is for budgets that people have told it to override, and for API servers that
    // nothing else replaces.
    (CORE, &["pods"], &["get", "list", "watch", "delete"], ANY),
    (CORE, &["pods/eviction"], &["create"], ANY),
    // Its own kinds, brought up to date after each hop.
    (
        EXTENSIONS,
        &["customresourcedefinitions"],
        &["get", "patch"],
        DEFINITIONS,
    ),
    // Preflight: whether anybody answers for a webhook.
    (CORE, &["namespaces"], &["get"], &[NAMESPACE]),
    (CORE, &["endpoints"], &["get"], ANY),
];

/// Group and resources of which preflight lists the objects: webhooks that may stand in the way, and what may have been written
/// through versions of an API that go.
const LISTED: &[(&str, &[&str])] = &[
    (
        ADMISSION,
        &["validatingwebhookconfigurations", "mutatingwebhookconfigurations"],
    ),
    (
        ADMISSION,
        &["validatingadmissionpolicies", "validatingadmissionpolicybindings"],
    ),
    ("apiregistration.k8s.io", &["apiservices"]),
    ("autoscaling", &["horizontalpodautoscalers"]),
    ("batch", &["cronjobs"]),
    (EXTENSIONS, &["customresourcedefinitions"]),
    (
        "flowcontrol.apiserver.k8s.io",
        &["flowschemas", "prioritylevelconfigurations"],
    ),
    ("networking.k8s.io", &["ingresses", "ingressclasses", "servicecidrs"]),
    ("node.k8s.io", &["runtimeclasses"]),
    (POLICY, &["poddisruptionbudgets", "podsecuritypolicies"]),
    (RBAC, &["clusterroles", "clusterrolebindings", "roles", "rolebindings"]),
    ("scheduling.k8s.io", &["priorityclasses"]),
    (
        "storage.k8s.io",
        &["csidrivers", "storageclasses", "volumeattributesclasses"],
    ),
];

const DEFINITIONS: &[&str] = &["versionupdates.kprov.io", "machines.kprov.io", "releases.kprov.io"];
/// What a machine's kprov-node does with its own status.
const MACHINE_STATUS: &[&str] = &["get", "update", "patch"];

/// Paths that are no objects: which deprecated APIs are in use, and which version an API server is.
const PATHS: &[&str] = &["/metrics", "/version"];

/// In kube-system.
const SYSTEM: &[Rule<'_>] = &[
    // Rolls the control plane and the add-ons, and puts earlier templates back.
    (APPS, &["daemonsets", "deployments"], CHANGE, ANY),
    (APPS, &["replicasets", "controllerrevisions"], &["list"], ANY),
    // The last words of what failed.
    (CORE, &["pods/log"], &["get"], ANY),
    (CORE, &["configmaps"], CHANGE, &[SETTINGS_CONFIG_MAP]),
    (CORE, &["configmaps"], READ, &[RELEASE_KEYS_CONFIG_MAP]),
    (LEASES, &["leases"], &["get", "update"], &[OPERATOR]),
    // Should somebody have deleted it. A name can't be asked for where there is no object yet.
    (LEASES, &["leases"], &["create"], ANY),
];

/// In the namespace of Service `kubernetes`, where Events of objects without a namespace are too.
const DEFAULT: &[Rule<'_>] = &[
    (CORE, &["endpoints"], APPLY, &[API_SERVICE]),
    (SLICES, &["endpointslices"], APPLY, &[API_SERVICE]),
    (EVENTS, &["events"], APPLY, ANY),
];

fn rules(table: &[Rule<'_>]) -> Vec<Value> {
    table
        .iter()
        .map(|(group, resources, verbs, names)| {
            let mut rule = json!({ "apiGroups": [group], "resources": resources, "verbs": verbs });
            if !names.is_empty() {
                rule["resourceNames"] = json!(names);
            }
            rule
        })
        .collect()
}

/// The operator's rights, and what all machines may read.
pub(super) fn objects() -> Vec<Value> {
    let name = "kprov:operator";
    let subjects = [service_account(OPERATOR)];
    let mut cluster = rules(CLUSTER);
    for (group, resources) in LISTED {
        cluster.extend(rules(&[(group, resources, &["list"], ANY)]));
    }
    cluster.push(json!({ "nonResourceURLs": PATHS, "verbs": ["get"] }));
    let mut objects = vec![
        cluster_role(name, &json!(cluster)),
        cluster_role_binding(name, name, &subjects),
    ];
    for (namespace, table) in [(NAMESPACE, SYSTEM), (API_SERVICE_NAMESPACE, DEFAULT)] {
        objects.push(json!({
            "apiVersion": API_VERSION,
            "kind": "Role",
            "metadata": { "name": name, "namespace": namespace },
            "rules": rules(table),
        }));
        objects.push(role_binding_in(namespace, name, ("Role", name), &subjects));
    }
    // A machine takes a release by what its signed manifest says.
    let name = "kprov:machines";
    objects.extend([
        cluster_role(name, &json!(rules(&[(GROUP, &["releases"], READ, &[])]))),
        cluster_role_binding(name, name, &[group("system:nodes")]),
    ]);
    objects
}

/// What lets a machine's kprov-node, as user `system:node:<machine>`, read its own Machine and write its status, and no other's:
/// a ClusterRole and its binding.
pub fn machine_access(machine: &MachineName) -> [Value; 2] {
    let name = format!("kprov:machine:{machine}");
    let rule = |resource: &str, verbs: &[&str]| json!({ "apiGroups": [GROUP], "resources": [resource], "verbs": verbs, "resourceNames": [machine] });
    [
        cluster_role(
            &name,
            &json!([
                rule(MACHINES.plural, READ),
                rule(&format!("{}/status", MACHINES.plural), MACHINE_STATUS),
            ]),
        ),
        cluster_role_binding(&name, &name, &[user(&format!("system:node:{machine}"))]),
    ]
}
