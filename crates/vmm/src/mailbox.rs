//! A queue between threads whose reader can wait for it together with other files.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::{Arc, mpsc};

use crate::{Error, Result};

/// The sending side.
#[derive(Debug)]
pub struct Sender<T> {
    queue: mpsc::Sender<T>,
    event: Arc<OwnedFd>,
}

/// The receiving side.
#[derive(Debug)]
pub struct Receiver<T> {
    queue: mpsc::Receiver<T>,
    event: Arc<OwnedFd>,
}

/// Makes a queue.
pub fn mailbox<T>() -> Result<(Sender<T>, Receiver<T>)> {
    // SAFETY: a system call without pointers; the new descriptor is checked and owned.
    let event = unsafe {
        let fd = libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK);
        if fd < 0 {
            return Err(Error::os("eventfd", &std::io::Error::last_os_error()));
        }
        Arc::new(OwnedFd::from_raw_fd(fd))
    };
    let (sender, receiver) = mpsc::channel();
    Ok((Sender { queue: sender, event: event.clone() }, Receiver { queue: receiver, event }))
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        Self { queue: self.queue.clone(), event: self.event.clone() }
    }
}

impl<T> Sender<T> {
    /// Puts a message into the queue. Nobody minds if the reader is gone.
    pub fn send(&self, message: T) {
        if self.queue.send(message).is_ok() {
            self.wake();
        }
    }

    /// Wakes the reader without a message.
    pub fn wake(&self) {
        let one = 1u64.to_ne_bytes();
        // SAFETY: eight readable bytes. The counter cannot overflow, and a wake-up that is already pending serves.
        unsafe { libc::write(self.event.as_raw_fd(), one.as_ptr().cast(), one.len()) };
    }
}

impl<T> Receiver<T> {
    /// Readable when there may be messages.
    #[must_use]
    pub fn fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }

    /// All messages that have arrived.
    pub fn drain(&self) -> Vec<T> {
        let mut count = [0u8; 8];
        // SAFETY: eight writable bytes; reading nothing is fine. Reset before draining, so that no message is missed.
        unsafe { libc::read(self.event.as_raw_fd(), count.as_mut_ptr().cast(), count.len()) };
        self.queue.try_iter().collect()
    }
}
