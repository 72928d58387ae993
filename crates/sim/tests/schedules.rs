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

use cca_abi::kvm::{self, ioctl};
use cca_abi::{psci, rsi};
use kvm_realm::errno::{Errno, Result};
use kvm_realm::files::FileObject;
use shuttle::scheduler::{PctScheduler, RandomScheduler, Scheduler};
use shuttle::sync::atomic::{AtomicBool, Ordering::SeqCst};
use shuttle::thread;
use sim::bench::Bench;
use sim::guest::{Op, Outcome, Steps};
use sim::host::Signal;
use sim::machine::{Machine, Shape};
use sim::memory::PAGE_SIZE;
use sim::vmm::{Config, DEVICE, ENTRY, Exit, GICD, GICR, RAM_BASE, STEPS, Vmm};
use std::sync::Arc;
use std::time::Instant;
use zerocopy::IntoBytes;

/// The shared alias: the top bit of a 33-bit IPA space.
const SHARED: u64 = 1 << 32;
/// What is small is soon in every state.
const RAM: u64 = 16 * PAGE_SIZE;
/// The program of vCPUs that others switch on.
const SECOND: u64 = RAM_BASE + 0x100;
/// A line of a device.
const SPI: u32 = 40;
/// The word by which scripted guests tell each other something.
const WORD: u64 = RAM_BASE + 8 * PAGE_SIZE;

/// Deterministic random numbers.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 >> 11
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[(self.next() % choices.len() as u64) as usize]
    }

    /// A page of RAM; most of the time one of a few, so that threads meet.
    fn page(&mut self) -> u64 {
        let page = if self.below(4) == 0 { self.below(RAM / PAGE_SIZE) } else { 3 + self.below(3) };
        RAM_BASE + page * PAGE_SIZE
    }
}

fn small(vcpus: u32) -> Config {
    Config { ram: RAM, vcpus, image_pages: 2, ..Config::default() }
}

/// One thread of a VMM, with a buffer of its own for arguments.
struct Caller<'a> {
    vmm: &'a Vmm,
    scratch: u64,
    random: Random,
}

impl<'a> Caller<'a> {
    fn new(vmm: &'a Vmm, seed: u64) -> Self {
        Self { vmm, scratch: vmm.process.mmap(PAGE_SIZE), random: Random::new(seed) }
    }

    fn ioctl<T: IntoBytes + zerocopy::Immutable>(&self, fd: i32, command: u32, value: &T) -> Result {
        self.vmm.process.write(self.scratch, value.as_bytes())?;
        self.vmm.ioctl_value(fd, command, self.scratch)
    }

    fn set_private(&self, address: u64, size: u64, private: bool) -> Result {
        let attributes = if private { kvm::MEMORY_ATTRIBUTE_PRIVATE } else { 0 };
        let args = kvm::MemoryAttributes { address, size, attributes, flags: 0 };
        self.ioctl(self.vmm.vm(), ioctl::SET_MEMORY_ATTRIBUTES, &args)
    }

    fn fallocate(&self, mode: u32, offset: u64, len: u64) {
        if let Some(FileObject::Gmem(gmem)) = self.vmm.process.file(self.vmm.vm() + 1) {
            let _ = self.vmm.process.run(|| gmem.fallocate(mode, offset, len));
        }
    }

    fn slot(&self, slot: u32, base: u64, size: u64, private: bool) -> Result {
        let region = kvm::MemoryRegion2 {
            slot,
            flags: if private { kvm::MEM_GUEST_MEMFD } else { 0 },
            guest_phys_addr: base,
            memory_size: size,
            userspace_addr: self.vmm.ram,
            guest_memfd_offset: 0,
            guest_memfd: if private { self.vmm.vm() as u32 + 1 } else { 0 },
            pad1: 0,
            pad2: [0; 14],
        };
        self.ioctl(self.vmm.vm(), ioctl::SET_USER_MEMORY_REGION2, &region)
    }

    fn line(&self, intid: u32, level: u32) {
        let line = kvm::IrqLevel { irq: 1 << 24 | intid, level };
        let _ = self.ioctl(self.vmm.vm(), ioctl::IRQ_LINE, &line);
    }

