//! The execution context of a REC: one granule (the REC's first auxiliary granule), read and written in place
//! by the core and by the platform.
//!
//! The layout is a list of 64-bit words. A platform's assembly uses the constants of [`word`] times eight as
//! byte offsets from the granule's address; nothing is ever copied out of the granule as a whole.
//!
//! # Who reads and writes what, when
//!
//! | words | `rec_load` | `rec_run` | `rec_save` |
//! |---|---|---|---|
//! | `GPRS`, `PC`, `PSTATE` | – | loaded before the ERET, stored after the exit | – |
//! | `HCR_EL2`, `CNTHCTL_EL2`, `MDCR_EL2`, `VSESR_EL2` | – | loaded before every ERET (the core may change them between runs) | – |
//! | `VTCR_EL2`, `VTTBR_EL2`, `VMPIDR_EL2` | loaded | – | – |
//! | EL1/EL0 system registers, PAuth keys, timers | loaded | – | stored |
//! | `ICH_LR`, `ICH_HCR`, `ICH_VMCR`, `ICH_AP0R`, `ICH_AP1R` | loaded | – | stored, then `ICH_HCR_EL2` = 0 on the CPU |
//! | `ICH_MISR` | – | – | stored (read-only for the core) |
//! | `FP` (V0–V31), `FPSR`, `FPCR` | – | loaded at the first FP trap | stored if loaded |
//! | `PREDICATES`, `ZCR_EL1`, and Z0–Z31 in granules of their own | – | as `FP`, instead of it, for a REC with SVE | stored if loaded |
//! | `DBGBVR` … `DBGCLAIM` | by `debug_load` only | – | stored if loaded |
//! | `PMCR` … `PMEVTYPER` | by `pmu_load` only | – | stored if loaded |
//! | `MDCCINT_EL1` | – | – | – (its accesses trap) |
//!
//! After `rec_run` HCR_EL2.VSE is clear in the word if the REC has taken its virtual SError.
//!
//! Timer words: `CNTV_CTL`/`CNTP_CTL` are stored with ISTATUS as read at `rec_save`. Offsets are always zero
//! (`CNTVOFF_EL2`, `CNTPOFF_EL2`), which the platform sets once or at `rec_load`.
//!
//! Before `rec_run`, `CNTHCTL_EL2` may newly mask a timer whose interrupt is pending: the platform waits until
//! the masked timer's PPI has left `ICC_HPPIR1_EL1` so that no stale IRQ exit is taken.

use core::sync::atomic::Ordering::Relaxed;

use crate::platform::{GRANULE_WORDS, Page};

