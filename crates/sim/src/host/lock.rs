//! Locks that complain about misuse: a kernel can neither sleep nor allocate under a spin lock.

use crate::sync;
use std::cell::Cell;

sync::thread_local! {
    #[allow(clippy::missing_const_for_thread_local, reason = "shuttle's macro has no such form")]
    static SPINS: Cell<u32> = Cell::new(0);
}

/// Counts the spin locks, and what is like one, that the caller holds.
fn count_spins(change: impl FnOnce(u32) -> u32) {
    SPINS.with(|spins| spins.set(change(spins.get())));
}

/// Does `work` where a kernel could not sleep or allocate, as if under a spin lock.
pub(super) fn atomically(work: impl FnOnce()) {
    count_spins(|spins| spins + 1);
    work();
    count_spins(|spins| spins - 1);
}

/// Fails if the caller holds a spin lock, where a kernel could not sleep or allocate.
pub(super) fn assert_may_sleep(what: &str) {
    assert_eq!(SPINS.with(Cell::get), 0, "{what} under a spin lock");
}

/// A lock whose holder must not sleep; checked.
pub struct RawSpin(sync::RawLock);

// SAFETY: exclusion is the inner lock's; only a counter is added around it.
unsafe impl lock_api::RawMutex for RawSpin {
    #[allow(clippy::declare_interior_mutable_const)]
    const INIT: Self = Self(<sync::RawLock as lock_api::RawMutex>::INIT);
    type GuardMarker = lock_api::GuardNoSend;

    fn lock(&self) {
        lock_api::RawMutex::lock(&self.0);
        count_spins(|spins| spins + 1);
    }

    fn try_lock(&self) -> bool {
        let locked = lock_api::RawMutex::try_lock(&self.0);
        count_spins(|spins| spins + u32::from(locked));
        locked
    }

    unsafe fn unlock(&self) {
        count_spins(|spins| spins - 1);
        // SAFETY: the caller holds the lock.
        unsafe { lock_api::RawMutex::unlock(&self.0) };
    }
}

impl kvm_realm::lock::Lock for RawSpin {}

/// A lock whose waiters sleep; checked.
pub struct RawSleeping(sync::RawLock);

// SAFETY: exclusion is the inner lock's.
unsafe impl lock_api::RawMutex for RawSleeping {
    #[allow(clippy::declare_interior_mutable_const)]
    const INIT: Self = Self(<sync::RawLock as lock_api::RawMutex>::INIT);
    type GuardMarker = lock_api::GuardNoSend;

    fn lock(&self) {
        assert_may_sleep("a mutex was taken");
        lock_api::RawMutex::lock(&self.0);
    }

    fn try_lock(&self) -> bool {
        lock_api::RawMutex::try_lock(&self.0)
    }

    unsafe fn unlock(&self) {
        // SAFETY: the caller holds the lock.
        unsafe { lock_api::RawMutex::unlock(&self.0) };
    }
}

impl kvm_realm::lock::Lock for RawSleeping {}
