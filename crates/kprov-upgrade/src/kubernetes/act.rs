//! Actions on the API. Each looks at the object as it is now, compares it with what the action expects, and writes only that
//! version of it: where anything has changed since, it's [`Outcome::Stale`].

use std::sync::atomic::Ordering;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use kprov_bootstrap::manifests::{NAMESPACE, SETTINGS_CONFIG_MAP, SETTINGS_KEY};
use kprov_types::MachineName;
use kprov_types::api::{Failure as FailedRelease, HistoryEntry, ReleaseRef, VERSION_UPDATE, VersionUpdateStatus};
use kprov_types::node::ControlPlaneSettings;
use kube::Api;
use kube::api::{DeleteParams, LogParams, Preconditions};
use serde::Deserialize as _;
use serde_json::json;

use super::access::{Failure, Part, optional};
use super::cache::{PODS, SETTINGS, UPDATES};
use super::events::Note;
use super::facts::{self, UpdateFacts};
use super::observe;
use super::orders::Order;
use super::resources::{SlimAny, SlimPod};
use super::{Effect, KubeCluster};
use crate::cluster::{ClusterError, Outcome};
use crate::model::{Action, Workload};

/// Entries of the history that are kept.
const HISTORY: usize = 50;
/// How kubelet's answer begins where a container's log is gone already.
const NO_LOG: &str = "unable to retrieve container logs";
/// Lines of a log that go into a failure.
const LOG_LINES: usize = 15;
/// The longest such line, in bytes.
const LONGEST_LINE: usize = 512;

/// What becomes of the VersionUpdate's status.
enum Change {
    /// It says so already.
    None,
    /// It's not as expected.
    Stale,
    /// It becomes this, and people are told.
    To(Box<VersionUpdateStatus>, Note),
}

impl KubeCluster {
    pub(super) async fn carry_out(&self, action: &Action) -> Result<Outcome, ClusterError> {
        match action {
            Action::Begin { release } => self.begin(release).await,
            Action::Stage { release, machines } => {
                let current = self.current()?;
                let order = Order::Stage {
                    release: release.clone(),
                    current,
                };
                self.order_all(machines.iter().cloned(), &order).await
            }
            Action::Snapshot { machine, name } => Ok(self
                .order(machine, &Order::Snapshot { name: name.clone() })
                .await?
                .into()),
            Action::Standby {
                machine,
                release,
                serve,
            } => {
                let order = Order::Standby {
                    release: release.clone(),
                    serve: *serve,
                };
                Ok(self.order(machine, &order).await?.into())
            }
            Action::Etcd { machine, to } => Ok(self.order(machine, &Order::Etcd { to: to.clone() }).await?.into()),
            Action::Run { machine, from, to } => {
                let effect = self.run(machine, from.clone(), to.clone()).await?;
                let note = Note::new("MachineUpdating", format!("machine `{machine}` is updated to {to}"));
                Ok(self.told(effect, note).await)
            }
            Action::Roll { workload, from, to } => {
                let effect = self.roll(*workload, from, to).await?;
                let note = Note::new("RollStarted", format!("`{}` rolls to {to}", workload.as_str()));
                Ok(self.told(effect, note).await)
            }
            Action::RollBack { workload, from, to } => {
                let effect = self.roll_back(*workload, from, to).await?;
                let note = Note::warning("RollBackStarted", format!("`{}` goes back to {to}", workload.as_str()));
                Ok(self.told(effect, note).await)
            }
            Action::Replace { workload, pod, machine } => self.replace(*workload, pod, machine).await,
            Action::Cordon { machine } => Ok(self.cordon(machine).await?.into()),
            Action::Drain { machine, force } => self.evict(machine, *force).await,
            Action::Uncordon { machine } => {
                let effect = self.uncordon(machine).await?;
                let note = Note::new("MachineUpdated", format!("machine `{machine}` takes pods again"));
                Ok(self.told(effect, note).await)
            }
            Action::Fail { failure } => self.fail(failure).await,
            Action::Reverted { release } => self.reverted(release).await,
            Action::Finish { release } => self.finish(release).await,
        }
    }

