//! The Realm Management Monitor's portable core: RMI for the host, RSI and PSCI for Realms, RMM specification
//! v1.0 (DEN0137). Everything about the machine is behind [`platform::Platform`].
//!
//! | question | file |
//! |---|---|
//! | what does a command do | `delegation`, `realm`, `rec`, `data`, `rtt`, `ripas`, `unprotected`, `psci`, `rsi` |
//! | where do attestation tokens come from | `attestation` |
//! | how does a REC run | `run`, `abort`, `sysreg`, `inject`, `timer`, `gic`, `pmu`, `stage1`, `reset`, [`context`] |
//! | who owns which memory | `granule`, `lock`, `aux` |
//! | what do stage 2 tables look like | `level`, `entry`, `walk` |
//! | what does the machine offer | [`platform`], `config` |
#![no_std]
#![forbid(unsafe_code)]

mod abort;
mod answer;
mod attestation;
mod aux;
mod config;
pub mod context;
mod data;
mod delegation;
mod entry;
mod gic;
mod granule;
mod inject;
mod level;
mod lock;
mod measurement;
pub mod platform;
mod pmu;
mod psci;
mod realm;
mod rec;
mod reset;
mod ripas;
mod rmi;
mod rsi;
mod rtt;
mod run;
mod stage1;
pub mod sync;
mod sysreg;
mod timer;
mod unprotected;
mod vmid;
mod walk;

#[cfg(test)]
mod test_platform;
#[cfg(test)]
mod tests;

pub use attestation::{Attestation, Comb, PLATFORM_TOKEN_MAX};
pub use granule::{DramBank, InitError, MAX_BANKS, State as GranuleState, metadata_len};

use config::Config;
use granule::GranuleTable;
use platform::Platform;
use sync::AtomicU16;
use vmid::Vmids;

/// The RMM.
pub struct Rmm<'m, P> {
    platform: P,
    config: Config,
    granules: GranuleTable<'m>,
    vmids: Vmids,
    attestation: Option<Attestation<'m>>,
}

impl<'m, P: Platform> Rmm<'m, P> {
    /// An RMM that may be given the granules of `banks` (ascending, granule aligned, without the RMM's own memory).
    /// `metadata` is zeroed and has at least [`metadata_len`] entries.
    ///
    /// # Errors
    /// [`InitError`] if banks or metadata are wrong, or the CPU cannot host Realms.
    pub fn new(platform: P, banks: &[DramBank], metadata: &'m [AtomicU16]) -> Result<Self, InitError> {
        let config = Config::new(platform.facts()).ok_or(InitError::Cpu)?;
        let granules = GranuleTable::new(banks, metadata)?;
        Ok(Self { platform, config, granules, vmids: Vmids::new(), attestation: None })
    }

    /// What the granule at `pa` is at this moment; `None` if it is unaligned or not delegable. For tests and
    /// diagnostics: the answer may be old when it arrives.
    pub fn granule_state(&self, pa: u64) -> Option<GranuleState> {
        self.granules.state(pa)
    }

    /// The machine.
    pub fn platform(&self) -> &P {
        &self.platform
    }
}
