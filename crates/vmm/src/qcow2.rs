//! What we look at in a qcow2 image ourselves, before and while `imago` works on it: where its tables are, and whether
//! every cluster that is used is counted as used.
//!
//! After a power cut, or the end of the process, a new table may be in use whose count was still in memory. Whoever
//! allocates next would be given that table's place. So [`settle`] counts such clusters before an image is written to.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Error, Result};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;

/// Where a table's entry points.
pub(crate) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// The entry is a compressed cluster's, which has an address of another kind.
const COMPRESSED: u64 = 1 << 62;
/// An incompatible feature: the guest's clusters are in another file.
const EXTERNAL_DATA: u64 = 1 << 2;
/// The longest table that QEMU makes.
const LONGEST_TABLE: u64 = 32 << 20;

/// Where an image's tables are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) cluster_bits: u32,
    /// The first table of the guest's clusters.
    pub(crate) l1: Range<u64>,
    /// The table of the blocks of counters.
    pub(crate) refcounts: Range<u64>,
    /// A counter has 2 to the power of this many bits.
    refcount_order: u32,
    features: u64,
}

/// What a cluster is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    /// The header, or one of the two tables that it names.
    Root,
    /// A block of counters.
    Counters,
    /// A table of the guest's clusters.
    Mapping,
    /// The guest's bytes.
    Data,
    /// The guest's bytes, and maybe others' in the same cluster.
    Compressed,
}

fn broken(what: impl std::fmt::Display) -> Error {
    Error::other(format!("the image is broken: {what} (`qemu-img check` says more)"))
}

/// A big-endian number.
pub(crate) fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

impl Header {
    /// The header of an image whose file begins with these bytes.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self> {
        let field = |at: usize, len: usize| {
            bytes.get(at..at + len).map(number).ok_or_else(|| broken("it is too short"))
        };
        let short = |at| field(at, 4).map(|number| u32::try_from(number).unwrap_or(u32::MAX));
        let (features, refcount_order) = match short(4)? {
            2 => (0, 4),
            _ => (field(72, 8)?, short(96)?),
        };
        let cluster_bits = short(20)?;
        if !(9..=21).contains(&cluster_bits) || refcount_order > 6 {
            return Err(broken("its clusters have an impossible size"));
        }
        let (l1, refcounts) = Self::tables(bytes, cluster_bits)?;
        Ok(Self { cluster_bits, l1, refcounts, refcount_order, features })
    }

    /// The two tables that a header names.
    pub(crate) fn tables(bytes: &[u8], cluster_bits: u32) -> Result<(Range<u64>, Range<u64>)> {
        let field = |at: usize, len: usize| {
            bytes.get(at..at + len).map(number).ok_or_else(|| broken("it is too short"))
        };
        let table = |start: u64, len: u64| {
            let end = start.checked_add(len).filter(|_| len <= LONGEST_TABLE);
            end.map(|end| start..end).ok_or_else(|| broken("its tables have an impossible size"))
        };
        let l1 = table(field(40, 8)?, field(36, 4)? * 8)?;
        Ok((l1, table(field(48, 8)?, field(56, 4)? << cluster_bits)?))
    }

    /// The header of an image.
    pub(crate) fn read(file: &File) -> Result<Self> {
        Self::parse(&bytes(file, 0..104)?)
    }

    /// Bytes in a cluster.
    pub(crate) fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// How much of the guest's disk one table maps.
    pub(crate) fn reach(&self) -> u64 {
        self.cluster() << (self.cluster_bits - 3)
    }

    /// Names every cluster that the image uses, as often as it does, by its first byte. What is not aligned is left to `imago`,
    /// which refuses it.
    pub(crate) fn uses(&self, file: &File, mut visit: impl FnMut(Use, u64) -> Result<()>) -> Result<()> {
        let cluster = self.cluster();
        let aligned = |offset: &u64| *offset != 0 && *offset % cluster == 0;
        visit(Use::Root, 0)?;
        for table in [&self.l1, &self.refcounts] {
            for place in (table.start / cluster..table.end.div_ceil(cluster)).filter(|_| !table.is_empty()) {
                visit(Use::Root, place * cluster)?;
            }
        }
        let blocks = entries(file, self.refcounts.clone())?;
        for block in blocks.map(|entry| entry & !511).filter(aligned) {
            visit(Use::Counters, block)?;
        }
        // A table that is named again and again is looked at once: a file is not longer than it is.
        let mut seen = BTreeSet::new();
        for table in entries(file, self.l1.clone())?.map(|entry| entry & OFFSET).filter(aligned) {
            visit(Use::Mapping, table)?;
            if !seen.insert(table) {
                continue;
            }
            for entry in entries(file, table..table.saturating_add(cluster))? {
                if entry & COMPRESSED != 0 {
                    let bits = 62 - (self.cluster_bits - 8);
                    let start = entry & ((1 << bits) - 1);
                    let sectors = (entry & (COMPRESSED - 1)) >> bits;
                    let last = (start & !511).saturating_add(sectors * 512 + 511);
                    for place in start / cluster..=last / cluster {
                        visit(Use::Compressed, place * cluster)?;
                    }
                } else if self.features & EXTERNAL_DATA == 0 && aligned(&(entry & OFFSET)) {
                    visit(Use::Data, entry & OFFSET)?;
                }
            }
        }
        Ok(())
    }
}

