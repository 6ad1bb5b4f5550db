//! `kprov etcd snapshots|restore`.

use std::collections::BTreeMap;
use std::io::{BufRead as _, IsTerminal as _, Write as _};
use std::time::Duration;

use anyhow::{Context as _, Result};
use kprov_types::Role;
use kprov_types::api::{RestoreOrder, SnapshotStatus};
use kube::ResourceExt as _;
use kube::api::{Patch, PatchParams};
use serde::Serialize;
use serde_json::json;

use super::Context;
use super::access::Access;
use super::objects::{self, Machine, status_of};
use crate::cli::{EtcdCommand, Output};
use crate::failure::UserError;
use crate::print;

/// How long a restore may take.
const LIMIT: Duration = Duration::from_mins(10);
const LOOK: Duration = Duration::from_secs(1);

pub(super) async fn run(context: &Context, command: EtcdCommand) -> Result<()> {
    match command {
        EtcdCommand::Snapshots { access, output } => {
            let access = Access::open(context, &access).await?;
            snapshots(&access, output.output).await
        }
        EtcdCommand::Restore { snapshot, access, yes } => {
            let access = Access::open(context, &access).await?;
            restore(context, &access, &snapshot, yes).await
        }
    }
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Snapshots {
    schema_version: u32,
    snapshots: Vec<Row>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Row {
    machine: String,
    #[serde(flatten)]
    snapshot: SnapshotStatus,
}

fn snapshots_of(machines: &[Machine]) -> Vec<(String, SnapshotStatus)> {
    let mut all: Vec<_> = machines
        .iter()
        .flat_map(|machine| {
            let status = machine.status.clone().unwrap_or_default();
            status.snapshots.into_iter().map(|s| (machine.name_any(), s))
        })
        .collect();
    all.sort_by_key(|(_, snapshot)| snapshot.time);
    all
}

async fn snapshots(access: &Access, output: Output) -> Result<()> {
    let machines = objects::list(access, objects::machines(&access.client)).await?;
    let result = Snapshots {
        schema_version: 1,
        snapshots: snapshots_of(&machines)
            .into_iter()
            .map(|(machine, snapshot)| Row { machine, snapshot })
            .collect(),
    };
    print::result(output, &result, |result| {
        if result.snapshots.is_empty() {
            return "no snapshot yet; each hop of an upgrade takes one first\n".into();
        }
        print::table(
            &["snapshot", "machine", "taken", "size"],
            result.snapshots.iter().map(|row| {
                vec![
                    row.snapshot.name.clone(),
                    row.machine.clone(),
                    row.snapshot.time.to_string(),
                    format!("{} KiB", row.snapshot.size >> 10),
                ]
            }),
        )
    })
}

async fn restore(context: &Context, access: &Access, name: &str, yes: bool) -> Result<()> {
    let machines = objects::list(access, objects::machines(&access.client)).await?;
    let all = snapshots_of(&machines);
    let Some((from, snapshot)) = all.iter().rev().find(|(_, s)| s.name == name) else {
        return Err(UserError::new(format!(
            "no machine of cluster `{}` has a snapshot `{name}`",
            access.name
        ))
        .hint("`kprov etcd snapshots` lists them")
        .into());
    };
    if !yes && !confirmed(&access.name, snapshot)? {
        return Err(UserError::new("nothing was changed").into());
    }
    context.reporter.step("", "hold upgrades");
    objects::patch_spec(access, json!({ "paused": true })).await?;

    context.reporter.step("", &format!("restore `{name}`"));
    let order = RestoreOrder {
        snapshot: name.to_owned(),
        id: format!("{}-{}", jiff::Timestamp::now().as_millisecond(), std::process::id()),
        from: from.clone(),
    };
    let members: BTreeMap<String, u64> = machines
        .iter()
        .filter_map(|machine| {
            let status = machine.status.clone()?;
            (status.role == Some(Role::ControlPlane))
                .then(|| (machine.name_any(), machine.spec.order.max(status.observed_order) + 1))
        })
        .collect();
    let api = objects::machines(&access.client);
    // The one that begins is told last, when the others know: with its restore the orders are gone from the API.
    let mut others: Vec<_> = members.iter().filter(|(name, _)| *name != from).collect();
    others.extend(members.iter().filter(|(name, _)| *name == from));
    for (machine, number) in others {
        let patch = Patch::Merge(json!({ "spec": { "order": number, "restore": order } }));
        api.patch(machine, &PatchParams::default(), &patch)
            .await
            .map_err(|error| objects::unreachable_api(access, error))?;
    }

    let deadline = tokio::time::Instant::now() + LIMIT;
    let mut missing: Vec<String> = members.keys().cloned().collect();
    let mut held = false;
    loop {
        // The API goes away and comes back meanwhile.
        if let Ok(machines) = objects::list(access, objects::machines(&access.client)).await {
            missing = members
                .keys()
                .filter(|name| {
                    let machine = machines.iter().find(|m| m.name_any() == **name);
                    let status = machine.and_then(|m| m.status.clone());
                    status.is_none_or(|status| status.restored.as_deref() != Some(order.id.as_str()))
                })
                .cloned()
                .collect();
            context
                .reporter
                .message("", &format!("waits for {}", missing.join(", ")));
        }
        // The snapshot has what was asked for when it was taken; that must not begin again behind one's back.
        let restored = missing.len() < members.len();
        if restored && !held {
            held = hold_at_current(access).await.is_ok();
        }
        if missing.is_empty() && held {
            break;
        }
        if tokio::time::Instant::now() > deadline {
            return Err(UserError::new(format!("not restored on {}", missing.join(", ")))
                .hint("see `/var/log/kprov` on that machine; the old data lies beside etcd's data directory there")
                .into());
        }
        tokio::time::sleep(LOOK).await;
    }
    objects::patch_spec(access, json!({ "paused": false }))
        .await
        .context("the data is restored, but upgrades are still held; `kprov resume` lets them go on")?;
    context.reporter.done("");
    print::raw(&format!(
        "cluster `{}` has the data of `{name}`, taken {}; the data it had before is kept on each machine\n",
        access.name, snapshot.time
    ))
}

/// Asks for the version that the restored data says the cluster runs, and holds upgrades.
async fn hold_at_current(access: &Access) -> Result<()> {
    let update = objects::version_update(access).await?;
    let status = status_of(&update);
    let current = status.current_version.unwrap_or(update.spec.desired_version);
    let wish = json!({ "desiredVersion": current, "release": status.current_release, "paused": true });
    objects::patch_spec(access, wish).await.map(drop)
}

fn confirmed(cluster: &str, snapshot: &SnapshotStatus) -> Result<bool> {
    if !std::io::stdin().is_terminal() {
        return Err(UserError::new(format!(
            "not replacing the data of cluster `{cluster}` without being told to"
        ))
        .hint("give `--yes`")
        .into());
    }
    let mut stderr = anstream::stderr();
    write!(
        stderr,
        "replace all data of cluster `{cluster}` by the snapshot of {}? What was written since is lost. [y/N] ",
        snapshot.time
    )?;
    stderr.flush()?;
    let mut answer = String::new();
    std::io::stdin()
        .lock()
        .read_line(&mut answer)
        .context("can't read your answer")?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}
