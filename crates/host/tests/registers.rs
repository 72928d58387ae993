//! Registers, features and capabilities as user space sees them, and how they become parameters of the Realm.

mod fake;

use cca_abi::kvm::{self, cap, ioctl, reg, rme, smccc_action, vcpu_attr, vcpu_feature, vgic_attr, vm_attr};
use cca_abi::rmi::fid;
use fake::{Fake, Machine, USER};
use kvm_realm::Errno;

const SVE: u32 = 1 << vcpu_feature::SVE;
const PMU: u32 = 1 << vcpu_feature::PMU_V3;
const BUFFER: u64 = USER + 0x2000;

fn get(machine: &Machine, vcpu: i64, id: u64) -> Result<u64, Errno> {
    machine.on(vcpu, ioctl::GET_ONE_REG, &kvm::OneReg { id, addr: BUFFER })?;
    Ok(machine.kernel.read(BUFFER))
}

fn set(machine: &Machine, vcpu: i64, id: u64, value: [u64; 8]) -> Result<i64, Errno> {
    machine.put(BUFFER, &value);
    machine.on(vcpu, ioctl::SET_ONE_REG, &kvm::OneReg { id, addr: BUFFER })
}

fn set_word(machine: &Machine, vcpu: i64, id: u64, value: u64) -> Result<i64, Errno> {
    set(machine, vcpu, id, [value, 0, 0, 0, 0, 0, 0, 0])
}

fn list(machine: &Machine, vcpu: i64) -> Vec<u64> {
    assert_eq!(machine.on(vcpu, ioctl::GET_REG_LIST, &0u64), Err(Errno::E2BIG));
    let count: u64 = machine.kernel.read(USER);
    machine.on(vcpu, ioctl::GET_REG_LIST, &count).unwrap();
    (1..=count).map(|n| machine.kernel.read(USER + 8 * n)).collect()
}

#[test]
fn the_list_has_what_can_be_set_and_nothing_else() {
    let kernel = Fake::new();
    let machine = Machine::new(&kernel, 1);
    let (plain, full) = (machine.vcpu(0), machine.vcpu_with(1, SVE | PMU));
    let common: Vec<u64> =
        (0..8).map(|n| reg::CORE_X0 + 2 * n).chain([reg::CORE_PC, reg::ID_AA64DFR0_EL1]).collect();
    assert_eq!(list(&machine, plain), common);
    let mut more = common.clone();
    more.extend([reg::SVE_VLS, reg::PMCR_EL0]);
    assert_eq!(list(&machine, full), more);
    for id in more {
        if id != reg::SVE_VLS {
            let value = get(&machine, full, id).unwrap();
            assert_eq!(set_word(&machine, full, id, value), Ok(0), "{id:#x}");
        }
    }
    machine.close(&[plain, full], 0);
}

#[test]
fn registers_of_the_guest_are_neither_read_nor_written() {
    let kernel = Fake::new();
    let machine = Machine::new(&kernel, 1);
    let vcpu = machine.vcpu(0);
    for id in [reg::CORE_X0 + 16, reg::CORE_X0 + 60, reg::CORE_SP, reg::CORE_PSTATE] {
        assert_eq!(get(&machine, vcpu, id), Err(Errno::EPERM), "{id:#x}");
        assert_eq!(set_word(&machine, vcpu, id, 0), Err(Errno::EINVAL), "{id:#x}");
    }
    for id in [reg::MPIDR_EL1, reg::ID_AA64PFR0_EL1] {
        assert!(get(&machine, vcpu, id).is_ok());
        assert_eq!(set_word(&machine, vcpu, id, 0), Err(Errno::EINVAL), "{id:#x}");
    }
    for id in [reg::PSCI_VERSION, 0x6030_0000_0013_df19, 0, u64::MAX, reg::SVE_VLS, reg::PMCR_EL0] {
        assert_eq!(get(&machine, vcpu, id), Err(Errno::ENOENT), "{id:#x}");
        assert!(set_word(&machine, vcpu, id, 0).is_err(), "{id:#x}");
    }
    machine.close(&[vcpu], 0);
}

