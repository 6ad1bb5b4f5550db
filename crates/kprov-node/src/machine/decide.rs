//! What to do next about this machine's orders. Pure: no file, no clock, nobody asked.

use std::collections::BTreeSet;

use jiff::Timestamp;
use kprov_types::KubernetesVersion;
use kprov_types::Role;
use kprov_types::api::{MachineSpec, ReleaseRef, RunOrder};
use kprov_types::ports;

use super::disk::{Failed, Trial};
use crate::nodes::{Nodes, OwnNode};

/// How often a release is started before the machine goes back to the one before.
pub const MAX_STARTS: u32 = 3;

/// What a start begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begin {
    /// Nothing is being tried.
    Plain,
    /// The trial goes on.
    Try,
    /// The trial was started too often: note that it has failed, and go back.
    GiveUp,
    /// The trial was given up before: go back.
    GoBack,
}

/// Decides what a start begins with.
pub fn decide_begin(trial: Option<&Trial>, failed: Option<&Failed>) -> Begin {
    match trial {
        None => Begin::Plain,
        Some(trial) if failed.is_some_and(|failed| failed.ends(trial)) => Begin::GoBack,
        Some(trial) if trial.starts >= MAX_STARTS => Begin::GiveUp,
        Some(_) => Begin::Try,
    }
}

/// Whether an order is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// It is: note its number first.
    Take,
    /// It was before.
    Taken,
    /// It is older than one that was taken: whoever sent it is behind.
    Refuse,
}

/// Decides on an order by its number and the highest that was taken.
pub fn admit(order: u64, taken: u64) -> Admission {
    match order.cmp(&taken) {
        std::cmp::Ordering::Less => Admission::Refuse,
        std::cmp::Ordering::Equal => Admission::Taken,
        std::cmp::Ordering::Greater => Admission::Take,
    }
}

/// The releases that the orders need on the machine.
pub fn needed(spec: &MachineSpec) -> BTreeSet<ReleaseRef> {
    let run = spec.run.as_ref().map(|run| &run.release);
    let standby = spec.standby.as_ref().map(|standby| &standby.release);
    let all = spec.stage.iter().chain(run).chain(spec.etcd.as_ref()).chain(standby);
    all.cloned().collect()
}

/// What is known when a release is to be run.
#[derive(Clone, Copy, Debug)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is one independent fact that was seen"
)]
pub struct RunSeen<'a> {
    /// The order.
    pub ordered: Option<&'a RunOrder>,
    /// The release that runs, and has proven itself.
    pub running: Option<&'a ReleaseRef>,
    /// A release is being tried.
    pub trial: bool,
    /// What the machine went back from last.
    pub failed: Option<&'a Failed>,
    /// All that the machine runs has been started.
    pub set_up: bool,
    /// All of the ordered release is here and verified.
    pub staged: bool,
    /// Something is being done to this machine's etcd member.
    pub etcd_busy: bool,
}

/// The next thing to do about a [`RunOrder`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunStep {
    /// Nothing.
    Done,
    /// Nothing, since this order was tried and failed.
    Failed,
    /// Nothing yet, in words.
    Wait(&'static str),
    /// Switch to the release.
    Switch,
}

/// Decides on the release that the machine runs.
pub fn decide_run(seen: &RunSeen<'_>) -> RunStep {
    let Some(ordered) = seen.ordered else {
        return RunStep::Done;
    };
    if seen.trial {
        return RunStep::Wait("a release is being tried");
    }
    if seen.running == Some(&ordered.release) {
        return RunStep::Done;
    }
    let same = |failed: &Failed| failed.failure.release == ordered.release && failed.since == ordered.since;
    if seen.failed.is_some_and(same) {
        return RunStep::Failed;
    }
    if !seen.set_up {
        return RunStep::Wait("the machine is starting");
    }
    if !seen.staged {
        return RunStep::Wait("its files are on their way");
    }
    if seen.etcd_busy {
        return RunStep::Wait("etcd is being worked on");
    }
    RunStep::Switch
}

/// Whether a release that is being tried has proven itself, or what it lacks, in words.
///
/// `since` is when this machine's programs were started: the Node must tell of a time after that. Kubernetes writes times in
/// whole seconds.
pub fn proven(version: &KubernetesVersion, node: Option<&OwnNode>, since: Timestamp) -> Result<(), String> {
    let Some(node) = node else {
        return Err("the machine's Node cannot be seen".into());
    };
    if node
        .heartbeat
        .is_none_or(|heartbeat| heartbeat.as_second() < since.as_second())
    {
        return Err("kubelet has not reported since it was started".into());
    }
    // A build may add metadata of its own.
    let (tag, reported) = (version.tag(), node.kubelet.split('+').next().unwrap_or_default());
    if reported != tag.split('+').next().unwrap_or_default() {
        return Err(format!("kubelet reports version `{}`", node.kubelet));
    }
    if !node.ready {
        return Err(format!("the Node is not ready: {}", node.message));
    }
    Ok(())
}

/// The release stores of the control-plane machines: on one of them its own first; on workers in an order of each one's own,
/// so that not all ask the same store first.
pub fn stores(name: &str, role: Role, address: std::net::Ipv4Addr, nodes: &Nodes) -> Vec<String> {
    let own = std::net::IpAddr::from(address);
    let mut found: Vec<_> = nodes
        .values()
        .filter(|node| node.control_plane)
        .flat_map(|node| node.addresses.iter().copied())
        .filter(|address| *address != own)
        .collect();
    if let Some(turn) = name.bytes().map(usize::from).sum::<usize>().checked_rem(found.len()) {
        found.rotate_left(turn);
    }
    if role == Role::ControlPlane {
        found.insert(0, own);
    }
    let url = |address| format!("http://{}", std::net::SocketAddr::new(address, ports::RELEASE));
    found.into_iter().map(url).collect()
}

/// The sources of a release, best first and each once.
pub fn sources<'a>(stores: &'a [String], release: &'a [String], first_boot: &'a [String]) -> Vec<String> {
    let mut all = Vec::new();
    for url in stores.iter().chain(release).chain(first_boot) {
        let url = url.trim_end_matches('/');
        if !all.iter().any(|known| known == url) {
            all.push(url.to_owned());
        }
    }
    all
}
