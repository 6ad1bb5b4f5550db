//! Findings from facts: pure. Equal facts give equal findings, in a stable order and by stable names.

mod admission;
mod apis;
mod budgets;
mod flags;
mod machines;
mod skew;
#[cfg(test)]
mod tests;

use kprov_bootstrap::versions::NEWEST;
use kprov_types::MachineName;
use kprov_types::api::Finding;

use super::{Facts, Inputs, Unchecked};

/// How many findings of one family are told one by one. They are kept in an object of the API, and read by people.
const MOST: usize = 20;

/// What stands against the hops, in the order of the checks.
///
/// A finding's name is `<family>/<object>`; only that name overrides it, so that nothing is overridden which nobody has seen.
pub fn judge(facts: &Facts, inputs: &Inputs) -> Vec<Finding> {
    let Facts {
        programs,
        settings,
        requests,
        stored,
        budgets,
        webhooks,
        refused,
    } = facts;
    let mut findings = Findings::default();
    unknown_versions(inputs, &mut findings);
    match (programs, settings) {
        (Ok(programs), Ok(settings)) => flags::judge(programs, settings, inputs, &mut findings),
        (Err(why), _) | (_, Err(why)) => findings.unchecked(
            "flags",
            "flags and feature gates that a version on the way no longer has",
            why,
        ),
    }
    match requests {
        Ok(requests) => apis::requests(requests, inputs, &mut findings),
        Err(why) => findings.unchecked("requested-apis", "which API versions clients ask for", why),
    }
    match stored {
        Ok(stored) => apis::stored(stored, inputs, &mut findings),
        Err(why) => findings.unchecked("stored-apis", "objects of API versions that go", why),
    }
    match budgets {
        Ok(budgets) => budgets::judge(budgets, inputs, &mut findings),
        Err(why) => findings.unchecked(
            "pod-disruption-budgets",
            "PodDisruptionBudgets that would hold drains up",
            why,
        ),
    }
    skew::judge(programs.as_deref().unwrap_or_default(), inputs, &mut findings);
    machines::judge(inputs, &mut findings);
    match webhooks {
        Ok(webhooks) => admission::webhooks(webhooks, inputs, &mut findings),
        Err(why) => findings.unchecked("webhooks", "admission webhooks without a backend", why),
    }
    match refused {
        Ok(refused) => admission::refused(refused, &mut findings),
        Err(why) => findings.unchecked("admission", "whether admission lets an upgrade's changes through", why),
    }
    findings.0
}

fn unknown_versions(inputs: &Inputs, findings: &mut Findings) {
    for hop in inputs.hops.iter().filter(|hop| hop.release.version.minor() > NEWEST) {
        let version = &hop.release.version;
        findings.warn(
            format!("unknown-version/{version}"),
            format!(
                "{version} is newer than this kprov, which knows Kubernetes up to {NEWEST}; it is treated as {NEWEST}"
            ),
            "use a kprov that was made for it, where there is one",
        );
    }
}

/// Findings as they are made.
#[derive(Default)]
struct Findings(Vec<Finding>);

impl Findings {
    fn one(blocks: bool, name: String, message: String, hint: impl Into<String>) -> Finding {
        Finding {
            name,
            blocks,
            message,
            hint: hint.into(),
        }
    }

    fn add(&mut self, blocks: bool, name: String, message: String, hint: impl Into<String>) {
        self.0.push(Self::one(blocks, name, message, hint));
    }

    /// Stops the change.
    fn block(&mut self, name: String, message: String, hint: impl Into<String>) {
        self.add(true, name, message, hint);
    }

    /// Is told only.
    fn warn(&mut self, name: String, message: String, hint: impl Into<String>) {
        self.add(false, name, message, hint);
    }

    /// A check broke, which is not that it failed.
    fn unchecked(&mut self, check: &str, what: &str, Unchecked(why): &Unchecked) {
        self.warn(
            format!("unchecked/{check}"),
            format!("could not check {what}: {why}"),
            "look for yourself, or run preflight again",
        );
    }

    /// Adds findings of one family about one machine each; of many, the last ones as one.
    fn family(&mut self, family: &str, mut each: Vec<(MachineName, Finding)>) {
        // Blockers first, so that none is hidden behind warnings.
        each.sort_by(|one, other| other.1.blocks.cmp(&one.1.blocks).then_with(|| one.0.cmp(&other.0)));
        let rest = if each.len() > MOST {
            each.split_off(MOST - 1)
        } else {
            Vec::new()
        };
        self.0.extend(each.into_iter().map(|(_, finding)| finding));
        if let Some((_, first)) = rest.first() {
            self.0.push(Finding {
                name: format!("{family}/others"),
                blocks: first.blocks,
                message: format!(
                    "{} machines more: {}",
                    rest.len(),
                    some(rest.iter().map(|(name, _)| name.as_str()))
                ),
                hint: first.hint.clone(),
            });
        }
    }
}

/// A few names for a sentence: `a, b, c and 5 more`.
fn some<'a>(names: impl ExactSizeIterator<Item = &'a str>) -> String {
    some_of(names.len(), names)
}

/// As [`some`], where not all names are at hand.
fn some_of<'a>(count: usize, names: impl Iterator<Item = &'a str>) -> String {
    const TOLD: usize = 5;
    let told: Vec<&str> = names.take(TOLD).collect();
    match count.saturating_sub(told.len()) {
        0 => told.join(", "),
        more => format!("{} and {more} more", told.join(", ")),
    }
}

/// `1 object`, `2 objects`.
fn counted(count: usize, what: &str) -> String {
    if count == 1 {
        format!("1 {what}")
    } else {
        format!("{count} {what}s")
    }
}
