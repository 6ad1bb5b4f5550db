//! From one release to another and back: what becomes of a trial, and of the process that runs it.

use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};
use jiff::Timestamp;
use kprov_types::api::ProgramStatus;
use tokio::process::Command;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::decide::proven;
use super::disk::{Disk, DiskError, KPROV_NODE, Trial};
use crate::nodes::OwnNode;
use crate::status::Status;
use crate::{files, paths};

/// How long `kprov-node version` may take.
const VERSION_LIMIT: Duration = Duration::from_secs(10);
/// The shortest time that a release is given, whatever the order says: less than a kubelet takes to start.
const LEAST: Duration = Duration::from_secs(20);
/// How often to look without a reason.
const LOOK: Duration = Duration::from_secs(1);
/// How many lines of a log are told, and how long one may be.
const LINES: usize = 15;
const LINE: usize = 400;

/// What this process is asked to become.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Switch {
    /// The release of a trial, whose marker is on disk.
    Try(Trial),
    /// The release before a trial, whose failure is on disk.
    Back(Trial),
}

/// Watches a trial until it has proven itself or was given up.
pub struct TrialWatch {
    /// What the machine remembers.
    pub disk: Disk,
    /// What is being tried; none any more once it has proven itself.
    pub trial: watch::Sender<Option<Trial>>,
    /// This machine's Node.
    pub node: watch::Receiver<Option<OwnNode>>,
    /// How far the machine is.
    pub status: Status,
    /// When this machine's programs were started, and how long kubelet's log was then.
    pub started: Timestamp,
    /// The size of kubelet's log at that time, in bytes.
    pub log_start: u64,
    /// Asks for the release before it to be started.
    pub switch: mpsc::Sender<Switch>,
}

impl TrialWatch {
    /// Returns when there is nothing more to watch.
    pub async fn run(mut self) {
        let Some(trial) = self.trial.borrow().clone() else {
            return;
        };
        let limit = Duration::from_secs(trial.timeout_seconds.into()).max(LEAST);
        let deadline = Instant::now() + limit;
        loop {
            let set_up = self.status.is_done();
            let lacks = match proven(&trial.to.version, self.node.borrow_and_update().as_ref(), self.started) {
                Ok(()) if set_up => match self.disk.end_trial() {
                    Ok(()) => {
                        tracing::info!(release = %trial.to, starts = trial.starts, "the release has proven itself");
                        self.trial.send_replace(None);
                        return;
                    }
                    Err(error) => crate::chain(&error),
                },
                Ok(()) => self
                    .status
                    .get()
                    .message
                    .unwrap_or_else(|| "the machine is starting".into()),
                Err(lacks) => lacks,
            };
            if Instant::now() >= deadline {
                let message = format!("it did not work within {} s: {lacks}", limit.as_secs());
                match give_up(&self.disk, &trial, message, self.log_start) {
                    Ok(switch) => return drop(self.switch.send(switch).await),
                    Err(error) => tracing::error!(error = crate::chain(&error), "the machine cannot go back yet"),
                }
            }
            tokio::select! {
                () = tokio::time::sleep(LOOK) => {}
                Ok(()) = self.node.changed() => {}
            }
        }
    }
}

/// Gives a trial up: from now on the machine goes back, whatever happens.
pub fn give_up(disk: &Disk, trial: &Trial, message: String, log_start: u64) -> Result<Switch, DiskError> {
    tracing::error!(release = %trial.to, message, "going back to {}", trial.from);
    let log = log_tail(&kubelet_log(), log_start);
    disk.set_failed(&trial.failed(message, log, Timestamp::now()))?;
    Ok(Switch::Back(trial.clone()))
}

fn kubelet_log() -> Utf8PathBuf {
    Utf8Path::new(paths::LOGS).join("kubelet.log")
}

/// The size of kubelet's log, in bytes: what comes later is of a later start.
pub fn log_size() -> u64 {
    std::fs::metadata(kubelet_log()).map_or(0, |m| m.len())
}

/// The last lines that were written to a log after its first `start` bytes.
fn log_tail(path: &Utf8Path, start: u64) -> Vec<String> {
    use std::io::{Read as _, Seek as _, SeekFrom};
    let read = || {
        let mut file = std::fs::File::open(path)?;
        let size = file.metadata()?.len();
        // It was put aside meanwhile: all of it is new.
        let start = if start > size { 0 } else { start };
        let reach = u64::try_from(LINES * LINE * 4).unwrap_or(u64::MAX);
        file.seek(SeekFrom::Start(start.max(size.saturating_sub(reach))))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok::<_, std::io::Error>(String::from_utf8_lossy(&bytes).into_owned())
    };
    let text = read().unwrap_or_default();
    let lines: Vec<_> = text.lines().map(|line| line.chars().take(LINE).collect()).collect();
    lines
        .get(lines.len().saturating_sub(LINES)..)
        .unwrap_or_default()
        .to_vec()
}

/// The program of this process.
pub fn own_program() -> Utf8PathBuf {
    let path = std::env::current_exe()
        .ok()
        .and_then(|path| Utf8PathBuf::from_path_buf(path).ok());
    path.unwrap_or_else(|| "/usr/local/bin/kprov-node".into())
}

/// This process's version, and its program's digest. Blocks while it reads the program.
pub(super) fn own_status() -> Option<ProgramStatus> {
    Some(ProgramStatus {
        version: env!("CARGO_PKG_VERSION").into(),
        digest: files::digest(Utf8Path::new("/proc/self/exe")).ok()?,
    })
}

