//! The user's terminal: raw while a console is attached, restored however we end.

use std::io::IsTerminal as _;
use std::mem::MaybeUninit;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Result, bail};

/// The settings to go back to. Set once, before the first change, so that a signal handler may read it.
static ORIGINAL: OnceLock<libc::termios> = OnceLock::new();
static RAW: AtomicBool = AtomicBool::new(false);

/// Whether the terminal is in raw mode now.
pub(crate) fn is_raw() -> bool {
    RAW.load(Ordering::Relaxed)
}

/// Raw mode for as long as this value lives.
pub(crate) struct RawMode(());

impl RawMode {
    /// Puts the terminal on standard input into raw mode; `None` where standard input is no terminal.
    pub(crate) fn enter() -> Result<Option<Self>> {
        if !std::io::stdin().is_terminal() {
            return Ok(None);
        }
        let original = ORIGINAL.get_or_init(current);
        let mut raw = *original;
        // SAFETY: cfmakeraw only writes to the structure that it is given.
        unsafe { libc::cfmakeraw(&mut raw) };
        // SAFETY: plain calls of libc with a live structure; the handler only makes async-signal-safe calls.
        unsafe {
            for signal in [libc::SIGTERM, libc::SIGHUP, libc::SIGINT, libc::SIGQUIT] {
                libc::signal(signal, restore_and_die as extern "C" fn(libc::c_int) as libc::sighandler_t);
            }
            if libc::tcsetattr(0, libc::TCSANOW, &raw) != 0 {
                bail!("cannot put the terminal into raw mode: {}", std::io::Error::last_os_error());
            }
        }
        RAW.store(true, Ordering::Relaxed);
        Ok(Some(Self(())))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

/// Goes back to the terminal's settings; harmless when they were never changed.
pub(crate) fn restore() {
    if RAW.swap(false, Ordering::Relaxed) {
        if let Some(original) = ORIGINAL.get() {
            // SAFETY: tcsetattr is async-signal-safe, and the structure is never written again.
            unsafe { libc::tcsetattr(0, libc::TCSANOW, original) };
        }
    }
}

extern "C" fn restore_and_die(signal: libc::c_int) {
    restore();
    // SAFETY: both calls are async-signal-safe.
    unsafe {
        libc::signal(signal, libc::SIG_DFL);
        libc::raise(signal);
    }
}

fn current() -> libc::termios {
    let mut settings = MaybeUninit::<libc::termios>::zeroed();
    // SAFETY: tcgetattr fills the structure or leaves it; all-zero is a valid termios.
    unsafe {
        libc::tcgetattr(0, settings.as_mut_ptr());
        settings.assume_init()
    }
}

/// Rows and columns of the terminal on standard error.
pub(crate) fn size() -> Option<(u16, u16)> {
    // SAFETY: all-zero is a valid winsize, and the ioctl writes only to it.
    let size = unsafe {
        let mut size: libc::winsize = std::mem::zeroed();
        if libc::ioctl(2, libc::TIOCGWINSZ, &mut size) != 0 {
            return None;
        }
        size
    };
    (size.ws_row > 0 && size.ws_col > 0).then_some((size.ws_row, size.ws_col))
}

/// Finds the escape in what the user types. `Ctrl-A X` ends a run as it does with QEMU's own console, and
/// `Ctrl-A Ctrl-A` sends one Ctrl-A; on the lab's host shell, where Ctrl-A X belongs to the Realm inside,
/// `Ctrl-]` ends the machine.
pub(crate) struct Escape {
    kind: EscapeKind,
    pending: bool,
}

/// Which keys are the escape.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum EscapeKind {
    /// Ctrl-A X
    CtrlA,
    /// Ctrl-]
    CtrlBracket,
}

impl Escape {
    /// Waits for the given keys.
    pub(crate) fn new(kind: EscapeKind) -> Self {
        Self { kind, pending: false }
    }

    /// What to pass on of `typed`, and whether the user asked to end.
    pub(crate) fn filter(&mut self, typed: &[u8]) -> (Vec<u8>, bool) {
        const CTRL_A: u8 = 0x01;
        const CTRL_BRACKET: u8 = 0x1d;
        let mut passed = Vec::with_capacity(typed.len());
        for &byte in typed {
            match self.kind {
                EscapeKind::CtrlBracket if byte == CTRL_BRACKET => return (passed, true),
                EscapeKind::CtrlBracket => passed.push(byte),
                EscapeKind::CtrlA if self.pending => {
                    self.pending = false;
                    match byte {
                        b'x' | b'X' => return (passed, true),
                        CTRL_A => passed.push(CTRL_A),
                        other => passed.extend([CTRL_A, other]),
                    }
                }
                EscapeKind::CtrlA if byte == CTRL_A => self.pending = true,
                EscapeKind::CtrlA => passed.push(byte),
            }
        }
        (passed, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ctrl_a_x_ends_also_across_two_reads() {
        let mut escape = Escape::new(EscapeKind::CtrlA);
        assert_eq!(escape.filter(b"ls\x01"), (b"ls".to_vec(), false));
        assert_eq!(escape.filter(b"xrest"), (vec![], true));
    }

    #[test]
    fn other_keys_after_ctrl_a_are_passed_on() {
        let mut escape = Escape::new(EscapeKind::CtrlA);
        assert_eq!(escape.filter(b"\x01b\x01\x01c"), (b"\x01b\x01c".to_vec(), false));
        let mut escape = Escape::new(EscapeKind::CtrlBracket);
        assert_eq!(escape.filter(b"\x01x\x1d"), (b"\x01x".to_vec(), true));
    }
}
