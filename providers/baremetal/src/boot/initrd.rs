//! The environment that hosts boot into: a static busybox, the drivers of a kernel, and [`INIT`]. Built from files of any Linux
//! distribution; nothing is run for it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt as _;

use camino::{Utf8Path, Utf8PathBuf};
use flate2::Compression;
use flate2::write::GzEncoder;

/// The first program of the environment.
pub const INIT: &str = include_str!("init.sh");

/// Drivers that are taken: of what hosts have their disks and networks on, of file systems, and what pods' networks are made of.
const WANTED: &[&str] = &[
    "kernel/drivers/ata/",
    "kernel/drivers/block/",
    "kernel/drivers/hid/",
    "kernel/drivers/md/",
    "kernel/drivers/message/",
    "kernel/drivers/net/",
    "kernel/drivers/nvme/",
    "kernel/drivers/scsi/",
    "kernel/drivers/usb/host/",
    "kernel/drivers/usb/storage/",
    "kernel/drivers/virtio/",
    "kernel/fs/btrfs/",
    "kernel/fs/ext4/",
    "kernel/fs/fat/",
    "kernel/fs/isofs/",
    "kernel/fs/nls/",
    "kernel/fs/overlayfs/",
    "kernel/fs/xfs/",
    "kernel/net/8021q/",
    "kernel/net/802/",
    "kernel/net/bridge/",
    "kernel/net/core/",
    "kernel/net/ipv4/",
    "kernel/net/ipv6/",
    "kernel/net/llc/",
    "kernel/net/netfilter/",
    "kernel/net/netlink/",
    "kernel/net/packet/",
    "kernel/net/sched/",
    "kernel/net/unix/",
];
/// Of those, what no server boots by and is large.
const UNWANTED: &[&str] = &[
    "kernel/drivers/net/wireless/",
    "kernel/drivers/net/wwan/",
    "kernel/drivers/net/can/",
];

/// Why no environment can be made.
#[derive(Debug, thiserror::Error)]
pub enum InitrdError {
    /// A file cannot be read or written.
    #[error("`{path}` cannot be {what}")]
    File {
        /// Which.
        path: Utf8PathBuf,
        /// `read` or `written`.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// There are no modules of the kernel.
    #[error("`{0}` has no kernel modules")]
    NoModules(Utf8PathBuf),
    /// The modules are compressed.
    #[error("the kernel's modules are compressed (`{0}`)")]
    Compressed(Utf8PathBuf),
    /// Busybox needs libraries.
    #[error("`{0}` is not a static program")]
    NotStatic(Utf8PathBuf),
}

impl InitrdError {
    /// What to do about it.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::File { .. } => "check the path",
            Self::NoModules(_) => "name the directory of the kernel's version, such as `/lib/modules/6.1.0-13-amd64`",
            Self::Compressed(_) => {
                "take a kernel with plain modules (Debian's), or make an initrd of your own and give it to `kprov boot serve --initrd`"
            }
            Self::NotStatic(_) => "install a static one (Debian: `apt-get install busybox-static`)",
        }
    }
}

/// A kernel module, as its `.modinfo` section tells.
#[derive(Debug, Default, PartialEq, Eq)]
struct Module {
    /// Below the directory of the kernel's version.
    path: String,
    depends: Vec<String>,
    soft: Vec<String>,
    aliases: Vec<String>,
}

/// Reads what a module says of itself (modinfo(8)); its fields are texts that end with NUL, found without parsing ELF.
fn module(path: String, content: &[u8]) -> Module {
    let mut found = Module {
        path,
        ..Module::default()
    };
    for text in content.split(|byte| *byte == 0) {
        let Ok(text) = std::str::from_utf8(text) else { continue };
        if let Some(depends) = text.strip_prefix("depends=") {
            let names = depends.split(',').filter(|name| !name.is_empty());
            found.depends.extend(names.map(normal));
        } else if let Some(alias) = text.strip_prefix("alias=") {
            found.aliases.push(alias.to_owned());
        } else if let Some(soft) = text.strip_prefix("softdep=pre: ") {
            found
                .soft
                .extend(soft.split_whitespace().take_while(|w| !w.ends_with(':')).map(normal));
        }
    }
    found
}

