//! The flaws that reviewers found in the kernel series, by their numbers in docs/series.md: what shows without a guest.
//! The others are in the simulated machine's `flaws.rs`.

mod fake;

use cca_abi::kvm::{self, ioctl, reg, rme};
use cca_abi::rmi::fid;
use fake::{Fake, Machine, PAGE, RAM, USER};
use kvm_realm::vgic::{ExitGic, Limits, MAX_LRS, Vgic};
use kvm_realm::{Errno, FileObject};

const ERROR_INPUT: u64 = 1;
/// What RMM 1.0 never answers.
const NONSENSE: u64 = 0x99;

fn realm(kernel: &Fake, pages: u64) -> Machine {
    let machine = Machine::new(kernel, pages);
    machine.rme(rme::CREATE_RD).unwrap();
    machine
}

#[test]
fn flaw_01_taking_memory_away_before_there_is_a_realm_ends_and_calls_no_rmi() {
    let kernel = Fake::new();
    let machine = Machine::new(&kernel, 1024);
    let before = kernel.calls();
    for private in [false, true, false] {
        machine.set_private(RAM, 1024, private).unwrap();
        machine.punch(0, 1024).unwrap();
    }
    assert_eq!(kernel.calls(), before);
    machine.close(&[], 0);
}

#[test]
fn flaw_01_an_rmm_that_answers_nonsense_is_an_error_and_not_a_loop() {
    let kernel = Fake::new();
    let machine = realm(&kernel, 16);
    machine.populate(RAM, 16 * PAGE).unwrap();
    for fid in [fid::DATA_DESTROY, fid::RTT_INIT_RIPAS] {
        kernel.fail(fid, 0, NONSENSE);
    }
    assert_eq!(machine.init_ipa(RAM, 16 * PAGE), Err(Errno::EIO));
    assert_eq!(machine.set_private(RAM, 16, false), Err(Errno::EIO));
    kernel.heal();
    machine.close(&[], 16);
}

#[test]
fn flaw_05_populate_maps_what_was_asked_for_and_not_the_block_around_it() {
    let kernel = Fake::new();
    let machine = realm(&kernel, 1024);
    machine.populate(RAM + 7 * PAGE, 3 * PAGE).unwrap();
    let mut pages: Vec<u64> = kernel.calls_of(fid::DATA_CREATE).iter().map(|call| call[2]).collect();
    pages.dedup();
    assert_eq!(pages, [RAM + 7 * PAGE, RAM + 8 * PAGE, RAM + 9 * PAGE]);
    machine.close(&[], 0);
}

#[test]
fn flaw_06_a_change_of_attributes_that_fails_says_so() {
    let kernel = Fake::new();
    let machine = realm(&kernel, 4);
    machine.populate(RAM, 4 * PAGE).unwrap();
    kernel.fail(fid::DATA_DESTROY, 2, ERROR_INPUT);
    assert_eq!(machine.set_private(RAM, 4, false), Err(Errno::EIO));
    kernel.heal();
    machine.close(&[], 2);
}

#[test]
fn flaw_07_vmids_are_as_wide_as_the_hosts_and_refusals_can_be_told_apart() {
    let kernel = Fake::new();
    // The host has 8 bits, and number 0 is not used.
    let system = kernel.system();
    let machines: Vec<Machine> = (0..255).map(|_| Machine::new_small(&kernel, &system)).collect();
    for machine in &machines {
        machine.rme(rme::CREATE_RD).unwrap();
    }
    let one_more = Machine::new_small(&kernel, &system);
    assert_eq!(one_more.rme(rme::CREATE_RD), Err(Errno::ENOSPC));
    for (x0, errno) in [(1, Errno::ENXIO), (2, Errno::EBUSY), (3, Errno::EAGAIN), (4, Errno::EEXIST)] {
        let kernel = Fake::new();
        let machine = Machine::new(&kernel, 1);
        kernel.fail(fid::REALM_CREATE, 0, x0);
        assert_eq!(machine.rme(rme::CREATE_RD), Err(errno));
        kernel.heal();
        machine.close(&[], 0);
    }
    kernel.close_all();
}

#[test]
fn flaw_09_a_realm_without_a_count_of_auxiliary_granules_is_an_error_and_is_undone() {
    let kernel = Fake::new();
    for answer in [ERROR_INPUT, NONSENSE] {
        let machine = Machine::new(&kernel, 1);
        kernel.fail(fid::REC_AUX_COUNT, 0, answer);
        assert_eq!(machine.rme(rme::CREATE_RD), Err(Errno::ENXIO));
        kernel.heal();
        assert_eq!(kernel.delegated(), 0);
        machine.rme(rme::CREATE_RD).unwrap();
        machine.close(&[], 0);
    }
}

