//! Exception entry and exit, and the world switch. Straight-line code: it runs on every call.

use core::arch::global_asm;

use crate::context;

global_asm!(
    r#"
// Which register is in which slot of Context::el2. Registers come in pairs; `op` is `save` or `load`.
.macro el2_common op
    \op cnthctl_el2, cntvoff_el2, 0
    \op cptr_el2,   elr_el2,     2
    \op esr_el2,    far_el2,     4
    \op hpfar_el2,  hstr_el2,    6
    \op mair_el2,   hcr_el2,     8
    \op spsr_el2,   sp_el2,      10
    \op tcr_el2,    mdcr_el2,    12
    \op sctlr_el2,  tpidr_el2,   14
    \op ttbr0_el2,  vbar_el2,    16
    \op vtcr_el2,   vttbr_el2,   18
    \op vmpidr_el2, vpidr_el2,   20
.endm

// What every CPU of today's models has, without asking for each.
.macro el2_usual op
    \op S3_4_C13_C0_1, S3_4_C2_C0_1, 22              // CONTEXTIDR_EL2, TTBR1_EL2
    \op S3_4_C12_C1_1, S3_4_C5_C2_3, 24              // VDISR_EL2, VSESR_EL2
    \op S3_4_C3_C1_4, S3_4_C3_C1_5, 26               // HDFGRTR_EL2, HDFGWTR_EL2
    \op S3_4_C1_C1_6, S3_4_C1_C1_4, 28               // HFGITR_EL2, HFGRTR_EL2
    \op S3_4_C1_C1_5, S3_4_C14_C0_6, 30              // HFGWTR_EL2, CNTPOFF_EL2
    \op S3_4_C13_C0_7, S3_4_C1_C2_2, 32              // SCXTNUM_EL2, HCRX_EL2
    \op S3_4_C2_C2_0, dbgvcr32_el2, 34               // VNCR_EL2, DBGVCR32_EL2
    \op S3_0_C2_C1_0, S3_0_C2_C1_1, 36               // APIAKey
    \op S3_0_C2_C1_2, S3_0_C2_C1_3, 38               // APIBKey
    \op S3_0_C2_C2_0, S3_0_C2_C2_1, 40               // APDAKey
    \op S3_0_C2_C2_2, S3_0_C2_C2_3, 42               // APDBKey
    \op S3_0_C2_C3_0, S3_0_C2_C3_1, 44               // APGAKey
.endm

.macro save a, b, slot
    mrs     x12, \a
    mrs     x13, \b
    stp     x12, x13, [x14, #(\slot * 8)]
.endm
.macro load a, b, slot
    ldp     x12, x13, [x15, #(\slot * 8)]
    msr     \a, x12
    msr     \b, x13
.endm
.macro save1 a, slot
    mrs     x12, \a
    str     x12, [x14, #(\slot * 8)]
.endm
.macro load1 a, slot
    ldr     x12, [x15, #(\slot * 8)]
    msr     \a, x12
.endm

// Bit numbers as in monitor::enables::feature.
.macro el2_features op, n
    tbz     x11, #18, 10\n\()f
    el2_usual \op
    b       11\n\()f
10\n\():
    bl      el2_gated_\op
11\n\():
    tbz     x11, #19, 12\n\()f
    bl      el2_other_\op
12\n\():
.endm

.macro el2_gated op, op1
    tbz     x11, #0, 1f
    \op     S3_4_C13_C0_1, S3_4_C2_C0_1, 22
1:  tbz     x11, #1, 1f
    \op     S3_4_C12_C1_1, S3_4_C5_C2_3, 24
1:  tbz     x11, #2, 1f
    \op     S3_4_C3_C1_4, S3_4_C3_C1_5, 26
    \op     S3_4_C1_C1_6, S3_4_C1_C1_4, 28
    \op1    S3_4_C1_C1_5, 30
1:  tbz     x11, #3, 1f
    \op1    S3_4_C14_C0_6, 31
1:  tbz     x11, #4, 1f
    \op1    S3_4_C13_C0_7, 32
1:  tbz     x11, #5, 1f
    \op1    S3_4_C1_C2_2, 33
1:  tbz     x11, #7, 1f
    \op1    S3_4_C2_C2_0, 34
1:  tbz     x11, #8, 1f
    \op1    dbgvcr32_el2, 35
1:  tbz     x11, #6, 1f
    \op     S3_0_C2_C1_0, S3_0_C2_C1_1, 36
    \op     S3_0_C2_C1_2, S3_0_C2_C1_3, 38
    \op     S3_0_C2_C2_0, S3_0_C2_C2_1, 40
    \op     S3_0_C2_C2_2, S3_0_C2_C2_3, 42
    \op     S3_0_C2_C3_0, S3_0_C2_C3_1, 44
1:  tbz     x11, #9, 2f
    tbz     x11, #10, 1f
    \op1    S3_4_C5_C6_0, 46                         // TFSR_EL2
1:  tbz     x11, #11, 1f
    \op     S3_4_C3_C1_0, S3_4_C3_C1_1, 48           // HDFGRTR2_EL2, HDFGWTR2_EL2
    \op     S3_4_C3_C1_2, S3_4_C3_C1_3, 50           // HFGRTR2_EL2, HFGWTR2_EL2
    \op1    S3_4_C3_C1_7, 47                         // HFGITR2_EL2
1:  tbz     x11, #12, 1f
    \op1    S3_4_C2_C0_3, 52                         // TCR2_EL2
1:  tbz     x11, #13, 1f
    \op1    S3_4_C1_C0_3, 53                         // SCTLR2_EL2
1:  tbz     x11, #14, 1f
    \op     S3_4_C10_C2_2, S3_4_C10_C2_3, 54         // PIRE0_EL2, PIR_EL2
1:  tbz     x11, #15, 1f
    \op1    S3_4_C10_C2_4, 56                        // POR_EL2
1:  tbz     x11, #16, 1f
    \op1    S3_4_C10_C2_5, 57                        // S2PIR_EL2
1:  tbz     x11, #17, 2f
    \op     S3_4_C2_C5_0, S3_4_C2_C5_1, 58           // GCSCR_EL2, GCSPR_EL2
2:  ret
.endm

.macro el2_other op, op1
    tbz     x11, #20, 1f
    \op     actlr_el2, afsr0_el2, 60
    \op     afsr1_el2, amair_el2, 62
    \op1    hacr_el2, 64
1:  tbz     x11, #21, 2f
    \op1    S3_4_C12_C9_5, 65                        // ICC_SRE_EL2
    \op1    S3_4_C12_C11_0, 66                       // ICH_HCR_EL2
    \op1    S3_4_C12_C11_7, 67                       // ICH_VMCR_EL2
2:  ret
.endm

.macro load_world context, n
    mov     sp, \context
    add     x15, sp, #{EL2}
    el2_common load
    el2_features load, \n
    ldp     x12, x13, [sp, #{SP_EL0}]
    msr     sp_el0, x12
    msr     elr_el3, x13
    ldp     x12, x13, [sp, #{SPSR_EL3}]
    msr     spsr_el3, x12
    msr     scr_el3, x13
.endm

.section .text.vectors, "ax"

// A vector that should never be taken. SP may be the problem, so the registers go to this CPU's crash area,
// which TPIDR_EL3 knows; x0 waits in SP_EL0, whose owner will not run again.
.macro fatal_vector n
    .balign 128
    msr     sp_el0, x0
    mrs     x0, tpidr_el3
    str     x1, [x0, #8]
    mov     x1, #\n
    b       fatal_entry
.endm

.balign 2048
.global vectors
vectors:
    fatal_vector 0
    fatal_vector 1
    fatal_vector 2
    fatal_vector 3
    fatal_vector 4
    fatal_vector 5
    fatal_vector 6
    fatal_vector 7
    .balign 128
    stp     x0, x1, [sp]
    stp     x2, x3, [sp, #16]
    stp     x4, x5, [sp, #32]
    stp     x6, x7, [sp, #48]
    stp     x8, x9, [sp, #64]
    stp     x10, x11, [sp, #80]
    stp     x12, x13, [sp, #96]
    stp     x14, x15, [sp, #112]
    stp     x16, x17, [sp, #128]
    stp     x18, x19, [sp, #144]
    stp     x20, x21, [sp, #160]
    stp     x22, x23, [sp, #176]
    stp     x24, x25, [sp, #192]
    stp     x26, x27, [sp, #208]
    stp     x28, x29, [sp, #224]
    str     x30, [sp, #240]
    mov     x0, sp
    bl      el3_sync
    cbnz    x0, world_switch
    b       el3_exit
    fatal_vector 9
    fatal_vector 10
    fatal_vector 11
    fatal_vector 12
    fatal_vector 13
    fatal_vector 14
    fatal_vector 15

.balign 64
// x0: 1 to Realm with x0-x7, 2 to Normal with x1-x8 as x0-x7, 3 to Normal with x1-x5 as x0-x4, 4 to Normal as its
// context is.
world_switch:
    mov     x9, sp
    ldr     x10, [x9, #{PEER}]
    adrp    x11, FEATURES
    ldr     x11, [x11, :lo12:FEATURES]
    mrs     x12, sp_el0
    mrs     x13, elr_el3
    stp     x12, x13, [x9, #{SP_EL0}]
    mrs     x12, spsr_el3
    str     x12, [x9, #{SPSR_EL3}]
    add     x14, x9, #{EL2}
    el2_common save
    el2_features save, 1
    load_world x10, 2
    cmp     x0, #2
    b.hi    3f
    b.eq    2f
    ldp     x0, x1, [x9]
    ldp     x2, x3, [x9, #16]
    ldp     x4, x5, [x9, #32]
    ldp     x6, x7, [x9, #48]
    b       exit_with_args
2:  ldp     x0, x1, [x9, #8]
    ldp     x2, x3, [x9, #24]
    ldp     x4, x5, [x9, #40]
    ldp     x6, x7, [x9, #56]
    b       exit_with_args
3:  cmp     x0, #3
    b.ne    el3_exit
    ldp     x0, x1, [x9, #8]
    ldp     x2, x3, [x9, #24]
    ldr     x4, [x9, #40]
    ldr     x5, [sp, #40]
    ldp     x6, x7, [sp, #48]
    b       exit_with_args

// x0: a context. Enters its world.
.global enter_world
enter_world:
    adrp    x11, FEATURES
    ldr     x11, [x11, :lo12:FEATURES]
    load_world x0, 3
el3_exit:
    ldp     x0, x1, [sp]
    ldp     x2, x3, [sp, #16]
    ldp     x4, x5, [sp, #32]
    ldp     x6, x7, [sp, #48]
exit_with_args:
    ldp     x8, x9, [sp, #64]
    ldp     x10, x11, [sp, #80]
    ldp     x12, x13, [sp, #96]
    ldp     x14, x15, [sp, #112]
    ldp     x16, x17, [sp, #128]
    ldp     x18, x19, [sp, #144]
    ldp     x20, x21, [sp, #160]
    ldp     x22, x23, [sp, #176]
    ldp     x24, x25, [sp, #192]
    ldp     x26, x27, [sp, #208]
    ldp     x28, x29, [sp, #224]
    ldr     x30, [sp, #240]
    eret
    // No speculation past the return.
    dsb     nsh
    isb

el2_gated_save:
    el2_gated save, save1
el2_gated_load:
    el2_gated load, load1
el2_other_save:
    el2_other save, save1
el2_other_load:
    el2_other load, load1

fatal_entry:
    stp     x2, x3, [x0, #16]
    stp     x4, x5, [x0, #32]
    stp     x6, x7, [x0, #48]
    stp     x8, x9, [x0, #64]
    stp     x10, x11, [x0, #80]
    stp     x12, x13, [x0, #96]
    stp     x14, x15, [x0, #112]
    stp     x16, x17, [x0, #128]
    stp     x18, x19, [x0, #144]
    stp     x20, x21, [x0, #160]
    stp     x22, x23, [x0, #176]
    stp     x24, x25, [x0, #192]
    stp     x26, x27, [x0, #208]
    stp     x28, x29, [x0, #224]
    str     x30, [x0, #240]
    mrs     x2, sp_el0
    str     x2, [x0]
    mov     sp, x0
    b       el3_fatal
"#,
    SP_EL0 = const context::SP_EL0,
    SPSR_EL3 = const context::SPSR_EL3,
    PEER = const context::PEER,
    EL2 = const context::EL2,
);
