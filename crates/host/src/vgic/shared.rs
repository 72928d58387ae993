//! Interrupts that any vCPU may get: SPIs and LPIs. Each has its own lock, and each vCPU a map of those that it has to
//! look at, so that vCPUs whose interrupts differ never wait for each other.

use crate::lock::{Lock, guarded};
use crate::sync::{AtomicU64, Ordering::SeqCst};
use alloc::boxed::Box;
use alloc::vec::Vec;

use lock_api::Mutex;
use spin::Once;

use super::irq::{Irq, Trigger};
use super::types::Bits;

/// INTIDs come in groups of so many: one word of a map's overview.
const GROUP: usize = 64 * 64;
/// Interrupts are made in chunks of so many, none larger than a page.
const CHUNK: usize = 32;

/// One SPI or LPI.
pub(super) struct Shared {
    pub(super) irq: Irq,
    /// `GICD_IROUTER<n>` of an SPI.
    pub(super) route: u64,
    /// The vCPU that it goes to.
    pub(super) target: Option<u16>,
    /// The vCPU at which it is active, or whose list registers have it.
    pub(super) owner: Option<u16>,
}

impl Shared {
    fn new(trigger: Trigger) -> Shared {
        Shared { irq: Irq::new(trigger), route: 0, target: None, owner: None }
    }

    /// Where it is, or would go.
    pub(super) fn place(&self) -> Option<usize> {
        self.owner.or(self.target).map(usize::from)
    }

    pub(super) fn is_busy(&self) -> bool {
        self.irq.is_loaned() || self.irq.is_pending() || self.irq.is_active()
    }
}

type Chunk<R> = Box<[Mutex<R, Shared>; CHUNK]>;
type Group<R> = Box<[Once<Chunk<R>>; GROUP / CHUNK]>;

/// Interrupts by INTID. A chunk exists once it was asked for.
pub(super) struct Table<R: Lock> {
    groups: Vec<Group<R>>,
}

impl<R: Lock> Table<R> {
    /// Room for INTIDs below `end`.
    pub(super) fn new(end: usize) -> Table<R> {
        let group = || Box::new([const { Once::new() }; GROUP / CHUNK]);
        Table { groups: (0..end.div_ceil(GROUP)).map(|_| group()).collect() }
    }

    fn chunk(&self, intid: usize) -> Option<&Once<Chunk<R>>> {
        self.groups.get(intid / GROUP)?.get(intid % GROUP / CHUNK)
    }

    /// Makes sure that the chunk of `intid` exists. Allocates, so only in process context. Whether there is room.
    pub(super) fn prepare(&self, intid: usize, trigger: Trigger) -> bool {
        let Some(place) = self.chunk(intid) else { return false };
        if !place.is_completed() {
            // Made before, not inside `call_once`: that spins. Of two that are made at once, one is dropped.
            let new = Box::new(core::array::from_fn(|_| guarded(c"vgic.irq", Shared::new(trigger))));
            place.call_once(move || new);
        }
        true
    }

    pub(super) fn get(&self, intid: usize) -> Option<&Mutex<R, Shared>> {
        self.chunk(intid)?.get()?.get(intid % CHUNK)
    }
}

/// The shared interrupts that one vCPU has to look at. A bit is set and cleared under the interrupt's lock; only its
/// vCPU clears.
pub(super) struct Attention {
    groups: Vec<Marks>,
}

struct Marks {
    overview: AtomicU64,
    words: [AtomicU64; 64],
}

impl Attention {
    pub(super) fn new(end: usize) -> Attention {
        let marks = || Marks { overview: AtomicU64::new(0), words: [const { AtomicU64::new(0) }; 64] };
        Attention { groups: (0..end.div_ceil(GROUP)).map(|_| marks()).collect() }
    }

    pub(super) fn set(&self, intid: usize) {
        let Some(group) = self.groups.get(intid / GROUP) else { return };
        let word = intid % GROUP / 64;
        if let Some(bits) = group.words.get(word) {
            bits.fetch_or(1 << (intid % 64), SeqCst);
            // After the word: whoever takes a word out of the overview looks at it once more.
            if group.overview.load(SeqCst) & 1 << word == 0 {
                group.overview.fetch_or(1 << word, SeqCst);
            }
        }
    }

    pub(super) fn clear(&self, intid: usize) {
        let Some(group) = self.groups.get(intid / GROUP) else { return };
        if let Some(bits) = group.words.get(intid % GROUP / 64) {
            bits.fetch_and(!(1 << (intid % 64)), SeqCst);
        }
    }

    /// The INTIDs that are marked, in ascending order.
    pub(super) fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        self.groups.iter().enumerate().flat_map(|(number, group)| {
            let words = Bits::new(group.overview.load(SeqCst));
            words.flat_map(move |word| {
                let bits = group.words.get(word).map_or(0, |bits| Self::word(group, word, bits));
                Bits::new(bits).map(move |bit| number * GROUP + word * 64 + bit)
            })
        })
    }

    fn word(group: &Marks, word: usize, bits: &AtomicU64) -> u64 {
        let found = bits.load(SeqCst);
        if found == 0 {
            group.overview.fetch_and(!(1 << word), SeqCst);
            if bits.load(SeqCst) != 0 {
                group.overview.fetch_or(1 << word, SeqCst);
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    #[test]
    fn marks_are_found_in_order_and_forgotten_when_cleared() {
        let attention = Attention::new(1 << 16);
        for intid in [65_535, 32, 8192, 8255, 4095] {
            attention.set(intid);
        }
        attention.set(1 << 16);
        assert_eq!(attention.iter().collect::<Vec<_>>(), [32, 4095, 8192, 8255, 65_535]);
        attention.clear(8192);
        attention.clear(4095);
        assert_eq!(attention.iter().collect::<Vec<_>>(), [32, 8255, 65_535]);
        attention.set(4095);
        assert_eq!(attention.iter().collect::<Vec<_>>(), [32, 4095, 8255, 65_535]);
    }

    #[test]
    fn no_mark_is_lost_while_its_vcpu_looks() {
        let attention = std::sync::Arc::new(Attention::new(1 << 16));
        const ROUNDS: usize = 20_000;
        let setter = {
            let attention = attention.clone();
            std::thread::spawn(move || (0..ROUNDS).for_each(|n| attention.set(8192 + n % 7 * 64)))
        };
        while !setter.is_finished() {
            for intid in attention.iter().collect::<Vec<_>>() {
                attention.clear(intid);
            }
        }
        // What was set last is still there, or was seen.
        attention.set(9000);
        assert!(attention.iter().any(|intid| intid == 9000));
        for intid in attention.iter().collect::<Vec<_>>() {
            attention.clear(intid);
        }
        assert_eq!(attention.iter().count(), 0);
        for group in &attention.groups {
            for word in &group.words {
                assert_eq!(word.load(SeqCst), 0, "a word that the overview does not know");
            }
        }
    }

    #[test]
    fn interrupts_exist_from_their_chunks_on() {
        let table = Table::<spin::Mutex<()>>::new(1 << 16);
        assert!(table.get(8192).is_none());
        assert!(table.prepare(8200, Trigger::Edge));
        assert!(table.get(8192).is_some() && table.get(8223).is_some());
        assert!(table.get(8224).is_none());
        assert!(!table.prepare(1 << 16, Trigger::Edge));
    }
}
