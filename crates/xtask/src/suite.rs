//! `cargo xtask test`: everything that must hold.

use std::process::Command;

use anyhow::{Result, bail};

use crate::payload::{self, Payload, Programs};
use crate::run::{cargo, output, run};
use crate::{cache, debian, deps};

/// What the tests themselves call.
const TEST_PACKAGES: &[&str] = &["curl", "openssl", "procps"];

pub(crate) fn run_suite(full: bool) -> Result<()> {
    payload::host_packages()?;
    debian::install(TEST_PACKAGES)?;
    let target = cache::target()?;
    run(cargo().args(["fmt", "--all", "--check"]))?;
    deps::run()?;

    // One build serves lints and tests: clippy-driver compiles the workspace's own crates as rustc would, and dependencies
    // are built once.
    let lint = |command: &mut Command| {
        command
            .env("CARGO_TARGET_DIR", &target)
            .env("RUSTC_WORKSPACE_WRAPPER", "clippy-driver")
            .env("CLIPPY_ARGS", "-Dwarnings__CLIPPY_HACKERY__");
    };
    let mut build = cargo();
    lint(build.args(["build", "--locked", "--workspace", "--all-targets"]));
    run(&mut build)?;
    let programs = Programs {
        dir: target.join("debug"),
    };

    let payload = payload::debian_with(&programs)?;
    let mut payloads = vec![payload.clone()];
    payloads.extend(payload::test_releases(&programs)?);

    nextest_present()?;
    let mut nextest = cargo();
    lint(nextest.args(["nextest", "run", "--locked", "--workspace", "--no-fail-fast"]));
    nextest
        .env("KPROV_BIN", &programs.dir)
        .env(
            "KPROV_TEST_BINARIES",
            payload.binaries.as_deref().unwrap_or(camino::Utf8Path::new("")),
        )
        .env("KPROV_TEST_PAYLOADS", list(&payloads))
        .env("KPROV_TEST_FULL", if full { "1" } else { "0" });
    run(&mut nextest)
}

/// `directory=key` for each payload, separated by `:`; no key stands for a payload that is taken as it is.
fn list(payloads: &[Payload]) -> String {
    payloads
        .iter()
        .map(|p| format!("{}={}", p.dir, p.key))
        .collect::<Vec<_>>()
        .join(":")
}

fn nextest_present() -> Result<()> {
    if output(cargo().args(["nextest", "--version"])).is_ok() {
        return Ok(());
    }
    run(cargo().args(["install", "--locked", "cargo-nextest", "--version", "0.9.143"]))?;
    if output(cargo().args(["nextest", "--version"])).is_err() {
        bail!("cargo-nextest was installed but can't be run; is ~/.cargo/bin in PATH?");
    }
    Ok(())
}
