//! A Realm's life as user space drives it, with an RMM that may fail: nothing is lost, nothing hangs, every mistake has
//! its error.

mod fake;

use cca_abi::kvm::{self, ioctl, reg, rme};
use cca_abi::rmi::fid;
use fake::{Fake, Machine, PAGE, RAM, USER};
use kvm_realm::{Errno, FileObject};

#[test]
fn a_realm_is_built_and_torn_down() {
    let kernel = Fake::new();
    let machine = Machine::new(&kernel, 1024);
    machine.rme(rme::CREATE_RD).unwrap();
    machine.init_ipa(RAM, 1024 * PAGE).unwrap();
    machine.populate(RAM, 100 * PAGE).unwrap();
    let vcpu = machine.vcpu(0);
    machine.finalize(vcpu).unwrap();
    machine.rme(rme::ACTIVATE_REALM).unwrap();
    assert_eq!(kernel.calls_of(fid::DATA_CREATE).len(), 101, "one more because the first found no table");
    machine.close(&[vcpu], 0);
}

#[test]
fn populating_a_page_costs_two_rmi_calls() {
    let kernel = Fake::new();
    let machine = Machine::new(&kernel, 512);
    machine.rme(rme::CREATE_RD).unwrap();
    machine.populate(RAM, PAGE).unwrap();
    let before = kernel.calls();
    machine.populate(RAM + PAGE, 200 * PAGE).unwrap();
    assert_eq!(kernel.calls() - before, 400);
    machine.close(&[], 0);
}

#[test]
fn memory_without_a_realm_calls_no_rmi() {
    let kernel = Fake::new();
    let machine = Machine::new(&kernel, 16);
    let before = kernel.calls();
    machine.set_private(RAM, 16, false).unwrap();
    machine.set_private(RAM, 16, true).unwrap();
    machine.punch(0, 16).unwrap();
    assert_eq!(kernel.calls(), before);
    machine.close(&[], 0);
}

#[test]
fn a_scratch_vm_reads_id_registers_and_calls_no_rmi() {
    let kernel = Fake::new();
    let machine = Machine::new(&kernel, 1);
    let before = kernel.calls();
    let vcpu = machine.vcpu(0);
    for id in [reg::ID_AA64PFR0_EL1, reg::ID_AA64DFR0_EL1, reg::MPIDR_EL1] {
        machine.on(vcpu, ioctl::GET_ONE_REG, &kvm::OneReg { id, addr: USER + 64 }).unwrap();
    }
    assert_eq!(kernel.calls(), before);
    machine.close(&[vcpu], 0);
}

#[test]
fn recs_are_created_in_ascending_order_whatever_order_they_were_finalized_in() {
    let kernel = Fake::new();
    let machine = Machine::new(&kernel, 1);
    machine.rme(rme::CREATE_RD).unwrap();
    let vcpus: Vec<i64> = [2, 0, 1].into_iter().map(|id| machine.vcpu(id)).collect();
    for vcpu in &vcpus {
        machine.finalize(*vcpu).unwrap();
    }
    machine.rme(rme::ACTIVATE_REALM).unwrap();
    assert_eq!(kernel.calls_of(fid::REC_CREATE).len(), 3);
    assert_eq!(kernel.mpidrs(), [0, 1, 2]);
    machine.close(&vcpus, 0);
}

#[test]
fn a_gap_in_the_vcpu_numbers_is_refused_before_the_rmm_does() {
    let kernel = Fake::new();
    let machine = Machine::new(&kernel, 1);
    machine.rme(rme::CREATE_RD).unwrap();
    let vcpu = machine.vcpu(1);
    machine.finalize(vcpu).unwrap();
    assert_eq!(machine.rme(rme::ACTIVATE_REALM), Err(Errno::EINVAL));
    machine.close(&[vcpu], 0);
}

