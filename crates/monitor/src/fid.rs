//! Function identifiers of the calls that EL3 answers or forwards.

/// The "SVE not live" hint (SMCCC 1.3), not part of the function's identity.
pub const HINT_BIT: u32 = 1 << 16;

/// Returned for every call that is not known to the caller's world.
pub const UNKNOWN: u64 = u64::MAX;

/// SMCCC_VERSION.
pub const SMCCC_VERSION: u32 = 0x8000_0000;
/// SMCCC_ARCH_FEATURES.
pub const SMCCC_ARCH_FEATURES: u32 = 0x8000_0001;

/// PSCI_VERSION.
pub const PSCI_VERSION: u32 = 0x8400_0000;
/// CPU_OFF.
pub const CPU_OFF: u32 = 0x8400_0002;
/// CPU_ON with 32-bit arguments.
pub const CPU_ON_32: u32 = 0x8400_0003;
/// CPU_ON with 64-bit arguments.
pub const CPU_ON_64: u32 = 0xC400_0003;
/// AFFINITY_INFO with 32-bit arguments.
pub const AFFINITY_INFO_32: u32 = 0x8400_0004;
/// AFFINITY_INFO with 64-bit arguments.
pub const AFFINITY_INFO_64: u32 = 0xC400_0004;
/// MIGRATE_INFO_TYPE.
pub const MIGRATE_INFO_TYPE: u32 = 0x8400_0006;
/// SYSTEM_OFF.
pub const SYSTEM_OFF: u32 = 0x8400_0008;
/// SYSTEM_RESET.
pub const SYSTEM_RESET: u32 = 0x8400_0009;
/// PSCI_FEATURES.
pub const PSCI_FEATURES: u32 = 0x8400_000A;

/// First RMI function.
pub const RMI_FIRST: u32 = 0xC400_0150;
/// Last function of the first RMI range.
pub const RMI_LAST: u32 = 0xC400_018E;
/// First function of the second RMI range (RMM 2.0).
pub const RMI2_FIRST: u32 = 0xC400_01D0;
/// Last function of the second RMI range.
pub const RMI2_LAST: u32 = 0xC400_02CF;

/// RMM_RMI_REQ_COMPLETE: the RMM hands a call's results back.
pub const RMI_REQ_COMPLETE: u32 = 0xC400_018F;
/// RMM_GTSI_DELEGATE.
pub const GTSI_DELEGATE: u32 = 0xC400_01B0;
/// RMM_GTSI_UNDELEGATE.
pub const GTSI_UNDELEGATE: u32 = 0xC400_01B1;
/// RMM_ATTEST_GET_REALM_KEY.
pub const ATTEST_GET_REALM_KEY: u32 = 0xC400_01B2;
/// RMM_ATTEST_GET_PLAT_TOKEN.
pub const ATTEST_GET_PLAT_TOKEN: u32 = 0xC400_01B3;
/// RMM_EL3_FEATURES.
pub const EL3_FEATURES: u32 = 0xC400_01B4;
/// RMM_RESERVE_MEMORY.
pub const RESERVE_MEMORY: u32 = 0xC400_01BB;
/// RMM_BOOT_COMPLETE.
pub const BOOT_COMPLETE: u32 = 0xC400_01CF;
