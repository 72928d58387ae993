//! From reset to Rust.
//!
//! All CPUs start at address 0, in flash, with the MMU off. The first one copies the image to secure RAM; the
//! others wait in flash until that is done, then in RAM until they are released. Every CPU has its translation
//! on before it runs Rust, because atomics are not defined without.

use core::arch::global_asm;

use crate::context;
use crate::layout;
use crate::pagetable;

global_asm!(
    r#"
.section .text.reset, "ax"
.global reset
reset:
    adr     x0, vectors
    msr     vbar_el3, x0
    ldr     x0, ={SCTLR_OFF}
    msr     sctlr_el3, x0
    // RW and NS: no access here depends on them, but SCR_EL3.RW resets to AArch32.
    mov     x0, #0x431
    msr     scr_el3, x0
    isb
    mrs     x0, mpidr_el1
    and     x0, x0, #0xffff
    cbnz    x0, 5f

    // The first CPU.
    ldr     x0, =__hold
    str     xzr, [x0]
    ldr     x0, =__text_start
    ldr     x1, =__text_end
    mov     x2, #0
    bl      copy
    ldr     x0, =__rodata_start
    ldr     x1, =__rodata_end
    ldr     x2, =__rodata_load
    bl      copy
    ldr     x0, =__data_start
    ldr     x1, =__data_end
    ldr     x2, =__data_load
    bl      copy
    ldr     x0, =__bss_start
    ldr     x1, =__bss_end
4:  cmp     x0, x1
    b.hs    4f
    stp     xzr, xzr, [x0], #16
    b       4b
4:  dsb     sy
    ic      iallu
    dsb     sy
    isb
    ldr     x0, =__hold
    ldr     x1, ={HOLD_MAGIC}
    str     x1, [x0]
    dc      civac, x0
    dsb     sy
    sev
    mov     x19, #0
    ldr     x0, =cpu_start
    br      x0

    // The others.
5:  ldr     x0, =__hold
    ldr     x2, ={HOLD_MAGIC}
6:  ldr     x1, [x0]
    cmp     x1, x2
    b.eq    7f
    wfe
    b       6b
7:  ldr     x0, =cpu_park
    isb
    br      x0

// Zeroes x1 bytes of Root memory at x0, with translation off: EL3's tables do not reach all of DRAM. x1 is a
// multiple of 64.
.section .text.scrub, "ax"
.global scrub_root
scrub_root:
    mrs     x2, sctlr_el3
    bic     x3, x2, #1
    dsb     sy
    msr     sctlr_el3, x3
    isb
    add     x1, x0, x1
1:  cmp     x0, x1
    b.hs    2f
    stp     xzr, xzr, [x0], #16
    stp     xzr, xzr, [x0], #16
    stp     xzr, xzr, [x0], #16
    stp     xzr, xzr, [x0], #16
    b       1b
2:  dsb     sy
    msr     sctlr_el3, x2
    isb
    ret

.section .text.reset, "ax"
copy:
    cmp     x0, x1
    b.hs    1f
    ldp     x3, x4, [x2], #16
    stp     x3, x4, [x0], #16
    b       copy
1:  ret

// Waits, with translation off, until this CPU's release word is not zero. The wait is a WFI, not a spin:
// parked CPUs must not take the emulator's time from those that work. Whoever writes the word also sends SGI
// 15, which is in Group 0 (EL3's own) on a parked CPU and on no other.
.section .text.park, "ax"
.global cpu_park
cpu_park:
    msr     daifset, #15
    ldr     x0, ={SCTLR_OFF}
    msr     sctlr_el3, x0
    isb
    mrs     x19, mpidr_el1
    and     x0, x19, #0xff
    ubfx    x19, x19, #8, #8
    add     x19, x0, x19, lsl #4
    cmp     x19, #{MAX_CPUS}
    b.hs    9f
    // Own redistributor: awake, SGI 15 in Group 0 and enabled.
    ldr     x2, ={GICR}
    add     x2, x2, x19, lsl #17
    ldr     w3, [x2, #0x14]
    bic     w3, w3, #2
    str     w3, [x2, #0x14]
1:  ldr     w3, [x2, #0x14]
    tbnz    w3, #2, 1b
    add     x2, x2, #0x10, lsl #12
    ldr     w3, [x2, #0x80]
    bic     w3, w3, #(1 << {WAKE_SGI})
    str     w3, [x2, #0x80]
    ldr     w3, [x2, #0xd00]
    bic     w3, w3, #(1 << {WAKE_SGI})
    str     w3, [x2, #0xd00]
    mov     w3, #(1 << {WAKE_SGI})
    str     w3, [x2, #0x100]
    mov     x3, #0xf
    msr     S3_6_C12_C12_5, x3      // ICC_SRE_EL3
    isb
    mov     x3, #0xff
    msr     S3_0_C4_C6_0, x3        // ICC_PMR_EL1
    mov     x3, #1
    msr     S3_0_C12_C12_6, x3      // ICC_IGRPEN0_EL1
    isb
    ldr     x0, =RELEASE
    add     x0, x0, x19, lsl #6
1:  ldr     x1, [x0]
    cbnz    x1, 2f
    dsb     sy
    wfi
    b       1b
2:  str     xzr, [x0]
    dsb     sy
    mrs     x1, S3_0_C12_C8_0       // ICC_IAR0_EL1
    cmp     w1, #1020
    b.hs    3f
    msr     S3_0_C12_C8_1, x1       // ICC_EOIR0_EL1
3:  msr     S3_0_C12_C12_6, xzr
    isb
    b       cpu_start
9:  wfi
    b       9b

// x19: CPU number. Runs in RAM.
cpu_start:
    ldr     x0, =vectors
    msr     vbar_el3, x0
    ldr     x0, ={MAIR}
    msr     mair_el3, x0
    ldr     x0, ={TCR}
    // Physical address size from the CPU.
    mrs     x1, id_aa64mmfr0_el1
    and     x1, x1, #7
    bfi     x0, x1, #16, #3
    msr     tcr_el3, x0
    ldr     x0, =L1_TABLE
    msr     ttbr0_el3, x0
    tlbi    alle3
    dsb     sy
    isb
    ldr     x0, ={SCTLR_ON}
    msr     sctlr_el3, x0
    isb
    ldr     x0, ={CPUS}
    ldr     x1, ={CPU_BLOCK_SIZE}
    madd    x1, x19, x1, x0
    add     x0, x1, #{CRASH_AREA_HI}, lsl #12
    add     x0, x0, #{CRASH_AREA_LO}
    msr     tpidr_el3, x0
    add     x0, x1, #{NORMAL_HI}, lsl #12
    add     x0, x0, #{NORMAL_LO}
    msr     spsel, #1
    mov     sp, x0
    mov     x2, x0
    mov     x0, x19
    b       el3_main
"#,
    SCTLR_OFF = const pagetable::SCTLR_EL3_OFF,
    SCTLR_ON = const pagetable::SCTLR_EL3_ON,
    MAIR = const pagetable::MAIR_EL3,
    TCR = const pagetable::TCR_EL3,
    HOLD_MAGIC = const 0x6b76_6d2d_7265_616c_u64,
    GICR = const layout::GICR,
    WAKE_SGI = const layout::WAKE_SGI,
    MAX_CPUS = const monitor::MAX_CPUS,
    CPUS = const layout::CPUS,
    CPU_BLOCK_SIZE = const context::CPU_BLOCK_SIZE,
    CRASH_AREA_HI = const context::CRASH_AREA >> 12,
    CRASH_AREA_LO = const context::CRASH_AREA & 0xFFF,
    NORMAL_HI = const context::NORMAL_CONTEXT >> 12,
    NORMAL_LO = const context::NORMAL_CONTEXT & 0xFFF,
);
