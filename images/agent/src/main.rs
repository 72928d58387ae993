//! The guest's agent as a program.
//!
//! Compiled for the bare machine, since it needs no more than the kernel's calls; Linux runs it like any static program.
#![no_std]
#![no_main]

use core::arch::global_asm;
use core::panic::PanicInfo;

use realm_agent::sys::Fd;
use realm_agent::{server, sys};

// Where the kernel starts it, with the stack aligned as Rust wants it.
global_asm!(
    ".globl _start",
    "_start:",
    "mov x29, xzr",
    "mov x30, xzr",
    "b {main}",
    main = sym main,
);

extern "C" fn main() -> ! {
    if server::serve().is_err() {
        // SAFETY: nothing here closes standard error.
        let errors = core::mem::ManuallyDrop::new(unsafe { Fd::from_raw(2) });
        let _ =
            sys::write_all(&errors, b"realm-agent: there is no vsock, or somebody has the agent's port\n");
    }
    sys::exit(1)
}

#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    sys::exit(125)
}
