//! A machine's root file system: an overlay of the host's, with everything of its own that a machine has.
//!
//! All mounts are made in the machine's own mount namespace and end with it; the host sees none of them.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};

use camino::{Utf8Path, Utf8PathBuf};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, SFlag, mknod};

use super::{Boot, InitError};
use crate::cgroup::{self, Hierarchy, Kind};
use crate::error::LocalError;
use crate::naming;
use crate::state::{self, MachineDir};

/// Directories that a machine begins with empty, whatever the host has in them: a host that runs something itself is
/// not mixed in.
const FRESH: [&str; 7] = [
    "etc/kubernetes",
    "etc/kprov",
    "etc/cni",
    "etc/containerd",
    "var/lib/etcd",
    "var/lib/cni",
    "opt/cni",
];

/// Directories that are no overlay: containerd's snapshots are overlays themselves, which cannot be stacked at will, and
/// kubelet measures the disk. Each with its name in the machine's directory.
const REAL: [(&str, &str); 5] = [
    ("var/lib/containerd", "containerd"),
    ("var/lib/kubelet", "kubelet"),
    ("var/lib/kprov", "kprov"),
    ("var/log/pods", "pods"),
    ("var/log/containers", "containers"),
];

/// Where a host may have programs on a file system of their own, which an overlay of `/` does not reach.
const PROGRAMS: [&str; 4] = ["/usr", "/usr/local", "/opt", "/nix"];

/// Device files taken over from the host, where it has them.
const DEVICES: [&str; 9] = [
    "null", "zero", "full", "random", "urandom", "tty", "kmsg", "fuse", "net/tun",
];

/// Where the data disk is mounted inside.
pub(crate) const DATA: &str = "/mnt/data";

const NONE: Option<&str> = None;

/// Makes the machine's root file system and enters it. The process must be in new mount, process, network and cgroup
/// namespaces.
pub(super) fn enter(boot: &Boot, machine: &MachineDir) -> Result<(), InitError> {
    // Nothing of this namespace reaches the host's, and nothing of the host's comes in later.
    change("/".into(), MsFlags::MS_REC | MsFlags::MS_PRIVATE)?;
    let hierarchies = Hierarchy::all()?;
    let root = overlay(machine, boot)?;
    let others = mount_points()?;
    for path in PROGRAMS.iter().filter(|path| others.iter().any(|m| m == *path)) {
        // A layer of its own each, as an overlay of `/` ends where another file system begins.
        let name = path.trim_start_matches('/').replace('/', "-");
        let [upper, work] = ["upper", "work"].map(|kind| machine.path.join(format!("{kind}-{name}")));
        make_public(&upper)?;
        stack(
            Utf8Path::new(path),
            &upper,
            &work,
            &root.join(path.trim_start_matches('/')),
        )?;
    }
    hide(boot, &root)?;
    for (path, name) in REAL {
        let own = machine.path.join("real").join(name);
        state::make_dir(&own, 0o755)?;
        bind(&own, &root.join(path))?;
    }
    if let Some(disk) = &boot.disk {
        bind(disk, &root.join(DATA.trim_start_matches('/')))?;
    }
    let quiet = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    fresh("proc", &root.join("proc"), quiet | MsFlags::MS_NOEXEC, NONE)?;
    fresh("sysfs", &root.join("sys"), quiet | MsFlags::MS_NOEXEC, NONE)?;
    fresh("tmpfs", &root.join("run"), quiet, Some("mode=755"))?;
    fresh("tmpfs", &root.join("tmp"), quiet, Some("mode=1777"))?;
    state::make_dir(&root.join("run/lock"), 0o755)?;
    devices(&root.join("dev"))?;
    control_groups(&root.join("sys/fs/cgroup"), &hierarchies)?;
    pivot(&root)?;
    // Pods and their mounts come and go below; those who share a mount with one see that (`mount --make-rshared /`).
    change("/".into(), MsFlags::MS_REC | MsFlags::MS_SHARED)?;
    for hierarchy in hierarchies.iter().filter(|h| h.mount_point == cgroup::ROOT) {
        leave_root_group(&hierarchy.mount_point)?;
    }
    fs::write("/proc/sys/net/ipv4/ip_forward", "1").map_err(InitError::system("switch forwarding on"))
}

/// Mounts the overlay.
fn overlay(machine: &MachineDir, boot: &Boot) -> Result<Utf8PathBuf, InitError> {
    let [upper, work, root] = ["upper", "work", "root"].map(|name| machine.path.join(name));
    if !upper.exists() {
        let draft = machine.path.join("upper.new");
        state::remove_tree(&draft)?;
        prepare(&draft, boot)?;
        fs::rename(&draft, &upper).map_err(LocalError::io("make", &upper))?;
    }
    write_host_files(&upper, boot)?;
    stack(Utf8Path::new("/"), &upper, &work, &root)?;
    Ok(root)
}

