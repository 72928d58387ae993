//! The order of locks.
//!
//! 1. Granules that the host names (RD, REC, the granules to become something), in ascending order of their
//!    addresses. Each is checked against the expected state the moment it is locked and released at once if it
//!    is something else, so nobody waits while holding a granule of an unexpected kind.
//! 2. RTTs of one Realm, from the start level down, hand over hand; several start tables in ascending order. The
//!    RD's lock may be released once the start table's is held.
//! 3. One granule that an RTT entry points to (DATA), or one of a REC's auxiliary granules.
//!
//! [`Rank`] is this list as a type. Every lock is taken with its rank, and with the feature `check-locks` (and in
//! this crate's tests) a lock that is not above all those that the CPU holds is a panic.
//!
//! A granule of kind 2 or 3 is never waited for by somebody who holds it as kind 1: kind 1 holds DATA and RTT
//! granules only while they are still DELEGATED, and then no entry points to them yet.
//!
//! A running REC holds no lock (its reference count says that it runs); the RSI commands take the RD's or the
//! RTTs' locks like a host command, and never two of kind 1.

use cca_abi::rmi::Status;

use crate::granule::{GranuleTable, Locked, State};
use crate::level::Level;

/// A lock's place in the order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Rank {
    /// Named by the host (or by its owner REC), by address.
    Named(u64),
    /// A table, by level and address.
    Table(Level, u64),
    /// What an entry or a REC points to.
    Owned,
}

/// A granule that the host names, and what it must be.
pub(crate) type Wanted = (u64, State);

impl GranuleTable<'_> {
    /// Locks a granule that the host named.
    ///
    /// # Errors
    /// `RMI_ERROR_INPUT` if it is unaligned, not delegable or not in `state`.
    pub(crate) fn lock_named(&self, pa: u64, state: State) -> Result<Locked<'_>, Status> {
        self.lock(pa, state, Rank::Named(pa)).ok_or(Status::ErrorInput)
    }

    /// Locks two granules that the host named, and returns them in the order given.
    ///
    /// # Errors
    /// `RMI_ERROR_INPUT` if one is unaligned, not delegable or not in its state, or both are the same.
    pub(crate) fn lock_both(
        &self,
        first: Wanted,
        second: Wanted,
    ) -> Result<(Locked<'_>, Locked<'_>), Status> {
        if first.0 < second.0 {
            let low = self.lock_named(first.0, first.1)?;
            Ok((low, self.lock_named(second.0, second.1)?))
        } else if second.0 < first.0 {
            let low = self.lock_named(second.0, second.1)?;
            Ok((self.lock_named(first.0, first.1)?, low))
        } else {
            Err(Status::ErrorInput)
        }
    }

    /// Locks the granules that the host named, in ascending order, into `locked`, which is at least as long.
    ///
    /// # Errors
    /// `RMI_ERROR_INPUT` if one is unaligned, not delegable, not in its state, or given twice; those that were
    /// locked before it are in `locked`.
    pub(crate) fn lock_each<'t>(
        &'t self,
        wanted: &[Wanted],
        locked: &mut [Option<Locked<'t>>],
    ) -> Result<(), Status> {
        let mut above = None;
        let mut left = wanted.len();
        for slot in locked {
            let rest = wanted.iter().filter(|(pa, _)| above.is_none_or(|above| *pa > above));
            let Some(&(pa, state)) = rest.min_by_key(|(pa, _)| *pa) else { break };
            *slot = Some(self.lock_named(pa, state)?);
            above = Some(pa);
            left = left.saturating_sub(1);
        }
        // Two with one address take one slot.
        if left == 0 { Ok(()) } else { Err(Status::ErrorInput) }
    }

    /// Locks a table that an entry or an RD points to.
    pub(crate) fn lock_table(&self, pa: u64, level: Level) -> Option<Locked<'_>> {
        self.lock(pa, State::Rtt, Rank::Table(level, pa))
    }

    /// Locks a page that an entry points to, or a granule that a REC owns.
    pub(crate) fn lock_owned(&self, pa: u64, state: State) -> Option<Locked<'_>> {
        self.lock(pa, state, Rank::Owned)
    }
}

/// What a CPU holds is not looked at.
#[cfg(not(any(test, feature = "check-locks")))]
pub(crate) mod held {
    /// Nothing.
    pub(crate) struct Held;

    impl Held {
        pub(crate) fn acquire(_: super::Rank) -> Self {
            Self
        }
    }
}

/// Looks at what a CPU (a thread) holds whenever it takes a lock.
#[cfg(any(test, feature = "check-locks"))]
#[allow(clippy::missing_const_for_thread_local, reason = "shuttle's macro has no such form")]
pub(crate) mod held {
    extern crate std;
    use super::Rank;
    use std::cell::RefCell;
    use std::vec::Vec;

    #[cfg(feature = "explore")]
    use shuttle::thread_local;
    #[cfg(not(feature = "explore"))]
    use std::thread_local;

    thread_local! {
        static RANKS: RefCell<Vec<Rank>> = RefCell::new(Vec::new());
    }

    /// A lock that is held.
    pub(crate) struct Held(Rank);

    impl Held {
        /// Before the lock is taken.
        pub(crate) fn acquire(rank: Rank) -> Self {
            RANKS.with(|ranks| {
                let mut ranks = ranks.borrow_mut();
                if let Some(held) = ranks.iter().find(|&&held| held >= rank) {
                    panic!("{rank:x?} is locked by somebody who holds {held:x?}");
                }
                ranks.push(rank);
            });
            Self(rank)
        }
    }

    impl Drop for Held {
        fn drop(&mut self) {
            RANKS.with(|ranks| ranks.borrow_mut().retain(|&rank| rank != self.0));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::held::Held;
    use super::*;

    #[test]
    fn ranks_are_the_order() {
        let order = [
            Rank::Named(0x1000),
            Rank::Named(0x2000),
            Rank::Table(Level::L1, 0x9000),
            Rank::Table(Level::L1, 0xA000),
            Rank::Table(Level::L2, 0x1000),
            Rank::Owned,
        ];
        assert!(order.is_sorted());
        let _all = order.map(Held::acquire);
    }

    #[test]
    #[should_panic(expected = "is locked by somebody who holds")]
    fn a_lock_out_of_order_is_a_panic() {
        let _table = Held::acquire(Rank::Table(Level::L2, 0x1000));
        let _rd = Held::acquire(Rank::Named(0x2000));
    }
}
