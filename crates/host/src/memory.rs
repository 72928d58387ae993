//! A VM's memory: slots, attributes, translation tables, and taking memory away from the Realm.
//!
//! The two faces of an address are kept apart here and nowhere else: a *private* address is the guest address itself,
//! a *shared* one is the same with the top bit of the IPA space set. Whatever is unmapped names its [`Face`].

use core::ops::Range;

use crate::errno::{Errno, Result};
use crate::gmem::{Gmem, GmemPage};
use crate::kernel::{Kernel, PAGE_SIZE};
use crate::ranges::RangeSet;
use crate::rmi::Rmi;
use crate::rtt::{PAGE_LEVEL, Rtt};
use crate::slots::{Slot, Slots, intersection};
use crate::stats::Stats;

/// Which alias of a guest address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Face {
    /// The lower half: guest_memfd.
    Private,
    /// The upper half: the VMM's memory.
    Shared,
}

/// Everything under the VM's memory lock.
pub struct Memory<K: Kernel> {
    /// Memory slots.
    pub slots: Slots<K>,
    /// Guest addresses with `KVM_MEMORY_ATTRIBUTE_PRIVATE`.
    pub private: RangeSet,
    /// The Realm's tables; there is a Realm if there are tables.
    pub rtt: Option<Rtt<K>>,
    /// Counts changes of slots and attributes, so that what was looked up without the lock can be checked.
    pub generation: u64,
}

impl<K: Kernel> Default for Memory<K> {
    fn default() -> Self {
        Self { slots: Slots::default(), private: RangeSet::new(), rtt: None, generation: 0 }
    }
}

/// Takes the pages with these numbers in `slot` away from the Realm. Returns how many could not be.
fn unmap_private<K: Kernel>(rmi: &Rmi<K>, rtt: &mut Rtt<K>, slot: &Slot<K>, pages: Range<u64>) -> u64 {
    let Some((gmem, offset)) = &slot.gmem else { return 0 };
    let first = offset / PAGE_SIZE;
    let mut lost = 0;
    let mut at = first + pages.start;
    loop {
        let mut file = gmem.pages.lock();
        let Some(index) = file.next(at..first + pages.end) else { break };
        at = index + 1;
        let granule = match file.take(index) {
            Some(GmemPage::Delegated(granule)) => granule,
            Some(other) => {
                // The place was occupied a moment ago, so there is room.
                drop(file.insert(index, other));
                continue;
            }
            None => continue,
        };
        let ipa = slot.base + (index - first) * PAGE_SIZE;
        let freed = match rmi.data_destroy(rtt.rd(), ipa) {
            Ok(destroyed) if destroyed.pa == granule.pa() => rmi.undelegate(granule).is_some(),
            Ok(destroyed) => {
                rmi.kernel().log(
                    crate::kernel::LogLevel::Error,
                    format_args!("rmm: the page at {ipa:#x} came back as {:#x}", destroyed.pa),
                );
                rmi.each_stats(Stats::count_leaked);
                false
            }
            Err(error) => {
                rmi.leak(granule, error);
                false
            }
        };
        if !freed {
            lost += 1;
            drop(file.insert(index, GmemPage::Leaked));
        }
        drop(file);
        rmi.kernel().cond_resched();
    }
    lost
}

/// Takes the shared pages with these numbers in `slot` away from the Realm and unpins them.
fn unmap_shared<K: Kernel>(rmi: &Rmi<K>, rtt: &mut Rtt<K>, slot: &mut Slot<K>, pages: Range<u64>) -> u64 {
    let mut lost = 0;
    let mut at = pages.start;
    while let Some(index) = slot.shared.next(at..pages.end) {
        at = index + 1;
        let Some(pin) = slot.shared.take(index) else { continue };
        let ipa = (slot.base + index * PAGE_SIZE) | rtt.geometry().shared_bit();
        match rmi.rtt_unmap_unprotected(rtt.rd(), ipa, PAGE_LEVEL) {
            Ok(()) => {}
            // Not mapped: nothing to take away.
            Err(error) if error.rtt_level().is_some() => {}
            Err(error) => {
                // The Realm may still reach the page, so it must stay pinned.
                rmi.log("unmap a shared page", error);
                core::mem::forget(pin);
                lost += 1;
                continue;
            }
        }
        drop(pin);
        rmi.each_stats(|stats| stats.count_unpinned(1));
        rmi.kernel().cond_resched();
    }
    lost
}

