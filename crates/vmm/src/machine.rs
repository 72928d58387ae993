//! A virtual machine, from the device to the point where its CPUs can run.
//!
//! The order of the calls for a Realm is the one that makes its measurement reproducible: all RAM is declared,
//! then contents are populated in ascending order, then the CPUs are created, then the Realm is activated.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use cca_abi::kvm::{TARGET_GENERIC_V8, VM_TYPE_REALM, cap, device_type, reg, vcpu_feature, vgic_attr};

use crate::kvm::{Kvm, Vcpu, Vm};
use crate::layout::{GIC_INTERRUPTS, GICD_BASE, Layout, PMU_PPI, RAM_BASE};
use crate::memory::{GuestView, SharedMemory, punch_hole};
use crate::plan::Plan;
use crate::{Error, Layer, Result};

/// What a Realm is created with. All of it is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RealmOptions {
    /// `rme::HASH_SHA256` or `rme::HASH_SHA512`.
    pub hash: u32,
    /// The personalization value. The only part that is not in the initial measurement, but beside it in the token.
    pub personalization: [u8; 64],
    /// Bits of an SVE vector; without, there is no SVE.
    pub sve_bits: Option<u32>,
    /// Event counters of the PMU; without, there is no PMU.
    pub pmu_counters: Option<u32>,
    /// Hardware breakpoints.
    pub breakpoints: u32,
    /// Hardware watchpoints.
    pub watchpoints: u32,
}

impl Default for RealmOptions {
    /// Breakpoints and watchpoints are those of Arm's own server cores, whatever this machine has: the same flags give
    /// the same measurement everywhere.
    fn default() -> Self {
        Self {
            hash: cca_abi::kvm::rme::HASH_SHA256,
            personalization: [0; 64],
            sve_bits: None,
            pmu_counters: None,
            breakpoints: 6,
            watchpoints: 4,
        }
    }
}

impl RealmOptions {
    /// Refuses what no machine could do.
    pub fn check(&self) -> Result<()> {
        if !(2..=16).contains(&self.breakpoints) || !(2..=16).contains(&self.watchpoints) {
            return Err(Error::vmm("2 to 16 breakpoints and watchpoints are possible"));
        }
        if self.sve_bits.is_some_and(|bits| bits % 128 != 0 || !(128..=2048).contains(&bits)) {
            return Err(Error::vmm("an SVE vector has a multiple of 128 bits, 128 to 2048"));
        }
        if self.pmu_counters.is_some_and(|counters| counters > 31) {
            return Err(Error::vmm("a PMU has at most 31 event counters"));
        }
        Ok(())
    }
}

/// Which kind of machine to build.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A Realm: its RAM is private memory that this process never maps.
    Realm(RealmOptions),
    /// An ordinary virtual machine on the stock KVM device: for debugging, and to see what protection costs.
    Plain,
}

/// Points in a machine's creation that somebody may want to time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// The Realm exists and its RAM is declared.
    Created,
    /// Its first contents are in place.
    Populated,
    /// It can run.
    Activated,
}

/// A machine whose CPUs can run.
#[derive(Debug)]
pub struct Machine {
    // Fields are dropped from top to bottom: CPUs before the machine, the machine before its memory.
    pub(crate) vcpus: Vec<Vcpu>,
    pub(crate) vm: Vm,
    pub(crate) memory: Memory,
    /// Devices may send messages.
    pub(crate) has_its: bool,
}

/// The guest's RAM.
#[derive(Debug)]
pub(crate) struct Memory {
    shared: Arc<SharedMemory>,
    private: Option<OwnedFd>,
    size: u64,
    /// The bit that makes an address a shared one.
    alias: u64,
}

