//! `kprov up`: from what is wanted to a running self-hosted cluster.
//!
//! Every step is an ensure, so the whole can be killed anywhere and run again:
//! check what is asked for and the payload -> look what is there -> network -> secrets -> machines -> hand each
//! control-plane machine its bundle -> apply the self-hosted objects -> wait until they have taken over.

mod api;
mod machines;
mod prepare;

use std::time::Duration;

use anyhow::{Context as _, Result};
use futures::FutureExt as _;
use futures::future::BoxFuture;
use kprov_provider::{Provider, ProviderError};
use kprov_provision::{Action, Goal, Pace, Progress, Waiting};
use kprov_release::serve::{Content, ExtraFile, serve as serve_release};
use kprov_types::machine::{MachineState, Network, Observed};
use kprov_types::{ClusterName, KubernetesVersion, MachineName, ports};
use serde::Serialize;
use tokio_util::sync::{CancellationToken, DropGuard};

pub(super) use prepare::{Prepared, node_binary, wanted};

use super::{Context, baremetal};
use crate::cli::UpArgs;
use crate::failure::{OrHint as _, UserError};
use crate::print;
use crate::progress::{Reporter, Timing};

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Up {
    schema_version: u32,
    name: ClusterName,
    kubernetes: KubernetesVersion,
    endpoint: String,
    kubeconfig: camino::Utf8PathBuf,
    machines: Vec<String>,
    seconds: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    timings: Option<Vec<Timing>>,
}

pub(super) async fn run(context: &Context, args: UpArgs) -> Result<()> {
    let prepared = prepare::prepare(context, &args).await?;
    let UpArgs {
        cluster: _,
        trust: _,
        wipe: _,
        timings,
        timeout,
        output,
    } = args;
    let limit = Duration::from_secs(timeout);
    let lock = prepared.home.lock()?;
    let result = tokio::time::timeout(limit, ensure(context, &prepared)).await;
    let observed = match result {
        Ok(Ok(observed)) => observed,
        Ok(Err(error)) => {
            clean_up_after_nothing(&prepared).await;
            return Err(error);
        }
        Err(_) => return Err(machines::too_late(&prepared, limit).await),
    };
    drop(lock);
    context.reporter.finish();
    let up = Up {
        schema_version: 1,
        name: prepared.spec.name.clone(),
        kubernetes: prepared.payload.release().kubernetes.clone(),
        endpoint: network(&observed)?.endpoint.url(),
        kubeconfig: prepared.home.kubeconfig(),
        machines: observed.machines.iter().map(|m| m.name.to_string()).collect(),
        seconds: context.reporter.elapsed().as_secs_f64(),
        timings: timings.then(|| context.reporter.timings()),
    };
    print::result(output.output, &up, human)
}

async fn ensure(context: &Context, prepared: &Prepared) -> Result<Observed> {
    let Prepared {
        provider, spec, home, ..
    } = prepared;
    let reporter = &context.reporter;

    // Network and disks come first: machines are told the endpoint, where their disk is, and where to fetch their release.
    let mut goal = wanted(spec);
    goal.machines.clear();
    let observed = drive(context, provider.as_ref(), &spec.name, &Goal::Present(goal)).await?;
    let network = network(&observed)?.clone();
    let disks = observed.disks;

    reporter.step("", "secrets");
    let secrets = prepare::ensure_secrets(prepared)?;
    prepare::ensure_kubeconfig(home, spec, &secrets, &network)?;
    home.keep_record(&prepared.record(false))?;

    let source = machines::serve_release(prepared, &network).await?;
    let mut goal = wanted(spec);
    machines::add_first_boot(&mut goal, prepared, &secrets, &network, &disks, &source)?;
    let (observed, unfinished) = match drive(context, provider.as_ref(), &spec.name, &Goal::Present(goal)).await {
        Ok(observed) => (observed, None),
        Err(error) => enough(prepared, error).await?,
    };
    if let Some(kept) = &prepared.inventory {
        baremetal::note_surplus(reporter, &spec.name, kept, &observed);
    }

    let settings = prepare::settings(prepared, &observed, &network)?;
    api::self_host(context, prepared, &secrets, &settings, &observed).await?;
    home.keep_record(&prepared.record(true))?;
    if let Some(error) = unfinished {
        return Err(error);
    }
    reporter.done("");
    Ok(observed)
}

/// Hosts in trouble don't hold up those that are well: with the whole control plane there, the cluster is made without the
/// others, and the error stands at the end.
async fn enough(prepared: &Prepared, error: anyhow::Error) -> Result<(Observed, Option<anyhow::Error>)> {
    if prepared.inventory.is_none() {
        return Err(error);
    }
    let Ok(observed) = prepared.provider.observe(&prepared.spec.name).await else {
        return Err(error);
    };
    let runs = |name: &MachineName| {
        observed
            .machines
            .iter()
            .any(|m| m.name == *name && m.state == MachineState::Running)
    };
    if prepared.spec.control_plane().all(runs) {
        return Ok((observed, Some(error)));
    }
    Err(error)
}

