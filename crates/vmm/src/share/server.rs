//! FUSE requests and their answers.
//!
//! Names are looked up each time, because somebody on the host may change the folder as well; attributes may be a second old.
//! Nothing is kept back: a write has reached the host's kernel when it is answered.

use std::mem::MaybeUninit;

use rustix::fs::{
    AtFlags, FallocateFlags, FileType, OFlags, RawDir, RenameFlags, SeekFrom, Statx, Timespec, Timestamps,
};
use rustix::io::Errno;

use super::folder::{Done, Folder, new_mode, stat};
use super::wire::{self, Answer, Header, Request, feature, op, open, valid};
use super::{MAX_DATA, Serve};
use crate::calls;
use crate::seccomp::Call;

/// How long the guest may believe attributes, in seconds.
const ATTRIBUTES_HOLD: u64 = 1;
/// Requests that the guest may have under way beside those that somebody waits for.
const BACKGROUND: u32 = 16;
/// `UTIME_NOW` and `UTIME_OMIT`.
const NOW: Timespec = Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_NOW };
const OMIT: Timespec = Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_OMIT };
/// What the guest is told about `..`, whose real number may lie outside.
const UNKNOWN_INODE: u64 = 0xffff_ffff;

impl Serve for Folder {
    fn serve(&mut self, request: &[u8], room: usize) -> Vec<u8> {
        // Without a header there is nobody to answer.
        let Some((header, request)) = Request::parse(request) else { return Vec::new() };
        if !wire::wants_answer(header.opcode) {
            let _ = self.forgets(header, request);
            return Vec::new();
        }
        let Some(room) = room.checked_sub(16) else { return Vec::new() };
        let result = self.answer(header, request, room);
        // What does not fit was asked for with too little room.
        wire::finish(
            header.unique,
            result.and_then(|answer| if answer.len() > room { Err(Errno::RANGE) } else { Ok(answer) }),
        )
    }

    fn system_calls(&self) -> &'static [Call] {
        // All files that are not open yet are opened through `/proc`, which a filter cannot tell from other paths.
        calls![
            fallocate, fchmod, fchmodat, fdatasync, fstatfs, fsync, ftruncate, getdents64, linkat, lseek,
            mkdirat, openat, pread64, pwrite64, readlinkat, renameat2, statx, symlinkat, unlinkat, utimensat,
        ]
    }

    fn reset(&mut self) {
        Folder::reset(self);
    }
}

/// Whether a request can change the folder. Opening for writing is refused where it is opened.
fn changes(opcode: u32) -> bool {
    use op::*;
    matches!(
        opcode,
        SETATTR
            | SYMLINK
            | MKNOD
            | MKDIR
            | UNLINK
            | RMDIR
            | RENAME
            | RENAME2
            | LINK
            | WRITE
            | CREATE
            | FALLOCATE
    )
}

