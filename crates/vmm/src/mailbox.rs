//! A queue between threads whose reader can wait for it together with other files.

use std::os::fd::RawFd;
use std::sync::{Arc, mpsc};

use crate::Result;
use crate::eventfd::EventFd;

/// The sending side.
#[derive(Debug)]
pub struct Sender<T> {
    queue: mpsc::Sender<T>,
    event: Arc<EventFd>,
}

/// The receiving side.
#[derive(Debug)]
pub struct Receiver<T> {
    queue: mpsc::Receiver<T>,
    event: Arc<EventFd>,
}

/// Makes a queue.
pub fn mailbox<T>() -> Result<(Sender<T>, Receiver<T>)> {
    let event = Arc::new(EventFd::new()?);
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
            self.event.signal();
        }
    }
}

impl<T> Receiver<T> {
    /// Readable when there may be messages.
    #[must_use]
    pub fn fd(&self) -> RawFd {
        self.event.fd()
    }

    /// All messages that have arrived.
    pub fn drain(&self) -> Vec<T> {
        // Reset before draining, so that no message is missed.
        self.event.take();
        self.queue.try_iter().collect()
    }
}
