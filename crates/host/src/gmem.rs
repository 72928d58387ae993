//! guest_memfd: memory that only a Realm can see. User space has a file descriptor for it, and no way to its bytes.
//!
//! Every page is in one of four states, and the host touches none of them after it was delegated:
//!
//! | state | means |
//! |---|---|
//! | hole | not allocated |
//! | owned | allocated, the host's; its contents are never seen by anybody |
//! | delegated | mapped in the Realm as DATA |
//! | leaked | the RMM did not give it back; never used again |

use alloc::sync::{Arc, Weak};
use core::ops::Range;

use crate::errno::{Errno, Result};
use crate::granule::Delegated;
use crate::kernel::{BLOCK_PAGES, Fill, Kernel, Mutex, PAGE_SIZE};
use crate::lock::guarded;
use crate::sparse::Sparse;
use crate::vm::Vm;

/// `FALLOC_FL_KEEP_SIZE`.
pub const FALLOC_KEEP_SIZE: u32 = 1;
/// `FALLOC_FL_PUNCH_HOLE`.
pub const FALLOC_PUNCH_HOLE: u32 = 2;

/// A page that is not a hole.
pub(crate) enum GmemPage<K: Kernel> {
    Owned(K::Page),
    Delegated(Delegated<K>),
    Leaked,
}

/// Pages by index in the file.
pub(crate) type Pages<K> = Sparse<GmemPage<K>>;

/// One file of private memory, bound for life to the VM that made it.
pub struct Gmem<K: Kernel> {
    kernel: K,
    vm: Weak<Vm<K>>,
    size: u64,
    pub(crate) pages: Mutex<K, Pages<K>>,
}

impl<K: Kernel> Gmem<K> {
    /// `KVM_CREATE_GUEST_MEMFD`.
    ///
    /// # Errors
    /// `EINVAL` for a size that is zero or no multiple of the page size; `ENOMEM`.
    pub(crate) fn new(kernel: K, vm: Weak<Vm<K>>, size: u64) -> Result<Arc<Self>> {
        if size == 0 || size % PAGE_SIZE != 0 || size > i64::MAX.unsigned_abs() {
            return Err(Errno::EINVAL);
        }
        let pages = Sparse::new(size / PAGE_SIZE);
        Ok(Arc::new(Self { kernel, vm, size, pages: guarded(c"gmem.pages", pages) }))
    }

    /// Bytes in the file.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether it belongs to `vm`.
    pub(crate) fn belongs_to(&self, vm: &Weak<Vm<K>>) -> bool {
        Weak::ptr_eq(&self.vm, vm)
    }

    /// `fallocate`: with `PUNCH_HOLE | KEEP_SIZE` takes pages from the Realm and frees them, with 0 or `KEEP_SIZE`
    /// allocates what is missing.
    ///
    /// # Errors
    /// `EOPNOTSUPP` for other modes, `EINVAL` for a range that is not page aligned or outside the file, `ENOMEM`,
    /// `EBUSY` while the VM is being torn down, `EINTR` if the process is killed meanwhile.
    pub fn fallocate(&self, mode: u32, offset: u64, len: u64) -> Result {
        if mode & !(FALLOC_KEEP_SIZE | FALLOC_PUNCH_HOLE) != 0 || mode == FALLOC_PUNCH_HOLE {
            return Err(Errno::EOPNOTSUPP);
        }
        let end = offset.checked_add(len).ok_or(Errno::EINVAL)?;
        if len == 0 || offset % PAGE_SIZE != 0 || len % PAGE_SIZE != 0 {
            return Err(Errno::EINVAL);
        }
        let range = offset / PAGE_SIZE..end.min(self.size) / PAGE_SIZE;
        if mode & FALLOC_PUNCH_HOLE != 0 {
            self.punch(range)
        } else if end > self.size {
            Err(Errno::EINVAL)
        } else {
            self.preallocate(range)
        }
    }

