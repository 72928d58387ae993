//! The host kernel under the host core: pages, processes, threads, files.

use crate::machine::{HOST_BASE, Machine};
use crate::memory::{DRAM_BASE, PAGE_SIZE, Pas};
use crate::sync;
use cca_abi::rmi::fid;
use kvm_realm::errno::{Errno, Result};
use kvm_realm::files::FileObject;
use kvm_realm::kernel::{
    BLOCK_PAGES, Entry, EventFd, Fill, Kernel, LogLevel, MemoryHook, Page, PinPurpose, SmcRegs, UserPage,
    VcpuThread,
};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

sync::thread_local! {
    #[allow(clippy::missing_const_for_thread_local, reason = "shuttle's macro has no such form")]
    static PROCESS: RefCell<Option<Arc<Process>>> = RefCell::new(None);
    #[allow(clippy::missing_const_for_thread_local, reason = "shuttle's macro has no such form")]
    static SIGNAL: RefCell<Option<Signal>> = RefCell::new(None);
    #[allow(clippy::missing_const_for_thread_local, reason = "shuttle's macro has no such form")]
    static SPINS: Cell<u32> = Cell::new(0);
}

/// Counts the spin locks, and what is like one, that the caller holds.
fn count_spins(change: impl FnOnce(u32) -> u32) {
    SPINS.with(|spins| spins.set(change(spins.get())));
}

/// Fails if the caller holds a spin lock, where a kernel could not sleep or allocate.
fn assert_may_sleep(what: &str) {
    assert_eq!(SPINS.with(Cell::get), 0, "{what} under a spin lock");
}

