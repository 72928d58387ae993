//! Exceptions from below that are no calls: instructions that EL3 does not let a world have.

use core::sync::atomic::{AtomicU32, Ordering};

use monitor::undefined::{ESR_UNKNOWN, State, take};

use crate::context::Context;
use crate::sysreg::{self, read_sysreg, write_sysreg};
use crate::uart;

/// Reports on the console end after this many: nobody may flood it.
static REPORTS: AtomicU32 = AtomicU32::new(0);
const MAX_REPORTS: u32 = 8;

/// Whether a class of exception means that an instruction is not there for its world: WF*, FP, PAuth, LS64, BTI,
/// system registers of 64 and 128 bits, SVE, SME.
pub fn is_undefined(class: u64) -> bool {
    matches!(class, 0x00 | 0x01 | 0x07 | 0x09 | 0x0A | 0x0D | 0x14 | 0x18 | 0x19 | 0x1D)
}

/// Gives the exception to whom it came from, as an undefined instruction.
pub fn reflect(context: &mut Context) {
    let esr = read_sysreg!("esr_el3");
    if REPORTS.fetch_add(1, Ordering::Relaxed) < MAX_REPORTS {
        uart::line(format_args!(
            "{:?} world: not enabled for it: class {:#x}, S{}_{}_C{}_C{}_{} if a system register, at {:#x}",
            context.world(),
            esr >> 26 & 0x3F,
            esr >> 20 & 3,
            esr >> 14 & 7,
            esr >> 10 & 0xF,
            esr >> 1 & 0xF,
            esr >> 17 & 7,
            read_sysreg!("elr_el3")
        ));
    } else {
        REPORTS.store(MAX_REPORTS, Ordering::Relaxed);
    }
    let id = sysreg::id_regs();
    let spsr = read_sysreg!("spsr_el3");
    let taken = take(&State {
        spsr,
        hcr_el2: read_sysreg!("hcr_el2"),
        sctlr_el1: read_sysreg!("sctlr_el1"),
        sctlr_el2: read_sysreg!("sctlr_el2"),
        mte: id.pfr1 >> 8 & 0xF >= 2,
        nmi: id.pfr1 >> 36 & 0xF >= 1,
    });
    let from = read_sysreg!("elr_el3");
    let vectors = if taken.el2 { read_sysreg!("vbar_el2") } else { read_sysreg!("vbar_el1") };
    // SAFETY: what the CPU itself would write when it takes the exception at that level.
    unsafe {
        if taken.el2 {
            write_sysreg!("elr_el2", from);
            write_sysreg!("spsr_el2", spsr);
            write_sysreg!("esr_el2", ESR_UNKNOWN);
        } else {
            write_sysreg!("elr_el1", from);
            write_sysreg!("spsr_el1", spsr);
            write_sysreg!("esr_el1", ESR_UNKNOWN);
        }
        write_sysreg!("elr_el3", vectors + taken.vector);
        write_sysreg!("spsr_el3", taken.pstate);
    }
}
