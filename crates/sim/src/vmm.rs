//! A small VMM: the ioctls that make and run a Realm, in the order that a real one uses.
//!
//! [`STEPS`] is the whole construction as a list, so that a test can stop after any of them.

use crate::host::{Process, Signal, SimKernel};
use crate::memory::{Page, Pas};
use cca_abi::kvm::{self, cap, device_type, exit, ioctl, reg, rme, run, vcpu_feature, vgic_attr};
use kvm_realm::System;
use kvm_realm::errno::{Errno, Result};
use kvm_realm::files::FileObject;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use zerocopy::IntoBytes;

/// Start of guest RAM.
pub const RAM_BASE: u64 = 0x8000_0000;
/// Where the boot vCPU starts.
pub const ENTRY: u64 = RAM_BASE;
/// Where the other vCPUs start, in most scenarios.
pub const SECOND: u64 = RAM_BASE + 0x100;
/// The shared alias: the top bit of a 33-bit IPA space.
pub const SHARED: u64 = 1 << 32;
/// GIC distributor in the guest.
pub const GICD: u64 = 0x3FFF_0000;
/// GIC redistributors in the guest.
pub const GICR: u64 = 0x3FE0_0000;
/// An address at which the VMM has a device.
pub const DEVICE: u64 = 0x0100_0000;

/// Shape of a virtual machine.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// IPA width in bits.
    pub ipa_bits: u32,
    /// Bytes of RAM.
    pub ram: u64,
    /// vCPUs.
    pub vcpus: u32,
    /// Pages populated with contents at the start of RAM.
    pub image_pages: u64,
    /// GIC redistributors in the guest.
    pub gicr: u64,
    /// An ITS in the guest, if there is one.
    pub its: Option<u64>,
}

impl Default for Config {
    fn default() -> Self {
        Self { ipa_bits: 33, ram: 4 << 20, vcpus: 1, image_pages: 3, gicr: GICR, its: None }
    }
}

/// Why `KVM_RUN` came back, decoded from `struct kvm_run`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// A device access; answer a read with [`Vmm::complete_mmio_read`].
    Mmio {
        /// Guest physical address without the shared bit.
        gpa: u64,
        /// Bytes.
        len: u32,
        /// What was stored, or `None` for a load.
        write: Option<u64>,
    },
    /// The guest uses memory in a way that the attributes do not allow, or changed what it wants.
    MemoryFault {
        /// To private?
        private: bool,
        /// First byte.
        gpa: u64,
        /// Bytes.
        size: u64,
    },
    /// The guest is done: shutdown (1) or reset (2).
    SystemEvent(u32),
    /// Anything else.
    Other(u32),
}

/// A VMM process with one virtual machine.
pub struct Vmm {
    /// The process that it is.
    pub process: Arc<Process>,
    system: Arc<System<SimKernel>>,
    kernel: SimKernel,
    pub(crate) config: Config,
    /// Where the shared alias of RAM is mapped.
    pub ram: u64,
    /// A page for arguments of ioctls.
    pub(crate) scratch: u64,
    vm: i32,
    gmem: i32,
    /// vCPU files.
    pub vcpus: Vec<i32>,
    vgic: i32,
}

