//! Running other programs: each is shown before it runs, and a failure names it.

use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

fn shown(command: &Command) -> String {
    let mut text = command.get_program().to_string_lossy().into_owned();
    for arg in command.get_args() {
        text.push(' ');
        text.push_str(&arg.to_string_lossy());
    }
    text
}

/// Runs a program to its end, with our own terminal.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let text = shown(command);
    eprintln!("$ {text}");
    let status = command.status().with_context(|| format!("can't run `{text}`"))?;
    if !status.success() {
        bail!("`{text}` ended with {status}");
    }
    Ok(())
}

/// Runs a program and returns what it prints on stdout.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let text = shown(command);
    let out = command
        .stderr(Stdio::piped())
        .output()
        .with_context(|| format!("can't run `{text}`"))?;
    if !out.status.success() {
        bail!(
            "`{text}` ended with {}: {}",
            out.status,
            String::from_utf8_lossy(&out.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

/// A cargo of the toolchain that runs this task, in the workspace's directory.
///
/// Without what the cargo around us says of the package `xtask`: build scripts that look at `CARGO_MANIFEST_DIR` (ring's) would
/// run again for every other checkout, and all that depends on them, the SDKs first, would be built again.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(crate::cache::workspace());
    for (name, _) in std::env::vars_os() {
        let of_package = |name: &str| name.starts_with("CARGO_MANIFEST_") || name.starts_with("CARGO_PKG_");
        if name.to_str().is_some_and(of_package) {
            command.env_remove(name);
        }
    }
    command
}
