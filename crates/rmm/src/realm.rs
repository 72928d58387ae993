//! The Realm descriptor, and the commands on whole Realms.

use core::sync::atomic::Ordering::Relaxed;

use cca_abi::rmi::{HashAlgorithm, MAX_START_TABLES, RealmParams, Status};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::Rmm;
use crate::answer::{Answer, NONE, one};
use crate::entry::{Entry, Format};
use crate::granule::{Locked, State};
use crate::level::Level;
use crate::measurement::{Hasher, Measurement};
use crate::platform::{GRANULE_SIZE, GRANULE_WORDS, Page, Platform};

/// Measurement registers: the RIM and four REMs.
pub(crate) const MEASUREMENTS: u64 = 5;

/// Words of the RD granule.
mod word {
    pub(super) const STATE: usize = 0;
    pub(super) const IPA_WIDTH: usize = 1;
    pub(super) const START_LEVEL: usize = 2;
    pub(super) const RTT_BASE: usize = 3;
    pub(super) const NUM_START: usize = 4;
    pub(super) const VMID: usize = 5;
    pub(super) const HASH: usize = 6;
    pub(super) const REC_INDEX: usize = 7;
    pub(super) const NUM_BPS: usize = 8;
    pub(super) const NUM_WPS: usize = 9;
    pub(super) const VTCR: usize = 10;
    pub(super) const VTTBR: usize = 11;
    pub(super) const LPA2: usize = 12;
    pub(super) const AUX_COUNT: usize = 13;
    /// ZCR_EL2 plus one, zero without SVE.
    pub(super) const SVE: usize = 14;
    /// Event counters plus one, zero without PMU.
    pub(super) const PMU: usize = 15;
    pub(super) const RPV: usize = 16;
    pub(super) const MEASUREMENTS: usize = 32;
}

/// Where word `n` of a measurement register is.
const fn measurement_word(index: usize, n: usize) -> usize {
    word::MEASUREMENTS.wrapping_add(index.wrapping_mul(8)).wrapping_add(n)
}

/// Realm states.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub(crate) enum RealmState {
    New = 0,
    Active = 1,
    SystemOff = 2,
}

/// A view of an RD granule. Words that never change after REALM_CREATE and the state may be read without the
/// RD's lock by whoever keeps the Realm alive (a lock on it, or a REC of it); the rest needs the lock.
#[derive(Clone, Copy)]
pub(crate) struct Realm<'a> {
    page: &'a Page,
}

/// The constant part of a Realm that stage 2 code needs, copied out.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stage2 {
    pub(crate) ipa_width: u64,
    pub(crate) start_level: Level,
    pub(crate) rtt_base: u64,
    pub(crate) format: Format,
    pub(crate) vttbr: u64,
    pub(crate) vtcr: u64,
}

impl Stage2 {
    /// First byte of the unprotected half.
    pub(crate) fn unprotected_base(&self) -> u64 {
        // 32 to 52 bits.
        1u64.wrapping_shl(u32::try_from(self.ipa_width).unwrap_or(0)) >> 1
    }

    /// Whether `ipa` lies in the protected half.
    pub(crate) fn is_protected(&self, ipa: u64) -> bool {
        ipa < self.unprotected_base()
    }

    /// Whether `ipa` lies in the Realm's address space.
    pub(crate) fn is_inside(&self, ipa: u64) -> bool {
        ipa >> 1 < self.unprotected_base()
    }

    /// AddrRangeIsProtected: `[base, top)` is not empty and lies entirely in the protected half.
    pub(crate) fn is_range_protected(&self, base: u64, top: u64) -> bool {
        base < top && self.is_protected(base) && self.is_protected(top.wrapping_sub(1))
    }
}

impl<'a> Realm<'a> {
    pub(crate) fn new(page: &'a Page) -> Self {
        Self { page }
    }

    fn get(&self, index: usize) -> u64 {
        self.page[index % GRANULE_WORDS].load(Relaxed)
    }

    fn set(&self, index: usize, value: u64) {
        self.page[index % GRANULE_WORDS].store(value, Relaxed);
    }

    pub(crate) fn state(&self) -> RealmState {
        match self.get(word::STATE) {
            0 => RealmState::New,
            1 => RealmState::Active,
            _ => RealmState::SystemOff,
        }
    }

    pub(crate) fn set_state(&self, state: RealmState) {
        self.set(word::STATE, state as u64);
    }

    pub(crate) fn stage2(&self) -> Stage2 {
        Stage2 {
            ipa_width: self.get(word::IPA_WIDTH),
            // Written from a level.
            start_level: Level::from_number(self.get(word::START_LEVEL)).unwrap_or(Level::PAGE),
            rtt_base: self.get(word::RTT_BASE),
            format: if self.get(word::LPA2) == 0 { Format::Bits48 } else { Format::Bits52 },
            vttbr: self.get(word::VTTBR),
            vtcr: self.get(word::VTCR),
        }
    }