// The locks here that are the standard library's are held for a few lines that meet nobody else's steps; the others are
// of the kind that an explorer of schedules knows.
struct Shared {
    machine: Arc<Machine>,
    free: Mutex<BTreeSet<u64>>,
    /// Pages that a process had and has thrown away, as long as they are not free.
    retired: Mutex<BTreeSet<u64>>,
    /// Allocations that still succeed; negative: no limit.
    budget: AtomicI64,
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
        let end = DRAM_BASE + machine.memory().dram_size();
        let free = (HOST_BASE..end).step_by(PAGE_SIZE as usize).collect();
        Self {
            shared: Arc::new(Shared {
                machine,
                free: Mutex::new(free),
                retired: Mutex::default(),
                budget: AtomicI64::new(-1),
                answers: Mutex::default(),
            }),
        }
    }

    /// Answers the command `fid` with `x0`, without asking the RMM, until told `None`.
    pub fn answer(&self, fid: u64, x0: Option<u64>) {
        let mut answers = self.shared.answers.lock().unwrap();
        match x0 {
            Some(x0) => drop(answers.insert(fid, x0)),
            None => drop(answers.remove(&fid)),
        }
    }

    /// Fails the machine if a command names a page that its caller does not own: one that is free, that is no memory,
    /// or that the process it belonged to has thrown away.
    fn check_rmi(&self, regs: &SmcRegs) {
        // Where the addresses of pages are; a descriptor has its page in bits 47:12.
        let named: &[usize] = match regs[0] {
            fid::DATA_CREATE => &[1, 2, 4],
            fid::REC_CREATE => &[1, 2, 3],
            fid::RTT_MAP_UNPROTECTED => &[1, 4],
            fid::REALM_CREATE
            | fid::DATA_CREATE_UNKNOWN
            | fid::RTT_CREATE
            | fid::REC_ENTER
            | fid::RTT_SET_RIPAS
            | fid::PSCI_COMPLETE => &[1, 2],
            fid::VERSION | fid::FEATURES => &[],
            _ => &[1],
        };
        let mut wrong = Vec::new();
        {
            let free = self.shared.free.lock().unwrap();
            let retired = self.shared.retired.lock().unwrap();
            let end = DRAM_BASE + self.machine().memory().dram_size();
            for &at in named {
                let is_desc = regs[0] == fid::RTT_MAP_UNPROTECTED && at == 4;
                let pa = if is_desc { regs[at] & 0xFFFF_FFFF_F000 } else { regs[at] };
                let stale = is_desc && retired.contains(&pa);
                if !(HOST_BASE..end).contains(&pa) || pa % PAGE_SIZE != 0 || free.contains(&pa) || stale {
                    wrong.push((at, pa));
                }
            }
        }
        for (at, pa) in wrong {
            let name = cca_abi::rmi::name(regs[0]).unwrap_or("an unknown command");
            self.machine().report_violation(format!("{name} names {pa:#x} in x{at}, which is nobody's"));
        }
    }

    /// An SMC on `cpu`, watched.
    fn smc_on(&self, cpu: usize, regs: &mut SmcRegs) {
        sync::interleave();
        self.check_rmi(regs);
        let answer = self.shared.answers.lock().unwrap().get(&regs[0]).copied();
        match answer {
            Some(x0) => {
                regs.fill(0);
                regs[0] = x0;
            }
            None => self.machine().host_smc(cpu, regs),
        }
        sync::interleave();
    }

    /// Its machine.
    #[must_use]
    pub fn machine(&self) -> &Arc<Machine> {
        &self.shared.machine
    }

    /// Pages that nobody has allocated.
    #[must_use]
    pub fn free_pages(&self) -> usize {
        self.shared.free.lock().unwrap().len()
    }

    /// Lets `count` more page allocations succeed; `None` lifts the limit.
    pub fn limit_allocations(&self, count: Option<u32>) {
        self.shared.budget.store(count.map_or(-1, i64::from), Relaxed);
    }

    fn take(&self, first: u64, count: u64) -> bool {
        let mut free = self.shared.free.lock().unwrap();
        let pages = (0..count).map(|n| first + n * PAGE_SIZE);
        if pages.clone().all(|pa| free.contains(&pa)) {
            pages.for_each(|pa| {
                free.remove(&pa);
            });
            true
        } else {
            false
        }
    }

    fn charge(&self) -> Result<()> {
        if self.shared.budget.load(Relaxed) < 0 || self.shared.budget.fetch_sub(1, Relaxed) > 0 {
            Ok(())
        } else {
            self.shared.budget.store(0, Relaxed);
            Err(Errno::ENOMEM)
        }
    }

    fn page(&self, pa: u64, zeroed: bool) -> SimPage {
        let page = SimPage { kernel: self.clone(), pa };
        for word in page.words() {
            // What a page held before is nobody's business: make use of it visible.
            word.store(if zeroed { 0 } else { 0xDEAD_BEEF_DEAD_BEEF }, Relaxed);
        }
        page
    }

    fn process() -> Arc<Process> {
        PROCESS.with(|process| process.borrow().clone()).expect("the calling thread belongs to a process")
    }
}

/// A page of kernel memory.
pub struct SimPage {
    kernel: SimKernel,
    pa: u64,
}

impl SimPage {
    fn words(&self) -> &crate::memory::Page {
        let memory = self.kernel.machine().memory();
        memory
            .page(Pas::NonSecure, self.pa)
            .unwrap_or_else(|fault| panic!("host kernel touched {:#x}: {fault:x?}", self.pa))
    }

    fn poison(&self) {
        self.words().iter().for_each(|word| word.store(0xDEAD_BEEF_DEAD_BEEF, Relaxed));
    }

    fn load(&self, offset: usize, size: usize) -> u64 {
        if offset % size != 0 || offset + size > PAGE_SIZE as usize {
            return 0;
        }
        let word = self.words()[offset / 8].load(Relaxed) >> ((offset % 8) * 8);
        if size == 8 { word } else { word & ((1 << (size * 8)) - 1) }
    }

