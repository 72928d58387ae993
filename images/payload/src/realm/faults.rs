//! What a Realm gets for accesses and instructions that it must not do, and the host for its.

use core::arch::asm;
use core::ops::ControlFlow;
use core::sync::atomic::{AtomicU64, Ordering::SeqCst};

use cca_abi::rmi::{self, ExitReason, enter_flags, fid};
use cca_abi::{rsi, smccc};

use super::build::{Event, Realm, Wish};
use super::cpu;
use super::guest::{FREE, S2SZ, SHARED, catch, caught_far, caught_kind, done, expect, step};
use crate::entry::smc;
use crate::{check, expect as host_expect, is_gpf, pool, probe_read};

const UNDEFINED: u64 = 1 << 25;
/// Protected, not RAM.
const EMPTY: u64 = FREE + 0x10_0000;

fn load(address: u64) -> u64 {
    // SAFETY: an access that faults, or reads what is no Rust object.
    catch(|| unsafe { asm!("ldr {}, [{}]", out(reg) _, in(reg) address, options(nostack)) })
}

fn store(address: u64) -> u64 {
    // SAFETY: as for `load`.
    catch(|| unsafe { asm!("str xzr, [{}]", in(reg) address, options(nostack)) })
}

fn jump(address: u64) -> u64 {
    // SAFETY: the fetch faults, and the handler returns to the link register.
    catch(|| unsafe { asm!("blr {}", in(reg) address, out("x30") _, options(nostack)) })
}

/// Class and fault status.
fn fault(esr: u64) -> u64 {
    (esr >> 26) << 8 | esr & 0x3F
}

macro_rules! undefined {
    ($($name:literal $instruction:literal)*) => {$(
        // SAFETY: the instruction is undefined, or its register is of no importance here.
        expect($name, catch(|| unsafe { asm!($instruction, out("x9") _, options(nostack)) }), UNDEFINED);
    )*};
}

extern "C" fn program(_: u64) {
    const DATA_SEA: u64 = 0x25 << 8 | 0x10;
    const FETCH_SEA: u64 = 0x21 << 8 | 0x10;
    expect("load-of-nothing", fault(load(EMPTY)), DATA_SEA);
    expect("load-of-nothing-is-where", caught_far(), EMPTY);
    expect("load-of-nothing-by-el1h", caught_kind(), 4);
    expect("store-to-nothing", fault(store(EMPTY + 8)), DATA_SEA);
    expect("fetch-of-nothing", fault(jump(EMPTY)), FETCH_SEA);
    expect("fetch-of-shared-memory", fault(jump(SHARED + 0x1000)), FETCH_SEA);
    // Beyond the address space, MMU off: address size fault, level 0.
    expect("load-from-beyond", fault(load(1 << S2SZ)), 0x25 << 8);
    expect("fetch-from-beyond", fault(jump(1 << S2SZ)), 0x21 << 8);
    // A device that the host refuses.
    step(0, [0, 0]);
    expect("refused-load", fault(load(SHARED + 0x18)), DATA_SEA);
    expect("refused-load-is-where", caught_far(), SHARED + 0x18);
    undefined! {
        "hvc" "hvc #0"
        "imp-def-register" "mrs x9, S3_0_C15_C0_0"
        "imp-def-instruction" "sys #0, c11, c0, #0, x9"
        "trbe" "mrs x9, S3_0_C9_C11_0"
        "spe" "mrs x9, S3_0_C9_C9_0"
        "trace-filter" "mrs x9, S3_0_C1_C2_1"
        "amu" "mrs x9, S3_3_C13_C2_0"
        "mpam" "mrs x9, S3_0_C10_C5_0"
        "lor" "mrs x9, S3_0_C10_C4_0"
        "mte-gcr" "mrs x9, S3_0_C1_C0_6"
        "mte-rgsr" "mrs x9, S3_0_C1_C0_5"
        "mte-tfsr" "mrs x9, S3_0_C5_C6_0"
        "sme-smcr" "mrs x9, S3_0_C1_C2_6"
        "sme-tpidr2" "mrs x9, S3_3_C13_C0_5"
        "scxtnum" "mrs x9, S3_0_C13_C0_7"
        "allint" "msr S3_0_C4_C3_0, x9"
        "el2-register" "mrs x9, S3_4_C1_C1_0"
        "el12-register" "mrs x9, S3_5_C1_C0_0"
        "gcs" "mrs x9, S3_0_C2_C5_0"
        "mops" ".inst 0x19cb0549"
    }
    // There, but nothing.
    let (records, channel): (u64, u64);
    // SAFETY: reads registers.
    unsafe { asm!("mrs {}, S3_0_C5_C3_0", "mrs {}, S2_0_C0_C6_2", out(reg) records, out(reg) channel) };
    expect("no-error-records", records, 0);
    expect("no-oseccr", channel, 0);
    expect("unknown-call", smc(0x8400_FFFF, 1, 2, 3)[0], smccc::NOT_SUPPORTED);
    expect("rmi-call", smc(rmi::fid::VERSION, rmi::VERSION_1_0, 0, 0)[0], smccc::NOT_SUPPORTED);
    expect("rsi-version", smc(rsi::fid::VERSION, rsi::VERSION_1_0, 0, 0)[0], 0);
    // RAM without a page: the host brings one.
    // SAFETY: a page of RAM that is no Rust object.
    unsafe {
        let free = core::ptr::with_exposed_provenance_mut::<u64>(FREE as usize);
        expect("new-page-is-empty", free.read_volatile(), 0);
        free.write_volatile(0x5EC2E7);
        step(1, [0, 0]);
        expect("page-keeps-its-contents", free.read_volatile(), 0x5EC2E7);
    }
    done();
}

