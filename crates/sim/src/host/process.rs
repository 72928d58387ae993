//! Processes: user memory, its pins and hooks, files.

use super::lock::{assert_may_sleep, atomically};
use super::{SimEvent, SimKernel, SimPage};
use crate::memory::PAGE_SIZE;
use crate::sync;
use kvm_realm::errno::{Errno, Result};
use kvm_realm::files::FileObject;
use kvm_realm::kernel::{EventFd, Fill, Kernel, MemoryHook, Page, UserPage};
use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Mutex, Weak};

sync::thread_local! {
    #[allow(clippy::missing_const_for_thread_local, reason = "shuttle's macro has no such form")]
    static PROCESS: RefCell<Option<Arc<Process>>> = RefCell::new(None);
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
    old: Mutex<VecDeque<Arc<SimPage>>>,
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

    /// The process that the calling thread belongs to.
    pub(super) fn current() -> Arc<Self> {
        PROCESS.with(|process| process.borrow().clone()).expect("the calling thread belongs to a process")
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

    pub(super) fn is_killed(&self) -> bool {
        self.killed.load(SeqCst)
    }

    /// Tells `hook` of changes of the mappings from now on.
    pub(super) fn hook(self: &Arc<Self>, hook: Arc<dyn MemoryHook>) -> SimMemoryWatch {
        let mut hooks = self.hooks.lock().unwrap();
        let id = hooks.iter().map(|(id, _)| id + 1).max().unwrap_or(0);
        hooks.push((id, hook));
        SimMemoryWatch(Arc::downgrade(self), id)
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
        atomically(|| self.notify(|hook| hook.change_begins(address..address + size, false)));
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
                old.retire();
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

    /// Pins `count` pages from `address`, as many as are there.
    pub(super) fn pin(&self, address: u64, count: usize, pages: &mut Vec<SimUserPage>) -> Result<usize> {
        let _stable = self.mappings.read().unwrap();
        for n in 0..count {
            match self.at(address + n as u64 * PAGE_SIZE) {
                Some(page) => pages.push(SimUserPage(page)),
                None if n > 0 => return Ok(n),
                None => return Err(Errno::EFAULT),
            }
        }
        Ok(count)
    }

    /// `[address, address + size)` page by page: the page, the offset in it, and which part of the range it holds.
    fn pieces(
        &self,
        address: u64,
        size: usize,
    ) -> impl Iterator<Item = Result<(Arc<SimPage>, usize, Range<usize>)>> {
        let mut done = 0;
        std::iter::from_fn(move || {
            let from = done;
            let at = address.checked_add(from as u64);
            let offset = at.map_or(0, |at| (at % PAGE_SIZE) as usize);
            done = size.min(from + PAGE_SIZE as usize - offset);
            let page = at.and_then(|at| self.at(at)).ok_or(Errno::EFAULT);
            (from < size).then(|| page.map(|page| (page, offset, from..done)))
        })
    }

    /// Copies out of the process.
    ///
    /// # Errors
    /// `EFAULT` where nothing is mapped.
    pub fn read(&self, from: u64, to: &mut [u8]) -> Result<()> {
        for piece in self.pieces(from, to.len()) {
            let (page, offset, part) = piece?;
            for (n, byte) in (offset..).zip(&mut to[part]) {
                *byte = page.load_u8(n);
            }
        }
        Ok(())
    }

    /// Copies into the process.
    ///
    /// # Errors
    /// `EFAULT` where nothing is mapped.
    pub fn write(&self, to: u64, from: &[u8]) -> Result<()> {
        for piece in self.pieces(to, from.len()) {
            let (page, offset, part) = piece?;
            for (n, byte) in (offset..).zip(&from[part]) {
                page.store_u8(n, *byte);
            }
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
        self.event(fd).expect("an eventfd").signal();
    }

    /// Reads an eventfd: how often it was signalled since the last time.
    ///
    /// # Panics
    /// If there is no such eventfd.
    #[must_use]
    pub fn take_signals(&self, fd: i32) -> u64 {
        self.event(fd).expect("an eventfd").take()
    }

    pub(super) fn event(&self, fd: i32) -> Result<SimEvent> {
        self.events.lock().unwrap().get(&fd).cloned().ok_or(Errno::EBADF)
    }

    /// Gives `object` the lowest free descriptor.
    pub(super) fn install(&self, object: FileObject<SimKernel>) -> Result<i32> {
        let mut files = self.files.lock().unwrap();
        let fd = (3..).find(|fd| !files.contains_key(fd)).ok_or(Errno::EBADF)?;
        files.insert(fd, object);
        Ok(fd)
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

/// A hook into a process's address space.
pub struct SimMemoryWatch(Weak<Process>, u64);

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
        self.0.pa()
    }
}
