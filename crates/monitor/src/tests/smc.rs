use cca_abi::psci::{Code, fid};
use cca_abi::rmi::fid::VERSION as RMI_VERSION;
use cca_abi::rmm_el3;
use cca_abi::smccc;

use super::machine::{CARVE_OUT, Machine, NS_PAGE, RESERVE, SHARED_PAGE, monitor};
use crate::{Action, Interface, Monitor, Regs, World};

pub(super) fn call(
    monitor: &Monitor,
    machine: &Machine,
    cpu: usize,
    world: World,
    args: &[u64],
) -> (Action, Regs) {
    let mut regs: Regs = core::array::from_fn(|i| 0xA000 + i as u64);
    regs[..args.len()].copy_from_slice(args);
    let before = regs;
    let action = monitor.handle_smc(machine, cpu, world, &mut regs);
    // No call has results behind x3, and SMCCC wants the rest preserved.
    assert_eq!(regs[4..], before[4..]);
    (action, regs)
}

pub(super) fn host(monitor: &Monitor, machine: &Machine, args: &[u64]) -> (Action, u64) {
    let (action, regs) = call(monitor, machine, 0, World::NonSecure, args);
    (action, regs[0])
}

pub(super) fn rmm(monitor: &Monitor, machine: &Machine, args: &[u64]) -> (Action, Regs) {
    call(monitor, machine, 0, World::Realm, args)
}

pub(super) const FAMILIES: [Interface; 2] = [Interface::V0_8, Interface::V2_0];

pub(super) fn booted(cpus: usize, interface: Interface) -> (Machine, Monitor) {
    let (machine, monitor) = monitor(cpus, interface);
    assert!(monitor.start_primary((NS_PAGE, 0)).realm.is_some());
    let (action, _) = rmm(&monitor, &machine, &[rmm_el3::fid::BOOT_COMPLETE, 0, 0x77]);
    assert_eq!(action, Action::BootNormal);
    (machine, monitor)
}

#[test]
fn rmi_calls_are_forwarded_only_from_the_host_and_only_once_the_rmm_is_ready() {
    let (machine, monitor) = monitor(1, Interface::V2_0);
    assert_eq!(host(&monitor, &machine, &[RMI_VERSION]), (Action::Resume, smccc::NOT_SUPPORTED));
    let (machine, monitor) = booted(1, Interface::V2_0);
    for fid in [0xC400_0150, 0xC400_0168, 0xC400_018E, 0xC400_01D0, 0xC400_02CF] {
        assert_eq!(host(&monitor, &machine, &[fid]), (Action::ToRealm, fid));
        // The SVE hint goes along, what is above 32 bits does not.
        let hinted = fid | smccc::SVE_HINT;
        assert_eq!(host(&monitor, &machine, &[0xFF << 32 | hinted]), (Action::ToRealm, hinted));
        let (action, regs) = rmm(&monitor, &machine, &[fid]);
        assert_eq!((action, regs[0]), (Action::Resume, smccc::NOT_SUPPORTED));
    }
    for fid in [0xC400_014F, 0xC400_018F, 0xC400_0190, 0xC400_01B0, 0xC400_01CF, 0xC400_02D0, 0x8400_0150] {
        assert_eq!(host(&monitor, &machine, &[fid]), (Action::Resume, smccc::NOT_SUPPORTED), "{fid:#x}");
    }
}

#[test]
fn only_the_rmm_completes_calls_and_each_family_in_its_way() {
    for (interface, expected) in
        [(Interface::V2_0, Action::ToNormal), (Interface::V0_8, Action::ToNormalFive)]
    {
        let (machine, monitor) = booted(1, interface);
        let args = [rmm_el3::fid::REQ_COMPLETE, 1, 2, 3];
        let (action, regs) = rmm(&monitor, &machine, &args);
        assert_eq!((action, regs[1], regs[3]), (expected, 1, 3));
        assert_eq!(host(&monitor, &machine, &args), (Action::Resume, smccc::NOT_SUPPORTED));
    }
}

#[test]
fn an_rmm_that_has_not_booted_completes_nothing() {
    let (machine, monitor) = monitor(1, Interface::V2_0);
    monitor.start_primary((NS_PAGE, 0));
    let (action, regs) = rmm(&monitor, &machine, &[rmm_el3::fid::REQ_COMPLETE, 1]);
    assert_eq!((action, regs[0]), (Action::Resume, smccc::NOT_SUPPORTED));
}

#[test]
fn the_rmm_has_no_psci() {
    let (machine, monitor) = booted(2, Interface::V2_0);
    for fid in [fid::VERSION, fid::CPU_ON_64, fid::CPU_OFF, fid::SYSTEM_OFF, fid::SYSTEM_RESET] {
        let (action, regs) = rmm(&monitor, &machine, &[fid, 1, NS_PAGE, 0]);
        assert_eq!((action, regs[0]), (Action::Resume, smccc::NOT_SUPPORTED));
    }
    assert!(machine.released.lock().unwrap().is_empty());
}

