//! What the operator tells of itself in OpenMetrics: everything begins with `kprov_`, is in base units, and has no object's name
//! as a label. Only the operator that leads tells of the cluster.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use kprov_types::Role;
use kprov_upgrade::model::{Action, Input};
use kprov_upgrade::plan::{Plan, State};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};
use tokio::time::Instant;

/// Upper bounds, in seconds: of passes, which are a few requests as a rule, and preflight at times.
const PASS: [f64; 10] = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 120.0];
/// Of steps, from a status that is written to a machine that is drained.
const STEP: [f64; 10] = [0.1, 0.5, 2.0, 5.0, 10.0, 30.0, 60.0, 180.0, 600.0, 3600.0];
/// Of hops, from one machine to thousands.
const HOP: [f64; 9] = [30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 14_400.0, 86_400.0];

/// The states, each with its name.
const STATES: [&str; 7] = [
    "idle",
    "preparing",
    "upgrading",
    "paused",
    "reverting",
    "failed",
    "refused",
];

const fn state_name(state: &State) -> &'static str {
    match state {
        State::Idle => "idle",
        State::Preparing => "preparing",
        State::Upgrading => "upgrading",
        State::Paused => "paused",
        State::Reverting => "reverting",
        State::Failed => "failed",
        State::Refused(_) => "refused",
    }
}

