//! The monitor's console: the secure PL011, one line at a time.

use core::fmt::{self, Write};
use core::sync::atomic::{AtomicBool, Ordering};

use crate::layout::{UART0, UART1};
use crate::mmio::{read32, write32};

const DR: usize = 0x00;
const FR: usize = 0x18;
const FR_TX_FULL: u32 = 1 << 5;
const CR: usize = 0x30;
const CR_ENABLE_TX_RX: u32 = 0x301;

static LOCK: AtomicBool = AtomicBool::new(false);

/// Switches on this console, and the one that the manifest promises to the RMM.
pub fn init() {
    // SAFETY: UART1 is a PL011 that only EL3 uses; UART0 is another, which nobody uses yet.
    unsafe {
        write32(UART1 + CR, CR_ENABLE_TX_RX);
        write32(UART0 as usize + CR, CR_ENABLE_TX_RX);
    };
}

struct Uart;

impl Write for Uart {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        for byte in s.bytes() {
            // SAFETY: as in `init`.
            unsafe {
                while read32(UART1 + FR) & FR_TX_FULL != 0 {}
                write32(UART1 + DR, u32::from(byte));
            }
        }
        Ok(())
    }
}

/// Prints a line, not mixed with those of other CPUs.
pub fn line(text: fmt::Arguments<'_>) {
    while LOCK.compare_exchange_weak(false, true, Ordering::Acquire, Ordering::Relaxed).is_err() {
        core::hint::spin_loop();
    }
    // The UART never fails.
    let _ = write!(Uart, "EL3: {text}\r\n");
    LOCK.store(false, Ordering::Release);
}

/// Prints a line without waiting for anybody: the CPU that holds the lock may be the one that crashed.
pub fn crash_line(text: fmt::Arguments<'_>) {
    let _ = write!(Uart, "EL3: {text}\r\n");
}