/// One step of construction.
pub type Step = (&'static str, fn(&mut Vmm) -> Result<()>);

/// The whole construction.
pub const STEPS: &[Step] = &[
    ("create VM", Vmm::create_vm),
    ("create guest_memfd", Vmm::create_gmem),
    ("set memory region", Vmm::set_region),
    ("make RAM private", Vmm::make_private),
    ("create vCPUs", Vmm::create_vcpus),
    ("create vGIC", Vmm::create_vgic),
    ("configure Realm", Vmm::configure),
    ("create RD", Vmm::create_rd),
    ("init IPA", Vmm::init_ipa),
    ("populate", Vmm::populate),
    ("finalize vCPUs", Vmm::finalize),
    ("activate", Vmm::activate),
];

impl Vmm {
    /// A VMM that has not made anything yet.
    #[must_use]
    pub fn new(kernel: &SimKernel, system: &Arc<System<SimKernel>>, config: Config) -> Self {
        let process = Process::new(kernel);
        let ram = process.mmap(config.ram);
        let scratch = process.mmap(crate::memory::PAGE_SIZE);
        for page in 0..config.image_pages {
            let at = page * crate::memory::PAGE_SIZE;
            process.write(ram + at, &(0x1111_0000 + page).to_le_bytes()).expect("mapped");
        }
        Self {
            process,
            system: system.clone(),
            kernel: kernel.clone(),
            config,
            ram,
            scratch,
            vm: -1,
            gmem: -1,
            vcpus: Vec::new(),
            vgic: -1,
        }
    }

    /// Another thread's view of the same process and the same files, with a buffer of its own. What it makes, only it
    /// knows.
    #[must_use]
    pub fn second(&self) -> Self {
        Self {
            process: self.process.clone(),
            system: self.system.clone(),
            kernel: self.kernel.clone(),
            config: self.config,
            ram: self.ram,
            scratch: self.process.mmap(crate::memory::PAGE_SIZE),
            vm: self.vm,
            gmem: self.gmem,
            vcpus: self.vcpus.clone(),
            vgic: self.vgic,
        }
    }

    /// Makes the Realm: all steps.
    ///
    /// # Errors
    /// The first step that failed, with its name.
    pub fn build(&mut self) -> core::result::Result<(), (&'static str, Errno)> {
        STEPS.iter().try_for_each(|(name, step)| step(self).map_err(|errno| (*name, errno)))
    }

    /// An ioctl with a structure that the kernel may also write.
    ///
    /// # Errors
    /// As the ioctl.
    pub fn ioctl<T: IntoBytes + zerocopy::FromBytes + zerocopy::Immutable>(
        &self,
        fd: i32,
        command: u32,
        value: &mut T,
    ) -> Result {
        self.process.write(self.scratch, value.as_bytes())?;
        let result = self.ioctl_value(fd, command, self.scratch);
        self.process.read(self.scratch, value.as_mut_bytes())?;
        result
    }

    /// An ioctl whose argument is a number.
    ///
    /// # Errors
    /// As the ioctl; `EBADF` without a file.
    pub fn ioctl_value(&self, fd: i32, command: u32, argument: u64) -> Result {
        let file = self.process.file(fd).ok_or(Errno::EBADF)?;
        self.process.run(|| file.ioctl(command, argument))
    }

    /// The VM's file.
    #[must_use]
    pub fn vm(&self) -> i32 {
        self.vm
    }

    /// The guest_memfd.
    #[must_use]
    pub fn gmem(&self) -> i32 {
        self.gmem
    }

    fn create_vm(&mut self) -> Result<()> {
        let vm_type = kvm::VM_TYPE_REALM | u64::from(self.config.ipa_bits);
        let fd = self.process.run(|| self.system.ioctl(ioctl::CREATE_VM, vm_type))?;
        self.vm = fd as i32;
        Ok(())
    }

    fn create_gmem(&mut self) -> Result<()> {
        let mut args = kvm::CreateGuestMemfd { size: self.config.ram, flags: 0, reserved: [0; 6] };
        self.gmem = self.ioctl(self.vm, ioctl::CREATE_GUEST_MEMFD, &mut args)? as i32;
        Ok(())
    }

    fn set_region(&mut self) -> Result<()> {
        self.set_slot(0, RAM_BASE, self.config.ram, true).map(drop)
    }

    /// Sets a memory slot, all of them with the same user memory: RAM's. A `private` one also has the guest_memfd.
    ///
    /// # Errors
    /// As the ioctl.
    pub fn set_slot(&self, slot: u32, base: u64, size: u64, private: bool) -> Result {
        let mut region = kvm::MemoryRegion2 {
            slot,
            flags: if private { kvm::MEM_GUEST_MEMFD } else { 0 },
            guest_phys_addr: base,
            memory_size: size,
            userspace_addr: self.ram,
            guest_memfd_offset: 0,
            guest_memfd: if private { self.gmem as u32 } else { 0 },
            pad1: 0,
            pad2: [0; 14],
        };
        self.ioctl(self.vm, ioctl::SET_USER_MEMORY_REGION2, &mut region)
    }

    fn make_private(&mut self) -> Result<()> {
        self.set_private(RAM_BASE, self.config.ram, true)
    }

    /// Sets the attribute of a range.
    ///
    /// # Errors
    /// As the ioctl.
    pub fn set_private(&self, address: u64, size: u64, private: bool) -> Result<()> {
        let attributes = if private { kvm::MEMORY_ATTRIBUTE_PRIVATE } else { 0 };
        let mut args = kvm::MemoryAttributes { address, size, attributes, flags: 0 };
        self.ioctl(self.vm, ioctl::SET_MEMORY_ATTRIBUTES, &mut args).map(drop)
    }

    /// `fallocate` of a guest_memfd.
    ///
    /// # Errors
    /// As the system call; `EBADF` if it is none.
    pub fn fallocate(&self, fd: i32, mode: u32, offset: u64, size: u64) -> Result {
        match self.process.file(fd) {
            Some(FileObject::Gmem(gmem)) => self.process.run(|| gmem.fallocate(mode, offset, size)),
            _ => Err(Errno::EBADF),
        }
    }

    /// Gives a range of the guest_memfd back (`FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE`).
    ///
    /// # Errors
    /// As the system call.
    pub fn punch_hole(&self, offset: u64, size: u64) -> Result<()> {
        self.fallocate(self.gmem, 3, offset, size).map(drop)
    }

    fn create_vcpus(&mut self) -> Result<()> {
        for id in 0..u64::from(self.config.vcpus) {
            let fd = self.ioctl_value(self.vm, ioctl::CREATE_VCPU, id)? as i32;
            let mut features = 1 << vcpu_feature::PSCI_0_2;
            if id > 0 {
                features |= 1 << vcpu_feature::POWER_OFF;
            }
            let mut init =
                kvm::VcpuInit { target: kvm::TARGET_GENERIC_V8, features: [features, 0, 0, 0, 0, 0, 0] };
            self.ioctl(fd, ioctl::ARM_VCPU_INIT, &mut init)?;
            self.vcpus.push(fd);
        }
        Ok(())
    }

    /// Sets an attribute of a device's file.
    ///
    /// # Errors
    /// As the ioctl.
    pub fn set_device_attr(&self, fd: i32, group: u32, attr: u64, payload: u64) -> Result<()> {
        let addr = self.scratch + 2048;
        self.process.write(addr, &payload.to_le_bytes())?;
        let mut args = kvm::DeviceAttr { flags: 0, group, attr, addr };
        self.ioctl(fd, ioctl::SET_DEVICE_ATTR, &mut args).map(drop)
    }

    fn create_vgic(&mut self) -> Result<()> {
        let mut args = kvm::CreateDevice { device_type: device_type::ARM_VGIC_V3, fd: 0, flags: 0 };
        self.ioctl(self.vm, ioctl::CREATE_DEVICE, &mut args)?;
        self.vgic = args.fd as i32;
        self.set_device_attr(self.vgic, vgic_attr::GRP_ADDR, vgic_attr::ADDR_DIST, GICD)?;
        self.set_device_attr(self.vgic, vgic_attr::GRP_ADDR, vgic_attr::ADDR_REDIST, self.config.gicr)?;
        if let Some(base) = self.config.its {
            let mut args = kvm::CreateDevice { device_type: device_type::ARM_VGIC_ITS, fd: 0, flags: 0 };
            self.ioctl(self.vm, ioctl::CREATE_DEVICE, &mut args)?;
            let its = args.fd as i32;
            self.set_device_attr(its, vgic_attr::GRP_ADDR, vgic_attr::ADDR_ITS, base)?;
            self.set_device_attr(its, vgic_attr::GRP_CTRL, vgic_attr::CTRL_INIT, 0)?;
        }
        self.set_device_attr(self.vgic, vgic_attr::GRP_NR_IRQS, 0, 96)?;
        self.set_device_attr(self.vgic, vgic_attr::GRP_CTRL, vgic_attr::CTRL_INIT, 0)
    }

    /// A sub-command of the capability `KVM_CAP_ARM_RME`.
    ///
    /// # Errors
    /// As the ioctl.
    pub fn rme(&self, command: u64, address: u64) -> Result<()> {
        let mut args = kvm::EnableCap {
            cap: kvm::GENERATION_V2.cap_arm_rme,
            flags: 0,
            args: [command, address, 0, 0],
            pad: [0; 64],
        };
        self.ioctl(self.vm, ioctl::ENABLE_CAP, &mut args).map(drop)
    }

    fn rme_with(&self, command: u64, argument: &[u8]) -> Result<()> {
        let address = self.scratch + 2048;
        self.process.write(address, argument)?;
        self.rme(command, address)
    }

    fn configure(&mut self) -> Result<()> {
        let mut item = kvm::RmeConfigItem { cfg: rme::CFG_HASH_ALGO, data: [0; 256] };
        item.data[0] = rme::HASH_SHA256 as u8;
        self.rme_with(rme::CONFIG_REALM, item.as_bytes())?;
        let mut item = kvm::RmeConfigItem { cfg: rme::CFG_RPV, data: [0; 256] };
        item.data[..4].copy_from_slice(b"test");
        self.rme_with(rme::CONFIG_REALM, item.as_bytes())
    }

    fn create_rd(&mut self) -> Result<()> {
        self.rme(rme::CREATE_RD, 0)
    }

    fn init_ipa(&mut self) -> Result<()> {
        let args = kvm::RmeInitIpa { base: RAM_BASE, size: self.config.ram, reserved: [0; 4] };
        self.rme_with(rme::INIT_IPA_REALM, args.as_bytes())
    }

    fn populate(&mut self) -> Result<()> {
        let args = kvm::RmePopulate {
            base: RAM_BASE,
            size: self.config.image_pages * crate::memory::PAGE_SIZE,
            flags: rme::POPULATE_FLAGS_MEASURE,
            reserved: [0; 3],
        };
        self.rme_with(rme::POPULATE_REALM, args.as_bytes())
    }

    /// Writes a register of a vCPU.
    ///
    /// # Errors
    /// As the ioctl.
    pub fn set_reg(&self, vcpu: usize, id: u64, value: u64) -> Result<()> {
        let addr = self.scratch + 2048;
        self.process.write(addr, &value.to_le_bytes())?;
        self.ioctl(self.vcpus[vcpu], ioctl::SET_ONE_REG, &mut kvm::OneReg { id, addr }).map(drop)
    }

    fn finalize(&mut self) -> Result<()> {
        self.set_reg(0, reg::CORE_PC, ENTRY)?;
        self.set_reg(0, reg::CORE_X0, 0xB007)?;
        for fd in &self.vcpus {
            self.ioctl(*fd, ioctl::ARM_VCPU_FINALIZE, &mut kvm::GENERATION_V2.vcpu_rec.clone())?;
        }
        Ok(())
    }

    fn activate(&mut self) -> Result<()> {
        self.rme(rme::ACTIVATE_REALM, 0)
    }

    /// Whether the kernel offers Realms, as a VMM asks.
    ///
    /// # Errors
    /// As the ioctl.
    pub fn has_realms(&self) -> Result<bool> {
        let answer =
            self.ioctl_value(self.vm, ioctl::CHECK_EXTENSION, kvm::GENERATION_V2.cap_arm_rme.into())?;
        let memory = self.ioctl_value(self.vm, ioctl::CHECK_EXTENSION, cap::GUEST_MEMFD.into())?;
        Ok(answer == 1 && memory == 1)
    }

    fn run_page(&self, file: &FileObject<SimKernel>) -> &Page {
        let FileObject::Vcpu(vcpu) = file else { panic!("no vCPU") };
        let pa = vcpu.mmap_page(0).expect("the run page");
        self.kernel.machine().memory().page(Pas::NonSecure, pa).expect("the run page is host memory")
    }

    /// Answers a load. Nothing happens if the vCPU was closed.
    pub fn complete_mmio_read(&self, vcpu: usize, value: u64) {
        if let Some(file) = self.process.file(self.vcpus[vcpu]) {
            self.run_page(&file)[run::MMIO_DATA / 8].store(value, Relaxed);
        }
    }

    /// `KVM_RUN` once.
    ///
    /// # Errors
    /// As the ioctl.
    pub fn run(&self, vcpu: usize) -> Result<Exit> {
        // As a mapping of the run page does, the reference outlives the file descriptor.
        let file = self.process.file(self.vcpus[vcpu]).ok_or(Errno::EBADF)?;
        self.process.run(|| file.ioctl(ioctl::RUN, 0))?;
        Ok(self.exit_of(&file))
    }

    /// Runs a vCPU until it says something to the device: what it stores.
    ///
    /// # Panics
    /// If it ends in another way.
    #[must_use]
    pub fn told(&self, vcpu: usize) -> u64 {
        match self.run(vcpu) {
            Ok(Exit::Mmio { gpa: DEVICE, write: Some(value), .. }) => value,
            other => panic!("vCPU {vcpu}: {other:?}, log: {:#?}", self.kernel.machine().log_lines()),
        }
    }

    /// What `struct kvm_run` says.
    ///
    /// # Panics
    /// If the vCPU was closed.
    #[must_use]
    pub fn exit(&self, vcpu: usize) -> Exit {
        self.exit_of(&self.process.file(self.vcpus[vcpu]).expect("an open vCPU"))
    }

    fn exit_of(&self, file: &FileObject<SimKernel>) -> Exit {
        let page = self.run_page(file);
        let field = |offset: usize| page[offset / 8].load(Relaxed);
        match (field(run::EXIT_REASON) & 0xFFFF_FFFF) as u32 {
            exit::MMIO => {
                let word = field(run::MMIO_LEN);
                let data = field(run::MMIO_DATA);
                let write = (word >> 32 & 0xFF != 0).then_some(data);
                Exit::Mmio { gpa: field(run::MMIO_PHYS_ADDR), len: (word & 0xFF) as u32, write }
            }
            exit::MEMORY_FAULT => Exit::MemoryFault {
                private: field(run::MEMORY_FAULT_FLAGS) & exit::MEMORY_FAULT_PRIVATE != 0,
                gpa: field(run::MEMORY_FAULT_GPA),
                size: field(run::MEMORY_FAULT_SIZE),
            },
            exit::SYSTEM_EVENT => Exit::SystemEvent((field(run::SYSTEM_EVENT_TYPE) & 0xFFFF_FFFF) as u32),
            other => Exit::Other(other),
        }
    }

    /// Runs a vCPU as an ordinary VMM does until the guest is done: answers conversions, devices and interruptions.
    /// Gives the system event's number. `device` answers the device's accesses: `Some(value)` is a store.
    ///
    /// # Errors
    /// As `KVM_RUN`; `EINTR` when a [`crate::host::Signal`] was raised.
    pub fn run_to_end(&self, vcpu: usize, device: &dyn Fn(u64, Option<u64>) -> u64) -> Result<u32> {
        loop {
            match self.run(vcpu)? {
                Exit::Mmio { gpa, write, .. } => {
                    let value = device(gpa, write);
                    if write.is_none() {
                        self.complete_mmio_read(vcpu, value);
                    }
                }
                Exit::MemoryFault { private, gpa, size } => {
                    self.set_private(gpa, size, private)?;
                    if !private {
                        self.punch_hole(gpa - RAM_BASE, size)?;
                    }
                }
                Exit::SystemEvent(event) => return Ok(event),
                Exit::Other(exit::SHUTDOWN | exit::UNKNOWN) => return Ok(0),
                Exit::Other(reason) => panic!("KVM_RUN of vCPU {vcpu} ended with exit reason {reason}"),
            }
        }
    }

    /// Runs all vCPUs on threads of their own until one of them reports the guest's end, then interrupts the others, as
    /// a VMM does.
    ///
    /// # Panics
    /// When a vCPU failed.
    pub fn run_all(&self, device: &(dyn Fn(u64, Option<u64>) -> u64 + Sync)) {
        let signals: Vec<Signal> = self.vcpus.iter().map(|_| Signal::default()).collect();
        let signals = &signals;
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..self.vcpus.len())
                .map(|vcpu| {
                    scope.spawn(move || {
                        signals[vcpu].adopt();
                        let result = self.run_to_end(vcpu, device);
                        signals.iter().for_each(Signal::raise);
                        result
                    })
                })
                .collect();
            for (vcpu, thread) in threads.into_iter().enumerate() {
                let result = thread.join().expect("the vCPU's thread");
                assert!(
                    matches!(result, Ok(_) | Err(Errno::EINTR)),
                    "vCPU {vcpu}: {result:?}, log: {:#?}",
                    self.kernel.machine().log_lines()
                );
            }
        });
    }
}
