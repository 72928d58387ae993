//! Exits, their completion, and what crosses between host and Realm.

use core::sync::atomic::Ordering::Relaxed;

use cca_abi::psci;
use cca_abi::rmi::{ExitReason, RecExit, Status, fid};
use cca_abi::rsi;

use super::host::{Host, SHARED};
use crate::context::word;
use crate::platform::RealmExit;

const DATA_ABORT: u64 = 0x24 << 26 | 1 << 25 | 0x07;
const ISV: u64 = 1 << 24;
const WORD_ACCESS: u64 = 2 << 22;
const WNR: u64 = 1 << 6;
const X5: u64 = 5 << 16;

fn abort(esr: u64, far: u64, ipa: u64) -> RealmExit {
    RealmExit::Sync { esr, far, hpfar: ipa >> 8 & !0xF }
}

fn reason(exit: &RecExit) -> u8 {
    exit.exit_reason
}

#[test]
fn a_rec_starts_as_its_parameters_say() {
    let host = Host::new();
    let (_, rec) = host.active();
    host.guest(|ctx| {
        assert_eq!(ctx.pc(), 0x1000);
        assert_eq!(ctx.get(word::PSTATE), 0x3C5);
        assert_eq!((ctx.gpr(0), ctx.gpr(7), ctx.gpr(8)), (0xA0, 0xA7, 0));
        assert_eq!(ctx.get(word::VMPIDR_EL2), 1 << 31);
        assert_eq!(ctx.get(word::VTTBR_EL2) >> 48, 7);
        assert_eq!(ctx.get(word::HCR_EL2), 0x0400_433C_801C_063F);
        // RES1, NSA, VS, 48-bit PS, SL0 for level 1, write-back walks, T0SZ.
        assert_eq!(ctx.get(word::VTCR_EL2), 0xC000_3500 | 1 << 19 | 5 << 16 | 1 << 6 | 30);
        RealmExit::Irq
    });
    let exit = host.enter_ok(&rec);
    assert_eq!(reason(&exit), ExitReason::Irq as u8);
    assert_eq!(exit.gprs, [0; 31], "no register of the Realm is visible");
}

#[test]
fn an_emulated_load_and_store_cross_the_boundary_and_nothing_else_does() {
    let host = Host::new();
    let (_, rec) = host.active();
    host.guest(|ctx| {
        ctx.set_gpr(5, 0xFFFF_FFFF_1234_5678);
        abort(DATA_ABORT | ISV | WORD_ACCESS | X5 | WNR | 1 << 21, 0xFFFF_0000_0000_0124, SHARED + 0x9000)
    });
    let exit = host.enter_ok(&rec);
    assert_eq!(reason(&exit), 0);
    assert_eq!(exit.esr, 0x24 << 26 | ISV | WORD_ACCESS | WNR | 0x07);
    assert_eq!(exit.far, 0x124);
    assert_eq!(exit.hpfar, (SHARED + 0x9000) >> 8);
    assert_eq!((exit.gprs[0], exit.gprs[5]), (0x1234_5678, 0));
    // Emulated: the REC goes on behind the instruction; then it loads.
    host.flags(&rec, 1);
    host.guest(|ctx| {
        assert_eq!(ctx.pc(), 0x1004);
        abort(DATA_ABORT | ISV | WORD_ACCESS | X5, 0x124, SHARED + 0x9000)
    });
    assert_eq!(host.enter_ok(&rec).gprs[0], 0, "a load shows no register");
    host.write_ns_word(rec.run, 0x200, 0xAAAA_BBBB_CCCC_DDDD);
    host.guest(|ctx| {
        assert_eq!((ctx.pc(), ctx.gpr(5)), (0x1008, 0xCCCC_DDDD));
        RealmExit::Irq
    });
    host.enter_ok(&rec);
    assert_eq!(host.enter(&rec), Status::ErrorRec, "the access was completed");
}

