//! The kernel's calls, as far as the agent needs them, without a C library.

use core::arch::asm;
use core::ffi::CStr;

/// What the kernel refused, as its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Errno(pub u32);

/// A call's result.
pub type Result<T = ()> = core::result::Result<T, Errno>;

/// `EINTR`.
pub const EINTR: Errno = Errno(4);
/// `EAGAIN`.
pub const EAGAIN: Errno = Errno(11);

/// Numbers of the calls.
#[cfg(target_arch = "aarch64")]
mod number {
    pub(super) const DUP3: usize = 24;
    pub(super) const FCNTL: usize = 25;
    pub(super) const IOCTL: usize = 29;
    pub(super) const FACCESSAT: usize = 48;
    pub(super) const CHDIR: usize = 49;
    pub(super) const FCHMOD: usize = 52;
    pub(super) const OPENAT: usize = 56;
    pub(super) const CLOSE: usize = 57;
    pub(super) const PIPE2: usize = 59;
    pub(super) const READ: usize = 63;
    pub(super) const WRITE: usize = 64;
    pub(super) const PPOLL: usize = 73;
    pub(super) const FSTAT: usize = 80;
    pub(super) const SYNC: usize = 81;
    pub(super) const EXIT_GROUP: usize = 94;
    pub(super) const KILL: usize = 129;
    pub(super) const RT_SIGACTION: usize = 134;
    pub(super) const RT_SIGPROCMASK: usize = 135;
    pub(super) const SETSID: usize = 157;
    pub(super) const SOCKET: usize = 198;
    pub(super) const BIND: usize = 200;
    pub(super) const LISTEN: usize = 201;
    pub(super) const CONNECT: usize = 203;
    pub(super) const SHUTDOWN: usize = 210;
    pub(super) const CLONE: usize = 220;
    pub(super) const EXECVE: usize = 221;
    pub(super) const ACCEPT4: usize = 242;
    pub(super) const WAIT4: usize = 260;
    pub(super) const PIDFD_OPEN: usize = 434;
}

#[cfg(target_arch = "x86_64")]
mod number {
    pub(super) const READ: usize = 0;
    pub(super) const WRITE: usize = 1;
    pub(super) const CLOSE: usize = 3;
    pub(super) const FSTAT: usize = 5;
    pub(super) const RT_SIGACTION: usize = 13;
    pub(super) const RT_SIGPROCMASK: usize = 14;
    pub(super) const IOCTL: usize = 16;
    pub(super) const SOCKET: usize = 41;
    pub(super) const CONNECT: usize = 42;
    pub(super) const SHUTDOWN: usize = 48;
    pub(super) const BIND: usize = 49;
    pub(super) const LISTEN: usize = 50;
    pub(super) const CLONE: usize = 56;
    pub(super) const EXECVE: usize = 59;
    pub(super) const WAIT4: usize = 61;
    pub(super) const KILL: usize = 62;
    pub(super) const FCNTL: usize = 72;
    pub(super) const CHDIR: usize = 80;
    pub(super) const FCHMOD: usize = 91;
    pub(super) const SETSID: usize = 112;
    pub(super) const SYNC: usize = 162;
    pub(super) const EXIT_GROUP: usize = 231;
    pub(super) const OPENAT: usize = 257;
    pub(super) const FACCESSAT: usize = 269;
    pub(super) const PPOLL: usize = 271;
    pub(super) const ACCEPT4: usize = 288;
    pub(super) const DUP3: usize = 292;
    pub(super) const PIPE2: usize = 293;
    pub(super) const PIDFD_OPEN: usize = 434;
}

/// Asks the kernel.
///
/// # Safety
///
/// The arguments must be what the call with this number expects; memory that it reads or writes through them must be
/// valid for that.
unsafe fn call(number: usize, arguments: [usize; 5]) -> Result<usize> {
    let [a, b, c, d, e] = arguments;
    let result: usize;
    #[cfg(target_arch = "aarch64")]
    // SAFETY: the caller answers for the arguments; the kernel changes x0 alone.
    unsafe {
        asm!("svc #0", in("x8") number, inlateout("x0") a => result, in("x1") b, in("x2") c, in("x3") d,
            in("x4") e, options(nostack));
    }
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the caller answers for the arguments; the kernel changes rax, rcx and r11 alone.
    unsafe {
        asm!("syscall", inlateout("rax") number => result, in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d,
            in("r8") e, out("rcx") _, out("r11") _, options(nostack));
    }
    match u32::try_from(result.wrapping_neg()) {
        Ok(errno @ 1..=4095) => Err(Errno(errno)),
        _ => Ok(result),
    }
}

