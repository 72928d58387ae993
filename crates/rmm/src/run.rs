//! REC_ENTER: completing what the last exit left open, running, and reporting the exit.

use cca_abi::rmi::{ExitReason, MAX_LRS, RecExit, RecRun, Ripas, Status, enter_flags};
use cca_abi::rsi;
use core::mem::offset_of;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::Rmm;
use crate::abort;
use crate::answer::{Answer, NONE};
use crate::config::field;
use crate::context::{RecContext, word};
use crate::gic::{self, GicEnter};
use crate::granule::State;
use crate::inject;
use crate::platform::{Platform, RealmExit};
use crate::pmu;
use crate::realm::{Realm, RealmState, Stage2};
use crate::rec::{LastAbort, Rec};
use crate::reset;
use crate::timer;
use crate::walk::Absent;

/// What happens after an exception from the REC has been handled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flow {
    /// The REC goes on.
    Resume,
    /// Back to the host; the exit record is filled.
    Leave,
}

/// A REC that is being run by one CPU.
pub(crate) struct Run<'r> {
    pub(crate) cpu: usize,
    pub(crate) rec: Rec<'r>,
    pub(crate) ctx: RecContext<'r>,
    /// Address of the RD granule.
    pub(crate) rd: u64,
    pub(crate) realm: Realm<'r>,
    pub(crate) stage2: Stage2,
    pub(crate) exit: RecExit,
}

impl Run<'_> {
    /// Ends the run with the given reason.
    pub(crate) fn leave(&mut self, reason: ExitReason) -> Flow {
        self.exit.exit_reason = reason as u8;
        Flow::Leave
    }

    /// Sets X0–X3, the results of a call.
    pub(crate) fn set_results(&self, results: [u64; 4]) {
        for (n, value) in results.into_iter().enumerate() {
            self.ctx.set_gpr(n, value);
        }
    }
}

/// The copied-in half of the run page, as far as it has fields.
struct Enter {
    flags: u64,
    gprs: [u64; 31],
    gic: GicEnter,
}

const GPRS_AT: usize = offset_of!(RecRun, enter.gprs) / 8;
const HCR_AT: usize = offset_of!(RecRun, enter.gicv3_hcr) / 8;
const LRS_AT: usize = offset_of!(RecRun, enter.gicv3_lrs) / 8;
/// Words from the GPRs to the end of the list registers.
const ENTER_WORDS: usize = LRS_AT + MAX_LRS - GPRS_AT;

