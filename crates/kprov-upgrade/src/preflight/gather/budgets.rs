//! PodDisruptionBudgets that would hold drains up.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kprov_bootstrap::manifests::{NAME_LABEL, NAMESPACE, PLANE_LABEL};
use kprov_bootstrap::versions::Features;
use kprov_types::{MachineName, Minor};
use kube::api::{Api, ListParams};
use kube::core::{ApiResource, DynamicObject, Expression, Selector};
use kube::{Client, ResourceExt as _};
use serde_json::Value;

use super::super::{BudgetOverlap, BudgetSeen, Budgets, PodSeen};
use super::{GatherError, MOST_EXAMPLES, pages};
use crate::model::Workload;

/// How many pairs of budgets are tried for pods in common.
const MOST_PAIRS: usize = 200;
/// The kubelet's mark on pods that mirror static pods.
const MIRROR_ANNOTATION: &str = "kubernetes.io/config.mirror";

/// A budget as far as it is needed.
struct Budget {
    namespace: String,
    name: String,
    /// `None`: it is for no pod.
    selector: Option<Selector>,
    status: Value,
}

/// Budgets that allow no disruption now, kprov's own left out, and pods that two budgets are for.
pub(super) async fn budgets(client: &Client, minor: Minor) -> Result<Budgets, GatherError> {
    let version = Features::of(minor)
        .map_err(|error| GatherError::Odd(error.to_string()))?
        .pod_disruption_budget;
    let kind = ApiResource {
        group: "policy".into(),
        version: version.trim_start_matches("policy/").into(),
        api_version: version.into(),
        kind: "PodDisruptionBudget".into(),
        plural: "poddisruptionbudgets".into(),
    };
    let mut all = Vec::new();
    pages(
        &Api::<DynamicObject>::all_with(client.clone(), &kind),
        ListParams::default(),
        |object| {
            all.push(budget(&object, version));
            true
        },
    )
    .await?;
    let mut closed = Vec::new();
    for budget in all.iter().filter(|budget| !is_own(budget)) {
        let number = |field: &str| budget.status[field].as_i64();
        // Without a status the API server refuses evictions as well.
        if number("disruptionsAllowed").unwrap_or(0) > 0 {
            continue;
        }
        let (pods, more) = match &budget.selector {
            Some(selector) => evictable(client, &budget.namespace, selector).await?,
            None => continue,
        };
        if !pods.is_empty() {
            closed.push(BudgetSeen {
                name: format!("{}/{}", budget.namespace, budget.name),
                healthy: number("currentHealthy").unwrap_or(0),
                desired: number("desiredHealthy").unwrap_or(0),
                expected: number("expectedPods").unwrap_or(0),
                pods,
                more,
            });
        }
    }
    Ok(Budgets {
        closed,
        overlaps: overlaps(client, &all).await?,
    })
}

fn budget(object: &DynamicObject, version: &str) -> Budget {
    let selector: Option<LabelSelector> = serde_json::from_value(object.data["spec"]["selector"].clone()).ok();
    let selector = selector.and_then(|selector| Selector::try_from(selector).ok());
    Budget {
        namespace: object.namespace().unwrap_or_default(),
        name: object.name_any(),
        // An empty selector was for no pod in policy/v1beta1, and is for all in policy/v1.
        selector: selector.filter(|selector| version == "policy/v1" || !selector.selects_all()),
        status: object.data["status"].clone(),
    }
}

/// kprov's own allow one disruption whenever all is well, and upgrades look after their pods themselves.
fn is_own(budget: &Budget) -> bool {
    budget.namespace == NAMESPACE && Workload::ALL.iter().any(|workload| workload.as_str() == budget.name)
}

/// Some pods that a drain would evict, and whether there are more.
async fn evictable(client: &Client, namespace: &str, selector: &Selector) -> Result<(Vec<PodSeen>, bool), GatherError> {
    let params = ListParams::default().labels_from(selector).fields(NOT_FINISHED);
    let mut pods = Vec::new();
    let mut more = false;
    pages(&Api::<Pod>::namespaced(client.clone(), namespace), params, |pod| {
        if let Some(machine) = evicted_from(&pod) {
            more = pods.len() == MOST_EXAMPLES;
            if !more {
                pods.push(PodSeen {
                    name: pod.name_any(),
                    machine,
                });
            }
        }
        !more
    })
    .await?;
    Ok((pods, more))
}

const NOT_FINISHED: &str = "status.phase!=Succeeded,status.phase!=Failed";

/// The machine that a drain would evict a pod from; `None` where it wouldn't.
fn evicted_from(pod: &Pod) -> Option<MachineName> {
    let daemon = pod.owner_references().iter().any(|owner| owner.kind == "DaemonSet");
    let mirror = pod.annotations().contains_key(MIRROR_ANNOTATION);
    let labels = pod.labels();
    let kprov = labels.contains_key(PLANE_LABEL)
        || labels
            .get(NAME_LABEL)
            .is_some_and(|name| name == Workload::Operator.as_str());
    if daemon || mirror || kprov || pod.metadata.deletion_timestamp.is_some() {
        return None;
    }
    MachineName::new(pod.spec.as_ref()?.node_name.as_deref()?).ok()
}

/// Pairs of budgets that have a pod in common: the API server refuses to evict it ("does not support").
async fn overlaps(client: &Client, all: &[Budget]) -> Result<Vec<BudgetOverlap>, GatherError> {
    let mut namespaces: BTreeMap<&str, Vec<(&Budget, &Selector)>> = BTreeMap::new();
    for budget in all {
        if let Some(selector) = &budget.selector {
            namespaces
                .entry(&budget.namespace)
                .or_default()
                .push((budget, selector));
        }
    }
    let mut pairs = Vec::new();
    for budgets in namespaces.values() {
        for (index, one) in budgets.iter().enumerate() {
            let others = budgets[index + 1..].iter().filter(|other| !disjoint(one.1, other.1));
            pairs.extend(others.map(|other| (*one, *other)));
        }
    }
    if pairs.len() > MOST_PAIRS {
        return Err(GatherError::Odd(format!(
            "{} pairs of budgets may have pods in common",
            pairs.len()
        )));
    }
    let mut overlaps = Vec::new();
    for ((one, selector), (other, other_selector)) in pairs {
        let both: Selector = selector.clone().into_iter().chain(other_selector.clone()).collect();
        let (pods, _) = evictable(client, &one.namespace, &both).await?;
        if let Some(pod) = pods.into_iter().next() {
            overlaps.push(BudgetOverlap {
                namespace: one.namespace.clone(),
                budgets: [one.name.clone(), other.name.clone()],
                pod,
            });
        }
    }
    Ok(overlaps)
}

/// Whether two selectors can have no pod in common, as most budgets of a namespace can't: they ask for different values of
/// one label.
pub(super) fn disjoint(one: &Selector, other: &Selector) -> bool {
    let equal = |selector: &Selector| -> BTreeMap<String, String> {
        let pairs = selector.clone().into_iter().filter_map(|expression| match expression {
            Expression::Equal(key, value) => Some((key, value)),
            _ => None,
        });
        pairs.collect()
    };
    let other = equal(other);
    equal(one)
        .iter()
        .any(|(key, value)| other.get(key).is_some_and(|wanted| wanted != value))
}