/// A first `up` that failed before there was any machine leaves nothing behind.
async fn clean_up_after_nothing(prepared: &Prepared) {
    if prepared.known {
        return;
    }
    let Prepared {
        provider, spec, home, ..
    } = prepared;
    let Ok(observed) = provider.observe(&spec.name).await else {
        return;
    };
    if !observed.machines.is_empty() || !observed.disks.is_empty() {
        return;
    }
    // A failure here would only hide the one that is being reported.
    let removed = provider.remove_network(&spec.name).await;
    if removed.is_ok() || observed.network.is_none() {
        let _ = home.forget();
    }
}

pub(super) fn network(observed: &Observed) -> Result<&Network> {
    observed
        .network
        .as_ref()
        .context("the provider made a network and doesn't list it")
}

/// Where machines fetch their release from.
pub(super) struct Source {
    urls: Vec<String>,
    /// kprov-node's digest, and its path below each URL.
    binary: (kprov_types::Digest, String),
    /// Ends what `up` itself offers.
    _stop: Option<DropGuard>,
}

/// Works towards a goal at the provider, and shows it.
pub(super) async fn drive(
    context: &Context,
    provider: &dyn Provider,
    cluster: &ClusterName,
    goal: &Goal,
) -> Result<Observed> {
    let driver = Driver {
        reporter: &context.reporter,
    };
    kprov_provision::drive(provider, cluster, goal, Duration::from_mins(10), &driver, &driver)
        .await
        .map_err(|error| match error {
            kprov_provision::DriveError::Provider(error) => error.into(),
            kprov_provision::DriveError::Plan(error) => anyhow::Error::from(
                UserError::new(error.to_string()).hint("`kprov plan` shows what is there; `kprov down` removes it"),
            ),
            late @ kprov_provision::DriveError::Deadline { .. } => late.into(),
        })
}

struct Driver<'a> {
    reporter: &'a Reporter,
}

impl Pace for Driver<'_> {
    fn elapsed(&self) -> Duration {
        self.reporter.elapsed()
    }
    fn sleep(&self, duration: Duration) -> BoxFuture<'_, ()> {
        tokio::time::sleep(duration).boxed()
    }
}

impl Progress for Driver<'_> {
    fn action(&self, action: &Action) {
        self.reporter.step("", &action.to_string());
    }
    fn waiting(&self, waiting: &[Waiting]) {
        let names: Vec<_> = waiting
            .iter()
            .map(|w| match w {
                Waiting::Pending(name) | Waiting::Terminating(name) => name.as_str(),
            })
            .collect();
        self.reporter.step("", "wait for machines");
        self.reporter.message("", &names.join(", "));
    }
    fn retrying(&self, error: &ProviderError, delay: Duration) {
        self.reporter
            .note(&format!("{error}; trying again in {:.1} s", delay.as_secs_f64()));
    }
}

/// Starts the release server where the provider gives an address for it.
pub(super) async fn serve(
    prepared: &Prepared,
    network: &Network,
    binary: (camino::Utf8PathBuf, kprov_types::Digest),
) -> Result<Source> {
    let (path, digest) = binary;
    let address = network.host_address.ok_or_else(|| {
        UserError::new(format!(
            "machines of provider `{}` can't reach this program to fetch their release",
            prepared.provider.name()
        ))
        .hint("run `kprov release serve` where they can, or put the payload's files on any HTTP server, and name it with `--release-url URL`")
    })?;
    let listen = std::net::SocketAddr::from((address, ports::RELEASE));
    let listener = tokio::net::TcpListener::bind(listen).await.or_hint(
        format!("can't listen on `{listen}`, where machines fetch their release"),
        "end what listens there (`kprov release serve`, perhaps), and try again",
    )?;
    let stop = CancellationToken::new();
    let below = format!("kprov-node/{}", digest.hex());
    let content = Content::new(prepared.payload.clone())?.with_extra(format!("/{below}"), ExtraFile::Disk(path));
    tokio::spawn(serve_release(listener, content, stop.clone()));
    Ok(Source {
        urls: vec![format!("http://{listen}")],
        binary: (digest, below),
        _stop: Some(stop.drop_guard()),
    })
}

fn human(up: &Up) -> String {
    use std::fmt::Write as _;
    let Up {
        schema_version: _,
        name,
        kubernetes,
        endpoint,
        kubeconfig,
        machines,
        seconds,
        timings,
    } = up;
    let mut text = String::new();
    if let Some(timings) = timings {
        text.push_str(&print::table(
            &["start", "took", "where", "step"],
            timings.iter().map(|t| {
                let place = if t.track.is_empty() { "cluster" } else { &t.track };
                vec![
                    format!("{:.1} s", t.start_seconds),
                    format!("{:.1} s", t.seconds),
                    place.to_owned(),
                    t.step.clone(),
                ]
            }),
        ));
        text.push('\n');
    }
    let _ = writeln!(
        text,
        "cluster `{name}` runs Kubernetes {kubernetes} on {} at {endpoint}, ready after {seconds:.1} s\n",
        if machines.len() == 1 {
            "1 machine".to_owned()
        } else {
            format!("{} machines", machines.len())
        }
    );
    let _ = writeln!(text, "use it:     kubectl --kubeconfig {kubeconfig} get nodes");
    let _ = writeln!(text, "or merge:   kprov kubeconfig --name {name} --merge");
    let _ = writeln!(text, "look at it: kprov status --name {name}");
    let _ = writeln!(text, "remove it:  kprov down --name {name}");
    text
}
