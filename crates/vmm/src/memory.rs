//! The guest's shared memory: the only part of its RAM that this process has a mapping of.
//!
//! The bytes are never lent out as a slice: once the guest runs, it writes them at any time. They are copied in
//! and out through raw pointers.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::{Error, Result};

/// A range of RAM, mapped here and visible to the guest through its shared addresses.
#[derive(Debug)]
pub struct SharedMemory {
    file: OwnedFd,
    start: *mut u8,
    size: usize,
}

// SAFETY: the mapping belongs to this value alone, lives as long as it, and is accessed only through raw pointers
// by methods that check the range.
unsafe impl Send for SharedMemory {}
// SAFETY: as above; concurrent copies race like the guest's own accesses do, and no reference is formed.
unsafe impl Sync for SharedMemory {}

impl SharedMemory {
    /// Maps `size` bytes of zeroes that take no memory yet.
    pub fn new(size: u64) -> Result<Self> {
        let size = usize::try_from(size).map_err(|_| Error::vmm("so much memory cannot be mapped"))?;
        let failed = |what| Error::os(what, &std::io::Error::last_os_error());
        // SAFETY: the name is a terminated string; the descriptor that comes back is checked and owned from here on.
        let file = unsafe {
            let fd = libc::memfd_create(c"guest-shared".as_ptr(), libc::MFD_CLOEXEC);
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
        Ok(Self { file, start: start.cast(), size })
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

    #[test]
    fn what_is_outside_is_refused_and_what_was_discarded_is_zero() {
        let memory = SharedMemory::new(0x4000).unwrap();
        memory.write(0x1000, &[7; 0x1000]).unwrap();
        memory.discard(0x1000, 0x1000).unwrap();
        // SAFETY: inside the mapping.
        assert_eq!(unsafe { memory.start.add(0x1000).read_volatile() }, 0);
        assert!(memory.write(0x3fff, &[0; 2]).is_err());
        assert!(memory.write(u64::MAX, &[0; 2]).is_err());
        assert!(memory.discard(0x3000, 0x2000).is_err());
    }
}
