//! The predicted measurement against values that Python's hashlib gives for the same history.

use attest::measure::Rim;
use attest::text::hex;
use cca_abi::rmi::RealmParams;
use zerocopy::FromZeros as _;

fn history(algorithm: u8) -> Rim {
    let mut params = RealmParams::new_zeroed();
    params.s2sz = 34;
    params.num_bps = 5;
    params.num_wps = 3;
    params.hash_algo = algorithm;
    // None of these is measured.
    params.rpv = [7; 64];
    params.vmid = 9;
    params.rtt_base = 0x8800_0000;
    let mut rim = Rim::create(&params).unwrap();
    // A block of 1 GiB, one of 2 MiB, and a page.
    rim.init_ripas(0x8000_0000, 0xC020_1000, 1).unwrap();
    let page: Vec<u8> = (0..4096u32).map(|n| u8::try_from(n * 7 % 251).unwrap()).collect();
    let digest = rim.page_digest(&page.try_into().unwrap());
    rim.data(0x8020_0000, Some(&digest));
    rim.data(0x8020_1000, None);
    rim.rec(0x8020_0000, &[0x8FE0_0000, 0, 0, 0, 0, 0, 0, 7]);
    rim
}

#[test]
fn the_documented_history_has_the_documented_measurement() {
    assert_eq!(hex(history(0).value()), "d8d1a6b07078be9a710f0ce5a7be23f8ea857a4bbb10343fe6b4b59647d19a04");
    assert_eq!(
        hex(history(1).value()),
        "1f869551f43115d989f1d2a55f9d050421316940b9013ea7bebf580e9e75926f\
         6d39d7bcb6d7e2ad73849e74fe3147c4553c4a60ef59e7552b7a661d2082fe7c"
    );
}

#[test]
fn what_is_no_history_is_refused() {
    let mut params = RealmParams::new_zeroed();
    params.hash_algo = 2;
    assert!(Rim::create(&params).is_none());
    let mut rim = history(0);
    let before = rim.clone();
    for (base, top, level) in [(1, 0x1000, 1), (0, 0x1001, 1), (0x2000, 0x1000, 1), (0, 0x1000, 4)] {
        assert!(rim.init_ripas(base, top, level).is_none());
    }
    assert!(rim.init_ripas(0x1000, 0x1000, i64::MIN).is_some());
    assert_eq!(rim, before);
}
