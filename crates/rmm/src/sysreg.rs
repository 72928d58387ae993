//! Trapped system registers: ID registers, what the host emulates, debug registers; the rest is undefined.

use cca_abi::rmi::ExitReason;

use crate::Rmm;
use crate::config::field;
use crate::context::word;
use crate::platform::{IdRegisters, Platform};
use crate::realm::Realm;
use crate::reset;
use crate::run::{Flow, Run};

/// A trapped access (ISS of exception class 0x18).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Access {
    op0: u64,
    op1: u64,
    crn: u64,
    crm: u64,
    op2: u64,
    rt: usize,
    read: bool,
}

impl Access {
    fn parse(esr: u64) -> Self {
        Self {
            op0: field(esr, 20, 2),
            op1: field(esr, 14, 3),
            crn: field(esr, 10, 4),
            crm: field(esr, 1, 4),
            op2: field(esr, 17, 3),
            // Five bits.
            rt: field(esr, 5, 5) as usize,
            read: esr & 1 != 0,
        }
    }

    /// ID_AA64* and the AArch32 and reserved registers around them.
    fn is_id_register(&self) -> bool {
        self.read && (self.op0, self.op1, self.crn) == (3, 0, 0) && self.crm >= 1
    }

    /// ICC_DIR_EL1, ICC_SGI1R_EL1, ICC_ASGI1R_EL1, ICC_SGI0R_EL1: writes that the host completes.
    fn is_forwarded(&self) -> bool {
        !self.read
            && (self.op0, self.op1, self.crn, self.crm) == (3, 0, 12, 11)
            && matches!(self.op2, 1 | 5 | 6 | 7)
    }

    fn is_debug_register(&self) -> bool {
        self.op0 == 2 && (self.op1 == 0 || self.op1 == 3)
    }

    /// PMCR_EL0 … PMOVSSET_EL0, PMINTENSET_EL1 … PMMIR_EL1, PMEVCNTRn_EL0 … PMCCFILTR_EL0.
    fn is_pmu_register(&self) -> bool {
        matches!(
            (self.op0, self.op1, self.crn, self.crm),
            (3, 3, 9, 12..=14) | (3, 0, 9, 14) | (3, 3, 14, 8..=15)
        )
    }

    /// What exists in every CPU but is nothing in a Realm: it reads as zero, and writes are ignored.
    fn is_nothing(&self) -> bool {
        match (self.op0, self.op1, self.crn, self.crm, self.op2) {
            // The debug communication channel, which an external debugger would be at the other end of: OSDTRRX_EL1,
            // OSDTRTX_EL1, MDCCSR_EL0, DBGDTR_EL0, DBGDTRRX_EL0 and DBGDTRTX_EL0; its OSECCR_EL1 and DBGPRCR_EL1.
            (2, 0, 0, 0 | 3 | 6, 2) | (2, 3, 0, 1 | 4 | 5, 0) | (2, 0, 1, 4, 4) => true,
            // RAS error records: ERRIDR_EL1 says that there are none; ERRSELR_EL1 and ERX*_EL1 select none.
            (3, 0, 5, 3..=5, _) => true,
            _ => false,
        }
    }

    /// MDCCINT_EL1: the interrupts of the channel that there is not.
    fn is_mdccint(&self) -> bool {
        (self.op0, self.op1, self.crn, self.crm, self.op2) == (2, 0, 0, 2, 0)
    }
}

