//! Whole lives of Realms on the simulated machine: monitor, RMM and host core together.

use cca_abi::kvm::{GENERATION_V2, ioctl, reg};
use cca_abi::{psci, rsi};
use sim::bench::Bench;
use sim::guest::Op;
use sim::host::Signal;
use sim::machine::{ELSEWHERE, Machine, Shape};
use sim::memory::{DRAM_BASE, PAGE_SIZE, Pas};
use sim::vmm::{Config, DEVICE, ENTRY, Exit, GICR, RAM_BASE, SECOND, SHARED, STEPS};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// RAM behind the populated image.
const FREE_RAM: u64 = RAM_BASE + 3 * PAGE_SIZE;

fn no_device(gpa: u64, _: Option<u64>) -> u64 {
    panic!("unexpected access to {gpa:#x}");
}

fn realm_pages(machine: &Machine) -> Vec<u64> {
    let end = DRAM_BASE + machine.memory().dram_size();
    (sim::machine::HOST_BASE..end)
        .step_by(PAGE_SIZE as usize)
        .filter(|&pa| machine.memory().gpi(pa) == Ok(0xB))
        .collect()
}

#[test]
fn a_realm_lives_and_gives_everything_back() {
    let bench = Bench::new();
    let vmm = bench.built(Config::default(), |guest| {
        assert_eq!(guest.x0, 0xB007);
        assert_eq!(guest.read(RAM_BASE), 0x1111_0000);
        assert_eq!(guest.read(RAM_BASE + 2 * PAGE_SIZE), 0x1111_0002);
        let version = guest.smc(&[rsi::fid::VERSION, rsi::VERSION_1_0]);
        assert_eq!(version[..3], [0, rsi::VERSION_1_0, rsi::VERSION_1_0]);
        // Memory that was never populated is zero at the first touch.
        assert_eq!(guest.read(FREE_RAM + 8), 0);
        guest.write(FREE_RAM + 8, 42);
        assert_eq!(guest.read(FREE_RAM + 8), 42);
        // A device, through the shared alias.
        let read = guest.execute(Op::Read { ipa: DEVICE | SHARED, size: 4 }).unwrap()[0];
        assert_eq!(read, 0x1234);
        guest.store(DEVICE + 8, 1, 0xAB);
    });
    assert_eq!(vmm.has_realms(), Ok(true));
    let stored = AtomicU64::new(0);
    let event = vmm.run_to_end(0, &|gpa, write| {
        match write {
            Some(value) => {
                assert_eq!(gpa, DEVICE + 8);
                stored.store(value & 0xFF, Relaxed);
            }
            None => assert_eq!(gpa, DEVICE),
        }
        0x1234
    });
    assert_eq!(event, Ok(1), "log: {:#?}", bench.machine.log_lines());
    assert_eq!(stored.load(Relaxed), 0xAB);
    bench.finish(vmm);
}

#[test]
fn every_page_of_ram_comes_at_its_first_touch_and_only_the_realm_can_read_it() {
    let bench = Bench::new();
    let vmm = bench.built(Config { ram: 4 << 20, ..Config::default() }, |guest| {
        for page in 3..1024 {
            guest.write(RAM_BASE + page * PAGE_SIZE, 0x5EC0_0000 + page);
        }
        for page in 3..1024 {
            assert_eq!(guest.read(RAM_BASE + page * PAGE_SIZE), 0x5EC0_0000 + page);
        }
        guest.smc(&[rsi::fid::HOST_CALL, u64::MAX]);
    });
    assert_eq!(vmm.run_to_end(0, &no_device), Ok(1));
    let pages = realm_pages(&bench.machine);
    assert!(pages.len() > 1024, "{} granules are the Realm's", pages.len());
    for pa in pages {
        assert!(bench.machine.memory().check(Pas::NonSecure, pa).is_err());
    }
    bench.finish(vmm);
}

