//! Sockets between guest and host (`AF_VSOCK`), connected to UNIX sockets of the host in the way that Firecracker and
//! Cloud Hypervisor have made usual:
//!
//! - the host connects to a path, writes `CONNECT PORT\n` and reads `OK HOST_PORT\n`; the end of the stream instead
//!   means that nobody listens there in the guest;
//! - a guest's connection to port P of the host goes to the socket at that path with `_P` behind it.
//!
//! Other threads of this process connect with [`Handle::connect`].

mod muxer;
mod packet;

#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::ffi::CString;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

pub use muxer::Counters;
use muxer::{Key, Muxer, Words};
use packet::Header;

use super::{Active, Device, Served, reader, writer};
use crate::mailbox::{Receiver, Sender, mailbox};
use crate::seccomp::Call;
use crate::{Error, Result, calls};

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// Linux fills its receive queue with pages, each of which takes its share of the bounce buffers.
const RECEIVE_QUEUE: u16 = 16;
const TRANSMIT_QUEUE: u16 = 16;
const EVENT_QUEUE: u16 = 4;

/// The most data in one packet of a guest: no connection has more credit.
const LONGEST: u32 = muxer::BUFFER;
/// Packets that the guest gets before somebody else has a turn: more than there can be without data.
const BURST: usize = 1024;
/// Clients that have not yet said which port they want.
const MAX_GREETINGS: usize = 16;
/// `CONNECT 4294967295\n`, and some spaces.
const LONGEST_GREETING: usize = 32;

/// Another thread's connection.
#[derive(Debug)]
struct Request {
    port: u32,
    stream: UnixStream,
    words: Words,
}

/// Connects to the guest from other threads.
#[derive(Clone, Debug)]
pub struct Handle {
    requests: Sender<Request>,
    active: Arc<AtomicBool>,
    counters: Arc<Counters>,
}

impl Handle {
    /// Connects `stream` to a port of the guest. It is first told `accepted` or, if nobody listens there or the guest has
    /// no driver yet, `refused`.
    pub fn connect(&self, port: u32, mut stream: UnixStream, accepted: &[u8], refused: &[u8]) {
        // The device's thread waits for nobody, and may not say so itself.
        let waits = stream.set_nonblocking(true).is_err();
        if self.active.load(Ordering::Acquire) && !waits {
            let words = Words { accepted: accepted.to_vec(), refused: refused.to_vec() };
            self.requests.send(Request { port, stream, words });
        } else {
            let _ = stream.write(refused);
        }
    }

    /// What has happened so far.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.counters
    }
}

/// A client that has not yet said which port it wants.
struct Greeting {
    stream: UnixStream,
    line: Vec<u8>,
}

/// Whose file was waited for.
#[derive(Clone, Copy)]
enum Waited {
    Requests,
    Listener,
    Greeting(usize),
    Connection(Key),
}

/// The device.
pub struct Vsock {
    guest_cid: u64,
    listener: Option<Listener>,
    requests: Receiver<Request>,
    active: Arc<AtomicBool>,
    greetings: Vec<Option<Greeting>>,
    muxer: Muxer,
    /// The guest has no place for another packet.
    starved: bool,
    waited: RefCell<Vec<Waited>>,
}

impl std::fmt::Debug for Vsock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vsock").field("guest_cid", &self.guest_cid).finish_non_exhaustive()
    }
}

/// A socket in the file system, which goes away with its owner.
struct Listener {
    socket: UnixListener,
    path: PathBuf,
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Ok(path) = CString::new(self.path.as_os_str().as_bytes()) {
            // Not the standard library's way, which is another call on each machine, and the device's thread has few.
            // SAFETY: the path ends with a zero.
            unsafe { libc::unlinkat(libc::AT_FDCWD, path.as_ptr(), 0) };
        }
    }
}