/// Whether the kprov-node of a release runs at all, where the release brings one; else why not. Once this process has become
/// it, nobody is left to go back.
pub(super) async fn check_program(directory: &Utf8Path) -> Result<(), String> {
    let program = directory.join("bin").join(KPROV_NODE);
    if !program.exists() {
        return Ok(());
    }
    let run = Command::new(&program).arg("version").kill_on_drop(true).output();
    match tokio::time::timeout(VERSION_LIMIT, run).await {
        Ok(Ok(output)) if output.status.success() => Ok(()),
        Ok(Ok(output)) => Err(format!("its kprov-node does not run: {}", output.status)),
        Ok(Err(error)) => Err(format!("its kprov-node does not run: {error}")),
        Err(_) => Err(format!(
            "its kprov-node does not tell its version within {} s",
            VERSION_LIMIT.as_secs()
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::tests::{new, trial};
    use kprov_types::node::SetupStep;

    struct Watched {
        watch: TrialWatch,
        node: watch::Sender<Option<OwnNode>>,
        switches: mpsc::Receiver<Switch>,
        disk: Disk,
        _dir: tempfile::TempDir,
    }

    fn watched() -> Watched {
        let dir = tempfile::tempdir().unwrap();
        let disk = Disk::below(Utf8Path::from_path(dir.path()).unwrap());
        disk.set_trial(&trial()).unwrap();
        let node = watch::Sender::new(None);
        let (switch, switches) = mpsc::channel(1);
        let watch = TrialWatch {
            disk: disk.clone(),
            trial: watch::Sender::new(Some(trial())),
            node: node.subscribe(),
            status: Status::new(),
            started: Timestamp::from_second(100).unwrap(),
            log_start: 0,
            switch,
        };
        Watched {
            watch,
            node,
            switches,
            disk,
            _dir: dir,
        }
    }

    fn good() -> OwnNode {
        OwnNode {
            ready: true,
            message: String::new(),
            heartbeat: Some(Timestamp::from_second(101).unwrap()),
            kubelet: new().version.tag(),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_release_that_proves_itself_in_time_stays() {
        let mut watched = watched();
        let (status, trial) = (watched.watch.status.clone(), watched.watch.trial.subscribe());
        let task = tokio::spawn(watched.watch.run());
        watched.node.send_replace(Some(good()));
        tokio::time::sleep(Duration::from_secs(30)).await;
        assert!(trial.borrow().is_some(), "the machine is not set up yet");
        status.reach(SetupStep::Done);
        task.await.unwrap();
        assert_eq!(*trial.borrow(), None);
        assert_eq!(watched.disk.trial().unwrap(), None);
        assert!(watched.switches.try_recv().is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn a_release_that_does_not_is_given_up() {
        let mut watched = watched();
        watched.watch.status.reach(SetupStep::Done);
        watched.node.send_replace(Some(OwnNode {
            ready: false,
            message: "no network".into(),
            ..good()
        }));
        watched.watch.run().await;
        assert_eq!(watched.switches.try_recv().unwrap(), Switch::Back(trial()));
        let failed = watched.disk.failed().unwrap().unwrap();
        assert!(failed.ends(&trial()));
        let message = failed.failure.message;
        assert!(message.contains("60 s") && message.contains("no network"), "{message}");
    }

    #[test]
    fn the_last_lines_of_this_start_are_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = Utf8Path::from_path(dir.path()).unwrap().join("kubelet.log");
        assert_eq!(log_tail(&path, 0), Vec::<String>::new());
        std::fs::write(&path, "of before\n").unwrap();
        let start = std::fs::metadata(&path).unwrap().len();
        let lines: Vec<_> = (0..20).map(|n| format!("line {n} {}", "x".repeat(1000))).collect();
        std::fs::write(&path, format!("of before\n{}\n", lines[..3].join("\n"))).unwrap();
        let told = log_tail(&path, start);
        assert_eq!(told.len(), 3);
        assert!(told[0].starts_with("line 0") && told[0].len() == LINE);
        std::fs::write(&path, format!("of before\n{}\n", lines.join("\n"))).unwrap();
        let told = log_tail(&path, start);
        assert_eq!(told.len(), LINES);
        assert!(told[LINES - 1].starts_with("line 19"));
        // Put aside since.
        std::fs::write(&path, "new\n").unwrap();
        assert_eq!(log_tail(&path, start), ["new"]);
    }

    #[tokio::test]
    async fn a_kprov_node_that_does_not_run_is_found_out_before() {
        let dir = tempfile::tempdir().unwrap();
        let root = Utf8Path::from_path(dir.path()).unwrap();
        assert_eq!(check_program(root).await, Ok(()), "a release may come without");
        let program = root.join("bin").join(KPROV_NODE);
        files::write(&program, b"#!/bin/sh\n[ \"$1\" = version ]\n", 0o755).unwrap();
        assert_eq!(check_program(root).await, Ok(()));
        files::write(&program, b"#!/bin/sh\nexit 3\n", 0o755).unwrap();
        assert!(check_program(root).await.unwrap_err().contains("exit status: 3"));
        files::write(&program, b"\x7fELF", 0o755).unwrap();
        assert!(check_program(root).await.unwrap_err().contains("does not run"));
    }
}
