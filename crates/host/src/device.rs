//! Device files: attributes of the vGIC and of the ITS.

use alloc::sync::Arc;

use cca_abi::kvm::{DeviceAttr, ioctl, vgic_attr};

use crate::errno::{Errno, Result};
use crate::kernel::{Kernel, read_user, write_user};
use crate::vm::Vm;

/// `KVM_DEV_ARM_ITS_CTRL_RESET`.
const ITS_CTRL_RESET: u64 = 4;

/// Which device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DeviceKind {
    Vgic,
    Its,
}

/// The file that `KVM_CREATE_DEVICE` makes.
pub struct Device<K: Kernel> {
    pub(crate) vm: Arc<Vm<K>>,
    pub(crate) kind: DeviceKind,
}

impl<K: Kernel> Device<K> {
    /// An ioctl on a device file.
    ///
    /// # Errors
    /// As the KVM ABI says; `ENOTTY` for an unknown one.
    pub fn ioctl(&self, command: u32, argument: u64) -> Result {
        self.vm.check_process()?;
        if !matches!(command, ioctl::HAS_DEVICE_ATTR | ioctl::SET_DEVICE_ATTR | ioctl::GET_DEVICE_ATTR) {
            return Err(Errno::ENOTTY);
        }
        let attr: DeviceAttr = read_user(&self.vm.kernel, argument)?;
        if attr.flags != 0 {
            return Err(Errno::EINVAL);
        }
        match self.kind {
            DeviceKind::Vgic => self.vgic(command, &attr),
            DeviceKind::Its => self.its(command, &attr),
        }
    }

    fn vgic(&self, command: u32, attr: &DeviceAttr) -> Result {
        let vgic = self.vm.vgic().ok_or(Errno::ENXIO)?;
        let size = vgic.attr_size(attr.group, attr.attr)?;
        if command == ioctl::HAS_DEVICE_ATTR {
            return Ok(0);
        }
        let kernel = &self.vm.kernel;
        let payload = match size {
            0 => 0,
            4 => u64::from(read_user::<_, u32>(kernel, attr.addr)?),
            _ => read_user::<_, u64>(kernel, attr.addr)?,
        };
        if command == ioctl::SET_DEVICE_ATTR {
            // Against vCPUs being created at the same time.
            let _control = self.vm.control.lock();
            vgic.set_attr(attr.group, attr.attr, payload)?;
            return Ok(0);
        }
        if attr.group == vgic_attr::GRP_CTRL {
            return Err(Errno::ENXIO);
        }
        let value = vgic.get_attr(attr.group, attr.attr, payload)?;
        match size {
            4 => write_user(kernel, attr.addr, &u32::try_from(value).map_err(|_| Errno::EIO)?)?,
            _ => write_user(kernel, attr.addr, &value)?,
        }
        Ok(0)
    }

    fn its(&self, command: u32, attr: &DeviceAttr) -> Result {
        let kernel = &self.vm.kernel;
        let its = self.vm.irqs.its.get().ok_or(Errno::ENXIO)?;
        let vgic = self.vm.vgic().ok_or(Errno::ENXIO)?;
        match (attr.group, attr.attr, command) {
            (vgic_attr::GRP_ADDR, vgic_attr::ADDR_ITS, ioctl::SET_DEVICE_ATTR) => {
                let base = read_user(kernel, attr.addr)?;
                its.set_address(vgic.limits(), base)?;
            }
            (vgic_attr::GRP_ADDR, vgic_attr::ADDR_ITS, ioctl::GET_DEVICE_ATTR) => {
                write_user(kernel, attr.addr, &its.address().unwrap_or(u64::MAX))?;
            }
            // It works from its address on; this is where KVM allocates.
            (vgic_attr::GRP_CTRL, vgic_attr::CTRL_INIT, ioctl::SET_DEVICE_ATTR) => {}
            (vgic_attr::GRP_CTRL, ITS_CTRL_RESET, ioctl::SET_DEVICE_ATTR) => {
                self.vm.irqs.kick(&its.reset(vgic, &*self.vm));
            }
            (vgic_attr::GRP_ADDR, vgic_attr::ADDR_ITS, _)
            | (vgic_attr::GRP_CTRL, vgic_attr::CTRL_INIT | ITS_CTRL_RESET, ioctl::HAS_DEVICE_ATTR) => {}
            // Saving and restoring state is not for Realms.
            _ => return Err(Errno::ENXIO),
        }
        Ok(0)
    }
}
