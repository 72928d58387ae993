//! The guest's shared memory: the only part of its RAM that this process has a mapping of.
//!
//! The bytes are never lent out as a slice: once the guest runs, it writes them at any time. They are copied in
//! and out through raw pointers.
//!
//! Devices see this memory as [`GuestView`]: of a Realm's RAM only what the guest has shared. A page that it
//! takes back while a device is using it does no harm: the mapping stays valid, and nobody reads the old half.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::bitmap::BS;
use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::{
    GuestAddress, GuestMemory, GuestMemoryError, GuestMemoryRegion, GuestRegionCollection, GuestUsize,
    Permissions, VolatileSlice,
};

use crate::layout::RAM_BASE;
use crate::{Error, Result};

const FILE: &std::ffi::CStr = c"guest-shared";
/// The name under which the kernel lists the mapping.
pub const NAME: &str = "memfd:guest-shared";
const PAGE: u64 = cca_abi::GRANULE_SIZE;

/// A range of RAM, mapped here and visible to the guest through its shared addresses.
#[derive(Debug)]
pub struct SharedMemory {
    file: OwnedFd,
    start: *mut u8,
    size: usize,
    /// One bit for each page that the guest has shared; nothing if all of it is.
    shared: Option<Box<[AtomicU64]>>,
}

// SAFETY: the mapping belongs to this value alone, lives as long as it, and is accessed only through raw pointers
// by methods that check the range.
unsafe impl Send for SharedMemory {}
// SAFETY: as above; concurrent copies race like the guest's own accesses do, and no reference is formed.
unsafe impl Sync for SharedMemory {}

impl SharedMemory {
    /// Maps `size` bytes of zeroes that take no memory yet. With `private`, devices may touch only what is shared
    /// later.
    pub fn new(size: u64, private: bool) -> Result<Self> {
        let words = usize::try_from((size / PAGE).div_ceil(64)).unwrap_or(0);
        let shared = private.then(|| (0..words).map(|_| AtomicU64::new(0)).collect());
        let size = usize::try_from(size).map_err(|_| Error::vmm("so much memory cannot be mapped"))?;
        let failed = |what| Error::os(what, &std::io::Error::last_os_error());
        // SAFETY: the name is a terminated string; the descriptor that comes back is checked and owned from here on.
        let file = unsafe {
            let fd = libc::memfd_create(FILE.as_ptr(), libc::MFD_CLOEXEC);
            if fd < 0 {
                return Err(failed("memfd_create"));
            }
            OwnedFd::from_raw_fd(fd)
        };
        let length =
            libc::off_t::try_from(size).map_err(|_| Error::vmm("so much memory cannot be mapped"))?;
        // SAFETY: plain system calls on a descriptor that we own; a new mapping is placed where nothing is.
        let start = unsafe {
            if libc::ftruncate(file.as_raw_fd(), length) != 0 {
                return Err(failed("setting the size of the guest's shared memory"));
            }
            libc::mmap(
                std::ptr::null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(failed("mapping the guest's shared memory"));
        }
        Ok(Self { file, start: start.cast(), size, shared })
    }

    /// Where it lies in this process, as the kernel wants to be told.
    #[must_use]
    pub fn address(&self) -> u64 {
        u64::try_from(self.start.expose_provenance()).unwrap_or(u64::MAX)
    }

    /// Copies `bytes` to `offset`.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let offset = self.check(offset, bytes.len())?;
        // SAFETY: `check` has shown that the range lies inside the mapping, which no Rust reference points into.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.start.add(offset), bytes.len()) };
        Ok(())
    }

    /// Forgets the contents of a range of whole pages and gives its memory back.
    pub fn discard(&self, offset: u64, size: u64) -> Result<()> {
        let length = usize::try_from(size).map_err(|_| outside())?;
        self.check(offset, length)?;
        punch_hole(self.file.as_raw_fd(), offset, size)
    }

    /// Allows or forbids devices to touch a range of whole pages.
    pub fn set_shared(&self, offset: u64, size: u64, is_shared: bool) {
        let Some(words) = &self.shared else { return };
        for page in offset / PAGE..offset.saturating_add(size) / PAGE {
            let Some(word) = usize::try_from(page / 64).ok().and_then(|word| words.get(word)) else { return };
            if is_shared {
                word.fetch_or(1 << (page % 64), Ordering::Relaxed);
            } else {
                word.fetch_and(!(1 << (page % 64)), Ordering::Relaxed);
            }
        }
    }

    /// Whether devices may touch all of a range, which must not be empty.
    fn is_shared(&self, offset: u64, length: usize) -> bool {
        let Some(words) = &self.shared else { return true };
        let Some(last) = u64::try_from(length).ok().and_then(|length| offset.checked_add(length - 1)) else {
            return false;
        };
        (offset / PAGE..=last / PAGE).all(|page| {
            let word = usize::try_from(page / 64).ok().and_then(|word| words.get(word));
            word.is_some_and(|word| word.load(Ordering::Relaxed) >> (page % 64) & 1 != 0)
        })
    }

    fn check(&self, offset: u64, length: usize) -> Result<usize> {
        let offset = usize::try_from(offset).map_err(|_| outside())?;
        offset.checked_add(length).filter(|end| *end <= self.size).ok_or_else(outside)?;
        Ok(offset)
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: this is the mapping that `new` made, and nobody can reach it any more.
        unsafe { libc::munmap(self.start.cast(), self.size) };
    }
}