#[test]
fn flaw_10_a_granule_that_the_rmm_keeps_is_never_freed() {
    let kernel = Fake::new();
    let machine = Machine::new(&kernel, 1);
    kernel.fail(fid::REALM_CREATE, 0, ERROR_INPUT);
    kernel.fail(fid::GRANULE_UNDELEGATE, 0, ERROR_INPUT);
    assert_eq!(machine.rme(rme::CREATE_RD), Err(Errno::ENXIO));
    kernel.heal();
    // RD and eight start-level tables. The fake kernel panics when one of them is freed.
    machine.close(&[], 9);
}

#[test]
fn flaw_13_a_table_that_the_rmm_refuses_is_given_back() {
    let kernel = Fake::new();
    let machine = realm(&kernel, 1);
    let before = (kernel.delegated(), kernel.pages());
    kernel.fail(fid::RTT_CREATE, 0, 0x204);
    assert_eq!(machine.populate(RAM, PAGE), Err(Errno::EEXIST));
    kernel.heal();
    assert_eq!((kernel.delegated(), kernel.pages()), before);
    machine.close(&[], 0);
}

#[test]
fn flaw_14_long_walks_let_others_run() {
    let kernel = Fake::new();
    let machine = realm(&kernel, 1024);
    machine.populate(RAM, 1024 * PAGE).unwrap();
    let before = kernel.rescheduled();
    machine.set_private(RAM, 1024, false).unwrap();
    assert!(kernel.rescheduled() - before >= 1024 / 64, "unmapping");
    machine.set_private(RAM, 1024, true).unwrap();
    machine.populate(RAM, 1024 * PAGE).unwrap();
    let before = kernel.rescheduled();
    machine.close(&[], 0);
    assert!(kernel.rescheduled() - before >= 1024 / 64, "teardown");
}

#[test]
fn flaw_15_a_page_that_the_realm_has_is_never_touched_by_the_host() {
    let kernel = Fake::new();
    let machine = realm(&kernel, 4);
    machine.populate(RAM, 4 * PAGE).unwrap();
    // The fake kernel panics when the host writes to a delegated page.
    assert_eq!(machine.populate(RAM + PAGE, PAGE), Err(Errno::EEXIST));
    let FileObject::Gmem(gmem) = kernel.file(machine.gmem) else { panic!("no guest_memfd") };
    assert_eq!(gmem.fallocate(0, 0, 4 * PAGE), Ok(0));
    drop(gmem);
    machine.close(&[], 0);
}

#[test]
fn flaw_20_an_interrupt_below_the_priority_mask_does_not_end_wfi() {
    let gic = Vgic::<spin::Mutex<()>>::new(Limits { ipa_bits: 40 });
    gic.set_attr(0, 2, 0x3FFF_0000).unwrap();
    gic.set_attr(0, 3, 0x3F00_0000).unwrap();
    gic.vcpu_added(0).unwrap();
    gic.start().unwrap();
    gic.mmio_write(0x3FFF_0000, 4, 3).unwrap();
    // PPI 27: enabled, priority 0x80.
    let frame = 0x3F01_0000;
    gic.mmio_write(frame + 0x400 + 27, 1, 0x80).unwrap();
    gic.mmio_write(frame + 0x100, 4, 1 << 27).unwrap();
    gic.set_ppi(0, 27, true).unwrap();
    let leave = |mask: u64| {
        gic.flush(0, 4);
        gic.sync(0, &ExitGic { hcr: 0, lrs: [1 << 62 | 27; MAX_LRS], misr: 0, vmcr: mask << 24 | 3 });
        gic.has_pending(0)
    };
    assert!(!leave(0x80), "masked");
    assert!(leave(0x88));
}

#[test]
fn flaw_22_recs_are_made_in_ascending_order_whatever_the_order_of_finalize() {
    let kernel = Fake::new();
    let machine = realm(&kernel, 1);
    let vcpus: Vec<i64> = [3, 1, 0, 2].into_iter().map(|id| machine.vcpu(id)).collect();
    for vcpu in &vcpus {
        machine.finalize(*vcpu).unwrap();
    }
    machine.rme(rme::ACTIVATE_REALM).unwrap();
    assert_eq!(kernel.mpidrs(), [0, 1, 2, 3]);
    machine.close(&vcpus, 0);
}

#[test]
fn flaw_25_empty_and_wrapping_ranges_are_refused() {
    let kernel = Fake::new();
    let machine = realm(&kernel, 4);
    let wraps = 0u64.wrapping_sub(PAGE);
    for (base, size) in [(RAM, 0), (RAM, wraps), (wraps, 2 * PAGE), (RAM + 1, PAGE), (RAM, 100)] {
        assert_eq!(machine.populate(base, size), Err(Errno::EINVAL), "{base:#x} {size:#x}");
        assert_eq!(machine.init_ipa(base, size), Err(Errno::EINVAL), "{base:#x} {size:#x}");
    }
    assert_eq!(machine.populate(RAM, 5 * PAGE), Err(Errno::EINVAL), "beyond the slot");
    machine.close(&[], 0);
}

