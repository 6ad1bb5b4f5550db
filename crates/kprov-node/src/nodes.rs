//! One watch on Nodes, with kubelet's identity, that everything on this machine which must know of other machines feeds
//! on; and, on control-plane machines, what must be done to Nodes: their label, and approving serving certificates.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::TryStreamExt;
use ipnet::IpNet;
use jiff::Timestamp;
use k8s_openapi::api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestCondition};
use k8s_openapi::api::core::v1::Node;
use kprov_types::MachineName;
use kube::api::{Patch, PatchParams};
use kube::runtime::watcher;
use kube::{Api, Client, ResourceExt};
use serde_json::json;
use tokio::sync::watch;

use crate::api::{self, Identity};
use crate::csr::{self, Verdict};
use crate::podnet::NodeView;

/// The label that marks control-plane machines.
pub const CONTROL_PLANE_LABEL: &str = "node-role.kubernetes.io/control-plane";
/// How long to wait before a watch that failed is begun again.
const PAUSE: Duration = Duration::from_millis(500);
/// How long a watch lasts until it begins again with the certificate that is on disk then.
const CLIENT_LIFE: Duration = Duration::from_hours(1);

/// What matters of a Node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeFacts {
    /// Its addresses of type `InternalIP`.
    pub addresses: Vec<IpAddr>,
    /// The pods' ranges of it.
    pub pod_ranges: Vec<IpNet>,
    /// Labelled as a control-plane machine.
    pub control_plane: bool,
}

impl NodeFacts {
    fn of(node: &Node) -> Self {
        let status = node.status.as_ref().and_then(|s| s.addresses.as_ref());
        let spec = node.spec.as_ref();
        let ranges = spec.and_then(|s| s.pod_cidrs.clone().or_else(|| s.pod_cidr.clone().map(|one| vec![one])));
        Self {
            addresses: status
                .into_iter()
                .flatten()
                .filter(|a| a.type_ == "InternalIP")
                .filter_map(|a| a.address.parse().ok())
                .collect(),
            pod_ranges: ranges
                .into_iter()
                .flatten()
                .filter_map(|range| range.parse().ok())
                .collect(),
            control_plane: node.labels().contains_key(CONTROL_PLANE_LABEL),
        }
    }
}

/// What this machine's kubelet tells of itself. Apart from [`NodeFacts`], since it changes with every report.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OwnNode {
    /// The condition `Ready` is true.
    pub ready: bool,
    /// That condition's message.
    pub message: String,
    /// When kubelet has reported it last, by this machine's clock, in whole seconds.
    pub heartbeat: Option<Timestamp>,
    /// kubelet's version, such as `v1.36.3`.
    pub kubelet: String,
}

impl OwnNode {
    fn of(node: &Node) -> Self {
        let status = node.status.as_ref();
        let conditions = status.and_then(|s| s.conditions.as_ref());
        let ready = conditions.into_iter().flatten().find(|c| c.type_ == "Ready");
        Self {
            ready: ready.is_some_and(|c| c.status == "True"),
            message: ready.and_then(|c| c.message.clone()).unwrap_or_default(),
            heartbeat: ready.and_then(|c| c.last_heartbeat_time.as_ref()).map(|t| t.0),
            kubelet: status
                .and_then(|s| s.node_info.as_ref())
                .map(|info| info.kubelet_version.clone())
                .unwrap_or_default(),
        }
    }
}

/// Where the watch on Nodes tells what it sees.
#[derive(Clone, Debug)]
pub struct NodesSeen {
    /// All nodes.
    pub all: watch::Sender<Arc<Nodes>>,
    /// This machine's own.
    pub own: watch::Sender<Option<OwnNode>>,
    /// Its name.
    pub name: MachineName,
}

impl NodesSeen {
    /// Nothing seen yet.
    pub fn new(name: MachineName) -> Self {
        Self {
            all: watch::Sender::new(Arc::default()),
            own: watch::Sender::new(None),
            name,
        }
    }

    fn look_at_own(&self, node: &Node) {
        if node.metadata.name.as_deref() == Some(self.name.as_str()) {
            let now = Some(OwnNode::of(node));
            self.own.send_if_modified(|own| {
                let changed = *own != now;
                *own = now;
                changed
            });
        }
    }
}

/// Nodes by name.
pub type Nodes = BTreeMap<String, NodeFacts>;

