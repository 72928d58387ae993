//! Exception vectors, and the way into a Realm and back.
//!
//! An exception from a lower EL ends [`rmm_guest_run`] like a function return. An exception of the RMM itself is
//! fatal, except a data abort on the NS view of memory inside the host access routines, which makes the routine
//! return an error: there the host can pull a page away at any moment. (And one instruction at boot that asks whether
//! FFR exists.)

use crate::layout::{NS_ALIAS_BIT, STACK_BIT};
use core::arch::global_asm;
use core::sync::atomic::AtomicU64;
use rmm::context::word;

unsafe extern "C" {
    /// Loads GPRS, PC and PSTATE from the context at `ctx`, runs the REC until it takes an exception to EL2,
    /// stores them back, and returns which vector it was: 0 synchronous, 1 IRQ, 2 FIQ, 3 SError.
    pub(crate) fn rmm_guest_run(ctx: *const AtomicU64) -> u64;

    /// Copies `words` 64-bit words; 0 if done, 1 if an NS access faulted. `mops`: FEAT_MOPS is there.
    pub(crate) fn rmm_ns_copy(dst: u64, src: u64, words: u64, mops: bool) -> u64;

    /// Zeroes a granule. `mops`: as above.
    pub(crate) fn rmm_zero(granule: u64, mops: bool);
}

const _: () = assert!(word::GPRS == 0 && word::PC == 31 && word::PSTATE == 32);

