//! The `Kernel` trait of the host core over the C shim.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ffi::{c_char, c_void};
use core::fmt::{self, Write as _};
use core::sync::atomic::Ordering::Relaxed;

use kvm_realm::files::FileObject;
use kvm_realm::kernel::{Entry, Fill, Kernel, LogLevel, MemoryHook, PAGE_SIZE, PinPurpose, SmcRegs, Trace};
use kvm_realm::{Errno, Result, kernel};

use crate::counters;
use crate::ffi::{self, Ask};
use crate::lock::{KernelMutex, KernelSpinLock};
use crate::runtime::Line;

/// Turns what a kernel function returned (negative: an error number) into a result.
fn check(value: i64) -> Result<i64> {
    if value >= 0 {
        return Ok(value);
    }
    Err(Errno::from_raw(i32::try_from(value.unsigned_abs()).unwrap_or(0)))
}

/// Writes one line to the kernel's log.
pub(crate) fn log(level: u32, text: fmt::Arguments<'_>) {
    let mut line = Line::new();
    let _ = line.write_fmt(text);
    let bytes = line.bytes();
    // SAFETY: the text is valid for its length.
    unsafe { ffi::shim_log(level, bytes.as_ptr(), bytes.len()) }
}

/// Answers a question of the shim by the closure that `ctx` points to.
extern "C" fn ask(ctx: *mut c_void) -> bool {
    // SAFETY: every caller of the shim passes `ask` together with a pointer from `context`, valid and unshared for
    // the length of the call.
    let closure = unsafe { &mut *ctx.cast::<&mut dyn FnMut() -> bool>() };
    closure()
}

/// The context for [`ask`].
fn context(closure: &mut &mut dyn FnMut() -> bool) -> *mut c_void {
    (&raw mut *closure).cast()
}

/// The kernel that has loaded this module.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Linux;

impl Linux {
    fn page(pa: u64) -> LinuxPage {
        // SAFETY: pure address arithmetic.
        LinuxPage { pa, address: unsafe { ffi::shim_page_address(pa) } }
    }

    fn alloc_pages(order: u32, zero: bool) -> Result<u64> {
        // SAFETY: process context by the trait's rules.
        match unsafe { ffi::shim_pages_alloc(order, zero) } {
            0 => Err(Errno::ENOMEM),
            pa => Ok(pa),
        }
    }
}

impl Kernel for Linux {
    type RawMutex = KernelMutex;
    type RawSpinLock = KernelSpinLock;
    type Page = LinuxPage;
    type UserPage = PinnedPage;
    type AddressSpace = AddressSpace;
    type VcpuThread = VcpuThread;
    type EventFd = Event;
    type Watch = Watch;
    type MemoryWatch = MemoryWatch;

    fn smc(&self, regs: &mut SmcRegs) {
        let [function, x1, x2, ..] = *regs;
        // SAFETY: 18 registers, as the shim wants. What the call does to memory concerns granules that the core
        // owns or has pinned; that is the core's contract with the RMM.
        unsafe { ffi::shim_smc(regs.as_mut_ptr()) };
        counters::saw_smc(function, x1, x2, regs[0]);
    }

    fn alloc_page(&self, fill: Fill) -> Result<LinuxPage> {
        Self::alloc_pages(0, matches!(fill, Fill::Zeroed)).map(Self::page)
    }

    fn alloc_contiguous(&self, count: usize) -> Result<Vec<LinuxPage>> {
        let mut pages = Vec::new();
        kernel::reserve(&mut pages, count)?;
        if !count.is_power_of_two() {
            return Err(Errno::EINVAL);
        }
        let first = Self::alloc_pages(count.trailing_zeros(), true)?;
        pages.extend((first..).step_by(PAGE_SIZE as usize).take(count).map(Self::page));
        Ok(pages)
    }

    fn alloc_block(&self) -> Option<Vec<LinuxPage>> {
        let count = usize::try_from(kernel::BLOCK_PAGES).ok()?;
        let mut pages = Vec::new();
        kernel::reserve(&mut pages, count).ok()?;
        let first = Self::alloc_pages(count.trailing_zeros(), false).ok()?;
        pages.extend((first..).step_by(PAGE_SIZE as usize).take(count).map(Self::page));
        Some(pages)
    }

