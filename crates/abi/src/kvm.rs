//! VMM ↔ module: the KVM ioctl ABI as far as Realms use it, in the numbers of the CCA series v2..v7.
//!
//! The layouts stayed the same up to v11; a few numbers and the meaning of some returns moved. They are [`Generation`].

use core::mem::offset_of;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Answer of `KVM_GET_API_VERSION`.
pub const API_VERSION: i64 = 12;

/// What moved between generations of the series.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Generation {
    /// The version of the series with which it begins.
    pub version: u32,
    /// For people.
    pub name: &'static str,
    /// `KVM_CAP_ARM_RME`.
    pub cap_arm_rme: u32,
    /// `KVM_ARM_VCPU_REC`: argument of `KVM_ARM_VCPU_FINALIZE`, and feature bit.
    pub vcpu_rec: u32,
    /// `KVM_ARM_VCPU_RMM_PSCI_COMPLETE`.
    pub psci_complete: u32,
    /// `KVM_RUN` fails with `EFAULT` when the Realm uses an address otherwise than its attribute says; otherwise it
    /// returns 0. In both cases the exit is a memory fault.
    pub fault_is_efault: bool,
    /// The same for a RIPAS change.
    pub ripas_is_efault: bool,
    /// A RIPAS change is carried out when the vCPU runs again, so that user space can move memory first; otherwise it
    /// is done when user space hears of it.
    pub ripas_on_next_run: bool,
}

const V2: Generation = Generation {
    version: 2,
    name: "v2",
    cap_arm_rme: 300,
    vcpu_rec: 8,
    psci_complete: 0x4018_aed2,
    fault_is_efault: false,
    ripas_is_efault: false,
    ripas_on_next_run: false,
};
const V5: Generation = Generation { version: 5, name: "v5", fault_is_efault: true, ..V2 };
const V6: Generation = Generation { version: 6, name: "v6", ripas_on_next_run: true, ..V5 };
const V7: Generation = Generation { version: 7, name: "v7", ripas_is_efault: true, ..V6 };
const V8: Generation =
    Generation { version: 8, name: "v8", cap_arm_rme: 240, vcpu_rec: 9, psci_complete: 0x4018_aed6, ..V7 };
const V9: Generation = Generation { version: 9, name: "v9", cap_arm_rme: 243, ..V8 };
const V10: Generation = Generation { version: 10, name: "v10", cap_arm_rme: 244, ..V9 };

/// What the module speaks unless told otherwise.
pub const GENERATION_V2: Generation = V2;

/// All that the module can speak; each goes on until the next begins, the last to v11.
pub const GENERATIONS: [Generation; 7] = [V2, V5, V6, V7, V8, V9, V10];

impl Generation {
    /// The generation of a version of the series, 2 to 11.
    #[must_use]
    pub fn of(version: u32) -> Option<Self> {
        let known = (2..=11).contains(&version);
        GENERATIONS.into_iter().rev().find(|generation| known && generation.version <= version)
    }
}

/// A capability of our own, asked on the device or the VM: the generation in bits 30:24, the module's version in 23:16
/// (major), 15:8 (minor) and 7:0 (patch). 0 from anything that is not kvm-realm.
pub const CAP_KVM_REALM: u32 = 0x4B52_4C4D;

