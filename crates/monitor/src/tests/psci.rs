use cca_abi::psci::{AFFINITY_OFF, AFFINITY_ON, AFFINITY_ON_PENDING, Code};
use proptest::prelude::*;

use crate::psci::{Psci, cpu_index};

fn state(psci: &Psci, cpu: u64) -> i64 {
    i64::try_from(psci.affinity_info(cpu, 0).unwrap()).unwrap()
}

#[test]
fn affinities_name_cpus_sixteen_to_a_cluster() {
    assert_eq!(cpu_index(0x8000_0000), Some(0));
    assert_eq!(cpu_index(0x8000_000F), Some(15));
    assert_eq!(cpu_index(0x8000_0100), Some(16));
    assert_eq!(cpu_index(0x8000_0010), None);
    assert_eq!(cpu_index(0x8000_0200), None);
    assert_eq!(cpu_index(0x1_0000), None);
    assert_eq!(cpu_index(0x1_0000_0000), None);
}

#[test]
fn the_first_cpu_starts_on_and_the_others_off() {
    let psci = Psci::new(3);
    assert_eq!([0, 1, 2].map(|cpu| state(&psci, cpu)), [AFFINITY_ON, AFFINITY_OFF, AFFINITY_OFF]);
    assert_eq!(psci.affinity_info(3, 0), Err(Code::InvalidParameters));
    assert_eq!(psci.affinity_info(0, 1), Err(Code::InvalidParameters));
}

#[test]
fn a_cpu_goes_from_off_over_pending_to_on_and_back() {
    let psci = Psci::new(2);
    assert_eq!(psci.cpu_on(1, 0x4200_0000, 7), Ok(1));
    assert_eq!(state(&psci, 1), AFFINITY_ON_PENDING);
    assert_eq!(psci.cpu_on(1, 0, 0), Err(Code::OnPending));
    assert_eq!(psci.entry(1), (0x4200_0000, 7));
    psci.set_on(1);
    assert_eq!(psci.cpu_on(1, 0, 0), Err(Code::AlreadyOn));
    psci.set_off(1);
    assert_eq!(psci.cpu_on(1, 0x4300_0000, 8), Ok(1));
    assert_eq!(psci.entry(1), (0x4300_0000, 8));
}

#[test]
fn who_is_not_there_cannot_be_turned_on() {
    let psci = Psci::new(2);
    for mpidr in [2, 0x10, 0x100, 0x8000_0001, 1 << 32, u64::MAX] {
        assert_eq!(psci.cpu_on(mpidr, 0, 0), Err(Code::InvalidParameters), "{mpidr:#x}");
    }
}

#[test]
fn of_many_callers_exactly_one_turns_a_cpu_on() {
    for _ in 0..50 {
        let psci = Psci::new(2);
        let winners = std::thread::scope(|scope| {
            let calls = [0_u64, 1, 2, 3].map(|n| {
                let psci = &psci;
                scope.spawn(move || psci.cpu_on(1, n, n).is_ok().then_some(n))
            });
            calls.map(|call| call.join().unwrap()).into_iter().flatten().collect::<std::vec::Vec<_>>()
        });
        let [winner] = winners[..] else { panic!("{winners:?}") };
        assert_eq!(psci.entry(1), (winner, winner));
    }
}

proptest! {
    #[test]
    fn any_sequence_of_events_follows_the_state_machine(
        events in prop::collection::vec((0_u64..5, 0_u8..3), 0..100)
    ) {
        let psci = Psci::new(4);
        let mut model = [AFFINITY_ON, AFFINITY_OFF, AFFINITY_OFF, AFFINITY_OFF];
        for (cpu, event) in events {
            let index = usize::try_from(cpu).unwrap();
            let now = model.get(index).copied();
            match (event, now) {
                (0, _) => {
                    let expected = match now {
                        None => Err(Code::InvalidParameters),
                        Some(AFFINITY_OFF) => Ok(index),
                        Some(AFFINITY_ON) => Err(Code::AlreadyOn),
                        Some(_) => Err(Code::OnPending),
                    };
                    prop_assert_eq!(psci.cpu_on(cpu, 0, 0), expected);
                    if expected.is_ok() {
                        model[index] = AFFINITY_ON_PENDING;
                    }
                }
                (1, Some(AFFINITY_ON_PENDING)) => {
                    psci.set_on(index);
                    model[index] = AFFINITY_ON;
                }
                (2, Some(AFFINITY_ON)) => {
                    psci.set_off(index);
                    model[index] = AFFINITY_OFF;
                }
                _ => {}
            }
            for (cpu, expected) in (0..).zip(model) {
                prop_assert_eq!(state(&psci, cpu), expected);
            }
        }
    }
}