/// Mounts an overlay of a directory of the host.
fn stack(lower: &Utf8Path, upper: &Utf8Path, work: &Utf8Path, place: &Utf8Path) -> Result<(), InitError> {
    state::make_dir(work, 0o755)?;
    // `index=off`: the last boot's mount may still be on its way out, and with an index the kernel would refuse.
    let options = format!("lowerdir={lower},upperdir={upper},workdir={work},index=off");
    fresh("overlay", place, MsFlags::empty(), Some(&options))
}

/// Makes the layer that a machine writes to, as it begins.
fn prepare(upper: &Utf8Path, boot: &Boot) -> Result<(), InitError> {
    make_public(upper)?;
    for path in FRESH {
        let mut dir = upper.to_owned();
        for part in Utf8Path::new(path).components() {
            dir.push(part);
            make_public(&dir)?;
        }
        // What the layer below has in a directory with this mark is not seen (kernel,
        // Documentation/filesystems/overlayfs.rst).
        let mark = rustix::fs::setxattr(
            dir.as_str(),
            "trusted.overlay.opaque",
            b"y",
            rustix::fs::XattrFlags::empty(),
        );
        mark.map_err(InitError::system(format!("mark `{dir}`")))?;
    }
    let id = format!("{}\n", naming::machine_id(&boot.cluster, &boot.machine));
    state::write_file(&upper.join("etc/machine-id"), id.as_bytes(), 0o444)?;
    Ok(())
}

/// Writes what tells the machine who it is and who others are; at each boot, as the host may have moved meanwhile.
fn write_host_files(upper: &Utf8Path, boot: &Boot) -> Result<(), InitError> {
    let Boot { machine, address, .. } = boot;
    let hosts = format!(
        "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\nff02::1 ip6-allnodes\nff02::2 ip6-allrouters\n\
         {address} {machine}\n"
    );
    let etc = upper.join("etc");
    state::write_file(&etc.join("hosts"), hosts.as_bytes(), 0o644)?;
    state::write_file(&etc.join("hostname"), format!("{machine}\n").as_bytes(), 0o644)?;
    state::write_file(&etc.join("resolv.conf"), &resolvers()?, 0o644)?;
    Ok(())
}

/// The host's name servers, as they can be reached from another network namespace: systemd-resolved's own address
/// (`127.0.0.53`) can't.
fn resolvers() -> Result<Vec<u8>, InitError> {
    for path in ["/run/systemd/resolve/resolv.conf", "/etc/resolv.conf"] {
        match fs::read(path) {
            Ok(text) => return Ok(text),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(LocalError::io("read", path)(e).into()),
        }
    }
    Ok(Vec::new())
}

/// Covers what the machine must not see.
fn hide(boot: &Boot, root: &Utf8Path) -> Result<(), InitError> {
    for path in &boot.hide {
        let inside = root.join(path.as_str().trim_start_matches('/'));
        if inside.is_dir() {
            let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
            fresh("tmpfs", &inside, flags, Some("size=4k,mode=700"))?;
        }
    }
    Ok(())
}

fn devices(dev: &Utf8Path) -> Result<(), InitError> {
    fresh("tmpfs", dev, MsFlags::MS_NOSUID, Some("mode=755"))?;
    state::make_dir(&dev.join("net"), 0o755)?;
    for name in DEVICES {
        let host = Utf8Path::new("/dev").join(name);
        let Ok(there) = fs::metadata(&host) else { continue };
        if !there.file_type().is_char_device() {
            continue;
        }
        let place = dev.join(name);
        let mode = Mode::from_bits_truncate(there.mode());
        match mknod(place.as_std_path(), SFlag::S_IFCHR, mode, there.rdev()) {
            // Where device files can't be made (a host that is a container), the host's own is lent.
            Err(nix::errno::Errno::EPERM) => {
                fs::write(&place, "").map_err(LocalError::io("make", &place))?;
                bind_one(&host, &place)?;
            }
            Err(e) => return Err(InitError::system(format!("make the device `{place}`"))(e)),
            // Whatever the umask.
            Ok(()) => fs::set_permissions(&place, Permissions::from_mode(there.mode() & 0o777))
                .map_err(LocalError::io("set up", &place))?,
        }
    }
    for (name, target) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
        ("ptmx", "pts/ptmx"),
        // What is printed there would else appear on the host's.
        ("console", "null"),
    ] {
        symlink(target, dev.join(name)).map_err(LocalError::io("make the link", dev.join(name)))?;
    }
    let quiet = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    fresh(
        "devpts",
        &dev.join("pts"),
        quiet,
        Some("newinstance,ptmxmode=0666,mode=0620,gid=5"),
    )?;
    fresh(
        "tmpfs",
        &dev.join("shm"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
        Some("mode=1777"),
    )?;
    fresh("mqueue", &dev.join("mqueue"), quiet | MsFlags::MS_NODEV, NONE)
}

