//! Hostile guests, and VMMs whose threads do anything.

use crate::{RAM, SPI, Work, irqfd, line, small, system_off, together};
use cca_abi::kvm::{self, ioctl};
use cca_abi::{psci, rsi};
use kvm_realm::errno::Errno;
use shuttle::sync::atomic::{AtomicBool, Ordering::SeqCst};
use shuttle::thread;
use sim::bench::Bench;
use sim::guest::{Op, Steps};
use sim::host::Signal;
use sim::hostile::{CHANGES, Caller, Random, expected};
use sim::machine::{ELSEWHERE, Machine};
use sim::memory::PAGE_SIZE;
use sim::vmm::{DEVICE, ENTRY, Exit, GICD, GICR, RAM_BASE, SECOND, SHARED, STEPS};
use std::sync::Arc;

/// A page of RAM; most of the time one of a few, so that threads meet.
fn page(random: &mut Random) -> u64 {
    if random.below(4) == 0 { random.page(RAM) } else { RAM_BASE + (3 + random.below(3)) * PAGE_SIZE }
}

/// A guest that does a few things, any, and ends. The first vCPU switches the other one on before that.
fn hostile_guest(seed: u64, first: bool) -> Steps {
    let mut random = Random::new(seed);
    let mut left = 11;
    Box::new(move |_| {
        left -= 1;
        match left {
            10 if first => return Op::smc(&[psci::fid::CPU_ON_64, 1, SECOND, 7]),
            // Both want the same pages, and nobody has them yet.
            7..10 => {
                let page = RAM_BASE + (3 + random.below(2)) * PAGE_SIZE;
                return Op::Write { ipa: page, size: 8, value: 7 };
            }
            ..0 => return system_off(),
            _ => {}
        }
        let page = page(&mut random);
        let alias = random.of(&[0, SHARED]);
        let frame = random.of(&[GICD, GICD, GICR, GICR + 0x1_0000]);
        let enable =
            random.of(&[(0, 0x12), (0x84, u64::MAX), (0x104, u64::MAX), (0x108, u64::MAX), (0xC08, 0)]);
        match random.below(16) {
            0..3 => Op::Read { ipa: page | alias, size: 8 },
            3..6 => Op::Write { ipa: page | alias, size: 8, value: 7 },
            6 | 7 => {
                let top = page + (1 + random.below(3)) * PAGE_SIZE;
                Op::smc(&[rsi::fid::IPA_STATE_SET, page, top, random.below(2), 1])
            }
            8 => Op::smc(&[psci::fid::CPU_ON_64, random.below(2), SECOND, 7]),
            9 => {
                Op::smc(&[random.of(&[psci::fid::CPU_OFF, psci::fid::AFFINITY_INFO_64]), random.below(2), 0])
            }
            10 => Op::Write { ipa: (frame + enable.0) | SHARED, size: 4, value: enable.1 },
            11 => Op::WriteSysreg { iss: 3 << 20 | 5 << 17 | 12 << 10 | 11 << 1, value: 1 << 40 | 3 },
            12 => Op::Write { ipa: DEVICE | SHARED, size: 4, value: 1 },
            13 => Op::Acknowledge,
            14 => Op::SetTimer { cval: random.below(1 << 20), ctl: random.below(4) },
            _ => random.of(&[Op::Wfi, Op::EndOfInterrupt { intid: SPI.into() }]),
        }
    })
}

/// Something that a VMM may do to memory at any time.
fn disturb_memory(caller: &mut Caller) {
    let base = page(&mut caller.random);
    caller.disturb_memory(base, 3);
}

/// Something about interrupts and events.
fn disturb_events(caller: &mut Caller, events: &[i32; 2]) {
    let (vmm, random) = (&caller.vmm, &mut caller.random);
    let flags = random.of(&[0, 0, 1, 2, 3]);
    match random.below(8) {
        0..2 => drop(irqfd(vmm, events[0], flags, events[1])),
        2 => line(vmm, 1 << 24 | SPI, random.coin()),
        3 => line(vmm, 2 << 24 | (random.below(2) as u32) << 16 | 20, random.coin()),
        4 => {
            let mut args = kvm::Ioeventfd {
                datamatch: 1,
                addr: DEVICE,
                len: random.of(&[0, 4, 8]),
                fd: events[1],
                flags: random.of(&[0, 1, 4, 5]),
                pad: [0; 36],
            };
            let _ = vmm.ioctl(vmm.vm(), ioctl::IOEVENTFD, &mut args);
        }
        5 => {
            let mut zone = kvm::CoalescedZone { addr: DEVICE, size: 8, pio: 0 };
            let command = random.of(&[ioctl::REGISTER_COALESCED_MMIO, ioctl::UNREGISTER_COALESCED_MMIO]);
            let _ = vmm.ioctl(vmm.vm(), command, &mut zone);
        }
        6 => {
            // One route, or none.
            let mut routing = [0u32; 14];
            routing[0] = random.below(2) as u32;
            (routing[2], routing[3], routing[7]) = (SPI - 32, 1, SPI - 32 + random.below(2) as u32);
            let _ = vmm.ioctl(vmm.vm(), ioctl::SET_GSI_ROUTING, &mut routing);
        }
        _ => {
            let vcpu = random.below(vmm.vcpus.len() as u64) as usize;
            let _ = vmm.ioctl(vmm.vcpus[vcpu], ioctl::SET_MP_STATE, &mut random.of(&[0u32, 0, 5]));
        }
    }
}