#[test]
fn an_access_without_syndrome_is_not_emulatable_but_may_be_refused() {
    let host = Host::new();
    let (_, rec) = host.active();
    host.guest(|ctx| {
        ctx.set_gpr(0, 0x5EC2E7);
        abort(DATA_ABORT | WNR, 0x1_0124, SHARED)
    });
    let exit = host.enter_ok(&rec);
    assert_eq!((exit.esr, exit.far, exit.gprs[0]), (DATA_ABORT, 0, 0));
    host.flags(&rec, 1);
    assert_eq!(host.enter(&rec), Status::ErrorRec);
    host.flags(&rec, 2);
    host.ctx(&rec).set(word::VBAR_EL1, 0x8000);
    host.guest(|ctx| {
        assert_eq!(ctx.pc(), 0x8200);
        assert_eq!(ctx.get(word::ELR_EL1), 0x1000);
        assert_eq!(ctx.get(word::FAR_EL1), 0x1_0124);
        assert_eq!(ctx.get(word::SPSR_EL1), 0x3C5);
        assert_eq!(ctx.get(word::ESR_EL1), 0x25 << 26 | 1 << 25 | 1 << 9 | WNR | 0x10);
        RealmExit::Irq
    });
    host.enter_ok(&rec);
}

#[test]
fn protected_aborts_go_to_whom_they_belong() {
    let host = Host::new();
    let realm = host.realm();
    let rec = host.rec(&realm, 0, true);
    host.tables(&realm, 0, 3);
    host.ok(fid::RTT_INIT_RIPAS, &[realm.rd, 0x1000, 0x2000]);
    host.page(&realm, 0x2000);
    host.ok(fid::DATA_DESTROY, &[realm.rd, 0x2000]);
    host.page(&realm, 0x3000);
    host.activate(&realm);
    // RAM without a page, and DESTROYED: the host's.
    for ipa in [0x1000, 0x2000] {
        host.guest(move |_| abort(DATA_ABORT | ISV | X5 | WNR, ipa + 8, ipa));
        let exit = host.enter_ok(&rec);
        assert_eq!((exit.esr, exit.far, exit.hpfar), (0x24 << 26 | 7, 0, ipa >> 8));
        host.guest(move |_| abort(0x20 << 26 | 1 << 25 | 7, ipa, ipa));
        assert_eq!(host.enter_ok(&rec).esr, 0x20 << 26 | 7);
    }
    // EMPTY: the Realm's. A page that has come meanwhile: retried.
    host.guest(|_| abort(DATA_ABORT, 0x88, 0));
    host.guest(|ctx| {
        assert_eq!((ctx.pc(), ctx.get(word::FAR_EL1)), (0x200, 0x88));
        assert_eq!(ctx.get(word::ESR_EL1), 0x25 << 26 | 1 << 25 | 1 << 9 | 0x10);
        ctx.set(word::PC, 0x1000);
        abort(DATA_ABORT, 0x3000, 0x3000)
    });
    host.guest(|ctx| {
        assert_eq!(ctx.pc(), 0x1000);
        // Beyond the address space, MMU on: the Realm's level 1 table, which is on its page, has no table below.
        ctx.set(word::SCTLR_EL1, 1);
        ctx.set(word::TCR_EL1, 25);
        ctx.set(word::TTBR0_EL1, 0x3000);
        abort(DATA_ABORT, 0x99, SHARED * 2)
    });
    host.guest(|ctx| {
        assert_eq!(ctx.get(word::ESR_EL1), 0x25 << 26 | 1 << 25 | 1);
        // An instruction fetch from shared memory.
        abort(0x20 << 26 | 1 << 25 | 7, 0x77, SHARED)
    });
    host.guest(|ctx| {
        assert_eq!(ctx.get(word::ESR_EL1), 0x21 << 26 | 1 << 25 | 1 << 9 | 0x10);
        RealmExit::Irq
    });
    assert_eq!(reason(&host.enter_ok(&rec)), 1);
}

