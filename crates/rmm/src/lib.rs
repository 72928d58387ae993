//! The Realm Management Monitor's portable core: RMI for the host, RSI and PSCI for Realms, RMM specification
//! v1.0. Everything about the machine is behind [`platform::Platform`].
#![no_std]
#![forbid(unsafe_code)]

pub mod context;
pub mod platform;
