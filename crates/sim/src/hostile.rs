//! What hostile VMMs do: anything, in any order, from any number of threads.

use crate::memory::PAGE_SIZE;
use crate::vmm::{DEVICE, Exit, GICD, GICR, RAM_BASE, SHARED, Vmm};
use cca_abi::kvm::{self, ioctl};
use kvm_realm::errno::{Errno, Result};
use zerocopy::{FromZeros, IntoBytes};

/// Deterministic random numbers.
pub struct Random(u64);

impl Random {
    /// A series of its own for each seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// Any 64 bits, the lower ones less random.
    pub fn word(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Any 53 bits.
    pub fn bits(&mut self) -> u64 {
        self.word() >> 11
    }

    /// A number below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.bits() % limit
    }

    /// One of these.
    pub fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }

    /// Yes or no.
    pub fn coin(&mut self) -> bool {
        self.below(2) == 0
    }

    /// A page of `ram` bytes of RAM.
    pub fn page(&mut self, ram: u64) -> u64 {
        RAM_BASE + self.below(ram / PAGE_SIZE) * PAGE_SIZE
    }
}

/// ioctls that change something, and that come back whatever a guest does.
pub const CHANGES: &[u32] = &[
    ioctl::CREATE_VCPU,
    ioctl::SET_USER_MEMORY_REGION,
    ioctl::SET_USER_MEMORY_REGION2,
    ioctl::CREATE_GUEST_MEMFD,
    ioctl::SET_MEMORY_ATTRIBUTES,
    ioctl::ENABLE_CAP,
    ioctl::ENABLE_CAP,
    ioctl::ENABLE_CAP,
    ioctl::CREATE_DEVICE,
    ioctl::SET_DEVICE_ATTR,
    ioctl::ARM_VCPU_INIT,
    ioctl::ARM_VCPU_FINALIZE,
    ioctl::SET_ONE_REG,
    ioctl::GET_REG_LIST,
    ioctl::SET_VCPU_EVENTS,
    ioctl::SIGNAL_MSI,
    ioctl::PRE_FAULT_MEMORY,
    kvm::GENERATION_V2.psci_complete,
];

/// All others, also such as wait for a guest.
pub const OTHERS: &[u32] = &[
    ioctl::CHECK_EXTENSION,
    ioctl::ARM_PREFERRED_TARGET,
    ioctl::IRQ_LINE,
    ioctl::GET_DEVICE_ATTR,
    ioctl::HAS_DEVICE_ATTR,
    ioctl::RUN,
    ioctl::GET_ONE_REG,
    ioctl::GET_MP_STATE,
    ioctl::SET_MP_STATE,
    ioctl::SET_SIGNAL_MASK,
    ioctl::GET_VCPU_EVENTS,
    ioctl::IRQFD,
    ioctl::IOEVENTFD,
    ioctl::SET_GSI_ROUTING,
    ioctl::REGISTER_COALESCED_MMIO,
    ioctl::UNREGISTER_COALESCED_MMIO,
    ioctl::ARM_GET_REG_WRITABLE_MASKS,
    ioctl::GET_DIRTY_LOG,
    ioctl::SET_GUEST_DEBUG,
];

/// Nobody makes the RMM refuse by doing two things at once: what it then says becomes one of these.
///
/// # Panics
/// If the result is one of them.
pub fn expected<T: std::fmt::Debug>(result: Result<T>) {
    let refused = [Errno::EEXIST, Errno::EAGAIN, Errno::EBUSY, Errno::EIO, Errno::EHWPOISON];
    assert!(!matches!(result, Err(errno) if refused.contains(&errno)), "{result:?}");
}

/// One thread of a VMM.
pub struct Caller {
    /// Its view of the VMM, with a buffer of its own for arguments.
    pub vmm: Vmm,
    /// What it chooses by.
    pub random: Random,
}

impl Caller {
    /// A thread that makes the choices of this `seed`.
    #[must_use]
    pub fn new(vmm: &Vmm, seed: u64) -> Self {
        Self { vmm: vmm.second(), random: Random::new(seed) }
    }

