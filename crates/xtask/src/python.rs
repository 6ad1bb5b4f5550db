//! Python packages from the package index, each set in a virtual environment of its own in the cache.

use std::process::Command;

use anyhow::{Context as _, Result};
use camino::Utf8PathBuf;

use crate::run::{output, run};
use crate::{cache, debian};

/// A virtual environment `name` with these packages (`name==version`), made where it isn't there or has others; returns its
/// directory. Its Python is `bin/python` in there.
pub(crate) fn venv(name: &str, requirements: &[&str]) -> Result<Utf8PathBuf> {
    let dir = cache::dir()?.join(format!("python-{name}"));
    let wanted = requirements.join("\n");
    let mark = dir.join("requirements.txt");
    if std::fs::read_to_string(&mark).is_ok_and(|have| have == wanted)
        && output(Command::new(dir.join("bin/python")).arg("--version")).is_ok()
    {
        return Ok(dir);
    }
    debian::install(&["python3", "python3-venv"])?;
    // Debian's own, whatever else is first in PATH.
    run(Command::new("/usr/bin/python3").args(["-m", "venv", "--clear", dir.as_str()]))?;
    run(Command::new(dir.join("bin/pip"))
        .args(["install", "--quiet", "--disable-pip-version-check"])
        .args(requirements))?;
    // Written last: an installation that was interrupted is made again.
    std::fs::write(&mark, wanted).with_context(|| format!("can't write `{mark}`"))?;
    Ok(dir)
}
