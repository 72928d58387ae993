//! Hostile VMMs and hostile guests on the simulated machine: whatever they do, in whatever order and at the same time,
//! every call comes back, no rule of memory ownership is broken, and in the end every page is the host's again.

use cca_abi::kvm::{self, ioctl, rme};
use cca_abi::{psci, rsi};
use kvm_realm::errno::Errno;
use sim::bench::Bench;
use sim::guest::{Guest, Op};
use sim::host::Signal;
use sim::hostile::{CHANGES, Caller, OTHERS, Random};
use sim::memory::PAGE_SIZE;
use sim::vmm::{Config, DEVICE, ENTRY, Exit, GICD, GICR, RAM_BASE, SECOND, SHARED, STEPS, Vmm};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use std::time::{Duration, Instant};

/// RAM of the hostile machines.
const RAM: u64 = 1 << 20;

/// The ITS's frames, and where its queue and tables lie in memory that the guest has shared.
const ITS: u64 = 0x3FD0_0000;
const QUEUE: u64 = RAM_BASE + 0x8_0000;
const TABLES: u64 = RAM_BASE + 0x9_0000;

/// A small virtual machine: what is small is soon in every state.
fn small(vcpus: u32) -> Config {
    Config { ram: RAM, vcpus, its: Some(ITS), ..Config::default() }
}

/// Things that guests and VMMs have done, for those who run this for long.
static DONE: AtomicU64 = AtomicU64::new(0);

/// Does any ioctl.
fn fuzz(caller: &mut Caller) {
    DONE.fetch_add(1, Relaxed);
    caller.fuzz(&[CHANGES, OTHERS]);
}

/// Pulls memory away under the guest.
fn disturb_memory(caller: &mut Caller) {
    let page = caller.random.page(RAM);
    caller.disturb_memory(page, 40);
}

/// Runs a vCPU, obeying the guest or not, until told to stop. Tells the others to stop when the guest cannot go on:
/// nobody can give it back a page that it used and that was taken away.
fn run_vcpu(vmm: &Vmm, seed: u64, vcpu: usize, stop: &AtomicBool) {
    let mut caller = Caller::new(vmm, seed);
    let (mut errors, mut faults, mut last) = (0, 0, 0);
    while !stop.load(SeqCst) {
        if errors > 20 || faults > 20 {
            stop.store(true, SeqCst);
            break;
        }
        let exit = caller.run(vcpu);
        let page = if let Ok(Exit::MemoryFault { gpa, .. }) = exit { gpa } else { 0 };
        faults = if page != 0 && page == last { faults + 1 } else { 0 };
        last = page;
        match exit {
            Ok(Exit::SystemEvent(_)) => stop.store(true, SeqCst),
            Err(Errno::EINTR) => break,
            Ok(_) => {}
            Err(_) => errors += 1,
        }
    }
}

/// Runs `work` on threads of their own, each with a signal, until one of them says stop or `time` has passed; then
/// makes all come back.
fn for_a_while(time: Duration, work: &[&(dyn Fn(&AtomicBool) + Sync)]) {
    let stop = AtomicBool::new(false);
    let stop = &stop;
    std::thread::scope(|scope| {
        let signals: Vec<Signal> = work
            .iter()
            .map(|work| {
                let signal = Signal::default();
                let own = signal.clone();
                scope.spawn(move || {
                    own.adopt();
                    work(stop);
                });
                signal
            })
            .collect();
        let started = Instant::now();
        while started.elapsed() < time && !stop.load(SeqCst) {
            std::thread::sleep(Duration::from_millis(1));
        }
        stop.store(true, SeqCst);
        signals.iter().for_each(Signal::raise);
    });
}

/// Calls `round` with ascending numbers for about three seconds, or as many as `REALM_HOSTILE_SECONDS` says.
fn many_rounds(mut round: impl FnMut(u64)) {
    let seconds =
        std::env::var("REALM_HOSTILE_SECONDS").ok().and_then(|value| value.parse().ok()).unwrap_or(3);
    let started = Instant::now();
    let mut number = 0;
    while started.elapsed() < Duration::from_secs(seconds) {
        round(number);
        number += 1;
    }
    println!("{number} rounds; {} operations of guests and VMMs so far", DONE.load(Relaxed));
}

