//! What the core needs from the machine it runs on.
//!
//! The core holds all *policy* (what is checked, trapped, injected, reported); an implementation of
//! [`Platform`] holds *mechanism* only: memory access, EL3 services, TLB invalidation, loading and saving
//! registers. There are two real implementations: the R-EL2 image and the simulated machine.
//!
//! # How memory is reached
//!
//! - A granule that the RMM owns (delegated, Realm PAS) is a [`Page`]: 512 atomic words, accessed with relaxed
//!   loads and stores, which compile to plain ones. Thus the core needs no unsafe code and no rule about
//!   exclusive references; exclusion comes from the granule locks and is a matter of correctness only.
//! - Host memory (NS PAS) is only ever copied, through [`Platform::ns_read`] and friends. Every copy may fail
//!   with a granule protection fault, because the host may change the page's owner at any time.
//!
//! # The life of one REC_ENTER, as the platform sees it
//!
//! ```text
//! rec_load(cpu, ctx)            host's EL1/EL0/GIC/timer state away, the REC's in
//!   rec_run(cpu, ctx) -> exit   as often as the core can handle the exit itself
//!   el1(..), set_el1(..), timers(..), debug_load(..), pmu_load(..)   in between, for injection and timer decisions
//! rec_save(cpu, ctx)            the REC's state into ctx, the host's back
//! ```
//!
//! See [`crate::context`] for who reads and writes which word of the context, and when.

use core::fmt;
use core::sync::atomic::AtomicU64;

use crate::context::RecContext;

pub use cca_abi::GRANULE_SIZE;

/// Words in a granule.
pub const GRANULE_WORDS: usize = 512;

/// A granule owned by the RMM. Word `n` holds bytes `8n..8n+8`, little-endian.
pub type Page = [AtomicU64; GRANULE_WORDS];

/// A host (NS) page could not be accessed: its granule is not in the Non-secure PAS (any more).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NsFault;

/// EL3 refused a change of a granule's physical address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct El3Refused;

/// Why a Realm stopped executing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RealmExit {
    /// A synchronous exception to EL2. For `HVC`/`SMC` the context's `pc` is as the hardware leaves `ELR_EL2`
    /// (trapped `SMC`: at the instruction; `HVC`: after it).
    Sync {
        /// `ESR_EL2`.
        esr: u64,
        /// `FAR_EL2`.
        far: u64,
        /// `HPFAR_EL2`.
        hpfar: u64,
    },
    /// A physical IRQ is pending.
    Irq,
    /// A physical FIQ is pending.
    Fiq,
    /// A physical SError was taken to EL2.
    SError {
        /// `ESR_EL2`.
        esr: u64,
    },
}

/// EL1 registers of the running REC that the core reads or writes between two runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum El1 {
    /// `VBAR_EL1` (read).
    Vbar,
    /// `SCTLR_EL1` (read, and written for a CPU_ON).
    Sctlr,
    /// `ELR_EL1` (written).
    Elr,
    /// `SPSR_EL1` (written).
    Spsr,
    /// `ESR_EL1` (written).
    Esr,
    /// `FAR_EL1` (written).
    Far,
    /// `TCR_EL1` (read).
    Tcr,
    /// `TTBR0_EL1` (read).
    Ttbr0,
    /// `TTBR1_EL1` (read).
    Ttbr1,
}

/// The control registers of the running REC's EL1 timers, with ISTATUS as it is now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LiveTimers {
    /// `CNTV_CTL_EL0` (`CNTV_CTL_EL02` at EL2).
    pub cntv_ctl: u64,
    /// `CNTP_CTL_EL0` (`CNTP_CTL_EL02` at EL2).
    pub cntp_ctl: u64,
}

/// The hardware's ID registers as EL2 reads them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[allow(missing_docs, reason = "each field is the register of that name, `_EL1`")]
pub struct IdRegisters {
    pub id_aa64pfr0: u64,
    pub id_aa64pfr1: u64,
    pub id_aa64zfr0: u64,
    pub id_aa64dfr0: u64,
    pub id_aa64dfr1: u64,
    pub id_aa64afr0: u64,
    pub id_aa64afr1: u64,
    pub id_aa64isar0: u64,
    pub id_aa64isar1: u64,
    pub id_aa64isar2: u64,
    pub id_aa64mmfr0: u64,
    pub id_aa64mmfr1: u64,
    pub id_aa64mmfr2: u64,
}

/// Facts about the machine that do not change after boot and are the same on every CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Facts {
    /// ID registers. PA size, VMID size and the number of breakpoints and watchpoints are taken from here.
    pub id: IdRegisters,
    /// `ICH_VTR_EL2` as read: list registers, priority bits, INTID bits.
    pub ich_vtr: u64,
    /// SVE vector lengths that a Realm can have: bit n is set for (n + 1) × 128 bits. Zero without SVE.
    pub sve_lengths: u16,
    /// `PMCR_EL0.N` as EL2 reads it.
    pub pmu_counters: u8,
    /// CPUs that may call [`crate::Rmm::handle_rmi`]; their indices are `0..num_cpus`.
    pub num_cpus: usize,
}

/// The machine below the core. Methods take `&self` and are called on all CPUs at once.
///
/// `cpu` is always the index that the caller gave to [`crate::Rmm::handle_rmi`]. Physical addresses passed to
/// memory methods are granule aligned and inside the DRAM banks given to [`crate::Rmm::new`] unless said
/// otherwise; where the core names a granule as a `Page`, it is in the Realm PAS.
pub trait Platform: Sync {
    /// What the machine is.
    fn facts(&self) -> &Facts;