/// The name of a kind of action.
pub const fn action_name(action: &Action) -> &'static str {
    match action {
        Action::Begin { .. } => "begin",
        Action::Stage { .. } => "stage",
        Action::Snapshot { .. } => "snapshot",
        Action::Roll { .. } => "roll",
        Action::RollBack { .. } => "roll-back",
        Action::Standby { .. } => "standby",
        Action::Replace { .. } => "replace",
        Action::Etcd { .. } => "etcd",
        Action::Cordon { .. } => "cordon",
        Action::Drain { .. } => "drain",
        Action::Run { .. } => "run",
        Action::Uncordon { .. } => "uncordon",
        Action::Fail { .. } => "fail",
        Action::Reverted { .. } => "reverted",
        Action::Finish { .. } => "finish",
    }
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct StateLabel {
    state: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct StepLabel {
    step: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct OutcomeLabel {
    outcome: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct VersionLabel {
    component: &'static str,
    version: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct MachineLabel {
    role: &'static str,
    ready: &'static str,
}

/// All metrics.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    leader: Gauge,
    passes: Family<OutcomeLabel, Counter>,
    pass_duration: Histogram,
    step_duration: Family<StepLabel, Histogram>,
    hop_duration: Histogram,
    state: Family<StateLabel, Gauge>,
    hops: Gauge,
    steps: Family<StepLabel, Gauge>,
    waiting: Family<ReasonLabel, Gauge>,
    versions: Family<VersionLabel, Gauge>,
    machines: Family<MachineLabel, Gauge>,
    /// Steps under way by their ids: of which kind, and since when this operator knows of them.
    under_way: Mutex<BTreeMap<String, (&'static str, Instant)>>,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("kprov");
        registry.register(
            "operator",
            "This operator's version",
            Info::new([("version", env!("CARGO_PKG_VERSION"))]),
        );
        let metrics = Self {
            leader: Gauge::default(),
            passes: Family::default(),
            pass_duration: Histogram::new(PASS),
            step_duration: Family::new_with_constructor(|| Histogram::new(STEP)),
            hop_duration: Histogram::new(HOP),
            state: Family::default(),
            hops: Gauge::default(),
            steps: Family::default(),
            waiting: Family::default(),
            versions: Family::default(),
            machines: Family::default(),
            under_way: Mutex::default(),
            registry: Registry::default(),
        };
        registry.register("leader", "Whether this operator leads", metrics.leader.clone());
        registry.register("passes", "Reconcile passes, by how they ended", metrics.passes.clone());
        registry.register_with_unit(
            "pass_duration",
            "How long reconcile passes take",
            Unit::Seconds,
            metrics.pass_duration.clone(),
        );
        registry.register_with_unit(
            "step_duration",
            "How long steps take until their effect is seen, by what they do",
            Unit::Seconds,
            metrics.step_duration.clone(),
        );
        registry.register_with_unit(
            "hop_duration",
            "How long finished hops took, from one release to the next",
            Unit::Seconds,
            metrics.hop_duration.clone(),
        );
        registry.register(
            "upgrade_state",
            "How the cluster stands towards the version it should run; 1 for the state that is so",
            metrics.state.clone(),
        );
        registry.register(
            "upgrade_hops_left",
            "Releases on the way to the version that is asked for, that one included",
            metrics.hops.clone(),
        );
        registry.register(
            "upgrade_steps",
            "Steps under way, by what they do",
            metrics.steps.clone(),
        );
        registry.register(
            "upgrade_waiting",
            "What holds the upgrade back, by the reason",
            metrics.waiting.clone(),
        );
        registry.register(
            "component_instances",
            "Pods of each component, and kubelets, by version",
            metrics.versions.clone(),
        );
        registry.register("machines", "Machines", metrics.machines.clone());
        Self { registry, ..metrics }
    }
}

impl Metrics {
    /// In OpenMetrics' text form.
    pub fn render(&self) -> String {
        let mut text = String::new();
        // A String takes everything.
        let _ = encode(&mut text, &self.registry);
        text
    }

    /// Whether this operator leads. One that doesn't tells nothing of the cluster.
    pub fn lead(&self, leads: bool) {
        self.leader.set(i64::from(leads));
        if !leads {
            self.state.clear();
            self.hops.set(0);
            self.steps.clear();
            self.waiting.clear();
            self.versions.clear();
            self.machines.clear();
            self.under_way().clear();
        }
    }

    /// A pass has ended: `done`, `stale` (the cluster changed meanwhile) or `failed`.
    pub fn pass(&self, outcome: &'static str, duration: Duration) {
        self.passes.get_or_create(&OutcomeLabel { outcome }).inc();
        self.pass_duration.observe(duration.as_secs_f64());
    }

    /// A hop has been finished.
    pub fn hop(&self, duration: Duration) {
        self.hop_duration.observe(duration.as_secs_f64());
    }

    /// What a pass has seen and planned.
    pub fn plan(&self, input: &Input, plan: &Plan) {
        for state in STATES {
            let value = i64::from(state == state_name(&plan.state));
            self.state.get_or_create(&StateLabel { state }).set(value);
        }
        self.hops.set(i64::try_from(plan.hops.len()).unwrap_or(i64::MAX));
        self.waiting.clear();
        for waiting in &plan.waiting {
            let reason = waiting.reason();
            self.waiting.get_or_create(&ReasonLabel { reason }).inc();
        }
        self.count_steps(plan);
        self.count(input);
    }

    fn count_steps(&self, plan: &Plan) {
        let now = Instant::now();
        let mut under_way = self.under_way();
        let planned: BTreeMap<&str, &'static str> = plan
            .steps
            .iter()
            .chain(&plan.running)
            .map(|step| (step.id.as_str(), action_name(&step.action)))
            .collect();
        under_way.retain(|id, (step, since)| {
            let goes_on = planned.contains_key(id.as_str());
            if !goes_on {
                let duration = now.duration_since(*since).as_secs_f64();
                self.step_duration.get_or_create(&StepLabel { step }).observe(duration);
            }
            goes_on
        });
        self.steps.clear();
        for (id, step) in planned {
            self.steps.get_or_create(&StepLabel { step }).inc();
            under_way.entry(id.to_owned()).or_insert((step, now));
        }
    }

    fn count(&self, input: &Input) {
        let version = |component, version: String| {
            self.versions.get_or_create(&VersionLabel { component, version }).inc();
        };
        self.versions.clear();
        self.machines.clear();
        for (workload, seen) in &input.observed.workloads {
            for instance in &seen.instances {
                version(workload.as_str(), instance.release.version.to_string());
            }
        }
        for machine in input.observed.machines.values() {
            version("kubelet", machine.kubelet.to_string());
            let label = MachineLabel {
                role: match machine.role {
                    Role::ControlPlane => "control-plane",
                    Role::Worker => "worker",
                },
                ready: if machine.ready { "true" } else { "false" },
            };
            self.machines.get_or_create(&label).inc();
        }
    }

    fn under_way(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, (&'static str, Instant)>> {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use jiff::Timestamp;
    use kprov_types::Digest;
    use kprov_types::api::{ReleaseRef, UpdatePolicy};
    use kprov_upgrade::model::{Observed, Wanted, Workload};
    use kprov_upgrade::plan::{Step, Waiting};

    use super::*;

    fn release() -> ReleaseRef {
        ReleaseRef {
            version: "1.36.3".parse().unwrap(),
            digest: Digest::from_bytes([1; 32]),
        }
    }

    fn input() -> Input {
        Input {
            wanted: Wanted {
                desired: "1.36.3".into(),
                paused: false,
                policy: UpdatePolicy::default(),
                force: BTreeSet::new(),
                attempt: 0,
            },
            observed: Observed {
                current: release(),
                hop_started: None,
                failure: None,
                releases: Vec::new(),
                workloads: BTreeMap::new(),
                machines: BTreeMap::new(),
                findings: None,
            },
            now: Timestamp::UNIX_EPOCH,
        }
    }

    fn plan(state: State, waiting: Vec<Waiting>, running: Vec<Step>) -> Plan {
        Plan {
            state,
            hops: vec![release()],
            steps: Vec::new(),
            running,
            waiting,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn tells_of_the_cluster_as_long_as_it_leads() {
        let metrics = Metrics::default();
        metrics.lead(true);
        let step = Step {
            id: "1.36.3/roll/kube-scheduler".into(),
            message: String::new(),
            action: Action::Begin { release: release() },
        };
        let waiting = |workload| Waiting::NoWorkload { workload };
        let all = vec![waiting(Workload::Proxy), waiting(Workload::Dns)];
        metrics.plan(&input(), &plan(State::Upgrading, all, vec![step]));
        let has = |sample: &str| metrics.render().lines().any(|line| line == sample);
        for sample in [
            "kprov_leader 1",
            "kprov_upgrade_state{state=\"upgrading\"} 1",
            "kprov_upgrade_state{state=\"idle\"} 0",
            "kprov_upgrade_hops_left 1",
            "kprov_upgrade_waiting{reason=\"NoWorkload\"} 2",
            "kprov_upgrade_steps{step=\"begin\"} 1",
        ] {
            assert!(has(sample), "{sample} is missing in {}", metrics.render());
        }
        assert!(!metrics.render().contains("kprov_step_duration_seconds_count"));
        tokio::time::advance(Duration::from_secs(4)).await;
        metrics.plan(&input(), &plan(State::Idle, Vec::new(), Vec::new()));
        assert!(
            has("kprov_step_duration_seconds_sum{step=\"begin\"} 4.0"),
            "{}",
            metrics.render()
        );
        assert!(has("kprov_upgrade_state{state=\"idle\"} 1") && has("kprov_upgrade_state{state=\"upgrading\"} 0"));
        assert!(!metrics.render().contains("kprov_upgrade_waiting{"));
        metrics.lead(false);
        assert!(has("kprov_leader 0") && has("kprov_upgrade_hops_left 0"));
        assert!(!metrics.render().contains("kprov_upgrade_state{"));
        // What was counted stays counted.
        assert!(has("kprov_step_duration_seconds_count{step=\"begin\"} 1"));
    }
}
