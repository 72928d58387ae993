//! The EL3 monitor's portable core: who may call what, and what it does to the machine.
//!
//! The core decides; the [`Platform`] does. One [`Monitor`] serves all CPUs, every method takes `&self` and
//! may run on several of them at once. The image brings the registers of the caller to
//! [`Monitor::handle_smc`] and carries out the [`Action`] that comes back; the simulated machine does the same.
#![no_std]
#![forbid(unsafe_code)]

#[cfg(any(test, feature = "explore"))]
extern crate std;

pub mod attest;
pub mod dtb;
pub mod enables;
pub mod gpt;
pub mod interface;
pub mod manifest;
pub mod options;
pub mod platform;
pub mod psci;
mod rmm_el3;
mod smc;
mod sync;
mod trng;
pub mod undefined;

#[cfg(all(test, feature = "explore"))]
mod schedules;
#[cfg(all(test, not(feature = "explore")))]
mod tests;

pub use interface::Interface;
pub use platform::{Action, MAX_CPUS, Pas, Platform, Regs, World};
pub use rmm_el3::RmmState;

use enables::IdRegs;
use gpt::Gpt;
use psci::Psci;
use rmm_el3::Rmm;
use sync::AtomicU64;
use trng::Trng;

/// What the monitor knows about the machine once it has booted.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Number of CPUs, numbered from 0 without holes.
    pub cpus: usize,
    /// The page shared with the RMM.
    pub shared_page: u64,
    /// All memory that is the RMM's from boot, the shared page included: it never goes to the host.
    pub carve_out: manifest::Bank,
    /// Memory that RMM_RESERVE_MEMORY gives away, from its end downwards: Realm PAS, used by nobody else, and
    /// never the host's either.
    pub reserve: manifest::Bank,
    /// What the platform token says about the software.
    pub measured: attest::Measured,
    /// Whether there is an RMM to boot.
    pub rmm: bool,
    /// The version of the RMM-EL3 interface that it is offered.
    pub interface: Interface,
    /// What the CPUs have.
    pub id: IdRegs,
}

/// How a CPU that was released (or the first one, after set-up) goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Start {
    /// Where the Normal world starts: address and x0.
    pub normal: (u64, u64),
    /// x0 to x7 for the RMM's entry; `None` where there is no RMM to boot, then the Normal world starts now.
    pub realm: Option<[u64; 8]>,
}

/// The monitor's state.
#[derive(Debug)]
pub struct Monitor {
    gpt: Gpt,
    psci: Psci,
    rmm: Rmm,
    id: IdRegs,
    /// Whether the CPUs have memory encryption contexts.
    mec: bool,
    trng: Trng,
    shared_page: u64,
    carve_out: manifest::Bank,
    measured: attest::Measured,
    token: spin::Mutex<attest::Pending>,
    reserve: manifest::Bank,
    /// End of what RMM_RESERVE_MEMORY has left; only ever goes down.
    reserve_top: AtomicU64,
}

impl Monitor {
    /// A monitor whose first CPU is on.
    pub fn new(config: Config, gpt: Gpt) -> Self {
        Self {
            gpt,
            psci: Psci::new(config.cpus),
            rmm: Rmm::new(config.rmm, config.interface),
            id: config.id,
            mec: config.id.mec(),
            trng: Trng::new(config.id.rndr()),
            shared_page: config.shared_page,
            carve_out: config.carve_out,
            measured: config.measured,
            token: spin::Mutex::new(attest::Pending::new()),
            reserve: config.reserve,
            reserve_top: AtomicU64::new(config.reserve.base + config.reserve.size),
        }
    }

    /// The granule protection tables.
    pub fn gpt(&self) -> &Gpt {
        &self.gpt
    }

    /// Where the RMM stands.
    pub fn rmm_state(&self) -> RmmState {
        self.rmm.state()
    }

    /// The first CPU's start: boots the RMM, then the host at `normal`.
    pub fn start_primary(&self, normal: (u64, u64)) -> Start {
        let realm = self.rmm.cold_boot(0, self.psci.count(), self.shared_page);
        Start { normal, realm }
    }

    /// Called on a CPU that CPU_ON released. If it starts the Normal world at once, it is on from here.
    pub fn start_cpu(&self, cpu: usize) -> Start {
        let realm = self.rmm.warm_boot(cpu);
        if realm.is_none() {
            self.psci.set_on(cpu);
        }
        Start { normal: self.psci.entry(cpu), realm }
    }

    /// The last thing that a CPU does before it parks: from here on it may be turned on again.
    pub fn cpu_is_off(&self, cpu: usize) {
        self.psci.set_off(cpu);
    }
}
