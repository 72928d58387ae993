//! `RSI_HOST_CALL`: the Realm asks the host itself. An SMCCC conversation; the host offers nothing but its version.

use cca_abi::smccc;

/// Answers in place. Registers that are not results keep their values.
pub(crate) fn handle(gprs: &mut [u64; 31]) {
    gprs[0] = match smccc::fid(gprs[0]) {
        smccc::VERSION => smccc::VERSION_1_2,
        smccc::ARCH_FEATURES if smccc::fid(gprs[1]) == smccc::VERSION => 0,
        _ => smccc::NOT_SUPPORTED,
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_host_call_is_answered_not_supported() {
        let mut gprs = [7; 31];
        handle(&mut gprs);
        assert_eq!(gprs[0], u64::MAX);
        assert_eq!(gprs[1..], [7; 30]);
        gprs[0] = smccc::VERSION;
        handle(&mut gprs);
        assert_eq!(gprs[0], smccc::VERSION_1_2);
    }
}
