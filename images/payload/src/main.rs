//! A small host at NS-EL2 that tests monitor and RMM from outside.
//!
//! Loaded in a kernel's place. Each test prints `PAYLOAD: <name> ok` or `PAYLOAD: <name> FAILED <why>` on
//! UART0; at the end the machine is switched off, or QEMU exits with status 1 if anything failed. Runs with
//! the MMU off, on as many CPUs as there are.
#![no_std]
#![no_main]
#![allow(missing_docs, unreachable_pub, reason = "nothing outside of this image uses it")]

mod calls;
mod console;
mod dtb;
mod entry;
mod guest;
mod measured;
mod memory;
mod power;
mod protection;
mod realm;
mod registers;
mod services;
mod storm;
mod switches;
mod vectors;

use core::arch::asm;
use core::fmt;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use cca_abi::psci::{self, Code};
use cca_abi::{rmi, rmm_el3, smccc};
use console::line;
use entry::{smc, timed_nothing, timed_smc};

const GRANULE: u64 = cca_abi::GRANULE_SIZE;
const RMM_MEMORY: u64 = 0x4010_0000;
const SECURE_RAM: u64 = 0x0E00_0000;
/// Data abort without a change of exception level, granule protection fault on the output address.
const ABORT_GPF: u64 = 0x25 << 6 | 0x28;

static FAILED: AtomicBool = AtomicBool::new(false);
/// ESR of the last fault that was expected; `EXPECT` says that one is.
static EXPECT: AtomicBool = AtomicBool::new(false);
static FAULT: AtomicU64 = AtomicU64::new(0);
/// Where to go on after an expected fault, if not behind the faulting instruction.
static RESUME: AtomicU64 = AtomicU64::new(0);
/// What CPUs do when they are on.
static PHASE: AtomicU64 = AtomicU64::new(phase::CHURN);
/// What each other CPU has done.
static DONE: [AtomicU64; 32] = [const { AtomicU64::new(0) }; 32];

/// Values of [`PHASE`].
mod phase {
    pub(super) const CHURN: u64 = 0;
    pub(super) const STORM: u64 = 1;
    pub(super) const RACE: u64 = 2;
}

unsafe extern "C" {
    static __pool: u8;
    fn secondary_start();
    fn smc_all(regs: *mut [u64; 31]);
}

/// The n-th granule that the tests may give away.
fn pool(n: u64) -> u64 {
    (&raw const __pool).addr() as u64 / GRANULE * GRANULE + (n + 1) * GRANULE
}

fn check(name: &str, result: Result<(), fmt::Arguments<'_>>) {
    match result {
        Ok(()) => line(format_args!("{name} ok")),
        Err(why) => {
            FAILED.store(true, Ordering::Relaxed);
            line(format_args!("{name} FAILED {why}"));
        }
    }
}

fn verify(name: &str, good: bool, why: fmt::Arguments<'_>) {
    check(name, if good { Ok(()) } else { Err(why) });
}

fn expect(name: &str, got: u64, wanted: u64) {
    verify(name, got == wanted, format_args!("got {got:#x}, expected {wanted:#x}"));
}

#[unsafe(no_mangle)]
extern "C" fn el2_exception(esr: u64, elr: u64, far: u64) -> u64 {
    if EXPECT.swap(false, Ordering::Relaxed) {
        FAULT.store(esr, Ordering::Relaxed);
        let resume = RESUME.swap(0, Ordering::Relaxed);
        if resume == 0 {
            return elr + 4;
        }
        // SAFETY: back to EL2, whoever faulted.
        unsafe { asm!("msr spsr_el2, {}", in(reg) 0x3C9_u64, options(nomem, nostack)) };
        return resume;
    }
    line(format_args!("exception FAILED ESR={esr:#x} ELR={elr:#x} FAR={far:#x}"));
    console::fail()
}

