//! Which of a host's disks is the data disk. Pure.

use crate::inventory::DiskMatch;
use crate::ssh::Reply;

const GIB: u64 = 1 << 30;

/// A disk as `lsblk` shows it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Device {
    /// Its name below `/dev`.
    name: String,
    size: u64,
    model: String,
    serial: String,
    /// Its name below `/dev/disk/by-id`, if it has one.
    stable: Option<String>,
}

/// All disks that can be written to.
pub(crate) fn devices(reply: &Reply) -> Vec<Device> {
    let mut found: Vec<Device> = reply.all("device").filter_map(device).collect();
    for link in reply.all("link") {
        let Some((link, target)) = link.split_once(' ') else {
            continue;
        };
        if let Some(device) = found.iter_mut().find(|d| format!("/dev/{}", d.name) == target) {
            // The first by name; which one doesn't matter, as long as it's the same each time.
            let better = device.stable.as_deref().is_none_or(|now| link < now);
            if better {
                device.stable = Some(link.to_owned());
            }
        }
    }
    found
}

/// `NAME="sda" TYPE="disk" SIZE="..." RO="0" MODEL="..." SERIAL="..."`, as `lsblk -P` prints it (values are escaped as `\x20`).
fn device(line: &str) -> Option<Device> {
    let mut device = Device::default();
    let mut rest = line;
    let mut writable = false;
    let mut is_disk = false;
    while let Some((name, tail)) = rest.split_once("=\"") {
        let (value, tail) = tail.split_once('"')?;
        match name.trim() {
            "NAME" => value.clone_into(&mut device.name),
            "TYPE" => is_disk = value == "disk",
            "SIZE" => device.size = value.parse().ok()?,
            "RO" => writable = value == "0",
            "MODEL" => value.replace("\\x20", " ").trim().clone_into(&mut device.model),
            "SERIAL" => value.trim().clone_into(&mut device.serial),
            _ => {}
        }
        rest = tail;
    }
    // Compressed memory and the like are disks for lsblk, too.
    let real = !["zram", "ram", "nbd", "fd"].iter().any(|p| device.name.starts_with(p));
    (is_disk && writable && real && device.size > 0).then_some(device)
}

/// The path of the one disk that fits. The error says why there is none.
pub(crate) fn choose(want: &DiskMatch, devices: &[Device]) -> Result<String, String> {
    if let Some(path) = &want.path {
        return Ok(path.clone());
    }
    let DiskMatch {
        path: _,
        model,
        serial,
        min_gib,
        max_gib,
    } = want;
    let fits = |device: &&Device| {
        model
            .as_ref()
            .is_none_or(|m| device.model.to_lowercase().contains(&m.to_lowercase()))
            && serial.as_ref().is_none_or(|s| device.serial == *s)
            && min_gib.is_none_or(|min| device.size >= u64::from(min) * GIB)
            && max_gib.is_none_or(|max| device.size <= u64::from(max) * GIB)
    };
    let fitting: Vec<&Device> = devices.iter().filter(fits).collect();
    match fitting.as_slice() {
        [one] => Ok(one.stable.clone().unwrap_or_else(|| format!("/dev/{}", one.name))),
        [] => Err(format!("none fits; there are {}", describe(devices.iter()))),
        more => Err(format!("more than one fits: {}", describe(more.iter().copied()))),
    }
}

/// The name of a disk's first partition, where the disk is called `path` and the kernel calls it `device`: udev appends `-part1` to
/// its stable names (udev's `60-persistent-storage.rules`), the kernel `1`, after a `p` where a digit comes before it.
pub(crate) fn first_partition(path: &str, device: &str) -> String {
    if path.starts_with("/dev/disk/by-") {
        format!("{path}-part1")
    } else if device.ends_with(|last: char| last.is_ascii_digit()) {
        format!("{device}p1")
    } else {
        format!("{device}1")
    }
}

fn describe<'a>(devices: impl Iterator<Item = &'a Device>) -> String {
    let all: Vec<String> = devices
        .map(|d| {
            let model = if d.model.is_empty() {
                String::new()
            } else {
                format!(", {}", d.model)
            };
            format!("`{}` ({} GiB{model})", d.name, d.size / GIB)
        })
        .collect();
    if all.is_empty() {
        "no disks".into()
    } else {
        all.join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Vec<Device> {
        let lines = [
            r#"NAME="sda" TYPE="disk" SIZE="512110190592" RO="0" MODEL="Samsung SSD 870" SERIAL="S1""#,
            r#"NAME="sdb" TYPE="disk" SIZE="107374182400" RO="0" MODEL="QEMU\x20HARDDISK" SERIAL="Q1""#,
            r#"NAME="sdc" TYPE="disk" SIZE="107374182400" RO="1" MODEL="" SERIAL="""#,
            r#"NAME="sr0" TYPE="rom" SIZE="1073741312" RO="0" MODEL="DVD" SERIAL="""#,
            r#"NAME="zram0" TYPE="disk" SIZE="1073741824" RO="0" MODEL="" SERIAL="""#,
        ];
        lines.iter().filter_map(|line| device(line)).collect()
    }

    #[test]
    fn disks_are_read_as_lsblk_prints_them() {
        let names: Vec<_> = all().into_iter().map(|d| (d.name, d.model)).collect();
        let expected = [("sda", "Samsung SSD 870"), ("sdb", "QEMU HARDDISK")];
        assert_eq!(names, expected.map(|(n, m)| (n.to_owned(), m.to_owned())));
    }

    #[test]
    fn exactly_one_disk_must_fit() {
        let want = |edit: fn(&mut DiskMatch)| {
            let mut want = DiskMatch::default();
            edit(&mut want);
            choose(&want, &all())
        };
        assert_eq!(want(|w| w.model = Some("samsung".into())).unwrap(), "/dev/sda");
        assert_eq!(want(|w| w.max_gib = Some(200)).unwrap(), "/dev/sdb");
        assert_eq!(want(|w| w.serial = Some("Q1".into())).unwrap(), "/dev/sdb");
        assert_eq!(
            want(|w| w.path = Some("/dev/disk/by-id/x".into())).unwrap(),
            "/dev/disk/by-id/x"
        );
        let why = want(|w| w.min_gib = Some(50)).unwrap_err();
        assert!(why.starts_with("more than one fits: `sda` (476 GiB, Samsung"), "{why}");
        let why = want(|w| w.min_gib = Some(5000)).unwrap_err();
        assert!(why.starts_with("none fits; there are `sda`"), "{why}");
    }

    #[test]
    fn partitions_are_named_as_udev_and_the_kernel_name_them() {
        let named = |path, device, partition| assert_eq!(first_partition(path, device), partition);
        named("/dev/sdb", "/dev/sdb", "/dev/sdb1");
        named("/dev/nvme0n1", "/dev/nvme0n1", "/dev/nvme0n1p1");
        named(
            "/dev/disk/by-id/wwn-0x5000",
            "/dev/sdb",
            "/dev/disk/by-id/wwn-0x5000-part1",
        );
        // A name that somebody else gave it.
        named("/dev/etcd", "/dev/vdb", "/dev/vdb1");
    }

    #[test]
    fn the_stable_name_is_preferred() {
        let mut devices = all();
        devices[1].stable = Some("/dev/disk/by-id/scsi-Q1".into());
        let want = DiskMatch {
            serial: Some("Q1".into()),
            ..DiskMatch::default()
        };
        assert_eq!(choose(&want, &devices).unwrap(), "/dev/disk/by-id/scsi-Q1");
    }
}
