//! The REC object, and the commands that create and destroy one.

use core::sync::atomic::Ordering::Relaxed;

use cca_abi::rmi::{REC_RUNNABLE, RecParams, Ripas, Status};
use zerocopy::FromZeros;

use crate::Rmm;
use crate::answer::{Answer, NONE};
use crate::attestation::{self, AttestState};
use crate::aux;
use crate::config::{MAX_RECS, field};
use crate::context::{RecContext, word as ctx_word};
use crate::granule::{Locked, State};
use crate::lock::Wanted;
use crate::platform::{GRANULE_WORDS, Page, Platform};
use crate::realm::RealmState;
use crate::reset;

/// Words of the REC granule.
mod word {
    pub(super) const OWNER: usize = 0;
    pub(super) const AUX_COUNT: usize = 1;
    pub(super) const MPIDR: usize = 2;
    pub(super) const RUNNABLE: usize = 3;
    pub(super) const PSCI_PENDING: usize = 4;
    pub(super) const HOST_CALL_PENDING: usize = 5;
    pub(super) const HOST_CALL_ADDR: usize = 6;
    pub(super) const RIPAS_PENDING: usize = 7;
    pub(super) const RIPAS_BASE: usize = 8;
    pub(super) const RIPAS_TOP: usize = 9;
    pub(super) const RIPAS_VALUE: usize = 10;
    pub(super) const RIPAS_DESTROYED: usize = 11;
    pub(super) const ABORT: usize = 12;
    pub(super) const ABORT_ESR: usize = 13;
    pub(super) const ABORT_FAR: usize = 14;
    pub(super) const TIMERS: usize = 15;
    pub(super) const VSERROR_PENDING: usize = 16;
    pub(super) const VSERROR: usize = 17;
    /// Addresses of the auxiliary granules.
    pub(super) const AUX: usize = 32;
    pub(super) const ATTESTATION: usize = 256;
}

/// A view of a REC granule. It is read and written under the REC's lock, or by the CPU that runs it.
#[derive(Clone, Copy)]
pub(crate) struct Rec<'a> {
    page: &'a Page,
}

/// What the last exit left for the next entry to complete, as far as data aborts go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LastAbort {
    /// The last exit was no data abort at an unprotected IPA.
    None,
    /// It was one that the host cannot emulate.
    Unprotected,
    /// It was an emulatable one.
    Emulatable,
}

/// The Realm's request to change RIPAS; all zero if there is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RipasRequest {
    pub(crate) base: u64,
    pub(crate) top: u64,
    pub(crate) value: Ripas,
    pub(crate) change_destroyed: bool,
}

impl<'a> Rec<'a> {
    pub(crate) fn new(page: &'a Page) -> Self {
        Self { page }
    }

    fn get(&self, index: usize) -> u64 {
        self.page[index % GRANULE_WORDS].load(Relaxed)
    }

    fn set(&self, index: usize, value: u64) {
        self.page[index % GRANULE_WORDS].store(value, Relaxed);
    }

    /// Address of the RD.
    pub(crate) fn owner(&self) -> u64 {
        self.get(word::OWNER)
    }

    /// Address of auxiliary granule `n` ([`aux`] says what it holds).
    pub(crate) fn aux(&self, n: usize) -> u64 {
        self.get(word::AUX.wrapping_add(n))
    }

    /// All auxiliary granules.
    fn auxes(&self) -> impl Iterator<Item = u64> {
        (0..aux::MAX).zip(0..self.get(word::AUX_COUNT)).map(|(n, _)| self.aux(n))
    }

    /// `MPIDR_EL1` as the Realm reads it.
    pub(crate) fn mpidr(&self) -> u64 {
        self.get(word::MPIDR)
    }

    pub(crate) fn runnable(&self) -> bool {
        self.get(word::RUNNABLE) != 0
    }

    pub(crate) fn set_runnable(&self, runnable: bool) {
        self.set(word::RUNNABLE, u64::from(runnable));
    }

    /// The PSCI function that waits for RMI_PSCI_COMPLETE, or zero.
    pub(crate) fn psci_pending(&self) -> u64 {
        self.get(word::PSCI_PENDING)
    }

    pub(crate) fn set_psci_pending(&self, fid: u64) {
        self.set(word::PSCI_PENDING, fid);
    }

    /// The IPA of the RsiHostCall that waits for the host's answer.
    pub(crate) fn host_call(&self) -> Option<u64> {
        (self.get(word::HOST_CALL_PENDING) != 0).then(|| self.get(word::HOST_CALL_ADDR))
    }

