//! Disk images: raw files and qcow2.
//!
//! The format is what the user says, or what the file's name says; never what its contents say. A guest could write a
//! qcow2 header into a raw disk, and name a file of ours in it.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use imago::file::File;
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{
    DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, PermissiveImplicitOpenGate, Storage,
    StorageOpenOptions,
};

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
    image: FormatAccess<File>,
    read_only: bool,
    id: String,
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
        lock(path, read_only).map_err(failed)?;
        let options = StorageOpenOptions::new().filename(path).write(!read_only);
        let image = match format {
            Format::Raw => {
                let file = File::open(options).map_err(failed)?;
                Raw::builder(file)
                    .write(!read_only)
                    .open(DenyImplicitOpenGate::default())
                    .map(FormatAccess::new)
                    .map_err(failed)?
            }
            Format::Qcow2 => Qcow2::<File>::builder_path(path)
                .write(!read_only)
                .open(PermissiveImplicitOpenGate::default())
                .map(FormatAccess::new)
                .map_err(failed)?,
        };
        let id = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        Ok(Self { image, read_only, id })
    }

    /// Bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.image.size()
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
        self.image.read(bytes, offset)
    }

    /// Writes; the range lies inside the disk.
    pub fn write(&self, bytes: &[u8], offset: u64) -> std::io::Result<()> {
        self.writable()?;
        self.image.write(bytes, offset)
    }

    /// Makes a range read as zeroes.
    pub fn write_zeroes(&self, offset: u64, len: u64) -> std::io::Result<()> {
        self.writable()?;
        self.image.write_zeroes(offset, len)
    }

    /// Forgets a range.
    pub fn discard(&mut self, offset: u64, len: u64) -> std::io::Result<()> {
        self.writable()?;
        // A format that cannot forget does not have to.
        match self.image.discard_to_any(offset, len) {
            Err(error) if error.kind() == std::io::ErrorKind::Unsupported => Ok(()),
            result => result,
        }
    }

    /// Makes everything that was written last.
    pub fn flush(&self) -> std::io::Result<()> {
        self.image.flush()?;
        self.image.sync()
    }

    fn writable(&self) -> std::io::Result<()> {
        if self.read_only { Err(std::io::ErrorKind::PermissionDenied.into()) } else { Ok(()) }
    }
}

/// Takes the file's lock for as long as this process lives.
fn lock(path: &Path, read_only: bool) -> std::io::Result<()> {
    use std::os::fd::IntoRawFd as _;
    let file = std::fs::OpenOptions::new().read(true).write(!read_only).open(path)?;
    let kind = if read_only { libc::LOCK_SH } else { libc::LOCK_EX };
    // Kept open on purpose: the lock belongs to the open file.
    let fd = file.into_raw_fd();
    // SAFETY: a system call on a descriptor that we own.
    if unsafe { libc::flock(fd, kind | libc::LOCK_NB) } != 0 {
        return Err(std::io::Error::other("another process uses it"));
    }
    Ok(())
}
