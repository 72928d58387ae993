//! The KVM ioctls that we use, as methods of the three kinds of file they work on.
//!
//! The numbers and layouts are `cca_abi::kvm`'s; this file only passes pointers. It compiles everywhere, because
//! the numbers are the same on every architecture, and works where the device is an arm64 one.

use std::ffi::CString;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use cca_abi::kvm::{
    CreateDevice, CreateGuestMemfd, DeviceAttr, EnableCap, GENERATION_V2, Ioeventfd, IrqLevel, IrqRouting,
    IrqRoutingEntry, Irqfd, MemoryAttributes, MemoryRegion, MemoryRegion2, OneReg, RmeConfigItem, RmeInitIpa,
    RmePopulate, VcpuEvents, VcpuInit, event, ioctl, reg, rme, run, vcpu_attr, vcpu_feature,
};
use zerocopy::{FromZeros, IntoBytes};

use crate::{Error, Layer, Result};

/// Blames the layer that an errno from the device points to, and says which call failed.
fn failed(what: &str, errno: i32) -> Error {
    let error = std::io::Error::from_raw_os_error(errno);
    // The module answers ENXIO exactly when the RMM refused something; its log has the RMM's words.
    let layer = if errno == libc::ENXIO { Layer::Rmm } else { Layer::Module };
    Error::new(layer, format!("{what}: {error}"))
}

fn last_errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
}

/// An ioctl whose argument is a number.
fn ioctl_value(fd: &OwnedFd, request: u32, value: u64) -> std::result::Result<RawFd, i32> {
    // SAFETY: the callers in this file use only requests that take the argument as a number.
    let status = unsafe { libc::ioctl(fd.as_raw_fd(), libc::c_ulong::from(request) as _, value) };
    if status < 0 { Err(last_errno()) } else { Ok(status) }
}

/// An ioctl whose argument points to a structure that the kernel reads, and in some cases writes.
fn ioctl_with<T>(fd: &OwnedFd, request: u32, argument: &mut T) -> std::result::Result<RawFd, i32> {
    // SAFETY: the callers in this file pair each request with the structure that it is defined for, whose size the
    // request's number contains; the reference is valid and exclusive for the call.
    let status = unsafe {
        libc::ioctl(fd.as_raw_fd(), libc::c_ulong::from(request) as _, std::ptr::from_mut(argument))
    };
    if status < 0 { Err(last_errno()) } else { Ok(status) }
}

fn owned(fd: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn pointer<T>(value: &mut T) -> u64 {
    u64::try_from(std::ptr::from_mut(value).expose_provenance()).unwrap_or(u64::MAX)
}

/// What a device writes, and where, to raise a message-signalled interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// Guest physical address.
    pub address: u64,
    /// The value.
    pub data: u32,
    /// The device's number, as the ITS knows it.
    pub device: u32,
}

/// The device.
#[derive(Debug)]
pub struct Kvm(OwnedFd);

impl Kvm {
    /// Opens the device and checks that it speaks the KVM ABI.
    pub fn open(path: &Path) -> Result<Self> {
        let name = CString::new(path.as_os_str().as_bytes())
            .map_err(|_| Error::vmm("the device's name contains a zero byte"))?;
        // SAFETY: the name is a terminated string.
        let fd = unsafe { libc::open(name.as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) };
        if fd < 0 {
            let errno = last_errno();
            let hint = match errno {
                libc::ENOENT => " (is the module kvm_realm loaded?)",
                libc::EACCES | libc::EPERM => " (it belongs to root)",
                _ => "",
            };
            let error = std::io::Error::from_raw_os_error(errno);
            return Err(Error::new(Layer::Module, format!("opening {}: {error}{hint}", path.display())));
        }
        let kvm = Self(owned(fd));
        let version =
            ioctl_value(&kvm.0, ioctl::GET_API_VERSION, 0).map_err(|e| failed("KVM_GET_API_VERSION", e))?;
        if i64::from(version) != cca_abi::kvm::API_VERSION {
            return Err(Error::new(
                Layer::Module,
                format!("the device speaks KVM version {version}, not 12"),
            ));
        }
        Ok(kvm)
    }

