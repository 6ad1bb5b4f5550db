//! `kprov upgrade --dry-run`: what would be done, and what preflight finds; nothing is changed.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Node;
use kprov_bootstrap::manifests::CONTROL_PLANE_LABEL;
use kprov_types::api::{Finding, ReleaseRef};
use kprov_types::{MachineName, Release, Role};
use kprov_upgrade::model::Input;
use kprov_upgrade::outline::{Outline, outline};
use kprov_upgrade::preflight::{self, Hop, Inputs, NodeSeen};
use kube::ResourceExt as _;
use kube::api::{Api, ListParams};
use serde::Serialize;

use super::super::access::Access;
use super::super::{Context as Kprov, objects};
use crate::cli::UpgradeArgs;
use crate::print;

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Preview {
    schema_version: u32,
    cluster: String,
    from: String,
    to: String,
    hops: Vec<HopPreview>,
    findings: Vec<Finding>,
    /// The names of findings that would stop it.
    blocked_by: Vec<String>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct HopPreview {
    from: String,
    to: String,
    steps: Vec<StepPreview>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct StepPreview {
    id: String,
    message: String,
}

/// Shows it. `input` knows the payloads at hand, `hops` are the releases on the way with their manifests.
pub(super) async fn show(
    context: &Kprov,
    access: &Access,
    args: &UpgradeArgs,
    mut input: Input,
    hops: Vec<(ReleaseRef, Release)>,
) -> Result<()> {
    context.reporter.step("", "preflight");
    let findings = findings(access, &input, hops).await?;
    context.reporter.done("");
    input.wanted.desired = args.to.to_string();
    let Outline { hops, .. } = outline(&input)?;
    let blocked_by = findings
        .iter()
        .filter(|finding| finding.blocks && !args.force.contains(&finding.name))
        .map(|finding| finding.name.clone())
        .collect();
    let preview = Preview {
        schema_version: 1,
        cluster: access.name.clone(),
        from: input.observed.current.version.to_string(),
        to: args.to.to_string(),
        hops: hops
            .into_iter()
            .map(|hop| HopPreview {
                from: hop.from.version.to_string(),
                to: hop.to.version.to_string(),
                steps: hop
                    .steps
                    .into_iter()
                    .map(|step| StepPreview {
                        id: step.id,
                        message: step.message,
                    })
                    .collect(),
            })
            .collect(),
        findings,
        blocked_by,
    };
    print::result(args.output.output, &preview, human)
}

async fn findings(access: &Access, input: &Input, hops: Vec<(ReleaseRef, Release)>) -> Result<Vec<Finding>> {
    let machines = objects::list(access, objects::machines(&access.client)).await?;
    let nodes = Api::<Node>::all(access.client.clone())
        .list(&ListParams::default())
        .await;
    let nodes = nodes.map_err(|error| objects::unreachable_api(access, error))?;
    let inputs = Inputs {
        current: input.observed.current.clone(),
        hops: hops
            .into_iter()
            .map(|(release, manifest)| Hop { release, manifest })
            .collect(),
        machines: machines
            .iter()
            .filter_map(|m| Some((MachineName::new(m.name_any()).ok()?, m.status.clone()?)))
            .collect(),
        nodes: nodes.items.iter().filter_map(node).collect::<BTreeMap<_, _>>(),
        now: Timestamp::now(),
    };
    preflight::run(&access.client, &inputs)
        .await
        .context("preflight could not be made")
}

fn node(node: &Node) -> Option<(MachineName, NodeSeen)> {
    let status = node.status.as_ref();
    let conditions = status.and_then(|s| s.conditions.as_ref()).into_iter().flatten();
    let spec = node.spec.as_ref();
    let taints = spec.and_then(|s| s.taints.as_ref()).into_iter().flatten();
    let seen = NodeSeen {
        role: if node.labels().contains_key(CONTROL_PLANE_LABEL) {
            Role::ControlPlane
        } else {
            Role::Worker
        },
        ready: conditions.into_iter().any(|c| c.type_ == "Ready" && c.status == "True"),
        closed: spec.and_then(|s| s.unschedulable).unwrap_or(false)
            || taints
                .into_iter()
                .any(|t| t.effect == "NoSchedule" || t.effect == "NoExecute"),
        kubelet: status
            .and_then(|s| s.node_info.as_ref())
            .and_then(|info| info.kubelet_version.parse().ok()),
    };
    Some((MachineName::new(node.name_any()).ok()?, seen))
}

fn human(preview: &Preview) -> String {
    use std::fmt::Write as _;
    let Preview {
        schema_version: _,
        cluster,
        from,
        to,
        hops,
        findings,
        blocked_by,
    } = preview;
    let mut text = format!("cluster `{cluster}`: {from} -> {to}, nothing is changed\n");
    for hop in hops {
        let _ = writeln!(text, "\n{} -> {}", hop.from, hop.to);
        for (n, step) in hop.steps.iter().enumerate() {
            let _ = writeln!(text, "  {:>2}. {}", n + 1, step.message);
        }
    }
    if !findings.is_empty() {
        text.push_str("\npreflight:\n");
    }
    for finding in findings {
        let symbol = if blocked_by.contains(&finding.name) { "✘" } else { "!" };
        let _ = writeln!(
            text,
            "  {symbol} {}: {}\n      {}",
            finding.name, finding.message, finding.hint
        );
    }
    if !blocked_by.is_empty() {
        let _ = writeln!(text, "\nthis would stop it: {}", blocked_by.join(", "));
    }
    text
}