    /// Tells people of what was changed; not where it was so already, since actions are repeated until their effect is seen.
    async fn told(&self, effect: Effect, note: Note) -> Outcome {
        if effect == Effect::Changed {
            self.tell(note).await;
        }
        effect.into()
    }

    /// Tells people of something about the VersionUpdate.
    pub(super) async fn tell(&self, note: Note) {
        let uid = self.cache.facts().updates.get(VERSION_UPDATE).map(|u| u.uid.clone());
        if let Some(uid) = uid
            && self.access.may_write()
        {
            self.events.tell(&uid, note).await;
        }
    }

    fn current(&self) -> Result<ReleaseRef, ClusterError> {
        let facts = self.cache.facts();
        let update = facts.updates.get(VERSION_UPDATE).ok_or_else(|| ClusterError::Refused {
            why: format!("there is no VersionUpdate `{VERSION_UPDATE}`"),
        })?;
        observe::current(&facts, update).map_err(|error| ClusterError::Refused { why: error.to_string() })
    }

    async fn run(
        &self,
        machine: &MachineName,
        from: Option<ReleaseRef>,
        to: ReleaseRef,
    ) -> Result<Effect, ClusterError> {
        let policy = {
            let facts = self.cache.facts();
            facts
                .updates
                .get(VERSION_UPDATE)
                .map(|update| observe::wanted(update).0.policy)
        };
        let Some(policy) = policy else { return Ok(Effect::Stale) };
        let order = Order::Run {
            from,
            to,
            since: Timestamp::now(),
            timeout_seconds: policy.health_timeout_seconds,
        };
        self.order(machine, &order).await
    }

    /// Deletes a pod that is of another template than its workload's.
    async fn replace(&self, workload: Workload, pod: &str, machine: &MachineName) -> Result<Outcome, ClusterError> {
        let api: Api<SlimPod> = PODS.api(&self.access.client);
        let Some(live) = optional(self.access.read(api.get(pod)).await)? else {
            return Ok(Outcome::Done);
        };
        let seen = facts::pod(&live);
        if seen.leaving {
            return Ok(Outcome::Done);
        }
        let template = self.cache.facts().workload(workload.as_str()).cloned();
        let outdated = template.is_some_and(|t| t.revision != seen.revision || t.template != seen.release);
        if seen.workload != Some(workload) || seen.machine.as_deref() != Some(machine.as_str()) || !outdated {
            return Ok(Outcome::Stale);
        }
        let params = DeleteParams {
            preconditions: Some(Preconditions {
                uid: live.metadata.uid.clone(),
                resource_version: None,
            }),
            ..DeleteParams::default()
        };
        let pods: Api<Pod> = Api::namespaced(self.access.client.clone(), NAMESPACE);
        match self.access.write(pods.delete(pod, &params)).await {
            Ok(_) | Err(Failure::Missing) => Ok(Outcome::Done),
            Err(Failure::Conflict) => Ok(Outcome::Stale),
            Err(failure) => Err(failure.into()),
        }
    }

    async fn begin(&self, release: &ReleaseRef) -> Result<Outcome, ClusterError> {
        let current = self.current()?;
        self.change_status(|update, generation_seen| {
            if update.status.hop_started.is_some() {
                return Change::None;
            }
            // What was planned is for what was asked for then.
            if update.generation != generation_seen {
                return Change::Stale;
            }
            let mut status = update.status.clone();
            status.hop_started = Some(Timestamp::now());
            status.current_version = Some(current.version.to_string());
            status.current_release = Some(current.digest.clone());
            status.failure = None;
            let note = Note::new("HopStarted", format!("from {} to {release}", current.version));
            Change::To(Box::new(status), note)
        })
        .await
    }

