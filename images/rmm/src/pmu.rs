//! Performance monitors: the host's stand still while a REC is loaded, and make room only for a REC that uses its own.
//!
//! A REC has the event counters below MDCR_EL2.HPMN and the cycle counter. All others are switched, too: not every CPU
//! keeps EL1 from them. They do not count, because MDCR_EL2.HPME is clear.

use crate::percpu::PerCpu;
use crate::world::counters;
use rmm::context::{RecContext, word};

/// PMCR_EL0.E: counters run.
const PMCR_E: u64 = 1;
/// PMCR_EL0.P and C reset counters; they are actions, not state.
const PMCR_RESETS: u64 = 1 << 1 | 1 << 2;

/// The host's monitors while a REC's are loaded.
#[derive(Default)]
pub(crate) struct HostPmu {
    pmcr: u64,
    selr: u64,
    enabled: u64,
    interrupts: u64,
    overflows: u64,
    cycles: u64,
    cycle_filter: u64,
    counters: [u64; 31],
    types: [u64; 31],
    /// The REC's are loaded.
    pub(crate) loaded: bool,
}

macro_rules! each_counter {
    ($do:ident, $($argument:expr),*) => {
        $do! { $($argument),*;
            0 "8_0" "12_0", 1 "8_1" "12_1", 2 "8_2" "12_2", 3 "8_3" "12_3",
            4 "8_4" "12_4", 5 "8_5" "12_5", 6 "8_6" "12_6", 7 "8_7" "12_7",
            8 "9_0" "13_0", 9 "9_1" "13_1", 10 "9_2" "13_2", 11 "9_3" "13_3",
            12 "9_4" "13_4", 13 "9_5" "13_5", 14 "9_6" "13_6", 15 "9_7" "13_7",
            16 "10_0" "14_0", 17 "10_1" "14_1", 18 "10_2" "14_2", 19 "10_3" "14_3",
            20 "10_4" "14_4", 21 "10_5" "14_5", 22 "10_6" "14_6", 23 "10_7" "14_7",
            24 "11_0" "15_0", 25 "11_1" "15_1", 26 "11_2" "15_2", 27 "11_3" "15_3",
            28 "11_4" "15_4", 29 "11_5" "15_5", 30 "11_6" "15_6"
        }
    };
}

/// Stops the host's counters, which would tell it of each branch and cache miss of the REC.
pub(crate) fn pause(cpu: &mut PerCpu) {
    cpu.pmu.pmcr = read_reg!("pmcr_el0") & !PMCR_RESETS;
    if cpu.pmu.pmcr & PMCR_E != 0 {
        // SAFETY: stops counters; `resume` starts them again.
        unsafe { write_reg!("pmcr_el0", cpu.pmu.pmcr & !PMCR_E) };
    }
}

/// Undoes [`pause`], and [`load`] if that was called.
pub(crate) fn resume(cpu: &mut PerCpu, ctx: &RecContext<'_>) {
    let loaded = core::mem::take(&mut cpu.pmu.loaded);
    if loaded {
        save(&mut cpu.pmu, ctx);
    }
    if loaded || cpu.pmu.pmcr & PMCR_E != 0 {
        // SAFETY: the host's own value.
        unsafe { write_reg!("pmcr_el0", cpu.pmu.pmcr) };
    }
}

