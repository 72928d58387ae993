//! The folder's files, and how they are reached.
//!
//! A guest names files by numbers, and each number that it may use stands for a file that this process holds open with
//! `O_PATH`. New numbers come from looking up a single name in a directory that has one, without following a symbolic
//! link. So there is no path that a guest could bend: `..`, links and races with a rename lead nowhere, because nothing is
//! ever resolved but one name in one directory. What a link says is text for the guest's own kernel.
//!
//! Everything is done as the user who runs this process: the host's permissions decide. That user appears as root in the
//! guest, everybody else as nobody. Files are opened if they are regular, directories are listed; devices, sockets and
//! pipes can be seen and removed, and that is all. Nothing can become set-user-ID.

use std::collections::HashMap;
use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, Statx, StatxFlags};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::wire::ROOT;
use crate::{Error, Result};

/// The most files that a guest can have looked up, and the most that it can have open.
const MOST_NODES: usize = 16 << 10;
const MOST_HANDLES: usize = 4 << 10;
/// Nobody, in the guest.
const NOBODY: u32 = 65534;
/// `S_ISUID` and `S_ISGID`.
const SET_ID: u32 = 0o6000;

/// What the calls here give.
pub(super) type Done<T = ()> = std::result::Result<T, Errno>;

/// The folder, what a guest knows of it, and what it has open.
#[derive(Debug)]
pub struct Folder {
    pub(super) read_only: bool,
    nodes: HashMap<u64, Node>,
    by_inode: HashMap<Inode, u64>,
    handles: HashMap<u64, Handle>,
    /// Numbers are never used again.
    next: u64,
    most_nodes: usize,
    most_handles: usize,
    user: (u32, u32),
}

/// Device and number. Held open, an inode keeps its number.
type Inode = (u32, u32, u64);

/// A file that the guest knows.
#[derive(Debug)]
struct Node {
    /// Opened with `O_PATH`.
    file: OwnedFd,
    kind: FileType,
    inode: Inode,
    lookups: u64,
}

/// A file that the guest has open.
#[derive(Debug)]
struct Handle {
    file: OwnedFd,
    directory: bool,
}

impl Folder {
    /// Opens a folder of this machine.
    pub fn open(path: &Path, read_only: bool) -> Result<Self> {
        let failed = |error: Errno| Error::os(format_args!("the folder {}", path.display()), &error.into());
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let file = rustix::fs::open(path, flags, Mode::empty()).map_err(failed)?;
        let data = stat(file.as_fd()).map_err(failed)?;
        let (inode, kind) = (inode(&data), FileType::Directory);
        let files = raise_limit();
        Ok(Self {
            read_only,
            nodes: HashMap::from([(ROOT, Node { file, kind, inode, lookups: 1 })]),
            by_inode: HashMap::from([(inode, ROOT)]),
            handles: HashMap::new(),
            next: ROOT + 1,
            most_nodes: MOST_NODES.min(files / 4),
            most_handles: MOST_HANDLES.min(files / 8),
            user: (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw()),
        })
    }

    /// Forgets everything that the guest knows or has open.
    pub(super) fn reset(&mut self) {
        self.handles.clear();
        self.nodes.retain(|number, _| *number == ROOT);
        self.by_inode.retain(|_, number| *number == ROOT);
    }

    fn node(&self, number: u64) -> Done<&Node> {
        self.nodes.get(&number).ok_or(Errno::STALE)
    }

