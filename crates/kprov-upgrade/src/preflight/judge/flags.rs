//! Flags, feature gates and admission plugins that people have set, and that a version on the way does not have.
//!
//! What people have changed of a template is carried over from release to release, so a program would meet it again where it
//! can't read it any more.

use std::collections::{BTreeMap, BTreeSet};

use kprov_bootstrap::self_hosted;
use kprov_types::node::ControlPlaneSettings;
use kprov_types::ports::FIRST_REVISION;
use kprov_types::release::ProgramFacts;

use super::super::{Hop, Inputs, ProgramSeen};
use super::Findings;

const FEATURE_GATES: &str = "feature-gates";
const PLUGIN_FLAGS: [&str; 2] = ["enable-admission-plugins", "disable-admission-plugins"];

/// Admission plugins, and the minor of Kubernetes 1 that doesn't have them any more (its changelog). An API server that is told
/// of one it doesn't know won't start.
const REMOVED_PLUGINS: [(&str, u64); 5] = [
    ("DenyEscalatingExec", 21),
    ("DenyExecOnPrivileged", 21),
    ("PodSecurityPolicy", 25),
    ("SecurityContextDeny", 30),
    ("PersistentVolumeLabel", 31),
];

/// What a program is told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Told {
    /// Flags by name, with all their values.
    flags: BTreeMap<String, BTreeSet<String>>,
    gates: BTreeSet<String>,
}

/// What kprov tells programs of a release, by their names.
type Rendered = BTreeMap<String, Told>;

pub(super) fn judge(
    programs: &[ProgramSeen],
    settings: &ControlPlaneSettings,
    inputs: &Inputs,
    findings: &mut Findings,
) {
    let today = rendered(settings);
    let later: Vec<Rendered> = inputs.hops.iter().map(|hop| rendered(&at(settings, hop))).collect();
    for program in programs {
        Live {
            program,
            told: told(&program.flags),
            facts: settings.release.programs.get(&program.name),
            today: &today,
            later: &later,
            hops: &inputs.hops,
        }
        .judge(findings);
    }
}

fn at(settings: &ControlPlaneSettings, hop: &Hop) -> ControlPlaneSettings {
    ControlPlaneSettings {
        kubernetes: hop.release.version.clone(),
        release: hop.manifest.clone(),
        release_digest: hop.release.digest.clone(),
        ..settings.clone()
    }
}

/// A program as it runs, and what there is to compare it with.
struct Live<'a> {
    program: &'a ProgramSeen,
    told: Told,
    /// What its version says that it knows.
    facts: Option<&'a ProgramFacts>,
    today: &'a Rendered,
    /// As `hops`.
    later: &'a [Rendered],
    hops: &'a [Hop],
}