#[test]
fn a_second_finalize_is_refused() {
    let kernel = Fake::new();
    let machine = Machine::new(&kernel, 1);
    let vcpu = machine.vcpu(0);
    assert_eq!(machine.finalize(vcpu), Err(Errno::ENOENT));
    machine.rme(rme::CREATE_RD).unwrap();
    machine.finalize(vcpu).unwrap();
    assert_eq!(machine.finalize(vcpu), Err(Errno::EPERM));
    machine.close(&[vcpu], 0);
}

#[test]
fn psci_complete_without_recs_is_refused() {
    let kernel = Fake::new();
    let machine = Machine::new(&kernel, 1);
    let vcpus = [machine.vcpu(0), machine.vcpu(1)];
    let args = kvm::RmmPsciComplete { target_mpidr: 1, psci_status: 0, padding: [0; 3] };
    let command = kvm::GENERATION_V2.psci_complete;
    assert_eq!(machine.on(vcpus[0], command, &args), Err(Errno::EINVAL));
    assert!(kernel.calls_of(fid::PSCI_COMPLETE).is_empty());
    machine.close(&vcpus, 0);
}

#[test]
fn running_before_activation_is_refused() {
    let kernel = Fake::new();
    let machine = Machine::new(&kernel, 1);
    let vcpu = machine.vcpu(0);
    assert_eq!(kernel.file(vcpu).ioctl(ioctl::RUN, 0), Err(Errno::EPERM));
    machine.close(&[vcpu], 0);
}

#[test]
fn states_are_kept() {
    let kernel = Fake::new();
    let machine = Machine::new(&kernel, 16);
    let hash = |number: u32| {
        let mut item = kvm::RmeConfigItem { cfg: rme::CFG_HASH_ALGO, data: [0; 256] };
        item.data[..4].copy_from_slice(&number.to_ne_bytes());
        machine.rme_with(rme::CONFIG_REALM, &item)
    };
    assert_eq!(machine.populate(RAM, PAGE), Err(Errno::EINVAL));
    assert_eq!(machine.rme(rme::ACTIVATE_REALM), Err(Errno::EINVAL));
    assert_eq!(hash(2), Err(Errno::EINVAL));
    assert_eq!(hash(256), Err(Errno::EINVAL));
    hash(1).unwrap();
    machine.rme(rme::CREATE_RD).unwrap();
    assert_eq!(hash(0), Err(Errno::EINVAL));
    assert_eq!(machine.rme(rme::CREATE_RD), Err(Errno::EEXIST));
    machine.rme(rme::ACTIVATE_REALM).unwrap();
    assert_eq!(machine.populate(RAM, PAGE), Err(Errno::EINVAL));
    assert_eq!(machine.init_ipa(RAM, PAGE), Err(Errno::EINVAL));
    assert_eq!(machine.rme(rme::ACTIVATE_REALM), Err(Errno::EINVAL));
    machine.close(&[], 0);
}

#[test]
fn reserved_fields_must_be_zero() {
    let kernel = Fake::new();
    let machine = Machine::new(&kernel, 16);
    let mut item = kvm::RmeConfigItem { cfg: rme::CFG_RPV, data: [0; 256] };
    item.data[64] = 1;
    assert_eq!(machine.rme_with(rme::CONFIG_REALM, &item), Err(Errno::EINVAL));
    machine.rme(rme::CREATE_RD).unwrap();
    let populate = kvm::RmePopulate { base: RAM, size: PAGE, flags: 2, reserved: [0; 3] };
    assert_eq!(machine.rme_with(rme::POPULATE_REALM, &populate), Err(Errno::EINVAL));
    let populate = kvm::RmePopulate { base: RAM, size: PAGE, flags: 0, reserved: [0, 0, 1] };
    assert_eq!(machine.rme_with(rme::POPULATE_REALM, &populate), Err(Errno::EINVAL));
    let init = kvm::RmeInitIpa { base: RAM, size: PAGE, reserved: [1, 0, 0, 0] };
    assert_eq!(machine.rme_with(rme::INIT_IPA_REALM, &init), Err(Errno::EINVAL));
    machine.close(&[], 0);
}

