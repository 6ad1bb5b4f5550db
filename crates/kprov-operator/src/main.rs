//! `kprov-operator`: see the library.

use std::ffi::OsString;

use anyhow::Context as _;
use clap::Parser as _;
use kprov_operator::operate::operate;
use kprov_operator::options::Options;
use kprov_operator::supervise::supervise;
use kube::Config;
use tokio::runtime::Builder;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let filter = EnvFilter::builder()
        .with_default_directive(tracing::Level::INFO.into())
        .from_env()
        .context("RUST_LOG is not understood")?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .json()
        .flatten_event(true)
        .with_current_span(true)
        .with_span_list(false)
        .init();
    let Some(start) = &options.worker else {
        let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
        let runtime = Builder::new_current_thread().enable_all().build()?;
        return Ok(runtime.block_on(supervise(&arguments))?);
    };
    start.follow()?;
    // It waits nearly all the time; each thread would keep memory of its own.
    let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(work(&options))
}

async fn work(options: &Options) -> anyhow::Result<()> {
    let stop = CancellationToken::new();
    let mut terminated = signal(SignalKind::terminate())?;
    let mut interrupted = signal(SignalKind::interrupt())?;
    let config = Config::infer().await.context("no way to the API server is known")?;
    let stopped = stop.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminated.recv() => {}
            _ = interrupted.recv() => {}
        }
        stopped.cancel();
    });
    operate(config, options, stop).await?;
    Ok(())
}