/// A module's name: of its two spellings the kernel's.
fn normal(name: &str) -> String {
    name.replace('-', "_")
}

fn name_of(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    normal(file.strip_suffix(".ko").unwrap_or(file))
}

/// The modules that are taken: what is wanted, and all that it needs. By name.
fn select(all: &BTreeMap<String, Module>) -> BTreeSet<&str> {
    let wanted = |module: &Module| {
        let begins = |prefixes: &[&str]| prefixes.iter().any(|prefix| module.path.starts_with(prefix));
        begins(WANTED) && !begins(UNWANTED)
    };
    let mut left: Vec<&String> = all
        .iter()
        .filter(|(_, module)| wanted(module))
        .map(|(name, _)| name)
        .collect();
    // What an alias of these stands for is asked for by other modules.
    left.extend(
        all.keys()
            .filter(|name| name.starts_with("crc32") || name.starts_with("virtio")),
    );
    let mut taken = BTreeSet::new();
    while let Some(name) = left.pop() {
        let Some((name, module)) = all.get_key_value(name) else {
            continue;
        };
        if taken.insert(name.as_str()) {
            left.extend(module.depends.iter().chain(&module.soft));
        }
    }
    taken
}

/// Everything that a module needs, nearest first, as `modules.dep` has it.
fn needs<'a>(all: &'a BTreeMap<String, Module>, of: &'a Module) -> Vec<&'a str> {
    let mut order: Vec<&str> = Vec::new();
    let mut left: Vec<&String> = of.depends.iter().rev().collect();
    while let Some(name) = left.pop() {
        if let Some(module) = all.get(name) {
            order.retain(|known| *known != module.path);
            order.push(&module.path);
            left.extend(module.depends.iter().rev());
        }
    }
    order
}

/// `modules.dep` and `modules.alias` for what is taken.
fn tables(all: &BTreeMap<String, Module>, taken: &BTreeSet<&str>) -> (String, String) {
    let (mut dependencies, mut aliases) = (String::new(), String::new());
    for name in taken {
        let Some(module) = all.get(*name) else { continue };
        // Only writing to a text, which cannot fail.
        let _ = write!(dependencies, "{}:", module.path);
        for path in needs(all, module) {
            let _ = write!(dependencies, " {path}");
        }
        dependencies.push('\n');
        for alias in &module.aliases {
            let _ = writeln!(aliases, "alias {alias} {name}");
        }
    }
    (dependencies, aliases)
}

fn read(path: &Utf8Path) -> Result<Vec<u8>, InitrdError> {
    std::fs::read(path).map_err(|source| InitrdError::File {
        path: path.to_owned(),
        what: "read",
        source,
    })
}

fn find_modules(root: &Utf8Path) -> Result<BTreeMap<String, Module>, InitrdError> {
    let mut all = BTreeMap::new();
    for path in files_below(&root.join("kernel"))? {
        let below = path.strip_prefix(root).unwrap_or(&path).to_string();
        if path.extension() == Some("ko") {
            all.insert(name_of(&below), module(below, &read(&path)?));
        } else if below.contains(".ko.") {
            return Err(InitrdError::Compressed(path));
        }
    }
    if all.is_empty() {
        return Err(InitrdError::NoModules(root.to_owned()));
    }
    Ok(all)
}

