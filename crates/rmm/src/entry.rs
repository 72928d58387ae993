//! Stage 2 translation table entries: what they mean and how they are encoded.
//!
//! A valid descriptor is the architecture's. In an invalid one (bits 1:0 zero) the RMM keeps, in the bits that
//! hardware ignores: bit 2 HIPAS (0 unassigned, 1 assigned), bits 6:5 RIPAS, bit 55 "unprotected", and for an
//! assigned entry its address where a valid descriptor has it. Thus an all-zero table is UNASSIGNED with RIPAS EMPTY.

use cca_abi::rmi::Ripas;

use crate::level::Level;

const VALID: u64 = 1;
const TABLE_OR_PAGE: u64 = 1 << 1;
const SW_ASSIGNED: u64 = 1 << 2;
const SW_RIPAS_SHIFT: u32 = 5;
const SH_INNER: u64 = 3 << 8;
const SH_OUTER: u64 = 2 << 8;
const ACCESS_FLAG: u64 = 1 << 10;
const NS: u64 = 1 << 55;
const XN_ALL: u64 = 2 << 53;
/// Normal write-back (FWB encoding), read/write.
const REALM_ATTRIBUTES: u64 = 0b0110 << 2 | 3 << 6 | ACCESS_FLAG;

/// Fields of an unprotected entry that the host chooses: MemAttr\[2:0\] and S2AP.
const HOST_ATTRIBUTES: u64 = 0b111 << 2 | 3 << 6;

/// How addresses are written in a Realm's descriptors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    /// 48 bits in 47:12; bits 9:8 say who shares the memory.
    Bits48,
    /// LPA2: bits 49:12 in place, 51:50 in 9:8; VTCR_EL2 says who shares the memory.
    Bits52,
}

impl Format {
    const fn in_place(self) -> u64 {
        match self {
            Self::Bits48 => 0x0000_FFFF_FFFF_F000,
            Self::Bits52 => 0x0003_FFFF_FFFF_F000,
        }
    }

    /// The bits of a descriptor that are its address.
    const fn mask(self) -> u64 {
        match self {
            Self::Bits48 => self.in_place(),
            Self::Bits52 => self.in_place() | 3 << 8,
        }
    }

    const fn address(self, descriptor: u64) -> u64 {
        let high = match self {
            Self::Bits48 => 0,
            Self::Bits52 => (descriptor & 3 << 8) << 42,
        };
        descriptor & self.in_place() | high
    }

    /// The bits of a descriptor that say `address`.
    pub(crate) const fn place(self, address: u64) -> u64 {
        let high = match self {
            Self::Bits48 => 0,
            Self::Bits52 => address >> 42 & 3 << 8,
        };
        address & self.in_place() | high
    }

    /// Whether a descriptor can hold this (granule aligned) address.
    pub(crate) const fn fits(self, address: u64) -> bool {
        match self {
            Self::Bits48 => address >> 48 == 0,
            Self::Bits52 => address >> 52 == 0,
        }
    }

    /// The shareability field of a leaf.
    const fn shareability(self, field: u64) -> u64 {
        match self {
            Self::Bits48 => field,
            Self::Bits52 => 0,
        }
    }
}

/// A host-supplied descriptor for an unprotected mapping: address and attributes, checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct HostDescriptor {
    address: u64,
    attributes: u64,
}

impl HostDescriptor {
    /// Takes a descriptor of which every bit outside the host's fields is zero and whose MemAttr is not reserved.
    pub(crate) fn parse(descriptor: u64, format: Format) -> Option<Self> {
        let reserved_attribute = descriptor >> 2 & 0b111 == 0b100;
        let foreign = descriptor & !(format.mask() | HOST_ATTRIBUTES) != 0;
        (!foreign && !reserved_attribute).then_some(Self::of(descriptor, format))
    }

    fn of(descriptor: u64, format: Format) -> Self {
        Self { address: format.address(descriptor), attributes: descriptor & HOST_ATTRIBUTES }
    }

    /// The output address.
    pub(crate) fn address(self) -> u64 {
        self.address
    }

    /// The whole, as the host gave it.
    pub(crate) fn bits(self, format: Format) -> u64 {
        format.place(self.address) | self.attributes
    }

    /// Cacheable in FWB terms: 0b110 forced write-back, 0b111 stage 1's choice.
    fn shareability(self) -> u64 {
        if self.attributes >> 2 & 0b110 == 0b110 { SH_INNER } else { SH_OUTER }
    }
}

