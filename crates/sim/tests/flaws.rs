//! The flaws that reviewers found in the kernel series, by their numbers in docs/series.md: those that show when a guest
//! runs. The others are in the host core's `flaws.rs`.

use cca_abi::kvm::{self, ioctl, reg, smccc_action, vm_attr};
use cca_abi::rmi::fid;
use cca_abi::{psci, rsi};
use kvm_realm::errno::Errno;
use sim::bench::Bench;
use sim::guest::{Guest, Op};
use sim::machine::{Machine, Shape};
use sim::memory::PAGE_SIZE;
use sim::vmm::{Config, DEVICE, ENTRY, Exit, GICR, RAM_BASE, SECOND, SHARED, STEPS, Vmm};
use zerocopy::IntoBytes;

const RAM: u64 = 4 << 20;

#[test]
fn flaw_02_a_fault_without_memory_is_an_error_and_loses_no_page() {
    let bench = Bench::new();
    let vmm = bench.built(Config::default(), |guest| {
        guest.write(RAM_BASE + 0x20_0000, 1);
        guest.write(RAM_BASE + 0x10_0000, 1);
    });
    let mut refused = 0;
    loop {
        bench.kernel.limit_allocations(Some(refused));
        match vmm.run(0) {
            Err(Errno::ENOMEM) => refused += 1,
            Ok(Exit::SystemEvent(1)) => break,
            other => panic!("with {refused} pages: {other:?}"),
        }
    }
    bench.kernel.limit_allocations(None);
    assert!(refused > 1);
    bench.finish(vmm);
}

#[test]
fn flaw_03_a_ripas_change_is_reported_as_far_as_it_went_and_ram_needs_a_slot() {
    let bench = Bench::new();
    let vmm = bench.built(Config::default(), |guest| {
        // Half of it lies behind RAM.
        let end = RAM_BASE + RAM;
        let set = |from, to, ram| guest.smc(&[rsi::fid::IPA_STATE_SET, from, to, ram, 1]);
        let out = set(end - PAGE_SIZE, end + PAGE_SIZE, 0);
        assert_eq!((out[0], out[1]), (0, end), "up to the end of the slot");
        let out = set(end, end + PAGE_SIZE, 1);
        assert_eq!((out[0], out[2]), (0, 1), "rejected: nothing is there");
    });
    let end = RAM_BASE + RAM;
    let expected = Exit::MemoryFault { private: false, gpa: end - PAGE_SIZE, size: PAGE_SIZE };
    assert_eq!(vmm.run(0), Ok(expected));
    assert_eq!(vmm.run(0), Ok(Exit::SystemEvent(1)));
    bench.finish(vmm);
}

#[test]
fn flaw_04_what_is_taken_from_one_face_leaves_the_other() {
    let bench = Bench::new();
    let (private, shared) = (RAM_BASE + 0x10_0000, RAM_BASE + 0x10_1000);
    let vmm = bench.built(Config::default(), move |guest| {
        guest.write(private, 0x5EC2E7);
        guest.ipa_state_set(shared, shared + PAGE_SIZE, false, true).expect("share");
        guest.write(shared | SHARED, 7);
        guest.tell(1);
        assert_eq!(guest.read(private), 0x5EC2E7);
        assert_eq!(guest.read(shared | SHARED), 7);
    });
    assert!(matches!(vmm.run(0), Ok(Exit::MemoryFault { private: false, .. })));
    vmm.set_private(shared, PAGE_SIZE, false).unwrap();
    assert_eq!(vmm.told(0), 1);
    let destroyed = bench.system.stats().rmi_calls(fid::DATA_DESTROY);
    let unmapped = bench.system.stats().rmi_calls(fid::RTT_UNMAP_UNPROTECTED);
    // Both already are what they shall be.
    vmm.set_private(private, PAGE_SIZE, true).unwrap();
    vmm.set_private(shared, PAGE_SIZE, false).unwrap();
    assert_eq!(bench.system.stats().rmi_calls(fid::DATA_DESTROY), destroyed);
    assert_eq!(bench.system.stats().rmi_calls(fid::RTT_UNMAP_UNPROTECTED), unmapped);
    assert_eq!(vmm.run(0), Ok(Exit::SystemEvent(1)));
    bench.finish(vmm);
}