/// A file descriptor, closed when it is dropped.
#[derive(Debug, PartialEq, Eq)]
pub struct Fd(i32);

impl Fd {
    /// Takes a descriptor that belongs to nobody else.
    ///
    /// # Safety
    ///
    /// Nobody else closes it.
    #[must_use]
    pub const unsafe fn from_raw(raw: i32) -> Self {
        Self(raw)
    }

    fn new(result: Result<usize>) -> Result<Self> {
        result.map(|fd| Self(i32::try_from(fd).unwrap_or(-1)))
    }

    fn arg(&self) -> usize {
        usize::try_from(self.0).unwrap_or(usize::MAX)
    }
}

impl Drop for Fd {
    fn drop(&mut self) {
        // SAFETY: no pointers; the descriptor is ours.
        let _ = unsafe { call(number::CLOSE, [self.arg(), 0, 0, 0, 0]) };
    }
}

/// Reads what there is, up to the buffer's size; nothing is the end.
pub fn read(fd: &Fd, buffer: &mut [u8]) -> Result<usize> {
    loop {
        // SAFETY: the buffer is writable for its length.
        match unsafe { call(number::READ, [fd.arg(), buffer.as_mut_ptr().addr_of(), buffer.len(), 0, 0]) } {
            Err(EINTR) => {}
            result => return result,
        }
    }
}

/// Writes some of the bytes.
pub fn write(fd: &Fd, bytes: &[u8]) -> Result<usize> {
    loop {
        // SAFETY: the bytes are readable for their length.
        match unsafe { call(number::WRITE, [fd.arg(), bytes.as_ptr().addr_of(), bytes.len(), 0, 0]) } {
            Err(EINTR) => {}
            result => return result,
        }
    }
}

/// Writes all of the bytes.
pub fn write_all(fd: &Fd, mut bytes: &[u8]) -> Result {
    while !bytes.is_empty() {
        let count = write(fd, bytes)?;
        bytes = bytes.get(count..).unwrap_or_default();
    }
    Ok(())
}

/// Fills the buffer; `false` if the stream ended before.
pub fn read_exact(fd: &Fd, buffer: &mut [u8]) -> Result<bool> {
    let mut filled = 0;
    while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match read(fd, rest)? {
            0 => return Ok(false),
            count => filled += count,
        }
    }
    Ok(true)
}

/// The address of a pointer as a call's argument: the kernel gets at the memory through it.
trait Address {
    fn addr_of(self) -> usize;
}

impl<T> Address for *const T {
    fn addr_of(self) -> usize {
        self.expose_provenance()
    }
}

impl<T> Address for *mut T {
    fn addr_of(self) -> usize {
        self.expose_provenance()
    }
}

/// `AT_FDCWD`, which is -100.
const HERE: usize = usize::MAX - 99;

/// How to open a file. `O_CLOEXEC` and `O_NOCTTY` come on top.
pub mod open {
    /// To read.
    pub const READ: usize = 0;
    /// To write, from its beginning; it is made if it is not there.
    pub const REPLACE: usize = 0o1 | 0o100 | 0o1000;
    /// To read and write.
    pub const BOTH: usize = 0o2;
}

const CLOEXEC: usize = 0o2_000_000;
const NONBLOCK: usize = 0o4000;

/// Opens a file.
pub fn open(path: &CStr, how: usize, mode: u32) -> Result<Fd> {
    let flags = how | CLOEXEC | 0o400;
    let mode = usize::try_from(mode).unwrap_or(0);
    // SAFETY: the path ends with a zero.
    Fd::new(unsafe { call(number::OPENAT, [HERE, path.as_ptr().addr_of(), flags, mode, 0]) })
}

/// Whether something is there.
#[must_use]
pub fn exists(path: &CStr) -> bool {
    // SAFETY: the path ends with a zero.
    unsafe { call(number::FACCESSAT, [HERE, path.as_ptr().addr_of(), 0, 0, 0]) }.is_ok()
}

