//! The objects behind file descriptors, and what the kernel's file operations call.
//!
//! | file operation | call |
//! |---|---|
//! | open, ioctl of the device node | [`crate::System::ioctl`] |
//! | ioctl of any other | [`FileObject::ioctl`] |
//! | mmap of a vCPU | [`crate::Vcpu::mmap_page`] per page, shared mappings only |
//! | fallocate of a guest_memfd | [`crate::Gmem::fallocate`] |
//! | release | drop the [`FileObject`]; any order, in process context |

use alloc::sync::Arc;

use crate::device::Device;
use crate::errno::Result;
use crate::gmem::Gmem;
use crate::kernel::Kernel;
use crate::vcpu::VcpuFile;
use crate::vm::Vm;

/// What a file descriptor stands for. Holding one keeps the object, and what it needs, alive.
pub enum FileObject<K: Kernel> {
    /// A virtual machine.
    Vm(Arc<Vm<K>>),
    /// One vCPU of a virtual machine.
    Vcpu(Arc<VcpuFile<K>>),
    /// Private memory.
    Gmem(Arc<Gmem<K>>),
    /// A device in the kernel: the vGIC.
    Device(Arc<Device<K>>),
}

impl<K: Kernel> Clone for FileObject<K> {
    fn clone(&self) -> Self {
        match self {
            Self::Vm(object) => Self::Vm(object.clone()),
            Self::Vcpu(object) => Self::Vcpu(object.clone()),
            Self::Gmem(object) => Self::Gmem(object.clone()),
            Self::Device(object) => Self::Device(object.clone()),
        }
    }
}

impl<K: Kernel> FileObject<K> {
    /// The file's ioctl operation.
    ///
    /// # Errors
    /// As the ioctl says; `ENOTTY` for an object without ioctls.
    pub fn ioctl(&self, command: u32, argument: u64) -> Result {
        match self {
            Self::Vm(vm) => vm.ioctl(command, argument),
            Self::Vcpu(vcpu) => vcpu.ioctl(command, argument),
            Self::Device(device) => device.ioctl(command, argument),
            Self::Gmem(_) => Err(crate::Errno::ENOTTY),
        }
    }
}