#[test]
fn empty_wrapping_and_crooked_ranges_are_refused() {
    let kernel = Fake::new();
    let machine = Machine::new(&kernel, 16);
    machine.rme(rme::CREATE_RD).unwrap();
    let end = 0u64.wrapping_sub(PAGE);
    for (base, size) in [(RAM, 0), (RAM + 1, PAGE), (RAM, PAGE + 1), (end, 2 * PAGE), (RAM, end)] {
        assert_eq!(machine.init_ipa(base, size), Err(Errno::EINVAL), "{base:#x} {size:#x}");
        let refused = machine.populate(base, size);
        assert!(matches!(refused, Err(Errno::EINVAL | Errno::EFAULT)), "{base:#x} {size:#x}");
    }
    assert_eq!(machine.populate(RAM + 15 * PAGE, 2 * PAGE), Err(Errno::EINVAL));
    assert_eq!(machine.populate(RAM + 16 * PAGE, PAGE), Err(Errno::EFAULT));
    assert_eq!(machine.init_ipa(1 << 32, PAGE), Err(Errno::EINVAL));
    assert!(kernel.calls_of(fid::DATA_CREATE).is_empty());
    machine.close(&[], 0);
}

#[test]
fn slots_cannot_overlap_move_or_change_their_private_memory() {
    let kernel = Fake::new();
    let machine = Machine::new(&kernel, 16);
    let set = |region: kvm::MemoryRegion2| machine.vm(ioctl::SET_USER_MEMORY_REGION2, &region);
    assert_eq!(set(machine.region(1, RAM + 8 * PAGE, 8)), Err(Errno::EEXIST), "guest addresses overlap");
    assert_eq!(set(machine.region(1, RAM + 32 * PAGE, 8)), Err(Errno::EEXIST), "pages of the file overlap");
    assert_eq!(set(machine.region(0, RAM + PAGE, 16)), Err(Errno::EINVAL));
    assert_eq!(set(machine.region(1, RAM + PAGE, 17)), Err(Errno::EINVAL), "beyond the file");
    assert_eq!(set(machine.region(1, 1 << 32, 1)), Err(Errno::EINVAL), "the upper half is an alias");
    let readonly = kvm::MemoryRegion2 { flags: 2, ..machine.region(1, 0, 1) };
    assert_eq!(set(readonly), Err(Errno::EINVAL));
    set(machine.region(0, 0, 0)).unwrap();
    assert_eq!(set(machine.region(0, 0, 0)), Err(Errno::EINVAL), "it is gone");
    set(machine.region(3, RAM, 16)).unwrap();
    machine.close(&[], 0);
}

#[test]
fn a_slot_that_cannot_move_stays_where_it_was() {
    let kernel = Fake::new();
    let machine = Machine::new(&kernel, 16);
    let shared = |slot, base| kvm::MemoryRegion2 { flags: 0, ..machine.region(slot, base, 8) };
    let set = |region: kvm::MemoryRegion2| machine.vm(ioctl::SET_USER_MEMORY_REGION2, &region);
    set(shared(1, RAM + 64 * PAGE)).unwrap();
    assert_eq!(set(shared(1, RAM + 8 * PAGE)), Err(Errno::EEXIST));
    assert_eq!(set(shared(2, RAM + 64 * PAGE)), Err(Errno::EEXIST), "slot 1 is still there");
    // To where it overlaps nothing but its own old place.
    set(shared(1, RAM + 60 * PAGE)).unwrap();
    set(shared(2, RAM + 68 * PAGE)).unwrap();
    machine.close(&[], 0);
}

#[test]
fn memory_of_any_size_costs_nothing_until_it_is_used() {
    let kernel = Fake::new();
    let machine = Machine::new(&kernel, 16);
    let size = 1 << 62;
    let create = kvm::CreateGuestMemfd { size, flags: 0, reserved: [0; 6] };
    let gmem = machine.vm(ioctl::CREATE_GUEST_MEMFD, &create).unwrap();
    let FileObject::Gmem(file) = kernel.file(gmem) else { panic!("no guest_memfd") };
    assert_eq!(file.fallocate(3, 0, size), Ok(0));
    assert_eq!(file.fallocate(0, size - PAGE, PAGE), Ok(0));
    assert_eq!(file.fallocate(0, size, PAGE), Err(Errno::EINVAL));
    assert_eq!(kernel.pages(), 2, "the ring and one page");
    drop(file);
    machine.close(&[gmem], 0);
}

