//! Where in a Realm's own tables an address left its address space: the level that an Address Size Fault names.
//!
//! Hardware reports such an access as a stage 2 fault, whose level says nothing about stage 1, so the tables are walked
//! once more. They are the Realm's, which may change them meanwhile; the only effect is on what the Realm is told.

use crate::config::field;

/// The Realm's translation registers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tables {
    pub(crate) tcr: u64,
    pub(crate) ttbr0: u64,
    pub(crate) ttbr1: u64,
}

/// TCR_EL1.DS: LPA2 descriptors.
const TCR_DS: u64 = 1 << 59;
const VALID: u64 = 1;
const TABLE: u64 = 2;
const PAGE_LEVEL: i64 = 3;

/// The level (−1 to 3) at which the translation of `va` gives an address that is not `inside`. `read` gives a descriptor
/// of a table that is inside, or nothing if the RMM cannot read it.
pub(crate) fn fault_level(
    tables: Tables,
    va: u64,
    inside: impl Fn(u64) -> bool,
    mut read: impl FnMut(u64) -> Option<u64>,
) -> i64 {
    let upper = va >> 55 & 1 != 0;
    let (base, size, granule) = if upper {
        (tables.ttbr1, field(tables.tcr, 16, 6), field(tables.tcr, 30, 2))
    } else {
        (tables.ttbr0, field(tables.tcr, 0, 6), field(tables.tcr, 14, 2))
    };
    // TG0 and TG1 have encodings of their own.
    let page_shift: u32 = match (upper, granule) {
        (false, 1) | (true, 3) => 16,
        (false, 2) | (true, 1) => 14,
        _ => 12,
    };
    let stride = page_shift.wrapping_sub(3);
    let long = tables.tcr & TCR_DS != 0 || page_shift == 16;
    let width =
        64u32.wrapping_sub(u32::try_from(size).unwrap_or_default()).min(52).max(page_shift.wrapping_add(1));
    let va = va & u64::MAX.wrapping_shr(64u32.wrapping_sub(width));

    // The start level is the one whose index has the highest bits of the address.
    let mut shift = page_shift;
    let mut level = PAGE_LEVEL;
    while shift.wrapping_add(stride) < width {
        shift = shift.wrapping_add(stride);
        level = level.wrapping_sub(1);
    }
    let mut table = if long {
        base & 0x0000_FFFF_FFFF_FFC0 | field(base, 2, 4) << 48
    } else {
        base & 0x0000_FFFF_FFFF_FFFE
    };
    if !inside(table) {
        return 0;
    }
    while level < PAGE_LEVEL {
        let index = va.wrapping_shr(shift) & 1u64.wrapping_shl(stride).wrapping_sub(1);
        let Some(descriptor) = read(table.wrapping_add(index.wrapping_mul(8))) else { return level };
        if descriptor & (VALID | TABLE) != VALID | TABLE {
            break;
        }
        table = next_table(descriptor, page_shift, tables.tcr & TCR_DS != 0);
        if !inside(table) {
            break;
        }
        level = level.wrapping_add(1);
        shift = shift.wrapping_sub(stride);
    }
    level
}

