//! The RMM-EL3 interface, in both families.

use cca_abi::psci::fid;
use cca_abi::rmi::fid::VERSION as RMI_VERSION;
use cca_abi::rmm_el3::{self, Status};
use cca_abi::smccc;

use super::machine::{CARVE_OUT, NS_PAGE, RESERVE, SHARED_PAGE, machine, monitor};
use super::smc::{FAMILIES, booted, call, host, rmm};
use crate::gpt::Gpi;
use crate::{Action, Config, Interface, Monitor, RmmState, Start, World};

#[test]
fn users_name_interfaces_by_version_or_family() {
    for text in [&b"2.0"[..], b"2.0\0", b"2.0\n", b"2.x"] {
        assert_eq!(Interface::parse(text), Some(Interface::V2_0));
    }
    assert_eq!(Interface::parse(b"0.x"), Some(Interface::V0_8));
    assert_eq!(Interface::parse(b"0.8"), Some(Interface::V0_8));
    assert_eq!(Interface::parse(b"0.3").map(Interface::version), Some(3));
    for text in [&b""[..], b"0.2", b"0.9", b"1.0", b"2.1", b"0.33", b"x", b"\0"] {
        assert_eq!(Interface::parse(text), None);
    }
}

#[test]
fn family_0_x_boots_with_its_version_and_never_sees_a_token() {
    let (machine, monitor) = monitor(2, Interface::V0_8);
    let start = monitor.start_primary((NS_PAGE, 0)).realm;
    assert_eq!(start, Some([0, 8, 2, SHARED_PAGE, 0, 0, 0, 0]));
    // What an RMM of this family has in x2 means nothing.
    rmm(&monitor, &machine, &[rmm_el3::fid::BOOT_COMPLETE, 0, 0xDEAD]);
    assert_eq!(monitor.rmm_state(), RmmState::Ready);
    for _ in 0..2 {
        assert_eq!(host(&monitor, &machine, &[fid::CPU_ON_64, 1, NS_PAGE, 0]).1, 0);
        assert_eq!(monitor.start_cpu(1).realm, Some([1, 0, 0, 0, 0, 0, 0, 0]));
        let complete = [rmm_el3::fid::BOOT_COMPLETE, 0, 0xBEEF];
        assert_eq!(call(&monitor, &machine, 1, World::Realm, &complete).0, Action::BootNormal);
        monitor.cpu_is_off(1);
    }
}

#[test]
fn family_0_x_has_one_range_of_commands() {
    let (machine, monitor) = booted(1, Interface::V0_8);
    for fid in [0xC400_0150, 0xC400_018E] {
        assert_eq!(host(&monitor, &machine, &[fid]), (Action::ToRealm, fid));
    }
    for fid in [0xC400_01D0, 0xC400_02CF] {
        assert_eq!(host(&monitor, &machine, &[fid]), (Action::Resume, smccc::NOT_SUPPORTED));
    }
}

/// Which service came with which version.
#[test]
fn services_exist_from_their_version_on() {
    use rmm_el3::fid as f;
    let since = [
        (f::GTSI_DELEGATE, 3),
        (f::GTSI_UNDELEGATE, 3),
        (f::ATTEST_GET_REALM_KEY, 3),
        (f::ATTEST_GET_PLAT_TOKEN, 3),
        (f::EL3_FEATURES, 4),
        (f::RESERVE_MEMORY, 7),
    ];
    for (text, minor) in [(&b"0.3"[..], 3), (b"0.4", 4), (b"0.6", 6), (b"0.7", 7), (b"0.8", 8), (b"2.0", 99)]
    {
        let interface = Interface::parse(text).unwrap();
        for (service, first) in since {
            let (machine, monitor) = booted(1, interface);
            // Arguments that no service accepts, but that none calls unknown either.
            let result = rmm(&monitor, &machine, &[service, 1, 0, 7]).1[0];
            assert_eq!(result != smccc::NOT_SUPPORTED, minor >= first, "{service:#x} in 0.{minor}");
            // And for nobody else.
            let result = host(&monitor, &machine, &[service, 1, 0, 7]);
            assert_eq!(result, (Action::Resume, smccc::NOT_SUPPORTED));
        }
        let manifest = if minor < 6 { 3 } else { 5 };
        assert_eq!(interface.manifest_version(), manifest);
    }
}

