//! Disk images: raw files and qcow2.
//!
//! The format is what the user says, or what the file's name says; never what its contents say. A guest could write a
//! qcow2 header into a raw disk, and name a file of ours in it. For the same reason a qcow2 image may stand on other files
//! only if they lie in its own directory or below.

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use imago::file::File;
use imago::format::gate::ImplicitOpenGate;
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, Storage, StorageOpenOptions};

use crate::ordered::Ordered;
use crate::qcow2::{self, Header};
use crate::{Error, Result};

/// How a disk's bytes are arranged in its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// One after the other.
    Raw,
    /// QEMU's copy-on-write format, versions 2 and 3.
    Qcow2,
}

impl Format {
    /// What the file's name says.
    #[must_use]
    pub fn of(path: &Path) -> Self {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("qcow2") => Self::Qcow2,
            _ => Self::Raw,
        }
    }
}

impl FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "raw" => Ok(Self::Raw),
            "qcow2" => Ok(Self::Qcow2),
            _ => Err(format!("`{text}` is no disk format; there are raw and qcow2")),
        }
    }
}

/// An open image.
pub struct Disk {
    image: Image<File>,
    read_only: bool,
    id: String,
    /// Holds the lock for as long as the image is open.
    _lock: std::fs::File,
}

impl fmt::Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Disk").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Disk {
    /// Opens an image. Two writers of one image would destroy it, so writers take a lock.
    pub fn open(path: &Path, format: Format, read_only: bool) -> Result<Self> {
        let failed = |error: std::io::Error| Error::os(format_args!("the disk {}", path.display()), &error);
        let lock = lock(path, read_only).map_err(failed)?;
        let options = StorageOpenOptions::new().filename(path).write(!read_only);
        let file = File::open(options).map_err(failed)?;
        let image = match format {
            Format::Raw => Raw::builder(Ordered::plain(file))
                .write(!read_only)
                .open(DenyImplicitOpenGate::default())
                .map(|raw| Image { access: FormatAccess::new(raw), parts: None }),
            Format::Qcow2 => Beside::new(path).and_then(|gate| Image::qcow2(file, &lock, !read_only, gate)),
        }
        .map_err(failed)?;
        let id = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        Ok(Self { image, read_only, id, _lock: lock })
    }

    /// Bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.image.access.size()
    }

    /// Whether nothing can be written.
    #[must_use]
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// A name that the guest sees.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Reads; the range lies inside the disk.
    pub fn read(&self, bytes: &mut [u8], offset: u64) -> std::io::Result<()> {
        self.image.access.read(bytes, offset)
    }

    /// Writes; the range lies inside the disk.
    pub fn write(&mut self, bytes: &[u8], offset: u64) -> std::io::Result<()> {
        self.writable()?;
        self.image.write(bytes, offset)
    }

    /// Makes a range read as zeroes.
    pub fn write_zeroes(&mut self, offset: u64, len: u64) -> std::io::Result<()> {
        self.writable()?;
        self.image.write_zeroes(offset, len)
    }

    /// Forgets a range.
    pub fn discard(&mut self, offset: u64, len: u64) -> std::io::Result<()> {
        self.writable()?;
        self.image.discard(offset, len)
    }

    /// Makes everything that was written last.
    pub fn flush(&self) -> std::io::Result<()> {
        self.image.flush()
    }

    fn writable(&self) -> std::io::Result<()> {
        if self.read_only { Err(std::io::ErrorKind::PermissionDenied.into()) } else { Ok(()) }
    }
}

/// An image on any storage.
struct Image<S: Storage + 'static> {
    access: FormatAccess<Ordered<S>>,
    parts: Option<Parts>,
}

/// What is mapped by one table each of a qcow2 image.
struct Parts {
    size: u64,
    /// Those that have been changed.
    changed: BTreeSet<u64>,
}

