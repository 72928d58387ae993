//! Do timers fire in a Realm, and do virtual interrupts reach it?

use core::arch::asm;
use core::mem::offset_of;
use core::ops::ControlFlow;

use cca_abi::rmi::{ExitReason, RecExit, enter_flags};

use super::build::{Event, Realm, Wish};
use super::guest::{done, enable_interrupts, expect, step, wait_for_interrupt};
use crate::expect as host_expect;

const VIRTUAL: u64 = 27;
const PHYSICAL: u64 = 30;
const SGI: u64 = 5;
const GICD: usize = 0x0800_0000;
/// The first redistributor's frame of private interrupts.
const GICR_PRIVATE: usize = 0x080B_0000;

fn write32(address: usize, value: u32) {
    // SAFETY: the machine's interrupt controller, which nothing else uses.
    unsafe { core::ptr::with_exposed_provenance_mut::<u32>(address).write_volatile(value) };
}

/// Lets a private interrupt of the first CPU reach the host.
pub(super) fn enable(intid: u64) {
    // GICD_CTLR: ARE_NS, EnableGrp1A. GICR_ISENABLER0.
    write32(GICD, 0x12);
    write32(GICR_PRIVATE + 0x100, 1 << intid);
    // SAFETY: ICC_SRE_EL2, ICC_PMR_EL1, ICC_IGRPEN1_EL1; PSTATE.I stays set.
    unsafe {
        asm!("msr S3_4_C12_C9_5, {}", "isb", in(reg) 0xF_u64, options(nostack));
        asm!("msr S3_0_C4_C6_0, {}", in(reg) 0xF8_u64, options(nostack));
        asm!("msr S3_0_C12_C12_7, {}", "isb", in(reg) 1_u64, options(nostack));
    }
}

/// And no longer.
pub(super) fn disable(intid: u64) {
    write32(GICR_PRIVATE + 0x180, 1 << intid);
    // SAFETY: a barrier.
    unsafe { asm!("dsb sy", "isb", options(nostack)) };
}

extern "C" fn program(_: u64) {
    enable_interrupts();
    for intid in [VIRTUAL, PHYSICAL] {
        // SAFETY: the Realm's own timers.
        unsafe {
            if intid == VIRTUAL {
                asm!("msr cntv_tval_el0, {}", "msr cntv_ctl_el0, {}", "isb", in(reg) 2000_u64, in(reg) 1_u64);
            } else {
                asm!("msr cntp_tval_el0, {}", "msr cntp_ctl_el0, {}", "isb", in(reg) 2000_u64, in(reg) 1_u64);
            }
        }
        expect("timer-interrupts-the-realm", wait_for_interrupt(), intid);
        step(intid, [0, 0]);
    }
    // SAFETY: ICC_SGI1R_EL1, to itself; the host injects it.
    unsafe { asm!("msr S3_0_C12_C11_5, {}", "isb", in(reg) SGI << 24 | 1, options(nostack)) };
    expect("sgi-reaches-the-realm", wait_for_interrupt(), SGI);
    // SAFETY: waits.
    unsafe { asm!("wfi", options(nostack)) };
    expect("an-interrupt-ends-the-wait", wait_for_interrupt(), 100);
    done();
}

pub(super) fn suite() -> ControlFlow<()> {
    let realm = Realm::new(Wish::default(), program, 0)?;
    for (intid, control) in
        [(VIRTUAL, offset_of!(RecExit, cntv_ctl)), (PHYSICAL, offset_of!(RecExit, cntp_ctl))]
    {
        enable(intid);
        let event = realm.enter(0)?;
        host_expect("timer-leaves-the-realm", u64::from(event == Event::Exit(ExitReason::Irq)), 1);
        host_expect("timer-is-reported", realm.exit(0, control) & 7, 5);
        realm.inject(0, intid);
        let (at, _) = realm.step(0)?;
        host_expect("timer-is-served", at, intid);
        host_expect("timer-is-masked", realm.exit(0, control) & 3, 2);
        disable(intid);
    }
    let event = realm.enter(0)?;
    host_expect("sgi-comes-to-the-host", u64::from(event == Event::Exit(ExitReason::Sync)), 1);
    host_expect("sgi-comes-to-the-host", realm.exit(0, offset_of!(RecExit, esr)) >> 26, 0x18);
    host_expect("sgi-comes-to-the-host", realm.exit_gpr(0, 0), SGI << 24 | 1);
    realm.inject(0, SGI);
    realm.set_flags(0, enter_flags::TRAP_WFI);
    let event = realm.enter(0)?;
    host_expect("wait-comes-to-the-host", u64::from(event == Event::Exit(ExitReason::Sync)), 1);
    host_expect("wait-comes-to-the-host", realm.exit(0, offset_of!(RecExit, esr)), 1 << 26);
    realm.inject(0, 100);
    realm.finish(0, "realm-gets-its-interrupts")?;
    realm.destroy()
}