impl<P: Platform> Rmm<'_, P> {
    /// RMI_REC_ENTER.
    // Not inlined: its buffers must not be part of every other command's stack frame.
    #[inline(never)]
    pub(crate) fn rec_enter(&self, cpu: usize, rec_pa: u64, run_ptr: u64) -> Answer {
        let enter = self.read_enter(run_ptr)?;
        let granule = self.granules.lock_named(rec_pa, State::Rec)?;
        let rec = self.rec(rec_pa);
        let rd = rec.owner();
        let realm = self.realm(rd);
        match realm.state() {
            RealmState::New => return Err(Status::ErrorRealm(0).into()),
            RealmState::SystemOff => return Err(Status::ErrorRealm(1).into()),
            RealmState::Active => {}
        }
        if granule.count() != 0 || !rec.runnable() || rec.psci_pending() != 0 {
            return Err(Status::ErrorRec.into());
        }
        let inject_sea = enter.flags & enter_flags::INJECT_SEA != 0;
        let emulated = enter.flags & enter_flags::EMUL_MMIO != 0 && !inject_sea;
        if !gic::is_valid(&self.config, &enter.gic) || (emulated && rec.last_abort() != LastAbort::Emulatable)
        {
            return Err(Status::ErrorRec.into());
        }
        // The REC is RUNNING while its count is one.
        granule.get(1);
        drop(granule);

        let mut run = Run {
            cpu,
            rec,
            ctx: self.context(rec),
            rd,
            realm,
            stage2: realm.stage2(),
            exit: RecExit::new_zeroed(),
        };
        self.enter_and_run(&mut run, &enter, inject_sea, emulated);
        gic::report(&self.config, &run.ctx, &mut run.exit);
        rec.set_timers_reported(timer::report(&run.ctx, &mut run.exit));
        run.exit.pmu_ovf_status = u8::from(pmu::is_overflow_pending(&run.ctx));
        self.granules.put(rec_pa);

        let words = <[u64]>::ref_from_bytes(run.exit.as_bytes()).map_err(|_| Status::ErrorInput)?;
        // A granule's address.
        let exit_at = run_ptr | offset_of!(RecRun, exit) as u64;
        self.platform.ns_write(exit_at, words).map_err(|_| Status::ErrorInput)?;
        Ok(NONE)
    }

    /// Copies `enter` from the run page.
    fn read_enter(&self, run_ptr: u64) -> Result<Enter, Status> {
        if !self.granules.is_undelegated(run_ptr) {
            return Err(Status::ErrorInput);
        }
        let mut flags = [0u64; 1];
        let mut words = [0u64; ENTER_WORDS];
        let read = |at: usize, to: &mut [u64]| {
            self.platform.ns_read(run_ptr | (8 * at as u64), to).map_err(|_| Status::ErrorInput)
        };
        read(offset_of!(RecRun, enter.flags) / 8, &mut flags)?;
        read(GPRS_AT, &mut words)?;
        let mut enter = Enter { flags: flags[0], gprs: [0; 31], gic: GicEnter::default() };
        enter.gprs.copy_from_slice(&words[..31]);
        enter.gic.hcr = words[HCR_AT - GPRS_AT];
        enter.gic.lrs.copy_from_slice(&words[LRS_AT - GPRS_AT..]);
        Ok(enter)
    }

    /// Everything between the checks and the report.
    fn enter_and_run(&self, run: &mut Run<'_>, enter: &Enter, inject_sea: bool, emulated: bool) {
        let ctx = run.ctx;
        let rec = run.rec;
        gic::load(&self.config, &ctx, &enter.gic);
        let last_abort = rec.last_abort();
        let (abort_esr, abort_far) = rec.abort_syndrome();
        rec.set_last_abort(LastAbort::None, 0, 0);
        if emulated {
            abort::complete_emulation(&ctx, abort_esr, enter.gprs[0]);
        }
        if rec.ripas_pending() {
            complete_ripas_change(run, enter.flags & enter_flags::RIPAS_RESPONSE_REJECT != 0);
        }
        let answered = rec.host_call().map(|ipa| self.complete_host_call(run, ipa, &enter.gprs));
        if answered == Some(Flow::Leave) {
            return;
        }

        let mut hcr = reset::HCR_EL2;
        if enter.flags & enter_flags::TRAP_WFI != 0 {
            hcr |= reset::HCR_TWI;
        }
        if enter.flags & enter_flags::TRAP_WFE != 0 {
            hcr |= reset::HCR_TWE;
        }
        if let Some(esr) = rec.take_vserror() {
            hcr |= reset::HCR_VSE;
            ctx.set(word::VSESR_EL2, esr);
        }
        ctx.set(word::HCR_EL2, hcr);
        let debugging = ctx.get(word::MDSCR_EL1) & MDSCR_MDE != 0;
        let counting = ctx.get(word::PMCR) & pmu::PMCR_E != 0;
        let debug_trap = if debugging { 0 } else { reset::MDCR_TDA };
        let pmu_trap = if counting { 0 } else { reset::MDCR_TPM };
        let counters = run.realm.pmu_counters().unwrap_or(self.config.host_counters);
        ctx.set(word::MDCR_EL2, reset::mdcr(debug_trap | pmu_trap, counters));

        self.platform.rec_load(run.cpu, &ctx);
        if debugging {
            self.platform.debug_load(run.cpu, &ctx);
        }
        if counting {
            self.platform.pmu_load(run.cpu, &ctx);
        }
        if inject_sea && last_abort != LastAbort::None {
            inject::external_abort(&self.platform, run.cpu, &ctx, abort_esr, abort_far);
        }
        while self.run_once(run) == Flow::Resume {}
        self.platform.rec_save(run.cpu, &ctx);
        if ctx.get(word::HCR_EL2) & reset::HCR_VSE != 0 {
            // The Realm had SErrors masked all the time.
            rec.set_vserror(Some(ctx.get(word::VSESR_EL2)));
        }
    }

    /// One stretch of Realm execution.
    fn run_once(&self, run: &mut Run<'_>) -> Flow {
        let outputs = timer::outputs(self.platform.timers(run.cpu, &run.ctx));
        if outputs != run.rec.timers_reported() {
            return run.leave(ExitReason::Irq);
        }
        run.ctx.set(word::CNTHCTL_EL2, timer::cnthctl(outputs));
        match self.platform.rec_run(run.cpu, &run.ctx) {
            RealmExit::Irq => run.leave(ExitReason::Irq),
            RealmExit::Fiq => run.leave(ExitReason::Fiq),
            RealmExit::SError { esr } => abort::serror(run, esr),
            RealmExit::Sync { esr, far, hpfar } => self.handle_sync(run, esr, far, hpfar),
        }
    }

    /// A synchronous exception from the REC.
    fn handle_sync(&self, run: &mut Run<'_>, esr: u64, far: u64, hpfar: u64) -> Flow {
        match field(esr, 26, 6) {
            ec::WFX => wait(run, esr),
            ec::HVC => {
                // The preferred return address is behind the HVC; it is the HVC that is undefined.
                run.ctx.set(word::PC, run.ctx.pc().wrapping_sub(4));
                self.undefined(run)
            }
            ec::SMC => self.realm_call(run),
            ec::SYSREG => self.system_register(run, esr),
            ec::INSTRUCTION_ABORT | ec::DATA_ABORT => self.stage2_abort(run, esr, far, hpfar),
            _ => self.undefined(run),
        }
    }

    /// Makes the REC take an Unknown exception at its PC.
    pub(crate) fn undefined(&self, run: &Run<'_>) -> Flow {
        inject::undefined(&self.platform, run.cpu, &run.ctx);
        Flow::Resume
    }

    /// Writes the host's answer into the Realm's RsiHostCall.
    fn complete_host_call(&self, run: &mut Run<'_>, ipa: u64, gprs: &[u64; 31]) -> Flow {
        let written = self.with_realm_page(&run.stage2, ipa, |page, at| {
            let first = at.wrapping_add(offset_of!(rsi::HostCall, gprs) / 8);
            for (slot, &value) in page.iter().skip(first).zip(gprs) {
                slot.store(value, core::sync::atomic::Ordering::Relaxed);
            }
        });
        match written {
            Err(Absent::Fault(level)) => {
                abort::report_absent(run, ipa, level);
                Flow::Leave
            }
            // A page that the Realm itself gave up in between takes no result.
            Ok(()) | Err(Absent::Empty) => {
                run.rec.set_host_call(None);
                run.ctx.set_gpr(0, rsi::Status::Success as u64);
                Flow::Resume
            }
        }
    }
}

