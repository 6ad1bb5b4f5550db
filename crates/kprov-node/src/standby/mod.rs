//! The standby control plane: static pods of the API server, controller-manager and scheduler that this machine places
//! when nobody else does their work, and takes away when somebody does.
//!
//! First boot and cold start are the same case: no API server answers anywhere. [`decide_api`] and [`decide_leader`] are
//! pure; times are given as durations that the caller has measured, so that no two clocks are compared.
//!
//! What makes it safe: an API server beside another does no harm, controller-manager and scheduler take turns by their
//! Leases. A standby that is placed needlessly costs memory; one that is missing costs the cluster. So placing asks for
//! patience, staggered by machine, and taking away asks for proof by the self-hosted instance itself.
//!
//! What is placed is on disk before it is needed ([`write`]), and is of the last release known to be good, which need not be the
//! one that runs. Beside that, the Lease of a leader that has ended here is given free, whichever revision it was ([`leading`]).

mod leading;
mod process;
mod run;
mod store;
#[cfg(test)]
mod tests;

use std::time::Duration;

use kprov_types::release::ImageComponent;

pub use process::{ControlProcess, control_processes, restart_control_processes};
pub use run::{STAGING, Standby, StandbyError};
pub use store::{Serve, StoreError, status, stored_release, write};

/// How long a self-hosted instance must have answered before it is relied on.
pub const SETTLED: Duration = Duration::from_secs(2);
/// How long no API server answers before the first control-plane machine places its standby in a cluster that has run
/// before; a container that is started again takes less.
pub const API_PATIENCE: Duration = Duration::from_secs(5);
/// What each further machine waits on top, so that usually one standby is enough.
pub const API_STAGGER: Duration = Duration::from_secs(10);
/// What each further machine waits at first boot, where the first one is to begin.
pub const FIRST_BOOT_STAGGER: Duration = Duration::from_mins(1);
/// What is added while this machine's own instance is starting: an API server may take this long.
pub const STARTING: Duration = Duration::from_secs(25);
/// How long a Lease goes without being renewed before its leader counts as lost: twice client-go's lease duration.
pub const LEASE_PATIENCE: Duration = Duration::from_secs(30);
/// What each further machine waits on top.
pub const LEASE_STAGGER: Duration = Duration::from_secs(15);
/// A Lease renewed within this time has a live leader (client-go's lease duration).
pub const LEASE_LIVE: Duration = Duration::from_secs(15);

/// The components that have a standby.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Component {
    /// kube-apiserver.
    ApiServer,
    /// kube-controller-manager.
    ControllerManager,
    /// kube-scheduler.
    Scheduler,
}

impl Component {
    /// All of them, in the order they are needed.
    pub const ALL: [Self; 3] = [Self::ApiServer, Self::ControllerManager, Self::Scheduler];

    /// The image it runs from.
    pub const fn image(self) -> ImageComponent {
        match self {
            Self::ApiServer => ImageComponent::KubeApiserver,
            Self::ControllerManager => ImageComponent::KubeControllerManager,
            Self::Scheduler => ImageComponent::KubeScheduler,
        }
    }

    /// Its name, which is its Lease's too.
    pub const fn as_str(self) -> &'static str {
        self.image().as_str()
    }
}

/// This machine's self-hosted instance of a component (a revision above the standby's).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SelfHosted {
    /// No process listens.
    Absent,
    /// A process listens and is not ready.
    Starting,
    /// It has answered that it is ready for this long.
    Ready(Duration),
}

/// What to do with a standby's static pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Leave it as it is.
    Keep,
    /// Put its manifest where kubelet finds it.
    Place,
    /// Take its manifest away.
    Remove,
}

/// What is known for the API server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is one independent fact that was seen"
)]
pub struct ApiSeen {
    /// The standby's manifest is placed.
    pub placed: bool,
    /// This machine has not seen the cluster's self-hosted control plane yet.
    pub first_boot: bool,
    /// This machine's place among the control-plane machines, from 0.
    pub index: u32,
    /// The standby could run: its image is here and this machine's etcd has a leader (or is its only member, and starts).
    pub able: bool,
    /// It was ordered to run beside the self-hosted one.
    pub serve: bool,
    /// This machine's self-hosted API server.
    pub self_hosted: SelfHosted,
    /// How long no API server has answered, here or on another machine; `None` while one does, or is only slow.
    pub silent: Option<Duration>,
}