/// What devices see of the guest's RAM, by guest physical address. A Realm's shared memory answers at both its
/// addresses: guests hand out the one with the top bit set, older ones the other.
#[derive(Clone, Debug)]
pub struct GuestView {
    memory: Arc<SharedMemory>,
    alias: u64,
}

impl GuestView {
    /// A view of `memory`; `alias` is the bit that makes an address a shared one, 0 where there is none.
    #[must_use]
    pub fn new(memory: Arc<SharedMemory>, alias: u64) -> Self {
        Self { memory, alias }
    }

    fn slice(&self, address: GuestAddress, count: usize) -> Option<VolatileSlice<'_>> {
        let offset = (address.0 & !self.alias).checked_sub(RAM_BASE)?;
        let start = self.memory.check(offset, count).ok()?;
        // SAFETY: `check` has shown that the range lies inside the mapping, which lives as long as the borrow of
        // `self`; no Rust reference points into it.
        self.memory
            .is_shared(offset, count)
            .then(|| unsafe { VolatileSlice::new(self.memory.start.add(start), count) })
    }
}

/// The one slice, or the one error, that a range of guest memory is.
#[derive(Debug)]
struct OneSlice<'a>(Option<std::result::Result<VolatileSlice<'a>, GuestMemoryError>>);

impl<'a> Iterator for OneSlice<'a> {
    type Item = std::result::Result<VolatileSlice<'a>, GuestMemoryError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.0.take()
    }
}

impl std::iter::FusedIterator for OneSlice<'_> {}
impl<'a> GuestMemorySliceIterator<'a, ()> for OneSlice<'a> {}

/// Only a name for what lies under a [`GuestView`]: nothing hands out such a region.
#[derive(Debug)]
pub enum NoRegion {}

impl GuestMemoryRegion for NoRegion {
    type B = ();

    fn len(&self) -> GuestUsize {
        match *self {}
    }

    fn start_addr(&self) -> GuestAddress {
        match *self {}
    }

    fn bitmap(&self) {}
}

impl vm_memory::GuestMemoryRegionBytes for NoRegion {}

impl GuestMemory for GuestView {
    type PhysicalMemory = GuestRegionCollection<NoRegion>;
    type Bitmap = ();

    fn check_range(&self, address: GuestAddress, count: usize, _: Permissions) -> bool {
        count == 0 || self.slice(address, count).is_some()
    }

    fn get_slices<'a>(
        &'a self,
        address: GuestAddress,
        count: usize,
        _: Permissions,
    ) -> std::result::Result<impl GuestMemorySliceIterator<'a, BS<'a, ()>>, GuestMemoryError> {
        Ok(OneSlice(
            (count != 0)
                .then(|| self.slice(address, count).ok_or(GuestMemoryError::InvalidGuestAddress(address))),
        ))
    }
}

/// Frees a range of a memory file: the shared memory's own, or the guest_memfd that holds the private memory.
pub fn punch_hole(fd: libc::c_int, offset: u64, size: u64) -> Result<()> {
    let offset = libc::off_t::try_from(offset).map_err(|_| outside())?;
    let size = libc::off_t::try_from(size).map_err(|_| outside())?;
    // SAFETY: a system call without pointers; a wrong descriptor is an error.
    let status =
        unsafe { libc::fallocate(fd, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, offset, size) };
    if status != 0 {
        return Err(Error::os("giving back a range of guest memory", &std::io::Error::last_os_error()));
    }
    Ok(())
}

fn outside() -> Error {
    Error::vmm("a range lies outside the guest's memory")
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn what_is_outside_is_refused_and_what_was_discarded_is_zero() {
        let memory = SharedMemory::new(0x4000, true).unwrap();
        memory.write(0x1000, &[7; 0x1000]).unwrap();
        memory.discard(0x1000, 0x1000).unwrap();
        // SAFETY: inside the mapping.
        assert_eq!(unsafe { memory.start.add(0x1000).read_volatile() }, 0);
        assert!(memory.write(0x3fff, &[0; 2]).is_err());
        assert!(memory.write(u64::MAX, &[0; 2]).is_err());
        assert!(memory.discard(0x3000, 0x2000).is_err());
    }
    #[test]
    fn devices_reach_shared_pages_only_at_both_addresses() {
        let memory = Arc::new(SharedMemory::new(200 * PAGE, true).unwrap());
        let view = GuestView::new(memory.clone(), 1 << 32);
        let at = |page: u64, offset: u64| GuestAddress(RAM_BASE + page * PAGE + offset);
        let access = Permissions::ReadWrite;
        assert!(!view.check_range(at(63, 0), 1, access));
        memory.set_shared(63 * PAGE, 3 * PAGE, true);
        view.write_slice(b"shared", at(63, PAGE - 3)).unwrap();
        let mut back = [0; 6];
        view.read_slice(&mut back, GuestAddress(at(63, PAGE - 3).0 | 1 << 32)).unwrap();
        assert_eq!(&back, b"shared");
        assert!(view.check_range(at(63, 0), 3 * 4096, access));
        assert!(!view.check_range(at(63, 1), 3 * 4096, access));
        assert!(!view.check_range(at(62, PAGE - 1), 2, access));
        memory.set_shared(64 * PAGE, PAGE, false);
        assert!(!view.check_range(at(63, PAGE - 1), 2, access));
        for (address, count) in
            [(0, 1), (RAM_BASE - 1, 2), (u64::MAX, 1), (u64::MAX, usize::MAX), (RAM_BASE, usize::MAX)]
        {
            assert!(!view.check_range(GuestAddress(address), count, access), "{address:#x} {count:#x}");
            assert!(view.read_slice(&mut [0], GuestAddress(address)).is_err());
        }
    }
}
