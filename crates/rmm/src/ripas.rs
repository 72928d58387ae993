//! Changing what a Realm may expect at an address: RTT_INIT_RIPAS and RTT_SET_RIPAS.

use cca_abi::rmi::{Ripas, Status};

use crate::Rmm;
use crate::answer::{Answer, one};
use crate::entry::Entry;
use crate::granule::State;
use crate::level::Level;
use crate::platform::{GRANULE_SIZE, Platform};
use crate::realm::{RealmState, Stage2};
use crate::walk::Walk;

/// Visits the entries of the walked table from the walked one on, as long as whole entries fit below `top` and
/// `change` gives a new entry; writes those. Returns the first address not changed. One table is the most that a
/// call does.
fn change_entries(walk: &Walk<'_>, top: u64, mut change: impl FnMut(Entry, u64) -> Option<Entry>) -> u64 {
    let level = walk.level();
    let mut at = walk.ipa;
    loop {
        if top.saturating_sub(at) < level.span() {
            return at;
        }
        let old = walk.table.entry(at);
        let Some(new) = change(old, at) else { return at };
        if new != old {
            walk.table.set(at, new);
        }
        at = at.wrapping_add(level.span());
        if level.index(at) == 0 {
            return at;
        }
    }
}

impl<P: Platform> Rmm<'_, P> {
    /// RMI_RTT_INIT_RIPAS.
    // Not inlined: its buffers must not be part of every other command's stack frame.
    #[inline(never)]
    pub(crate) fn rtt_init_ripas(&self, rd: u64, base: u64, top: u64) -> Answer {
        // The RD stays locked: the RIM's updates must not interleave.
        let rd = self.granules.lock_named(rd, State::Rd)?;
        let realm = self.realm(rd.pa());
        let stage2 = realm.stage2();
        // An aligned top above something is at least one granule.
        if top <= base || top % GRANULE_SIZE != 0 || !stage2.is_protected(top.wrapping_sub(GRANULE_SIZE)) {
            return Err(Status::ErrorInput.into());
        }
        if realm.state() != RealmState::New {
            return Err(Status::ErrorRealm(0).into());
        }
        let walk = self.walk(&stage2, None, base, Level::PAGE);
        let level = walk.level();
        if !level.is_aligned(base) {
            return Err(level.error().into());
        }
        let hasher = self.hasher(realm);
        let mut rim = realm.rim();
        let out_top = change_entries(&walk, top, |old, at| match old {
            Entry::Unassigned(_) => {
                rim = hasher.rim_ripas(&rim, at, at.wrapping_add(level.span()));
                Some(Entry::Unassigned(Ripas::Ram))
            }
            _ => None,
        });
        if out_top == base {
            return Err(level.error().into());
        }
        realm.set_rim(&rim);
        Ok(one(out_top))
    }

    /// RMI_RTT_SET_RIPAS.
    pub(crate) fn rtt_set_ripas(&self, rd: u64, rec: u64, base: u64, top: u64) -> Answer {
        let (rd, rec_granule) = self.granules.lock_both((rd, State::Rd), (rec, State::Rec))?;
        let rec = self.rec(rec_granule.pa());
        if rec_granule.count() != 0 || rec.owner() != rd.pa() {
            return Err(Status::ErrorRec.into());
        }
        let request = rec.ripas_request();
        if top <= base || base != request.base || top > request.top || top % GRANULE_SIZE != 0 {
            return Err(Status::ErrorInput.into());
        }
        let stage2 = self.realm(rd.pa()).stage2();
        // `base` lies inside a request that was checked to be protected.
        let walk = self.walk(&stage2, Some(rd), base, Level::PAGE);
        let level = walk.level();
        if !level.is_aligned(base) {
            return Err(level.error().into());
        }
        let mut revoked = Revoked::Nothing;
        let out_top = change_entries(&walk, top, |old, at| {
            let ripas = old.ripas()?;
            if ripas == Ripas::Destroyed && !request.change_destroyed {
                return None;
            }
            let new = old.with_ripas(request.value);
            if old.is_valid_leaf() && !new.is_valid_leaf() {
                revoked = match revoked {
                    Revoked::Nothing => Revoked::One(at),
                    _ => Revoked::Several,
                };
            }
            Some(new)
        });
        if out_top == base {
            return Err(level.error().into());
        }
        self.platform.publish_table_writes();
        self.invalidate(&stage2, revoked, level);
        rec.set_ripas_base(out_top);
        Ok(one(out_top))
    }

    fn invalidate(&self, stage2: &Stage2, revoked: Revoked, level: Level) {
        match revoked {
            Revoked::Nothing => {}
            Revoked::One(ipa) => self.platform.tlbi_ipa(stage2.vttbr, stage2.vtcr, ipa, level.number()),
            Revoked::Several => self.platform.tlbi_vmid(stage2.vttbr, stage2.vtcr),
        }
    }
}

/// Leaves that stopped being valid.
#[derive(Clone, Copy)]
enum Revoked {
    Nothing,
    One(u64),
    Several,
}
