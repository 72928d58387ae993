//! The folder's server, asked by the rules and against them.

use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use proptest::prelude::*;

use super::folder::Folder;
use super::wire::{op, valid};
use super::{MAX_MESSAGE, Serve, remote};
use crate::seccomp::Confinement;

const EPERM: i32 = 1;
const ENOENT: i32 = 2;
const ENXIO: i32 = 6;
const EBADF: i32 = 9;
const EINVAL: i32 = 22;
const EROFS: i32 = 30;
const ENOSYS: i32 = 38;
const ESTALE: i32 = 116;

/// A folder with something beside it that nobody may reach.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        static NUMBER: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("realm-share-{}-{number}", std::process::id()));
        std::fs::create_dir_all(path.join("shared/inner")).unwrap();
        std::fs::write(path.join("secret"), "secret").unwrap();
        std::fs::write(path.join("shared/file"), "hello").unwrap();
        Self(path)
    }

    fn shared(&self) -> PathBuf {
        self.0.join("shared")
    }

    fn serve(&self, read_only: bool) -> Guest<Folder> {
        Guest(Folder::open(&self.shared(), read_only).unwrap())
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The guest's side.
struct Guest<S>(S);

type Answer = std::result::Result<Vec<u8>, i32>;

fn request(opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
    let mut bytes = u32::try_from(40 + body.len()).unwrap().to_le_bytes().to_vec();
    bytes.extend(opcode.to_le_bytes());
    bytes.extend(77u64.to_le_bytes());
    bytes.extend(node.to_le_bytes());
    bytes.extend([0; 16]);
    bytes.extend(body);
    bytes
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// Bodies of numbers and names.
fn body(parts: &[&[u8]]) -> Vec<u8> {
    parts.concat()
}

fn named(name: &str) -> Vec<u8> {
    [name.as_bytes(), &[0]].concat()
}

impl<S: Serve> Guest<S> {
    fn ask(&mut self, opcode: u32, node: u64, body: &[u8]) -> Answer {
        let answer = self.0.serve(&request(opcode, node, body), MAX_MESSAGE);
        assert_eq!(u32::from_le_bytes(answer[..4].try_into().unwrap()), u32::try_from(answer.len()).unwrap());
        assert_eq!(word(&answer, 8), 77);
        let error = i32::from_le_bytes(answer[4..8].try_into().unwrap());
        if error == 0 { Ok(answer[16..].to_vec()) } else { Err(-error) }
    }

    fn lookup(&mut self, directory: u64, name: &str) -> std::result::Result<u64, i32> {
        self.ask(op::LOOKUP, directory, &named(name)).map(|entry| word(&entry, 0))
    }

    fn open(&mut self, node: u64, flags: u32) -> std::result::Result<u64, i32> {
        self.ask(op::OPEN, node, &body(&[&flags.to_le_bytes(), &[0; 4]])).map(|opened| word(&opened, 0))
    }

    fn create(
        &mut self,
        directory: u64,
        name: &str,
        flags: u32,
        mode: u32,
    ) -> std::result::Result<(u64, u64), i32> {
        let body = body(&[&flags.to_le_bytes(), &mode.to_le_bytes(), &[0; 8], &named(name)]);
        self.ask(op::CREATE, directory, &body).map(|created| (word(&created, 0), word(&created, 128)))
    }

    fn read(&mut self, handle: u64, offset: u64, size: u32) -> Answer {
        let body = body(&[&handle.to_le_bytes(), &offset.to_le_bytes(), &size.to_le_bytes(), &[0; 20]]);
        self.ask(op::READ, 0, &body)
    }

    fn write(&mut self, handle: u64, offset: u64, data: &[u8]) -> Answer {
        let len = u32::try_from(data.len()).unwrap().to_le_bytes();
        let body = body(&[&handle.to_le_bytes(), &offset.to_le_bytes(), &len, &[0; 20], data]);
        self.ask(op::WRITE, 0, &body)
    }

    fn set(&mut self, node: u64, which: u32, size: u64, mode: u32, owner: (u32, u32)) -> Answer {
        let mut body = vec![0; 88];
        body[..4].copy_from_slice(&which.to_le_bytes());
        body[16..24].copy_from_slice(&size.to_le_bytes());
        body[32..40].copy_from_slice(&1_000_000u64.to_le_bytes());
        body[40..48].copy_from_slice(&2_000_000u64.to_le_bytes());
        body[68..72].copy_from_slice(&mode.to_le_bytes());
        body[76..80].copy_from_slice(&owner.0.to_le_bytes());
        body[80..84].copy_from_slice(&owner.1.to_le_bytes());
        self.ask(op::SETATTR, node, &body)
    }

    /// All names, in answers of `room` bytes.
    fn list(&mut self, node: u64, room: u32) -> Vec<String> {
        let opened = self.ask(op::OPENDIR, node, &[0; 8]).unwrap();
        let (mut names, mut offset) = (Vec::new(), 0u64);
        loop {
            let head = [&opened[..8], &offset.to_le_bytes(), &room.to_le_bytes(), &[0; 20]].concat();
            let answer = self.ask(op::READDIR, node, &head).unwrap();
            assert!(answer.len() <= usize::try_from(room).unwrap());
            if answer.is_empty() {
                self.ask(op::RELEASEDIR, node, &[&opened[..8], &[0; 16]].concat()).unwrap();
                names.sort();
                return names;
            }
            let mut at = 0;
            while at < answer.len() {
                offset = word(&answer, at + 8);
                let len = usize::try_from(word(&answer, at + 16) & 0xffff_ffff).unwrap();
                names.push(String::from_utf8(answer[at + 24..at + 24 + len].to_vec()).unwrap());
                at += (24 + len).next_multiple_of(8);
            }
        }
    }
}

#[test]
fn files_are_read_written_and_listed_and_the_host_sees_it() {
    let scratch = Scratch::new();
    let mut guest = far(Folder::open(&scratch.shared(), false).unwrap());
    let init =
        guest.ask(op::INIT, 0, &body(&[&7u32.to_le_bytes(), &40u32.to_le_bytes(), &[0xff; 8], &[0; 48]]));
    let init = init.unwrap();
    assert_eq!((init.len(), &init[..8]), (64, &[7, 0, 0, 0, 31, 0, 0, 0][..]));
    let file = guest.lookup(1, "file").unwrap();
    assert_eq!(guest.lookup(1, "file"), Ok(file));
    assert_eq!(guest.lookup(1, "missing"), Err(ENOENT));
    let handle = guest.open(file, 2).unwrap();
    assert_eq!(guest.read(handle, 1, 100).unwrap(), b"ello");
    guest.write(handle, 5, b", world").unwrap();
    assert_eq!(std::fs::read(scratch.shared().join("file")).unwrap(), b"hello, world");
    // And the other way round.
    std::fs::write(scratch.shared().join("file"), "new").unwrap();
    assert_eq!(guest.read(handle, 0, 100).unwrap(), b"new");
    assert_eq!(word(&guest.ask(op::GETATTR, file, &[0; 16]).unwrap(), 24), 3);

    let inner = guest.lookup(1, "inner").unwrap();
    let (made, opened) = guest.create(inner, "made", 1, 0o640).unwrap();
    guest.write(opened, 0, b"made").unwrap();
    assert_eq!(guest.set(made, valid::MODE, 0, 0o600, (0, 0)).map(drop), Ok(()));
    assert_eq!(guest.set(made, valid::SIZE, 2, 0, (0, 0)).map(drop), Ok(()));
    guest.set(made, valid::ATIME | valid::MTIME, 0, 0, (0, 0)).unwrap();
    let data = std::fs::metadata(scratch.shared().join("inner/made")).unwrap();
    assert_eq!(
        (data.len(), data.mode() & 0o7777, data.atime(), data.mtime()),
        (2, 0o600, 1_000_000, 2_000_000)
    );
    let long = "n".repeat(200);
    for number in 0..50 {
        guest.create(inner, &format!("{long}{number}"), 1, 0o600).unwrap();
    }
    for room in [300, 4096, 100_000] {
        assert_eq!(guest.list(inner, room).len(), 53);
    }
    assert_eq!(guest.list(1, 4096), [".", "..", "file", "inner"]);

    guest.ask(op::SYMLINK, 1, &[named("link"), named("inner/made")].concat()).unwrap();
    let link = guest.lookup(1, "link").unwrap();
    assert_eq!(guest.ask(op::READLINK, link, &[]).unwrap(), b"inner/made");
    guest.ask(op::LINK, 1, &body(&[&made.to_le_bytes(), &named("again")])).unwrap();
    assert_eq!(guest.lookup(1, "again"), Ok(made));
    let rename = |to: u64, flags: u32, names: [&str; 2]| {
        body(&[&to.to_le_bytes(), &flags.to_le_bytes(), &[0; 4], &named(names[0]), &named(names[1])])
    };
    guest.ask(op::RENAME2, 1, &rename(inner, 0, ["again", "moved"])).unwrap();
    assert!(guest.ask(op::RENAME2, inner, &rename(inner, 1, ["moved", "made"])).is_err());
    assert_eq!(guest.ask(op::RENAME2, inner, &rename(inner, 4, ["moved", "made"])), Err(EINVAL));
    guest.ask(op::MKDIR, 1, &body(&[&0o755u32.to_le_bytes(), &[0; 4], &named("new")])).unwrap();
    guest.ask(op::RMDIR, 1, &named("new")).unwrap();
    guest.ask(op::UNLINK, inner, &named("moved")).unwrap();
    assert_eq!(guest.lookup(inner, "moved"), Err(ENOENT));
    assert_eq!(guest.ask(op::STATFS, 1, &[]).unwrap().len(), 80);
    for flags in [0u32, 1] {
        let body = body(&[&opened.to_le_bytes(), &flags.to_le_bytes(), &[0; 4]]);
        guest.ask(op::FSYNC, 0, &body).unwrap();
    }
    let hole = body(&[&opened.to_le_bytes(), &0u64.to_le_bytes(), &4096u64.to_le_bytes(), &[0; 8]]);
    guest.ask(op::FALLOCATE, 0, &hole).unwrap();
    guest.ask(op::RELEASE, 0, &body(&[&opened.to_le_bytes(), &[0; 16]])).unwrap();
    assert_eq!(guest.ask(22, file, &[0; 16]), Err(ENOSYS));
    assert_eq!(std::fs::read(scratch.0.join("secret")).unwrap(), b"secret");
}

#[test]
fn nothing_leads_out_of_the_folder() {
    let scratch = Scratch::new();
    std::os::unix::fs::symlink("../secret", scratch.shared().join("out")).unwrap();
    std::os::unix::fs::symlink("..", scratch.shared().join("up")).unwrap();
    std::os::unix::fs::symlink(&scratch.0, scratch.shared().join("away")).unwrap();
    let mut guest = scratch.serve(false);
    for name in ["", ".", "..", "/", "../secret", "inner/..", "/etc", "file/"] {
        assert_eq!(guest.lookup(1, name), Err(EINVAL), "{name:?}");
        assert_eq!(guest.create(1, name, 1, 0o600), Err(EINVAL), "{name:?}");
        assert_eq!(guest.ask(op::UNLINK, 1, &named(name)), Err(EINVAL), "{name:?}");
        let names = [named("file"), named(name)].concat();
        assert_eq!(guest.ask(op::RENAME, 1, &[&1u64.to_le_bytes()[..], &names].concat()), Err(EINVAL));
    }
    for name in ["out", "up", "away"] {
        let link = guest.lookup(1, name).unwrap();
        assert!(guest.open(link, 2).is_err() && guest.open(link, 0).is_err());
        assert!(guest.ask(op::OPENDIR, link, &[0; 8]).is_err());
        assert!(guest.lookup(link, "secret").is_err());
        assert!(guest.create(link, "secret", 1, 0o600).is_err());
        assert!(guest.create(1, name, 0o1002, 0o600).is_err());
        assert!(guest.set(link, valid::SIZE, 0, 0, (0, 0)).is_err());
        assert!(guest.set(link, valid::MODE, 0, 0o777, (0, 0)).is_err());
        assert!(guest.ask(op::LINK, 1, &[&link.to_le_bytes()[..], &named("hard")].concat()).is_err());
    }
    // Times of a link are its own.
    let secret = || std::fs::metadata(scratch.0.join("secret")).unwrap();
    let before = (secret().mtime(), secret().mode());
    let out = guest.lookup(1, "out").unwrap();
    guest.set(out, valid::MTIME, 0, 0, (0, 0)).unwrap();
    // A directory that becomes a link between two requests is still the directory.
    let inner = guest.lookup(1, "inner").unwrap();
    std::fs::rename(scratch.shared().join("inner"), scratch.shared().join("inner2")).unwrap();
    std::os::unix::fs::symlink("..", scratch.shared().join("inner")).unwrap();
    assert_eq!(guest.lookup(inner, "secret"), Err(ENOENT));
    guest.create(inner, "here", 1, 0o600).unwrap();
    assert!(scratch.shared().join("inner2/here").exists());
    assert_eq!((secret().mtime(), secret().mode()), before);
    assert_eq!(std::fs::read(scratch.0.join("secret")).unwrap(), b"secret");
    assert_eq!(std::fs::read_dir(&scratch.0).unwrap().count(), 2);
    // Numbers that were never given.
    assert_eq!(guest.lookup(999, "file"), Err(ESTALE));
    assert_eq!(guest.read(999, 0, 1), Err(EBADF));
}

#[test]
fn a_read_only_folder_is_not_changed() {
    let scratch = Scratch::new();
    let mut guest = scratch.serve(true);
    let file = guest.lookup(1, "file").unwrap();
    let handle = guest.open(file, 0).unwrap();
    assert_eq!(guest.read(handle, 0, 9).unwrap(), b"hello");
    for flags in [1, 2] {
        assert_eq!(guest.open(file, flags), Err(EROFS));
    }
    assert!(guest.write(handle, 0, b"x").is_err());
    assert_eq!(guest.create(1, "new", 1, 0o600), Err(EROFS));
    assert_eq!(guest.set(file, valid::SIZE, 0, 0, (0, 0)), Err(EROFS));
    assert_eq!(guest.set(file, valid::MTIME, 0, 0, (0, 0)), Err(EROFS));
    let names = [named("file"), named("other")].concat();
    for (opcode, head) in [
        (op::UNLINK, 0),
        (op::RMDIR, 0),
        (op::MKDIR, 8),
        (op::MKNOD, 16),
        (op::SYMLINK, 0),
        (op::RENAME, 8),
        (op::RENAME2, 16),
        (op::LINK, 8),
        (op::FALLOCATE, 32),
    ] {
        assert_eq!(guest.ask(opcode, 1, &[&vec![1; head][..], &names].concat()), Err(EROFS), "{opcode}");
    }
    assert_eq!(guest.list(1, 4096), [".", "..", "file", "inner"]);
}

#[test]
fn privileges_and_devices_do_not_come_out_of_a_guest() {
    let scratch = Scratch::new();
    let mut guest = far(Folder::open(&scratch.shared(), false).unwrap());
    let file = guest.lookup(1, "file").unwrap();
    // Our own files are the guest's root's, and stay it.
    let attributes = guest.ask(op::GETATTR, file, &[0; 16]).unwrap();
    assert_eq!(word(&attributes, 16 + 68), 0);
    assert!(guest.set(file, valid::UID | valid::GID, 0, 0, (0, 0)).is_ok());
    assert_eq!(guest.set(file, valid::UID, 0, 0, (1000, 0)), Err(EPERM));
    for mode in [0o4755, 0o2755, 0o6755] {
        assert_eq!(guest.set(file, valid::MODE, 0, mode, (0, 0)), Err(EPERM));
        assert_eq!(guest.create(1, "new", 1, mode), Err(EPERM));
    }
    let node = |mode: u32| body(&[&mode.to_le_bytes(), &0x103u32.to_le_bytes(), &[0; 8], &named("node")]);
    for kind in [0o020000, 0o060000, 0o010000, 0o140000] {
        assert_eq!(guest.ask(op::MKNOD, 1, &node(kind | 0o666)), Err(EPERM));
    }
    guest.ask(op::MKNOD, 1, &node(0o100644)).unwrap();
    // A pipe that lies there is not opened: that would wait for somebody.
    let pipe =
        std::ffi::CString::new(scratch.shared().join("pipe").into_os_string().into_encoded_bytes()).unwrap();
    // SAFETY: a terminated path.
    assert_eq!(unsafe { libc::mkfifo(pipe.as_ptr(), 0o600) }, 0);
    let pipe = guest.lookup(1, "pipe").unwrap();
    assert_eq!(guest.open(pipe, 1), Err(ENXIO));
    assert_eq!(guest.create(1, "pipe", 1, 0o600), Err(ENXIO));
    // A program that runs as its owner stops doing so before the guest can change it.
    let program = scratch.shared().join("file");
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o4755)).unwrap();
    guest.open(file, 0).unwrap();
    assert_eq!(program.metadata().unwrap().mode() & 0o7777, 0o4755);
    guest.open(file, 1).unwrap();
    assert_eq!(program.metadata().unwrap().mode() & 0o7777, 0o755);
    assert!(scratch.shared().join("pipe").metadata().unwrap().file_type().is_fifo());
}

