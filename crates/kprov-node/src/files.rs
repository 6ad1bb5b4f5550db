//! Writing files so that a crash leaves the old content or the new, never a part.

use std::io::{self, Read};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
use std::{fs, io::Write};

use camino::{Utf8Path, Utf8PathBuf};
use kprov_types::Digest;
use sha2::{Digest as _, Sha256};

/// A file operation that failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {verb} `{path}`")]
pub struct FileError {
    /// What was tried, such as `write`.
    pub verb: &'static str,
    /// The file.
    pub path: Utf8PathBuf,
    /// Why it failed.
    #[source]
    pub source: io::Error,
}

/// For `map_err`: names the file and what was tried.
pub(crate) fn failed<'a>(verb: &'static str, path: &'a Utf8Path) -> impl Fn(io::Error) -> FileError + 'a {
    move |source| FileError {
        verb,
        path: path.to_owned(),
        source,
    }
}

/// Makes a directory and its parents with `mode` for those it makes.
pub fn make_directory(path: &Utf8Path, mode: u32) -> Result<(), FileError> {
    use std::os::unix::fs::DirBuilderExt;
    fs::DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(path)
        .map_err(failed("make directory", path))
}

/// Replaces the content of `path`, or makes it, with `mode`. Does nothing when content and mode are so already; tells
/// whether it wrote. Missing parent directories are made, closed to others when the file is.
pub fn write(path: &Utf8Path, content: &[u8], mode: u32) -> Result<bool, FileError> {
    let error = failed("write", path);
    let same = fs::read(path).is_ok_and(|old| old == content)
        && fs::metadata(path).is_ok_and(|m| m.permissions().mode() & 0o7777 == mode);
    if same {
        return Ok(false);
    }
    let directory = path.parent().unwrap_or(Utf8Path::new("/"));
    let others_may_read = mode & 0o004 != 0;
    make_directory(directory, if others_may_read { 0o755 } else { 0o700 })?;
    let temporary = directory.join(format!(".{}.kprov-new", path.file_name().unwrap_or_default()));
    write_new(&temporary, content, mode).map_err(failed("write", &temporary))?;
    fs::rename(&temporary, path).map_err(&error)?;
    sync_directory(directory).map_err(&error)?;
    Ok(true)
}

fn write_new(path: &Utf8Path, content: &[u8], mode: u32) -> io::Result<()> {
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(mode)
        .open(path)?;
    // A file left by a crash keeps its mode, and the process's umask may have taken bits away.
    file.set_permissions(fs::Permissions::from_mode(mode))?;
    file.write_all(content)?;
    file.sync_all()
}

/// Writes `path` by way of a file in `staging`, a directory on the same file system: for directories whose every entry
/// is read by someone, such as kubelet's static pods.
pub fn write_through(staging: &Utf8Path, path: &Utf8Path, content: &[u8], mode: u32) -> Result<(), FileError> {
    make_directory(staging, 0o700)?;
    let directory = path.parent().unwrap_or(Utf8Path::new("/"));
    make_directory(directory, 0o755)?;
    let temporary = staging.join(path.file_name().unwrap_or_default());
    write_new(&temporary, content, mode).map_err(failed("write", &temporary))?;
    fs::rename(&temporary, path).map_err(failed("write", path))?;
    sync_directory(directory).map_err(failed("write", path))
}

/// The digest of a file. Blocks while it reads all of it.
pub fn digest(path: &Utf8Path) -> Result<Digest, FileError> {
    let hash = || {
        let mut file = fs::File::open(path)?;
        let mut hasher = Sha256::new();
        let mut buffer = vec![0; 128 << 10];
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok(Digest::from_bytes(hasher.finalize().into())),
                n => hasher.update(buffer.get(..n).unwrap_or_default()),
            }
        }
    };
    hash().map_err(failed("read", path))
}

/// Removes a file; tells whether it was there.
pub fn remove(path: &Utf8Path) -> Result<bool, FileError> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(failed("remove", path)(e)),
    }
}

/// Reads a file that may be missing.
pub fn read_if_there(path: &Utf8Path) -> Result<Option<Vec<u8>>, FileError> {
    match fs::read(path) {
        Ok(content) => Ok(Some(content)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(failed("read", path)(e)),
    }
}

/// Makes the symbolic link `path` point to `target`, in one step for whoever follows it.
pub fn link(path: &Utf8Path, target: &str) -> Result<(), FileError> {
    if path.read_link_utf8().is_ok_and(|t| t == target) {
        return Ok(());
    }
    let temporary = path.with_file_name(format!(".{}.kprov-new", path.file_name().unwrap_or_default()));
    remove(&temporary)?;
    symlink(target, &temporary).map_err(failed("link", &temporary))?;
    fs::rename(&temporary, path).map_err(failed("link", path))
}

fn sync_directory(path: &Utf8Path) -> io::Result<()> {
    fs::File::open(path)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_with_mode_and_only_when_needed() {
        let dir = tempfile::tempdir().unwrap();
        let path = Utf8Path::from_path(dir.path()).unwrap().join("a/b");
        assert!(write(&path, b"one", 0o600).unwrap());
        assert!(!write(&path, b"one", 0o600).unwrap());
        assert!(write(&path, b"one", 0o644).unwrap());
        assert!(write(&path, b"two", 0o644).unwrap());
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o644);
        assert_eq!(
            fs::read_dir(path.parent().unwrap()).unwrap().count(),
            1,
            "no temporary file is left"
        );
    }

    #[test]
    fn writing_through_leaves_nothing_else_in_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        let root = Utf8Path::from_path(dir.path()).unwrap();
        let path = root.join("manifests/pod.json");
        write_through(&root.join("staging"), &path, b"{}", 0o600).unwrap();
        assert_eq!(fs::read_dir(root.join("manifests")).unwrap().count(), 1);
        assert!(remove(&path).unwrap());
        assert!(!remove(&path).unwrap());
    }

    #[test]
    fn links_are_switched() {
        let dir = tempfile::tempdir().unwrap();
        let path = Utf8Path::from_path(dir.path()).unwrap().join("current");
        link(&path, "1.20.2").unwrap();
        link(&path, "1.36.3").unwrap();
        assert_eq!(path.read_link_utf8().unwrap(), "1.36.3");
    }
}
