//! `cargo xtask bench`: measurements for docs/bench.md. Not tests: figures depend on the machine.

use anyhow::Result;
use clap::ValueEnum;

use crate::payload::{self, Programs};
use crate::run::run as execute;

/// What to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum What {
    /// `kprov up` from a payload in the cache to a ready cluster: 1 machine, then 3 + 2, with a breakdown by step.
    Up,
    /// The front beside a direct connection: latency and throughput.
    Front,
    /// `up` and `down` of 1, 10 and 100 machines against the emulated Azure Resource Manager: calls and wall time.
    Azure,
}

pub(crate) fn run(what: What) -> Result<()> {
    match what {
        What::Front => execute(
            crate::run::cargo()
                .env("CARGO_TARGET_DIR", crate::cache::target()?)
                .args([
                    "run",
                    "--locked",
                    "--release",
                    "-p",
                    "kprov-front",
                    "--example",
                    "front-bench",
                ]),
        ),
        What::Azure => execute(
            crate::run::cargo()
                .env("CARGO_TARGET_DIR", crate::cache::target()?)
                .args(["test", "--locked", "--workspace", "--test", "suite", "scale::bench"])
                .args(["--", "--ignored", "--exact", "--nocapture"]),
        ),
        What::Up => {
            payload::host_packages()?;
            let programs = Programs::build(true)?;
            let payload = payload::ensure_with(&programs)?;
            for (control_plane, workers) in [("1", "0"), ("3", "2")] {
                let result = execute(
                    programs
                        .kprov()
                        .args([
                            "up",
                            "--provider",
                            "local",
                            "--name",
                            "bench",
                            "--timings",
                            "--progress",
                            "none",
                        ])
                        .args(["--control-plane", control_plane, "--workers", workers, "--release"])
                        .arg(&payload.dir)
                        .arg("--release-key")
                        .arg(&payload.key),
                );
                execute(
                    programs
                        .kprov()
                        .args(["down", "--name", "bench", "--yes", "--progress", "none"]),
                )?;
                result?;
            }
            Ok(())
        }
    }
}
