//! Calls of a Realm: SMCCC dispatch and the RSI commands.

use core::mem::offset_of;
use core::sync::atomic::Ordering::Relaxed;

use cca_abi::rmi::{ExitReason, Ripas};
use cca_abi::rsi::{self, Status, fid};
use cca_abi::smccc;

use crate::Rmm;
use crate::abort;
use crate::level::Level;
use crate::measurement::Measurement;
use crate::platform::{GRANULE_SIZE, GRANULE_WORDS, Platform};
use crate::psci;
use crate::realm::MEASUREMENTS;
use crate::rec::RipasRequest;
use crate::run::{Flow, Run};
use crate::walk::Absent;

/// Returns to the REC, behind its SMC, with results in X0–X3.
pub(crate) fn answer(run: &Run<'_>, status: Status, [x1, x2, x3]: [u64; 3]) -> Flow {
    run.set_results([status as u64, x1, x2, x3]);
    run.ctx.advance_pc();
    Flow::Resume
}

pub(crate) fn error(run: &Run<'_>, status: Status) -> Flow {
    answer(run, status, [0; 3])
}

/// A page that the command needs is not there: the Realm's error, or an exit after which the SMC is repeated.
pub(crate) fn absent(run: &mut Run<'_>, ipa: u64, why: Absent) -> Flow {
    match why {
        Absent::Empty => error(run, Status::ErrorInput),
        Absent::Fault(level) => abort::report_absent(run, ipa, level),
    }
}

