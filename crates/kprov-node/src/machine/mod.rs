//! This machine's orders: taken from its Machine object, carried out level-triggered, and told of in the object's status.
//!
//! The object's spec is the operator's, its status this machine's ([`kprov_types::api::MachineSpec`]). Nothing here remembers
//! how far it came: [`decide`] looks at what is ordered and what is there. What must be remembered, since a start cannot see
//! it, is in three small files ([`disk`]). Without an API what was ordered last goes on, and nothing new begins.

pub mod control;
pub mod decide;
pub mod disk;
mod facts;
mod objects;
#[cfg(test)]
mod pull_tests;
mod report;
mod stage;
mod store;
mod switch;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use kprov_front::FrontState;
use kprov_types::api::MachineSpec;
use kprov_types::{Role, ports};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

pub use objects::Seen;
pub use report::Report;
pub use stage::{Stage, Stager, Stages, write_registries};
pub use switch::{Switch, TrialWatch, give_up, log_size, own_program};

use crate::config::Machine;
use crate::nodes::NodesSeen;
use crate::paths;
use crate::release::{self, Current, OnDisk};
use control::{ControlOrders, EtcdWork};
use decide::{Admission, RunSeen, RunStep, admit, decide_run, needed, stores};
use disk::{Disk, DiskError, Trial};

/// How long a release stays on disk that nothing needs any more.
const KEPT: Duration = Duration::from_hours(1);
/// How often to look for such.
const CLEAR: Duration = Duration::from_mins(5);
/// How often to look at the orders again without a reason.
const RESYNC: Duration = Duration::from_secs(30);

/// What the agent works with.
pub struct Agent {
    /// This machine.
    pub machine: Arc<Machine>,
    /// What it remembers.
    pub disk: Disk,
    /// The release that its programs are started from.
    pub current: Current,
    /// That release is being tried; the channel tells when no more.
    pub trial: watch::Receiver<Option<Trial>>,
    /// The container runtime.
    pub cri: crate::cri::Cri,
    /// What is known of Nodes.
    pub nodes: NodesSeen,
    /// What the front sees of API servers.
    pub front: watch::Receiver<FrontState>,
    /// How far the machine is.
    pub status: crate::status::Status,
    /// On a control-plane machine, once it is one: what its own orders are carried out with.
    pub control: watch::Receiver<Option<ControlParts>>,
    /// Asks for another release to be started.
    pub switch: mpsc::Sender<Switch>,
}

/// A control-plane machine's own parts.
#[derive(Clone)]
pub struct ControlParts {
    /// This machine as a member of the control plane.
    pub control_plane: crate::control_plane::ControlPlane,
    /// Its etcd member.
    pub member: crate::etcd::OwnMember,
    /// Whether the API server's standby has to run.
    pub serve: crate::standby::Serve,
}

impl Agent {
    /// Follows the machine's orders for as long as the process runs.
    pub async fn run(self) {
        let report = Report::default();
        let (seen, orders) = (watch::Sender::new(None), watch::Sender::new(None));
        let (stores, work) = (watch::Sender::new(Vec::new()), watch::Sender::default());
        let fetching = Stager::new(
            self.machine.clone(),
            self.cri.clone(),
            self.current.reference.clone(),
            stores.subscribe(),
        );
        let stages = fetching.watch();
        let name = self.machine.name.clone();
        let role = self.machine.config.role;
        report.set(|status| status.role = Some(role));
        let control_plane = async {
            if role == Role::ControlPlane {
                let releases = watch::Sender::new(None);
                let address = (self.machine.address, ports::RELEASE).into();
                let first = self.machine.config.release.digest.clone();
                tokio::join!(
                    store::run(address, first, releases.subscribe(), stages.clone()),
                    objects::watch_releases(releases),
                    facts::follow_api_servers(self.front.clone(), report.clone()),
                    self.follow_control_orders(&orders, &stages, &report, &work),
                );
            }
        };
        tokio::join!(
            objects::watch_machine(name.clone(), seen.clone()),
            objects::write_status(name, seen.subscribe(), report.clone()),
            facts::look(report.clone()),
            self.tell_programs(&report),
            self.follow_stores(&stores, &stages),
            self.clear(&orders, &stages),
            self.follow_orders(seen.subscribe(), &orders, fetching, &report, work.subscribe()),
            control_plane,
        );
    }

