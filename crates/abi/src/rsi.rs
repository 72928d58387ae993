//! Realm Services Interface 1.0: Realm → RMM (DEN0137, chapters B5 and C1).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// RSI 1.0 as `RSI_VERSION` speaks it: major in bits 30:16, minor in 15:0.
pub const VERSION_1_0: u64 = 0x1_0000;

/// Function identifiers.
pub mod fid {
    #![allow(missing_docs)]
    pub const VERSION: u64 = 0xC400_0190;
    pub const FEATURES: u64 = 0xC400_0191;
    pub const MEASUREMENT_READ: u64 = 0xC400_0192;
    pub const MEASUREMENT_EXTEND: u64 = 0xC400_0193;
    pub const ATTESTATION_TOKEN_INIT: u64 = 0xC400_0194;
    pub const ATTESTATION_TOKEN_CONTINUE: u64 = 0xC400_0195;
    pub const REALM_CONFIG: u64 = 0xC400_0196;
    pub const IPA_STATE_SET: u64 = 0xC400_0197;
    pub const IPA_STATE_GET: u64 = 0xC400_0198;
    pub const HOST_CALL: u64 = 0xC400_0199;
}

/// Status in `x0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
#[allow(missing_docs)]
pub enum Status {
    Success = 0,
    ErrorInput = 1,
    ErrorState = 2,
    Incomplete = 3,
    ErrorUnknown = 4,
}

/// `RsiRipasChangeFlags`, bit 0: DESTROYED entries may be changed too.
pub const CHANGE_DESTROYED: u64 = 1;

/// `RsiResponse`: the host accepted.
pub const ACCEPT: u64 = 0;
/// `RsiResponse`: the host rejected.
pub const REJECT: u64 = 1;

/// `RsiRealmConfig`: what `RSI_REALM_CONFIG` writes into the Realm's page.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[allow(missing_docs)]
pub struct RealmConfig {
    /// IPA width in bits.
    pub ipa_width: u64,
    /// `RmiHashAlgorithm` value.
    pub hash_algo: u8,
    pub _mbz0: [u8; 0x1F7],
    /// Realm Personalization Value.
    pub rpv: [u8; 64],
    pub _mbz1: [u8; 0xDC0],
}

const _: () = {
    assert!(size_of::<RealmConfig>() == 0x1000);
    assert!(core::mem::offset_of!(RealmConfig, hash_algo) == 0x8);
    assert!(core::mem::offset_of!(RealmConfig, rpv) == 0x200);
};

/// `RsiHostCall`: 256-byte aligned in Realm memory.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[allow(missing_docs)]
pub struct HostCall {
    /// Immediate, free for host and Realm to agree on.
    pub imm: u16,
    pub _mbz: [u8; 6],
    /// `x0`..`x30` to the host, and back.
    pub gprs: [u64; 31],
}

const _: () = {
    assert!(size_of::<HostCall>() == 0x100);
    assert!(core::mem::offset_of!(HostCall, gprs) == 0x8);
};

/// Required alignment of a [`HostCall`], in bytes.
pub const HOST_CALL_ALIGN: u64 = 0x100;
