//! Stage 2 translation as the hardware does it for a Realm, with a TLB that forgets nothing by itself.
//!
//! The TLB keeps every translation that was ever used until software invalidates it, so a missing invalidation shows
//! up as a guest that still reaches a page it lost. Every table fetch and the final address pass the granule
//! protection check.

use crate::memory::{Fault, Memory, PAGE_SIZE, Pas};
use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::Ordering::Relaxed;

/// What an IPA page maps to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// Physical address of the page.
    pub pa: u64,
    /// The physical address space that the access is made in.
    pub pas: Pas,
    /// S2AP bit 0.
    pub read: bool,
    /// S2AP bit 1.
    pub write: bool,
    /// XN is clear.
    pub execute: bool,
}

/// A stage 2 fault: `DFSC` with level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stage2Fault {
    /// Fault status code, bits 5:0 of the syndrome.
    pub fsc: u64,
}

const TRANSLATION: u64 = 0x04;
const TRANSLATION_MINUS_1: u64 = 0x2B;
const ACCESS_FLAG: u64 = 0x08;
const ADDRESS_SIZE: u64 = 0x00;
const GPF_ON_WALK: u64 = 0x24;

/// A translation fault at `level`.
fn translation_fault(level: i64) -> Stage2Fault {
    Stage2Fault { fsc: u64::try_from(level).map_or(TRANSLATION_MINUS_1, |level| TRANSLATION | level) }
}

fn level_bits(level: i64) -> u64 {
    u64::try_from(level).unwrap_or(0)
}

/// The address in a descriptor, with or without LPA2.
fn output(descriptor: u64, lpa2: bool) -> u64 {
    if lpa2 {
        descriptor & 0x0003_FFFF_FFFF_F000 | (descriptor >> 8 & 3) << 50
    } else {
        descriptor & 0x0000_FFFF_FFFF_F000
    }
}

/// Walks the tables of a Realm.
///
/// # Errors
/// The fault that the hardware would report to EL2.
pub fn walk(memory: &Memory, vttbr: u64, vtcr: u64, ipa: u64) -> Result<Translation, Stage2Fault> {
    let width = 64 - (vtcr & 0x3F);
    // VTCR_EL2.DS and SL2.
    let lpa2 = vtcr >> 32 & 1 != 0;
    let start: i64 = match (vtcr >> 6) & 3 {
        0 if lpa2 && vtcr >> 33 & 1 != 0 => -1,
        0 => 2,
        1 => 1,
        2 => 0,
        _ => 3,
    };
    if ipa >> width != 0 {
        return Err(translation_fault(start));
    }
    let mut table = vttbr & 0x0000_FFFF_FFFF_F000 | if lpa2 { (vttbr >> 2 & 0xF) << 48 } else { 0 };
    let mut level = start;
    loop {
        let shift = 12 + 9 * (3 - level);
        // The start level may be several concatenated tables: its index is as wide as the address needs.
        let index = if level == start { ipa >> shift } else { (ipa >> shift) & 0x1FF };
        let at = table + index * 8;
        if memory.check(Pas::Realm, at).is_err() {
            return Err(Stage2Fault { fsc: GPF_ON_WALK | level_bits(level) });
        }
        let Some(word) = memory.raw_word(at) else {
            return Err(Stage2Fault { fsc: ADDRESS_SIZE | level_bits(level) });
        };
        let descriptor = word.load(Relaxed);
        match (descriptor & 3, level) {
            (3, -1..=2) => {
                table = output(descriptor, lpa2);
                level += 1;
            }
            (1, 1..=2) | (3, 3) => {
                if descriptor & (1 << 10) == 0 {
                    return Err(Stage2Fault { fsc: ACCESS_FLAG | level_bits(level) });
                }
                let span = 1u64 << shift;
                let base = output(descriptor, lpa2) & !(span - 1);
                return Ok(Translation {
                    pa: (base | (ipa & (span - 1))) & !(PAGE_SIZE - 1),
                    pas: if descriptor & (1 << 55) == 0 { Pas::Realm } else { Pas::NonSecure },
                    read: descriptor & (1 << 6) != 0,
                    write: descriptor & (1 << 7) != 0,
                    execute: (descriptor >> 53) & 3 == 0,
                });
            }
            _ => return Err(translation_fault(level)),
        }
    }
}

/// The TLB of the whole machine, by VMID and IPA page.
#[derive(Default)]
pub struct Tlb {
    entries: Mutex<HashMap<(u64, u64), Translation>>,
}

fn vmid(vttbr: u64) -> u64 {
    vttbr >> 48
}

impl Tlb {
    /// Translates `ipa`, from the TLB if it is there, and remembers what it found.
    ///
    /// # Errors
    /// As [`walk`].
    pub fn translate(
        &self,
        memory: &Memory,
        vttbr: u64,
        vtcr: u64,
        ipa: u64,
    ) -> Result<Translation, Stage2Fault> {
        let key = (vmid(vttbr), ipa / PAGE_SIZE);
        let mut entries = self.entries.lock().unwrap();
        if let Some(found) = entries.get(&key) {
            return Ok(*found);
        }
        let found = walk(memory, vttbr, vtcr, ipa)?;
        entries.insert(key, found);
        Ok(found)
    }

    /// `TLBI IPAS2E1IS` and what goes with it, for the span of one entry.
    pub fn invalidate(&self, vttbr: u64, ipa: u64, level: i64) {
        let pages = cca_abi::rmi::entry_span(level) / PAGE_SIZE;
        let first = (ipa / PAGE_SIZE) & !(pages - 1);
        self.entries
            .lock()
            .unwrap()
            .retain(|&(id, page), _| id != vmid(vttbr) || page < first || page >= first + pages);
    }

    /// `TLBI VMALLS12E1IS`.
    pub fn invalidate_vmid(&self, vttbr: u64) {
        self.entries.lock().unwrap().retain(|&(id, _), _| id != vmid(vttbr));
    }
}

/// The final check of an access: permissions, then granule protection.
///
/// # Errors
/// The fault that the hardware would report to EL2.
pub fn check_access(
    memory: &Memory,
    found: Translation,
    write: bool,
    execute: bool,
) -> Result<(), Stage2Fault> {
    const PERMISSION_LEVEL3: u64 = 0x0F;
    const GPF: u64 = 0x28;
    const EXTERNAL: u64 = 0x10;
    if (write && !found.write) || (!write && !found.read) || (execute && !found.execute) {
        return Err(Stage2Fault { fsc: PERMISSION_LEVEL3 });
    }
    match memory.check(found.pas, found.pa) {
        Ok(()) if memory.raw(found.pa).is_some() => Ok(()),
        Ok(()) | Err(Fault::NoMemory) => Err(Stage2Fault { fsc: EXTERNAL }),
        Err(_) => Err(Stage2Fault { fsc: GPF }),
    }
}
