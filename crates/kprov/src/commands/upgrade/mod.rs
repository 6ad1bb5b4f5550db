//! `kprov upgrade`: finds and verifies the payload of each hop, gives them to the cluster, asks for the version, and shows what
//! the operator makes of it. Everything goes through the Kubernetes API; nothing here knows where the machines are.

pub(super) mod payloads;
mod preview;
pub(super) mod upload;
pub(super) mod watch;

use std::io::{BufRead as _, IsTerminal as _, Write as _};

use anyhow::{Context as _, Result};
use kprov_bootstrap::versions;
use kprov_release::Payload;
use kprov_types::api::{HistoryEntry, ReleaseRef, VersionUpdateStatus};
use kprov_types::{KubernetesVersion, Release};
use kprov_upgrade::Cluster as _;
use kprov_upgrade::hops::{self, PathError};
use kprov_upgrade::kubernetes::{KubeCluster, known_release};
use kprov_upgrade::model::Input;
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::Context as Kprov;
use super::access::Access;
use super::objects::{self, VersionUpdate, status_of};
use crate::cli::UpgradeArgs;
use crate::failure::UserError;
use crate::print;
use crate::progress::Timing;
use payloads::AtHand;

/// How far this host's clock and the cluster's may be apart.
const CLOCKS: jiff::SignedDuration = jiff::SignedDuration::from_secs(5);

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Upgraded {
    schema_version: u32,
    cluster: String,
    from: String,
    kubernetes: String,
    seconds: f64,
    hops: Vec<HistoryEntry>,
    #[serde(skip_serializing_if = "Option::is_none")]
    timings: Option<Vec<Timing>>,
}

pub(super) async fn run(context: &Kprov, args: UpgradeArgs) -> Result<()> {
    let access = Access::open(context, &args.access).await?;
    let update = objects::version_update(&access).await?;
    let status = status_of(&update);
    let mut input = look(&access).await?;
    let current = input.observed.current.clone();
    let under_way = status.hop_started.is_some() || !status.hops.is_empty();
    let asked: Option<KubernetesVersion> = update.spec.desired_version.parse().ok();

    if under_way && asked.as_ref() == Some(&args.to) && !args.dry_run && status.failure.is_none() {
        context
            .reporter
            .note(&format!("joining the upgrade to {} that is under way", args.to));
        if update.spec.paused {
            context
                .reporter
                .note("it is paused: no new step begins until `kprov resume`");
        }
        // How it is done may change on the way; what is asked for stays as it is.
        let mut manner = policy(&args);
        if !args.force.is_empty() {
            manner["force"] = json!(args.force);
        }
        let changes = manner.as_object().is_some_and(|m| !m.is_empty());
        let update = if changes {
            objects::patch_spec(&access, manner).await?
        } else {
            update
        };
        return finish(context, &access, &args, &current, update).await;
    }
    if under_way
        && let Some(asked) = asked.as_ref().filter(|asked| **asked > args.to)
        && !args.dry_run
    {
        return Err(UserError::new(format!("an upgrade to {asked} is under way, which is beyond {}", args.to))
            .hint(format!(
                "watch it by `kprov upgrade --to {asked}`, take its hop back by `kprov rollback`, or hold it by `kprov pause`"
            ))
            .into());
    }

    let at_hand = payloads::find(context, &access, &args.release)?;
    prefer(&mut input, &at_hand);
    let path: Vec<ReleaseRef> = hops::path(&current, &args.to, &input.observed.releases)
        .map_err(|error| no_way(&access, &args.to, &error))?
        .into_iter()
        .cloned()
        .collect();
    if path.is_empty() && !under_way && status.failure.is_none() && asked.as_ref() == Some(&args.to) {
        return already(&args, &access, &current);
    }
    let mut needed = Vec::new();
    for hop in &path {
        if let Some(payload) = at_hand.iter().find(|payload| payload.digest() == hop.digest) {
            context
                .reporter
                .step("", &format!("verify the release payload of {}", hop.version));
            needed.push(payloads::verify(context, &args.trust, payload.root()).await?);
        }
    }
    context.reporter.done("");

    if args.dry_run {
        let hops = manifests(&access, &path, &needed).await?;
        return preview::show(context, &access, &args, input, hops).await;
    }
    if !args.yes && std::io::stdin().is_terminal() && !confirmed(&access, &current, &path)? {
        return Err(UserError::new("nothing was changed").into());
    }
    if update.spec.paused {
        context
            .reporter
            .note("the cluster's upgrades were paused; to ask for a version lets them go on");
    }
    for unknown in args.force.iter().filter(|name| !name.contains('/')) {
        context.reporter.note(&format!(
            "warning: `--force {unknown}` names no finding; they are called like `pdb/default/web`, as `--dry-run` shows them"
        ));
    }
    if args.to.minor() > versions::NEWEST {
        context.reporter.note(&format!(
            "warning: Kubernetes {} is newer than this kprov knows; it is treated as {}",
            args.to,
            versions::NEWEST
        ));
    }
    for payload in &needed {
        upload::push(&access, &context.reporter, payload).await?;
    }
    context.reporter.step("", &format!("ask for {}", args.to));
    let spec = wish(&args, path.last(), &update, &status);
    let update = objects::patch_spec(&access, spec).await?;
    if args.detach {
        context.reporter.done("");
        return print::raw(&format!(
            "cluster `{}` changes to {}; `kprov status` shows it, the same command without `--detach` watches it\n",
            access.name, args.to
        ));
    }
    finish(context, &access, &args, &current, update).await
}

