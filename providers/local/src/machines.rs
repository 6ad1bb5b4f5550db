//! Machines: making, starting, finding and removing them. What one is made of is in [`crate::init`].

use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use camino::Utf8PathBuf;
use ipnet::Ipv4Net;
use kprov_types::MachineName;
use kprov_types::machine::{Machine, MachineSpec, MachineState};

use crate::cgroup::Group;
use crate::config::LocalConfig;
use crate::error::LocalError;
use crate::init::{Boot, Report};
use crate::process::ProcessId;
use crate::state::{self, ClusterDir, Lock, MachineRecord};
use crate::{balancer, link, naming};

/// How long a killed machine may take until its last process has ended.
const END_PATIENCE: Duration = Duration::from_secs(10);

/// All machines of a cluster, as they are.
pub(crate) fn observe(dir: &ClusterDir) -> Result<Vec<Machine>, LocalError> {
    dir.machine_records()?
        .into_iter()
        .map(|record| describe(dir, record))
        .collect()
}

fn describe(dir: &ClusterDir, record: MachineRecord) -> Result<Machine, LocalError> {
    let running = is_running(dir, &record.name)?;
    Ok(Machine {
        id: naming::machine_tag(&dir.cluster, &record.name),
        name: record.name,
        role: record.role,
        address: Some(record.address.into()),
        external_address: None,
        zone: None,
        state: if running {
            MachineState::Running
        } else {
            MachineState::Stopped
        },
    })
}

fn is_running(dir: &ClusterDir, machine: &MachineName) -> Result<bool, LocalError> {
    Ok(state::read_json::<ProcessId>(&dir.machine(machine).init())?.is_some_and(|id| id.is_alive()))
}

/// Ensures machines, and starts those that don't run. A new one gets the address that is given, else a free one. The
/// cluster's lock must be held.
pub(crate) fn ensure(
    config: &LocalConfig,
    dir: &ClusterDir,
    want: &[(MachineSpec, Option<Ipv4Addr>)],
    lock: &Lock,
) -> Result<Vec<Machine>, LocalError> {
    let network = dir.network()?.ok_or_else(|| LocalError::NoNetwork {
        cluster: dir.cluster.clone(),
    })?;
    let mut records = dir.machine_records()?;
    let mut wanted = Vec::new();
    for (spec, address) in want {
        check(dir, spec)?;
        let record = match records.iter().find(|r| r.name == spec.name) {
            Some(record) if record.role != spec.role => {
                return Err(LocalError::RoleDiffers {
                    machine: spec.name.clone(),
                    has: record.role,
                    wanted: spec.role,
                });
            }
            Some(record) => record.clone(),
            None => {
                let record = make(dir, spec, *address, network.range, &records, lock)?;
                records.push(record.clone());
                record
            }
        };
        wanted.push(record);
    }
    balancer::write_backends(dir, network.api_port, &records)?;
    // All at once: each of them waits mostly for the kernel.
    let mut starting = Vec::new();
    let mut result = Ok(());
    for record in &wanted {
        if is_running(dir, &record.name)? {
            continue;
        }
        match start(config, dir, record, network.range, lock) {
            Ok(child) => starting.push((record, child)),
            Err(error) => result = result.and(Err(error)),
        }
    }
    // Every one of them is waited for, whatever became of the others: they hold the lock.
    for (record, child) in starting {
        result = result.and(started(&record.name, child));
    }
    result?;
    wanted.into_iter().map(|record| describe(dir, record)).collect()
}

/// Checks what is asked for, before anything is made.
fn check(dir: &ClusterDir, spec: &MachineSpec) -> Result<(), LocalError> {
    let MachineSpec {
        name,
        role: _,
        zone,
        size,
        image,
        first_boot,
        data_disk,
    } = spec;
    for (what, value) in [("zone", zone), ("size", size), ("image", image)] {
        if let Some(value) = value {
            return Err(LocalError::Unsupported {
                machine: name.clone(),
                what,
                value: value.clone(),
            });
        }
    }
    if !first_boot.0.starts_with("#!") {
        return Err(LocalError::NotAScript { machine: name.clone() });
    }
    if *data_disk && !dir.disk(name).is_dir() {
        return Err(LocalError::NoDisk { machine: name.clone() });
    }
    Ok(())
}

