//! What a user types who is attached to something: bytes, the keys that detach, and changes of the terminal's size.

use std::io::{Read, Write};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

use anyhow::{Result, ensure};

use crate::lab::terminal::RawMode;

const CTRL_A: u8 = 1;

/// Called with rows and columns.
type OnSize = Box<dyn Fn(u16, u16) + Send>;

/// Standard input as it is typed.
pub(crate) struct Keys {
    resized: OwnedFd,
    on_size: OnSize,
    /// Whether Ctrl-A means something.
    escapes: bool,
    armed: bool,
    detached: bool,
}

impl Keys {
    /// To be made before other threads are, so that no other one gets the signal.
    pub(crate) fn new(raw: &Option<RawMode>, on_size: impl Fn(u16, u16) + Send + 'static) -> Result<Self> {
        // SAFETY: a zeroed set is valid storage for `sigemptyset`; the other calls get that set.
        let fd = unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut set);
            libc::sigaddset(&raw mut set, libc::SIGWINCH);
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
            libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC)
        };
        ensure!(fd >= 0, "signalfd: {}", std::io::Error::last_os_error());
        // SAFETY: the descriptor has just been made, and only we know it.
        let resized = unsafe { OwnedFd::from_raw_fd(fd) };
        let escapes = raw.is_some();
        Ok(Self { resized, on_size: Box::new(on_size), escapes, armed: false, detached: false })
    }

    /// All keys go to the other side.
    pub(crate) fn without_detaching(mut self) -> Self {
        self.escapes = false;
        self
    }

    /// Whether the user asked to detach.
    pub(crate) fn detached(&self) -> bool {
        self.detached
    }

    /// Writes what is typed, to its end.
    pub(crate) fn copy(&mut self, to: &mut impl Write) -> std::io::Result<()> {
        std::io::copy(self, to).map(|_| ())
    }

    /// Ctrl-A D, and Ctrl-A X as well, detaches; Ctrl-A twice is one.
    fn filter(&mut self, typed: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(typed.len());
        for byte in typed {
            match (std::mem::take(&mut self.armed), *byte) {
                (false, CTRL_A) => self.armed = true,
                (true, b'd' | b'D' | b'x' | b'X') => {
                    self.detached = true;
                    break;
                }
                (true, CTRL_A) => bytes.push(CTRL_A),
                (true, other) => bytes.extend([CTRL_A, other]),
                (false, other) => bytes.push(other),
            }
        }
        bytes
    }
}

impl Read for Keys {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        loop {
            if self.detached() {
                return Ok(0);
            }
            let mut fds =
                [0, self.resized.as_raw_fd()].map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 });
            // SAFETY: an array of two.
            if unsafe { libc::poll(fds.as_mut_ptr(), 2, -1) } < 0 {
                continue;
            }
            if fds[1].revents != 0 {
                let mut signal = [0u8; size_of::<libc::signalfd_siginfo>()];
                // SAFETY: the buffer is as long as the call is told.
                unsafe { libc::read(self.resized.as_raw_fd(), signal.as_mut_ptr().cast(), signal.len()) };
                if let Some((rows, columns)) = vmm::terminal::size(0) {
                    (self.on_size)(rows, columns);
                }
            }
            if fds[0].revents == 0 {
                continue;
            }
            // A Ctrl-A that was held back may make it one byte longer than what is read now.
            // SAFETY: the buffer is longer than the call is told.
            let got = unsafe { libc::read(0, buffer.as_mut_ptr().cast(), buffer.len().saturating_sub(1)) };
            let Ok(got) = usize::try_from(got) else { return Err(std::io::Error::last_os_error()) };
            if got == 0 || !self.escapes {
                return Ok(got);
            }
            let typed = buffer[..got].to_vec();
            let bytes = self.filter(&typed);
            let count = bytes.len().min(buffer.len());
            buffer[..count].copy_from_slice(&bytes[..count]);
            if count > 0 {
                return Ok(count);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ctrl_a_d_detaches_and_everything_else_is_passed_on() {
        let mut keys = Keys::new(&None, |_, _| {}).unwrap();
        assert_eq!(keys.filter(b"a\x01\x01b\x01c"), b"a\x01b\x01c");
        assert_eq!(keys.filter(b"x\x01"), b"x");
        assert!(!keys.detached());
        assert_eq!(keys.filter(b"drest"), b"");
        assert!(keys.detached());
    }
}
