//! The routing table: which world may call which function.

use crate::fid::{self, UNKNOWN};
use crate::gpt::Gpi;
use crate::platform::{Action, Platform, Regs, World};
use crate::psci::PsciError;
use crate::{Monitor, RmmState};

/// SMCCC 1.2: x4 to x17 are preserved; no SVE hint, which 1.3 would allow callers to set in every identifier.
const SMCCC_1_2: u64 = 0x0001_0002;
const PSCI_1_1: u64 = 0x0001_0001;
/// No trusted OS that would have to be migrated.
const MIGRATION_NOT_REQUIRED: u64 = 2;

impl Monitor {
    /// Handles an SMC of `cpu` in `world`. `regs` are the caller's; results are written there, registers
    /// without result keep their values.
    #[inline]
    pub fn handle_smc(&self, platform: &impl Platform, cpu: usize, world: World, regs: &mut Regs) -> Action {
        let function = (regs[0] & 0xFFFF_FFFF & !u64::from(fid::HINT_BIT)) as u32;
        match world {
            World::NonSecure => match function {
                fid::RMI_FIRST..=fid::RMI_LAST | fid::RMI2_FIRST..=fid::RMI2_LAST => self.rmi(regs),
                _ => self.host_call(platform, cpu, function, regs),
            },
            World::Realm => match function {
                fid::RMI_REQ_COMPLETE => Action::ToNormal,
                _ => self.rmm_call(platform, cpu, function, regs),
            },
        }
    }

    /// The host calls the RMM.
    #[inline]
    fn rmi(&self, regs: &mut Regs) -> Action {
        if self.rmm.state() == RmmState::Ready {
            regs[0] &= 0xFFFF_FFFF;
            Action::ToRealm
        } else {
            regs[0] = UNKNOWN;
            Action::Resume
        }
    }

    fn host_call(&self, platform: &impl Platform, cpu: usize, function: u32, regs: &mut Regs) -> Action {
        let result = match function {
            fid::PSCI_VERSION => Ok(PSCI_1_1),
            fid::SMCCC_VERSION => Ok(SMCCC_1_2),
            fid::SMCCC_ARCH_FEATURES => match low(regs[1]) {
                fid::SMCCC_VERSION | fid::SMCCC_ARCH_FEATURES => Ok(0),
                _ => Err(PsciError::NotSupported),
            },
            fid::PSCI_FEATURES => psci_features(low(regs[1])),
            fid::CPU_ON_64 => self.cpu_on(platform, regs[1], regs[2], regs[3]),
            fid::CPU_ON_32 => {
                let arg = |i: usize| u64::from(low(regs[i]));
                self.cpu_on(platform, arg(1), arg(2), arg(3))
            }
            fid::AFFINITY_INFO_64 => self.psci.affinity_info(regs[1], regs[2]),
            fid::AFFINITY_INFO_32 => self.psci.affinity_info(u64::from(low(regs[1])), u64::from(low(regs[2]))),
            fid::MIGRATE_INFO_TYPE => Ok(MIGRATION_NOT_REQUIRED),
            fid::CPU_OFF => return Action::CpuOff,
            fid::SYSTEM_OFF => {
                platform.print(format_args!("system off, asked for by CPU {cpu}"));
                return Action::SystemOff;
            }
            fid::SYSTEM_RESET => {
                platform.print(format_args!("system reset, asked for by CPU {cpu}"));
                return Action::SystemReset;
            }
            _ => Err(PsciError::NotSupported),
        };
        // NOT_SUPPORTED is the same number as the unknown function's result.
        regs[0] = result.unwrap_or_else(PsciError::code);
        Action::Resume
    }

    fn cpu_on(&self, platform: &impl Platform, mpidr: u64, entry: u64, context: u64) -> Result<u64, PsciError> {
        let reachable = matches!(self.gpt.lookup(platform, entry), Some(Gpi::NonSecure | Gpi::Any));
        if entry % 4 != 0 || !reachable {
            return Err(PsciError::InvalidAddress);
        }
        let target = self.psci.cpu_on(mpidr, entry, context)?;
        platform.release_cpu(target);
        Ok(0)
    }
}

fn psci_features(function: u32) -> Result<u64, PsciError> {
    match function {
        fid::SMCCC_VERSION
        | fid::PSCI_VERSION
        | fid::PSCI_FEATURES
        | fid::CPU_OFF
        | fid::CPU_ON_32
        | fid::CPU_ON_64
        | fid::AFFINITY_INFO_32
        | fid::AFFINITY_INFO_64
        | fid::MIGRATE_INFO_TYPE
        | fid::SYSTEM_OFF
        | fid::SYSTEM_RESET => Ok(0),
        _ => Err(PsciError::NotSupported),
    }
}

/// A 32-bit argument.
fn low(register: u64) -> u32 {
    (register & 0xFFFF_FFFF) as u32
}
