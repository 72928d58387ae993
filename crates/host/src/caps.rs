//! `KVM_CHECK_EXTENSION`.

use cca_abi::kvm::{self, cap};

use crate::errno::{Errno, Result};
use crate::kernel::Kernel;
use crate::routing::MAX_ROUTES;
use crate::slots::MAX_SLOTS;
use crate::system::{MODULE_VERSION, System};
use crate::vm::Vm;

const ID_AA64ISAR1_EL1: u16 = 0xC031;
const ID_AA64ISAR2_EL1: u16 = 0xC032;

/// Whether the CPUs authenticate pointers: any of APA, API with any of GPA, GPI; or APA3 with GPA3.
pub(crate) fn has_pointer_authentication<K: Kernel>(kernel: &K) -> bool {
    let (isar1, isar2) = (kernel.id_register(ID_AA64ISAR1_EL1), kernel.id_register(ID_AA64ISAR2_EL1));
    (isar1 & 0xFF0 != 0 && isar1 & 0xFF00_0000 != 0) || (isar2 & 0xF000 != 0 && isar2 & 0xF00 != 0)
}

/// The value of a capability; the same on the device node and on a VM, except where it depends on what the VM has.
/// Unknown ones are 0: everything that a Realm cannot have (dirty logging, migration, debugging, steal time, memory
/// tags, SErrors from the host, AArch32, read-only memory) is simply not listed.
///
/// # Errors
/// `EINVAL` for `KVM_CAP_MSI_DEVID` without a VM, as KVM does.
pub fn check<K: Kernel>(system: &System<K>, vm: Option<&Vm<K>>, number: u64) -> Result {
    let Ok(number) = u32::try_from(number) else { return Ok(0) };
    if number == system.generation().cap_arm_rme {
        return Ok(1);
    }
    Ok(match number {
        cap::IRQCHIP
        | cap::USER_MEMORY
        | cap::MP_STATE
        | cap::COALESCED_MMIO
        | cap::SYNC_MMU
        | cap::DESTROY_MEMORY_REGION_WORKS
        | cap::JOIN_MEMORY_REGIONS_WORKS
        | cap::IRQFD
        | cap::IOEVENTFD
        | cap::INTERNAL_ERROR_DATA
        | cap::VCPU_EVENTS
        | cap::ONE_REG
        | cap::SIGNAL_MSI
        | cap::IRQFD_RESAMPLE
        | cap::ARM_PSCI
        | cap::ARM_SET_DEVICE_ADDR
        | cap::DEVICE_CTRL
        | cap::ENABLE_CAP_VM
        | cap::ARM_PSCI_0_2
        | cap::CHECK_EXTENSION_VM
        | cap::IOEVENTFD_ANY_LENGTH
        | cap::VCPU_ATTRIBUTES
        | cap::IMMEDIATE_EXIT
        | cap::ARM_IRQ_LINE_LAYOUT_2
        | cap::ARM_INJECT_EXT_DABT
        | cap::ARM_SUPPORTED_REG_MASK_RANGES
        | cap::USER_MEMORY2
        | cap::MEMORY_FAULT_INFO
        | cap::GUEST_MEMFD
        | cap::PRE_FAULT_MEMORY => 1,
        cap::MEMORY_ATTRIBUTES => i64::try_from(kvm::MEMORY_ATTRIBUTE_PRIVATE).unwrap_or(0),
        cap::NR_VCPUS => i64::from(system.kernel().online_cpus().min(system.max_vcpus())),
        cap::MAX_VCPUS | cap::MAX_VCPU_ID => i64::from(system.max_vcpus()),
        cap::NR_MEMSLOTS => i64::from(MAX_SLOTS),
        cap::IRQ_ROUTING => i64::from(MAX_ROUTES),
        cap::ARM_VM_IPA_SIZE => i64::from(system.ipa_limit()),
        cap::ARM_SVE => i64::from(system.features().sve()),
        cap::ARM_PMU_V3 => i64::from(system.has_pmu()),
        cap::ARM_PTRAUTH_ADDRESS | cap::ARM_PTRAUTH_GENERIC => {
            i64::from(has_pointer_authentication(system.kernel()))
        }
        cap::MSI_DEVID => match vm {
            Some(vm) => i64::from(vm.irqs.has_its()),
            None => return Err(Errno::EINVAL),
        },
        kvm::CAP_KVM_REALM => i64::from(system.generation().version) << 24 | MODULE_VERSION,
        _ => 0,
    })
}