#[test]
fn hypercalls_are_undefined_and_unknown_calls_not_supported() {
    let host = Host::new();
    let (_, rec) = host.active();
    host.guest(|ctx| {
        ctx.set(word::PC, 0x1004);
        RealmExit::Sync { esr: 0x16 << 26 | 1 << 25, far: 0, hpfar: 0 }
    });
    host.guest(|ctx| {
        assert_eq!((ctx.pc(), ctx.get(word::ELR_EL1), ctx.get(word::ESR_EL1)), (0x200, 0x1000, 1 << 25));
        RealmExit::Sync { esr: 0x07 << 26, far: 0, hpfar: 0 }
    });
    host.guest(|ctx| {
        assert_eq!((ctx.pc(), ctx.get(word::ELR_EL1)), (0x200, 0x200));
        RealmExit::Irq
    });
    host.enter_ok(&rec);
    for (id, answer) in [(0x8000_0001u64, u64::MAX), (0x8000_0000, 0x10002), (0x8400_0000, 0x10001)] {
        host.guest_smc(id, &[]);
        host.guest(move |ctx| {
            assert_eq!((ctx.gpr(0), ctx.gpr(1)), (answer, 0));
            RealmExit::Irq
        });
        host.enter_ok(&rec);
    }
    host.guest_smc(rsi::fid::VERSION, &[0x10000]);
    host.guest(|ctx| {
        assert_eq!([ctx.gpr(0), ctx.gpr(1), ctx.gpr(2)], [0, 0x10000, 0x10000]);
        RealmExit::Irq
    });
    host.enter_ok(&rec);
}

#[test]
fn interrupts_wait_and_forwarded_registers_leave() {
    let host = Host::new();
    let (_, rec) = host.active();
    host.guest(|_| RealmExit::Sync { esr: 0x01 << 26 | 1 << 25 | 1, far: 0, hpfar: 0 });
    let exit = host.enter_ok(&rec);
    assert_eq!((exit.esr, exit.gprs[0]), (0x01 << 26 | 1, 0));
    host.guest(|ctx| {
        assert_eq!(ctx.pc(), 0x1004);
        ctx.set_gpr(3, 0xF00D);
        RealmExit::Sync { esr: 0x01 << 26 | 1 << 25 | 3 << 5 | 2, far: 0, hpfar: 0 }
    });
    assert_eq!(host.enter_ok(&rec).gprs[0], 0xF00D, "WFIT shows its deadline");
    // T32 at EL0: IL is clear.
    host.guest(|_| RealmExit::Sync { esr: 0x01 << 26, far: 0, hpfar: 0 });
    host.enter_ok(&rec);
    assert_eq!(host.ctx(&rec).pc(), 0x100A);
    let sgi = 0x18 << 26 | 1 << 25 | 3 << 20 | 5 << 17 | 12 << 10 | 3 << 5 | 11 << 1;
    host.guest(move |_| RealmExit::Sync { esr: sgi, far: 0, hpfar: 0 });
    let exit = host.enter_ok(&rec);
    assert_eq!((exit.esr, exit.gprs[0]), (sgi, 0xF00D));
    assert_eq!(host.ctx(&rec).pc(), 0x100E);
    host.flags(&rec, 1 << 2 | 1 << 3);
    host.guest(|ctx| {
        assert_eq!(ctx.get(word::HCR_EL2) & (3 << 13), 3 << 13);
        RealmExit::Irq
    });
    host.enter_ok(&rec);
}

