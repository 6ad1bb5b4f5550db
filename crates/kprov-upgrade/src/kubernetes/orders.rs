//! Orders to machines: what a Machine's spec becomes. The decisions are pure.

use std::collections::BTreeSet;

use futures::{StreamExt as _, stream};
use jiff::Timestamp;
use kprov_types::MachineName;
use kprov_types::api::{MachineFailure, MachineSpec, MachineStatus, ReleaseRef, RunOrder, SnapshotOrder, StandbyOrder};
use kube::api::DynamicObject;
use serde::de::DeserializeOwned;
use serde_json::json;

use super::access::{Failure, Part};
use super::cache::MACHINES;
use super::{Effect, KubeCluster};
use crate::cluster::{ClusterError, Outcome};

/// Machines that are written to at the same time.
const AT_ONCE: usize = 16;

/// An order for one machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// Fetch a release. Of what was fetched earlier only what may be needed is kept: newer releases than `current`, and those
    /// that the machine runs or was told to run.
    Stage { release: ReleaseRef, current: ReleaseRef },
    /// Fetch a release no longer.
    Unstage { release: ReleaseRef },
    /// Take a snapshot.
    Snapshot { name: String },
    /// What the standby should be.
    Standby { release: ReleaseRef, serve: bool },
    /// What etcd should be.
    Etcd { to: ReleaseRef },
    /// What the machine should run.
    Run {
        from: Option<ReleaseRef>,
        to: ReleaseRef,
        since: Timestamp,
        timeout_seconds: u32,
    },
}

/// What an order comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Decision {
    /// The machine has it.
    Given,
    /// The machine is not as the order expects.
    Stale,
    /// Its spec becomes this one.
    Change(Box<MachineSpec>),
}

/// Decides what becomes of a machine's spec.
pub(super) fn decide(spec: &MachineSpec, status: &MachineStatus, order: &Order) -> Decision {
    let mut new = spec.clone();
    match order {
        Order::Stage { release, current } => {
            let running = status.running.as_ref();
            let ordered = [
                spec.run.as_ref().map(|run| &run.release),
                spec.etcd.as_ref(),
                spec.standby.as_ref().map(|standby| &standby.release),
                running,
                Some(current),
            ];
            let needed: BTreeSet<&ReleaseRef> = ordered.into_iter().flatten().collect();
            new.stage
                .retain(|r| r == release || needed.contains(r) || r.version > current.version);
            if !new.stage.contains(release) {
                new.stage.push(release.clone());
            }
        }
        Order::Unstage { release } => new.stage.retain(|staged| staged != release),
        Order::Snapshot { name } => new.snapshot = Some(SnapshotOrder { name: name.clone() }),
        Order::Standby { release, serve } => {
            new.standby = Some(StandbyOrder {
                release: release.clone(),
                serve: *serve,
            });
        }
        Order::Etcd { to } => new.etcd = Some(to.clone()),
        Order::Run {
            from,
            to,
            since,
            timeout_seconds,
        } => {
            let ordered = spec.run.as_ref().is_some_and(|run| run.release == *to);
            // One that went back by itself has done with its order, and tries again only for another.
            if ordered && went_back(spec, status).is_none() {
                return Decision::Given;
            }
            let running = status.running.as_ref();
            if running != from.as_ref() && running != Some(to) {
                return Decision::Stale;
            }
            new.run = Some(RunOrder {
                release: to.clone(),
                since: *since,
                timeout_seconds: *timeout_seconds,
            });
        }
    }
    if new == *spec {
        return Decision::Given;
    }
    new.order = spec.order.max(status.observed_order) + 1;
    Decision::Change(Box::new(new))
}

/// How a machine failed at an order that stands: to run a release, or its etcd. The machine tells which order it tried for;
/// orders about something else may have come since, so where it's known when the order was given, that counts too.
pub(super) fn went_back<'a>(spec: &MachineSpec, status: &'a MachineStatus) -> Option<&'a MachineFailure> {
    status.failure.as_ref().filter(|failure| {
        let run = spec.run.as_ref().filter(|run| run.release == failure.release);
        let etcd = spec.etcd.as_ref() == Some(&failure.release);
        let last = failure.order == spec.order;
        (run.is_some() || etcd) && last || run.is_some_and(|run| failure.time >= run.since)
    })
}

impl KubeCluster {
    /// Gives many machines the same order. All are given it before one that is stale, or the first failure, is told.
    pub(super) async fn order_all(
        &self,
        machines: impl IntoIterator<Item = MachineName>,
        order: &Order,
    ) -> Result<Outcome, ClusterError> {
        let orders = stream::iter(machines).map(async |machine| self.order(&machine, order).await);
        let effects: Vec<Result<Effect, ClusterError>> = orders.buffer_unordered(AT_ONCE).collect().await;
        let effects: Vec<Effect> = effects.into_iter().collect::<Result<_, _>>()?;
        Ok(if effects.contains(&Effect::Stale) {
            Outcome::Stale
        } else {
            Outcome::Done
        })
    }

    /// Gives an order, if the machine is as it expects.
    pub(super) async fn order(&self, machine: &MachineName, order: &Order) -> Result<Effect, ClusterError> {
        // Machines write their status whenever they like, which says nothing against the order.
        self.access.again(|| self.order_once(machine, order)).await
    }

