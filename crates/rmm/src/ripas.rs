//! Changing what a Realm may expect at an address: RTT_INIT_RIPAS and RTT_SET_RIPAS.

use cca_abi::rmi::{Ripas, Status};

use crate::Rmm;
use crate::answer::{Answer, one, rtt_error};
use crate::entry::{Entry, PAGE_LEVEL, is_span_aligned};
use crate::granule::State;
use crate::platform::{GRANULE_SIZE, Platform};
use crate::realm::{RealmState, Stage2};
use crate::walk::{ENTRIES, Walk};

/// Visits the entries of the walked table from `base` on, as long as whole entries fit below `top` and `change`
/// gives a new entry; writes those. Returns the first address not changed.
fn change_entries(
    walk: &Walk<'_>,
    base: u64,
    top: u64,
    mut change: impl FnMut(Entry, u64) -> Option<Entry>,
) -> u64 {
    let step = 1u64 << crate::entry::span_shift(walk.level());
    let mut at = base;
    for index in walk.index..ENTRIES {
        if top - at < step {
            break;
        }
        let old = walk.table.entry(index);
        let Some(new) = change(old, at) else { break };
        if new != old {
            walk.table.set(index, new);
        }
        at += step;
    }
    at
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
        if top <= base || top % GRANULE_SIZE != 0 || !stage2.is_protected(top - GRANULE_SIZE) {
            return Err(Status::ErrorInput.into());
        }
        if realm.state() != RealmState::New {
            return Err(Status::ErrorRealm(0).into());
        }
        let walk = self.walk(&stage2, None, base, PAGE_LEVEL);
        let level = walk.level();
        if !is_span_aligned(base, level) {
            return Err(rtt_error(level).into());
        }
        let hasher = self.hasher(realm);
        let step = Self::walk_span(&walk);
        let mut rim = realm.rim();
        let out_top = change_entries(&walk, base, top, |old, at| match old {
            Entry::Unassigned(_) => {
                rim = hasher.rim_ripas(&rim, at, at + step);
                Some(Entry::Unassigned(Ripas::Ram))
            }
            _ => None,
        });
        if out_top == base {
            return Err(rtt_error(level).into());
        }
        realm.set_rim(&rim);
        Ok(one(out_top))
    }

    /// RMI_RTT_SET_RIPAS.
    pub(crate) fn rtt_set_ripas(&self, rd: u64, rec: u64, base: u64, top: u64) -> Answer {
        let [rd, rec_granule] = self.granules.lock_all([(rd, State::Rd), (rec, State::Rec)])?;
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
        let walk = self.walk(&stage2, Some(rd), base, PAGE_LEVEL);
        let level = walk.level();
        if !is_span_aligned(base, level) {
            return Err(rtt_error(level).into());
        }
        let mut revoked = Revoked::default();
        let out_top = change_entries(&walk, base, top, |old, at| {
            let ripas = old.ripas()?;
            if ripas == Ripas::Destroyed && !request.change_destroyed {
                return None;
            }
            let new = old.with_ripas(request.value);
            if old.is_valid_leaf() && !new.is_valid_leaf() {
                revoked.add(at);
            }
            Some(new)
        });
        if out_top == base {
            return Err(rtt_error(level).into());
        }
        self.platform.publish_table_writes();
        self.invalidate(&stage2, &revoked, level);
        rec.set_ripas_base(out_top);
        Ok(one(out_top))
    }

    fn invalidate(&self, stage2: &Stage2, revoked: &Revoked, level: u32) {
        match (revoked.count, revoked.first) {
            (0, _) => {}
            (1, ipa) => self.platform.tlbi_ipa(stage2.vttbr, stage2.vtcr, ipa, i64::from(level)),
            _ => self.platform.tlbi_vmid(stage2.vttbr, stage2.vtcr),
        }
    }
}

/// Leaves that stopped being valid.
#[derive(Default)]
struct Revoked {
    first: u64,
    count: usize,
}

impl Revoked {
    fn add(&mut self, ipa: u64) {
        if self.count == 0 {
            self.first = ipa;
        }
        self.count += 1;
    }
}
