//! An array with holes, grown in chunks, for things that exist per page of a range that user space sized.

use alloc::vec::Vec;
use core::ops::Range;

use crate::errno::{Errno, Result};
use crate::kernel::reserve;

const CHUNK: u64 = 512;

/// One optional `T` per index below a fixed length.
pub struct Sparse<T> {
    chunks: Vec<Vec<Option<T>>>,
    len: u64,
}

fn split(index: u64) -> Option<(usize, usize)> {
    Some((usize::try_from(index / CHUNK).ok()?, usize::try_from(index % CHUNK).ok()?))
}

impl<T> Sparse<T> {
    /// All holes.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub fn new(len: u64) -> Result<Self> {
        let count = usize::try_from(len.div_ceil(CHUNK)).map_err(|_| Errno::ENOMEM)?;
        let mut chunks = Vec::new();
        reserve(&mut chunks, count)?;
        chunks.resize_with(count, Vec::new);
        Ok(Self { chunks, len })
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
        self.chunks.get(chunk)?.get(at)?.as_ref()
    }

    /// Takes what is at `index` out.
    pub fn take(&mut self, index: u64) -> Option<T> {
        let (chunk, at) = split(index)?;
        self.chunks.get_mut(chunk)?.get_mut(at)?.take()
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
        let chunk = self.chunks.get_mut(chunk).ok_or(Errno::EINVAL)?;
        if chunk.is_empty() {
            let size = usize::try_from(CHUNK).map_err(|_| Errno::EINVAL)?;
            reserve(chunk, size)?;
            chunk.resize_with(size, || None);
        }
        Ok(())
    }

    /// Puts `value` at `index`, for which [`Self::prepare`] was called, and returns what was there. Gives `value`
    /// back as the error if there is no room.
    ///
    /// # Errors
    /// `value` itself.
    pub fn insert(&mut self, index: u64, value: T) -> core::result::Result<Option<T>, T> {
        match split(index).and_then(|(chunk, at)| self.chunks.get_mut(chunk)?.get_mut(at)) {
            Some(place) => Ok(place.replace(value)),
            None => Err(value),
        }
    }

    /// The first index in `range` that is not a hole.
    pub fn next(&self, range: Range<u64>) -> Option<u64> {
        let mut index = range.start;
        while index < range.end.min(self.len) {
            let (chunk, at) = split(index)?;
            let entries = self.chunks.get(chunk)?;
            match entries.get(at..).and_then(|rest| rest.iter().position(Option::is_some)) {
                Some(skip) => {
                    let found = index + u64::try_from(skip).ok()?;
                    return (found < range.end).then_some(found);
                }
                None => index = (index / CHUNK + 1) * CHUNK,
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
        let mut array = Sparse::new(2000).unwrap();
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
    }
}