#[test]
fn an_asserted_timer_is_reported_once_and_masked_from_then_on() {
    let host = Host::new();
    let (_, rec) = host.active();
    host.guest(|ctx| {
        assert_eq!(ctx.get(word::CNTHCTL_EL2), 0xC00);
        ctx.set(word::CNTV_CTL, 0b101);
        ctx.set(word::CNTV_CVAL, 77);
        RealmExit::Irq
    });
    let exit = host.enter_ok(&rec);
    assert_eq!((exit.cntv_ctl, exit.cntv_cval), (5, 77));
    host.guest(|ctx| {
        assert_eq!(ctx.get(word::CNTHCTL_EL2), 0xC00 | 1 << 18);
        // The Realm re-arms the timer; the next look finds it changed.
        ctx.set(word::CNTV_CTL, 0b001);
        RealmExit::Sync { esr: 0x18 << 26 | 3 << 20 | 4 << 1 | 1, far: 0, hpfar: 0 }
    });
    let exit = host.enter_ok(&rec);
    assert_eq!((reason(&exit), exit.cntv_ctl), (1, 1));
    assert!(host.rmm.platform().script.lock().unwrap().is_empty());
}

#[test]
fn list_registers_pass_through_the_rec() {
    let host = Host::new();
    let (_, rec) = host.active();
    let lr = 1 << 62 | 1 << 60 | 27;
    host.write_ns_word(rec.run, 0x300, 0x4002);
    host.write_ns_word(rec.run, 0x310, lr);
    host.guest(move |ctx| {
        assert_eq!((ctx.get(word::ICH_HCR), ctx.get(word::ICH_LR + 1)), (0x4003, lr));
        ctx.set(word::ICH_LR + 1, 27);
        ctx.set(word::ICH_HCR, 0x4003 | 2 << 27);
        ctx.set(word::ICH_VMCR, 5);
        ctx.set(word::ICH_MISR, 1);
        RealmExit::Irq
    });
    let exit = host.enter_ok(&rec);
    assert_eq!((exit.gicv3_hcr, exit.gicv3_lrs[1]), (0x4002 | 2 << 27, 27));
    assert_eq!((exit.gicv3_vmcr, exit.gicv3_misr), (5, 1));
}

#[test]
fn a_host_call_goes_out_and_its_answer_comes_back() {
    let host = Host::new();
    let realm = host.realm();
    let rec = host.rec(&realm, 0, true);
    let data = host.page(&realm, 0x2000);
    host.activate(&realm);
    let page = || host.rmm.platform().raw(data);
    page()[0x100 / 8].store(0xFFFF_FFFF_0000_002A, Relaxed);
    page()[0x108 / 8].store(11, Relaxed);
    page()[0x1F8 / 8].store(41, Relaxed);
    host.guest_smc(rsi::fid::HOST_CALL, &[0x2100]);
    let exit = host.enter_ok(&rec);
    assert_eq!((reason(&exit), exit.imm, exit.gprs[0], exit.gprs[30]), (5, 0x2A, 11, 41));
    host.write_ns_word(rec.run, 0x200, 111);
    host.write_ns_word(rec.run, 0x2F0, 141);
    // The page goes away before the answer: the host is asked to bring one.
    host.ok(fid::DATA_DESTROY, &[realm.rd, 0x2000]);
    let exit = host.enter_ok(&rec);
    assert_eq!((reason(&exit), exit.esr, exit.hpfar), (0, 0x9000_0007, 0x20));
    host.ok(fid::DATA_CREATE_UNKNOWN, &[realm.rd, data, 0x2000]);
    let exit = host.enter_ok(&rec);
    assert_eq!(exit.esr, 0x9000_0007, "a DESTROYED page stays so");
    for bad in [0x2080, SHARED, 0x2101] {
        let other = Host::new();
        let (_, rec) = other.active();
        other.guest_smc(rsi::fid::HOST_CALL, &[bad]);
        other.guest(|ctx| {
            assert_eq!(ctx.gpr(0), 1);
            RealmExit::Irq
        });
        other.enter_ok(&rec);
    }
}

