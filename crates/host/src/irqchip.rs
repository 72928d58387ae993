//! The VM's interrupts: [`crate::vgic`], this VM's vCPUs, and the numbers by which user space names interrupts, brought
//! together. Everything that may come from an eventfd's waker works in any context.

use alloc::sync::Arc;
use alloc::vec::Vec;

use cca_abi::kvm::{self, event};
use spin::Once;

use crate::errno::{Errno, Result};
use crate::kernel::{Kernel, reserve};
use crate::routing::{FIRST_SPI, Msi};
use crate::vcpu::Vcpu;
use crate::vgic::{AttrError, Its, Limits, Remembered, VcpuSet, Vgic};
use crate::vm::Vm;

impl From<AttrError> for Errno {
    fn from(error: AttrError) -> Self {
        Self::from_raw(error.errno())
    }
}

/// A vGIC whose vCPU numbers are those of the VM's table.
pub(crate) type VmVgic<K> = Vgic<<K as Kernel>::RawSpinLock>;
/// The ITS in front of it.
pub(crate) type VmIts<K> = Its<<K as Kernel>::RawSpinLock, <K as Kernel>::RawMutex>;

/// Interrupts of one VM.
pub struct Irqs<K: Kernel> {
    /// vCPUs in the order of their creation, which is also how the vGIC numbers them.
    pub(crate) vcpus: Vec<Once<Arc<Vcpu<K>>>>,
    pub(crate) vgic: Once<Arc<VmVgic<K>>>,
    pub(crate) its: Once<Arc<VmIts<K>>>,
    shared_bit: u64,
}

impl<K: Kernel> Irqs<K> {
    pub(crate) fn new(max_vcpus: usize, shared_bit: u64) -> Result<Self> {
        let mut vcpus = Vec::new();
        reserve(&mut vcpus, max_vcpus)?;
        vcpus.resize_with(max_vcpus, Once::new);
        Ok(Self { vcpus, vgic: Once::new(), its: Once::new(), shared_bit })
    }

    /// Makes these vCPUs look at their interrupts. Any context.
    pub fn kick(&self, vcpus: &VcpuSet) {
        for index in vcpus.iter() {
            if let Some(vcpu) = self.vcpus.get(index).and_then(Once::get) {
                vcpu.kick();
            }
        }
    }

    /// Whether messages can be delivered.
    pub(crate) fn has_its(&self) -> bool {
        self.its.get().is_some_and(|its| its.address().is_some())
    }

    fn ready(&self) -> Result<&VmVgic<K>> {
        self.vgic.get().filter(|vgic| vgic.is_initialised()).map(AsRef::as_ref).ok_or(Errno::ENXIO)
    }

    /// Drives the line of an SPI. Any context. Nothing happens if there is none.
    pub(crate) fn drive_spi(&self, intid: u32, level: bool) {
        if let Some(kicked) = self.vgic.get().and_then(|vgic| vgic.set_spi(intid, level)) {
            self.kick(&kicked);
        }
    }

    /// Makes an SPI pending once, whatever its trigger. Any context.
    pub(crate) fn pulse_spi(&self, intid: u32) {
        if let Some(kicked) = self.vgic.get().and_then(|vgic| vgic.pulse_spi(intid)) {
            self.kick(&kicked);
        }
    }

    /// Delivers a message, whose sender may remember where it went. Any context. 1 if it became an interrupt, 0 if the guest has not asked for it.
    ///
    /// # Errors
    /// `ENODEV` without an ITS; `EINVAL` if the address is not its doorbell or the device is not named; `EBUSY` while the
    /// guest has it switched off.
    pub(crate) fn message(&self, msi: &Msi, remembered: Option<&Remembered>) -> Result {
        let its = self.its.get().ok_or(Errno::ENODEV)?;
        let vgic = self.ready()?;
        let device = msi.device.ok_or(Errno::EINVAL)?;
        // The guest may have written either alias.
        if !its.owns_doorbell(msi.address & !self.shared_bit) {
            return Err(Errno::EINVAL);
        }
        if !its.is_enabled() {
            return Err(Errno::EBUSY);
        }
        let Some(kicked) = its.signal(vgic, device, msi.data, remembered) else { return Ok(0) };
        self.kick(&kicked);
        Ok(1)
    }
}

const TYPE_SPI: u32 = 1;
const TYPE_PPI: u32 = 2;

impl<K: Kernel> Vm<K> {
    /// A vGIC with all vCPUs that exist. Under the control lock.
    pub(crate) fn new_vgic(&self) -> Result<Arc<VmVgic<K>>> {
        // Frames lie where memory slots do: in the lower half.
        let vgic = Vgic::new(Limits { ipa_bits: self.geometry.ipa_bits - 1 });
        for vcpu in self.vcpus() {
            add_vcpu::<K>(&vgic, vcpu)?;
        }
        Ok(Arc::new(vgic))
    }

    /// `KVM_IRQ_LINE`.
    pub(crate) fn irq_line(&self, line: &kvm::IrqLevel) -> Result {
        let vgic = self.irqs.ready()?;
        let number = line.irq & 0xFFFF;
        let level = line.level != 0;
        let kicked = match (line.irq >> 24) & 0xF {
            TYPE_SPI if number >= FIRST_SPI => vgic.set_spi(number, level),
            TYPE_PPI if (16..32).contains(&number) => {
                let id = (line.irq >> 16) & 0xFF | (line.irq >> 28) << 8;
                let vcpu = self.vcpus().find(|vcpu| vcpu.id == id).ok_or(Errno::EINVAL)?;
                vgic.set_ppi(vcpu.index, number, level)
            }
            TYPE_SPI | TYPE_PPI => None,
            _ => return Err(Errno::ENXIO),
        };
        self.irqs.kick(&kicked.ok_or(Errno::EINVAL)?);
        Ok(0)
    }

    /// `KVM_SIGNAL_MSI`: 1 if it was delivered, 0 if the guest does not listen.
    pub(crate) fn signal_msi(&self, msi: &kvm::Msi) -> Result {
        if msi.flags & !event::MSI_VALID_DEVID != 0 || self.vgic().is_none() {
            return Err(Errno::EINVAL);
        }
        let msi = Msi::new(msi.address_lo, msi.address_hi, msi.data, msi.flags, msi.devid);
        self.irqs.message(&msi, None)
    }
}

/// Adds the vCPU that was created last.
pub(crate) fn add_vcpu<K: Kernel>(vgic: &VmVgic<K>, vcpu: &Vcpu<K>) -> Result<()> {
    let index = vgic.vcpu_added(vcpu.mpidr())?;
    if index == vcpu.index { Ok(()) } else { Err(Errno::EIO) }
}
