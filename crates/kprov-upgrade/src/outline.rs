//! The whole way from a picture to what is wanted, as one list: for `--dry-run` and for the live view.
//!
//! Made by planning again and again, each step taken as done at once. What it says of machines that fail or pods that don't
//! leave is therefore nothing: it is what will be done if all goes well.

use std::collections::BTreeMap;

use jiff::SignedDuration;
use kprov_types::api::{MaxUnavailable, ReleaseRef};
use kprov_types::{MachineName, Role};

use crate::effects;
use crate::model::{Action, Input, Observed};
use crate::plan::{Plan, State, Step, Waiting, plan};

/// All that is to be done.
#[derive(Clone, Debug, PartialEq)]
pub struct Outline {
    /// Hop by hop; where a cluster is brought level with its own release, or goes back, that is one too.
    pub hops: Vec<HopOutline>,
    /// How it ends: [`State::Idle`] where everything is as wanted then.
    pub ends: State,
    /// What is waited for at the end, where it doesn't get there.
    pub waiting: Vec<Waiting>,
}

/// What one hop does, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HopOutline {
    /// The release the cluster runs before.
    pub from: ReleaseRef,
    /// The release it runs afterwards.
    pub to: ReleaseRef,
    /// The steps. All that is done with a machine is one.
    pub steps: Vec<OutlineStep>,
}

/// A step of an outline.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutlineStep {
    /// The id of the step, as in [`Step::id`]; of a machine, `<version>/machine/<name>`.
    pub id: String,
    /// In words.
    pub message: String,
}

/// Why there is no outline.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OutlineError {
    /// Planning did not come to an end. A defect of the planner: please report it.
    #[error("the plan of this cluster does not end: after {passes} passes it is still at `{step}`")]
    Endless {
        /// How often was planned.
        passes: usize,
        /// The id of the next step.
        step: String,
    },
}

/// Lists what is to be done. Pausing and preflight's findings are left out of account, and of `maxUnavailable` too, which
/// changes how many machines go at a time and nothing of what is done with each.
///
/// # Errors
///
/// [`OutlineError::Endless`].
pub fn outline(input: &Input) -> Result<Outline, OutlineError> {
    let mut input = input.clone();
    input.wanted.paused = false;
    input.wanted.policy.max_unavailable = MaxUnavailable::Percent(100);
    for pool in input.wanted.policy.pools.values_mut() {
        pool.max_unavailable = None;
    }
    input.observed.findings = Some(Vec::new());
    let room = Room::of(&input.observed);
    let mut hops: Vec<Drawn> = Vec::new();
    // Each pass does something, and each thing is done a bounded number of times for each hop and control-plane machine.
    let limit = 64 * (input.observed.releases.len() + 2) + 16 * input.observed.machines.len();
    for _ in 0..limit {
        let plan = plan(&input);
        if plan.steps.is_empty() {
            let Some(seconds) = soaks(&plan) else {
                return Ok(Outline {
                    hops: hops.into_iter().map(|hop| hop.finish(&room)).collect(),
                    ends: plan.state,
                    waiting: plan.waiting,
                });
            };
            input.now += SignedDuration::from_secs(seconds);
            continue;
        }
        let current = &input.observed.current;
        let to = plan.hops.first().unwrap_or(current);
        if hops.last().is_none_or(|hop| hop.from != *current || hop.to != *to) {
            hops.push(Drawn::new(current, to));
        }
        for step in &plan.steps {
            effects::apply(&mut input.observed, &step.action, input.now);
            if let Some(hop) = hops.last_mut() {
                hop.draw(step);
            }
        }
    }
    Err(OutlineError::Endless {
        passes: limit,
        step: plan(&input)
            .steps
            .first()
            .map(|step| step.id.clone())
            .unwrap_or_default(),
    })
}

/// How long canaries still have to be watched; `None` where that isn't what is waited for.
fn soaks(plan: &Plan) -> Option<i64> {
    let soaks = plan.waiting.iter().filter_map(|waiting| match waiting {
        Waiting::Soak { seconds, .. } => Some(*seconds),
        _ => None,
    });
    soaks.max()
}

/// Which machines could take the pods of another.
struct Room {
    machines: BTreeMap<MachineName, Role>,
    workers: usize,
    all: usize,
}

impl Room {
    fn of(observed: &Observed) -> Self {
        let free = || observed.machines.values().filter(|m| m.ready && !m.cordoned);
        Self {
            machines: observed
                .machines
                .iter()
                .map(|(name, m)| (name.clone(), m.role))
                .collect(),
            workers: free().filter(|m| m.role == Role::Worker).count(),
            all: free().count(),
        }
    }

    fn beside(&self, machine: &MachineName) -> bool {
        match self.machines.get(machine) {
            Some(Role::Worker) => self.workers > 1,
            Some(Role::ControlPlane) => self.all > 1,
            None => false,
        }
    }
}

/// A hop being drawn.
struct Drawn {
    from: ReleaseRef,
    to: ReleaseRef,
    lines: Vec<Line>,
    /// Where each machine's line is.
    machines: BTreeMap<MachineName, usize>,
}

enum Line {
    Step(OutlineStep),
    Machine(MachineName, Vec<Action>),
}

impl Drawn {
    fn new(from: &ReleaseRef, to: &ReleaseRef) -> Self {
        Self {
            from: from.clone(),
            to: to.clone(),
            lines: Vec::new(),
            machines: BTreeMap::new(),
        }
    }

    fn draw(&mut self, step: &Step) {
        let (Action::Cordon { machine }
        | Action::Drain { machine, .. }
        | Action::Run { machine, .. }
        | Action::Uncordon { machine }) = &step.action
        else {
            self.lines.push(Line::Step(OutlineStep {
                id: step.id.clone(),
                message: step.message.clone(),
            }));
            return;
        };
        let at = *self.machines.entry(machine.clone()).or_insert_with(|| {
            self.lines.push(Line::Machine(machine.clone(), Vec::new()));
            self.lines.len() - 1
        });
        if let Some(Line::Machine(_, actions)) = self.lines.get_mut(at) {
            actions.push(step.action.clone());
        }
    }

    fn finish(self, room: &Room) -> HopOutline {
        let to = &self.to;
        let lines = self.lines.into_iter().map(|line| match line {
            Line::Step(step) => step,
            Line::Machine(machine, actions) => OutlineStep {
                id: format!("{to}/machine/{machine}"),
                message: machine_in_words(&machine, &actions, room.beside(&machine)),
            },
        });
        HopOutline {
            steps: lines.collect(),
            from: self.from,
            to: self.to,
        }
    }
}

/// `w-1`: cordon, drain, switch to 1.36.3, uncordon. Which pods have to leave is known only once it is cordoned.
fn machine_in_words(machine: &MachineName, actions: &[Action], drained: bool) -> String {
    let words = actions.iter().filter_map(|action| match action {
        Action::Cordon { .. } if drained => Some("cordon, drain".to_owned()),
        Action::Cordon { .. } => Some("cordon".to_owned()),
        Action::Run { to, .. } => Some(format!("switch to {to}")),
        Action::Uncordon { .. } => Some("uncordon".to_owned()),
        _ => None,
    });
    format!("`{machine}`: {}", words.collect::<Vec<_>>().join(", "))
}

#[cfg(test)]
mod tests;
