//! System register access, and the encodings of registers that a plain Armv8.0 assembler does not know by name.
//! The macros are in scope everywhere in the image (`#[macro_use]`).

/// Reads a system register.
macro_rules! read_reg {
    ($name:expr) => {{
        let value: u64;
        // SAFETY: reading this register has no side effect on memory or on the running program.
        #[allow(unused_unsafe, reason = "also used inside unsafe blocks")]
        unsafe {
            core::arch::asm!(concat!("mrs {}, ", $name), out(reg) value, options(nostack, preserves_flags));
        }
        value
    }};
}

/// Writes a system register. The caller answers for the effect.
macro_rules! write_reg {
    ($name:expr, $value:expr) => {{
        let value: u64 = $value;
        core::arch::asm!(concat!("msr ", $name, ", {}"), in(reg) value, options(nostack, preserves_flags));
    }};
}

/// Names registers by encoding.
macro_rules! encodings {
    ($($name:ident = $encoding:literal;)*) => {
        $(macro_rules! $name { () => { $encoding } })*
    };
}

encodings! {
    sctlr_el12 = "S3_5_C1_C0_0";
    cpacr_el12 = "S3_5_C1_C0_2";
    ttbr0_el12 = "S3_5_C2_C0_0";
    ttbr1_el12 = "S3_5_C2_C0_1";
    tcr_el12 = "S3_5_C2_C0_2";
    spsr_el12 = "S3_5_C4_C0_0";
    elr_el12 = "S3_5_C4_C0_1";
    afsr0_el12 = "S3_5_C5_C1_0";
    afsr1_el12 = "S3_5_C5_C1_1";
    esr_el12 = "S3_5_C5_C2_0";
    far_el12 = "S3_5_C6_C0_0";
    mair_el12 = "S3_5_C10_C2_0";
    amair_el12 = "S3_5_C10_C3_0";
    vbar_el12 = "S3_5_C12_C0_0";
    contextidr_el12 = "S3_5_C13_C0_1";
    scxtnum_el12 = "S3_5_C13_C0_7";
    scxtnum_el0 = "S3_3_C13_C0_7";
    cntkctl_el12 = "S3_5_C14_C1_0";
    cntp_ctl_el02 = "S3_5_C14_C2_1";
    cntp_cval_el02 = "S3_5_C14_C2_2";
    cntv_ctl_el02 = "S3_5_C14_C3_1";
    cntv_cval_el02 = "S3_5_C14_C3_2";
    cntpoff_el2 = "S3_4_C14_C0_6";
    vsesr_el2 = "S3_4_C5_C2_3";
    vdisr_el2 = "S3_4_C12_C1_1";
    hcrx_el2 = "S3_4_C1_C2_2";
    hfgrtr_el2 = "S3_4_C1_C1_4";
    hfgwtr_el2 = "S3_4_C1_C1_5";
    hfgitr_el2 = "S3_4_C1_C1_6";
    hdfgrtr_el2 = "S3_4_C3_C1_4";
    hdfgwtr_el2 = "S3_4_C3_C1_5";
    svcr = "S3_3_C4_C2_2";
    smcr_el2 = "S3_4_C1_C2_6";
    zcr_el2 = "S3_4_C1_C2_0";
    zcr_el12 = "S3_5_C1_C2_0";
    id_aa64zfr0_el1 = "S3_0_C0_C4_4";
    id_aa64smfr0_el1 = "S3_0_C0_C4_5";
    apia_lo = "S3_0_C2_C1_0";
    apia_hi = "S3_0_C2_C1_1";
    apib_lo = "S3_0_C2_C1_2";
    apib_hi = "S3_0_C2_C1_3";
    apda_lo = "S3_0_C2_C2_0";
    apda_hi = "S3_0_C2_C2_1";
    apdb_lo = "S3_0_C2_C2_2";
    apdb_hi = "S3_0_C2_C2_3";
    apga_lo = "S3_0_C2_C3_0";
    apga_hi = "S3_0_C2_C3_1";
    icc_sre_el2 = "S3_4_C12_C9_5";
    icc_hppir1_el1 = "S3_0_C12_C12_2";
    ich_hcr_el2 = "S3_4_C12_C11_0";
    ich_vtr_el2 = "S3_4_C12_C11_1";
    ich_misr_el2 = "S3_4_C12_C11_2";
    ich_vmcr_el2 = "S3_4_C12_C11_7";
    id_aa64isar2_el1 = "S3_0_C0_C6_2";
    id_aa64mmfr2_el1 = "S3_0_C0_C7_2";
}

/// Instruction synchronization barrier.
#[inline(always)]
pub(crate) fn isb() {
    // SAFETY: a barrier.
    unsafe { core::arch::asm!("isb", options(nostack, preserves_flags)) };
}

/// A four-bit (or wider) field of an ID register.
pub(crate) fn field(value: u64, lsb: u32) -> u64 {
    (value >> lsb) & 0xF
}

/// Every use of vector registers, trace and activity monitors is trapped to EL2 (E2H layout).
pub(crate) const CPTR_TRAP: u64 = 1 << 28 | 1 << 30;
/// FP/SIMD is open, the rest is trapped.
pub(crate) const CPTR_FP: u64 = 3 << 20 | CPTR_TRAP;
/// So is SVE.
pub(crate) const CPTR_SVE: u64 = 3 << 16 | CPTR_FP;
/// FPEN, ZEN, SMEN all open: the RMM itself is about to touch vector registers.
pub(crate) const CPTR_OPEN: u64 = 3 << 16 | 3 << 24 | CPTR_FP;