#[test]
fn a_vmm_that_is_killed_does_not_finish_long_work_first() {
    let kernel = Fake::new();
    let machine = Machine::new(&kernel, 1024);
    machine.rme(rme::CREATE_RD).unwrap();
    kernel.kill();
    assert_eq!(machine.populate(RAM, 200 * PAGE), Err(Errno::EINTR));
    assert!(kernel.calls_of(fid::DATA_CREATE).len() < 100);
    let FileObject::Gmem(file) = kernel.file(machine.gmem) else { panic!("no guest_memfd") };
    let before = kernel.pages();
    assert_eq!(file.fallocate(0, 512 * PAGE, 512 * PAGE), Err(Errno::EINTR));
    assert_eq!(kernel.pages(), before + 1);
    drop(file);
    machine.close(&[], 0);
}

#[test]
fn a_vgic_is_there_when_its_file_is() {
    let kernel = Fake::new();
    let machine = Machine::new(&kernel, 16);
    let create = kvm::CreateDevice { device_type: kvm::device_type::ARM_VGIC_V3, fd: 0, flags: 0 };
    kernel.refuse_files(true);
    assert_eq!(machine.vm(ioctl::CREATE_DEVICE, &create), Err(Errno::EMFILE));
    kernel.refuse_files(false);
    machine.vm(ioctl::CREATE_DEVICE, &create).unwrap();
    assert_eq!(machine.vm(ioctl::CREATE_DEVICE, &create), Err(Errno::EEXIST));
    kernel.close_all();
    assert_eq!(machine.system.live_vms(), 0);
}

#[test]
fn a_punched_hole_frees_and_a_populated_page_cannot_be_populated_again() {
    let kernel = Fake::new();
    let machine = Machine::new(&kernel, 512);
    machine.rme(rme::CREATE_RD).unwrap();
    let empty = kernel.pages();
    machine.populate(RAM, 8 * PAGE).unwrap();
    assert_eq!(machine.populate(RAM, PAGE), Err(Errno::EEXIST));
    machine.punch(2, 4).unwrap();
    // One of those that remain is a table.
    assert_eq!(kernel.pages(), empty + 4 + 1);
    machine.populate(RAM + 2 * PAGE, 4 * PAGE).unwrap();
    machine.close(&[], 0);
}

#[test]
fn a_page_that_cannot_be_undelegated_is_never_freed() {
    let kernel = Fake::new();
    let machine = Machine::new(&kernel, 512);
    machine.rme(rme::CREATE_RD).unwrap();
    machine.populate(RAM, 4 * PAGE).unwrap();
    kernel.fail(fid::GRANULE_UNDELEGATE, 0, 1);
    assert_eq!(machine.punch(1, 1), Err(Errno::EIO));
    kernel.heal();
    // Its place in the file is not usable any more.
    assert_eq!(machine.populate(RAM + PAGE, PAGE), Err(Errno::EHWPOISON));
    machine.close(&[], 1);
}

#[test]
fn every_failing_command_while_building_loses_nothing() {
    let commands = [
        fid::GRANULE_DELEGATE,
        fid::REALM_CREATE,
        fid::REC_AUX_COUNT,
        fid::RTT_CREATE,
        fid::RTT_INIT_RIPAS,
        fid::DATA_CREATE,
        fid::REC_CREATE,
        fid::REALM_ACTIVATE,
    ];
    for command in commands {
        for after in [0, 1, 2, 3, 5, 8, 13] {
            for x0 in [1, 0x304, 0x204, u64::MAX] {
                let kernel = Fake::new();
                let machine = Machine::new(&kernel, 1024);
                let vcpu = machine.vcpu(0);
                kernel.fail(command, after, x0);
                // Whatever fails, the next step is tried all the same.
                let _ = machine.rme(rme::CREATE_RD);
                let _ = machine.init_ipa(RAM, 700 * PAGE);
                let _ = machine.populate(RAM, 5 * PAGE);
                let _ = machine.finalize(vcpu);
                let _ = machine.rme(rme::ACTIVATE_REALM);
                kernel.heal();
                machine.close(&[vcpu], 0);
            }
        }
    }
}

