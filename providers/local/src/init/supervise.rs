//! What the first process of a machine does for as long as the machine runs: it runs the first-boot script, again and
//! again should it end, writes down what is printed, and takes in orphans.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, dup2_stderr, dup2_stdin, dup2_stdout};
use tokio::net::unix::pipe;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, sleep_until};

use super::console::Console;
use super::{InitError, PATH, Report, tell};

/// Where the script is put; `/run` is the machine's own and empty at each boot.
const SCRIPT: &str = "/run/kprov/first-boot";
/// How long everything has to end when the machine is told to.
const GRACE: Duration = Duration::from_secs(20);
/// How long the script is waited for at first after it ended.
const SHORTEST: Duration = Duration::from_secs(1);
/// How long at most.
const LONGEST: Duration = Duration::from_secs(30);
/// A run this long counts as good: waiting begins anew.
const GOOD: Duration = Duration::from_mins(1);

/// How long to wait until the script is run again.
#[derive(Debug, PartialEq, Eq)]
struct Backoff {
    next: Duration,
}

impl Backoff {
    const fn new() -> Self {
        Self { next: SHORTEST }
    }

    /// The wait after a run of this length.
    fn after(&mut self, run: Duration) -> Duration {
        if run >= GOOD {
            self.next = SHORTEST;
        }
        let wait = self.next;
        self.next = (wait * 2).min(LONGEST);
        wait
    }
}

/// The script, running or waiting to be run again.
enum Script {
    Running { pid: Pid, since: Instant },
    Waiting { until: Instant },
}

/// Runs the machine until it is told to end. The launcher is told once the script runs for the first time.
pub(super) fn run(script: &[u8], console: Console) -> Result<(), InitError> {
    fs::create_dir_all("/run/kprov").map_err(InitError::system("make `/run/kprov`"))?;
    fs::write(SCRIPT, script).map_err(InitError::system(format!("write `{SCRIPT}`")))?;
    fs::set_permissions(SCRIPT, Permissions::from_mode(0o700))
        .map_err(InitError::system(format!("set up `{SCRIPT}`")))?;
    // Many programs take the lower of the two for all they may have.
    if let Ok((_, most)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, most, most);
    }
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(InitError::system("begin to supervise"))?
        .block_on(supervise(console))
}

async fn supervise(mut console: Console) -> Result<(), InitError> {
    let failed = |what: &str| InitError::system::<io::Error>(what.to_owned());
    let mut children = signal(SignalKind::child()).map_err(failed("hear of children"))?;
    let mut end = signal(SignalKind::terminate()).map_err(failed("hear of the end"))?;
    let (reader, writer) = io::pipe().map_err(failed("make a pipe"))?;
    let output = pipe::Receiver::from_owned_fd(reader.into()).map_err(failed("read a pipe"))?;
    let writer = OwnedFd::from(writer);
    let mut backoff = Backoff::new();

    let mut script = start(&writer)?;
    console.say("booted");
    tell(&Report::Booted);
    let_go()?;

    loop {
        let again = match script {
            Script::Waiting { until } => Some(until),
            Script::Running { .. } => None,
        };
        tokio::select! {
            _ = end.recv() => break,
            result = output.readable() => {
                result.map_err(failed("read a pipe"))?;
                pass_on(&output, &mut console);
            }
            _ = children.recv() => {
                for (pid, how) in reap().ended {
                    if let Script::Running { pid: its, since } = script && its == pid {
                        let wait = backoff.after(since.elapsed());
                        // What it said last comes before what is said about it.
                        pass_on(&output, &mut console);
                        console.say(&format!("the first-boot script ended with {how}; it runs again in {} s", wait.as_secs()));
                        script = Script::Waiting { until: Instant::now() + wait };
                    }
                }
            }
            () = sleep_until(again.unwrap_or_else(Instant::now)), if again.is_some() => {
                script = match start(&writer) {
                    Ok(running) => running,
                    Err(error) => {
                        let wait = backoff.after(Duration::ZERO);
                        console.say(&format!("cannot run the first-boot script: {error}"));
                        Script::Waiting { until: Instant::now() + wait }
                    }
                };
            }
        }
    }

    console.say("ending");
    let deadline = Instant::now() + GRACE;
    // The script's process first: it knows in which order its own are to end. Then the rest is told.
    let mut main = match script {
        Script::Running { pid, .. } => {
            let _ = kill(pid, Signal::SIGTERM);
            Some(pid)
        }
        Script::Waiting { .. } => {
            let _ = kill(EVERYBODY, Signal::SIGTERM);
            None
        }
    };
    loop {
        let Reaped { ended, more } = reap();
        if ended.iter().any(|(pid, _)| Some(*pid) == main) {
            main = None;
            let _ = kill(EVERYBODY, Signal::SIGTERM);
        }
        if !more || Instant::now() >= deadline {
            break;
        }
        tokio::select! {
            result = output.readable() => {
                result.map_err(failed("read a pipe"))?;
                pass_on(&output, &mut console);
            }
            _ = children.recv() => {}
            () = sleep_until(deadline) => {}
        }
    }
    pass_on(&output, &mut console);
    // Everything that is left ends with this process.
    console.say("ended");
    Ok(())
}

