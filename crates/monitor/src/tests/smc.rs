use cca_abi::psci::{Code, fid};
use cca_abi::rmi::fid::VERSION as RMI_VERSION;
use cca_abi::rmm_el3::{self, Status};
use cca_abi::smccc;
use proptest::prelude::*;

use super::machine::{CARVE_OUT, Machine, NS_PAGE, SHARED_PAGE, monitor};
use crate::gpt::Gpi;
use crate::{Action, Monitor, Regs, RmmState, Start, World};

fn call(monitor: &Monitor, machine: &Machine, cpu: usize, world: World, args: &[u64]) -> (Action, Regs) {
    let mut regs: Regs = core::array::from_fn(|i| 0xA000 + i as u64);
    regs[..args.len()].copy_from_slice(args);
    let before = regs;
    let action = monitor.handle_smc(machine, cpu, world, &mut regs);
    // No call has results behind x3, and SMCCC wants the rest preserved.
    assert_eq!(regs[4..], before[4..]);
    (action, regs)
}

fn host(monitor: &Monitor, machine: &Machine, args: &[u64]) -> (Action, u64) {
    let (action, regs) = call(monitor, machine, 0, World::NonSecure, args);
    (action, regs[0])
}

fn rmm(monitor: &Monitor, machine: &Machine, args: &[u64]) -> (Action, Regs) {
    call(monitor, machine, 0, World::Realm, args)
}

fn booted(cpus: usize) -> (Machine, Monitor) {
    let (machine, monitor) = monitor(cpus);
    let (action, _) = rmm(&monitor, &machine, &[rmm_el3::fid::BOOT_COMPLETE, 0, 0x77]);
    assert_eq!(action, Action::BootNormal);
    (machine, monitor)
}

