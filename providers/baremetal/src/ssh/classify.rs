//! From what `ssh` printed to what is wrong. Pure.

use crate::error::Trouble;
use crate::inventory::Ssh;

/// What `ssh` exits with when the failure is its own (ssh(1), EXIT STATUS).
pub(super) const SSH_FAILED: i32 = 255;

/// What is wrong when `ssh` itself failed.
pub(super) fn connection(ssh: &Ssh, stderr: &str) -> Trouble {
    let address = match ssh.port {
        Some(port) if port != 22 => format!("-p {port} {}", ssh.host),
        _ => ssh.host.clone(),
    };
    let last = last_line(stderr);
    let has = |text: &str| stderr.contains(text);
    if has("REMOTE HOST IDENTIFICATION HAS CHANGED") {
        let pinned = ssh.host_key.is_some();
        let address = match ssh.port {
            Some(port) if port != 22 => format!("[{}]:{port}", ssh.host),
            _ => ssh.host.clone(),
        };
        return Trouble::HostKeyChanged { address, pinned };
    }
    if has("Host key verification failed") || has("host key is known for") {
        // With a pinned key, one of another type is another key.
        return match ssh.host_key {
            Some(_) => Trouble::HostKeyChanged { address, pinned: true },
            None => Trouble::HostKeyUnknown { address },
        };
    }
    if has("Permission denied") || has("Too many authentication failures") || has("no mutual signature") {
        let user = ssh.user.clone().unwrap_or_else(|| "the default user".into());
        return Trouble::Login { user, message: last };
    }
    // sshd's MaxStartups ends a connection before it has said a word (sshd_config(5)).
    let before_a_word = [
        "kex_exchange_identification",
        "ssh_exchange_identification",
        "Exceeded MaxStartups",
    ];
    if before_a_word.iter().any(|text| has(text)) && !has("Could not resolve") && !has("Connection refused") {
        return Trouble::Busy(last);
    }
    Trouble::Unreachable(last)
}

/// Whether there was no connection at all, as opposed to one that broke.
pub(super) fn never_connected(stderr: &str) -> bool {
    ["connect to host", "Could not resolve", "timed out"]
        .iter()
        .any(|text| stderr.contains(text))
}

/// What is wrong when the remote side failed before kprov's script could say anything.
pub(super) fn remote(step: &str, code: Option<i32>, stderr: &str) -> Trouble {
    let message = last_line(stderr);
    let of_sudo = stderr
        .lines()
        .rev()
        .find(|line| line.starts_with("sudo:") || line.contains("sudo: not found"));
    if let Some(line) = of_sudo {
        return Trouble::Sudo(line.trim().to_owned());
    }
    if stderr.contains("exec: sudo") || message.contains("is not in the sudoers file") {
        return Trouble::Sudo(message);
    }
    let message = match (message.is_empty(), code) {
        (false, _) => message,
        (true, Some(code)) => format!("it ended with {code} and said nothing"),
        (true, None) => "it was killed".into(),
    };
    Trouble::Failed {
        step: step.to_owned(),
        message,
    }
}

/// The last line that says something.
pub(super) fn last_line(text: &str) -> String {
    let dull =
        |line: &&str| !line.is_empty() && !line.starts_with("Connection to ") && !line.starts_with("Shared connection");
    let line = text.lines().map(str::trim).rev().find(dull).unwrap_or_default();
    line.trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ssh(host_key: Option<&str>) -> Ssh {
        Ssh {
            host: "h".into(),
            port: Some(2022),
            user: Some("admin".into()),
            key: None,
            host_key: host_key.map(str::to_owned),
            jump: Vec::new(),
            args: Vec::new(),
            sudo: true,
        }
    }

    #[test]
    fn what_ssh_says_is_told_apart() {
        type Is = fn(&Trouble) -> bool;
        let cases: &[(&str, Is)] = &[
            (
                "ssh: connect to host h port 22: Connection refused",
                |t| matches!(t, Trouble::Unreachable(m) if m.contains("refused")),
            ),
            ("ssh: connect to host h port 22: Connection timed out\r\n", |t| {
                matches!(t, Trouble::Unreachable(_))
            }),
            ("ssh: Could not resolve hostname h: Name or service not known\n", |t| {
                matches!(t, Trouble::Unreachable(_))
            }),
            (
                "No ED25519 host key is known for [h]:2022 and you have requested strict checking.\r\nHost key verification failed.\r\n",
                |t| matches!(t, Trouble::HostKeyUnknown { address } if address == "-p 2022 h"),
            ),
            (
                "@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @\nHost key verification failed.\n",
                |t| matches!(t, Trouble::HostKeyChanged { address, pinned: false } if address == "[h]:2022"),
            ),
            (
                "admin@h: Permission denied (publickey).\n",
                |t| matches!(t, Trouble::Login { user, .. } if user == "admin"),
            ),
            (
                "kex_exchange_identification: read: Connection reset by peer\nConnection reset by 10.0.0.1 port 22\n",
                |t| matches!(t, Trouble::Busy(_)),
            ),
        ];
        for (text, is) in cases {
            let trouble = connection(&ssh(None), text);
            assert!(is(&trouble), "{text}: {trouble:?}");
        }
        let other = "No RSA host key is known for kprov-pinned and you have requested strict checking.\nHost key verification failed.\n";
        assert!(matches!(
            connection(&ssh(Some("ssh-ed25519 A")), other),
            Trouble::HostKeyChanged { pinned: true, .. }
        ));
    }

    #[test]
    fn sudo_is_told_from_other_failures() {
        let sudo = |text| matches!(remote("facts", Some(1), text), Trouble::Sudo(_));
        assert!(sudo("sudo: a password is required\n"));
        assert!(sudo("/bin/sh: 1: exec: sudo: not found\n"));
        assert!(!sudo("cannot create /etc/x: Read-only file system\n"));
        assert_eq!(
            remote("install", Some(7), ""),
            Trouble::Failed {
                step: "install".into(),
                message: "it ended with 7 and said nothing".into()
            }
        );
    }
}
