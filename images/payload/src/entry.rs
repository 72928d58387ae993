//! The arm64 Image header, CPU entry, vectors, and the two calls that need assembly.

use core::arch::{asm, global_asm};

global_asm!(
    r#"
.section .text.header, "ax"
.global header
header:
    b       start
    .long   0
    .quad   0                   // text_offset
    .quad   __image_size
    .quad   0b1010              // little endian, 4 KiB pages, anywhere
    .quad   0
    .quad   0
    .quad   0
    .ascii  "ARM\x64"
    .long   0

start:
    mov     x20, x0
    ldr     x1, =__bss_start
    ldr     x2, =__bss_end
1:  cmp     x1, x2
    b.hs    2f
    stp     xzr, xzr, [x1], #16
    b       1b
2:  mov     x19, #0
    b       3f

// x0: CPU number.
.global secondary_start
secondary_start:
    mov     x19, x0
3:  ldr     x1, =payload_vectors
    msr     vbar_el2, x1
    isb
    ldr     x1, =__stacks
    add     x2, x19, #1
    add     x1, x1, x2, lsl #14
    mov     sp, x1
    mov     x0, x19
    cbnz    x19, 4f
    mov     x1, x20
    bl      primary
4:  bl      secondary

// Every exception: x0 = ESR, x1 = ELR, x2 = FAR; resumes where el2_exception says.
.macro vector
    .balign 128
    b       exception
.endm
.balign 2048
.global payload_vectors
payload_vectors:
.rept 16
    vector
.endr
exception:
    sub     sp, sp, #176
    stp     x0, x1, [sp]
    stp     x2, x3, [sp, #16]
    stp     x4, x5, [sp, #32]
    stp     x6, x7, [sp, #48]
    stp     x8, x9, [sp, #64]
    stp     x10, x11, [sp, #80]
    stp     x12, x13, [sp, #96]
    stp     x14, x15, [sp, #112]
    stp     x16, x17, [sp, #128]
    stp     x18, x29, [sp, #144]
    str     x30, [sp, #160]
    mrs     x0, esr_el2
    mrs     x1, elr_el2
    mrs     x2, far_el2
    bl      el2_exception
    msr     elr_el2, x0
    ldp     x0, x1, [sp]
    ldp     x2, x3, [sp, #16]
    ldp     x4, x5, [sp, #32]
    ldp     x6, x7, [sp, #48]
    ldp     x8, x9, [sp, #64]
    ldp     x10, x11, [sp, #80]
    ldp     x12, x13, [sp, #96]
    ldp     x14, x15, [sp, #112]
    ldp     x16, x17, [sp, #128]
    ldp     x18, x29, [sp, #144]
    ldr     x30, [sp, #160]
    add     sp, sp, #176
    eret

// x0: 31 register values, in and out. Every register goes into the call with a value of ours.
.global smc_all
smc_all:
    sub     sp, sp, #112
    stp     x19, x20, [sp]
    stp     x21, x22, [sp, #16]
    stp     x23, x24, [sp, #32]
    stp     x25, x26, [sp, #48]
    stp     x27, x28, [sp, #64]
    stp     x29, x30, [sp, #80]
    str     x0, [sp, #96]
    mov     x30, x0
    ldp     x0, x1, [x30]
    ldp     x2, x3, [x30, #16]
    ldp     x4, x5, [x30, #32]
    ldp     x6, x7, [x30, #48]
    ldp     x8, x9, [x30, #64]
    ldp     x10, x11, [x30, #80]
    ldp     x12, x13, [x30, #96]
    ldp     x14, x15, [x30, #112]
    ldp     x16, x17, [x30, #128]
    ldp     x18, x19, [x30, #144]
    ldp     x20, x21, [x30, #160]
    ldp     x22, x23, [x30, #176]
    ldp     x24, x25, [x30, #192]
    ldp     x26, x27, [x30, #208]
    ldp     x28, x29, [x30, #224]
    ldr     x30, [x30, #240]
    smc     #0
    str     x30, [sp, #104]
    ldr     x30, [sp, #96]
    stp     x0, x1, [x30]
    stp     x2, x3, [x30, #16]
    stp     x4, x5, [x30, #32]
    stp     x6, x7, [x30, #48]
    stp     x8, x9, [x30, #64]
    stp     x10, x11, [x30, #80]
    stp     x12, x13, [x30, #96]
    stp     x14, x15, [x30, #112]
    stp     x16, x17, [x30, #128]
    stp     x18, x19, [x30, #144]
    stp     x20, x21, [x30, #160]
    stp     x22, x23, [x30, #176]
    stp     x24, x25, [x30, #192]
    stp     x26, x27, [x30, #208]
    stp     x28, x29, [x30, #224]
    ldr     x0, [sp, #104]
    str     x0, [x30, #240]
    ldp     x19, x20, [sp]
    ldp     x21, x22, [sp, #16]
    ldp     x23, x24, [sp, #32]
    ldp     x25, x26, [sp, #48]
    ldp     x27, x28, [sp, #64]
    ldp     x29, x30, [sp, #80]
    add     sp, sp, #112
    ret
"#
);

/// SMC with up to three arguments; returns x0 to x3.
pub fn smc(fid: u64, a1: u64, a2: u64, a3: u64) -> [u64; 4] {
    let (r0, r1, r2, r3);
    // SAFETY: calls of this payload touch only memory that it does not use as Rust objects.
    unsafe {
        asm!(
            "smc #0",
            inout("x0") fid => r0, inout("x1") a1 => r1, inout("x2") a2 => r2, inout("x3") a3 => r3,
            out("x4") _, out("x5") _, out("x6") _, out("x7") _,
            options(nostack),
        );
    }
    [r0, r1, r2, r3]
}

/// The virtual counter around a call with one argument: with instruction counting, one tick is one
/// instruction. What the measurement itself costs is included.
pub fn timed_smc(fid: u64, a1: u64) -> (u64, u64) {
    let (before, after): (u64, u64);
    let result;
    // SAFETY: as for `smc`.
    unsafe {
        asm!(
            "isb", "mrs {before}, cntvct_el0", "smc #0", "mrs {after}, cntvct_el0",
            before = out(reg) before, after = out(reg) after,
            inout("x0") fid => result, inout("x1") a1 => _,
            out("x2") _, out("x3") _, out("x4") _, out("x5") _, out("x6") _, out("x7") _,
            options(nostack),
        );
    }
    (result, after - before)
}

/// What a call answered, and the virtual counter around it.
pub struct Answer {
    /// x0 to x4.
    pub x: [u64; 5],
    /// As the second value of [`timed_smc`].
    pub ticks: u64,
}

/// SMC with up to five arguments.
pub fn smc_timed(fid: u64, args: [u64; 5]) -> Answer {
    let mut x = [0; 5];
    let (before, after): (u64, u64);
    // SAFETY: as for `smc`.
    unsafe {
        asm!(
            "isb", "mrs {before}, cntvct_el0", "smc #0", "mrs {after}, cntvct_el0",
            before = out(reg) before, after = out(reg) after,
            inout("x0") fid => x[0], inout("x1") args[0] => x[1], inout("x2") args[1] => x[2],
            inout("x3") args[2] => x[3], inout("x4") args[3] => x[4], inout("x5") args[4] => _,
            out("x6") _, out("x7") _,
            options(nostack),
        );
    }
    Answer { x, ticks: after - before }
}

/// As [`timed_smc`], without a call: the cost of measuring.
pub fn timed_nothing() -> u64 {
    let (before, after): (u64, u64);
    // SAFETY: reads a counter.
    unsafe {
        asm!("isb", "mrs {0}, cntvct_el0", "mrs {1}, cntvct_el0", out(reg) before, out(reg) after, options(nostack));
    }
    after - before
}
