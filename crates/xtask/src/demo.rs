//! `cargo xtask demo`: from a fresh machine to a running cluster.

use anyhow::Result;

use crate::payload::{self, Programs};
use crate::run::run as execute;

pub(crate) fn run(up: &[String]) -> Result<()> {
    payload::host_packages()?;
    let programs = Programs::build(true)?;
    let payload = payload::ensure_with(&programs)?;
    execute(
        programs
            .kprov()
            .args(["up", "--provider", "local", "--name", "demo", "--release"])
            .arg(&payload.dir)
            .arg("--release-key")
            .arg(&payload.key)
            .args(up),
    )?;
    let kprov = programs.dir.join("kprov");
    eprintln!("\nkprov itself is {kprov}; remove the cluster with `{kprov} down --name demo`.");
    if let Some(binaries) = payload.binaries {
        eprintln!("A kubectl of the same version is {}.", binaries.join("kubectl"));
    }
    Ok(())
}