#[test]
fn an_rmm_that_makes_no_progress_or_contradicts_itself_ends_in_an_error() {
    let kernel = Fake::new();
    let machine = Machine::new(&kernel, 1024);
    machine.rme(rme::CREATE_RD).unwrap();
    // Success without a reached address is an address below the base.
    kernel.fail(fid::RTT_INIT_RIPAS, 0, 0);
    assert_eq!(machine.init_ipa(RAM, 1024 * PAGE), Err(Errno::EIO));
    // A level above the first: there is no table that could help.
    for x0 in [0x104, 0x004, 0xFF04, 0x8004] {
        kernel.heal();
        kernel.fail(fid::RTT_INIT_RIPAS, 0, x0);
        assert_eq!(machine.init_ipa(RAM, 1024 * PAGE), Err(Errno::EIO), "{x0:#x}");
    }
    // "Level 2", although the level 3 table is there.
    kernel.heal();
    machine.populate(RAM, PAGE).unwrap();
    kernel.fail(fid::DATA_CREATE, 0, 0x204);
    assert_eq!(machine.populate(RAM + PAGE, PAGE), Err(Errno::EIO));
    kernel.heal();
    machine.close(&[], 0);
}

#[test]
fn what_the_rmm_keeps_at_teardown_is_counted_and_never_freed() {
    for command in [fid::REC_DESTROY, fid::DATA_DESTROY, fid::RTT_DESTROY, fid::REALM_DESTROY] {
        let kernel = Fake::new();
        let machine = Machine::new(&kernel, 512);
        machine.rme(rme::CREATE_RD).unwrap();
        machine.populate(RAM, 3 * PAGE).unwrap();
        let vcpu = machine.vcpu(0);
        machine.finalize(vcpu).unwrap();
        machine.rme(rme::ACTIVATE_REALM).unwrap();
        kernel.fail(command, 0, 1);
        for fd in [vcpu, machine.vm, machine.gmem] {
            kernel.close(fd);
        }
        let leaked = usize::try_from(machine.system.stats().leaked()).unwrap();
        assert!(leaked > 0);
        assert_eq!(kernel.delegated(), leaked);
        // A run page that the RMM might still write to is kept, too.
        assert!(kernel.pages() - leaked <= 1);
        assert_eq!(machine.system.stats().delegated(), 0);
    }
}

#[test]
fn another_process_may_not_use_the_vm() {
    let kernel = Fake::new();
    let machine = Machine::new(&kernel, 1);
    let vcpu = machine.vcpu(0);
    kernel.be_another_process(true);
    assert_eq!(machine.rme(rme::CREATE_RD), Err(Errno::EIO));
    assert_eq!(kernel.file(vcpu).ioctl(ioctl::RUN, 0), Err(Errno::EIO));
    kernel.be_another_process(false);
    machine.close(&[vcpu], 0);
}

#[test]
fn vm_types_that_are_no_realm_or_too_wide_are_refused() {
    let kernel = Fake::new();
    let system = kernel.system();
    for vm_type in [0, 40, 0x200, 0x121f, kvm::VM_TYPE_REALM | 31, kvm::VM_TYPE_REALM | 49, 1 << 31] {
        assert_eq!(system.ioctl(ioctl::CREATE_VM, vm_type), Err(Errno::EINVAL), "{vm_type:#x}");
    }
    let vm = system.ioctl(ioctl::CREATE_VM, kvm::VM_TYPE_REALM).unwrap();
    kernel.close(vm);
    assert_eq!(system.live_vms(), 0);
}