/// One picture of the cluster.
async fn look(access: &Access) -> Result<Input> {
    let unreachable =
        || UserError::new(format!("cluster `{}` can't be looked at", access.name)).hint("see `kprov status`");
    let cluster = KubeCluster::look(access.client.clone())
        .await
        .with_context(unreachable)?;
    let input = cluster.observe().await.with_context(unreachable)?;
    input.ok_or_else(|| unreachable().into())
}

/// Of each version one release counts: the first at hand (what is named comes before what lies about), else what the cluster knows.
/// What it runs it always knows.
fn prefer(input: &mut Input, at_hand: &[Payload]) {
    let observed = &mut input.observed;
    let mut local: Vec<&Payload> = Vec::new();
    for payload in at_hand {
        let version = &payload.release().kubernetes;
        if *version != observed.current.version && local.iter().all(|known| known.release().kubernetes != *version) {
            local.push(payload);
        }
    }
    let current = observed.current.clone();
    observed.releases.retain(|known| {
        known.release == current
            || local
                .iter()
                .all(|payload| payload.release().kubernetes != known.release.version)
    });
    let local = local
        .into_iter()
        .map(|payload| known_release(release_of(payload), payload.release()));
    observed.releases.extend(local);
}

fn release_of(payload: &Payload) -> ReleaseRef {
    ReleaseRef {
        version: payload.release().kubernetes.clone(),
        digest: payload.digest(),
    }
}

/// The manifests of the releases on the way: of the payloads at hand, else as the cluster knows them.
async fn manifests(access: &Access, path: &[ReleaseRef], needed: &[AtHand]) -> Result<Vec<(ReleaseRef, Release)>> {
    let known = objects::list(access, objects::releases(&access.client)).await?;
    let mut all = Vec::new();
    for hop in path {
        let manifest = if let Some(at_hand) = needed.iter().find(|payload| payload.release() == *hop) {
            at_hand.payload.release().clone()
        } else {
            let object = known.iter().find(|release| release.spec.digest == hop.digest);
            let text = object.map(|object| object.spec.manifest.as_str()).unwrap_or_default();
            serde_json::from_str(text).with_context(|| format!("the Release of {} is damaged", hop.version))?
        };
        all.push((hop.clone(), manifest));
    }
    Ok(all)
}

fn no_way(access: &Access, to: &KubernetesVersion, error: &PathError) -> anyhow::Error {
    let hint = match error {
        PathError::NoRelease { version } => {
            format!("make a payload by `kprov release create --version {version}`, and name it with `--release DIR`")
        }
        PathError::NoMinor { minor, .. } => {
            format!("name a payload of any {minor} with `--release DIR`, beside the one of {to}")
        }
        PathError::Downgrade { .. } => {
            "minors only go up; `kprov rollback` takes an unfinished upgrade back, `kprov etcd restore` a finished one"
                .to_owned()
        }
        PathError::Unverified { .. } => {
            "give the payload again with `--release DIR`, and the key it is signed by with `--release-key FILE`"
                .to_owned()
        }
        _ => "choose another version".to_owned(),
    };
    UserError::new(format!("cluster `{}` can't change to {to}: {error}", access.name))
        .hint(hint)
        .into()
}

fn already(args: &UpgradeArgs, access: &Access, current: &ReleaseRef) -> Result<()> {
    let upgraded = Upgraded {
        schema_version: 1,
        cluster: access.name.clone(),
        from: current.version.to_string(),
        kubernetes: current.version.to_string(),
        seconds: 0.0,
        hops: Vec::new(),
        timings: None,
    };
    print::result(args.output.output, &upgraded, |upgraded| {
        format!("cluster `{}` runs {} already\n", upgraded.cluster, upgraded.kubernetes)
    })
}

