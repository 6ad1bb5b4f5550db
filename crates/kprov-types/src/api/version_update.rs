//! What people ask for, and what the operator tells them.

use std::collections::BTreeMap;

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Condition, ReleaseRef};
use crate::release::Digest;

/// `VersionUpdate.spec`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct VersionUpdateSpec {
    /// The Kubernetes version the cluster should run, such as `1.36.3`. May be several minors ahead; never a minor behind.
    pub desired_version: String,
    /// The digest of the one release of that version that is meant; where left out, the Release of it that was made last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub release: Option<Digest>,
    /// No new step begins while this is true.
    #[serde(default)]
    pub paused: bool,
    /// How machines are updated.
    #[serde(default)]
    pub policy: UpdatePolicy,
    /// Preflight findings that are to be overridden, by their names.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub force: Vec<String>,
    /// Counts tries: raise it to have a release that failed tried again.
    #[serde(default)]
    pub attempt: u32,
}

/// How machines are updated.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct UpdatePolicy {
    /// How many workers of a pool may be out of service at once: a number, or a share such as `10%` (at least one).
    #[schemars(with = "IntOrPercentSchema")]
    pub max_unavailable: MaxUnavailable,
    /// How long a machine's pods are given to leave, in seconds, before a person is called.
    pub drain_timeout_seconds: u32,
    /// After that time, pods that PodDisruptionBudgets hold back are deleted all the same.
    pub drain_force: bool,
    /// How many workers go first, alone.
    pub canary: u32,
    /// How long a canary must have been Ready, in seconds, before the others follow.
    pub canary_soak_seconds: u32,
    /// How long each instance or machine may take to become healthy, in seconds, before the release counts as bad.
    pub health_timeout_seconds: u32,
    /// Other values for the machines of a pool (the Node's label `kprov.io/pool`).
    pub pools: BTreeMap<String, PoolPolicy>,
}

impl Default for UpdatePolicy {
    fn default() -> Self {
        Self {
            max_unavailable: MaxUnavailable::Count(1),
            drain_timeout_seconds: 600,
            drain_force: false,
            canary: 1,
            canary_soak_seconds: 10,
            health_timeout_seconds: 300,
            pools: BTreeMap::new(),
        }
    }
}

/// What a pool has otherwise.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PoolPolicy {
    /// See [`UpdatePolicy::max_unavailable`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<IntOrPercentSchema>")]
    pub max_unavailable: Option<MaxUnavailable>,
    /// See [`UpdatePolicy::drain_timeout_seconds`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain_timeout_seconds: Option<u32>,
    /// See [`UpdatePolicy::drain_force`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain_force: Option<bool>,
}

/// A number, or a share of a pool in percent. As Kubernetes' `IntOrString`: `3` or `"10%"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "serde_json::Value", into = "serde_json::Value")]
pub enum MaxUnavailable {
    /// That many machines.
    Count(u32),
    /// That share, rounded down, at least one.
    Percent(u32),
}

/// The schema of [`MaxUnavailable`]: Kubernetes' own extension for such values.
struct IntOrPercentSchema;

impl JsonSchema for IntOrPercentSchema {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "IntOrPercent".into()
    }
    fn inline_schema() -> bool {
        true
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({ "x-kubernetes-int-or-string": true })
    }
}

/// A value that says no number of machines.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is neither a number of machines nor a share such as `10%`")]
pub struct MaxUnavailableError(String);

impl MaxUnavailable {
    /// How many machines of a pool of `size` that is: at least one.
    pub fn of(self, size: usize) -> usize {
        let count = match self {
            Self::Count(count) => usize::try_from(count).unwrap_or(usize::MAX),
            Self::Percent(percent) => size * usize::try_from(percent).unwrap_or(100) / 100,
        };
        count.max(1)
    }
}

impl TryFrom<serde_json::Value> for MaxUnavailable {
    type Error = MaxUnavailableError;
    fn try_from(value: serde_json::Value) -> Result<Self, MaxUnavailableError> {
        let wrong = || MaxUnavailableError(value.to_string());
        match &value {
            serde_json::Value::Number(number) => number
                .as_u64()
                .and_then(|n| u32::try_from(n).ok())
                .map(Self::Count)
                .ok_or_else(wrong),
            serde_json::Value::String(text) => {
                let (digits, percent) = match text.strip_suffix('%') {
                    Some(digits) => (digits, true),
                    None => (text.as_str(), false),
                };
                let number = digits.parse().map_err(|_| wrong())?;
                match percent {
                    true if number <= 100 => Ok(Self::Percent(number)),
                    true => Err(wrong()),
                    false => Ok(Self::Count(number)),
                }
            }
            _ => Err(wrong()),
        }
    }
}

impl From<MaxUnavailable> for serde_json::Value {
    fn from(value: MaxUnavailable) -> Self {
        match value {
            MaxUnavailable::Count(count) => count.into(),
            MaxUnavailable::Percent(percent) => format!("{percent}%").into(),
        }
    }
}

