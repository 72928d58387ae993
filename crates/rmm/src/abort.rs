//! Aborts from a REC: which are the Realm's, which the host's, and how an emulated access is completed.

use core::sync::atomic::Ordering::Relaxed;

use cca_abi::rmi::{ExitReason, Ripas};

use crate::Rmm;
use crate::config::field;
use crate::context::{RecContext, word};
use crate::entry::Entry;
use crate::inject;
use crate::level::Level;
use crate::platform::{El1, Platform};
use crate::rec::LastAbort;
use crate::run::{Flow, Run};
use crate::stage1;

// Fields of ESR_EL2 for an abort.
const EC: u64 = 0x3F << 26;
const ISS: u64 = 0x1FF_FFFF;
const IL: u64 = 1 << 25;
const ISV: u64 = 1 << 24;
const SAS: u64 = 3 << 22;
const SSE: u64 = 1 << 21;
const SF: u64 = 1 << 15;
const SET: u64 = 3 << 11;
const FNV: u64 = 1 << 10;
const EA: u64 = 1 << 9;
const WNR: u64 = 1 << 6;
const FSC: u64 = 0x3F;

/// What the host sees of an abort that it cannot emulate.
const VISIBLE: u64 = EC | SET | FNV | EA | FSC;
/// What it sees in addition of one that it can.
const VISIBLE_EMULATABLE: u64 = VISIBLE | ISV | SAS | SF | WNR;

const EC_DATA_ABORT: u64 = 0x24;
const PSTATE_AARCH32: u64 = 1 << 4;

/// HPFAR_EL2.FIPA.
const FIPA: u64 = 0x0000_0FFF_FFFF_FFF0;

const TRANSLATION_FAULT_0: u64 = 0x04;
const TRANSLATION_FAULT_MINUS_1: u64 = 0x2B;

/// Whether the fault is a synchronous external abort, also on a table walk.
fn is_external(esr: u64) -> bool {
    matches!(esr & FSC, 0x10 | 0x13..=0x17)
}

/// Whether the fault is a stage 2 translation fault.
fn is_translation_fault(esr: u64) -> bool {
    matches!(esr & FSC, TRANSLATION_FAULT_0..=0x07 | TRANSLATION_FAULT_MINUS_1)
}

impl<P: Platform> Rmm<'_, P> {
    /// An instruction or data abort taken to EL2.
    pub(crate) fn stage2_abort(&self, run: &mut Run<'_>, esr: u64, far: u64, hpfar: u64) -> Flow {
        let is_data = field(esr, 26, 6) == EC_DATA_ABORT;
        if is_external(esr) {
            const SET_UEO: u64 = 3;
            if field(esr, 11, 2) != SET_UEO {
                inject::external_abort(&self.platform, run.cpu, &run.ctx, esr, far);
            }
            run.exit.esr = esr & VISIBLE;
            return run.leave(ExitReason::Sync);
        }

        let ipa = (hpfar & FIPA) << 8;
        if !run.stage2.is_inside(ipa) {
            let level = self.stage1_level(run, far);
            inject::address_size_fault(&self.platform, run.cpu, &run.ctx, esr, far, level);
            return Flow::Resume;
        }
        if run.stage2.is_protected(ipa) {
            let walk = self.walk(&run.stage2, None, ipa, Level::PAGE);
            match walk.entry {
                Entry::Unassigned(Ripas::Empty) | Entry::Assigned(_, Ripas::Empty) => {
                    drop(walk);
                    inject::external_abort(&self.platform, run.cpu, &run.ctx, esr, far);
                    return Flow::Resume;
                }
                // Another CPU of the host was faster: the access succeeds when it is tried again.
                Entry::Assigned(_, Ripas::Ram) if is_translation_fault(esr) => return Flow::Resume,
                _ => {}
            }
            run.exit.esr = esr & VISIBLE;
        } else if !is_data {
            inject::external_abort(&self.platform, run.cpu, &run.ctx, esr, far);
            return Flow::Resume;
        } else {
            unprotected_data_abort(run, esr, far);
        }
        run.exit.hpfar = hpfar & FIPA;
        run.leave(ExitReason::Sync)
    }

    /// The level of the Realm's own tables from which an access to `va` left its address space; 0 with the MMU off.
    fn stage1_level(&self, run: &Run<'_>, va: u64) -> i64 {
        let register = |register| self.platform.el1(run.cpu, &run.ctx, register);
        if register(El1::Sctlr) & inject::SCTLR_M == 0 {
            return 0;
        }
        let tables = stage1::Tables {
            tcr: register(El1::Tcr),
            ttbr0: register(El1::Ttbr0),
            ttbr1: register(El1::Ttbr1),
        };
        stage1::fault_level(
            tables,
            va,
            |ipa| run.stage2.is_inside(ipa),
            |ipa| {
                if !run.stage2.is_protected(ipa) {
                    return None;
                }
                self.with_realm_page(&run.stage2, ipa, |page, at| page.get(at).map(|word| word.load(Relaxed)))
                    .ok()
                    .flatten()
            },
        )
    }
}

