//! A machine from the inside: what `kprov machine-room init` does.
//!
//! ```text
//! the provider          -> launch <machine dir>   network namespace and interface; ends when the machine runs
//!                            -> pid1 <machine dir>   all other namespaces, root file system, then the first-boot script
//!                       -> detach <cluster> <record> <arguments>   a process of this host that outlives its caller
//! ```
//!
//! `launch` and `detach` have the cluster's lock as their stdin, so that it holds until they are done, even when the
//! caller is killed. They leave no thing of the host inherited: no terminal, no open file, no working directory.

pub(crate) mod console;
mod root;
mod supervise;

pub(crate) use root::DATA;

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitCode, ExitStatus, Stdio};

use camino::{Utf8Path, Utf8PathBuf};
use ipnet::Ipv4Net;
use kprov_types::{ClusterName, MachineName};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::stat::{Mode, umask};
use serde::{Deserialize, Serialize};

use crate::cgroup::Group;
use crate::error::LocalError;
use crate::process::ProcessId;
use crate::state::{self, MachineDir};
use crate::{link, naming};

/// What programs inside a machine find in `PATH`.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What these processes are called in the host's process list, whatever path the program was started by.
const NAME: &str = "kprov";

/// `boot.json`: what a machine's launcher and init need to know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Boot {
    pub(crate) cluster: ClusterName,
    pub(crate) machine: MachineName,
    pub(crate) address: Ipv4Addr,
    pub(crate) range: Ipv4Net,
    /// The directory that is the data disk.
    pub(crate) disk: Option<Utf8PathBuf>,
    /// Directories of the host that aren't to be seen.
    pub(crate) hide: Vec<Utf8PathBuf>,
}

/// What init tells its launcher, and that tells the provider, on stdout.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Report {
    /// The first-boot script runs.
    Booted,
    /// It never will.
    Failed { message: String, errno: Option<i32> },
}

/// Why a machine could not be started, in its launcher's or its init's words.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InitError {
    /// The arguments are not those the provider passes.
    #[error("`machine-room init` is not meant to be called by hand")]
    Usage,
    #[error("cannot {what}")]
    System {
        what: String,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Local(#[from] LocalError),
    /// Said before by the one below.
    #[error("{0}")]
    Said(String, Option<i32>),
}

impl InitError {
    fn system<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> Self {
        move |source| Self::System {
            what: what.into(),
            source: source.into(),
        }
    }

    fn report(&self) -> Report {
        let mut message = self.to_string();
        let mut errno = None;
        if let Self::Said(_, said) = self {
            errno = *said;
        }
        let mut next = std::error::Error::source(self);
        while let Some(source) = next {
            message = format!("{message}: {source}");
            errno = errno.or_else(|| source.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error));
            next = source.source();
        }
        Report::Failed { message, errno }
    }
}

/// The hidden subcommand `machine-room init`, with the arguments behind it: what each machine's launcher and first
/// process run. `main` must call it before it starts threads, and end with what it returns.
pub fn machine_init(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments: Vec<String> = arguments.into_iter().filter_map(|a| a.into_string().ok()).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match arguments[..] {
        ["launch", dir] => launch(&MachineDir { path: dir.into() }).map(|()| tell(&Report::Booted)),
        ["pid1", dir] => pid1(&MachineDir { path: dir.into() }),
        ["detach", cluster, record, ref rest @ ..] => {
            // Its stdout is nobody's; its stderr is a log.
            return match detach(cluster, record.into(), rest) {
                Ok(never) => match never {},
                Err(error) => {
                    if let Report::Failed { message, .. } = error.report() {
                        let _ = writeln!(io::stderr(), "{message}");
                    }
                    ExitCode::FAILURE
                }
            };
        }
        _ => Err(InitError::Usage),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tell(&error.report());
            ExitCode::FAILURE
        }
    }
}

fn tell(report: &Report) {
    // Nobody listens any more: then nobody needs to know.
    if let Ok(text) = serde_json::to_string(report) {
        let _ = writeln!(io::stdout(), "{text}");
    }
}

fn read_boot(machine: &MachineDir) -> Result<Boot, InitError> {
    state::read_json(&machine.boot())?.ok_or(InitError::Usage)
}

/// No file that whoever started us happens to have open goes on to the programs we start: it would keep a terminal, a
/// pipe or a lock busy for as long as the machine runs.
fn inherit_nothing() -> Result<(), InitError> {
    #[expect(
        unsafe_code,
        reason = "no safe wrapper exists; it only sets a flag on files, and closes none"
    )]
    // SAFETY: takes three integers; with CLOSE_RANGE_CLOEXEC no file that anything here owns is closed.
    let result = unsafe { nix::libc::close_range(3, u32::MAX, nix::libc::CLOSE_RANGE_CLOEXEC.cast_signed()) };
    if result == 0 {
        Ok(())
    } else {
        Err(InitError::system("close inherited files")(io::Error::last_os_error()))
    }
}

/// The cluster's lock, which the provider gave as stdin.
fn lock() -> Result<File, InitError> {
    let lock = io::stdin().as_fd().try_clone_to_owned();
    lock.map(File::from)
        .map_err(InitError::system("hold the cluster's lock"))
}

