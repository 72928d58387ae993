//! Granule protection tables: construction and transitions.
//!
//! A granule's state is a nibble of a 64-bit descriptor that it shares with 15 neighbours, so a transition is
//! one compare-and-exchange; CPUs that change neighbours only retry.
//!
//! The tables start with the largest contiguous descriptors that fit (512, 32 or 2 MiB). All descriptors of a
//! contiguous block must say the same, because a CPU may cache any one of them for the whole block. So the first
//! transition in a block divides it: under a lock, all of its descriptors are rewritten with smaller sizes and the
//! same protection, and what CPUs have cached of the block is invalidated. Another CPU's transition that finds a
//! descriptor which was rewritten already waits until that is done: before, a third CPU might still cache the old
//! block, and with it the old protection of the granule. Blocks are never put together again.

use crate::platform::{GRANULE_SIZE, Pas, Platform};
use crate::sync::{AtomicBool, Ordering, relax};

/// Granule protection information: who may access a granule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Gpi {
    /// Nobody.
    NoAccess = 0x0,
    /// Secure.
    Secure = 0x8,
    /// Non-secure.
    NonSecure = 0x9,
    /// Root.
    Root = 0xA,
    /// Realm.
    Realm = 0xB,
    /// Everybody.
    Any = 0xF,
}

impl Gpi {
    const fn bits(self) -> u64 {
        match self {
            Self::NoAccess => 0x0,
            Self::Secure => 0x8,
            Self::NonSecure => 0x9,
            Self::Root => 0xA,
            Self::Realm => 0xB,
            Self::Any => 0xF,
        }
    }

    const fn from_bits(bits: u64) -> Option<Self> {
        Some(match bits {
            0x0 => Self::NoAccess,
            0x8 => Self::Secure,
            0x9 => Self::NonSecure,
            0xA => Self::Root,
            0xB => Self::Realm,
            0xF => Self::Any,
            _ => return None,
        })
    }

    /// A level 1 descriptor of 16 granules in this state.
    const fn granules(self) -> u64 {
        self.bits() * 0x1111_1111_1111_1111
    }
}

/// A range of physical memory with one protection.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    /// First byte, granule aligned.
    pub base: u64,
    /// Length in bytes, a multiple of the granule.
    pub size: u64,
    /// Protection at boot.
    pub gpi: Gpi,
}

impl Region {
    fn end(&self) -> u64 {
        self.base.saturating_add(self.size)
    }
    fn contains(&self, base: u64, size: u64) -> bool {
        self.base <= base && base.saturating_add(size) <= self.end()
    }
    fn intersects(&self, base: u64, size: u64) -> bool {
        self.base < base.saturating_add(size) && base < self.end()
    }
}

/// Where the tables lie and what they cover.
#[derive(Clone, Copy, Debug)]
pub struct Geometry {
    /// Level 0 table, aligned to its size (at least 4 KiB).
    pub l0: u64,
    /// First byte of the memory for level 1 tables, aligned to [`Geometry::l1_size`].
    pub l1_pool: u64,
    /// Bytes in that memory.
    pub l1_pool_size: u64,
    /// log2 of the protected physical address space (GPCCR_EL3.PPS).
    pub pps_bits: u32,
    /// log2 of what one level 0 entry covers (GPCCR_EL3.L0GPTSZ).
    pub l0_bits: u32,
}

impl Geometry {
    /// Bytes of one level 1 table: a nibble for each granule.
    pub fn l1_size(&self) -> u64 {
        1 << (self.l0_bits - GRANULE_BITS - 1)
    }
    /// Number of level 0 entries.
    pub fn l0_entries(&self) -> u64 {
        1 << (self.pps_bits.saturating_sub(self.l0_bits))
    }
}

/// Why the tables cannot be built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BuildError {
    /// The memory for level 1 tables is used up.
    NoRoom,
    /// A region or table address is not aligned.
    Misaligned,
}

/// Why a transition was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TransitionError {
    /// Not a granule's address, or no granule that can change its state.
    BadAddress,
    /// The granule is not in the state that the transition starts from.
    BadPas,
}

const GRANULE_BITS: u32 = 12;
/// One level 1 descriptor covers 16 granules.
const ENTRY_BITS: u32 = GRANULE_BITS + 4;
/// Sizes of contiguous blocks; the code in a descriptor is the index and one.
const BLOCK_BITS: [u32; 3] = [21, 25, 29];
const TABLE: u64 = 3;
const BLOCK: u64 = 1;
const CONTIGUOUS: u64 = 1;
const TYPE_MASK: u64 = 0xF;
const ADDRESS_MASK: u64 = 0x000F_FFFF_FFFF_F000;

