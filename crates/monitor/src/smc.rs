//! The routing table: which world may call which function.

use cca_abi::psci::{self, Code, fid};
use cca_abi::{rmi, rmm_el3, smccc};

use crate::Monitor;
use crate::gpt::Gpi;
use crate::platform::{Action, Platform, Regs, World};
use crate::psci::Psci;

/// The two ranges of RMI functions; the second one came with RMM 2.0.
const RMI_FIRST: u64 = smccc::standard_fid(rmi::FIRST_FUNCTION);
const RMI_LAST: u64 = smccc::standard_fid(rmi::LAST_FUNCTION);
const RMI2_FIRST: u64 = smccc::standard_fid(rmi::FIRST_FUNCTION_2_0);
const RMI2_LAST: u64 = smccc::standard_fid(rmi::LAST_FUNCTION_2_0);

/// SOC_ID: JEP106 bank 0, code 0 (software, as MIDR_EL1 says of an emulated CPU), part "KR".
const SOC_VERSION: u64 = 0x4B52;
const SOC_REVISION: u64 = 1;

impl Monitor {
    /// Handles an SMC of `cpu` in `world`. `regs` are the caller's; results are written there, registers
    /// without result keep their values.
    pub fn handle_smc(&self, platform: &impl Platform, cpu: usize, world: World, regs: &mut Regs) -> Action {
        if let Some(action) = self.forward(world, regs) {
            return action;
        }
        let function = smccc::fid(regs[0]);
        match (world, function) {
            (_, smccc::VERSION..=smccc::LAST_ARCH_32 | smccc::FIRST_ARCH_64..=smccc::LAST_ARCH_64) => {
                self.architecture_call(world, function, regs);
                Action::Resume
            }
            (World::NonSecure, _) => self.host_call(platform, cpu, function, regs),
            (World::Realm, _) => self.rmm_call(platform, cpu, function, regs),
        }
    }

    /// The first question of [`Monitor::handle_smc`]: does the call go to the other world? On its own it is
    /// short enough for an exception handler that has no stack frame.
    #[inline(always)]
    pub fn forward(&self, world: World, regs: &mut Regs) -> Option<Action> {
        let function = smccc::fid(regs[0]);
        let ready = self.rmm.is_ready();
        match (world, function) {
            (World::NonSecure, RMI_FIRST..=RMI_LAST) if ready => {
                regs[0] &= 0xFFFF_FFFF;
                Some(Action::ToRealm)
            }
            (World::NonSecure, RMI2_FIRST..=RMI2_LAST) if ready && self.rmm.interface().is_2() => {
                regs[0] &= 0xFFFF_FFFF;
                Some(Action::ToRealm)
            }
            (World::Realm, rmm_el3::fid::REQ_COMPLETE) if ready => Some(self.rmm.completion()),
            _ => None,
        }
    }

    /// Calls that the architecture defines for everybody.
    fn architecture_call(&self, world: World, function: u64, regs: &mut Regs) {
        regs[0] = match (function, low(regs[1])) {
            // 1.2: x4 to x17 are preserved; 1.3: the SVE hint is understood in every identifier.
            (smccc::VERSION, _) => smccc::VERSION_1_5,
            (
                smccc::ARCH_FEATURES,
                smccc::VERSION | smccc::ARCH_FEATURES | smccc::ARCH_SOC_ID | smccc::ARCH_FEATURE_AVAILABILITY,
            ) => 0,
            // The workarounds among them: these CPUs need none.
            (smccc::ARCH_FEATURES, _) => smccc::NOT_SUPPORTED,
            (smccc::ARCH_SOC_ID | smccc::ARCH_SOC_ID_64, 0) => SOC_VERSION,
            (smccc::ARCH_SOC_ID | smccc::ARCH_SOC_ID_64, 1) => SOC_REVISION,
            (smccc::ARCH_SOC_ID | smccc::ARCH_SOC_ID_64, _) => smccc::INVALID_PARAMETER,
            (smccc::ARCH_FEATURE_AVAILABILITY, _) => {
                let mask = self.id.availability(regs[1], world);
                regs[1] = mask.unwrap_or(0);
                if mask.is_some() { 0 } else { smccc::INVALID_PARAMETER }
            }
            _ => smccc::NOT_SUPPORTED,
        };
    }

    fn host_call(&self, platform: &impl Platform, cpu: usize, function: u64, regs: &mut Regs) -> Action {
        let result = match function {
            fid::VERSION => Ok(psci::VERSION_1_1),
            fid::FEATURES => psci_features(low(regs[1])),
            fid::CPU_SUSPEND_64 | fid::CPU_SUSPEND_32 => {
                // The power state has 32 bits in both.
                if Psci::is_standby(low(regs[1])) {
                    regs[0] = 0;
                    return Action::Standby;
                }
                Err(Code::InvalidParameters)
            }
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
            fid::SYSTEM_RESET2_32 | fid::SYSTEM_RESET2_64 => {
                // Only the architecture's warm reset, which is the same as the cold one here.
                if low(regs[1]) == psci::SYSTEM_WARM_RESET {
                    platform.print(format_args!("system warm reset, asked for by CPU {cpu}"));
                    return Action::SystemReset;
                }
                Err(Code::InvalidParameters)
            }
            function if self.trng.has(function) => {
                self.trng.call(platform, function, regs);
                return Action::Resume;
            }
            // Also every RMI call when there is no RMM to take it.
            _ => Err(Code::NotSupported),
        };
        // NOT_SUPPORTED is the same number as the unknown function's result.
        regs[0] = result.unwrap_or_else(Code::to_register);
        Action::Resume
    }

    fn cpu_on(&self, platform: &impl Platform, mpidr: u64, entry: u64, context: u64) -> Result<u64, Code> {
        // Only memory that is the host's by now, whatever it was at boot. Devices are not.
        if entry % 4 != 0 || self.gpt.lookup(platform, entry) != Some(Gpi::NonSecure) {
            return Err(Code::InvalidAddress);
        }
        let target = self.psci.cpu_on(mpidr, entry, context)?;
        platform.release_cpu(target);
        Ok(0)
    }
}

fn psci_features(function: u64) -> Result<u64, Code> {
    match function {
        // CPU_SUSPEND: flags zero, the original format of power states, no OS-initiated mode.
        smccc::VERSION
        | fid::VERSION
        | fid::FEATURES
        | fid::CPU_SUSPEND_32
        | fid::CPU_SUSPEND_64
        | fid::CPU_OFF
        | fid::CPU_ON_32
        | fid::CPU_ON_64
        | fid::AFFINITY_INFO_32
        | fid::AFFINITY_INFO_64
        | fid::MIGRATE_INFO_TYPE
        | fid::SYSTEM_OFF
        | fid::SYSTEM_RESET
        | fid::SYSTEM_RESET2_32
        | fid::SYSTEM_RESET2_64 => Ok(0),
        _ => Err(Code::NotSupported),
    }
}

/// A 32-bit argument.
fn low(register: u64) -> u64 {
    register & 0xFFFF_FFFF
}