    async fn fail(&self, failure: &FailedRelease) -> Result<Outcome, ClusterError> {
        if self.is_well(failure).await? {
            return Ok(Outcome::Stale);
        }
        let log = if failure.log.is_empty() {
            self.last_words(failure).await
        } else {
            failure.log.clone()
        };
        self.change_status(|update, _| {
            let known = update.status.failure.as_ref();
            if known.is_some_and(|k| k.release == failure.release && k.attempt == failure.attempt && !k.reverted) {
                return Change::None;
            }
            let FailedRelease {
                release,
                component,
                instance,
                message,
                halted,
                ..
            } = failure;
            let next = if *halted {
                "nothing more is begun"
            } else {
                "everything goes back"
            };
            let note = format!("{release}: {component} `{instance}`: {message}; {next}");
            let mut status = update.status.clone();
            status.failure = Some(FailedRelease {
                log: log.clone(),
                ..failure.clone()
            });
            Change::To(Box::new(status), Note::warning("ReleaseFailed", note))
        })
        .await
    }

    /// Whether what a failure is about is well after all: what was planned from may be old, when the API could not be watched.
    async fn is_well(&self, failure: &FailedRelease) -> Result<bool, ClusterError> {
        let api: Api<SlimPod> = PODS.api(&self.access.client);
        if let Some(pod) = optional(self.access.read(api.get(&failure.instance)).await)? {
            let seen = facts::pod(&pod);
            let of_this = seen.workload.is_some_and(|w| w.as_str() == failure.component);
            return Ok(of_this && seen.ready && seen.trouble.is_none() && self.says_so(&seen, failure).await?);
        }
        let Ok(machine) = MachineName::new(failure.instance.as_str()) else {
            return Ok(false);
        };
        let node = self.access.get(&super::cache::NODES, machine.as_str()).await?;
        let object = self.access.get(&super::cache::MACHINES, machine.as_str()).await?;
        let (Some(node), Some(object)) = (node, object) else {
            return Ok(false);
        };
        let read = |value: &kube::api::DynamicObject| serde_json::to_value(value).unwrap_or_default();
        let (Ok(node), Ok(object)) = (
            super::resources::SlimNode::deserialize(read(&node)),
            SlimAny::deserialize(read(&object)),
        ) else {
            return Ok(false);
        };
        let told = facts::machine(&object).status.unwrap_or_default();
        let runs = told.running.as_ref() == Some(&failure.release);
        // Anything about the machine but its own programs has to be judged by the planner.
        Ok(failure.component == KUBELET && runs && told.failure.is_none() && facts::node(&node).ready)
    }

    /// Whether an API server's own process is what its kubelet takes it for; of all else the kubelet's word is enough.
    async fn says_so(&self, pod: &facts::PodFacts, failure: &FailedRelease) -> Result<bool, ClusterError> {
        let (true, Some(machine)) = (pod.workload == Some(Workload::ApiServer), &pod.machine) else {
            return Ok(true);
        };
        let Some(object) = self.access.get(&super::cache::MACHINES, machine).await? else {
            return Ok(false);
        };
        let value = serde_json::to_value(&object).unwrap_or_default();
        let status = SlimAny::deserialize(value)
            .ok()
            .and_then(|object| facts::machine(&object).status);
        let version = &failure.release.version;
        Ok(status.is_some_and(|status| super::observe::says(&status, pod, version)))
    }