    fn store(&self, offset: usize, size: usize, value: u64) {
        if offset % size != 0 || offset + size > PAGE_SIZE as usize {
            return;
        }
        let shift = (offset % 8) * 8;
        let mask = (if size == 8 { u64::MAX } else { (1 << (size * 8)) - 1 }) << shift;
        let word = &self.words()[offset / 8];
        word.store(word.load(Relaxed) & !mask | (value << shift) & mask, Relaxed);
    }
}

impl Page for SimPage {
    fn pa(&self) -> u64 {
        self.pa
    }
    fn load_u8(&self, offset: usize) -> u8 {
        self.load(offset, 1) as u8
    }
    fn load_u32(&self, offset: usize) -> u32 {
        self.load(offset, 4) as u32
    }
    fn load_u64(&self, offset: usize) -> u64 {
        self.load(offset, 8)
    }
    fn store_u8(&self, offset: usize, value: u8) {
        self.store(offset, 1, value.into());
    }
    fn store_u32(&self, offset: usize, value: u32) {
        self.store(offset, 4, value.into());
    }
    fn store_u64(&self, offset: usize, value: u64) {
        self.store(offset, 8, value);
    }
}

impl Drop for SimPage {
    fn drop(&mut self) {
        let machine = self.kernel.machine();
        if machine.memory().check(Pas::NonSecure, self.pa).is_err() {
            machine.report_violation(format!("page {:#x} was freed while delegated", self.pa));
            return;
        }
        self.kernel.shared.retired.lock().unwrap().remove(&self.pa);
        self.kernel.shared.free.lock().unwrap().insert(self.pa);
    }
}

/// A process: an address space and a table of files.
pub struct Process {
    kernel: SimKernel,
    pages: Mutex<HashMap<u64, Arc<SimPage>>>,
    next: AtomicU64,
    files: Mutex<HashMap<i32, FileObject<SimKernel>>>,
    events: Mutex<HashMap<i32, SimEvent>>,
    hooks: Mutex<Vec<(u64, Arc<dyn MemoryHook>)>>,
    /// Held while hooks are called: who unhooks waits for that.
    calling: sync::RwLock<()>,
    old: Mutex<std::collections::VecDeque<Arc<SimPage>>>,
    /// Orders changes of the mappings and look-ups of pages, as `mmap_lock` does.
    mappings: sync::RwLock<()>,
    killed: AtomicBool,
}

impl Process {
    /// A process without memory or files.
    #[must_use]
    pub fn new(kernel: &SimKernel) -> Arc<Self> {
        Arc::new(Self {
            kernel: kernel.clone(),
            pages: Mutex::default(),
            next: AtomicU64::new(0x10_0000),
            files: Mutex::default(),
            events: Mutex::default(),
            hooks: Mutex::default(),
            calling: sync::RwLock::new(()),
            old: Mutex::default(),
            mappings: sync::RwLock::new(()),
            killed: AtomicBool::new(false),
        })
    }

    /// Runs `work` as a thread of this process.
    pub fn run<T>(self: &Arc<Self>, work: impl FnOnce() -> T) -> T {
        struct Back(Option<Arc<Process>>);
        impl Drop for Back {
            fn drop(&mut self) {
                drop(PROCESS.with(|process| process.replace(self.0.take())));
            }
        }
        let _back = Back(PROCESS.with(|process| process.replace(Some(self.clone()))));
        work()
    }

    /// It is being killed: long work in the kernel ends where it is. Whoever kills also interrupts its threads.
    pub fn kill(&self) {
        self.killed.store(true, SeqCst);
    }

    /// Calls all hooks.
    fn notify(&self, call: impl Fn(&dyn MemoryHook)) {
        let _calling = self.calling.read().unwrap();
        let hooks: Vec<_> = self.hooks.lock().unwrap().iter().map(|(_, hook)| hook.clone()).collect();
        hooks.iter().for_each(|hook| call(&**hook));
    }

