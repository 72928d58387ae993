//! Which error a command gives, and that an error changes nothing.

use cca_abi::rmi::{Status, fid};

use super::host::{Host, SHARED};
use super::std;
use crate::GranuleState;

const INPUT: Status = Status::ErrorInput;

#[test]
fn realm_parameters_are_checked() {
    let host = Host::new();
    let (rd, rtt) = (host.delegated(), host.delegated());
    let attempt = |changes: &[(usize, u64)]| {
        let mut words = Host::realm_words(rtt, 0, 1);
        words.extend(changes);
        host.status(fid::REALM_CREATE, &[rd, host.params(&words)])
    };
    for (what, change) in [
        ("a PMU without counters", (0x0, 4)),
        ("too wide", (0x8, 49)),
        ("too narrow", (0x8, 31)),
        ("no breakpoint", (0x18, 0)),
        ("too many breakpoints", (0x18, 6)),
        ("no watchpoint", (0x20, 0)),
        ("too many watchpoints", (0x20, 4)),
        ("unknown hash", (0x30, 2)),
        ("unaligned table", (0x808, rtt + 8)),
        ("undelegated table", (0x808, rtt + 0x10000)),
        ("table outside memory", (0x808, 0x1000)),
        ("table at the end of the address space", (0x808, 0xFFFF_FFFF_FFFF_F000)),
        ("level below zero", (0x810, u64::MAX)),
        ("wrong level", (0x810, 3)),
        ("no table", (0x818, 0)),
        ("two tables where one is enough", (0x818, 2)),
        ("the RD is the table", (0x808, rd)),
    ] {
        assert_eq!(attempt(&[change]), INPUT, "{what}");
    }
    assert_eq!(host.status(fid::REALM_CREATE, &[rd, rtt]), INPUT, "parameters in a delegated granule");
    assert_eq!(host.status(fid::REALM_CREATE, &[rd, 0x1000]), INPUT);
    assert_eq!(host.state(rd), GranuleState::Delegated);
    assert_eq!(attempt(&[]), Status::Success);
}

#[test]
fn data_create_reports_the_realms_state_before_the_tables() {
    let host = Host::new();
    let realm = host.realm();
    let (data, src) = (host.delegated(), host.alloc());
    let attempt = |ipa: u64| host.status(fid::DATA_CREATE, &[realm.rd, data, ipa, src, 0]);
    assert_eq!(attempt(0x1000), Status::ErrorRtt(1));
    assert_eq!(attempt(0x1008), INPUT);
    assert_eq!(attempt(SHARED), INPUT);
    host.tables(&realm, 0x1000, 3);
    for args in [
        [realm.rtt, data, 0x1000, src, 0],
        [realm.rd, src, 0x1000, src, 0],
        [realm.rd, data, 0x1000, data, 0],
        [realm.rd, realm.rd, 0x1000, src, 0],
        [realm.rd, data + 1, 0x1000, src, 0],
        [realm.rd, 1 << 48, 0x1000, src, 0],
    ] {
        assert_eq!(host.status(fid::DATA_CREATE, &args), INPUT);
    }
    assert_eq!(attempt(0x1000), Status::Success);
    let again = host.delegated();
    assert_eq!(host.status(fid::DATA_CREATE, &[realm.rd, again, 0x1000, src, 0]), Status::ErrorRtt(3));
    assert_eq!(host.status(fid::DATA_CREATE_UNKNOWN, &[realm.rd, again, 0x1000]), Status::ErrorRtt(3));
    host.activate(&realm);
    assert_eq!(host.status(fid::DATA_CREATE, &[realm.rd, again, 0x1000, src, 0]), Status::ErrorRealm(0));
    assert_eq!(host.status(fid::DATA_CREATE, &[realm.rd, again, 0x4000_0000, src, 0]), Status::ErrorRealm(0));
    assert_eq!(host.status(fid::DATA_CREATE, &[src, again, 0x1000, src, 0]), INPUT);
    assert_eq!(host.status(fid::REALM_ACTIVATE, &[realm.rd]), Status::ErrorRealm(0));
    assert_eq!(host.status(fid::REALM_ACTIVATE, &[data]), INPUT);
    assert_eq!(host.state(again), GranuleState::Delegated);
}