#[test]
fn flaw_25_what_was_delegated_before_a_failure_comes_back() {
    let kernel = Fake::new();
    for after in 0..9 {
        let machine = Machine::new(&kernel, 1);
        kernel.fail(fid::GRANULE_DELEGATE, after, ERROR_INPUT);
        assert_eq!(machine.rme(rme::CREATE_RD), Err(Errno::ENXIO));
        kernel.heal();
        machine.close(&[], 0);
    }
}

#[test]
fn flaw_26_contiguous_memory_is_asked_for_in_small_pieces_only() {
    for bits in 32..=48 {
        let kernel = Fake::new();
        let system = kernel.system();
        let vm = system.ioctl(ioctl::CREATE_VM, kvm::VM_TYPE_REALM | bits).unwrap();
        let create = kvm::EnableCap { cap: 300, flags: 0, args: [rme::CREATE_RD, 0, 0, 0], pad: [0; 64] };
        kernel.file(vm).ioctl(ioctl::ENABLE_CAP, kernel.user(&create)).unwrap();
        let largest = kernel.largest_allocation();
        assert!(largest <= 16 && largest.is_power_of_two(), "{bits} bits: {largest} pages at once");
        kernel.close_all();
    }
}

#[test]
fn flaw_26_an_answer_that_rmm_1_0_does_not_know_is_a_refusal_whatever_the_command() {
    // What later RMMs answer when a command has not ended (RMI_INCOMPLETE with an operation's handle), and other
    // things that RMM 1.0 never says. None may be taken for success, and none asked for again and again.
    for x0 in [5, 6, 7, 0x0105, 1 << 16, 1 << 63, u64::MAX] {
        for command in [
            fid::GRANULE_DELEGATE,
            fid::REALM_CREATE,
            fid::RTT_CREATE,
            fid::RTT_INIT_RIPAS,
            fid::DATA_CREATE,
            fid::REC_CREATE,
            fid::REALM_ACTIVATE,
        ] {
            let kernel = Fake::new();
            let machine = Machine::new(&kernel, 16);
            let vcpu = machine.vcpu(0);
            kernel.fail(command, 0, x0);
            let mut steps = vec![machine.rme(rme::CREATE_RD)];
            steps.push(machine.init_ipa(RAM, 16 * PAGE));
            steps.push(machine.populate(RAM, 2 * PAGE));
            let _ = machine.finalize(vcpu);
            steps.push(machine.rme(rme::ACTIVATE_REALM));
            assert!(steps.contains(&Err(Errno::EIO)), "{command:#x} with {x0:#x}: {steps:?}");
            assert!(kernel.calls_of(command).len() <= 4, "{command:#x} was called again and again");
            kernel.heal();
            machine.close(&[vcpu], 0);
        }
    }
}

#[test]
fn flaw_27_initialising_a_populated_page_is_refused_and_ends() {
    let kernel = Fake::new();
    let machine = realm(&kernel, 4);
    machine.populate(RAM, PAGE).unwrap();
    kernel.fail(fid::RTT_INIT_RIPAS, 0, 0x304);
    assert_eq!(machine.init_ipa(RAM, 4 * PAGE), Err(Errno::EEXIST));
    kernel.heal();
    machine.close(&[], 0);
}

#[test]
fn flaw_28_a_lost_page_stays_lost_in_the_file_and_no_reference_is_played_with() {
    let kernel = Fake::new();
    let machine = realm(&kernel, 4);
    machine.populate(RAM, 4 * PAGE).unwrap();
    kernel.fail(fid::GRANULE_UNDELEGATE, 0, ERROR_INPUT);
    assert_eq!(machine.punch(1, 1), Err(Errno::EIO));
    kernel.heal();
    // Its place is not given another page.
    assert_eq!(machine.populate(RAM + PAGE, PAGE), Err(Errno::EHWPOISON));
    assert_eq!(machine.punch(1, 1), Ok(0));
    machine.close(&[], 1);
}

#[test]
fn flaw_29a_a_second_finalize_is_refused() {
    let kernel = Fake::new();
    let machine = realm(&kernel, 1);
    let vcpu = machine.vcpu(0);
    machine.finalize(vcpu).unwrap();
    assert_eq!(machine.finalize(vcpu), Err(Errno::EPERM));
    machine.rme(rme::ACTIVATE_REALM).unwrap();
    assert_eq!(machine.finalize(vcpu), Err(Errno::ENOENT));
    assert_eq!(kernel.calls_of(fid::REC_CREATE).len(), 1);
    machine.close(&[vcpu], 0);
}

