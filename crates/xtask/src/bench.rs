//! `cargo xtask bench`: measurements for docs/bench.md. Not tests: figures depend on the machine.

use std::process::Command;

use anyhow::Result;
use clap::ValueEnum;

use crate::payload::{self, Programs};
use crate::run::run as execute;
use crate::{debian, python, suite};

/// What to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum What {
    /// `kprov up` from a payload in the cache to a ready cluster: 1 machine, then 3 + 2, with a breakdown by step.
    Up,
    /// The front beside a direct connection: latency and throughput.
    Front,
    /// Calls and wall time of the AWS provider for 1 to 1,000 machines, beside Ansible's amazon.aws doing the same work on the
    /// same moto server (up to 100 machines).
    Aws,
    /// A hundred hosts set up by SSH, beside Ansible doing the same.
    Baremetal,
    /// `up` and `down` of 1, 10 and 100 machines against the emulated Azure Resource Manager: calls and wall time.
    Azure,
}

pub(crate) fn run(what: What) -> Result<()> {
    match what {
        What::Front => execute(
            crate::run::cargo()
                .env("CARGO_TARGET_DIR", crate::cache::target()?)
                .args([
                    "run",
                    "--locked",
                    "--release",
                    "-p",
                    "kprov-front",
                    "--example",
                    "front-bench",
                ]),
        ),
        What::Aws => {
            let moto = python::venv(python::MOTO.0, python::MOTO.1)?.join("bin/moto_server");
            let ansible = python::venv(python::ANSIBLE.0, python::ANSIBLE.1)?.join("bin/ansible-playbook");
            let playbook = crate::cache::workspace().join("providers/aws/examples/ansible.yaml");
            execute(
                crate::run::cargo()
                    .env("CARGO_TARGET_DIR", crate::cache::target()?)
                    .env("ANSIBLE_PLAYBOOK", ansible)
                    .env("PLAYBOOK", playbook)
                    .env("ANSIBLE_MOST", "100")
                    .args([
                        "run",
                        "--locked",
                        "-p",
                        "kprov-provider-aws",
                        "--example",
                        "bench",
                        "--",
                    ])
                    .arg(moto)
                    .args(["1", "10", "100", "1000"]),
            )
        }
        What::Baremetal => {
            debian::install(&["binutils", "openssh-client", "openssh-server"])?;
            // As `cargo xtask test` builds it; `ssh` and hosts do nearly all of the work.
            let target = crate::cache::target()?;
            let mut build = crate::run::cargo();
            suite::lint(
                &target,
                build.args(["build", "--locked", "--workspace", "--all-targets"]),
            );
            execute(&mut build)?;
            let programs = target.join("debug");
            let node = crate::cache::dir()?.join("kprov-node-stripped");
            execute(
                Command::new("strip")
                    .arg(programs.join("kprov-node"))
                    .arg("-o")
                    .arg(&node),
            )?;
            let ansible = python::venv(python::ANSIBLE.0, python::ANSIBLE.1)?.join("bin/ansible-playbook");
            execute(Command::new(programs.join("examples/setup-bench")).args([programs.join("kprov"), node, ansible]))
        }
        What::Azure => {
            // As `cargo xtask test` builds it: nothing is compiled twice.
            let mut bench = crate::run::cargo();
            suite::lint(
                &crate::cache::target()?,
                bench
                    .args(["test", "--locked", "--workspace", "--test", "suite", "scale::bench"])
                    .args(["--", "--ignored", "--exact", "--nocapture"]),
            );
            execute(&mut bench)
        }
        What::Up => {
            payload::host_packages()?;
            let programs = Programs::build(true)?;
            let payload = payload::ensure_with(&programs)?;
            for (control_plane, workers) in [("1", "0"), ("3", "2")] {
                let result = execute(
                    programs
                        .kprov()
                        .args([
                            "up",
                            "--provider",
                            "local",
                            "--name",
                            "bench",
                            "--timings",
                            "--progress",
                            "none",
                        ])
                        .args(["--control-plane", control_plane, "--workers", workers, "--release"])
                        .arg(&payload.dir)
                        .arg("--release-key")
                        .arg(&payload.key),
                );
                execute(
                    programs
                        .kprov()
                        .args(["down", "--name", "bench", "--yes", "--progress", "none"]),
                )?;
                result?;
            }
            Ok(())
        }
    }
}