impl<P: Platform> Rmm<'_, P> {
    /// An SMC by the running REC; the PC is at the instruction.
    pub(crate) fn realm_call(&self, run: &mut Run<'_>) -> Flow {
        let id = smccc::fid(run.ctx.gpr(0));
        match id {
            fid::VERSION => {
                let requested = run.ctx.gpr(1);
                let status = if requested == rsi::VERSION_1_0 { Status::Success } else { Status::ErrorInput };
                answer(run, status, [rsi::VERSION_1_0, rsi::VERSION_1_0, 0])
            }
            fid::FEATURES => answer(run, Status::Success, [0; 3]),
            fid::MEASUREMENT_READ => self.measurement_read(run),
            fid::MEASUREMENT_EXTEND => self.measurement_extend(run),
            fid::ATTESTATION_TOKEN_INIT => self.token_init(run),
            fid::ATTESTATION_TOKEN_CONTINUE => self.token_continue(run),
            fid::REALM_CONFIG => self.realm_config(run),
            fid::IPA_STATE_SET => ipa_state_set(run),
            fid::IPA_STATE_GET => self.ipa_state_get(run),
            fid::HOST_CALL => self.host_call(run),
            smccc::VERSION => {
                run.set_results([smccc::VERSION_1_2, 0, 0, 0]);
                run.ctx.advance_pc();
                Flow::Resume
            }
            _ if psci::is_psci(id) => {
                run.ctx.advance_pc();
                self.psci(run, id)
            }
            _ => {
                run.set_results([smccc::NOT_SUPPORTED, 0, 0, 0]);
                run.ctx.advance_pc();
                Flow::Resume
            }
        }
    }

    /// RSI_MEASUREMENT_READ.
    fn measurement_read(&self, run: &Run<'_>) -> Flow {
        let index = run.ctx.gpr(1);
        let Some(index) = usize::try_from(index).ok().filter(|_| index < MEASUREMENTS) else {
            return error(run, Status::ErrorInput);
        };
        let value = {
            let _rd = self.lock_rd(run.rd);
            run.realm.measurement(index)
        };
        run.ctx.set_gpr(0, Status::Success as u64);
        for (n, word) in value.into_iter().enumerate() {
            run.ctx.set_gpr(1 + n, word);
        }
        run.ctx.advance_pc();
        Flow::Resume
    }

    /// RSI_MEASUREMENT_EXTEND.
    fn measurement_extend(&self, run: &Run<'_>) -> Flow {
        let index = usize::try_from(run.ctx.gpr(1)).unwrap_or(usize::MAX);
        let size = usize::try_from(run.ctx.gpr(2)).unwrap_or(usize::MAX);
        if !(1..MEASUREMENTS as usize).contains(&index) || size > size_of::<Measurement>() {
            return error(run, Status::ErrorInput);
        }
        let value: Measurement = core::array::from_fn(|n| run.ctx.gpr(3 + n));
        {
            let _rd = self.lock_rd(run.rd);
            let old = run.realm.measurement(index);
            run.realm.set_measurement(index, &self.hasher(run.realm).rem_extend(&old, &value, size));
        }
        answer(run, Status::Success, [0; 3])
    }

    /// RSI_REALM_CONFIG.
    fn realm_config(&self, run: &mut Run<'_>) -> Flow {
        let ipa = run.ctx.gpr(1);
        if ipa % GRANULE_SIZE != 0 || !run.stage2.is_protected(ipa) {
            return error(run, Status::ErrorInput);
        }
        let ipa_width = run.stage2.ipa_width;
        let hash = run.realm.hash() as u64;
        let rpv = run.realm.rpv();
        let written = self.with_realm_page(&run.stage2, ipa, |page, _| {
            for word in page {
                word.store(0, Relaxed);
            }
            page[offset_of!(rsi::RealmConfig, ipa_width) / 8].store(ipa_width, Relaxed);
            page[offset_of!(rsi::RealmConfig, hash_algo) / 8].store(hash, Relaxed);
            for (n, word) in rpv.into_iter().enumerate() {
                page[offset_of!(rsi::RealmConfig, rpv) / 8 + n].store(word, Relaxed);
            }
        });
        match written {
            Ok(()) => answer(run, Status::Success, [0; 3]),
            Err(why) => absent(run, ipa, why),
        }
    }

    /// RSI_IPA_STATE_GET.
    fn ipa_state_get(&self, run: &Run<'_>) -> Flow {
        let (base, top) = (run.ctx.gpr(1), run.ctx.gpr(2));
        if (base | top) % GRANULE_SIZE != 0 || !run.stage2.is_range_protected(base, top) {
            return error(run, Status::ErrorInput);
        }
        let walk = self.walk(&run.stage2, None, base, Level::PAGE);
        // A walk to the page level ends at a leaf, and `base` is protected.
        let ripas = walk.entry.ripas().unwrap_or(Ripas::Empty);
        let level = walk.level();
        let mut out_top = level.align_down(base);
        loop {
            out_top = out_top.wrapping_add(level.span());
            let same = || walk.table.entry(out_top).ripas() == Some(ripas);
            if out_top >= top || level.index(out_top) == 0 || !same() {
                break;
            }
        }
        drop(walk);
        answer(run, Status::Success, [out_top.min(top), ripas as u64, 0])
    }

    /// RSI_HOST_CALL.
    fn host_call(&self, run: &mut Run<'_>) -> Flow {
        let ipa = run.ctx.gpr(1);
        if ipa % rsi::HOST_CALL_ALIGN != 0 || !run.stage2.is_protected(ipa) {
            return error(run, Status::ErrorInput);
        }
        let mut gprs = [0u64; 31];
        let read = self.with_realm_page(&run.stage2, ipa, |page, at| {
            let first = at.wrapping_add(offset_of!(rsi::HostCall, gprs) / 8);
            for (to, from) in gprs.iter_mut().zip(page.iter().skip(first)) {
                *to = from.load(Relaxed);
            }
            page[at % GRANULE_WORDS].load(Relaxed)
        });
        match read {
            Err(why) => absent(run, ipa, why),
            Ok(imm) => {
                run.exit.gprs = gprs;
                // The low half-word is the immediate.
                run.exit.imm = u16::try_from(imm & 0xFFFF).unwrap_or_default();
                run.rec.set_host_call(Some(ipa));
                run.ctx.advance_pc();
                run.leave(ExitReason::HostCall)
            }
        }
    }
}

/// RSI_IPA_STATE_SET: the host decides; the results are written at the next entry.
fn ipa_state_set(run: &mut Run<'_>) -> Flow {
    let [base, top, ripas, flags] = [1, 2, 3, 4].map(|n| run.ctx.gpr(n));
    let value = match ripas {
        0 => Ripas::Empty,
        1 => Ripas::Ram,
        _ => return error(run, Status::ErrorInput),
    };
    if (base | top) % GRANULE_SIZE != 0 || !run.stage2.is_range_protected(base, top) {
        return error(run, Status::ErrorInput);
    }
    let change_destroyed = flags & rsi::CHANGE_DESTROYED != 0;
    run.rec.set_ripas_request(Some(RipasRequest { base, top, value, change_destroyed }));
    run.exit.ripas_base = base;
    run.exit.ripas_top = top;
    run.exit.ripas_value = value as u8;
    run.ctx.advance_pc();
    run.leave(ExitReason::RipasChange)
}
