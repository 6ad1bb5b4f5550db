//! iPXE's CD for UEFI too: distributions' image often starts on BIOS only.
//!
//! A CD that boots has a catalog of what it offers to which firmware (El Torito 1.0). For UEFI that is a FAT file system
//! with a program at a path of its own for each architecture (UEFI 2.10, section 13.3.2.1 and 3.5.1.1).

use std::io::{Cursor, Write as _};
use std::ops::Range;

use fatfs::{FileSystem, FormatVolumeOptions, FsOptions};

/// A CD's sector.
const SECTOR: usize = 2048;
/// What the catalog counts in.
const VIRTUAL_SECTOR: usize = 512;
/// Descriptors of the volume begin here.
const DESCRIPTORS: usize = 16;
/// An entry of the catalog.
const ENTRY: usize = 32;
const PLATFORM_UEFI: u8 = 0xEF;
const BOOTABLE: u8 = 0x88;
const LAST_SECTION: u8 = 0x91;

/// The CD with these programs for UEFI, each with the name that firmware looks for; `None` where it's no CD that boots, or one that has more than an
/// entry for BIOS already.
pub(super) fn with_uefi(mut cd: Vec<u8>, programs: &[(&str, Vec<u8>)]) -> Option<Vec<u8>> {
    let catalog = catalog(&cd)?;
    // The first two are the catalog's own, and the one for BIOS.
    let (section, entry) = (catalog.start + 2 * ENTRY, catalog.start + 3 * ENTRY);
    if cd.get(section..entry + ENTRY)?.iter().any(|byte| *byte != 0) {
        return None;
    }
    let volume = volume(programs).ok()?;
    cd.resize(cd.len().next_multiple_of(SECTOR), 0);
    let begins = u32::try_from(cd.len() / SECTOR).ok()?.to_le_bytes();
    let length = u16::try_from(volume.len() / VIRTUAL_SECTOR).ok()?.to_le_bytes();
    cd.extend(volume);

    let mut put = |at: usize, bytes: &[u8]| cd[at..at + bytes.len()].copy_from_slice(bytes);
    put(section, &[LAST_SECTION, PLATFORM_UEFI, 1, 0]);
    put(entry, &[BOOTABLE]);
    put(entry + 6, &length);
    put(entry + 8, &begins);
    // The primary volume descriptor's size of the whole, in both orders of bytes (ECMA-119, 8.4.8).
    let sectors = u32::try_from(cd.len() / SECTOR).ok()?;
    let size = DESCRIPTORS * SECTOR + 80;
    cd[size..size + 4].copy_from_slice(&sectors.to_le_bytes());
    cd[size + 4..size + 8].copy_from_slice(&sectors.to_be_bytes());
    Some(cd)
}

/// Where the boot catalog is.
fn catalog(cd: &[u8]) -> Option<Range<usize>> {
    let primary = cd.get(DESCRIPTORS * SECTOR..)?;
    if !primary.starts_with(b"\x01CD001") {
        return None;
    }
    let record = primary
        .chunks_exact(SECTOR)
        .take_while(|descriptor| descriptor[0] != 255)
        .find(|descriptor| descriptor.starts_with(b"\x00CD001\x01EL TORITO SPECIFICATION"))?;
    let sector = u32::from_le_bytes(record[71..75].try_into().ok()?);
    let begins = usize::try_from(sector).ok()?.checked_mul(SECTOR)?;
    let range = begins..begins.checked_add(SECTOR)?;
    cd.get(range.clone())?.starts_with(&[1, 0]).then_some(range)
}

/// A FAT file system with the programs where firmware looks for them.
fn volume(programs: &[(&str, Vec<u8>)]) -> std::io::Result<Vec<u8>> {
    let content: usize = programs.iter().map(|(_, program)| program.len()).sum();
    // Half a MiB for its tables and directories.
    let size = (content + (512 << 10)).next_multiple_of(SECTOR);
    let mut disk = Cursor::new(vec![0; size]);
    fatfs::format_volume(&mut disk, FormatVolumeOptions::new().volume_label(*b"KPROV      "))?;
    {
        let system = FileSystem::new(&mut disk, FsOptions::new())?;
        let boot = system.root_dir().create_dir("EFI")?.create_dir("BOOT")?;
        for (name, program) in programs {
            let mut file = boot.create_file(name)?;
            file.write_all(program)?;
            file.flush()?;
        }
    }
    Ok(disk.into_inner())
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    /// The least that is a CD with an entry for BIOS, its catalog in sector 20.
    fn cd() -> Vec<u8> {
        let mut cd = vec![0; 24 * SECTOR + 100];
        let mut put = |at: usize, bytes: &[u8]| cd[at..at + bytes.len()].copy_from_slice(bytes);
        put(16 * SECTOR, b"\x01CD001\x01");
        put(17 * SECTOR, b"\x00CD001\x01EL TORITO SPECIFICATION");
        put(17 * SECTOR + 71, &20u32.to_le_bytes());
        put(18 * SECTOR, b"\xffCD001\x01");
        put(20 * SECTOR, &[1, 0]);
        put(20 * SECTOR + ENTRY, &[BOOTABLE]);
        cd
    }

    #[test]
    fn firmware_finds_its_program() {
        let programs = [("BOOTX64.EFI", vec![7; 1_000_000]), ("BOOTAA64.EFI", vec![9; 300_000])];
        let before = cd();
        let after = with_uefi(before.clone(), &programs).unwrap();
        let at = |from: usize| u32::from_le_bytes(after[from..from + 4].try_into().unwrap()) as usize;
        let catalog = 20 * SECTOR;
        assert_eq!(
            after[catalog..catalog + 2 * ENTRY],
            before[catalog..catalog + 2 * ENTRY]
        );
        assert_eq!(after[catalog + 2 * ENTRY..][..4], [LAST_SECTION, PLATFORM_UEFI, 1, 0]);
        assert_eq!(after[catalog + 3 * ENTRY], BOOTABLE);
        assert_eq!(at(DESCRIPTORS * SECTOR + 80) * SECTOR, after.len());
        let begins = at(catalog + 3 * ENTRY + 8) * SECTOR;
        let length = usize::from(u16::from_le_bytes(
            after[catalog + 3 * ENTRY + 6..][..2].try_into().unwrap(),
        ));
        assert_eq!(begins + length * VIRTUAL_SECTOR, after.len());
        let mut volume = after[begins..].to_vec();
        let system = FileSystem::new(Cursor::new(&mut volume), FsOptions::new()).unwrap();
        for (name, program) in &programs {
            let mut found = Vec::new();
            let path = format!("EFI/BOOT/{name}");
            system
                .root_dir()
                .open_file(&path)
                .unwrap()
                .read_to_end(&mut found)
                .unwrap();
            assert_eq!(found, *program);
        }
    }

    #[test]
    fn others_are_left_as_they_are() {
        let programs = [("BOOTX64.EFI", vec![7; 1000])];
        let once = with_uefi(cd(), &programs).unwrap();
        assert_eq!(with_uefi(once, &programs), None, "it has an entry already");
        assert_eq!(with_uefi(Vec::new(), &programs), None);
        assert_eq!(with_uefi(vec![0; 100 * SECTOR], &programs), None);
        let mut far = cd();
        far[17 * SECTOR + 71..17 * SECTOR + 75].fill(0xff);
        assert_eq!(with_uefi(far, &programs), None, "a catalog that isn't on it");
    }
}