/// The address in a table descriptor.
fn next_table(descriptor: u64, page_shift: u32, lpa2: bool) -> u64 {
    let low = u64::MAX.wrapping_shl(page_shift);
    if page_shift == 16 {
        descriptor & 0x0000_FFFF_FFFF_FFFF & low | field(descriptor, 12, 4) << 48
    } else if lpa2 {
        descriptor & 0x0003_FFFF_FFFF_FFFF & low | field(descriptor, 8, 2) << 50
    } else {
        descriptor & 0x0000_FFFF_FFFF_FFFF & low
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    extern crate std;
    use std::vec::Vec;

    /// 36 bits of IPA.
    fn inside(ipa: u64) -> bool {
        ipa >> 36 == 0
    }

    const BEYOND: u64 = 1 << 36;

    /// Walks tables of the given descriptors: the address read must be the one expected, in this order.
    fn level(tcr: u64, ttbr: u64, va: u64, descriptors: &[(u64, u64)]) -> i64 {
        let mut left: Vec<_> = descriptors.iter().rev().collect();
        let found = fault_level(Tables { tcr, ttbr0: ttbr, ttbr1: ttbr }, va, inside, |ipa| {
            let &(at, descriptor) = left.pop().unwrap();
            assert_eq!(ipa, at);
            Some(descriptor)
        });
        assert!(left.is_empty(), "{} descriptors were not read", left.len());
        found
    }

    #[test]
    fn the_level_is_where_the_address_came_from() {
        // 48 bits, 4 KiB: va has the indices 1, 2, 3, 4.
        let (tcr, va) = (16 | 16 << 16 | 2 << 30, 1 << 39 | 2 << 30 | 3 << 21 | 4 << 12 | 0x123);
        assert_eq!(level(tcr, BEYOND, va, &[]), 0);
        assert_eq!(level(tcr, 0x1000, va, &[(0x1008, BEYOND | 3)]), 0);
        assert_eq!(level(tcr, 0x1000, va, &[(0x1008, 0x2003), (0x2010, BEYOND | 3)]), 1);
        assert_eq!(level(tcr, 0x1000, va, &[(0x1008, 0x2003), (0x2010, BEYOND | 1)]), 1);
        let first = [(0x1008, 0x2003), (0x2010, 0x3003)];
        assert_eq!(level(tcr, 0x1000, va, &[first[0], first[1], (0x3018, BEYOND | 1)]), 2);
        assert_eq!(level(tcr, 0x1000, va, &[first[0], first[1], (0x3018, BEYOND | 3)]), 2);
        assert_eq!(level(tcr, 0x1000, va, &[first[0], first[1], (0x3018, 0x4003)]), 3);
        // The upper half.
        let high = va | 0xFFFF << 48;
        assert_eq!(level(tcr, 0x1000, high, &[(0x1008, 0x2003), (0x2010, BEYOND | 1)]), 1);
    }

    #[test]
    fn other_granules_and_sizes_begin_at_other_levels() {
        // 39 bits: from level 1. 64 KiB, 42 bits: from level 2, whose descriptors have long addresses.
        assert_eq!(level(25, 0x1000, 2 << 30, &[(0x1010, BEYOND | 1)]), 1);
        assert_eq!(level(22 | 1 << 14, 0x1_0000, 5 << 29, &[(0x1_0028, 0x2_0003)]), 3);
        assert_eq!(level(22 | 1 << 14, 0x1_0000, 5 << 29, &[(0x1_0028, 0x2_1003)]), 2);
        // 16 KiB, 36 bits: from level 2.
        assert_eq!(level(28 | 2 << 14, 0x4000, 6 << 25, &[(0x4030, 0x8003)]), 3);
        // LPA2, 52 bits: from level -1; its last address bits are elsewhere.
        let tcr = 12 | TCR_DS;
        assert_eq!(level(tcr, 0x1000, 7 << 48, &[(0x1038, 0x2003 | 1 << 8)]), -1);
        assert_eq!(level(tcr, 0x1000 | 1 << 2, 7 << 48, &[]), 0);
    }

    #[test]
    fn strange_registers_and_unreadable_tables_end_the_walk() {
        for tcr in [0, 63, 63 << 16, u64::MAX] {
            for va in [0, u64::MAX, 1 << 55] {
                let mut reads = 0;
                let found = fault_level(Tables { tcr, ttbr0: 0, ttbr1: 0 }, va, inside, |_| {
                    reads += 1;
                    Some(3)
                });
                assert!((-1..=3).contains(&found) && reads <= 4, "{tcr:#x} {va:#x}: {found}, {reads} reads");
            }
        }
        assert_eq!(fault_level(Tables { tcr: 16, ttbr0: 0, ttbr1: 0 }, 0, inside, |_| None), 0);
    }
}
