//! What programs can be told: flags and feature gates out of their `--help`.
//!
//! What a program takes but hides is not there: flags that its version calls deprecated, and gates that are locked (Kubernetes
//! lists alpha and beta ones only). So a missing name is a reason to look closer, a listed one is certain.

use camino::Utf8Path;
use kprov_types::release::ProgramFacts;

use crate::program;

/// The programs that are asked.
pub(crate) const ASKED: [&str; 6] = [
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kube-proxy",
    "kubelet",
    "etcd",
];

/// How deep a flag may be indented; texts that explain flags are indented deeper.
const DEEPEST: usize = 8;

/// Asks a program; `None` where it can't be run, or lists no flags.
pub(crate) fn ask(path: &Utf8Path, name: &str) -> Option<ProgramFacts> {
    let (_, help) = program::output(path, name, &["--help"], program::LIMIT)
        .inspect_err(|error| tracing::debug!(%path, %error, "cannot be asked for its flags"))
        .ok()?;
    let facts = parse(&help);
    (!facts.flags.is_empty()).then_some(facts)
}

/// Reads what `--help` prints, as Kubernetes' programs (cobra's form) and etcd do.
fn parse(help: &str) -> ProgramFacts {
    let mut facts = ProgramFacts {
        flags: help.lines().filter_map(flag).map(str::to_owned).collect(),
        feature_gates: help.split_whitespace().filter_map(gate).map(str::to_owned).collect(),
    };
    for names in [&mut facts.flags, &mut facts.feature_gates] {
        names.sort();
        names.dedup();
    }
    facts
}

/// The flag that a line begins with: `      --name type   text`, `  -v, --v Level   text`, `  --name 'default'`.
fn flag(line: &str) -> Option<&str> {
    let text = line.trim_start_matches(' ');
    let indent = line.len() - text.len();
    if indent == 0 || indent > DEEPEST {
        return None;
    }
    // The short form before it.
    let text = match text.split_once(", ") {
        Some((short, long)) if short.len() == 2 && short.starts_with('-') => long,
        _ => text,
    };
    let rest = text.strip_prefix("--")?;
    let end = rest.find(|c: char| !is_name(c)).unwrap_or(rest.len());
    let ends_there = rest[end..].chars().next().is_none_or(|c| c.is_whitespace() || c == '=');
    (end > 0 && ends_there).then_some(&rest[..end])
}

/// The gate in a word of a list of gates: `Name=true|false`, since 1.31 with the component `kube:` before it in some programs.
fn gate(word: &str) -> Option<&str> {
    let name = word.strip_suffix("=true|false")?;
    let name = name.strip_prefix("kube:").unwrap_or(name);
    let is_gate = name.starts_with(|c: char| c.is_ascii_uppercase()) && name.chars().all(is_name);
    is_gate.then_some(name)
}

fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn help_of_kubernetes_and_etcd() {
        let old = "The Kubernetes API server validates --nothing here.\n\nGeneric flags:\n\n      \
            --advertise-address ip   The IP address. See --bind-address.\n      \
            --feature-gates mapStringBool   A set of key=value pairs. Options are:\n                    \
            APIListChunking=true|false (BETA - default=true)\n                    \
            AllAlpha=true|false (ALPHA - default=false)\n                    \
            --port is explained here\n  -h, --help   help for kube-apiserver\n  \
            -v, --v Level   number for the log level verbosity\n      --version version[=true]   Print version\n";
        let facts = parse(old);
        assert_eq!(
            facts.flags,
            ["advertise-address", "feature-gates", "help", "v", "version"]
        );
        assert_eq!(facts.feature_gates, ["APIListChunking", "AllAlpha"]);

        let new = "      --feature-gates colonSeparatedMultimapStringString   For example: \
            --feature-gates 'wardle:featureA=true'. Options are: kube:APIServerIdentity=true|false (BETA)\n        \
            kube:APIServerIdentity=true|false (BETA)\n        kube:AllBeta=true|false\n        foo:Bar=true|false\n";
        assert_eq!(parse(new).feature_gates, ["APIServerIdentity", "AllBeta"]);

        let etcd = "Usage:\n\n  etcd --version\n    Show the version of etcd.\n\nMember:\n  --name 'default'\n    \
            Human-readable name.\n  --wal-dir ''\n    Path to the dedicated wal directory.\n  --force-new-cluster 'false'\n";
        assert_eq!(parse(etcd).flags, ["force-new-cluster", "name", "wal-dir"]);
        assert_eq!(parse("unknown command --help\n--x\n"), ProgramFacts::default());
    }

    /// Kubernetes' own programs: those of the directory `KPROV_TEST_BINARIES`, and of each below `KPROV_TEST_RELEASES`.
    #[test]
    fn help_of_real_programs() {
        let named = |variable| std::env::var_os(variable).map(std::path::PathBuf::from);
        let below = named("KPROV_TEST_RELEASES").map(|dir| std::fs::read_dir(dir).unwrap());
        let below = below.into_iter().flatten().map(|entry| entry.unwrap().path());
        let dirs: Vec<_> = named("KPROV_TEST_BINARIES")
            .into_iter()
            .chain(below)
            .filter(|dir| dir.join("kube-apiserver").is_file())
            .collect();
        if dirs.is_empty() {
            assert!(std::env::var("CI").as_deref() != Ok("true"), "no binaries");
            eprintln!("SKIPPED: no binaries; set KPROV_TEST_BINARIES or KPROV_TEST_RELEASES");
        }
        let known: [(&str, usize, &[&str]); 6] = [
            (
                "kube-apiserver",
                150,
                &[
                    "etcd-servers",
                    "advertise-address",
                    "admission-control-config-file",
                    "v",
                    "help",
                ],
            ),
            (
                "kube-controller-manager",
                130,
                &["leader-elect", "cluster-signing-key-file"],
            ),
            ("kube-scheduler", 50, &["config", "authorization-kubeconfig"]),
            ("kube-proxy", 50, &["config", "hostname-override"]),
            ("kubelet", 140, &["config", "bootstrap-kubeconfig", "node-labels"]),
            ("etcd", 80, &["data-dir", "initial-cluster", "force-new-cluster"]),
        ];
        for dir in dirs {
            let dir = Utf8Path::from_path(&dir).unwrap();
            for (name, least, flags) in known {
                let path = dir.join(name);
                if !path.is_file() && name == "etcd" {
                    continue;
                }
                let facts = ask(&path, name).unwrap();
                assert!(facts.flags.len() >= least, "{path}: {:?}", facts.flags);
                for flag in flags {
                    assert!(
                        facts.flags.iter().any(|f| f == flag),
                        "{path}: {flag} not in {:?}",
                        facts.flags
                    );
                }
                if name != "etcd" {
                    assert!(facts.feature_gates.len() > 80, "{path}: {:?}", facts.feature_gates);
                    assert!(facts.feature_gates.iter().any(|g| g == "AllAlpha"), "{path}");
                }
            }
        }
    }
}
