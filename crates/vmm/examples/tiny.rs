//! A whole VMM in one file: one page of guest code, one vCPU, an address that prints. For authors of VMMs; see
//! docs/uapi.md. It uses nothing of this crate, only the numbers and structures of the ABI.
//!
//! ```text
//! cargo run -p vmm --example tiny          (as root, on an arm64 host with the module loaded)
//! ```

use std::io::{Error, Result, Write as _};

use cca_abi::kvm::{self, device_type, exit, ioctl, reg, rme, run, vcpu_feature, vgic_attr};

const RAM: u64 = 0x8000_0000;
const RAM_SIZE: u64 = 0x20_0000;
/// A store here prints a character. The guest uses the address with the top bit set.
const PRINTER: u64 = 0x100_0000;
const IPA_BITS: u64 = 33;

/// Prints "R\n", then SYSTEM_OFF.
const GUEST: [u32; 10] = [
    0xD2A0_2001, // movz x1, #0x0100, lsl #16   the printer
    0xF2C0_0021, // movk x1, #1, lsl #32        in the shared half
    0x5280_0A40, // mov  w0, #'R'
    0x3900_0020, // strb w0, [x1]
    0x5280_0140, // mov  w0, #'\n'
    0x3900_0020, // strb w0, [x1]
    0x5280_0100, // mov  w0, #8
    0x72B0_8000, // movk w0, #0x8400, lsl #16   PSCI SYSTEM_OFF
    0xD400_0003, // smc  #0
    0x1400_0000, // b    .
];

fn call<T>(fd: i32, request: u32, argument: &mut T) -> Result<i32> {
    // SAFETY: each request below is paired with the structure that it is defined for.
    let status = unsafe { libc::ioctl(fd, libc::c_ulong::from(request) as _, std::ptr::from_mut(argument)) };
    if status < 0 { Err(Error::last_os_error()) } else { Ok(status) }
}

fn call_with(fd: i32, request: u32, argument: u64) -> Result<i32> {
    // SAFETY: the requests below take a number.
    let status = unsafe { libc::ioctl(fd, libc::c_ulong::from(request) as _, argument) };
    if status < 0 { Err(Error::last_os_error()) } else { Ok(status) }
}

/// Shared anonymous memory, or a file's.
fn map(fd: i32, size: usize) -> Result<*mut u8> {
    let flags = libc::MAP_SHARED | if fd < 0 { libc::MAP_ANONYMOUS } else { 0 };
    // SAFETY: a new mapping.
    let address =
        unsafe { libc::mmap(std::ptr::null_mut(), size, libc::PROT_READ | libc::PROT_WRITE, flags, fd, 0) };
    if address == libc::MAP_FAILED { Err(Error::last_os_error()) } else { Ok(address.cast()) }
}

fn set_attribute(vm: i32, address: u64, size: u64, private: bool) -> Result<i32> {
    let attributes = if private { kvm::MEMORY_ATTRIBUTE_PRIVATE } else { 0 };
    let mut range = kvm::MemoryAttributes { address, size, attributes, flags: 0 };
    call(vm, ioctl::SET_MEMORY_ATTRIBUTES, &mut range)
}

fn rme<T>(vm: i32, command: u64, argument: &mut T) -> Result<i32> {
    let pointer = std::ptr::from_mut(argument) as u64;
    let cap = kvm::GENERATION_V2.cap_arm_rme;
    let mut enable = kvm::EnableCap { cap, flags: 0, args: [command, pointer, 0, 0], pad: [0; 64] };
    call(vm, ioctl::ENABLE_CAP, &mut enable)
}

