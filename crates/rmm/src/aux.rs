//! What the auxiliary granules of a REC hold. Their number is fixed when the Realm is created.

/// The execution context (`crate::context`).
pub(crate) const CONTEXT: usize = 0;
/// Z0–Z15 of a REC with SVE; also Z16–Z31, from [`HALF`] on, if they fit.
pub(crate) const VECTORS: usize = 1;
/// Z16–Z31, if they do not.
pub(crate) const MORE_VECTORS: usize = 2;

/// Half a granule.
pub(crate) const HALF: u64 = 0x800;

/// Most auxiliary granules that a REC can have.
pub(crate) const MAX: usize = cca_abi::rmi::MAX_REC_AUX;

/// How many granules each REC of a Realm with this ZCR_EL2, if it has SVE, needs (RMI_REC_AUX_COUNT).
pub(crate) const fn count(zcr: Option<u64>) -> u64 {
    match zcr {
        None => 1,
        // 32 vectors of up to 128 bytes.
        Some(0..=7) => 2,
        Some(_) => 3,
    }
}
