//! Where everything is: the image's own parts, the carve-out behind it, and the per-CPU slots.

/// Bytes from the image's base that belong to the RMM: the carve-out without EL3's shared page.
pub(crate) const CARVE_OUT_SIZE: u64 = 0x017F_F000;

/// NS memory at physical address `pa` is mapped at `pa + NS_ALIAS`; everything else at its physical address.
/// The exception vectors test this one bit to recognise a fault on host memory.
pub(crate) const NS_ALIAS: u64 = 1 << NS_ALIAS_BIT;
/// See [`NS_ALIAS`].
pub(crate) const NS_ALIAS_BIT: u32 = 46;

/// A CPU's slot: data in the lower half, then unmapped guard pages, the stack in the upper half.
/// Slots are aligned to their size, thus bit [`STACK_BIT`] of a good stack pointer is set and an overflow
/// clears it, which the vectors can test without a free register.
pub(crate) const SLOT_SIZE: u64 = 0x1_0000;
/// See [`SLOT_SIZE`].
pub(crate) const STACK_BIT: u32 = 15;
/// Bytes of stack per CPU.
pub(crate) const STACK_SIZE: u64 = 1 << STACK_BIT;

/// CPUs that the image can serve. The slots are allocated for as many as EL3 announces.
pub(crate) const MAX_CPUS: u64 = 128;

// For those who look at the image from outside: the sizes of its stacks.
core::arch::global_asm!(
    ".globl rmm_stack_size, rmm_boot_stack_size",
    ".set rmm_stack_size, {stack}",
    ".set rmm_boot_stack_size, {boot}",
    stack = const STACK_SIZE,
    boot = const SLOT_SIZE,
);

unsafe extern "C" {
    static rmm_image_start: u8;
    static rmm_text_end: u8;
    static rmm_rodata_end: u8;
    static rmm_image_end: u8;
}

/// Addresses of the image's parts as loaded.
pub(crate) struct Image {
    /// First byte, text.
    pub(crate) start: u64,
    /// End of text, start of read-only data.
    pub(crate) text_end: u64,
    /// End of read-only data, start of writable data.
    pub(crate) rodata_end: u64,
    /// End of .bss.
    pub(crate) end: u64,
}

/// Where the image is.
pub(crate) fn image() -> Image {
    Image {
        start: (&raw const rmm_image_start).addr() as u64,
        text_end: (&raw const rmm_text_end).addr() as u64,
        rodata_end: (&raw const rmm_rodata_end).addr() as u64,
        end: (&raw const rmm_image_end).addr() as u64,
    }
}

/// Hands out the carve-out behind the image during boot; nothing is ever given back.
pub(crate) struct Bump {
    next: u64,
    end: u64,
}

impl Bump {
    /// The memory from the image's end to `end`.
    pub(crate) fn new(start: u64, end: u64) -> Self {
        Self { next: start, end }
    }

    /// `size` bytes aligned to `align` (a power of two), zeroed unless the caller wants to do that later.
    pub(crate) fn take(&mut self, size: u64, align: u64) -> Option<u64> {
        let base = self.next.checked_add(align - 1)? & !(align - 1);
        let end = base.checked_add(size)?;
        if end > self.end {
            return None;
        }
        self.next = end;
        Some(base)
    }

    /// Bytes that are left.
    pub(crate) fn room(&self) -> u64 {
        self.end.saturating_sub(self.next)
    }

    /// One zeroed page.
    pub(crate) fn zeroed_page(&mut self) -> Option<u64> {
        let page = self.take(4096, 4096)?;
        // SAFETY: `take` gave this memory to nobody else, it is inside the carve-out, which the boot tables map.
        unsafe { core::ptr::write_bytes(page as *mut u64, 0, 512) };
        Some(page)
    }
}
