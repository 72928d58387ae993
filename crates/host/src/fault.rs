//! Faults of a running Realm, RIPAS changes it asks for: giving memory to it.

use alloc::vec::Vec;

use cca_abi::rmi::{Ripas, rtt_entry_state};

use crate::errno::{Errno, Result};
use crate::gmem::{GmemPage, is_contiguous, take_for_realm};
use crate::kernel::{Kernel, PAGE_SIZE, PinPurpose, UserPage, reserve};
use crate::memory::Face;
use crate::rtt::PAGE_LEVEL;
use crate::shared::Mapped;
use crate::vm::Vm;

/// What became of a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The Realm can go on.
    Resolved,
    /// The VMM must decide: the guest address is not what the Realm takes it for.
    ToUser,
    /// No memory slot there.
    NoSlot,
}

/// What became of a request to change RIPAS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RipasChange {
    /// Done up to here.
    Changed(u64),
    /// Done, and of no interest to user space: it has no memory there.
    Unbacked,
    /// The request was refused.
    Rejected,
}

/// Stage 2 descriptor of a shared page: MemAttr 0b110 (write-back, forced), read and write.
const SHARED_ATTRIBUTES: u64 = 6 << 2 | 3 << 6;

impl<K: Kernel> Vm<K> {
    /// The Realm touched the protected address `gpa` and there is nothing.
    pub(crate) fn private_fault(&self, gpa: u64) -> Result<Fault> {
        let ipa = gpa & !(PAGE_SIZE - 1);
        let mut guard = self.memory.lock();
        let memory = &mut *guard;
        let Some(slot) = memory.slots.find(ipa) else { return Ok(Fault::NoSlot) };
        if !memory.private.contains(ipa) {
            return Ok(Fault::ToUser);
        }
        let Some((gmem, offset)) = &slot.gmem else { return Ok(Fault::ToUser) };
        let rtt = memory.rtt.as_mut().ok_or(Errno::EIO)?;
        let index = offset / PAGE_SIZE + slot.page_of(ipa);
        let mut pages = gmem.pages.lock();
        let page = match take_for_realm(&self.kernel, &mut pages, index) {
            Ok(page) => page,
            Err(Errno::EEXIST) => {
                // Another vCPU was faster, or the page is there but the Realm may not use it: then a retry would
                // fault for ever.
                let entry = rtt.read_entry(&self.rmi, ipa)?;
                let usable =
                    entry.state == rtt_entry_state::ASSIGNED && entry.ripas == u64::from(Ripas::Ram as u8);
                return Ok(if usable { Fault::Resolved } else { Fault::ToUser });
            }
            Err(Errno::EHWPOISON) => return Ok(Fault::ToUser),
            Err(errno) => return Err(errno),
        };
        let granule = self.rmi.delegate(page).map_err(|error| {
            self.rmi.log("delegate a page of private memory", error);
            Errno::from(error)
        })?;
        let created =
            rtt.with_page_table(&self.rmi, ipa, |rmi, rd| rmi.data_create_unknown(rd, granule.pa(), ipa));
        match created {
            Ok(Ok(())) => {
                let pa = granule.pa();
                drop(pages.insert(index, GmemPage::Delegated(granule)));
                rtt.filled(&self.rmi, ipa, is_contiguous(&pages, index, pa));
                Ok(Fault::Resolved)
            }
            failed => {
                if self.rmi.undelegate(granule).is_none() {
                    drop(pages.insert(index, GmemPage::Leaked));
                }
                Err(match failed {
                    Ok(Err(error)) => {
                        self.rmi.log("give the Realm a page", error);
                        error.into()
                    }
                    Err(errno) => errno,
                    Ok(Ok(())) => Errno::EIO,
                })
            }
        }
    }