#[test]
fn registers_of_a_vcpu_can_be_set_as_the_matrix_says() {
    let kernel = Fake::new();
    let machine = Machine::new(&kernel, 1);
    let vcpu = machine.vcpu(0);
    let access = |command, id| machine.on(vcpu, command, &kvm::OneReg { id, addr: USER + 64 });
    let x8 = reg::CORE_X0 + 16;
    for (id, get, set) in [
        (reg::CORE_X0, Ok(0), Ok(0)),
        (reg::CORE_X0 + 14, Ok(0), Ok(0)),
        (reg::CORE_PC, Ok(0), Ok(0)),
        (x8, Err(Errno::EPERM), Err(Errno::EINVAL)),
        (reg::CORE_SP, Err(Errno::EPERM), Err(Errno::EINVAL)),
        (reg::CORE_PSTATE, Err(Errno::EPERM), Err(Errno::EINVAL)),
        (reg::MPIDR_EL1, Ok(0), Err(Errno::EINVAL)),
        (reg::ID_AA64PFR0_EL1, Ok(0), Err(Errno::EINVAL)),
        (reg::ID_AA64DFR0_EL1, Ok(0), Ok(0)),
        (reg::PSCI_VERSION, Err(Errno::ENOENT), Err(Errno::EINVAL)),
        (reg::PMCR_EL0, Err(Errno::ENOENT), Err(Errno::EINVAL)),
    ] {
        assert_eq!(access(ioctl::GET_ONE_REG, id), get, "get {id:#x}");
        // The value is the one that was read last.
        assert_eq!(access(ioctl::SET_ONE_REG, id), set, "set {id:#x}");
    }
    machine.close(&[vcpu], 0);
}

#[test]
fn every_refusal_of_the_rmm_is_in_the_log_with_its_layer_command_and_status_in_words() {
    let steps: [(u64, &str); 10] = [
        (fid::GRANULE_DELEGATE, "RMI_GRANULE_DELEGATE"),
        (fid::REALM_CREATE, "RMI_REALM_CREATE"),
        (fid::REC_AUX_COUNT, "RMI_REC_AUX_COUNT"),
        (fid::RTT_CREATE, "RMI_RTT_CREATE"),
        (fid::RTT_INIT_RIPAS, "RMI_RTT_INIT_RIPAS"),
        (fid::DATA_CREATE, "RMI_DATA_CREATE"),
        (fid::REC_CREATE, "RMI_REC_CREATE"),
        (fid::REALM_ACTIVATE, "RMI_REALM_ACTIVATE"),
        (fid::DATA_DESTROY, "RMI_DATA_DESTROY"),
        (fid::GRANULE_UNDELEGATE, "RMI_GRANULE_UNDELEGATE"),
    ];
    for (command, name) in steps {
        for (x0, words) in
            [(1, "RMI_ERROR_INPUT"), (2, "RMI_ERROR_REALM(0)"), (0x99, "unexpected answer 0x99")]
        {
            let kernel = Fake::new();
            let machine = Machine::new(&kernel, 1024);
            let vcpu = machine.vcpu(0);
            kernel.fail(command, 0, x0);
            let _ = machine.rme(rme::CREATE_RD);
            let _ = machine.init_ipa(RAM, 700 * PAGE);
            let _ = machine.populate(RAM, 2 * PAGE);
            let _ = machine.finalize(vcpu);
            let _ = machine.rme(rme::ACTIVATE_REALM);
            let _ = machine.set_private(RAM, 2, false);
            let log = kernel.take_log();
            let expected = format!("{name}: {words}");
            let found = log.iter().find(|line| line.contains(&expected));
            let found = found.unwrap_or_else(|| panic!("{expected:?} is not in {log:#?}"));
            assert!(found.contains(": rmm: "), "no layer: {found}");
            // However often it is refused.
            for _ in 0..100 {
                let _ = machine.rme(rme::CREATE_RD);
                let _ = machine.populate(RAM, PAGE);
                let _ = machine.rme(rme::ACTIVATE_REALM);
            }
            assert!(log.len() + kernel.take_log().len() <= 10, "one VM fills the log");
            kernel.heal();
            kernel.close_all();
        }
    }
}