    /// A capability's value; 0 when the device does not know it.
    #[must_use]
    pub fn capability(&self, cap: u32) -> i32 {
        ioctl_value(&self.0, ioctl::CHECK_EXTENSION, cap.into()).unwrap_or(0)
    }

    /// Creates a virtual machine.
    pub fn create_vm(&self, machine_type: u64) -> Result<Vm> {
        let fd = ioctl_value(&self.0, ioctl::CREATE_VM, machine_type)
            .map_err(|e| failed(&format!("KVM_CREATE_VM with type {machine_type:#x}"), e))?;
        Ok(Vm(owned(fd)))
    }
}

/// A virtual machine.
#[derive(Debug)]
pub struct Vm(OwnedFd);

impl Vm {
    /// Creates a file for private memory.
    pub fn create_guest_memfd(&self, size: u64) -> Result<OwnedFd> {
        let mut argument = CreateGuestMemfd { size, flags: 0, reserved: [0; 6] };
        ioctl_with(&self.0, ioctl::CREATE_GUEST_MEMFD, &mut argument)
            .map(owned)
            .map_err(|e| failed("KVM_CREATE_GUEST_MEMFD", e))
    }

    /// Makes memory of this process the guest's memory.
    pub fn set_memory(&self, slot: u32, guest: u64, size: u64, host: u64) -> Result<()> {
        let mut argument =
            MemoryRegion { slot, flags: 0, guest_phys_addr: guest, memory_size: size, userspace_addr: host };
        done(ioctl_with(&self.0, ioctl::SET_USER_MEMORY_REGION, &mut argument), "KVM_SET_USER_MEMORY_REGION")
    }

    /// Makes memory of this process the guest's shared memory, and a memory file its private memory.
    pub fn set_private_memory(
        &self,
        slot: u32,
        guest: u64,
        size: u64,
        host: u64,
        private: &OwnedFd,
    ) -> Result<()> {
        let mut argument = MemoryRegion2::new_zeroed();
        argument.slot = slot;
        argument.flags = cca_abi::kvm::MEM_GUEST_MEMFD;
        argument.guest_phys_addr = guest;
        argument.memory_size = size;
        argument.userspace_addr = host;
        argument.guest_memfd =
            u32::try_from(private.as_raw_fd()).map_err(|_| Error::vmm("a file descriptor is negative"))?;
        done(
            ioctl_with(&self.0, ioctl::SET_USER_MEMORY_REGION2, &mut argument),
            "KVM_SET_USER_MEMORY_REGION2",
        )
    }

    /// Makes a range private or shared.
    pub fn set_attributes(&self, address: u64, size: u64, private: bool) -> Result<()> {
        let attributes = if private { cca_abi::kvm::MEMORY_ATTRIBUTE_PRIVATE } else { 0 };
        let mut argument = MemoryAttributes { address, size, attributes, flags: 0 };
        done(ioctl_with(&self.0, ioctl::SET_MEMORY_ATTRIBUTES, &mut argument), "KVM_SET_MEMORY_ATTRIBUTES")
    }

    /// Creates a device inside the kernel.
    pub fn create_device(&self, device_type: u32) -> Result<Device> {
        let mut argument = CreateDevice { device_type, fd: 0, flags: 0 };
        ioctl_with(&self.0, ioctl::CREATE_DEVICE, &mut argument)
            .map_err(|e| failed("KVM_CREATE_DEVICE", e))?;
        let fd = RawFd::try_from(argument.fd).map_err(|_| failed("KVM_CREATE_DEVICE", libc::EBADF))?;
        Ok(Device(owned(fd)))
    }

    /// Creates a virtual CPU.
    pub fn create_vcpu(&self, index: u32) -> Result<Vcpu> {
        let fd = ioctl_value(&self.0, ioctl::CREATE_VCPU, index.into())
            .map(owned)
            .map_err(|e| failed(&format!("KVM_CREATE_VCPU {index}"), e))?;
        // SAFETY: a new mapping of the descriptor, placed where nothing is.
        let run = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                run::MMAP_SIZE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        if run == libc::MAP_FAILED {
            return Err(failed("mapping a CPU's run page", last_errno()));
        }
        Ok(Vcpu { fd, run: RunPage(run.cast()) })
    }