impl Machine {
    /// Builds the machine that `plan` describes.
    pub fn new(device: &Path, kind: Kind, plan: &Plan, on_stage: &dyn Fn(Stage)) -> Result<Self> {
        let layout = &plan.layout;
        let kvm = Kvm::open(device)?;
        if matches!(kind, Kind::Realm(_)) {
            check_device(&kvm, device, layout)?;
        }
        let realm = if kind == Kind::Plain { 0 } else { VM_TYPE_REALM };
        let vm = kvm.create_vm(realm | u64::from(layout.ipa_bits))?;
        let memory = Memory::new(&vm, kind, layout)?;
        for segment in &plan.segments {
            memory.shared.write(segment.address - RAM_BASE, &segment.bytes)?;
        }
        let vcpus = create_cpus(&kvm, &vm, layout, kind)?;
        let has_its = create_gic(&vm, layout)?;

        if let Kind::Realm(options) = kind {
            if options.pmu_counters.is_some() {
                vcpus.iter().try_for_each(Vcpu::start_pmu)?;
            }
            vm.realm_hash(options.hash)?;
            if options.personalization != [0; 64] {
                vm.realm_personalization(&options.personalization)?;
            }
            vm.realm_create()?;
            vm.realm_init_ipa(RAM_BASE, layout.ram_size)?;
            on_stage(Stage::Created);
            for (base, size) in plan.populated()? {
                vm.realm_populate(base, size)?;
                memory.shared.discard(base - RAM_BASE, size)?;
            }
            on_stage(Stage::Populated);
            for vcpu in &vcpus {
                vcpu.finalize_rec()?;
            }
            vm.realm_activate()?;
        } else {
            on_stage(Stage::Created);
            on_stage(Stage::Populated);
        }
        on_stage(Stage::Activated);
        Ok(Self { vcpus, vm, memory, has_its })
    }
}

impl Memory {
    fn new(vm: &Vm, kind: Kind, layout: &Layout) -> Result<Self> {
        let size = layout.ram_size;
        let alias = if kind == Kind::Plain { 0 } else { layout.shared_bit() };
        let shared = Arc::new(SharedMemory::new(size, matches!(kind, Kind::Realm(_)))?);
        let private = match kind {
            Kind::Plain => {
                vm.set_memory(0, RAM_BASE, size, shared.address())?;
                None
            }
            Kind::Realm(_) => {
                let private = vm.create_guest_memfd(size)?;
                vm.set_private_memory(0, RAM_BASE, size, shared.address(), &private)?;
                vm.set_attributes(RAM_BASE, size, true)?;
                Some(private)
            }
        };
        Ok(Self { shared, private, size, alias })
    }

    /// The bit that makes an address a shared one, 0 where there is none.
    pub(crate) fn alias(&self) -> u64 {
        self.alias
    }

    /// What devices see of it.
    pub(crate) fn view(&self) -> GuestView {
        GuestView::new(self.shared.clone(), self.alias)
    }

    /// Does what a guest asked for: turns a range into private or into shared memory, and gives back the other
    /// half's pages. A range outside RAM is the guest's mistake.
    pub(crate) fn convert(&self, vm: &Vm, address: u64, size: u64, private: bool) -> Result<()> {
        let offset = address.checked_sub(RAM_BASE);
        let inside = offset.and_then(|offset| offset.checked_add(size)).is_some_and(|end| end <= self.size);
        let (Some(offset), Some(file), true) = (offset, &self.private, inside) else {
            return Err(Error::new(
                Layer::Guest,
                format!("it used {size:#x} bytes at {address:#x}, where it has no memory"),
            ));
        };
        vm.set_attributes(address, size, private)?;
        self.shared.set_shared(offset, size, !private);
        if private { self.shared.discard(offset, size) } else { punch_hole(file.as_raw_fd(), offset, size) }
    }
}

fn check_device(kvm: &Kvm, device: &Path, layout: &Layout) -> Result<()> {
    let module = |what: String| Err(Error::new(Layer::Module, format!("{} {what}", device.display())));
    if kvm.capability(cca_abi::kvm::GENERATION_V2.cap_arm_rme) <= 0 {
        return module("cannot run Realms (is this the stock KVM device?)".into());
    }
    let limit = u32::try_from(kvm.capability(cap::ARM_VM_IPA_SIZE)).unwrap_or(0);
    if limit != 0 && layout.ipa_bits > limit {
        return module(format!("allows {limit} address bits and this Realm needs {}", layout.ipa_bits));
    }
    Ok(())
}

