//! Files of what guests print, who may print for as long as they like: none of them becomes longer than it may.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

/// How long each of the two files of a ring becomes.
const RING: u64 = 8 << 20;
/// How long a file becomes that cannot begin anew.
const CAP: u64 = 64 << 20;

/// A file that is set aside when it is full, in the place of the one that was set aside before.
pub(crate) struct Ring {
    path: PathBuf,
    file: File,
    left: u64,
    limit: u64,
}

impl Ring {
    /// Begins a new file.
    pub(crate) fn create(path: PathBuf) -> std::io::Result<Self> {
        Self::with_limit(path, RING)
    }

    fn with_limit(path: PathBuf, limit: u64) -> std::io::Result<Self> {
        let _ = std::fs::remove_file(older(&path));
        Ok(Self { file: File::create(&path)?, path, left: limit, limit })
    }
}

impl Write for Ring {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.left == 0 {
            std::fs::rename(&self.path, older(&self.path))?;
            self.file = File::create(&self.path)?;
            self.left = self.limit;
        }
        let count = bytes.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let written = self.file.write(&bytes[..count])?;
        self.left = self.left.saturating_sub(u64::try_from(written).unwrap_or(0));
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.flush()
    }
}

/// Where the older half of what was printed to `path` is, if it became too long.
pub(crate) fn older(path: &Path) -> PathBuf {
    path.with_extension("old.log")
}

/// A file whose writers may neither rename nor open anything: it ends with a line that says so.
pub(crate) struct Capped {
    file: File,
    /// Without a limit for a pipe or a device, which no disk holds.
    left: Option<u64>,
}

impl Capped {
    /// Begins a new file, or writes to what is no file.
    pub(crate) fn create(path: &Path) -> std::io::Result<Self> {
        Self::with_limit(path, CAP)
    }

    fn with_limit(path: &Path, limit: u64) -> std::io::Result<Self> {
        let file = File::create(path)?;
        let left = file.metadata()?.is_file().then_some(limit);
        Ok(Self { file, left })
    }

    /// Writes what there is room for.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        let Some(left) = &mut self.left else { return self.file.write_all(bytes) };
        if *left == 0 {
            return Ok(());
        }
        let count = bytes.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
        *left -= u64::try_from(count).unwrap_or(0);
        self.file.write_all(&bytes[..count])?;
        if *left == 0 {
            self.file.write_all(b"\n[kvm-realm: this log is full, and ends here]\n")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("realm-{name}-{}.log", std::process::id()));
        let _ = std::fs::remove_file(&path);
        path
    }

    #[test]
    fn a_ring_keeps_the_newest_bytes_in_two_files() {
        let path = scratch("ring");
        let mut ring = Ring::with_limit(path.clone(), 100).unwrap();
        let printed: Vec<u8> =
            (0..1234_u32).map(|number| b'a' + u8::try_from(number % 26).unwrap()).collect();
        for piece in printed.chunks(7) {
            ring.write_all(piece).unwrap();
            for file in [&path, &older(&path)] {
                assert!(file.metadata().map_or(0, |data| data.len()) <= 100);
            }
        }
        let mut kept = std::fs::read(older(&path)).unwrap();
        kept.extend(std::fs::read(&path).unwrap());
        assert!(kept.len() > 100 && printed.ends_with(&kept));
        // The next run's file says nothing of this one.
        Ring::with_limit(path.clone(), 100).unwrap();
        assert!(!older(&path).exists());
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn a_capped_file_says_that_it_is_full_and_what_is_no_file_is_never_full() {
        let path = scratch("capped");
        let mut capped = Capped::with_limit(&path, 10).unwrap();
        for _ in 0..1000 {
            capped.write(b"abc").unwrap();
        }
        assert_eq!(
            std::fs::read_to_string(&path).unwrap(),
            "abcabcabca\n[kvm-realm: this log is full, and ends here]\n"
        );
        std::fs::remove_file(path).unwrap();
        assert_eq!(Capped::with_limit(Path::new("/dev/null"), 10).unwrap().left, None);
    }
}