    fn irqfd(&self, fd: i32, flags: u32, resample: i32) -> Result {
        let args =
            kvm::Irqfd { fd: fd as u32, gsi: SPI - 32, flags, resamplefd: resample as u32, pad: [0; 16] };
        self.ioctl(self.vmm.vm(), ioctl::IRQFD, &args)
    }

    /// Something that a VMM may do to memory at any time.
    fn disturb_memory(&mut self) {
        let base = self.random.page();
        let size = (1 + self.random.below(3)) * PAGE_SIZE;
        let inside = size.min(RAM_BASE + RAM - base);
        match self.random.below(10) {
            0..3 => expected(self.set_private(base, size, self.random.0 & 2 == 0)),
            3 | 4 => self.vmm.process.discard(self.vmm.ram + (base - RAM_BASE), inside),
            5 => self.fallocate(3, base - RAM_BASE, inside),
            6 => self.fallocate(0, base - RAM_BASE, PAGE_SIZE),
            7 => {
                let _ = self.slot(0, 0, 0, true);
                let _ = self.slot(0, RAM_BASE, RAM, true);
            }
            8 => {
                let base = self.random.of(&[RAM_BASE - RAM, RAM_BASE + RAM, base]);
                let _ = self.slot(1, base, RAM, false);
            }
            _ => drop(self.slot(1, 0, 0, false)),
        }
    }

    /// Something about interrupts and events.
    fn disturb_events(&mut self, events: &[i32; 2]) {
        let flags = self.random.of(&[0, 0, 1, 2, 3]);
        match self.random.below(8) {
            0..2 => drop(self.irqfd(events[0], flags, events[1])),
            2 => self.line(SPI, self.random.0 as u32 & 1),
            3 => {
                let vcpu = self.random.below(2) as u32;
                let line = kvm::IrqLevel { irq: 2 << 24 | vcpu << 16 | 20, level: self.random.0 as u32 & 1 };
                let _ = self.ioctl(self.vmm.vm(), ioctl::IRQ_LINE, &line);
            }
            4 => {
                let flags = self.random.of(&[0, 1, 4, 5]);
                let args = kvm::Ioeventfd {
                    datamatch: 1,
                    addr: DEVICE,
                    len: self.random.of(&[0, 4, 8]),
                    fd: events[1],
                    flags,
                    pad: [0; 36],
                };
                let _ = self.ioctl(self.vmm.vm(), ioctl::IOEVENTFD, &args);
            }
            5 => {
                let zone = kvm::CoalescedZone { addr: DEVICE, size: 8, pio: 0 };
                let command =
                    self.random.of(&[ioctl::REGISTER_COALESCED_MMIO, ioctl::UNREGISTER_COALESCED_MMIO]);
                let _ = self.ioctl(self.vmm.vm(), command, &zone);
            }
            6 => {
                // One route, or none.
                let mut routing = [0u32; 14];
                routing[0] = self.random.below(2) as u32;
                (routing[2], routing[3], routing[7]) = (SPI - 32, 1, SPI - 32 + self.random.below(2) as u32);
                let _ = self.ioctl(self.vmm.vm(), ioctl::SET_GSI_ROUTING, &routing);
            }
            _ => {
                let vcpu = self.random.below(self.vmm.vcpus.len() as u64) as usize;
                let state = self.random.of(&[0u32, 0, 5]);
                let _ = self.ioctl(self.vmm.vcpus[vcpu], ioctl::SET_MP_STATE, &state);
            }
        }
    }