#[test]
fn the_vector_length_becomes_a_parameter_of_the_realm() {
    let kernel = Fake::new();
    let machine = Machine::new(&kernel, 1);
    let vcpu = machine.vcpu_with(0, SVE);
    assert_eq!(get(&machine, vcpu, reg::SVE_VLS), Ok(0b1111), "up to the RMM's 512 bits");
    for wrong in [[0; 8], [0b11_1111, 0, 0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0], [0b1100; 8]] {
        assert_eq!(set(&machine, vcpu, reg::SVE_VLS, wrong), Err(Errno::EINVAL), "{wrong:?}");
    }
    assert_eq!(set_word(&machine, vcpu, reg::SVE_VLS, 0b11), Ok(0));
    // Not finalized: user space may still change its mind.
    assert_eq!(machine.rme(rme::CREATE_RD), Err(Errno::EINVAL));
    assert!(kernel.calls_of(fid::REALM_CREATE).is_empty());
    assert_eq!(machine.on(vcpu, ioctl::ARM_VCPU_FINALIZE, &vcpu_feature::SVE), Ok(0));
    assert_eq!(machine.on(vcpu, ioctl::ARM_VCPU_FINALIZE, &vcpu_feature::SVE), Err(Errno::EPERM));
    assert_eq!(set_word(&machine, vcpu, reg::SVE_VLS, 0b1), Err(Errno::EPERM));
    machine.rme(rme::CREATE_RD).unwrap();
    assert_eq!((kernel.param(0), kernel.param(0x10)), (1 << 1, 1));
    machine.finalize(vcpu).unwrap();
    machine.rme(rme::ACTIVATE_REALM).unwrap();
    machine.close(&[vcpu], 0);
}

#[test]
fn vcpus_with_different_vectors_make_no_realm() {
    let kernel = Fake::new();
    let machine = Machine::new(&kernel, 1);
    let vcpus = [machine.vcpu_with(0, SVE), machine.vcpu_with(1, SVE)];
    set_word(&machine, vcpus[1], reg::SVE_VLS, 1).unwrap();
    for vcpu in vcpus {
        machine.on(vcpu, ioctl::ARM_VCPU_FINALIZE, &vcpu_feature::SVE).unwrap();
    }
    assert_eq!(machine.rme(rme::CREATE_RD), Err(Errno::EINVAL));
    machine.close(&vcpus, 0);

    let machine = Machine::new(&kernel, 1);
    let first = machine.vcpu_with(0, 0);
    machine.rme(rme::CREATE_RD).unwrap();
    assert_eq!(kernel.param(0), 0);
    // One that comes later is like the others, or cannot be part of the Realm.
    let late = machine.vcpu_with(1, SVE);
    machine.on(late, ioctl::ARM_VCPU_FINALIZE, &vcpu_feature::SVE).unwrap();
    assert_eq!(machine.finalize(late), Err(Errno::EINVAL));
    machine.close(&[first, late], 0);
}

#[test]
fn the_number_of_event_counters_becomes_a_parameter_of_the_realm() {
    let kernel = Fake::new();
    let machine = Machine::new(&kernel, 1);
    let vcpu = machine.vcpu_with(0, PMU);
    let counters = |value: u64| value >> 11 & 0x1F;
    assert_eq!(counters(get(&machine, vcpu, reg::PMCR_EL0).unwrap()), 7);
    assert_eq!(set_word(&machine, vcpu, reg::PMCR_EL0, 4 << 11), Ok(0));
    assert_eq!(set_word(&machine, vcpu, reg::PMCR_EL0, 8 << 11), Ok(0), "too many: ignored");
    assert_eq!(counters(get(&machine, vcpu, reg::PMCR_EL0).unwrap()), 4);
    machine.rme(rme::CREATE_RD).unwrap();
    assert_eq!((kernel.param(0), kernel.param(0x28)), (1 << 2, 4));
    assert_eq!(set_word(&machine, vcpu, reg::PMCR_EL0, 3 << 11), Ok(0), "too late: ignored");
    assert_eq!(counters(get(&machine, vcpu, reg::PMCR_EL0).unwrap()), 4);
    let plain = machine.vcpu(1);
    assert_eq!(machine.finalize(plain), Err(Errno::EINVAL), "all vCPUs have a PMU or none");
    machine.close(&[vcpu, plain], 0);
}