/// A range of a file; what lies behind its end is not there.
fn bytes(file: &File, range: Range<u64>) -> Result<Vec<u8>> {
    let end = range.end.min(file.metadata()?.len());
    let mut bytes = vec![0; usize::try_from(end.saturating_sub(range.start)).map_err(Error::other)?];
    file.read_exact_at(&mut bytes, range.start)?;
    Ok(bytes)
}

/// The entries of a table.
pub(crate) fn entries(file: &File, range: Range<u64>) -> Result<impl Iterator<Item = u64>> {
    let bytes = bytes(file, range)?;
    Ok((0..bytes.len() / 8).map(move |index| number(&bytes[index * 8..index * 8 + 8])))
}

/// The counters of an image, read as they are asked for.
struct Counters<'a> {
    file: &'a File,
    header: &'a Header,
    table: Vec<u64>,
    /// Blocks by their place in the table: bytes, and whether they were changed.
    blocks: BTreeMap<usize, (Vec<u8>, bool)>,
}

impl<'a> Counters<'a> {
    fn new(file: &'a File, header: &'a Header) -> Result<Self> {
        let table = entries(file, header.refcounts.clone())?.map(|entry| entry & !511).collect();
        Ok(Self { file, header, table, blocks: BTreeMap::new() })
    }

    /// Counts a cluster as used if it is not: gives whether it was.
    fn count(&mut self, offset: u64) -> Result<bool> {
        let cluster = self.header.cluster();
        let uncounted = || broken(format_args!("there is no counter for the cluster at {offset:#x}"));
        let per_block = (cluster * 8) >> self.header.refcount_order;
        let index = offset / cluster;
        let place = usize::try_from(index / per_block).map_err(|_| uncounted())?;
        let block = *self.table.get(place).ok_or_else(uncounted)?;
        if block == 0 || block % cluster != 0 {
            return Err(uncounted());
        }
        if !self.blocks.contains_key(&place) {
            let block = bytes(self.file, block..block.saturating_add(cluster))?;
            self.blocks.insert(place, (block, false));
        }
        let (bytes, changed) = self.blocks.get_mut(&place).ok_or_else(uncounted)?;
        let first_bit =
            usize::try_from((index % per_block) << self.header.refcount_order).map_err(Error::other)?;
        let (at, width) = (first_bit / 8, 1usize << self.header.refcount_order);
        let counter = bytes.get_mut(at..at + width.div_ceil(8)).ok_or_else(uncounted)?;
        // Below a byte the first counter is the lowest bits; beyond, the last byte is.
        let (shift, mask) = if width < 8 { (first_bit % 8, (1u8 << width) - 1) } else { (0, 0xff) };
        if counter.iter().any(|byte| byte >> shift & mask != 0) {
            return Ok(true);
        }
        if let Some(last) = counter.last_mut() {
            *last |= 1 << shift;
            *changed = true;
        }
        Ok(false)
    }

    fn write(&self) -> Result<()> {
        for (place, (bytes, _)) in self.blocks.iter().filter(|(_, (_, changed))| *changed) {
            self.file.write_all_at(bytes, self.table[*place])?;
        }
        self.file.sync_all()
    }
}

/// Refuses an image whose own header is not counted as used: whoever allocates in it would look for a place for the
/// first counters without end, or write over the header. In one that will be written to, every other cluster that is used is
/// counted as well; gives how many were not.
pub(crate) fn settle(file: &File, header: &Header, write: bool) -> Result<usize> {
    let mut counters = Counters::new(file, header)?;
    if !counters.count(0)? {
        return Err(broken("its header is not counted as used"));
    }
    // Features that are not known are `imago`'s to refuse.
    if !write || header.features & !EXTERNAL_DATA != 0 {
        return Ok(0);
    }
    let mut missing = 0;
    header.uses(file, |_, offset| {
        missing += usize::from(!counters.count(offset)?);
        Ok(())
    })?;
    if missing > 0 {
        counters.write()?;
    }
    Ok(missing)
}
