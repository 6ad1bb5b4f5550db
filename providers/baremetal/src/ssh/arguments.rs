//! What `ssh` is called with. Pure.

use camino::Utf8Path;

use crate::inventory::Ssh;

/// Options that hold for every connection, a jump host's too. They come first, as `ssh` takes the first of each: nothing in
/// an inventory weakens the check of host keys.
const ALWAYS: &[&str] = &[
    "BatchMode=yes",
    "StrictHostKeyChecking=yes",
    "ConnectTimeout=10",
    "ServerAliveInterval=5",
    "ServerAliveCountMax=3",
];

/// The files that one connection uses.
#[derive(Clone, Copy, Debug)]
pub(super) struct Places<'a> {
    /// Where masters' sockets are.
    pub(super) control: &'a Utf8Path,
    /// The `known_hosts` file with the pinned key, if one is pinned.
    pub(super) pinned: Option<&'a Utf8Path>,
}

/// All arguments but the command.
pub(super) fn arguments(ssh: &Ssh, places: Places<'_>) -> Vec<String> {
    let mut all: Vec<String> = vec!["-T".into(), "-x".into(), "-a".into()];
    let mut option = |text: &str| all.extend(["-o".to_owned(), text.to_owned()]);
    for text in ALWAYS {
        option(text);
    }
    option("UpdateHostKeys=no");
    option("ControlMaster=auto");
    option("ControlPersist=60");
    option(&format!("ControlPath={}/%C", places.control));
    if let Some(pinned) = places.pinned {
        option(&format!("UserKnownHostsFile={pinned}"));
        option("GlobalKnownHostsFile=none");
        option(&format!("HostKeyAlias={PINNED_NAME}"));
    }
    if let Some(key) = &ssh.key {
        option(&format!("IdentityFile={}", quoted(key)));
        option("IdentitiesOnly=yes");
    }
    if let Some((last, before)) = ssh.jump.split_last() {
        option(&format!("ProxyCommand={}", proxy(ssh, before, last)));
    }
    if let Some(port) = ssh.port {
        option(&format!("Port={port}"));
    }
    if let Some(user) = &ssh.user {
        option(&format!("User={user}"));
    }
    all.extend(ssh.args.iter().cloned());
    all.extend(["--".into(), ssh.host.clone()]);
    all
}

/// The name that a pinned key stands under.
pub(super) const PINNED_NAME: &str = "kprov-pinned";

/// A `known_hosts` file with one pinned key.
pub(super) fn pinned_line(key: &str) -> String {
    format!("{PINNED_NAME} {}\n", key.trim())
}

/// The command that connects through jump hosts. `ssh -J` would do, but passes on none of the options above.
fn proxy(ssh: &Ssh, before: &[String], last: &str) -> String {
    let mut words: Vec<String> = vec!["ssh".into()];
    for text in ALWAYS {
        words.extend(["-o".into(), (*text).to_owned()]);
    }
    for text in known_hosts_options(&ssh.args) {
        words.extend(["-o".into(), text]);
    }
    if let Some(key) = &ssh.key {
        words.extend(["-o".into(), format!("IdentityFile={}", quoted(key))]);
    }
    if !before.is_empty() {
        words.extend(["-J".into(), before.join(",")]);
    }
    let (host, port) = match last.rsplit_once(':') {
        Some((host, port)) if port.parse::<u16>().is_ok() && !host.ends_with(':') => (host, Some(port)),
        _ => (last, None),
    };
    if let Some(port) = port {
        words.extend(["-p".into(), port.to_owned()]);
    }
    let words: Vec<String> = words
        .iter()
        .map(|word| super::quote(&word.replace('%', "%%")))
        .collect();
    format!(
        "{} -W '[%h]:%p' -- {}",
        words.join(" "),
        super::quote(&host.replace('%', "%%"))
    )
}

/// Where keys of hosts are known from, as further arguments have it: holds for jump hosts too.
fn known_hosts_options(args: &[String]) -> Vec<String> {
    let mut found = Vec::new();
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let option = match arg.strip_prefix("-o") {
            Some("") => args.next().map(String::as_str),
            other => other,
        };
        let known = |option: &&str| {
            let lower = option.to_lowercase();
            lower.starts_with("userknownhostsfile") || lower.starts_with("globalknownhostsfile")
        };
        found.extend(option.filter(known).map(str::to_owned));
    }
    found
}

/// A path as an option's value: quotes keep spaces together (`ssh_config(5)`).
fn quoted(path: &str) -> String {
    if path.contains(' ') {
        format!("\"{path}\"")
    } else {
        path.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ssh() -> Ssh {
        Ssh {
            host: "10.0.0.7".into(),
            port: Some(2222),
            user: Some("admin".into()),
            key: Some("/keys/id".into()),
            host_key: None,
            jump: Vec::new(),
            args: vec![
                "-o".into(),
                "StrictHostKeyChecking=no".into(),
                "-oUserKnownHostsFile=/known".into(),
            ],
            sudo: true,
        }
    }

    fn places(pinned: Option<&'static str>) -> Places<'static> {
        Places {
            control: Utf8Path::new("/c"),
            pinned: pinned.map(Utf8Path::new),
        }
    }

    #[test]
    fn an_inventory_cannot_weaken_the_check_of_host_keys() {
        let all = arguments(&ssh(), places(None));
        let first = all.iter().find(|arg| arg.starts_with("StrictHostKeyChecking")).unwrap();
        assert_eq!(first, "StrictHostKeyChecking=yes");
        assert_eq!(all[all.len() - 2..], ["--", "10.0.0.7"]);
        for expected in ["Port=2222", "User=admin", "IdentityFile=/keys/id", "BatchMode=yes"] {
            assert!(all.iter().any(|arg| arg == expected), "{expected}: {all:?}");
        }
    }

    #[test]
    fn a_pinned_key_is_the_only_one() {
        let all = arguments(&ssh(), places(Some("/pinned")));
        let first = all.iter().find(|arg| arg.contains("UserKnownHostsFile")).unwrap();
        assert_eq!(first, "UserKnownHostsFile=/pinned");
        assert!(all.iter().any(|arg| arg == "GlobalKnownHostsFile=none"));
        assert_eq!(pinned_line(" ssh-ed25519 AAAA\n"), "kprov-pinned ssh-ed25519 AAAA\n");
    }

    #[test]
    fn jump_hosts_are_checked_like_all_others() {
        let ssh = Ssh {
            jump: vec!["first".into(), "me@second:2200".into()],
            ..ssh()
        };
        let all = arguments(&ssh, places(None));
        let proxy = all.iter().find_map(|arg| arg.strip_prefix("ProxyCommand=")).unwrap();
        for part in [
            "'StrictHostKeyChecking=yes'",
            "'BatchMode=yes'",
            "'UserKnownHostsFile=/known'",
            "'-J' 'first'",
            "'-p' '2200'",
            "-W '[%h]:%p' -- 'me@second'",
        ] {
            assert!(proxy.contains(part), "{part}: {proxy}");
        }
    }
}