#[test]
fn a_pmu_is_set_up_in_order() {
    let kernel = Fake::new();
    let machine = Machine::new(&kernel, 1);
    let vcpu = machine.vcpu_with(0, PMU);
    let attr = |command, attr| {
        let args = kvm::DeviceAttr { flags: 0, group: vcpu_attr::GRP_PMU_V3, attr, addr: BUFFER };
        machine.on(vcpu, command, &args)
    };
    assert_eq!(attr(ioctl::HAS_DEVICE_ATTR, vcpu_attr::PMU_V3_IRQ), Ok(0));
    assert_eq!(attr(ioctl::HAS_DEVICE_ATTR, 2), Err(Errno::ENXIO), "no event filter");
    assert_eq!(attr(ioctl::SET_DEVICE_ATTR, vcpu_attr::PMU_V3_INIT), Err(Errno::ENODEV), "no vGIC");
    let vgic = machine.vgic();
    assert_eq!(attr(ioctl::SET_DEVICE_ATTR, vcpu_attr::PMU_V3_INIT), Err(Errno::ENXIO), "no interrupt");
    machine.put(BUFFER, &40u32);
    assert_eq!(attr(ioctl::SET_DEVICE_ATTR, vcpu_attr::PMU_V3_IRQ), Err(Errno::EINVAL));
    machine.put(BUFFER, &23u32);
    assert_eq!(attr(ioctl::SET_DEVICE_ATTR, vcpu_attr::PMU_V3_IRQ), Ok(0));
    assert_eq!(attr(ioctl::SET_DEVICE_ATTR, vcpu_attr::PMU_V3_IRQ), Err(Errno::EBUSY));
    assert_eq!(attr(ioctl::SET_DEVICE_ATTR, vcpu_attr::PMU_V3_INIT), Ok(0));
    assert_eq!(attr(ioctl::SET_DEVICE_ATTR, vcpu_attr::PMU_V3_INIT), Err(Errno::EBUSY));
    machine.close(&[vcpu, vgic], 0);
}

#[test]
fn breakpoints_and_watchpoints_become_parameters_of_the_realm() {
    let kernel = Fake::new();
    let machine = Machine::new(&kernel, 1);
    let vcpu = machine.vcpu(0);
    let value = get(&machine, vcpu, reg::ID_AA64DFR0_EL1).unwrap();
    assert_eq!((value >> 12 & 0xF, value >> 20 & 0xF), (5, 3), "the RMM's");
    let with = |bps: u64, wps: u64, ctx: u64| {
        value & !(0xF << 12 | 0xF << 20 | 0xF << 28) | bps << 12 | wps << 20 | ctx << 28
    };
    for wrong in [with(6, 3, 1), with(5, 4, 1), with(0, 3, 0), with(5, 0, 1), with(2, 2, 3), value ^ 1 << 40]
    {
        assert_eq!(set_word(&machine, vcpu, reg::ID_AA64DFR0_EL1, wrong), Err(Errno::EINVAL), "{wrong:#x}");
    }
    assert_eq!(set_word(&machine, vcpu, reg::ID_AA64DFR0_EL1, with(2, 1, 1)), Ok(0));
    machine.rme(rme::CREATE_RD).unwrap();
    assert_eq!((kernel.param(0x18), kernel.param(0x20)), (2, 1));
    let now = get(&machine, vcpu, reg::ID_AA64DFR0_EL1).unwrap();
    assert_eq!(set_word(&machine, vcpu, reg::ID_AA64DFR0_EL1, now), Ok(0));
    assert_eq!(set_word(&machine, vcpu, reg::ID_AA64DFR0_EL1, with(3, 1, 1)), Err(Errno::EBUSY));
    machine.close(&[vcpu], 0);
}

