//! What can go wrong with machines on this host.

use std::io;
use std::net::Ipv4Addr;
use std::path::Path;
use std::time::Duration;

use ipnet::Ipv4Net;
use kprov_provider::ProviderError;
use kprov_types::{ClusterName, MachineName};
use nix::errno::Errno;

/// An error of the local provider.
#[derive(Debug, thiserror::Error)]
pub enum LocalError {
    /// The caller may not make namespaces.
    #[error("machines on this host need the capability `{missing}`, which this process lacks")]
    NotRoot {
        /// The capability, such as `CAP_SYS_ADMIN`.
        missing: &'static str,
    },
    /// A program of the host is not installed.
    #[error("the program `{program}` is not installed")]
    MissingProgram {
        /// Its name.
        program: &'static str,
    },
    /// A program of the host failed.
    #[error("`{command}` failed: {output}")]
    Command {
        /// The command line.
        command: String,
        /// What it wrote to stderr.
        output: String,
    },
    /// A program's output could not be read.
    #[error("cannot make sense of what `{command}` printed")]
    Output {
        /// The command line.
        command: String,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// A system call on a file failed.
    #[error("cannot {action} `{path}`")]
    Io {
        /// What was tried, such as `write`.
        action: &'static str,
        /// On which file.
        path: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A record in the state directory is damaged.
    #[error("the record `{path}` is damaged")]
    Record {
        /// The file.
        path: String,
        /// Why it can't be read.
        #[source]
        source: serde_json::Error,
    },
    /// The state directory cannot hold machines.
    #[error("the state directory `{path}` {why}")]
    StateDir {
        /// The directory.
        path: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// Another process is changing the same thing.
    #[error("{what} is being changed by another process")]
    Busy {
        /// What is locked.
        what: String,
    },
    /// The range asked for, or a part of it, is used.
    #[error("the address range `{range}` is in use by {by}")]
    RangeTaken {
        /// The range asked for.
        range: Ipv4Net,
        /// Who uses it.
        by: String,
    },
    /// No range is free.
    #[error("no free /24 is left in `10.89.0.0/16` and `172.30.0.0/16`")]
    NoFreeRange,
    /// The cluster has a different network already.
    #[error("cluster `{cluster}` has the network `{has}`, not `{wanted}`")]
    NetworkDiffers {
        /// The cluster.
        cluster: ClusterName,
        /// What it has.
        has: String,
        /// What is wanted.
        wanted: String,
    },
    /// Something else listens on the API's port.
    #[error("port {port} is in use on `{address}`: a process of this host listens on `{listener}`")]
    PortTaken {
        /// The endpoint's address.
        address: Ipv4Addr,
        /// The endpoint's port.
        port: u16,
        /// Where the other one listens.
        listener: String,
    },
    /// An interface has the name that the cluster's would have.
    #[error("the interface `{interface}` is not cluster `{cluster}`'s")]
    ForeignInterface {
        /// Its name.
        interface: String,
        /// The cluster that would need it.
        cluster: ClusterName,
    },
    /// The cluster's processes run, but this state directory does not know them.
    #[error("a cluster `{cluster}` runs on this host already, from a state directory other than `{state_dir}`")]
    TakenName {
        /// The cluster.
        cluster: ClusterName,
        /// The state directory in use.
        state_dir: String,
    },
    /// Machines need a network first.
    #[error("cluster `{cluster}` has no network")]
    NoNetwork {
        /// The cluster.
        cluster: ClusterName,
    },
    /// The range has no such address left.
    #[error("the range `{range}` has no address left for machine `{machine}`, or the one asked for is taken")]
    NoAddress {
        /// The machines' range.
        range: Ipv4Net,
        /// The machine.
        machine: MachineName,
    },
    /// The data disk was not made before its machine.
    #[error("machine `{machine}` has no data disk")]
    NoDisk {
        /// The machine.
        machine: MachineName,
    },
    /// The data disk's machine runs.
    #[error("the data disk of machine `{machine}` is in use")]
    DiskInUse {
        /// The machine.
        machine: MachineName,
    },
    /// A machine of this name exists and is different.
    #[error("machine `{machine}` exists with the role `{has}`, not `{wanted}`")]
    RoleDiffers {
        /// The machine.
        machine: MachineName,
        /// Its role.
        has: kprov_types::Role,
        /// The role wanted.
        wanted: kprov_types::Role,
    },
    /// The machine asks for what only clouds have.
    #[error("machine `{machine}` asks for the {what} `{value}`, but machines on this host have none")]
    Unsupported {
        /// The machine.
        machine: MachineName,
        /// `zone`, `size` or `image`.
        what: &'static str,
        /// What was asked for.
        value: String,
    },
    /// The first-boot data cannot be run.
    #[error("the first-boot data of machine `{machine}` does not start with `#!`")]
    NotAScript {
        /// The machine.
        machine: MachineName,
    },
    /// A machine did not start.
    #[error("machine `{machine}` did not start: {message}")]
    Start {
        /// The machine.
        machine: MachineName,
        /// What its init said.
        message: String,
        /// The system's error number, where there is one.
        errno: Option<i32>,
    },
    /// A device can't be shown inside a machine.
    #[error(
        "`{device}` cannot be attached to machine `{machine}` as `{inside}`: it is no block device, the machine does not run, or that path is not below `/dev`"
    )]
    NotAttached {
        /// The machine.
        machine: MachineName,
        /// The device of this host.
        device: String,
        /// The path inside.
        inside: String,
    },
    /// The balancer did not start.
    #[error("the balancer of cluster `{cluster}` did not start: {message}")]
    Balancer {
        /// The cluster.
        cluster: ClusterName,
        /// What it wrote last.
        message: String,
    },
    /// The network is still needed.
    #[error("cluster `{cluster}` still has the machine `{machine}`")]
    StillHasMachines {
        /// The cluster.
        cluster: ClusterName,
        /// One of its machines.
        machine: MachineName,
    },
    /// Processes do not end.
    #[error("processes of `{what}` do not end: {pids}")]
    StillRunning {
        /// Whose processes.
        what: String,
        /// Their ids, with commas.
        pids: String,
    },
}

impl LocalError {
    /// For `map_err`: an I/O error with what was tried on which file.
    pub(crate) fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io {
            action,
            path: path.as_ref().display().to_string(),
            source,
        }
    }

