//! Every call from every world, well formed or not.

use cca_abi::psci::fid;
use cca_abi::{rmm_el3, smccc};
use proptest::prelude::*;
use proptest::test_runner::Config;
use std::vec;
use std::vec::Vec;

use super::machine::{CARVE_OUT, NS_PAGE, RESERVE, SHARED_PAGE};
use super::smc::{FAMILIES, booted, call};
use crate::gpt::Gpi;
use crate::{Action, Interface, World};

/// What a well-formed identifier may lead to.
fn known(interface: Interface, world: World, fid: u64) -> bool {
    let low = fid & 0xFFFF;
    let both = matches!(fid, 0x8000_0000..=0x8000_0002 | 0xC000_0002 | 0xC000_0003);
    let own = match world {
        World::NonSecure => {
            let second = interface.is_2() && matches!(low, 0x1D0..=0x2CF);
            let commands = fid >> 16 == 0xC400 && (matches!(low, 0x150..=0x18E) || second);
            let power32 = [0, 1, 2, 3, 4, 6, 8, 9, 0xA, 0x12];
            let power64 = [1, 3, 4, 0x12];
            let random = [0x50, 0x51, 0x52, 0x53];
            commands
                || fid >> 16 == 0x8400 && (power32.contains(&low) || random.contains(&low))
                || fid >> 16 == 0xC400 && (power64.contains(&low) || low == 0x53)
        }
        // BOOT_COMPLETE is not: the boot is over.
        World::Realm => fid >> 16 == 0xC400 && matches!(low, 0x18F | 0x1B0..=0x1B4 | 0x1BB),
    };
    both || own
}

/// Every identifier of every owner, call type and width, with function numbers around all that mean something.
#[test]
fn an_identifier_does_something_in_its_world_or_nothing_at_all() {
    let functions: Vec<u64> = (0..0x2E0).chain(0x3F0..0x420).chain(0xFF00..=0xFFFF).collect();
    for interface in FAMILIES {
        for world in [World::NonSecure, World::Realm] {
            let (machine, monitor) = booted(2, interface);
            for head in (0..0x100).map(|bits: u64| bits << 24).chain([0x8402_0000, 0xC480_0000, 0xC4FE_0000])
            {
                // Owners other than the architecture and the standard services need no more than a look.
                let step = if matches!(head >> 24 & 0x3F, 0 | 4) { 1 } else { 0x61 };
                for &function in functions.iter().step_by(step) {
                    let fid = head | function;
                    let (action, regs) = call(&monitor, &machine, 0, world, &[fid, 0xF0F0_0001, 0, 9]);
                    let nothing = action == Action::Resume && regs[0] == smccc::NOT_SUPPORTED;
                    // Calls that exist and answer -1 by themselves with these arguments.
                    let answers_so =
                        matches!(fid, smccc::ARCH_FEATURES | fid::FEATURES | smccc::trng::FEATURES);
                    assert_eq!(!nothing, known(interface, world, fid) && !answers_so, "{fid:#x} {world:?}");
                    if nothing {
                        assert_eq!(regs[1..4], [0xF0F0_0001, 0, 9], "{fid:#x} changes registers");
                    }
                }
            }
        }
    }
}

#[test]
fn what_is_above_32_bits_and_the_sve_hint_do_not_matter() {
    for interface in FAMILIES {
        for world in [World::NonSecure, World::Realm] {
            let ranges = [0..0x14, 0x50..0x54, 0x14F..0x152, 0x18E..0x191, 0x1B0..0x1BD, 0x1CF..0x1D1];
            for function in ranges.into_iter().flatten() {
                for head in [0x8000_0000_u64, 0x8400_0000, 0xC000_0000, 0xC400_0000] {
                    let fid = head | function;
                    let ask = |fid: u64| {
                        let (machine, monitor) = booted(2, interface);
                        machine.entropy.lock().unwrap().extend([Some(1), Some(2), Some(3)]);
                        let (action, mut regs) = call(&monitor, &machine, 0, world, &[fid, 64, 0, 0]);
                        // Where there is no result, the identifier is still there.
                        if action != Action::Resume && action != Action::Standby {
                            regs[0] = smccc::fid(regs[0]);
                        }
                        (action, regs)
                    };
                    assert_eq!(ask(fid), ask(fid | smccc::SVE_HINT | 0xABCD << 32), "{fid:#x}");
                }
            }
        }
    }
}