/// ioctl numbers.
pub mod ioctl {
    #![allow(missing_docs)]
    pub const GET_API_VERSION: u32 = 0xae00;
    pub const CREATE_VM: u32 = 0xae01;
    pub const CHECK_EXTENSION: u32 = 0xae03;
    pub const GET_VCPU_MMAP_SIZE: u32 = 0xae04;
    pub const CREATE_VCPU: u32 = 0xae41;
    pub const GET_DIRTY_LOG: u32 = 0x4010_ae42;
    pub const SET_USER_MEMORY_REGION: u32 = 0x4020_ae46;
    pub const SET_USER_MEMORY_REGION2: u32 = 0x40a0_ae49;
    pub const IRQ_LINE: u32 = 0x4008_ae61;
    pub const REGISTER_COALESCED_MMIO: u32 = 0x4010_ae67;
    pub const UNREGISTER_COALESCED_MMIO: u32 = 0x4010_ae68;
    pub const SET_GSI_ROUTING: u32 = 0x4008_ae6a;
    pub const ARM_SET_DEVICE_ADDR: u32 = 0x4010_aeab;
    pub const IRQFD: u32 = 0x4020_ae76;
    pub const IOEVENTFD: u32 = 0x4040_ae79;
    pub const RUN: u32 = 0xae80;
    pub const SET_SIGNAL_MASK: u32 = 0x4004_ae8b;
    pub const GET_MP_STATE: u32 = 0x8004_ae98;
    pub const SET_MP_STATE: u32 = 0x4004_ae99;
    pub const SET_GUEST_DEBUG: u32 = 0x4208_ae9b;
    pub const GET_VCPU_EVENTS: u32 = 0x8040_ae9f;
    pub const SET_VCPU_EVENTS: u32 = 0x4040_aea0;
    pub const ENABLE_CAP: u32 = 0x4068_aea3;
    pub const SIGNAL_MSI: u32 = 0x4020_aea5;
    pub const GET_ONE_REG: u32 = 0x4010_aeab;
    pub const SET_ONE_REG: u32 = 0x4010_aeac;
    pub const ARM_VCPU_INIT: u32 = 0x4020_aeae;
    pub const ARM_PREFERRED_TARGET: u32 = 0x8020_aeaf;
    pub const GET_REG_LIST: u32 = 0xc008_aeb0;
    pub const ARM_GET_REG_WRITABLE_MASKS: u32 = 0x8040_aeb6;
    pub const ARM_VCPU_FINALIZE: u32 = 0x4004_aec2;
    pub const SET_MEMORY_ATTRIBUTES: u32 = 0x4020_aed2;
    pub const CREATE_GUEST_MEMFD: u32 = 0xc040_aed4;
    pub const PRE_FAULT_MEMORY: u32 = 0xc040_aed5;
    pub const CREATE_DEVICE: u32 = 0xc00c_aee0;
    pub const SET_DEVICE_ATTR: u32 = 0x4018_aee1;
    pub const GET_DEVICE_ATTR: u32 = 0x4018_aee2;
    pub const HAS_DEVICE_ATTR: u32 = 0x4018_aee3;
}

/// Capability numbers.
pub mod cap {
    #![allow(missing_docs)]
    pub const IRQCHIP: u32 = 0;
    pub const USER_MEMORY: u32 = 3;
    pub const NR_VCPUS: u32 = 9;
    pub const NR_MEMSLOTS: u32 = 10;
    pub const MP_STATE: u32 = 14;
    pub const COALESCED_MMIO: u32 = 15;
    pub const SYNC_MMU: u32 = 16;
    pub const DESTROY_MEMORY_REGION_WORKS: u32 = 21;
    pub const SET_GUEST_DEBUG: u32 = 23;
    pub const IRQ_ROUTING: u32 = 25;
    pub const IRQ_INJECT_STATUS: u32 = 26;
    pub const JOIN_MEMORY_REGIONS_WORKS: u32 = 30;
    pub const IRQFD: u32 = 32;
    pub const IOEVENTFD: u32 = 36;
    pub const INTERNAL_ERROR_DATA: u32 = 40;
    pub const VCPU_EVENTS: u32 = 41;
    pub const ENABLE_CAP: u32 = 54;
    pub const MAX_VCPUS: u32 = 66;
    pub const ONE_REG: u32 = 70;
    pub const SIGNAL_MSI: u32 = 77;
    pub const READONLY_MEM: u32 = 81;
    pub const IRQFD_RESAMPLE: u32 = 82;
    pub const ARM_PSCI: u32 = 87;
    pub const ARM_SET_DEVICE_ADDR: u32 = 88;
    pub const DEVICE_CTRL: u32 = 89;
    pub const ARM_EL1_32BIT: u32 = 93;
    pub const ENABLE_CAP_VM: u32 = 98;
    pub const ARM_PSCI_0_2: u32 = 102;
    pub const CHECK_EXTENSION_VM: u32 = 105;
    pub const GUEST_DEBUG_HW_BPS: u32 = 119;
    pub const GUEST_DEBUG_HW_WPS: u32 = 120;
    pub const IOEVENTFD_ANY_LENGTH: u32 = 122;
    pub const ARM_PMU_V3: u32 = 126;
    pub const VCPU_ATTRIBUTES: u32 = 127;
    pub const MAX_VCPU_ID: u32 = 128;
    pub const MSI_DEVID: u32 = 131;
    pub const IMMEDIATE_EXIT: u32 = 136;
    pub const ARM_USER_IRQ: u32 = 144;
    pub const ARM_INJECT_SERROR_ESR: u32 = 158;
    pub const ARM_VM_IPA_SIZE: u32 = 165;
    pub const ARM_SVE: u32 = 170;
    pub const ARM_PTRAUTH_ADDRESS: u32 = 171;
    pub const ARM_PTRAUTH_GENERIC: u32 = 172;
    pub const ARM_IRQ_LINE_LAYOUT_2: u32 = 174;
    pub const ARM_NISV_TO_USER: u32 = 177;
    pub const ARM_INJECT_EXT_DABT: u32 = 178;
    pub const STEAL_TIME: u32 = 187;
    pub const ARM_MTE: u32 = 205;
    pub const ARM_SUPPORTED_REG_MASK_RANGES: u32 = 230;
    pub const USER_MEMORY2: u32 = 231;
    pub const MEMORY_FAULT_INFO: u32 = 232;
    pub const MEMORY_ATTRIBUTES: u32 = 233;
    pub const GUEST_MEMFD: u32 = 234;
    pub const PRE_FAULT_MEMORY: u32 = 236;
    pub const ARM_WRITABLE_IMP_ID_REGS: u32 = 239;
}

