//! What a network card is plugged into.

use std::io::{Read as _, Write as _};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::{Error, Result};

/// The longest frame that is taken from outside.
const LONGEST: usize = 65_550;

/// The other end of the wire.
#[derive(Debug)]
pub enum Link {
    /// A tap interface of the host.
    Tap(OwnedFd),
    /// A stream socket on which each frame follows its length in four bytes, the most significant one first: what
    /// passt and QEMU's `stream` network speak.
    Stream(Stream),
}

/// A stream of frames.
#[derive(Debug)]
pub struct Stream {
    socket: UnixStream,
    received: Vec<u8>,
    closed: bool,
}

impl Link {
    /// Opens the tap interface `name`. One that is not there is made where we may do that, and goes with us.
    pub fn tap(name: &str) -> Result<Self> {
        const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
        const IFF_TAP: libc::c_short = 2;
        const IFF_NO_PI: libc::c_short = 0x1000;
        let failed = |what: &str| {
            let error = std::io::Error::last_os_error();
            let next = match error.raw_os_error() {
                Some(libc::EPERM | libc::EACCES) => {
                    format!(
                        "; root makes one for you: ip tuntap add {name} mode tap user YOU, ip link set {name} up"
                    )
                }
                Some(libc::EBUSY) => "; another program has it".into(),
                Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
                    "; the kernel's module tun is not loaded".into()
                }
                _ => String::new(),
            };
            Error::vmm(format!("{what} `{name}`: {error}{next}"))
        };
        // SAFETY: a zeroed `ifreq` is valid.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        if name.is_empty() || name.len() >= request.ifr_name.len() || !name.is_ascii() {
            return Err(Error::vmm(format!("`{name}` cannot be an interface's name")));
        }
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = IFF_TAP | IFF_NO_PI;
        // SAFETY: a terminated path; the new descriptor is checked and owned; the request points to an `ifreq`.
        unsafe {
            let fd = libc::open(c"/dev/net/tun".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC | libc::O_NONBLOCK);
            if fd < 0 {
                return Err(failed("opening /dev/net/tun for"));
            }
            let fd = OwnedFd::from_raw_fd(fd);
            if libc::ioctl(fd.as_raw_fd(), TUNSETIFF as _, &raw mut request) != 0 {
                return Err(failed("attaching to the tap interface"));
            }
            Ok(Self::Tap(fd))
        }
    }

    /// Connects to a user-mode network's socket.
    pub fn connect(path: &Path) -> Result<Self> {
        let socket = UnixStream::connect(path).map_err(|error| {
            Error::vmm(format!(
                "connecting a network card to {0}: {error}; what makes the network listens there first, e.g. passt \
                 --socket {0}",
                path.display()
            ))
        })?;
        Self::stream(socket)
    }

    /// Starts passt, a network without privileges, at the other end of a socket. It ends when this end is closed, or with us.
    pub fn passt(program: &Path, flags: &[String]) -> Result<(Self, Child)> {
        let failed = |error: std::io::Error| Error::os("starting passt", &error);
        let (near, far) = UnixStream::pair().map_err(failed)?;
        let end = far.as_raw_fd();
        let mut command = Command::new(program);
        command.args(["--foreground", "--quiet", "--fd", &end.to_string()]).args(flags);
        // SAFETY: between fork and exec two calls that are async-signal-safe; `far` outlives the call of spawn.
        unsafe {
            command.pre_exec(move || {
                // Ctrl-C is for the Realm's console, not for its network.
                if libc::setpgid(0, 0) < 0 || libc::fcntl(end, libc::F_SETFD, 0) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::inherit());
        let child = command.spawn().map_err(failed)?;
        Ok((Self::stream(near)?, child))
    }

    /// Uses a connected socket.
    pub fn stream(socket: UnixStream) -> Result<Self> {
        socket.set_nonblocking(true).map_err(|error| Error::os("the network's socket", &error))?;
        Ok(Self::Stream(Stream { socket, received: Vec::new(), closed: false }))
    }

    /// Its file, for another program that speaks as it does.
    #[must_use]
    pub fn into_fd(self) -> OwnedFd {
        match self {
            Self::Tap(fd) => fd,
            Self::Stream(stream) => stream.socket.into(),
        }
    }

    /// Readable when a frame may be there; -1 when there will never be one.
    #[must_use]
    pub fn fd(&self) -> RawFd {
        match self {
            Self::Tap(fd) => fd.as_raw_fd(),
            Self::Stream(stream) if stream.closed => -1,
            Self::Stream(stream) => stream.socket.as_raw_fd(),
        }
    }

    /// The next frame, if there is one.
    pub fn receive(&mut self) -> Option<Vec<u8>> {
        match self {
            Self::Tap(fd) => {
                let mut frame = vec![0; LONGEST];
                // SAFETY: the buffer is as long as the call is told.
                let got = unsafe { libc::read(fd.as_raw_fd(), frame.as_mut_ptr().cast(), frame.len()) };
                frame.truncate(usize::try_from(got).ok().filter(|got| *got > 0)?);
                Some(frame)
            }
            Self::Stream(stream) => stream.receive(),
        }
    }

    /// Sends a frame. One that cannot be sent now is lost, as on any wire.
    pub fn send(&mut self, frame: &[u8]) {
        match self {
            Self::Tap(fd) => {
                // SAFETY: the buffer is as long as the call is told.
                unsafe { libc::write(fd.as_raw_fd(), frame.as_ptr().cast(), frame.len()) };
            }
            Self::Stream(stream) => stream.send(frame),
        }
    }
}

impl Stream {
    fn receive(&mut self) -> Option<Vec<u8>> {
        loop {
            if let Some((length, rest)) = self.received.split_first_chunk::<4>() {
                let length = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
                if length > LONGEST {
                    // Whatever this is, the next frame's beginning is lost.
                    self.closed = true;
                    return None;
                }
                if let Some(frame) = rest.get(..length) {
                    let frame = frame.to_vec();
                    self.received.drain(..4 + length);
                    return Some(frame);
                }
            }
            let mut buffer = [0; 16 << 10];
            match self.socket.read(&mut buffer) {
                Ok(0) => {
                    self.closed = true;
                    return None;
                }
                Ok(got) => self.received.extend_from_slice(&buffer[..got]),
                Err(_) => return None,
            }
        }
    }

    fn send(&mut self, frame: &[u8]) {
        let Ok(length) = u32::try_from(frame.len()) else { return };
        let bytes = [&length.to_be_bytes()[..], frame].concat();
        let mut sent = 0;
        while sent < bytes.len() && !self.closed {
            match self.socket.write(&bytes[sent..]) {
                Ok(more) => sent += more,
                // Nothing of it has gone: lose it. Something has: the rest must follow, but not for ever.
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    let mut fd =
                        libc::pollfd { fd: self.socket.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
                    // SAFETY: one pollfd.
                    if sent == 0 || unsafe { libc::poll(&raw mut fd, 1, 1000) } == 0 {
                        self.closed = sent > 0;
                        return;
                    }
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => self.closed = true,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_survive_a_stream_however_it_is_cut() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let mut link = Link::stream(near).unwrap();
        assert_eq!(link.receive(), None);
        let bytes =
            [&3u32.to_be_bytes()[..], b"one", &0u32.to_be_bytes(), &5u32.to_be_bytes(), b"three"].concat();
        let mut frames = Vec::new();
        for byte in bytes {
            far.write_all(&[byte]).unwrap();
            frames.extend(link.receive());
        }
        assert_eq!(frames, [b"one".to_vec(), vec![], b"three".to_vec()]);
        link.send(b"four");
        let mut back = [0; 8];
        far.read_exact(&mut back).unwrap();
        assert_eq!(&back, b"\0\0\0\x04four");
    }

    #[test]
    fn a_peer_that_goes_away_stops_or_lies_does_no_harm() {
        let (near, far) = UnixStream::pair().unwrap();
        let mut link = Link::stream(near).unwrap();
        for _ in 0..100 {
            link.send(&[7; 60_000]);
        }
        drop(far);
        link.send(b"x");
        assert_eq!((link.receive(), link.fd()), (None, -1));

        let (near, mut far) = UnixStream::pair().unwrap();
        let mut link = Link::stream(near).unwrap();
        far.write_all(&[0xff; 100]).unwrap();
        assert_eq!((link.receive(), link.fd()), (None, -1));
    }

    #[test]
    fn a_name_that_is_none_is_refused() {
        for name in ["", "a-name-that-is-far-too-long", "ä"] {
            assert!(Link::tap(name).is_err());
        }
    }
}