/// For `kill(2)` by the first process of a namespace: all but itself. For `waitpid(2)`: any child.
const EVERYBODY: Pid = Pid::from_raw(-1);

fn start(output: &OwnedFd) -> Result<Script, InitError> {
    let stream = || {
        output
            .try_clone()
            .map(Stdio::from)
            .map_err(InitError::system("share a pipe"))
    };
    let child = Command::new(SCRIPT)
        .env_clear()
        // `container` is how programs find out that they run in one (systemd, "Container Interface").
        .envs([
            ("PATH", PATH),
            ("HOME", "/root"),
            ("LANG", "C.UTF-8"),
            ("container", "kprov"),
        ])
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(stream()?)
        .stderr(stream()?)
        .spawn()
        .map_err(InitError::system("run the first-boot script"))?;
    // Never waited for by its handle: like all children it is taken in by `reap`.
    Ok(Script::Running {
        pid: Pid::from_raw(child.id().cast_signed()),
        since: Instant::now(),
    })
}

/// The children that have ended, and how; and whether there are more.
struct Reaped {
    ended: Vec<(Pid, String)>,
    more: bool,
}

/// Takes in all children that have ended, the orphans of others among them.
fn reap() -> Reaped {
    let mut ended = Vec::new();
    loop {
        match waitpid(EVERYBODY, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, code)) => ended.push((pid, format!("exit code {code}"))),
            Ok(WaitStatus::Signaled(pid, signal, _)) => ended.push((pid, signal.to_string())),
            Ok(WaitStatus::StillAlive) => return Reaped { ended, more: true },
            Err(Errno::EINTR) | Ok(_) => {}
            // ECHILD: none is left.
            Err(_) => return Reaped { ended, more: false },
        }
    }
}

fn pass_on(output: &pipe::Receiver, console: &mut Console) {
    let mut buffer = [0; 8192];
    // An error is that there is no more for now.
    while let Ok(n @ 1..) = output.try_read(&mut buffer) {
        console.write(&buffer[..n]);
    }
}

/// Lets go of the launcher's pipes: that they close tells it that the machine runs.
fn let_go() -> Result<(), InitError> {
    let null = File::options()
        .read(true)
        .write(true)
        .open("/dev/null")
        .map_err(InitError::system("open `/dev/null`"))?;
    dup2_stdin(&null)
        .and_then(|()| dup2_stdout(&null))
        .and_then(|()| dup2_stderr(&null))
        .map_err(InitError::system("let go of the launcher"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backs_off_and_forgives() {
        let mut backoff = Backoff::new();
        let waits: Vec<_> = (0..7).map(|_| backoff.after(Duration::ZERO).as_secs()).collect();
        assert_eq!(waits, [1, 2, 4, 8, 16, 30, 30]);
        assert_eq!(backoff.after(GOOD), SHORTEST);
        assert_eq!(backoff.after(Duration::from_secs(59)).as_secs(), 2);
    }
}
