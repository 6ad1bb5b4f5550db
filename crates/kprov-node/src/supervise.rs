//! Children that must run: started again with a growing delay, their output kept in rotated log files, stopped cleanly.
//!
//! A child never outlives its supervisor for long: each leaves a process file with its start time, so that a kprov-node
//! that starts after one that was killed stops what is left and begins anew.

use std::fs::{self, File};
use std::io::{self, Write};
use std::process::Stdio;
use std::time::{Duration, Instant};

use camino::{Utf8Path, Utf8PathBuf};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::process::{Child, Command};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::files::{self, FileError, failed};
use crate::paths;

/// How long a child may take to end after SIGTERM.
const STOP_LIMIT: Duration = Duration::from_secs(15);
/// A log file is put aside when it has grown to this size.
const LOG_LIMIT: u64 = 10 << 20;
/// How many log files are kept, the one being written included.
const LOG_FILES: u32 = 3;

/// The delay before a child is started again: doubles from [`Backoff::FIRST`] to [`Backoff::LONGEST`], and starts over
/// once a child has been up for [`Backoff::GOOD`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backoff {
    last: Option<Duration>,
}

impl Backoff {
    /// The first delay.
    pub const FIRST: Duration = Duration::from_millis(250);
    /// The longest delay.
    pub const LONGEST: Duration = Duration::from_secs(30);
    /// How long a child must be up to count as having started well.
    pub const GOOD: Duration = Duration::from_mins(1);

    /// The delay before the next start of a child that was up for `up`.
    #[must_use = "the delay must be kept"]
    pub fn next(self, up: Duration) -> (Duration, Self) {
        let delay = match self.last {
            Some(last) if up < Self::GOOD => (last * 2).min(Self::LONGEST),
            _ => Self::FIRST,
        };
        (delay, Self { last: Some(delay) })
    }
}

/// Where supervision keeps its files.
#[derive(Clone, Debug)]
pub struct Places {
    /// The directory of logs.
    pub logs: Utf8PathBuf,
    /// The directory of process files.
    pub run: Utf8PathBuf,
}

impl Default for Places {
    fn default() -> Self {
        Self {
            logs: paths::LOGS.into(),
            run: paths::RUN.into(),
        }
    }
}

impl Places {
    fn pid_file(&self, name: &str) -> Utf8PathBuf {
        self.run.join(format!("{name}.pid"))
    }
}

/// A program to keep running.
#[derive(Clone, Debug)]
pub struct ChildSpec {
    /// Its name, for logs and the process file.
    pub name: &'static str,
    /// The program.
    pub program: Utf8PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// Environment variables on top of kprov-node's own.
    pub env: Vec<(String, String)>,
}

/// A supervised child. Dropping this does not stop it; [`Supervised::stop`] does.
#[derive(Debug)]
pub struct Supervised {
    task: JoinHandle<()>,
    stop: CancellationToken,
}

impl Supervised {
    /// Starts supervising.
    pub fn start(spec: ChildSpec, places: Places) -> Result<Self, FileError> {
        let log = RotatingLog::open(places.logs.join(format!("{}.log", spec.name)))?;
        let (reader, writer) = io::pipe().map_err(failed("make a pipe for", &log.path))?;
        let reader = pipe::Receiver::from_owned_fd(reader.into()).map_err(failed("make a pipe for", &log.path))?;
        let pump = tokio::spawn(pump(reader, log));
        let stop = CancellationToken::new();
        let stopping = stop.clone();
        let task = tokio::spawn(async move {
            supervise(&spec, &places, &writer, &stopping).await;
            drop(writer);
            // What it said last is in the pipe still. Grandchildren may hold the other end open for as long as they run.
            let abort = pump.abort_handle();
            if tokio::time::timeout(Duration::from_secs(1), pump).await.is_err() {
                abort.abort();
            }
        });
        Ok(Self { task, stop })
    }

    /// Stops the child and its supervision; returns when it has ended.
    pub async fn stop(self) {
        self.stop.cancel();
        if let Err(error) = self.task.await {
            tracing::error!(%error, "a supervisor ended early");
        }
    }
}

async fn supervise(spec: &ChildSpec, places: &Places, output: &io::PipeWriter, stop: &CancellationToken) {
    let mut backoff = Backoff::default();
    while !stop.is_cancelled() {
        let started = Instant::now();
        match spawn(spec, places, output) {
            Err(error) => tracing::error!(child = spec.name, program = %spec.program, %error, "cannot start"),
            Ok(mut child) => {
                tracing::info!(child = spec.name, pid = child.id(), "started");
                tokio::select! {
                    ended = child.wait() => match ended {
                        Ok(status) => tracing::warn!(child = spec.name, %status, "ended by itself"),
                        Err(error) => tracing::error!(child = spec.name, %error, "cannot wait for it"),
                    },
                    () = stop.cancelled() => stop_child(spec.name, &mut child).await,
                }
                if let Err(error) = files::remove(&places.pid_file(spec.name)) {
                    tracing::warn!(child = spec.name, %error, "the process file stays");
                }
            }
        }
        let (delay, next) = backoff.next(started.elapsed());
        backoff = next;
        tokio::select! {
            () = tokio::time::sleep(delay) => {}
            () = stop.cancelled() => {}
        }
    }
}

