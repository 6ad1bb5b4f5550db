//! Cordons, and pods that have to leave a machine. What has to leave, and what holds it back, is decided by pure functions.

use std::collections::BTreeMap;
use std::time::Duration;

use futures::{StreamExt as _, TryStreamExt as _, stream};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use kprov_bootstrap::manifests::NAME_LABEL;
use kprov_types::api::CORDONED_ANNOTATION;
use kprov_types::{MachineName, Minor};
use kube::Api;
use kube::api::{DeleteParams, ListParams, Preconditions};
use kube::core::{ApiResource, GroupVersionKind};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::access::{Failure, Part};
use super::cache::{Facts, NODES};
use super::facts::{MIRROR_ANNOTATION, PLANE_LABEL};
use super::resources::{Selector, SlimBudget, SlimPod, Taint, Toleration, core};
use super::{Effect, KubeCluster};
use crate::cluster::{ClusterError, Outcome};
use crate::model::{Drain, Workload};

/// How long a list of pods counts as fresh: passes may follow each other much faster.
const FRESH: Duration = Duration::from_secs(1);
/// Evictions that are asked for at the same time.
const AT_ONCE: usize = 8;
/// Since when the Eviction API, and PodDisruptionBudgets with it, are `policy/v1`.
const POLICY_V1: Minor = Minor::v1(22);

/// A PodDisruptionBudget that lets nothing go now.
#[derive(Clone, Debug)]
pub(super) struct Spent {
    namespace: String,
    name: String,
    selector: Selector,
}

/// The budgets that let nothing go.
pub(super) fn spent(budgets: &[SlimBudget]) -> Vec<Spent> {
    let none_left = budgets.iter().filter(|b| b.status.disruptions_allowed < 1);
    none_left
        .filter_map(|budget| {
            Some(Spent {
                namespace: budget.metadata.namespace.clone()?,
                name: budget.name().to_owned(),
                selector: budget.spec.selector.clone()?,
            })
        })
        .collect()
}

/// A machine that could take pods of another: its taints.
pub(super) fn shelters(facts: &Facts, but: &MachineName) -> Vec<Vec<Taint>> {
    let others = facts.nodes.iter().filter(|(name, _)| *name != but.as_str());
    others
        .filter(|(_, node)| node.ready && !node.cordoned)
        .map(|(_, node)| node.taints.clone())
        .collect()
}

/// Which pods of a machine have to leave it, and what holds them back. A pod that no other machine could take stays: its
/// containers run on while the machine's programs are replaced, which is better for it than nothing.
pub(super) fn drain(pods: &[SlimPod], spent: &[Spent], shelters: &[Vec<Taint>]) -> Drain {
    let mut drain = Drain::default();
    for pod in pods.iter().filter(|pod| has_to_leave(pod, shelters)) {
        let name = full_name(pod);
        let labels = pod.metadata.labels.clone().unwrap_or_default();
        let held = spent
            .iter()
            .find(|b| Some(&b.namespace) == pod.metadata.namespace.as_ref() && b.selector.matches(&labels));
        if let Some(Spent {
            namespace,
            name: budget,
            ..
        }) = held.filter(|_| !pod.leaving())
        {
            drain.blocked.push(format!(
                "PodDisruptionBudget `{namespace}/{budget}` lets pod `{name}` not go now"
            ));
        }
        drain.leaving += usize::from(pod.leaving());
        drain.remaining.insert(name);
    }
    drain
}

fn full_name(pod: &SlimPod) -> String {
    format!(
        "{}/{}",
        pod.metadata.namespace.as_deref().unwrap_or_default(),
        pod.name()
    )
}

fn has_to_leave(pod: &SlimPod, shelters: &[Vec<Taint>]) -> bool {
    let owners = pod.metadata.owner_references.iter().flatten();
    let of_daemon_set = owners
        .into_iter()
        .any(|o| o.controller == Some(true) && o.kind == "DaemonSet");
    let mirror = pod.annotation(MIRROR_ANNOTATION).is_some();
    // The control plane and the operator are rolled, never moved: they're what does the moving.
    let ours = pod.metadata.namespace.as_deref() == Some(kprov_bootstrap::manifests::NAMESPACE)
        && (pod.label(PLANE_LABEL).is_some() || pod.label(NAME_LABEL) == Some(Workload::Operator.as_str()));
    let elsewhere = shelters.iter().any(|taints| tolerates(&pod.spec.tolerations, taints));
    !of_daemon_set && !mirror && !pod.finished() && !ours && elsewhere
}

