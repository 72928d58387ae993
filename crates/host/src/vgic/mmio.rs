//! The emulated frames: which address belongs to which register, and the registers that distributor and
//! redistributors lay out alike.
//!
//! What the architecture reserves, what has no meaning with affinity routing and one security state, and
//! accesses of a size or alignment that a register does not have read as zero and ignore writes.

use crate::lock::Lock;
use crate::sync::Ordering::SeqCst;

use super::Vgic;
use super::attr::Frame;
use super::cpu::NR_SGIS;
use super::irq::{Irq, Trigger};
use super::types::VcpuSet;

/// `GICD_IIDR` and `GICR_IIDR`: product `R`, revision 1, no JEP106 code.
pub(super) const IIDR: u64 = 0x5200_1000;
/// `GICD_PIDR2` and `GICR_PIDR2`: ArchRev GICv3.
pub(super) const PIDR2: u64 = 0x30;
pub(super) const PIDR2_OFFSET: u64 = 0xffe8;

impl<R: Lock> Vgic<R> {
    /// Reads `len` bytes at the guest address `gpa` (without the shared bit). `None` if it is not the GIC's.
    pub fn mmio_read(&self, gpa: u64, len: usize) -> Option<u64> {
        let (state, frame) = (self.state.get()?, self.layout.get()?.find(gpa)?);
        Some(match frame {
            Frame::Dist { offset } => state.dist.read(offset, len),
            Frame::Redist { vcpu, last, offset } => {
                let affinity = *state.affinities.get(vcpu)?;
                if let (0x0070 | 0x0074, 4 | 8) = (offset, len) {
                    return Some(part(state.dist.propbaser.load(SeqCst), offset, len));
                }
                state.cpus.get(vcpu)?.lock().read(affinity, last, offset, len)
            }
        })
    }

    /// Writes `len` bytes at the guest address `gpa` (without the shared bit). `None` if it is not the GIC's.
    pub fn mmio_write(&self, gpa: u64, len: usize, value: u64) -> Option<VcpuSet> {
        let (state, frame) = (self.state.get()?, self.layout.get()?.find(gpa)?);
        let dist = &state.dist;
        let mut kick = VcpuSet::EMPTY;
        match frame {
            Frame::Dist { offset } => dist.write(offset, len, value, &mut kick),
            Frame::Redist { offset: offset @ (0x0070 | 0x0074), .. } => {
                if dist.has_lpis && matches!(len, 4 | 8) && dist.lpis_enabled_at.first().is_none() {
                    // Bits 63:59, 55:52 and 6:5 are reserved.
                    let new = replace_part(dist.propbaser.load(SeqCst), offset, len, value);
                    dist.propbaser.store(new & !0xf8f0_0000_0000_0060, SeqCst);
                }
            }
            Frame::Redist { vcpu, offset, .. } => {
                let mut cpu = state.cpus.get(vcpu)?.lock();
                let (was_asleep, had_lpis) = (cpu.asleep, cpu.lpis_enabled);
                cpu.write(offset, len, value, &mut kick);
                let (asleep, has_lpis) = (cpu.asleep, cpu.lpis_enabled);
                if has_lpis != had_lpis {
                    dist.lpis_enabled_at.set(vcpu, has_lpis);
                    self.lpis_enabled.set(vcpu, has_lpis);
                    kick.insert(vcpu);
                }
                drop(cpu);
                if asleep != was_asleep {
                    dist.set_asleep(vcpu, asleep, &mut kick);
                }
            }
        }
        Some(kick)
    }
}

/// Interrupts that a frame's registers reach.
pub(super) trait Bank {
    /// The interrupt, if it is reached through this frame.
    fn irq(&self, intid: usize) -> Option<Irq>;

    /// Changes an interrupt and adds to `kick` who has to look at it.
    fn change(&mut self, intid: usize, kick: &mut VcpuSet, change: impl FnOnce(&mut Irq));
}

/// Registers with one bit for each of 32 interrupts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum BitReg {
    Group,
    SetEnable,
    ClearEnable,
    SetPending,
    ClearPending,
    SetActive,
    ClearActive,
}

