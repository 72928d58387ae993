//! System registers of the CPU interface whose effect reaches beyond it. The RMM hands their writes to the
//! host as synchronous exits.

use crate::lock::Lock;

use super::Vgic;
use super::cpu::NR_SGIS;
use super::dist::AFFINITY_MASK;
use super::irq::Irq;
use super::types::VcpuSet;

/// The exception class of a trapped MSR or MRS.
const EC_SYSREG: u64 = 0x18;

/// A GIC system register that exits, by its encoding in `ESR_EL2.ISS`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum SysReg {
    /// ICC_DIR_EL1, trapped by `gicv3_hcr.TDIR`.
    Deactivate,
    /// ICC_SGI1R_EL1.
    Sgi1,
    /// ICC_ASGI1R_EL1 and ICC_SGI0R_EL1: with one security state both mean group 0.
    Sgi0,
}

impl SysReg {
    fn decode_write(esr: u64) -> Option<SysReg> {
        let field = |shift: u32, width: u32| (esr >> shift) & ((1 << width) - 1);
        let is_read = field(0, 1) != 0;
        if field(26, 6) != EC_SYSREG || is_read {
            return None;
        }
        match (field(20, 2), field(14, 3), field(10, 4), field(1, 4), field(17, 3)) {
            (3, 0, 12, 11, 1) => Some(SysReg::Deactivate),
            (3, 0, 12, 11, 5) => Some(SysReg::Sgi1),
            (3, 0, 12, 11, 6 | 7) => Some(SysReg::Sgi0),
            _ => None,
        }
    }
}

impl<R: Lock> Vgic<R> {
    /// Carries out a trapped write of `value` by `vcpu`; `esr` is that of the exit. `None` if it is not a
    /// write of one of the GIC's registers.
    pub fn sysreg_write(&self, vcpu: usize, esr: u64, value: u64) -> Option<VcpuSet> {
        Some(match SysReg::decode_write(esr)? {
            SysReg::Deactivate => self.deactivate(vcpu, value & 0xff_ffff).unwrap_or_default(),
            SysReg::Sgi1 => self.send_sgi(vcpu, value, true).unwrap_or_default(),
            SysReg::Sgi0 => self.send_sgi(vcpu, value, false).unwrap_or_default(),
        })
    }

    /// `group1`: the register may also generate SGIs that the target has put into group 1.
    fn send_sgi(&self, sender: usize, value: u64, group1: bool) -> Option<VcpuSet> {
        let state = self.state.get()?;
        let intid = usize::try_from((value >> 24) & 0xf).ok()?;
        debug_assert!(intid < NR_SGIS);
        let all_others = value & (1 << 40) != 0;
        let aff = |shift: u32| (value >> shift) & 0xff;
        let cluster = (aff(48) << 32) | (aff(32) << 16) | (aff(16) << 8);
        let range = (value >> 44) & 0xf;

        let mut kick = VcpuSet::EMPTY;
        for (vcpu, (&affinity, cpu)) in state.affinities.iter().zip(&state.cpus).enumerate() {
            let addressed = if all_others {
                vcpu != sender
            } else {
                let aff0 = affinity & 0xff;
                affinity & AFFINITY_MASK & !0xff == cluster
                    && aff0 / 16 == range
                    && value & (1 << (aff0 % 16)) != 0
            };
            if !addressed {
                continue;
            }
            let mut cpu = cpu.lock();
            let Some(irq) = cpu.private.get_mut(intid) else { continue };
            if irq.group1 && !group1 {
                continue;
            }
            irq.set_latch();
            if irq.enabled {
                kick.insert(vcpu);
            }
        }
        Some(kick)
    }

    fn deactivate(&self, vcpu: usize, intid: u64) -> Option<VcpuSet> {
        let state = self.state.get()?;
        let intid = usize::try_from(intid).ok()?;
        let mut kick = VcpuSet::EMPTY;
        let mut cpu = state.cpus.get(vcpu)?.lock();
        if let Some(irq) = cpu.private.get_mut(intid) {
            irq.clear_active();
        } else {
            state.dist.change(intid, &mut kick, Irq::clear_active);
        }
        Some(kick)
    }
}
