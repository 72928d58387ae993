//! The VM's interrupt controller: [`crate::vgic`] and this VM's vCPUs brought together.

use cca_abi::kvm;

use crate::errno::{Errno, Result};
use crate::kernel::Kernel;
use crate::vcpu::Vcpu;
use crate::vgic::{AttrError, Limits, VcpuSet, Vgic};
use crate::vm::Vm;

impl From<AttrError> for Errno {
    fn from(error: AttrError) -> Self {
        Self::from_raw(error.errno())
    }
}

/// A vGIC whose vCPU numbers are those of the VM's table.
pub struct VmVgic<K: Kernel> {
    gic: Vgic<K::RawSpinLock>,
}

impl<K: Kernel> core::ops::Deref for VmVgic<K> {
    type Target = Vgic<K::RawSpinLock>;

    fn deref(&self) -> &Self::Target {
        &self.gic
    }
}

impl<K: Kernel> VmVgic<K> {
    /// With all vCPUs that exist. Under the control lock.
    pub(crate) fn new(vm: &Vm<K>) -> Result<Self> {
        // Frames lie where memory slots do: in the lower half.
        let this = Self { gic: Vgic::new(Limits { ipa_bits: vm.geometry.ipa_bits - 1 }) };
        for vcpu in vm.vcpus() {
            this.add_vcpu(vcpu)?;
        }
        Ok(this)
    }

    /// Adds the vCPU that was created last.
    pub(crate) fn add_vcpu(&self, vcpu: &Vcpu<K>) -> Result<()> {
        let index = self.gic.vcpu_added(vcpu.mpidr())?;
        if index == vcpu.index { Ok(()) } else { Err(Errno::EIO) }
    }
}

const TYPE_SPI: u32 = 1;
const TYPE_PPI: u32 = 2;

impl<K: Kernel> Vm<K> {
    /// Makes these vCPUs look at their interrupts. Any context.
    pub fn kick(&self, vcpus: &VcpuSet) {
        if vcpus.is_empty() {
            return;
        }
        for index in vcpus.iter() {
            if let Some(vcpu) = self.vcpu_at(index) {
                vcpu.kick();
            }
        }
    }

    /// `KVM_IRQ_LINE`.
    pub(crate) fn irq_line(&self, line: &kvm::IrqLevel) -> Result {
        let vgic = self.vgic.get().filter(|vgic| vgic.is_initialised()).ok_or(Errno::ENXIO)?;
        let number = line.irq & 0xFFFF;
        let level = line.level != 0;
        let kicked = match (line.irq >> 24) & 0xF {
            TYPE_SPI if number >= 32 => vgic.set_spi(number, level),
            TYPE_PPI if (16..32).contains(&number) => {
                let id = (line.irq >> 16) & 0xFF | (line.irq >> 28) << 8;
                let vcpu = self.vcpus().find(|vcpu| vcpu.id == id).ok_or(Errno::EINVAL)?;
                vgic.set_ppi(vcpu.index, number, level)
            }
            TYPE_SPI | TYPE_PPI => None,
            _ => return Err(Errno::ENXIO),
        };
        self.kick(&kicked.ok_or(Errno::EINVAL)?);
        Ok(0)
    }
}
