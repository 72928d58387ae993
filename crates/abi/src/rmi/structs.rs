//! The structures that host and RMM exchange in Non-secure granules. Little-endian; holes are SBZ towards the RMM and
//! MBZ towards the host.

use core::mem::offset_of;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// `RmiRealmParams`: one granule, read by `RMI_REALM_CREATE`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[allow(missing_docs)]
pub struct RealmParams {
    /// [`super::realm_flags`].
    pub flags: u64,
    /// IPA width in bits.
    pub s2sz: u8,
    pub _sbz0: [u8; 7],
    /// Vector length: (value + 1) × 128 bits.
    pub sve_vl: u8,
    pub _sbz1: [u8; 7],
    /// Breakpoints minus one; 0 is reserved.
    pub num_bps: u8,
    pub _sbz2: [u8; 7],
    /// Watchpoints minus one; 0 is reserved.
    pub num_wps: u8,
    pub _sbz3: [u8; 7],
    pub pmu_num_ctrs: u8,
    pub _sbz4: [u8; 7],
    /// `RmiHashAlgorithm`.
    pub hash_algo: u8,
    pub _sbz5: [u8; 0x3CF],
    /// Realm Personalization Value.
    pub rpv: [u8; 64],
    pub _sbz6: [u8; 0x3C0],
    pub vmid: u16,
    pub _sbz7: [u8; 6],
    /// Physical address of the first start-level table.
    pub rtt_base: u64,
    pub rtt_level_start: i64,
    pub rtt_num_start: u32,
    pub _sbz8: [u8; 0x7E4],
}

const _: () = {
    assert!(size_of::<RealmParams>() == 0x1000);
    assert!(offset_of!(RealmParams, s2sz) == 0x8);
    assert!(offset_of!(RealmParams, sve_vl) == 0x10);
    assert!(offset_of!(RealmParams, num_bps) == 0x18);
    assert!(offset_of!(RealmParams, num_wps) == 0x20);
    assert!(offset_of!(RealmParams, pmu_num_ctrs) == 0x28);
    assert!(offset_of!(RealmParams, hash_algo) == 0x30);
    assert!(offset_of!(RealmParams, rpv) == 0x400);
    assert!(offset_of!(RealmParams, vmid) == 0x800);
    assert!(offset_of!(RealmParams, rtt_base) == 0x808);
    assert!(offset_of!(RealmParams, rtt_level_start) == 0x810);
    assert!(offset_of!(RealmParams, rtt_num_start) == 0x818);
};

/// `RmiRecParams`: one granule, read by `RMI_REC_CREATE`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[allow(missing_docs)]
pub struct RecParams {
    /// Bit 0: [`super::REC_RUNNABLE`].
    pub flags: u64,
    pub _sbz0: [u8; 0xF8],
    /// `RmiRecMpidr`: Aff0 in 3:0, Aff1 in 15:8, Aff2 in 23:16, Aff3 in 31:24.
    pub mpidr: u64,
    pub _sbz1: [u8; 0xF8],
    pub pc: u64,
    pub _sbz2: [u8; 0xF8],
    pub gprs: [u64; 8],
    pub _sbz3: [u8; 0x4C0],
    pub num_aux: u64,
    pub aux: [u64; 16],
    pub _sbz4: [u8; 0x778],
}

const _: () = {
    assert!(size_of::<RecParams>() == 0x1000);
    assert!(offset_of!(RecParams, mpidr) == 0x100);
    assert!(offset_of!(RecParams, pc) == 0x200);
    assert!(offset_of!(RecParams, gprs) == 0x300);
    assert!(offset_of!(RecParams, num_aux) == 0x800);
    assert!(offset_of!(RecParams, aux) == 0x808);
};

/// `RmiRecEnter`: the first half of the run page, host → RMM.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[allow(missing_docs)]
pub struct RecEnter {
    /// [`super::enter_flags`].
    pub flags: u64,
    pub _sbz0: [u8; 0x1F8],
    pub gprs: [u64; 31],
    pub _sbz1: [u8; 8],
    pub gicv3_hcr: u64,
    pub gicv3_lrs: [u64; 16],
    pub _sbz2: [u8; 0x478],
}

const _: () = {
    assert!(size_of::<RecEnter>() == 0x800);
    assert!(offset_of!(RecEnter, gprs) == 0x200);
    assert!(offset_of!(RecEnter, gicv3_hcr) == 0x300);
    assert!(offset_of!(RecEnter, gicv3_lrs) == 0x308);
};

/// `RmiRecExit`: the second half of the run page, RMM → host.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[allow(missing_docs)]
pub struct RecExit {
    /// [`super::ExitReason`].
    pub exit_reason: u8,
    pub _mbz0: [u8; 0xFF],
    pub esr: u64,
    pub far: u64,
    pub hpfar: u64,
    pub _mbz1: [u8; 0xE8],
    pub gprs: [u64; 31],
    pub _mbz2: [u8; 8],
    pub gicv3_hcr: u64,
    pub gicv3_lrs: [u64; 16],
    pub gicv3_misr: u64,
    pub gicv3_vmcr: u64,
    pub _mbz3: [u8; 0x68],
    pub cntp_ctl: u64,
    pub cntp_cval: u64,
    pub cntv_ctl: u64,
    pub cntv_cval: u64,
    pub _mbz4: [u8; 0xE0],
    pub ripas_base: u64,
    pub ripas_top: u64,
    /// [`super::Ripas`].
    pub ripas_value: u8,
    pub _mbz5: [u8; 0xEF],
    /// Immediate of a host call.
    pub imm: u16,
    pub _mbz6: [u8; 0xFE],
    pub pmu_ovf_status: u8,
    pub _mbz7: [u8; 0xFF],
}

const _: () = {
    assert!(size_of::<RecExit>() == 0x800);
    assert!(offset_of!(RecExit, esr) == 0x100);
    assert!(offset_of!(RecExit, gprs) == 0x200);
    assert!(offset_of!(RecExit, gicv3_hcr) == 0x300);
    assert!(offset_of!(RecExit, gicv3_lrs) == 0x308);
    assert!(offset_of!(RecExit, gicv3_misr) == 0x388);
    assert!(offset_of!(RecExit, gicv3_vmcr) == 0x390);
    assert!(offset_of!(RecExit, cntp_ctl) == 0x400);
    assert!(offset_of!(RecExit, cntv_cval) == 0x418);
    assert!(offset_of!(RecExit, ripas_base) == 0x500);
    assert!(offset_of!(RecExit, ripas_value) == 0x510);
    assert!(offset_of!(RecExit, imm) == 0x600);
    assert!(offset_of!(RecExit, pmu_ovf_status) == 0x700);
};

/// `RmiRecRun`: the run page.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[allow(missing_docs)]
pub struct RecRun {
    pub enter: RecEnter,
    pub exit: RecExit,
}

const _: () = assert!(size_of::<RecRun>() == 0x1000);
