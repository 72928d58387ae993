use std::vec::Vec;

use proptest::prelude::*;

use super::machine::{CARVE_OUT, DRAM, DRAM_SIZE, NS_PAGE, geometry, machine};
use crate::Pas;
use crate::gpt::{BuildError, Gpi, Gpt, Region, TransitionError};

#[test]
fn regions_have_their_protection_and_everything_else_is_open() {
    let (machine, gpt) = machine();
    let at = |pa| gpt.lookup(&machine, pa);
    assert_eq!(at(0x0900_0000), Some(Gpi::Any));
    assert_eq!(at(0x0E00_0000), Some(Gpi::Root));
    assert_eq!(at(0x0EFF_FFFF), Some(Gpi::Root));
    assert_eq!(at(0x0F00_0000), Some(Gpi::Any));
    assert_eq!(at(DRAM), Some(Gpi::NonSecure));
    assert_eq!(at(CARVE_OUT.base - 1), Some(Gpi::NonSecure));
    assert_eq!(at(CARVE_OUT.base), Some(Gpi::Realm));
    assert_eq!(at(NS_PAGE - 4096), Some(Gpi::Realm));
    assert_eq!(at(NS_PAGE), Some(Gpi::NonSecure));
    assert_eq!(at(DRAM + DRAM_SIZE), Some(Gpi::Any));
    assert_eq!(at(0x80_0000_0000), Some(Gpi::Any));
    assert_eq!(at(1 << 40), None);
}

#[test]
fn only_gigabytes_with_regions_get_a_level_1_table() {
    let (machine, _) = machine();
    let mut tables = machine.tables.lock().unwrap();
    let kinds: Vec<u64> = (0..1024).map(|i| *tables.at(geometry().l0 + i * 8) & 0xF).collect();
    assert_eq!(kinds[..4], [3, 3, 3, 1]);
    assert!(kinds[3..].iter().all(|&k| k == 1));
}

#[test]
fn blocks_are_as_large_as_they_can_be() {
    let (machine, _) = machine();
    let mut tables = machine.tables.lock().unwrap();
    let mut entry = |pa: u64| {
        let table = *tables.at(geometry().l0 + (pa >> 30) * 8) & !0xFFF;
        *tables.at(table + ((pa & 0x3FFF_FFFF) >> 16) * 8)
    };
    // Device tree and carve-out share 2 MiB; then 2 MiB blocks of Realm, of the host, 32 and 512 MiB.
    assert_eq!(entry(DRAM), 0x9999_9999_9999_9999);
    assert_eq!(entry(CARVE_OUT.base), 0xBBBB_BBBB_BBBB_BBBB);
    assert_eq!(entry(0x4020_0000), 0x1B1);
    assert_eq!(entry(NS_PAGE), 0x291);
    assert_eq!(entry(0x4400_0000), 0x291);
    assert_eq!(entry(0x6000_0000), 0x391);
    assert_eq!(entry(0x9FFF_0000), 0x391);
    drop(tables);
    assert!((0..3).all(|gigabyte| machine.blocks_are_uniform(gigabyte)));
}

#[test]
fn memory_without_tables_keeps_its_protection_for_good() {
    let (machine, _) = machine();
    // Room for eight tables, of which one is for the gigabyte of secure RAM.
    let secure = Region { base: 0x0E00_0000, size: 0x0100_0000, gpi: Gpi::Root };
    let dram = Region { base: 1 << 30, size: 64 << 30, gpi: Gpi::NonSecure };
    let gpt = Gpt::build(&machine, geometry(), &[dram, secure]).unwrap();
    assert_eq!(gpt.limit(), 8 << 30);
    assert_eq!(gpt.lookup(&machine, gpt.limit()), Some(Gpi::NonSecure));
    assert_eq!(gpt.delegate(&machine, gpt.limit()), Err(TransitionError::BadAddress));
    assert_eq!(gpt.delegate(&machine, gpt.limit() - 4096), Ok(()));
    // Such a gigabyte can only have one protection.
    let part = Region { base: 40 << 30, size: 4096, gpi: Gpi::Realm };
    assert_eq!(Gpt::build(&machine, geometry(), &[dram, secure, part]).unwrap_err(), BuildError::NoRoom);
}

