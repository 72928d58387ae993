//! `KVM_{GET,SET}_ONE_REG` and the lists around them: the host sees nothing of a Realm's registers but what it gave
//! them first, and what a host call shows.
//!
//! Three of them are parameters of the Realm in disguise: `ID_AA64DFR0_EL1` (breakpoints, watchpoints), `SVE_VLS`
//! (vector length) and `PMCR_EL0.N` (event counters). Each can be chosen until the Realm is created, within what the
//! RMM offers.

use crate::sync::Ordering;

use cca_abi::kvm::{self, reg, vcpu_feature};

use crate::errno::{Errno, Result};
use crate::kernel::{Kernel, read_user, write_user};
use crate::realm::RealmState;
use crate::vcpu::{VcpuFile, VcpuState};

/// A register by its identifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Register {
    /// x0 to x30.
    Gpr(usize),
    Pc,
    /// Another core register: the RMM's alone.
    OtherCore,
    Mpidr,
    DebugFeatures,
    /// `PMCR_EL0`.
    PmuControl,
    /// Another ID register, by its 16-bit encoding.
    Id(u16),
}

const SYSREG_MASK: u64 = 0xFFFF;
/// op0 3, op1 0, CRn 0, CRm 1 to 7.
const FIRST_ID: u16 = 0xC008;
const LAST_ID: u16 = 0xC03F;
const CORE_MASK: u64 = 0xFFFF;
/// x0 to x7: what the first entry can be given.
const FIRST_GPRS: usize = 8;