/// All files below a directory; what a link leads to counts as a file of its own.
fn files_below(root: &Utf8Path) -> Result<Vec<Utf8PathBuf>, InitrdError> {
    let mut found = Vec::new();
    let mut left = vec![root.to_owned()];
    while let Some(directory) = left.pop() {
        let failed = |source| InitrdError::File {
            path: directory.clone(),
            what: "read",
            source,
        };
        for entry in directory.read_dir_utf8().map_err(failed)? {
            let path = entry.map_err(failed)?.into_path();
            if path.is_dir() {
                left.push(path);
            } else {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

/// Whether a program needs no interpreter (elf(5), `PT_INTERP`): 64-bit little-endian ones only.
fn is_static(program: &[u8]) -> bool {
    let at = |from: usize, len: usize| {
        let bytes = program.get(from..from + len)?;
        Some(bytes.iter().rev().fold(0_usize, |n, b| (n << 8) | usize::from(*b)))
    };
    let headers = || {
        let (first, size, count) = (at(32, 8)?, at(54, 2)?, at(56, 2)?);
        let interpreter = (0..count).any(|i| at(first + i * size, 4) == Some(3));
        Some(!interpreter)
    };
    program.starts_with(b"\x7fELF\x02\x01") && headers().unwrap_or(false)
}

/// Writes the environment for the kernel whose modules are below `modules` (`/lib/modules/VERSION`), with everything below the
/// directories `add`; tells how many modules it has.
pub fn build(
    modules: &Utf8Path,
    busybox: &Utf8Path,
    add: &[Utf8PathBuf],
    out: &Utf8Path,
) -> Result<usize, InitrdError> {
    let version = modules.file_name().unwrap_or_default();
    let shell = read(busybox)?;
    if !is_static(&shell) {
        return Err(InitrdError::NotStatic(busybox.to_owned()));
    }
    let all = find_modules(modules)?;
    let taken = select(&all);
    let (dependencies, aliases) = tables(&all, &taken);
    let failed = |source| InitrdError::File {
        path: out.to_owned(),
        what: "written",
        source,
    };
    let new = Utf8PathBuf::from(format!("{out}.new"));
    let file = std::fs::File::create(&new).map_err(failed)?;
    let mut archive = Archive::new(GzEncoder::new(io::BufWriter::new(file), Compression::fast()));
    let root = format!("lib/modules/{version}");
    archive.file("init", 0o755, INIT.as_bytes()).map_err(failed)?;
    archive.file("bin/busybox", 0o755, &shell).map_err(failed)?;
    for (name, text) in [("modules.dep", dependencies), ("modules.alias", aliases)] {
        archive
            .file(&format!("{root}/{name}"), 0o644, text.as_bytes())
            .map_err(failed)?;
    }
    for module in taken.iter().filter_map(|name| all.get(*name)) {
        let content = read(&modules.join(&module.path))?;
        archive
            .file(&format!("{root}/{}", module.path), 0o644, &content)
            .map_err(failed)?;
    }
    for directory in add {
        for path in files_below(directory)? {
            let content = read(&path)?;
            let mode = std::fs::metadata(&path).map_or(0o644, |meta| meta.permissions().mode() & 0o777);
            let below = path.strip_prefix(directory).unwrap_or(&path);
            archive.file(below.as_str(), mode, &content).map_err(failed)?;
        }
    }
    let compressed = archive.finish().and_then(GzEncoder::finish);
    compressed.and_then(|mut file| file.flush()).map_err(failed)?;
    std::fs::rename(&new, out).map_err(failed)?;
    Ok(taken.len())
}

/// A cpio archive in the form that the kernel unpacks (its documentation: `buffer-format`, "newc").
struct Archive<W> {
    to: W,
    directories: BTreeSet<String>,
    entries: u32,
}

impl<W: Write> Archive<W> {
    fn new(to: W) -> Self {
        Self {
            to,
            directories: BTreeSet::new(),
            entries: 0,
        }
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        self.entries += 1;
        let size = u32::try_from(content.len()).map_err(|_| io::ErrorKind::FileTooLarge)?;
        let name = u32::try_from(path.len() + 1).map_err(|_| io::ErrorKind::InvalidFilename)?;
        let links = 1;
        write!(
            self.to,
            "070701{:08x}{mode:08x}{:08x}{:08x}{links:08x}",
            self.entries, 0, 0
        )?;
        // Time, size, four numbers of devices, the name's length, no checksum.
        write!(
            self.to,
            "{:08x}{size:08x}{:08x}{:08x}{:08x}{:08x}{name:08x}{:08x}",
            0, 0, 0, 0, 0, 0
        )?;
        self.to.write_all(path.as_bytes())?;
        self.to.write_all(&[0])?;
        self.pad(110 + path.len() + 1)?;
        self.to.write_all(content)?;
        self.pad(content.len())
    }

    fn pad(&mut self, length: usize) -> io::Result<()> {
        let missing = length.next_multiple_of(4) - length;
        self.to.write_all(&[0; 3][..missing])
    }

    /// A file, with the directories above it.
    fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        for (end, _) in path.match_indices('/') {
            let directory = &path[..end];
            if self.directories.insert(directory.to_owned()) {
                self.entry(directory, 0o040_755, &[])?;
            }
        }
        self.entry(path, 0o100_000 | mode, content)
    }

    fn finish(mut self) -> io::Result<W> {
        self.entry("TRAILER!!!", 0, &[])?;
        Ok(self.to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fake(path: &str, info: &str) -> (String, Module) {
        let content = format!("\x7fELF\0{}\0tail", info.replace(';', "\0"));
        (name_of(path), module(path.into(), content.as_bytes()))
    }

    #[test]
    fn modules_come_with_all_that_they_need() {
        let all: BTreeMap<_, _> = [
            fake(
                "kernel/drivers/net/virtio_net.ko",
                "alias=virtio:d00000001v*;depends=net_failover",
            ),
            fake("kernel/drivers/net/net_failover.ko", "depends=failover"),
            fake("kernel/net/core/failover.ko", "depends="),
            fake("kernel/fs/ext4/ext4.ko", "depends=jbd2,mbcache;softdep=pre: crc32c-x"),
            fake("kernel/fs/jbd2/jbd2.ko", "depends="),
            fake("kernel/fs/mbcache.ko", "depends="),
            fake("kernel/lib/crc32c-x.ko", "depends="),
            fake("kernel/sound/snd.ko", "depends="),
            fake("kernel/drivers/net/wireless/w.ko", "depends="),
        ]
        .into();
        let taken = select(&all);
        assert!(!taken.contains("snd") && !taken.contains("w"));
        assert_eq!(taken.len(), 7, "{taken:?}");
        let (dependencies, aliases) = tables(&all, &taken);
        let line = "kernel/drivers/net/virtio_net.ko: kernel/drivers/net/net_failover.ko kernel/net/core/failover.ko\n";
        assert!(dependencies.contains(line), "{dependencies}");
        assert_eq!(aliases, "alias virtio:d00000001v* virtio_net\n");
    }

    #[test]
    fn archives_are_what_cpio_reads() {
        let mut archive = Archive::new(Vec::new());
        archive.file("a/b/c.txt", 0o644, b"hello").unwrap();
        archive.file("a/d", 0o755, b"").unwrap();
        let bytes = archive.finish().unwrap();
        assert_eq!(bytes.len() % 4, 0);
        let mut names = Vec::new();
        let mut rest = &bytes[..];
        let number = |rest: &[u8], field: usize| {
            let text = std::str::from_utf8(&rest[6 + field * 8..14 + field * 8]).unwrap();
            usize::from_str_radix(text, 16).unwrap()
        };
        while rest.starts_with(b"070701") {
            let (mode, size, name) = (number(rest, 1), number(rest, 6), number(rest, 11));
            let text = std::str::from_utf8(&rest[110..110 + name - 1]).unwrap();
            names.push(format!("{text} {mode:o} {size}"));
            rest = &rest[(110 + name).next_multiple_of(4) + size.next_multiple_of(4)..];
        }
        assert_eq!(
            names,
            [
                "a 40755 0",
                "a/b 40755 0",
                "a/b/c.txt 100644 5",
                "a/d 100755 0",
                "TRAILER!!! 0 0"
            ]
        );
        assert!(rest.is_empty());
    }

    #[test]
    fn only_static_programs_run_without_libraries() {
        let own = std::fs::read("/proc/self/exe").unwrap();
        assert!(!is_static(&own), "tests are linked to libc");
        assert!(!is_static(b"#!/bin/sh"));
        let mut without = own;
        // The first program headers made something else: no interpreter is left.
        let (first, size, count) = (64, 56, usize::from(without[56]));
        for i in 0..count {
            if without[first + i * size] == 3 {
                without[first + i * size] = 4;
            }
        }
        assert!(is_static(&without));
    }
}