    /// Zeroed memory of `size` bytes; its address.
    ///
    /// # Panics
    /// If the machine has no more memory.
    pub fn mmap(&self, size: u64) -> u64 {
        let size = size.next_multiple_of(PAGE_SIZE);
        let address = self.next.fetch_add(size + PAGE_SIZE, Relaxed);
        let mut pages = self.pages.lock().unwrap();
        for at in (address..address + size).step_by(PAGE_SIZE as usize) {
            let page = self.kernel.alloc_page(Fill::Zeroed).expect("memory for the process");
            pages.insert(at, Arc::new(page));
        }
        address
    }

    /// Throws the contents of `[address, address + size)` away (`MADV_DONTNEED`): each page that is there is replaced by
    /// a new one.
    ///
    /// # Panics
    /// If the machine has no more memory.
    pub fn discard(&self, address: u64, size: u64) {
        let _exclusive = self.mappings.write().unwrap();
        // A kernel holds locks here under which nothing sleeps or allocates.
        count_spins(|spins| spins + 1);
        self.notify(|hook| hook.change_begins(address..address + size, false));
        count_spins(|spins| spins - 1);
        // It takes a while.
        (0..8).for_each(|_| sync::interleave());
        for at in (address..address + size).step_by(PAGE_SIZE as usize) {
            let mut pages = self.pages.lock().unwrap();
            if let Some(page) = pages.get_mut(&at) {
                let new = Arc::new(self.kernel.alloc_page(Fill::Zeroed).expect("memory for the process"));
                let old = std::mem::replace(page, new);
                drop(pages);
                // Whoever gets it next must not be seen by the guest. One that was in the middle of an access ends it
                // before the hardware would call the invalidation complete; here it gets some time.
                old.poison();
                self.kernel.shared.retired.lock().unwrap().insert(old.pa);
                let mut old_pages = self.old.lock().unwrap();
                old_pages.push_back(old);
                if old_pages.len() > 64 {
                    drop(old_pages.pop_front());
                }
            }
        }
        self.notify(|hook| hook.change_ends());
    }

    fn at(&self, address: u64) -> Option<Arc<SimPage>> {
        self.pages.lock().unwrap().get(&(address & !(PAGE_SIZE - 1))).cloned()
    }

    /// Copies out of the process.
    ///
    /// # Errors
    /// `EFAULT` where nothing is mapped.
    pub fn read(&self, from: u64, to: &mut [u8]) -> Result<()> {
        for (n, byte) in (0..).zip(to) {
            let at = from.checked_add(n).ok_or(Errno::EFAULT)?;
            let page = self.at(at).ok_or(Errno::EFAULT)?;
            *byte = page.load_u8((at % PAGE_SIZE) as usize);
        }
        Ok(())
    }

    /// Copies into the process.
    ///
    /// # Errors
    /// `EFAULT` where nothing is mapped.
    pub fn write(&self, to: u64, from: &[u8]) -> Result<()> {
        for (n, byte) in (0..).zip(from) {
            let at = to.checked_add(n).ok_or(Errno::EFAULT)?;
            let page = self.at(at).ok_or(Errno::EFAULT)?;
            page.store_u8((at % PAGE_SIZE) as usize, *byte);
        }
        Ok(())
    }

    /// Makes an eventfd. Its numbers are far from those of other files.
    pub fn eventfd(&self) -> i32 {
        let mut events = self.events.lock().unwrap();
        let fd = 1000 + events.len() as i32;
        events.insert(fd, SimEvent::default());
        fd
    }

    /// Writes 1 to an eventfd.
    ///
    /// # Panics
    /// If there is no such eventfd.
    pub fn signal(&self, fd: i32) {
        let event = self.events.lock().unwrap()[&fd].clone();
        event.signal();
    }

    /// Reads an eventfd: how often it was signalled since the last time.
    ///
    /// # Panics
    /// If there is no such eventfd.
    #[must_use]
    pub fn take_signals(&self, fd: i32) -> u64 {
        let event = self.events.lock().unwrap()[&fd].clone();
        event.0.count.swap(0, SeqCst)
    }

