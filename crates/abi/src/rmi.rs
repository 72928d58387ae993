//! Realm Management Interface 1.0: host → RMM (DEN0137, chapters B4 and C1).

mod structs;

pub use structs::{RealmParams, RecEnter, RecExit, RecParams, RecRun};

/// RMI 1.0 as `RMI_VERSION` speaks it: major in bits 30:16, minor in 15:0.
pub const VERSION_1_0: u64 = 0x1_0000;

/// Function identifiers.
pub mod fid {
    #![allow(missing_docs)]
    pub const VERSION: u64 = 0xC400_0150;
    pub const GRANULE_DELEGATE: u64 = 0xC400_0151;
    pub const GRANULE_UNDELEGATE: u64 = 0xC400_0152;
    pub const DATA_CREATE: u64 = 0xC400_0153;
    pub const DATA_CREATE_UNKNOWN: u64 = 0xC400_0154;
    pub const DATA_DESTROY: u64 = 0xC400_0155;
    pub const REALM_ACTIVATE: u64 = 0xC400_0157;
    pub const REALM_CREATE: u64 = 0xC400_0158;
    pub const REALM_DESTROY: u64 = 0xC400_0159;
    pub const REC_CREATE: u64 = 0xC400_015A;
    pub const REC_DESTROY: u64 = 0xC400_015B;
    pub const REC_ENTER: u64 = 0xC400_015C;
    pub const RTT_CREATE: u64 = 0xC400_015D;
    pub const RTT_DESTROY: u64 = 0xC400_015E;
    pub const RTT_MAP_UNPROTECTED: u64 = 0xC400_015F;
    pub const RTT_READ_ENTRY: u64 = 0xC400_0161;
    pub const RTT_UNMAP_UNPROTECTED: u64 = 0xC400_0162;
    pub const PSCI_COMPLETE: u64 = 0xC400_0164;
    pub const FEATURES: u64 = 0xC400_0165;
    pub const RTT_FOLD: u64 = 0xC400_0166;
    pub const REC_AUX_COUNT: u64 = 0xC400_0167;
    pub const RTT_INIT_RIPAS: u64 = 0xC400_0168;
    pub const RTT_SET_RIPAS: u64 = 0xC400_0169;
}

/// First function number of the RMI range of RMM 1.0.
pub const FIRST_FUNCTION: u16 = 0x150;
/// Last function number of the RMI range of RMM 1.0 ([`crate::rmm_el3::fid::REQ_COMPLETE`] is 0x18F).
pub const LAST_FUNCTION: u16 = 0x18E;
/// First function number of the range that RMM 2.0 added.
pub const FIRST_FUNCTION_2_0: u16 = 0x1D0;
/// Last function number of that range.
pub const LAST_FUNCTION_2_0: u16 = 0x2CF;

/// The specification's name of a command, or `None` for an identifier that is none.
#[must_use]
pub const fn name(fid: u64) -> Option<&'static str> {
    Some(match fid {
        fid::VERSION => "RMI_VERSION",
        fid::GRANULE_DELEGATE => "RMI_GRANULE_DELEGATE",
        fid::GRANULE_UNDELEGATE => "RMI_GRANULE_UNDELEGATE",
        fid::DATA_CREATE => "RMI_DATA_CREATE",
        fid::DATA_CREATE_UNKNOWN => "RMI_DATA_CREATE_UNKNOWN",
        fid::DATA_DESTROY => "RMI_DATA_DESTROY",
        fid::REALM_ACTIVATE => "RMI_REALM_ACTIVATE",
        fid::REALM_CREATE => "RMI_REALM_CREATE",
        fid::REALM_DESTROY => "RMI_REALM_DESTROY",
        fid::REC_CREATE => "RMI_REC_CREATE",
        fid::REC_DESTROY => "RMI_REC_DESTROY",
        fid::REC_ENTER => "RMI_REC_ENTER",
        fid::RTT_CREATE => "RMI_RTT_CREATE",
        fid::RTT_DESTROY => "RMI_RTT_DESTROY",
        fid::RTT_MAP_UNPROTECTED => "RMI_RTT_MAP_UNPROTECTED",
        fid::RTT_READ_ENTRY => "RMI_RTT_READ_ENTRY",
        fid::RTT_UNMAP_UNPROTECTED => "RMI_RTT_UNMAP_UNPROTECTED",
        fid::PSCI_COMPLETE => "RMI_PSCI_COMPLETE",
        fid::FEATURES => "RMI_FEATURES",
        fid::RTT_FOLD => "RMI_RTT_FOLD",
        fid::REC_AUX_COUNT => "RMI_REC_AUX_COUNT",
        fid::RTT_INIT_RIPAS => "RMI_RTT_INIT_RIPAS",
        fid::RTT_SET_RIPAS => "RMI_RTT_SET_RIPAS",
        _ => return None,
    })
}

