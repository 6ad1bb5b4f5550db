//! What upgrades are tested with: chains of payloads, and payloads that are broken on purpose.
//!
//! Where only Debian's Kubernetes 1.20.2 is at hand, later versions are *stamped*: copies of its programs in which the bytes of the
//! version are replaced by another version of equal length. They are one source that says it is several versions, good for
//! testing how a version is changed, and nothing else; their directories' names say so, `stamped-1.21.2-of-1.20.2`.

use std::fs;
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use camino::{Utf8Path, Utf8PathBuf};

use crate::cache;
use crate::payload::{self, BLOBS, BUILD, COMPONENTS, DEBIAN_KUBERNETES, Payload, Programs};
use crate::run::{output, run};

/// The versions that Debian's is stamped as: a patch release, and a minor.
const STAMPS: [&str; 2] = ["1.20.9", "1.21.2"];

/// Payloads to upgrade along, oldest version first.
pub(crate) type Chain = Vec<Payload>;

/// A payload with something wrong in it.
#[derive(Debug)]
pub(crate) struct Broken {
    /// What: one of [`PROGRAMS`], or `digest`.
    pub(crate) kind: &'static str,
    pub(crate) payload: Payload,
}

/// The chains that can be made of what there is: Debian's with its stamps, and each run of minors that follow on each other among
/// `releases`.
pub(crate) fn chains(programs: &Programs, debian: &Payload, releases: &[Payload]) -> Result<Vec<Chain>> {
    let mut stamped = vec![debian.clone()];
    for version in STAMPS {
        let name = format!("stamped-{version}-of-{DEBIAN_KUBERNETES}-{BUILD}");
        let binaries = stamp(version, &name)?;
        stamped.push(payload::from_binaries(
            programs,
            &name,
            version,
            &[&binaries],
            Some(debian),
        )?);
    }
    let mut chains = vec![stamped];
    chains.extend(runs(releases));
    Ok(chains)
}

/// Runs of at least two minors that follow on each other; of each minor the highest version.
fn runs(releases: &[Payload]) -> Vec<Chain> {
    let mut sorted = releases.to_vec();
    sorted.sort_by_key(Payload::numbers);
    let mut chains: Vec<Chain> = Vec::new();
    for payload in sorted {
        let minor = |p: &Payload| p.numbers().get(1).copied().unwrap_or_default();
        match chains.last_mut() {
            Some(chain) if chain.last().is_some_and(|last| minor(last) == minor(&payload)) => {
                chain.pop();
                chain.push(payload);
            }
            Some(chain) if chain.last().is_some_and(|last| minor(last) + 1 == minor(&payload)) => chain.push(payload),
            _ => chains.push(vec![payload]),
        }
    }
    chains.retain(|chain| chain.len() > 1);
    chains
}

/// Copies of Debian's programs that say they are another version, made once.
fn stamp(version: &str, name: &str) -> Result<Utf8PathBuf> {
    ensure!(
        version.len() == DEBIAN_KUBERNETES.len(),
        "a stamp must be as long as what it replaces"
    );
    let dir = cache::dir()?.join(name);
    if dir.exists() {
        return Ok(dir);
    }
    let original = payload::debian_kubernetes()?;
    let unfinished = cache::dir()?.join(format!("{name}.new"));
    payload::remove(&unfinished)?;
    fs::create_dir_all(&unfinished)?;
    fs::write(
        unfinished.join("README"),
        format!(
            "These programs are Kubernetes {DEBIAN_KUBERNETES} from Debian's sources. In each, the text `v{DEBIAN_KUBERNETES}` was replaced \
             by `v{version}`:\nthey only say that they are {version}. kprov's tests change versions with them; they are of no other use.\n"
        ),
    )?;
    // What follows must end the version, or `v1.20.20` would be changed as well.
    let (from, to) = (DEBIAN_KUBERNETES.replace('.', "[.]"), version);
    let script = format!("s/v{from}\\([^0-9]\\)/v{to}\\1/g");
    for component in COMPONENTS {
        let path = unfinished.join(component);
        fs::copy(original.join(component), &path)?;
        run(Command::new("sed").env("LC_ALL", "C").args(["-i", &script]).arg(&path))?;
        checked(&path, &original.join(component), component, version)?;
    }
    fs::rename(&unfinished, &dir)?;
    Ok(dir)
}

/// Makes sure that a stamped program still runs, and says what it should.
fn checked(path: &Utf8Path, original: &Utf8Path, component: &str, version: &str) -> Result<()> {
    ensure!(
        fs::metadata(path)?.len() == fs::metadata(original)?.len(),
        "`{path}` has another size than `{original}`"
    );
    let args: &[&str] = if component == "kubectl" {
        &["version", "--client"]
    } else {
        &["--version"]
    };
    let said = output(Command::new(path).args(args))?;
    ensure!(said.contains(&format!("v{version}")), "`{path}` says `{}`", said.trim());
    let help = output(Command::new(path).arg("--help"))?;
    ensure!(help.contains(component), "`{path} --help` says nothing of itself");
    Ok(())
}

/// What programs in broken payloads do when they are run, beside saying their version.
const PROGRAMS: [(&str, &str, &str); 3] = [
    // Ends at once, again and again.
    (
        "apiserver",
        "kube-apiserver",
        r#"fputs("this kube-apiserver is broken on purpose\n", stderr); return 1;"#,
    ),
    // Runs, and never answers.
    (
        "scheduler",
        "kube-scheduler",
        r#"fputs("this kube-scheduler never gets ready\n", stderr); for (;;) pause();"#,
    ),
    // Runs, and never reports.
    (
        "kubelet",
        "kubelet",
        r#"fputs("this kubelet never reports\n", stderr); for (;;) pause();"#,
    ),
];