    /// The object behind a file descriptor.
    #[must_use]
    pub fn file(&self, fd: i32) -> Option<FileObject<SimKernel>> {
        self.files.lock().unwrap().get(&fd).cloned()
    }

    /// Closes one file.
    pub fn close(&self, fd: i32) {
        let file = self.files.lock().unwrap().remove(&fd);
        drop(file);
    }

    /// What the kernel does when the process dies: its address space ends, then it closes its files, lowest first.
    pub fn exit(&self) {
        self.notify(|hook| hook.change_begins(0..u64::MAX, true));
        let pages = std::mem::take(&mut *self.pages.lock().unwrap());
        drop(pages);
        self.old.lock().unwrap().clear();
        let mut files: Vec<_> = self.files.lock().unwrap().drain().collect();
        files.sort_by_key(|(fd, _)| *fd);
        for (_, file) in files {
            drop(file);
        }
    }
}

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

impl EventFd for SimEvent {
    fn signal(&self) {
        let hooks = self.0.fire.lock().unwrap();
        if hooks.is_empty() {
            self.0.count.fetch_add(1, SeqCst);
        }
        // A waker must not sleep.
        count_spins(|spins| spins + 1);
        hooks.iter().for_each(|(_, fire)| fire());
        count_spins(|spins| spins - 1);
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

/// A hook into a process's address space.
pub struct SimMemoryWatch(std::sync::Weak<Process>, u64);

impl Drop for SimMemoryWatch {
    fn drop(&mut self) {
        assert_may_sleep("a hook was dropped");
        let Some(process) = self.0.upgrade() else { return };
        let mut hooks = process.hooks.lock().unwrap();
        let at = hooks.iter().position(|(id, _)| *id == self.1);
        let gone = at.map(|at| hooks.swap_remove(at));
        drop(hooks);
        drop(process.calling.write().unwrap());
        drop(gone);
    }
}

/// A pinned page of a process.
pub struct SimUserPage(Arc<SimPage>);

impl UserPage for SimUserPage {
    fn pa(&self) -> u64 {
        self.0.pa
    }
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

impl VcpuThread for SimVcpuThread {
    fn begin(&self) {
        SIGNAL.with(|signal| {
            if let Some(signal) = &*signal.borrow() {
                *signal.target.lock().unwrap() = Some(self.state.clone());
            }
        });
    }

    fn end(&self) {
        SIGNAL.with(|signal| {
            if let Some(signal) = &*signal.borrow() {
                *signal.target.lock().unwrap() = None;
            }
        });
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

    fn watch_memory(&self, hook: Arc<dyn MemoryHook>) -> Result<SimMemoryWatch> {
        assert_may_sleep("a hook was made");
        let process = Self::process();
        let mut hooks = process.hooks.lock().unwrap();
        let id = hooks.iter().map(|(id, _)| id + 1).max().unwrap_or(0);
        hooks.push((id, hook));
        drop(hooks);
        Ok(SimMemoryWatch(Arc::downgrade(&process), id))
    }

    fn eventfd(&self, fd: i32) -> Result<SimEvent> {
        Self::process().events.lock().unwrap().get(&fd).cloned().ok_or(Errno::EBADF)
    }

    fn watch(&self, event: &SimEvent, fire: Box<dyn Fn() + Send + Sync>) -> Result<SimWatch> {
        assert_may_sleep("a hook was made");
        let id = event.0.next.fetch_add(1, Relaxed);
        event.0.fire.lock().unwrap().push((id, fire));
        if event.0.count.swap(0, SeqCst) != 0 {
            event.signal();
        }
        Ok(SimWatch(event.clone(), id))
    }

    fn smc(&self, regs: &mut SmcRegs) {
        let machine = self.machine();
        machine.on_cpu(|cpu| self.smc_on(cpu, regs));
    }

    fn alloc_page(&self, fill: Fill) -> Result<SimPage> {
        assert_may_sleep("an allocation");
        self.charge()?;
        let pa = self.shared.free.lock().unwrap().pop_first().ok_or(Errno::ENOMEM)?;
        Ok(self.page(pa, fill == Fill::Zeroed))
    }

    fn alloc_contiguous(&self, count: usize) -> Result<Vec<SimPage>> {
        assert_may_sleep("an allocation");
        self.charge()?;
        let size = count as u64 * PAGE_SIZE;
        let end = DRAM_BASE + self.machine().memory().dram_size();
        let first = (HOST_BASE.next_multiple_of(size)..end)
            .step_by(size as usize)
            .find(|&pa| pa + size <= end && self.take(pa, count as u64))
            .ok_or(Errno::ENOMEM)?;
        Ok((0..count as u64).map(|n| self.page(first + n * PAGE_SIZE, true)).collect())
    }

    fn alloc_block(&self) -> Option<Vec<SimPage>> {
        self.charge().ok()?;
        let size = BLOCK_PAGES * PAGE_SIZE;
        let end = DRAM_BASE + self.machine().memory().dram_size();
        let first = (HOST_BASE.next_multiple_of(size)..end)
            .step_by(size as usize)
            .find(|&pa| pa + size <= end && self.take(pa, BLOCK_PAGES))?;
        Some((0..BLOCK_PAGES).map(|n| self.page(first + n * PAGE_SIZE, false)).collect())
    }

    fn copy_from_user(&self, from: u64, to: &mut [u8]) -> Result<()> {
        assert_may_sleep("a user copy");
        Self::process().read(from, to)
    }

    fn copy_to_user(&self, to: u64, from: &[u8]) -> Result<()> {
        assert_may_sleep("a user copy");
        Self::process().write(to, from)
    }

    fn is_user_range(&self, address: u64, size: u64) -> bool {
        address.checked_add(size).is_some_and(|end| end <= 1 << 48)
    }

    fn current_address_space(&self) -> usize {
        Arc::as_ptr(&Self::process()) as usize
    }

    fn is_current(&self, space: &usize) -> bool {
        Arc::as_ptr(&Self::process()) as usize == *space
    }

    fn pin_user_pages(
        &self,
        address: u64,
        count: usize,
        _purpose: PinPurpose,
        pages: &mut Vec<SimUserPage>,
    ) -> Result<usize> {
        assert_may_sleep("a pin");
        let process = Self::process();
        let _stable = process.mappings.read().unwrap();
        for n in 0..count {
            match process.at(address + n as u64 * PAGE_SIZE) {
                Some(page) => pages.push(SimUserPage(page)),
                None if n > 0 => return Ok(n),
                None => return Err(Errno::EFAULT),
            }
        }
        Ok(count)
    }

    fn install_fd(&self, _name: &str, object: FileObject<Self>, _size: u64) -> Result<i32> {
        assert_may_sleep("install_fd");
        let process = Self::process();
        let mut files = process.files.lock().unwrap();
        let fd = (3..).find(|fd| !files.contains_key(fd)).ok_or(Errno::EBADF)?;
        files.insert(fd, object);
        Ok(fd)
    }

    fn file_object(&self, fd: i32) -> Option<FileObject<Self>> {
        Self::process().file(fd)
    }

    fn new_vcpu_thread(&self) -> SimVcpuThread {
        SimVcpuThread {
            kernel: self.clone(),
            state: Arc::new(ThreadState {
                machine: self.machine().clone(),
                position: sync::Mutex::default(),
                kicked: sync::Condvar::new(),
            }),
        }
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
        Self::process().killed.load(SeqCst)
    }

    fn log(&self, level: LogLevel, line: fmt::Arguments<'_>) {
        self.machine().log(format!("host {level:?}: {line}"));
    }
}
