//! `kprov-node`: see the library.

use std::io::Write;
use std::os::unix::process::CommandExt as _;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use camino::{Utf8Path, Utf8PathBuf};
use clap::{Parser, Subcommand};
use kprov_bootstrap::paths as kubernetes;
use kprov_node::config::{self, Machine};
use kprov_node::etcd::{self, EtcdClient, Snapshots};
use kprov_node::host::Host;
use kprov_node::node::{self, End};
use kprov_node::{https, paths, podnet, reset};
use kprov_types::MachineName;
use kprov_types::api::RestoreOrder;
use kprov_types::node::{NODE_CONFIG_PATH, SetupStatus};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

/// How often to look how far a restore is.
const LOOK: Duration = Duration::from_millis(500);

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
    /// Make this a plain host again: end and remove everything that kprov-node has started and put here, but for etcd's data
    /// disk. kprov-node must not run.
    Reset,
    /// Print the version.
    Version,
    /// Snapshots of etcd on this control-plane machine, for when there is no API; else use `kprov etcd`.
    Etcd {
        #[command(subcommand)]
        command: EtcdCommand,
    },
}

#[derive(Subcommand)]
enum EtcdCommand {
    /// Take a snapshot of this machine's member, and print it as JSON.
    Snapshot {
        /// Its name; after the time where left out.
        name: Option<String>,
    },
    /// Print the snapshots on this machine as JSON, oldest first.
    Snapshots,
    /// Put a snapshot in the place of etcd's data; the data of before are moved aside. kprov-node must run. Where there are
    /// several control-plane machines, run it on each, with the same `--from` and `--id`.
    Restore {
        /// The snapshot.
        name: String,
        /// The machine that has the snapshot and begins; this one where left out.
        #[arg(long)]
        from: Option<MachineName>,
        /// Tells this restore from others; after the time where left out.
        #[arg(long)]
        id: Option<String>,
    },
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
        Command::Reset => {
            let left = reset::reset()?;
            for line in &left {
                writeln!(out, "{line}")?;
            }
            return Ok(if left.is_empty() {
                ExitCode::SUCCESS
            } else {
                ExitCode::from(1)
            });
        }
        Command::Version => writeln!(out, "{}", env!("CARGO_PKG_VERSION"))?,
        Command::Etcd { command } => etcd_command(command, &mut out)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn etcd_command(command: EtcdCommand, out: &mut impl Write) -> anyhow::Result<()> {
    let now = jiff::Timestamp::now().strftime("%Y%m%dt%H%M%Sz");
    let snapshots = Snapshots::new(Utf8Path::new(paths::STATE).join("snapshots"));
    match command {
        EtcdCommand::Snapshots => writeln!(out, "{}", serde_json::to_string_pretty(&snapshots.list())?)?,
        EtcdCommand::Snapshot { name } => {
            let name = name.unwrap_or_else(|| format!("manual-{now}"));
            let machine = Machine::identify(config::read(NODE_CONFIG_PATH.into())?)?;
            let read = |file: &str| {
                let path = Utf8Path::new(kubernetes::ETCD_PKI).join(file);
                std::fs::read_to_string(&path).with_context(|| format!("cannot read `{path}`"))
            };
            let (certificate, key) = (read("healthcheck-client.crt")?, read("healthcheck-client.key")?);
            let tls = https::client(&read("ca.crt")?, Some((&certificate, &key)))?;
            let client = EtcdClient::new(tls);
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let taken = runtime.block_on(snapshots.take(&client, machine.address.into(), &name))?;
            writeln!(out, "{}", serde_json::to_string_pretty(&taken)?)?;
        }
        EtcdCommand::Restore { name, from, id } => {
            let own = || anyhow::Ok(Machine::identify(config::read(NODE_CONFIG_PATH.into())?)?.name);
            let order = RestoreOrder {
                snapshot: name,
                id: id.unwrap_or_else(|| format!("manual-{now}")),
                from: from.map_or_else(own, Ok)?.to_string(),
            };
            etcd::order_restore(&order)?;
            let mut told = None;
            loop {
                let (done, message) = etcd::restored();
                if done.as_ref() == Some(&order.id) {
                    writeln!(out, "restored, id `{}`", order.id)?;
                    return Ok(());
                }
                if message != told {
                    writeln!(
                        std::io::stderr(),
                        "{}",
                        message.as_deref().unwrap_or("waiting for kprov-node")
                    )?;
                    told = message;
                }
                std::thread::sleep(LOOK);
            }
        }
    }
    Ok(())
}

fn run(config: &Utf8Path) -> anyhow::Result<()> {
    // What the API client fails at is told by whoever called it. `RUST_LOG=kprov_node=debug` tells more.
    let filter =
        EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info,kube_client=off,kube_runtime=off"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    https::use_ring();
    if std::env::var_os(kprov_node::SETTLED).is_none()
        && let Some(program) = node::begin()
    {
        // Better the kprov-node that is here than none.
        let error = become_program(&program, config);
        tracing::error!(%program, %error, "the release's own kprov-node cannot be run");
    }
    reap();
    loop {
        match run_once(config)? {
            End::Stopped => return Ok(()),
            End::Replace(program) => {
                tracing::info!(%program, "going on as another kprov-node");
                let error = become_program(&program, config);
                tracing::error!(%program, %error, "that kprov-node cannot be run");
            }
        }
    }
}

/// Replaces this process; returns why that failed.
fn become_program(program: &Utf8Path, config: &Utf8Path) -> std::io::Error {
    std::process::Command::new(program)
        .args(["run", "--config", config.as_str()])
        .env(kprov_node::SETTLED, "1")
        .exec()
}

/// Takes note of children that ended while another program was this process: they would stay as zombies.
fn reap() {
    let any = nix::unistd::Pid::from_raw(-1);
    // Some may be about to end: those that were started for a moment only, as all others were stopped.
    for _ in 0..20 {
        match waitpid(any, Some(WaitPidFlag::WNOHANG)) {
            Err(_) => return,
            Ok(WaitStatus::StillAlive) => std::thread::sleep(Duration::from_millis(25)),
            Ok(_) => {}
        }
    }
}

fn run_once(config: &Utf8Path) -> anyhow::Result<End> {
    // Two threads: the front keeps its pace while something else computes, and memory stays small.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(8)
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let end = runtime.block_on(async {
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
    });
    // What blocks still (a file being hashed) must hold nobody up.
    runtime.shutdown_background();
    end
}