    pub(crate) fn hash(&self) -> HashAlgorithm {
        if self.get(word::HASH) == HashAlgorithm::Sha512 as u64 {
            HashAlgorithm::Sha512
        } else {
            HashAlgorithm::Sha256
        }
    }

    pub(crate) fn rec_index(&self) -> u64 {
        self.get(word::REC_INDEX)
    }

    pub(crate) fn set_rec_index(&self, index: u64) {
        self.set(word::REC_INDEX, index);
    }

    /// Breakpoints and watchpoints, minus one each.
    pub(crate) fn debug_resources(&self) -> (u64, u64) {
        (self.get(word::NUM_BPS), self.get(word::NUM_WPS))
    }

    /// Auxiliary granules of each REC.
    pub(crate) fn aux_count(&self) -> u64 {
        self.get(word::AUX_COUNT)
    }

    /// ZCR_EL2 of a Realm with SVE: its longest vectors.
    pub(crate) fn zcr(&self) -> Option<u64> {
        self.get(word::SVE).checked_sub(1)
    }

    /// Event counters of a Realm with PMU.
    pub(crate) fn pmu_counters(&self) -> Option<u64> {
        self.get(word::PMU).checked_sub(1)
    }

    /// Whether its addresses may be longer than 48 bits.
    pub(crate) fn has_lpa2(&self) -> bool {
        self.get(word::LPA2) != 0
    }

    pub(crate) fn rpv(&self) -> [u64; 8] {
        core::array::from_fn(|n| self.get(word::RPV.wrapping_add(n)))
    }

    /// Measurement register `index` (0 RIM, 1–4 REMs).
    pub(crate) fn measurement(&self, index: usize) -> Measurement {
        core::array::from_fn(|n| self.get(measurement_word(index, n)))
    }

    pub(crate) fn set_measurement(&self, index: usize, value: &Measurement) {
        for (&bits, n) in value.iter().zip(0..8) {
            self.set(measurement_word(index, n), bits);
        }
    }

    pub(crate) fn rim(&self) -> Measurement {
        self.measurement(0)
    }

    pub(crate) fn set_rim(&self, value: &Measurement) {
        self.set_measurement(0, value);
    }

    fn tables(&self) -> u64 {
        self.get(word::NUM_START)
    }

    fn vmid(&self) -> u16 {
        // Written from a u16.
        u16::try_from(self.get(word::VMID)).unwrap_or_default()
    }
}

/// The start tables of a Realm, locked.
type StartTables<'t> = [Option<Locked<'t>>; MAX_START_TABLES as usize];

/// The addresses of `count` start tables; the last one is below 2^52.
fn start_tables(base: u64, count: u64) -> impl Iterator<Item = u64> {
    (0..count).map(move |n| base.wrapping_add(n.wrapping_mul(GRANULE_SIZE)))
}

/// `VTTBR_EL2`: bits 51:48 of the address, which only LPA2 has, are in 5:2.
fn vttbr(rtt_base: u64, vmid: u16) -> u64 {
    rtt_base & 0x0000_FFFF_FFFF_F000 | rtt_base >> 46 & 0b11_1100 | u64::from(vmid) << 48
}

