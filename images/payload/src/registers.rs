//! Every register that a host has at EL2, EL1 and EL0, except those that hold its program: what it writes there must be
//! there after each call.

use core::arch::asm;

use crate::check;

/// All bits: hardware keeps those that exist.
const FULL: u64 = u64::MAX;
/// All but E2H and TGE, which change what EL2 itself is, and RW.
const HCR: u64 = !(1 << 34 | 1 << 27 | 1 << 31);
/// All but the number of counters.
const MDCR: u64 = !0x1F;
/// ENABLE and IMASK of a timer.
const TIMER: u64 = 3;
/// TCPAC, TAM, TTA: nothing that this program uses.
const CPTR: u64 = 1 << 31 | 1 << 30 | 1 << 20;

/// Number of registers in the table below.
const COUNT: usize = NAMES.len();

/// Values of all registers; zero where the CPU has none.
pub(crate) type Values = [u64; COUNT];

/// An ID register's field of four bits.
fn field(value: u64, low: u32) -> u64 {
    value >> low & 0xF
}

macro_rules! id {
    ($encoding:literal) => {{
        let value: u64;
        // SAFETY: an ID register.
        unsafe { asm!(concat!("mrs {}, ", $encoding), out(reg) value, options(nomem, nostack)) };
        value
    }};
}

/// What the CPU has.
#[derive(Clone, Copy)]
pub(crate) struct Features {
    always: bool,
    pauth: bool,
    vhe: bool,
    six_breakpoints: bool,
    four_watchpoints: bool,
    pmu: bool,
    ras: bool,
    fgt: bool,
    fgt2: bool,
    ecv2: bool,
    hcx: bool,
    nv2: bool,
    csv2_2: bool,
    pub(crate) sve: bool,
    pub(crate) sme: bool,
    /// SMFR0.FA64: all of SVE also in streaming mode.
    pub(crate) fa64: bool,
    /// SME2 has a register more.
    pub(crate) sme2: bool,
    mte2: bool,
    tcr2: bool,
    sctlr2: bool,
    s1pie: bool,
    s2pie: bool,
    s1poe: bool,
    aie: bool,
    gcs: bool,
    mpam: bool,
    trf: bool,
    fpmr: bool,
    dit: bool,
    ssbs: bool,
    pan: bool,
    uao: bool,
    nmi: bool,
}

impl Features {
    pub(crate) fn read() -> Self {
        let (pfr0, pfr1, pfr2) = (id!("S3_0_C0_C4_0"), id!("S3_0_C0_C4_1"), id!("S3_0_C0_C4_2"));
        let (mmfr0, mmfr1, mmfr2) = (id!("S3_0_C0_C7_0"), id!("S3_0_C0_C7_1"), id!("S3_0_C0_C7_2"));
        let (mmfr3, dfr0) = (id!("S3_0_C0_C7_3"), id!("S3_0_C0_C5_0"));
        let (isar1, isar2) = (id!("S3_0_C0_C6_1"), id!("S3_0_C0_C6_2"));
        let sme = field(pfr1, 24) != 0;
        let smfr0 = if sme { id!("S3_0_C0_C4_5") } else { 0 };
        Self {
            always: true,
            pauth: field(isar1, 4) | field(isar1, 8) | field(isar2, 12) != 0,
            vhe: field(mmfr1, 8) != 0,
            six_breakpoints: field(dfr0, 12) == 5,
            four_watchpoints: field(dfr0, 20) == 3,
            pmu: !matches!(field(dfr0, 8), 0 | 0xF),
            ras: field(pfr0, 28) != 0,
            fgt: field(mmfr0, 56) != 0,
            fgt2: field(mmfr0, 56) >= 2,
            ecv2: field(mmfr0, 60) >= 2,
            hcx: field(mmfr1, 40) != 0,
            nv2: field(mmfr2, 24) >= 2,
            csv2_2: field(pfr0, 56) >= 2,
            sve: field(pfr0, 32) != 0,
            sme,
            fa64: smfr0 >> 63 != 0,
            sme2: field(pfr1, 24) >= 2,
            mte2: field(pfr1, 8) >= 2,
            tcr2: field(mmfr3, 0) != 0,
            sctlr2: field(mmfr3, 4) != 0,
            s1pie: field(mmfr3, 8) != 0,
            s2pie: field(mmfr3, 12) != 0,
            s1poe: field(mmfr3, 16) != 0,
            aie: field(mmfr3, 24) != 0,
            gcs: field(pfr1, 44) != 0,
            mpam: field(pfr0, 40) | field(pfr1, 16) != 0,
            trf: field(dfr0, 40) != 0,
            fpmr: field(pfr2, 32) != 0,
            dit: field(pfr0, 48) != 0,
            ssbs: field(pfr1, 4) >= 2,
            pan: field(mmfr1, 20) != 0,
            uao: field(mmfr2, 4) != 0,
            nmi: field(pfr1, 36) != 0,
        }
    }
}