    /// Any ioctl on any file with anything in its argument.
    fn fuzz(&mut self) {
        let words = [
            0,
            1,
            2,
            7,
            8,
            300,
            PAGE_SIZE,
            RAM,
            RAM_BASE,
            SHARED,
            u64::MAX,
            self.vmm.ram,
            DEVICE,
            1000,
            1001,
        ];
        let mut argument = [0u32; 128];
        for pair in argument.chunks_exact_mut(2) {
            let (word, other) = (self.random.of(&words), self.random.of(&words));
            match self.random.below(3) {
                0 => (pair[0], pair[1]) = (word as u32, other as u32),
                1 => (pair[0], pair[1]) = (0, 0),
                _ => (pair[0], pair[1]) = (word as u32, (word >> 32) as u32),
            }
        }
        let command = self.random.of(&[
            ioctl::CREATE_VCPU,
            ioctl::SET_USER_MEMORY_REGION,
            ioctl::SET_USER_MEMORY_REGION2,
            ioctl::CREATE_GUEST_MEMFD,
            ioctl::SET_MEMORY_ATTRIBUTES,
            ioctl::ENABLE_CAP,
            ioctl::ENABLE_CAP,
            ioctl::ENABLE_CAP,
            ioctl::CREATE_DEVICE,
            ioctl::SET_DEVICE_ATTR,
            ioctl::ARM_VCPU_INIT,
            ioctl::ARM_VCPU_FINALIZE,
            ioctl::SET_ONE_REG,
            ioctl::GET_REG_LIST,
            ioctl::SET_VCPU_EVENTS,
            ioctl::SIGNAL_MSI,
            kvm::GENERATION_V2.psci_complete,
        ]);
        if command == ioctl::ENABLE_CAP {
            let to = self.scratch + 2048;
            let sub = self.random.below(5) as u32;
            argument[..6].copy_from_slice(&[300, 0, sub, 0, to as u32, (to >> 32) as u32]);
        }
        let _ = self.vmm.process.write(self.scratch, argument.as_bytes());
        let _ = self.vmm.process.write(self.scratch + 2048, &argument.as_bytes()[256..]);
        let fd = 3 + self.random.below(8) as i32;
        let value = if command == ioctl::CREATE_VCPU { self.random.below(3) } else { self.scratch };
        let _ = self.vmm.ioctl_value(fd, command, value);
    }

    /// Runs a vCPU as a VMM does that obeys its guest most of the time, until told to stop.
    fn run_vcpu(&mut self, vcpu: usize, stop: &AtomicBool) {
        let mut left = 12;
        while left > 0 && !stop.load(SeqCst) {
            left -= 1;
            match self.vmm.run(vcpu) {
                Ok(Exit::Mmio { write: None, .. }) => {
                    self.vmm.complete_mmio_read(vcpu, self.random.next());
                    if self.random.below(4) == 0 {
                        let mut events: kvm::VcpuEvents = zerocopy::FromZeros::new_zeroed();
                        events.ext_dabt_pending = 1;
                        let _ = self.ioctl(self.vmm.vcpus[vcpu], ioctl::SET_VCPU_EVENTS, &events);
                    }
                }
                Ok(Exit::MemoryFault { private, gpa, size }) if self.random.below(8) != 0 => {
                    expected(self.set_private(gpa, size, private));
                    if !private {
                        self.fallocate(3, gpa.wrapping_sub(RAM_BASE), size);
                    }
                }
                Ok(Exit::SystemEvent(_)) | Err(Errno::EINTR) => break,
                result => expected(result),
            }
        }
    }
}

/// Nobody makes the RMM refuse by doing two things at once: what it then says becomes one of these.
fn expected<T: std::fmt::Debug>(result: Result<T>) {
    let refused = [Errno::EEXIST, Errno::EAGAIN, Errno::EBUSY, Errno::EIO, Errno::EHWPOISON];
    assert!(!matches!(result, Err(errno) if refused.contains(&errno)), "{result:?}");
}

fn smc(arguments: &[u64]) -> Op {
    let mut registers = [0; 12];
    registers[..arguments.len()].copy_from_slice(arguments);
    Op::Smc(registers)
}

