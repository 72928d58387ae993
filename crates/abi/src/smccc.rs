//! SMC Calling Convention: function identifiers and the architecture calls (Arm DEN0028).

/// Returned in `x0` by whoever does not know a function: all ones.
pub const NOT_SUPPORTED: u64 = u64::MAX;

/// Bit 16 of an identifier: the caller's SVE state need not be preserved. Strip it before comparing.
pub const SVE_HINT: u64 = 1 << 16;

/// `SMCCC_VERSION`.
pub const VERSION: u64 = 0x8000_0000;
/// `SMCCC_ARCH_FEATURES`.
pub const ARCH_FEATURES: u64 = 0x8000_0001;
/// `SMCCC_ARCH_SOC_ID`.
pub const ARCH_SOC_ID: u64 = 0x8000_0002;
/// `SMCCC_ARCH_SOC_ID`, 64-bit.
pub const ARCH_SOC_ID_64: u64 = 0xC000_0002;
/// `SMCCC_ARCH_FEATURE_AVAILABILITY`.
pub const ARCH_FEATURE_AVAILABILITY: u64 = 0xC000_0003;

/// Last identifier of the architecture's 32-bit calls, of which [`VERSION`] is the first.
pub const LAST_ARCH_32: u64 = 0x8000_FFFF;
/// First identifier of the architecture's 64-bit calls.
pub const FIRST_ARCH_64: u64 = 0xC000_0000;
/// Last identifier of the architecture's 64-bit calls.
pub const LAST_ARCH_64: u64 = 0xC000_FFFF;

/// Returned by an architecture call whose argument means nothing.
pub const INVALID_PARAMETER: u64 = (-3_i64) as u64;

/// SMCCC 1.5, as [`VERSION`] answers the host.
pub const VERSION_1_5: u64 = 0x0001_0005;
/// SMCCC 1.2, as the RMM answers a Realm.
pub const VERSION_1_2: u64 = 0x0001_0002;

/// Standard secure service, fast, 64-bit: the base of RMI, RSI and the RMM-EL3 services.
pub const STANDARD_FAST64: u64 = 0xC400_0000;

/// The identifier in `w0`: 32 bits, without the SVE hint.
#[must_use]
pub const fn fid(x0: u64) -> u64 {
    x0 & 0xFFFF_FFFF & !SVE_HINT
}

/// The identifier of a standard fast 64-bit call.
#[must_use]
pub const fn standard_fid(function: u16) -> u64 {
    STANDARD_FAST64 | function as u64
}

/// Function number of a standard fast 64-bit call, or `None` for any other identifier.
#[must_use]
pub const fn standard_fast64(fid: u64) -> Option<u16> {
    if fid & 0xFFFF_0000 == STANDARD_FAST64 {
        // The mask leaves 16 bits.
        Some((fid & 0xFFFF) as u16)
    } else {
        None
    }
}

/// True random number generator, version 1.0 (Arm DEN0098).
pub mod trng {
    #![allow(missing_docs)]
    pub const VERSION: u64 = 0x8400_0050;
    pub const FEATURES: u64 = 0x8400_0051;
    pub const GET_UUID: u64 = 0x8400_0052;
    pub const RND_32: u64 = 0x8400_0053;
    pub const RND_64: u64 = 0xC400_0053;
    /// Version 1.0.
    pub const VERSION_1_0: u64 = 0x1_0000;
    /// Bits of one `RND_32` at most.
    pub const MAX_BITS_32: u64 = 96;
    /// Bits of one `RND_64` at most.
    pub const MAX_BITS_64: u64 = 192;
    pub const INVALID_PARAMETERS: u64 = (-2_i64) as u64;
    pub const NO_ENTROPY: u64 = (-3_i64) as u64;
}
