//! From machines to members of a cluster: first-boot data, the release they fetch, and the bundles they wait for.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Context as _, Result};
use camino::Utf8PathBuf;
use kprov_provision::Wanted;
use kprov_types::cluster;
use kprov_types::machine::{Disk, Machine, MachineState, Network, Observed};
use kprov_types::node::{Bundle, ControlPlaneSettings, NodeConfig, ReleaseSource, SetupStep};
use kprov_types::release::Arch;
use kprov_types::{Digest, MachineName, Role};
use sha2::Digest as _;
use tokio::sync::watch;

use super::{Prepared, Source, prepare};
use crate::failure::UserError;
use crate::first_boot;
use crate::home::Secrets;
use crate::progress::Reporter;
use crate::setup::{Delivery, SetupClient};

/// How often a machine that is being set up is asked where it stands.
const ASK: Duration = Duration::from_millis(300);
/// How long a control-plane machine may show no sign of life.
const BOOT_LIMIT: Duration = Duration::from_mins(3);
/// How long one that has told of itself may say nothing before the provider is asked whether it runs at all.
const SILENCE_LIMIT: Duration = Duration::from_secs(15);

/// Offers the payload and kprov-node to machines while `up` runs.
pub(super) async fn serve_release(prepared: &Prepared, network: &Network) -> Result<Source> {
    let urls = &prepared.spec.release_urls;
    if !urls.is_empty() {
        return elsewhere(prepared, urls);
    }
    let path = prepare::node_binary()?;
    let digest = tokio::task::spawn_blocking({
        let path = path.clone();
        move || digest(&path)
    })
    .await??;
    super::serve(prepared, network, (path, digest)).await
}

/// A payload that is offered by somebody else, with the kprov-node that it carries.
fn elsewhere(prepared: &Prepared, urls: &[String]) -> Result<Source> {
    let release = prepared.payload.release();
    let carried = Arch::current().and_then(|arch| release.host_files_for(arch).find(|f| f.name == "kprov-node"));
    let digest = carried.map(|file| file.digest.clone()).ok_or_else(|| {
        UserError::new("the payload carries no `kprov-node` for machines to fetch")
            .hint("make it again without `--without-kprov`, with `kprov-node` beside `kprov`")
    })?;
    let below = format!("blobs/sha256/{}", digest.hex());
    Ok(Source {
        urls: urls.iter().map(|url| url.trim_end_matches('/').to_owned()).collect(),
        binary: (digest, below),
        _stop: None,
    })
}

fn digest(path: &Utf8PathBuf) -> Result<Digest> {
    let mut file = std::fs::File::open(path).with_context(|| format!("can't read `{path}`"))?;
    let mut hasher = sha2::Sha256::new();
    std::io::copy(&mut file, &mut hasher).with_context(|| format!("can't read `{path}`"))?;
    Ok(Digest::from_hex(&hex::encode(hasher.finalize()))?)
}

/// Gives each machine that is wanted its first-boot data.
pub(super) fn add_first_boot(
    goal: &mut Wanted,
    prepared: &Prepared,
    secrets: &Secrets,
    network: &Network,
    disks: &[Disk],
    source: &Source,
) -> Result<()> {
    let Prepared { spec, payload, .. } = prepared;
    for machine in &mut goal.machines {
        let control_plane = machine.role == Role::ControlPlane;
        let planned = spec.machines.iter().find(|planned| planned.name == machine.name);
        let config = NodeConfig {
            cluster: spec.name.clone(),
            // Workers of one kind are told the same where each knows its name already, so that many are made by one call.
            machine: (control_plane || !prepared.provider.sets_host_names()).then(|| machine.name.clone()),
            role: machine.role,
            address: planned.and_then(|planned| planned.address),
            labels: planned.map(|planned| planned.labels.clone()).unwrap_or_default(),
            endpoint: network.endpoint.clone(),
            ca: secrets.cluster.ca.certificate.clone(),
            release: ReleaseSource {
                urls: source.urls.clone(),
                digest: payload.digest(),
            },
            join_token: (!control_plane).then(|| secrets.join_token.clone()),
            setup: if control_plane {
                secrets.setup.get(machine.name.as_str()).cloned()
            } else {
                None
            },
            data: if machine.data_disk {
                let disk = disks.iter().find(|d| d.machine == machine.name);
                Some(
                    disk.with_context(|| format!("machine `{}` has no data disk", machine.name))?
                        .volume
                        .clone(),
                )
            } else {
                None
            },
            network: prepare::node_network(spec),
            virtual_address: spec
                .baremetal
                .virtual_address
                .filter(|_| control_plane && spec.provider == cluster::Provider::Baremetal),
            taint: control_plane && !spec.schedulable_control_plane,
        };
        machine.first_boot = first_boot::script(&config, &source.binary)?;
    }
    Ok(())
}

/// Hands each control-plane machine its bundle and shows where it stands, until it's set up or known to be ready otherwise
/// (`ready`: it has been set up by an earlier run, and its endpoint is closed for good).
pub(super) async fn set_up(
    reporter: &Reporter,
    prepared: &Prepared,
    secrets: &Secrets,
    settings: &ControlPlaneSettings,
    observed: &Observed,
    ready: watch::Receiver<BTreeSet<MachineName>>,
) -> Result<()> {
    let bundle = Bundle {
        settings: settings.clone(),
        secrets: secrets.cluster.clone(),
    };
    let machines = observed
        .machines
        .iter()
        .filter(|m| secrets.setup.contains_key(m.name.as_str()));
    let all = machines.map(|machine| one(reporter, prepared, secrets, &bundle, machine, ready.clone()));
    futures::future::try_join_all(all).await.map(drop)
}

