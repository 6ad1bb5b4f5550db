//! `kprov plan`: what `up` would do.

use anyhow::Result;
use kprov_provider::{Estimate, Provider};
use kprov_provision::{Action, Goal, Plan};
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
    /// What that makes in the provider's terms, where each call counts.
    #[serde(skip_serializing_if = "Option::is_none")]
    makes: Option<Makes>,
    /// Machines that nobody asked for; `up` leaves them alone.
    surplus: Vec<String>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Makes {
    things: Vec<String>,
    /// About how many API calls that takes.
    calls: u64,
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
    let makes = makes(provider.as_ref(), &spec.name, &actions).await?;
    let mut actions: Vec<String> = actions.iter().map(ToString::to_string).collect();
    let complete = context.home.cluster(&spec.name).record()?.is_some_and(|r| r.complete);
    if !complete {
        actions.push("start a temporary control plane, apply the self-hosted one, and remove the temporary one".into());
    }
    let planned = Planned {
        schema_version: 1,
        name: spec.name,
        actions,
        makes,
        surplus: surplus.iter().map(ToString::to_string).collect(),
    };
    print::result(args.output.output, &planned, human)
}

/// What the actions make in the provider's terms.
async fn makes(provider: &dyn Provider, cluster: &ClusterName, actions: &[Action]) -> Result<Option<Makes>> {
    let (mut network, mut disks, mut machines): (_, &[_], &[_]) = (None, &[], &[]);
    for action in actions {
        match action {
            Action::EnsureNetwork(spec) => network = Some(spec),
            Action::EnsureDisks(specs) => disks = specs,
            Action::EnsureMachines(specs) => machines = specs,
            Action::RemoveMachines(_) | Action::RemoveDisks(_) | Action::RemoveNetwork => {}
        }
    }
    let estimate = provider.estimate(cluster, network, disks, machines).await?;
    Ok(estimate.map(|Estimate { things, calls }| Makes { things, calls }))
}

fn human(planned: &Planned) -> String {
    use std::fmt::Write as _;
    let Planned {
        schema_version: _,
        name,
        actions,
        makes,
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
    if let Some(Makes { things, calls }) = makes
        && !things.is_empty()
    {
        let _ = writeln!(text, "which makes, by about {calls} API calls:");
        for thing in things {
            let _ = writeln!(text, "  + {thing}");
        }
    }
    if !surplus.is_empty() {
        let _ = writeln!(text, "and leave alone, though not asked for: {}", surplus.join(", "));
    }
    text
}
