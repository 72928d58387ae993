//! What must arrive though nobody else would wake the sleeper. If it is lost, all sleep for ever, which the explorer
//! reports.

use crate::{SPI, Work, irqfd, line, small, system_off, together};
use cca_abi::kvm;
use cca_abi::psci;
use kvm_realm::errno::Errno;
use shuttle::thread;
use sim::bench::Bench;
use sim::gic;
use sim::guest::{Op, Outcome, Steps};
use sim::host::Signal;
use sim::hostile::Random;
use sim::machine::Machine;
use sim::memory::PAGE_SIZE;
use sim::vmm::{DEVICE, ENTRY, RAM_BASE, SECOND, SHARED};
use std::sync::Arc;

/// The word by which guests tell each other something.
const WORD: u64 = RAM_BASE + 8 * PAGE_SIZE;

/// The guest's first operations, then what `rest` says, with how many have been done.
fn scripted(
    first: impl IntoIterator<Item = Op, IntoIter: Send + 'static>,
    rest: impl Fn(&mut u64, Option<Outcome>) -> Op + Send + Clone + 'static,
) -> Steps {
    let mut first = first.into_iter();
    let mut state = 0;
    Box::new(move |outcome| first.next().unwrap_or_else(|| rest(&mut state, outcome)))
}

/// A value that a load or an acknowledgement brought.
fn result(outcome: Option<Outcome>) -> u64 {
    match outcome {
        Some(Outcome::Done(registers)) => registers[0],
        other => panic!("{other:?}"),
    }
}

/// An interrupt that is signalled once must reach a guest that sleeps, whatever else happens; nobody is there to wake it
/// otherwise. If it is lost, all sleep for ever, which the explorer reports.
pub(crate) fn no_wake_up_is_lost(machine: &Arc<Machine>, seed: u64) {
    const TIMES: u64 = 3;
    machine.forget_log();
    // The guest takes interrupts, one at a time, says so to the VMM, which then sends the next.
    machine.load_steps(ENTRY, move || {
        scripted(gic::enable_spi(SPI.into()), move |done, outcome| {
            // 0 mod 4: acknowledge; 1: look at the answer, WFI or end of interrupt; 2: tell.
            match *done % 4 {
                0 => {
                    *done += 1;
                    Op::Acknowledge
                }
                1 => {
                    let intid = result(outcome);
                    if intid == u64::from(SPI) {
                        *done += 1;
                        Op::EndOfInterrupt { intid }
                    } else {
                        *done -= 1;
                        Op::Wfi
                    }
                }
                2 => {
                    *done += 1;
                    Op::Write { ipa: DEVICE | SHARED, size: 8, value: *done / 4 }
                }
                _ if *done / 4 + 1 == TIMES => system_off(),
                _ => {
                    *done += 2;
                    Op::Acknowledge
                }
            }
        })
    });
    let bench = Bench::on(machine.clone(), kvm::GENERATION_V2);
    let vmm = bench.ready(small(1));
    let events = [vmm.process.eventfd(), vmm.process.eventfd()];
    let level = seed % 2 == 1;
    let flags = if level { 2 } else { 0 };
    irqfd(&vmm, events[0], flags, events[1]).expect("an irqfd");
    let told = Arc::new(shuttle::sync::Mutex::new(0u64));
    let news = Arc::new(shuttle::sync::Condvar::new());
    let mut work: Vec<Work> = Vec::new();
    {
        let (told, news) = (told.clone(), news.clone());
        work.push(Box::new(move |vmm| {
            let event = vmm.run_to_end(0, &|gpa, value| {
                assert_eq!((gpa, value.is_some()), (DEVICE, true));
                *told.lock().unwrap() += 1;
                news.notify_all();
                0
            });
            assert_eq!(event, Ok(1));
        }));
    }
    work.push(Box::new(move |vmm| {
        for time in 0..TIMES {
            vmm.process.signal(events[0]);
            if level {
                // A device that still wants attention raises its line again as soon as it is asked.
                while vmm.process.take_signals(events[1]) == 0 {
                    thread::yield_now();
                }
            } else {
                drop(news.wait_while(told.lock().unwrap(), |told| *told <= time).unwrap());
            }
        }
    }));
    // Somebody disturbs, but nothing that the guest's interrupts depend on.
    work.push(Box::new(move |vmm| {
        let second = vmm.second();
        let mut random = Random::new(seed ^ 0x700);
        for _ in 0..4 {
            match random.below(3) {
                0 => vmm.process.discard(vmm.ram, PAGE_SIZE),
                1 => line(&second, 1 << 24 | (SPI + 1), true),
                _ => drop(second.set_private(RAM_BASE + 12 * PAGE_SIZE, PAGE_SIZE, random.coin())),
            }
        }
    }));
    let vmm = together(vmm, work);
    bench.finish(vmm);
}

/// One vCPU switches another on, again and again; that one says that it was on, and switches itself off. None of these
/// may get lost, or the first would wait for ever.
pub(crate) fn vcpus_come_and_go(machine: &Arc<Machine>, seed: u64) {
    const TIMES: u64 = 3;
    machine.forget_log();
    machine.load_steps(ENTRY, move || {
        let (mut round, mut step) = (0, 0);
        Box::new(move |outcome| {
            loop {
                match step {
                    0 => {
                        step = 1;
                        let call = [psci::fid::CPU_ON_64, 1, SECOND, 0];
                        return if round == TIMES { system_off() } else { Op::smc(&call) };
                    }
                    // Answered: on, or it was still on.
                    1 => step = if result(outcome) == 0 { 3 } else { 2 },
                    // A moment, then once more.
                    2 | 5 => {
                        step = if step == 2 { 0 } else { 3 };
                        return Op::Read { ipa: DEVICE | SHARED, size: 8 };
                    }
                    3 => {
                        step = 4;
                        return Op::Read { ipa: WORD, size: 8 };
                    }
                    _ if result(outcome) > round => (round, step) = (round + 1, 0),
                    _ => step = 5,
                }
            }
        })
    });
    let counter = Arc::new(std::sync::atomic::AtomicU64::new(0));
    machine.load_steps(SECOND, move || {
        let value = counter.fetch_add(1, std::sync::atomic::Ordering::Relaxed) + 1;
        scripted([Op::Write { ipa: WORD, size: 8, value }], |_, _| Op::smc(&[psci::fid::CPU_OFF]))
    });
    let bench = Bench::on(machine.clone(), kvm::GENERATION_V2);
    let vmm = bench.ready(small(2));
    let second = Signal::default();
    let other = second.clone();
    let vmm = together(
        vmm,
        vec![
            Box::new(move |vmm| {
                let device = |_, _| {
                    thread::yield_now();
                    0
                };
                assert_eq!(vmm.run_to_end(0, &device), Ok(1));
                second.raise();
            }),
            Box::new(move |vmm| {
                other.adopt();
                let ended = vmm.run_to_end(1, &|_, _| 0);
                assert!(matches!(ended, Ok(_) | Err(Errno::EINTR)), "{ended:?}");
            }),
            Box::new(move |vmm| {
                let second = vmm.second();
                let mut random = Random::new(seed);
                for _ in 0..3 {
                    vmm.process.discard(vmm.ram, PAGE_SIZE);
                    line(&second, 1 << 24 | SPI, random.coin());
                }
            }),
        ],
    );
    bench.finish(vmm);
}
