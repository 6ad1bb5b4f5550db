//! What to do next: pure.
//!
//! [`plan()`] finds the course (on to a release, back, hold still), and that course's module drafts the plan stage by stage:
//! the first stage that isn't complete says what to do or what is waited for, and nothing of the later ones begins. Start
//! reading at `course`, then `forward`.

use std::fmt;

use jiff::Timestamp;
use kprov_types::api::{Failure, ReleaseRef};

use crate::model::{Action, Input};

mod back;
mod course;
mod draft;
mod fleet;
mod forward;
mod judge;
mod machines;
mod waiting;
mod workloads;

use course::Course;
use draft::Draft;
pub use waiting::{Lack, Waiting};

/// What a cluster needs to become what is wanted, as far as that can be told from one picture.
#[derive(Clone, Debug, PartialEq)]
#[must_use = "a plan says what to do, or why nothing can be done"]
pub struct Plan {
    /// The state of the whole, for conditions and people.
    pub state: State,
    /// The hops that are still to be made; the first is under way.
    pub hops: Vec<ReleaseRef>,
    /// What can be done right now, all of it safely at the same time.
    pub steps: Vec<Step>,
    /// What is under way and needs no action: rolls, drains, machines that start.
    pub running: Vec<Step>,
    /// What holds progress back, and isn't an error.
    pub waiting: Vec<Waiting>,
}

/// A step: an action with a stable id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// `<version>/<what>/<whom>`, such as `1.36.3/roll/kube-apiserver`. Equal whenever the same thing is meant.
    pub id: String,
    /// In words for people: `roll kube-apiserver to 1.36.3`.
    pub message: String,
    /// What to do; of a step that is running, what began it.
    pub action: Action,
}

/// How a cluster stands towards what is wanted of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// It is as wanted.
    Idle,
    /// Preflight has not been asked yet, or machines fetch releases: nothing has changed.
    Preparing,
    /// A hop is under way.
    Upgrading,
    /// It would go on, and is told not to.
    Paused,
    /// A release failed, and things go back to how they were.
    Reverting,
    /// A release failed and everything is back; a person has to ask for something else.
    Failed,
    /// What is asked for can't be done as it is; nothing is changed.
    Refused(Refusal),
}

/// Why what is asked for can't be done. Each carries the words for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// `spec.desiredVersion` is no version.
    Malformed(String),
    /// It is a minor behind the cluster.
    Downgrade(String),
    /// The cluster knows no release of it, or of a minor on the way.
    NoRelease(String),
    /// A release on the way is not verified.
    Unverified(String),
    /// The releases known form no way there (a `minimumFrom` stands against it).
    NoWay(String),
    /// The version is older than any that kprov supports.
    Unsupported(String),
    /// Preflight found something that stops it: the names of the findings.
    Preflight(Vec<String>),
    /// Another version is asked for in the middle of a hop; it has to be finished or rolled back first.
    MidHop(String),
}

impl Refusal {
    /// Why, in one CamelCase word: stable, for programs and metrics.
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::Malformed(_) => "MalformedVersion",
            Self::Downgrade(_) => "Downgrade",
            Self::NoRelease(_) => "NoRelease",
            Self::Unverified(_) => "UnverifiedRelease",
            Self::NoWay(_) => "NoWay",
            Self::Unsupported(_) => "UnsupportedVersion",
            Self::Preflight(_) => "Preflight",
            Self::MidHop(_) => "MidHop",
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Malformed(words)
            | Self::Downgrade(words)
            | Self::NoRelease(words)
            | Self::Unverified(words)
            | Self::NoWay(words)
            | Self::Unsupported(words)
            | Self::MidHop(words) => f.write_str(words),
            Self::Preflight(names) => {
                f.write_str("preflight found what stops the change: ")?;
                for (i, name) in names.iter().enumerate() {
                    write!(f, "{}`{name}`", if i == 0 { "" } else { ", " })?;
                }
                Ok(())
            }
        }
    }
}

/// Plans: what `input` needs next. Equal inputs give equal plans, and a cluster that is as wanted an empty one.
///
/// The hop under way is read off the API servers' template: it is the first thing that a hop changes and the last that goes
/// back. All else follows from which release each part is of.
pub fn plan(input: &Input) -> Plan {
    let mut plan = match course::course(input) {
        Course::Refused(refusal) => refused(input, refusal),
        Course::Failed(failure) => failed(input, failure),
        Course::Settle => forward::settle(input),
        Course::Forward(hops) => forward::forward(input, &hops),
        Course::Back(why) => back::back(input, why),
    };
    let held = matches!(
        plan.state,
        State::Preparing | State::Upgrading | State::Reverting | State::Idle
    );
    if input.wanted.paused && held && (plan.state != State::Idle || !plan.steps.is_empty()) {
        plan.state = State::Paused;
        // A machine that has finished gets its pods again; nothing else begins.
        plan.steps.retain(|step| matches!(step.action, Action::Uncordon { .. }));
    }
    plan
}

/// Nothing is changed; machines that have finished get their pods again.
fn refused(input: &Input, refusal: Refusal) -> Plan {
    let mut draft = Draft::new(input, &input.observed.current);
    let to = course::under_way(&input.observed).unwrap_or(&input.observed.current);
    fleet::release_finished(&mut draft, to);
    draft.finish(State::Refused(refusal), &[])
}

/// A person has to ask for something else; machines whose turn was cut short get their pods again.
fn failed(input: &Input, failure: &Failure) -> Plan {
    let mut draft = Draft::new(input, &failure.release);
    fleet::release_idle(&mut draft);
    draft.finish(State::Failed, &[])
}

/// The name of the etcd snapshot that is taken before a hop changes anything: `before-1.36.3-20260412t091500z`.
pub fn snapshot_name(release: &ReleaseRef, hop_started: Timestamp) -> String {
    // A version with build metadata is no file name everywhere.
    let version = release.version.to_string().replace('+', "-");
    format!("before-{version}-{}", hop_started.strftime("%Y%m%dt%H%M%Sz"))
}

#[cfg(test)]
mod tests;