async fn one(
    reporter: &Reporter,
    prepared: &Prepared,
    secrets: &Secrets,
    bundle: &Bundle,
    machine: &Machine,
    ready: watch::Receiver<BTreeSet<MachineName>>,
) -> Result<()> {
    let name = machine.name.as_str();
    let identity = secrets
        .setup
        .get(name)
        .with_context(|| format!("`{name}` has no setup identity"))?;
    let address = machine
        .external_address
        .or(machine.address)
        .with_context(|| format!("machine `{name}` has no address"))?;
    let client = SetupClient::new(address, &identity.certificate, &secrets.setup_client)?;
    let start = tokio::time::Instant::now();
    let mut seen = None;
    let mut delivered = false;
    reporter.step(name, "booting");
    loop {
        if ready.borrow().contains(&machine.name) {
            break;
        }
        match client.status().await {
            Ok(status) => {
                seen = Some(tokio::time::Instant::now());
                reporter.step(name, step(status.step));
                if let Some(message) = &status.message {
                    reporter.message(name, message);
                }
                // One it has taken from an earlier run is as good: the certificate it shows is the same.
                delivered |= status.bundle.is_some();
                if !delivered {
                    match client.deliver(bundle).await {
                        Ok(Delivery::Accepted) => delivered = true,
                        Ok(Delivery::Refused(why)) => {
                            return Err(UserError::new(format!("machine `{name}` refused its bundle: {}", why.trim()))
                                .hint("it belongs to another run of `up`; remove the cluster with `kprov down` and make it again")
                                .into());
                        }
                        // Lost on the way: asked again with the next status.
                        Err(error) => tracing::debug!("bundle for {name}: {error:#}"),
                    }
                }
                if status.step == SetupStep::Done {
                    break;
                }
            }
            Err(error) => {
                tracing::debug!("setup endpoint of {name}: {error:#}");
                // After it was seen its closing means that it's set up, or has failed; before, that it hasn't booted or was set up
                // long ago.
                match seen {
                    None if start.elapsed() > BOOT_LIMIT => return Err(never_booted(prepared, machine).await),
                    Some(last) if last.elapsed() > SILENCE_LIMIT => {
                        ensure_runs(prepared, machine).await?;
                        seen = Some(tokio::time::Instant::now());
                    }
                    _ => {}
                }
            }
        }
        tokio::time::sleep(ASK).await;
    }
    reporter.done(name);
    Ok(())
}

fn step(step: SetupStep) -> &'static str {
    match step {
        SetupStep::Started => "starting",
        SetupStep::Fetching => "fetching the release",
        SetupStep::Images => "pulling images",
        SetupStep::Waiting => "waiting for the bundle",
        SetupStep::Etcd => "starting etcd",
        SetupStep::ControlPlane => "starting the control plane",
        SetupStep::Done => "set up",
    }
}

async fn never_booted(prepared: &Prepared, machine: &Machine) -> anyhow::Error {
    let console = console(prepared, &machine.name).await;
    UserError::new(format!(
        "machine `{}` shows no sign of life after {} s{console}",
        machine.name,
        BOOT_LIMIT.as_secs()
    ))
    .hint("see its console above; `kprov up` tries again, `kprov down` removes it")
    .into()
}

/// An error if the provider says that a machine runs no more.
async fn ensure_runs(prepared: &Prepared, machine: &Machine) -> Result<()> {
    let observed = prepared.provider.observe(&prepared.spec.name).await;
    let stopped = observed.is_ok_and(|observed| {
        observed
            .machines
            .iter()
            .any(|m| m.name == machine.name && m.state == MachineState::Stopped)
    });
    if !stopped {
        return Ok(());
    }
    let console = console(prepared, &machine.name).await;
    Err(UserError::new(format!(
        "machine `{}` has stopped while it was set up{console}",
        machine.name
    ))
    .hint("see its console above; `kprov up` tries again, `kprov down` removes it")
    .into())
}

/// The last lines a machine printed, for an error.
async fn console(prepared: &Prepared, machine: &MachineName) -> String {
    let text = prepared
        .provider
        .console(&prepared.spec.name, machine)
        .await
        .ok()
        .flatten()
        .unwrap_or_default();
    let lines: Vec<&str> = text.lines().rev().take(15).collect();
    if lines.is_empty() {
        return String::new();
    }
    let lines: Vec<String> = lines.iter().rev().map(|l| format!("\n    {l}")).collect();
    format!("; its console ends:{}", lines.concat())
}

/// The error for a cluster that wasn't ready in time, with the console of a machine that isn't.
pub(super) async fn too_late(prepared: &Prepared, limit: Duration) -> anyhow::Error {
    let mut consoles = String::new();
    if let Ok(observed) = prepared.provider.observe(&prepared.spec.name).await {
        for machine in observed.machines.iter().take(3) {
            let _ = write!(
                consoles,
                "\n  machine `{}`{}",
                machine.name,
                console(prepared, &machine.name).await
            );
        }
    }
    UserError::new(format!(
        "cluster `{}` was not ready within {} s{consoles}",
        prepared.spec.name,
        limit.as_secs()
    ))
    .hint("run the same command again to go on, with a longer `--timeout` on a slow machine; `kprov down` removes it")
    .into()
}
