//! Fold, unfold, destruction of tables, and the RIPAS transitions.

use core::sync::atomic::Ordering::Relaxed;

use cca_abi::rmi::fid;
use cca_abi::rsi;

use super::host::{Host, SHARED, TestRealm, TestRec};

const EMPTY: u64 = 0;
const RAM: u64 = 1;
const DESTROYED: u64 = 2;
const UNASSIGNED: u64 = 0;
const ASSIGNED: u64 = 1;

/// The guest asks for a RIPAS change; the REC is left with the request open.
fn request(host: &Host, rec: &TestRec, base: u64, top: u64, ripas: u64, flags: u64) {
    host.guest_smc(rsi::fid::IPA_STATE_SET, &[base, top, ripas, flags]);
    assert_eq!(host.enter_ok(rec).exit_reason, 4);
}

fn set(host: &Host, realm: &TestRealm, rec: &TestRec, base: u64, top: u64) -> [u64; 2] {
    let regs = host.registers(fid::RTT_SET_RIPAS, &[realm.rd, rec.rec, base, top]);
    [regs[0], regs[1]]
}

#[test]
fn a_new_table_inherits_its_parents_ripas() {
    let host = Host::new();
    let realm = host.realm();
    host.ok(fid::RTT_INIT_RIPAS, &[realm.rd, 0, 0x4000_0000]);
    host.tables(&realm, 0, 2);
    assert_eq!(host.read_entry(&realm, 0x20_0000, 2), [2, UNASSIGNED, 0, RAM]);
    host.tables(&realm, 0, 3);
    assert_eq!(host.read_entry(&realm, 0x1F_F000, 3), [3, UNASSIGNED, 0, RAM]);
    // And folds back into one entry.
    host.ok(fid::RTT_FOLD, &[realm.rd, 0, 3]);
    host.ok(fid::RTT_FOLD, &[realm.rd, 0, 2]);
    assert_eq!(host.read_entry(&realm, 0, 1), [1, UNASSIGNED, 0, RAM]);
}

#[test]
fn contiguous_pages_fold_into_a_block_that_can_be_split_again() {
    let host = Host::new();
    let realm = host.realm();
    host.tables(&realm, 0, 3);
    let first = host.alloc_aligned(0x20_0000);
    for n in 1..512 {
        assert_eq!(host.alloc(), first + n * 4096);
    }
    for n in 0..512u64 {
        let data = first + n * 4096;
        host.ok(fid::GRANULE_DELEGATE, &[data]);
        if n == 511 {
            let regs = host.registers(fid::RTT_FOLD, &[realm.rd, 0, 3]);
            assert_eq!(regs[0], 0x0304, "not homogeneous yet");
        }
        host.ok(fid::DATA_CREATE_UNKNOWN, &[realm.rd, data, n * 4096]);
    }
    // RIPAS differs in one entry.
    let [table, ..] = host.ok(fid::RTT_FOLD, &[realm.rd, 0, 3]);
    assert_eq!(host.read_entry(&realm, 0, 3), [2, ASSIGNED, first, EMPTY]);
    host.ok(fid::GRANULE_UNDELEGATE, &[table]);

    // Inside a block there is no page to destroy, and nothing to skip.
    let regs = host.registers(fid::DATA_DESTROY, &[realm.rd, 0x5000]);
    assert_eq!(regs[..3], [0x0204, 0, 0x5000]);
    let regs = host.registers(fid::RTT_DESTROY, &[realm.rd, 0, 3]);
    assert_eq!(regs[..3], [0x0204, 0, 0]);

    let table = host.delegated();
    host.ok(fid::RTT_CREATE, &[realm.rd, table, 0, 3]);
    assert_eq!(host.read_entry(&realm, 0x1F_F000, 3), [3, ASSIGNED, first + 0x1F_F000, EMPTY]);
    assert_eq!(host.registers(fid::RTT_DESTROY, &[realm.rd, 0, 3])[..3], [0x0304, 0, 0], "live");
    for n in 0..512u64 {
        let top = if n == 511 { 0x20_0000 } else { (n + 1) * 4096 };
        assert_eq!(host.ok(fid::DATA_DESTROY, &[realm.rd, n * 4096])[..2], [first + n * 4096, top]);
    }
    host.ok(fid::RTT_DESTROY, &[realm.rd, 0, 3]);
}

