//! eventfds, routes and messages: the VMM's devices talk to a Realm without going through its vCPUs' threads.

use cca_abi::kvm::{self, cap, event as irq, ioctl};
use kvm_realm::errno::Errno;
use sim::bench::Bench;
use sim::guest::Op;
use sim::vmm::{Config, DEVICE, Exit, RAM_BASE, SHARED, Vmm};

/// A device that has no eventfds.
const PLAIN: u64 = DEVICE + 0x1000;

fn irqfd(vmm: &Vmm, fd: i32, gsi: u32, resamplefd: Option<i32>) -> kvm_realm::Result {
    let flags = if resamplefd.is_some() { irq::IRQFD_RESAMPLE } else { 0 };
    let resamplefd = resamplefd.unwrap_or(-1) as u32;
    vmm.ioctl(vmm.vm(), ioctl::IRQFD, &mut kvm::Irqfd { fd: fd as u32, gsi, flags, resamplefd, pad: [0; 16] })
}

fn drop_irqfd(vmm: &Vmm, fd: i32, gsi: u32) -> kvm_realm::Result {
    let mut args = kvm::Irqfd { fd: fd as u32, gsi, flags: irq::IRQFD_DEASSIGN, resamplefd: 0, pad: [0; 16] };
    vmm.ioctl(vmm.vm(), ioctl::IRQFD, &mut args)
}

fn doorbell(vmm: &Vmm, fd: i32, addr: u64, len: u32, value: Option<u64>, flags: u32) -> kvm_realm::Result {
    let flags = flags | if value.is_some() { irq::IOEVENTFD_DATAMATCH } else { 0 };
    let datamatch = value.unwrap_or(0);
    let mut args = kvm::Ioeventfd { datamatch, addr, len, fd, flags, pad: [0; 36] };
    vmm.ioctl(vmm.vm(), ioctl::IOEVENTFD, &mut args)
}

/// A routing table for the ioctl.
fn routes_in_memory(vmm: &Vmm, entries: &[kvm::IrqRoutingEntry]) -> u64 {
    let at = vmm.process.mmap(4096);
    let nr = u32::try_from(entries.len()).unwrap();
    vmm.process.write(at, zerocopy::IntoBytes::as_bytes(&kvm::IrqRouting { nr, flags: 0 })).unwrap();
    for (n, entry) in entries.iter().enumerate() {
        vmm.process.write(at + 8 + 48 * n as u64, zerocopy::IntoBytes::as_bytes(entry)).unwrap();
    }
    at
}

fn route(vmm: &Vmm, entries: &[kvm::IrqRoutingEntry]) -> kvm_realm::Result {
    vmm.ioctl_value(vmm.vm(), ioctl::SET_GSI_ROUTING, routes_in_memory(vmm, entries))
}

fn pin(gsi: u32, pin: u32) -> kvm::IrqRoutingEntry {
    let data = [0, pin, 0, 0, 0, 0, 0, 0];
    kvm::IrqRoutingEntry { gsi, kind: irq::ROUTING_IRQCHIP, flags: 0, pad: 0, u: data }
}