/// Calls a macro with all registers: name, encoding, bits that may be changed, feature.
macro_rules! registers {
    ($do:ident) => {
        $do! {
            // EL1 and EL0: always there
            SP_EL0 S3_0_C4_C1_0 FULL always
            SP_EL1 S3_4_C4_C1_0 FULL always
            ELR_EL1 S3_0_C4_C0_1 FULL always
            SPSR_EL1 S3_0_C4_C0_0 FULL always
            SCTLR_EL1 S3_0_C1_C0_0 FULL always
            ACTLR_EL1 S3_0_C1_C0_1 FULL always
            CPACR_EL1 S3_0_C1_C0_2 FULL always
            TTBR0_EL1 S3_0_C2_C0_0 FULL always
            TTBR1_EL1 S3_0_C2_C0_1 FULL always
            TCR_EL1 S3_0_C2_C0_2 FULL always
            ESR_EL1 S3_0_C5_C2_0 FULL always
            AFSR0_EL1 S3_0_C5_C1_0 FULL always
            AFSR1_EL1 S3_0_C5_C1_1 FULL always
            FAR_EL1 S3_0_C6_C0_0 FULL always
            PAR_EL1 S3_0_C7_C4_0 FULL always
            MAIR_EL1 S3_0_C10_C2_0 FULL always
            AMAIR_EL1 S3_0_C10_C3_0 FULL always
            VBAR_EL1 S3_0_C12_C0_0 FULL always
            CONTEXTIDR_EL1 S3_0_C13_C0_1 FULL always
            TPIDR_EL1 S3_0_C13_C0_4 FULL always
            TPIDR_EL0 S3_3_C13_C0_2 FULL always
            TPIDRRO_EL0 S3_3_C13_C0_3 FULL always
            CNTKCTL_EL1 S3_0_C14_C1_0 FULL always
            CSSELR_EL1 S3_2_C0_C0_0 0xF always
            MDSCR_EL1 S2_0_C0_C2_2 0xB000 always
            MDCCINT_EL1 S2_0_C0_C2_0 FULL always
            OSLSR_EL1 S2_0_C1_C1_4 0 always
            OSDLR_EL1 S2_0_C1_C3_4 0 always
            // Pointer authentication keys
            APIAKeyLo_EL1 S3_0_C2_C1_0 FULL pauth
            APIAKeyHi_EL1 S3_0_C2_C1_1 FULL pauth
            APIBKeyLo_EL1 S3_0_C2_C1_2 FULL pauth
            APIBKeyHi_EL1 S3_0_C2_C1_3 FULL pauth
            APDAKeyLo_EL1 S3_0_C2_C2_0 FULL pauth
            APDAKeyHi_EL1 S3_0_C2_C2_1 FULL pauth
            APDBKeyLo_EL1 S3_0_C2_C2_2 FULL pauth
            APDBKeyHi_EL1 S3_0_C2_C2_3 FULL pauth
            APGAKeyLo_EL1 S3_0_C2_C3_0 FULL pauth
            APGAKeyHi_EL1 S3_0_C2_C3_1 FULL pauth
            // Timers: not ISTATUS
            CNTP_CVAL_EL0 S3_3_C14_C2_2 FULL always
            CNTP_CTL_EL0 S3_3_C14_C2_1 TIMER always
            CNTV_CVAL_EL0 S3_3_C14_C3_2 FULL always
            CNTV_CTL_EL0 S3_3_C14_C3_1 TIMER always
            CNTHP_CVAL_EL2 S3_4_C14_C2_2 FULL always
            CNTHP_CTL_EL2 S3_4_C14_C2_1 TIMER always
            CNTHV_CVAL_EL2 S3_4_C14_C3_2 FULL vhe
            CNTHV_CTL_EL2 S3_4_C14_C3_1 TIMER vhe
            // Breakpoints and watchpoints of EL1 and EL0
            DBGBVR0_EL1 S2_0_C0_C0_4 FULL always
            DBGBCR0_EL1 S2_0_C0_C0_5 0x1E7 always
            DBGBVR1_EL1 S2_0_C0_C1_4 FULL always
            DBGBCR1_EL1 S2_0_C0_C1_5 0x1E7 always
            DBGBVR5_EL1 S2_0_C0_C5_4 FULL six_breakpoints
            DBGBCR5_EL1 S2_0_C0_C5_5 0x1E7 six_breakpoints
            DBGWVR0_EL1 S2_0_C0_C0_6 FULL always
            DBGWCR0_EL1 S2_0_C0_C0_7 0x1FFF always
            DBGWVR1_EL1 S2_0_C0_C1_6 FULL always
            DBGWCR1_EL1 S2_0_C0_C1_7 0x1FFF always
            DBGWVR3_EL1 S2_0_C0_C3_6 FULL four_watchpoints
            DBGWCR3_EL1 S2_0_C0_C3_7 0x1FFF four_watchpoints
            // Performance counters, which stand still
            PMCR_EL0 S3_3_C9_C12_0 0xE8 pmu
            PMSELR_EL0 S3_3_C9_C12_5 0x1F pmu
            PMUSERENR_EL0 S3_3_C9_C14_0 FULL pmu
            PMCCNTR_EL0 S3_3_C9_C13_0 FULL pmu
            PMCCFILTR_EL0 S3_3_C14_C15_7 0xFC00_0000 pmu
            PMCNTENSET_EL0 S3_3_C9_C12_1 FULL pmu
            PMINTENSET_EL1 S3_0_C9_C14_1 FULL pmu
            PMOVSSET_EL0 S3_3_C9_C14_3 FULL pmu
            PMEVCNTR0_EL0 S3_3_C14_C8_0 FULL pmu
            PMEVTYPER0_EL0 S3_3_C14_C12_0 FULL pmu
            PMEVCNTR1_EL0 S3_3_C14_C8_1 FULL pmu
            PMEVTYPER1_EL0 S3_3_C14_C12_1 FULL pmu
            // Interrupt controller: CPU and virtual interface
            ICC_PMR_EL1 S3_0_C4_C6_0 0xF8 always
            ICC_BPR1_EL1 S3_0_C12_C12_3 7 always
            ICC_CTLR_EL1 S3_0_C12_C12_4 0x43 always
            ICC_SRE_EL1 S3_0_C12_C12_5 0 always
            ICC_IGRPEN1_EL1 S3_0_C12_C12_7 1 always
            ICC_AP1R0_EL1 S3_0_C12_C9_0 FULL always
            ICC_SRE_EL2 S3_4_C12_C9_5 0 always
            ICH_HCR_EL2 S3_4_C12_C11_0 0x7CFF always
            ICH_VMCR_EL2 S3_4_C12_C11_7 FULL always
            ICH_AP0R0_EL2 S3_4_C12_C8_0 FULL always
            ICH_AP1R0_EL2 S3_4_C12_C9_0 FULL always
            ICH_LR0_EL2 S3_4_C12_C12_0 FULL always
            ICH_LR1_EL2 S3_4_C12_C12_1 FULL always
            ICH_LR2_EL2 S3_4_C12_C12_2 FULL always
            ICH_LR3_EL2 S3_4_C12_C12_3 FULL always
            // EL2
            ACTLR_EL2 S3_4_C1_C0_1 FULL always
            SCTLR_EL2 S3_4_C1_C0_0 0 always
            HCR_EL2 S3_4_C1_C1_0 HCR always
            MDCR_EL2 S3_4_C1_C1_1 MDCR always
            CPTR_EL2 S3_4_C1_C1_2 CPTR always
            HSTR_EL2 S3_4_C1_C1_3 FULL always
            HACR_EL2 S3_4_C1_C1_7 FULL always
            TTBR0_EL2 S3_4_C2_C0_0 FULL always
            TTBR1_EL2 S3_4_C2_C0_1 FULL vhe
            TCR_EL2 S3_4_C2_C0_2 FULL always
            VTTBR_EL2 S3_4_C2_C1_0 FULL always
            VTCR_EL2 S3_4_C2_C1_2 FULL always
            SPSR_EL2 S3_4_C4_C0_0 FULL always
            ELR_EL2 S3_4_C4_C0_1 FULL always
            AFSR0_EL2 S3_4_C5_C1_0 FULL always
            AFSR1_EL2 S3_4_C5_C1_1 FULL always
            ESR_EL2 S3_4_C5_C2_0 FULL always
            FAR_EL2 S3_4_C6_C0_0 FULL always
            HPFAR_EL2 S3_4_C6_C0_4 FULL always
            MAIR_EL2 S3_4_C10_C2_0 FULL always
            AMAIR_EL2 S3_4_C10_C3_0 FULL always
            VBAR_EL2 S3_4_C12_C0_0 0 always
            CONTEXTIDR_EL2 S3_4_C13_C0_1 FULL vhe
            TPIDR_EL2 S3_4_C13_C0_2 FULL always
            CNTVOFF_EL2 S3_4_C14_C0_3 FULL always
            CNTHCTL_EL2 S3_4_C14_C1_0 FULL always
            VPIDR_EL2 S3_4_C0_C0_0 FULL always
            VMPIDR_EL2 S3_4_C0_C0_5 FULL always
            VDISR_EL2 S3_4_C12_C1_1 FULL ras
            VSESR_EL2 S3_4_C5_C2_3 FULL ras
            HFGRTR_EL2 S3_4_C1_C1_4 FULL fgt
            HFGWTR_EL2 S3_4_C1_C1_5 FULL fgt
            HFGITR_EL2 S3_4_C1_C1_6 FULL fgt
            HDFGRTR_EL2 S3_4_C3_C1_4 FULL fgt
            HDFGWTR_EL2 S3_4_C3_C1_5 FULL fgt
            CNTPOFF_EL2 S3_4_C14_C0_6 FULL ecv2
            HCRX_EL2 S3_4_C1_C2_2 FULL hcx
            VNCR_EL2 S3_4_C2_C2_0 FULL nv2
            SCXTNUM_EL0 S3_3_C13_C0_7 FULL csv2_2
            SCXTNUM_EL1 S3_0_C13_C0_7 FULL csv2_2
            SCXTNUM_EL2 S3_4_C13_C0_7 FULL csv2_2
            // Only some CPUs have these
            ZCR_EL1 S3_0_C1_C2_0 FULL sve
            ZCR_EL2 S3_4_C1_C2_0 FULL sve
            SMCR_EL1 S3_0_C1_C2_6 FULL sme
            SMCR_EL2 S3_4_C1_C2_6 FULL sme
            TPIDR2_EL0 S3_3_C13_C0_5 FULL sme
            SMPRI_EL1 S3_0_C1_C2_4 FULL sme
            SMPRIMAP_EL2 S3_4_C1_C2_5 FULL sme
            TFSR_EL1 S3_0_C5_C6_0 FULL mte2
            TFSRE0_EL1 S3_0_C5_C6_1 FULL mte2
            TFSR_EL2 S3_4_C5_C6_0 FULL mte2
            RGSR_EL1 S3_0_C1_C0_5 FULL mte2
            GCR_EL1 S3_0_C1_C0_6 FULL mte2
            HFGRTR2_EL2 S3_4_C3_C1_2 FULL fgt2
            HFGWTR2_EL2 S3_4_C3_C1_3 FULL fgt2
            HFGITR2_EL2 S3_4_C3_C1_7 FULL fgt2
            HDFGRTR2_EL2 S3_4_C3_C1_0 FULL fgt2
            HDFGWTR2_EL2 S3_4_C3_C1_1 FULL fgt2
            TCR2_EL1 S3_0_C2_C0_3 FULL tcr2
            TCR2_EL2 S3_4_C2_C0_3 FULL tcr2
            SCTLR2_EL1 S3_0_C1_C0_3 FULL sctlr2
            SCTLR2_EL2 S3_4_C1_C0_3 FULL sctlr2
            PIRE0_EL1 S3_0_C10_C2_2 FULL s1pie
            PIR_EL1 S3_0_C10_C2_3 FULL s1pie
            PIRE0_EL2 S3_4_C10_C2_2 FULL s1pie
            PIR_EL2 S3_4_C10_C2_3 FULL s1pie
            S2PIR_EL2 S3_4_C10_C2_5 FULL s2pie
            POR_EL0 S3_3_C10_C2_4 FULL s1poe
            POR_EL1 S3_0_C10_C2_4 FULL s1poe
            POR_EL2 S3_4_C10_C2_4 FULL s1poe
            MAIR2_EL1 S3_0_C10_C2_1 FULL aie
            AMAIR2_EL1 S3_0_C10_C3_1 FULL aie
            MAIR2_EL2 S3_4_C10_C1_1 FULL aie
            AMAIR2_EL2 S3_4_C10_C3_1 FULL aie
            GCSCR_EL1 S3_0_C2_C5_0 FULL gcs
            GCSPR_EL1 S3_0_C2_C5_1 FULL gcs
            GCSCRE0_EL1 S3_0_C2_C5_2 FULL gcs
            GCSPR_EL0 S3_3_C2_C5_1 FULL gcs
            GCSCR_EL2 S3_4_C2_C5_0 0x40 gcs
            GCSPR_EL2 S3_4_C2_C5_1 FULL gcs
            MPAM0_EL1 S3_0_C10_C5_1 FULL mpam
            MPAM1_EL1 S3_0_C10_C5_0 FULL mpam
            MPAM2_EL2 S3_4_C10_C5_0 0xFFFF_FFFF mpam
            MPAMHCR_EL2 S3_4_C10_C4_0 FULL mpam
            TRFCR_EL1 S3_0_C1_C2_1 FULL trf
            TRFCR_EL2 S3_4_C1_C2_1 FULL trf
            FPCR S3_3_C4_C4_0 FULL always
            FPSR S3_3_C4_C4_1 FULL always
            FPMR S3_3_C4_C4_2 FULL fpmr
            // What a CPU does by the way: its process state
            DIT S3_3_C4_C2_5 FULL dit
            SSBS S3_3_C4_C2_6 FULL ssbs
            PAN S3_0_C4_C2_3 FULL pan
            UAO S3_0_C4_C2_4 FULL uao
            TCO S3_3_C4_C2_7 FULL mte2
            ALLINT S3_0_C4_C3_0 FULL nmi
            DAIF S3_3_C4_C2_1 0 always
        }
    };
}