    /// The Realm touched the shared alias of `gpa` and there is nothing.
    pub(crate) fn shared_fault(&self, gpa: u64) -> Result<Fault> {
        let page_address = gpa & !(PAGE_SIZE - 1);
        let mut pins = Vec::new();
        reserve(&mut pins, 1)?;
        // Whoever changes slots and attributes all the time only makes this vCPU fault again.
        for _ in 0..16 {
            let (id, user_address, generation, shared) = {
                let memory = self.memory.lock();
                let Some(slot) = memory.slots.find(page_address) else { return Ok(Fault::NoSlot) };
                if slot.gmem.is_some() && memory.private.contains(page_address) {
                    return Ok(Fault::ToUser);
                }
                let user_address = slot.user_address + (page_address - slot.base);
                (slot.id, user_address, memory.generation, memory.shared.clone())
            };
            // Before the page is looked up: a change that ends later is noticed.
            let changes = shared.changes();
            // Without the lock: it may wait for user space for ever.
            pins.clear();
            self.kernel.pin_user_pages(user_address, 1, PinPurpose::Shared, &mut pins)?;
            let desc = pins.first().ok_or(Errno::EFAULT)?.pa() | SHARED_ATTRIBUTES;
            let mut guard = self.memory.lock();
            let memory = &mut *guard;
            let rtt = memory.rtt.as_mut().ok_or(Errno::EIO)?;
            let ipa = page_address | rtt.geometry().shared_bit();
            let mut deepest = i64::MIN;
            loop {
                if memory.generation != generation {
                    break;
                }
                shared.prepare(id, page_address)?;
                match shared.map(id, page_address, changes, desc) {
                    Mapped::Done => return Ok(Fault::Resolved),
                    Mapped::Already => {
                        // Another vCPU was faster, or the Realm faults on a page that it has: then a retry would
                        // fault for ever.
                        let entry = rtt.read_entry(&self.rmi, ipa)?;
                        let usable = entry.level == PAGE_LEVEL && entry.state == rtt_entry_state::ASSIGNED;
                        // Unless it was taken away again meanwhile.
                        let changed = shared.changes() != changes;
                        return if usable || changed { Ok(Fault::Resolved) } else { Err(Errno::EIO) };
                    }
                    Mapped::Retry => break,
                    Mapped::Refused(error) => match error.rtt_level() {
                        // Each round must get deeper than the one before.
                        Some(level) if level < PAGE_LEVEL && level > deepest => {
                            deepest = level;
                            rtt.create_levels(&self.rmi, ipa, level, PAGE_LEVEL)?;
                        }
                        _ => {
                            self.rmi.log("share a page", error);
                            return Err(error.into());
                        }
                    },
                }
            }
            drop(guard);
            self.kernel.cond_resched();
        }
        Ok(Fault::Resolved)
    }

    /// Where the part of `[base, top)` ends that a slot with private memory backs from `base` on, if any.
    pub(crate) fn ripas_range(&self, base: u64, top: u64) -> Result<Option<u64>> {
        let aligned = base % PAGE_SIZE == 0 && top % PAGE_SIZE == 0;
        if !aligned || base >= top || top > self.geometry.protected_end() {
            return Err(Errno::EIO);
        }
        let memory = self.memory.lock();
        let slot = memory.slots.find(base).filter(|slot| slot.gmem.is_some());
        Ok(slot.map(|slot| slot.end().min(top)))
    }

    /// The Realm asks for `[base, top)` to become `ripas`. Part of it may be done: the Realm asks again for the rest.
    /// RAM is granted only where a slot can back it.
    pub(crate) fn change_ripas(&self, rec: u64, base: u64, top: u64, ripas: Ripas) -> Result<RipasChange> {
        let mut guard = self.memory.lock();
        let memory = &mut *guard;
        let rtt = memory.rtt.as_mut().ok_or(Errno::EIO)?;
        let aligned = base % PAGE_SIZE == 0 && top % PAGE_SIZE == 0;
        if !aligned || base >= top || top > rtt.geometry().protected_end() {
            return Err(Errno::EIO);
        }
        let slot = memory.slots.find(base);
        let backed = slot.is_some_and(|slot| slot.gmem.is_some());
        if ripas == Ripas::Ram && !backed {
            return Ok(RipasChange::Rejected);
        }
        // Only what is alike: one slot, or the hole before the next.
        let limit = match slot {
            Some(slot) => slot.end(),
            None => memory.slots.next_start(base).unwrap_or(top),
        };
        let top = top.min(limit);
        let reached =
            rtt.for_range(&self.rmi, base, top, |rmi, rd, base, top| rmi.rtt_set_ripas(rd, rec, base, top))?;
        if ripas == Ripas::Empty && reached > base {
            // The Realm has given this memory up; its contents are worth nothing any more.
            memory.unmap(&self.rmi, &(base..reached), Face::Private);
            if let Some(rtt) = memory.rtt.as_mut() {
                rtt.fold(&self.rmi, base, reached);
            }
        }
        Ok(if backed { RipasChange::Changed(reached) } else { RipasChange::Unbacked })
    }
}
