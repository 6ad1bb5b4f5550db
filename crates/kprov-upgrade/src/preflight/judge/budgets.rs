//! PodDisruptionBudgets that would hold drains up.

use std::collections::BTreeSet;

use kprov_types::MachineName;

use super::super::{BudgetSeen, Budgets, Inputs};
use super::{Findings, some_of};

pub(super) fn judge(budgets: &Budgets, inputs: &Inputs, findings: &mut Findings) {
    let drained = drained(inputs);
    for budget in &budgets.closed {
        closed(budget, &drained, findings);
    }
    for overlap in budgets
        .overlaps
        .iter()
        .filter(|overlap| drained.contains(&overlap.pod.machine))
    {
        let [one, other] = &overlap.budgets;
        let namespace = &overlap.namespace;
        findings.block(
            format!("overlapping-budgets/{namespace}/{one}/{other}"),
            format!(
                "the PodDisruptionBudgets `{namespace}/{one}` and `{namespace}/{other}` are both for pod `{}` on {}, and no \
                 pod with two budgets can be evicted",
                overlap.pod.name, overlap.pod.machine
            ),
            format!("change the selector of one of them. {OVERRIDDEN}"),
        );
    }
}

const OVERRIDDEN: &str = "Overridden, its pods hold each drain up until `policy.drainTimeoutSeconds`; then they are deleted if \
     `policy.drainForce` is set, and else the upgrade waits for a person";

fn closed(budget: &BudgetSeen, drained: &BTreeSet<&MachineName>, findings: &mut Findings) {
    let BudgetSeen {
        name,
        healthy,
        desired,
        expected,
        pods,
        more,
    } = budget;
    let held: Vec<String> = pods
        .iter()
        .filter(|pod| drained.contains(&pod.machine))
        .map(|pod| format!("`{}` on {}", pod.name, pod.machine))
        .collect();
    // Of a budget with more pods than were looked at, some are elsewhere for certain only if all that were seen are.
    if held.is_empty() {
        return;
    }
    let pods = some_of(held.len(), held.iter().map(String::as_str));
    let pods = if *more { format!("{pods}, among others") } else { pods };
    if *expected > 0 && desired >= expected {
        // As written it never allows an eviction: `maxUnavailable: 0`, or `minAvailable` as high as the number of pods.
        findings.block(
            format!("pod-disruption-budget/{name}"),
            format!("PodDisruptionBudget `{name}` wants {desired} of {expected} pods healthy, so none can ever be evicted: {pods}"),
            format!("let it do without one pod, or run one more. {OVERRIDDEN}"),
        );
    } else {
        let why = if *expected == 0 {
            "its controller has not counted its pods, which it can't do where they belong to nothing".to_owned()
        } else {
            format!("{healthy} of {expected} are healthy and it wants {desired}")
        };
        findings.warn(
            format!("pod-disruption-budget/{name}"),
            format!("PodDisruptionBudget `{name}` lets no pod go now, since {why}: {pods}"),
            "look why (`kubectl describe pdb`); drains wait until it does",
        );
    }
}

/// The machines that an upgrade drains: those that don't run the last release yet, if another could take their pods.
fn drained(inputs: &Inputs) -> BTreeSet<&MachineName> {
    let Some(last) = inputs.hops.last() else {
        return BTreeSet::new();
    };
    let takes_pods = |name: &MachineName| {
        inputs
            .nodes
            .iter()
            .any(|(other, node)| other != name && node.ready && !node.closed)
    };
    let runs_it = |name: &MachineName| {
        let running = inputs.machines.get(name).and_then(|status| status.running.as_ref());
        running.is_some_and(|running| running.digest == last.release.digest)
    };
    inputs
        .nodes
        .keys()
        .filter(|name| !runs_it(name) && takes_pods(name))
        .collect()
}
