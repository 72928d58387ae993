//! The EL1 timers of a running REC.
//!
//! The physical interrupt of a timer that the host already knows to be asserted is masked while the REC runs, else
//! the REC would never run; any other timer's interrupt ends the run, and so the host learns of it.

use cca_abi::rmi::RecExit;

use crate::context::{RecContext, word};
use crate::platform::LiveTimers;
use crate::reset;

const CTL_ENABLE: u64 = 1 << 0;
const CTL_IMASK: u64 = 1 << 1;
const CTL_ISTATUS: u64 = 1 << 2;

const VIRTUAL: u64 = 1 << 0;
const PHYSICAL: u64 = 1 << 1;

fn is_asserted(ctl: u64) -> bool {
    ctl & (CTL_ENABLE | CTL_IMASK | CTL_ISTATUS) == CTL_ENABLE | CTL_ISTATUS
}

/// The outputs as a set: bit 0 virtual, bit 1 physical.
pub(crate) fn outputs(timers: LiveTimers) -> u64 {
    let virt = if is_asserted(timers.cntv_ctl) { VIRTUAL } else { 0 };
    let phys = if is_asserted(timers.cntp_ctl) { PHYSICAL } else { 0 };
    virt | phys
}

/// `CNTHCTL_EL2` that masks the timers in `outputs`.
pub(crate) fn cnthctl(outputs: u64) -> u64 {
    let virt = if outputs & VIRTUAL != 0 { reset::CNTVMASK } else { 0 };
    let phys = if outputs & PHYSICAL != 0 { reset::CNTPMASK } else { 0 };
    reset::CNTHCTL_EL2 | virt | phys
}

/// Reports the saved timers to the host, and returns their outputs.
pub(crate) fn report(ctx: &RecContext<'_>, exit: &mut RecExit) -> u64 {
    exit.cntv_ctl = ctx.get(word::CNTV_CTL);
    exit.cntv_cval = ctx.get(word::CNTV_CVAL);
    exit.cntp_ctl = ctx.get(word::CNTP_CTL);
    exit.cntp_cval = ctx.get(word::CNTP_CVAL);
    outputs(LiveTimers { cntv_ctl: exit.cntv_ctl, cntp_ctl: exit.cntp_ctl })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_enabled_unmasked_expired_timer_is_asserted() {
        assert!(is_asserted(0b101));
        assert!(!is_asserted(0b111));
        assert!(!is_asserted(0b001));
        assert!(!is_asserted(0b100));
        assert_eq!(outputs(LiveTimers { cntv_ctl: 5, cntp_ctl: 1 }), VIRTUAL);
        assert_eq!(cnthctl(VIRTUAL | PHYSICAL), 0xC_0C00);
        assert_eq!(cnthctl(0), 0xC00);
    }
}