    fn errno(&self) -> Option<Errno> {
        match self {
            Self::Io { source, .. } => source.raw_os_error().map(Errno::from_raw),
            Self::Start { errno, .. } => errno.map(Errno::from_raw),
            _ => None,
        }
    }
}

impl From<LocalError> for ProviderError {
    fn from(error: LocalError) -> Self {
        let advice_never = |hint: &str| {
            let plain = ProviderError::never(error.to_string());
            if hint.is_empty() { plain } else { plain.hint(hint) }
        };
        let made = match &error {
            LocalError::NotRoot { .. } => advice_never("run as root"),
            LocalError::MissingProgram { program: "ip" } => advice_never("install the package `iproute2`"),
            LocalError::Busy { .. } => ProviderError::retry_after(error.to_string(), Duration::from_secs(1)),
            LocalError::StillRunning { .. } => ProviderError::retry_after(error.to_string(), Duration::from_secs(2)),
            LocalError::Record { .. } => advice_never("remove that file and run it again"),
            LocalError::StateDir { .. } => advice_never("choose another state directory"),
            LocalError::RangeTaken { .. } => {
                advice_never("set `spec.network.machines` to a free range, or leave it out")
            }
            LocalError::NoFreeRange => advice_never("set `spec.network.machines` to a free range"),
            LocalError::NetworkDiffers { .. } => {
                advice_never("a cluster's network cannot change; remove the cluster or give it another name")
            }
            LocalError::PortTaken { .. } => advice_never("stop that process; `ss -ltnp` names it"),
            LocalError::TakenName { .. } => advice_never("choose another name, or remove that cluster first"),
            LocalError::ForeignInterface { .. } => advice_never("choose another name for the cluster"),
            LocalError::NoAddress { .. } => advice_never("use a larger `spec.network.machines`"),
            LocalError::Start { .. } | LocalError::Io { .. } => match error.errno() {
                Some(Errno::ENOSPC | Errno::EDQUOT) => {
                    advice_never("the file system is full; free some space and run it again")
                }
                Some(Errno::EACCES | Errno::EPERM) => advice_never("run as root"),
                _ => advice_never(""),
            },
            _ => advice_never(""),
        };
        match error {
            LocalError::Io { source, .. } => made.caused_by(source),
            LocalError::Record { source, .. } | LocalError::Output { source, .. } => made.caused_by(source),
            _ => made,
        }
    }
}
