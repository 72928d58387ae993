//! The shared half of a Realm's memory: which pages of the VMM it can reach now.
//!
//! A shared page is the VMM's, and stays under the kernel's rule: it may be swapped, moved, merged, discarded, copied on
//! write. The kernel says so before it does ([`MemoryHook`]), the page is unmapped from the Realm, and the Realm's next
//! access faults and finds the page that is there then. So what VMM and Realm see is always the same page, and no page is
//! pinned.
//!
//! The kernel tells in any thread, with locks of its own held, also while memory is being reclaimed. So this part has a
//! spin lock of its own, under which nothing is allocated: unmapping is one RMI command per page.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::ops::Range;

use crate::errno::{Errno, Result};
use crate::kernel::{Kernel, MemoryHook, PAGE_SIZE, SpinLock, reserve};
use crate::lock::guarded;
use crate::rmi::{Rmi, RmiError};
use crate::rtt::PAGE_LEVEL;
use crate::slots::intersection;
use crate::stats::Stats;

/// Pages per word and per chunk of a bitmap.
const WORD: u64 = 64;
const CHUNK_WORDS: usize = 64;
const CHUNK: u64 = WORD * CHUNK_WORDS as u64;
/// Pages unmapped under the lock at a time.
const BATCH: u32 = 64;

/// A set of pages that grows only when told to, and never while it is changed.
#[derive(Default)]
struct Bitmap {
    /// Sorted by number.
    chunks: Vec<(u64, Box<[u64; CHUNK_WORDS]>)>,
}

impl Bitmap {
    fn word(&self, page: u64) -> Option<&u64> {
        let at = self.chunks.binary_search_by_key(&(page / CHUNK), |chunk| chunk.0).ok()?;
        self.chunks.get(at)?.1.get(usize::try_from(page % CHUNK / WORD).ok()?)
    }

    fn word_mut(&mut self, page: u64) -> Option<&mut u64> {
        let at = self.chunks.binary_search_by_key(&(page / CHUNK), |chunk| chunk.0).ok()?;
        self.chunks.get_mut(at)?.1.get_mut(usize::try_from(page % CHUNK / WORD).ok()?)
    }

    fn contains(&self, page: u64) -> bool {
        self.word(page).is_some_and(|word| word & 1 << (page % WORD) != 0)
    }

    fn set(&mut self, page: u64, member: bool) {
        if let Some(word) = self.word_mut(page) {
            let bit = 1 << (page % WORD);
            *word = if member { *word | bit } else { *word & !bit };
        }
    }

    /// The first member in `range`.
    fn next(&self, range: &Range<u64>) -> Option<u64> {
        let first = self.chunks.partition_point(|chunk| chunk.0 < range.start / CHUNK);
        for (number, words) in self.chunks.get(first..)? {
            for (n, word) in (0..).zip(words.iter()) {
                let base = number * CHUNK + n * WORD;
                if base >= range.end {
                    return None;
                }
                let skip = range.start.saturating_sub(base);
                let word = if skip >= WORD { 0 } else { word >> skip << skip };
                if word != 0 {
                    let found = base + u64::from(word.trailing_zeros());
                    return (found < range.end).then_some(found);
                }
            }
        }
        None
    }
}

/// A memory slot, as far as its shared face is concerned.
struct View {
    id: u32,
    base: u64,
    size: u64,
    user_address: u64,
    mapped: Bitmap,
}

struct Inner {
    /// The Realm and its shared bit, while it has tables.
    realm: Option<(u64, u64)>,
    views: Vec<View>,
    /// Changes of the VMM's mappings that have begun and not ended, and the range that covers them all.
    changing: u32,
    changing_range: Range<u64>,
    /// Changes that have ended.
    changes: u64,
}

/// What became of an attempt to map a page.
pub(crate) enum Mapped {
    /// The Realm can reach it.
    Done,
    /// It could already: by another vCPU's fault.
    Already,
    /// The VMM's mapping has changed, or is changing: look it up again.
    Retry,
    /// The RMM refused; if by lack of tables, more of them may help.
    Refused(RmiError),
}

/// The shared pages of one VM.
pub(crate) struct Shared<K: Kernel> {
    rmi: Rmi<K>,
    inner: SpinLock<K, Inner>,
}