#[test]
fn keys_and_tokens_are_the_same_in_both_families() {
    for interface in FAMILIES {
        let (machine, monitor) = booted(1, interface);
        let ask = |args: &[u64]| rmm(&monitor, &machine, args).1;
        let (key, token) = (rmm_el3::fid::ATTEST_GET_REALM_KEY, rmm_el3::fid::ATTEST_GET_PLAT_TOKEN);
        let (address, invalid, unknown) =
            (Status::BadAddress.to_register(), Status::Invalid.to_register(), Status::Unknown.to_register());
        assert_eq!(ask(&[key, SHARED_PAGE, 4096, 0])[..2], [0, 48]);
        assert_eq!(ask(&[key, SHARED_PAGE, 47, 0])[0], unknown);
        assert_eq!(ask(&[key, SHARED_PAGE, 4096, 1])[0], invalid);
        for function in [key, token] {
            for (pa, size, status) in [
                (SHARED_PAGE - 1, 64, address),
                (SHARED_PAGE + 4096, 64, address),
                (0, 64, address),
                (u64::MAX, 64, address),
                (SHARED_PAGE, 0, invalid),
                (SHARED_PAGE, 4097, invalid),
                (SHARED_PAGE + 4064, 64, invalid),
                (SHARED_PAGE + 8, u64::MAX, invalid),
            ] {
                assert_eq!(ask(&[function, pa, size, 0])[0], status, "{pa:#x}, {size:#x}");
            }
        }
        for challenge in [1, 31, 33, 65, u64::MAX] {
            assert_eq!(ask(&[token, SHARED_PAGE, 4096, challenge])[0], invalid);
        }
        // Nothing was started, so there is nothing to go on with.
        assert_eq!(ask(&[token, SHARED_PAGE, 4096, 0])[0], invalid);
        for challenge in [32, 48, 64] {
            let (mut total, mut calls) = (0, 0);
            let mut regs = ask(&[token, SHARED_PAGE, 128, challenge]);
            let whole = regs[1] + regs[2];
            loop {
                assert_eq!(regs[0], 0);
                total += regs[1];
                calls += 1;
                assert_eq!(regs[2], whole - total);
                if regs[2] == 0 {
                    break;
                }
                regs = ask(&[token, SHARED_PAGE, 128, 0]);
            }
            assert!(calls > 3 && total == whole);
            // A new challenge starts over, also in the middle.
            assert_eq!(ask(&[token, SHARED_PAGE, 128, 64])[2], ask(&[token, SHARED_PAGE, 128, 64])[2]);
        }
    }
}

#[test]
fn a_boot_is_completed_once() {
    for interface in FAMILIES {
        let (machine, monitor) = booted(2, interface);
        for cpu in [0, 1] {
            let (action, regs) =
                call(&monitor, &machine, cpu, World::Realm, &[rmm_el3::fid::BOOT_COMPLETE, 0, 0]);
            assert_eq!((action, regs[0]), (Action::Resume, smccc::NOT_SUPPORTED));
        }
    }
}

#[test]
fn a_boot_that_fails_late_is_the_rmms_end_for_good() {
    let (machine, monitor) = booted(3, Interface::V2_0);
    for cpu in [1, 2] {
        assert_eq!(host(&monitor, &machine, &[fid::CPU_ON_64, cpu, NS_PAGE, 0]).1, 0);
        assert!(monitor.start_cpu(usize::try_from(cpu).unwrap()).realm.is_some());
    }
    for (cpu, status) in [(1, (-8_i64) as u64), (2, 0)] {
        let complete = [rmm_el3::fid::BOOT_COMPLETE, status, 1];
        assert_eq!(call(&monitor, &machine, cpu, World::Realm, &complete).0, Action::BootNormal);
        assert_eq!(monitor.rmm_state(), RmmState::Dead);
    }
    assert_eq!(host(&monitor, &machine, &[RMI_VERSION]), (Action::Resume, smccc::NOT_SUPPORTED));
    // The host goes on all the same.
    assert_eq!(host(&monitor, &machine, &[fid::AFFINITY_INFO_64, 1, 0]).1, 0);
}