    async fn order_once(&self, machine: &MachineName, order: &Order) -> Result<Effect, Failure> {
        let before = self
            .access
            .get(&MACHINES, machine.as_str())
            .await?
            .ok_or(Failure::Missing)?;
        let unreadable = |error: serde_json::Error| ClusterError::Refused {
            why: format!("Machine `{machine}` can't be read: {error}"),
        };
        let spec: MachineSpec = part(&before, "spec").map_err(unreadable)?;
        let status: MachineStatus = part(&before, "status").map_err(unreadable)?;
        let spec = match decide(&spec, &status, order) {
            Decision::Given => return Ok(Effect::Already),
            Decision::Stale => return Ok(Effect::Stale),
            Decision::Change(spec) => spec,
        };
        let mut after = serde_json::to_value(&before).unwrap_or_default();
        after["spec"] = json!(spec);
        self.access.change(&MACHINES, &before, &after, Part::Object).await?;
        Ok(Effect::Changed)
    }
}

/// A part of an object; the default where it's missing.
fn part<T: DeserializeOwned + Default>(object: &DynamicObject, name: &str) -> Result<T, serde_json::Error> {
    match object.data.get(name) {
        Some(value) if !value.is_null() => T::deserialize(value),
        _ => Ok(T::default()),
    }
}

#[cfg(test)]
mod tests {
    use kprov_types::Digest;

    use super::*;

    fn release(version: &str) -> ReleaseRef {
        ReleaseRef {
            version: version.parse().unwrap(),
            digest: Digest::from_bytes([u8::try_from(version.len()).unwrap(); 32]),
        }
    }

    fn at(second: u8) -> Timestamp {
        format!("2026-05-01T12:00:{second:02}Z").parse().unwrap()
    }

    fn run(from: Option<&str>, to: &str, second: u8) -> Order {
        Order::Run {
            from: from.map(release),
            to: release(to),
            since: at(second),
            timeout_seconds: 300,
        }
    }

    fn changed(decision: Decision) -> MachineSpec {
        match decision {
            Decision::Change(spec) => *spec,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn each_change_counts_beyond_all_that_the_machine_has_seen() {
        let status = MachineStatus {
            observed_order: 9,
            ..MachineStatus::default()
        };
        let spec = MachineSpec {
            order: 4,
            ..MachineSpec::default()
        };
        let order = Order::Snapshot { name: "s".into() };
        let new = changed(decide(&spec, &status, &order));
        assert_eq!(new.order, 10);
        assert_eq!(decide(&new, &status, &order), Decision::Given);
        let newer = changed(decide(
            &new,
            &MachineStatus::default(),
            &Order::Etcd { to: release("1.36.3") },
        ));
        assert_eq!(newer.order, 11);
        assert_eq!(newer.snapshot, new.snapshot);
    }

    #[test]
    fn a_run_order_expects_what_runs() {
        let status = MachineStatus {
            running: Some(release("1.35.6")),
            ..MachineStatus::default()
        };
        let spec = MachineSpec::default();
        for from in [Some("1.34.9"), None] {
            assert_eq!(decide(&spec, &status, &run(from, "1.36.3", 0)), Decision::Stale);
        }
        let ordered = changed(decide(&spec, &status, &run(Some("1.35.6"), "1.36.3", 0)));
        assert_eq!(ordered.run.as_ref().unwrap().since, at(0));
        // Again, while the machine is at it and after.
        assert_eq!(
            decide(&ordered, &status, &run(Some("1.35.6"), "1.36.3", 5)),
            Decision::Given
        );
        let done = MachineStatus {
            running: Some(release("1.36.3")),
            ..MachineStatus::default()
        };
        assert_eq!(
            decide(&ordered, &done, &run(Some("1.35.6"), "1.36.3", 5)),
            Decision::Given
        );
    }

    #[test]
    fn a_machine_that_went_back_is_asked_again_only_by_another_order() {
        let mut status = MachineStatus {
            running: Some(release("1.35.6")),
            ..MachineStatus::default()
        };
        let ordered = changed(decide(
            &MachineSpec::default(),
            &status,
            &run(Some("1.35.6"), "1.36.3", 0),
        ));
        let failure = |second| MachineFailure {
            release: release("1.36.3"),
            order: ordered.order,
            message: String::new(),
            log: Vec::new(),
            time: at(second),
        };
        status.observed_order = ordered.order;
        status.failure = Some(failure(3));
        let again = changed(decide(&ordered, &status, &run(Some("1.35.6"), "1.36.3", 9)));
        assert_eq!(
            (again.order, again.run.as_ref().unwrap().since),
            (ordered.order + 1, at(9))
        );
        // The old failure is not one of the new order.
        assert_eq!(
            decide(&again, &status, &run(Some("1.35.6"), "1.36.3", 10)),
            Decision::Given
        );
    }

    #[test]
    fn staging_drops_what_nobody_needs_any_more() {
        let mut spec = MachineSpec {
            stage: ["1.33.9", "1.34.10", "1.35.66", "1.36.333"].map(release).to_vec(),
            ..MachineSpec::default()
        };
        let status = MachineStatus {
            running: Some(release("1.34.10")),
            ..MachineStatus::default()
        };
        let order = Order::Stage {
            release: release("1.37.4444"),
            current: release("1.35.66"),
        };
        spec = changed(decide(&spec, &status, &order));
        assert_eq!(spec.stage, ["1.34.10", "1.35.66", "1.36.333", "1.37.4444"].map(release));
        assert_eq!(decide(&spec, &status, &order), Decision::Given);
        let no_longer = Order::Unstage {
            release: release("1.37.4444"),
        };
        let spec = changed(decide(&spec, &status, &no_longer));
        assert_eq!(spec.stage, ["1.34.10", "1.35.66", "1.36.333"].map(release));
        assert_eq!(decide(&spec, &status, &no_longer), Decision::Given);
    }
}
