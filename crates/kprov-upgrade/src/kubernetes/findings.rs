//! Asking preflight: in the background, not more often than needed, and only while its word counts.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use kprov_types::Role;
use kprov_types::api::{Finding, ReleaseRef};
use kube::Client;
use tokio::sync::Mutex;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::KubeCluster;
use super::cache::Cache;
use super::facts::role;
use super::observe;
use super::resources::Taint;
use crate::model::Input;
use crate::plan::{self, Waiting};
use crate::preflight::{self, Hop, Inputs, NodeSeen};

/// How long findings count as fresh while nothing has begun.
const FRESH: Duration = Duration::from_secs(15);
/// How long they count once a hop has begun, and only machines fetch a release.
const BEGUN: Duration = Duration::from_mins(2);
/// When it's asked again after it could not be.
const RETRY: Duration = Duration::from_secs(5);

/// Makes a client of one API server.
pub(super) type Connect = Arc<dyn Fn(IpAddr) -> Option<Client> + Send + Sync>;

/// What was found last.
#[derive(Debug)]
struct Found {
    /// The hops it's about.
    hops: Vec<ReleaseRef>,
    at: Instant,
    /// `None`: it could not be asked.
    findings: Option<Vec<Finding>>,
}

/// What was found, and the question that is under way.
#[derive(Debug, Default)]
pub(super) struct Asking {
    found: Arc<Mutex<Option<Found>>>,
    task: Mutex<Option<JoinHandle<()>>>,
}

impl Drop for Asking {
    fn drop(&mut self) {
        if let Some(task) = self.task.get_mut() {
            task.abort();
        }
    }
}

impl KubeCluster {
    /// The findings that a picture needs, if any are known; asks for them in the background where they aren't, or are old.
    /// `wait`: until there is an answer.
    pub(super) async fn findings(&self, input: &Input, wait: bool) -> Option<Vec<Finding>> {
        let plan = plan::plan(input);
        // The planner says whether it needs them.
        if !plan.waiting.iter().any(|w| matches!(w, Waiting::Preflight { .. })) {
            return None;
        }
        let fresh = if input.observed.hop_started.is_some() {
            BEGUN
        } else {
            FRESH
        };
        let known = {
            let found = self.asking.found.lock().await;
            let known = found.as_ref().filter(|found| found.hops == plan.hops);
            known.map(|found| (found.at.elapsed(), found.findings.clone()))
        };
        match known {
            Some((age, Some(findings))) if age < fresh => return Some(findings),
            Some((age, None)) if age < RETRY => return None,
            _ => {}
        }
        self.ask(input, &plan.hops, wait).await;
        if wait {
            let found = self.asking.found.lock().await;
            return found.as_ref().and_then(|found| found.findings.clone());
        }
        // Meanwhile the old word counts.
        known.and_then(|(_, findings)| findings)
    }

    async fn ask(&self, input: &Input, hops: &[ReleaseRef], wait: bool) {
        let mut task = self.asking.task.lock().await;
        if task.as_ref().is_some_and(|task| !task.is_finished()) {
            return;
        }
        let Some(inputs) = self.inputs(input, hops) else { return };
        let (client, found, cache) = (
            self.access.client.clone(),
            Arc::clone(&self.asking.found),
            Arc::clone(&self.cache),
        );
        let api_servers = self.api_servers();
        let hops = hops.to_vec();
        let question = async move {
            let asked = if api_servers.is_empty() {
                preflight::run(&client, &inputs).await
            } else {
                preflight::run_on(&client, &api_servers, &inputs).await
            };
            let findings = asked
                .inspect_err(|error| tracing::warn!(%error, "preflight could not be asked"))
                .ok();
            *found.lock().await = Some(Found {
                hops,
                at: Instant::now(),
                findings,
            });
            Cache::poke(&cache);
        };
        if wait {
            question.await;
        } else {
            *task = Some(tokio::spawn(question));
        }
    }

    /// `None` where a release on the way is not verified, which the planner says itself.
    fn inputs(&self, input: &Input, hops: &[ReleaseRef]) -> Option<Inputs> {
        let hops: Result<Vec<Hop>, _> = hops
            .iter()
            .map(|release| {
                let manifest = self.manifest(release)?;
                Ok::<_, crate::ClusterError>(Hop {
                    release: release.clone(),
                    manifest,
                })
            })
            .collect();
        let (mut nodes, mut machines) = (BTreeMap::new(), BTreeMap::new());
        for (name, node, machine) in observe::machines(&self.cache.facts()) {
            let seen = NodeSeen {
                role: role(node, machine),
                ready: node.ready,
                closed: node.cordoned || node.taints.iter().any(Taint::repels),
                kubelet: node.kubelet.clone(),
            };
            nodes.insert(name.clone(), seen);
            if let Some(status) = machine.and_then(|m| m.status.clone()) {
                machines.insert(name, status);
            }
        }
        Some(Inputs {
            current: input.observed.current.clone(),
            hops: hops.ok()?,
            machines,
            nodes,
            now: Timestamp::now(),
        })
    }

    /// A client of each API server, where they can be told apart.
    fn api_servers(&self) -> Vec<Client> {
        let Some(connect) = &self.connect else {
            return Vec::new();
        };
        let facts = self.cache.facts();
        let control_plane = observe::machines(&facts).filter(|(_, node, m)| role(node, *m) == Role::ControlPlane);
        let addresses = control_plane.filter_map(|(_, node, _)| node.address);
        addresses.filter_map(|address| connect(address)).collect()
    }
}
