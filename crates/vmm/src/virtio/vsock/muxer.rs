//! Connections between the guest's sockets and UNIX sockets of the host.
//!
//! The muxer knows packets and files, and nothing of queues. Everything that a guest can make it keep is bounded: the
//! number of connections, the bytes of each that the host has not read, and the answers that the guest does not fetch.

use std::collections::{BTreeMap, VecDeque};
use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::packet::{Header, NO_RECEIVE, NO_SEND, STREAM, op};

/// The host's address.
pub(super) const HOST_CID: u64 = 2;
/// Connections at a time.
pub(super) const MAX_CONNECTIONS: usize = 128;
/// Bytes that the guest may send on a connection before the host has read them.
pub(super) const BUFFER: u32 = 64 << 10;
/// Answers that wait for a guest's buffer; more are forgotten.
const MAX_RESETS: usize = 256;
/// The most data in one packet to the guest.
const PIECE: usize = 16 << 10;
/// The host's ends of connections that the host opens have ports from here on.
const FIRST_PORT: u32 = 1 << 30;

/// A connection's name: the host's port, the guest's port.
pub(super) type Key = (u32, u32);

/// What has happened so far.
#[derive(Debug, Default)]
pub struct Counters {
    /// Connections that were established.
    pub connections: AtomicU64,
    /// Bytes that the guest sent.
    pub from_guest: AtomicU64,
    /// Bytes that the guest was sent.
    pub to_guest: AtomicU64,
}

/// What the host's side of a connection is told at its beginning.
#[derive(Debug, Default)]
pub(super) struct Words {
    /// When the guest has accepted; the host's port is put in the place of `{}`.
    pub(super) accepted: Vec<u8>,
    /// When it has not.
    pub(super) refused: Vec<u8>,
}

enum State {
    /// The host asked, and the guest has not answered.
    Requested(Words),
    Open,
    /// The guest has gone; what it sent before is still on its way to the host.
    Draining,
}

struct Connection {
    stream: UnixStream,
    state: State,
    /// What the guest sent and the host has not taken.
    inbox: VecDeque<u8>,
    /// All bytes that went to the host, and how many of them the guest knows about.
    forwarded: u32,
    reported: u32,
    /// The guest's room, what it has taken of ours, and what we sent.
    peer_alloc: u32,
    peer_forwarded: u32,
    sent: u32,
    /// The stream may have bytes for us.
    readable: bool,
    /// It has come to its end.
    ended: bool,
    /// The guest will not send, will not receive any more.
    no_send: bool,
    no_receive: bool,
    /// The host's side has been told that nothing more comes.
    closed: bool,
    // What the guest has to be told.
    respond: bool,
    request: bool,
    update: bool,
    shutdown: bool,
}

/// All connections.
pub(super) struct Muxer {
    guest_cid: u64,
    /// Where a guest's connection to port P goes: this path, an underscore, P.
    path: Option<PathBuf>,
    connections: BTreeMap<Key, Connection>,
    resets: VecDeque<Header>,
    next_port: u32,
    /// Where the search for the next packet begins, so that everybody gets a turn.
    turn: Key,
    pub(super) counters: Arc<Counters>,
}

impl Muxer {
    pub(super) fn new(guest_cid: u64, path: Option<PathBuf>) -> Self {
        Self {
            guest_cid,
            path,
            connections: BTreeMap::new(),
            resets: VecDeque::new(),
            next_port: FIRST_PORT,
            turn: (0, 0),
            counters: Arc::default(),
        }
    }

    pub(super) fn is_full(&self) -> bool {
        self.connections.len() >= MAX_CONNECTIONS
    }

    /// The guest's driver has gone: everything ends.
    pub(super) fn clear(&mut self) {
        for connection in self.connections.values_mut() {
            connection.refuse();
        }
        self.connections.clear();
        self.resets.clear();
    }

