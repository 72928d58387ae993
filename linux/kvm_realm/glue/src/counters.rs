//! What the module counts by watching its own SMCs, independent of the core's book-keeping: a test compares the two,
//! and `granules_delegated` must be zero when no Realm exists.

use core::sync::atomic::{AtomicI64, AtomicU64, Ordering::Relaxed};

const SUCCESS: u64 = 0;
const GRANULE_DELEGATE: u64 = 0xC400_0151;
const GRANULE_UNDELEGATE: u64 = 0xC400_0152;
const DATA_CREATE: u64 = 0xC400_0153;
const DATA_CREATE_UNKNOWN: u64 = 0xC400_0154;

pub(crate) static SMCS: AtomicU64 = AtomicU64::new(0);
pub(crate) static DELEGATED: AtomicI64 = AtomicI64::new(0);
pub(crate) static PINNED: AtomicI64 = AtomicI64::new(0);
/// Granules whose undelegation the RMM refused. Each stays out of the kernel's hands for ever.
pub(crate) static REFUSED: AtomicU64 = AtomicU64::new(0);
/// The newest page of some Realm's private memory that still is one.
pub(crate) static LAST_PRIVATE: AtomicU64 = AtomicU64::new(0);

/// To be told of every SMC: its function and first two arguments, and the status that came back.
pub(crate) fn saw_smc(function: u64, x1: u64, x2: u64, status: u64) {
    SMCS.fetch_add(1, Relaxed);
    match (function, status) {
        (GRANULE_DELEGATE, SUCCESS) => {
            DELEGATED.fetch_add(1, Relaxed);
        }
        (GRANULE_UNDELEGATE, SUCCESS) => {
            DELEGATED.fetch_sub(1, Relaxed);
            let _ = LAST_PRIVATE.compare_exchange(x1, 0, Relaxed, Relaxed);
        }
        (GRANULE_UNDELEGATE, _) => {
            REFUSED.fetch_add(1, Relaxed);
        }
        (DATA_CREATE | DATA_CREATE_UNKNOWN, SUCCESS) => LAST_PRIVATE.store(x2, Relaxed),
        _ => {}
    }
}

/// To be told of every entry into a guest.
pub(crate) fn saw_entry() {
    SMCS.fetch_add(1, Relaxed);
}
