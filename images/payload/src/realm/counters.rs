//! Has a Realm the performance monitors that were configured, and only it?

use core::arch::asm;
use core::mem::offset_of;
use core::ops::ControlFlow;

use cca_abi::rmi::{ExitReason, RecExit};

use super::build::{Event, Realm, Wish};
use super::guest::{catch, done, enable_interrupts, expect, step, wait_for_interrupt};
use super::interrupts;
use crate::expect as host_expect;

const COUNTERS: u64 = 3;
/// SW_INCR, CPU_CYCLES.
const SOFTWARE: u64 = 0;
const CYCLES: u64 = 0x11;
/// The PMU's interrupt.
const PMU: u64 = 23;

macro_rules! read {
    ($name:literal) => {{
        let value: u64;
        // SAFETY: reads a register.
        unsafe { asm!(concat!("mrs {}, ", $name), out(reg) value, options(nostack)) };
        value
    }};
}

macro_rules! write {
    ($name:literal, $value:expr) => {{
        let value: u64 = $value;
        // SAFETY: a performance monitor.
        unsafe { asm!(concat!("msr ", $name, ", {}"), "isb", in(reg) value, options(nostack)) };
    }};
}

extern "C" fn with_pmu(_: u64) {
    expect("dfr0-shows-the-pmu", u64::from(read!("id_aa64dfr0_el1") >> 8 & 0xF >= 6), 1);
    expect("pmcr-counts-the-counters", read!("pmcr_el0") >> 11 & 0x1F, COUNTERS);
    // Nothing of the host is there.
    for (name, value) in [
        ("pmcnten-begins-zero", read!("pmcntenset_el0")),
        ("pmovs-begins-zero", read!("pmovsset_el0")),
        ("pmccntr-begins-zero", read!("pmccntr_el0")),
        ("pmevcntr1-begins-zero", read!("pmevcntr1_el0")),
        ("pmevtyper1-begins-zero", read!("pmevtyper1_el0")),
    ] {
        expect(name, value, 0);
    }
    write!("pmevtyper0_el0", SOFTWARE);
    write!("pmevtyper1_el0", CYCLES);
    write!("pmevtyper2_el0", SOFTWARE);
    write!("pmevcntr2_el0", 0x77);
    write!("pmselr_el0", 2);
    write!("pmuserenr_el0", 5);
    write!("pmcntenset_el0", 1 << 31 | 3);
    write!("pmcr_el0", 0x41);
    let before = (read!("pmccntr_el0"), read!("pmevcntr1_el0"));
    step(0, [0, 0]);
    write!("pmswinc_el0", 1);
    write!("pmswinc_el0", 5);
    expect("software-increments-count", read!("pmevcntr0_el0"), 2);
    expect("a-disabled-counter-keeps-its-value", read!("pmevcntr2_el0"), 0x77);
    expect("pmselr-survives", read!("pmselr_el0"), 2);
    expect("pmuserenr-survives", read!("pmuserenr_el0"), 5);
    expect("pmcnten-survives", read!("pmcntenset_el0"), 1 << 31 | 3);
    expect("pmevtyper1-survives", read!("pmevtyper1_el0"), CYCLES);
    let after = (read!("pmccntr_el0"), read!("pmevcntr1_el0"));
    expect("cycles-count", u64::from(after.0 > before.0), 1);
    expect("cycle-events-count", u64::from(after.1 > before.1), 1);
    // A counter that the Realm does not have is undefined, or at least not the host's.
    let mut other = 0;
    catch(|| other = read!("pmevcntr3_el0"));
    expect("counter-3-is-not-the-hosts", other, 0);
    catch(|| write!("pmevcntr3_el0", 1));
    // An overflow.
    write!("pmintenset_el1", 1);
    write!("pmevcntr0_el0", 0xFFFF_FFFF);
    enable_interrupts();
    step(1, [0, 0]);
    write!("pmswinc_el0", 1);
    expect("overflow-interrupts", wait_for_interrupt(), PMU);
    step(2, [0, 0]);
    write!("pmcr_el0", 0x40);
    step(3, [read!("pmccntr_el0"), 0]);
    done();
}

