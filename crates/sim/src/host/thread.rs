//! Threads inside `KVM_RUN`, and the signals that interrupt them.

use super::SimKernel;
use super::lock::assert_may_sleep;
use crate::machine::Machine;
use crate::sync;
use kvm_realm::errno::{Errno, Result};
use kvm_realm::kernel::{Entry, SmcRegs, VcpuThread};
use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

sync::thread_local! {
    #[allow(clippy::missing_const_for_thread_local, reason = "shuttle's macro has no such form")]
    static SIGNAL: RefCell<Option<Signal>> = RefCell::new(None);
}

/// What interrupts a thread inside a system call.
#[derive(Clone, Default)]
pub struct Signal {
    pending: Arc<AtomicBool>,
    target: Arc<Mutex<Option<Arc<ThreadState>>>>,
}

impl Signal {
    /// Makes the calling thread one that this signal reaches.
    pub fn adopt(&self) {
        SIGNAL.with(|signal| signal.replace(Some(self.clone())));
    }

    /// Sends it.
    pub fn raise(&self) {
        self.pending.store(true, SeqCst);
        let target = self.target.lock().unwrap().clone();
        if let Some(target) = target {
            target.kick();
        }
    }
}

fn signal_pending() -> bool {
    SIGNAL.with(|signal| signal.borrow().as_ref().is_some_and(|signal| signal.pending.load(SeqCst)))
}

/// Whom the calling thread's signal, if it has one, interrupts.
fn set_target(target: Option<&Arc<ThreadState>>) {
    SIGNAL.with(|signal| {
        if let Some(signal) = &*signal.borrow() {
            *signal.target.lock().unwrap() = target.cloned();
        }
    });
}

#[derive(Default)]
struct Position {
    on_cpu: Option<usize>,
    kicks: u64,
}

struct ThreadState {
    machine: Arc<Machine>,
    position: sync::Mutex<Position>,
    kicked: sync::Condvar,
}

impl ThreadState {
    fn kick(&self) {
        let mut position = self.position.lock().unwrap();
        position.kicks += 1;
        if let Some(cpu) = position.on_cpu {
            self.machine.interrupt(cpu);
        }
        self.kicked.notify_all();
    }
}

/// The thread inside `KVM_RUN`.
pub struct SimVcpuThread {
    kernel: SimKernel,
    state: Arc<ThreadState>,
}

impl SimVcpuThread {
    pub(super) fn new(kernel: &SimKernel) -> Self {
        let state = ThreadState {
            machine: kernel.machine().clone(),
            position: sync::Mutex::default(),
            kicked: sync::Condvar::new(),
        };
        Self { kernel: kernel.clone(), state: Arc::new(state) }
    }
}

impl VcpuThread for SimVcpuThread {
    fn begin(&self) {
        set_target(Some(&self.state));
    }

    fn end(&self) {
        set_target(None);
    }

    fn prepare(&self) -> Result<()> {
        assert_may_sleep("prepare");
        if signal_pending() { Err(Errno::EINTR) } else { Ok(()) }
    }

    fn enter(&self, regs: &mut SmcRegs, _mask_pmu: bool, last_check: &mut dyn FnMut() -> bool) -> Entry {
        assert_may_sleep("enter");
        let machine = self.kernel.machine();
        machine.on_cpu(|cpu| {
            self.state.position.lock().unwrap().on_cpu = Some(cpu);
            let entry = if signal_pending() || !last_check() {
                Entry::Refused
            } else {
                self.kernel.smc_on(cpu, regs);
                Entry::Ran
            };
            self.state.position.lock().unwrap().on_cpu = None;
            entry
        })
    }

    fn block(&self, deadline: Option<u64>, wake: &mut dyn FnMut() -> bool) -> Result<()> {
        assert_may_sleep("block");
        let machine = self.kernel.machine();
        let patience = sync::Patience::new();
        loop {
            let kicks = self.state.position.lock().unwrap().kicks;
            if wake() {
                return Ok(());
            }
            if deadline.is_some_and(|deadline| machine.counter() >= deadline) {
                return Ok(());
            }
            if signal_pending() {
                return Err(Errno::EINTR);
            }
            let asleep = |position: &Position| position.kicks == kicks;
            let waited = patience.wait(&self.state.kicked, &self.state.position, deadline.is_some(), asleep);
            if let (false, Some(deadline)) = (waited, deadline) {
                // Nothing else happened for a while: skip to the time that it waits for.
                machine.advance_to(deadline);
            }
        }
    }

    fn kick(&self) {
        self.state.kick();
    }
}
