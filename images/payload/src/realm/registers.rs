//! Does every register of a REC survive what happens between two of its entries: other Realms, other CPUs, the host?

use core::arch::{asm, global_asm};
use core::ops::ControlFlow;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use cca_abi::rmi::{ExitReason, enter_flags};

use super::build::{Event, Realm, Wish};
use super::cpu;
use super::guest::{SHARED, done, expect, step};
use crate::{check, expect as host_expect};

/// EL1 and EL0 registers that a Realm can write, by name, with what is written from a seed.
macro_rules! registers {
    ($do:ident) => {
        $do! {
            "sp_el0" |s| s; "elr_el1" |s| s; "spsr_el1" |s| s & 0xF000_03C5;
            // Bits without an effect with the MMU off: UCI, DZE, UCT, UMA.
            "sctlr_el1" |s| 0x00C5_0878 | s & (1 << 26 | 1 << 14 | 1 << 15 | 1 << 9);
            "cpacr_el1" |s| 3 << 20 | 3 << 16 | s & 1 << 28;
            "ttbr0_el1" |s| s & !1; "ttbr1_el1" |s| s & !1; "tcr_el1" |s| s & 0x7F_FFFF_FFFF;
            "esr_el1" |s| s & 0xFFFF_FFFF; "afsr0_el1" |s| s; "afsr1_el1" |s| s; "far_el1" |s| s;
            "mair_el1" |s| s; "amair_el1" |s| s; "contextidr_el1" |s| s & 0xFFFF_FFFF;
            "tpidr_el0" |s| s; "tpidrro_el0" |s| s; "tpidr_el1" |s| s; "par_el1" |s| s & 0x0000_FFFF_FFFF_F000;
            "csselr_el1" |s| s & 7; "mdscr_el1" |s| 1 << 12 | s & 1 << 13; "actlr_el1" |s| s;
            "S3_0_C12_C1_1" |s| s & 0x1FF_FFFF; // DISR_EL1
            "cntkctl_el1" |s| s & 0x303; "cntv_cval_el0" |s| s | 1 << 62; "cntp_cval_el0" |s| s | 1 << 62;
            "cntv_ctl_el0" |s| 2 | s & 1; "cntp_ctl_el0" |s| 2 | s & 1;
            // APIA, APIB, APDA, APDB, APGA keys.
            "S3_0_C2_C1_0" |s| s; "S3_0_C2_C1_1" |s| s; "S3_0_C2_C1_2" |s| s; "S3_0_C2_C1_3" |s| s;
            "S3_0_C2_C2_0" |s| s; "S3_0_C2_C2_1" |s| s; "S3_0_C2_C2_2" |s| s; "S3_0_C2_C2_3" |s| s;
            "S3_0_C2_C3_0" |s| s; "S3_0_C2_C3_1" |s| s;
            // ICC_PMR_EL1, ICC_BPR1_EL1, ICC_IGRPEN1_EL1.
            "S3_0_C4_C6_0" |s| s & 0xF8; "S3_0_C12_C12_3" |s| s & 7; "S3_0_C12_C12_7" |s| s & 1;
            "dbgbvr0_el1" |s| s & 0xFFFF_FFFF_FFFC; "dbgbvr1_el1" |s| s & 0xFFFF_FFFF_FFFC;
            "dbgbcr0_el1" |s| s & 0x1E6; "dbgwvr0_el1" |s| s & 0xFFFF_FFFF_FFF8; "dbgwvr1_el1" |s| s & 0xFFFF_FFFF_FFF8;
            "dbgwcr0_el1" |s| s & 0x1FFE; "osdlr_el1" |s| s & 1; "mdccint_el1" |s| s & 3 << 29;
            "S3_3_C4_C4_0" |s| s & 0x07C0_0000; // FPCR
            "S3_3_C4_C4_1" |s| s & 0xF800_009F; // FPSR
        }
    };
}

const COUNT: usize = 51;

/// Gives every register a value made of `seed` if asked to, and reads them all.
fn access(seed: Option<u64>, seen: &mut [u64; COUNT]) -> usize {
    let mut n = 0;
    macro_rules! go {
        ($($name:literal |$s:ident| $value:expr;)*) => {$(
            if let Some(slot) = seen.get_mut(n) {
                // SAFETY: registers that the program does not depend on.
                unsafe {
                    if let Some(seed) = seed {
                        let $s: u64 = seed.rotate_left(n as u32 * 7) ^ (n as u64) << 32;
                        let value: u64 = $value;
                        asm!(concat!("msr ", $name, ", {}"), "isb", in(reg) value, options(nostack));
                    }
                    asm!(concat!("mrs {}, ", $name), out(reg) *slot, options(nostack));
                }
            }
            n += 1;
        )*};
    }
    registers!(go);
    n
}

const NAMES: [&str; COUNT] = {
    let mut names = [""; COUNT];
    let mut n = 0;
    macro_rules! name {
        ($($name:literal |$s:ident| $value:expr;)*) => {$(
            if n < COUNT { names[n] = $name; }
            n += 1;
        )*};
    }
    registers!(name);
    names
};

/// Of a timer's control, ISTATUS may change by itself.
fn stable(name: &str, value: u64) -> u64 {
    if name.contains("_ctl_") { value & 3 } else { value }
}