/// `KVM_CREATE_VM` type: IPA bits.
pub const VM_TYPE_IPA_SIZE_MASK: u64 = 0xff;
/// `KVM_CREATE_VM` type: machine.
pub const VM_TYPE_MASK: u64 = 0xf00;
/// `KVM_CREATE_VM` type: a Realm.
pub const VM_TYPE_REALM: u64 = 0x100;

/// `args[0]` of `KVM_ENABLE_CAP(KVM_CAP_ARM_RME)`.
pub mod rme {
    #![allow(missing_docs)]
    pub const CONFIG_REALM: u64 = 0;
    pub const CREATE_RD: u64 = 1;
    pub const INIT_IPA_REALM: u64 = 2;
    pub const POPULATE_REALM: u64 = 3;
    pub const ACTIVATE_REALM: u64 = 4;

    /// `cfg` of a config item.
    pub const CFG_RPV: u32 = 0;
    pub const CFG_HASH_ALGO: u32 = 1;

    pub const HASH_SHA256: u32 = 0;
    pub const HASH_SHA512: u32 = 1;

    pub const POPULATE_FLAGS_MEASURE: u32 = 1;
}

/// Feature bits of `KVM_ARM_VCPU_INIT`.
pub mod vcpu_feature {
    #![allow(missing_docs)]
    pub const POWER_OFF: u32 = 0;
    pub const EL1_32BIT: u32 = 1;
    pub const PSCI_0_2: u32 = 2;
    pub const PMU_V3: u32 = 3;
    pub const SVE: u32 = 4;
    pub const PTRAUTH_ADDRESS: u32 = 5;
    pub const PTRAUTH_GENERIC: u32 = 6;
    pub const HAS_EL2: u32 = 7;
}

/// `target` of `KVM_ARM_VCPU_INIT`: `KVM_ARM_TARGET_GENERIC_V8`.
pub const TARGET_GENERIC_V8: u32 = 5;

/// `flags` of a memory region: backed by guest_memfd.
pub const MEM_GUEST_MEMFD: u32 = 4;
/// Memory attribute: private.
pub const MEMORY_ATTRIBUTE_PRIVATE: u64 = 1 << 3;

/// `mp_state` values.
pub mod mp_state {
    #![allow(missing_docs)]
    pub const RUNNABLE: u32 = 0;
    pub const STOPPED: u32 = 5;
    pub const SUSPENDED: u32 = 10;
}

/// Device types of `KVM_CREATE_DEVICE`.
pub mod device_type {
    #![allow(missing_docs)]
    pub const ARM_VGIC_V2: u32 = 5;
    pub const ARM_VGIC_V3: u32 = 7;
    pub const ARM_VGIC_ITS: u32 = 8;
    /// `flags`: only ask whether the type exists.
    pub const FLAG_TEST: u32 = 1;
}