fn contiguous(gpi: Gpi, code: u64) -> u64 {
    CONTIGUOUS | gpi.bits() << 4 | code << 8
}

/// log2 of the size of a contiguous descriptor's block.
fn block_bits(descriptor: u64) -> u32 {
    match descriptor >> 8 & 3 {
        3 => BLOCK_BITS[2],
        2 => BLOCK_BITS[1],
        _ => BLOCK_BITS[0],
    }
}

/// The machine's granule protection tables.
#[derive(Debug)]
pub struct Gpt {
    geometry: Geometry,
    /// First address of a level 0 entry that got no level 1 table although a region lies there.
    limit: u64,
    /// End of the memory for level 1 tables that is in use.
    l1_end: u64,
    /// A contiguous block is being divided.
    dividing: AtomicBool,
}

impl Gpt {
    /// Writes the tables. What no region mentions is open to everybody; where regions overlap, the later one
    /// counts. Level 0 entries that a region touches get a level 1 table, in ascending order, as long as there is
    /// memory for tables; granules without one cannot change their state, see [`Gpt::limit`].
    pub fn build(
        platform: &impl Platform,
        geometry: Geometry,
        regions: &[Region],
    ) -> Result<Self, BuildError> {
        let l1_size = geometry.l1_size();
        let l0_size = (geometry.l0_entries() * 8).max(4096);
        let misaligned = |r: &Region| r.base % GRANULE_SIZE != 0 || r.size % GRANULE_SIZE != 0;
        if geometry.l0 % l0_size != 0 || geometry.l1_pool % l1_size != 0 || regions.iter().any(misaligned) {
            return Err(BuildError::Misaligned);
        }
        let pool_end = geometry.l1_pool + geometry.l1_pool_size;
        let (mut next, mut limit) = (geometry.l1_pool, u64::MAX);
        for index in 0..geometry.l0_entries() {
            let base = index << geometry.l0_bits;
            let size = 1 << geometry.l0_bits;
            let descriptor = if !regions.iter().any(|r| r.intersects(base, size)) {
                BLOCK | Gpi::Any.bits() << 4
            } else if next + l1_size <= pool_end {
                fill_l1(platform, next, base, size, regions);
                next += l1_size;
                (next - l1_size) | TABLE
            } else {
                limit = limit.min(base);
                BLOCK | gpi_of(regions, base, size).ok_or(BuildError::NoRoom)?.bits() << 4
            };
            platform.gpt_store(geometry.l0 + index * 8, descriptor);
        }
        Ok(Self { geometry, limit, l1_end: next, dividing: AtomicBool::new(false) })
    }

    /// Granules at and above this address can never be delegated: there was no memory for their tables.
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// End of the memory that level 1 tables use.
    pub fn l1_end(&self) -> u64 {
        self.l1_end
    }

    /// The tables' place and shape.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// The protection of the granule at `pa`; `None` where no valid descriptor says so.
    pub fn lookup(&self, platform: &impl Platform, pa: u64) -> Option<Gpi> {
        if pa >> self.geometry.pps_bits != 0 {
            return None;
        }
        let l0 = platform.gpt_load(self.l0_entry(pa));
        match l0 & TYPE_MASK {
            BLOCK => Gpi::from_bits(l0 >> 4 & 0xF),
            TABLE => {
                let descriptor = platform.gpt_load(self.l1_entry(l0, pa));
                if descriptor & TYPE_MASK == CONTIGUOUS {
                    Gpi::from_bits(descriptor >> 4 & 0xF)
                } else {
                    Gpi::from_bits(descriptor >> nibble_shift(pa) & 0xF)
                }
            }
            _ => None,
        }
    }

    /// RMM_GTSI_DELEGATE: Non-secure to Realm. The contents are not touched.
    pub fn delegate(&self, platform: &impl Platform, pa: u64) -> Result<(), TransitionError> {
        let entry = self.find(platform, pa)?;
        // Lines of the Realm alias that are left from an earlier life must not be written back over what the
        // granule's new owner writes.
        self.change(platform, entry, pa, Gpi::NonSecure, Gpi::Realm, || {
            platform.flush_granule(pa, Pas::Realm)
        })?;
        platform.gpt_invalidate(pa, GRANULE_BITS);
        platform.flush_granule(pa, Pas::NonSecure);
        Ok(())
    }

