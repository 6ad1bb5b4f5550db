//! This machine's front, and what it is told of other machines' API servers.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use kprov_front::{Front, FrontConfig, FrontError, FrontHandle, Handover, Listener};
use kprov_types::machine::Endpoint;
use kprov_types::node::Bundle;
use kprov_types::{Role, ports};
use tokio::sync::watch;

use crate::config::Machine;
use crate::nodes::Nodes;

/// Starts the front: on loopback, and on a control-plane machine on its own address and the virtual one too. Goes on with the connections of the
/// kprov-node that ran in this process before, if there was one.
pub fn start(machine: &Machine) -> Result<FrontHandle, FrontError> {
    let ca = machine.config.ca.clone();
    let config = match machine.config.role {
        Role::ControlPlane => {
            let addresses = [Some(machine.address), machine.config.virtual_address];
            let mut listeners: Vec<_> = addresses
                .into_iter()
                .flatten()
                .map(|address| Listener::machine(address.into()))
                .collect();
            listeners.push(Listener::control_plane_loopback());
            FrontConfig::control_plane(listeners, ca)
        }
        Role::Worker => FrontConfig::worker(vec![Listener::worker_loopback()], ca),
    };
    match Handover::take() {
        Ok(Some(handover)) => match Front::resume(config.clone(), handover) {
            Ok(front) => return Ok(front),
            Err(error) => tracing::error!(error = crate::chain(&error), "the front begins anew"),
        },
        Ok(None) => {}
        Err(error) => tracing::error!(%error, "the front begins anew"),
    }
    Front::start(config)
}

/// The other machines' API servers, best source first: the API's Nodes; the bundle's members; the cluster's endpoint, which
/// a control-plane machine does not use, since it may lead back to itself.
fn remotes(machine: &Machine, nodes: &Nodes, bundle: Option<&Bundle>, endpoint: &[SocketAddr]) -> Vec<SocketAddr> {
    let own = IpAddr::from(machine.address);
    let api = |address| SocketAddr::new(address, ports::API);
    let control_plane = nodes
        .values()
        .filter(|node| node.control_plane)
        .flat_map(|node| &node.addresses);
    let mut found: Vec<_> = control_plane.copied().collect();
    if found.is_empty() {
        found = bundle
            .into_iter()
            .flat_map(|b| &b.settings.members)
            .map(|m| m.address)
            .collect();
    }
    found.retain(|address| *address != own);
    match machine.config.role {
        Role::Worker if found.is_empty() => endpoint.to_vec(),
        _ => found.into_iter().map(api).collect(),
    }
}

/// Tells the front of other machines' API servers as they come and go. Never ends.
pub async fn follow(
    front: Arc<FrontHandle>,
    machine: Arc<Machine>,
    mut nodes: watch::Receiver<Arc<Nodes>>,
    mut bundle: watch::Receiver<Option<Arc<Bundle>>>,
) {
    let endpoint = match machine.config.role {
        Role::Worker => resolve(&machine.config.endpoint).await,
        Role::ControlPlane => Vec::new(),
    };
    loop {
        let found = {
            let (nodes, bundle) = (nodes.borrow_and_update(), bundle.borrow_and_update());
            remotes(&machine, &nodes, bundle.as_deref(), &endpoint)
        };
        front.set_remote_backends(found);
        let changed = tokio::select! {
            changed = nodes.changed() => changed,
            changed = bundle.changed() => changed,
        };
        if changed.is_err() {
            return;
        }
    }
}

async fn resolve(endpoint: &Endpoint) -> Vec<SocketAddr> {
    loop {
        match tokio::net::lookup_host((endpoint.host.as_str(), endpoint.port)).await {
            Ok(found) => return found.collect(),
            Err(error) => tracing::warn!(host = endpoint.host, %error, "the API endpoint cannot be resolved"),
        }
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nodes::NodeFacts;
    use crate::testing;

    fn node(last: u8, control_plane: bool) -> (String, NodeFacts) {
        let facts = NodeFacts {
            addresses: vec![[10, 0, 0, last].into()],
            control_plane,
            ..NodeFacts::default()
        };
        (format!("node-{last}"), facts)
    }

    #[test]
    fn the_best_source_counts_and_never_the_machine_itself() {
        let endpoint: Vec<SocketAddr> = vec!["10.0.0.100:6443".parse().unwrap()];
        let nodes: Nodes = [node(1, true), node(2, true), node(9, false)].into();
        let bundle = testing::bundle();
        let text = |found: Vec<SocketAddr>| found.iter().map(ToString::to_string).collect::<Vec<_>>();
        let control_plane = testing::machine();
        assert_eq!(
            text(remotes(&control_plane, &nodes, Some(&bundle), &[])),
            ["10.0.0.2:6443"]
        );
        assert!(remotes(&control_plane, &Nodes::new(), Some(&bundle), &[]).is_empty());
        let mut worker = testing::machine();
        worker.config.role = Role::Worker;
        worker.address = [10, 0, 0, 9].into();
        assert_eq!(remotes(&worker, &Nodes::new(), None, &endpoint), endpoint);
        assert_eq!(
            text(remotes(&worker, &nodes, None, &endpoint)),
            ["10.0.0.1:6443", "10.0.0.2:6443"]
        );
    }
}
