//! `cargo xtask check-deps`: proves the arrows of ARCHITECTURE.md from cargo's own metadata.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Result, bail};
use cargo_metadata::{DependencyKind, MetadataCommand, PackageId};

use crate::run::{cargo, output};

/// What a crate must never reach, through any chain of normal dependencies.
struct Rule {
    crates: &'static [&'static str],
    never: &'static [&'static str],
    why: &'static str,
}

const RUNTIME: &[&str] = &["tokio", "kube", "kube-client", "reqwest", "hyper"];
const CLOUDS: &[&str] = &[
    "aws-sdk-ec2",
    "aws-config",
    "azure_core",
    "azure_mgmt_compute",
    "azure_mgmt_network",
];
const PROVIDERS: &[&str] = &[
    "kprov-provider",
    "kprov-provision",
    "kprov-provider-local",
    "kprov-provider-aws",
    "kprov-provider-azure",
    "kprov-provider-baremetal",
];

const RULES: &[Rule] = &[
    Rule {
        crates: &["kprov-types"],
        never: RUNTIME,
        why: "types are data: no I/O, no runtime, no Kubernetes client",
    },
    Rule {
        crates: &["kprov-provider", "kprov-provision"],
        never: RUNTIME,
        why: "what plans infrastructure is pure",
    },
    Rule {
        crates: &["kprov-upgrade", "kprov-operator", "kprov-node", "kprov-bootstrap"],
        never: PROVIDERS,
        why: "versions change through the Kubernetes API only",
    },
    Rule {
        crates: &["kprov-node"],
        never: &["kprov-upgrade"],
        why: "machines carry out orders; who plans is the operator",
    },
    Rule {
        crates: &["kprov-release", "kprov-front"],
        never: &["kube", "kube-client", "k8s-openapi", "kprov-bootstrap", "kprov-upgrade"],
        why: "payloads and connections know nothing of what runs in a cluster",
    },
    Rule {
        crates: &["kprov-node", "kprov-operator", "kprov-upgrade"],
        never: CLOUDS,
        why: "no cloud SDK runs in a cluster",
    },
    Rule {
        crates: &[
            "kprov-provider-local",
            "kprov-provider-aws",
            "kprov-provider-azure",
            "kprov-provider-baremetal",
        ],
        never: &[
            "kube",
            "kube-client",
            "k8s-openapi",
            "kprov-bootstrap",
            "kprov-upgrade",
            "kprov-provision",
        ],
        why: "providers know nothing of Kubernetes or of who calls them",
    },
    Rule {
        crates: &["kprov-provider-local"],
        never: &["kprov-provider-aws", "kprov-provider-azure", "kprov-provider-baremetal"],
        why: "providers know nothing of each other",
    },
];

/// Nothing may depend on these outside of tests.
const LEAVES: &[&str] = &[
    "kprov",
    "kprov-operator",
    "kprov-sim",
    "kprov-emulators",
    "kprov-e2e",
    "xtask",
];

pub(crate) fn run() -> Result<()> {
    let metadata = MetadataCommand::new()
        .current_dir(crate::cache::workspace())
        .other_options(["--locked".to_owned()])
        .exec()?;
    let names: BTreeMap<&PackageId, &str> = metadata.packages.iter().map(|p| (&p.id, p.name.as_str())).collect();
    let Some(resolve) = &metadata.resolve else {
        bail!("cargo metadata resolved nothing")
    };
    let mut graph: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for node in &resolve.nodes {
        let from = names.get(&node.id).copied().unwrap_or_default();
        let normal = node
            .deps
            .iter()
            .filter(|d| d.dep_kinds.iter().any(|k| k.kind == DependencyKind::Normal));
        graph
            .entry(from)
            .or_default()
            .extend(normal.filter_map(|d| names.get(&d.pkg).copied()));
    }
    let members: BTreeSet<&str> = metadata.workspace_packages().iter().map(|p| p.name.as_str()).collect();
    let mut found = Vec::new();
    for violation in violations(&graph, &members) {
        // The workspace's graph has the features of all crates together; what counts is what each has by itself.
        if violation
            .target
            .is_none_or(|target| reaches_alone(violation.start, target))
        {
            found.push(violation.text);
        }
    }
    for line in &found {
        eprintln!("{line}");
    }
    if !found.is_empty() {
        bail!("{} arrows point where they must not", found.len());
    }
    println!("{} crates: every arrow points down", members.len());
    Ok(())
}

/// Whether a crate reaches another when it's built by itself.
fn reaches_alone(start: &str, target: &str) -> bool {
    let tree = output(cargo().args([
        "tree", "--locked", "-e", "normal", "--prefix", "none", "--format", "{p}", "-p", start,
    ]));
    // A crate that can't be looked at counts as broken.
    tree.map_or(true, |tree| {
        tree.lines().any(|line| line.split(' ').next() == Some(target))
    })
}

/// A rule that seems broken.
struct Violation<'a> {
    start: &'a str,
    /// What must not be reached; `None` for a direct dependency, which needs no second look.
    target: Option<&'static str>,
    text: String,
}

/// Pure: every broken rule in words, with the chain that breaks it.
fn violations<'a>(graph: &BTreeMap<&'a str, BTreeSet<&'a str>>, members: &BTreeSet<&'a str>) -> Vec<Violation<'a>> {
    let mut found = Vec::new();
    for Rule { crates, never, why } in RULES {
        for start in crates.iter().filter(|c| members.contains(*c)) {
            for target in *never {
                if let Some(chain) = chain(graph, start, target) {
                    let text = format!("`{start}` reaches `{target}` ({why}): {}", chain.join(" -> "));
                    found.push(Violation {
                        start,
                        target: Some(target),
                        text,
                    });
                }
            }
        }
    }
    // What is tests and nothing else may use what is there for tests.
    for member in members.iter().filter(|m| **m != "kprov-e2e") {
        for leaf in LEAVES
            .iter()
            .filter(|l| graph.get(member).is_some_and(|d| d.contains(*l)))
        {
            let text = format!("`{member}` depends on `{leaf}`, which nothing may");
            found.push(Violation {
                start: member,
                target: None,
                text,
            });
        }
    }
    found
}

fn chain<'a>(graph: &BTreeMap<&'a str, BTreeSet<&'a str>>, from: &'a str, to: &str) -> Option<Vec<&'a str>> {
    let mut before: BTreeMap<&str, &str> = BTreeMap::new();
    let mut queue = std::collections::VecDeque::from([from]);
    while let Some(at) = queue.pop_front() {
        if at == to {
            let mut path = vec![at];
            while let Some(previous) = path.last().and_then(|p| before.get(p)) {
                path.push(previous);
            }
            path.reverse();
            return Some(path);
        }
        for next in graph.get(at).into_iter().flatten() {
            if *next != from && !before.contains_key(next) {
                before.insert(next, at);
                queue.push_back(next);
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_the_chain() {
        let graph = BTreeMap::from([
            ("kprov-types", BTreeSet::from(["a"])),
            ("a", BTreeSet::from(["tokio"])),
            ("kprov-node", BTreeSet::from(["kprov-types", "kprov"])),
        ]);
        let members = BTreeSet::from(["kprov-types", "kprov-node"]);
        let found: Vec<_> = violations(&graph, &members).into_iter().map(|v| v.text).collect();
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].ends_with("kprov-types -> a -> tokio"), "{found:?}");
        assert!(found[1].contains("`kprov-node` depends on `kprov`"), "{found:?}");
    }
}
