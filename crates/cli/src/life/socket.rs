//! UNIX sockets at any path: an address has room for 108 bytes, a directory's name may be longer.

use std::fs::File;
use std::io::Result;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// Longer paths go through their directory.
const SHORT: usize = 100;

/// Another name for the path, which is valid as long as the file is open.
fn short(path: &Path) -> Result<(PathBuf, Option<File>)> {
    let parts = (path.as_os_str().len() > SHORT).then(|| path.parent().zip(path.file_name())).flatten();
    let Some((directory, name)) = parts else { return Ok((path.to_owned(), None)) };
    let directory = std::fs::OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(directory)?;
    let other = PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd())).join(name);
    Ok((other, Some(directory)))
}

/// Listens.
pub(crate) fn bind(path: &Path) -> Result<UnixListener> {
    let (path, _directory) = short(path)?;
    UnixListener::bind(path)
}

/// Connects.
pub(crate) fn connect(path: &Path) -> Result<UnixStream> {
    let (path, _directory) = short(path)?;
    UnixStream::connect(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_paths_are_paths() {
        let directory =
            std::env::temp_dir().join(format!("realm-{}-{}", "x".repeat(150), std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let listener = bind(&directory.join("s")).unwrap();
        connect(&directory.join("s")).unwrap();
        drop(listener);
        std::fs::remove_dir_all(directory).unwrap();
    }
}
