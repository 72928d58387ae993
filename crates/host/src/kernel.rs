//! What the core needs from a kernel: one trait, implemented by the module's glue over its C shim and by the
//! simulated machine.
//!
//! Rules for an implementation:
//!
//! - Every method may be called from any thread in process context, and may sleep, unless its text says otherwise.
//! - The core never allocates, frees, pins, copies from user space or takes a [`Kernel::RawMutex`] while it holds a
//!   [`Kernel::RawSpinLock`] or inside [`VcpuThread::enter`].
//! - Small infallible allocations of `alloc` are assumed never to fail; whatever user space sizes is allocated with
//!   `try_reserve` or page by page.
//! - Owned things (`Page`, `UserPage`) give back what they hold when they are dropped, in process context. A page that
//!   belongs to the Realm world is never dropped (see [`crate::granule::Delegated`]).

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::ops::Range;

use crate::errno::{Errno, Result};
use crate::files::FileObject;
use crate::lock::Lock;

/// Bytes in a page, which is also the granule.
pub const PAGE_SIZE: u64 = cca_abi::GRANULE_SIZE;

/// Pages in a 2 MiB block, which one entry of a level 2 table maps.
pub const BLOCK_PAGES: u64 = 512;

/// Arguments and results of an SMC: `x0` to `x17`.
pub type SmcRegs = [u64; 18];

/// Importance of a line in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum LogLevel {
    Error,
    Warn,
    Info,
    /// Rarely of interest, for example what a guest did wrong.
    Debug,
}

/// Whether a page's first contents matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fill {
    /// All zero.
    Zeroed,
    /// Whatever was there: the page goes to the RMM, which wipes it, before anybody can read it.
    Any,
}

/// Why a page of user memory is pinned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PinPurpose {
    /// A Realm is about to be given it, to read and write (`FOLL_WRITE`): it is the page that user space itself would
    /// write to. Pinned only until it is mapped; dirty then.
    Shared,
    /// It is read once now (populate).
    Source,
}

/// Events for whoever traces the kernel.
#[derive(Clone, Copy, Debug)]
pub enum Trace {
    /// A REC has exited: `RmiRecExitReason`, syndrome, and the faulting address if it is one.
    #[allow(missing_docs)]
    Exit { vcpu: u32, reason: u8, esr: u64, ipa: u64 },
    /// A fault of guest memory: 0 resolved, 1 user space is asked, 2 no slot, 3 failed.
    #[allow(missing_docs)]
    Fault { vcpu: u32, gpa: u64, shared: bool, outcome: u32 },
}

