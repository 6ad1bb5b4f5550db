//! What the state directory holds, and how it is written: whole files only, so that a killed process leaves either the
//! old record or the new one.
//!
//! ```text
//! <state_dir>/<cluster>/lock                      held while something of the cluster changes
//!                       network.json balancer.json balancer.log backends.json
//!                       disks/<machine>/          the data disk
//!                       machines/<machine>/       machine.json boot.json first-boot init.json console.log
//!                                                 upper/ work/ root/ (overlay) real/ (directories that must not be one)
//! ```

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::net::Ipv4Addr;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::thread;
use std::time::{Duration, Instant};

use camino::{Utf8Path, Utf8PathBuf};
use ipnet::Ipv4Net;
use kprov_types::{ClusterName, MachineName, Role};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::LocalError;

/// How long a call waits for another one that changes the same cluster; long enough for a start that outlived its caller.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

/// The file in a cluster's directory that is locked.
const LOCK: &str = "lock";

/// Guards what all clusters of the host share: address ranges and host-wide settings.
const HOST_DIR: &str = "/run/kprov";

/// `network.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct NetworkRecord {
    pub(crate) range: Ipv4Net,
    pub(crate) api_port: u16,
}

/// `machine.json`: what a machine is. Written once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MachineRecord {
    pub(crate) name: MachineName,
    pub(crate) role: Role,
    pub(crate) address: Ipv4Addr,
    pub(crate) data_disk: bool,
}

/// Where everything of one cluster is.
#[derive(Clone, Debug)]
pub(crate) struct ClusterDir {
    pub(crate) cluster: ClusterName,
    pub(crate) path: Utf8PathBuf,
}

impl ClusterDir {
    pub(crate) fn new(state_dir: &Utf8Path, cluster: &ClusterName) -> Self {
        Self {
            cluster: cluster.clone(),
            path: state_dir.join(cluster.as_str()),
        }
    }

    pub(crate) fn network_file(&self) -> Utf8PathBuf {
        self.path.join("network.json")
    }

    pub(crate) fn machines(&self) -> Utf8PathBuf {
        self.path.join("machines")
    }

    pub(crate) fn machine(&self, name: &MachineName) -> MachineDir {
        MachineDir {
            path: self.machines().join(name.as_str()),
        }
    }

    pub(crate) fn disks(&self) -> Utf8PathBuf {
        self.path.join("disks")
    }

    pub(crate) fn disk(&self, machine: &MachineName) -> Utf8PathBuf {
        self.disks().join(machine.as_str())
    }

    /// Removes everything but the lock: with no machine, disk or network left, that is halves, as a killed call leaves
    /// them.
    pub(crate) fn remove_halves(&self) -> Result<(), LocalError> {
        let list = || self.path.read_dir_utf8()?.collect::<io::Result<Vec<_>>>();
        for entry in list().map_err(LocalError::io("list", &self.path))? {
            if entry
                .file_type()
                .map_err(LocalError::io("look at", entry.path()))?
                .is_dir()
            {
                remove_tree(entry.path())?;
            } else if entry.file_name() != LOCK {
                remove_file(entry.path())?;
            }
        }
        Ok(())
    }

    /// The network's record, if there is one.
    pub(crate) fn network(&self) -> Result<Option<NetworkRecord>, LocalError> {
        read_json(&self.network_file())
    }

    /// The records of all machines, by name. A directory without a record is no machine: its making or removal was cut
    /// short, and it is cleared away by the next one.
    pub(crate) fn machine_records(&self) -> Result<Vec<MachineRecord>, LocalError> {
        let mut records = Vec::new();
        for name in names_in(&self.machines())? {
            if let Ok(name) = MachineName::new(name)
                && let Some(record) = read_json(&self.machine(&name).record())?
            {
                records.push(record);
            }
        }
        Ok(records)
    }
}

/// Where everything of one machine is, but for its data disk.
#[derive(Clone, Debug)]
pub(crate) struct MachineDir {
    pub(crate) path: Utf8PathBuf,
}

impl MachineDir {
    pub(crate) fn record(&self) -> Utf8PathBuf {
        self.path.join("machine.json")
    }

    pub(crate) fn boot(&self) -> Utf8PathBuf {
        self.path.join("boot.json")
    }

    pub(crate) fn first_boot(&self) -> Utf8PathBuf {
        self.path.join("first-boot")
    }

    pub(crate) fn init(&self) -> Utf8PathBuf {
        self.path.join("init.json")
    }
}

