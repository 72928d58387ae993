//! UART0, shared with the host: rare lines, each prefixed `RMM: `.

use core::fmt::{self, Write};
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

static BASE: AtomicU64 = AtomicU64::new(0);
static LOCK: spin::Mutex<()> = spin::Mutex::new(());

/// Lines go to the PL011 at `base` from now on; it is mapped as device memory.
pub(crate) fn set(base: u64) {
    if base != 0 {
        // SAFETY: the PL011's page is mapped. Enabling the transmitter is all that it needs; the host sets up
        // the rest when it takes the device over.
        unsafe { ((base + 0x30) as *mut u32).write_volatile(0x301) };
    }
    BASE.store(base, Relaxed);
}

struct Pl011(u64);

impl Pl011 {
    fn put(&self, byte: u8) {
        // SAFETY: `BASE` is set only to a PL011's page that the final tables map as device memory.
        unsafe {
            let flags = (self.0 + 0x18) as *const u32;
            while flags.read_volatile() & (1 << 5) != 0 {}
            (self.0 as *mut u32).write_volatile(u32::from(byte));
        }
    }
}

impl Write for Pl011 {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if byte == b'\n' {
                self.put(b'\r');
            }
            self.put(byte);
        }
        Ok(())
    }
}

/// Writes one line.
pub(crate) fn line(text: fmt::Arguments<'_>) {
    let base = BASE.load(Relaxed);
    if base == 0 {
        return;
    }
    let _guard = LOCK.lock();
    // A PL011 does not fail, and a `Display` that does is not worth stopping for.
    let _ = writeln!(Pl011(base), "RMM: {text}");
}

/// Writes one line without the lock: another CPU, or this one, may have died holding it.
pub(crate) fn fatal_line(text: fmt::Arguments<'_>) {
    let base = BASE.load(Relaxed);
    if base != 0 {
        let _ = writeln!(Pl011(base), "\nRMM: fatal: {text}");
    }
}