    /// What `VcpuInit::target` should be.
    pub fn preferred_target(&self) -> Result<u32> {
        let mut argument = VcpuInit::new_zeroed();
        ioctl_with(&self.0, ioctl::ARM_PREFERRED_TARGET, &mut argument)
            .map_err(|e| failed("KVM_ARM_PREFERRED_TARGET", e))?;
        Ok(argument.target)
    }

    /// Sets the level of a shared peripheral interrupt, counted from 0.
    pub fn set_spi(&self, spi: u32, level: bool) -> Result<()> {
        const TYPE_SPI: u32 = 1 << 24;
        const FIRST_SPI: u32 = 32;
        let mut argument = IrqLevel { irq: TYPE_SPI | (FIRST_SPI + spi), level: level.into() };
        done(ioctl_with(&self.0, ioctl::IRQ_LINE, &mut argument), "KVM_IRQ_LINE")
    }

    /// Replaces the table that says which message each global interrupt (GSI) is.
    pub fn set_message_routes(&self, routes: impl Iterator<Item = (u32, Message)>) -> Result<()> {
        let entries: Vec<IrqRoutingEntry> = routes
            .map(|(gsi, message)| IrqRoutingEntry {
                gsi,
                kind: event::ROUTING_MSI,
                flags: event::MSI_VALID_DEVID,
                pad: 0,
                u: [
                    u32::try_from(message.address & 0xffff_ffff).unwrap_or(0),
                    u32::try_from(message.address >> 32).unwrap_or(0),
                    message.data,
                    message.device,
                    0,
                    0,
                    0,
                    0,
                ],
            })
            .collect();
        let nr = u32::try_from(entries.len()).map_err(|_| Error::vmm("too many interrupts"))?;
        let mut table = IrqRouting { nr, flags: 0 }.as_bytes().to_vec();
        entries.iter().for_each(|entry| table.extend(entry.as_bytes()));
        // SAFETY: the kernel reads a header and as many entries as it says, which is what the vector holds.
        let status = unsafe {
            libc::ioctl(
                self.0.as_raw_fd(),
                libc::c_ulong::from(ioctl::SET_GSI_ROUTING) as _,
                table.as_mut_ptr(),
            )
        };
        if status < 0 { Err(failed("KVM_SET_GSI_ROUTING", last_errno())) } else { Ok(()) }
    }

    /// Makes an eventfd raise a global interrupt whenever it is signalled, for as long as it is open.
    pub fn connect_interrupt(&self, gsi: u32, fd: RawFd) -> Result<()> {
        let fd = u32::try_from(fd).map_err(|_| Error::vmm("a file descriptor is negative"))?;
        let mut argument = Irqfd { fd, gsi, flags: 0, resamplefd: 0, pad: [0; 16] };
        done(ioctl_with(&self.0, ioctl::IRQFD, &mut argument), "KVM_IRQFD")
    }

    /// Makes stores of any length to `address` signal an eventfd instead of ending `KVM_RUN`, or no longer.
    pub fn set_doorbell(&self, address: u64, fd: RawFd, there: bool) -> Result<()> {
        let flags = if there { 0 } else { event::IOEVENTFD_DEASSIGN };
        let mut argument = Ioeventfd { datamatch: 0, addr: address, len: 0, fd, flags, pad: [0; 36] };
        done(ioctl_with(&self.0, ioctl::IOEVENTFD, &mut argument), "KVM_IOEVENTFD")
    }

    /// Chooses the hash of the Realm's measurement: `rme::HASH_SHA256` or `rme::HASH_SHA512`.
    pub fn realm_hash(&self, hash: u32) -> Result<()> {
        let mut item = RmeConfigItem { cfg: rme::CFG_HASH_ALGO, data: [0; 256] };
        item.data[..4].copy_from_slice(&hash.to_ne_bytes());
        self.rme(rme::CONFIG_REALM, pointer(&mut item), "choosing the Realm's hash algorithm")
    }

