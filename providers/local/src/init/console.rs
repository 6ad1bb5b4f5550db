//! What a machine prints: a log that never grows without end.

use std::fs::File;
use std::os::fd::OwnedFd;

use camino::Utf8Path;
use nix::fcntl::{OFlag, openat, renameat};
use nix::sys::stat::Mode;

use super::InitError;

/// The log's name in the machine's directory.
pub(crate) const CURRENT: &str = "console.log";
/// The older ones, newest first.
pub(crate) const OLDER: [&str; 2] = ["console.log.1", "console.log.2"];
/// The size at which the next one is begun, in bytes.
const LIMIT: u64 = 1 << 20;

/// A machine's console. It holds the directory open, which the machine itself cannot see.
#[derive(Debug)]
pub(crate) struct Console {
    dir: OwnedFd,
    file: File,
    size: u64,
}

impl Console {
    pub(crate) fn open(dir: &Utf8Path) -> Result<Self, InitError> {
        let opened = File::open(dir).map_err(InitError::system(format!("open `{dir}`")))?;
        let dir = OwnedFd::from(opened);
        let file = begin(&dir).map_err(InitError::system(format!("write `{CURRENT}`")))?;
        let size = file.metadata().map(|m| m.len()).unwrap_or_default();
        Ok(Self { dir, file, size })
    }

    /// Writes what was printed. That it can't be written must not stop a machine: it's lost then.
    pub(crate) fn write(&mut self, bytes: &[u8]) {
        if self.size + bytes.len() as u64 > LIMIT {
            self.rotate();
        }
        if std::io::Write::write_all(&mut self.file, bytes).is_ok() {
            self.size += bytes.len() as u64;
        }
    }

    /// Writes a line of init's own.
    pub(crate) fn say(&mut self, text: &str) {
        self.write(format!("kprov: {text}\n").as_bytes());
    }

    fn rotate(&mut self) {
        let _ = renameat(&self.dir, OLDER[0], &self.dir, OLDER[1]);
        let _ = renameat(&self.dir, CURRENT, &self.dir, OLDER[0]);
        if let Ok(file) = begin(&self.dir) {
            self.file = file;
            self.size = 0;
        }
    }
}

fn begin(dir: &OwnedFd) -> nix::Result<File> {
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_APPEND | OFlag::O_CLOEXEC;
    openat(dir, CURRENT, flags, Mode::from_bits_truncate(0o600)).map(File::from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn keeps_three_files_of_a_mebibyte() {
        let keep = tempfile::tempdir().unwrap();
        let dir = Utf8Path::from_path(keep.path()).unwrap();
        let mut console = Console::open(dir).unwrap();
        let block = vec![b'x'; 100_000];
        for _ in 0..60 {
            console.write(&block);
        }
        drop(console);
        let mut console = Console::open(dir).unwrap();
        console.say("the end");
        let mut names: Vec<_> = fs::read_dir(dir)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, [CURRENT, OLDER[0], OLDER[1]]);
        for name in names {
            assert!(fs::metadata(dir.join(name)).unwrap().len() <= LIMIT);
        }
        assert!(
            fs::read_to_string(dir.join(CURRENT))
                .unwrap()
                .ends_with("xkprov: the end\n")
        );
    }
}
