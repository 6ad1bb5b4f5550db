//! Developer tasks: `cargo xtask demo`, `cargo xtask test`, `cargo xtask check-deps`, `cargo xtask bench`, ...
//!
//! Nothing that ships depends on this. What takes long (a Kubernetes built from source, payloads, the demo's build) is
//! kept in the user's cache directory and used again.
#![expect(
    clippy::print_stderr,
    clippy::print_stdout,
    reason = "a developer's tool that talks on the terminal"
)]

mod azure;
mod bench;
mod cache;
mod cloud_init;
mod debian;
mod demo;
mod deps;
mod payload;
mod python;
mod run;
mod suite;
mod upgrades;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// kprov's developer tasks.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Install what is missing, make a release payload, build kprov and start the cluster `demo` on this machine.
    Demo {
        /// Arguments passed on to `kprov up`, after `--`.
        #[arg(last = true)]
        up: Vec<String>,
    },
    /// Run everything: formatting, lints, dependencies, unit, property, API and end-to-end tests.
    Test {
        /// Also what takes too long for CI: `kill -9` at every event of `up`, and every release under `KPROV_TEST_RELEASES`.
        #[arg(long)]
        full: bool,
    },
    /// Prove that the arrows between crates point down only.
    CheckDeps,
    /// Make the release payload that the demo uses, and print its directory.
    Payload,
    /// Make the payloads that end-to-end tests use, and print the variables that name them: `eval "$(cargo xtask test-env)"`.
    TestEnv,
    /// Measure, and print what docs/bench.md holds.
    Bench {
        /// What to measure.
        #[arg(value_enum)]
        what: bench::What,
    },
}

fn main() -> ExitCode {
    let result = match Cli::parse().task {
        Task::Demo { up } => demo::run(&up),
        Task::Test { full } => suite::run_suite(full),
        Task::CheckDeps => deps::run(),
        Task::Payload => payload::ensure().map(|p| println!("{}", p.dir)),
        Task::TestEnv => suite::print_variables(),
        Task::Bench { what } => bench::run(what),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
