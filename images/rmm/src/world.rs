//! Switching between the host's and a REC's registers.
//!
//! EL3 switches general registers, SP_EL0, pointer authentication keys and EL2 registers between the worlds;
//! everything at EL1 and EL0, the timers and the GIC's virtual interface is shared and switched here.

use crate::fp;
use crate::memory::RMM_MOPS;
use crate::percpu::{HOST_REGISTERS, PerCpu};
use crate::pmu;
use crate::regs::{CPTR_TRAP, field, isb};
use core::sync::atomic::{AtomicBool, Ordering::Relaxed};
use rmm::context::{RecContext, word};

/// Optional parts of the CPU that the switch depends on.
#[derive(Clone, Copy)]
pub(crate) struct Features {
    /// FEAT_SHA256.
    pub(crate) sha256: bool,
    /// FEAT_SHA512.
    pub(crate) sha512: bool,
    /// FEAT_MOPS.
    pub(crate) mops: bool,
    /// FEAT_SVE.
    pub(crate) sve: bool,
    /// FEAT_SME.
    pub(crate) sme: bool,
    /// FEAT_SME_FA64: FFR may exist in streaming mode.
    pub(crate) fa64: bool,
}

static SHA256: AtomicBool = AtomicBool::new(false);
static SHA512: AtomicBool = AtomicBool::new(false);
static SVE: AtomicBool = AtomicBool::new(false);
static SME: AtomicBool = AtomicBool::new(false);
static FA64: AtomicBool = AtomicBool::new(false);

/// What [`init_features`] found.
#[inline]
pub(crate) fn features() -> Features {
    Features {
        sha256: SHA256.load(Relaxed),
        sha512: SHA512.load(Relaxed),
        mops: RMM_MOPS.load(Relaxed),
        sve: SVE.load(Relaxed),
        sme: SME.load(Relaxed),
        fa64: FA64.load(Relaxed),
    }
}

/// Looks at the ID registers, once.
pub(crate) fn init_features() {
    let (pfr0, pfr1, isar0) =
        (read_reg!("id_aa64pfr0_el1"), read_reg!("id_aa64pfr1_el1"), read_reg!("id_aa64isar0_el1"));
    SHA256.store(field(isar0, 12) >= 1, Relaxed);
    SHA512.store(field(isar0, 12) >= 2, Relaxed);
    RMM_MOPS.store(field(read_reg!(id_aa64isar2_el1!()), 16) != 0, Relaxed);
    SVE.store(field(pfr0, 32) != 0, Relaxed);
    SME.store(field(pfr1, 24) != 0, Relaxed);
    FA64.store(features().sve && features().sme && fp::probe_fa64(), Relaxed);
}

/// Gives the EL2 registers of this CPU that the RMM never changes their values.
pub(crate) fn init_cpu() {
    let (pfr0, mmfr0, mmfr1) =
        (read_reg!("id_aa64pfr0_el1"), read_reg!("id_aa64mmfr0_el1"), read_reg!("id_aa64mmfr1_el1"));
    // SAFETY: registers that control only lower exception levels, set to "trap nothing that HCR_EL2 and the
    // REC's own control words do not trap", with offsets of zero; and no second stage until a REC is loaded.
    unsafe {
        write_reg!("cntvoff_el2", 0);
        write_reg!("hstr_el2", 0);
        write_reg!("vpidr_el2", read_reg!("midr_el1"));
        write_reg!("vmpidr_el2", read_reg!("mpidr_el1"));
        write_reg!("vttbr_el2", 0);
        write_reg!("mdcr_el2", MDCR_TRAPS | counters());
        if field(mmfr0, 60) >= 2 {
            write_reg!(cntpoff_el2!(), 0);
        }
        if field(mmfr0, 56) != 0 {
            // The bits with inverted meaning stay zero, which traps what no REC gets (SME's TPIDR2 and others).
            write_reg!(hfgrtr_el2!(), 0);
            write_reg!(hfgwtr_el2!(), 0);
            write_reg!(hfgitr_el2!(), 0);
            write_reg!(hdfgrtr_el2!(), HDFGTR);
            write_reg!(hdfgwtr_el2!(), HDFGTR);
        }
        if field(mmfr1, 40) != 0 {
            write_reg!(hcrx_el2!(), if field(read_reg!("id_aa64pfr1_el1"), 36) != 0 { TALLINT } else { 0 });
        }
        if field(pfr0, 28) != 0 {
            write_reg!(vsesr_el2!(), 0);
            write_reg!(vdisr_el2!(), 0);
        }
        write_reg!("cptr_el2", CPTR_TRAP);
    }
    isb();
}