    /// Pulls up to `most` pages from `base` away under the guest, in every way there is.
    pub fn disturb_memory(&mut self, base: u64, most: u64) {
        let ram = self.vmm.config.ram;
        let size = (1 + self.random.below(most)) * PAGE_SIZE;
        let offset = base - RAM_BASE;
        let vmm = &self.vmm;
        match self.random.below(10) {
            0..3 => expected(vmm.set_private(base, size, self.random.coin())),
            3 | 4 => vmm.process.discard(vmm.ram + offset, size.min(ram - offset)),
            5 => drop(vmm.punch_hole(offset, size)),
            6 => drop(vmm.fallocate(vmm.gmem(), 0, offset, PAGE_SIZE)),
            7 => {
                let _ = vmm.set_slot(0, 0, 0, true);
                let _ = vmm.set_slot(0, RAM_BASE, ram, true);
            }
            8 => {
                // A slot without private memory, moved about, also onto others.
                let base = self.random.of(&[RAM_BASE - ram, RAM_BASE + ram, base]);
                let _ = vmm.set_slot(1, base, ram, false);
            }
            _ => drop(vmm.set_slot(1, 0, 0, false)),
        }
    }

    /// Any ioctl of these lists on any file with anything in its argument.
    pub fn fuzz(&mut self, lists: &[&[u32]]) {
        let ram = self.vmm.config.ram;
        // Where the argument lies, and where what it points to.
        let (at, to) = (self.vmm.scratch, self.vmm.scratch + 2048);
        let words = [
            0,
            1,
            2,
            3,
            7,
            8,
            300,
            PAGE_SIZE,
            ram,
            RAM_BASE,
            RAM_BASE + PAGE_SIZE,
            SHARED - PAGE_SIZE,
            SHARED,
            1 << 47,
            1 << 62,
            0u64.wrapping_sub(PAGE_SIZE),
            u64::MAX,
            self.vmm.ram,
            to,
            DEVICE,
            GICD,
            GICR,
            0x6030_0000_0010_0040,
            0x6030_0000_0013_C028,
            kvm::reg::SVE_VLS,
            // Eventfds.
            1000,
            1001,
        ];
        let mut argument = [0u32; 256];
        for pair in argument.chunks_exact_mut(2) {
            let word = self.random.of(&words);
            let other = self.random.of(&words);
            match self.random.below(4) {
                0 => (pair[0], pair[1]) = (word as u32, other as u32),
                1 => (pair[0], pair[1]) = (word as u32, self.random.below(12) as u32),
                2 => (pair[0], pair[1]) = (0, 0),
                _ => (pair[0], pair[1]) = (word as u32, (word >> 32) as u32),
            }
        }
        let commands = self.random.of(lists);
        let any = self.random.bits() as u32;
        let command = if self.random.below(40) == 0 { any } else { self.random.of(commands) };
        if command == ioctl::ENABLE_CAP {
            // cap, flags, args[0] and args[1], most of the time as they should be.
            let sub = self.random.below(6) as u32;
            argument[..6].copy_from_slice(&[300, 0, sub, 0, to as u32, (to >> 32) as u32]);
        }
        let _ = self.vmm.process.write(at, argument.as_bytes());
        let _ = self.vmm.process.write(to, &argument.as_bytes()[512..]);
        let fd = 3 + self.random.below(10) as i32;
        let value = match command {
            ioctl::RUN => 0,
            ioctl::CREATE_VCPU if self.random.coin() => self.random.below(3),
            ioctl::CREATE_VCPU | ioctl::CHECK_EXTENSION => self.random.of(&words),
            _ if self.random.below(30) == 0 => self.random.of(&words),
            _ => at,
        };
        let _ = self.vmm.ioctl_value(fd, command, value);
        if self.random.below(8) == 0 {
            let mode = self.random.below(5) as u32;
            let (offset, len) = (self.random.of(&words), self.random.of(&words));
            // Not everything there is: the other threads want to get somewhere, too.
            if mode & 2 != 0 || len <= ram {
                let _ = self.vmm.fallocate(fd, mode, offset, len);
            }
        }
    }

    /// Runs a vCPU once, and does what the guest then wants, most of the time.
    ///
    /// # Errors
    /// As `KVM_RUN`.
    pub fn run(&mut self, vcpu: usize) -> Result<Exit> {
        let exit = self.vmm.run(vcpu)?;
        match exit {
            Exit::Mmio { write: None, .. } => {
                self.vmm.complete_mmio_read(vcpu, self.random.bits());
                if self.random.below(4) == 0 {
                    let mut events = kvm::VcpuEvents::new_zeroed();
                    events.ext_dabt_pending = 1;
                    let _ = self.vmm.ioctl(self.vmm.vcpus[vcpu], ioctl::SET_VCPU_EVENTS, &mut events);
                }
            }
            Exit::MemoryFault { private, gpa, size } if self.random.below(8) != 0 => {
                expected(self.vmm.set_private(gpa, size, private));
                if !private {
                    let _ = self.vmm.punch_hole(gpa.wrapping_sub(RAM_BASE), size);
                }
            }
            _ => {}
        }
        Ok(exit)
    }
}