    fn copy_from_user(&self, from: u64, to: &mut [u8]) -> Result<()> {
        // SAFETY: `to` is valid for its length; the shim checks the user's address.
        check(unsafe { ffi::shim_copy_from_user(to.as_mut_ptr(), from, to.len()) }.into()).map(drop)
    }

    fn copy_to_user(&self, to: u64, from: &[u8]) -> Result<()> {
        // SAFETY: `from` is valid for its length; the shim checks the user's address.
        check(unsafe { ffi::shim_copy_to_user(to, from.as_ptr(), from.len()) }.into()).map(drop)
    }

    fn is_user_range(&self, address: u64, size: u64) -> bool {
        // SAFETY: only compares numbers.
        unsafe { ffi::shim_is_user_range(address, size) }
    }

    fn current_address_space(&self) -> AddressSpace {
        // SAFETY: called for an ioctl, so the thread has an mm.
        AddressSpace(unsafe { ffi::shim_mm_grab() })
    }

    fn is_current(&self, space: &AddressSpace) -> bool {
        // SAFETY: only compares pointers.
        unsafe { ffi::shim_mm_is_current(space.0) }
    }

    fn pin_user_pages(
        &self,
        address: u64,
        count: usize,
        purpose: PinPurpose,
        pages: &mut Vec<PinnedPage>,
    ) -> Result<usize> {
        const BATCH: usize = 32;
        let shared = matches!(purpose, PinPurpose::Shared);
        let mut done = 0;
        while done < count {
            let mut batch = [0u64; BATCH];
            let want = BATCH.min(count - done);
            let at = address.checked_add(done as u64 * PAGE_SIZE).ok_or(Errno::EFAULT)?;
            // SAFETY: `batch` has room for `want` addresses.
            let n = unsafe { ffi::shim_pin_user_pages(at, want as u32, shared, batch.as_mut_ptr()) };
            let n = match check(n) {
                Ok(n) => usize::try_from(n).unwrap_or(0).min(want),
                Err(error) if done == 0 => return Err(error),
                Err(_) => break,
            };
            counters::PINNED.fetch_add(n as i64, Relaxed);
            pages.extend(batch.iter().take(n).map(|&pa| PinnedPage { pa, shared }));
            done += n;
            if n < want {
                break;
            }
        }
        Ok(done)
    }

    fn install_fd(&self, name: &str, object: FileObject<Self>, size: u64) -> Result<i32> {
        let kind = match &object {
            FileObject::Vm(_) => 0,
            FileObject::Vcpu(_) => 1,
            FileObject::Device(_) => 2,
            FileObject::Gmem(_) => 3,
        };
        let mut text = [0u8; 64];
        let room = text.len() - 1;
        for (to, from) in text.iter_mut().take(room).zip(name.as_bytes()) {
            *to = *from;
        }
        let object = Box::into_raw(Box::new(object));
        // SAFETY: the name ends with a zero; `object` is what `kvmr_release` takes back.
        let fd = unsafe { ffi::shim_fd_new(kind, text.as_ptr().cast::<c_char>(), object.cast(), size) };
        match check(fd) {
            Ok(fd) => Ok(i32::try_from(fd).unwrap_or(-1)),
            Err(error) => {
                // SAFETY: the shim did not take the object.
                drop(unsafe { Box::from_raw(object) });
                Err(error)
            }
        }
    }

    fn file_object(&self, fd: i32) -> Option<FileObject<Self>> {
        let mut object = core::ptr::null_mut();
        // SAFETY: `object` is valid for the call.
        let file = unsafe { ffi::shim_file_get(fd, &raw mut object) };
        if file.is_null() {
            return None;
        }
        // SAFETY: the file is one of ours, so this is the object that `install_fd` gave it, and the file reference
        // keeps it.
        let clone = unsafe { (*object.cast::<FileObject<Self>>()).clone() };
        // SAFETY: gives back the reference that `shim_file_get` took, once.
        unsafe { ffi::shim_file_put(file) };
        Some(clone)
    }

    fn eventfd(&self, fd: i32) -> Result<Event> {
        let mut event = core::ptr::null_mut();
        // SAFETY: `event` is valid for the call.
        check(unsafe { ffi::shim_event_get(fd, &raw mut event) })?;
        Ok(Event { event, fd })
    }

