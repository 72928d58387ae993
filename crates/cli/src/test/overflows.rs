//! The guest's half of the PMU's test: a counter that overflows again and again, each time into a signal.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

/// Cycles between two overflows.
const PERIOD: u64 = 1_000_000;
/// How long to wait for all of them.
const LIMIT: Duration = Duration::from_secs(300);

/// `struct perf_event_attr`, as far as its first version goes.
#[repr(C)]
#[derive(Default)]
struct Attributes {
    kind: u32,
    size: u32,
    config: u64,
    sample_period: u64,
    sample_type: u64,
    read_format: u64,
    flags: u64,
    wakeup_events: u32,
    breakpoint_type: u32,
    config1: u64,
}

/// `PERF_TYPE_HARDWARE`
const HARDWARE: u32 = 0;
/// `PERF_COUNT_HW_CPU_CYCLES`
const CYCLES: u64 = 0;
/// The event begins disabled.
const DISABLED: u64 = 1 << 0;
/// `PERF_EVENT_IOC_ENABLE` and `PERF_EVENT_IOC_DISABLE`
const ENABLE: u64 = 0x2400;
const DISABLE: u64 = 0x2401;

static SIGNALS: AtomicU64 = AtomicU64::new(0);

extern "C" fn count(_: libc::c_int) {
    SIGNALS.fetch_add(1, SeqCst);
}

/// Counts cycles until a counter has overflown `wanted` times; prints how often it did.
pub(crate) fn run(wanted: u64) -> Result<u8> {
    let size = u32::try_from(size_of::<Attributes>())?;
    let attributes = Attributes {
        kind: HARDWARE,
        size,
        config: CYCLES,
        sample_period: PERIOD,
        flags: DISABLED,
        ..Attributes::default()
    };
    // SAFETY: the kernel reads `size` bytes of the structure; this process on any CPU, no group, no flags.
    let event = unsafe { libc::syscall(libc::SYS_perf_event_open, &raw const attributes, 0, -1, -1, 0) };
    ensure!(event >= 0, "no counter: {}", std::io::Error::last_os_error());
    let event = libc::c_int::try_from(event)?;
    let check = |result: libc::c_int, what: &str| {
        ensure!(result >= 0, "{what}: {}", std::io::Error::last_os_error());
        Ok(())
    };
    // SAFETY: the handler only adds to an atomic; the descriptor is the event's.
    unsafe {
        let handler = count as extern "C" fn(libc::c_int);
        ensure!(libc::signal(libc::SIGIO, handler as usize) != libc::SIG_ERR, "no handler");
        check(libc::fcntl(event, libc::F_SETOWN, libc::getpid()), "no owner")?;
        check(libc::fcntl(event, libc::F_SETFL, libc::O_ASYNC), "no signals")?;
        check(libc::ioctl(event, ENABLE as _, 0), "cannot start")?;
    }
    let start = Instant::now();
    while SIGNALS.load(SeqCst) < wanted && start.elapsed() < LIMIT {
        std::hint::spin_loop();
    }
    let mut cycles = 0_u64;
    // SAFETY: as above; a counter is one 64-bit number.
    unsafe {
        check(libc::ioctl(event, DISABLE as _, 0), "cannot stop")?;
        let read = libc::read(event, (&raw mut cycles).cast(), size_of::<u64>());
        ensure!(read == 8, "cannot read the counter");
    }
    let signals = SIGNALS.load(SeqCst);
    ensure!(signals >= wanted, "{signals} overflows in {} s, {cycles} cycles", start.elapsed().as_secs());
    ensure!(cycles / PERIOD >= wanted, "{signals} overflows in only {cycles} cycles");
    println!("{wanted} overflows");
    Ok(0)
}
