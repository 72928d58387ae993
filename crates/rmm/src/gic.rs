//! The host's view of the virtual GIC: what it may put into list registers, and what it gets back.

use cca_abi::rmi::{GICV3_HCR_ENTER_MASK, GICV3_HCR_EXIT_MASK, MAX_LRS, RecExit};

use crate::config::{Config, field};
use crate::context::{RecContext, word};

const ICH_HCR_EN: u64 = 1;
const LR_HW: u64 = 1 << 61;
/// pINTID's end-of-interrupt request, the only bit of that field with a meaning when HW is 0.
const LR_EOI: u64 = 1 << 41;
/// pINTID and the reserved bits around it; the reserved bits (and NMI) above the priority.
const LR_MUST_BE_ZERO: u64 = 0x0F00_FFFF_0000_0000 & !LR_EOI;

/// The list registers in the context.
const LR_WORDS: core::ops::Range<usize> = word::ICH_LR..word::ICH_LR + MAX_LRS;

/// What REC_ENTER passes for the GIC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct GicEnter {
    pub(crate) hcr: u64,
    pub(crate) lrs: [u64; MAX_LRS],
}

/// Whether the hardware may be given these values (rec_gicv3).
pub(crate) fn is_valid(config: &Config, enter: &GicEnter) -> bool {
    if enter.hcr & !GICV3_HCR_ENTER_MASK != 0 {
        return false;
    }
    let mut before = &[][..];
    enter.lrs.iter().take(config.num_lrs).zip(0..MAX_LRS).all(|(&lr, n)| {
        let earlier = core::mem::replace(&mut before, enter.lrs.get(..=n).unwrap_or_default());
        if lr & LR_HW != 0 {
            return false;
        }
        if !is_in_use(lr) {
            return true;
        }
        let priority = field(lr, 48, 8);
        let vintid = field(lr, 0, 32);
        let known = vintid < 1020 || (8192..1u64.wrapping_shl(config.intid_bits)).contains(&vintid);
        let unique = !earlier.iter().any(|&other| is_in_use(other) && field(other, 0, 32) == vintid);
        known && unique && priority & config.lr_priority_res0 == 0 && lr & LR_MUST_BE_ZERO == 0
    })
}

fn is_in_use(lr: u64) -> bool {
    lr >> 62 != 0
}

/// Hands checked values to the REC.
pub(crate) fn load(config: &Config, ctx: &RecContext<'_>, enter: &GicEnter) {
    ctx.set(word::ICH_HCR, enter.hcr | ICH_HCR_EN);
    for (&lr, at) in enter.lrs.iter().take(config.num_lrs).zip(LR_WORDS) {
        ctx.set(at, lr);
    }
}

/// Reports the GIC's state to the host.
pub(crate) fn report(config: &Config, ctx: &RecContext<'_>, exit: &mut RecExit) {
    exit.gicv3_hcr = ctx.get(word::ICH_HCR) & GICV3_HCR_EXIT_MASK;
    exit.gicv3_misr = ctx.get(word::ICH_MISR);
    exit.gicv3_vmcr = ctx.get(word::ICH_VMCR);
    for (lr, at) in exit.gicv3_lrs.iter_mut().take(config.num_lrs).zip(LR_WORDS) {
        *lr = ctx.get(at);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_platform::test_config;

    const PENDING: u64 = 1 << 62;
    const GROUP1: u64 = 1 << 60;

    fn with(lr0: u64, lr1: u64) -> GicEnter {
        let mut enter = GicEnter::default();
        enter.lrs[0] = lr0;
        enter.lrs[1] = lr1;
        enter
    }

    #[test]
    fn only_the_hosts_control_bits_are_taken() {
        let config = test_config();
        for bit in 0..64 {
            let allowed = 0x40FEu64 >> bit & 1 == 1;
            let enter = GicEnter { hcr: 1 << bit, ..GicEnter::default() };
            assert_eq!(is_valid(&config, &enter), allowed, "bit {bit}");
        }
    }

    #[test]
    fn list_registers_are_checked() {
        let config = test_config();
        assert!(is_valid(&config, &with(PENDING | GROUP1 | 27 | 0xA0 << 48, 0)));
        assert!(is_valid(&config, &with(PENDING | 27 | LR_EOI, 3 << 62 | 28)));
        assert!(is_valid(&config, &with(PENDING | 8192, PENDING | 1019)));
        assert!(!is_valid(&config, &with(PENDING | 27 | LR_HW, 0)), "hardware interrupts are not the host's");
        assert!(!is_valid(&config, &with(LR_HW, 0)), "not even in an unused register");
        assert!(!is_valid(&config, &with(PENDING | 27, PENDING | 27)), "the same interrupt twice");
        assert!(is_valid(&config, &with(PENDING | 27, 27)), "an unused register does not count");
        assert!(!is_valid(&config, &with(PENDING | 1020, 0)), "special INTID");
        assert!(!is_valid(&config, &with(PENDING | 5000, 0)), "extended INTID");
        assert!(!is_valid(&config, &with(PENDING | 27 | 1 << 40, 0)), "pINTID without HW");
        assert!(!is_valid(&config, &with(PENDING | 27 | 1 << 48, 0)), "unimplemented priority bit");
    }

    #[test]
    fn registers_beyond_the_implemented_ones_are_ignored() {
        let config = test_config();
        let mut enter = GicEnter::default();
        enter.lrs[config.num_lrs] = LR_HW;
        assert!(is_valid(&config, &enter));
    }
}
