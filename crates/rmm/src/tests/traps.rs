//! What a Realm gets for each register and instruction that traps.

use cca_abi::rmi::{ExitReason, RecExit};
use zerocopy::{FromZeros, IntoBytes};

use super::host::{Host, TestRec};
use super::std::{println, string::String, vec::Vec};
use crate::context::{RecContext, word};
use crate::platform::RealmExit;

/// What is to happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// The Realm takes an Unknown exception.
    Undefined,
    /// The instruction is skipped; a read gives this.
    Reads(u64),
    /// The instruction is tried again with the registers loaded.
    Loaded,
    /// The host gets it, with the value written.
    Forwarded,
}
use Outcome::{Forwarded, Loaded, Reads, Undefined};

/// A register by (op0, op1, CRn, CRm, op2).
type Register = (u64, u64, u64, u64, u64);

const WRITTEN: u64 = 0xF00D_0000_6000_1234;

/// ESR_EL2 of a trapped access with X5.
fn syndrome((op0, op1, crn, crm, op2): Register, read: bool) -> u64 {
    0x18 << 26 | 1 << 25 | op0 << 20 | op2 << 17 | op1 << 14 | crn << 10 | 5 << 5 | crm << 1 | u64::from(read)
}

fn sync(esr: u64) -> RealmExit {
    RealmExit::Sync { esr, far: 0x1234_5678, hpfar: 0x9990 }
}

/// Lets the Realm trap with `esr` once and says what came of it.
fn observe(host: &Host, rec: &TestRec, esr: u64) -> Outcome {
    let platform = host.rmm.platform();
    let loads = || {
        use core::sync::atomic::Ordering::Relaxed;
        platform.debug_loads.load(Relaxed) + platform.pmu_loads.load(Relaxed)
    };
    host.guest(move |ctx| {
        ctx.set(word::PC, 0x1000);
        ctx.set(word::PSTATE, 0x3C5);
        ctx.set(word::VBAR_EL1, 0x8000);
        ctx.set(word::ESR_EL1, 0xDEAD);
        ctx.set_gpr(5, WRITTEN);
        sync(esr)
    });
    let before = loads();
    host.guest(|_| RealmExit::Irq);
    let exit = host.enter_ok(rec);
    let ctx = host.ctx(rec);
    if exit.exit_reason == ExitReason::Sync as u8 {
        // The step that was to follow is still there.
        host.rmm.platform().script.lock().unwrap().clear();
        assert_eq!((exit.esr, exit.gprs[0], exit.far, exit.hpfar), (esr, WRITTEN, 0, 0));
        assert_eq!(ctx.pc(), 0x1004);
        return Forwarded;
    }
    assert_eq!(exit.esr, 0, "the host learns nothing");
    assert_eq!(exit.gprs, [0; 31]);
    match ctx.pc() {
        0x8200 => {
            assert_eq!(ctx.get(word::ESR_EL1), 1 << 25);
            assert_eq!(ctx.get(word::ELR_EL1), 0x1000);
            Undefined
        }
        0x1004 => Reads(ctx.gpr(5)),
        0x1000 => {
            assert_eq!(loads(), before + 1);
            Loaded
        }
        pc => panic!("PC {pc:#x}"),
    }
}

/// A Realm with everything that one can have, and one with nothing.
fn both() -> [(Host, TestRec); 2] {
    [[].as_slice(), &[(0x0, 0b110), (0x10, 1), (0x28, 4)]].map(|words| {
        let host = Host::new();
        let realm = host.realm_of(words);
        let rec = host.rec(&realm, 0, true);
        host.activate(&realm);
        (host, rec)
    })
}