/// Decides on the API server's standby.
pub fn decide_api(seen: &ApiSeen) -> Action {
    let ApiSeen {
        placed,
        first_boot,
        index,
        able,
        serve,
        self_hosted,
        silent,
    } = *seen;
    if placed {
        // The front sends new connections to the highest revision that is ready, which is no longer the standby's.
        return match self_hosted {
            SelfHosted::Ready(since) if since >= SETTLED && !serve => Action::Remove,
            _ => Action::Keep,
        };
    }
    if serve && able {
        return Action::Place;
    }
    let patience = match (first_boot, self_hosted) {
        (true, _) => FIRST_BOOT_STAGGER * index,
        (false, SelfHosted::Starting) => API_PATIENCE + API_STAGGER * index + STARTING,
        (false, _) => API_PATIENCE + API_STAGGER * index,
    };
    match silent {
        Some(silent) if able && silent >= patience => Action::Place,
        _ => Action::Keep,
    }
}

/// A leader's Lease as this machine has watched it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeaseSeen {
    /// It was not read, or could not be.
    Unknown,
    /// There is none, or nobody holds it, for this long.
    Free(Duration),
    /// Somebody holds it.
    Held {
        /// The holder runs on this machine.
        here: bool,
        /// How long it has not been renewed.
        quiet: Duration,
        /// How long this holder has had it.
        held: Duration,
    },
}

/// What is known for a component that is led by Lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is one independent fact that was seen"
)]
pub struct LeaderSeen {
    /// The standby's manifest is placed.
    pub placed: bool,
    /// This machine has not seen the cluster's self-hosted control plane yet.
    pub first_boot: bool,
    /// This machine's place among the control-plane machines, from 0.
    pub index: u32,
    /// The standby's image is here.
    pub able: bool,
    /// An API server process of this machine listens, ready or not.
    pub api_listens: bool,
    /// How long an API server has answered; `None` while none does.
    pub api: Option<Duration>,
    /// This machine's self-hosted instance.
    pub self_hosted: SelfHosted,
    /// The component's Lease.
    pub lease: LeaseSeen,
}

/// Decides on the standby of the controller-manager or the scheduler.
pub fn decide_leader(seen: &LeaderSeen) -> Action {
    let LeaderSeen {
        placed,
        first_boot,
        index,
        able,
        api_listens,
        api,
        self_hosted,
        lease,
    } = *seen;
    if placed {
        return match (self_hosted, lease) {
            (SelfHosted::Ready(since), _) if since >= SETTLED => Action::Remove,
            // Another machine leads and has done so for a while: this standby only waits beside it.
            (
                _,
                LeaseSeen::Held {
                    here: false,
                    quiet,
                    held,
                },
            ) if quiet < LEASE_LIVE && held >= LEASE_PATIENCE => Action::Remove,
            _ => Action::Keep,
        };
    }
    if !able || matches!(self_hosted, SelfHosted::Ready(_)) {
        return Action::Keep;
    }
    let begins = first_boot && index == 0;
    let Some(answering) = api else {
        // It starts beside the API server that it will wait for; its own patience (10 s) is longer than that takes.
        return if begins && api_listens {
            Action::Place
        } else {
            Action::Keep
        };
    };
    let starting = if self_hosted == SelfHosted::Starting {
        STARTING
    } else {
        Duration::ZERO
    };
    let patience = LEASE_PATIENCE + LEASE_STAGGER * index + starting;
    let leaderless = match lease {
        // In a new cluster the first machine begins; there can be no other leader yet, nor the right to look for one.
        LeaseSeen::Free(_) | LeaseSeen::Unknown if begins => return Action::Place,
        LeaseSeen::Unknown => return Action::Keep,
        LeaseSeen::Free(since) => since.min(answering),
        LeaseSeen::Held { quiet, .. } => quiet.min(answering),
    };
    if leaderless >= patience {
        Action::Place
    } else {
        Action::Keep
    }
}
