//! Admission that stands in the way of an upgrade's own writes.

use std::collections::BTreeMap;

use k8s_openapi::api::admissionregistration::v1::{
    MutatingWebhookConfiguration, RuleWithOperations, ValidatingWebhookConfiguration, WebhookClientConfig,
};
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment};
use k8s_openapi::api::core::v1::{Endpoints, Namespace, Node};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kprov_bootstrap::manifests::NAMESPACE;
use kprov_types::MachineName;
use kube::api::{Api, ListParams, Patch, PatchParams};
use kube::core::{Selector, SelectorExt as _, Status};
use kube::{Client, ResourceExt as _};
use serde_json::json;

use super::super::{RefusedWrite, WebhookKind, WebhookSeen};
use super::{GatherError, pages};

/// What an upgrade writes, or has written: group, resource, whether it's an update (else a creation), and its namespace.
const WRITES: &[(&str, &str, &str, Option<&str>)] = &[
    ("apps", "daemonsets", "UPDATE", Some(NAMESPACE)),
    ("apps", "deployments", "UPDATE", Some(NAMESPACE)),
    ("", "pods", "CREATE", Some(NAMESPACE)),
    ("", "configmaps", "UPDATE", Some(NAMESPACE)),
    ("coordination.k8s.io", "leases", "UPDATE", Some(NAMESPACE)),
    ("", "nodes", "UPDATE", None),
    ("kprov.io", "machines", "UPDATE", None),
    ("kprov.io", "versionupdates", "UPDATE", None),
];

/// A webhook of either kind.
struct Webhook {
    kind: WebhookKind,
    configuration: String,
    name: String,
    fails: bool,
    rules: Vec<RuleWithOperations>,
    namespaces: Option<LabelSelector>,
    objects: Option<LabelSelector>,
    client: WebhookClientConfig,
}

/// Webhooks that refuse what they can't be asked about, and intercept what an upgrade writes. One that is asked by a URL is left
/// out: nobody here can tell whether it answers.
pub(super) async fn webhooks(client: &Client) -> Result<Vec<WebhookSeen>, GatherError> {
    let mut all = Vec::new();
    pages(
        &Api::<ValidatingWebhookConfiguration>::all(client.clone()),
        ListParams::default(),
        |object| {
            let configuration = object.name_any();
            all.extend(object.webhooks.into_iter().flatten().map(|webhook| Webhook {
                kind: WebhookKind::Validating,
                configuration: configuration.clone(),
                name: webhook.name,
                fails: webhook.failure_policy.is_none_or(|policy| policy == "Fail"),
                rules: webhook.rules.unwrap_or_default(),
                namespaces: webhook.namespace_selector,
                objects: webhook.object_selector,
                client: webhook.client_config,
            }));
            true
        },
    )
    .await?;
    pages(
        &Api::<MutatingWebhookConfiguration>::all(client.clone()),
        ListParams::default(),
        |object| {
            let configuration = object.name_any();
            all.extend(object.webhooks.into_iter().flatten().map(|webhook| Webhook {
                kind: WebhookKind::Mutating,
                configuration: configuration.clone(),
                name: webhook.name,
                fails: webhook.failure_policy.is_none_or(|policy| policy == "Fail"),
                rules: webhook.rules.unwrap_or_default(),
                namespaces: webhook.namespace_selector,
                objects: webhook.object_selector,
                client: webhook.client_config,
            }));
            true
        },
    )
    .await?;
    let namespace = Api::<Namespace>::all(client.clone())
        .get_metadata(NAMESPACE)
        .await?
        .labels()
        .clone();
    let mut seen = Vec::new();
    for webhook in all.into_iter().filter(|webhook| webhook.fails) {
        let Some(service) = &webhook.client.service else {
            continue;
        };
        let intercepts = intercepts(&webhook, &namespace);
        if !intercepts.is_empty() {
            seen.push(WebhookSeen {
                kind: webhook.kind,
                backends: backends(client, &service.namespace, &service.name).await?,
                service: format!("{}/{}", service.namespace, service.name),
                configuration: webhook.configuration,
                name: webhook.name,
                intercepts,
            });
        }
    }
    Ok(seen)
}

