//! What has to be there whether or not an upgrade is under way: a Machine for each Node, the addresses of Service
//! `kubernetes`, the word on each Release, and on VersionUpdates that nobody looks at.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use futures::{StreamExt as _, stream};
use jiff::Timestamp;
use kprov_bootstrap::manifests;
use kprov_bootstrap::versions::Features;
use kprov_types::api::{Condition, MachineSpec, VERSION_UPDATE, VersionUpdateStatus, condition};
use kprov_types::{MachineName, Minor, Role};
use kube::Api;
use kube::api::{DynamicObject, PostParams};
use kube::core::{ApiResource, GroupVersionKind};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::KubeCluster;
use super::access::Failure;
use super::cache::{Facts, RELEASES, UPDATES};
use super::facts::role;
use super::observe::{self, api_server_answers};
use super::resources::{core, machines as machine_kind};
use super::status::set_condition;
use crate::cluster::ClusterError;

/// Nobody else writes the addresses of Service `kubernetes`; should somebody, they're put right after this time.
const AGAIN: Duration = Duration::from_mins(1);

/// Machines that are made at the same time.
const AT_ONCE: usize = 16;

/// The addresses that were written last, and when.
#[derive(Debug, Default)]
pub(super) struct Endpoints {
    written: Option<(Vec<IpAddr>, Instant)>,
}

/// The addresses of control-plane machines whose front leads to an API server that is ready.
fn addresses(facts: &Facts) -> Vec<IpAddr> {
    let control_plane =
        observe::machines(facts).filter(|(_, node, machine)| role(node, *machine) == Role::ControlPlane);
    let serving = control_plane.filter(|(name, _, _)| api_server_answers(facts, name));
    serving.filter_map(|(_, node, _)| node.address).collect()
}

/// Nodes without a Machine, with their uid.
fn without_machine(facts: &Facts) -> BTreeMap<MachineName, String> {
    let missing = observe::machines(facts).filter(|(_, _, machine)| machine.is_none());
    missing
        .filter_map(|(name, _, _)| {
            let uid = facts.nodes.entry(name.as_str())?.uid.clone();
            Some((name, uid))
        })
        .collect()
}

/// What a VersionUpdate of another name is told.
fn not_in_charge(name: &str, status: &VersionUpdateStatus, generation: i64, now: Timestamp) -> VersionUpdateStatus {
    let mut new = VersionUpdateStatus {
        observed_generation: generation,
        phase: "Blocked".into(),
        message: format!("only the VersionUpdate `{VERSION_UPDATE}` counts"),
        conditions: status.conditions.clone(),
        ..VersionUpdateStatus::default()
    };
    let condition = Condition {
        kind: condition::PROGRESSING.into(),
        status: "False".into(),
        reason: "NotInCharge".into(),
        message: format!(
            "only the VersionUpdate `{VERSION_UPDATE}` counts; delete `{name}` and edit that one (`kubectl edit versionupdate {VERSION_UPDATE}`)"
        ),
        last_transition_time: now,
        observed_generation: Some(generation),
    };
    set_condition(&mut new.conditions, condition);
    new
}

fn rbac(kind: &str, plural: &str) -> ApiResource {
    ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk("rbac.authorization.k8s.io", "v1", kind), plural)
}

impl KubeCluster {
    /// Keeps in being what has to be there at all times. The operator calls it before each pass; of several things that fail,
    /// the first is told, after all others were tried.
    ///
    /// # Errors
    ///
    /// As [`Cluster::act`](crate::Cluster::act).
    pub async fn ensure(&self) -> Result<(), ClusterError> {
        if !self.access.may_write() {
            return Err(ClusterError::NotLeading);
        }
        let results = [
            self.ensure_endpoints().await,
            self.ensure_machines().await,
            self.ensure_releases().await,
            self.ensure_surge().await,
            self.ensure_others().await,
        ];
        results.into_iter().collect()
    }

    async fn ensure_machines(&self) -> Result<(), ClusterError> {
        let missing = without_machine(&self.cache.facts());
        let machines = stream::iter(missing).map(async |(name, uid)| self.make_machine(&name, &uid).await);
        let made: Vec<Result<(), ClusterError>> = machines.buffer_unordered(AT_ONCE).collect().await;
        made.into_iter().collect()
    }