/// Broken payloads of each chain's second version.
pub(crate) fn broken(programs: &Programs, chains: &[Chain]) -> Result<Vec<Broken>> {
    let mut all = Vec::new();
    for good in chains.iter().filter_map(|chain| chain.get(1)) {
        let Some(binaries) = &good.binaries else { continue };
        let name = good.dir.file_name().unwrap_or_default();
        for (kind, program, does) in PROGRAMS {
            let replaced = program_that(program, &good.version, does)?;
            let name = format!("broken/{kind}-{name}");
            let payload = payload::from_binaries(programs, &name, &good.version, &[&replaced, binaries], Some(good))?;
            all.push(Broken { kind, payload });
        }
        all.push(Broken {
            kind: "digest",
            payload: altered(good, &programs.payloads()?.join(format!("broken/digest-{name}")))?,
        });
    }
    Ok(all)
}

/// A directory with one program that says a version, and does `does` else.
fn program_that(name: &str, version: &str, does: &str) -> Result<Utf8PathBuf> {
    let dir = cache::dir()?.join(format!("broken-{name}-{version}"));
    fs::create_dir_all(&dir)?;
    let source = dir.join(format!("{name}.c"));
    // As process 1 of a container it would not be ended by SIGTERM without a handler.
    let text = format!(
        r#"#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
static void end(int signal) {{ (void)signal; _exit(0); }}
int main(int argc, char **argv)
{{
	for (int i = 1; i < argc; i++)
		if (!strcmp(argv[i], "--version"))
			return puts("Kubernetes v{version}") < 0;
		else if (!strcmp(argv[i], "--help"))
			return 2;
	signal(SIGTERM, end);
	{does}
}}
"#
    );
    if fs::read_to_string(&source).is_ok_and(|old| old == text) && dir.join(name).exists() {
        return Ok(dir);
    }
    fs::write(&source, text)?;
    run(Command::new("gcc")
        .args(["-static", "-O1", "-Wall", "-Werror", "-o"])
        .arg(dir.join(name))
        .arg(&source))?;
    Ok(dir)
}

/// A payload like `good`, whose kubelet was altered after it was signed.
fn altered(good: &Payload, dir: &Utf8Path) -> Result<Payload> {
    payload::remove(dir)?;
    if let Some(parent) = dir.parent() {
        fs::create_dir_all(parent)?;
    }
    // Links, but for what is altered.
    run(Command::new("cp").arg("-al").arg(&good.dir).arg(dir))?;
    let release: serde_json::Value = serde_json::from_slice(&fs::read(good.dir.join("release.json"))?)?;
    let files = release["hostFiles"].as_array().into_iter().flatten();
    let digest = files
        .filter(|file| file["name"] == "kubelet")
        .find_map(|file| file["digest"].as_str()?.strip_prefix("sha256:"))
        .with_context(|| format!("`{}` carries no kubelet", good.dir))?;
    let blob = dir.join(BLOBS).join(digest);
    let mut bytes = fs::read(&blob)?;
    let middle = bytes.len() / 2;
    let Some(byte) = bytes.get_mut(middle) else {
        bail!("`{blob}` is empty")
    };
    *byte ^= 1;
    fs::remove_file(&blob)?;
    fs::write(&blob, bytes)?;
    Ok(Payload {
        dir: dir.to_owned(),
        ..good.clone()
    })
}

/// `KPROV_TEST_UPGRADES`: `:` between chains, `,` between their payloads.
pub(crate) fn list_of_chains(chains: &[Chain]) -> String {
    let chain = |chain: &Chain| chain.iter().map(Payload::entry).collect::<Vec<_>>().join(",");
    chains.iter().map(chain).collect::<Vec<_>>().join(":")
}

/// `KPROV_TEST_BROKEN`: `kind=directory=key`, `:` between.
pub(crate) fn list_of_broken(broken: &[Broken]) -> String {
    let entries = broken.iter().map(|b| format!("{}={}", b.kind, b.payload.entry()));
    entries.collect::<Vec<_>>().join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn payload(version: &str) -> Payload {
        Payload {
            dir: version.into(),
            key: "k".into(),
            version: version.into(),
            binaries: None,
        }
    }

    #[test]
    fn chains_go_minor_by_minor() {
        let chains = |versions: &[&str]| {
            let releases: Vec<_> = versions.iter().map(|v| payload(v)).collect();
            list_of_chains(&runs(&releases))
        };
        assert_eq!(
            chains(&["1.36.3", "1.34.9", "1.35.6", "1.34.10"]),
            "1.34.10=k,1.35.6=k,1.36.3=k"
        );
        assert_eq!(
            chains(&["1.30.1", "1.31.0", "1.34.9", "1.36.3", "1.37.0-rc.1"]),
            "1.30.1=k,1.31.0=k:1.36.3=k,1.37.0-rc.1=k"
        );
        assert_eq!(chains(&["1.30.1", "1.36.3"]), "");
    }

    #[test]
    fn broken_ones_are_listed_with_what_is_wrong() {
        let broken = [("apiserver", "a"), ("digest", "b")].map(|(kind, version)| Broken {
            kind,
            payload: payload(version),
        });
        assert_eq!(list_of_broken(&broken), "apiserver=a=k:digest=b=k");
    }
}