#[test]
fn a_destroyed_table_leaves_destroyed_memory() {
    let host = Host::new();
    let realm = host.realm();
    host.tables(&realm, 0, 3);
    let [_, top, ..] = host.ok(fid::RTT_DESTROY, &[realm.rd, 0, 3]);
    assert_eq!(top, 0x4000_0000);
    assert_eq!(host.read_entry(&realm, 0, 2), [2, UNASSIGNED, 0, DESTROYED]);
    assert_eq!(host.registers(fid::RTT_DESTROY, &[realm.rd, 0, 3])[..3], [0x0204, 0, 0x4000_0000]);
    host.tables(&realm, SHARED, 2);
    host.ok(fid::RTT_MAP_UNPROTECTED, &[realm.rd, SHARED, 2, 0x4000_0000]);
    let before = host.rmm.platform().tlbis.load(Relaxed);
    host.ok(fid::RTT_DESTROY, &[realm.rd, SHARED, 2]);
    assert!(host.rmm.platform().tlbis.load(Relaxed) > before);
    assert_eq!(host.read_entry(&realm, SHARED, 1), [1, UNASSIGNED, 0, 0]);
}

#[test]
fn unmapping_reports_how_far_to_skip() {
    let host = Host::new();
    let realm = host.realm();
    host.tables(&realm, SHARED, 3);
    let unmap = |ipa: u64, level: u64| {
        let regs = host.registers(fid::RTT_UNMAP_UNPROTECTED, &[realm.rd, ipa, level]);
        [regs[0], regs[1]]
    };
    assert_eq!(unmap(SHARED, 2), [0x0204, SHARED], "a table: look below");
    assert_eq!(unmap(SHARED, 3), [0x0304, SHARED + 0x20_0000]);
    host.ok(fid::RTT_MAP_UNPROTECTED, &[realm.rd, SHARED + 0x3000, 3, 0x1000]);
    host.ok(fid::RTT_MAP_UNPROTECTED, &[realm.rd, SHARED + 0x5000, 3, 0x1000]);
    assert_eq!(unmap(SHARED, 3), [0x0304, SHARED + 0x3000]);
    assert_eq!(unmap(SHARED + 0x3000, 3), [0, SHARED + 0x5000]);
    assert_eq!(unmap(SHARED + 0x5000, 3), [0, SHARED + 0x20_0000]);
    assert_eq!(unmap(0, 3), [1, 0]);
}

#[test]
fn shared_blocks_split_and_fold() {
    let host = Host::new();
    let realm = host.realm();
    host.tables(&realm, SHARED, 2);
    let desc = 0x4000_0000 | 6 << 2 | 3 << 6;
    host.ok(fid::RTT_MAP_UNPROTECTED, &[realm.rd, SHARED, 2, desc]);
    host.tables(&realm, SHARED, 3);
    assert_eq!(host.read_entry(&realm, SHARED + 0x7000, 3), [3, ASSIGNED, desc + 0x7000, 0]);
    host.ok(fid::RTT_FOLD, &[realm.rd, SHARED, 3]);
    assert_eq!(host.read_entry(&realm, SHARED, 3), [2, ASSIGNED, desc, 0]);
}

#[test]
fn init_ripas_stops_at_tables_and_at_the_end() {
    let host = Host::new();
    let realm = host.realm();
    let init = |base: u64, top: u64| {
        let regs = host.registers(fid::RTT_INIT_RIPAS, &[realm.rd, base, top]);
        [regs[0], regs[1]]
    };
    assert_eq!(init(0, 0), [1, 0]);
    assert_eq!(init(0, 0x1008), [1, 0]);
    assert_eq!(init(0, SHARED + 0x1000), [1, 0]);
    assert_eq!(init(0, 0x1000), [0x0104, 0], "needs a deeper table");
    assert_eq!(init(0x1000, 0x4000_0000), [0x0104, 0], "base is not an entry's");
    host.tables(&realm, 0x4000_0000, 2);
    assert_eq!(init(0, 0x8000_0000), [0, 0x4000_0000]);
    assert_eq!(init(0x4000_0000, 0x4030_0000), [0, 0x4020_0000], "rounded down to whole entries");
    assert_eq!(init(0x8000_0000, SHARED), [0, SHARED]);
    host.activate(&realm);
    assert_eq!(init(0, 0x4000_0000), [0x0002, 0]);
}