#[test]
fn a_host_calls_answer_is_written_to_memory() {
    let host = Host::new();
    let realm = host.realm();
    let rec = host.rec(&realm, 0, true);
    let data = host.page(&realm, 0x2000);
    host.activate(&realm);
    host.guest_smc(rsi::fid::HOST_CALL, &[0x2100]);
    host.enter_ok(&rec);
    host.write_ns_word(rec.run, 0x200, 111);
    host.write_ns_word(rec.run, 0x2F0, 141);
    host.guest(|ctx| {
        assert_eq!((ctx.gpr(0), ctx.pc()), (0, 0x1004));
        RealmExit::Irq
    });
    assert_eq!(reason(&host.enter_ok(&rec)), 1);
    let page = host.rmm.platform().raw(data);
    assert_eq!((page[0x108 / 8].load(Relaxed), page[0x1F8 / 8].load(Relaxed)), (111, 141));
}

#[test]
fn realm_config_is_written_or_the_page_asked_for() {
    let host = Host::new();
    let realm = host.realm();
    let rec = host.rec(&realm, 0, true);
    host.tables(&realm, 0, 3);
    host.ok(fid::RTT_INIT_RIPAS, &[realm.rd, 0x1000, 0x2000]);
    host.activate(&realm);
    host.guest_smc(rsi::fid::REALM_CONFIG, &[0x1000]);
    let exit = host.enter_ok(&rec);
    assert_eq!((exit.esr, exit.hpfar), (0x9000_0007, 0x10));
    assert_eq!(host.ctx(&rec).pc(), 0x1000, "the call is repeated");
    let data = host.delegated();
    host.ok(fid::DATA_CREATE_UNKNOWN, &[realm.rd, data, 0x1000]);
    host.guest_smc(rsi::fid::REALM_CONFIG, &[0x1000]);
    host.guest(|ctx| {
        assert_eq!((ctx.gpr(0), ctx.pc()), (0, 0x1004));
        RealmExit::Irq
    });
    host.enter_ok(&rec);
    let page = host.rmm.platform().raw(data);
    assert_eq!([0, 1, 0x40].map(|n| page[n].load(Relaxed)), [34, 0, 0x1122]);
    // An EMPTY page is the Realm's mistake.
    host.guest_smc(rsi::fid::REALM_CONFIG, &[0x5000]);
    host.guest(|ctx| {
        assert_eq!(ctx.gpr(0), 1);
        RealmExit::Irq
    });
    host.enter_ok(&rec);
}

#[test]
fn a_rejected_ripas_change_is_told_only_for_ram() {
    let host = Host::new();
    let (_, rec) = host.active();
    for (ripas, response) in [(1, rsi::REJECT), (0, rsi::ACCEPT)] {
        host.guest_smc(rsi::fid::IPA_STATE_SET, &[0x1000, 0x2000, ripas, 0]);
        let exit = host.enter_ok(&rec);
        assert_eq!((exit.ripas_base, exit.ripas_top), (0x1000, 0x2000));
        assert_eq!(u64::from(exit.ripas_value), ripas);
        host.flags(&rec, 1 << 4);
        host.guest(move |ctx| {
            assert_eq!([ctx.gpr(0), ctx.gpr(1), ctx.gpr(2)], [0, 0x1000, response]);
            RealmExit::Irq
        });
        host.enter_ok(&rec);
        host.flags(&rec, 0);
    }
    for bad in
        [[0x1000, 0x1000, 1], [0x1008, 0x2000, 1], [0, SHARED + 0x1000, 1], [0, 0x1000, 2], [0, 0x1800, 1]]
    {
        host.guest_smc(rsi::fid::IPA_STATE_SET, &bad);
        host.guest(|ctx| {
            assert_eq!(ctx.gpr(0), 1);
            RealmExit::Irq
        });
        host.enter_ok(&rec);
    }
}

