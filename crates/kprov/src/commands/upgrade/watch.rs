//! Follows an upgrade by the status that the operator writes, and shows it live.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::time::Duration;

use anyhow::Result;
use kprov_types::api::{Failure, Finding, VersionUpdateStatus, condition};
use tokio::time::Instant;

use super::super::access::Access;
use super::super::objects::{self, VersionUpdate, status_of};
use crate::failure::UserError;
use crate::progress::Reporter;

/// How often the status is read.
const LOOK: Duration = Duration::from_millis(400);
/// How long the operator may give no sign that it has seen a change of the spec.
const SILENCE: Duration = Duration::from_mins(1);
/// How long the API may give no answer before that is an error.
const OUTAGE: Duration = Duration::from_mins(3);

/// How it ended.
#[derive(Debug)]
pub(in crate::commands) enum End {
    /// The cluster is as wanted.
    Done(Box<VersionUpdateStatus>),
}

/// What is seen of an upgrade at one time, judged. Pure.
#[derive(Debug, PartialEq, Eq)]
enum Stand {
    /// The operator has not seen the spec yet.
    Unseen,
    /// It is at work, or will be.
    Going,
    /// It holds still because it was told to.
    Paused,
    /// The cluster runs what the spec wants.
    Done,
    /// It won't go on by itself: why, and what to do.
    Stopped { why: String, hint: String },
}

fn stand(generation: i64, desired: &str, status: &VersionUpdateStatus) -> Stand {
    if status.observed_generation < generation {
        return Stand::Unseen;
    }
    // A failure stays in the status until another try has begun, so the phase alone tells whether this try has failed.
    if let ("Failed", Some(failure)) = (status.phase.as_str(), &status.failure) {
        return Stand::Stopped {
            why: failed(failure, status.current_version.as_deref()),
            hint: failure_hint(failure),
        };
    }
    match status.phase.as_str() {
        "Idle" if status.current_version.as_deref() == Some(desired.trim_start_matches('v')) => Stand::Done,
        "Blocked" => {
            let blocked = status
                .conditions
                .iter()
                .find(|c| c.kind == condition::PROGRESSING)
                .map_or_else(|| status.message.clone(), |c| c.message.clone());
            let mut why = format!("the cluster does not change to {desired}: {blocked}");
            for finding in status.findings.iter().filter(|f| f.blocks) {
                let _ = write!(why, "\n  {}: {}\n      {}", finding.name, finding.message, finding.hint);
            }
            let hint = match status.findings.iter().find(|f| f.blocks) {
                Some(finding) => format!(
                    "put that right and run the same command again, or override it by its name, as `--force {}`",
                    finding.name
                ),
                None => "nothing was changed; ask for another version, or see `kprov status`".into(),
            };
            Stand::Stopped { why, hint }
        }
        "Paused" => Stand::Paused,
        _ => Stand::Going,
    }
}

/// A failed release in words: which instance, why, its last lines, and where that leaves the cluster.
fn failed(failure: &Failure, current: Option<&str>) -> String {
    let Failure {
        release,
        component,
        instance,
        message,
        log,
        halted,
        ..
    } = failure;
    let mut text = format!(
        "Kubernetes {} failed: {component} `{instance}` {message}",
        release.version
    );
    for line in log {
        let _ = write!(text, "\n    {line}");
    }
    if *halted {
        text.push_str("\n  the rollout has stopped; what runs the new version goes on running it");
    } else if let Some(current) = current {
        let _ = write!(
            text,
            "\n  everything is back at {current}, which has been serving all along"
        );
    }
    text
}

fn failure_hint(failure: &Failure) -> String {
    if failure.halted {
        "see to that machine, then run the same command again to go on, or `kprov rollback`".into()
    } else {
        "ask for another version, or give a mended payload of this one with `--release`; the same command again tries the same release once more".into()
    }
}