macro_rules! words {
    ($($(#[$meta:meta])* $name:ident: $count:expr;)*) => {
        words!(@at 0usize; $($(#[$meta])* $name: $count;)*);
    };
    (@at $at:expr; $(#[$meta:meta])* $name:ident: $count:expr; $($rest:tt)*) => {
        $(#[$meta])*
        pub const $name: usize = $at;
        words!(@at $name + $count; $($rest)*);
    };
    (@at $at:expr;) => {
        /// First unused word.
        pub const END: usize = $at;
    };
}

/// Word indices in the context granule. Multiply by eight for byte offsets.
pub mod word {
    words! {
        /// X0–X30.
        GPRS: 31;
        /// `ELR_EL2`: where the REC continues.
        PC: 1;
        /// `SPSR_EL2`: its PSTATE.
        PSTATE: 1;
        /// Filler, keeps pairs aligned.
        RESERVED0: 1;

        /// `HCR_EL2` for the next run.
        HCR_EL2: 1;
        /// `CNTHCTL_EL2` for the next run (timer masks).
        CNTHCTL_EL2: 1;
        /// `MDCR_EL2` for the next run (debug and PMU traps, HPMN).
        MDCR_EL2: 1;
        /// `VSESR_EL2` for the next run (meaningful with HCR_EL2.VSE).
        VSESR_EL2: 1;
        /// `VTCR_EL2`.
        VTCR_EL2: 1;
        /// `VTTBR_EL2`.
        VTTBR_EL2: 1;
        /// `VMPIDR_EL2`: what the REC reads as `MPIDR_EL1`.
        VMPIDR_EL2: 1;
        /// Filler.
        RESERVED1: 1;

        /// `SP_EL0`.
        SP_EL0: 1;
        /// `SP_EL1`.
        SP_EL1: 1;
        /// `ELR_EL1`.
        ELR_EL1: 1;
        /// `SPSR_EL1`.
        SPSR_EL1: 1;
        /// `SCTLR_EL1`.
        SCTLR_EL1: 1;
        /// `ACTLR_EL1`.
        ACTLR_EL1: 1;
        /// `CPACR_EL1`.
        CPACR_EL1: 1;
        /// `TTBR0_EL1`.
        TTBR0_EL1: 1;
        /// `TTBR1_EL1`.
        TTBR1_EL1: 1;
        /// `TCR_EL1`.
        TCR_EL1: 1;
        /// `ESR_EL1`.
        ESR_EL1: 1;
        /// `AFSR0_EL1`.
        AFSR0_EL1: 1;
        /// `AFSR1_EL1`.
        AFSR1_EL1: 1;
        /// `FAR_EL1`.
        FAR_EL1: 1;
        /// `MAIR_EL1`.
        MAIR_EL1: 1;
        /// `AMAIR_EL1`.
        AMAIR_EL1: 1;
        /// `VBAR_EL1`.
        VBAR_EL1: 1;
        /// `CONTEXTIDR_EL1`.
        CONTEXTIDR_EL1: 1;
        /// `TPIDR_EL0`.
        TPIDR_EL0: 1;
        /// `TPIDRRO_EL0`.
        TPIDRRO_EL0: 1;
        /// `TPIDR_EL1`.
        TPIDR_EL1: 1;
        /// `SCXTNUM_EL0`.
        SCXTNUM_EL0: 1;
        /// `SCXTNUM_EL1`.
        SCXTNUM_EL1: 1;
        /// `PAR_EL1`.
        PAR_EL1: 1;
        /// `CSSELR_EL1`.
        CSSELR_EL1: 1;
        /// `MDSCR_EL1`.
        MDSCR_EL1: 1;
        /// `MDCCINT_EL1`, which has no effect: a Realm has no debug communication channel.
        MDCCINT_EL1: 1;
        /// `PMUSERENR_EL0`.
        PMUSERENR: 1;
        /// Filler.
        RESERVED2: 1;
        /// `DISR_EL1`, reached as `VDISR_EL2`.
        DISR_EL1: 1;
        /// `CNTKCTL_EL1`.
        CNTKCTL_EL1: 1;
        /// Bit 0: the OS lock (`OSLAR_EL1` write, `OSLSR_EL1.OSLK` read); bit 1: `OSDLR_EL1.DLK`. Zero: unlocked.
        OS_LOCK: 1;

        /// APIA, APIB, APDA, APDB, APGA keys, each Lo then Hi.
        PAUTH: 10;

        /// `CNTV_CTL_EL0`.
        CNTV_CTL: 1;
        /// `CNTV_CVAL_EL0`.
        CNTV_CVAL: 1;
        /// `CNTP_CTL_EL0`.
        CNTP_CTL: 1;
        /// `CNTP_CVAL_EL0`.
        CNTP_CVAL: 1;

        /// `ICH_LR0_EL2` … `ICH_LR15_EL2`; only the implemented ones are used.
        ICH_LR: 16;
        /// `ICH_HCR_EL2`.
        ICH_HCR: 1;
        /// `ICH_VMCR_EL2`.
        ICH_VMCR: 1;
        /// `ICH_MISR_EL2`, as read at `rec_save`.
        ICH_MISR: 1;
        /// Filler.
        RESERVED3: 1;
        /// `ICH_AP0R0_EL2` … 3.
        ICH_AP0R: 4;
        /// `ICH_AP1R0_EL2` … 3.
        ICH_AP1R: 4;

        /// `FPSR`.
        FPSR: 1;
        /// `FPCR`.
        FPCR: 1;
        /// V0–V31, 16 bytes each, low word first (16-byte aligned).
        FP: 64;

        /// `DBGBVR0_EL1` …
        DBGBVR: 16;
        /// `DBGBCR0_EL1` …
        DBGBCR: 16;
        /// `DBGWVR0_EL1` …
        DBGWVR: 16;
        /// `DBGWCR0_EL1` …
        DBGWCR: 16;
        /// The claim tags (`DBGCLAIMCLR_EL1` as read).
        DBGCLAIM: 1;

        /// `ZCR_EL2` for a REC with SVE: its longest vectors.
        ZCR_EL2: 1;
        /// `ZCR_EL1`.
        ZCR_EL1: 1;
        /// Filler, keeps predicates aligned.
        RESERVED4: 1;
        /// Physical address of the memory for Z0–Z15; zero for a REC without SVE.
        SVE_Z: 1;
        /// The same for Z16–Z31.
        SVE_Z_HIGH: 1;
        /// P0–P15, packed at the length of `ZCR_EL2`; at word 64 of them FFR (16-byte aligned).
        PREDICATES: 68;

        /// `PMCR_EL0`.
        PMCR: 1;
        /// `PMSELR_EL0`.
        PMSELR: 1;
        /// `PMCNTENSET_EL0`.
        PMCNTEN: 1;
        /// `PMINTENSET_EL1`.
        PMINTEN: 1;
        /// `PMOVSSET_EL0`.
        PMOVS: 1;
        /// `PMCCNTR_EL0`.
        PMCCNTR: 1;
        /// `PMCCFILTR_EL0`.
        PMCCFILTR: 1;
        /// `PMEVCNTR0_EL0` …
        PMEVCNTR: 31;
        /// `PMEVTYPER0_EL0` …
        PMEVTYPER: 31;

        /// Free for the platform's own use (the core clears it at REC_CREATE and never looks).
        PLATFORM: 2;
    }
}

const _: () = assert!(word::END <= GRANULE_WORDS, "the context fits in one granule");
const _: () = assert!(word::FP % 2 == 0, "vector registers are 16-byte aligned");
const _: () = assert!(word::PREDICATES % 2 == 0, "predicates are 16-byte aligned");

/// A view of a REC's context granule.
#[derive(Clone, Copy)]
pub struct RecContext<'a> {
    page: &'a Page,
}

impl<'a> RecContext<'a> {
    /// The context kept in `page`.
    pub fn new(page: &'a Page) -> Self {
        Self { page }
    }

    /// The granule, for a platform's assembly.
    pub fn page(&self) -> &'a Page {
        self.page
    }

    /// Reads word `index` (see [`word`]).
    #[inline]
    pub fn get(&self, index: usize) -> u64 {
        self.page[index].load(Relaxed)
    }

    /// Writes word `index`.
    #[inline]
    pub fn set(&self, index: usize, value: u64) {
        self.page[index].store(value, Relaxed);
    }

    /// Xn; X31 reads as zero.
    #[inline]
    pub fn gpr(&self, n: usize) -> u64 {
        if n < 31 { self.get(word::GPRS + n) } else { 0 }
    }

    /// Sets Xn; a write to X31 is discarded.
    #[inline]
    pub fn set_gpr(&self, n: usize, value: u64) {
        if n < 31 {
            self.set(word::GPRS + n, value);
        }
    }

    /// Where the REC continues.
    pub fn pc(&self) -> u64 {
        self.get(word::PC)
    }

    /// Skips the instruction at the PC.
    pub fn advance_pc(&self) {
        self.set(word::PC, self.pc().wrapping_add(4));
    }
}
