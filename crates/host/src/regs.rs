//! `KVM_{GET,SET}_ONE_REG`: the host sees nothing of a Realm's registers but what it gave them first.

use core::sync::atomic::Ordering;

use cca_abi::kvm::reg;

use crate::errno::{Errno, Result};
use crate::kernel::{Kernel, read_user, write_user};
use crate::realm::RealmState;
use crate::vcpu::VcpuFile;

/// A register by its identifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Register {
    /// x0 to x7.
    Gpr(usize),
    Pc,
    /// Another core register: the RMM's alone.
    OtherCore,
    Mpidr,
    DebugFeatures,
    /// Another ID register, by its 16-bit encoding.
    Id(u16),
}

const SYSREG_MASK: u64 = 0xFFFF;
/// op0 3, op1 0, CRn 0, CRm 1 to 7.
const FIRST_ID: u16 = 0xC008;
const LAST_ID: u16 = 0xC03F;
const CORE_MASK: u64 = 0xFFFF;

fn decode(id: u64) -> Option<Register> {
    if id & !CORE_MASK == reg::CORE_X0 {
        let place = usize::try_from(id & CORE_MASK).ok()?;
        return Some(match place {
            _ if id == reg::CORE_PC => Register::Pc,
            0..16 if place % 2 == 0 => Register::Gpr(place / 2),
            _ => Register::OtherCore,
        });
    }
    if id & !SYSREG_MASK != reg::SYSREG {
        return None;
    }
    let encoding = u16::try_from(id & SYSREG_MASK).ok()?;
    match id {
        reg::MPIDR_EL1 => Some(Register::Mpidr),
        reg::ID_AA64DFR0_EL1 => Some(Register::DebugFeatures),
        _ if (FIRST_ID..=LAST_ID).contains(&encoding) => Some(Register::Id(encoding)),
        _ => None,
    }
}

/// Fields of `ID_AA64DFR0_EL1`.
const DEBUG_VER: (u32, u64) = (0, 0xF);
const PMU_VER: (u32, u64) = (8, 0xF);
const BRPS: (u32, u64) = (12, 0xF);
const WRPS: (u32, u64) = (20, 0xF);
const CTX_CMPS: (u32, u64) = (28, 0xF);

fn field(value: u64, (shift, mask): (u32, u64)) -> u64 {
    (value >> shift) & mask
}

fn with_field(value: u64, (shift, mask): (u32, u64), new: u64) -> u64 {
    value & !(mask << shift) | (new & mask) << shift
}

impl<K: Kernel> VcpuFile<K> {
    fn debug_features(&self) -> u64 {
        let encoding = u16::try_from(reg::ID_AA64DFR0_EL1 & SYSREG_MASK).unwrap_or(0);
        let host = self.vm.kernel.id_register(encoding);
        let counts = self.vm.debug_counts.load(Ordering::Relaxed);
        let (bps, wps) = (u64::from(counts & 0xFF).min(15), u64::from(counts >> 8 & 0xFF).min(15));
        let value = with_field(with_field(host, BRPS, bps), WRPS, wps);
        let value = with_field(value, CTX_CMPS, field(host, CTX_CMPS).min(bps));
        with_field(value, PMU_VER, 0)
    }

    /// `KVM_GET_ONE_REG`.
    pub(crate) fn get_reg(&self, id: u64) -> Result<u64> {
        let state = self.vcpu.state.lock();
        if state.features.is_none() {
            return Err(Errno::ENOEXEC);
        }
        match decode(id).ok_or(Errno::ENOENT)? {
            Register::Gpr(index) => state.gprs.get(index).copied().ok_or(Errno::ENOENT),
            Register::Pc => Ok(state.pc),
            Register::OtherCore => Err(Errno::EPERM),
            // Bit 31 is RES1.
            Register::Mpidr => Ok(self.vcpu.mpidr() | 1 << 31),
            Register::DebugFeatures => Ok(self.debug_features()),
            Register::Id(encoding) => Ok(self.vm.kernel.id_register(encoding)),
        }
    }

