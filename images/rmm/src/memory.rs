//! `memcpy` and `memset` for compiled code, in three instructions where the CPU has FEAT_MOPS.
//!
//! The compiler's own versions are weak and step aside.

use core::arch::global_asm;
use core::sync::atomic::AtomicBool;

/// FEAT_MOPS is there. False until the primary has looked.
#[unsafe(no_mangle)]
pub(crate) static RMM_MOPS: AtomicBool = AtomicBool::new(false);

global_asm!(
    r#"
    .arch_extension mops
    .pushsection .text.memory, "ax"
    .balign 16
    .global memcpy
    memcpy:
        adrp    x3, RMM_MOPS
        ldrb    w3, [x3, :lo12:RMM_MOPS]
        mov     x4, x0
        cbz     w3, 1f
        cpyfp   [x4]!, [x1]!, x2!
        cpyfm   [x4]!, [x1]!, x2!
        cpyfe   [x4]!, [x1]!, x2!
        ret
    1:  orr     x3, x0, x1
        tst     x3, #7
        b.ne    3f
    2:  subs    x2, x2, #8
        b.lo    4f
        ldr     x3, [x1], #8
        str     x3, [x4], #8
        b       2b
    4:  add     x2, x2, #8
    3:  cbz     x2, 5f
        ldrb    w3, [x1], #1
        strb    w3, [x4], #1
        sub     x2, x2, #1
        b       3b
    5:  ret

    .balign 16
    .global memset
    memset:
        adrp    x3, RMM_MOPS
        ldrb    w3, [x3, :lo12:RMM_MOPS]
        mov     x4, x0
        cbz     w3, 1f
        setp    [x4]!, x2!, x1
        setm    [x4]!, x2!, x1
        sete    [x4]!, x2!, x1
        ret
    1:  and     x1, x1, #0xff
        mov     x3, #0x0101010101010101
        mul     x1, x1, x3
        tst     x0, #7
        b.ne    3f
    2:  subs    x2, x2, #8
        b.lo    4f
        str     x1, [x4], #8
        b       2b
    4:  add     x2, x2, #8
    3:  cbz     x2, 5f
        strb    w1, [x4], #1
        sub     x2, x2, #1
        b       3b
    5:  ret
    .popsection
    "#
);
