//! What C calls: start and end of the module, and the file operations.

use alloc::boxed::Box;
use alloc::sync::Arc;
use core::cell::UnsafeCell;
use core::ffi::c_void;
use core::fmt::Write as _;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use cca_abi::kvm::Generation;
use kvm_realm::files::FileObject;
use kvm_realm::{Errno, System};

use crate::counters;
use crate::ffi::{Facts, LOG_ALWAYS};
use crate::kernel::{Fire, Hook, Linux, log};

const ENODEV: i32 = -19;
const CONDUIT_SMC: u32 = 1;
const SMCCC_1_2: u64 = 0x1_0002;

static COUNTER_HZ: AtomicU64 = AtomicU64::new(1);

/// Frequency of the system counter.
pub(crate) fn counter_hz() -> u64 {
    COUNTER_HZ.load(Relaxed)
}

/// `RMI_VERSION`'s answer. Module parameters are readable before the module has started and until after its end, so
/// they must not look at the system object.
static RMI_VERSION: AtomicU64 = AtomicU64::new(0);

/// The generation of the user ABI, for the same.
static ABI: AtomicU64 = AtomicU64::new(0);

/// The one system object: written at module start before any file can be opened, taken at module end when none can
/// be open any more, shared in between.
struct TheSystem(UnsafeCell<Option<Arc<System<Linux>>>>);

// SAFETY: see the type: the kernel's module code orders the two writes before and after all reads.
unsafe impl Sync for TheSystem {}

static SYSTEM: TheSystem = TheSystem(UnsafeCell::new(None));

fn system() -> Option<&'static Arc<System<Linux>>> {
    // SAFETY: not written while files or debugfs entries exist, and only those come here.
    unsafe { (*SYSTEM.0.get()).as_ref() }
}

/// Why this kernel or its firmware cannot do, if so.
fn objection(facts: &Facts) -> Option<&'static str> {
    if facts.page_size != 4096 {
        return Some("module: the kernel's page size is not 4096, the size of a granule");
    }
    if facts.vhe == 0 {
        return Some("module: the kernel does not itself run at EL2 (VHE)");
    }
    if facts.pseudo_nmi != 0 {
        return Some(
            "module: the kernel uses pseudo-NMIs (irqchip.gicv3_pseudo_nmi), which are not supported",
        );
    }
    if facts.conduit != CONDUIT_SMC {
        return Some("RMM: no RMI (the firmware is not called by SMC): this machine cannot run Realms");
    }
    if facts.smccc_version < SMCCC_1_2 {
        return Some(
            "RMM: no RMI (the firmware's calling convention is older than SMCCC 1.2): this machine cannot run Realms",
        );
    }
    None
}

#[unsafe(no_mangle)]
extern "C" fn kvmr_init(facts: &Facts) -> i32 {
    COUNTER_HZ.store(facts.counter_hz, Relaxed);
    if let Some(text) = objection(facts) {
        log(LOG_ALWAYS, format_args!("{text}"));
        return ENODEV;
    }
    let Some(mut generation) = Generation::of(facts.abi) else {
        log(LOG_ALWAYS, format_args!("module: there is no ABI v{}: 2 to 11", facts.abi));
        return Errno::EINVAL.to_return() as i32;
    };
    if facts.cap_arm_rme != 0 {
        generation.cap_arm_rme = facts.cap_arm_rme;
    }
    ABI.store(generation.version.into(), Relaxed);
    match System::probe(Linux, kvm_realm::SystemConfig { generation }) {
        Ok(system) => {
            let version = system.rmi_version();
            RMI_VERSION.store(version, Relaxed);
            let (major, minor) = (version >> 16, version & 0xFFFF);
            log(LOG_ALWAYS, format_args!("ready: RMI {major}.{minor}, /dev/kvm-realm"));
            // SAFETY: no file exists yet, so nobody reads.
            unsafe { *SYSTEM.0.get() = Some(system) };
            0
        }
        Err(error) => {
            log(LOG_ALWAYS, format_args!("{error}"));
            ENODEV
        }
    }
}

#[unsafe(no_mangle)]
extern "C" fn kvmr_exit() {
    // SAFETY: the device is gone, and every open file would have kept the module.
    drop(unsafe { (*SYSTEM.0.get()).take() });
    let delegated = counters::DELEGATED.load(Relaxed);
    if delegated != 0 {
        log(LOG_ALWAYS, format_args!("module: unloaded, but the RMM still holds {delegated} granules"));
    }
}

#[unsafe(no_mangle)]
extern "C" fn kvmr_shutdown() {
    if let Some(system) = system() {
        system.shutdown();
    }
}