/// Makes the machine's directory: whole at once, by renaming it to its place.
fn make(
    dir: &ClusterDir,
    spec: &MachineSpec,
    address: Option<Ipv4Addr>,
    range: Ipv4Net,
    others: &[MachineRecord],
    lock: &Lock,
) -> Result<MachineRecord, LocalError> {
    let taken: Vec<Ipv4Addr> = others.iter().map(|r| r.address).collect();
    let address = match address {
        Some(address) => Some(address).filter(|a| naming::is_for_machines(range, *a) && !taken.contains(a)),
        None => naming::free_address(range, &taken),
    };
    let address = address.ok_or_else(|| LocalError::NoAddress {
        range,
        machine: spec.name.clone(),
    })?;
    let record = MachineRecord {
        name: spec.name.clone(),
        role: spec.role,
        address,
        data_disk: spec.data_disk,
    };
    // What a removal that was cut short may have left.
    clear(dir, &spec.name, lock)?;
    let place = dir.machine(&spec.name);
    let draft = state::MachineDir {
        path: dir.machines().join(format!(".{}.new", spec.name)),
    };
    let write = || {
        state::remove_tree(&draft.path)?;
        state::make_dir(&draft.path, 0o700)?;
        state::write_json(&draft.record(), &record)?;
        state::write_file(&draft.first_boot(), spec.first_boot.0.as_bytes(), 0o700)?;
        fs::rename(&draft.path, &place.path).map_err(LocalError::io("make", &place.path))
    };
    write().inspect_err(|_| {
        // A full disk: what is half made is in the way of those who free some.
        let _ = state::remove_tree(&draft.path);
    })?;
    Ok(record)
}

/// Starts a machine's launcher, which ends when the machine runs.
fn start(
    config: &LocalConfig,
    dir: &ClusterDir,
    record: &MachineRecord,
    range: Ipv4Net,
    lock: &Lock,
) -> Result<Child, LocalError> {
    let machine = dir.machine(&record.name);
    // Of a launcher or an init whose record was not written any more.
    let group = Group::member(&dir.cluster, record.name.as_str())?;
    group.kill()?;
    state::remove_file(&machine.init())?;
    let boot = Boot {
        cluster: dir.cluster.clone(),
        machine: record.name.clone(),
        address: record.address,
        range,
        disk: record.data_disk.then(|| dir.disk(&record.name)),
        hide: config
            .hide
            .iter()
            .map(|path| path.canonicalize_utf8().unwrap_or_else(|_| path.clone()))
            .collect(),
    };
    state::write_json(&machine.boot(), &boot)?;
    // The lock goes with the launcher: should this process be killed, no other one comes in between.
    Command::new(&config.room_exe)
        .args(["machine-room", "init", "launch", machine.path.as_str()])
        .stdin(lock.share()?)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(LocalError::io("run", &config.room_exe))
}

/// Waits for a launcher.
fn started(machine: &MachineName, child: Child) -> Result<(), LocalError> {
    let failed = |message: String, errno| LocalError::Start {
        machine: machine.clone(),
        message,
        errno,
    };
    let output = child
        .wait_with_output()
        .map_err(|e| failed(e.to_string(), e.raw_os_error()))?;
    match serde_json::from_slice(&output.stdout) {
        Ok(Report::Booted) => Ok(()),
        Ok(Report::Failed { message, errno }) => Err(failed(message, errno)),
        // It said nothing of its own: it was killed, or it is no program of ours.
        Err(_) => {
            let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            Err(failed(
                format!("its launcher ended with {}: {said}", output.status),
                None,
            ))
        }
    }
}

