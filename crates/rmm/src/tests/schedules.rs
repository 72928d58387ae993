//! Commands on several CPUs at once, under schedules that `shuttle` chooses: whatever the interleaving of the RMM's
//! atomic operations, every CPU's answers and the final state are those of the same commands one after the other, in
//! some order. The order of one CPU's commands is kept. [`super::model`] is the judge.
//!
//! Only with the feature `explore`; `REALM_SCHEDULES` is the number of scenarios.

use std::sync::{Arc, Mutex};
use std::time::Instant;
use std::vec::Vec;

use cca_abi::rmi::fid;
use shuttle::scheduler::{PctScheduler, RandomScheduler, Scheduler};

use super::fuzz::{POOL, Random, command, pool, prepare};
use super::host::Host;
use super::model::{Action, Command, Model};
use super::std;
use crate::test_platform::BASE;

/// CPUs, and what each does.
const CPUS: u64 = 3;
const COMMANDS: u64 = 2;
/// Schedules per scenario.
const SCHEDULES: usize = 40;

/// A page of the host's that only one CPU uses.
fn own_page(cpu: u64) -> u64 {
    BASE + (POOL + cpu) * 4096
}

/// Commands that find what they read in a page of their CPU.
fn concurrent(random: &mut Random, model: &Model, cpu: u64) -> Command {
    let mut next = command(random, model);
    next.action = Action::Irq;
    match next.fid {
        fid::REALM_CREATE | fid::REC_ENTER => next.args[1] = own_page(cpu),
        fid::REC_CREATE => next.args[2] = own_page(cpu),
        _ => {}
    }
    next
}

/// A command that would succeed now, if one is found soon.
fn likely(random: &mut Random, model: &Model, cpu: u64) -> Command {
    let mut next = concurrent(random, model, cpu);
    for _ in 0..30 {
        if model.clone().run(&next).allowed.is_empty() && next.fid != fid::RTT_READ_ENTRY {
            break;
        }
        next = concurrent(random, model, cpu);
    }
    next
}

type Answer = [u64; 5];

fn issue(host: &Host, command: &Command) -> Answer {
    prepare(host, command);
    let regs = host.registers(command.fid, &command.args);
    [regs[0], regs[1], regs[2], regs[3], regs[4]]
}

fn agrees(model: &mut Model, command: &Command, answer: &Answer) -> bool {
    let verdict = model.run(command);
    let status =
        if verdict.allowed.is_empty() { answer[0] == 0 } else { verdict.allowed.contains(&answer[0]) };
    let outputs = if verdict.allowed.is_empty() || answer[0] & 0xFF == 4 { verdict.outputs } else { [0; 4] };
    status && answer[1..4] == outputs[..3]
}

/// Whether the rest of what the CPUs did can be put in an order; ends with the state of the machine.
fn can_be_ordered(model: &Model, done: &[Vec<(Command, Answer)>], at: &[usize], host: &Host) -> bool {
    if done.iter().zip(at).all(|(done, &at)| at == done.len()) {
        return model.matches(host);
    }
    (0..done.len()).any(|cpu| {
        let Some((command, answer)) = done[cpu].get(at[cpu]) else { return false };
        let mut model = model.clone();
        let mut next = at.to_vec();
        next[cpu] += 1;
        agrees(&mut model, command, answer) && can_be_ordered(&model, done, &next, host)
    })
}

fn scenario(seed: u64) {
    let mut random = Random::seeded(seed);
    let host = Arc::new(Host::with_granules(usize::try_from(POOL + CPUS).unwrap()));
    let mut model = Model::new(pool().chain((0..CPUS).map(own_page)));
    for _ in 0..60 + random.below(60) {
        let command = concurrent(&mut random, &model, 0);
        let answer = issue(&host, &command);
        assert!(agrees(&mut model, &command, &answer), "{command:x?} gave {answer:x?}");
    }
    let mut plans: Vec<Vec<Command>> =
        (0..CPUS).map(|cpu| (0..COMMANDS).map(|_| likely(&mut random, &model, cpu)).collect()).collect();
    // All want the same, every second time; commands with a page of their own keep to one CPU.
    let same = plans[0][0].clone();
    if seed % 2 == 0 && same.params.is_empty() && same.fid != fid::REC_ENTER {
        plans.iter_mut().for_each(|plan| plan[0] = same.clone());
    }
    let done = Arc::new(Mutex::new(std::vec![Vec::new(); plans.len()]));
    let cpus: Vec<_> = plans
        .into_iter()
        .enumerate()
        .map(|(cpu, plan)| {
            let (host, done) = (Arc::clone(&host), Arc::clone(&done));
            shuttle::thread::spawn(move || {
                for command in plan {
                    let answer = issue(&host, &command);
                    done.lock().unwrap()[cpu].push((command, answer));
                }
            })
        })
        .collect();
    cpus.into_iter().for_each(|cpu| cpu.join().unwrap());
    let done = done.lock().unwrap();
    let start = std::vec![0; done.len()];
    assert!(can_be_ordered(&model, &done, &start, &host), "seed {seed}: no order explains {:x?}", *done);
}

fn explore(scheduler: impl Scheduler + 'static, seed: u64) {
    let mut config = shuttle::Config::new();
    config.stack_size = 1 << 20;
    shuttle::Runner::new(scheduler, config).run(move || scenario(seed));
}

#[test]
fn commands_of_several_cpus_are_as_if_one_after_the_other() {
    let scenarios =
        std::env::var("REALM_SCHEDULES").ok().and_then(|value| value.parse::<u64>().ok()).unwrap_or(12);
    let start = Instant::now();
    for seed in 1..=scenarios {
        explore(RandomScheduler::new(SCHEDULES / 2), seed);
        explore(PctScheduler::new(3, SCHEDULES / 2), seed);
    }
    let schedules = scenarios * SCHEDULES as u64;
    let rate = schedules * 1000 / u64::try_from(start.elapsed().as_millis()).unwrap().max(1);
    std::println!("{scenarios} scenarios, {schedules} schedules, {rate} per second");
}
