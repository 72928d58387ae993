//! What a `no_std` program needs to exist: an allocator and a place where panics end.

use core::alloc::{GlobalAlloc, Layout};
use core::fmt::Write;
use core::panic::PanicInfo;

use crate::ffi;

struct KernelAllocator;

// SAFETY: shim_alloc gives memory of at least the wanted size, aligned as kmalloc and kvmalloc guarantee (powers of
// two are naturally aligned, and the shim rounds up to one when the alignment needs it), or null. shim_free takes
// back exactly such memory.
unsafe impl GlobalAlloc for KernelAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: no preconditions beyond process context, which is a rule of the whole module: atomic sections
        // do not allocate.
        unsafe { ffi::shim_alloc(layout.size(), layout.align()) }
    }

    unsafe fn dealloc(&self, p: *mut u8, _: Layout) {
        // SAFETY: the caller vouches that `p` came from `alloc`.
        unsafe { ffi::shim_free(p) }
    }
}

#[global_allocator]
static ALLOCATOR: KernelAllocator = KernelAllocator;

/// Text of bounded length on the stack, for places that must not allocate. What does not fit is cut off.
pub(crate) struct Line {
    bytes: [u8; 320],
    len: usize,
}

impl Line {
    pub(crate) fn new() -> Self {
        Self { bytes: [0; 320], len: 0 }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or(&[])
    }
}

impl Write for Line {
    fn write_str(&mut self, s: &str) -> core::fmt::Result {
        for &b in s.as_bytes() {
            if let Some(slot) = self.bytes.get_mut(self.len) {
                *slot = b;
                self.len += 1;
            }
        }
        Ok(())
    }
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    let mut line = Line::new();
    let _ = write!(line, "{info}");
    let text = line.bytes();
    // SAFETY: the text is valid for its length; the function does not return.
    unsafe { ffi::shim_bug(text.as_ptr(), text.len()) }
}
