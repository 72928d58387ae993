//! What the auxiliary granules of a REC hold. Their number is fixed when the Realm is created.

/// The execution context (`crate::context`).
pub(crate) const CONTEXT: usize = 0;

/// Most auxiliary granules that a REC can have.
pub(crate) const MAX: usize = cca_abi::rmi::MAX_REC_AUX;

/// How many granules each REC of a Realm with these features needs (RMI_REC_AUX_COUNT).
pub(crate) const fn count() -> u64 {
    CONTEXT as u64 + 1
}
