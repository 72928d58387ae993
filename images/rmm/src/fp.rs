//! Vector registers: the host's are live while the RMM runs and stay so until a REC uses its own.
//!
//! The host's state is saved at the vector length that its `ZCR_EL2` gives: what lies beyond is not the host's to
//! keep. A REC with SVE has `ZCR_EL2` and `ZCR_EL1` of its own, and its Z registers in granules of their own. What an
//! owner leaves beyond the vector length of the next one is cleared, since that one might see it later.
//! A REC without SVE cannot reach the predicates; they stay the host's.

use crate::percpu::PerCpu;
use crate::regs::{CPTR_FP, CPTR_OPEN, CPTR_SVE, CPTR_TRAP, isb};
use crate::world::features;
use core::arch::global_asm;
use core::sync::atomic::AtomicU64;
use rmm::context::{RecContext, word};

unsafe extern "C" {
    /// Z0–Z15 to the first place, Z16–Z31 to the second.
    fn rmm_z_save(low: *mut u8, high: *mut u8);
    fn rmm_z_load(low: *const u8, high: *const u8);
    fn rmm_p_save(to: *mut u8);
    fn rmm_p_load(from: *const u8);
    fn rmm_ffr_save(to: *mut u8);
    fn rmm_ffr_load(from: *const u8);
    fn rmm_v_save(to: *mut u8);
    fn rmm_v_load(from: *const u8);
    /// Zeroes Z, P and FFR.
    fn rmm_sve_clear();
    /// Whether FFR can be read now: an SME trap from here is not fatal.
    fn rmm_ffr_probe() -> u64;
}

/// Where Z16–Z31, the predicates and FFR lie in a CPU's area.
const HIGH: usize = 16 * 256;
const PREDICATES: usize = 32 * 256;
/// Behind the predicates.
const FFR: usize = 16 * 32;

/// SMCR_EL2.FA64 and ID_AA64SMFR0_EL1.FA64.
const SMCR_FA64: u64 = 1 << 31;
const SMFR0_FA64: u64 = 1 << 63;
/// SVCR.SM: streaming mode.
const SM: u64 = 1;

/// Opens the vector registers to the RMM.
pub(crate) fn open() {
    // SAFETY: only lifts a trap.
    unsafe { write_reg!("cptr_el2", CPTR_OPEN) };
    isb();
}

/// Restores the traps that fit the state of this CPU.
pub(crate) fn close(cpu: &PerCpu) {
    let traps = match (cpu.fp_loaded, cpu.sve_loaded) {
        (false, _) => CPTR_TRAP,
        (true, false) => CPTR_FP,
        (true, true) => CPTR_SVE,
    };
    // SAFETY: only sets traps.
    unsafe { write_reg!("cptr_el2", traps) };
}

/// The vector lengths of this CPU, as a set: bit n for (n + 1) × 128 bits. The host's length is not changed.
pub(crate) fn lengths() -> u16 {
    open();
    let before = read_reg!(zcr_el2!());
    let mut lengths = 0u16;
    for n in 0..16u64 {
        let bytes: u64;
        // SAFETY: no vector registers are in use yet, and the length is restored.
        unsafe {
            write_reg!(zcr_el2!(), n);
            isb();
            core::arch::asm!(".arch_extension sve", "rdvl {}, #1", out(reg) bytes, options(nostack));
        }
        lengths |= 1 << ((bytes / 16).clamp(1, 16) - 1);
    }
    // SAFETY: as above.
    unsafe {
        write_reg!(zcr_el2!(), before);
        write_reg!("cptr_el2", CPTR_TRAP);
    }
    lengths
}

/// Whether FFR can exist in streaming mode: FEAT_SME_FA64, if EL3 lets us.
pub(crate) fn probe_fa64() -> bool {
    if read_reg!(id_aa64smfr0_el1!()) & SMFR0_FA64 == 0 {
        return false;
    }
    open();
    let before = (read_reg!(smcr_el2!()), read_reg!(svcr!()));
    // SAFETY: no vector registers are in use yet; what is changed is restored.
    unsafe {
        write_reg!(smcr_el2!(), before.0 | SMCR_FA64);
        write_reg!(svcr!(), SM);
        isb();
        let readable = rmm_ffr_probe() != 0;
        write_reg!(svcr!(), before.1);
        write_reg!(smcr_el2!(), before.0);
        write_reg!("cptr_el2", CPTR_TRAP);
        readable
    }
}

