//! `cargo xtask test`: everything that must hold.

use std::process::Command;
use std::time::Instant;

use anyhow::{Result, bail};
use camino::Utf8Path;

use crate::payload::{self, Payload, Programs};
use crate::run::{cargo, output, run};
use crate::{azure, cache, cloud_init, debian, deps, python, upgrades};

/// What the tests themselves call.
const TEST_PACKAGES: &[&str] = &[
    "containerd",
    "curl",
    "etcd-client",
    "etcd-server",
    "fdisk",
    "ignition",
    "openssh-client",
    "openssh-server",
    "openssl",
    "procps",
    "sudo",
    "util-linux",
];
/// What hosts boot over the network with, and the machine that stands in for one.
const BOOT_PACKAGES: &[&str] = &[
    "binutils",
    "busybox-static",
    "dnsmasq-base",
    "e2fsprogs",
    "ipxe",
    "ipxe-qemu",
    "ovmf",
    "qemu-system-x86",
];
/// A management controller by somebody else.
const SUSHY: &[&str] = &["sushy-tools==2.2.0"];

pub(crate) fn run_suite(full: bool) -> Result<()> {
    payload::host_packages()?;
    debian::install(TEST_PACKAGES)?;
    debian::install(BOOT_PACKAGES)?;
    let target = cache::target()?;
    run(cargo().args(["fmt", "--all", "--check"]))?;
    deps::run()?;

    let programs = build(&target)?;
    let variables = variables(&programs)?;

    nextest_present()?;
    let tests = |args: &[&str]| {
        let mut nextest = cargo();
        lint(
            &target,
            nextest.args(["nextest", "run", "--locked", "--workspace", "--no-fail-fast"]),
        );
        nextest
            .args(args)
            .envs(variables.iter().map(|(name, value)| (name, value)))
            .env("KPROV_TEST_FULL", if full { "1" } else { "0" })
            // A failed test tells its error; a backtrace of every error would bury that. Panics keep theirs.
            .env("RUST_LIB_BACKTRACE", "0");
        run(&mut nextest)
    };
    let outcome = tests(&[]);
    if full {
        // What takes long; of the other packages such tests are measurements.
        tests(&["--run-ignored", "only", "-E", "package(kprov-e2e)"])?;
    }
    outcome
}

/// One build serves lints and tests: clippy-driver compiles the workspace's own crates as rustc would, and dependencies are built
/// once.
fn build(target: &Utf8Path) -> Result<Programs> {
    let mut build = cargo();
    lint(
        target,
        build.args(["build", "--locked", "--workspace", "--all-targets"]),
    );
    run(&mut build)?;
    Programs::built(target, false)
}

/// Has a command of cargo build like this: into `target`, with lints.
pub(crate) fn lint(target: &Utf8Path, command: &mut Command) {
    command
        .env("CARGO_TARGET_DIR", target)
        .env("RUSTC_WORKSPACE_WRAPPER", "clippy-driver")
        .env("CLIPPY_ARGS", "-Dwarnings__CLIPPY_HACKERY__");
}

/// Makes what end-to-end tests need, and prints the variables that name it, for a shell.
pub(crate) fn print_variables() -> Result<()> {
    payload::host_packages()?;
    for (name, value) in variables(&build(&cache::target()?)?)? {
        println!("export {name}='{value}'");
    }
    Ok(())
}

/// Makes the payloads under test, and names them as the tests expect.
fn variables(programs: &Programs) -> Result<Vec<(&'static str, String)>> {
    let start = Instant::now();
    let payload = payload::debian_with(programs)?;
    let releases = payload::test_releases(programs)?;
    let chains = upgrades::chains(programs, &payload, &releases)?;
    let broken = upgrades::broken(programs, &chains)?;
    eprintln!("payloads at hand after {:.1} s", start.elapsed().as_secs_f32());
    let cloud_init = cloud_init::unpacked()?;
    let moto = python::venv(python::MOTO.0, python::MOTO.1)?.join("bin/moto_server");
    let binaries = payload.binaries.clone().unwrap_or_default();
    let payloads: Vec<_> = std::iter::once(payload).chain(releases).collect();
    let sushy = python::venv("sushy", SUSHY)?.join("bin/sushy-emulator");
    let mut variables = vec![
        ("KPROV_TEST_BOOT_KERNEL", payload::debian_kernel()?.into_string()),
        ("KPROV_TEST_SUSHY", sushy.into_string()),
        ("KPROV_BIN", programs.dir.to_string()),
        ("KPROV_TEST_BINARIES", binaries.into_string()),
        ("KPROV_TEST_CLOUD_INIT", cloud_init.into_string()),
        ("KPROV_TEST_PAYLOADS", list(&payloads)),
        ("KPROV_TEST_UPGRADES", upgrades::list_of_chains(&chains)),
        ("KPROV_TEST_MOTO", moto.into_string()),
        ("KPROV_TEST_BROKEN", upgrades::list_of_broken(&broken)),
    ];
    variables.extend(azure::variables()?);
    Ok(variables)
}

/// [`Payload::entry`] of each payload, `:` between.
fn list(payloads: &[Payload]) -> String {
    payloads.iter().map(Payload::entry).collect::<Vec<_>>().join(":")
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