fn decode(id: u64) -> Option<Register> {
    if id & !CORE_MASK == reg::CORE_X0 {
        let place = usize::try_from(id & CORE_MASK).ok()?;
        return Some(match place {
            _ if id == reg::CORE_PC => Register::Pc,
            0..62 if place % 2 == 0 => Register::Gpr(place / 2),
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
        reg::PMCR_EL0 => Some(Register::PmuControl),
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
/// What can be written of it.
const DEBUG_WRITABLE: u64 = 0xF << BRPS.0 | 0xF << WRPS.0 | 0xF << CTX_CMPS.0;

/// `PMCR_EL0.N`, and LC, which is always one.
const PMCR_N: (u32, u64) = (11, 0x1F);
const PMCR_LC: u64 = 1 << 6;

/// `SVE_VLS` is 512 bits: bit n stands for a vector of (n + 1) × 128 bits.
const VLS_WORDS: usize = 8;

fn field(value: u64, (shift, mask): (u32, u64)) -> u64 {
    (value >> shift) & mask
}

fn with_field(value: u64, (shift, mask): (u32, u64), new: u64) -> u64 {
    value & !(mask << shift) | (new & mask) << shift
}

impl<K: Kernel> VcpuState<K> {
    pub(crate) fn has(&self, feature: u32) -> bool {
        self.features.is_some_and(|features| features & 1 << feature != 0)
    }
}

impl<K: Kernel> VcpuFile<K> {
    fn debug_features(&self, state: &VcpuState<K>) -> u64 {
        let encoding = u16::try_from(reg::ID_AA64DFR0_EL1 & SYSREG_MASK).unwrap_or(0);
        let host = self.vm.kernel.id_register(encoding);
        let counts = self.vm.debug_counts.load(Ordering::Relaxed);
        let (bps, wps) = (u64::from(counts & 0xFF).min(15), u64::from(counts >> 8 & 0xFF).min(15));
        let value = with_field(with_field(host, BRPS, bps), WRPS, wps);
        let value = with_field(value, CTX_CMPS, field(host, CTX_CMPS).min(bps));
        if state.has(vcpu_feature::PMU_V3) { value } else { with_field(value, PMU_VER, 0) }
    }

    /// `KVM_GET_ONE_REG`.
    pub(crate) fn get_one_reg(&self, reg: &kvm::OneReg) -> Result {
        let kernel = &self.vm.kernel;
        if reg.id == reg::SVE_VLS {
            let vls = self.vector_lengths()?;
            write_user(kernel, reg.addr, &vls)?;
        } else {
            write_user(kernel, reg.addr, &self.get_reg(reg.id)?)?;
        }
        Ok(0)
    }

    /// `KVM_SET_ONE_REG`.
    pub(crate) fn set_one_reg(&self, reg: &kvm::OneReg) -> Result {
        let kernel = &self.vm.kernel;
        if reg.id == reg::SVE_VLS {
            self.vector_lengths()?;
            self.set_vector_lengths(&read_user(kernel, reg.addr)?)?;
        } else {
            self.check_settable(reg.id)?;
            self.set_reg(reg.id, read_user(kernel, reg.addr)?)?;
        }
        Ok(0)
    }

    fn get_reg(&self, id: u64) -> Result<u64> {
        let state = self.vcpu.state.lock();
        if state.features.is_none() {
            return Err(Errno::ENOEXEC);
        }
        match decode(id).ok_or(Errno::ENOENT)? {
            Register::Gpr(index) if state.user_call.is_some() => {
                state.host_call.get(index).copied().ok_or(Errno::ENOENT)
            }
            Register::Gpr(index) => state.gprs.get(index).copied().ok_or(Errno::EPERM),
            Register::Pc => Ok(state.pc),
            Register::OtherCore => Err(Errno::EPERM),
            // Bit 31 is RES1.
            Register::Mpidr => Ok(self.vcpu.mpidr() | 1 << 31),
            Register::DebugFeatures => Ok(self.debug_features(&state)),
            Register::PmuControl if state.has(vcpu_feature::PMU_V3) => {
                let counters = self.vm.pmu_counters.load(Ordering::Relaxed);
                Ok(with_field(PMCR_LC, PMCR_N, counters.into()))
            }
            Register::PmuControl => Err(Errno::ENOENT),
            Register::Id(encoding) => Ok(self.vm.kernel.id_register(encoding)),
        }
    }

    /// Refuses what cannot be set before its value is read.
    fn check_settable(&self, id: u64) -> Result<()> {
        let state = self.vcpu.state.lock();
        if state.features.is_none() {
            return Err(Errno::ENOEXEC);
        }
        match decode(id) {
            Some(Register::Gpr(index)) if index < FIRST_GPRS || state.user_call.is_some() => Ok(()),
            Some(Register::Pc | Register::DebugFeatures) => Ok(()),
            Some(Register::PmuControl) if state.has(vcpu_feature::PMU_V3) => Ok(()),
            _ => Err(Errno::EINVAL),
        }
    }

    fn set_reg(&self, id: u64, value: u64) -> Result<()> {
        let mut state = self.vcpu.state.lock();
        match decode(id) {
            Some(Register::DebugFeatures) => self.set_debug_features(&state, value),
            Some(Register::PmuControl) => self.set_pmu_control(value),
            // The answer to a host call.
            Some(Register::Gpr(index)) if state.user_call == Some(true) => {
                *state.host_call.get_mut(index).ok_or(Errno::EINVAL)? = value;
                Ok(())
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
    fn set_debug_features(&self, state: &VcpuState<K>, value: u64) -> Result<()> {
        let current = self.debug_features(state);
        if value == current {
            return Ok(());
        }
        if self.vm.realm_state() != RealmState::None {
            return Err(Errno::EBUSY);
        }
        let features = self.vm.system.features();
        let (bps, wps, ctx) = (field(value, BRPS), field(value, WRPS), field(value, CTX_CMPS));
        if bps == 0
            || wps == 0
            || field(value, DEBUG_VER) == 0
            || bps > features.num_bps()
            || wps > features.num_wps()
            || ctx > bps
            || value & !DEBUG_WRITABLE != current & !DEBUG_WRITABLE
        {
            return Err(Errno::EINVAL);
        }
        let counts = u32::try_from(bps | wps << 8).map_err(|_| Errno::EINVAL)?;
        self.vm.debug_counts.store(counts, Ordering::Relaxed);
        Ok(())
    }

    /// Chooses the number of event counters; everything else in the register is the Realm's. Zero, or a number too large,
    /// is ignored, as is any once the Realm exists.
    fn set_pmu_control(&self, value: u64) -> Result<()> {
        let counters = field(value, PMCR_N);
        let offered = self.vm.system.features().pmu_num_ctrs();
        if self.vm.realm_state() == RealmState::None && (1..=offered).contains(&counters) {
            let counters = u32::try_from(counters).map_err(|_| Errno::EINVAL)?;
            self.vm.pmu_counters.store(counters, Ordering::Relaxed);
        }
        Ok(())
    }

    /// The vector lengths that the vCPU has: all up to the longest.
    fn vector_lengths(&self) -> Result<[u64; VLS_WORDS]> {
        let state = self.vcpu.state.lock();
        if state.features.is_none() {
            return Err(Errno::ENOEXEC);
        }
        if !state.has(vcpu_feature::SVE) {
            return Err(Errno::ENOENT);
        }
        let mut vls = [0; VLS_WORDS];
        vls[0] = (1 << state.sve_vq) - 1;
        Ok(vls)
    }

    /// Chooses the longest vector. Which shorter ones exist is the hardware's matter; the set must have the powers of
    /// two, which every implementation has.
    fn set_vector_lengths(&self, vls: &[u64; VLS_WORDS]) -> Result<()> {
        let mut state = self.vcpu.state.lock();
        if state.sve_finalized || self.vm.realm_state() != RealmState::None {
            return Err(Errno::EPERM);
        }
        let vq = 64 - vls[0].leading_zeros();
        let beyond = vls[1..].iter().any(|word| *word != 0);
        let powers = [1u32, 2, 4, 8, 16].into_iter().filter(|power| *power <= vq);
        if beyond
            || vq == 0
            || vq > self.vm.system.sve_max_vq()
            || powers.into_iter().any(|power| vls[0] & 1 << (power - 1) == 0)
        {
            return Err(Errno::EINVAL);
        }
        state.sve_vq = u8::try_from(vq).map_err(|_| Errno::EINVAL)?;
        Ok(())
    }

    /// `KVM_GET_REG_LIST`: what can be set.
    pub(crate) fn list_regs(&self, argument: u64) -> Result {
        let (sve, pmu) = {
            let state = self.vcpu.state.lock();
            if state.features.is_none() {
                return Err(Errno::ENOEXEC);
            }
            (state.has(vcpu_feature::SVE), state.has(vcpu_feature::PMU_V3))
        };
        let kernel = &self.vm.kernel;
        let room: u64 = read_user(kernel, argument)?;
        let gprs = (0..8).map(|n| reg::CORE_X0 + 2 * n);
        let list = gprs
            .chain([reg::CORE_PC, reg::ID_AA64DFR0_EL1])
            .chain(sve.then_some(reg::SVE_VLS))
            .chain(pmu.then_some(reg::PMCR_EL0));
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

/// `KVM_ARM_GET_REG_WRITABLE_MASKS`: which bits of the ID registers (op0 3; op1 0, 1, 3; CRm 0 to 7; op2 0 to 7, in
/// this order) can be written.
///
/// # Errors
/// `EINVAL` for a range other than that of the ID registers, or reserved fields; `EFAULT`.
pub(crate) fn writable_masks<K: Kernel>(kernel: &K, args: &kvm::RegMaskRange) -> Result {
    const REGISTERS: u64 = 3 * 8 * 8;
    // op1 0, CRm 5, op2 0.
    const DEBUG_FEATURES: u64 = 5 * 8;
    if args.range != 0 || args.reserved != [0; 13] {
        return Err(Errno::EINVAL);
    }
    for index in 0..REGISTERS {
        let to = args.addr.checked_add(8 * index).ok_or(Errno::EFAULT)?;
        let mask = if index == DEBUG_FEATURES { DEBUG_WRITABLE } else { 0 };
        write_user(kernel, to, &mask)?;
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_eight_registers_and_pc_are_the_hosts() {
        assert_eq!(decode(reg::CORE_X0), Some(Register::Gpr(0)));
        assert_eq!(decode(reg::CORE_X0 + 14), Some(Register::Gpr(7)));
        assert_eq!(decode(reg::CORE_X0 + 60), Some(Register::Gpr(30)));
        assert_eq!(decode(reg::CORE_X0 + 1), Some(Register::OtherCore));
        assert_eq!(decode(reg::CORE_SP), Some(Register::OtherCore));
        assert_eq!(decode(reg::CORE_PSTATE), Some(Register::OtherCore));
        assert_eq!(decode(reg::CORE_PC), Some(Register::Pc));
        assert_eq!(decode(reg::MPIDR_EL1), Some(Register::Mpidr));
        assert_eq!(decode(reg::ID_AA64PFR0_EL1), Some(Register::Id(0xC020)));
        assert_eq!(decode(reg::PMCR_EL0), Some(Register::PmuControl));
        assert_eq!(decode(reg::PSCI_VERSION), None);
    }
}