/// Runs a vCPU as a VMM does that obeys its guest most of the time, until told to stop.
fn run_vcpu(caller: &mut Caller, vcpu: usize, stop: &AtomicBool) {
    for _ in 0..12 {
        if stop.load(SeqCst) {
            break;
        }
        match caller.run(vcpu) {
            Ok(Exit::SystemEvent(_)) | Err(Errno::EINTR) => break,
            result => expected(result),
        }
    }
}

/// Lets the others do some steps. Who ends a scenario does nothing else: a call that waits for a vCPU must not.
fn pass_time(random: &mut Random) {
    (0..random.below(60)).for_each(|_| thread::yield_now());
}

/// A Realm runs on two vCPUs while others of its VMM do what they like; at some point the VMM closes files or is killed.
pub(crate) fn everything_at_once(machine: &Arc<Machine>, seed: u64) {
    machine.forget_log();
    machine.load_steps(ENTRY, move || hostile_guest(seed ^ 0x100, true));
    machine.load_steps(SECOND, move || hostile_guest(seed ^ 0x200, false));
    let bench = Bench::on(machine.clone(), kvm::GENERATION_V2);
    let vmm = bench.ready(small(2));
    let events = [vmm.process.eventfd(), vmm.process.eventfd()];
    let stop = Arc::new(AtomicBool::new(false));
    let signals = [Signal::default(), Signal::default()];
    let mut work: Vec<Work> = Vec::new();
    for (vcpu, signal) in signals.iter().cloned().enumerate() {
        let stop = stop.clone();
        work.push(Box::new(move |vmm| {
            signal.adopt();
            run_vcpu(&mut Caller::new(vmm, seed ^ (0x300 + vcpu as u64)), vcpu, &stop);
        }));
    }
    work.push(Box::new(move |vmm| {
        let mut caller = Caller::new(vmm, seed ^ 0x400);
        (0..4).for_each(|_| disturb_memory(&mut caller));
    }));
    work.push(Box::new(move |vmm| {
        let mut caller = Caller::new(vmm, seed ^ 0x500);
        for _ in 0..4 {
            match caller.random.below(3) {
                0 => vmm.process.signal(events[0]),
                1 => disturb_events(&mut caller, &events),
                _ => disturb_memory(&mut caller),
            }
        }
    }));
    work.push(Box::new(move |vmm| {
        let mut caller = Caller::new(vmm, seed ^ 0x600);
        for _ in 0..caller.random.below(5) {
            match caller.random.below(3) {
                0 => caller.fuzz(&[CHANGES]),
                1 => vmm.process.signal(events[0]),
                _ => disturb_events(&mut caller, &events),
            }
        }
    }));
    work.push(Box::new(move |vmm| {
        let mut caller = Caller::new(vmm, seed ^ 0x700);
        pass_time(&mut caller.random);
        // The end: of the process, of single files, or of nothing.
        match caller.random.below(3) {
            0 => vmm.process.kill(),
            1 => (0..3).for_each(|_| vmm.process.close(3 + caller.random.below(6) as i32)),
            _ => {}
        }
        stop.store(true, SeqCst);
        signals.iter().for_each(Signal::raise);
    }));
    let vmm = together(vmm, work);
    bench.finish(vmm);
}

/// Two threads build one Realm, each taking the next step that it finds, while a third calls anything.
pub(crate) fn two_builders(machine: &Arc<Machine>, seed: u64) {
    machine.forget_log();
    machine.load_steps(ENTRY, move || hostile_guest(seed ^ 0x100, true));
    machine.load_steps(SECOND, move || hostile_guest(seed ^ 0x200, false));
    // Whoever calls anything also finalizes a vCPU before its program counter is set.
    machine.load_steps(ELSEWHERE, move || hostile_guest(seed ^ 0x600, true));
    let bench = Bench::on(machine.clone(), kvm::GENERATION_V2);
    let mut random = Random::new(seed);
    let mut vmm = bench.vmm(small(2));
    let ready = 1 + random.below(STEPS.len() as u64 - 1) as usize;
    for (name, step) in &STEPS[..ready] {
        step(&mut vmm).unwrap_or_else(|errno| panic!("{name}: {errno}"));
    }
    let signals = [Signal::default(), Signal::default()];
    let mut work: Vec<Work> = Vec::new();
    for (n, signal) in signals.iter().cloned().enumerate() {
        let seed = seed ^ (0x300 + n as u64);
        work.push(Box::new(move |vmm| {
            signal.adopt();
            let mut own = vmm.second();
            for (name, step) in &STEPS[ready..] {
                // Who came second to create vCPUs has none.
                if *name != "finalize vCPUs" || !own.vcpus.is_empty() {
                    let _ = step(&mut own);
                }
            }
            if !own.vcpus.is_empty() {
                let mut caller = Caller::new(&own, seed);
                let vcpu = caller.random.below(own.vcpus.len() as u64) as usize;
                run_vcpu(&mut caller, vcpu, &AtomicBool::new(false));
            }
        }));
    }
    work.push(Box::new(move |vmm| {
        let mut caller = Caller::new(vmm, seed ^ 0x400);
        for _ in 0..6 {
            if caller.random.below(2) == 0 { caller.fuzz(&[CHANGES]) } else { disturb_memory(&mut caller) }
        }
    }));
    work.push(Box::new(move |_| {
        pass_time(&mut Random::new(seed ^ 0x500));
        signals.iter().for_each(Signal::raise);
    }));
    let vmm = together(vmm, work);
    bench.finish(vmm);
}