extern "C" fn program(seed: u64) {
    let mut written = [0; COUNT];
    let mut seen = [0; COUNT];
    for round in 0..2u64 {
        let vbar: u64;
        // SAFETY: reads a register.
        unsafe { asm!("mrs {}, vbar_el1", out(reg) vbar, options(nostack)) };
        let count = access(Some(if round == 0 { seed } else { !seed }), &mut written);
        // SAFETY: claim tags, the OS lock; lifts the lock at the end.
        let claimed = unsafe {
            asm!("msr dbgclaimclr_el1, {}", "msr dbgclaimset_el1, {}", "msr oslar_el1, {}",
                in(reg) 0xFF_u64, in(reg) seed >> round & 0xFF, in(reg) 1_u64, options(nostack));
            claim_tags()
        };
        step(round, [0, 0]);
        access(None, &mut seen);
        // SAFETY: as above.
        let (tags, lock, vbar_now) = unsafe {
            let (lock, vbar_now): (u64, u64);
            asm!("mrs {}, oslsr_el1", "mrs {}, vbar_el1", out(reg) lock, out(reg) vbar_now, options(nostack));
            asm!("msr oslar_el1, xzr", "msr osdlr_el1, xzr", "isb", options(nostack));
            (claim_tags(), lock >> 1 & 1, vbar_now)
        };
        expect("register-table", count as u64, COUNT as u64);
        for n in 0..COUNT {
            expect(NAMES[n], stable(NAMES[n], seen[n]), stable(NAMES[n], written[n]));
        }
        // Some registers hold nothing on this CPU; most do.
        expect(
            "registers-hold-something",
            u64::from(written.iter().filter(|&&value| value != 0).count() > 40),
            1,
        );
        expect("dbgclaim", tags, claimed);
        expect("claimed", claimed, seed >> round & 0xFF);
        expect("os-lock", lock, 1);
        expect("vbar_el1", vbar_now, vbar);
        general_registers();
    }
    done();
}

fn claim_tags() -> u64 {
    let tags;
    // SAFETY: reads a register.
    unsafe { asm!("mrs {}, dbgclaimclr_el1", out(reg) tags, options(nostack)) };
    tags
}

global_asm!(
    r#"
.section .text.realm_registers, "ax"
// x0: 31 values to load; x1: where to put what is found after an access to the address in value 30.
.global realm_general_registers
realm_general_registers:
    sub     sp, sp, #128
    stp     x19, x20, [sp]
    stp     x21, x22, [sp, #16]
    stp     x23, x24, [sp, #32]
    stp     x25, x26, [sp, #48]
    stp     x27, x28, [sp, #64]
    stp     x29, x30, [sp, #80]
    str     x1, [sp, #96]
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
    str     x7, [x30]
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
    add     sp, sp, #128
    ret
"#
);

unsafe extern "C" {
    fn realm_general_registers(values: *const u64, seen: *mut u64);
}

/// A store that the host emulates changes no register.
fn general_registers() {
    let mut values: [u64; 31] = core::array::from_fn(|n| 0xABCD_0000_0000_0000 | n as u64);
    values[30] = SHARED;
    let mut seen = [0; 31];
    // SAFETY: the routine reads and writes 31 words each, and stores to a device that the host has.
    unsafe { realm_general_registers(values.as_ptr(), seen.as_mut_ptr()) };
    for n in 0..31 {
        expect("general-register", seen[n], values[n]);
    }
}

/// Lets a REC go on until its next step or end; a device access on the way is the host's to emulate.
fn resume(realm: &Realm) -> ControlFlow<(), Event> {
    loop {
        match realm.enter(0)? {
            Event::Exit(ExitReason::Sync) => {
                host_expect("realm-stores-to-a-device", realm.exit_gpr(0, 0), 0xABCD_0000_0000_0007);
                realm.set_flags(0, enter_flags::EMUL_MMIO);
            }
            Event::Exit(ExitReason::Irq) => {}
            other => return ControlFlow::Continue(other),
        }
    }
}

/// The REC for another CPU.
static MOVING: AtomicU64 = AtomicU64::new(0);

extern "C" fn elsewhere() {
    let realm = core::ptr::with_exposed_provenance::<Realm>(MOVING.load(Relaxed) as usize);
    // SAFETY: `suite` waits, and does not touch the Realm meanwhile.
    if let ControlFlow::Continue(Event::Step(1, _)) = resume(unsafe { &*realm }) {
        MOVING.store(0, Relaxed);
    }
}

/// Two Realms, one step each in turn; then one of them goes on at another CPU.
pub(super) fn suite() -> ControlFlow<()> {
    let first = Realm::new(Wish::default(), program, 0x0123_4567_89AB_CDEF)?;
    let second = Realm::new(Wish { slot: 1, ..Wish::default() }, program, 0xFEDC_BA98_7654_3210)?;
    first.step(0)?;
    second.step(0)?;
    MOVING.store((&raw const first).expose_provenance() as u64, Relaxed);
    if cpu::run_on(1, elsewhere) {
        host_expect("rec-goes-on-at-another-cpu", MOVING.load(Relaxed), 0);
    } else {
        resume(&first)?;
    }
    resume(&second)?;
    for realm in [&first, &second] {
        match resume(realm)? {
            Event::Done(n) if n > 100 => check("realm-registers-survive", Ok(())),
            other => check("realm-registers-survive", Err(format_args!("{other:x?}"))),
        }
    }
    first.destroy()?;
    second.destroy()
}