#[test]
fn a_guest_that_hoards_meets_a_limit_and_a_reset_frees_all() {
    let scratch = Scratch::new();
    let mut guest = scratch.serve(false);
    let file = guest.lookup(1, "file").unwrap();
    let mut handles = 0;
    while guest.open(file, 0).is_ok() {
        handles += 1;
    }
    assert!((16..=4096).contains(&handles), "{handles}");
    assert_eq!(guest.0.known(), (2, handles));
    // Forgotten as often as it was looked up, and more often.
    guest.lookup(1, "file").unwrap();
    assert!(guest.0.serve(&request(op::FORGET, file, &1u64.to_le_bytes()), 0).is_empty());
    assert!(guest.ask(op::GETATTR, file, &[0; 16]).is_ok());
    let one = [&file.to_le_bytes()[..], &u64::MAX.to_le_bytes()].concat();
    let many = [&u32::MAX.to_le_bytes()[..], &[0; 4], &one].concat();
    assert!(guest.0.serve(&request(op::BATCH_FORGET, 0, &many), 0).is_empty());
    assert_eq!(guest.ask(op::GETATTR, file, &[0; 16]), Err(ESTALE));
    assert!(guest.0.serve(&request(op::FORGET, 1, &u64::MAX.to_le_bytes()), 0).is_empty());
    assert!(guest.lookup(1, "file").is_ok());
    guest.0.reset();
    assert_eq!(guest.0.known(), (1, 0));
}

