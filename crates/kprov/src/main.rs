//! `kprov`, the program for people: launches self-hosted Kubernetes clusters.
//!
//! Start reading at [`cli`] (what can be asked for), then [`commands::up`], which ties the parts together. Logic lives in
//! the crates beneath; here it is put in order, shown and explained.

mod cli;
mod commands;
mod config;
mod failure;
mod first_boot;
mod home;
mod print;
mod progress;
mod setup;

use std::io::Write as _;
use std::process::ExitCode;

use clap::Parser as _;

use crate::cli::Cli;

fn main() -> ExitCode {
    if let Some(code) = commands::machine_room(std::env::args_os().skip(1)) {
        return code;
    }
    // A cloud's SDK brings a second provider of cryptography with it; which one is used has to be said.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let cli = Cli::parse();
    trace(cli.global.verbose);
    match commands::run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = anstream::stderr().write_all(failure::render(&error).as_bytes());
            ExitCode::from(failure::exit_code(&error))
        }
    }
}

/// Whether kprov was called as `kubectl kprov`, by the name of kubectl's plugin.
pub(crate) fn is_kubectl_plugin() -> bool {
    let name = std::env::args_os().next();
    name.is_some_and(|name| {
        std::path::Path::new(&name)
            .file_name()
            .is_some_and(|f| f == "kubectl-kprov")
    })
}

fn trace(verbose: u8) {
    // A target stands for all that begin so. What libraries warn of, our own errors say in the user's words.
    let default = match verbose {
        0 => "error,kube_client=off,kprov=warn",
        1 => "warn,kube_client=off,kprov=info",
        _ => "info,kube_client=warn,kprov=debug",
    };
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| default.into());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .init();
}
