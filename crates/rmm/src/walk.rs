//! Walking a Realm's stage 2 tables, hand over hand.

use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use cca_abi::rmi::Ripas;

use crate::Rmm;
use crate::entry::{Entry, Format};
use crate::granule::{Locked, State};
use crate::level::Level;
use crate::platform::{GRANULE_SIZE, GRANULE_WORDS, Page, Platform};
use crate::realm::Stage2;

/// Entries per table.
pub(crate) const ENTRIES: u16 = 512;

const _: () = assert!(ENTRIES as usize == GRANULE_WORDS);

/// A locked table.
pub(crate) struct Table<'a> {
    /// The lock and the count of ASSIGNED and TABLE entries.
    pub(crate) granule: Locked<'a>,
    page: &'a Page,
    /// Its level.
    pub(crate) level: Level,
    format: Format,
}

impl<'a> Table<'a> {
    pub(crate) fn new(granule: Locked<'a>, page: &'a Page, level: Level, format: Format) -> Self {
        Self { granule, page, level, format }
    }

    /// The entry that covers `ipa`.
    pub(crate) fn entry(&self, ipa: u64) -> Entry {
        self.decode(self.page[self.level.index(ipa) % GRANULE_WORDS].load(Acquire))
    }

    /// Writes the entry that covers `ipa`. The caller keeps the count and does break-before-make.
    pub(crate) fn set(&self, ipa: u64, entry: Entry) {
        let raw = entry.encode(self.level, self.format);
        self.page[self.level.index(ipa) % GRANULE_WORDS].store(raw, Release);
    }

    fn decode(&self, raw: u64) -> Entry {
        Entry::decode(raw, self.level, self.format)
    }

    /// Fills the whole (new) table with what unfolds `parent`.
    pub(crate) fn unfold(&self, parent: Entry) {
        let mut offset = 0u64;
        for slot in self.page {
            slot.store(parent.offset(offset).encode(self.level, self.format), Relaxed);
            offset = offset.wrapping_add(self.level.span());
        }
    }

    /// The entry of `parent_level` that says the same as this whole table, if there is one.
    pub(crate) fn folded(&self, parent_level: Level) -> Option<Entry> {
        let first = self.decode(self.page[0].load(Relaxed));
        let mut offset = 0u64;
        for slot in self.page {
            if slot.load(Relaxed) != first.offset(offset).encode(self.level, self.format) {
                return None;
            }
            offset = offset.wrapping_add(self.level.span());
        }
        first.folded(parent_level)
    }

    /// RttSkipNonLiveEntries: the IPA of the first live entry at or after the one that covers `ipa`, or the end of
    /// the table. `ipa` itself if its entry is live.
    pub(crate) fn skip_non_live(&self, ipa: u64) -> u64 {
        let first = self.level.index(ipa);
        let mut at = self.level.align_down(ipa);
        let rest = self.page.get(first..).unwrap_or_default();
        let live = |word: &core::sync::atomic::AtomicU64| Entry::is_live_raw(word.load(Relaxed));
        if rest.first().is_some_and(live) {
            return ipa;
        }
        // Eight at a time: a table is mostly empty when this matters.
        let mut groups = rest.chunks_exact(8);
        for group in &mut groups {
            if Entry::is_live_raw(group.iter().fold(0, |any, word| any | word.load(Relaxed))) {
                return self.advance(at, group.iter().position(live).unwrap_or(0));
            }
            at = self.advance(at, 8);
        }
        let rest = groups.remainder();
        self.advance(at, rest.iter().position(live).unwrap_or(rest.len()))
    }

    fn advance(&self, at: u64, entries: usize) -> u64 {
        // At most 512 entries of 2^48 bytes: no overflow.
        at.wrapping_add((entries as u64).wrapping_mul(self.level.span()))
    }
}

/// Where a walk ended.
pub(crate) struct Walk<'a> {
    /// The last table, locked.
    pub(crate) table: Table<'a>,
    /// The address walked for.
    pub(crate) ipa: u64,
    /// Its entry.
    pub(crate) entry: Entry,
}

