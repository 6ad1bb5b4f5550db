//! Volumes as files behind loop devices.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};

/// The major number of loop devices (Linux's `Documentation/admin-guide/devices.txt`).
const LOOP: u64 = 7;

/// The directory that holds volumes' files.
#[derive(Debug, Clone)]
pub(super) struct Volumes {
    dir: Utf8PathBuf,
}

impl Volumes {
    pub(super) fn new(dir: Utf8PathBuf) -> Result<Self> {
        fs::create_dir_all(&dir).with_context(|| format!("can't make `{dir}`"))?;
        Ok(Self { dir })
    }

    fn file(&self, id: &str) -> Utf8PathBuf {
        self.dir.join(format!("{id}.img"))
    }

    /// The volume's block device; what was written to it before is still on it.
    pub(super) fn device(&self, id: &str, size_gib: u64) -> Result<Utf8PathBuf> {
        let file = self.file(id);
        if let Some((device, _)) = devices(&self.dir)?.into_iter().find(|(_, f)| *f == file) {
            return Ok(device);
        }
        if !file.exists() {
            let made = fs::File::create_new(&file).with_context(|| format!("can't make `{file}`"))?;
            made.set_len(size_gib << 30)?;
        }
        // Another process may take the one that was free a moment ago.
        let mut said = String::new();
        for _ in 0..5 {
            let free = losetup(&["--find"])?;
            ensure_node(free.trim())?;
            match losetup(&[free.trim(), file.as_str()]) {
                Ok(_) => return Ok(free.trim().into()),
                Err(error) => said = format!("{error:#}"),
            }
        }
        bail!("no loop device for volume `{id}`: {said}")
    }

    /// Removes the devices and files of all volumes but these.
    pub(super) fn keep_only(&self, ids: &BTreeSet<&str>) -> Result<()> {
        for (device, file) in devices(&self.dir)? {
            if !ids.contains(file.file_stem().unwrap_or_default()) {
                losetup(&["--detach", device.as_str()])?;
            }
        }
        for entry in self.dir.read_dir_utf8()? {
            let path = entry?.into_path();
            if !ids.contains(path.file_stem().unwrap_or_default()) {
                fs::remove_file(&path)?;
            }
        }
        Ok(())
    }
}

/// The label of the file system on a device, as udev would find it.
pub(super) fn label(device: &Utf8Path) -> Option<String> {
    let out = Command::new("blkid")
        .args(["-p", "-s", "LABEL", "-o", "value", device.as_str()])
        .output()
        .ok()?;
    let label = String::from_utf8_lossy(&out.stdout).trim().to_owned();
    (!label.is_empty()).then_some(label)
}

/// The loop devices whose file is in a directory.
fn devices(dir: &Utf8Path) -> Result<Vec<(Utf8PathBuf, Utf8PathBuf)>> {
    let mut found = Vec::new();
    for entry in Utf8Path::new("/sys/block").read_dir_utf8()? {
        let entry = entry?;
        // Devices without a file have no such directory.
        let Ok(file) = fs::read_to_string(entry.path().join("loop/backing_file")) else {
            continue;
        };
        // A file that was removed is still listed, with a note behind its name.
        let file = file.trim().trim_end_matches(" (deleted)");
        if Utf8Path::new(file).parent() == Some(dir) {
            found.push((Utf8Path::new("/dev").join(entry.file_name()), file.into()));
        }
    }
    Ok(found)
}

/// Where nobody makes device files (a host that is a container), the number that the kernel gave has none yet.
fn ensure_node(device: &str) -> Result<()> {
    let number: u64 = device
        .strip_prefix("/dev/loop")
        .and_then(|n| n.parse().ok())
        .with_context(|| format!("`losetup --find` said `{device}`"))?;
    let rdev = makedev(LOOP, number);
    if fs::metadata(device).is_ok_and(|m| m.rdev() == rdev) {
        return Ok(());
    }
    mknod(device, SFlag::S_IFBLK, Mode::from_bits_truncate(0o660), rdev)
        .with_context(|| format!("can't make `{device}`"))
}

fn losetup(args: &[&str]) -> Result<String> {
    let out = Command::new("losetup")
        .args(args)
        .output()
        .context("can't run losetup")?;
    ensure!(
        out.status.success(),
        "losetup {}: {}",
        args.join(" "),
        String::from_utf8_lossy(&out.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}
