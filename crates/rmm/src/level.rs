//! Levels of stage 2 tables.

use cca_abi::rmi::Status;

/// The level of a table, and of its entries. Level −1 exists with LPA2 only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(crate) enum Level {
    Minus1,
    L0,
    L1,
    L2,
    L3,
}

use Level::{L0, L1, L2, L3, Minus1};

/// `log2` of a granule's size.
const PAGE_SHIFT: u32 = 12;
/// `log2` of the entries per table.
const INDEX_BITS: u32 = 9;

impl Level {
    /// The level of page descriptors.
    pub(crate) const PAGE: Self = L3;
    /// The lowest number of a level with block descriptors.
    pub(crate) const FIRST_BLOCK: Self = L1;

    /// The level with this (signed) number.
    pub(crate) const fn from_number(number: u64) -> Option<Self> {
        match number {
            u64::MAX => Some(Minus1),
            0 => Some(L0),
            1 => Some(L1),
            2 => Some(L2),
            3 => Some(L3),
            _ => None,
        }
    }

    /// Its number.
    pub(crate) const fn number(self) -> i64 {
        self as i64 - 1
    }

    /// Its number as a register shows it.
    pub(crate) const fn register(self) -> u64 {
        match self {
            Minus1 => u64::MAX,
            L0 => 0,
            L1 => 1,
            L2 => 2,
            L3 => 3,
        }
    }

    /// `RMI_ERROR_RTT` with this level; the index is eight bits of the number.
    pub(crate) const fn error(self) -> Status {
        Status::ErrorRtt(match self {
            Minus1 => 0xFF,
            L0 => 0,
            L1 => 1,
            L2 => 2,
            L3 => 3,
        })
    }

    /// The level of the table that an entry of this level may point to.
    pub(crate) const fn child(self) -> Option<Self> {
        match self {
            Minus1 => Some(L0),
            L0 => Some(L1),
            L1 => Some(L2),
            L2 => Some(L3),
            L3 => None,
        }
    }

    /// The level of the entry that points to a table of this level.
    pub(crate) const fn parent(self) -> Option<Self> {
        match self {
            Minus1 => None,
            L0 => Some(Minus1),
            L1 => Some(L0),
            L2 => Some(L1),
            L3 => Some(L2),
        }
    }

    /// `log2` of [`Self::span`].
    pub(crate) const fn span_shift(self) -> u32 {
        match self {
            Minus1 => PAGE_SHIFT + 4 * INDEX_BITS,
            L0 => PAGE_SHIFT + 3 * INDEX_BITS,
            L1 => PAGE_SHIFT + 2 * INDEX_BITS,
            L2 => PAGE_SHIFT + INDEX_BITS,
            L3 => PAGE_SHIFT,
        }
    }

    /// Bytes of IPA space that an entry covers.
    pub(crate) const fn span(self) -> u64 {
        1u64.wrapping_shl(self.span_shift())
    }

    /// Whether `address` is a multiple of the span of an entry.
    pub(crate) const fn is_aligned(self, address: u64) -> bool {
        address & (self.span().wrapping_sub(1)) == 0
    }

    /// `address` rounded down to the span of an entry.
    pub(crate) const fn align_down(self, address: u64) -> u64 {
        address & !(self.span().wrapping_sub(1))
    }

    /// The index in a table of this level of the entry that covers `ipa`.
    pub(crate) const fn index(self, ipa: u64) -> usize {
        // Nine bits.
        (ipa.wrapping_shr(self.span_shift()) & 0x1FF) as usize
    }

    /// Which of several concatenated start tables of this level covers `ipa`.
    pub(crate) const fn start_table(self, ipa: u64) -> u64 {
        ipa.wrapping_shr(self.span_shift()).wrapping_shr(INDEX_BITS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_those_of_the_architecture() {
        for level in [Minus1, L0, L1, L2, L3] {
            assert_eq!(Level::from_number(level.register()), Some(level));
            assert_eq!(level.span(), cca_abi::rmi::entry_span(level.number()));
            assert!(level.child().is_none_or(|child| child.parent() == Some(level)));
        }
        assert_eq!(Level::from_number(4), None);
        assert_eq!(Level::from_number(u64::MAX - 1), None);
        assert_eq!(Minus1.error(), Status::ErrorRtt(0xFF));
        assert_eq!(L2.index(0x4060_0000), 3);
        assert_eq!(L2.start_table(0x4060_0000), 1);
    }
}
