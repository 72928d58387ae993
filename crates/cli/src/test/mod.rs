//! `realm test`: everything that is checked, from formatting to Realms on the emulated machine.
//!
//! Every test has a name and is independent: it builds what it needs (which costs nothing the second time), boots a
//! machine of its own, and reports with the layer and the console that matter. Several run side by side.
//!
//! | module | question it answers |
//! |---|---|
//! | [`code`] | is the source in order, and do its unit tests pass? |
//! | [`firmware`] | do monitor and RMM keep their promises, without and with a host kernel? |
//! | [`realms`] | do Realms live and end as they should? |
//! | [`devices`] | do their devices work? |
//! | [`life`] | can they be talked to while they run? |
//! | [`network`] | do they reach the outside, and does it reach them? |
//! | [`load`] | do several vCPUs work under load, and on another host kernel? |
//! | [`transparency`] | is it known what was launched, and where the time went? |
//! | [`debug`] | has a kernel that looks for mistakes nothing to say? |
//! | [`fuzz`] | can bytes be found that break something? |
//! | [`debian`] | does a Debian disk come into being, and boot as a Realm? |
//! | [`guide`] | does docs/guide.md say the truth? |

mod code;
mod debian;
mod debug;
mod devices;
mod examples;
mod firmware;
mod folder;
mod fuzz;
mod guide;
mod life;
mod load;
mod network;
pub(crate) mod overflows;
mod realms;
mod transparency;

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::args::{MachineArgs, RunArgs, TestArgs};
use crate::build::{self, initramfs};
use crate::lab::complaints::is_out_of_memory;
use crate::lab::session::{Job, Outcome};
use crate::lab::stages::Timeline;
use crate::lab::{self, machine};
use crate::setup::{self, Environment};
use crate::{command, ui};

pub(crate) use firmware::run_payload;

/// The module's counters.
pub(crate) const COUNTERS: &str = "/sys/kernel/debug/kvm-realm";

/// One test.
struct Test {
    name: &'static str,
    /// Whether `--quick` leaves it out.
    emulated: bool,
    /// Whether only `--full` or its name runs it.
    long: bool,
    run: fn(&Environment) -> Result<()>,
}

const fn quick(name: &'static str, run: fn(&Environment) -> Result<()>) -> Test {
    Test { name, emulated: false, long: false, run }
}

const fn emulated(name: &'static str, run: fn(&Environment) -> Result<()>) -> Test {
    Test { name, emulated: true, long: false, run }
}

/// All tests in their order: what is quick and fails often comes first.
const TESTS: &[Test] = &[
    quick("format", code::format),
    quick("lint", code::lint),
    quick("lint-arm64", code::lint_arm64),
    quick("unit-property-and-simulation", code::unit),
    quick("commands-of-several-cpus-have-an-order", code::schedules),
    quick("monitor-keeps-order-among-cpus", code::monitor_schedules),
    quick("host-core-loses-nothing-under-any-schedule", code::host_schedules),
    quick("images-cannot-panic", crate::audit::panics),
    quick("stacks-are-bounded", crate::audit::stacks),
    emulated("payload-on-1-cpu-by-interface-0.x", |environment| {
        firmware::payload(environment, 1, 1, firmware::OLD_INTERFACE)
    }),
    emulated("payload-on-4-cpus-and-64-gib", |environment| {
        firmware::payload(environment, 4, 64, MachineArgs::default)
    }),
    emulated("payload-on-the-newest-qemu", firmware::newest_qemu),
    emulated("costs-stay-within-their-limits", crate::bench::check),
    emulated("host-boots-on-4-cpus", |environment| firmware::host_boots(environment, 4)),
    emulated("exec-gives-output-and-status-of-a-guest-that-knows-it-is-a-realm", realms::exec_gives),
    emulated("stock-guest-attests-what-was-predicted", transparency::attests),
    emulated("another-realm-than-was-to-be-launched-is-noticed", transparency::another_realm),
    emulated("a-trace-agrees-with-the-modules-counters", transparency::trace),
    emulated("vmm-examples-do-what-they-say", examples::examples),
    emulated("ten-realms-and-a-reload-lose-no-page", realms::ten_realms),
    emulated("killed-vmm-leaves-nothing-and-pays-for-its-memory", realms::killed_vmm),
    emulated("host-cannot-read-a-private-page", realms::private_page),
    emulated("devices-work-and-the-measurement-is-predicted", devices::devices),
    emulated("four-vcpus-under-load-on-the-newest-host", load::on_the_newest_host),
    Test { name: "four-vcpus-under-load-twenty-times", emulated: true, long: true, run: load::twenty_rounds },
    emulated("realms-have-names-and-take-commands", life::two_on_one_host),
    Test {
        name: "realms-in-the-background-take-commands",
        emulated: true,
        long: true,
        run: life::in_the_background,
    },
    Test { name: "debug-kernel-has-no-complaint", emulated: true, long: true, run: debug::no_complaint },
    Test { name: "fuzz-targets-run-a-while", emulated: false, long: true, run: fuzz::run_a_while },
    Test { name: "debian-disk-boots-with-network", emulated: true, long: true, run: debian::debian_disk },
    Test { name: "guide-does-what-it-says", emulated: true, long: true, run: guide::guide },
];

