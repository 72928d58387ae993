//! Realm pages: DATA_CREATE, DATA_CREATE_UNKNOWN, DATA_DESTROY.

use cca_abi::rmi::{DATA_MEASURE_CONTENT, Ripas, Status};

use crate::Rmm;
use crate::answer::{Answer, NONE, two};
use crate::entry::Entry;
use crate::granule::State;
use crate::level::Level;
use crate::measurement::Measurement;
use crate::platform::{GRANULE_SIZE, Platform};
use crate::realm::{RealmState, Stage2};
use crate::rtt::{top_in_x2, walk_failure};
use crate::walk::Walk;

/// ipa_align and ipa_bound of the commands on protected pages.
fn check_ipa(stage2: &Stage2, ipa: u64) -> Result<(), Status> {
    if ipa % GRANULE_SIZE != 0 || !stage2.is_protected(ipa) {
        return Err(Status::ErrorInput);
    }
    Ok(())
}

/// data_bound2.
fn check_data(stage2: &Stage2, data: u64) -> Result<(), Status> {
    if stage2.format.fits(data) { Ok(()) } else { Err(Status::ErrorInput) }
}

/// rtt_walk and rtte_state of the two creating commands: the RIPAS of the free entry.
fn unassigned(walk: &Walk<'_>) -> Result<Ripas, Status> {
    match walk.entry {
        Entry::Unassigned(ripas) if walk.level() == Level::PAGE => Ok(ripas),
        _ => Err(walk.level().error()),
    }
}

impl<P: Platform> Rmm<'_, P> {
    /// RMI_DATA_CREATE.
    // Not inlined: its buffers must not be part of every other command's stack frame.
    #[inline(never)]
    pub(crate) fn data_create(&self, rd: u64, data: u64, ipa: u64, src: u64, flags: u64) -> Answer {
        if !self.granules.is_undelegated(src) {
            return Err(Status::ErrorInput.into());
        }
        // The RD stays locked: the RIM's updates must not interleave.
        let (rd, data) = self.granules.lock_both((rd, State::Rd), (data, State::Delegated))?;
        let realm = self.realm(rd.pa());
        let stage2 = realm.stage2();
        check_data(&stage2, data.pa())?;
        check_ipa(&stage2, ipa)?;
        if realm.state() != RealmState::New {
            return Err(Status::ErrorRealm(0).into());
        }
        let walk = self.walk(&stage2, None, ipa, Level::PAGE);
        unassigned(&walk)?;
        if self.platform.ns_copy_granule(src, data.pa()).is_err() {
            self.platform.zero(data.pa());
            return Err(Status::ErrorInput.into());
        }

        let hasher = self.hasher(realm);
        let content = if flags & DATA_MEASURE_CONTENT != 0 {
            hasher.granule(data.pa())
        } else {
            Measurement::default()
        };
        realm.set_rim(&hasher.rim_data(&realm.rim(), ipa, flags, &content));
        data.set_state(State::Data);
        walk.set(Entry::Assigned(data.pa(), Ripas::Ram));
        walk.table.granule.get(1);
        self.platform.publish_table_writes();
        Ok(NONE)
    }

    /// RMI_DATA_CREATE_UNKNOWN. The granule is zero, as every DELEGATED one.
    pub(crate) fn data_create_unknown(&self, rd: u64, data: u64, ipa: u64) -> Answer {
        let (rd, data) = self.granules.lock_both((rd, State::Rd), (data, State::Delegated))?;
        let stage2 = self.realm(rd.pa()).stage2();
        check_data(&stage2, data.pa())?;
        check_ipa(&stage2, ipa)?;
        let walk = self.walk(&stage2, Some(rd), ipa, Level::PAGE);
        let ripas = unassigned(&walk)?;
        data.set_state(State::Data);
        walk.set(Entry::Assigned(data.pa(), ripas));
        walk.table.granule.get(1);
        self.platform.publish_table_writes();
        Ok(NONE)
    }

    /// RMI_DATA_DESTROY.
    pub(crate) fn data_destroy(&self, rd: u64, ipa: u64) -> Answer {
        let rd = self.granules.lock_named(rd, State::Rd)?;
        let stage2 = self.realm(rd.pa()).stage2();
        check_ipa(&stage2, ipa)?;
        let walk = self.walk(&stage2, Some(rd), ipa, Level::PAGE);
        let (pa, ripas) = match walk.entry {
            Entry::Assigned(pa, ripas) if walk.level() == Level::PAGE => (pa, ripas),
            _ => return Err(walk_failure(&walk, top_in_x2)),
        };
        let after = if ripas == Ripas::Ram { Ripas::Destroyed } else { ripas };
        walk.set(Entry::Unassigned(after));
        walk.table.granule.put(1);
        self.platform.publish_table_writes();
        if ripas == Ripas::Ram {
            self.platform.tlbi_ipa(stage2.vttbr, stage2.vtcr, ipa, Level::PAGE.number());
        }
        let data = self.lock_owned(pa, State::Data);
        self.wipe_to_delegated(&data);
        Ok(two(pa, walk.top()))
    }
}