impl Vsock {
    /// A device whose guest has the address `guest_cid`, and whose connections are at `path`, if anywhere.
    pub fn new(guest_cid: u32, path: Option<&Path>) -> Result<(Self, Handle)> {
        if guest_cid <= 2 || guest_cid == u32::MAX {
            return Err(Error::vmm(format!(
                "{guest_cid} cannot be a guest's address on a vsock: 3 is the first"
            )));
        }
        let listener = path.map(listen).transpose()?;
        let (sender, requests) = mailbox()?;
        let active = Arc::new(AtomicBool::new(false));
        let muxer = Muxer::new(u64::from(guest_cid), path.map(Path::to_owned));
        let handle = Handle { requests: sender, active: active.clone(), counters: muxer.counters.clone() };
        let device = Self {
            guest_cid: u64::from(guest_cid),
            listener,
            requests,
            active,
            greetings: Vec::new(),
            muxer,
            starved: false,
            waited: RefCell::default(),
        };
        Ok((device, handle))
    }

    /// Gives the guest what there is for it.
    fn deliver(&mut self, active: &mut Active) -> Served {
        let mut delivered = false;
        for _ in 0..BURST {
            let Some(chain) = active.next_or_rearm(RECEIVE)? else {
                self.starved = true;
                break;
            };
            self.starved = false;
            let memory = active.memory.clone();
            let mut buffer = writer(&memory, &chain)?;
            let Some(room) = buffer.available_bytes().checked_sub(packet::SIZE) else {
                return Err("a receive buffer has no room for a header".into());
            };
            let Some((header, data)) = self.muxer.next(room) else {
                active.give_back(RECEIVE);
                break;
            };
            buffer.write_all(&header.bytes())?;
            buffer.write_all(&data)?;
            active.used(RECEIVE, chain.head_index(), packet::SIZE + data.len())?;
            delivered = true;
        }
        if delivered { active.notify(RECEIVE) } else { Ok(()) }
    }

    fn transmit(&mut self, active: &mut Active) -> Served {
        let muxer = &mut self.muxer;
        active.serve(TRANSMIT, &mut |memory, chain| {
            let mut buffer = reader(memory, &chain)?;
            let mut header = [0; packet::SIZE];
            buffer.read_exact(&mut header)?;
            let header = Header::parse(&header);
            if header.len > LONGEST {
                return Err("a packet is longer than any window".into());
            }
            let mut data = vec![0; usize::try_from(header.len)?];
            buffer.read_exact(&mut data)?;
            muxer.receive(&header, &data);
            Ok(0)
        })
    }

    /// A new client of the host.
    fn greet(&mut self) {
        let Some(listener) = &self.listener else { return };
        let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        let nobody = std::ptr::null_mut();
        // SAFETY: no address is asked for; the new descriptor is checked and owned.
        let stream = unsafe {
            let fd = libc::accept4(listener.socket.as_raw_fd(), nobody, nobody.cast(), flags);
            if fd < 0 {
                return;
            }
            UnixStream::from_raw_fd(fd)
        };
        let greeting = Some(Greeting { stream, line: Vec::new() });
        match self.greetings.iter_mut().find(|place| place.is_none()) {
            Some(place) => *place = greeting,
            None => self.greetings.push(greeting),
        }
    }

    fn may_greet(&self) -> bool {
        self.greetings.iter().flatten().count() < MAX_GREETINGS && !self.muxer.is_full()
    }

    /// A client says which port it wants. What follows that line is the guest's already, so it is read byte by byte.
    fn listen_to(&mut self, index: usize) {
        let Some(place) = self.greetings.get_mut(index) else { return };
        let Some(greeting) = place else { return };
        loop {
            let mut byte = [0];
            match greeting.stream.read(&mut byte) {
                Ok(1) if byte[0] != b'\n' && greeting.line.len() < LONGEST_GREETING => {
                    greeting.line.push(byte[0])
                }
                Ok(1) => break,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                _ => return drop(place.take()),
            }
        }
        let Some(greeting) = place.take() else { return };
        if let Some(port) = wanted_port(&greeting.line) {
            let words = Words { accepted: b"OK {}\n".to_vec(), refused: Vec::new() };
            self.muxer.connect(port, greeting.stream, words);
        }
    }
}

