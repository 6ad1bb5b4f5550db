//! The skew policy, as the cluster is now (Kubernetes' documentation, "Version Skew Policy").

use kprov_types::{KubernetesVersion, MachineName, Minor};

use super::super::{Inputs, ProgramSeen};
use super::{Findings, some};

/// How many minors older than an API server a kubelet may be.
const fn kubelet_minors(api_server: Minor) -> u64 {
    if api_server.minor >= 28 { 3 } else { 2 }
}

pub(super) fn judge(programs: &[ProgramSeen], inputs: &Inputs, findings: &mut Findings) {
    let told = inputs.machines.values().flat_map(|status| &status.api_servers);
    let mut api_servers: Vec<Minor> = told
        .filter(|server| server.ready)
        .filter_map(|server| Some(server.version.parse::<KubernetesVersion>().ok()?.minor()))
        .collect();
    if api_servers.is_empty() {
        api_servers.push(inputs.current.version.minor());
    }
    let (Some(&oldest), Some(&newest)) = (api_servers.iter().min(), api_servers.iter().max()) else {
        return;
    };
    match newest.minor - oldest.minor {
        0 => {}
        1 => findings.warn(
            "skew/kube-apiserver".into(),
            format!("API servers of {oldest} and {newest} run side by side: an earlier upgrade is not finished"),
            "let it finish, or roll it back",
        ),
        _ => findings.block(
            "skew/kube-apiserver".into(),
            format!("API servers of {oldest} and {newest} run side by side; at most one minor may lie between them"),
            "bring the older ones up to the newer ones first",
        ),
    }
    kubelets(oldest, newest, inputs, findings);
    for program in programs.iter().filter(|program| program.name != "kube-apiserver") {
        let Some(minor) = program.version.as_ref().map(KubernetesVersion::minor) else {
            continue;
        };
        let older = if program.name == "kube-proxy" {
            kubelet_minors(newest)
        } else {
            1
        };
        let name = &program.name;
        if minor > oldest || minor.minor + older < newest.minor {
            findings.block(
                format!("skew/{name}"),
                format!(
                    "{name} is {minor}, the API servers are {}; it may be no newer, and at most {older} older",
                    range(oldest, newest)
                ),
                format!("bring {name} to the API servers' version first"),
            );
        }
    }
}

fn kubelets(oldest: Minor, newest: Minor, inputs: &Inputs, findings: &mut Findings) {
    let older = kubelet_minors(newest);
    let mut outside = Vec::new();
    let mut behind: Vec<&MachineName> = Vec::new();
    for (name, node) in &inputs.nodes {
        let Some(minor) = node.kubelet.as_ref().map(KubernetesVersion::minor) else {
            continue;
        };
        if minor > oldest || minor.minor + older < newest.minor {
            outside.push((
                name.clone(),
                Findings::one(
                    true,
                    format!("skew/kubelet/{name}"),
                    format!(
                        "the kubelet on `{name}` is {minor}, the API servers are {}; it may be no newer, and at most {older} older",
                        range(oldest, newest)
                    ),
                    "bring the machine to the API servers' version first, or take it out of the cluster",
                ),
            ));
        } else if minor < newest {
            behind.push(name);
        }
    }
    findings.family("skew/kubelet", outside);
    if !behind.is_empty() {
        findings.warn(
            "skew/kubelets-behind".into(),
            format!(
                "kubelets older than {newest} run on {}",
                some(behind.iter().map(|name| name.as_str()))
            ),
            "an earlier upgrade left them; they are updated on the way, as far as they may be no older",
        );
    }
}

fn range(oldest: Minor, newest: Minor) -> String {
    if oldest == newest {
        newest.to_string()
    } else {
        format!("{oldest} and {newest}")
    }
}