#[test]
fn ripas_and_hipas_change_as_the_table_says() {
    for (flags, from_destroyed) in [(0, false), (rsi::CHANGE_DESTROYED, true)] {
        for value in [EMPTY, RAM] {
            let host = Host::new();
            let realm = host.realm();
            let rec = host.rec(&realm, 0, true);
            host.tables(&realm, 0, 3);
            host.ok(fid::RTT_INIT_RIPAS, &[realm.rd, 0x1000, 0x2000]);
            let unknown = |ipa: u64| {
                let data = host.delegated();
                host.ok(fid::DATA_CREATE_UNKNOWN, &[realm.rd, data, ipa]);
            };
            // 0 U/E, 1 U/R, 2 U/D, 3 A/E, 4 A/R, 5 A/D
            for ipa in [0x2000, 0x5000] {
                host.page(&realm, ipa);
                host.ok(fid::DATA_DESTROY, &[realm.rd, ipa]);
            }
            unknown(0x3000);
            host.page(&realm, 0x4000);
            unknown(0x5000);
            host.activate(&realm);
            let entries = |ipa: u64| {
                let [_, hipas, _, ripas] = host.read_entry(&realm, ipa, 3);
                (hipas, ripas)
            };
            let before = [(0, EMPTY), (0, RAM), (0, DESTROYED), (1, EMPTY), (1, RAM), (1, DESTROYED)];
            for (n, expected) in (0u64..).zip(before) {
                assert_eq!(entries(n * 4096), expected);
            }
            for (n, (hipas, ripas)) in (0u64..).zip(before) {
                let ipa = n * 4096;
                request(&host, &rec, ipa, ipa + 4096, value, flags);
                let result = set(&host, &realm, &rec, ipa, ipa + 4096);
                if ripas == DESTROYED && !from_destroyed {
                    assert_eq!(result, [0x0304, 0]);
                    assert_eq!(entries(ipa), (hipas, DESTROYED));
                } else {
                    assert_eq!(result, [0, ipa + 4096]);
                    assert_eq!(entries(ipa), (hipas, value));
                }
            }
            // DATA_DESTROY of every assigned entry.
            for ipa in [0x3000, 0x4000, 0x5000] {
                let (_, ripas) = entries(ipa);
                host.ok(fid::DATA_DESTROY, &[realm.rd, ipa]);
                let after = if ripas == EMPTY { EMPTY } else { DESTROYED };
                assert_eq!(entries(ipa), (UNASSIGNED, after));
            }
        }
    }
}

#[test]
fn set_ripas_follows_the_request_only() {
    let host = Host::new();
    let (realm, rec) = host.active();
    let other = host.realm_with(0, 8);
    host.tables(&realm, 0, 3);
    assert_eq!(set(&host, &realm, &rec, 0, 0x1000), [1, 0], "there is no request");
    request(&host, &rec, 0x1000, 0x4000, RAM, 0);
    assert_eq!(set(&host, &other, &rec, 0x1000, 0x2000), [3, 0], "another Realm's REC");
    assert_eq!(set(&host, &realm, &rec, 0x2000, 0x4000), [1, 0], "not where the request begins");
    assert_eq!(set(&host, &realm, &rec, 0x1000, 0x5000), [1, 0], "beyond the request");
    assert_eq!(set(&host, &realm, &rec, 0x1000, 0x1000), [1, 0]);
    assert_eq!(set(&host, &realm, &rec, 0x1000, 0x1800), [1, 0]);
    assert_eq!(set(&host, &realm, &rec, 0x1000, 0x2000), [0, 0x2000]);
    assert_eq!(set(&host, &realm, &rec, 0x2000, 0x4000), [0, 0x4000]);
    // The Realm learns how far the host came.
    host.guest(|ctx| {
        assert_eq!([ctx.gpr(0), ctx.gpr(1), ctx.gpr(2)], [0, 0x4000, rsi::ACCEPT]);
        crate::platform::RealmExit::Irq
    });
    host.enter_ok(&rec);
    assert_eq!(set(&host, &realm, &rec, 0x4000, 0x5000), [1, 0], "the request is over");
}

#[test]
fn revoking_a_mapped_page_invalidates_the_tlb() {
    let host = Host::new();
    let realm = host.realm();
    let rec = host.rec(&realm, 0, true);
    host.page(&realm, 0);
    host.page(&realm, 0x1000);
    host.activate(&realm);
    request(&host, &rec, 0, 0x2000, EMPTY, rsi::CHANGE_DESTROYED);
    let before = host.rmm.platform().tlbis.load(Relaxed);
    assert_eq!(set(&host, &realm, &rec, 0, 0x2000), [0, 0x2000]);
    assert!(host.rmm.platform().tlbis.load(Relaxed) > before);
}
