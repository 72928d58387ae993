//! The guest's terminal, for any number of people who look at it.

use std::collections::VecDeque;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};

use anyhow::Result;
use vmm::mailbox::Sender;
use vmm::virtio::console::Input;

/// What somebody who comes is shown of what was there before.
const BACKLOG: usize = 16 << 10;
/// Pieces of output that somebody may be behind before he is left behind.
const QUEUE: usize = 64;

/// Output for everybody, input from everybody.
pub(crate) struct Hub {
    keyboard: Sender<Input>,
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
    /// A hub whose input goes to `keyboard`.
    pub(crate) fn new(keyboard: Sender<Input>) -> Self {
        Self { keyboard, state: Mutex::default(), printed: AtomicU64::new(0), typed: AtomicU64::new(0) }
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
        self.keyboard.send(Input::Size(rows, columns));
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
            self.typed.fetch_add(u64::try_from(count).unwrap_or(0), Ordering::Relaxed);
            self.keyboard.send(Input::Bytes(0, buffer[..count].to_vec()));
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

    #[test]
    fn everybody_sees_what_was_and_what_comes_and_may_type() {
        let (keyboard, typed) = vmm::mailbox::mailbox().unwrap();
        let hub = std::sync::Arc::new(Hub::new(keyboard));
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
        let inputs = typed.drain();
        assert!(matches!(&inputs[..], [Input::Bytes(0, bytes)] if bytes == b"root\r"));
    }

    #[test]
    fn somebody_who_does_not_look_is_left_behind() {
        let (keyboard, _typed) = vmm::mailbox::mailbox().unwrap();
        let hub = std::sync::Arc::new(Hub::new(keyboard));
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
}