/// Sets up what belongs to the host's side of a machine, and starts its init.
fn launch(machine: &MachineDir) -> Result<(), InitError> {
    inherit_nothing()?;
    let boot = read_boot(machine)?;
    Group::member(&boot.cluster, boot.machine.as_str())?.create()?;
    connect(&boot, &lock()?)?;
    // Only children are in the new process namespace; the first of them is its init. No other may be started from here.
    unshare(CloneFlags::CLONE_NEWPID).map_err(InitError::system("make a process namespace"))?;
    let mut child = Command::new("/proc/self/exe")
        .arg0(NAME)
        .args(["machine-room", "init", "pid1", machine.path.as_str()])
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(InitError::system("start the init"))?;
    let mut said = String::new();
    // Ends when init lets go of its stdout: after it has said how it went, or with it.
    if let Some(mut stdout) = child.stdout.take() {
        stdout
            .read_to_string(&mut said)
            .map_err(InitError::system("hear from the init"))?;
    }
    match serde_json::from_str(&said) {
        Ok(Report::Booted) => Ok(()),
        Ok(Report::Failed { message, errno }) => Err(InitError::Said(message, errno)),
        Err(_) => {
            let status = child.wait().map_err(InitError::system("wait for the init"))?;
            Err(InitError::Said(
                format!("its init ended early with {}", describe(status)),
                None,
            ))
        }
    }
}

/// Makes the machine's network namespace, with its interface on the cluster's bridge, and enters it.
///
/// All of this is done before a process of the machine exists: should this one be killed, the kernel takes the
/// namespace, and with it both ends of the interface, away.
fn connect(boot: &Boot, lock: &File) -> Result<(), InitError> {
    let this = |what: &str| File::open("/proc/thread-self/ns/net").map_err(InitError::system(what));
    let enter = |namespace: &File| {
        setns(namespace, CloneFlags::CLONE_NEWNET).map_err(InitError::system("enter a network namespace"))
    };
    let host = this("find the host's network namespace")?;
    unshare(CloneFlags::CLONE_NEWNET).map_err(InitError::system("make a network namespace"))?;
    let own = this("find the machine's network namespace")?;
    enter(&host)?;

    let Boot {
        cluster,
        machine,
        address,
        range,
        ..
    } = boot;
    let outside = naming::interface(cluster, *range, *address);
    let hardware = naming::hardware_address(cluster, *range, *address);
    // As left by one that was killed, or of a namespace that the kernel is about to take away.
    link::remove(&outside, lock)?;
    let namespace = format!("/proc/{}/fd/{}", std::process::id(), own.as_raw_fd());
    link::batch(
        &[
            format!("link add name {outside} type veth peer name eth0 address {hardware} netns {namespace}"),
            format!("link set dev {outside} alias {}", naming::machine_tag(cluster, machine)),
            format!("link set dev {outside} master {} up", naming::bridge(cluster)),
        ],
        lock,
    )?;

    enter(&own)?;
    link::batch(
        &[
            "link set dev lo up".into(),
            format!("address add {address}/{} dev eth0", range.prefix_len()),
            "link set dev eth0 up".into(),
            format!("route add default via {}", naming::gateway(*range)),
        ],
        lock,
    )?;
    Ok(())
}

/// The first process of a machine.
fn pid1(machine: &MachineDir) -> Result<(), InitError> {
    let boot = read_boot(machine)?;
    nix::unistd::setsid().map_err(InitError::system("begin a session"))?;
    umask(Mode::from_bits_truncate(0o022));
    // `/proc` is the host's still: the record is of the process as the host knows it.
    let id = ProcessId::current().map_err(InitError::system("find out about this process"))?;
    Group::member(&boot.cluster, boot.machine.as_str())?.join()?;
    state::write_json(&machine.init(), &id)?;
    unshare(
        CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUTS | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWCGROUP,
    )
    .map_err(InitError::system("make namespaces"))?;
    nix::unistd::sethostname(boot.machine.as_str()).map_err(InitError::system("set the host name"))?;
    let console = console::Console::open(&machine.path)?;
    let script = std::fs::read(machine.first_boot()).map_err(LocalError::io("read", machine.first_boot()))?;
    root::enter(&boot, machine)?;
    supervise::run(&script, console)
}

/// Detaches this process from whoever started it, puts it into the cluster's control group, records it, and lets it
/// become this same program with other arguments.
fn detach(cluster: &str, record: &Utf8Path, arguments: &[&str]) -> Result<std::convert::Infallible, InitError> {
    let cluster = ClusterName::new(cluster).map_err(|_| InitError::Usage)?;
    inherit_nothing()?;
    nix::unistd::setsid().map_err(InitError::system("begin a session"))?;
    Group::member(&cluster, naming::BALANCER_CGROUP)?.join()?;
    let id = ProcessId::current().map_err(InitError::system("find out about this process"))?;
    state::write_json(record, &id)?;
    let error = Command::new("/proc/self/exe")
        .arg0(NAME)
        .args(arguments)
        .current_dir("/")
        .stdin(Stdio::null())
        .exec();
    Err(InitError::system("start the program")(error))
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "no status".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_carry_the_cause_and_its_number() {
        let error = InitError::system("mount `x`")(nix::errno::Errno::ENOSPC);
        let Report::Failed { message, errno } = error.report() else {
            unreachable!("an error is no success")
        };
        assert_eq!(message, "cannot mount `x`: No space left on device (os error 28)");
        assert_eq!(errno, Some(28));
        let local = InitError::from(LocalError::io("write", "/x")(io::Error::from_raw_os_error(28)));
        assert!(matches!(local.report(), Report::Failed { errno: Some(28), .. }));
    }

    #[test]
    fn by_hand_it_says_so() {
        let code = format!("{:?}", machine_init([OsString::from("launch")]));
        assert_eq!(code, format!("{:?}", ExitCode::FAILURE));
    }
}
