//! Files that come and go.

use core::ffi::CStr;

use crate::protocol::{LONGEST, kind};
use crate::server::{NONSENSE, TOO_LONG, fail, receive, send, text};
use crate::sys::{self, Errno, Fd, Result, open};

/// The longest path.
pub(crate) const PATH_MAX: usize = 4096;
const IS_DIRECTORY: Errno = Errno(21);
const TYPE: u32 = 0o170_000;
const DIRECTORY: u32 = 0o040_000;

/// Writes a file.
pub(crate) fn put(connection: &Fd, contents: &[u8]) -> Result {
    let (mode, rest) = contents.split_first_chunk().ok_or(NONSENSE)?;
    let mode = u32::from_le_bytes(*mode) & 0o7777;
    let (path, rest) = text(rest)?;
    let (name, _) = text(rest)?;
    let mut joined = [0; PATH_MAX];
    let path = if is_directory(path) { join(path.to_bytes(), name, &mut joined)? } else { path };
    let file = match sys::open(path, open::REPLACE, mode) {
        Ok(file) => file,
        Err(errno) => return fail(connection, errno, path.to_bytes()),
    };
    let mut buffer = [0; LONGEST];
    loop {
        match receive(connection, &mut buffer)? {
            Some((kind::INPUT, [])) => break,
            Some((kind::INPUT, bytes)) => {
                if let Err(errno) = sys::write_all(&file, bytes) {
                    return fail(connection, errno, path.to_bytes());
                }
            }
            Some(_) => return Err(NONSENSE),
            None => return Ok(()),
        }
    }
    // What is no plain file may have permissions that do not change.
    let _ = sys::chmod(&file, mode);
    send(connection, kind::EXIT, &[0, 0])
}

/// Reads a file.
pub(crate) fn get(connection: &Fd, contents: &[u8]) -> Result {
    let (path, _) = text(contents)?;
    let opened = sys::open(path, open::READ, 0).and_then(|file| {
        let (mode, size) = sys::stat(&file)?;
        if mode & TYPE == DIRECTORY { Err(IS_DIRECTORY) } else { Ok((file, mode, size)) }
    });
    let (file, mode, size) = match opened {
        Ok(opened) => opened,
        Err(errno) => return fail(connection, errno, path.to_bytes()),
    };
    let mut meta = [0; 12];
    let (first, last) = meta.split_at_mut(4);
    first.copy_from_slice(&(mode & 0o7777).to_le_bytes());
    last.copy_from_slice(&size.to_le_bytes());
    send(connection, kind::META, &meta)?;
    let mut buffer = [0; LONGEST];
    loop {
        match sys::read(&file, &mut buffer) {
            Ok(0) => return send(connection, kind::EXIT, &[0, 0]),
            Ok(count) => send(connection, kind::OUTPUT, buffer.get(..count).unwrap_or_default())?,
            Err(errno) => return fail(connection, errno, path.to_bytes()),
        }
    }
}

fn is_directory(path: &CStr) -> bool {
    sys::open(path, open::READ, 0)
        .and_then(|file| sys::stat(&file))
        .is_ok_and(|(mode, _)| mode & TYPE == DIRECTORY)
}

/// `directory/name`.
pub(crate) fn join<'a>(directory: &[u8], name: &CStr, buffer: &'a mut [u8; PATH_MAX]) -> Result<&'a CStr> {
    for (at, byte) in directory.iter().chain(b"/").chain(name.to_bytes_with_nul()).enumerate() {
        *buffer.get_mut(at).ok_or(TOO_LONG)? = *byte;
    }
    CStr::from_bytes_until_nul(buffer).map_err(|_| TOO_LONG)
}