#[test]
fn flaw_08_every_way_of_taking_memory_away_takes_the_face_that_it_names() {
    let bench = Bench::new();
    let base = RAM_BASE + 0x10_0000;
    let size = 8 * PAGE_SIZE;
    let offset = base - RAM_BASE;
    // Pages of both faces, one after the other; and what the VMM then does to all of them.
    type Way<'a> = (&'a str, u64, u64, &'a dyn Fn(&Vmm));
    let ways: [Way<'_>; 6] = [
        ("make private", 0, 4, &|vmm| vmm.set_private(base, size, true).unwrap()),
        ("make shared", 4, 0, &|vmm| vmm.set_private(base, size, false).unwrap()),
        ("punch a hole", 4, 0, &|vmm| vmm.punch_hole(offset, size).unwrap()),
        ("discard", 0, 4, &|vmm| vmm.process.discard(vmm.ram + offset, size)),
        ("nothing", 0, 0, &|_| {}),
        // With the page that was populated.
        ("delete the slot", 5, 4, &|vmm| {
            let mut region: kvm::MemoryRegion2 = zerocopy::FromZeros::new_zeroed();
            region.flags = kvm::MEM_GUEST_MEMFD;
            vmm.ioctl(vmm.vm(), ioctl::SET_USER_MEMORY_REGION2, &mut region).unwrap();
        }),
    ];
    for (name, private, shared, take) in ways {
        let vmm = bench.built(Config { image_pages: 1, ..Config::default() }, move |guest| {
            for n in 0..8 {
                let page = base + n * PAGE_SIZE;
                if n % 2 == 0 {
                    guest.write(page, n);
                } else {
                    guest.ipa_state_set(page, page + PAGE_SIZE, false, true).expect("share");
                    guest.write(page | SHARED, n);
                }
            }
            guest.tell(1);
        });
        loop {
            match vmm.run(0) {
                Ok(Exit::MemoryFault { private, gpa, size }) => vmm.set_private(gpa, size, private).unwrap(),
                Ok(Exit::Mmio { .. }) => break,
                other => panic!("{other:?}"),
            }
        }
        let stats = bench.system.stats();
        let count = || (stats.rmi_calls(fid::DATA_DESTROY), stats.rmi_calls(fid::RTT_UNMAP_UNPROTECTED));
        let before = count();
        take(&vmm);
        let after = count();
        assert_eq!((after.0 - before.0, after.1 - before.1), (private, shared), "{name}");
        bench.finish(vmm);
    }
}

#[test]
fn flaw_11_more_interrupts_than_list_registers_arrive_for_any_number_of_them() {
    const LINES: u64 = 12;
    for list_registers in [1, 2, 3, 16] {
        let machine = Machine::boot(Shape { list_registers, ..Shape::default() });
        let bench = Bench::on(machine, kvm::GENERATION_V2);
        let vmm = bench.built(Config::default(), |guest| {
            (32..32 + LINES).for_each(|intid| guest.enable_spi(intid, true));
            guest.tell(1);
            let mut seen = 0;
            while seen != (1 << LINES) - 1 {
                let intid = guest.take_interrupt();
                assert_eq!(seen & 1 << (intid - 32), 0, "{intid} came twice");
                seen |= 1 << (intid - 32);
            }
        });
        assert_eq!(vmm.told(0), 1);
        for intid in 32..32 + LINES as u32 {
            for level in [1, 0] {
                let mut line = kvm::IrqLevel { irq: 1 << 24 | intid, level };
                vmm.ioctl(vmm.vm(), ioctl::IRQ_LINE, &mut line).unwrap();
            }
        }
        assert_eq!(vmm.run_to_end(0, &|_, _| 0), Ok(1), "{:#?}", bench.machine.log_lines());
        bench.finish(vmm);
    }
}

#[test]
fn flaw_12_two_vcpus_that_want_one_page_get_it() {
    let bench = Bench::new();
    fn touch(guest: &Guest) {
        for page in 0x100..0x300 {
            let alias = if page % 2 == 0 { SHARED } else { 0 };
            let _ = guest.execute(Op::Read { ipa: (RAM_BASE + page * PAGE_SIZE) | alias, size: 8 });
        }
    }
    bench.machine.load_program(SECOND, |guest| {
        touch(guest);
        loop {
            guest.wfi();
        }
    });
    let vmm = bench.built(Config { vcpus: 2, ..Config::default() }, |guest| {
        for page in (0x100..0x300).step_by(2) {
            let page = RAM_BASE + page * PAGE_SIZE;
            guest.ipa_state_set(page, page + PAGE_SIZE, false, true).expect("share");
        }
        assert_eq!(guest.cpu_on(1, SECOND, 0), 0);
        touch(guest);
    });
    vmm.run_all(&|_, _| 0);
    bench.finish(vmm);
}