/// Reads a word; the ESR if that faults.
fn probe_read(pa: u64) -> Result<u64, u64> {
    FAULT.store(0, Ordering::Relaxed);
    EXPECT.store(true, Ordering::Relaxed);
    let value;
    // SAFETY: granules of the pool are no Rust objects; a fault skips the load.
    unsafe {
        asm!("mov {v}, #0", "ldr {v}, [{a}]", "dsb sy", "isb", v = out(reg) value, a = in(reg) pa, options(nostack))
    };
    EXPECT.store(false, Ordering::Relaxed);
    match FAULT.load(Ordering::Relaxed) {
        0 => Ok(value),
        esr => Err(esr),
    }
}

fn probe_write(pa: u64, value: u64) -> Result<(), u64> {
    FAULT.store(0, Ordering::Relaxed);
    EXPECT.store(true, Ordering::Relaxed);
    // SAFETY: as for `probe_read`.
    unsafe { asm!("str {v}, [{a}]", "dsb sy", "isb", v = in(reg) value, a = in(reg) pa, options(nostack)) };
    EXPECT.store(false, Ordering::Relaxed);
    match FAULT.load(Ordering::Relaxed) {
        0 => Ok(()),
        esr => Err(esr),
    }
}

fn is_gpf(esr: u64) -> bool {
    // Class and fault status; the rest says whether it was a write.
    (esr >> 26) << 6 | esr & 0x3F == ABORT_GPF
}

#[unsafe(no_mangle)]
extern "C" fn primary(_cpu: u64, tree: u64) -> ! {
    console::init();
    line(format_args!("start"));
    expect("psci-version", smc(psci::fid::VERSION, 0, 0, 0)[0], psci::VERSION_1_1);
    expect("smccc-version", smc(smccc::VERSION, 0, 0, 0)[0], smccc::VERSION_1_5);
    expect("unknown-function", smc(0xC600_1234, 0, 0, 0)[0], smccc::NOT_SUPPORTED);
    expect(
        "host-cannot-delegate-by-itself",
        smc(rmm_el3::fid::GTSI_DELEGATE, pool(0), 0, 0)[0],
        smccc::NOT_SUPPORTED,
    );
    expect("host-cannot-complete-a-call", smc(rmm_el3::fid::REQ_COMPLETE, 0, 0, 0)[0], smccc::NOT_SUPPORTED);
    let version = smc(rmi::fid::VERSION, rmi::VERSION_1_0, 0, 0);
    expect("rmi-version", version[0], 0);
    line(format_args!("rmi-version is {:#x} to {:#x}", version[1], version[2]));
    let rmm = version[0] == 0;
    if rmm && power::reset() == 2 {
        switches::all();
        protection();
        protection::all();
        memory::all(tree);
        calls::all();
        refusals();
    }
    services::all();
    power::standby();
    psci_refusals();
    let cpus = other_cpus(rmm, 1..=ROUNDS);
    if cpus > 1 {
        check("cpus-go-on-and-off-under-load", Ok(()));
    }
    if rmm {
        bench();
        realm::life(timed_nothing());
        realm::suites();
        PHASE.store(phase::STORM, Ordering::Release);
        other_cpus(rmm, ROUNDS + 1..=ROUNDS + 1);
        storm::report(cpus);
    }
    if cpus > 2 {
        race(cpus);
    }
    let failed = FAILED.load(Ordering::Relaxed);
    line(format_args!("done, {} CPUs, {}", cpus, if failed { "FAILED" } else { "all ok" }));
    if failed {
        console::fail();
    }
    smc(psci::fid::SYSTEM_OFF, 0, 0, 0);
    console::fail()
}