/// Groups and attributes of the vGICv3 device.
pub mod vgic_attr {
    #![allow(missing_docs)]
    pub const GRP_ADDR: u32 = 0;
    pub const GRP_DIST_REGS: u32 = 1;
    pub const GRP_NR_IRQS: u32 = 3;
    pub const GRP_CTRL: u32 = 4;
    pub const GRP_REDIST_REGS: u32 = 5;
    pub const GRP_CPU_SYSREGS: u32 = 6;
    pub const GRP_LEVEL_INFO: u32 = 7;
    pub const ADDR_DIST: u64 = 2;
    pub const ADDR_REDIST: u64 = 3;
    pub const ADDR_ITS: u64 = 4;
    pub const ADDR_REDIST_REGION: u64 = 5;
    pub const CTRL_INIT: u64 = 0;
}

/// Groups and attributes of a vCPU.
pub mod vcpu_attr {
    #![allow(missing_docs)]
    pub const GRP_PMU_V3: u32 = 0;
    pub const GRP_TIMER: u32 = 1;
    pub const GRP_PVTIME: u32 = 2;
    pub const TIMER_IRQ_VTIMER: u64 = 0;
    pub const TIMER_IRQ_PTIMER: u64 = 1;
    pub const PMU_V3_IRQ: u64 = 0;
    pub const PMU_V3_INIT: u64 = 1;
}

/// Groups and attributes of a VM.
pub mod vm_attr {
    #![allow(missing_docs)]
    pub const GRP_SMCCC: u32 = 0;
    pub const SMCCC_FILTER: u64 = 0;
}

/// `action` of an SMCCC filter.
pub mod smccc_action {
    #![allow(missing_docs)]
    pub const HANDLE: u8 = 0;
    pub const DENY: u8 = 1;
    pub const FWD_TO_USER: u8 = 2;
}

/// Register identifiers of `KVM_{GET,SET}_ONE_REG`.
pub mod reg {
    #![allow(missing_docs)]
    /// `x0`; `xn` is `CORE_X0 + 2 n`.
    pub const CORE_X0: u64 = 0x6030_0000_0010_0000;
    pub const CORE_SP: u64 = 0x6030_0000_0010_003e;
    pub const CORE_PC: u64 = 0x6030_0000_0010_0040;
    pub const CORE_PSTATE: u64 = 0x6030_0000_0010_0042;
    pub const MPIDR_EL1: u64 = 0x6030_0000_0013_c005;
    pub const ID_AA64PFR0_EL1: u64 = 0x6030_0000_0013_c020;
    pub const ID_AA64DFR0_EL1: u64 = 0x6030_0000_0013_c028;
    pub const ID_AA64MMFR0_EL1: u64 = 0x6030_0000_0013_c038;
    pub const PMCR_EL0: u64 = 0x6030_0000_0013_dce0;
    pub const SVE_VLS: u64 = 0x6060_0000_0015_ffff;
    pub const PSCI_VERSION: u64 = 0x6030_0000_0014_0000;
    /// The mask that makes any id of a system register: op0 op1 CRn CRm op2 in the low 16 bits.
    pub const SYSREG: u64 = 0x6030_0000_0013_0000;
}

/// `exit_reason` values.
pub mod exit {
    #![allow(missing_docs)]
    pub const UNKNOWN: u32 = 0;
    pub const HYPERCALL: u32 = 3;
    pub const MMIO: u32 = 6;
    pub const SHUTDOWN: u32 = 8;
    pub const FAIL_ENTRY: u32 = 9;
    pub const INTR: u32 = 10;
    pub const INTERNAL_ERROR: u32 = 17;
    pub const SYSTEM_EVENT: u32 = 24;
    pub const ARM_NISV: u32 = 28;
    pub const MEMORY_FAULT: u32 = 39;

    pub const SYSTEM_EVENT_SHUTDOWN: u32 = 1;
    pub const SYSTEM_EVENT_RESET: u32 = 2;
    pub const SYSTEM_EVENT_CRASH: u32 = 3;

    /// `flags` of a memory fault: the access was to private memory.
    pub const MEMORY_FAULT_PRIVATE: u64 = 1 << 3;
    /// `flags` of a hypercall: the guest used SMC.
    pub const HYPERCALL_SMC: u64 = 1;
}