/// Type and permissions, and size, of an open file.
pub fn stat(fd: &Fd) -> Result<(u32, u64)> {
    // `struct stat` has 128 bytes on arm64 and 144 on x86-64.
    let mut stat = [0u8; 144];
    // SAFETY: the buffer is as long as the structure.
    unsafe { call(number::FSTAT, [fd.arg(), stat.as_mut_ptr().addr_of(), 0, 0, 0]) }?;
    let mode_at = if cfg!(target_arch = "aarch64") { 16 } else { 24 };
    let mode =
        stat.get(mode_at..).and_then(<[u8]>::first_chunk).map_or(0, |bytes| u32::from_le_bytes(*bytes));
    let size = stat.get(48..).and_then(<[u8]>::first_chunk).map_or(0, |bytes| u64::from_le_bytes(*bytes));
    Ok((mode, size))
}

/// Changes an open file's permissions.
pub fn chmod(fd: &Fd, mode: u32) -> Result {
    let mode = usize::try_from(mode & 0o7777).unwrap_or(0);
    // SAFETY: no pointers.
    unsafe { call(number::FCHMOD, [fd.arg(), mode, 0, 0, 0]) }.map(|_| ())
}

/// Changes the directory.
pub fn chdir(path: &CStr) -> Result {
    // SAFETY: the path ends with a zero.
    unsafe { call(number::CHDIR, [path.as_ptr().addr_of(), 0, 0, 0, 0]) }.map(|_| ())
}

/// A pipe: what is read, what is written.
pub fn pipe() -> Result<(Fd, Fd)> {
    let mut ends = [0i32; 2];
    // SAFETY: room for two descriptors, which nobody else owns.
    unsafe { call(number::PIPE2, [ends.as_mut_ptr().addr_of(), CLOEXEC, 0, 0, 0]) }?;
    Ok((Fd(ends[0]), Fd(ends[1])))
}

/// Makes reading and writing return at once.
pub fn set_nonblocking(fd: &Fd) -> Result {
    const SETFL: usize = 4;
    // SAFETY: no pointers.
    unsafe { call(number::FCNTL, [fd.arg(), SETFL, NONBLOCK, 0, 0]) }.map(|_| ())
}

/// Another descriptor of the same file.
pub fn duplicate(fd: &Fd) -> Result<Fd> {
    const DUPFD_CLOEXEC: usize = 1030;
    // SAFETY: no pointers.
    Fd::new(unsafe { call(number::FCNTL, [fd.arg(), DUPFD_CLOEXEC, 3, 0, 0]) })
}

/// Makes descriptor `to` the same file as `fd`, open for the next program.
pub fn duplicate_to(fd: &Fd, to: usize) -> Result {
    if fd.arg() == to {
        const SETFD: usize = 2;
        // SAFETY: no pointers.
        return unsafe { call(number::FCNTL, [to, SETFD, 0, 0, 0]) }.map(|_| ());
    }
    // SAFETY: no pointers.
    unsafe { call(number::DUP3, [fd.arg(), to, 0, 0, 0]) }.map(|_| ())
}

/// A terminal: its master side, and the side for programs.
pub fn terminal(rows: u16, columns: u16) -> Result<(Fd, Fd)> {
    const TIOCSPTLCK: usize = 0x4004_5431;
    const TIOCGPTPEER: usize = 0x5441;
    let master = open(c"/dev/ptmx", open::BOTH, 0)?;
    let unlocked = 0i32;
    // SAFETY: the first call reads one number, the second takes flags.
    let slave = unsafe {
        call(number::IOCTL, [master.arg(), TIOCSPTLCK, (&raw const unlocked).addr_of(), 0, 0])?;
        Fd::new(call(number::IOCTL, [master.arg(), TIOCGPTPEER, open::BOTH | CLOEXEC | 0o400, 0, 0]))?
    };
    set_size(&master, rows, columns)?;
    Ok((master, slave))
}

