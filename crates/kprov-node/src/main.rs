//! `kprov-node`: see the library.

use std::io::Write;
use std::process::ExitCode;

use anyhow::Context;
use camino::Utf8PathBuf;
use clap::{Parser, Subcommand};
use kprov_node::host::Host;
use kprov_node::{https, node, paths, podnet};
use kprov_types::node::{NODE_CONFIG_PATH, SetupStatus};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

/// Runs a machine of a kprov cluster.
#[derive(Parser)]
#[command(name = "kprov-node", version, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the machine: containerd, kubelet and all around them.
    Run {
        /// The first-boot configuration.
        #[arg(long, default_value = NODE_CONFIG_PATH)]
        config: Utf8PathBuf,
    },
    /// Print what the host lacks; exit with 1 if there is something.
    Check,
    /// Print how far the machine is, as JSON.
    Status,
    /// Print the version.
    Version,
}

fn main() -> ExitCode {
    match execute(Cli::parse().command) {
        Ok(code) => code,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "error: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn execute(command: Command) -> anyhow::Result<ExitCode> {
    let mut out = std::io::stdout().lock();
    match command {
        Command::Run { config } => run(&config)?,
        Command::Check => {
            let mut findings = Host::detect().findings();
            findings.extend(podnet::missing_network_features());
            for finding in &findings {
                writeln!(out, "{finding}")?;
            }
            return Ok(if findings.is_empty() {
                ExitCode::SUCCESS
            } else {
                ExitCode::from(1)
            });
        }
        Command::Status => {
            let text = std::fs::read_to_string(paths::STATUS).context("kprov-node does not run here")?;
            let status: SetupStatus = serde_json::from_str(&text).context("the status file is not understood")?;
            writeln!(out, "{}", serde_json::to_string_pretty(&status)?)?;
        }
        Command::Version => writeln!(out, "{}", env!("CARGO_PKG_VERSION"))?,
    }
    Ok(ExitCode::SUCCESS)
}

fn run(config: &camino::Utf8Path) -> anyhow::Result<()> {
    // What the API client fails at is told by whoever called it. `RUST_LOG=kprov_node=debug` tells more.
    let filter =
        EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info,kube_client=off,kube_runtime=off"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    https::use_ring();
    // Two threads: the front keeps its pace while something else computes, and memory stays small.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(8)
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    runtime.block_on(async {
        let stop = CancellationToken::new();
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let stopping = stop.clone();
        tokio::spawn(async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            stopping.cancel();
        });
        node::run(config, stop).await
    })
}
