//! Many connections over one serial port: how a socket of the developer's machine leads to the VMM's socket on the
//! emulated one.
//!
//! Frames of eight bytes and contents: a connection's number, a kind, a length. Each direction of a connection has a
//! window, so that nobody's slowness holds up the others: who reads the port never waits for a socket.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Bytes that one side may send before the other one's socket has taken them.
const WINDOW: usize = 64 << 10;
/// The most bytes in a frame.
const PIECE: usize = 8 << 10;
/// Connections at a time.
const MAX_CONNECTIONS: usize = 64;

const OPEN: u8 = 0;
const DATA: u8 = 1;
const CREDIT: u8 = 2;
const END: u8 = 3;
const RESET: u8 = 4;

/// For the thread that writes to a connection's socket.
enum Event {
    Data(Vec<u8>),
    End,
    Reset,
}

struct Connection {
    events: Sender<Event>,
    /// What may be sent; `None` when nothing may be any more.
    credit: Mutex<Option<usize>>,
    changed: Condvar,
    /// To end whatever waits for it.
    socket: Mutex<Option<UnixStream>>,
}

/// One end of the port.
pub(crate) struct Tunnel {
    port: Mutex<Box<dyn Write + Send>>,
    connections: Mutex<HashMap<u32, Arc<Connection>>>,
    next: AtomicU32,
}

/// How the other side's connections are answered.
pub(crate) type Accept = Box<dyn Fn() -> std::io::Result<UnixStream> + Send + Sync>;

impl Tunnel {
    /// Serves a port; `accept` connects for the other side, if that may open connections.
    pub(crate) fn start(
        mut input: impl Read + Send + 'static,
        output: impl Write + Send + 'static,
        accept: Option<Accept>,
    ) -> Arc<Self> {
        let tunnel = Arc::new(Self {
            port: Mutex::new(Box::new(output)),
            connections: Mutex::default(),
            next: AtomicU32::new(0),
        });
        let (serving, accept) = (tunnel.clone(), accept.map(Arc::new));
        std::thread::spawn(move || {
            while let Some((number, kind, contents)) = read_frame(&mut input) {
                serving.receive(number, kind, contents, accept.as_ref());
            }
            // The other machine is gone.
            for (_, connection) in lock(&serving.connections).drain() {
                connection.reset();
            }
        });
        tunnel
    }

    /// Carries a connection, from a thread of its own.
    pub(crate) fn open(self: &Arc<Self>, socket: UnixStream) {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        if let Some((connection, events)) = self.add(number) {
            let tunnel = self.clone();
            std::thread::spawn(move || {
                if tunnel.send(number, OPEN, &[]) {
                    tunnel.carry(number, &connection, events, socket);
                }
                lock(&tunnel.connections).remove(&number);
            });
        }
    }

    fn add(&self, number: u32) -> Option<(Arc<Connection>, Receiver<Event>)> {
        let mut connections = lock(&self.connections);
        if connections.len() >= MAX_CONNECTIONS || connections.contains_key(&number) {
            return None;
        }
        let (events, receiver) = channel();
        let connection = Arc::new(Connection {
            events,
            credit: Mutex::new(Some(WINDOW)),
            changed: Condvar::new(),
            socket: Mutex::default(),
        });
        connections.insert(number, connection.clone());
        Some((connection, receiver))
    }

    fn receive(self: &Arc<Self>, number: u32, kind: u8, contents: Vec<u8>, accept: Option<&Arc<Accept>>) {
        if let (OPEN, Some(accept)) = (kind, accept) {
            let added = self.add(number);
            let (tunnel, accept) = (self.clone(), accept.clone());
            std::thread::spawn(move || {
                let Some((connection, events)) = added else { return tunnel.reset(number) };
                match accept() {
                    Ok(socket) => tunnel.carry(number, &connection, events, socket),
                    Err(_) => tunnel.reset(number),
                }
                lock(&tunnel.connections).remove(&number);
            });
            return;
        }
        // What is on its way to a connection that has ended is nobody's.
        let Some(connection) = lock(&self.connections).get(&number).cloned() else { return };
        match (kind, &contents[..]) {
            (DATA, _) => drop(connection.events.send(Event::Data(contents))),
            (CREDIT, [a, b, c, d]) => {
                connection.add(usize::try_from(u32::from_le_bytes([*a, *b, *c, *d])).unwrap_or(0))
            }
            (END, _) => drop(connection.events.send(Event::End)),
            _ => connection.reset(),
        }
    }

