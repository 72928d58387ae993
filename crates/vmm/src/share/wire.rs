//! Requests and answers of FUSE, protocol 7, as they lie in memory (`linux/fuse.h`).

use std::ffi::CStr;

use rustix::fs::Statx;
use rustix::io::Errno;

/// The protocol that is spoken; a newer kernel speaks this one with us.
pub(super) const VERSION: (u32, u32) = (7, 31);
/// The folder itself.
pub(super) const ROOT: u64 = 1;
/// The longest name in a directory.
const LONGEST_NAME: usize = 255;

/// What is asked for.
pub(super) mod op {
    pub(crate) const LOOKUP: u32 = 1;
    pub(crate) const FORGET: u32 = 2;
    pub(crate) const GETATTR: u32 = 3;
    pub(crate) const SETATTR: u32 = 4;
    pub(crate) const READLINK: u32 = 5;
    pub(crate) const SYMLINK: u32 = 6;
    pub(crate) const MKNOD: u32 = 8;
    pub(crate) const MKDIR: u32 = 9;
    pub(crate) const UNLINK: u32 = 10;
    pub(crate) const RMDIR: u32 = 11;
    pub(crate) const RENAME: u32 = 12;
    pub(crate) const LINK: u32 = 13;
    pub(crate) const OPEN: u32 = 14;
    pub(crate) const READ: u32 = 15;
    pub(crate) const WRITE: u32 = 16;
    pub(crate) const STATFS: u32 = 17;
    pub(crate) const RELEASE: u32 = 18;
    pub(crate) const FSYNC: u32 = 20;
    pub(crate) const INIT: u32 = 26;
    pub(crate) const OPENDIR: u32 = 27;
    pub(crate) const READDIR: u32 = 28;
    pub(crate) const RELEASEDIR: u32 = 29;
    pub(crate) const FSYNCDIR: u32 = 30;
    pub(crate) const CREATE: u32 = 35;
    pub(crate) const INTERRUPT: u32 = 36;
    pub(crate) const DESTROY: u32 = 38;
    pub(crate) const BATCH_FORGET: u32 = 42;
    pub(crate) const FALLOCATE: u32 = 43;
    pub(crate) const RENAME2: u32 = 45;
}

/// What INIT agrees on.
pub(super) mod feature {
    pub(crate) const ASYNC_READ: u32 = 1 << 0;
    pub(crate) const BIG_WRITES: u32 = 1 << 5;
    pub(crate) const AUTO_INVAL_DATA: u32 = 1 << 12;
    pub(crate) const PARALLEL_DIROPS: u32 = 1 << 18;
    pub(crate) const MAX_PAGES: u32 = 1 << 22;
}

/// Which fields of SETATTR count.
pub(super) mod valid {
    pub(crate) const MODE: u32 = 1 << 0;
    pub(crate) const UID: u32 = 1 << 1;
    pub(crate) const GID: u32 = 1 << 2;
    pub(crate) const SIZE: u32 = 1 << 3;
    pub(crate) const ATIME: u32 = 1 << 4;
    pub(crate) const MTIME: u32 = 1 << 5;
    pub(crate) const HANDLE: u32 = 1 << 6;
    pub(crate) const ATIME_NOW: u32 = 1 << 7;
    pub(crate) const MTIME_NOW: u32 = 1 << 8;
}

/// GETATTR names an open file.
pub(super) const GETATTR_HANDLE: u32 = 1;
/// FSYNC wants the data only.
pub(super) const FSYNC_DATA: u32 = 1;

/// Flags of open(2) as the guest's kernel writes them; the same on all architectures of interest.
pub(super) mod open {
    pub(crate) const ACCESS: u32 = 3;
    pub(crate) const WRITE_ONLY: u32 = 1;
    pub(crate) const READ_WRITE: u32 = 2;
    pub(crate) const EXCLUSIVE: u32 = 0o200;
    pub(crate) const TRUNCATE: u32 = 0o1000;
}

/// What every request begins with.
#[derive(Debug, Clone, Copy)]
pub(super) struct Header {
    pub(super) opcode: u32,
    pub(super) unique: u64,
    pub(super) node: u64,
}

/// A request that is read from its beginning to its end.
#[derive(Debug)]
pub(super) struct Request<'a>(&'a [u8]);

impl<'a> Request<'a> {
    /// The header, and the rest. `None`: this is no request.
    pub(super) fn parse(bytes: &'a [u8]) -> Option<(Header, Self)> {
        let mut all = Self(bytes);
        let len = usize::try_from(all.u32().ok()?).ok()?;
        let opcode = all.u32().ok()?;
        let (unique, node) = (all.u64().ok()?, all.u64().ok()?);
        // Who asks, in the guest's words, is of no interest.
        all.skip(16).ok()?;
        let rest = len.checked_sub(40).and_then(|len| all.0.get(..len))?;
        Some((Header { opcode, unique, node }, Self(rest)))
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], Errno> {
        let (first, rest) = self.0.split_first_chunk().ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(*first)
    }

