//! Realm translation tables: their shape, and which granules serve as tables where.
//!
//! The host keeps a record of every table that it created, so that it never has to discover them: teardown destroys
//! exactly these, deepest level first. All changes happen under the VM's memory lock, so a walk that stops where the
//! record says that a table exists is a contradiction and not a race.

use alloc::collections::BTreeMap;

use cca_abi::rmi::entry_span;

use crate::errno::{Errno, Result};
use crate::granule::Delegated;
use crate::kernel::{BLOCK_PAGES, Kernel, LogLevel};
use crate::rmi::{Rmi, RmiResult, RttEntry};
use crate::stats::Stats;

/// The deepest level: 4 KiB entries.
pub const PAGE_LEVEL: i64 = 3;

/// The shape of a Realm's address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Width of an intermediate physical address.
    pub ipa_bits: u32,
    /// Level of the tables that exist from the start.
    pub start_level: i64,
    /// How many tables are concatenated there.
    pub start_tables: usize,
}

impl Geometry {
    /// For an address space of `ipa_bits` (32 to 48) bits, with the fewest levels.
    ///
    /// # Errors
    /// `EINVAL` outside that range.
    pub fn new(ipa_bits: u32) -> Result<Self> {
        if !(32..=48).contains(&ipa_bits) {
            return Err(Errno::EINVAL);
        }
        // A table resolves 9 bits; up to 16 concatenated ones resolve 4 more.
        let start_level = 4 - i64::from((ipa_bits - 8) / 9);
        let resolved = 12 + 9 * (4 - start_level);
        let extra = u32::try_from(i64::from(ipa_bits) - resolved).unwrap_or(0);
        Ok(Self { ipa_bits, start_level, start_tables: 1 << extra })
    }

    /// The address bit that tells shared (set) from private addresses.
    #[must_use]
    pub const fn shared_bit(&self) -> u64 {
        1 << (self.ipa_bits - 1)
    }

    /// Where the protected half ends.
    #[must_use]
    pub const fn protected_end(&self) -> u64 {
        self.shared_bit()
    }
}

const fn align_down(address: u64, span: u64) -> u64 {
    address & !(span - 1)
}

/// A Realm's tables.
pub struct Rtt<K: Kernel> {
    rd: u64,
    geometry: Geometry,
    /// By level and first address covered. Start-level tables are not in here: they come and go with the Realm.
    tables: BTreeMap<(i64, u64), Delegated<K>>,
    /// By first address of a block: pages of private memory in it. Only blocks that have a level 3 table.
    filled: BTreeMap<u64, u64>,
    /// Level 3 tables whose place a block has taken, kept by the address: splitting the block needs one, and must not
    /// fail.
    folded: BTreeMap<u64, Delegated<K>>,
}

impl<K: Kernel> Rtt<K> {
    /// Start-level tables only, as `REALM_CREATE` leaves it.
    pub fn new(rd: u64, geometry: Geometry) -> Self {
        Self { rd, geometry, tables: BTreeMap::new(), filled: BTreeMap::new(), folded: BTreeMap::new() }
    }

    /// Physical address of the Realm descriptor.
    pub fn rd(&self) -> u64 {
        self.rd
    }

    /// The shape.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// How many tables there are below the start level.
    pub fn count(&self) -> usize {
        self.tables.len()
    }

    /// Creates the tables of levels `have + 1` to `want` that cover `ipa`.
    ///
    /// # Errors
    /// `ENOMEM`; otherwise what the RMM's refusal maps to. Tables created before the failure stay.
    pub fn create_levels(&mut self, rmi: &Rmi<K>, ipa: u64, have: i64, want: i64) -> Result<()> {
        let first = (have + 1).max(self.geometry.start_level + 1);
        for level in first..=want.min(PAGE_LEVEL) {
            let base = align_down(ipa, entry_span(level - 1));
            if self.tables.contains_key(&(level, base)) {
                rmi.say(
                    LogLevel::Error,
                    format_args!("memory: the RMM misses the level {level} table at {base:#x}"),
                );
                return Err(Errno::EIO);
            }
            let granule = match (level, self.folded.remove(&base)) {
                (PAGE_LEVEL, Some(granule)) => {
                    // A block is split: all its pages are there.
                    self.filled.insert(base, BLOCK_PAGES);
                    granule
                }
                _ => rmi.new_delegated()?,
            };
            if let Err(error) = rmi.rtt_create(self.rd, granule.pa(), base, level) {
                rmi.log("create a translation table", error);
                rmi.undelegate(granule);
                return Err(error.into());
            }
            self.tables.insert((level, base), granule);
            rmi.each_stats(Stats::count_table);
        }
        Ok(())
    }