    pub(crate) fn set_host_call(&self, pending: Option<u64>) {
        self.set(word::HOST_CALL_PENDING, u64::from(pending.is_some()));
        self.set(word::HOST_CALL_ADDR, pending.unwrap_or(0));
    }

    /// Whether the last exit was RIPAS_CHANGE.
    pub(crate) fn ripas_pending(&self) -> bool {
        self.get(word::RIPAS_PENDING) != 0
    }

    pub(crate) fn ripas_request(&self) -> RipasRequest {
        RipasRequest {
            base: self.get(word::RIPAS_BASE),
            top: self.get(word::RIPAS_TOP),
            value: Ripas::try_from(self.get(word::RIPAS_VALUE)).unwrap_or(Ripas::Empty),
            change_destroyed: self.get(word::RIPAS_DESTROYED) != 0,
        }
    }

    pub(crate) fn set_ripas_request(&self, request: Option<RipasRequest>) {
        self.set(word::RIPAS_PENDING, u64::from(request.is_some()));
        let none = RipasRequest { base: 0, top: 0, value: Ripas::Empty, change_destroyed: false };
        let request = request.unwrap_or(none);
        self.set(word::RIPAS_BASE, request.base);
        self.set(word::RIPAS_TOP, request.top);
        self.set(word::RIPAS_VALUE, request.value as u64);
        self.set(word::RIPAS_DESTROYED, u64::from(request.change_destroyed));
    }

    pub(crate) fn set_ripas_base(&self, base: u64) {
        self.set(word::RIPAS_BASE, base);
    }

    pub(crate) fn last_abort(&self) -> LastAbort {
        match self.get(word::ABORT) {
            0 => LastAbort::None,
            1 => LastAbort::Unprotected,
            _ => LastAbort::Emulatable,
        }
    }

    /// `ESR_EL2` and `FAR_EL2` of the last abort.
    pub(crate) fn abort_syndrome(&self) -> (u64, u64) {
        (self.get(word::ABORT_ESR), self.get(word::ABORT_FAR))
    }

    pub(crate) fn set_last_abort(&self, kind: LastAbort, esr: u64, far: u64) {
        let code = match kind {
            LastAbort::None => 0,
            LastAbort::Unprotected => 1,
            LastAbort::Emulatable => 2,
        };
        self.set(word::ABORT, code);
        self.set(word::ABORT_ESR, esr);
        self.set(word::ABORT_FAR, far);
    }

    /// The timer outputs that the host was told of at the last exit.
    pub(crate) fn timers_reported(&self) -> u64 {
        self.get(word::TIMERS)
    }

    pub(crate) fn set_timers_reported(&self, outputs: u64) {
        self.set(word::TIMERS, outputs);
    }

    /// The syndrome (ISS) of a virtual SError to be injected at the next entry.
    pub(crate) fn take_vserror(&self) -> Option<u64> {
        let pending = self.get(word::VSERROR_PENDING) != 0;
        self.set(word::VSERROR_PENDING, 0);
        pending.then(|| self.get(word::VSERROR))
    }

    /// The token that is being made.
    pub(crate) fn attest_state(&self) -> AttestState<'a> {
        const { assert!(word::ATTESTATION + attestation::WORDS <= GRANULE_WORDS) };
        let (_, words) = self.page.split_at(word::ATTESTATION);
        // As the assertion says.
        let Some(words) = words.first_chunk() else { unreachable!() };
        AttestState::new(words)
    }

    /// Remembers a virtual SError.
    pub(crate) fn set_vserror(&self, syndrome: Option<u64>) {
        self.set(word::VSERROR_PENDING, u64::from(syndrome.is_some()));
        self.set(word::VSERROR, syndrome.unwrap_or(0));
    }
}

/// Granules that REC_CREATE locks at most: RD, REC, auxiliary ones.
const GRANULES: usize = 2 + aux::MAX;

/// RecIndex of an `RmiRecMpidr`.
fn rec_index(mpidr: u64) -> u64 {
    field(mpidr, 0, 4) | field(mpidr, 8, 24) << 4
}

/// The affinity that the Realm sees (MPIDR_EL1 layout) of an `RmiRecMpidr`.
fn realm_mpidr(mpidr: u64) -> u64 {
    field(mpidr, 0, 4) | field(mpidr, 8, 16) << 8 | field(mpidr, 24, 8) << 32 | 1 << 31
}

/// The affinity fields of an `MPIDR_EL1` value, as PSCI passes them.
pub(crate) fn affinity(mpidr: u64) -> u64 {
    mpidr & 0xFF_00FF_FF0F
}