#[test]
fn ipa_state_get_reports_a_range_of_one_state() {
    let host = Host::new();
    let realm = host.realm();
    let rec = host.rec(&realm, 0, true);
    host.tables(&realm, 0, 3);
    host.ok(fid::RTT_INIT_RIPAS, &[realm.rd, 0x1000, 0x4000]);
    host.activate(&realm);
    for (base, top, out_top, ripas) in [
        (0, 0x10000, 0x1000, 0),
        (0x1000, 0x10000, 0x4000, 1),
        (0x2000, 0x3000, 0x3000, 1),
        (0x4000, SHARED, 0x20_0000, 0),
    ] {
        host.guest_smc(rsi::fid::IPA_STATE_GET, &[base, top]);
        host.guest(move |ctx| {
            assert_eq!([ctx.gpr(0), ctx.gpr(1), ctx.gpr(2)], [0, out_top, ripas]);
            RealmExit::Irq
        });
        host.enter_ok(&rec);
    }
}

#[test]
fn cpu_on_starts_another_rec_when_the_host_agrees() {
    let host = Host::new();
    let realm = host.realm();
    let first = host.rec(&realm, 0, true);
    let second = host.rec(&realm, 1, false);
    host.activate(&realm);
    host.guest_smc(psci::fid::CPU_ON_64, &[1, 0x7000, 0xC0DE]);
    let exit = host.enter_ok(&first);
    assert_eq!((reason(&exit), exit.gprs[0], exit.gprs[1], exit.gprs[2]), (3, psci::fid::CPU_ON_64, 1, 0));
    assert_eq!(host.enter(&first), Status::ErrorRec, "the request is open");
    let complete = |status: i64| host.status(fid::PSCI_COMPLETE, &[first.rec, second.rec, status as u64]);
    assert_eq!(host.status(fid::PSCI_COMPLETE, &[first.rec, first.rec, 0]), Status::ErrorInput);
    assert_eq!(host.status(fid::PSCI_COMPLETE, &[second.rec, first.rec, 0]), Status::ErrorInput);
    assert_eq!(complete(-2), Status::ErrorInput);
    assert_eq!(complete(0), Status::Success);
    assert_eq!(complete(0), Status::ErrorInput, "completed once");
    host.guest(|ctx| {
        assert_eq!([ctx.gpr(0), ctx.gpr(1), ctx.gpr(2), ctx.gpr(3)], [0; 4]);
        RealmExit::Irq
    });
    host.enter_ok(&first);
    host.guest(|ctx| {
        assert_eq!(
            (ctx.pc(), ctx.gpr(0), ctx.gpr(1), ctx.get(word::VMPIDR_EL2)),
            (0x7000, 0xC0DE, 0, 1 << 31 | 1)
        );
        ctx.set_gpr(0, psci::fid::CPU_OFF);
        RealmExit::Sync { esr: 0x17 << 26, far: 0, hpfar: 0 }
    });
    assert_eq!(host.enter_ok(&second).gprs[0], psci::fid::CPU_OFF);
    assert_eq!(host.enter(&second), Status::ErrorRec);
    // Affinity of a REC that is off, and of oneself.
    host.guest_smc(psci::fid::AFFINITY_INFO_64, &[1, 0]);
    assert_eq!(host.enter_ok(&first).gprs[..2], [psci::fid::AFFINITY_INFO_64, 1]);
    assert_eq!(complete(-3), Status::ErrorInput, "only CPU_ON can be denied");
    assert_eq!(complete(0), Status::Success);
    host.guest(|ctx| {
        assert_eq!(ctx.gpr(0), 1);
        RealmExit::Irq
    });
    host.enter_ok(&first);
    // A denied request.
    host.guest_smc(psci::fid::CPU_ON_32, &[1, 0x7000, 0]);
    host.enter_ok(&first);
    assert_eq!(complete(-3), Status::Success);
    host.guest(|ctx| {
        assert_eq!(ctx.gpr(0), u64::MAX - 2);
        RealmExit::Irq
    });
    host.enter_ok(&first);
    assert_eq!(host.enter(&second), Status::ErrorRec);
}

