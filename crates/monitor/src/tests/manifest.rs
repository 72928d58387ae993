use std::vec::Vec;

use super::machine::{CARVE_OUT, RESERVE};
use crate::manifest::{Bank, CONSOLE_PL011, ConsoleInfo, MAX_BANKS, ManifestPage, delegable};

const PAGE: u64 = 0x418F_F000;

fn word(m: &ManifestPage, at: u64) -> u64 {
    let mut page = [0; 4096];
    for (offset, bytes) in m.pieces() {
        page[offset..offset + bytes.len()].copy_from_slice(bytes);
    }
    let at = usize::try_from(at).unwrap();
    u64::from_le_bytes(page[at..at + 8].try_into().unwrap())
}

/// Number of items, after checking that the list and its items add up to zero.
fn list(m: &ManifestPage, header: u64, words_per_item: u64) -> (u64, u64) {
    let (count, pointer, checksum) = (word(m, header), word(m, header + 8), word(m, header + 16));
    let items = (0..count * words_per_item).map(|i| word(m, pointer - PAGE + i * 8));
    let sum = items.fold(count.wrapping_add(pointer).wrapping_add(checksum), u64::wrapping_add);
    assert_eq!(sum, 0, "list at {header}");
    (count, pointer - if count == 0 { 0 } else { PAGE })
}

#[test]
fn every_list_adds_up_to_zero() {
    let console =
        ConsoleInfo { base: 0x0900_0000, map_pages: 1, name: CONSOLE_PL011, ..ConsoleInfo::default() };
    let banks = [Bank { base: 0x4190_0000, size: 0x1000_0000 }, Bank { base: 1 << 33, size: 1 << 30 }];
    for count in 0..=2 {
        let m = ManifestPage::new(5, PAGE, &banks[..count], console);
        assert_eq!(word(&m, 0), 5, "version 0.5 and padding");
        let (dram, at) = list(&m, 16, 2);
        assert_eq!(dram, count as u64);
        if count > 0 {
            assert_eq!((word(&m, at), word(&m, at + 8)), (banks[0].base, banks[0].size));
        }
        let (consoles, at) = list(&m, 40, 6);
        assert_eq!((consoles, word(&m, at), word(&m, at + 8)), (1, 0x0900_0000, 1));
        assert_eq!(word(&m, at + 16).to_le_bytes(), *b"pl011\0\0\0");
        for header in [64, 88, 112] {
            assert_eq!(list(&m, header, 2).0, 0);
        }
        assert_eq!((word(&m, 136), word(&m, 144), word(&m, 152), word(&m, 160)), (0, 1, 0, 0));
    }
}

#[test]
fn a_manifest_of_version_0_3_ends_with_its_consoles() {
    let console = ConsoleInfo { base: 0x0900_0000, name: CONSOLE_PL011, ..ConsoleInfo::default() };
    let m = ManifestPage::new(3, PAGE, &[Bank { base: 0x4200_0000, size: 4096 }], console);
    assert_eq!(word(&m, 0), 3);
    assert_eq!(list(&m, 16, 2).0, 1);
    assert_eq!(list(&m, 40, 6).0, 1);
    for at in (64..168).step_by(8) {
        assert_eq!(word(&m, at), 0);
    }
}

#[test]
fn banks_are_what_the_holes_leave_below_the_limit() {
    let bank = |base, end| Bank { base, size: end - base };
    let ask = |banks: &[Bank], limit| {
        let mut out = [Bank::default(); MAX_BANKS];
        let count = delegable(banks, &[CARVE_OUT, RESERVE], limit, &mut out);
        out[..count].to_vec()
    };
    let dram = [bank(0x4000_0000, 0xC000_0000)];
    let (below, above) = (bank(0x4000_0000, 0x4010_0000), bank(0x4200_0000, 0xC000_0000));
    assert_eq!(ask(&dram, u64::MAX), [below, above]);
    assert_eq!(ask(&dram, 0x8000_0000), [below, bank(0x4200_0000, 0x8000_0000)]);
    assert_eq!(ask(&dram, 0x4180_0000), [below]);
    let two = [bank(0x4000_0000, 0x4100_0000), bank(1 << 32, 5 << 30)];
    assert_eq!(ask(&two, u64::MAX), [below, two[1]]);
    let many: Vec<Bank> = (0..12).map(|i| bank((i + 8) << 30, ((i + 8) << 30) + 4096)).collect();
    assert_eq!(ask(&many, u64::MAX), many[..MAX_BANKS]);
}