impl<K: Kernel> Shared<K> {
    pub(crate) fn new(rmi: Rmi<K>) -> Self {
        let inner = Inner { realm: None, views: Vec::new(), changing: 0, changing_range: 0..0, changes: 0 };
        Self { rmi, inner: guarded(c"shared.pages", inner) }
    }

    /// The Realm has tables now, or no longer; in the second case nothing is mapped any more.
    pub(crate) fn set_realm(&self, realm: Option<(u64, u64)>) {
        let views = self.inner.lock().views.len();
        if realm.is_none() {
            for at in 0..views {
                self.forget(at);
            }
        }
        self.inner.lock().realm = realm;
    }

    fn forget(&self, at: usize) {
        let mut inner = self.inner.lock();
        let Some(view) = inner.views.get_mut(at) else { return };
        let mut pages: u64 = 0;
        for (_, words) in &mut view.mapped.chunks {
            pages += words.iter().map(|word| u64::from(word.count_ones())).sum::<u64>();
            words.fill(0);
        }
        drop(inner);
        self.rmi.each_stats(|stats| stats.count_unshared(pages));
    }

    /// A slot has come. Slots come and go one at a time, as they do with the VM's memory locked.
    pub(crate) fn add_slot(&self, id: u32, base: u64, size: u64, user_address: u64) -> Result<()> {
        let mut views = Vec::new();
        let len = self.inner.lock().views.len();
        reserve(&mut views, len + 1)?;
        let mut inner = self.inner.lock();
        views.append(&mut inner.views);
        views.push(View { id, base, size, user_address, mapped: Bitmap::default() });
        core::mem::swap(&mut inner.views, &mut views);
        drop(inner);
        // The old, empty list is freed here, without the lock.
        drop(views);
        Ok(())
    }

    /// A slot has gone; its pages were unmapped before.
    pub(crate) fn remove_slot(&self, id: u32) {
        let mut inner = self.inner.lock();
        let at = inner.views.iter().position(|view| view.id == id);
        let gone = at.map(|at| inner.views.swap_remove(at));
        drop(inner);
        drop(gone);
    }

    /// What to give to [`Self::map`] after the VMM's page was looked up.
    pub(crate) fn changes(&self) -> u64 {
        self.inner.lock().changes
    }

    /// Makes room to remember the page of slot `id` at `gpa`.
    pub(crate) fn prepare(&self, id: u32, gpa: u64) -> Result<()> {
        let (number, len) = {
            let inner = self.inner.lock();
            let view = inner.views.iter().find(|view| view.id == id).ok_or(Errno::EIO)?;
            let page = (gpa - view.base) / PAGE_SIZE;
            if view.mapped.word(page).is_some() {
                return Ok(());
            }
            (page / CHUNK, view.mapped.chunks.len())
        };
        let mut chunk = Some(Box::new([0; CHUNK_WORDS]));
        let mut chunks = Vec::new();
        reserve(&mut chunks, len + 1)?;
        let mut inner = self.inner.lock();
        if let Some(view) = inner.views.iter_mut().find(|view| view.id == id) {
            let old = &mut view.mapped.chunks;
            if let Err(at) = old.binary_search_by_key(&number, |chunk| chunk.0) {
                if let Some(chunk) = chunk.take() {
                    chunks.append(old);
                    chunks.insert(at, (number, chunk));
                    core::mem::swap(old, &mut chunks);
                }
            }
        }
        drop(inner);
        drop(chunks);
        Ok(())
    }

    /// Maps the page of slot `id` at `gpa`, whose VMM address was looked up since [`Self::changes`] said `changes`.
    pub(crate) fn map(&self, id: u32, gpa: u64, changes: u64, desc: u64) -> Mapped {
        let mut inner = self.inner.lock();
        let Inner { realm, views, changing, changing_range, changes: now } = &mut *inner;
        let Some((rd, shared_bit)) = *realm else { return Mapped::Retry };
        let Some(view) = views.iter_mut().find(|view| view.id == id) else { return Mapped::Retry };
        let user = view.user_address + (gpa - view.base);
        let page = (gpa - view.base) / PAGE_SIZE;
        if changes != *now || (*changing > 0 && changing_range.contains(&user)) {
            return Mapped::Retry;
        }
        if view.mapped.contains(page) {
            return Mapped::Already;
        }
        match self.rmi.rtt_map_unprotected(rd, gpa | shared_bit, PAGE_LEVEL, desc) {
            Ok(()) => {
                view.mapped.set(page, true);
                drop(inner);
                self.rmi.each_stats(Stats::count_shared);
                Mapped::Done
            }
            Err(error) => Mapped::Refused(error),
        }
    }

