//! Root: the monitor's platform, with granule protection tables in secure RAM.

use crate::machine::{CARVE_OUT, Machine};
use crate::memory::{PAGE_SIZE, Pas};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed};

/// What EL3 sees of the machine.
pub struct RootWorld {
    machine: Arc<Machine>,
}

impl RootWorld {
    pub(crate) fn new(machine: Arc<Machine>) -> Self {
        Self { machine }
    }

    fn word(&self, pa: u64) -> &AtomicU64 {
        let page = self
            .machine
            .memory()
            .page(Pas::Root, pa)
            .unwrap_or_else(|fault| panic!("EL3 touched {pa:#x}: {fault:x?}"));
        &page[((pa % PAGE_SIZE) / 8) as usize]
    }

    fn shared_page(&self) -> &crate::memory::Page {
        let pa = CARVE_OUT.0 + CARVE_OUT.1 - PAGE_SIZE;
        self.machine.memory().page(Pas::Realm, pa).expect("the shared page is Realm memory")
    }
}

impl monitor::Platform for RootWorld {
    fn gpt_load(&self, pa: u64) -> u64 {
        self.word(pa).load(Relaxed)
    }

    fn gpt_store(&self, pa: u64, descriptor: u64) {
        self.word(pa).store(descriptor, Relaxed);
    }

    fn gpt_compare_exchange(&self, pa: u64, old: u64, new: u64) -> Result<(), u64> {
        self.word(pa).compare_exchange(old, new, AcqRel, Acquire).map(|_| ())
    }

    fn gpt_invalidate(&self, _base: u64, _log2_size: u32) {}

    fn flush_granule(&self, _pa: u64, _pas: monitor::Pas) {}

    fn shared_page_read(&self, offset: usize, out: &mut [u8]) {
        for (at, byte) in (offset..).zip(out) {
            *byte = self.shared_page()[at / 8].load(Relaxed).to_le_bytes()[at % 8];
        }
    }

    fn shared_page_write(&self, offset: usize, data: &[u8]) {
        for (at, byte) in (offset..).zip(data) {
            let cell = &self.shared_page()[at / 8];
            let mut bytes = cell.load(Relaxed).to_le_bytes();
            bytes[at % 8] = *byte;
            cell.store(u64::from_le_bytes(bytes), Relaxed);
        }
    }

    fn release_cpu(&self, _cpu: usize) {}

    fn random(&self) -> Option<u64> {
        None
    }

    fn print(&self, line: fmt::Arguments<'_>) {
        self.machine.log(format!("EL3: {line}"));
    }

    fn counter(&self) -> u64 {
        self.machine.counter()
    }
}