#[test]
fn flaw_16_a_slot_that_is_no_memory_is_refused_at_its_first_use() {
    let bench = Bench::new();
    let vmm = bench.built(Config::default(), |guest| {
        let _ = guest.execute(Op::Read { ipa: 0x1000_0000 | SHARED, size: 8 });
    });
    let mut region = kvm::MemoryRegion {
        slot: 5,
        flags: 0,
        guest_phys_addr: 0x1000_0000,
        memory_size: PAGE_SIZE,
        // Nothing that could be pinned as memory.
        userspace_addr: 0x7000_0000_0000,
    };
    vmm.ioctl(vmm.vm(), ioctl::SET_USER_MEMORY_REGION, &mut region).unwrap();
    assert_eq!(vmm.run(0), Err(Errno::EFAULT));
    assert_eq!(bench.system.stats().rmi_calls(fid::RTT_MAP_UNPROTECTED), 0);
    region.flags = 2;
    let read_only = vmm.ioctl(vmm.vm(), ioctl::SET_USER_MEMORY_REGION, &mut region);
    assert_eq!(read_only, Err(Errno::EINVAL), "KVM_MEM_READONLY");
    bench.finish(vmm);
}

/// A VMM that answers calls of these functions itself.
fn filtered(bench: &Bench, config: Config, base: u32, action: u8) -> Vmm {
    let mut vmm = bench.vmm(config);
    for (name, step) in STEPS {
        step(&mut vmm).unwrap_or_else(|errno| panic!("{name}: {errno}"));
    }
    let filter = kvm::SmcccFilter { base, nr_functions: 0x20, action, pad: [0; 15] };
    let addr = vmm.process.mmap(PAGE_SIZE);
    vmm.process.write(addr, filter.as_bytes()).unwrap();
    let mut attr = kvm::DeviceAttr { flags: 0, group: vm_attr::GRP_SMCCC, attr: vm_attr::SMCCC_FILTER, addr };
    vmm.ioctl(vmm.vm(), ioctl::SET_DEVICE_ATTR, &mut attr).unwrap();
    vmm
}

#[test]
fn flaw_17_user_space_can_answer_a_host_call_in_all_registers() {
    let bench = Bench::new();
    bench.machine.load_program(ENTRY, |guest| {
        let page = RAM_BASE + 0x10_0000;
        guest.write(page, 0);
        guest.write(page + 8, 0xC600_0001);
        guest.write(page + 8 + 17 * 8, 17);
        assert_eq!(guest.smc(&[rsi::fid::HOST_CALL, page])[0], 0);
        assert_eq!(guest.read(page + 8), 0xA0);
        assert_eq!(guest.read(page + 8 + 17 * 8), 0xA17);
        assert_eq!(guest.read(page + 8 + 30 * 8), 0xA30);
    });
    let vmm = filtered(&bench, Config::default(), 0xC600_0000, smccc_action::FWD_TO_USER);
    let x = |n: u64| reg::CORE_X0 + 2 * n;
    assert_eq!(vmm.set_reg(0, x(17), 1), Err(Errno::EINVAL), "not before there is a call");
    assert_eq!(vmm.run(0), Ok(Exit::Other(kvm::exit::HYPERCALL)));
    for (n, value) in [(0, 0xA0), (17, 0xA17), (30, 0xA30)] {
        assert_eq!(vmm.set_reg(0, x(n), value), Ok(()));
    }
    assert_eq!(vmm.run(0), Ok(Exit::SystemEvent(1)));
    bench.finish(vmm);
}