impl<P: Platform> Rmm<'_, P> {
    /// A trapped MSR, MRS or system instruction.
    pub(crate) fn system_register(&self, run: &mut Run<'_>, esr: u64) -> Flow {
        let access = Access::parse(esr);
        if access.is_id_register() {
            let value = id_register(&self.platform.facts().id, run.realm, access.crm, access.op2);
            return emulated(run, &access, value);
        }
        if access.is_forwarded() {
            run.exit.esr = esr;
            run.exit.gprs[0] = run.ctx.gpr(access.rt);
            run.ctx.advance_pc();
            return run.leave(ExitReason::Sync);
        }
        if access.is_nothing() {
            return emulated(run, &access, 0);
        }
        if access.is_mdccint() {
            if !access.read {
                run.ctx.set(word::MDCCINT_EL1, run.ctx.gpr(access.rt) & MDCCINT);
            }
            return emulated(run, &access, run.ctx.get(word::MDCCINT_EL1));
        }
        let mdcr = run.ctx.get(word::MDCR_EL2);
        if access.is_debug_register() && mdcr & reset::MDCR_TDA != 0 {
            // From now to the end of this entry the Realm has the real registers.
            self.platform.debug_load(run.cpu, &run.ctx);
            run.ctx.set(word::MDCR_EL2, mdcr & !reset::MDCR_TDA);
            return Flow::Resume;
        }
        if access.is_pmu_register() && mdcr & reset::MDCR_TPM != 0 && run.realm.pmu_counters().is_some() {
            self.platform.pmu_load(run.cpu, &run.ctx);
            run.ctx.set(word::MDCR_EL2, mdcr & !reset::MDCR_TPM);
            return Flow::Resume;
        }
        self.undefined(run)
    }
}

/// MDCCINT_EL1.RX and TX.
const MDCCINT: u64 = 3 << 29;

/// Skips the access, after a read with `value`.
fn emulated(run: &Run<'_>, access: &Access, value: u64) -> Flow {
    if access.read {
        run.ctx.set_gpr(access.rt, value);
    }
    run.ctx.advance_pc();
    Flow::Resume
}

/// Clears the four-bit fields at the given shifts.
const fn without<const N: usize>(value: u64, shifts: [u32; N]) -> u64 {
    let mut value = value;
    let mut n = 0;
    while n < N {
        value &= !(0xF << shifts[n]);
        n += 1;
    }
    value
}

/// What a Realm reads from the ID register at (3, 0, 0, `crm`, `op2`).
///
/// Hidden because the RMM does not switch or does not offer them: SME, MTE, AMU, MPAM, RME, NMI, GCS and later
/// PFR1 fields, trace, profiling, branch records, nested virtualization, LS64, SCXTNUM, ordering regions; SVE and PMU
/// unless the Realm has them. Registers that are not listed read as zero, which says "not implemented" throughout
/// (ISAR2 and MMFR3 among them).
fn id_register(id: &IdRegisters, realm: Realm<'_>, crm: u64, op2: u64) -> u64 {
    match (crm, op2) {
        // PFR0 without SVE, MPAM, AMU, RME; CSV2 at most 1, because SCXTNUM_ELx trap; EL1 at most 1: no AArch32.
        (4, 0) => {
            let csv2 = field(id.id_aa64pfr0, 56, 4).min(1);
            let el1 = field(id.id_aa64pfr0, 4, 4).min(1);
            let sve = if realm.zcr().is_some() { id.id_aa64pfr0 & 0xF << 32 } else { 0 };
            without(id.id_aa64pfr0, [4, 32, 40, 44, 52, 56]) | csv2 << 56 | el1 << 4 | sve
        }
        // PFR1 without MTE, MPAM_frac, SME, RNDR_trap, CSV2_frac, NMI, MTE_frac, GCS, THE, MTEX, DF2, PFAR.
        (4, 1) => without(id.id_aa64pfr1, [8, 16, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60]),
        (4, 4) if realm.zcr().is_some() => id.id_aa64zfr0,
        (5, 0) => debug_features(id, realm),
        (5, 4) => id.id_aa64afr0,
        (5, 5) => id.id_aa64afr1,
        (6, 0) => id.id_aa64isar0,
        // ISAR1 without LS64.
        (6, 1) => without(id.id_aa64isar1, [60]),
        (7, 0) => memory_features(id.id_aa64mmfr0, realm.has_lpa2()),
        // MMFR1 without LO: the registers of limited ordering regions trap.
        (7, 1) => without(id.id_aa64mmfr1, [16]),
        // MMFR2 without NV.
        (7, 2) => without(id.id_aa64mmfr2, [24]),
        _ => 0,
    }
}

