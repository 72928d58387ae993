//! Storage for a qcow2 image that survives a power cut.
//!
//! `imago` writes in an order in which each state of the file is one that can be opened again; but between two flushes a
//! disk, or a file system, may change the order. So a write that makes others reachable waits until those are on the disk: a
//! table of the guest's clusters for the clusters and their counters, counters for the tables that no longer name what they
//! free, and an entry of the first tables, or the header, for everything.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io::Result;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::PreallocateMode;
use imago::storage::drivers::CommonStorageHelper;
use imago::{Storage, StorageCreateOptions, StorageOpenOptions};

use crate::qcow2::{Header, OFFSET, entries, number};

/// The longest write whose bytes we look at: a header's, or a table's that is made anew.
const LONGEST_LINK: usize = 4096;

/// What kinds of writes the disk may still hold back.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Unsynced {
    data: bool,
    counters: bool,
    mappings: bool,
}

/// What a write is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Data,
    Counters,
    Mapping,
    /// It makes a table reachable, or another one.
    Link,
}

/// What is known of an image.
#[derive(Debug)]
struct Order {
    header: Header,
    /// Clusters that hold tables of the guest's clusters, and blocks of counters.
    tables: BTreeMap<u64, Kind>,
    unsynced: Unsynced,
}

/// Storage whose writes are in order, if it holds a qcow2 image that is written to.
pub(crate) struct Ordered<S> {
    inner: S,
    order: Option<Mutex<Order>>,
}

impl<S> Ordered<S> {
    /// Storage of no image of ours: writes come as they come.
    pub(crate) fn plain(inner: S) -> Self {
        Self { inner, order: None }
    }

    /// Storage of an image that `file` is as well.
    pub(crate) fn of_image(inner: S, file: &fs::File, header: Header) -> Result<Self> {
        let mut tables = BTreeMap::new();
        for (range, kind) in [(&header.l1, Kind::Mapping), (&header.refcounts, Kind::Counters)] {
            tables.extend(
                entries(file, range.clone())?
                    .filter_map(|entry| target(entry, &header))
                    .zip(std::iter::repeat(kind)),
            );
        }
        let order = Order { header, tables, unsynced: Unsynced::default() };
        Ok(Self { inner, order: Some(Mutex::new(order)) })
    }
}

/// The cluster that an entry of a first table names.
fn target(entry: u64, header: &Header) -> Option<u64> {
    let offset = entry & OFFSET;
    (offset != 0).then_some(offset >> header.cluster_bits)
}

impl Order {
    fn kind(&self, offset: u64, len: u64) -> Kind {
        let end = offset.saturating_add(len);
        let touches = |range: &std::ops::Range<u64>| offset < range.end && end > range.start;
        if offset < self.header.cluster() || touches(&self.header.l1) || touches(&self.header.refcounts) {
            return Kind::Link;
        }
        self.tables.get(&(offset >> self.header.cluster_bits)).copied().unwrap_or(Kind::Data)
    }

    /// Whether a write has to wait for those before it.
    fn waits(&self, kind: Kind) -> bool {
        match kind {
            Kind::Data => false,
            Kind::Counters => self.unsynced.mappings,
            Kind::Mapping => self.unsynced.data || self.unsynced.counters,
            Kind::Link => self.unsynced != Unsynced::default(),
        }
    }

    /// Learns from a link that was written.
    fn learn(&mut self, offset: u64, bytes: &[u8]) {
        if offset < self.header.cluster() {
            // The header names another table.
            if let Ok(tables) = Header::tables(bytes, self.header.cluster_bits) {
                (self.header.l1, self.header.refcounts) = tables;
            }
            return;
        }
        let kind = if self.header.l1.contains(&offset) { Kind::Mapping } else { Kind::Counters };
        for entry in bytes.chunks_exact(8) {
            if let Some(cluster) = target(number(entry), &self.header) {
                self.tables.insert(cluster, kind);
            }
        }
    }
}

