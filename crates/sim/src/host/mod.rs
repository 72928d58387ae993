//! The host kernel under the host core.
//!
//! | module | what is there |
//! |---|---|
//! | `pages` | the page allocator, and pages of kernel memory |
//! | `process` | processes: user memory, its pins and hooks, files |
//! | `event` | eventfds and hooks into them |
//! | `thread` | threads inside `KVM_RUN`, and the signals that interrupt them |
//! | `lock` | locks that complain about misuse |
//! | `smc` | the host's SMCs, watched |
//!
//! Here: the kernel that has all of them, as the host core sees it. The locks in these modules that are the standard
//! library's are held for a few lines that meet nobody else's steps; the others are of the kind that an explorer of
//! schedules knows.

mod event;
mod lock;
mod pages;
mod process;
mod smc;
mod thread;

pub use event::{SimEvent, SimWatch};
pub use lock::{RawSleeping, RawSpin};
pub use pages::{POISON, SimPage};
pub use process::{Process, SimMemoryWatch, SimUserPage};
pub use thread::{Signal, SimVcpuThread};

use crate::machine::Machine;
use kvm_realm::errno::{Errno, Result};
use kvm_realm::files::FileObject;
use kvm_realm::kernel::{BLOCK_PAGES, Fill, Kernel, LogLevel, MemoryHook, PinPurpose, SmcRegs};
use lock::assert_may_sleep;
use pages::Pages;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex};

struct Shared {
    machine: Arc<Machine>,
    pages: Pages,
    /// Answers to give in place of the RMM, by command.
    answers: Mutex<BTreeMap<u64, u64>>,
}

/// The simulated kernel. A handle.
#[derive(Clone)]
pub struct SimKernel {
    shared: Arc<Shared>,
}

impl SimKernel {
    /// A kernel that owns all of the machine's host memory.
    #[must_use]
    pub fn new(machine: Arc<Machine>) -> Self {
        let pages = Pages::of(&machine);
        Self { shared: Arc::new(Shared { machine, pages, answers: Mutex::default() }) }
    }

    /// Its machine.
    #[must_use]
    pub fn machine(&self) -> &Arc<Machine> {
        &self.shared.machine
    }
}

impl Kernel for SimKernel {
    type RawMutex = RawSleeping;
    type RawSpinLock = RawSpin;
    type Page = SimPage;
    type UserPage = SimUserPage;
    type AddressSpace = usize;
    type VcpuThread = SimVcpuThread;
    type EventFd = SimEvent;
    type Watch = SimWatch;
    type MemoryWatch = SimMemoryWatch;

    fn smc(&self, regs: &mut SmcRegs) {
        self.machine().on_cpu(|cpu| self.smc_on(cpu, regs));
    }

    fn alloc_page(&self, fill: Fill) -> Result<SimPage> {
        assert_may_sleep("an allocation");
        self.take_page(fill).ok_or(Errno::ENOMEM)
    }

    fn alloc_contiguous(&self, count: usize) -> Result<Vec<SimPage>> {
        assert_may_sleep("an allocation");
        self.take_pages(count as u64, Fill::Zeroed).ok_or(Errno::ENOMEM)
    }

    fn alloc_block(&self) -> Option<Vec<SimPage>> {
        self.take_pages(BLOCK_PAGES, Fill::Any)
    }

    fn copy_from_user(&self, from: u64, to: &mut [u8]) -> Result<()> {
        assert_may_sleep("a user copy");
        Process::current().read(from, to)
    }

    fn copy_to_user(&self, to: u64, from: &[u8]) -> Result<()> {
        assert_may_sleep("a user copy");
        Process::current().write(to, from)
    }

    fn is_user_range(&self, address: u64, size: u64) -> bool {
        address.checked_add(size).is_some_and(|end| end <= 1 << 48)
    }

    fn current_address_space(&self) -> usize {
        Arc::as_ptr(&Process::current()) as usize
    }

    fn is_current(&self, space: &usize) -> bool {
        self.current_address_space() == *space
    }

    fn pin_user_pages(
        &self,
        address: u64,
        count: usize,
        _purpose: PinPurpose,
        pages: &mut Vec<SimUserPage>,
    ) -> Result<usize> {
        assert_may_sleep("a pin");
        Process::current().pin(address, count, pages)
    }

    fn watch_memory(&self, hook: Arc<dyn MemoryHook>) -> Result<SimMemoryWatch> {
        assert_may_sleep("a hook was made");
        Ok(Process::current().hook(hook))
    }

    fn install_fd(&self, _name: &str, object: FileObject<Self>, _size: u64) -> Result<i32> {
        assert_may_sleep("install_fd");
        Process::current().install(object)
    }

    fn file_object(&self, fd: i32) -> Option<FileObject<Self>> {
        Process::current().file(fd)
    }

    fn eventfd(&self, fd: i32) -> Result<SimEvent> {
        Process::current().event(fd)
    }

    fn watch(&self, event: &SimEvent, fire: Box<dyn Fn() + Send + Sync>) -> Result<SimWatch> {
        assert_may_sleep("a hook was made");
        Ok(event.hook(fire))
    }

    fn new_vcpu_thread(&self) -> SimVcpuThread {
        SimVcpuThread::new(self)
    }

    fn set_signal_mask(&self, mask: u64) -> u64 {
        mask
    }

    fn counter(&self) -> u64 {
        self.machine().counter()
    }

    fn counter_frequency(&self) -> u64 {
        1_000_000_000
    }

    fn online_cpus(&self) -> u32 {
        self.machine().cpus() as u32
    }

    fn id_register(&self, encoding: u16) -> u64 {
        match encoding {
            0xC020 => 0x1311_0011_2111_2222,
            0xC028 => 0x1000_0000_1030_560A,
            0xC038 => 0x2100_0323_1020_1126,
            _ => 0,
        }
    }

    fn cond_resched(&self) {
        assert_may_sleep("cond_resched");
    }

    fn is_killed(&self) -> bool {
        Process::current().is_killed()
    }

    fn log(&self, level: LogLevel, line: fmt::Arguments<'_>) {
        self.machine().log(format!("host {level:?}: {line}"));
    }
}