/// Says how large a terminal is. One without a size keeps what it has.
pub fn set_size(terminal: &Fd, rows: u16, columns: u16) -> Result {
    const TIOCSWINSZ: usize = 0x5414;
    if rows == 0 || columns == 0 {
        return Ok(());
    }
    let size = [rows, columns, 0, 0];
    // SAFETY: the call reads four such numbers.
    unsafe { call(number::IOCTL, [terminal.arg(), TIOCSWINSZ, size.as_ptr().addr_of(), 0, 0]) }.map(|_| ())
}

/// Makes this process the leader of a session, with a terminal if there is one.
pub fn lead_session(terminal: Option<&Fd>) -> Result {
    const TIOCSCTTY: usize = 0x540e;
    // SAFETY: no pointers.
    unsafe { call(number::SETSID, [0; 5]) }?;
    if let Some(terminal) = terminal {
        // SAFETY: no pointers.
        unsafe { call(number::IOCTL, [terminal.arg(), TIOCSCTTY, 0, 0, 0]) }?;
    }
    Ok(())
}

/// Which of the two that a fork makes this one is.
#[derive(Debug)]
pub enum Fork {
    /// The new one.
    Child,
    /// The old one, which gets the other's number.
    Parent(usize),
}

/// Makes a copy of this process.
///
/// # Safety
///
/// In a process with several threads the copy has one, and may use only what needs no locks of the others.
pub unsafe fn fork() -> Result<Fork> {
    const SIGCHLD: usize = 17;
    // SAFETY: the copy has its own memory and goes on with the same stack.
    match unsafe { call(number::CLONE, [SIGCHLD, 0, 0, 0, 0]) }? {
        0 => Ok(Fork::Child),
        child => Ok(Fork::Parent(child)),
    }
}

/// A file that is readable once a process has ended.
pub fn watch(process: usize) -> Result<Fd> {
    // SAFETY: no pointers.
    Fd::new(unsafe { call(number::PIDFD_OPEN, [process, 0, 0, 0, 0]) })
}

/// Waits for the end of a process: its exit status and the signal that ended it.
pub fn wait(process: usize) -> Result<(u8, u8)> {
    let mut status = 0u32;
    loop {
        // SAFETY: room for one number.
        match unsafe { call(number::WAIT4, [process, (&raw mut status).addr_of(), 0, 0, 0]) } {
            Err(EINTR) => {}
            Err(error) => return Err(error),
            Ok(_) => break,
        }
    }
    let [signal, code, ..] = status.to_le_bytes();
    Ok((code, signal & 0x7f))
}

/// Sends a signal to a process, or with `group` to all of its group.
pub fn kill(process: usize, group: bool, signal: u8) -> Result {
    let target = if group { process.wrapping_neg() } else { process };
    // SAFETY: no pointers.
    unsafe { call(number::KILL, [target, usize::from(signal), 0, 0, 0]) }.map(|_| ())
}

/// What happens at a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disposition {
    /// What the kernel does by itself.
    Default,
    /// Nothing. Children whose end is ignored are not waited for.
    Ignore,
}

/// Chooses what happens at a signal.
pub fn on_signal(signal: u8, what: Disposition) -> Result {
    // `struct sigaction`: handler, flags, a mask, and on x86-64 a restorer.
    let action = [usize::from(what == Disposition::Ignore), 0, 0, 0];
    let pointer = action.as_ptr().addr_of();
    // SAFETY: the structure is at least as long as the kernel's; its mask has 8 bytes.
    unsafe { call(number::RT_SIGACTION, [usize::from(signal), pointer, 0, 8, 0]) }.map(|_| ())
}

/// Lets all signals through.
pub fn unblock_signals() -> Result {
    const SETMASK: usize = 2;
    let none = 0u64;
    // SAFETY: the mask has 8 bytes.
    unsafe { call(number::RT_SIGPROCMASK, [SETMASK, (&raw const none).addr_of(), 0, 8, 0]) }.map(|_| ())
}

/// Becomes another program. Returns only if that failed.
///
/// # Safety
///
/// Both lists end with a null pointer, and everything before it points to a text that ends with a zero.
pub unsafe fn execute(path: &CStr, arguments: &[*const u8], variables: &[*const u8]) -> Errno {
    let pointers =
        [path.as_ptr().addr_of(), arguments.as_ptr().addr_of(), variables.as_ptr().addr_of(), 0, 0];
    // SAFETY: the caller answers for the lists.
    match unsafe { call(number::EXECVE, pointers) } {
        Err(errno) => errno,
        Ok(_) => Errno(0),
    }
}

