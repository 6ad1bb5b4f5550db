//! Interfaces, addresses and routes of this host, by iproute2's `ip`.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::net::Ipv4Addr;
use std::process::{Command, Output, Stdio};

use ipnet::Ipv4Net;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::error::LocalError;

/// Runs a program of the host for what it prints.
pub(crate) fn ask(program: &'static str, arguments: &[&str]) -> Result<Output, LocalError> {
    run(program, arguments, "", Stdio::piped())
}

/// Runs a program of the host that changes something, with what it shall read on stdin.
///
/// It has the lock as its stdout, on which it prints nothing: should this process be killed, nobody else begins before
/// the program has come to its end.
pub(crate) fn change(program: &'static str, arguments: &[&str], input: &str, lock: &File) -> Result<(), LocalError> {
    let lock = lock
        .try_clone()
        .map_err(LocalError::io("share the lock with", program))?;
    run(program, arguments, input, lock.into()).map(drop)
}

fn run(program: &'static str, arguments: &[&str], input: &str, stdout: Stdio) -> Result<Output, LocalError> {
    let failed = |e: std::io::Error| match e.kind() {
        ErrorKind::NotFound => LocalError::MissingProgram { program },
        _ => LocalError::io("run", program)(e),
    };
    let mut child = Command::new(program)
        .args(arguments)
        .env("LC_ALL", "C")
        .env("PATH", search_path())
        .stdin(Stdio::piped())
        .stdout(stdout)
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    // Inputs are a few lines: they fit the pipe, so that nothing waits for the other. One that has ended says why below.
    if let Some(mut stdin) = child.stdin.take() {
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().map_err(failed)?;
    if output.status.success() {
        return Ok(output);
    }
    let mut command = format!("{program} {}", arguments.join(" "));
    if !input.is_empty() {
        command = format!("{command} <<< {}", input.trim_end().replace('\n', "; "));
    }
    Err(LocalError::Command {
        command,
        output: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    })
}

/// Where programs are looked for. A root shell opened by `su` may lack the directories that administrators' ones are in.
fn search_path() -> String {
    format!(
        "{}:/usr/sbin:/sbin:/usr/bin:/bin",
        std::env::var("PATH").unwrap_or_default()
    )
}

fn json<T: DeserializeOwned>(arguments: &[&str]) -> Result<Vec<T>, LocalError> {
    let output = ask("ip", arguments)?;
    // Some versions print nothing at all for an empty list.
    if output.stdout.trim_ascii().is_empty() {
        return Ok(Vec::new());
    }
    serde_json::from_slice(&output.stdout).map_err(|source| LocalError::Output {
        command: format!("ip {}", arguments.join(" ")),
        source,
    })
}

/// An interface with its addresses.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(crate) struct Link {
    #[serde(rename = "ifname")]
    pub(crate) name: String,
    #[serde(rename = "ifalias", default)]
    pub(crate) alias: String,
    #[serde(default)]
    master: Option<String>,
    #[serde(default)]
    flags: Vec<String>,
    #[serde(default, rename = "addr_info")]
    addresses: Vec<Address>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
struct Address {
    local: Option<Ipv4Addr>,
    #[serde(rename = "prefixlen")]
    prefix: u8,
}

impl Link {
    pub(crate) fn is_up(&self) -> bool {
        self.flags.iter().any(|f| f == "UP")
    }

    /// Whether it's up, as a port of that bridge.
    pub(crate) fn is_port_of(&self, bridge: &str) -> bool {
        self.master.as_deref() == Some(bridge) && self.is_up()
    }

    /// Its IPv4 addresses, with the prefix each of them has.
    pub(crate) fn addresses(&self) -> impl Iterator<Item = Ipv4Net> {
        self.addresses
            .iter()
            .filter_map(|a| Ipv4Net::new(a.local?, a.prefix).ok())
    }
}

/// A route.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(crate) struct Route {
    /// `default`, an address, or a range.
    pub(crate) dst: String,
    #[serde(default)]
    pub(crate) dev: Option<String>,
}

