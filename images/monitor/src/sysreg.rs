//! System registers of EL3.

use monitor::World;
use monitor::enables::{IdRegs, feature};

/// Reads a system register.
macro_rules! read_sysreg {
    ($name:literal) => {{
        let value: u64;
        // SAFETY: reading this register has no side effect.
        unsafe { core::arch::asm!(concat!("mrs {}, ", $name), out(reg) value, options(nostack, nomem)) };
        value
    }};
}
pub(crate) use read_sysreg;

/// Writes a system register. The macro's use is the unsafe act: say why at the call.
macro_rules! write_sysreg {
    ($name:literal, $value:expr) => {{
        let value: u64 = $value;
        core::arch::asm!(concat!("msr ", $name, ", {}"), in(reg) value, options(nostack))
    }};
}
pub(crate) use write_sysreg;

/// What this CPU has.
pub fn id_regs() -> IdRegs {
    let mut id = IdRegs {
        pfr0: read_sysreg!("id_aa64pfr0_el1"),
        pfr1: read_sysreg!("id_aa64pfr1_el1"),
        pfr2: read_sysreg!("S3_0_C0_C4_2"),
        mmfr0: read_sysreg!("id_aa64mmfr0_el1"),
        mmfr1: read_sysreg!("id_aa64mmfr1_el1"),
        mmfr2: read_sysreg!("id_aa64mmfr2_el1"),
        mmfr3: read_sysreg!("S3_0_C0_C7_3"),
        mmfr4: read_sysreg!("S3_0_C0_C7_4"),
        dfr0: read_sysreg!("id_aa64dfr0_el1"),
        isar0: read_sysreg!("id_aa64isar0_el1"),
        isar1: read_sysreg!("id_aa64isar1_el1"),
        isar2: read_sysreg!("S3_0_C0_C6_2"),
        smfr0: 0,
    };
    if id.smcr_el3().is_some() {
        id.smfr0 = read_sysreg!("S3_0_C0_C4_5");
    }
    id
}

/// EL3's own registers on this CPU, except translation and granule protection.
pub fn init_cpu(id: &IdRegs) {
    // SAFETY: these registers only decide what lower exception levels may do, and none runs yet.
    unsafe {
        write_sysreg!("cptr_el3", id.cptr_el3());
        write_sysreg!("mdcr_el3", id.mdcr_el3());
        core::arch::asm!("isb", options(nostack));
        if let Some(value) = id.zcr_el3() {
            write_sysreg!("S3_6_C1_C2_0", value);
        }
        if let Some(value) = id.smcr_el3() {
            write_sysreg!("S3_6_C1_C2_6", value);
            // SVCR: a CPU that was turned off in streaming mode does not come back in it.
            write_sysreg!("S3_3_C4_C2_2", 0);
        }
        write_sysreg!("scr_el3", id.scr_el3(World::NonSecure));
        core::arch::asm!("isb", options(nostack));
        if id.features() & feature::GCS != 0 {
            // GCSCR_EL1, GCSCRE0_EL1: no shadow stack until the host wants one.
            write_sysreg!("S3_0_C2_C5_0", 0);
            write_sysreg!("S3_0_C2_C5_2", 0);
        }
        // DP, LC off, C and P reset: no counter runs.
        write_sysreg!("pmcr_el0", 0b10_0110);
        core::arch::asm!("isb", options(nostack));
    }
}

/// Turns granule protection on. The tables are complete and visible.
pub fn enable_gpc(l0: u64, pps: u64) {
    const GPC: u64 = 1 << 16;
    // Inner shareable, write-back, 4 KiB granules.
    let control = pps | 1 << 8 | 1 << 10 | 0b11 << 12;
    // SAFETY: the tables open everything that EL3 uses, in the address space it uses it in.
    unsafe {
        write_sysreg!("S3_6_C2_C1_4", l0 >> 12);
        write_sysreg!("S3_6_C2_C1_6", control);
        core::arch::asm!("isb", "sys #6, c8, c1, #4", "dsb sy", "isb", options(nostack));
        write_sysreg!("S3_6_C2_C1_6", control | GPC);
        core::arch::asm!("isb", "sys #6, c8, c1, #4", "dsb sy", "isb", options(nostack));
    }
}

/// log2 of what a level 0 entry covers, from GPCCR_EL3.L0GPTSZ.
pub fn l0_bits() -> u32 {
    match read_sysreg!("S3_6_C2_C1_6") >> 20 & 0xF {
        4 => 34,
        6 => 36,
        9 => 39,
        _ => 30,
    }
}

/// Whether any of the registers whose contents are the implementer's holds a value at all; where they are
/// all constant, the world switch need not move them.
pub fn implementation_defined() -> u64 {
    macro_rules! holds {
        ($name:literal) => {{
            let old: u64 = read_sysreg!($name);
            // SAFETY: nothing runs at EL2 yet, and the old value comes back at once.
            unsafe { write_sysreg!($name, !old) };
            // SAFETY: a barrier.
            unsafe { core::arch::asm!("isb", options(nostack)) };
            let changed = read_sysreg!($name) != old;
            // SAFETY: as above.
            unsafe { write_sysreg!($name, old) };
            changed
        }};
    }
    let any = holds!("actlr_el2")
        | holds!("afsr0_el2")
        | holds!("afsr1_el2")
        | holds!("amair_el2")
        | holds!("hacr_el2");
    if any { feature::OTHER | feature::IMPLEMENTATION_DEFINED } else { 0 }
}
