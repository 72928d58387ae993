//! Counters: one set for the system, one per VM. Read without locks; printed by the module.

use core::fmt;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use cca_abi::rmi;

const FIRST_FID: u64 = rmi::fid::VERSION;
const COMMANDS: usize = 0x1A;
const EXITS: usize = 8;

/// Counters of one VM, or of all.
#[derive(Debug, Default)]
pub struct Stats {
    rmi_calls: [AtomicU64; COMMANDS],
    rmi_errors: [AtomicU64; COMMANDS],
    exits: [AtomicU64; EXITS],
    delegated: AtomicU64,
    leaked: AtomicU64,
    tables: AtomicU64,
    folds: AtomicU64,
    shared: AtomicU64,
    vms: AtomicU64,
    last_delegated: AtomicU64,
}

/// Names of the REC exit reasons, in their order; the last stands for unknown ones.
const EXIT_NAMES: [&str; EXITS] =
    ["sync", "irq", "fiq", "psci", "ripas_change", "host_call", "serror", "unknown"];

fn command_index(fid: u64) -> Option<usize> {
    usize::try_from(fid.checked_sub(FIRST_FID)?).ok().filter(|index| *index < COMMANDS)
}

impl Stats {
    pub(crate) fn count_rmi(&self, fid: u64, failed: bool) {
        let Some(index) = command_index(fid) else { return };
        self.rmi_calls[index].fetch_add(1, Relaxed);
        if failed {
            self.rmi_errors[index].fetch_add(1, Relaxed);
        }
    }

    pub(crate) fn count_exit(&self, reason: u8) {
        self.exits[usize::from(reason).min(EXITS - 1)].fetch_add(1, Relaxed);
    }

    pub(crate) fn count_delegated(&self, pa: u64) {
        self.delegated.fetch_add(1, Relaxed);
        self.last_delegated.store(pa, Relaxed);
    }

    pub(crate) fn count_undelegated(&self) {
        self.delegated.fetch_sub(1, Relaxed);
    }

    /// A page that stays in the Realm world for ever: no longer counted as delegated.
    pub(crate) fn count_leaked(&self) {
        self.delegated.fetch_sub(1, Relaxed);
        self.leaked.fetch_add(1, Relaxed);
    }

    pub(crate) fn count_fold(&self) {
        self.folds.fetch_add(1, Relaxed);
    }

    /// How often 2 MiB of private memory became one block.
    #[must_use]
    pub fn folds(&self) -> u64 {
        self.folds.load(Relaxed)
    }

    pub(crate) fn count_table(&self) {
        self.tables.fetch_add(1, Relaxed);
    }

    pub(crate) fn count_table_gone(&self) {
        self.tables.fetch_sub(1, Relaxed);
    }

    /// Translation tables below the start level.
    #[must_use]
    pub fn tables(&self) -> u64 {
        self.tables.load(Relaxed)
    }

    pub(crate) fn count_shared(&self) {
        self.shared.fetch_add(1, Relaxed);
    }

    pub(crate) fn count_unshared(&self, pages: u64) {
        self.shared.fetch_sub(pages, Relaxed);
    }

    pub(crate) fn count_vm(&self) {
        self.vms.fetch_add(1, Relaxed);
    }

    pub(crate) fn count_vm_gone(&self) {
        self.vms.fetch_sub(1, Relaxed);
    }

    /// How often `fid` was called.
    #[must_use]
    pub fn rmi_calls(&self, fid: u64) -> u64 {
        command_index(fid).map_or(0, |index| self.rmi_calls[index].load(Relaxed))
    }

    /// How often any RMI command was called.
    #[must_use]
    pub fn rmi_calls_total(&self) -> u64 {
        self.rmi_calls.iter().map(|counter| counter.load(Relaxed)).sum()
    }

    /// REC exits with this `RmiRecExitReason`.
    #[must_use]
    pub fn exits(&self, reason: u8) -> u64 {
        self.exits[usize::from(reason).min(EXITS - 1)].load(Relaxed)
    }

    /// Pages that belong to the Realm world now, leaked ones excluded.
    #[must_use]
    pub fn delegated(&self) -> u64 {
        self.delegated.load(Relaxed)
    }

    /// Pages that could not be taken back.
    #[must_use]
    pub fn leaked(&self) -> u64 {
        self.leaked.load(Relaxed)
    }

    /// Pages of user memory that a Realm can reach.
    #[must_use]
    pub fn shared(&self) -> u64 {
        self.shared.load(Relaxed)
    }

    /// VMs that exist (counted for the system only).
    #[must_use]
    pub fn vms(&self) -> u64 {
        self.vms.load(Relaxed)
    }

    /// Physical address of the page that was delegated last, for tests of the protection; 0 if none was.
    #[must_use]
    pub fn last_delegated(&self) -> u64 {
        self.last_delegated.load(Relaxed)
    }
}

impl fmt::Display for Stats {
    /// Lines of `name value`; counters that are zero are left out, except the page counts.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "pages_delegated {}", self.delegated())?;
        writeln!(f, "pages_leaked {}", self.leaked())?;
        writeln!(f, "pages_shared {}", self.shared())?;
        writeln!(f, "translation_tables {}", self.tables())?;
        writeln!(f, "blocks_folded {}", self.folds())?;
        for (fid, (calls, errors)) in (FIRST_FID..).zip(self.rmi_calls.iter().zip(&self.rmi_errors)) {
            let (calls, errors) = (calls.load(Relaxed), errors.load(Relaxed));
            if calls != 0 {
                writeln!(f, "{} {calls}", rmi::name(fid).unwrap_or("RMI_UNKNOWN"))?;
            }
            if errors != 0 {
                writeln!(f, "{}_errors {errors}", rmi::name(fid).unwrap_or("RMI_UNKNOWN"))?;
            }
        }
        for (name, count) in EXIT_NAMES.iter().zip(&self.exits) {
            let count = count.load(Relaxed);
            if count != 0 {
                writeln!(f, "exit_{name} {count}")?;
            }
        }
        Ok(())
    }
}
