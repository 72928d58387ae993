//! Which VMIDs are in use.

use core::sync::atomic::Ordering::{AcqRel, Acquire};

use crate::sync::AtomicU64;

/// One bit per VMID.
pub(crate) struct Vmids([AtomicU64; 1024]);

impl Vmids {
    pub(crate) const fn new() -> Self {
        Self([const { AtomicU64::new(0) }; 1024])
    }

    fn slot(&self, vmid: u16) -> (&AtomicU64, u64) {
        // Ten bits and six bits.
        (&self.0[usize::from(vmid >> 6)], 1u64.wrapping_shl(u32::from(vmid)))
    }

    /// Takes a VMID; false if it is in use.
    pub(crate) fn reserve(&self, vmid: u16) -> bool {
        let (word, bit) = self.slot(vmid);
        word.fetch_or(bit, Acquire) & bit == 0
    }

    /// Gives a VMID back, after its TLB entries have been invalidated.
    pub(crate) fn release(&self, vmid: u16) {
        let (word, bit) = self.slot(vmid);
        word.fetch_and(!bit, AcqRel);
    }

    /// The VMIDs in use, as bits.
    #[cfg(test)]
    pub(crate) fn raw(&self) -> impl Iterator<Item = u64> {
        self.0.iter().map(|word| word.load(Acquire))
    }
}
