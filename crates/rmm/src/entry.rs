//! Stage 2 translation table entries: what they mean and how they are encoded.
//!
//! A valid descriptor is the architecture's. In an invalid one (bits 1:0 zero) the RMM keeps, in the bits that
//! hardware ignores: bit 2 HIPAS (0 unassigned, 1 assigned), bits 6:5 RIPAS, bit 55 "unprotected", and for an
//! assigned entry its address in 47:12. Thus an all-zero table is UNASSIGNED with RIPAS EMPTY.

use cca_abi::rmi::Ripas;

const VALID: u64 = 1;
const TABLE_OR_PAGE: u64 = 1 << 1;
const ADDRESS: u64 = 0x0000_FFFF_FFFF_F000;
const SW_ASSIGNED: u64 = 1 << 2;
const SW_RIPAS_SHIFT: u32 = 5;
const SH_INNER: u64 = 3 << 8;
const SH_OUTER: u64 = 2 << 8;
const ACCESS_FLAG: u64 = 1 << 10;
const NS: u64 = 1 << 55;
const XN_ALL: u64 = 2 << 53;
/// Normal write-back (FWB encoding), read/write.
const REALM_ATTRIBUTES: u64 = 0b0110 << 2 | 3 << 6 | SH_INNER | ACCESS_FLAG;

/// Fields of an unprotected entry that the host chooses: MemAttr\[2:0\] and S2AP.
const HOST_ATTRIBUTES: u64 = 0b111 << 2 | 3 << 6;

/// Lowest level with block descriptors.
const FIRST_BLOCK_LEVEL: u32 = 1;
/// The level of page descriptors.
pub(crate) const PAGE_LEVEL: u32 = 3;

/// Bytes of IPA space that an entry at `level` (0 to 3) covers.
pub(crate) const fn span(level: u32) -> u64 {
    1 << span_shift(level)
}

/// `log2` of [`span`].
pub(crate) const fn span_shift(level: u32) -> u32 {
    12 + 9 * (PAGE_LEVEL - level)
}

/// Whether `address` is a multiple of the span of an entry at `level`.
pub(crate) const fn is_span_aligned(address: u64, level: u32) -> bool {
    address & (span(level) - 1) == 0
}

/// A host-supplied descriptor for an unprotected mapping: address and attributes, checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct HostDescriptor(u64);

impl HostDescriptor {
    /// Takes a descriptor of which every bit outside the host's fields is zero and whose MemAttr is not reserved.
    pub(crate) fn parse(descriptor: u64) -> Option<Self> {
        let reserved_attribute = descriptor >> 2 & 0b111 == 0b100;
        (descriptor & !(ADDRESS | HOST_ATTRIBUTES) == 0 && !reserved_attribute).then_some(Self(descriptor))
    }

    /// The output address.
    pub(crate) fn address(self) -> u64 {
        self.0 & ADDRESS
    }

    /// The whole, as the host gave it.
    pub(crate) fn bits(self) -> u64 {
        self.0
    }

