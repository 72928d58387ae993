//! Every granule's state, lock and reference count, in one 16-bit word each.
//!
//! | bits | meaning |
//! |---|---|
//! | 15 | lock |
//! | 14:12 | [`State`] |
//! | 11:0 | reference count |
//!
//! The state changes only under the lock. The count of an RTT (its ASSIGNED and TABLE entries) changes under its
//! lock; the count of an RD (its RECs) goes up under the lock and may go down without it, so that destroying a
//! REC needs no second lock; the count of a REC (1 while it runs) goes up under the lock and down without it.
//!
//! Every DELEGATED granule is filled with zeroes: whoever makes a granule DELEGATED wipes it first.

use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};

use crate::lock::Rank;
use crate::lock::held::Held;
use crate::platform::GRANULE_SIZE;
use crate::sync::{AtomicU16, spin_loop};

const LOCK: u16 = 1 << 15;
const STATE_SHIFT: u32 = 12;
const STATE_MASK: u16 = 7 << STATE_SHIFT;
const COUNT_MASK: u16 = (1 << STATE_SHIFT) - 1;

/// Most DRAM banks that the table can describe.
pub const MAX_BANKS: usize = 8;

/// What a granule is (specification, section "Granule lifecycle").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum State {
    /// Not the RMM's.
    Undelegated = 0,
    /// The RMM's, free and zero.
    Delegated = 1,
    /// A Realm descriptor.
    Rd = 2,
    /// A REC.
    Rec = 3,
    /// Auxiliary storage of a REC.
    RecAux = 4,
    /// A page of a Realm.
    Data = 5,
    /// A stage 2 translation table.
    Rtt = 6,
}

impl State {
    const fn bits(self) -> u16 {
        // The discriminants fit in three bits.
        (self as u16) << STATE_SHIFT
    }
}

/// A range of DRAM that may be delegated, in bytes; both fields are granule aligned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DramBank {
    /// First byte.
    pub base: u64,
    /// Length.
    pub size: u64,
}

/// Why the RMM cannot start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InitError {
    /// No bank, more than [`MAX_BANKS`], or a bank that is unaligned, empty or wraps.
    Banks,
    /// Two banks overlap or are not in ascending order.
    BankOrder,
    /// The metadata slice is shorter than [`metadata_len`].
    Metadata,
    /// The CPU lacks something that Realms need.
    Cpu,
}

/// How many metadata words the banks need, or `None` if the total is absurd.
pub fn metadata_len(banks: &[DramBank]) -> Option<usize> {
    let bytes = banks.iter().try_fold(0u64, |sum, bank| sum.checked_add(bank.size))?;
    usize::try_from(bytes / GRANULE_SIZE).ok()
}

#[derive(Clone, Copy, Default)]
struct Bank {
    base: u64,
    size: u64,
    first: usize,
}

/// The table of all granules.
pub(crate) struct GranuleTable<'m> {
    banks: [Bank; MAX_BANKS],
    metadata: &'m [AtomicU16],
}

impl<'m> GranuleTable<'m> {
    pub(crate) fn new(banks: &[DramBank], metadata: &'m [AtomicU16]) -> Result<Self, InitError> {
        if banks.is_empty() || banks.len() > MAX_BANKS {
            return Err(InitError::Banks);
        }
        let mut table = [Bank::default(); MAX_BANKS];
        let mut first = 0usize;
        let mut end = 0u64;
        for (slot, bank) in table.iter_mut().zip(banks) {
            let aligned = (bank.base | bank.size) % GRANULE_SIZE == 0;
            let top = bank.base.checked_add(bank.size).ok_or(InitError::Banks)?;
            if !aligned || bank.size == 0 {
                return Err(InitError::Banks);
            }
            if bank.base < end {
                return Err(InitError::BankOrder);
            }
            end = top;
            *slot = Bank { base: bank.base, size: bank.size, first };
            let granules = usize::try_from(bank.size / GRANULE_SIZE).map_err(|_| InitError::Banks)?;
            first = first.checked_add(granules).ok_or(InitError::Banks)?;
        }
        if metadata.len() < first {
            return Err(InitError::Metadata);
        }
        Ok(Self { banks: table, metadata })
    }

    /// The metadata of the granule at `pa`; `None` if unaligned or not delegable.
    fn find(&self, pa: u64) -> Option<&AtomicU16> {
        if pa % GRANULE_SIZE != 0 {
            return None;
        }
        for bank in &self.banks {
            let offset = pa.wrapping_sub(bank.base);
            if offset < bank.size {
                let index = usize::try_from(offset / GRANULE_SIZE).ok()?;
                // Checked when the table was made.
                return self.metadata.get(bank.first.wrapping_add(index));
            }
        }
        None
    }

    /// Whether the granule is delegable, and UNDELEGATED at this moment: a plausible NS buffer.
    pub(crate) fn is_undelegated(&self, pa: u64) -> bool {
        self.find(pa).is_some_and(|meta| meta.load(Relaxed) & STATE_MASK == State::Undelegated.bits())
    }