impl Walk<'_> {
    /// The level where the walk stopped.
    pub(crate) fn level(&self) -> Level {
        self.table.level
    }

    /// Replaces the entry.
    pub(crate) fn set(&self, entry: Entry) {
        self.table.set(self.ipa, entry);
    }

    /// How far the host may skip: see [`Table::skip_non_live`].
    pub(crate) fn top(&self) -> u64 {
        self.table.skip_non_live(self.ipa)
    }
}

impl<P: Platform> Rmm<'_, P> {
    /// Walks to `target`, or as far as there are tables. `rd`, if given, is unlocked once the start table is
    /// locked. `ipa` must lie inside the Realm's address space.
    pub(crate) fn walk(&self, stage2: &Stage2, rd: Option<Locked<'_>>, ipa: u64, target: Level) -> Walk<'_> {
        let start = stage2.start_level;
        // Concatenated start tables are contiguous.
        let offset = start.start_table(ipa).wrapping_mul(GRANULE_SIZE);
        let mut table = self.table(stage2.rtt_base.wrapping_add(offset), start, stage2.format);
        drop(rd);
        loop {
            let entry = table.entry(ipa);
            match (entry, table.level.child()) {
                (Entry::Table(next), Some(level)) if table.level < target => {
                    // The child is locked before the parent is unlocked.
                    table = self.table(next, level, stage2.format);
                }
                _ => return Walk { table, ipa, entry },
            }
        }
    }

    /// Locks a table that an entry (or the RD) refers to.
    pub(crate) fn table(&self, pa: u64, level: Level, format: Format) -> Table<'_> {
        let granule = self.checked(pa, State::Rtt, self.granules.lock_table(pa, level));
        Table::new(granule, self.platform.granule(pa), level, format)
    }

    /// Locks the RD of a REC that runs.
    pub(crate) fn lock_rd(&self, rd: u64) -> Locked<'_> {
        self.checked(rd, State::Rd, self.granules.lock_named(rd, State::Rd).ok())
    }

    /// Locks a page that an RTT entry, or auxiliary storage that a REC refers to.
    pub(crate) fn lock_owned(&self, pa: u64, state: State) -> Locked<'_> {
        self.checked(pa, state, self.granules.lock_owned(pa, state))
    }

    /// A reference that an RMM object holds is never wrong.
    fn checked<'a>(&self, pa: u64, state: State, locked: Option<Locked<'a>>) -> Locked<'a> {
        match locked {
            Some(locked) => locked,
            None => self.platform.fatal(format_args!("granule {pa:#x} should be {state:?}")),
        }
    }

    /// Wipes a granule and makes it DELEGATED. Its reference count is zero or no longer matters.
    pub(crate) fn wipe_to_delegated(&self, granule: &Locked<'_>) {
        self.platform.zero(granule.pa());
        granule.set_state(State::Delegated);
    }

    /// Walks to the page level and calls `f` with the Realm's page, which cannot be destroyed meanwhile, and the
    /// index of the word at `ipa` in it.
    pub(crate) fn with_realm_page<R>(
        &self,
        stage2: &Stage2,
        ipa: u64,
        f: impl FnOnce(&Page, usize) -> R,
    ) -> Result<R, Absent> {
        let walk = self.walk(stage2, None, ipa, Level::PAGE);
        match walk.entry {
            Entry::Assigned(pa, Ripas::Ram) => {
                let in_block = ipa.wrapping_sub(walk.level().align_down(ipa));
                let page = pa.wrapping_add(Level::PAGE.align_down(in_block));
                // Twelve bits, in words.
                let word = (ipa % GRANULE_SIZE / 8) as usize;
                Ok(f(self.platform.granule(page), word))
            }
            Entry::Unassigned(Ripas::Empty) | Entry::Assigned(_, Ripas::Empty) => Err(Absent::Empty),
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
    Fault(Level),
}