/// Something that a guest can do to its ITS: registers with sense and without, orders with sense and without.
fn its_op(random: &mut Random) -> Op {
    let frame = ITS | SHARED;
    let any = random.word();
    let long = |offset: u64, value| Op::Write { ipa: frame + offset, size: 8, value };
    match random.below(8) {
        0 => Op::Write { ipa: frame, size: 4, value: random.below(4) },
        1 => long(0x80, random.of(&[1 << 63 | QUEUE, 1 << 63 | QUEUE | 0xFF, QUEUE, any])),
        2 => long(0x100, 1 << 63 | TABLES | random.below(0x100)),
        3 => long(0x108, 1 << 63 | TABLES | random.below(0x100)),
        // Up to eight orders.
        4 | 5 => long(0x88, random.below(9) * 32),
        6 => long(random.below(0x1_0000 / 8) * 8, random.bits()),
        _ => Op::Read { ipa: frame + random.below(0x2_0000 / 4) * 4, size: 4 },
    }
}

/// A word of an order in the queue: of few devices, events and collections, so that they meet.
fn its_order(random: &mut Random) -> Op {
    let slot = random.below(8);
    let few = random.below(4);
    let (word, value) = match random.below(4) {
        0 => (0, random.of(&[1, 3, 4, 5, 8, 9, 10, 11, 12, 13, 14, 15, 0xFF]) | few << 32),
        1 => (1, random.below(3) | (8192 + random.below(8)) << 32),
        2 => (2, random.of(&[0, 1 << 63]) | random.below(4) << 16 | few),
        _ => (random.below(4), random.bits()),
    };
    Op::Write { ipa: (QUEUE + slot * 32 + word * 8) | SHARED, size: 8, value }
}

/// A guest that does anything that a guest can do.
fn hostile_guest(guest: &Guest, seed: u64) {
    let mut random = Random::new(seed);
    // LPIs need memory that the host can read.
    let _ = guest.ipa_state_set(QUEUE, QUEUE + 0x2_0000, false, true);
    loop {
        DONE.fetch_add(1, Relaxed);
        let page = random.page(RAM);
        let size = random.of(&[1, 2, 4, 8]);
        let alias = if random.coin() { SHARED } else { 0 };
        let frame = random.of(&[GICD, GICR, GICR + 0x1_0000, GICR + 0x3_0000, GICR + 0x4_0000]);
        let register = (frame | SHARED) + random.below(0x1_0000 / size) * size;
        let anywhere = random.below(2 * SHARED / 8) * 8;
        let value = if random.coin() { random.bits() << random.below(40) } else { u64::MAX };
        let mpidr = random.of(&[0, 1, 2, 3, 0x10, 0x100, 0xFF_00FF_FFFF, u64::MAX]);
        let op = match random.below(20) {
            16 | 17 => its_op(&mut random),
            18 => its_order(&mut random),
            19 => match random.below(4) {
                // LPIs of a redistributor: configuration, pending table, enable.
                0 => Op::Write { ipa: (GICR + 0x70) | SHARED, size: 8, value: TABLES | 15 },
                1 => Op::Write { ipa: (GICR + 0x78) | SHARED, size: 8, value: TABLES },
                2 => Op::Write { ipa: GICR | SHARED, size: 4, value: 1 },
                _ => random.of(&[Op::Pair { ipa: anywhere }, Op::Pair { ipa: page | alias }]),
            },
            0..3 => Op::Read { ipa: page | alias, size: 8 },
            3..5 => Op::Write { ipa: page | alias, size, value },
            5 => Op::Execute { ipa: anywhere },
            6 => Op::Read { ipa: anywhere, size: 8 },
            7 => Op::Write { ipa: anywhere, size: 8, value },
            8 => Op::Read { ipa: register, size },
            9..11 => Op::Write { ipa: register, size, value },
            11 => {
                let base = random.of(&[page, page, 0, RAM_BASE, anywhere & !0xFFF, SHARED - PAGE_SIZE]);
                let top = base.wrapping_add(random.of(&[0, 1, 8, 64, 0x800, 0x10_0000]) * PAGE_SIZE);
                let fid = random.of(&[rsi::fid::IPA_STATE_SET, rsi::fid::IPA_STATE_GET]);
                // One in four is another service of the RMM, with addresses where it wants other things.
                let other = rsi::fid::VERSION + random.below(12);
                let fid = if random.below(4) == 0 { other } else { fid };
                Op::smc(&[fid, base, top, random.below(3), random.below(3)])
            }
            12 => {
                // Seldom: who is off can do no harm.
                let rest = random.of(&[psci::fid::CPU_SUSPEND_64, psci::fid::CPU_OFF, 0, 0, 0, 0, 0, 0]);
                let any = random.word();
                let fid = random.of(&[
                    psci::fid::CPU_ON_64,
                    psci::fid::CPU_ON_64,
                    psci::fid::AFFINITY_INFO_64,
                    psci::fid::AFFINITY_INFO_64,
                    rest,
                    rsi::fid::HOST_CALL,
                    any,
                ]);
                let first = if fid == rsi::fid::HOST_CALL { page } else { mpidr };
                Op::smc(&[fid, first, SECOND, 7])
            }
            13 => {
                // ICC_SGI1R_EL1, ICC_SGI0R_EL1, ICC_ASGI1R_EL1.
                let iss = 3 << 20 | random.of(&[5u64, 6, 7]) << 17 | 12 << 10 | 11 << 1;
                Op::WriteSysreg { iss, value }
            }
            14 => Op::SetTimer { cval: guest.counter() + random.below(5000), ctl: random.below(4) },
            _ if random.below(8) == 0 => Op::Wfi,
            _ => random.of(&[Op::Acknowledge, Op::Hvc, Op::EndOfInterrupt { intid: 3 }]),
        };
        let _ = guest.execute(op);
    }
}

