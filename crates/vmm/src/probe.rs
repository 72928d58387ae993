//! What the device can do, found out by asking it: no Realm is started.

use std::path::Path;

use cca_abi::kvm::{
    CAP_KVM_REALM, TARGET_GENERIC_V8, VM_TYPE_REALM, cap, device_type, reg, rme, vcpu_feature,
};

use crate::kvm::Kvm;
use crate::{Error, Layer, Result};

/// What a Realm on this machine can have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// The module's version.
    pub module: String,
    /// The version of the Linux series whose ABI it speaks.
    pub abi: u32,
    /// The widest guest physical addresses.
    pub ipa_bits: u32,
    /// The most CPUs.
    pub cpus: u32,
    /// Hashes for the measurement.
    pub hashes: Vec<&'static str>,
    /// Lengths of SVE vectors in bits.
    pub sve_bits: Vec<u32>,
    /// Event counters of the PMU.
    pub pmu_counters: Option<u32>,
    /// Hardware breakpoints.
    pub breakpoints: u32,
    /// Hardware watchpoints.
    pub watchpoints: u32,
    /// Pointer authentication.
    pub pointer_authentication: bool,
    /// Interrupts and notifications by file.
    pub eventfds: bool,
    /// Message-signalled interrupts.
    pub its: bool,
}

/// Asks the device.
pub fn probe(device: &Path) -> Result<Capabilities> {
    let kvm = Kvm::open(device)?;
    let positive = |number| u32::try_from(kvm.capability(number)).unwrap_or(0);
    let version = positive(CAP_KVM_REALM);
    if version == 0 {
        return Err(Error::new(Layer::Module, format!("{} is not kvm-realm's", device.display())));
    }
    let ipa_bits = positive(cap::ARM_VM_IPA_SIZE);
    let (sve, pmu) = (positive(cap::ARM_SVE) > 0, positive(cap::ARM_PMU_V3) > 0);
    let vm = kvm.create_vm(VM_TYPE_REALM | u64::from(ipa_bits.min(40)))?;
    let hashes = [(rme::HASH_SHA256, "sha256"), (rme::HASH_SHA512, "sha512")]
        .into_iter()
        .filter(|(hash, _)| vm.realm_hash(*hash).is_ok())
        .map(|(_, name)| name)
        .collect();
    let vcpu = vm.create_vcpu(0)?;
    let features = 1 << vcpu_feature::PSCI_0_2
        | u32::from(sve) << vcpu_feature::SVE
        | u32::from(pmu) << vcpu_feature::PMU_V3;
    vcpu.init(vm.preferred_target().unwrap_or(TARGET_GENERIC_V8), features)?;
    let debug = vcpu.register(reg::ID_AA64DFR0_EL1)?;
    let count = |shift: u32| u32::try_from(debug >> shift & 0xf).unwrap_or(0) + 1;
    let lengths = if sve { vcpu.sve_lengths()? } else { 0 };
    let counters = if pmu { Some(vcpu.register(reg::PMCR_EL0)? >> 11 & 0x1f) } else { None };
    Ok(Capabilities {
        module: format!("{}.{}.{}", version >> 16 & 0xff, version >> 8 & 0xff, version & 0xff),
        abi: version >> 24,
        ipa_bits,
        cpus: positive(cap::MAX_VCPUS),
        hashes,
        sve_bits: (0..16).filter(|bit| lengths >> bit & 1 != 0).map(|bit| (bit + 1) * 128).collect(),
        pmu_counters: counters.and_then(|count| u32::try_from(count).ok()),
        breakpoints: count(12),
        watchpoints: count(20),
        pointer_authentication: positive(cap::ARM_PTRAUTH_ADDRESS) > 0,
        eventfds: positive(cap::IRQFD) > 0 && positive(cap::IOEVENTFD) > 0,
        // An ITS stands in front of a GICv3.
        its: vm
            .create_device(device_type::ARM_VGIC_V3)
            .and_then(|_gic| vm.create_device(device_type::ARM_VGIC_ITS))
            .is_ok(),
    })
}
