//! Where on a disk file systems may be: partitions by GPT or MBR, or the whole disk. A guest may have written anything
//! here.

use std::io::Result;

use vmm::disk::Disk;

/// What an address in a partition table counts.
const SECTOR: u64 = 512;
/// More partitions than this are none that anybody made.
const MOST: u32 = 256;
/// MBR's type of the entry that covers a disk with a GPT.
const PROTECTIVE: u8 = 0xee;

/// A part of a disk, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Part {
    /// Its number as the guest's kernel counts; 0 is the whole disk.
    pub(super) number: u32,
    pub(super) start: u64,
    pub(super) size: u64,
}

/// All parts that may hold a file system: the partitions, if there is a table, else the whole disk.
pub(super) fn find(disk: &Disk) -> Result<Vec<Part>> {
    let whole = Part { number: 0, start: 0, size: disk.size() };
    if disk.size() < 2 * SECTOR {
        return Ok(vec![whole]);
    }
    let mut first = [0; 512];
    disk.read(&mut first, 0)?;
    if first[510..] != [0x55, 0xaa] {
        return Ok(vec![whole]);
    }
    let old = mbr(&first);
    let found = if old.iter().any(|(kind, _)| *kind == PROTECTIVE) {
        gpt(disk)?
    } else {
        old.into_iter().map(|(_, part)| part).collect()
    };
    let parts: Vec<Part> = found
        .into_iter()
        .filter(|part| part.size > 0)
        .filter(|part| part.start.checked_add(part.size).is_some_and(|end| end <= disk.size()))
        .collect();
    // A boot sector without a table is that of a file system.
    Ok(if parts.is_empty() { vec![whole] } else { parts })
}

/// The four entries, with their types.
fn mbr(sector: &[u8; 512]) -> Vec<(u8, Part)> {
    (1..)
        .zip(sector[446..510].chunks_exact(16))
        .map(|(number, entry)| {
            let [start, size] = [8, 12].map(|at| u64::from(le32(entry, at)) * SECTOR);
            (entry[4], Part { number, start, size })
        })
        .filter(|(kind, _)| *kind != 0)
        .collect()
}

fn gpt(disk: &Disk) -> Result<Vec<Part>> {
    let mut header = [0; 512];
    disk.read(&mut header, SECTOR)?;
    let (count, length) = (le32(&header, 80), le32(&header, 84));
    if &header[..8] != b"EFI PART" || count > MOST || !(128..=4096).contains(&length) {
        return Ok(Vec::new());
    }
    let Some(table) = le64(&header, 72).checked_mul(SECTOR) else { return Ok(Vec::new()) };
    let mut parts = Vec::new();
    for index in 0..count {
        let at = table.checked_add(u64::from(index) * u64::from(length));
        let Some(at) = at.filter(|at| at.checked_add(128).is_some_and(|end| end <= disk.size())) else {
            break;
        };
        let mut entry = [0; 128];
        disk.read(&mut entry, at)?;
        let (first, last) = (le64(&entry, 32), le64(&entry, 40));
        let sectors = last.checked_sub(first).and_then(|count| count.checked_add(1));
        let size = sectors.and_then(|count| count.checked_mul(SECTOR));
        let (Some(start), Some(size)) = (first.checked_mul(SECTOR), size) else { continue };
        if entry[..16] != [0; 16] {
            parts.push(Part { number: index + 1, start, size });
        }
    }
    Ok(parts)
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    let mut value = [0; 4];
    value.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(value)
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    let mut value = [0; 8];
    value.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(value)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::atomic::{AtomicU32, Ordering};
    use vmm::disk::Format;

    /// A file name of this process alone.
    pub(crate) fn scratch(name: &str) -> std::path::PathBuf {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        std::env::temp_dir().join(format!("realm-image-{}-{number}-{name}", std::process::id()))
    }

    /// A disk of `mib` MiB with a GPT; partitions are (first sector, sectors).
    pub(crate) fn with_gpt(mib: usize, parts: &[(u64, u64)]) -> Vec<u8> {
        let mut disk = vec![0; mib << 20];
        disk[510..512].copy_from_slice(&[0x55, 0xaa]);
        disk[446 + 4] = PROTECTIVE;
        disk[446 + 8] = 1;
        disk[446 + 12] = 0xff;
        let header = &mut disk[512..1024];
        header[..8].copy_from_slice(b"EFI PART");
        header[72..80].copy_from_slice(&2u64.to_le_bytes());
        header[80..84].copy_from_slice(&128u32.to_le_bytes());
        header[84..88].copy_from_slice(&128u32.to_le_bytes());
        for (index, (first, count)) in parts.iter().enumerate() {
            let entry = &mut disk[1024 + index * 128..][..128];
            entry[0] = 0xaf;
            entry[32..40].copy_from_slice(&first.to_le_bytes());
            entry[40..48].copy_from_slice(&(first + count - 1).to_le_bytes());
        }
        disk
    }

    fn parts_of(bytes: &[u8]) -> Vec<Part> {
        let path = scratch("table");
        std::fs::write(&path, bytes).unwrap();
        let parts = find(&Disk::open(&path, Format::Raw, true).unwrap()).unwrap();
        std::fs::remove_file(path).unwrap();
        parts
    }

    #[test]
    fn partitions_are_found_by_either_table_and_a_bare_disk_is_one() {
        let part = |number, start: u64, count: u64| Part { number, start: start * 512, size: count * 512 };
        assert_eq!(
            parts_of(&with_gpt(4, &[(64, 100), (2048, 2048)])),
            [part(1, 64, 100), part(2, 2048, 2048)]
        );
        // One that ends behind the disk is none.
        assert_eq!(parts_of(&with_gpt(4, &[(64, 100), (2048, 20_480)])), [part(1, 64, 100)]);
        let mut mbr = vec![0; 1 << 20];
        mbr[510..512].copy_from_slice(&[0x55, 0xaa]);
        mbr[446 + 16 + 4] = 0x83;
        mbr[446 + 16 + 8] = 8;
        mbr[446 + 16 + 12] = 16;
        assert_eq!(parts_of(&mbr), [part(2, 8, 16)]);
        assert_eq!(parts_of(&vec![0; 1 << 20]), [part(0, 0, 2048)]);
        assert_eq!(parts_of(&[0; 100])[0].number, 0);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(50))]

        /// Whatever a table says, every part lies on the disk.
        #[test]
        fn no_table_leads_off_the_disk(changes in proptest::collection::vec((0..2048usize, any::<u8>()), 1..40)) {
            let mut disk = with_gpt(1, &[(64, 100), (200, 300)]);
            for (at, value) in changes {
                disk[at] = value;
            }
            for part in parts_of(&disk) {
                prop_assert!(part.start.checked_add(part.size).is_some_and(|end| end <= 1 << 20));
            }
        }
    }
}