#[test]
fn memory_pulled_away_under_a_running_guest_is_never_lost() {
    let bench = Bench::new();
    many_rounds(|round| {
        bench.machine.load_program(ENTRY, move |guest| {
            let mut random = Random::new(100 + round);
            loop {
                let page = random.page(RAM) | if random.coin() { SHARED } else { 0 };
                let _ = guest.execute(Op::Write { ipa: page, size: 8, value: 1 });
                if random.below(8) == 0 {
                    let base = random.page(RAM);
                    let ram = random.coin();
                    let _ = guest.ipa_state_set(base, base + 4 * PAGE_SIZE, ram, true);
                }
            }
        });
        let vmm = bench.ready(small(1));
        for_a_while(
            Duration::from_millis(300),
            &[
                &|stop| run_vcpu(&vmm, round, 0, stop),
                &|stop| {
                    let mut caller = Caller::new(&vmm, 10 + round);
                    while !stop.load(SeqCst) {
                        disturb_memory(&mut caller);
                    }
                },
                &|stop| {
                    let mut caller = Caller::new(&vmm, 20 + round);
                    while !stop.load(SeqCst) {
                        disturb_memory(&mut caller);
                    }
                },
            ],
        );
        bench.finish(vmm);
    });
}

#[test]
fn a_guest_may_do_anything() {
    let bench = Bench::new();
    many_rounds(|round| {
        bench.machine.load_program(ENTRY, move |guest| hostile_guest(guest, 1000 + round));
        bench.machine.load_program(SECOND, move |guest| hostile_guest(guest, 2000 + round));
        let vmm = bench.ready(small(3));
        for_a_while(
            Duration::from_millis(300),
            &[
                &|stop| run_vcpu(&vmm, 30 + round, 0, stop),
                &|stop| run_vcpu(&vmm, 40 + round, 1, stop),
                &|stop| run_vcpu(&vmm, 50 + round, 2, stop),
            ],
        );
        bench.finish(vmm);
    });
}

#[test]
fn arbitrary_ioctls_in_any_state_lose_nothing() {
    let bench = Bench::new();
    bench.machine.load_program(ENTRY, |_| {});
    // KVM_RUN looks for signals before it enters: nothing runs here.
    let signal = Signal::default();
    signal.adopt();
    signal.raise();
    many_rounds(|seed| {
        let mut vmm = bench.vmm(small(2));
        let mut order = Random::new(seed);
        let mut next = 0;
        for n in 0..60 {
            // The steps of a proper VMM, most of them in order, and surprises in between. Some steps then fail.
            let step = if order.below(4) == 0 { order.below(STEPS.len() as u64) as usize } else { next };
            if order.coin() && (!vmm.vcpus.is_empty() || STEPS[step].0 != "finalize vCPUs") {
                let _ = STEPS[step].1(&mut vmm);
                next = if next + 1 < STEPS.len() { next + 1 } else { 0 };
            }
            let mut caller = Caller::new(&vmm, seed * 100 + n);
            match order.below(3) {
                0 => fuzz(&mut caller),
                1 => disturb_memory(&mut caller),
                _ => {}
            }
            if order.below(16) == 0 {
                vmm.process.close(3 + order.below(8) as i32);
            }
        }
        bench.finish(vmm);
    });
}

