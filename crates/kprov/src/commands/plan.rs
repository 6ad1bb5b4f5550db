//! `kprov plan`: what `up` would do.

use anyhow::Result;
use kprov_provision::{Goal, Plan};
use kprov_types::ClusterName;
use serde::Serialize;

use super::{Context, providers, up};
use crate::cli::PlanArgs;
use crate::config;
use crate::failure::UserError;
use crate::print;

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Planned {
    schema_version: u32,
    name: ClusterName,
    /// In words, in order.
    actions: Vec<String>,
    /// Machines that nobody asked for; `up` leaves them alone.
    surplus: Vec<String>,
}

pub(super) async fn run(context: &Context, args: PlanArgs) -> Result<()> {
    let wanted = config::load(&args.cluster, |name| {
        let record = context.home.cluster(name).record().ok().flatten()?;
        Some((record.file, Some(record.release)))
    })?;
    let (provider, spec) = providers::open_for(context, wanted.spec).await?;
    let observed = provider.observe(&spec.name).await?;
    let goal = Goal::Present(up::wanted(&spec));
    let Plan {
        actions,
        waiting: _,
        surplus,
    } = kprov_provision::plan(&goal, &observed)
        .map_err(|e| anyhow::Error::from(UserError::new(e.to_string()).hint("`kprov status` shows what is there")))?;
    let mut actions: Vec<String> = actions.iter().map(ToString::to_string).collect();
    let complete = context.home.cluster(&spec.name).record()?.is_some_and(|r| r.complete);
    if !complete {
        actions.push("start a temporary control plane, apply the self-hosted one, and remove the temporary one".into());
    }
    let planned = Planned {
        schema_version: 1,
        name: spec.name,
        actions,
        surplus: surplus.iter().map(ToString::to_string).collect(),
    };
    print::result(args.output.output, &planned, human)
}

fn human(planned: &Planned) -> String {
    use std::fmt::Write as _;
    let Planned {
        schema_version: _,
        name,
        actions,
        surplus,
    } = planned;
    let mut text = String::new();
    if actions.is_empty() {
        let _ = writeln!(text, "cluster `{name}` is as wanted; `up` would change nothing");
    } else {
        let _ = writeln!(text, "`up` would, for cluster `{name}`:");
        for action in actions {
            let _ = writeln!(text, "  + {action}");
        }
    }
    if !surplus.is_empty() {
        let _ = writeln!(text, "and leave alone, though not asked for: {}", surplus.join(", "));
    }
    text
}
