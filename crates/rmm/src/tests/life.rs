//! A Realm's whole life, and granules coming back.

use cca_abi::rmi::{ExitReason, RecExit, Status, fid};

use super::host::{Host, SHARED};
use crate::GranuleState;

#[test]
fn versions_and_features_are_those_of_rmm_1_0() {
    let host = Host::new();
    assert_eq!(host.registers(fid::VERSION, &[0x10000])[..3], [0, 0x10000, 0x10000]);
    assert_eq!(host.registers(fid::VERSION, &[0x10001])[..3], [1, 0x10000, 0x10000]);
    assert_eq!(host.registers(fid::VERSION, &[0x8000_0000_0001_0000])[..3], [1, 0x10000, 0x10000]);
    let [features, ..] = host.ok(fid::FEATURES, &[0]);
    let sve = 1 << 9 | 15 << 10;
    let pmu = 1 << 26 | 6 << 27;
    assert_eq!(features, 52 | 1 << 8 | sve | pmu | 5 << 14 | 3 << 20 | 3 << 32 | 3 << 34 | 10 << 38);
    assert_eq!(host.ok(fid::FEATURES, &[1]), [0; 4]);
}

#[test]
fn an_unknown_command_is_not_supported_and_changes_no_register() {
    let host = Host::new();
    assert_eq!(host.registers(0xC400_0156, &[1, 2, 3]), [u64::MAX, 1, 2, 3, 0, 0, 0, 0]);
}

#[test]
fn the_sve_hint_is_not_part_of_the_command() {
    let host = Host::new();
    assert_eq!(host.registers(fid::VERSION | 1 << 16, &[0x10000])[0], 0);
}

#[test]
fn arguments_beyond_the_results_are_preserved() {
    let host = Host::new();
    assert_eq!(host.registers(fid::FEATURES, &[0, 2, 3, 4, 5, 6, 7])[2..], [0, 0, 4, 5, 6, 7]);
}

#[test]
fn a_delegated_granule_comes_back_empty() {
    let host = Host::new();
    let pa = host.alloc();
    host.write_ns_word(pa, 8, 42);
    host.ok(fid::GRANULE_DELEGATE, &[pa]);
    assert!(host.rmm.platform().is_realm_owned(pa));
    assert_eq!(host.status(fid::GRANULE_DELEGATE, &[pa]), Status::ErrorInput);
    host.ok(fid::GRANULE_UNDELEGATE, &[pa]);
    assert!(!host.rmm.platform().is_realm_owned(pa));
    assert_eq!(host.rmm.platform().raw(pa)[1].load(core::sync::atomic::Ordering::Relaxed), 0);
    for bad in [pa, pa + 8, 0, u64::MAX] {
        assert_eq!(host.status(fid::GRANULE_UNDELEGATE, &[bad]), Status::ErrorInput);
    }
}

#[test]
fn a_realm_is_built_runs_and_leaves_nothing_behind() {
    let host = Host::new();
    let realm = host.realm();
    let data = host.page(&realm, 0x1000);
    let unknown = host.delegated();
    host.ok(fid::DATA_CREATE_UNKNOWN, &[realm.rd, unknown, 0x2000]);
    let shared_page = host.alloc();
    host.tables(&realm, SHARED, 3);
    host.ok(fid::RTT_MAP_UNPROTECTED, &[realm.rd, SHARED, 3, shared_page | 6 << 2 | 3 << 6]);
    let rec = host.rec(&realm, 0, true);
    assert_eq!(host.enter(&rec), Status::ErrorRealm(0));
    host.activate(&realm);
    let exit: RecExit = host.enter_ok(&rec);
    assert_eq!(exit.exit_reason, ExitReason::Irq as u8);

    assert_eq!(host.status(fid::REALM_DESTROY, &[realm.rd]), Status::ErrorRealm(0));
    host.ok(fid::REC_DESTROY, &[rec.rec]);
    assert_eq!(host.status(fid::REALM_DESTROY, &[realm.rd]), Status::ErrorRealm(0));
    assert_eq!(host.ok(fid::DATA_DESTROY, &[realm.rd, 0x1000])[..2], [data, 0x2000]);
    assert_eq!(host.ok(fid::DATA_DESTROY, &[realm.rd, 0x2000])[..2], [unknown, 0x20_0000]);
    for ipa in [0, SHARED] {
        let [level3, _, ..] = host.ok(fid::RTT_DESTROY, &[realm.rd, ipa, 3]);
        let [level2, _, ..] = host.ok(fid::RTT_DESTROY, &[realm.rd, ipa, 2]);
        host.ok(fid::GRANULE_UNDELEGATE, &[level3]);
        host.ok(fid::GRANULE_UNDELEGATE, &[level2]);
    }
    host.ok(fid::REALM_DESTROY, &[realm.rd]);
    for pa in [realm.rd, realm.rtt, rec.rec, rec.aux, data, unknown] {
        assert_eq!(host.state(pa), GranuleState::Delegated);
        host.ok(fid::GRANULE_UNDELEGATE, &[pa]);
    }
}

#[test]
fn a_vmid_belongs_to_one_realm_at_a_time() {
    let host = Host::new();
    let first = host.realm_with(0, 9);
    let (rd, rtt) = (host.delegated(), host.delegated());
    let params = host.params(&Host::realm_words(rtt, 0, 9));
    assert_eq!(host.status(fid::REALM_CREATE, &[rd, params]), Status::ErrorInput);
    host.ok(fid::REALM_DESTROY, &[first.rd]);
    host.ok(fid::REALM_CREATE, &[rd, params]);
}

