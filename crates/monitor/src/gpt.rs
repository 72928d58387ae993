//! Granule protection tables: construction and transitions.
//!
//! A granule's state is a nibble of a 64-bit descriptor that it shares with 15 neighbours, so a transition is
//! one compare-and-exchange; CPUs that change neighbours only retry, there is no lock. The tables start with
//! 2 MiB contiguous descriptors where a block is uniform. The first transition in such a block rewrites its 32
//! descriptors as granules, each by compare-and-exchange from the contiguous value: whoever else does the same
//! writes the same, and nobody's later transition can be undone. 2 MiB is the largest block built, because it
//! bounds that work; larger ones would not survive the host's first use of a gigabyte anyway.

use crate::platform::{GRANULE_SIZE, Pas, Platform};

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
const BLOCK_BITS: u32 = 21;
const TABLE: u64 = 3;
const BLOCK: u64 = 1;
const CONTIGUOUS: u64 = 1;
const TYPE_MASK: u64 = 0xF;
const ADDRESS_MASK: u64 = 0x000F_FFFF_FFFF_F000;

fn contiguous(gpi: Gpi, code: u64) -> u64 {
    CONTIGUOUS | gpi.bits() << 4 | code << 8
}

/// The machine's granule protection tables.
#[derive(Clone, Copy, Debug)]
pub struct Gpt {
    geometry: Geometry,
}

impl Gpt {
    /// Writes the tables. What no region mentions is open to everybody; where regions overlap, the later one
    /// counts. Only level 0 entries that a region touches get a level 1 table, and only granules under such a
    /// table can change their state.
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
        let mut next = geometry.l1_pool;
        for index in 0..geometry.l0_entries() {
            let base = index << geometry.l0_bits;
            let size = 1 << geometry.l0_bits;
            let descriptor = if regions.iter().any(|r| r.intersects(base, size)) {
                if next + l1_size > geometry.l1_pool + geometry.l1_pool_size {
                    return Err(BuildError::NoRoom);
                }
                fill_l1(platform, next, base, size, regions);
                next += l1_size;
                (next - l1_size) | TABLE
            } else {
                BLOCK | Gpi::Any.bits() << 4
            };
            platform.gpt_store(geometry.l0 + index * 8, descriptor);
        }
        Ok(Self { geometry })
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
                self.shatter(platform, entry, pa, descriptor, from);
                descriptor = platform.gpt_load(entry);
                continue;
            }
            if descriptor >> shift & 0xF != from.bits() {
                return Err(TransitionError::BadPas);
            }
            before();
            let new = descriptor & !(0xF << shift) | to.bits() << shift;
            match platform.gpt_compare_exchange(entry, descriptor, new) {
                Ok(()) => return Ok(()),
                Err(now) => descriptor = now,
            }
        }
    }

    /// Turns the contiguous block around `pa` into granules of the same state.
    #[cold]
    fn shatter(&self, platform: &impl Platform, entry: u64, pa: u64, descriptor: u64, gpi: Gpi) {
        let bits = match descriptor >> 8 & 3 {
            2 => 25,
            3 => 29,
            _ => BLOCK_BITS,
        };
        let bytes = (1_u64 << (bits - ENTRY_BITS)) * 8;
        let first = entry & !(bytes - 1);
        for at in (first..first + bytes).step_by(8) {
            // Failure means that another CPU has rewritten this one already.
            let _ = platform.gpt_compare_exchange(at, descriptor, gpi.granules());
        }
        platform.gpt_invalidate(pa & !((1 << bits) - 1), bits);
    }
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

fn fill_l1(platform: &impl Platform, table: u64, base: u64, size: u64, regions: &[Region]) {
    let per_block = 1_u64 << (BLOCK_BITS - ENTRY_BITS);
    for block in 0..size >> BLOCK_BITS {
        let block_base = base + (block << BLOCK_BITS);
        let uniform = gpi_of(regions, block_base, 1 << BLOCK_BITS);
        for i in 0..per_block {
            let descriptor = match uniform {
                Some(gpi) => contiguous(gpi, 1),
                None => {
                    let entry_base = block_base + (i << ENTRY_BITS);
                    (0..16).fold(0, |all, n| {
                        let granule = entry_base + n * GRANULE_SIZE;
                        // A granule is never divided: regions are granule aligned.
                        let gpi = gpi_of(regions, granule, GRANULE_SIZE).unwrap_or(Gpi::NoAccess);
                        all | gpi.bits() << (n * 4)
                    })
                }
            };
            platform.gpt_store(table + (block * per_block + i) * 8, descriptor);
        }
    }
}
