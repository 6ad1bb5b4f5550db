//! The way out: where this host has a default route, machines reach what it reaches, behind its address.
//!
//! A convenience that nothing depends on: where the host has no iptables, or refuses, machines have no way out and a
//! warning says so. All rules carry the cluster's tag as their comment, and are found again by it.

use std::fs::{self, File};

use ipnet::Ipv4Net;
use kprov_types::ClusterName;

use crate::error::LocalError;
use crate::{link, naming, state};

const FORWARD: &str = "/proc/sys/net/ipv4/ip_forward";
/// Where the value that kprov found is kept until it is put back.
const FORWARD_WAS: &str = "ip_forward";

/// A rule: its table, and what follows `-A`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rule {
    table: &'static str,
    words: Vec<String>,
}

impl std::fmt::Display for Rule {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "-t {} -A {}", self.table, self.words.join(" "))
    }
}

impl Rule {
    fn new(table: &'static str, text: &str) -> Self {
        Self {
            table,
            words: text.split_whitespace().map(str::to_owned).collect(),
        }
    }

    fn iptables(&self, command: &str, lock: &File) -> Result<(), LocalError> {
        let mut arguments = vec!["-w", "-t", self.table, command];
        arguments.extend(self.words.iter().map(String::as_str));
        link::change("iptables", &arguments, "", lock)
    }
}

/// What a cluster's network needs: its machines' packets are let through, and leave under this host's address.
fn wanted(cluster: &ClusterName, range: Ipv4Net, bridge: &str) -> Vec<Rule> {
    let tag = format!("-m comment --comment {}", naming::cluster_tag(cluster));
    vec![
        Rule::new(
            "nat",
            &format!("POSTROUTING -s {range} ! -o {bridge} {tag} -j MASQUERADE"),
        ),
        Rule::new("filter", &format!("FORWARD -i {bridge} {tag} -j ACCEPT")),
        Rule::new("filter", &format!("FORWARD -o {bridge} {tag} -j ACCEPT")),
    ]
}

/// The cluster's rules in the output of `iptables -S`.
fn parse(table: &'static str, text: &str, cluster: &ClusterName) -> Vec<Rule> {
    let tag = naming::cluster_tag(cluster);
    text.lines()
        .filter_map(|line| {
            let words: Vec<String> = line
                .strip_prefix("-A ")?
                .split_whitespace()
                .map(|w| w.trim_matches('"').to_owned())
                .collect();
            let comment = words.iter().position(|w| w == "--comment")?;
            (words.get(comment + 1) == Some(&tag)).then_some(Rule { table, words })
        })
        .collect()
}

/// The rules of this host that are the cluster's.
pub(crate) fn rules(cluster: &ClusterName) -> Result<Vec<Rule>, LocalError> {
    let mut all = Vec::new();
    for table in ["nat", "filter"] {
        match link::ask("iptables", &["-w", "-t", table, "-S"]) {
            Ok(output) => all.extend(parse(table, &String::from_utf8_lossy(&output.stdout), cluster)),
            // No iptables, or a kernel without this table: no rules.
            Err(LocalError::MissingProgram { .. } | LocalError::Command { .. }) => {}
            Err(other) => return Err(other),
        }
    }
    Ok(all)
}

/// Ensures the way out, as far as this host allows it. The host's lock must be held.
pub(crate) fn ensure(cluster: &ClusterName, range: Ipv4Net, lock: &File) {
    let attempt = || -> Result<(), LocalError> {
        let has_way_out = link::routes()?.iter().any(link::Route::is_default);
        // With this on, even packets between two machines on one bridge pass the host's firewall.
        let filtered =
            fs::read_to_string("/proc/sys/net/bridge/bridge-nf-call-iptables").is_ok_and(|v| v.trim() == "1");
        if !has_way_out && !filtered {
            return Ok(());
        }
        for rule in wanted(cluster, range, &naming::bridge(cluster)) {
            if rule.iptables("-C", lock).is_err() {
                rule.iptables("-A", lock)?;
            }
        }
        if has_way_out
            && fs::read_to_string(FORWARD)
                .map_err(LocalError::io("read", FORWARD))?
                .trim()
                == "0"
        {
            state::write_file(&state::host_file(FORWARD_WAS), b"0", 0o600)?;
            fs::write(FORWARD, "1").map_err(LocalError::io("write", FORWARD))?;
        }
        Ok(())
    };
    match attempt() {
        Ok(()) => {}
        Err(LocalError::MissingProgram { program }) => {
            tracing::info!("`{program}` is not installed: the machines reach each other and this host, nothing beyond");
        }
        Err(error) => tracing::warn!("the machines have no way beyond this host: {error}"),
    }
}

/// Removes the cluster's rules; done already is success.
pub(crate) fn remove(cluster: &ClusterName, lock: &File) -> Result<(), LocalError> {
    rules(cluster)?.iter().try_for_each(|rule| rule.iptables("-D", lock))
}

/// Puts forwarding back as kprov found it, if it was kprov that changed it. For when no cluster is left on the host, with
/// the host's lock held.
pub(crate) fn put_forwarding_back() -> Result<(), LocalError> {
    let was = state::host_file(FORWARD_WAS);
    if was.exists() {
        fs::write(FORWARD, "0").map_err(LocalError::io("write", FORWARD))?;
        state::remove_file(&was)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_its_own_rules_only() {
        let text = "-P POSTROUTING ACCEPT\n\
            -A POSTROUTING -s 10.89.0.0/24 ! -o kp-1 -m comment --comment \"kprov:demo\" -j MASQUERADE\n\
            -A POSTROUTING -s 10.89.1.0/24 ! -o kp-2 -m comment --comment \"kprov:demo-2\" -j MASQUERADE\n\
            -A POSTROUTING -s 10.89.2.0/24 -m comment --comment \"not kprov:demo\" -j MASQUERADE\n";
        let demo = ClusterName::new("demo").unwrap();
        let found = parse("nat", text, &demo);
        assert_eq!(found, wanted(&demo, "10.89.0.0/24".parse().unwrap(), "kp-1")[..1]);
    }
}