/// What a command answers in `x0`: status in bits 7:0, index in 15:8.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// `RMI_SUCCESS`.
    Success,
    /// `RMI_ERROR_INPUT`: an argument is wrong.
    ErrorInput,
    /// `RMI_ERROR_REALM`: the Realm's state forbids it. Index 1 from `REC_ENTER`: the Realm is SYSTEM_OFF.
    ErrorRealm(u8),
    /// `RMI_ERROR_REC`: the REC's state forbids it.
    ErrorRec,
    /// `RMI_ERROR_RTT`: the walk stopped at this level, or the table there forbids it.
    ErrorRtt(u8),
}

impl Status {
    /// The register value.
    #[must_use]
    pub const fn to_register(self) -> u64 {
        match self {
            Self::Success => 0,
            Self::ErrorInput => 1,
            Self::ErrorRealm(index) => 2 | (index as u64) << 8,
            Self::ErrorRec => 3,
            Self::ErrorRtt(level) => 4 | (level as u64) << 8,
        }
    }

    /// Decodes `x0`; `None` for anything that RMM 1.0 does not return, [`crate::smccc::NOT_SUPPORTED`] included.
    #[must_use]
    pub const fn from_register(x0: u64) -> Option<Self> {
        if x0 >> 16 != 0 {
            return None;
        }
        let index = ((x0 >> 8) & 0xFF) as u8;
        Some(match x0 & 0xFF {
            0 => Self::Success,
            1 => Self::ErrorInput,
            2 => Self::ErrorRealm(index),
            3 => Self::ErrorRec,
            4 => Self::ErrorRtt(index),
            _ => return None,
        })
    }
}

impl core::fmt::Display for Status {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Success => f.write_str("RMI_SUCCESS"),
            Self::ErrorInput => f.write_str("RMI_ERROR_INPUT"),
            Self::ErrorRealm(index) => write!(f, "RMI_ERROR_REALM({index})"),
            Self::ErrorRec => f.write_str("RMI_ERROR_REC"),
            Self::ErrorRtt(level) => write!(f, "RMI_ERROR_RTT(level {level})"),
        }
    }
}

/// `RmiHashAlgorithm`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum HashAlgorithm {
    Sha256 = 0,
    Sha512 = 1,
}

impl TryFrom<u8> for HashAlgorithm {
    type Error = u8;

    fn try_from(value: u8) -> Result<Self, u8> {
        match value {
            0 => Ok(Self::Sha256),
            1 => Ok(Self::Sha512),
            other => Err(other),
        }
    }
}

impl HashAlgorithm {
    /// Bytes of a digest.
    #[must_use]
    pub const fn digest_len(self) -> usize {
        match self {
            Self::Sha256 => 32,
            Self::Sha512 => 64,
        }
    }
}

/// `RmiRipas`: what the Realm may expect at a protected address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Ripas {
    Empty = 0,
    Ram = 1,
    Destroyed = 2,
}

impl TryFrom<u64> for Ripas {
    type Error = u64;

    fn try_from(value: u64) -> Result<Self, u64> {
        match value {
            0 => Ok(Self::Empty),
            1 => Ok(Self::Ram),
            2 => Ok(Self::Destroyed),
            other => Err(other),
        }
    }
}

/// `RmiRttEntryState`: what `RTT_READ_ENTRY` reports in `x2`.
pub mod rtt_entry_state {
    #![allow(missing_docs)]
    pub const UNASSIGNED: u64 = 0;
    pub const ASSIGNED: u64 = 1;
    pub const TABLE: u64 = 2;
}

/// `RmiRecExitReason`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum ExitReason {
    Sync = 0,
    Irq = 1,
    Fiq = 2,
    Psci = 3,
    RipasChange = 4,
    HostCall = 5,
    SError = 6,
}

impl TryFrom<u8> for ExitReason {
    type Error = u8;

    fn try_from(value: u8) -> Result<Self, u8> {
        Ok(match value {
            0 => Self::Sync,
            1 => Self::Irq,
            2 => Self::Fiq,
            3 => Self::Psci,
            4 => Self::RipasChange,
            5 => Self::HostCall,
            6 => Self::SError,
            other => return Err(other),
        })
    }
}

