//! Host memory in the unprotected half: RTT_MAP_UNPROTECTED and RTT_UNMAP_UNPROTECTED.

use cca_abi::rmi::Status;

use crate::Rmm;
use crate::answer::{Answer, NONE, one};
use crate::entry::{Entry, HostDescriptor};
use crate::granule::State;
use crate::level::Level;
use crate::platform::Platform;
use crate::realm::Stage2;
use crate::rtt::{level_at_least, walk_failure};

/// level_bound: a level with pages or blocks, not above the start level.
fn mapping_level(stage2: &Stage2, level: u64) -> Result<Level, Status> {
    level_at_least(level, stage2.start_level.max(Level::FIRST_BLOCK))
}

/// ipa_align and ipa_bound.
fn check_ipa(stage2: &Stage2, ipa: u64, level: Level) -> Result<(), Status> {
    if !level.is_aligned(ipa) || !stage2.is_inside(ipa) || stage2.is_protected(ipa) {
        return Err(Status::ErrorInput);
    }
    Ok(())
}

impl<P: Platform> Rmm<'_, P> {
    /// RMI_RTT_MAP_UNPROTECTED.
    pub(crate) fn rtt_map_unprotected(&self, rd: u64, ipa: u64, level: u64, descriptor: u64) -> Answer {
        let rd = self.granules.lock_named(rd, State::Rd)?;
        let stage2 = self.realm(rd.pa()).stage2();
        let host = HostDescriptor::parse(descriptor, stage2.format).ok_or(Status::ErrorInput)?;
        let level = mapping_level(&stage2, level)?;
        if !level.is_aligned(host.address()) {
            return Err(Status::ErrorInput.into());
        }
        check_ipa(&stage2, ipa, level)?;
        let walk = self.walk(&stage2, Some(rd), ipa, level);
        if walk.level() < level || walk.entry != Entry::UnassignedNs {
            return Err(walk.level().error().into());
        }
        walk.set(Entry::AssignedNs(host));
        self.platform.publish_table_writes();
        Ok(NONE)
    }

    /// RMI_RTT_UNMAP_UNPROTECTED.
    pub(crate) fn rtt_unmap_unprotected(&self, rd: u64, ipa: u64, level: u64) -> Answer {
        let rd = self.granules.lock_named(rd, State::Rd)?;
        let stage2 = self.realm(rd.pa()).stage2();
        let level = mapping_level(&stage2, level)?;
        check_ipa(&stage2, ipa, level)?;
        let walk = self.walk(&stage2, Some(rd), ipa, level);
        if walk.level() < level || !matches!(walk.entry, Entry::AssignedNs(_)) {
            return Err(walk_failure(&walk, one));
        }
        walk.set(Entry::UnassignedNs);
        self.platform.publish_table_writes();
        self.platform.tlbi_ipa(stage2.vttbr, stage2.vtcr, ipa, level.number());
        Ok(one(walk.top()))
    }
}