#[test]
fn two_mebibytes_become_a_block_and_are_split_when_a_part_is_taken() {
    let bench = Bench::new();
    let block = RAM_BASE + 0x20_0000;
    let vmm = bench.built(Config { ram: 6 << 20, ..Config::default() }, move |guest| {
        // In no particular order: the last page completes it.
        for n in 0..512 {
            guest.write(block + n * 77 % 512 * PAGE_SIZE, n * 77 % 512);
        }
        guest.tell(1);
        for n in 0..512 {
            assert_eq!(guest.read(block + n * PAGE_SIZE), n, "in the block");
        }
        let page = block + 100 * PAGE_SIZE;
        guest.ipa_state_set(page, page + PAGE_SIZE, false, true).expect("share one page of it");
        guest.write(page | SHARED, 7);
        for n in (0..512).filter(|n| *n != 100) {
            assert_eq!(guest.read(block + n * PAGE_SIZE), n, "after the split");
        }
        guest.ipa_state_set(page, page + PAGE_SIZE, true, true).expect("and take it back");
        guest.write(page, 100);
        // Another one, which still is a block at the end.
        for n in 0..512 {
            guest.write(block + 0x20_0000 + n * PAGE_SIZE, n);
        }
    });
    let event = vmm.run_to_end(0, &|_, _| {
        assert_eq!(bench.system.stats().folds(), 1);
        0
    });
    assert_eq!(event, Ok(1), "log: {:#?}", bench.machine.log_lines());
    // The page that came back is a new one, somewhere else.
    assert_eq!(bench.system.stats().folds(), 2);
    bench.finish(vmm);
}

#[test]
fn a_page_can_be_shared_and_taken_back() {
    let bench = Bench::new();
    let page = RAM_BASE + 0x10_0000;
    let vmm = bench.built(Config::default(), move |guest| {
        guest.write(page, 0x5EC2E7);
        guest.ipa_state_set(page, page + PAGE_SIZE, false, true).expect("share");
        guest.write(page | SHARED, 0x0006_E110);
        // The VMM answers through the same page.
        guest.tell(1);
        assert_eq!(guest.read(page | SHARED), 0xA125);
        // The private alias is gone.
        assert!(guest.execute(Op::Read { ipa: page, size: 8 }).is_err());
        guest.ipa_state_set(page, page + PAGE_SIZE, true, true).expect("unshare");
        assert_eq!(guest.read(page), 0, "what the host wrote, and the old secret, are not there");
    });
    let shared = vmm.ram + 0x10_0000;
    let event = vmm.run_to_end(0, &|_, _| {
        let mut bytes = [0; 8];
        vmm.process.read(shared, &mut bytes).unwrap();
        assert_eq!(u64::from_le_bytes(bytes), 0x0006_E110);
        vmm.process.write(shared, &0xA125u64.to_le_bytes()).unwrap();
        0
    });
    assert_eq!(event, Ok(1), "log: {:#?}", bench.machine.log_lines());
    bench.finish(vmm);
}

#[test]
fn what_the_vmm_discards_is_gone_for_both_and_private_memory_stays() {
    let bench = Bench::new();
    let page = RAM_BASE + 0x10_0000;
    let private = page + PAGE_SIZE;
    let vmm = bench.built(Config::default(), move |guest| {
        guest.ipa_state_set(page, page + PAGE_SIZE, false, true).expect("share");
        guest.write(private, 0x5EC2E7);
        guest.write(page | SHARED, 1);
        guest.tell(1);
        assert_eq!(guest.read(page | SHARED), 0, "the page that the VMM has now");
        guest.write(page | SHARED, 2);
        guest.tell(2);
        assert_eq!(guest.read(private), 0x5EC2E7);
    });
    let shared = vmm.ram + 0x10_0000;
    let event = vmm.run_to_end(0, &|_, value| {
        let mut bytes = [0; 8];
        vmm.process.read(shared, &mut bytes).unwrap();
        assert_eq!(Some(u64::from_le_bytes(bytes)), value);
        if value == Some(1) {
            // Its mapping of all of RAM, private pages included.
            vmm.process.discard(vmm.ram, 4 << 20);
        }
        0
    });
    assert_eq!(event, Ok(1), "log: {:#?}", bench.machine.log_lines());
    bench.finish(vmm);
}