    /// RMM_GTSI_UNDELEGATE: Realm to Non-secure. The contents are not touched.
    pub fn undelegate(&self, platform: &impl Platform, pa: u64) -> Result<(), TransitionError> {
        let entry = self.find(platform, pa)?;
        // Through "no access", so that no CPU can use either alias while the caches are cleaned.
        self.change(platform, entry, pa, Gpi::Realm, Gpi::NoAccess, || ())?;
        platform.gpt_invalidate(pa, GRANULE_BITS);
        platform.flush_granule(pa, Pas::Realm);
        platform.flush_granule(pa, Pas::NonSecure);
        self.change(platform, entry, pa, Gpi::NoAccess, Gpi::NonSecure, || ())?;
        platform.gpt_invalidate(pa, GRANULE_BITS);
        Ok(())
    }

    /// Takes all Realm memory for Root, for good, so that no CPU can use it any more; then calls `scrub` with each
    /// piece of Root memory. Before the machine is reset: its memory keeps what is in it.
    ///
    /// Other CPUs may be at it all the time. What they delegate behind this function's back holds nothing but the
    /// host's data, because the RMM, which would use it, is gone with its own memory.
    pub fn seize_realm(&self, platform: &impl Platform, mut scrub: impl FnMut(u64, u64)) {
        self.each_entry(platform, |entry, _, mut old| {
            loop {
                let new = root_for_realm(old);
                if new == old {
                    return;
                }
                match platform.gpt_compare_exchange(entry, old, new) {
                    Ok(()) => return,
                    Err(now) => old = now,
                }
            }
        });
        for index in 0..self.geometry.l0_entries() {
            platform.gpt_invalidate(index << self.geometry.l0_bits, 30);
        }
        self.each_entry(platform, |_, base, descriptor| {
            if descriptor & TYPE_MASK == CONTIGUOUS {
                if descriptor >> 4 & 0xF == Gpi::Root.bits() {
                    scrub(base, 1 << ENTRY_BITS);
                }
                return;
            }
            for n in 0..16 {
                if descriptor >> (n * 4) & 0xF == Gpi::Root.bits() {
                    scrub(base + n * GRANULE_SIZE, GRANULE_SIZE);
                }
            }
        });
    }

    /// Calls `visit` with the place, the first address and the value of each level 1 descriptor, but with only one
    /// of those of a contiguous Non-secure block.
    fn each_entry(&self, platform: &impl Platform, mut visit: impl FnMut(u64, u64, u64)) {
        for index in 0..self.geometry.l0_entries() {
            let l0 = platform.gpt_load(self.geometry.l0 + index * 8);
            if l0 & TYPE_MASK != TABLE {
                continue;
            }
            let end = (index + 1) << self.geometry.l0_bits;
            let mut base = index << self.geometry.l0_bits;
            while base < end {
                let entry = self.l1_entry(l0, base);
                let descriptor = platform.gpt_load(entry);
                visit(entry, base, descriptor);
                let skip =
                    descriptor & TYPE_MASK == CONTIGUOUS && descriptor >> 4 & 0xF == Gpi::NonSecure.bits();
                base += 1 << if skip { block_bits(descriptor) } else { ENTRY_BITS };
            }
        }
    }

    fn l0_entry(&self, pa: u64) -> u64 {
        self.geometry.l0 + (pa >> self.geometry.l0_bits) * 8
    }

    fn l1_entry(&self, l0: u64, pa: u64) -> u64 {
        let index = (pa & ((1 << self.geometry.l0_bits) - 1)) >> ENTRY_BITS;
        (l0 & ADDRESS_MASK) + index * 8
    }

    /// The address of the level 1 descriptor of a granule that may change its state.
    fn find(&self, platform: &impl Platform, pa: u64) -> Result<u64, TransitionError> {
        if pa % GRANULE_SIZE != 0 || pa >> self.geometry.pps_bits != 0 {
            return Err(TransitionError::BadAddress);
        }
        let l0 = platform.gpt_load(self.l0_entry(pa));
        if l0 & TYPE_MASK == TABLE { Ok(self.l1_entry(l0, pa)) } else { Err(TransitionError::BadAddress) }
    }

