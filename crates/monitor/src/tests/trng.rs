use cca_abi::smccc::{NOT_SUPPORTED, trng};
use std::vec::Vec;

use super::machine::{Machine, NS_PAGE};
use super::smc::{booted, call};
use crate::{Interface, Monitor, World};

fn ask(machine: &Machine, monitor: &Monitor, fid: u64, arg: u64) -> [u64; 4] {
    let regs = call(monitor, machine, 0, World::NonSecure, &[fid, arg, NS_PAGE, NS_PAGE]).1;
    [regs[0], regs[1], regs[2], regs[3]]
}

fn filled(samples: &[Option<u64>]) -> (Machine, Monitor) {
    let (machine, monitor) = booted(1, Interface::V2_0);
    *machine.entropy.lock().unwrap() = samples.iter().rev().copied().collect();
    (machine, monitor)
}

#[test]
fn the_service_describes_itself() {
    let (machine, monitor) = filled(&[]);
    assert_eq!(ask(&machine, &monitor, trng::VERSION, 0)[0], 0x1_0000);
    for fid in [trng::VERSION, trng::FEATURES, trng::GET_UUID, trng::RND_32, trng::RND_64] {
        assert_eq!(ask(&machine, &monitor, trng::FEATURES, fid)[0], 0);
    }
    assert_eq!(ask(&machine, &monitor, trng::FEATURES, 0xC400_0050)[0], NOT_SUPPORTED);
    let uuid = ask(&machine, &monitor, trng::GET_UUID, 0);
    assert!(uuid.iter().all(|word| *word <= 0xFFFF_FFFF && *word != 0));
    // As an answer it cannot be taken for NOT_SUPPORTED.
    assert_ne!(uuid[0], 0xFFFF_FFFF);
}

#[test]
fn as_many_bits_come_as_were_asked_for() {
    let samples: Vec<Option<u64>> = (1..=3).map(|n| Some(u64::MAX - n)).collect();
    for bits in 1..=192_u64 {
        let (machine, monitor) = filled(&samples);
        let [status, high, middle, low] = ask(&machine, &monitor, trng::RND_64, bits);
        assert_eq!(status, 0);
        let width = |word: u64| u64::from(64 - word.leading_zeros());
        assert_eq!(
            [width(low), width(middle), width(high)],
            [bits.min(64), bits.saturating_sub(64).min(64), bits.saturating_sub(128)]
        );
    }
    for bits in 1..=96_u64 {
        let (machine, monitor) = filled(&samples);
        let [status, high, middle, low] = ask(&machine, &monitor, trng::RND_32, bits | 7 << 32);
        assert_eq!(status, 0);
        assert!(low >> bits.min(32) == 0 && middle >> bits.saturating_sub(32).min(32) == 0);
        assert_eq!(high >> bits.saturating_sub(64), 0);
        assert_ne!(low, 0);
    }
}

#[test]
fn too_many_and_no_bits_are_refused() {
    let (machine, monitor) = filled(&[Some(1); 4]);
    for (fid, bits) in [(trng::RND_32, 0), (trng::RND_32, 97), (trng::RND_64, 0), (trng::RND_64, 193)] {
        assert_eq!(ask(&machine, &monitor, fid, bits), [trng::INVALID_PARAMETERS, 0, 0, 0]);
    }
    assert_eq!(ask(&machine, &monitor, trng::RND_64, u64::MAX)[0], trng::INVALID_PARAMETERS);
    assert_eq!(machine.entropy.lock().unwrap().len(), 4);
}

#[test]
fn a_source_that_fails_gives_nothing_not_even_a_part() {
    let (machine, monitor) = filled(&[Some(1), None, Some(2), Some(3), Some(4)]);
    assert_eq!(ask(&machine, &monitor, trng::RND_64, 192), [trng::NO_ENTROPY, 0, 0, 0]);
    // It may come back.
    assert_eq!(ask(&machine, &monitor, trng::RND_64, 64)[0], 0);
}

#[test]
fn a_source_that_sticks_is_never_believed_again() {
    let (machine, monitor) = filled(&[Some(5), Some(6), Some(6), Some(7), Some(8)]);
    assert_eq!(ask(&machine, &monitor, trng::RND_64, 128)[0], 0);
    assert_eq!(ask(&machine, &monitor, trng::RND_64, 64), [trng::NO_ENTROPY, 0, 0, 0]);
    assert_eq!(ask(&machine, &monitor, trng::RND_64, 64), [trng::NO_ENTROPY, 0, 0, 0]);
}

#[test]
fn realms_ask_their_cpu() {
    let (machine, monitor) = filled(&[Some(1)]);
    for fid in [trng::VERSION, trng::RND_64] {
        let regs = call(&monitor, &machine, 0, World::Realm, &[fid, 64]).1;
        assert_eq!(regs[..2], [NOT_SUPPORTED, 64]);
    }
}
