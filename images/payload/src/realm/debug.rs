//! Do a Realm's breakpoints and watchpoints hit, and are they its own?

use core::arch::asm;
use core::ops::ControlFlow;

use super::build::{Realm, Wish};
use super::guest::{catch, caught_far, done, expect, step};
use crate::check;

const CONFIGURED: u64 = 2;

#[inline(never)]
extern "C" fn target() {
    // SAFETY: nothing.
    unsafe { asm!("nop", options(nostack)) };
}

static mut WATCHED: u64 = 0;

/// Any EL1 instruction at, or access to, eight bytes at.
const BREAK: u64 = 0x1E3;
const WATCH: u64 = 0xFF << 5 | 0x1B;

fn arm(breakpoint: u64, watchpoint: u64) {
    // SAFETY: this Realm's debug registers; MDSCR_EL1.MDE and KDE; PSTATE.D.
    unsafe {
        asm!("msr oslar_el1, xzr", "isb", options(nostack));
        asm!("msr dbgbvr0_el1, {}", "msr dbgbcr0_el1, {}", in(reg) target as *const () as u64, in(reg) breakpoint,
            options(nostack));
        asm!("msr dbgwvr0_el1, {}", "msr dbgwcr0_el1, {}", in(reg) (&raw const WATCHED).addr() as u64,
            in(reg) watchpoint, options(nostack));
        asm!("msr mdscr_el1, {}", "isb", "msr daifclr, #8", in(reg) 1_u64 << 15 | 1 << 13, options(nostack));
    }
}

fn touch() {
    // SAFETY: this REC's own word.
    unsafe { (&raw mut WATCHED).write_volatile(1) };
}

extern "C" fn program(seed: u64) {
    let dfr0: u64;
    // SAFETY: reads an ID register.
    unsafe { asm!("mrs {}, id_aa64dfr0_el1", out(reg) dfr0, options(nostack)) };
    expect("dfr0-shows-the-breakpoints", dfr0 >> 12 & 0xF, CONFIGURED);
    expect("dfr0-shows-the-watchpoints", dfr0 >> 20 & 0xF, CONFIGURED);
    arm(BREAK, 0);
    step(0, [0, 0]);
    expect("breakpoint-hits", catch(|| target()) >> 26, 0x31);
    arm(0, WATCH);
    step(1, [0, 0]);
    expect("watchpoint-hits", catch(touch) >> 26, 0x35);
    expect("watchpoint-says-where", caught_far(), (&raw const WATCHED).addr() as u64);
    arm(0, 0);
    expect("nothing-hits", catch(|| target()), u64::MAX);
    // The channel to a debugger that is not there.
    let (status, data): (u64, u64);
    // SAFETY: registers that the RMM answers for.
    unsafe {
        asm!("msr osdtrtx_el1, {}", "isb", "mrs {}, mdccsr_el0", "mrs {}, osdtrtx_el1", in(reg) seed, out(reg) status,
            out(reg) data, options(nostack));
    }
    expect("channel-is-empty", status, 0);
    expect("channel-gives-nothing", data, 0);
    done();
}

/// The host's first breakpoint and watchpoint, and its claim tags.
fn host() -> [u64; 5] {
    let (a, b, c, d, e): (u64, u64, u64, u64, u64);
    // SAFETY: reads registers.
    unsafe {
        asm!("mrs {}, dbgbvr0_el1", "mrs {}, dbgbcr0_el1", "mrs {}, dbgwvr0_el1", "mrs {}, dbgwcr0_el1",
            "mrs {}, dbgclaimclr_el1", out(reg) a, out(reg) b, out(reg) c, out(reg) d, out(reg) e, options(nostack));
    }
    [a, b, c, d, e]
}

pub(super) fn suite() -> ControlFlow<()> {
    // SAFETY: disabled breakpoints.
    unsafe {
        asm!("msr dbgbvr0_el1, {}", "msr dbgwvr0_el1, {}", in(reg) 0x1234_5670_u64, in(reg) 0x0765_4320_u64,
            options(nostack));
        asm!("msr dbgbcr0_el1, {}", "msr dbgwcr0_el1, {}", "msr dbgclaimset_el1, {}", "isb", in(reg) 0x1E0_u64,
            in(reg) 0x1FE0_u64, in(reg) 0x81_u64, options(nostack));
    }
    let before = host();
    let first = Realm::new(Wish { debug: CONFIGURED, ..Wish::default() }, program, 1)?;
    let second = Realm::new(Wish { slot: 1, debug: CONFIGURED, ..Wish::default() }, program, 2)?;
    for _ in 0..2 {
        first.step(0)?;
        second.step(0)?;
        if host() != before {
            check("host-keeps-its-breakpoints", Err(format_args!("{before:x?} became {:x?}", host())));
        }
    }
    first.finish(0, "realm-debugs-itself")?;
    second.finish(0, "realm-debugs-itself")?;
    check(
        "host-keeps-its-breakpoints",
        if host() == before { Ok(()) } else { Err(format_args!("at the end")) },
    );
    first.destroy()?;
    second.destroy()
}
