//! Locks that are told what they guard.
//!
//! A kernel that checks the order in which locks are taken thinks of all locks of one kind as of one, and has to be told the
//! kinds: it cannot know what Rust keeps in a lock. In other kernels a kind costs nothing.

use core::ffi::CStr;

/// A lock that can be told what it guards.
pub trait Lock: lock_api::RawMutex + Sized {
    /// A free lock, one of all that guard `what`.
    fn guarding(_what: &'static CStr) -> Self {
        Self::INIT
    }
}

impl Lock for spin::Mutex<()> {}

/// Puts a value under a lock of the kind `what`.
pub fn guarded<R: Lock, T>(what: &'static CStr, value: T) -> lock_api::Mutex<R, T> {
    lock_api::Mutex::from_raw(R::guarding(what), value)
}