    /// The granule at `pa`, which is in the Realm PAS and belongs to the RMM.
    fn granule(&self, pa: u64) -> &Page;

    /// Fills the granule at `pa` with zeroes.
    fn zero(&self, pa: u64);

    /// Copies `buf.len()` bytes from NS memory at `pa` (any multiple of 8, within one granule; length likewise).
    ///
    /// # Errors
    /// [`NsFault`] when a granule protection fault stopped the copy; `buf` is then undefined.
    fn ns_read(&self, pa: u64, buf: &mut [u64]) -> Result<(), NsFault>;

    /// Copies words to NS memory at `pa` (a multiple of 8, within one granule).
    ///
    /// # Errors
    /// [`NsFault`] when a granule protection fault stopped the copy; a part may have been written.
    fn ns_write(&self, pa: u64, words: &[u64]) -> Result<(), NsFault>;

    /// Copies the whole NS granule at `src` into the RMM's granule at `dst`.
    ///
    /// # Errors
    /// [`NsFault`] when a granule protection fault stopped the copy; `dst` is then undefined.
    fn ns_copy_granule(&self, src: u64, dst: u64) -> Result<(), NsFault>;

    /// Asks EL3 to move a granule from the NS to the Realm PAS (GTSI_DELEGATE).
    ///
    /// # Errors
    /// [`El3Refused`]: nothing has changed.
    fn delegate(&self, pa: u64) -> Result<(), El3Refused>;

    /// Asks EL3 to move a granule from the Realm to the NS PAS (GTSI_UNDELEGATE). The core has wiped it.
    ///
    /// # Errors
    /// [`El3Refused`]: nothing has changed.
    fn undelegate(&self, pa: u64) -> Result<(), El3Refused>;

    /// Makes earlier stores to translation tables visible to all table walkers (DSB ISHST; an ISB is not
    /// needed, a walk happens only after an ERET).
    fn publish_table_writes(&self);

    /// Invalidates, on all CPUs, everything that the TLBs hold for one stage 2 entry: the IPA `ipa` mapped by an
    /// entry at `level`, of the VMID in `vttbr` (a `VTTBR_EL2` value), including stage 1+2 combinations and
    /// walk caches. Complete on return.
    fn tlbi_ipa(&self, vttbr: u64, vtcr: u64, ipa: u64, level: i64);

    /// Invalidates, on all CPUs, everything held for the VMID in `vttbr`. Complete on return.
    fn tlbi_vmid(&self, vttbr: u64, vtcr: u64);

    /// SHA-256 compression with the CPU's instructions: folds `blocks` into `state`.
    /// Returns false, without touching `state`, if there is no acceleration.
    fn sha256_blocks(&self, state: &mut [u32; 8], blocks: &[[u8; 64]]) -> bool {
        let _ = (state, blocks);
        false
    }

    /// As [`Self::sha256_blocks`], over the 64 blocks of the granule at `pa`.
    fn sha256_granule(&self, state: &mut [u32; 8], pa: u64) -> bool {
        let _ = (state, pa);
        false
    }

    /// As [`Self::sha256_blocks`], for SHA-512.
    fn sha512_blocks(&self, state: &mut [u64; 8], blocks: &[[u8; 128]]) -> bool {
        let _ = (state, blocks);
        false
    }

    /// As [`Self::sha512_blocks`], over the 32 blocks of the granule at `pa`.
    fn sha512_granule(&self, state: &mut [u64; 8], pa: u64) -> bool {
        let _ = (state, pa);
        false
    }

    /// Whether a physical interrupt waits for the host on this CPU: long work for a Realm stops here.
    fn interrupt_pending(&self) -> bool {
        false
    }

    /// Saves the host's EL1/EL0/GIC/timer state in per-CPU storage and loads the REC's from `ctx`.
    fn rec_load(&self, cpu: usize, ctx: &RecContext<'_>);

    /// Runs the REC until the next exception to EL2 that the platform does not handle itself
    /// (it handles only lazy loading of FP/SIMD and SVE state).
    fn rec_run(&self, cpu: usize, ctx: &RecContext<'_>) -> RealmExit;

    /// Saves the REC's state into `ctx` and restores the host's.
    fn rec_save(&self, cpu: usize, ctx: &RecContext<'_>);

    /// Reads an EL1 register of the loaded REC.
    fn el1(&self, cpu: usize, ctx: &RecContext<'_>, register: El1) -> u64;

    /// Writes an EL1 register of the loaded REC.
    fn set_el1(&self, cpu: usize, ctx: &RecContext<'_>, register: El1, value: u64);

    /// Reads the loaded REC's timers.
    fn timers(&self, cpu: usize, ctx: &RecContext<'_>) -> LiveTimers;

    /// Saves the host's breakpoint and watchpoint registers and loads the REC's from `ctx`; called at most once
    /// between `rec_load` and `rec_save`. If it was called, `rec_save` saves and restores them too.
    fn debug_load(&self, cpu: usize, ctx: &RecContext<'_>);

    /// The same for the performance monitors. The REC has as many event counters as MDCR_EL2.HPMN in its context says.
    fn pmu_load(&self, cpu: usize, ctx: &RecContext<'_>);

    /// A line for the RMM's console.
    fn log(&self, line: fmt::Arguments<'_>);

    /// The RMM or the machine is broken: report and never return to any world.
    fn fatal(&self, reason: fmt::Arguments<'_>) -> !;
}
