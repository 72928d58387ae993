//! A folder on another machine: requests and answers as frames on a stream.
//!
//! | direction | frame |
//! |---|---|
//! | to the folder | length, room for the answer (both 32 bits, the lowest byte first), the request |
//! | back | length, the answer; nothing where the protocol wants none |
//!
//! A request of length 0 is a reset.

use std::io::{Read, Write};

use super::{MAX_MESSAGE, Serve, wire};
use crate::seccomp::Call;

/// This side of the stream: answers what the other side answers.
#[derive(Debug)]
pub struct Remote<S> {
    /// Gone after the first failure: what comes then may be part of anything.
    stream: Option<S>,
}

impl<S: Read + Write + Send> Remote<S> {
    /// Asks over `stream`.
    pub fn new(stream: S) -> Self {
        Self { stream: Some(stream) }
    }

    fn ask(&mut self, request: &[u8], room: usize) -> std::io::Result<Vec<u8>> {
        let stream = self.stream.as_mut().ok_or(std::io::ErrorKind::BrokenPipe)?;
        let room = room.min(MAX_MESSAGE);
        let mut frame = word(request.len())?.to_vec();
        frame.extend(word(room)?);
        frame.extend(request);
        stream.write_all(&frame)?;
        if gets_no_frame(request) { Ok(Vec::new()) } else { read(stream, room) }
    }
}

impl<S: Read + Write + Send> Serve for Remote<S> {
    fn serve(&mut self, request: &[u8], room: usize) -> Vec<u8> {
        self.ask(request, room).unwrap_or_else(|_| {
            self.stream = None;
            if room < 16 { Vec::new() } else { wire::gone(request) }
        })
    }

    fn system_calls(&self) -> &'static [Call] {
        &[]
    }

    fn reset(&mut self) {
        if self.ask(&[], 0).is_err() {
            self.stream = None;
        }
    }
}

/// The other side of the stream: answers from `server` until the stream ends.
pub fn serve(mut stream: impl Read + Write, server: &mut dyn Serve) -> std::io::Result<()> {
    loop {
        let mut head = [0; 4];
        if stream.read(&mut head[..1])? == 0 {
            return Ok(());
        }
        stream.read_exact(&mut head[1..])?;
        let mut room = [0; 4];
        stream.read_exact(&mut room)?;
        let room = usize::try_from(u32::from_le_bytes(room)).unwrap_or(usize::MAX).min(MAX_MESSAGE);
        let request = read_body(&mut stream, head, MAX_MESSAGE)?;
        if request.is_empty() {
            server.reset();
            continue;
        }
        let answer = server.serve(&request, room);
        if !gets_no_frame(&request) {
            let frame = [&word(answer.len())?[..], &answer].concat();
            stream.write_all(&frame)?;
        }
    }
}

/// Both sides decide this from the request alone.
fn gets_no_frame(request: &[u8]) -> bool {
    wire::Request::parse(request).is_none_or(|(header, _)| !wire::wants_answer(header.opcode))
}

fn word(len: usize) -> std::io::Result<[u8; 4]> {
    let len = u32::try_from(len).map_err(|_| std::io::ErrorKind::InvalidInput)?;
    Ok(len.to_le_bytes())
}

fn read(stream: &mut impl Read, limit: usize) -> std::io::Result<Vec<u8>> {
    let mut head = [0; 4];
    stream.read_exact(&mut head)?;
    read_body(stream, head, limit)
}

fn read_body(stream: &mut impl Read, head: [u8; 4], limit: usize) -> std::io::Result<Vec<u8>> {
    let len = usize::try_from(u32::from_le_bytes(head)).unwrap_or(usize::MAX);
    if len > limit {
        return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, "a frame is too long"));
    }
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}