    async fn follow_control_orders(
        &self,
        orders: &watch::Sender<Option<Arc<MachineSpec>>>,
        stages: &watch::Receiver<Stages>,
        report: &Report,
        work: &watch::Sender<EtcdWork>,
    ) {
        let mut control = self.control.clone();
        let Ok(parts) = control.wait_for(Option::is_some).await.map(|parts| parts.clone()) else {
            return;
        };
        let Some(ControlParts {
            control_plane,
            member,
            serve,
        }) = parts
        else {
            return;
        };
        let orders = ControlOrders {
            control_plane,
            member,
            serve,
            cri: self.cri.clone(),
            front: self.front.clone(),
            orders: orders.subscribe(),
            stages: stages.clone(),
            report: report.clone(),
            work: work.clone(),
        };
        Box::pin(orders.run()).await;
    }

    /// Takes orders as they come, has releases fetched, and asks for a switch when all is ready for it. Never ends.
    async fn follow_orders(
        &self,
        mut seen: watch::Receiver<Option<Seen>>,
        orders: &watch::Sender<Option<Arc<MachineSpec>>>,
        mut fetching: Stager,
        report: &Report,
        mut work: watch::Receiver<EtcdWork>,
    ) {
        let (mut stages, mut trial, mut status) = (fetching.watch(), self.trial.clone(), self.status.watch());
        loop {
            let now = seen.borrow_and_update().clone();
            let known = now.is_some();
            if let Some(Seen { spec, status }) = now {
                // Until its releases are looked at again, what was told of them holds.
                if orders.borrow().is_none() {
                    report.set(|own| own.staged = status.map(|status| status.staged.clone()).unwrap_or_default());
                }
                match self.take(&spec, report) {
                    Ok(true) => {
                        orders.send_if_modified(|taken| {
                            let new = taken.as_ref() != Some(&spec);
                            *taken = Some(spec);
                            new
                        });
                        report.say("order", "");
                    }
                    Ok(false) => {}
                    Err(error) => report.say("order", crate::chain(&error)),
                }
            }
            let taken = orders.borrow().clone().unwrap_or_default();
            // Until then this machine has better things to do, and its own release is on its way already.
            if self.status.is_done() {
                let mut wanted = needed(&taken);
                wanted.insert(self.current.reference.clone());
                fetching.want(&wanted, taken.order);
            }
            trial.mark_unchanged();
            stages.mark_unchanged();
            status.mark_unchanged();
            work.mark_unchanged();
            let (releases, etcd) = (stages.borrow().clone(), work.borrow().clone());
            if let Err(error) = self.run_ordered(&taken, &releases, report, &etcd).await {
                report.say("run", crate::chain(&error));
            }
            if known {
                report.complete();
            }
            tokio::select! {
                Ok(()) = seen.changed() => {}
                Ok(()) = stages.changed() => {}
                Ok(()) = trial.changed() => {}
                Ok(()) = status.changed() => {}
                Ok(()) = work.changed() => {}
                () = tokio::time::sleep(RESYNC) => {}
            }
        }
    }

    /// Whether the machine takes these orders. Their number is on disk before anything is done about them.
    fn take(&self, spec: &MachineSpec, report: &Report) -> Result<bool, DiskError> {
        let highest = self.disk.order()?;
        let take = match admit(spec.order, highest) {
            Admission::Refuse => {
                report.say(
                    "order",
                    format!("order {} is refused: order {highest} was taken before", spec.order),
                );
                false
            }
            Admission::Taken => true,
            Admission::Take => {
                self.disk.set_order(spec.order)?;
                true
            }
        };
        report.set(|status| status.observed_order = highest.max(spec.order));
        Ok(take)
    }