#[test]
fn a_store_rings_its_doorbell_and_no_other_and_the_vmm_does_not_hear_of_it() {
    let bench = Bench::new();
    let vmm = bench.built(Config::default(), |guest| {
        guest.store(DEVICE, 4, 1);
        guest.store(DEVICE, 4, 0xFFFF_0000_0000_0002);
        guest.store(DEVICE, 4, 2);
        guest.store(DEVICE, 2, 2);
        guest.store(DEVICE + 8, 1, 9);
        guest.store(DEVICE + 8, 8, 10);
        // Neither this value, nor this length, nor a load.
        guest.store(DEVICE, 4, 3);
        guest.store(DEVICE, 1, 2);
        guest.execute(Op::Read { ipa: (DEVICE + 8) | SHARED, size: 8 }).unwrap();
    });
    let events: Vec<i32> = (0..4).map(|_| vmm.process.eventfd()).collect();
    let fd = |n: usize| events[n];
    for number in [cap::IOEVENTFD, cap::IOEVENTFD_ANY_LENGTH, cap::IRQFD, cap::IRQFD_RESAMPLE] {
        assert_eq!(vmm.ioctl_value(vmm.vm(), ioctl::CHECK_EXTENSION, number.into()), Ok(1));
    }
    assert_eq!(doorbell(&vmm, fd(0), DEVICE, 4, Some(1), 0), Ok(0));
    assert_eq!(doorbell(&vmm, fd(1), DEVICE, 4, Some(2), 0), Ok(0));
    assert_eq!(doorbell(&vmm, fd(2), DEVICE, 2, None, 0), Ok(0));
    assert_eq!(doorbell(&vmm, fd(3), DEVICE + 8, 0, None, 0), Ok(0));
    // What is taken is taken, and what makes no sense is refused.
    assert_eq!(doorbell(&vmm, fd(3), DEVICE, 4, Some(2), 0), Err(Errno::EEXIST));
    assert_eq!(doorbell(&vmm, fd(3), DEVICE, 4, None, 0), Err(Errno::EEXIST));
    assert_eq!(doorbell(&vmm, fd(3), DEVICE, 0, None, 0), Err(Errno::EEXIST));
    assert_eq!(doorbell(&vmm, fd(3), DEVICE, 3, None, 0), Err(Errno::EINVAL));
    assert_eq!(doorbell(&vmm, fd(3), u64::MAX, 4, None, 0), Err(Errno::EINVAL));
    assert_eq!(doorbell(&vmm, fd(3), DEVICE, 0, Some(1), 0), Err(Errno::EINVAL));
    assert_eq!(doorbell(&vmm, fd(3), DEVICE, 4, Some(1), 16), Err(Errno::EINVAL));
    assert_eq!(doorbell(&vmm, 999, DEVICE, 8, None, 0), Err(Errno::EBADF));
    assert_eq!(doorbell(&vmm, fd(3), DEVICE, 8, None, irq::IOEVENTFD_DEASSIGN), Err(Errno::ENOENT));

    let seen = std::sync::Mutex::new(Vec::new());
    let event = vmm.run_to_end(0, &|gpa, write| {
        seen.lock().unwrap().push((gpa, write));
        0
    });
    assert_eq!(event, Ok(1), "log: {:#?}", bench.machine.log_lines());
    assert_eq!(*seen.lock().unwrap(), [(DEVICE, Some(3)), (DEVICE, Some(2)), (DEVICE + 8, None)]);
    let counts: Vec<u64> = events.iter().map(|fd| vmm.process.take_signals(*fd)).collect();
    assert_eq!(counts, [1, 2, 1, 2]);
    bench.finish(vmm);
}

#[test]
fn a_doorbell_that_was_taken_away_is_an_ordinary_store_again() {
    let bench = Bench::new();
    let vmm = bench.built(Config::default(), |guest| {
        guest.store(DEVICE, 4, 1);
        guest.store(PLAIN, 4, 0);
        guest.store(DEVICE, 4, 1);
    });
    let fd = vmm.process.eventfd();
    assert_eq!(doorbell(&vmm, fd, DEVICE, 4, None, 0), Ok(0));
    let stores = std::sync::Mutex::new(Vec::new());
    vmm.run_to_end(0, &|gpa, _| {
        stores.lock().unwrap().push(gpa);
        if gpa == PLAIN {
            assert_eq!(doorbell(&vmm, fd, DEVICE, 4, None, irq::IOEVENTFD_DEASSIGN), Ok(0));
        }
        0
    })
    .unwrap();
    assert_eq!(*stores.lock().unwrap(), [PLAIN, DEVICE]);
    assert_eq!(vmm.process.take_signals(fd), 1);
    bench.finish(vmm);
}