/// Whether a pod may be scheduled in spite of a node's taints.
fn tolerates(tolerations: &[Toleration], taints: &[Taint]) -> bool {
    taints.iter().filter(|taint| taint.repels()).all(|taint| {
        tolerations.iter().any(|toleration| {
            let effect = toleration.effect.is_empty() || toleration.effect == taint.effect;
            let key = if toleration.key.is_empty() {
                toleration.operator == "Exists"
            } else {
                toleration.key == taint.key
            };
            let value = toleration.operator == "Exists" || toleration.value == taint.value;
            effect && key && value
        })
    })
}

/// Lists of pods, as long as they're fresh.
#[derive(Debug, Default)]
pub(super) struct Lists(BTreeMap<MachineName, (Instant, Drain)>);

impl Lists {
    fn fresh(&self, machine: &MachineName) -> Option<Drain> {
        let (at, drain) = self.0.get(machine)?;
        (at.elapsed() < FRESH).then(|| drain.clone())
    }

    fn keep(&mut self, machine: &MachineName, drain: Drain) {
        self.0.retain(|_, (at, _)| at.elapsed() < FRESH);
        self.0.insert(machine.clone(), (Instant::now(), drain));
    }
}

impl KubeCluster {
    /// What has to leave the machines that the operator has cordoned.
    pub(super) async fn drains(&self) -> Result<BTreeMap<MachineName, Drain>, ClusterError> {
        let machines: Vec<(MachineName, Vec<Vec<Taint>>)> = {
            let facts = self.cache.facts();
            let cordoned = facts
                .nodes
                .iter()
                .filter(|(_, node)| node.cordoned && node.cordoned_by_us.is_some());
            cordoned
                .filter_map(|(name, _)| MachineName::new(name).ok())
                .map(|machine| {
                    let shelters = shelters(&facts, &machine);
                    (machine, shelters)
                })
                .collect()
        };
        let mut drains = BTreeMap::new();
        let mut ask = Vec::new();
        {
            let lists = self.lists.lock().await;
            for (machine, shelters) in machines {
                match lists.fresh(&machine) {
                    Some(drain) => drop(drains.insert(machine, drain)),
                    None => ask.push((machine, shelters)),
                }
            }
        }
        if ask.is_empty() {
            return Ok(drains);
        }
        let spent = self.spent_budgets().await?;
        let spent = &spent;
        let lists = stream::iter(ask).map(async |(machine, shelters)| {
            let seen = drain(&self.pods_on(&machine).await?, spent, &shelters);
            Ok::<_, ClusterError>((machine, seen))
        });
        let seen: Vec<(MachineName, Drain)> = lists.buffer_unordered(AT_ONCE).try_collect().await?;
        let mut lists = self.lists.lock().await;
        for (machine, drain) in seen {
            lists.keep(&machine, drain.clone());
            drains.insert(machine, drain);
        }
        Ok(drains)
    }

    async fn pods_on(&self, machine: &MachineName) -> Result<Vec<SlimPod>, ClusterError> {
        let api: Api<SlimPod> = Api::all_with(self.access.client.clone(), &core("Pod", "pods"));
        let params = ListParams::default().fields(&format!("spec.nodeName={machine}"));
        Ok(self.access.read(api.list(&params)).await?.items)
    }

    async fn spent_budgets(&self) -> Result<Vec<Spent>, ClusterError> {
        let version = self.policy_version();
        let kind = GroupVersionKind::gvk("policy", version, "PodDisruptionBudget");
        let resource = ApiResource::from_gvk_with_plural(&kind, "poddisruptionbudgets");
        let api: Api<SlimBudget> = Api::all_with(self.access.client.clone(), &resource);
        Ok(spent(&self.access.read(api.list(&ListParams::default())).await?.items))
    }