    async fn run_ordered(
        &self,
        orders: &MachineSpec,
        stages: &Stages,
        report: &Report,
        etcd: &EtcdWork,
    ) -> Result<(), DiskError> {
        let trial = self.trial.borrow().clone();
        let failed = self.disk.failed()?;
        let running = trial
            .as_ref()
            .map_or(&self.current.reference, |trial| &trial.from)
            .clone();
        report.set(|status| {
            status.running = Some(running.clone());
            if !stages.is_empty() {
                status.staged = stage::report(stages);
            }
            let failures = failed.iter().map(|failed| &failed.failure).chain(&etcd.failure);
            // The later order's counts.
            status.failure = failures.max_by_key(|failure| failure.order).cloned();
        });
        let ordered = orders.run.as_ref();
        let step = decide_run(&RunSeen {
            ordered,
            running: Some(&running),
            trial: trial.is_some(),
            failed: failed.as_ref(),
            set_up: self.status.is_done(),
            staged: ordered.is_some_and(|run| stages.get(&run.release).is_some_and(|stage| stage.ready)),
            etcd_busy: etcd.busy,
        });
        let (RunStep::Switch, Some(ordered)) = (step, ordered) else {
            let release = ordered.map(|run| run.release.to_string()).unwrap_or_default();
            report.say(
                "run",
                match step {
                    RunStep::Wait(why) => format!("{release}: {why}"),
                    RunStep::Failed => format!("{release} was tried and did not work"),
                    RunStep::Done | RunStep::Switch => String::new(),
                },
            );
            return Ok(());
        };
        let trial = Trial {
            from: self.current.reference.clone(),
            from_directory: self.current.directory.file_name().unwrap_or_default().to_owned(),
            program: switch::own_program(),
            to: ordered.release.clone(),
            order: orders.order,
            since: ordered.since,
            timeout_seconds: ordered.timeout_seconds,
            // This is the first one.
            starts: 1,
        };
        if let Err(message) = switch::check_program(&paths::release(&trial.to)).await {
            let failed = trial.failed(message, Vec::new(), jiff::Timestamp::now());
            self.disk.set_failed(&failed)?;
            report.set(|status| status.failure = Some(failed.failure));
            return Ok(());
        }
        report.say("run", format!("switching to {}", trial.to));
        self.disk.set_trial(&trial)?;
        if self.switch.send(Switch::Try(trial)).await.is_ok() {
            // The process ends.
            std::future::pending::<()>().await;
        }
        Ok(())
    }

    async fn tell_programs(&self, report: &Report) {
        let containerd = crate::containerd::version_text(&self.current.directory).await;
        let own = tokio::task::spawn_blocking(switch::own_status).await.ok().flatten();
        report.set(|status| {
            status.containerd = containerd;
            status.kprov_node = own;
        });
    }

    /// Keeps the list of release stores as the Nodes have it, and containerd's registries as it and the Releases have them.
    async fn follow_stores(&self, into: &watch::Sender<Vec<String>>, stages: &watch::Receiver<Stages>) {
        let (mut nodes, mut stages) = (self.nodes.all.subscribe(), stages.clone());
        let config = &self.machine.config;
        loop {
            let now = stores(
                self.machine.name.as_str(),
                config.role,
                self.machine.address,
                &nodes.borrow_and_update(),
            );
            if nodes.borrow().values().any(|node| node.control_plane) {
                into.send_if_modified(|known| {
                    let changed = *known != now;
                    known.clone_from(&now);
                    changed
                });
                write_registries(&stages.borrow_and_update(), &now, &config.release);
            }
            tokio::select! {
                Ok(()) = nodes.changed() => {}
                Ok(()) = stages.changed() => {}
                else => return,
            }
        }
    }

    /// Removes releases from disk that nothing has needed for a while.
    async fn clear(&self, orders: &watch::Sender<Option<Arc<MachineSpec>>>, stages: &watch::Receiver<Stages>) {
        let mut unneeded = BTreeMap::new();
        let first = &self.machine.config.release.digest;
        loop {
            tokio::time::sleep(CLEAR).await;
            // Without orders nobody knows what will be needed.
            let Some(taken) = orders.borrow().clone() else {
                continue;
            };
            let mut keep: BTreeSet<_> = needed(&taken);
            keep.extend(stages.borrow().keys().cloned());
            keep.extend(
                self.trial
                    .borrow()
                    .iter()
                    .flat_map(|trial| [trial.from.clone(), trial.to.clone()]),
            );
            keep.extend(crate::standby::stored_release().ok().flatten());
            keep.insert(self.current.reference.clone());
            let all = OnDisk::all(paths::RELEASES.into(), first);
            unneeded.retain(|directory, _| all.iter().any(|on| on.directory == *directory));
            for on in all {
                if keep.contains(&on.reference) {
                    unneeded.remove(&on.directory);
                } else if unneeded
                    .entry(on.directory.clone())
                    .or_insert_with(Instant::now)
                    .elapsed()
                    >= KEPT
                {
                    match release::remove(&on.directory) {
                        Ok(()) => tracing::info!(directory = %on.directory, "a release that nothing needs is gone"),
                        Err(error) => tracing::warn!(error = crate::chain(&error), "a release stays"),
                    }
                }
            }
        }
    }
}