#[test]
fn an_irqfd_interrupts_a_sleeping_vcpu_once_for_each_signal() {
    let bench = Bench::new();
    let vmm = bench.built(Config::default(), |guest| {
        guest.enable_spi(40, true);
        guest.enable_spi(41, false);
        for _ in 0..20 {
            guest.store(PLAIN, 4, 40);
            assert_eq!(guest.take_interrupt(), 40);
            guest.store(PLAIN, 4, 41);
            assert_eq!(guest.take_interrupt(), 41, "a level triggered one is pulsed");
        }
        guest.store(PLAIN, 4, 0);
        assert_eq!(guest.execute(Op::Acknowledge).unwrap()[0], 1023, "and not more often");
    });
    let edge = vmm.process.eventfd();
    let level = vmm.process.eventfd();
    assert_eq!(irqfd(&vmm, edge, 8, None), Ok(0));
    assert_eq!(irqfd(&vmm, level, 9, None), Ok(0));
    assert_eq!(irqfd(&vmm, edge, 9, None), Err(Errno::EBUSY));
    assert_eq!(irqfd(&vmm, 999, 9, None), Err(Errno::EBADF));
    std::thread::scope(|scope| {
        let (sender, orders) = std::sync::mpsc::channel::<u64>();
        let process = &vmm.process;
        scope.spawn(move || {
            // A device of its own thread: late enough that the vCPU sleeps by then.
            for order in orders {
                std::thread::sleep(std::time::Duration::from_millis(1));
                process.signal(if order == 40 { edge } else { level });
            }
        });
        let event = vmm.run_to_end(0, &|_, write| {
            if let Some(intid @ 40..) = write {
                sender.send(intid).unwrap();
            }
            0
        });
        assert_eq!(event, Ok(1), "log: {:#?}", bench.machine.log_lines());
    });
    bench.finish(vmm);
}

#[test]
fn a_resampled_irqfd_falls_with_the_end_of_its_interrupt_and_says_so() {
    let bench = Bench::new();
    let vmm = bench.built(Config::default(), |guest| {
        guest.enable_spi(45, false);
        for round in 0..3 {
            guest.store(PLAIN, 4, 1);
            assert_eq!(guest.take_interrupt(), 45, "round {round}");
            // An exit: the host learns of the end.
            guest.store(PLAIN, 4, 2);
        }
        guest.store(PLAIN, 4, 3);
        assert_eq!(guest.execute(Op::Acknowledge).unwrap()[0], 1023, "the line has fallen");
    });
    let fd = vmm.process.eventfd();
    let resample = vmm.process.eventfd();
    // Through a route, so that the end has to find its way back.
    assert_eq!(route(&vmm, &[pin(100, 13)]), Ok(0));
    assert_eq!(irqfd(&vmm, fd, 100, Some(resample)), Ok(0));
    let ends = std::sync::atomic::AtomicU64::new(0);
    let result = vmm.run_to_end(0, &|_, write| {
        match write {
            Some(1) => vmm.process.signal(fd),
            Some(2) => {
                ends.fetch_add(vmm.process.take_signals(resample), std::sync::atomic::Ordering::Relaxed);
            }
            _ => {}
        }
        0
    });
    assert_eq!(result, Ok(1), "log: {:#?}", bench.machine.log_lines());
    assert_eq!(ends.into_inner(), 3);
    bench.finish(vmm);
}

