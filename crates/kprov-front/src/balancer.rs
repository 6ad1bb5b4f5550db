//! A load balancer as a process of its own: the local provider's API endpoint.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use crate::front::{Front, FrontConfig, FrontError};
use crate::policy::{Listener, Pool, WhenEmpty};
use crate::trust::Trust;

/// How often the backends' file is looked at.
const READ_INTERVAL: Duration = Duration::from_secs(1);
/// How often a backend is checked that is up or slow.
const CHECK_INTERVAL: Duration = Duration::from_millis(500);
/// How long connections may go on after the balancer was told to stop.
const GRACE: Duration = Duration::from_secs(1);

/// What a balancer is started with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BalancerConfig {
    /// Where it listens.
    pub listen: SocketAddr,
    /// The file that lists its backends ([`BalancerFile`] as JSON). Read again when it changes; it may be missing at first.
    pub backends_file: PathBuf,
    /// The CA (PEM) that health checks verify by, where the file names none.
    pub ca_pem: Option<String>,
}

/// The backends' file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalancerFile {
    /// The backends' addresses.
    pub backends: Vec<SocketAddr>,
    /// The CA (PEM) that health checks verify by. Without one they verify nothing, as cloud load balancers' don't.
    #[serde(default)]
    pub ca: Option<String>,
}

/// Why a balancer could not run.
#[derive(Debug, thiserror::Error)]
pub enum BalancerError {
    /// Its front could not start.
    #[error("the load balancer cannot start")]
    Front(#[from] FrontError),
}

/// Runs a load balancer until `stop` is done.
///
/// It always listens, as a load balancer does, and resets connections that no backend takes within two seconds; it tries
/// those last that are said to be down. A backends' file that
/// cannot be read or is malformed leaves the backends as they were.
pub async fn run_balancer(config: BalancerConfig, stop: impl Future<Output = ()>) -> Result<(), BalancerError> {
    let BalancerConfig {
        listen,
        backends_file,
        ca_pem,
    } = config;
    let mut known = Known::default();
    let first = known.read(&backends_file).await.unwrap_or_default();
    let trust = |file: &BalancerFile| {
        file.ca
            .clone()
            .or_else(|| ca_pem.clone())
            .map_or(Trust::Anything, Trust::Ca)
    };
    let front = Front::start(FrontConfig {
        listeners: vec![Listener {
            address: listen,
            pool: Pool::Remote,
            when_empty: WhenEmpty::TryAll,
        }],
        trust: trust(&first),
        server_name: FrontConfig::SERVER_NAME.into(),
        local_port: None,
        remote_backends: first.backends,
        remote_interval: CHECK_INTERVAL,
    })?;
    let follow = async {
        loop {
            tokio::time::sleep(READ_INTERVAL).await;
            if let Some(file) = known.read(&backends_file).await {
                info!(backends = file.backends.len(), "balancer: backends changed");
                if let Err(error) = front.set_trust(&trust(&file)) {
                    warn!(file = %backends_file.display(), %error, "balancer: the file's CA is not usable");
                }
                front.set_remote_backends(file.backends);
            }
        }
    };
    tokio::select! {
        () = follow => {}
        () = stop => {}
    }
    front.shutdown(GRACE).await;
    Ok(())
}

/// The backends' file as it was read last.
#[derive(Default)]
struct Known {
    bytes: Option<Vec<u8>>,
    missing: bool,
}

impl Known {
    /// The file's content where it is new and well-formed.
    async fn read(&mut self, path: &Path) -> Option<BalancerFile> {
        let bytes = match tokio::fs::read(path).await {
            Ok(bytes) => bytes,
            Err(error) => {
                if !std::mem::replace(&mut self.missing, true) && error.kind() != io::ErrorKind::NotFound {
                    warn!(file = %path.display(), %error, "balancer: cannot read the backends' file");
                }
                return None;
            }
        };
        self.missing = false;
        if self.bytes.as_ref() == Some(&bytes) {
            return None;
        }
        let parsed = serde_json::from_slice(&bytes);
        self.bytes = Some(bytes);
        parsed
            .inspect_err(|error| warn!(file = %path.display(), %error, "balancer: the backends' file is malformed"))
            .ok()
    }
}
