//! Accesses of a Realm to shared addresses without memory: the vGIC's frames, then user space.

use crate::kernel::Kernel;
use crate::run::{Next, Runner};
use crate::vcpu::Pending;

/// An access, as the syndrome describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Access {
    len: usize,
    write: bool,
}

impl Access {
    /// `None` if the syndrome does not say what was accessed.
    fn decode(esr: u64) -> Option<Self> {
        const ISV: u64 = 1 << 24;
        const WNR: u64 = 1 << 6;
        (esr & ISV != 0).then_some(Self { len: 1 << (esr >> 22 & 3), write: esr & WNR != 0 })
    }
}

impl<K: Kernel> Runner<'_, K> {
    /// `value` is what a store stores.
    pub(crate) fn mmio(&mut self, esr: u64, gpa: u64, value: u64) -> Next {
        let Some(access) = Access::decode(esr) else {
            // It cannot be emulated, and user space could do nothing but say so.
            self.state.pending = Pending::Sea;
            return Next::Enter;
        };
        if access.write {
            let Some(kicked) = self.vgic.mmio_write(gpa, access.len, value) else {
                return self.mmio_exit(gpa, access.len, Some(value));
            };
            self.vm.kick(&kicked);
            self.state.pending = Pending::Emulated(None);
        } else {
            let Some(value) = self.vgic.mmio_read(gpa, access.len) else {
                return self.mmio_exit(gpa, access.len, None);
            };
            self.state.pending = Pending::Emulated(Some(value));
        }
        Next::Enter
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_access_without_syndrome_is_not_guessed() {
        assert_eq!(Access::decode(0x24 << 26), None);
        assert_eq!(Access::decode(1 << 24 | 2 << 22), Some(Access { len: 4, write: false }));
        assert_eq!(Access::decode(1 << 24 | 3 << 22 | 1 << 6), Some(Access { len: 8, write: true }));
    }
}