/// `VersionUpdate.status`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct VersionUpdateStatus {
    /// The generation of the spec that all this speaks of.
    pub observed_generation: i64,
    /// The version of the last hop that was finished: what the cluster runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub current_version: Option<String>,
    /// The digest of that version's release.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub current_release: Option<Digest>,
    /// Whether the operator holds still because it was told to.
    pub paused: bool,
    /// For tables: `Idle`, `Preflight`, `Upgrading`, `Paused`, `Reverting`, `Blocked` or `Failed`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub phase: String,
    /// For tables: what is being done or waited for, in a few words.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// The conditions.
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
    /// The hops to the desired version that are still to be made; the first is under way.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub hops: Vec<ReleaseRef>,
    /// When the hop under way began.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hop_started: Option<Timestamp>,
    /// The steps that are being made now.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub steps: Vec<StepStatus>,
    /// What holds the next steps back.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub waiting: Vec<WaitingStatus>,
    /// The control plane and the add-ons, by component.
    pub components: BTreeMap<String, ComponentStatus>,
    /// How many machines are at which version, by version.
    pub kubelets: BTreeMap<String, u32>,
    /// Machines, by name; of more than 500 only those that are being changed or are in trouble.
    pub nodes: BTreeMap<String, NodeStatus>,
    /// Preflight findings for the desired version.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub findings: Vec<Finding>,
    /// The last release that failed, until another is asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure: Option<Failure>,
    /// What was done, oldest first; the last 50.
    pub history: Vec<HistoryEntry>,
}

/// A step under way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StepStatus {
    /// Its stable id, such as `1.36.3/roll/kube-apiserver`.
    pub id: String,
    /// In words.
    pub message: String,
    /// Since when.
    pub since: Timestamp,
}

/// Something that holds a step back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct WaitingStatus {
    /// Why, in one CamelCase word.
    pub reason: String,
    /// In words.
    pub message: String,
}

/// A part of the control plane, or an add-on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ComponentStatus {
    /// The versions that run, lowest first.
    pub versions: Vec<String>,
    /// How many instances are ready.
    pub ready: u32,
    /// How many there should be.
    pub wanted: u32,
}

/// A machine, as the VersionUpdate tells of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeStatus {
    /// Its kubelet's version.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub kubelet: String,
    /// What is being done with it, or what is wrong with it; empty where nothing is.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
}

/// Something that preflight found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Finding {
    /// Its stable name, by which `--force` overrides it, such as `removed-api/policy/v1beta1/podsecuritypolicies`.
    pub name: String,
    /// Whether it stops the change (`true`), or is told only.
    pub blocks: bool,
    /// What was found.
    pub message: String,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub hint: String,
}

/// A release that failed and was undone, or is being undone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Failure {
    /// The release.
    pub release: ReleaseRef,
    /// The `spec.attempt` it was tried in.
    pub attempt: u32,
    /// The component, such as `kube-apiserver` or `kubelet`.
    pub component: String,
    /// The pod or machine that did not become healthy.
    pub instance: String,
    /// What was wrong with it, in words.
    pub message: String,
    /// The last lines it printed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub log: Vec<String>,
    /// When that was found.
    pub time: Timestamp,
    /// Nothing goes back: enough machines run the release well, so this one machine does not condemn it. The rollout stands
    /// until a person asks for more.
    #[serde(default)]
    pub halted: bool,
    /// Whether everything is back as it was before.
    #[serde(default)]
    pub reverted: bool,
}

/// Something that was done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HistoryEntry {
    /// From which version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// To which release.
    pub release: ReleaseRef,
    /// When it began.
    pub started: Timestamp,
    /// When it ended.
    pub finished: Timestamp,
    /// How it ended: `Completed`, `Reverted` or `Abandoned`.
    pub outcome: String,
    /// More in words.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn max_unavailable_is_an_int_or_a_percentage() {
        let parse = |text: &str| serde_json::from_str::<MaxUnavailable>(text);
        assert_eq!(parse("3").unwrap(), MaxUnavailable::Count(3));
        assert_eq!(parse("\"25%\"").unwrap(), MaxUnavailable::Percent(25));
        assert_eq!(parse("\"2\"").unwrap(), MaxUnavailable::Count(2));
        for bad in ["-1", "\"101%\"", "\"x\"", "1.5", "null"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        assert_eq!(MaxUnavailable::Percent(25).of(10), 2);
        assert_eq!(MaxUnavailable::Percent(5).of(10), 1);
        assert_eq!(MaxUnavailable::Count(0).of(10), 1);
        assert_eq!(serde_json::to_string(&MaxUnavailable::Percent(5)).unwrap(), "\"5%\"");
    }

    #[test]
    fn an_empty_policy_is_the_default() {
        let spec: VersionUpdateSpec =
            serde_json::from_str(r#"{"desiredVersion":"1.36.3","policy":{"canary":0}}"#).unwrap();
        assert_eq!(spec.policy.max_unavailable, MaxUnavailable::Count(1));
        assert_eq!(spec.policy.canary, 0);
        assert!(!spec.paused);
    }
}