/// The kernel under the core. Cheap to clone: a handle.
pub trait Kernel: Clone + Send + Sync + 'static {
    /// Lock whose waiters sleep.
    type RawMutex: Lock + Send + Sync + 'static;
    /// Lock whose holder runs with interrupts off.
    type RawSpinLock: Lock + Send + Sync + 'static;
    /// One page of kernel memory: unmovable, granule aligned.
    type Page: Page;
    /// One pinned page of user memory.
    type UserPage: UserPage;
    /// Identity of a process's address space.
    type AddressSpace: Send + Sync + 'static;
    /// The kernel's side of the thread that runs one vCPU.
    type VcpuThread: VcpuThread;
    /// An eventfd.
    type EventFd: EventFd;
    /// A hook into an eventfd. Dropping it unhooks, and waits for a call that is under way.
    type Watch: Send + Sync + 'static;
    /// A hook into an address space. Dropping it unhooks, and waits for a call that is under way.
    type MemoryWatch: Send + Sync + 'static;

    /// Secure monitor call. Any context.
    fn smc(&self, regs: &mut SmcRegs);

    /// One page.
    ///
    /// # Errors
    /// `ENOMEM`.
    fn alloc_page(&self, fill: Fill) -> Result<Self::Page>;

    /// `count` (a power of two up to 16) zeroed pages, contiguous in ascending order, the first aligned to the size
    /// of all. Each is owned, and freed, on its own.
    ///
    /// # Errors
    /// `ENOMEM`.
    fn alloc_contiguous(&self, count: usize) -> Result<Vec<Self::Page>>;

    /// [`BLOCK_PAGES`] pages, contiguous in ascending order, the first aligned to the size of all, contents of no matter;
    /// each is owned, and freed, on its own. `None` if that cannot be had without effort.
    fn alloc_block(&self) -> Option<Vec<Self::Page>> {
        None
    }

    /// Reads memory of the calling process.
    ///
    /// # Errors
    /// `EFAULT`; `to` may then be partly written.
    fn copy_from_user(&self, from: u64, to: &mut [u8]) -> Result<()>;

    /// Writes memory of the calling process.
    ///
    /// # Errors
    /// `EFAULT`.
    fn copy_to_user(&self, to: u64, from: &[u8]) -> Result<()>;

    /// Whether `[address, address + size)` can be user space at all (`access_ok`).
    fn is_user_range(&self, address: u64, size: u64) -> bool;

    /// The calling process's address space. The handle is an identity; it does not keep the memory alive.
    fn current_address_space(&self) -> Self::AddressSpace;

    /// Whether the caller runs in `space`.
    fn is_current(&self, space: &Self::AddressSpace) -> bool;

    /// Pins up to `count` consecutive pages of the calling process from `address` (page aligned) and pushes them to
    /// `pages`, whose spare capacity is at least `count`. I/O and PFN mappings and device memory are refused.
    /// Returns how many were pinned, at least one.
    ///
    /// # Errors
    /// `EFAULT` and others when not even the first page could be pinned.
    fn pin_user_pages(
        &self,
        address: u64,
        count: usize,
        purpose: PinPurpose,
        pages: &mut Vec<Self::UserPage>,
    ) -> Result<usize>;

    /// Tells `hook` of every change of the calling process's mappings, until the process or the hook ends.
    ///
    /// # Errors
    /// `ENOMEM` and others.
    fn watch_memory(&self, hook: Arc<dyn MemoryHook>) -> Result<Self::MemoryWatch>;

    /// Makes a file descriptor, close-on-exec, of the calling process. `name` is what `/proc/self/fd` shows.
    /// `size` is the file's size as `fstat` shows it.
    ///
    /// # Errors
    /// `EMFILE` and others; `object` is dropped.
    fn install_fd(&self, name: &str, object: FileObject<Self>, size: u64) -> Result<i32>;

    /// The object behind a file descriptor of the calling process that [`Self::install_fd`] made, if it is one.
    fn file_object(&self, fd: i32) -> Option<FileObject<Self>>;

    /// The eventfd behind a file descriptor of the calling process.
    ///
    /// # Errors
    /// `EBADF` without such a descriptor, `EINVAL` if it is something else.
    fn eventfd(&self, fd: i32) -> Result<Self::EventFd>;

    /// Calls `fire` whenever somebody signals `event`, and takes the signal; at once if it is signalled already. `fire`
    /// is called in any context, with interrupts off; it must not allocate, free or sleep. It is dropped with the hook,
    /// in process context.
    ///
    /// # Errors
    /// `ENOMEM` and others; `fire` is dropped.
    fn watch(&self, event: &Self::EventFd, fire: Box<dyn Fn() + Send + Sync>) -> Result<Self::Watch>;

    /// Whether the interrupt of the CPUs' PMU can be masked around a stay in a guest, without which a guest's counter
    /// that has overflown would end each stay at once.
    fn can_mask_pmu(&self) -> bool {
        false
    }

    /// Makes the kernel's side of one vCPU.
    fn new_vcpu_thread(&self) -> Self::VcpuThread;

    /// Replaces the calling thread's signal mask (64 signals; `SIGKILL` and `SIGSTOP` are ignored) and returns the
    /// one before.
    fn set_signal_mask(&self, mask: u64) -> u64;

    /// The system counter (`CNTPCT_EL0`, equal to a Realm's `CNTVCT_EL0`). Any context.
    fn counter(&self) -> u64;

    /// Its frequency in Hz. Any context.
    fn counter_frequency(&self) -> u64;

    /// CPUs online now.
    fn online_cpus(&self) -> u32;

    /// An ID register as the kernel wants VMs to see it. `encoding` is op0 op1 CRn CRm op2 in the 16-bit form of
    /// `KVM_REG_ARM64_SYSREG`. Zero for one that is not known.
    fn id_register(&self, encoding: u16) -> u64;

    /// Gives other threads a chance. Called between the steps of long walks.
    fn cond_resched(&self);

    /// Whether the calling process is being killed, so that work which takes long should end where it is.
    fn is_killed(&self) -> bool {
        false
    }

    /// Something to trace. Any context.
    fn trace(&self, event: Trace) {
        let _ = event;
    }

    /// One line in the kernel's log, without prefix and line feed. What a VM can cause, the core limits. Any context.
    fn log(&self, level: LogLevel, line: fmt::Arguments<'_>);
}

/// One page of kernel memory. Dropping it frees it.
///
/// Another party (user space for the page of `kvm_run`, the RMM for a run page) may write to it at any time, so
/// accesses are single, volatile, and yield copies. Offsets are bytes; an access beyond the page or, for the wide
/// ones, misaligned does nothing and loads zero (the core never makes one).
pub trait Page: Send + Sync + Sized + 'static {
    /// Physical address.
    fn pa(&self) -> u64;
    /// Volatile 8-bit load.
    fn load_u8(&self, offset: usize) -> u8;
    /// Volatile 32-bit load.
    fn load_u32(&self, offset: usize) -> u32;
    /// Volatile 64-bit load.
    fn load_u64(&self, offset: usize) -> u64;
    /// Volatile 8-bit store.
    fn store_u8(&self, offset: usize, value: u8);
    /// Volatile 32-bit store.
    fn store_u32(&self, offset: usize, value: u32);
    /// Volatile 64-bit store.
    fn store_u64(&self, offset: usize, value: u64);
    /// Stores `bytes` from `offset` on, in no particular order.
    fn store_bytes(&self, offset: usize, bytes: &[u8]) {
        for (at, byte) in (offset..).zip(bytes) {
            self.store_u8(at, *byte);
        }
    }
}