/// A delegated granule is out of the host's reach, and comes back empty.
fn protection() {
    let pa = pool(3);
    for word in 0..GRANULE / 8 {
        let _ = probe_write(pa + word * 8, 0xDEAD_BEEF_0000_0000 | word);
    }
    expect("delegate", smc(rmi::fid::GRANULE_DELEGATE, pa, 0, 0)[0], 0);
    match probe_read(pa) {
        Err(esr) if is_gpf(esr) => check("delegated-read-faults", Ok(())),
        other => check("delegated-read-faults", Err(format_args!("{other:#x?}"))),
    }
    match probe_write(pa + 8, 1) {
        Err(esr) if is_gpf(esr) => check("delegated-write-faults", Ok(())),
        other => check("delegated-write-faults", Err(format_args!("{other:#x?}"))),
    }
    match (probe_read(pa - 8), probe_read(pa + GRANULE)) {
        (Ok(_), Ok(_)) => check("neighbours-stay-readable", Ok(())),
        other => check("neighbours-stay-readable", Err(format_args!("{other:#x?}"))),
    }
    if smc(rmi::fid::GRANULE_DELEGATE, pa, 0, 0)[0] == 0 {
        check("delegate-twice-refused", Err(format_args!("it was not")));
    } else {
        check("delegate-twice-refused", Ok(()));
    }
    expect("undelegate", smc(rmi::fid::GRANULE_UNDELEGATE, pa, 0, 0)[0], 0);
    match (0..GRANULE / 8).map(|w| (w, probe_read(pa + w * 8))).find(|(_, r)| *r != Ok(0)) {
        None => check("undelegated-reads-zero", Ok(())),
        Some((word, value)) => check("undelegated-reads-zero", Err(format_args!("word {word}: {value:#x?}"))),
    }
}

/// What the RMM and EL3 must not let the host have.
fn refusals() {
    let cases = [
        ("delegate-of-rmm-memory-refused", rmi::fid::GRANULE_DELEGATE, RMM_MEMORY),
        ("delegate-of-secure-ram-refused", rmi::fid::GRANULE_DELEGATE, SECURE_RAM),
        ("delegate-of-device-refused", rmi::fid::GRANULE_DELEGATE, 0x0900_0000),
        ("delegate-misaligned-refused", rmi::fid::GRANULE_DELEGATE, pool(1) + 8),
        ("delegate-beyond-memory-refused", rmi::fid::GRANULE_DELEGATE, 1 << 47),
        ("delegate-wild-address-refused", rmi::fid::GRANULE_DELEGATE, 0xFFFF_FFFF_FFFF_F000),
        ("undelegate-of-own-memory-refused", rmi::fid::GRANULE_UNDELEGATE, pool(1)),
        ("undelegate-of-rmm-memory-refused", rmi::fid::GRANULE_UNDELEGATE, RMM_MEMORY),
    ];
    for (name, fid, pa) in cases {
        match smc(fid, pa, 0, 0)[0] {
            0 => check(name, Err(format_args!("it was not"))),
            _ => check(name, Ok(())),
        }
    }
    match probe_read(RMM_MEMORY) {
        Err(esr) if is_gpf(esr) => check("rmm-memory-read-faults", Ok(())),
        other => check("rmm-memory-read-faults", Err(format_args!("{other:#x?}"))),
    }
}

fn psci_refusals() {
    let entry = secondary_start as *const () as u64;
    expect("cpu-on-self-refused", smc(psci::fid::CPU_ON_64, 0, entry, 0)[0], Code::AlreadyOn.to_register());
    expect(
        "cpu-on-nobody-refused",
        smc(psci::fid::CPU_ON_64, 0xFF_0000, entry, 0)[0],
        Code::InvalidParameters.to_register(),
    );
    expect(
        "cpu-on-into-rmm-refused",
        smc(psci::fid::CPU_ON_64, 1, RMM_MEMORY, 0)[0],
        Code::InvalidAddress.to_register(),
    );
    expect("affinity-of-self-is-on", smc(psci::fid::AFFINITY_INFO_64, 0, 0, 0)[0], 0);
}

/// How often every CPU goes on and off.
const ROUNDS: u64 = 10;

