//! The container's first process: it has another one do the work, and starts it again when that dies.
//!
//! kubelet leaves a container that has ended again and again alone for up to five minutes, and nobody leads for as long as the
//! lease of a leader lasts that has died. Here the next worker starts after [`PAUSE`], under the same name in the election:
//! the lead is still its own. That is safe as two workers never live at once. The first process has waited for the end of one
//! before it starts the next, and none outlives it (`PR_SET_PDEATHSIG`).
//!
//! A worker that fails by itself again and again ends the first process too, so that kubelet, and whoever judges a new
//! version of the operator by its pods, sees that it is no good.

use std::ffi::OsString;
use std::fmt;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{ExitStatus, Stdio};
use std::str::FromStr;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getppid};
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, sleep};

/// How long after a worker's end the next one starts.
pub const PAUSE: Duration = Duration::from_secs(1);
/// A worker that fails within this time has not worked.
pub const QUICK: Duration = Duration::from_secs(10);
/// So many of those one after the other are the end.
pub const MOST: u32 = 5;

/// Why the first process ends other than by its worker's normal end.
#[derive(Debug, thiserror::Error)]
pub enum SuperviseError {
    /// No random numbers.
    #[error("the system gives no random numbers")]
    Random(#[from] getrandom::Error),
    /// Something about processes and signals does not work.
    #[error("could not {what}")]
    Process {
        /// What.
        what: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The process that started this worker is not its parent any more: there may be another worker.
    #[error("the process that started this worker has ended")]
    Orphan,
    /// The worker was told to stop, and failed.
    #[error("the worker was told to stop, and ended with {0}")]
    Stopped(ExitStatus),
    /// Workers fail by themselves.
    #[error("{MOST} workers one after the other failed within {QUICK:?} each, the last one with {0}")]
    Broken(ExitStatus),
}

fn failed(what: &'static str) -> impl FnOnce(std::io::Error) -> SuperviseError {
    move |source| SuperviseError::Process { what, source }
}

/// The first process as its workers know it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Start {
    pid: i32,
    /// Tells it from others with its process id, before it or in other containers.
    id: String,
}

impl Start {
    fn new() -> Result<Self, SuperviseError> {
        Ok(Self {
            pid: Pid::this().as_raw(),
            id: random()?,
        })
    }

    /// The name under which all its workers stand for election.
    pub fn name(&self, identity: &str) -> String {
        format!("{identity}_{}", self.id)
    }

    /// Has this process die with the one that started it. To be called before anything else is done.
    pub fn follow(&self) -> Result<(), SuperviseError> {
        set_pdeathsig(Signal::SIGKILL)
            .map_err(|error| failed("tie this worker's life to its parent's")(error.into()))?;
        // It may have ended before.
        if getppid().as_raw() == self.pid {
            Ok(())
        } else {
            Err(SuperviseError::Orphan)
        }
    }
}

impl fmt::Display for Start {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.pid, self.id)
    }
}

impl FromStr for Start {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parts = text.split_once('.');
        parts
            .filter(|(_, id)| !id.is_empty())
            .and_then(|(pid, id)| {
                Some(Self {
                    pid: pid.parse().ok()?,
                    id: id.to_owned(),
                })
            })
            .ok_or("it is not what the first process passes on")
    }
}

/// What no other process has had.
pub(crate) fn random() -> Result<String, getrandom::Error> {
    let mut bytes = [0; 4];
    getrandom::fill(&mut bytes)?;
    Ok(hex::encode(bytes))
}

/// Workers that failed one after the other.
#[derive(Debug, Default)]
struct Failures(u32);

impl Failures {
    /// Takes in how a worker ended that was not told to; tells whether those were too many. Who is killed (SIGKILL) has not failed
    /// by itself.
    fn are_too_many(&mut self, status: ExitStatus, lived: Duration) -> bool {
        if status.signal() != Some(Signal::SIGKILL as i32) {
            self.0 = if lived < QUICK { self.0 + 1 } else { 0 };
        }
        self.0 >= MOST
    }
}

