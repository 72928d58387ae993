//! Services of SMCCC beside PSCI and RMI.

use cca_abi::smccc::{self, trng};

use crate::entry::{smc, smc_timed};
use crate::{check, expect, verify};

/// Everything.
pub(crate) fn all() {
    random();
    let has = |function| smc(smccc::ARCH_FEATURES, function, 0, 0)[0];
    expect("arch-features-knows-the-version", has(smccc::VERSION), 0);
    expect("arch-features-knows-soc-id", has(smccc::ARCH_SOC_ID), 0);
    // ARCH_WORKAROUND_1: not needed on this CPU.
    expect("arch-features-refuses-workarounds", has(0x8000_8000), smccc::NOT_SUPPORTED);
    let version = smc(smccc::ARCH_SOC_ID, 0, 0, 0)[0];
    let revision = smc(smccc::ARCH_SOC_ID, 1, 0, 0)[0];
    let known = version >> 31 == 0 && revision >> 31 == 0;
    verify("soc-id", known, format_args!("{version:#x} {revision:#x}"));
    let wrong = smc(smccc::ARCH_SOC_ID, 7, 0, 0)[0];
    expect("soc-id-refuses-other-types", wrong, smccc::INVALID_PARAMETER);
    // SCR_EL3: a host sees that its own features are enabled.
    const SCR_EL3: u64 = 0x1E_1100;
    let [status, mask, ..] = smc(smccc::ARCH_FEATURE_AVAILABILITY, SCR_EL3, 0, 0);
    expect("features-of-scr-are-told", status, 0);
    // HXEn and FGTEn, which every CPU with Realms has.
    let enabled = 1 << 38 | 1 << 27;
    expect("features-of-scr-are-enabled", mask & enabled, enabled);
    let wrong = smc(smccc::ARCH_FEATURE_AVAILABILITY, 0x1234, 0, 0)[0];
    expect("features-of-nothing-are-refused", wrong, smccc::INVALID_PARAMETER);
}

fn random() {
    expect("trng-version", smc(trng::VERSION, 0, 0, 0)[0], trng::VERSION_1_0);
    expect("trng-has-64", smc(trng::FEATURES, trng::RND_64, 0, 0)[0], 0);
    let bits = |wanted| smc_timed(trng::RND_64, [wanted, 0, 0, 0, 0]).x;
    let (one, other) = (bits(192), bits(192));
    let told = one[0] == 0 && other[0] == 0;
    // Two samples of 192 bits are equal once in 2^192.
    verify("trng-gives-192-bits", told && one != other, format_args!("{one:#x?}"));
    let few = bits(5);
    let narrow = few[0] == 0 && few[1] == 0 && few[2] == 0 && few[3] < 32;
    verify("trng-gives-no-more-than-asked", narrow, format_args!("{few:#x?}"));
    for wanted in [0, 193, u64::MAX] {
        let refused = bits(wanted)[0];
        if refused != trng::INVALID_PARAMETERS {
            check("trng-refuses-other-amounts", Err(format_args!("{wanted} bits: {refused:#x}")));
            return;
        }
    }
    check("trng-refuses-other-amounts", Ok(()));
}
