//! Keeps the pod network as it should be.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::Ipv4Net;
use kprov_types::MachineName;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tracing::{debug, info, warn};

use super::desired::{NodeView, desired};
use super::diff::diff;
use super::filter::{self, FilterError};
use super::host;
use super::netlink::{Kernel, NetlinkError};

/// How often everything is looked at without a reason.
const RESYNC: Duration = Duration::from_mins(1);
/// How long to wait after a failure, at first and at most.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// What the pod network is run with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodNetworkSettings {
    /// This machine's name.
    pub machine: MachineName,
    /// The pods' range of the whole cluster.
    pub pods: Ipv4Net,
    /// The CNI configuration file to write, [`PodNetworkSettings::CNI_CONFIG`] outside tests.
    pub cni_config: PathBuf,
}

impl PodNetworkSettings {
    /// Where containerd finds CNI configuration.
    pub const CNI_CONFIG: &str = "/etc/cni/net.d/10-kprov.conflist";

    /// For this machine, with the usual CNI configuration file.
    pub fn new(machine: MachineName, pods: Ipv4Net) -> Self {
        Self {
            machine,
            pods,
            cni_config: Self::CNI_CONFIG.into(),
        }
    }
}

/// How the pod network on this machine is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodNetworkStatus {
    /// This machine has its range, and everything was as it should be when last looked at.
    pub ready: bool,
    /// What is missing, in words.
    pub message: Option<String>,
    /// This machine's range.
    pub pod_cidr: Option<Ipv4Net>,
    /// How many machines' pods are reached directly.
    pub direct: usize,
    /// How many machines' pods are reached through the tunnel.
    pub tunnelled: usize,
}

/// Why the pod network is not as it should be.
#[derive(Debug, thiserror::Error)]
pub enum PodNetworkError {
    /// Routes or devices.
    #[error("the kernel's routes and devices cannot be brought in line")]
    Netlink(#[from] NetlinkError),
    /// Packet filter rules.
    #[error("packet filter rules cannot be set")]
    Filter(#[from] FilterError),
    /// A kernel setting.
    #[error("cannot set `{file}`")]
    Setting {
        /// The setting's file.
        file: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// The CNI configuration.
    #[error("cannot write `{}`", path.display())]
    Cni {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// Keeps this machine's part of the pod network as the Nodes ask for, until the sender of `nodes` is gone: looks when they
/// change and each minute, and soon again after a failure. `nodes` lists all Nodes, this machine's among them; before it
/// is there, nothing is done. What was made stays when this ends: pods go on running.
pub async fn run(
    settings: PodNetworkSettings,
    mut nodes: watch::Receiver<Vec<NodeView>>,
    status: watch::Sender<PodNetworkStatus>,
) {
    let mut retry = RETRY.0;
    loop {
        let all = nodes.borrow_and_update().clone();
        let me = all.iter().find(|node| node.name == settings.machine);
        let (now, wait) = match me {
            None => (waiting("waiting for this machine's Node"), RESYNC),
            Some(me) => match sync(&settings, me, &all).await {
                Ok(now) => {
                    retry = RETRY.0;
                    (now, RESYNC)
                }
                Err(error) => {
                    let message = crate::chain(&error);
                    warn!(error = message, "the pod network is not as it should be");
                    let wait = retry;
                    retry = (retry * 2).min(RETRY.1);
                    (
                        PodNetworkStatus {
                            message: Some(message),
                            pod_cidr: me.pod_cidr,
                            ..PodNetworkStatus::default()
                        },
                        wait,
                    )
                }
            },
        };
        status.send_if_modified(|status| {
            let changed = *status != now;
            if changed {
                info!(
                    ready = now.ready,
                    direct = now.direct,
                    tunnelled = now.tunnelled,
                    message = now.message,
                    "pod network"
                );
                *status = now;
            }
            changed
        });
        match timeout(wait, nodes.changed()).await {
            Ok(Err(_)) => return,
            // Nodes of a cluster that starts come in quick succession.
            Ok(Ok(())) => sleep(Duration::from_millis(20)).await,
            Err(_) => {}
        }
    }
}

fn waiting(what: &str) -> PodNetworkStatus {
    PodNetworkStatus {
        message: Some(what.to_owned()),
        ..PodNetworkStatus::default()
    }
}

/// Looks and brings everything in line once.
pub(super) async fn sync(
    settings: &PodNetworkSettings,
    me: &NodeView,
    nodes: &[NodeView],
) -> Result<PodNetworkStatus, PodNetworkError> {
    host::ensure_settings().map_err(|(file, source)| PodNetworkError::Setting { file, source })?;
    let kernel = Kernel::open()?;
    let uplink = kernel.uplink(me.internal_ip).await?;
    let wanted = desired(me, nodes, &uplink, settings.pods);
    // Rules first: a pod must not speak to the world by its own address, not even for a moment.
    filter::ensure(&wanted.masquerade).await?;
    let observed = kernel.observe(&uplink).await?;
    let mut failure = None;
    for action in diff(&wanted, &observed) {
        debug!(?action, "pod network");
        // One range that cannot be reached doesn't keep the others from it.
        if let Err(error) = kernel.apply(&action, &uplink).await {
            warn!(error = crate::chain(&error), "pod network");
            failure = Some(error);
        }
    }
    if let Some(cni) = wanted.cni {
        let path = &settings.cni_config;
        cni.write(path).map_err(|source| PodNetworkError::Cni {
            path: path.clone(),
            source,
        })?;
    }
    if let Some(error) = failure {
        return Err(error.into());
    }
    let tunnelled = wanted.tunnel.as_ref().map_or(0, |tunnel| tunnel.neighbours.len());
    Ok(PodNetworkStatus {
        ready: me.pod_cidr.is_some(),
        message: me
            .pod_cidr
            .is_none()
            .then(|| "waiting for this machine's range of pod addresses".to_owned()),
        pod_cidr: me.pod_cidr,
        direct: wanted.routes.len() - tunnelled,
        tunnelled,
    })
}