/// A decoded entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Entry {
    /// Protected, no page.
    Unassigned(Ripas),
    /// Protected, with a page or block at the address.
    Assigned(u64, Ripas),
    /// Unprotected, nothing mapped.
    UnassignedNs,
    /// Unprotected, mapped to host memory.
    AssignedNs(HostDescriptor),
    /// A table of the next level at the address.
    Table(u64),
}

impl Entry {
    /// Decodes what [`Self::encode`] wrote at the same level.
    pub(crate) fn decode(raw: u64, level: Level, format: Format) -> Self {
        if raw & VALID != 0 {
            if level < Level::PAGE && raw & TABLE_OR_PAGE != 0 {
                Self::Table(format.address(raw))
            } else if raw & NS != 0 {
                Self::AssignedNs(HostDescriptor::of(raw, format))
            } else {
                Self::Assigned(format.address(raw), Ripas::Ram)
            }
        } else if raw & NS != 0 {
            Self::UnassignedNs
        } else {
            let ripas = match raw >> SW_RIPAS_SHIFT & 3 {
                0 => Ripas::Empty,
                1 => Ripas::Ram,
                _ => Ripas::Destroyed,
            };
            if raw & SW_ASSIGNED != 0 {
                Self::Assigned(format.address(raw), ripas)
            } else {
                Self::Unassigned(ripas)
            }
        }
    }

    /// The descriptor.
    pub(crate) fn encode(self, level: Level, format: Format) -> u64 {
        let leaf = if level == Level::PAGE { VALID | TABLE_OR_PAGE } else { VALID };
        let software = |ripas: Ripas| u64::from(ripas as u8) << SW_RIPAS_SHIFT;
        match self {
            Self::Unassigned(ripas) => software(ripas),
            Self::Assigned(pa, Ripas::Ram) => {
                format.place(pa) | REALM_ATTRIBUTES | format.shareability(SH_INNER) | leaf
            }
            Self::Assigned(pa, ripas) => format.place(pa) | SW_ASSIGNED | software(ripas),
            Self::UnassignedNs => NS,
            Self::AssignedNs(host) => {
                let shareability = format.shareability(host.shareability());
                host.bits(format) | shareability | ACCESS_FLAG | NS | XN_ALL | leaf
            }
            Self::Table(pa) => format.place(pa) | VALID | TABLE_OR_PAGE,
        }
    }

    /// Whether the entry with this descriptor is live, without decoding it.
    pub(crate) const fn is_live_raw(raw: u64) -> bool {
        // An invalid entry has bit 2 only if it is assigned; in a valid one bit 0 is enough.
        raw & (VALID | SW_ASSIGNED) != 0
    }

    /// Whether hardware may hold a translation through this leaf.
    pub(crate) fn is_valid_leaf(self) -> bool {
        matches!(self, Self::Assigned(_, Ripas::Ram) | Self::AssignedNs(_))
    }

    /// Whether the entry counts as a reference to its table (keeps the table alive).
    pub(crate) fn is_counted(self) -> bool {
        matches!(self, Self::Assigned(..) | Self::Table(_))
    }

    /// The RIPAS, if the entry has one.
    pub(crate) fn ripas(self) -> Option<Ripas> {
        match self {
            Self::Unassigned(ripas) | Self::Assigned(_, ripas) => Some(ripas),
            _ => None,
        }
    }

    /// The same entry with another RIPAS; entries without one are unchanged.
    pub(crate) fn with_ripas(self, ripas: Ripas) -> Self {
        match self {
            Self::Unassigned(_) => Self::Unassigned(ripas),
            Self::Assigned(pa, _) => Self::Assigned(pa, ripas),
            other => other,
        }
    }

    /// This entry, moved `offset` bytes on: what an entry of a table is that unfolds this one.
    pub(crate) fn offset(self, offset: u64) -> Self {
        match self {
            Self::Assigned(pa, ripas) => Self::Assigned(pa.wrapping_add(offset), ripas),
            Self::AssignedNs(host) => {
                Self::AssignedNs(HostDescriptor { address: host.address.wrapping_add(offset), ..host })
            }
            other => other,
        }
    }