/// HDFGRTR_EL2 and HDFGWTR_EL2: DBGPRCR_EL1 and OSECCR_EL1, which reach out of the Realm. The bits with inverted meaning
/// stay zero, which traps branch records and others.
const HDFGTR: u64 = 1 << 7 | 1 << 10;

/// HCRX_EL2.TALLINT: no REC masks interrupts by ALLINT.
const TALLINT: u64 = 1 << 6;

/// TPM, TPMCR: the PMU is the host's; HPMD, HCCD: it does not count what the RMM does.
const MDCR_TRAPS: u64 = 1 << 5 | 1 << 6 | 1 << 17 | 1 << 23;

/// HPMN: all event counters stay below EL2's.
pub(crate) fn counters() -> u64 {
    read_reg!("pmcr_el0") >> 11 & 0x1F
}

/// Registers that both the host and a REC have, in the order of [`PerCpu::host`].
macro_rules! switched {
    ($do:ident) => {
        $do! {
            (0, "sp_el1", SP_EL1) (1, elr_el12!(), ELR_EL1) (2, spsr_el12!(), SPSR_EL1)
            (3, sctlr_el12!(), SCTLR_EL1) (4, "actlr_el1", ACTLR_EL1) (5, cpacr_el12!(), CPACR_EL1)
            (6, ttbr0_el12!(), TTBR0_EL1) (7, ttbr1_el12!(), TTBR1_EL1) (8, tcr_el12!(), TCR_EL1)
            (9, esr_el12!(), ESR_EL1) (10, afsr0_el12!(), AFSR0_EL1) (11, afsr1_el12!(), AFSR1_EL1)
            (12, far_el12!(), FAR_EL1) (13, mair_el12!(), MAIR_EL1) (14, amair_el12!(), AMAIR_EL1)
            (15, vbar_el12!(), VBAR_EL1) (16, contextidr_el12!(), CONTEXTIDR_EL1)
            (17, "tpidr_el0", TPIDR_EL0) (18, "tpidrro_el0", TPIDRRO_EL0) (19, "tpidr_el1", TPIDR_EL1)
            (20, "par_el1", PAR_EL1) (21, "csselr_el1", CSSELR_EL1) (22, "mdscr_el1", MDSCR_EL1)
            (23, "pmuserenr_el0", PMUSERENR) (24, cntkctl_el12!(), CNTKCTL_EL1) (25, "sp_el0", SP_EL0)
            (26, ich_vmcr_el2!(), ICH_VMCR)
        }
    };
}

/// Swaps a timer: control and compare value are read while both are the owner's, since ISTATUS depends on both, and
/// the timer is off in between, so that no mixture of the two worlds' values can fire.
macro_rules! swap_timer {
    ($ctl:expr, $cval:expr, $new_ctl:expr, $new_cval:expr) => {{
        let old = (read_reg!($ctl), read_reg!($cval));
        // SAFETY: an EL1 timer; its interrupt is masked at EL2.
        unsafe {
            write_reg!($ctl, 0);
            write_reg!($cval, $new_cval);
            write_reg!($ctl, $new_ctl);
        }
        old
    }};
}