/// Mounts the hierarchies anew: seen from this cgroup namespace, the machine's own group is their root.
fn control_groups(root: &Utf8Path, hierarchies: &[Hierarchy]) -> Result<(), InitError> {
    let quiet = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    if !hierarchies.iter().any(|h| h.mount_point == cgroup::ROOT) {
        fresh("tmpfs", root, quiet, Some("mode=755"))?;
    }
    for hierarchy in hierarchies {
        let place = root.join(hierarchy.name());
        match &hierarchy.kind {
            Kind::V1(options) => fresh("cgroup", &place, quiet, Some(options))?,
            Kind::V2 => fresh("cgroup2", &place, quiet, NONE)?,
        }
    }
    // `cpu` -> `cpu,cpuacct`, where the host has both in one.
    for entry in Utf8Path::new(cgroup::ROOT)
        .read_dir_utf8()
        .map_err(LocalError::io("list", cgroup::ROOT))?
    {
        let entry = entry.map_err(LocalError::io("list", cgroup::ROOT))?;
        if entry.path().is_symlink() {
            let target = entry
                .path()
                .read_link_utf8()
                .map_err(LocalError::io("read", entry.path()))?;
            let place = root.join(entry.file_name());
            symlink(target, &place).map_err(LocalError::io("make the link", &place))?;
        }
    }
    Ok(())
}

/// In version 2, a group that hands controllers down has no processes of its own ("no internal processes"): this one
/// moves to a leaf, where its children are born too.
fn leave_root_group(root: &Utf8Path) -> Result<(), InitError> {
    let leaf = root.join("init");
    state::make_dir(&leaf, 0o755)?;
    let procs = leaf.join("cgroup.procs");
    fs::write(&procs, "0").map_err(LocalError::io("join the control group", procs))?;
    cgroup::enable_controllers(root);
    Ok(())
}

/// Makes `root` the root, and lets the host's go (`pivot_root(2)`, the last of its notes).
fn pivot(root: &Utf8Path) -> Result<(), InitError> {
    std::env::set_current_dir(root).map_err(LocalError::io("enter", root))?;
    nix::unistd::pivot_root(".", ".").map_err(InitError::system("change the root file system"))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(InitError::system("let go of the host's root file system"))?;
    std::env::set_current_dir("/").map_err(LocalError::io("enter", "/"))?;
    Ok(())
}

fn fresh(kind: &str, place: &Utf8Path, flags: MsFlags, options: Option<&str>) -> Result<(), InitError> {
    fs::create_dir_all(place).map_err(LocalError::io("make the directory", place))?;
    mount(Some(kind), place.as_std_path(), Some(kind), flags, options)
        .map_err(InitError::system(format!("mount {kind} at `{place}`")))
}

/// Shows a directory at another place, with what is mounted in it.
fn bind(from: &Utf8Path, to: &Utf8Path) -> Result<(), InitError> {
    fs::create_dir_all(to).map_err(LocalError::io("make the directory", to))?;
    bind_one(from, to)
}

fn bind_one(from: &Utf8Path, to: &Utf8Path) -> Result<(), InitError> {
    mount(
        Some(from.as_std_path()),
        to.as_std_path(),
        NONE,
        MsFlags::MS_BIND | MsFlags::MS_REC,
        NONE,
    )
    .map_err(InitError::system(format!("show `{from}` at `{to}`")))
}

fn change(place: &Utf8Path, flags: MsFlags) -> Result<(), InitError> {
    mount(NONE, place.as_std_path(), NONE, flags, NONE)
        .map_err(InitError::system(format!("change how mounts at `{place}` are shared")))
}

/// Where something is mounted, as this namespace has it.
fn mount_points() -> Result<Vec<String>, InitError> {
    let path = "/proc/thread-self/mountinfo";
    let text = fs::read_to_string(path).map_err(LocalError::io("read", path))?;
    Ok(text
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(str::to_owned)
        .collect())
}

fn make_public(dir: &Utf8Path) -> Result<(), InitError> {
    state::make_dir(dir, 0o755)?;
    fs::set_permissions(dir, Permissions::from_mode(0o755)).map_err(LocalError::io("set up", dir))?;
    Ok(())
}
