//! kprov's operator: two pods on control-plane machines, one of which leads.

use std::collections::BTreeMap;

use kprov_types::api::RELEASE_KEYS_CONFIG_MAP;
use kprov_types::ports;
use kprov_types::release::ImageComponent;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::addons::{config_map, service_account_object};
use super::operator_rights;
use super::{CONTROL_PLANE_LABEL, Context, Manifest, NAME_LABEL, NAMESPACE, component_labels, create, enforce};

/// The name of the operator's Deployment, ServiceAccount and Lease, all in [`NAMESPACE`].
pub const OPERATOR: &str = ImageComponent::KprovOperator.as_str();
/// Where the operator answers for its health and metrics.
const PORT: u16 = 8080;
/// The user `nobody`.
const NOBODY: u32 = 65_534;

/// The ConfigMap with the public keys, each a PEM, that Releases must be signed by. People may change it later.
pub fn release_keys<'a>(keys: impl IntoIterator<Item = &'a str>) -> Manifest {
    // Named by its own bytes: the same keys always give the same object.
    let name = |pem: &str| format!("{}.pem", &hex::encode(Sha256::digest(pem))[..16]);
    let entries: BTreeMap<String, &str> = keys.into_iter().map(|pem| (name(pem), pem)).collect();
    create(config_map(RELEASE_KEYS_CONFIG_MAP, &json!(entries)))
}

fn selector() -> Value {
    json!({ NAME_LABEL: OPERATOR })
}

impl Context<'_> {
    pub(super) fn has_operator(&self) -> bool {
        self.settings.release.image(ImageComponent::KprovOperator).is_some()
    }

    /// Its kinds, its rights and its pods; nothing where the release has no operator.
    pub(super) fn operator(&self) -> Vec<Manifest> {
        let Some(deployment) = self.operator_deployment() else {
            return Vec::new();
        };
        let lease = json!({
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": { "name": OPERATOR, "namespace": NAMESPACE },
        });
        let mut manifests = super::crds::of(&self.features);
        manifests.extend(operator_rights::objects().into_iter().map(enforce));
        manifests.extend([
            enforce(service_account_object(OPERATOR)),
            create(lease),
            create(deployment),
            enforce(self.disruption_budget(OPERATOR, &selector())),
        ]);
        manifests
    }

    pub(super) fn operator_deployment(&self) -> Option<Value> {
        let image = self.settings.release.image(ImageComponent::KprovOperator)?.pinned();
        let labels = component_labels(ImageComponent::KprovOperator);
        let field = |path: &str| json!({ "fieldRef": { "fieldPath": path } });
        let probe = |path: &str, failures: u32| {
            json!({ "httpGet": { "path": path, "port": PORT }, "periodSeconds": 5, "timeoutSeconds": 5,
                "failureThreshold": failures })
        };
        let spec = json!({
            "serviceAccountName": OPERATOR,
            "enableServiceLinks": false,
            "priorityClassName": "system-cluster-critical",
            // It looks up no name of the cluster's.
            "dnsPolicy": "Default",
            "terminationGracePeriodSeconds": 15,
            "nodeSelector": { CONTROL_PLANE_LABEL: "" },
            "tolerations": [{ "operator": "Exists" }],
            "affinity": { "podAntiAffinity": { "preferredDuringSchedulingIgnoredDuringExecution": [{
                "weight": 100,
                "podAffinityTerm": {
                    "topologyKey": "kubernetes.io/hostname",
                    "labelSelector": { "matchLabels": selector() },
                },
            }] } },
            "securityContext": {
                "runAsNonRoot": true, "runAsUser": NOBODY, "runAsGroup": NOBODY,
                "seccompProfile": { "type": "RuntimeDefault" },
            },
            "containers": [{
                "name": OPERATOR,
                "image": image,
                "imagePullPolicy": "IfNotPresent",
                "command": [format!("/usr/local/bin/{OPERATOR}"), format!("--listen=0.0.0.0:{PORT}")],
                "env": [
                    { "name": "POD_NAME", "valueFrom": field("metadata.name") },
                    // The front of the machine it's on: it works before the Service does, and while kube-proxy is replaced.
                    { "name": "KUBERNETES_SERVICE_HOST", "valueFrom": field("status.hostIP") },
                    { "name": "KUBERNETES_SERVICE_PORT", "value": ports::API.to_string() },
                ],
                "ports": [{ "name": "metrics", "containerPort": PORT, "protocol": "TCP" }],
                "resources": { "requests": { "cpu": "50m", "memory": "64Mi" } },
                "securityContext": {
                    "allowPrivilegeEscalation": false,
                    "capabilities": { "drop": ["ALL"] },
                    "readOnlyRootFilesystem": true,
                },
                "livenessProbe": probe("/healthz", 6),
                "readinessProbe": probe("/readyz", 3),
            }],
        });
        Some(json!({
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": { "name": OPERATOR, "namespace": NAMESPACE, "labels": labels },
            "spec": {
                "replicas": 2,
                "selector": { "matchLabels": selector() },
                "strategy": { "type": "RollingUpdate", "rollingUpdate": { "maxSurge": 1, "maxUnavailable": 0 } },
                "template": { "metadata": self.pod_metadata(&labels), "spec": spec },
            },
        }))
    }
}