    fn offset(self, by: u64) -> Self {
        Self(self.0.wrapping_add(by))
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
    pub(crate) fn decode(raw: u64, level: u32) -> Self {
        if raw & VALID != 0 {
            if level < PAGE_LEVEL && raw & TABLE_OR_PAGE != 0 {
                Self::Table(raw & ADDRESS)
            } else if raw & NS != 0 {
                Self::AssignedNs(HostDescriptor(raw & (ADDRESS | HOST_ATTRIBUTES)))
            } else {
                Self::Assigned(raw & ADDRESS, Ripas::Ram)
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
                Self::Assigned(raw & ADDRESS, ripas)
            } else {
                Self::Unassigned(ripas)
            }
        }
    }

    /// The descriptor.
    pub(crate) fn encode(self, level: u32) -> u64 {
        let leaf = if level == PAGE_LEVEL { VALID | TABLE_OR_PAGE } else { VALID };
        let software = |ripas: Ripas| u64::from(ripas as u8) << SW_RIPAS_SHIFT;
        match self {
            Self::Unassigned(ripas) => software(ripas),
            Self::Assigned(pa, Ripas::Ram) => pa | REALM_ATTRIBUTES | leaf,
            Self::Assigned(pa, ripas) => pa | SW_ASSIGNED | software(ripas),
            Self::UnassignedNs => NS,
            Self::AssignedNs(host) => {
                // Cacheable in FWB terms: 0b110 forced write-back, 0b111 stage 1's choice.
                let shareability = if host.0 >> 2 & 0b110 == 0b110 { SH_INNER } else { SH_OUTER };
                host.0 | shareability | ACCESS_FLAG | NS | XN_ALL | leaf
            }
            Self::Table(pa) => pa | VALID | TABLE_OR_PAGE,
        }
    }

    /// Whether hardware may hold a translation through this leaf.
    pub(crate) fn is_valid_leaf(self) -> bool {
        matches!(self, Self::Assigned(_, Ripas::Ram) | Self::AssignedNs(_))
    }

    /// "Live entry": an address is stored.
    pub(crate) fn is_live(self) -> bool {
        matches!(self, Self::Assigned(..) | Self::AssignedNs(_) | Self::Table(_))
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

    /// What entry number `index` of a table at `child_level` is when this entry is unfolded into that table.
    pub(crate) fn child(self, index: u64, child_level: u32) -> Self {
        let offset = index << span_shift(child_level);
        match self {
            Self::Assigned(pa, ripas) => Self::Assigned(pa + offset, ripas),
            Self::AssignedNs(host) => Self::AssignedNs(host.offset(offset)),
            other => other,
        }
    }

    /// The entry that replaces a table at `child_level` whose first entry is this one and whose others continue
    /// it; `None` if a leaf of the parent's level cannot express it.
    pub(crate) fn folded(self, child_level: u32) -> Option<Self> {
        let parent_level = child_level.checked_sub(1)?;
        let fits = |pa| parent_level >= FIRST_BLOCK_LEVEL && is_span_aligned(pa, parent_level);
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

    #[test]
    fn entries_survive_encoding_at_every_level() {
        let host = HostDescriptor::parse(0x4020_0000 | 0b110 << 2 | 3 << 6).unwrap();
        for level in 1..=3 {
            for entry in [
                Entry::Unassigned(Ripas::Empty),
                Entry::Unassigned(Ripas::Ram),
                Entry::Unassigned(Ripas::Destroyed),
                Entry::Assigned(0x4020_0000, Ripas::Empty),
                Entry::Assigned(0x4020_0000, Ripas::Ram),
                Entry::Assigned(0x4020_0000, Ripas::Destroyed),
                Entry::UnassignedNs,
                Entry::AssignedNs(host),
            ] {
                assert_eq!(Entry::decode(entry.encode(level), level), entry, "{entry:?} at {level}");
            }
            if level < 3 {
                assert_eq!(Entry::decode(Entry::Table(0x1000).encode(level), level), Entry::Table(0x1000));
            }
        }
        assert_eq!(Entry::decode(0, 3), Entry::Unassigned(Ripas::Empty));
    }

    #[test]
    fn only_ram_and_shared_mappings_are_valid_for_hardware() {
        assert_eq!(Entry::Assigned(0x1000, Ripas::Ram).encode(3), 0x1000 | 0x7DB);
        assert_eq!(Entry::Assigned(0x1000, Ripas::Empty).encode(3) & 3, 0);
        assert_eq!(Entry::Assigned(0x1000, Ripas::Destroyed).encode(3) & 3, 0);
        assert_eq!(Entry::UnassignedNs.encode(3) & 3, 0);
        let host = HostDescriptor::parse(0x1000 | 0b110 << 2 | 3 << 6).unwrap();
        assert_eq!(Entry::AssignedNs(host).encode(3), 0x00C0_0000_0000_1000 | 0x7DB);
    }

    #[test]
    fn host_descriptors_with_foreign_bits_or_reserved_attributes_are_refused() {
        assert!(HostDescriptor::parse(0x1000 | 0b111 << 2).is_some());
        assert!(HostDescriptor::parse(0x1000 | 0b100 << 2).is_none());
        for bit in [0, 1, 5, 8, 9, 10, 11, 48, 53, 55, 63] {
            assert!(HostDescriptor::parse(0x1000 | 1 << bit).is_none(), "bit {bit}");
        }
    }

    #[test]
    fn blocks_exist_at_levels_one_and_two_only() {
        let entry = Entry::Assigned(0, Ripas::Ram);
        assert_eq!(entry.folded(3), Some(entry));
        assert_eq!(entry.folded(2), Some(entry));
        assert_eq!(entry.folded(1), None);
        assert_eq!(Entry::Assigned(0x1000, Ripas::Ram).folded(3), None);
        assert_eq!(Entry::UnassignedNs.folded(1), Some(Entry::UnassignedNs));
    }
}
