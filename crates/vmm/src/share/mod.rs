//! A folder of the host for the guest: FUSE requests as bytes in, answers as bytes out.
//!
//! | module | question it answers |
//! |---|---|
//! | [`server`] | what does a request ask, and what is answered? |
//! | [`folder`] | how is a file reached, and why can nothing outside the folder be? |
//! | [`wire`] | how do requests and answers lie in their bytes? |
//! | [`remote`] | how does a folder serve that lies on another machine? |
//!
//! The device ([`crate::virtio::fs`]) moves the bytes and knows nothing of files; this here knows nothing of queues.

pub mod folder;
pub mod remote;
pub mod server;
mod wire;

#[cfg(test)]
mod tests;

use crate::seccomp::Call;

/// The most bytes of a file in one request or answer.
pub const MAX_DATA: usize = 256 << 10;
/// The longest request or answer: data, and what stands before it.
pub const MAX_MESSAGE: usize = MAX_DATA + 4096;

/// Something that answers FUSE requests.
pub trait Serve: Send {
    /// Answers one request with at most `room` bytes; with none where the protocol wants no answer.
    fn serve(&mut self, request: &[u8], room: usize) -> Vec<u8>;
    /// The system calls that it makes beside reading and writing.
    fn system_calls(&self) -> &'static [Call];
    /// The guest has let go of everything: its driver is gone, or is about to begin anew.
    fn reset(&mut self);
}
