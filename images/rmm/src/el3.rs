//! Calls to EL3.

use cca_abi::rmm_el3::{BootStatus, fid};
use core::arch::asm;

/// Calls a service with up to three arguments; returns `x0` (zero: done), `x1` and `x2`.
#[inline]
pub(crate) fn call(fid: u64, a1: u64, a2: u64, a3: u64) -> [u64; 3] {
    let status: u64;
    let (first, second);
    // SAFETY: an SMC with a service's arguments; EL3 follows SMCCC and changes no memory but the shared page,
    // which no Rust reference covers.
    unsafe {
        asm!("smc #0", inlateout("x0") fid => status, inlateout("x1") a1 => first, inlateout("x2") a2 => second,
             inlateout("x3") a3 => _, clobber_abi("C"), options(nostack));
    }
    [status, first, second]
}

/// Memory of EL3's for good, page aligned; `None` if it has none, or is too old to be asked.
pub(crate) fn reserve(size: u64) -> Option<u64> {
    const PAGES: u64 = 12 << 56;
    let [status, pa, _] = call(fid::RESERVE_MEMORY, size, PAGES, 0);
    (status == 0 && pa != 0 && pa & 0xFFF == 0 && pa.checked_add(size).is_some()).then_some(pa)
}

/// Ends an RMI command: `results` become the host's `x0..x7`. Returns the next command's `x0..x7`.
///
/// Interface 0.x hands on only the first five; the others are then kept by EL3 itself.
#[inline(always)]
pub(crate) fn request_complete(results: &mut [u64; 8]) {
    let [r0, r1, r2, r3, r4, r5, r6, r7] = *results;
    let (n0, n1, n2, n3, n4, n5, n6, n7);
    // SAFETY: as in `call`; EL3 resumes here with the next command, and keeps the callee-saved registers.
    unsafe {
        asm!("smc #0",
             inlateout("x0") fid::REQ_COMPLETE => n0, inlateout("x1") r0 => n1, inlateout("x2") r1 => n2,
             inlateout("x3") r2 => n3, inlateout("x4") r3 => n4, inlateout("x5") r4 => n5,
             inlateout("x6") r5 => n6, inlateout("x7") r6 => n7, inlateout("x8") r7 => _,
             clobber_abi("C"), options(nostack));
    }
    *results = [n0, n1, n2, n3, n4, n5, n6, n7];
}

/// Reports that this CPU's boot is over. On success the first RMI command's `x0..x7` come back; after a
/// failure EL3 never returns.
pub(crate) fn boot_complete(status: BootStatus, token: u64) -> [u64; 8] {
    let (n0, n1, n2, n3, n4, n5, n6, n7);
    // SAFETY: as in `request_complete`.
    unsafe {
        asm!("smc #0",
             inlateout("x0") fid::BOOT_COMPLETE => n0, inlateout("x1") status.to_register() => n1,
             inlateout("x2") token => n2, lateout("x3") n3, lateout("x4") n4, lateout("x5") n5,
             lateout("x6") n6, lateout("x7") n7, clobber_abi("C"), options(nostack));
    }
    [n0, n1, n2, n3, n4, n5, n6, n7]
}