impl<S: Storage + 'static> Image<S> {
    /// Opens the qcow2 image that both `storage` and `file` are.
    fn qcow2(
        storage: S,
        file: &std::fs::File,
        write: bool,
        gate: impl ImplicitOpenGate<Ordered<S>>,
    ) -> std::io::Result<Self> {
        let header = Header::read(file)?;
        let uncounted = qcow2::settle(file, &header, write)?;
        if uncounted > 0 {
            eprintln!(
                "realm: a disk was cut off from its power: counted {uncounted} of its clusters as used"
            );
        }
        let parts = Parts { size: header.reach(), changed: BTreeSet::new() };
        let storage = Ordered::of_image(storage, file, header)?;
        let image = Qcow2::<Ordered<S>>::builder(storage).write(write).open(gate)?;
        Ok(Self { access: FormatAccess::new(image), parts: Some(parts) })
    }

    fn write(&mut self, bytes: &[u8], offset: u64) -> std::io::Result<()> {
        self.prepare(offset, u64::try_from(bytes.len()).map_err(std::io::Error::other)?)?;
        self.access.write(bytes, offset)
    }

    fn write_zeroes(&mut self, offset: u64, len: u64) -> std::io::Result<()> {
        self.prepare(offset, len)?;
        self.access.write_zeroes(offset, len)
    }

    fn discard(&mut self, offset: u64, len: u64) -> std::io::Result<()> {
        self.prepare(offset, len)?;
        // A format that cannot forget does not have to.
        match self.access.discard_to_any(offset, len) {
            Err(error) if error.kind() == std::io::ErrorKind::Unsupported => Ok(()),
            result => result,
        }
    }

    fn flush(&self) -> std::io::Result<()> {
        self.access.flush()?;
        self.access.sync()
    }

    /// The first change in a part of a qcow2 image may make a table, in a place that has become free a moment ago. The table
    /// that named that place before has to be written by then.
    fn prepare(&mut self, offset: u64, len: u64) -> std::io::Result<()> {
        let Some(Parts { size, changed }) = &mut self.parts else { return Ok(()) };
        let last = offset.saturating_add(len.saturating_sub(1)) / *size;
        let before = changed.len();
        changed.extend(offset / *size..=last);
        if changed.len() > before { self.access.flush() } else { Ok(()) }
    }
}

/// Which files an image may stand on.
struct Beside {
    directory: PathBuf,
    /// How many more layers there may be: an image that stands on itself has no end.
    layers: u32,
}

impl Beside {
    const LAYERS: u32 = 16;

    fn new(image: &Path) -> std::io::Result<Self> {
        let image = image.canonicalize()?;
        let directory = image.parent().unwrap_or(Path::new("/")).to_owned();
        Ok(Self { directory, layers: Self::LAYERS })
    }
}

impl ImplicitOpenGate<Ordered<File>> for Beside {
    fn open_format<F: FormatDriverBuilder<Ordered<File>>>(
        &mut self,
        builder: F,
    ) -> std::io::Result<FormatAccess<Ordered<File>>> {
        let layers = self.layers.checked_sub(1);
        let layers = layers.ok_or_else(|| std::io::Error::other("it stands on too many other images"))?;
        let inner = Self { directory: self.directory.clone(), layers };
        Ok(FormatAccess::new(builder.open(inner)?))
    }

    fn open_storage(&mut self, options: StorageOpenOptions) -> std::io::Result<Ordered<File>> {
        let path = options.get_filename().ok_or(std::io::ErrorKind::InvalidInput)?.canonicalize()?;
        if !path.starts_with(&self.directory) || !path.is_file() {
            let what = format!("it stands on {}, which does not lie beside it", path.display());
            return Err(std::io::Error::new(std::io::ErrorKind::PermissionDenied, what));
        }
        File::open(options).map(Ordered::plain)
    }
}

/// Makes a new, empty qcow2 image of `size` bytes.
pub fn create_qcow2(path: &Path, size: u64) -> Result<()> {
    use imago::FormatCreateBuilder as _;
    let failed = |error: std::io::Error| Error::os(format_args!("creating {}", path.display()), &error);
    let options = imago::StorageCreateOptions::new().filename(path).overwrite(true);
    let file = <File as Storage>::create_open(options).map_err(failed)?;
    Qcow2::<File>::create_builder(file).size(size).create().map_err(failed)
}