#[test]
fn every_trapped_register_gets_what_the_specification_says() {
    // Register, reading, writing; the same with SVE and PMU if that differs.
    let undefined = [Undefined; 2];
    let nothing = [Reads(0), Reads(WRITTEN)];
    let loaded = [Loaded; 2];
    let ignored = |value| [Reads(value), Undefined];
    let table: &[(&str, Register, [Outcome; 2], [Outcome; 2])] = &[
        ("ID_PFR0_EL1", (3, 0, 0, 1, 0), ignored(0), ignored(0)),
        ("MVFR0_EL1", (3, 0, 0, 3, 0), ignored(0), ignored(0)),
        ("ID_AA64PFR0_EL1", (3, 0, 0, 4, 0), ignored(0x2000_0012), ignored(0x1_2000_0012)),
        ("ID_AA64PFR1_EL1", (3, 0, 0, 4, 1), ignored(0), ignored(0)),
        ("ID_AA64PFR2_EL1", (3, 0, 0, 4, 2), ignored(0), ignored(0)),
        ("ID_AA64ZFR0_EL1", (3, 0, 0, 4, 4), ignored(0), ignored(0x1234)),
        ("ID_AA64SMFR0_EL1", (3, 0, 0, 4, 5), ignored(0), ignored(0)),
        ("ID_AA64DFR0_EL1", (3, 0, 0, 5, 0), ignored(0x30_500A), ignored(0x30_560A)),
        ("ID_AA64DFR1_EL1", (3, 0, 0, 5, 1), ignored(0), ignored(0)),
        ("ID_AA64ISAR2_EL1", (3, 0, 0, 6, 2), ignored(0), ignored(0)),
        // 48 bits, and stage 2 without LPA2.
        ("ID_AA64MMFR0_EL1", (3, 0, 0, 7, 0), ignored(5 | 2 << 40), ignored(5 | 2 << 40)),
        ("ID_AA64MMFR3_EL1", (3, 0, 0, 7, 3), ignored(0), ignored(0)),
        ("reserved ID register", (3, 0, 0, 7, 7), ignored(0), ignored(0)),
        // Virtual interrupts are the host's.
        ("ICC_DIR_EL1", (3, 0, 12, 11, 1), [Undefined, Forwarded], [Undefined, Forwarded]),
        ("ICC_SGI1R_EL1", (3, 0, 12, 11, 5), [Undefined, Forwarded], [Undefined, Forwarded]),
        ("ICC_ASGI1R_EL1", (3, 0, 12, 11, 6), [Undefined, Forwarded], [Undefined, Forwarded]),
        ("ICC_SGI0R_EL1", (3, 0, 12, 11, 7), [Undefined, Forwarded], [Undefined, Forwarded]),
        ("ICC_PMR_EL1", (3, 0, 4, 6, 0), undefined, undefined),
        // Debug.
        ("DBGBVR0_EL1", (2, 0, 0, 0, 4), loaded, loaded),
        ("DBGBCR15_EL1", (2, 0, 0, 15, 5), loaded, loaded),
        ("DBGWVR0_EL1", (2, 0, 0, 0, 6), loaded, loaded),
        ("DBGWCR3_EL1", (2, 0, 0, 3, 7), loaded, loaded),
        ("MDSCR_EL1", (2, 0, 0, 2, 2), loaded, loaded),
        ("DBGCLAIMSET_EL1", (2, 0, 7, 8, 6), loaded, loaded),
        ("DBGCLAIMCLR_EL1", (2, 0, 7, 9, 6), loaded, loaded),
        ("OSDTRRX_EL1", (2, 0, 0, 0, 2), nothing, nothing),
        ("OSDTRTX_EL1", (2, 0, 0, 3, 2), nothing, nothing),
        ("OSECCR_EL1", (2, 0, 0, 6, 2), nothing, nothing),
        ("MDCCSR_EL0", (2, 3, 0, 1, 0), nothing, nothing),
        ("DBGDTR_EL0", (2, 3, 0, 4, 0), nothing, nothing),
        ("DBGDTRRX_EL0", (2, 3, 0, 5, 0), nothing, nothing),
        ("DBGPRCR_EL1", (2, 0, 1, 4, 4), nothing, nothing),
        // Performance monitors.
        ("PMCR_EL0", (3, 3, 9, 12, 0), undefined, loaded),
        ("PMCNTENSET_EL0", (3, 3, 9, 12, 1), undefined, loaded),
        ("PMSELR_EL0", (3, 3, 9, 12, 5), undefined, loaded),
        ("PMCEID0_EL0", (3, 3, 9, 12, 6), undefined, loaded),
        ("PMCCNTR_EL0", (3, 3, 9, 13, 0), undefined, loaded),
        ("PMXEVCNTR_EL0", (3, 3, 9, 13, 2), undefined, loaded),
        ("PMUSERENR_EL0", (3, 3, 9, 14, 0), undefined, loaded),
        ("PMINTENSET_EL1", (3, 0, 9, 14, 1), undefined, loaded),
        ("PMMIR_EL1", (3, 0, 9, 14, 6), undefined, loaded),
        ("PMEVCNTR0_EL0", (3, 3, 14, 8, 0), undefined, loaded),
        ("PMEVTYPER30_EL0", (3, 3, 14, 15, 6), undefined, loaded),
        ("PMCCFILTR_EL0", (3, 3, 14, 15, 7), undefined, loaded),
        // Error records: none.
        ("ERRIDR_EL1", (3, 0, 5, 3, 0), nothing, nothing),
        ("ERXSTATUS_EL1", (3, 0, 5, 4, 2), nothing, nothing),
        // Not for Realms.
        ("IMPLEMENTATION DEFINED", (3, 0, 11, 0, 0), undefined, undefined),
        ("IMPLEMENTATION DEFINED instruction", (1, 0, 11, 0, 0), undefined, undefined),
        ("PMSCR_EL1 (profiling)", (3, 0, 9, 9, 0), undefined, undefined),
        ("PMBLIMITR_EL1", (3, 0, 9, 10, 0), undefined, undefined),
        ("TRBLIMITR_EL1 (trace buffer)", (3, 0, 9, 11, 0), undefined, undefined),
        ("TRFCR_EL1 (trace filter)", (3, 0, 1, 2, 1), undefined, undefined),
        ("TRCPRGCTLR (trace)", (2, 1, 0, 1, 0), undefined, undefined),
        ("BRBCR_EL1 (branch records)", (2, 1, 9, 0, 0), undefined, undefined),
        ("AMCR_EL0 (activity monitors)", (3, 3, 13, 2, 0), undefined, undefined),
        ("MPAM1_EL1", (3, 0, 10, 5, 0), undefined, undefined),
        ("LORSA_EL1 (ordering regions)", (3, 0, 10, 4, 0), undefined, undefined),
        ("GCR_EL1 (MTE)", (3, 0, 1, 0, 6), undefined, undefined),
        ("RGSR_EL1 (MTE)", (3, 0, 1, 0, 5), undefined, undefined),
        ("TFSR_EL1 (MTE)", (3, 0, 5, 6, 0), undefined, undefined),
        ("GMID_EL1 (MTE)", (3, 1, 0, 0, 4), undefined, undefined),
        ("SMCR_EL1 (SME)", (3, 0, 1, 2, 6), undefined, undefined),
        ("SMPRI_EL1 (SME)", (3, 0, 1, 2, 4), undefined, undefined),
        ("TPIDR2_EL0 (SME)", (3, 3, 13, 0, 5), undefined, undefined),
        ("SCXTNUM_EL1", (3, 0, 13, 0, 7), undefined, undefined),
        ("SCXTNUM_EL0", (3, 3, 13, 0, 7), undefined, undefined),
        ("GCSCR_EL1", (3, 0, 2, 5, 0), undefined, undefined),
        ("ACCDATA_EL1 (LS64)", (3, 0, 13, 0, 5), undefined, undefined),
        ("PIR_EL1", (3, 0, 10, 2, 3), undefined, undefined),
        ("TCR2_EL1", (3, 0, 2, 0, 3), undefined, undefined),
        ("SCTLR2_EL1", (3, 0, 1, 0, 3), undefined, undefined),
        ("ALLINT", (3, 0, 4, 3, 0), undefined, undefined),
        ("HCR_EL2", (3, 4, 1, 1, 0), undefined, undefined),
    ];
    let realms = both();
    let mut wrong = Vec::new();
    for &(name, register, plain, rich) in table {
        for ((host, rec), wanted) in realms.iter().zip([plain, rich]) {
            for (read, wanted) in [true, false].into_iter().zip(wanted) {
                let seen = observe(host, rec, syndrome(register, read));
                if seen != wanted {
                    println!("{name}, read {read}: {seen:x?} instead of {wanted:x?}");
                    wrong.push(String::from(name));
                }
            }
        }
    }
    assert_eq!(wrong, Vec::<String>::new());
}

