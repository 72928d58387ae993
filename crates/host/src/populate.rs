//! Initial contents of a Realm: `POPULATE_REALM` and `INIT_IPA_REALM`.

use alloc::vec::Vec;

use cca_abi::rmi::DATA_MEASURE_CONTENT;

use crate::errno::{Errno, Result};
use crate::gmem::{GmemPage, is_contiguous, take_for_realm};
use crate::kernel::{Kernel, PAGE_SIZE, PinPurpose, UserPage, reserve};
use crate::vm::Vm;

/// Pages pinned at a time.
const BATCH: usize = 64;

impl<K: Kernel> Vm<K> {
    /// Gives `[base, base + size)` the RIPAS RAM. Measured, entry by entry.
    pub(crate) fn init_ripas(&self, base: u64, size: u64) -> Result {
        let end = base.checked_add(size).ok_or(Errno::EINVAL)?;
        if size == 0 || base % PAGE_SIZE != 0 || size % PAGE_SIZE != 0 {
            return Err(Errno::EINVAL);
        }
        let mut memory = self.memory.lock();
        let rtt = memory.rtt.as_mut().ok_or(Errno::EINVAL)?;
        if end > rtt.geometry().protected_end() {
            return Err(Errno::EINVAL);
        }
        let reached =
            rtt.for_range(&self.rmi, base, end, |rmi, rd, base, top| rmi.rtt_init_ripas(rd, base, top))?;
        if reached == end {
            return Ok(0);
        }
        // RMM 1.0 refuses entries that are assigned: what is populated must be initialised before.
        self.log_error(format_args!("memory: initialise RIPAS: the page at {reached:#x} is in use"));
        Err(Errno::EEXIST)
    }

    /// Copies `[base, base + size)` from the VMM's memory into private memory.
    ///
    /// # Errors
    /// `EINVAL` for a bad range, or one that is not inside one slot with a guest_memfd; `EFAULT` if the source cannot
    /// be read; what the RMM's refusal maps to. Pages before the failing one stay populated.
    pub(crate) fn populate(&self, base: u64, size: u64, measure: bool) -> Result {
        let end = base.checked_add(size).ok_or(Errno::EINVAL)?;
        if size == 0 || base % PAGE_SIZE != 0 || size % PAGE_SIZE != 0 {
            return Err(Errno::EINVAL);
        }
        let source_base = {
            let memory = self.memory.lock();
            let slot = memory.slots.find(base).ok_or(Errno::EFAULT)?;
            if end > slot.end() || slot.gmem.is_none() {
                return Err(Errno::EINVAL);
            }
            slot.user_address + (base - slot.base)
        };
        let flags = if measure { DATA_MEASURE_CONTENT } else { 0 };
        let mut sources = Vec::new();
        reserve(&mut sources, BATCH)?;
        let mut at = base;
        while at < end {
            let left = usize::try_from((end - at) / PAGE_SIZE).unwrap_or(BATCH);
            let wanted = left.min(BATCH);
            sources.clear();
            self.kernel.pin_user_pages(
                source_base + (at - base),
                wanted,
                PinPurpose::Source,
                &mut sources,
            )?;
            if sources.is_empty() {
                return Err(Errno::EFAULT);
            }
            at = self.populate_batch(at, &sources, flags)?;
            self.kernel.cond_resched();
            if self.kernel.is_killed() {
                return Err(Errno::EINTR);
            }
        }
        Ok(0)
    }

    /// One batch; the slot cannot have gone (the caller holds the control lock) but is looked up again.
    fn populate_batch(&self, base: u64, sources: &[K::UserPage], flags: u64) -> Result<u64> {
        let mut guard = self.memory.lock();
        let memory = &mut *guard;
        let slot = memory.slots.find(base).ok_or(Errno::EFAULT)?;
        let rtt = memory.rtt.as_mut().ok_or(Errno::EINVAL)?;
        let (gmem, offset) = slot.gmem.as_ref().ok_or(Errno::EINVAL)?;
        let mut pages = gmem.pages.lock();
        let mut ipa = base;
        for source in sources {
            let index = offset / PAGE_SIZE + slot.page_of(ipa);
            let page = take_for_realm(&self.kernel, &mut pages, index)?;
            let granule = self.rmi.delegate(page).map_err(|error| {
                self.rmi.log("delegate a page of private memory", error);
                Errno::from(error)
            })?;
            let created = rtt.with_page_table(&self.rmi, ipa, |rmi, rd| {
                rmi.data_create(rd, granule.pa(), ipa, source.pa(), flags)
            });
            match created {
                Ok(Ok(())) => {
                    let pa = granule.pa();
                    drop(pages.insert(index, GmemPage::Delegated(granule)));
                    rtt.filled(&self.rmi, ipa, is_contiguous(&pages, index, pa));
                }
                failed => {
                    if self.rmi.undelegate(granule).is_none() {
                        drop(pages.insert(index, GmemPage::Leaked));
                    }
                    return Err(match failed {
                        Ok(Err(error)) => {
                            self.rmi.log("populate a page", error);
                            error.into()
                        }
                        Err(errno) => errno,
                        Ok(Ok(())) => Errno::EIO,
                    });
                }
            }
            ipa += PAGE_SIZE;
        }
        Ok(ipa)
    }
}