impl<S: Storage> Ordered<S> {
    /// Does a write when those before it that it needs are on the disk. `bytes` are what it writes.
    fn in_order(
        &self,
        (offset, len): (u64, u64),
        bytes: impl FnOnce() -> Vec<u8>,
        write: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let Some(order) = &self.order else { return write() };
        // Valid after each change. A device has one thread: nobody waits here.
        let mut order = order.lock().unwrap_or_else(PoisonError::into_inner);
        let kind = order.kind(offset, len);
        if order.waits(kind) {
            self.inner.sync()?;
            order.unsynced = Unsynced::default();
        }
        match kind {
            Kind::Data => order.unsynced.data = true,
            Kind::Counters => order.unsynced.counters = true,
            Kind::Mapping => order.unsynced.mappings = true,
            Kind::Link => {
                let bytes = bytes();
                write()?;
                order.learn(offset, &bytes);
                return self.inner.sync();
            }
        }
        write()
    }
}

impl<S: fmt::Debug> fmt::Debug for Ordered<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}

impl<S: fmt::Display> fmt::Display for Ordered<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}

impl<S: Storage> Storage for Ordered<S> {
    fn open(options: StorageOpenOptions) -> Result<Self> {
        S::open(options).map(Self::plain)
    }

    fn create_open(options: StorageCreateOptions) -> Result<Self> {
        S::create_open(options).map(Self::plain)
    }

    fn mem_align(&self) -> usize {
        self.inner.mem_align()
    }

    fn req_align(&self) -> usize {
        self.inner.req_align()
    }

    fn zero_align(&self) -> usize {
        self.inner.zero_align()
    }

    fn discard_align(&self) -> usize {
        self.inner.discard_align()
    }

    fn size(&self) -> Result<u64> {
        self.inner.size()
    }

    fn resolve_relative_path<P: AsRef<Path>>(&self, relative: P) -> Result<PathBuf> {
        self.inner.resolve_relative_path(relative)
    }

    fn get_filename(&self) -> Option<PathBuf> {
        self.inner.get_filename()
    }

    unsafe fn pure_readv(&self, buffers: IoVectorMut<'_>, offset: u64) -> Result<()> {
        // SAFETY: the caller promises to us what we promise.
        unsafe { self.inner.pure_readv(buffers, offset) }
    }

    unsafe fn pure_writev(&self, buffers: IoVector<'_>, offset: u64) -> Result<()> {
        let len = buffers.len();
        let mut bytes = Vec::new();
        if let (Ok(len @ ..=LONGEST_LINK), true) = (usize::try_from(len), self.order.is_some()) {
            bytes.resize(len, 0);
            buffers.copy_into_slice(&mut bytes);
        }
        // SAFETY: the caller promises to us what we promise.
        self.in_order((offset, len), || bytes, || unsafe { self.inner.pure_writev(buffers, offset) })
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        // SAFETY: the caller promises to us what we promise.
        self.in_order((offset, len), Vec::new, || unsafe { self.inner.pure_write_zeroes(offset, len) })
    }

    unsafe fn pure_write_allocated_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        // SAFETY: the caller promises to us what we promise.
        let write = || unsafe { self.inner.pure_write_allocated_zeroes(offset, len) };
        self.in_order((offset, len), Vec::new, write)
    }

    unsafe fn pure_discard(&self, offset: u64, len: u64) -> Result<()> {
        // SAFETY: the caller promises to us what we promise.
        self.in_order((offset, len), Vec::new, || unsafe { self.inner.pure_discard(offset, len) })
    }

    fn flush(&self) -> Result<()> {
        self.inner.flush()
    }

    fn sync(&self) -> Result<()> {
        self.inner.sync()?;
        if let Some(order) = &self.order {
            order.lock().unwrap_or_else(PoisonError::into_inner).unsynced = Unsynced::default();
        }
        Ok(())
    }

    fn settle_writes(&self) -> Result<()> {
        self.inner.settle_writes()
    }

    unsafe fn invalidate_cache(&self) -> Result<()> {
        // SAFETY: the caller promises to us what we promise.
        unsafe { self.inner.invalidate_cache() }
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        self.inner.get_storage_helper()
    }

    fn resize(&self, size: u64, mode: PreallocateMode) -> Result<()> {
        self.inner.resize(size, mode)
    }
}
