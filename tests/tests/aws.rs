//! `kprov` with the provider `aws`, against moto, whose instances are machines of this host.

use anyhow::{Context as _, Result};
use kprov_e2e::cloud::{Aws, scenario};
use kprov_e2e::{Traces, full, upgrades};

/// Made, used, mended, upgraded without one call to AWS, and removed without a trace: three control-plane machines and three
/// workers in three zones with `--full`; else one and one, and `up` and `down` are killed on their way. No public addresses.
#[test]
fn machines_live() -> Result<()> {
    for chain in upgrades()? {
        let before = Traces::list();
        {
            let range = "10.84.0.0/16".parse()?;
            let aws = Aws::start("room-aws", range, true)?;
            let (size, kills): (_, &[u64]) = if full() { ((3, 3), &[]) } else { ((1, 1), &[5, 40]) };
            scenario::life(&aws, "e2e-aws", range, &chain[..2], size, kills)?;
        }
        Traces::nothing_left(&before)?;
    }
    Ok(())
}

/// `kprov up` and `kprov down` killed at their calls to AWS; with public addresses.
#[test]
#[ignore = "takes long: `cargo xtask test --full` runs it"]
fn killed_at_calls() -> Result<()> {
    let before = Traces::list();
    {
        let range = "10.83.0.0/16".parse()?;
        let aws = Aws::start("room-aws-kill", range, false)?;
        let payload = upgrades()?.into_iter().next().context("no chain")?.remove(0);
        scenario::killed(&aws, "e2e-aws-kill", range, &payload, if full() { 1 } else { 15 })?;
    }
    Traces::nothing_left(&before)
}