/// The port in `CONNECT PORT`.
fn wanted_port(line: &[u8]) -> Option<u32> {
    let mut words = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    let (verb, port) = (words.next()?, words.next()?);
    if verb.eq_ignore_ascii_case("connect") && words.next().is_none() { port.parse().ok() } else { None }
}

/// Listens at a path where nobody else does.
fn listen(path: &Path) -> Result<Listener> {
    let failed = |error| Error::os(format_args!("listening at {}", path.display()), &error);
    // A socket that a process has left behind is in the way of nobody; one that is listened at is.
    if UnixStream::connect(path).is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused) {
        let _ = std::fs::remove_file(path);
    }
    let socket = UnixListener::bind(path).map_err(failed)?;
    let listener = Listener { socket, path: path.to_owned() };
    let owner_only = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    std::fs::set_permissions(path, owner_only).map_err(failed)?;
    listener.socket.set_nonblocking(true).map_err(failed)?;
    Ok(listener)
}

impl Device for Vsock {
    fn id(&self) -> u16 {
        19
    }

    fn name(&self) -> String {
        "virtio-vsock".into()
    }

    fn system_calls(&self) -> &'static [Call] {
        // Clients of the host, and connections to its services.
        calls![accept4, connect, recvfrom, recvmsg, sendmsg, sendto, shutdown, socket, unlinkat]
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![RECEIVE_QUEUE, TRANSMIT_QUEUE, EVENT_QUEUE]
    }

    fn config(&self) -> Vec<u8> {
        self.guest_cid.to_le_bytes().to_vec()
    }

    fn activate(&mut self, _: &mut Active) -> Served {
        self.starved = false;
        self.active.store(true, Ordering::Release);
        Ok(())
    }

    fn reset(&mut self) {
        self.active.store(false, Ordering::Release);
        self.muxer.clear();
        self.greetings.clear();
        for mut request in self.requests.drain() {
            let _ = request.stream.write(&request.words.refused);
        }
    }

    fn queue(&mut self, index: usize, active: &mut Active) -> Served {
        if index == TRANSMIT {
            self.transmit(active)?;
        }
        // Nothing is ever said on the event queue: a guest is never moved to another machine.
        self.deliver(active)
    }

    fn wait_for(&self, _: &Active) -> Vec<libc::pollfd> {
        let mut waited = self.waited.borrow_mut();
        waited.clear();
        let mut fds = Vec::new();
        let mut add = |who, fd, events| {
            waited.push(who);
            fds.push(libc::pollfd { fd, events, revents: 0 });
        };
        add(Waited::Requests, self.requests.fd(), libc::POLLIN);
        let listener = self.listener.as_ref().filter(|_| self.may_greet());
        add(Waited::Listener, listener.map_or(-1, |listener| listener.socket.as_raw_fd()), libc::POLLIN);
        for (index, greeting) in self.greetings.iter().enumerate() {
            let fd = greeting.as_ref().map_or(-1, |greeting| greeting.stream.as_raw_fd());
            add(Waited::Greeting(index), fd, libc::POLLIN);
        }
        for (key, fd, events) in self.muxer.interests(!self.starved) {
            add(Waited::Connection(key), fd, events);
        }
        fds
    }

    fn ready(&mut self, index: usize, active: &mut Active) -> Served {
        let waited = self.waited.borrow().get(index).copied();
        match waited {
            Some(Waited::Requests) => {
                for Request { port, stream, words } in self.requests.drain() {
                    self.muxer.connect(port, stream, words);
                }
            }
            Some(Waited::Listener) => self.greet(),
            Some(Waited::Greeting(index)) => self.listen_to(index),
            Some(Waited::Connection(key)) => self.muxer.ready(key),
            None => {}
        }
        self.deliver(active)
    }
}