impl<K: Kernel> Memory<K> {
    /// Makes the guest addresses `range` inaccessible through `face`. Without a Realm nothing is accessible, and
    /// nothing is done. Returns how many pages could not be taken back.
    pub fn unmap(&mut self, rmi: &Rmi<K>, range: &Range<u64>, face: Face) -> u64 {
        let Some(rtt) = &mut self.rtt else { return 0 };
        let mut lost = 0;
        for slot in self.slots.iter_mut() {
            let part = intersection(range, &slot.range());
            if part.is_empty() {
                continue;
            }
            let pages =
                slot.page_of(part.start)..slot.page_of(part.start) + (part.end - part.start) / PAGE_SIZE;
            lost += match face {
                Face::Private => unmap_private(rmi, rtt, slot, pages),
                Face::Shared => unmap_shared(rmi, rtt, slot, pages),
            };
        }
        lost
    }

    /// Takes pages of a file, by their index in it, away from the Realm, wherever they are mapped.
    pub fn unmap_gmem(&mut self, rmi: &Rmi<K>, gmem: &Gmem<K>, range: Range<u64>) -> u64 {
        let Some(rtt) = &mut self.rtt else { return 0 };
        let mut lost = 0;
        for slot in self.slots.iter() {
            let Some((file, offset)) = &slot.gmem else { continue };
            if !core::ptr::eq(alloc::sync::Arc::as_ptr(file), gmem) {
                continue;
            }
            let first = offset / PAGE_SIZE;
            let part = intersection(&range, &(first..first + slot.size / PAGE_SIZE));
            if !part.is_empty() {
                lost += unmap_private(rmi, rtt, slot, part.start - first..part.end - first);
            }
        }
        lost
    }

    /// `KVM_SET_MEMORY_ATTRIBUTES`: the face that the new attribute forbids is unmapped.
    ///
    /// # Errors
    /// `ENOMEM` and nothing has changed; `EIO` if the RMM did not let go of pages.
    pub fn set_private(&mut self, rmi: &Rmi<K>, range: &Range<u64>, private: bool) -> Result<()> {
        self.private.set(range.clone(), private)?;
        self.generation += 1;
        let lost = self.unmap(rmi, range, if private { Face::Shared } else { Face::Private });
        if lost == 0 { Ok(()) } else { Err(Errno::EIO) }
    }

    /// Takes a slot and all its memory away.
    ///
    /// # Errors
    /// `ENOENT`; `EIO` if the RMM did not let go of pages.
    pub fn remove_slot(&mut self, rmi: &Rmi<K>, id: u32) -> Result<()> {
        let range = self.slots.by_id(id).ok_or(Errno::ENOENT)?.range();
        let lost = self.unmap(rmi, &range, Face::Shared) + self.unmap(rmi, &range, Face::Private);
        self.generation += 1;
        drop(self.slots.remove(id));
        if lost == 0 { Ok(()) } else { Err(Errno::EIO) }
    }

    /// Takes everything away from the Realm: pages, then tables. To be called when no REC exists any more. Returns
    /// whether all came back.
    pub fn teardown(&mut self, rmi: &Rmi<K>) -> bool {
        let everything = 0..u64::MAX;
        let lost = self.unmap(rmi, &everything, Face::Private);
        let Some(rtt) = &mut self.rtt else { return true };
        // Shared mappings vanish with their tables; only then may the pins go.
        let complete = rtt.teardown(rmi);
        let lost =
            lost + if complete { self.drop_pins(rmi) } else { self.unmap(rmi, &everything, Face::Shared) };
        self.rtt = None;
        complete && lost == 0
    }

    fn drop_pins(&mut self, rmi: &Rmi<K>) -> u64 {
        for slot in self.slots.iter_mut() {
            let mut at = 0;
            while let Some(index) = slot.shared.next(at..u64::MAX) {
                drop(slot.shared.take(index));
                rmi.each_stats(|stats| stats.count_unpinned(1));
                rmi.kernel().cond_resched();
                at = index + 1;
            }
        }
        0
    }
}