#[test]
fn a_denied_function_is_not_supported_and_a_denied_cpu_stays_off() {
    let bench = Bench::new();
    bench.machine.load_program(ENTRY, |guest| {
        // The 64-bit functions of PSCI are denied; host calls of the same numbers, too.
        let page = RAM_BASE + 0x10_0000;
        guest.write(page, 0);
        guest.write(page + 8, psci::fid::CPU_ON_64);
        assert_eq!(guest.smc(&[rsi::fid::HOST_CALL, page])[0], 0);
        assert_eq!(guest.read(page + 8), u64::MAX);
        guest.write(page + 8, cca_abi::smccc::VERSION);
        assert_eq!(guest.smc(&[rsi::fid::HOST_CALL, page])[0], 0);
        assert_eq!(guest.read(page + 8), cca_abi::smccc::VERSION_1_2, "the architecture's are not filtered");
        assert_eq!(guest.cpu_on(1, SECOND, 0) as i64, psci::Code::Denied as i64);
    });
    let vmm = filtered(&bench, Config { vcpus: 2, ..Config::default() }, 0xC400_0000, smccc_action::DENY);
    assert_eq!(vmm.run(0), Ok(Exit::SystemEvent(1)));
    bench.finish(vmm);
}

#[test]
fn psci_can_be_user_spaces_with_the_rmms_completion() {
    let bench = Bench::new();
    bench.machine.load_program(SECOND, |guest| {
        assert_eq!(guest.x0, 99);
        guest.write(RAM_BASE + 0x10_0000, 1);
        loop {
            guest.wfi();
        }
    });
    bench.machine.load_program(ENTRY, |guest| {
        guest.write(RAM_BASE + 0x10_0000, 0);
        assert_eq!(guest.cpu_on(1, SECOND, 99) as i64, psci::Code::Denied as i64);
        assert_eq!(guest.cpu_on(1, SECOND, 99), 0);
        while guest.read(RAM_BASE + 0x10_0000) == 0 {}
    });
    let config = Config { vcpus: 2, ..Config::default() };
    // The 64-bit functions.
    let vmm = filtered(&bench, config, 0xC400_0000, smccc_action::FWD_TO_USER);
    let complete = |status: i32| {
        let psci_status = u32::from_ne_bytes(status.to_ne_bytes());
        let mut args = kvm::RmmPsciComplete { target_mpidr: 1, psci_status, padding: [0; 3] };
        vmm.ioctl(vmm.vcpus[0], kvm::GENERATION_V2.psci_complete, &mut args)
    };
    assert_eq!(vmm.run(0), Ok(Exit::Other(kvm::exit::HYPERCALL)));
    // Whoever goes on without an answer is told so, and may still answer.
    assert_eq!(vmm.run(0), Err(Errno::ENXIO));
    assert_eq!(complete(-3), Ok(0));
    assert_eq!(vmm.run(0), Ok(Exit::Other(kvm::exit::HYPERCALL)));
    assert_eq!(complete(0), Ok(0));
    let mut runnable = kvm::mp_state::RUNNABLE;
    vmm.ioctl(vmm.vcpus[1], ioctl::SET_MP_STATE, &mut runnable).unwrap();
    vmm.run_all(&|_, _| 0);
    bench.finish(vmm);
}

#[test]
fn flaw_18_an_access_that_cannot_be_emulated_is_aborted_in_the_guest() {
    let bench = Bench::new();
    let vmm = bench.built(Config::default(), |guest| {
        let exception = guest.execute(Op::Pair { ipa: DEVICE | SHARED }).unwrap_err();
        assert_eq!(exception.esr >> 26, 0x25, "a data abort of its own level");
        assert_eq!(exception.esr & 0x3F, 0x10, "a synchronous external abort");
    });
    assert_eq!(vmm.run(0), Ok(Exit::SystemEvent(1)));
    bench.finish(vmm);
}

#[test]
fn flaw_19_a_change_of_all_memory_needs_no_reserve_of_tables() {
    let bench = Bench::new();
    let vmm = bench.built(Config::default(), |guest| {
        for ram in [false, true, false, true] {
            guest.ipa_state_set(RAM_BASE, RAM_BASE + RAM, ram, true).expect("all of it");
            guest.ipa_state_set(RAM_BASE + 0x1F_F000, RAM_BASE + 0x20_1000, !ram, true).expect("a part");
        }
    });
    assert_eq!(vmm.run_to_end(0, &|_, _| 0), Ok(1), "{:#?}", bench.machine.log_lines());
    bench.finish(vmm);
}