/// Which of an upgrade's writes a webhook is asked about.
fn intercepts(webhook: &Webhook, namespace: &BTreeMap<String, String>) -> Vec<String> {
    let selects = |selector: &Option<LabelSelector>, labels: &BTreeMap<String, String>| {
        // What can't be read as a selector is taken to match: better told once too often.
        let selector = selector
            .clone()
            .map(Selector::try_from)
            .and_then(Result::ok)
            .unwrap_or_default();
        selector.matches(labels)
    };
    let ours = BTreeMap::from([("app.kubernetes.io/managed-by".to_owned(), "kprov".to_owned())]);
    if !selects(&webhook.objects, &ours) {
        return Vec::new();
    }
    let asked = WRITES.iter().filter(|(group, resource, operation, place)| {
        // The namespace's labels decide on namespaced objects only.
        (place.is_none() || selects(&webhook.namespaces, namespace))
            && webhook
                .rules
                .iter()
                .any(|rule| covers(rule, group, resource, operation, place.is_some()))
    });
    asked
        .map(|(_, resource, _, place)| match place {
            Some(namespace) => format!("{resource} in {namespace}"),
            None => (*resource).to_owned(),
        })
        .collect()
}

fn covers(rule: &RuleWithOperations, group: &str, resource: &str, operation: &str, namespaced: bool) -> bool {
    let among = |list: &Option<Vec<String>>, wanted: &[&str]| {
        list.iter().flatten().any(|entry| wanted.contains(&entry.as_str()))
    };
    let scope = match rule.scope.as_deref() {
        Some("Namespaced") => namespaced,
        Some("Cluster") => !namespaced,
        _ => true,
    };
    scope
        && among(&rule.operations, &["*", operation])
        && among(&rule.api_groups, &["*", group])
        && among(&rule.resources, &["*", "*/*", resource, &format!("{resource}/*")])
}

/// Ready backends of a Service, counted by the machine they are on.
///
/// From its Endpoints, which every version has; EndpointSlices became v1 in 1.21.
async fn backends(client: &Client, namespace: &str, service: &str) -> Result<BTreeMap<String, usize>, kube::Error> {
    let endpoints = Api::<Endpoints>::namespaced(client.clone(), namespace)
        .get_opt(service)
        .await?;
    let mut backends = BTreeMap::new();
    let subsets = endpoints
        .into_iter()
        .flat_map(|endpoints| endpoints.subsets.into_iter().flatten());
    for address in subsets.flat_map(|subset| subset.addresses.into_iter().flatten()) {
        *backends.entry(address.node_name.unwrap_or_default()).or_default() += 1;
    }
    Ok(backends)
}

/// Tries changes such as an upgrade makes, without making them, and tells those that admission refuses.
pub(super) async fn refused(client: &Client, node: Option<&MachineName>) -> Result<Vec<RefusedWrite>, GatherError> {
    let daemon_sets = Api::<DaemonSet>::namespaced(client.clone(), NAMESPACE);
    let deployments = Api::<Deployment>::namespaced(client.clone(), NAMESPACE);
    let mut refused = Vec::new();
    for name in ["kube-apiserver", "kube-proxy"] {
        refused.extend(try_write(&daemon_sets, &format!("DaemonSet {NAMESPACE}/{name}"), name).await?);
    }
    for name in ["kube-controller-manager", "kube-scheduler"] {
        refused.extend(try_write(&deployments, &format!("Deployment {NAMESPACE}/{name}"), name).await?);
    }
    if let Some(node) = node {
        let nodes = Api::<Node>::all(client.clone());
        refused.extend(try_write(&nodes, &format!("Node {node}"), node.as_str()).await?);
    }
    Ok(refused)
}

async fn try_write<K>(api: &Api<K>, object: &str, name: &str) -> Result<Option<RefusedWrite>, GatherError>
where
    K: Clone + std::fmt::Debug + serde::de::DeserializeOwned,
{
    let change = json!({ "metadata": { "annotations": { "kprov.io/preflight": "dry-run" } } });
    let params = PatchParams {
        dry_run: true,
        ..PatchParams::default()
    };
    match api.patch(name, &params, &Patch::Merge(change)).await {
        Ok(_) => Ok(None),
        Err(kube::Error::Api(status)) => match verdict(&status) {
            Verdict::Refused => Ok(Some(RefusedWrite {
                object: object.to_owned(),
                message: status.message.clone(),
            })),
            Verdict::Nothing => Ok(None),
            Verdict::Broke => Err(kube::Error::Api(status).into()),
        },
        Err(error) => Err(error.into()),
    }
}

/// What a refusal of a dry run says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Admission would refuse the write itself.
    Refused,
    /// Nothing: there is no such object, or a webhook takes no part in dry runs.
    Nothing,
    /// The try itself failed.
    Broke,
}

/// Tells admission's refusals from all others by what the API server says, since they have no code of their own.
pub(super) fn verdict(status: &Status) -> Verdict {
    let says = |text: &str| status.message.contains(text);
    if status.code == 404 || says("does not support dry run") {
        Verdict::Nothing
    } else if says("admission webhook") || says("failed calling webhook") || says("ValidatingAdmissionPolicy") {
        Verdict::Refused
    } else {
        Verdict::Broke
    }
}