#[test]
fn rmi_calls_are_forwarded_only_from_the_host_and_only_once_the_rmm_is_ready() {
    let (machine, monitor) = monitor(1);
    assert_eq!(host(&monitor, &machine, &[RMI_VERSION]), (Action::Resume, smccc::NOT_SUPPORTED));
    let (machine, monitor) = booted(1);
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
fn only_the_rmm_completes_calls() {
    let (machine, monitor) = booted(1);
    let (action, regs) = rmm(&monitor, &machine, &[rmm_el3::fid::REQ_COMPLETE, 1, 2, 3]);
    assert_eq!((action, regs[1], regs[3]), (Action::ToNormal, 1, 3));
}

#[test]
fn the_rmm_has_no_psci() {
    let (machine, monitor) = booted(2);
    for fid in [fid::VERSION, fid::CPU_ON_64, fid::CPU_OFF, fid::SYSTEM_OFF, fid::SYSTEM_RESET] {
        let (action, regs) = rmm(&monitor, &machine, &[fid, 1, NS_PAGE, 0]);
        assert_eq!((action, regs[0]), (Action::Resume, smccc::NOT_SUPPORTED));
    }
    assert!(machine.released.lock().unwrap().is_empty());
}

#[test]
fn the_host_learns_versions_and_features() {
    let (machine, monitor) = monitor(1);
    let ask = |args: &[u64]| host(&monitor, &machine, args).1;
    assert_eq!(ask(&[smccc::VERSION]), smccc::VERSION_1_2);
    assert_eq!(ask(&[fid::VERSION]), 0x1_0001);
    assert_eq!(ask(&[fid::FEATURES, fid::CPU_ON_64]), 0);
    assert_eq!(ask(&[fid::FEATURES, smccc::VERSION]), 0);
    assert_eq!(ask(&[fid::FEATURES, fid::CPU_SUSPEND_64]), Code::NotSupported.to_register());
    assert_eq!(ask(&[fid::FEATURES, fid::SYSTEM_SUSPEND_64]), Code::NotSupported.to_register());
    assert_eq!(ask(&[smccc::ARCH_FEATURES, 0x8000_8000]), smccc::NOT_SUPPORTED);
    assert_eq!(ask(&[smccc::ARCH_FEATURES, smccc::ARCH_FEATURE_AVAILABILITY]), smccc::NOT_SUPPORTED);
    assert_eq!(ask(&[fid::MIGRATE_INFO_TYPE]), 2);
    assert_eq!(ask(&[0x1234_5678]), smccc::NOT_SUPPORTED);
    assert_eq!(host(&monitor, &machine, &[fid::SYSTEM_OFF]).0, Action::SystemOff);
    assert_eq!(host(&monitor, &machine, &[fid::SYSTEM_RESET]).0, Action::SystemReset);
}

#[test]
fn a_cpu_boots_the_rmm_before_the_host_and_gets_its_token_back() {
    let (machine, monitor) = booted(2);
    assert_eq!(host(&monitor, &machine, &[fid::CPU_ON_64, 1, NS_PAGE, 42]), (Action::Resume, 0));
    assert_eq!(*machine.released.lock().unwrap(), [1]);
    let start = Start { normal: (NS_PAGE, 42), realm: Some([1, 0, 0, 0, 0, 0, 0, 0]) };
    assert_eq!(monitor.start_cpu(1), start);
    let affinity = || host(&monitor, &machine, &[fid::AFFINITY_INFO_64, 1, 0]).1;
    assert_eq!(affinity(), 2);
    let complete = [rmm_el3::fid::BOOT_COMPLETE, 0, 0x1234];
    assert_eq!(call(&monitor, &machine, 1, World::Realm, &complete).0, Action::BootNormal);
    assert_eq!(affinity(), 0);
    assert_eq!(call(&monitor, &machine, 1, World::NonSecure, &[fid::CPU_OFF]).0, Action::CpuOff);
    monitor.cpu_is_off(1);
    assert_eq!(host(&monitor, &machine, &[fid::CPU_ON_32, 1, NS_PAGE, 0]).1, 0);
    assert_eq!(monitor.start_cpu(1).realm, Some([1, 0x1234, 0, 0, 0, 0, 0, 0]));
}

#[test]
fn cpu_on_takes_no_entry_that_the_host_cannot_execute() {
    let (machine, monitor) = booted(2);
    let invalid = Code::InvalidAddress.to_register();
    for entry in [CARVE_OUT.base, 0x0E00_0000, NS_PAGE + 1, 1 << 45] {
        assert_eq!(host(&monitor, &machine, &[fid::CPU_ON_64, 1, entry, 0]).1, invalid, "{entry:#x}");
    }
}

#[test]
fn an_rmm_that_refuses_to_boot_is_never_entered() {
    let (machine, monitor) = monitor(2);
    let minus_seven = (-7_i64) as u64;
    rmm(&monitor, &machine, &[rmm_el3::fid::BOOT_COMPLETE, minus_seven]);
    assert_eq!(monitor.rmm_state(), RmmState::Dead);
    assert!(machine.log.lock().unwrap()[0].contains("manifest"));
    assert_eq!(host(&monitor, &machine, &[RMI_VERSION]), (Action::Resume, smccc::NOT_SUPPORTED));
    host(&monitor, &machine, &[fid::CPU_ON_64, 1, NS_PAGE, 0]);
    assert_eq!(monitor.start_cpu(1).realm, None);
}

#[test]
fn the_first_boot_hands_over_version_cpus_and_shared_page() {
    let (_, monitor) = monitor(4);
    let args = monitor.start_primary((NS_PAGE, 1)).realm;
    assert_eq!(args, Some([0, 0x2_0000, 4, SHARED_PAGE, 0, 0, 0, 0]));
}

#[test]
fn the_rmm_delegates_and_undelegates() {
    let (machine, monitor) = booted(1);
    let gtsi = |fid, pa| rmm(&monitor, &machine, &[fid, pa]).1[0];
    let (delegate, undelegate) = (rmm_el3::fid::GTSI_DELEGATE, rmm_el3::fid::GTSI_UNDELEGATE);
    assert_eq!(gtsi(delegate, NS_PAGE), 0);
    assert_eq!(monitor.gpt().lookup(&machine, NS_PAGE), Some(Gpi::Realm));
    assert_eq!(gtsi(delegate, NS_PAGE), Status::BadPas.to_register());
    assert_eq!(gtsi(undelegate, NS_PAGE), 0);
    assert_eq!(gtsi(undelegate, NS_PAGE), Status::BadPas.to_register());
    assert_eq!(gtsi(delegate, NS_PAGE + 1), Status::BadAddress.to_register());
    for pa in [CARVE_OUT.base, SHARED_PAGE] {
        assert_eq!(gtsi(undelegate, pa), Status::BadPas.to_register());
    }
}

#[test]
fn reserved_memory_is_given_once_from_the_top_and_aligned() {
    let (machine, monitor) = booted(1);
    let reserve = |size, flags| {
        let regs = rmm(&monitor, &machine, &[rmm_el3::fid::RESERVE_MEMORY, size, flags]).1;
        (regs[0], regs[1])
    };
    assert_eq!(reserve(9 * 4096, 12 << 56 | 1), (0, SHARED_PAGE - 9 * 4096));
    let (status, pa) = reserve(4096, 16 << 56);
    assert_eq!((status, pa % 0x1_0000), (0, 0));
    assert!(pa < SHARED_PAGE - 9 * 4096);
    assert_eq!(reserve(4096, 0).1, pa - 4096);
    let invalid = Status::Invalid.to_register();
    for (size, flags) in [(0, 0), (100, 0), (4096, 2), (4096, 1 << 32), (4096, 64 << 56)] {
        assert_eq!(reserve(size, flags).0, invalid);
    }
    assert_eq!(reserve(CARVE_OUT.size, 0).0, Status::NoMemory.to_register());
    assert_eq!(reserve(!0xFFF, 0).0, Status::NoMemory.to_register());
    assert_eq!(reserve(4096, 0).0, 0);
}

#[test]
fn there_are_no_optional_features_and_no_unknown_services() {
    let (machine, monitor) = booted(1);
    let ask = |args: &[u64]| rmm(&monitor, &machine, args).1;
    assert_eq!(ask(&[rmm_el3::fid::EL3_FEATURES, 0])[..2], [0, 0]);
    assert_eq!(ask(&[rmm_el3::fid::EL3_FEATURES, 1])[0], Status::Invalid.to_register());
    for fid in [rmm_el3::fid::EL3_TOKEN_SIGN, rmm_el3::fid::MEC_REFRESH, 0xC400_0400, 0xC400_01B7] {
        assert_eq!(ask(&[fid])[0], smccc::NOT_SUPPORTED);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn no_call_of_either_world_panics_or_opens_the_rmms_memory(
        calls in prop::collection::vec((any::<bool>(), function(), [argument(), argument(), argument()]), 1..60)
    ) {
        let (machine, monitor) = booted(2);
        for (from_host, fid, args) in calls {
            let world = if from_host { World::NonSecure } else { World::Realm };
            // What the RMM says about its boot is believed; that is not the question here.
            if !from_host && fid == rmm_el3::fid::BOOT_COMPLETE {
                continue;
            }
            let action = call(&monitor, &machine, 0, world, &[fid, args[0], args[1], args[2]]).0;
            let possible = match world {
                World::NonSecure => action != Action::ToNormal,
                World::Realm => action == Action::Resume || action == Action::ToNormal,
            };
            prop_assert!(possible && action != Action::BootNormal, "{action:?} for {fid:#x}");
            for pa in [CARVE_OUT.base, SHARED_PAGE] {
                prop_assert_eq!(monitor.gpt().lookup(&machine, pa), Some(Gpi::Realm));
            }
        }
    }
}

fn function() -> impl Strategy<Value = u64> {
    prop_oneof![
        (0xC400_0140_u64..0xC400_02E0),
        (0x8400_0000_u64..0x8400_0020),
        (0xC400_0000_u64..0xC400_0020),
        (0x8000_0000_u64..0x8000_0004),
        any::<u64>(),
    ]
}

fn argument() -> impl Strategy<Value = u64> {
    prop_oneof![
        Just(0),
        Just(32),
        Just(4096),
        Just(NS_PAGE),
        Just(SHARED_PAGE),
        Just(CARVE_OUT.base),
        (NS_PAGE..NS_PAGE + 0x10_0000).prop_map(|pa| pa & !0xFFF),
        any::<u64>(),
    ]
}
