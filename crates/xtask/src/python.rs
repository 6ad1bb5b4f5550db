//! Programs from `PyPI`, each in an environment of its own in the cache.

use std::process::Command;

use anyhow::Result;
use camino::Utf8PathBuf;

use crate::run::run;
use crate::{cache, debian};

/// The directory of the environment `name` with these packages (`package==version`); made if the cache has none with exactly them.
pub(crate) fn venv(name: &str, requirements: &[&str]) -> Result<Utf8PathBuf> {
    let dir = cache::dir()?.join(format!("venv-{name}"));
    let note = dir.join("kprov-requirements");
    let wanted = requirements.join("\n");
    if std::fs::read_to_string(&note).is_ok_and(|made| made == wanted) {
        return Ok(dir);
    }
    debian::install(&["python3", "python3-venv"])?;
    run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&dir))?;
    run(Command::new(dir.join("bin/pip"))
        .args(["install", "--quiet", "--disable-pip-version-check"])
        .args(requirements))?;
    std::fs::write(note, wanted)?;
    Ok(dir)
}
