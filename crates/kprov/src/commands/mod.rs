//! One module for each command.

mod access;
pub(crate) mod baremetal;
mod boot;
mod control;
mod down;
mod etcd;
mod inventory;
mod kubeconfig;
mod list;
mod objects;
mod plan;
mod power;
mod providers;
mod release;
mod status;
pub(crate) mod up;
mod upgrade;

use std::ffi::OsString;
use std::future::Future;
use std::io::Write as _;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::CommandFactory as _;
use kprov_types::cluster;

use crate::cli::{Cli, Command, InventoryCommand};
use crate::failure::UserError;
use crate::home::Home;
use crate::print;
use crate::progress::Reporter;

/// What every command gets.
pub(crate) struct Context {
    /// Where secrets are kept.
    pub home: Home,
    /// Where progress goes.
    pub reporter: Reporter,
}

/// Runs what was asked for.
pub(crate) fn run(cli: Cli) -> Result<()> {
    let Cli { command, global } = cli;
    match &command {
        Command::Schema => return schema(),
        Command::Inventory(InventoryCommand::Schema) => return inventory::schema(),
        Command::Completions { shell } => {
            clap_complete::generate(*shell, &mut Cli::command(), "kprov", &mut std::io::stdout());
            return Ok(());
        }
        Command::Man { out } => return man(out.as_deref()),
        Command::MachineRoom => {
            return Err(UserError::new("`machine-room` is what local machines run on the host").into());
        }
        _ => {}
    }
    let context = Context {
        home: Home::open(global.home.as_deref())?,
        reporter: Reporter::new(&global),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let result = runtime.block_on(async {
        match command {
            Command::Up(args) => Box::pin(interruptible(&context, "up", up::run(&context, args))).await,
            Command::Down(args) => interruptible(&context, "down", down::run(&context, args)).await,
            Command::Plan(args) => plan::run(&context, args).await,
            Command::Status(args) => status::run(&context, args).await,
            Command::Upgrade(args) => Box::pin(interruptible(&context, "upgrade", upgrade::run(&context, *args))).await,
            Command::Pause(args) => control::pause(&context, &args, true).await,
            Command::Resume(args) => control::pause(&context, &args, false).await,
            Command::Rollback(args) => control::rollback(&context, args).await,
            Command::Etcd(command) => etcd::run(&context, command).await,
            Command::List(args) => list::run(&context, args.output).await,
            Command::Kubeconfig(args) => kubeconfig::run(&context, &args),
            Command::Boot(command) => Box::pin(boot::run(&context, command)).await,
            Command::Release(command) => release::run(&context, command).await,
            Command::Inventory(command) => inventory::run(&context, command).await,
            Command::Schema | Command::Completions { .. } | Command::Man { .. } | Command::MachineRoom => Ok(()),
        }
    });
    // Work in other threads that was given up (a payload being hashed, say) isn't waited for.
    runtime.shutdown_background();
    context.reporter.finish();
    result
}

/// Ends the work at Ctrl-C or SIGTERM, and says how to go on. Every step is an ensure, so it may end anywhere.
async fn interruptible(context: &Context, command: &str, work: impl Future<Output = Result<()>>) -> Result<()> {
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::select! {
        result = work => result,
        _ = tokio::signal::ctrl_c() => Err(interrupted(context, command)),
        _ = terminate.recv() => Err(interrupted(context, command)),
    }
}

fn interrupted(context: &Context, command: &str) -> anyhow::Error {
    context.reporter.finish();
    let hint = match command {
        "upgrade" => {
            "once a version is asked for the operator goes on by itself: run the same command again to watch it, or `kprov pause` to hold it"
        }
        "up" => "what was made stays; run the same command again to go on, or `kprov down` to remove it",
        _ => "what was removed is gone; run the same command again to go on",
    };
    UserError::new(format!("`kprov {command}` was interrupted"))
        .hint(hint)
        .into()
}

fn schema() -> Result<()> {
    let schema = schemars::schema_for!(cluster::ClusterFile);
    print::raw(&(serde_json::to_string_pretty(&schema)? + "\n"))
}

fn man(out: Option<&camino::Utf8Path>) -> Result<()> {
    let command = Cli::command();
    if let Some(dir) = out {
        std::fs::create_dir_all(dir).with_context(|| format!("can't make `{dir}`"))?;
        clap_mangen::generate_to(command, dir).with_context(|| format!("can't write pages into `{dir}`"))
    } else {
        let mut page = Vec::new();
        clap_mangen::Man::new(command).render(&mut page)?;
        print::raw(&String::from_utf8_lossy(&page))
    }
}

/// What local machines run on the host, `kprov machine-room init|balancer`: needs no parsing of options, no log and, as it
/// makes namespaces, no other thread. `None` if something else was asked for.
pub(crate) fn machine_room(arguments: impl Iterator<Item = OsString>) -> Option<ExitCode> {
    let mut arguments = arguments;
    if arguments.next()? != "machine-room" {
        return None;
    }
    let program = arguments.next()?;
    if program == "init" {
        return Some(kprov_provider_local::machine_init(arguments));
    }
    if program == "balancer" {
        let arguments: Vec<String> = arguments.filter_map(|a| a.into_string().ok()).collect();
        return Some(match balancer(&arguments) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                let _ = std::io::stderr().write_all(crate::failure::render(&error).as_bytes());
                ExitCode::FAILURE
            }
        });
    }
    None
}

/// The load balancer of a local cluster: a process of its own on the host.
fn balancer(arguments: &[String]) -> Result<()> {
    let [listen_flag, listen, state_flag, state] = arguments else {
        return Err(UserError::new("`machine-room` is what local machines run on the host").into());
    };
    if listen_flag != "--listen" || state_flag != "--state" {
        return Err(UserError::new("`machine-room` is what local machines run on the host").into());
    }
    let config = kprov_front::BalancerConfig {
        listen: listen.parse()?,
        backends_file: camino::Utf8Path::new(state).join("backends.json").into(),
        ca_pem: None,
    };
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_target(false)
        .init();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        kprov_front::run_balancer(config, async move {
            terminate.recv().await;
        })
        .await?;
        Ok(())
    })
}

/// A client by a kubeconfig file.
async fn client(path: &camino::Utf8Path) -> Result<kube::Client> {
    let text = std::fs::read_to_string(path).with_context(|| format!("can't read the kubeconfig `{path}`"))?;
    client_from(&text).await
}

/// A client by a kubeconfig's text.
async fn client_from(text: &str) -> Result<kube::Client> {
    let config = kube::config::Kubeconfig::from_yaml(text).context("the kubeconfig is damaged")?;
    let options = kube::config::KubeConfigOptions::default();
    let mut config = kube::Config::from_custom_kubeconfig(config, &options)
        .await
        .context("the kubeconfig is damaged")?;
    // The cluster's own endpoint is never behind the proxy of the host's environment.
    config.proxy_url = None;
    config.connect_timeout = Some(std::time::Duration::from_secs(5));
    Ok(kube::Client::try_from(config)?)
}