/// The part of the VersionUpdate's spec that says how, as far as the arguments do.
fn policy(args: &UpgradeArgs) -> Value {
    let mut policy = Map::new();
    let mut set = |name: &str, value: Option<Value>| {
        if let Some(value) = value {
            policy.insert(name.to_owned(), value);
        }
    };
    set("maxUnavailable", args.max_unavailable.map(Value::from));
    set("canary", args.canary.map(Value::from));
    set("drainTimeoutSeconds", args.drain_timeout.map(Value::from));
    set("healthTimeoutSeconds", args.health_timeout.map(Value::from));
    if policy.is_empty() {
        return json!({});
    }
    json!({ "policy": policy })
}

/// The change of the VersionUpdate's spec that asks for what the arguments say.
fn wish(
    args: &UpgradeArgs,
    release: Option<&ReleaseRef>,
    update: &VersionUpdate,
    status: &VersionUpdateStatus,
) -> Value {
    let mut spec = policy(args);
    spec["desiredVersion"] = json!(args.to);
    spec["release"] = json!(release.map(|release| &release.digest));
    spec["force"] = json!(args.force);
    spec["paused"] = json!(false);
    // To ask again for what has failed is to ask for another try.
    if status.failure.is_some() {
        spec["attempt"] = json!(update.spec.attempt + 1);
    }
    spec
}

fn confirmed(access: &Access, current: &ReleaseRef, path: &[ReleaseRef]) -> Result<bool> {
    let mut stderr = anstream::stderr();
    let way: Vec<String> = path.iter().map(|hop| hop.version.to_string()).collect();
    write!(
        stderr,
        "change cluster `{}` from {} to {}? [y/N] ",
        access.name,
        current.version,
        way.join(", then ")
    )?;
    stderr.flush()?;
    let mut answer = String::new();
    std::io::stdin()
        .lock()
        .read_line(&mut answer)
        .context("can't read your answer")?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

async fn finish(
    context: &Kprov,
    access: &Access,
    args: &UpgradeArgs,
    from: &ReleaseRef,
    update: VersionUpdate,
) -> Result<()> {
    let status = status_of(&update);
    let begun = status.hop_started.unwrap_or_else(jiff::Timestamp::now);
    let watch::End::Done(status) = watch::follow(access, &context.reporter, &update).await?;
    context.reporter.finish();
    remember(access, args, &status)?;
    let upgraded = Upgraded {
        schema_version: 1,
        cluster: access.name.clone(),
        from: from.version.to_string(),
        kubernetes: args.to.to_string(),
        seconds: context.reporter.elapsed().as_secs_f64(),
        // The cluster's clock and this one may differ by some seconds.
        hops: status
            .history
            .iter()
            .filter(|hop| hop.finished >= begun.saturating_sub(CLOCKS).unwrap_or(begun))
            .cloned()
            .collect(),
        timings: args.timings.then(|| context.reporter.timings()),
    };
    print::result(args.output.output, &upgraded, human)
}

/// Keeps which release the cluster runs now, for the next `up` of this host.
fn remember(access: &Access, args: &UpgradeArgs, status: &VersionUpdateStatus) -> Result<()> {
    let Some(home) = &access.home else { return Ok(()) };
    let Some(mut record) = home.record()? else {
        return Ok(());
    };
    let places = args
        .release
        .iter()
        .cloned()
        .chain(record.release.parent().map(camino::Utf8Path::to_owned));
    for place in places {
        let found = std::iter::once(place.clone())
            .chain(
                place
                    .read_dir_utf8()
                    .into_iter()
                    .flatten()
                    .flatten()
                    .map(camino::Utf8DirEntry::into_path),
            )
            .filter_map(|path| kprov_release::Payload::open(&path).ok())
            .find(|payload| Some(payload.digest()) == status.current_release);
        if let Some(payload) = found {
            record.kubernetes = payload.release().kubernetes.clone();
            record.release_digest = payload.digest();
            record.release = camino::absolute_utf8(payload.root()).unwrap_or_else(|_| payload.root().to_owned());
            return home.keep_record(&record);
        }
    }
    Ok(())
}

fn human(upgraded: &Upgraded) -> String {
    use std::fmt::Write as _;
    let Upgraded {
        schema_version: _,
        cluster,
        from,
        kubernetes,
        seconds,
        hops,
        timings,
    } = upgraded;
    let mut text = String::new();
    if let Some(timings) = timings {
        text.push_str(&print::table(
            &["start", "took", "what", "step"],
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
    for hop in hops {
        let took = hop.finished.duration_since(hop.started).as_secs_f64();
        let from = hop.from.as_deref().unwrap_or("?");
        let _ = writeln!(text, "{from} -> {}: {took:.1} s", hop.release.version);
    }
    let _ = writeln!(
        text,
        "cluster `{cluster}` runs Kubernetes {kubernetes} (from {from}) after {seconds:.1} s"
    );
    text
}