/// DFR0: the debug architecture, with the Realm's numbers of breakpoints and watchpoints, and its PMU.
fn debug_features(id: &IdRegisters, realm: Realm<'_>) -> u64 {
    let (num_bps, num_wps) = realm.debug_resources();
    let debug_version = field(id.id_aa64dfr0, 0, 4);
    let double_lock = id.id_aa64dfr0 & 0xF << 36;
    // PMUv3p9 has registers that are not switched.
    let pmu = if realm.pmu_counters().is_some() { field(id.id_aa64dfr0, 8, 4).min(8) } else { 0 };
    debug_version | pmu << 8 | num_bps << 12 | num_wps << 20 | double_lock
}

/// MMFR0. Where the Realm's IPAs are not those of LPA2, its own tables are not either, and a physical address has 48 bits
/// at most.
fn memory_features(mmfr0: u64, lpa2: bool) -> u64 {
    if lpa2 {
        return mmfr0;
    }
    let at_most = |shift: u32, most: u64| field(mmfr0, shift, 4).min(most) << shift;
    // TGran4: 0 and 1 (52 bits), 15 none; TGran4_2: 0 as stage 1, 1 none, 2, 3 (52 bits); TGran16 and TGran16_2: 2 and
    // 3 are the ones with 52 bits.
    let tgran4 = if field(mmfr0, 28, 4) == 1 { 0 } else { mmfr0 & 0xF << 28 };
    without(mmfr0, [0, 20, 28, 32, 40])
        | at_most(0, 5)
        | at_most(20, 1)
        | tgran4
        | at_most(32, 2)
        | at_most(40, 2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_platform::new_page;

    #[test]
    fn accesses_are_decoded() {
        // MSR ICC_SGI1R_EL1, X3
        let esr = 0x18 << 26 | 3 << 20 | 5 << 17 | 12 << 10 | 3 << 5 | 11 << 1;
        let access = Access::parse(esr);
        assert!(access.is_forwarded() && !access.is_id_register());
        assert_eq!(access.rt, 3);
        // MRS X0, ID_AA64PFR0_EL1
        assert!(Access::parse(0x18 << 26 | 3 << 20 | 4 << 1 | 1).is_id_register());
        // A read of a write-only register is not forwarded.
        assert!(!Access::parse(esr | 1).is_forwarded());
    }

    #[test]
    fn features_that_are_not_switched_are_hidden() {
        let page = new_page();
        let realm = Realm::new(&page);
        let all = IdRegisters {
            id_aa64pfr0: u64::MAX,
            id_aa64pfr1: u64::MAX,
            id_aa64zfr0: u64::MAX,
            id_aa64dfr0: u64::MAX,
            id_aa64mmfr1: u64::MAX,
            ..IdRegisters::default()
        };
        assert_eq!(id_register(&all, realm, 4, 0), 0xF10F_00F0_FFFF_FF1F);
        assert_eq!(field(id_register(&all, realm, 4, 1), 24, 4), 0);
        assert_eq!(id_register(&all, realm, 4, 4), 0, "no SVE");
        assert_eq!(field(id_register(&all, realm, 5, 0), 8, 4), 0, "no PMU");
        assert_eq!(field(id_register(&all, realm, 7, 1), 16, 4), 0, "no ordering regions");
        assert_eq!(id_register(&all, realm, 6, 2), 0);
        assert_eq!(id_register(&all, realm, 1, 0), 0);
    }

    #[test]
    fn physical_addresses_are_long_with_lpa2_only() {
        // PARange 52 bits; TGran16 and TGran4 with 52 bits; the same three at stage 2.
        let mmfr0 = 0x2100_0333_1020_1126;
        assert_eq!(memory_features(mmfr0, true), mmfr0);
        assert_eq!(memory_features(mmfr0, false), 0x2100_0232_0010_1125);
        // No 4 KiB pages: stays so.
        assert_eq!(memory_features(0xF << 28 | 5, false), 0xF << 28 | 5);
    }
}