    async fn make_machine(&self, name: &MachineName, uid: &str) -> Result<(), ClusterError> {
        let owner = json!([{ "apiVersion": "v1", "kind": "Node", "name": name, "uid": uid }]);
        // The rights come first: the Machine shows that they are there.
        for mut object in manifests::machine_access(name) {
            object["metadata"]["ownerReferences"] = owner.clone();
            let resource = match object["kind"].as_str() {
                Some("ClusterRole") => rbac("ClusterRole", "clusterroles"),
                _ => rbac("ClusterRoleBinding", "clusterrolebindings"),
            };
            self.access.apply(&resource, &object).await?;
        }
        let resource = machine_kind();
        let object = json!({
            "apiVersion": resource.api_version,
            "kind": resource.kind,
            "metadata": { "name": name, "ownerReferences": owner },
            "spec": MachineSpec::default(),
        });
        let object: DynamicObject =
            serde_json::from_value(object).map_err(|error| ClusterError::Refused { why: error.to_string() })?;
        let api: Api<DynamicObject> = Api::all_with(self.access.client.clone(), &resource);
        match self.access.write(api.create(&PostParams::default(), &object)).await {
            // Somebody was faster.
            Ok(_) | Err(Failure::Conflict) => Ok(()),
            Err(failure) => Err(failure.into()),
        }
    }

    /// Service `kubernetes` leads to the machines whose API answers; if none does, to those that did last.
    async fn ensure_endpoints(&self) -> Result<(), ClusterError> {
        let addresses = addresses(&self.cache.facts());
        let mut endpoints = self.endpoints.lock().await;
        let fresh = endpoints
            .written
            .as_ref()
            .is_some_and(|(written, at)| *written == addresses && at.elapsed() < AGAIN);
        if addresses.is_empty() || fresh {
            return Ok(());
        }
        let minor = self.lowest_minor().unwrap_or(kprov_bootstrap::versions::OLDEST);
        let features = features(minor)?;
        self.access
            .apply(&core("Endpoints", "endpoints"), &manifests::api_endpoints(&addresses))
            .await?;
        let slice: Value = manifests::api_endpoint_slice(&addresses, &features);
        let (group, version) = slice["apiVersion"]
            .as_str()
            .and_then(|v| v.split_once('/'))
            .unwrap_or_default();
        let kind = GroupVersionKind::gvk(group, version, "EndpointSlice");
        let resource = ApiResource::from_gvk_with_plural(&kind, "endpointslices");
        self.access.apply(&resource, &slice).await?;
        tracing::debug!(?addresses, "Service `kubernetes` leads to these machines");
        endpoints.written = Some((addresses, Instant::now()));
        Ok(())
    }

    async fn ensure_releases(&self) -> Result<(), ClusterError> {
        for (name, checked) in self.checked() {
            let status = checked.status();
            let told = self.cache.facts().releases.get(&name).and_then(|r| r.status.clone());
            if told.as_ref() != Some(&status) {
                self.access.set_status(&RELEASES, &name, &status).await?;
            }
        }
        Ok(())
    }

    async fn ensure_others(&self) -> Result<(), ClusterError> {
        let others: Vec<(String, VersionUpdateStatus)> = {
            let facts = self.cache.facts();
            let others = facts.updates.iter().filter(|(name, _)| *name != VERSION_UPDATE);
            others
                .filter_map(|(name, update)| {
                    let status = not_in_charge(name, &update.status, update.generation, Timestamp::now());
                    (status != update.status).then(|| (name.to_owned(), status))
                })
                .collect()
        };
        for (name, status) in others {
            self.access.set_status(&UPDATES, &name, &status).await?;
        }
        Ok(())
    }
}

fn features(minor: Minor) -> Result<Features, ClusterError> {
    Features::of(minor).map_err(|error| ClusterError::Refused { why: error.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn others_are_told_once() {
        let at = |second: i64| Timestamp::from_second(second).unwrap();
        let first = not_in_charge("other", &VersionUpdateStatus::default(), 3, at(5));
        assert_eq!(first.conditions[0].reason, "NotInCharge");
        assert!(first.conditions[0].message.contains("`cluster`"));
        assert_eq!(not_in_charge("other", &first, 3, at(9)), first);
    }
}
