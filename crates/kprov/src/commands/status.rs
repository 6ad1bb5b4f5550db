//! `kprov status`: machines as the provider sees them, nodes and control plane as the API does.

use std::time::Duration;

use anyhow::Result;
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment};
use k8s_openapi::api::core::v1::Node;
use kprov_types::api::{VERSION_UPDATE, VersionUpdateSpec, VersionUpdateStatus, condition};
use kprov_types::machine::{Machine, MachineState, Network};
use kprov_types::{KubernetesVersion, cluster};
use kube::api::ListParams;
use kube::{Api, Client};
use serde::Serialize;

use super::access::Access;
use super::{Context, objects, providers};
use crate::cli::StatusArgs;
use crate::failure::UserError;
use crate::print;

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Status {
    schema_version: u32,
    name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    provider: Option<cluster::Provider>,
    #[serde(skip_serializing_if = "Option::is_none")]
    started_with: Option<KubernetesVersion>,
    #[serde(skip_serializing_if = "Option::is_none")]
    network: Option<NetworkStatus>,
    machines: Vec<MachineStatus>,
    api: ApiStatus,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct NetworkStatus {
    cidr: String,
    endpoint: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    host_address: Option<String>,
    complete: bool,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct MachineStatus {
    name: String,
    role: String,
    id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    address: Option<String>,
    state: String,
}

#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
struct ApiStatus {
    reachable: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    why_not: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    version: Option<String>,
    nodes: Vec<NodeStatus>,
    components: Vec<ComponentStatus>,
    /// What is asked for, and what the operator tells of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    version_update: Option<UpdateStatus>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct UpdateStatus {
    spec: VersionUpdateSpec,
    status: VersionUpdateStatus,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct NodeStatus {
    name: String,
    ready: bool,
    kubelet: String,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct ComponentStatus {
    name: String,
    ready: i32,
    desired: i32,
}

pub(super) async fn run(context: &Context, args: StatusArgs) -> Result<()> {
    let StatusArgs { access, output } = args;
    let by_name = access.kubeconfig.is_none() && access.context.is_none();
    if !by_name || (crate::is_kubectl_plugin() && access.name.is_none()) {
        let access = Access::open(context, &access).await?;
        let status = Status {
            schema_version: 1,
            name: access.name.clone(),
            provider: None,
            started_with: None,
            network: None,
            machines: Vec::new(),
            api: api(Ok(access.client)).await,
        };
        return print::result(output.output, &status, human);
    }
    let home = context.home.pick(access.name.as_ref())?;
    let record = home.record()?;
    let provider_name = record
        .as_ref()
        .map_or_else(cluster::Provider::default, |r| r.file.spec.provider);
    let provider = providers::open_known(context, record.as_ref()).await?;
    let observed = provider.observe(&home.name).await?;
    if record.is_none() && observed.machines.is_empty() && observed.network.is_none() {
        return Err(UserError::new(format!("there is no cluster `{}`", home.name))
            .hint("`kprov list` shows the clusters that are known here")
            .into());
    }
    let status = Status {
        schema_version: 1,
        name: home.name.to_string(),
        provider: Some(provider_name),
        started_with: record.map(|r| r.kubernetes),
        network: observed.network.as_ref().map(network),
        machines: observed.machines.iter().map(machine).collect(),
        api: api(super::client(&home.kubeconfig()).await).await,
    };
    print::result(output.output, &status, human)
}

fn network(network: &Network) -> NetworkStatus {
    let Network {
        cidr,
        endpoint,
        host_address,
        complete,
    } = network;
    NetworkStatus {
        cidr: cidr.to_string(),
        endpoint: endpoint.url(),
        host_address: host_address.map(|a| a.to_string()),
        complete: *complete,
    }
}

fn machine(machine: &Machine) -> MachineStatus {
    let Machine {
        name,
        role,
        id,
        address,
        external_address: _,
        zone: _,
        state,
    } = machine;
    let state = match state {
        MachineState::Pending => "pending".to_owned(),
        MachineState::Running => "running".to_owned(),
        MachineState::Stopped => "stopped".to_owned(),
        MachineState::Terminating => "terminating".to_owned(),
        MachineState::Failed(why) => format!("failed: {why}"),
        MachineState::Unknown(why) => format!("unknown: {why}"),
    };
    MachineStatus {
        name: name.to_string(),
        role: role.to_string(),
        id: id.clone(),
        address: address.map(|a| a.to_string()),
        state,
    }
}

/// What the API tells; an API that can't be asked is part of the answer, not an error.
async fn api(client: Result<Client>) -> ApiStatus {
    let asked = async { ask(client?).await };
    match tokio::time::timeout(Duration::from_secs(5), asked).await {
        Ok(Ok(status)) => status,
        Ok(Err(error)) => ApiStatus {
            why_not: Some(format!("{error:#}")),
            ..ApiStatus::default()
        },
        Err(_) => ApiStatus {
            why_not: Some("no answer within 5 s".into()),
            ..ApiStatus::default()
        },
    }
}

async fn ask(client: Client) -> Result<ApiStatus> {
    let version = client.apiserver_version().await?.git_version;
    let all = ListParams::default();
    let nodes = Api::<Node>::all(client.clone()).list(&all).await?;
    Ok(ApiStatus {
        reachable: true,
        why_not: None,
        version: Some(version),
        nodes: nodes.items.iter().map(node).collect(),
        components: components(client.clone()).await?,
        // A cluster without the operator has none.
        version_update: objects::version_updates(&client)
            .get_opt(VERSION_UPDATE)
            .await
            .ok()
            .flatten()
            .map(|update| UpdateStatus {
                status: objects::status_of(&update),
                spec: update.spec,
            }),
    })
}

fn node(node: &Node) -> NodeStatus {
    let status = node.status.as_ref();
    let conditions = status.and_then(|s| s.conditions.as_ref()).into_iter().flatten();
    NodeStatus {
        name: node.metadata.name.clone().unwrap_or_default(),
        ready: conditions.into_iter().any(|c| c.type_ == "Ready" && c.status == "True"),
        kubelet: status
            .and_then(|s| s.node_info.as_ref())
            .map(|i| i.kubelet_version.clone())
            .unwrap_or_default(),
    }
}

async fn components(client: Client) -> Result<Vec<ComponentStatus>> {
    let all = ListParams::default();
    let mut components = Vec::new();
    for set in Api::<DaemonSet>::namespaced(client.clone(), "kube-system")
        .list(&all)
        .await?
    {
        let status = set.status.unwrap_or_default();
        components.push(ComponentStatus {
            name: set.metadata.name.unwrap_or_default(),
            ready: status.number_ready,
            desired: status.desired_number_scheduled,
        });
    }
    for deployment in Api::<Deployment>::namespaced(client, "kube-system").list(&all).await? {
        components.push(ComponentStatus {
            name: deployment.metadata.name.unwrap_or_default(),
            ready: deployment.status.and_then(|s| s.ready_replicas).unwrap_or(0),
            desired: deployment.spec.and_then(|s| s.replicas).unwrap_or(1),
        });
    }
    Ok(components)
}

fn human(status: &Status) -> String {
    use std::fmt::Write as _;
    let Status {
        schema_version: _,
        name,
        provider,
        started_with,
        network,
        machines,
        api,
    } = status;
    let mut text = format!("cluster `{name}`");
    if let Some(provider) = provider {
        let _ = write!(text, " on provider `{provider}`");
    }
    if let Some(version) = started_with {
        let _ = write!(text, ", started with Kubernetes {version}");
    }
    text.push('\n');
    if let Some(network) = network {
        let state = if network.complete {
            ""
        } else {
            " (not complete; run `kprov up` to mend it)"
        };
        let _ = writeln!(text, "network {}, API at {}{state}", network.cidr, network.endpoint);
    }
    text.push('\n');
    if !machines.is_empty() {
        text.push_str(&print::table(
            &["machine", "role", "address", "state"],
            machines.iter().map(|m| {
                vec![
                    m.name.clone(),
                    m.role.clone(),
                    m.address.clone().unwrap_or_default(),
                    m.state.clone(),
                ]
            }),
        ));
        text.push('\n');
    }
    if let Some(why) = &api.why_not {
        let _ = writeln!(text, "the API can't be asked: {why}");
        return text;
    }
    let ready = |ready: bool| {
        if ready {
            "✔ ready".to_owned()
        } else {
            "✘ not ready".to_owned()
        }
    };
    text.push_str(&print::table(
        &["node", "state", "kubelet"],
        api.nodes
            .iter()
            .map(|n| vec![n.name.clone(), ready(n.ready), n.kubelet.clone()]),
    ));
    text.push('\n');
    text.push_str(&print::table(
        &["component", "ready"],
        api.components
            .iter()
            .map(|c| vec![c.name.clone(), format!("{}/{}", c.ready, c.desired)]),
    ));
    if let Some(version) = &api.version {
        let _ = write!(text, "\nthe API serves Kubernetes {version}\n");
    }
    if let Some(update) = &api.version_update {
        text.push_str(&upgrade(update));
    }
    text
}

/// How the cluster stands towards the version that is asked for.
fn upgrade(update: &UpdateStatus) -> String {
    use std::fmt::Write as _;
    let UpdateStatus { spec, status } = update;
    let unknown = || "unknown".to_owned();
    let mut text = format!(
        "version {}, asked for {}: {}",
        status.current_version.clone().unwrap_or_else(unknown),
        spec.desired_version,
        if status.phase.is_empty() {
            "waiting for the operator"
        } else {
            &status.phase
        }
    );
    if !status.message.is_empty() {
        let _ = write!(text, " ({})", status.message);
    }
    text.push('\n');
    for step in &status.steps {
        let _ = writeln!(
            text,
            "  ▸ {} (since {})",
            step.message,
            step.since.strftime("%H:%M:%SZ")
        );
    }
    for waiting in &status.waiting {
        let _ = writeln!(text, "  … waits for {}", waiting.message);
    }
    for finding in &status.findings {
        let symbol = if finding.blocks { "✘" } else { "!" };
        let _ = writeln!(
            text,
            "  {symbol} {}: {}\n      {}",
            finding.name, finding.message, finding.hint
        );
    }
    if let Some(failure) = &status.failure {
        let _ = writeln!(
            text,
            "  ✘ {} failed: {} `{}` {}",
            failure.release, failure.component, failure.instance, failure.message
        );
        for line in &failure.log {
            let _ = writeln!(text, "      {line}");
        }
    }
    for condition in status
        .conditions
        .iter()
        .filter(|c| c.kind == condition::DEGRADED && c.status == "True")
    {
        let _ = writeln!(text, "  ✘ {}", condition.message);
    }
    text
}
