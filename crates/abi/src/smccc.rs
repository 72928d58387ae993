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
/// `SMCCC_ARCH_FEATURE_AVAILABILITY`.
pub const ARCH_FEATURE_AVAILABILITY: u64 = 0xC000_0003;

/// SMCCC 1.5, as [`VERSION`] answers it.
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
