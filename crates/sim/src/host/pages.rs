//! The page allocator, which knows what is free, and pages of kernel memory.

use super::SimKernel;
use crate::machine::{HOST_BASE, Machine};
use crate::memory::{self, DRAM_BASE, PAGE_SIZE, Pas};
use kvm_realm::kernel::{Fill, Page};
use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicI64, Ordering::Relaxed};

/// What a page holds whose contents are nobody's business, so that use of them is seen.
pub const POISON: u64 = 0xDEAD_BEEF_DEAD_BEEF;

/// All pages of the host.
pub(super) struct Pages {
    /// The end of memory.
    end: u64,
    free: Mutex<BTreeSet<u64>>,
    /// Pages that a process had and has thrown away, as long as they are not free.
    retired: Mutex<BTreeSet<u64>>,
    /// Allocations that still succeed; negative: no limit.
    budget: AtomicI64,
}

impl Pages {
    /// All of the machine's host memory, free.
    pub(super) fn of(machine: &Machine) -> Self {
        let end = DRAM_BASE + machine.memory().dram_size();
        Self {
            end,
            free: Mutex::new((HOST_BASE..end).step_by(PAGE_SIZE as usize).collect()),
            retired: Mutex::default(),
            budget: AtomicI64::new(-1),
        }
    }

    /// Whether somebody has allocated this page; what is no memory, nobody has.
    pub(super) fn is_allocated(&self, pa: u64) -> bool {
        (HOST_BASE..self.end).contains(&pa) && pa % PAGE_SIZE == 0 && !self.free.lock().unwrap().contains(&pa)
    }

    /// Whether the process that had this page has thrown it away.
    pub(super) fn is_retired(&self, pa: u64) -> bool {
        self.retired.lock().unwrap().contains(&pa)
    }

    /// One allocation, if the limit lets it through.
    fn charge(&self) -> bool {
        let passes = self.budget.load(Relaxed) < 0 || self.budget.fetch_sub(1, Relaxed) > 0;
        if !passes {
            self.budget.store(0, Relaxed);
        }
        passes
    }

    /// The lowest `count` free pages in a row, aligned to the size of all; the first of them.
    fn take_run(&self, count: u64) -> Option<u64> {
        let size = count * PAGE_SIZE;
        let run = |first: u64| (first..first + size).step_by(PAGE_SIZE as usize);
        let mut free = self.free.lock().unwrap();
        let first = (HOST_BASE.next_multiple_of(size)..self.end)
            .step_by(size as usize)
            .find(|&first| run(first).all(|pa| free.contains(&pa)))?;
        for pa in run(first) {
            free.remove(&pa);
        }
        Some(first)
    }
}

impl SimKernel {
    /// Pages that nobody has allocated.
    #[must_use]
    pub fn free_pages(&self) -> usize {
        self.shared.pages.free.lock().unwrap().len()
    }

    /// Lets `count` more page allocations succeed; `None` lifts the limit.
    pub fn limit_allocations(&self, count: Option<u32>) {
        self.shared.pages.budget.store(count.map_or(-1, i64::from), Relaxed);
    }

    /// Allocates a page.
    pub(super) fn take_page(&self, fill: Fill) -> Option<SimPage> {
        let pages = &self.shared.pages;
        let pa = if pages.charge() { pages.free.lock().unwrap().pop_first()? } else { return None };
        Some(SimPage::new(self, pa, fill))
    }

    /// Allocates `count` pages in a row, the first aligned to the size of all.
    pub(super) fn take_pages(&self, count: u64, fill: Fill) -> Option<Vec<SimPage>> {
        let pages = &self.shared.pages;
        let first = if pages.charge() { pages.take_run(count)? } else { return None };
        Some((0..count).map(|n| SimPage::new(self, first + n * PAGE_SIZE, fill)).collect())
    }
}

/// A page of kernel memory.
pub struct SimPage {
    kernel: SimKernel,
    pa: u64,
}

impl SimPage {
    fn new(kernel: &SimKernel, pa: u64, fill: Fill) -> Self {
        let page = Self { kernel: kernel.clone(), pa };
        page.fill(if fill == Fill::Zeroed { 0 } else { POISON });
        page
    }

    fn words(&self) -> &memory::Page {
        let memory = self.kernel.machine().memory();
        memory
            .page(Pas::NonSecure, self.pa)
            .unwrap_or_else(|fault| panic!("host kernel touched {:#x}: {fault:x?}", self.pa))
    }

    fn fill(&self, value: u64) {
        self.words().iter().for_each(|word| word.store(value, Relaxed));
    }

    /// Its process throws it away: nobody may be given it any more, and whoever still reads it shall be seen.
    pub(super) fn retire(&self) {
        self.fill(POISON);
        self.kernel.shared.pages.retired.lock().unwrap().insert(self.pa);
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
        let pages = &self.kernel.shared.pages;
        pages.retired.lock().unwrap().remove(&self.pa);
        pages.free.lock().unwrap().insert(self.pa);
    }
}