/// Runs the tests; the status is 1 when one failed.
pub(crate) fn run(args: &TestArgs) -> Result<u8> {
    let wanted: Vec<&Test> = TESTS
        .iter()
        .filter(|test| !(args.quick && test.emulated))
        .filter(|test| !test.long || args.full || !args.only.is_empty())
        .filter(|test| args.only.is_empty() || args.only.iter().any(|name| test.name.contains(name.as_str())))
        .collect();
    if args.list && args.json {
        println!("{}", serde_json::Value::from_iter(wanted.iter().map(|test| test.name)));
        return Ok(0);
    }
    if args.list {
        wanted.iter().for_each(|test| println!("{}", test.name));
        return Ok(0);
    }
    ensure!(!wanted.is_empty(), "no test has such a name: see `realm test --list`");
    let environment = setup::ensure(None, false)?;
    let (count, start) = (wanted.len(), Instant::now());
    let queue = Mutex::new(wanted.into_iter());
    let failed = Mutex::new(Vec::new());
    let next = || locked(&queue).next();
    let work = || {
        while let Some(test) = next() {
            if !test.passes(&environment) {
                locked(&failed).push(test.name);
            }
        }
    };
    std::thread::scope(|scope| (0..jobs(args)).for_each(|_| drop(scope.spawn(work))));
    let failed = failed.into_inner().unwrap_or_else(PoisonError::into_inner);
    for name in &failed {
        println!("failed: {name}");
    }
    let took = ui::seconds(start.elapsed());
    println!("{} passed, {} failed in {took}", count - failed.len(), failed.len());
    Ok(u8::from(!failed.is_empty()))
}

impl Test {
    /// Runs it, and says how it went.
    fn passes(&self, environment: &Environment) -> bool {
        println!("test {} ...", self.name);
        let start = Instant::now();
        let result = (self.run)(environment);
        let took = ui::seconds(start.elapsed());
        match &result {
            Ok(()) => println!("test {}: ok ({took})", self.name),
            Err(error) => println!("test {}: FAILED ({took})\n{error:#}\n", self.name),
        }
        result.is_ok()
    }
}

/// How many tests run at a time. An emulated machine counts instructions in one thread, so that each CPU of this one drives
/// one.
fn jobs(args: &TestArgs) -> u32 {
    let cpus = std::thread::available_parallelism().map_or(1, |cpus| cpus.get().min(4));
    args.jobs.unwrap_or(u32::try_from(cpus).unwrap_or(1))
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The factor for time limits. They only end what hangs, and a test must not fail because a machine is slow.
fn patience() -> f64 {
    std::env::var("REALM_PATIENCE").ok().and_then(|text| text.parse().ok()).unwrap_or(3.0)
}

/// Runs a script with the host's shell on a machine of its own; gives status and output.
pub(crate) fn on_host(
    environment: &Environment,
    cpus: u32,
    module: bool,
    script: &str,
    limit: u64,
) -> Result<(Outcome, String)> {
    let machine = MachineArgs { host_cpus: Some(cpus), ..MachineArgs::default() };
    on_machine(environment, &machine, &[], module, script, limit)
}

/// As [`on_host`], on a machine of any shape, with more files in its root directory.
pub(crate) fn on_machine(
    environment: &Environment,
    machine: &MachineArgs,
    files: &[PathBuf],
    module: bool,
    script: &str,
    limit: u64,
) -> Result<(Outcome, String)> {
    provoking(Provoked::Nothing, environment, machine, files, module, script, limit)
}

/// What a test wants the host kernel to complain about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Provoked {
    Nothing,
    Oops,
    OutOfMemory,
}

