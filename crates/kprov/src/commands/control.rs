//! `kprov pause`, `resume` and `rollback`: changes of the VersionUpdate's spec, and the wait until the operator has seen them.

use std::time::Duration;

use anyhow::Result;
use serde::Serialize;
use serde_json::json;

use super::Context;
use super::access::Access;
use super::objects::{self, status_of};
use super::upgrade::watch;
use crate::cli::{AccessArgs, RollbackArgs};
use crate::failure::UserError;
use crate::print;

/// How long the operator may take to see a change.
const REACTION: Duration = Duration::from_secs(20);
const LOOK: Duration = Duration::from_millis(300);

/// Sets `spec.paused`, and waits until the operator has seen it.
pub(super) async fn pause(context: &Context, args: &AccessArgs, paused: bool) -> Result<()> {
    let access = Access::open(context, args).await?;
    let before = objects::version_update(&access).await?;
    let name = &access.name;
    if before.spec.paused == paused && status_of(&before).paused == paused {
        let text = if paused { "paused" } else { "not paused" };
        return print::raw(&format!("cluster `{name}` is {text} already\n"));
    }
    let generation = objects::patch_spec(&access, json!({ "paused": paused }))
        .await?
        .metadata
        .generation
        .unwrap_or_default();
    let deadline = tokio::time::Instant::now() + REACTION;
    while tokio::time::Instant::now() < deadline {
        let status = status_of(&objects::version_update(&access).await?);
        if status.observed_generation >= generation {
            let text = match (paused, status.steps.first()) {
                (true, Some(step)) => format!("cluster `{name}` is paused; this ends by itself: {}\n", step.message),
                (true, None) => format!("cluster `{name}` is paused; no new step begins until `kprov resume`\n"),
                (false, _) => format!("cluster `{name}` goes on\n"),
            };
            return print::raw(&text);
        }
        tokio::time::sleep(LOOK).await;
    }
    Err(
        UserError::new("it is written down, but the operator has not seen it yet")
            .hint("it counts as soon as the operator runs; see `kprov status`")
            .into(),
    )
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct RolledBack {
    schema_version: u32,
    cluster: String,
    kubernetes: String,
    seconds: f64,
}

/// Takes the hop under way back: asks for the version that the cluster ran before it.
pub(super) async fn rollback(context: &Context, args: RollbackArgs) -> Result<()> {
    let RollbackArgs { access, detach, output } = args;
    let access = Access::open(context, &access).await?;
    let update = objects::version_update(&access).await?;
    let status = status_of(&update);
    let Some(current) = status.current_version.clone() else {
        return Err(UserError::new("the operator has not told yet what the cluster runs")
            .hint("wait a moment, and see `kprov status`")
            .into());
    };
    if status.hop_started.is_none()
        && status.hops.is_empty()
        && update.spec.desired_version.trim_start_matches('v') == current
    {
        return Err(UserError::new(format!(
            "there is nothing to take back: cluster `{}` runs {current}, and no upgrade is under way",
            access.name
        ))
        .hint("a finished minor can't be undone; `kprov etcd restore` goes back to the snapshot taken before it")
        .into());
    }
    let update = objects::patch_spec(
        &access,
        json!({ "desiredVersion": current, "release": status.current_release, "paused": false }),
    )
    .await?;
    if detach {
        return print::raw(&format!(
            "cluster `{}` goes back to {current}; `kprov status` shows it\n",
            access.name
        ));
    }
    let watch::End::Done(_) = watch::follow(&access, &context.reporter, &update).await?;
    context.reporter.finish();
    let done = RolledBack {
        schema_version: 1,
        cluster: access.name.clone(),
        kubernetes: current,
        seconds: context.reporter.elapsed().as_secs_f64(),
    };
    print::result(output.output, &done, |done| {
        format!(
            "cluster `{}` is back at {} after {:.1} s\n",
            done.cluster, done.kubernetes, done.seconds
        )
    })
}
