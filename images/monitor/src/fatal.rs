//! The end: what went wrong, in words, and QEMU exits with a failure.

use core::arch::asm;
use core::panic::PanicInfo;
use core::sync::atomic::{AtomicU64, Ordering};

use monitor::Regs;

use crate::layout::SECURE_GPIO;
use crate::mmio::write32;
use crate::sysreg::read_sysreg;
use crate::uart::crash_line;

/// The CPU that failed first: its MPIDR, of which bit 31 is always set. Zero while all is well.
static FAILED: AtomicU64 = AtomicU64::new(0);

/// Reports an exception that no handler expects. `vector` is its number in the table.
#[unsafe(no_mangle)]
extern "C" fn el3_fatal(regs: &Regs, vector: u64) -> ! {
    report(regs, vector)
}

/// Reports the state of the exception that was just taken.
pub fn report(regs: &Regs, vector: u64) -> ! {
    only_once();
    let esr = read_sysreg!("esr_el3");
    let mfar = read_sysreg!("S3_6_C6_C0_5");
    let scr = read_sysreg!("scr_el3");
    let spsr = read_sysreg!("spsr_el3");
    let from = match (spsr >> 2 & 3, scr >> 62 & 1, scr & 1) {
        (3, _, _) => "EL3",
        (2, 1, _) => "R-EL2",
        (_, 1, _) => "R-EL1/0",
        (2, _, 1) => "NS-EL2",
        (_, _, 1) => "NS-EL1/0",
        _ => "Secure",
    };
    let kind = ["synchronous", "IRQ", "FIQ", "SError"];
    crash_line(format_args!(
        "fatal: unexpected {} exception from {from} (vector {vector}): {}",
        kind.get((vector & 3) as usize).copied().unwrap_or("?"),
        class_name(esr >> 26 & 0x3F)
    ));
    crash_line(format_args!(
        "ESR_EL3={esr:#x} ELR_EL3={:#x} FAR_EL3={:#x} MFAR_EL3={mfar:#x} SPSR_EL3={spsr:#x} SCR_EL3={scr:#x}",
        read_sysreg!("elr_el3"),
        read_sysreg!("far_el3")
    ));
    details(esr, mfar);
    for (i, chunk) in regs.chunks(4).enumerate() {
        let r = |n: usize| chunk.get(n).copied().unwrap_or(0);
        crash_line(format_args!("x{:<2} {:016x} {:016x} {:016x} {:016x}", i * 4, r(0), r(1), r(2), r(3)));
    }
    crash_line(format_args!("CPU MPIDR={:#x}", read_sysreg!("mpidr_el1")));
    stop()
}

fn details(esr: u64, mfar: u64) {
    let iss = esr & 0x1FF_FFFF;
    let status = esr & 0x3F;
    match esr >> 26 & 0x3F {
        0x18 => crash_line(format_args!(
            "trapped {} S{}_{}_C{}_C{}_{} (x{}): an enable in SCR_EL3, CPTR_EL3 or MDCR_EL3 is missing",
            if iss & 1 == 1 { "MRS" } else { "MSR" },
            iss >> 20 & 3,
            iss >> 14 & 7,
            iss >> 10 & 0xF,
            iss >> 1 & 0xF,
            iss >> 17 & 7,
            iss >> 5 & 0x1F
        )),
        0x1E => {
            let what = match iss >> 14 & 0x3F {
                0 => "address size fault",
                0b000100 | 0b000101 => "walk fault: a table descriptor is invalid",
                0b001100 | 0b001101 => "granule protection fault",
                0b010100 | 0b010101 => "external abort on the tables",
                _ => "?",
            };
            crash_line(format_args!(
                "GPC: {what}, physical address {:#x} in {}, {}",
                mfar & 0x000F_FFFF_FFFF_FFFF,
                ["Secure", "Root", "Non-secure", "Realm"].get((mfar >> 62) as usize).copied().unwrap_or("?"),
                if iss >> 20 & 1 == 1 { "fetch" } else { "data" }
            ));
        }
        0x20 | 0x21 | 0x24 | 0x25 => {
            let what = match status {
                0x23..=0x28 => "granule protection fault",
                0x04..=0x07 => "translation fault",
                0x08..=0x0B => "access flag fault",
                0x0C..=0x0F => "permission fault",
                0x10 => "external abort: nothing there in this world",
                0x21 => "alignment fault",
                _ => "other",
            };
            crash_line(format_args!(
                "abort: {what} (status {status:#x}), {}",
                if iss >> 6 & 1 == 1 { "write" } else { "read" }
            ));
        }
        _ => {}
    }
}

fn class_name(class: u64) -> &'static str {
    match class {
        0x00 => "undefined instruction",
        0x07 => "floating point trapped",
        0x09 => "pointer authentication trapped",
        0x0E => "illegal execution state",
        0x13 => "SMC from AArch32",
        0x17 => "SMC",
        0x18 => "system register access trapped",
        0x19 => "SVE trapped",
        0x1D => "SME trapped",
        0x1E => "granule protection check",
        0x20 => "instruction abort from below",
        0x21 => "instruction abort",
        0x22 => "PC alignment",
        0x24 => "data abort from below",
        0x25 => "data abort",
        0x26 => "SP alignment",
        0x2F => "SError",
        _ => "other",
    }
}

/// Ends the machine with a failure after a message.
pub fn fatal(message: core::fmt::Arguments<'_>) -> ! {
    only_once();
    crash_line(format_args!("fatal: {message}"));
    stop()
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    fatal(format_args!("{info}"))
}

/// Returns for the first failure, whose report is the one worth reading. A CPU that fails while it reports
/// switches the machine off; one that fails meanwhile leaves the first its time.
fn only_once() {
    let me = read_sysreg!("mpidr_el1");
    match FAILED.compare_exchange(0, me, Ordering::AcqRel, Ordering::Acquire) {
        Ok(_) => {}
        Err(first) if first == me => system_off(),
        Err(_) => loop {
            core::hint::spin_loop();
        },
    }
}

/// QEMU exits with status 1 by semihosting; where that is off, the call is undefined, comes back here by the
/// vectors, and the machine is switched off.
fn stop() -> ! {
    const SYS_EXIT_EXTENDED: u64 = 0x20;
    const APPLICATION_EXIT: u64 = 0x20026;
    let block = [APPLICATION_EXIT, 1_u64];
    // SAFETY: the block lives until the call returns, which it does not.
    unsafe {
        asm!("hlt #0xF000", in("x0") SYS_EXIT_EXTENDED, in("x1") block.as_ptr(), options(nostack));
    }
    system_off()
}

fn gpio(pin: u32) -> ! {
    // SAFETY: only EL3 uses this device.
    unsafe {
        write32(SECURE_GPIO + 0x400, 1 << pin);
        write32(SECURE_GPIO + (4 << pin), 0);
        write32(SECURE_GPIO + (4 << pin), 1 << pin);
    }
    loop {
        core::hint::spin_loop();
    }
}

/// Switches the machine off; QEMU exits with status 0.
pub fn system_off() -> ! {
    gpio(0)
}

/// Resets the machine. Secure RAM keeps its contents over that, so what holds the other CPUs until the first one
/// has set it up must be cleared.
pub fn system_reset() -> ! {
    unsafe extern "C" {
        static mut __hold: u64;
    }
    // SAFETY: a word that only the reset code looks at.
    unsafe {
        let hold = &raw mut __hold;
        hold.write_volatile(0);
        asm!("dc civac, {}", "dsb sy", in(reg) hold, options(nostack));
    }
    gpio(1)
}