#[test]
fn every_exception_class_that_is_not_a_realms_is_undefined() {
    let realms = both();
    for class in 0..64u64 {
        // WFx, SMC, registers, aborts: other tests. HVC leaves its PC behind.
        if matches!(class, 0x01 | 0x16 | 0x17 | 0x18 | 0x20 | 0x24) {
            continue;
        }
        for (host, rec) in &realms {
            assert_eq!(observe(host, rec, class << 26 | 1 << 25 | 0x1234), Undefined, "class {class:#x}");
        }
    }
}

#[test]
fn the_debug_channels_interrupt_enables_are_kept_and_do_nothing() {
    let host = Host::new();
    let (_, rec) = host.active();
    let register = (2, 0, 0, 2, 0);
    assert_eq!(observe(&host, &rec, syndrome(register, false)), Reads(WRITTEN));
    assert_eq!(observe(&host, &rec, syndrome(register, true)), Reads(3 << 29 & WRITTEN));
}

#[test]
fn a_read_into_the_zero_register_is_discarded() {
    let host = Host::new();
    let (_, rec) = host.active();
    let esr = syndrome((3, 0, 0, 4, 0), true) | 31 << 5;
    assert_eq!(observe(&host, &rec, esr), Reads(WRITTEN));
}

/// Every byte of an exit record that is not zero, as (offset, value) of words.
fn contents(exit: &RecExit) -> Vec<(usize, u64)> {
    let mut words = [0u64; 256];
    words.as_mut_bytes().copy_from_slice(exit.as_bytes());
    words.into_iter().enumerate().filter(|(_, value)| *value != 0).map(|(n, value)| (n * 8, value)).collect()
}