    /// Refuses what cannot be set before its value is read.
    pub(crate) fn check_settable(&self, id: u64) -> Result<()> {
        if self.vcpu.state.lock().features.is_none() {
            return Err(Errno::ENOEXEC);
        }
        match decode(id) {
            Some(Register::Gpr(_) | Register::Pc | Register::DebugFeatures) => Ok(()),
            _ => Err(Errno::EINVAL),
        }
    }

    /// `KVM_SET_ONE_REG`.
    pub(crate) fn set_reg(&self, id: u64, value: u64) -> Result<()> {
        let mut state = self.vcpu.state.lock();
        match decode(id) {
            Some(Register::DebugFeatures) => {
                drop(state);
                self.set_debug_features(value)
            }
            // What the REC starts with is fixed with FINALIZE.
            _ if state.finalized => Err(Errno::EINVAL),
            Some(Register::Gpr(index)) => {
                *state.gprs.get_mut(index).ok_or(Errno::EINVAL)? = value;
                Ok(())
            }
            Some(Register::Pc) => {
                state.pc = value;
                Ok(())
            }
            _ => Err(Errno::EINVAL),
        }
    }

    /// Chooses the numbers of breakpoints and watchpoints, which are parameters of the Realm.
    fn set_debug_features(&self, value: u64) -> Result<()> {
        let current = self.debug_features();
        if value == current {
            return Ok(());
        }
        if self.vm.realm_state() != RealmState::None {
            return Err(Errno::EBUSY);
        }
        let features = self.vm.system.features();
        let (bps, wps, ctx) = (field(value, BRPS), field(value, WRPS), field(value, CTX_CMPS));
        let changeable = |v| with_field(with_field(with_field(v, BRPS, 0), WRPS, 0), CTX_CMPS, 0);
        if bps == 0
            || wps == 0
            || field(value, DEBUG_VER) == 0
            || bps > features.num_bps()
            || wps > features.num_wps()
            || ctx > bps
            || changeable(value) != changeable(current)
        {
            return Err(Errno::EINVAL);
        }
        let counts = u32::try_from(bps | wps << 8).map_err(|_| Errno::EINVAL)?;
        self.vm.debug_counts.store(counts, Ordering::Relaxed);
        Ok(())
    }

    /// `KVM_GET_REG_LIST`: what can be set.
    pub(crate) fn list_regs(&self, argument: u64) -> Result {
        if self.vcpu.state.lock().features.is_none() {
            return Err(Errno::ENOEXEC);
        }
        let kernel = &self.vm.kernel;
        let room: u64 = read_user(kernel, argument)?;
        let gprs = (0..8).map(|n| reg::CORE_X0 + 2 * n);
        let list = gprs.chain([reg::CORE_PC, reg::ID_AA64DFR0_EL1]);
        let count = u64::try_from(list.clone().count()).unwrap_or(0);
        write_user(kernel, argument, &count)?;
        if room < count {
            return Err(Errno::E2BIG);
        }
        let mut to = argument;
        for id in list {
            to = to.checked_add(8).ok_or(Errno::EFAULT)?;
            write_user(kernel, to, &id)?;
        }
        Ok(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_eight_registers_and_pc_are_the_hosts() {
        assert_eq!(decode(reg::CORE_X0), Some(Register::Gpr(0)));
        assert_eq!(decode(reg::CORE_X0 + 14), Some(Register::Gpr(7)));
        assert_eq!(decode(reg::CORE_X0 + 16), Some(Register::OtherCore));
        assert_eq!(decode(reg::CORE_X0 + 1), Some(Register::OtherCore));
        assert_eq!(decode(reg::CORE_SP), Some(Register::OtherCore));
        assert_eq!(decode(reg::CORE_PSTATE), Some(Register::OtherCore));
        assert_eq!(decode(reg::CORE_PC), Some(Register::Pc));
        assert_eq!(decode(reg::MPIDR_EL1), Some(Register::Mpidr));
        assert_eq!(decode(reg::ID_AA64PFR0_EL1), Some(Register::Id(0xC020)));
        assert_eq!(decode(reg::PMCR_EL0), None);
        assert_eq!(decode(reg::PSCI_VERSION), None);
    }
}
