//! The pure part: what is missing, what is waited for, what is too much.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use ipnet::Ipv4Net;
use kprov_types::MachineName;
use kprov_types::machine::{DiskSpec, Machine, MachineSpec, MachineState, NetworkSpec, Observed};

/// What should be there in the end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Goal {
    /// These things, at least.
    Present(Wanted),
    /// Nothing at all.
    Nothing,
}

/// The things a cluster consists of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Its network.
    pub network: NetworkSpec,
    /// Its data disks.
    pub disks: Vec<DiskSpec>,
    /// Its machines.
    pub machines: Vec<MachineSpec>,
}

/// One call to a provider. Each is an ensure, so performing it twice is harmless.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Make, or mend, network and endpoint.
    EnsureNetwork(NetworkSpec),
    /// Make data disks.
    EnsureDisks(Vec<DiskSpec>),
    /// Make machines, or start those that are stopped.
    EnsureMachines(Vec<MachineSpec>),
    /// Remove machines.
    RemoveMachines(Vec<MachineName>),
    /// Remove data disks and what is on them.
    RemoveDisks(Vec<MachineName>),
    /// Remove network and endpoint.
    RemoveNetwork,
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |f: &mut fmt::Formatter<'_>, what: &str, names: &mut dyn Iterator<Item = &MachineName>| {
            let names: Vec<_> = names.map(MachineName::as_str).collect();
            write!(f, "{what} {}", names.join(", "))
        };
        match self {
            Self::EnsureNetwork(spec) => match spec.cidr {
                Some(cidr) => write!(f, "make network {cidr} and the API endpoint"),
                None => f.write_str("make a network in a free range and the API endpoint"),
            },
            Self::EnsureDisks(disks) => list(f, "make data disks for", &mut disks.iter().map(|d| &d.machine)),
            Self::EnsureMachines(machines) => list(f, "start machines", &mut machines.iter().map(|m| &m.name)),
            Self::RemoveMachines(names) => list(f, "remove machines", &mut names.iter()),
            Self::RemoveDisks(names) => list(f, "remove data disks of", &mut names.iter()),
            Self::RemoveNetwork => f.write_str("remove network and API endpoint"),
        }
    }
}

/// What holds progress back without being an error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Waiting {
    /// The machine is being made, or has no address yet.
    Pending(MachineName),
    /// The machine is being removed.
    Terminating(MachineName),
}

/// What to do next, and what not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct Plan {
    /// Calls to make, in this order.
    pub actions: Vec<Action>,
    /// What is waited for once there is nothing to do.
    pub waiting: Vec<Waiting>,
    /// Machines of the cluster that nobody asked for; they are left alone.
    pub surplus: Vec<MachineName>,
}

impl Plan {
    /// Whether the goal is reached.
    pub fn is_done(&self) -> bool {
        self.actions.is_empty() && self.waiting.is_empty()
    }
}

/// What no action can mend.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// The network is there with another range.
    #[error("the cluster's network is `{observed}`, not `{wanted}`; the range of a network can't be changed")]
    OtherNetwork {
        /// What is there.
        observed: Ipv4Net,
        /// What was asked for.
        wanted: Ipv4Net,
    },
    /// A machine will never run.
    #[error("machine `{machine}` has failed: {reason}")]
    MachineFailed {
        /// The machine.
        machine: MachineName,
        /// Why, in the provider's words.
        reason: String,
    },
}

/// The difference between what is wanted and what is there.
pub fn plan(goal: &Goal, observed: &Observed) -> Result<Plan, PlanError> {
    match goal {
        Goal::Present(wanted) => present(wanted, observed),
        Goal::Nothing => Ok(nothing(observed)),
    }
}

fn present(wanted: &Wanted, observed: &Observed) -> Result<Plan, PlanError> {
    let mut plan = Plan::default();
    if let (Some(wanted), Some(network)) = (wanted.network.cidr, &observed.network)
        && wanted != network.cidr
    {
        return Err(PlanError::OtherNetwork {
            observed: network.cidr,
            wanted,
        });
    }
    if !observed.network.as_ref().is_some_and(|n| n.complete) {
        plan.actions.push(Action::EnsureNetwork(wanted.network.clone()));
    }

    let disks: BTreeSet<&MachineName> = observed.disks.iter().map(|d| &d.machine).collect();
    let missing: Vec<_> = wanted
        .disks
        .iter()
        .filter(|d| !disks.contains(&d.machine))
        .cloned()
        .collect();
    if !missing.is_empty() {
        plan.actions.push(Action::EnsureDisks(missing));
    }

    let machines: BTreeMap<&MachineName, &Machine> = observed.machines.iter().map(|m| (&m.name, m)).collect();
    let mut missing = Vec::new();
    for spec in &wanted.machines {
        match machines.get(&spec.name).map(|m| (&m.state, m.address)) {
            // Of one that can't be asked, the provider's own attempt says best what is wrong.
            None | Some((MachineState::Stopped | MachineState::Unknown(_), _)) => missing.push(spec.clone()),
            Some((MachineState::Pending, _) | (MachineState::Running, None)) => {
                plan.waiting.push(Waiting::Pending(spec.name.clone()));
            }
            Some((MachineState::Terminating, _)) => plan.waiting.push(Waiting::Terminating(spec.name.clone())),
            Some((MachineState::Running, Some(_))) => {}
            Some((MachineState::Failed(reason), _)) => {
                return Err(PlanError::MachineFailed {
                    machine: spec.name.clone(),
                    reason: reason.clone(),
                });
            }
        }
    }
    if !missing.is_empty() {
        plan.actions.push(Action::EnsureMachines(missing));
    }
    let named: BTreeSet<&MachineName> = wanted.machines.iter().map(|m| &m.name).collect();
    plan.surplus = machines
        .keys()
        .filter(|n| !named.contains(*n))
        .map(|n| (*n).clone())
        .collect();
    Ok(plan)
}

fn nothing(observed: &Observed) -> Plan {
    let mut plan = Plan::default();
    let (leaving, there): (Vec<&Machine>, Vec<&Machine>) = observed
        .machines
        .iter()
        .partition(|m| m.state == MachineState::Terminating);
    plan.waiting = leaving.iter().map(|m| Waiting::Terminating(m.name.clone())).collect();
    if !there.is_empty() {
        plan.actions
            .push(Action::RemoveMachines(there.iter().map(|m| m.name.clone()).collect()));
    }
    // A disk can't go before its machine, nor the network before everything in it.
    if leaving.is_empty() {
        if !observed.disks.is_empty() {
            plan.actions.push(Action::RemoveDisks(
                observed.disks.iter().map(|d| d.machine.clone()).collect(),
            ));
        }
        if observed.network.is_some() {
            plan.actions.push(Action::RemoveNetwork);
        }
    }
    plan
}