/// The names in a directory, sorted; none if there is no such directory. Names that begin with a dot are passed over:
/// no cluster or machine is called so.
pub(crate) fn names_in(dir: &Utf8Path) -> Result<Vec<String>, LocalError> {
    let entries = match dir.read_dir_utf8() {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(LocalError::io("list", dir)(e)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let name = entry.map_err(LocalError::io("list", dir))?.file_name().to_owned();
        if !name.starts_with('.') {
            names.push(name);
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// Reads a record; `None` if there is none.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Utf8Path) -> Result<Option<T>, LocalError> {
    match fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|source| LocalError::Record {
                path: path.to_string(),
                source,
            }),
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
        Err(e) => Err(LocalError::io("read", path)(e)),
    }
}

/// Writes a record, whole or not at all.
pub(crate) fn write_json<T: Serialize>(path: &Utf8Path, value: &T) -> Result<(), LocalError> {
    let bytes = serde_json::to_vec_pretty(value).map_err(|source| LocalError::Record {
        path: path.to_string(),
        source,
    })?;
    write_file(path, &bytes, 0o600)
}

/// Writes a file, whole or not at all, even across a power cut.
pub(crate) fn write_file(path: &Utf8Path, bytes: &[u8], mode: u32) -> Result<(), LocalError> {
    let temporary = path.with_file_name(format!(".{}.new", path.file_name().unwrap_or_default()));
    let write = || {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(mode)
            .open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    write().map_err(|e| {
        // What could not be written whole (a full disk) must not stay half.
        let _ = fs::remove_file(&temporary);
        LocalError::io("write", path)(e)
    })
}

/// Makes a directory and those above it; done already is success.
pub(crate) fn make_dir(path: &Utf8Path, mode: u32) -> Result<(), LocalError> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(LocalError::io("make the directory", parent))?;
    }
    match DirBuilder::new().mode(mode).create(path) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other.map_err(LocalError::io("make the directory", path)),
    }
}

/// Removes a file; done already is success.
pub(crate) fn remove_file(path: &Utf8Path) -> Result<(), LocalError> {
    done_already(fs::remove_file(path)).map_err(LocalError::io("remove", path))
}

/// Removes a directory with everything in it; done already is success. It is renamed first, so that what is removed
/// half is not found as what it was.
pub(crate) fn remove_tree(path: &Utf8Path) -> Result<(), LocalError> {
    let gone = path.with_file_name(format!(".{}.gone", path.file_name().unwrap_or_default()));
    for rename in [false, true] {
        // The first round clears what an earlier removal left under the name that the second one needs.
        if rename {
            done_already(fs::rename(path, &gone)).map_err(LocalError::io("remove", path))?;
        }
        done_already(fs::remove_dir_all(&gone)).map_err(LocalError::io("remove", &gone))?;
    }
    Ok(())
}

/// Removes a directory that nothing is in; one that isn't empty, or that a file system is mounted at, stays.
pub(crate) fn remove_empty_dir(path: &Utf8Path) -> Result<(), LocalError> {
    match done_already(fs::remove_dir(path)) {
        Err(e) if matches!(e.kind(), io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::ResourceBusy) => Ok(()),
        other => other.map_err(LocalError::io("remove", path)),
    }
}