fn main() -> Result<()> {
    // SAFETY: a constant string.
    let device = unsafe { libc::open(c"/dev/kvm-realm".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) };
    if device < 0 {
        return Err(Error::last_os_error());
    }
    let vm = call_with(device, ioctl::CREATE_VM, kvm::VM_TYPE_REALM | IPA_BITS)?;

    // RAM: private memory, and a shared face from which the first contents are copied.
    let shared = map(-1, RAM_SIZE as usize)?;
    for (n, instruction) in GUEST.iter().enumerate() {
        // SAFETY: inside the mapping.
        unsafe { shared.cast::<u32>().add(n).write(*instruction) };
    }
    let mut create = kvm::CreateGuestMemfd { size: RAM_SIZE, flags: 0, reserved: [0; 6] };
    let private = call(vm, ioctl::CREATE_GUEST_MEMFD, &mut create)?;
    let mut region = kvm::MemoryRegion2 {
        slot: 0,
        flags: kvm::MEM_GUEST_MEMFD,
        guest_phys_addr: RAM,
        memory_size: RAM_SIZE,
        userspace_addr: shared as u64,
        guest_memfd_offset: 0,
        guest_memfd: private as u32,
        pad1: 0,
        pad2: [0; 14],
    };
    call(vm, ioctl::SET_USER_MEMORY_REGION2, &mut region)?;
    set_attribute(vm, RAM, RAM_SIZE, true)?;

    let vcpu = call_with(vm, ioctl::CREATE_VCPU, 0)?;
    let mut init = kvm::VcpuInit { target: kvm::TARGET_GENERIC_V8, features: [0; 7] };
    init.features[0] = 1 << vcpu_feature::PSCI_0_2;
    call(vcpu, ioctl::ARM_VCPU_INIT, &mut init)?;
    let mut entry = RAM;
    let mut pc = kvm::OneReg { id: reg::CORE_PC, addr: std::ptr::from_mut(&mut entry) as u64 };
    call(vcpu, ioctl::SET_ONE_REG, &mut pc)?;
    let page = map(vcpu, run::MMAP_SIZE)?;

    // A Realm cannot run without an interrupt controller.
    let mut gic = kvm::CreateDevice { device_type: device_type::ARM_VGIC_V3, fd: 0, flags: 0 };
    call(vm, ioctl::CREATE_DEVICE, &mut gic)?;
    for (attr, mut address) in [(vgic_attr::ADDR_DIST, 0x800_0000u64), (vgic_attr::ADDR_REDIST, 0x80A_0000)] {
        let addr = std::ptr::from_mut(&mut address) as u64;
        let mut attr = kvm::DeviceAttr { flags: 0, group: vgic_attr::GRP_ADDR, attr, addr };
        call(gic.fd as i32, ioctl::SET_DEVICE_ATTR, &mut attr)?;
    }

    // The Realm: RAM is declared, the first page is copied and measured, the vCPU becomes a REC, the measurement ends.
    rme(vm, rme::CREATE_RD, &mut 0u64)?;
    rme(vm, rme::INIT_IPA_REALM, &mut kvm::RmeInitIpa { base: RAM, size: RAM_SIZE, reserved: [0; 4] })?;
    let flags = rme::POPULATE_FLAGS_MEASURE;
    rme(vm, rme::POPULATE_REALM, &mut kvm::RmePopulate { base: RAM, size: 4096, flags, reserved: [0; 3] })?;
    call(vcpu, ioctl::ARM_VCPU_FINALIZE, &mut { kvm::GENERATION_V2.vcpu_rec })?;
    rme(vm, rme::ACTIVATE_REALM, &mut 0u64)?;

    // Pages come at the first touch. Whoever knows which will be touched can give them in one call: these eight, say.
    let mut pages =
        kvm::PreFaultMemory { gpa: RAM + RAM_SIZE / 2, size: 8 * 4096, flags: 0, padding: [0; 5] };
    call(vcpu, ioctl::PRE_FAULT_MEMORY, &mut pages)?;
    if pages.size > 0 {
        return Err(Error::other("some pages are missing"));
    }

    loop {
        call_with(vcpu, ioctl::RUN, 0)?;
        // SAFETY: fields of the mapped `struct kvm_run`, which the module has written.
        let word = |offset: usize| unsafe { page.add(offset).cast::<u64>().read_volatile() };
        match word(run::EXIT_REASON) as u32 {
            exit::MMIO if word(run::MMIO_PHYS_ADDR) == PRINTER => {
                std::io::stdout().write_all(&[word(run::MMIO_DATA) as u8])?;
            }
            exit::MEMORY_FAULT => {
                let private_now = word(run::MEMORY_FAULT_FLAGS) & exit::MEMORY_FAULT_PRIVATE != 0;
                let (gpa, size) = (word(run::MEMORY_FAULT_GPA), word(run::MEMORY_FAULT_SIZE));
                set_attribute(vm, gpa, size, private_now)?;
                if !private_now {
                    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                    // SAFETY: only numbers.
                    unsafe { libc::fallocate(private, mode, (gpa - RAM) as _, size as _) };
                }
            }
            exit::SYSTEM_EVENT => return Ok(()),
            other => return Err(Error::other(format!("unexpected exit {other}"))),
        }
    }
}