    fn watch(&self, event: &Event, fire: Box<dyn Fn() + Send + Sync>) -> Result<Watch> {
        // A thin pointer to the fat one.
        let fire = Box::into_raw(Box::new(fire));
        let mut watch = core::ptr::null_mut();
        // SAFETY: the event is live, `watch` valid for the call; `fire` is what `kvmr_event` takes, and lives until
        // the hook is gone.
        match check(unsafe { ffi::shim_watch_new(event.fd, event.event, fire.cast(), &raw mut watch) }) {
            Ok(_) => Ok(Watch { watch, fire }),
            Err(error) => {
                // SAFETY: the shim did not take it.
                drop(unsafe { Box::from_raw(fire) });
                Err(error)
            }
        }
    }

    fn watch_memory(&self, hook: Arc<dyn MemoryHook>) -> Result<MemoryWatch> {
        // A thin pointer to the fat one.
        let hook = Box::into_raw(Box::new(hook));
        let mut watch = core::ptr::null_mut();
        // SAFETY: called for an ioctl, so the thread has an mm; `hook` is what `kvmr_change_*` take, and lives until
        // the watch is gone.
        match check(unsafe { ffi::shim_memory_watch_new(hook.cast(), &raw mut watch) }) {
            Ok(_) => Ok(MemoryWatch { watch, hook }),
            Err(error) => {
                // SAFETY: the shim did not take it.
                drop(unsafe { Box::from_raw(hook) });
                Err(error)
            }
        }
    }

    fn can_mask_pmu(&self) -> bool {
        // SAFETY: reads a number.
        unsafe { ffi::shim_can_mask_pmu() }
    }

    fn new_vcpu_thread(&self) -> VcpuThread {
        // SAFETY: process context.
        VcpuThread(unsafe { ffi::shim_thread_new() })
    }

    fn set_signal_mask(&self, mask: u64) -> u64 {
        // SAFETY: changes only the calling thread's mask.
        unsafe { ffi::shim_sigmask(mask) }
    }

    fn counter(&self) -> u64 {
        // SAFETY: reads a register.
        unsafe { ffi::shim_counter() }
    }

    fn counter_frequency(&self) -> u64 {
        crate::entry::counter_hz()
    }

    fn online_cpus(&self) -> u32 {
        // SAFETY: reads a counter.
        unsafe { ffi::shim_online_cpus() }
    }

    fn id_register(&self, encoding: u16) -> u64 {
        // KVM's fields are op0 15:14, op1 13:11, CRn 10:7, CRm 6:3, op2 2:0; the kernel's are op0 20:19, op1 18:16,
        // CRn 15:12, CRm 11:8, op2 7:5.
        let e = u32::from(encoding);
        let field = |from: u32, bits: u32, to: u32| ((e >> from) & ((1 << bits) - 1)) << to;
        let id = field(14, 2, 19) | field(11, 3, 16) | field(7, 4, 12) | field(3, 4, 8) | field(0, 3, 5);
        // SAFETY: the shim knows which registers it may ask for.
        unsafe { ffi::shim_id_register(id) }
    }

    fn cond_resched(&self) {
        // SAFETY: process context.
        unsafe { ffi::shim_cond_resched() }
    }

    fn is_killed(&self) -> bool {
        // SAFETY: looks at the calling thread.
        unsafe { ffi::shim_is_killed() }
    }

    fn trace(&self, event: Trace) {
        // SAFETY: only numbers.
        unsafe {
            match event {
                Trace::Exit { vcpu, reason, esr, ipa } => ffi::shim_trace_exit(vcpu, reason.into(), esr, ipa),
                Trace::Fault { vcpu, gpa, shared, outcome } => {
                    ffi::shim_trace_fault(vcpu, gpa, shared, outcome);
                }
            }
        }
    }

    fn log(&self, level: LogLevel, line: fmt::Arguments<'_>) {
        let level = match level {
            LogLevel::Error => 0,
            LogLevel::Warn => 1,
            LogLevel::Info => 2,
            LogLevel::Debug => 3,
        };
        log(level, line);
    }
}

/// A page of kernel memory.
#[derive(Debug)]
pub(crate) struct LinuxPage {
    pa: u64,
    /// Its address in the linear map.
    address: *mut u8,
}

