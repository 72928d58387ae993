//! The end: a line that says what broke, then nothing runs on this CPU any more.

use crate::console;
use core::arch::asm;
use core::fmt;
use core::panic::PanicInfo;
use core::sync::atomic::{AtomicBool, Ordering::Relaxed};

static DYING: AtomicBool = AtomicBool::new(false);

/// Reports `reason` and stops. Where a debugger or an emulator listens to halts (semihosting), the machine is
/// ended with a failure status, so that a test does not have to wait for its timeout.
pub(crate) fn stop(reason: fmt::Arguments<'_>) -> ! {
    if !DYING.swap(true, Relaxed) {
        console::fatal_line(reason);
        let block: [u64; 2] = [0x20026, 1];
        // SAFETY: SYS_EXIT. Where nobody listens this is an undefined instruction and comes back to the vectors,
        // which find `DYING` set and park.
        unsafe { asm!("hlt #0xf000", in("x0") 0x18, in("x1") block.as_ptr()) };
    }
    park()
}

/// Keeps this CPU out of every world.
pub(crate) fn park() -> ! {
    loop {
        // SAFETY: waits; interrupts are masked.
        unsafe { asm!("wfi", options(nomem, nostack)) };
    }
}

/// An exception at R-EL2 that nothing repairs. Called by the vectors.
#[unsafe(no_mangle)]
extern "C" fn rmm_fatal_exception(kind: u64, link: u64) -> ! {
    let (esr, elr, far) = (read_reg!("esr_el2"), read_reg!("elr_el2"), read_reg!("far_el2"));
    let base = crate::layout::image().start;
    let what = match kind {
        0 => "synchronous exception",
        1 => "unexpected IRQ",
        2 => "unexpected FIQ",
        3 => "SError",
        4 => "stack overflow",
        _ => "exception on the wrong stack",
    };
    stop(format_args!(
        "{what} at R-EL2: ESR {esr:#x} (EC {:#x}) ELR {elr:#x} (image+{:#x}) FAR {far:#x} LR image+{:#x}",
        esr >> 26,
        elr.wrapping_sub(base),
        link.wrapping_sub(base)
    ))
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    match info.location() {
        Some(at) => stop(format_args!("{} at {}:{}", info.message(), at.file(), at.line())),
        None => stop(format_args!("{}", info.message())),
    }
}