fn spawn(spec: &ChildSpec, places: &Places, output: &io::PipeWriter) -> io::Result<Child> {
    let child = Command::new(&spec.program)
        .args(&spec.args)
        .envs(spec.env.iter().map(|(k, v)| (k, v)))
        .env_remove(crate::SETTLED)
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output.try_clone()?)
        // A signal meant for kprov-node's terminal must not end what it looks after.
        .process_group(0)
        .kill_on_drop(true)
        .spawn()?;
    if let Some(pid) = child.id()
        && let Some(started) = start_time(pid)
        && let Err(error) = files::write(
            &places.pid_file(spec.name),
            format!("{pid} {started}\n").as_bytes(),
            0o600,
        )
    {
        tracing::warn!(child = spec.name, %error, "no process file");
    }
    Ok(child)
}

async fn stop_child(name: &str, child: &mut Child) {
    if let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok())
        && let Err(error) = kill(Pid::from_raw(pid), Signal::SIGTERM)
    {
        tracing::warn!(child = name, %error, "cannot ask it to stop");
    }
    match tokio::time::timeout(STOP_LIMIT, child.wait()).await {
        Ok(Ok(status)) => tracing::info!(child = name, %status, "stopped"),
        Ok(Err(error)) => tracing::warn!(child = name, %error, "cannot wait for it"),
        Err(_) => {
            tracing::warn!(child = name, limit = ?STOP_LIMIT, "did not stop in time, killing it");
            if let Err(error) = child.kill().await {
                tracing::warn!(child = name, %error, "cannot kill it");
            }
        }
    }
}

/// When a process started, in clock ticks since boot (proc(5), `/proc/pid/stat` field 22); tells a process from a later
/// one with the same id.
fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field, the program's name, may hold spaces and parentheses; the third comes after the last one.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