/// Removes machines; done already is success. The cluster's lock must be held.
///
/// As when the power is cut: nothing inside is asked. What must be kept is on the data disk, in files made to bear that.
pub(crate) fn remove(dir: &ClusterDir, machines: &[MachineName], lock: &Lock) -> Result<(), LocalError> {
    for name in machines {
        if let Some(id) = state::read_json::<ProcessId>(&dir.machine(name).init()).ok().flatten()
            && !id.kill(END_PATIENCE)
        {
            return Err(LocalError::StillRunning {
                what: format!("machine `{name}`"),
                pids: id.pid.to_string(),
            });
        }
        clear(dir, name, lock)?;
    }
    if let Some(network) = dir.network()? {
        balancer::write_backends(dir, network.api_port, &dir.machine_records()?)?;
    }
    Ok(())
}

/// Cuts a machine's power; what it wrote stays. Done already is success.
pub(crate) fn stop(dir: &ClusterDir, name: &MachineName) -> Result<(), LocalError> {
    let machine = dir.machine(name);
    if let Some(id) = state::read_json::<ProcessId>(&machine.init())?
        && !id.kill(END_PATIENCE)
    {
        return Err(LocalError::StillRunning {
            what: format!("machine `{name}`"),
            pids: id.pid.to_string(),
        });
    }
    Group::member(&dir.cluster, name.as_str())?.kill()
}

/// The first process of a machine that runs, as the host knows it.
pub(crate) fn init_of(dir: &ClusterDir, name: &MachineName) -> Result<Option<i32>, LocalError> {
    let id = state::read_json::<ProcessId>(&dir.machine(name).init())?;
    Ok(id.filter(ProcessId::is_alive).map(|id| id.pid))
}

/// Removes all there is of a machine that has no init any more.
fn clear(dir: &ClusterDir, name: &MachineName, lock: &Lock) -> Result<(), LocalError> {
    let group = Group::member(&dir.cluster, name.as_str())?;
    group.kill()?;
    let tag = naming::machine_tag(&dir.cluster, name);
    for link in link::links()?.iter().filter(|l| l.alias == tag) {
        link::remove(&link.name, lock.file())?;
    }
    group.remove()?;
    state::remove_tree(&dir.machine(name).path)?;
    state::remove_tree(&dir.machines().join(format!(".{name}.new")))
}

/// The end of what a machine has printed.
pub(crate) fn console(dir: &ClusterDir, machine: &MachineName) -> Result<Option<String>, LocalError> {
    const TAIL: usize = 64 * 1024;
    let mut text = Vec::new();
    let mut found = false;
    for file in [crate::init::console::OLDER[0], crate::init::console::CURRENT] {
        let path: Utf8PathBuf = dir.machine(machine).path.join(file);
        match fs::read(&path) {
            Ok(bytes) => {
                found = true;
                text.extend(bytes);
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(LocalError::io("read", path)(e)),
        }
    }
    let tail = &text[text.len().saturating_sub(TAIL)..];
    Ok(found.then(|| String::from_utf8_lossy(tail).into_owned()))
}

/// The data disks' names.
pub(crate) fn disks(dir: &ClusterDir) -> Result<Vec<MachineName>, LocalError> {
    Ok(state::names_in(&dir.disks())?
        .into_iter()
        .filter_map(|n| MachineName::new(n).ok())
        .collect())
}

/// Ensures data disks: directories that no machine owns.
pub(crate) fn ensure_disks(dir: &ClusterDir, machines: &[MachineName]) -> Result<(), LocalError> {
    for machine in machines {
        let disk = dir.disk(machine);
        state::make_dir(&disk, 0o755)?;
        // Whatever the caller's umask.
        fs::set_permissions(&disk, fs::Permissions::from_mode(0o755)).map_err(LocalError::io("set up", &disk))?;
    }
    Ok(())
}

/// Removes data disks with what is on them; done already is success. Their machines must be gone or stopped.
pub(crate) fn remove_disks(dir: &ClusterDir, machines: &[MachineName]) -> Result<(), LocalError> {
    for machine in machines {
        if is_running(dir, machine)? {
            return Err(LocalError::DiskInUse {
                machine: machine.clone(),
            });
        }
        state::remove_tree(&dir.disk(machine))?;
    }
    Ok(())
}