impl<P: Platform> Rmm<'_, P> {
    /// A view of the RD at `rd`, which the caller keeps alive.
    pub(crate) fn realm(&self, rd: u64) -> Realm<'_> {
        Realm::new(self.platform.granule(rd))
    }

    /// The Realm's hash.
    pub(crate) fn hasher(&self, realm: Realm<'_>) -> Hasher<'_, P> {
        Hasher::new(&self.platform, realm.hash())
    }

    /// RMI_REALM_CREATE.
    // Not inlined: its buffers must not be part of every other command's stack frame.
    #[inline(never)]
    pub(crate) fn realm_create(&self, rd: u64, params_ptr: u64) -> Answer {
        let mut params = RealmParams::new_zeroed();
        self.read_params(params_ptr, &mut params)?;
        let shape = self.config.check_realm(&params).ok_or(Status::ErrorInput)?;
        if (shape.rtt_base..shape.rtt_end).contains(&rd) {
            return Err(Status::ErrorInput.into());
        }

        // Ascending order: the RD is below or above all start tables.
        let lock_rd = || self.granules.lock_named(rd, State::Delegated);
        let rd_below = if rd < shape.rtt_base { Some(lock_rd()?) } else { None };
        let mut tables: StartTables<'_> = [const { None }; MAX_START_TABLES as usize];
        for (slot, pa) in tables.iter_mut().zip(start_tables(shape.rtt_base, shape.tables)) {
            *slot = Some(self.granules.lock_named(pa, State::Delegated)?);
        }
        let rd_granule = match rd_below {
            Some(locked) => locked,
            None => lock_rd()?,
        };
        if !self.vmids.reserve(params.vmid) {
            return Err(Status::ErrorInput.into());
        }

        let realm = self.realm(rd);
        realm.set_state(RealmState::New);
        realm.set(word::IPA_WIDTH, shape.ipa_width);
        realm.set(word::START_LEVEL, shape.start_level.register());
        realm.set(word::RTT_BASE, shape.rtt_base);
        realm.set(word::NUM_START, shape.tables);
        realm.set(word::VMID, u64::from(params.vmid));
        realm.set(word::HASH, shape.hash as u64);
        realm.set(word::NUM_BPS, u64::from(params.num_bps));
        realm.set(word::NUM_WPS, u64::from(params.num_wps));
        realm.set(word::SVE, shape.zcr.map_or(0, |zcr| zcr.wrapping_add(1)));
        realm.set(word::PMU, shape.pmu_counters.map_or(0, |counters| counters.wrapping_add(1)));
        realm.set(word::VTCR, shape.vtcr);
        realm.set(word::VTTBR, vttbr(shape.rtt_base, params.vmid));
        realm.set(word::LPA2, u64::from(shape.format == Format::Bits52));
        realm.set(word::AUX_COUNT, shape.aux_count);
        let mut rpv = [0u64; 8];
        rpv.as_mut_bytes().copy_from_slice(&params.rpv);
        for (value, at) in rpv.into_iter().zip(word::RPV..word::RPV + 8) {
            realm.set(at, value);
        }
        realm.set_rim(&self.hasher(realm).rim_init(&mut params));

        // The tables are zero, which is UNASSIGNED/EMPTY; the upper half of the address space is unprotected.
        let unprotected = realm.stage2().unprotected_base();
        let mut ipa = 0u64;
        for table in tables.iter().flatten() {
            let page = self.platform.granule(table.pa());
            for entry in page {
                if ipa >= unprotected {
                    entry.store(Entry::UnassignedNs.encode(shape.start_level, shape.format), Relaxed);
                }
                // At most 512 entries of 2^48 bytes, or 16 tables of smaller ones.
                ipa = ipa.wrapping_add(shape.start_level.span());
            }
            table.set_state(State::Rtt);
        }
        self.platform.publish_table_writes();
        rd_granule.set_state(State::Rd);
        Ok(NONE)
    }

    /// RMI_REALM_ACTIVATE.
    pub(crate) fn realm_activate(&self, rd: u64) -> Answer {
        let _rd = self.granules.lock_named(rd, State::Rd)?;
        let realm = self.realm(rd);
        if realm.state() != RealmState::New {
            return Err(Status::ErrorRealm(0).into());
        }
        realm.set_state(RealmState::Active);
        Ok(NONE)
    }

    /// RMI_REALM_DESTROY.
    pub(crate) fn realm_destroy(&self, rd: u64) -> Answer {
        let rd_granule = self.granules.lock_named(rd, State::Rd)?;
        if rd_granule.count() != 0 {
            return Err(Status::ErrorRealm(0).into());
        }
        let realm = self.realm(rd);
        let stage2 = realm.stage2();
        let mut tables: StartTables<'_> = [const { None }; MAX_START_TABLES as usize];
        for (slot, pa) in tables.iter_mut().zip(start_tables(stage2.rtt_base, realm.tables())) {
            let table = self.table(pa, stage2.start_level, stage2.format).granule;
            if table.count() != 0 {
                return Err(Status::ErrorRealm(0).into());
            }
            *slot = Some(table);
        }

        self.platform.tlbi_vmid(stage2.vttbr, stage2.vtcr);
        for table in tables.iter().flatten() {
            self.wipe_to_delegated(table);
        }
        let vmid = realm.vmid();
        self.wipe_to_delegated(&rd_granule);
        self.vmids.release(vmid);
        Ok(NONE)
    }

    /// RMI_REC_AUX_COUNT.
    pub(crate) fn rec_aux_count(&self, rd: u64) -> Answer {
        let _rd = self.granules.lock_named(rd, State::Rd)?;
        Ok(one(self.realm(rd).aux_count()))
    }

    /// Copies a parameter granule from NS memory.
    pub(crate) fn read_params<T: FromBytes + IntoBytes>(
        &self,
        pa: u64,
        params: &mut T,
    ) -> Result<(), Status> {
        const { assert!(size_of::<T>() == 4096 && align_of::<T>() == 8) };
        if !self.granules.is_undelegated(pa) {
            return Err(Status::ErrorInput);
        }
        let words = <[u64]>::mut_from_bytes(params.as_mut_bytes()).map_err(|_| Status::ErrorInput)?;
        self.platform.ns_read(pa, words).map_err(|_| Status::ErrorInput)
    }
}