#[test]
fn arbitrary_ioctls_while_a_hostile_guest_runs_lose_nothing() {
    let bench = Bench::new();
    many_rounds(|round| {
        bench.machine.load_program(ENTRY, move |guest| hostile_guest(guest, 3000 + round));
        bench.machine.load_program(SECOND, move |guest| hostile_guest(guest, 4000 + round));
        let vmm = bench.ready(small(2));
        let fuzzer = |seed: u64| {
            let vmm = &vmm;
            move |stop: &AtomicBool| {
                let mut caller = Caller::new(vmm, seed);
                while !stop.load(SeqCst) {
                    fuzz(&mut caller);
                    disturb_memory(&mut caller);
                }
            }
        };
        for_a_while(
            Duration::from_millis(300),
            &[
                &|stop| run_vcpu(&vmm, 60 + round, 0, stop),
                &|stop| run_vcpu(&vmm, 70 + round, 1, stop),
                &fuzzer(80 + round),
                &fuzzer(90 + round),
            ],
        );
        bench.finish(vmm);
    });
}

#[test]
fn files_closed_while_two_threads_run_one_vcpu_leave_nothing_behind() {
    let bench = Bench::new();
    bench.machine.load_program(ENTRY, |guest| {
        for n in 0.. {
            let _ = guest.execute(Op::Write { ipa: RAM_BASE + n % 200 * PAGE_SIZE, size: 8, value: n });
        }
    });
    for round in 0..4 {
        let vmm = bench.ready(small(1));
        let vcpu = vmm.vcpus[0];
        let run = |_: &AtomicBool| {
            let _ = vmm.ioctl_value(vcpu, ioctl::RUN, 0);
        };
        let close = |_: &AtomicBool| {
            std::thread::sleep(Duration::from_millis(3 * round));
            for fd in [vmm.vm(), vcpu, vmm.vm() + 1] {
                vmm.process.close(fd);
            }
        };
        for_a_while(Duration::from_millis(30), &[&run, &run, &close]);
        bench.finish(vmm);
    }
}

#[test]
fn two_vcpus_that_start_at_once_start_one_interrupt_controller() {
    let bench = Bench::new();
    bench.machine.load_program(ENTRY, |guest| {
        guest.write(RAM_BASE + 0x10_0000 - PAGE_SIZE, 1);
    });
    for _ in 0..5 {
        let mut vmm = bench.vmm(small(2));
        for (name, step) in STEPS {
            // Without CTRL_INIT the first KVM_RUN initialises it.
            if *name == "create vGIC" {
                let mut args =
                    kvm::CreateDevice { device_type: kvm::device_type::ARM_VGIC_V3, fd: 0, flags: 0 };
                vmm.ioctl(vmm.vm(), ioctl::CREATE_DEVICE, &mut args).unwrap();
                for (attr, address) in
                    [(kvm::vgic_attr::ADDR_DIST, GICD), (kvm::vgic_attr::ADDR_REDIST, GICR)]
                {
                    vmm.set_device_attr(args.fd as i32, kvm::vgic_attr::GRP_ADDR, attr, address).unwrap();
                }
                continue;
            }
            step(&mut vmm).unwrap_or_else(|errno| panic!("{name}: {errno}"));
        }
        vmm.run_all(&|_, _| 0);
        bench.finish(vmm);
    }
}

#[test]
fn a_guest_cannot_make_the_host_keep_tables_for_memory_that_it_does_not_have() {
    let bench = Bench::new();
    bench.machine.load_program(ENTRY, |guest| {
        for n in 0..100 {
            // In the hole behind RAM, each in a table of its own.
            let page = RAM_BASE + 0x1000_0000 + n * 0x20_0000 + 0x3000;
            guest.ipa_state_set(page, page + PAGE_SIZE, false, true).expect("EMPTY stays EMPTY");
        }
        guest.execute(Op::Write { ipa: DEVICE | SHARED, size: 8, value: 1 }).unwrap();
    });
    let vmm = bench.ready(small(1));
    let before = bench.kernel.free_pages();
    assert!(matches!(vmm.run(0), Ok(Exit::Mmio { .. })));
    assert!(before - bench.kernel.free_pages() < 10, "{} pages", before - bench.kernel.free_pages());
    bench.finish(vmm);
}

#[test]
fn realm_commands_in_the_wrong_order_change_nothing() {
    let bench = Bench::new();
    bench.machine.load_program(ENTRY, |_| {});
    let vmm = bench.ready(small(1));
    let argument = vmm.process.mmap(PAGE_SIZE);
    for sub in
        [rme::CONFIG_REALM, rme::CREATE_RD, rme::INIT_IPA_REALM, rme::POPULATE_REALM, rme::ACTIVATE_REALM, 5]
    {
        assert!(vmm.rme(sub, argument).is_err(), "sub-command {sub}");
    }
    assert_eq!(vmm.run_to_end(0, &|_, _| 0), Ok(1));
    bench.finish(vmm);
}
