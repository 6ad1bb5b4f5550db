//! What runs the control plane now, and the settings that kprov renders it from.

use k8s_openapi::api::apps::v1::{DaemonSet, Deployment};
use k8s_openapi::api::core::v1::{ConfigMap, PodTemplateSpec};
use kprov_bootstrap::manifests::{NAMESPACE, SETTINGS_CONFIG_MAP, SETTINGS_KEY};
use kprov_types::api::KUBERNETES_ANNOTATION;
use kprov_types::node::ControlPlaneSettings;
use kube::Client;
use kube::api::{Api, ListParams};

use super::super::ProgramSeen;
use super::{GatherError, pages};

/// The programs whose flags are looked at.
const PROGRAMS: [&str; 4] = [
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kube-proxy",
];

/// The programs of kprov's DaemonSets and Deployments.
pub(super) async fn programs(client: &Client) -> Result<Vec<ProgramSeen>, GatherError> {
    let kprov = ListParams::default().labels("app.kubernetes.io/managed-by=kprov");
    let mut programs = Vec::new();
    let daemon_sets = Api::<DaemonSet>::namespaced(client.clone(), NAMESPACE);
    pages(&daemon_sets, kprov.clone(), |object| {
        programs.extend(object.spec.iter().flat_map(|spec| of_template(&spec.template)));
        true
    })
    .await?;
    let deployments = Api::<Deployment>::namespaced(client.clone(), NAMESPACE);
    pages(&deployments, kprov, |object| {
        programs.extend(object.spec.iter().flat_map(|spec| of_template(&spec.template)));
        true
    })
    .await?;
    Ok(programs)
}

fn of_template(template: &PodTemplateSpec) -> Vec<ProgramSeen> {
    let annotations = template.metadata.as_ref().and_then(|m| m.annotations.as_ref());
    let version = annotations.and_then(|a| a.get(KUBERNETES_ANNOTATION)?.parse().ok());
    let containers = template.spec.iter().flat_map(|spec| &spec.containers);
    containers
        .filter(|container| PROGRAMS.contains(&container.name.as_str()))
        .map(|container| {
            let words = container
                .command
                .iter()
                .flatten()
                .chain(container.args.iter().flatten());
            ProgramSeen {
                name: container.name.clone(),
                version: version.clone(),
                flags: words.filter(|word| word.starts_with('-')).cloned().collect(),
            }
        })
        .collect()
}

/// The cluster's settings.
pub(super) async fn settings(client: &Client) -> Result<Box<ControlPlaneSettings>, GatherError> {
    let object = Api::<ConfigMap>::namespaced(client.clone(), NAMESPACE)
        .get(SETTINGS_CONFIG_MAP)
        .await?;
    let text = object.data.as_ref().and_then(|data| data.get(SETTINGS_KEY));
    let text =
        text.ok_or_else(|| GatherError::Odd(format!("ConfigMap `{SETTINGS_CONFIG_MAP}` has no `{SETTINGS_KEY}`")))?;
    serde_json::from_str(text).map_err(|error| {
        GatherError::Odd(format!(
            "`{SETTINGS_KEY}` of ConfigMap `{SETTINGS_CONFIG_MAP}` can't be read: {error}"
        ))
    })
}