#[test]
fn irqfds_follow_their_routes_and_leave_when_told() {
    let bench = Bench::new();
    let vmm = bench.built(Config::default(), |guest| {
        guest.enable_spi(40, true);
        guest.enable_spi(50, true);
        for step in 1..=4 {
            guest.store(PLAIN, 4, step);
            let intid = guest.execute(Op::Acknowledge).unwrap()[0];
            assert_eq!(intid, [40, 50, 1023, 1023][step as usize - 1], "step {step}");
            if intid != 1023 {
                guest.execute(Op::EndOfInterrupt { intid }).unwrap();
            }
        }
    });
    let fd = vmm.process.eventfd();
    assert_eq!(irqfd(&vmm, fd, 8, None), Ok(0));
    let result = vmm.run_to_end(0, &|_, write| {
        match write {
            Some(2) => assert_eq!(route(&vmm, &[pin(8, 18)]), Ok(0)),
            Some(3) => assert_eq!(route(&vmm, &[]), Ok(0)),
            Some(4) => {
                assert_eq!(route(&vmm, &[pin(8, 18)]), Ok(0));
                assert_eq!(drop_irqfd(&vmm, fd, 8), Ok(0));
            }
            _ => {}
        }
        vmm.process.signal(fd);
        0
    });
    assert_eq!(result, Ok(1), "log: {:#?}", bench.machine.log_lines());
    assert_eq!(vmm.process.take_signals(fd), 1, "the last signal is the VMM's own again");
    assert_eq!(route(&vmm, &[pin(8, 18), pin(8, 19)]), Err(Errno::EINVAL));
    bench.finish(vmm);
}

#[test]
fn files_may_close_in_any_order_under_eventfds() {
    let bench = Bench::new();
    for order in 0..3 {
        let vmm = bench.built(Config::default(), |_| {});
        let fd = vmm.process.eventfd();
        let resample = vmm.process.eventfd();
        assert_eq!(irqfd(&vmm, fd, 8, Some(resample)), Ok(0));
        assert_eq!(doorbell(&vmm, fd, DEVICE, 4, None, 0), Ok(0));
        match order {
            0 => {
                // Another one for the same interrupt.
                let fd = vmm.process.eventfd();
                assert_eq!(irqfd(&vmm, fd, 8, None), Ok(0));
                vmm.process.signal(fd);
                vmm.process.close(resample);
            }
            1 => {
                vmm.process.close(vmm.vm());
                vmm.process.signal(fd);
            }
            _ => {
                for vcpu in &vmm.vcpus {
                    vmm.process.close(*vcpu);
                }
                vmm.process.signal(fd);
            }
        }
        vmm.process.exit();
        drop(vmm);
    }
    let vmm = bench.vmm(Config::default());
    bench.finish(vmm);
}

#[test]
fn signals_and_routes_race_with_a_running_vcpu_without_losing_the_last_one() {
    let bench = Bench::new();
    let vmm = bench.built(Config { vcpus: 1, ..Config::default() }, |guest| {
        guest.enable_spi(40, true);
        guest.write(RAM_BASE + 0x3000, 0);
        for round in 0..200 {
            guest.store(DEVICE, 4, round);
            assert_eq!(guest.take_interrupt(), 40);
        }
    });
    let fd = vmm.process.eventfd();
    let bell = vmm.process.eventfd();
    assert_eq!(irqfd(&vmm, fd, 8, None), Ok(0));
    assert_eq!(doorbell(&vmm, bell, DEVICE, 4, None, 0), Ok(0));
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        // The device: one interrupt for each doorbell.
        scope.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                (0..vmm.process.take_signals(bell)).for_each(|_| vmm.process.signal(fd));
                std::thread::yield_now();
            }
        });
        // Somebody who rewrites the same routes all the time.
        scope.spawn(|| {
            let at = routes_in_memory(&vmm, &[pin(8, 8)]);
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                assert_eq!(vmm.ioctl_value(vmm.vm(), ioctl::SET_GSI_ROUTING, at), Ok(0));
                std::thread::yield_now();
            }
        });
        let result = vmm.run_to_end(0, &|gpa, _| panic!("{gpa:#x}"));
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        assert_eq!(result, Ok(1), "log: {:#?}", bench.machine.log_lines());
        assert!(!matches!(vmm.exit(0), Exit::Mmio { .. }));
    });
    bench.finish(vmm);
}
