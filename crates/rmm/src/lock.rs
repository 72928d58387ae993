//! The order of locks.
//!
//! 1. Granules that the host names (RD, REC, the granules to become something), in ascending order of their
//!    addresses. Each is checked against the expected state the moment it is locked and released at once if it
//!    is something else, so nobody waits while holding a granule of an unexpected kind.
//! 2. RTTs of one Realm, from the start level down, hand over hand. The RD's lock may be released once the start
//!    table's is held.
//! 3. The granule that an RTT entry points to (DATA, child RTT), or a REC's auxiliary granules.
//!
//! A granule of kind 3 is never waited for by somebody who holds it as kind 1: kind 1 holds DATA and RTT granules
//! only while they are still DELEGATED, and then no entry points to them yet.
//!
//! A running REC holds no lock (its reference count says that it runs); the RSI commands take the RD's or the
//! RTTs' locks like a host command, and never two of kind 1.

use cca_abi::rmi::Status;

use crate::granule::{GranuleTable, Locked, State};

impl GranuleTable<'_> {
    /// Locks a granule that the host named.
    ///
    /// # Errors
    /// `RMI_ERROR_INPUT` if it is unaligned, not delegable or not in `state`.
    pub(crate) fn lock_named(&self, pa: u64, state: State) -> Result<Locked<'_>, Status> {
        self.lock(pa, state).ok_or(Status::ErrorInput)
    }

    /// Locks several granules that the host named, in ascending order, and returns them in the order given.
    ///
    /// # Errors
    /// `RMI_ERROR_INPUT` if one is unaligned, not delegable, not in its state, or given twice.
    pub(crate) fn lock_all<const N: usize>(
        &self,
        wanted: [(u64, State); N],
    ) -> Result<[Locked<'_>; N], Status> {
        let mut order: [usize; N] = core::array::from_fn(|n| n);
        order.sort_unstable_by_key(|&n| wanted[n].0);
        if order.windows(2).any(|pair| wanted[pair[0]].0 == wanted[pair[1]].0) {
            return Err(Status::ErrorInput);
        }
        let mut locked: [Option<Locked<'_>>; N] = [const { None }; N];
        for &n in &order {
            let (pa, state) = wanted[n];
            locked[n] = Some(self.lock_named(pa, state)?);
        }
        Ok(locked.map(|slot| match slot {
            Some(locked) => locked,
            None => unreachable!("`order` is a permutation: every slot was filled"),
        }))
    }
}