/// Runs workers, this program with the same `arguments`, until one ends normally or was told to stop: SIGTERM and SIGINT are
/// passed on. On the program's main thread only: a worker dies with the thread that started it (prctl(2)).
pub async fn supervise(arguments: &[OsString]) -> Result<(), SuperviseError> {
    let program = std::env::current_exe().map_err(failed("find this program"))?;
    let start = Start::new()?;
    let mut terminated = signal(SignalKind::terminate()).map_err(failed("listen for signals"))?;
    let mut interrupted = signal(SignalKind::interrupt()).map_err(failed("listen for signals"))?;
    let mut failures = Failures::default();
    loop {
        let begun = Instant::now();
        let mut worker = Command::new(&program)
            .args(arguments)
            .arg(format!("--worker={start}"))
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .map_err(failed("start a worker"))?;
        let mut told = None;
        let status = loop {
            let signal = tokio::select! {
                status = worker.wait() => break status.map_err(failed("wait for the worker"))?,
                _ = terminated.recv() => Signal::SIGTERM,
                _ = interrupted.recv() => Signal::SIGINT,
            };
            told = Some(signal);
            pass_on(&worker, signal).map_err(|error| failed("pass a signal on")(error.into()))?;
        };
        if status.success() {
            return Ok(());
        }
        if let Some(signal) = told {
            // It may not have been able to listen yet.
            return match status.signal() {
                Some(by) if by == signal as i32 => Ok(()),
                _ => Err(SuperviseError::Stopped(status)),
            };
        }
        if failures.are_too_many(status, begun.elapsed()) {
            return Err(SuperviseError::Broken(status));
        }
        tracing::warn!(%status, "the worker has ended, and another one starts");
        tokio::select! {
            () = sleep(PAUSE) => {}
            _ = terminated.recv() => return Ok(()),
            _ = interrupted.recv() => return Ok(()),
        }
    }
}

fn pass_on(worker: &Child, signal: Signal) -> Result<(), Errno> {
    match worker.id().map(|id| kill(Pid::from_raw(id.cast_signed()), signal)) {
        // It has ended.
        None | Some(Ok(()) | Err(Errno::ESRCH)) => Ok(()),
        Some(Err(error)) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_of_one_process_have_one_name() {
        let start = Start::new().unwrap();
        let passed: Start = start.to_string().parse().unwrap();
        assert_eq!(passed, start);
        assert_eq!(passed.name("pod-1"), start.name("pod-1"));
        assert!(start.name("pod-1").starts_with("pod-1_"));
        assert_ne!(Start::new().unwrap().name("pod-1"), start.name("pod-1"));
        for wrong in ["", "1", "1.", "x.abc", ".abc"] {
            assert!(wrong.parse::<Start>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn only_quick_failures_in_a_row_are_the_end() {
        let (exit, abort, killed) = (
            ExitStatus::from_raw(1 << 8),
            ExitStatus::from_raw(Signal::SIGABRT as i32),
            ExitStatus::from_raw(Signal::SIGKILL as i32),
        );
        let quick = Duration::from_millis(100);
        let count = |ends: &[(ExitStatus, Duration)]| {
            let mut failures = Failures::default();
            ends.iter()
                .position(|(status, lived)| failures.are_too_many(*status, *lived))
        };
        assert_eq!(count(&[(exit, quick); 9]), Some(4));
        assert_eq!(count(&[(abort, QUICK / 2); 9]), Some(4));
        assert_eq!(count(&[(exit, QUICK); 9]), None);
        assert_eq!(count(&[(killed, quick); 99]), None);
        // One that worked for a while, and those that were killed between.
        let mut mixed = [(exit, quick); 12];
        mixed[3] = (exit, QUICK);
        assert_eq!(count(&mixed), Some(8));
        mixed[3] = (killed, quick);
        assert_eq!(count(&mixed), Some(5));
    }
}
