//! The VM file: its ioctls.

use crate::sync::{AtomicBool, AtomicU8, AtomicU32, AtomicUsize, Ordering};
use alloc::sync::{Arc, Weak};
use core::fmt;

use cca_abi::kvm::{self, DeviceAttr, ioctl, vm_attr};

use crate::caps;
use crate::device::{Device, DeviceKind};
use crate::errno::{Errno, Result};
use crate::events::Events;
use crate::files::FileObject;
use crate::gmem::Gmem;
use crate::irqchip::{self, Irqs, VmVgic};
use crate::kernel::{Fill, Kernel, LogLevel, Mutex, PAGE_SIZE, SpinLock, read_user, write_user};
use crate::lock::guarded;
use crate::memory::Memory;
use crate::realm::{Control, Extras, RealmState};
use crate::regs;
use crate::rmi::Rmi;
use crate::rtt::Geometry;
use crate::shared::Shared;
use crate::slots::{MAX_SLOTS, Slot};
use crate::smccc::Filter;
use crate::stats::Stats;
use crate::system::System;
use crate::timer;
use crate::vcpu::{Vcpu, VcpuFile};
use crate::vgic::Its;

/// One virtual machine: a Realm, or what may become one. The last reference to go tears it down.
pub struct Vm<K: Kernel> {
    pub(crate) kernel: K,
    pub(crate) system: Arc<System<K>>,
    me: Weak<Self>,
    space: K::AddressSpace,
    pub(crate) geometry: Geometry,
    pub(crate) rmi: Rmi<K>,
    /// Configuration and life cycle.
    pub(crate) control: Mutex<K, Control<K>>,
    /// Slots, attributes, translation tables.
    pub(crate) memory: Mutex<K, Memory<K>>,
    _memory_watch: K::MemoryWatch,
    /// vCPUs and interrupt controller. Filled under the control lock.
    pub(crate) irqs: Arc<Irqs<K>>,
    vcpu_count: AtomicUsize,
    pub(crate) events: Events<K>,
    /// Stores that user space has not seen yet, shared with it.
    pub(crate) ring: K::Page,
    /// Which calls are user space's.
    pub(crate) smccc: Mutex<K, Filter>,
    state: AtomicU8,
    /// The guest has switched itself off.
    pub(crate) stopped: AtomicBool,
    /// The Realm is being taken down while files are still open.
    ending: AtomicBool,
    /// Orders power changes of vCPUs.
    pub(crate) power: SpinLock<K, ()>,
    /// Interrupts of the virtual and the physical timer.
    pub(crate) timer_irqs: [AtomicU32; 2],
    /// A vCPU has run: what was configured is fixed.
    pub(crate) has_run: AtomicBool,
    /// Breakpoints (bits 7:0) and watchpoints (15:8) minus one, until the Realm is created.
    pub(crate) debug_counts: AtomicU32,
    /// See [`Self::realm_extras`].
    extras: AtomicU32,
    /// Event counters of the PMU, until the Realm is created.
    pub(crate) pmu_counters: AtomicU32,
    /// The PMU's interrupt; 0 while nobody has said.
    pub(crate) pmu_irq: AtomicU32,
}