impl Live<'_> {
    fn judge(&self, findings: &mut Findings) {
        let flags: Vec<&str> = self.flags_of_people().collect();
        let gates: Vec<&str> = self.gates_of_people().collect();
        for name in &flags {
            self.missing(
                "removed-flag",
                &format!("the flag `--{name}`"),
                name,
                |facts| &facts.flags,
                |told| told.flags.contains_key(*name),
                findings,
            );
        }
        for name in &gates {
            self.missing(
                "removed-feature-gate",
                &format!("the feature gate `{name}`"),
                name,
                |facts| &facts.feature_gates,
                |told| told.gates.contains(*name),
                findings,
            );
        }
        for flag in flags.iter().filter(|flag| PLUGIN_FLAGS.contains(flag)) {
            self.plugins(flag, findings);
        }
        self.untold(&flags, &gates, findings);
    }

    fn renderings(&self) -> impl Iterator<Item = &Told> {
        let all = std::iter::once(self.today).chain(self.later);
        all.filter_map(|rendered| rendered.get(&self.program.name))
    }

    /// Flags that are otherwise than kprov has them in any release concerned.
    fn flags_of_people(&self) -> impl Iterator<Item = &str> {
        let own = |name: &str, values| self.renderings().any(|told| told.flags.get(name) == Some(values));
        let people = self.told.flags.iter().filter(move |(name, values)| !own(name, values));
        // Its gates are looked at one by one.
        people
            .map(|(name, _)| name.as_str())
            .filter(|name| *name != FEATURE_GATES)
    }

    fn gates_of_people(&self) -> impl Iterator<Item = &str> {
        let own = |name: &str| self.renderings().any(|told| told.gates.contains(name));
        self.told
            .gates
            .iter()
            .map(String::as_str)
            .filter(move |name| !own(name))
    }

    /// Finds the first release on the way whose program doesn't list a name. What kprov sets there itself it takes, listed or
    /// not.
    fn missing(
        &self,
        family: &str,
        what: &str,
        name: &str,
        list: fn(&ProgramFacts) -> &Vec<String>,
        set_by_kprov: impl Fn(&Told) -> bool,
        findings: &mut Findings,
    ) {
        let program = &self.program.name;
        let knows = |facts: &ProgramFacts| list(facts).iter().any(|listed| listed == name);
        let missing = self.hops.iter().zip(self.later).find(|(hop, rendered)| {
            let facts = hop.manifest.programs.get(program);
            facts.is_some_and(|facts| !knows(facts)) && !rendered.get(program).is_some_and(&set_by_kprov)
        });
        let Some((hop, _)) = missing else { return };
        // Programs hide flags that they call deprecated, and gates that can't be changed any more, and take them all the same.
        // What today's version hides already says nothing new by being missing from a later list.
        let hidden = self.facts.is_some_and(|facts| !knows(facts));
        let message = if hidden {
            format!(
                "{what} of {program} is deprecated or fixed already, and {} may not take it any more",
                hop.release
            )
        } else {
            format!(
                "{what} of {program} is not known to {}, or deprecated or fixed there",
                hop.release
            )
        };
        let minor = hop.release.version.minor();
        findings.add(
            !hidden,
            format!("{family}/{program}/{name}"),
            message,
            format!(
                "take it out of the template in kube-system; or override this if the changelog of {minor} says that it is \
                 still taken"
            ),
        );
    }

    fn plugins(&self, flag: &str, findings: &mut Findings) {
        let values = self.told.flags.get(flag).into_iter().flatten();
        let named: BTreeSet<&str> = values.flat_map(|value| value.split(',')).map(str::trim).collect();
        for (plugin, removed) in REMOVED_PLUGINS.iter().filter(|(plugin, _)| named.contains(plugin)) {
            let hop = self
                .hops
                .iter()
                .find(|hop| hop.release.version.minor().minor >= *removed);
            let Some(hop) = hop else { continue };
            let program = &self.program.name;
            findings.block(
                format!("removed-admission-plugin/{program}/{flag}/{plugin}"),
                format!(
                    "`--{flag}` of {program} names `{plugin}`, which 1.{removed} does not have any more, and {} will not start \
                     with it",
                    hop.release
                ),
                format!("take it out of the template of {program} in kube-system, where kprov alone would not have it"),
            );
        }
    }

    /// Releases that don't tell what their program knows.
    fn untold(&self, flags: &[&str], gates: &[&str], findings: &mut Findings) {
        let program = &self.program.name;
        let hops = self.hops.iter().zip(self.later);
        let (untold, later): (Vec<_>, Vec<_>) = hops
            .filter(|(hop, _)| !hop.manifest.programs.contains_key(program))
            .unzip();
        // What kprov sets itself the program takes.
        let set = |set: &dyn Fn(&Told) -> bool| later.iter().all(|rendered| rendered.get(program).is_some_and(set));
        let flags = flags
            .iter()
            .filter(|name| !set(&|told| told.flags.contains_key(**name)));
        let gates = gates.iter().filter(|name| !set(&|told| told.gates.contains(**name)));
        let names: Vec<&str> = flags.chain(gates).copied().collect();
        if names.is_empty() {
            return;
        }
        let untold: Vec<String> = untold.iter().map(|hop| hop.release.to_string()).collect();
        findings.warn(
            format!("unchecked/flags/{program}"),
            format!(
                "{program} has been told by people: {}; whether it can still be is not known, since the releases {} don't say \
                 what theirs takes",
                names.join(", "),
                untold.join(", "),
            ),
            "look it up in the changelogs of these versions",
        );
    }
}

fn rendered(settings: &ControlPlaneSettings) -> Rendered {
    let mut rendered = Rendered::new();
    // What can't be rendered is refused elsewhere, before it comes to flags.
    for manifest in self_hosted(settings, FIRST_REVISION, None).unwrap_or_default() {
        let containers = manifest.object["spec"]["template"]["spec"]["containers"].as_array();
        for container in containers.into_iter().flatten() {
            let words = container["command"].as_array().into_iter().flatten();
            let words: Vec<String> = words.filter_map(|word| Some(word.as_str()?.to_owned())).collect();
            if let Some(name) = container["name"].as_str() {
                rendered.insert(name.to_owned(), told(&words));
            }
        }
    }
    rendered
}

/// What a command line says.
fn told(words: &[String]) -> Told {
    let mut told = Told::default();
    for word in words.iter().filter(|word| word.starts_with('-')) {
        let word = word.trim_start_matches('-');
        let (name, value) = word.split_once('=').unwrap_or((word, ""));
        // Kubernetes' programs take underscores for dashes.
        let name = name.replace('_', "-");
        if name == FEATURE_GATES {
            let gates = value.split(',').filter_map(|pair| pair.split_once('='));
            // Since 1.31 a component may stand before the gate: `kube:Name`.
            let names = gates.map(|(gate, _)| gate.rsplit(':').next().unwrap_or(gate).trim().to_owned());
            told.gates.extend(names.filter(|gate| !gate.is_empty()));
        }
        told.flags.entry(name).or_default().insert(value.to_owned());
    }
    told
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_command_lines() {
        let words = [
            "--a=1",
            "--a=2",
            "--b",
            "value",
            "-v=2",
            "--snake_case=x",
            "--feature-gates=A=true, kube:B=false,",
        ];
        let told = told(&words.map(str::to_owned));
        let names: Vec<&str> = told.flags.keys().map(String::as_str).collect();
        assert_eq!(names, ["a", "b", "feature-gates", "snake-case", "v"]);
        assert_eq!(told.flags["a"], ["1", "2"].map(str::to_owned).into());
        assert_eq!(told.gates, ["A", "B"].map(str::to_owned).into());
    }
}
