//! The boot manifest: read once from EL3's shared page, checked, turned into plain values.

use cca_abi::rmm_el3::{
    BootStatus, CONSOLE_PL011, ConsoleInfo, MANIFEST_SIZE_0_3, Manifest, ManifestList, MemoryBank,
};
use zerocopy::{FromBytes, IntoBytes};

/// Banks that the manifest may list.
pub const MAX_BANKS: usize = 8;

/// What the RMM needs from the manifest.
pub struct Machine {
    /// DRAM that may be delegated, ascending.
    pub banks: [MemoryBank; MAX_BANKS],
    /// How many of `banks` are used.
    pub num_banks: usize,
    /// Physical address of a PL011's page, 0 if there is none.
    pub console: u64,
}

/// Reads the manifest out of `page`, EL3's shared page.
///
/// `base` is the page's address; `pa_limit` is the first address past what the RMM can map.
///
/// # Errors
/// What BOOT_COMPLETE is to report: the version is not 0.3 or later of major 0, or a list is not as specified.
pub fn parse(page: &[u8; 4096], base: u64, pa_limit: u64) -> Result<Machine, BootStatus> {
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
        if machine.console == 0 && usable && console.name == CONSOLE_PL011 {
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

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: u64 = 0x418F_F000;
    const LIMIT: u64 = 1 << 46;

    /// A page with the given words, and each list's checksum filled in.
    fn page(version: u64, dram: &[u64], consoles: &[u64]) -> [u8; 4096] {
        let mut words = [0u64; 512];
        words[0] = version;
        for (at, list, item, items) in [(2, 64, 2, dram), (5, 128, 6, consoles)] {
            words[at] = (items.len() / item) as u64;
            words[at + 1] = BASE + 8 * list as u64;
            let sum = items.iter().fold(words[at].wrapping_add(words[at + 1]), |sum, w| sum.wrapping_add(*w));
            words[at + 2] = sum.wrapping_neg();
            words[list..list + items.len()].copy_from_slice(items);
        }
        let mut page = [0; 4096];
        page.copy_from_slice(words.as_bytes());
        page
    }

    fn pl011(base: u64) -> [u64; 6] {
        [base, 1, u64::from_le_bytes(CONSOLE_PL011), 1, 115_200, 0]
    }

    fn refused(page: &[u8; 4096]) -> Option<BootStatus> {
        parse(page, BASE, LIMIT).err()
    }

    #[test]
    fn banks_and_console_are_found() {
        let page = page(5, &[0x4000_0000, 0x10_0000, 0x4190_0000, 0x3E70_0000], &pl011(0x900_0000));
        let machine = parse(&page, BASE, LIMIT).unwrap_or_else(|status| panic!("{status:?}"));
        assert_eq!(machine.num_banks, 2);
        assert_eq!(machine.banks[1], MemoryBank { base: 0x4190_0000, size: 0x3E70_0000 });
        assert_eq!(machine.console, 0x900_0000);
    }

    #[test]
    fn a_console_is_not_needed_but_dram_is() {
        assert!(refused(&page(3, &[0x4000_0000, 0x1000], &[])).is_none());
        assert_eq!(refused(&page(3, &[], &[])), Some(BootStatus::ManifestDataError));
    }

    #[test]
    fn versions_before_0_3_and_of_another_major_are_refused() {
        for version in [2, 0x0001_0005] {
            let page = page(version, &[0x4000_0000, 0x1000], &[]);
            assert_eq!(refused(&page), Some(BootStatus::ManifestVersionNotSupported));
        }
    }

    #[test]
    fn a_wrong_checksum_is_refused() {
        let mut page = page(5, &[0x4000_0000, 0x1000], &[]);
        page[32] ^= 1;
        assert_eq!(refused(&page), Some(BootStatus::ManifestDataError));
    }

    #[test]
    fn banks_must_be_aligned_ascending_apart_and_mappable() {
        let bad: [&[u64]; 7] = [
            &[0, 0x1000],
            &[0x4000_0000, 0],
            &[0x4000_0800, 0x1000],
            &[0x4000_0000, 0x800],
            &[0x4000_0000, 0x2000, 0x4000_1000, 0x1000],
            &[LIMIT - 0x1000, 0x2000],
            &[u64::MAX - 0xFFF, 0x1000],
        ];
        for banks in bad {
            assert_eq!(refused(&page(5, banks, &[])), Some(BootStatus::ManifestDataError), "{banks:x?}");
        }
    }

    #[test]
    fn lists_outside_of_the_page_are_refused() {
        for pointer in [0, BASE - 8, BASE + 4088, BASE + 4, u64::MAX - 7] {
            let mut bytes = page(5, &[0x4000_0000, 0x1000], &[]);
            bytes[24..32].copy_from_slice(&pointer.to_le_bytes());
            assert_eq!(refused(&bytes), Some(BootStatus::ManifestDataError), "{pointer:#x}");
        }
    }
}