/// Called when a REC is loaded: closes the vector registers. A host in streaming mode must leave it now,
/// because instructions behave differently there.
pub(crate) fn rec_load(cpu: &mut PerCpu, ctx: &RecContext<'_>) {
    cpu.svcr = 0;
    if features().sme {
        open();
        let mode = read_reg!(svcr!());
        if mode & SM != 0 {
            cpu.svcr = mode;
            load(cpu, ctx);
        }
        close(cpu);
    }
}

/// Whether the host has an FFR now; in streaming mode only with all of A64.
fn host_has_ffr(cpu: &PerCpu) -> bool {
    cpu.svcr == 0 || (features().fa64 && read_reg!(smcr_el2!()) & SMCR_FA64 != 0)
}

/// Puts the host's vector registers away and loads the REC's.
pub(crate) fn load(cpu: &mut PerCpu, ctx: &RecContext<'_>) {
    open();
    cpu.fpsr = read_reg!("S3_3_C4_C4_1");
    cpu.fpcr = read_reg!("S3_3_C4_C4_0");
    let has_ffr = host_has_ffr(cpu);
    let area = cpu.vectors.as_mut_ptr();
    // SAFETY: the area is large enough for the longest vectors; the traps are open; the REC's granules are the core's
    // to name, see `rmm::context`.
    unsafe {
        if cpu.svcr != 0 || features().sve {
            rmm_z_save(area, area.add(HIGH));
            rmm_p_save(area.add(PREDICATES));
            if has_ffr {
                rmm_ffr_save(area.add(PREDICATES + FFR));
            }
        } else {
            rmm_v_save(area);
        }
        if cpu.svcr != 0 {
            write_reg!(svcr!(), cpu.svcr & !SM);
        }
        if ctx.get(word::SVE_Z) == 0 {
            rmm_v_load(words(ctx, word::FP).cast_const());
        } else {
            cpu.zcr_el2 = read_reg!(zcr_el2!());
            cpu.zcr_el1 = read_reg!(zcr_el12!());
            write_reg!(zcr_el2!(), ctx.get(word::ZCR_EL2));
            write_reg!(zcr_el12!(), ctx.get(word::ZCR_EL1));
            isb();
            let predicates = words(ctx, word::PREDICATES).cast_const();
            rmm_ffr_load(predicates.add(FFR));
            rmm_p_load(predicates);
            rmm_z_load(ctx.get(word::SVE_Z) as *const u8, ctx.get(word::SVE_Z_HIGH) as *const u8);
            cpu.sve_loaded = true;
        }
        write_reg!("S3_3_C4_C4_1", ctx.get(word::FPSR));
        write_reg!("S3_3_C4_C4_0", ctx.get(word::FPCR));
    }
    cpu.fp_loaded = true;
    close(cpu);
}