    /// The last lines that what failed has printed.
    async fn last_words(&self, failure: &FailedRelease) -> Vec<String> {
        let of_machine = {
            let facts = self.cache.facts();
            let machine = facts.machines.get(&failure.instance);
            let told = machine.and_then(|m| m.status.as_ref()).and_then(|s| s.failure.as_ref());
            told.filter(|f| f.release == failure.release).map(|f| f.log.clone())
        };
        if let Some(log) = of_machine {
            return log.iter().map(|line| cut(line)).collect();
        }
        let pods: Api<Pod> = Api::namespaced(self.access.client.clone(), NAMESPACE);
        // Of one that was started again, the last words are those before.
        for previous in [true, false] {
            let params = LogParams {
                container: Some(failure.component.clone()),
                previous,
                tail_lines: i64::try_from(LOG_LINES).ok(),
                ..LogParams::default()
            };
            match self.access.read(pods.logs(&failure.instance, &params)).await {
                // What kubelet says of a log that is gone is no log.
                Ok(text) if !text.trim().is_empty() && !text.starts_with(NO_LOG) => return tail(&text),
                Ok(_) => {}
                Err(error) => {
                    tracing::debug!(instance = failure.instance, previous, ?error, "no log");
                }
            }
        }
        Vec::new()
    }

    async fn reverted(&self, release: &ReleaseRef) -> Result<Outcome, ClusterError> {
        let current = self.current()?;
        // A next try fetches it afresh.
        let told: Vec<MachineName> = {
            let facts = self.cache.facts();
            let machines = facts.machines.iter();
            let told = machines.filter(|(_, machine)| machine.spec.stage.contains(release));
            told.filter_map(|(name, _)| MachineName::new(name).ok()).collect()
        };
        let order = Order::Unstage {
            release: release.clone(),
        };
        if self.order_all(told, &order).await? == Outcome::Stale {
            return Ok(Outcome::Stale);
        }
        self.change_status(|update, _| {
            let mut status = update.status.clone();
            let failed = status.failure.as_mut().filter(|f| f.release == *release && !f.reverted);
            let (outcome, message) = match failed {
                Some(failure) => {
                    failure.reverted = true;
                    let FailedRelease {
                        component,
                        instance,
                        message,
                        ..
                    } = failure;
                    ("Reverted", format!("{component} `{instance}`: {message}"))
                }
                None if status.hop_started.is_none() => return Change::None,
                None => (
                    "Abandoned",
                    "another version was asked for before it was done".to_owned(),
                ),
            };
            let note = format!("everything is back at {} as it was before {release}", current.version);
            remember(&mut status, &current, release, outcome, message);
            Change::To(Box::new(status), Note::new(outcome, note))
        })
        .await
    }

    async fn finish(&self, release: &ReleaseRef) -> Result<Outcome, ClusterError> {
        let before = self.current()?;
        // First what later machines and rolls start from: the status says that all is done.
        if self.write_settings(release).await? == Outcome::Stale {
            return Ok(Outcome::Stale);
        }
        self.change_status(|update, _| {
            let status = &update.status;
            let same = status.current_version.as_deref() == Some(release.version.to_string().as_str())
                && status.current_release.as_ref() == Some(&release.digest);
            if same && status.hop_started.is_none() {
                return Change::None;
            }
            let mut status = status.clone();
            // Finishing where it began is going back because another version was asked for.
            let (outcome, note) = if *release == before {
                let back = format!("everything is back at {release}, as was asked for");
                ("Abandoned", Note::new("Abandoned", back))
            } else {
                (
                    "Completed",
                    Note::new("HopFinished", format!("the cluster runs {release}")),
                )
            };
            remember(&mut status, &before, release, outcome, String::new());
            status.current_version = Some(release.version.to_string());
            status.current_release = Some(release.digest.clone());
            status.failure = None;
            Change::To(Box::new(status), note)
        })
        .await
    }

