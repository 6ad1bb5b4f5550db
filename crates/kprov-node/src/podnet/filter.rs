//! Packet filter rules: masquerading, and letting forwarded pod traffic through. By iptables, or by nft where there is no
//! iptables.

use std::fmt::Write as _;
use std::io;
use std::process::Stdio;

use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use super::desired::Masquerade;

const MASQUERADE_CHAIN: &str = "KPROV-MASQ";
const FORWARD_CHAIN: &str = "KPROV-FORWARD";
const COMMENT: &str = "kprov pod network";
const MULTICAST: &str = "224.0.0.0/4";

/// Why packet filter rules could not be set.
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    /// There is neither iptables nor nft.
    #[error("there is neither `iptables` nor `nft` on this machine")]
    NoProgram,
    /// A program could not be run.
    #[error("cannot run `{program}`")]
    Run {
        /// The program.
        program: String,
        /// Why.
        source: io::Error,
    },
    /// A program failed.
    #[error("`{program}` failed: {message}")]
    Failed {
        /// The program with its arguments.
        program: String,
        /// What it printed.
        message: String,
    },
}

/// Makes the rules what they should be. Rules of others are not touched.
pub(super) async fn ensure(masquerade: &Masquerade) -> Result<(), FilterError> {
    match ensure_by_iptables(masquerade).await {
        Err(FilterError::Run { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
        other => return other,
    }
    match run("nft", &["-f", "-"], &nft_script(masquerade)).await {
        Err(FilterError::Run { source, .. }) if source.kind() == io::ErrorKind::NotFound => Err(FilterError::NoProgram),
        other => other,
    }
}

async fn ensure_by_iptables(masquerade: &Masquerade) -> Result<(), FilterError> {
    run("iptables-restore", &["-w", "--noflush"], &iptables_rules(masquerade)).await?;
    let pods = masquerade.pods.to_string();
    ensure_rule(
        "nat",
        "POSTROUTING",
        &[
            "-s",
            &pods,
            "-m",
            "comment",
            "--comment",
            COMMENT,
            "-j",
            MASQUERADE_CHAIN,
        ],
    )
    .await?;
    ensure_rule(
        "filter",
        "FORWARD",
        &["-m", "comment", "--comment", COMMENT, "-j", FORWARD_CHAIN],
    )
    .await
}

async fn ensure_rule(table: &str, chain: &str, rule: &[&str]) -> Result<(), FilterError> {
    let arguments = |verb| [&["-w", "-t", table, verb, chain], rule].concat();
    if run("iptables", &arguments("-C"), "").await.is_ok() {
        return Ok(());
    }
    run("iptables", &arguments("-A"), "").await
}

/// Input of `iptables-restore --noflush`: naming a chain replaces its rules, all in one transaction.
fn iptables_rules(masquerade: &Masquerade) -> String {
    let Masquerade { pods, machines } = masquerade;
    let mut rules = format!("*nat\n:{MASQUERADE_CHAIN} - [0:0]\n");
    let spared = [pods.to_string(), MULTICAST.to_owned()]
        .into_iter()
        .chain(machines.iter().map(ToString::to_string));
    for destination in spared {
        let _ = writeln!(rules, "-A {MASQUERADE_CHAIN} -d {destination} -j RETURN");
    }
    let _ = writeln!(rules, "-A {MASQUERADE_CHAIN} -j MASQUERADE --random-fully\nCOMMIT");
    let _ = writeln!(rules, "*filter\n:{FORWARD_CHAIN} - [0:0]");
    let _ = writeln!(
        rules,
        "-A {FORWARD_CHAIN} -s {pods} -j ACCEPT\n-A {FORWARD_CHAIN} -d {pods} -j ACCEPT\nCOMMIT"
    );
    rules
}

/// Input of `nft -f`: one table, replaced in one transaction.
///
/// An accept in a table of one's own doesn't overrule a drop in another: a host that drops forwarded packets by nft rules of
/// its own has to let pods through there.
fn nft_script(masquerade: &Masquerade) -> String {
    let Masquerade { pods, machines } = masquerade;
    let machines: Vec<_> = machines.iter().map(ToString::to_string).collect();
    let spared = machines.join(", ");
    format!(
        "add table ip kprov
delete table ip kprov
table ip kprov {{
  chain postrouting {{
    type nat hook postrouting priority 100;
    ip saddr {pods} ip daddr != {{ {pods}, {MULTICAST}, {spared} }} masquerade fully-random
  }}
}}
"
    )
}

async fn run(program: &str, arguments: &[&str], input: &str) -> Result<(), FilterError> {
    let cannot = |source| FilterError::Run {
        program: program.to_owned(),
        source,
    };
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(cannot)?;
    if let Some(mut stdin) = child.stdin.take() {
        // One that ends before it has read everything says why on stderr.
        let _ = stdin.write_all(input.as_bytes()).await;
    }
    let output = child.wait_with_output().await.map_err(cannot)?;
    if output.status.success() {
        return Ok(());
    }
    let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(FilterError::Failed {
        program: format!("{program} {}", arguments.join(" ")),
        message,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn masquerade() -> Masquerade {
        Masquerade {
            pods: "10.244.0.0/16".parse().unwrap(),
            machines: ["10.0.0.2", "10.0.0.1"].map(|a| a.parse().unwrap()).into(),
        }
    }

    #[test]
    fn iptables_input() {
        let expected = "\
*nat
:KPROV-MASQ - [0:0]
-A KPROV-MASQ -d 10.244.0.0/16 -j RETURN
-A KPROV-MASQ -d 224.0.0.0/4 -j RETURN
-A KPROV-MASQ -d 10.0.0.1 -j RETURN
-A KPROV-MASQ -d 10.0.0.2 -j RETURN
-A KPROV-MASQ -j MASQUERADE --random-fully
COMMIT
*filter
:KPROV-FORWARD - [0:0]
-A KPROV-FORWARD -s 10.244.0.0/16 -j ACCEPT
-A KPROV-FORWARD -d 10.244.0.0/16 -j ACCEPT
COMMIT
";
        assert_eq!(iptables_rules(&masquerade()), expected);
    }

    #[test]
    fn nft_input() {
        let script = nft_script(&masquerade());
        assert!(
            script.starts_with("add table ip kprov\ndelete table ip kprov\n"),
            "replaces what was there: {script}"
        );
        let rule = "ip saddr 10.244.0.0/16 ip daddr != { 10.244.0.0/16, 224.0.0.0/4, 10.0.0.1, 10.0.0.2 } masquerade fully-random";
        assert!(script.contains(rule), "{script}");
    }
}
