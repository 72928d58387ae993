//! Events between threads, and between this process and the kernel: eventfds.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use crate::{Error, Result};

/// Something that happens, however often, until somebody has noticed.
#[derive(Debug)]
pub struct EventFd(OwnedFd);

impl EventFd {
    /// An event that has not happened.
    pub fn new() -> Result<Self> {
        // SAFETY: a system call without pointers; the new descriptor is checked and owned.
        unsafe {
            let fd = libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK);
            if fd < 0 {
                return Err(Error::os("eventfd", &std::io::Error::last_os_error()));
            }
            Ok(Self(OwnedFd::from_raw_fd(fd)))
        }
    }

    /// Readable when it has happened.
    #[must_use]
    pub fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// It happens.
    pub fn signal(&self) {
        let one = 1u64.to_ne_bytes();
        // SAFETY: eight readable bytes. A full counter loses nothing: what it stands for is already pending.
        unsafe { libc::write(self.fd(), one.as_ptr().cast(), one.len()) };
    }

    /// How often it has happened since the last call.
    pub fn take(&self) -> u64 {
        let mut count = [0u8; 8];
        // SAFETY: eight writable bytes; reading nothing is fine.
        let got = unsafe { libc::read(self.fd(), count.as_mut_ptr().cast(), count.len()) };
        if got == 8 { u64::from_ne_bytes(count) } else { 0 }
    }
}
