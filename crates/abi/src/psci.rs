//! Power State Coordination Interface 1.1 (Arm DEN0022): identifiers and return codes.

/// Version 1.1, as `PSCI_VERSION` answers it.
pub const VERSION_1_1: u64 = 0x0001_0001;

/// Function identifiers. `_32` and `_64` are the two widths of one function.
pub mod fid {
    #![allow(missing_docs)]
    pub const VERSION: u64 = 0x8400_0000;
    pub const CPU_SUSPEND_32: u64 = 0x8400_0001;
    pub const CPU_SUSPEND_64: u64 = 0xC400_0001;
    pub const CPU_OFF: u64 = 0x8400_0002;
    pub const CPU_ON_32: u64 = 0x8400_0003;
    pub const CPU_ON_64: u64 = 0xC400_0003;
    pub const AFFINITY_INFO_32: u64 = 0x8400_0004;
    pub const AFFINITY_INFO_64: u64 = 0xC400_0004;
    pub const MIGRATE_32: u64 = 0x8400_0005;
    pub const MIGRATE_64: u64 = 0xC400_0005;
    pub const MIGRATE_INFO_TYPE: u64 = 0x8400_0006;
    pub const MIGRATE_INFO_UP_CPU_32: u64 = 0x8400_0007;
    pub const MIGRATE_INFO_UP_CPU_64: u64 = 0xC400_0007;
    pub const SYSTEM_OFF: u64 = 0x8400_0008;
    pub const SYSTEM_RESET: u64 = 0x8400_0009;
    pub const FEATURES: u64 = 0x8400_000A;
    pub const SYSTEM_SUSPEND_32: u64 = 0x8400_000E;
    pub const SYSTEM_SUSPEND_64: u64 = 0xC400_000E;
    pub const SYSTEM_RESET2_32: u64 = 0x8400_0012;
    pub const SYSTEM_RESET2_64: u64 = 0xC400_0012;
}

/// `SYSTEM_RESET2`: the architecture's one type.
pub const SYSTEM_WARM_RESET: u64 = 0;

/// `AFFINITY_INFO`: the CPU is on.
pub const AFFINITY_ON: i64 = 0;
/// `AFFINITY_INFO`: the CPU is off.
pub const AFFINITY_OFF: i64 = 1;
/// `AFFINITY_INFO`: a `CPU_ON` is under way.
pub const AFFINITY_ON_PENDING: i64 = 2;

/// `MIGRATE_INFO_TYPE`: there is no trusted OS that would have to be migrated.
pub const MIGRATION_NOT_REQUIRED: u64 = 2;

/// Return codes, sign-extended into `x0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i64)]
#[allow(missing_docs)]
pub enum Code {
    Success = 0,
    NotSupported = -1,
    InvalidParameters = -2,
    Denied = -3,
    AlreadyOn = -4,
    OnPending = -5,
    InternalFailure = -6,
    NotPresent = -7,
    Disabled = -8,
    InvalidAddress = -9,
}

impl Code {
    /// The register value: sign-extended to 64 bits.
    #[must_use]
    pub const fn to_register(self) -> u64 {
        self as i64 as u64
    }
}
