//! The end-to-end tests' harness: real `kprov`, real machines, real Kubernetes.
//!
//! `cargo xtask test` sets `KPROV_BIN` (directory of kprov's programs), `KPROV_TEST_PAYLOADS` (`dir=key` pairs, `:` between)
//! `KPROV_TEST_BINARIES` (a directory with `kubectl`), and
//! `KPROV_TEST_CLOUD_INIT` (a directory with cloud-init, unpacked). Without them the tests say so and fail in CI.

#![expect(clippy::print_stderr, reason = "what a test tells stands in its output")]

mod checks;
pub mod cloud;
mod cluster;
mod host;
mod payload;
mod prober;
mod watcher;
mod workloads;

pub use checks::{condition, items, self_hosted};
pub use cluster::{Cluster, Kubectl};
pub use host::Traces;
pub use payload::{Broken, Payload, broken, payloads, upgrades};
pub use prober::{Prober, Probes};
pub use watcher::{Watched, Watcher};
pub use workloads::pods_work;

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Asks again every 200 ms until `check` returns something, or fails with the last reason.
pub fn wait_for<T>(what: &str, limit: Duration, mut check: impl FnMut() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    loop {
        match check() {
            Ok(value) => return Ok(value),
            Err(error) if start.elapsed() > limit => bail!("{what}: not within {limit:?}: {error:#}"),
            Err(_) => std::thread::sleep(Duration::from_millis(200)),
        }
    }
}

/// Whether what takes too long for every run is wanted: `cargo xtask test --full` says so.
pub fn full() -> bool {
    std::env::var("KPROV_TEST_FULL").is_ok_and(|v| v == "1")
}