#[test]
fn flaw_29b_psci_complete_wants_two_recs() {
    let kernel = Fake::new();
    let machine = realm(&kernel, 1);
    let vcpus = [machine.vcpu(0), machine.vcpu(1)];
    let complete = |target_mpidr, padding| {
        let args = kvm::RmmPsciComplete { target_mpidr, psci_status: 0, padding };
        machine.on(vcpus[0], kvm::GENERATION_V2.psci_complete, &args)
    };
    machine.finalize(vcpus[0]).unwrap();
    machine.rme(rme::ACTIVATE_REALM).unwrap();
    assert_eq!(complete(1, [0; 3]), Err(Errno::EINVAL), "no REC");
    assert_eq!(complete(7, [0; 3]), Err(Errno::EINVAL), "no vCPU");
    assert_eq!(complete(0, [0, 1, 0]), Err(Errno::EINVAL), "padding");
    assert!(kernel.calls_of(fid::PSCI_COMPLETE).is_empty());
    assert_eq!(complete(0, [0; 3]), Ok(0));
    machine.close(&vcpus, 0);
}

#[test]
fn flaw_29f_reserved_fields_must_be_zero() {
    let kernel = Fake::new();
    let machine = Machine::new(&kernel, 4);
    let mut item = kvm::RmeConfigItem { cfg: rme::CFG_HASH_ALGO, data: [0; 256] };
    item.data[255] = 1;
    assert_eq!(machine.rme_with(rme::CONFIG_REALM, &item), Err(Errno::EINVAL));
    let mut item = kvm::RmeConfigItem { cfg: rme::CFG_RPV, data: [0; 256] };
    item.data[64] = 1;
    assert_eq!(machine.rme_with(rme::CONFIG_REALM, &item), Err(Errno::EINVAL));
    machine.rme(rme::CREATE_RD).unwrap();
    let init = kvm::RmeInitIpa { base: RAM, size: PAGE, reserved: [0, 0, 0, 1] };
    assert_eq!(machine.rme_with(rme::INIT_IPA_REALM, &init), Err(Errno::EINVAL));
    for (flags, reserved) in [(2, [0; 3]), (1, [0, 1, 0])] {
        let args = kvm::RmePopulate { base: RAM, size: PAGE, flags, reserved };
        assert_eq!(machine.rme_with(rme::POPULATE_REALM, &args), Err(Errno::EINVAL));
    }
    let enable = kvm::EnableCap { cap: 300, flags: 1, args: [rme::ACTIVATE_REALM, 0, 0, 0], pad: [0; 64] };
    assert_eq!(machine.vm(ioctl::ENABLE_CAP, &enable), Err(Errno::EINVAL));
    let create = kvm::CreateGuestMemfd { size: PAGE, flags: 0, reserved: [0, 0, 0, 0, 0, 1] };
    assert_eq!(machine.vm(ioctl::CREATE_GUEST_MEMFD, &create), Err(Errno::EINVAL));
    let attributes = kvm::MemoryAttributes { address: RAM, size: PAGE, attributes: 8, flags: 1 };
    assert_eq!(machine.vm(ioctl::SET_MEMORY_ATTRIBUTES, &attributes), Err(Errno::EINVAL));
    assert_eq!(machine.system.ioctl(ioctl::CREATE_VM, kvm::VM_TYPE_REALM | 33 | 1 << 12), Err(Errno::EINVAL));
    let one = kvm::OneReg { id: reg::CORE_PC, addr: USER };
    let vcpu = machine.vcpu(0);
    assert_eq!(machine.on(vcpu, ioctl::SET_ONE_REG, &one), Ok(0));
    machine.close(&[vcpu], 0);
}

/// No register of self-hosted debug is named anywhere on the host's side: what is never loaded cannot be left loaded.
#[test]
fn flaw_24_nothing_on_the_hosts_side_touches_a_debug_register() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let words = [
        "mdscr",
        "dbgbvr",
        "dbgbcr",
        "dbgwvr",
        "dbgwcr",
        "mdcr_el2",
        "oslar",
        "osdlr",
        "debug_load",
        "hw_breakpoint",
    ];
    let mut looked_at = 0;
    let mut folders = vec![root.join("crates/host/src"), root.join("linux/kvm_realm")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let Ok(text) = std::fs::read_to_string(&path) else { continue };
            looked_at += 1;
            let text = text.to_lowercase();
            for word in words {
                assert!(!text.contains(word), "{} names {word}", path.display());
            }
        }
    }
    assert!(looked_at > 60, "only {looked_at} files");
}