/// Turns every other CPU on, once per round; together they delegate neighbouring granules.
fn other_cpus(rmm: bool, rounds: core::ops::RangeInclusive<u64>) -> u64 {
    let mut cpus = 1;
    while cpus < 16 && smc(psci::fid::AFFINITY_INFO_64, cpus, 0, 0)[0] == 1 {
        cpus += 1;
    }
    for round in rounds {
        for cpu in 1..cpus {
            let entry = secondary_start as *const () as u64;
            let result = smc(psci::fid::CPU_ON_64, cpu, entry, cpu)[0];
            if result != 0 {
                check("cpu-on", Err(format_args!("CPU {cpu}: {:#x}", result)));
                return cpus;
            }
        }
        if rmm {
            work(0);
        }
        for cpu in 1..cpus {
            while DONE[cpu as usize].load(Ordering::Acquire) != round {
                core::hint::spin_loop();
            }
            while smc(psci::fid::AFFINITY_INFO_64, cpu, 0, 0)[0] != 1 {
                core::hint::spin_loop();
            }
        }
    }
    cpus
}

/// A CPU's part in a round.
fn work(cpu: u64) {
    match PHASE.load(Ordering::Acquire) {
        phase::STORM => storm::storm(cpu),
        phase::RACE if cpu <= 2 => power::race(cpu),
        _ => churn(cpu),
    }
}

/// CPUs 0 and 2 turn CPU 1 on, while the others delegate.
fn race(cpus: u64) {
    PHASE.store(phase::RACE, Ordering::Release);
    for cpu in 2..cpus {
        expect("cpu-on", smc(psci::fid::CPU_ON_64, cpu, secondary_start as *const () as u64, cpu)[0], 0);
    }
    power::race(0);
    for cpu in 2..cpus {
        while smc(psci::fid::AFFINITY_INFO_64, cpu, 0, 0)[0] != 1 {
            core::hint::spin_loop();
        }
    }
    power::race_report();
}

/// Delegates and undelegates every 16th granule, beginning with the CPU's number.
fn churn(cpu: u64) {
    for n in 0..16 {
        let pa = pool(16 + n * 16 + cpu);
        let delegated = smc(rmi::fid::GRANULE_DELEGATE, pa, 0, 0)[0];
        let undelegated = smc(rmi::fid::GRANULE_UNDELEGATE, pa, 0, 0)[0];
        if (delegated, undelegated) != (0, 0) {
            check("delegate-on-all-cpus", Err(format_args!("CPU {cpu}: {delegated:#x} {undelegated:#x}")));
            return;
        }
    }
}

#[unsafe(no_mangle)]
extern "C" fn secondary(cpu: u64) -> ! {
    let version = smc(rmi::fid::VERSION, rmi::VERSION_1_0, 0, 0)[0];
    if version == 0 {
        work(cpu);
    } else if version != smccc::NOT_SUPPORTED {
        check("rmi-version-on-every-cpu", Err(format_args!("CPU {cpu}: {version:#x}")));
    }
    DONE[cpu as usize].fetch_add(1, Ordering::Release);
    smc(psci::fid::CPU_OFF, 0, 0, 0);
    line(format_args!("cpu-off FAILED CPU {cpu}"));
    console::fail()
}

/// Instruction counts; only meaningful when QEMU counts instructions.
fn bench() {
    let nothing = timed_nothing();
    let report = |name: &str, cost: u64| line(format_args!("bench {name} {}", cost - nothing));
    // The first round pays for the block that is divided into granules.
    let mut costs = [u64::MAX; 4];
    let pa = pool(300);
    for _ in 0..8 {
        let calls = [
            timed_smc(psci::fid::VERSION, 0),
            timed_smc(rmi::fid::VERSION, rmi::VERSION_1_0),
            timed_smc(rmi::fid::GRANULE_DELEGATE, pa),
            timed_smc(rmi::fid::GRANULE_UNDELEGATE, pa),
        ];
        for (cost, (_, ticks)) in costs.iter_mut().zip(calls) {
            *cost = ticks.min(*cost);
        }
    }
    report("PSCI_VERSION", costs[0]);
    report("RMI_VERSION", costs[1]);
    report("RMI_GRANULE_DELEGATE", costs[2]);
    report("RMI_GRANULE_UNDELEGATE", costs[3]);
}
