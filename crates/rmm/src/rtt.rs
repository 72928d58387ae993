//! Commands on tables: create (unfold), destroy, fold, and reading an entry.

use cca_abi::rmi::{Ripas, Status, rtt_entry_state};

use crate::Rmm;
use crate::answer::{Answer, Failure, one, rtt_error, two};
use crate::entry::{Entry, PAGE_LEVEL, is_span_aligned, span};
use crate::granule::{Locked, State};
use crate::platform::Platform;
use crate::realm::Stage2;
use crate::walk::{ENTRIES, Table, Walk};

/// A level argument, if it names a level between `least` and the page level.
pub(crate) fn level_at_least(argument: u64, least: u32) -> Result<u32, Status> {
    // A negative level is a huge number here.
    u32::try_from(argument)
        .ok()
        .filter(|level| (least..=PAGE_LEVEL).contains(level))
        .ok_or(Status::ErrorInput)
}

/// A failed walk: RTT error and, in the register that the command uses for it, how far the host may skip.
pub(crate) fn walk_failure(walk: &Walk<'_>, ipa: u64, place: impl FnOnce(u64) -> [u64; 4]) -> Failure {
    Failure { status: rtt_error(walk.level()), outputs: place(walk.table.skip_non_live(ipa)) }
}

/// `top` in X2 (RTT_DESTROY, DATA_DESTROY).
pub(crate) fn top_in_x2(top: u64) -> [u64; 4] {
    two(0, top)
}

/// Checks the (ipa, level) pair of a command on the table at `level`; its parent entry is what must be aligned.
fn check_table_argument(stage2: &Stage2, ipa: u64, level: u64) -> Result<u32, Status> {
    let level = level_at_least(level, stage2.start_level + 1)?;
    if !is_span_aligned(ipa, level - 1) || !stage2.is_inside(ipa) {
        return Err(Status::ErrorInput);
    }
    Ok(level)
}

impl<P: Platform> Rmm<'_, P> {
    /// RMI_RTT_CREATE.
    pub(crate) fn rtt_create(&self, rd: u64, rtt: u64, ipa: u64, level: u64) -> Answer {
        let [rd, rtt] = self.granules.lock_all([(rd, State::Rd), (rtt, State::Delegated)])?;
        let stage2 = self.realm(rd.pa()).stage2();
        let level = check_table_argument(&stage2, ipa, level)?;
        if rtt.pa() >> 48 != 0 {
            return Err(Status::ErrorInput.into());
        }
        let walk = self.walk(&stage2, Some(rd), ipa, level - 1);
        if walk.level() < level - 1 || matches!(walk.entry, Entry::Table(_)) {
            return Err(rtt_error(walk.level()).into());
        }

        let parent = walk.entry;
        let pa = rtt.pa();
        rtt.set_state(State::Rtt);
        let table = Table::new(rtt, self.platform.granule(pa), level);
        // A fresh table is zero, which already says UNASSIGNED/EMPTY.
        if parent != Entry::Unassigned(Ripas::Empty) {
            table.fill(|index| parent.child(index, level));
        }
        if parent.is_counted() {
            table.granule.get(ENTRIES as u16);
        } else {
            walk.table.granule.get(1);
        }
        if parent.is_valid_leaf() {
            walk.set(Entry::UnassignedNs);
            self.platform.publish_table_writes();
            self.platform.tlbi_ipa(stage2.vttbr, stage2.vtcr, ipa, i64::from(level - 1));
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
        let level = check_table_argument(&stage2, ipa, level)?;
        let (walk, child) = self.walk_to_table(&stage2, rd, ipa, level, top_in_x2)?;
        if child.granule.count() != 0 {
            return Err(Failure { status: rtt_error(level), outputs: top_in_x2(ipa) });
        }

        let protected = stage2.is_protected(ipa);
        walk.set(if protected { Entry::Unassigned(Ripas::Destroyed) } else { Entry::UnassignedNs });
        walk.table.granule.put(1);
        self.platform.publish_table_writes();
        if protected {
            // No leaf below was valid; what has to go is the cached table descriptor.
            self.platform.tlbi_ipa(stage2.vttbr, stage2.vtcr, ipa, i64::from(level - 1));
        } else {
            self.platform.tlbi_vmid(stage2.vttbr, stage2.vtcr);
        }
        let pa = child.granule.pa();
        self.wipe_to_delegated(&child.granule);
        Ok(two(pa, walk.table.skip_non_live(ipa)))
    }

    /// RMI_RTT_FOLD.
    pub(crate) fn rtt_fold(&self, rd: u64, ipa: u64, level: u64) -> Answer {
        let rd = self.granules.lock_named(rd, State::Rd)?;
        let stage2 = self.realm(rd.pa()).stage2();
        let level = check_table_argument(&stage2, ipa, level)?;
        let (walk, child) = self.walk_to_table(&stage2, rd, ipa, level, |_| [0; 4])?;
        let first = child.entry(0);
        let homogeneous = (0u64..)
            .zip(1..ENTRIES)
            .all(|(before, index)| child.entry(index) == first.child(before + 1, level));
        let folded = first.folded(level).filter(|_| homogeneous).ok_or(rtt_error(level))?;

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
            self.platform.tlbi_ipa(stage2.vttbr, stage2.vtcr, ipa, i64::from(level - 1));
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
        if !is_span_aligned(ipa, level) || !stage2.is_inside(ipa) {
            return Err(Status::ErrorInput.into());
        }
        let walk = self.walk(&stage2, Some(rd), ipa, level);
        let (state, descriptor) = match walk.entry {
            Entry::Unassigned(_) | Entry::UnassignedNs => (rtt_entry_state::UNASSIGNED, 0),
            Entry::Assigned(pa, _) => (rtt_entry_state::ASSIGNED, pa),
            Entry::AssignedNs(host) => (rtt_entry_state::ASSIGNED, host.bits()),
            Entry::Table(pa) => (rtt_entry_state::TABLE, pa),
        };
        let ripas = walk.entry.ripas().unwrap_or(Ripas::Empty);
        Ok([u64::from(walk.level()), state, descriptor, u64::from(ripas as u8)])
    }

    /// Walks to the entry at `level - 1`, which must be a table, and locks that table.
    fn walk_to_table<'a>(
        &'a self,
        stage2: &Stage2,
        rd: Locked<'_>,
        ipa: u64,
        level: u32,
        place: impl FnOnce(u64) -> [u64; 4],
    ) -> Result<(Walk<'a>, Table<'a>), Failure> {
        let walk = self.walk(stage2, Some(rd), ipa, level - 1);
        match walk.entry {
            Entry::Table(pa) if walk.level() == level - 1 => {
                let child = self.table(pa, level);
                Ok((walk, child))
            }
            _ => Err(walk_failure(&walk, ipa, place)),
        }
    }

    /// The size in bytes that the entry of a finished walk covers.
    pub(crate) fn walk_span(walk: &Walk<'_>) -> u64 {
        span(walk.level())
    }
}
