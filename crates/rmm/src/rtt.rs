//! Commands on tables: create (unfold), destroy, fold, and reading an entry.

use cca_abi::rmi::{Ripas, Status, rtt_entry_state};

use crate::Rmm;
use crate::answer::{Answer, Failure, one, two};
use crate::entry::Entry;
use crate::granule::State;
use crate::level::Level;
use crate::platform::Platform;
use crate::realm::Stage2;
use crate::walk::{ENTRIES, Table, Walk};

/// A level argument, if it names a level between `least` and the page level.
pub(crate) fn level_at_least(argument: u64, least: Level) -> Result<Level, Status> {
    Level::from_number(argument).filter(|&level| level >= least).ok_or(Status::ErrorInput)
}

/// A failed walk: RTT error and, in the register that the command uses for it, how far the host may skip.
pub(crate) fn walk_failure(walk: &Walk<'_>, place: impl FnOnce(u64) -> [u64; 4]) -> Failure {
    Failure { status: walk.level().error(), outputs: place(walk.top()) }
}

/// `top` in X2 (RTT_DESTROY, DATA_DESTROY).
pub(crate) fn top_in_x2(top: u64) -> [u64; 4] {
    two(0, top)
}

/// Checks the (ipa, level) pair of a command on the table at `level`; its parent entry is what must be aligned.
/// Returns the parent's and the table's level.
fn check_table_argument(stage2: &Stage2, ipa: u64, level: u64) -> Result<(Level, Level), Status> {
    let level = level_at_least(level, stage2.start_level)?;
    let parent = level.parent().filter(|&parent| parent >= stage2.start_level).ok_or(Status::ErrorInput)?;
    if !parent.is_aligned(ipa) || !stage2.is_inside(ipa) {
        return Err(Status::ErrorInput);
    }
    Ok((parent, level))
}