/// Ends this process.
pub fn exit(status: u8) -> ! {
    loop {
        // SAFETY: no pointers.
        let _ = unsafe { call(number::EXIT_GROUP, [usize::from(status), 0, 0, 0, 0]) };
    }
}

/// Writes everything to disks that belongs there.
pub fn sync() {
    // SAFETY: no pointers.
    let _ = unsafe { call(number::SYNC, [0; 5]) };
}

/// Events of [`poll`].
pub mod event {
    /// There is something to read, or the end.
    pub const READ: i16 = 1;
    /// There is room to write.
    pub const WRITE: i16 = 4;
}

/// What to wait for.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Wait {
    fd: i32,
    events: i16,
    happened: i16,
}

impl Wait {
    /// Waits for events of a file; for nothing without one.
    #[must_use]
    pub fn on(fd: Option<&Fd>, events: i16) -> Self {
        Self { fd: fd.filter(|_| events != 0).map_or(-1, |fd| fd.0), events, happened: 0 }
    }

    /// Whether anything has happened, an error or the end included.
    #[must_use]
    pub const fn happened(&self) -> bool {
        self.happened != 0
    }
}

/// Waits until something happens, or with `look` just looks; gives how many of the files it happened to.
pub fn poll(list: &mut [Wait], look: bool) -> Result<usize> {
    let zero = [0u64; 2];
    let timeout = if look { zero.as_ptr().addr_of() } else { 0 };
    loop {
        // SAFETY: the list is valid for its length; the time is two numbers.
        let result = unsafe { call(number::PPOLL, [list.as_mut_ptr().addr_of(), list.len(), timeout, 0, 0]) };
        match result {
            Err(EINTR) => {}
            result => return result,
        }
    }
}

/// `struct sockaddr_vm`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct VsockAddress {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    rest: [u8; 4],
}

const AF_VSOCK: u16 = 40;

fn vsock() -> Result<Fd> {
    let stream = 1 | CLOEXEC;
    // SAFETY: no pointers.
    Fd::new(unsafe { call(number::SOCKET, [usize::from(AF_VSOCK), stream, 0, 0, 0]) })
}

/// Connects to a port of whoever has the address `cid` on the vsock.
pub fn vsock_connect(cid: u32, port: u32) -> Result<Fd> {
    let socket = vsock()?;
    let address = VsockAddress { family: AF_VSOCK, port, cid, ..VsockAddress::default() };
    let pointer = (&raw const address).addr_of();
    // SAFETY: the address is as long as the call is told.
    unsafe { call(number::CONNECT, [socket.arg(), pointer, size_of::<VsockAddress>(), 0, 0]) }?;
    Ok(socket)
}

/// Says to a connection's other side that nothing more will come.
pub fn end_of_output(connection: &Fd) -> Result {
    const WRITE: usize = 1;
    // SAFETY: no pointers.
    unsafe { call(number::SHUTDOWN, [connection.arg(), WRITE, 0, 0, 0]) }.map(|_| ())
}

/// Listens on a vsock port.
pub fn vsock_listen(port: u32) -> Result<Fd> {
    let socket = vsock()?;
    let address = VsockAddress { family: AF_VSOCK, port, cid: u32::MAX, ..VsockAddress::default() };
    let len = size_of::<VsockAddress>();
    // SAFETY: the address is as long as the call is told.
    unsafe {
        call(number::BIND, [socket.arg(), (&raw const address).addr_of(), len, 0, 0])?;
        call(number::LISTEN, [socket.arg(), 16, 0, 0, 0])?;
    }
    Ok(socket)
}

/// The next connection, and who is at its other end.
pub fn vsock_accept(socket: &Fd) -> Result<(Fd, u32)> {
    let mut address = VsockAddress::default();
    let mut len = u32::try_from(size_of::<VsockAddress>()).unwrap_or(0);
    let pointers = [(&raw mut address).addr_of(), (&raw mut len).addr_of()];
    // SAFETY: the address has the room that the call is told.
    let fd = Fd::new(unsafe { call(number::ACCEPT4, [socket.arg(), pointers[0], pointers[1], CLOEXEC, 0]) })?;
    Ok((fd, address.cid))
}
