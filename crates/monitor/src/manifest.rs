//! The boot manifest that tells the RMM what the machine has.

use core::mem::offset_of;

use cca_abi::IntoBytes;
use cca_abi::rmm_el3::{
    MANIFEST_SIZE_0_3, MANIFEST_VERSION_0_5, Manifest, ManifestList, ROOT_COMPLEX_VERSION_0_1,
    RootComplexList,
};

use crate::platform::GRANULE_SIZE;

pub use cca_abi::rmm_el3::{CONSOLE_PL011, ConsoleInfo, MemoryBank as Bank};

/// At most this many banks of DRAM.
pub const MAX_BANKS: usize = 8;

/// A manifest and what its lists point to, as it lies at the start of the shared page.
#[derive(Clone, Debug)]
#[repr(C)]
pub struct ManifestPage {
    manifest: Manifest,
    console: ConsoleInfo,
    banks: [Bank; MAX_BANKS],
}

impl ManifestPage {
    /// Lays the manifest of a `version` out for a page at `page`. Banks must be ascending and disjoint; those past
    /// [`MAX_BANKS`] are left out.
    pub fn new(version: u32, page: u64, banks: &[Bank], console: ConsoleInfo) -> Self {
        let mut copied = [Bank::default(); MAX_BANKS];
        let count = copied.iter_mut().zip(banks).map(|(to, from)| *to = *from).count();
        let listed = copied.get(..count).unwrap_or_default();
        let root_complexes = if version < MANIFEST_VERSION_0_5 { 0 } else { ROOT_COMPLEX_VERSION_0_1 };
        let manifest = Manifest {
            version,
            dram: list(page, offset_of!(Self, banks), count, listed.as_bytes()),
            consoles: list(page, offset_of!(Self, console), 1, console.as_bytes()),
            // An empty list needs no pointer and its sum is zero; this one has a version of its own.
            root_complexes: RootComplexList { version: root_complexes, ..Default::default() },
            ..Default::default()
        };
        Self { manifest, console, banks: copied }
    }

    /// The pieces, each with its offset in the page. What they leave is zero.
    pub fn pieces(&self) -> [(usize, &[u8]); 3] {
        let manifest = self.manifest.as_bytes();
        let size =
            if self.manifest.version < MANIFEST_VERSION_0_5 { MANIFEST_SIZE_0_3 } else { manifest.len() };
        [
            (offset_of!(Self, manifest), manifest.get(..size).unwrap_or_default()),
            (offset_of!(Self, console), self.console.as_bytes()),
            (offset_of!(Self, banks), self.banks.as_bytes()),
        ]
    }
}

/// The head of a list of `num` items that lie at `offset` in the page.
fn list(page: u64, offset: usize, num: usize, items: &[u8]) -> ManifestList {
    let num = num as u64;
    let ptr = if num == 0 { 0 } else { page + offset as u64 };
    let words = items.chunks_exact(8).filter_map(|word| word.try_into().ok()).map(u64::from_le_bytes);
    let sum = words.fold(num.wrapping_add(ptr), u64::wrapping_add);
    ManifestList { num, ptr, checksum: sum.wrapping_neg() }
}

const _: () = assert!(size_of::<ManifestPage>() as u64 <= GRANULE_SIZE);

/// What the RMM may be given of the banks: without the holes (ascending), and below `limit`.
pub fn delegable(banks: &[Bank], holes: &[Bank], limit: u64, out: &mut [Bank; MAX_BANKS]) -> usize {
    let mut count = 0;
    for bank in banks {
        let end = bank.base.saturating_add(bank.size).min(limit);
        let mut from = bank.base;
        for hole in holes.iter().chain([&Bank { base: end, size: 0 }]) {
            let to = hole.base.min(end);
            if let (true, Some(slot)) = (from < to, out.get_mut(count)) {
                *slot = Bank { base: from, size: to - from };
                count += 1;
            }
            from = from.max(hole.base.saturating_add(hole.size));
        }
    }
    count
}