    /// Sets the Realm's personalization value.
    pub fn realm_personalization(&self, value: &[u8; 64]) -> Result<()> {
        let mut item = RmeConfigItem { cfg: rme::CFG_RPV, data: [0; 256] };
        item.data[..64].copy_from_slice(value);
        self.rme(rme::CONFIG_REALM, pointer(&mut item), "setting the Realm's personalization value")
    }

    /// Creates the Realm.
    pub fn realm_create(&self) -> Result<()> {
        self.rme(rme::CREATE_RD, 0, "creating the Realm")
    }

    /// Says that a range is RAM.
    pub fn realm_init_ipa(&self, base: u64, size: u64) -> Result<()> {
        let mut argument = RmeInitIpa { base, size, reserved: [0; 4] };
        self.rme(rme::INIT_IPA_REALM, pointer(&mut argument), "declaring the Realm's RAM")
    }

    /// Copies a range from shared memory into the Realm and measures it.
    pub fn realm_populate(&self, base: u64, size: u64) -> Result<()> {
        let mut argument = RmePopulate { base, size, flags: rme::POPULATE_FLAGS_MEASURE, reserved: [0; 3] };
        self.rme(
            rme::POPULATE_REALM,
            pointer(&mut argument),
            &format!("populating the Realm's memory from {base:#x} on ({size:#x} bytes)"),
        )
    }

    /// Makes the Realm ready to run; nothing can be measured afterwards.
    pub fn realm_activate(&self) -> Result<()> {
        self.rme(rme::ACTIVATE_REALM, 0, "activating the Realm")
    }

    fn rme(&self, command: u64, argument: u64, what: &str) -> Result<()> {
        let mut enable = EnableCap {
            cap: GENERATION_V2.cap_arm_rme,
            flags: 0,
            args: [command, argument, 0, 0],
            pad: [0; 64],
        };
        done(ioctl_with(&self.0, ioctl::ENABLE_CAP, &mut enable), what)
    }
}

fn done(result: std::result::Result<RawFd, i32>, what: &str) -> Result<()> {
    result.map(|_| ()).map_err(|errno| failed(what, errno))
}

/// A device inside the kernel.
#[derive(Debug)]
pub struct Device(OwnedFd);

impl Device {
    /// Sets an attribute; `value` is what the kernel reads through the attribute's pointer.
    pub fn set<T>(&self, group: u32, attribute: u64, value: &mut T, what: &str) -> Result<()> {
        let mut argument = DeviceAttr { flags: 0, group, attr: attribute, addr: pointer(value) };
        done(ioctl_with(&self.0, ioctl::SET_DEVICE_ATTR, &mut argument), what)
    }
}

/// A CPU's page that is shared with the kernel.
#[derive(Debug)]
struct RunPage(*mut u8);

// SAFETY: the mapping stays until the owner is dropped, and every access is a volatile one of a plain integer.
unsafe impl Send for RunPage {}
// SAFETY: as above; the only field that two threads touch at a time is the one-byte `immediate_exit`.
unsafe impl Sync for RunPage {}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: this is the mapping that `create_vcpu` made; its owner is going away.
        unsafe { libc::munmap(self.0.cast(), run::MMAP_SIZE) };
    }
}

/// Why a CPU stopped running.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The guest reads `len` bytes of a device; answer with [`Vcpu::answer_read`].
    Read {
        /// Guest physical address.
        address: u64,
        /// Bytes.
        len: usize,
    },
    /// The guest writes to a device.
    Write {
        /// Guest physical address.
        address: u64,
        /// The bytes, of which the first `len` count.
        data: [u8; 8],
        /// Bytes.
        len: usize,
    },
    /// The guest wants a range to be private, or shared.
    MemoryFault {
        /// Guest physical address.
        address: u64,
        /// Bytes.
        size: u64,
        /// Private, or shared.
        private: bool,
    },
    /// The guest switched itself off, or the like.
    System(u32),
    /// A signal, or [`Vcpu::stop_soon`].
    Interrupted,
    /// Nothing; run again.
    Again,
    /// The kernel cannot go on. The numbers are the exit's reason and the first words of its details.
    Broken(u32, u64),
    /// The kernel refused to run the CPU.
    Refused(i32),
}

