use super::machine::CARVE_OUT;
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
        let m = ManifestPage::new(PAGE, &banks[..count], console);
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
fn one_bank_stays_one_bank_behind_the_carve_out() {
    let mut out = [Bank::default(); MAX_BANKS];
    let dram = [Bank { base: 0x4000_0000, size: 0x8000_0000 }];
    assert_eq!(delegable(&dram, CARVE_OUT, &mut out), 1);
    assert_eq!(out[0], Bank { base: 0x4190_0000, size: 0x8000_0000 - 0x0190_0000 });
    let two = [Bank { base: 0x4000_0000, size: 0x0100_0000 }, Bank { base: 1 << 32, size: 1 << 30 }];
    assert_eq!(delegable(&two, CARVE_OUT, &mut out), 1);
    assert_eq!(out[0], two[1]);
}