/// A guest that does a few things, any, and ends. The first vCPU switches the other one on before that.
fn hostile_guest(seed: u64, first: bool) -> Steps {
    let mut random = Random::new(seed);
    let mut left = 11;
    Box::new(move |_| {
        left -= 1;
        match left {
            10 if first => return smc(&[psci::fid::CPU_ON_64, 1, SECOND, 7]),
            // Both want the same pages, and nobody has them yet.
            7..10 => {
                let page = RAM_BASE + (3 + random.below(2)) * PAGE_SIZE;
                return Op::Write { ipa: page, size: 8, value: 7 };
            }
            ..0 => return smc(&[psci::fid::SYSTEM_OFF]),
            _ => {}
        }
        let page = random.page();
        let alias = random.of(&[0, SHARED]);
        let frame = random.of(&[GICD, GICD, GICR, GICR + 0x1_0000]);
        let enable =
            random.of(&[(0, 0x12), (0x84, u64::MAX), (0x104, u64::MAX), (0x108, u64::MAX), (0xC08, 0)]);
        match random.below(16) {
            0..3 => Op::Read { ipa: page | alias, size: 8 },
            3..6 => Op::Write { ipa: page | alias, size: 8, value: 7 },
            6 | 7 => {
                let top = page + (1 + random.below(3)) * PAGE_SIZE;
                smc(&[rsi::fid::IPA_STATE_SET, page, top, random.below(2), 1])
            }
            8 => smc(&[psci::fid::CPU_ON_64, random.below(2), SECOND, 7]),
            9 => smc(&[random.of(&[psci::fid::CPU_OFF, psci::fid::AFFINITY_INFO_64]), random.below(2), 0]),
            10 => Op::Write { ipa: (frame + enable.0) | SHARED, size: 4, value: enable.1 },
            11 => Op::WriteSysreg { iss: 3 << 20 | 5 << 17 | 12 << 10 | 11 << 1, value: 1 << 40 | 3 },
            12 => Op::Write { ipa: DEVICE | SHARED, size: 4, value: 1 },
            13 => Op::Acknowledge,
            14 => Op::SetTimer { cval: random.below(1 << 20), ctl: random.below(4) },
            _ => random.of(&[Op::Wfi, Op::EndOfInterrupt { intid: SPI.into() }]),
        }
    })
}

/// A machine for all schedules: it is as new when nothing is left on it.
fn machine() -> Arc<Machine> {
    Machine::boot(Shape { cpus: 8, dram: 6 << 20, ..Shape::default() })
}