/// MDSCR_EL1.MDE: the Realm's breakpoints and watchpoints are live.
const MDSCR_MDE: u64 = 1 << 15;

/// Exception classes (ESR_EL2.EC).
mod ec {
    pub(super) const WFX: u64 = 0x01;
    pub(super) const HVC: u64 = 0x16;
    pub(super) const SMC: u64 = 0x17;
    pub(super) const SYSREG: u64 = 0x18;
    pub(super) const INSTRUCTION_ABORT: u64 = 0x20;
    pub(super) const DATA_ABORT: u64 = 0x24;
}

/// The Realm's answer to RSI_IPA_STATE_SET.
fn complete_ripas_change(run: &Run<'_>, rejected: bool) {
    let request = run.rec.ripas_request();
    run.rec.set_ripas_request(None);
    let reject = rejected && request.value == Ripas::Ram && request.base != request.top;
    let response = if reject { rsi::REJECT } else { rsi::ACCEPT };
    run.set_results([rsi::Status::Success as u64, request.base, response, 0]);
}

/// A trapped WFI, WFE, WFIT or WFET.
fn wait(run: &mut Run<'_>, esr: u64) -> Flow {
    const TI: u64 = 3;
    const WITH_TIMEOUT: u64 = 2;
    const IL: u64 = 1 << 25;
    // In T32 at EL0 the instruction may have half the length.
    let length = if esr & IL != 0 { 4 } else { 2 };
    run.ctx.set(word::PC, run.ctx.pc().wrapping_add(length));
    run.exit.esr = esr & (0x3F << 26 | TI);
    if esr & WITH_TIMEOUT != 0 {
        // Five bits.
        run.exit.gprs[0] = run.ctx.gpr(field(esr, 5, 5) as usize);
    }
    run.leave(ExitReason::Sync)
}
