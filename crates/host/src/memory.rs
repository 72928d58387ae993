//! A VM's memory: slots, attributes, translation tables, and taking memory away from the Realm.
//!
//! The two faces of an address are kept apart here and nowhere else: a *private* address is the guest address itself,
//! a *shared* one is the same with the top bit of the IPA space set. Whatever is unmapped names its [`Face`].

use alloc::sync::Arc;
use core::ops::Range;

use crate::errno::{Errno, Result};
use crate::gmem::{Gmem, GmemPage};
use crate::kernel::{Kernel, PAGE_SIZE};
use crate::ranges::RangeSet;
use crate::rmi::Rmi;
use crate::rtt::Rtt;
use crate::shared::Shared;
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
    /// The shared face of all slots.
    pub(crate) shared: Arc<Shared<K>>,
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
        // The page may be part of a block, which is then split; the table for that is at hand.
        let destroyed = rtt.with_page_table(rmi, ipa, |rmi, rd| rmi.data_destroy(rd, ipa));
        rtt.emptied(ipa);
        let freed = match destroyed {
            Ok(Ok(destroyed)) if destroyed.pa == granule.pa() => rmi.undelegate(granule).is_some(),
            Ok(Ok(destroyed)) => {
                rmi.say(
                    crate::kernel::LogLevel::Error,
                    format_args!("rmm: the page at {ipa:#x} came back as {:#x}", destroyed.pa),
                );
                rmi.each_stats(Stats::count_leaked);
                false
            }
            Ok(Err(error)) => {
                rmi.leak(granule, error);
                false
            }
            Err(errno) => {
                rmi.say(
                    crate::kernel::LogLevel::Error,
                    format_args!(
                        "memory: page {:#x} is lost: its block cannot be split: {errno}",
                        granule.pa()
                    ),
                );
                rmi.each_stats(Stats::count_leaked);
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

impl<K: Kernel> Memory<K> {
    /// No slots, no Realm.
    pub(crate) fn new(shared: Arc<Shared<K>>) -> Self {
        Self { slots: Slots::default(), private: RangeSet::new(), rtt: None, generation: 0, shared }
    }

    /// There is a Realm now.
    pub(crate) fn set_rtt(&mut self, rtt: Rtt<K>) {
        self.shared.set_realm(Some((rtt.rd(), rtt.geometry().shared_bit())));
        self.rtt = Some(rtt);
    }

    /// Makes the guest addresses `range` inaccessible through `face`. Without a Realm nothing is accessible, and
    /// nothing is done. Returns how many pages could not be taken back.
    pub fn unmap(&mut self, rmi: &Rmi<K>, range: &Range<u64>, face: Face) -> u64 {
        let Some(rtt) = &mut self.rtt else { return 0 };
        if face == Face::Shared {
            return self.shared.unmap(range);
        }
        let mut lost = 0;
        for slot in self.slots.iter() {
            let part = intersection(range, &slot.range());
            if part.is_empty() {
                continue;
            }
            let pages =
                slot.page_of(part.start)..slot.page_of(part.start) + (part.end - part.start) / PAGE_SIZE;
            lost += unmap_private(rmi, rtt, slot, pages);
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
        self.shared.remove_slot(id);
        if lost == 0 { Ok(()) } else { Err(Errno::EIO) }
    }

    /// Takes everything away from the Realm: pages, then tables. To be called when no REC exists any more. Returns
    /// whether all came back.
    pub fn teardown(&mut self, rmi: &Rmi<K>) -> bool {
        let everything = 0..u64::MAX;
        let lost = self.unmap(rmi, &everything, Face::Private);
        let Some(rtt) = &mut self.rtt else { return true };
        let complete = rtt.teardown(rmi);
        if !complete {
            // Shared mappings vanish with their tables; some have not.
            self.shared.unmap(&everything);
        }
        self.shared.set_realm(None);
        self.rtt = None;
        complete && lost == 0
    }
}