/// A server that is asked over a socket, in a thread of its own with the filter of a device's.
fn far(folder: Folder) -> Guest<remote::Remote<std::os::unix::net::UnixStream>> {
    let (near, far) = std::os::unix::net::UnixStream::pair().unwrap();
    let far = std::fs::File::from(std::os::fd::OwnedFd::from(far));
    Confinement::On.prepare().unwrap();
    let filter = Confinement::On.device(folder.system_calls()).unwrap();
    std::thread::spawn(move || {
        let mut folder = folder;
        filter.enter().unwrap();
        let _ = remote::serve(far, &mut folder);
    });
    Guest(remote::Remote::new(near))
}

#[test]
fn a_folder_serves_from_far_away() {
    let scratch = Scratch::new();
    let mut guest = far(Folder::open(&scratch.shared(), false).unwrap());
    let file = guest.lookup(1, "file").unwrap();
    let handle = guest.open(file, 2).unwrap();
    let data = vec![7; super::MAX_DATA];
    guest.write(handle, 0, &data).unwrap();
    assert_eq!(guest.read(handle, 0, u32::MAX).unwrap(), data);
    assert!(guest.0.serve(&request(op::FORGET, file, &9u64.to_le_bytes()), 0).is_empty());
    // What is no request has no answer, and the next one has.
    assert!(guest.0.serve(&[1, 2, 3], 100).is_empty());
    assert_eq!(guest.ask(op::GETATTR, file, &[0; 16]), Err(ESTALE));
    guest.0.reset();
    assert_eq!(guest.read(handle, 0, 1), Err(EBADF));
}

