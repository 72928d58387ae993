//! Breakpoints, watchpoints and claim tags: switched only for a REC that uses them.

use crate::percpu::PerCpu;
use crate::regs::field;
use rmm::context::{RecContext, word};

macro_rules! each {
    ($do:ident, $op2:literal, $base:expr, $count:expr) => {
        $do! { $base, $count;
            0 concat!("S2_0_C0_C0_", $op2), 1 concat!("S2_0_C0_C1_", $op2), 2 concat!("S2_0_C0_C2_", $op2),
            3 concat!("S2_0_C0_C3_", $op2), 4 concat!("S2_0_C0_C4_", $op2), 5 concat!("S2_0_C0_C5_", $op2),
            6 concat!("S2_0_C0_C6_", $op2), 7 concat!("S2_0_C0_C7_", $op2), 8 concat!("S2_0_C0_C8_", $op2),
            9 concat!("S2_0_C0_C9_", $op2), 10 concat!("S2_0_C0_C10_", $op2), 11 concat!("S2_0_C0_C11_", $op2),
            12 concat!("S2_0_C0_C12_", $op2), 13 concat!("S2_0_C0_C13_", $op2), 14 concat!("S2_0_C0_C14_", $op2),
            15 concat!("S2_0_C0_C15_", $op2)
        }
    };
}

/// Breakpoints and watchpoints of this CPU.
fn counts() -> (u64, u64) {
    let dfr0 = read_reg!("id_aa64dfr0_el1");
    (field(dfr0, 12) + 1, field(dfr0, 20) + 1)
}

/// The host's away, the REC's in.
pub(crate) fn load(cpu: &mut PerCpu, ctx: &RecContext<'_>) {
    let (breakpoints, watchpoints) = counts();
    macro_rules! swap_in {
        ($base:expr, $count:expr; $($n:literal $register:expr),*) => {
            $(if $count > $n {
                cpu.debug[$base - word::DBGBVR + $n] = read_reg!($register);
                // SAFETY: debug exceptions are masked at EL2 and not routed to it.
                unsafe { write_reg!($register, ctx.get($base + $n)) };
            })*
        };
    }
    each!(swap_in, "4", word::DBGBVR, breakpoints);
    each!(swap_in, "5", word::DBGBCR, breakpoints);
    each!(swap_in, "6", word::DBGWVR, watchpoints);
    each!(swap_in, "7", word::DBGWCR, watchpoints);
    cpu.claim = swap_claim_tags(ctx.get(word::DBGCLAIM));
    cpu.debug_loaded = true;
}

/// The REC's away, the host's back.
pub(crate) fn save(cpu: &mut PerCpu, ctx: &RecContext<'_>) {
    let (breakpoints, watchpoints) = counts();
    macro_rules! swap_out {
        ($base:expr, $count:expr; $($n:literal $register:expr),*) => {
            $(if $count > $n {
                ctx.set($base + $n, read_reg!($register));
                // SAFETY: as in `load`.
                unsafe { write_reg!($register, cpu.debug[$base - word::DBGBVR + $n]) };
            })*
        };
    }
    each!(swap_out, "4", word::DBGBVR, breakpoints);
    each!(swap_out, "5", word::DBGBCR, breakpoints);
    each!(swap_out, "6", word::DBGWVR, watchpoints);
    each!(swap_out, "7", word::DBGWCR, watchpoints);
    ctx.set(word::DBGCLAIM, swap_claim_tags(cpu.claim));
    cpu.debug_loaded = false;
}

/// Sets exactly the tags in `new`; gives those that were set.
fn swap_claim_tags(new: u64) -> u64 {
    let old = read_reg!("dbgclaimclr_el1");
    if old != new {
        // SAFETY: tags mean nothing to the CPU.
        unsafe {
            write_reg!("dbgclaimclr_el1", !new);
            write_reg!("dbgclaimset_el1", new);
        }
    }
    old
}

const _: () = assert!(word::DBGBCR == word::DBGBVR + 16 && word::DBGWCR == word::DBGBVR + 48);