impl<K: Kernel> Vm<K> {
    /// An empty VM. Calls no RMI command.
    pub(crate) fn new(system: Arc<System<K>>, geometry: Geometry) -> Result<Arc<Self>> {
        let kernel = system.kernel().clone();
        let max = usize::try_from(system.max_vcpus()).map_err(|_| Errno::EINVAL)?;
        let irqs = Arc::new(Irqs::new(max, geometry.shared_bit())?);
        let ring = kernel.alloc_page(Fill::Zeroed)?;
        let rmi = system.rmi().for_vm(Arc::new(Stats::default()));
        let shared = Arc::new(Shared::new(rmi.clone()));
        let memory_watch = kernel.watch_memory(shared.clone())?;
        system.stats().count_vm();
        let features = system.features();
        let debug = u32::try_from(features.num_bps() | features.num_wps() << 8).unwrap_or(0);
        Ok(Arc::new_cyclic(|me| Self {
            space: kernel.current_address_space(),
            kernel,
            system,
            me: me.clone(),
            geometry,
            rmi,
            control: guarded(c"vm.control", Control::default()),
            memory: guarded(c"vm.memory", Memory::new(shared)),
            _memory_watch: memory_watch,
            irqs,
            vcpu_count: AtomicUsize::new(0),
            events: Events::default(),
            ring,
            smccc: guarded(c"vm.smccc", Filter::default()),
            state: AtomicU8::new(0),
            stopped: AtomicBool::new(false),
            ending: AtomicBool::new(false),
            power: guarded(c"vm.power", ()),
            timer_irqs: [
                AtomicU32::new(timer::DEFAULT_VIRTUAL_PPI),
                AtomicU32::new(timer::DEFAULT_PHYSICAL_PPI),
            ],
            has_run: AtomicBool::new(false),
            debug_counts: AtomicU32::new(debug),
            pmu_counters: AtomicU32::new(u32::try_from(features.pmu_num_ctrs()).unwrap_or(0)),
            pmu_irq: AtomicU32::new(0),
            extras: AtomicU32::new(0),
        }))
    }

    pub(crate) fn is_ending(&self) -> bool {
        self.ending.load(Ordering::SeqCst)
    }

    /// Takes the Realm down, whoever has files open: `KVM_RUN` fails with `EIO`.
    pub(crate) fn end(&self) {
        self.ending.store(true, Ordering::SeqCst);
        for vcpu in self.vcpus() {
            vcpu.kick();
        }
        self.teardown();
    }

    /// Counters of this VM.
    pub fn stats(&self) -> &Stats {
        self.rmi.stats()
    }

    /// How far the Realm's life has come.
    pub fn realm_state(&self) -> RealmState {
        RealmState::from_u8(self.state.load(Ordering::Acquire))
    }

    pub(crate) fn set_realm_state(&self, state: RealmState) {
        self.state.store(state.to_u8(), Ordering::Release);
    }

    /// All vCPUs, in the order of their creation.
    pub fn vcpus(&self) -> impl Iterator<Item = &Arc<Vcpu<K>>> {
        self.irqs.vcpus.iter().map_while(spin::Once::get)
    }

    /// The interrupt controller.
    pub(crate) fn vgic(&self) -> Option<&Arc<VmVgic<K>>> {
        self.irqs.vgic.get()
    }

    /// What all vCPUs have alike, from the creation of the Realm on.
    pub(crate) fn realm_extras(&self) -> Extras {
        let packed = self.extras.load(Ordering::Relaxed).to_le_bytes();
        ((packed[0] != 0).then_some(packed[0]), packed[1] != 0)
    }

    pub(crate) fn set_realm_extras(&self, (vq, pmu): Extras) {
        let packed = u32::from_le_bytes([vq.unwrap_or(0), pmu.into(), 0, 0]);
        self.extras.store(packed, Ordering::Relaxed);
    }

    pub(crate) fn log_error(&self, line: fmt::Arguments<'_>) {
        self.rmi.say(LogLevel::Warn, line);
    }

    /// Slots name addresses of the process that made the VM; nobody else may use it.
    pub(crate) fn check_process(&self) -> Result<()> {
        if self.kernel.is_current(&self.space) { Ok(()) } else { Err(Errno::EIO) }
    }

