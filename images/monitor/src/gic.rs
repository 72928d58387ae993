//! GICv3, the parts that only EL3 can do: every interrupt belongs to the host (Group 1 Non-secure), and each
//! CPU's redistributor is awake. The one exception is how a parked CPU is woken: see [`wake`].

use core::arch::asm;

use crate::layout::{GICD, GICR, GICR_STRIDE, WAKE_SGI};
use crate::mmio::{read32, write32};

const GICD_CTLR: usize = 0x0000;
const GICD_CTLR_GROUPS: u32 = 0b111;
const GICD_CTLR_GROUP0: u32 = 0b001;
const GICD_CTLR_RWP: u32 = 1 << 31;
const GICD_TYPER: usize = 0x0004;
const IGROUPR: usize = 0x0080;
const ICENABLER: usize = 0x0180;
const ICPENDR: usize = 0x0280;
const IPRIORITYR: usize = 0x0400;
const ICFGR: usize = 0x0C00;
const IGRPMODR: usize = 0x0D00;
const GICR_WAKER: usize = 0x0014;
const WAKER_PROCESSOR_SLEEP: u32 = 1 << 1;
const WAKER_CHILDREN_ASLEEP: u32 = 1 << 2;
const SGI_FRAME: usize = 0x1_0000;
/// The host sees priorities shifted: its highest is 0x80 here.
const PRIORITIES: u32 = 0x8080_8080;

/// The distributor, once, on the first CPU.
pub fn init_distributor() {
    // SAFETY: nobody else uses the distributor yet.
    unsafe {
        let control = read32(GICD + GICD_CTLR);
        write32(GICD + GICD_CTLR, control & !GICD_CTLR_GROUPS);
        while read32(GICD + GICD_CTLR) & GICD_CTLR_RWP != 0 {}
        let words = usize::try_from(read32(GICD + GICD_TYPER) & 0x1F).unwrap_or(0) + 1;
        for word in 1..words {
            write32(GICD + ICENABLER + word * 4, u32::MAX);
            write32(GICD + IGROUPR + word * 4, u32::MAX);
            write32(GICD + IGRPMODR + word * 4, 0);
            for i in 0..8 {
                write32(GICD + IPRIORITYR + (word * 8 + i) * 4, PRIORITIES);
            }
            for i in 0..2 {
                write32(GICD + ICFGR + (word * 2 + i) * 4, 0);
            }
        }
        // For `wake`. The host cannot see Group 0, and switches its own group on by itself.
        write32(GICD + GICD_CTLR, control & !GICD_CTLR_GROUPS | GICD_CTLR_GROUP0);
    }
}

/// This CPU's redistributor and CPU interface.
pub fn init_cpu(cpu: usize) {
    let rd = GICR + cpu * GICR_STRIDE;
    let sgi = rd + SGI_FRAME;
    // SAFETY: each CPU touches its own frames, and the host's drivers do not run on it now.
    unsafe {
        write32(rd + GICR_WAKER, read32(rd + GICR_WAKER) & !WAKER_PROCESSOR_SLEEP);
        while read32(rd + GICR_WAKER) & WAKER_CHILDREN_ASLEEP != 0 {}
        write32(sgi + ICENABLER, u32::MAX);
        write32(sgi + IGROUPR, u32::MAX);
        write32(sgi + IGRPMODR, 0);
        // A wake-up that came when this CPU was awake already. No other can follow: there is no interrupt of
        // Group 0 any more.
        write32(sgi + ICPENDR, u32::MAX);
        for i in 0..8 {
            write32(sgi + IPRIORITYR + i * 4, PRIORITIES);
        }
        write32(sgi + ICFGR + 4, 0);
        // ICC_SRE_EL3/EL2/EL1, ICC_PMR_EL1, ICC_IGRPEN0_EL1, ICC_IGRPEN1_EL3. SCR_EL3.NS is set, without
        // which ICC_SRE_EL2 is not there.
        asm!(
            "msr S3_6_C12_C12_5, {sre}",
            "isb",
            "msr S3_4_C12_C9_5, {sre}",
            "msr S3_0_C12_C12_5, {sre}",
            "isb",
            "msr S3_0_C4_C6_0, {pmr}",
            "msr S3_0_C12_C12_6, xzr",
            "msr S3_6_C12_C12_7, xzr",
            "isb",
            sre = in(reg) 0xF_u64,
            pmr = in(reg) 0xFF_u64,
            options(nostack, nomem),
        );
    }
}

/// Before this CPU is parked: none of the host's interrupts reaches it.
pub fn cpu_off() {
    // SAFETY: clears ICC_IGRPEN1_EL3.{EnableGrp1S, EnableGrp1NS} of a CPU that runs no world.
    unsafe { asm!("msr S3_6_C12_C12_7, xzr", "isb", options(nostack, nomem)) };
}

/// Ends a parked CPU's wait: the SGI is in Group 0 there, which the host can neither send nor see.
pub fn wake(cpu: usize) {
    let (aff1, aff0) = (cpu as u64 / 16, cpu as u64 % 16);
    let value = 1 << aff0 | aff1 << 16 | u64::from(WAKE_SGI) << 24;
    // SAFETY: ICC_SGI0R_EL1; sends an interrupt.
    unsafe { asm!("msr S3_0_C12_C11_7, {}", "isb", in(reg) value, options(nostack, nomem)) };
}
