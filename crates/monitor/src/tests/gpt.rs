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
    assert_eq!(at(CARVE_OUT.base + CARVE_OUT.size), Some(Gpi::NonSecure));
    assert_eq!(at(DRAM + DRAM_SIZE), Some(Gpi::Any));
    assert_eq!(at(0x80_0000_0000), Some(Gpi::Any));
    assert_eq!(at(1 << 40), None);
}

#[test]
fn only_gigabytes_with_regions_get_a_level_1_table() {
    let (machine, _) = machine();
    let tables = machine.tables.lock().unwrap();
    let level0 = (0..1024).map(|i| tables[&(geometry().l0 + i * 8)]);
    let kinds: Vec<u64> = level0.map(|d| d & 0xF).collect();
    assert_eq!(kinds[..3], [3, 3, 1]);
    assert!(kinds[2..].iter().all(|&k| k == 1));
}

#[test]
fn too_little_memory_for_tables_is_an_error() {
    let (machine, _) = machine();
    let region = Region { base: 0, size: 64 << 30, gpi: Gpi::NonSecure };
    assert_eq!(Gpt::build(&machine, geometry(), &[region]).unwrap_err(), BuildError::NoRoom);
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
fn a_larger_contiguous_block_is_divided_whole() {
    let (machine, gpt) = machine();
    // Pretend that firmware before us had built a 32 MiB block at 0x4400_0000.
    let base = 0x4400_0000;
    let first = {
        let mut tables = machine.tables.lock().unwrap();
        let table = tables[&(geometry().l0 + 8)] & !0xFFF;
        let first = table + ((base & 0x3FFF_FFFF) >> 16) * 8;
        for i in 0..512 {
            tables.insert(first + i * 8, 0x291);
        }
        first
    };
    gpt.delegate(&machine, base + 0x12_3000).unwrap();
    let tables = machine.tables.lock().unwrap();
    let changed = first + (0x12_3000 >> 16) * 8;
    for i in 0..512 {
        let at = first + i * 8;
        let expected = if at == changed { 0x9999_9999_9999_B999 } else { 0x9999_9999_9999_9999 };
        assert_eq!(tables[&at], expected);
    }
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
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    // Two blocks of 2 MiB and the border between carve-out and host memory.
    let granule = prop_oneof![
        (0_u64..64).prop_map(|n| NS_PAGE + n * 4096),
        (0_u64..8).prop_map(|n| NS_PAGE + 0x20_0000 - 4 * 4096 + n * 4096),
        (0_u64..8).prop_map(|n| CARVE_OUT.base + CARVE_OUT.size - 4 * 4096 + n * 4096),
    ];
    let step = (granule, any::<bool>())
        .prop_map(|(pa, d)| if d { Step::Delegate(pa) } else { Step::Undelegate(pa) });
    prop::collection::vec(step, 1..200)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn any_sequence_of_transitions_does_what_a_set_of_granules_says(steps in steps()) {
        let (machine, gpt) = machine();
        let in_carve_out = |pa: u64| pa.wrapping_sub(CARVE_OUT.base) < CARVE_OUT.size;
        let mut touched = std::collections::BTreeMap::new();
        for step in steps {
            let (pa, from, to, result) = match step {
                Step::Delegate(pa) => (pa, Gpi::NonSecure, Gpi::Realm, gpt.delegate(&machine, pa)),
                Step::Undelegate(pa) => (pa, Gpi::Realm, Gpi::NonSecure, gpt.undelegate(&machine, pa)),
            };
            let state = touched.entry(pa).or_insert(if in_carve_out(pa) { Gpi::Realm } else { Gpi::NonSecure });
            if *state == from {
                prop_assert_eq!(result, Ok(()));
                *state = to;
            } else {
                prop_assert_eq!(result, Err(TransitionError::BadPas));
            }
            prop_assert!(machine.stale.lock().unwrap().is_empty(), "a change without invalidation");
            for (pa, state) in &touched {
                prop_assert_eq!(gpt.lookup(&machine, *pa), Some(*state));
            }
        }
        for pa in (NS_PAGE..NS_PAGE + 0x60_0000).step_by(4096).filter(|pa| !touched.contains_key(pa)) {
            prop_assert_eq!(gpt.lookup(&machine, pa), Some(Gpi::NonSecure));
        }
    }
}
