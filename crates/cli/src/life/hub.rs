//! The guest's terminal, for any number of people who look at it.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::fd::{AsRawFd as _, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};

use anyhow::Result;
use vmm::mailbox::Sender;
use vmm::virtio::console::Size;

/// What somebody who comes is shown of what was there before.
const BACKLOG: usize = 16 << 10;
/// Pieces of output that somebody may be behind before he is left behind.
const QUEUE: usize = 64;

/// Output for everybody, input from everybody.
pub(crate) struct Hub {
    /// Holds what was typed and is not read yet, which is why it can be full.
    keyboard: UnixStream,
    sizes: Sender<Size>,
    state: Mutex<State>,
    /// Bytes that the guest has printed, and that were typed by those who came.
    pub(crate) printed: AtomicU64,
    /// The latter.
    pub(crate) typed: AtomicU64,
}

#[derive(Default)]
struct State {
    backlog: VecDeque<u8>,
    viewers: Vec<(u64, SyncSender<Vec<u8>>)>,
    next: u64,
}

impl Hub {
    /// A hub whose input goes to `keyboard`, and the terminal's sizes to `sizes`.
    pub(crate) fn new(keyboard: UnixStream, sizes: Sender<Size>) -> Result<Self> {
        keyboard.set_nonblocking(true)?;
        let (printed, typed) = Default::default();
        Ok(Self { keyboard, sizes, state: Mutex::default(), printed, typed })
    }

    /// The guest printed something. Nobody's slowness holds it up.
    pub(crate) fn output(&self, bytes: &[u8]) {
        self.printed.fetch_add(u64::try_from(bytes.len()).unwrap_or(0), Ordering::Relaxed);
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.backlog.extend(bytes);
        let surplus = state.backlog.len().saturating_sub(BACKLOG);
        state.backlog.drain(..surplus);
        state.viewers.retain(|(_, viewer)| viewer.try_send(bytes.to_vec()).is_ok());
    }

    /// The terminal has another size.
    pub(crate) fn resize(&self, rows: u16, columns: u16) {
        self.sizes.send((rows, columns));
    }

    /// Somebody typed something: gives how much of it the keyboard took, which is nothing while the guest does not read.
    pub(crate) fn type_in(&self, bytes: &[u8]) -> usize {
        match (&self.keyboard).write(bytes) {
            Ok(count) => count,
            Err(error) if [ErrorKind::WouldBlock, ErrorKind::Interrupted].contains(&error.kind()) => 0,
            // There is no console any more.
            Err(_) => bytes.len(),
        }
    }

    /// Ready for writing when the keyboard takes something.
    pub(crate) fn keyboard(&self) -> RawFd {
        self.keyboard.as_raw_fd()
    }

    /// The same with patience, until the stream that it came from ends.
    fn type_all(&self, mut bytes: &[u8], from: &UnixStream) -> bool {
        loop {
            let count = self.type_in(bytes);
            self.typed.fetch_add(u64::try_from(count).unwrap_or(0), Ordering::Relaxed);
            bytes = &bytes[count..];
            if bytes.is_empty() {
                return true;
            }
            let mut fds = [(self.keyboard(), libc::POLLOUT), (from.as_raw_fd(), 0)]
                .map(|(fd, events)| libc::pollfd { fd, events, revents: 0 });
            // SAFETY: an array of two.
            unsafe { libc::poll(fds.as_mut_ptr(), 2, -1) };
            if fds[1].revents != 0 {
                return false;
            }
        }
    }