/// The nodes as the pod network sees them: those that have an address.
pub fn views(nodes: &Nodes) -> Vec<NodeView> {
    let view = |(name, facts): (&String, &NodeFacts)| {
        let internal_ip = facts
            .addresses
            .iter()
            .find_map(|a| if let IpAddr::V4(v4) = a { Some(*v4) } else { None })?;
        let pod_cidr = facts
            .pod_ranges
            .iter()
            .find_map(|r| if let IpNet::V4(v4) = r { Some(*v4) } else { None });
        Some(NodeView {
            name: MachineName::new(name.clone()).ok()?,
            internal_ip,
            pod_cidr,
        })
    };
    nodes.iter().filter_map(view).collect()
}

/// Keeps `seen` as the API has it, for as long as the process runs. Never shorter than the API's list: while the API is
/// away what is known stays.
pub async fn watch_nodes(seen: NodesSeen) {
    loop {
        match api::client(Identity::Kubelet).await {
            Ok(client) => {
                let watched = follow(Api::all(client), &seen);
                // Not an error: with the certificate that kubelet may have rotated meanwhile, the watch begins again.
                let _ = tokio::time::timeout(CLIENT_LIFE, watched).await;
            }
            Err(error) => tracing::debug!(error = crate::chain(&error), "nodes cannot be watched yet"),
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn follow(nodes: Api<Node>, seen: &NodesSeen) {
    let into = &seen.all;
    let mut stream = std::pin::pin!(watcher(nodes, watcher::Config::default()));
    let mut listing = Nodes::new();
    loop {
        match stream.try_next().await {
            Ok(Some(event)) => match event {
                watcher::Event::Init => listing.clear(),
                watcher::Event::InitApply(node) => {
                    seen.look_at_own(&node);
                    listing.insert(node.name_any(), NodeFacts::of(&node));
                }
                watcher::Event::InitDone => publish(into, |all| *all = std::mem::take(&mut listing)),
                watcher::Event::Apply(node) => {
                    seen.look_at_own(&node);
                    publish(into, |all| drop(all.insert(node.name_any(), NodeFacts::of(&node))));
                }
                watcher::Event::Delete(node) => {
                    if node.name_any() == seen.name.as_str() {
                        seen.own.send_replace(None);
                    }
                    publish(into, |all| drop(all.remove(&node.name_any())));
                }
            },
            Ok(None) => return,
            Err(error) => {
                tracing::debug!(error = crate::chain(&error), "watching nodes");
                tokio::time::sleep(PAUSE).await;
                // The kubelet may have been given a certificate meanwhile; begin with a new client.
                return;
            }
        }
    }
}

/// Nodes change their status all the time; subscribers hear of it only when something they look at is different.
fn publish(into: &watch::Sender<Arc<Nodes>>, change: impl FnOnce(&mut Nodes)) {
    into.send_if_modified(|shared| {
        let mut all = Nodes::clone(shared);
        change(&mut all);
        let changed = all != **shared;
        if changed {
            *shared = Arc::new(all);
        }
        changed
    });
}

/// Sees to it, for as long as the process runs, that this machine's Node has the control-plane label and that nodes'
/// serving certificates are approved.
pub async fn look_after(machine: MachineName, nodes: watch::Receiver<Arc<Nodes>>) {
    loop {
        match api::client(Identity::ControlPlaneNode).await {
            Ok(client) => {
                let label = label(&client, &machine, nodes.clone());
                let approve = approve(&client, nodes.clone());
                let both = async { tokio::join!(label, approve) };
                let _ = tokio::time::timeout(CLIENT_LIFE, both).await;
            }
            Err(error) => tracing::warn!(error = crate::chain(&error), "no client for this machine's own Node"),
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn label(client: &Client, machine: &MachineName, mut nodes: watch::Receiver<Arc<Nodes>>) {
    let api: Api<Node> = Api::all(client.clone());
    let patch = Patch::Merge(json!({ "metadata": { "labels": { CONTROL_PLANE_LABEL: "" } } }));
    loop {
        let missing = nodes
            .borrow_and_update()
            .get(machine.as_str())
            .is_some_and(|node| !node.control_plane);
        if missing {
            match api
                .patch_metadata(machine.as_str(), &PatchParams::default(), &patch)
                .await
            {
                Ok(_) => tracing::info!(%machine, "labelled as a control-plane machine"),
                Err(error) => {
                    tracing::debug!(error = crate::chain(&error), "cannot label this machine's Node yet");
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            }
        }
        if nodes.changed().await.is_err() {
            return;
        }
    }
}

async fn approve(client: &Client, mut nodes: watch::Receiver<Arc<Nodes>>) {
    let api: Api<CertificateSigningRequest> = Api::all(client.clone());
    let config = watcher::Config::default().fields(&format!("spec.signerName={}", csr::SIGNER));
    let mut stream = std::pin::pin!(watcher(api.clone(), config));
    // Requests that wait until their node is known.
    let mut waiting: BTreeMap<String, CertificateSigningRequest> = BTreeMap::new();
    loop {
        tokio::select! {
            event = stream.try_next() => match event {
                Ok(Some(watcher::Event::InitApply(request) | watcher::Event::Apply(request))) => {
                    waiting.insert(request.name_any(), request);
                }
                Ok(Some(watcher::Event::Delete(request))) => drop(waiting.remove(&request.name_any())),
                Ok(Some(watcher::Event::Init | watcher::Event::InitDone)) => {}
                Ok(None) => return,
                Err(error) => {
                    tracing::debug!(error = crate::chain(&error), "watching certificate requests");
                    tokio::time::sleep(PAUSE).await;
                }
            },
            changed = nodes.changed() => if changed.is_err() { return },
        }
        let known = Arc::clone(&nodes.borrow_and_update());
        let mut done = Vec::new();
        for (name, request) in &waiting {
            let settled = match csr::judge(request, &known) {
                Verdict::Wait => false,
                Verdict::Ignore => true,
                Verdict::Approve => write_down(&api, name, None).await,
                Verdict::Deny(why) => write_down(&api, name, Some(why)).await,
            };
            if settled {
                done.push(name.clone());
            }
        }
        for name in done {
            waiting.remove(&name);
        }
    }
}

/// Approves a request, or denies it where there is a reason to; tells whether that is done with.
async fn write_down(api: &Api<CertificateSigningRequest>, name: &str, against: Option<String>) -> bool {
    let (type_, reason, message) = match against {
        None => (
            "Approved",
            "KprovNodeApproved",
            "names and addresses are the node's own".to_owned(),
        ),
        Some(why) => ("Denied", "KprovNodeDenied", why),
    };
    let condition = CertificateSigningRequestCondition {
        type_: type_.into(),
        status: "True".into(),
        reason: Some(reason.into()),
        message: Some(message.clone()),
        ..CertificateSigningRequestCondition::default()
    };
    let patch = Patch::Strategic(json!({ "status": { "conditions": [condition] } }));
    match api.patch_approval(name, &PatchParams::default(), &patch).await {
        Ok(_) => {
            tracing::info!(
                request = name,
                decision = type_,
                message,
                "judged a kubelet's serving certificate"
            );
            true
        }
        Err(kube::Error::Api(status)) if status.is_not_found() => true,
        Err(error) => {
            tracing::debug!(request = name, error = crate::chain(&error), "cannot write a verdict");
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::{NodeCondition, NodeStatus, NodeSystemInfo};
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};

    fn node(name: &str, heartbeat: i64) -> Node {
        Node {
            metadata: ObjectMeta {
                name: Some(name.into()),
                ..ObjectMeta::default()
            },
            status: Some(NodeStatus {
                conditions: Some(vec![NodeCondition {
                    type_: "Ready".into(),
                    status: "True".into(),
                    last_heartbeat_time: Some(Time(Timestamp::from_second(heartbeat).unwrap())),
                    ..NodeCondition::default()
                }]),
                node_info: Some(NodeSystemInfo {
                    kubelet_version: "v1.36.3".into(),
                    ..NodeSystemInfo::default()
                }),
                ..NodeStatus::default()
            }),
            ..Node::default()
        }
    }

    #[test]
    fn a_heartbeat_is_heard_of_by_those_who_ask_for_this_machines_alone() {
        let seen = NodesSeen::new("w0".parse().unwrap());
        let tell = |node: &Node| {
            seen.look_at_own(node);
            publish(&seen.all, |all| drop(all.insert(node.name_any(), NodeFacts::of(node))));
        };
        tell(&node("w0", 1));
        tell(&node("w1", 1));
        let (mut all, mut own) = (seen.all.subscribe(), seen.own.subscribe());
        tell(&node("w1", 2));
        assert!(!own.has_changed().unwrap());
        tell(&node("w0", 2));
        assert!(own.has_changed().unwrap());
        assert!(!all.has_changed().unwrap());
        let own = own.borrow_and_update().clone().unwrap();
        assert_eq!((own.ready, own.kubelet.as_str()), (true, "v1.36.3"));
        assert_eq!(own.heartbeat, Some(Timestamp::from_second(2).unwrap()));
        assert_eq!(all.borrow_and_update().len(), 2);
    }
}