impl<P: Platform> Rmm<'_, P> {
    /// RMI_RTT_CREATE.
    pub(crate) fn rtt_create(&self, rd: u64, rtt: u64, ipa: u64, level: u64) -> Answer {
        let (rd, rtt) = self.granules.lock_both((rd, State::Rd), (rtt, State::Delegated))?;
        let stage2 = self.realm(rd.pa()).stage2();
        let (parent_level, level) = check_table_argument(&stage2, ipa, level)?;
        let pa = rtt.pa();
        if !stage2.format.fits(pa) {
            return Err(Status::ErrorInput.into());
        }
        let walk = self.walk(&stage2, Some(rd), ipa, parent_level);
        if walk.level() < parent_level || matches!(walk.entry, Entry::Table(_)) {
            return Err(walk.level().error().into());
        }

        let parent = walk.entry;
        rtt.set_state(State::Rtt);
        let table = Table::new(rtt, self.platform.granule(pa), level, stage2.format);
        // A fresh table is zero, which already says UNASSIGNED/EMPTY.
        if parent != Entry::Unassigned(Ripas::Empty) {
            table.unfold(parent);
        }
        if parent.is_counted() {
            table.granule.get(ENTRIES);
        } else {
            walk.table.granule.get(1);
        }
        if parent.is_valid_leaf() {
            walk.set(Entry::UnassignedNs);
            self.platform.publish_table_writes();
            self.platform.tlbi_ipa(stage2.vttbr, stage2.vtcr, ipa, parent_level.number());
        }
        self.platform.publish_table_writes();
        walk.set(Entry::Table(pa));
        self.platform.publish_table_writes();
        Ok([0; 4])
    }

    /// RMI_RTT_DESTROY.
    pub(crate) fn rtt_destroy(&self, rd: u64, ipa: u64, level: u64) -> Answer {
        let rd = self.granules.lock_named(rd, State::Rd)?;
        let stage2 = self.realm(rd.pa()).stage2();
        let (parent_level, level) = check_table_argument(&stage2, ipa, level)?;
        let walk = self.walk(&stage2, Some(rd), ipa, parent_level);
        let child = self.child_table(&stage2, &walk, level).ok_or_else(|| walk_failure(&walk, top_in_x2))?;
        if child.granule.count() != 0 {
            return Err(Failure { status: level.error(), outputs: top_in_x2(ipa) });
        }

        let protected = stage2.is_protected(ipa);
        walk.set(if protected { Entry::Unassigned(Ripas::Destroyed) } else { Entry::UnassignedNs });
        walk.table.granule.put(1);
        self.platform.publish_table_writes();
        if protected {
            // No leaf below was valid; what has to go is the cached table descriptor.
            self.platform.tlbi_ipa(stage2.vttbr, stage2.vtcr, ipa, parent_level.number());
        } else {
            self.platform.tlbi_vmid(stage2.vttbr, stage2.vtcr);
        }
        let pa = child.granule.pa();
        self.wipe_to_delegated(&child.granule);
        Ok(two(pa, walk.top()))
    }

    /// RMI_RTT_FOLD.
    pub(crate) fn rtt_fold(&self, rd: u64, ipa: u64, level: u64) -> Answer {
        let rd = self.granules.lock_named(rd, State::Rd)?;
        let stage2 = self.realm(rd.pa()).stage2();
        let (parent_level, level) = check_table_argument(&stage2, ipa, level)?;
        let walk = self.walk(&stage2, Some(rd), ipa, parent_level);
        let child = self.child_table(&stage2, &walk, level).ok_or(walk.level().error())?;
        let folded = child.folded(parent_level).ok_or(level.error())?;

        // The table's own entry in the parent was counted.
        if !folded.is_counted() {
            walk.table.granule.put(1);
        }
        walk.set(if stage2.is_protected(ipa) {
            Entry::Unassigned(Ripas::Empty)
        } else {
            Entry::UnassignedNs
        });
        self.platform.publish_table_writes();
        if folded.is_valid_leaf() {
            self.platform.tlbi_vmid(stage2.vttbr, stage2.vtcr);
        } else {
            self.platform.tlbi_ipa(stage2.vttbr, stage2.vtcr, ipa, parent_level.number());
        }
        walk.set(folded);
        self.platform.publish_table_writes();
        let pa = child.granule.pa();
        self.wipe_to_delegated(&child.granule);
        Ok(one(pa))
    }

    /// RMI_RTT_READ_ENTRY.
    pub(crate) fn rtt_read_entry(&self, rd: u64, ipa: u64, level: u64) -> Answer {
        let rd = self.granules.lock_named(rd, State::Rd)?;
        let stage2 = self.realm(rd.pa()).stage2();
        let level = level_at_least(level, stage2.start_level)?;
        if !level.is_aligned(ipa) || !stage2.is_inside(ipa) {
            return Err(Status::ErrorInput.into());
        }
        let walk = self.walk(&stage2, Some(rd), ipa, level);
        let (state, descriptor) = match walk.entry {
            Entry::Unassigned(_) | Entry::UnassignedNs => (rtt_entry_state::UNASSIGNED, 0),
            Entry::Assigned(pa, _) => (rtt_entry_state::ASSIGNED, stage2.format.place(pa)),
            Entry::AssignedNs(host) => (rtt_entry_state::ASSIGNED, host.bits(stage2.format)),
            Entry::Table(pa) => (rtt_entry_state::TABLE, stage2.format.place(pa)),
        };
        let ripas = walk.entry.ripas().unwrap_or(Ripas::Empty);
        Ok([walk.level().register(), state, descriptor, u64::from(ripas as u8)])
    }

    /// Locks the table at `level` that a walk to its parent entry found; `None` if the walk found something else.
    fn child_table(&self, stage2: &Stage2, walk: &Walk<'_>, level: Level) -> Option<Table<'_>> {
        match walk.entry {
            Entry::Table(pa) if walk.level().child() == Some(level) => {
                Some(self.table(pa, level, stage2.format))
            }
            _ => None,
        }
    }
}
