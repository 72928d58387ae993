//! The boot manifest: read once from EL3's shared page, checked, turned into plain values.

use cca_abi::rmm_el3::{BootStatus, ConsoleInfo, MANIFEST_SIZE_0_3, Manifest, ManifestList, MemoryBank};
use zerocopy::{FromBytes, IntoBytes};

/// Banks that the manifest may list.
pub(crate) const MAX_BANKS: usize = 8;

/// What the RMM needs from the manifest.
pub(crate) struct Machine {
    /// DRAM that may be delegated, ascending.
    pub(crate) banks: [MemoryBank; MAX_BANKS],
    /// How many of `banks` are used.
    pub(crate) num_banks: usize,
    /// Physical address of a PL011's page, 0 if there is none.
    pub(crate) console: u64,
}

/// Reads the manifest out of `page`, EL3's shared page.
///
/// `pa_limit` is the first address past what the RMM can map.
pub(crate) fn parse(page: &[u8; 4096], base: u64, pa_limit: u64) -> Result<Machine, BootStatus> {
    let version = u32::from_le_bytes([page[0], page[1], page[2], page[3]]);
    let (major, minor) = (version >> 16 & 0x7FFF, version & 0xFFFF);
    if major != 0 || minor < 3 {
        return Err(BootStatus::ManifestVersionNotSupported);
    }
    // Only the fields that version 0.3 has are used; what a later version adds may not be there.
    let mut manifest = Manifest::default();
    manifest.as_mut_bytes()[..MANIFEST_SIZE_0_3].copy_from_slice(&page[..MANIFEST_SIZE_0_3]);

    let mut machine = Machine { banks: [MemoryBank::default(); MAX_BANKS], num_banks: 0, console: 0 };
    let mut end = 0;
    for item in list(page, base, &manifest.dram, size_of::<MemoryBank>(), MAX_BANKS)? {
        let bank = MemoryBank::read_from_bytes(item).map_err(|_| BootStatus::ManifestDataError)?;
        let top = bank.base.checked_add(bank.size).ok_or(BootStatus::ManifestDataError)?;
        let aligned = (bank.base | bank.size) & 0xFFF == 0;
        if bank.base == 0 || bank.size == 0 || !aligned || bank.base < end || top > pa_limit {
            return Err(BootStatus::ManifestDataError);
        }
        machine.banks[machine.num_banks] = bank;
        machine.num_banks += 1;
        end = top;
    }
    if machine.num_banks == 0 {
        return Err(BootStatus::ManifestDataError);
    }
    for item in list(page, base, &manifest.consoles, size_of::<ConsoleInfo>(), 16)? {
        let console = ConsoleInfo::read_from_bytes(item).map_err(|_| BootStatus::ManifestDataError)?;
        let usable = console.base != 0 && console.base & 0xFFF == 0 && console.base < pa_limit;
        if machine.console == 0 && usable && console.name == *b"pl011\0\0\0" {
            machine.console = console.base;
        }
    }
    Ok(machine)
}

/// The items of a list, after its checksum and bounds have been checked.
fn list<'a>(
    page: &'a [u8; 4096],
    base: u64,
    list: &ManifestList,
    item: usize,
    max: usize,
) -> Result<core::slice::ChunksExact<'a, u8>, BootStatus> {
    let bad = BootStatus::ManifestDataError;
    let num = usize::try_from(list.num).map_err(|_| bad)?;
    if num > max {
        return Err(bad);
    }
    let bytes: &[u8] = if num == 0 {
        &[]
    } else {
        let start = list.ptr.checked_sub(base).and_then(|offset| usize::try_from(offset).ok()).ok_or(bad)?;
        if start % 8 != 0 {
            return Err(bad);
        }
        start.checked_add(num * item).and_then(|end| page.get(start..end)).ok_or(bad)?
    };
    let mut sum = list.num.wrapping_add(list.ptr).wrapping_add(list.checksum);
    for word in bytes.chunks_exact(8) {
        sum = sum.wrapping_add(u64::from_le_bytes(word.try_into().map_err(|_| bad)?));
    }
    if sum != 0 {
        return Err(bad);
    }
    Ok(bytes.chunks_exact(item))
}
