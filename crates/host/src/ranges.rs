//! A set of addresses as sorted, disjoint, non-adjacent ranges: which guest addresses are private.

use alloc::vec::Vec;
use core::ops::Range;

use crate::errno::Result;
use crate::kernel::reserve;

/// Set of addresses.
#[derive(Debug, Default)]
pub struct RangeSet {
    ranges: Vec<Range<u64>>,
}

impl RangeSet {
    /// The empty set.
    #[must_use]
    pub const fn new() -> Self {
        Self { ranges: Vec::new() }
    }

    /// Whether `address` is in the set.
    #[must_use]
    pub fn contains(&self, address: u64) -> bool {
        let after = self.ranges.partition_point(|range| range.start <= address);
        after.checked_sub(1).and_then(|at| self.ranges.get(at)).is_some_and(|range| address < range.end)
    }

    /// Adds or removes `change`.
    ///
    /// # Errors
    /// `ENOMEM`, and nothing has changed.
    pub fn set(&mut self, change: Range<u64>, member: bool) -> Result<()> {
        if change.is_empty() {
            return Ok(());
        }
        reserve(&mut self.ranges, 2)?;
        // Adding swallows neighbours that only touch; removing does not.
        let first = if member {
            self.ranges.partition_point(|range| range.end < change.start)
        } else {
            self.ranges.partition_point(|range| range.end <= change.start)
        };
        let last = if member {
            self.ranges.partition_point(|range| range.start <= change.end)
        } else {
            self.ranges.partition_point(|range| range.start < change.end)
        };
        let touched = self.ranges.get(first..last).unwrap_or(&[]);
        let (low, high) = match (touched.first(), touched.last()) {
            (Some(first), Some(last)) => (first.start, last.end),
            _ if member => (change.start, change.end),
            _ => return Ok(()),
        };
        let pieces = if member {
            [low.min(change.start)..high.max(change.end), 0..0]
        } else {
            [low..change.start, change.end..high]
        };
        self.ranges.splice(first..last, pieces.into_iter().filter(|piece| piece.start < piece.end));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_of_ranges_agrees_with_a_set_of_addresses() {
        // A small deterministic generator; every prefix of the run is checked against a bitmap.
        let mut seed = 1u64;
        let mut next = || {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (seed >> 33) % 40
        };
        let mut set = RangeSet::new();
        let mut model = [false; 40];
        for _ in 0..2000 {
            let (a, b, member) = (next(), next(), next() % 2 == 0);
            let change = a.min(b)..a.max(b);
            set.set(change.clone(), member).unwrap();
            for index in change {
                model[usize::try_from(index).unwrap()] = member;
            }
            for (address, expected) in (0..).zip(model) {
                assert_eq!(set.contains(address), expected, "{set:?} at {address}");
            }
            for pair in set.ranges.windows(2) {
                assert!(pair[0].end < pair[1].start, "{set:?}");
            }
        }
    }
}
