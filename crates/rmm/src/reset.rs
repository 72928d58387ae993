//! The state in which a REC starts, and the EL2 controls under which it runs.

use crate::context::{RecContext, word};

/// PSTATE: EL1h, D, A, I, F masked.
pub(crate) const PSTATE: u64 = 0x3C5;
/// SCTLR_EL1: SPAN, EIS, nTWE, nTWI, EOS, nAA, CP15BEN, SA0, SA; MMU and caches off.
pub(crate) const SCTLR_EL1: u64 = 0xC5_0878;
/// SCTLR_EL1.EE.
pub(crate) const SCTLR_EE: u64 = 1 << 25;

/// HCR_EL2: FWB, API, APK, TEA, TLOR, E2H, RW, TIDCP, TSC, TID3, BSU inner shareable, FB, AMO, IMO, FMO, PTW, SWIO,
/// VM.
pub(crate) const HCR_EL2: u64 = 0x432C_801C_063F;
/// HCR_EL2.TWI.
pub(crate) const HCR_TWI: u64 = 1 << 13;
/// HCR_EL2.TWE.
pub(crate) const HCR_TWE: u64 = 1 << 14;
/// HCR_EL2.VSE.
pub(crate) const HCR_VSE: u64 = 1 << 8;

/// CNTHCTL_EL2 (E2H layout): EL1PCTEN, EL1PTEN: the Realm's timers are untrapped.
pub(crate) const CNTHCTL_EL2: u64 = 1 << 10 | 1 << 11;
/// CNTHCTL_EL2.CNTVMASK.
pub(crate) const CNTVMASK: u64 = 1 << 18;
/// CNTHCTL_EL2.CNTPMASK.
pub(crate) const CNTPMASK: u64 = 1 << 19;

/// MDCR_EL2.TDA: debug registers trap until they are loaded.
pub(crate) const MDCR_TDA: u64 = 1 << 9;
/// MDCR_EL2: HCCD, HPMD: nothing is counted at EL2; TTRF, TPMS, TPM, TPMCR: no trace filter, no profiling, no PMU.
const MDCR_BASE: u64 = 1 << 23 | 1 << 19 | 1 << 17 | 1 << 14 | 1 << 6 | 1 << 5;

/// MDSCR_EL1.TDCC.
const MDSCR_EL1: u64 = 1 << 12;

/// Fills a zeroed context.
pub(crate) fn context(ctx: &RecContext<'_>) {
    ctx.set(word::PSTATE, PSTATE);
    ctx.set(word::SCTLR_EL1, SCTLR_EL1);
    ctx.set(word::MDSCR_EL1, MDSCR_EL1);
    ctx.set(word::HCR_EL2, HCR_EL2);
    ctx.set(word::CNTHCTL_EL2, CNTHCTL_EL2);
    ctx.set(word::MDCR_EL2, MDCR_BASE | MDCR_TDA);
}

/// `MDCR_EL2` with or without the debug trap.
pub(crate) fn mdcr(trap_debug: bool) -> u64 {
    MDCR_BASE | if trap_debug { MDCR_TDA } else { 0 }
}