/// Takes the file's lock, which the returned file holds.
fn lock(path: &Path, read_only: bool) -> std::io::Result<std::fs::File> {
    use std::os::fd::AsRawFd as _;
    let file = std::fs::OpenOptions::new().read(true).write(!read_only).open(path)?;
    let kind = if read_only { libc::LOCK_SH } else { libc::LOCK_EX };
    // SAFETY: a system call on a descriptor that we own.
    if unsafe { libc::flock(file.as_raw_fd(), kind | libc::LOCK_NB) } != 0 {
        return Err(std::io::Error::other("another process uses it"));
    }
    Ok(file)
}

#[cfg(test)]
#[path = "power_tests.rs"]
mod power_tests;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    fn scratch() -> std::path::PathBuf {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        std::env::temp_dir().join(format!("realm-qcow2-{}-{number}", std::process::id()))
    }

    #[test]
    fn an_image_stands_on_its_neighbours_only_and_not_on_itself() {
        let directory = scratch();
        std::fs::create_dir_all(directory.join("inner")).unwrap();
        let overlay = |name: &str, base: &str| {
            use imago::FormatCreateBuilder as _;
            let path = directory.join(name);
            let options = imago::StorageCreateOptions::new().filename(&path).overwrite(true);
            let file = <File as Storage>::create_open(options).unwrap();
            let builder = Qcow2::<File>::create_builder(file).size(1 << 20);
            builder.backing(base.to_owned(), "raw".to_owned()).create().unwrap();
            path
        };
        let raw = directory.join("base.img");
        std::fs::write(&raw, vec![9; 1 << 20]).unwrap();
        let mut good = Disk::open(&overlay("good", "base.img"), Format::Qcow2, false).unwrap();
        let mut bytes = [0; 512];
        good.read(&mut bytes, 4096).unwrap();
        assert_eq!(bytes, [9; 512]);
        good.write(&[1; 512], 4096).unwrap();
        assert_eq!(std::fs::read(&raw).unwrap()[4096], 9);
        for base in ["/etc/hostname", "/dev/zero", "nothing"] {
            assert!(Disk::open(&overlay("bad", base), Format::Qcow2, false).is_err(), "{base}");
        }
        let outside = overlay("inner/outside", directory.join("base.img").to_str().unwrap());
        assert!(Disk::open(&outside, Format::Qcow2, false).is_err());
        std::fs::remove_dir_all(directory).unwrap();
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(
            std::env::var("REALM_FUZZ_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(100)
        ))]

        /// Whatever is in an image's file, opening and using it gives data or an error.
        #[test]
        fn a_broken_image_is_an_error(
            changes in proptest::collection::vec((0..5usize, any::<u16>(), any::<u8>()), 1..8),
            cut in proptest::option::of(0..300_000u64),
        ) {
            let path = scratch();
            create_qcow2(&path, 1 << 20).unwrap();
            {
                let mut disk = Disk::open(&path, Format::Qcow2, false).unwrap();
                disk.write(&[7; 4096], 0x1_0000).unwrap();
                disk.flush().unwrap();
            }
            let mut bytes = std::fs::read(&path).unwrap();
            for (cluster, offset, value) in changes {
                // The header matters most.
                let offset = usize::from(offset) % if cluster == 0 { 112 } else { 64 };
                if let Some(byte) = bytes.get_mut(cluster * 0x1_0000 + offset) {
                    *byte = value;
                }
            }
            std::fs::write(&path, &bytes).unwrap();
            if let Some(cut) = cut {
                std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(cut).unwrap();
            }
            if let Ok(mut disk) = Disk::open(&path, Format::Qcow2, false) {
                for at in [0, 0x1_0000, 0x8_0000] {
                    let _ = disk.read(&mut [0; 4096], at);
                    let _ = disk.write(&[1; 512], at);
                    let _ = disk.write_zeroes(at, 4096);
                    let _ = disk.discard(at, 4096);
                }
                let _ = disk.flush();
            }
            std::fs::remove_file(path).unwrap();
        }
    }
}