/// Puts the REC's vector registers away and brings the host's back, if they were switched.
pub(crate) fn rec_save(cpu: &mut PerCpu, ctx: &RecContext<'_>) {
    if !cpu.fp_loaded {
        return;
    }
    open();
    ctx.set(word::FPSR, read_reg!("S3_3_C4_C4_1"));
    ctx.set(word::FPCR, read_reg!("S3_3_C4_C4_0"));
    let has_ffr = host_has_ffr(cpu);
    let area = cpu.vectors.as_ptr();
    // SAFETY: as in `load`, whose layout this reads back.
    unsafe {
        if cpu.sve_loaded {
            let predicates = words(ctx, word::PREDICATES);
            rmm_z_save(ctx.get(word::SVE_Z) as *mut u8, ctx.get(word::SVE_Z_HIGH) as *mut u8);
            rmm_p_save(predicates);
            rmm_ffr_save(predicates.add(FFR));
            ctx.set(word::ZCR_EL1, read_reg!(zcr_el12!()));
            if ctx.get(word::ZCR_EL2) & LEN > cpu.zcr_el2 & LEN {
                // Else the host would find the rest when it raises its length.
                rmm_sve_clear();
            }
            write_reg!(zcr_el2!(), cpu.zcr_el2);
            write_reg!(zcr_el12!(), cpu.zcr_el1);
            isb();
            cpu.sve_loaded = false;
        } else {
            rmm_v_save(words(ctx, word::FP));
        }
        if cpu.svcr != 0 {
            write_reg!(svcr!(), cpu.svcr);
        }
        if cpu.svcr != 0 || features().sve {
            if has_ffr {
                rmm_ffr_load(area.add(PREDICATES + FFR));
            }
            rmm_p_load(area.add(PREDICATES));
            rmm_z_load(area, area.add(HIGH));
        } else {
            rmm_v_load(area);
        }
        write_reg!("S3_3_C4_C4_1", cpu.fpsr);
        write_reg!("S3_3_C4_C4_0", cpu.fpcr);
    }
    cpu.fp_loaded = false;
    close(cpu);
}

/// ZCR_ELx.LEN.
const LEN: u64 = 0xF;

/// The context's memory from a word on.
fn words(ctx: &RecContext<'_>, first: usize) -> *mut u8 {
    let words: &[AtomicU64] = &ctx.page()[first..];
    words.as_ptr().cast_mut().cast()
}

global_asm!(
    r#"
    .arch_extension fp
    .arch_extension simd
    .arch_extension sve
    .pushsection .text.fp, "ax"

    .macro each_z op
    .irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
        \op     z\n, [x0, #\n, mul vl]
    .endr
    .irp n,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
        \op     z\n, [x1, #(\n - 16), mul vl]
    .endr
        ret
    .endm
    .macro each_p op
    .irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
        \op     p\n, [x0, #\n, mul vl]
    .endr
        ret
    .endm
    .macro each_v op
        \op     q0, q1, [x0]
        \op     q2, q3, [x0, #32]
        \op     q4, q5, [x0, #64]
        \op     q6, q7, [x0, #96]
        \op     q8, q9, [x0, #128]
        \op     q10, q11, [x0, #160]
        \op     q12, q13, [x0, #192]
        \op     q14, q15, [x0, #224]
        \op     q16, q17, [x0, #256]
        \op     q18, q19, [x0, #288]
        \op     q20, q21, [x0, #320]
        \op     q22, q23, [x0, #352]
        \op     q24, q25, [x0, #384]
        \op     q26, q27, [x0, #416]
        \op     q28, q29, [x0, #448]
        \op     q30, q31, [x0, #480]
        ret
    .endm

    .global rmm_z_save
    rmm_z_save: each_z str
    .global rmm_z_load
    rmm_z_load: each_z ldr
    .global rmm_p_save
    rmm_p_save: each_p str
    .global rmm_p_load
    rmm_p_load: each_p ldr
    .global rmm_v_save
    rmm_v_save: each_v stp
    .global rmm_v_load
    rmm_v_load: each_v ldp
    // Both use p0, which is saved before and loaded after.
    .global rmm_ffr_save
    rmm_ffr_save:
        rdffr   p0.b
        str     p0, [x0]
        ret
    .global rmm_ffr_load
    rmm_ffr_load:
        ldr     p0, [x0]
        wrffr   p0.b
        ret
    .global rmm_sve_clear
    rmm_sve_clear:
    .irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
        mov     z\n\().d, #0
        pfalse  p\n\().b
    .endr
    .irp n,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
        mov     z\n\().d, #0
    .endr
        wrffr   p0.b
        ret
    .global rmm_ffr_probe
    .global rmm_ffr_probe_failed
    rmm_ffr_probe:
        rdffr   p0.b
        mov     x0, #1
        ret
    rmm_ffr_probe_failed:
        mov     x0, #0
        ret
    .popsection
    "#
);
