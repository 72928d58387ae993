//! RMM ↔ EL3: boot registers, boot manifest and the services that EL3 gives the RMM, in both families (0.x and 2.0).

use core::mem::offset_of;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Function identifiers, all from Realm EL2.
pub mod fid {
    #![allow(missing_docs)]
    /// Ends an RMI command: `x1`.. become the host's `x0`...
    pub const REQ_COMPLETE: u64 = 0xC400_018F;
    pub const GTSI_DELEGATE: u64 = 0xC400_01B0;
    pub const GTSI_UNDELEGATE: u64 = 0xC400_01B1;
    pub const ATTEST_GET_REALM_KEY: u64 = 0xC400_01B2;
    pub const ATTEST_GET_PLAT_TOKEN: u64 = 0xC400_01B3;
    pub const EL3_FEATURES: u64 = 0xC400_01B4;
    pub const EL3_TOKEN_SIGN: u64 = 0xC400_01B5;
    pub const MEC_REFRESH: u64 = 0xC400_01B6;
    pub const RESERVE_MEMORY: u64 = 0xC400_01BB;
    pub const BOOT_COMPLETE: u64 = 0xC400_01CF;
}

/// First function number of the services.
pub const FIRST_FUNCTION: u16 = 0x1B0;
/// Last function number of the services.
pub const LAST_FUNCTION: u16 = 0x1CF;

/// Interface 2.0: `x1`..`x8` of `REQ_COMPLETE` reach the host; EL3 leaves ICC/ICH registers alone.
pub const VERSION_2_0: u64 = 0x0002_0000;
/// Interface 0.8: `x1`..`x5` reach the host; EL3 switches ICC_SRE/ICH_HCR/ICH_VMCR.
pub const VERSION_0_8: u64 = 0x0000_0008;

/// Major number of a version word.
#[must_use]
pub const fn version_major(word: u64) -> u64 {
    (word >> 16) & 0x7FFF
}

/// Minor number of a version word.
#[must_use]
pub const fn version_minor(word: u64) -> u64 {
    word & 0xFFFF
}

/// Status of a service, sign-extended into `x0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i64)]
#[allow(missing_docs)]
pub enum Status {
    Ok = 0,
    Unknown = -1,
    BadAddress = -2,
    BadPas = -3,
    NoMemory = -4,
    Invalid = -5,
    Again = -6,
}

impl Status {
    /// The register value.
    #[must_use]
    pub const fn to_register(self) -> u64 {
        self as i64 as u64
    }
}

/// Status of the RMM's boot, `x1` of `BOOT_COMPLETE`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i64)]
#[allow(missing_docs)]
pub enum BootStatus {
    Success = 0,
    Unknown = -1,
    VersionNotValid = -2,
    CpusOutOfRange = -3,
    CpuIdOutOfRange = -4,
    InvalidSharedBuffer = -5,
    ManifestVersionNotSupported = -6,
    ManifestDataError = -7,
    NoMemory = -8,
}

impl BootStatus {
    /// The register value.
    #[must_use]
    pub const fn to_register(self) -> u64 {
        self as i64 as u64
    }

    /// What a boot status says, for people.
    #[must_use]
    pub const fn describe(code: i64) -> &'static str {
        match code {
            0 => "success",
            -2 => "interface version not valid",
            -3 => "CPU count out of range",
            -4 => "CPU index out of range",
            -5 => "invalid shared buffer",
            -6 => "manifest version not supported",
            -7 => "manifest data error",
            -8 => "no memory",
            _ => "unknown error",
        }
    }
}

/// `ATTEST_GET_REALM_KEY`: the curve P-384, the only one.
pub const CURVE_P384: u64 = 0;

/// Manifest version 0.3: up to the consoles.
pub const MANIFEST_VERSION_0_3: u32 = 3;
/// Manifest version 0.5.
pub const MANIFEST_VERSION_0_5: u32 = 5;

/// A list by pointer: DRAM banks, device ranges. `checksum` makes the 64-bit sum of `num`, `ptr`, itself and every
/// word of the list zero.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[allow(missing_docs)]
pub struct ManifestList {
    pub num: u64,
    /// Physical address inside the shared page, 0 if the list is empty.
    pub ptr: u64,
    pub checksum: u64,
}

/// One DRAM bank or device range.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[allow(missing_docs)]
pub struct MemoryBank {
    pub base: u64,
    pub size: u64,
}

/// One console.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[allow(missing_docs)]
pub struct ConsoleInfo {
    pub base: u64,
    pub map_pages: u64,
    pub name: [u8; 8],
    pub clk_in_hz: u64,
    pub baud_rate: u64,
    pub flags: u64,
}

/// [`ConsoleInfo::name`] of a PL011.
pub const CONSOLE_PL011: [u8; 8] = *b"pl011\0\0\0";

/// Version 0.1 of [`RootComplexList`].
pub const ROOT_COMPLEX_VERSION_0_1: u32 = 1;

/// The root complexes (manifest 0.5). Empty here.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[allow(missing_docs)]
pub struct RootComplexList {
    pub num: u64,
    pub version: u32,
    pub _pad: u32,
    pub ptr: u64,
    pub checksum: u64,
}

/// The boot manifest, at offset 0 of the shared page.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[allow(missing_docs)]
pub struct Manifest {
    /// Major in 30:16, minor in 15:0.
    pub version: u32,
    pub _pad: u32,
    pub plat_data: u64,
    pub dram: ManifestList,
    pub consoles: ManifestList,
    pub ncoh_region: ManifestList,
    pub coh_region: ManifestList,
    pub smmus: ManifestList,
    pub root_complexes: RootComplexList,
}

/// Bytes of the manifest up to and including version 0.3: what every RMM since then can rely on.
pub const MANIFEST_SIZE_0_3: usize = 64;

const _: () = {
    assert!(size_of::<Manifest>() == 168);
    assert!(offset_of!(Manifest, plat_data) == 8);
    assert!(offset_of!(Manifest, dram) == 16);
    assert!(offset_of!(Manifest, consoles) == 40);
    assert!(offset_of!(Manifest, ncoh_region) == MANIFEST_SIZE_0_3);
    assert!(offset_of!(Manifest, coh_region) == 88);
    assert!(offset_of!(Manifest, smmus) == 112);
    assert!(offset_of!(Manifest, root_complexes) == 136);
    assert!(size_of::<MemoryBank>() == 16);
    assert!(size_of::<ConsoleInfo>() == 48);
};
