//! `--disk`.

use std::path::PathBuf;

use vmm::disk::{Disk, Format};
use vmm::virtio::Device;
use vmm::virtio::block::Block;

/// One disk as the user names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DiskArg {
    /// The image.
    pub(crate) path: PathBuf,
    /// Its format.
    pub(crate) format: Format,
    /// Whether the guest may only read it.
    pub(crate) read_only: bool,
}

/// Parses `FILE[,ro][,format=F]`.
pub(crate) fn parse(text: &str) -> Result<DiskArg, String> {
    let mut words = text.split(',');
    let path = PathBuf::from(words.next().filter(|path| !path.is_empty()).ok_or("a file is expected")?);
    let mut disk = DiskArg { format: Format::of(&path), path, read_only: false };
    for word in words {
        match word.split_once('=') {
            None if word == "ro" => disk.read_only = true,
            Some(("format", format)) => disk.format = format.parse()?,
            _ => return Err(format!("`{word}` is none of ro, format=raw, format=qcow2")),
        }
    }
    Ok(disk)
}

/// Opens all disks.
pub(crate) fn open(disks: &[DiskArg]) -> vmm::Result<Vec<Box<dyn Device>>> {
    disks
        .iter()
        .enumerate()
        .map(|(number, disk)| {
            let image = Disk::open(&disk.path, disk.format, disk.read_only)?;
            Ok(Box::new(Block::new(image, number)) as Box<dyn Device>)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_a_file_with_words() {
        let disk = |path: &str, format, read_only| Ok(DiskArg { path: path.into(), format, read_only });
        assert_eq!(parse("a.img"), disk("a.img", Format::Raw, false));
        assert_eq!(parse("a.qcow2,ro"), disk("a.qcow2", Format::Qcow2, true));
        assert_eq!(parse("a.qcow2,format=raw"), disk("a.qcow2", Format::Raw, false));
        for wrong in ["", ",ro", "a,rw", "a,format=vdi", "a,ro=1"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
