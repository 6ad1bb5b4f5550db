//! The orders that only a control-plane machine gets: its etcd member, its standby, snapshots and restores.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use kprov_front::FrontState;
use kprov_types::Release;
use kprov_types::api::{MachineFailure, MachineSpec, ReleaseRef};
use kprov_types::node::ControlPlaneSettings;
use tokio::sync::watch;

use super::report::Report;
use super::stage::Stages;
use crate::control_plane::{ControlPlane, with_release};
use crate::cri::Cri;
use crate::etcd::{OwnMember, RunError};
use crate::standby::{self, Serve};

/// How often to look again while something is being done, and while all is well.
const BUSY: Duration = Duration::from_secs(1);
const CALM: Duration = Duration::from_secs(5);

/// What is being done to this machine's etcd member.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EtcdWork {
    /// Something is.
    pub busy: bool,
    /// The release that it was ordered to run from and did not work with.
    pub failure: Option<MachineFailure>,
}

/// What the orders are carried out with.
#[derive(Clone)]
pub struct ControlOrders {
    /// This machine as a member of the control plane.
    pub control_plane: ControlPlane,
    /// Its etcd member.
    pub member: OwnMember,
    /// Whether the API server's standby has to run.
    pub serve: Serve,
    /// The container runtime.
    pub cri: Cri,
    /// What the front sees of API servers.
    pub front: watch::Receiver<FrontState>,
    /// The orders that were taken.
    pub orders: watch::Receiver<Option<Arc<MachineSpec>>>,
    /// The releases on this machine.
    pub stages: watch::Receiver<Stages>,
    /// What is told.
    pub report: Report,
    /// What is being done to etcd.
    pub work: watch::Sender<EtcdWork>,
}

impl ControlOrders {
    /// Carries the orders out as they come. Never ends.
    pub async fn run(self) {
        tokio::join!(
            self.clone().keep_standby(),
            self.clone().keep_etcd(),
            self.clone().keep_snapshots(),
            self.clone().restore(),
            self.tell(),
        );
    }

    /// The cluster's settings with an ordered release, once all of it is on this machine.
    fn settings(&self, ordered: &ReleaseRef) -> Option<ControlPlaneSettings> {
        let stages = self.stages.borrow();
        let stage = stages.get(ordered).filter(|stage| stage.ready)?;
        let release: &Release = stage.release.as_ref()?;
        Some(with_release(self.control_plane.settings(), release, &ordered.digest))
    }

    /// Waits until there may be something to do: the orders or the releases are others, or `pause` is over.
    async fn next(&mut self, pause: Duration) {
        tokio::select! {
            Ok(()) = self.orders.changed() => {}
            Ok(()) = self.stages.changed() => {}
            () = tokio::time::sleep(pause) => {}
        }
    }

    fn orders(&mut self) -> Option<Arc<MachineSpec>> {
        self.stages.mark_unchanged();
        self.orders.borrow_and_update().clone()
    }

    async fn keep_standby(mut self) {
        loop {
            let mut pause = CALM;
            if let Some(orders) = self.orders() {
                let ordered = orders.standby.as_ref();
                let written = match ordered.map(|o| (o, self.settings(&o.release))) {
                    None => Ok(true),
                    Some((_, Some(settings))) => standby::write(&settings, &self.control_plane.me).map(|_| true),
                    Some((_, None)) => Ok(false),
                };
                match written {
                    Ok(true) => match self.serve.set(ordered.is_some_and(|o| o.serve)) {
                        Ok(()) => self.report.say("standby", ""),
                        Err(error) => self.report.say("standby", crate::chain(&error)),
                    },
                    Ok(false) => self.report.say("standby", "the standby waits for its release"),
                    Err(error) => {
                        self.report.say("standby", crate::chain(&error));
                        pause = BUSY;
                    }
                }
                self.tell_standby();
            }
            self.next(pause).await;
        }
    }

    async fn keep_etcd(mut self) {
        loop {
            let mut pause = CALM;
            let orders = self.orders().unwrap_or_default();
            let settings = orders.etcd.as_ref().map(|release| (release, self.settings(release)));
            let (failure, message) = match settings {
                None => (None, String::new()),
                Some((_, None)) => (None, "etcd waits for its release".into()),
                Some((release, Some(settings))) => {
                    self.work.send_modify(|work| work.busy = true);
                    let done = self.member.run(&settings, &self.cri).await;
                    self.tell_etcd().await;
                    match done {
                        Ok(()) => (None, String::new()),
                        Err(RunError::Wait(why)) => {
                            pause = BUSY;
                            (None, why)
                        }
                        Err(RunError::Failed(why)) => (Some(self.failure(release, orders.order, why.clone())), why),
                    }
                }
            };
            self.report.say("etcd", message);
            self.work.send_if_modified(|work| {
                let now = EtcdWork { busy: false, failure };
                std::mem::replace(work, now.clone()) != now
            });
            self.next(pause).await;
        }
    }

    /// What is told of a release that etcd did not work with, for the order that stands. Its time is when that was first seen.
    fn failure(&self, release: &ReleaseRef, order: u64, message: String) -> MachineFailure {
        let known = self.work.borrow().failure.clone();
        let known = known.filter(|known| known.release == *release && known.message == message);
        MachineFailure {
            release: release.clone(),
            order,
            message,
            log: Vec::new(),
            time: known.map_or_else(Timestamp::now, |known| known.time),
        }
    }

    async fn keep_snapshots(mut self) {
        loop {
            let mut pause = CALM;
            if let Some(order) = self.orders().and_then(|orders| orders.snapshot.clone())
                && !self.member.snapshots().iter().any(|s| s.name == order.name)
            {
                self.report
                    .say("snapshot", format!("taking the snapshot `{}`", order.name));
                match self.member.snapshot(&order.name).await {
                    Ok(_) => self.report.say("snapshot", ""),
                    Err(error) => {
                        self.report.say("snapshot", crate::chain(&error));
                        pause = BUSY;
                    }
                }
            } else {
                self.report.say("snapshot", "");
            }
            let now = self.member.snapshots();
            self.report.set(|status| status.snapshots = now);
            self.next(pause).await;
        }
    }

    async fn restore(mut self) {
        loop {
            let order = self.orders().and_then(|orders| orders.restore.clone());
            let ordered = order.map_or(Ok(()), |order| self.member.order_restore(&order));
            let (done, message) = self.member.restored();
            let failed = ordered.err().map(|error| crate::chain(&error));
            self.report.say("restore", failed.or(message).unwrap_or_default());
            self.report.set(|status| status.restored = done);
            self.next(BUSY).await;
        }
    }

    /// Tells how etcd and the standby are, as they change by themselves.
    async fn tell(mut self) {
        loop {
            self.tell_standby();
            self.tell_etcd().await;
            let calm = !self.work.borrow().busy;
            tokio::select! {
                () = tokio::time::sleep(if calm { CALM } else { BUSY }) => {}
                changed = self.front.changed() => if changed.is_err() { return },
            }
        }
    }

    fn tell_standby(&self) {
        let now = standby::status(&self.front.borrow());
        self.report.set(|status| status.standby = now);
    }

    async fn tell_etcd(&self) {
        let now = self.member.status().await;
        self.report.set(|status| status.etcd = Some(now));
    }
}
