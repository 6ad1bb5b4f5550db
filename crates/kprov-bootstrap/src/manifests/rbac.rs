//! Who may do what. No user is in `system:masters`; everything a part may do is bound here.

use kprov_types::node::ControlPlaneSettings;
use serde_json::{Value, json};

use super::{JOIN_GROUP, NAMESPACE};
use crate::pki::{ADMIN_GROUP, KUBELET_CLIENT, NODE_CLIENT_GROUP};
use crate::versions::Features;

const API_GROUP: &str = "rbac.authorization.k8s.io";
pub(super) const API_VERSION: &str = "rbac.authorization.k8s.io/v1";

pub(super) fn user(name: &str) -> Value {
    json!({ "kind": "User", "apiGroup": API_GROUP, "name": name })
}

pub(super) fn group(name: &str) -> Value {
    json!({ "kind": "Group", "apiGroup": API_GROUP, "name": name })
}

pub(super) fn service_account(name: &str) -> Value {
    json!({ "kind": "ServiceAccount", "namespace": NAMESPACE, "name": name })
}

pub(super) fn cluster_role(name: &str, rules: &Value) -> Value {
    json!({ "apiVersion": API_VERSION, "kind": "ClusterRole", "metadata": { "name": name }, "rules": rules })
}

pub(super) fn cluster_role_binding(name: &str, role: &str, subjects: &[Value]) -> Value {
    json!({
        "apiVersion": API_VERSION,
        "kind": "ClusterRoleBinding",
        "metadata": { "name": name },
        "roleRef": { "apiGroup": API_GROUP, "kind": "ClusterRole", "name": role },
        "subjects": subjects,
    })
}

/// A binding in kube-system. `role` is kind and name.
pub(super) fn role_binding(name: &str, role: (&str, &str), subjects: &[Value]) -> Value {
    role_binding_in(NAMESPACE, name, role, subjects)
}

pub(super) fn role_binding_in(namespace: &str, name: &str, role: (&str, &str), subjects: &[Value]) -> Value {
    json!({
        "apiVersion": API_VERSION,
        "kind": "RoleBinding",
        "metadata": { "name": name, "namespace": namespace },
        "roleRef": { "apiGroup": API_GROUP, "kind": role.0, "name": role.1 },
        "subjects": subjects,
    })
}

/// Everything but what the add-ons bring along.
pub(super) fn objects(settings: &ControlPlaneSettings, features: &Features) -> Vec<Value> {
    let nodes = [group("system:nodes")];
    let joining = [group(JOIN_GROUP)];
    let mut objects = vec![
        cluster_role_binding("kprov:cluster-admins", "cluster-admin", &[group(ADMIN_GROUP)]),
        // Logs, exec, port-forward.
        cluster_role_binding(
            "kprov:kubelet-api-admin",
            "system:kubelet-api-admin",
            &[user(KUBELET_CLIENT)],
        ),
        // Machines that join may ask for a client certificate, and get it; nodes renew theirs.
        cluster_role_binding("kprov:node-bootstrapper", "system:node-bootstrapper", &joining),
        cluster_role_binding(
            "kprov:approve-join",
            "system:certificates.k8s.io:certificatesigningrequests:nodeclient",
            &joining,
        ),
        cluster_role_binding(
            "kprov:approve-renewal",
            "system:certificates.k8s.io:certificatesigningrequests:selfnodeclient",
            &nodes,
        ),
        // The pod network's routes come from all nodes' addresses and ranges. Since 1.32 the node authorizer alone lets a
        // node read no other (KEP-4601).
        cluster_role(
            "kprov:node-network",
            &json!([{ "apiGroups": [""], "resources": ["nodes"], "verbs": ["get", "list", "watch"] }]),
        ),
        cluster_role_binding("kprov:node-network", "kprov:node-network", &nodes),
    ];
    objects.extend(control_plane_nodes(settings));
    if features.authentication_config.is_none() {
        objects.extend(anonymous_health());
    }
    objects
}

/// What kprov-node does on control-plane machines, no more.
fn control_plane_nodes(settings: &ControlPlaneSettings) -> [Value; 4] {
    let name = "kprov:control-plane-nodes";
    let subjects = [group(NODE_CLIENT_GROUP)];
    let machines: Vec<&str> = settings.members.iter().map(|m| m.name.as_str()).collect();
    let certificates = "certificates.k8s.io";
    [
        cluster_role(
            name,
            &json!([
                // Approves the serving certificates of kubelets.
                { "apiGroups": [certificates], "resources": ["certificatesigningrequests"],
                    "verbs": ["get", "list", "watch"] },
                { "apiGroups": [certificates], "resources": ["certificatesigningrequests/approval"],
                    "verbs": ["update", "patch"] },
                { "apiGroups": [certificates], "resources": ["signers"], "verbs": ["approve"],
                    "resourceNames": ["kubernetes.io/kubelet-serving"] },
                { "apiGroups": [""], "resources": ["nodes"], "verbs": ["get", "list", "watch"] },
                // Labels its own node.
                { "apiGroups": [""], "resources": ["nodes"], "verbs": ["patch"], "resourceNames": machines },
            ]),
        ),
        cluster_role_binding(name, name, &subjects),
        json!({
            "apiVersion": API_VERSION,
            "kind": "Role",
            "metadata": { "name": name, "namespace": NAMESPACE },
            "rules": [
                { "apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"] },
                // Sees whether anyone leads, and takes the lead from an instance that it has stopped.
                { "apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["get", "update", "patch"],
                    "resourceNames": ["kube-controller-manager", "kube-scheduler"] },
            ],
        }),
        role_binding(name, ("Role", name), &subjects),
    ]
}

/// Leaves anonymous requests the health endpoints, where authentication can't see to it: takes `/version` from them, which
/// Kubernetes' own binding gives, and keeps API servers from putting it back.
fn anonymous_health() -> [Value; 3] {
    let mut public_info = cluster_role_binding(
        "system:public-info-viewer",
        "system:public-info-viewer",
        &[group("system:authenticated")],
    );
    public_info["metadata"]["annotations"] = json!({ "rbac.authorization.kubernetes.io/autoupdate": "false" });
    [
        cluster_role(
            "kprov:health",
            &json!([{ "nonResourceURLs": ["/healthz", "/livez", "/readyz"], "verbs": ["get"] }]),
        ),
        cluster_role_binding("kprov:health", "kprov:health", &[group("system:unauthenticated")]),
        public_info,
    ]
}
