//! Stage 1 of R-EL2 (EL2&0 regime, 4 KiB granule, 48-bit addresses).
//!
//! | what | address | access |
//! |---|---|---|
//! | image: text / constants / data | its physical address | RX / R / RW |
//! | carve-out behind the image | its physical address | RW |
//! | per-CPU stacks | as above | RW, with unmapped pages below |
//! | EL3's shared page | its physical address | RW |
//! | DRAM banks in the Realm PAS | their physical address | RW |
//! | DRAM banks in the Non-secure PAS | physical address + [`NS_ALIAS`] | RW |
//! | UART0 | its physical address | device |
//!
//! The two views of DRAM cover all of it always. Which of the two works for a granule is decided by the granule
//! protection table at the time of the access: the RMM uses the Realm view only for granules that it owns, and
//! the NS view only inside routines that survive a fault.

use crate::layout::{Bump, NS_ALIAS};

const VALID: u64 = 1;
const TABLE: u64 = 1 << 1;
const PAGE: u64 = 1 << 1;
const AF: u64 = 1 << 10;
const INNER_SHAREABLE: u64 = 3 << 8;
const READ_ONLY: u64 = 1 << 7;
const NS: u64 = 1 << 5;
const ATTR_DEVICE: u64 = 1 << 2;
const PXN: u64 = 1 << 53;
const UXN: u64 = 1 << 54;
const ADDRESS: u64 = 0x0000_FFFF_FFFF_F000;

/// Read-only and executable.
pub(crate) const TEXT: u64 = VALID | AF | INNER_SHAREABLE | READ_ONLY | UXN;
/// Read-only.
pub(crate) const CONSTANTS: u64 = TEXT | PXN;
/// Readable and writable, Realm PAS.
pub(crate) const DATA: u64 = VALID | AF | INNER_SHAREABLE | UXN | PXN;
/// Readable and writable, Non-secure PAS.
pub(crate) const NS_DATA: u64 = DATA | NS;
/// A device, Non-secure PAS (EL3 opens it to all).
pub(crate) const DEVICE: u64 = VALID | AF | UXN | PXN | NS | ATTR_DEVICE;

/// Attribute 0: normal write-back; attribute 1: device nGnRE.
pub(crate) const MAIR: u64 = 0x04FF;

/// M, C, I, WXN, SA and the RES1 bits of a CPU that has none of the optional controls.
pub(crate) const SCTLR: u64 = 0x30C5_0830 | 1 | 1 << 2 | 1 << 3 | 1 << 12 | 1 << 19;

/// 48-bit TTBR0, no TTBR1, write-back inner shareable walks.
pub(crate) fn tcr(mmfr0: u64) -> u64 {
    let pa_size = (mmfr0 & 0xF).min(5);
    16 | 1 << 8 | 1 << 10 | 3 << 12 | 1 << 23 | 16 << 16 | 2 << 30 | pa_size << 32
}

/// First address past what the tables can map (below the NS alias).
pub(crate) fn pa_limit(mmfr0: u64) -> u64 {
    let bits = match mmfr0 & 0xF {
        0 => 32,
        1 => 36,
        2 => 40,
        3 => 42,
        4 => 44,
        _ => 46,
    };
    (1 << bits).min(NS_ALIAS)
}

/// The tables while they are being built, in the carve-out.
pub(crate) struct Tables<'a> {
    root: u64,
    memory: &'a mut Bump,
}

/// No memory is left for a table.
pub(crate) struct NoMemory;

impl<'a> Tables<'a> {
    /// An empty tree.
    pub(crate) fn new(memory: &'a mut Bump) -> Result<Self, NoMemory> {
        let root = memory.zeroed_page().ok_or(NoMemory)?;
        Ok(Self { root, memory })
    }

    /// For `TTBR0_EL2`.
    pub(crate) fn root(&self) -> u64 {
        self.root
    }

    /// The memory that the tables come from, for what has to be allocated in between.
    pub(crate) fn memory(&mut self) -> &mut Bump {
        self.memory
    }

    /// Maps `[pa, pa + size)` at `va` with the largest blocks that fit. Nothing must be mapped there yet.
    pub(crate) fn map(&mut self, va: u64, pa: u64, size: u64, attributes: u64) -> Result<(), NoMemory> {
        let (mut va, mut pa, end) = (va, pa, va + size);
        while va < end {
            let fits = |block: u64| (va | pa) & (block - 1) == 0 && end - va >= block;
            let (level, step) = if fits(1 << 30) {
                (1, 1 << 30)
            } else if fits(1 << 21) {
                (2, 1 << 21)
            } else {
                (3, 1 << 12)
            };
            self.set(va, level, pa | attributes | if level == 3 { PAGE } else { 0 })?;
            va += step;
            pa += step;
        }
        Ok(())
    }

    fn set(&mut self, va: u64, level: u32, descriptor: u64) -> Result<(), NoMemory> {
        let mut table = self.root;
        for at in 0..level {
            let slot = entry(table, va, at);
            // SAFETY: `table` is a page of this tree, reached by the boot tables at its physical address, and
            // no CPU walks the tree yet.
            unsafe {
                if *slot & VALID == 0 {
                    *slot = self.memory.zeroed_page().ok_or(NoMemory)? | VALID | TABLE;
                }
                table = *slot & ADDRESS;
            }
        }
        // SAFETY: as above.
        unsafe { *entry(table, va, level) = descriptor };
        Ok(())
    }
}

fn entry(table: u64, va: u64, level: u32) -> *mut u64 {
    let index = va >> (39 - 9 * level) & 0x1FF;
    (table + index * 8) as *mut u64
}