    /// The host wants to talk to a port of the guest, through a stream that does not wait.
    pub(super) fn connect(&mut self, port: u32, mut stream: UnixStream, words: Words) {
        if self.is_full() {
            let _ = stream.write(&words.refused);
            return;
        }
        while self.connections.contains_key(&(self.next_port, port)) {
            self.next_port = following(self.next_port);
        }
        let mut connection = Connection::new(stream, State::Requested(words));
        connection.request = true;
        self.connections.insert((self.next_port, port), connection);
        self.next_port = following(self.next_port);
    }

    /// A packet of the guest.
    pub(super) fn receive(&mut self, header: &Header, data: &[u8]) {
        let key = (header.dst_port, header.src_port);
        if header.src_cid != self.guest_cid || header.dst_cid != HOST_CID || header.kind != STREAM {
            return self.reset(key, header);
        }
        if header.op == op::REQUEST {
            return self.accept(key, header);
        }
        let Some(connection) = self.connections.get_mut(&key) else { return self.reset(key, header) };
        connection.peer_alloc = header.buf_alloc;
        connection.peer_forwarded = header.fwd_cnt;
        let fine = match header.op {
            op::RESPONSE => connection.accepted(key.0),
            op::RST => {
                connection.hang_up();
                true
            }
            op::SHUTDOWN => connection.shut_down(header.flags),
            op::RW => connection.receive(data),
            op::CREDIT_UPDATE => true,
            op::CREDIT_REQUEST => {
                connection.update = true;
                true
            }
            _ => false,
        };
        if header.op == op::RESPONSE && fine {
            self.counters.connections.fetch_add(1, Ordering::Relaxed);
        }
        if header.op == op::RW && fine {
            self.counters.from_guest.fetch_add(u64::from(header.len), Ordering::Relaxed);
        }
        if !fine {
            connection.refuse();
            self.connections.remove(&key);
            return self.reset(key, header);
        }
        self.settle(key);
    }

    /// The guest wants to talk to a port of the host.
    fn accept(&mut self, key: Key, header: &Header) {
        if self.connections.remove(&key).is_some() || self.is_full() {
            return self.reset(key, header);
        }
        let service = self.path.as_ref().map(|path| {
            let mut name = path.clone().into_os_string();
            name.push(format!("_{}", key.0));
            PathBuf::from(name)
        });
        let Some(stream) = service.and_then(|path| connect_now(&path)) else {
            return self.reset(key, header);
        };
        let mut connection = Connection::new(stream, State::Open);
        connection.respond = true;
        connection.peer_alloc = header.buf_alloc;
        connection.peer_forwarded = header.fwd_cnt;
        self.connections.insert(key, connection);
        self.counters.connections.fetch_add(1, Ordering::Relaxed);
    }

    /// Answers a packet that makes no sense.
    fn reset(&mut self, key: Key, header: &Header) {
        if header.op != op::RST && self.resets.len() < MAX_RESETS {
            let kind = header.kind;
            let answer = Header { kind, src_cid: header.dst_cid, ..self.header(key, op::RST) };
            self.resets.push_back(answer);
        }
    }

