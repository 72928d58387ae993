//! Physical memory with granule protection.
//!
//! Two address ranges exist: DRAM, and secure RAM which only Root can see. Every access names the physical address
//! space it is made from and is checked against the granule protection tables *that the monitor built in secure RAM*,
//! by a walk that follows the architecture, as QEMU's does. Before the monitor switches the check on, everything is
//! accessible (there is one copy of the bytes; a PAS is only a permission).

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use zerocopy::FromZeros;

/// Bytes in a page.
pub const PAGE_SIZE: u64 = 4096;
/// One page: 512 little-endian words.
pub type Page = [AtomicU64; 512];

/// Start of DRAM.
pub const DRAM_BASE: u64 = 0x4000_0000;
/// Start of secure RAM.
pub const SECURE_BASE: u64 = 0x0E00_0000;
/// Bytes of secure RAM.
pub const SECURE_SIZE: u64 = 0x0100_0000;

/// A physical address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pas {
    /// Non-secure: the host.
    NonSecure,
    /// Realm: the RMM and protected guest memory.
    Realm,
    /// Root: the monitor.
    Root,
}

impl Pas {
    /// The GPI that lets this space, and only this, through.
    fn gpi(self) -> u64 {
        match self {
            Self::NonSecure => 0x9,
            Self::Root => 0xA,
            Self::Realm => 0xB,
        }
    }
}

/// Why an access was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Granule protection fault: the granule belongs to another world (its GPI is given).
    Protection(u64),
    /// The tables are broken: a GPT walk fault.
    Walk,
    /// Nothing is there.
    NoMemory,
}

/// The machine's memory.
pub struct Memory {
    dram: Box<[Page]>,
    secure: Box<[Page]>,
    /// `GPCCR_EL3`, the same on all CPUs here. Bit 16 enables the check.
    gpccr: AtomicU64,
    /// `GPTBR_EL3`.
    gptbr: AtomicU64,
}

/// Zeroed pages. Most are never touched, and cost nothing then.
fn pages(bytes: u64) -> Box<[Page]> {
    let count = usize::try_from(bytes / PAGE_SIZE).expect("as many as fit");
    <[Page]>::new_box_zeroed_with_elems(count).expect("memory for the machine")
}

impl Memory {
    /// Zeroed memory with `dram_size` bytes of DRAM.
    #[must_use]
    pub fn new(dram_size: u64) -> Self {
        Self {
            dram: pages(dram_size),
            secure: pages(SECURE_SIZE),
            gpccr: AtomicU64::new(0),
            gptbr: AtomicU64::new(0),
        }
    }

    /// Bytes of DRAM.
    #[must_use]
    pub fn dram_size(&self) -> u64 {
        self.dram.len() as u64 * PAGE_SIZE
    }

    /// Sets the two registers that control granule protection.
    pub fn set_granule_protection(&self, gpccr: u64, gptbr: u64) {
        self.gptbr.store(gptbr, Relaxed);
        self.gpccr.store(gpccr, Relaxed);
    }

    /// The page at `pa` without any check: for what is no CPU (tests' omniscience, DMA, table walks).
    #[must_use]
    pub fn raw(&self, pa: u64) -> Option<&Page> {
        let (base, pages) =
            if pa >= DRAM_BASE { (DRAM_BASE, &self.dram) } else { (SECURE_BASE, &self.secure) };
        let index = pa.checked_sub(base)? / PAGE_SIZE;
        pages.get(usize::try_from(index).ok()?)
    }

    /// The word at `pa` without any check.
    #[must_use]
    pub fn raw_word(&self, pa: u64) -> Option<&AtomicU64> {
        Some(&self.raw(pa)?[((pa % PAGE_SIZE) / 8) as usize])
    }

    /// The page at `pa` as seen from `from`.
    ///
    /// # Errors
    /// [`Fault`] as the hardware would report it.
    pub fn page(&self, from: Pas, pa: u64) -> Result<&Page, Fault> {
        self.check(from, pa)?;
        self.raw(pa).ok_or(Fault::NoMemory)
    }

    /// Whether `from` may access `pa`.
    ///
    /// # Errors
    /// [`Fault`] as the hardware would report it.
    pub fn check(&self, from: Pas, pa: u64) -> Result<(), Fault> {
        if pa < DRAM_BASE && from != Pas::Root {
            return Err(Fault::NoMemory);
        }
        if self.gpccr.load(Relaxed) & (1 << 16) == 0 {
            return Ok(());
        }
        match self.gpi(pa)? {
            0xF => Ok(()),
            gpi if gpi == from.gpi() => Ok(()),
            gpi => Err(Fault::Protection(gpi)),
        }
    }

    /// The GPI of the granule at `pa`, by the walk of the architecture.
    ///
    /// # Errors
    /// [`Fault::Walk`] for tables that hardware would refuse.
    pub fn gpi(&self, pa: u64) -> Result<u64, Fault> {
        let gpccr = self.gpccr.load(Relaxed);
        // 4 KiB granules and 1 GiB per level 0 entry are all that this machine has.
        let pps = match gpccr & 7 {
            0 => 32,
            1 => 36,
            2 => 40,
            3 => 42,
            4 => 44,
            5 => 48,
            _ => return Err(Fault::Walk),
        };
        if pa >> pps != 0 {
            return Err(Fault::Walk);
        }
        let word = |at: u64| self.raw_word(at).map(|word| word.load(Relaxed)).ok_or(Fault::Walk);
        let base = (self.gptbr.load(Relaxed) & ((1 << 40) - 1)) << 12;
        let entry = word(base + (pa >> 30) * 8)?;
        let gpi = match entry & 0xF {
            1 if entry >> 8 == 0 => (entry >> 4) & 0xF,
            3 => {
                let table = entry & 0x000F_FFFF_FFFF_F000;
                if table & 0x1_FFFF != 0 {
                    return Err(Fault::Walk);
                }
                let entry = word(table + ((pa >> 16) & 0x3FFF) * 8)?;
                if entry & 0xF == 1 {
                    if entry >> 10 != 0 || (entry >> 8) & 3 == 0 {
                        return Err(Fault::Walk);
                    }
                    (entry >> 4) & 0xF
                } else {
                    (entry >> (((pa >> 12) & 0xF) * 4)) & 0xF
                }
            }
            _ => return Err(Fault::Walk),
        };
        match gpi {
            0x0 | 0x8..=0xB | 0xF => Ok(gpi),
            _ => Err(Fault::Walk),
        }
    }

    /// How many granules of DRAM each GPI has: what a test compares before and after.
    #[must_use]
    pub fn census(&self) -> std::collections::BTreeMap<u64, u64> {
        let mut census = std::collections::BTreeMap::new();
        for index in 0..self.dram.len() as u64 {
            let gpi = self.gpi(DRAM_BASE + index * PAGE_SIZE).unwrap_or(u64::MAX);
            *census.entry(gpi).or_insert(0) += 1;
        }
        census
    }
}
