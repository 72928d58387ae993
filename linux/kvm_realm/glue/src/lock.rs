//! The kernel's mutex and spin lock under `lock_api`.

use core::cell::UnsafeCell;
use core::ffi::{CStr, c_void};
use core::ptr::null_mut;
use core::sync::atomic::{AtomicPtr, Ordering};

use kvm_realm::lock::Lock;
use lock_api::{GuardNoSend, RawMutex};

use crate::ffi;

/// A kernel mutex. It must not move and cannot be made without its address, so it lives on the kernel's heap and is
/// made when it is first locked.
#[derive(Debug)]
pub(crate) struct KernelMutex {
    mutex: AtomicPtr<c_void>,
    /// What the shim calls its kind.
    kind: u32,
}

/// What the shim calls the locks that guard `what`.
fn kind(what: &'static CStr) -> u32 {
    // SAFETY: the name is there as long as the module is.
    unsafe { ffi::shim_lock_kind(what.as_ptr()) }
}

impl Lock for KernelMutex {
    fn guarding(what: &'static CStr) -> Self {
        Self { mutex: AtomicPtr::new(null_mut()), kind: kind(what) }
    }
}

impl KernelMutex {
    fn get(&self) -> *mut c_void {
        let there = self.mutex.load(Ordering::Acquire);
        if !there.is_null() {
            return there;
        }
        // SAFETY: process context, as for every use of a mutex.
        let new = unsafe { ffi::shim_mutex_new(self.kind) };
        match self.mutex.compare_exchange(null_mut(), new, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => new,
            Err(winner) => {
                // SAFETY: nobody else has seen `new`.
                unsafe { ffi::shim_mutex_free(new) };
                winner
            }
        }
    }
}

// SAFETY: a kernel mutex excludes all but its holder; `get` always returns the same one.
unsafe impl RawMutex for KernelMutex {
    #[allow(clippy::declare_interior_mutable_const)]
    const INIT: Self = Self { mutex: AtomicPtr::new(null_mut()), kind: 0 };
    // The kernel wants the task that locked to unlock.
    type GuardMarker = GuardNoSend;

    fn lock(&self) {
        // SAFETY: the pointer is a live kernel mutex; process context.
        unsafe { ffi::shim_mutex_lock(self.get()) }
    }

    fn try_lock(&self) -> bool {
        // SAFETY: as for `lock`.
        unsafe { ffi::shim_mutex_trylock(self.get()) }
    }

    unsafe fn unlock(&self) {
        // SAFETY: the caller vouches that this task holds it.
        unsafe { ffi::shim_mutex_unlock(self.get()) }
    }
}

impl Drop for KernelMutex {
    fn drop(&mut self) {
        let m = *self.mutex.get_mut();
        if !m.is_null() {
            // SAFETY: exclusive access, so nobody holds or waits for it.
            unsafe { ffi::shim_mutex_free(m) }
        }
    }
}

/// A raw spin lock whose holder runs with interrupts off. The shim's lock is two words, the lock itself, zero when free,
/// and its kind; it may be anywhere.
#[derive(Debug)]
pub(crate) struct KernelSpinLock {
    lock: UnsafeCell<[u32; 2]>,
    /// The interrupt state to go back to. Written and read by the holder only.
    flags: UnsafeCell<u64>,
}

// SAFETY: `lock` is only touched by the kernel's atomic lock functions, `flags` only by the holder.
unsafe impl Sync for KernelSpinLock {}
// SAFETY: an unlocked lock has no ties to a thread, and a locked one cannot be moved because its guard borrows it.
unsafe impl Send for KernelSpinLock {}

impl Lock for KernelSpinLock {
    fn guarding(what: &'static CStr) -> Self {
        Self { lock: UnsafeCell::new([0, kind(what)]), ..Self::INIT }
    }
}

// SAFETY: a raw spin lock excludes all but its holder.
unsafe impl RawMutex for KernelSpinLock {
    #[allow(clippy::declare_interior_mutable_const)]
    const INIT: Self = Self { lock: UnsafeCell::new([0; 2]), flags: UnsafeCell::new(0) };
    // Interrupts are off on this CPU.
    type GuardMarker = GuardNoSend;

    fn lock(&self) {
        // SAFETY: the lock's words are valid, and only these functions touch them.
        let flags = unsafe { ffi::shim_spin_lock(self.lock.get().cast()) };
        // SAFETY: this CPU holds the lock now.
        unsafe { *self.flags.get() = flags }
    }

    fn try_lock(&self) -> bool {
        let mut flags = 0;
        // SAFETY: as for `lock`; `flags` is valid for the call.
        let locked = unsafe { ffi::shim_spin_trylock(self.lock.get().cast(), &raw mut flags) };
        if locked {
            // SAFETY: this CPU holds the lock now.
            unsafe { *self.flags.get() = flags }
        }
        locked
    }

    unsafe fn unlock(&self) {
        // SAFETY: the caller vouches that it holds the lock, so `flags` is what its `lock` stored.
        unsafe {
            let flags = *self.flags.get();
            ffi::shim_spin_unlock(self.lock.get().cast(), flags);
        }
    }
}