    fn header(&self, key: Key, op: u16) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: key.0,
            dst_port: key.1,
            kind: STREAM,
            op,
            ..Header::default()
        }
    }

    /// Ends a connection whose both sides are done.
    fn settle(&mut self, key: Key) {
        let Some(connection) = self.connections.get_mut(&key) else { return };
        let flushed = connection.flush();
        let over = match connection.state {
            State::Draining => !flushed || connection.inbox.is_empty(),
            _ => !flushed || (connection.no_send && connection.no_receive && connection.inbox.is_empty()),
        };
        if over {
            let gone = matches!(connection.state, State::Draining);
            self.connections.remove(&key);
            if !gone && self.resets.len() < MAX_RESETS {
                let header = self.header(key, op::RST);
                self.resets.push_back(header);
            }
        }
    }

    /// What to wait for: files with events, and whose they are. `hungry` says that the guest has room for packets.
    pub(super) fn interests(&self, hungry: bool) -> impl Iterator<Item = (Key, RawFd, i16)> {
        self.connections.iter().map(move |(key, connection)| {
            let (fd, events) = connection.interest(hungry);
            (*key, fd, events)
        })
    }

    /// Something happened to a connection's file.
    pub(super) fn ready(&mut self, key: Key) {
        let Some(connection) = self.connections.get_mut(&key) else { return };
        let waits = matches!(connection.state, State::Requested(_));
        if (connection.ended || waits) && hung_up(&connection.stream) {
            self.connections.remove(&key);
            if self.resets.len() < MAX_RESETS {
                let header = self.header(key, op::RST);
                self.resets.push_back(header);
            }
            return;
        }
        connection.readable = matches!(connection.state, State::Open);
        self.settle(key);
    }

    /// The next packet for the guest, with up to `room` bytes of data.
    pub(super) fn next(&mut self, room: usize) -> Option<(Header, Vec<u8>)> {
        if let Some(header) = self.resets.pop_front() {
            return Some((header, Vec::new()));
        }
        let after = self.connections.range(self.turn..).map(|(key, _)| *key);
        let before = self.connections.range(..self.turn).map(|(key, _)| *key);
        let keys: Vec<Key> = after.chain(before).collect();
        for key in keys {
            let Some(connection) = self.connections.get_mut(&key) else { continue };
            let Some((op, flags, data)) = connection.next(room) else { continue };
            connection.reported = connection.forwarded;
            let fwd_cnt = connection.forwarded;
            self.turn = (key.0, key.1.wrapping_add(1));
            let len = u32::try_from(data.len()).unwrap_or(0);
            self.counters.to_guest.fetch_add(u64::from(len), Ordering::Relaxed);
            let header = Header { len, flags, buf_alloc: BUFFER, fwd_cnt, ..self.header(key, op) };
            return Some((header, data));
        }
        None
    }
}

impl Connection {
    fn new(stream: UnixStream, state: State) -> Self {
        Self {
            stream,
            state,
            inbox: VecDeque::new(),
            forwarded: 0,
            reported: 0,
            peer_alloc: 0,
            peer_forwarded: 0,
            sent: 0,
            readable: false,
            ended: false,
            no_send: false,
            no_receive: false,
            closed: false,
            respond: false,
            request: false,
            update: false,
            shutdown: false,
        }
    }

    /// The guest accepted; whether it had been asked.
    fn accepted(&mut self, port: u32) -> bool {
        let State::Requested(words) = &self.state else { return false };
        let text = String::from_utf8_lossy(&words.accepted).replace("{}", &port.to_string());
        self.state = State::Open;
        // Nothing has been written to the stream before: this fits.
        self.stream.write_all(text.as_bytes()).is_ok()
    }

    /// Tells a host that waits that nothing will come of it.
    fn refuse(&mut self) {
        if let State::Requested(words) = &self.state {
            let _ = self.stream.write(&words.refused);
        }
    }

    /// The guest ended it.
    fn hang_up(&mut self) {
        self.refuse();
        self.state = State::Draining;
        (self.respond, self.request, self.update, self.shutdown) = (false, false, false, false);
    }

    fn shut_down(&mut self, flags: u32) -> bool {
        self.no_receive |= flags & NO_RECEIVE != 0;
        self.no_send |= flags & NO_SEND != 0;
        matches!(self.state, State::Open)
    }

    /// Data of the guest; `false` if it may not send any, or not so much.
    fn receive(&mut self, data: &[u8]) -> bool {
        let room = usize::try_from(BUFFER).unwrap_or(0).saturating_sub(self.inbox.len());
        if !matches!(self.state, State::Open) || self.no_send || data.len() > room {
            return false;
        }
        self.inbox.extend(data);
        true
    }

