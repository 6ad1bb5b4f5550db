//! Microsoft's own clients of Azure, by which the emulated Azure Resource Manager is kept honest.

use std::process::{Command, Stdio};

use anyhow::{Context as _, Result};

use crate::run::{output, run};
use crate::{cache, python};

const PYTHON: &[&str] = &[
    "azure-mgmt-compute==39.0.0",
    "azure-mgmt-network==33.1.0",
    "azure-mgmt-resource==26.0.0",
];
/// The last releases that come with `mappers.js`, from which requests can be checked by a program.
const NODE: &[&str] = &["@azure/arm-compute@22.4.0", "@azure/arm-network@33.5.0"];

/// Serves the long-running operations of Azure's own specification, for the poller.
const SPECTOR: &[&str] = &[
    "@typespec/spector@0.1.0-alpha.24-dev.2",
    "@azure-tools/azure-http-specs@0.1.0-alpha.38-dev.2",
];
/// The oldest Node.js that runs it.
const SPECTOR_NODE: u32 = 20;

/// The variables that tests of Azure's emulator expect.
pub(crate) fn variables() -> Result<Vec<(&'static str, String)>> {
    let python = python::venv("azure", PYTHON)?.join("bin/python");
    Ok(vec![
        ("KPROV_TEST_AZURE_PYTHON", python.into_string()),
        ("KPROV_TEST_AZURE_MODELS", packages("azure", NODE, 0)?),
        ("KPROV_TEST_AZURE_SPECTOR", packages("spector", SPECTOR, SPECTOR_NODE)?),
    ])
}

/// The directory whose `node_modules` have these packages; `none` where there is no Node.js that is new enough.
fn packages(name: &str, packages: &[&str], node: u32) -> Result<String> {
    let major = |text: String| {
        text.trim()
            .trim_start_matches('v')
            .split('.')
            .next()?
            .parse::<u32>()
            .ok()
    };
    let there = output(Command::new("node").arg("--version")).ok().and_then(major);
    let npm = Command::new("npm")
        .arg("--version")
        .stdout(Stdio::null())
        .status()
        .is_ok();
    if !npm || there.is_none_or(|there| there < node) {
        eprintln!(
            "no Node.js {node} or newer here: tests with `{}` are left out",
            packages.join("`, `")
        );
        return Ok("none".to_owned());
    }
    let dir = cache::dir()?.join(format!("node-{name}"));
    let wanted = packages.join("\n");
    let mark = dir.join("packages.txt");
    if std::fs::read_to_string(&mark).is_ok_and(|have| have == wanted) {
        return Ok(dir.into_string());
    }
    std::fs::create_dir_all(&dir).with_context(|| format!("can't make `{dir}`"))?;
    run(Command::new("npm")
        .current_dir(&dir)
        .args([
            "install",
            "--no-audit",
            "--no-fund",
            "--no-package-lock",
            "--ignore-scripts",
            // Prereleases name each other's exact versions.
            "--legacy-peer-deps",
            "--prefix",
            ".",
        ])
        .args(packages))?;
    std::fs::write(&mark, wanted).with_context(|| format!("can't write `{mark}`"))?;
    Ok(dir.into_string())
}