#[test]
fn flaw_29c_two_vcpus_that_need_one_table_make_it_once() {
    let bench = Bench::new();
    // Each block of 2 MiB needs a table of pages, and both vCPUs come to each at about the same time.
    const BLOCKS: u64 = 6;
    fn touch(guest: &Guest, own: u64) {
        let meet = RAM_BASE + 0x10_0000;
        for block in 1..BLOCKS {
            guest.write(meet + own * 8, block);
            while guest.read(meet + (1 - own) * 8) < block {}
            for page in [own, 0x40 + own, 0x80] {
                guest.write(RAM_BASE + block * 0x20_0000 + page * PAGE_SIZE, block);
            }
        }
    }
    bench.machine.load_program(SECOND, |guest| {
        touch(guest, 1);
        loop {
            guest.wfi();
        }
    });
    let config = Config { vcpus: 2, ram: BLOCKS * 0x20_0000, ..Config::default() };
    let vmm = bench.built(config, |guest| {
        guest.write(RAM_BASE + 0x10_0000, 0);
        assert_eq!(guest.cpu_on(1, SECOND, 0), 0);
        touch(guest, 0);
    });
    // By then the RMM has whatever tables initialising needed.
    let before = bench.system.stats().rmi_calls(fid::RTT_CREATE);
    vmm.run_all(&|_, _| 0);
    let created = bench.system.stats().rmi_calls(fid::RTT_CREATE) - before;
    assert_eq!(created, BLOCKS - 1, "{:#?}", bench.machine.log_lines());
    bench.finish(vmm);
}

#[test]
fn flaw_29e_a_cpu_on_that_the_rmm_does_not_complete_is_an_error_and_starts_nobody() {
    let bench = Bench::new();
    bench.machine.load_program(SECOND, |guest| {
        guest.write(RAM_BASE + 0x10_0000, 1);
        loop {
            guest.wfi();
        }
    });
    let vmm = bench.built(Config { vcpus: 2, ..Config::default() }, |guest| {
        guest.write(RAM_BASE + 0x10_0000, 0);
        assert_eq!(guest.cpu_on(1, SECOND, 0), 0);
        while guest.read(RAM_BASE + 0x10_0000) == 0 {}
    });
    let state = || {
        let mut state = 0u32;
        vmm.ioctl(vmm.vcpus[1], ioctl::GET_MP_STATE, &mut state).unwrap();
        state
    };
    for (x0, errno) in [(1, Errno::ENXIO), (3, Errno::EAGAIN), (0x99, Errno::EIO)] {
        // The call stays open, so each later entry is refused; the first answer counts.
        let bench = Bench::new();
        bench.machine.load_program(SECOND, |_| panic!("nobody switched it on"));
        let vmm = bench.built(Config { vcpus: 2, ..Config::default() }, |guest| {
            guest.cpu_on(1, SECOND, 0);
            panic!("the call was not answered");
        });
        bench.kernel.answer(fid::PSCI_COMPLETE, Some(x0));
        assert_eq!(vmm.run(0), Err(errno));
        let mut state = 0u32;
        vmm.ioctl(vmm.vcpus[1], ioctl::GET_MP_STATE, &mut state).unwrap();
        assert_eq!(state, kvm::mp_state::STOPPED);
        assert_eq!(vmm.run(0), Err(Errno::ENXIO));
        bench.finish(vmm);
    }
    // Whoever finds out why may complete it after all.
    bench.kernel.answer(fid::PSCI_COMPLETE, Some(1));
    assert_eq!(vmm.run(0), Err(Errno::ENXIO));
    assert_eq!(state(), kvm::mp_state::STOPPED);
    bench.kernel.answer(fid::PSCI_COMPLETE, None);
    let mut complete = kvm::RmmPsciComplete { target_mpidr: 1, psci_status: 0, padding: [0; 3] };
    vmm.ioctl(vmm.vcpus[0], kvm::GENERATION_V2.psci_complete, &mut complete).unwrap();
    let mut runnable = kvm::mp_state::RUNNABLE;
    vmm.ioctl(vmm.vcpus[1], ioctl::SET_MP_STATE, &mut runnable).unwrap();
    vmm.run_all(&|_, _| 0);
    bench.finish(vmm);
}

#[test]
fn flaw_21_a_timer_alone_ends_wfi() {
    let bench = Bench::new();
    let vmm = bench.built(Config::default(), |guest| {
        guest.enable_private(GICR, 0, 27);
        let deadline = guest.counter() + 5_000_000;
        guest.execute(Op::SetTimer { cval: deadline, ctl: 1 }).unwrap();
        assert_eq!(guest.take_interrupt(), 27);
        assert!(guest.counter() >= deadline);
        guest.execute(Op::SetTimer { cval: 0, ctl: 0 }).unwrap();
    });
    assert_eq!(vmm.run_to_end(0, &|_, _| 0), Ok(1));
    bench.finish(vmm);
}