macro_rules! names {
    ($($name:ident $encoding:ident $mask:tt $feature:ident)*) => { &[$(stringify!($name)),*] };
}
const NAMES: &[&str] = registers!(names);

/// Reads all of them.
pub(crate) fn read(features: &Features) -> Values {
    let mut values = [0; COUNT];
    let mut slots = values.iter_mut();
    macro_rules! see {
        ($($name:ident $encoding:ident $mask:tt $feature:ident)*) => {$(
            if let (Some(slot), true) = (slots.next(), features.$feature) {
                // SAFETY: reads a register that is there.
                unsafe { asm!(concat!("mrs {}, ", stringify!($encoding)), out(reg) *slot, options(nostack)) };
                // A timer's status changes by itself.
                let mask: u64 = $mask;
                if mask == TIMER {
                    *slot &= mask;
                }
            }
        )*};
    }
    registers!(see);
    values
}

/// Gives them values; bits that must stay come from `keep`.
pub(crate) fn write(features: &Features, keep: &Values, value: impl Fn(usize) -> u64) {
    // Sets of bits are cleared through registers of their own.
    if features.pmu {
        // SAFETY: counters that nobody uses.
        unsafe {
            asm!(
                "msr pmcntenclr_el0, {0}", "msr pmintenclr_el1, {0}", "msr pmovsclr_el0, {0}",
                in(reg) u64::MAX, options(nostack)
            );
        }
    }
    let mut numbers = 0..COUNT;
    macro_rules! give {
        ($($name:ident $encoding:ident $mask:tt $feature:ident)*) => {$(
            let n = numbers.next().unwrap_or(0);
            let mask: u64 = $mask;
            if features.$feature && mask != 0 {
                let new = value(n) & mask | keep[n] & !mask;
                // SAFETY: registers that this program does not depend on while translation is off, or bits of them.
                unsafe { asm!(concat!("msr ", stringify!($encoding), ", {}"), in(reg) new, options(nostack)) };
            }
        )*};
    }
    registers!(give);
    // SAFETY: a barrier.
    unsafe { asm!("isb", options(nostack)) };
}

/// A different value for each register, whose inverse is one as well.
pub(crate) fn pattern(n: usize) -> u64 {
    (n as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15)
}

/// Runs `calls` twice with all registers full of values, so that each bit was once 0 and once 1; says which changed.
/// Where `calls` run a REC, the RMM may empty the GIC's virtual interface.
pub(crate) fn survive(name: &str, rec: bool, mut calls: impl FnMut()) {
    let features = Features::read();
    let original = read(&features);
    let mut lost = None;
    for invert in [0, u64::MAX] {
        write(&features, &original, |n| pattern(n) ^ invert);
        let before = read(&features);
        calls();
        let after = read(&features);
        let emptied = |n: usize| rec && after[n] == 0 && NAMES[n].starts_with("ICH_");
        let changed = (0..COUNT).find(|&n| before[n] != after[n] && !emptied(n));
        lost = lost.or(changed.map(|n| (n, before[n], after[n])));
        write(&features, &original, |n| original.get(n).copied().unwrap_or(0));
    }
    match lost {
        None => check(name, Ok(())),
        Some((n, before, after)) => {
            check(name, Err(format_args!("{}: {before:#x} became {after:#x}", NAMES[n])));
        }
    }
}
