//! `kprov down`: removes a cluster, and proves it by listing.

use std::io::{BufRead as _, IsTerminal as _, Write as _};

use anyhow::{Context as _, Result};
use kprov_types::ClusterName;
use kprov_types::machine::Leftover;
use serde::Serialize;

use super::{Context, power, providers};
use crate::cli::DownArgs;
use crate::failure::UserError;
use crate::print;

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Removed {
    schema_version: u32,
    name: ClusterName,
    left: Vec<Leftover>,
}

pub(super) async fn run(context: &Context, args: DownArgs) -> Result<()> {
    let DownArgs {
        name,
        yes,
        power_off,
        output,
    } = args;
    let home = context.home.pick(name.name.as_ref())?;
    let record = home.record()?;
    let provider = providers::open_known(context, record.as_ref()).await?;
    let observed = provider.observe(&home.name).await?;
    let nothing = observed.machines.is_empty() && observed.disks.is_empty() && observed.network.is_none();
    if nothing && record.is_none() && home.secrets()?.is_none() && provider.leftovers(&home.name).await?.is_empty() {
        return Err(UserError::new(format!("there is no cluster `{}`", home.name))
            .hint("`kprov list` shows the clusters that are known here")
            .into());
    }
    if !yes && !confirmed(&home.name, observed.machines.len())? {
        return Err(UserError::new("nothing was removed").into());
    }
    let lock = home.lock()?;
    super::up::drive(context, provider.as_ref(), &home.name, &kprov_provision::Goal::Nothing).await?;
    context.reporter.step("", "list what is left");
    let mut left = provider.leftovers(&home.name).await?;
    if !left.is_empty() {
        // Found by their tag alone, say after the provider's own record of them was lost.
        provider.remove_network(&home.name).await?;
        left = provider.leftovers(&home.name).await?;
    }
    context.reporter.done("");
    let hosts = record
        .and_then(|record| record.inventory)
        .map(|kept| kept.inventory.hosts);
    let still_on = match (&hosts, left.is_empty() && power_off) {
        (Some(hosts), true) => power::off(&context.reporter, hosts).await,
        _ => Vec::new(),
    };
    if left.is_empty() {
        drop(lock);
        home.forget()?;
    }
    let removed = Removed {
        schema_version: 1,
        name: home.name.clone(),
        left,
    };
    print::result(output.output, &removed, human)?;
    if let Some((host, error)) = still_on.into_iter().next() {
        let message = format!(
            "cluster `{}` is gone, but host `{}` has power still: {error}",
            removed.name, host.name
        );
        return Err(UserError::new(message).hint(error.hint()).into());
    }
    if removed.left.is_empty() {
        Ok(())
    } else {
        Err(UserError::new(format!(
            "{} things of cluster `{}` are still there",
            removed.left.len(),
            removed.name
        ))
        .hint("see what holds them, then run `kprov down` again")
        .into())
    }
}

fn confirmed(name: &ClusterName, machines: usize) -> Result<bool> {
    if !std::io::stdin().is_terminal() {
        return Err(
            UserError::new(format!("not removing cluster `{name}` without being told to"))
                .hint("give `--yes`")
                .into(),
        );
    }
    let mut stderr = anstream::stderr();
    write!(
        stderr,
        "remove cluster `{name}` with {machines} machines, its etcd data and its secrets? [y/N] "
    )?;
    stderr.flush()?;
    let mut answer = String::new();
    std::io::stdin()
        .lock()
        .read_line(&mut answer)
        .context("can't read your answer")?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

fn human(removed: &Removed) -> String {
    if removed.left.is_empty() {
        return format!("cluster `{}` is gone; nothing left\n", removed.name);
    }
    print::table(
        &["left", "name", "why"],
        removed
            .left
            .iter()
            .map(|l| vec![l.kind.clone(), l.name.clone(), l.why.clone().unwrap_or_default()]),
    )
}