/// Stops what an earlier kprov-node left running under `name`.
pub async fn stop_stale(places: &Places, name: &str) {
    let file = places.pid_file(name);
    let Ok(text) = fs::read_to_string(&file) else { return };
    let mut words = text.split_whitespace().map(str::parse::<u64>);
    if let (Some(Ok(pid)), Some(Ok(started))) = (words.next(), words.next())
        && let (Ok(raw), Ok(pid)) = (i32::try_from(pid), u32::try_from(pid))
    {
        let lives = || start_time(pid) == Some(started);
        for (signal, limit) in [(Signal::SIGTERM, STOP_LIMIT), (Signal::SIGKILL, Duration::from_secs(5))] {
            if !lives() {
                break;
            }
            tracing::info!(child = name, pid, %signal, "stopping what an earlier kprov-node left");
            // It may end in between, which is what is wanted.
            let _ = kill(Pid::from_raw(raw), signal);
            let deadline = Instant::now() + limit;
            while lives() && Instant::now() < deadline {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
    if let Err(error) = files::remove(&file) {
        tracing::warn!(child = name, %error, "the process file stays");
    }
}

async fn pump(mut from: pipe::Receiver, mut to: RotatingLog) {
    let mut buffer = vec![0; 8 << 10];
    loop {
        match from.read(&mut buffer).await {
            Ok(0) => return,
            Ok(n) => {
                if let Err(error) = to.append(buffer.get(..n).unwrap_or_default()) {
                    // The child must not stand still because its log's disk is full.
                    tracing::warn!(log = %to.path, %error, "output was lost");
                }
            }
            Err(error) => {
                tracing::warn!(log = %to.path, %error, "cannot read a child's output");
                return;
            }
        }
    }
}

/// A log file that is put aside at a size limit: `x.log`, `x.log.1`, `x.log.2`.
#[derive(Debug)]
struct RotatingLog {
    path: Utf8PathBuf,
    file: File,
    size: u64,
    limit: u64,
}

impl RotatingLog {
    fn open(path: Utf8PathBuf) -> Result<Self, FileError> {
        if let Some(directory) = path.parent() {
            files::make_directory(directory, 0o755)?;
        }
        let (file, size) = Self::reopen(&path).map_err(failed("open", &path))?;
        Ok(Self {
            path,
            file,
            size,
            limit: LOG_LIMIT,
        })
    }

    fn reopen(path: &Utf8Path) -> io::Result<(File, u64)> {
        use std::os::unix::fs::OpenOptionsExt;
        let file = File::options().append(true).create(true).mode(0o640).open(path)?;
        let size = file.metadata()?.len();
        Ok((file, size))
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.size >= self.limit {
            self.rotate()?;
        }
        self.file.write_all(bytes)?;
        self.size += bytes.len() as u64;
        Ok(())
    }

    fn rotate(&mut self) -> io::Result<()> {
        for n in (1..LOG_FILES).rev() {
            let older = if n == 1 {
                self.path.clone()
            } else {
                Utf8PathBuf::from(format!("{}.{}", self.path, n - 1))
            };
            match fs::rename(&older, format!("{}.{n}", self.path)) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
        }
        (self.file, self.size) = Self::reopen(&self.path)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backoff_doubles_to_a_limit_and_starts_over() {
        let mut backoff = Backoff::default();
        let mut delays = Vec::new();
        for _ in 0..9 {
            let (delay, next) = backoff.next(Duration::from_secs(1));
            delays.push(delay.as_millis());
            backoff = next;
        }
        assert_eq!(delays, [250, 500, 1000, 2000, 4000, 8000, 16_000, 30_000, 30_000]);
        assert_eq!(backoff.next(Backoff::GOOD).0, Backoff::FIRST);
    }

    #[test]
    fn logs_are_rotated_and_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let path = Utf8Path::from_path(dir.path()).unwrap().join("x.log");
        let mut log = RotatingLog::open(path.clone()).unwrap();
        log.limit = 10;
        for n in 0..10 {
            log.append(format!("line {n:04}\n").as_bytes()).unwrap();
        }
        let mut names: Vec<_> = fs::read_dir(dir.path())
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, ["x.log", "x.log.1", "x.log.2"]);
        assert_eq!(fs::read_to_string(&path).unwrap(), "line 0009\n");
        assert_eq!(fs::read_to_string(format!("{path}.2")).unwrap(), "line 0007\n");
    }

    fn places() -> (tempfile::TempDir, Places) {
        let dir = tempfile::tempdir().unwrap();
        let root = Utf8Path::from_path(dir.path()).unwrap();
        let places = Places {
            logs: root.join("log"),
            run: root.join("run"),
        };
        (dir, places)
    }

    fn shell(script: &str) -> ChildSpec {
        ChildSpec {
            name: "child",
            program: "/bin/sh".into(),
            args: vec!["-c".into(), script.into()],
            env: vec![("GREETING".into(), "hello".into())],
        }
    }

    async fn until(what: &str, mut wanted: impl FnMut() -> bool) {
        let waiting = async {
            while !wanted() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), waiting)
            .await
            .unwrap_or_else(|_| panic!("{what}"));
    }

    #[tokio::test]
    async fn a_child_is_started_again_and_its_output_kept_to_the_last() {
        let (_dir, places) = places();
        let log = places.logs.join("child.log");
        let read = || fs::read_to_string(&log).unwrap_or_default();
        // It ends by itself twice, and then stays until it is told to stop.
        let count = places.run.join("count");
        files::make_directory(&places.run, 0o755).unwrap();
        let script = format!(
            "echo $GREETING; echo x >>{count}; [ $(wc -l <{count}) -lt 3 ] && exit 1; \
             trap 'echo bye >&2; exit 0' TERM; while :; do sleep 0.05; done"
        );
        let child = Supervised::start(shell(&script), places.clone()).unwrap();
        until("it runs for the third time", || read() == "hello\nhello\nhello\n").await;
        until("the process file", || places.pid_file("child").exists()).await;
        child.stop().await;
        assert_eq!(read(), "hello\nhello\nhello\nbye\n");
        assert!(!places.pid_file("child").exists());
    }

    #[tokio::test]
    async fn what_an_earlier_supervisor_left_is_stopped_and_nothing_else() {
        let (_dir, places) = places();
        let mut left = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        let (pid, started) = (left.id(), start_time(left.id()).unwrap());
        let note = |started: u64| {
            let text = format!("{pid} {started}\n");
            files::write(&places.pid_file("child"), text.as_bytes(), 0o600).unwrap();
        };
        // Another process has the number since.
        note(started - 1);
        stop_stale(&places, "child").await;
        assert!(left.try_wait().unwrap().is_none());
        assert!(!places.pid_file("child").exists());

        note(started);
        let reaped = std::thread::spawn(move || left.wait().unwrap());
        stop_stale(&places, "child").await;
        assert!(!reaped.join().unwrap().success());
    }

    #[test]
    fn own_start_time_is_known_and_a_missing_process_has_none() {
        assert!(start_time(std::process::id()).is_some());
        assert_eq!(start_time(u32::MAX), None);
    }
}