#[test]
fn flaw_29d_a_timer_alone_ends_cpu_suspend() {
    let bench = Bench::new();
    let vmm = bench.built(Config::default(), |guest| {
        guest.enable_private(GICR, 0, 27);
        let deadline = guest.counter() + 5_000_000;
        guest.execute(Op::SetTimer { cval: deadline, ctl: 1 }).unwrap();
        while guest.counter() < deadline {
            assert_eq!(guest.smc(&[psci::fid::CPU_SUSPEND_64, 0, 0, 0])[0], 0);
        }
        guest.execute(Op::SetTimer { cval: 0, ctl: 0 }).unwrap();
    });
    assert_eq!(vmm.run_to_end(0, &|_, _| 0), Ok(1));
    bench.finish(vmm);
}

#[test]
fn flaw_23_vmm_and_realm_see_one_page_whatever_the_vmm_does_to_its_mapping() {
    let bench = Bench::new();
    let ring = RAM_BASE + 0x20_0000;
    let vmm = bench.built(Config::default(), move |guest| {
        guest.ipa_state_set(ring, ring + 4 * PAGE_SIZE, false, true).expect("share");
        for n in 1..20 {
            guest.write((ring + n % 4 * PAGE_SIZE) | SHARED, n);
            guest.tell(n);
            assert_eq!(guest.read((ring + n % 4 * PAGE_SIZE + 8) | SHARED), n + 100);
        }
    });
    let base = vmm.ram + 0x20_0000;
    let event = vmm.run_to_end(0, &|_, value| {
        let n = value.unwrap();
        let page = base + n % 4 * PAGE_SIZE;
        let mut seen = [0; 8];
        vmm.process.read(page, &mut seen).unwrap();
        assert_eq!(u64::from_le_bytes(seen), n);
        // All pages become others: as by migration, a fork, or a huge page being made of them.
        vmm.process.discard(base, 4 * PAGE_SIZE);
        vmm.process.write(page + 8, &(n + 100).to_le_bytes()).unwrap();
        0
    });
    assert_eq!(event, Ok(1), "{:#?}", bench.machine.log_lines());
    bench.finish(vmm);
}

#[test]
fn flaw_29g_a_destroyed_page_is_reported_and_not_faulted_in_for_ever() {
    let bench = Bench::new();
    let page = RAM_BASE + 0x10_0000;
    let vmm = bench.built(Config::default(), move |guest| {
        guest.write(page, 1);
        guest.tell(1);
        let _ = guest.execute(Op::Read { ipa: page, size: 8 });
        panic!("the guest read a destroyed page");
    });
    assert_eq!(vmm.told(0), 1);
    vmm.punch_hole(page - RAM_BASE, PAGE_SIZE).unwrap();
    for _ in 0..3 {
        let before = bench.machine.smc_count();
        let exit = vmm.run(0);
        assert_eq!(exit, Ok(Exit::MemoryFault { private: true, gpa: page, size: PAGE_SIZE }));
        assert!(bench.machine.smc_count() - before < 20);
    }
    bench.finish(vmm);
}

#[test]
fn a_later_vmm_gets_an_error_with_a_memory_fault_and_moves_memory_first() {
    let bench = Bench::of(kvm::Generation::of(7).unwrap());
    let page = RAM_BASE + 0x10_0000;
    let vmm = bench.built(Config::default(), move |guest| {
        guest.write(page, 0x5EC2E7);
        guest.ipa_state_set(page, page + PAGE_SIZE, false, true).expect("share");
        guest.write(page | SHARED, 1);
        guest.ipa_state_set(page, page + PAGE_SIZE, true, true).expect("unshare");
        assert_eq!(guest.read(page), 0);
    });
    for (changes, private) in [(0, false), (1, true)] {
        assert_eq!(vmm.run(0), Err(Errno::EFAULT));
        assert_eq!(vmm.exit(0), Exit::MemoryFault { private, gpa: page, size: PAGE_SIZE });
        let calls = bench.system.stats().rmi_calls(fid::RTT_SET_RIPAS);
        assert_eq!(calls, changes, "carried out only when it runs again");
        vmm.set_private(page, PAGE_SIZE, private).unwrap();
    }
    assert_eq!(vmm.run(0), Ok(Exit::SystemEvent(1)));
    bench.finish(vmm);
}