    /// Connects a stream with the terminal until it ends.
    pub(crate) fn attach(&self, mut stream: UnixStream) -> Result<()> {
        let (sender, receiver) = sync_channel::<Vec<u8>>(QUEUE);
        let mut output = stream.try_clone()?;
        let number = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            let backlog: Vec<u8> = state.backlog.iter().copied().collect();
            // The queue is empty: this has room.
            let _ = sender.try_send(backlog);
            state.next += 1;
            let number = state.next;
            state.viewers.push((number, sender));
            number
        };
        let writer = std::thread::spawn(move || {
            for bytes in receiver {
                if output.write_all(&bytes).is_err() {
                    break;
                }
            }
            // Whoever was left behind sees the end.
            let _ = output.shutdown(std::net::Shutdown::Both);
        });
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = stream.read(&mut buffer) {
            if !self.type_all(&buffer[..count], &stream) {
                break;
            }
        }
        let _ = stream.shutdown(std::net::Shutdown::Both);
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.viewers.retain(|(viewer, _)| *viewer != number);
        drop(state);
        let _ = writer.join();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hub() -> (std::sync::Arc<Hub>, UnixStream) {
        let (keyboard, typed) = UnixStream::pair().unwrap();
        let (sizes, _) = vmm::mailbox::mailbox().unwrap();
        (std::sync::Arc::new(Hub::new(keyboard, sizes).unwrap()), typed)
    }

    #[test]
    fn everybody_sees_what_was_and_what_comes_and_may_type() {
        let (hub, mut typed) = hub();
        hub.output(&vec![b'.'; BACKLOG]);
        hub.output(b"login: ");
        let (near, mut far) = UnixStream::pair().unwrap();
        let other = hub.clone();
        let thread = std::thread::spawn(move || other.attach(near));
        let mut seen = vec![0; BACKLOG];
        far.read_exact(&mut seen).unwrap();
        assert!(seen.ends_with(b"..login: "));
        far.write_all(b"root\r").unwrap();
        hub.output(b"root\r\n");
        let mut seen = [0; 6];
        far.read_exact(&mut seen).unwrap();
        assert_eq!(&seen, b"root\r\n");
        drop(far);
        thread.join().unwrap().unwrap();
        let mut input = [0; 5];
        typed.read_exact(&mut input).unwrap();
        assert_eq!(&input, b"root\r");
    }

    #[test]
    fn somebody_who_does_not_look_is_left_behind() {
        let (hub, _typed) = hub();
        let (near, _far) = UnixStream::pair().unwrap();
        let other = hub.clone();
        std::thread::spawn(move || other.attach(near));
        while hub.state.lock().unwrap().viewers.is_empty() {
            std::thread::yield_now();
        }
        for _ in 0..10_000 {
            hub.output(&[b'x'; 4096]);
        }
        assert!(hub.state.lock().unwrap().viewers.is_empty());
    }

    #[test]
    fn typing_waits_for_a_guest_that_does_not_read_and_nothing_is_lost() {
        let (hub, mut typed) = hub();
        let attach = || {
            let (near, far) = UnixStream::pair().unwrap();
            let hub = hub.clone();
            (std::thread::spawn(move || hub.attach(near)), far)
        };
        let (thread, mut far) = attach();
        far.set_nonblocking(true).unwrap();
        // As much as anybody takes: neither memory nor the number of bytes grows beyond what two sockets hold.
        let (mut sent, mut idle) = (0_usize, 0);
        while idle < 50 {
            let piece: Vec<u8> = (sent..sent + 1000).map(|number| number.to_le_bytes()[0]).collect();
            match far.write(&piece) {
                Ok(count) => (sent, idle) = (sent + count, 0),
                Err(_) => idle += 1,
            }
            std::thread::sleep(std::time::Duration::from_millis(u64::from(idle > 0)));
            assert!(sent < 2 << 20, "nobody takes that much");
        }
        assert_eq!(hub.type_in(b"x"), 0);
        // Somebody whose keys wait can leave.
        let (leaver, mut other) = attach();
        other.write_all(b"y").unwrap();
        drop(other);
        leaver.join().unwrap().unwrap();
        // The guest reads at last.
        let mut got = vec![0; sent];
        typed.read_exact(&mut got).unwrap();
        assert!(got.iter().enumerate().all(|(number, byte)| *byte == number.to_le_bytes()[0]));
        drop(far);
        thread.join().unwrap().unwrap();
    }
}
