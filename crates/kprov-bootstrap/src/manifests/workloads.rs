//! The self-hosted control plane: what runs its pods.
//!
//! Every change of a pod template takes a new revision, since two processes of one revision would want the same address.
//! So a roll can always start the new pod beside the old one, on the same machine.

use kprov_types::release::ImageComponent;
use serde_json::{Value, json};

use super::{
    CONTROL_PLANE_LABEL, Context, Manifest, ManifestError, NAME_LABEL, NAMESPACE, PLANE_LABEL, Pod, REVISION_LABEL,
};
use super::{SELF_HOSTED, component_labels, create, enforce, labels};

impl Context<'_> {
    /// What runs a component's pods; `None` for one that no object of the API runs, and for one that a release may lack and
    /// this one does. `surge`: whether the API servers that run know `maxSurge` of a DaemonSet.
    pub(super) fn workload(
        &self,
        component: ImageComponent,
        revision: u16,
        surge: bool,
    ) -> Result<Option<Value>, ManifestError> {
        Ok(match component {
            ImageComponent::KubeApiserver => {
                let mut pod = self.apiserver_pod(revision, "$(HOST_IP)")?;
                pod.spec["containers"][0]["env"] =
                    json!([{ "name": "HOST_IP", "valueFrom": { "fieldRef": { "fieldPath": "status.hostIP" } } }]);
                Some(self.daemon_set(&pod, revision, surge))
            }
            ImageComponent::KubeControllerManager => {
                Some(self.deployment(&self.controller_manager_pod(revision)?, revision))
            }
            ImageComponent::KubeScheduler => Some(self.deployment(&self.scheduler_pod(revision)?, revision)),
            ImageComponent::KubeProxy => Some(self.kube_proxy_daemon_set()?),
            ImageComponent::Coredns => self.coredns_deployment(),
            ImageComponent::KprovOperator => self.operator_deployment(),
            ImageComponent::Etcd | ImageComponent::Pause => None,
        })
    }

    /// API servers as a DaemonSet, controller-manager and scheduler as Deployments with one pod a control-plane machine.
    pub(super) fn control_plane(&self, revision: u16) -> Result<Vec<Manifest>, ManifestError> {
        let surge = self.features.daemon_set_surge;
        let apiserver = self.workload(ImageComponent::KubeApiserver, revision, surge)?;
        let mut manifests: Vec<Manifest> = apiserver.into_iter().map(create).collect();
        for component in [ImageComponent::KubeControllerManager, ImageComponent::KubeScheduler] {
            manifests.extend(self.workload(component, revision, surge)?.map(create));
            manifests.push(enforce(
                self.disruption_budget(component.as_str(), &selector(component)),
            ));
        }
        Ok(manifests)
    }

    fn daemon_set(&self, pod: &Pod, revision: u16, surge: bool) -> Value {
        // Without surge the only way to replace an API server is to stop it first; then nobody but an upgrade that has put
        // the standby in its place may do so.
        let strategy = if surge {
            json!({ "type": "RollingUpdate", "rollingUpdate": { "maxSurge": 1, "maxUnavailable": 0 } })
        } else {
            json!({ "type": "OnDelete" })
        };
        json!({
            "apiVersion": "apps/v1",
            "kind": "DaemonSet",
            "metadata": metadata(pod.component),
            "spec": {
                "selector": { "matchLabels": selector(pod.component) },
                "updateStrategy": strategy,
                "template": self.template(pod, revision, &[]),
            },
        })
    }

    fn deployment(&self, pod: &Pod, revision: u16) -> Value {
        let own = labels(pod.component, SELF_HOSTED, revision);
        // Spread pods of one revision, and let two revisions share a machine while rolling.
        let spread = json!({ "podAntiAffinity": { "requiredDuringSchedulingIgnoredDuringExecution": [{
            "topologyKey": "kubernetes.io/hostname",
            "labelSelector": { "matchLabels": {
                NAME_LABEL: own[NAME_LABEL],
                PLANE_LABEL: own[PLANE_LABEL],
                REVISION_LABEL: own[REVISION_LABEL],
            } },
        }] } });
        json!({
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": metadata(pod.component),
            "spec": {
                "replicas": self.settings.members.len(),
                "selector": { "matchLabels": selector(pod.component) },
                // The controller-manager rolls itself: its old pod must not go before the new one works.
                "strategy": { "type": "RollingUpdate", "rollingUpdate": { "maxSurge": 1, "maxUnavailable": 0 } },
                "template": self.template(pod, revision, &[("affinity", spread)]),
            },
        })
    }

    fn template(&self, pod: &Pod, revision: u16, extra: &[(&str, Value)]) -> Value {
        let mut spec = pod.spec.clone();
        spec["nodeSelector"] = json!({ CONTROL_PLANE_LABEL: "" });
        for (field, value) in extra {
            spec[*field] = value.clone();
        }
        json!({ "metadata": self.pod_metadata(&labels(pod.component, SELF_HOSTED, revision)), "spec": spec })
    }

    /// At most one pod at a time may be evicted.
    pub(super) fn disruption_budget(&self, name: &str, selector: &Value) -> Value {
        json!({
            "apiVersion": self.features.pod_disruption_budget,
            "kind": "PodDisruptionBudget",
            "metadata": { "name": name, "namespace": NAMESPACE },
            "spec": { "maxUnavailable": 1, "selector": { "matchLabels": selector } },
        })
    }
}

fn metadata(component: ImageComponent) -> Value {
    json!({ "name": component.as_str(), "namespace": NAMESPACE, "labels": component_labels(component) })
}

/// Matches no static pod: controllers adopt what matches.
fn selector(component: ImageComponent) -> Value {
    json!({ NAME_LABEL: component.as_str(), PLANE_LABEL: SELF_HOSTED })
}