/// Random calls with random arguments: `REALM_FUZZ_CASES` sequences, a few by default.
#[test]
fn no_call_of_either_world_panics_or_opens_the_rmms_memory() {
    let cases = std::env::var("REALM_FUZZ_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(24);
    let call_of = (any::<bool>(), function(), [argument(), argument(), argument()]);
    let calls = prop::collection::vec(call_of, 1..60);
    proptest!(Config::with_cases(cases), |(family in 0_usize..2, calls in calls)| {
        let (machine, monitor) = booted(2, FAMILIES[family]);
        for (from_host, fid, args) in calls {
            machine.entropy.lock().unwrap().extend([None, Some(args[0]), Some(args[1])]);
            let world = if from_host { World::NonSecure } else { World::Realm };
            let (action, regs) = call(&monitor, &machine, 0, world, &[fid, args[0], args[1], args[2]]);
            match (world, action) {
                (_, Action::Resume) => {}
                (World::NonSecure, Action::ToRealm) => prop_assert_eq!(regs[1..4].to_vec(), args.to_vec()),
                (World::NonSecure, Action::Standby | Action::CpuOff) => {}
                (World::NonSecure, Action::SystemOff | Action::SystemReset) => {}
                (World::Realm, Action::ToNormal) => prop_assert_eq!(family, 1),
                (World::Realm, Action::ToNormalFive) => prop_assert_eq!(family, 0),
                _ => prop_assert!(false, "{:?} for {:#x} of {:?}", action, fid, world),
            }
            let reserve_end = RESERVE.base + RESERVE.size - 4096;
            for pa in [CARVE_OUT.base, SHARED_PAGE, RESERVE.base, reserve_end] {
                prop_assert_eq!(monitor.gpt().lookup(&machine, pa), Some(Gpi::Realm));
            }
            prop_assert_eq!(monitor.gpt().lookup(&machine, 0x0E40_0000), Some(Gpi::Root));
        }
    });
}

fn function() -> impl Strategy<Value = u64> {
    let plain = prop_oneof![
        4 => 0xC400_0140_u64..0xC400_02E0,
        2 => 0x8400_0000_u64..0x8400_0060,
        2 => 0xC400_0000_u64..0xC400_0060,
        1 => 0x8000_0000_u64..0x8000_0005,
        1 => 0xC000_0000_u64..0xC000_0005,
        2 => Just(rmm_el3::fid::GTSI_DELEGATE),
        2 => Just(rmm_el3::fid::GTSI_UNDELEGATE),
        1 => any::<u64>(),
    ];
    // The hint, bits above 32, one bit wrong.
    (plain, 0_u8..8, 0_u32..32).prop_map(|(fid, how, bit)| match how {
        0 => fid | smccc::SVE_HINT,
        1 => fid | 0xFFFF_FFFF << 32,
        2 => fid ^ 1 << bit,
        _ => fid,
    })
}

fn argument() -> impl Strategy<Value = u64> {
    prop_oneof![
        Just(0),
        Just(1),
        Just(32),
        Just(64),
        Just(4096),
        Just(NS_PAGE),
        Just(SHARED_PAGE),
        Just(SHARED_PAGE + 4095),
        Just(CARVE_OUT.base),
        Just(RESERVE.base),
        Just(12 << 56 | 1),
        (NS_PAGE..NS_PAGE + 0x10_0000).prop_map(|pa| pa & !0xFFF),
        any::<u64>(),
    ]
}
