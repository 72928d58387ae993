//! Device attributes of a vCPU: which interrupts its timers and its PMU raise. They are the VM's, the same for all.

use crate::sync::Ordering::Relaxed;

use cca_abi::kvm::{DeviceAttr, ioctl, vcpu_attr, vcpu_feature};

use crate::errno::{Errno, Result};
use crate::kernel::{Kernel, read_user, write_user};
use crate::vcpu::VcpuFile;

/// PPIs.
const PPIS: core::ops::Range<u32> = 16..32;

impl<K: Kernel> VcpuFile<K> {
    /// `KVM_{HAS,SET,GET}_DEVICE_ATTR` on a vCPU.
    pub(crate) fn device_attr(&self, command: u32, attr: &DeviceAttr) -> Result {
        if attr.flags != 0 {
            return Err(Errno::EINVAL);
        }
        match (attr.group, attr.attr) {
            (vcpu_attr::GRP_TIMER, vcpu_attr::TIMER_IRQ_VTIMER) => self.timer_irq(command, attr.addr, 0),
            (vcpu_attr::GRP_TIMER, vcpu_attr::TIMER_IRQ_PTIMER) => self.timer_irq(command, attr.addr, 1),
            // Event filters and a choice of PMU would be the RMM's to enforce; it has no command for them. No stolen
            // time either.
            (vcpu_attr::GRP_PMU_V3, vcpu_attr::PMU_V3_IRQ) => self.pmu_irq(command, attr.addr),
            (vcpu_attr::GRP_PMU_V3, vcpu_attr::PMU_V3_INIT) => self.pmu_init(command),
            _ => Err(Errno::ENXIO),
        }
    }

    fn timer_irq(&self, command: u32, address: u64, which: usize) -> Result {
        let kernel = &self.vm.kernel;
        let own = &self.vm.timer_irqs[which];
        match command {
            ioctl::SET_DEVICE_ATTR => {
                let ppi: u32 = read_user(kernel, address)?;
                if !PPIS.contains(&ppi) || self.vm.timer_irqs[1 - which].load(Relaxed) == ppi {
                    return Err(Errno::EINVAL);
                }
                if self.vm.has_run.load(Relaxed) {
                    return Err(Errno::EBUSY);
                }
                own.store(ppi, Relaxed);
            }
            ioctl::GET_DEVICE_ATTR => write_user(kernel, address, &own.load(Relaxed))?,
            _ => {}
        }
        Ok(0)
    }

    fn has_pmu(&self) -> bool {
        self.vcpu.state.lock().has(vcpu_feature::PMU_V3)
    }

    fn pmu_irq(&self, command: u32, address: u64) -> Result {
        if !self.has_pmu() {
            return Err(if command == ioctl::HAS_DEVICE_ATTR { Errno::ENXIO } else { Errno::ENODEV });
        }
        let kernel = &self.vm.kernel;
        match command {
            ioctl::SET_DEVICE_ATTR => {
                let ppi: u32 = read_user(kernel, address)?;
                if !PPIS.contains(&ppi) {
                    return Err(Errno::EINVAL);
                }
                // Zero: nobody has said.
                match self.vm.pmu_irq.compare_exchange(0, ppi, Relaxed, Relaxed) {
                    Err(other) if other != ppi => return Err(Errno::EINVAL),
                    _ => {}
                }
                let mut state = self.vcpu.state.lock();
                if state.pmu_irq_set {
                    return Err(Errno::EBUSY);
                }
                state.pmu_irq_set = true;
            }
            ioctl::GET_DEVICE_ATTR => {
                if !self.vcpu.state.lock().pmu_irq_set {
                    return Err(Errno::ENXIO);
                }
                write_user(kernel, address, &self.vm.pmu_irq.load(Relaxed))?;
            }
            _ => {}
        }
        Ok(0)
    }

    fn pmu_init(&self, command: u32) -> Result {
        match command {
            _ if !self.has_pmu() => Err(Errno::ENXIO),
            ioctl::HAS_DEVICE_ATTR => Ok(0),
            ioctl::SET_DEVICE_ATTR => {
                if !self.vm.vgic().is_some_and(|vgic| vgic.is_initialised()) {
                    return Err(Errno::ENODEV);
                }
                let mut state = self.vcpu.state.lock();
                if !state.pmu_irq_set {
                    return Err(Errno::ENXIO);
                }
                if state.pmu_ready {
                    return Err(Errno::EBUSY);
                }
                state.pmu_ready = true;
                Ok(0)
            }
            _ => Err(Errno::ENXIO),
        }
    }
}
