//! A console with several ports: port 0 is the guest's terminal `hvc0`, the others are streams with names, which Linux
//! shows as `/dev/vport*p*`.
//!
//! The queues of later ports are served after those of earlier ones. What a program wrote to an earlier port before
//! something was written to a later one has therefore arrived before it.

use std::collections::VecDeque;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsRawFd, OwnedFd};

use virtio_queue::DescriptorChain;

use super::{Active, Device, Served, reader, writer};
use crate::bus::Sink;
use crate::mailbox::Receiver;

const F_MULTIPORT: u64 = 1 << 1;

const CONTROL_RECEIVE: usize = 2;
const CONTROL_TRANSMIT: usize = 3;

// Control messages.
const DEVICE_READY: u16 = 0;
const PORT_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const CONSOLE_PORT: u16 = 4;
const RESIZE: u16 = 5;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

/// The guest fills its receive queues with a page for each place.
const RECEIVE_QUEUE: u16 = 4;
const TRANSMIT_QUEUE: u16 = 16;
const CONTROL_QUEUE: u16 = 32;
/// The most bytes that are copied at a time.
const PIECE: usize = 64 << 10;
/// Messages to a guest that does not take them are dropped beyond this.
const CONTROL_LIMIT: usize = 256;
/// Answers to a guest that does not read them are dropped beyond this.
const ANSWER_LIMIT: usize = 1 << 20;

/// The terminal's rows and columns.
pub type Size = (u16, u16);

/// One port.
pub struct Port {
    /// Its name; the terminal needs none.
    pub name: &'static str,
    /// Takes what the guest writes.
    pub sink: Sink,
    /// A file whose bytes the guest reads, and whose end it sees.
    pub source: Option<OwnedFd>,
}

impl std::fmt::Debug for Port {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Port").field("name", &self.name).finish_non_exhaustive()
    }
}

struct Wired {
    port: Port,
    /// Bytes for the guest.
    pending: VecDeque<u8>,
    /// A program in the guest has the port open.
    open: bool,
    /// The source has ended, and the guest has to be told.
    ended: bool,
}

/// The device.
pub struct Console {
    ports: Vec<Wired>,
    sizes: Receiver<Size>,
    size: Option<Size>,
    /// Control messages for the guest.
    messages: VecDeque<Vec<u8>>,
}

impl std::fmt::Debug for Console {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Console").finish_non_exhaustive()
    }
}

impl Console {
    /// A console with these ports, the first of which is the terminal. Its size is `size`, and later what comes from `sizes`.
    #[must_use]
    pub fn new(ports: Vec<Port>, sizes: Receiver<Size>, size: Option<Size>) -> Self {
        let ports = ports
            .into_iter()
            .map(|port| Wired { port, pending: VecDeque::new(), open: false, ended: false })
            .collect();
        Self { ports, sizes, size, messages: VecDeque::new() }
    }

    fn send(&mut self, port: usize, event: u16, value: u16, more: &[u8]) {
        if self.messages.len() >= CONTROL_LIMIT {
            return;
        }
        let mut message = u32::try_from(port).unwrap_or(0).to_le_bytes().to_vec();
        message.extend(event.to_le_bytes());
        message.extend(value.to_le_bytes());
        message.extend(more);
        self.messages.push_back(message);
    }

    fn send_size(&mut self) {
        if let Some((rows, columns)) = self.size {
            let mut body = columns.to_le_bytes().to_vec();
            body.extend(rows.to_le_bytes());
            self.send(0, RESIZE, 0, &body);
        }
    }

    /// The guest's control message.
    fn hear(&mut self, message: [u8; 8]) {
        let [a, b, c, d, e0, e1, v0, v1] = message;
        let port = usize::try_from(u32::from_le_bytes([a, b, c, d])).unwrap_or(usize::MAX);
        let value = u16::from_le_bytes([v0, v1]);
        match u16::from_le_bytes([e0, e1]) {
            DEVICE_READY if value == 1 => {
                (0..self.ports.len()).for_each(|port| self.send(port, PORT_ADD, 0, &[]))
            }
            PORT_READY if value == 1 && port < self.ports.len() => {
                if port == 0 {
                    self.send(port, CONSOLE_PORT, 1, &[]);
                    self.send_size();
                } else {
                    self.send(port, PORT_NAME, 1, self.ports[port].port.name.as_bytes());
                }
                self.send(port, PORT_OPEN, 1, &[]);
            }
            PORT_OPEN => {
                if let Some(wired) = self.ports.get_mut(port) {
                    wired.open = value == 1;
                }
            }
            _ => {}
        }
    }

    fn deliver_messages(&mut self, active: &mut Active) -> Served {
        let mut delivered = false;
        while !self.messages.is_empty() {
            let Some(chain) = active.next_or_rearm(CONTROL_RECEIVE)? else { break };
            let Some(message) = self.messages.pop_front() else { break };
            let memory = active.memory.clone();
            let mut buffer = writer(&memory, &chain)?;
            buffer.write_all(&message)?;
            active.used(CONTROL_RECEIVE, chain.head_index(), message.len())?;
            delivered = true;
        }
        if delivered { active.notify(CONTROL_RECEIVE) } else { Ok(()) }
    }

