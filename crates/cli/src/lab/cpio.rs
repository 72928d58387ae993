//! Writes initramfs archives: cpio's "newc" form, as the kernel's `init/initramfs.c` reads it.
//!
//! The same input gives the same bytes: times and owners are zero, inode numbers count up, there are no hard
//! links. Archives may be concatenated: the kernel unpacks one after the other, and a later file of the same
//! name replaces the earlier one.

use std::fmt::Write as _;

/// File type bits of `st_mode`.
const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;
const CHARACTER: u32 = 0o020_000;

/// An archive that grows entry by entry.
pub(crate) struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

impl Archive {
    /// An empty archive.
    pub(crate) fn new() -> Self {
        Self { bytes: Vec::new(), inode: 0 }
    }

    /// Adds a directory. Parents must be added first.
    pub(crate) fn directory(&mut self, path: &str) {
        self.entry(path, DIRECTORY | 0o755, 2, (0, 0), &[]);
    }

    /// Adds a regular file.
    pub(crate) fn file(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.entry(path, REGULAR | mode, 1, (0, 0), content);
    }

    /// Adds a symbolic link to `target`.
    pub(crate) fn symlink(&mut self, path: &str, target: &str) {
        self.entry(path, SYMLINK | 0o777, 1, (0, 0), target.as_bytes());
    }

    /// Adds a character device: the kernel opens `/dev/console` before anything is mounted.
    pub(crate) fn character_device(&mut self, path: &str, mode: u32, major: u32, minor: u32) {
        self.entry(path, CHARACTER | mode, 1, (major, minor), &[]);
    }

    /// Ends the archive and gives its bytes, padded so that another archive can follow.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.inode = 0;
        self.header("TRAILER!!!", 0, 1, (0, 0), 0, 0);
        while self.bytes.len() % 512 != 0 {
            self.bytes.push(0);
        }
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, links: u32, device: (u32, u32), content: &[u8]) {
        self.inode += 1;
        let inode = self.inode;
        let path = path.trim_start_matches('/');
        self.header(path, mode, links, device, content.len(), inode);
        self.bytes.extend_from_slice(content);
        self.align();
    }

    fn header(&mut self, path: &str, mode: u32, links: u32, device: (u32, u32), size: usize, inode: u32) {
        let mut header = String::from("070701");
        let size = u32::try_from(size).unwrap_or(u32::MAX);
        let name = u32::try_from(path.len() + 1).unwrap_or(u32::MAX);
        // ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
        for field in [inode, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1, name, 0] {
            let _ = write!(header, "{field:08x}");
        }
        self.bytes.extend_from_slice(header.as_bytes());
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.align();
    }

    fn align(&mut self) {
        while self.bytes.len() % 4 != 0 {
            self.bytes.push(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_has_a_110_byte_header_and_is_padded_to_four() {
        let mut archive = Archive::new();
        archive.file("/a", 0o644, b"12345");
        // 110 bytes of header and "a\0" are 112; five bytes of content are padded to eight.
        assert_eq!(archive.bytes.len(), 120);
        assert_eq!(&archive.bytes[..6], b"070701");
        assert_eq!(&archive.bytes[14..22], b"000081a4");
        assert_eq!(&archive.bytes[54..62], b"00000005");
        assert_eq!(&archive.bytes[110..117], b"a\x0012345");
    }

    #[test]
    fn the_same_input_gives_the_same_bytes_in_whole_blocks() {
        let build = || {
            let mut archive = Archive::new();
            archive.directory("dev");
            archive.character_device("dev/console", 0o600, 5, 1);
            archive.symlink("bin/sh", "busybox");
            archive.finish()
        };
        assert_eq!(build(), build());
        assert_eq!(build().len() % 512, 0);
    }
}
