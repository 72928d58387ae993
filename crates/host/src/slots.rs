//! Memory slots: which guest addresses are RAM, and which memory stands behind their two faces, private
//! (guest_memfd) and shared (the VMM's own mapping).

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Range;

use crate::errno::{Errno, Result};
use crate::gmem::Gmem;
use crate::kernel::{Kernel, PAGE_SIZE, reserve};

/// Slot numbers are below this.
pub const MAX_SLOTS: u32 = 512;

/// One memory slot.
pub struct Slot<K: Kernel> {
    /// Number given by user space.
    pub id: u32,
    /// First guest address; page aligned.
    pub base: u64,
    /// Bytes; a multiple of the page size.
    pub size: u64,
    /// The shared face: where it lies in the VMM.
    pub user_address: u64,
    /// The private face: file and offset in it.
    pub gmem: Option<(Arc<Gmem<K>>, u64)>,
}

impl<K: Kernel> Slot<K> {
    /// First address after it.
    pub fn end(&self) -> u64 {
        self.base + self.size
    }

    /// Guest addresses.
    pub fn range(&self) -> Range<u64> {
        self.base..self.end()
    }

    /// Number of the page of `address`, which lies in the slot.
    pub fn page_of(&self, address: u64) -> u64 {
        (address - self.base) / PAGE_SIZE
    }
}

/// All slots, sorted by address.
pub struct Slots<K: Kernel> {
    slots: Vec<Slot<K>>,
}

impl<K: Kernel> Default for Slots<K> {
    fn default() -> Self {
        Self { slots: Vec::new() }
    }
}

/// The part of `range` that lies in `within`; empty if none does.
pub(crate) fn intersection(range: &Range<u64>, within: &Range<u64>) -> Range<u64> {
    let start = range.start.max(within.start);
    start..range.end.min(within.end).max(start)
}

impl<K: Kernel> Slots<K> {
    /// The slot that covers `address`.
    pub fn find(&self, address: u64) -> Option<&Slot<K>> {
        self.slots.iter().find(|slot| slot.range().contains(&address))
    }

    /// The slot with this number.
    pub fn by_id(&self, id: u32) -> Option<&Slot<K>> {
        self.slots.iter().find(|slot| slot.id == id)
    }

    /// All.
    pub fn iter(&self) -> impl Iterator<Item = &Slot<K>> {
        self.slots.iter()
    }

    /// First address at or after `address` that begins a slot.
    pub fn next_start(&self, address: u64) -> Option<u64> {
        self.slots.iter().map(|slot| slot.base).find(|base| *base >= address)
    }

    /// Whether `slot` can take the place of the one with its number, if there is one. If so, [`Self::insert`] will
    /// succeed.
    ///
    /// # Errors
    /// `EEXIST` if it overlaps another, in guest addresses or in a file; `ENOMEM`.
    pub fn prepare(&mut self, slot: &Slot<K>) -> Result<()> {
        let overlaps = |a: &Range<u64>, b: &Range<u64>| a.start < b.end && b.start < a.end;
        for other in self.slots.iter().filter(|other| other.id != slot.id) {
            if overlaps(&other.range(), &slot.range()) {
                return Err(Errno::EEXIST);
            }
            if let (Some((file, offset)), Some((other_file, other_offset))) = (&slot.gmem, &other.gmem) {
                let range = *offset..offset + slot.size;
                let other_range = *other_offset..other_offset + other.size;
                if Arc::ptr_eq(file, other_file) && overlaps(&range, &other_range) {
                    return Err(Errno::EEXIST);
                }
            }
        }
        reserve(&mut self.slots, 1)
    }

    /// Adds a slot for which [`Self::prepare`] was called, and whose number is free.
    pub fn insert(&mut self, slot: Slot<K>) {
        let at = self.slots.partition_point(|other| other.base < slot.base);
        self.slots.insert(at, slot);
    }

    /// Takes a slot out.
    pub fn remove(&mut self, id: u32) -> Option<Slot<K>> {
        let at = self.slots.iter().position(|slot| slot.id == id)?;
        Some(self.slots.remove(at))
    }
}