    /// Moves bytes both ways until both have ended.
    fn carry(
        self: &Arc<Self>,
        number: u32,
        connection: &Arc<Connection>,
        events: Receiver<Event>,
        socket: UnixStream,
    ) {
        let (Ok(mut output), Ok(handle)) = (socket.try_clone(), socket.try_clone()) else {
            return self.reset(number);
        };
        *lock(&connection.socket) = Some(handle);
        let (tunnel, other) = (self.clone(), connection.clone());
        let writer = std::thread::spawn(move || {
            for event in events {
                match event {
                    Event::Data(bytes) if output.write_all(&bytes).is_ok() => {
                        let count = u32::try_from(bytes.len()).unwrap_or(0);
                        tunnel.send(number, CREDIT, &count.to_le_bytes());
                    }
                    Event::Data(_) => {
                        tunnel.send(number, RESET, &[]);
                        other.reset();
                        break;
                    }
                    Event::End => {
                        let _ = output.shutdown(Shutdown::Write);
                        return;
                    }
                    Event::Reset => break,
                }
            }
            let _ = output.shutdown(Shutdown::Both);
        });
        let mut socket = socket;
        let mut buffer = [0; PIECE];
        while let Some(credit) = connection.wait() {
            let room = credit.min(PIECE);
            match socket.read(&mut buffer[..room]) {
                Ok(0) => {
                    self.send(number, END, &[]);
                    break;
                }
                Ok(count) => {
                    connection.take(count);
                    if !self.send(number, DATA, &buffer[..count]) {
                        break;
                    }
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => {
                    self.send(number, RESET, &[]);
                    connection.reset();
                    break;
                }
            }
        }
        if lock(&connection.credit).is_none() {
            let _ = socket.shutdown(Shutdown::Both);
        }
        let _ = writer.join();
    }

    /// Says that a connection has ended at once. If the port is gone, everything has.
    fn reset(&self, number: u32) {
        self.send(number, RESET, &[]);
    }

    /// Whether the port takes it.
    fn send(&self, number: u32, kind: u8, contents: &[u8]) -> bool {
        let [a, b, c, ..] = contents.len().to_le_bytes();
        let mut frame = number.to_le_bytes().to_vec();
        frame.extend([kind, a, b, c]);
        frame.extend(contents);
        lock(&self.port).write_all(&frame).is_ok()
    }
}

impl Connection {
    fn add(&self, more: usize) {
        if let Some(credit) = &mut *lock(&self.credit) {
            *credit = credit.saturating_add(more).min(WINDOW);
        }
        self.changed.notify_all();
    }

    fn take(&self, count: usize) {
        if let Some(credit) = &mut *lock(&self.credit) {
            *credit = credit.saturating_sub(count);
        }
    }

    /// Waits until something may be sent.
    fn wait(&self) -> Option<usize> {
        let mut credit = lock(&self.credit);
        while *credit == Some(0) {
            credit = self.changed.wait(credit).unwrap_or_else(PoisonError::into_inner);
        }
        *credit
    }

    fn reset(&self) {
        *lock(&self.credit) = None;
        self.changed.notify_all();
        let _ = self.events.send(Event::Reset);
        if let Some(socket) = &*lock(&self.socket) {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The next frame; `None` at the end of the port.
fn read_frame(input: &mut impl Read) -> Option<(u32, u8, Vec<u8>)> {
    let mut head = [0; 8];
    read_all(input, &mut head)?;
    let [n0, n1, n2, n3, kind, a, b, c] = head;
    let len = usize::try_from(u32::from_le_bytes([a, b, c, 0])).ok()?;
    let mut contents = vec![0; len];
    read_all(input, &mut contents)?;
    Some((u32::from_le_bytes([n0, n1, n2, n3]), kind, contents))
}

fn read_all(input: &mut impl Read, buffer: &mut [u8]) -> Option<()> {
    input.read_exact(buffer).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two ends, of which the second echoes, or refuses.
    fn tunnels(works: bool) -> Arc<Tunnel> {
        let (near, far) = UnixStream::pair().unwrap();
        let accept: Accept = Box::new(move || {
            if !works {
                return Err(std::io::ErrorKind::NotFound.into());
            }
            let (socket, mut echo) = UnixStream::pair()?;
            std::thread::spawn(move || {
                let mut other = echo.try_clone().unwrap();
                let _ = std::io::copy(&mut echo, &mut other);
                let _ = other.shutdown(Shutdown::Both);
            });
            Ok(socket)
        });
        Tunnel::start(far.try_clone().unwrap(), far, Some(accept));
        Tunnel::start(near.try_clone().unwrap(), near, None)
    }

    #[test]
    fn many_connections_share_a_port_and_a_slow_one_holds_nobody_up() {
        let tunnel = tunnels(true);
        let open = || {
            let (near, far) = UnixStream::pair().unwrap();
            tunnel.open(far);
            near
        };
        // This one's echo is not read.
        let slow = open();
        let mut writer = slow.try_clone().unwrap();
        std::thread::spawn(move || writer.write_all(&vec![1; 4 << 20]));
        let workers: Vec<_> = (0..5u8)
            .map(|number| {
                let mut socket = open();
                std::thread::spawn(move || {
                    let sent: Vec<u8> =
                        (0..300_000u32).map(|n| n.to_le_bytes()[usize::from(number % 2)] ^ number).collect();
                    let (mut writer, bytes) = (socket.try_clone().unwrap(), sent.clone());
                    std::thread::spawn(move || {
                        writer.write_all(&bytes).unwrap();
                        writer.shutdown(Shutdown::Write).unwrap();
                    });
                    let mut got = Vec::new();
                    socket.read_to_end(&mut got).unwrap();
                    assert!(got == sent);
                })
            })
            .collect();
        workers.into_iter().for_each(|worker| worker.join().unwrap());
        slow.shutdown(Shutdown::Both).unwrap();
        for _ in 0..500 {
            if lock(&tunnel.connections).is_empty() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        panic!("connections are left");
    }

    #[test]
    fn a_connection_that_nobody_answers_ends() {
        let tunnel = tunnels(false);
        let (mut near, far) = UnixStream::pair().unwrap();
        tunnel.open(far);
        assert_eq!(near.read(&mut [0; 8]).unwrap(), 0);
    }
}
