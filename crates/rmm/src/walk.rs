//! Walking a Realm's stage 2 tables, hand over hand.

use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use crate::Rmm;
use crate::entry::{Entry, PAGE_LEVEL, span, span_shift};
use crate::granule::{Locked, State};
use crate::platform::{Page, Platform};
use crate::realm::Stage2;

/// Entries per table.
pub(crate) const ENTRIES: usize = 512;

/// A locked table.
pub(crate) struct Table<'a> {
    /// The lock and the count of live entries.
    pub(crate) granule: Locked<'a>,
    page: &'a Page,
    /// Its level.
    pub(crate) level: u32,
}

impl<'a> Table<'a> {
    pub(crate) fn new(granule: Locked<'a>, page: &'a Page, level: u32) -> Self {
        Self { granule, page, level }
    }

    /// The index of the entry that covers `ipa`.
    pub(crate) fn index(&self, ipa: u64) -> usize {
        // Nine bits.
        (ipa >> span_shift(self.level) & 0x1FF) as usize
    }

    /// Entry number `index`.
    pub(crate) fn entry(&self, index: usize) -> Entry {
        Entry::decode(self.page[index].load(Acquire), self.level)
    }

    /// Writes entry number `index`. The caller keeps the count and does break-before-make.
    pub(crate) fn set(&self, index: usize, entry: Entry) {
        self.page[index].store(entry.encode(self.level), Release);
    }

    /// Fills the whole (new) table.
    pub(crate) fn fill(&self, mut entry: impl FnMut(u64) -> Entry) {
        for (index, slot) in (0u64..).zip(self.page) {
            slot.store(entry(index).encode(self.level), Relaxed);
        }
    }

    /// RttSkipNonLiveEntries: the IPA of the first live entry at or after the one that covers `ipa`, or the end of
    /// the table. `ipa` itself if its entry is live.
    pub(crate) fn skip_non_live(&self, ipa: u64) -> u64 {
        let first = self.index(ipa);
        if self.entry(first).is_live() {
            return ipa;
        }
        let step = span(self.level);
        let mut at = ipa & !(step - 1);
        for index in first..ENTRIES {
            if self.entry(index).is_live() {
                break;
            }
            at += step;
        }
        at
    }
}

/// Where a walk ended.
pub(crate) struct Walk<'a> {
    /// The last table, locked.
    pub(crate) table: Table<'a>,
    /// The entry's index in it.
    pub(crate) index: usize,
    /// The entry.
    pub(crate) entry: Entry,
}

impl Walk<'_> {
    /// The level where the walk stopped.
    pub(crate) fn level(&self) -> u32 {
        self.table.level
    }

    /// Replaces the entry.
    pub(crate) fn set(&self, entry: Entry) {
        self.table.set(self.index, entry);
    }
}

impl<P: Platform> Rmm<'_, P> {
    /// Walks to `target`, or as far as there are tables. `rd`, if given, is unlocked once the start table is
    /// locked. `ipa` must lie inside the Realm's address space.
    pub(crate) fn walk(&self, stage2: &Stage2, rd: Option<Locked<'_>>, ipa: u64, target: u32) -> Walk<'_> {
        let start = stage2.start_level;
        // Concatenated start tables are contiguous.
        let start_table = stage2.rtt_base + (ipa >> (span_shift(start) + 9)) * 4096;
        let mut table = self.table(start_table, start);
        drop(rd);
        loop {
            let index = table.index(ipa);
            let entry = table.entry(index);
            match entry {
                Entry::Table(next) if table.level < target => {
                    // The child is locked before the parent is unlocked.
                    table = self.table(next, table.level + 1);
                }
                _ => return Walk { table, index, entry },
            }
        }
    }

    /// Locks a table that an entry (or the RD) refers to.
    pub(crate) fn table(&self, pa: u64, level: u32) -> Table<'_> {
        Table::new(self.lock_owned(pa, State::Rtt), self.platform.granule(pa), level)
    }

    /// Locks a granule that an RMM object refers to; such a reference is never wrong.
    pub(crate) fn lock_owned(&self, pa: u64, state: State) -> Locked<'_> {
        match self.granules.lock(pa, state) {
            Some(locked) => locked,
            None => self.platform.fatal(format_args!("granule {pa:#x} should be {state:?}")),
        }
    }

    /// Wipes a granule and makes it DELEGATED. Its reference count is zero or no longer matters.
    pub(crate) fn wipe_to_delegated(&self, granule: &Locked<'_>) {
        self.platform.zero(granule.pa());
        granule.set_state(State::Delegated);
    }

    /// Walks to the page level and calls `f` with the Realm's page, which cannot be destroyed meanwhile.
    pub(crate) fn with_realm_page<R>(
        &self,
        stage2: &Stage2,
        ipa: u64,
        f: impl FnOnce(&Page, usize) -> R,
    ) -> Result<R, Absent> {
        let walk = self.walk(stage2, None, ipa, PAGE_LEVEL);
        match walk.entry {
            Entry::Assigned(pa, cca_abi::rmi::Ripas::Ram) => {
                let page_pa = pa + (ipa & (span(walk.level()) - 1) & !0xFFF);
                // Twelve bits, in words.
                let offset = ((ipa & 0xFFF) / 8) as usize;
                Ok(f(self.platform.granule(page_pa), offset))
            }
            Entry::Unassigned(cca_abi::rmi::Ripas::Empty)
            | Entry::Assigned(_, cca_abi::rmi::Ripas::Empty) => Err(Absent::Empty),
            _ => Err(Absent::Fault(walk.level())),
        }
    }
}

/// Why the RMM cannot access a protected page on the Realm's behalf.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Absent {
    /// RIPAS EMPTY: the Realm's mistake.
    Empty,
    /// RAM without a page, or DESTROYED: the host's business; the walk stopped at this level.
    Fault(u32),
}
