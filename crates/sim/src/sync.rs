//! The locks of the simulated host, and what threads have of their own. With the feature `explore` they are those of
//! `shuttle`, which tries schedules: then every thread is a task of its, and all else in the simulator happens between
//! two steps of tasks.

#[cfg(not(feature = "explore"))]
pub(crate) use std::{
    sync::{Condvar, Mutex, RwLock},
    thread_local,
};

#[cfg(feature = "explore")]
pub(crate) use shuttle::{
    sync::{Condvar, Mutex, RwLock},
    thread_local,
};

/// Exclusion without a value.
#[cfg(not(feature = "explore"))]
pub(crate) use parking_lot::RawMutex as RawLock;

/// Exclusion without a value.
#[cfg(feature = "explore")]
pub(crate) struct RawLock(shuttle::future::batch_semaphore::BatchSemaphore);

#[cfg(feature = "explore")]
// SAFETY: a semaphore with one permit.
unsafe impl lock_api::RawMutex for RawLock {
    #[allow(clippy::declare_interior_mutable_const)]
    const INIT: Self = Self(shuttle::future::batch_semaphore::BatchSemaphore::const_new(
        1,
        shuttle::future::batch_semaphore::Fairness::Unfair,
    ));
    type GuardMarker = lock_api::GuardNoSend;

    fn lock(&self) {
        // Closed only while a failed schedule is unwound.
        let _ = self.0.acquire_blocking(1);
    }

    fn try_lock(&self) -> bool {
        self.0.try_acquire(1).is_ok()
    }

    unsafe fn unlock(&self) {
        self.0.release(1);
    }
}

/// Another thread may come between what was before and what follows.
#[inline(always)]
pub(crate) fn interleave() {
    #[cfg(feature = "explore")]
    shuttle::sync::atomic::AtomicBool::new(false).load(std::sync::atomic::Ordering::SeqCst);
}

/// Lets others go on while this thread waits for one of them.
#[cfg(feature = "explore")]
pub(crate) use shuttle::thread::yield_now;

/// How long somebody waits who should not have to wait long.
pub(crate) struct Patience {
    #[cfg(not(feature = "explore"))]
    started: std::time::Instant,
}

impl Patience {
    pub(crate) fn new() -> Self {
        Self {
            #[cfg(not(feature = "explore"))]
            started: std::time::Instant::now(),
        }
    }

    /// Waits until `asleep` no longer holds; or for a while, a short one if something `else_follows`. Whether it ended
    /// in the first way.
    #[cfg(not(feature = "explore"))]
    pub(crate) fn wait<T>(
        &self,
        news: &Condvar,
        state: &Mutex<T>,
        else_follows: bool,
        asleep: impl Fn(&T) -> bool,
    ) -> bool {
        use std::time::Duration;
        assert!(self.started.elapsed() < Duration::from_secs(30), "a vCPU sleeps for ever");
        let while_ = Duration::from_millis(if else_follows { 1 } else { 20 });
        let (_held, waited) =
            news.wait_timeout_while(state.lock().unwrap(), while_, |state| asleep(state)).unwrap();
        !waited.timed_out()
    }

    /// The same without a clock: if nothing else follows, for ever. That nobody wakes it is then a deadlock, which the
    /// explorer reports.
    #[cfg(feature = "explore")]
    pub(crate) fn wait<T>(
        &self,
        news: &Condvar,
        state: &Mutex<T>,
        else_follows: bool,
        asleep: impl Fn(&T) -> bool,
    ) -> bool {
        if !else_follows {
            drop(news.wait_while(state.lock().unwrap(), |state| asleep(state)).unwrap());
            return true;
        }
        for _ in 0..4 {
            if !asleep(&state.lock().unwrap()) {
                return true;
            }
            yield_now();
        }
        false
    }
}
