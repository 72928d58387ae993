//! A virtual machine, from the device to the point where its CPUs can run.
//!
//! The order of the calls for a Realm is the one that makes its measurement reproducible: all RAM is declared,
//! then contents are populated in ascending order, then the CPUs are created, then the Realm is activated.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use cca_abi::kvm::{TARGET_GENERIC_V8, VM_TYPE_REALM, cap, device_type, reg, vcpu_feature, vgic_attr};

use crate::kvm::{Kvm, Vcpu, Vm};
use crate::layout::{GIC_INTERRUPTS, GICD_BASE, Layout, RAM_BASE};
use crate::memory::{GuestView, SharedMemory, punch_hole};
use crate::plan::Plan;
use crate::{Error, Layer, Result};

/// Which kind of machine to build.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A Realm: its RAM is private memory that this process never maps.
    Realm {
        /// `rme::HASH_SHA256` or `rme::HASH_SHA512`.
        hash: u32,
        /// The personalization value.
        personalization: [u8; 64],
    },
    /// An ordinary virtual machine on the stock KVM device, for tests of everything around a Realm.
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
        if matches!(kind, Kind::Realm { .. }) {
            check_device(&kvm, device, layout)?;
        }
        let realm = if kind == Kind::Plain { 0 } else { VM_TYPE_REALM };
        let vm = kvm.create_vm(realm | u64::from(layout.ipa_bits))?;
        let memory = Memory::new(&vm, kind, layout)?;
        for segment in &plan.segments {
            memory.shared.write(segment.address - RAM_BASE, &segment.bytes)?;
        }
        let vcpus = create_cpus(&kvm, &vm, layout)?;
        create_gic(&vm, layout)?;

        if let Kind::Realm { hash, personalization } = kind {
            vm.realm_hash(hash)?;
            if personalization != [0; 64] {
                vm.realm_personalization(&personalization)?;
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
        Ok(Self { vcpus, vm, memory })
    }
}

impl Memory {
    fn new(vm: &Vm, kind: Kind, layout: &Layout) -> Result<Self> {
        let size = layout.ram_size;
        let alias = if kind == Kind::Plain { 0 } else { layout.shared_bit() };
        let shared = Arc::new(SharedMemory::new(size, matches!(kind, Kind::Realm { .. }))?);
        let private = match kind {
            Kind::Plain => {
                vm.set_memory(0, RAM_BASE, size, shared.address())?;
                None
            }
            Kind::Realm { .. } => {
                let private = vm.create_guest_memfd(size)?;
                vm.set_private_memory(0, RAM_BASE, size, shared.address(), &private)?;
                vm.set_attributes(RAM_BASE, size, true)?;
                Some(private)
            }
        };
        Ok(Self { shared, private, size, alias })
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

fn create_cpus(kvm: &Kvm, vm: &Vm, layout: &Layout) -> Result<Vec<Vcpu>> {
    let target = vm.preferred_target().unwrap_or(TARGET_GENERIC_V8);
    let mut features = 1 << vcpu_feature::PSCI_0_2;
    if kvm.capability(cap::ARM_PTRAUTH_ADDRESS) > 0 && kvm.capability(cap::ARM_PTRAUTH_GENERIC) > 0 {
        features |= 1 << vcpu_feature::PTRAUTH_ADDRESS | 1 << vcpu_feature::PTRAUTH_GENERIC;
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
            Ok(vcpu)
        })
        .collect()
}

fn create_gic(vm: &Vm, layout: &Layout) -> Result<()> {
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
    let its = vm.create_device(device_type::ARM_VGIC_ITS)?;
    let mut frame = layout.its();
    its.set(vgic_attr::GRP_ADDR, vgic_attr::ADDR_ITS, &mut frame, "placing the ITS")?;
    let mut interrupts = GIC_INTERRUPTS;
    gic.set(vgic_attr::GRP_NR_IRQS, 0, &mut interrupts, "setting the GIC's number of interrupts")?;
    let mut nothing = 0u64;
    gic.set(vgic_attr::GRP_CTRL, vgic_attr::CTRL_INIT, &mut nothing, "initializing the GIC")?;
    its.set(vgic_attr::GRP_CTRL, vgic_attr::CTRL_INIT, &mut nothing, "initializing the ITS")
}