    /// An ioctl on the VM file.
    ///
    /// # Errors
    /// As the KVM ABI says; `EIO` from another process; `ENOTTY` for an unknown one.
    pub fn ioctl(&self, command: u32, argument: u64) -> Result {
        self.check_process()?;
        match command {
            ioctl::CHECK_EXTENSION => caps::check(&self.system, Some(self), argument),
            ioctl::CREATE_VCPU => self.create_vcpu(argument),
            ioctl::SET_USER_MEMORY_REGION => {
                let region: kvm::MemoryRegion = read_user(&self.kernel, argument)?;
                if region.flags != 0 {
                    return Err(Errno::EINVAL);
                }
                self.set_region(&kvm::MemoryRegion2 {
                    slot: region.slot,
                    flags: 0,
                    guest_phys_addr: region.guest_phys_addr,
                    memory_size: region.memory_size,
                    userspace_addr: region.userspace_addr,
                    guest_memfd_offset: 0,
                    guest_memfd: 0,
                    pad1: 0,
                    pad2: [0; 14],
                })
            }
            ioctl::SET_USER_MEMORY_REGION2 => self.set_region(&read_user(&self.kernel, argument)?),
            ioctl::CREATE_GUEST_MEMFD => self.create_gmem(&read_user(&self.kernel, argument)?),
            ioctl::SET_MEMORY_ATTRIBUTES => self.set_attributes(&read_user(&self.kernel, argument)?),
            ioctl::ENABLE_CAP => self.enable_cap(&read_user(&self.kernel, argument)?),
            ioctl::ARM_PREFERRED_TARGET => {
                let target = kvm::VcpuInit { target: kvm::TARGET_GENERIC_V8, features: [0; 7] };
                write_user(&self.kernel, argument, &target)?;
                Ok(0)
            }
            ioctl::IRQ_LINE => self.irq_line(&read_user(&self.kernel, argument)?),
            ioctl::CREATE_DEVICE => self.create_device(argument),
            ioctl::IRQFD => self.irqfd(&read_user(&self.kernel, argument)?),
            ioctl::IOEVENTFD => self.ioeventfd(&read_user(&self.kernel, argument)?),
            ioctl::SET_GSI_ROUTING => self.set_gsi_routing(argument),
            ioctl::SIGNAL_MSI => self.signal_msi(&read_user(&self.kernel, argument)?),
            ioctl::REGISTER_COALESCED_MMIO => self.coalesced_zone(&read_user(&self.kernel, argument)?, true),
            ioctl::UNREGISTER_COALESCED_MMIO => {
                self.coalesced_zone(&read_user(&self.kernel, argument)?, false)
            }
            ioctl::ARM_GET_REG_WRITABLE_MASKS => {
                regs::writable_masks(&self.kernel, &read_user(&self.kernel, argument)?)
            }
            ioctl::SET_DEVICE_ATTR | ioctl::GET_DEVICE_ATTR | ioctl::HAS_DEVICE_ATTR => {
                self.device_attr(command, &read_user(&self.kernel, argument)?)
            }
            // For the GICv2, which there is not.
            ioctl::ARM_SET_DEVICE_ADDR => Err(Errno::ENODEV),
            // A Realm's memory cannot be watched.
            ioctl::GET_DIRTY_LOG => Err(Errno::EINVAL),
            _ => Err(Errno::ENOTTY),
        }
    }

    fn this(&self) -> Result<Arc<Self>> {
        self.me.upgrade().ok_or(Errno::EIO)
    }

    fn create_vcpu(&self, id: u64) -> Result {
        let id = u32::try_from(id).map_err(|_| Errno::EINVAL)?;
        if id >= self.system.max_vcpus() {
            return Err(Errno::EINVAL);
        }
        let control = self.control.lock();
        if matches!(self.realm_state(), RealmState::Active | RealmState::Dead) {
            return Err(Errno::EBUSY);
        }
        let vcpu = match self.vcpus().find(|vcpu| vcpu.id == id) {
            Some(vcpu) if vcpu.has_file.load(Ordering::Relaxed) => return Err(Errno::EEXIST),
            // Its file could not be made the first time.
            Some(vcpu) => vcpu.clone(),
            None => self.add_vcpu(id)?,
        };
        vcpu.has_file.store(true, Ordering::Relaxed);
        let file = Arc::new(VcpuFile { vm: self.this()?, vcpu: vcpu.clone() });
        let mut name = [0; 24];
        let installed = self.kernel.install_fd(vcpu_name(&mut name, id), FileObject::Vcpu(file), 0);
        if installed.is_err() {
            vcpu.has_file.store(false, Ordering::Relaxed);
        }
        drop(control);
        installed.map(i64::from)
    }