    async fn write_settings(&self, release: &ReleaseRef) -> Result<Outcome, ClusterError> {
        let manifest = self.manifest(release)?;
        let change = async || {
            let live = self
                .access
                .get(&SETTINGS, SETTINGS_CONFIG_MAP)
                .await?
                .ok_or(Failure::Missing)?;
            let text = live.data["data"][SETTINGS_KEY].as_str().unwrap_or_default();
            let settings: ControlPlaneSettings = serde_json::from_str(text).map_err(|error| ClusterError::Refused {
                why: format!("ConfigMap `{SETTINGS_CONFIG_MAP}` can't be read: {error}"),
            })?;
            if settings.release_digest == release.digest {
                return Ok(Effect::Already);
            }
            let settings = settings.with_release(manifest.clone(), release.digest.clone());
            let mut after = serde_json::to_value(&live).unwrap_or_default();
            after["data"][SETTINGS_KEY] = json!(json!(settings).to_string());
            self.access.change(&SETTINGS, &live, &after, Part::Object).await?;
            Ok(Effect::Changed)
        };
        Ok(self.access.again(change).await?.into())
    }

    /// Changes the status of the VersionUpdate as it is now. `decide` is given the object, and which generation of it was
    /// planned for.
    async fn change_status(&self, decide: impl Fn(&UpdateFacts, i64) -> Change) -> Result<Outcome, ClusterError> {
        let generation = self.generation.load(Ordering::Relaxed);
        let decide = &decide;
        let change = async || {
            let live = self
                .access
                .get(&UPDATES, VERSION_UPDATE)
                .await?
                .ok_or(Failure::Missing)?;
            let mut after = serde_json::to_value(&live).unwrap_or_default();
            let unreadable = |error: serde_json::Error| ClusterError::Refused { why: error.to_string() };
            let seen = facts::update(&SlimAny::deserialize(&after).map_err(unreadable)?);
            let (status, note) = match decide(&seen, generation) {
                Change::None => return Ok(Effect::Already),
                Change::Stale => return Ok(Effect::Stale),
                Change::To(status, note) => (status, note),
            };
            after["status"] = json!(status);
            self.access.change(&UPDATES, &live, &after, Part::Status).await?;
            self.tell(note).await;
            Ok(Effect::Changed)
        };
        Ok(self.access.again(change).await?.into())
    }
}

/// The component of machines' own failures.
const KUBELET: &str = "kubelet";

/// Writes an ended hop into the history.
fn remember(status: &mut VersionUpdateStatus, from: &ReleaseRef, release: &ReleaseRef, outcome: &str, message: String) {
    let now = Timestamp::now();
    status.history.push(HistoryEntry {
        from: Some(from.version.to_string()),
        release: release.clone(),
        started: status.hop_started.unwrap_or(now),
        finished: now,
        outcome: outcome.into(),
        message,
    });
    let surplus = status.history.len().saturating_sub(HISTORY);
    status.history.drain(..surplus);
    status.hop_started = None;
}

fn tail(text: &str) -> Vec<String> {
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(LOG_LINES)..]
        .iter()
        .map(|line| cut(line))
        .collect()
}

fn cut(line: &str) -> String {
    line[..line.floor_char_boundary(LONGEST_LINE)].to_owned()
}

#[cfg(test)]
mod tests {
    use kprov_types::Digest;

    use super::*;

    #[test]
    fn history_keeps_the_last() {
        let release = ReleaseRef {
            version: "1.36.3".parse().unwrap(),
            digest: Digest::from_bytes([1; 32]),
        };
        let mut status = VersionUpdateStatus {
            hop_started: Some(Timestamp::UNIX_EPOCH),
            ..VersionUpdateStatus::default()
        };
        for i in 0..=HISTORY {
            remember(&mut status, &release, &release, "Completed", i.to_string());
        }
        assert_eq!(status.history.len(), HISTORY);
        assert_eq!(status.history[0].message, "1");
        assert_eq!(status.hop_started, None);
    }

    #[test]
    fn last_words_are_short() {
        let text = (0..40).map(|i| format!("line {i}\n")).collect::<Vec<_>>().join("\n");
        let lines = tail(&text);
        assert_eq!(lines.len(), LOG_LINES);
        assert_eq!(lines[14], "line 39");
        assert_eq!(tail(&"ä".repeat(2000))[0].len(), LONGEST_LINE);
    }
}
