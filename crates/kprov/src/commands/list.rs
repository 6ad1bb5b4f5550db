//! `kprov list`.

use anyhow::Result;
use kprov_types::machine::{Machine, MachineState, Observed};
use kprov_types::{ClusterName, KubernetesVersion, cluster};
use serde::Serialize;

use super::{Context, providers};
use crate::cli::Output;
use crate::print;

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Listing {
    schema_version: u32,
    clusters: Vec<Entry>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Entry {
    name: ClusterName,
    provider: cluster::Provider,
    #[serde(skip_serializing_if = "Option::is_none")]
    kubernetes: Option<KubernetesVersion>,
    machines_running: usize,
    machines: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    endpoint: Option<String>,
    /// `ready`, `unfinished` (an `up` has not come to its end), `unknown` (its secrets are not in this home), or `unreachable`
    /// (its provider can't be asked).
    state: &'static str,
}

pub(super) async fn run(context: &Context, output: Output) -> Result<()> {
    let mut clusters = Vec::new();
    // A cluster on this machine is found without a record of it; of clouds, only those are asked that a record names.
    let mut names = providers::local(context)?.clusters().await?;
    names.extend(context.home.clusters()?);
    names.sort();
    names.dedup();
    for name in names {
        let record = context.home.cluster(&name).record()?;
        let provider_name = record
            .as_ref()
            .map_or_else(cluster::Provider::default, |r| r.file.spec.provider);
        // One cloud that can't be asked doesn't keep the others' clusters from being listed.
        let observed = match providers::open_known(context, record.as_ref()).await {
            Ok(provider) => provider.observe(&name).await.map_err(anyhow::Error::from),
            Err(error) => Err(error),
        };
        let failed = observed.is_err();
        let observed = observed.unwrap_or_else(|error| {
            let shown = crate::failure::render(&error);
            context
                .reporter
                .note(&format!("warning: cluster `{name}`: {}", shown.trim()));
            Observed::default()
        });
        let running = |m: &&Machine| m.state == MachineState::Running;
        clusters.push(Entry {
            provider: provider_name,
            machines_running: observed.machines.iter().filter(running).count(),
            machines: observed.machines.len(),
            endpoint: observed.network.map(|n| n.endpoint.url()),
            state: match &record {
                _ if failed => "unreachable",
                None => "unknown",
                Some(r) if r.complete => "ready",
                Some(_) => "unfinished",
            },
            kubernetes: record.map(|r| r.kubernetes),
            name,
        });
    }
    print::result(
        output,
        &Listing {
            schema_version: 1,
            clusters,
        },
        |listing| {
            if listing.clusters.is_empty() {
                return "no clusters; make one with `kprov up --name NAME`\n".to_owned();
            }
            print::table(
                &["name", "provider", "kubernetes", "machines", "endpoint", "state"],
                listing.clusters.iter().map(|c| {
                    vec![
                        c.name.to_string(),
                        c.provider.to_string(),
                        c.kubernetes.as_ref().map_or("-".into(), ToString::to_string),
                        format!("{}/{} running", c.machines_running, c.machines),
                        c.endpoint.clone().unwrap_or_else(|| "-".into()),
                        c.state.to_owned(),
                    ]
                }),
            )
        },
    )
}
