//! RSI, command by command, in the same tables as RMI ([`super::commands`]). The calls are made by REC 0; what they
//! change outside their footprint is the REC's registers and the run page.

use cca_abi::rsi::fid;
use std::vec;
use std::vec::Vec;

use super::host::{SHARED, WIDTH};
use super::std;
use super::table::{Command, World, check, fails};
use core::sync::atomic::Ordering::Relaxed;

/// RSI statuses.
const INPUT: u64 = 1;
const STATE: u64 = 2;
/// What stands for X0 if the call ended in an exit to the host: 0x100 and the exit reason.
const EXIT_SYNC: u64 = 0x100;
/// The page at 0x5000, which is RAM.
const PAGE: u64 = 0x5000;

fn nothing(_: &World) -> Vec<u64> {
    vec![]
}

fn no_effect(_: &World) {}

const VERSION: Command = Command {
    name: "RSI_VERSION",
    fid: fid::VERSION,
    ready: |w| {
        w.activate();
        w.args[0] = 0x10000;
    },
    outputs: |_| vec![0x10000, 0x10000, 0],
    footprint: nothing,
    effects: no_effect,
    failures: &[
        fails("another minor", |w| w.args[0] = 0x10001, INPUT),
        fails("another major", |w| w.args[0] = 0x20000, INPUT),
        fails("a reserved bit", |w| w.args[0] |= 1 << 63, INPUT),
    ],
    order: &[],
};

const FEATURES: Command = Command {
    name: "RSI_FEATURES",
    fid: fid::FEATURES,
    ready: |w| {
        w.activate();
        w.args[..3].copy_from_slice(&[u64::MAX, 5, 6]);
    },
    outputs: |_| vec![0, 0, 0],
    footprint: nothing,
    effects: no_effect,
    failures: &[],
    order: &[],
};

const MEASUREMENT_READ: Command = Command {
    name: "RSI_MEASUREMENT_READ",
    fid: fid::MEASUREMENT_READ,
    ready: |w| {
        w.activate();
        w.args = [9; 10];
        w.args[0] = 0;
    },
    outputs: |w| w.measurement(0),
    footprint: nothing,
    effects: no_effect,
    failures: &[
        fails("index_bound", |w| w.args[0] = 5, INPUT),
        fails("index_bound: huge", |w| w.args[0] = u64::MAX, INPUT),
    ],
    order: &[],
};

const MEASUREMENT_EXTEND: Command = Command {
    name: "RSI_MEASUREMENT_EXTEND",
    fid: fid::MEASUREMENT_EXTEND,
    ready: |w| {
        w.activate();
        w.args = [1; 10];
        w.args[..2].copy_from_slice(&[4, 64]);
    },
    outputs: |_| vec![0, 0, 0],
    footprint: |w| vec![w.realm.rd],
    effects: |w| {
        assert_ne!(w.measurement(4), [0; 8]);
        assert!((1..4).all(|n| w.measurement(n) == [0; 8]), "the other registers are as they were");
    },
    failures: &[
        fails("index_bound: the RIM", |w| w.args[0] = 0, INPUT),
        fails("index_bound", |w| w.args[0] = 5, INPUT),
        fails("size_bound", |w| w.args[1] = 65, INPUT),
        fails("size_bound: huge", |w| w.args[1] = u64::MAX, INPUT),
    ],
    order: &[],
};

/// There is no success without a token ([`super::attested`] has them), so the conditions are tried against STATE.
#[test]
fn token_continue() {
    let conditions: [(&str, [u64; 3], u64); 8] = [
        ("state", [PAGE, 0, 0x1000], STATE),
        ("addr_align", [PAGE + 8, 0, 0x1000], INPUT),
        ("addr_bound", [SHARED, 0, 0x1000], INPUT),
        ("addr_bound: outside", [SHARED * 2, 0, 0x1000], INPUT),
        ("offset_bound", [PAGE, 0x1000, 0], INPUT),
        ("size_overflow", [PAGE, 8, u64::MAX], INPUT),
        ("size_bound", [PAGE, 8, 0x1000], INPUT),
        ("size_bound: one word", [PAGE, 0xFF8, 16], INPUT),
    ];
    for (label, args, expected) in conditions {
        let mut world = World::new();
        world.activate();
        world.args[..3].copy_from_slice(&args);
        let before = world.picture();
        let (status, outputs) = world.call_rsi(fid::ATTESTATION_TOKEN_CONTINUE);
        assert_eq!((status, &outputs[..3]), (expected, &[0; 3][..]), "{label}");
        assert!(before.difference(&world.picture(), &world.rec_granules()).is_empty(), "{label}");
    }
}

const REALM_CONFIG: Command = Command {
    name: "RSI_REALM_CONFIG",
    fid: fid::REALM_CONFIG,
    ready: |w| {
        w.activate();
        w.args[..4].copy_from_slice(&[PAGE, 7, 7, 7]);
    },
    outputs: |_| vec![0, 0, 0],
    footprint: |w| vec![w.data[2]],
    effects: |w| {
        let page = w.host.rmm.platform().raw(w.data[2]);
        for (n, word) in page.iter().enumerate() {
            let expected = match n {
                0 => WIDTH,
                // rpv
                0x40 => 0x1122,
                _ => 0,
            };
            assert_eq!(word.load(Relaxed), expected, "word {n:#x}");
        }
    },
    failures: &[
        fails("addr_align", |w| w.args[0] |= 8, INPUT),
        fails("addr_bound", |w| w.args[0] |= SHARED, INPUT),
        fails("EMPTY", |w| w.args[0] = 0, INPUT),
        fails("ASSIGNED, EMPTY", |w| w.args[0] = 0x4000, INPUT),
        fails("RAM without a page: the host's", |w| w.args[0] = 0x1000, EXIT_SYNC),
        fails("DESTROYED: the host's", |w| w.args[0] = 0x3000, EXIT_SYNC),
    ],
    order: &[],
};