    /// A page of private memory was mapped. When it was the last of a block, the block takes the place of its table if the
    /// RMM finds that all are alike and next to each other. Best effort.
    pub fn filled(&mut self, rmi: &Rmi<K>, ipa: u64, contiguous: bool) {
        let base = align_down(ipa, entry_span(PAGE_LEVEL - 1));
        let count = self.filled.entry(base).or_insert(0);
        *count += 1;
        if *count < BLOCK_PAGES || !contiguous || !self.tables.contains_key(&(PAGE_LEVEL, base)) {
            return;
        }
        let Ok(pa) = rmi.rtt_fold(self.rd, base, PAGE_LEVEL) else { return };
        let Some(granule) = self.tables.remove(&(PAGE_LEVEL, base)) else { return };
        rmi.each_stats(Stats::count_table_gone);
        rmi.each_stats(Stats::count_fold);
        self.filled.remove(&base);
        if granule.pa() == pa {
            self.folded.insert(base, granule);
        } else {
            rmi.say(LogLevel::Error, format_args!("rmm: the table at {base:#x} came back as {pa:#x}"));
            rmi.each_stats(Stats::count_leaked);
        }
    }

    /// A page of private memory was unmapped.
    pub fn emptied(&mut self, ipa: u64) {
        let base = align_down(ipa, entry_span(PAGE_LEVEL - 1));
        if let Some(count) = self.filled.get_mut(&base) {
            *count -= 1;
            if *count == 0 {
                self.filled.remove(&base);
            }
        }
    }

    /// Runs a command on the level 3 entry of `ipa`, creating missing tables. A failure that more tables cannot cure
    /// is returned as it is.
    ///
    /// # Errors
    /// Outer: creating tables failed. Inner: the command did.
    pub fn with_page_table<T>(
        &mut self,
        rmi: &Rmi<K>,
        ipa: u64,
        mut command: impl FnMut(&Rmi<K>, u64) -> RmiResult<T>,
    ) -> Result<RmiResult<T>> {
        let mut deepest = i64::MIN;
        loop {
            match command(rmi, self.rd) {
                Err(error) => match error.rtt_level() {
                    // Each round must get deeper than the one before.
                    Some(level) if level < PAGE_LEVEL && level > deepest => {
                        deepest = level;
                        self.create_levels(rmi, ipa, level, PAGE_LEVEL)?;
                    }
                    _ => return Ok(Err(error)),
                },
                done => return Ok(done),
            }
        }
    }

    /// Applies `command` to `[base, top)` piece by piece, going one level deeper wherever it cannot proceed: the
    /// common loop of `INIT_RIPAS` and `SET_RIPAS`. Returns how far it got; less than `top` only if `command` failed
    /// at level 3 or made no progress there.
    ///
    /// # Errors
    /// Any failure other than `RMI_ERROR_RTT`, and of creating tables.
    pub fn for_range(
        &mut self,
        rmi: &Rmi<K>,
        base: u64,
        top: u64,
        mut command: impl FnMut(&Rmi<K>, u64, u64, u64) -> RmiResult<u64>,
    ) -> Result<u64> {
        let mut at = base;
        while at < top {
            rmi.kernel().cond_resched();
            let stopped = match command(rmi, self.rd, at, top) {
                Ok(reached) if reached > at && reached <= top => {
                    at = reached;
                    continue;
                }
                Ok(reached) if reached == at => self.read_entry(rmi, at)?.level,
                Ok(reached) => {
                    rmi.say(
                        LogLevel::Error,
                        format_args!("rmm: a range from {at:#x} to {top:#x} was answered with {reached:#x}"),
                    );
                    return Err(Errno::EIO);
                }
                Err(error) => match error.rtt_level() {
                    Some(level) => level,
                    None => {
                        rmi.log("change RIPAS", error);
                        return Err(error.into());
                    }
                },
            };
            if stopped >= PAGE_LEVEL {
                return Ok(at);
            }
            if stopped < self.geometry.start_level {
                // There is no such level, so no table would be created and the next round would be the same.
                rmi.say(
                    LogLevel::Error,
                    format_args!("rmm: a walk to {at:#x} stopped at level {stopped}, above the first"),
                );
                return Err(Errno::EIO);
            }
            // A table that is there already ends the loop in create_levels.
            self.create_levels(rmi, at, stopped, stopped + 1)?;
        }
        Ok(at)
    }