#[test]
fn a_vmm_that_dies_after_any_step_leaves_nothing_behind() {
    let bench = Bench::new();
    bench.machine.load_program(ENTRY, |_| {});
    for count in 0..=STEPS.len() {
        let mut vmm = bench.vmm(Config { vcpus: 2, ..Config::default() });
        for (name, step) in &STEPS[..count] {
            step(&mut vmm)
                .unwrap_or_else(|errno| panic!("{name}: {errno}; {:#?}", bench.machine.log_lines()));
        }
        bench.finish(vmm);
    }
}

#[test]
fn a_host_that_restarts_ends_its_realms_under_their_vmms() {
    let bench = Bench::new();
    let running = bench.built(Config { vcpus: 2, ..Config::default() }, |guest| {
        for n in 0.. {
            guest.write(RAM_BASE + 0x10_0000 + (n % 64) * PAGE_SIZE, n);
        }
    });
    std::thread::scope(|scope| {
        let vmm = &running;
        let threads: Vec<_> = (0..2).map(|vcpu| scope.spawn(move || vmm.run(vcpu))).collect();
        std::thread::sleep(std::time::Duration::from_millis(20));
        bench.system.shutdown();
        bench.machine.assert_all_memory_is_back();
        for thread in threads {
            assert_eq!(thread.join().unwrap(), Err(kvm_realm::errno::Errno::EIO));
        }
    });
    assert_eq!(running.run(0), Err(kvm_realm::errno::Errno::EPERM));
    bench.finish(running);
}

#[test]
fn files_may_be_closed_in_any_order() {
    let bench = Bench::new();
    for rotation in 0..5 {
        let vmm = bench.built(Config { vcpus: 2, ..Config::default() }, |_| {});
        let mut files = [vmm.vm(), vmm.vcpus[0], vmm.vcpus[1], vmm.vm() + 1, vmm.vcpus[1] + 1];
        files.rotate_left(rotation);
        for fd in files {
            vmm.process.close(fd);
        }
        bench.finish(vmm);
    }
}

#[test]
fn running_out_of_memory_at_any_point_is_an_error_and_loses_nothing() {
    let bench = Bench::new();
    bench.machine.load_program(ENTRY, |guest| {
        guest.write(RAM_BASE + 0x20_0000, 1);
    });
    let mut limit = 0;
    loop {
        let mut vmm = bench.vmm(Config::default());
        bench.kernel.limit_allocations(Some(limit));
        let built = vmm.build();
        let ran = built.is_ok().then(|| vmm.run_to_end(0, &no_device));
        bench.kernel.limit_allocations(None);
        bench.finish(vmm);
        match (built, ran) {
            (Ok(()), Some(Ok(1))) => break,
            (Err((_, kvm_realm::errno::Errno::ENOMEM)), _) => {}
            (Ok(()), Some(Err(kvm_realm::errno::Errno::ENOMEM))) => {}
            other => panic!("{limit} allocations: {other:?}; {:#?}", bench.machine.log_lines()),
        }
        limit += 1;
    }
    assert!(limit > 10);
}

#[test]
fn ten_realms_in_a_row_lose_no_page() {
    let bench = Bench::new();
    for round in 0..10 {
        let vmm = bench.built(Config { vcpus: 1 + round % 2, ..Config::default() }, |guest| {
            guest.write(RAM_BASE + 0x30_0000, 7);
        });
        assert_eq!(vmm.run_to_end(0, &no_device), Ok(1));
        bench.finish(vmm);
    }
}