#[test]
fn memory_encryption_contexts_are_refreshed_where_the_cpu_has_them() {
    let with = |mmfr3: u64, interface| {
        let (machine, gpt) = machine();
        let id = crate::enables::IdRegs { mmfr3, ..super::enables::max() };
        let config = Config {
            cpus: 1,
            shared_page: SHARED_PAGE,
            carve_out: CARVE_OUT,
            reserve: RESERVE,
            measured: crate::attest::Measured::default(),
            rmm: true,
            interface,
            id,
        };
        let monitor = Monitor::new(config, gpt);
        move |request| rmm(&monitor, &machine, &[rmm_el3::fid::MEC_REFRESH, request]).1[0]
    };
    assert_eq!(with(0, Interface::V2_0)(0), smccc::NOT_SUPPORTED);
    for interface in FAMILIES {
        let ask = with(1 << 28, interface);
        assert_eq!((ask(0), ask(0xFFFF << 32 | 1)), (0, 0));
        for request in [2, 1 << 31, 1 << 48] {
            assert_eq!(ask(request), Status::Invalid.to_register());
        }
    }
}

#[test]
fn a_cpu_boots_the_rmm_before_the_host_and_gets_its_token_back() {
    let (machine, monitor) = booted(2, Interface::V2_0);
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
fn an_rmm_that_refuses_to_boot_is_never_entered() {
    let (machine, monitor) = monitor(2, Interface::V2_0);
    monitor.start_primary((NS_PAGE, 0));
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
    let (_, monitor) = monitor(4, Interface::V2_0);
    let args = monitor.start_primary((NS_PAGE, 1)).realm;
    assert_eq!(args, Some([0, 0x2_0000, 4, SHARED_PAGE, 0, 0, 0, 0]));
}

#[test]
fn the_rmm_delegates_and_undelegates() {
    let (machine, monitor) = booted(1, Interface::V2_0);
    let gtsi = |fid, pa| rmm(&monitor, &machine, &[fid, pa]).1[0];
    let (delegate, undelegate) = (rmm_el3::fid::GTSI_DELEGATE, rmm_el3::fid::GTSI_UNDELEGATE);
    assert_eq!(gtsi(delegate, NS_PAGE), 0);
    assert_eq!(monitor.gpt().lookup(&machine, NS_PAGE), Some(Gpi::Realm));
    assert_eq!(gtsi(delegate, NS_PAGE), Status::BadPas.to_register());
    assert_eq!(gtsi(undelegate, NS_PAGE), 0);
    assert_eq!(gtsi(undelegate, NS_PAGE), Status::BadPas.to_register());
    assert_eq!(gtsi(delegate, NS_PAGE + 1), Status::BadAddress.to_register());
    for pa in [CARVE_OUT.base, SHARED_PAGE, RESERVE.base, RESERVE.base + RESERVE.size - 4096] {
        assert_eq!(gtsi(undelegate, pa), Status::BadPas.to_register());
    }
}

#[test]
fn reserved_memory_is_given_once_from_the_top_and_aligned() {
    let (machine, monitor) = booted(1, Interface::V2_0);
    let reserve = |size, flags| {
        let regs = rmm(&monitor, &machine, &[rmm_el3::fid::RESERVE_MEMORY, size, flags]).1;
        (regs[0], regs[1])
    };
    assert_eq!(reserve(9 * 4096, 12 << 56 | 1), (0, RESERVE.base + RESERVE.size - 9 * 4096));
    let (status, pa) = reserve(4096, 16 << 56);
    assert_eq!((status, pa % 0x1_0000), (0, 0));
    assert!(pa < RESERVE.base + RESERVE.size - 9 * 4096);
    assert_eq!(reserve(4096, 0).1, pa - 4096);
    let invalid = Status::Invalid.to_register();
    for (size, flags) in [(0, 0), (100, 0), (4096, 2), (4096, 1 << 32), (4096, 64 << 56)] {
        assert_eq!(reserve(size, flags).0, invalid);
    }
    assert_eq!(reserve(RESERVE.size, 0).0, Status::NoMemory.to_register());
    assert_eq!(reserve(!0xFFF, 0).0, Status::NoMemory.to_register());
    assert_eq!(reserve(4096, 0).0, 0);
}

#[test]
fn there_are_no_optional_features_and_no_unknown_services() {
    let (machine, monitor) = booted(1, Interface::V2_0);
    let ask = |args: &[u64]| rmm(&monitor, &machine, args).1;
    assert_eq!(ask(&[rmm_el3::fid::EL3_FEATURES, 0])[..2], [0, 0]);
    assert_eq!(ask(&[rmm_el3::fid::EL3_FEATURES, 1])[0], Status::Invalid.to_register());
    for fid in [rmm_el3::fid::EL3_TOKEN_SIGN, rmm_el3::fid::MEC_REFRESH, 0xC400_0400, 0xC400_01B7] {
        assert_eq!(ask(&[fid])[0], smccc::NOT_SUPPORTED);
    }
}