/// Shows the upgrade until it has ended. `update` is the object as it was after the last change of its spec.
pub(in crate::commands) async fn follow(access: &Access, reporter: &Reporter, update: &VersionUpdate) -> Result<End> {
    let generation = update.metadata.generation.unwrap_or_default();
    let desired = update.spec.desired_version.clone();
    let begun = Instant::now();
    let mut answered = Instant::now();
    let mut screen = Screen::default();
    loop {
        match objects::version_update(access).await {
            Ok(update) => {
                answered = Instant::now();
                if update.metadata.generation.unwrap_or_default() > generation && update.spec.desired_version != desired
                {
                    return Err(UserError::new(format!(
                        "somebody asks for {} now, instead of {desired}",
                        update.spec.desired_version
                    ))
                    .hint("`kprov status` shows how it stands")
                    .into());
                }
                let status = status_of(&update);
                screen.show(reporter, &desired, &status);
                match stand(generation, &desired, &status) {
                    Stand::Done => {
                        screen.clear(reporter);
                        return Ok(End::Done(Box::new(status)));
                    }
                    Stand::Stopped { why, hint } => {
                        screen.clear(reporter);
                        return Err(UserError::new(why).hint(hint).into());
                    }
                    Stand::Unseen if begun.elapsed() > SILENCE => {
                        return Err(UserError::new("the operator does not react")
                            .hint("see `kubectl -n kube-system get pods -l app.kubernetes.io/name=kprov-operator` and its log; it goes on as soon as the operator runs")
                            .into());
                    }
                    Stand::Unseen | Stand::Going | Stand::Paused => {}
                }
            }
            Err(error) if answered.elapsed() > OUTAGE => return Err(error),
            Err(error) => reporter.message("", &format!("no answer from the API: {error:#}")),
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// What preflight found that stops nothing: told once each.
fn warnings<'a>(told: &mut BTreeSet<String>, status: &'a VersionUpdateStatus) -> Vec<&'a Finding> {
    let fresh = status.findings.iter().filter(|f| !f.blocks);
    fresh.filter(|f| told.insert(f.name.clone())).collect()
}

/// What is shown: the hop as the cluster's own track, and a track for each thing that is being changed.
#[derive(Default)]
struct Screen {
    tracks: BTreeMap<String, String>,
    told: String,
    warned: BTreeSet<String>,
}

impl Screen {
    fn show(&mut self, reporter: &Reporter, desired: &str, status: &VersionUpdateStatus) {
        for finding in warnings(&mut self.warned, status) {
            let Finding {
                name, message, hint, ..
            } = finding;
            reporter.note(&format!("warning: {name}: {message}; {hint}"));
        }
        reporter.step("", &headline(desired, status));
        let steps: BTreeMap<String, String> = status
            .steps
            .iter()
            .map(|step| (track(&step.id).to_owned(), step.message.clone()))
            .collect();
        for gone in self.tracks.keys().filter(|track| !steps.contains_key(*track)) {
            reporter.done(gone);
        }
        for (track, message) in &steps {
            reporter.step(track, message);
        }
        self.tracks = steps;
        let waiting: Vec<&str> = status.waiting.iter().take(3).map(|w| w.message.as_str()).collect();
        let mut told = waiting.join("; ");
        if status.waiting.len() > waiting.len() {
            let _ = write!(told, "; {} more", status.waiting.len() - waiting.len());
        }
        if !told.is_empty() && told != self.told {
            reporter.message("", &format!("waits for {told}"));
        }
        self.told = told;
    }

    fn clear(&mut self, reporter: &Reporter) {
        for track in self.tracks.keys() {
            reporter.done(track);
        }
        reporter.done("");
    }
}

/// Whom a step is about: the last part of its id.
fn track(id: &str) -> &str {
    id.rsplit('/').next().unwrap_or(id)
}

fn headline(desired: &str, status: &VersionUpdateStatus) -> String {
    let machines: u32 = status.kubelets.values().sum();
    let to = status
        .hops
        .first()
        .map_or_else(|| desired.to_owned(), |hop| hop.version.to_string());
    let updated = status
        .kubelets
        .iter()
        .filter(|(version, _)| version.trim_start_matches('v') == to)
        .map(|(_, n)| n)
        .sum::<u32>();
    let hops = match status.hops.len() {
        0 | 1 => String::new(),
        n => format!(", {n} hops to {desired}"),
    };
    match status.phase.as_str() {
        "Upgrading" => format!("upgrade to {to}{hops} ({updated} of {machines} machines)"),
        "Reverting" => format!("take {to} back"),
        "Paused" => "paused; `kprov resume` goes on".into(),
        "Preflight" => format!("prepare {to}{hops}"),
        _ => format!("wait for the operator ({desired})"),
    }
}

#[cfg(test)]
mod tests {
    use kprov_types::api::ReleaseRef;

    use super::*;

    fn status(phase: &str, current: &str) -> VersionUpdateStatus {
        VersionUpdateStatus {
            observed_generation: 3,
            phase: phase.into(),
            current_version: Some(current.into()),
            ..VersionUpdateStatus::default()
        }
    }

    #[test]
    fn an_upgrade_is_judged_by_its_status() {
        assert_eq!(stand(4, "1.36.3", &status("Idle", "1.36.3")), Stand::Unseen);
        assert_eq!(stand(3, "v1.36.3", &status("Idle", "1.36.3")), Stand::Done);
        // The operator has seen it and has not begun.
        assert_eq!(stand(3, "1.36.3", &status("Idle", "1.35.6")), Stand::Going);
        assert_eq!(stand(3, "1.36.3", &status("Upgrading", "1.35.6")), Stand::Going);
        assert_eq!(stand(3, "1.36.3", &status("Paused", "1.35.6")), Stand::Paused);
    }

    #[test]
    fn what_stops_it_is_told_with_what_to_do() {
        let mut blocked = status("Blocked", "1.35.6");
        blocked.findings = vec![Finding {
            name: "pdb/default/web".into(),
            blocks: true,
            message: "lets no pod go".into(),
            hint: "raise its replicas".into(),
        }];
        let Stand::Stopped { why, hint } = stand(3, "1.36.3", &blocked) else {
            panic!("it must stop");
        };
        assert!(why.contains("pdb/default/web: lets no pod go"), "{why}");
        assert!(hint.contains("--force pdb/default/web"), "{hint}");

        let mut failing = status("Failed", "1.35.6");
        failing.failure = Some(Failure {
            release: ReleaseRef {
                version: "1.36.3".parse().unwrap(),
                digest: kprov_types::Digest::from_bytes([1; 32]),
            },
            attempt: 0,
            component: "kube-apiserver".into(),
            instance: "kube-apiserver-x7".into(),
            message: "crashes again and again".into(),
            log: vec!["unknown flag".into()],
            time: jiff::Timestamp::UNIX_EPOCH,
            halted: false,
            reverted: true,
        });
        let Stand::Stopped { why, .. } = stand(3, "1.36.3", &failing) else {
            panic!("it must stop");
        };
        assert!(why.contains("`kube-apiserver-x7` crashes"), "{why}");
        assert!(why.contains("    unknown flag"), "{why}");
        assert!(why.contains("back at 1.35.6"), "{why}");
        // The last try's failure says nothing of this one, nor of a cluster that is where it should be.
        failing.phase = "Preflight".into();
        assert_eq!(stand(3, "1.36.3", &failing), Stand::Going);
        failing.phase = "Idle".into();
        assert_eq!(stand(3, "1.35.6", &failing), Stand::Done);
        // While things go back it is not over.
        failing.failure.as_mut().unwrap().reverted = false;
        failing.phase = "Reverting".into();
        assert_eq!(stand(3, "1.36.3", &failing), Stand::Going);
    }

    #[test]
    fn steps_are_shown_by_whom_they_are_about() {
        assert_eq!(track("1.36.3/roll/kube-apiserver"), "kube-apiserver");
        assert_eq!(track("x"), "x");
    }
}