    /// Unmaps up to a batch of the pages that `select` finds in a view. Whether there may be more; and how many the RMM
    /// did not let go of.
    fn unmap_some(&self, select: &dyn Fn(&View) -> Range<u64>) -> (bool, u64) {
        let (mut left, mut lost, mut done) = (BATCH, 0, 0);
        let mut inner = self.inner.lock();
        let Some((rd, shared_bit)) = inner.realm else { return (false, 0) };
        for view in &mut inner.views {
            let mut pages = select(view);
            while let Some(page) = view.mapped.next(&pages).filter(|_| left > 0) {
                left -= 1;
                pages.start = page + 1;
                view.mapped.set(page, false);
                done += 1;
                let ipa = (view.base + page * PAGE_SIZE) | shared_bit;
                match self.rmi.rtt_unmap_unprotected(rd, ipa, PAGE_LEVEL) {
                    Ok(()) => {}
                    // Not mapped: nothing to take away.
                    Err(error) if error.rtt_level().is_some() => {}
                    Err(error) => {
                        self.rmi.log("unmap a shared page", error);
                        lost += 1;
                    }
                }
            }
        }
        drop(inner);
        self.rmi.each_stats(|stats| stats.count_unshared(done));
        (left == 0, lost)
    }

    /// Unmaps the pages at these guest addresses. Returns how many the RMM did not let go of.
    pub(crate) fn unmap(&self, range: &Range<u64>) -> u64 {
        let mut lost = 0;
        loop {
            let (more, these) = self.unmap_some(&|view| {
                let part = intersection(range, &(view.base..view.base + view.size));
                (part.start - view.base) / PAGE_SIZE..(part.end - view.base).div_ceil(PAGE_SIZE)
            });
            lost += these;
            if !more {
                return lost;
            }
            self.rmi.kernel().cond_resched();
        }
    }
}

impl<K: Kernel> MemoryHook for Shared<K> {
    fn change_begins(&self, range: Range<u64>, may_sleep: bool) {
        {
            let mut inner = self.inner.lock();
            if inner.changing == 0 {
                inner.changing_range = range.clone();
            } else {
                let known = &inner.changing_range;
                inner.changing_range = known.start.min(range.start)..known.end.max(range.end);
            }
            inner.changing += 1;
        }
        while self
            .unmap_some(&|view| {
                let user = view.user_address..view.user_address.saturating_add(view.size);
                let part = intersection(&range, &user);
                let offset = |address: u64| address.saturating_sub(view.user_address);
                if part.is_empty() {
                    0..0
                } else {
                    offset(part.start) / PAGE_SIZE..offset(part.end).div_ceil(PAGE_SIZE)
                }
            })
            .0
        {
            if may_sleep {
                self.rmi.kernel().cond_resched();
            }
        }
    }

    fn change_ends(&self) {
        let mut inner = self.inner.lock();
        inner.changes = inner.changes.wrapping_add(1);
        inner.changing = inner.changing.saturating_sub(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_found_across_words_and_chunks() {
        let mut bitmap = Bitmap::default();
        for number in [0, 1, 7] {
            bitmap.chunks.push((number, Box::new([0; CHUNK_WORDS])));
        }
        let pages = [0, 63, 64, CHUNK - 1, CHUNK, 7 * CHUNK + 70];
        for page in pages {
            bitmap.set(page, true);
        }
        // No room for it: nothing happens.
        bitmap.set(3 * CHUNK, true);
        let mut found = Vec::new();
        let mut range = 0..u64::MAX;
        while let Some(page) = bitmap.next(&range) {
            found.push(page);
            range.start = page + 1;
        }
        assert_eq!(found, pages);
        assert_eq!(bitmap.next(&(1..63)), None);
        assert_eq!(bitmap.next(&(65..CHUNK - 1)), None);
        assert_eq!(bitmap.next(&(CHUNK + 1..7 * CHUNK + 70)), None);
        assert!(!bitmap.contains(3 * CHUNK));
    }
}
