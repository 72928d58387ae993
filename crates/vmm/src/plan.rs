//! What goes into the guest's memory before it starts, and in which order: the Realm's measurement depends on it.

use crate::image::Image;
use crate::layout::{Contents, DTB_SIZE, Layout};
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

/// What shapes a guest beside its contents.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Bytes of RAM.
    pub ram_size: u64,
    /// CPUs.
    pub cpus: u32,
    /// Width of guest physical addresses, if it is to be more than what RAM needs.
    pub ipa_bits: Option<u32>,
    /// Whether there is a PMU.
    pub pmu: bool,
    /// How the guest calls its firmware.
    pub conduit: fdt::Conduit,
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
    pub fn new(shape: Shape, kernel: Image, initrd: Option<Vec<u8>>, cmdline: &str) -> Result<Self> {
        let contents = Contents {
            kernel_file: len(&kernel.bytes)?,
            kernel_image: kernel.image_size,
            text_offset: kernel.text_offset,
            initrd: initrd.as_deref().map(len).transpose()?,
        };
        let layout = Layout::new(shape.ram_size, shape.cpus, contents, shape.ipa_bits)?;
        let dtb = fdt::build(&layout, cmdline, shape.conduit, shape.pmu)?;
        let mut segments = vec![Segment { name: "kernel", address: layout.kernel, bytes: kernel.bytes }];
        if let (Some((address, _)), Some(bytes)) = (layout.initrd, initrd) {
            segments.push(Segment { name: "initramfs", address, bytes });
        }
        segments.push(Segment { name: "device tree", address: layout.dtb, bytes: dtb });
        Ok(Self { layout, segments })
    }

    /// Takes another device tree than our own. It has the same place and the same size, padded with zeroes.
    pub fn replace_device_tree(&mut self, mut blob: Vec<u8>) -> Result<()> {
        const MAGIC: [u8; 4] = 0xd00d_feed_u32.to_be_bytes();
        let size = usize::try_from(DTB_SIZE).unwrap_or(usize::MAX);
        if !blob.starts_with(&MAGIC) || blob.len() > size {
            return Err(Error::vmm(format!("this is no device tree of at most {size} bytes")));
        }
        blob.resize(size, 0);
        let own = self.segments.iter_mut().find(|segment| segment.address == self.layout.dtb);
        own.ok_or_else(|| Error::vmm("there is no device tree to replace"))?.bytes = blob;
        Ok(())
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

    /// One page as it will be populated.
    #[must_use]
    pub fn page(&self, address: u64) -> [u8; 4096] {
        let mut page = [0; 4096];
        for segment in &self.segments {
            // Of the segment's bytes those that lie in the page, and where they begin there.
            let skipped = usize::try_from(address.saturating_sub(segment.address)).unwrap_or(usize::MAX);
            let place = usize::try_from(segment.address.saturating_sub(address)).unwrap_or(usize::MAX);
            if let (Some(from), Some(to)) = (segment.bytes.get(skipped..), page.get_mut(place..)) {
                let len = from.len().min(to.len());
                to[..len].copy_from_slice(&from[..len]);
            }
        }
        page
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
        let shape =
            Shape { ram_size: 64 << 20, cpus: 1, ipa_bits: None, pmu: false, conduit: fdt::Conduit::Smc };
        Plan::new(shape, kernel, Some(vec![2; initrd]), "quiet").unwrap()
    }

    #[test]
    fn only_pages_with_contents_are_populated_in_ascending_order() {
        // The initramfs ends where the device tree begins, so both are one range.
        assert_eq!(plan(5000).populated().unwrap(), [(0x8000_0000, 0x2000), (0x83df_e000, 0x1_2000)]);
    }

    #[test]
    fn pages_are_what_will_be_populated() {
        let plan = plan(5000);
        assert_eq!(plan.page(0x8000_0000), [1; 4096]);
        assert_eq!(plan.page(0x8000_1000)[..904], [1; 904]);
        assert_eq!(plan.page(0x8000_1000)[904..], [0; 3192]);
        // The initramfs ends one word before the device tree.
        assert_eq!(plan.page(0x83df_e000)[..3188], [0; 3188]);
        assert_eq!(plan.page(0x83df_e000)[3188..], [2; 908]);
        assert_eq!(plan.page(0x83df_f000)[..4092], [2; 4092]);
        assert_eq!(plan.page(0x83df_f000)[4092..], [0; 4]);
        assert_eq!(plan.page(0x83e0_0000)[..4], 0xd00d_feedu32.to_be_bytes());
        assert_eq!(plan.page(0x8100_0000), [0; 4096]);
    }

    #[test]
    fn another_device_tree_takes_the_place_of_ours() {
        let mut plan = plan(5000);
        let before = plan.populated().unwrap();
        assert!(plan.replace_device_tree(vec![0; 100]).is_err());
        let mut blob = 0xd00d_feedu32.to_be_bytes().to_vec();
        plan.replace_device_tree(blob.clone()).unwrap();
        assert_eq!(plan.populated().unwrap(), before);
        assert_eq!(plan.page(0x83e0_0000)[4..], [0; 4092]);
        blob.resize(0x1_0001, 0);
        assert!(plan.replace_device_tree(blob).is_err());
    }

    #[test]
    fn an_empty_initramfs_is_none() {
        assert_eq!(plan(0).segments.len(), 2);
        assert_eq!(plan(0).populated().unwrap(), [(0x8000_0000, 0x2000), (0x83e0_0000, 0x1_0000)]);
    }
}
