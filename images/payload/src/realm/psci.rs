//! PSCI inside a Realm with two RECs, on one CPU or two.

use core::arch::asm;
use core::ops::ControlFlow;
use core::sync::atomic::{AtomicU64, Ordering::SeqCst};

use cca_abi::psci::{self, Code};
use cca_abi::rmi::{self, ExitReason};

use super::build::{Event, Realm, Wish};
use super::cpu;
use super::guest::{self, done, expect, step};
use crate::entry::smc;
use crate::expect as host_expect;

/// How often the second REC was started; shared by the RECs.
static STARTED: AtomicU64 = AtomicU64::new(0);
static GO: AtomicU64 = AtomicU64::new(0);

extern "C" fn boot(_: u64) {
    let call = |fid, a, b, c| smc(fid, a, b, c)[0];
    let start = guest::realm_start as *const () as u64;
    let context = second as *const () as u64;
    let on = |target, entry| call(psci::fid::CPU_ON_64, target, entry, context);
    let affinity = |target, level| call(psci::fid::AFFINITY_INFO_64, target, level, 0);
    expect("psci-version", call(psci::fid::VERSION, 0, 0, 0), psci::VERSION_1_1);
    expect("features-cpu-on", call(psci::fid::FEATURES, psci::fid::CPU_ON_64, 0, 0), 0);
    expect("features-reset2", call(psci::fid::FEATURES, psci::fid::SYSTEM_RESET2_64, 0, 0), u64::MAX);
    expect("second-is-off", affinity(1, 0), 1);
    expect("self-is-on", affinity(0, 0), 0);
    expect("affinity-of-a-level", affinity(1, 1), Code::InvalidParameters.to_register());
    expect("affinity-of-nobody", affinity(2, 0), Code::InvalidParameters.to_register());
    expect("cpu-on-nobody", on(2, start), Code::InvalidParameters.to_register());
    expect("cpu-on-self", on(0, start), Code::AlreadyOn.to_register());
    expect("cpu-on-into-shared-memory", on(1, guest::SHARED), Code::InvalidAddress.to_register());
    expect("cpu-on-denied", on(1, start), Code::Denied.to_register());
    expect("second-is-still-off", affinity(1, 0), 1);
    for round in 1..=2 {
        expect("cpu-on", on(1, start), 0);
        expect("cpu-on-twice", on(1, start), Code::AlreadyOn.to_register());
        expect("second-is-on", affinity(1, 0), 0);
        // The host lets the second REC run now.
        step(round, [0, 0]);
        expect("second-has-run", STARTED.load(SeqCst), round);
        expect("second-is-off-again", affinity(1, 0), 1);
    }
    expect("suspend-returns", call(psci::fid::CPU_SUSPEND_64, 0, 0, 0), 0);
    GO.store(1, SeqCst);
    expect("cpu-on", on(1, start), 0);
    step(3, [0, 0]);
    done();
}

extern "C" fn second(_: u64) {
    let (control, timer): (u64, u64);
    // SAFETY: reads registers, changes some that a reset must clear.
    unsafe {
        asm!("mrs {}, tpidr_el1", "mrs {}, cntv_ctl_el0", out(reg) control, out(reg) timer, options(nostack));
        asm!("msr tpidr_el1, {}", "msr cntv_ctl_el0, {}", in(reg) 0x55_u64, in(reg) 3_u64, options(nostack));
    }
    expect("second-starts-reset", control, 0);
    expect("second-starts-without-timer", timer & 3, 0);
    expect("second-knows-its-number", guest::rec(), 1);
    STARTED.fetch_add(1, SeqCst);
    if GO.load(SeqCst) == 1 {
        smc(psci::fid::SYSTEM_RESET, 0, 0, 0);
    }
    smc(psci::fid::CPU_OFF, 0, 0, 0);
    expect("cpu-off-does-not-return", 1, 0);
}

/// The Realm whose second REC another CPU runs.
static OTHER: AtomicU64 = AtomicU64::new(0);

extern "C" fn run_second() {
    let realm = core::ptr::with_exposed_provenance::<Realm>(OTHER.load(SeqCst) as usize);
    // SAFETY: `suite` keeps the Realm, and leaves the second REC alone meanwhile.
    let realm = unsafe { &*realm };
    let event = realm.enter(1);
    let function = realm.exit_gpr(1, 0);
    let left = event == ControlFlow::Continue(Event::Exit(ExitReason::Psci));
    OTHER.store(if left { function } else { 0 }, SeqCst);
}

/// Enters the boot REC until it is at a step; answers its PSCI calls, the first CPU_ON with a refusal.
fn serve(realm: &Realm, refusals: &mut u64) -> ControlFlow<(), Event> {
    loop {
        let event = realm.enter(0)?;
        match event {
            Event::Exit(ExitReason::Irq) => {}
            Event::Exit(ExitReason::Psci) => {
                let function = realm.exit_gpr(0, 0);
                if function == psci::fid::CPU_SUSPEND_64 {
                    continue;
                }
                host_expect("psci-names-its-target", realm.exit_gpr(0, 1), 1);
                host_expect("psci-shows-no-more", realm.exit_gpr(0, 2), 0);
                let deny = function == psci::fid::CPU_ON_64 && *refusals > 0;
                let status = if deny { Code::Denied.to_register() } else { 0 };
                *refusals -= u64::from(deny);
                let [x0, ..] = smc(rmi::fid::PSCI_COMPLETE, realm.rec(0), realm.rec(1), status);
                host_expect("psci-completes", x0, 0);
            }
            other => return ControlFlow::Continue(other),
        }
    }
}

pub(super) fn suite() -> ControlFlow<()> {
    let realm = Realm::new(Wish::default(), boot, 0)?;
    let mut refusals = 1;
    for (round, function) in [(1, psci::fid::CPU_OFF), (2, psci::fid::CPU_OFF), (3, psci::fid::SYSTEM_RESET)]
    {
        let event = serve(&realm, &mut refusals)?;
        host_expect("boot-rec-is-at-its-step", u64::from(event == Event::Step(round, [0, 0])), 1);
        OTHER.store((&raw const realm).expose_provenance() as u64, SeqCst);
        if round == 1 || !cpu::run_on(1, run_second) {
            run_second();
        }
        host_expect("second-rec-leaves", OTHER.load(SeqCst), function);
    }
    let again = |rec, run| smc(rmi::fid::REC_ENTER, rec, run, 0)[0];
    let run = realm.run(0);
    host_expect("reset-is-for-all", again(realm.rec(0), run), rmi::Status::ErrorRealm(1).to_register());
    host_expect("reset-is-for-all", again(realm.rec(1), run), rmi::Status::ErrorRealm(1).to_register());
    crate::check("realm-has-psci", Ok(()));
    realm.destroy()
}