/// Flags of `RmiRecEnter`.
pub mod enter_flags {
    #![allow(missing_docs)]
    pub const EMUL_MMIO: u64 = 1 << 0;
    pub const INJECT_SEA: u64 = 1 << 1;
    pub const TRAP_WFI: u64 = 1 << 2;
    pub const TRAP_WFE: u64 = 1 << 3;
    pub const RIPAS_RESPONSE_REJECT: u64 = 1 << 4;
}

/// Flags of `RmiRealmParams`.
pub mod realm_flags {
    #![allow(missing_docs)]
    pub const LPA2: u64 = 1 << 0;
    pub const SVE: u64 = 1 << 1;
    pub const PMU: u64 = 1 << 2;
}

/// `RmiDataFlags`, bit 0: measure the contents.
pub const DATA_MEASURE_CONTENT: u64 = 1;

/// `RmiRecCreateFlags`, bit 0: the REC may run at once.
pub const REC_RUNNABLE: u64 = 1;

/// Bits of `enter.gicv3_hcr` that a host may set (layout of `ICH_HCR_EL2`).
pub const GICV3_HCR_ENTER_MASK: u64 = 0x40FE;
/// Bits that `exit.gicv3_hcr` may report: the same and EOIcount.
pub const GICV3_HCR_EXIT_MASK: u64 = 0xF800_40FE;

/// Most list registers that the run page has room for.
pub const MAX_LRS: usize = 16;
/// Most auxiliary granules a REC may need.
pub const MAX_REC_AUX: usize = 16;
/// Most concatenated start-level tables.
pub const MAX_START_TABLES: u64 = 16;

/// Feature register 0 (`RMI_FEATURES` with index 0), RMM 1.0-rel0 layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Features0(pub u64);

impl Features0 {
    const fn field(self, shift: u32, width: u32) -> u64 {
        (self.0 >> shift) & ((1 << width) - 1)
    }

    /// Widest IPA space, in bits.
    #[must_use]
    pub const fn s2sz(self) -> u64 {
        self.field(0, 8)
    }
    /// Whether LPA2 can be selected.
    #[must_use]
    pub const fn lpa2(self) -> bool {
        self.field(8, 1) != 0
    }
    /// Whether SVE can be selected.
    #[must_use]
    pub const fn sve(self) -> bool {
        self.field(9, 1) != 0
    }
    /// Longest vector: (value + 1) × 128 bits.
    #[must_use]
    pub const fn sve_vl(self) -> u64 {
        self.field(10, 4)
    }
    /// Breakpoints minus one.
    #[must_use]
    pub const fn num_bps(self) -> u64 {
        self.field(14, 6)
    }
    /// Watchpoints minus one.
    #[must_use]
    pub const fn num_wps(self) -> u64 {
        self.field(20, 6)
    }
    /// Whether the PMU can be selected.
    #[must_use]
    pub const fn pmu(self) -> bool {
        self.field(26, 1) != 0
    }
    /// Event counters.
    #[must_use]
    pub const fn pmu_num_ctrs(self) -> u64 {
        self.field(27, 5)
    }
    /// Whether a Realm may be measured with `algorithm`.
    #[must_use]
    pub const fn hash(self, algorithm: HashAlgorithm) -> bool {
        match algorithm {
            HashAlgorithm::Sha256 => self.field(32, 1) != 0,
            HashAlgorithm::Sha512 => self.field(33, 1) != 0,
        }
    }
    /// List registers the host may fill, minus one.
    #[must_use]
    pub const fn gicv3_num_lrs(self) -> u64 {
        self.field(34, 4)
    }
    /// A Realm has at most 2^n − 1 RECs.
    #[must_use]
    pub const fn max_recs_order(self) -> u64 {
        self.field(38, 4)
    }
}

/// IPA span of one entry of a table at `level` (−1..=3), in bytes.
#[must_use]
pub const fn entry_span(level: i64) -> u64 {
    1 << (12 + 9 * (3 - level))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_survive_the_register() {
        for status in [
            Status::Success,
            Status::ErrorInput,
            Status::ErrorRealm(1),
            Status::ErrorRec,
            Status::ErrorRtt(0xFF),
        ] {
            assert_eq!(Status::from_register(status.to_register()), Some(status));
        }
        assert_eq!(Status::ErrorRtt(2).to_register(), 0x0204);
        assert_eq!(Status::ErrorRealm(1).to_register(), 0x0102);
        assert_eq!(Status::from_register(crate::smccc::NOT_SUPPORTED), None);
    }

    #[test]
    fn spans_are_those_of_the_architecture() {
        assert_eq!(entry_span(3), 0x1000);
        assert_eq!(entry_span(2), 0x20_0000);
        assert_eq!(entry_span(1), 0x4000_0000);
        assert_eq!(entry_span(-1), 1 << 48);
    }
}