const HOST_CNTV: usize = 27;
const HOST_CNTP: usize = 29;
const HOST_ICH_HCR: usize = 31;
const HOST_ICC_SRE: usize = 32;
const HOST_OS_LOCK: usize = 33;
const HOST_SCXTNUM_EL0: usize = 34;
const HOST_SCXTNUM_EL1: usize = 35;
const HOST_DOUBLE_LOCK: usize = 36;
const _: () = assert!(HOST_DOUBLE_LOCK < HOST_REGISTERS);

/// HCR_EL2.EnSCXT: the REC may use SCXTNUM_ELx.
const HCR_ENSCXT: u64 = 1 << 53;

/// The host's state away, the REC's in.
pub(crate) fn rec_load(cpu: &mut PerCpu, ctx: &RecContext<'_>) {
    pmu::pause(cpu);
    macro_rules! swap_in {
        ($(($index:literal, $register:expr, $word:ident))*) => {
            $(
                cpu.host[$index] = read_reg!($register);
                // SAFETY: an EL1/EL0 register; nothing at EL2 depends on it.
                unsafe { write_reg!($register, ctx.get(word::$word)) };
            )*
        };
    }
    switched!(swap_in);
    let host = &mut cpu.host;
    (host[HOST_CNTV], host[HOST_CNTV + 1]) =
        swap_timer!(cntv_ctl_el02!(), cntv_cval_el02!(), ctx.get(word::CNTV_CTL), ctx.get(word::CNTV_CVAL));
    (host[HOST_CNTP], host[HOST_CNTP + 1]) =
        swap_timer!(cntp_ctl_el02!(), cntp_cval_el02!(), ctx.get(word::CNTP_CTL), ctx.get(word::CNTP_CVAL));
    host[HOST_OS_LOCK] = read_reg!("oslsr_el1") >> 1 & 1;
    host[HOST_DOUBLE_LOCK] = read_reg!("osdlr_el1");
    host[HOST_ICH_HCR] = read_reg!(ich_hcr_el2!());
    host[HOST_ICC_SRE] = read_reg!(icc_sre_el2!());
    let scxtnum = ctx.get(word::HCR_EL2) & HCR_ENSCXT != 0;
    // SAFETY: registers of the REC's own world, or EL2 controls of it; the tables that VTTBR_EL2 names are the
    // realm's, which the core built.
    unsafe {
        if scxtnum {
            host[HOST_SCXTNUM_EL0] = read_reg!(scxtnum_el0!());
            host[HOST_SCXTNUM_EL1] = read_reg!(scxtnum_el12!());
            write_reg!(scxtnum_el0!(), ctx.get(word::SCXTNUM_EL0));
            write_reg!(scxtnum_el12!(), ctx.get(word::SCXTNUM_EL1));
        }
        write_reg!("oslar_el1", ctx.get(word::OS_LOCK) & 1);
        write_reg!("osdlr_el1", ctx.get(word::OS_LOCK) >> 1);
        write_reg!(vdisr_el2!(), ctx.get(word::DISR_EL1));
        write_reg!(apia_lo!(), ctx.get(word::PAUTH));
        write_reg!(apia_hi!(), ctx.get(word::PAUTH + 1));
        write_reg!(apib_lo!(), ctx.get(word::PAUTH + 2));
        write_reg!(apib_hi!(), ctx.get(word::PAUTH + 3));
        write_reg!(apda_lo!(), ctx.get(word::PAUTH + 4));
        write_reg!(apda_hi!(), ctx.get(word::PAUTH + 5));
        write_reg!(apdb_lo!(), ctx.get(word::PAUTH + 6));
        write_reg!(apdb_hi!(), ctx.get(word::PAUTH + 7));
        write_reg!(apga_lo!(), ctx.get(word::PAUTH + 8));
        write_reg!(apga_hi!(), ctx.get(word::PAUTH + 9));
        write_reg!("vmpidr_el2", ctx.get(word::VMPIDR_EL2));
        write_reg!("vtcr_el2", ctx.get(word::VTCR_EL2));
        write_reg!("vttbr_el2", ctx.get(word::VTTBR_EL2));
        if host[HOST_ICC_SRE] & 0x9 != 0x9 {
            write_reg!(icc_sre_el2!(), host[HOST_ICC_SRE] | 0x9);
            isb();
        }
    }
    crate::gic::load(ctx);
    fp::rec_load(cpu, ctx);
    // The core reads the timers' state next.
    isb();
    cpu.loaded = true;
    cpu.fresh = true;
}