/// Whose the raced granule is to be.
static RACE: AtomicU64 = AtomicU64::new(0);

/// Delegates and undelegates a granule until it is told to stop.
extern "C" fn race() {
    loop {
        let granule = RACE.load(SeqCst);
        if granule == 0 {
            return;
        }
        smc(fid::GRANULE_DELEGATE, granule, 0, 0);
        smc(fid::GRANULE_UNDELEGATE, granule, 0, 0);
    }
}

/// The RMM reads and writes a run page that another CPU gives away and takes back.
fn hostile_memory(realm: &Realm) {
    let raced = pool(390);
    RACE.store(raced, SeqCst);
    if !cpu::start(1, race) {
        return;
    }
    let mut seen = [0u64; 3];
    // As long as it takes to meet the page in both states; whether that happens is the other CPU's luck.
    for _ in 0..50_000 {
        if seen[0] >= 20 && seen[1] >= 20 {
            break;
        }
        // No REC has this address, thus the run page is read before anything is refused.
        match smc(fid::REC_ENTER, realm.rec(1), raced, 0)[0] {
            1 => seen[0] += 1,
            3 => seen[1] += 1,
            other => {
                check("raced-page-is-an-input-error", Err(format_args!("{other:#x}")));
                seen[2] += 1;
                break;
            }
        }
    }
    RACE.store(0, SeqCst);
    cpu::join(1);
    smc(fid::GRANULE_UNDELEGATE, raced, 0, 0);
    if seen[2] == 0 {
        check("raced-page-is-an-input-error", Ok(()));
    }
}

pub(super) fn suite() -> ControlFlow<()> {
    let mut realm = Realm::new(Wish::default(), program, 0)?;
    realm.step(0)?;
    let event = realm.enter(0)?;
    host_expect("device-access-leaves", u64::from(event == Event::Exit(ExitReason::Sync)), 1);
    realm.set_flags(0, enter_flags::INJECT_SEA);
    let event = realm.enter(0)?;
    host_expect("first-touch-leaves", u64::from(event == Event::Exit(ExitReason::Sync)), 1);
    host_expect("first-touch-says-where", realm.exit(0, 0x110) << 8 & !0xFFF, FREE);
    realm.map_free(0)?;
    realm.step(0)?;
    let page = realm.last();
    host_expect(
        "realm-page-stays-the-realms",
        smc(fid::GRANULE_UNDELEGATE, page, 0, 0)[0],
        rmi::Status::ErrorInput.to_register(),
    );
    match probe_read(page) {
        Err(esr) if is_gpf(esr) => check("realm-page-faults", Ok(())),
        other => check("realm-page-faults", Err(format_args!("{other:#x?}"))),
    }
    hostile_memory(&realm);
    realm.finish(0, "realm-gets-its-faults")?;
    realm.destroy()
}