extern "C" fn without_pmu(_: u64) {
    const UNDEFINED: u64 = 1 << 25;
    expect("dfr0-hides-the-pmu", read!("id_aa64dfr0_el1") >> 8 & 0xF, 0);
    expect(
        "pmcr-is-undefined",
        catch(|| {
            let _ = read!("pmcr_el0");
        }),
        UNDEFINED,
    );
    expect(
        "pmccntr-is-undefined",
        catch(|| {
            let _ = read!("pmccntr_el0");
        }),
        UNDEFINED,
    );
    expect("pmevcntr-is-undefined", catch(|| write!("pmevcntr0_el0", 1)), UNDEFINED);
    expect("pmintenset-is-undefined", catch(|| write!("pmintenset_el1", 1)), UNDEFINED);
    done();
}

/// The host's own monitors.
fn host() -> [u64; 11] {
    [
        read!("pmcr_el0"),
        read!("pmcntenset_el0"),
        read!("pmintenset_el1"),
        read!("pmovsset_el0"),
        read!("pmselr_el0"),
        read!("pmuserenr_el0"),
        read!("pmevcntr0_el0"),
        read!("pmevtyper0_el0"),
        read!("pmevcntr5_el0"),
        read!("pmevtyper5_el0"),
        read!("pmevcntr3_el0"),
    ]
}

pub(super) fn suite() -> ControlFlow<()> {
    let wish = Wish { counters: Some(COUNTERS), ..Wish::default() };
    let realm = Realm::new(wish, with_pmu, 0)?;
    let overflow = || realm.exit(0, offset_of!(RecExit, pmu_ovf_status));
    // Counters that count EL1 and EL0 only stand still while the host runs at EL2: what they show is the Realm's doing.
    write!("pmcr_el0", 0x41);
    write!("pmevcntr0_el0", 0x1111);
    write!("pmevtyper0_el0", CYCLES);
    write!("pmevcntr5_el0", 0x5555);
    write!("pmevtyper5_el0", CYCLES);
    write!("pmevcntr3_el0", 0x3333);
    write!("pmcntenset_el0", 0x21);
    write!("pmselr_el0", 4);
    write!("pmuserenr_el0", 8);
    let before = host();
    let compare = |name| match (0..11).find(|&n| host()[n] != before[n]) {
        None => crate::check(name, Ok(())),
        Some(n) => {
            crate::check(name, Err(format_args!("register {n}: {:#x} became {:#x}", before[n], host()[n])))
        }
    };
    realm.step(0)?;
    compare("host-keeps-its-counters");
    realm.step(0)?;
    host_expect("no-overflow-yet", overflow(), 0);
    interrupts::enable(PMU);
    let event = realm.enter(0)?;
    interrupts::disable(PMU);
    host_expect("overflow-leaves", u64::from(event == Event::Exit(ExitReason::Irq)), 1);
    host_expect("overflow-is-reported", overflow(), 1);
    realm.inject(0, PMU);
    realm.step(0)?;
    host_expect("overflow-is-over", overflow(), 0);
    // Stopped counters stay where they are.
    let (_, [cycles, _]) = realm.step(0)?;
    host_expect("cycles-are-not-zero", u64::from(cycles != 0), 1);
    realm.finish(0, "realm-has-a-pmu")?;
    compare("host-keeps-its-counters");
    realm.destroy()?;
    let plain = Realm::new(Wish::default(), without_pmu, 0)?;
    plain.finish(0, "realm-has-no-pmu")?;
    compare("host-keeps-its-counters");
    write!("pmcntenclr_el0", 0x21);
    write!("pmcr_el0", 0x40);
    plain.destroy()
}
