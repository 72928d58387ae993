//! Who may connect, and what becomes of a connection.

use core::ffi::CStr;

use crate::protocol::{LONGEST, PORT, VERSION, header, kind, parse};
use crate::sys::{self, Disposition, Errno, Fd, Fork, Result};
use crate::{exec, files};

/// The host's address on a vsock.
pub(crate) const HOST: u32 = 2;
pub(crate) const SIGPIPE: u8 = 13;
const SIGCHLD: u8 = 17;

/// A request that makes no sense: `EPROTO`.
pub(crate) const NONSENSE: Errno = Errno(71);
/// `ENAMETOOLONG`.
pub(crate) const TOO_LONG: Errno = Errno(36);

/// Serves the host until the machine is switched off. Returns if there is no vsock.
pub fn serve() -> Result {
    // Nobody waits for the processes of sessions.
    sys::on_signal(SIGCHLD, Disposition::Ignore)?;
    let socket = sys::vsock_listen(PORT)?;
    loop {
        let Ok((connection, who)) = sys::vsock_accept(&socket) else { continue };
        // A program in the guest is not the host, and must not get the agent's rights.
        if who != HOST {
            continue;
        }
        // SAFETY: this process has one thread.
        if let Ok(Fork::Child) = unsafe { sys::fork() } {
            session(&connection);
            sys::exit(0);
        }
    }
}

/// Serves one connection to its end.
pub fn session(connection: &Fd) {
    let _ = sys::on_signal(SIGPIPE, Disposition::Ignore);
    let _ = sys::on_signal(SIGCHLD, Disposition::Default);
    if let Err(errno) = request(connection) {
        let text: &[u8] = if errno == NONSENSE { b"the request makes no sense" } else { b"" };
        let _ = fail(connection, errno, text);
    }
}

fn request(connection: &Fd) -> Result {
    send(connection, kind::HELLO, &VERSION.to_le_bytes())?;
    let mut buffer = [0; LONGEST];
    let Some((what, contents)) = receive(connection, &mut buffer)? else { return Ok(()) };
    match what {
        kind::EXEC => exec::run(connection, contents),
        kind::PUT => files::put(connection, contents),
        kind::GET => files::get(connection, contents),
        kind::POWER_OFF => power_off(connection),
        _ => Err(NONSENSE),
    }
}

/// Asks the first program to switch the machine off, in the way that it understands.
fn power_off(connection: &Fd) -> Result {
    const INIT: usize = 1;
    const SIGUSR2: u8 = 12;
    /// `SIGRTMIN+4`: systemd's poweroff.target.
    const SYSTEMD: u8 = 38;
    sys::sync();
    let signal = if sys::exists(c"/run/systemd/system") { SYSTEMD } else { SIGUSR2 };
    // Before it: a machine may be off sooner than it can speak.
    send(connection, kind::EXIT, &[0, 0])?;
    sys::kill(INIT, false, signal)
}

/// Sends a frame.
pub(crate) fn send(connection: &Fd, what: u8, contents: &[u8]) -> Result {
    sys::write_all(connection, &header(what, contents.len()))?;
    sys::write_all(connection, contents)
}

/// Says what could not be done.
pub(crate) fn fail(connection: &Fd, errno: Errno, text: &[u8]) -> Result {
    let text = text.get(..200).unwrap_or(text);
    sys::write_all(connection, &header(kind::FAILURE, 4 + text.len()))?;
    sys::write_all(connection, &errno.0.to_le_bytes())?;
    sys::write_all(connection, text)
}

/// Waits for a frame; `None` when the other side is gone.
pub(crate) fn receive<'a>(
    connection: &Fd,
    buffer: &'a mut [u8; LONGEST],
) -> Result<Option<(u8, &'a mut [u8])>> {
    let mut head = [0; 4];
    if !sys::read_exact(connection, &mut head)? {
        return Ok(None);
    }
    let (what, len) = parse(head).ok_or(NONSENSE)?;
    let contents = buffer.get_mut(..len).ok_or(NONSENSE)?;
    if !sys::read_exact(connection, contents)? {
        return Ok(None);
    }
    Ok(Some((what, contents)))
}

/// The next text of a request, and what follows it.
pub(crate) fn text(contents: &[u8]) -> Result<(&CStr, &[u8])> {
    let text = CStr::from_bytes_until_nul(contents).map_err(|_| NONSENSE)?;
    Ok((text, contents.get(text.count_bytes() + 1..).unwrap_or_default()))
}