#[test]
fn concatenated_start_tables_are_one_address_space() {
    let host = Host::new();
    let rd = host.delegated();
    let rtt = host.alloc_aligned(0x4000);
    for n in 1..4 {
        assert_eq!(host.alloc(), rtt + n * 4096);
    }
    for n in 0..4 {
        host.ok(fid::GRANULE_DELEGATE, &[rtt + n * 4096]);
    }
    // 32 bits from level 2: four tables of one gigabyte each, half of them unprotected.
    let mut words = Host::realm_words(rtt, 0, 1);
    words.extend([(0x8, 32), (0x810, 2), (0x818, 4)]);
    host.ok(fid::REALM_CREATE, &[rd, host.params(&words)]);
    let table = host.delegated();
    host.ok(fid::RTT_CREATE, &[rd, table, 0x4000_0000, 3]);
    assert_eq!(host.ok(fid::RTT_READ_ENTRY, &[rd, 0x4000_0000, 2]), [2, 2, table, 0]);
    host.ok(fid::RTT_MAP_UNPROTECTED, &[rd, 0xC000_0000, 2, 0x4000_0000 | 6 << 2 | 3 << 6]);
    assert_eq!(host.status(fid::RTT_MAP_UNPROTECTED, &[rd, 0x4020_0000, 2, 0x4000_0000]), Status::ErrorInput);
    assert_eq!(host.status(fid::REALM_DESTROY, &[rd]), Status::ErrorRealm(0));
    host.ok(fid::RTT_DESTROY, &[rd, 0x4000_0000, 3]);
    // A shared block does not keep the Realm alive.
    host.ok(fid::REALM_DESTROY, &[rd]);
    assert_eq!(host.state(rtt + 3 * 4096), GranuleState::Delegated);
}

#[test]
fn with_lpa2_a_realm_has_52_bits_and_five_levels() {
    let host = Host::new();
    let (rd, rtt) = (host.delegated(), host.high());
    let mut words = Host::realm_words(rtt, 0, 1);
    words.extend([(0x0, 1), (0x8, 52), (0x810, u64::MAX), (0x818, 1)]);
    host.ok(fid::REALM_CREATE, &[rd, host.params(&words)]);
    let realm = super::host::TestRealm { rd, rtt };
    let rec = host.rec(&realm, 0, true);
    let ipa = (1 << 50) | 0x1000;
    let create = |level: u64, ipa: u64| {
        let table = host.high();
        let span = cca_abi::rmi::entry_span(level as i64 - 1);
        assert_eq!(host.status(fid::RTT_CREATE, &[rd, table, ipa & !(span - 1), level]), Status::Success);
        table
    };
    assert_eq!(host.status(fid::RTT_CREATE, &[rd, host.high(), 0, u64::MAX]), Status::ErrorInput);
    assert_eq!(host.status(fid::DATA_CREATE_UNKNOWN, &[rd, host.high(), ipa]), Status::ErrorRtt(0xFF));
    for level in 0..=3 {
        create(level, ipa);
    }
    let data = host.high();
    let src = host.alloc();
    host.ok(fid::DATA_CREATE, &[rd, data, ipa, src, 0]);
    // Bits 51:50 of an address are in 9:8.
    let shown = |pa: u64| pa & ((1 << 50) - 1) | (pa >> 50) << 8;
    assert_eq!(host.ok(fid::RTT_READ_ENTRY, &[rd, ipa, 3]), [3, 1, shown(data), 1]);
    let [level, ..] = host.ok(fid::RTT_READ_ENTRY, &[rd, 2 << 48, 3]);
    assert_eq!(level, u64::MAX, "there is no table of level 0");
    // The unprotected half, with an address of 52 bits.
    let shared = 1 << 51;
    for level in 0..=2 {
        create(level, shared);
    }
    let desc = shown(0xF << 48) | 6 << 2 | 3 << 6;
    host.ok(fid::RTT_MAP_UNPROTECTED, &[rd, shared, 2, desc]);
    assert_eq!(host.ok(fid::RTT_READ_ENTRY, &[rd, shared, 3]), [2, 1, desc, 0]);
    host.activate(&realm);
    host.guest(move |ctx| {
        use crate::context::word;
        // DS, SL2, VS, PS of 52 bits, T0SZ 12.
        assert_eq!(ctx.get(word::VTCR_EL2), 1 << 32 | 1 << 33 | 0xC000_3500 | 1 << 19 | 6 << 16 | 12);
        assert_eq!(ctx.get(word::VTTBR_EL2), 1 << 48 | rtt & 0xFFFF_FFFF_FFFF | 5 << 2);
        crate::platform::RealmExit::Irq
    });
    host.enter_ok(&rec);
    // Back down.
    host.ok(fid::REC_DESTROY, &[rec.rec]);
    assert_eq!(host.ok(fid::DATA_DESTROY, &[rd, ipa])[0], data);
    for (ipa, last) in [(ipa, 3), (shared, 2)] {
        for level in (0..=last).rev() {
            let span = cca_abi::rmi::entry_span(level as i64 - 1);
            host.ok(fid::RTT_DESTROY, &[rd, ipa & !(span - 1), level as u64]);
        }
    }
    host.ok(fid::REALM_DESTROY, &[rd]);
}
