//! Processes of this host, told apart for good: a process id alone is used again by others.

use std::fs;
use std::io;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

/// One process, as no other will ever be: its id, its start time (clock ticks since boot), and the boot it belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ProcessId {
    pub(crate) pid: i32,
    start: u64,
    boot: String,
}

impl ProcessId {
    /// This process, seen from the process namespace that `/proc` belongs to. (For the first process of a new namespace
    /// that is the host's, until it mounts its own.)
    pub(crate) fn current() -> io::Result<Self> {
        let pid = fs::read_link("/proc/self")?
            .to_str()
            .and_then(|name| name.parse().ok())
            .ok_or_else(|| io::Error::other("`/proc/self` names no process"))?;
        let stat = Stat::of(pid)?.ok_or_else(|| io::Error::other("this process is not in `/proc`"))?;
        Ok(Self {
            pid,
            start: stat.start,
            boot: boot_id()?,
        })
    }

    /// Whether it runs. A zombie does not.
    pub(crate) fn is_alive(&self) -> bool {
        boot_id().is_ok_and(|boot| boot == self.boot)
            && Stat::of(self.pid).is_ok_and(|stat| stat.is_some_and(|s| s.start == self.start && !s.dead))
    }

    /// Kills it, if it still runs, and waits until it has ended.
    ///
    /// Returns whether it has.
    pub(crate) fn kill(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        while self.is_alive() {
            // `ESRCH` is the only failure for root, and the next look shows it.
            let _ = kill(Pid::from_raw(self.pid), Signal::SIGKILL);
            if Instant::now() > deadline {
                return false;
            }
            thread::sleep(Duration::from_millis(2));
        }
        reap(self.pid);
        true
    }
}

/// Whether a process has ended: it's gone, or a zombie whose parent has not taken notice yet, which holds nothing.
pub(crate) fn has_ended(pid: i32) -> bool {
    Stat::of(pid).is_ok_and(|stat| stat.is_none_or(|s| s.dead))
}

/// Takes the exit status of a process if it is a child of this one, so that it does not stay as a zombie.
pub(crate) fn reap(pid: i32) {
    // Not a child of this process: nothing to do.
    let _ = waitpid(Pid::from_raw(pid), Some(WaitPidFlag::WNOHANG));
}

fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// What matters of `/proc/<pid>/stat` (`proc_pid_stat(5)`).
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    start: u64,
    dead: bool,
}

impl Stat {
    fn of(pid: i32) -> io::Result<Option<Self>> {
        match fs::read_to_string(format!("/proc/{pid}/stat")) {
            Ok(text) => Ok(Self::parse(&text)),
            // ESRCH: it ended between opening and reading.
            Err(e) if e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(nix::libc::ESRCH) => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn parse(text: &str) -> Option<Self> {
        // The second field is the program's name in brackets, which may hold brackets and spaces itself.
        let (_, rest) = text.rsplit_once(") ")?;
        let mut fields = rest.split(' ');
        let state = fields.next()?;
        // Field 22; the state was the third.
        let start = fields.nth(18)?.parse().ok()?;
        Some(Self {
            start,
            dead: matches!(state, "Z" | "X" | "x"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn stat_is_read_behind_the_name() {
        let line = "42 (a) b) S 1 42 42 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 98765 1 2 3";
        assert_eq!(
            Stat::parse(line),
            Some(Stat {
                start: 98765,
                dead: false
            })
        );
        assert_eq!(
            Stat::parse(&line.replace(" S ", " Z ")),
            Some(Stat {
                start: 98765,
                dead: true
            })
        );
        assert_eq!(Stat::parse("42 (a"), None);
    }

    #[test]
    fn another_process_with_the_same_id_is_not_it() {
        let me = ProcessId::current().unwrap();
        assert!(me.is_alive());
        assert!(
            !ProcessId {
                start: me.start + 1,
                ..me.clone()
            }
            .is_alive()
        );
        assert!(
            !ProcessId {
                boot: "other".into(),
                ..me
            }
            .is_alive()
        );
    }

    #[test]
    fn killing_ends_and_reaps_a_child() {
        #[expect(clippy::zombie_processes, reason = "that it is waited for is what is tested")]
        let child = Command::new("sleep").arg("60").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let id = ProcessId {
            pid,
            start: Stat::of(pid).unwrap().unwrap().start,
            boot: boot_id().unwrap(),
        };
        assert!(id.is_alive());
        assert!(!has_ended(pid));
        assert!(id.kill(Duration::from_secs(5)));
        assert!(has_ended(pid));
        assert!(!id.is_alive());
        assert_eq!(Stat::of(pid).unwrap(), None);
    }
}