/// The host's away, the REC's in. The counters are stopped.
pub(crate) fn load(cpu: &mut PerCpu, ctx: &RecContext<'_>) {
    let host = &mut cpu.pmu;
    host.selr = read_reg!("pmselr_el0");
    host.enabled = read_reg!("pmcntenset_el0");
    host.interrupts = read_reg!("pmintenset_el1");
    host.overflows = read_reg!("pmovsset_el0");
    host.cycles = read_reg!("pmccntr_el0");
    host.cycle_filter = read_reg!("pmccfiltr_el0");
    let count = counters();
    macro_rules! swap_in {
        ($count:expr; $($n:literal $counter:literal $type:literal),*) => {
            'done: { $(
                if $count == $n { break 'done; }
                host.counters[$n] = read_reg!(concat!("S3_3_C14_C", $counter));
                host.types[$n] = read_reg!(concat!("S3_3_C14_C", $type));
                // SAFETY: a counter that does not run yet.
                unsafe {
                    write_reg!(concat!("S3_3_C14_C", $counter), ctx.get(word::PMEVCNTR + $n));
                    write_reg!(concat!("S3_3_C14_C", $type), ctx.get(word::PMEVTYPER + $n));
                }
            )* }
        };
    }
    each_counter!(swap_in, count);
    // SAFETY: monitors of the lower exception levels; they begin to count with the last write.
    unsafe {
        write_reg!("pmselr_el0", ctx.get(word::PMSELR));
        write_reg!("pmccntr_el0", ctx.get(word::PMCCNTR));
        write_reg!("pmccfiltr_el0", ctx.get(word::PMCCFILTR));
        write_sets(ctx.get(word::PMCNTEN), ctx.get(word::PMINTEN), ctx.get(word::PMOVS));
        write_reg!("pmcr_el0", ctx.get(word::PMCR));
    }
    host.loaded = true;
}

/// The REC's away, the host's in, all stopped.
fn save(host: &mut HostPmu, ctx: &RecContext<'_>) {
    let pmcr = read_reg!("pmcr_el0");
    // SAFETY: stops the counters.
    unsafe { write_reg!("pmcr_el0", pmcr & !(PMCR_RESETS | PMCR_E)) };
    ctx.set(word::PMCR, pmcr & !PMCR_RESETS);
    ctx.set(word::PMSELR, read_reg!("pmselr_el0"));
    ctx.set(word::PMCNTEN, read_reg!("pmcntenset_el0"));
    ctx.set(word::PMINTEN, read_reg!("pmintenset_el1"));
    ctx.set(word::PMOVS, read_reg!("pmovsset_el0"));
    ctx.set(word::PMCCNTR, read_reg!("pmccntr_el0"));
    ctx.set(word::PMCCFILTR, read_reg!("pmccfiltr_el0"));
    let count = counters();
    macro_rules! swap_out {
        ($count:expr; $($n:literal $counter:literal $type:literal),*) => {
            'done: { $(
                if $count == $n { break 'done; }
                ctx.set(word::PMEVCNTR + $n, read_reg!(concat!("S3_3_C14_C", $counter)));
                ctx.set(word::PMEVTYPER + $n, read_reg!(concat!("S3_3_C14_C", $type)));
                // SAFETY: as in `load`.
                unsafe {
                    write_reg!(concat!("S3_3_C14_C", $counter), host.counters[$n]);
                    write_reg!(concat!("S3_3_C14_C", $type), host.types[$n]);
                }
            )* }
        };
    }
    each_counter!(swap_out, count);
    // SAFETY: as in `load`.
    unsafe {
        write_reg!("pmselr_el0", host.selr);
        write_reg!("pmccntr_el0", host.cycles);
        write_reg!("pmccfiltr_el0", host.cycle_filter);
        write_sets(host.enabled, host.interrupts, host.overflows);
    }
}

/// Gives enables, interrupt enables and overflow flags new values.
///
/// # Safety
/// The counters are stopped; the values are their new owner's.
unsafe fn write_sets(enabled: u64, interrupts: u64, overflows: u64) {
    // SAFETY: the caller's business.
    unsafe {
        write_reg!("pmcntenclr_el0", !enabled);
        write_reg!("pmcntenset_el0", enabled);
        write_reg!("pmintenclr_el1", !interrupts);
        write_reg!("pmintenset_el1", interrupts);
        write_reg!("pmovsclr_el0", !overflows);
        write_reg!("pmovsset_el0", overflows);
    }
}