// SAFETY: the page is owned; all accesses are single volatile ones that may race by design.
unsafe impl Send for LinuxPage {}
// SAFETY: as above.
unsafe impl Sync for LinuxPage {}

impl LinuxPage {
    /// Where an access of `T` at `offset` goes, if it is inside the page and aligned.
    fn at<T>(&self, offset: usize) -> Option<*mut T> {
        let size = size_of::<T>();
        let inside = offset % size == 0 && offset <= PAGE_SIZE as usize - size;
        // SAFETY: inside the page.
        inside.then(|| unsafe { self.address.add(offset) }.cast::<T>())
    }

    fn load<T: Default>(&self, offset: usize) -> T {
        // SAFETY: valid and aligned by `at`; integers have no invalid values; volatile because others may write.
        self.at::<T>(offset).map_or_else(T::default, |p| unsafe { p.read_volatile() })
    }

    fn store<T>(&self, offset: usize, value: T) {
        if let Some(p) = self.at::<T>(offset) {
            // SAFETY: valid and aligned by `at`; the page is ours.
            unsafe { p.write_volatile(value) }
        }
    }
}

impl kernel::Page for LinuxPage {
    fn pa(&self) -> u64 {
        self.pa
    }

    fn load_u8(&self, offset: usize) -> u8 {
        self.load(offset)
    }

    fn load_u32(&self, offset: usize) -> u32 {
        self.load(offset)
    }

    fn load_u64(&self, offset: usize) -> u64 {
        self.load(offset)
    }

    fn store_u8(&self, offset: usize, value: u8) {
        self.store(offset, value);
    }

    fn store_u32(&self, offset: usize, value: u32) {
        self.store(offset, value);
    }

    fn store_u64(&self, offset: usize, value: u64) {
        self.store(offset, value);
    }
}

impl Drop for LinuxPage {
    fn drop(&mut self) {
        // SAFETY: owned, and gone after this. User space that still has it mapped or pinned holds its own reference.
        unsafe { ffi::shim_page_free(self.pa) }
    }
}

/// A pinned page of user memory.
#[derive(Debug)]
pub(crate) struct PinnedPage {
    pa: u64,
    shared: bool,
}

impl kernel::UserPage for PinnedPage {
    fn pa(&self) -> u64 {
        self.pa
    }
}

impl Drop for PinnedPage {
    fn drop(&mut self) {
        counters::PINNED.fetch_sub(1, Relaxed);
        // SAFETY: gives back the pin that `pin_user_pages` took, once.
        unsafe { ffi::shim_unpin_page(self.pa, self.shared) }
    }
}

/// An `mm_struct`, held as an identity.
#[derive(Debug)]
pub(crate) struct AddressSpace(*mut c_void);

// SAFETY: only ever compared, and dropped by a reference count.
unsafe impl Send for AddressSpace {}
// SAFETY: as above.
unsafe impl Sync for AddressSpace {}

impl Drop for AddressSpace {
    fn drop(&mut self) {
        // SAFETY: gives back the reference that `shim_mm_grab` took, once.
        unsafe { ffi::shim_mm_drop(self.0) }
    }
}

/// The shim's `struct event`, a counted reference.
#[derive(Debug)]
pub(crate) struct Event {
    event: *mut c_void,
    /// The descriptor that it came from, needed only to hook into it at once.
    fd: i32,
}

// SAFETY: the eventfd guards itself.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Clone for Event {
    fn clone(&self) -> Self {
        // SAFETY: the pointer is live as long as `self`.
        unsafe { ffi::shim_event_hold(self.event) };
        Self { event: self.event, fd: self.fd }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: gives back this reference, once.
        unsafe { ffi::shim_event_put(self.event) }
    }
}

impl kernel::EventFd for Event {
    fn signal(&self) {
        // SAFETY: the pointer is live as long as `self`.
        unsafe { ffi::shim_event_signal(self.event) }
    }

    fn is_same(&self, other: &Self) -> bool {
        // SAFETY: only compares.
        unsafe { ffi::shim_event_same(self.event, other.event) }
    }

    fn is_closed(&self) -> bool {
        // SAFETY: reads a flag.
        unsafe { ffi::shim_event_closed(self.event) }
    }
}