    fn policy_version(&self) -> &'static str {
        match self.lowest_minor() {
            Some(minor) if minor < POLICY_V1 => "v1beta1",
            _ => "v1",
        }
    }

    /// Keeps new pods off a machine. One that somebody else has cordoned is left as it is.
    pub(super) async fn cordon(&self, machine: &MachineName) -> Result<Effect, ClusterError> {
        let now = Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        self.change_node(machine, |unschedulable, ours| match (unschedulable, ours) {
            (true, true) => NodeChange::None,
            (true, false) => NodeChange::Stale,
            (false, _) => NodeChange::To(json!(true), json!(now)),
        })
        .await
    }

    /// Lets new pods on a machine that [`Self::cordon`] has kept them off, and on no other.
    pub(super) async fn uncordon(&self, machine: &MachineName) -> Result<Effect, ClusterError> {
        self.change_node(machine, |_, ours| {
            if ours {
                NodeChange::To(Value::Null, Value::Null)
            } else {
                NodeChange::None
            }
        })
        .await
    }

    async fn change_node(
        &self,
        machine: &MachineName,
        decide: impl Fn(bool, bool) -> NodeChange,
    ) -> Result<Effect, ClusterError> {
        // Kubelets write their Node every few seconds, which says nothing against this.
        let decide = &decide;
        let change = async || {
            let before = self
                .access
                .get(&NODES, machine.as_str())
                .await?
                .ok_or(Failure::Missing)?;
            let unschedulable = before.data["spec"]["unschedulable"] == json!(true);
            let annotations = before.metadata.annotations.as_ref();
            let ours = annotations.is_some_and(|a| a.contains_key(CORDONED_ANNOTATION));
            let (unschedulable, since) = match decide(unschedulable, ours) {
                NodeChange::None => return Ok(Effect::Already),
                NodeChange::Stale => return Ok(Effect::Stale),
                NodeChange::To(unschedulable, since) => (unschedulable, since),
            };
            let mut after = serde_json::to_value(&before).unwrap_or_default();
            after["spec"]["unschedulable"] = unschedulable;
            after["metadata"]["annotations"][CORDONED_ANNOTATION] = since;
            self.access.change(&NODES, &before, &after, Part::Object).await?;
            Ok(Effect::Changed)
        };
        self.access.again(change).await
    }

    /// Asks for the eviction of all pods that have to leave a machine. What budgets hold back is left for the next time, or
    /// with `force` deleted.
    pub(super) async fn evict(&self, machine: &MachineName, force: bool) -> Result<Outcome, ClusterError> {
        let (ours, shelters) = {
            let facts = self.cache.facts();
            let node = facts.nodes.get(machine.as_str());
            let ours = node.is_some_and(|node| node.cordoned && node.cordoned_by_us.is_some());
            (ours, shelters(&facts, machine))
        };
        if !ours {
            return Ok(Outcome::Stale);
        }
        let pods = self.pods_on(machine).await?;
        let mut leave = pods;
        leave.retain(|pod| has_to_leave(pod, &shelters) && !pod.leaving());
        let evictions = stream::iter(leave)
            .map(|pod| self.evict_pod(pod, force))
            .buffer_unordered(AT_ONCE);
        let results: Vec<Result<(), ClusterError>> = evictions.collect().await;
        // All are tried before the first failure is told.
        results.into_iter().collect::<Result<(), _>>()?;
        Ok(Outcome::Done)
    }

    async fn evict_pod(&self, pod: SlimPod, force: bool) -> Result<(), ClusterError> {
        let (name, namespace) = (pod.name(), pod.metadata.namespace.as_deref().unwrap_or_default());
        let body = json!({
            "apiVersion": format!("policy/{}", self.policy_version()),
            "kind": "Eviction",
            "metadata": { "name": name, "namespace": namespace },
            "deleteOptions": { "preconditions": { "uid": pod.metadata.uid } },
        });
        let path = format!("/api/v1/namespaces/{namespace}/pods/{name}/eviction");
        let request = http::Request::post(path)
            .header(http::header::CONTENT_TYPE, "application/json")
            .body(body.to_string().into_bytes())
            .map_err(|error| ClusterError::Lost(Box::new(error)))?;
        let why = match self.access.write(self.access.client.request::<Value>(request)).await {
            // It's on its way, it's gone, or it's another of the same name.
            Ok(_) | Err(Failure::Missing | Failure::Conflict) => return Ok(()),
            Err(Failure::TooMany(why)) => why,
            // So it answers where two budgets are for one pod.
            Err(Failure::Other(ClusterError::Lost(source))) if is_api_error(&*source) => source.to_string(),
            Err(failure) => return Err(failure.into()),
        };
        tracing::info!(pod = full_name(&pod), why, force, "a pod can't be evicted now");
        if !force {
            return Ok(());
        }
        let api: Api<Pod> = Api::namespaced(self.access.client.clone(), namespace);
        let params = DeleteParams {
            preconditions: Some(Preconditions {
                uid: pod.metadata.uid.clone(),
                resource_version: None,
            }),
            ..DeleteParams::default()
        };
        match self.access.write(api.delete(name, &params)).await {
            Ok(_) | Err(Failure::Missing | Failure::Conflict) => Ok(()),
            Err(failure) => Err(failure.into()),
        }
    }
}