/// Runs `work` as tasks of one VMM, and returns when all have come back.
fn together(vmm: Vmm, work: Vec<Box<dyn FnOnce(&Vmm) + Send>>) -> Vmm {
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

/// Lets the others do some steps. Who ends a scenario does nothing else: a call that waits for a vCPU must not.
fn pass_time(random: &mut Random) {
    (0..random.below(60)).for_each(|_| thread::yield_now());
}

/// A Realm runs on two vCPUs while others of its VMM do what they like; at some point the VMM closes files or is killed.
fn everything_at_once(machine: &Arc<Machine>, seed: u64) {
    machine.forget_log();
    machine.load_steps(ENTRY, move || hostile_guest(seed ^ 0x100, true));
    machine.load_steps(SECOND, move || hostile_guest(seed ^ 0x200, false));
    let bench = Bench::on(machine.clone(), kvm::GENERATION_V2);
    let vmm = bench.ready(small(2));
    let events = [vmm.process.eventfd(), vmm.process.eventfd()];
    let stop = Arc::new(AtomicBool::new(false));
    let signals = [Signal::default(), Signal::default()];
    let mut work: Vec<Box<dyn FnOnce(&Vmm) + Send>> = Vec::new();
    for vcpu in 0..2 {
        let (stop, signal) = (stop.clone(), signals[vcpu].clone());
        work.push(Box::new(move |vmm| {
            signal.adopt();
            Caller::new(vmm, seed ^ (0x300 + vcpu as u64)).run_vcpu(vcpu, &stop);
        }));
    }
    work.push(Box::new(move |vmm| {
        let mut caller = Caller::new(vmm, seed ^ 0x400);
        (0..4).for_each(|_| caller.disturb_memory());
    }));
    work.push(Box::new(move |vmm| {
        let mut caller = Caller::new(vmm, seed ^ 0x500);
        for _ in 0..4 {
            match caller.random.below(3) {
                0 => vmm.process.signal(events[0]),
                1 => caller.disturb_events(&events),
                _ => caller.disturb_memory(),
            }
        }
    }));
    work.push(Box::new(move |vmm| {
        let mut caller = Caller::new(vmm, seed ^ 0x600);
        for _ in 0..caller.random.below(5) {
            match caller.random.below(3) {
                0 => caller.fuzz(),
                1 => vmm.process.signal(events[0]),
                _ => caller.disturb_events(&events),
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
fn two_builders(machine: &Arc<Machine>, seed: u64) {
    machine.forget_log();
    machine.load_steps(ENTRY, move || hostile_guest(seed ^ 0x100, true));
    machine.load_steps(SECOND, move || hostile_guest(seed ^ 0x200, false));
    let bench = Bench::on(machine.clone(), kvm::GENERATION_V2);
    let mut random = Random::new(seed);
    let mut vmm = bench.vmm(small(2));
    let ready = 1 + random.below(STEPS.len() as u64 - 1) as usize;
    for (name, step) in &STEPS[..ready] {
        step(&mut vmm).unwrap_or_else(|errno| panic!("{name}: {errno}"));
    }
    let signals = [Signal::default(), Signal::default()];
    let mut work: Vec<Box<dyn FnOnce(&Vmm) + Send>> = Vec::new();
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
                caller.run_vcpu(vcpu, &AtomicBool::new(false));
            }
        }));
    }
    work.push(Box::new(move |vmm| {
        let mut caller = Caller::new(vmm, seed ^ 0x400);
        for _ in 0..6 {
            if caller.random.below(2) == 0 { caller.fuzz() } else { caller.disturb_memory() }
        }
    }));
    work.push(Box::new(move |_| {
        pass_time(&mut Random::new(seed ^ 0x500));
        signals.iter().for_each(Signal::raise);
    }));
    let vmm = together(vmm, work);
    bench.finish(vmm);
}

/// The guest's first operations, then what `rest` says, with how many have been done.
fn scripted(
    first: Vec<Op>,
    rest: impl Fn(&mut u64, Option<Outcome>) -> Op + Send + Clone + 'static,
) -> Steps {
    let mut first = first.into_iter();
    let mut state = 0;
    Box::new(move |outcome| first.next().unwrap_or_else(|| rest(&mut state, outcome)))
}

fn enable_spi() -> Vec<Op> {
    let gicd = |offset: u64, size, value| Op::Write { ipa: (GICD + offset) | SHARED, size, value };
    vec![
        gicd(0, 4, 0x12),
        gicd(0x80 + 4, 4, u64::MAX >> 32),
        gicd(0x400 + u64::from(SPI), 1, 0x80),
        gicd(0x100 + 4, 4, 1 << (SPI - 32)),
    ]
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
fn no_wake_up_is_lost(machine: &Arc<Machine>, seed: u64) {
    const TIMES: u64 = 3;
    machine.forget_log();
    // The guest takes interrupts, one at a time, says so to the VMM, which then sends the next.
    machine.load_steps(ENTRY, move || {
        scripted(enable_spi(), move |done, outcome| {
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
                _ if *done / 4 + 1 == TIMES => smc(&[psci::fid::SYSTEM_OFF]),
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
    Caller::new(&vmm, seed).irqfd(events[0], flags, events[1]).expect("an irqfd");
    let told = Arc::new(shuttle::sync::Mutex::new(0u64));
    let news = Arc::new(shuttle::sync::Condvar::new());
    let mut work: Vec<Box<dyn FnOnce(&Vmm) + Send>> = Vec::new();
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
        let mut caller = Caller::new(vmm, seed ^ 0x700);
        for _ in 0..4 {
            match caller.random.below(3) {
                0 => vmm.process.discard(vmm.ram, PAGE_SIZE),
                1 => caller.line(SPI + 1, 1),
                _ => drop(caller.set_private(RAM_BASE + 12 * PAGE_SIZE, PAGE_SIZE, caller.random.0 & 2 == 0)),
            }
        }
    }));
    let vmm = together(vmm, work);
    bench.finish(vmm);
}

/// One vCPU switches another on, again and again; that one says that it was on, and switches itself off. None of these
/// may get lost, or the first would wait for ever.
fn vcpus_come_and_go(machine: &Arc<Machine>, seed: u64) {
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
                        return if round == TIMES { smc(&[psci::fid::SYSTEM_OFF]) } else { smc(&call) };
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
        scripted(vec![Op::Write { ipa: WORD, size: 8, value }], |_, _| smc(&[psci::fid::CPU_OFF]))
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
                let mut caller = Caller::new(vmm, seed);
                for _ in 0..3 {
                    caller.vmm.process.discard(caller.vmm.ram, PAGE_SIZE);
                    caller.line(SPI, caller.random.0 as u32 & 1);
                    caller.random.next();
                }
            }),
        ],
    );
    bench.finish(vmm);
}

