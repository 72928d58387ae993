//! The host core under schedules that `shuttle` chooses: threads of a VMM, vCPUs, signallers of eventfds, changes of the
//! VMM's mappings, and the process's end, in any interleaving of the core's locks and atomics. Whatever happens: no
//! panic, nobody waits for ever, no command names a page that its caller does not own, no page is freed while the RMM
//! has it, and in the end everything is the host's again.
//!
//! An RMI command is one step here; that those of several CPUs are like steps is what the RMM's own explorer shows.
//! Between two instructions of a guest anything can happen.
//!
//! `cargo test -p sim --features explore --test schedules`. `REALM_SCHEDULES` is the number of scenarios of each kind,
//! `REALM_SEED` the first one.
#![cfg(feature = "explore")]

mod anything;
mod arrivals;
mod sharing;

use cca_abi::kvm::{self, ioctl};
use cca_abi::psci;
use shuttle::scheduler::{PctScheduler, RandomScheduler, Scheduler};
use shuttle::thread;
use sim::guest::Op;
use sim::machine::{Machine, Shape};
use sim::memory::PAGE_SIZE;
use sim::vmm::{Config, Vmm};
use std::sync::Arc;
use std::time::Instant;

/// What is small is soon in every state.
const RAM: u64 = 16 * PAGE_SIZE;
/// A line of a device.
const SPI: u32 = 40;

fn small(vcpus: u32) -> Config {
    Config { ram: RAM, vcpus, image_pages: 2, ..Config::default() }
}

/// The end of a guest.
fn system_off() -> Op {
    Op::smc(&[psci::fid::SYSTEM_OFF])
}

/// Sets the level of an interrupt line.
fn line(vmm: &Vmm, irq: u32, high: bool) {
    let mut line = kvm::IrqLevel { irq, level: high.into() };
    let _ = vmm.ioctl(vmm.vm(), ioctl::IRQ_LINE, &mut line);
}

/// Lets an eventfd raise [`SPI`].
fn irqfd(vmm: &Vmm, fd: i32, flags: u32, resample: i32) -> kvm_realm::Result {
    let (fd, resamplefd) = (fd as u32, resample as u32);
    let mut args = kvm::Irqfd { fd, gsi: SPI - 32, flags, resamplefd, pad: [0; 16] };
    vmm.ioctl(vmm.vm(), ioctl::IRQFD, &mut args)
}

/// What one thread of a VMM does.
type Work = Box<dyn FnOnce(&Vmm) + Send>;

/// A machine for all schedules: it is as new when nothing is left on it.
fn machine() -> Arc<Machine> {
    Machine::boot(Shape { cpus: 8, dram: 6 << 20, ..Shape::default() })
}

/// Runs `work` as tasks of one VMM, and returns when all have come back.
fn together(vmm: Vmm, work: Vec<Work>) -> Vmm {
    let vmm = Arc::new(vmm);
    let tasks: Vec<_> = work
        .into_iter()
        .map(|work| {
            let vmm = vmm.clone();
            thread::spawn(move || work(&vmm))
        })
        .collect();
    tasks.into_iter().for_each(|task| task.join().expect("the task"));
    Arc::into_inner(vmm).expect("nobody else has the VMM")
}

const SCHEDULES: usize = 20;

fn explore(scheduler: impl Scheduler + 'static, scenario: impl Fn() + Send + Sync + 'static) {
    let mut config = shuttle::Config::new();
    config.stack_size = 1 << 20;
    config.silence_warnings = true;
    shuttle::Runner::new(scheduler, config).run(scenario);
}

fn number(variable: &str, otherwise: u64) -> u64 {
    std::env::var(variable).ok().and_then(|value| value.parse().ok()).unwrap_or(otherwise)
}

/// Each scenario under some schedules of both kinds: random ones, and such with few preemptions.
fn all_schedules(name: &str, otherwise: u64, scenario: fn(&Arc<Machine>, u64)) {
    let start = Instant::now();
    let (first, count) = (number("REALM_SEED", 1), number("REALM_SCHEDULES", otherwise));
    let machine = machine();
    for seed in first..first + count {
        let (one, other) = (machine.clone(), machine.clone());
        let report = Report { name, seed };
        explore(RandomScheduler::new_from_seed(seed, SCHEDULES / 2), move || scenario(&one, seed));
        explore(PctScheduler::new_from_seed(seed, 3, SCHEDULES / 2), move || scenario(&other, seed));
        std::mem::forget(report);
    }
    let schedules = count * SCHEDULES as u64;
    let rate = schedules * 1000 / u64::try_from(start.elapsed().as_millis()).unwrap().max(1);
    println!("{name}: {count} scenarios, {schedules} schedules, {rate} per second");
}

/// Says which scenario failed.
struct Report<'a> {
    name: &'a str,
    seed: u64,
}

impl Drop for Report<'_> {
    fn drop(&mut self) {
        println!("{}: scenario {} failed: REALM_SEED={} REALM_SCHEDULES=1", self.name, self.seed, self.seed);
    }
}

#[test]
fn a_vmm_that_does_everything_at_once_loses_nothing_under_any_schedule() {
    all_schedules("everything at once", 40, anything::everything_at_once);
}

#[test]
fn two_threads_that_build_one_realm_lose_nothing_under_any_schedule() {
    all_schedules("two builders", 20, anything::two_builders);
}

#[test]
fn no_interrupt_is_lost_under_any_schedule() {
    all_schedules("no wake-up is lost", 20, arrivals::no_wake_up_is_lost);
}

#[test]
fn no_vcpu_that_was_switched_on_stays_off_under_any_schedule() {
    all_schedules("vCPUs come and go", 20, arrivals::vcpus_come_and_go);
}

#[test]
fn a_realm_reaches_no_page_that_its_vmm_gave_away_under_any_schedule() {
    all_schedules("shared pages change", 20, sharing::shared_pages_change);
}