    /// The state at this moment.
    pub(crate) fn state(&self, pa: u64) -> Option<State> {
        use State::{Data, Delegated, Rd, Rec, RecAux, Rtt, Undelegated};
        let bits = self.find(pa)?.load(Relaxed) & STATE_MASK;
        [Undelegated, Delegated, Rd, Rec, RecAux, Data, Rtt].into_iter().find(|state| state.bits() == bits)
    }

    /// Locks the granule at `pa` if it is aligned, delegable and in `state`. See [`crate::lock`].
    pub(crate) fn lock(&self, pa: u64, state: State, rank: Rank) -> Option<Locked<'_>> {
        let meta = self.find(pa)?;
        let held = Held::acquire(rank);
        let mut current = meta.load(Relaxed);
        loop {
            if current & LOCK != 0 {
                spin_loop();
                current = meta.load(Relaxed);
                continue;
            }
            match meta.compare_exchange_weak(current, current | LOCK, Acquire, Relaxed) {
                Ok(_) => break,
                Err(now) => current = now,
            }
        }
        let locked = Locked { pa, meta, _held: held };
        // A wrong state drops, and so unlocks, at once: a granule is held only by those who found what they wanted.
        (locked.state_bits() == state.bits()).then_some(locked)
    }

    /// The metadata of a granule, for comparisons.
    #[cfg(test)]
    pub(crate) fn raw(&self, pa: u64) -> u16 {
        self.find(pa).map_or(0, |meta| meta.load(Relaxed))
    }

    /// Takes one reference away from the granule at `pa` without its lock.
    pub(crate) fn put(&self, pa: u64) {
        if let Some(meta) = self.find(pa) {
            meta.fetch_sub(1, Release);
        }
    }
}

/// A locked granule; dropping it unlocks.
pub(crate) struct Locked<'t> {
    pa: u64,
    meta: &'t AtomicU16,
    _held: Held,
}

impl Locked<'_> {
    /// The granule's address.
    pub(crate) fn pa(&self) -> u64 {
        self.pa
    }

    fn state_bits(&self) -> u16 {
        self.meta.load(Relaxed) & STATE_MASK
    }

    /// Changes the state; the reference count must be zero and stays so.
    pub(crate) fn set_state(&self, state: State) {
        // Nobody else changes state or count of a locked granule whose count is zero.
        self.meta.store(LOCK | state.bits(), Relaxed);
    }

    /// The reference count.
    pub(crate) fn count(&self) -> u16 {
        self.meta.load(Acquire) & COUNT_MASK
    }

    /// Adds references. Callers keep the count below 4096: at most 512 per RTT, 1023 per RD, 1 per REC.
    pub(crate) fn get(&self, references: u16) {
        self.meta.fetch_add(references, Relaxed);
    }

    /// Takes references away.
    pub(crate) fn put(&self, references: u16) {
        self.meta.fetch_sub(references, Relaxed);
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        self.meta.fetch_and(!LOCK, AcqRel);
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::vec::Vec;

    fn metadata(n: usize) -> Vec<AtomicU16> {
        (0..n).map(|_| AtomicU16::new(0)).collect()
    }

    fn lock<'t>(table: &'t GranuleTable<'_>, pa: u64, state: State) -> Option<Locked<'t>> {
        table.lock(pa, state, Rank::Named(pa))
    }

    #[test]
    fn banks_are_checked() {
        let meta = metadata(4);
        let bank = |base, size| DramBank { base, size };
        let err = |banks: &[DramBank]| GranuleTable::new(banks, &meta).err();
        assert_eq!(err(&[]), Some(InitError::Banks));
        assert_eq!(err(&[bank(1, 0x1000)]), Some(InitError::Banks));
        assert_eq!(err(&[bank(0x1000, 0x1000), bank(0, 0x1000)]), Some(InitError::BankOrder));
        assert_eq!(err(&[bank(0, 0x5000)]), Some(InitError::Metadata));
        assert_eq!(err(&[bank(0, 0x2000), bank(0x8000, 0x2000)]), None);
    }

    #[test]
    fn only_aligned_granules_inside_a_bank_are_found() {
        let meta = metadata(2);
        let table = GranuleTable::new(
            &[DramBank { base: 0x1000, size: 0x1000 }, DramBank { base: 0x8000, size: 0x1000 }],
            &meta,
        )
        .unwrap();
        assert!(lock(&table, 0x1000, State::Undelegated).is_some());
        assert!(lock(&table, 0x8000, State::Undelegated).is_some());
        assert!(lock(&table, 0x1008, State::Undelegated).is_none());
        assert!(lock(&table, 0x2000, State::Undelegated).is_none());
        assert!(lock(&table, 0, State::Undelegated).is_none());
        assert!(lock(&table, 0x1000, State::Delegated).is_none());
    }

    #[test]
    fn a_lock_keeps_state_and_count() {
        let meta = metadata(1);
        let table = GranuleTable::new(&[DramBank { base: 0, size: 0x1000 }], &meta).unwrap();
        let locked = lock(&table, 0, State::Undelegated).unwrap();
        locked.set_state(State::Rd);
        locked.get(3);
        drop(locked);
        table.put(0);
        assert_eq!(lock(&table, 0, State::Rd).unwrap().count(), 2);
        assert!(!table.is_undelegated(0));
    }
}