#[test]
fn psci_arguments_are_checked_before_the_host_sees_them() {
    let host = Host::new();
    let (_, rec) = host.active();
    let code = |code: psci::Code| code.to_register();
    for (id, args, answer) in [
        (psci::fid::CPU_ON_64, [1, 0x1000, 0], code(psci::Code::InvalidParameters)),
        (psci::fid::CPU_ON_64, [0, SHARED, 0], code(psci::Code::InvalidAddress)),
        (psci::fid::CPU_ON_64, [0, 0x1000, 0], code(psci::Code::AlreadyOn)),
        (psci::fid::AFFINITY_INFO_64, [0, 1, 0], code(psci::Code::InvalidParameters)),
        (psci::fid::AFFINITY_INFO_64, [3, 0, 0], code(psci::Code::InvalidParameters)),
        (psci::fid::AFFINITY_INFO_64, [0, 0, 0], 0),
        (psci::fid::FEATURES, [psci::fid::CPU_ON_64, 0, 0], 0),
        (psci::fid::FEATURES, [psci::fid::SYSTEM_RESET2_64, 0, 0], u64::MAX),
        (psci::fid::MIGRATE_INFO_TYPE, [0, 0, 0], u64::MAX),
    ] {
        host.guest_smc(id, &args);
        host.guest(move |ctx| {
            assert_eq!(ctx.gpr(0), answer, "{id:#x} {args:?}");
            RealmExit::Irq
        });
        assert_eq!(reason(&host.enter_ok(&rec)), 1);
    }
}

#[test]
fn after_system_off_the_realm_runs_no_more() {
    let host = Host::new();
    let (realm, rec) = host.active();
    host.guest_smc(psci::fid::SYSTEM_OFF, &[]);
    let exit = host.enter_ok(&rec);
    assert_eq!((reason(&exit), exit.gprs[0]), (3, psci::fid::SYSTEM_OFF));
    assert_eq!(host.enter(&rec), Status::ErrorRealm(1));
    host.ok(fid::REC_DESTROY, &[rec.rec]);
    host.ok(fid::REALM_DESTROY, &[realm.rd]);
}

#[test]
fn the_run_page_disappearing_is_the_hosts_error() {
    extern crate std;
    let host = std::sync::Arc::new(Host::new());
    let (_, rec) = host.active();
    let (inner, run) = (std::sync::Arc::clone(&host), rec.run);
    host.guest(move |_| {
        inner.ok(fid::GRANULE_DELEGATE, &[run]);
        RealmExit::Irq
    });
    assert_eq!(host.enter(&rec), Status::ErrorInput);
    host.ok(fid::REC_DESTROY, &[rec.rec]);
}

#[test]
fn a_virtual_serror_waits_until_the_realm_takes_it() {
    const VSE: u64 = 1 << 8;
    let host = Host::new();
    let (_, rec) = host.active();
    // AET says recoverable: the Realm's state is affected.
    host.guest(|_| RealmExit::SError { esr: 0x2F << 26 | 3 << 10 | 0x11 });
    let exit = host.enter_ok(&rec);
    assert_eq!((reason(&exit), exit.esr), (6, 0x2F << 26 | 3 << 10 | 0x11));
    for taken in [false, true] {
        host.guest(move |ctx| {
            assert_eq!(ctx.get(word::HCR_EL2) & VSE, VSE);
            assert_eq!(ctx.get(word::VSESR_EL2), 3 << 10 | 0x11);
            if taken {
                ctx.set(word::HCR_EL2, ctx.get(word::HCR_EL2) & !VSE);
            }
            RealmExit::Irq
        });
        host.enter_ok(&rec);
    }
    host.guest(|ctx| {
        assert_eq!(ctx.get(word::HCR_EL2) & VSE, 0);
        RealmExit::Irq
    });
    host.enter_ok(&rec);
}