/// A pinned page of user memory. Dropping it unpins it, marking it dirty if it was pinned as
/// [`PinPurpose::Shared`].
pub trait UserPage: Send + Sync + Sized + 'static {
    /// Physical address.
    fn pa(&self) -> u64;
}

/// Who is told that the pages behind user addresses are about to be others (an MMU notifier). Called in any thread, which
/// may hold any of the kernel's locks: must not allocate, and takes no lock under which somebody allocates.
pub trait MemoryHook: Send + Sync {
    /// From now on until [`Self::change_ends`] the pages in `range` may change. The end of a process begins a change that
    /// does not end. `may_sleep`: the caller may be rescheduled.
    fn change_begins(&self, range: Range<u64>, may_sleep: bool);
    /// A change has ended.
    fn change_ends(&self);
}

/// A reference to an eventfd.
pub trait EventFd: Clone + Send + Sync + 'static {
    /// Signals it. Any context.
    fn signal(&self);
    /// Whether the other is a reference to the same.
    fn is_same(&self, other: &Self) -> bool;
    /// Whether nobody has it open any more. May be late in saying so.
    fn is_closed(&self) -> bool;
}

/// What happened at [`VcpuThread::enter`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// The SMC was made.
    Ran,
    /// It was not: the kernel has work for this thread, or `last_check` said no. Start over with
    /// [`VcpuThread::prepare`].
    Refused,
}

/// The kernel's side of the thread that is inside `KVM_RUN` for one vCPU. All methods but [`Self::kick`] are called
/// by that thread.
///
/// No kick is lost: a kicker first publishes its news, then calls `kick`; `enter` and `block` look for news after the
/// point from which a kick reaches them.
pub trait VcpuThread: Send + Sync + 'static {
    /// The calling thread is inside `KVM_RUN` from here on.
    fn begin(&self);

    /// It no longer is.
    fn end(&self);

    /// Does the kernel's pending work for the calling thread (rescheduling, task work).
    ///
    /// # Errors
    /// `EINTR`: a signal is pending.
    fn prepare(&self) -> Result<()>;

    /// One entry into the guest. With interrupts off, and last of all, asks `last_check`; if that says yes and the
    /// kernel has no work for the thread, makes the SMC in `regs`, then takes the interrupt that ended it. With
    /// `mask_pmu` the PMU's interrupt is masked meanwhile, see [`Kernel::can_mask_pmu`].
    fn enter(&self, regs: &mut SmcRegs, mask_pmu: bool, last_check: &mut dyn FnMut() -> bool) -> Entry;

    /// Sleeps until `wake` says yes after a kick (or at once), the counter has reached `deadline`, or a signal is
    /// pending. `wake` is called without locks held but must not sleep.
    ///
    /// # Errors
    /// `EINTR`: a signal is pending and `wake` still says no.
    fn block(&self, deadline: Option<u64>, wake: &mut dyn FnMut() -> bool) -> Result<()>;

    /// Makes the thread, wherever it is, look for news: ends its sleep, or its stay in the guest. Any context, any
    /// thread, spin locks may be held.
    fn kick(&self);
}

/// A sleeping lock around `T`.
pub type Mutex<K, T> = lock_api::Mutex<<K as Kernel>::RawMutex, T>;
/// Guard of a [`Mutex`].
pub type MutexGuard<'a, K, T> = lock_api::MutexGuard<'a, <K as Kernel>::RawMutex, T>;
/// A lock around `T` that is held with interrupts off.
pub type SpinLock<K, T> = lock_api::Mutex<<K as Kernel>::RawSpinLock, T>;

/// Copies a structure in from user space, once.
///
/// # Errors
/// `EFAULT`.
pub fn read_user<K: Kernel, T: zerocopy::FromBytes + zerocopy::IntoBytes>(
    kernel: &K,
    from: u64,
) -> Result<T> {
    let mut value = T::new_zeroed();
    kernel.copy_from_user(from, value.as_mut_bytes())?;
    Ok(value)
}

/// Copies a structure out to user space.
///
/// # Errors
/// `EFAULT`.
pub fn write_user<K: Kernel, T: zerocopy::IntoBytes + zerocopy::Immutable>(
    kernel: &K,
    to: u64,
    value: &T,
) -> Result<()> {
    kernel.copy_to_user(to, value.as_bytes())
}

/// Reserves room for user-sized data.
///
/// # Errors
/// `ENOMEM`.
pub fn reserve<T>(vec: &mut Vec<T>, additional: usize) -> Result<()> {
    vec.try_reserve_exact(additional).map_err(|_| Errno::ENOMEM)
}