/// Two vCPUs use memory that the VMM shares, while its pages are replaced: nobody is given a page that the VMM no longer
/// has, and nobody reaches one any more.
fn shared_pages_change(machine: &Arc<Machine>, seed: u64) {
    const POISON: u64 = 0xDEAD_BEEF_DEAD_BEEF;
    const PAGES: u64 = 2;
    let at = RAM_BASE + RAM;
    machine.forget_log();
    let guest = move |seed: u64, first: bool| -> Steps {
        let mut random = Random::new(seed);
        let mut left = 9;
        Box::new(move |outcome| {
            if let Some(Outcome::Done(registers)) = outcome {
                assert_ne!(registers[0], POISON, "the guest reads a page that was given away");
            }
            left -= 1;
            let ipa = (at + random.below(PAGES) * PAGE_SIZE) | SHARED;
            match left {
                8 if first => smc(&[psci::fid::CPU_ON_64, 1, SECOND, 7]),
                ..0 => smc(&[psci::fid::SYSTEM_OFF]),
                _ if random.below(3) == 0 => Op::Write { ipa, size: 8, value: 7 },
                _ => Op::Read { ipa, size: 8 },
            }
        })
    };
    machine.load_steps(ENTRY, move || guest(seed ^ 0x100, true));
    machine.load_steps(SECOND, move || guest(seed ^ 0x200, false));
    let bench = Bench::on(machine.clone(), kvm::GENERATION_V2);
    let vmm = bench.ready(small(2));
    let memory = vmm.process.mmap(PAGES * PAGE_SIZE);
    let region = kvm::MemoryRegion {
        slot: 1,
        flags: 0,
        guest_phys_addr: at,
        memory_size: PAGES * PAGE_SIZE,
        userspace_addr: memory,
    };
    Caller::new(&vmm, seed).ioctl(vmm.vm(), ioctl::SET_USER_MEMORY_REGION, &region).expect("a slot");
    let signals = [Signal::default(), Signal::default()];
    let mut work: Vec<Box<dyn FnOnce(&Vmm) + Send>> = Vec::new();
    for vcpu in 0..2 {
        let signals = signals.clone();
        work.push(Box::new(move |vmm| {
            signals[vcpu].adopt();
            let ended = vmm.run_to_end(vcpu, &|_, _| 0);
            assert!(matches!(ended, Ok(_) | Err(Errno::EINTR)), "{ended:?}");
            signals.iter().for_each(Signal::raise);
        }));
    }
    for thread in 0..2 {
        work.push(Box::new(move |vmm| {
            let mut random = Random::new(seed ^ (0x300 + thread));
            for _ in 0..4 {
                let first = random.below(PAGES);
                vmm.process
                    .discard(memory + first * PAGE_SIZE, (1 + random.below(PAGES - first)) * PAGE_SIZE);
            }
        }));
    }
    let vmm = together(vmm, work);
    bench.finish(vmm);
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
    all_schedules("everything at once", 40, everything_at_once);
}

#[test]
fn two_threads_that_build_one_realm_lose_nothing_under_any_schedule() {
    all_schedules("two builders", 20, two_builders);
}

#[test]
fn no_interrupt_is_lost_under_any_schedule() {
    all_schedules("no wake-up is lost", 20, no_wake_up_is_lost);
}

#[test]
fn no_vcpu_that_was_switched_on_stays_off_under_any_schedule() {
    all_schedules("vCPUs come and go", 20, vcpus_come_and_go);
}

#[test]
fn a_realm_reaches_no_page_that_its_vmm_gave_away_under_any_schedule() {
    all_schedules("shared pages change", 20, shared_pages_change);
}
