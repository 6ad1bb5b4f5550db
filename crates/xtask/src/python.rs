//! Programs from Python's package index, each in a virtual environment of its own in the cache.

use std::process::Command;

use anyhow::{Context as _, Result};
use camino::Utf8PathBuf;

use crate::run::run;
use crate::{cache, debian};

/// What emulates AWS.
pub(crate) const MOTO: (&str, &[&str]) = ("moto-5.2.5", &["moto[server,ec2,elbv2]==5.2.5"]);
/// What kprov is measured beside.
pub(crate) const ANSIBLE: (&str, &[&str]) = ("ansible-12.3.0", &["ansible==12.3.0", "boto3==1.44.5"]);

/// The directory of a virtual environment with these packages; made once, and again where that was cut short.
pub(crate) fn venv((name, packages): (&str, &[&str])) -> Result<Utf8PathBuf> {
    let dir = cache::dir()?.join(name);
    let complete = dir.join("complete");
    if complete.is_file() {
        return Ok(dir);
    }
    debian::install(&["python3", "python3-venv"])?;
    run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&dir))?;
    run(Command::new(dir.join("bin/pip"))
        .args(["install", "--quiet", "--disable-pip-version-check"])
        .args(packages))?;
    std::fs::write(&complete, packages.join("\n")).with_context(|| format!("can't write `{complete}`"))?;
    Ok(dir)
}