#[test]
fn a_vmm_killed_while_its_guest_runs_leaves_nothing_behind() {
    let bench = Bench::new();
    let vmm = bench.built(Config::default(), |guest| {
        for n in 0.. {
            guest.write(RAM_BASE + 0x10_0000 + (n % 64) * PAGE_SIZE, n);
        }
    });
    let signal = Signal::default();
    std::thread::scope(|scope| {
        let sender = signal.clone();
        let (vmm, receiver) = (&vmm, signal.clone());
        let vcpu = scope.spawn(move || {
            receiver.adopt();
            vmm.run(0)
        });
        std::thread::sleep(std::time::Duration::from_millis(20));
        sender.raise();
        assert_eq!(vcpu.join().unwrap(), Err(kvm_realm::errno::Errno::EINTR));
    });
    bench.finish(vmm);
}

#[test]
fn a_second_vcpu_starts_and_answers_an_interrupt() {
    let bench = Bench::new();
    bench.machine.load_program(SECOND, |guest| {
        assert_eq!(guest.x0, 77);
        guest.enable_private(GICR, 1, 3);
        guest.write(FREE_RAM, 1);
        assert_eq!(guest.take_interrupt(), 3);
        guest.write(FREE_RAM, 2);
        loop {
            guest.wfi();
        }
    });
    let vmm = bench.built(Config { vcpus: 2, ..Config::default() }, |guest| {
        guest.write(FREE_RAM, 0);
        assert_eq!(guest.cpu_on(1, SECOND, 77), 0);
        assert_eq!(guest.cpu_on(1, SECOND, 77) as i64, psci::Code::AlreadyOn as i64);
        while guest.read(FREE_RAM) != 1 {}
        // ICC_SGI1R_EL1: INTID 3 to affinity 0.0.0.1.
        let iss = 3 << 20 | 5 << 17 | 12 << 10 | 11 << 1;
        guest.execute(Op::WriteSysreg { iss, value: 3 << 24 | 1 << 1 }).unwrap();
        while guest.read(FREE_RAM) != 2 {}
    });
    vmm.run_all(&no_device);
    bench.finish(vmm);
}

#[test]
fn an_access_where_nothing_is_reaches_the_vmm_as_a_device_access() {
    let bench = Bench::new();
    let vmm = bench.built(Config::default(), |guest| {
        let _ = guest.execute(Op::Read { ipa: 0x0200_0000 | SHARED, size: 8 });
    });
    assert_eq!(vmm.run(0), Ok(Exit::Mmio { gpa: 0x0200_0000, len: 8, write: None }));
    bench.finish(vmm);
}

#[test]
fn a_vmm_may_let_a_vcpu_start_anywhere() {
    let bench = Bench::new();
    bench.machine.load_steps(ELSEWHERE, || {
        let mut program = [Op::Counter, Op::smc(&[psci::fid::SYSTEM_OFF])].into_iter();
        Box::new(move |_| program.next().expect("it has ended"))
    });
    for pc in [None, Some(0x1234), Some(u64::MAX)] {
        let mut vmm = bench.vmm(Config::default());
        for (name, step) in STEPS {
            if *name == "finalize vCPUs" {
                pc.into_iter().for_each(|pc| vmm.set_reg(0, reg::CORE_PC, pc).unwrap());
                vmm.ioctl(vmm.vcpus[0], ioctl::ARM_VCPU_FINALIZE, &mut GENERATION_V2.vcpu_rec.clone())
                    .unwrap();
            } else {
                step(&mut vmm).unwrap();
            }
        }
        assert_eq!(vmm.run(0), Ok(Exit::SystemEvent(1)), "{pc:x?}");
        bench.finish(vmm);
    }
}