fn create_cpus(kvm: &Kvm, vm: &Vm, layout: &Layout, kind: Kind) -> Result<Vec<Vcpu>> {
    let target = vm.preferred_target().unwrap_or(TARGET_GENERIC_V8);
    let mut features = 1 << vcpu_feature::PSCI_0_2;
    if kvm.capability(cap::ARM_PTRAUTH_ADDRESS) > 0 && kvm.capability(cap::ARM_PTRAUTH_GENERIC) > 0 {
        features |= 1 << vcpu_feature::PTRAUTH_ADDRESS | 1 << vcpu_feature::PTRAUTH_GENERIC;
    }
    if let Kind::Realm(options) = kind {
        options.check()?;
        for (wanted, capability, feature, what) in [
            (options.sve_bits.is_some(), cap::ARM_SVE, vcpu_feature::SVE, "SVE"),
            (options.pmu_counters.is_some(), cap::ARM_PMU_V3, vcpu_feature::PMU_V3, "a PMU"),
        ] {
            if wanted && kvm.capability(capability) <= 0 {
                return Err(Error::new(Layer::Module, format!("it cannot give a Realm {what}")));
            }
            features |= u32::from(wanted) << feature;
        }
    }
    (0..layout.cpus)
        .map(|index| {
            let vcpu = vm.create_vcpu(index)?;
            vcpu.init(target, if index == 0 { features } else { features | 1 << vcpu_feature::POWER_OFF })?;
            let first = index == 0;
            vcpu.set_register(reg::CORE_X0, if first { layout.dtb } else { 0 })?;
            for n in 1..=3 {
                vcpu.set_register(reg::CORE_X0 + 2 * n, 0)?;
            }
            if first {
                vcpu.set_register(reg::CORE_PC, layout.kernel)?;
            }
            if let Kind::Realm(options) = kind {
                shape_cpu(&vcpu, &options)?;
            }
            Ok(vcpu)
        })
        .collect()
}

/// What of a Realm's parameters hides in its CPUs' registers.
fn shape_cpu(vcpu: &Vcpu, options: &RealmOptions) -> Result<()> {
    let refused = |what: &str, error: Error| {
        Error::new(error.layer(), format!("{what} (see `realm capabilities`): {}", error.what()))
    };
    let with =
        |value: u64, shift: u32, width: u64, field: u64| value & !(width << shift) | (field & width) << shift;
    let id = vcpu.register(reg::ID_AA64DFR0_EL1)?;
    let (bps, wps) = (u64::from(options.breakpoints - 1), u64::from(options.watchpoints - 1));
    let context = (id >> 28 & 0xf).min(bps);
    let wanted = with(with(with(id, 12, 0xf, bps), 20, 0xf, wps), 28, 0xf, context);
    if wanted != id {
        vcpu.set_register(reg::ID_AA64DFR0_EL1, wanted).map_err(|error| {
            refused(&format!("{} breakpoints and {} watchpoints", bps + 1, wps + 1), error)
        })?;
    }
    if let Some(counters) = options.pmu_counters {
        let control = vcpu.register(reg::PMCR_EL0)?;
        vcpu.set_register(reg::PMCR_EL0, with(control, 11, 0x1f, counters.into()))
            .map_err(|error| refused(&format!("a PMU with {counters} counters"), error))?;
        vcpu.set_pmu_interrupt(PMU_PPI)?;
    }
    if let Some(bits) = options.sve_bits {
        vcpu.set_sve(bits / 128).map_err(|error| refused(&format!("vectors of {bits} bits"), error))?;
    }
    Ok(())
}

/// Whether there is an ITS as well.
fn create_gic(vm: &Vm, layout: &Layout) -> Result<bool> {
    let gic = vm.create_device(device_type::ARM_VGIC_V3)?;
    let mut distributor = GICD_BASE;
    gic.set(vgic_attr::GRP_ADDR, vgic_attr::ADDR_DIST, &mut distributor, "placing the GIC's distributor")?;
    let (mut redistributors, _) = layout.redistributors();
    gic.set(
        vgic_attr::GRP_ADDR,
        vgic_attr::ADDR_REDIST,
        &mut redistributors,
        "placing the GIC's redistributors",
    )?;
    // A module that has none does no harm: the guest finds nothing behind the node of its device tree, and devices
    // interrupt by their lines.
    let its = vm.create_device(device_type::ARM_VGIC_ITS).ok();
    let mut frame = layout.its();
    if let Some(its) = &its {
        its.set(vgic_attr::GRP_ADDR, vgic_attr::ADDR_ITS, &mut frame, "placing the ITS")?;
    }
    let mut interrupts = GIC_INTERRUPTS;
    gic.set(vgic_attr::GRP_NR_IRQS, 0, &mut interrupts, "setting the GIC's number of interrupts")?;
    let mut nothing = 0u64;
    gic.set(vgic_attr::GRP_CTRL, vgic_attr::CTRL_INIT, &mut nothing, "initializing the GIC")?;
    if let Some(its) = &its {
        its.set(vgic_attr::GRP_CTRL, vgic_attr::CTRL_INIT, &mut nothing, "initializing the ITS")?;
    }
    Ok(its.is_some())
}
