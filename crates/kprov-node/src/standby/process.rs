//! The control plane's processes on this machine, as the kernel lists them: whatever kubelet or the runtime last heard.

use std::io;

use kprov_types::ports;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::Component;

/// A process of the control plane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ControlProcess {
    /// Its id.
    pub pid: Pid,
    /// What it is.
    pub component: Component,
    /// Its revision.
    pub revision: u16,
}

/// All of them in this network namespace, whose addresses their revisions are.
pub fn control_processes() -> io::Result<Vec<ControlProcess>> {
    let own = std::fs::read_link("/proc/self/ns/net")?;
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let entry = entry?;
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        // One that has ended meanwhile, or as a zombie, has no command line.
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let network = || std::fs::read_link(entry.path().join("ns/net"));
        if let Some((component, revision)) = parse(&line)
            && network().is_ok_and(|network| network == own)
        {
            found.push(ControlProcess {
                pid: Pid::from_raw(pid),
                component,
                revision,
            });
        }
    }
    Ok(found)
}

/// Asks all of them to end. Kubelet starts them again; they begin with nothing remembered.
pub fn restart_control_processes() -> io::Result<usize> {
    let all = control_processes()?;
    for process in &all {
        // One that has ended by itself meanwhile is as good.
        let _ = kill(process.pid, Signal::SIGTERM);
    }
    Ok(all.len())
}

/// What a command line (arguments that end with zero bytes) is of, if it is of the control plane.
fn parse(line: &[u8]) -> Option<(Component, u16)> {
    let mut arguments = line
        .split(|byte| *byte == 0)
        .map(|argument| str::from_utf8(argument).unwrap_or_default());
    let program = arguments.next()?.rsplit('/').next()?;
    let component = Component::ALL
        .into_iter()
        .find(|component| component.as_str() == program)?;
    let address = arguments.find_map(|argument| argument.strip_prefix("--bind-address="))?;
    Some((component, ports::revision_of(address.parse().ok()?)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_lines() {
        let cases = [
            (
                "/usr/local/bin/kube-apiserver\0--secure-port=6443\0--bind-address=127.64.1.2\0",
                Some((Component::ApiServer, 258)),
            ),
            (
                "kube-scheduler\0--bind-address=127.64.0.1\0",
                Some((Component::Scheduler, 1)),
            ),
            ("/usr/local/bin/kube-scheduler\0--bind-address=0.0.0.0\0", None),
            ("/usr/local/bin/kube-scheduler\0", None),
            ("/bin/sh\0kube-apiserver\0--bind-address=127.64.1.2\0", None),
            ("", None),
        ];
        for (line, expected) in cases {
            assert_eq!(parse(line.as_bytes()), expected, "{line:?}");
        }
    }
}
