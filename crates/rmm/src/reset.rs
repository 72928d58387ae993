//! The state in which a REC starts, and the EL2 controls under which it runs.

use crate::aux;
use crate::context::{RecContext, word};
use crate::realm::Realm;
use crate::rec::Rec;

/// PSTATE: EL1h, D, A, I, F masked.
pub(crate) const PSTATE: u64 = 0x3C5;
/// SCTLR_EL1: SPAN, EIS, nTWE, nTWI, EOS, nAA, CP15BEN, SA0, SA; MMU and caches off.
pub(crate) const SCTLR_EL1: u64 = 0xC5_0878;
/// SCTLR_EL1.EE.
pub(crate) const SCTLR_EE: u64 = 1 << 25;

/// HCR_EL2: TID5, FWB, API, APK, TEA, TERR, TLOR, E2H, RW, TIDCP, TSC, TID3, BSU inner shareable, FB, AMO, IMO, FMO, PTW,
/// SWIO, VM.
pub(crate) const HCR_EL2: u64 = 0x0400_433C_801C_063F;
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
/// MDCR_EL2: TPM and TPMCR: the performance monitors trap until they are loaded.
pub(crate) const MDCR_TPM: u64 = 1 << 6 | 1 << 5;
/// MDCR_EL2: TDCC: there is no debug communication channel; HCCD, HPMD: nothing is counted at EL2; TTRF, TPMS: no
/// trace filter, no profiling. HPME is clear: counters that are not the Realm's stand still.
const MDCR_BASE: u64 = 1 << 27 | 1 << 23 | 1 << 19 | 1 << 17 | 1 << 14;

/// MDSCR_EL1.TDCC.
const MDSCR_EL1: u64 = 1 << 12;
/// PMCR_EL0: LC, DP.
const PMCR: u64 = 1 << 6 | 1 << 5;
/// PMUSERENR_EL0.EN: without a PMU, an access by EL0 is the RMM's to answer, not EL1's.
const PMUSERENR_EN: u64 = 1;

/// Fills a zeroed context of `rec`.
pub(crate) fn context(ctx: &RecContext<'_>, realm: Realm<'_>, rec: Rec<'_>) {
    let stage2 = realm.stage2();
    ctx.set(word::PSTATE, PSTATE);
    ctx.set(word::SCTLR_EL1, SCTLR_EL1);
    ctx.set(word::MDSCR_EL1, MDSCR_EL1);
    ctx.set(word::HCR_EL2, HCR_EL2);
    ctx.set(word::CNTHCTL_EL2, CNTHCTL_EL2);
    ctx.set(word::VTCR_EL2, stage2.vtcr);
    ctx.set(word::VTTBR_EL2, stage2.vttbr);
    ctx.set(word::VMPIDR_EL2, rec.mpidr());
    if realm.pmu_counters().is_some() {
        ctx.set(word::PMCR, PMCR);
    } else {
        ctx.set(word::PMUSERENR, PMUSERENR_EN);
    }
    if let Some(zcr) = realm.zcr() {
        let low = rec.aux(aux::VECTORS);
        let both = realm.aux_count() == aux::count(Some(0));
        ctx.set(word::ZCR_EL2, zcr);
        ctx.set(word::SVE_Z, low);
        ctx.set(word::SVE_Z_HIGH, if both { low | aux::HALF } else { rec.aux(aux::MORE_VECTORS) });
    }
}

/// `MDCR_EL2` with the given traps, for a REC with `counters` event counters (HPMN).
pub(crate) fn mdcr(traps: u64, counters: u64) -> u64 {
    MDCR_BASE | traps | counters
}
