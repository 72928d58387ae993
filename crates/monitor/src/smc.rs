//! The routing table: which world may call which function.

use cca_abi::psci::{self, Code, fid};
use cca_abi::{rmi, rmm_el3, smccc};

use crate::Monitor;
use crate::gpt::Gpi;
use crate::platform::{Action, Platform, Regs, World};

/// The two ranges of RMI functions; the second one came with RMM 2.0.
const RMI_FIRST: u64 = smccc::standard_fid(rmi::FIRST_FUNCTION);
const RMI_LAST: u64 = smccc::standard_fid(rmi::LAST_FUNCTION);
const RMI2_FIRST: u64 = smccc::standard_fid(rmi::FIRST_FUNCTION_2_0);
const RMI2_LAST: u64 = smccc::standard_fid(rmi::LAST_FUNCTION_2_0);

impl Monitor {
    /// Handles an SMC of `cpu` in `world`. `regs` are the caller's; results are written there, registers
    /// without result keep their values.
    pub fn handle_smc(&self, platform: &impl Platform, cpu: usize, world: World, regs: &mut Regs) -> Action {
        if let Some(action) = self.forward(world, regs) {
            return action;
        }
        let function = smccc::fid(regs[0]);
        match world {
            World::NonSecure => self.host_call(platform, cpu, function, regs),
            World::Realm => self.rmm_call(platform, cpu, function, regs),
        }
    }

    /// The first question of [`Monitor::handle_smc`]: does the call go to the other world? On its own it is
    /// short enough for an exception handler that has no stack frame.
    #[inline(always)]
    pub fn forward(&self, world: World, regs: &mut Regs) -> Option<Action> {
        let function = smccc::fid(regs[0]);
        match (world, function) {
            (World::NonSecure, RMI_FIRST..=RMI_LAST | RMI2_FIRST..=RMI2_LAST) if self.rmm.is_ready() => {
                regs[0] &= 0xFFFF_FFFF;
                Some(Action::ToRealm)
            }
            (World::Realm, rmm_el3::fid::REQ_COMPLETE) => Some(Action::ToNormal),
            _ => None,
        }
    }

    fn host_call(&self, platform: &impl Platform, cpu: usize, function: u64, regs: &mut Regs) -> Action {
        let result = match function {
            fid::VERSION => Ok(psci::VERSION_1_1),
            // 1.2: x4 to x17 are preserved. No SVE hint, which 1.3 would let callers set in every identifier.
            smccc::VERSION => Ok(smccc::VERSION_1_2),
            smccc::ARCH_FEATURES => match low(regs[1]) {
                smccc::VERSION | smccc::ARCH_FEATURES => Ok(0),
                _ => Err(Code::NotSupported),
            },
            fid::FEATURES => psci_features(low(regs[1])),
            fid::CPU_ON_64 => self.cpu_on(platform, regs[1], regs[2], regs[3]),
            fid::CPU_ON_32 => {
                let arg = |i: usize| low(regs[i]);
                self.cpu_on(platform, arg(1), arg(2), arg(3))
            }
            fid::AFFINITY_INFO_64 => self.psci.affinity_info(regs[1], regs[2]),
            fid::AFFINITY_INFO_32 => self.psci.affinity_info(low(regs[1]), low(regs[2])),
            fid::MIGRATE_INFO_TYPE => Ok(psci::MIGRATION_NOT_REQUIRED),
            fid::CPU_OFF => return Action::CpuOff,
            fid::SYSTEM_OFF => {
                platform.print(format_args!("system off, asked for by CPU {cpu}"));
                return Action::SystemOff;
            }
            fid::SYSTEM_RESET => {
                platform.print(format_args!("system reset, asked for by CPU {cpu}"));
                return Action::SystemReset;
            }
            // Also every RMI call when there is no RMM to take it.
            _ => Err(Code::NotSupported),
        };
        // NOT_SUPPORTED is the same number as the unknown function's result.
        regs[0] = result.unwrap_or_else(Code::to_register);
        Action::Resume
    }

    fn cpu_on(&self, platform: &impl Platform, mpidr: u64, entry: u64, context: u64) -> Result<u64, Code> {
        let reachable = matches!(self.gpt.lookup(platform, entry), Some(Gpi::NonSecure | Gpi::Any));
        if entry % 4 != 0 || !reachable {
            return Err(Code::InvalidAddress);
        }
        let target = self.psci.cpu_on(mpidr, entry, context)?;
        platform.release_cpu(target);
        Ok(0)
    }
}

fn psci_features(function: u64) -> Result<u64, Code> {
    match function {
        smccc::VERSION
        | fid::VERSION
        | fid::FEATURES
        | fid::CPU_OFF
        | fid::CPU_ON_32
        | fid::CPU_ON_64
        | fid::AFFINITY_INFO_32
        | fid::AFFINITY_INFO_64
        | fid::MIGRATE_INFO_TYPE
        | fid::SYSTEM_OFF
        | fid::SYSTEM_RESET => Ok(0),
        _ => Err(Code::NotSupported),
    }
}

/// A 32-bit argument.
fn low(register: u64) -> u64 {
    register & 0xFFFF_FFFF
}