    /// The entry at `level` that replaces a table whose first entry is this one and whose others continue it;
    /// `None` if a leaf of that level cannot express it.
    pub(crate) fn folded(self, level: Level) -> Option<Self> {
        let fits = |pa| level >= Level::FIRST_BLOCK && level.is_aligned(pa);
        match self {
            Self::Unassigned(_) | Self::UnassignedNs => Some(self),
            Self::Assigned(pa, _) => fits(pa).then_some(self),
            Self::AssignedNs(host) => fits(host.address()).then_some(self),
            Self::Table(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Format::{Bits48, Bits52};
    use Level::{L0, L1, L2, L3};

    fn host(descriptor: u64, format: Format) -> Entry {
        Entry::AssignedNs(HostDescriptor::parse(descriptor, format).unwrap())
    }

    #[test]
    fn entries_survive_encoding_at_every_level_in_both_formats() {
        for (format, pa) in [(Bits48, 0xFFFF_4020_0000), (Bits52, 0xD_FFFF_4020_0000)] {
            for level in [L1, L2, L3] {
                for entry in [
                    Entry::Unassigned(Ripas::Empty),
                    Entry::Unassigned(Ripas::Ram),
                    Entry::Unassigned(Ripas::Destroyed),
                    Entry::Assigned(pa, Ripas::Empty),
                    Entry::Assigned(pa, Ripas::Ram),
                    Entry::Assigned(pa, Ripas::Destroyed),
                    Entry::UnassignedNs,
                    host(format.place(pa) | 0b110 << 2 | 3 << 6, format),
                ] {
                    let raw = entry.encode(level, format);
                    assert_eq!(Entry::decode(raw, level, format), entry, "{entry:?} at {level:?}");
                    assert_eq!(
                        Entry::is_live_raw(raw),
                        matches!(entry, Entry::Assigned(..) | Entry::AssignedNs(_))
                    );
                }
            }
            for level in [Level::Minus1, L0, L1, L2] {
                let raw = Entry::Table(pa).encode(level, format);
                assert_eq!(Entry::decode(raw, level, format), Entry::Table(pa));
                assert!(Entry::is_live_raw(raw));
            }
        }
        assert_eq!(Entry::decode(0, L3, Bits48), Entry::Unassigned(Ripas::Empty));
    }

    #[test]
    fn only_ram_and_shared_mappings_are_valid_for_hardware() {
        let ram = |format| Entry::Assigned(0x1000, Ripas::Ram).encode(L3, format);
        assert_eq!(ram(Bits48), 0x1000 | 0x7DB);
        assert_eq!(ram(Bits52), 0x1000 | 0x4DB, "with LPA2 these bits are address");
        assert_eq!(Entry::Assigned(0x1000, Ripas::Empty).encode(L3, Bits48) & 3, 0);
        assert_eq!(Entry::Assigned(0x1000, Ripas::Destroyed).encode(L3, Bits48) & 3, 0);
        assert_eq!(Entry::UnassignedNs.encode(L3, Bits48) & 3, 0);
        let shared = host(0x1000 | 0b110 << 2 | 3 << 6, Bits48);
        assert_eq!(shared.encode(L3, Bits48), 0x00C0_0000_0000_1000 | 0x7DB);
    }

    #[test]
    fn lpa2_addresses_have_their_top_bits_in_9_8() {
        let entry = Entry::Assigned(0x000E_0000_0000_1000, Ripas::Ram);
        assert_eq!(entry.encode(L3, Bits52), 0x0002_0000_0000_1000 | 3 << 8 | 0x4DB);
        assert!(Bits52.fits(0x000F_FFFF_FFFF_F000) && !Bits52.fits(1 << 52));
        assert!(Bits48.fits(0xFFFF_FFFF_F000) && !Bits48.fits(1 << 48));
    }

    #[test]
    fn host_descriptors_with_foreign_bits_or_reserved_attributes_are_refused() {
        for (format, foreign) in [(Bits48, &[8, 9, 48, 49][..]), (Bits52, &[50, 51][..])] {
            assert!(HostDescriptor::parse(0x1000 | 0b111 << 2, format).is_some());
            assert!(HostDescriptor::parse(0x1000 | 0b100 << 2, format).is_none());
            for bit in [0, 1, 5, 10, 11, 52, 53, 54, 55, 56, 63].iter().chain(foreign) {
                assert!(HostDescriptor::parse(0x1000 | 1 << bit, format).is_none(), "bit {bit}");
            }
        }
        assert!(HostDescriptor::parse(3 << 8 | 1 << 48, Bits52).is_some());
    }

    #[test]
    fn blocks_exist_at_levels_one_and_two_only() {
        let entry = Entry::Assigned(0, Ripas::Ram);
        assert_eq!(entry.folded(L2), Some(entry));
        assert_eq!(entry.folded(L1), Some(entry));
        assert_eq!(entry.folded(L0), None);
        assert_eq!(Entry::Assigned(0x1000, Ripas::Ram).folded(L2), None);
        assert_eq!(Entry::UnassignedNs.folded(L0), Some(Entry::UnassignedNs));
    }
}
