//! Microsoft's own clients of Azure, by which the emulated Azure Resource Manager is kept honest.

use std::process::{Command, Stdio};

use anyhow::{Context as _, Result};
use camino::Utf8PathBuf;

use crate::run::run;
use crate::{cache, python};

const PYTHON: &[&str] = &[
    "azure-mgmt-compute==39.0.0",
    "azure-mgmt-network==33.1.0",
    "azure-mgmt-resource==26.0.0",
];
/// The last releases that come with `mappers.js`, from which requests can be checked by a program.
const NODE: &[&str] = &["@azure/arm-compute@22.4.0", "@azure/arm-network@33.5.0"];

/// The variables that tests of Azure's emulator expect.
pub(crate) fn variables() -> Result<Vec<(&'static str, String)>> {
    let python = python::venv("azure", PYTHON)?.join("bin/python");
    Ok(vec![
        ("KPROV_TEST_AZURE_PYTHON", python.into_string()),
        (
            "KPROV_TEST_AZURE_MODELS",
            models()?.map_or_else(|| "none".to_owned(), Utf8PathBuf::into_string),
        ),
    ])
}

/// The directory whose `node_modules` have the packages; `None` where there is no Node.js.
fn models() -> Result<Option<Utf8PathBuf>> {
    let there = |program: &str| {
        Command::new(program)
            .arg("--version")
            .stdout(Stdio::null())
            .status()
            .is_ok()
    };
    if !there("node") || !there("npm") {
        eprintln!("no Node.js here: requests to Azure aren't held against Microsoft's models");
        return Ok(None);
    }
    let dir = cache::dir()?.join("node-azure");
    let wanted = NODE.join("\n");
    let mark = dir.join("packages.txt");
    if std::fs::read_to_string(&mark).is_ok_and(|have| have == wanted) {
        return Ok(Some(dir));
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
            "--prefix",
            ".",
        ])
        .args(NODE))?;
    std::fs::write(&mark, wanted).with_context(|| format!("can't write `{mark}`"))?;
    Ok(Some(dir))
}