fn answer(result: kvm_realm::Result<i64>) -> i64 {
    result.unwrap_or_else(Errno::to_return)
}

#[unsafe(no_mangle)]
extern "C" fn kvmr_system_ioctl(cmd: u32, arg: u64) -> i64 {
    answer(system().ok_or(Errno::ENODEV).and_then(|s| s.ioctl(cmd, arg)))
}

/// # Safety
/// `object` is the private data of a file that `Linux::install_fd` made and that stays open during the call.
unsafe fn object<'a>(object: *mut c_void) -> &'a FileObject<Linux> {
    // SAFETY: by the contract, this is the box that `install_fd` made, not yet taken back by `kvmr_release`.
    unsafe { &*object.cast::<FileObject<Linux>>() }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn kvmr_ioctl(file: *mut c_void, cmd: u32, arg: u64) -> i64 {
    // SAFETY: C passes the private data of an open file.
    answer(unsafe { object(file) }.ioctl(cmd, arg))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn kvmr_fallocate(file: *mut c_void, mode: i32, offset: i64, len: i64) -> i64 {
    // SAFETY: as for `kvmr_ioctl`.
    let FileObject::Gmem(gmem) = (unsafe { object(file) }) else {
        return Errno::EOPNOTSUPP.to_return();
    };
    // The kernel has refused negative values already.
    match (u32::try_from(mode), u64::try_from(offset), u64::try_from(len)) {
        (Ok(mode), Ok(offset), Ok(len)) => answer(gmem.fallocate(mode, offset, len)),
        _ => Errno::EINVAL.to_return(),
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn kvmr_release(file: *mut c_void) {
    // SAFETY: called once per file, when nothing else uses it any more; the box is the one of `install_fd`.
    drop(unsafe { Box::from_raw(file.cast::<FileObject<Linux>>()) });
}

#[unsafe(no_mangle)]
unsafe extern "C" fn kvmr_event(fire: *mut c_void) {
    // SAFETY: the hook owns the closure as long as it can be called.
    unsafe { (*fire.cast::<Fire>())() }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn kvmr_change_begins(hook: *mut c_void, start: u64, end: u64, may_sleep: bool) {
    // SAFETY: the watch owns the hook as long as it can be called.
    unsafe { &*hook.cast::<Hook>() }.change_begins(start..end, may_sleep);
}

#[unsafe(no_mangle)]
unsafe extern "C" fn kvmr_change_ends(hook: *mut c_void) {
    // SAFETY: as above.
    unsafe { &*hook.cast::<Hook>() }.change_ends();
}

#[unsafe(no_mangle)]
unsafe extern "C" fn kvmr_vcpu_page(file: *mut c_void, index: u64) -> u64 {
    // SAFETY: the mapping holds the file.
    match unsafe { object(file) } {
        FileObject::Vcpu(vcpu) => usize::try_from(index).ok().and_then(|i| vcpu.mmap_page(i)).unwrap_or(0),
        _ => 0,
    }
}

#[unsafe(no_mangle)]
extern "C" fn kvmr_stat(which: u32) -> u64 {
    let count = |n: i64| u64::try_from(n).unwrap_or(0);
    match which {
        0 => ABI.load(Relaxed),
        1 => RMI_VERSION.load(Relaxed),
        2 => count(counters::DELEGATED.load(Relaxed)),
        3 => counters::REFUSED.load(Relaxed),
        4 => system().map_or(0, |s| s.live_vms()),
        5 => count(counters::PINNED.load(Relaxed)),
        6 => counters::SMCS.load(Relaxed),
        7 => counters::LAST_PRIVATE.load(Relaxed),
        _ => 0,
    }
}

/// Text into C's buffer, cut off at its end.
struct Buffer<'a> {
    bytes: &'a mut [u8],
    len: usize,
}

impl core::fmt::Write for Buffer<'_> {
    fn write_str(&mut self, s: &str) -> core::fmt::Result {
        for (to, from) in self.bytes.iter_mut().skip(self.len).zip(s.as_bytes()) {
            *to = *from;
            self.len += 1;
        }
        Ok(())
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn kvmr_stats(to: *mut u8, len: usize) -> usize {
    // SAFETY: C passes a zeroed buffer of that length, for the call.
    let bytes = unsafe { core::slice::from_raw_parts_mut(to, len) };
    let mut buffer = Buffer { bytes, len: 0 };
    if let Some(system) = system() {
        let _ = write!(buffer, "{}", system.stats());
    }
    buffer.len
}
