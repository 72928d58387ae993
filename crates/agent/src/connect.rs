//! `realm connect PORT` in the guest: a program's standard streams become a connection to a service of the host's, as
//! `socat - VSOCK-CONNECT:2:PORT` would have it.

use core::mem::ManuallyDrop;

use crate::server::{HOST, SIGPIPE};
use crate::sys::{self, Disposition, Errno, Fd, Fork, Result};

const SIGKILL: u8 = 9;
const STDIN: i32 = 0;
const STDOUT: i32 = 1;

/// Connects the standard streams with a port of the host until the host ends the connection.
pub fn run(port: u32) -> core::result::Result<(), &'static [u8]> {
    let connection = sys::vsock_connect(HOST, port).map_err(why)?;
    // SAFETY: nothing closes the standard streams.
    let (input, output) =
        unsafe { (ManuallyDrop::new(Fd::from_raw(STDIN)), ManuallyDrop::new(Fd::from_raw(STDOUT))) };
    join(&connection, &input, &output).map_err(|_| &b"the connection to the host broke"[..])
}

/// One process for each direction: neither waits for the other, whatever host and guest do. The end of the input is
/// passed on; the end of what the host says is the end.
pub(crate) fn join(connection: &Fd, input: &Fd, output: &Fd) -> Result {
    sys::on_signal(SIGPIPE, Disposition::Ignore)?;
    // SAFETY: the copy makes kernel calls only.
    let sender = match unsafe { sys::fork() }? {
        Fork::Child => {
            let sent = copy(input, connection).and_then(|()| sys::end_of_output(connection));
            sys::exit(u8::from(sent.is_err()));
        }
        Fork::Parent(sender) => sender,
    };
    let result = copy(connection, output);
    // It may wait for input that nobody needs any more.
    let _ = sys::kill(sender, false, SIGKILL);
    let _ = sys::wait(sender);
    result
}

/// Copies everything up to the end.
fn copy(from: &Fd, to: &Fd) -> Result {
    let mut buffer = [0; 4096];
    loop {
        match sys::read(from, &mut buffer)? {
            0 => return Ok(()),
            count => sys::write_all(to, buffer.get(..count).unwrap_or_default())?,
        }
    }
}

/// What a refusal means, and what to do.
fn why(errno: Errno) -> &'static [u8] {
    match errno.0 {
        // ENODEV; EAFNOSUPPORT, where the driver is not there.
        19 | 97 => b"there is no vsock: the host's `realm run` gives one with --vsock socket=PATH",
        // ECONNRESET, ECONNREFUSED.
        104 | 111 => {
            b"nobody takes connections there: a service of the host listens at the UNIX socket PATH_PORT, where the \
              VMM was started with --vsock socket=PATH"
        }
        // ETIMEDOUT.
        110 => b"the host does not answer",
        _ => b"the kernel refuses the connection",
    }
}
