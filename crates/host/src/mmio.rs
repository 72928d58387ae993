//! Accesses of a Realm to shared addresses without memory: the vGIC's frames, eventfds, then user space.

use crate::kernel::{Kernel, PAGE_SIZE};
use crate::run::{Next, Runner};
use crate::vcpu::Pending;
use crate::vgic::{GuestMemory, VcpuSet};
use crate::vm::Vm;

/// An access, as the syndrome describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Access {
    len: usize,
    write: bool,
    /// A load is extended with its sign.
    signed: bool,
    /// Into a 64-bit register.
    wide: bool,
}

impl Access {
    /// `None` if the syndrome does not say what was accessed.
    fn decode(esr: u64) -> Option<Self> {
        const ISV: u64 = 1 << 24;
        const SSE: u64 = 1 << 21;
        const SF: u64 = 1 << 15;
        const WNR: u64 = 1 << 6;
        (esr & ISV != 0).then_some(Self {
            len: 1 << (esr >> 22 & 3),
            write: esr & WNR != 0,
            signed: esr & SSE != 0,
            wide: esr & SF != 0,
        })
    }

    /// What a load of `value` leaves in the register.
    fn loaded(self, value: u64) -> u64 {
        let unused = 64 - 8 * u32::try_from(self.len.clamp(1, 8)).unwrap_or(8);
        let value = if self.signed {
            let signed = i64::from_ne_bytes((value << unused).to_ne_bytes()) >> unused;
            u64::from_ne_bytes(signed.to_ne_bytes())
        } else {
            value << unused >> unused
        };
        if self.wide { value } else { value & 0xFFFF_FFFF }
    }
}

/// What a load of `len` bytes with this syndrome leaves in the register.
pub(crate) fn loaded(esr: u64, value: u64) -> u64 {
    Access::decode(esr).map_or(value, |access| access.loaded(value))
}

impl<K: Kernel> GuestMemory for Vm<K> {
    /// Through the VMM's mapping, so in the context of one of its threads.
    fn read(&self, gpa: u64, to: &mut [u8]) -> bool {
        let gpa = gpa & !self.geometry.shared_bit();
        let Some(end) = u64::try_from(to.len()).ok().and_then(|len| gpa.checked_add(len)) else {
            return false;
        };
        let user_address = {
            let memory = self.memory.lock();
            let Some(slot) = memory.slots.find(gpa).filter(|slot| end <= slot.end()) else { return false };
            // What is private cannot be read, and the VMM's mapping of it means nothing.
            let mut pages = (gpa & !(PAGE_SIZE - 1)..end).step_by(4096);
            if slot.gmem.is_some() && pages.any(|page| memory.private.contains(page)) {
                return false;
            }
            slot.user_address + (gpa - slot.base)
        };
        self.kernel.copy_from_user(user_address, to).is_ok()
    }

    fn pause(&self) -> bool {
        self.kernel.cond_resched();
        !self.kernel.is_killed()
    }
}

impl<K: Kernel> Runner<'_, K> {
    fn in_kernel_write(&mut self, gpa: u64, len: usize, value: u64) -> bool {
        let kicked: Option<VcpuSet> = self.vgic.mmio_write(gpa, len, value);
        if let Some(kicked) = kicked {
            self.vm.irqs.kick(&kicked);
            if let Some(its) = self.vm.irqs.its.get() {
                while let Some(vcpu) = self.vgic.take_lpis_enabled() {
                    self.vm.irqs.kick(&its.enabled_at(self.vgic, self.vm, vcpu));
                }
            }
            return true;
        }
        if let Some(its) = self.vm.irqs.its.get() {
            if let Some(kicked) = its.mmio_write(self.vgic, self.vm, gpa, len, value) {
                self.vm.irqs.kick(&kicked);
                return true;
            }
        }
        let view = &mut self.state.events;
        self.vm.events.signal(view, gpa, len, value) || self.vm.coalesce(view, gpa, len, value)
    }

    /// Devices in the kernel, which need no lock of the VM. `None` if there is none at `gpa`. `value` is what a store
    /// stores.
    pub(crate) fn device(&mut self, esr: u64, gpa: u64, value: u64) -> Option<Next> {
        let access = Access::decode(esr)?;
        let loaded = if access.write {
            if !self.in_kernel_write(gpa, access.len, value) {
                return None;
            }
            None
        } else {
            let its = self.vm.irqs.its.get();
            let value = self
                .vgic
                .mmio_read(gpa, access.len)
                .or_else(|| its.and_then(|its| its.mmio_read(gpa, access.len)))?;
            Some(access.loaded(value))
        };
        self.state.pending = Pending::Emulated(loaded);
        Some(Next::Enter)
    }

    /// An access that nobody in the kernel answers: user space is to do it.
    pub(crate) fn mmio(&mut self, esr: u64, gpa: u64, value: u64) -> Next {
        let Some(access) = Access::decode(esr) else {
            // It cannot be emulated, and user space could do nothing but say so.
            self.state.pending = Pending::Sea;
            return Next::Enter;
        };
        self.mmio_exit(gpa, access.len, access.write.then_some(value), esr)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_access_without_syndrome_is_not_guessed() {
        assert_eq!(Access::decode(0x24 << 26), None);
        let load = Access { len: 4, write: false, signed: false, wide: false };
        assert_eq!(Access::decode(1 << 24 | 2 << 22), Some(load));
        let store = Access { len: 8, write: true, signed: false, wide: true };
        assert_eq!(Access::decode(1 << 24 | 3 << 22 | 1 << 15 | 1 << 6), Some(store));
    }

    #[test]
    fn loads_of_every_size_and_sign_fill_the_register() {
        let access = |len, signed, wide| Access { len, write: false, signed, wide };
        let value = 0xFEDC_BA98_8765_C3A9;
        assert_eq!(access(1, false, false).loaded(value), 0xA9);
        assert_eq!(access(2, false, true).loaded(value), 0xC3A9);
        assert_eq!(access(4, false, true).loaded(value), 0x8765_C3A9);
        assert_eq!(access(8, false, true).loaded(value), value);
        assert_eq!(access(1, true, true).loaded(value), 0xFFFF_FFFF_FFFF_FFA9);
        assert_eq!(access(1, true, false).loaded(value), 0xFFFF_FFA9);
        assert_eq!(access(2, true, false).loaded(value), 0xFFFF_C3A9);
        assert_eq!(access(2, true, true).loaded(0x1234), 0x1234);
        assert_eq!(access(4, true, true).loaded(value), 0xFFFF_FFFF_8765_C3A9);
    }
}