/// A virtual CPU.
#[derive(Debug)]
pub struct Vcpu {
    fd: OwnedFd,
    run: RunPage,
}

impl Vcpu {
    /// Resets the CPU, with the given features.
    pub fn init(&self, target: u32, features: u32) -> Result<()> {
        let mut argument = VcpuInit { target, features: [features, 0, 0, 0, 0, 0, 0] };
        done(ioctl_with(&self.fd, ioctl::ARM_VCPU_INIT, &mut argument), "KVM_ARM_VCPU_INIT")
    }

    /// Creates the CPU's REC: its registers are final from here on.
    pub fn finalize_rec(&self) -> Result<()> {
        let mut feature = GENERATION_V2.vcpu_rec;
        done(ioctl_with(&self.fd, ioctl::ARM_VCPU_FINALIZE, &mut feature), "creating a CPU of the Realm")
    }

    /// Sets a register.
    pub fn set_register(&self, id: u64, mut value: u64) -> Result<()> {
        let mut argument = OneReg { id, addr: pointer(&mut value) };
        done(ioctl_with(&self.fd, ioctl::SET_ONE_REG, &mut argument), "KVM_SET_ONE_REG")
    }

    /// Reads a register.
    pub fn register(&self, id: u64) -> Result<u64> {
        let mut value = 0u64;
        let mut argument = OneReg { id, addr: pointer(&mut value) };
        done(ioctl_with(&self.fd, ioctl::GET_ONE_REG, &mut argument), "KVM_GET_ONE_REG")?;
        // The kernel wrote through the address; read it where it lies.
        // SAFETY: a valid, aligned local variable.
        Ok(unsafe { std::ptr::read_volatile(&raw const value) })
    }

    /// The lengths of SVE vectors that there are: bit n stands for (n + 1) × 128 bits.
    pub fn sve_lengths(&self) -> Result<u64> {
        let mut lengths = [0u64; 8];
        let mut argument = OneReg { id: reg::SVE_VLS, addr: pointer(&mut lengths) };
        done(ioctl_with(&self.fd, ioctl::GET_ONE_REG, &mut argument), "reading the SVE vector lengths")?;
        // The kernel wrote through the address; read it where it lies.
        // SAFETY: a valid, aligned local variable.
        Ok(unsafe { std::ptr::read_volatile(&raw const lengths[0]) })
    }

    /// Gives the CPU vectors of `quads` × 128 bits at most, and makes its choice final.
    pub fn set_sve(&self, quads: u32) -> Result<()> {
        let mut lengths = [0u64; 8];
        lengths[0] = self.sve_lengths()? & ((1u64 << quads.min(63)) - 1);
        if lengths[0] >> quads.saturating_sub(1).min(63) & 1 == 0 {
            return Err(Error::new(Layer::Module, "the machine has no vectors of this length"));
        }
        let mut argument = OneReg { id: reg::SVE_VLS, addr: pointer(&mut lengths) };
        done(ioctl_with(&self.fd, ioctl::SET_ONE_REG, &mut argument), "setting the SVE vector lengths")?;
        let mut feature = vcpu_feature::SVE;
        done(ioctl_with(&self.fd, ioctl::ARM_VCPU_FINALIZE, &mut feature), "making SVE final")
    }

    /// Switches the PMU on; it interrupts with a private interrupt.
    pub fn set_pmu_interrupt(&self, mut interrupt: u32) -> Result<()> {
        let mut attr = DeviceAttr {
            flags: 0,
            group: vcpu_attr::GRP_PMU_V3,
            attr: vcpu_attr::PMU_V3_IRQ,
            addr: pointer(&mut interrupt),
        };
        done(ioctl_with(&self.fd, ioctl::SET_DEVICE_ATTR, &mut attr), "choosing the PMU's interrupt")
    }