/// What a hook calls, behind a thin pointer.
pub(crate) type Fire = Box<dyn Fn() + Send + Sync>;

/// The shim's `struct watch`.
#[derive(Debug)]
pub(crate) struct Watch {
    watch: *mut c_void,
    fire: *mut Fire,
}

// SAFETY: only dropped; the closure is Send and Sync.
unsafe impl Send for Watch {}
// SAFETY: as above.
unsafe impl Sync for Watch {}

impl Drop for Watch {
    fn drop(&mut self) {
        // SAFETY: unhooks, once, and waits for a call that is under way; then nobody uses the closure any more.
        unsafe {
            ffi::shim_watch_free(self.watch);
            drop(Box::from_raw(self.fire));
        }
    }
}

/// What is told of changed mappings, behind a thin pointer.
pub(crate) type Hook = Arc<dyn MemoryHook>;

/// The shim's `struct memory_watch`.
pub(crate) struct MemoryWatch {
    watch: *mut c_void,
    hook: *mut Hook,
}

// SAFETY: only dropped; the hook is Send and Sync.
unsafe impl Send for MemoryWatch {}
// SAFETY: as above.
unsafe impl Sync for MemoryWatch {}

impl Drop for MemoryWatch {
    fn drop(&mut self) {
        // SAFETY: unhooks, once, and waits for a call that is under way; then nobody uses the hook any more.
        unsafe {
            ffi::shim_memory_watch_free(self.watch);
            drop(Box::from_raw(self.hook));
        }
    }
}

/// The shim's `struct thread`.
#[derive(Debug)]
pub(crate) struct VcpuThread(*mut c_void);

// SAFETY: the shim guards what is inside with its own lock.
unsafe impl Send for VcpuThread {}
// SAFETY: as above.
unsafe impl Sync for VcpuThread {}

/// Counter ticks from `now` to `deadline` in nanoseconds, rounded up.
fn ticks_to_ns(deadline: u64, now: u64, hz: u64) -> u64 {
    let ticks = u128::from(deadline.saturating_sub(now));
    let ns = (ticks * 1_000_000_000).div_ceil(u128::from(hz.max(1)));
    // Further away than a signed 64-bit number of nanoseconds is as good as never.
    u64::try_from(ns).unwrap_or(u64::MAX).min(i64::MAX as u64)
}

impl kernel::VcpuThread for VcpuThread {
    fn begin(&self) {
        // SAFETY: the pointer is live as long as `self`.
        unsafe { ffi::shim_run_begin(self.0) }
    }

    fn end(&self) {
        // SAFETY: as above.
        unsafe { ffi::shim_run_end(self.0) }
    }

    fn prepare(&self) -> Result<()> {
        // SAFETY: process context.
        check(unsafe { ffi::shim_run_prepare() }.into()).map(drop)
    }

    fn enter(&self, regs: &mut SmcRegs, mask_pmu: bool, mut last_check: &mut dyn FnMut() -> bool) -> Entry {
        // SAFETY: 18 registers; the context fits `ask` and lives across the call.
        let ran =
            unsafe { ffi::shim_run_enter(regs.as_mut_ptr(), mask_pmu, ask as Ask, context(&mut last_check)) };
        if !ran {
            return Entry::Refused;
        }
        counters::saw_entry();
        Entry::Ran
    }

    fn block(&self, deadline: Option<u64>, mut wake: &mut dyn FnMut() -> bool) -> Result<()> {
        let timeout = match deadline {
            None => u64::MAX,
            Some(deadline) => ticks_to_ns(deadline, Linux.counter(), Linux.counter_frequency()),
        };
        // SAFETY: the pointer is live; the context fits `ask` and lives across the call.
        let status = unsafe { ffi::shim_block(self.0, timeout, ask as Ask, context(&mut wake)) };
        check(status.into()).map(drop)
    }

    fn kick(&self) {
        // SAFETY: the pointer is live as long as `self`.
        unsafe { ffi::shim_kick(self.0) }
    }
}

impl Drop for VcpuThread {
    fn drop(&mut self) {
        // SAFETY: nobody else has the pointer any more.
        unsafe { ffi::shim_thread_free(self.0) }
    }
}
