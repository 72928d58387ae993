//! The first instructions, cold and warm, and the switch to the final tables.
//!
//! A cold boot needs a cacheable mapping before any Rust runs (atomics are undefined without one), so the entry
//! makes a throw-away table of 1 GiB blocks that cover the image and EL3's shared page. Its own table page is
//! the only memory written with the MMU off. Every later CPU takes the final tables from [`BootState`].

use crate::layout::SLOT_SIZE;
use core::arch::global_asm;
use core::cell::UnsafeCell;

/// What a warm boot loads with the MMU off. Written once by the primary and cleaned to memory.
#[repr(C, align(64))]
pub(crate) struct BootState {
    pub(crate) ready: u64,
    pub(crate) ttbr: u64,
    pub(crate) tcr: u64,
    pub(crate) mair: u64,
    pub(crate) sctlr: u64,
    pub(crate) slots: u64,
    pub(crate) cpus: u64,
}

/// [`BootState`] as the entry code finds it.
#[repr(transparent)]
pub(crate) struct BootStateCell(UnsafeCell<BootState>);

// SAFETY: written by the primary CPU before any other CPU enters the image, read-only afterwards.
unsafe impl Sync for BootStateCell {}

#[unsafe(no_mangle)]
#[unsafe(link_section = ".data.boot")]
static RMM_BOOT_STATE: BootStateCell = BootStateCell(UnsafeCell::new(BootState {
    ready: 0,
    ttbr: 0,
    tcr: 0,
    mair: 0,
    sctlr: 0,
    slots: 0,
    cpus: 0,
}));

/// The boot state, once it has been published.
pub(crate) fn boot_state() -> &'static BootState {
    // SAFETY: see `BootStateCell`.
    unsafe { &*RMM_BOOT_STATE.0.get() }
}

/// Publishes the boot state to CPUs that read it with the MMU off.
///
/// # Safety
/// Only during the primary's boot, before `boot_state` is used.
pub(crate) unsafe fn publish(state: BootState) {
    // SAFETY: the caller is the only one running. The clean covers the object's one cache line.
    unsafe {
        let cell = RMM_BOOT_STATE.0.get();
        cell.write(state);
        core::arch::asm!("dsb ish", "dc civac, {}", "dsb sy", in(reg) cell, options(nostack));
    }
}

const _: () = assert!(size_of::<BootState>() == 64);

/// The primary's stack until the final tables exist; same shape as a CPU's slot.
#[repr(C, align(65536))]
struct BootStack(UnsafeCell<[u8; SLOT_SIZE as usize]>);
// SAFETY: used only as the primary's stack.
unsafe impl Sync for BootStack {}
#[unsafe(no_mangle)]
static RMM_BOOT_STACK: BootStack = BootStack(UnsafeCell::new([0; SLOT_SIZE as usize]));

/// The throw-away table; in .data so that clearing .bss does not touch it.
#[repr(C, align(4096))]
struct BootTable(UnsafeCell<[u64; 512]>);
// SAFETY: used only by the entry code below.
unsafe impl Sync for BootTable {}
#[unsafe(no_mangle)]
#[unsafe(link_section = ".data.boot")]
static RMM_BOOT_TABLE: BootTable = BootTable(UnsafeCell::new([0; 512]));

unsafe extern "C" {
    /// Leaves the current tables for the final ones and continues in `next(argument)` on a new stack.
    /// Changing from blocks to pages under a running program is only allowed with the MMU off.
    pub(crate) fn rmm_switch_tables(
        ttbr: u64,
        tcr: u64,
        sctlr: u64,
        stack: u64,
        next: extern "C" fn(u64) -> !,
        argument: u64,
    ) -> !;
}