    /// Makes the PMU's settings final; the GIC must be there.
    pub fn start_pmu(&self) -> Result<()> {
        let mut attr =
            DeviceAttr { flags: 0, group: vcpu_attr::GRP_PMU_V3, attr: vcpu_attr::PMU_V3_INIT, addr: 0 };
        done(ioctl_with(&self.fd, ioctl::SET_DEVICE_ATTR, &mut attr), "starting the PMU")
    }

    /// Injects an external abort as the answer to the device access that the guest just made.
    pub fn inject_abort(&self) -> Result<()> {
        let mut events = VcpuEvents::new_zeroed();
        events.ext_dabt_pending = 1;
        done(ioctl_with(&self.fd, ioctl::SET_VCPU_EVENTS, &mut events), "KVM_SET_VCPU_EVENTS")
    }

    /// Makes the next or the current [`Vcpu::run`] return. A signal must follow for the current one.
    pub fn stop_soon(&self, stop: bool) {
        self.write(run::IMMEDIATE_EXIT, u8::from(stop));
    }

    /// Runs the guest until it needs something.
    pub fn run(&self) -> Exit {
        let errno = ioctl_value(&self.fd, ioctl::RUN, 0).err();
        let reason: u32 = self.read(run::EXIT_REASON);
        match errno {
            // Later generations of the ABI report memory faults together with EFAULT.
            Some(libc::EFAULT) if reason == cca_abi::kvm::exit::MEMORY_FAULT => self.decode(reason),
            Some(libc::EINTR) => Exit::Interrupted,
            Some(libc::EAGAIN) => Exit::Again,
            Some(errno) => Exit::Refused(errno),
            None => self.decode(reason),
        }
    }

    /// The answer to [`Exit::Read`].
    pub fn answer_read(&self, data: [u8; 8]) {
        self.write(run::MMIO_DATA, data);
    }

    fn decode(&self, reason: u32) -> Exit {
        use cca_abi::kvm::exit;
        match reason {
            exit::MMIO => {
                let address = self.read(run::MMIO_PHYS_ADDR);
                let len = usize::try_from(self.read::<u32>(run::MMIO_LEN)).unwrap_or(8).min(8);
                if self.read::<u8>(run::MMIO_IS_WRITE) != 0 {
                    Exit::Write { address, data: self.read(run::MMIO_DATA), len }
                } else {
                    Exit::Read { address, len }
                }
            }
            exit::MEMORY_FAULT => Exit::MemoryFault {
                address: self.read(run::MEMORY_FAULT_GPA),
                size: self.read(run::MEMORY_FAULT_SIZE),
                private: self.read::<u64>(run::MEMORY_FAULT_FLAGS) & exit::MEMORY_FAULT_PRIVATE != 0,
            },
            exit::SYSTEM_EVENT => Exit::System(self.read(run::SYSTEM_EVENT_TYPE)),
            // Another CPU has switched the machine off, or simply nothing.
            exit::UNKNOWN => Exit::Again,
            exit::INTR => Exit::Interrupted,
            exit::SHUTDOWN => Exit::System(exit::SYSTEM_EVENT_SHUTDOWN),
            reason => Exit::Broken(reason, self.read(run::INTERNAL_SUBERROR)),
        }
    }

    fn read<T: zerocopy::FromBytes>(&self, offset: usize) -> T {
        const { assert!(size_of::<T>() <= 8) };
        // SAFETY: the offsets are `cca_abi`'s, all within the first page of the mapping and aligned for their types.
        unsafe { std::ptr::read_volatile(self.run.0.add(offset).cast::<T>()) }
    }

    fn write<T: zerocopy::IntoBytes>(&self, offset: usize, value: T) {
        const { assert!(size_of::<T>() <= 8) };
        // SAFETY: as in `read`; only this value's owner writes there, or anybody a single byte.
        unsafe { std::ptr::write_volatile(self.run.0.add(offset).cast::<T>(), value) }
    }
}