#[test]
fn the_writable_masks_name_the_debug_fields_only() {
    let kernel = Fake::new();
    let machine = Machine::new(&kernel, 1);
    let mut range = kvm::RegMaskRange { addr: BUFFER, range: 0, reserved: [0; 13] };
    machine.vm(ioctl::ARM_GET_REG_WRITABLE_MASKS, &range).unwrap();
    let masks: [u64; 192] = machine.kernel.read(BUFFER);
    assert_eq!(masks[40], 0xF << 12 | 0xF << 20 | 0xF << 28);
    assert_eq!(masks.iter().filter(|mask| **mask != 0).count(), 1);
    range.reserved[3] = 1;
    assert_eq!(machine.vm(ioctl::ARM_GET_REG_WRITABLE_MASKS, &range), Err(Errno::EINVAL));
    machine.close(&[], 0);
}

#[test]
fn a_filter_is_set_before_the_first_run() {
    let kernel = Fake::new();
    let machine = Machine::new(&kernel, 1);
    let filter = kvm::SmcccFilter {
        base: 0x8400_0000,
        nr_functions: 0x20,
        action: smccc_action::FWD_TO_USER,
        pad: [0; 15],
    };
    machine.put(BUFFER, &filter);
    let attr =
        kvm::DeviceAttr { flags: 0, group: vm_attr::GRP_SMCCC, attr: vm_attr::SMCCC_FILTER, addr: BUFFER };
    assert_eq!(machine.vm(ioctl::HAS_DEVICE_ATTR, &attr), Ok(0));
    assert_eq!(machine.vm(ioctl::SET_DEVICE_ATTR, &attr), Ok(0));
    assert_eq!(machine.vm(ioctl::SET_DEVICE_ATTR, &attr), Err(Errno::EEXIST));
    let other = kvm::DeviceAttr { attr: 1, ..attr };
    assert_eq!(machine.vm(ioctl::HAS_DEVICE_ATTR, &other), Err(Errno::ENXIO));
    machine.close(&[], 0);
}

#[test]
fn capabilities_are_those_of_the_table_on_both_files() {
    let kernel = Fake::new();
    let machine = Machine::new(&kernel, 1);
    let vm = kernel.file(machine.vm);
    let both = |number: u32| {
        let answers = [
            machine.system.ioctl(ioctl::CHECK_EXTENSION, number.into()),
            vm.ioctl(ioctl::CHECK_EXTENSION, number.into()),
        ];
        assert_eq!(answers[0], answers[1], "capability {number}");
        answers[0].unwrap()
    };
    let ones =
        [0, 3, 14, 15, 16, 21, 30, 32, 36, 40, 41, 70, 77, 82, 87, 88, 89, 98, 102, 105, 122, 126, 127];
    for number in ones.into_iter().chain([136, 170, 174, 178, 230, 231, 232, 234, 236, 300]) {
        assert_eq!(both(number), 1, "capability {number}");
    }
    let zeroes = [
        23, 26, 54, 81, 93, 100, 119, 120, 144, 158, 168, 177, 187, 192, 195, 198, 203, 205, 216, 223, 225,
        227,
    ];
    for number in zeroes.into_iter().chain([228, 229, 235, 239, 240, 243, 244, 249, 250, 251]) {
        assert_eq!(both(number), 0, "capability {number}");
    }
    assert_eq!(both(cap::NR_VCPUS), 4);
    assert_eq!(both(cap::MAX_VCPUS), 15);
    assert_eq!(both(cap::MAX_VCPU_ID), 15);
    assert_eq!(both(cap::NR_MEMSLOTS), 512);
    assert_eq!(both(cap::IRQ_ROUTING), 4096);
    assert_eq!(both(cap::ARM_VM_IPA_SIZE), 48);
    assert_eq!(both(cap::MEMORY_ATTRIBUTES), 8);
    assert_eq!(both(kvm::CAP_KVM_REALM) >> 24, 2);
    assert!(both(kvm::CAP_KVM_REALM) & 0xFF_FFFF != 0);
    // An ITS is a VM's matter.
    let number = u64::from(cap::MSI_DEVID);
    assert_eq!(machine.system.ioctl(ioctl::CHECK_EXTENSION, number), Err(Errno::EINVAL));
    assert_eq!(vm.ioctl(ioctl::CHECK_EXTENSION, number), Ok(0));
    drop(vm);
    machine.close(&[], 0);
}