    /// Reads the entry of `ipa`, as deep as the tables go.
    ///
    /// # Errors
    /// As the RMM answers.
    pub fn read_entry(&self, rmi: &Rmi<K>, ipa: u64) -> Result<RttEntry> {
        rmi.rtt_read_entry(self.rd, align_down(ipa, entry_span(PAGE_LEVEL)), PAGE_LEVEL).map_err(|error| {
            rmi.log("read a translation table entry", error);
            error.into()
        })
    }

    /// Gives back the tables that cover a part of `[base, top)` and whose entries are all alike, so that a guest that
    /// changes its mind about single pages all over its address space does not make the host keep a table for each.
    /// Best effort.
    pub fn fold(&mut self, rmi: &Rmi<K>, base: u64, top: u64) {
        for level in (self.geometry.start_level + 1..=PAGE_LEVEL).rev() {
            let span = entry_span(level - 1);
            let mut from = align_down(base, span);
            while from < top {
                let Some((&(_, table), _)) = self.tables.range((level, from)..(level, top)).next() else {
                    break;
                };
                let Some(end) = table.checked_add(span) else { return };
                // One with tables below it is not uniform.
                if self.tables.range((level + 1, table)..(level + 1, end)).next().is_none() {
                    if let Ok(pa) = rmi.rtt_fold(self.rd, table, level) {
                        self.release(rmi, level, table, pa);
                    }
                }
                rmi.kernel().cond_resched();
                from = end;
            }
        }
    }

    /// Returns whether the RMM gave back the granule that was the table.
    fn release(&mut self, rmi: &Rmi<K>, level: i64, base: u64, pa: u64) -> bool {
        let Some(granule) = self.tables.remove(&(level, base)) else { return false };
        rmi.each_stats(Stats::count_table_gone);
        if granule.pa() == pa {
            return rmi.undelegate(granule).is_some();
        }
        rmi.say(
            LogLevel::Error,
            format_args!("rmm: the level {level} table at {base:#x} came back as {pa:#x}"),
        );
        rmi.each_stats(Stats::count_leaked);
        false
    }

    /// The tables of blocks that were never split: to be called when nothing is mapped any more.
    fn give_back_folded(&mut self, rmi: &Rmi<K>) -> bool {
        let mut complete = true;
        while let Some((_, granule)) = self.folded.pop_first() {
            complete &= rmi.undelegate(granule).is_some();
        }
        complete
    }

    /// Destroys all tables, the deepest first. What the RMM keeps is lost and counted. Returns whether all came back.
    pub fn teardown(&mut self, rmi: &Rmi<K>) -> bool {
        let mut complete = self.give_back_folded(rmi);
        // Keys are sorted by level, so the last one is always a deepest table.
        while let Some((&(level, base), _)) = self.tables.last_key_value() {
            match rmi.rtt_destroy(self.rd, base, level) {
                Ok(destroyed) => complete &= self.release(rmi, level, base, destroyed.pa),
                Err(error) => {
                    complete = false;
                    if let Some(granule) = self.tables.remove(&(level, base)) {
                        rmi.each_stats(Stats::count_table_gone);
                        rmi.leak(granule, error);
                    }
                }
            }
            rmi.kernel().cond_resched();
        }
        complete
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_level_is_that_of_the_specification_for_every_width() {
        let expected = |bits| match bits {
            32 => (2, 4),
            33 => (2, 8),
            34 => (2, 16),
            35..=39 => (1, 1),
            40 => (1, 2),
            41 => (1, 4),
            42 => (1, 8),
            43 => (1, 16),
            _ => (0, 1),
        };
        for bits in 32..=48 {
            let geometry = Geometry::new(bits).unwrap();
            assert_eq!((geometry.start_level, geometry.start_tables), expected(bits), "{bits} bits");
        }
        assert_eq!(Geometry::new(31), Err(Errno::EINVAL));
        assert_eq!(Geometry::new(49), Err(Errno::EINVAL));
    }

    #[test]
    fn the_halves_of_the_address_space_meet_at_the_shared_bit() {
        let geometry = Geometry::new(33).unwrap();
        assert_eq!(geometry.shared_bit(), 0x1_0000_0000);
        assert_eq!(geometry.protected_end(), geometry.shared_bit());
    }
}
