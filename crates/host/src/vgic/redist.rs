//! The redistributors: one vCPU's private interrupts as the guest sees them.

use super::cpu::Cpu;
use super::irq::Irq;
use super::mmio::{Bank, BankReg, IIDR, PIDR2, PIDR2_OFFSET, part, replace_part};
use super::types::VcpuSet;

/// The SGI frame follows the control frame.
const SGI_FRAME: u64 = 0x1_0000;

const PENDBASER_PTZ: u64 = 1 << 62;
const CTLR_ENABLE_LPIS: u64 = 1;
/// Bits 63, 61:59, 55:52, 15:12, 6:0 are reserved.
const PENDBASER_RESERVED: u64 = 0xf8f0_0000_0000_f07f;
const WAKER_PROCESSOR_SLEEP: u64 = 1 << 1;
const WAKER_CHILDREN_ASLEEP: u64 = 1 << 2;

impl Cpu {
    /// Reads `len` bytes at `offset` of the redistributor's two frames.
    pub(super) fn read(&self, affinity: u64, last: bool, offset: u64, len: usize) -> u64 {
        if let Some(offset) = offset.checked_sub(SGI_FRAME) {
            return match BankReg::decode(offset, len) {
                Some(reg) => reg.read(self),
                None => 0,
            };
        }
        match (offset, len) {
            (0x0000, 4) => u64::from(self.lpis_enabled),
            (0x0004, 4) => IIDR,
            (0x0008 | 0x000c, 4 | 8) => {
                part(typer(self.index, affinity, last) | u64::from(self.has_lpis), offset, len)
            }
            (0x0078 | 0x007c, 4 | 8) => part(self.pendbaser, offset, len),
            (0x0014, 4) if self.asleep => WAKER_PROCESSOR_SLEEP | WAKER_CHILDREN_ASLEEP,
            (PIDR2_OFFSET, 4) => PIDR2,
            // The invalidation registers have no meaning with an ITS.
            _ => 0,
        }
    }

    /// Writes `len` bytes at `offset` of the redistributor's two frames.
    pub(super) fn write(&mut self, offset: u64, len: usize, value: u64, kick: &mut VcpuSet) {
        if let Some(offset) = offset.checked_sub(SGI_FRAME) {
            if let Some(reg) = BankReg::decode(offset, len) {
                reg.write(self, value, kick);
            }
            return;
        }
        match (offset, len) {
            (0x0014, 4) => self.asleep = value & WAKER_PROCESSOR_SLEEP != 0,
            (0x0000, 4) if self.has_lpis => self.lpis_enabled = value & CTLR_ENABLE_LPIS != 0,
            (0x0078 | 0x007c, 4 | 8) if self.has_lpis && !self.lpis_enabled => {
                // PTZ, bit 62, reads as zero.
                if offset == 0x7c || len == 8 {
                    let high = replace_part(0, offset, len, value);
                    self.pending_zero = high & PENDBASER_PTZ != 0;
                }
                self.pendbaser = replace_part(self.pendbaser, offset, len, value) & !PENDBASER_RESERVED;
            }
            _ => (),
        }
    }
}

impl Bank for Cpu {
    fn irq(&self, intid: usize) -> Option<Irq> {
        self.private.get(intid).copied()
    }

    fn change(&mut self, intid: usize, kick: &mut VcpuSet, change: impl FnOnce(&mut Irq)) {
        if let Some(irq) = self.private.get_mut(intid) {
            change(irq);
            if irq.is_loaned() || (irq.enabled && irq.is_pending()) {
                kick.insert(self.index);
            }
        }
    }
}

fn typer(vcpu: usize, affinity: u64, last: bool) -> u64 {
    let number = u64::try_from(vcpu & 0xffff).unwrap_or(0);
    let packed = (affinity & 0xff_ffff) | (affinity >> 32 << 24);
    (packed << 32) | (number << 8) | (u64::from(last) << 4)
}