/// The REC's state away, the host's back.
pub(crate) fn rec_save(cpu: &mut PerCpu, ctx: &RecContext<'_>) {
    fp::rec_save(cpu, ctx);
    crate::gic::save(ctx);
    macro_rules! swap_out {
        ($(($index:literal, $register:expr, $word:ident))*) => {
            $(
                ctx.set(word::$word, read_reg!($register));
                // SAFETY: gives the host its own value back.
                unsafe { write_reg!($register, cpu.host[$index]) };
            )*
        };
    }
    switched!(swap_out);
    let host = &cpu.host;
    let (ctl, cval) = swap_timer!(cntv_ctl_el02!(), cntv_cval_el02!(), host[HOST_CNTV], host[HOST_CNTV + 1]);
    ctx.set(word::CNTV_CTL, ctl);
    ctx.set(word::CNTV_CVAL, cval);
    let (ctl, cval) = swap_timer!(cntp_ctl_el02!(), cntp_cval_el02!(), host[HOST_CNTP], host[HOST_CNTP + 1]);
    ctx.set(word::CNTP_CTL, ctl);
    ctx.set(word::CNTP_CVAL, cval);
    if cpu.debug_loaded {
        crate::debug::save(cpu, ctx);
    }
    ctx.set(word::DISR_EL1, read_reg!(vdisr_el2!()));
    ctx.set(word::OS_LOCK, read_reg!("oslsr_el1") >> 1 & 1 | (read_reg!("osdlr_el1") & 1) << 1);
    ctx.set(word::PAUTH, read_reg!(apia_lo!()));
    ctx.set(word::PAUTH + 1, read_reg!(apia_hi!()));
    ctx.set(word::PAUTH + 2, read_reg!(apib_lo!()));
    ctx.set(word::PAUTH + 3, read_reg!(apib_hi!()));
    ctx.set(word::PAUTH + 4, read_reg!(apda_lo!()));
    ctx.set(word::PAUTH + 5, read_reg!(apda_hi!()));
    ctx.set(word::PAUTH + 6, read_reg!(apdb_lo!()));
    ctx.set(word::PAUTH + 7, read_reg!(apdb_hi!()));
    ctx.set(word::PAUTH + 8, read_reg!(apga_lo!()));
    ctx.set(word::PAUTH + 9, read_reg!(apga_hi!()));
    // SAFETY: as in `rec_load`, with the host's values. The keys are EL3's to restore.
    unsafe {
        if ctx.get(word::HCR_EL2) & HCR_ENSCXT != 0 {
            ctx.set(word::SCXTNUM_EL0, read_reg!(scxtnum_el0!()));
            ctx.set(word::SCXTNUM_EL1, read_reg!(scxtnum_el12!()));
            write_reg!(scxtnum_el0!(), cpu.host[HOST_SCXTNUM_EL0]);
            write_reg!(scxtnum_el12!(), cpu.host[HOST_SCXTNUM_EL1]);
        }
        write_reg!("oslar_el1", cpu.host[HOST_OS_LOCK]);
        write_reg!("osdlr_el1", cpu.host[HOST_DOUBLE_LOCK]);
        write_reg!(ich_hcr_el2!(), cpu.host[HOST_ICH_HCR]);
        if cpu.host[HOST_ICC_SRE] & 0x9 != 0x9 {
            write_reg!(icc_sre_el2!(), cpu.host[HOST_ICC_SRE]);
        }
    }
    pmu::resume(cpu, ctx);
    isb();
    cpu.loaded = false;
}