#[test]
fn regions_must_be_made_of_granules() {
    let (machine, _) = machine();
    let region = Region { base: 0x800, size: 0x1000, gpi: Gpi::NonSecure };
    assert_eq!(Gpt::build(&machine, geometry(), &[region]).unwrap_err(), BuildError::Misaligned);
}

#[test]
fn what_is_no_delegable_granule_is_a_bad_address() {
    let (machine, gpt) = machine();
    for pa in [NS_PAGE + 1, NS_PAGE + 0x800, 1 << 39, 1 << 40, !0xFFF, u64::MAX] {
        assert_eq!(gpt.delegate(&machine, pa), Err(TransitionError::BadAddress), "{pa:#x}");
        assert_eq!(gpt.undelegate(&machine, pa), Err(TransitionError::BadAddress), "{pa:#x}");
    }
}

#[test]
fn root_and_device_granules_never_change() {
    let (machine, gpt) = machine();
    for pa in [0x0E00_0000, 0x0900_0000, 0x0F00_0000] {
        assert_eq!(gpt.delegate(&machine, pa), Err(TransitionError::BadPas), "{pa:#x}");
        assert_eq!(gpt.undelegate(&machine, pa), Err(TransitionError::BadPas), "{pa:#x}");
    }
}

#[test]
fn caches_are_cleaned_in_the_old_and_the_new_space() {
    let (machine, gpt) = machine();
    gpt.delegate(&machine, NS_PAGE).unwrap();
    gpt.undelegate(&machine, NS_PAGE).unwrap();
    let flushed = machine.flushed.lock().unwrap().clone();
    let expected = [Pas::Realm, Pas::NonSecure, Pas::Realm, Pas::NonSecure];
    assert_eq!(flushed, expected.map(|pas| (NS_PAGE, pas)));
}

#[test]
fn a_contiguous_block_is_divided_whole_and_no_further_than_needed() {
    let (machine, gpt) = machine();
    let pa = 0x6000_0000 + 0x0A7_3000;
    machine.walk(0x7FFF_0000);
    gpt.delegate(&machine, pa).unwrap();
    assert!(machine.cached.lock().unwrap().is_empty(), "what was remembered of the block is forgotten");
    assert!(machine.blocks_are_uniform(1));
    let mut tables = machine.tables.lock().unwrap();
    let table = *tables.at(geometry().l0 + 8) & !0xFFF;
    for at in (0x6000_0000_u64..0x8000_0000).step_by(0x1_0000) {
        let expected = match () {
            () if at >> 16 == pa >> 16 => 0x9999_9999_9999_B999,
            () if at >> 21 == pa >> 21 => 0x9999_9999_9999_9999,
            () if at >> 25 == pa >> 25 => 0x191,
            () => 0x291,
        };
        assert_eq!(*tables.at(table + ((at & 0x3FFF_FFFF) >> 16) * 8), expected, "{at:#x}");
    }
}

#[test]
fn before_a_reset_all_realm_memory_becomes_roots_and_is_named() {
    let (machine, gpt) = machine();
    for pa in [NS_PAGE, NS_PAGE + 0x7000, 0x7000_0000] {
        gpt.delegate(&machine, pa).unwrap();
    }
    machine.walk(NS_PAGE);
    let mut scrubbed = std::collections::BTreeSet::new();
    gpt.seize_realm(&machine, |base, size| {
        scrubbed.extend((base..base + size).step_by(4096));
    });
    assert!(!machine.remembers_other_than(NS_PAGE, Gpi::Root));
    for pa in (DRAM..DRAM + DRAM_SIZE).step_by(4096) {
        let own = (CARVE_OUT.base..NS_PAGE).contains(&pa);
        let realm = own || [NS_PAGE, NS_PAGE + 0x7000, 0x7000_0000].contains(&pa);
        let now = gpt.lookup(&machine, pa);
        assert_eq!(now, Some(if realm { Gpi::Root } else { Gpi::NonSecure }), "{pa:#x}");
        assert_eq!(scrubbed.contains(&pa), realm, "{pa:#x}");
    }
    assert_eq!(gpt.undelegate(&machine, NS_PAGE), Err(TransitionError::BadPas));
}