    /// Writes what the host takes; `false` if nobody will take the rest.
    fn flush(&mut self) -> bool {
        while !self.inbox.is_empty() {
            let (first, _) = self.inbox.as_slices();
            match self.stream.write(first) {
                Ok(count) => {
                    self.inbox.drain(..count);
                    self.forwarded = self.forwarded.wrapping_add(u32::try_from(count).unwrap_or(0));
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
        }
        // The guest learns about room before it has none.
        self.update |=
            matches!(self.state, State::Open) && self.forwarded.wrapping_sub(self.reported) >= BUFFER / 2;
        if self.no_send && self.inbox.is_empty() && !std::mem::replace(&mut self.closed, true) {
            let _ = self.stream.shutdown(Shutdown::Write);
        }
        true
    }

    /// How much the guest has room for.
    fn credit(&self) -> usize {
        let flying = self.sent.wrapping_sub(self.peer_forwarded);
        usize::try_from(self.peer_alloc.saturating_sub(flying)).unwrap_or(0)
    }

    fn wants_input(&self) -> bool {
        matches!(self.state, State::Open) && !self.ended && !self.no_receive && self.credit() > 0
    }

    fn interest(&self, hungry: bool) -> (RawFd, i16) {
        let write = if self.inbox.is_empty() { 0 } else { libc::POLLOUT };
        let read = if hungry && self.wants_input() { libc::POLLIN } else { 0 };
        // A hang-up is always reported. It matters only where no byte can be lost by it.
        let watched = self.ended || matches!(self.state, State::Requested(_));
        let fd = if write | read != 0 || watched { self.stream.as_raw_fd() } else { -1 };
        (fd, write | read)
    }

    /// What the guest has to hear next: operation, flags, data.
    fn next(&mut self, room: usize) -> Option<(u16, u32, Vec<u8>)> {
        if std::mem::take(&mut self.request) {
            return Some((op::REQUEST, 0, Vec::new()));
        }
        if std::mem::take(&mut self.respond) {
            return Some((op::RESPONSE, 0, Vec::new()));
        }
        if self.readable && self.wants_input() {
            let mut data = vec![0; room.min(self.credit()).min(PIECE)];
            match self.stream.read(&mut data) {
                Ok(0) if !data.is_empty() => {
                    self.ended = true;
                    self.shutdown = true;
                }
                Ok(count) if count > 0 => {
                    data.truncate(count);
                    self.sent = self.sent.wrapping_add(u32::try_from(count).unwrap_or(0));
                    self.update = false;
                    return Some((op::RW, 0, data));
                }
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => self.readable = false,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => {
                    self.ended = true;
                    self.shutdown = true;
                }
            }
        }
        if std::mem::take(&mut self.shutdown) {
            return Some((op::SHUTDOWN, NO_SEND, Vec::new()));
        }
        std::mem::take(&mut self.update).then(|| (op::CREDIT_UPDATE, 0, Vec::new()))
    }
}

fn following(port: u32) -> u32 {
    if port == u32::MAX - 1 { FIRST_PORT } else { port + 1 }
}

/// Whether the other end of a socket is gone for good.
fn hung_up(stream: &UnixStream) -> bool {
    let mut fd = libc::pollfd { fd: stream.as_raw_fd(), events: 0, revents: 0 };
    // SAFETY: one pollfd.
    unsafe { libc::poll(&raw mut fd, 1, 0) > 0 }
}

/// Connects without waiting for anybody.
fn connect_now(path: &Path) -> Option<UnixStream> {
    let bytes = path.as_os_str().as_bytes();
    // SAFETY: a zeroed address is valid storage; a system call without pointers; the new descriptor is checked and
    // owned; the address is as long as the call is told, and its path ends with the zero that is left behind it.
    unsafe {
        let mut address: libc::sockaddr_un = std::mem::zeroed();
        address.sun_family = libc::sa_family_t::try_from(libc::AF_UNIX).ok()?;
        if bytes.len() >= address.sun_path.len() {
            return None;
        }
        for (to, from) in address.sun_path.iter_mut().zip(bytes) {
            *to = *from as libc::c_char;
        }
        let fd = libc::socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK, 0);
        if fd < 0 {
            return None;
        }
        let fd = OwnedFd::from_raw_fd(fd);
        let len = libc::socklen_t::try_from(size_of::<libc::sockaddr_un>()).ok()?;
        if libc::connect(fd.as_raw_fd(), (&raw const address).cast(), len) != 0 {
            return None;
        }
        Some(UnixStream::from(fd))
    }
}
