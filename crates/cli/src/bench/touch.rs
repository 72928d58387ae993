//! The guest's half of the bench: touches pages that nobody has touched, and counts.

use anyhow::{Result, ensure};

const PAGE: usize = 4096;

/// Touches `pages` pages of fresh memory, then the same number again; prints the ticks of both.
pub(crate) fn run(pages: usize) -> Result<u8> {
    // What the first mapping returns, the kernel hands out again first: the second round finds no new pages.
    println!("touch first {}", round(pages)?);
    println!("touch again {}", round(pages)?);
    Ok(0)
}

fn round(pages: usize) -> Result<u64> {
    let length = pages.max(1) * PAGE;
    // SAFETY: a new private mapping, used only below and only within its length.
    let memory = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            length,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    ensure!(memory != libc::MAP_FAILED, "no memory: {}", std::io::Error::last_os_error());
    // SAFETY: the mapping above. Whole pages, not huge ones, are what is measured.
    unsafe { libc::madvise(memory, length, libc::MADV_NOHUGEPAGE) };
    let before = counter();
    for page in 0..pages {
        // SAFETY: within the mapping.
        unsafe { memory.cast::<u8>().add(page * PAGE).write_volatile(1) };
    }
    let ticks = counter() - before;
    // SAFETY: the mapping above, not used afterwards.
    unsafe { libc::munmap(memory, length) };
    Ok(ticks)
}

/// The clock that counts instructions on the bench's machine.
#[cfg(target_arch = "aarch64")]
fn counter() -> u64 {
    let value;
    // SAFETY: reads a counter that Linux lets programs read.
    unsafe { std::arch::asm!("isb", "mrs {}, cntvct_el0", out(reg) value, options(nostack, nomem)) };
    value
}

/// The clock, where there is no such counter: nanoseconds.
#[cfg(not(target_arch = "aarch64"))]
fn counter() -> u64 {
    use std::sync::OnceLock;
    use std::time::Instant;
    static START: OnceLock<Instant> = OnceLock::new();
    u64::try_from(START.get_or_init(Instant::now).elapsed().as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    #[test]
    fn touching_takes_time() {
        assert!(super::round(64).unwrap() > 0);
    }
}
