//! The guest's agent as a program.
//!
//! Compiled for the bare machine, since it needs no more than the kernel's calls; Linux runs it like any static program.
#![no_std]
#![no_main]

use core::arch::global_asm;
use core::ffi::{CStr, c_char};
use core::panic::PanicInfo;

use realm_agent::sys::Fd;
use realm_agent::{connect, server, sys};

// Where the kernel starts it, with the stack aligned as Rust wants it. On the stack are the number of arguments and
// pointers to them.
global_asm!(
    ".globl _start",
    "_start:",
    "mov x29, xzr",
    "mov x30, xzr",
    "mov x0, sp",
    "b {main}",
    main = sym main,
);

extern "C" fn main(stack: *const usize) -> ! {
    // SAFETY: nothing here closes standard error.
    let errors = core::mem::ManuallyDrop::new(unsafe { Fd::from_raw(2) });
    let say = |parts: &[&[u8]]| {
        for part in parts {
            let _ = sys::write_all(&errors, part);
        }
    };
    // SAFETY: the stack is as the kernel left it.
    match unsafe { [argument(stack, 1), argument(stack, 2), argument(stack, 3)] } {
        [None, ..] => {
            if server::serve().is_err() {
                say(&[b"realm-agent: there is no vsock, or somebody has the agent's port\n"]);
            }
            sys::exit(1)
        }
        [Some(b"connect"), Some(port), None] => {
            let Some(number) = core::str::from_utf8(port).ok().and_then(|digits| digits.parse().ok()) else {
                say(&[b"realm: connect: `", port, b"` is no port\n"]);
                sys::exit(OURS)
            };
            if let Err(why) = connect::run(number) {
                say(&[b"realm: connect: port ", port, b" of the host: ", why, b"\n"]);
                sys::exit(OURS)
            }
            sys::exit(0)
        }
        _ => {
            say(&[b"Usage: realm-agent [connect PORT]\n"]);
            sys::exit(2)
        }
    }
}

/// The status where it is not a command's own.
const OURS: u8 = 125;

/// An argument of this program.
///
/// # Safety
///
/// `stack` is where the kernel put the number of arguments and, behind it, as many pointers to texts that end with a zero
/// and stay there.
unsafe fn argument(stack: *const usize, index: usize) -> Option<&'static [u8]> {
    // SAFETY: the caller answers for the number, and for the pointers below it.
    unsafe {
        let count = stack.read();
        if index >= count {
            return None;
        }
        let text = stack.add(1 + index).cast::<*const c_char>().read();
        Some(CStr::from_ptr(text).to_bytes())
    }
}

#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    sys::exit(125)
}