#[test]
fn cpus_that_change_neighbours_do_not_disturb_each_other() {
    let (machine, gpt) = machine();
    std::thread::scope(|scope| {
        for cpu in 0..4 {
            let (machine, gpt) = (&machine, &gpt);
            scope.spawn(move || {
                for round in 0..200 {
                    let pa = NS_PAGE + ((round % 8) * 4 + cpu) * 4096;
                    gpt.delegate(machine, pa).unwrap();
                    assert_eq!(gpt.lookup(machine, pa), Some(Gpi::Realm));
                    gpt.undelegate(machine, pa).unwrap();
                }
            });
        }
    });
    for i in 0..32 {
        assert_eq!(gpt.lookup(&machine, NS_PAGE + i * 4096), Some(Gpi::NonSecure));
    }
}

#[test]
fn of_two_cpus_that_delegate_the_same_granule_one_wins() {
    let (machine, gpt) = machine();
    for i in 0..100 {
        let pa = NS_PAGE + i * 4096;
        let wins: usize = std::thread::scope(|scope| {
            let race = || usize::from(gpt.delegate(&machine, pa).is_ok());
            let other = scope.spawn(race);
            race() + other.join().unwrap()
        });
        assert_eq!(wins, 1);
    }
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Delegate(u64),
    Undelegate(u64),
    /// Some CPU looks at memory and remembers what it finds.
    Walk(u64),
}

fn granule() -> impl Strategy<Value = u64> {
    prop_oneof![
        // One block of 2 MiB, the border between two, blocks of 32 and 512 MiB, the borders of the RMM's memory.
        4 => (0_u64..64).prop_map(|n| NS_PAGE + n * 4096),
        2 => (0_u64..8).prop_map(|n| NS_PAGE + 0x20_0000 - 4 * 4096 + n * 4096),
        2 => (0_u64..0x2000).prop_map(|n| 0x4400_0000 + n * 4096),
        2 => (0_u64..0x4_0000).prop_map(|n| 0x6000_0000 + n * 4096),
        1 => (0_u64..0x2_0000).prop_map(|n| 0x6000_0000 + (n << 12) * 2 % 0x4000_0000),
        1 => (0_u64..8).prop_map(|n| NS_PAGE - 4 * 4096 + n * 4096),
        1 => (0_u64..8).prop_map(|n| CARVE_OUT.base - 4 * 4096 + n * 4096),
    ]
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = (granule(), 0_u8..3).prop_map(|(pa, kind)| match kind {
        0 => Step::Delegate(pa),
        1 => Step::Undelegate(pa),
        _ => Step::Walk(pa),
    });
    prop::collection::vec(step, 1..200)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(
        std::env::var("REALM_FUZZ_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(24)
    ))]
    #[test]
    fn any_sequence_of_transitions_does_what_a_set_of_granules_says(steps in steps()) {
        let (machine, gpt) = machine();
        let own = |pa: u64| (CARVE_OUT.base..NS_PAGE).contains(&pa);
        let mut touched = std::collections::BTreeMap::new();
        for step in steps {
            let (pa, from, to, result) = match step {
                Step::Delegate(pa) => (pa, Gpi::NonSecure, Gpi::Realm, gpt.delegate(&machine, pa)),
                Step::Undelegate(pa) => (pa, Gpi::Realm, Gpi::NonSecure, gpt.undelegate(&machine, pa)),
                Step::Walk(pa) => {
                    machine.walk(pa);
                    continue;
                }
            };
            let state = touched.entry(pa).or_insert(if own(pa) { Gpi::Realm } else { Gpi::NonSecure });
            if *state == from {
                prop_assert_eq!(result, Ok(()));
                *state = to;
            } else {
                prop_assert_eq!(result, Err(TransitionError::BadPas));
            }
            prop_assert!(machine.stale.lock().unwrap().is_empty(), "a change without invalidation");
            for (pa, state) in &touched {
                prop_assert_eq!(gpt.lookup(&machine, *pa), Some(*state));
                prop_assert!(!machine.remembers_other_than(*pa, *state), "old protection of {:#x} remembered", pa);
            }
        }
        for pa in (DRAM..DRAM + DRAM_SIZE).step_by(0x1_0000).filter(|pa| !touched.contains_key(pa)) {
            prop_assert_eq!(gpt.lookup(&machine, pa), Some(if own(pa) { Gpi::Realm } else { Gpi::NonSecure }));
        }
        prop_assert!((0..3).all(|gigabyte| machine.blocks_are_uniform(gigabyte)));
    }
}