/// The host kernel complained of nothing, but maybe of memory that is used up.
fn quiet(outcome: &Outcome, out_of_memory: bool, directory: &Path) -> Result<()> {
    let complaints: Vec<&str> = outcome
        .complaints
        .iter()
        .map(String::as_str)
        .filter(|line| !(out_of_memory && is_out_of_memory(line)))
        .collect();
    ensure!(
        complaints.is_empty(),
        "the host kernel complains:\n{}\nall consoles: {}",
        complaints.join("\n"),
        directory.display()
    );
    Ok(())
}

/// As [`on_machine`], for scripts that do what the kernel complains about.
fn provoking(
    provoked: Provoked,
    environment: &Environment,
    machine: &MachineArgs,
    files: &[PathBuf],
    module: bool,
    script: &str,
    limit: u64,
) -> Result<(Outcome, String)> {
    let images = build::for_run(environment)?;
    let parts = lab::host_parts(environment, &images, &None, &None, files);
    let initrd = initramfs::host(environment, &parts)?;
    let config = lab::config(environment, &images, machine, None, None, initrd)?;
    let patience = patience() * if environment.host.debug { lab::DEBUG_PATIENCE } else { 1.0 };
    let job = Job {
        capture: true,
        ..lab::host_command(&config, script, module, Duration::from_secs(limit), patience)
    };
    let (outcome, directory) = lab::execute(&config, &job, &mut Timeline::new())?;
    if provoked != Provoked::Oops {
        quiet(&outcome, provoked == Provoked::OutOfMemory, &directory)?;
    }
    let mut text = String::from_utf8_lossy(&outcome.stdout).into_owned();
    if outcome.status != 0 {
        let errors = std::fs::read(directory.join(machine::log::PROGRAM)).unwrap_or_default();
        text.push_str(&String::from_utf8_lossy(&errors));
        let console = std::fs::read(directory.join(machine::log::HOST)).unwrap_or_default();
        text.push_str("--- the end of the host's console ---\n");
        text.push_str(&command::tail(&String::from_utf8_lossy(&console), 15));
        text.push_str(&format!("\nall consoles: {}", directory.display()));
    }
    Ok((outcome, text))
}

/// Like [`on_host`], for scripts that end with 0 when all is well.
fn host_script(
    environment: &Environment,
    cpus: u32,
    module: bool,
    script: &str,
    limit: u64,
) -> Result<String> {
    let (outcome, text) = on_host(environment, cpus, module, script, limit)?;
    ensure!(outcome.status == 0, "the script on the host ended with {}:\n{text}", outcome.status);
    Ok(text)
}

/// `realm run --exec` as a user starts it, with flags, but with its output caught.
fn exec_with(environment: &Environment, command: &str, arguments: RunArgs) -> Result<(u8, String)> {
    let images = build::for_run(environment)?;
    let arguments = RunArgs { exec: Some(command.to_owned()), ..arguments };
    let parts = lab::host_parts(environment, &images, &None, &None, &[]);
    let initrd = initramfs::host(environment, &parts)?;
    let config = lab::realm_config(environment, &images, &arguments, initrd)?;
    let job = Job {
        capture: true,
        progress: false,
        timeout: Some(Duration::from_secs(120)),
        patience: patience(),
        ..lab::realm_job(&config, &arguments)?
    };
    let (outcome, directory) = lab::execute(&config, &job, &mut Timeline::new())?;
    quiet(&outcome, false, &directory)?;
    Ok((outcome.status, String::from_utf8_lossy(&outcome.stdout).into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique() {
        for (index, test) in TESTS.iter().enumerate() {
            assert!(TESTS[index + 1..].iter().all(|other| other.name != test.name), "{}", test.name);
        }
    }
}
