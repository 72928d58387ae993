//! What the core needs from the machine.
//!
//! The image implements [`Platform`] over registers and secure RAM, the simulated machine over its own
//! memory. Everything that is policy stays on this side of the trait.

use core::fmt;

/// Number of CPUs that the monitor has room for.
pub const MAX_CPUS: usize = 32;

pub use cca_abi::GRANULE_SIZE;

/// A physical address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pas {
    /// Secure.
    Secure,
    /// Non-secure.
    NonSecure,
    /// Root.
    Root,
    /// Realm.
    Realm,
}

/// The world that called, as SCR_EL3.{NSE, NS} told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum World {
    /// The host: NS-EL2.
    NonSecure,
    /// The RMM: R-EL2.
    Realm,
}

/// The general-purpose registers x0 to x30 of a world.
pub type Regs = [u64; 31];

/// What to do after a call was handled.
///
/// The numbers are known to the image's assembly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Action {
    /// Resume the caller with its registers.
    Resume = 0,
    /// Save the Normal world, enter the Realm world with the caller's x0 to x7.
    ToRealm = 1,
    /// Save the Realm world, resume the Normal world with the caller's x1 to x8 as its x0 to x7.
    ToNormal = 2,
    /// The same in interface family 0.x: with the caller's x1 to x5 as its x0 to x4.
    ToNormalFive = 3,
    /// Save the Realm world, enter the Normal world with the registers that its context has: the RMM has
    /// finished booting on this CPU.
    BootNormal = 4,
    /// Wait until an interrupt is pending, then resume the caller.
    Standby = 5,
    /// Take this CPU out of the interrupt controller, call [`crate::Monitor::cpu_is_off`] and park it.
    CpuOff = 6,
    /// Switch the machine off.
    SystemOff = 7,
    /// Reset the machine.
    SystemReset = 8,
}

/// The machine as the core sees it.
///
/// All methods take `&self` and may run on several CPUs at once.
pub trait Platform {
    /// Reads a 64-bit descriptor of the granule protection tables.
    fn gpt_load(&self, pa: u64) -> u64;

    /// Writes a descriptor, ordered like a release operation: while the tables are built, and when a block is
    /// divided.
    fn gpt_store(&self, pa: u64, descriptor: u64);

    /// Replaces a descriptor if it still is `old`; otherwise fails with what is there now.
    ///
    /// Orders like an acquire-release operation.
    fn gpt_compare_exchange(&self, pa: u64, old: u64, new: u64) -> Result<(), u64>;

    /// Makes earlier descriptor writes visible to the walkers of all CPUs and forgets what they have cached
    /// of `2^log2_size` bytes at `base` (TLBI RPALOS between barriers). `log2_size` is a size that the
    /// instruction can express.
    fn gpt_invalidate(&self, base: u64, log2_size: u32);

    /// Cleans and invalidates a granule to the point of physical aliasing in `pas` (DC CIPAPA).
    fn flush_granule(&self, pa: u64, pas: Pas);

    /// Copies out of the page shared with the RMM. `offset + out.len()` is at most 4096.
    fn shared_page_read(&self, offset: usize, out: &mut [u8]);

    /// Copies into the page shared with the RMM. `offset + data.len()` is at most 4096.
    fn shared_page_write(&self, offset: usize, data: &[u8]);

    /// Lets a parked CPU go; it calls [`crate::Monitor::start_cpu`].
    fn release_cpu(&self, cpu: usize);

    /// 64 fresh bits of the CPU's entropy source; `None` if it has none or could not deliver.
    fn random(&self) -> Option<u64>;

    /// Prints one line on the monitor's console; the platform adds `EL3: ` and the line's end.
    fn print(&self, line: fmt::Arguments<'_>);

    /// The system counter, for boot stamps.
    fn counter(&self) -> u64;
}
