//! What goes into the guest's memory before it starts, and in which order: the Realm's measurement depends on it.

use crate::image::Image;
use crate::layout::{Contents, Layout};
use crate::{Error, Result, fdt};

const PAGE: u64 = cca_abi::GRANULE_SIZE;

/// Bytes that have to be in memory at an address.
#[derive(Debug)]
pub struct Segment {
    /// What it is, for people.
    pub name: &'static str,
    /// Its first byte's guest physical address.
    pub address: u64,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// A guest, ready to be put into memory.
#[derive(Debug)]
pub struct Plan {
    /// Where everything lies.
    pub layout: Layout,
    /// Contents in ascending order.
    pub segments: Vec<Segment>,
}

impl Plan {
    /// Lays out a guest.
    pub fn new(
        ram_size: u64,
        cpus: u32,
        kernel: Image,
        initrd: Option<Vec<u8>>,
        cmdline: &str,
        conduit: fdt::Conduit,
    ) -> Result<Self> {
        let contents = Contents {
            kernel_file: len(&kernel.bytes)?,
            kernel_image: kernel.image_size,
            text_offset: kernel.text_offset,
            initrd: initrd.as_deref().map(len).transpose()?,
        };
        let layout = Layout::new(ram_size, cpus, contents)?;
        let dtb = fdt::build(&layout, cmdline, conduit)?;
        let mut segments = vec![Segment { name: "kernel", address: layout.kernel, bytes: kernel.bytes }];
        if let (Some((address, _)), Some(bytes)) = (layout.initrd, initrd) {
            segments.push(Segment { name: "initramfs", address, bytes });
        }
        segments.push(Segment { name: "device tree", address: layout.dtb, bytes: dtb });
        Ok(Self { layout, segments })
    }

    /// The whole pages that hold contents, as (address, size), ascending and without overlap.
    pub fn populated(&self) -> Result<Vec<(u64, u64)>> {
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        for segment in &self.segments {
            let start = segment.address & !(PAGE - 1);
            let end = (segment.address + len(&segment.bytes)?).next_multiple_of(PAGE);
            match ranges.last_mut() {
                Some((base, size)) if *base + *size >= start => *size = (*size).max(end - *base),
                _ => ranges.push((start, end - start)),
            }
        }
        Ok(ranges)
    }
}

fn len(bytes: &[u8]) -> Result<u64> {
    u64::try_from(bytes.len()).map_err(|_| Error::vmm("a file is too large"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(initrd: usize) -> Plan {
        let kernel = Image { bytes: vec![1; 5000], text_offset: 0, image_size: 1 << 20 };
        Plan::new(64 << 20, 1, kernel, Some(vec![2; initrd]), "quiet", fdt::Conduit::Smc).unwrap()
    }

    #[test]
    fn only_pages_with_contents_are_populated_in_ascending_order() {
        // The initramfs ends where the device tree begins, so both are one range.
        assert_eq!(plan(5000).populated().unwrap(), [(0x8000_0000, 0x2000), (0x83df_e000, 0x1_2000)]);
    }

    #[test]
    fn an_empty_initramfs_is_none() {
        assert_eq!(plan(0).segments.len(), 2);
        assert_eq!(plan(0).populated().unwrap(), [(0x8000_0000, 0x2000), (0x83e0_0000, 0x1_0000)]);
    }
}