    fn punch(&self, range: Range<u64>) -> Result {
        let vm = self.vm.upgrade();
        let lost = match &vm {
            Some(vm) => {
                let mut memory = vm.memory.lock();
                memory.unmap_gmem(&vm.rmi, self, range.clone())
            }
            None => 0,
        };
        let mut at = range.start;
        let mut busy = false;
        loop {
            let mut pages = self.pages.lock();
            let Some(index) = pages.next(at..range.end) else { break };
            at = index + 1;
            match pages.get(index) {
                Some(GmemPage::Owned(_)) => drop(pages.take(index)),
                // Only while the VM's last reference is being dropped elsewhere.
                Some(GmemPage::Delegated(_)) => busy = true,
                Some(GmemPage::Leaked) | None => {}
            }
            drop(pages);
            self.kernel.cond_resched();
        }
        if lost != 0 {
            Err(Errno::EIO)
        } else if busy {
            Err(Errno::EBUSY)
        } else {
            Ok(0)
        }
    }

    fn preallocate(&self, range: Range<u64>) -> Result {
        for index in range {
            let mut pages = self.pages.lock();
            if pages.get(index).is_none() {
                pages.prepare(index)?;
                let page = self.kernel.alloc_page(Fill::Any)?;
                drop(pages.insert(index, GmemPage::Owned(page)));
            }
            drop(pages);
            self.kernel.cond_resched();
            if self.kernel.is_killed() {
                return Err(Errno::EINTR);
            }
        }
        Ok(0)
    }
}

impl<K: Kernel> Drop for Gmem<K> {
    /// A large file holds many pages: freed one by one, so that others get their chance.
    fn drop(&mut self) {
        let pages = self.pages.get_mut();
        let mut at = 0;
        while let Some(index) = pages.next(at..u64::MAX) {
            drop(pages.take(index));
            self.kernel.cond_resched();
            at = index + 1;
        }
    }
}

/// Whether the page at `index` lies in memory where its place in a block demands, by that of the block's first.
pub(crate) fn is_contiguous<K: Kernel>(pages: &Pages<K>, index: u64, pa: u64) -> bool {
    let first = index / BLOCK_PAGES * BLOCK_PAGES;
    match pages.get(first) {
        Some(GmemPage::Delegated(granule)) => {
            granule.pa() % (BLOCK_PAGES * PAGE_SIZE) == 0 && granule.pa() + (index - first) * PAGE_SIZE == pa
        }
        _ => false,
    }
}

/// Takes the page at `index` for the Realm: the owned one, or a new one. The place is empty afterwards and ready for
/// [`Sparse::insert`].
///
/// # Errors
/// `ENOMEM`; `EEXIST` if the Realm has it already; `EHWPOISON` if it is lost.
pub(crate) fn take_for_realm<K: Kernel>(kernel: &K, pages: &mut Pages<K>, index: u64) -> Result<K::Page> {
    pages.prepare(index)?;
    if pages.get(index).is_none() {
        take_block(kernel, pages, index);
    }
    match pages.get(index) {
        None => kernel.alloc_page(Fill::Any),
        Some(GmemPage::Delegated(_)) => Err(Errno::EEXIST),
        Some(GmemPage::Leaked) => Err(Errno::EHWPOISON),
        Some(GmemPage::Owned(_)) => match pages.take(index) {
            Some(GmemPage::Owned(page)) => Ok(page),
            _ => Err(Errno::EIO),
        },
    }
}

/// Fills the 2 MiB of the file around `index` with one block of memory, if all of them are holes: the Realm can then be
/// given them as one.
fn take_block<K: Kernel>(kernel: &K, pages: &mut Pages<K>, index: u64) {
    let first = index / BLOCK_PAGES * BLOCK_PAGES;
    let range = first..first + BLOCK_PAGES;
    if range.end > pages.len() || pages.next(range.clone()).is_some() {
        return;
    }
    let Some(block) = kernel.alloc_block() else { return };
    // The places of a block are made together.
    for (at, page) in range.zip(block) {
        drop(pages.insert(at, GmemPage::Owned(page)));
    }
}