/// The REC index of a PSCI target; `None` if bits outside the affinity fields are set.
pub(crate) fn psci_target_index(target: u64) -> Option<u64> {
    (target == affinity(target))
        .then(|| field(target, 0, 4) | field(target, 8, 16) << 4 | field(target, 32, 8) << 20)
}

impl<P: Platform> Rmm<'_, P> {
    /// A view of the REC at `rec`.
    pub(crate) fn rec(&self, rec: u64) -> Rec<'_> {
        Rec::new(self.platform.granule(rec))
    }

    /// The REC's execution context.
    pub(crate) fn context(&self, rec: Rec<'_>) -> RecContext<'_> {
        RecContext::new(self.platform.granule(rec.aux(aux::CONTEXT)))
    }

    /// RMI_REC_CREATE.
    // Not inlined: its buffers must not be part of every other command's stack frame.
    #[inline(never)]
    pub(crate) fn rec_create(&self, rd: u64, rec: u64, params_ptr: u64) -> Answer {
        let mut params = RecParams::new_zeroed();
        self.read_params(params_ptr, &mut params)?;
        let auxes = usize::try_from(params.num_aux)
            .ok()
            .and_then(|num_aux| params.aux.get(..num_aux))
            .ok_or(Status::ErrorInput)?;
        let mut wanted: [Wanted; GRANULES] = [(0, State::Delegated); GRANULES];
        let mut locked: [Option<Locked<'_>>; GRANULES] = [const { None }; GRANULES];
        let named = [(rd, State::Rd), (rec, State::Delegated)];
        let auxes_wanted = auxes.iter().map(|&pa| (pa, State::Delegated));
        let mut count = 0usize;
        for (slot, granule) in wanted.iter_mut().zip(named.into_iter().chain(auxes_wanted)) {
            *slot = granule;
            count = count.wrapping_add(1);
        }
        self.granules.lock_each(wanted.get(..count).unwrap_or_default(), &mut locked)?;
        let locked = || locked.iter().flatten();
        let rd = locked().find(|granule| granule.pa() == rd).ok_or(Status::ErrorInput)?;
        let realm = self.realm(rd.pa());
        if realm.state() != RealmState::New || u64::from(rd.count()) >= MAX_RECS {
            return Err(Status::ErrorRealm(0).into());
        }
        let index = realm.rec_index();
        if rec_index(params.mpidr) != index || params.num_aux != realm.aux_count() {
            return Err(Status::ErrorInput.into());
        }

        let runnable = params.flags & REC_RUNNABLE != 0;
        let object = self.rec(rec);
        object.set(word::OWNER, rd.pa());
        object.set(word::AUX_COUNT, params.num_aux);
        for (&pa, at) in auxes.iter().zip(word::AUX..word::AUX + aux::MAX) {
            object.set(at, pa);
        }
        object.set(word::MPIDR, realm_mpidr(params.mpidr));
        object.set_runnable(runnable);

        let ctx = self.context(object);
        reset::context(&ctx, realm, object);
        ctx.set(ctx_word::PC, params.pc);
        for (&value, n) in params.gprs.iter().zip(0..8) {
            ctx.set_gpr(n, value);
        }
        if runnable {
            realm.set_rim(&self.hasher(realm).rim_rec(&realm.rim(), &mut params));
        }
        realm.set_rec_index(index.wrapping_add(1));
        rd.get(1);
        for granule in locked().filter(|granule| granule.pa() != rd.pa()) {
            granule.set_state(if granule.pa() == rec { State::Rec } else { State::RecAux });
        }
        Ok(NONE)
    }

    /// RMI_REC_DESTROY.
    pub(crate) fn rec_destroy(&self, rec: u64) -> Answer {
        let rec = self.granules.lock_named(rec, State::Rec)?;
        if rec.count() != 0 {
            return Err(Status::ErrorRec.into());
        }
        let object = self.rec(rec.pa());
        let owner = object.owner();
        for pa in object.auxes() {
            self.wipe_to_delegated(&self.lock_owned(pa, State::RecAux));
        }
        self.wipe_to_delegated(&rec);
        // Last: from here on the Realm may go away.
        self.granules.put(owner);
        Ok(NONE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rec_indices_follow_the_specifications_table() {
        for (mpidr, index) in [(0u64, 0), (15, 15), (0x100, 16), (0x1_0000, 4096), (0x100_0000, 1 << 20)] {
            assert_eq!(rec_index(mpidr), index);
            let seen = realm_mpidr(mpidr);
            assert_eq!(psci_target_index(affinity(seen)), Some(index));
        }
        assert_eq!(psci_target_index(1 << 31), None);
        assert_eq!(psci_target_index(0x10), None);
    }
}
