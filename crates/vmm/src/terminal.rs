//! The user's terminal while it is the guest's console.

use std::os::fd::RawFd;
use std::sync::{Mutex, Once, PoisonError};

use crate::{Error, Result};

/// What to restore, and where. One terminal at a time; a panic anywhere restores it too.
static SAVED: Mutex<Option<(RawFd, libc::termios)>> = Mutex::new(None);
static HOOK: Once = Once::new();

/// Raw mode, until it is dropped.
#[derive(Debug)]
pub struct RawTerminal(());

impl RawTerminal {
    /// Switches `fd` to raw mode; `None` if it is not a terminal.
    pub fn enter(fd: RawFd) -> Result<Option<Self>> {
        let failed = || Error::os("the terminal's raw mode", &std::io::Error::last_os_error());
        // SAFETY: `isatty` takes no pointer; a zeroed `termios` is valid and filled before it is used.
        let before = unsafe {
            if libc::isatty(fd) != 1 {
                return Ok(None);
            }
            let mut before: libc::termios = std::mem::zeroed();
            if libc::tcgetattr(fd, &raw mut before) != 0 {
                return Err(failed());
            }
            before
        };
        HOOK.call_once(|| {
            let previous = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |info| {
                restore();
                previous(info);
            }));
        });
        *SAVED.lock().unwrap_or_else(PoisonError::into_inner) = Some((fd, before));
        let mut raw = before;
        // SAFETY: both calls get a valid `termios`.
        let status = unsafe {
            libc::cfmakeraw(&raw mut raw);
            libc::tcsetattr(fd, libc::TCSANOW, &raw const raw)
        };
        if status != 0 {
            return Err(failed());
        }
        Ok(Some(Self(())))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

/// Gives the terminal back as it was. Harmless when it was never taken.
pub fn restore() {
    // `try_lock`: the panic hook may run while the lock is held, and must not hang.
    if let Some((fd, before)) = SAVED.try_lock().ok().and_then(|mut saved| saved.take()) {
        // SAFETY: the attributes are those that `tcgetattr` returned.
        unsafe { libc::tcsetattr(fd, libc::TCSANOW, &raw const before) };
    }
}

/// Rows and columns of a terminal; `None` if `fd` is none.
#[must_use]
pub fn size(fd: RawFd) -> Option<(u16, u16)> {
    // SAFETY: a zeroed `winsize` is valid, and the request fills exactly that structure.
    let (status, size) = unsafe {
        let mut size: libc::winsize = std::mem::zeroed();
        (libc::ioctl(fd, libc::TIOCGWINSZ, &raw mut size), size)
    };
    (status == 0 && size.ws_row > 0 && size.ws_col > 0).then_some((size.ws_row, size.ws_col))
}

/// What the user's keys mean.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Keys {
    /// Bytes for the guest.
    pub bytes: Vec<u8>,
    /// The user wants to leave.
    pub leave: bool,
}

/// Finds Ctrl-A X in what is typed. Ctrl-A twice is one Ctrl-A for the guest.
#[derive(Debug, Default)]
pub struct Escape {
    armed: bool,
}

impl Escape {
    const CTRL_A: u8 = 1;

    /// Takes typed bytes.
    pub fn filter(&mut self, typed: &[u8]) -> Keys {
        let mut bytes = Vec::with_capacity(typed.len());
        for byte in typed {
            match (self.armed, *byte) {
                (false, Self::CTRL_A) => self.armed = true,
                (true, b'x' | b'X') => return Keys { bytes, leave: true },
                (true, Self::CTRL_A) => {
                    bytes.push(Self::CTRL_A);
                    self.armed = false;
                }
                (true, other) => {
                    bytes.extend([Self::CTRL_A, other]);
                    self.armed = false;
                }
                (false, other) => bytes.push(other),
            }
        }
        Keys { bytes, leave: false }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ctrl_a_x_leaves_and_ctrl_a_twice_is_one() {
        let mut escape = Escape::default();
        assert_eq!(escape.filter(b"ls\r"), Keys { bytes: b"ls\r".to_vec(), leave: false });
        assert_eq!(escape.filter(b"\x01\x01\x01b"), Keys { bytes: b"\x01\x01b".to_vec(), leave: false });
        assert_eq!(escape.filter(b"a\x01"), Keys { bytes: b"a".to_vec(), leave: false });
        assert_eq!(escape.filter(b"xrest"), Keys { bytes: vec![], leave: true });
    }

    #[test]
    fn a_pipe_is_not_a_terminal() {
        let (reader, _writer) = std::io::pipe().unwrap();
        let fd = std::os::fd::AsRawFd::as_raw_fd(&reader);
        assert!(RawTerminal::enter(fd).unwrap().is_none());
        assert_eq!(size(fd), None);
    }
}
