//! Atomics, and waiting: the machine's, or with the feature `explore` those of an explorer of schedules, which
//! lets tests run the same code in every order of its steps.

#[cfg(not(feature = "explore"))]
pub(crate) use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
#[cfg(feature = "explore")]
pub(crate) use shuttle::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

/// Lets others go on while this CPU waits for one of them.
#[inline(always)]
pub(crate) fn relax() {
    #[cfg(not(feature = "explore"))]
    core::hint::spin_loop();
    #[cfg(feature = "explore")]
    shuttle::thread::yield_now();
}