fn done_already(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// A lock that ends with its holder: `flock(2)` on a file. A child that is given [`Lock::share`] holds it too, so that it
/// is not broken when the caller is killed.
#[derive(Debug)]
pub(crate) struct Lock {
    file: File,
    path: Utf8PathBuf,
}

impl Lock {
    /// Locks a cluster against other changes.
    pub(crate) fn cluster(state_dir: &Utf8Path, dir: &ClusterDir) -> Result<Self, LocalError> {
        let prepare = || {
            make_dir(state_dir, 0o700)?;
            make_dir(&dir.path, 0o700)
        };
        Self::take(dir.path.join(LOCK), prepare, || format!("cluster `{}`", dir.cluster))
    }

    /// Locks what all clusters of this host share.
    pub(crate) fn host() -> Result<Self, LocalError> {
        let path = Utf8Path::new(HOST_DIR).join("local.lock");
        Self::take(
            path,
            || make_dir(HOST_DIR.into(), 0o755),
            || "this host's network".into(),
        )
    }

    fn take(
        path: Utf8PathBuf,
        prepare: impl Fn() -> Result<(), LocalError>,
        what: impl Fn() -> String,
    ) -> Result<Self, LocalError> {
        let deadline = Instant::now() + LOCK_PATIENCE;
        loop {
            prepare()?;
            match OpenOptions::new()
                .create(true)
                .truncate(false)
                .write(true)
                .mode(0o600)
                .open(&path)
            {
                Ok(file) => match file.try_lock() {
                    // The last holder may have removed the file in between: then the lock is on nothing.
                    Ok(()) if is_same_file(&file, &path) => return Ok(Self { file, path }),
                    Ok(()) => continue,
                    Err(TryLockError::WouldBlock) => {}
                    Err(TryLockError::Error(e)) => return Err(LocalError::io("lock", &path)(e)),
                },
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(LocalError::io("lock", &path)(e)),
            }
            if Instant::now() > deadline {
                return Err(LocalError::Busy { what: what() });
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// The file that is locked. It stays so as long as a clone of it is open anywhere.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// A handle that keeps the lock, for a child's stdin.
    pub(crate) fn share(&self) -> Result<File, LocalError> {
        self.file.try_clone().map_err(LocalError::io("lock", &self.path))
    }

    /// Gives the lock up and removes its file, with the directories above that nothing is in any more.
    pub(crate) fn remove(self, directories: &[&Utf8Path]) -> Result<(), LocalError> {
        remove_file(&self.path)?;
        directories.iter().try_for_each(|dir| remove_empty_dir(dir))
    }
}

fn is_same_file(file: &File, path: &Utf8Path) -> bool {
    match (file.metadata(), fs::metadata(path)) {
        (Ok(a), Ok(b)) => a.ino() == b.ino() && a.dev() == b.dev(),
        _ => false,
    }
}

/// What kprov changed of the host as a whole, kept in `/run` because a restart undoes both.
pub(crate) fn host_file(name: &str) -> Utf8PathBuf {
    Utf8Path::new(HOST_DIR).join(name)
}

/// The directory of [`host_file`].
pub(crate) fn host_dir() -> &'static Utf8Path {
    Utf8Path::new(HOST_DIR)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn temporary() -> (tempfile::TempDir, Utf8PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = Utf8PathBuf::from_path_buf(dir.path().to_owned()).unwrap();
        (dir, path)
    }

    #[test]
    fn records_are_whole_or_absent() {
        let (_keep, dir) = temporary();
        let file = dir.join("a.json");
        assert_eq!(read_json::<u32>(&file).unwrap(), None);
        write_json(&file, &7).unwrap();
        assert_eq!(read_json(&file).unwrap(), Some(7));
        assert_eq!(names_in(&dir).unwrap(), ["a.json"]);
        fs::write(&file, "{").unwrap();
        assert!(matches!(read_json::<u32>(&file), Err(LocalError::Record { .. })));
        // A record whose place is taken by a directory can't be written; nothing half is left.
        let taken = dir.join("taken");
        fs::create_dir(&taken).unwrap();
        assert!(write_json(&taken, &7).is_err());
        assert!(!dir.join(".taken.new").exists());
    }

    #[test]
    fn machines_without_a_record_are_none() {
        let (_keep, dir) = temporary();
        let cluster = ClusterDir::new(&dir, &ClusterName::new("demo").unwrap());
        assert!(cluster.machine_records().unwrap().is_empty());
        make_dir(&cluster.machines().join("half-made"), 0o700).unwrap();
        make_dir(&cluster.machines().join(".other.gone"), 0o700).unwrap();
        assert!(cluster.machine_records().unwrap().is_empty());
    }

    #[test]
    fn removing_twice_is_success() {
        let (_keep, dir) = temporary();
        let tree = dir.join("tree");
        make_dir(&tree.join("below"), 0o700).unwrap();
        // As left by a removal that was cut short.
        make_dir(&dir.join(".tree.gone/old"), 0o700).unwrap();
        for _ in 0..2 {
            remove_tree(&tree).unwrap();
            remove_file(&dir.join("none")).unwrap();
        }
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
    }

    #[test]
    fn a_lock_holds_until_its_last_handle_closes() {
        let (_keep, dir) = temporary();
        let cluster = ClusterDir::new(&dir, &ClusterName::new("demo").unwrap());
        let lock = Lock::cluster(&dir, &cluster).unwrap();
        let shared = lock.share().unwrap();
        drop(lock);
        let other = OpenOptions::new().write(true).open(cluster.path.join("lock")).unwrap();
        assert!(matches!(other.try_lock(), Err(TryLockError::WouldBlock)));
        drop(shared);
        other.try_lock().unwrap();
    }

    #[test]
    fn a_lock_file_that_was_removed_is_no_lock() {
        let (_keep, dir) = temporary();
        let cluster = ClusterDir::new(&dir, &ClusterName::new("demo").unwrap());
        let first = Lock::cluster(&dir, &cluster).unwrap();
        let waiter = {
            let (dir, cluster) = (dir.clone(), cluster.clone());
            thread::spawn(move || Lock::cluster(&dir, &cluster).unwrap())
        };
        // Whether the other one has opened the old file yet or not, it ends with a lock on the new one.
        first.remove(&[&cluster.path]).unwrap();
        let second = waiter.join().unwrap();
        assert!(is_same_file(&second.file, &cluster.path.join("lock")));
    }
}
