//! Every interface between the worlds of an Arm CCA system, as types.
//!
//! One module per interface; each constant and layout exists once, here, and every side (monitor, RMM, host core,
//! VMM, simulated machine, tests) uses it. Layouts are asserted at compile time against the offsets that the
//! specifications print. Nothing here has behaviour beyond encoding and decoding.
//!
//! | module | interface | source |
//! |---|---|---|
//! | [`smccc`] | calling convention, function identifiers | Arm DEN0028 |
//! | [`psci`] | power control, for the host and for Realms | Arm DEN0022 |
//! | [`rmi`] | host ↔ RMM | Arm DEN0137 (RMM 1.0), B4 |
//! | [`rsi`] | Realm ↔ RMM | Arm DEN0137, B5 |
//! | [`rmm_el3`] | RMM ↔ EL3 and the boot manifest | TF-A "RMM-EL3 communication interface" |
//! | [`kvm`] | VMM ↔ module: the KVM ioctl ABI as far as Realms use it | Linux uapi, CCA series v2 |
#![no_std]
#![forbid(unsafe_code)]

pub mod kvm;
pub mod psci;
pub mod rmi;
pub mod rmm_el3;
pub mod rsi;
pub mod smccc;

/// What turns the structures into bytes and back.
pub use zerocopy::{FromBytes, FromZeros, IntoBytes};

/// Bytes in a granule: the unit of memory protection, and the page size of everything here.
pub const GRANULE_SIZE: u64 = 4096;

/// `log2` of [`GRANULE_SIZE`].
pub const GRANULE_SHIFT: u32 = 12;

/// Whether `address` is a multiple of the granule size.
#[must_use]
pub const fn is_granule_aligned(address: u64) -> bool {
    address & (GRANULE_SIZE - 1) == 0
}