    /// Under the control lock.
    fn add_vcpu(&self, id: u32) -> Result<Arc<Vcpu<K>>> {
        let index = self.vcpu_count.load(Ordering::Relaxed);
        let place = self.irqs.vcpus.get(index).ok_or(Errno::EINVAL)?;
        let vcpu = Arc::new(Vcpu::new(&self.kernel, id, index, self.system.sve_max_vq())?);
        if let Some(vgic) = self.vgic() {
            irqchip::add_vcpu::<K>(vgic, &vcpu)?;
        }
        place.call_once(|| vcpu.clone());
        self.vcpu_count.store(index + 1, Ordering::Relaxed);
        Ok(vcpu)
    }

    fn set_region(&self, region: &kvm::MemoryRegion2) -> Result {
        if region.flags & !kvm::MEM_GUEST_MEMFD != 0 || region.slot >= MAX_SLOTS {
            return Err(Errno::EINVAL);
        }
        let (base, size) = (region.guest_phys_addr, region.memory_size);
        if base % PAGE_SIZE != 0 || size % PAGE_SIZE != 0 || region.userspace_addr % PAGE_SIZE != 0 {
            return Err(Errno::EINVAL);
        }
        let end = base.checked_add(size).ok_or(Errno::EINVAL)?;
        // Slots lie in the lower half: the upper one is its alias.
        if end > self.geometry.protected_end() || !self.kernel.is_user_range(region.userspace_addr, size) {
            return Err(Errno::EINVAL);
        }
        let gmem = if region.flags & kvm::MEM_GUEST_MEMFD != 0 && size != 0 {
            Some((
                self.gmem_of(region.guest_memfd, region.guest_memfd_offset, size)?,
                region.guest_memfd_offset,
            ))
        } else {
            None
        };
        let control = self.control.lock();
        let mut memory = self.memory.lock();
        if let Some(old) = memory.slots.by_id(region.slot) {
            let fixed = old.gmem.is_some() || gmem.is_some() || old.size != size;
            if size != 0 && fixed {
                return Err(Errno::EINVAL);
            }
            if size != 0 && old.base == base && old.user_address == region.userspace_addr {
                return Ok(0);
            }
        } else if size == 0 {
            return Err(Errno::EINVAL);
        }
        let user_address = region.userspace_addr;
        let new = Slot { id: region.slot, base, size, user_address, gmem };
        if size != 0 {
            // Before the old slot goes: a refused request changes nothing.
            memory.slots.prepare(&new)?;
        }
        if memory.slots.by_id(region.slot).is_some() {
            memory.remove_slot(&self.rmi, region.slot)?;
        }
        if size != 0 {
            memory.shared.add_slot(region.slot, base, size, user_address)?;
            memory.generation += 1;
            memory.slots.insert(new);
        }
        drop(memory);
        drop(control);
        Ok(0)
    }

    fn gmem_of(&self, fd: u32, offset: u64, size: u64) -> Result<Arc<Gmem<K>>> {
        let fd = i32::try_from(fd).map_err(|_| Errno::EBADF)?;
        let Some(FileObject::Gmem(gmem)) = self.kernel.file_object(fd) else { return Err(Errno::EINVAL) };
        let end = offset.checked_add(size).ok_or(Errno::EINVAL)?;
        if !gmem.belongs_to(&self.me) || offset % PAGE_SIZE != 0 || end > gmem.size() {
            return Err(Errno::EINVAL);
        }
        Ok(gmem)
    }

    fn create_gmem(&self, create: &kvm::CreateGuestMemfd) -> Result {
        if create.flags != 0 || create.reserved != [0; 6] {
            return Err(Errno::EINVAL);
        }
        let gmem = Gmem::new(self.kernel.clone(), self.me.clone(), create.size)?;
        self.kernel.install_fd("[kvm-realm-gmem]", FileObject::Gmem(gmem), create.size).map(i64::from)
    }