fn unprotected_data_abort(run: &mut Run<'_>, esr: u64, far: u64) {
    let aarch32 = run.ctx.get(word::PSTATE) & PSTATE_AARCH32 != 0;
    if esr & ISV == 0 || aarch32 {
        run.exit.esr = esr & (VISIBLE | IL);
        run.rec.set_last_abort(LastAbort::Unprotected, esr, far);
        return;
    }
    run.exit.esr = esr & VISIBLE_EMULATABLE;
    run.exit.far = far & 0xFFF;
    if esr & WNR != 0 {
        run.exit.gprs[0] = run.ctx.gpr(transfer_register(esr)) & access_mask(esr);
    }
    run.rec.set_last_abort(LastAbort::Emulatable, esr, far);
}

/// ISS.SRT.
fn transfer_register(esr: u64) -> usize {
    // Five bits.
    field(esr, 16, 5) as usize
}

/// Bits of a register that an access of this size transfers.
fn access_mask(esr: u64) -> u64 {
    u64::MAX >> (64 - access_bits(esr))
}

fn access_bits(esr: u64) -> u32 {
    8 << ((esr & SAS) >> SAS.trailing_zeros())
}

/// Completes an access that the host emulated: for a load, `value` goes to the register; the PC moves on.
pub(crate) fn complete_emulation(ctx: &RecContext<'_>, esr: u64, value: u64) {
    if esr & WNR == 0 {
        let mut loaded = value & access_mask(esr);
        if esr & SSE != 0 {
            let sign = 1u64 << (access_bits(esr) - 1);
            loaded = (loaded ^ sign).wrapping_sub(sign);
            if esr & SF == 0 {
                loaded &= 0xFFFF_FFFF;
            }
        }
        ctx.set_gpr(transfer_register(esr), loaded);
    }
    ctx.advance_pc();
}

/// The fault status code of a translation fault at `level`.
fn translation_fault(level: Level) -> u64 {
    match level {
        Level::Minus1 => TRANSLATION_FAULT_MINUS_1,
        _ => TRANSLATION_FAULT_0 | level.register(),
    }
}

/// Reports, on behalf of an RSI command, that a protected page has to be supplied by the host.
pub(crate) fn report_absent(run: &mut Run<'_>, ipa: u64, level: Level) -> Flow {
    run.exit.esr = EC_DATA_ABORT << 26 | translation_fault(level);
    run.exit.hpfar = ipa >> 8 & FIPA;
    run.leave(ExitReason::Sync)
}

/// A physical SError: told to the host, and to the Realm if its state is affected.
pub(crate) fn serror(run: &mut Run<'_>, esr: u64) -> Flow {
    const IDS: u64 = 1 << 24;
    const AET: u64 = 7 << 10;
    const AET_UEO: u64 = 2 << 10;
    const AET_CE: u64 = 6 << 10;
    run.exit.esr = esr & (EC | IDS | AET | EA | FSC);
    if esr & IDS != 0 || !matches!(esr & AET, AET_UEO | AET_CE) {
        run.rec.set_vserror(Some(esr & ISS));
    }
    run.leave(ExitReason::SError)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_platform::new_page;

    /// A load into X5: size code, sign extension, 64-bit register.
    fn load(size: u64, sse: bool, sf: bool) -> u64 {
        EC_DATA_ABORT << 26
            | IL
            | ISV
            | size << 22
            | if sse { SSE } else { 0 }
            | 5 << 16
            | if sf { SF } else { 0 }
            | 0x07
    }

    fn loaded(esr: u64, value: u64) -> u64 {
        let page = new_page();
        let ctx = RecContext::new(&page);
        ctx.set(word::PC, 0x1000);
        complete_emulation(&ctx, esr, value);
        assert_eq!(ctx.pc(), 0x1004);
        ctx.gpr(5)
    }

    #[test]
    fn an_emulated_load_takes_only_the_bytes_accessed() {
        let value = 0x8899_AABB_CCDD_EEFF;
        assert_eq!(loaded(load(0, false, true), value), 0xFF);
        assert_eq!(loaded(load(1, false, true), value), 0xEEFF);
        assert_eq!(loaded(load(2, false, false), value), 0xCCDD_EEFF);
        assert_eq!(loaded(load(3, false, true), value), value);
    }

    #[test]
    fn an_emulated_load_is_sign_extended_to_the_register_size() {
        assert_eq!(loaded(load(0, true, true), 0x80), 0xFFFF_FFFF_FFFF_FF80);
        assert_eq!(loaded(load(0, true, false), 0x80), 0xFFFF_FF80);
        assert_eq!(loaded(load(1, true, true), 0x7FFF), 0x7FFF);
        assert_eq!(loaded(load(2, true, true), 0x8000_0000), 0xFFFF_FFFF_8000_0000);
    }

    #[test]
    fn a_load_to_the_zero_register_is_discarded_and_a_store_changes_none() {
        let page = new_page();
        let ctx = RecContext::new(&page);
        complete_emulation(&ctx, load(3, false, true) | 31 << 16, 1);
        complete_emulation(&ctx, load(3, false, true) | WNR, 1);
        assert!((0..31).all(|n| ctx.gpr(n) == 0));
        assert_eq!(ctx.pc(), 8);
    }
}