impl Route {
    pub(crate) fn is_default(&self) -> bool {
        self.dst == "default"
    }

    /// What it leads to, unless it is a default route.
    pub(crate) fn range(&self) -> Option<Ipv4Net> {
        self.dst
            .parse()
            .ok()
            .or_else(|| Ipv4Net::new(self.dst.parse().ok()?, 32).ok())
    }
}

/// All interfaces of this network namespace. (`-4` would leave out those without an address, and without `-details`
/// there is no alias.)
pub(crate) fn links() -> Result<Vec<Link>, LocalError> {
    // An IPv6 address does not parse as `Ipv4Addr`: it is left out before.
    let raw: Vec<serde_json::Value> = json(&["-json", "-details", "address", "show"])?;
    raw.into_iter()
        .map(|mut link| {
            if let Some(addresses) = link.get_mut("addr_info").and_then(|a| a.as_array_mut()) {
                addresses.retain(|a| a.get("family").is_some_and(|f| f == "inet"));
            }
            serde_json::from_value(link)
        })
        .collect::<Result<_, _>>()
        .map_err(|source| LocalError::Output {
            command: "ip -json -details address show".into(),
            source,
        })
}

/// The IPv4 routes of the main table.
pub(crate) fn routes() -> Result<Vec<Route>, LocalError> {
    json(&["-json", "-4", "route", "show"])
}

/// Runs commands of `ip`, one a line, up to the first that fails.
pub(crate) fn batch(commands: &[String], lock: &File) -> Result<(), LocalError> {
    let mut input = commands.join("\n");
    input.push('\n');
    change("ip", &["-batch", "-"], &input, lock)
}

/// Makes an interface a port of a bridge; one that is gone has nothing to join.
pub(crate) fn join(name: &str, bridge: &str, lock: &File) -> Result<(), LocalError> {
    if_there(name, &["link", "set", "dev", name, "master", bridge, "up"], lock)
}

/// Removes an interface; done already is success.
pub(crate) fn remove(name: &str, lock: &File) -> Result<(), LocalError> {
    if_there(name, &["link", "delete", "dev", name], lock)
}

/// Changes an interface that may go away meanwhile: the kernel takes a machine's along with its namespace, a while after
/// the machine has ended.
fn if_there(name: &str, arguments: &[&str], lock: &File) -> Result<(), LocalError> {
    match change("ip", arguments, "", lock) {
        Err(error) if links()?.iter().any(|l| l.name == name) => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routes_to_ranges_and_hosts() {
        let range = |dst: &str| {
            Route {
                dst: dst.into(),
                dev: None,
            }
            .range()
            .map(|r| r.to_string())
        };
        assert_eq!(range("10.0.0.0/8").as_deref(), Some("10.0.0.0/8"));
        assert_eq!(range("10.0.0.1").as_deref(), Some("10.0.0.1/32"));
        assert_eq!(range("default"), None);
    }

    #[test]
    fn this_host_has_a_loopback() {
        let lo = links().unwrap().into_iter().find(|l| l.name == "lo").unwrap();
        assert!(lo.is_up());
        assert!(lo.addresses().any(|a| a.to_string() == "127.0.0.1/8"));
        assert!(routes().unwrap().iter().all(|r| r.is_default() || r.range().is_some()));
    }

    #[test]
    fn failures_say_what_was_run() {
        let lock = tempfile::tempfile().unwrap();
        let error = batch(&["link set nothing-here up".into()], &lock)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("link set nothing-here up") && error.contains("nothing-here"),
            "{error}"
        );
        assert!(matches!(
            ask("kprov-no-such-program", &[]),
            Err(LocalError::MissingProgram { .. })
        ));
        let error = join("lo", "kprov-none", &lock).unwrap_err().to_string();
        assert!(error.contains("kprov-none"), "{error}");
    }

    #[test]
    fn what_is_gone_is_neither_joined_nor_removed() {
        let lock = tempfile::tempfile().unwrap();
        join("kprov-none", "lo", &lock).unwrap();
        remove("kprov-none", &lock).unwrap();
    }
}
