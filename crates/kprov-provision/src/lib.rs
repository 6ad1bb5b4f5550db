//! Infrastructure: from what is wanted and what is there to the next thing to do.
//!
//! [`plan()`] is pure: equal inputs give equal plans, and a plan made after convergence has no actions. [`drive`] observes, plans,
//! performs the first action, and looks again, until nothing is left to do; it remembers nothing, so that it can be killed
//! anywhere. It knows no provider by name, no async runtime and no clock: the caller brings its [`Pace`].

mod drive;
mod plan;
#[cfg(test)]
mod tests;

pub use drive::{DriveError, Pace, Progress, drive};
pub use plan::{Action, Goal, Plan, PlanError, Waiting, Wanted, plan};
