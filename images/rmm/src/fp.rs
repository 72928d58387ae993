//! Vector registers: the host's are live while the RMM runs and stay so until a REC uses its own.
//!
//! The host's state is saved at the vector length that its `ZCR_EL2` gives, which the RMM never changes: what
//! lies beyond is not the host's to keep. A REC has no SVE and no SME; those accesses stay trapped.

use crate::percpu::PerCpu;
use crate::regs::{CPTR_FP, CPTR_OPEN, CPTR_TRAP, isb};
use crate::world::features;
use core::arch::global_asm;
use core::sync::atomic::AtomicU64;
use rmm::context::{RecContext, word};

unsafe extern "C" {
    fn rmm_z_save(to: *mut u8);
    fn rmm_z_load(from: *const u8);
    fn rmm_p_save(to: *mut u8);
    fn rmm_p_load(from: *const u8);
    fn rmm_ffr_save(to: *mut u8);
    fn rmm_ffr_load(from: *const u8);
    fn rmm_v_save(to: *mut u8);
    fn rmm_v_load(from: *const u8);
}

/// Where the predicates lie behind the Z registers, and FFR behind them.
const PREDICATES: usize = 32 * 256;
const FFR: usize = PREDICATES + 16 * 32;

/// Opens the vector registers to the RMM.
pub(crate) fn open() {
    // SAFETY: only lifts a trap.
    unsafe { write_reg!("cptr_el2", CPTR_OPEN) };
    isb();
}

/// Restores the traps that fit the state of this CPU.
pub(crate) fn close(cpu: &PerCpu) {
    // SAFETY: only sets traps.
    unsafe { write_reg!("cptr_el2", if cpu.fp_loaded { CPTR_FP } else { CPTR_TRAP }) };
}

/// Called when a REC is loaded: closes the vector registers. A host in streaming mode must leave it now,
/// because instructions behave differently there.
pub(crate) fn rec_load(cpu: &mut PerCpu, ctx: &RecContext<'_>) {
    cpu.svcr = 0;
    if features().sme {
        open();
        let mode = read_reg!(svcr!());
        if mode & 1 != 0 {
            cpu.svcr = mode;
            load(cpu, ctx);
        }
        close(cpu);
    }
}

/// Puts the host's vector registers away and loads the REC's.
pub(crate) fn load(cpu: &mut PerCpu, ctx: &RecContext<'_>) {
    open();
    cpu.fpsr = read_reg!("S3_3_C4_C4_1");
    cpu.fpcr = read_reg!("S3_3_C4_C4_0");
    let area = cpu.vectors.as_mut_ptr();
    // SAFETY: the area is large enough for the longest vectors; the traps are open.
    unsafe {
        if cpu.svcr != 0 {
            rmm_z_save(area);
            rmm_p_save(area.add(PREDICATES));
            write_reg!(svcr!(), cpu.svcr & !1);
        } else if features().sve {
            rmm_z_save(area);
            rmm_p_save(area.add(PREDICATES));
            rmm_ffr_save(area.add(FFR));
        } else {
            rmm_v_save(area);
        }
        rmm_v_load(registers(ctx).cast_const());
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
    let area = cpu.vectors.as_ptr();
    // SAFETY: as in `load`, whose layout this reads back.
    unsafe {
        rmm_v_save(registers(ctx));
        if cpu.svcr != 0 {
            write_reg!(svcr!(), cpu.svcr);
            rmm_p_load(area.add(PREDICATES));
            rmm_z_load(area);
        } else if features().sve {
            rmm_ffr_load(area.add(FFR));
            rmm_p_load(area.add(PREDICATES));
            rmm_z_load(area);
        } else {
            rmm_v_load(area);
        }
        write_reg!("S3_3_C4_C4_1", cpu.fpsr);
        write_reg!("S3_3_C4_C4_0", cpu.fpcr);
    }
    cpu.fp_loaded = false;
    close(cpu);
}

fn registers(ctx: &RecContext<'_>) -> *mut u8 {
    let words: &[AtomicU64] = &ctx.page()[word::FP..word::FP + 64];
    words.as_ptr().cast_mut().cast()
}

global_asm!(
    r#"
    .arch_extension fp
    .arch_extension simd
    .arch_extension sve
    .pushsection .text.fp, "ax"

    .macro each_z op
    .irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
        \op     z\n, [x0, #\n, mul vl]
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
    .popsection
    "#
);
