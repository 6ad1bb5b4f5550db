//! The little of an ELF header that a payload depends on (`elf(5)`): the machine, and whether a loader is needed.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};

use camino::{Utf8Path, Utf8PathBuf};
use kprov_types::release::Arch;

/// What the header says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Elf {
    /// `e_machine`.
    machine: u16,
    /// The loader; a program that names one needs it, and mostly shared libraries too.
    pub(crate) interpreter: Option<Utf8PathBuf>,
}

const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
/// Linux' `PATH_MAX`.
const PATH_LIMIT: usize = 4096;
const PT_INTERP: u32 = 3;
const EM_X86_64: u16 = 62;
const EM_AARCH64: u16 = 183;

impl Elf {
    /// Reads the header of the file; `None` where it is no 64-bit little-endian ELF file.
    pub(crate) fn read(path: &Utf8Path) -> io::Result<Option<Self>> {
        let mut file = File::open(path)?;
        let mut header = [0; HEADER];
        match file.read_exact(&mut header) {
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            read => read?,
        }
        // Magic number, ELFCLASS64, ELFDATA2LSB.
        if header[..6] != *b"\x7fELF\x02\x01" {
            return Ok(None);
        }
        let table = u64::from_le_bytes(field(&header, 32));
        let entry_size = usize::from(u16::from_le_bytes(field(&header, 54)));
        let entries = usize::from(u16::from_le_bytes(field(&header, 56)));
        if entries > 0 && entry_size != PROGRAM_HEADER {
            return Ok(None);
        }
        let Some(programs) = read_at(&mut file, table, entry_size * entries)? else {
            return Ok(None);
        };
        let interpreter = match programs
            .chunks_exact(PROGRAM_HEADER)
            .find(|p| u32::from_le_bytes(field(p, 0)) == PT_INTERP)
            .map(|p| (u64::from_le_bytes(field(p, 8)), u64::from_le_bytes(field(p, 32))))
        {
            None => None,
            Some((at, size)) => {
                let size = usize::try_from(size).ok().filter(|s| *s <= PATH_LIMIT);
                let Some(size) = size else { return Ok(None) };
                let Some(name) = read_at(&mut file, at, size)? else {
                    return Ok(None);
                };
                let Ok(name) = String::from_utf8(name) else {
                    return Ok(None);
                };
                Some(name.trim_end_matches('\0').into())
            }
        };
        Ok(Some(Self {
            machine: u16::from_le_bytes(field(&header, 18)),
            interpreter,
        }))
    }

    /// Whether it runs on `arch`.
    pub(crate) fn is_for(&self, arch: Arch) -> bool {
        self.machine
            == match arch {
                Arch::Amd64 => EM_X86_64,
                Arch::Arm64 => EM_AARCH64,
            }
    }

    /// The machine, for people.
    pub(crate) fn machine_name(&self) -> String {
        match self.machine {
            EM_X86_64 => Arch::Amd64.as_str().to_owned(),
            EM_AARCH64 => Arch::Arm64.as_str().to_owned(),
            other => format!("ELF machine {other}"),
        }
    }
}

/// Reads a part of the file; `None` where it is shorter.
fn read_at(file: &mut File, at: u64, size: usize) -> io::Result<Option<Vec<u8>>> {
    let mut bytes = vec![0; size];
    file.seek(SeekFrom::Start(at))?;
    match file.read_exact(&mut bytes) {
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
        read => read.map(|()| Some(bytes)),
    }
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    std::array::from_fn(|i| bytes[at + i])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_this_test_and_refuses_others() {
        let me = Utf8PathBuf::try_from(std::env::current_exe().unwrap()).unwrap();
        let elf = Elf::read(&me).unwrap().unwrap();
        assert!(elf.is_for(Arch::current().unwrap()));
        assert!(elf.interpreter.unwrap().as_str().contains("ld-linux"));
        let dir = tempfile::tempdir().unwrap();
        let path = Utf8Path::from_path(dir.path()).unwrap().join("x");
        let whole = std::fs::read(&me).unwrap();
        for bad in [&b""[..], b"#!/bin/sh\n", &[0x7f; 100], &whole[..70]] {
            std::fs::write(&path, bad).unwrap();
            assert_eq!(Elf::read(&path).unwrap(), None);
        }
    }
}