#[test]
fn a_source_that_stops_being_the_hosts_fails_the_copy_and_leaves_no_trace() {
    let host = Host::new();
    let realm = host.realm();
    host.tables(&realm, 0, 3);
    let (data, src) = (host.delegated(), host.alloc());
    // The host's EL3 changes the page behind the RMM's back.
    crate::platform::Platform::delegate(host.rmm.platform(), src).unwrap();
    assert_eq!(host.status(fid::DATA_CREATE, &[realm.rd, data, 0, src, 1]), INPUT);
    assert_eq!(host.state(data), GranuleState::Delegated);
    assert_eq!(host.read_entry(&realm, 0, 3), [3, 0, 0, 0]);
}

#[test]
fn recs_are_created_in_order_with_their_own_granules() {
    let host = Host::new();
    let realm = host.realm();
    let [count, ..] = host.ok(fid::REC_AUX_COUNT, &[realm.rd]);
    let rec = host.delegated();
    let fresh = || (0..count).map(|_| host.delegated()).collect::<std::vec::Vec<u64>>();
    let auxes = fresh();
    let aux = auxes[0];
    let attempt = |rec: u64, changes: &[(usize, u64)]| {
        let mut words = Host::rec_words(&auxes, 0);
        words.extend(changes);
        host.status(fid::REC_CREATE, &[realm.rd, rec, host.params(&words)])
    };
    assert_eq!(attempt(rec, &[(0x100, 1)]), INPUT, "MPIDR out of order");
    assert_eq!(attempt(rec, &[(0x800, count - 1)]), INPUT, "too few auxiliary granules");
    assert_eq!(attempt(rec, &[(0x800, count + 1), (0x808 + 8 * count as usize, host.delegated())]), INPUT);
    assert_eq!(attempt(rec, &[(0x800, 17)]), INPUT, "too many");
    assert_eq!(attempt(rec, &[(0x808, rec)]), INPUT, "auxiliary granule is the REC");
    assert_eq!(attempt(rec, &[(0x808, realm.rd)]), INPUT);
    assert_eq!(attempt(realm.rd, &[]), INPUT);
    assert_eq!(attempt(aux, &[(0x808, aux + 1)]), INPUT);
    assert_eq!(attempt(rec, &[]), Status::Success);
    for &aux in &auxes {
        assert_eq!(host.state(aux), GranuleState::RecAux);
    }
    host.activate(&realm);
    assert_eq!(attempt(host.delegated(), &[(0x100, 1)]), INPUT, "the auxiliary granules are taken");
    let changes: std::vec::Vec<_> =
        [(0x100, 1)].into_iter().chain((0x808..).step_by(8).zip(fresh())).collect();
    assert_eq!(attempt(host.delegated(), &changes), Status::ErrorRealm(0));
}

#[test]
fn rec_enter_reports_inputs_before_states() {
    let host = Host::new();
    let realm = host.realm();
    let rec = host.rec(&realm, 0, true);
    let second = host.rec(&realm, 1, false);
    let enter = |rec: u64, run: u64| host.status(fid::REC_ENTER, &[rec, run]);
    assert_eq!(enter(rec.rec, rec.run + 8), INPUT);
    assert_eq!(enter(rec.rec, rec.aux), INPUT);
    assert_eq!(enter(rec.aux, rec.run), INPUT);
    assert_eq!(enter(rec.rec + 1, rec.run), INPUT);
    assert_eq!(enter(rec.rec, rec.run), Status::ErrorRealm(0));
    host.activate(&realm);
    assert_eq!(enter(second.rec, second.run), Status::ErrorRec, "not runnable");
    host.flags(&rec, 1);
    assert_eq!(enter(rec.rec, rec.run), Status::ErrorRec, "nothing to emulate");
    host.flags(&rec, 3);
    assert_eq!(enter(rec.rec, rec.run), Status::Success, "inject_sea wins, and has nothing to do");
    host.flags(&rec, 0);
    host.write_ns_word(rec.run, 0x300, 1);
    assert_eq!(enter(rec.rec, rec.run), Status::ErrorRec, "a control bit that is not the host's");
    host.write_ns_word(rec.run, 0x300, 0);
    host.write_ns_word(rec.run, 0x308, 1 << 61);
    assert_eq!(enter(rec.rec, rec.run), Status::ErrorRec, "a hardware interrupt");
}

