//! What each CPU keeps for itself, in the lower half of its slot.

use crate::entry::boot_state;
use crate::layout::{SLOT_SIZE, STACK_SIZE};
use crate::pmu::HostPmu;

/// Bytes for 32 Z registers, 16 predicates and FFR of the longest vectors that the architecture allows.
pub(crate) const VECTOR_BYTES: usize = 32 * 256 + 17 * 32;

/// EL1/EL0 registers of the host that the switch keeps; see `world`.
pub(crate) const HOST_REGISTERS: usize = 48;
/// Debug registers of the host, 4 × 16.
pub(crate) const DEBUG_REGISTERS: usize = 64;

/// A CPU's own data. Only code running on that CPU touches it, and nothing of it survives a request except
/// what is written before it is read.
#[repr(C, align(64))]
pub(crate) struct PerCpu {
    /// The host's vector registers while a REC's are loaded.
    pub(crate) vectors: [u8; VECTOR_BYTES],
    /// The interrupted owner's vector registers while the RMM hashes.
    pub(crate) scratch: [u8; VECTOR_BYTES],
    /// The host's FPSR, FPCR and SVCR with `vectors`.
    pub(crate) fpsr: u64,
    /// See `fpsr`.
    pub(crate) fpcr: u64,
    /// See `fpsr`; nonzero only if the host was in streaming mode.
    pub(crate) svcr: u64,
    /// The host's ZCR_EL2 and ZCR_EL1 while a REC with SVE is loaded.
    pub(crate) zcr_el2: u64,
    /// See `zcr_el2`.
    pub(crate) zcr_el1: u64,
    /// The host's EL1/EL0/GIC/timer registers while a REC's are loaded.
    pub(crate) host: [u64; HOST_REGISTERS],
    /// The host's breakpoints and watchpoints while a REC's are loaded.
    pub(crate) debug: [u64; DEBUG_REGISTERS],
    /// The host's claim tags with `debug`.
    pub(crate) claim: u64,
    /// The host's performance monitors.
    pub(crate) pmu: HostPmu,
    /// A REC is loaded.
    pub(crate) loaded: bool,
    /// The REC's vector registers are loaded.
    pub(crate) fp_loaded: bool,
    /// They include SVE's.
    pub(crate) sve_loaded: bool,
    /// The REC's debug registers are loaded.
    pub(crate) debug_loaded: bool,
    /// The REC has not run since it was loaded.
    pub(crate) fresh: bool,
}

/// Bytes of a slot that are mapped for [`PerCpu`].
pub(crate) const DATA_SIZE: u64 = 0x6000;

const _: () = assert!(size_of::<PerCpu>() as u64 <= DATA_SIZE);
const _: () = assert!(DATA_SIZE + 4096 <= SLOT_SIZE - STACK_SIZE, "the stack has a guard below it");

/// Where the data of `cpu` is.
fn slot(cpu: u64) -> u64 {
    let state = boot_state();
    debug_assert!(cpu < state.cpus);
    state.slots + cpu * SLOT_SIZE
}

/// This CPU's data. The reference must not be kept across a call that takes another one.
#[inline]
pub(crate) fn this() -> &'static mut PerCpu {
    // SAFETY: `TPIDR_EL2` was set by `init` to this CPU's slot, which is mapped, zeroed at boot and used by no
    // other CPU; interrupts are masked, and callers keep the reference within one function of the platform.
    unsafe { &mut *(read_reg!("tpidr_el2") as *mut PerCpu) }
}

/// Points this CPU at its slot.
pub(crate) fn init(cpu: u64) {
    // SAFETY: TPIDR_EL2 is only used by `this`.
    unsafe {
        core::arch::asm!("msr tpidr_el2, {}", in(reg) slot(cpu), options(nostack, preserves_flags));
    }
    let this = this();
    this.loaded = false;
    this.fp_loaded = false;
    this.sve_loaded = false;
    this.debug_loaded = false;
    this.pmu.loaded = false;
}
