//! PSCI for Realms, and RMI_PSCI_COMPLETE.

use cca_abi::psci::{AFFINITY_OFF, AFFINITY_ON, Code, VERSION_1_1, fid};
use cca_abi::rmi::{ExitReason, Status};
use cca_abi::smccc;

use crate::Rmm;
use crate::answer::{Answer, NONE};
use crate::aux;
use crate::context::word;
use crate::granule::State;
use crate::platform::Platform;
use crate::realm::RealmState;
use crate::rec::{Rec, affinity, psci_target_index};
use crate::reset;
use crate::run::{Flow, Run};

/// Whether `fid` belongs to PSCI (both widths).
pub(crate) fn is_psci(fid: u64) -> bool {
    matches!(fid & !SMC64, 0x8400_0000..=0x8400_001F)
}

/// Bit 30 of an identifier: 64-bit arguments.
const SMC64: u64 = 1 << 30;

/// An argument of the call `fid`, cut to its width.
fn argument(fid: u64, register: u64) -> u64 {
    if fid & SMC64 != 0 { register } else { register & 0xFFFF_FFFF }
}

impl<P: Platform> Rmm<'_, P> {
    /// A PSCI call by the running REC. The PC is past the SMC.
    pub(crate) fn psci(&self, run: &mut Run<'_>, fid: u64) -> Flow {
        let [x1, x2] = [1, 2].map(|n| argument(fid, run.ctx.gpr(n)));
        match fid {
            fid::VERSION => done(run, VERSION_1_1),
            fid::FEATURES => done(run, features(x1)),
            fid::CPU_SUSPEND_32 | fid::CPU_SUSPEND_64 => {
                // A standby request: the REC goes on behind the call when the host enters it again.
                done(run, Code::Success.to_register());
                forward(run, fid, 0)
            }
            fid::CPU_OFF => {
                run.rec.set_runnable(false);
                forward(run, fid, 0)
            }
            fid::CPU_ON_32 | fid::CPU_ON_64 => match check_cpu_on(run, x1, x2) {
                Err(code) => done(run, code.to_register()),
                Ok(()) => forward_pending(run, fid, x1),
            },
            fid::AFFINITY_INFO_32 | fid::AFFINITY_INFO_64 => {
                if x2 != 0 || !is_rec(run, x1) {
                    done(run, Code::InvalidParameters.to_register())
                } else if affinity(run.rec.mpidr()) == x1 {
                    done(run, AFFINITY_ON as u64)
                } else {
                    forward_pending(run, fid, x1)
                }
            }
            fid::SYSTEM_OFF | fid::SYSTEM_RESET => {
                run.realm.set_state(RealmState::SystemOff);
                forward(run, fid, 0)
            }
            _ => done(run, Code::NotSupported.to_register()),
        }
    }

    /// RMI_PSCI_COMPLETE.
    pub(crate) fn psci_complete(&self, calling: u64, target: u64, status: u64) -> Answer {
        // The same REC twice is refused here, too.
        let (calling, target) = self.granules.lock_both((calling, State::Rec), (target, State::Rec))?;
        let caller = self.rec(calling.pa());
        let target_rec = self.rec(target.pa());
        let fid = caller.psci_pending();
        if fid == 0 || calling.count() != 0 || caller.owner() != target_rec.owner() {
            return Err(Status::ErrorInput.into());
        }
        let ctx = self.context(caller);
        let [x1, x2, x3] = [1, 2, 3].map(|n| argument(fid, ctx.gpr(n)));
        if affinity(target_rec.mpidr()) != x1 {
            return Err(Status::ErrorInput.into());
        }
        // A target that runs at this moment is on, whatever it may be about to do.
        let on = target.count() != 0 || target_rec.runnable();
        let is_cpu_on = matches!(fid, fid::CPU_ON_32 | fid::CPU_ON_64);
        let result = if status == Code::Success.to_register() {
            match (is_cpu_on, on) {
                (true, true) => Code::AlreadyOn.to_register(),
                (true, false) => {
                    self.start(target_rec, ctx.get(word::SCTLR_EL1), x2, x3);
                    target_rec.set_runnable(true);
                    Code::Success.to_register()
                }
                (false, true) => AFFINITY_ON as u64,
                (false, false) => AFFINITY_OFF as u64,
            }
        } else if status == Code::Denied.to_register() && is_cpu_on && !on {
            Code::Denied.to_register()
        } else {
            return Err(Status::ErrorInput.into());
        };
        ctx.set_gpr(0, result);
        for n in 1..=3 {
            ctx.set_gpr(n, 0);
        }
        caller.set_psci_pending(0);
        Ok(NONE)
    }

    /// Puts a REC that is off into the state in which CPU_ON starts it: nothing of an earlier life is left.
    fn start(&self, rec: Rec<'_>, caller_sctlr: u64, entry: u64, context_id: u64) {
        self.platform.zero(rec.aux(aux::CONTEXT));
        rec.set_vserror(None);
        let ctx = self.context(rec);
        reset::context(&ctx, self.realm(rec.owner()), rec);
        ctx.set_gpr(0, context_id);
        ctx.set(word::PC, entry);
        ctx.set(word::SCTLR_EL1, reset::SCTLR_EL1 | caller_sctlr & reset::SCTLR_EE);
    }
}

/// Returns to the REC with a result.
fn done(run: &Run<'_>, x0: u64) -> Flow {
    run.set_results([x0, 0, 0, 0]);
    Flow::Resume
}

/// Tells the host of a call; only its identifier and, where it has one, its target are exposed.
fn forward(run: &mut Run<'_>, fid: u64, target: u64) -> Flow {
    run.exit.gprs[0] = fid;
    run.exit.gprs[1] = target;
    run.leave(ExitReason::Psci)
}

/// As [`forward`], for a call that RMI_PSCI_COMPLETE must complete; X1–X3 stay as they are until then.
fn forward_pending(run: &mut Run<'_>, fid: u64, target: u64) -> Flow {
    run.rec.set_psci_pending(fid);
    forward(run, fid, target)
}

/// Whether `target` names a REC that was created in this Realm.
fn is_rec(run: &Run<'_>, target: u64) -> bool {
    psci_target_index(target).is_some_and(|index| index < run.realm.rec_index())
}

fn check_cpu_on(run: &Run<'_>, target: u64, entry: u64) -> Result<(), Code> {
    if !run.stage2.is_protected(entry) {
        return Err(Code::InvalidAddress);
    }
    if !is_rec(run, target) {
        return Err(Code::InvalidParameters);
    }
    if affinity(run.rec.mpidr()) == target {
        return Err(Code::AlreadyOn);
    }
    Ok(())
}

/// PSCI_FEATURES.
fn features(function: u64) -> u64 {
    match function & 0xFFFF_FFFF {
        fid::VERSION
        | fid::FEATURES
        | fid::CPU_SUSPEND_32
        | fid::CPU_SUSPEND_64
        | fid::CPU_OFF
        | fid::CPU_ON_32
        | fid::CPU_ON_64
        | fid::AFFINITY_INFO_32
        | fid::AFFINITY_INFO_64
        | fid::SYSTEM_OFF
        | fid::SYSTEM_RESET
        | smccc::VERSION => Code::Success.to_register(),
        _ => Code::NotSupported.to_register(),
    }
}