    /// The directory in which a name is to be looked up, made or removed.
    pub(super) fn directory(&self, number: u64) -> Done<BorrowedFd<'_>> {
        let node = self.node(number)?;
        if node.kind == FileType::Directory { Ok(node.file.as_fd()) } else { Err(Errno::NOTDIR) }
    }

    /// Whose a file is, in the guest's eyes.
    pub(super) fn owner(&self, data: &Statx) -> (u32, u32) {
        let shown = |id, own| if id == own { 0 } else { NOBODY };
        (shown(data.stx_uid, self.user.0), shown(data.stx_gid, self.user.1))
    }

    /// Looks a name up, and counts that the guest knows the file now.
    pub(super) fn lookup(&mut self, directory: u64, name: &CStr) -> Done<(u64, Statx)> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(self.directory(directory)?, name, flags, Mode::empty())?;
        let data = stat(file.as_fd())?;
        let inode = inode(&data);
        if let Some(number) = self.by_inode.get(&inode) {
            if let Some(node) = self.nodes.get_mut(number) {
                node.lookups = node.lookups.saturating_add(1);
                return Ok((*number, data));
            }
        }
        if self.nodes.len() >= self.most_nodes {
            return Err(Errno::NFILE);
        }
        let number = self.number();
        let kind = FileType::from_raw_mode(data.stx_mode.into());
        self.nodes.insert(number, Node { file, kind, inode, lookups: 1 });
        self.by_inode.insert(inode, number);
        Ok((number, data))
    }

    /// The guest forgets some of its look-ups.
    pub(super) fn forget(&mut self, number: u64, lookups: u64) {
        let Some(node) = self.nodes.get_mut(&number).filter(|_| number != ROOT) else { return };
        node.lookups = node.lookups.saturating_sub(lookups);
        if node.lookups == 0 {
            self.by_inode.remove(&node.inode);
            self.nodes.remove(&number);
        }
    }

    fn number(&mut self) -> u64 {
        let number = self.next;
        self.next += 1;
        number
    }

    /// A file's attributes.
    pub(super) fn stat(&self, number: u64) -> Done<Statx> {
        stat(self.node(number)?.file.as_fd())
    }

    /// Opens what the guest knows for reading, writing or listing.
    pub(super) fn open_node(&mut self, number: u64, access: OFlags, directory: bool) -> Done<u64> {
        let file = if directory {
            self.reopen(number, access | OFlags::DIRECTORY)?
        } else {
            self.file(number, access)?
        };
        self.handle(file, directory)
    }

    /// Opens a regular file.
    pub(super) fn file(&self, number: u64, access: OFlags) -> Done<OwnedFd> {
        match self.node(number)?.kind {
            FileType::RegularFile => {}
            FileType::Directory => return Err(Errno::ISDIR),
            FileType::Symlink => return Err(Errno::LOOP),
            _ => return Err(Errno::NXIO),
        }
        let file = self.reopen(number, access)?;
        if access.intersects(OFlags::WRONLY | OFlags::RDWR) {
            // Who changes a program must not do so as its owner: the kernel sees to that for everybody but root.
            let mode = u32::from(stat(file.as_fd())?.stx_mode);
            if mode & SET_ID != 0 {
                rustix::fs::fchmod(&file, Mode::from_raw_mode(mode & 0o1777))?;
            }
        }
        Ok(file)
    }

    fn reopen(&self, number: u64, access: OFlags) -> Done<OwnedFd> {
        let open = |more| {
            let flags = access | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY | more;
            rustix::fs::openat(CWD, self.proc_path(number)?, flags, Mode::empty())
        };
        // Reading leaves no trace in a folder that must not be changed, where that may be asked for.
        if self.read_only {
            match open(OFlags::NOATIME) {
                Err(Errno::PERM) => {}
                result => return result,
            }
        }
        open(OFlags::empty())
    }

    /// The name under which the kernel leads to exactly this file.
    fn proc_path(&self, number: u64) -> Done<String> {
        Ok(format!("/proc/self/fd/{}", self.node(number)?.file.as_raw_fd()))
    }

    /// Keeps an open file for the guest.
    pub(super) fn handle(&mut self, file: OwnedFd, directory: bool) -> Done<u64> {
        if self.handles.len() >= self.most_handles {
            return Err(Errno::NFILE);
        }
        let number = self.number();
        self.handles.insert(number, Handle { file, directory });
        Ok(number)
    }

    /// An open file, or an open directory.
    pub(super) fn opened(&self, handle: u64, directory: bool) -> Done<BorrowedFd<'_>> {
        let handle = self.handles.get(&handle).filter(|handle| handle.directory == directory);
        Ok(handle.ok_or(Errno::BADF)?.file.as_fd())
    }

    /// The guest closes a file.
    pub(super) fn close(&mut self, handle: u64) {
        self.handles.remove(&handle);
    }

    /// Makes a new file; an error if the name is taken.
    pub(super) fn create(&self, directory: u64, name: &CStr, access: OFlags, mode: u32) -> Done<OwnedFd> {
        let flags = access | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::openat(self.directory(directory)?, name, flags, new_mode(mode)?)
    }

    /// Changes permissions. Set-user-ID and set-group-ID can go, and not come.
    pub(super) fn set_mode(&self, number: u64, mode: u32) -> Done {
        let old = u32::from(self.stat(number)?.stx_mode);
        match self.node(number)?.kind {
            FileType::Symlink => Err(Errno::OPNOTSUPP),
            _ if mode & SET_ID & !old != 0 => Err(Errno::PERM),
            _ => {
                let mode = Mode::from_raw_mode(mode & 0o7777);
                rustix::fs::chmodat(CWD, self.proc_path(number)?, mode, AtFlags::empty())
            }
        }
    }

    /// Changes times.
    pub(super) fn set_times(&self, number: u64, times: &rustix::fs::Timestamps) -> Done {
        let flags = AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW;
        rustix::fs::utimensat(&self.node(number)?.file, c"", times, flags)
    }

    /// Gives a regular file one more name.
    pub(super) fn link(&self, number: u64, directory: u64, name: &CStr) -> Done {
        if self.node(number)?.kind != FileType::RegularFile {
            return Err(Errno::PERM);
        }
        let (old, to) = (self.proc_path(number)?, self.directory(directory)?);
        rustix::fs::linkat(CWD, old, to, name, AtFlags::SYMLINK_FOLLOW)
    }

    /// What a symbolic link says.
    pub(super) fn read_link(&self, number: u64) -> Done<std::ffi::CString> {
        let node = self.node(number)?;
        if node.kind != FileType::Symlink {
            return Err(Errno::INVAL);
        }
        rustix::fs::readlinkat(&node.file, c"", Vec::new())
    }

    /// The file system's size and what is free of it.
    pub(super) fn space(&self, number: u64) -> Done<rustix::fs::StatVfs> {
        rustix::fs::fstatvfs(&self.node(number)?.file)
    }

    #[cfg(test)]
    pub(super) fn known(&self) -> (usize, usize) {
        (self.nodes.len(), self.handles.len())
    }
}

/// The mode of something new.
pub(super) fn new_mode(mode: u32) -> Done<Mode> {
    if mode & SET_ID != 0 { Err(Errno::PERM) } else { Ok(Mode::from_raw_mode(mode & 0o1777)) }
}

/// Attributes of an open file, however it was opened.
pub(super) fn stat(file: BorrowedFd<'_>) -> Done<Statx> {
    rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW, StatxFlags::BASIC_STATS)
}

fn inode(data: &Statx) -> Inode {
    (data.stx_dev_major, data.stx_dev_minor, data.stx_ino)
}

/// Lets this process have as many files open as it may; says how many.
fn raise_limit() -> usize {
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
    let now = getrlimit(Resource::Nofile).current;
    now.map_or(usize::MAX, |files| usize::try_from(files).unwrap_or(usize::MAX))
}
