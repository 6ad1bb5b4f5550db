//! `kprov inventory`: check inventories, print their schema, take a host out of its cluster.

use std::io::{BufRead as _, IsTerminal as _, Write as _};

use anyhow::{Context as _, Result};
use camino::Utf8Path;
use k8s_openapi::api::core::v1::Node;
use kprov_provider_baremetal::inventory::{Disk, InventoryFile, load};
use kprov_provider_baremetal::{BaremetalConfig, BaremetalProvider, HostError};
use kprov_types::{ClusterName, MachineName, Role};
use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams};
use serde::Serialize;
use serde_json::json;

use super::{Context, baremetal, objects, providers};
use crate::cli::{InventoryCommand, Output};
use crate::failure::UserError;
use crate::print;

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Checked {
    schema_version: u32,
    hosts: Vec<CheckedHost>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct CheckedHost {
    name: MachineName,
    role: Role,
    /// Whether it can be used; `None` where it was not tried.
    #[serde(skip_serializing_if = "Option::is_none")]
    usable: Option<bool>,
    /// What it is, or what is wrong with it.
    result: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<String>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct RemovedHost {
    schema_version: u32,
    cluster: ClusterName,
    host: MachineName,
}

pub(super) async fn run(context: &Context, command: InventoryCommand) -> Result<()> {
    match command {
        InventoryCommand::Check {
            file,
            name,
            offline,
            parallel,
            output,
        } => check(&file, name.as_ref(), offline, parallel, output.output).await,
        InventoryCommand::Schema => schema(),
        InventoryCommand::Remove {
            host,
            name,
            lost,
            yes,
            output,
        } => {
            let name = name.name.as_ref();
            if !yes && !confirmed(&context.home.pick(name)?.name, &host)? {
                return Err(UserError::new("nothing was removed").into());
            }
            remove(context, name, &host, lost, output.output).await
        }
    }
}

/// The JSON Schema of kprov's own inventory files.
pub(super) fn schema() -> Result<()> {
    let schema = schemars::schema_for!(InventoryFile);
    print::raw(&(serde_json::to_string_pretty(&schema)? + "\n"))
}

async fn check(
    file: &Utf8Path,
    name: Option<&ClusterName>,
    offline: bool,
    parallel: usize,
    output: Output,
) -> Result<()> {
    let inventory = load(&Disk, file).map_err(|error| baremetal::explain(&error))?;
    let mut config = BaremetalConfig::new(inventory.clone());
    config.parallel = parallel;
    let tried = if offline {
        Vec::new()
    } else {
        BaremetalProvider::new(config)?.check(name).await
    };
    let mut failed = 0;
    let hosts: Vec<CheckedHost> = inventory
        .hosts
        .iter()
        .map(|host| {
            let answer = tried
                .iter()
                .find(|(name, _)| *name == host.name)
                .map(|(_, answer)| answer);
            let (usable, result, hint) = match answer {
                None => (None, "not tried".to_owned(), None),
                Some(Ok(facts)) => {
                    let member = facts.cluster.as_ref().map(|c| format!(", in the cluster `{c}`"));
                    let result = format!(
                        "{}, {} processors, {} MiB{}",
                        facts.os,
                        facts.cpus,
                        facts.memory_mib,
                        member.unwrap_or_default()
                    );
                    (Some(true), result, None)
                }
                Some(Err(HostError { host, trouble })) => {
                    failed += 1;
                    (Some(false), trouble.to_string(), Some(trouble.hint(host)))
                }
            };
            CheckedHost {
                name: host.name.clone(),
                role: host.role,
                usable,
                result,
                hint,
            }
        })
        .collect();
    let all = hosts.len();
    let checked = Checked {
        schema_version: 1,
        hosts,
    };
    print::result(output, &checked, human)?;
    if failed == 0 {
        return Ok(());
    }
    Err(UserError::new(format!("{failed} of {all} hosts can't be used"))
        .hint("each line above ends with what to do")
        .into())
}

fn human(checked: &Checked) -> String {
    let rows = checked.hosts.iter().map(|host| {
        let mark = match host.usable {
            Some(true) => "✔ ",
            Some(false) => "✘ ",
            None => "",
        };
        let hint = host.hint.as_ref().map(|hint| format!(" ({hint})")).unwrap_or_default();
        vec![
            host.name.to_string(),
            host.role.to_string(),
            format!("{mark}{}{hint}", host.result),
        ]
    });
    print::table(&["host", "role", "result"], rows)
}

async fn remove(
    context: &Context,
    name: Option<&ClusterName>,
    host: &MachineName,
    lost: bool,
    output: Output,
) -> Result<()> {
    let home = context.home.pick(name)?;
    let mut record = home.record()?.ok_or_else(|| {
        UserError::new(format!("there is no cluster `{}`", home.name))
            .hint("`kprov list` shows the clusters that are known here")
    })?;
    let provider = providers::open_known(context, Some(&record)).await?;
    let kept = record.inventory.as_mut().ok_or_else(|| {
        UserError::new(format!("cluster `{}` has no inventory", home.name))
            .hint("only hosts of bare-metal clusters are removed one by one")
    })?;
    let known = kept
        .inventory
        .hosts
        .iter()
        .chain(&kept.former)
        .find(|known| known.name == *host);
    let known = known.ok_or_else(|| {
        UserError::new(format!("cluster `{}` has no host `{host}`", home.name))
            .hint("`kprov status` shows its machines")
    })?;
    if known.role == Role::ControlPlane {
        return Err(UserError::new(format!(
            "`{host}` is a control-plane host, whose etcd the others count on"
        ))
        .hint("control-plane hosts can't be removed one by one; `kprov down` removes the whole cluster")
        .into());
    }
    let lock = home.lock()?;
    let client = super::client(&home.kubeconfig()).await?;
    let nodes = Api::<Node>::all(client.clone());
    context.reporter.step(host.as_str(), "cordon");
    let cordon = Patch::Merge(json!({ "spec": { "unschedulable": true } }));
    absent_is_fine(
        nodes
            .patch(host.as_str(), &PatchParams::default(), &cordon)
            .await
            .map(drop),
    )
    .context("the cluster's API refused")?;
    if !lost {
        context.reporter.step(host.as_str(), "clean the host");
        let one = [host.clone()];
        provider.remove_machines(&home.name, &one).await?;
        provider.remove_disks(&home.name, &one).await?;
    }
    context.reporter.step(host.as_str(), "remove its Node");
    let delete = DeleteParams::default();
    absent_is_fine(nodes.delete(host.as_str(), &delete).await.map(drop)).context("its Node could not be removed")?;
    let machines = objects::machines(&client);
    absent_is_fine(machines.delete(host.as_str(), &delete).await.map(drop))
        .context("its Machine could not be removed")?;
    kept.inventory.hosts.retain(|other| other.name != *host);
    kept.former.retain(|other| other.name != *host);
    home.keep_record(&record)?;
    drop(lock);
    context.reporter.done(host.as_str());
    let removed = RemovedHost {
        schema_version: 1,
        cluster: home.name.clone(),
        host: host.clone(),
    };
    print::result(output, &removed, |removed| {
        format!(
            "`{}` is no machine of cluster `{}` any more; take it out of the inventory file too, or the next `up` sets it up again\n",
            removed.host, removed.cluster
        )
    })
}

/// What is gone already needs no removing.
fn absent_is_fine(result: Result<(), kube::Error>) -> Result<(), kube::Error> {
    match result {
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        other => other,
    }
}

fn confirmed(cluster: &ClusterName, host: &MachineName) -> Result<bool> {
    if !std::io::stdin().is_terminal() {
        return Err(UserError::new(format!("not removing `{host}` without being told to"))
            .hint("give `--yes`")
            .into());
    }
    let mut stderr = anstream::stderr();
    write!(
        stderr,
        "remove `{host}` from cluster `{cluster}`, with the pods on it? [y/N] "
    )?;
    stderr.flush()?;
    let mut answer = String::new();
    std::io::stdin()
        .lock()
        .read_line(&mut answer)
        .context("can't read your answer")?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `docs/inventory.schema.json` is what `kprov inventory schema` prints. Write it anew with
    /// `cargo run -p kprov -- inventory schema > docs/inventory.schema.json`.
    #[test]
    fn the_published_schema_is_current() {
        let path = Utf8Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/inventory.schema.json");
        let published = std::fs::read_to_string(path).unwrap();
        let schema = schemars::schema_for!(InventoryFile);
        assert_eq!(published, serde_json::to_string_pretty(&schema).unwrap() + "\n");
    }

    #[test]
    fn what_is_gone_needs_no_removing() {
        let status = |code| kube::core::Status {
            code,
            ..Default::default()
        };
        assert!(absent_is_fine(Err(kube::Error::Api(Box::new(status(404))))).is_ok());
        assert!(absent_is_fine(Err(kube::Error::Api(Box::new(status(403))))).is_err());
    }
}