    /// Changes one granule from `from` to `to` if it is in `from`; `before` runs between check and change.
    fn change(
        &self,
        platform: &impl Platform,
        entry: u64,
        pa: u64,
        from: Gpi,
        to: Gpi,
        before: impl Fn(),
    ) -> Result<(), TransitionError> {
        let shift = nibble_shift(pa);
        let mut descriptor = platform.gpt_load(entry);
        loop {
            if descriptor & TYPE_MASK == CONTIGUOUS {
                if descriptor >> 4 & 0xF != from.bits() {
                    return Err(TransitionError::BadPas);
                }
                self.divide(platform, entry, pa, from);
                descriptor = platform.gpt_load(entry);
                continue;
            }
            if descriptor >> shift & 0xF != from.bits() {
                return Err(TransitionError::BadPas);
            }
            // Whoever wrote this descriptor may not be done with the block around it.
            while self.dividing.load(Ordering::Acquire) {
                relax();
            }
            before();
            let new = descriptor & !(0xF << shift) | to.bits() << shift;
            match platform.gpt_compare_exchange(entry, descriptor, new) {
                Ok(()) => return Ok(()),
                Err(now) => descriptor = now,
            }
        }
    }

    /// Divides the contiguous block around `pa`: the 2 MiB around it into granules, what remains into the largest
    /// blocks. Protection does not change.
    #[cold]
    fn divide(&self, platform: &impl Platform, entry: u64, pa: u64, gpi: Gpi) {
        while self.dividing.compare_exchange_weak(false, true, Ordering::Acquire, Ordering::Relaxed).is_err()
        {
            relax();
        }
        let descriptor = platform.gpt_load(entry);
        // Another CPU may have done it meanwhile.
        if descriptor & TYPE_MASK == CONTIGUOUS {
            let bits = block_bits(descriptor);
            let base = pa & !((1 << bits) - 1);
            let first = entry - ((pa - base) >> ENTRY_BITS) * 8;
            for i in 0..1_u64 << (bits - ENTRY_BITS) {
                let at = base + (i << ENTRY_BITS);
                let smaller = if at >> BLOCK_BITS[0] == pa >> BLOCK_BITS[0] {
                    gpi.granules()
                } else if at >> BLOCK_BITS[1] == pa >> BLOCK_BITS[1] {
                    contiguous(gpi, 1)
                } else {
                    contiguous(gpi, 2)
                };
                platform.gpt_store(first + i * 8, smaller);
            }
            platform.gpt_invalidate(base, bits);
        }
        self.dividing.store(false, Ordering::Release);
    }
}

/// The descriptor with Root in Realm's place.
fn root_for_realm(descriptor: u64) -> u64 {
    let (realm, root) = (Gpi::Realm.bits(), Gpi::Root.bits());
    if descriptor & TYPE_MASK == CONTIGUOUS {
        return if descriptor >> 4 & 0xF == realm {
            contiguous(Gpi::Root, descriptor >> 8 & 3)
        } else {
            descriptor
        };
    }
    (0..64).step_by(4).fold(descriptor, |all, shift| {
        if all >> shift & 0xF == realm { all & !(0xF << shift) | root << shift } else { all }
    })
}

fn nibble_shift(pa: u64) -> u64 {
    (pa >> GRANULE_BITS & 0xF) * 4
}

fn gpi_of(regions: &[Region], base: u64, size: u64) -> Option<Gpi> {
    let mut gpi = Some(Gpi::Any);
    for region in regions {
        if region.contains(base, size) {
            gpi = Some(region.gpi);
        } else if region.intersects(base, size) {
            gpi = None;
        }
    }
    gpi
}

/// Fills a level 1 table with the largest blocks that are uniform.
fn fill_l1(platform: &impl Platform, table: u64, base: u64, size: u64, regions: &[Region]) {
    let mut at = base;
    while at < base + size {
        let left = base + size - at;
        let block = [(3, 29), (2, 25), (1, 21)].into_iter().find_map(|(code, bits): (u64, u32)| {
            let block = 1 << bits;
            if at % block != 0 || block > left {
                return None;
            }
            gpi_of(regions, at, block).map(|gpi| (contiguous(gpi, code), block))
        });
        let (descriptor, length) = block.unwrap_or_else(|| {
            let granules = (0..16).fold(0, |all, n| {
                // A granule is never divided: regions are granule aligned.
                let gpi = gpi_of(regions, at + n * GRANULE_SIZE, GRANULE_SIZE).unwrap_or(Gpi::NoAccess);
                all | gpi.bits() << (n * 4)
            });
            (granules, 1 << ENTRY_BITS)
        });
        let first = table + ((at - base) >> ENTRY_BITS) * 8;
        for i in 0..length >> ENTRY_BITS {
            platform.gpt_store(first + i * 8, descriptor);
        }
        at += length;
    }
}
