//! `kprov list`.

use anyhow::Result;
use kprov_types::{ClusterName, KubernetesVersion, cluster};
use serde::Serialize;

use super::Context;
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
    /// `ready`, `unfinished` (an `up` has not come to its end), or `unknown` (its secrets are not in this home).
    state: &'static str,
}

pub(super) async fn run(context: &Context, output: Output) -> Result<()> {
    let mut clusters = Vec::new();
    for provider_name in cluster::Provider::ALL {
        let provider = super::provider(context, *provider_name)?;
        let mut names = provider.clusters().await?;
        for name in context.home.clusters()? {
            let here = context
                .home
                .cluster(&name)
                .record()?
                .is_some_and(|r| r.file.spec.provider == *provider_name);
            if here && !names.contains(&name) {
                names.push(name);
            }
        }
        names.sort();
        for name in names {
            let observed = provider.observe(&name).await?;
            let record = context.home.cluster(&name).record()?;
            let running = |m: &&kprov_types::machine::Machine| m.state == kprov_types::machine::MachineState::Running;
            clusters.push(Entry {
                provider: *provider_name,
                machines_running: observed.machines.iter().filter(running).count(),
                machines: observed.machines.len(),
                endpoint: observed.network.map(|n| n.endpoint.url()),
                state: match &record {
                    None => "unknown",
                    Some(r) if r.complete => "ready",
                    Some(_) => "unfinished",
                },
                kubernetes: record.map(|r| r.kubernetes),
                name,
            });
        }
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