    fn set_attributes(&self, attributes: &kvm::MemoryAttributes) -> Result {
        let (base, size) = (attributes.address, attributes.size);
        if attributes.flags != 0
            || attributes.attributes & !kvm::MEMORY_ATTRIBUTE_PRIVATE != 0
            || size == 0
            || base % PAGE_SIZE != 0
            || size % PAGE_SIZE != 0
        {
            return Err(Errno::EINVAL);
        }
        let end = base.checked_add(size).ok_or(Errno::EINVAL)?;
        let private = attributes.attributes & kvm::MEMORY_ATTRIBUTE_PRIVATE != 0;
        self.memory.lock().set_private(&self.rmi, &(base..end), private)?;
        Ok(0)
    }

    fn create_device(&self, argument: u64) -> Result {
        let mut create: kvm::CreateDevice = read_user(&self.kernel, argument)?;
        if create.flags & !kvm::device_type::FLAG_TEST != 0 {
            return Err(Errno::EINVAL);
        }
        // No GICv2.
        let kind = match create.device_type {
            kvm::device_type::ARM_VGIC_V3 => DeviceKind::Vgic,
            kvm::device_type::ARM_VGIC_ITS => DeviceKind::Its,
            _ => return Err(Errno::ENODEV),
        };
        if create.flags & kvm::device_type::FLAG_TEST != 0 {
            return Ok(0);
        }
        let control = self.control.lock();
        let device = Arc::new(Device { vm: self.this()?, kind });
        // The file first: without one, nobody could ever configure the device.
        let install = |name| {
            self.kernel
                .install_fd(name, FileObject::Device(device), 0)
                .and_then(|fd| u32::try_from(fd).map_err(|_| Errno::EIO))
        };
        match kind {
            DeviceKind::Vgic => {
                if self.vgic().is_some() {
                    return Err(Errno::EEXIST);
                }
                let vgic = self.new_vgic()?;
                create.fd = install("kvm-realm-vgic-v3")?;
                self.irqs.vgic.call_once(|| vgic);
            }
            DeviceKind::Its => {
                let vgic = self.vgic().ok_or(Errno::ENODEV)?;
                if self.irqs.its.get().is_some() {
                    return Err(Errno::EEXIST);
                }
                if vgic.is_initialised() {
                    return Err(Errno::EBUSY);
                }
                let its = Arc::new(Its::new());
                create.fd = install("kvm-realm-its")?;
                vgic.add_its();
                self.irqs.its.call_once(|| its);
            }
        }
        drop(control);
        write_user(&self.kernel, argument, &create)?;
        Ok(0)
    }

    /// Attributes of the VM: the SMCCC filter.
    fn device_attr(&self, command: u32, attr: &DeviceAttr) -> Result {
        if attr.flags != 0 {
            return Err(Errno::EINVAL);
        }
        if (attr.group, attr.attr) != (vm_attr::GRP_SMCCC, vm_attr::SMCCC_FILTER) {
            return Err(Errno::ENXIO);
        }
        match command {
            ioctl::HAS_DEVICE_ATTR => Ok(0),
            ioctl::SET_DEVICE_ATTR => {
                let filter = read_user(&self.kernel, attr.addr)?;
                let mut current = self.smccc.lock();
                if self.has_run.load(Ordering::Relaxed) {
                    return Err(Errno::EBUSY);
                }
                current.add(&filter).map(|()| 0)
            }
            _ => Err(Errno::ENXIO),
        }
    }
}

/// `kvm-realm-vcpu:<id>`, written into `buffer`.
fn vcpu_name(buffer: &mut [u8; 24], id: u32) -> &str {
    const PREFIX: &[u8] = b"kvm-realm-vcpu:";
    let mut digits = [0; 10];
    let mut rest = id;
    let mut first = digits.len();
    loop {
        first -= 1;
        digits[first] = b"0123456789"[usize::try_from(rest % 10).unwrap_or(0)];
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    let name = PREFIX.iter().chain(&digits[first..]);
    let mut len = 0;
    for (to, from) in buffer.iter_mut().zip(name) {
        *to = *from;
        len += 1;
    }
    core::str::from_utf8(&buffer[..len]).unwrap_or("kvm-realm-vcpu")
}

impl<K: Kernel> Drop for Vm<K> {
    fn drop(&mut self) {
        self.teardown();
        self.system.stats().count_vm_gone();
    }
}
