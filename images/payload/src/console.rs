//! UART0 and the ways out.

use core::arch::asm;
use core::fmt::{self, Write};
use core::panic::PanicInfo;
use core::sync::atomic::{AtomicBool, Ordering};

const UART0: usize = 0x0900_0000;
const CR: usize = 0x30;
static LOCK: AtomicBool = AtomicBool::new(false);

struct Uart;

fn register(offset: usize) -> *mut u32 {
    core::ptr::with_exposed_provenance_mut(UART0 + offset)
}

impl Write for Uart {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        for byte in s.bytes() {
            // SAFETY: the host's console device; the MMU is off.
            unsafe { register(0).write_volatile(u32::from(byte)) };
        }
        Ok(())
    }
}

pub fn init() {
    // SAFETY: as above.
    unsafe { register(CR).write_volatile(0x301) };
}

/// Prints one line.
pub fn line(text: fmt::Arguments<'_>) {
    while LOCK.swap(true, Ordering::Acquire) {
        core::hint::spin_loop();
    }
    let _ = write!(Uart, "PAYLOAD: {text}\r\n");
    LOCK.store(false, Ordering::Release);
}

/// QEMU exits with status 1.
pub fn fail() -> ! {
    let block = [0x20026_u64, 1];
    // SAFETY: the block outlives the call.
    unsafe { asm!("hlt #0xF000", in("x0") 0x20_u64, in("x1") block.as_ptr(), options(nostack)) };
    loop {
        core::hint::spin_loop();
    }
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    let _ = write!(Uart, "PAYLOAD: panic FAILED {info}\r\n");
    fail()
}