#[test]
fn every_generation_has_its_numbers() {
    for generation in kvm::GENERATIONS {
        let kernel = Fake::new();
        let system = kernel.system_of(generation);
        let asked = |number: u32| system.ioctl(ioctl::CHECK_EXTENSION, number.into()).unwrap();
        for other in kvm::GENERATIONS {
            let same = other.cap_arm_rme == generation.cap_arm_rme;
            assert_eq!(asked(other.cap_arm_rme), i64::from(same), "{} in {}", other.name, generation.name);
        }
        assert_eq!(asked(kvm::CAP_KVM_REALM) >> 24, i64::from(generation.version));
    }
    for (version, late) in [(2, Errno::EINVAL), (5, Errno::EBUSY)] {
        let kernel = Fake::new();
        let machine = Machine::new_small(&kernel, &kernel.system_of(kvm::Generation::of(version).unwrap()));
        machine.rme(rme::CREATE_RD).unwrap();
        let item = kvm::RmeConfigItem { cfg: rme::CFG_RPV, data: [0; 256] };
        assert_eq!(machine.rme_with(rme::CONFIG_REALM, &item), Err(late), "configured too late, v{version}");
        kernel.close_all();
    }
    assert_eq!(kvm::Generation::of(3).unwrap().name, "v2");
    assert_eq!(kvm::Generation::of(11).unwrap().cap_arm_rme, 244);
    assert_eq!(kvm::Generation::of(12), None);
    assert_eq!(kvm::Generation::of(1), None);
}

#[test]
fn an_interrupt_controller_is_configured_through_its_file() {
    let kernel = Fake::new();
    let machine = Machine::new(&kernel, 1);
    let vcpu = machine.vcpu(0);
    let create = |device_type, flags| {
        machine.vm(ioctl::CREATE_DEVICE, &kvm::CreateDevice { device_type, fd: 0, flags })
    };
    assert_eq!(create(kvm::device_type::ARM_VGIC_V2, 0), Err(Errno::ENODEV));
    assert_eq!(create(kvm::device_type::ARM_VGIC_V3, 1), Ok(0), "only a question");
    let vgic = machine.vgic();
    assert_eq!(create(kvm::device_type::ARM_VGIC_V3, 0), Err(Errno::EEXIST));
    for group in [vgic_attr::GRP_DIST_REGS, vgic_attr::GRP_REDIST_REGS, vgic_attr::GRP_CPU_SYSREGS] {
        let args = kvm::DeviceAttr { flags: 0, group, attr: 0, addr: BUFFER };
        assert_eq!(machine.on(vgic, ioctl::HAS_DEVICE_ATTR, &args), Err(Errno::EOPNOTSUPP));
    }
    let late = kernel.file(machine.vm).ioctl(ioctl::CREATE_VCPU, 1);
    assert_eq!(late, Err(Errno::EBUSY));
    machine.close(&[vcpu, vgic], 0);
}