/// A register of the part that `GICD_*` and the redistributor's SGI frame have in common.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum BankReg {
    Bits(BitRegAt),
    /// `IPRIORITYR`: `count` interrupts, a byte each.
    Priority {
        first: usize,
        count: usize,
    },
    /// `ICFGR`: 16 interrupts, two bits each.
    Config {
        first: usize,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct BitRegAt {
    reg: BitReg,
    first: usize,
}

impl BankReg {
    pub(super) fn decode(offset: u64, len: usize) -> Option<BankReg> {
        let offset = usize::try_from(offset).ok()?;
        if (0x400..0x800).contains(&offset) && matches!(len, 1 | 4) && offset % len == 0 {
            return Some(BankReg::Priority { first: offset - 0x400, count: len });
        }
        if len != 4 || offset % 4 != 0 {
            return None;
        }
        let reg = match offset {
            0x080..0x100 => BitReg::Group,
            0x100..0x180 => BitReg::SetEnable,
            0x180..0x200 => BitReg::ClearEnable,
            0x200..0x280 => BitReg::SetPending,
            0x280..0x300 => BitReg::ClearPending,
            0x300..0x380 => BitReg::SetActive,
            0x380..0x400 => BitReg::ClearActive,
            0xc00..0xd00 => return Some(BankReg::Config { first: (offset - 0xc00) * 4 }),
            _ => return None,
        };
        Some(BankReg::Bits(BitRegAt { reg, first: offset % 0x80 * 8 }))
    }

    pub(super) fn read(self, bank: &impl Bank) -> u64 {
        let gather = |first: usize, count: usize, width: usize, field: &dyn Fn(&Irq) -> u64| {
            (0..count).filter_map(|i| Some(field(&bank.irq(first + i)?) << (i * width))).fold(0, |a, b| a | b)
        };
        match self {
            BankReg::Bits(BitRegAt { reg, first }) => gather(first, 32, 1, &|irq| {
                u64::from(match reg {
                    BitReg::Group => irq.group1,
                    BitReg::SetEnable | BitReg::ClearEnable => irq.enabled,
                    BitReg::SetPending | BitReg::ClearPending => irq.reads_pending(),
                    BitReg::SetActive | BitReg::ClearActive => irq.is_active(),
                })
            }),
            BankReg::Priority { first, count } => gather(first, count, 8, &|irq| u64::from(irq.priority())),
            BankReg::Config { first } => {
                gather(first, 16, 2, &|irq| if irq.trigger == Trigger::Edge { 2 } else { 0 })
            }
        }
    }

    pub(super) fn write(self, bank: &mut impl Bank, value: u64, kick: &mut VcpuSet) {
        match self {
            BankReg::Bits(BitRegAt { reg, first }) => {
                for i in 0..32 {
                    write_bit(bank, reg, first + i, value & (1 << i) != 0, kick);
                }
            }
            BankReg::Priority { first, count } => {
                for (i, priority) in value.to_le_bytes().into_iter().take(count).enumerate() {
                    // A list register that has the interrupt keeps the old priority until its vCPU exits.
                    bank.change(first + i, kick, |irq| irq.set_priority(priority));
                }
            }
            BankReg::Config { first } => {
                for i in 0..16 {
                    let trigger = if value & (2 << (i * 2)) != 0 { Trigger::Edge } else { Trigger::Level };
                    let differs = bank.irq(first + i).is_some_and(|irq| irq.trigger != trigger);
                    if differs && first + i >= NR_SGIS {
                        bank.change(first + i, kick, |irq| irq.trigger = trigger);
                    }
                }
            }
        }
    }
}

/// Only interrupts that a write changes are touched: the others' vCPUs need no kick.
fn write_bit(bank: &mut impl Bank, reg: BitReg, intid: usize, bit: bool, kick: &mut VcpuSet) {
    let Some(irq) = bank.irq(intid) else { return };
    if reg == BitReg::Group {
        if irq.group1 != bit {
            bank.change(intid, kick, |irq| irq.group1 = bit);
        }
        return;
    }
    if !bit {
        return;
    }
    let enabled = irq.enabled;
    match reg {
        BitReg::SetEnable if !enabled => bank.change(intid, kick, |irq| irq.enabled = true),
        BitReg::ClearEnable if enabled => bank.change(intid, kick, |irq| irq.enabled = false),
        BitReg::SetPending => bank.change(intid, kick, Irq::set_latch),
        BitReg::ClearPending => bank.change(intid, kick, Irq::clear_latch),
        BitReg::SetActive => bank.change(intid, kick, Irq::set_active),
        BitReg::ClearActive => bank.change(intid, kick, Irq::clear_active),
        BitReg::Group | BitReg::SetEnable | BitReg::ClearEnable => (),
    }
}

/// The part of a 64-bit register that an access of 4 or 8 bytes at `offset` reads.
pub(super) fn part(register: u64, offset: u64, len: usize) -> u64 {
    match (offset % 8, len) {
        (0, 8) => register,
        (0, 4) => register & 0xffff_ffff,
        (4, 4) => register >> 32,
        _ => 0,
    }
}

/// A 64-bit register after a write of 4 or 8 bytes at `offset`.
pub(super) fn replace_part(register: u64, offset: u64, len: usize, value: u64) -> u64 {
    let low = register & 0xffff_ffff;
    match (offset % 8, len) {
        (0, 8) => value,
        (0, 4) => (register - low) | (value & 0xffff_ffff),
        (4, 4) => low | (value << 32),
        _ => register,
    }
}
