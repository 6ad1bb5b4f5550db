//! Versions side by side.

use std::collections::{BTreeMap, BTreeSet};

use kprov_types::{KubernetesVersion, MachineName, Minor};

use super::{SkewRule, Subject, Violation};
use crate::model::{Action, Observed, Workload};
use crate::plan::Plan;

/// The oldest and the newest of some versions.
#[derive(Clone, Copy)]
struct Span<'a> {
    oldest: &'a KubernetesVersion,
    newest: &'a KubernetesVersion,
}

impl<'a> Span<'a> {
    fn with(span: Option<Self>, version: &'a KubernetesVersion) -> Self {
        let span = span.unwrap_or(Self {
            oldest: version,
            newest: version,
        });
        Self {
            oldest: span.oldest.min(version),
            newest: span.newest.max(version),
        }
    }
}

/// Every version that may run.
pub(super) struct MayRun<'a> {
    current: &'a KubernetesVersion,
    workloads: BTreeMap<Workload, Span<'a>>,
    kubelets: Vec<(&'a MachineName, Span<'a>)>,
}

impl<'a> MayRun<'a> {
    /// In a state.
    pub(super) fn now(observed: &'a Observed) -> Self {
        Self::gather(observed, &[])
    }

    /// While a plan's steps are done.
    pub(super) fn with(observed: &'a Observed, plan: &'a Plan) -> Self {
        let actions: Vec<&Action> = plan.steps.iter().map(|step| &step.action).collect();
        Self::gather(observed, &actions)
    }

    fn gather(observed: &'a Observed, actions: &[&'a Action]) -> Self {
        let mut workloads: BTreeMap<Workload, Span<'a>> = BTreeMap::new();
        for (&workload, seen) in &observed.workloads {
            let mut span = Span::with(None, &seen.template.version);
            for pod in &seen.instances {
                span = Span::with(Some(span), &pod.release.version);
            }
            workloads.insert(workload, span);
        }
        let mut add = |workload, version| {
            let span = Span::with(workloads.get(&workload).copied(), version);
            workloads.insert(workload, span);
        };
        let mut orders = BTreeMap::new();
        for action in actions {
            match action {
                Action::Roll { workload, to, .. } | Action::RollBack { workload, to, .. } => {
                    add(*workload, &to.version);
                }
                Action::Standby {
                    release, serve: true, ..
                } => add(Workload::ApiServer, &release.version),
                Action::Run { machine, to, .. } => {
                    orders.insert(machine, &to.version);
                }
                _ => {}
            }
        }
        for standby in observed.machines.values().filter_map(|m| m.standby.as_ref()) {
            if let Some(release) = standby
                .release
                .as_ref()
                .filter(|_| standby.serve_ordered && standby.api_ready)
            {
                add(Workload::ApiServer, &release.version);
            }
        }
        let kubelets = observed.machines.iter().map(|(name, m)| {
            let ordered = m.ordered.as_ref().map(|(release, _)| &release.version);
            let running = m.running.as_ref().map(|release| &release.version);
            let others = [ordered, running, orders.get(name).copied()].into_iter().flatten();
            (
                name,
                others.fold(Span::with(None, &m.kubelet), |span, version| {
                    Span::with(Some(span), version)
                }),
            )
        });
        Self {
            current: &observed.current.version,
            kubelets: kubelets.collect(),
            workloads,
        }
    }
}

/// How many minors `newer` is after `older`; more than any allowed number across majors.
fn minors_apart(older: Minor, newer: Minor) -> u64 {
    if older.major == newer.major {
        newer.minor.saturating_sub(older.minor)
    } else {
        u64::MAX
    }
}

/// What doesn't fit together.
pub(super) fn violations(may_run: &MayRun<'_>) -> BTreeSet<Violation> {
    let mut found = BTreeSet::new();
    let Some(&api) = may_run.workloads.get(&Workload::ApiServer) else {
        return found;
    };
    if minors_apart(api.oldest.minor(), api.newest.minor()) > 1 {
        found.insert(Violation::ApiServersApart {
            oldest: api.oldest.clone(),
            newest: api.newest.clone(),
        });
    }
    let current = may_run.current.minor();
    for version in [api.oldest, api.newest] {
        if version.minor() < current || minors_apart(current, version.minor()) > 1 {
            found.insert(Violation::MinorSkipped {
                from: may_run.current.clone(),
                to: version.clone(),
            });
        }
    }
    // KEP-3935: three minors from 1.28 on, as the newest API server counts; before, two.
    let kubelet = if api.newest.minor() < Minor::v1(28) { 2 } else { 3 };
    let limits = [
        (Workload::ControllerManager, 1),
        (Workload::Scheduler, 1),
        (Workload::Proxy, kubelet),
    ];
    for (workload, limit) in limits {
        if let Some(span) = may_run.workloads.get(&workload) {
            beside(&mut found, api, *span, limit, || Subject::Workload(workload));
        }
    }
    for (name, span) in &may_run.kubelets {
        beside(&mut found, api, *span, kubelet, || Subject::Kubelet((*name).clone()));
    }
    found
}

/// Whether something fits beside the API servers.
fn beside(found: &mut BTreeSet<Violation>, api: Span<'_>, span: Span<'_>, limit: u64, what: impl Fn() -> Subject) {
    if span.newest.minor() > api.oldest.minor() {
        found.insert(Violation::Skew {
            what: what(),
            version: span.newest.clone(),
            api_server: api.oldest.clone(),
            rule: SkewRule::Newer,
        });
    }
    if minors_apart(span.oldest.minor(), api.newest.minor()) > limit {
        found.insert(Violation::Skew {
            what: what(),
            version: span.oldest.clone(),
            api_server: api.newest.clone(),
            rule: SkewRule::Older(limit),
        });
    }
}
