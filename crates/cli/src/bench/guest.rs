//! The guest's half of the bench: does one thing often, and counts ticks. The same in a Realm and in a plain VM.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::{FromRawFd as _, OwnedFd};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};

use anyhow::{Context as _, Result, ensure};

const PAGE: usize = 4096;

/// Touches `pages` pages of fresh memory, then the same number again; prints the ticks of both.
pub(crate) fn run(pages: usize) -> Result<u8> {
    // What the first mapping returns, the kernel hands out again first: the second round finds no new pages.
    println!("touch first {}", round(pages)?);
    println!("touch again {}", round(pages)?);
    Ok(0)
}

/// What a guest does without new memory: prints the ticks of each thing, divided by how often it was done.
pub(crate) fn probe() -> Result<u8> {
    let print = |name: &str, times: u64, ticks: u64| println!("probe {name} {}", ticks / times);
    print("loop", 1000, timed(|| spin(1_000_000))?);
    print("syscall", 10_000, timed(|| (0..10_000).try_for_each(|_| system_call()))?);
    print("switch", 2000, switches(2000)?);
    let device = config_space()?;
    print("register", 500, timed(|| (0..500).try_for_each(|_| Ok(device.read_exact_at(&mut [0; 4], 0)?)))?);
    print("disk-4k", 128, reads(4096, 128)?);
    print("disk-256k", 16, reads(256 << 10, 16)?);
    Ok(0)
}

fn timed(work: impl FnOnce() -> Result<()>) -> Result<u64> {
    let before = counter();
    work()?;
    Ok(counter() - before)
}

/// Arithmetic in which each step needs the one before.
fn spin(steps: u64) -> Result<()> {
    let sum =
        (0..steps).fold(1u64, |sum, step| std::hint::black_box(sum.wrapping_mul(31).wrapping_add(step)));
    std::hint::black_box(sum);
    Ok(())
}

/// One that does nothing.
fn system_call() -> Result<()> {
    // SAFETY: it takes no pointers. (The library remembers the own process's number, but not the parent's.)
    let parent = unsafe { libc::syscall(libc::SYS_getppid) };
    ensure!(parent >= 0, "getppid: {}", std::io::Error::last_os_error());
    Ok(())
}

/// Two threads that wake each other by pipes, `times` there and back.
fn switches(times: u64) -> Result<u64> {
    let ((mut here, mut there), (mut back, mut again)) = (pipe()?, pipe()?);
    let other = std::thread::spawn(move || -> Result<()> {
        for _ in 0..times {
            let mut byte = [0];
            here.read_exact(&mut byte)?;
            again.write_all(&byte)?;
        }
        Ok(())
    });
    let ticks = timed(|| {
        (0..times).try_for_each(|_| {
            there.write_all(&[1])?;
            Ok(back.read_exact(&mut [0])?)
        })
    })?;
    other.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??;
    Ok(ticks)
}

fn pipe() -> Result<(File, File)> {
    let mut ends = [0; 2];
    // SAFETY: pipe2 writes two descriptors, which nobody else owns.
    unsafe {
        ensure!(libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) == 0, "{}", std::io::Error::last_os_error());
        Ok((OwnedFd::from_raw_fd(ends[0]).into(), OwnedFd::from_raw_fd(ends[1]).into()))
    }
}

/// The configuration space of the first PCI function: four bytes of it are one access to a device.
fn config_space() -> Result<File> {
    let mut paths: Vec<_> = std::fs::read_dir("/sys/bus/pci/devices")?
        .flatten()
        .map(|entry| entry.path().join("config"))
        .collect();
    paths.sort();
    let path = paths.first().context("there is no PCI function")?;
    Ok(File::open(path)?)
}

/// Reads of the first disk that pass the cache by.
fn reads(length: usize, times: u64) -> Result<u64> {
    let disk = File::options()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open("/dev/vda")
        .context("there is no disk")?;
    // Direct reads need aligned memory.
    let mut buffer = vec![0; length + PAGE];
    let start = buffer.as_ptr().align_offset(PAGE);
    let place = &mut buffer[start..start + length];
    // The first one touches the buffer, and more.
    disk.read_exact_at(place, 0)?;
    timed(|| (0..times).try_for_each(|block| Ok(disk.read_exact_at(place, block * u64::try_from(length)?)?)))
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
