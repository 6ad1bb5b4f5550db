//! The cluster's endpoint on this host: a process that balances over the control-plane machines, as a cloud's network
//! load balancer would. The program is the caller's; here it is started, watched for, and ended.

use std::fs::{self, OpenOptions};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use camino::{Utf8Path, Utf8PathBuf};
use kprov_types::Role;
use serde::{Deserialize, Serialize};

use crate::cgroup::Group;
use crate::error::LocalError;
use crate::process::ProcessId;
use crate::state::{self, ClusterDir, Lock, MachineRecord, NetworkRecord};
use crate::{naming, range};

/// How long the balancer may take until it listens.
const START_PATIENCE: Duration = Duration::from_secs(10);
/// How long it may take to end.
const END_PATIENCE: Duration = Duration::from_secs(5);

fn record_file(dir: &ClusterDir) -> Utf8PathBuf {
    dir.path.join("balancer.json")
}

fn log_file(dir: &ClusterDir) -> Utf8PathBuf {
    dir.path.join("balancer.log")
}

fn backends_file(dir: &ClusterDir) -> Utf8PathBuf {
    dir.path.join("backends.json")
}

/// What the balancer reads: `{"backends": ["10.89.0.2:6443"]}`.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Backends {
    backends: Vec<SocketAddrV4>,
}

/// Tells the balancer its backends: the control-plane machines, at the endpoint's port.
pub(crate) fn write_backends(dir: &ClusterDir, port: u16, machines: &[MachineRecord]) -> Result<(), LocalError> {
    let control_plane = machines.iter().filter(|m| m.role == Role::ControlPlane);
    let wanted = Backends {
        backends: control_plane.map(|m| SocketAddrV4::new(m.address, port)).collect(),
    };
    if state::read_json::<Backends>(&backends_file(dir))?.as_ref() == Some(&wanted) {
        return Ok(());
    }
    state::write_json(&backends_file(dir), &wanted)
}

/// Whether it runs.
pub(crate) fn is_running(dir: &ClusterDir) -> Result<bool, LocalError> {
    Ok(state::read_json::<ProcessId>(&record_file(dir))?.is_some_and(|id| id.is_alive()))
}

/// Ensures that it runs and listens.
pub(crate) fn ensure(dir: &ClusterDir, exe: &Utf8Path, network: &NetworkRecord, lock: &Lock) -> Result<(), LocalError> {
    if is_running(dir)? {
        return Ok(());
    }
    stop(dir)?;
    let address = SocketAddrV4::new(naming::gateway(network.range), network.api_port);
    if let Some(listener) = listener(*address.ip(), address.port())? {
        return Err(LocalError::PortTaken {
            address: *address.ip(),
            port: address.port(),
            listener,
        });
    }
    Group::member(&dir.cluster, naming::BALANCER_CGROUP)?.create()?;
    let log_path = log_file(dir);
    let log = OpenOptions::new()
        .create(true)
        .write(true)
        .truncate(true)
        .open(&log_path)
        .map_err(LocalError::io("write", &log_path))?;
    let failed = |message: String| LocalError::Balancer {
        cluster: dir.cluster.clone(),
        message,
    };
    let mut child = Command::new(exe)
        .args([
            "machine-room",
            "init",
            "detach",
            dir.cluster.as_str(),
            record_file(dir).as_str(),
        ])
        .args([
            "machine-room",
            "balancer",
            "--listen",
            &address.to_string(),
            "--state",
            dir.path.as_str(),
        ])
        .env_clear()
        .envs(std::env::vars().filter(|(name, _)| name == "PATH"))
        .stdin(lock.share()?)
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .map_err(LocalError::io("run", exe))?;
    let deadline = Instant::now() + START_PATIENCE;
    loop {
        if is_running(dir)? && listener(*address.ip(), address.port())?.is_some() {
            return Ok(());
        }
        let said = || fs::read_to_string(&log_path).unwrap_or_default().trim().to_owned();
        if let Some(status) = child.try_wait().map_err(LocalError::io("wait for", exe))? {
            return Err(failed(format!("{status}: {}", said())));
        }
        if Instant::now() > deadline {
            return Err(failed(format!("it does not listen on {address}: {}", said())));
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// Ends it and removes its files; done already is success.
pub(crate) fn remove(dir: &ClusterDir) -> Result<(), LocalError> {
    stop(dir)?;
    [record_file(dir), log_file(dir), backends_file(dir)]
        .iter()
        .try_for_each(|file| state::remove_file(file))
}

fn stop(dir: &ClusterDir) -> Result<(), LocalError> {
    let group = Group::member(&dir.cluster, naming::BALANCER_CGROUP)?;
    if let Some(id) = state::read_json::<ProcessId>(&record_file(dir))?
        && !id.kill(END_PATIENCE)
    {
        return Err(LocalError::StillRunning {
            what: "the balancer".into(),
            pids: id.pid.to_string(),
        });
    }
    group.kill()?;
    group.remove()
}

fn listener(address: Ipv4Addr, port: u16) -> Result<Option<String>, LocalError> {
    for table in ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"] {
        match fs::read_to_string(table) {
            Ok(text) => {
                if let Some(found) = range::listener(&text, address, port) {
                    return Ok(Some(found));
                }
            }
            // A kernel without IPv6.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(LocalError::io("read", table)(e)),
        }
    }
    Ok(None)
}
