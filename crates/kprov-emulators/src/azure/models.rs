//! Recorded requests held against the models of Microsoft's own clients: an emulator that is wrong in the same way as what it
//! is to check would find nothing.

use std::path::Path;
use std::process::Stdio;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

use super::Recorded;

/// The directory whose `node_modules` have Microsoft's JavaScript clients; `none` where there is no Node.js.
pub const VARIABLE: &str = "KPROV_TEST_AZURE_MODELS";

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// There is no Node.js on this machine, so that nothing was looked at.
    NoNode,
    /// So many bodies were looked at, and this was found.
    Checked {
        /// Bodies that have a model.
        bodies: u64,
        /// What is wrong with them, a line each.
        problems: Vec<String>,
    },
}

/// Holds bodies against the models that `KPROV_TEST_AZURE_MODELS` leads to, which `cargo xtask test` sets.
pub async fn held_against_models(bodies: &[Recorded]) -> Result<Verdict> {
    let modules = std::env::var(VARIABLE).with_context(|| {
        format!("`{VARIABLE}` isn't set; `cargo xtask test` sets it, and `cargo xtask test-env` prints it")
    })?;
    if modules == "none" {
        return Ok(Verdict::NoNode);
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/azure-bodies.mjs");
    let input: Vec<Value> = bodies
        .iter()
        .map(|b| json!({"call": b.call, "path": b.path, "body": b.body}))
        .collect();
    let mut node = Command::new("node")
        .arg(script)
        .arg(&modules)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .context("can't run `node`")?;
    let mut stdin = node.stdin.take().context("`node` has no standard input")?;
    stdin.write_all(&serde_json::to_vec(&input)?).await?;
    drop(stdin);
    let out = node.wait_with_output().await?;
    if !out.status.success() {
        bail!(
            "`node` ended with {}: {}",
            out.status,
            String::from_utf8_lossy(&out.stderr)
        );
    }
    let text = String::from_utf8(out.stdout)?;
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    let last: Value = serde_json::from_str(&lines.pop().context("`node` printed nothing")?)?;
    let bodies = last["checked"]
        .as_u64()
        .context("`node` didn't say how many bodies it looked at")?;
    Ok(Verdict::Checked {
        bodies,
        problems: lines,
    })
}