    pub(super) fn u32(&mut self) -> Result<u32, Errno> {
        Ok(u32::from_le_bytes(self.take()?))
    }

    pub(super) fn u64(&mut self) -> Result<u64, Errno> {
        Ok(u64::from_le_bytes(self.take()?))
    }

    pub(super) fn skip(&mut self, len: usize) -> Result<(), Errno> {
        self.0 = self.0.get(len..).ok_or(Errno::INVAL)?;
        Ok(())
    }

    /// The next `len` bytes.
    pub(super) fn data(&mut self, len: u32) -> Result<&'a [u8], Errno> {
        let len = usize::try_from(len).map_err(|_| Errno::INVAL)?;
        let (data, rest) = self.0.split_at_checked(len).ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(data)
    }

    /// A text up to its zero.
    pub(super) fn text(&mut self) -> Result<&'a CStr, Errno> {
        let text = CStr::from_bytes_until_nul(self.0).map_err(|_| Errno::INVAL)?;
        self.skip(text.count_bytes() + 1)?;
        Ok(text)
    }

    /// The name of an entry of a directory: one component, and neither the directory itself nor the one above.
    pub(super) fn name(&mut self) -> Result<&'a CStr, Errno> {
        let name = self.text()?;
        match name.to_bytes() {
            b"" | b"." | b".." => Err(Errno::INVAL),
            bytes if bytes.contains(&b'/') => Err(Errno::INVAL),
            bytes if bytes.len() > LONGEST_NAME => Err(Errno::NAMETOOLONG),
            _ => Ok(name),
        }
    }
}

/// An answer that is written from its beginning to its end.
#[derive(Debug, Default)]
pub(super) struct Answer(Vec<u8>);

impl Answer {
    pub(super) fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub(super) fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub(super) fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    /// `fuse_attr`.
    pub(super) fn attributes(self, data: &Statx, owner: (u32, u32)) -> Self {
        let seconds = |time: i64| u64::from_le_bytes(time.to_le_bytes());
        self.u64(data.stx_ino)
            .u64(data.stx_size)
            .u64(data.stx_blocks)
            .u64(seconds(data.stx_atime.tv_sec))
            .u64(seconds(data.stx_mtime.tv_sec))
            .u64(seconds(data.stx_ctime.tv_sec))
            .u32(data.stx_atime.tv_nsec)
            .u32(data.stx_mtime.tv_nsec)
            .u32(data.stx_ctime.tv_nsec)
            .u32(u32::from(data.stx_mode))
            .u32(data.stx_nlink)
            .u32(owner.0)
            .u32(owner.1)
            .u32(0)
            .u32(data.stx_blksize)
            .u32(0)
    }

    /// Adds `fuse_dirent`, if there is room for it in `room` bytes.
    pub(super) fn entry(&mut self, room: usize, ino: u64, next: u64, kind: u32, name: &[u8]) -> bool {
        let len = (24 + name.len()).next_multiple_of(8);
        let Some(end) = self.0.len().checked_add(len).filter(|end| *end <= room) else { return false };
        self.0.extend(ino.to_le_bytes());
        self.0.extend(next.to_le_bytes());
        self.0.extend(u32::try_from(name.len()).unwrap_or(0).to_le_bytes());
        self.0.extend(kind.to_le_bytes());
        self.0.extend(name);
        self.0.resize(end, 0);
        true
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}

/// A finished answer.
pub(super) fn finish(unique: u64, result: Result<Answer, Errno>) -> Vec<u8> {
    let (error, body) = match result {
        Ok(answer) => (0, answer.0),
        Err(errno) => (-errno.raw_os_error(), Vec::new()),
    };
    let len = u32::try_from(16 + body.len()).unwrap_or(u32::MAX);
    let mut bytes = len.to_le_bytes().to_vec();
    bytes.extend(error.to_le_bytes());
    bytes.extend(unique.to_le_bytes());
    bytes.extend(body);
    bytes
}

/// What is answered when whoever should answer is gone.
pub(super) fn gone(request: &[u8]) -> Vec<u8> {
    match Request::parse(request) {
        Some((header, _)) if wants_answer(header.opcode) => finish(header.unique, Err(Errno::IO)),
        _ => Vec::new(),
    }
}

/// Whether a request is answered at all.
pub(super) fn wants_answer(opcode: u32) -> bool {
    !matches!(opcode, op::FORGET | op::BATCH_FORGET | op::INTERRUPT)
}