/// Offsets in `struct kvm_run`, the page shared with user space.
pub mod run {
    #![allow(missing_docs)]
    /// Answer of `KVM_GET_VCPU_MMAP_SIZE`: the run page and the coalesced ring.
    pub const MMAP_SIZE: usize = 8192;
    pub const IMMEDIATE_EXIT: usize = 1;
    pub const EXIT_REASON: usize = 8;
    pub const MMIO_PHYS_ADDR: usize = 32;
    pub const MMIO_DATA: usize = 40;
    pub const MMIO_LEN: usize = 48;
    pub const MMIO_IS_WRITE: usize = 52;
    pub const SYSTEM_EVENT_TYPE: usize = 32;
    pub const SYSTEM_EVENT_NDATA: usize = 36;
    pub const SYSTEM_EVENT_DATA: usize = 40;
    pub const MEMORY_FAULT_FLAGS: usize = 32;
    pub const MEMORY_FAULT_GPA: usize = 40;
    pub const MEMORY_FAULT_SIZE: usize = 48;
    pub const INTERNAL_SUBERROR: usize = 32;
    pub const INTERNAL_NDATA: usize = 36;
    pub const INTERNAL_DATA: usize = 40;
    pub const FAIL_ENTRY_REASON: usize = 32;
    pub const HYPERCALL_NR: usize = 32;
    pub const HYPERCALL_ARGS: usize = 40;
    pub const HYPERCALL_RET: usize = 88;
    pub const HYPERCALL_FLAGS: usize = 96;
    /// In the second page: the ring's consumer and producer indices, then its entries.
    pub const RING_FIRST: usize = 0;
    pub const RING_LAST: usize = 4;
    pub const RING_ENTRIES: usize = 8;
    /// Bytes of an entry: address u64, length u32, padding, data [u8; 8].
    pub const RING_ENTRY: usize = 24;
    /// Entries in the ring.
    pub const RING_LEN: u32 = 170;
}