#[test]
fn the_host_learns_versions_and_features() {
    let (machine, monitor) = monitor(1, Interface::V2_0);
    let ask = |args: &[u64]| host(&monitor, &machine, args).1;
    assert_eq!(ask(&[smccc::VERSION]), smccc::VERSION_1_5);
    assert_eq!(ask(&[fid::VERSION]), 0x1_0001);
    assert_eq!(ask(&[fid::MIGRATE_INFO_TYPE]), 2);
    assert_eq!(ask(&[smccc::ARCH_SOC_ID, 0]) >> 31, 0, "a version has bit 31 clear");
    assert_eq!(ask(&[smccc::ARCH_SOC_ID_64, 1]) >> 31, 0);
    assert_eq!(ask(&[smccc::ARCH_SOC_ID, 3]), smccc::INVALID_PARAMETER);
    assert_eq!(ask(&[0x1234_5678]), smccc::NOT_SUPPORTED);
    for workaround in [0x8000_8000, 0x8000_7FFF, 0x8000_3FFF, 0x8000_0004] {
        assert_eq!(ask(&[smccc::ARCH_FEATURES, workaround]), smccc::NOT_SUPPORTED);
        assert_eq!(ask(&[workaround]), smccc::NOT_SUPPORTED);
    }
}

/// Whoever is told that a call exists finds it, and nobody finds one that was not told of.
#[test]
fn features_tell_the_truth_of_every_power_call() {
    for function in 0..0x20 {
        for fid in [0x8400_0000 | function, 0xC400_0000 | function] {
            let (machine, monitor) = booted(2, Interface::V2_0);
            let told = host(&monitor, &machine, &[fid::FEATURES, fid]).1;
            let (action, result) = host(&monitor, &machine, &[fid, fid::VERSION, 0, 0]);
            let exists = action != Action::Resume || result != smccc::NOT_SUPPORTED;
            assert_eq!(told, if exists { 0 } else { smccc::NOT_SUPPORTED }, "{fid:#x}");
        }
    }
    let (machine, monitor) = booted(1, Interface::V2_0);
    for fid in [smccc::VERSION, smccc::ARCH_FEATURES, smccc::ARCH_SOC_ID, smccc::ARCH_FEATURE_AVAILABILITY] {
        let told = host(&monitor, &machine, &[smccc::ARCH_FEATURES, fid]).1;
        assert_eq!(told, 0);
        assert_ne!(host(&monitor, &machine, &[fid, smccc::VERSION]).1, smccc::NOT_SUPPORTED, "{fid:#x}");
    }
}

#[test]
fn standby_is_the_only_suspend_state() {
    let (machine, monitor) = booted(1, Interface::V2_0);
    for fid in [fid::CPU_SUSPEND_32, fid::CPU_SUSPEND_64] {
        for state in [0, 1] {
            assert_eq!(host(&monitor, &machine, &[fid, state]), (Action::Standby, 0));
        }
        // Power down, a higher level, the extended format, reserved bits.
        for state in [1 << 16, 1 << 24, 1 << 30, 1 << 31, 2, 0x101] {
            let refused = (Action::Resume, Code::InvalidParameters.to_register());
            assert_eq!(host(&monitor, &machine, &[fid, state]), refused, "{state:#x}");
        }
    }
}

#[test]
fn the_machine_ends_and_starts_anew_when_the_host_says_so() {
    let (machine, monitor) = booted(1, Interface::V2_0);
    let ask = |args: &[u64]| host(&monitor, &machine, args);
    assert_eq!(ask(&[fid::SYSTEM_OFF]).0, Action::SystemOff);
    assert_eq!(ask(&[fid::SYSTEM_RESET]).0, Action::SystemReset);
    for fid in [fid::SYSTEM_RESET2_32, fid::SYSTEM_RESET2_64] {
        assert_eq!(ask(&[fid, 0, 7]).0, Action::SystemReset);
        for kind in [1, 1 << 31, 0xFFFF_FFFF] {
            assert_eq!(ask(&[fid, kind]), (Action::Resume, Code::InvalidParameters.to_register()));
        }
    }
}

#[test]
fn both_worlds_learn_what_they_may_use() {
    let (machine, monitor) = booted(1, Interface::V2_0);
    let args = [smccc::ARCH_FEATURE_AVAILABILITY, 0x1E_1100];
    for world in [World::NonSecure, World::Realm] {
        let (_, regs) = call(&monitor, &machine, 0, world, &args);
        let mask = super::enables::max().availability(0x1E_1100, world).unwrap();
        assert_eq!((regs[0], regs[1]), (0, mask));
        let (_, regs) = call(&monitor, &machine, 0, world, &[args[0], 0x1E_1101]);
        assert_eq!((regs[0], regs[1]), (smccc::INVALID_PARAMETER, 0));
    }
}

#[test]
fn cpu_on_takes_no_entry_that_the_host_cannot_execute() {
    let (machine, monitor) = booted(2, Interface::V2_0);
    let invalid = Code::InvalidAddress.to_register();
    // The RMM's, Root's, not an instruction, beyond everything, a device, nothing at all.
    for entry in [
        CARVE_OUT.base,
        RESERVE.base,
        SHARED_PAGE,
        0x0E00_0000,
        NS_PAGE + 1,
        NS_PAGE + 2,
        1 << 45,
        0x0900_0000,
        0,
        u64::MAX,
    ] {
        assert_eq!(host(&monitor, &machine, &[fid::CPU_ON_64, 1, entry, 0]).1, invalid, "{entry:#x}");
    }
    // The protection of now counts, not that of the boot.
    monitor.gpt().delegate(&machine, NS_PAGE).unwrap();
    assert_eq!(host(&monitor, &machine, &[fid::CPU_ON_64, 1, NS_PAGE, 0]).1, invalid);
    monitor.gpt().undelegate(&machine, NS_PAGE).unwrap();
    assert_eq!(host(&monitor, &machine, &[fid::CPU_ON_32, 1, 1 << 32 | NS_PAGE, 0]).1, 0);
}