#[test]
fn table_commands_check_level_and_alignment() {
    let host = Host::new();
    let realm = host.realm();
    let rtt = host.delegated();
    let create = |ipa: u64, level: u64| host.status(fid::RTT_CREATE, &[realm.rd, rtt, ipa, level]);
    assert_eq!(create(0, 1), INPUT, "the start level");
    assert_eq!(create(0, 4), INPUT);
    assert_eq!(create(0, u64::MAX), INPUT);
    assert_eq!(create(0x20_0000, 2), INPUT, "not aligned to the parent's span");
    assert_eq!(create(SHARED * 2, 2), INPUT, "outside");
    assert_eq!(create(0, 3), Status::ErrorRtt(1), "the level above is missing");
    assert_eq!(host.status(fid::RTT_CREATE, &[realm.rd, realm.rd, 0, 2]), INPUT);
    assert_eq!(host.status(fid::RTT_CREATE, &[rtt, rtt, 0, 2]), INPUT);
    assert_eq!(create(0, 2), Status::Success);
    let another = host.delegated();
    assert_eq!(host.status(fid::RTT_CREATE, &[realm.rd, another, 0, 2]), Status::ErrorRtt(1));
    assert_eq!(host.registers(fid::RTT_READ_ENTRY, &[realm.rd, 8, 1, 9])[..5], [1, 0, 0, 0, 0]);
    assert_eq!(host.status(fid::RTT_READ_ENTRY, &[realm.rd, 0, 0]), INPUT, "above the start level");
}

#[test]
fn shared_mappings_check_the_descriptor_first() {
    let host = Host::new();
    let realm = host.realm();
    host.tables(&realm, SHARED, 3);
    let map = |rd: u64, ipa: u64, level: u64, desc: u64| {
        host.status(fid::RTT_MAP_UNPROTECTED, &[rd, ipa, level, desc])
    };
    assert_eq!(map(realm.rd, SHARED, 3, 1), INPUT);
    assert_eq!(map(realm.rd, SHARED, 3, 4 << 2), INPUT);
    assert_eq!(map(realm.rd, SHARED, 0, 0), INPUT);
    assert_eq!(map(realm.rd, SHARED, 2, 0x1000), INPUT, "address not aligned to a block");
    assert_eq!(map(realm.rd, SHARED + 0x1000, 2, 0), INPUT);
    assert_eq!(map(realm.rd, 0, 3, 0), INPUT, "protected");
    assert_eq!(map(realm.rd, SHARED * 2, 3, 0), INPUT, "outside");
    assert_eq!(map(realm.rd, SHARED, 2, 0x20_0000), Status::ErrorRtt(2), "a table is there");
    assert_eq!(map(realm.rd, SHARED + 0x4000_0000, 2, 0), Status::ErrorRtt(1), "no table is there");
    assert_eq!(map(realm.rd, SHARED, 3, 0x4000_0000 | 7 << 2 | 1 << 6), Status::Success);
    assert_eq!(map(realm.rd, SHARED, 3, 0), Status::ErrorRtt(3));
    assert_eq!(host.read_entry(&realm, SHARED, 3), [3, 1, 0x4000_0000 | 7 << 2 | 1 << 6, 0]);
}

#[test]
fn a_rec_that_runs_cannot_be_touched() {
    use crate::platform::RealmExit;
    extern crate std;
    let host = std::sync::Arc::new(Host::new());
    let (realm, rec) = host.active();
    let inner = std::sync::Arc::clone(&host);
    let (rec_pa, run, rd) = (rec.rec, rec.run, realm.rd);
    host.guest(move |_| {
        assert_eq!(inner.status(fid::REC_DESTROY, &[rec_pa]), Status::ErrorRec);
        assert_eq!(inner.status(fid::REC_ENTER, &[rec_pa, run]), Status::ErrorRec);
        assert_eq!(inner.status(fid::RTT_SET_RIPAS, &[rd, rec_pa, 0, 0x1000]), Status::ErrorRec);
        assert_eq!(inner.status(fid::REALM_DESTROY, &[rd]), Status::ErrorRealm(0));
        RealmExit::Fiq
    });
    assert_eq!(host.enter_ok(&rec).exit_reason, 2);
    host.ok(fid::REC_DESTROY, &[rec.rec]);
}