#[test]
fn a_realm_has_as_many_vcpus_as_the_rmm_allows_and_an_interrupt_reaches_each() {
    const FRAMES: u64 = 0x2000_0000;
    let machine = Machine::boot(Shape { dram: 128 << 20, ..Shape::default() });
    let bench = Bench::on(machine, GENERATION_V2);
    let count = bench.system.max_vcpus();
    // The RMM would allow 1023.
    assert_eq!(count, 512);
    bench.machine.load_program(SECOND, move |guest| {
        guest.enable_private(FRAMES, guest.x0, 3);
        guest.tell(guest.x0);
        assert_eq!(guest.take_interrupt(), 3);
        guest.tell(1000 + guest.x0);
        guest.smc(&[psci::fid::CPU_OFF]);
    });
    let config = Config { vcpus: count, gicr: FRAMES, ..Config::default() };
    let last = u64::from(count) - 1;
    let mpidr = |n: u64| n & 0xF | (n >> 4 & 0xFF) << 8;
    let vmm = bench.built(config, move |guest| {
        for n in 1..=last {
            assert_eq!(guest.cpu_on(mpidr(n), SECOND, n), 0, "vCPU {n}");
        }
        assert_ne!(guest.cpu_on(mpidr(last + 1), SECOND, 0), 0, "one more");
        guest.tell(0);
        // An SGI to all others.
        let iss = 3 << 20 | 5 << 17 | 12 << 10 | 11 << 1;
        guest.execute(Op::WriteSysreg { iss, value: 1 << 40 | 3 << 24 }).unwrap();
        guest.tell(1000);
    });
    for round in [0, 1000] {
        for vcpu in 0..count as usize {
            assert_eq!(vmm.told(vcpu), round + vcpu as u64);
        }
    }
    assert_eq!(vmm.run(0), Ok(Exit::SystemEvent(1)));
    bench.finish(vmm);
}

#[test]
fn memory_can_be_faulted_in_before_the_guest_touches_it() {
    use cca_abi::kvm;
    use kvm_realm::Errno;
    let bench = Bench::new();
    let mut vmm = bench.vmm(Config::default());
    let at = RAM_BASE + 0x10_0000;
    let shared = RAM_BASE + 0x20_0000;
    bench.machine.load_program(ENTRY, move |guest| {
        guest.write(at, 1);
        guest.write(at + 3 * PAGE_SIZE, 1);
        guest.write(shared | SHARED, 7);
    });
    let pre_fault = |vmm: &sim::vmm::Vmm, gpa, size, flags| {
        let mut args = kvm::PreFaultMemory { gpa, size, flags, padding: [0; 5] };
        let result = vmm.ioctl(vmm.vcpus[0], ioctl::PRE_FAULT_MEMORY, &mut args);
        (result, args.gpa, args.size)
    };
    for (name, step) in STEPS {
        if *name == "activate" {
            assert_eq!(
                pre_fault(&vmm, at, PAGE_SIZE, 0).0,
                Err(Errno::EPERM),
                "it could not be populated then"
            );
        }
        step(&mut vmm).unwrap();
    }
    for (gpa, size, flags) in [
        (at, 0, 0),
        (at + 1, PAGE_SIZE, 0),
        (at, 5, 0),
        (at, PAGE_SIZE, 1),
        (0u64.wrapping_sub(PAGE_SIZE), 2 * PAGE_SIZE, 0),
    ] {
        assert_eq!(pre_fault(&vmm, gpa, size, flags).0, Err(Errno::EINVAL));
    }
    assert_eq!(pre_fault(&vmm, 0x1000, PAGE_SIZE, 0), (Err(Errno::ENOENT), 0x1000, PAGE_SIZE));
    assert_eq!(pre_fault(&vmm, at, 4 * PAGE_SIZE, 0), (Ok(0), at + 4 * PAGE_SIZE, 0));
    // Once more is no harm; the end of the slot is where it stops.
    assert_eq!(pre_fault(&vmm, at, PAGE_SIZE, 0).0, Ok(0));
    let end = RAM_BASE + (4 << 20);
    assert_eq!(pre_fault(&vmm, end - PAGE_SIZE, 2 * PAGE_SIZE, 0), (Ok(0), end, PAGE_SIZE));
    vmm.set_private(shared, PAGE_SIZE, false).unwrap();
    assert_eq!(pre_fault(&vmm, shared, PAGE_SIZE, 0).0, Ok(0));
    assert_eq!(bench.system.stats().shared(), 1);
    let exits = bench.system.stats().exits(0);
    assert_eq!(vmm.run_to_end(0, &no_device), Ok(1));
    assert_eq!(bench.system.stats().exits(0), exits, "the guest faulted");
    bench.finish(vmm);
}
