//! Makes a failing script short: only what is needed to fail in the same way is left. No single fault can be left out of the result.

use std::fmt::Write;

use kprov_types::api::UpdatePolicy;

use crate::invariants::Violation;
use crate::run::{Plant, run_planted, run_traced};
use crate::script::{Fault, Script};

/// A script that fails, as short as could be made, and how it fails.
#[derive(Clone, Debug)]
pub struct Shrunk {
    /// The script.
    pub script: Script,
    /// What does not hold.
    pub violation: Violation,
    plant: Plant,
}

/// Shortens a script that fails; `None` where it doesn't fail.
pub fn shrink(script: &Script, plant: Plant) -> Option<Shrunk> {
    let violation = run_planted(script, plant).violation?;
    let mut shrunk = Shrunk {
        script: script.clone(),
        violation,
        plant,
    };
    // Each shortening may make room for another; it ends, as each makes the script smaller.
    loop {
        let before = shrunk.script.clone();
        shrunk.drop_faults();
        shrunk.simplify();
        if shrunk.script == before {
            return Some(shrunk);
        }
    }
}

impl Shrunk {
    /// Takes another script if it fails in the same way.
    fn take(&mut self, script: Script) -> bool {
        match run_planted(&script, self.plant).violation {
            Some(violation) if violation.kind == self.violation.kind => {
                self.script = script;
                self.violation = violation;
                true
            }
            _ => false,
        }
    }

    /// Zeller and Hildebrandt's delta debugging, of the faults: leaves out ever smaller parts.
    fn drop_faults(&mut self) {
        let mut size = self.script.faults.len().div_ceil(2);
        while size > 0 && !self.script.faults.is_empty() {
            let mut at = 0;
            while at < self.script.faults.len() {
                let mut script = self.script.clone();
                let end = (at + size).min(script.faults.len());
                script.faults.drain(at..end);
                if !self.take(script) {
                    at += size;
                }
            }
            size /= 2;
        }
    }

    /// A simpler cluster, simpler releases.
    fn simplify(&mut self) {
        let edits: [fn(&mut Script); 8] = [
            |script| script.cluster.apps = 0,
            |script| script.cluster.workers = 0,
            |script| script.cluster.workers = script.cluster.workers.min(1),
            |script| script.cluster.workers = script.cluster.workers.min(2),
            |script| script.cluster.control_plane = 1,
            |script| script.cluster.pools = 1,
            |script| script.cluster.policy = UpdatePolicy::default(),
            |script| {
                for release in &mut script.releases {
                    release.etcd = 1;
                    release.addons = 1;
                }
            },
        ];
        for edit in edits {
            let mut script = self.script.clone();
            edit(&mut script);
            if script != self.script {
                self.take(script);
            }
        }
    }

    /// Everything that is needed to understand the failure and to repeat it.
    pub fn explain(&self) -> String {
        let mut text = String::new();
        let Script {
            seed,
            cluster,
            releases,
            wanted,
            faults,
        } = &self.script;
        let _ = writeln!(text, "{}\n", self.violation);
        let _ = writeln!(
            text,
            "seed {seed}: {} control-plane machines, {} workers, {} apps; {} to {}",
            cluster.control_plane, cluster.workers, cluster.apps, releases[0].version, releases[*wanted].version,
        );
        for release in releases.iter().filter(|release| release.defect.is_some()) {
            let _ = writeln!(text, "  {} is bad: {:?}", release.version, release.defect);
        }
        for fault in faults {
            match fault {
                Fault::At { ms, what } => {
                    let _ = writeln!(text, "  after {}.{:03} s: {what:?}", ms / 1000, ms % 1000);
                }
                fault => {
                    let _ = writeln!(text, "  {fault:?}");
                }
            }
        }
        let trace = run_traced(&self.script, self.plant).trace;
        let _ = writeln!(text, "\nthe end of what happened:");
        for (at, line) in trace.iter().skip(trace.len().saturating_sub(40)) {
            let _ = writeln!(text, "  {:>5}.{:03}  {line}", at / 1000, at % 1000);
        }
        let json = serde_json::to_string(&self.script).unwrap_or_default();
        let _ = writeln!(
            text,
            "\nagain, with all that happens:\n  cargo run -p kprov-sim -- script '{json}'"
        );
        text
    }
}