global_asm!(
    r#"
    .pushsection .text.entry, "ax"
    .global rmm_entry
    rmm_entry:
        // RW, E2H; the RMM never leaves this mode, thus EL1 registers are always reached by their EL12 names.
        mov     x9, #(1 << 31)
        orr     x9, x9, #(1 << 34)
        msr     hcr_el2, x9
        isb
        // Vector registers: trap. The layout of CPTR_EL2 is the E2H one from here on.
        mov     x9, #(1 << 28)
        msr     cptr_el2, x9
        adrp    x9, rmm_vectors
        add     x9, x9, :lo12:rmm_vectors
        msr     vbar_el2, x9
        msr     spsel, #1
        msr     daifset, #0xf
        tlbi    alle2
        // VMIDs start without a past.
        tlbi    alle1
        ic      iallu
        dsb     nsh
        isb
        adrp    x9, RMM_BOOT_STATE
        add     x9, x9, :lo12:RMM_BOOT_STATE
        ldr     x10, [x9]
        cbnz    x10, .Lwarm

        // ---- cold: x0 cpu, x1 version, x2 cpus, x3 shared page, x4 token
        mov     x19, x0
        mov     x20, x1
        mov     x21, x2
        mov     x22, x3
        mov     x23, x4
        adrp    x24, rmm_image_start
        // Boot table: the GiB of the image, of the carve-out's end and of the shared page.
        adrp    x9, RMM_BOOT_TABLE
        add     x9, x9, :lo12:RMM_BOOT_TABLE
        mov     x10, x24
        bl      .Lblock
        mov     x10, #0x1800000
        add     x10, x24, x10
        bl      .Lblock
        mov     x10, x22
        bl      .Lblock
        // The page may be stale in a cache from an earlier life; drop those lines, our stores bypassed them.
        mov     x10, #0
    1:  add     x11, x9, x10
        dc      ivac, x11
        add     x10, x10, #16
        cmp     x10, #4096
        b.lo    1b
        dsb     sy

        // 39-bit addresses: the walk starts at the level of 1 GiB blocks.
        mov     x10, #0x3519
        movk    x10, #0x8099, lsl #16
        mrs     x11, id_aa64mmfr0_el1
        and     x11, x11, #0xf
        mov     x12, #5
        cmp     x11, x12
        csel    x11, x11, x12, lo
        orr     x10, x10, x11, lsl #32
        msr     tcr_el2, x10
        mov     x10, #0x04ff
        msr     mair_el2, x10
        msr     ttbr0_el2, x9
        isb
        // M, C, I, SA without WXN: the boot block is writable and executable for these few instructions.
        movz    x10, #0x30c5, lsl #16
        movk    x10, #0x183d
        msr     sctlr_el2, x10
        isb

        // .bss
        adrp    x9, rmm_bss_start
        add     x9, x9, :lo12:rmm_bss_start
        adrp    x10, rmm_bss_end
        add     x10, x10, :lo12:rmm_bss_end
    2:  cmp     x9, x10
        b.hs    3f
        stp     xzr, xzr, [x9], #16
        b       2b
    3:
        // Relocations: entries of (offset, type, addend), R_AARCH64_RELATIVE (1027) only.
        adrp    x9, rmm_rela_start
        add     x9, x9, :lo12:rmm_rela_start
        adrp    x10, rmm_rela_end
        add     x10, x10, :lo12:rmm_rela_end
    4:  cmp     x9, x10
        b.hs    6f
        ldp     x11, x12, [x9], #16
        ldr     x13, [x9], #8
        cmp     w12, #1027
        b.ne    5f
        add     x13, x13, x24
        str     x13, [x24, x11]
        b       4b
    5:  wfi
        b       5b
    6:
        dsb     ish
        isb
        adrp    x9, RMM_BOOT_STACK
        add     x9, x9, :lo12:RMM_BOOT_STACK
        add     sp, x9, #{slot}
        mov     x0, x19
        mov     x1, x20
        mov     x2, x21
        mov     x3, x22
        mov     x4, x23
        mov     x29, xzr
        mov     x30, xzr
        bl      rmm_cold_start

        // One 1 GiB block for the address in x10, table in x9.
    .Lblock:
        lsr     x11, x10, #30
        cmp     x11, #511
        b.hi    7f
        mov     x12, #0x701
        movk    x12, #0x40, lsl #48
        orr     x12, x12, x11, lsl #30
        str     x12, [x9, x11, lsl #3]
    7:  ret

        // ---- warm: x0 cpu, x1 token, x9 boot state
    .Lwarm:
        ldp     x10, x11, [x9, #8]
        ldp     x12, x13, [x9, #24]
        ldp     x14, x15, [x9, #40]
        cmp     x0, x15
        b.hs    8f
        msr     ttbr0_el2, x10
        msr     tcr_el2, x11
        msr     mair_el2, x12
        isb
        msr     sctlr_el2, x13
        isb
        add     x9, x0, #1
        mov     x10, #{slot}
        madd    x9, x9, x10, x14
        mov     sp, x9
        mov     x29, xzr
        mov     x30, xzr
        bl      rmm_warm_start
        // BOOT_COMPLETE: CPU index out of range.
    8:  mov     x1, #-4
        movz    x0, #0xc400, lsl #16
        movk    x0, #0x01cf
        smc     #0
    9:  wfi
        b       9b

    .global rmm_switch_tables
    rmm_switch_tables:
        mrs     x9, sctlr_el2
        bic     x9, x9, #1
        dsb     sy
        msr     sctlr_el2, x9
        isb
        msr     ttbr0_el2, x0
        msr     tcr_el2, x1
        isb
        tlbi    alle2
        dsb     nsh
        isb
        msr     sctlr_el2, x2
        isb
        mov     sp, x3
        mov     x0, x5
        mov     x29, xzr
        mov     x30, xzr
        br      x4
    .popsection
    "#,
    slot = const SLOT_SIZE,
);