#[test]
fn a_folder_whose_machine_is_gone_is_an_error() {
    let (near, far) = std::os::unix::net::UnixStream::pair().unwrap();
    drop(far);
    let mut guest = Guest(remote::Remote::new(near));
    for _ in 0..2 {
        assert_eq!(guest.lookup(1, "file"), Err(5));
        assert!(guest.0.serve(&request(op::FORGET, 1, &[0; 8]), 0).is_empty());
        guest.0.reset();
    }
    // One that sends nonsense is as good as gone.
    let (near, mut far) = std::os::unix::net::UnixStream::pair().unwrap();
    std::io::Write::write_all(&mut far, &[0xff; 64]).unwrap();
    let mut guest = Guest(remote::Remote::new(near));
    assert_eq!(guest.lookup(1, "file"), Err(5));
    assert_eq!(guest.lookup(1, "file"), Err(5));
}

fn untouched(scratch: &Path) {
    assert_eq!(std::fs::read(scratch.join("secret")).unwrap(), b"secret");
    let mut names: Vec<_> =
        std::fs::read_dir(scratch).unwrap().flatten().map(|entry| entry.file_name()).collect();
    names.sort();
    assert_eq!(names, ["secret", "shared"]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(
        std::env::var("REALM_FUZZ_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(200)
    ))]

    /// Whatever is asked, there is an answer or none, and nothing beside the folder changes.
    #[test]
    fn any_request_does_no_harm(
        steps in proptest::collection::vec(
            (0..60u32, 0..12u64, 0..12u64, proptest::collection::vec(any::<u8>(), 0..120), 0..6usize, 0..3usize),
            1..40,
        ),
    ) {
        let scratch = Scratch::new();
        std::os::unix::fs::symlink("../secret", scratch.shared().join("out")).unwrap();
        let mut folder = Folder::open(&scratch.shared(), false).unwrap();
        for (opcode, node, number, mut bytes, name, at) in steps {
            // Small numbers are likely to be those of nodes and handles, and names those that are there.
            if bytes.len() >= 8 {
                bytes[..8].copy_from_slice(&number.to_le_bytes());
            }
            let name = named(["file", "inner", "out", "..", "new", "../secret"][name]);
            let place = [0, 8, 16][at].min(bytes.len());
            bytes.splice(place..place, [&name[..], &name].concat());
            let answer = folder.serve(&request(opcode, node, &bytes), 5000);
            prop_assert!(answer.len() <= 5000);
            drop(folder.serve(&bytes, number.try_into().unwrap()));
        }
        untouched(&scratch.0);
    }
}
