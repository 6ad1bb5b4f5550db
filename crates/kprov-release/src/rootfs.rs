//! The root file system of an image: collected as a tree, written as a tar archive whose bytes depend on nothing else.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;

use camino::{Utf8Component, Utf8Path, Utf8PathBuf};
use tar::{EntryType, Header};

/// Symbolic links that are followed before a loop is assumed (Linux allows as many).
const LINK_LIMIT: usize = 40;

/// Where a file's bytes are.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Content {
    Disk(Utf8PathBuf),
    Bytes(Vec<u8>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Node {
    Directory { mode: u32 },
    File { content: Content, mode: u32 },
    Link { target: Utf8PathBuf },
}

/// A tree of directories, files and symbolic links. Paths are absolute, as seen from inside.
#[derive(Clone, Debug, Default)]
pub(crate) struct Rootfs {
    /// By path without the leading slash, so that a directory comes before what is in it.
    nodes: BTreeMap<Utf8PathBuf, Node>,
}

impl Rootfs {
    /// A tree with what programs expect of any system: users, groups, name lookup, `/tmp`, `/run`.
    pub(crate) fn minimal() -> Self {
        let mut tree = Self::default();
        tree.directory("/tmp".into(), 0o1777);
        tree.directory("/run".into(), 0o755);
        for (path, text) in [
            (
                "/etc/passwd",
                "root:x:0:0:root:/root:/sbin/nologin\nnobody:x:65534:65534:nobody:/:/sbin/nologin\n",
            ),
            ("/etc/group", "root:x:0:\nnogroup:x:65534:\n"),
            ("/etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\n"),
        ] {
            tree.bytes(path.into(), text.into(), 0o644);
        }
        tree
    }

    /// Adds a directory and those above it.
    fn directory(&mut self, path: &Utf8Path, mode: u32) {
        let path = self.place(path);
        self.nodes.insert(path, Node::Directory { mode });
    }

    /// Adds a file whose bytes are read from `from` when the tree is written.
    pub(crate) fn file(&mut self, path: &Utf8Path, from: &Utf8Path, mode: u32) {
        let path = self.place(path);
        self.nodes.insert(
            path,
            Node::File {
                content: Content::Disk(from.to_owned()),
                mode,
            },
        );
    }

    /// Adds a file with these bytes.
    pub(crate) fn bytes(&mut self, path: &Utf8Path, bytes: Vec<u8>, mode: u32) {
        let path = self.place(path);
        self.nodes.insert(
            path,
            Node::File {
                content: Content::Bytes(bytes),
                mode,
            },
        );
    }

    /// Adds a symbolic link.
    pub(crate) fn link(&mut self, path: &Utf8Path, target: &Utf8Path) {
        let path = self.place(path);
        self.nodes.insert(
            path,
            Node::Link {
                target: target.to_owned(),
            },
        );
    }

    /// Copies a directory of the host to `/`. Owners, times and modes but for the executable bit are left behind; devices
    /// and sockets are refused.
    pub(crate) fn copy(&mut self, from: &Utf8Path) -> io::Result<()> {
        for entry in walkdir::WalkDir::new(from).min_depth(1) {
            let entry = entry?;
            let path = Utf8Path::from_path(entry.path())
                .ok_or_else(|| io::Error::other(format!("`{}` is not UTF-8", entry.path().display())))?;
            let inside = Utf8Path::new("/").join(path.strip_prefix(from).map_err(io::Error::other)?);
            let kind = entry.file_type();
            if kind.is_dir() {
                self.directory(&inside, 0o755);
            } else if kind.is_symlink() {
                self.link(&inside, &path.read_link_utf8()?);
            } else if kind.is_file() {
                let executable = entry.metadata()?.permissions().mode() & 0o111 != 0;
                self.file(&inside, path, if executable { 0o755 } else { 0o644 });
            } else {
                return Err(io::Error::other(format!(
                    "`{path}` is neither file, directory nor symbolic link"
                )));
            }
        }
        Ok(())
    }

    /// Whether there is something at `path`, links in it followed.
    pub(crate) fn contains(&self, path: &Utf8Path) -> bool {
        let mut path = path.to_owned();
        for _ in 0..LINK_LIMIT {
            let here = self.resolve_parent(&path);
            match self.nodes.get(&here) {
                Some(Node::Link { target }) => path = Utf8Path::new("/").join(&here).join("..").join(target),
                Some(_) => return true,
                None => return false,
            }
        }
        false
    }

    /// The key for a new node at `path`: links in the directories above followed, missing directories added.
    fn place(&mut self, path: &Utf8Path) -> Utf8PathBuf {
        let key = self.resolve_parent(path);
        for above in key.ancestors().skip(1).filter(|a| !a.as_str().is_empty()) {
            self.nodes
                .entry(above.to_owned())
                .or_insert(Node::Directory { mode: 0o755 });
        }
        key
    }

    /// The key of `path` with links in the directories above it, but not itself, followed.
    fn resolve_parent(&self, path: &Utf8Path) -> Utf8PathBuf {
        let mut links = 0;
        let mut done = Utf8PathBuf::new();
        let mut left: Vec<String> = names(path);
        while let Some(name) = left.pop() {
            if name == ".." {
                done.pop();
                continue;
            }
            done.push(name);
            if left.is_empty() {
                break;
            }
            if let Some(Node::Link { target }) = self.nodes.get(&done)
                && links < LINK_LIMIT
            {
                links += 1;
                if target.is_absolute() {
                    done = Utf8PathBuf::new();
                } else {
                    done.pop();
                }
                left.extend(names(target));
            }
        }
        done
    }

    /// Writes the tree as a tar archive: entries by path, times and owners 0.
    pub(crate) fn write(&self, out: impl Write) -> io::Result<()> {
        let mut tar = tar::Builder::new(out);
        for (path, node) in &self.nodes {
            let mut header = Header::new_gnu();
            header.set_mtime(0);
            header.set_uid(0);
            header.set_gid(0);
            header.set_size(0);
            match node {
                Node::Directory { mode } => {
                    header.set_entry_type(EntryType::Directory);
                    header.set_mode(*mode);
                    tar.append_data(&mut header, format!("{path}/"), io::empty())?;
                }
                Node::Link { target } => {
                    header.set_entry_type(EntryType::Symlink);
                    header.set_mode(0o777);
                    tar.append_link(&mut header, path, target)?;
                }
                Node::File { content, mode } => {
                    header.set_entry_type(EntryType::Regular);
                    header.set_mode(*mode);
                    match content {
                        Content::Bytes(bytes) => {
                            header.set_size(bytes.len() as u64);
                            tar.append_data(&mut header, path, bytes.as_slice())?;
                        }
                        Content::Disk(from) => {
                            let named = |e: io::Error| io::Error::new(e.kind(), format!("`{from}`: {e}"));
                            let file = File::open(from).map_err(named)?;
                            header.set_size(fs::metadata(from).map_err(named)?.len());
                            tar.append_data(&mut header, path, file)?;
                        }
                    }
                }
            }
        }
        tar.into_inner()?.flush()
    }
}

/// The names in a path, last first.
fn names(path: &Utf8Path) -> Vec<String> {
    let mut names: Vec<_> = path
        .components()
        .filter_map(|c| match c {
            Utf8Component::Normal(name) => Some(name.to_owned()),
            Utf8Component::ParentDir => Some("..".to_owned()),
            _ => None,
        })
        .collect();
    names.reverse();
    names
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn listing(tree: &Rootfs) -> Vec<String> {
        let mut bytes = Vec::new();
        tree.write(&mut bytes).unwrap();
        let mut archive = tar::Archive::new(bytes.as_slice());
        let entries = archive.entries().unwrap();
        entries
            .map(|e| {
                let e = e.unwrap();
                let h = e.header();
                assert_eq!((h.mtime().unwrap(), h.uid().unwrap(), h.gid().unwrap()), (0, 0, 0));
                let target = e
                    .link_name()
                    .unwrap()
                    .map(|t| format!(" -> {}", t.display()))
                    .unwrap_or_default();
                format!("{:o} {}{target}", h.mode().unwrap(), e.path().unwrap().display())
            })
            .collect()
    }

    #[test]
    fn links_above_are_followed() {
        let mut tree = Rootfs::default();
        tree.directory("/usr/lib".into(), 0o755);
        tree.link("/lib".into(), "usr/lib".into());
        tree.link("/lib64".into(), "/lib".into());
        tree.bytes("/lib64/x/ld.so".into(), b"ld".to_vec(), 0o755);
        tree.link("/usr/lib/x/alias".into(), "../../lib/x/ld.so".into());
        assert_eq!(
            listing(&tree),
            [
                "777 lib -> usr/lib",
                "777 lib64 -> /lib",
                "755 usr/",
                "755 usr/lib/",
                "755 usr/lib/x/",
                "777 usr/lib/x/alias -> ../../lib/x/ld.so",
                "755 usr/lib/x/ld.so",
            ]
        );
        assert!(tree.contains("/lib/x/alias".into()));
        assert!(!tree.contains("/lib/y".into()));
        tree.link("/a".into(), "b".into());
        tree.link("/b".into(), "a".into());
        assert!(!tree.contains("/a".into()));
        tree.bytes("/a/in-a-loop".into(), Vec::new(), 0o644);
    }

    #[test]
    fn copies_a_directory_without_its_accidents() {
        let dir = tempfile::tempdir().unwrap();
        let from = Utf8Path::from_path(dir.path()).unwrap();
        fs::create_dir_all(from.join("sbin")).unwrap();
        fs::write(from.join("sbin/iptables"), "x").unwrap();
        fs::set_permissions(from.join("sbin/iptables"), fs::Permissions::from_mode(0o4710)).unwrap();
        fs::write(from.join("notes"), "y").unwrap();
        std::os::unix::fs::symlink("iptables", from.join("sbin/ip6tables")).unwrap();
        let mut tree = Rootfs::default();
        tree.copy(from).unwrap();
        assert_eq!(
            listing(&tree),
            [
                "644 notes",
                "755 sbin/",
                "777 sbin/ip6tables -> iptables",
                "755 sbin/iptables"
            ]
        );
    }

    #[test]
    fn minimal_names_root() {
        let paths: BTreeSet<_> = listing(&Rootfs::minimal()).into_iter().collect();
        assert!(
            paths.contains("1777 tmp/") && paths.contains("644 etc/passwd"),
            "{paths:?}"
        );
    }
}
