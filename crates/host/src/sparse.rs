//! An array with holes, grown in chunks, for things that exist per page of a range that user space sized.

use alloc::collections::BTreeMap;
use alloc::collections::btree_map::Entry;
use alloc::vec::Vec;
use core::ops::Range;

use crate::errno::{Errno, Result};
use crate::kernel::reserve;

const CHUNK: u64 = 512;

/// One optional `T` per index below a fixed length. Costs memory only where something was.
pub struct Sparse<T> {
    /// By number; each has room for [`CHUNK`] places.
    chunks: BTreeMap<u64, Vec<Option<T>>>,
    len: u64,
}

/// Number of the chunk, and the place in it.
fn split(index: u64) -> Option<(u64, usize)> {
    Some((index / CHUNK, usize::try_from(index % CHUNK).ok()?))
}

impl<T> Sparse<T> {
    /// All holes.
    #[must_use]
    pub const fn new(len: u64) -> Self {
        Self { chunks: BTreeMap::new(), len }
    }

    /// Number of indices.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is no index at all.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What is at `index`.
    pub fn get(&self, index: u64) -> Option<&T> {
        let (chunk, at) = split(index)?;
        self.chunks.get(&chunk)?.get(at)?.as_ref()
    }

    /// Takes what is at `index` out.
    pub fn take(&mut self, index: u64) -> Option<T> {
        let (chunk, at) = split(index)?;
        self.chunks.get_mut(&chunk)?.get_mut(at)?.take()
    }

    /// Makes sure that a following [`Self::insert`] at `index` finds room.
    ///
    /// # Errors
    /// `ENOMEM`; `EINVAL` beyond the end.
    pub fn prepare(&mut self, index: u64) -> Result<()> {
        if index >= self.len {
            return Err(Errno::EINVAL);
        }
        let (chunk, _) = split(index).ok_or(Errno::EINVAL)?;
        if let Entry::Vacant(place) = self.chunks.entry(chunk) {
            let size = usize::try_from(CHUNK).map_err(|_| Errno::EINVAL)?;
            let mut places = Vec::new();
            reserve(&mut places, size)?;
            places.resize_with(size, || None);
            place.insert(places);
        }
        Ok(())
    }

    /// Puts `value` at `index`, for which [`Self::prepare`] was called, and returns what was there. Gives `value`
    /// back as the error if there is no room.
    ///
    /// # Errors
    /// `value` itself.
    pub fn insert(&mut self, index: u64, value: T) -> core::result::Result<Option<T>, T> {
        match split(index).and_then(|(chunk, at)| self.chunks.get_mut(&chunk)?.get_mut(at)) {
            Some(place) => Ok(place.replace(value)),
            None => Err(value),
        }
    }

    /// The first index in `range` that is not a hole.
    pub fn next(&self, range: Range<u64>) -> Option<u64> {
        let end = range.end.min(self.len);
        let (first, _) = split(range.start)?;
        for (chunk, places) in self.chunks.range(first..) {
            let base = chunk * CHUNK;
            if base >= end {
                break;
            }
            let from = usize::try_from(range.start.saturating_sub(base)).ok()?;
            let rest = places.get(from..).unwrap_or(&[]);
            if let Some(skip) = rest.iter().position(Option::is_some) {
                let found = base + u64::try_from(from + skip).ok()?;
                return (found < end).then_some(found);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_are_skipped_and_the_end_is_respected() {
        let mut array = Sparse::new(2000);
        assert_eq!(array.insert(700, 'x'), Err('x'));
        for index in [700, 1999] {
            array.prepare(index).unwrap();
            assert_eq!(array.insert(index, 'x'), Ok(None));
        }
        assert_eq!(array.prepare(2000), Err(Errno::EINVAL));
        assert_eq!(array.next(0..2000), Some(700));
        assert_eq!(array.next(701..1999), None);
        assert_eq!(array.next(701..5000), Some(1999));
        assert_eq!(array.take(700), Some('x'));
        assert_eq!(array.next(0..1999), None);
        assert_eq!(array.next(Range { start: 1999, end: 0 }), None);
        assert_eq!(array.next(u64::MAX..u64::MAX), None);
    }
}
