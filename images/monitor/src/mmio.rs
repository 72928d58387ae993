//! Device registers.

/// Reads a 32-bit register.
///
/// # Safety
/// `address` is a register of a device that is mapped at EL3, and reading it has no effect on memory.
pub unsafe fn read32(address: usize) -> u32 {
    // SAFETY: the caller's promise.
    unsafe { core::ptr::with_exposed_provenance::<u32>(address).read_volatile() }
}

/// Writes a 32-bit register.
///
/// # Safety
/// As for [`read32`], for writing.
pub unsafe fn write32(address: usize, value: u32) {
    // SAFETY: the caller's promise.
    unsafe { core::ptr::with_exposed_provenance_mut::<u32>(address).write_volatile(value) }
}

/// Writes a 64-bit register.
///
/// # Safety
/// As for [`read32`], for writing.
pub unsafe fn write64(address: usize, value: u64) {
    // SAFETY: the caller's promise.
    unsafe { core::ptr::with_exposed_provenance_mut::<u64>(address).write_volatile(value) }
}