impl Folder {
    fn forgets(&mut self, header: Header, mut request: Request<'_>) -> Done {
        match header.opcode {
            op::FORGET => self.forget(header.node, request.u64()?),
            op::BATCH_FORGET => {
                let count = request.u32()?;
                request.skip(4)?;
                // More than are there end at the end of the request.
                for _ in 0..count {
                    let (node, lookups) = (request.u64()?, request.u64()?);
                    self.forget(node, lookups);
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn answer(&mut self, header: Header, mut request: Request<'_>, room: usize) -> Done<Answer> {
        let request = &mut request;
        let node = header.node;
        if self.read_only && changes(header.opcode) {
            return Err(Errno::ROFS);
        }
        match header.opcode {
            op::INIT => self.init(request),
            op::DESTROY => {
                Folder::reset(self);
                Ok(Answer::default())
            }
            op::LOOKUP => self.entry(node, request.name()?),
            op::GETATTR => {
                let flags = request.u32()?;
                request.skip(4)?;
                let handle = request.u64()?;
                // An open file may have no name any more, and its node be forgotten.
                match self.opened(handle, false) {
                    Ok(file) if flags & wire::GETATTR_HANDLE != 0 => Ok(self.attributes(&stat(file)?)),
                    _ => Ok(self.attributes(&self.stat(node)?)),
                }
            }
            op::SETATTR => self.set_attributes(node, request),
            op::READLINK => Ok(Answer::default().bytes(self.read_link(node)?.to_bytes())),
            op::SYMLINK => {
                let (name, target) = (request.name()?, request.text()?);
                rustix::fs::symlinkat(target, self.directory(node)?, name)?;
                self.entry(node, name)
            }
            op::MKNOD => {
                let mode = request.u32()?;
                request.skip(12)?;
                let name = request.name()?;
                // Devices, pipes and sockets are for the kernel that they belong to.
                if FileType::from_raw_mode(mode) != FileType::RegularFile {
                    return Err(Errno::PERM);
                }
                self.create(node, name, OFlags::WRONLY, mode)?;
                self.entry(node, name)
            }
            op::MKDIR => {
                let mode = request.u32()?;
                request.skip(4)?;
                let name = request.name()?;
                rustix::fs::mkdirat(self.directory(node)?, name, new_mode(mode)?)?;
                self.entry(node, name)
            }
            op::UNLINK => self.remove(node, request, AtFlags::empty()),
            op::RMDIR => self.remove(node, request, AtFlags::REMOVEDIR),
            op::RENAME => {
                let to = request.u64()?;
                self.rename(node, to, request, RenameFlags::empty())
            }
            op::RENAME2 => {
                let (to, flags) = (request.u64()?, request.u32()?);
                request.skip(4)?;
                let allowed = RenameFlags::NOREPLACE | RenameFlags::EXCHANGE;
                let flags = RenameFlags::from_bits(flags).filter(|flags| allowed.contains(*flags));
                self.rename(node, to, request, flags.ok_or(Errno::INVAL)?)
            }
            op::LINK => {
                let old = request.u64()?;
                let name = request.name()?;
                self.link(old, node, name)?;
                self.entry(node, name)
            }
            op::OPEN => {
                let access = self.access(request.u32()?)?;
                Ok(opened(self.open_node(node, access, false)?))
            }
            op::OPENDIR => Ok(opened(self.open_node(node, OFlags::RDONLY, true)?)),
            op::CREATE => self.create_and_open(node, request),
            op::READ => {
                let (handle, offset, size) = (request.u64()?, request.u64()?, request.u32()?);
                let size = usize::try_from(size).unwrap_or(usize::MAX).min(room).min(MAX_DATA);
                let mut bytes = vec![0; size];
                let got = rustix::io::pread(self.opened(handle, false)?, &mut bytes[..], offset)?;
                Ok(Answer::default().bytes(&bytes[..got]))
            }
            op::WRITE => {
                let (handle, offset, size) = (request.u64()?, request.u64()?, request.u32()?);
                request.skip(20)?;
                let data = request.data(size)?;
                let wrote = rustix::io::pwrite(self.opened(handle, false)?, data, offset)?;
                Ok(Answer::default().u32(u32::try_from(wrote).unwrap_or(0)).u32(0))
            }
            op::FALLOCATE => {
                let (handle, offset, len) = (request.u64()?, request.u64()?, request.u64()?);
                let allowed =
                    FallocateFlags::KEEP_SIZE | FallocateFlags::PUNCH_HOLE | FallocateFlags::ZERO_RANGE;
                let mode = FallocateFlags::from_bits(request.u32()?).filter(|mode| allowed.contains(*mode));
                let mode = mode.ok_or(Errno::OPNOTSUPP)?;
                rustix::fs::fallocate(self.opened(handle, false)?, mode, offset, len)?;
                Ok(Answer::default())
            }
            op::FSYNC | op::FSYNCDIR => {
                let (handle, flags) = (request.u64()?, request.u32()?);
                let file = self.opened(handle, header.opcode == op::FSYNCDIR)?;
                if flags & wire::FSYNC_DATA != 0 {
                    rustix::fs::fdatasync(file)?;
                } else {
                    rustix::fs::fsync(file)?;
                }
                Ok(Answer::default())
            }
            op::RELEASE | op::RELEASEDIR => {
                self.close(request.u64()?);
                Ok(Answer::default())
            }
            op::READDIR => {
                let (handle, offset, size) = (request.u64()?, request.u64()?, request.u32()?);
                self.list(handle, offset, usize::try_from(size).unwrap_or(usize::MAX).min(room))
            }
            op::STATFS => {
                let space = self.space(node)?;
                let small = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
                Ok([space.f_blocks, space.f_bfree, space.f_bavail, space.f_files, space.f_ffree]
                    .into_iter()
                    .fold(Answer::default(), Answer::u64)
                    .u32(small(space.f_bsize))
                    .u32(small(space.f_namemax))
                    .u32(small(space.f_frsize))
                    .bytes(&[0; 28]))
            }
            // The guest's kernel does without the others: locks are its own, permissions it checks itself.
            _ => Err(Errno::NOSYS),
        }
    }

    fn init(&mut self, request: &mut Request<'_>) -> Done<Answer> {
        let (major, _minor) = (request.u32()?, request.u32()?);
        let (readahead, offered) = (request.u32()?, request.u32()?);
        if major < wire::VERSION.0 {
            return Err(Errno::PROTO);
        }
        Folder::reset(self);
        let wanted = feature::ASYNC_READ
            | feature::BIG_WRITES
            | feature::AUTO_INVAL_DATA
            | feature::PARALLEL_DIROPS
            | feature::MAX_PAGES;
        let most = u32::try_from(MAX_DATA).unwrap_or(0);
        let pages = most / 4096;
        Ok(Answer::default()
            .u32(wire::VERSION.0)
            .u32(wire::VERSION.1)
            .u32(readahead.min(most))
            .u32(offered & wanted)
            // Two halves: the most background requests, and when they are many.
            .u32(BACKGROUND | (BACKGROUND * 3 / 4) << 16)
            .u32(most)
            // Times are kept to the nanosecond.
            .u32(1)
            .u32(pages)
            .bytes(&[0; 32]))
    }

    /// `fuse_entry_out`: the name is asked for again next time.
    fn entry(&mut self, directory: u64, name: &std::ffi::CStr) -> Done<Answer> {
        let (number, data) = self.lookup(directory, name)?;
        let answer = Answer::default().u64(number).u64(0).u64(0).u64(ATTRIBUTES_HOLD).u64(0);
        Ok(answer.attributes(&data, self.owner(&data)))
    }

    /// `fuse_attr_out`.
    fn attributes(&self, data: &Statx) -> Answer {
        Answer::default().u64(ATTRIBUTES_HOLD).u64(0).attributes(data, self.owner(data))
    }

    fn set_attributes(&mut self, node: u64, request: &mut Request<'_>) -> Done<Answer> {
        let which = request.u32()?;
        request.skip(4)?;
        let (handle, size) = (request.u64()?, request.u64()?);
        request.skip(8)?;
        let (atime, mtime) = (request.u64()?, request.u64()?);
        request.skip(8)?;
        let (atime_nsec, mtime_nsec) = (request.u32()?, request.u32()?);
        request.skip(4)?;
        let mode = request.u32()?;
        request.skip(4)?;
        let (uid, gid) = (request.u32()?, request.u32()?);
        let has = |bit| which & bit != 0;

        let (shown_uid, shown_gid) = self.owner(&self.stat(node)?);
        // Nobody here can give files away; to ask for what is so already does no harm.
        if has(valid::UID) && uid != shown_uid || has(valid::GID) && gid != shown_gid {
            return Err(Errno::PERM);
        }
        if has(valid::SIZE) {
            match self.opened(handle, false) {
                Ok(file) if has(valid::HANDLE) => rustix::fs::ftruncate(file, size)?,
                _ => rustix::fs::ftruncate(self.file(node, OFlags::WRONLY)?, size)?,
            }
        }
        if has(valid::MODE) {
            self.set_mode(node, mode)?;
        }
        if has(valid::ATIME | valid::MTIME) {
            let time = |set, now, seconds: u64, nanoseconds: u32| match (has(set), has(now)) {
                (false, _) => OMIT,
                (true, true) => NOW,
                (true, false) => Timespec {
                    tv_sec: i64::from_le_bytes(seconds.to_le_bytes()),
                    tv_nsec: nanoseconds.into(),
                },
            };
            self.set_times(
                node,
                &Timestamps {
                    last_access: time(valid::ATIME, valid::ATIME_NOW, atime, atime_nsec),
                    last_modification: time(valid::MTIME, valid::MTIME_NOW, mtime, mtime_nsec),
                },
            )?;
        }
        Ok(self.attributes(&self.stat(node)?))
    }

    fn remove(&self, directory: u64, request: &mut Request<'_>, flags: AtFlags) -> Done<Answer> {
        rustix::fs::unlinkat(self.directory(directory)?, request.name()?, flags)?;
        Ok(Answer::default())
    }

    fn rename(&self, from: u64, to: u64, request: &mut Request<'_>, flags: RenameFlags) -> Done<Answer> {
        let (old, new) = (request.name()?, request.name()?);
        rustix::fs::renameat_with(self.directory(from)?, old, self.directory(to)?, new, flags)?;
        Ok(Answer::default())
    }

    /// How a file is to be opened. The guest's kernel sees to appending, and whatever else it may ask for.
    fn access(&self, flags: u32) -> Done<OFlags> {
        let access = match flags & open::ACCESS {
            open::WRITE_ONLY => OFlags::WRONLY,
            open::READ_WRITE => OFlags::RDWR,
            _ => return Ok(OFlags::RDONLY),
        };
        if self.read_only { Err(Errno::ROFS) } else { Ok(access) }
    }

    fn create_and_open(&mut self, directory: u64, request: &mut Request<'_>) -> Done<Answer> {
        let (flags, mode) = (request.u32()?, request.u32()?);
        request.skip(8)?;
        let name = request.name()?;
        let access = self.access(flags)?;
        let (entry, file) = match self.create(directory, name, access, mode) {
            Ok(file) => (self.lookup(directory, name)?, file),
            // Somebody on the host was faster.
            Err(Errno::EXIST) if flags & open::EXCLUSIVE == 0 => {
                let entry = self.lookup(directory, name)?;
                let file = self.file(entry.0, access).and_then(|file| {
                    if flags & open::TRUNCATE != 0 && access != OFlags::RDONLY {
                        rustix::fs::ftruncate(&file, 0)?;
                    }
                    Ok(file)
                });
                match file {
                    Ok(file) => (entry, file),
                    Err(error) => {
                        self.forget(entry.0, 1);
                        return Err(error);
                    }
                }
            }
            Err(error) => return Err(error),
        };
        let (number, data) = entry;
        let handle = self.handle(file, false).inspect_err(|_| self.forget(number, 1))?;
        let answer = Answer::default().u64(number).u64(0).u64(0).u64(ATTRIBUTES_HOLD).u64(0);
        Ok(answer.attributes(&data, self.owner(&data)).u64(handle).u64(0))
    }

    fn list(&self, handle: u64, offset: u64, room: usize) -> Done<Answer> {
        let directory = self.opened(handle, true)?;
        rustix::fs::seek(directory, SeekFrom::Start(offset))?;
        let mut buffer = vec![MaybeUninit::uninit(); 16 << 10];
        let mut entries = RawDir::new(directory, &mut buffer);
        let mut answer = Answer::default();
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            let inode = if name == b".." { UNKNOWN_INODE } else { entry.ino() };
            let kind = entry.file_type().as_raw_mode() >> 12;
            if !answer.entry(room, inode, entry.next_entry_cookie(), kind, name) {
                break;
            }
        }
        Ok(answer)
    }
}

/// `fuse_open_out`.
fn opened(handle: u64) -> Answer {
    Answer::default().u64(handle).u64(0)
}
