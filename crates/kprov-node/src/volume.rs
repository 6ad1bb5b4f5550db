//! The data disk: used as it is where the machine has it mounted, or else formatted, once, and mounted.

use std::io;
use std::process::Output;
use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};
use kprov_types::machine::DataVolume;
use nix::mount::{MsFlags, mount};
use tokio::process::Command;

use crate::files::{self, FileError};
use crate::paths;

/// The label of the file system on a data disk.
const LABEL: &str = "kprov-data";
/// What `blkid -p` ends with when it finds nothing on a device (blkid(8)).
const NOTHING_FOUND: i32 = 2;

/// How long a data disk may take to appear. A cloud attaches it within seconds of the machine's start.
const APPEARANCE_LIMIT: Duration = Duration::from_mins(2);
/// How often it's looked for.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// Why there is no data volume.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// The directory is not there.
    #[error("the data directory `{0}` is not there")]
    NoDirectory(String),
    /// The device did not appear.
    #[error("there is no data disk at `{0}`")]
    NoDevice(String),
    /// A file.
    #[error(transparent)]
    File(#[from] FileError),
    /// A program cannot be run.
    #[error("cannot run `{program}`")]
    Run {
        /// The program.
        program: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A program failed.
    #[error("`{program}` on `{device}` failed: {message}")]
    Failed {
        /// The program.
        program: &'static str,
        /// The device.
        device: String,
        /// What it said.
        message: String,
    },
    /// The device holds something else.
    #[error("the data disk `{device}` holds `{found}`, not an empty disk or ext4; it is left alone")]
    Foreign {
        /// The device.
        device: String,
        /// The type found.
        found: String,
    },
    /// It cannot be mounted.
    #[error("cannot mount `{device}`")]
    Mount {
        /// The device.
        device: String,
        /// Why.
        #[source]
        source: nix::Error,
    },
}

/// The directory for etcd's data, made ready, with mode 0700.
pub async fn etcd_directory(volume: Option<&DataVolume>) -> Result<Utf8PathBuf, VolumeError> {
    let directory = match volume {
        None => Utf8PathBuf::from(paths::ETCD_DATA),
        Some(DataVolume::Directory(path)) if Utf8Path::new(path).is_dir() => Utf8Path::new(path).join("etcd"),
        Some(DataVolume::Directory(path)) => return Err(VolumeError::NoDirectory(path.clone())),
        Some(DataVolume::Device(candidates)) => {
            mount_device(candidates).await?;
            Utf8Path::new(paths::DATA_MOUNT).join("etcd")
        }
    };
    files::make_directory(&directory, 0o700)?;
    Ok(directory)
}

async fn mount_device(candidates: &[String]) -> Result<(), VolumeError> {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    if mounts
        .lines()
        .any(|line| line.split(' ').nth(1) == Some(paths::DATA_MOUNT))
    {
        return Ok(());
    }
    // Device names may change from boot to boot; the label of a disk that was formatted here does not. A stable name is better
    // still: another disk may have the label of a cluster that was here before.
    let stable = candidates.iter().any(|path| path.starts_with("/dev/disk/by-"));
    let labelled = format!("/dev/disk/by-label/{LABEL}");
    let device = if !stable && Utf8Path::new(&labelled).exists() {
        labelled
    } else {
        appearance(candidates).await?
    };
    // The kernel's own name, not a link's: by that other programs see in `/proc/mounts` that the disk is in use.
    let device = Utf8Path::new(&device)
        .canonicalize_utf8()
        .map_or(device, Utf8PathBuf::into_string);
    let failed = |program, output: &Output| VolumeError::Failed {
        program,
        device: device.clone(),
        message: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    };
    let probe = run("blkid", &["-p", "-s", "TYPE", "-s", "PTTYPE", "-o", "value", &device]).await?;
    let found = String::from_utf8_lossy(&probe.stdout);
    let found = found.split_whitespace().collect::<Vec<_>>().join(", ");
    match (probe.status.code(), found.as_str()) {
        (Some(0), "ext4") => {}
        // Of a partition it always knows something: its entry in the table.
        (Some(NOTHING_FOUND | 0), "") => {
            tracing::info!(device, "formatting the empty data disk");
            let made = run("mkfs.ext4", &["-q", "-L", LABEL, &device]).await?;
            if !made.status.success() {
                return Err(failed("mkfs.ext4", &made));
            }
        }
        (Some(0), _) => return Err(VolumeError::Foreign { device, found }),
        _ => return Err(failed("blkid", &probe)),
    }
    files::make_directory(Utf8Path::new(paths::DATA_MOUNT), 0o700)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_NOATIME;
    mount(
        Some(device.as_str()),
        paths::DATA_MOUNT,
        Some("ext4"),
        flags,
        None::<&str>,
    )
    .map_err(|source| VolumeError::Mount { device, source })
}

/// The first candidate to appear: a cloud attaches disks while the machine boots already.
async fn appearance(candidates: &[String]) -> Result<String, VolumeError> {
    let start = tokio::time::Instant::now();
    loop {
        if let Some(there) = candidates.iter().find(|path| Utf8Path::new(path).exists()) {
            return Ok(there.clone());
        }
        if start.elapsed() > APPEARANCE_LIMIT {
            return Err(VolumeError::NoDevice(candidates.join("`, `")));
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

async fn run(program: &'static str, args: &[&str]) -> Result<Output, VolumeError> {
    Command::new(program)
        .args(args)
        .output()
        .await
        .map_err(|source| VolumeError::Run { program, source })
}