const IPA_STATE_GET: Command = Command {
    name: "RSI_IPA_STATE_GET",
    fid: fid::IPA_STATE_GET,
    ready: |w| {
        w.activate();
        w.args[..3].copy_from_slice(&[0x1000, 0x8000, 7]);
    },
    // RAM, with and without a page, up to what was destroyed.
    outputs: |_| vec![0x3000, 1, 0],
    footprint: nothing,
    effects: no_effect,
    failures: &[
        fails("base_align", |w| w.args[0] |= 8, INPUT),
        fails("end_align", |w| w.args[1] |= 8, INPUT),
        fails("size_valid", |w| w.args[1] = w.args[0] & !0xFFF, INPUT),
        fails("size_valid: negative", |w| w.args[1] = 0, INPUT),
        fails("rgn_bound", |w| w.args[1] = SHARED + 0x1000, INPUT),
        fails("rgn_bound: base", |w| w.args[..2].copy_from_slice(&[SHARED, SHARED + 0x1000]), INPUT),
        fails("rgn_bound: outside", |w| w.args[1] = !0xFFF, INPUT),
    ],
    order: &[],
};

const HOST_CALL_EXIT: u64 = 0x105;
const RIPAS_EXIT: u64 = 0x104;

/// RSI_IPA_STATE_SET and RSI_HOST_CALL succeed at the next entry, so their success is an exit here.
#[test]
fn ipa_state_set() {
    let good = [0x1000, 0x5000, 1, 1];
    let conditions: [(&str, [u64; 4], u64); 9] = [
        ("good", good, RIPAS_EXIT),
        ("base_align", [0x1008, 0x5000, 1, 1], INPUT),
        ("top_align", [0x1000, 0x5008, 1, 1], INPUT),
        ("size_valid", [0x1000, 0x1000, 1, 1], INPUT),
        ("size_valid: negative", [0x5000, 0x1000, 1, 1], INPUT),
        ("rgn_bound", [0x1000, SHARED + 0x1000, 1, 1], INPUT),
        ("rgn_bound: base", [SHARED, SHARED + 0x1000, 1, 1], INPUT),
        ("ripas_valid: DESTROYED", [0x1000, 0x5000, 2, 1], INPUT),
        ("ripas_valid: DEV", [0x1000, 0x5000, 3, 1], INPUT),
    ];
    for (label, args, expected) in conditions {
        let mut world = World::new();
        world.activate();
        world.args[..4].copy_from_slice(&args);
        let before = world.picture();
        let (status, _) = world.call_rsi(fid::IPA_STATE_SET);
        assert_eq!(status, expected, "{label}");
        assert!(before.difference(&world.picture(), &world.rec_granules()).is_empty(), "{label}");
    }
}

#[test]
fn host_call() {
    let conditions: [(&str, u64, u64); 7] = [
        ("good", PAGE + 0x100, HOST_CALL_EXIT),
        ("addr_align", PAGE + 0x80, INPUT),
        ("addr_bound", SHARED + PAGE, INPUT),
        ("addr_bound: outside", SHARED * 2, INPUT),
        ("EMPTY", 0, INPUT),
        ("RAM without a page", 0x1000, EXIT_SYNC),
        ("DESTROYED", 0x3000, EXIT_SYNC),
    ];
    for (label, addr, expected) in conditions {
        let mut world = World::new();
        world.activate();
        world.args[0] = addr;
        let before = world.picture();
        let (status, _) = world.call_rsi(fid::HOST_CALL);
        assert_eq!(status, expected, "{label}");
        assert!(before.difference(&world.picture(), &world.rec_granules()).is_empty(), "{label}");
    }
}

/// Calls that do not exist come back with −1 and change nothing; those of RMI are no calls for a Realm.
#[test]
fn unknown_calls() {
    for id in [0xC400_019A, 0xC400_01AF, 0xC400_0150, 0xC400_018F, 0xC400_01B0, 0x8400_0020, 0xC600_0000, 0] {
        let mut world = World::new();
        world.activate();
        world.args[..3].copy_from_slice(&[7, 8, 9]);
        let before = world.picture();
        let (status, _) = world.call_rsi(id);
        assert_eq!(status, u64::MAX, "{id:#x}");
        assert!(before.difference(&world.picture(), &world.rec_granules()).is_empty(), "{id:#x}");
    }
}

impl World {
    fn measurement(&self, index: usize) -> Vec<u64> {
        self.host.rmm.realm(self.realm.rd).measurement(index).to_vec()
    }
}

macro_rules! tables {
    ($($test:ident: $command:ident,)*) => {$(
        #[test]
        fn $test() {
            check(&$command);
        }
    )*};
}

tables! {
    version: VERSION,
    features: FEATURES,
    measurement_read: MEASUREMENT_READ,
    measurement_extend: MEASUREMENT_EXTEND,
    realm_config: REALM_CONFIG,
    ipa_state_get: IPA_STATE_GET,
}
