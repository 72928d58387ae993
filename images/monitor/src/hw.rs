//! The core's [`Platform`] on this machine.

use core::arch::asm;
use core::fmt;
use core::sync::atomic::{AtomicU64, Ordering};

use monitor::{MAX_CPUS, Pas, Platform};

use crate::gic;
use crate::layout::SHARED_PAGE;
use crate::sysreg::read_sysreg;
use crate::uart;

/// A parked CPU polls its own cache line, with its caches off.
#[repr(C, align(64))]
pub struct Release(AtomicU64);

#[unsafe(no_mangle)]
static RELEASE: [Release; MAX_CPUS] = [const { Release(AtomicU64::new(0)) }; MAX_CPUS];

/// The machine.
pub struct Machine;

fn descriptor(pa: u64) -> &'static AtomicU64 {
    // SAFETY: the core only asks for descriptors inside the tables, which lie in secure RAM that is mapped,
    // used for nothing else, and never accessed but through here.
    unsafe { AtomicU64::from_ptr(core::ptr::with_exposed_provenance_mut(pa as usize)) }
}

fn shared_page() -> *mut u8 {
    core::ptr::with_exposed_provenance_mut(SHARED_PAGE as usize)
}

impl Platform for Machine {
    fn gpt_load(&self, pa: u64) -> u64 {
        descriptor(pa).load(Ordering::Acquire)
    }

    fn gpt_store(&self, pa: u64, value: u64) {
        descriptor(pa).store(value, Ordering::Release);
    }

    fn gpt_compare_exchange(&self, pa: u64, old: u64, new: u64) -> Result<(), u64> {
        descriptor(pa).compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire).map(drop)
    }

    fn gpt_invalidate(&self, base: u64, log2_size: u32) {
        let size = match log2_size {
            12 => 0_u64,
            21 => 3,
            25 => 4,
            29 => 5,
            _ => 6,
        };
        let operand = base >> 12 | size << 44;
        // SAFETY: forgetting cached protection is always allowed.
        unsafe {
            asm!("dsb ishst", "sys #6, c8, c4, #7, {}", "dsb osh", in(reg) operand, options(nostack));
        }
    }

    fn flush_granule(&self, pa: u64, pas: Pas) {
        let space = match pas {
            Pas::Secure => 0b00_u64,
            Pas::Root => 0b01,
            Pas::NonSecure => 0b10,
            Pas::Realm => 0b11,
        };
        // SAFETY: cleaning and invalidating changes no memory that software sees. 64-byte lines, eight at a
        // time.
        unsafe {
            asm!(
                "2:",
                "sys #6, c7, c14, #1, {at}",
                "add {at}, {at}, #64",
                "sys #6, c7, c14, #1, {at}",
                "add {at}, {at}, #64",
                "sys #6, c7, c14, #1, {at}",
                "add {at}, {at}, #64",
                "sys #6, c7, c14, #1, {at}",
                "add {at}, {at}, #64",
                "tst {at}, #0xfff",
                "b.ne 2b",
                "dsb osh",
                at = inout(reg) pa | space << 62 => _,
                options(nostack),
            );
        }
    }

    fn shared_page_read(&self, offset: usize, out: &mut [u8]) {
        for (i, byte) in out.iter_mut().enumerate() {
            // SAFETY: the caller stays inside the page; the RMM may write it at the same time, so every byte is
            // read once and volatile.
            *byte = unsafe { shared_page().add(offset + i).read_volatile() };
        }
    }

    fn shared_page_write(&self, offset: usize, data: &[u8]) {
        for (i, byte) in data.iter().enumerate() {
            // SAFETY: as for reading.
            unsafe { shared_page().add(offset + i).write_volatile(*byte) };
        }
    }

    fn release_cpu(&self, cpu: usize) {
        if let Some(release) = RELEASE.get(cpu) {
            release.0.store(1, Ordering::Release);
            // SAFETY: the parked CPU reads memory, not caches.
            unsafe { asm!("dc civac, {}", "dsb sy", in(reg) &raw const release.0, options(nostack)) };
            gic::wake(cpu);
        }
    }

    fn random(&self) -> Option<u64> {
        // A reseeded number may take its time.
        for _ in 0..16 {
            let (value, failed): (u64, u64);
            // SAFETY: RNDRRS; the core asks only on CPUs that have it.
            unsafe {
                asm!("mrs {}, S3_3_C2_C4_1", "cset {}, eq", out(reg) value, out(reg) failed, options(nostack, nomem));
            }
            if failed == 0 {
                return Some(value);
            }
        }
        None
    }

    fn print(&self, line: fmt::Arguments<'_>) {
        uart::line(line);
    }

    fn counter(&self) -> u64 {
        read_sysreg!("cntpct_el0")
    }
}
