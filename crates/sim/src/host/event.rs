//! Eventfds, and hooks into them.

use super::lock::{assert_may_sleep, atomically};
use crate::sync;
use kvm_realm::kernel::EventFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed, Ordering::SeqCst};

type Fire = Box<dyn Fn() + Send + Sync>;

#[derive(Default)]
struct EventState {
    count: AtomicU64,
    /// Called under this lock, as a waker of an eventfd is.
    fire: sync::Mutex<Vec<(u64, Fire)>>,
    next: AtomicU64,
}

/// An eventfd.
#[derive(Clone, Default)]
pub struct SimEvent(Arc<EventState>);

impl SimEvent {
    /// How often it was signalled since the last time.
    pub(super) fn take(&self) -> u64 {
        self.0.count.swap(0, SeqCst)
    }

    /// Calls `fire` whenever it is signalled, and at once if it is already.
    pub(super) fn hook(&self, fire: Fire) -> SimWatch {
        let id = self.0.next.fetch_add(1, Relaxed);
        self.0.fire.lock().unwrap().push((id, fire));
        if self.take() != 0 {
            self.signal();
        }
        SimWatch(self.clone(), id)
    }
}

impl EventFd for SimEvent {
    fn signal(&self) {
        let hooks = self.0.fire.lock().unwrap();
        if hooks.is_empty() {
            self.0.count.fetch_add(1, SeqCst);
        }
        // A waker must not sleep.
        atomically(|| hooks.iter().for_each(|(_, fire)| fire()));
    }

    fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    fn is_closed(&self) -> bool {
        false
    }
}

/// A hook into an eventfd.
pub struct SimWatch(SimEvent, u64);

impl Drop for SimWatch {
    fn drop(&mut self) {
        assert_may_sleep("a hook was dropped");
        let mut hooks = self.0.0.fire.lock().unwrap();
        let at = hooks.iter().position(|(id, _)| *id == self.1).expect("hooked once");
        let gone = hooks.swap_remove(at);
        drop(hooks);
        drop(gone);
    }
}