/// Whether the API server itself said so, and not the way there.
fn is_api_error(error: &(dyn std::error::Error + Send + Sync + 'static)) -> bool {
    matches!(error.downcast_ref::<kube::Error>(), Some(kube::Error::Api(status)) if status.code == 500)
}

/// What becomes of a Node.
enum NodeChange {
    None,
    Stale,
    /// `spec.unschedulable`, and the annotation.
    To(Value, Value),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(name: &str, change: fn(&mut Value)) -> SlimPod {
        let mut pod = json!({
            "metadata": { "name": name, "namespace": "shop", "labels": { "app": name }, "creationTimestamp": "2026-05-01T12:00:00Z" },
            "spec": { "nodeName": "a" }, "status": { "phase": "Running" },
        });
        change(&mut pod);
        serde_json::from_value(pod).unwrap()
    }

    fn taint(key: &str) -> Taint {
        Taint {
            key: key.into(),
            value: String::new(),
            effect: "NoSchedule".into(),
        }
    }

    #[test]
    fn what_stays() {
        let owned = |kind: &str| json!([{ "apiVersion": "apps/v1", "kind": kind, "name": "x", "uid": "u", "controller": true }]);
        let mut daemon = pod("daemon", |_| ());
        daemon.metadata.owner_references = serde_json::from_value(owned("DaemonSet")).unwrap();
        let mut replica = pod("replica", |_| ());
        replica.metadata.owner_references = serde_json::from_value(owned("ReplicaSet")).unwrap();
        let pods = [
            daemon,
            replica,
            pod("bare", |_| ()),
            pod("mirror", |p| {
                p["metadata"]["annotations"] = json!({ MIRROR_ANNOTATION: "x" });
            }),
            pod("done", |p| p["status"]["phase"] = json!("Succeeded")),
            pod("leaving", |p| {
                p["metadata"]["deletionTimestamp"] = json!("2026-05-01T12:00:00Z");
            }),
            pod("apiserver", |p| {
                p["metadata"]["namespace"] = json!("kube-system");
                p["metadata"]["labels"] = json!({ PLANE_LABEL: "self-hosted" });
            }),
            pod("operator", |p| {
                p["metadata"]["namespace"] = json!("kube-system");
                p["metadata"]["labels"] = json!({ NAME_LABEL: "kprov-operator" });
            }),
            // The same label elsewhere is no licence to stay.
            pod("imitator", |p| {
                p["metadata"]["labels"] = json!({ PLANE_LABEL: "self-hosted" });
            }),
        ];
        let left = drain(&pods, &[], &[Vec::new()]);
        let names: Vec<&str> = left.remaining.iter().map(String::as_str).collect();
        assert_eq!(names, ["shop/bare", "shop/imitator", "shop/leaving", "shop/replica"]);
        assert!(left.blocked.is_empty());
        assert_eq!(drain(&pods, &[], &[]), Drain::default(), "nowhere to go");
    }

    #[test]
    fn only_where_the_pod_may_go() {
        let plain = pod("plain", |_| ());
        let any = pod("any", |p| p["spec"]["tolerations"] = json!([{ "operator": "Exists" }]));
        let one = pod("one", |p| {
            p["spec"]["tolerations"] = json!([{ "key": "a", "operator": "Exists", "effect": "NoSchedule" }]);
        });
        let valued = pod("valued", |p| {
            p["spec"]["tolerations"] = json!([{ "key": "a", "value": "x" }]);
        });
        let pods = [plain, any, one, valued];
        let remaining =
            |taints: &[Taint]| -> Vec<String> { drain(&pods, &[], &[taints.to_vec()]).remaining.into_iter().collect() };
        assert_eq!(remaining(&[taint("a")]), ["shop/any", "shop/one"]);
        assert_eq!(remaining(&[taint("a"), taint("b")]), ["shop/any"]);
        let soft = Taint {
            effect: "PreferNoSchedule".into(),
            ..taint("a")
        };
        assert_eq!(remaining(&[soft]).len(), 4);
    }

    #[test]
    fn budgets_hold_back() {
        let budget = |namespace: &str, allowed: i64| -> SlimBudget {
            serde_json::from_value(json!({ "metadata": { "name": "web", "namespace": namespace },
                "spec": { "selector": { "matchLabels": { "app": "web" } } }, "status": { "disruptionsAllowed": allowed } }))
            .unwrap()
        };
        let pods = [pod("web", |_| ()), pod("db", |_| ())];
        let blocked = |budgets: &[SlimBudget]| drain(&pods, &spent(budgets), &[Vec::new()]).blocked;
        assert_eq!(
            blocked(&[budget("shop", 0)]),
            ["PodDisruptionBudget `shop/web` lets pod `shop/web` not go now"]
        );
        assert!(blocked(&[budget("shop", 1), budget("other", 0)]).is_empty());
        let leaving = [pod("web", |p| {
            p["metadata"]["deletionTimestamp"] = json!("2026-05-01T12:00:00Z");
        })];
        assert!(
            drain(&leaving, &spent(&[budget("shop", 0)]), &[Vec::new()])
                .blocked
                .is_empty()
        );
    }
}