global_asm!(
    r#"
    .arch_extension mops
    .macro vector_fatal kind
    .balign 0x80
        mov     x0, #\kind
        mov     x1, x30
        b       rmm_fatal_exception
    .endm

    .macro vector_guest kind
    .balign 0x80
        stp     x0, x1, [sp, #-16]!
        mov     x1, #\kind
        b       .Lguest_exit
    .endm

    .pushsection .text.vectors, "ax"
    .balign 0x800
    .global rmm_vectors
    rmm_vectors:
        // Current EL, SP_EL0: never used.
        vector_fatal 5
        vector_fatal 5
        vector_fatal 5
        vector_fatal 5

        // Current EL, SP_EL2. First, without a free register: is the stack pointer inside its stack?
    .balign 0x80
        add     sp, sp, x0
        sub     x0, sp, x0
        tbz     x0, #{stack_bit}, .Loverflow
        sub     x0, sp, x0
        sub     sp, sp, x0
        b       .Lel2_sync
        vector_fatal 1
        vector_fatal 2
        vector_fatal 3

        // Lower EL, AArch64 and AArch32 (EL0).
        vector_guest 0
        vector_guest 1
        vector_guest 2
        vector_guest 3
        vector_guest 0
        vector_guest 1
        vector_guest 2
        vector_guest 3

    .balign 0x80
    .Loverflow:
        adrp    x0, RMM_EMERGENCY_STACK
        add     x0, x0, :lo12:RMM_EMERGENCY_STACK
        add     sp, x0, #{emergency}
        mov     x0, #4
        mov     x1, x30
        b       rmm_fatal_exception

    .Lel2_sync:
        stp     x0, x1, [sp, #-16]!
        mrs     x0, esr_el2
        lsr     x0, x0, #26
        cmp     x0, #0x1d
        b.eq    2f
        cmp     x0, #0x25
        b.ne    1f
        mrs     x0, far_el2
        lsr     x0, x0, #{ns_bit}
        cmp     x0, #1
        b.ne    1f
        mrs     x0, elr_el2
        adr     x1, rmm_ns_copy
        cmp     x0, x1
        b.lo    1f
        adr     x1, .Lns_copy_end
        cmp     x0, x1
        b.hs    1f
        adr     x1, .Lns_fault
    3:  msr     elr_el2, x1
        ldp     x0, x1, [sp], #16
        eret
        // An SME trap: FFR was only probed?
    2:  mrs     x0, elr_el2
        adr     x1, rmm_ffr_probe
        cmp     x0, x1
        adr     x1, rmm_ffr_probe_failed
        b.eq    3b
    1:  mov     x0, #0
        mov     x1, x30
        b       rmm_fatal_exception

    .balign 16
    .global rmm_ns_copy
    rmm_ns_copy:
        tbz     w3, #0, 5f
        lsl     x2, x2, #3
        cpyfp   [x0]!, [x1]!, x2!
        cpyfm   [x0]!, [x1]!, x2!
        cpyfe   [x0]!, [x1]!, x2!
        mov     x0, #0
        ret
    5:  subs    x2, x2, #8
        b.lo    2f
    1:  ldp     x3, x4, [x1]
        ldp     x5, x6, [x1, #16]
        ldp     x7, x8, [x1, #32]
        ldp     x9, x10, [x1, #48]
        stp     x3, x4, [x0]
        stp     x5, x6, [x0, #16]
        stp     x7, x8, [x0, #32]
        stp     x9, x10, [x0, #48]
        add     x1, x1, #64
        add     x0, x0, #64
        subs    x2, x2, #8
        b.hs    1b
    2:  adds    x2, x2, #8
        b.eq    4f
    3:  ldr     x3, [x1], #8
        str     x3, [x0], #8
        subs    x2, x2, #1
        b.ne    3b
    4:  mov     x0, #0
        ret
    .Lns_copy_end:
    .Lns_fault:
        mov     x0, #1
        ret

    // DC ZVA cannot be prohibited at EL2; its block is at most 2 KiB.
    .balign 16
    .global rmm_zero
    rmm_zero:
        mov     x2, #4096
        tbz     w1, #0, 1f
        setp    [x0]!, x2!, xzr
        setm    [x0]!, x2!, xzr
        sete    [x0]!, x2!, xzr
        ret
    1:  mrs     x3, dczid_el0
        and     x3, x3, #0xf
        mov     x4, #4
        lsl     x4, x4, x3
        add     x2, x0, x2
    2:  dc      zva, x0
        add     x0, x0, x4
        dc      zva, x0
        add     x0, x0, x4
        cmp     x0, x2
        b.lo    2b
        ret

    .balign 16
    .global rmm_guest_run
    rmm_guest_run:
        stp     x29, x30, [sp, #-112]!
        stp     x27, x28, [sp, #16]
        stp     x25, x26, [sp, #32]
        stp     x23, x24, [sp, #48]
        stp     x21, x22, [sp, #64]
        stp     x19, x20, [sp, #80]
        str     x0, [sp, #96]
        ldp     x30, x1, [x0, #(30 * 8)]
        ldr     x2, [x0, #(32 * 8)]
        msr     elr_el2, x1
        msr     spsr_el2, x2
        ldp     x28, x29, [x0, #(28 * 8)]
        ldp     x26, x27, [x0, #(26 * 8)]
        ldp     x24, x25, [x0, #(24 * 8)]
        ldp     x22, x23, [x0, #(22 * 8)]
        ldp     x20, x21, [x0, #(20 * 8)]
        ldp     x18, x19, [x0, #(18 * 8)]
        ldp     x16, x17, [x0, #(16 * 8)]
        ldp     x14, x15, [x0, #(14 * 8)]
        ldp     x12, x13, [x0, #(12 * 8)]
        ldp     x10, x11, [x0, #(10 * 8)]
        ldp     x8, x9, [x0, #(8 * 8)]
        ldp     x6, x7, [x0, #(6 * 8)]
        ldp     x4, x5, [x0, #(4 * 8)]
        ldp     x2, x3, [x0, #(2 * 8)]
        ldp     x0, x1, [x0]
        eret
        dsb     nsh
        isb

    // x0, x1 of the REC are on the stack, x1 is the kind; everything else is still the REC's.
    .Lguest_exit:
        ldr     x0, [sp, #(16 + 96)]
        stp     x2, x3, [x0, #(2 * 8)]
        ldp     x2, x3, [sp], #16
        stp     x4, x5, [x0, #(4 * 8)]
        stp     x6, x7, [x0, #(6 * 8)]
        stp     x8, x9, [x0, #(8 * 8)]
        stp     x10, x11, [x0, #(10 * 8)]
        stp     x12, x13, [x0, #(12 * 8)]
        stp     x14, x15, [x0, #(14 * 8)]
        stp     x16, x17, [x0, #(16 * 8)]
        stp     x18, x19, [x0, #(18 * 8)]
        stp     x20, x21, [x0, #(20 * 8)]
        stp     x22, x23, [x0, #(22 * 8)]
        stp     x24, x25, [x0, #(24 * 8)]
        stp     x26, x27, [x0, #(26 * 8)]
        stp     x28, x29, [x0, #(28 * 8)]
        mrs     x4, elr_el2
        mrs     x5, spsr_el2
        stp     x30, x4, [x0, #(30 * 8)]
        str     x5, [x0, #(32 * 8)]
        stp     x2, x3, [x0]
        mov     x0, x1
        ldp     x19, x20, [sp, #80]
        ldp     x21, x22, [sp, #64]
        ldp     x23, x24, [sp, #48]
        ldp     x25, x26, [sp, #32]
        ldp     x27, x28, [sp, #16]
        ldp     x29, x30, [sp], #112
        ret
    .popsection

    .pushsection .bss.emergency, "aw", @nobits
    .balign 16
    RMM_EMERGENCY_STACK:
        .space  {emergency}
    .popsection
    "#,
    stack_bit = const STACK_BIT,
    ns_bit = const NS_ALIAS_BIT,
    emergency = const 8192,
);