macro_rules! abi_struct {
    ($(#[$doc:meta])* $name:ident, $size:expr, { $($field:ident : $ty:ty = $offset:expr),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
        #[repr(C)]
        #[allow(missing_docs)]
        pub struct $name { $(pub $field: $ty),* }
        const _: () = {
            assert!(size_of::<$name>() == $size);
            $(assert!(offset_of!($name, $field) == $offset);)*
        };
    };
}

abi_struct! {
    /// `struct kvm_enable_cap`.
    EnableCap, 104, { cap: u32 = 0, flags: u32 = 4, args: [u64; 4] = 8, pad: [u8; 64] = 40 }
}
abi_struct! {
    /// `struct kvm_cap_arm_rme_config_item`.
    RmeConfigItem, 260, { cfg: u32 = 0, data: [u8; 256] = 4 }
}
abi_struct! {
    /// `struct kvm_cap_arm_rme_populate_realm_args`.
    RmePopulate, 32, { base: u64 = 0, size: u64 = 8, flags: u32 = 16, reserved: [u32; 3] = 20 }
}
abi_struct! {
    /// `struct kvm_cap_arm_rme_init_ipa_args`.
    RmeInitIpa, 32, { base: u64 = 0, size: u64 = 8, reserved: [u32; 4] = 16 }
}
abi_struct! {
    /// `struct kvm_arm_rmm_psci_complete`.
    RmmPsciComplete, 24, { target_mpidr: u64 = 0, psci_status: u32 = 8, padding: [u32; 3] = 12 }
}
abi_struct! {
    /// `struct kvm_pre_fault_memory`.
    PreFaultMemory, 64, { gpa: u64 = 0, size: u64 = 8, flags: u64 = 16, padding: [u64; 5] = 24 }
}
abi_struct! {
    /// `struct kvm_userspace_memory_region`.
    MemoryRegion, 32, {
        slot: u32 = 0, flags: u32 = 4, guest_phys_addr: u64 = 8, memory_size: u64 = 16, userspace_addr: u64 = 24,
    }
}
abi_struct! {
    /// `struct kvm_userspace_memory_region2`.
    MemoryRegion2, 160, {
        slot: u32 = 0, flags: u32 = 4, guest_phys_addr: u64 = 8, memory_size: u64 = 16, userspace_addr: u64 = 24,
        guest_memfd_offset: u64 = 32, guest_memfd: u32 = 40, pad1: u32 = 44, pad2: [u64; 14] = 48,
    }
}
abi_struct! {
    /// `struct kvm_create_guest_memfd`.
    CreateGuestMemfd, 64, { size: u64 = 0, flags: u64 = 8, reserved: [u64; 6] = 16 }
}
abi_struct! {
    /// `struct kvm_memory_attributes`.
    MemoryAttributes, 32, { address: u64 = 0, size: u64 = 8, attributes: u64 = 16, flags: u64 = 24 }
}
abi_struct! {
    /// `struct kvm_create_device`.
    CreateDevice, 12, { device_type: u32 = 0, fd: u32 = 4, flags: u32 = 8 }
}
abi_struct! {
    /// `struct kvm_device_attr`.
    DeviceAttr, 24, { flags: u32 = 0, group: u32 = 4, attr: u64 = 8, addr: u64 = 16 }
}
abi_struct! {
    /// `struct kvm_vcpu_init`.
    VcpuInit, 32, { target: u32 = 0, features: [u32; 7] = 4 }
}
abi_struct! {
    /// `struct kvm_one_reg`.
    OneReg, 16, { id: u64 = 0, addr: u64 = 8 }
}
abi_struct! {
    /// `struct kvm_irq_level`.
    IrqLevel, 8, { irq: u32 = 0, level: u32 = 4 }
}
abi_struct! {
    /// `struct kvm_vcpu_events` of arm64.
    VcpuEvents, 64, {
        serror_pending: u8 = 0, serror_has_esr: u8 = 1, ext_dabt_pending: u8 = 2, pad: [u8; 5] = 3,
        serror_esr: u64 = 8, reserved: [u32; 12] = 16,
    }
}
abi_struct! {
    /// `struct kvm_smccc_filter`.
    SmcccFilter, 24, { base: u32 = 0, nr_functions: u32 = 4, action: u8 = 8, pad: [u8; 15] = 9 }
}
abi_struct! {
    /// `struct reg_mask_range`.
    RegMaskRange, 64, { addr: u64 = 0, range: u32 = 8, reserved: [u32; 13] = 12 }
}
abi_struct! {
    /// `struct kvm_irqfd`.
    Irqfd, 32, { fd: u32 = 0, gsi: u32 = 4, flags: u32 = 8, resamplefd: u32 = 12, pad: [u8; 16] = 16 }
}
abi_struct! {
    /// `struct kvm_ioeventfd`.
    Ioeventfd, 64, {
        datamatch: u64 = 0, addr: u64 = 8, len: u32 = 16, fd: i32 = 20, flags: u32 = 24, pad: [u8; 36] = 28,
    }
}
abi_struct! {
    /// `struct kvm_msi`.
    Msi, 32, {
        address_lo: u32 = 0, address_hi: u32 = 4, data: u32 = 8, flags: u32 = 12, devid: u32 = 16,
        pad: [u8; 12] = 20,
    }
}
abi_struct! {
    /// `struct kvm_irq_routing`, without its entries.
    IrqRouting, 8, { nr: u32 = 0, flags: u32 = 4 }
}
abi_struct! {
    /// `struct kvm_irq_routing_entry`.
    IrqRoutingEntry, 48, { gsi: u32 = 0, kind: u32 = 4, flags: u32 = 8, pad: u32 = 12, u: [u32; 8] = 16 }
}
abi_struct! {
    /// `struct kvm_coalesced_mmio_zone`.
    CoalescedZone, 16, { addr: u64 = 0, size: u32 = 8, pio: u32 = 12 }
}

/// Flags and kinds of `KVM_IRQFD`, `KVM_IOEVENTFD` and `KVM_SET_GSI_ROUTING`.
pub mod event {
    #![allow(missing_docs)]
    pub const IRQFD_DEASSIGN: u32 = 1;
    pub const IRQFD_RESAMPLE: u32 = 2;
    pub const IOEVENTFD_DATAMATCH: u32 = 1;
    pub const IOEVENTFD_PIO: u32 = 2;
    pub const IOEVENTFD_DEASSIGN: u32 = 4;
    pub const ROUTING_IRQCHIP: u32 = 1;
    pub const ROUTING_MSI: u32 = 2;
    pub const MSI_VALID_DEVID: u32 = 1;
}