#[test]
fn an_exit_shows_what_its_reason_defines_and_nothing_else() {
    const ESR: usize = 0x100;
    const FAR: usize = 0x108;
    const HPFAR: usize = 0x110;
    const GPRS: usize = 0x200;
    const SECRET: u64 = 0x5EC2_E75E_C2E7_5EC2;
    let shared = super::host::SHARED;
    type Case = (&'static str, u64, u64, RealmExit, Vec<(usize, u64)>);
    let abort = |esr: u64, ipa: u64| RealmExit::Sync { esr, far: SECRET, hpfar: ipa >> 8 };
    let il = 1 << 25;
    let cases: &[Case] = &[
        ("IRQ", 0, 0, RealmExit::Irq, [(0, 1)].to_vec()),
        ("FIQ", 0, 0, RealmExit::Fiq, [(0, 2)].to_vec()),
        (
            "SError",
            0,
            0,
            RealmExit::SError { esr: 0x2F << 26 | il | 1 << 9 | 3 << 10 | 1 << 14 | 0x11 },
            [(0, 6), (ESR, 0x2F << 26 | 1 << 9 | 3 << 10 | 0x11)].to_vec(),
        ),
        ("WFI", 0, 0, sync(0x01 << 26 | il | 0x1F << 20), [(ESR, 0x01 << 26)].to_vec()),
        ("WFE", 0, 0, sync(0x01 << 26 | il | 1), [(ESR, 0x01 << 26 | 1)].to_vec()),
        ("WFIT", 0, 0, sync(0x01 << 26 | il | 9 << 5 | 2), [(ESR, 1 << 26 | 2), (GPRS, SECRET)].to_vec()),
        (
            "data abort, protected",
            0,
            0,
            // ISV, SAS, SSE, SRT, SF, AR, SET, FnV, EA, CM, S1PTW, WnR.
            abort(0x24 << 26 | 0x3FF_FFC0 | 0x07, 0x1000),
            [(ESR, 0x24 << 26 | 3 << 11 | 1 << 10 | 1 << 9 | 7), (HPFAR, 0x10)].to_vec(),
        ),
        (
            "instruction abort, protected",
            0,
            0,
            abort(0x20 << 26 | 0x3FF_FFC0 | 0x07, 0x1000),
            [(ESR, 0x20 << 26 | 3 << 11 | 1 << 10 | 1 << 9 | 7), (HPFAR, 0x10)].to_vec(),
        ),
        (
            "data abort, unprotected, without syndrome",
            0,
            0,
            abort(0x24 << 26 | il | 1 << 23 | 5 << 16 | 1 << 15 | 1 << 7 | 1 << 6 | 7, shared),
            [(ESR, 0x24 << 26 | il | 7), (HPFAR, shared >> 8)].to_vec(),
        ),
        (
            "store, unprotected",
            0,
            0,
            abort(0x24 << 26 | il | 1 << 24 | 1 << 22 | 1 << 21 | 5 << 16 | 1 << 7 | 1 << 6 | 7, shared),
            [
                (ESR, 0x24 << 26 | 1 << 24 | 1 << 22 | 1 << 6 | 7),
                (FAR, SECRET & 0xFFF),
                (HPFAR, shared >> 8),
                (GPRS, SECRET & 0xFFFF),
            ]
            .to_vec(),
        ),
        (
            "load, unprotected",
            0,
            0,
            abort(0x24 << 26 | il | 1 << 24 | 3 << 22 | 5 << 16 | 1 << 15 | 7, shared),
            [
                (ESR, 0x24 << 26 | 1 << 24 | 3 << 22 | 1 << 15 | 7),
                (FAR, SECRET & 0xFFF),
                (HPFAR, shared >> 8),
            ]
            .to_vec(),
        ),
        (
            "external abort",
            0,
            0,
            abort(0x24 << 26 | il | 1 << 9 | 0x10, 0x1000),
            [(ESR, 0x24 << 26 | 1 << 9 | 0x10)].to_vec(),
        ),
        ("CPU_SUSPEND", 0xC400_0001, SECRET, sync(0x17 << 26 | il), [(0, 3), (GPRS, 0xC400_0001)].to_vec()),
        ("CPU_OFF", 0x8400_0002, SECRET, sync(0x17 << 26 | il), [(0, 3), (GPRS, 0x8400_0002)].to_vec()),
        (
            "CPU_ON",
            0xC400_0003,
            1,
            sync(0x17 << 26 | il),
            [(0, 3), (GPRS, 0xC400_0003), (GPRS + 8, 1)].to_vec(),
        ),
        (
            "AFFINITY_INFO",
            0xC400_0004,
            1,
            sync(0x17 << 26 | il),
            [(0, 3), (GPRS, 0xC400_0004), (GPRS + 8, 1)].to_vec(),
        ),
        ("SYSTEM_OFF", 0x8400_0008, SECRET, sync(0x17 << 26 | il), [(0, 3), (GPRS, 0x8400_0008)].to_vec()),
        ("SYSTEM_RESET", 0x8400_0009, SECRET, sync(0x17 << 26 | il), [(0, 3), (GPRS, 0x8400_0009)].to_vec()),
    ];
    for (name, x0, x1, exit, wanted) in cases {
        let host = Host::new();
        let realm = host.realm();
        let rec = host.rec(&realm, 0, true);
        host.rec(&realm, 1, false);
        host.tables(&realm, 0, 3);
        host.ok(cca_abi::rmi::fid::RTT_INIT_RIPAS, &[realm.rd, 0x1000, 0x2000]);
        host.activate(&realm);
        // What an earlier exit or the host left in the page does not stay.
        for offset in (0x800..0x1000).step_by(8) {
            host.write_ns_word(rec.run, offset, u64::MAX);
        }
        let (x0, x1, exit, affinity) = (*x0, *x1, *exit, u64::from(*x0 == 0xC400_0004));
        host.guest(move |ctx: &RecContext<'_>| {
            for n in 0..31 {
                ctx.set_gpr(n, SECRET);
            }
            if x0 != 0 {
                ctx.set_gpr(0, x0);
                ctx.set_gpr(1, x1);
                ctx.set_gpr(2, if affinity == 1 { 0 } else { 0x1000 });
            }
            exit
        });
        assert_eq!(contents(&host.enter_ok(&rec)), *wanted, "{name}");
    }
    assert!(contents(&RecExit::new_zeroed()).is_empty());
}