    fn deliver(&mut self, port: usize, active: &mut Active) -> Served {
        let queue = queues_of(port).0;
        let wired = &mut self.ports[port];
        let mut delivered = false;
        while wired.open && !wired.pending.is_empty() {
            let Some(chain) = active.next_or_rearm(queue)? else { break };
            let memory = active.memory.clone();
            let mut buffer = writer(&memory, &chain)?;
            let len = buffer.available_bytes().min(wired.pending.len()).min(PIECE);
            if len == 0 {
                return Err("a receive buffer has no room".into());
            }
            let bytes: Vec<u8> = wired.pending.drain(..len).collect();
            buffer.write_all(&bytes)?;
            active.used(queue, chain.head_index(), len)?;
            delivered = true;
        }
        if wired.ended && wired.pending.is_empty() {
            wired.ended = false;
            self.send(port, PORT_OPEN, 0, &[]);
            self.deliver_messages(active)?;
        }
        if delivered { active.notify(queue) } else { Ok(()) }
    }

    fn transmit(&mut self, port: usize, active: &mut Active) -> Served {
        let wired = &mut self.ports[port];
        let (sink, pending) = (&mut wired.port.sink, &mut wired.pending);
        active.serve(queues_of(port).1, &mut |memory, chain| {
            let mut buffer = reader(memory, &chain)?;
            loop {
                let mut bytes = vec![0; buffer.available_bytes().min(PIECE)];
                if bytes.is_empty() {
                    return Ok(0);
                }
                buffer.read_exact(&mut bytes)?;
                let answer = sink(&bytes);
                if pending.len() + answer.len() <= ANSWER_LIMIT {
                    pending.extend(answer);
                }
            }
        })?;
        self.deliver(port, active)
    }

    fn listen(&mut self, active: &mut Active) -> Served {
        let mut heard = Vec::new();
        active.serve(CONTROL_TRANSMIT, &mut |memory, chain: DescriptorChain<_>| {
            let mut message = [0; 8];
            reader(memory, &chain)?.read_exact(&mut message)?;
            // A guest that talks without end is heard as far as it listens.
            if heard.len() < CONTROL_LIMIT {
                heard.push(message);
            }
            Ok(0)
        })?;
        for message in heard {
            self.hear(message);
        }
        self.deliver_messages(active)?;
        (0..self.ports.len()).try_for_each(|port| self.deliver(port, active))
    }
}

/// A port's receive and transmit queues. The control queues lie between those of port 0 and port 1.
fn queues_of(port: usize) -> (usize, usize) {
    let first = if port == 0 { 0 } else { 2 + 2 * port };
    (first, first + 1)
}

impl Device for Console {
    fn id(&self) -> u16 {
        3
    }

    fn name(&self) -> String {
        "virtio-console".into()
    }

    fn features(&self) -> u64 {
        F_MULTIPORT
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let mut sizes = vec![RECEIVE_QUEUE, TRANSMIT_QUEUE, CONTROL_QUEUE, CONTROL_QUEUE];
        for _ in 1..self.ports.len() {
            sizes.extend([RECEIVE_QUEUE, TRANSMIT_QUEUE]);
        }
        sizes
    }

    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; 4];
        config.extend(u32::try_from(self.ports.len()).unwrap_or(0).to_le_bytes());
        config.extend([0; 4]);
        config
    }

    fn activate(&mut self, active: &mut Active) -> Served {
        if active.features & F_MULTIPORT == 0 {
            // Without messages the terminal is always open, and the only port.
            self.ports[0].open = true;
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.messages.clear();
        self.ports.iter_mut().for_each(|wired| wired.open = false);
    }

    fn queue(&mut self, index: usize, active: &mut Active) -> Served {
        match index {
            CONTROL_RECEIVE => self.deliver_messages(active),
            CONTROL_TRANSMIT => self.listen(active),
            _ => {
                let port = if index < 2 { 0 } else { index / 2 - 1 };
                match port < self.ports.len() {
                    true if index % 2 == 0 => self.deliver(port, active),
                    true => self.transmit(port, active),
                    false => Ok(()),
                }
            }
        }
    }

    fn wait_for(&self, _: &Active) -> Vec<libc::pollfd> {
        let mut fds = vec![libc::pollfd { fd: self.sizes.fd(), events: libc::POLLIN, revents: 0 }];
        for wired in &self.ports {
            // A source is read only while the guest has taken everything that was read before.
            let fd = match &wired.port.source {
                Some(source) if wired.open && wired.pending.is_empty() => source.as_raw_fd(),
                _ => -1,
            };
            fds.push(libc::pollfd { fd, events: libc::POLLIN, revents: 0 });
        }
        fds
    }

    fn ready(&mut self, index: usize, active: &mut Active) -> Served {
        let Some(port) = index.checked_sub(1) else {
            if let Some(size) = self.sizes.drain().pop() {
                self.size = Some(size);
                self.send_size();
            }
            return self.deliver_messages(active);
        };
        let Some(wired) = self.ports.get_mut(port) else { return Ok(()) };
        if let Some(source) = &wired.port.source {
            let mut bytes = [0; 4096];
            // SAFETY: the buffer is as long as the call is told.
            let got = unsafe { libc::read(source.as_raw_fd(), bytes.as_mut_ptr().cast(), bytes.len()) };
            match usize::try_from(got) {
                Ok(got @ 1..) => wired.pending.extend(&bytes[..got]),
                _ => {
                    wired.port.source = None;
                    wired.ended = true;
                }
            }
        }
        self.deliver(port, active)
    }
}
