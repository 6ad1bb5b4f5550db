//! The pivot's observations, and the wait.

use std::time::Duration;

use futures::future::join_all;
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment};
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{Api, ListParams};
use kube::{Client, ResourceExt as _};
use tokio::time::{Instant, sleep_until, timeout};

use super::{DaemonSetSeen, DeploymentSeen, Expectation, NodeSeen, Observation, PivotState, PodSeen, judge};
use crate::manifests::{CONTROL_PLANE_LABEL, NAME_LABEL, NAMESPACE, REVISION_LABEL};

/// The kubelet's mark on pods that mirror static pods.
const MIRROR_ANNOTATION: &str = "kubernetes.io/config.mirror";
const TRY: Duration = Duration::from_secs(10);
const INTERVAL: Duration = Duration::from_millis(500);

/// Why nothing could be observed.
#[derive(Debug, thiserror::Error)]
pub enum ObserveError {
    /// The API server, or the way there, says so.
    #[error("could not ask the API server")]
    Api(#[from] kube::Error),
    /// No answer came.
    #[error("the API server gave no answer within {} s", TRY.as_secs())]
    NoAnswer,
}

/// Why the wait ended before the pivot did.
#[derive(Debug, thiserror::Error)]
pub enum WaitError {
    /// Something was still missing when the deadline passed.
    #[error("the deadline passed waiting for {}", list(.0))]
    Missing(PivotState),
    /// The API could not be asked when the deadline passed.
    #[error("the deadline passed and the API could not be asked")]
    Unobservable(#[source] ObserveError),
}

fn list(state: &PivotState) -> String {
    state
        .waiting
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join("; ")
}

/// What [`wait`] tells while it waits: once for every change.
#[derive(Debug)]
pub enum Progress<'a> {
    /// How far it is.
    State(&'a PivotState),
    /// An observation failed; the next one may not.
    Unobservable(&'a ObserveError),
}

/// Looks at the cluster once.
pub async fn observe(client: &Client) -> Result<Observation, ObserveError> {
    timeout(TRY, observe_once(client))
        .await
        .map_err(|_| ObserveError::NoAnswer)?
}

async fn observe_once(client: &Client) -> Result<Observation, ObserveError> {
    let nodes = Api::<Node>::all(client.clone());
    let pods = Api::<Pod>::namespaced(client.clone(), NAMESPACE);
    let deployments = Api::<Deployment>::namespaced(client.clone(), NAMESPACE);
    let daemon_sets = Api::<DaemonSet>::namespaced(client.clone(), NAMESPACE);
    let (all, kprov) = (
        ListParams::default(),
        ListParams::default().labels("app.kubernetes.io/managed-by=kprov"),
    );
    let (nodes, pods, deployments, daemon_sets) = futures::try_join!(
        nodes.list(&all),
        pods.list(&kprov),
        deployments.list(&kprov),
        daemon_sets.list(&kprov)
    )?;
    Ok(Observation {
        nodes: join_all(nodes.items.iter().map(|node| node_seen(client, node))).await,
        pods: pods.items.iter().map(pod_seen).collect(),
        deployments: deployments.items.iter().map(deployment_seen).collect(),
        daemon_sets: daemon_sets.items.iter().map(daemon_set_seen).collect(),
    })
}

async fn node_seen(client: &Client, node: &Node) -> NodeSeen {
    let name = node.name_any();
    let conditions = node.status.iter().flat_map(|s| s.conditions.iter().flatten());
    let ready = match conditions.into_iter().find(|c| c.type_ == "Ready") {
        Some(condition) if condition.status == "True" => Ok(()),
        Some(condition) => Err(condition.message.clone().unwrap_or_default()),
        None => Err(String::new()),
    };
    // Before a node is Ready its kubelet has no signed certificate, and asking takes until it has one.
    let kubelet_answers = ready.is_ok() && kubelet_answers(client, &name).await;
    NodeSeen {
        ready,
        control_plane: node.labels().contains_key(CONTROL_PLANE_LABEL),
        kubelet_answers,
        name,
    }
}

/// Whether a kubelet's own health comes back through the API server, which checks the kubelet's serving certificate.
async fn kubelet_answers(client: &Client, node: &str) -> bool {
    let request = http::Request::get(format!("/api/v1/nodes/{node}/proxy/healthz")).body(Vec::new());
    match request {
        Ok(request) => client.request_text(request).await.is_ok(),
        Err(_) => false,
    }
}

fn pod_seen(pod: &Pod) -> PodSeen {
    let conditions = pod.status.iter().flat_map(|s| s.conditions.iter().flatten());
    let ready = conditions.into_iter().any(|c| c.type_ == "Ready" && c.status == "True");
    PodSeen {
        component: pod.labels().get(NAME_LABEL).cloned().unwrap_or_default(),
        node: pod.spec.as_ref().and_then(|s| s.node_name.clone()),
        mirror: pod.annotations().contains_key(MIRROR_ANNOTATION),
        ready: ready && pod.metadata.deletion_timestamp.is_none(),
        revision: pod.labels().get(REVISION_LABEL).and_then(|r| r.parse().ok()),
        started: started(pod),
    }
}

fn started(pod: &Pod) -> Option<Timestamp> {
    let container = pod.status.as_ref()?.container_statuses.as_ref()?.first()?;
    Some(container.state.as_ref()?.running.as_ref()?.started_at.as_ref()?.0)
}

fn deployment_seen(deployment: &Deployment) -> DeploymentSeen {
    let wanted = deployment.spec.as_ref().and_then(|s| s.replicas).unwrap_or(1);
    let status = deployment.status.as_ref();
    let number = |n: Option<i32>| n.unwrap_or(0);
    // What the status says of an older template doesn't count.
    let current = status.is_some_and(|s| s.observed_generation == deployment.metadata.generation);
    let available = status
        .filter(|_| current)
        .map_or(0, |s| number(s.available_replicas).min(number(s.updated_replicas)));
    DeploymentSeen {
        name: deployment.name_any(),
        wanted,
        available,
    }
}

fn daemon_set_seen(set: &DaemonSet) -> DaemonSetSeen {
    let ready = set.status.as_ref().map_or(0, |s| s.number_ready);
    DaemonSetSeen {
        name: set.name_any(),
        ready: ready.try_into().unwrap_or_default(),
    }
}

/// Observes and judges until nothing is missing, or the deadline passes.
pub async fn wait(
    client: &Client,
    expected: &Expectation,
    deadline: Instant,
    mut progress: impl FnMut(Progress<'_>),
) -> Result<(), WaitError> {
    let mut last: Option<PivotState> = None;
    loop {
        let next = Instant::now() + INTERVAL;
        let late = next > deadline;
        match observe(client).await {
            Ok(seen) => {
                let state = judge(expected, &seen);
                if last.as_ref() != Some(&state) {
                    progress(Progress::State(&state));
                }
                if state.is_done() {
                    return Ok(());
                }
                if late {
                    return Err(WaitError::Missing(state));
                }
                last = Some(state);
            }
            Err(error) if late => return Err(WaitError::Unobservable(error)),
            Err(error) => progress(Progress::Unobservable(&error)),
        }
        sleep_until(next).await;
    }
}
